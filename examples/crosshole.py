"""Cross-hole tomography: rays that bend with the medium against rays that are straight whatever the medium.

    python examples/crosshole.py --figure crosshole.png          (about a minute)

Unknown s = exp(u), slowness in s/m on (depth, distance), u a stationary Gaussian field. First-arrival times from
every source in the left hole to every receiver in the right one, d = g(s) + n:

    bent        g solves |∇t| = s (`TravelTime`); the rays follow the fast layers, and g is not linear
    straight    g integrates s along straight lines (`StraightRays`), wrong by more than the noise where velocities vary

Data are made with bent rays on a grid four times finer than the inversion's. The inversion traces rays, solves the
linear problem around them exactly, and traces again (Gauss–Newton); draws are those of the last linear problem, an
approximation. How good it is, importance weights tell: p(u | d) over the density the draws have. An effective sample
size near the number of draws means that the posterior is that Gaussian; near one, that its tails are not, and that a
chain (`HMC`) is worth its price.

Straight rays fit the data as well (χ² is near 1 for both) and have bands as narrow, around a wrong model: χ² does not
tell.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import script
import torch
from torch import Tensor

from invgen.grid import Grid
from invgen.noise import GaussianNoise
from invgen.operators import MatrixOperator, StraightRays, TravelTime
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem
from invgen.solvers import ExactGaussian, RandomizeThenOptimize

VELOCITY, SPREAD, LENGTH = 2500.0, 0.18, (12.0, 40.0)  # m/s, sd of ln s, correlation lengths in m (depth, distance)
NOISE, SEED = 0.0003, 11  # s: picking error; of the truth


def gauss_newton(operator: Any, data: Tensor, prior: GaussianPrior, rounds: int) -> InverseProblem:
    """The linear problem around the posterior mode: d − g(u*) + J u* = J u + n, J = ∂g/∂u at u*."""

    def times(u: Tensor) -> Tensor:
        return operator(u.exp()[None])[0]

    u = prior.mean_u
    for _ in range(rounds):
        J = torch.func.jacrev(times, chunk_size=32)(u).flatten(1)  # one row a ray
        shifted = data - times(u) + J @ u.flatten()
        linear = InverseProblem(shifted, MatrixOperator(J, prior.shape), GaussianNoise(NOISE), prior)
        mean = ExactGaussian(method="cg").mean(linear)[0]
        step, u = float((mean - u).abs().max()), mean
        print(f"  largest change of ln s {step:.4f}")
        if step < 0.005:
            break
    return linear


def weights(operator: Any, data: Tensor, linear: InverseProblem, draws: Tensor) -> Tensor:
    """log p(d | u) − log of the same with the rays held fixed, `(n,)`, up to a constant: prior and evidence cancel."""
    true = (data - operator(draws.exp())) / NOISE
    fixed = (linear.terms[0].data - linear.terms[0].operator(draws)) / NOISE
    return 0.5 * (fixed.square().sum(1) - true.square().sum(1))


def coverage_of_rays(operator: Any, slowness: Tensor) -> np.ndarray:
    """Length of all rays in each cell in m, `(nz, nx)`: ∂(Σ t)/∂s, which for bent rays depends on the medium."""
    s = slowness[None].double().clone().requires_grad_(True)
    (lengths,) = torch.autograd.grad(operator(s).sum(), s)
    return lengths[0, 0].numpy()


def score(operator: Any, data: Tensor, draws: Tensor, truth: Tensor) -> dict[str, float]:
    """χ² per datum, error and coverage in u = ln s, draws `(n, 1, nz, nx)`."""
    mean, sd = draws.mean(0), draws.std(0)
    low, high = draws.quantile(0.05, dim=0), draws.quantile(0.95, dim=0)
    return {
        "chi2": float(((data - operator(draws.exp())) / NOISE).square().mean()),
        "rms_error_percent": 100 * float((mean - truth).square().mean().sqrt()),
        "sd_percent": 100 * float(sd.square().mean().sqrt()),
        "correlation": float(torch.corrcoef(torch.stack([mean.flatten(), truth.flatten()]))[0, 1]),
        "coverage": float(((truth >= low) & (truth <= high)).double().mean()),
    }


def ends(grid: Grid, holes: int) -> tuple[np.ndarray, np.ndarray]:
    """Sources and receivers `(holes, 2)` (z, x), along the left and the right edge."""
    top, left = (o - d / 2 for o, d in zip(grid.origin, grid.spacing, strict=True))
    height, width = (n * d for n, d in zip(grid.shape, grid.spacing, strict=True))
    depth = top + (np.arange(holes) + 0.5) / holes * height
    return np.stack([depth, np.full(holes, left)], 1), np.stack([depth, np.full(holes, left + width)], 1)


def draw(
    path: str, grid: Grid, truth: Tensor, data: Tensor, operators: dict[str, Any], found: dict[str, Tensor]
) -> None:
    """Velocity, sd, error in sd and ray coverage, bent above and straight below; truth and residuals on the left."""
    import plots

    def speed(u: Tensor) -> np.ndarray:
        return (-u[..., 0, :, :]).exp().numpy() / 1000

    true = speed(truth)
    colours = {"vmin": float(true.min()), "vmax": float(true.max()), "aspect": "equal"}
    figure, axes = plots.page(2, 5, width=3.4, height=5.0, title="cross-hole tomography: bent against straight rays")
    plots.section(axes[0, 0], true, grid, title="truth", label="velocity (km/s)", **colours)
    holes = round(math.sqrt(len(data)))
    a, b = ends(grid, holes)
    plots.rays(axes[0, 0], np.repeat(a, holes, axis=0), np.tile(b, (holes, 1)), every=5)
    residuals = {n: ((data - operators[n](u.exp())) / NOISE).numpy() for n, u in found.items()}
    plots.histogram(axes[1, 0], residuals, title="residuals of the draws")
    lengths = {n: coverage_of_rays(operators[n], truth.exp()) for n in found}
    widest = float(speed(found["bent"]).std(0).max())
    for k, (name, u) in enumerate(found.items()):
        v = speed(u)
        plots.section(axes[k, 1], v.mean(0), grid, title=f"{name}: posterior mean", label="velocity (km/s)", **colours)
        style = {"cmap": "magma", "vmin": 0, "vmax": widest, "aspect": "equal"}
        plots.section(axes[k, 2], v.std(0), grid, title=f"{name}: sd", label="sd of velocity (km/s)", **style)
        error = ((u.mean(0) - truth) / u.std(0))[0].numpy()
        style = {"cmap": "RdBu_r", "vmin": -4, "vmax": 4, "aspect": "equal"}
        plots.section(axes[k, 3], error, grid, title=f"{name}: error", label="(mean − truth) / sd, ln s", **style)
        style = {"cmap": "cividis", "vmin": 0, "vmax": float(np.percentile(lengths["bent"], 99.5)), "aspect": "equal"}
        plots.section(
            axes[k, 4], lengths[name], grid, title=f"{name} rays", label="length of rays in a cell (m)", **style
        )
    plots.save(figure, path)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = script.parser(__doc__, samples=200, fast="a small section in seconds, to see that it runs")
    args = parser.parse_args(argv)
    shape, holes, rounds = ((20, 10), 6, 3) if args.fast else ((40, 20), 16, 6)
    samples = 20 if args.fast else args.samples

    grid = Grid(shape, (100.0 / shape[0], 50.0 / shape[1]), (), ("z", "x"), ("m", "m"), ("ln_slowness",))
    field = GaussianPrior.stationary(grid, sd=SPREAD, length=LENGTH, padding="auto", mean=-math.log(VELOCITY))
    # 800 unknowns: the matrix once is cheaper than a Fourier transform of the padded field at every turn
    prior = GaussianPrior.dense(field.mean_u, field.covariance_u.dense(), grid=grid)
    truth = prior.sample(1, seed=SEED, dtype=torch.float64)[0]
    slowness = Grid(shape, grid.spacing, (), ("z", "x"), ("m", "m"), ("slowness",), ("s/m",))
    bent = TravelTime.crosshole(slowness, holes, holes, model="slowness")
    operators = {"bent": bent, "straight": StraightRays.crosshole(slowness, holes, holes)}
    fine = TravelTime.crosshole(slowness, holes, holes, model="slowness", oversample=4)
    clean = fine(truth.exp()[None])[0]
    data = clean + NOISE * torch.randn(clean.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    wrong = {n: 1e3 * float((g(truth.exp()[None])[0] - clean).square().mean().sqrt()) for n, g in operators.items()}
    low, high = 1e3 * float(data.min()), 1e3 * float(data.max())
    print(
        f"{len(data)} times of {low:.1f} to {high:.1f} ms, noise {1e3 * NOISE:.2f} ms; the physics are off in the truth by"
    )
    print(f"{wrong['bent']:.2f} ms (bent, for its grid) and {wrong['straight']:.2f} ms (straight)")

    found: dict[str, Tensor] = {}
    figures: dict[str, dict[str, float]] = {}
    for name, operator in operators.items():
        print(f"{name} rays")
        began = time.perf_counter()
        linear = gauss_newton(operator, data, prior, rounds)
        draws = RandomizeThenOptimize().solve(linear, samples, seed=0, dtype=torch.float64).samples[0, 0]
        w = weights(operator, data, linear, draws).softmax(0)
        ess = float(1 / w.square().sum())
        figures[name] = score(operator, data, draws, truth) | {"ess": ess, "seconds": time.perf_counter() - began}
        found[name] = draws
    print(f"{'90 % bands':12}{'chi2':>8}{'error %':>9}{'sd %':>7}{'corr':>7}{'cover':>7}{'ess':>7}{'s':>6}")
    for name, f in figures.items():
        print(
            f"{name:12}{f['chi2']:8.2f}{f['rms_error_percent']:9.2f}{f['sd_percent']:7.2f}{f['correlation']:7.2f}"
            f"{f['coverage']:7.2f}{f['ess']:7.1f}{f['seconds']:6.0f}"
        )
    if args.figure:
        draw(args.figure, grid, truth, data, operators, found)
    line = {"example": "crosshole", "physics_error_ms": wrong, "figures": figures, "samples": samples}
    return script.finish(line)


if __name__ == "__main__":
    main()
