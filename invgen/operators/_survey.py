"""Where sources and receivers of a survey lie on a 2-D grid (z, x); cells reach half a spacing around their nodes."""

from __future__ import annotations

import numpy as np

from invgen.grid import Grid

Array = np.ndarray


def frame(grid: Grid, what: str) -> tuple[list[float], list[float]]:
    """Upper left corner of the cells, and the height and width of all of them.

    Raises:
        ValueError: a grid that is not 2-D.
    """
    if len(grid.shape) != 2:
        raise ValueError(f"{what} need a 2-D grid (z, x), got the shape {grid.shape}.")
    low = [o - 0.5 * d for o, d in zip(grid.origin, grid.spacing, strict=True)]
    return low, [n * d for n, d in zip(grid.shape, grid.spacing, strict=True)]


def crosshole(grid: Grid, num_sources: int, num_receivers: int, what: str) -> tuple[Array, Array]:
    """Ends `(n, 2)` in two vertical holes along the left and right edges, at equal distances in depth."""
    low, (height, width) = frame(grid, what)

    def hole(count: int, x: float) -> Array:
        return np.stack([low[0] + (np.arange(count) + 0.5) / count * height, np.full(count, x)], axis=1)

    return hole(num_sources, low[1]), hole(num_receivers, low[1] + width)


def surface(grid: Grid, count: int, what: str) -> Array:
    """Ends `(n, 2)` along the upper edge at equal distances."""
    low, (_, width) = frame(grid, what)
    return np.stack([np.full(count, low[0]), low[1] + (np.arange(count) + 0.5) / count * width], axis=1)
