"""Are guided samples right? A 16-d Gaussian problem with a known posterior, and the operations of a DPS step.

Prior: correlated, non-zero mean, unequal variances, with its exact denoiser. Data: 8 random measurements with noise
0.05, 0.3 and 1.0. Every rule draws 4000 samples in float64; errors are in units of the posterior's own sd:

    mean error = √max(0, mean_j z_j² − 1/n),  z_j = (sample mean − mean)_j / sd_j;   sd ratio = mean_j sample sd_j / sd_j.

Everything that decides the result (prior, operator, truth, noise, seeds) stands in this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from harness import Benchmark
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from invgen.noise import GaussianNoise
from invgen.operators import MatrixOperator
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem
from invgen.solvers import DPS, MMPS, ExactGaussian, GuidedDiffusion, PiGDM, PnPDM
from invgen.transforms import Identity

NOISES = (0.05, 0.3, 1.0)
DIM, DATA, SEED = 16, 8, 3


def problem(noise: float) -> tuple[InverseProblem, Tensor, Tensor]:
    """The problem, its exact posterior mean `(16,)` and covariance `(16, 16)`."""
    generator = torch.Generator().manual_seed(SEED)
    i = torch.arange(DIM, dtype=torch.float64)
    scale = (0.5 + i / 10).sqrt()
    covariance = torch.exp(-(i[:, None] - i).abs() / 4) * scale[:, None] * scale
    mean = 1 + 1.5 * torch.sin(i / 2)
    A = torch.randn(DATA, DIM, generator=generator, dtype=torch.float64)
    truth = mean + torch.linalg.cholesky(covariance) @ torch.randn(DIM, generator=generator, dtype=torch.float64)
    d = A @ truth + noise * torch.randn(DATA, generator=generator, dtype=torch.float64)
    posterior = torch.linalg.inv(torch.linalg.inv(covariance) + A.T @ A / noise**2)
    centre = posterior @ (A.T @ d / noise**2 + torch.linalg.solve(covariance, mean))
    prior = GaussianPrior.dense(mean, covariance)
    return InverseProblem(d, MatrixOperator(A), GaussianNoise(noise), prior), centre, posterior


def errors(samples: Tensor, mean: Tensor, covariance: Tensor) -> tuple[float, float]:
    """Mean error in posterior sd, the Monte-Carlo part removed, and sd ratio."""
    sd = covariance.diagonal().sqrt()
    z = (samples.mean(0) - mean) / sd
    return math.sqrt(max(0.0, float(z.square().mean()) - 1 / len(samples))), float((samples.std(0) / sd).mean())


def with_bootstrap(samples: Tensor, mean: Tensor, covariance: Tensor) -> tuple[float, float, float, float]:
    """(mean error, its Monte-Carlo sd, sd ratio, its Monte-Carlo sd), the sds from 200 bootstrap resamples."""
    generator = torch.Generator().manual_seed(0)
    value, ratio = errors(samples, mean, covariance)
    draws = [
        errors(samples[torch.randint(len(samples), (len(samples),), generator=generator)], mean, covariance)
        for _ in range(200)
    ]
    spread = torch.tensor(draws, dtype=torch.float64).std(0)
    return value, float(spread[0]), ratio, float(spread[1])


class Count(TorchDispatchMode):
    """Counts tensor operations that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        self.operations += 1
        return function(*arguments, **(keywords or {}))


class TrivialPrior:
    """A denoiser of one multiplication: what is left of a step is the sampler's own work."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.grid, self.transform, self.calls = shape, None, Identity(), 0
        self.sigma_data, self.start_sigma = 1.0, 50.0

    def sample(self, n: int, *, seed: int = 0) -> Tensor:
        return torch.zeros(n, *self.shape)

    def denoise(self, u: Tensor, sigma: float) -> Tensor:
        self.calls += 1
        return u * 0.5


def dps_operations(steps: int = 40) -> float:
    """Tensor operations a DPS step with ancestral sampling, driver and random numbers included, network excluded."""
    prior = TrivialPrior((16,))
    A = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    case = InverseProblem(torch.zeros(8), MatrixOperator(A), GaussianNoise(0.1), prior)

    def run(n: int) -> tuple[int, int]:
        prior.calls = 0
        with Count() as count:
            GuidedDiffusion(DPS(), "ancestral", steps=n).solve(case, 4, seed=0)
        return count.operations, prior.calls

    run(4)
    (many, many_calls), (few, few_calls) = run(2 * steps), run(steps)
    # the network: one multiplication forward and one backward a call
    return (many - few - 2 * (many_calls - few_calls)) / steps


def main() -> None:
    bench = Benchmark(
        "guidance", "Calibration of guided and split diffusion on a Gaussian problem with a known posterior."
    )
    samples = 1000 if bench.fast else 4000
    rules: dict[str, Callable[[], Any]] = {
        "exact": ExactGaussian,
        "mmps": lambda: GuidedDiffusion(MMPS(), "heun", steps=80, sigma_min=0.002),
        "split": lambda: PnPDM(iterations=1000, inner=6, rho_min=0.004),
        "pigdm": lambda: GuidedDiffusion(PiGDM(), "sde", steps=500, sigma_min=0.002),
        "pigdm_langevin": lambda: GuidedDiffusion(PiGDM(), "sde", steps=200, sigma_min=0.002, corrections=5),
        "dps": lambda: GuidedDiffusion(DPS(0.1), "ancestral", steps=1000, sigma_min=0.002),
    }
    worst: dict[str, list[tuple[float, float, float, float]]] = {}
    for noise in NOISES:
        case, mean, covariance = problem(noise)
        for name, make in rules.items():
            posterior = make().solve(case, samples, seed=1, dtype=torch.float64)
            row = with_bootstrap(posterior.samples[0, 0], mean, covariance)
            worst.setdefault(name, []).append(row)
            print(
                f"noise {noise:<5g} {name:15s} mean error {row[0]:.4f} ± {row[1]:.4f}   sd ratio {row[2]:.4f} ± {row[3]:.4f}   {posterior.seconds:.1f} s",
                flush=True,
            )
    for name, rows in worst.items():
        value, spread = max((r[0], r[1]) for r in rows)
        bench.add(f"{name}_mean_error", value, "posterior sd", spread, "largest of the three noise levels")
        ratio, spread = max(((r[2], r[3]) for r in rows), key=lambda r: abs(r[0] - 1))
        bench.add(f"{name}_sd_ratio", ratio, "", spread, "furthest from 1 of the three noise levels")
    bench.add("dps_ops_per_step", dps_operations(), "operations")
    bench.finish()


if __name__ == "__main__":
    main()
