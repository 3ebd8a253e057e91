r"""Split Gibbs sampling with a diffusion prior: no Jacobian of the network, the physics solved in closed form.

The posterior is split with a copy z of u (Vono, Dobigeon & Chainais 2019),

    p_ρ(u, z | d) ∝ p(u) · exp(−|u − z|²/2ρ²) · p(d | z),

whose two conditionals are simple: z given u is Gaussian for linear-Gaussian physics, and u given z is the law of a
clean field given its noisy version z at noise level ρ, which a diffusion model samples by running backwards from ρ.
As ρ → 0 the law of u tends to the posterior.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from invgen.contracts import HasDenoiser, Solver
from invgen.driver import Streams
from invgen.problem import InverseProblem
from invgen.solvers.diffusion import check_diffusion_problem
from invgen.solvers.guidance import prior_variance

__all__ = ["PnPDM"]


@dataclass(frozen=True)
class PnPDM(Solver):
    r"""Plug-and-play diffusion models (Wu et al. 2024, arXiv:2405.18782, algorithm 1): annealed split Gibbs sampling.

    Targets p_ρ(u | d) at the last coupling ρ = rho_min, which tends to p(u | d) as rho_min → 0, provided the chain keeps
    up with the annealing (`iterations`). A direction of posterior standard deviation s follows the annealing until
    about ρ = s/√k, k iterations an octave, so that its variance ends within a factor 1 + O(1/k).

    - Likelihood step, exact: z = ũ + ρ² Aᵀ (R + ρ² A Aᵀ)⁻¹ (d̃ − A ũ) with ũ = u + ρ ξ₁ and d̃ = d + R^½ ξ₂, by
      `operator.solve` (or the equivalent `solve_model` where data outnumber the model).
    - Prior step, a draw of p(u0 | u_ρ = z): `inner` steps of the stochastic sampler of EDM (Karras et al. 2022,
      algorithm 2) from σ = ρ down to ρ · floor, then one denoising. A step adds noise of variance σ² − σ'² and then
      follows the probability-flow ODE from √(2σ² − σ'²) to σ' by Heun's rule: that amount of noise is the one of the
      reverse SDE. The order matters in a handful of steps: on Gaussian priors four ancestral steps leave the chain
      with 0.46 to 0.61 of its variance, four Euler–Maruyama steps with 1.0 to 2.1 times it, four of these with 0.97
      to 1.26 (at twice the evaluations a step).

    With a *learned* denoiser the chain samples the law that the network implies at the smallest ρ, and an error of the
    denoiser that is small against ρ is not small against the ρ² a sweep moves: more sweeps at small ρ sharpen the
    samples. Measured on fields drawn from the shipped prior: a nominal 90 % band covers 0.73, where `GuidedDiffusion`
    with `MMPS` covers 0.92. With exact denoisers neither effect exists.

    Args:
        iterations: Gibbs sweeps, spread evenly over log ρ.
        rho_max, rho_min: first and last coupling, in units of the prior's rms scale s.
        inner: noise levels of a prior step (network evaluations a sweep: 2 inner + 1).
        floor: last noise level of a prior step over ρ.
        hold: extra sweeps at rho_min.

    Cost a sample: (iterations + hold) · (2 inner + 1) network passes without gradients, as many solves. Needs
    `HasDenoiser`, an affine transform, linear-Gaussian terms.
    """

    iterations: int = 60
    rho_max: float = 3.0
    rho_min: float = 0.01
    inner: int = 4
    floor: float = 0.05
    hold: int = 0

    needs: ClassVar[tuple[type, ...]] = (HasDenoiser,)
    kind: ClassVar[str] = "approximate"

    def __post_init__(self) -> None:
        if self.iterations < 2 or self.inner < 1 or self.hold < 0:
            raise ValueError(
                f"PnPDM needs iterations >= 2, inner >= 1 and hold >= 0, got {self.iterations}, {self.inner}, {self.hold}."
            )
        if not (0 < self.rho_min < self.rho_max and 0 < self.floor < 1):
            raise ValueError(
                f"PnPDM needs 0 < rho_min < rho_max and 0 < floor < 1, got {self.rho_min}, {self.rho_max}, {self.floor}."
            )

    @classmethod
    def examples(cls) -> list[PnPDM]:
        """Cheap instances for the conformance tests."""
        return [cls(iterations=15, inner=3), cls(iterations=8, inner=2, hold=2)]

    def check(self, problem: InverseProblem) -> None:
        super().check(problem)
        check_diffusion_problem(self, problem, linear_only=True)

    def num_steps(self, problem: InverseProblem) -> int:
        return self.iterations + self.hold

    def coupling(self, problem: InverseProblem, sweep: int) -> float:
        """ρ of a sweep, in units of u."""
        scale = math.sqrt(prior_variance(problem))
        fraction = min(1.0, sweep / (self.iterations - 1))
        return scale * self.rho_max * (self.rho_min / self.rho_max) ** fraction

    def init(self, problem: InverseProblem, rng: Streams) -> dict[str, Tensor]:
        xi = rng.normal(problem.model_shape, dtype=problem.dtype, tag="start")
        start = problem.prior.denoise(torch.zeros_like(xi), 1e2 * math.sqrt(prior_variance(problem)))
        zero = xi.new_zeros(xi.shape[0])
        return {
            "u": start + math.sqrt(prior_variance(problem)) * xi,
            "k": torch.zeros((), dtype=torch.long),
            "stat_residual": zero,
            "stat_unconverged": zero.clone(),
        }

    def step(self, problem: InverseProblem, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        rho = self.coupling(problem, int(state["k"]))
        z, residual, missed = likelihood_step(problem, state["u"], rho, rng)
        u = self._prior_step(problem, z, rho, rng)
        return {
            "u": u,
            "k": state["k"] + 1,
            "stat_residual": torch.maximum(state["stat_residual"], residual),
            "stat_unconverged": state["stat_unconverged"] + missed,
        }

    @torch.no_grad()
    def _prior_step(self, problem: InverseProblem, z: Tensor, rho: float, rng: Streams) -> Tensor:
        denoise = problem.prior.denoise
        ratio = self.floor ** (1 / self.inner)
        u, now = z, rho
        for _ in range(self.inner):
            after = now * ratio
            noisy = math.sqrt(2 * now**2 - after**2)
            u = u + math.sqrt(now**2 - after**2) * rng.normal(problem.model_shape, dtype=u.dtype, tag="prior")
            slope = (u - denoise(u, noisy)) / noisy
            ahead = u + (after - noisy) * slope
            slope = 0.5 * (slope + (ahead - denoise(ahead, after)) / after)
            u, now = u + (after - noisy) * slope, after
        return problem.prior.denoise(u, now)

    def finish(self, problem: InverseProblem, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"x": problem.prior.transform(state["u"]), **{k: v for k, v in state.items() if k.startswith("stat_")}}


@torch.no_grad()
def likelihood_step(problem: InverseProblem, u: Tensor, rho: float, rng: Streams) -> tuple[Tensor, Tensor, Tensor]:
    """An exact draw of p(z | u, d) ∝ exp(−|u − z|²/2ρ²) p(d | z): perturb both, solve.

    Returns:
        z like u; the relative residual of the solve and 1 where it did not converge, `(batch,)` each.
    """
    system = problem.linear_gaussian("u")
    A, data, R = system.operator, system.data, system.R
    near = u + rho * rng.normal(problem.model_shape, dtype=u.dtype, tag="near")
    white = rng.normal(getattr(R, "noise_shape", A.data_shape), dtype=data.dtype, tag="data")
    target, R = data + R.sqrt(white), system.R_update
    if math.prod(A.data_shape) <= math.prod(A.model_shape):
        solved = A.solve(target - A(near), R, rho**2)
        z = near + rho**2 * A.adjoint(solved.x)
    else:
        solved = A.solve_model(A.adjoint(R.solve(target - A(near))), R, rho**2)
        z = near + solved.x
    return z, solved.residual, (~solved.converged).to(u.dtype)
