"""The pencil solves what the column blocks solve, without the memory of a block a column."""

from __future__ import annotations

import pytest
import torch

from invgen.covariance import BlockDiagonal, Scalar
from invgen.operators import PostStack, Smooth, ricker, separable, stack
from invgen.operators._pencil import Pencil

D = torch.float64


@pytest.fixture
def system(monkeypatch):
    """A stack of physics and a strong smooth background, its blocks refused."""
    monkeypatch.setattr(separable, "LIMIT", 0)
    shape = (2, 12, 9)
    physics = PostStack(ricker(torch.arange(-3, 4, dtype=D) * 0.004, 30.0) / 2, shape)
    background = Smooth(shape, (3, 4))
    op = stack(physics, 2.0 * background)
    R = BlockDiagonal([Scalar(1e-4, physics.data_shape), Scalar(0.01, background.data_shape)])
    return op, R


@pytest.mark.parametrize("variance", [torch.tensor(0.7, dtype=D), torch.tensor([0.5, 50.0, 0.5], dtype=D)])
def test_solves_in_model_and_data_space_equal_dense_ones(system, variance):
    op, R = system
    C = Scalar(variance, op.model_shape)
    assert isinstance(op._blocks(R, C), Pencil)
    g = torch.Generator().manual_seed(3)
    rhs = torch.randn(3, *op.data_shape, generator=g, dtype=D)
    m = torch.randn(3, *op.model_shape, generator=g, dtype=D)
    data, model = op.solve(rhs, R, C), op.solve_model(m, R, C)
    A, r = op.to_dense(), R.dense()
    for i, c in enumerate(variance.expand(3)):
        want = torch.linalg.solve(r + c * A @ A.T, rhs[i])
        assert float((data.x[i] - want).norm() / want.norm()) < 1e-9
        eye = torch.eye(A.shape[1], dtype=D)
        want = torch.linalg.solve(A.T @ torch.linalg.solve(r, A) + eye / c, m[i].flatten())
        assert float((model.x[i].flatten() - want).norm() / want.norm()) < 1e-9


def test_levels_may_change_and_return(system):
    # the decomposition of the last level is kept: another level must not meet it, in any precision
    op, R = system
    m = torch.randn(1, *op.model_shape, generator=torch.Generator().manual_seed(4), dtype=D)
    first = op.solve_model(m, R, Scalar(0.5, op.model_shape)).x
    other = op.solve_model(m, R, Scalar(5.0, op.model_shape)).x
    single = op.solve_model(m.float(), R, Scalar(0.5, op.model_shape)).x
    again = op.solve_model(m, R, Scalar(0.5, op.model_shape)).x
    assert torch.equal(first, again)
    assert float((first - other).norm() / first.norm()) > 0.01
    assert single.dtype == torch.float32
    assert float((single - first).norm() / first.norm()) < 1e-4
