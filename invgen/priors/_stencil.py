r"""The matrix of κ² − ∇·H∇ on a regular grid with reflecting boundaries, applied in place.

The energy Σ H_ij ∂_i u ∂_j u is summed over the corners between the cells, with differences across the faces for the
diagonal of H and their means for its off-diagonal entry. A mean of squares is at least the square of the mean, so that the
energy is non-negative for every positive definite H, however anisotropic, and M ≥ κ². Without off-diagonal entries it is the
usual scheme of 2 d + 1 points, with them one of 9 points.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

Offset = tuple[int, ...]


def _regions(offset: Offset) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where s and s + offset both lie on the grid: slices of s, and of s + offset."""
    here = {0: slice(None), 1: slice(None, -1), -1: slice(1, None)}
    there = {0: slice(None), 1: slice(1, None), -1: slice(None, -1)}
    return tuple(here[o] for o in offset), tuple(there[o] for o in offset)


def _everywhere(offset: Offset) -> tuple[Any, Any]:
    """The same behind any leading axes."""
    here, there = _regions(offset)
    return (..., *here), (..., *there)


class Stencil:
    """A symmetric matrix of nearest neighbours: constant entries, or one an entry of the grid.

    Args:
        shape: of the grid. diagonal: a number (before the boundaries are corrected) or `shape`. entries: offset -> number or
            tensor on the region where both ends lie on the grid; of ± offset one is given.

    Attributes:
        bounds: an interval that holds all eigenvalues.
    """

    def __init__(
        self, shape: tuple[int, ...], diagonal: float | Tensor, entries: dict[Offset, float | Tensor], low: float
    ) -> None:
        self.shape, self.diagonal, self.entries = tuple(shape), diagonal, entries
        self.bounds = (low, self._gershgorin())
        self._casts: dict[tuple[torch.dtype, torch.device], Stencil] = {}

    @property
    def constant(self) -> bool:
        return not isinstance(self.diagonal, Tensor)

    def _gershgorin(self) -> float:
        if not isinstance(self.diagonal, Tensor):
            return float(self.diagonal) + 2 * sum(abs(float(e)) for e in self.entries.values())
        total = self.diagonal.clone()
        for offset, m in self.entries.items():
            here, there = _regions(offset)
            size = torch.as_tensor(m, dtype=total.dtype).abs()
            total[here] += size
            total[there] += size
        return float(total.max())

    def _like(self, v: Tensor) -> Stencil:
        key = (v.dtype, v.device)
        if key not in self._casts:
            other = copy.copy(self)
            if isinstance(self.diagonal, Tensor):
                other.diagonal = self.diagonal.to(v)
                other.entries = {o: m.to(v) if isinstance(m, Tensor) else m for o, m in self.entries.items()}
            self._casts[key] = other
        return self._casts[key]

    def accumulate(self, out: Tensor, v: Tensor, alpha: float) -> None:
        """out += alpha · M v; leading axes are items."""
        own = self._like(v)
        if isinstance(own.diagonal, Tensor):
            out.addcmul_(own.diagonal, v, value=alpha)
        else:
            out.add_(v, alpha=alpha * own.diagonal)
        for offset, m in own.entries.items():
            here, there = _everywhere(offset)
            if isinstance(m, Tensor):
                out[here].addcmul_(m, v[there], value=alpha)
                out[there].addcmul_(m, v[here], value=alpha)
            else:
                out[here].add_(v[there], alpha=alpha * m)
                out[there].add_(v[here], alpha=alpha * m)
                axis = next(i for i, o in enumerate(offset) if o) - len(offset)
                for end in (0, -1):  # no neighbour, no flux: the entry goes back to the diagonal
                    out.select(axis, end).add_(v.select(axis, end), alpha=alpha * m)

    def apply(self, v: Tensor) -> Tensor:
        """M v, a new tensor."""
        out = torch.zeros_like(v)
        self.accumulate(out, v, 1.0)
        return out

    def mapped(self) -> Stencil:
        """X = (2 M − (b + a)) / (b − a), whose eigenvalues lie in [−1, 1]."""
        a, b = self.bounds
        s, t = 2 / (b - a), (b + a) / (b - a)
        other = copy.copy(self)
        other._casts = {}
        other.diagonal = s * self.diagonal - t
        other.entries = {o: s * m for o, m in self.entries.items()}
        return other

    def eigenvalues(self) -> Tensor | None:
        """Under the cosine transform, `shape`, where that makes M diagonal (constant entries along the axes)."""
        if isinstance(self.diagonal, Tensor):
            return None
        total = torch.full(self.shape, float(self.bounds[0]), dtype=torch.float64)
        for offset, m in self.entries.items():
            axis = next(i for i, o in enumerate(offset) if o)
            k = torch.arange(self.shape[axis], dtype=torch.float64)
            values = -2 * float(m) * (1 - torch.cos(math.pi * k / self.shape[axis]))
            total += values.reshape(-1, *(1,) * (len(self.shape) - 1 - axis))
        return total

    def matrix(self) -> scipy.sparse.csc_matrix:
        """M as a sparse matrix."""
        n = math.prod(self.shape)
        numbers = np.arange(n).reshape(self.shape)
        if isinstance(self.diagonal, Tensor):
            diagonal = self.diagonal.double().numpy().copy()
        else:
            diagonal = np.full(self.shape, float(self.diagonal))
        rows, columns, values = [], [], []
        for offset, m in self.entries.items():
            here, there = _regions(offset)
            i, j = numbers[here].ravel(), numbers[there].ravel()
            rows += [i, j]
            columns += [j, i]
            value = m.double().numpy().ravel() if isinstance(m, Tensor) else np.full(len(i), float(m))
            values += [value, value]
            if not isinstance(m, Tensor):
                axis = next(k for k, o in enumerate(offset) if o)
                for end in (0, -1):
                    np.moveaxis(diagonal, axis, 0)[end] += float(m)
        rows.append(numbers.ravel())
        columns.append(numbers.ravel())
        values.append(diagonal.ravel())
        triple = (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns)))
        return scipy.sparse.coo_matrix(triple, shape=(n, n)).tocsc()


def diffusion(kappa2: float, H: np.ndarray, shape: tuple[int, ...], spacing: Sequence[float]) -> Stencil:
    """κ² − ∇·H∇.

    Args:
        kappa2: κ² > 0. H: `(d, d)`, or `(d, d, *shape)` where it varies; off-diagonal entries in 2-D alone.
        shape, spacing: of the grid.

    Raises:
        ValueError: off-diagonal entries in three dimensions.
    """
    d = len(shape)
    axes = [tuple(int(i == k) for k in range(d)) for i in range(d)]
    crossed = d > 1 and bool(np.any(H[~np.eye(d, dtype=bool)]))
    if crossed and d == 3:
        raise ValueError("Turned axes of anisotropy have no stencil in 3-D here; leave angle out, or use 'circulant'.")
    if H.ndim == 2 and not crossed:
        entries: dict[Offset, float | Tensor] = {
            o: -float(H[i, i]) / spacing[i] ** 2 for i, o in enumerate(axes) if shape[i] > 1
        }
        return Stencil(shape, kappa2 - 2 * sum(float(e) for e in entries.values()), entries, kappa2)
    wide = np.broadcast_to(H.reshape(*H.shape[:2], *(H.shape[2:] or (1,) * d)), (d, d, *shape))
    corner = wide
    for i in range(2, 2 + d):  # from the cells to the corners between them
        if corner.shape[i] > 1:
            corner = 0.5 * (
                np.take(corner, np.arange(1, corner.shape[i]), i) + np.take(corner, np.arange(corner.shape[i] - 1), i)
            )
    diagonal = torch.full(shape, kappa2, dtype=torch.float64)
    tensors: dict[Offset, Tensor] = {}

    def couple(offset: Offset, m: Tensor, *, outside: bool) -> None:
        here, there = _regions(offset)
        tensors[offset] = tensors[offset] + m if offset in tensors else m
        if outside:  # a difference: what leaves one cell enters the other
            diagonal[here] -= m
            diagonal[there] -= m

    for i, offset in enumerate(axes):
        if shape[i] == 1:
            continue
        face = corner[i, i]
        for k in range(
            d
        ):  # a face between cells touches the corners at its ends: their mean, one of them at the boundary
            if k != i and shape[k] > 1:
                padded = np.concatenate([np.take(face, [0], k), face, np.take(face, [-1], k)], k)
                face = 0.5 * (
                    np.take(padded, np.arange(1, padded.shape[k]), k)
                    + np.take(padded, np.arange(padded.shape[k] - 1), k)
                )
        couple(offset, -torch.from_numpy(np.ascontiguousarray(face)) / spacing[i] ** 2, outside=True)
    if crossed and min(shape) > 1:
        # 2 H01 g0 g1 at a corner, g the means of the differences: (u11 − u00)² and (u10 − u01)² with opposite signs
        m = torch.from_numpy(np.ascontiguousarray(corner[0, 1])) / (2 * spacing[0] * spacing[1])
        couple((1, 1), -m, outside=True)
        couple((1, -1), m, outside=True)
    return Stencil(shape, diagonal, dict(tensors), kappa2)
