"""Noise levels and covariances against known truth, within the Monte-Carlo error of independent repetitions."""

import math

import numpy as np
import pytest
import torch
from scipy.signal import filtfilt, lfilter
from scipy.signal.windows import dpss

from invgen.contracts import LinearOperator
from invgen.covariance import BlockDiagonal, Kronecker, Scalar
from invgen.data import autocovariance, noise_covariance, prediction_level, trace_difference_level, wavelet_level
from invgen.kronecker import toeplitz
from invgen.noise import GaussianNoise
from invgen.operators import PostStack, Smooth, ricker, stack

torch.set_num_threads(1)
F64 = torch.float64
SD = 0.7


def events(nt=200, nx=120, slopes=(0.0, 0.0, 0.0), frequency=20):
    """Reflections that cross the section: Ricker wavelets at 4 ms, dips in samples a trace."""
    t, x = np.arange(nt)[:, None], np.arange(nx)[None]
    out = np.zeros((nt, nx))
    for k, slope in enumerate(slopes):
        a = (math.pi * frequency * 0.004 * (t - 40 - 50 * k - slope * x)) ** 2
        out += 10 * (1 - 2 * a) * np.exp(-a)
    return out


def repeated(estimate, make, n=40):
    """Levels of n repetitions and the standard errors they state."""
    found = [estimate(make(np.random.default_rng(100 + i))) for i in range(n)]
    return np.array([f.sd for f in found]), np.array([f.standard_error for f in found])


def assert_level(levels, expected, sigmas=4.0):
    error = levels.std(ddof=1) / math.sqrt(len(levels))
    assert abs(levels.mean() - expected) < sigmas * error + 1e-12, (levels.mean(), expected, error)


def white(shape=(200, 120)):
    return lambda rng: SD * rng.standard_normal(shape)


def coloured(rho_t, rho_x, shape=(200, 120)):
    """AR(1) in time and along traces, variance SD²; the start is drawn from the stationary law."""

    def make(rng):
        v = rng.standard_normal((shape[0] + 100, shape[1] + 100))
        v = lfilter([math.sqrt(1 - rho_t**2)], [1, -rho_t], v, axis=0)
        v = lfilter([math.sqrt(1 - rho_x**2)], [1, -rho_x], v, axis=1)
        return SD * v[100:, 100:]

    return make


def test_trace_differences_find_the_level_under_flat_reflections():
    levels, errors = repeated(trace_difference_level, lambda rng: events() + white()(rng))
    assert_level(levels, SD)
    # the jackknife's error is that of the repetitions: their sd has itself an error of 11 %
    assert 0.6 < np.median(errors) / levels.std(ddof=1) < 1.6


def test_lateral_coherence_lowers_the_difference_level_by_the_stated_factor():
    make = coloured(0.5, 0.6)
    levels, _ = repeated(trace_difference_level, make)
    assert_level(levels, SD * math.sqrt(1 - 0.6))
    assert_level(repeated(lambda d: trace_difference_level(d, correlation=0.6), make)[0], SD)
    assert_level(repeated(lambda d: trace_difference_level(d, lag=3), make)[0], SD * math.sqrt(1 - 0.6**3))


def test_wavelet_details_find_white_noise_and_the_colour_near_nyquist():
    assert_level(repeated(wavelet_level, lambda rng: events(frequency=6) + white()(rng))[0], SD, sigmas=5.0)
    # 20 Hz at ten times the noise is not smooth enough for two vanishing moments: the stated bias
    assert repeated(wavelet_level, lambda rng: events() + white()(rng), 3)[0].mean() > 1.05 * SD
    haar = repeated(lambda d: wavelet_level(d, wavelet="haar"), coloured(0.6, 0.0))[0]
    assert_level(haar, SD * math.sqrt(1 - 0.6))
    one = wavelet_level(SD * np.random.default_rng(3).standard_normal(4000))
    assert abs(one.sd - SD) < 4 * one.standard_error


def test_prediction_removes_dipping_events_that_differences_take_for_noise():
    make = lambda rng: events(slopes=(0.7, -0.5, 0.3)) + white()(rng)  # noqa: E731
    dipping = repeated(prediction_level, make)[0].mean()
    assert abs(dipping / SD - 1) < 0.05  # the stated biases: up by signal left over, down by p/2M = 0.04
    assert repeated(trace_difference_level, make, 3)[0].mean() > 1.05 * SD
    alone = repeated(prediction_level, white())[0].mean() / SD
    assert 0.94 < alone < 0.99
    colour = repeated(prediction_level, coloured(0.8, 0.0))[0].mean() / SD
    assert 0.93 < colour < 1.0  # the colour in time does not matter


def test_covariance_of_a_window_has_the_stated_mean():
    rho_t, rho_x, n = 0.6, 0.4, 60
    make, shape, lags = coloured(rho_t, rho_x, (90, 50)), (1, 12, 9), (18, 12)
    dense = torch.stack(
        [
            noise_covariance(make(np.random.default_rng(i)), shape, lags=lags, nugget=0.02).dense()[0].reshape(12, 9)
            for i in range(n)
        ]
    )
    error = dense.std(0) / math.sqrt(n)

    def mean(rho, lags, size, window):
        """ω(k) ρ^k without its white share, by the spectrum, as the module states it."""
        length = min(window, 2 * lags)
        tapers, inside = dpss(length, 2 * length / lags, 4, return_ratios=True)
        tapers = tapers[inside > 1 - 1e-4]
        omega = sum(np.correlate(h, h, "full")[length - 1 :] for h in tapers) / len(tapers)
        c = np.zeros(2 * length)  # the period of the spectrum: these data are shorter than a segment
        c[:length] = omega * rho ** np.arange(length)
        c[length + 1 :] = c[1:length][::-1]
        S = np.fft.rfft(c).real
        assert S.min() > 0.02
        c = np.fft.irfft(S - 0.02)[:size]
        return torch.from_numpy(c / c[0])

    want = 0.98 * SD**2 * torch.outer(mean(rho_t, 18, 12, 90), mean(rho_x, 12, 9, 50))
    want[0, 0] += 0.02 * SD**2
    # products of two estimates: their mean is off by their covariance, of the order 1/(independent samples)
    assert ((dense.mean(0) - want).abs() < 4.5 * error + 0.01 * SD**2).all()


@pytest.mark.parametrize("floor", [0.01, 0.1])
def test_noise_that_low_pass_filters_left_over_a_white_floor_has_chi2_of_one(floor):
    """Leakage of the window, or a white share that enters time, space and the nugget, makes R too wide: 0.6 to 0.8."""
    pad = 40

    def make(seed, shape):
        rng = np.random.default_rng(seed)
        v = rng.standard_normal([n + 2 * pad for n in shape])
        for axis, length in enumerate((10, 5)):
            box = np.ones(length) / length
            v = filtfilt(box, 1, v, axis=axis) / np.sqrt(np.square(np.convolve(box, box)).sum())
        inner = v[pad:-pad, pad:-pad]
        return torch.from_numpy(math.sqrt(1 - floor) * inner + math.sqrt(floor) * rng.standard_normal(shape))

    means = []
    for i in range(6):
        R = noise_covariance(make(i, (128, 128)), (1, 48, 48), lags=(60, 30), nugget=floor)
        fresh = torch.stack([make(100 + 10 * i + j, (48, 48)) for j in range(3)])
        means.append(float(R.whiten(fresh[:, None]).square().mean()))
    error = np.std(means, ddof=1) / math.sqrt(len(means))
    # the spectrum is smoothed over ±2/L: five per cent of bias at the edges of the band
    assert abs(np.mean(means) - 1) < 0.05 + 4 * error, (np.mean(means), error)


def test_autocovariance_is_the_biased_sum():
    v = torch.randn(5, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    c = autocovariance(v, 3)
    torch.testing.assert_close(c[2], (v[2:] * v[:-2]).sum() / 15)
    torch.testing.assert_close(autocovariance(v, 2, axis=1)[1], (v[:, 1:] * v[:, :-1]).sum() / 15)


def test_estimated_noise_is_white_after_whitening_and_solves_directly():
    make = coloured(0.6, 0.4, (120, 60))
    R = noise_covariance(make(np.random.default_rng(0)), (1, 40, 30), lags=(24, 15))
    assert isinstance(R, Kronecker)
    fresh = torch.stack([torch.from_numpy(make(np.random.default_rng(50 + i))[:40, :30].copy()) for i in range(40)])
    chi2 = R.whiten(fresh[:, None]).square().flatten(1).mean(1)
    assert abs(float(chi2.mean()) - 1) < 0.1
    noise = GaussianNoise(covariance=R)
    problem_operator = PostStack(ricker((torch.arange(9, dtype=F64) - 4) * 0.004, 30.0), (1, 40, 30))
    rhs = torch.randn(2, 1, 40, 30, dtype=F64, generator=torch.Generator().manual_seed(1))
    solved = problem_operator.solve(rhs, noise.covariance((1, 40, 30)), 0.3)
    assert solved.iterations == 0  # a direct solve


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("channels", [1, 2])
def test_coloured_solves_equal_dense_algebra(joint, channels):
    shape = (channels, 9, 7)
    g = torch.Generator().manual_seed(2)
    R = Kronecker(
        toeplitz(0.5 * 0.6 ** torch.arange(9, dtype=F64), 9),
        toeplitz(0.4 ** torch.arange(7, dtype=F64), 7),
        shape,
        nugget=0.01,
    )
    seismic = PostStack(ricker((torch.arange(5, dtype=F64) - 2) * 0.004, 30.0), shape) * -1.5
    operator: LinearOperator = stack(seismic, Smooth(shape, (3, 2))) if joint else seismic
    noise = BlockDiagonal([R, Scalar(0.05, shape)]) if joint else R
    C = [0.7, 2.0]
    A, full = operator.to_dense(), noise.dense()
    for name, size in (("solve", operator.data_shape), ("solve_model", shape)):
        rhs = torch.randn(2, *size, generator=g, dtype=F64)
        got = getattr(operator, name)(rhs, noise, torch.tensor(C, dtype=F64))
        assert got.converged.all()
        for i, c in enumerate(C):
            n = A.shape[1]
            system = (
                full + c * A @ A.mT
                if name == "solve"
                else A.mT @ torch.linalg.solve(full, A) + torch.eye(n, dtype=F64) / c
            )
            want = torch.linalg.solve(system, rhs[i].flatten())
            assert float((got.x[i].flatten() - want).norm() / want.norm()) < 1e-8


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: trace_difference_level(np.full((4, 4), np.nan)), "not finite"),
        (lambda: trace_difference_level(np.ones((4, 1))), "more than 1"),
        (lambda: trace_difference_level(np.ones((4, 4)), correlation=1.0), "correlation"),
        (lambda: wavelet_level(np.ones((4, 4))), "at least 8"),
        (lambda: wavelet_level(np.ones((16, 4)), wavelet="sym8"), "haar or db2"),
        (lambda: prediction_level(np.ones((16, 8))), "more than 9"),
        (lambda: noise_covariance(np.zeros((8, 8)), (1, 4, 4), lags=(3, 3)), "zero everywhere"),
        (lambda: noise_covariance(np.ones((8, 8)), (1, 4, 4), lags=(9, 3)), "lengthen the window"),
        (lambda: noise_covariance(np.ones((8, 8)), (1, 4, 4), lags=(3, 3), nugget=0.0), "nugget"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
