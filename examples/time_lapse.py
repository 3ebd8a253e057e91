"""Baseline and monitor together: what two surveys share cancels in the difference only if they are inverted jointly.

    python examples/time_lapse.py --figure time_lapse.png          (about a minute)

Unknown m = ln AI of the baseline and δ = ln AI of the monitor minus baseline, on (time, distance).

    d_1 = W_1 D m / 2 + n_1            d_2 = W_2 D (m + δ) / 2 + n_2            wavelets, noise of their own

jointly      x = (m, δ), p(x) = p(m) p(δ), geology and change independent (`ProductPrior`, `time_lapse_terms`)
separately   each survey under p(m); the difference of two independent posteriors

All of it is linear and Gaussian, so that both are exact. p(m) is fitted to generated sections; p(δ) has mean zero and
says how large and how smooth a change is thought to be: nothing in the data of one survey knows that. The truth's
change is a lens of softened rock, which is *not* a draw of p(δ): nothing changes around it, so that bands cover too
much there, and in the lens the estimate is drawn towards zero. Means are exact; sd and bands are those of the draws.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import script
import torch
from torch import Tensor

from invgen.data import GeologySections
from invgen.grid import Grid
from invgen.noise import GaussianNoise
from invgen.operators import PostStack, ricker, time_lapse_terms
from invgen.priors import GaussianPrior, ProductPrior
from invgen.problem import InverseProblem, Term
from invgen.solvers import ExactGaussian

DT, DX = 0.004, 12.5  # s, m
PEAKS, NOISE = (30.0, 27.0), (0.10, 0.15)  # of the wavelets in Hz; noise over data, baseline and monitor
CHANGE, CHANGE_SD, CHANGE_LENGTH = -0.06, 0.03, (0.020, 200.0)  # ln AI of the lens; what p(δ) thinks: sd, (s, m)
TOP, SEED, EXAMPLES = 180, 8_000_003, 32


def windows(grid: Grid, count: int, seed: int) -> Tensor:
    """Generated sections `(count, 1, nt, nx)` at these depths, a sample read as a sample."""
    nt, nx = grid.shape
    drawn = [
        GeologySections().sample(1, seed=seed, start=i)[0, :, TOP : TOP + nt, 300 : 300 + nx] for i in range(count)
    ]
    return torch.from_numpy(np.stack(drawn)).double()


def lens(grid: Grid) -> Tensor:
    """The change: a lens at two fifths of the depth, thinning to its ends."""
    t, x = grid.coordinates("t"), grid.coordinates("x")
    middle, centre = t[0] + 0.4 * (t[-1] - t[0]), x[0] + 0.55 * (x[-1] - x[0])
    half = 0.012 * np.sqrt(np.clip(1 - ((x - centre) / (0.25 * (x[-1] - x[0]))) ** 2, 0, None))
    inside = 1 / (1 + np.exp((np.abs(t[:, None] - middle) - half[None]) / 0.002))
    return torch.from_numpy(CHANGE * np.where(half > 0, inside, 0.0))[None]


def surveys(grid: Grid, truth: Tensor) -> list[Term]:
    """Data of baseline and monitor, each with the wavelet and the noise it was recorded with."""
    generator = torch.Generator().manual_seed(4)
    terms = []
    for field, peak, share, name in zip(
        (truth[:1], truth.sum(0, keepdim=True)), PEAKS, NOISE, ("baseline", "monitor"), strict=True
    ):
        wavelet = ricker(torch.arange(-10, 11, dtype=torch.float64) * DT, peak) / 2
        operator = PostStack(wavelet, (1, *grid.shape), model_grid=grid)
        clean = operator(field[None])[0]
        sigma = share * float(clean.square().mean().sqrt())
        noisy = clean + sigma * torch.randn(clean.shape, generator=generator, dtype=torch.float64)
        terms.append(Term(noisy, operator, GaussianNoise(sigma), name=name))
    return terms


def jointly(terms: list[Term], geology: GaussianPrior, solver: ExactGaussian, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean `(nt, nx)` and draws `(n, nt, nx)` of the difference, and residuals of the draws in noise sd."""
    grid = geology.grid
    assert grid is not None
    change = GaussianPrior.stationary(grid, sd=CHANGE_SD, length=CHANGE_LENGTH, nu=1.5, padding="auto")
    prior = ProductPrior([geology, change])
    problem = InverseProblem(terms=time_lapse_terms(*terms), prior=prior)
    draws = solver.solve(problem, n, seed=0, dtype=torch.float64).samples[0, 0]
    residual = [(t.data - t.operator(draws)) / t.noise.sigma for t in problem.terms]
    return solver.mean(problem)[0, 1], draws[:, 1], torch.stack(residual)


def separately(
    terms: list[Term], geology: GaussianPrior, solver: ExactGaussian, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from two inversions that know nothing of each other."""
    means, found = [], []
    for k, t in enumerate(terms):
        problem = InverseProblem(terms=[t], prior=geology)
        means.append(solver.mean(problem)[0, 0])
        found.append(solver.solve(problem, n, seed=10 + k, dtype=torch.float64).samples[0, 0])
    residual = [(t.data - t.operator(f)) / t.noise.sigma for t, f in zip(terms, found, strict=True)]
    return means[1] - means[0], (found[1] - found[0])[:, 0], torch.stack(residual)


def score(mean: Tensor, draws: Tensor, truth: Tensor, residual: Tensor, seconds: float) -> dict[str, float]:
    """Against the true difference `(nt, nx)`: the lens is where it is more than half of the change."""
    sd = draws.std(0)
    hit = truth < CHANGE / 2
    covered = (truth >= draws.amin(0)) & (truth <= draws.amax(0))
    return {
        "sd": float(sd.mean()),
        "rms_error": float((mean - truth).square().mean().sqrt()),
        "mean_in_lens": float(mean[hit].mean()),
        "sd_of_mean_in_lens": float(draws[:, hit].mean(1).std()),
        "correlation": float(torch.corrcoef(torch.stack([mean.flatten(), truth.flatten()]))[0, 1]),
        "coverage": float(covered.double().mean()),
        "coverage_in_lens": float(covered[hit].double().mean()),
        "chi2": float(residual.square().mean()),
        "seconds": seconds,
    }


def draw(
    path: str, grid: Grid, terms: list[Term], truth: Tensor, means: dict[str, Tensor], found: dict[str, Tensor]
) -> None:
    """Data and their difference, the true change, mean and sd of both inversions, and one trace through the lens."""
    import plots

    baseline, monitor = (t.data[0, 0].numpy() for t in terms)
    reach = float(np.percentile(np.abs(baseline), 99))
    figure, axes = plots.page(2, 4, title="time-lapse: joint against separate inversion")
    style = {"cmap": "RdBu_r", "vmin": -reach, "vmax": reach, "alpha": 0.6}
    plots.section(axes[0, 0], baseline, grid, title="baseline", label="amplitude", **style)
    plots.wiggles(axes[0, 0], baseline, grid)
    title = "monitor − baseline (wavelets differ)"
    plots.section(axes[0, 1], monitor - baseline, grid, title=title, label="amplitude", **style)
    plots.wiggles(axes[0, 1], monitor - baseline, grid, clip=reach)
    change = truth[1].numpy()
    colours = {"cmap": "RdBu_r", "vmin": -0.08, "vmax": 0.08}
    label = "difference of ln AI"
    plots.section(axes[0, 2], change, grid, title="true change", label=label, **colours)
    for k, (name, draws) in enumerate(found.items()):
        plots.section(axes[1, 2 * k], means[name], grid, title=f"{name}: posterior mean", label=label, **colours)
        sd = draws.std(0).numpy()
        most = {"cmap": "magma", "vmin": 0, "vmax": float(sd.max())}
        plots.section(axes[1, 2 * k + 1], sd, grid, title=f"{name}: sd", label="sd of the difference", **most)
    j = int(np.argmin(change.min(0)))
    tracks = {name: draws[:, :, j].numpy() for name, draws in found.items()}
    where = f"{grid.coordinates('x')[j]:.0f} m"
    plots.log_track(
        axes[0, 3],
        grid.coordinates("t"),
        tracks,
        log=change[:, j],
        title=f"trace at {where}",
        label=label,
        truth="truth",
    )
    axes[0, 3].set_xlim(-0.25, 0.25)
    plots.save(figure, path)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = script.parser(__doc__, fast="a small section in seconds, to see that it runs")
    args = parser.parse_args(argv)
    shape, examples = ((48, 16), 6) if args.fast else ((96, 64), EXAMPLES)
    samples = 5 if args.fast else args.samples

    grid = Grid(shape, (DT, DX), (TOP * DT, 0.0), ("t", "x"), ("s", "m"), ("ln_impedance",))
    fitted = GaussianPrior.fit(windows(grid, examples, SEED + 1), structure="stationary", mean="rows")
    geology = GaussianPrior(fitted.mean_u, fitted.covariance_u, grid=grid)
    truth = torch.cat([windows(grid, 1, SEED)[0], lens(grid)])
    terms = surveys(grid, truth)
    solver = ExactGaussian(method="cg", rtol=1e-4)

    means: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    figures: dict[str, dict[str, float]] = {}
    for name, invert in (("separate", separately), ("joint", jointly)):
        began = time.perf_counter()
        mean, draws, residual = invert(terms, geology, solver, samples)
        figures[name] = score(mean, draws, truth[1], residual, time.perf_counter() - began)
        means[name], found[name] = mean, draws
    print(f"true change in the lens: {float(truth[1][truth[1] < CHANGE / 2].mean()):.3f} of ln AI")
    print(f"{'':10}{'sd':>8}{'rms':>8}{'in lens':>9}{'±':>7}{'corr':>7}{'cover':>7}{'in lens':>9}{'chi2':>7}{'s':>6}")
    for name, f in figures.items():
        print(
            f"{name:10}{f['sd']:8.4f}{f['rms_error']:8.4f}{f['mean_in_lens']:9.3f}{f['sd_of_mean_in_lens']:7.3f}"
            f"{f['correlation']:7.2f}{f['coverage']:7.2f}{f['coverage_in_lens']:9.2f}{f['chi2']:7.2f}{f['seconds']:6.0f}"
        )
    if args.figure:
        draw(args.figure, grid, terms, truth, means, found)
    line = {"example": "time_lapse", "figures": figures, "samples": samples}
    return script.finish(line)


if __name__ == "__main__":
    main()
