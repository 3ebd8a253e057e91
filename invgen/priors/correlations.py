"""Stationary covariances: correlation functions, and their spectra on a periodic or padded grid.

A stationary covariance on a periodic grid is circulant: the FFT of its first row is its spectrum. A field that is not
periodic is the restriction of one on a larger grid (circulant embedding): Dietrich & Newsam 1997 (SIAM J. Sci.
Comput. 18, 1088), Wood & Chan 1994 (J. Comput. Graph. Stat. 3, 409).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import scipy.fft
import scipy.special
import torch

from invgen.covariance import Stationary

__all__ = ["correlation", "stationary_covariance"]

_NEGATIVE = 1e-6  # negative eigenvalues that together hold this part of the variance are rounding or truncation
_FLOOR = 1e-12  # smallest eigenvalue kept, relative to the largest
_GROWTH = 16  # padded samples an axis, at the most, in multiples of the grid


def correlation(distance: np.ndarray, kind: str = "matern", nu: float = 1.0) -> np.ndarray:
    """Correlation at a distance in units of the correlation length.

    matern: 2^(1−ν)/Γ(ν) (√(2ν) r)^ν K_ν(√(2ν) r);  exponential: exp(−r), Matérn 1/2;  gaussian: exp(−r²/2), ν -> ∞.

    Args:
        distance: r ≥ 0. kind: "matern", "gaussian" or "exponential". nu: smoothness of the Matérn.

    Raises:
        ValueError: an unknown kind or nu ≤ 0.

    Reference: Rasmussen & Williams 2006, equation 4.14.
    """
    r = np.asarray(distance, dtype=np.float64)
    if kind == "gaussian":
        return np.exp(-0.5 * r**2)
    if kind == "exponential":
        return np.exp(-r)
    if kind != "matern":
        raise ValueError(f"The correlation {kind!r} is unknown; use 'matern', 'gaussian' or 'exponential'.")
    if not (nu > 0 and math.isfinite(nu)):
        raise ValueError(
            f"A Matérn correlation needs a positive, finite nu, got {nu}; for nu -> ∞ use kind='gaussian'."
        )
    scaled = math.sqrt(2 * nu) * r
    safe = np.where(scaled > 0, scaled, 1.0)
    log_value = (
        (1 - nu) * math.log(2)
        - scipy.special.gammaln(nu)
        + nu * np.log(safe)
        + np.log(np.maximum(scipy.special.kve(nu, safe), 1e-300))
        - safe
    )
    return np.where(scaled > 1e-10, np.exp(log_value), 1.0)


def _lags(sizes: Sequence[int], spacing: Sequence[float], length: Sequence[float], angle: float) -> np.ndarray:
    """Scaled distance of the nearest image of every grid point of a torus."""
    axes = [
        np.minimum(np.arange(n), n - np.arange(n)) * np.where(np.arange(n) <= n // 2, 1, -1) * d
        for n, d in zip(sizes, spacing, strict=True)
    ]
    h = list(np.meshgrid(*axes, indexing="ij"))
    if angle:
        if len(h) != 2:
            raise ValueError(
                f"An angle needs a 2-D grid, this one has {len(h)} axes; give a length for each axis instead."
            )
        c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        h = [c * h[0] + s * h[1], -s * h[0] + c * h[1]]
    return np.sqrt(sum((a / ell) ** 2 for a, ell in zip(h, length, strict=True)))


def stationary_covariance(
    shape: tuple[int, ...],
    *,
    spacing: Sequence[float],
    variance: float | Sequence[float] = 1.0,
    length: float | Sequence[float],
    kind: str = "matern",
    nu: float = 1.0,
    angle: float = 0.0,
    nugget: float = 0.0,
    padding: int | Sequence[int] | str = 0,
) -> Stationary:
    """C(h) = variance · [(1 − nugget) ρ(|h / length|) + nugget δ(h)], as its spectrum.

    Args:
        shape: `(channels, *spatial)`; channels are independent.
        spacing: distance between samples of each axis.
        variance: one number, or one for each channel, in squared units of the field.
        length: correlation length, one number or one an axis, in the unit of the spacing.
        kind, nu: see `correlation`.
        angle: degrees by which the length axes are turned (2-D), from the first axis towards the second.
        nugget: part of the variance that is white; 1e-4 keeps smooth (Gaussian) correlations invertible.
        padding: samples added to each axis: 0 is a periodic field, n − 1 or more on an axis of n samples makes every
            lag inside the grid exact; "auto" starts there and grows until the embedding is positive semi-definite.

    Returns:
        `Stationary`. Negative eigenvalues that hold less than 1e-6 of the variance are set to zero; then eigenvalues
        under 1e-12 of the largest are raised to it, so that a periodic covariance has an inverse.

    Raises:
        ValueError: parameters out of range, or an embedding with larger negative eigenvalues (pad more).

    Cost: one FFT of the padded grid ("auto": one a trial).
    """
    spatial = tuple(shape[1:])
    if not spatial:
        raise ValueError(
            f"A stationary field needs the shape (channels, *spatial), got {tuple(shape)}; use a dense or diagonal prior for vectors."
        )
    lengths = [float(length)] * len(spatial) if isinstance(length, (int, float)) else [float(v) for v in length]
    if len(lengths) != len(spatial) or len(spacing) != len(spatial):
        raise ValueError(
            f"{len(lengths)} lengths and {len(spacing)} spacings were given for {len(spatial)} axes; give one an axis."
        )
    variances = torch.as_tensor(variance, dtype=torch.float64).reshape(-1)
    numbers = [*lengths, *variances.tolist()]
    if not all(math.isfinite(v) and v > 0 for v in numbers):
        raise ValueError(
            f"Lengths and variances must be positive and finite, got lengths {lengths} and variances {variances.tolist()}."
        )
    if len(variances) not in (1, shape[0]):
        raise ValueError(f"{len(variances)} variances were given for {shape[0]} channels; give one, or one a channel.")
    if not 0 <= nugget < 1:
        raise ValueError(f"The nugget is a part of the variance and must be in [0, 1), got {nugget}.")
    automatic = padding == "auto"
    if isinstance(padding, str) and not automatic:
        raise ValueError(f"padding must be a number of samples, one an axis, or 'auto', got {padding!r}.")
    if automatic:
        # an axis of one sample has a single lag: nothing to embed
        sizes = [n if n == 1 else scipy.fft.next_fast_len(2 * n - 1, real=True) for n in spatial]
    else:
        extra = [int(padding)] * len(spatial) if isinstance(padding, (int, float)) else [int(p) for p in padding]
        if len(extra) != len(spatial) or min(extra) < 0:
            raise ValueError(
                f"padding {padding!r} must be non-negative samples, one number or one for each of the {len(spatial)} axes."
            )
        sizes = [n + p for n, p in zip(spatial, extra, strict=True)]
    while True:
        row = (1 - nugget) * correlation(_lags(sizes, spacing, lengths, angle), kind, nu)
        # the real part symmetrises the half-way lag of even axes, whose two nearest images differ under an angle
        spectrum = scipy.fft.fftn(row).real + nugget
        negative = -spectrum[spectrum < 0].sum() / spectrum.size
        if negative <= _NEGATIVE:
            break
        if not automatic:
            raise ValueError(
                f"The {kind} correlation with lengths {lengths} on the padded grid {tuple(sizes)} is not positive semi-definite "
                f"(negative eigenvalues hold {negative:.2g} of the variance); pad more, or use padding='auto'."
            )
        grown = [
            n if n == 1 else scipy.fft.next_fast_len(math.ceil(1.5 * p), real=True)
            for n, p in zip(spatial, sizes, strict=True)
        ]
        if grown == sizes or any(p > _GROWTH * 2 * n for n, p in zip(spatial, grown, strict=True)):
            raise ValueError(
                f"No padding up to {tuple(sizes)} samples embeds the {kind} correlation with lengths {lengths}; shorten it or use a dense covariance."
            )
        sizes = grown
    values = torch.from_numpy(np.maximum(spectrum, _FLOOR * spectrum.max()))
    return Stationary(variances.reshape(-1, *(1,) * len(spatial)) * values, tuple(shape))
