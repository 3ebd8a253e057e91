"""Scores against sums over pairs and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from invgen.diagnostics import crps, energy_score, scores
from invgen.diagnostics._arrays import chunks


def pairs(x, y, beta=1.0):
    """The fair estimator by its definition."""
    near = np.mean([np.linalg.norm(np.atleast_1d(a - y)) ** beta for a in x])
    apart = [np.linalg.norm(np.atleast_1d(a - b)) ** beta for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
    return near - 0.5 * np.mean(apart)


def test_sorted_sums_are_the_sums_over_pairs(monkeypatch):
    rng = np.random.default_rng(0)
    y, x = rng.normal(size=(7, 2, 3)), 3 + rng.normal(size=(7, 9, 2, 3))
    want = [[[pairs(x[i, :, a, b], y[i, a, b]) for b in range(3)] for a in range(2)] for i in range(7)]
    np.testing.assert_allclose(crps(y, x).values, want, rtol=1e-12)
    want = [pairs(x[i].reshape(9, -1), y[i].reshape(-1), 1.3) for i in range(7)]
    np.testing.assert_allclose(energy_score(y, torch.as_tensor(x), beta=1.3).values, want, rtol=1e-12)
    monkeypatch.setattr(scores, "chunks", lambda rows, numbers: chunks(rows, numbers, limit=8 * 20 * 2))
    np.testing.assert_allclose(energy_score(y, x, beta=1.3).values, want, rtol=1e-12)


def test_one_dimension_has_one_score():
    rng = np.random.default_rng(1)
    y, x = rng.normal(size=(20, 1)), rng.normal(size=(20, 30, 1))
    np.testing.assert_allclose(energy_score(y, x).values, crps(y, x).values[:, 0], rtol=1e-12)


@pytest.mark.parametrize("draws", [2, 20])
def test_unbiased_for_any_number_of_draws(draws):
    """CRPS of N(0, 1) at y: y (2Φ(y) − 1) + 2φ(y) − 1/√π (Gneiting & Raftery 2007, section 4.2)."""
    n, y = 40_000, 0.7
    want = y * (2 * stats.norm.cdf(y) - 1) + 2 * stats.norm.pdf(y) - 1 / np.sqrt(np.pi)
    got = crps(np.full(n, y), np.random.default_rng(2).normal(size=(n, draws)))
    assert abs(float(got) - want) < 4.5 * got.mc_error


def test_the_truth_scores_best():
    rng = np.random.default_rng(3)
    n = 20_000
    y, white = rng.normal(size=(n, 2)), rng.normal(size=(n, 4, 2))
    right = energy_score(y, white).values
    for wrong in (0.7 * white, 1.4 * white, white + 0.3, np.stack([white[..., 0], white[..., 0]], -1)):
        worse = energy_score(y, wrong).values - right
        assert worse.mean() > 4 * worse.std() / np.sqrt(n)


def test_bad_input_says_what_to_do():
    with pytest.raises(ValueError, match="two draws"):
        crps(np.zeros(3), np.zeros((3, 1)))
    with pytest.raises(ValueError, match="beta"):
        energy_score(np.zeros((3, 1)), np.zeros((3, 4, 1)), beta=2)
