"""Super-resolution and open-edge blur: against sums in space, direct solves, kernels, grids, bad input."""

import numpy as np
import pytest
import scipy.signal
import torch

from invgen.covariance import Scalar, Stationary
from invgen.grid import Grid
from invgen.operators import (
    SuperResolution,
    ValidConvolution,
    bicubic_kernel,
    box_kernel,
    gaussian_kernel,
)

torch.set_num_threads(1)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_box_kernel_gives_the_mean_of_each_block(factor):
    x = draw(2, 1, 12, 24)
    d = SuperResolution(box_kernel(factor), (1, 12, 24), factor)(x)
    torch.testing.assert_close(d, torch.nn.functional.avg_pool2d(x, factor))


def test_blur_then_every_other_sample():
    kernel, x = draw(3, 5, seed=1), draw(1, 2, 6, 8)
    d = SuperResolution(kernel, (2, 6, 8), (3, 2), offset=(2, 0))(x)
    for c in range(2):
        padded = np.pad(x[0, c].numpy(), ((1, 1), (2, 2)), mode="wrap")
        blurred = scipy.signal.convolve(padded, kernel.numpy(), "valid")
        np.testing.assert_allclose(d[0, c].numpy(), blurred[2::3, 0::2], atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 8, 9), (2, 4, 6)])
def test_solves_are_direct_for_stationary_covariances(shape):
    operator = SuperResolution(draw(3, 2, seed=2), shape, (2, 3))
    n_y, n_x = shape[1:]
    k2 = torch.fft.fftfreq(n_y)[:, None].square() + torch.fft.fftfreq(n_x).square()
    C = Stationary((torch.exp(-30 * k2.double()) + 0.05) * (1 + torch.arange(shape[0]).reshape(-1, 1, 1)), shape)
    coarse = operator.data_shape
    k2 = torch.fft.fftfreq(coarse[1])[:, None].square() + torch.fft.fftfreq(coarse[2]).square()
    for R in (Scalar(torch.tensor([0.1, 3.0]).double(), coarse), Stationary(0.2 + k2.double(), coarse)):
        d, m = draw(2, *coarse, seed=3), draw(2, *shape, seed=4)
        data, update = operator.solve(d, R, C), operator.solve_model(m, R, C)
        assert (data.iterations, update.iterations) == (0, 0)
        torch.testing.assert_close(R.apply(data.x) + operator(C.apply(operator.adjoint(data.x))), d)
        torch.testing.assert_close(operator.adjoint(R.solve(operator(update.x))) + C.solve(update.x), m)


def test_the_update_in_float32_follows_float64():
    operator = SuperResolution(gaussian_kernel(1.2), (1, 32, 32), 4)
    m = draw(2, 1, 32, 32)
    want = operator.solve_model(m, 1e-4, 1.0).x
    got = operator.solve_model(m.float(), 1e-4, 1.0).x
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-3 * float(want.abs().max()))


def test_valid_convolution_is_scipys():
    kernel, x = draw(4, 3, seed=5), draw(1, 1, 9, 7)
    d = ValidConvolution(kernel, (1, 9, 7))(x)
    np.testing.assert_allclose(
        d[0, 0].numpy(), scipy.signal.convolve(x[0, 0].numpy(), kernel.numpy(), "valid"), atol=1e-12
    )


@pytest.mark.parametrize("factor", [1, 2, 3, 4])
def test_a_coarse_pixel_lies_in_the_middle_of_its_fine_ones(factor):
    """A ramp away from the edge: data are its values at the coarse grid's coordinates, for every symmetric kernel."""
    n = 12 * factor
    grid = Grid((n, n), (0.5, 2.0), (1.0, -3.0), axes=("y", "x"), units=("m", "m"))
    y, x = (torch.as_tensor(grid.coordinates(a)) for a in (0, 1))
    ramp = (y[:, None] + 10 * x)[None, None]
    for kernel in (box_kernel(factor), bicubic_kernel(factor)):
        operator = SuperResolution(kernel, (1, n, n), factor, model_grid=grid)
        assert operator.data_grid is not None
        Y, X = (torch.as_tensor(operator.data_grid.coordinates(a)) for a in (0, 1))
        inside = slice(4, -4)
        got, want = operator(ramp)[0, 0], Y[:, None] + 10 * X
        torch.testing.assert_close(got[inside, inside], want[inside, inside])
        # the middle of the block
        assert operator.data_grid.origin[0] == pytest.approx(1.0 + 0.5 * (factor - 1) / 2)


def test_the_data_grid_of_a_valid_convolution():
    grid = Grid((12, 10), (0.5, 2.0), axes=("y", "x"))
    operator = ValidConvolution(gaussian_kernel(0.5), (1, 12, 10), model_grid=grid)
    y, x = (torch.as_tensor(grid.coordinates(a)) for a in (0, 1))
    Y, X = (torch.as_tensor(operator.data_grid.coordinates(a)) for a in (0, 1))
    torch.testing.assert_close(operator((y[:, None] + 10 * x)[None, None])[0, 0], Y[:, None] + 10 * X)


def test_kernels_have_sum_one():
    for kernel in (
        box_kernel((2, 3)),
        gaussian_kernel(0.7),
        bicubic_kernel(2),
        bicubic_kernel(3),
        gaussian_kernel(2, 1),
    ):
        assert float(kernel.sum()) == pytest.approx(1, abs=1e-12)
    sd = gaussian_kernel(1.5, 1)
    t = torch.arange(len(sd)) - len(sd) // 2
    assert float((sd * t.square()).sum()) == pytest.approx(1.5**2, rel=1e-2)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SuperResolution(None, (1, 8, 9), 2), "divide"),
        (lambda: SuperResolution(None, (1, 8, 8), 0), "divide"),
        (lambda: SuperResolution(None, (1, 8, 8), 2, offset=2), "offset"),
        (lambda: SuperResolution(torch.ones(3), (1, 8, 8), 2), "kernel"),
        (lambda: ValidConvolution(torch.ones(9, 3), (1, 8, 8)), "nowhere lies"),
        (lambda: ValidConvolution(torch.ones(3, 3) * float("nan"), (1, 8, 8)), "finite"),
        (lambda: gaussian_kernel(0.0), "positive"),
        (lambda: box_kernel(0), "at least one"),
        (lambda: bicubic_kernel(0), "factor"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(ValueError, match=words):
        make()
