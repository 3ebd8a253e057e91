"""Learned priors: every family on channels 64 × 64, densities against exact ones, a 64 × 64 prior at 256 × 256.

Channels: `MeanderingChannels(shape=(64, 64))`. The priors that ship (`invgen.priors.pretrained`) were trained on the stream
of seed 0; 4000 held-out images come from seed 1000. A figure of the table is the distance of 2000 draws to halves of the
held-out images over the distance of the halves to each other, mean of 10 splits (`diagnostics.compare_fields`), and the
worst of sliced Wasserstein, variogram, connectivity and proportions is the family's. Draws are compared as they are;
connectivity, proportions and patterns are of the set above 0.5.

A 64 × 64 prior at 256 × 256: variance of the columns and rows at former borders (multiples of 64, one pixel at each side)
over that of the others at least 16 away, and the variogram to lag 8 across such borders over that elsewhere: the largest
relative difference [at_seams]. It is a largest of 18 figures, which noise can only enlarge: 100 independent images read 0.04
of the generator, which has no seams. Each noise is therefore drawn 32 times, moved in a circle by 66 k pixels along both axes,
k = 0 … 31. Moved noise is noise, so that every image is a draw of the prior and the figures are the same ones; but what the
noise makes lies at borders and away from them in turn, and the difference is left with little else than a seam. Standard
errors are jackknives over the noises. The power of the four lowest radial wavenumbers over the generator's at that size,
largest relative difference [at_spectrum].

Real data, a sandstone and galaxies, are in real_priors.py.

    python benchmarks/priors.py [--fast] [--parts families,densities,seams,berea,galaxies] [--figures FOLDER]

--fast: 200 draws against 400 held-out images, two noises at eight places at 256 × 256, no densities, real data with priors of 100 steps.
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
from invgen.streams import Streams

FAMILIES = {
    "diffusion": "channels-diffusion",
    "flow_matching": "channels-flow-matching",
    "consistency": "channels-consistency",
    "wgan": "channels-wgan",
    "vae": "channels-vae",
}
WORST = ("sliced wasserstein", "variogram", "connectivity", "proportions")
HELD_OUT, TRAINING = 1000, 0  # seeds
NOISES = 8  # of the images at 256 × 256, each at 32 places: seams are a matter of places
SINGLES = 100  # further images of one noise each: long waves are a matter of noises


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
    noises, places = (2, {"moves": 8, "step": 40}) if bench.fast else (NOISES, {})
    prior = pretrained.load(FAMILIES["diffusion"]).to(bench.args.device)
    with torch.no_grad():
        large = prior.at((256, 256))
        draws = moved_draws(large, noises, **places).cpu().double()
        single = moved_draws(large, 8 if bench.fast else SINGLES, moves=1, seed=3).cpu().double()
    truth = torch.from_numpy(MeanderingChannels(shape=(256, 256)).sample(100, seed=HELD_OUT))[:, 0].double()
    value, error, where = seam_difference(draws)
    bench.add("at_seams", value, "", error, note=f"{where}; {noises} noises at {draws.shape[1]} places each")
    value, error = spectrum_difference(single, truth)
    bench.add("at_spectrum", value, "", error, note=f"{len(single)} images")


def moved_draws(prior: Any, noises: int, *, moves: int = 32, step: int = 66, seed: int = 2) -> Tensor:
    """`(noises, moves, ny, nx)` draws: of each noise, and of the same moved in a circle by `step` k along both axes."""
    prior.latent_steps = 32  # decode is then what sample does
    groups = []
    for item in range(noises):
        z = Streams(seed, [item], device=next(prior.parameters()).device).normal(prior.shape, dtype=torch.float32)
        moved = torch.cat([z.roll((step * k, step * k), (2, 3)) for k in range(moves)])
        groups.append(torch.cat([prior.decode(part)[:, 0] for part in moved.split(4)]))
    return torch.stack(groups)


def _column_moments(image: Tensor, reach: int) -> Tensor:
    """`(groups, 2 + reach, size)`: of every column the mean, mean square, and variogram to the right at lags 1 to `reach`."""
    rows = [image.mean((1, 2)), image.square().mean((1, 2))]
    for h in range(1, reach + 1):
        gamma = 0.5 * (image[..., h:] - image[..., :-h]).square().mean((1, 2))
        rows.append(torch.nn.functional.pad(gamma, (0, h)))
    return torch.stack(rows, 1)


def _seam_figures(moments: Tensor, period: int) -> list[float]:
    """Relative differences of the variance and the variograms of columns at and away from multiples of `period`."""
    size = moments.shape[1]
    columns = torch.arange(size)
    out = []
    for h, row in enumerate([moments[1] - moments[0].square(), *moments[2:]]):
        place = columns + (h + 1) / 2  # of a pixel, or of the middle of a pair, in pixels from the edge
        gap = (place - period * torch.round(place / period)).abs()
        inner = (place >= period // 2) & (place < size - period // 2)
        at, away = (gap <= max(h, 1) / 2) & inner, (gap > 16) & inner
        out.append(float(row[at].mean() / row[away].mean() - 1))
    return out


def seam_difference(x: Tensor, period: int = 64, reach: int = 8) -> tuple[float, float, str]:
    """Largest relative difference of variance and variogram at and away from multiples of `period`.

    Args:
        x: `(groups, images, size, size)`, the groups independent.

    Returns:
        The difference without its sign, its standard error, and which of the 2 (1 + `reach`) it is.
    """
    names = ["variance", *(f"variogram at lag {h}" for h in range(1, reach + 1))]
    sides = {"x": _column_moments(x, reach), "y": _column_moments(x.transpose(2, 3), reach)}
    n = len(x)
    found: dict[str, tuple[float, float]] = {}
    for axis, moments in sides.items():
        whole = _seam_figures(moments.mean(0), period)
        left_out = [_seam_figures((moments.sum(0) - part) / (n - 1), period) for part in moments]
        errors = np.sqrt((n - 1) * np.var(left_out, axis=0))
        found |= {f"{k} along {axis}": (v, float(e)) for k, v, e in zip(names, whole, errors, strict=True)}
    for name, (value, error) in found.items():
        print(f"{name:28s} {value:8.4f} ± {error:.4f}")
    worst = max(found, key=lambda k: abs(found[k][0]))
    return abs(found[worst][0]), found[worst][1], worst


def spectrum_difference(x: Tensor, y: Tensor, rings: int = 4) -> tuple[float, float]:
    """Largest |power of x / power of y − 1| over the lowest radial wavenumbers, and its standard error.

    Args:
        x: `(groups, images, size, size)`, the groups independent. y: `(images, size, size)`, independent.
    """

    def power(v: Tensor) -> np.ndarray:
        spectrum = torch.fft.fft2(v - v.mean()).abs().square()
        k = torch.fft.fftfreq(v.shape[-1]) * v.shape[-1]
        radius = torch.sqrt(k[:, None] ** 2 + k**2).round()
        return torch.stack([spectrum[..., radius == r].mean(-1) for r in range(1, rings + 1)], -1).numpy()

    a, b = power(x).mean(1), power(y)
    ratio = a.mean(0) / b.mean(0)
    worst = int(np.abs(ratio - 1).argmax())
    relative = [v[:, worst].std(ddof=1) / v[:, worst].mean() / math.sqrt(len(v)) for v in (a, b)]
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
