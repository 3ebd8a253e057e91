"""Guided diffusion: a posterior denoiser (guidance) moved from noise to data by an integrator; the two are orthogonal.

All integrators work in sigma space (variance exploding, du/dσ = (u − D)/σ) on a schedule of host floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from invgen.contracts import HasDenoiser, Solver
from invgen.driver import Streams
from invgen.problem import InverseProblem
from invgen.solvers.guidance import DPS, MMPS, Guidance, PiGDM, start_level

__all__ = ["GuidedDiffusion"]

Denoise = Callable[[Tensor, float, float], Tensor]


@dataclass(frozen=True)
class GuidedDiffusion(Solver):
    r"""Posterior samples by guided diffusion.

    Targets p(x | d) up to the guidance's approximation of E[u0 | u_σ, d] and the integrator's steps; with `MMPS`, a
    Gaussian prior and linear-Gaussian physics it converges to the exact posterior as `steps` grows.

    Integrators from σ to σ' (D the posterior denoiser, ξ ~ N(0, I)):

    - "euler": u' = D + (σ'/σ)(u − D), the probability-flow ODE, first order; one guidance call a step.
    - "heun": the same, second order (Karras et al. 2022, algorithm 1); two calls a step.
    - "ancestral": u' = D + (σ'/σ)²(u − D) + σ' √(1 − σ'²/σ²) ξ (Ho et al. 2020, equation 7, in sigma space).
    - "sde": u' = u + (1 − σ'²/σ²)(D − u) + √(σ² − σ'²) ξ, Euler–Maruyama of the reverse SDE (Song et al. 2021, eq. 6).

    `corrections` *unadjusted* Langevin steps u ← u + ε (D − u)/σ² + √(2ε) ξ with ε = correction_step · σ² follow each
    step (Song et al. 2021, algorithm 4, with a fixed ratio): they halve a guidance's bias and add one of order
    correction_step/2 in the variance where the posterior is as wide as the noise.

    The start is u = D(σ_max) + σ_max ξ, around the posterior mean rather than around zero, so that no trace of a
    prior mean is left.

    Args:
        guidance: `DPS`, `PiGDM`, `MMPS`.
        integrator: see above.
        steps: noise levels.
        sigma_max: first level; 7 √λ_max of the prior when omitted. sigma_min: last level before 0.
        rho: warping of the schedule (EDM equation 5).
        corrections: Langevin steps a level. correction_step: ε/σ².

    Cost a sample: steps · (calls of the integrator + corrections) guidance calls. Needs `HasDenoiser`, an affine
    transform, Gaussian noise; linear operators except for `DPS`.
    """

    guidance: Guidance = field(default_factory=MMPS)
    integrator: Literal["euler", "heun", "ancestral", "sde"] = "heun"
    steps: int = 50
    sigma_max: float | None = None
    sigma_min: float = 0.005
    rho: float = 7.0
    corrections: int = 0
    correction_step: float = 0.1

    needs: ClassVar[tuple[type, ...]] = (HasDenoiser,)
    kind: ClassVar[str] = "approximate"

    def __post_init__(self) -> None:
        if self.integrator not in ("euler", "heun", "ancestral", "sde"):
            raise ValueError(f"The integrator must be euler, heun, ancestral or sde, got {self.integrator!r}.")
        if self.steps < 2 or self.corrections < 0 or not 0 < self.correction_step < 2:
            raise ValueError(
                f"GuidedDiffusion needs steps >= 2, corrections >= 0 and 0 < correction_step < 2, got {self.steps}, {self.corrections}, {self.correction_step}."
            )

    @classmethod
    def examples(cls) -> list[GuidedDiffusion]:
        """Cheap instances for the conformance tests."""
        return [
            cls(MMPS(), "heun", steps=12),
            cls(PiGDM(), "sde", steps=12, corrections=1),
            cls(DPS(0.3), "ancestral", steps=12),
            cls(MMPS(), "euler", steps=12),
        ]

    def check(self, problem: InverseProblem) -> None:
        super().check(problem)
        check_diffusion_problem(self, problem, linear_only=self.guidance.linear_only)

    def num_steps(self, problem: InverseProblem) -> int:
        return self.steps

    def levels(self, problem: InverseProblem) -> list[float]:
        """The schedule: `steps` levels and 0."""
        return problem.remember(
            ("levels", self),
            lambda: schedule(self.sigma_min, self.sigma_max or start_level(problem), self.steps, self.rho),
        )

    def init(self, problem: InverseProblem, rng: Streams) -> dict[str, Tensor]:
        top = self.levels(problem)[0]
        xi = rng.normal(problem.model_shape, dtype=problem.dtype, tag="step")
        centre, residual = self.guidance(problem, torch.zeros_like(xi), top, 1.0)
        residual = xi.new_zeros(len(xi)) if residual is None else residual
        return {"u": centre + top * xi, "k": torch.zeros((), dtype=torch.long), "stat_residual": residual}

    def step(self, problem: InverseProblem, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        k = int(state["k"])
        now, after = self.levels(problem)[k : k + 2]
        u, worst = state["u"], state["stat_residual"]

        def denoise(v: Tensor, sigma: float, gain: float) -> Tensor:
            nonlocal worst
            clean, residual = self.guidance(problem, v, sigma, gain)
            worst = worst if residual is None else torch.maximum(worst, residual)
            return clean

        def noise() -> Tensor:
            return rng.normal(problem.model_shape, dtype=u.dtype, tag="step")

        u = advance(self.integrator, denoise, u, now, after, noise)
        if after > 0:
            for _ in range(self.corrections):
                step = self.correction_step
                clean = denoise(u, after, step)
                u = u + step * (clean - u) + math.sqrt(2 * step) * after * noise()
        return {"u": u, "k": state["k"] + 1, "stat_residual": worst}

    def finish(self, problem: InverseProblem, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"x": problem.prior.transform(state["u"]), "stat_residual": state["stat_residual"]}


def advance(
    integrator: str, denoise: Denoise, u: Tensor, now: float, after: float, noise: Callable[[], Tensor]
) -> Tensor:
    """One step of an integrator from level `now` to `after`; at 0 every integrator returns the clean estimate."""
    ratio = after / now
    if after == 0:
        return denoise(u, now, 1.0)
    if integrator in ("ancestral", "sde"):
        keep = ratio**2
        clean = denoise(u, now, 1 - keep)
        spread = after * math.sqrt(1 - keep) if integrator == "ancestral" else math.sqrt(now**2 - after**2)
        return torch.lerp(clean, u, keep) + spread * noise()
    clean = denoise(u, now, 1 - ratio)
    ahead = torch.lerp(clean, u, ratio)
    if integrator == "heun":
        slope = 0.5 * ((u - clean) / now + (ahead - denoise(ahead, after, 1 - ratio)) / after)
        ahead = u + (after - now) * slope
    return ahead


def schedule(sigma_min: float, sigma_max: float, steps: int, rho: float) -> list[float]:
    """EDM equation 5, `steps` levels from sigma_max to sigma_min, then 0."""
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"The schedule needs 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}.")
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [*((top + i / (steps - 1) * (bottom - top)) ** rho for i in range(steps)), 0.0]


def check_diffusion_problem(solver: Solver, problem: InverseProblem, *, linear_only: bool) -> None:
    """Raise a TypeError for what guided and split samplers cannot treat."""
    name = type(solver).__name__
    if not getattr(problem.prior.transform, "affine", False):
        raise TypeError(
            f"{name} works in the prior's coordinates and needs an affine transform, this prior has {type(problem.prior.transform).__name__}; move the non-linear part into the operator with @."
        )
    if problem.nuisance:
        raise TypeError(
            f"{name} does not sample nuisance parameters ({', '.join(problem.nuisance)}); fix them, or use a latent sampler."
        )
    if linear_only and not problem.is_linear_gaussian:
        kinds = ", ".join(f"{type(t.operator).__name__} with {type(t.noise).__name__}" for t in problem.terms)
        raise TypeError(
            f"{name} with this rule needs linear operators with Gaussian noise, got {kinds}; DPS takes non-linear operators."
        )
    if not linear_only and min(t.operator.derivative_order for t in problem.terms) < 1:
        raise TypeError(
            f"{name} with this rule needs the gradient of every operator, and one of them is a black box (derivative_order 0); use a solver without gradients."
        )
    if not all(hasattr(t.noise, "covariance") for t in problem.terms):
        raise TypeError(f"{name} needs Gaussian noise, got {', '.join(type(t.noise).__name__ for t in problem.terms)}.")
