"""The blind check of a well: nominal coverage, errors that count correlated samples, trends taken off."""

import math

import numpy as np
import pytest
import torch

from invgen.diagnostics import blind_well


def rough(rng, points, length):
    """A stationary series of variance one."""
    kernel = np.exp(-0.5 * (np.arange(-4 * length, 4 * length + 1) / length) ** 2)
    kernel /= np.linalg.norm(kernel)
    return np.convolve(rng.standard_normal(points + len(kernel) - 1), kernel, "valid")


def test_calibrated_draws_cover_the_nominal_share():
    """Truth and draws of one law: every point of the log is covered with probability (n + 1 − 2k)/(n + 1)."""
    for draws, nominal in ((19, 0.9), (99, 0.9), (9, 0.8)):
        found = []
        for i in range(60):
            rng = np.random.default_rng(i)
            centre = rough(rng, 120, 6)
            series = [centre + 0.4 * rough(rng, 120, 3) for _ in range(draws + 1)]
            found.append(blind_well(np.stack(series[1:]), series[0]))
        assert all(f.nominal == pytest.approx(nominal) for f in found)
        shares = np.array([f.coverage for f in found])
        assert abs(shares.mean() - nominal) < 4 * shares.std(ddof=1) / math.sqrt(len(found))
        # the stated error counts that neighbouring points are alike
        assert 0.6 < np.sqrt(np.mean([f.coverage_error**2 for f in found])) / shares.std(ddof=1) < 1.5


def test_error_of_the_correlation_is_that_of_repetitions():
    found = []
    for i in range(150):
        rng = np.random.default_rng(i)
        common = rough(rng, 200, 5)
        log = 0.6 * common + 0.8 * rough(rng, 200, 5)
        mean = 0.6 * common + 0.8 * rough(rng, 200, 5)
        found.append(blind_well(np.stack([mean - 1, mean + 1]), log))
    r = np.array([f.correlation for f in found])
    assert 0.7 < np.median([f.correlation_error for f in found]) / r.std(ddof=1) < 1.4


def test_a_trend_is_taken_off_both():
    rng = np.random.default_rng(0)
    trend = np.linspace(0, 20, 150)
    log = trend + rng.standard_normal(150)
    check = blind_well(torch.from_numpy(trend + rng.standard_normal((19, 150))), log, trend=trend)
    assert check.correlation > 0.95
    assert abs(check.detrended) < 4.5 * check.detrended_error
    assert "without the trend" in str(check)
    plain = blind_well(np.stack([log, log + 1]), log)
    assert math.isnan(plain.detrended)
    assert plain.rms == pytest.approx(0.5)
    assert plain.width == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("samples", "log", "says"),
    [
        (np.ones((19, 5)), np.ones(6), "points"),
        (np.ones((1, 5)), np.ones(5), "at least 2"),
        (np.full((3, 5), np.nan), np.ones(5), "NaN"),
    ],
)
def test_bad_input_is_named(samples, log, says):
    with pytest.raises(ValueError, match=says):
        blind_well(samples, log)
