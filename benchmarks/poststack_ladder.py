"""The post-stack ladder: Tikhonov, total variation, a Gaussian prior, plug-and-play and a posterior mean, side by side.

A window of the Marmousi-type section `poststack_model.npz`, m = ln(2000 v[km/s]); data W D m with a Ricker of 15 Hz at
4 ms, factor ½ in the wavelet. Noise and background as in the ladder of DIG-Kaust/Seismic_PnP: white noise passed forth
and back through running means of 10 (z) and 5 (x) samples, 20 dB below the data; the background is the true m passed
forth and back through running means of 60 and 50 samples. Two things differ from it: the section (theirs is another part
of Marmousi), and the background enters as data with the noise 0.05 rather than as a starting model, for all methods alike.

    SNR = 10 log10( mean e^{2m} / mean (e^m − e^m̂)² )

Every method sees the same two terms. The noise covariance is estimated by `invgen.data.noise_covariance` from a noise
window of 128 × 128 samples that holds no signal (recorded before the first arrival, say); the KAUST ladder weights
residuals as if they were white, which is the row "TV, white misfit". Every method has its one free number chosen by an
oracle, the best SNR on the test window itself over the grid printed: a favour to the baselines. The posterior has no
free number: 19 samples under the shipped geology prior by `--solver`, guided diffusion with MMPS or PnPDM.

The sampler's settings were chosen by `--simulated` alone, on truths drawn from the prior with noise drawn from R, where
draws of the posterior must cover what they state. On one such truth (64 × 64, 5 draws, nominal 0.67):

- MMPS, 8 iterations with damping 0.03: covered 0.61, error over spread 1.17, χ² of the draws 1.04 to 1.14; by wavenumber
  the error is 0.7 to 1.4 of the spread, without trend. Its GMRES is not converged (whitened residual 0.82 at worst).
  Preconditioned and damped by r² instead of σ², it left the long waves unsolved (19 dB).
- PnPDM of 80 sweeps from ρ = 20 to 0.01 (two truths): covered 0.44 and 0.51, error over spread 1.7 and 1.6, χ² 5. Eight
  sweeps of it from finished draws of MMPS (ρ from 1 to 0.02) halved their spread wherever data are silent, vertical
  wavenumbers above a quarter of Nyquist (error over spread from 1.2 to 2.1), though its solves are exact: it is the
  prior step with the learned denoiser that loses texture.
- OverrelaxedSplit (40 levels, 8 moves) left the posterior: its reflections 2 D − u presumably amplify what a learned J
  has outside [0, 1].

The noise of that ladder is as good as absent above 25 Hz, and R has a nugget of one per cent of its variance: χ² of the
truth is then far below 1 by construction (0.20 under the exact covariance with that nugget), which says nothing against
the estimate; `--floor 0.01` adds that white noise to the data, and χ² is 0.96. Nor does it widen the posterior by much:
on three generated windows with a Gaussian prior the exact covariance and a nugget of 0.001, in the place of an estimate
under which χ² was 0.11, made the posterior standard deviation 4 per cent smaller and the mean 0.7 dB worse to 0.5 better.
The targets are those of the noise without a floor.

With `--fast` four numbers decide. The background is smoothed over 60 samples of 64 and the wavelet is silent below 5 Hz:
of the lateral mean, the vertical modes 0 to 3 have a posterior sd of 0.2 to 0.9 under any prior tried (dense algebra with
exponential covariances). They hold 81 per cent of the squared error of the posterior mean (1.45 together, for a stated
sd of 0.74). What is left is 0.71 against 0.55 of TV and 1.20 of the Gaussian prior, for a stated sd of 1.04: the learned
prior has more texture than this section.

On the whole window TV leads: 40.5 dB, PnP 38.7, the posterior mean 36.9 (one sample 33.1), the Gaussian 35.0, Tikhonov 32.7; the band
of 19 covers 0.94. GMRES is not to blame: with the prior's Gaussian companion in the place of σ² J above σ = 1, whose systems are
solved to 1e-3, a simulated truth is found as before (error over spread 1.11 for 1.17). As a preconditioner below it, that
companion does not help: at σ ≫ 1 the learned σ² J has errors far above the variance of all but the largest modes.

The window is that of `poststack.py`. `--fast`: its upper left quarter, 64 × 64 instead of 128 × 128 samples, and grids of
three values.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from harness import Benchmark
from poststack import (
    BACKGROUND_SD,
    GAUSSIAN,
    LENGTHS,
    SECTION,
    SNR_DB,
    WINDOW,
    diffusion_prior,
    gaussian_prior,
    snr,
)
from scipy.fft import dct
from scipy.signal import filtfilt
from torch import Tensor

from invgen.contracts import Solver
from invgen.covariance import Covariance
from invgen.data import noise_covariance
from invgen.noise import GaussianNoise
from invgen.operators import PostStack, Smooth, ricker
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem, Term
from invgen.solvers import MMPS, ExactGaussian, GuidedDiffusion, PnPDM

COLOUR = (10, 5)  # running means of the noise, z and x
NUGGET = 0.01  # white share of the noise variance: a floor 20 dB below the noise, though the noise has none
LAGS = (60, 30)  # of the autocovariance: three times the distance over which the noise is correlated

# chosen on truths drawn from the prior, see above
SOLVERS: dict[str, Solver] = {
    "mmps": GuidedDiffusion(MMPS(iterations=8, rtol=0, damping=0.03), "heun", steps=20, sigma_max=50.0),
    "pnpdm": PnPDM(iterations=80, inner=3, rho_max=20.0, rho_min=0.01),
}

GRIDS: dict[str, list[float]] = {
    "Tikhonov": [3e2, 1e3, 3e3, 1e4, 3e4],
    "TV, white misfit": [16.0, 32.0, 64.0, 128.0, 256.0],
    "TV": [2.0, 4.0, 8.0, 16.0, 32.0],
    "Gaussian": [0.03, 0.1, 0.2, 0.3, 1.0],
    "PnP": [0.003, 0.01, 0.03, 0.1, 0.3],
}
SLOPE, TV_ITERATIONS = 0.02, 400  # typical slope of m a sample, which balances primal and dual steps
PNP_LEVELS = (1.0, 0.02, 24)  # first and last level in u, and iterations


@dataclass
class Rung:
    """One row: name, SNR, the chosen number, CPU seconds of one solve at that number and of the whole search."""

    name: str
    snr: float
    chosen: str
    seconds: float
    search: float
    estimate: Tensor


def coloured(shape: tuple[int, int], seed: int) -> Tensor:
    """Unit-variance noise of the ladder, away from the edges of the filter."""
    pad = (10 * COLOUR[0], 10 * COLOUR[1])
    white = np.random.default_rng(seed).standard_normal([n + 2 * p for n, p in zip(shape, pad, strict=True)])
    for axis, length in enumerate(COLOUR):
        white = filtfilt(np.ones(length) / length, 1, white, axis=axis)
    inner = white[pad[0] : pad[0] + shape[0], pad[1] : pad[1] + shape[1]]
    gain = 1.0
    for length in COLOUR:  # variance that the filter leaves of white noise
        box = np.ones(length) / length
        gain *= float(np.square(np.convolve(box, box)).sum())
    return torch.from_numpy(inner / np.sqrt(gain))


def ladder(truth: Tensor, prior: Any, *, white: bool = False, floor: float = 0.0, seed: int = 1) -> InverseProblem:
    """The two-term problem of a true window `(nz, nx)`.

    Args:
        truth: m. prior: of it. white: weight the seismic residuals as if they were white. floor: share of the noise
            variance that is white noise. seed: of the noise.
    """
    shape = (1, *truth.shape)
    wavelet = ricker(torch.arange(-30, 31, dtype=torch.float64) * 0.004, 15.0) / 2
    seismic, background = PostStack(wavelet, shape), Smooth(shape, LENGTHS)
    m = truth.double()[None, None]
    clean, smooth = seismic(m), background(m)
    sigma = float(clean.square().mean().sqrt()) * 10 ** (-SNR_DB / 20)
    generator = torch.Generator().manual_seed(seed)

    def noise_field(size: tuple[int, int], number: int) -> Tensor:
        hiss = torch.randn(size, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        return sigma * ((1 - floor) ** 0.5 * coloured(size, number) + floor**0.5 * hiss)

    data = clean + noise_field(tuple(truth.shape), seed)
    low = smooth + BACKGROUND_SD * torch.randn(smooth.shape, generator=generator, dtype=torch.float64)
    recorded = noise_field((128, 128), seed + 1000)
    R = noise_covariance(recorded, shape, lags=LAGS, nugget=NUGGET)
    noise = GaussianNoise(float(recorded.square().mean().sqrt())) if white else GaussianNoise(covariance=R)
    terms = [
        Term(data, seismic, noise, name="seismic"),
        Term(low, background, GaussianNoise(BACKGROUND_SD), name="background"),
    ]
    return InverseProblem(terms=terms, prior=prior)


class Curvature(Covariance):
    """(weight (∇⁴ + 1e-6))⁻¹ on a section with free edges: diagonal under the cosine transform, unit spacing.

    Args:
        shape: `(1, n_z, n_x)`. weight: of the squared Laplacian.
    """

    def __init__(self, shape: tuple[int, ...], weight: float) -> None:
        self.shape = shape
        self.bases = [torch.from_numpy(dct(np.eye(n), axis=0, norm="ortho")).T for n in shape[1:]]
        z, x = (2 - 2 * torch.cos(torch.pi * torch.arange(n, dtype=torch.float64) / n) for n in shape[1:])
        self.gain = 1 / (weight * ((z[:, None] + x[None]).square() + 1e-6))

    def apply(self, v: Tensor) -> Tensor:
        Z, X = self.bases
        return Z @ ((Z.mT @ v @ X) * self.gain) @ X.mT


def tikhonov(problem: InverseProblem, weight: float) -> Tensor:
    """argmin ½ Σ |W (A m − d)|² + ½ weight (|∇² m|² + 1e-6 |m − m₀|²), m₀ the mean of the background; to convergence."""
    system = problem.linear_gaussian("x")
    A, C = system.operator, Curvature(system.operator.model_shape, weight)
    centre = problem.terms[1].data.mean() * torch.ones(1, *A.model_shape, dtype=torch.float64)
    solved = A.solve(system.data - A(centre), system.R, C, rtol=1e-6, max_iter=2000)
    return (centre + C.apply(A.adjoint(solved.x)))[0, 0]


def total_variation(problem: InverseProblem, weight: float, iterations: int) -> Tensor:
    """argmin ½ Σ |W (A m − d)|² + weight Σ |∇m|, by PyProximal's PrimalDual with PyLops' gradient, from the background.

    Chambolle & Pock 2011, algorithm 1. The proximal operator of the data term is solved for the change of m, so that
    its tolerance refers to that change.
    """
    import pylops
    from pyproximal import L21
    from pyproximal.optimization.primaldual import PrimalDual

    system = problem.linear_gaussian("x")
    A, R, d = system.operator, system.R, system.data
    shape = A.model_shape

    class Data:
        """½ |W (A m − d)|² as PyProximal expects it."""

        def __call__(self, m: np.ndarray) -> float:
            r = A(torch.from_numpy(m).reshape(1, *shape)) - d
            return 0.5 * float(R.whiten(r).square().sum())

        def prox(self, m: np.ndarray, tau: float) -> np.ndarray:
            now = torch.from_numpy(m).reshape(1, *shape)
            pull, _ = A.pull_residual(now, d, R)
            return (now + A.solve_model(pull, R, tau, rtol=1e-3).x).numpy().ravel()

    gradient = pylops.VStack([pylops.FirstDerivative(shape[1:], axis=a, kind="forward") for a in (0, 1)])
    length = np.sqrt(8.0)
    tau = SLOPE / (weight * length)
    return torch.from_numpy(
        PrimalDual(
            Data(),
            L21(2, sigma=weight),
            gradient,
            x0=problem.terms[1].data.numpy().ravel().copy(),
            tau=tau,
            mu=0.98 / (tau * length**2),
            niter=iterations,
            gfirst=True,
        )
    ).reshape(shape[1:])


def plug_and_play(problem: InverseProblem, weight: float) -> Tensor:
    """DPIR (Zhang et al. 2021, arXiv:2008.13751, algorithm 1): half-quadratic splitting with a falling noise level.

    z_k = argmin −log p(d | z) + weight |z − u_{k−1}|²/2σ_k²,     u_k = D(z_k; σ_k),     σ_k evenly spaced in log σ.

    The denoiser is that of the shipped prior; starts at its mean. A point, with no claim to be an optimum.
    """
    system = problem.linear_gaussian("u")
    A, R, transform = system.operator, system.R, problem.prior.transform
    first, last, count = PNP_LEVELS
    with torch.no_grad():
        u = problem.prior.denoise(torch.zeros(1, *A.model_shape), 1e2)
        for sigma in np.geomspace(first, last, count):
            pull, _ = A.pull_residual(u, system.data, R)
            z = u + A.solve_model(pull, R, float(sigma) ** 2 / weight).x
            u = problem.prior.denoise(z, float(sigma))
    return transform(u)[0, 0].double()


def search(name: str, truth: Tensor, grid: Sequence[float], solve: Callable[[float], Tensor]) -> Rung:
    """The oracle: the number of the grid with the best SNR on the test window."""
    tried: dict[float, tuple[float, float, Tensor]] = {}
    for value in grid:
        began = time.process_time()
        estimate = solve(value)
        tried[value] = (snr(truth, estimate), time.process_time() - began, estimate)
    best = max(tried, key=lambda v: tried[v][0])
    scores = ", ".join(f"{v:g}: {s:.2f}" for v, (s, _, _) in tried.items())
    print(f"{name}: {scores} dB", flush=True)
    if len(tried) > 1 and best in (grid[0], grid[-1]):
        print(f"{name}: the best number is at the end of its grid", flush=True)
    value, seconds, estimate = tried[best]
    return Rung(name, value, f"{best:g}", seconds, sum(t[1] for t in tried.values()), estimate)


def simulated(problem: InverseProblem, count: int, solver: Solver, draws: int = 5) -> None:
    """Print how `solver` does where the posterior is right by construction: truths from the prior, noise from R.

    The min–max band of `draws` covers (draws − 1)/(draws + 1) of the truth, and the error of their mean is √(1 + 1/draws)
    of their spread, if they are draws of the posterior.
    """
    terms = problem.terms
    seismic, low = terms[0].operator, terms[1].operator
    R = terms[0].noise.covariance(seismic.data_shape)
    truths = problem.prior.sample(count, seed=77, steps=24, sampler="heun").double()
    generator = torch.Generator().manual_seed(5)
    white = [torch.randn(truths.shape, generator=generator, dtype=torch.float64) for _ in terms]
    data = [seismic(truths) + R.sqrt(white[0]), low(truths) + BACKGROUND_SD * white[1]]
    fitted = [Term(d, t.operator, t.noise, name=t.name) for d, t in zip(data, terms, strict=True)]
    posterior = solver.solve(InverseProblem(terms=fitted, prior=problem.prior), draws, seed=0)
    samples = posterior.samples[:, 0, :, 0].double()
    for truth, drawn, d in zip(truths[:, 0], samples, data[0], strict=True):
        inside = ((truth >= drawn.min(0).values) & (truth <= drawn.max(0).values)).double().mean()
        error, spread = (truth - drawn.mean(0)).square().mean(), (1 + 1 / draws) * drawn.var(0).mean()
        chi2 = float(R.whiten(d - seismic(drawn[:, None])).square().mean())
        print(
            f"simulated: {snr(truth, drawn.mean(0)):.2f} dB, band covers {float(inside):.3f} (nominal "
            f"{(draws - 1) / (draws + 1):.3f}), error over spread {float((error / spread).sqrt()):.2f}, chi² {chi2:.2f}",
            flush=True,
        )


def main() -> None:
    bench = Benchmark(
        "poststack_ladder",
        "The post-stack ladder with coloured noise: Tikhonov, TV, Gaussian, plug-and-play, posterior mean.",
        {
            "--checkpoint": {"default": None, "help": "another prior than the shipped one"},
            "--floor": {"type": float, "default": 0.0, "help": "share of the noise variance that is white"},
            "--output": {"default": None, "help": "folder for estimates.npz"},
            "--solver": {"choices": sorted(SOLVERS), "default": "mmps", "help": "sampler of the posterior"},
            "--simulated": {
                "type": int,
                "default": 0,
                "help": "check the sampler on so many draws of the prior instead",
            },
        },
    )
    if not SECTION.exists():
        sys.exit(f"{SECTION.name} is missing: put the shared data folder beside the project to run this benchmark.")
    side = 64 if bench.fast else 128
    top, left = WINDOW[0].start, WINDOW[1].start
    section = torch.from_numpy(np.log(2000 * np.load(SECTION)["model"]))
    truth = section[top : top + side, left : left + side].contiguous()
    plain = GaussianPrior.diagonal(torch.zeros(1, *truth.shape), torch.ones(1, *truth.shape))
    grids = {k: v[1:4] if bench.fast else v for k, v in GRIDS.items()}
    floor = bench.args.floor
    solver = SOLVERS[bench.args.solver]
    if bench.args.simulated:
        prior = diffusion_prior((side, side), top, bench.args.checkpoint)
        simulated(ladder(truth, prior, floor=floor), bench.args.simulated, solver)
        return
    problem, flat = ladder(truth, plain, floor=floor), ladder(truth, plain, floor=floor, white=True)
    low = problem.terms[1].data[0, 0]
    rungs = [Rung("background alone", snr(truth, low), "", 0.0, 0.0, low)]
    rungs.append(search("Tikhonov", truth, grids["Tikhonov"], lambda w: tikhonov(problem, w)))

    for name, p in (("TV, white misfit", flat), ("TV", problem)):
        rungs.append(search(name, truth, grids[name], lambda w, p=p: total_variation(p, w, TV_ITERATIONS)))

    unit = gaussian_prior((side, side), **{**GAUSSIAN, "factor": 1.0})

    def gaussian(factor: float) -> Tensor:
        prior = GaussianPrior(unit.mean_u, unit.covariance_u.scaled(factor))
        return ExactGaussian(method="cg", rtol=1e-6).mean(ladder(truth, prior, floor=floor))[0, 0]

    rungs.append(search("Gaussian", truth, grids["Gaussian"], gaussian))
    learned = ladder(truth, diffusion_prior((side, side), top, bench.args.checkpoint), floor=floor)
    single = learned.select([0], dtype=torch.float32)
    rungs.append(search("PnP", truth, grids["PnP"], lambda w: plug_and_play(single, w)))
    began = time.process_time()
    posterior = solver.solve(learned, 19, seed=0)
    spent = time.process_time() - began
    samples = posterior.samples[0, 0, :, 0].double()
    mean = samples.mean(0)
    rungs.append(Rung("posterior mean of 19", snr(truth, mean), "none", spent, spent, mean))
    inside = (truth >= samples.min(0).values) & (truth <= samples.max(0).values)
    residual = float(posterior.stats["residual"].max())
    seismic = learned.terms[0]
    R = seismic.noise.covariance(seismic.operator.data_shape)

    def chi2(m: Tensor) -> float:
        return float(R.whiten(seismic.data - seismic.operator(m[:, None].double())).square().mean())

    print(
        f"one sample {snr(truth, samples[0]):.2f} dB, {posterior.counts}, worst inner residual {residual:.2g}, seismic "
        f"chi² of samples {chi2(samples):.2f}, of the truth {chi2(truth[None]):.2f} (1 if R were the noise's)",
        flush=True,
    )

    print(f"\n{'method':24}{'SNR dB':>8}{'chosen':>10}{'CPU s':>9}{'search s':>10}")
    for r in rungs:
        print(f"{r.name:24}{r.snr:8.2f}{r.chosen:>10}{r.seconds:9.1f}{r.search:10.1f}")
    by = {r.name: r for r in rungs}
    best_tv = max(by["TV"].snr, by["TV, white misfit"].snr)
    value = by["posterior mean of 19"].snr
    for key, name in (
        ("background_snr_db", "background alone"),
        ("tikhonov_snr_db", "Tikhonov"),
        ("tv_white_snr_db", "TV, white misfit"),
        ("tv_snr_db", "TV"),
        ("gaussian_snr_db", "Gaussian"),
        ("pnp_snr_db", "PnP"),
        ("posterior_mean_snr_db", "posterior mean of 19"),
    ):
        bench.add(key, by[name].snr, "dB", note=f"{by[name].seconds:.1f} CPU s")
    bench.add("gain_over_tv_db", value - best_tv, "dB", note="the better TV of the two, oracle weight")
    bench.add("gain_over_pnp_db", value - by["PnP"].snr, "dB", note="PnP with oracle weight")
    bench.add("gain_over_gaussian_db", value - by["Gaussian"].snr, "dB")
    bench.add("coverage", float(inside.double().mean()), "", note="min–max of 19, nominal 0.90")
    bench.add("posterior_worst_residual", residual, "", note=f"of the inner solves of {type(solver).__name__}")
    bench.add("posterior_cpu_seconds", spent, "s", note=f"19 samples, {bench.args.threads} threads")
    if bench.args.output:
        from pathlib import Path

        folder = Path(bench.args.output)
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / "estimates.npz", truth=truth, samples=samples, **{r.name: r.estimate for r in rungs})
    bench.finish()


if __name__ == "__main__":
    main()
