r"""Covariances of gathers and sections that factor into time and space, plus white noise.

    R = T ⊗ X + ν I,      Cov[n(t, x), n(t', x')] = T(t, t') X(x, x') + ν δ_tt' δ_xx'

With T = Q diag(a) Qᵀ and X = P diag(b) Pᵀ, R = (Q ⊗ P) diag(a_i b_j + ν) (Q ⊗ P)ᵀ: every function of R is two rotations
and one product by a table, with no padding and no wrap-around, which a circulant covariance would have.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from invgen._covariance import Covariance, Scalar, scale_factor

__all__ = ["Kronecker", "toeplitz"]


def toeplitz(autocovariance: Tensor, n: int) -> Tensor:
    """The symmetric `(n, n)` matrix with entry c[|i − j|], zero beyond the lags given.

    Args:
        autocovariance: `(lags,)`, lag zero first. n: side.
    """
    c = torch.as_tensor(autocovariance)
    padded = torch.cat([c, c.new_zeros(max(n - len(c), 0))])[:n]
    index = torch.arange(n)
    return padded[(index[:, None] - index[None, :]).abs()]


class Kronecker(Covariance):
    """T ⊗ X + ν I on items `(channels, n_t, n_x)`, channels independent and alike.

    Args:
        T: `(n_t, n_t)`, symmetric, positive semi-definite.
        X: `(n_x, n_x)`, or None for traces that are independent.
        shape: `(channels, n_t, n_x)`; with X it may be left out (one channel).
        nugget: ν ≥ 0, the white part of the variance.

    Raises:
        ValueError: matrices that are not symmetric or have negative eigenvalues, shapes that do not fit, or a sum that
            is not positive definite (give a nugget).

    Cost: two eigendecompositions once; n_t² n_x + n_t n_x² multiply-adds a rotation, two rotations an application, one
    for a draw or a whitening.
    """

    _rank = 2

    P: Tensor | None

    def __init__(
        self, T: Tensor, X: Tensor | None = None, shape: tuple[int, ...] | None = None, *, nugget: float = 0.0
    ) -> None:
        T = torch.as_tensor(T).double()
        X = None if X is None else torch.as_tensor(X).double()
        if shape is None:
            if X is None:
                raise ValueError("A Kronecker covariance without X does not know its width; give shape=.")
            shape = (1, T.shape[0], X.shape[0])
        self.shape = tuple(int(s) for s in shape)
        wanted = (T.shape[0], self.shape[-1] if X is None else X.shape[0])
        if len(self.shape) != 3 or self.shape[1:] != wanted:
            raise ValueError(
                f"The factors of the covariance are for {wanted} samples and traces but the item is {self.shape}; give one row a sample and one a trace, and the shape (channels, n_t, n_x)."
            )
        a, self.Q = _eigen(T, "in time")
        b, self.P = torch.ones(self.shape[-1], dtype=torch.float64), None
        if X is not None:
            b, self.P = _eigen(X, "in space")
        self.values = _positive(a[:, None] * b[None, :] + float(nugget))
        self._casts: dict[Any, tuple[Tensor, Tensor | None, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_casts": {}}

    @property
    def per_item(self) -> bool:
        return self.values.ndim == 4

    def _parts(self, like: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        key = (like.dtype, like.device)
        if key not in self._casts:
            Q, P = self.Q.to(like), None if self.P is None else self.P.to(like)
            # the eigenvalues stay real: roots of complex numbers cost more
            self._casts[key] = (Q, P, self.values.to(device=like.device, dtype=like.real.dtype))
        return self._casts[key]

    def _analyse(self, v: Tensor) -> Tensor:
        Q, P, _ = self._parts(v)
        w = torch.matmul(Q.mT, v)
        return w if P is None else torch.matmul(w, P)

    def _synthesise(self, w: Tensor) -> Tensor:
        Q, P, _ = self._parts(w)
        v = torch.matmul(Q, w)
        return v if P is None else torch.matmul(v, P.mT)

    def apply(self, v: Tensor) -> Tensor:
        return self._synthesise(self._analyse(v) * self._parts(v)[2])

    def solve(self, v: Tensor) -> Tensor:
        return self._synthesise(self._analyse(v) / self._parts(v)[2])

    def sqrt(self, white: Tensor) -> Tensor:
        return self._synthesise(white * self._parts(white)[2].sqrt())

    def whiten(self, v: Tensor) -> Tensor:
        return self._analyse(v) / self._parts(v)[2].sqrt()

    def logdet(self) -> Tensor:
        total = self.shape[0] * self.values.log().sum((-2, -1))
        return total[:, 0] if self.per_item else total

    def diagonal(self) -> Tensor:
        P2 = torch.eye(self.shape[-1], dtype=torch.float64) if self.P is None else self.P.square()
        d = self.Q.square() @ self.values @ P2.mT
        return d.expand(*d.shape[: d.ndim - 2 - (d.ndim > 2)], *self.shape)

    def scaled(self, factor: float | Tensor) -> Kronecker:
        factor = scale_factor(factor, self.values)
        return self._with(self.values * (factor.reshape(-1, 1, 1, 1) if factor.ndim else factor))

    def _with(self, values: Tensor) -> Kronecker:
        other = object.__new__(Kronecker)
        other.shape, other.Q, other.P, other.values, other._casts = self.shape, self.Q, self.P, values, {}
        return other

    def _add(self, other: Covariance) -> Covariance:
        if isinstance(other, Scalar):
            extra = other.variance.to(self.values)
            return self._with(self.values + (extra.reshape(-1, 1, 1, 1) if extra.ndim else extra))
        return super()._add(other)


def _eigen(matrix: Tensor, what: str) -> tuple[Tensor, Tensor]:
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]
    if not square or not torch.allclose(matrix, matrix.mT, rtol=1e-5, atol=1e-8 * float(matrix.abs().max())):
        raise ValueError(
            f"The covariance {what} must be one symmetric matrix, got {tuple(matrix.shape)}; make one of an autocovariance with toeplitz()."
        )
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    if not float(values[-1]) > 0 or float(values[0]) < -1e-8 * float(values[-1]):
        raise ValueError(
            f"The covariance {what} has eigenvalues from {float(values[0]):g} to {float(values[-1]):g}: a cut-off autocovariance need not be positive semi-definite; taper it first."
        )
    return values.clamp_min(0), vectors


def _positive(values: Tensor) -> Tensor:
    if not float(values.min()) > 1e-14 * float(values.max()):
        raise ValueError(
            f"The covariance has eigenvalues from {float(values.min()):g} to {float(values.max()):g} and no inverse in float64; give a nugget (white noise)."
        )
    return values
