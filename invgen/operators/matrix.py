"""Operators given by their matrix."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from invgen.contracts import LinearOperator
from invgen.covariance import Covariance, Dense, Diagonal, Scalar, as_covariance
from invgen.linalg import Solved
from invgen.operators._casts import Casts

__all__ = ["MatrixOperator"]


class MatrixOperator(LinearOperator):
    """g(x) = M x over flattened items, M real or complex.

        (R + M C Mᴴ)⁻¹ and (Mᴴ R⁻¹ M + C⁻¹)⁻¹ are direct:
        through one SVD M = U S Vᴴ for (per-item) scalar R = r and C = c, U [1/(r + c s²)] Uᴴ, else by Cholesky.

    Args:
        matrix: `(n_data, n_model)`, kept in its dtype; data are complex where it is.
        model_shape: shape of one model; `(n_model,)` when omitted.
        data_shape: shape of one data set; `(n_data,)` when omitted.
        real_model: with a complex matrix, whether models are real (visibilities of a real image): the adjoint is then
            Re(Mᴴ d), the adjoint under Re⟨u, v⟩, and solves are left to conjugate gradients.

    Raises:
        ValueError: a matrix that is not two-dimensional and finite, or shapes that do not hold its rows and columns.

    Cost: n_data n_model multiply-adds an item and direction; the SVD once, in double precision.
    """

    matrix: Tensor

    def __init__(
        self,
        matrix: Tensor,
        model_shape: tuple[int, ...] | None = None,
        data_shape: tuple[int, ...] | None = None,
        *,
        real_model: bool = False,
    ) -> None:
        matrix = torch.as_tensor(matrix)
        if matrix.ndim != 2 or not (matrix.is_floating_point() or matrix.is_complex()):
            raise ValueError(
                f"MatrixOperator needs a floating-point matrix (n_data, n_model), got {tuple(matrix.shape)} of {matrix.dtype}; reshape or convert it."
            )
        if not bool(torch.isfinite(matrix).all()):
            raise ValueError(
                "The matrix holds NaN or infinite entries; every entry must be finite, check how it was built."
            )
        model_shape = tuple(model_shape) if model_shape is not None else (matrix.shape[1],)
        data_shape = tuple(data_shape) if data_shape is not None else (matrix.shape[0],)
        if (math.prod(data_shape), math.prod(model_shape)) != tuple(matrix.shape):
            raise ValueError(
                f"A matrix {tuple(matrix.shape)} cannot map models {model_shape} to data {data_shape}; their sizes must be its columns and rows."
            )
        super().__init__(model_shape, data_shape)
        self.register_buffer("matrix", matrix.detach().clone())
        self.real_model = bool(real_model) and matrix.is_complex()
        self._casts = Casts()

    @classmethod
    def examples(cls) -> list[Any]:
        g = torch.Generator().manual_seed(1)
        wide = torch.randn(5, 12, generator=g, dtype=torch.float64)
        tall = torch.randn(9, 4, generator=g, dtype=torch.float64)
        mixed = torch.randn(3, 4, generator=g, dtype=torch.complex128)
        return [cls(wide, (1, 3, 4)), cls(tall, data_shape=(3, 3)), cls(mixed), cls(mixed, real_model=True)]

    def _matrix(self, like: Tensor) -> Tensor:
        return self._casts("matrix", like, lambda: self.matrix)

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        M = self._matrix(x)
        return (x.flatten(1).to(M.dtype) @ M.mT).reshape(-1, *self.data_shape)

    def adjoint(self, d: Tensor) -> Tensor:
        M = self._matrix(d)
        m = (d.flatten(1).to(M.dtype) @ M.conj()).reshape(-1, *self.model_shape)
        return m.real if self.real_model else m

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U `(n_data, r)`, s `(r,)`, Vᴴ `(r, n_model)` with r = min(n_data, n_model), in double precision."""
        if self.real_model:
            return super().svd()
        wide = torch.complex128 if self.matrix.is_complex() else torch.float64
        return self._casts.once("svd", lambda: torch.linalg.svd(self.matrix.to(wide), full_matrices=False))

    def _through_svd(self, rhs: Tensor, data_space: bool, inside: Any, outside: Any) -> Tensor:
        """Basis · inside(s²) · basisᴴ rhs, and outside · rhs on the complement of the basis."""
        name = "U" if data_space else "V"
        basis = self._casts(name, rhs, lambda: self.svd()[0] if data_space else self.svd()[2].mH)
        squares = self._casts("s2", rhs.real, lambda: self.svd()[1].square())
        v = rhs.flatten(1).to(basis.dtype)
        w = v @ basis.conj()
        out = (w * inside(squares)) @ basis.mT
        if basis.shape[1] < basis.shape[0]:
            out = out + (v - w @ basis.mT) * outside
        return out.reshape(rhs.shape)

    def solve(self, rhs: Tensor, R: Any, C: Any, **options: Any) -> Solved:
        """(R + M C Mᴴ)⁻¹ rhs, direct: SVD for scalar R and C (one for all or one an item), Cholesky otherwise."""
        R, C = as_covariance(R, self.data_shape, batched=True), as_covariance(C, self.model_shape, batched=True)
        if self.real_model:
            return super().solve(rhs, R, C, **options)
        if isinstance(R, Scalar) and isinstance(C, Scalar):
            r, c = _column(R, rhs), _column(C, rhs)
            return Solved.direct(self._through_svd(rhs, True, lambda s2: 1 / (r + c * s2), 1 / r))
        M = self._double()
        return Solved.direct(_cholesky_solve(_dense(R, M) + M @ _dense(C, M) @ M.mH, rhs))

    def solve_model(self, rhs: Tensor, R: Any, C: Any, **options: Any) -> Solved:
        """(Mᴴ R⁻¹ M + C⁻¹)⁻¹ rhs, direct like `solve`."""
        R, C = as_covariance(R, self.data_shape, batched=True), as_covariance(C, self.model_shape, batched=True)
        if self.real_model:
            return super().solve_model(rhs, R, C, **options)
        if isinstance(R, Scalar) and isinstance(C, Scalar):
            r, c = _column(R, rhs), _column(C, rhs)
            return Solved.direct(self._through_svd(rhs, False, lambda s2: 1 / (s2 / r + 1 / c), c))
        M = self._double()
        weighted = torch.linalg.solve(_dense(R, M), M)
        system = M.mH @ weighted + torch.linalg.inv(_dense(C, M))
        return Solved.direct(_cholesky_solve(0.5 * (system + system.mH), rhs))

    def _double(self) -> Tensor:
        return self.matrix.to(torch.complex128 if self.matrix.is_complex() else torch.float64)


def _column(covariance: Scalar, like: Tensor) -> Tensor:
    """The variance, ready to multiply `(batch, r)`."""
    variance = covariance.variance.to(like.real)
    return variance[:, None] if variance.ndim else variance


def _dense(covariance: Covariance, like: Tensor) -> Tensor:
    """`(n, n)`, or `(batch, n, n)` where every item has its own."""
    n = math.prod(covariance.shape)
    if isinstance(covariance, Scalar):
        return covariance.variance.to(like)[..., None, None] * torch.eye(n, dtype=like.dtype, device=like.device)
    if isinstance(covariance, Diagonal):
        return torch.diag_embed(covariance.variance.to(like).flatten(-len(covariance.shape)))
    if isinstance(covariance, Dense):
        return covariance.factor.to(like)[..., None, None] * covariance.matrix.to(like)
    return covariance.dense().to(like)


def _cholesky_solve(system: Tensor, rhs: Tensor) -> Tensor:
    """Factored in double precision, whatever rhs is: a condition number of 1e6 costs float32 all its digits."""
    v = rhs.flatten(1).to(system.dtype if system.is_complex() or not rhs.is_complex() else torch.complex128)
    factor = torch.linalg.cholesky(system).to(v.dtype)
    if system.ndim == 2:  # one system, every item a column
        x = torch.cholesky_solve(v.mT, factor).mT
    else:
        x = torch.cholesky_solve(v[..., None], factor)[..., 0]
    return x.to(rhs.dtype if rhs.is_complex() or not x.is_complex() else rhs.dtype.to_complex()).reshape(rhs.shape)
