"""Deblending: two boats shoot at the same time, and their records are told apart by the dithers of the firing times.

    python examples/deblending.py --figure deblending.png          (about a minute)

Unknown is a common-receiver gather m(t, shot), of which the first half of the shots were fired by one boat and the
other half, far away, by another. Every record holds one shot of each, the second some random time later, d = B m + n
(`Blend`).

In a common-receiver gather cut out at the firing times of one boat, its own events are smooth from shot to shot and
those of the other boat jump by the dithers. A prior that knows that neighbouring traces are alike tells them apart: a
stationary Gaussian field, fitted to gathers of a line that was shot unblended, and the posterior is exact.

A stationary covariance sees one dip everywhere, and a gather has steep flanks. Hence it is set up on the gather with
the first arrival shifted to one time, m'(τ, shot) = m(τ + t₁(shot), shot): shifting a shot is firing it later, so
that the operator stays `Blend`, with the times t_fire + t₁. Where the boats meet, and at the ends, which the periodic
field joins, the prior takes strangers for neighbours: the errors that are left are there. No learned prior of gathers
ships with the package; one would enter here in place of the Gaussian, with a guided sampler in place of
`ExactGaussian`.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import script
import torch
from torch import Tensor

from invgen.grid import Grid
from invgen.noise import GaussianNoise
from invgen.operators import Blend, ricker
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem
from invgen.solvers import ExactGaussian

DT, DX, NEAR = 0.006, 25.0, 150.0  # s, m between shots, m from the receiver to the nearest shot
WATER, PEAK = 1500.0, 18.0  # m/s, Hz
DITHER, NOISE = (0.1, 0.6), 0.03  # s; noise over signal, rms
EXAMPLES, SEED = 48, 1


def offsets(shots: int) -> np.ndarray:
    """Distance of each shot from the receiver in m: two boats, each sailing away from it on its own side."""
    half = NEAR + DX * np.arange(shots // 2)
    return np.concatenate([half, half])


def first_arrival(shots: int) -> np.ndarray:
    """t₁ in s: the reflection of a sea floor at 300 m, which positions tell."""
    return np.sqrt(0.4**2 + (offsets(shots) / WATER) ** 2)


def gathers(shape: tuple[int, int], count: int, seed: int) -> Tensor:
    """Random gathers `(count, 1, nt, shots)` on (time after the first arrival, shot): hyperbolas below a sea floor.

    t(x) = √(t₀² + x²/v²), v rising with t₀; the boats see two sides of the same geology, times and strengths differ.
    """
    nt, shots = shape
    rng = np.random.default_rng(seed)
    tau, x, t1 = np.arange(nt) * DT, offsets(shots)[: shots // 2], first_arrival(shots)[: shots // 2]
    out = np.zeros((count, 1, nt, shots))
    for g in range(count):
        events = 14
        t0 = 0.4 + np.concatenate([[0.0], rng.uniform(0.05, 0.8 * nt * DT, events - 1)])
        strength = np.concatenate([[1.0], rng.normal(0, 0.5, events - 1)]) * rng.choice([-1, 1], events)
        for side in (slice(0, shots // 2), slice(shots // 2, shots)):
            # the sides differ by a little structure
            times = t0 * (1 + 0.05 * rng.normal(size=events) * (t0 > 0.4))
            v = WATER + 900.0 * (times - 0.4)
            amplitude = strength * rng.uniform(0.7, 1.3, events)
            for t, speed, a in zip(times, v, amplitude, strict=True):
                arrival = np.sqrt(t**2 + (x / speed) ** 2) - t1
                delay = torch.from_numpy(tau[:, None] - 0.06 - arrival[None])
                out[g, 0, :, side] += a * 0.4 / t * ricker(delay, PEAK).numpy()
    return torch.from_numpy(out)


def firing(shots: int, *, dithered: bool) -> np.ndarray:
    """When each shot fires after the start of its record: the first boat at 0, the second later."""
    later = np.random.default_rng(5).uniform(*DITHER, shots // 2) if dithered else np.full(shots // 2, np.mean(DITHER))
    return np.concatenate([np.zeros(shots // 2), later])


def blend(shape: tuple[int, int], fired: np.ndarray, grid: Grid | None = None) -> Blend:
    """Records of pairs, shot k of the first boat with shot k of the second, for gathers without their first arrival."""
    nt, shots = shape
    pairs = np.tile(np.arange(shots // 2), 2)
    return Blend((1, nt, shots), fired + first_arrival(shots), DT, groups=pairs, model_grid=grid)


def decibels(truth: Tensor, estimate: Tensor) -> float:
    """Energy of the truth over that of the error."""
    return float(10 * torch.log10(truth.square().sum() / (estimate - truth).square().sum()))


def deblend(
    operator: Blend, truth: Tensor, prior: GaussianPrior, sigma: float, n: int
) -> tuple[InverseProblem, Tensor, Tensor]:
    """Blended data of the truth; exact mean `(1, nt, shots)` and draws `(n, 1, nt, shots)` of the gather."""
    clean = operator(truth[None])[0]
    generator = torch.Generator().manual_seed(6)
    data = clean + sigma * torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    problem = InverseProblem(data, operator, GaussianNoise(sigma), prior)
    solver = ExactGaussian(method="cg", rtol=1e-4)
    return problem, solver.mean(problem)[0], solver.solve(problem, n, seed=0, dtype=torch.float64).samples[0, 0]


def score(problem: InverseProblem, mean: Tensor, draws: Tensor, truth: Tensor) -> dict[str, float]:
    """SNR before and after, bands, error in posterior sd, χ² per datum."""
    term, sd = problem.terms[0], draws.std(0)
    inside = (truth >= draws.amin(0)) & (truth <= draws.amax(0))
    return {
        "snr_before": decibels(truth, term.operator.adjoint(term.data)[0]),
        "snr_after": decibels(truth, mean),
        "error_over_sd": float((mean - truth).square().mean().sqrt() / sd.square().mean().sqrt()),
        "coverage": float(inside.double().mean()),
        "chi2": float(((term.data - term.operator(draws)) / term.noise.sigma).square().mean()),
    }


def draw(path: str, grid: Grid, truth: Tensor, problem: InverseProblem, estimate: Tensor, samples: Tensor) -> None:
    """Record, gather before and after, truth, error and sd, and one trace with its band."""
    import plots

    term, draws = problem.terms[0], samples[:, 0].numpy()
    record = term.data[0, 0].numpy()
    recorded = Grid(record.shape, grid.spacing, (), ("t", "x"), ("s", ""), ("pressure",))
    cut = term.operator.adjoint(term.data)[0, 0].numpy()
    true, mean = truth[0].numpy(), estimate[0].numpy()
    reach = float(np.percentile(np.abs(true), 99))
    grey = {"cmap": "gray_r", "vmin": -reach, "vmax": reach}
    figure, axes = plots.page(
        2, 4, height=5.0, title="deblending a common-receiver gather: boats in the left and the right half"
    )
    image = plots.section(axes[0, 0], record, recorded, title="blended records", label="pressure (relative)", **grey)
    image.axes.set(xlabel="record", ylabel="time in the record (s)")
    panels = ((cut, "before: cut out at the firing times"), (mean, "after: posterior mean"), (true, "truth"))
    for axis, (values, title) in zip(axes[0, 1:], panels, strict=True):
        plots.section(axis, values, grid, title=title, label="pressure (relative)", **grey)
        plots.wiggles(axis, values, grid, every=6, clip=2 * reach)
    small = {"cmap": "gray_r", "vmin": -reach / 2, "vmax": reach / 2}
    plots.section(axes[1, 0], cut - true, grid, title="before − truth", label="pressure (relative)", **grey)
    plots.section(axes[1, 1], mean - true, grid, title="after − truth", label="pressure (relative)", **small)
    style = {"cmap": "magma", "vmin": 0}
    plots.section(axes[1, 2], draws.std(0), grid, title="posterior sd", label="sd of pressure", **style)
    for axis in (*axes[0, 1:], *axes[1, :3]):
        axis.set(xlabel="shot", ylabel="time after the first arrival (s)")
    j = grid.shape[1] // 3
    t = grid.coordinates(0)
    plots.log_track(
        axes[1, 3],
        t,
        {"after": draws[:, :, j]},
        log=true[:, j],
        others={"before": cut[:, j]},
        title=f"shot {j}",
        label="pressure (relative)",
        vertical="time after the first arrival (s)",
        truth="truth",
    )
    plots.save(figure, path)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = script.parser(__doc__, fast="a small gather in seconds, to see that it runs")
    args = parser.parse_args(argv)
    shape, examples = ((96, 16), 8) if args.fast else ((160, 48), EXAMPLES)
    samples = 5 if args.fast else args.samples

    grid = Grid(shape, (DT, 1.0), (), ("t", "x"), ("s", ""), ("pressure",))
    fitted = GaussianPrior.fit(gathers(shape, examples, SEED + 1), structure="stationary", mean="constant")
    prior = GaussianPrior(0 * fitted.mean_u, fitted.covariance_u, grid=grid)
    truth = gathers(shape, 1, SEED)[0]
    sigma = NOISE * float(truth.square().mean().sqrt())

    figures: dict[str, dict[str, float]] = {}
    for name in ("no dither", "dithered"):
        began = time.perf_counter()
        operator = blend(shape, firing(shape[1], dithered=name == "dithered"), grid)
        problem, mean, draws = deblend(operator, truth, prior, sigma, samples)
        figures[name] = score(problem, mean, draws, truth) | {"seconds": time.perf_counter() - began}
    print(f"{'':10}{'SNR before':>12}{'after (dB)':>12}{'error/sd':>10}{'cover':>7}{'chi2':>7}{'s':>6}")
    for name, f in figures.items():
        print(
            f"{name:10}{f['snr_before']:12.1f}{f['snr_after']:12.1f}{f['error_over_sd']:10.2f}{f['coverage']:7.2f}"
            f"{f['chi2']:7.2f}{f['seconds']:6.0f}"
        )
    if args.figure:
        draw(args.figure, grid, truth, problem, mean, draws)
    line = {"example": "deblending", "figures": figures, "samples": samples}
    return script.finish(line)


if __name__ == "__main__":
    main()
