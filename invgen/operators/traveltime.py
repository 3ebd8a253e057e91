r"""Travel times along straight rays: t = ∫ s dl = Σ_cells (length of the ray in the cell) · s_cell.

The slowness s is constant inside each cell; cell i of an axis is centred at origin + i · spacing and one spacing wide. The
lengths are exact (Siddon 1985, Medical Physics 12, 252: the ray's crossings with all cell borders, sorted).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from invgen.grid import Grid
from invgen.operators._survey import crosshole
from invgen.operators.sparse import SparseOperator

__all__ = ["StraightRays"]

Array = np.ndarray


class StraightRays(SparseOperator):
    """Travel times of straight rays through a slowness field, `(1, *shape)` to `(rays,)`.

    Linear in slowness (time per unit of length of the grid). For facies between 0 and 1 compose it:
    `StraightRays(…) @ Affine(s_mud, s_sand − s_mud)`.

    Args:
        grid: of the slowness, 2-D or 3-D.
        sources, receivers: `(rays, axes)` coordinates of the ends of each ray, in the grid's units and the order of its
            axes (z first). `crosshole` and `all_pairs` make them.

    Raises:
        ValueError: ends outside the cells of the grid, coordinates that are not finite, a ray without length.

    Cost: as a `SparseOperator` with at most Σ_axes shape + 1 entries a ray; built by NumPy once.
    """

    def __init__(self, grid: Grid, sources: Any, receivers: Any) -> None:
        a, b = (np.atleast_2d(np.asarray(p, dtype=np.float64)) for p in (sources, receivers))
        axes = len(grid.shape)
        if a.shape != b.shape or a.ndim != 2 or a.shape[1] != axes or not len(a):
            raise ValueError(
                f"Sources and receivers are (rays, {axes}) coordinates each, one pair a ray, got {a.shape} and {b.shape}; all_pairs combines every source with every receiver."
            )
        if len(grid.channels) != 1:
            raise ValueError(f"Travel times need one channel, slowness; the grid has {grid.channels}.")
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise ValueError(
                "Coordinates of sources and receivers must be finite; drop the rays whose ends are unknown."
            )
        spacing, low = np.asarray(grid.spacing), np.asarray(grid.origin) - 0.5 * np.asarray(grid.spacing)
        # in units of cells, borders at whole numbers
        start, end = (a - low) / spacing, (b - low) / spacing
        slack = 1e-9 * max(grid.shape)
        outside = ((np.minimum(start, end) < -slack) | (np.maximum(start, end) > np.asarray(grid.shape) + slack)).any(1)
        if outside.any():
            high = low + np.asarray(grid.shape) * spacing
            raise ValueError(
                f"{int(outside.sum())} of {len(a)} rays end outside the grid, which reaches from {tuple(low)} to {tuple(high)}; move them or enlarge the grid."
            )
        if (np.linalg.norm(b - a, axis=1) == 0).any():
            raise ValueError("A ray whose source is its receiver has no length; drop it.")
        rows, columns, lengths = _lengths(start, end, spacing, grid.shape)
        super().__init__(
            torch.from_numpy(rows),
            torch.from_numpy(columns),
            torch.from_numpy(lengths),
            grid.field_shape,
            (len(a),),
            model_grid=grid,
        )

    @classmethod
    def all_pairs(cls, grid: Grid, sources: Any, receivers: Any) -> StraightRays:
        """Every source `(n, axes)` with every receiver `(m, axes)`: n · m rays, the receivers of a source in a row."""
        s, r = (np.atleast_2d(np.asarray(p, dtype=np.float64)) for p in (sources, receivers))
        return cls(grid, np.repeat(s, len(r), axis=0), np.tile(r, (len(s), 1)))

    @classmethod
    def crosshole(cls, grid: Grid, num_sources: int = 24, num_receivers: int = 24) -> StraightRays:
        """Two vertical holes along the first and last columns, the ends at equal distances in depth (2-D grids)."""
        return cls.all_pairs(grid, *crosshole(grid, num_sources, num_receivers, "Cross-hole rays"))

    @classmethod
    def examples(cls) -> list[Any]:
        """Cross-hole rays through 4 × 3 cells, and oblique ones through 2 × 3 × 2."""
        volume = Grid((2, 3, 2), (1.0, 2.0, 1.0))
        return [
            cls.crosshole(Grid((4, 3), (10.0, 20.0)), 3, 2),
            cls(volume, [[-0.5, -1.0, -0.5], [0.2, 0.3, 0.4]], [[1.5, 5.0, 1.5], [1.3, 4.0, -0.4]]),
        ]


def _lengths(start: Array, end: Array, spacing: Array, shape: Sequence[int]) -> tuple[Array, Array, Array]:
    """Ray, flat cell and length of every piece of every ray; ends `(rays, axes)` in units of cells."""
    direction = end - start
    crossings = [np.zeros((len(start), 1)), np.ones((len(start), 1))]
    for axis, n in enumerate(shape):
        with np.errstate(divide="ignore", invalid="ignore"):
            at = (np.arange(n + 1)[None] - start[:, axis, None]) / direction[:, axis, None]
        # a ray along the borders crosses none of them
        crossings.append(np.where(np.isfinite(at), np.clip(at, 0.0, 1.0), 0.0))
    alpha = np.sort(np.concatenate(crossings, axis=1), axis=1)
    pieces = np.diff(alpha, axis=1)
    middle = 0.5 * (alpha[:, 1:] + alpha[:, :-1])
    cells = [
        np.clip(np.floor(start[:, axis, None] + middle * direction[:, axis, None]), 0, n - 1).astype(np.int64)
        for axis, n in enumerate(shape)
    ]
    flat = np.ravel_multi_index(tuple(cells), tuple(shape))
    length = np.linalg.norm(direction * spacing, axis=1)[:, None] * pieces
    rows = np.broadcast_to(np.arange(len(start))[:, None], flat.shape)
    kept = pieces > 1e-13
    return rows[kept].copy(), flat[kept], length[kept]
