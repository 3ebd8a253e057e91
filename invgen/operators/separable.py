r"""Separable operators on 2-D fields, A m = Z m Xᵀ, and closed-form solves with them.

With the eigendecompositions Zᵀ Z = U diag(a) Uᵀ and Xᵀ X = V diag(b) Vᵀ,

    (r⁻¹ Aᴴ A + c⁻¹)⁻¹ m = U [ (Uᵀ m V) / (r⁻¹ a_i b_j + c⁻¹) ] Vᵀ,

for any noise variance r and model variance c: one decomposition serves every step of a sampler. A stack of separable
operators that share X (or act column by column, X = I) is block diagonal after m V: one small system a column.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from invgen.contracts import LinearOperator
from invgen.covariance import BlockDiagonal, Covariance, Scalar, as_covariance
from invgen.grid import Grid
from invgen.linalg import Solved
from invgen.operators._pencil import Pencil

__all__ = ["SeparableBlocks", "SeparableOperator"]

LIMIT = 1 << 27  # numbers in the eigenvectors of all columns: 1 GB in float64


class SeparableOperator(LinearOperator):
    """A m = Z m Xᵀ for fields `(batch, channels, n_z, n_x)`.

    Args:
        Z: `(m_z, n_z)` matrix along the first spatial axis.
        X: `(m_x, n_x)` along the second, or None for the identity (trace by trace).
        width: n_x, needed when X is None.
        channels: channels, each treated alike.
        model_grid: grid of the model.

    Cost: n_z m_z n_x + m_z n_x m_x multiply-adds a channel and direction. The matrices are kept in float64 and cast
    once to each dtype and device they are used in.
    """

    Z: Tensor
    X: Tensor | None

    def __init__(
        self,
        Z: Tensor,
        X: Tensor | None = None,
        *,
        width: int | None = None,
        channels: int = 1,
        model_grid: Grid | None = None,
    ) -> None:
        if X is None and width is None:
            raise ValueError("SeparableOperator needs X or the width of the model.")
        n_x = X.shape[1] if X is not None else int(width)  # type: ignore[arg-type]
        m_x = X.shape[0] if X is not None else n_x
        super().__init__((channels, Z.shape[1], n_x), (channels, Z.shape[0], m_x), model_grid=model_grid)
        self.register_buffer("Z", Z.to(torch.float64))
        self.register_buffer("X", None if X is None else X.to(torch.float64))
        self._cast: dict[Any, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cast": {}}

    @classmethod
    def examples(cls) -> list[Any]:
        g = torch.Generator().manual_seed(5)
        Z, X = torch.randn(3, 4, generator=g, dtype=torch.float64), torch.randn(5, 3, generator=g, dtype=torch.float64)
        return [cls(Z, X, channels=2), cls(Z, width=3)]

    def _as(self, name: str, like: Tensor) -> Tensor:
        key = (name, like.dtype, like.device)
        if key not in self._cast:
            with torch.inference_mode(False):  # a cast born in inference mode could not take part in a gradient later
                self._cast[key] = self._matrix(name).to(dtype=like.dtype, device=like.device).contiguous()
        return self._cast[key]

    def _matrix(self, name: str) -> Tensor:
        if name in ("Z", "X"):
            return getattr(self, name)
        if name in ("ZT", "XT"):
            return getattr(self, name[0]).mT
        side, kind = name[0], name[1:]  # "Zmodel": eigenpairs of ZᵀZ; "Zdata": of ZZᵀ
        M = getattr(self, side)
        n = (self.model_shape if kind.startswith("model") else self.data_shape)[1 if side == "Z" else 2]
        if M is None:
            return torch.ones(n, dtype=torch.float64) if name.endswith("values") else torch.eye(n, dtype=torch.float64)
        gram = M.mT @ M if kind.startswith("model") else M @ M.mT
        values, vectors = torch.linalg.eigh(gram)
        return values.clamp_min(0) if name.endswith("values") else vectors

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        out = torch.matmul(self._as("Z", x), x)
        return out if self.X is None else torch.matmul(out, self._as("XT", x))

    def adjoint(self, d: Tensor) -> Tensor:
        out = torch.matmul(self._as("ZT", d), d)
        return out if self.X is None else torch.matmul(out, self._as("X", d))

    def _filter(self, v: Tensor, space: str, gain: Any) -> Tensor:
        """U gain(eigenvalues of the Gram operator) Uᵀ v."""
        U, V = self._as(f"Z{space}vectors", v), None if self.X is None else self._as(f"X{space}vectors", v)
        w = torch.matmul(U.mT, v)
        w = w if V is None else torch.matmul(w, V)
        values = self._as(f"Z{space}values", v)[:, None] * self._as(f"X{space}values", v)[None, :]
        w = torch.matmul(U, w * gain(values))
        return w if V is None else torch.matmul(w, V.mT)

    def solve(self, rhs: Tensor, R: Any, C: Any, **options: Any) -> Solved:
        """(R + A C Aᴴ)⁻¹ rhs: direct for scalar C and scalar R (also one value an item) or, trace by trace, coloured R."""
        R, C = as_covariance(R, self.data_shape, batched=True), as_covariance(C, self.model_shape, batched=True)
        if not (isinstance(R, Scalar) and isinstance(C, Scalar)):
            if self._columns(R, C) is None or rhs.is_complex():
                return super().solve(rhs, R, C, **options)
            weighted = R.solve(rhs.double())  # a difference that cancels
            x = weighted - R.solve(self(self._columns(R, C).solve(self.adjoint(weighted), C.diagonal())))
            return Solved.direct(x.to(rhs))
        r, c = _column(R.variance, rhs), _column(C.variance, rhs)
        return Solved.direct(self._filter(rhs, "data", lambda a: 1 / (r + c * a)))

    def solve_model(self, rhs: Tensor, R: Any, C: Any, **options: Any) -> Solved:
        """(Aᴴ R⁻¹ A + C⁻¹)⁻¹ rhs: direct for scalar C and scalar or, trace by trace, coloured R; otherwise CG."""
        R, C = as_covariance(R, self.data_shape, batched=True), as_covariance(C, self.model_shape, batched=True)
        if not (isinstance(R, Scalar) and isinstance(C, Scalar)):
            if self._columns(R, C) is None or rhs.is_complex():
                return super().solve_model(rhs, R, C, **options)
            return Solved.direct(self._columns(R, C).solve(rhs, C.diagonal()))
        r, c = _column(R.variance, rhs), _column(C.variance, rhs)
        return Solved.direct(self._filter(rhs, "model", lambda a: 1 / (a / r + 1 / c)))

    def _columns(self, R: Covariance, C: Covariance) -> Any:
        """The column blocks of coloured noise, where the operator acts trace by trace."""
        from invgen.operators._column_blocks import ColumnBlocks

        return ColumnBlocks.build([self], R, C, self.model_shape, self._cast) if self.X is None else None


def _column(variance: Tensor, like: Tensor) -> Tensor:
    return variance.to(like).reshape(-1, 1, 1, 1) if variance.ndim else variance.to(like)


class SeparableBlocks:
    """Σ_k r_k⁻¹ A_kᴴ A_k + c⁻¹ for separable A_k that act along x through one and the same X (or not at all).

    After the columns are rotated by the eigenvectors V of Xᵀ X, column j is the small system
    Σ_k r_k⁻¹ b_jk Z_kᵀ Z_k + c⁻¹ with b_jk the eigenvalue of X_kᵀ X_k (1 for X_k = I). Columns whose b_j no longer
    matters (relative 1e-4) share one decomposition, and `exact` is then False: the solve is a preconditioner.
    """

    negligible = 1e-4

    def __init__(self, fixed: Tensor, moving: Tensor | None, X: Tensor | None, width: int) -> None:
        if moving is None or X is None:
            values, vectors = torch.linalg.eigh(fixed)
            self.V, self.values, self.vectors = None, values.clamp_min(0)[None], vectors[None]
            self.group, self.exact = torch.zeros(width, dtype=torch.long), True
            return
        b, V = torch.linalg.eigh(X.mT @ X)
        b = b.clamp_min(0)
        scale = float(torch.linalg.matrix_norm(moving, 2))
        distinct = torch.nonzero(b * scale > self.negligible).flatten()
        matrices = torch.cat([fixed[None], fixed[None] + b[distinct, None, None] * moving[None]])
        values, vectors = torch.linalg.eigh(matrices)
        self.V, self.values, self.vectors = V, values.clamp_min(0), vectors
        self.group = torch.zeros(width, dtype=torch.long)
        self.group[distinct] = torch.arange(1, len(distinct) + 1)
        self.exact = bool((b * scale <= 1e-12).logical_or(self.group > 0).all())
        self.distinct, self.shared = distinct, torch.nonzero(self.group == 0).flatten()
        self._cast: dict[Any, tuple[Tensor, ...]] = {}

    @classmethod
    def build(
        cls, parts: list[Any], R: BlockDiagonal, C: Covariance, cache: dict[Any, Any]
    ) -> SeparableBlocks | Pencil | None:
        """The blocks of a stack, cached by noise level; None when the structure does not fit.

        Blocks of all columns that would hold more than `LIMIT` numbers are never made: `Pencil` solves the same system.
        """
        from invgen.operators.algebra import Scaled

        flat: list[tuple[float, SeparableOperator]] = []
        for part in parts:
            factor = 1.0
            while isinstance(part, Scaled):
                factor, part = factor * part.factor, part.operator
            if not isinstance(part, SeparableOperator):
                return None
            flat.append((factor, part))
        if not isinstance(C, Scalar) or not all(isinstance(b, Scalar) and b.variance.ndim == 0 for b in R.blocks):
            return None
        along_x = [op.X for _, op in flat if op.X is not None]
        if any(X.shape != along_x[0].shape or not torch.equal(X, along_x[0]) for X in along_x):
            return None
        weights = tuple(f**2 / float(b.variance) for (f, _), b in zip(flat, R.blocks, strict=True))  # type: ignore[attr-defined]
        if weights not in cache:
            n = flat[0][1].model_shape[1]
            fixed, moving = torch.zeros(n, n, dtype=torch.float64), None
            for w, (_, op) in zip(weights, flat, strict=True):
                gram = w * (op.Z.mT @ op.Z).cpu()
                if op.X is None:
                    fixed = fixed + gram
                else:
                    moving = gram if moving is None else moving + gram
            shared = along_x[0].cpu() if along_x else None
            width = flat[0][1].model_shape[2]
            cache.clear()
            if moving is not None and shared is not None and n * n * width > LIMIT:
                cache[weights] = Pencil(fixed, moving, shared)
            else:
                cache[weights] = cls(fixed, moving, shared, width)
        return cache[weights]

    def _to(self, like: Tensor) -> tuple[Tensor, ...]:
        key = (like.dtype, like.device)
        if self.V is None:
            return (self.values.to(like), self.vectors.to(like))
        if key not in self._cast:
            self._cast[key] = tuple(t.to(like) for t in (self.V, self.values, self.vectors))
        return self._cast[key]

    def solve(self, rhs: Tensor, variance: Tensor) -> Tensor:
        """(Σ_k … + 1/variance)⁻¹ rhs for `(batch, channels, n_z, n_x)`; variance a number or `(batch,)`."""
        inverse = (1 / variance.to(rhs)).reshape(-1, 1, 1, 1)
        if self.V is None:
            values, vectors = self._to(rhs)
            Q = vectors[0]
            return torch.matmul(Q, torch.matmul(Q.mT, rhs) / (values[0][:, None] + inverse))
        V, values, vectors = self._to(rhs)
        w = torch.matmul(rhs, V)
        out = torch.empty_like(w)
        Q = vectors[0]
        rest = w[..., self.shared]
        out[..., self.shared] = torch.matmul(Q, torch.matmul(Q.mT, rest) / (values[0][:, None] + inverse))
        if len(self.distinct):
            Q = vectors[1:]  # (j, z, z)
            batch, channels, n, _ = w.shape
            columns = w[..., self.distinct].permute(3, 2, 0, 1).reshape(len(self.distinct), n, -1)
            gain = values[1:][:, :, None] + inverse.reshape(-1)[None, None, :].expand(1, 1, batch).repeat_interleave(
                channels, dim=2
            )
            columns = torch.bmm(Q, torch.bmm(Q.mT, columns) / gain)
            out[..., self.distinct] = columns.reshape(len(self.distinct), n, batch, channels).permute(2, 3, 1, 0)
        return torch.matmul(out, V.mT)
