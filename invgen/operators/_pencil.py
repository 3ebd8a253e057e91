r"""Closed-form solves of separable stacks whose column blocks would not fit into memory.

A stack of terms that act along z alone and of terms that share X along x is, after the columns are rotated by the
eigenvectors V of Xᵀ X, the small system F + b_j M + c⁻¹ I in column j (`SeparableBlocks`). Three symmetric matrices have
no common eigenvectors, and one decomposition a column is n_z² n_x numbers: 96 GB on a 2000 × 3000 section. But two of
them have. With F + c⁻¹ I = L Lᵀ and L⁻¹ M L⁻ᵀ = Q diag(λ) Qᵀ (the pencil of M and F + c⁻¹ I),

    (F + b_j M + c⁻¹ I)⁻¹ = T diag(1 / (1 + b_j λ)) Tᵀ,        T = L⁻ᵀ Q,

for every column at once: one decomposition each time c changes instead, and n_z² numbers.

Reference: Golub & Van Loan 2013, section 8.7 (the symmetric-definite generalised eigenproblem).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__: list[str] = []


class Pencil:
    """`solve` is (F ⊗ I + M ⊗ Xᵀ X + 1/variance)⁻¹, exact, for any number of columns.

    Args:
        fixed: F `(n_z, n_z)`. moving: M `(n_z, n_z)`. X: `(m_x, n_x)`. All positive semi-definite Gram matrices in float64.

    Cost: an eigendecomposition in x once, one in z for each new variance; two rotations in x and two in z a solve.
    """

    exact = True

    def __init__(self, fixed: Tensor, moving: Tensor, X: Tensor) -> None:
        self.fixed, self.moving = fixed, moving
        b, self.V = torch.linalg.eigh(X.mT @ X)
        self.b = b.clamp_min(0)
        self._last: tuple[float, Tensor, Tensor] | None = None
        self._casts: dict[Any, tuple[Tensor, Tensor, Tensor]] = {}

    def solve(self, rhs: Tensor, variance: Tensor) -> Tensor:
        """The solution for `(batch, channels, n_z, n_x)`; variance a number or `(batch,)`."""
        if not variance.ndim:
            return self._solve(rhs, float(variance))
        out = torch.empty_like(rhs)
        for c in variance.unique().tolist():
            rows = variance == c
            out[rows] = self._solve(rhs[rows], c)
        return out

    def _solve(self, rhs: Tensor, variance: float) -> Tensor:
        V, T, gain = self._parts(rhs, variance)
        w = torch.matmul(T.mT, torch.matmul(rhs, V))
        w /= gain
        return torch.matmul(torch.matmul(T, w), V.mT)

    def _parts(self, like: Tensor, variance: float) -> tuple[Tensor, Tensor, Tensor]:
        """V, T and 1 + b_j λ_i `(n_z, n_x)`, in the precision of `like`; those of the last variance are kept."""
        if self._last is None or self._last[0] != variance:
            eye = torch.eye(len(self.fixed), dtype=self.fixed.dtype)
            L = torch.linalg.cholesky(self.fixed + eye / variance)
            inverse = torch.linalg.solve_triangular(L, eye, upper=False)
            inside = inverse @ self.moving @ inverse.mT
            values, Q = torch.linalg.eigh((inside + inside.mT) / 2)
            self._last = (variance, inverse.mT @ Q, 1 + values.clamp_min(0)[:, None] * self.b[None])
            self._casts.clear()
        key = (like.dtype, like.device)
        if key not in self._casts:
            _, T, gain = self._last
            self._casts[key] = (self.V.to(like), T.to(like), gain.to(like))
        return self._casts[key]
