"""Pictures of three-dimensional fields: three orthogonal slices and the box they are cut from.

volume_plot(field.sample(1)[0, 0], grid).savefig("volume.png")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from invgen.grid import Grid
from invgen.report.figures import INK, STYLE, axis_label, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["volume_plot"]

_FACE = 96  # cells an edge of the box is drawn with, at the most


def volume_plot(
    field: Any,
    grid: Grid | None = None,
    *,
    at: tuple[float, float, float] | None = None,
    channel: int = 0,
    cmap: str = "viridis",
    limits: tuple[float, float] | None = None,
    title: str = "",
    size: float = 3.4,
) -> Figure:
    """A volume as three slices through one point, and as a box with its three visible faces; one colour scale for all.

    Args:
        field: `(n1, n2, n3)`, or `(channels, n1, n2, n3)` with `channel`. A first axis named z or t points downwards.
        grid: axes, spacing and units; sample numbers when omitted.
        at: the point in units of the grid, the middle when omitted; the nearest samples are shown and named.
        channel: which one, of a field with channels. cmap, limits: colours and their range, the field's own when omitted.
        title: above the page. size: inches a panel.

    Returns:
        A matplotlib figure, without the global state of pyplot.

    Raises:
        ValueError: a field that is not a volume, nothing finite in it, a grid of another shape, a point outside it.
    """
    import matplotlib
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    values = _volume(field, channel)
    grid = Grid(values.shape, (1.0, 1.0, 1.0)) if grid is None else grid
    if tuple(grid.shape) != values.shape:
        raise ValueError(f"The field has the shape {values.shape} and the grid {tuple(grid.shape)}; they must agree.")
    where = _samples(grid, at)
    finite = values[np.isfinite(values)]
    if not len(finite):
        raise ValueError("The field has no finite value; there is nothing to draw.")
    low, high = limits or (float(finite.min()), float(finite.max()))
    norm = Normalize(low, high if high > low else low + 1.0)
    ends = [(o - 0.5 * s, o + (n - 0.5) * s) for o, s, n in zip(grid.origin, grid.spacing, values.shape, strict=True)]
    down = grid.axes[0] in ("z", "t")

    with matplotlib.rc_context(STYLE):
        figure = new_figure(4 * size + 1.0, size + 0.5)
        panels = figure.subplots(1, 4, gridspec_kw={"width_ratios": (1, 1, 1, 1.25)})
        image: Any = None
        for axes, across in zip(panels[:3], range(3), strict=True):
            rows, columns = (k for k in range(3) if k != across)
            cut = np.take(values, where[across], axis=across)
            (top, bottom), (left, right) = ends[rows], ends[columns]
            flip = rows == 0 and down
            image = axes.imshow(
                cut,
                extent=(left, right, bottom, top) if flip else (left, right, top, bottom),
                origin="upper" if flip else "lower",
                aspect="auto",
                cmap=cmap,
                norm=norm,
                interpolation="nearest",
            )
            axes.set_xlabel(axis_label(grid, columns, 3))
            axes.set_ylabel(axis_label(grid, rows, 3))
            axes.axhline(_position(grid, rows, where), color=INK, lw=0.7, ls=":")
            axes.axvline(_position(grid, columns, where), color=INK, lw=0.7, ls=":")
            unit = f" {grid.units[across]}" if grid.units[across] else ""
            axes.set_title(f"{grid.axes[across]} = {_position(grid, across, where):.4g}{unit}")
        place = panels[3].get_subplotspec()
        panels[3].remove()
        _box(figure.add_subplot(place, projection="3d"), values, grid, ends, colormaps[cmap], norm, down)
        one = min(channel, len(grid.channels) - 1)
        name, unit = grid.channels[one], grid.channel_units[one]
        figure.colorbar(image, ax=list(panels[:3]), label=f"{name} [{unit}]" if unit else name, shrink=0.9)
        if title:
            figure.suptitle(title)
    return figure


def _volume(field: Any, channel: int) -> np.ndarray:
    """The field as `(n1, n2, n3)` doubles."""
    values = np.asarray(field.detach().cpu() if hasattr(field, "detach") else field)
    if values.ndim == 4 and 0 <= channel < len(values):
        values = values[channel]
    if values.ndim != 3 or np.iscomplexobj(values):
        raise ValueError(
            f"volume_plot draws a real volume (n1, n2, n3) or a channel of (channels, n1, n2, n3), got {tuple(np.shape(field))}, channel {channel}; pick one sample."
        )
    return values.astype(np.float64)


def _samples(grid: Grid, at: tuple[float, float, float] | None) -> tuple[int, ...]:
    """The sample of every axis that is nearest to the point."""
    if at is None:
        return tuple(n // 2 for n in grid.shape)
    found = tuple(round((a - o) / s) for a, o, s in zip(at, grid.origin, grid.spacing, strict=True))
    if any(not 0 <= i < n for i, n in zip(found, grid.shape, strict=True)):
        last = tuple(o + s * (n - 1) for o, s, n in zip(grid.origin, grid.spacing, grid.shape, strict=True))
        raise ValueError(f"The point {at} lies outside the grid, which runs from {tuple(grid.origin)} to {last}.")
    return found


def _position(grid: Grid, axis: int, where: tuple[int, ...]) -> float:
    return grid.origin[axis] + grid.spacing[axis] * where[axis]


def _box(axes: Any, values: np.ndarray, grid: Grid, ends: list[Any], colours: Any, norm: Any, down: bool) -> None:
    """The faces that are seen from the front, the right and above; first axis upright."""
    steps = [max(1, -(-n // _FACE)) for n in values.shape]
    edges = [
        np.linspace(end[0], end[1], len(range(0, n, step)) + 1)
        for end, n, step in zip(ends, values.shape, steps, strict=True)
    ]
    thin = values[tuple(slice(None, None, s) for s in steps)]
    v, y, x = edges
    top = 0 if down else -1  # the first axis points down: its first samples lie on top
    faces = (
        (thin[top], *np.meshgrid(x, y), v[top]),  # from above
        (thin[:, 0], *np.meshgrid(x, v), y[0]),  # the front
        (thin[:, :, -1], *np.meshgrid(y, v), x[-1]),  # the right
    )
    for k, (face, a, b, level) in enumerate(faces):
        flat = np.full_like(a, level)
        corners = ((a, b, flat), (a, flat, b), (flat, a, b))[k]
        axes.plot_surface(
            *corners, facecolors=colours(norm(face)), rstride=1, cstride=1, shade=False, linewidth=0, antialiased=False
        )
    axes.set_xlabel(axis_label(grid, 2, 3))
    axes.set_ylabel(axis_label(grid, 1, 3))
    axes.set_zlabel(axis_label(grid, 0, 3))
    if down:
        axes.invert_zaxis()
    axes.view_init(elev=28, azim=-55)
    axes.set_box_aspect(None, zoom=0.85)
