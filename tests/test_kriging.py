"""A field given data: moments and draws against the dense closed form, data that cannot be."""

import math

import numpy as np
import pytest
import torch

from invgen.covariance import Diagonal
from invgen.grid import Grid
from invgen.kriging import krige, leave_one_out, observe
from invgen.operators.points import PointSampling
from invgen.priors.covariance_models import Exponential, Matern, Nugget
from invgen.priors.random_field import RandomField
from invgen.solvers import RandomizeThenOptimize
from invgen.vecchia import Vecchia, predecessors

torch.set_num_threads(1)
F64 = torch.float64
GRID = Grid((16, 15), (1.0, 2.0), (100.0, 0.0))
MODEL = Matern(nu=1.0, length=(3.0, 5.0), variance=2.0, angle=20.0)


def closed_form(field, A, d, R):
    C = field.covariance_u.dense()
    G = A.to_dense()
    S = G @ C @ G.mT + R
    K = torch.linalg.solve(S, G @ C).mT
    mu = field.mean_u.flatten()
    return mu + (d - G @ mu) @ K.mT, C - K @ G @ C


def case(method="circulant", n=40):
    rng = np.random.default_rng(1)
    model = Matern(nu=1.0, length=(3.0, 5.0), variance=2.0) if method == "dct" else MODEL
    field = RandomField(model, GRID, method=method, mean=5.0)
    points = np.column_stack([rng.uniform(100, 115, n), rng.uniform(0, 28, n)])
    points[1] = points[0] + [0.4, 0.3]  # neighbours
    values = 5 + rng.standard_normal(n)
    sd = 0.1 + 0.3 * rng.random(n)
    return field, points, torch.from_numpy(values), torch.from_numpy(sd)


@pytest.mark.parametrize("method", ["circulant", "dct", "cholesky"])
def test_moments_are_the_closed_form(method):
    field, points, values, sd = case(method)
    problem = observe(field, points, values, sd=sd)
    mean, variance = krige(problem)
    expected, covariance = closed_form(field, problem.terms[0].operator, values, torch.diag(sd**2))
    torch.testing.assert_close(mean[0].flatten(), expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(variance.flatten(), covariance.diagonal(), rtol=1e-6, atol=1e-8)


def test_conditional_draws_have_the_mean_and_the_covariance():
    """4000 draws; all pairs of 240 nodes, |z| < 6 (29,000 correlated figures: false alarm under 1e-4)."""
    field, points, values, sd = case()
    problem = observe(field, points, values, sd=sd)
    x = RandomizeThenOptimize(rtol=1e-10).solve(problem, 4000, seed=2).samples.reshape(4000, -1).double()
    mean, covariance = closed_form(field, problem.terms[0].operator, values, torch.diag(sd**2))
    centred = x - mean
    v = covariance.diagonal()
    assert float((centred.mean(0).abs() / (v / len(x)).sqrt()).max()) < 5
    error = ((v[:, None] * v[None] + covariance**2) / len(x)).sqrt()
    assert float(((centred.mT @ centred / len(x) - covariance).abs() / error).max()) < 6


def test_blocks_and_points_see_the_field():
    x = torch.randn(2, 1, 16, 15, dtype=F64)
    at = PointSampling.at(GRID, np.array([[103.0, 8.0], [103.5, 8.0], [115.0, 28.0]]))
    expected = torch.stack([x[:, 0, 3, 4], 0.5 * (x[:, 0, 3, 4] + x[:, 0, 4, 4]), x[:, 0, 15, 14]], 1)
    torch.testing.assert_close(at(x), expected)
    block = PointSampling.blocks(GRID, np.array([[101.0, 2.0]]), np.array([[103.0, 6.0]]))
    torch.testing.assert_close(block(x)[:, 0], x[:, 0, 1:4, 1:4].mean((1, 2)))
    field = RandomField(MODEL, GRID)
    mean, variance = krige(observe(field, block, torch.tensor([2.0], dtype=F64), sd=1e-3))
    torch.testing.assert_close(block(mean), torch.tensor([[2.0]], dtype=F64), rtol=1e-4, atol=1e-4)
    assert float(variance.min()) >= 0


def test_preconditioned_solve_is_the_solve_and_takes_few_iterations():
    """(R + A C Aᵀ) v = b for points between nodes and for blocks of unequal weight, against the matrix."""
    grid = Grid((64, 64), (1.0, 1.0))
    C = RandomField(Matern(nu=1.0, length=12.0), grid, method="circulant").covariance_u
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 60, (300, 2))
    operators = [
        PointSampling.at(grid, rng.uniform(0, 63, (600, 2))),
        PointSampling.blocks(grid, corner, corner + 2),
    ]
    for A, most in zip(operators, (50, 60), strict=True):
        n = A.data_shape[0]
        R = Diagonal(torch.from_numpy(0.01 * (1 + rng.random(n))))
        b = torch.randn(3, n, dtype=F64)
        solved = A.solve(b, R, C, rtol=1e-9)
        assert bool(solved.converged.all())
        assert solved.iterations < most
        S = A(C.apply(A.adjoint(torch.eye(n, dtype=F64)))) + R.dense()
        torch.testing.assert_close(solved.x, torch.linalg.solve(S, b.mT).mT, rtol=1e-6, atol=1e-6)


def test_vecchia_with_all_predecessors_is_exact():
    rng = np.random.default_rng(3)
    points = rng.uniform(0, 10, (50, 2))
    model = Exponential(length=2.0) + Nugget(variance=0.1)
    K = model(points[:, None] - points[None]) + np.diag(0.2 * np.ones(50))
    exact = Vecchia(points, model, neighbours=50, noise=0.2)
    v = rng.standard_normal((50, 3))
    np.testing.assert_allclose(exact.solve(v), np.linalg.solve(K, v), rtol=1e-9, atol=1e-9)
    assert exact.logdet() == pytest.approx(np.linalg.slogdet(K)[1])
    L = exact.draw(np.eye(50))
    np.testing.assert_allclose(L @ L.T, K, atol=1e-12)
    np.testing.assert_allclose(exact.draw_transposed(v), L.T @ v, atol=1e-10)
    np.testing.assert_allclose(exact.whiten(exact.draw(v)), v, atol=1e-10)
    few = predecessors(points, 5)
    assert (few < np.arange(50)[:, None]).all()
    assert (few[6:] >= 0).sum() > 0.95 * few[6:].size
    with pytest.raises(ValueError, match="coincide"):
        Vecchia(np.zeros((3, 2)), Exponential(length=2.0), neighbours=2)


def test_leave_one_out_is_kriging_without_each_datum():
    rng = np.random.default_rng(5)
    points, d, model = rng.uniform(0, 10, (20, 1)), rng.standard_normal(20), Exponential(length=2.0)
    error, sd = leave_one_out(model, points, d, sd=0.3, mean=0.2)
    K = model(points[:, None] - points[None]) + 0.09 * np.eye(20)
    for i in (0, 7):
        keep = np.arange(20) != i
        w = np.linalg.solve(K[np.ix_(keep, keep)], K[keep, i])
        assert error[i] == pytest.approx(d[i] - 0.2 - w @ (d[keep] - 0.2))
        assert sd[i] == pytest.approx(math.sqrt(K[i, i] - w @ K[keep, i]))
    with pytest.raises(ValueError, match="coincide"):
        leave_one_out(model, np.zeros((3, 1)), d[:3])


def test_data_that_cannot_be():
    field = RandomField(MODEL, GRID)
    here = np.array([[103.0, 8.0], [110.0, 20.0]])
    for points, values, sd, words in (
        (here, [1.0, math.nan], 0.1, "1 of 2 data are NaN"),
        (here + 50, [1.0, 2.0], 0.1, "outside the grid"),
        (here * math.nan, [1.0, 2.0], 0.1, "not finite"),
        (here[[0, 0]], [1.0, 3.0], 0.1, "contradict"),
        (here, [1.0, 2.0], 0.0, "positive"),
        (here, [1.0, 2.0, 3.0], 0.1, "one value a point"),
        (here[:, :1], [1.0, 2.0], 0.1, "coordinates"),
    ):
        with pytest.raises(ValueError, match=words):
            observe(field, points, np.array(values), sd=sd)
    observe(field, here[[0, 0]], np.array([1.0, 1.2]), sd=0.1)  # repeated data that agree are two data
    with pytest.raises(ValueError, match="Grid"):
        observe(RandomField(MODEL, (1, 16, 15)), here, np.array([1.0, 2.0]), sd=0.1)
    with pytest.raises(ValueError, match="no node"):
        PointSampling.blocks(GRID, np.array([[101.2, 2.2]]), np.array([[101.4, 2.4]]))
    with pytest.raises(ValueError, match="kind"):
        PointSampling.at(GRID, here, kind="cubic")
