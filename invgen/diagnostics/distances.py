r"""Wasserstein distances along lines, between two samples.

For p ≥ 1, a direction θ on the unit sphere and one-dimensional quantile functions,

    W_p(θ)^p = ∫_0^1 |F⁻¹_{θ·X}(q) − F⁻¹_{θ·Y}(q)|^p dq,

exact for samples of different sizes and with weights: both quantile functions are steps, and the integral is a sum over
the union of their steps.

    sliced:      (mean over directions of W_p^p)^(1/p)      (Rabin et al. 2011; Bonneel et al. 2015)
    max-sliced:  max over directions of W_p                 (Deshpande et al. 2019)

References: Bonneel et al., Sliced and Radon Wasserstein barycenters of measures, 2015; Deshpande et al., Max-sliced
Wasserstein distance and its use for GANs, arXiv:1904.05877.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from invgen.diagnostics._arrays import Array, chunks, random_tensor, tensor, two_samples

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["SlicedDistance", "max_sliced_wasserstein", "sliced_wasserstein", "wasserstein_1d"]


@dataclass(frozen=True, eq=False)
class SlicedDistance:
    """A distance made of one-dimensional ones; `float(distance)` is its value.

    Attributes:
        name: of the distance. value: in units of x. p: its order.
        per_direction: W_p along each direction, `(P,)`. directions: `(P, dim)`, unit vectors.
        worst: the direction of the largest W_p, `(dim,)`.
        quantiles: levels `(Q,)` and the quantiles of both samples `(2, Q)` along `worst`.
    """

    name: str
    value: float
    p: float
    per_direction: np.ndarray
    directions: np.ndarray
    worst: np.ndarray
    quantiles: tuple[np.ndarray, np.ndarray]

    def __float__(self) -> float:
        return self.value

    def plot(self, ax: Axes | None = None) -> Axes:
        """Quantiles of one sample against the other along the worst direction."""
        from invgen.diagnostics import figures

        return figures.quantile_figure(self, ax)


def wasserstein_1d(
    x: Array, y: Array, p: float = 2.0, *, x_weights: Array | None = None, y_weights: Array | None = None
) -> np.ndarray:
    """W_p of samples on a line, column by column.

    Args:
        x: `(n,)` or `(n, *shape)`. y: `(m,)` or `(m, *shape)`. p: order, at least 1.
        x_weights, y_weights: `(n,)`, `(m,)`, non-negative; equal when omitted.

    Returns:
        `(*shape)`, in units of x.

    Raises:
        ValueError: shapes that do not fit, NaN, p below 1, weights that are negative or all zero.

    Cost: (n + m) log(n + m) a column.
    """
    shape = np.shape(x)[1:]
    a, b = two_samples(x, y)
    wa, wb = _weights(x_weights, a), _weights(y_weights, b)
    out = [_power(a[:, c].mT, b[:, c].mT, _order(p), wa, wb) for c in chunks(a.shape[1], 4 * (len(a) + len(b)))]
    return torch.cat(out).pow(1 / p).reshape(shape).cpu().numpy()


def sliced_wasserstein(
    x: Array,
    y: Array,
    num_projections: int = 100,
    *,
    p: float = 2.0,
    seed: int = 0,
    directions: Array | None = None,
    x_weights: Array | None = None,
    y_weights: Array | None = None,
) -> SlicedDistance:
    """Sliced Wasserstein distance: (mean over random directions of W_p^p)^(1/p).

    Args:
        x: `(n, *shape)`. y: `(m, *shape)`. num_projections: random directions, uniform on the sphere.
        p: order. seed: of the directions. directions: `(P, dim)` unit vectors instead of random ones.
        x_weights, y_weights: `(n,)`, `(m,)`; equal when omitted.

    Returns:
        `SlicedDistance`. Two samples of one law have a positive distance: compare with that of two exact samples.

    Raises:
        ValueError: shapes that do not fit, NaN, p below 1, bad weights.

    Cost: P sorts of n + m numbers, 64 MB at a time. References: module docstring.
    """
    a, b = two_samples(x, y)
    lines = _directions(a, num_projections, seed, directions)
    powers = _along(a, b, lines, p, _weights(x_weights, a), _weights(y_weights, b))
    return _result("sliced Wasserstein", float(powers.mean() ** (1 / p)), a, b, p, lines, powers, x_weights, y_weights)


def max_sliced_wasserstein(
    x: Array,
    y: Array,
    num_projections: int = 100,
    *,
    p: float = 2.0,
    seed: int = 0,
    directions: Array | None = None,
    x_weights: Array | None = None,
    y_weights: Array | None = None,
    refine: int = 0,
) -> SlicedDistance:
    """Max-sliced Wasserstein distance: the largest W_p over directions.

    Without `refine` the maximum is over random directions only, the definition of
    `ot.sliced.max_sliced_wasserstein_distance` (a lower bound that falls with the dimension). With `refine` the eight
    best directions climb the gradient of W_p^p on the sphere, as Deshpande et al. (2019) define the distance: still a
    lower bound, and for the same number of points biased upwards for equal laws.

    Args:
        x: `(n, *shape)`. y: `(m, *shape)`. num_projections: random directions. p: order. seed: of the directions.
        directions: `(P, dim)` unit vectors instead. x_weights, y_weights: `(n,)`, `(m,)`; equal when omitted.
        refine: gradient steps.

    Returns:
        `SlicedDistance`.

    Raises:
        ValueError: shapes that do not fit, NaN, p below 1, bad weights.

    Cost: P sorts of n + m numbers, and 16 sorts a gradient step. References: module docstring.
    """
    a, b = two_samples(x, y)
    wa, wb = _weights(x_weights, a), _weights(y_weights, b)
    lines = _directions(a, num_projections, seed, directions)
    powers = _along(a, b, lines, p, wa, wb)
    if refine > 0:
        best = _climb(a, b, lines[powers.topk(min(8, len(lines))).indices], p, wa, wb, refine)
        lines = torch.cat([lines, best])
        powers = torch.cat([powers, _along(a, b, best, p, wa, wb)])
    return _result(
        "max-sliced Wasserstein", float(powers.max() ** (1 / p)), a, b, p, lines, powers, x_weights, y_weights
    )


def _order(p: float) -> float:
    if not p >= 1:
        raise ValueError(f"The order of a Wasserstein distance is at least 1, got {p}.")
    return p


def _weights(given: Array | None, like: Tensor) -> Tensor | None:
    if given is None:
        return None
    w = tensor(given, "The weights").to(like).reshape(-1)
    if len(w) != len(like) or float(w.min()) < 0 or float(w.sum()) <= 0:
        raise ValueError(f"Weights are {len(like)} non-negative numbers, not all zero, got {len(w)}.")
    return w / w.sum()


def _directions(like: Tensor, count: int, seed: int, given: Array | None) -> Tensor:
    """`(P, dim)` unit vectors."""
    if given is not None:
        lines = tensor(given, "The directions").to(like)
        if lines.ndim != 2 or lines.shape[1] != like.shape[1]:
            raise ValueError(
                f"Directions have the shape (P, {like.shape[1]}), got {tuple(lines.shape)}; give unit vectors as rows."
            )
        return lines
    lines = random_tensor(seed, (count, like.shape[1]), like)
    return lines / lines.norm(dim=1, keepdim=True)


def _along(a: Tensor, b: Tensor, lines: Tensor, p: float, wa: Tensor | None, wb: Tensor | None) -> Tensor:
    """W_p^p along each direction, `(P,)`, in float64."""
    out = [
        _power(lines[c] @ a.mT, lines[c] @ b.mT, _order(p), wa, wb) for c in chunks(len(lines), 4 * (len(a) + len(b)))
    ]
    return torch.cat(out).double()


def _power(a: Tensor, b: Tensor, p: float, wa: Tensor | None, wb: Tensor | None) -> Tensor:
    """W_p^p of rows: a `(P, n)`, b `(P, m)` -> `(P,)`."""
    n, m = a.shape[1], b.shape[1]
    if wa is None and wb is None:
        a, b = a.sort(1).values, b.sort(1).values
        if n == m:
            return _absolute(a - b, p).mean(1)
        widths, i, j = _equal_steps(n, m)
        return (_absolute(a[:, i.to(a.device)] - b[:, j.to(a.device)], p) * widths.to(a)).sum(1)
    ranked_a, ca = _steps(a, wa)
    ranked_b, cb = _steps(b, wb)
    edges = torch.cat([ca, cb], dim=1).sort(1).values
    widths = edges.diff(dim=1, prepend=torch.zeros_like(edges[:, :1]))
    middle = edges - widths / 2
    i = torch.searchsorted(ca, middle).clamp_max(n - 1)
    j = torch.searchsorted(cb, middle).clamp_max(m - 1)
    return (_absolute(ranked_a.gather(1, i) - ranked_b.gather(1, j), p) * widths).sum(1)


def _absolute(difference: Tensor, p: float) -> Tensor:
    return difference.square() if p == 2 else difference.abs().pow(p)


def _equal_steps(n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Union of the steps i/n and j/m in whole numbers: widths, and which order statistics face each other."""
    ends = np.unique(np.concatenate([np.arange(1, n + 1) * m, np.arange(1, m + 1) * n]))  # in units of 1/(n m)
    starts = np.concatenate([[0], ends[:-1]])
    return (
        torch.from_numpy((ends - starts) / (n * m)),
        torch.from_numpy(starts // m),
        torch.from_numpy(starts // n),
    )


def _steps(values: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sorted rows and their cumulative weights."""
    ranked, order = values.sort(1)
    w = values.new_full((values.shape[1],), 1 / values.shape[1]) if weights is None else weights
    return ranked, w[order].cumsum(1)


def _climb(a: Tensor, b: Tensor, lines: Tensor, p: float, wa: Tensor | None, wb: Tensor | None, steps: int) -> Tensor:
    """Projected gradient ascent of W_p^p: the step halves for the directions that would go down."""
    size = a.new_full((len(lines), 1), 0.5)
    with torch.enable_grad():
        for _ in range(steps):
            here = lines.detach().requires_grad_(True)
            value = _power(here @ a.mT, here @ b.mT, _order(p), wa, wb)
            (slope,) = torch.autograd.grad(value.sum(), here)
            slope = slope - (slope * here).sum(1, keepdim=True) * here
            slope = slope / slope.norm(dim=1, keepdim=True).clamp_min(1e-30)
            with torch.no_grad():
                trial = here + size * slope
                trial = trial / trial.norm(dim=1, keepdim=True)
                better = (_power(trial @ a.mT, trial @ b.mT, p, wa, wb) > value)[:, None]
                lines, size = torch.where(better, trial, here), torch.where(better, size * 1.5, size / 2)
    return lines.detach()


def _result(
    name: str,
    value: float,
    a: Tensor,
    b: Tensor,
    p: float,
    lines: Tensor,
    powers: Tensor,
    x_weights: Array | None,
    y_weights: Array | None,
) -> SlicedDistance:
    worst = lines[int(powers.argmax())]
    levels = (np.arange(200) + 0.5) / 200
    curves = []
    for values, given in ((a @ worst, x_weights), (b @ worst, y_weights)):
        ranked, cumulative = _steps(values[None], _weights(given, values))
        at = torch.searchsorted(cumulative[0].contiguous(), torch.from_numpy(levels).to(values))
        curves.append(ranked[0][at.clamp_max(len(values) - 1)].cpu().numpy())
    host = powers.pow(1 / p).cpu().numpy(), lines.cpu().numpy(), worst.cpu().numpy()
    return SlicedDistance(name, value, p, *host, (levels, np.stack(curves)))
