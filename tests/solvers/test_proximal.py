"""Total variation against solutions that are known and against optimality."""

from __future__ import annotations

import pytest
import torch

from invgen.noise import GaussianNoise, LaplaceNoise
from invgen.operators import Identity, MatrixOperator, PostStack, Smooth, ricker
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem, Term
from invgen.solvers import TotalVariation, tune_weight

F64 = torch.float64


def _prior(shape):
    return GaussianPrior(0.0, 1.0, shape=shape)


def test_a_step_is_shrunk_by_the_known_amount():
    """1-D denoising of a clean step: each plateau moves towards the other by weight · sigma² / its length."""
    d = torch.cat([torch.zeros(10, dtype=F64), torch.full((20,), 5.0, dtype=F64)])
    problem = InverseProblem(d, Identity((30,)), GaussianNoise(0.5), _prior((30,)))
    posterior = TotalVariation(weight=8.0, iterations=3000, tol=1e-9).solve(problem, dtype=F64)
    want = torch.cat([torch.full((10,), 8 * 0.25 / 10, dtype=F64), torch.full((20,), 5 - 8 * 0.25 / 20, dtype=F64)])
    torch.testing.assert_close(posterior.samples[0, 0, 0], want, rtol=0, atol=1e-5)
    assert bool(posterior.stats["converged"].all())
    want_objective = 0.5 * ((want - d) / 0.5).square().sum() + 8.0 * (want[-1] - want[0])
    torch.testing.assert_close(posterior.stats["objective"].squeeze(), want_objective, rtol=1e-6, atol=0)


@pytest.mark.parametrize("isotropic", [True, False])
def test_the_objective_is_a_minimum(isotropic):
    """No perturbation of a converged solution lowers the (convex) objective."""
    g = torch.Generator().manual_seed(3)
    shape = (1, 6, 5)
    A = torch.randn(40, 30, generator=g, dtype=F64) / 5
    d = torch.randn(40, generator=g, dtype=F64)
    problem = InverseProblem(d, MatrixOperator(A, shape), GaussianNoise(0.4), _prior(shape))
    weight = 3.0
    solver = TotalVariation(weight=weight, isotropic=isotropic, iterations=4000, tol=1e-10, rtol=1e-10)
    posterior = solver.solve(problem, dtype=F64)

    def objective(m):
        field = m.reshape(-1, 6, 5)
        a, b = torch.zeros_like(field), torch.zeros_like(field)
        a[:, :-1], b[:, :, :-1] = field.diff(dim=1), field.diff(dim=2)
        tv = (a.square() + b.square()).sqrt() if isotropic else a.abs() + b.abs()
        return 0.5 * ((m.flatten(1) @ A.T - d) / 0.4).square().sum(1) + weight * tv.flatten(1).sum(1)

    m = posterior.samples[0, 0]
    base = objective(m)
    torch.testing.assert_close(posterior.stats["objective"][0, 0], base, rtol=1e-10, atol=1e-10)
    for size in (1e-1, 1e-2, 1e-3):
        moved = m + size * torch.randn(200, *shape, generator=g, dtype=F64)
        assert float((objective(moved) - base).min()) > -1e-7
    zero = torch.zeros_like(m)
    for t in (1e-3, 1e-2, 1e-1):  # and along the line to the data-free solution
        assert float((objective(torch.lerp(m, zero, t)) - base).min()) > -1e-7


def test_complex_noise_counts_half_a_part():
    """Complex data of variance s² are two real data of variance s²/2."""
    g = torch.Generator().manual_seed(4)
    A = torch.complex(torch.randn(12, 9, generator=g, dtype=F64), torch.randn(12, 9, generator=g, dtype=F64)) / 3
    d = torch.complex(torch.randn(12, generator=g, dtype=F64), torch.randn(12, generator=g, dtype=F64))
    one = InverseProblem(d, MatrixOperator(A, real_model=True), GaussianNoise(1.0), _prior((9,)))
    two = InverseProblem(
        torch.cat([d.real, d.imag]), MatrixOperator(torch.cat([A.real, A.imag])), GaussianNoise(0.5**0.5), _prior((9,))
    )
    solver = TotalVariation(weight=0.7, iterations=2000, tol=1e-10, rtol=1e-11)
    a, b = (solver.solve(p, dtype=F64) for p in (one, two))
    torch.testing.assert_close(a.samples, b.samples, rtol=0, atol=1e-6)
    torch.testing.assert_close(a.stats["objective"], b.stats["objective"], rtol=1e-7, atol=0)


def _section(n=24):
    g = torch.Generator().manual_seed(0)
    m = torch.full((1, n, n), 8.0, dtype=F64)
    m[:, n // 4 :] += 0.3
    m[:, n // 2 :, n // 3 :] -= 0.4
    wavelet = ricker(torch.arange(-8, 9, dtype=F64) * 0.004, 30.0)
    operators = (PostStack(wavelet, (1, n, n)), Smooth((1, n, n), (7, 7)))
    sds = (0.01, 0.05)
    terms = [
        Term(op(m[None])[0] + sd * torch.randn(op.data_shape, generator=g, dtype=F64), op, GaussianNoise(sd))
        for op, sd in zip(operators, sds, strict=True)
    ]
    return InverseProblem(terms=terms, prior=_prior((1, n, n))), m


def test_post_stack_with_background_and_the_choice_of_weight():
    problem, m = _section()
    best, scores = tune_weight([(problem, m)], [0.01, 3.0, 1000.0], iterations=200)
    assert best == 3.0
    assert scores[3.0] > scores[0.01] + 3
    with pytest.raises(ValueError, match="tune_weight"):
        tune_weight([], [1.0])


def test_what_it_cannot_treat():
    problem = InverseProblem(torch.zeros(4), Identity((4,)), LaplaceNoise(0.1), _prior((4,)))
    with pytest.raises(TypeError, match="Gaussian noise"):
        TotalVariation().solve(problem)
    for bad in ({"weight": 0.0}, {"weight": -1.0}, {"iterations": 0}, {"tol": -1.0}):
        with pytest.raises(ValueError, match="TotalVariation"):
            TotalVariation(**bad)
