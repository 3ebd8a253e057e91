"""Batched Krylov solvers: every item of a batch is its own linear system, solved together and stopped apart.

Convergence is per item: an item that has converged is frozen (its numbers no longer change, whatever the others need),
and an item that has not is reported, never returned silently.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Solved", "Tridiagonal", "cg", "dot_test", "gmres", "inner", "lanczos", "norm", "randomized_eigh"]

Map = Callable[[Tensor], Tensor]


class Solved(NamedTuple):
    """The result of a linear solve.

    Attributes:
        x: solution, shaped like the right-hand side.
        residual: `(batch,)` relative residual |b − A x| / |b|: the true one where an item claims convergence, the
            recursion's elsewhere (0 for a direct solve).
        iterations: products with the matrix that were spent.
        converged: `(batch,)` True where the tolerance was met.
    """

    x: Tensor
    residual: Tensor
    iterations: int
    converged: Tensor

    @classmethod
    def direct(cls, x: Tensor) -> Solved:
        """Wrap the result of a closed form."""
        return cls(
            x, x.new_zeros(x.shape[0], dtype=x.real.dtype), 0, torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
        )


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Re⟨a, b⟩ of each item, `(batch,)`."""
    if a.is_complex():  # over pairs of real numbers: one pass instead of a complex product and its real part
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    return (a * b).flatten(1).sum(1)


def norm(a: Tensor) -> Tensor:
    """Euclidean norm of each item, `(batch,)`."""
    return inner(a, a).sqrt()


def _wide(value: Tensor, like: Tensor) -> Tensor:
    return value.reshape(-1, *(1,) * (like.ndim - 1))


def cg(
    matrix: Map,
    rhs: Tensor,
    *,
    preconditioner: Map | None = None,
    start: Tensor | None = None,
    rtol: float = 1e-6,
    max_iter: int = 500,
    check_every: int = 5,
) -> Solved:
    """Preconditioned conjugate gradients for a batch of Hermitian positive definite systems.

    Args:
        matrix: v -> A v on `(batch, *shape)`, item by item.
        rhs: `(batch, *shape)`.
        preconditioner: v -> M⁻¹ v, Hermitian positive definite.
        start: first guess; zero when omitted.
        rtol: stop an item at |b − A x| ≤ rtol |b|, checked on the true residual (one more product).
        max_iter: iterations of an item at the most.
        check_every: iterations between two looks at "all items done" (one device synchronisation each).

    Returns:
        `Solved`; items that did not converge have `converged` False and keep their last iterate.

    References:
        Hestenes & Stiefel 1952; Saad, Iterative Methods for Sparse Linear Systems, algorithm 9.1.
    """
    precondition = preconditioner or (lambda v: v)
    size = norm(rhs)
    scale = size.clamp_min(torch.finfo(size.dtype).tiny)
    x, r, used = torch.zeros_like(rhs), rhs.clone(), 0
    if start is not None:
        x = torch.where(_wide(size > 0, rhs), start, x)  # a zero right-hand side has the solution zero
        r, used = rhs - matrix(x), 1
    residual = norm(r) / scale
    active = residual > rtol
    spent = torch.zeros_like(size, dtype=torch.long)
    for _ in range(_PASSES):
        before = residual
        x, products, residual, spent = _cg_pass(
            matrix, precondition, x, r, scale, residual, active, spent, rtol, max_iter, check_every
        )
        used += products
        claimed = active & (residual <= rtol)
        if not bool(claimed.any()):
            break
        # the residual of the recursion drifts away from b − A x in rounding: only the true one may be reported
        r = rhs - matrix(x)
        used += 1
        residual = torch.where(claimed, norm(r) / scale, residual)
        active = claimed & (residual > rtol) & (residual < 0.5 * before) & (spent < max_iter)
        if not bool(active.any()):
            break
    # a right-hand side or a product that overflowed must not pass for the solution zero
    x = torch.where(_wide(torch.isfinite(residual), x), x, torch.full_like(x, torch.nan))
    return Solved(x, residual, used, residual <= rtol)


_PASSES = 5  # restarts from the true residual, each of which must halve it


def _cg_pass(
    matrix: Map,
    precondition: Map,
    x: Tensor,
    r: Tensor,
    scale: Tensor,
    residual: Tensor,
    active: Tensor,
    spent: Tensor,
    rtol: float,
    max_iter: int,
    check_every: int,
) -> tuple[Tensor, int, Tensor, Tensor]:
    """One run of the recursion for the active items; the others keep every number they have."""
    z = precondition(r)
    p = z.clone()
    rho = inner(r, z)
    tiny, zero = torch.finfo(rho.dtype).tiny, torch.zeros_like(rho)
    active = active & (spent < max_iter)
    used = 0
    for k in range(max_iter):
        if k % check_every == 0 and not bool(active.any()):
            break
        q = matrix(p)
        used += 1
        spent = spent + active
        curvature = inner(p, q)
        moving = active & (curvature > 0)
        step = torch.where(moving, rho / curvature.clamp_min(tiny), zero)
        # `where`, not a product with zero: an item that went to NaN must keep its last finite iterate
        x = torch.where(_wide(moving, x), x + _wide(step, x) * p, x)
        r = torch.where(_wide(moving, r), r - _wide(step, r) * q, r)
        z = precondition(r)
        fresh = inner(r, z)
        beta = torch.where(moving, fresh / rho.clamp_min(tiny), zero)
        p = torch.where(_wide(moving, p), z + _wide(beta, p) * p, p)
        rho = torch.where(moving, fresh, rho)
        residual = torch.where(moving, norm(r) / scale, residual)
        active = moving & (residual > rtol) & (spent < max_iter)
    return x, used, residual, spent


def gmres(matrix: Map, rhs: Tensor, *, iterations: int, rtol: float = 0.0, start: Tensor | None = None) -> Solved:
    """GMRES without restart for a batch of square systems that need not be symmetric.

    Args:
        matrix: v -> A v on `(batch, *shape)`.
        rhs: `(batch, *shape)`.
        iterations: size of the Krylov space, and products with `matrix`, at the most.
        rtol: stop once every item has |b − A x| ≤ rtol |b| (0: never look, no synchronisation).
        start: first guess; zero when omitted.

    Cost: stores `iterations` vectors an item. Reference: Saad & Schultz 1986; modified Gram–Schmidt with one
    re-orthogonalisation, least squares by QR in the small space.
    """
    shape, batch = rhs.shape, rhs.shape[0]
    x0 = torch.zeros_like(rhs) if start is None else start
    r = rhs - matrix(x0) if start is not None else rhs
    scale = norm(rhs).clamp_min(torch.finfo(r.real.dtype).tiny)
    beta = norm(r)
    tiny = torch.finfo(r.real.dtype).tiny
    basis = [r / _wide(beta.clamp_min(tiny), r)]
    h = rhs.new_zeros(batch, iterations + 1, iterations)
    y = rhs.new_zeros(batch, iterations)
    done = torch.zeros(batch, dtype=torch.bool, device=rhs.device)
    used = 0 if start is None else 1
    residual = beta / scale
    for j in range(iterations):
        w = matrix(basis[j])
        used += 1
        for _ in range(2):
            for i in range(j + 1):
                c = (basis[i].conj() * w).flatten(1).sum(1)
                h[:, i, j] += c
                w = w - _wide(c, w) * basis[i]
        length = norm(w)
        h[:, j + 1, j] = length
        basis.append(w / _wide(length.clamp_min(tiny), w))
        if rtol > 0 or j == iterations - 1:
            target = rhs.new_zeros(batch, j + 2)
            target[:, 0] = beta
            small = h[:, : j + 2, : j + 1]
            fitted = _small_least_squares(small, target)
            misfit = (torch.einsum("bij,bj->bi", small, fitted) - target).norm(dim=1) / scale
            # an item that has converged keeps its coefficients, whatever the others still need
            y[:, : j + 1] = torch.where(done[:, None], y[:, : j + 1], fitted)
            residual = torch.where(done, residual, misfit)
            done = done | (residual <= rtol) | ~torch.isfinite(residual)
            if rtol > 0 and bool(done.all()):
                break
    x = x0
    for i in range(len(basis) - 1):
        x = x + _wide(y[:, i], rhs) * basis[i]
    # a right-hand side or a product that overflowed must not pass for the solution zero
    x = torch.where(_wide(torch.isfinite(residual), x), x, torch.full_like(x, torch.nan))
    return Solved(x.reshape(shape), residual, used, residual <= (rtol if rtol > 0 else 1e-6))


def _small_least_squares(matrix: Tensor, target: Tensor) -> Tensor:
    """argmin |H y − t| by QR, `(batch, m, k)` and `(batch, m)`; columns without content (a breakdown) get zero."""
    q, r = torch.linalg.qr(matrix)
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    largest = diagonal.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(diagonal.real.dtype).tiny)
    empty = diagonal.abs() <= 4 * torch.finfo(diagonal.real.dtype).eps * largest
    r = r + torch.diag_embed(torch.where(empty, largest.to(r.dtype), torch.zeros_like(diagonal)))
    right = torch.where(empty, torch.zeros_like(diagonal), torch.einsum("bij,bi->bj", q.conj(), target.to(q.dtype)))
    return torch.linalg.solve_triangular(r, right[..., None], upper=True)[..., 0]


class Tridiagonal(NamedTuple):
    """What `lanczos` returns: Q^H A Q = T up to the last residual.

    Attributes:
        diagonal: `(batch, k)` alpha of T. off_diagonal: `(batch, k − 1)` beta of T.
        basis: `(batch, k, *shape)` orthonormal Q; zero vectors after the Krylov space is exhausted.
        last: `(batch,)` beta_k, the size of what lies outside the space.
    """

    diagonal: Tensor
    off_diagonal: Tensor
    basis: Tensor
    last: Tensor

    def matrix(self) -> Tensor:
        """T, `(batch, k, k)`."""
        t = torch.diag_embed(self.diagonal)
        return t + torch.diag_embed(self.off_diagonal, 1) + torch.diag_embed(self.off_diagonal, -1)


def lanczos(matrix: Map, start: Tensor, steps: int) -> Tridiagonal:
    """Lanczos tridiagonalisation with full reorthogonalisation, one Krylov space an item.

    Args:
        matrix: v -> A v on `(batch, *shape)`, Hermitian.
        start: `(batch, *shape)`, not zero.
        steps: k, size of the Krylov space.

    Returns:
        `Tridiagonal`; the extreme eigenvalues of `matrix()` approach those of A from inside its spectrum.

    Cost: `steps` products with A, `steps` stored vectors an item and O(steps²) inner products. Reference: Lanczos
    1950; Saad, Iterative Methods for Sparse Linear Systems, algorithm 6.15, orthogonalised twice.
    """
    if steps < 1:
        raise ValueError(f"lanczos needs at least one step, got {steps}.")
    length = norm(start)
    tiny, eps = torch.finfo(length.dtype).tiny, torch.finfo(length.dtype).eps
    basis = (start / _wide(length.clamp_min(tiny), start))[:, None]
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    size = torch.zeros_like(length)
    for _ in range(steps):
        w = matrix(basis[:, -1])
        alphas.append(inner(basis[:, -1], w))
        size = torch.maximum(size, norm(w))
        for _ in range(2):
            c = torch.einsum("bkn,bn->bk", basis.flatten(2).conj(), w.flatten(1))
            w = w - torch.einsum("bk,bkn->bn", c, basis.flatten(2)).reshape(w.shape)
        beta = norm(w)
        beta = torch.where(beta > 100 * eps * size, beta, torch.zeros_like(beta))  # exhausted: what is left is rounding
        betas.append(beta)
        fresh = torch.where(_wide(beta > 0, w), w / _wide(beta.clamp_min(tiny), w), torch.zeros_like(w))
        basis = torch.cat([basis, fresh[:, None]], dim=1)
    return Tridiagonal(
        torch.stack(alphas, 1),
        torch.stack([*betas[:-1]], 1) if steps > 1 else start.real.new_zeros(len(start), 0),
        basis[:, :-1],
        betas[-1],
    )


def randomized_eigh(
    matrix: Map,
    shape: tuple[int, ...],
    rank: int,
    *,
    oversample: int = 10,
    power: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """The largest eigenpairs of one symmetric positive semi-definite map, by random projection: A ≈ V diag(w) V^H.

    Args:
        matrix: v -> A v on `(vectors, *shape)`, the same A for every vector.
        shape: shape of one vector.
        rank: eigenpairs wanted, at most the size of a vector.
        oversample: further random directions (5 to 10).
        power: subspace iterations, for spectra that decay slowly.
        seed: of the random directions.
        dtype, device: of the vectors.

    Returns:
        values `(rank,)`, falling, and vectors `(rank, *shape)`, orthonormal.

    Cost: power + 2 products with rank + oversample vectors. Reference: Halko, Martinsson & Tropp 2011, algorithms 4.4
    (range) and 5.3 (eigenvalues); the expected error is near the first eigenvalue left out.
    """
    n = math.prod(shape)
    if not 1 <= rank <= n:
        raise ValueError(f"randomized_eigh was asked for {rank} eigenpairs of a map on {n} unknowns; ask for 1 to {n}.")
    width = min(n, rank + oversample)
    q = torch.randn(width, n, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(device or "cpu")

    def product(rows: Tensor) -> Tensor:
        return matrix(rows.reshape(-1, *shape)).reshape(-1, n)

    for _ in range(power + 1):
        q = torch.linalg.qr(product(q).mT).Q.mT  # rows hold the vectors
    small = torch.einsum("in,jn->ij", q.conj(), product(q))
    values, rotation = torch.linalg.eigh((small + small.mH) / 2)
    order = torch.arange(width - 1, width - rank - 1, -1, device=values.device)
    return values[order].clamp_min(0), (rotation[:, order].mT @ q).reshape(rank, *shape)


def dot_test(forward: Map, adjoint: Map, model: Tensor, data: Tensor) -> float:
    """Relative mismatch of ⟨A u, v⟩ and ⟨u, Aᴴ v⟩, complex parts included; ≤ 1e-10 in float64 for a right adjoint.

    Args:
        forward: u -> A u. adjoint: v -> Aᴴ v.
        model: `(batch, *model_shape)` random u. data: `(batch, *data_shape)` random v.
    """
    left_vectors, right_vectors = forward(model), adjoint(data)
    wide = torch.complex128 if left_vectors.is_complex() or data.is_complex() else torch.float64
    left = (left_vectors.to(wide).conj() * data.to(wide)).flatten(1).sum(1)
    right = (model.to(wide).conj() * right_vectors.to(wide)).flatten(1).sum(1)
    if not model.is_complex():  # a real model space: only the real part of the inner product is defined
        left, right = left.real, right.real
    size = (
        left_vectors.abs().to(torch.float64).flatten(1).norm(dim=1)
        * data.abs().to(torch.float64).flatten(1).norm(dim=1)
    ).clamp_min(1e-300)
    return float(((left - right).abs() / size).max())
