r"""Twists: approximations ĥ(u) of p(d | u_σ = u) that pull particles towards the data and are weighted out again.

With e = d − A D(u, σ), a Gaussian approximation N(D, V) of p(u0 | u_σ) gives

    log ĥ = −½ eᵀ S⁻¹ e − ½ log det S,   S = R + A V Aᵀ,        σ² ∇ log ĥ ≈ σ² Jᵀ Aᵀ S⁻¹ e,   J = ∂D/∂u

(the derivative of V left out). A twist may be any positive function of u: what it gets wrong costs particles, not
correctness. It is evaluated once for a particle and kept with it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from invgen.linalg import inner
from invgen.problem import InverseProblem
from invgen.solvers._linearised import solve_in_data
from invgen.solvers._measured import factors, measured
from invgen.solvers.guidance import denoise_with_graph, prior_variance, pull_back

__all__: list[str] = []

Rule = Literal["mmps", "pigdm"]
RULES = ("mmps", "pigdm")
MMPS_LIMIT = 256  # measured components: a vector–Jacobian product each

Twisted = tuple[Tensor, Tensor, Tensor]  # D and σ² ∇ log ĥ like u, log ĥ `(n,)` in float64 up to a constant


def evaluate(rule: Rule, solver: object, problem: InverseProblem, u: Tensor, owner: Tensor, sigma: float) -> Twisted:
    """The twist of particles.

    Args:
        problem: the chunk's. u: `(n, *shape)`. owner: `(n,)`, the item of the chunk whose data a particle explains.

    Returns:
        D(u, σ), σ² ∇ log ĥ(u), both like u, and log ĥ(u) `(n,)`, up to a constant that all particles share.
    """
    return (_mmps if rule == "mmps" else _pigdm)(solver, problem, u, owner, sigma)


def check_rule(rule: Rule, solver: object, problem: InverseProblem) -> None:
    """Raise a TypeError where the twist cannot be computed."""
    if rule == "mmps" and (n := factors(solver, problem)[1].numel()) > MMPS_LIMIT:
        raise TypeError(
            f'{type(solver).__name__} with the twist "mmps" takes one vector–Jacobian product for each measured component, up to {MMPS_LIMIT}, and this problem has {n}; use twist="pigdm".'
        )


def conditional_variance(problem: InverseProblem, sigma: float) -> float:
    """r² = σ² s²/(σ² + s²), the variance of u0 given u_σ under a white prior of the prior's mean variance s²."""
    s2 = prior_variance(problem)
    return sigma**2 * s2 / (sigma**2 + s2)


def _pigdm(solver: object, problem: InverseProblem, u: Tensor, owner: Tensor, sigma: float) -> Twisted:
    """V = r² I: S is one matrix for all particles, and its determinant drops out."""
    system = problem.linear_gaussian("u")
    leaf, clean = denoise_with_graph(problem, u, sigma)
    fit = clean.detach()
    residual = system.data[owner] - system.operator(fit)
    weighted = solve_in_data(problem, residual, conditional_variance(problem, sigma)).x
    pull = pull_back(clean, leaf, system.operator.adjoint(weighted))
    return fit, sigma**2 * pull, -0.5 * inner(residual, weighted).double()


def _mmps(solver: object, problem: InverseProblem, u: Tensor, owner: Tensor, sigma: float) -> Twisted:
    """V = σ² J, the exact covariance (Tweedie): in whitened components y = S Vᴴ u + N(0, I), S = I + σ² A' J A'ᵀ.

    A learned J is not symmetric; its symmetric part is taken, and where I + … is not positive definite r² I for V.
    """
    m = measured(solver, problem, u)
    rows = m.basis / m.noise[:, None]
    leaf, clean = denoise_with_graph(problem, u, sigma)
    fit = clean.detach()
    residual = (m.data[owner] / m.noise - fit.flatten(1) @ rows.mT).double()
    shape = u.shape[1:]
    products = torch.stack(
        [pull_back(clean, leaf, row.reshape(shape).expand_as(u), keep=i < len(rows) - 1) for i, row in enumerate(rows)],
        dim=1,
    ).flatten(2)
    inside = sigma**2 * (products @ rows.mT).double()
    unit = torch.eye(len(rows), dtype=inside.dtype, device=u.device)
    factor, failed = torch.linalg.cholesky_ex(unit + 0.5 * (inside + inside.mT))
    plain = torch.diag_embed((1 + conditional_variance(problem, sigma) / m.noise.double().square()).sqrt())
    factor = torch.where((failed > 0)[:, None, None], plain, factor)
    weighted = torch.cholesky_solve(residual[..., None], factor)[..., 0]
    log_twist = -0.5 * (residual * weighted).sum(1) - factor.diagonal(dim1=1, dim2=2).log().sum(1)
    pull = torch.einsum("nr,nrm->nm", weighted.to(u), products).reshape(u.shape)
    return fit, sigma**2 * pull, log_twist
