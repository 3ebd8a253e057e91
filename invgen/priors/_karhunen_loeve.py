r"""Karhunen–Loève: the leading eigenvectors of a covariance, Σ_r = V Λ_r Vᵀ.

    u = Σ_{k ≤ r} √λ_k v_k z_k,      E |u_Σ − u_r|² = Σ_{k > r} λ_k      (the least of all expansions with r terms)

With r = n it is all of Σ; with r < n the field lives in a subspace and has no density.

Reference: Ghanem & Spanos, Stochastic Finite Elements, 1991, section 2.3.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from invgen.covariance import Covariance, Dense
from invgen.linalg import randomized_eigh

_LIMIT = 4096  # entries up to which all eigenvectors are found


class KarhunenLoeve(Covariance):
    """Σ_r = V Λ_r Vᵀ on one item; the white noise has r numbers.

    Args:
        values: λ, `(r,)`, positive, falling. vectors: V, `(n, r)`, orthonormal columns. shape: of one item.
        total: the trace of the covariance that was expanded.

    Cost: two products with `(n, r)` an application, one a draw.
    """

    _rank = 3

    def __init__(self, values: Tensor, vectors: Tensor, shape: tuple[int, ...], total: float) -> None:
        self.values, self.vectors, self.shape, self.total = values, vectors, tuple(shape), total
        self._casts: dict[Any, tuple[Tensor, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_casts": {}}

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return (len(self.values),)

    @property
    def has_solve(self) -> bool:
        return len(self.values) == math.prod(self.shape)

    @property
    def energy(self) -> float:
        """Share of the variance that the terms hold."""
        return float(self.values.sum()) / self.total

    def _parts(self, like: Tensor) -> tuple[Tensor, Tensor]:
        key = (like.dtype, like.device)
        if key not in self._casts:
            self._casts[key] = (self.values.to(like), self.vectors.to(like))
        return self._casts[key]

    def _diagonal_in_basis(self, v: Tensor, gain: Tensor) -> Tensor:
        V = self._parts(v)[1]
        return ((v.flatten(-len(self.shape)) @ V) * gain @ V.mT).reshape(v.shape)

    def _require_full(self, what: str) -> None:
        if not self.has_solve:
            raise TypeError(
                f"{what} of {len(self.values)} Karhunen–Loève terms does not exist in {math.prod(self.shape)} dimensions; take all terms or another method."
            )

    def apply(self, v: Tensor) -> Tensor:
        return self._diagonal_in_basis(v, self._parts(v)[0])

    def solve(self, v: Tensor) -> Tensor:
        self._require_full("The inverse")
        return self._diagonal_in_basis(v, 1 / self._parts(v)[0])

    def sqrt(self, white: Tensor) -> Tensor:
        values, V = self._parts(white)
        return (white * values.sqrt() @ V.mT).reshape(*white.shape[:-1], *self.shape)

    def whiten(self, v: Tensor) -> Tensor:
        """Λ^(−1/2) Vᵀ v, `(batch, r)`: with fewer terms than entries, the coordinates of the projection."""
        values, V = self._parts(v)
        return v.flatten(-len(self.shape)) @ V / values.sqrt()

    def shrink(self, v: Tensor, noise: Tensor) -> Tensor:
        """Σ (Σ + noise)⁻¹ v; noise `(batch or 1, 1, …)`, and the projection for noise 0."""
        values = self._parts(v)[0]
        return self._diagonal_in_basis(v, values / (values + noise.reshape(-1, 1)))

    def logdet(self) -> Tensor:
        self._require_full("The determinant")
        return self.values.log().sum()

    def diagonal(self) -> Tensor:
        return (self.vectors.square() @ self.values).reshape(self.shape)

    def scaled(self, factor: float | Tensor) -> Covariance:
        if isinstance(factor, Tensor) and factor.ndim:
            raise TypeError("A Karhunen–Loève covariance takes one factor for all items.")
        return KarhunenLoeve(self.values * float(factor), self.vectors, self.shape, self.total * float(factor))

    def _add(self, other: Covariance) -> Covariance:
        matrix = (self.vectors * self.values) @ self.vectors.mT + other.dense().to(self.vectors)
        return Dense((matrix + matrix.mT) / 2, self.shape)


def expand(full: Covariance, *, rank: int | None = None, energy: float = 0.999, seed: int = 0) -> KarhunenLoeve:
    """The leading terms of a covariance.

    Args:
        full: Σ; above 4096 entries its products alone are used, by random projection, and `rank` must be given.
        rank: r; `energy` decides when omitted. energy: share of the variance to hold, 1 for all terms.
        seed: of the random projection.

    Raises:
        ValueError: rank or energy out of range.

    Cost: an eigendecomposition of n × n, or 4 (r + 10) products.
    """
    n = math.prod(full.shape)
    if rank is not None and not 1 <= rank <= n:
        raise ValueError(f"The rank must lie between 1 and the {n} entries of the field, got {rank}.")
    if rank is None and not 0 < energy <= 1:
        raise ValueError(f"The energy is a share of the variance in (0, 1], got {energy}.")
    total = float(full.diagonal().double().expand(full.shape).sum())
    if n > _LIMIT:
        if rank is None:
            raise ValueError(f"A field of {n} entries has too many eigenvectors to find them all; give rank=, say 500.")
        values, vectors = randomized_eigh(full.apply, full.shape, rank, seed=seed)
        return KarhunenLoeve(values, vectors.reshape(rank, n).mT.contiguous(), full.shape, total)
    matrix = full.dense()
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    if rank is None:
        rank = n if energy == 1 else int((values.clamp_min(0).cumsum(0) < energy * total).sum()) + 1
    kept = int((values[:rank] > 1e-13 * values[0]).sum()) if rank < n else n  # terms that are rounding have no use
    return KarhunenLoeve(
        values[:kept].clamp_min(1e-13 * float(values[0])), vectors[:, :kept].contiguous(), full.shape, total
    )
