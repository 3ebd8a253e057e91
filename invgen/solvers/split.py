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
    - Prior step: `inner` steps from σ = ρ down to ρ · floor of the reverse process, then one denoising. A step is
      Gaussian with the exact mean of p(u_σ' | u_σ), D + (σ'/σ)²(u − D), and the variance
      σ'²(1 − κ) + (1 − κ)² r², κ = (σ'/σ)², with r² = σ² s²/(σ² + s²) in place of Cov[u0 | u_σ]: r² = 0 would be
      ancestral sampling, which loses up to 80 % of the variance in a handful of steps, r² = σ² Euler–Maruyama of the
      reverse SDE; this choice is exact for a white prior and tends to the exact one as ρ falls below the prior's
      scales. The paper uses EDM's stochastic sampler here.

    Args:
        iterations: Gibbs sweeps, spread evenly over log ρ.
        rho_max, rho_min: first and last coupling, in units of the prior's rms scale s.
        inner: noise levels of a prior step (network evaluations a sweep: inner + 1).
        floor: last noise level of a prior step over ρ.
        hold: extra sweeps at rho_min.

    Cost a sample: (iterations + hold) · (inner + 1) network passes without gradients, as many solves. Needs
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
        s2 = prior_variance(problem)
        ratio = self.floor ** (1 / self.inner)
        u, now = z, rho
        for _ in range(self.inner):
            keep = ratio**2
            clean = problem.prior.denoise(u, now)
            r2 = now**2 * s2 / (now**2 + s2)
            spread = math.sqrt(keep * now**2 * (1 - keep) + (1 - keep) ** 2 * r2)
            u = torch.lerp(clean, u, keep) + spread * rng.normal(problem.model_shape, dtype=u.dtype, tag="prior")
            now *= ratio
        return problem.prior.denoise(u, now)

    def finish(self, problem: InverseProblem, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"x": problem.prior.transform(state["u"]), **{k: v for k, v in state.items() if k.startswith("stat_")}}


@torch.no_grad()
def likelihood_step(problem: InverseProblem, u: Tensor, rho: float, rng: Streams) -> tuple[Tensor, Tensor, Tensor]:
    """An exact draw of p(z | u, d) ∝ exp(−|u − z|²/2ρ²) p(d | z): perturb both, solve.

    Returns:
        z like u; the relative residual of the solve and 1 where it did not converge, `(batch,)` each.
    """
    A, data, R = problem.linear_gaussian("u")
    near = u + rho * rng.normal(problem.model_shape, dtype=u.dtype, tag="near")
    white = rng.normal(getattr(R, "noise_shape", A.data_shape), dtype=data.dtype, tag="data")
    target = data + R.sqrt(white)
    if math.prod(A.data_shape) <= math.prod(A.model_shape):
        solved = A.solve(target - A(near), R, rho**2)
        z = near + rho**2 * A.adjoint(solved.x)
    else:
        solved = A.solve_model(A.adjoint(R.solve(target - A(near))), R, rho**2)
        z = near + solved.x
    return z, solved.residual, (~solved.converged).to(u.dtype)
