r"""Decoupled annealing: a clean draw at every noise level, noised again to the next.

With p(u0 | u_σ, d) at hand, u_σ' = u0 + σ' ξ has the law p(u_σ' | d) whatever the distance from σ to σ' is (Zhang et al.
2024, proposition 1): no step follows another, and no error of one lasts, except in what is wider than σ' and hardly
moves any more. All depends on the conditional p(u0 | u_σ, d) ∝ p(u0 | u_σ) p(d | u0).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from invgen.contracts import HasDenoiser, Solver
from invgen.driver import Streams
from invgen.linalg import gmres
from invgen.problem import InverseProblem
from invgen.solvers._inner import (
    check_data_step,
    first_step,
    has_exact_step,
    likelihood_step,
    metropolis_step,
    prior_centre,
)
from invgen.solvers._linearised import from_reals, over_reals
from invgen.solvers._reverse import reverse_draw, transition_levels
from invgen.solvers.diffusion import check_diffusion_problem, check_start, name_bad_level
from invgen.solvers.guidance import noise_levels, prior_variance

__all__ = ["DAPS"]

_TOLERANCE = 1e-3  # relative residual above which a Krylov solve counts as unconverged


@dataclass(frozen=True)
class DAPS(Solver):
    r"""Decoupled annealing posterior sampling (Zhang et al. 2024, arXiv:2407.01521, algorithm 1), and an exact variant.

    At every level: x̂ from u_σ, a draw of u0 from an approximation of p(u0 | u_σ, d), u_σ' = u0 + σ' ξ. Targets p(x | d)
    up to that approximation:

    - `conditional="isotropic"`, the paper: x̂ by `ode_steps` Euler steps of the probability-flow ODE and
      p(u0 | u_σ, d) ∝ N(u0; x̂, r²) p(d | u0). Linear-Gaussian terms are drawn exactly through `operator.solve`; elsewhere
      a few Metropolis-adjusted Hamiltonian trajectories from x̂ leave this density invariant (the paper: unadjusted
      Langevin steps). `width="sigma"` is the paper's r = σ, `width="prior"` r² = σ² s²/(σ² + s²), the conditional
      variance of a white prior of variance s².
      **Bias**: the end of the flow is a draw of the prior already, and N(x̂, r²) adds the spread of p(u0 | u_σ) once
      more. Where the data say nothing about a direction of prior variance c, slow annealing ends with the variance 2 c
      instead of c, for either r. `ode_steps=1` makes x̂ = D(u_σ), the conditional mean, to which N(x̂, r²) fits: exact
      with `width="prior"` for a white prior of variance s², and for any prior in the limit of slow annealing.
    - `conditional="tweedie"`: N(D, σ² J) with Tweedie's covariance, J = ∂D/∂u, in the place of N(x̂, r²). A draw v of
      p(u0 | u_σ) by `inner` reverse transitions is moved to the data by Matheron's rule,

          u0 = v + σ² Jᵀ Aᵀ (R + σ² A Jᵀ Aᵀ)⁻¹ (d + R^½ ξ − A v),

      by GMRES preconditioned with `operator.solve`. Exact for Gaussian priors and linear-Gaussian terms at any number
      of levels, up to the inner transitions; for others p(u0 | u_σ, d) is met as σ falls below the scale on which the
      prior bends.

    Measured on the 16-d Gaussian of the exam, the worst of noise 0.05 / 0.3 / 1, settings of `exam()`: "tweedie" mean
    error 0.00, sd ratio 0.99, coverage 0.90, and on four 32 × 32 Gaussian fields 0.02, 1.00, 0.90; "isotropic" with
    `ode_steps=1` 0.03, 1.00, 0.90 on the 16-d Gaussian.

    Args:
        levels: noise levels.
        ode_steps: Euler steps of the flow ("isotropic"). width: r ("isotropic").
        conditional: see above.
        inner, floor: reverse transitions of a draw, and the level over σ from which the last goes to 0 ("tweedie").
        iterations, rtol: Krylov space and relative tolerance of the solve ("tweedie").
        trajectories, leaps: Hamiltonian trajectories a level and their leapfrog steps, for other than linear-Gaussian
            terms ("isotropic").
        sigma_max: first level; 7 √λ_max of the prior when omitted. sigma_min: last level before 0.
        rho: warping of the schedule (EDM equation 5).

    Cost a sample and level: ode_steps network passes and one solve, or trajectories · (leaps + 1) gradients of the
    physics; "tweedie": 2 inner + 1 passes and at most iterations + 1 vector–Jacobian products, operators and adjoints.
    Needs `HasDenoiser`; "tweedie" linear-Gaussian terms and an affine transform.
    """

    levels: int = 100
    ode_steps: int = 5
    width: Literal["sigma", "prior"] = "sigma"
    conditional: Literal["isotropic", "tweedie"] = "isotropic"
    inner: int = 4
    floor: float = 0.25
    iterations: int = 8
    rtol: float = 1e-4
    trajectories: int = 3
    leaps: int = 10
    sigma_max: float | None = None
    sigma_min: float = 0.005
    rho: float = 7.0

    needs: ClassVar[tuple[type, ...]] = (HasDenoiser,)
    kind: ClassVar[str] = "approximate"

    def __post_init__(self) -> None:
        if self.width not in ("sigma", "prior") or self.conditional not in ("isotropic", "tweedie"):
            raise ValueError(
                f"DAPS takes width sigma or prior and conditional isotropic or tweedie, got {self.width!r} and {self.conditional!r}."
            )
        counts = (self.ode_steps, self.inner, self.iterations, self.trajectories, self.leaps)
        if self.levels < 2 or min(counts) < 1 or not 0 < self.floor < 1:
            raise ValueError(
                f"DAPS needs levels >= 2, 0 < floor < 1 and at least one of each inner step, got levels={self.levels}, floor={self.floor} and {counts}."
            )

    @classmethod
    def examples(cls) -> list[DAPS]:
        """Cheap instances for the conformance tests."""
        return [
            cls(levels=10, ode_steps=3),
            cls(levels=10, ode_steps=1, width="prior"),
            cls(levels=6, conditional="tweedie", inner=2),
        ]

    @classmethod
    def exam(cls) -> dict[str, Solver]:
        """Settings meant to be accurate: Tweedie's covariance, and the most consistent isotropic one."""
        return {
            "tweedie": cls(levels=40, conditional="tweedie", inner=6, floor=0.15, iterations=20),
            "isotropic": cls(levels=1500, ode_steps=1, width="prior"),
        }

    def check(self, problem: InverseProblem) -> None:
        super().check(problem)
        if self.conditional == "tweedie":
            check_diffusion_problem(self, problem, linear_only=True)
        else:
            check_data_step(self, problem, gradient=True, nuisance=False)
        check_start(self, problem, self.sigma_max)

    def num_steps(self, problem: InverseProblem) -> int:
        return self.levels

    def schedule(self, problem: InverseProblem) -> list[float]:
        """`levels` noise levels and 0."""
        return noise_levels(self, problem, self.levels)

    def init(self, problem: InverseProblem, rng: Streams) -> dict[str, Tensor]:
        top = self.schedule(problem)[0]
        xi = rng.normal(problem.model_shape, dtype=problem.dtype, tag="level")
        zero = xi.new_zeros(len(xi))
        u = prior_centre(problem, xi, top) + top * xi
        state = {
            "u": u,
            "k": torch.zeros((), dtype=torch.long),
            "stat_residual": zero,
            "stat_unconverged": zero.clone(),
        }
        if not has_exact_step(problem):
            scale = math.sqrt(prior_variance(problem))
            state |= {"log_step": first_step(problem, u - top * xi, {}, scale, rng), "stat_acceptance": zero.clone()}
        return state

    def step(self, problem: InverseProblem, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        now, after = self.schedule(problem)[int(state["k"]) :][:2]
        state = {**state, "k": state["k"] + 1}
        if self.conditional == "tweedie":
            clean, residual = self._tweedie_draw(problem, state["u"], now, rng)
            missed = (residual > _TOLERANCE).to(residual.dtype)
        else:
            clean, residual, missed = self._isotropic_draw(problem, state, now, rng)
        state["stat_residual"] = torch.maximum(state["stat_residual"], residual)
        state["stat_unconverged"] = state["stat_unconverged"] + missed
        if after > 0:
            clean = clean + after * rng.normal(problem.model_shape, dtype=clean.dtype, tag="level")
        return {**state, "u": clean}

    def _isotropic_draw(
        self, problem: InverseProblem, state: dict[str, Tensor], sigma: float, rng: Streams
    ) -> tuple[Tensor, Tensor, Tensor]:
        centre = self._flow(problem, state["u"], sigma)
        s2 = prior_variance(problem)
        r = sigma if self.width == "sigma" else sigma * math.sqrt(s2 / (sigma**2 + s2))
        if "log_step" not in state:
            return likelihood_step(problem, centre, r, rng)
        u = centre
        for _ in range(self.trajectories):
            u, state["log_step"], accepted = metropolis_step(
                problem, u, centre, r, state["log_step"], {}, rng, leaps=self.leaps, gain=0.3
            )
            share = 1 / (self.trajectories * self.levels)
            state["stat_acceptance"] = state["stat_acceptance"] + share * accepted
        return u, torch.zeros_like(accepted), torch.zeros_like(accepted)

    @torch.no_grad()
    def _flow(self, problem: InverseProblem, u: Tensor, sigma: float) -> Tensor:
        """Euler steps of du/dσ = (u − D)/σ from sigma to 0, spaced like EDM's; the last returns D."""
        for now, after in itertools.pairwise([*self._flow_levels(sigma), 0.0]):
            u = torch.lerp(problem.prior.denoise(u, now), u, after / now)
        return u

    def _flow_levels(self, sigma: float) -> list[float]:
        return [sigma * (1 - i / self.ode_steps) ** 7 for i in range(self.ode_steps)]

    def _tweedie_draw(self, problem: InverseProblem, u: Tensor, sigma: float, rng: Streams) -> tuple[Tensor, Tensor]:
        system = problem.linear_gaussian("u")
        A, data, R = system.operator, system.data, system.R_update
        s2 = prior_variance(problem)
        r2 = sigma**2 * s2 / (sigma**2 + s2)
        draw = reverse_draw(problem, u, sigma, rng, steps=self.inner, floor=self.floor)
        white = rng.normal(getattr(system.R, "noise_shape", A.data_shape), dtype=data.dtype, tag="data")
        misfit = data + system.R.sqrt(white) - A(draw)
        with torch.enable_grad():
            leaf = u.detach().requires_grad_(True)
            clean = problem.prior.denoise(leaf, sigma)

        def spread(w: Tensor) -> Tensor:
            """σ² Jᵀ Aᵀ w."""
            (out,) = torch.autograd.grad(clean, leaf, A.adjoint(w), retain_graph=True)
            return sigma**2 * out

        def matrix(v: Tensor) -> Tensor:
            w = A.solve(from_reals(v, misfit), R, r2).x
            return over_reals(R.apply(w) + A(spread(w)))

        solved = gmres(matrix, over_reals(misfit), iterations=self.iterations, rtol=self.rtol)
        return draw + spread(A.solve(from_reals(solved.x, misfit), R, r2).x), solved.residual

    def finish(self, problem: InverseProblem, state: dict[str, Tensor]) -> dict[str, Tensor]:
        tweedie = self.conditional == "tweedie"
        levels = [
            s
            for sigma in self.schedule(problem)[:-1]
            for s in (transition_levels(sigma, self.inner, self.floor) if tweedie else self._flow_levels(sigma))
        ]
        name_bad_level(self, problem, state["u"], levels)
        return {"x": problem.prior.transform(state["u"]), **{k: v for k, v in state.items() if k.startswith("stat_")}}
