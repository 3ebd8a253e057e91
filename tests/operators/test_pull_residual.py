"""Aᴴ R⁻¹ (d − A x) and its misfit in one call, where an operator has a shorter way than the definition."""

import pytest
import torch

from invgen.contracts import LinearOperator
from invgen.covariance import Scalar, as_covariance
from invgen.operators import Convolution


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("spatial", [(7, 8), (5, 9), (6,), (4, 3, 5)])
@pytest.mark.parametrize("boundary", ["periodic", "zero"])
def test_fourier_short_cut_is_the_definition(dtype, spatial, boundary):
    g = torch.Generator().manual_seed(0)
    shape = (2, *spatial)
    operator = Convolution(torch.randn(3, *(2,) * (len(spatial) - 1), generator=g), shape, boundary)
    x, d = torch.randn(4, *shape, generator=g, dtype=dtype), torch.randn(1, *shape, generator=g, dtype=dtype)
    R = as_covariance(0.3, shape)
    assert isinstance(R, Scalar)
    pulled, square = operator.pull_residual(x, d, R)
    expected, misfit = LinearOperator.pull_residual(operator, x, d, R)
    close = 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(pulled, expected, rtol=close, atol=close)
    torch.testing.assert_close(square, misfit, rtol=close, atol=close)


def test_items_are_counted():
    operator = Convolution(torch.ones(3), (1, 6))
    operator.pull_residual(torch.zeros(4, 1, 6), torch.ones(1, 1, 6), as_covariance(1.0, (1, 6)))
    assert (operator.forward_count, operator.adjoint_count) == (4, 4)
