"""Corner plots: contours hold the mass they say, quantiles are those of the draws, and every panel can be read."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.axes import Axes

from invgen.report import corner_plot, mass_levels
from invgen.report.corner import _density, _number, _quantiles


def gaussian(n: int, seed: int = 0, rho: float = 0.95) -> np.ndarray:
    z = np.random.default_rng(seed).normal(size=(n, 2))
    return np.stack([1.2 + 0.01 * z[:, 0], 0.8 + 0.3 * (rho * z[:, 0] + math.sqrt(1 - rho**2) * z[:, 1])], 1)


def test_levels_of_a_gaussian_are_known() -> None:
    x = np.linspace(-6, 6, 601)
    density = np.exp(-0.5 * (x[:, None] ** 2 + (x[None] / 0.7) ** 2))
    # on cells of 0.02 the mass between two neighbouring levels is far below 1e-3
    np.testing.assert_allclose(mass_levels(density, (0.5, 0.68, 0.95)), (0.5, 0.32, 0.05), atol=1e-3)


def test_contours_hold_their_mass_of_correlated_draws() -> None:
    """The density of one set of draws, filled with another: sd of a share √(p(1−p)/n), widening by √(1+h²) beside it."""
    draws, others = gaussian(20000), gaussian(20000, seed=1)
    limits = [(1.15, 1.25), (-0.6, 2.2)]
    density, (y, x) = _density([draws[:, 0], draws[:, 1]], np.full(len(draws), 1 / len(draws)), limits)
    assert density.sum() == pytest.approx(1, abs=1e-3)
    h = 0.7 * len(draws) ** (-1 / 6)
    steps = [y[1] - y[0], x[1] - x[0]]
    extra = np.diag([(0.8 * s) ** 2 for s in steps])
    wide = math.sqrt(np.linalg.det(np.cov(draws.T) * (1 + h**2) + extra) / np.linalg.det(np.cov(draws.T)))
    i = ((others[:, 0] - y[0]) / steps[0] + 0.5).astype(int)
    j = ((others[:, 1] - x[0]) / steps[1] + 0.5).astype(int)
    for p, level in zip((0.68, 0.95), mass_levels(density, (0.68, 0.95))):
        share = float((density[i, j] >= level).mean())
        expected = 1 - (1 - p) ** wide  # a Gaussian region of area scaled by `wide`
        assert share == pytest.approx(expected, abs=4 * math.sqrt(p * (1 - p) / len(others)) + 0.01)


def test_weighted_quantiles_are_those_of_repeated_draws() -> None:
    values, repeats = np.array([3.0, 1.0, 2.0, 7.0]), np.array([400, 100, 300, 200])
    got = _quantiles(values, repeats / repeats.sum(), (0.16, 0.5, 0.84))
    assert got[1] == pytest.approx(2.0 + (0.5 - 0.25) / 0.35, rel=1e-12)  # between the midpoints 0.25 and 0.6
    draws = np.random.default_rng(0).normal(size=1001)
    np.testing.assert_allclose(
        _quantiles(draws, np.full(1001, 1 / 1001), (0.16, 0.5, 0.84)), np.quantile(draws, (0.16, 0.5, 0.84)), atol=5e-3
    )


def test_titles_show_the_digits_that_matter() -> None:
    assert _number(1.188, 1.2, 1.213, 2) == "$1.200^{+0.013}_{-0.012}$"
    assert _number(100.0, 250.0, 400.0, 2) == "$250^{+150}_{-150}$"
    assert _number(2.0, 2.0, 2.0, 2) == "2"


def test_several_posteriors_with_truth() -> None:
    named = {"theta": gaussian(500)[:, 0], "q": gaussian(500)[:, 1].reshape(5, 100)}
    figure = corner_plot(
        {"a": named, "b": {"q": gaussian(400, 1)[:, 1], "theta": gaussian(400, 1)[:, 0]}},
        truth={"theta": 1.2, "q": 0.8},
        labels={"theta": "Einstein radius [arcsec]"},
    )
    axes = [a for a in figure.axes if isinstance(a, Axes)]
    assert len(axes) == 4
    assert axes[2].get_xlabel() == "Einstein radius [arcsec]"
    assert axes[2].get_ylabel() == "q"
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == ["a", "b", "truth"]


def test_arrays_and_weights() -> None:
    draws = np.random.default_rng(0).uniform(size=(2000, 3))
    figure = corner_plot(draws, ("a", "b", "c"), weights=draws[:, 0], truth=(0.5, 0.5, 0.5))
    low, high = figure.axes[0].get_xlim()
    assert low < 0.01 < 0.99 < high
    # the median of the density 2 a is √½, its standard error 0.5 / (√n_eff 2 √½) with n_eff = ¾ n
    median = float(figure.axes[0].texts[0].get_text().strip("$").split("^")[0])
    assert median == pytest.approx(math.sqrt(0.5), abs=4 * 0.5 / (math.sqrt(1500) * math.sqrt(2)) + 0.005)
    assert corner_plot(np.ones((20, 1)), ("constant",)) is not None


@pytest.mark.parametrize(
    ("given", "names", "more", "sentence"),
    [
        (np.zeros((5, 2)), (), {}, "ten draws"),
        (np.full((20, 2), np.nan), (), {}, "not finite"),
        (np.zeros((20, 2)), ("a",), {}, "1 names were given for 2"),
        (np.zeros((20, 2, 2)), (), {}, "are \\(n, dim\\)"),
        ({"a": {"x": np.zeros(20)}, "b": {"y": np.zeros(20)}}, (), {}, "no parameter 'x'"),
        (np.zeros((20, 2)), (), {"weights": np.ones(3)}, "20 non-negative weights"),
        (np.zeros((20, 2)), (), {"truth": (1.0,)}, "1 true values"),
        (np.zeros((20, 2)), (), {"levels": (68,)}, "between 0 and 1"),
        ({}, (), {}, "none was given"),
    ],
)
def test_bad_input_is_one_sentence(given: object, names: tuple[str, ...], more: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        corner_plot(given, names, **more)
