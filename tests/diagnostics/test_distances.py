"""Sliced distances and kernel tests against definitions, closed forms and POT where it is installed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import cdist

from invgen.diagnostics import (
    kernels,
    max_sliced_wasserstein,
    mmd,
    permutation_test,
    sliced_wasserstein,
    wasserstein_1d,
)
from invgen.diagnostics._arrays import chunks


@pytest.fixture
def samples():
    rng = np.random.default_rng(0)
    return rng.normal(size=(40, 3)), 0.5 + rng.normal(size=(30, 3)) * [0.5, 1, 2]


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_different_sizes_are_the_repeated_samples(samples, p):
    x, y = samples
    got = wasserstein_1d(x, y, p)
    same = np.sort(np.repeat(x, 3, axis=0), 0), np.sort(np.repeat(y, 4, axis=0), 0)  # 120 points each
    np.testing.assert_allclose(got, np.mean(np.abs(same[0] - same[1]) ** p, 0) ** (1 / p), rtol=1e-12)
    if p == 1:
        np.testing.assert_allclose(got, [stats.wasserstein_distance(x[:, j], y[:, j]) for j in range(3)], rtol=1e-12)


def test_weights_are_repetitions(samples):
    x, y = samples
    count = np.random.default_rng(1).integers(0, 4, len(x))
    got = sliced_wasserstein(x, y, 20, x_weights=count)
    assert float(got) == pytest.approx(float(sliced_wasserstein(np.repeat(x, count, axis=0), y, 20)), rel=1e-10)
    assert float(sliced_wasserstein(x, y, 20, x_weights=np.ones(40))) == pytest.approx(
        float(sliced_wasserstein(x, y, 20)), rel=1e-10
    )


def test_translation_by_closed_form(samples):
    """W_p(θ) = |θ·v| for a sample and its translate by v."""
    x, _ = samples
    v = np.array([1.0, -2.0, 0.5])
    got = max_sliced_wasserstein(x, x + v, 50)
    np.testing.assert_allclose(got.per_direction, np.abs(got.directions @ v), rtol=1e-10)
    assert got.value == got.per_direction.max()
    mean = float(sliced_wasserstein(x, x + v, 20_000))
    assert mean == pytest.approx(np.linalg.norm(v) / np.sqrt(3), rel=0.03)
    climbed = max_sliced_wasserstein(x, x + v, 50, refine=60)
    assert climbed.value == pytest.approx(np.linalg.norm(v), rel=1e-3)


def test_refined_directions_find_the_difference():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(2000, 30)), rng.normal(size=(2000, 30))
    y[:, 4] *= 2.0
    plain, climbed = max_sliced_wasserstein(x, y, 100), max_sliced_wasserstein(x, y, 100, refine=80)
    assert abs(climbed.worst[4]) > 0.95
    assert climbed.value > 1.5 * plain.value
    assert climbed.value == pytest.approx(1.0, abs=0.15)  # W_2(N(0, 1), N(0, 4)) = 1


def test_agrees_with_pot(samples):
    ot = pytest.importorskip("ot", reason="POT is no dependency; the check runs where it is installed")
    x, y = samples
    lines = np.random.default_rng(3).normal(size=(25, 3))
    lines /= np.linalg.norm(lines, axis=1, keepdims=True)
    for p in (1, 2):
        options = {"p": p, "directions": lines}
        want = ot.sliced.sliced_wasserstein_distance(x, y, p=p, projections=lines.T)
        assert float(sliced_wasserstein(x, y, **options)) == pytest.approx(want, rel=1e-10)
        want = ot.sliced.max_sliced_wasserstein_distance(x, y, p=p, projections=lines.T)
        assert float(max_sliced_wasserstein(x, y, **options)) == pytest.approx(want, rel=1e-10)


def test_tensors_and_fields_and_precision(samples):
    x, y = samples
    want = float(sliced_wasserstein(x, y, 10))
    fields = torch.as_tensor(x).reshape(40, 1, 3).float(), torch.as_tensor(y).reshape(30, 1, 3).float()
    assert float(sliced_wasserstein(*fields, 10)) == pytest.approx(want, rel=1e-5)


def naive_mmd(x, y, h):
    def k(a, b):
        return np.exp(-cdist(a, b, "sqeuclidean") / 2 / h**2)

    n, m = len(x), len(y)
    return (k(x, x).sum() - n) / n / (n - 1) + (k(y, y).sum() - m) / m / (m - 1) - 2 * k(x, y).mean()


def test_mmd_is_its_definition(samples, monkeypatch):
    x, y = samples
    want = naive_mmd(x, y, 1.3)
    assert float(mmd(x, y, bandwidth=1.3)) == pytest.approx(want, rel=1e-10)
    assert float(mmd(x + 1e6, y + 1e6, bandwidth=1.3)) == pytest.approx(want, rel=1e-6)  # far from the origin
    both = np.concatenate([x, y])
    h = mmd(x, y, permutations=0).bandwidth
    assert h == pytest.approx(np.median(cdist(both, both)[np.triu_indices(70, 1)]), rel=0.01)
    whole = mmd(x, y, permutations=30)
    monkeypatch.setattr(kernels, "chunks", lambda rows, numbers: chunks(rows, numbers, limit=8 * numbers * 9))
    np.testing.assert_allclose(mmd(x, y, permutations=30).null, whole.null, atol=1e-14)


def test_permutations_are_distances_of_relabelled_points(samples):
    x, y = samples
    both = np.concatenate([x, y])
    rng = np.random.default_rng(0)
    labels = np.arange(70) < 40
    rows = rng.permuted(np.broadcast_to(labels, (5, 70)), axis=1)
    want = [naive_mmd(both[r], both[~r], 1.3) for r in rows]
    np.testing.assert_allclose(mmd(x, y, bandwidth=1.3, permutations=5, seed=0).null, want, atol=1e-12)


def test_two_sample_tests_keep_their_level_and_see_differences():
    rng = np.random.default_rng(4)
    p = np.array(
        [mmd(rng.normal(size=(40, 2)), rng.normal(size=(60, 2)), permutations=99, seed=s).p_value for s in range(300)]
    )
    assert (p <= 0.1).mean() < 0.1 + 4 * np.sqrt(0.09 / 300)
    assert (p <= 0.5).mean() > 0.5 - 4 * np.sqrt(0.25 / 300)
    x, y = rng.normal(size=(300, 2)), rng.normal(size=(300, 2)) * [1, 1.6]
    assert mmd(x, y).p_value == 1 / 201
    assert not mmd(x, y).passed

    def distance(a, b):
        return sliced_wasserstein(a, b, 10)

    assert not permutation_test(x, y, distance, permutations=100).passed
    assert permutation_test(x, rng.normal(size=(300, 2)), distance, permutations=100, level=1e-3).passed


def test_bad_input_says_what_to_do(samples):
    x, y = samples
    with pytest.raises(ValueError, match="at least 1"):
        sliced_wasserstein(x, y, p=0.5)
    with pytest.raises(ValueError, match=r"\(n, \*shape\)"):
        sliced_wasserstein(x, y[:, :2])
    with pytest.raises(ValueError, match="non-negative"):
        sliced_wasserstein(x, y, x_weights=-np.ones(40))
    with pytest.raises(ValueError, match="unit vectors"):
        sliced_wasserstein(x, y, directions=np.ones((4, 2)))
    with pytest.raises(ValueError, match="bandwidth"):
        mmd(np.zeros((5, 1)), np.zeros((5, 1)))
