"""Residual χ² has the law that its docstring states."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import integrate, stats

from invgen.diagnostics import residual_chi2, weighted_chi2_sf

SIGMA = np.array([0.3, 0.5, 0.7, 0.4, 0.6])
MEAN = np.array([1.0, -1.0, 2.0])
C = np.array([[1.0, 0.5, 0.1], [0.5, 0.8, 0.2], [0.1, 0.2, 0.4]])
A = np.random.default_rng(0).normal(size=(5, 3))
K = C @ A.T @ np.linalg.inv(A @ C @ A.T + np.diag(SIGMA**2))
P = C - K @ A @ C
LEVERAGES = np.linalg.eigvalsh((A @ P @ A.T) / SIGMA / SIGMA[:, None])


def residuals(n, draws, seed, widen=1.0):
    """d − A x of posterior draws, `(n, draws, 5)`."""
    rng = np.random.default_rng(seed)
    x = rng.multivariate_normal(MEAN, C, n)
    d = x @ A.T + SIGMA * rng.standard_normal((n, 5))
    centre = MEAN + (d - MEAN @ A.T) @ K.T
    s = centre[:, None] + widen * rng.multivariate_normal(np.zeros(3), P, (n, draws))
    return d[:, None] - s @ A.T


def test_weighted_sums_by_closed_forms():
    assert weighted_chi2_sf(3.0, [2, 2], [1, 2]) == pytest.approx(stats.chi2.sf(1.5, 3), abs=1e-12)
    for x in (0.3, 2.0, 9.0):  # almost equal weights go through the integral
        assert weighted_chi2_sf(x, [1, 1 - 1e-9], [1, 2]) == pytest.approx(stats.chi2.sf(x, 3), abs=1e-7)
    for x in (30.0, 50.0, 80.0):
        want = integrate.quad(lambda y, x=x: stats.chi2.pdf(y, 3) * stats.chi2.sf(x - 0.2 * y, 50), 0, np.inf)[0]
        assert weighted_chi2_sf(x, [1, 0.2, 0.0], [50, 3, 4]) == pytest.approx(want, abs=1e-8)
    assert weighted_chi2_sf(-1.0, [1.0], [1.0]) == 1.0


@pytest.mark.parametrize("draws", [1, 2, 50])
def test_p_values_with_leverages_are_uniform(draws):
    r = residuals(400, draws, 1)
    p = np.array([residual_chi2(r[i : i + 1], SIGMA, leverages=LEVERAGES).p_value for i in range(400)])
    assert stats.kstest(p, "uniform").pvalue > 1e-4


def test_the_posterior_mean_of_chi2_has_the_stated_moments():
    n, draws = 4000, 40
    r = residuals(n, draws, 2)
    single = residual_chi2(r[:1], SIGMA, leverages=LEVERAGES)
    mean = residual_chi2(r, SIGMA).values.mean(1)
    assert abs(mean.mean() - 5) < 4.5 * mean.std() / np.sqrt(n)
    assert mean.std() == pytest.approx(single.sd, rel=0.08)
    assert single.sd < np.sqrt(10)  # sharper than χ²_5
    every = residual_chi2(r, SIGMA, leverages=LEVERAGES)
    assert every.sd == pytest.approx(single.sd / np.sqrt(n))
    assert every.p_value > 1e-4


def test_p_values_without_leverages_are_valid():
    for draws in (1, 20):
        r = residuals(800, draws, 3)
        p = np.array([residual_chi2(r[i : i + 1], SIGMA).p_value for i in range(800)])
        for alpha in (0.05, 0.2):
            assert (p <= alpha).mean() < alpha + 4 * np.sqrt(alpha * (1 - alpha) / 800)


def test_wrong_noise_and_wrong_spread_fail():
    r = residuals(50, 20, 4)
    assert residual_chi2(r, SIGMA).passed
    assert not residual_chi2(r, 1.5 * SIGMA).passed
    assert not residual_chi2(residuals(50, 20, 4, widen=2.0), SIGMA, leverages=LEVERAGES).passed


def test_masks_and_complex_data():
    rng = np.random.default_rng(5)
    r = rng.normal(size=(30, 4, 6, 2))
    mask = np.zeros((6, 2), dtype=bool)
    mask[:2] = True
    got = residual_chi2(np.where(mask, 0.5 * r, np.nan), 0.5, mask=mask)
    assert got.n == 4
    np.testing.assert_allclose(got.values, (r[:, :, :2] ** 2).sum((2, 3)), rtol=1e-12)
    z = (rng.normal(size=(400, 1, 3)) + 1j * rng.normal(size=(400, 1, 3))) * 2 / np.sqrt(2)  # sd 2 a complex datum
    got = residual_chi2(z, 2.0)
    assert got.n == 6
    assert abs(got.mean - 6) < 4.5 * np.sqrt(12 / 400)


def test_bad_input_says_what_to_do():
    r = residuals(2, 3, 6)
    with pytest.raises(ValueError, match="pad with zeros"):
        residual_chi2(r, SIGMA, leverages=[0.5])
    with pytest.raises(ValueError, match="n_obs, draws"):
        residual_chi2(r[0, 0], SIGMA)
    with pytest.raises(ValueError, match="NaN"):
        residual_chi2(r * np.nan, SIGMA)
