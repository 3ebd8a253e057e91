r"""Well logs as data of a field: values along a path, and the upscaling that brings a log to the field's resolution.

    d_k = Σ_j s_kj Σ_c w_jc x_c,        w: multilinear interpolation at point j of the path, s: a running mean along it.

A well is one more term beside the seismic data, `Term(log, WellLog(grid, path), GaussianNoise(sd))`, or it is left out and
kept for a blind check (`invgen.diagnostics.blind_well`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from invgen.grid import Grid
from invgen.operators.sparse import SparseOperator

__all__ = ["WellLog", "backus_average", "block_log"]

Array = np.ndarray


class WellLog(SparseOperator):
    """The field along a well path, `(channels, *spatial)` to `(channels read, points)`.

    Args:
        grid: of the field.
        path: `(points, axes)` coordinates in the grid's units and the order of its axes (z or t first). Deviated wells
            are paths like any other; `vertical` makes a straight one.
        channels: numbers or names of the channels read, all when omitted.
        smoothing: points of a running mean along the path, odd; what a tool or an upscaled log resolves. It is shorter at
            the ends of the path.

    Raises:
        ValueError: points outside the section (named, with its range), coordinates that are not finite, channels that do
            not exist, an even running mean.

    Cost: a `SparseOperator` with at most smoothing · 2^axes entries a datum.
    """

    def __init__(
        self, grid: Grid, path: Any, *, channels: Sequence[int | str] | None = None, smoothing: int = 1
    ) -> None:
        points = np.atleast_2d(np.asarray(path, dtype=np.float64))
        axes = len(grid.shape)
        if points.ndim != 2 or points.shape[1] != axes or not len(points):
            raise ValueError(
                f"A well path is (points, {axes}) coordinates, one an axis {grid.axes}, got the shape {points.shape}."
            )
        if not np.isfinite(points).all():
            raise ValueError("The well path holds coordinates that are not finite; cut the log where it was not run.")
        read = _channels(grid, channels)
        if smoothing < 1 or smoothing % 2 == 0:
            raise ValueError(f"The running mean along a well takes an odd number of points, got {smoothing}.")
        where = (points - np.asarray(grid.origin)) / np.asarray(grid.spacing)
        last = np.asarray(grid.shape) - 1
        outside = ((where < -1e-6) | (where > last + 1e-6)).any(axis=1)
        if outside.any():
            reach = ", ".join(
                f"{a} {grid.origin[i]:g} to {grid.origin[i] + last[i] * grid.spacing[i]:g} {grid.units[i]}".rstrip()
                for i, a in enumerate(grid.axes)
            )
            first = ", ".join(f"{v:g}" for v in points[int(np.argmax(outside))])
            raise ValueError(
                f"{int(outside.sum())} of {len(points)} points of the well lie outside the section ({reach}), the first at ({first}); cut the log to the section."
            )
        rows, columns, values = _interpolation(np.clip(where, 0, last), grid.shape)
        rows, columns, values = _running_mean(rows, columns, values, len(points), smoothing)
        size = int(np.prod(grid.shape))
        super().__init__(
            torch.from_numpy(np.concatenate([rows + k * len(points) for k in range(len(read))])),
            torch.from_numpy(np.concatenate([columns + c * size for c in read])),
            torch.from_numpy(np.tile(values, len(read))),
            grid.field_shape,
            (len(read), len(points)),
            model_grid=grid,
        )
        self.path, self.channels, self.smoothing = points, tuple(read), int(smoothing)

    @classmethod
    def vertical(cls, grid: Grid, position: Sequence[float], first: float, last: float, **options: Any) -> WellLog:
        """A well along the first axis: every sample of the grid from `first` to `last`, at `position` on the other axes.

        Args:
            position: coordinates on the other axes. first, last: in the units of the first axis.
        """
        z = grid.coordinates(0)
        slack = 1e-6 * grid.spacing[0]
        if first > last or first < z[0] - slack or last > z[-1] + slack:
            raise ValueError(
                f"The well runs from {first:g} to {last:g} but the section from {z[0]:g} to {z[-1]:g} {grid.units[0]}; cut the log to the section."
            )
        z = z[(z >= first - slack) & (z <= last + slack)]
        if not len(z):
            raise ValueError(f"No sample of the section lies between {first:g} and {last:g} {grid.units[0]}.")
        return cls(grid, np.column_stack([z, *(np.full(len(z), float(p)) for p in position)]), **options)

    @classmethod
    def examples(cls) -> list[Any]:
        """A deviated well with a running mean, and a vertical one through one channel of a volume."""
        section = Grid((5, 4), (2.0, 10.0), origin=(100.0, 0.0))
        volume = Grid((4, 2, 3), (1.0, 1.0, 1.0), channels=("vp", "rho"))
        path = np.column_stack([np.linspace(100.0, 107.3, 6), np.linspace(3.0, 28.0, 6)])
        return [cls(section, path, smoothing=3), cls.vertical(volume, (0.5, 2.0), 0.0, 3.0, channels=["rho"])]


def _channels(grid: Grid, channels: Sequence[int | str] | None) -> list[int]:
    known = list(grid.channels)
    found = []
    for c in range(len(known)) if channels is None else channels:
        if (isinstance(c, str) and c not in known) or (not isinstance(c, str) and not 0 <= c < len(known)):
            raise ValueError(f"The field has the channels {tuple(known)}, not {c!r}.")
        found.append(known.index(c) if isinstance(c, str) else int(c))
    if not found:
        raise ValueError("A well log reads at least one channel.")
    return found


def _interpolation(where: Array, shape: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """Row, flat cell and weight of the corners around each point `(points, axes)`, in samples."""
    low = np.minimum(np.floor(where).astype(np.int64), np.maximum(np.asarray(shape) - 2, 0))
    part = where - low
    rows, columns, values = [], [], []
    for corner in np.ndindex(*(2,) * len(shape)):
        up = np.asarray(corner)
        weight = np.where(up, part, 1 - part).prod(axis=1)
        kept = weight > 1e-12
        rows.append(np.flatnonzero(kept))
        columns.append(np.ravel_multi_index(tuple((low + up)[kept].T), shape))
        values.append(weight[kept])
    return np.concatenate(rows), np.concatenate(columns), np.concatenate(values)


def _running_mean(rows: Array, columns: Array, values: Array, points: int, length: int) -> tuple[Array, Array, Array]:
    """Each row replaced by the mean of its neighbours along the path, fewer at the ends."""
    if length == 1:
        return rows, columns, values
    half = length // 2
    shifts = np.arange(-half, half + 1)
    to = rows[None] + shifts[:, None]
    kept = (to >= 0) & (to < points)
    count = np.minimum(np.arange(points) + half, points - 1) - np.maximum(np.arange(points) - half, 0) + 1
    spread = np.broadcast_to(values[None], to.shape)[kept] / count[to[kept]]
    return to[kept], np.broadcast_to(columns[None], to.shape)[kept], spread


def block_log(depth: Any, values: Any, centres: Any, *, width: float | None = None, mean: str = "arithmetic") -> Array:
    """A log averaged in cells around `centres`: upscaling by a running mean, or a harmonic or geometric one.

    Args:
        depth: `(n,)`, increasing, in the units of the section's first axis. values: `(n,)`.
        centres: `(m,)` where averages are wanted, the samples of the section. width: of a cell, the distance of the
            first two centres when omitted.
        mean: "arithmetic", "harmonic" (moduli, slowness by time) or "geometric" (the mean of ln AI).

    Returns:
        `(m,)`. Each log sample stands for the interval halfway to its neighbours; partial intervals count in part.

    Raises:
        ValueError: depths that do not increase, cells outside the log (cut the section to it), an unknown mean.
    """
    z, v, c = (np.asarray(a, dtype=np.float64) for a in (depth, values, centres))
    if z.ndim != 1 or z.shape != v.shape or len(z) < 2 or not (np.diff(z) > 0).all() or not np.isfinite(v).all():
        raise ValueError("A log is two vectors of one length, depths increasing and values finite.")
    if mean not in ("arithmetic", "harmonic", "geometric"):
        raise ValueError(f'The mean is "arithmetic", "harmonic" or "geometric", got {mean!r}.')
    if width is None and len(c) < 2:
        raise ValueError("One cell alone has no distance to the next; give its width.")
    half = 0.5 * (float(c[1] - c[0]) if width is None else float(width))
    edges = np.concatenate([[1.5 * z[0] - 0.5 * z[1]], 0.5 * (z[1:] + z[:-1]), [1.5 * z[-1] - 0.5 * z[-2]]])
    slack = 1e-9 * (edges[-1] - edges[0])
    if (c - half < edges[0] - slack).any() or (c + half > edges[-1] + slack).any():
        raise ValueError(
            f"The cells reach from {float((c - half).min()):g} to {float((c + half).max()):g} but the log from {edges[0]:g} to {edges[-1]:g}; average inside the log only."
        )
    if mean != "arithmetic":
        v = 1 / v if mean == "harmonic" else np.log(v)
    total = np.concatenate([[0.0], np.cumsum(v * np.diff(edges))])
    out = (np.interp(c + half, edges, total) - np.interp(c - half, edges, total)) / (2 * half)
    return out if mean == "arithmetic" else 1 / out if mean == "harmonic" else np.exp(out)


def backus_average(depth: Any, vp: Any, rho: Any, centres: Any, *, width: float | None = None) -> tuple[Array, Array]:
    """Long-wavelength velocity and density of a finely layered log (Backus 1962, normal incidence).

        1/M = ⟨1/(ρ v²)⟩,  ρ̄ = ⟨ρ⟩,  v̄ = √(M/ρ̄)        ⟨·⟩ the mean over depth in a cell

    Args:
        depth, vp, rho: `(n,)`, depths (not times) increasing, velocity and density positive. centres, width: as in
            `block_log`; cells longer than a tenth of the wavelength are not long-wavelength any more.

    Returns:
        v̄ and ρ̄, `(m,)` each; the impedance is their product.

    Raises:
        ValueError: velocities or densities that are not positive; as `block_log`.
    """
    v, r = np.asarray(vp, dtype=np.float64), np.asarray(rho, dtype=np.float64)
    if not ((v > 0).all() and (r > 0).all()):
        raise ValueError("Velocities and densities of a log must be positive; cut the samples that were not measured.")
    modulus = block_log(depth, r * v**2, centres, width=width, mean="harmonic")
    density = block_log(depth, r, centres, width=width)
    return np.sqrt(modulus / density), density
