"""Post-stack inversion of a Marmousi-type section: learned prior against Gaussian prior and total variation.

The ladder: m = ln(2000 v[km/s]); data W D m with a Ricker of 15 Hz at 4 ms (a sample of the section is a sample of
time), factor ½ in the wavelet, white noise 20 dB below the data; the background is the true m low-passed by running
means of 60 (z) and 50 (x) samples forth and back, and enters every method alike as a second term of stated noise 0.05.

    SNR = 10 log10( mean e^{2m} / mean (e^m − e^m̂)² )

Every method sees the same two terms, and none of their settings was chosen on the test section: total variation and the
Gaussian prior by `--tune` on six generated windows (the former run to convergence: 34.4, 34.6 and 34.4 dB at the weights
8, 16 and 32), the diffusion sampler by its coverage on 64 × 64 fields drawn from the prior and on generated ones. The
diffusion prior was trained on generated sections alone. Their share of interval models (beds without texture) was raised
after total variation had won on the test window, for which textured sections alone are too broad a prior.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Benchmark
from torch import Tensor

from invgen.data import GeologySections
from invgen.grid import Grid
from invgen.noise import GaussianNoise
from invgen.operators import PostStack, Smooth, ricker
from invgen.priors import GaussianPrior, pretrained
from invgen.problem import InverseProblem, Term
from invgen.solvers import MMPS, ExactGaussian, GuidedDiffusion, PnPDM, TotalVariation

SECTION = Path(__file__).resolve().parents[2] / "shared" / "data" / "seismic" / "poststack_model.npz"
WINDOW = (slice(211, 339), slice(336, 464))  # the middle of the section
SPACING, SNR_DB, BACKGROUND_SD, LENGTHS = 4.0, 20.0, 0.05, (60, 50)
TUNING_SEED, TUNING_WINDOWS = 5_000_000, 6

# chosen on generated sections, see above
TV_WEIGHT = 16.0
GAUSSIAN = {"kind": "matern", "factor": 0.3, "length": 15.0, "ratio": 5.0}
# The background pins the modes for which the prior alone would ask for a start at 7 √λ_max = 750: of the posterior the
# largest mode is below 50/7, and the levels above 50 would change nothing (they were 16 of 40).
WINDOW_SOLVER = GuidedDiffusion(MMPS(iterations=6, rtol=0.02), "heun", steps=24, sigma_max=50.0)
SECTION_SOLVER = PnPDM(iterations=40, inner=3, rho_max=1.0, rho_min=0.02)
DIFFUSION_GRID = [
    WINDOW_SOLVER,
    GuidedDiffusion(MMPS(iterations=4, rtol=0), "heun", steps=20),
    PnPDM(iterations=60, inner=4),
]


def snr(truth: Tensor, estimate: Tensor) -> float:
    """Signal-to-noise ratio of impedance in dB."""
    error = (truth.exp() - estimate.exp()).square().mean()
    return float(10 * torch.log10((2 * truth).exp().mean() / error))


def ladder(truth: Tensor, prior: Any, seed: int = 1) -> InverseProblem:
    """The two-term problem of a true section `(nz, nx)`; noise from a generator of its own."""
    shape = (1, *truth.shape)
    wavelet = ricker(torch.arange(-30, 31, dtype=torch.float64) * 0.004, 15.0) / 2
    seismic, background = PostStack(wavelet, shape), Smooth(shape, LENGTHS)
    generator = torch.Generator().manual_seed(seed)
    m = truth.double()[None, None]
    clean, smooth = seismic(m), background(m)
    sigma = float(clean.square().mean().sqrt()) * 10 ** (-SNR_DB / 20)
    data = clean + sigma * torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    low = smooth + BACKGROUND_SD * torch.randn(smooth.shape, generator=generator, dtype=torch.float64)
    terms = [
        Term(data, seismic, GaussianNoise(sigma), name="seismic"),
        Term(low, background, GaussianNoise(BACKGROUND_SD), name="background"),
    ]
    return InverseProblem(terms=terms, prior=prior)


def generated(shape: tuple[int, int], count: int, seed: int, start: int = 0) -> Tensor:
    """Windows `(count, 1, *shape)` from the middle of generated sections."""
    full = GeologySections()
    rows, columns = (full.shape[0] - shape[0]) // 2, (full.shape[1] - shape[1]) // 2
    sections = [full.sample(1, seed=seed, start=start + i)[0] for i in range(count)]
    return torch.from_numpy(np.stack(sections)[:, :, rows : rows + shape[0], columns : columns + shape[1]].copy())


def gaussian_prior(
    shape: tuple[int, int], kind: str, factor: float, length: float = 15.0, ratio: float = 5.0
) -> GaussianPrior:
    """A stationary Gaussian prior: fitted to generated windows, or exponential (Matérn ½) with a vertical length in samples.

    `factor` multiplies the variance, `ratio` is the horizontal length over the vertical one.
    """
    windows = generated(shape, 64, TUNING_SEED + 1).double()
    if kind == "fit":
        prior = GaussianPrior.fit(windows, structure="stationary")
    else:
        grid = Grid(shape, (1.0, 1.0))
        sd = float(windows.std(0).mean())
        prior = GaussianPrior.stationary(
            grid,
            sd=sd,
            length=(length, ratio * length),
            kind="matern",
            nu=0.5,
            padding="auto",
            mean=float(windows.mean()),
        )
        prior = GaussianPrior(prior.mean_u, prior.covariance_u)
    return GaussianPrior(prior.mean_u, prior.covariance_u.scaled(factor))


def gaussian_solution(truth: Tensor, prior: GaussianPrior) -> Tensor:
    """Posterior mean under the Gaussian prior, float64."""
    return ExactGaussian(method="cg", rtol=1e-6).mean(ladder(truth, prior))[0, 0]


def diffusion_prior(shape: tuple[int, int], top: int, checkpoint: str | None = None) -> Any:
    """The shipped geology prior on this grid, its network in bfloat16."""
    from invgen.priors import DiffusionPrior

    prior = DiffusionPrior.load(checkpoint) if checkpoint else pretrained.load("geology")
    moved = prior.at(shape, origin=(top * SPACING, 0.0))
    moved.precision = torch.bfloat16
    return moved


def diffusion_samples(truth: Tensor, top: int, solver: Any, count: int, checkpoint: str | None) -> tuple[Tensor, Any]:
    """Posterior samples `(count, nz, nx)` and the posterior."""
    posterior = solver.solve(ladder(truth, diffusion_prior(tuple(truth.shape), top, checkpoint)), count, seed=0)
    return posterior.samples[0, 0, :, 0].double(), posterior


def describe(name: str, truth: Tensor, samples: Tensor, posterior: Any) -> tuple[float, float]:
    """Print SNR, coverage of the min–max band and residuals; return SNR and coverage."""
    mean, low, high = samples.mean(0), samples.min(0).values, samples.max(0).values
    inside = float(((truth >= low) & (truth <= high)).double().mean())
    chi2 = [
        float(((t.data - p[0, 0]) / t.noise.sigma).square().mean())
        for t, p in zip(posterior.problem.terms, posterior.predict(), strict=True)
    ]
    value = snr(truth, mean)
    print(
        f"{name}: SNR of the mean {value:.2f} dB, of one sample {snr(truth, samples[0]):.2f} dB, band covers "
        f"{inside:.3f}, chi² {', '.join(f'{c:.2f}' for c in chi2)}, {posterior.seconds:.1f} s, {posterior.counts}",
        flush=True,
    )
    return value, inside


def tune(method: str, shape: tuple[int, int], checkpoint: str | None) -> None:
    """Print scores of every method on generated windows; the constants above come from here."""
    windows = generated(shape, TUNING_WINDOWS, TUNING_SEED)[:, 0].double()
    top = (550 - shape[0]) // 2
    plain = GaussianPrior.diagonal(torch.zeros(1, *shape), torch.ones(1, *shape))
    for solver in DIFFUSION_GRID if method == "diffusion" else ():
        scores = []
        for w in windows:
            samples, posterior = diffusion_samples(w, top, solver, 19, checkpoint)
            scores.append(describe(type(solver).__name__, w, samples, posterior))
        print(f"{solver}: mean SNR and coverage {np.mean(scores, axis=0)}", flush=True)
    settings = [("fit", 1.0, 15.0, 5.0)]
    settings += [("matern", f, n, r) for f in (0.1, 0.3) for n in (15.0, 40.0) for r in (2.0, 5.0, 12.0)]
    for kind, factor, length, ratio in settings if method == "gaussian" else ():
        prior = gaussian_prior(shape, kind, factor, length, ratio)
        score = np.mean([snr(w, gaussian_solution(w, prior)) for w in windows])
        print(f"Gaussian {kind} factor {factor} length {length} ratio {ratio}: {score:.2f} dB", flush=True)
    for weight in (2.0, 4.0, 8.0, 16.0, 32.0, 64.0) if method == "tv" else ():
        solver = TotalVariation(weight=weight)
        values = [snr(w, solver.solve(ladder(w, plain), 1, dtype=torch.float64).samples[0, 0, 0, 0]) for w in windows]
        print(f"TV {weight}: {np.mean(values):.2f} dB", flush=True)


def main() -> None:
    bench = Benchmark(
        "poststack",
        "Post-stack inversion with a learned prior, beside a Gaussian prior and total variation.",
        {
            "--tune": {
                "choices": ["diffusion", "gaussian", "tv"],
                "help": "score settings on generated sections instead",
            },
            "--checkpoint": {"default": None, "help": "another prior than the shipped one"},
            "--figure": {"default": None, "help": "write a picture of the window here"},
        },
    )
    if bench.args.tune:
        tune(bench.args.tune, (128, 128), bench.args.checkpoint)
        return
    if not SECTION.exists():
        sys.exit(f"{SECTION.name} is missing: put the shared data folder beside the project to run this benchmark.")
    section = torch.from_numpy(np.log(2000 * np.load(SECTION)["model"]))
    truth = section[WINDOW].contiguous()
    plain = GaussianPrior.diagonal(torch.zeros(1, *truth.shape), torch.ones(1, *truth.shape))
    samples, posterior = diffusion_samples(truth, WINDOW[0].start, WINDOW_SOLVER, 19, bench.args.checkpoint)
    value, inside = describe("window", truth, samples, posterior)
    began = time.perf_counter()
    gaussian = gaussian_solution(truth, gaussian_prior(tuple(truth.shape), **GAUSSIAN))
    print(f"Gaussian prior: SNR {snr(truth, gaussian):.2f} dB, {time.perf_counter() - began:.1f} s", flush=True)
    began = time.perf_counter()
    solver = TotalVariation(weight=TV_WEIGHT)
    tv = solver.solve(ladder(truth, plain), 1, dtype=torch.float64).samples[0, 0, 0, 0]
    print(f"total variation: SNR {snr(truth, tv):.2f} dB, {time.perf_counter() - began:.1f} s", flush=True)
    low = ladder(truth, plain).terms[1].data[0, 0]
    bench.add("window_background_snr_db", snr(truth, low), "dB")
    bench.add("window_snr_db", value, "dB")
    bench.add("window_gaussian_snr_db", snr(truth, gaussian), "dB")
    bench.add("window_tv_snr_db", snr(truth, tv), "dB")
    bench.add("window_seconds", posterior.seconds, "s", note=f"19 samples, {bench.args.threads} threads")
    bench.add("gain_over_gaussian_db", value - snr(truth, gaussian), "dB")
    bench.add("gain_over_tv_db", value - snr(truth, tv), "dB")
    bench.add("window_coverage", inside, "", note="min–max of 19, nominal 0.90")
    if bench.args.figure:
        figure(bench.args.figure, truth, low, gaussian, tv, samples)
    if not bench.fast:
        samples, posterior = diffusion_samples(section, 0, SECTION_SOLVER, 4, bench.args.checkpoint)
        value, _ = describe("section", section, samples, posterior)
        bench.add("section_seconds_per_sample", posterior.seconds / 4, "s", note=f"{bench.args.threads} threads")
        bench.add("section_snr_db", value, "dB", note="mean of 4 samples")
        bench.add(
            "section_background_snr_db", snr(section, ladder(section, plain_like(section)).terms[1].data[0, 0]), "dB"
        )
    bench.finish()


def plain_like(section: Tensor) -> GaussianPrior:
    """A white stand-in where only the data are wanted."""
    return GaussianPrior.diagonal(torch.zeros(1, *section.shape), torch.ones(1, *section.shape))


def figure(path: str, truth: Tensor, low: Tensor, gaussian: Tensor, tv: Tensor, samples: Tensor) -> None:
    """Truth, background, the three estimates, a sample and the posterior sd, in metres."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    nz, nx = truth.shape
    extent = (0, nx * SPACING, (WINDOW[0].start + nz) * SPACING, WINDOW[0].start * SPACING)
    panels = [("truth", truth), ("background", low), ("Gaussian prior", gaussian), ("total variation", tv)]
    panels += [("posterior mean", samples.mean(0)), ("posterior sample", samples[0]), ("posterior sd", samples.std(0))]
    low_value, high_value = float(truth.min()), float(truth.max())
    fig, axes = plt.subplots(2, 4, figsize=(15, 7), constrained_layout=True)
    for axis, (title, image) in zip(axes.flat, panels, strict=False):
        limits = {} if title == "posterior sd" else {"vmin": low_value, "vmax": high_value}
        shown = axis.imshow(
            image, extent=extent, aspect="auto", cmap="magma" if title == "posterior sd" else "viridis", **limits
        )
        note = "" if title in ("truth", "posterior sd") else f", {snr(truth, image):.1f} dB"
        axis.set(title=title + note, xlabel="distance (m)", ylabel="depth (m)")
        fig.colorbar(shown, ax=axis, label="sd of ln impedance" if title == "posterior sd" else "ln impedance")
    axis = axes.flat[7]
    depth, j = WINDOW[0].start * SPACING + SPACING * np.arange(nz), nx // 2
    axis.fill_betweenx(
        depth, samples[:, :, j].min(0).values, samples[:, :, j].max(0).values, color="0.8", label="min–max of 19"
    )
    axis.plot(truth[:, j], depth, "k", lw=1, label="truth")
    axis.plot(samples.mean(0)[:, j], depth, "r", lw=1, label="posterior mean")
    axis.plot(tv[:, j], depth, "b--", lw=0.8, label="total variation")
    axis.invert_yaxis()
    axis.set(title="middle trace", xlabel="ln impedance", ylabel="depth (m)")
    axis.legend(fontsize=8)
    fig.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
