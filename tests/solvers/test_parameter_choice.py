"""Rules for the weight against closed forms of ridge regression, and against the oracle."""

from __future__ import annotations

import pytest
import torch

from invgen.noise import GaussianNoise
from invgen.operators import Identity, MatrixOperator
from invgen.priors import L1, L2, TV, GaussianPrior
from invgen.problem import InverseProblem, Term
from invgen.solvers import PrimalDual, ProximalGradient, choose_weight

F64 = torch.float64
SOLVER = ProximalGradient(iterations=2000, tol=1e-10)
WEIGHTS = [2.0**k for k in range(-4, 6)]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def ridge(n_obs=3, rows=40, columns=12, sigma=0.5):
    A = noise(rows, columns, seed=1) / 3
    x = noise(n_obs, columns, seed=2) / 2
    d = x @ A.T + sigma * noise(n_obs, rows, seed=3)
    return InverseProblem(d, MatrixOperator(A), GaussianNoise(sigma), L2((columns,))), A / sigma, d / sigma, x


def test_the_pieces_of_ridge_regression():
    """x̂ = (AᵀA + w)⁻¹ Aᵀ d: residuals in closed form, dof = tr A (AᵀA + w)⁻¹ Aᵀ with the probe's own error."""
    problem, A, d, _ = ridge()
    found = choose_weight(problem, SOLVER, WEIGHTS, "sure")
    n = len(A)
    for k, w in enumerate(found.weights):
        H = A @ torch.linalg.solve(A.T @ A + w * torch.eye(A.shape[1], dtype=F64), A.T)
        torch.testing.assert_close(found.chi2[:, k], (d - d @ H).square().sum(1) / n, rtol=1e-6, atol=0)
        error = (2 * H.square().sum()).sqrt()  # standard deviation of bᵀ H b
        assert float(((found.dof[:, k] - H.trace()) / error).abs().max()) < 5
    torch.testing.assert_close(found.score, found.chi2 - 1 + 2 * found.dof / n)
    best = found.score.argmin(1)
    assert torch.equal(found.weight, found.weights[best])
    gcv = choose_weight(problem, SOLVER, WEIGHTS, "gcv")
    torch.testing.assert_close(gcv.score, gcv.chi2 / (1 - gcv.dof / n).square())
    w = found.weight
    for i in range(3):
        want = torch.linalg.solve(A.T @ A + w[i] * torch.eye(A.shape[1], dtype=F64), A.T @ d[i])
        torch.testing.assert_close(found.x[i], want, rtol=0, atol=1e-6)


def test_discrepancy_takes_the_largest_weight_that_explains_the_data():
    problem, *_ = ridge(n_obs=4)
    found = choose_weight(problem, SOLVER, WEIGHTS, "discrepancy")
    assert bool((found.chi2.diff(dim=1) > 0).all())
    for i in range(4):
        k = int((found.weights == found.weight[i]).nonzero())
        assert float(found.chi2[i, k]) <= 1 or k == 0
        assert k == len(WEIGHTS) - 1 or float(found.chi2[i, k + 1]) > 1
    assert bool(torch.isnan(found.dof).all())


def test_the_corner_of_a_curve_with_a_corner():
    """Ill-posed ridge: below the corner R explodes, above it the misfit does."""
    g = torch.linspace(0, 5, 30, dtype=F64)
    A = torch.diag(10 ** (-g))
    x = torch.ones(1, 30, dtype=F64)
    sigma = 1e-3
    problem = InverseProblem(x @ A.T + sigma * noise(1, 30, seed=5), MatrixOperator(A), GaussianNoise(sigma), L2((30,)))
    weights = [10.0**k for k in range(-6, 7)]
    found = choose_weight(problem, PrimalDual(iterations=4000, tol=1e-8), weights, "l_curve")
    assert 1e-3 <= float(found.weight) <= 1e4
    assert not bool(found.at_edge)


def test_denoising_comes_near_the_oracle():
    """Total variation on steps: SURE and the discrepancy principle end within a step of the best weight, a factor of two."""
    m = torch.zeros(3, 1, 16, 16, dtype=F64)
    m[0, :, 4:12, 3:9], m[1, :, :, 8:], m[2, :, 6:, :10] = 2.0, 1.0, 3.0
    noisy = m + 0.3 * noise(3, 1, 16, 16, seed=7)
    problem = InverseProblem(noisy, Identity((1, 16, 16)), GaussianNoise(0.3), TV((1, 16, 16)))
    weights = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    solver = PrimalDual(iterations=100, tol=1e-4)
    errors = []
    for w in weights:
        p = InverseProblem(terms=problem.terms, prior=problem.prior.reweighted(w))
        errors.append((solver.solve(p, dtype=F64).samples[:, 0, 0] - m).square().flatten(1).mean(1))
    best = torch.tensor(weights)[torch.stack(errors).argmin(0)]
    for rule in ("sure", "discrepancy"):
        found = choose_weight(problem, solver, weights, rule)
        assert float((found.weight / best).log2().abs().max()) <= 1, rule


def test_masks_and_several_terms():
    mask = torch.ones(12, dtype=torch.bool)
    mask[::4] = False
    d = noise(12, seed=8)
    terms = [Term(d, Identity((12,)), GaussianNoise(0.5), mask), Term(d + 0.1, Identity((12,)), GaussianNoise(1.0))]
    found = choose_weight(InverseProblem(terms=terms, prior=L1((12,))), SOLVER, [0.5, 1.0], "sure")
    assert found.chi2.shape == (1, 2)
    assert bool(torch.isfinite(found.score).all())


def test_refusals():
    problem, *_ = ridge()
    with pytest.raises(ValueError, match="rule"):
        choose_weight(problem, SOLVER, WEIGHTS, "guess")
    for bad in ([1.0], [0.0, 1.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="weights"):
            choose_weight(problem, SOLVER, bad)
    other = InverseProblem(terms=problem.terms, prior=GaussianPrior(0.0, 1.0, shape=(12,)))
    with pytest.raises(TypeError, match="weight"):
        choose_weight(other, SOLVER, WEIGHTS)
