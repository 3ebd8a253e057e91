"""Mistakes that were found in released samplers elsewhere, each as a test that the wrong formula fails.

A pCN walk that forgets the prior mean, "conditional simulation" that rescales unconditional fields, and an integrated
autocorrelation time that counts lag zero twice. (A randomise-then-optimise that stops after ten iterations is refused by
`stats["converged"]`, tests/solvers/test_exact.py.)
"""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from invgen.diagnostics import ess
from invgen.noise import GaussianNoise
from invgen.operators import MatrixOperator
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem
from invgen.solvers import PCN, ExactGaussian, RandomizeThenOptimize

F64 = torch.float64


@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_pcn_knows_the_prior_mean(mean):
    """Four unknowns, prior mean 3: the walk √(1 − β²) x + β ξ with ξ of the prior, mean included, is off by 1–7 sd."""
    n, chains = 4, 48
    covariance = 0.5 ** (torch.arange(n)[:, None] - torch.arange(n)).abs().double()
    A = torch.randn(3, n, generator=torch.Generator().manual_seed(3), dtype=F64)
    prior = GaussianPrior.dense(torch.full((n,), mean, dtype=F64), covariance)
    d = A @ (mean + torch.linalg.cholesky(covariance) @ torch.tensor([0.3, -0.8, 1.1, 0.2], dtype=F64))
    S = A @ covariance @ A.T + 0.25 * torch.eye(3, dtype=F64)
    gain = torch.linalg.solve(S, A @ covariance).T
    exact, left = mean + gain @ (d - A @ torch.full((n,), mean, dtype=F64)), covariance - gain @ A @ covariance
    problem = InverseProblem(d, MatrixOperator(A), GaussianNoise(0.5), prior)
    x = PCN(draws=60, warmup=200, thin=10).solve(problem, chains, seed=1, dtype=F64).samples[0]
    z = ((x - exact) / left.diagonal().sqrt()).mean(1)
    t = z.mean(0) / (z.std(0) / math.sqrt(chains))
    assert float(t.abs().max()) < stats.t.isf(1e-3 / 16, chains - 1)
    assert float(z.mean(0).abs().max()) < 0.5  # the test would see the bias


def covariance_error(draws: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor) -> float:
    """Largest deviation of the covariance of whitened draws from I, in standard errors over the family-wise limit."""
    n, dim = draws.shape
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), (draws - mean).T, upper=False).T
    deviation = (white.T @ white / n - torch.eye(dim, dtype=F64)).abs() * math.sqrt(n)
    deviation.diagonal().div_(math.sqrt(2))
    return float(deviation.max()) / stats.norm.isf(1e-3 / 4 / (dim * (dim + 1)))


@pytest.mark.parametrize("solver", [ExactGaussian(), RandomizeThenOptimize()], ids=["exact", "rto"])
def test_conditional_simulation_has_the_covariance_between_the_data_points(solver):
    """A line of 24 cells, five measured: kriging mean + √(σ²_K/σ²) · unconditional field has the right variances alone."""
    n, noise = 24, 0.2
    i = torch.arange(n, dtype=F64)
    covariance, mean = torch.exp(-(i[:, None] - i).abs() / 8), 2 + 0.1 * i
    A = torch.eye(n, dtype=F64)[[2, 7, 11, 16, 21]]
    d = A @ mean + torch.tensor([0.5, -1.0, 0.3, 1.2, -0.4], dtype=F64)
    gain = torch.linalg.solve(A @ covariance @ A.T + noise**2 * torch.eye(5, dtype=F64), A @ covariance).T
    krige, left = mean + gain @ (d - A @ mean), covariance - gain @ A @ covariance
    problem = InverseProblem(d, MatrixOperator(A), GaussianNoise(noise), GaussianPrior.dense(mean, covariance))
    draws = solver.solve(problem, 4000, seed=1, dtype=F64).samples.reshape(4000, n)
    assert covariance_error(draws, krige, left) < 1
    white = torch.randn(4000, n, generator=torch.Generator().manual_seed(2), dtype=F64)
    rescaled = krige + left.diagonal().sqrt() * (white @ torch.linalg.cholesky(covariance).T)
    assert covariance_error(rescaled, krige, left) > 3


@pytest.mark.parametrize(("rho", "tau"), [(0.0, 1.0), (0.9, 19.0)])
def test_the_autocorrelation_time_of_known_chains(rho, tau):
    """Independent draws have τ = 1, AR(1) with ρ has (1 + ρ)/(1 − ρ); 40 chains at once give the spread of an estimate."""
    chains, draws, copies = 4, 5000, 40
    x = torch.randn(chains, draws, copies, generator=torch.Generator().manual_seed(4), dtype=F64)
    for k in range(1, draws if rho else 1):
        x[:, k] = rho * x[:, k - 1] + math.sqrt(1 - rho**2) * x[:, k]
    for kind in ("mean", "bulk"):
        found = chains * draws / torch.from_numpy(ess(x, kind=kind))
        error = float(found.std()) / math.sqrt(copies)
        # Geyer's sum is cut at the first negative pair: a bias of a few per cent, far from counting a lag twice
        assert abs(float(found.mean()) - tau) < 3.5 * error + 0.05 * tau
