"""Wavelets and ties against known truth, within the Monte-Carlo error of independent repetitions."""

import math

import numpy as np
import pytest
import torch

from invgen.data import autocovariance, reflectivity, statistical_wavelet, well_tie
from invgen.noise import GaussianNoise
from invgen.operators import PostStack, ricker
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem
from invgen.solvers import PnPDM

F64 = torch.float64
TRUE = ricker((torch.arange(31, dtype=F64) - 15) * 0.004, 25.0).numpy()


def section(rng, n=400, width=60, sd=0.05, noise=0.0):
    """White reflectivity through the wavelet, plus white noise; and the reflectivity."""
    r = sd * rng.standard_normal((n + 30, width))
    d = np.stack([np.convolve(r[:, j], TRUE, "same")[15:-15] for j in range(width)], axis=1)
    return d + noise * rng.standard_normal(d.shape), r[15:-15]


def well(rng, n=260, start=40, length=400, shift=0, scale=1.0, noise=0.0, error=0.0):
    """A log and the trace it ties to: `start` and `shift` place the log, `error` is the sd of errors of its reflectivity."""
    r = 0.05 * rng.standard_normal(length)
    d = scale * np.convolve(r, TRUE, "same") + noise * rng.standard_normal(length)
    part = r[start : start + n] + error * rng.standard_normal(n)
    # the inverse of centred differences: r_i = (m_(i+1) − m_(i−1))/4
    m = np.zeros(n)
    m[1] = 0.01
    for i in range(1, n - 1):
        m[i + 1] = m[i - 1] + 4 * part[i]
    return np.roll(d, shift), m


def test_reflectivity_is_that_of_poststack():
    m = np.random.default_rng(0).standard_normal(30)
    direct = PostStack(torch.tensor([0.5], dtype=F64), (1, 30, 1))(torch.from_numpy(m)[None, None, :, None])
    np.testing.assert_allclose(reflectivity(m), direct[0, 0, :, 0].numpy(), atol=1e-14)


def test_statistical_wavelet_of_white_reflectivity():
    found = []
    for i in range(12):
        d, _ = section(np.random.default_rng(i), noise=0.02)
        silence = autocovariance(0.02 * np.random.default_rng(99 + i).standard_normal((400, 60)), 31)
        found.append(statistical_wavelet(d, 31, reflectivity_sd=0.05, noise=silence))
    mean = np.mean(found, axis=0)
    error = np.std(found, axis=0, ddof=1) / math.sqrt(len(found))
    np.testing.assert_allclose(mean, mean[::-1], atol=1e-12)  # zero phase
    assert np.corrcoef(mean, TRUE)[0, 1] > 0.995
    # the stated bias: the window on the autocorrelation shortens the wavelet, by a few percent of its peak
    assert (np.abs(mean - TRUE) < 4 * error + 0.08).all()
    assert abs(mean[15] / TRUE[15] - 1) < 0.06


def test_noise_that_is_not_taken_off_raises_the_wavelet():
    d, _ = section(np.random.default_rng(1), noise=0.1)
    silence = autocovariance(0.1 * np.random.default_rng(2).standard_normal((400, 60)), 31)
    raw, clean = (statistical_wavelet(d, 31, reflectivity_sd=0.05, noise=v) for v in (None, silence))
    # the true energy is known: the noise adds (0.1/0.05)² at time zero of the autocorrelation
    assert np.square(raw).sum() > np.square(TRUE).sum() + 2.0
    assert abs(np.square(clean).sum() / np.square(TRUE).sum() - 1) < 0.15


@pytest.mark.parametrize("shift", [-7, 0, 5])
def test_tie_finds_shift_and_wavelet(shift):
    for i in range(3):
        d, m = well(np.random.default_rng(i), shift=shift, noise=0.01)
        tie = well_tie(d, m, length=31, max_shift=12, first_sample=40, centring=0.05, smoothness=0.01)
        assert tie.shift == shift
        assert tie.correlation > 0.97
        assert np.corrcoef(tie.wavelet, TRUE)[0, 1] > 0.98
        assert abs(tie.wavelet[15] - 1) < 0.15


def test_scale_of_a_given_wavelet_is_unbiased_and_its_error_covers():
    scales, errors = [], []
    for i in range(150):
        rng = np.random.default_rng(i)
        d, m = well(rng, shift=3, scale=2.5)
        # noise in the band of the signal: three times the variance that white residuals would give the scale
        coloured = np.convolve(rng.standard_normal(len(d) + 40), TRUE / np.linalg.norm(TRUE), "same")[20:-20]
        tie = well_tie(d + 0.08 * coloured, m, wavelet=TRUE, max_shift=8, first_sample=40)
        assert tie.shift == 3
        scales.append(tie.scale)
        errors.append(tie.scale_error)
    scales, errors = np.array(scales), np.array(errors)
    spread = scales.std(ddof=1)
    assert abs(scales.mean() - 2.5) < 4 * spread / math.sqrt(150)
    # the sd of 150 repetitions has an error of 6 %; the error states the colour: white residuals would give another
    assert 0.75 < np.median(errors) / spread < 1.25
    inside = float((np.abs(scales - 2.5) < 1.96 * errors).mean())
    assert 0.86 < inside <= 1.0


def test_an_erroneous_log_lowers_the_scale_as_stated():
    ratio = 0.6
    scales = []
    for i in range(60):
        d, m = well(np.random.default_rng(i), noise=0.0, error=0.05 * ratio)
        scales.append(well_tie(d, m, wavelet=TRUE, max_shift=0, first_sample=40).scale)
    error = np.std(scales, ddof=1) / math.sqrt(len(scales))
    assert abs(np.mean(scales) - 1 / (1 + ratio**2)) < 4 * error


def test_scale_prior_is_log_normal_and_marginalises():
    d, m = well(np.random.default_rng(3), noise=0.1, scale=2.0)
    tie = well_tie(d, m, wavelet=TRUE, max_shift=2, first_sample=40)
    prior = tie.scale_prior()
    draws = prior.sample(4000, dtype=F64).flatten()
    assert (draws > 0).all()
    assert abs(float(draws.log().mean()) - math.log(tie.scale)) < 5 * tie.scale_error / tie.scale / math.sqrt(4000)
    wide = tie.scale_prior(relative_error=0.3)
    assert abs(float(wide.sample(4000, dtype=F64).log().std()) - 0.3) < 0.02
    # marginalised: with a field that is nearly known the posterior of the scale is that of the data
    field = GaussianPrior.diagonal(
        torch.linspace(0, 1, 24, dtype=F64).sin().reshape(1, 24, 1), torch.full((1, 24, 1), 1e-6, dtype=F64)
    )
    operator = PostStack(torch.ones(1, dtype=F64), (1, 24, 1))
    clean = operator(field.mean_u[None])
    problem = InverseProblem(1.6 * clean, operator, GaussianNoise(0.01), field, nuisance={"wavelet_scale": wide})
    posterior = PnPDM(iterations=60, inner=2, hold=60).solve(problem, 64, dtype=F64)
    found = posterior.theta["wavelet_scale"].flatten()
    width = 0.01 / float(clean.norm())
    assert abs(float(found.mean()) - 1.6) < 4 * width / math.sqrt(64) + 0.5 * width  # the prior pulls by (width/0.3)²
    assert 0.5 < float(found.std()) / width < 2.0


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: statistical_wavelet(np.ones((20, 3)), 30), "odd"),
        (lambda: statistical_wavelet(np.ones((20, 3)), 21), "20 samples"),
        (lambda: statistical_wavelet(np.full((60, 3), np.nan), 11), "not finite"),
        (lambda: statistical_wavelet(np.zeros((60, 3)), 11), "No power"),
        (lambda: well_tie(np.ones(300), np.arange(100.0), length=20), "odd"),
        (lambda: well_tie(np.ones(300), np.arange(50.0), length=31), "too few"),
        (lambda: well_tie(np.ones(300), np.arange(260.0), first_sample=100), "outside the trace"),
        (lambda: well_tie(np.ones(300), np.ones(200), first_sample=30), "constant"),
        (lambda: well_tie(np.full(300, np.nan), np.ones(200)), "finite"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_reversed_polarity_has_no_scale_prior():
    d, m = well(np.random.default_rng(0))
    tie = well_tie(-d, m, wavelet=TRUE, max_shift=0, first_sample=40)
    with pytest.raises(ValueError, match="polarity"):
        tie.scale_prior()
