"""Calibration tests on a Gaussian problem in closed form: right posteriors pass, planted errors fail."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from invgen.diagnostics import (
    check_calibration,
    expected_coverage,
    hpd_coverage,
    pit,
    pit_test,
    rank_tests,
    ranks,
    regression_references,
    sbc,
    tarp,
)
from invgen.diagnostics._arrays import chunks

N, DRAWS, NOISE = 400, 60, 0.6
MEAN = np.array([1.0, -2.0, 0.5])
C = np.array([[1.0, 0.6, 0.2], [0.6, 2.0, 0.5], [0.2, 0.5, 0.7]])
A = np.array([[1.0, 0.3, -0.5], [0.2, -0.8, 0.4]])
K = C @ A.T @ np.linalg.inv(A @ C @ A.T + NOISE**2 * np.eye(2))
P = C - K @ A @ C


def simulate(seed, *, scale=1.0, bias=0.0, prior_only=False, draws=DRAWS, n=N):
    """Truths, draws, data, and both log-likelihoods."""
    rng = np.random.default_rng(seed)
    x = rng.multivariate_normal(MEAN, C, n)
    d = x @ A.T + NOISE * rng.standard_normal((n, 2))
    if prior_only:
        s = rng.multivariate_normal(MEAN, C, (n, draws))
    else:
        centre = MEAN + (d - MEAN @ A.T) @ K.T + bias * np.sqrt(np.diag(P))
        s = centre[:, None] + scale * rng.multivariate_normal(np.zeros(3), P, (n, draws))
    return x, s, d, (loglik(x, d), loglik(s, d))


def loglik(x, d):
    return -0.5 * ((d.reshape(len(d), *(1,) * (x.ndim - 2), 2) - x @ A.T) ** 2).sum(-1) / NOISE**2


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor, lambda v: torch.as_tensor(v).float()])
def test_ranks_count_smaller_draws(kind):
    x, s, _, _ = simulate(0, n=50)
    np.testing.assert_array_equal(ranks(kind(x), kind(s)), (s < x[:, None]).sum(1))
    image = ranks(x.reshape(50, 3, 1), s.reshape(50, DRAWS, 3, 1))
    assert image.shape == (50, 3, 1)


def test_ranks_do_not_depend_on_the_chunk(monkeypatch):
    x, s, _, _ = simulate(0, n=50)
    want = ranks(x, s)
    monkeypatch.setattr(rank_tests, "chunks", lambda rows, numbers: chunks(rows, numbers, limit=8 * 7 * numbers))
    np.testing.assert_array_equal(ranks(x, s), want)


def test_ties_are_broken_at_random():
    n, draws = 6000, 5
    r = ranks(np.zeros(n), np.zeros((n, draws)))
    assert stats.chisquare(np.bincount(r, minlength=draws + 1)).pvalue > 1e-4
    half = ranks(np.zeros(n), np.tile([-1.0, 0.0, 0.0, 1.0], (n, 1)))
    assert set(half) == {1, 2, 3}


def test_right_posterior_passes():
    for seed in range(5):
        x, s, d, fit = simulate(seed)
        both = check_calibration(x, s, log_likelihood=fit, data=d, level=2e-4)
        assert both.passed, str(both)
        assert expected_coverage(x, s, level=2e-4).passed
        assert pit_test(pit(x, s), level=2e-4).passed


@pytest.mark.parametrize("test", ["ecdf", "chi2"])
@pytest.mark.parametrize("error", [{"scale": 0.7}, {"scale": 1.4}, {"bias": 0.4}])
def test_wrong_spread_and_bias_fail(error, test):
    x, s, d, fit = simulate(1, **error)
    assert not sbc(x, s, log_likelihood=fit, test=test, level=1e-3).passed
    assert not expected_coverage(x, s, level=1e-3).passed or "bias" in error
    assert not check_calibration(x, s, log_likelihood=fit, data=d, level=1e-3).passed


def test_the_prior_passes_by_its_coordinates_and_fails_by_the_likelihood():
    x, s, d, fit = simulate(2, prior_only=True)
    assert sbc(x, s, level=1e-3).passed
    assert expected_coverage(x, s, level=1e-3).passed
    assert tarp(x, s, level=1e-3).passed  # references that do not know the data
    both = sbc(x, s, log_likelihood=fit, level=1e-3)
    assert both.failing == ("log p(d | x)",)
    assert not tarp(x, s, data=d, level=1e-3).passed
    assert not tarp(x, s, references=regression_references(x, d), level=1e-3).passed
    assert not check_calibration(x, s, log_likelihood=fit, data=d, level=1e-3).passed


def test_wrong_correlation_shows_in_further_quantities():
    rng = np.random.default_rng(3)
    x = rng.multivariate_normal([0, 0], [[1, 0.9], [0.9, 1]], N)
    s = rng.standard_normal((N, DRAWS, 2))  # right margins, no correlation
    assert sbc(x, s, level=1e-3).passed
    product = {"x0 x1": (x.prod(-1), s.prod(-1))}
    assert sbc(x, s, quantities=product, level=1e-3).failing == ("x0 x1",)


def test_coverage_is_exact_for_few_draws():
    """8 draws: the interval from the smallest to the largest covers 7/9; between interpolated quantiles truth is held 0.721 of the time."""
    x, s, _, _ = simulate(4, draws=8, n=4000)
    result = expected_coverage(x, s)
    k = int(np.abs(result.levels - 7 / 9).argmin())
    assert result.levels[k] == pytest.approx(7 / 9)
    se = np.sqrt(7 / 9 * 2 / 9 / 4000)
    inside = ((x >= s.min(1)) & (x <= s.max(1))).mean(0)
    np.testing.assert_allclose(result.observed[:, k], inside, atol=1e-12)
    assert np.abs(inside - 7 / 9).max() < 4.5 * se
    low, high = np.quantile(s, [0.05, 0.95], axis=1)
    assert ((x >= low) & (x <= high)).mean() == pytest.approx(0.721, abs=0.02)


def test_density_sets():
    x, s, d, _ = simulate(5, draws=99)
    centre = MEAN + (d - MEAN @ A.T) @ K.T

    def log_q(v, scale):
        r = v - centre.reshape(len(d), *(1,) * (v.ndim - 2), 3)
        return -0.5 * np.einsum("...i,ij,...j", r, np.linalg.inv(P), r) / scale**2

    right = hpd_coverage(log_q(x, 1), log_q(s, 1), level=1e-3)
    assert right.passed
    narrow = centre[:, None] + 0.7 * (s - centre[:, None])
    wrong = hpd_coverage(log_q(x, 0.7), log_q(narrow, 0.7), level=1e-3)
    assert not wrong.passed
    # |x − mean|² ~ χ²_3 in units of the posterior: a 90 % set of 0.49 times the variance holds this much
    want = stats.chi2.cdf(0.49 * stats.chi2.ppf(0.9, 3), 3)
    assert wrong.coverage(0.9)[0] == pytest.approx(want, abs=4 * np.sqrt(want * (1 - want) / N))


def test_references_follow_the_data_and_forget_the_truth():
    x, _, d, _ = simulate(6)
    r = regression_references(x, d)
    mean = MEAN + (d - MEAN @ A.T) @ K.T
    error = (r - mean) / np.sqrt(np.diag(P))  # noise of the posterior's size around its mean
    assert np.abs(error.mean(0)).max() < 5 / np.sqrt(N)
    assert np.abs(error.std(0) - 1).max() < 0.25
    moved = x.copy()
    moved[7] += 0.5
    again = regression_references(moved, d)
    np.testing.assert_allclose(again[7], r[7], atol=1e-10)
    assert not np.allclose(again, r, atol=1e-10)


def test_more_data_than_simulations_and_complex_data_give_references():
    x, s, d, _ = simulate(7, n=60)
    wide = np.concatenate([d, np.random.default_rng(0).standard_normal((60, 300))], axis=1)
    assert np.isfinite(regression_references(x, wide)).all()
    turned = (d[:, :1] + 1j * d[:, 1:]) * np.exp(0.3j)
    assert np.isfinite(regression_references(x, turned)).all()
    assert tarp(x, s, data=torch.as_tensor(turned), level=1e-3).passed


def test_tarp_does_not_depend_on_units():
    x, s, d, _ = simulate(8)
    unit, shift = np.array([1e3, 1e-3, 7.0]), np.array([5.0, 0, -1e3])
    one, two = tarp(x, s, data=d), tarp(x * unit + shift, s * unit + shift, data=3 * d - 8)
    np.testing.assert_array_equal(one.ranks, two.ranks)


def test_pit_is_uniform_and_follows_ranks():
    x, s, _, _ = simulate(9, draws=4)
    u = pit(x, s)
    np.testing.assert_array_equal(np.floor(u * 5), ranks(x, s))
    assert not pit_test(stats.norm.cdf(np.random.default_rng(0).normal(size=500) * 1.4), level=1e-3).passed


def test_families():
    x, s, d, fit = simulate(10)
    both = check_calibration(x, s, log_likelihood=fit, data=d)
    assert len(both.names) == len(both.p_values) == 5
    assert all(t.family == 5 for t in both.tests)
    assert both.passed == (both.p_values.min() > both.level / 5)
    alone = sbc(x, s)
    assert both.tests[0].band[0].min() <= alone.band[0].min()  # a larger family has a wider band


def test_bad_input_says_what_to_do():
    x, s, d, fit = simulate(11, n=40)
    with pytest.raises(ValueError, match=r"\(n_sim, draws, \*shape\)"):
        sbc(x, s.transpose(1, 0, 2))
    with pytest.raises(ValueError, match="NaN"):
        sbc(x, np.where(s > 5, np.nan, s) * np.nan)
    with pytest.raises(ValueError, match="either data or references"):
        check_calibration(x, s, log_likelihood=fit)
    with pytest.raises(ValueError, match="pass one of the two"):
        tarp(x, s, data=d, references=x)
    with pytest.raises(ValueError, match="log p"):
        sbc(x, s, log_likelihood=(fit[0], fit[1][:, :5]))
    with pytest.raises(TypeError, match="complex"):
        ranks(x + 1j, s)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        pit_test(np.array([0.5, 1.5]))


def test_infinite_log_likelihoods_have_ranks_and_read_only_maps_are_read(tmp_path):
    x, s, _, fit = simulate(12, n=40)
    fit[1][:, 0] = -np.inf
    np.save(tmp_path / "s.npy", s.astype(">f8"))
    stored = np.load(tmp_path / "s.npy", mmap_mode="r")
    np.testing.assert_array_equal(
        sbc(x, stored, log_likelihood=fit).ranks[:, :3], sbc(x, s, log_likelihood=fit).ranks[:, :3]
    )
