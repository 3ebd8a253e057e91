"""Operators given by a sparse matrix: rays through cells, a ray-traced lens, interpolation to scattered points."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invgen.contracts import LinearOperator
from invgen.covariance import Covariance, Scalar, as_covariance
from invgen.grid import Grid
from invgen.linalg import Solved
from invgen.operators._casts import Casts

__all__ = ["SparseOperator"]

# up to this many data the eigenvectors of A Aᵀ are kept: 4096² doubles are 134 MB, and a minute of LAPACK once
EIGEN_LIMIT = 4096


class _Product(torch.autograd.Function):
    """Rows of x times Aᵀ (or A); the derivative in either mode is the other product, by the same class."""

    @staticmethod
    def forward(x: Tensor, operator: SparseOperator, adjoint: bool) -> Tensor:
        matrix = operator._csr(x, adjoint)
        flat = x.reshape(-1, matrix.shape[1])
        return (matrix @ flat.T).T.reshape(*x.shape[:-1], matrix.shape[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.operator, ctx.adjoint = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _Product.apply(grad, ctx.operator, not ctx.adjoint), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:  # type: ignore[override]
        return _Product.apply(tangent, ctx.operator, ctx.adjoint)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, operator: SparseOperator, adjoint: bool) -> Any:
        return _Product.apply(x.movedim(in_dims[0], 0), operator, adjoint), 0


class SparseOperator(LinearOperator):
    """g(x) = A x over flattened items, A sparse and real.

    Entries given twice add up. (R + A C Aᵀ)⁻¹ is direct for scalar R and C through the eigenvectors of A Aᵀ where
    there are at most 4096 data (made once, O(n_data³)); conjugate gradients otherwise.

    Args:
        rows, columns: `(nnz,)` integer positions. values: `(nnz,)`.
        model_shape, data_shape: shapes of one item.
        model_grid: grid of the model.

    Raises:
        ValueError: indices outside the shapes, lengths that differ, values that are not finite or not real.

    Cost: nnz multiply-adds an item and direction; both A and Aᵀ are kept, in compressed rows.
    """

    rows: Tensor
    columns: Tensor
    values: Tensor

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
        rows, columns, values = torch.as_tensor(rows), torch.as_tensor(columns), torch.as_tensor(values)
        if not (rows.ndim == columns.ndim == values.ndim == 1 and len(rows) == len(columns) == len(values)):
            raise ValueError(
                f"rows, columns and values must be vectors of one length, got {tuple(rows.shape)}, {tuple(columns.shape)} and {tuple(values.shape)}."
            )
        if values.is_complex() or not bool(torch.isfinite(values).all()):
            raise ValueError("The entries of a SparseOperator must be real and finite; check how they were computed.")
        for name, index, shape in (("row", rows, data_shape), ("column", columns, model_shape)):
            if len(index) and not (0 <= int(index.min()) and int(index.max()) < math.prod(shape)):
                raise ValueError(
                    f"The {name} indices run from {int(index.min())} to {int(index.max())}, outside the {math.prod(shape)} entries of {tuple(shape)}."
                )
        super().__init__(model_shape, data_shape, model_grid=model_grid)
        size = (math.prod(self.data_shape), math.prod(self.model_shape))
        summed = torch.sparse_coo_tensor(
            torch.stack([rows.long(), columns.long()]), values.double(), size, check_invariants=False
        )
        summed = summed.coalesce()
        self.register_buffer("rows", summed.indices()[0].clone())
        self.register_buffer("columns", summed.indices()[1].clone())
        self.register_buffer("values", summed.values().clone())
        self._casts = Casts()

    @classmethod
    def from_scipy(cls, matrix: Any, model_shape: tuple[int, ...], data_shape: tuple[int, ...]) -> SparseOperator:
        """A `scipy.sparse` matrix `(n_data, n_model)`."""
        coo = matrix.tocoo()
        if tuple(coo.shape) != (math.prod(data_shape), math.prod(model_shape)):
            raise ValueError(
                f"A matrix {tuple(coo.shape)} cannot map models {tuple(model_shape)} to data {tuple(data_shape)}; their sizes must be its columns and rows."
            )
        rows, columns = (torch.from_numpy(np.asarray(part, dtype=np.int64)) for part in (coo.row, coo.col))
        values = torch.from_numpy(np.asarray(coo.data, dtype=np.float64))
        return SparseOperator(rows, columns, values, model_shape, data_shape)

    @classmethod
    def examples(cls) -> list[Any]:
        g = torch.Generator().manual_seed(11)

        def draw(nnz: int, n_data: int, n_model: int) -> tuple[Tensor, Tensor, Tensor]:
            rows, columns = (torch.randint(n, (nnz,), generator=g) for n in (n_data, n_model))
            return rows, columns, torch.randn(nnz, generator=g, dtype=torch.float64)

        return [cls(*draw(20, 6, 12), (1, 3, 4), (6,)), cls(*draw(14, 8, 5), (5,), (2, 4))]

    def _csr(self, like: Tensor, adjoint: bool) -> Tensor:
        def make() -> Tensor:
            index = torch.stack([self.columns, self.rows] if adjoint else [self.rows, self.columns])
            size = (math.prod(self.data_shape), math.prod(self.model_shape))
            size = size[::-1] if adjoint else size
            with warnings.catch_warnings():  # compressed rows announce themselves as beta once a process
                warnings.simplefilter("ignore", UserWarning)
                return torch.sparse_coo_tensor(index, self.values, size, check_invariants=False).to_sparse_csr()

        key = ("csr", adjoint, like.dtype, like.device)
        return self._casts.once(key, lambda: make().to(dtype=like.dtype, device=like.device))  # type: ignore[arg-type,no-any-return]

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        if x.is_complex():
            return torch.complex(self.forward(x.real), self.forward(x.imag))
        return _Product.apply(x.flatten(1), self, False).reshape(-1, *self.data_shape)

    def adjoint(self, d: Tensor) -> Tensor:
        return self._transpose(d)

    def _transpose(self, d: Tensor) -> Tensor:
        if d.is_complex():
            return torch.complex(self._transpose(d.real), self._transpose(d.imag))
        return _Product.apply(d.flatten(1), self, True).reshape(-1, *self.model_shape)

    def _gram(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors of A Aᵀ."""

        def make() -> tuple[Tensor, Tensor]:
            A = self._csr(self.values, False)
            values, vectors = torch.linalg.eigh((A @ A.to_dense().T).contiguous())
            return values.clamp_min(0.0), vectors

        return self._casts.once("gram", make)  # type: ignore[no-any-return]

    def solve(self, rhs: Tensor, R: Any, C: Any, **options: Any) -> Solved:
        """(R + A C Aᵀ)⁻¹ rhs: direct for scalar R and C (one for all or one an item), otherwise CG."""
        R, C = as_covariance(R, self.data_shape, batched=True), as_covariance(C, self.model_shape, batched=True)
        small = math.prod(self.data_shape) <= EIGEN_LIMIT and not rhs.is_complex()
        if not (small and isinstance(R, Scalar) and isinstance(C, Scalar)):
            return super().solve(rhs, R, C, **options)
        squares = self._casts("gram values", rhs, lambda: self._gram()[0])
        basis = self._casts("gram vectors", rhs, lambda: self._gram()[1])
        r, c = (_column(v, rhs) for v in (R, C))
        return Solved.direct((((rhs.flatten(1) @ basis) / (r + c * squares)) @ basis.T).reshape(rhs.shape))


def _column(covariance: Covariance, like: Tensor) -> Tensor:
    variance = covariance.variance.to(like)  # type: ignore[attr-defined]
    return variance[:, None] if variance.ndim else variance
