"""Widths and sinuosities of channels in binary images."""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage, sparse
from scipy.sparse import csgraph

from invgen.diagnostics._arrays import Array
from invgen.diagnostics.fields import clusters, images

__all__ = ["channel_width", "sinuosity"]


def channel_width(x: Array, *, threshold: float = 0.5) -> np.ndarray:
    """Mean width of the set above the threshold in pixels, `(n,)`; NaN for an image without one.

    Twice the distance to the background at the ridge of the distance transform, less half a pixel at either side: a bar
    of w pixels has the width w. Rows and columns next to the window's border are left out, where channels are cut.
    """
    inside = (images(x) > threshold).numpy()
    out = np.full(len(inside), math.nan)
    for k, image in enumerate(inside):
        if image.all() or not image.any():
            continue
        padded = np.pad(image, 1, mode="edge")
        distance = ndimage.distance_transform_edt(padded)[1:-1, 1:-1]
        # a ridge: no neighbour is further inside; a bar of even width has two rows of it, of equal distance
        ridge = image & (distance >= ndimage.maximum_filter(distance, 3) - 1e-9)
        ridge[[0, -1]] = ridge[:, [0, -1]] = False
        if ridge.any():
            near = distance[ridge]
            # an even bar's two ridge rows are w/2 from the background, an odd one's single row (w + 1)/2
            out[k] = float(np.mean(2 * near - _odd(distance, ridge)))
    return out


def _odd(distance: np.ndarray, ridge: np.ndarray) -> np.ndarray:
    """1 where the ridge is one pixel wide, 0 where a neighbour has the same distance across it."""
    inner = slice(1, -1)
    marked = np.pad(np.where(ridge, distance, -1.0), 1, constant_values=-1.0)
    smooth = np.pad(distance, 1, mode="edge")
    up, down, left, right = (
        (slice(None, -2), inner),
        (slice(2, None), inner),
        (inner, slice(None, -2)),
        (inner, slice(2, None)),
    )
    # across a channel the distance bends down, along it it does not
    bend_y, bend_x = smooth[up] + smooth[down] - 2 * distance, smooth[left] + smooth[right] - 2 * distance
    twin = np.where(bend_y <= bend_x, np.maximum(marked[up], marked[down]), np.maximum(marked[left], marked[right]))
    return np.where(np.abs(twin - distance) < 1e-9, 0.0, 1.0)[ridge]


def sinuosity(x: Array, *, threshold: float = 0.5, axis: str = "x") -> np.ndarray:
    """Length of the shortest way through the set across the window over the window's length, `(n,)`.

    Ways go along the ridge: a step costs its length times (1 + 4/distance to the background), which keeps them to the
    middle of a channel; what is returned is their plain length. NaN where nothing crosses.

    Args:
        axis: from left to right ("x") or from the first row to the last ("y").
    """
    inside = (images(x) > threshold).numpy()
    inside = inside if axis == "x" else inside.transpose(0, 2, 1)
    labels = clusters(inside)
    out = np.full(len(inside), math.nan)
    for k, (image, label) in enumerate(zip(inside, labels, strict=True)):
        through = np.intersect1d(label[:, 0], label[:, -1])
        through = through[through > 0]
        lengths = [_way(image & (label == c)) for c in through]
        if lengths:
            out[k] = float(np.mean(lengths)) / (image.shape[1] - 1)
    return out


def _way(image: np.ndarray) -> float:
    """Length in pixels of the cheapest way from the first column to the last within one cluster."""
    index = np.full(image.shape, -1)
    index[image] = np.arange(image.sum())
    distance = ndimage.distance_transform_edt(np.pad(image, 1, mode="edge"))[1:-1, 1:-1]
    rows, columns, costs, lengths = [], [], [], []
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        a = index[: image.shape[0] - dy, max(0, -dx) : image.shape[1] - max(0, dx)]
        b = index[dy:, max(0, dx) : image.shape[1] - max(0, -dx)]
        da = distance[: image.shape[0] - dy, max(0, -dx) : image.shape[1] - max(0, dx)]
        db = distance[dy:, max(0, dx) : image.shape[1] - max(0, -dx)]
        both = (a >= 0) & (b >= 0)
        step = math.hypot(dy, dx)
        rows.append(a[both])
        columns.append(b[both])
        costs.append(step * (1 + 4 / (0.5 * (da + db)[both]) ** 2))
        lengths.append(np.full(int(both.sum()), step))
    n = int(image.sum())
    i, j, c, length = (np.concatenate(v) for v in (rows, columns, costs, lengths))
    graph = sparse.coo_matrix((c, (i, j)), shape=(n, n)).tocsr()
    steps = sparse.coo_matrix((length, (i, j)), shape=(n, n)).tocsr()
    starts, ends = index[:, 0][index[:, 0] >= 0], index[:, -1][index[:, -1] >= 0]
    cost, before, _ = csgraph.dijkstra(graph, directed=False, indices=starts, return_predecessors=True, min_only=True)
    at = int(ends[np.argmin(cost[ends])])
    total = 0.0
    while before[at] >= 0:
        last = int(before[at])
        total += max(float(steps[last, at]), float(steps[at, last]))
        at = last
    return total
