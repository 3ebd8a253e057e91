"""Correlated sky noise: what a known kernel does to white noise is found again, with masks and noise maps."""

from __future__ import annotations

import math

import pytest
import torch

from invgen.covariance import Scalar, Stationary
from invgen.data import drizzled_noise, sky_correlation
from invgen.driver import Streams
from invgen.modulated import Modulated
from invgen.noise import GaussianNoise
from invgen.operators import Identity
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem
from invgen.solvers import ExactGaussian

KERNEL = torch.tensor([[0.1, 0.4, 0.2], [0.2, 1.0, 0.5]], dtype=torch.float64)
KERNEL = KERNEL / KERNEL.square().sum().sqrt()


def law() -> torch.Tensor:
    """ρ of white noise behind the kernel: its autocorrelation, (3, 5)."""
    padded = torch.nn.functional.pad(KERNEL[None, None], (2, 2, 1, 1))
    return torch.nn.functional.conv2d(padded, KERNEL[None, None])[0, 0]


def drizzled(ny: int, nx: int, seed: int) -> torch.Tensor:
    white = torch.randn(1, 1, ny + 1, nx + 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.conv2d(white, KERNEL[None, None])[0, 0]


def test_the_correlation_of_a_known_kernel_is_found_again() -> None:
    ny = nx = 300
    sd = torch.linspace(0.5, 2.0, nx, dtype=torch.float64).expand(ny, nx)
    mask = torch.rand(ny, nx, generator=torch.Generator().manual_seed(9)) > 0.3
    found = sky_correlation(7.0 + sd * drizzled(ny, nx, 0), sd, mask=mask, lags=(2, 3))
    assert found.shape == (5, 7)
    want = torch.zeros(5, 7, dtype=torch.float64)
    want[1:4, 1:6] = law()
    error = math.sqrt(2 * float(law().square().sum()) / (0.49 * ny * nx))
    assert (found - want).abs().max() < 5 * error
    torch.testing.assert_close(found, found.flip(0, 1))


def test_the_noise_has_the_correlation() -> None:
    sd = torch.linspace(0.5, 2.0, 30, dtype=torch.float64).reshape(1, 5, 6)
    R = drizzled_noise(law(), (1, 5, 6), sd).covariance((1, 5, 6)).dense()
    rho = R / sd.flatten()[:, None] / sd.flatten()
    middle = 2 * 6 + 3  # row 2, column 3
    for dy, dx in ((0, 0), (1, 0), (1, 2), (1, -2), (0, 1)):
        # exact where the clipped spectrum needed no clipping
        assert float(rho[middle, middle + 6 * dy + dx]) == pytest.approx(float(law()[1 + dy, 2 + dx]), abs=2e-3)


def test_likelihood_and_exact_posterior_are_those_of_the_dense_matrix() -> None:
    shape = (1, 6, 7)
    sd = torch.rand(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.5
    noise = drizzled_noise(law(), shape, sd)
    d = noise.draw(torch.zeros(3, *shape, dtype=torch.float64), Streams(0, range(3)))
    R = noise.covariance(shape).dense()
    want = torch.distributions.MultivariateNormal(torch.zeros(42, dtype=torch.float64), R).log_prob(d.flatten(1))
    torch.testing.assert_close(noise(torch.zeros_like(d)).log_prob(d), want)
    prior = GaussianPrior(torch.full(shape, 0.3, dtype=torch.float64), 0.8)  # variance
    posterior = ExactGaussian().solve(InverseProblem(d[0], Identity(shape), noise, prior), 4000, seed=1)
    gain = 0.8 * torch.linalg.inv(R + 0.8 * torch.eye(42, dtype=torch.float64))
    mean = 0.3 + (gain @ (d[0] - 0.3).flatten())
    sds = (0.8 - 0.8 * gain.diagonal()).sqrt()
    draws = posterior.flat()[0][0].flatten(1).double()
    assert ((draws.mean(0) - mean) / sds * math.sqrt(4000)).abs().max() < 5
    assert (draws.std(0) / sds - 1).abs().max() < 5 / math.sqrt(8000) * 1.5


def test_a_number_for_the_noise_map_and_masks() -> None:
    noise = drizzled_noise(law(), (1, 6, 7), 0.5)
    assert isinstance(noise.covariance((1, 6, 7)), Stationary)
    mask = torch.rand(1, 6, 7, generator=torch.Generator().manual_seed(2)) > 0.4
    part = noise.restricted(mask).covariance((int(mask.sum()),)).dense()
    rows = mask.flatten()
    torch.testing.assert_close(part, noise.covariance((1, 6, 7)).dense()[rows][:, rows])


def test_modulated_against_its_dense_matrix() -> None:
    inner = drizzled_noise(law(), (1, 4, 5)).covariance((1, 4, 5))
    sd = torch.rand(1, 4, 5, dtype=torch.float64) + 0.3
    C = Modulated(sd, inner)
    dense = C.dense()
    torch.testing.assert_close(dense, sd.flatten()[:, None] * inner.dense() * sd.flatten())
    v = torch.randn(3, 1, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(C.solve(C.apply(v)), v)
    torch.testing.assert_close(C.logdet(), torch.linalg.slogdet(dense)[1])
    torch.testing.assert_close(C.diagonal().flatten(), dense.diagonal())
    quadratic = (v.flatten(1) @ torch.linalg.inv(dense) * v.flatten(1)).sum(1)
    torch.testing.assert_close(C.whiten(v).square().flatten(1).sum(1), quadratic)
    L = C.sqrt(torch.eye(20, dtype=torch.float64).reshape(20, 1, 4, 5)).reshape(20, 20)
    torch.testing.assert_close(L.T @ L, dense)
    torch.testing.assert_close(C.scaled(torch.tensor([1.0, 4.0, 2.0])).apply(v)[1], 4 * C.apply(v)[1])
    torch.testing.assert_close(C.plus(Modulated(C.sd, inner)).dense(), 2 * dense)
    torch.testing.assert_close(
        Modulated(sd, Scalar(2.0, (1, 4, 5))).plus(Scalar(1.0, (1, 4, 5))).diagonal(), 2 * sd**2 + 1
    )
    with pytest.raises(TypeError, match="no closed structure"):
        C.plus(Scalar(1.0, (1, 4, 5)))
    assert GaussianNoise(covariance=C)(v).variance.shape == v.shape


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: sky_correlation(torch.zeros(4)), "image"),
        (lambda: sky_correlation(torch.zeros(4, 4), lags=4), "larger than that"),
        (lambda: sky_correlation(torch.zeros(4, 4), 0.0), "noise of 0"),
        (lambda: sky_correlation(torch.zeros(4, 4), mask=torch.zeros(4, 4, dtype=torch.bool)), "leaves some pixels"),
        (lambda: drizzled_noise(torch.ones(2, 3), (1, 8, 8)), "odd sides"),
        (lambda: drizzled_noise(torch.tensor([[0.0, 1.0, 0.5]]), (1, 8, 8)), "even"),
        (lambda: drizzled_noise(law(), (1, 2, 8)), "reaches over"),
        (lambda: drizzled_noise(law(), (1, 8, 8), floor=0.0), "in \\(0, 1\\]"),
        (lambda: drizzled_noise(-law(), (1, 8, 8)), "must be positive"),
        (lambda: Modulated(torch.ones(3), Scalar(1.0, (2,))), "one a datum"),
        (lambda: Modulated(-torch.ones(2), Scalar(1.0, (2,))), "positive"),
    ],
)
def test_bad_input(call, says) -> None:
    with pytest.raises(ValueError, match=says):
        call()
