r"""Values of a field at points, over blocks, or any sparse averages of it: what kriging calls data.

    d = A x,      (R + A C Aᵀ)⁻¹ by conjugate gradients, preconditioned by Bᵀ S⁻² B of `invgen.vecchia`

For a stationary C and uncorrelated noise the matrix R + A C Aᵀ is, between data that see a node each, the covariance function
itself: its sparse inverse factor, each datum given its nearest predecessors, is known without the matrix and leaves a few
iterations where plain conjugate gradients take hundreds (dense data, little noise).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invgen.covariance import Covariance, Diagonal, Scalar, Stationary, as_covariance
from invgen.grid import Grid
from invgen.linalg import Solved, cg
from invgen.operators.sparse import SparseOperator
from invgen.vecchia import Vecchia

__all__ = ["PointSampling"]

_FEW = 200  # data for which the factor does not pay
_NEIGHBOURS = 24


class PointSampling(SparseOperator):
    """Sparse averages of a field on a grid `(1, *spatial)`: points, blocks, or rows of one's own.

    Args:
        rows, columns, values: entries of A, as for `SparseOperator`. model_shape: `(1, *spatial)`. data_shape: `(n_data,)`.
        model_grid: grid of the model.

    Cost: nnz multiply-adds an item and direction. `solve` for stationary C: some ten products with C, and one factorisation
    of 24 × 24 a datum once.
    """

    def __init__(
        self,
        rows: Tensor,
        columns: Tensor,
        values: Tensor,
        model_shape: tuple[int, ...],
        data_shape: tuple[int, ...],
        *,
        model_grid: Grid | None = None,
    ) -> None:
        super().__init__(rows, columns, values, model_shape, data_shape, model_grid=model_grid)
        self._kept: tuple[Covariance, Tensor, tuple[Vecchia, np.ndarray]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    @classmethod
    def at(cls, grid: Grid, points: Tensor | np.ndarray, *, kind: str = "linear") -> PointSampling:
        """Values at points.

        Args:
            grid: of the field, one channel. points: `(n, d)` coordinates in the unit of the grid.
            kind: "linear" interpolation between the nodes around, or the "nearest" node.

        Raises:
            ValueError: points outside the grid or not finite, an unknown kind.
        """
        p = np.asarray(points, dtype=np.float64)
        d = len(grid.shape)
        if p.ndim != 2 or p.shape[1] != d or not len(p):
            raise ValueError(f"Points are (n, {d}) coordinates along {grid.axes}, got the shape {p.shape}.")
        if not np.isfinite(p).all():
            raise ValueError(
                f"{int((~np.isfinite(p)).any(1).sum())} of {len(p)} points have coordinates that are not finite."
            )
        place = (p - np.asarray(grid.origin)) / np.asarray(grid.spacing)
        last = np.asarray(grid.shape) - 1
        out = (
            ((place < -0.5) | (place > last + 0.5)).any(1)
            if kind == "nearest"
            else ((place < -1e-9) | (place > last + 1e-9)).any(1)
        )
        if out.any():
            i = int(np.nonzero(out)[0][0])
            raise ValueError(
                f"{int(out.sum())} of {len(p)} points lie outside the grid, the first at {tuple(p[i])}; the grid runs from {grid.origin} to "
                f"{tuple(o + s * n for o, s, n in zip(grid.origin, grid.spacing, last, strict=True))}."
            )
        place = np.clip(place, 0, last)
        if kind == "nearest":
            columns = np.ravel_multi_index(tuple(np.rint(place).astype(np.int64).T), grid.shape)
            rows, weights = np.arange(len(p)), np.ones(len(p))
        elif kind == "linear":
            base = np.minimum(np.floor(place).astype(np.int64), np.maximum(last - 1, 0))
            part = place - base
            found = []
            for corner in np.ndindex(*(2,) * d):
                weight = np.prod(np.where(corner, part, 1 - part), axis=1)
                used = weight > 1e-12
                node = np.minimum(base + np.asarray(corner), last)
                found.append((np.nonzero(used)[0], np.ravel_multi_index(tuple(node[used].T), grid.shape), weight[used]))
            rows, columns, weights = (np.concatenate([f[k] for f in found]) for k in range(3))
        else:
            raise ValueError(f"kind must be 'linear' or 'nearest', got {kind!r}.")
        return cls(
            torch.from_numpy(rows),
            torch.from_numpy(columns),
            torch.from_numpy(weights),
            (1, *grid.shape),
            (len(p),),
            model_grid=grid,
        )

    @classmethod
    def blocks(cls, grid: Grid, low: Tensor | np.ndarray, high: Tensor | np.ndarray) -> PointSampling:
        """Means over boxes.

        Args:
            grid: of the field, one channel. low, high: `(n, d)` corners in the unit of the grid; a node belongs to the box it
                lies in, ends included.

        Raises:
            ValueError: a box without a node of the grid.
        """
        a, b = (np.atleast_2d(np.asarray(v, dtype=np.float64)) for v in (low, high))
        numbers = np.arange(math.prod(grid.shape)).reshape(grid.shape)
        rows, columns, weights = [], [], []
        for i, (first, last) in enumerate(zip(a, b, strict=True)):
            inside = [
                np.nonzero((grid.coordinates(k) >= first[k] - 1e-9) & (grid.coordinates(k) <= last[k] + 1e-9))[0]
                for k in range(len(grid.shape))
            ]
            own = numbers[np.ix_(*inside)].ravel()
            if not len(own):
                raise ValueError(
                    f"The block from {tuple(first)} to {tuple(last)} holds no node of the grid; check its corners."
                )
            rows.append(np.full(len(own), i))
            columns.append(own)
            weights.append(np.full(len(own), 1 / len(own)))
        row, column, weight = (torch.from_numpy(np.concatenate(v)) for v in (rows, columns, weights))
        return cls(row, column, weight, (1, *grid.shape), (len(a),), model_grid=grid)

    @classmethod
    def examples(cls) -> list[Any]:
        grid = Grid((4, 5), (1.0, 0.5), (2.0, 0.0))
        return [
            cls.at(grid, np.array([[2.0, 0.0], [3.5, 1.1], [5.0, 2.0]])),
            cls.at(grid, np.array([[2.2, 0.3], [2.2, 0.3]]), kind="nearest"),
            cls.blocks(grid, np.array([[2.0, 0.0], [3.0, 1.0]]), np.array([[3.0, 1.0], [5.0, 2.0]])),
        ]

    def _centres(self) -> tuple[np.ndarray, np.ndarray]:
        """Node nearest to the middle of each row, `(n_data, d)`, and the sums of the rows."""
        spatial = self.model_shape[1:]
        n = math.prod(self.data_shape)
        rows, weight = self.rows.cpu().numpy(), self.values.cpu().numpy()
        nodes = np.stack(np.unravel_index(self.columns.cpu().numpy(), spatial), -1)
        size = np.maximum(np.bincount(rows, np.abs(weight), n), 1e-300)
        middle = [np.bincount(rows, np.abs(weight) * nodes[:, k], n) / size for k in range(len(spatial))]
        return np.rint(np.stack(middle, -1)), np.bincount(rows, weight, n)

    def _factor(self, R: Scalar | Diagonal, C: Stationary) -> tuple[Vecchia, np.ndarray] | None:
        """K and s `(n_data, 1)`: R + A C Aᵀ is diag(s) K diag(s) if each row saw the node in its middle; None where singular."""
        noise = R.diagonal().detach().double().cpu().expand(self.data_shape)
        if self._kept is not None and self._kept[0] is C and torch.equal(self._kept[1], noise):
            return self._kept[2]
        table = torch.fft.ifftn(C.spectrum[0].double(), dim=tuple(range(C.spectrum.ndim - 1))).real.cpu().numpy()
        centres, sums = self._centres()
        # C at the nodes is a covariance wherever they are rounded to; the rows' sums scale it: d_i = s_i x + noise
        s = np.where(np.abs(sums) > 1e-6, sums, 1.0)
        sizes = np.asarray(C.padded)

        def covariance(lags: np.ndarray) -> np.ndarray:
            index = np.rint(lags).astype(np.int64) % sizes
            found: np.ndarray = table[tuple(index[..., k] for k in range(len(sizes)))]
            return found

        try:
            factor = Vecchia(centres, covariance, neighbours=_NEIGHBOURS, noise=noise.numpy().ravel() / s**2)
        except ValueError:
            return None
        self._kept = (C, noise, (factor, s[:, None]))
        return self._kept[2]

    def solve(self, rhs: Tensor, R: Any, C: Any, **options: Any) -> Solved:
        """(R + A C Aᵀ)⁻¹ rhs: as the class says for stationary C and uncorrelated noise, otherwise as `SparseOperator`."""
        R, C = as_covariance(R, self.data_shape, batched=True), as_covariance(C, self.model_shape, batched=True)
        plain = not isinstance(R, (Scalar, Diagonal)) or not isinstance(C, Stationary)
        few = math.prod(self.data_shape) < _FEW or self.model_shape[0] != 1
        if not plain and not few and not (R.per_item or C.per_item or rhs.is_complex()):
            found = self._factor(R, C)
            if found is not None:
                return self._preconditioned(rhs, R, C, found, **options)
        return super().solve(rhs, R, C, **options)

    def _preconditioned(
        self,
        rhs: Tensor,
        R: Covariance,
        C: Covariance,
        found: tuple[Vecchia, np.ndarray],
        *,
        rtol: float | None = None,
        max_iter: int = 1000,
        start: Tensor | None = None,
    ) -> Solved:
        factor, s = found

        def precondition(v: Tensor) -> Tensor:
            flat = v.detach().double().cpu().flatten(1).numpy().T
            return torch.from_numpy(np.ascontiguousarray((factor.solve(flat / s) / s).T)).to(v).reshape(v.shape)

        return cg(
            lambda v: R.apply(v) + self(C.apply(self.adjoint(v))),
            rhs,
            preconditioner=precondition,
            rtol=rtol if rtol is not None else (1e-10 if rhs.dtype == torch.float64 else 1e-5),
            max_iter=max_iter,
            start=start,
            check_every=1,
        )
