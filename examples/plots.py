"""What the seismic examples draw with: sections, wiggles, log tracks and rays, every axis with its unit.

Sections are drawn from their `Grid`, time or depth downwards. Functions draw on axes they are given and return what
matplotlib returns; `page` makes a figure and `save` writes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from invgen.grid import Grid

__all__ = ["histogram", "log_track", "page", "rays", "save", "section", "wiggles"]

Array = np.ndarray
BAND, MEAN, TRUTH, OTHER = "#9ec5e8", "#14507a", "black", "#c0392b"
PLATE = {"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.75}
NAMES = {"t": "two-way time", "z": "depth", "x": "distance"}


def page(rows: int, columns: int, *, width: float = 4.6, height: float = 4.2, title: str = "") -> tuple[Figure, Any]:
    """A figure of panels, `width` by `height` inches each, and its axes `(rows, columns)`."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    if title:
        figure.suptitle(title, fontsize=13)
    return figure, axes


def save(figure: Figure, path: str | Path, dpi: int = 90) -> None:
    """Write the picture; its folder is created."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi, facecolor="white")


def axis_label(grid: Grid, axis: int) -> str:
    """Name and unit of an axis, e.g. "two-way time (s)"."""
    name = NAMES.get(grid.axes[axis], grid.axes[axis])
    return f"{name} ({grid.units[axis]})" if grid.units[axis] else name


def section(
    axes: Axes,
    values: Array,
    grid: Grid,
    *,
    title: str = "",
    label: str = "",
    wells: Mapping[str, float] | None = None,
    bar: bool = True,
    **style: Any,
) -> Any:
    """An image of a section with its colour bar.

    Args:
        values: `(rows, columns)` on the grid. label: quantity and unit, on the colour bar.
        wells: name -> lateral coordinate, dashed lines. style: of `imshow` (cmap, vmin, vmax).
    """
    style = {"cmap": "viridis", "aspect": "auto", "interpolation": "nearest", **style}
    image = axes.imshow(values, extent=grid.extent, **style)
    axes.set(title=title, xlabel=axis_label(grid, 1), ylabel=axis_label(grid, 0))
    for name, x in (wells or {}).items():
        axes.axvline(x, color="black", lw=0.9, ls="--")
        axes.annotate(name, (x, 0.98), xycoords=("data", "axes fraction"), fontsize=8, va="top", bbox=PLATE)
    if bar and axes.figure is not None:
        axes.figure.colorbar(image, ax=axes, label=label, fraction=0.05, pad=0.02)
    return image


def wiggles(axes: Axes, data: Array, grid: Grid, *, every: int = 4, clip: float | None = None, lw: float = 0.5) -> None:
    """Every so many traces as wiggles, positive lobes filled, on top of whatever is there.

    Args:
        data: `(nt, nx)` on the grid. clip: amplitude that is one trace distance (the 99th percentile when omitted).
    """
    t, x = grid.coordinates(0), grid.coordinates(1)
    clip = clip or float(np.percentile(np.abs(data), 99)) or 1.0
    reach = 0.9 * every * grid.spacing[1]
    for j in range(every // 2, len(x), every):
        swing = x[j] + reach * np.clip(data[:, j] / clip, -1.2, 1.2)
        axes.plot(swing, t, color="black", lw=lw)
        axes.fill_betweenx(t, x[j], swing, where=swing > x[j], color="black", alpha=0.6, lw=0)
    left, right, bottom, top = grid.extent
    axes.set(xlim=(left, right), ylim=(bottom, top))


def log_track(
    axes: Axes,
    position: Array,
    bands: Mapping[str, Array],
    *,
    log: Array,
    others: Mapping[str, Array] | None = None,
    title: str = "",
    label: str = "",
    vertical: str = "two-way time (s)",
    truth: str = "log",
) -> None:
    """A well downwards: the log, and the band (smallest to largest draw) and mean of each posterior.

    Args:
        position: `(n,)` times or depths. bands: name -> `(draws, n)`. log: `(n,)`. others: name -> `(n,)`, dashed.
        truth: what the black curve is called.
    """
    for (name, draws), (fill, line) in zip(bands.items(), ((BAND, MEAN), ("#f0b8a8", OTHER)), strict=False):
        axes.fill_betweenx(position, draws.min(0), draws.max(0), color=fill, alpha=0.7, lw=0)
        axes.plot(draws.mean(0), position, color=line, lw=1.4, label=f"{name}: mean, band of {len(draws)}")
    axes.plot(log, position, color=TRUTH, lw=1.1, label=truth)
    for name, curve in (others or {}).items():
        axes.plot(curve, position, color="0.35", lw=1.0, ls="--", label=name)
    axes.set(title=title, xlabel=label, ylabel=vertical, ylim=(position[-1], position[0]))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)


def rays(axes: Axes, sources: Array, receivers: Array, *, every: int = 1) -> None:
    """Straight lines from sources to receivers `(rays, 2)` (z, x), with a star and a triangle at their ends."""
    for a, b in zip(sources[::every], receivers[::every], strict=True):
        axes.plot([a[1], b[1]], [a[0], b[0]], color="black", lw=0.2, alpha=0.4)
    for points, mark in ((sources, "*"), (receivers, "v")):
        ends = np.unique(points, axis=0)
        axes.plot(ends[:, 1], ends[:, 0], mark, color="white", mec="black", ms=7, clip_on=False, ls="none")


def histogram(axes: Axes, sets: Mapping[str, Array], *, title: str = "", reach: float = 6.0) -> None:
    """Normalised values, e.g. residuals over their standard deviation, against N(0, 1); beyond `reach` they pile up."""
    bins = np.linspace(-reach, reach, 49)
    colours: Sequence[str] = (MEAN, OTHER, "#6b8e23")
    for (name, values), colour in zip(sets.items(), colours, strict=False):
        inside = np.clip(np.ravel(values), -reach, reach)
        axes.hist(inside, bins=bins.tolist(), density=True, histtype="stepfilled", alpha=0.45, color=colour, label=name)
    axes.plot(bins, np.exp(-0.5 * bins**2) / np.sqrt(2 * np.pi), color="black", lw=1.3, label="N(0, 1)")
    axes.set(title=title, xlabel="in standard deviations", ylabel="density")
    axes.legend(fontsize=8)
