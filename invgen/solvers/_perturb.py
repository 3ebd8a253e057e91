r"""Exact draws of a linear-Gaussian posterior by perturbing what is known and solving once.

With u ~ N(μ, C) and d = A u + N(0, R), the draws û ~ N(μ, C), d̂ ~ N(d, R) give

    u = û + C Aᴴ (R + A C Aᴴ)⁻¹ (d̂ − A û) = argmin ½|d̂ − A u|²_R + ½|u − û|²_C   ~   p(u | d).

The matrix R + A C Aᴴ is the same for all draws: for few data it is factorised once a run where the operator would
iterate for each draw.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from invgen.contracts import Solver
from invgen.covariance import Covariance
from invgen.driver import Streams
from invgen.linalg import Solved
from invgen.problem import InverseProblem, LinearGaussian


def check_linear(solver: Solver, problem: InverseProblem, instead: str) -> None:
    """Raise a TypeError unless the problem is linear-Gaussian in u with nothing else unknown."""
    name = type(solver).__name__
    if not getattr(problem.prior.transform, "affine", False):
        raise TypeError(
            f"{name} needs a prior with an affine transform, this one has {type(problem.prior.transform).__name__}; {instead}."
        )
    if problem.nuisance:
        raise TypeError(
            f"{name} solves for the model alone, but {sorted(problem.nuisance)} are unknown too; {instead}."
        )
    if not problem.is_linear_gaussian:
        kinds = ", ".join(f"{type(t.operator).__name__} with {type(t.noise).__name__}" for t in problem.terms)
        raise TypeError(
            f"{name} is exact for linear operators with Gaussian noise only, this problem has {kinds}; {instead}."
        )


def in_units(problem: InverseProblem, u: Tensor) -> Tensor:
    """x = T(u) in the dtype of the run."""
    return problem.prior.transform(u).to(problem.dtype)


def perturbed(
    problem: InverseProblem, rng: Streams, *, rtol: float | None, max_iter: int, dense_limit: int = 0
) -> dict[str, Tensor]:
    """One posterior draw an item: perturb the prior mean and the data, then solve to convergence.

    Args:
        rtol, max_iter: of an iterative solve. dense_limit: data up to which the matrix is factorised instead.
    """
    system, C = problem.linear_gaussian("u"), problem.prior.covariance_u
    u, data = perturbation(problem, system, C, rng)
    return update(problem, system, u, data, rtol=rtol, max_iter=max_iter, dense_limit=dense_limit)


def perturbation(problem: InverseProblem, system: LinearGaussian, C: Covariance, rng: Streams) -> tuple[Tensor, Tensor]:
    """û ~ N(μ, C) and d̂ ~ N(d, R)."""
    A, R = system.operator, system.R
    model, data = _white(
        rng,
        tuple(getattr(C, "noise_shape", A.model_shape)),
        tuple(getattr(R, "noise_shape", A.data_shape)),
        system.data.dtype,
    )
    return problem.prior.mean_u.to(model) + C.sqrt(model), system.data + R.sqrt(data)


def _white(
    rng: Streams, model_shape: tuple[int, ...], data_shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Noise for the model, real, and for the data in `dtype`; drawn together, as opening a stream costs most."""
    parts = (*data_shape, 2) if dtype.is_complex else data_shape
    n = math.prod(model_shape)
    w = rng.normal((n + math.prod(parts),), dtype=dtype.to_real(), tag="perturb")
    data = w[:, n:].reshape(-1, *parts)
    if dtype.is_complex:  # unit variance per complex number
        data = torch.view_as_complex((data * math.sqrt(0.5)).contiguous())
    return w[:, :n].reshape(-1, *model_shape), data


def update(
    problem: InverseProblem,
    system: LinearGaussian,
    u: Tensor,
    data: Tensor,
    *,
    rtol: float | None,
    max_iter: int,
    dense_limit: int = 0,
) -> dict[str, Tensor]:
    """u + C Aᴴ (R + A C Aᴴ)⁻¹ (data − A u), with what the solve reports."""
    C = problem.prior.covariance_u
    rhs = data - system.operator(u)
    if (
        math.prod(system.operator.data_shape) <= dense_limit
        and not data.is_complex()
        and _iterates(problem, system, rhs)
    ):
        solved = _through_factor(problem, system, rhs)
    else:
        solved = system.operator.solve(rhs, system.R_update, C, rtol=rtol, max_iter=max_iter)
    warn_unconverged(solved)
    u = u + C.apply(system.operator.adjoint(solved.x))
    return {"x": in_units(problem, u), "stat_converged": solved.converged, "stat_residual": solved.residual}


def warn_unconverged(solved: Solved) -> None:
    """Say so where draws are not what they claim to be."""
    missed = int((~solved.converged).sum())
    if missed:
        warnings.warn(
            f"{missed} of {len(solved.x)} linear solves stopped at a relative residual up to {float(solved.residual.max()):.1e} and are not draws of the posterior; raise max_iter or work in float64.",
            stacklevel=3,
        )


def _iterates(problem: InverseProblem, system: LinearGaussian, like: Tensor) -> bool:
    """True where the operator has no direct solve for this R and C: asked once a run, with the same question."""

    def ask() -> bool:
        question = torch.ones_like(like[:1])
        return system.operator.solve(question, system.R_update, problem.prior.covariance_u, max_iter=3).iterations > 0

    return problem.remember("R + A C Aᴴ iterates", ask)


def _through_factor(problem: InverseProblem, system: LinearGaussian, rhs: Tensor) -> Solved:
    """One Cholesky factorisation of R + A C Aᴴ in float64 for all draws of a run."""
    A, C = system.operator, problem.prior.covariance_u

    def build() -> Tensor:
        m = math.prod(A.data_shape)
        units = torch.eye(m, dtype=torch.float64, device=rhs.device).reshape(m, *A.data_shape)
        S = A(C.apply(A.adjoint(units))).flatten(1) + system.R_update.dense().to(units)
        # an operator that returns NaN must end as reported bad samples, not inside LAPACK
        return torch.linalg.cholesky((S + S.T) / 2) if bool(torch.isfinite(S).all()) else torch.full_like(S, math.nan)

    factor = problem.remember(("R + A C Aᴴ", str(rhs.device)), build)
    x = torch.cholesky_solve(rhs.flatten(1).to(factor).mT, factor).mT
    return Solved.direct(x.to(rhs).reshape(rhs.shape))
