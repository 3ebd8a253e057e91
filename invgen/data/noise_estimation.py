r"""The level of noise from data that hold signal and noise, d = s + n on `(n_t, n_x)`.

Each estimator takes another property of the signal to be rid of it, and is biased where that fails:

| | takes as noise | too high where | too low where |
|---|---|---|---|
| `trace_difference_level` | d_j − d_(j+1) | the signal changes from trace to trace (dips, faults) | noise is alike in neighbouring traces |
| `wavelet_level` | the finest details in time | the signal reaches Nyquist | noise is coloured, weak near Nyquist |
| `prediction_level` | what an f-x filter cannot predict | events bend, cross, end | noise is predictable along x |

All return a level (standard deviation) with its standard error from a jackknife over blocks of traces, which holds for
noise of any colour in time. The bias is not in it: compare the three.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

__all__ = ["NoiseLevel", "prediction_level", "trace_difference_level", "wavelet_level"]

Array = np.ndarray
_MAD = 0.6744897501960817  # median of |N(0, 1)|
_BLOCKS = 20


class NoiseLevel(NamedTuple):
    """A standard deviation in units of the data, and its standard error (without the bias)."""

    sd: float
    standard_error: float


def trace_difference_level(section: Any, *, lag: int = 1, correlation: float = 0.0) -> NoiseLevel:
    r"""Noise level by differences of neighbouring traces, median |d_j − d_(j+lag)| / (0.6745 √(2 (1 − ρ))).

    For signal alike in both traces and Gaussian noise of lateral correlation ρ at this lag, the difference is
    N(0, 2σ²(1 − ρ)). With ρ = 0 assumed the level is too low by √(1 − ρ): 0.71 at ρ = ½. A larger lag lowers ρ and lets
    more of a dipping signal in. The median is what keeps a few strong, dipping events out.

    Args:
        section: `(n_t, n_x)`, in the window whose noise is wanted.
        lag: distance of the traces. correlation: ρ at this lag, if known (`autocovariance` of a noise window).

    Returns:
        `NoiseLevel`. Cost: one pass.

    Raises:
        ValueError: not two axes, fewer than lag + 1 traces, values that are not finite, ρ outside [0, 1).
    """
    d = _section(section)
    if not 1 <= lag < d.shape[1]:
        raise ValueError(f"Differences over {lag} traces need more than {lag} of them, the section has {d.shape[1]}.")
    if not 0 <= correlation < 1:
        raise ValueError(f"The lateral correlation of the noise must lie in [0, 1), got {correlation}.")
    apart = np.abs(d[:, lag:] - d[:, :-lag])
    scale = _MAD * math.sqrt(2 * (1 - correlation))
    return _jackknife(apart, lambda v: float(np.median(v)) / scale)


def wavelet_level(section: Any, *, wavelet: str = "db2") -> NoiseLevel:
    r"""Noise level by the median of the finest wavelet details in time, median |Σ_k g_k d_(2i+k)| / 0.6745.

    Donoho & Johnstone, Biometrika 81 (1994), section 4: an orthonormal high-pass g leaves white noise at its level, and
    smooth signal nothing. For coloured noise of power spectrum S the level found is √(∫ |ĝ|² S), that of the noise near
    Nyquist: a lower bound for noise of the usual, low-passed kind; for Haar it is σ √(1 − ρ₁), ρ₁ the correlation of
    neighbouring samples.

    Args:
        section: `(n_t, n_x)`, or one trace `(n_t,)`. wavelet: "haar" or "db2" (two vanishing moments).

    Returns:
        `NoiseLevel`; the error of a single trace is that of independent details. Cost: one pass.

    Raises:
        ValueError: fewer than eight samples, values that are not finite, an unknown wavelet.
    """
    d = _section(section)
    r = math.sqrt(3.0)
    filters: dict[str, list[float]] = {"haar": [1, -1], "db2": [1 - r, -(3 - r), 3 + r, -(1 + r)]}
    if wavelet not in filters:
        raise ValueError(f"The wavelet is {' or '.join(filters)}, got {wavelet!r}.")
    g = np.array(filters[wavelet]) / np.linalg.norm(filters[wavelet])
    n = d.shape[0]
    if n < 8:
        raise ValueError(f"Wavelet details need at least 8 samples, the traces have {n}.")
    starts = np.arange(0, n - len(g) + 1, 2)
    detail = np.abs(sum(g[k] * d[starts + k] for k in range(len(g))))
    if detail.shape[1] == 1:  # blocks of details instead of blocks of traces
        detail = detail.T
    return _jackknife(detail, lambda v: float(np.median(v)) / _MAD)


def prediction_level(section: Any, *, order: int = 3, width: int = 40, height: int | None = None) -> NoiseLevel:
    r"""Noise level by what an f-x prediction filter leaves over (Canales 1984, SEG Expanded Abstracts, 525).

    At each frequency the traces of a window obey D_j = Σ_k a_k D_(j−k), k ≤ p, for p linear events. With a by least
    squares over M = width − p traces,

        σ² = mean_f RSS(f) / ((M − p)(1 + |a|²)),

    (M − p) for the fitted numbers, 1 + |a|² for the noise of the traces that predict. It is the variance of all
    frequencies, whatever the colour in time.

    Bias: least squares shrinks a where noise is strong, so that signal is left over (up), and for noise alone 1 + |a|²
    is 1 + p/M too large (down by p/2M in sd, 4 % at the defaults). Correlated noise along x is predicted in part (down).

    Args:
        section: `(n_t, n_x)`. order: p, events that cross a window. width, height: traces and samples of a window
            (height: the whole section).

    Returns:
        `NoiseLevel`, error by a jackknife over windows. Cost: n_t · order² · n_x multiply-adds.

    Raises:
        ValueError: windows that hold fewer than 3 order + 1 traces, values that are not finite.
    """
    d = _section(section)
    nt, nx = d.shape
    width, height = min(width, nx), min(height or nt, nt)
    rows = width - order
    if order < 1 or rows <= 2 * order:
        raise ValueError(
            f"A prediction filter of {order} traces needs windows of more than {3 * order}, they have {width}; lower the order or widen the windows."
        )
    powers = []
    for i in range(0, nt - height + 1, height):
        for j in range(0, nx - width + 1, width):
            D = np.fft.fft(d[i : i + height, j : j + width], axis=0, norm="ortho")
            past = np.stack([D[:, order - k - 1 : width - k - 1] for k in range(order)], axis=2)  # (f, rows, order)
            now = D[:, order:, None]
            gram = past.conj().swapaxes(1, 2) @ past
            ridge = 1e-10 * np.trace(gram, axis1=1, axis2=2).real[:, None, None] + 1e-300
            a = np.linalg.solve(gram + ridge * np.eye(order), past.conj().swapaxes(1, 2) @ now)
            rss = np.square(np.abs(now - past @ a)).sum((1, 2))
            powers.append(rss / ((rows - order) * (1 + np.square(np.abs(a)).sum((1, 2)))))
    return _jackknife(np.stack(powers, axis=1), lambda v: math.sqrt(float(v.mean())))


def _section(section: Any) -> Array:
    d = np.asarray(section, dtype=np.float64)
    d = d[:, None] if d.ndim == 1 else d
    if d.ndim != 2:
        raise ValueError(f"A section has the axes (time, trace), got the shape {d.shape}.")
    if not np.isfinite(d).all():
        raise ValueError(
            f"The section holds {int((~np.isfinite(d)).sum())} values that are not finite; leave dead traces out first."
        )
    return d


def _jackknife(values: Array, estimate: Callable[[Array], float]) -> NoiseLevel:
    """The estimate, and its error from leaving out one block of columns after the other."""
    columns = values.shape[1]
    blocks = min(_BLOCKS, columns)
    if blocks < 3:
        return NoiseLevel(estimate(values), math.nan)
    edges = np.linspace(0, columns, blocks + 1).round().astype(int)
    left = [estimate(np.delete(values, np.s_[a:b], axis=1)) for a, b in itertools.pairwise(edges)]
    error = math.sqrt((blocks - 1) / blocks * float(np.square(np.array(left) - np.mean(left)).sum()))
    return NoiseLevel(estimate(values), error)
