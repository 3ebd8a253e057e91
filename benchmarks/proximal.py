"""Classical inversion: total variation against PyProximal's primal–dual, proximal samplers, parameter choice.

Speed. Both programs minimise one function, ½ |A m − d|²/σ² + w TV(m), from one start:

- deblurring, 256 × 256: a phantom of ellipses and boxes, a periodic Gaussian blur of 2 samples, noise 0.01;
- post-stack, 221 × 601: the upper left of `poststack_model.npz`, m = ln(2000 v), Ricker of 15 Hz at 4 ms, noise 20 dB
  below the data, from the background that running means of 60 and 50 samples leave.

Time is CPU time until the objective, looked at every few iterations off the clock, is within 1e-4 (relative) of that of
a long run of `PrimalDual` in float64. PyProximal runs as documented, ½ |A m − d|² + w σ² TV(m) with its `L2` of the operator
(inner solves of `--inner` iterations at the most, warm started), `L21`, PyLops' gradient and tau = mu = 0.99/√8. The rows
"tuned" give it what it has not: the exact proximal operator of the data term (by FFT, or a dense inverse that acts on all
traces), and the best of a few steps. Everything runs on one thread in one process.

Samplers. Posterior means of ten unknowns under a Gaussian and a Laplace prior against closed forms and quadrature: the
mean error is √max(0, mean z² − 1/ESS) in posterior standard deviations.

Parameter choice. TV deblurring of ten random scenes, 64 × 64: how far below the best weight of the grid, in dB, the
discrepancy principle and SURE end.

Plug-and-play. The window of `poststack.py` with its white noise and its background, PnP (DPIR, 24 levels) with the shipped
geology denoiser beside TV, each at the best of three weights.

`--fast`: 128 × 128, 111 × 201 and 32 × 32 in the place of the sizes, a fifth of the draws.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Benchmark
from torch import Tensor

from invgen.noise import GaussianNoise
from invgen.operators import Convolution, Identity, MatrixOperator, PostStack, Smooth, ricker
from invgen.priors import L1, TV, GaussianPrior
from invgen.problem import InverseProblem
from invgen.solvers import MYULA, SKROCK, ExactGaussian, PlugAndPlay, PrimalDual, ProximalMALA, choose_weight

SECTION = Path(__file__).resolve().parents[2] / "shared" / "data" / "seismic" / "poststack_model.npz"
CLOSE = 1e-4


def phantom(n: int) -> Tensor:
    """Ellipses and boxes on [0, 1], with one smooth ramp."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, n, dtype=torch.float64)] * 2, indexing="ij")
    image = torch.zeros(n, n, dtype=torch.float64)
    for cy, cx, ry, rx, value in ((0, 0, 0.8, 0.6, 0.4), (-0.2, 0.2, 0.35, 0.15, 0.5), (0.3, -0.2, 0.12, 0.3, -0.3)):
        image[((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1] += value
    for top, left, size, value in ((-0.9, -0.9, 0.3, 0.8), (0.5, 0.6, 0.25, 0.6), (0.55, 0.65, 0.1, -0.5)):
        image[(y > top) & (y < top + size) & (x > left) & (x < left + size)] += value
    return image + 0.1 * (x + 1) * (y > 0.4)


def deblurring(n: int) -> tuple[InverseProblem, Tensor]:
    """The problem and the start (zero)."""
    taps = torch.exp(-0.5 * (torch.arange(-8, 9, dtype=torch.float64) / 2) ** 2)
    kernel = torch.outer(taps, taps) / taps.sum() ** 2
    A = Convolution(kernel, (1, n, n))
    m = phantom(n)[None, None]
    noise = torch.randn(m.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    problem = InverseProblem(A(m) + 0.01 * noise, A, GaussianNoise(0.01), TV((1, n, n), 30.0))
    return problem, torch.zeros_like(m)


def poststack(nz: int, nx: int) -> tuple[InverseProblem, Tensor]:
    """The problem and the start (the background)."""
    section = torch.from_numpy(np.log(2000 * np.load(SECTION)["model"]))[:nz, :nx]
    m, shape = section[None, None].contiguous(), (1, nz, nx)
    A = PostStack(ricker(torch.arange(-30, 31, dtype=torch.float64) * 0.004, 15.0) / 2, shape)
    clean = A(m)
    sigma = float(clean.square().mean().sqrt()) * 0.1
    noise = torch.randn(m.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    problem = InverseProblem(clean + sigma * noise, A, GaussianNoise(sigma), TV(shape, 8.0))
    return problem, Smooth(shape, (60, 50))(m)


def objective(problem: InverseProblem, m: Tensor) -> float:
    """½ |A m − d|²/σ² + w TV(m) in float64."""
    term, m = problem.terms[0], m.double().reshape(1, *problem.model_shape)
    r = (term.data - term.operator(m)) / term.noise.sigma
    return 0.5 * float(r.square().sum()) + float(problem.prior.penalty(m))


class Arrived(Exception):
    """The goal was reached: the run may end."""


class Clock:
    """CPU seconds until the goal, with pauses.

    Args:
        problem, goal: the objective to reach. every: calls between two looks at it, off the clock.
    """

    def __init__(self, problem: InverseProblem, goal: float, every: int) -> None:
        self.problem, self.goal, self.every, self.calls = problem, goal, every, 0
        self.spent, self.reached, self.value = 0.0, float("inf"), float("inf")
        self.began = time.process_time()

    def look(self, m: Any) -> None:
        """Stop the clock, look at the objective of a model now and then, go on."""
        self.spent += time.process_time() - self.began
        self.calls += 1
        if self.calls % self.every == 0:
            self.value = objective(self.problem, torch.as_tensor(m))
            if self.value <= self.goal:
                self.reached = self.spent
                raise Arrived
        self.began = time.process_time()


def ours(problem: InverseProblem, start: Tensor | None, iterations: int, goal: float) -> Clock:
    """PrimalDual in float32; the clock includes its set-up."""
    solver = PrimalDual(iterations=iterations, tol=0, start=start)
    clock = Clock(problem, goal, 1)
    with contextlib.suppress(Arrived):
        solver.solve(problem, dtype=torch.float32, callbacks=[lambda _, state: clock.look(state["x"])])
    return clock


def pyproximal(problem: InverseProblem, start: Tensor, term: Any, tau: float, iterations: int, goal: float) -> Clock:
    """PyProximal's PrimalDual on ½ |A m − d|² + w σ² TV(m)."""
    import pylops
    from pyproximal import L21
    from pyproximal.optimization.primaldual import PrimalDual as Theirs

    gradient = pylops.Gradient(problem.model_shape[1:], sampling=1.0, edge=False, kind="forward", dtype="float64")
    variance = float(problem.terms[0].noise.sigma) ** 2
    clock = Clock(problem, goal, 10)
    with contextlib.suppress(Arrived):
        Theirs(
            term,
            L21(2, sigma=problem.prior.weight * variance),
            gradient,
            x0=start.numpy().ravel().copy(),
            tau=tau,
            mu=0.99**2 / (8 * tau),
            niter=iterations,
            gfirst=False,
            callback=clock.look,
        )
    return clock


class FourierTerm:
    """½ |k * m − d|² with its exact proximal operator, what an expert would write for PyProximal."""

    def __init__(self, problem: InverseProblem) -> None:
        A, d = problem.terms[0].operator, problem.terms[0].data[0, 0].numpy()
        self.shape = d.shape
        point = torch.zeros(1, *A.model_shape, dtype=torch.float64)
        point[..., 0, 0] = 1
        self.K = np.fft.rfft2(A(point)[0, 0].numpy())
        self.back, self.power = self.K.conj() * np.fft.rfft2(d), np.abs(self.K) ** 2

    def __call__(self, m: np.ndarray) -> float:
        return 0.0  # the solver asks for it only to print

    def prox(self, m: np.ndarray, tau: float) -> np.ndarray:
        """(KᴴK + 1/τ)⁻¹ (Kᴴd + m/τ)."""
        spectrum = (np.fft.rfft2(m.reshape(self.shape)) + tau * self.back) / (1 + tau * self.power)
        return np.fft.irfft2(spectrum, s=self.shape).ravel()


class TraceTerm:
    """½ |A m − d|² of an operator that acts on every trace alike, by one dense inverse."""

    def __init__(self, problem: InverseProblem) -> None:
        A, d = problem.terms[0].operator, problem.terms[0].data[0, 0].numpy()
        columns = torch.eye(len(d), dtype=torch.float64)[:, None, :, None].expand(-1, -1, -1, d.shape[1])
        self.shape, A1 = d.shape, A(columns.contiguous())[:, 0, :, 0].numpy().T
        self.normal, self.back = A1.T @ A1, A1.T @ d
        self.inverse: dict[float, np.ndarray] = {}

    def __call__(self, m: np.ndarray) -> float:
        return 0.0

    def prox(self, m: np.ndarray, tau: float) -> np.ndarray:
        """(AᵀA + 1/τ)⁻¹ (Aᵀd + m/τ)."""
        if tau not in self.inverse:
            self.inverse[tau] = np.linalg.inv(np.eye(len(self.normal)) + tau * self.normal)
        return (self.inverse[tau] @ (m.reshape(self.shape) + tau * self.back)).ravel()


def race(
    bench: Benchmark, name: str, problem: InverseProblem, start: Tensor, forward: Any, exact: Any, limits: Sequence[int]
) -> None:
    """Time to 1e-4 of the minimum, ours and PyProximal's; `limits`: iterations of the reference, ours and theirs."""
    from pyproximal import L2

    # where the start is zero ours begin with damped least squares
    first = start if bool(start.any()) else None
    long = PrimalDual(iterations=limits[0], tol=0, start=first).solve(problem, dtype=torch.float64)
    best = float(long.stats["objective"])
    goal = best * (1 + CLOSE)
    plain = L2(Op=forward, b=problem.terms[0].data.numpy().ravel(), niter=bench.args.inner, warm=True)
    natural = 0.99 / np.sqrt(8)
    runs: dict[str, Callable[[], Clock]] = {
        "ours": lambda: ours(problem, first, limits[1], goal),
        "PyProximal": lambda: pyproximal(problem, start, plain, natural, limits[2], goal),
    }
    for factor in (4.0, 16.0):
        runs[f"PyProximal tuned, {factor:g} tau"] = lambda f=factor: pyproximal(
            problem, start, exact, f * natural, limits[2], goal
        )
    print(f"{name}: objective {best:.6f}")
    clocks = {}
    for key, run in runs.items():
        clocks[key] = clock = run()
        said = f"{clock.value / best - 1:.1e} after {clock.calls} looks and {clock.spent:.2f} CPU s"
        print(f"  {key:28} {said}", flush=True)
    mine, theirs = clocks["ours"].reached, clocks["PyProximal"]
    bound = "" if np.isfinite(theirs.reached) else "a lower bound: PyProximal had not arrived"
    tuned = min(c.reached for k, c in clocks.items() if "tuned" in k)
    bench.add(f"tv_{name}_speedup", theirs.spent / mine, "x", note=bound)
    bench.add(f"tv_{name}_tuned_speedup", tuned / mine, "x", note="against PyProximal with an exact data term")


def forward_deblur(problem: InverseProblem) -> Any:
    """The blur as a PyLops operator, by NumPy's FFT."""
    import pylops

    term = FourierTerm(problem)

    def apply(m: np.ndarray, K: np.ndarray) -> np.ndarray:
        return np.fft.irfft2(np.fft.rfft2(m.reshape(term.shape)) * K, s=term.shape).ravel()

    n = int(np.prod(term.shape))
    return pylops.FunctionOperator(lambda m: apply(m, term.K), lambda m: apply(m, term.K.conj()), n, n, dtype="float64")


def forward_poststack(problem: InverseProblem) -> Any:
    """PyLops' post-stack operator with the same wavelet."""
    from pylops.avo.poststack import PoststackLinearModelling

    nz, nx = problem.model_shape[1:]
    return PoststackLinearModelling(problem.terms[0].operator.wavelet.numpy(), nz, spatdims=nx)


def mean_error(draws: Tensor, mean: Tensor, sd: Tensor) -> tuple[float, float, Tensor]:
    """√max(0, mean z² − 1/ESS) over coordinates, its Monte-Carlo error and sd ratios; draws `(chains, draws, dim)`.

    Chains are independent, so that the spread of their means gives 1/ESS.
    """
    each = (draws.mean(1) - mean) / sd
    z, noise = each.mean(0), each.var(0) / len(each)
    error = float((z.square() - noise).mean().clamp_min(0).sqrt())
    return error, float((2 * noise.square().mean() / len(z)).sqrt().sqrt()), draws.flatten(0, 1).std(0) / sd


def samplers(bench: Benchmark) -> None:
    """P-MALA against closed forms, MYULA's bias."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    root = normal(10, 10) / 3
    prior = GaussianPrior(normal(10), root @ root.T + 0.1 * torch.eye(10, dtype=torch.float64))
    A = MatrixOperator(normal(6, 10) / 2)
    gaussian = InverseProblem(A(prior.sample(1, seed=1).double()) + 0.3 * normal(1, 6), A, GaussianNoise(0.3), prior)
    d = 1.5 * normal(1, 10)
    laplace = InverseProblem(d, Identity((10,)), GaussianNoise(0.8), L1((10,), 1.5, centre=0.2))
    t = torch.linspace(-12, 12, 200001, dtype=torch.float64)[:, None]
    density = (-0.5 * ((t - d) / 0.8) ** 2 - 1.5 * (t - 0.2).abs()).softmax(0)
    middle = (density * t).sum(0)
    width = (density * (t - middle) ** 2).sum(0).sqrt()
    system = gaussian.linear_gaussian("x")
    H, C = system.operator.to_dense(), prior.covariance_u.dense()
    posterior = C - C @ H.T @ torch.linalg.solve(H @ C @ H.T + 0.09 * torch.eye(6, dtype=torch.float64), H @ C)
    answers = {
        "Gaussian": (gaussian, ExactGaussian().mean(gaussian)[0], posterior.diagonal().sqrt()),
        "Laplace": (laplace, middle, width),
    }
    chains, draws = 200, 200 if bench.fast else 1000
    worst, error = 0.0, 0.0
    for name, (problem, mean, sd) in answers.items():
        samples = ProximalMALA(draws=draws, warmup=1000, thin=4).solve(problem, chains, dtype=torch.float64).samples[0]
        found, mc, ratio = mean_error(samples, mean, sd)
        print(
            f"ProximalMALA, {name}: mean error {found:.4f} ± {mc:.4f}, sd ratio {ratio.min():.3f} to {ratio.max():.3f}"
        )
        worst, error = max(worst, found), max(error, mc)
    bench.add("pmala_mean_error", worst, "posterior sd", error, "the worse of the two priors")
    for solver in (MYULA(draws=draws, warmup=1000, thin=4), SKROCK(draws=draws, warmup=200, stages=5)):
        samples = solver.solve(laplace, chains, dtype=torch.float64).samples[0]
        found, mc, ratio = mean_error(samples, middle, width)
        note = f"Laplace; sd ratio {float(ratio.min()):.3f} to {float(ratio.max()):.3f}"
        bench.add(f"{type(solver).__name__.lower()}_bias", found, "posterior sd", mc, note)


def choice(bench: Benchmark) -> None:
    """Discrepancy and SURE against the best weight of the grid, TV deblurring of ten random scenes."""
    n = 32 if bench.fast else 64
    generator = torch.Generator().manual_seed(3)
    y, x = torch.meshgrid(*[torch.linspace(0, 1, n, dtype=torch.float64)] * 2, indexing="ij")
    scenes = torch.zeros(10, 1, n, n, dtype=torch.float64)
    for scene in scenes[:, 0]:
        for k in range(6):
            cy, cx, ry, rx, value = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
            u, v = (y - cy) / (0.1 + 0.25 * ry), (x - cx) / (0.1 + 0.25 * rx)
            scene[(u.abs().maximum(v.abs()) < 1) if k % 2 else (u**2 + v**2 < 1)] += value - 0.3
    taps = torch.exp(-0.5 * torch.arange(-4, 5, dtype=torch.float64) ** 2)
    A = Convolution(torch.outer(taps, taps) / taps.sum() ** 2, (1, n, n))
    noise = torch.randn(scenes.shape, generator=generator, dtype=torch.float64)
    problem = InverseProblem(A(scenes) + 0.05 * noise, A, GaussianNoise(0.05), TV((1, n, n)))
    weights = [2.0 ** (k / 2) for k in range(1, 15)]
    solver = PrimalDual(iterations=300, tol=1e-5)
    found = choose_weight(problem, solver, weights, "sure")
    errors = []
    for w in weights:
        at = InverseProblem(terms=problem.terms, prior=problem.prior.reweighted(w))
        m = solver.solve(at, dtype=torch.float64).samples[:, 0, 0]
        errors.append((m - scenes).square().flatten(1).mean(1))
    level = 10 * torch.stack(errors, 1).log10()
    rows, oracle = torch.arange(10), level.amin(1)
    sure = found.score.argmin(1)
    morozov = ((found.chi2 <= 1).sum(1) - 1).clamp_min(0)
    gcv = (found.chi2 / (1 - found.dof / (n * n)).square()).argmin(1)
    corrected = ((found.chi2 + found.dof / (n * n) <= 1).sum(1) - 1).clamp_min(0)
    gaps = {}
    for name, pick in (("discrepancy", morozov), ("residual", corrected), ("SURE", sure), ("GCV", gcv)):
        gap = level[rows, pick] - oracle
        gaps[name] = gap
        print(f"{name}: mean gap to the oracle {gap.mean():.3f} dB, worst {gap.max():.3f} dB")
    worst = max(float(gaps["discrepancy"].max()), float(gaps["SURE"].max()))
    means = f"means {float(gaps['discrepancy'].mean()):.2f} and {float(gaps['SURE'].mean()):.2f}"
    bench.add(
        "choice_gap_db", worst, "dB", note=f"the worst of ten problems and both rules; {means} (discrepancy, SURE)"
    )
    bench.add("sure_gap_db", float(gaps["SURE"].max()), "dB", note="the worst of ten")
    bench.add("residual_gap_db", float(gaps["residual"].max()), "dB", note="discrepancy with n − dof; the worst of ten")


def plug_and_play(bench: Benchmark) -> None:
    """PnP with the shipped geology denoiser against TV on the window of `poststack.py`, each at the best weight of a grid."""
    from poststack import WINDOW, diffusion_prior, ladder, snr

    side, top, left = 64 if bench.fast else 128, WINDOW[0].start, WINDOW[1].start
    section = torch.from_numpy(np.log(2000 * np.load(SECTION)["model"]))
    truth = section[top : top + side, left : left + side].contiguous()

    def best(name: str, prior: Any, grid: Sequence[float], solver: Callable[[float], Any], dtype: torch.dtype) -> float:
        scores = {}
        for w in grid:
            problem = ladder(truth, prior(w))
            found = solver(w).solve(problem, dtype=dtype)
            scores[w] = snr(truth, found.samples[0, 0, 0, 0].double())
        print(f"{name}: " + ", ".join(f"{w:g}: {v:.2f}" for w, v in scores.items()) + " dB", flush=True)
        return max(scores.values())

    # far from converged TV is several dB worse: a baseline has to be run to its end
    classical = PrimalDual(iterations=4000, data="prox", rtol=1e-3, tol=1e-4)
    shape, learned = (1, side, side), diffusion_prior((side, side), top)
    tv = best("TV", lambda w: TV(shape, w), (8.0, 16.0, 32.0), lambda _: classical, torch.float64)
    pnp = best("PnP", lambda _: learned, (0.1, 0.15, 0.2), lambda w: PlugAndPlay(weight=w), torch.float32)
    bench.add("pnp_gain_db", pnp - tv, "dB", note=f"PnP {pnp:.2f}, TV {tv:.2f}; {side} × {side}, weights by oracle")


def main() -> None:
    bench = Benchmark(
        "proximal",
        "Total variation beside PyProximal, proximal samplers, parameter choice.",
        {
            "--inner": {"type": int, "default": 10, "help": "iterations of PyProximal's inner solves"},
            "--only": {"default": None, "help": "one part: deblur, poststack, samplers, choice or pnp"},
        },
    )
    parts = [bench.args.only] if bench.args.only else ["deblur", "poststack", "samplers", "choice", "pnp"]
    if "deblur" in parts:
        problem, start = deblurring(128 if bench.fast else 256)
        race(bench, "deblur", problem, start, forward_deblur(problem), FourierTerm(problem), (1500, 600, 3000))
    if "poststack" in parts and not SECTION.exists():
        sys.exit(f"{SECTION.name} is missing: put the shared data folder beside the project to run this part.")
    if "poststack" in parts:
        problem, start = poststack(*((111, 201) if bench.fast else (221, 601)))
        race(bench, "poststack", problem, start, forward_poststack(problem), TraceTerm(problem), (2500, 1500, 1500))
    if "samplers" in parts:
        samplers(bench)
    if "choice" in parts:
        choice(bench)
    if "pnp" in parts:
        plug_and_play(bench)
    bench.finish()


if __name__ == "__main__":
    main()
