"""Figures of reports, as PNG in base64: panels with shared colour scales, profiles, histograms, marginals."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, ParamSpec

import numpy as np

from invgen.grid import Grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Panel", "histogram", "marginals", "panels", "profile"]

P = ParamSpec("P")
INK, BAND, TRUTH, MEAN = "#1f2933", "#9ec5e8", "#c0392b", "#14507a"


@dataclass(frozen=True)
class Panel:
    """One image or curve of a row.

    Args:
        title: above the panel. values: `(rows, columns)` image or `(n,)` curve.
        cmap, low, high: colours and their range. label: name and unit on the colour bar.
        grid: where the values live; sample numbers on the axes when None.
    """

    title: str
    values: np.ndarray
    cmap: str = "viridis"
    low: float | None = None
    high: float | None = None
    label: str = ""
    grid: Grid | None = None


STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.labelsize": 10,
    "axes.edgecolor": INK,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}


def styled(function: Callable[P, str]) -> Callable[P, str]:
    """Draw in the style of reports and leave the caller's matplotlib settings alone."""

    @functools.wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> str:
        import matplotlib as mpl

        with mpl.rc_context(STYLE):
            return function(*args, **kwargs)

    return inside


def new_figure(width: float, height: float) -> Figure:
    """A figure without the global state of pyplot."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def encode(figure: Figure) -> str:
    """PNG in base64, to stand in a page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def axis_label(grid: Grid | None, axis: int, count: int) -> str:
    """Name and unit of an axis, e.g. "depth z [m]"."""
    if grid is None:
        return "sample" if count == 1 or axis == 0 else "trace"
    name, unit = grid.axes[axis], grid.units[axis]
    long = {"z": "depth z", "t": "time t", "x": "distance x" if unit else "x", "y": "distance y" if unit else "y"}.get(
        name, name
    )
    return f"{long} [{unit}]" if unit else long


def draw(axes: Axes, panel: Panel, *, row_label: bool = True) -> Any:
    """One panel on given axes; the first axis of an image points down. Returns the image, or None for a curve."""
    values, grid = panel.values, panel.grid
    axes.set_title(panel.title)
    if values.ndim == 1:
        position = grid.coordinates(0) if grid is not None and grid.shape == values.shape else np.arange(len(values))
        axes.plot(position, values, color=MEAN, lw=1.2)
        axes.set_xlabel(axis_label(grid, 0, 1))
        axes.set_ylabel(panel.label)
        if panel.low is not None and panel.high is not None:
            margin = 0.05 * (panel.high - panel.low)
            axes.set_ylim(panel.low - margin, panel.high + margin)
        return None
    grid = grid if grid is not None and grid.shape == values.shape else None
    extent = grid.extent if grid is not None else (-0.5, values.shape[1] - 0.5, values.shape[0] - 0.5, -0.5)
    same_unit = grid is None or grid.units[0] == grid.units[1]
    tall = abs(extent[3] - extent[2]) / max(abs(extent[1] - extent[0]), 1e-12)
    aspect: Literal["equal", "auto"] = "equal" if same_unit and 0.3 < tall < 2.5 else "auto"
    image = axes.imshow(
        values, cmap=panel.cmap, vmin=panel.low, vmax=panel.high, extent=extent, aspect=aspect, interpolation="nearest"
    )
    axes.set_xlabel(axis_label(grid, 1, 2))
    if row_label:
        axes.set_ylabel(axis_label(grid, 0, 2))
    return image


@styled
def panels(items: Sequence[Panel], *, columns: int = 4, bars: str = "each") -> str:
    """A grid of panels; consecutive panels with the same colours and label share one colour bar (`bars="shared"`)."""
    columns = min(columns, len(items))
    rows = -(-len(items) // columns)
    first = items[0].values
    ratio = 0.72 if first.ndim == 1 else min(max(first.shape[0] / first.shape[1], 0.45), 1.25)
    width = 11.8 if columns >= 3 else 4.6 * columns
    figure = new_figure(width, rows * (width / columns * ratio * (0.72 if columns < 4 else 0.8) + 0.75))
    grid_of_axes = figure.subplots(rows, columns, squeeze=False)
    for k in range(rows * columns):
        axes = grid_of_axes[k // columns, k % columns]
        if k >= len(items):
            axes.set_axis_off()
            continue
        image = draw(axes, items[k], row_label=k % columns == 0 or bars == "each")
        last_of_row = k % columns == columns - 1 or k == len(items) - 1
        if image is not None and (bars == "each" or last_of_row):
            where = axes if bars == "each" else list(grid_of_axes[k // columns])
            figure.colorbar(image, ax=where, label=items[k].label, fraction=0.05, pad=0.02)
    return encode(figure)


@styled
def profile(
    position: np.ndarray,
    samples: np.ndarray | None,
    mean: np.ndarray,
    truth: np.ndarray | None,
    *,
    axis: str,
    label: str,
    title: str,
    vertical: bool = True,
) -> str:
    """Samples, their min–max band, mean and truth along a line; drawn like a log, downwards, when `vertical`.

    Args:
        position: `(n,)` coordinates. samples: `(draws, n)` or None. mean, truth: `(n,)`.
    """
    figure = new_figure(4.6, 6.4) if vertical else new_figure(11.0, 3.8)
    axes = figure.subplots()

    def line(values: np.ndarray, **style: Any) -> None:
        axes.plot(*((values, position) if vertical else (position, values)), **style)

    if samples is not None and len(samples) > 1:
        low, high = samples.min(0), samples.max(0)
        fill = axes.fill_betweenx if vertical else axes.fill_between
        fill(position, low, high, color=BAND, alpha=0.6, lw=0, label=f"min–max of {len(samples)} samples")
        for s in samples[:40]:
            line(s, color=MEAN, lw=0.4, alpha=0.35)
    line(mean, color=MEAN, lw=1.8, label="posterior mean" if samples is not None else "estimate")
    if truth is not None:
        line(truth, color=TRUTH, lw=1.5, label="truth")
    axes.set_title(title)
    if vertical:
        axes.set_ylim(position[-1], position[0])
        axes.set_xlabel(label)
        axes.set_ylabel(axis)
    else:
        axes.set_xlabel(axis)
        axes.set_ylabel(label)
    axes.grid(alpha=0.25)
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.11 if vertical else -0.2),
        ncol=1 if vertical else 3,
        frameon=False,
        fontsize=9,
    )
    return encode(figure)


@styled
def histogram(residual: np.ndarray, title: str) -> str:
    """Normalised residuals against N(0, 1)."""
    figure = new_figure(4.6, 3.6)
    axes = figure.subplots()
    reach = float(np.clip(np.abs(residual).max() if residual.size else 5.0, 4.0, 8.0))
    inside = np.clip(residual, -reach, reach)
    count = int(np.clip(np.sqrt(residual.size), 12, 60))
    axes.hist(
        inside,
        bins=np.linspace(-reach, reach, count).tolist(),
        density=True,
        color=BAND,
        edgecolor="white",
        lw=0.4,
        label="(data − prediction)/σ",
    )
    t = np.linspace(-reach, reach, 300)
    axes.plot(t, np.exp(-0.5 * t**2) / np.sqrt(2 * np.pi), color=TRUTH, lw=1.6, label="N(0, 1)")
    axes.set_xlabel("normalised residual")
    axes.set_ylabel("density")
    axes.set_title(title)
    axes.legend(frameon=False, fontsize=9)
    return encode(figure)


@styled
def marginals(
    samples: np.ndarray | None,
    weights: np.ndarray | None,
    mean: np.ndarray,
    truth: np.ndarray | None,
    *,
    most: int = 12,
    names: Sequence[str] = (),
) -> str:
    """Marginal histogram of each of the first `most` components of a vector model.

    Args:
        samples: `(draws, dim)` or None for a point estimate. weights: `(draws,)`. mean, truth: `(dim,)`.
    """
    dim = min(len(mean), most)
    columns = min(dim, 4)
    rows = -(-dim // columns)
    figure = new_figure(2.9 * columns + 0.3, 2.3 * rows + 0.4)
    grid_of_axes = figure.subplots(rows, columns, squeeze=False)
    for k in range(rows * columns):
        axes = grid_of_axes[k // columns, k % columns]
        if k >= dim:
            axes.set_axis_off()
            continue
        if samples is not None and len(samples) > 1:
            count = int(np.clip(np.sqrt(len(samples)), 8, 60))
            axes.hist(samples[:, k], bins=count, weights=weights, density=True, color=BAND, edgecolor="white", lw=0.3)
        axes.axvline(mean[k], color=MEAN, lw=1.8, label="mean" if samples is not None else "estimate")
        if truth is not None:
            axes.axvline(truth[k], color=TRUTH, lw=1.5, label="truth")
        axes.set_title(names[k] if k < len(names) else f"x[{k}]")
        axes.set_yticks([])
        if k == 0:
            axes.legend(frameon=False, fontsize=8.5)
    return encode(figure)
