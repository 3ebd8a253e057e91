r"""The covariance of coloured noise from a window that holds noise alone, R = T ⊗ X + ν I.

Along each axis the noise is cut into segments of s = 2 L samples that overlap by half (L the lags asked for; the window
where it is shorter), and every segment is tapered by the first K discrete prolate spheroidal sequences h_k of half
bandwidth W = 2/L (Thomson, Proc. IEEE 70 (1982), equations 2.6 and 4.3; Percival & Walden 1993, chapter 7),

    ĉ(k) = mean over segments of 1/K Σ_m Σ_i h_m(i + k) h_m(i) n(i + k) n(i),      Ŝ(f) = 1/K Σ_m |Σ_i h_m(i) n(i) e^(−2πifi)|².

The white part ν stands in both: E ĉ_t(k) = T(k) X(0) + ν δ_k, and T ⊗ X made of ĉ_t and ĉ_x would have stripes of white
noise times coloured. T and X are therefore the Toeplitz matrices of the spectra max(Ŝ − ν, 0), positive semi-definite,
scaled so that R has the variance of the window.

**Bias.** E ĉ(k) = ω(k) c(k), ω(k) = 1/K Σ_m Σ_i h_m(i + k) h_m(i), ω(0) = 1: the spectrum smoothed over ±W, of which the
tapers kept let less than 10⁻⁴ through from further away. The plain sum over a window of n samples, tapered in its lags
or not, spreads power to Δf away with the density 1/(2 π² n Δf²): as if four per cent were white noise at Δf = 25 Hz,
4 ms and 128 samples, more than noise that was low-passed has there. What is left on white floors of 1 and 10 per cent
below such noise is χ² = 0.96 and 0.97 in the mean, by the smoothing at the edges of its band. Sampling adds
E χ² ≈ 1 + 2/(degrees of freedom): 2 K times the segments and the independent traces. Noise that does not factor into
time and space (dipping, ground roll) is replaced by the product of its margins.

**The nugget is a choice, not an estimate.** Where noise has less than ν it decides, and χ² of the noise under R is then
less than 1: tr(R⁻¹ Cov)/N, 0.20 at ν = 0.01 for noise that running means of 10 and 5 samples, forth and back, have all
but removed from four fifths of the spectrum, though R were known exactly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.signal.windows import dpss
from torch import Tensor

from invgen.kronecker import Kronecker, toeplitz

__all__ = ["autocovariance", "noise_covariance"]

LEAKAGE = 1e-4  # power of a taper outside its band, at the most


def autocovariance(window: Any, lags: int, *, axis: int = 0) -> Tensor:
    """ĉ(0), …, ĉ(lags − 1) of noise with mean zero along one axis, averaged over the others; divisor n.

    Args:
        window: `(n_t, n_x)` or `(windows, n_t, n_x)`. lags: how many. axis: 0 for time, 1 for traces.

    Returns:
        `(lags,)`, float64, in data units squared.

    Raises:
        ValueError: values that are not finite, more lags than samples.
    """
    v = _noise(window)
    v = v.mT if axis == 0 else v
    n = v.shape[-1]
    if not 1 <= lags <= n:
        raise ValueError(
            f"A noise window of {n} samples has 1 to {n} lags, {lags} were asked for; lengthen the window."
        )
    return torch.stack([(v[..., k:] * v[..., : n - k]).sum(-1).mean() / n for k in range(lags)])


def noise_covariance(
    window: Any, shape: tuple[int, int, int], *, lags: tuple[int, int | None], nugget: float = 0.01
) -> Kronecker:
    """The covariance of coloured noise, for data of `shape`, from a window of noise: `GaussianNoise(covariance=…)`.

    Args:
        window: noise alone, `(n_t, n_x)` or several windows `(windows, n_t, n_x)`, sampled like the data; any size.
        shape: `(channels, n_t, n_x)` of the data, channels independent and alike.
        lags: L along time and along traces, about three times the distance over which the noise is correlated:
            spectra are smoothed over ±2/L; None along traces for independent traces.
        nugget: share of the variance that is taken to be white: what keeps R invertible where the window shows no
            noise at some frequency, and keeps its users from trusting data there without limit.

    Returns:
        `Kronecker` with the window's variance (T, X and ν as in the module); solves, draws and determinants are
        closed forms, and with `PostStack` so are the solves of solvers.

    Raises:
        ValueError: values that are not finite, a window without noise, more lags than samples, a nugget outside (0, 1].

    Cost: K ≤ 4 Fourier transforms of the segments an axis, two eigendecompositions.
    """
    v = _noise(window)
    if not 0 < nugget <= 1:
        raise ValueError(f"The nugget is a share of the variance in (0, 1], got {nugget}.")
    variance = float(v.square().mean())
    if not variance > 0:
        raise ValueError("The noise window is zero everywhere; pick one that recorded noise.")
    T = toeplitz((1 - nugget) * variance * _correlation(v.mT, lags[0], shape[1], nugget), shape[1])
    X = None if lags[1] is None else toeplitz(_correlation(v, lags[1], shape[2], nugget), shape[2])
    return Kronecker(T, X, shape, nugget=nugget * variance)


def _correlation(v: Tensor, lags: int, size: int, white: float) -> Tensor:
    """c(0), …, c(size − 1) over c(0) along the last axis of what is not white, of the spectrum max(Ŝ − white · ĉ(0), 0)."""
    n = v.shape[-1]
    if not 1 <= lags <= n:
        raise ValueError(
            f"A noise window of {n} samples has 1 to {n} lags, {lags} were asked for; lengthen the window."
        )
    length = min(n, 2 * lags)
    count = -(-2 * (n - length) // length) + 1  # overlapping by half at least, and reaching the last sample
    segments = torch.stack([v[..., i : i + length] for i in np.linspace(0, n - length, count).round().astype(int)])
    # a Toeplitz matrix of up to half the period is part of the circulant matrix, whose eigenvalues are the spectrum
    period = 2 * max(length, size)
    power = sum(torch.fft.rfft(segments * h, n=period).abs().square() for h in _tapers(length, lags))
    S = power.flatten(0, -2).mean(0)
    c = torch.fft.irfft(S, n=period)
    c = torch.fft.irfft((S - white * c[0]).clamp_min(0), n=period)[:size]
    return c / c[0] if float(c[0]) > 0 else (torch.arange(size) == 0).double()


def _tapers(length: int, lags: int) -> Tensor:
    """`(K, length)`: the prolate sequences of half bandwidth 2/lags that leak less than `LEAKAGE`, at least one."""
    if length < 4:
        return torch.ones(1, length, dtype=torch.float64)
    width = min(2 * length / lags, (length - 1) / 2)
    tapers, inside = dpss(length, width, 4, return_ratios=True)
    kept = max(1, int((inside > 1 - LEAKAGE).sum()))
    return torch.from_numpy(tapers[:kept].copy())


def _noise(window: Any) -> Tensor:
    v = torch.as_tensor(window).double()
    if v.ndim not in (2, 3):
        raise ValueError(f"A noise window has the axes (time, trace), got the shape {tuple(v.shape)}.")
    if not bool(torch.isfinite(v).all()):
        raise ValueError(
            f"The noise window holds {int((~torch.isfinite(v)).sum())} values that are not finite; leave dead traces out first."
        )
    return v
