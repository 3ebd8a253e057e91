r"""Each value given a few of those before it: sparse triangular factors of inverse covariances.

    x_i | x_1 … x_{i−1}  ≈  N(Σ_j w_ij x_j, s_i²),     w_i = K_NN⁻¹ K_Ni,  s_i² = K_ii − K_iN w_i,    N ⊂ {1 … i−1}

With B = I − W and S = diag(s): x = B⁻¹ S z is a draw (sequential simulation), Bᵀ S⁻² B an inverse of the covariance, and its
determinant is ∏ s_i². All are exact for the law they define; with all predecessors as neighbours that is N(0, K) itself and
B⁻¹ S its Cholesky factor.

References: Vecchia 1988, J. R. Statist. Soc. B 50, 297; Gómez-Hernández & Journel 1993 (sequential simulation); Katzfuss & Guinness
2021, Statistical Science 36, 124 (orderings).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
from scipy.spatial import cKDTree

__all__ = ["Vecchia", "predecessors"]

Array = np.ndarray


def predecessors(points: Array, k: int) -> Array:
    """Indices of the k nearest points among those before each, `(n, k)`, −1 where there are fewer.

    Args:
        points: `(n, d)` in their order. k: neighbours at the most.

    From tree searches in blocks that double; within a block a few points may be left with fewer than k.
    """
    n = len(points)
    k = min(k, n - 1)
    out = np.full((n, max(k, 1)), -1, dtype=np.int64)
    first = min(n, k + 1)
    for i in range(1, first):
        out[i, :i] = np.arange(i)
    start = first
    while start < n:
        end = min(2 * start, n)
        tree = cKDTree(points[:end])
        found = np.atleast_2d(tree.query(points[start:end], k=min(end, 3 * k + 8))[1])
        own = np.arange(start, end)[:, None]
        # nearest first, those that come later moved to the end
        order = np.argsort(found >= own, axis=1, kind="stable")[:, :k]
        chosen = np.take_along_axis(found, order, 1)
        out[start:end] = np.where(chosen < own, chosen, -1)
        start = end
    return out


class Vecchia:
    """The factors of one set of points.

    Args:
        points: `(n, d)`, where each value lies, in the order of the values. covariance: lags `(…, d)` -> `(…)`.
        neighbours: k, at the most. order: a permutation of the points, the path; drawn at random when omitted.
        noise: variance added to each value, `(n,)` or a number. metric: `(d, d)`, lags that neighbours are sorted by are A h.
        seed: of the path.

    Raises:
        ValueError: points that coincide without noise between them (a covariance that is not positive definite).

    Cost: n factorisations of k × k once; n k multiply-adds a draw or a product.
    """

    def __init__(
        self,
        points: Array,
        covariance: Callable[[Array], Array],
        *,
        neighbours: int = 24,
        order: Array | None = None,
        noise: float | Array = 0.0,
        metric: Array | None = None,
        seed: int = 0,
    ) -> None:
        points = np.asarray(points, dtype=np.float64)
        n = len(points)
        if neighbours < 1:
            raise ValueError(f"The number of neighbours must be at least 1, got {neighbours}.")
        self.order = np.random.default_rng(seed).permutation(n) if order is None else np.asarray(order)
        self.place = np.empty(n, dtype=np.int64)
        self.place[self.order] = np.arange(n)
        p = points[self.order]
        extra = np.broadcast_to(np.asarray(noise, dtype=np.float64), (n,))[self.order]
        near = predecessors(p if metric is None else p @ metric.T, neighbours)
        weights, self.sd = _weights(p, extra, near, covariance)
        rows = np.repeat(np.arange(n), near.shape[1]).reshape(near.shape)
        kept = near >= 0
        lower = scipy.sparse.csr_matrix((-weights[kept], (rows[kept], near[kept])), shape=(n, n))
        self.B = (lower + scipy.sparse.identity(n, format="csr")).tocsr()
        self._BT = self.B.T.tocsr()
        self._factor: Any = None

    def _solve(self, v: Array, transposed: bool) -> Array:
        if self._factor is None:
            # a triangular matrix is its own factor: no pivots, no fill
            self._factor = scipy.sparse.linalg.splu(
                self.B.tocsc(), permc_spec="NATURAL", diag_pivot_thresh=0.0, options={"Equil": False}
            )
        out: Array = self._factor.solve(v, "T" if transposed else "N")
        return out

    # all of these take and return `(n, items)` float64 in the order the points were given

    def draw(self, white: Array) -> Array:
        """B⁻¹ S z; the noise is in the order of the path."""
        return self._solve(self.sd[:, None] * white, False)[self.place]

    def draw_transposed(self, v: Array) -> Array:
        """S B⁻ᵀ v, in the order of the path."""
        return self.sd[:, None] * self._solve(v[self.order], True)

    def whiten(self, v: Array) -> Array:
        """S⁻¹ B v, in the order of the path: the inverse of `draw`."""
        out: Array = (self.B @ v[self.order]) / self.sd[:, None]
        return out

    def whiten_transposed(self, v: Array) -> Array:
        """Bᵀ S⁻¹ v."""
        out: Array = (self._BT @ (v / self.sd[:, None]))[self.place]
        return out

    def solve(self, v: Array) -> Array:
        """K⁻¹ v = Bᵀ S⁻² B v."""
        return self.whiten_transposed(self.whiten(v))

    def logdet(self) -> float:
        """log det K = 2 Σ log s_i."""
        return 2 * float(np.log(self.sd).sum())


def _weights(points: Array, noise: Array, near: Array, covariance: Callable[[Array], Array]) -> tuple[Array, Array]:
    """w `(n, k)` and s `(n,)`."""
    n, k = near.shape
    zero = float(covariance(np.zeros((1, points.shape[1])))[0])
    weights, sd = np.zeros((n, k)), np.empty(n)
    block = max(1, (1 << 22) // (k * k))
    for start in range(0, n, block):
        rows = near[start : start + block]
        there = rows >= 0
        q = points[np.maximum(rows, 0)]
        K = covariance(q[:, :, None] - q[:, None]) * (there[:, :, None] & there[:, None])
        own = np.arange(k)
        K[:, own, own] = np.where(there, zero + noise[np.maximum(rows, 0)], 1.0)
        c = covariance(points[start : start + block, None] - q) * there
        L, info = torch.linalg.cholesky_ex(torch.from_numpy(K))
        if bool(info.any()):
            raise ValueError(
                "The covariance between neighbouring points is not positive definite: points coincide, or the covariance is too smooth for "
                "their distance; drop duplicates, or add noise (a nugget)."
            )
        w = torch.cholesky_solve(torch.from_numpy(c)[..., None], L)[..., 0].numpy()
        weights[start : start + block] = w
        sd[start : start + block] = zero + noise[start : start + block] - (w * c).sum(1)
    if not (sd > 1e-14 * zero).all():
        raise ValueError(
            "A point is determined by its neighbours (its conditional variance is zero): points coincide, or the covariance is too smooth for "
            "their distance; drop duplicates, or add noise (a nugget)."
        )
    return weights, np.sqrt(sd)
