"""Priors learned from real data: a micro-CT volume of Berea sandstone, and stamps of DECaLS galaxies.

Parts `berea` and `galaxies` of priors.py; they read `../shared/data` beside the project and say so where it is missing.

**Berea.** A diffusion prior is trained on 64 × 64 slices of the first 55 % of the 400³ voxels; 40 planes, more than the grains
are wide, are left out, and the last 35 % are held out. Draws are cut at 0.5. [berea_porosity_z] is the difference in porosity

    z = (φ_draws − φ_held-out) / √(s²/n + v_t + v_h),

with s²/n the variance of the mean over the draws, and v that of the porosity of each part, from the porosities of eight
blocks of it: what was learned, and what it is compared with, are both one piece of the rock. [berea_two_point_ratio]: root
mean square over lags to 32 voxels, both axes, of the difference in two-point probability S₂, over that of halves of the
held-out crops; [berea_minkowski_ratio]: the same for area, perimeter and Euler characteristic. Crops of the training part
pass through the same table: what another piece of the same rock reaches.

**Galaxies.** 320 of 400 RGB stamps, 64 × 64 × 3 in 256 values k, their eight symmetries added; 80 are held out. All
likelihoods are of the same discrete data, by uniform dequantisation (Theis et al. 2016, arXiv:1511.01844, equation 6):

    −E log₂ P(k)/D ≤ −E log₂ p(x)/D,   x = k + n,  n ~ U(0, 1)^D,

p a density of x, in the units of k. [decals_bits_per_dim] is a diffusion prior's variational bound (VDM, Kingma et al.
2021, arXiv:2107.00630, equation 11), [decals_bits_per_dim_gaussian] probabilistic PCA (Tipping and Bishop 1999) by maximum
likelihood on the same stamps, its number of components chosen on a fifth of the training stamps. Neither sees the others' dequantised values.
Memorisation: distances of draws, and of held-out stamps, to the nearest training stamp, symmetries included.

Each part takes at most five minutes of one CPU core.
"""

from __future__ import annotations

import io
import math
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Benchmark
from torch import Tensor

from invgen.data.rock import RockCrops
from invgen.diagnostics.fields import minkowski, proportions, two_point_probability
from invgen.diagnostics.generative import FieldComparison, Memorisation, bits_per_dim, compare_fields, memorisation
from invgen.priors import ArrayData, DiffusionPrior, Training
from invgen.priors.levels import LogUniformLevels
from invgen.priors.networks import UNet
from invgen.transforms import Affine

__all__ = ["berea", "galaxies"]

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TRAINING, HELD_OUT = (0.0, 0.55), (0.65, 1.0)  # shares of the planes of the rock
STAMPS = 320  # of 400, to train on
WIDTHS = (16, 48, 96)
ROCK = {"steps": 2000, "draws": 400}
GALAXIES = {"steps": 1500, "held": 80, "levels": 64, "draws": 80}
FAST_ROCK = {"steps": 100, "draws": 64}
FAST_GALAXIES = {"steps": 60, "held": 16, "levels": 16, "draws": 16}


# --- Berea -------------------------------------------------------------------------------------------------------------


def open_rock(path: Path) -> np.ndarray:
    """(n0, n1, n2) uint8 from a zip archive with one TIFF file, a page a plane."""
    from PIL import Image

    with zipfile.ZipFile(path) as archive:
        pages = Image.open(io.BytesIO(archive.read(archive.namelist()[0])))
    planes = []
    for k in range(pages.n_frames):
        pages.seek(k)
        planes.append(np.asarray(pages))
    return np.stack(planes)


def block_porosities(volume: np.ndarray, region: tuple[float, float], pore: int = 255) -> np.ndarray:
    """Porosities of the eight blocks of a part of the volume, cut at its middle along each axis."""
    n = len(volume)
    part = volume[round(region[0] * n) : round(region[1] * n)] == pore
    halves = [np.array_split(np.arange(s), 2) for s in part.shape]
    return np.array([part[np.ix_(i, j, k)].mean() for i in halves[0] for j in halves[1] for k in halves[2]])


def porosity_z(draws: Tensor, training: np.ndarray, held: np.ndarray, phi_held: float) -> tuple[float, float]:
    """z of the draws' porosity against that of the held-out part, and the porosity; see the module's text.

    Args:
        draws: `(n, 1, ny, nx)`. training, held: porosities of the blocks of both parts. phi_held: of the held-out part.
    """
    phi = proportions(draws)[:, 1]
    variance = phi.var(ddof=1) / len(phi) + training.var(ddof=1) / len(training) + held.var(ddof=1) / len(held)
    return float((phi.mean() - phi_held) / math.sqrt(variance)), float(phi.mean())


def two_point_ratio(draws: Tensor, held: Tensor, *, splits: int = 10, seed: int = 0) -> float:
    """Root-mean-square difference in S₂ to halves of the held-out crops over that of the halves, means over splits."""
    half = len(held) // 2
    made, real = ([two_point_probability(x, axis=a).each for a in "yx"] for x in (draws[:half], held))
    generator = np.random.default_rng(seed)

    def distance(a: list[np.ndarray], b: list[np.ndarray]) -> float:
        return math.sqrt(np.mean([np.square(p.mean(0) - q.mean(0)).mean() for p, q in zip(a, b, strict=True)]))

    found, floor = [], []
    for _ in range(splits):
        order = generator.permutation(len(held))
        first, second = ([c[rows] for c in real] for rows in (order[:half], order[half : 2 * half]))
        found.append(distance(made, second))
        floor.append(distance(first, second))
    return float(np.mean(found) / np.mean(floor))


def _rock_prior(bench: Benchmark, crops: RockCrops, steps: int) -> DiffusionPrior:
    phi = crops.porosity()
    torch.manual_seed(0)
    prior = DiffusionPrior(
        UNet(1, widths=WIDTHS, blocks=1),
        (1, *crops.shape),
        grid=crops.grid,
        transform=Affine(phi, math.sqrt(phi * (1 - phi))),
        sigma_min=0.02,
        mean_variance_of_field=float(crops.sample(256, seed=9).mean((1, 2, 3)).var() / (phi * (1 - phi))),
    )
    training = Training(
        steps=steps,
        batch_size=32,
        learning_rate=2e-3,
        warmup=100,
        ema=0.995,
        precision="bf16-mixed",
        device=bench.device,
    )
    training.fit(prior, crops, progress=False)
    return prior.to(bench.device).eval()


def berea(bench: Benchmark) -> None:
    """Draws of a prior learned from one part of a sandstone against another part of it."""
    file, names = DATA / "rock" / "berea.zip", ("berea_porosity_z", "berea_two_point_ratio", "berea_minkowski_ratio")
    if not file.is_file():
        return _skip(bench, file, names)
    sizes = FAST_ROCK if bench.fast else ROCK
    n, volume = sizes["draws"], open_rock(file)
    crops, other = RockCrops(volume, (64, 64), region=TRAINING), RockCrops(volume, (64, 64), region=HELD_OUT)
    began = time.process_time()
    prior = _rock_prior(bench, crops, sizes["steps"])
    trained = time.process_time() - began
    with torch.no_grad():
        grey = prior.sample(n, seed=1, steps=40).cpu()
    seconds = time.process_time() - began - trained
    held, training = torch.from_numpy(other.sample(2 * n, seed=2)), torch.from_numpy(crops.sample(n, seed=3))
    blocks = [block_porosities(volume, region) for region in (TRAINING, HELD_OUT)]
    phi_held = other.porosity()
    sets = {"draws": (grey > 0.5).float(), "training part": training}
    results: dict[str, tuple[float, float, float, FieldComparison]] = {}
    for name, x in sets.items():
        z, phi = porosity_z(x, *blocks, phi_held)
        results[name] = (z, phi, two_point_ratio(x, held), compare_fields(x, held))
    undecided = float(((grey > 0.1) & (grey < 0.9)).float().mean())
    print(
        f"\nBerea, {n} slices of 64 × 64: trained in {trained:.0f} s, drawn in {seconds:.0f} s of CPU; porosity of the training part "
        f"{crops.porosity():.4f}, held-out {phi_held:.4f} ± {blocks[1].std(ddof=1) / math.sqrt(8):.4f} (blocks); "
        f"{100 * undecided:.1f} % of pixels between 0.1 and 0.9 before the cut"
    )
    keys = tuple(results["draws"][3].ratios)
    print(f"{'':15s} {'porosity':>9s} {'z':>6s} {'S2':>7s} " + " ".join(f"{k[:12]:>12s}" for k in keys))
    for name, (z, phi, s2, fields) in results.items():
        print(f"{name:15s} {phi:9.4f} {z:6.2f} {s2:7.2f} " + " ".join(f"{fields.ratios[k]:12.2f}" for k in keys))
    for name, x in {**sets, "held-out part": held}.items():
        shapes = {k: (v.mean(), v.std(ddof=1) / math.sqrt(len(v))) for k, v in minkowski(x).items()}
        print(f"{name:15s} " + ", ".join(f"{k} {m:.5f} ± {e:.5f}" for k, (m, e) in shapes.items()))
    z, phi, s2, fields = results["draws"]
    rock = results["training part"]
    bench.add("berea_porosity_z", z, "sd", note=f"{phi:.4f} against {phi_held:.4f}; the training part {rock[0]:.2f}")
    bench.add("berea_two_point_ratio", s2, "x", note=f"the training part {rock[2]:.2f}")
    bench.add(
        "berea_minkowski_ratio",
        fields.ratios["minkowski"],
        "x",
        note=f"the training part {rock[3].ratios['minkowski']:.2f}",
    )
    if bench.args.figures:
        _rock_figure(Path(bench.args.figures) / "priors-berea.png", sets["draws"], training, held)


def _rock_figure(path: Path, draws: Tensor, training: Tensor, held: Tensor) -> None:
    """Slices of all three sets, their two-point probabilities and porosities."""
    plt = _pyplot()
    figure = plt.figure(figsize=(13, 5.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(5, 4))
    slices, (curves, shares) = left.subplots(3, 5), right.subplots(2, 1, height_ratios=(2, 1))
    parts = {"draws": draws, "training part": training, "held-out part": held}
    colours = dict(zip(parts, ("C3", "C0", "k"), strict=True))
    for i, (name, x) in enumerate(parts.items()):
        for j, ax in enumerate(slices[i]):
            ax.imshow(x[j, 0], cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
            ax.set_xticks([])
            ax.set_yticks([])
            if j == 0:
                ax.set_ylabel(name)
    left.suptitle("slices of 64 × 64 voxels, pores black", fontsize=10)
    for name, x in parts.items():
        both = [two_point_probability(x, axis=a) for a in "yx"]
        mean = 0.5 * (both[0].mean + both[1].mean)
        error = np.maximum(both[0].error, both[1].error)  # one slice's axes are not independent
        curves.plot(both[0].lags, mean, color=colours[name], label=name)
        curves.fill_between(both[0].lags, mean - 2 * error, mean + 2 * error, color=colours[name], alpha=0.2, lw=0)
        shares.hist(
            proportions(x)[:, 1], bins=np.linspace(0, 0.6, 31), density=True, histtype="step", color=colours[name]
        )
    curves.set(xlabel="lag (voxels)", ylabel="S₂, ± 2 standard errors", ylim=(0, None))
    curves.legend()
    shares.set(xlabel="porosity of a slice", ylabel="density")
    _save(figure, path)


# --- galaxies -----------------------------------------------------------------------------------------------------------


def symmetries(x: Tensor) -> Tensor:
    """`(8 n, …, s, s)`: quarter turns and mirror images of `(n, …, s, s)`."""
    turned = [x.rot90(k, (-2, -1)) for k in range(4)]
    return torch.cat([*turned, *(t.flip(-1) for t in turned)])


def dequantised(k: Tensor, seed: int) -> Tensor:
    """k + U(0, 1) as float32, for values 0 … 255."""
    noise = torch.rand(k.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    # float32 near 255 has steps of 1.5e-5: what would be rounded up to the next value is held below it
    return torch.minimum((k + noise).float(), torch.nextafter(k.float() + 1, torch.zeros(())))


class PrincipalComponents:
    """Probabilistic PCA by maximum likelihood from fewer examples n than entries d (Tipping and Bishop 1999).

    With λ_j the eigenvalues of the sample covariance, N(m, W Wᵀ + σ² I) has the maximum at the principal directions with
    variances λ_j, j ≤ q, and σ² = Σ_{j > q} λ_j/(d − q) in all others (equations 7 and 8).
    """

    def __init__(self, x: Tensor, components: int) -> None:
        n, d = x.shape
        if not 0 < components < min(n - 1, d):
            raise ValueError(
                f"Probabilistic PCA of {n} examples of {d} entries has 1 to {min(n - 1, d) - 1} components."
            )
        self.mean = x.mean(0)
        centred = (x - self.mean).double()
        values, vectors = torch.linalg.eigh(centred @ centred.mT / n)  # n × n: the same non-zero eigenvalues
        values, vectors = values.flip(0), vectors.flip(1)
        self.variances = values[:components]
        self.directions = centred.mT @ vectors[:, :components] / (n * self.variances).sqrt()
        self.noise = float(values[components:].clamp_min(0).sum()) / (d - components)

    def log_prob(self, x: Tensor) -> Tensor:
        """`(batch,)` float64, in nats."""
        v = (x - self.mean).double()
        along = v @ self.directions
        rest = v.square().sum(1) - along.square().sum(1)
        d, q = v.shape[1], len(self.variances)
        quadratic = (along.square() / self.variances).sum(1) + rest / self.noise
        log_det = self.variances.log().sum() + (d - q) * math.log(self.noise)
        return -0.5 * (d * math.log(2 * math.pi) + log_det + quadratic)


def best_components(x: Tensor, choices: tuple[int, ...]) -> int:
    """The number of components with the largest likelihood of a fifth of the stamps `(n, d)`, learned on the others."""
    known, judged = x[len(x) // 5 :], x[: len(x) // 5]
    return max(choices, key=lambda q: float(PrincipalComponents(known, q).log_prob(judged).mean()))


def _stamp_prior(bench: Benchmark, x: Tensor, steps: int) -> DiffusionPrior:
    shift, scale = (f(x.transpose(0, 1).flatten(1).double(), dim=1) for f in (torch.mean, torch.std))
    torch.manual_seed(0)
    prior = DiffusionPrior(
        UNet(3, widths=WIDTHS, blocks=1),
        tuple(x.shape[1:]),
        transform=Affine(shift, scale),
        levels=LogUniformLevels(0.002, 500.0),  # the bound is an integral over ln sigma
        weighting="elbo",
        mean_variance_of_field=float(
            ((x - shift.float()[:, None, None]) / scale.float()[:, None, None]).mean((1, 2, 3)).var()
        ),
    )
    training = Training(
        steps=steps,
        batch_size=32,
        learning_rate=1e-3,
        warmup=100,
        ema=0.995,
        precision="bf16-mixed",
        device=bench.device,
    )
    training.fit(prior, ArrayData(x), progress=False)
    return prior.to(bench.device).eval()


def galaxies(bench: Benchmark) -> None:
    """Held-out likelihood of galaxy stamps."""
    file, names = DATA / "galaxies" / "decals_rgb_400_64.npz", ("decals_bits_per_dim", "decals_bits_per_dim_gaussian")
    if not file.is_file():
        return _skip(bench, file, names)
    with np.load(file) as archive:
        k = torch.from_numpy(archive["images"]).permute(0, 3, 1, 2).contiguous()
    order = torch.randperm(len(k), generator=torch.Generator().manual_seed(0))
    train, held = k[order[:STAMPS]], k[order[STAMPS:]]
    sizes = FAST_GALAXIES if bench.fast else GALAXIES
    held = held[: sizes["held"]]
    y, d = dequantised(held, seed=2), held[0].numel()
    rows: dict[str, tuple[np.ndarray, float]] = {}

    began = time.process_time()
    x = dequantised(train, seed=1).flatten(1)
    q = best_components(x, (2, 5, 10, 20, 40, 80, 160))
    rows[f"Gaussian, {q} components"] = (
        bits_per_dim(PrincipalComponents(x, q).log_prob(y.flatten(1)), d),
        time.process_time() - began,
    )
    began = time.process_time()
    white = torch.distributions.Normal(x.mean(), x.std())
    rows["Gaussian, white"] = (bits_per_dim(white.log_prob(y).flatten(1).sum(1), d), time.process_time() - began)
    began = time.process_time()
    prior = _stamp_prior(bench, dequantised(symmetries(train), seed=3), sizes["steps"])
    with torch.no_grad():
        bound = torch.cat([prior.elbo(part.to(bench.device), levels=sizes["levels"]) for part in y.split(16)])
        seen = dequantised(train[: len(held)], seed=4)
        at_training = torch.cat([prior.elbo(part.to(bench.device), levels=16) for part in seen.split(16)])
        rows["diffusion, bound"] = (bits_per_dim(bound.cpu(), d), time.process_time() - began)
        draws = prior.sample(sizes["draws"], seed=5, steps=40).cpu()

    print(
        f"\nDECaLS, {len(train)} stamps to train on, {len(held)} held out: bits a dimension of uint8, mean ± standard error"
    )
    for name, (bits, seconds) in rows.items():
        print(f"{name:28s} {_mean(bits)}   {seconds:6.0f} s of CPU")
    print(f"{'diffusion, training stamps':28s} {_mean(bits_per_dim(at_training.cpu(), d))}")
    memory = memorisation(draws, symmetries(train).float(), held.float())
    print(
        f"nearest training stamp: draws {np.median(memory.samples):.2f}, held-out {np.median(memory.held_out):.2f} of 255 a pixel, "
        f"ratio {memory.ratio:.3f}; {100 * memory.closer:.0f} % of draws nearer than 99 % of the held-out stamps"
    )
    for name, row in zip(names, ("diffusion, bound", f"Gaussian, {q} components"), strict=True):
        bits = rows[row][0]
        bench.add(name, bits.mean(), "bits", bits.std(ddof=1) / math.sqrt(len(bits)), note=row)
    if bench.args.figures:
        path = Path(bench.args.figures) / "priors-galaxies.png"
        _stamp_figure(path, draws, symmetries(train), held, memory, {n: b for n, (b, _) in rows.items()})


def _stamp_figure(
    path: Path, draws: Tensor, train: Tensor, held: Tensor, memory: Memorisation, bits: dict[str, np.ndarray]
) -> None:
    """Draws above their nearest training stamps, held-out stamps, and bits of every held-out stamp."""
    plt = _pyplot()
    figure = plt.figure(figsize=(13, 4.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2, 1))
    stamps, ax = left.subplots(3, 6), right.subplots()
    rows = {"draws": draws, "nearest training": train[torch.from_numpy(memory.nearest)], "held-out": held}
    for i, (name, x) in enumerate(rows.items()):
        for j, frame in enumerate(stamps[i]):
            frame.imshow((x[j].float() / 255).clamp(0, 1).permute(1, 2, 0))
            frame.set_xticks([])
            frame.set_yticks([])
            if j == 0:
                frame.set_ylabel(name)
    left.suptitle("stamps of 64 × 64 pixels", fontsize=10)
    (first, a), *others = ((n, b) for n, b in bits.items() if "white" not in n)
    for name, b in others:
        ax.scatter(a, b, s=12)
        ax.set(xlabel=f"{first}: bits a dimension", ylabel=f"{name}: bits a dimension")
    ax.set_title("held-out stamps; dotted: equal", fontsize=10)
    ax.axline((a.min(), a.min()), slope=1, color="k", ls=":", lw=1)
    ax.set_ylim(min(b.min() for _, b in others) - 0.2, max(np.median(a), *(b.max() for _, b in others)) + 0.2)
    _save(figure, path)


# --- both ---------------------------------------------------------------------------------------------------------------


def _skip(bench: Benchmark, file: Path, names: tuple[str, ...]) -> None:
    reason = f"{file.name} is not in the shared data folder beside the project"
    print(f"\n{reason}: not measured")
    for name in names:
        bench.add(name, math.nan, note=reason)


def _mean(values: np.ndarray) -> str:
    return f"{values.mean():7.3f} ± {values.std(ddof=1) / math.sqrt(len(values)):.3f}"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    _pyplot().close(figure)
    print(f"wrote {path.name}")
