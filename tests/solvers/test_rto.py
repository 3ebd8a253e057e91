"""Randomise-then-optimise on a deconvolution of 128 unknowns: as wide as the posterior at default settings."""

from __future__ import annotations

import math

import pytest
import torch

from invgen.noise import GaussianNoise
from invgen.operators import Convolution, MatrixOperator
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem
from invgen.solvers import ExactGaussian, RandomizeThenOptimize

F64 = torch.float64
N = 3000
# 128 means, 128 variances and 127 covariances a case, three cases: |z| > 5.2 by chance in 2e-4 of runs
LIMIT = 5.2


def _deconvolution(kind):
    """Exponential covariance, mean 3, a Gaussian blur, one per cent noise: condition 1e4."""
    n = 128
    t = torch.arange(n, dtype=F64)
    C = torch.exp(-(t[:, None] - t).abs() / 10)
    kernel = torch.exp(-0.5 * ((torch.arange(21, dtype=F64) - 10) / 3) ** 2)
    blur = Convolution(kernel / kernel.sum(), (1, n), "zero")
    operator = blur if kind == "operator" else MatrixOperator(blur.to_dense(), (1, n), (1, n))
    prior = GaussianPrior(torch.full((1, n), 3.0, dtype=F64), C)
    noise = torch.randn(1, 1, n, generator=torch.Generator().manual_seed(0), dtype=F64)
    return InverseProblem(
        operator(prior.sample(1, seed=1).double()) + 0.01 * noise, operator, GaussianNoise(0.01), prior
    )


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("kind", ["matrix", "operator"])
def test_draws_are_as_wide_as_the_posterior_at_default_settings(kind, dtype):
    """Solvers that stop early draw too narrow a posterior, silently: 11 % in the median after ten iterations."""
    problem = _deconvolution(kind)
    mean, covariance = ExactGaussian().moments(problem)
    posterior = RandomizeThenOptimize().solve(problem, N, dtype=dtype)
    assert bool(posterior.stats["converged"].all())
    x, sd = posterior.samples[0, 0].flatten(1).double(), covariance.diagonal().sqrt()
    rounding = 0.02 if dtype == torch.float32 else 0.0  # of an sd, where the posterior sd is 1 % of the values
    assert float(((x.mean(0) - mean.flatten()) / sd).abs().max()) < LIMIT / math.sqrt(N) + rounding
    off = (x - mean.flatten()) / sd
    assert float((off.square().mean(0) - 1).abs().max()) < LIMIT * math.sqrt(2 / N) + rounding
    exact = (covariance / sd / sd[:, None]).diagonal(1)
    near = (off[:, 1:] * off[:, :-1]).mean(0)
    assert float(((near - exact) / ((1 + exact.square()) / N).sqrt()).abs().max()) < LIMIT + rounding * math.sqrt(N)


def test_a_solve_that_stops_early_says_so_and_is_the_narrow_one():
    problem = _deconvolution("operator")
    _, covariance = ExactGaussian().moments(problem)
    with pytest.warns(UserWarning, match="are not draws of the posterior"):
        posterior = RandomizeThenOptimize(method="cg", max_iter=10).solve(problem, 500, dtype=F64)
    assert not bool(posterior.stats["converged"].any())
    ratio = posterior.samples[0, 0].flatten(1).std(0) / covariance.diagonal().sqrt()
    assert float(ratio.median()) > 1.05 or float(ratio.median()) < 0.95


def test_one_factorisation_serves_every_draw_and_agrees_with_converged_iterations():
    problem = _deconvolution("operator")
    direct = RandomizeThenOptimize().solve(problem, 40, dtype=F64, chunk=10)
    assert direct.counts["forward"] < 40 * 3 + 140  # the matrix once, then a product or two a draw
    iterated = RandomizeThenOptimize(method="cg", rtol=1e-12).solve(problem, 40, dtype=F64)
    torch.testing.assert_close(direct.samples, iterated.samples, rtol=0, atol=1e-6)
    assert iterated.counts["forward"] > 2000
    large = RandomizeThenOptimize(limit=64).solve(problem, 2, dtype=F64)
    assert large.counts["forward"] > 200


def test_bad_method():
    with pytest.raises(ValueError, match="'auto' or 'cg'"):
        RandomizeThenOptimize(method="dense")
