r"""RED-diff: a point that fits the data and that a denoiser, at falling noise levels, leaves where it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from invgen.contracts import HasDenoiser, Solver
from invgen.driver import Streams
from invgen.problem import InverseProblem
from invgen.solvers._inner import (
    check_data_step,
    conditional_mean,
    has_exact_step,
    misfit_and_gradient,
    prior_centre,
)
from invgen.solvers.diffusion import check_start, name_bad_level
from invgen.solvers.guidance import noise_levels, prior_variance

__all__ = ["REDDiff"]


@dataclass(frozen=True)
class REDDiff(Solver):
    r"""Regularisation by denoising diffusion (Mardani et al. 2023, arXiv:2305.04391, algorithm 1), in sigma space.

    Variational inference with q(u) = N(μ, 0⁺): stochastic gradients of

        −log p(d | μ) + E_σ,ξ w(σ) |ε̂(μ + σ ξ) − ξ|²,     ε̂ = (u − D)/σ,

    without the network's Jacobian (proposition 2) and with the weights of algorithm 1, λ_σ ∝ σ, so that a step uses

        ∇(−log p(d | μ)) + (weight/s²) (μ − D(μ + σ ξ; σ)),

    σ falling from step to step and s² the prior's variance. The paper's λ is weight · 2σ_d²/s².

    Targets a point, near a mode: with weight = 1 and σ ≫ s the second term is the gradient of −log p for a Gaussian
    prior; at small σ it fades, and μ moves towards the data. Runs differ by their ξ, which says nothing about the
    posterior's spread: `kind` is "point".

    Args:
        steps: gradient steps, one noise level each.
        weight: of the prior; see above.
        rate: step of Adam in units of s (the paper: 0.1, with moments 0.9 and 0.99).
        optimizer: "adam" as the paper, or "solve": the fixed point of the same gradient with D held,
            μ ← argmin −log p(d | x) + weight |x − D|²/2s², exact through `operator.solve`; linear-Gaussian terms only.
        sigma_max: first level; 7 √λ_max of the prior when omitted. sigma_min: last level.
        rho: warping of the schedule (EDM equation 5).

    Cost a sample: `steps` network passes without gradients and as many gradients of the physics, or solves. Needs
    `HasDenoiser`.
    """

    steps: int = 500
    weight: float = 1.0
    rate: float = 0.1
    optimizer: Literal["adam", "solve"] = "adam"
    sigma_max: float | None = None
    sigma_min: float = 0.005
    rho: float = 7.0

    needs: ClassVar[tuple[type, ...]] = (HasDenoiser,)
    kind: ClassVar[str] = "point"

    def __post_init__(self) -> None:
        if self.optimizer not in ("adam", "solve"):
            raise ValueError(f"The optimizer of REDDiff is adam or solve, got {self.optimizer!r}.")
        if self.steps < 2 or not self.weight > 0 or not self.rate > 0:
            raise ValueError(
                f"REDDiff needs steps >= 2, weight > 0 and rate > 0, got {self.steps}, {self.weight}, {self.rate}."
            )

    @classmethod
    def examples(cls) -> list[REDDiff]:
        """Cheap instances for the conformance tests."""
        return [cls(steps=12), cls(steps=12, optimizer="solve")]

    @classmethod
    def exam(cls) -> dict[str, Solver]:
        """The paper's settings."""
        return {"": cls(steps=1000)}

    def check(self, problem: InverseProblem) -> None:
        super().check(problem)
        check_data_step(self, problem, gradient=True, nuisance=False)
        check_start(self, problem, self.sigma_max)
        if self.optimizer == "solve" and not has_exact_step(problem):
            raise TypeError(
                'REDDiff(optimizer="solve") needs linear operators, Gaussian noise and an affine transform; use optimizer="adam".'
            )

    def num_steps(self, problem: InverseProblem) -> int:
        return self.steps

    def schedule(self, problem: InverseProblem) -> list[float]:
        """One noise level a step."""
        return noise_levels(self, problem, self.steps)[:-1]

    def init(self, problem: InverseProblem, rng: Streams) -> dict[str, Tensor]:
        xi = rng.normal(problem.model_shape, dtype=problem.dtype, tag="step")
        zero = xi.new_zeros(len(xi))
        return {
            "u": prior_centre(problem, xi, self.schedule(problem)[0]).clone(),
            "k": torch.zeros((), dtype=torch.long),
            "m1": torch.zeros_like(xi),
            "m2": torch.zeros_like(xi),
            "stat_residual": zero,
            "stat_unconverged": zero.clone(),
        }

    def step(self, problem: InverseProblem, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        k, u = int(state["k"]), state["u"]
        sigma, s2 = self.schedule(problem)[k], prior_variance(problem)
        xi = rng.normal(problem.model_shape, dtype=u.dtype, tag="step")
        with torch.no_grad():
            clean = problem.prior.denoise(u + sigma * xi, sigma)
        state = {**state, "k": state["k"] + 1}
        if self.optimizer == "solve":
            state["u"], residual, missed = conditional_mean(problem, clean, math.sqrt(s2 / self.weight))
            state["stat_residual"] = torch.maximum(state["stat_residual"], residual)
            state["stat_unconverged"] = state["stat_unconverged"] + missed
            return state
        gradient = misfit_and_gradient(problem, u, {})[1] + (self.weight / s2) * (u - clean)
        state["m1"] = 0.9 * state["m1"] + 0.1 * gradient
        state["m2"] = 0.99 * state["m2"] + 0.01 * gradient.square()
        size = (state["m1"] / (1 - 0.9 ** (k + 1))) / (
            (state["m2"] / (1 - 0.99 ** (k + 1))).sqrt() + torch.finfo(u.dtype).eps
        )
        state["u"] = u - self.rate * math.sqrt(s2) * size
        return state

    def finish(self, problem: InverseProblem, state: dict[str, Tensor]) -> dict[str, Tensor]:
        name_bad_level(self, problem, state["u"], self.schedule(problem))
        return {"x": problem.prior.transform(state["u"]), **{k: v for k, v in state.items() if k.startswith("stat_")}}
