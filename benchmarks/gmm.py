"""Mode weights: the Gaussian-mixture family of Cardoso et al. 2023 (arXiv:2308.07983, section 5) by one particle sampler.

Prior: 25 components with means (8i, 8j, 8i, 8j, …), i, j ∈ {−2 … 2}, unit covariances, weights ∝ squared normals. Data:
d = A x + noise, A with random orthogonal factors and singular values U(0, 1) sorted, noise sd U(0, 1) times the largest
singular value; d_x ∈ {8, 80, 800}, d_y ∈ {1, 2, 4}; 15 seeds (`exam_problems.mixture25`).

One solver with the same settings for all columns and seeds, which sees the prior through its denoiser alone. A figure is

    mean over seeds of   mean over 3 runs of mSW(1000 samples, 10,000 exact draws)
                       / mean over 20 sets of mSW(1000 exact draws, the same 10,000)

with mSW the max-sliced 2-Wasserstein distance over 100 random projections: POT's `max_sliced_wasserstein_distance`
where it is installed, else the same number by `invgen.diagnostics`. 1 is a sampler as good as independent exact draws.

    python benchmarks/gmm.py [--fast] [--dims 8,80,800] [--data 1,2,4] [--seeds 15]

--fast has d_x = 8 and 3 seeds.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
import time

import torch
from exam_problems import DenoiserOnly, Paper, mixture25
from harness import Benchmark
from torch import Tensor

from invgen.diagnostics import max_sliced_wasserstein
from invgen.driver import DivergenceError
from invgen.problem import InverseProblem
from invgen.solvers import TDS, ExactMixture

SOLVER = TDS("mmps", particles=8192, steps=100)
SAMPLES, REFERENCE, RUNS, FLOORS, PROJECTIONS = 1000, 10_000, 3, 20, 100


class UnitMixture(DenoiserOnly):
    """The same denoiser for unit covariances in two matrix products: responsibilities need u · m_k alone.

    D = (u + σ² Σ_k r_k m_k)/(1 + σ²),   r_k ∝ w_k exp((u · m_k − |m_k|²/2)/(1 + σ²))
    """

    def __init__(self, paper: Paper) -> None:
        prior = paper.problem.prior
        super().__init__(prior)
        means = prior.means.flatten(1)
        self._parts = {t: (means.to(t), (means.square().sum(1) / 2).to(t), prior.log_weights.to(t)) for t in _DTYPES}
        u = prior.sample(64, seed=0, dtype=torch.float64)
        for sigma in (0.01, 3.0, 40.0):
            noisy = u + sigma * torch.randn(u.shape, generator=torch.Generator().manual_seed(1), dtype=u.dtype)
            torch.testing.assert_close(self.denoise(noisy, sigma), prior.denoise(noisy, sigma))
        self.evaluations = 0

    def denoise(self, u: Tensor, sigma: Tensor | float) -> Tensor:
        self.evaluations += u.shape[0]
        means, squares, log_weights = self._parts[u.dtype]
        noise = torch.as_tensor(sigma, dtype=u.dtype).reshape(-1, 1) ** 2
        share = ((u @ means.mT - squares) / (1 + noise) + log_weights).softmax(1)
        return (u + noise * (share @ means)) / (1 + noise)


_DTYPES = (torch.float32, torch.float64)
_POT = importlib.util.find_spec("ot") is not None


def distance(samples: Tensor, reference: Tensor, seed: int) -> float:
    """Max-sliced 2-Wasserstein distance over random projections."""
    if _POT:
        import ot

        return float(
            ot.max_sliced_wasserstein_distance(
                samples.numpy(), reference.numpy(), n_projections=PROJECTIONS, p=2, seed=seed
            )
        )
    return float(max_sliced_wasserstein(samples, reference, projections=PROJECTIONS, seed=seed))


def exact(paper: Paper, n: int, seed: int) -> Tensor:
    return ExactMixture().solve(paper.problem, n, seed=seed, dtype=torch.float64).samples[0, 0]


def column(d_x: int, d_y: int, seeds: int) -> dict[str, list[float]]:
    """Ratio and costs of every seed."""
    out: dict[str, list[float]] = {k: [] for k in ("ratio", "wall", "cpu", "evidence", "ess_min")}
    for seed in range(seeds):
        paper = mixture25(d_x, d_y, seed, SAMPLES)
        term = paper.problem.terms[0]
        case = InverseProblem(term.data, term.operator, term.noise, UnitMixture(paper))
        draws = exact(paper, REFERENCE + FLOORS * SAMPLES, 1)
        reference, rest = draws[:REFERENCE], draws[REFERENCE:].reshape(FLOORS, SAMPLES, d_x)
        floor = statistics.fmean(distance(x, reference, k) for k, x in enumerate(rest))
        found = []
        for run in range(RUNS):
            wall, cpu = time.perf_counter(), time.process_time()
            try:
                posterior = SOLVER.solve(case, SAMPLES, seed=100 + run)
            except DivergenceError:
                found.append(math.inf)
                continue
            out["wall"].append(time.perf_counter() - wall)
            out["cpu"].append(time.process_time() - cpu)
            found.append(distance(posterior.samples[0, 0].double(), reference, FLOORS + run))
            truth = float(ExactMixture().log_evidence(paper.problem)[0])
            out["evidence"].append(float(posterior.log_evidence[0]) - truth)
            out["ess_min"].append(float(posterior.stats["ess_min"].min()))
        out["ratio"].append(statistics.fmean(found) / floor)
        print(
            f"d_x {d_x:<3d} d_y {d_y} seed {seed:2d}: ratio {out['ratio'][-1]:.2f}   floor {floor:.3f}   error of log-evidence {out['evidence'][-1]:+.3f}   smallest effective size {min(out['ess_min'][-RUNS:]):.0f}   cpu {out['cpu'][-1]:.1f} s",
            flush=True,
        )
    return out


def main() -> None:
    bench = Benchmark(
        "gmm",
        "A denoiser-only particle sampler on the Gaussian-mixture family of the MCGDiff paper.",
        {
            "--dims": {"default": "8,80,800", "help": "values of d_x"},
            "--data": {"default": "1,2,4", "help": "values of d_y"},
            "--seeds": {"type": int, "default": 15, "help": "problems of a column"},
        },
    )
    dims = [8] if bench.fast else [int(d) for d in bench.args.dims.split(",")]
    seeds = 3 if bench.fast else bench.args.seeds
    print(f"{SOLVER}\nWasserstein distances by {'POT' if _POT else 'invgen.diagnostics'}", flush=True)
    slowest = (0.0, 0.0)
    for d_x in dims:
        for d_y in (int(d) for d in bench.args.data.split(",")):
            out = column(d_x, d_y, seeds)
            mean = statistics.fmean(out["ratio"])
            error = statistics.stdev(out["ratio"]) / math.sqrt(seeds)
            wall, cpu = statistics.median(out["wall"]), statistics.median(out["cpu"])
            bench.add(
                f"gmm{d_x}_ratio_dy{d_y}",
                mean,
                "",
                error,
                f"largest {max(out['ratio']):.2f}; {wall:.1f} s a run, {cpu:.1f} s of CPU",
            )
            if d_x == 8:
                slowest = max(slowest, (wall, cpu))
    if 8 in dims:
        bench.add("gmm8_seconds", slowest[0], "s", None, f"for 1000 samples; {slowest[1]:.1f} s of CPU time")
    bench.finish()


if __name__ == "__main__":
    main()
