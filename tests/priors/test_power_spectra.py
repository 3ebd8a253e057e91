"""Fields given by a power spectrum."""

import numpy as np
import pytest
import torch

from invgen.priors.covariance_models import Exponential, Gaussian, Matern, Spherical
from invgen.priors.power_spectra import spectral_density, spectrum_field

torch.set_num_threads(1)


@pytest.mark.parametrize(
    "model",
    [
        Matern(nu=2.5, length=(4.0, 6.0), angle=25.0, variance=2.0),
        Gaussian(length=3.0) + Matern(nu=1.5, length=5.0, variance=0.5),
    ],
)
def test_the_spectrum_of_a_covariance_gives_the_covariance(model):
    """Smooth models on a grid that is fine and wide against their length: what aliases is under 1 %."""
    field = spectrum_field(spectral_density(model), (1, 96, 96))
    e = torch.zeros(1, 1, 96, 96, dtype=torch.float64)
    e[0, 0, 48, 48] = 1
    row = field.covariance_u.apply(e)[0, 0].numpy()[38:59, 38:59]
    lags = np.stack(np.meshgrid(np.arange(-10, 11), np.arange(-10, 11), indexing="ij"), -1).astype(float)
    assert np.abs(row - model(lags)).max() < 0.01 * model.sill


def test_units_of_length():
    """The same field on a grid of half the spacing has twice the lag in samples."""
    model = Matern(nu=2.5, length=8.0)
    field = spectrum_field(spectral_density(model), (1, 256), spacing=(0.5,))
    e = torch.zeros(1, 1, 256, dtype=torch.float64)
    e[0, 0, 0] = 1
    row = field.covariance_u.apply(e)[0, 0]
    assert float(row[16]) == pytest.approx(float(model(np.array([[8.0]]))[0]), abs=1e-3)


def test_bad_spectra():
    shape = (1, 8, 8)
    for power, words in (
        (lambda w: -np.ones(w.shape[:-1]), "non-negative"),
        (lambda w: np.full(w.shape[:-1], np.inf), "finite"),
        (lambda w: np.ones(3), "shape"),
        (lambda w: 2 + np.sin(w[..., 0]), "even"),
    ):
        with pytest.raises(ValueError, match=words):
            spectrum_field(power, shape)
    with pytest.raises(TypeError, match="closed form"):
        spectral_density(Exponential() + Spherical())
