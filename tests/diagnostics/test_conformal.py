"""Conformal regions on a conjugate Gaussian whose posterior is known, and on spoiled versions of it."""

import math

import pytest
import torch

from invgen.diagnostics import conformal_density, conformal_ellipsoid, conformal_intervals, conformal_quantile

D = torch.float64
COVARIANCE = torch.tensor([[1.0, 0.7], [0.7, 0.9]], dtype=D)
NOISE = 0.4
GAIN = COVARIANCE @ torch.linalg.inv(COVARIANCE + NOISE**2 * torch.eye(2, dtype=D))
POSTERIOR = COVARIANCE - GAIN @ COVARIANCE
MEAN = torch.tensor([2.0, -1.0], dtype=D)


def simulated(n, draws, seed, spread=1.0, shift=0.0):
    """Truths, and draws of a posterior that is `spread` times too narrow or wide and off by `shift` sd."""
    g = torch.Generator().manual_seed(seed)
    x = MEAN + torch.randn(n, 2, generator=g, dtype=D) @ torch.linalg.cholesky(COVARIANCE).T
    d = x + NOISE * torch.randn(n, 2, generator=g, dtype=D)
    mean = MEAN + (d - MEAN) @ GAIN.T + shift * POSTERIOR.diagonal().sqrt()
    L = spread * torch.linalg.cholesky(POSTERIOR)
    samples = mean[:, None] + torch.randn(n, draws, 2, generator=g, dtype=D) @ L.T
    law = torch.distributions.MultivariateNormal(mean, scale_tril=L)
    return x, samples, law.log_prob(x), law.log_prob(samples.movedim(1, 0)).T


def inside(kind, calibration, test, coverage):
    x, s, lx, ls = calibration
    y, r, ly, lr = test
    if kind == "intervals":
        return conformal_intervals(x, s, coverage).contains(y, r)
    if kind == "box":
        return conformal_intervals(x, s, coverage, joint=True).contains(y, r)
    if kind == "ellipsoid":
        return conformal_ellipsoid(x, s, coverage).contains(y, r)
    return conformal_density(lx, ls, coverage).contains(ly, lr)


@pytest.mark.parametrize("kind", ["intervals", "box", "ellipsoid", "density"])
@pytest.mark.parametrize(("spread", "shift"), [(0.4, 0.0), (1.0, 1.5), (3.0, 0.0)])
def test_coverage_is_what_it_says_for_wrong_posteriors(kind, spread, shift):
    """Mean over 60 calibrations of n = 199: k/(n + 1) = 0.9 exactly; 12 cases of 5 standard errors, 7e-6 in all."""
    rates = []
    for k in range(60):
        calibration, test = (simulated(m, 40, 2 * k + i, spread, shift) for i, m in enumerate((199, 400)))
        rates.append(inside(kind, calibration, test, 0.9).double().mean())
    rates = torch.stack(rates)
    assert abs(float(rates.mean()) - 0.9) < 5 * float(rates.std()) / 60**0.5


def test_regions_of_the_exact_posterior_are_the_exact_regions():
    """Factor 1, χ²_2 quantile, and −log-density drop (χ²_2 quantile − 2)/2, with n = 20,000 and 400 draws."""
    x, s, lx, ls = simulated(20_000, 400, 3)
    quantile = -2 * math.log(0.1)
    assert conformal_intervals(x, s, 0.9).factor.tolist() == pytest.approx([1.0, 1.0], abs=0.03)
    assert conformal_ellipsoid(x, s, 0.9).radius == pytest.approx(quantile, rel=0.04)
    assert conformal_density(lx, ls, 0.9).drop == pytest.approx(quantile / 2 - 1, rel=0.06)


def test_an_over_confident_posterior_is_widened_by_its_error():
    x, s, *_ = simulated(20_000, 400, 4, spread=0.5)
    assert conformal_intervals(x, s, 0.9).factor.tolist() == pytest.approx([2.0, 2.0], rel=0.03)
    low, high = conformal_intervals(x, s, 0.9)(s[:3])
    assert low.shape == (3, 2)
    assert (high > low).all()


def test_the_quantile_is_the_stated_order_statistic():
    scores = torch.arange(1.0, 20.0)
    assert float(conformal_quantile(scores, 0.9)) == 18
    assert float(conformal_quantile(scores, 0.95)) == 19
    with pytest.raises(ValueError, match="at least 99 simulations, got 19"):
        conformal_quantile(scores, 0.99)


def test_fields_keep_their_shape():
    g = torch.Generator().manual_seed(0)
    x, s = torch.randn(99, 1, 4, 3, generator=g), torch.randn(99, 30, 1, 4, 3, generator=g)
    assert conformal_intervals(x, s).factor.shape == (1, 4, 3)
    assert conformal_intervals(x, s, joint=True).contains(x, s).shape == (99,)
    with pytest.raises(ValueError, match="no covariance"):
        conformal_ellipsoid(x, s[:, :10])


@pytest.mark.parametrize("coverage", [0.0, 1.0, 1.5])
def test_bad_coverage_is_named(coverage):
    with pytest.raises(ValueError, match="between 0 and 1"):
        conformal_quantile(torch.arange(10.0), coverage)
