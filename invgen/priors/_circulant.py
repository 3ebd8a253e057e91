r"""Circulant embedding: a stationary covariance on a grid as a block of one that is diagonal under the Fourier transform.

    Σ = R F⁻¹ S F Rᵀ,      S = F c,   c(h) = C(h wrapped to its nearest image on the embedding grid of m samples an axis)

Every lag inside the grid of n samples is right as soon as m ≥ 2(n − 1), or m ≥ n − 1 + r where C vanishes beyond r samples:
the minimal embedding. What may go wrong is that S has negative entries; they are reported, and grown away.

References: Dietrich & Newsam 1997, SIAM J. Sci. Comput. 18, 1088; Wood & Chan 1994, J. Comput. Graph. Stat. 3, 409.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.fft
import torch
from torch import Tensor

from invgen.priors.covariance_models import CovarianceModel
from invgen.stationary import Stationary

ALLOWED = 1e-7  # negative eigenvalues that together hold this part of the variance are rounding or truncation
_FLOOR = 1e-12  # smallest eigenvalue of a periodic covariance, relative to the largest
_GROWTH = 64  # points of the embedding, at the most, in multiples of the grid's (small grids: _SMALL points)
_SMALL = 1 << 22
_WIDE = 1 << 26  # spectra with more entries are kept in float32


@dataclass(frozen=True)
class Embedding:
    """How a covariance was embedded.

    Attributes:
        sizes: samples an axis of the embedding grid. negative: share of the variance that negative eigenvalues held before
            they were set to zero. smallest: the smallest eigenvalue over the largest. trials: grids that were tried.
    """

    sizes: tuple[int, ...]
    negative: float
    smallest: float
    trials: int


def fast_even(n: int) -> int:
    """The next even size with small prime factors; 1 stays."""
    return 1 if n <= 1 else 2 * scipy.fft.next_fast_len(math.ceil(n / 2), real=True)


def minimal_sizes(
    model: CovarianceModel, shape: Sequence[int], spacing: Sequence[float], tolerance: float
) -> tuple[int, ...]:
    """The smallest embedding that keeps every lag of the grid, C ≤ tolerance · C(0) counting as zero."""
    reach = model.range(len(shape), tolerance)
    # the lag half-way round has two nearest images, which differ where the axes are turned: it must lie outside the grid
    extra = 0 if model.axis_aligned else 1
    return tuple(
        fast_even(n - 1 + min(math.ceil(r / d) + 1, n - 1) + extra) if n > 1 else 1
        for n, r, d in zip(shape, reach, spacing, strict=True)
    )


def spectrum(model: CovarianceModel, sizes: Sequence[int], spacing: Sequence[float]) -> np.ndarray:
    """S on the full grid of `sizes` (rotated axes), or on its corner k ≤ m/2 where C is even in every axis."""
    if model.axis_aligned:
        half = [np.arange(m // 2 + 1) * d for m, d in zip(sizes, spacing, strict=True)]
        row = model.on_axes(half)
        for i, m in enumerate(sizes):
            row = _even_transform(row, m, i)
        return row
    axes = [
        np.where(np.arange(m) <= m // 2, np.arange(m), np.arange(m) - m) * d
        for m, d in zip(sizes, spacing, strict=True)
    ]
    # the real part symmetrises the half-way lag of even axes, whose two nearest images differ
    return scipy.fft.fftn(model.on_axes(axes)).real


def _even_transform(row: np.ndarray, m: int, axis: int) -> np.ndarray:
    """The Fourier transform along one axis of the even extension to m samples: a cosine transform of half of it."""
    if m == 1:
        return row
    if m % 2 == 0:
        return scipy.fft.dct(row, type=1, axis=axis, overwrite_x=True)
    whole = np.take(row, np.minimum(np.arange(m), m - np.arange(m)), axis)
    return np.take(scipy.fft.rfft(whole, axis=axis).real, np.arange(m // 2 + 1), axis)


def unfold(corner: Tensor, sizes: Sequence[int]) -> Tensor:
    """The corner k ≤ m/2 of an even spectrum, mirrored onto the full grid."""
    for i, m in enumerate(sizes):
        k = torch.arange(m)
        corner = corner.index_select(i, torch.minimum(k, m - k))
    return corner


def _counts(sizes: Sequence[int], shape: Sequence[int]) -> list[np.ndarray]:
    """How often each entry of the corner stands for one of the full grid, an axis."""
    out = []
    for m, n in zip(sizes, shape, strict=True):
        w = np.full(n, 1.0 if n == m else 2.0)
        if n != m:
            w[0] = 1.0
            if m % 2 == 0:
                w[-1] = 1.0
        out.append(w)
    return out


def _negative(values: np.ndarray, sizes: Sequence[int], sill: float) -> float:
    """Share of the variance in negative eigenvalues."""
    below = np.minimum(values, 0.0)
    for w in _counts(sizes, values.shape):
        below = np.tensordot(w, below, axes=(0, 0))
    return abs(float(below)) / math.prod(sizes) / sill


def embed(
    model: CovarianceModel,
    shape: tuple[int, ...],
    spacing: Sequence[float],
    *,
    padding: int | Sequence[int] | str = "minimal",
    tolerance: float = 1e-8,
) -> tuple[Stationary, Embedding]:
    """C on a grid `(channels, *spatial)`, channels independent and alike.

    Args:
        model: C. shape, spacing: of the grid.
        padding: samples added to each axis (0: periodic), or "minimal": the smallest embedding, grown while negative
            eigenvalues hold more than 1e-7 of the variance.
        tolerance: C below this share of C(0) counts as zero when the embedding is sized.

    Raises:
        ValueError: no positive semi-definite embedding.

    Cost: one cosine transform of a corner of the embedding a trial (a Fourier transform of all of it under an angle).
    """
    spatial = tuple(shape[1:])
    automatic = padding == "minimal"
    if automatic:
        sizes = minimal_sizes(model, spatial, spacing, tolerance)
    else:
        extra = [padding] * len(spatial) if isinstance(padding, (int, float)) else padding
        if isinstance(extra, str) or len(extra) != len(spatial) or min(int(p) for p in extra) < 0:
            raise ValueError(f"padding is 'minimal', a number of samples, or one an axis, got {padding!r}.")
        sizes = tuple(n + int(p) for n, p in zip(spatial, extra, strict=True))
    trials = 0
    while True:
        trials += 1
        values = spectrum(model, sizes, spacing)
        share = _negative(values, sizes, model.sill)
        if share <= ALLOWED:
            break
        grown = tuple(n if n == 1 else fast_even(math.ceil(1.3 * m)) for n, m in zip(spatial, sizes, strict=True))
        if not automatic or math.prod(grown) > max(_SMALL, _GROWTH * math.prod(spatial)):
            reach = ", ".join(f"{r:.4g}" for r in model.range(len(spatial)))
            width = ", ".join(f"{n * d:.4g}" for n, d in zip(spatial, spacing, strict=True))
            raise ValueError(
                f"The covariance is not positive semi-definite on the {'x'.join(map(str, sizes))} embedding of this grid (negative "
                f"eigenvalues hold {share:.2g} of the variance; practical range {reach}, width of the domain {width}); pad more, shorten "
                "the range, or use method='cholesky' or 'kl'."
            )
        sizes = grown
    smallest, largest = float(values.min()), float(values.max())
    np.maximum(values, _FLOOR * largest if tuple(sizes) == spatial else 0.0, out=values)
    table = torch.from_numpy(values)
    if math.prod(sizes) > _WIDE:
        table = table.float()
    if model.axis_aligned:
        table = unfold(table, sizes)
    return Stationary(table[None], shape, even=True), Embedding(tuple(sizes), share, smallest / largest, trials)
