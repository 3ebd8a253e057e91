"""Learned priors: every family on channels 64 × 64, densities against exact ones, a 64 × 64 prior at 256 × 256.

Channels: `MeanderingChannels(shape=(64, 64))`. The priors that ship (`invgen.priors.pretrained`) were trained on the stream
of seed 0; 4000 held-out images come from seed 1000. A figure of the table is the distance of 2000 draws to halves of the
held-out images over the distance of the halves to each other, mean of 10 splits (`diagnostics.compare_fields`), and the
worst of sliced Wasserstein, variogram, connectivity and proportions is the family's. Draws are compared as they are;
connectivity, proportions and patterns are of the set above 0.5.

A 64 × 64 prior at 256 × 256: variance of the columns and rows at former borders (multiples of 64, one pixel at each side)
over that of the others at least 16 away, and the variogram to lag 8 across such borders over that elsewhere: the largest
relative difference [at_seams]. The power of the four lowest radial wavenumbers over the generator's at that size, largest
relative difference [at_spectrum].

Real data, a sandstone and galaxies, are in real_priors.py.

    python benchmarks/priors.py [--fast] [--parts families,densities,seams,berea,galaxies] [--figures FOLDER]

--fast: 200 draws against 400 held-out images, 16 images at 256 × 256, no densities, real data with priors of 100 steps.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from harness import Benchmark
from real_priors import berea, galaxies
from torch import Tensor

from invgen.data.channels import MeanderingChannels
from invgen.diagnostics.generative import compare_fields, memorisation
from invgen.priors import pretrained

FAMILIES = {
    "diffusion": "channels-diffusion",
    "flow_matching": "channels-flow-matching",
    "consistency": "channels-consistency",
    "wgan": "channels-wgan",
    "vae": "channels-vae",
}
WORST = ("sliced wasserstein", "variogram", "connectivity", "proportions")
HELD_OUT, TRAINING = 1000, 0  # seeds


def families(bench: Benchmark) -> None:
    """The table of all families."""
    n = 200 if bench.fast else 2000
    generator = MeanderingChannels()
    held = torch.from_numpy(generator.sample(2 * n, seed=HELD_OUT))
    train = torch.from_numpy(generator.sample(2 * n, seed=TRAINING))
    print(
        f"\nchannels 64 × 64, {n} draws, ratios to the floor\n{'family':15s} {'weights':>9s} {'trained, s':>10s} {'s/1000':>8s} "
        + " ".join(f"{k[:12]:>12s}" for k in (*WORST, "patterns", "minkowski"))
        + f" {'nearest':>8s}"
    )
    for family, name in FAMILIES.items():
        if name not in pretrained.available():
            print(f"{family:15s} there is no pretrained prior {name}")
            bench.add(f"{family}_worst_ratio", math.nan, "x", note=f"no pretrained prior {name}")
            continue
        prior = pretrained.load(name).to(bench.args.device)
        began = time.process_time()
        with torch.no_grad():
            draws = prior.sample(n, seed=1).cpu()
        seconds = (time.process_time() - began) * 1000 / n
        result = compare_fields(draws, held)
        memory = memorisation(draws, train, held)
        ratios = result.ratios
        card = pretrained.card(name)
        weights = sum(p.numel() for p in prior.parameters())
        print(
            f"{family:15s} {weights:9d} {card.get('training_seconds', math.nan):10.0f} {seconds:8.1f} "
            + " ".join(f"{ratios[k]:12.2f}" for k in (*WORST, "patterns", "minkowski"))
            + f" {memory.ratio:8.3f}",
            flush=True,
        )
        worst = max(WORST, key=lambda k: ratios[k])
        bench.add(f"{family}_worst_ratio", ratios[worst], "x", note=f"{worst}; {seconds:.1f} s of CPU for 1000 draws")


def densities(bench: Benchmark) -> None:
    """Log-likelihoods against exact ones."""
    import likelihoods
    from vae_ppca import ppca_gap

    began = time.process_time()
    gaps = {kind: likelihoods.flow_nll_gap(kind=kind) for kind in ("nsf", "realnvp")}
    told = ", ".join(f"{kind} {gap:.4f}" for kind, gap in gaps.items())
    bench.add("flow_nll_gap", max(gaps.values()), "nats", note=f"{told}; {time.process_time() - began:.0f} s of CPU")
    for name in ("cnf_nll_gap", "fm_nll_gap", "ode_loglik_error"):
        began = time.process_time()
        value = getattr(likelihoods, name)()
        bench.add(name, value, "nats", note=f"{time.process_time() - began:.0f} s of CPU")
    bench.add("ppca_gap", ppca_gap(), "nats a dimension")


def seams(bench: Benchmark) -> None:
    """A 64 × 64 prior on a 256 × 256 grid."""
    if FAMILIES["diffusion"] not in pretrained.available():
        for name in ("at_seams", "at_spectrum"):
            bench.add(name, math.nan, "", note="no pretrained prior of channels")
        return
    n = 16 if bench.fast else 100
    prior = pretrained.load(FAMILIES["diffusion"]).to(bench.args.device)
    with torch.no_grad():
        draws = prior.at((256, 256)).sample(n, seed=2).cpu()[:, 0].double()
    truth = torch.from_numpy(MeanderingChannels(shape=(256, 256)).sample(n, seed=HELD_OUT))[:, 0].double()
    value, error = seam_difference(draws)
    bench.add("at_seams", value, "", error, note=f"{n} images")
    value, error = spectrum_difference(draws, truth)
    bench.add("at_spectrum", value, "", error, note=f"{n} images")


def seam_difference(x: Tensor, period: int = 64, reach: int = 8) -> tuple[float, float]:
    """Largest relative difference of variance and variogram at and away from multiples of `period`, and its error."""

    def figures(v: Tensor) -> Tensor:
        out = []
        for image in (v, v.transpose(1, 2)):
            size = image.shape[2]
            columns = torch.arange(size)
            gap = (columns + 0.5 - period * torch.round((columns + 0.5) / period)).abs()
            inner = (columns >= period // 2) & (columns < size - period // 2)
            at, away = (gap < 1) & inner, (gap > 16) & inner
            variance = image.var(dim=(0, 1))
            out.append(variance[at].mean() / variance[away].mean() - 1)
            for h in range(1, reach + 1):
                gamma = 0.5 * (image[:, :, h:] - image[:, :, :-h]).square().mean((0, 1))
                middle = (columns[:-h] + columns[h:]) / 2 + 0.5
                distance = (middle - period * torch.round(middle / period)).abs()
                inside = (middle >= period // 2) & (middle < size - period // 2)
                out.append(gamma[(distance <= h / 2) & inside].mean() / gamma[(distance > 16) & inside].mean() - 1)
        return torch.stack(out)

    found = figures(x)
    parts = torch.stack([figures(x[k::5]) for k in range(5)])
    worst = int(found.abs().argmax())
    return float(found[worst].abs()), float(parts[:, worst].std()) / math.sqrt(5)


def spectrum_difference(x: Tensor, y: Tensor, rings: int = 4) -> tuple[float, float]:
    """Largest |power of x / power of y − 1| over the lowest radial wavenumbers, and its standard error."""

    def power(v: Tensor) -> np.ndarray:
        spectrum = torch.fft.fft2(v - v.mean()).abs().square()
        k = torch.fft.fftfreq(v.shape[1]) * v.shape[1]
        radius = torch.sqrt(k[:, None] ** 2 + k**2).round()
        return torch.stack([spectrum[:, radius == r].mean(1) for r in range(1, rings + 1)], 1).numpy()

    a, b = power(x), power(y)
    ratio = a.mean(0) / b.mean(0)
    worst = int(np.abs(ratio - 1).argmax())
    relative = [v[:, worst].std() / v[:, worst].mean() / math.sqrt(len(v)) for v in (a, b)]
    return float(abs(ratio[worst] - 1)), float(ratio[worst] * math.hypot(*relative))


PARTS: dict[str, Any] = {
    "families": families,
    "densities": densities,
    "seams": seams,
    "berea": berea,
    "galaxies": galaxies,
}


def main() -> None:
    bench = Benchmark(
        "priors",
        "Learned priors against held-out images and exact densities.",
        {
            "--parts": {"default": ",".join(PARTS), "help": "what to measure, comma-separated"},
            "--figures": {"default": None, "help": "folder for pictures of the parts on real data; none when omitted"},
        },
    )
    for name in bench.args.parts.split(","):
        if not (bench.fast and name == "densities"):
            PARTS[name](bench)
    bench.finish()


if __name__ == "__main__":
    main()
