r"""Closed-form solves of separable operators under coloured noise, Σ_k A_kᴴ R_k⁻¹ A_k + c⁻¹, one small system a column.

With A_k = Z_k ⊗ X_k and R_k = (Q ⊗ P) diag(λ_il) (Q ⊗ P)ᵀ (white noise: λ = r, Q = P = I), the columns are rotated by
V, the eigenvectors in space of the first R_k that is not white. Terms that act trace by trace (X_k = I) with noise that
is white or shares V are then block diagonal, with the block of column j

    Σ_k Z_kᵀ Q diag_i( Σ_l s_lj / λ_il ) Qᵀ Z_k,      s = (Pᵀ X_k V)²  (entry by entry).

A smoothing term with white noise, r⁻¹ ZᵀZ ⊗ XᵀX = Uᵀ U, is of low rank to any accuracy, and joins by Woodbury,

    (B + Uᵀ U)⁻¹ = B⁻¹ − B⁻¹ Uᵀ (I + U B⁻¹ Uᵀ)⁻¹ U B⁻¹,      U the products of eigenvectors with r⁻¹ a_i b_j c > 10⁻⁴.

What is left out (and the blocks off the diagonal of any other term) makes the solve a preconditioner.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from invgen.covariance import BlockDiagonal, Covariance, Kronecker, Scalar

__all__: list[str] = []

LIMIT = 1 << 27  # numbers in the eigenvectors of all columns: 1 GB in float64
NEGLIGIBLE = 1e-4  # of a low-rank direction, against 1/c
MOST = 1024  # low-rank directions


class ColumnBlocks:
    """The blocks of all columns, decomposed; `solve` is (blocks + 1/variance)⁻¹.

    Args:
        terms: of each operator: factor, Z, X or None, and its noise. shape: `(channels, n_z, n_x)` of the model.
    """

    def __init__(self, terms: list[tuple[float, Tensor, Tensor | None, Covariance]], shape: tuple[int, ...]) -> None:
        _, n_z, n_x = shape
        eye = torch.eye(n_x, dtype=torch.float64)
        first = next(R for _, _, X, R in terms if isinstance(R, Kronecker) and X is None)
        self.V = None if first.P is None else first.P.cpu()
        V = eye if self.V is None else self.V
        blocks = torch.zeros(n_x, n_z, n_z, dtype=torch.float64)
        self.exact = True
        self.smooth: list[tuple[float, Tensor, Tensor, Tensor, Tensor]] = []
        for factor, Z, X, R in terms:
            if X is not None and isinstance(R, Scalar):
                pairs = [torch.linalg.eigh(M.cpu().mT @ M.cpu()) for M in (Z, X)]
                (a, U), (b, W) = pairs
                self.smooth.append((factor**2 / float(R.variance), a.clamp_min(0), U, b.clamp_min(0), W))
                self.exact = False
                continue
            turned = V if X is None else X.cpu() @ V
            if isinstance(R, Kronecker):
                G = R.Q.cpu().mT @ Z.cpu()
                s = (turned if R.P is None else R.P.cpu().mT @ turned).square()
                weights = (1 / R.values.cpu()) @ s  # (i, j)
                blocks += factor**2 * torch.einsum("iz,ij,iw->jzw", G, weights, G)
                self.exact &= R is first
            else:
                blocks += factor**2 / float(R.diagonal()) * (Z.cpu().mT @ Z.cpu())
        values, self.vectors = torch.linalg.eigh(blocks)
        self.values = values.clamp_min(0)
        self._casts: dict[Any, tuple[Tensor, ...]] = {}
        self._low: dict[Any, tuple[Tensor, Tensor]] = {}

    @classmethod
    def build(
        cls, parts: list[Any], R: Covariance, C: Covariance, shape: tuple[int, ...], cache: dict[Any, Any]
    ) -> ColumnBlocks | None:
        """The blocks of separable parts, kept in `cache`; None where the structure does not fit or would not pay."""
        from invgen.operators.algebra import Scaled
        from invgen.operators.separable import SeparableOperator

        noises = R.blocks if isinstance(R, BlockDiagonal) else [R]
        if not isinstance(C, Scalar) or len(noises) != len(parts):
            return None
        if len(shape) != 3 or shape[1] ** 2 * shape[2] > LIMIT or not any(isinstance(b, Kronecker) for b in noises):
            return None
        terms: list[tuple[float, Tensor, Tensor | None, Covariance]] = []
        for part, noise in zip(parts, noises, strict=True):
            factor = 1.0
            while isinstance(part, Scaled):
                factor, part = factor * part.factor, part.operator
            white = isinstance(noise, Scalar) and noise.variance.ndim == 0
            if not isinstance(part, SeparableOperator) or noise.per_item or not (white or isinstance(noise, Kronecker)):
                return None
            terms.append((factor, part.Z, part.X, noise))
        if not any(isinstance(noise, Kronecker) and X is None for _, _, X, noise in terms):
            return None
        # the noise itself is kept beside its blocks, so that an id cannot be taken over by another one
        key = tuple((f, float(b.variance) if isinstance(b, Scalar) else id(b)) for f, _, _, b in terms)
        if cache.get("columns", (None,))[0] != key:
            cache["columns"] = (key, cls(terms, shape), noises)
        return cache["columns"][1]

    def solve(self, rhs: Tensor, variance: Tensor) -> Tensor:
        """(blocks + low rank + 1/variance)⁻¹ rhs for `(batch, channels, n_z, n_x)`; variance a number or `(batch,)`."""
        if not self.smooth or variance.ndim:
            return self._columns(rhs, variance)
        U, inner = self._low_rank(rhs, variance)
        if not len(U):
            return self._columns(rhs, variance)
        y = self._columns(rhs, variance)
        share = y.flatten(2) @ U.mT @ inner
        return y - self._columns((share @ U).reshape(y.shape), variance)

    def _low_rank(self, like: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """U `(k, n_z n_x)` and (I + U B⁻¹ Uᵀ)⁻¹ at this variance, of which the last one is kept."""
        key = (float(variance), like.dtype, like.device)
        if key not in self._low:
            found, weights = [], []
            for w, a, left, b, right in self.smooth:
                gain = w * float(variance) * a[:, None] * b[None]
                i, j = torch.nonzero(gain > NEGLIGIBLE, as_tuple=True)
                found.append(
                    torch.einsum("zk,xk->kzx", left[:, i], right[:, j]) * (w * a[i] * b[j]).sqrt()[:, None, None]
                )
                weights.append(gain[i, j])
            U = torch.cat(found)[torch.cat(weights).argsort(descending=True)[:MOST]]
            solved = self._columns(U[:, None], variance.double().cpu())
            K = torch.eye(len(U), dtype=torch.float64) + U.flatten(1) @ solved.flatten(1).mT
            self._low.clear()
            self._low[key] = (U.flatten(1).to(like), torch.linalg.inv((K + K.mT) / 2).to(like))
        return self._low[key]

    def _columns(self, rhs: Tensor, variance: Tensor) -> Tensor:
        """(blocks + 1/variance)⁻¹ rhs."""
        key = (rhs.dtype, rhs.device)
        if key not in self._casts:
            kept = (self.values, self.vectors) if self.V is None else (self.values, self.vectors, self.V)
            self._casts[key] = tuple(t.to(rhs) for t in kept)
        values, vectors, *rotation = self._casts[key]
        batch, channels, n, width = rhs.shape
        w = torch.matmul(rhs, rotation[0]) if rotation else rhs
        columns = w.permute(3, 2, 0, 1).reshape(width, n, batch * channels)
        inverse = (1 / variance.to(rhs)).reshape(-1).repeat_interleave(channels if variance.ndim else 1)
        columns = torch.bmm(vectors, torch.bmm(vectors.mT, columns) / (values[:, :, None] + inverse))
        out = columns.reshape(width, n, batch, channels).permute(2, 3, 1, 0)
        return torch.matmul(out, rotation[0].mT) if rotation else out
