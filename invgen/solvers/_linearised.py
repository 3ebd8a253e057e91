r"""The physics around a point, and one Gaussian update with it: what guidance rules share.

At the clean estimate D the data are read as d − g(D) = G (u0 − D) + N(0, R), G = ∂g/∂u. For linear physics that is no
approximation and G = A; elsewhere it is one Gauss–Newton linearisation, with G v by the vector–Jacobian product of a
vector–Jacobian product, which needs right second derivatives and no forward mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from invgen.contracts import LinearOperator
from invgen.covariance import BlockDiagonal, Covariance, Diagonal, Scalar
from invgen.linalg import Solved, cg
from invgen.noise import stack_covariances
from invgen.problem import InverseProblem
from invgen.solvers._inner import accepted, has_exact_step

__all__: list[str] = []

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Linearised:
    """d − g(D) = G (u0 − D) + N(0, R).

    Attributes:
        residual: d − g(D), `(batch, *data_shape)`, flat and concatenated for several terms.
        R: covariance of an update (R/2 for complex data, as in `LinearGaussian.R_update`).
        forward: G. adjoint: Gᵀ, Re(Gᴴ ·) for complex data.
        ease: v -> (R + r² G Gᵀ)⁻¹ v where that is cheap, R⁻¹ v elsewhere.
    """

    residual: Tensor
    R: Covariance
    forward: Map
    adjoint: Map
    ease: Callable[[Tensor, float], Tensor]


def linearised(problem: InverseProblem, at: Tensor, **theta: Tensor) -> Linearised:
    """The physics around `at` `(batch, *shape)` at the nuisance parameters theta, in the prior's coordinates."""
    if problem.remember("one linear system", lambda: has_exact_step(problem)):
        system = problem.linear_gaussian("u", **theta)
        A, R = system.operator, system.R_update
        return Linearised(system.data - A(at), R, A, A.adjoint, lambda v, r2: solve_in_data(problem, v, r2, **theta).x)
    return _gauss_newton(problem, at, theta)


def _gauss_newton(problem: InverseProblem, at: Tensor, theta: dict[str, Tensor]) -> Linearised:
    terms = problem.in_u()
    if len({t.data.is_complex() for t in terms}) > 1:
        raise TypeError(
            "Real and complex terms have no common Gaussian convention; state each complex term as its real and imaginary parts, with half the variance each."
        )
    with torch.enable_grad():
        point = at.detach().requires_grad_(True)
        predictions = [t.operator(point, **accepted(t, theta)) for t in terms]
        slots = [torch.zeros_like(p, requires_grad=True) for p in predictions]
        # Gᵀ w as a function of w: linear, so that its own vector–Jacobian product at any w is G
        (pulled,) = torch.autograd.grad(predictions, point, slots, create_graph=True)
    shapes = [tuple(p.shape[1:]) for p in predictions]
    single = len(terms) == 1
    sizes = [p[0].numel() for p in predictions]

    def join(parts: list[Tensor]) -> Tensor:
        return parts[0] if single else torch.cat([p.flatten(1) for p in parts], dim=1)

    def part(w: Tensor) -> list[Tensor]:
        if single:
            return [w]
        return [p.reshape(-1, *s) for p, s in zip(w.split(sizes, dim=1), shapes, strict=True)]

    def forward(v: Tensor) -> Tensor:
        return join(list(torch.autograd.grad(pulled, slots, v, retain_graph=True)))

    def adjoint(w: Tensor) -> Tensor:
        (out,) = torch.autograd.grad(predictions, point, part(w), retain_graph=True)
        return out

    def noise() -> Covariance:
        parts = ((t, t.noise.covariance(t.operator.data_shape, **theta)) for t in terms)
        return stack_covariances([c.scaled(0.5) if t.data.is_complex() else c for t, c in parts])

    R = noise() if theta else problem.remember("R of terms, update", noise)
    residual = join([t.data - p.detach() for t, p in zip(terms, predictions, strict=True)])
    return Linearised(residual, R, forward, adjoint, lambda v, r2: R.solve(v) if R.has_solve else v)


GRAM_LIMIT = 1024  # data (real numbers) whose A Aᵀ is decomposed where the operator has no direct solve
DENSE_LIMIT = 1 << 24  # entries of a matrix that is built for a decomposition: 128 MB in float64


def solve_in_data(problem: InverseProblem, rhs: Tensor, variance: float, **theta: Tensor) -> Solved:
    """(R + variance · A Aᵀ)⁻¹ rhs, by `operator.solve`, or by one decomposition a run where that would iterate.

    A rule solves this system at every noise level, and only `variance` changes: with R⁻¹ = Wᵀ W and
    W A Aᵀ Wᵀ = Q Λ Qᵀ it is Wᵀ Q (1 + variance Λ)⁻¹ Qᵀ W rhs. That pays for small sets of data whose operator has no
    direct solve: several terms with different noise, correlated noise, complex data.
    """
    system = problem.linear_gaussian("u", **theta)
    A, R = system.operator, system.R_update
    n = over_reals(rhs[:1]).numel()
    small = n <= GRAM_LIMIT and n * math.prod(A.model_shape) <= DENSE_LIMIT and R.has_solve and not R.per_item
    if not (small and problem.remember("solve iterates", lambda: A.solve(rhs[:1], R, variance).iterations > 0)):
        return A.solve(rhs, R, variance)

    def build() -> tuple[Tensor, Tensor]:
        white = over_reals(
            R.whiten(from_reals(data_rows(A, rhs, 0, n).mT.reshape(-1, *over_reals(rhs).shape[1:]), rhs))
        )
        flat = white.flatten(1)
        values, vectors = torch.linalg.eigh(flat.mT @ flat)
        return values.clamp_min(0).to(rhs.real), vectors.to(rhs.real)

    values, Q = problem.remember(("A Aᵀ whitened", rhs.dtype, rhs.device), build)
    w = over_reals(R.whiten(rhs))
    w = ((w.flatten(1) @ Q) / (1 + variance * values) @ Q.mT).reshape(w.shape)
    return Solved.direct(R.solve(R.sqrt(from_reals(w, rhs))))  # Wᵀ = R⁻¹ W⁻¹


def data_rows(A: LinearOperator, like: Tensor, first: int, last: int) -> Tensor:
    """Rows first … last of A over the reals, `(last − first, n_model)`, float64: the adjoint of unit vectors."""
    wide = torch.complex128 if like.is_complex() else torch.float64
    shape = over_reals(like[:1]).shape[1:]
    units = torch.zeros(last - first, math.prod(shape), dtype=torch.float64, device=like.device)
    units[:, first:last].fill_diagonal_(1.0)
    return A.adjoint(from_reals(units.reshape(-1, *shape), like[:1].to(wide))).flatten(1)


def over_reals(v: Tensor) -> Tensor:
    """Real vectors as they are, complex ones with a last axis of two: what is linear over the reals only works there."""
    return torch.view_as_real(v.resolve_conj()) if v.is_complex() else v


def from_reals(v: Tensor, like: Tensor) -> Tensor:
    """The inverse of `over_reals`."""
    return torch.view_as_complex(v.contiguous()) if like.is_complex() else v


def uncorrelated(R: Covariance, like: Tensor) -> Tensor | None:
    """Variances that broadcast to `over_reals(like)`; None where R has correlations."""
    parts = R.blocks if isinstance(R, BlockDiagonal) else [R]
    if not all(isinstance(p, (Scalar, Diagonal)) for p in parts):
        return None
    variance = R.diagonal().to(device=like.device, dtype=like.real.dtype)
    if isinstance(R, Scalar):
        variance = variance.reshape(-1, *(1,) * (like.ndim - 1)) if variance.ndim else variance
    return variance[..., None] if like.is_complex() and variance.ndim else variance


def solve_with_diagonal(R: Covariance, extra: Tensor, rhs: Tensor) -> Solved:
    """(R + diag(extra))⁻¹ rhs, elementwise for noise without correlations, by conjugate gradients otherwise.

    Args:
        R: covariance. extra: non-negative, broadcasts to `over_reals(rhs)`. rhs: `(batch, *data_shape)`.
    """
    variance = uncorrelated(R, rhs)
    if variance is not None:
        return Solved.direct(from_reals(over_reals(rhs) / (variance + extra), rhs))
    solved = cg(
        lambda v: over_reals(R.apply(from_reals(v, rhs))) + extra * v,
        over_reals(rhs),
        preconditioner=(lambda v: over_reals(R.solve(from_reals(v, rhs)))) if R.has_solve else None,
        rtol=1e-10 if rhs.real.dtype == torch.float64 else 1e-5,
    )
    return solved._replace(x=from_reals(solved.x, rhs))
