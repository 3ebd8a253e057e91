r"""Nuisance parameters beside guided diffusion: Gibbs sweeps through the clean field.

With unknowns theta of noise or physics the joint law at level σ is p(u0, u_σ, theta | d) with
p(u_σ | u0) = N(u0, σ² I). Guidance at fixed theta carries u_σ | theta, d from one level to the next and leaves theta
alone, whose marginal is p(theta | d) at every level. A sweep at one level leaves the joint law alone as well:

    u0 ~ p(u0 | u_σ, d, theta) ∝ p(u0 | u_σ) p(d | u0, theta),        theta ~ p(theta | u0, d) ∝ p(theta) p(d | u0, theta).

The second is a Metropolis step on a density that is known (`_nuisance`). The first takes a Gaussian N(D, V) for
p(u0 | u_σ), as guidance does; then (d̃ = d + R^½ ξ, and ũ0 a draw of N(D, V))

    u0 = ũ0 + V Gᵀ (R + G V Gᵀ)⁻¹ (d̃ − g(D) − G (ũ0 − D)),        G = ∂g/∂u at D, A for linear physics,

is an exact draw for linear physics (perturb and solve). Two choices of V:

- "tweedie", V = σ² J: ũ0 by transitions of the reverse chain, the solve that of `MMPS`. Exact for Gaussian priors and
  linear physics, so that the sweeps then add no bias of their own; linearised elsewhere.
- "isotropic", V = r² I, r² = σ² s²/(σ² + s²), s² the prior's mean variance: one solve by `operator.solve`, or for
  physics that is not linear one Metropolis-adjusted Hamiltonian trajectory on N(u0; D, r² I) p(d | u0, theta).

As σ → 0 both become exact. At larger σ an error of V displaces theta, and u_σ with it; theta recovers on the way down,
but a direction of u is fixed once σ has passed its posterior width, and keeps what the wrong theta made of it. With the
guidance of `MMPS`, 12 correlated unknowns and an unknown noise level "isotropic" sweeps cost 0.03 posterior sd in x and
0.03 to 0.11 in log theta, "tweedie" ones nothing measurable (0.016). ΠGDM's own error is larger and the same with both.

The transitions for ũ0 end at a tenth of min(σ, s). Ended at 0.2 σ they make ũ0 too narrow along modes far narrower than
σ, the misfit too small and theta with it: on a rough 12 × 12 field by 0.2 to 0.3 sd, whatever the number of sweeps;
as they are 0.02 with converged inner solves (40 sparse data). Where those miss their tolerance (58 data behind a mask,
16 iterations, one solve in six) +0.13 in log theta and a sd ratio of 0.90 remain: `unconverged` says so.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from invgen.driver import Streams
from invgen.problem import InverseProblem
from invgen.solvers._inner import Theta, first_step, has_exact_step, likelihood_step, metropolis_step
from invgen.solvers._linearised import linearised
from invgen.solvers._nuisance import check_nuisance, nuisance_step, nuisance_values, start_nuisance
from invgen.solvers._reverse import reverse_draw
from invgen.solvers.guidance import MMPS, conditional_variance, denoise_with_graph, prior_variance

if TYPE_CHECKING:
    from invgen.contracts import Solver
    from invgen.solvers.guidance import Guidance

__all__: list[str] = []

Conditional = Literal["tweedie", "isotropic"]
State = dict[str, Tensor]

_GAIN = 0.3  # of the adaptation of Metropolis steps, which ends with the annealing
_RATIO, _FLOOR = 0.4, 0.1  # of the transitions that draw p(u0 | u_σ): σ'/σ, and the last level over min(σ, s)
_LEAPS = 10  # of a Hamiltonian trajectory


def check_clean_field(solver: Solver, problem: InverseProblem, rule: Guidance) -> None:
    """Raise a TypeError for a rule that does not say how it treats nuisance parameters, or priors without density."""
    if not problem.nuisance:
        return
    if getattr(rule, "conditional", None) not in ("tweedie", "isotropic"):
        raise TypeError(
            f'{type(rule).__name__} does not take nuisance parameters ({", ".join(problem.nuisance)}): its call needs **theta and the rule an attribute conditional, "tweedie" or "isotropic"; fix the parameters, or use another rule.'
        )
    check_nuisance(solver, problem)


def start_clean_field(problem: InverseProblem, rule: Guidance, mean: Tensor, rng: Streams) -> State:
    """What the sweeps keep between levels; empty without nuisance parameters.

    Args:
        mean: the prior's mean, `(batch, *shape)`.

    Returns:
        `nuisance` and `nuisance_step` (see `start_nuisance`); with Hamiltonian trajectories also their point
        `clean` and `clean_step`.
    """
    state = start_nuisance(problem, mean.new_zeros(len(mean)))
    if state and rule.conditional == "isotropic" and not has_exact_step(problem):  # type: ignore[attr-defined]
        theta = nuisance_values(problem, state["nuisance"])
        scale = math.sqrt(prior_variance(problem))
        state |= {"clean": mean, "clean_step": first_step(problem, mean, theta, scale, rng)}
    return state


def sweep_clean_field(
    problem: InverseProblem, rule: Guidance, u: Tensor, sigma: float, state: State, rng: Streams
) -> tuple[State, Tensor]:
    """One sweep: u0 given u and theta, theta given u0.

    Args:
        u: `(batch, *shape)` at level sigma; it is not moved. state: of `start_clean_field`, or one that holds it.

    Returns:
        The new entries of the state, and the relative residual of the inner solve `(batch,)`.
    """
    theta = nuisance_values(problem, state["nuisance"])
    moved: State = {}
    if rule.conditional == "tweedie":  # type: ignore[attr-defined]
        clean, residual = _tweedie_draw(problem, rule, u, sigma, theta, rng)
    else:
        with torch.no_grad():
            centre = problem.prior.denoise(u, sigma)
        width = math.sqrt(conditional_variance(problem, sigma))
        if "clean" in state:
            clean, step, _ = metropolis_step(
                problem, state["clean"], centre, width, state["clean_step"], theta, rng, leaps=_LEAPS, gain=_GAIN
            )
            residual = clean.new_zeros(len(clean))
            moved = {"clean": clean, "clean_step": step}
        else:
            clean, residual, _ = likelihood_step(problem, centre, width, rng, **theta)
    return {**moved, **_draw_theta(problem, clean, state, rng, gain=_GAIN)}, residual


def settle_clean_field(problem: InverseProblem, u0: Tensor, state: State, rng: Streams, passes: int) -> State:
    """theta given the finished sample, `passes` Metropolis passes whose step does not adapt: the new entries."""
    moved = {k: state[k] for k in ("nuisance", "nuisance_step")}
    for _ in range(passes):
        moved = _draw_theta(problem, u0, moved, rng, gain=0.0)
    return moved


def _draw_theta(problem: InverseProblem, u0: Tensor, state: State, rng: Streams, *, gain: float) -> State:
    v, step = nuisance_step(problem, u0, state["nuisance"], state["nuisance_step"], rng, gain=gain)
    return {"nuisance": v, "nuisance_step": step}


def _tweedie_draw(
    problem: InverseProblem, rule: Guidance, u: Tensor, sigma: float, theta: Theta, rng: Streams
) -> tuple[Tensor, Tensor]:
    """u0 with V = σ² J, and the residual of the solve."""
    # a mode far narrower than the last level would not spread at all
    floor = _FLOOR * min(1.0, math.sqrt(prior_variance(problem)) / sigma)
    steps = 1 + math.ceil(math.log(floor) / math.log(_RATIO))
    near = reverse_draw(problem, u, sigma, rng, steps=steps, floor=floor, tag="clean")
    solver = rule if isinstance(rule, MMPS) else MMPS(iterations=16)
    leaf, clean = denoise_with_graph(problem, u, sigma)
    fit = clean.detach()
    physics = linearised(problem, fit, **theta)
    white = rng.normal(physics.R.noise_shape, dtype=physics.residual.dtype, tag="data")
    # a complex white number has unit variance in both parts together, and this R is that of one part
    noise = physics.R.sqrt(white) * (math.sqrt(2) if white.is_complex() else 1.0)
    rhs = physics.residual + noise - physics.forward(near - fit).detach()
    pulled, residual = solver.pull(problem, physics, leaf, clean, rhs, sigma)
    return near + sigma**2 * pulled, residual
