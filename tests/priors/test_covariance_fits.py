"""Fitted covariances: the right loss on average, known parameters found, directions, data that cannot be."""

import math

import numpy as np
import pytest
import torch

from invgen.priors.covariance_fits import Variogram, experimental_variogram, fit_variogram, fit_whittle
from invgen.priors.covariance_models import Exponential, Matern, Nugget, Spherical
from invgen.priors.random_field import RandomField

torch.set_num_threads(1)


def test_an_exact_variogram_gives_its_model_back():
    truth = Spherical(length=12.0, variance=2.0) + Nugget(variance=0.4)
    lags = np.zeros((15, 2))
    lags[:, 0] = np.arange(1, 16)
    curve = Variogram(lags, truth.sill - truth(lags), np.full(15, 100))
    fitted = fit_variogram(Spherical(length=5.0) + Nugget(variance=0.1), curve)
    np.testing.assert_allclose(
        [fitted.parts[0].length, fitted.parts[0].variance, fitted.parts[1].variance], [12.0, 2.0, 0.4], rtol=1e-3
    )
    slow = fit_variogram(
        Matern(nu=0.8, length=2.0),
        Variogram(lags, 1 - Matern(nu=1.5, length=4.0)(lags), np.full(15, 9)),
        free=("length", "nu"),
    )
    np.testing.assert_allclose([slow.nu, slow.length], [1.5, 4.0], rtol=1e-2)


def test_experimental_variogram_by_hand():
    points = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [5.0, 0.0], [9.0, 9.0]])
    values = np.array([0.0, 1.0, 3.0, 2.0, math.nan])
    v = experimental_variogram(points, values, width=2.0, classes=3)
    np.testing.assert_allclose(v.pairs, [3, 3])  # lags 1, 1, √2; and 5, 4, √26
    np.testing.assert_allclose(v.gamma, [(0.5 + 4.5 + 2.0) / 3, (2.0 + 0.5 + 0.5) / 3])
    east = experimental_variogram(points, values, width=2.0, classes=3, direction=(1.0, 0.0), tolerance=10)
    np.testing.assert_allclose(east.lags[0], [1.0, 0.0])
    np.testing.assert_allclose(east.gamma[0], 0.5)
    axes = v.plot(model=Exponential(length=2.0), unit="m")
    assert axes.get_xlabel() == "lag [m]"
    assert len(axes.lines) == 1
    with pytest.raises(ValueError, match="two values"):
        experimental_variogram(points[:1], values[:1], width=1.0)
    with pytest.raises(ValueError, match="No pair"):
        experimental_variogram(points, values, width=0.01, classes=2)


def test_directions_are_fitted_together():
    truth = Exponential(length=(3.0, 9.0), variance=1.5)
    curves = []
    for axis in range(2):
        lags = np.zeros((12, 2))
        lags[:, axis] = np.arange(1, 13)
        curves.append(Variogram(lags, truth.sill - truth(lags), np.full(12, 50)))
    fitted = fit_variogram(Exponential(length=(5.0, 5.0)), curves)
    np.testing.assert_allclose([*fitted.length, fitted.variance], [3.0, 9.0, 1.5], rtol=1e-3)


def test_whittle_finds_the_parameters_of_small_fields_without_bias():
    """Sixty fields of 20 × 24: length and variance within 8 %; a plain periodogram fit is off by more (edges)."""
    truth = Matern(nu=1.0, length=(2.0, 3.0), variance=2.0)
    x = RandomField(truth, (1, 20, 24), mean=4.0).sample(60, seed=1)
    fitted = fit_whittle(Matern(nu=1.0, length=(4.0, 4.0)), x, spacing=(1.0, 1.0), mean=4.0)
    np.testing.assert_allclose([*fitted.length, fitted.variance], [2.0, 3.0, 2.0], rtol=0.08)


def test_bad_fields():
    for x, words in ((torch.zeros(2, 5), "axes"), (torch.full((2, 5, 5), math.nan), "NaN")):
        with pytest.raises(ValueError, match=words):
            fit_whittle(Matern(), x, spacing=(1.0, 1.0))
    with pytest.raises(ValueError, match="none of the parameters"):
        fit_whittle(Matern(), torch.randn(2, 5, 5), spacing=(1.0, 1.0), free=("alpha",))


def test_a_free_order_in_a_sum_leaves_the_exponential_alone():
    h = np.linspace(0.5, 20.0, 40)[:, None]
    truth = Exponential(length=3.0) + Matern(nu=1.5, length=6.0)
    semivariance = truth.sill - truth(h)
    template = Exponential(length=2.0) + Matern(nu=1.0, length=5.0)
    found = fit_variogram(template, Variogram(h, semivariance, np.full(40, 1000)), free=("variance", "length", "nu"))
    assert type(found.parts[0]) is Exponential
