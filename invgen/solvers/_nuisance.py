r"""Nuisance parameters inside a Gibbs sampler: Metropolis steps on p(theta | z, d) ∝ p(theta) p(d | g(z, theta), theta).

This conditional is known up to a constant whatever the prior of the model is, so that a random walk with a Metropolis
choice is exact. It walks in the coordinates v of each parameter's own prior, theta = T(v), with the density
p(T(v)) |det T'(v)|: a positive parameter under `Exp` walks over its logarithm and never leaves its range.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from invgen.contracts import HasDensity, Solver
from invgen.driver import Streams
from invgen.noise import GaussianNoise
from invgen.problem import InverseProblem, Term
from invgen.solvers._inner import Theta, accepted, term_misfit

_TRIES = 4  # proposals a parameter and sweep
_TARGET = 0.44  # acceptance of a one-dimensional random walk (Roberts & Rosenthal 2001)


def check_nuisance(solver: Solver, problem: InverseProblem) -> None:
    """Raise a TypeError for a nuisance prior without a density."""
    for name, prior in problem.nuisance.items():
        if not isinstance(prior, HasDensity):
            raise TypeError(
                f"{type(solver).__name__} updates the nuisance parameter {name!r} by Metropolis steps and needs the density of its prior, which {type(prior).__name__} does not have; use a prior with log_prob."
            )


def start_nuisance(problem: InverseProblem, like: Tensor) -> dict[str, Tensor]:
    """First state: `nuisance` `(batch, k)`, the prior medians in v, and `nuisance_step`, log prior sds; empty for k = 0."""
    if not problem.nuisance:
        return {}

    def build() -> tuple[list[float], list[float]]:
        draws = [p.transform.inverse(p.sample(256, seed=0)).flatten().double() for p in problem.nuisance.values()]
        return [float(d.median()) for d in draws], [math.log(float(d.std())) for d in draws]

    centre, width = problem.remember("nuisance start", build)
    batch = len(like)
    return {
        "nuisance": like.new_tensor(centre).expand(batch, -1).clone(),
        "nuisance_step": like.new_tensor(width).expand(batch, -1).clone(),
    }


def nuisance_values(problem: InverseProblem, v: Tensor | None) -> Theta:
    """theta by name, `(batch,)` each, from the coordinates v `(batch, k)`."""
    if v is None:
        return {}
    return {n: p.transform(v[:, i, None]).reshape(-1) for i, (n, p) in enumerate(problem.nuisance.items())}


@torch.no_grad()
def nuisance_step(
    problem: InverseProblem, z: Tensor, v: Tensor, log_step: Tensor, rng: Streams, *, gain: float
) -> tuple[Tensor, Tensor]:
    """A few random-walk Metropolis steps on every parameter in turn, given z.

    Args:
        z: `(batch, *shape)` in u. v, log_step: `(batch, k)`. rng: streams.
        gain: how far log_step moves towards an acceptance of 0.44 each time; 0 leaves it alone.

    Returns:
        v and log_step. Cost: 4 predictions a parameter of an operator, none for a parameter of the noise.
    """
    terms = problem.in_u()
    theta = nuisance_values(problem, v)
    predictions = [t.operator(z, **accepted(t, theta)) for t in terms]
    fits = [term_misfit(problem, i, t, p, theta) for i, (t, p) in enumerate(zip(terms, predictions, strict=True))]
    for k, (name, prior) in enumerate(problem.nuisance.items()):
        moved = [i for i, t in enumerate(terms) if name in t.operator.theta_names]
        touched = [i for i, t in enumerate(terms) if i in moved or _noise_takes(t, name)]
        density = _log_density(prior, v[:, k])
        for _ in range(_TRIES):
            proposal = v[:, k] + log_step[:, k].exp() * rng.normal((), dtype=v.dtype, tag=f"theta {name}")
            trial = {**theta, name: prior.transform(proposal[:, None]).reshape(-1)}
            fresh = {i: terms[i].operator(z, **accepted(terms[i], trial)) for i in moved}
            after = {i: term_misfit(problem, i, terms[i], fresh.get(i, predictions[i]), trial) for i in touched}
            wanted = _log_density(prior, proposal)
            log_ratio = wanted - density
            for i in touched:
                log_ratio = log_ratio + fits[i] - after[i]
            probability = torch.nan_to_num(log_ratio, nan=-math.inf).clamp_max(0).exp()
            taken = rng.uniform((), dtype=v.dtype, tag=f"theta {name}") < probability
            theta = {**theta, name: torch.where(taken, trial[name], theta[name])}
            v = torch.cat([v[:, :k], torch.where(taken, proposal, v[:, k])[:, None], v[:, k + 1 :]], dim=1)
            density = torch.where(taken, wanted, density)
            for i in touched:
                fits[i] = torch.where(taken, after[i], fits[i])
            for i in moved:
                wide = taken.reshape(-1, *(1,) * (predictions[i].ndim - 1))
                predictions[i] = torch.where(wide, fresh[i], predictions[i])
            if gain > 0:
                step = log_step[:, k] + gain * (probability - _TARGET)
                log_step = torch.cat([log_step[:, :k], step[:, None], log_step[:, k + 1 :]], dim=1)
    return v, log_step


def _noise_takes(term: Term, name: str) -> bool:
    """Whether the noise of a term may depend on the parameter: a Gaussian one says so, others are asked every time."""
    return term.noise.sigma == name if isinstance(term.noise, GaussianNoise) else True


def _log_density(prior: HasDensity, v: Tensor) -> Tensor:
    """log p(T(v)) |det T'(v)|, `(batch,)`."""
    transform = prior.transform  # type: ignore[attr-defined]
    return prior.log_prob(transform(v[:, None])) + transform.log_det(v[:, None])
