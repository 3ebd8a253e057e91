r"""The data step that split samplers share: the law of a field that stays near a given one and explains the data.

    q(z) ∝ exp(−|z − u|²/2ρ²) · p(d | z)                                          (coordinates u of the prior)

For linear-Gaussian terms q is Gaussian: one solve gives its mean, one solve of perturbed data a draw. Elsewhere q is
known up to a constant, so that Metropolis steps leave it invariant: Hamiltonian Monte Carlo where the physics has a
gradient, preconditioned random walks where it is a black box. Both treat the Gaussian factor exactly, and cost no more
steps in many dimensions than in few.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from invgen.contracts import Solver
from invgen.driver import Streams
from invgen.linalg import norm
from invgen.noise import GaussianNoise
from invgen.problem import InverseProblem, LinearGaussian, Term

Theta = dict[str, Tensor]


def has_exact_step(problem: InverseProblem) -> bool:
    """True where q is Gaussian: affine physics and transform, Gaussian noise, no operator with unknown parameters."""
    unknown = set(problem.nuisance)
    return (
        problem.is_linear_gaussian
        and getattr(problem.prior.transform, "affine", False)
        and not any(unknown & set(t.operator.theta_names) for t in problem.terms)
    )


def has_gradient(problem: InverseProblem) -> bool:
    """True where every operator has a derivative."""
    return min(t.operator.derivative_order for t in problem.terms) >= 1


def check_data_step(solver: Solver, problem: InverseProblem, *, gradient: bool, nuisance: bool) -> None:
    """Raise a TypeError for black boxes and nuisance parameters, where the solver cannot treat them."""
    name = type(solver).__name__
    if problem.nuisance and not nuisance:
        raise TypeError(
            f"{name} does not sample nuisance parameters ({', '.join(problem.nuisance)}); fix them, or use PnPDM, which draws them too."
        )
    if gradient and not has_exact_step(problem) and not has_gradient(problem):
        raise TypeError(
            f"{name} needs the gradient of every operator, and one of them is a black box (derivative_order 0); use PnPDM, which then walks without gradients."
        )


@torch.no_grad()
def prior_centre(problem: InverseProblem, like: Tensor, sigma: float) -> Tensor:
    """The prior's mean as the denoiser knows it, shaped like `like`: D(D(0)) at a level that swamps everything."""
    first = problem.prior.denoise(torch.zeros_like(like[:1]), sigma)
    return problem.prior.denoise(first, sigma).expand_as(like)


# --- closed form -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def likelihood_step(
    problem: InverseProblem, u: Tensor, rho: float, rng: Streams, **theta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """An exact draw of q for linear-Gaussian terms: perturb u and the data, solve.

    Args:
        problem: the chunk's. u: `(batch, *shape)`. rho: ρ. rng: streams. theta: nuisance parameters of the noise.

    Returns:
        z like u; the relative residual of the solve and 1 where it did not converge, `(batch,)` each.
    """
    system = problem.linear_gaussian("u", **theta)
    R, data = system.R, system.data
    near = u + rho * rng.normal(problem.model_shape, dtype=u.dtype, tag="near")
    white = rng.normal(getattr(R, "noise_shape", system.operator.data_shape), dtype=data.dtype, tag="data")
    return _pull(system, near, data + R.sqrt(white), rho)


@torch.no_grad()
def conditional_mean(problem: InverseProblem, u: Tensor, rho: float, **theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean (and mode) of q for linear-Gaussian terms, u + ρ² Aᵀ (R + ρ² A Aᵀ)⁻¹ (d − A u); as `likelihood_step`."""
    system = problem.linear_gaussian("u", **theta)
    return _pull(system, u, system.data, rho)


def _pull(system: LinearGaussian, near: Tensor, target: Tensor, rho: float) -> tuple[Tensor, Tensor, Tensor]:
    A, R = system.operator, system.R_update
    if math.prod(A.data_shape) <= math.prod(A.model_shape):
        solved = A.solve(target - A(near), R, rho**2)
        z = near + rho**2 * A.adjoint(solved.x)
    else:
        solved = A.solve_model(A.adjoint(R.solve(target - A(near))), R, rho**2)
        z = near + solved.x
    return z, solved.residual, (~solved.converged).to(near.dtype)


# --- up to a constant --------------------------------------------------------------------------------------------------


def term_misfit(problem: InverseProblem, index: int, term: Term, prediction: Tensor, theta: Theta) -> Tensor:
    """−log p(d | prediction) of one term, `(batch,)`, up to a constant where the noise has no unknown parameter."""
    noise = term.noise
    if isinstance(noise, GaussianNoise) and not isinstance(noise.sigma, str):
        # factorised once a run, where the distribution would factorise at every call
        R = problem.remember(("R of term", index), lambda: noise.covariance(term.operator.data_shape))
        square = R.whiten(term.data - prediction).abs().square().flatten(1).sum(1)
        return square if prediction.is_complex() else 0.5 * square
    return -noise(prediction, **theta).log_prob(term.data)


def accepted(term: Term, theta: Theta) -> Theta:
    """The parameters the operator of a term takes."""
    return {k: v for k, v in theta.items() if k in term.operator.theta_names}


def misfit(problem: InverseProblem, z: Tensor, theta: Theta) -> Tensor:
    """Φ(z) = −log p(d | z, theta), `(batch,)`, up to a constant; z in the coordinates of the prior."""
    parts = [
        term_misfit(problem, i, t, t.operator(z, **accepted(t, theta)), theta) for i, t in enumerate(problem.in_u())
    ]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def misfit_and_gradient(problem: InverseProblem, z: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
    """Φ `(batch,)` and ∇Φ like z: the sum over items differentiates each by its own field."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_(True)
        value = misfit(problem, leaf, theta)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


def first_step(problem: InverseProblem, z: Tensor, theta: Theta, scale: float, rng: Streams) -> Tensor:
    """A step of the right size to begin with, 1/√L `(batch,)`, L the largest curvature of Φ at z.

    Eight power iterations on differences of gradients; `scale`, the prior's, where Φ is flat or the gradient is not
    to be had.
    """
    if not has_gradient(problem):
        return z.new_full((len(z),), math.log(scale))
    v = rng.normal(problem.model_shape, dtype=z.dtype, tag="curvature")
    reach, curvature = 1e-3 * scale, z.new_zeros(len(z))
    for _ in range(8):
        v = v * _wide(reach / norm(v).clamp_min(torch.finfo(z.dtype).tiny), v)
        change = misfit_and_gradient(problem, z + v, theta)[1] - misfit_and_gradient(problem, z - v, theta)[1]
        curvature = norm(change) / (2 * reach)
        v = change
    step = curvature.clamp_min(scale**-2).rsqrt()
    return torch.where(torch.isfinite(step), step, torch.full_like(step, 0.1 * scale)).log()


def metropolis_step(
    problem: InverseProblem,
    z: Tensor,
    u: Tensor,
    rho: float,
    log_step: Tensor,
    theta: Theta,
    rng: Streams,
    *,
    leaps: int,
    angle: float = 0.5 * math.pi,
    gain: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Markov steps that leave q invariant: one Hamiltonian trajectory, or `leaps` random walks for black boxes.

    In y = (z − u)/ρ the Hamiltonian is ½|y|² + ½|p|² + Φ(u + ρ y). Its Gaussian part turns (y, p) by an angle, exactly;
    a leap is half a kick −½ h ρ ∇Φ, a turn by h, half a kick (Beskos et al. 2011, equations 4.3–4.5). With a flat Φ
    a turn by leaps · h = π/2 is an independent draw. Black boxes: y' = √(1 − β²) y + β ξ, accepted on Φ alone (Cotter et al. 2013,
    equation 4.4). Both are accepted with the Metropolis probability.

    Args:
        z: `(batch, *shape)` current point. u, rho: centre and width of the Gaussian factor.
        log_step: `(batch,)` log of the step in units of u: h = step/ρ, at most angle/leaps and drawn between half of
            that and all of it (β = step/ρ ≤ 1).
        theta: nuisance parameters. rng: streams.
        leaps: leapfrog steps. angle: the most a trajectory turns; beyond π/2 it over-relaxes.
        gain: how far log_step moves towards an acceptance of 0.8 (0.3 for walks); 0 leaves it alone.

    Returns:
        z, log_step, and the acceptance probability `(batch,)`. An item whose misfit is not finite becomes NaN.
    """
    walks = not has_gradient(problem)
    most = rho if walks else rho * angle / leaps
    step = log_step.exp().clamp_max(most)
    take = _walk if walks else _trajectory
    z, probability = take(problem, z, u, rho, step, theta, rng, leaps)
    if gain > 0:
        log_step = (log_step + gain * (probability - (0.3 if walks else 0.8))).clamp_max(math.log(most))
    return z, log_step, probability


def _trajectory(
    problem: InverseProblem, z: Tensor, u: Tensor, rho: float, step: Tensor, theta: Theta, rng: Streams, leaps: int
) -> tuple[Tensor, Tensor]:
    # a stiff direction whose period fits the trajectory would only be reflected: the length varies
    jitter = 0.5 + 0.5 * rng.uniform((), dtype=step.dtype, tag="jitter")
    h = _wide(step / rho * jitter, z)
    cosine, sine, kick = h.cos(), h.sin(), 0.5 * rho * h
    y, p = (z - u) / rho, rng.normal(problem.model_shape, dtype=z.dtype, tag="momentum")
    before, gradient = misfit_and_gradient(problem, z, theta)
    start = before.double() + _half_square(y) + _half_square(p)
    value = before
    for _ in range(leaps):
        p = p - kick * gradient
        y, p = cosine * y + sine * p, cosine * p - sine * y
        value, gradient = misfit_and_gradient(problem, u + rho * y, theta)
        p = p - kick * gradient
    log_ratio = start - (value.double() + _half_square(y) + _half_square(p))
    z, _, probability = _accept(z, u + rho * y, before, value, log_ratio, rng)
    return z, probability


@torch.no_grad()
def _walk(
    problem: InverseProblem, z: Tensor, u: Tensor, rho: float, step: Tensor, theta: Theta, rng: Streams, leaps: int
) -> tuple[Tensor, Tensor]:
    beta, total = _wide(step / rho, z), torch.zeros_like(step)
    keep = (1 - beta.square()).clamp_min(0).sqrt()
    value = misfit(problem, z, theta)
    for _ in range(leaps):
        proposal = u + keep * (z - u) + beta * rho * rng.normal(problem.model_shape, dtype=z.dtype, tag="walk")
        after = misfit(problem, proposal, theta)
        z, value, probability = _accept(z, proposal, value, after, (value - after).double(), rng)
        total = total + probability
    return z, total / leaps


def _accept(
    z: Tensor, proposal: Tensor, before: Tensor, after: Tensor, log_ratio: Tensor, rng: Streams
) -> tuple[Tensor, Tensor, Tensor]:
    """The Metropolis choice: z, its misfit, and the probability of the move, `(batch,)`."""
    probability = torch.nan_to_num(log_ratio, nan=-math.inf).clamp_max(0).exp().to(before.dtype)
    taken = rng.uniform((), dtype=probability.dtype, tag="accept") < probability
    value = torch.where(taken, after, before)
    z = torch.where(_wide(taken, z), proposal, z)
    # what cannot be judged must end as a reported bad sample, not as a chain that never moves
    return torch.where(_wide(torch.isfinite(value), z), z, torch.full_like(z, torch.nan)), value, probability


def _half_square(v: Tensor) -> Tensor:
    return 0.5 * v.square().flatten(1).sum(1, dtype=torch.float64)


def _wide(value: Tensor, like: Tensor) -> Tensor:
    return value.reshape(-1, *(1,) * (like.ndim - 1))
