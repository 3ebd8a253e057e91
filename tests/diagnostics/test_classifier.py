"""Classifier two-sample test: the best accuracy in closed form, and sbibm's definition."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from invgen.diagnostics import c2st


def test_accuracy_is_the_best_there_is():
    """N(0, I) against N(δ e, I): Φ(δ/2)."""
    rng = np.random.default_rng(0)
    n, delta = 800, 1.5
    x, y = rng.normal(size=(n, 2)), rng.normal(size=(n, 2)) + [delta, 0]
    best = stats.norm.cdf(delta / 2)
    got = c2st(x, y)
    se = np.sqrt(best * (1 - best) / (2 * n))
    assert got.accuracy < best + 4 * se
    assert got.accuracy > best - 4 * se - 0.01  # the network is not quite the best classifier
    assert not got.passed
    assert got.accuracy == pytest.approx(got.folds.mean())


def test_non_linear_differences_are_seen():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(600, 3)), 0.6 * rng.normal(size=(600, 3))
    assert float(c2st(x, y)) > 0.68


def test_same_law_passes_and_disjoint_laws_do_not():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(500, 2)), rng.normal(size=(500, 2))
    same = c2st(x, y, epochs=20, level=1e-3)
    assert same.passed
    assert abs(float(same) - 0.5) < 4 * 1.5 / (2 * np.sqrt(1000))
    assert float(c2st(x, y + 20, epochs=20)) == 1.0


def test_p_values_keep_their_level():
    rng = np.random.default_rng(3)
    p = [c2st(rng.normal(size=(60, 2)), rng.normal(size=(60, 2)), epochs=15).p_value for _ in range(60)]
    assert np.mean(np.array(p) <= 0.1) < 0.1 + 4 * np.sqrt(0.09 / 60)


def test_units_do_not_matter():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(300, 2)), rng.normal(size=(300, 2)) + 1
    scaled = c2st(x * [1e3, 1e-3] + 5, y * [1e3, 1e-3] + 5, epochs=10)
    assert float(scaled) == pytest.approx(float(c2st(x, y, epochs=10)), abs=0.02)


def test_sbibm_definition():
    """Written out with scikit-learn: z-scores of the first sample, two layers of 10·dim, five shuffled folds."""
    network = pytest.importorskip("sklearn.neural_network")
    from sklearn.model_selection import KFold

    rng = np.random.default_rng(5)
    x, y = 4 + 3 * rng.normal(size=(60, 1)), 4 + 6 * rng.normal(size=(60, 1))
    points = (np.concatenate([x, y]) - x.mean(0)) / x.std(0, ddof=1)
    labels = np.repeat([0.0, 1.0], 60)
    scores = []
    for train, test in KFold(5, shuffle=True, random_state=1).split(points):
        fit = network.MLPClassifier(
            hidden_layer_sizes=(10, 10), activation="relu", solver="adam", max_iter=10_000, random_state=1
        ).fit(points[train], labels[train])
        scores.append((fit.predict(points[test]) == labels[test]).mean())
    np.testing.assert_allclose(c2st(x, y, method="sbibm").folds, scores, atol=1e-12)


def test_bad_input_says_what_to_do():
    with pytest.raises(ValueError, match="'sbibm' or 'fast'"):
        c2st(np.zeros((9, 1)), np.zeros((9, 1)), method="mlp")
    with pytest.raises(ValueError, match="folds"):
        c2st(np.zeros((3, 1)), np.zeros((3, 1)))
