"""Paint sequences of discs along centrelines into images: what comes later covers what came before."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def paint(
    images: Array, item: Array, row: Array, column: Array, radius: Array, code: Array, spacing: tuple[float, float]
) -> None:
    """Write `code` into the pixels whose centre lies within `radius` of each point, in the order of the points, in place.

    Args:
        images: (n, ny, nx). item: (points,) image of each point, ascending. row, column: place in pixels (float).
        radius: in the unit of `spacing` (dy, dx). code: what to write.
    """
    n, ny, nx = images.shape
    dy, dx = (np.float32(s) for s in spacing)
    bounds = np.searchsorted(item, np.arange(n + 1))
    row, column, radius = (v.astype(np.float32) for v in (row, column, radius))
    for i in range(n):
        own = slice(bounds[i], bounds[i + 1])
        if bounds[i] == bounds[i + 1]:
            continue
        most = float(radius[own].max())
        reach_y, reach_x = int(most / dy) + 1, int(most / dx) + 1
        nearest_y, nearest_x = np.rint(row[own]), np.rint(column[own])
        step_y = np.arange(-reach_y, reach_y + 1, dtype=np.float32)
        step_x = np.arange(-reach_x, reach_x + 1, dtype=np.float32)
        far_y = ((nearest_y - row[own])[:, None] + step_y) * dy
        far_x = ((nearest_x - column[own])[:, None] + step_x) * dx
        far_x *= far_x
        room = np.square(radius[own])[:, None] - far_y * far_y
        point, j, k = np.nonzero(far_x[:, None, :] <= room[:, :, None])
        at_y = nearest_y.astype(np.int32)[point] + (j - reach_y)
        at_x = nearest_x.astype(np.int32)[point] + (k - reach_x)
        seen = (at_y >= 0) & (at_y < ny) & (at_x >= 0) & (at_x < nx)
        images[i].reshape(-1)[(at_y * nx + at_x)[seen]] = code[own][point[seen]]
