"""Field statistics against laws and shapes whose values are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from invgen.diagnostics.fields import (
    connectivity_function,
    minkowski,
    multipoint_distance,
    multipoint_histogram,
    proportions,
    two_point_probability,
    variogram,
)
from invgen.diagnostics.shapes import channel_width, sinuosity


def test_variogram_of_an_exponential_field():
    """γ(h) = s² (1 − e^(−h/r)) along either axis, within 4.5 standard errors at every lag."""
    g = torch.Generator().manual_seed(0)
    n = 48
    lag = (torch.arange(n)[:, None] - torch.arange(n)).abs().double()
    across, along = torch.exp(-lag / 5), torch.exp(-lag / 2)
    xi = torch.randn(400, n, n, generator=g, dtype=torch.float64)
    x = 1.5 * torch.linalg.cholesky(across) @ xi @ torch.linalg.cholesky(along).T
    for axis, reach in (("y", 5), ("x", 2)):
        curve = variogram(x, axis=axis, max_lag=12)
        expected = 2.25 * (1 - np.exp(-curve.lags / reach))
        assert curve.mean[0] == 0
        assert np.all(np.abs(curve.mean - expected)[1:] < 4.5 * curve.error[1:])


def test_independent_pixels():
    """Of independent pixels with probability p: S₂ = p², patterns factorise, the Euler density is a polynomial of p."""
    p, n = 0.3, 64
    x = (torch.rand(300, 1, n, n, generator=torch.Generator().manual_seed(1)) < p).float()
    shares = proportions(x)
    assert shares.shape == (300, 2)
    assert abs(shares[:, 1].mean() - p) < 4.5 * math.sqrt(p * (1 - p) / (300 * n * n))
    curve = two_point_probability(x, max_lag=5)
    assert np.all(np.abs(curve.mean[1:] - p**2) < 4.5 * curve.error[1:])
    histogram = multipoint_histogram(x, template=(2, 2))
    ones = np.array([bin(k).count("1") for k in range(16)])
    exact = p**ones * (1 - p) ** (4 - ones)
    assert multipoint_distance(histogram, exact) < 1e-5
    q = 1 - p
    found = minkowski(x)
    euler = (1 - q**4) - 2 * (1 - q**2) + p
    for name, value in (("area", p), ("euler", euler)):
        each = found[name]
        assert abs(each.mean() - value) < 4.5 * each.std() / math.sqrt(300)
    edges = 2 * (n - 1) * n / n**2 * 2 * p * q
    assert abs(found["perimeter"].mean() - edges) < 4.5 * found["perimeter"].std() / math.sqrt(300)


def test_connectivity_of_bars():
    """Horizontal bars are connected along x at every lag, and across them only within a bar."""
    x = np.zeros((2, 20, 30))
    x[:, 2:5] = x[:, 10:13] = 1
    along, across = connectivity_function(x, axis="x", max_lag=15), connectivity_function(x, axis="y", max_lag=10)
    np.testing.assert_array_equal(along.mean, 1.0)
    np.testing.assert_array_equal(across.each[0, :3], 1.0)
    assert across.each[0, 8] == 0.0  # 8 apart: the two bars
    assert math.isnan(across.each[0, 4])  # 4 apart: no pair inside
    touching = np.zeros((1, 6, 6))
    touching[0, [1, 2], [1, 2]] = 1
    assert connectivity_function(touching, max_lag=2).each[0, 0] == 1.0


def test_euler_characteristic_counts_components_minus_holes():
    x = np.zeros((3, 24, 24))
    x[0, 3:6, 3:6] = x[0, 10:14, 10:15] = 1  # two components
    x[1, 4:12, 4:12] = 1
    x[1, 6:8, 6:8] = 0  # a ring
    x[2, 5, 5] = x[2, 6, 6] = 1  # touching at a corner: one
    np.testing.assert_allclose(minkowski(x)["euler"] * 23 * 23, [2, 0, 1], atol=1e-9)


@pytest.mark.parametrize("width", [3, 4, 7])
def test_width_of_bars(width):
    x = np.zeros((1, 40, 40))
    x[0, 15 : 15 + width] = 1
    assert channel_width(x)[0] == pytest.approx(width, abs=1e-9)
    assert channel_width(x.transpose(0, 2, 1))[0] == pytest.approx(width, abs=1e-9)


def test_sinuosity_of_a_straight_and_a_winding_channel():
    ny, nx = 64, 128
    column = np.arange(nx)
    for amplitude in (0.0, 12.0):
        centre = ny / 2 + amplitude * np.sin(2 * np.pi * column / 64)
        x = (np.abs(np.arange(ny)[:, None] - centre) < 4.0)[None].astype(float)
        slope = amplitude * 2 * np.pi / 64 * np.cos(2 * np.pi * column / 64)
        exact = np.sqrt(1 + slope**2).mean()
        assert sinuosity(x)[0] == pytest.approx(exact, rel=0.12)  # eight directions: up to 8 % long
    assert math.isnan(sinuosity(np.zeros((1, 8, 8)))[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: variogram(np.zeros((4, 3, 8, 8))), "shape"),
        (lambda: variogram(np.zeros((4, 8, 8)), axis="z"), "axis"),
        (lambda: variogram(np.zeros((4, 8, 8)), max_lag=8), "max_lag"),
        (lambda: proportions(np.full((2, 4, 4), 0.5), classes=3), "whole numbers"),
        (lambda: multipoint_histogram(np.zeros((2, 4, 4)), template=(5, 5)), "template"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
