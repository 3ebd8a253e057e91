r"""The low-rank Gaussian approximation N(z*, (I + V Λ Vᵀ)⁻¹) of a posterior in latent coordinates.

At a point z* the prior-preconditioned Gauss–Newton Hessian of the misfit is H = Jᵀ J (`_whitened`); the prior is
N(0, I), so that no preconditioning is left to do. Data inform few directions: with the eigenpairs (λ_i, v_i) of H above
a threshold, and the orthonormal v_i as columns of V,

    C = (I + H)⁻¹ ≈ I − V D Vᵀ,             D = diag(λ_i / (1 + λ_i)),
    C^(1/2)       ≈ I − V (1 − S) Vᵀ,       S = diag((1 + λ_i)^(-1/2)),        C^(-1/2) alike with S⁻¹,
    log det C     ≈ −Σ_i log(1 + λ_i).

What is left out changes the variance of no direction by more than a factor 1 + λ_(r+1).

References: Bui-Thanh, Ghattas, Martin & Stadler, SIAM J. Sci. Comput. 35(6), A2494-A2523, 2013, section 5 (the low-rank
posterior and draws from it); Halko, Martinsson & Tropp, SIAM Review 53(2), 2011, algorithms 4.4 and 5.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from invgen.driver import default_chunk
from invgen.problem import InverseProblem
from invgen.solvers._whitened import Map, Physical, curvature, latent_position

_FIRST_RANK = 32  # where the search for the threshold begins


@dataclass(frozen=True)
class LaplaceFactors:
    """N(mode, (I + V Λ Vᵀ)⁻¹), one an item.

    Attributes:
        mode: `(batch, n)`, z*.
        vectors: `(batch, rank, n)`, orthonormal rows v_i; zero rows where an item needs fewer.
        values: `(batch, rank)`, eigenvalues λ_i ≥ 0 of Jᵀ J, falling; zero where an item needs fewer.
    """

    mode: Tensor
    vectors: Tensor
    values: Tensor

    @property
    def rank(self) -> int:
        """Directions held."""
        return self.values.shape[1]

    def _apply(self, v: Tensor, change: Tensor) -> Tensor:
        """v + V diag(change) Vᵀ v for v `(batch, n)`."""
        inside = torch.einsum("brn,bn->br", self.vectors, v)
        return v + torch.einsum("brn,br->bn", self.vectors, change * inside)

    def covariance(self, v: Tensor) -> Tensor:
        """C v."""
        return self._apply(v, -self.values / (1 + self.values))

    def precision(self, v: Tensor) -> Tensor:
        """C⁻¹ v = v + V Λ Vᵀ v."""
        return self._apply(v, self.values)

    def sqrt(self, v: Tensor) -> Tensor:
        """C^(1/2) v, symmetric: white noise in, a draw of N(0, C) out."""
        return self._apply(v, (1 + self.values).rsqrt() - 1)

    def whiten(self, v: Tensor) -> Tensor:
        """C^(-1/2) v, symmetric."""
        return self._apply(v, (1 + self.values).sqrt() - 1)

    def logdet(self) -> Tensor:
        """log det C, `(batch,)`."""
        return -torch.log1p(self.values).sum(1)

    def sample(self, white: Tensor) -> Tensor:
        """z* + C^(1/2) white for white `(batch, n)`."""
        return self.mode + self.sqrt(white)

    def log_prob(self, q: Tensor) -> Tensor:
        """−½ (q − z*)ᵀ C⁻¹ (q − z*) − ½ log det C, `(batch,)`: the normal density times (2π)^(n/2)."""
        return -0.5 * self.whiten(q - self.mode).square().sum(1) - 0.5 * self.logdet()

    def rows(self, index: Tensor) -> LaplaceFactors:
        """The items `index`, an item as often as it is named."""
        return LaplaceFactors(self.mode[index], self.vectors[index], self.values[index])


def laplace_factors(
    problem: InverseProblem,
    z_star: Tensor,
    rank: int | None = None,
    *,
    threshold: float = 1e-2,
    oversample: int = 10,
    power: int = 2,
    seed: int = 0,
    physical: Physical | None = None,
) -> LaplaceFactors:
    """The factors at z*, for every item of a batch, by batched randomised subspace iteration.

    Args:
        problem: whose item i belongs to z_star[i] (data do not enter the curvature, operators and noise do).
        z_star: `(batch, n)` positions q = (z, z_theta), or `(batch, *latent_shape)`.
        rank: eigenpairs kept; None doubles it from 32 until the smallest of an item is below `threshold`.
        threshold: eigenvalues below are dropped, being little against the prior's 1.
        oversample: further random directions. power: subspace iterations. seed: of the random directions, the same for
            all items.
        physical: q -> (x, theta) where q is no latent of the prior.

    Returns:
        `LaplaceFactors`; an item whose position is not finite gets mode NaN and no directions.

    Cost: power + 2 products with Jᵀ J for each of rank + oversample directions; exact, with n products, where
    rank + oversample reaches n.
    """
    q = z_star.detach().flatten(1)
    batch, n = q.shape
    physical = physical or latent_position(problem)
    bad = ~torch.isfinite(q).all(1)
    here = torch.where(bad[:, None], torch.zeros_like(q), q)
    r = min(n, rank if rank is not None else _FIRST_RANK)
    values, vectors = q.new_zeros(batch, 0), q.new_zeros(batch, 0, n)
    open_ = torch.arange(batch, device=q.device)
    while len(open_):
        w, V = _eigenpairs(problem, physical, here[open_], r, oversample, power, seed)
        grown = r - values.shape[1]
        values = torch.cat([values, values.new_zeros(batch, grown)], dim=1)
        vectors = torch.cat([vectors, vectors.new_zeros(batch, grown, n)], dim=1)
        values[open_], vectors[open_] = w, V
        if rank is not None or r == n:
            break
        # an item keeps the rank that was enough for it, whatever the others need
        open_ = open_[(w[:, -1] >= threshold) & ~bad[open_]]
        r = min(n, 2 * r)
    keep = (values >= threshold) & ~bad[:, None]
    used = max(1, int(keep.sum(1).max()))
    values = torch.where(keep, values, torch.zeros_like(values))[:, :used]
    vectors = torch.where(keep[:, :, None], vectors, torch.zeros_like(vectors))[:, :used]
    mode = torch.where(bad[:, None], torch.full_like(q, torch.nan), q)
    return LaplaceFactors(mode, vectors.contiguous(), values.contiguous())


def _eigenpairs(
    problem: InverseProblem, physical: Physical, q: Tensor, rank: int, oversample: int, power: int, seed: int
) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues `(batch, rank)`, falling, and eigenvectors `(batch, rank, n)` of Jᵀ J at q."""
    batch, n = q.shape
    width = min(n, rank + oversample)
    product = _block_product(problem, physical, q, width)
    if width == n:  # nothing to project: the matrix itself
        columns = torch.eye(n, dtype=q.dtype, device=q.device).expand(batch, n, n)
        small, basis = product(columns), columns
    else:
        start = torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        basis = torch.linalg.qr(start.to(q)).Q.mT.expand(batch, width, n)
        for _ in range(power + 1):
            basis = torch.linalg.qr(_finite(product(basis)).mT).Q.mT
        small = torch.einsum("bin,bjn->bij", basis, product(basis))
    values, rotation = torch.linalg.eigh(_finite(small + small.mT) / 2)
    values, rotation = values.flip(1)[:, :rank], rotation.flip(2)[:, :, :rank]
    return values.clamp_min(0), rotation.mT @ basis


def _finite(v: Tensor) -> Tensor:
    """LAPACK does not return from NaN: an item that has one loses its directions."""
    bad = ~torch.isfinite(v).all(-1).all(-1)
    return torch.where(bad[:, None, None], torch.zeros_like(v), v)


def _block_product(problem: InverseProblem, physical: Physical, q: Tensor, width: int) -> Map:
    """rows `(batch, width, n)` -> Jᵀ J of every row, several rows an item at once as memory allows; one graph for all."""
    batch, n = q.shape
    at_once = max(1, min(width, default_chunk(problem.model_shape, q.device) // batch))
    at_once = -(-width // -(-width // at_once))  # equal blocks
    H = curvature(problem, physical, q.repeat_interleave(at_once, dim=0))

    def product(rows: Tensor) -> Tensor:
        parts = []
        for block in rows.split(at_once, dim=1):
            short = at_once - block.shape[1]
            full = torch.cat([block, block.new_zeros(batch, short, n)], dim=1) if short else block
            parts.append(H.product(full.reshape(-1, n)).reshape(batch, at_once, n)[:, : block.shape[1]])
        return torch.cat(parts, dim=1)

    return product
