r"""Statistics of fields, as a geostatistician would take them, on plain arrays `(n, ny, nx)` or `(n, 1, ny, nx)`.

Of a stationary field u(s) on a grid, at lag h along an axis, over all pairs inside the window:

    variogram                γ(h)  = ½ E[(u(s + h) − u(s))²]                                     (Matheron 1963)
    two-point probability    S₂(h) = P(I(s) = 1, I(s + h) = 1),  I = [u > threshold]              (Torquato 2002, 2.1)
    connectivity function    τ(h)  = P(s and s + h in one cluster | I(s) = I(s + h) = 1)     (Pardo-Igúzquiza & Dowd 2003)

Every curve comes image by image, so that means have standard errors and two sets of images can be compared.

Minkowski functionals per unit area of the set I = 1 in the plane (Michielsen & De Raedt 2001): area fraction, length of
the boundary (over four, pixel edges: a digital disc has the perimeter of its bounding box, 4/π too much), and Euler
characteristic (components minus holes, 8-connected set, 4-connected background), counted by vertices, edges and faces.

References: Mosser, Dubrule & Blunt 2020, doi:10.1007/s11004-019-09832-6; Legland, Kiêu & Devaux 2007 for the counting.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from invgen.diagnostics._arrays import Array, chunks, tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "LagCurve",
    "connectivity_function",
    "minkowski",
    "multipoint_distance",
    "multipoint_histogram",
    "proportions",
    "two_point_probability",
    "variogram",
]


@dataclass(frozen=True, eq=False)
class LagCurve:
    """A statistic of pairs against their lag.

    Attributes:
        name: of the statistic. axis: the images' axis, "y" (rows) or "x". lags: in pixels, `(k,)`.
        each: `(n, k)` of every image, NaN where it has no pair that counts.
    """

    name: str
    axis: str
    lags: np.ndarray
    each: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """Over images, `(k,)`."""
        return np.nanmean(self.each, axis=0)

    @property
    def error(self) -> np.ndarray:
        """Standard error of the mean, `(k,)`."""
        counts = np.isfinite(self.each).sum(0)
        return np.nanstd(self.each, axis=0) / np.sqrt(np.maximum(counts - 1, 1))

    def plot(self, ax: Axes | None = None, *, spacing: float = 1.0, unit: str = "pixels", label: str = "") -> Axes:
        """The mean with two standard errors."""
        from invgen.diagnostics import field_figures

        return field_figures.lag_figure(self, ax, spacing=spacing, unit=unit, label=label)


def images(x: Array, what: str = "The images") -> Tensor:
    """`(n, ny, nx)`; a channel axis of one is taken off.

    Raises:
        ValueError: another shape.
    """
    out = tensor(x, what)
    out = out[:, 0] if out.ndim == 4 and out.shape[1] == 1 else out
    if out.ndim != 3 or min(out.shape) < 1:
        raise ValueError(f"{what} have the shape {tuple(out.shape)}; give (n, ny, nx) or (n, 1, ny, nx).")
    return out


def proportions(x: Array, *, threshold: float = 0.5, classes: int | None = None) -> np.ndarray:
    """Share of every class in every image, `(n, classes)` float64.

    Args:
        x: images. threshold: two classes, below and above it. classes: integers 0 … classes − 1 instead.

    Raises:
        ValueError: values that are not class numbers.
    """
    v = images(x)
    if classes is None:
        above = (v > threshold).double().mean((1, 2))
        return torch.stack([1 - above, above], dim=1).numpy()
    rounded = v.round()
    if not torch.equal(rounded, v) or float(v.min()) < 0 or float(v.max()) > classes - 1:
        raise ValueError(
            f"Classes are the whole numbers 0 to {classes - 1}, the images range from {float(v.min()):g} to {float(v.max()):g}; round them first, or give a threshold."
        )
    return torch.stack([(rounded == k).double().mean((1, 2)) for k in range(classes)], dim=1).numpy()


def _lags(v: Tensor, axis: str, max_lag: int | None) -> tuple[int, range]:
    if axis not in ("x", "y"):
        raise ValueError(f'axis must be "y" (rows) or "x" (columns), got {axis!r}.')
    dim = 1 if axis == "y" else 2
    n = v.shape[dim]
    last = n // 2 if max_lag is None else max_lag
    if not 0 < last < n:
        raise ValueError(f"max_lag must lie between 1 and {n - 1} on this grid, got {max_lag}.")
    return dim, range(last + 1)


def _pairs(v: Tensor, dim: int, lag: int) -> tuple[Tensor, Tensor]:
    n = v.shape[dim]
    return v.narrow(dim, 0, n - lag), v.narrow(dim, lag, n - lag)


def variogram(x: Array, *, axis: str = "x", max_lag: int | None = None) -> LagCurve:
    """γ(h) in the squared units of x, lags 0 to `max_lag` (half the window when omitted)."""
    v = images(x)
    dim, lags = _lags(v, axis, max_lag)
    each = np.empty((len(v), len(lags)))
    for rows in chunks(len(v), v[0].numel()):
        part = v[rows].double()
        for k, h in enumerate(lags):
            a, b = _pairs(part, dim, h)
            each[rows, k] = 0.5 * (b - a).square().mean((1, 2)).numpy()
    return LagCurve("variogram", axis, np.asarray(lags), each)


def two_point_probability(x: Array, *, threshold: float = 0.5, axis: str = "x", max_lag: int | None = None) -> LagCurve:
    """S₂(h) of the set above the threshold; S₂(0) is its proportion."""
    inside = images(x) > threshold
    dim, lags = _lags(inside, axis, max_lag)
    each = np.empty((len(inside), len(lags)))
    for k, h in enumerate(lags):
        a, b = _pairs(inside, dim, h)
        each[:, k] = (a & b).double().mean((1, 2)).numpy()
    return LagCurve("two-point probability", axis, np.asarray(lags), each)


def clusters(inside: np.ndarray, *, diagonal: bool = True) -> np.ndarray:
    """Labels of connected clusters, unique over images, 0 outside; `(n, ny, nx)`."""
    structure = np.zeros((3, 3, 3), dtype=bool)
    structure[1] = True if diagonal else ndimage.generate_binary_structure(2, 1)
    labels: np.ndarray = ndimage.label(inside, structure)[0]
    return labels


def connectivity_function(
    x: Array, *, threshold: float = 0.5, axis: str = "x", max_lag: int | None = None, diagonal: bool = True
) -> LagCurve:
    """τ(h) of the set above the threshold; NaN for an image without a pair in the set.

    Args:
        diagonal: pixels that touch at a corner are connected.
    """
    labels = torch.from_numpy(clusters((images(x) > threshold).numpy(), diagonal=diagonal))
    dim, lags = _lags(labels, axis, max_lag)
    each = np.empty((len(labels), len(lags)))
    for k, h in enumerate(lags):
        a, b = _pairs(labels, dim, h)
        both = (a > 0) & (b > 0)
        count = both.sum((1, 2)).double()
        together = ((a == b) & both).sum((1, 2)).double()
        each[:, k] = torch.where(count > 0, together / count, torch.full_like(count, math.nan)).numpy()
    return LagCurve("connectivity function", axis, np.asarray(lags), each)


def multipoint_histogram(x: Array, *, threshold: float = 0.5, template: tuple[int, int] = (3, 3)) -> np.ndarray:
    """Relative frequency of every pattern of a small window over all images, `(2**cells,)`; bit 0 is its first cell.

    Raises:
        ValueError: a template of more than 20 cells, or larger than the images.
    """
    inside = images(x) > threshold
    ty, tx = template
    if min(template) < 1 or ty * tx > 20 or ty > inside.shape[1] or tx > inside.shape[2]:
        raise ValueError(f"A template has 1 to 20 cells and fits into the images, got {template}.")
    ny, nx = inside.shape[1] - ty + 1, inside.shape[2] - tx + 1
    codes = torch.zeros(len(inside), ny, nx, dtype=torch.int32)
    for k in range(ty * tx):
        i, j = divmod(k, tx)
        codes += inside[:, i : i + ny, j : j + nx].to(torch.int32) << k
    counts = torch.bincount(codes.flatten(), minlength=2 ** (ty * tx)).double()
    return (counts / counts.sum()).numpy()


def multipoint_distance(p: np.ndarray, q: np.ndarray) -> float:
    """Jensen–Shannon divergence of two pattern histograms, in nats: 0 for equal ones, ln 2 for disjoint ones."""
    middle = 0.5 * (p + q)

    def divergence(a: np.ndarray) -> float:
        seen = a > 0
        return float((a[seen] * np.log(a[seen] / middle[seen])).sum())

    return 0.5 * (divergence(np.asarray(p)) + divergence(np.asarray(q)))


def minkowski(x: Array, *, threshold: float = 0.5) -> dict[str, np.ndarray]:
    """Minkowski functionals of the set above the threshold, per pixel area, `(n,)` each.

    Returns:
        "area": share of the window. "perimeter": length of the boundary inside the window in pixel sides, per pixel.
        "euler": components minus holes per pixel, V − E + F of the closed pixels counted half-open, so that windows
        that overlap by a pixel add up.
    """
    inside = (images(x) > threshold).to(torch.int32)
    ny, nx = inside.shape[1:]
    pixels = ny * nx
    perimeter = (inside[:, 1:] != inside[:, :-1]).sum((1, 2)) + (inside[:, :, 1:] != inside[:, :, :-1]).sum((1, 2))
    # every pixel with the edges and the vertex at its far side; each of them is in the closed set when a pixel around
    # it is. The last row and column only tell the others about their far sides.
    here, below, right, both = inside[:, :-1, :-1], inside[:, 1:, :-1], inside[:, :-1, 1:], inside[:, 1:, 1:]
    cells = (here | below | right | both) - (here | below) - (here | right) + here
    area = inside.sum((1, 2)).double() / pixels
    return {
        "area": area.numpy(),
        "perimeter": (perimeter.double() / pixels).numpy(),
        "euler": (cells.sum((1, 2)).double() / max((ny - 1) * (nx - 1), 1)).numpy(),
    }
