"""Uniformity tests against enumeration and simulation; families of tests."""

from __future__ import annotations

import itertools
from math import factorial

import numpy as np
import pytest
from scipy import stats

from invgen.diagnostics import ecdf_band, ecdf_p_value, holm, rank_p_value_chi2
from invgen.diagnostics.bands import counts_below
from invgen.diagnostics.rank_tests import rank_levels, rank_test


def test_p_values_are_those_of_enumeration():
    n, z = 4, np.array([0.2, 0.5, 0.7])
    cells = np.diff(np.concatenate([[0], z, [1]]))
    paths, probabilities, gammas = [], [], []
    for c in itertools.product(range(n + 1), repeat=4):
        if sum(c) != n:
            continue
        R = np.cumsum(c)[:3]
        probabilities.append(factorial(n) * np.prod([q**k / factorial(k) for q, k in zip(cells, c, strict=True)]))
        gammas.append(2 * min(min(stats.binom.cdf(r, n, q), stats.binom.sf(r - 1, n, q)) for r, q in zip(R, z)))
        paths.append(R)
    probabilities, gammas = np.array(probabilities), np.array(gammas)
    want = [probabilities[gammas <= g * (1 + 1e-9)].sum() for g in gammas]
    np.testing.assert_allclose(ecdf_p_value(np.array(paths), n, z), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("n", "num_draws"), [(60, 9), (300, 99), (200, 1000)])
def test_p_values_of_uniform_ranks_have_the_level_they_promise(n, num_draws):
    repeats = 3000
    ranks = np.random.default_rng(1).integers(0, num_draws + 1, (n, repeats))
    p = rank_test(ranks, num_draws).p_values
    for alpha in (0.01, 0.05, 0.2, 0.5):
        se = np.sqrt(alpha * (1 - alpha) / repeats)
        assert (p <= alpha).mean() < alpha + 4 * se
        assert (p <= alpha).mean() > 0.8 * alpha - 4 * se  # discreteness costs little


def test_a_curve_is_inside_the_band_exactly_when_its_p_value_exceeds_the_level():
    n, num_draws, level = 100, 19, 0.1
    cuts = rank_levels(num_draws)
    ranks = np.random.default_rng(2).integers(0, num_draws + 1, (n, 4000))
    counts = counts_below(ranks, num_draws, cuts)
    z = cuts / (num_draws + 1)
    low, high = ecdf_band(n, z, level)
    inside = ((counts >= low) & (counts <= high)).all(1)
    np.testing.assert_array_equal(inside, ecdf_p_value(counts, n, z) > level)
    assert 0.05 < 1 - inside.mean() < 0.12


def test_tiny_p_values_are_positive_ordered_and_below_the_union_bound():
    z = np.arange(1, 100) / 100
    n = 500
    shifted = [np.floor(n * z**power) for power in (1.2, 1.5, 2, 4)]
    p = ecdf_p_value(np.array(shifted), n, z)
    assert (np.diff(p) < 0).all()
    assert p[-1] > 0
    assert p[-1] < 1e-30


def test_folded_ranks_are_read_where_their_law_is_exact():
    for num_draws in (2, 7, 8, 99, 100, 1001):
        cuts = rank_levels(num_draws, folded=True)
        folded = np.abs(2 * np.arange(num_draws + 1) - num_draws)
        np.testing.assert_allclose([(folded < c).mean() for c in cuts], cuts / (num_draws + 1), rtol=1e-12)
        assert (np.diff(cuts) > 0).all()


def test_holm_by_hand():
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm(np.array([0.9, 0.8])), [1, 1])
    np.testing.assert_allclose(holm(np.array([0.01, 0.02]), family=10), [0.1, 0.18])


def test_chi2_agrees_with_scipy_and_knows_uneven_bins():
    ranks = np.random.default_rng(3).integers(0, 100, (400, 2))
    observed = np.stack([np.histogram(ranks[:, k], np.arange(0, 101, 5) - 0.5)[0] for k in range(2)])
    want = stats.chisquare(observed, axis=1).pvalue
    np.testing.assert_allclose(rank_p_value_chi2(ranks, 99), want, rtol=1e-10)
    uneven = np.random.default_rng(4).integers(0, 11, (400, 2000))  # 11 values in 4 bins
    assert abs((rank_p_value_chi2(uneven, 10, bins=4) <= 0.05).mean() - 0.05) < 4 * np.sqrt(0.05 * 0.95 / 2000)


def test_bad_input_says_what_to_do():
    with pytest.raises(ValueError, match="increase strictly"):
        ecdf_p_value(np.array([1, 2]), 5, np.array([0.5, 0.2]))
    with pytest.raises(ValueError, match="whole numbers in 0 … 10"):
        rank_test(np.array([0, 11]), 10)
    with pytest.raises(ValueError, match="'ecdf'"):
        rank_test(np.array([0, 1]), 10, test="ks")
    with pytest.raises(ValueError, match="names"):
        rank_test(np.zeros((5, 2), int), 10, names=["a"])
    with pytest.raises(ValueError, match="take more"):
        rank_test(np.zeros(5, int), 0)
    with pytest.raises(ValueError, match="level"):
        rank_test(np.zeros(5, int), 10, level=1.0)
