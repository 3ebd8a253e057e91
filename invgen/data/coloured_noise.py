r"""The covariance of coloured noise from a window that holds noise alone, R = T ⊗ X + ν I.

With the sample autocovariance of the window, averaged over the other axis,

    ĉ_t(k) = 1/(n_t n_x) Σ_(i,j) n_(i+k, j) n_(i, j),        ĉ_x(l) likewise,

T and X are the Toeplitz matrices of w_t ĉ_t and w_x ĉ_x / ĉ(0), w the Parzen window. The divisor n (not n − k) and the
window, whose spectrum is non-negative, keep both positive semi-definite (Percival & Walden 1993, chapter 6).

**Bias.** E ĉ(k) w(k) = (1 − k/n) w(k) c(k): a spectrum smoothed over about 4/3 L samples' bandwidth. Noise leaks into
frequencies that have none, which widens a posterior there rather than narrowing it. Noise that does not factor into time
and space (dipping, ground roll) is replaced by the product of its margins.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from invgen.kronecker import Kronecker, toeplitz

__all__ = ["autocovariance", "noise_covariance"]


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
        lags: support L of the Parzen window along time and along traces, about three times the distance over which
            the noise is correlated; None along traces for independent traces.
        nugget: share of the variance that is taken to be white: what keeps R invertible where the window shows no
            noise at some frequency, and keeps its users from trusting data there without limit.

    Returns:
        `Kronecker` with the window's variance (T, X and ν as in the module); solves, draws and determinants are
        closed forms, and with `PostStack` so are the solves of solvers.

    Raises:
        ValueError: values that are not finite, a window without noise, more lags than samples, a nugget outside (0, 1].

    Cost: lags passes over the window, two eigendecompositions.
    """
    v = _noise(window)
    if not 0 < nugget <= 1:
        raise ValueError(f"The nugget is a share of the variance in (0, 1], got {nugget}.")
    variance = float(v.square().mean())
    if not variance > 0:
        raise ValueError("The noise window is zero everywhere; pick one that recorded noise.")
    T = toeplitz((1 - nugget) * _tapered(autocovariance(v, lags[0], axis=0)), shape[1])
    X = None if lags[1] is None else toeplitz(_tapered(autocovariance(v, lags[1], axis=1)) / variance, shape[2])
    return Kronecker(T, X, shape, nugget=nugget * variance)


def _tapered(c: Tensor) -> Tensor:
    """c times the Parzen window of support len(c)."""
    k = torch.arange(len(c), dtype=torch.float64) / len(c)
    return c * torch.where(k <= 0.5, 1 - 6 * k.square() * (1 - k), 2 * (1 - k) ** 3)


def _noise(window: Any) -> Tensor:
    v = torch.as_tensor(window).double()
    if v.ndim not in (2, 3):
        raise ValueError(f"A noise window has the axes (time, trace), got the shape {tuple(v.shape)}.")
    if not bool(torch.isfinite(v).all()):
        raise ValueError(
            f"The noise window holds {int((~torch.isfinite(v)).sum())} values that are not finite; leave dead traces out first."
        )
    return v
