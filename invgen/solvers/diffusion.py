"""Guided diffusion: a posterior denoiser (guidance) moved from noise to data by an integrator; the two are orthogonal.

All integrators work in sigma space (variance exploding, du/dσ = (u − D)/σ) on a schedule of host floats.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from invgen.contracts import HasDenoiser, Solver
from invgen.driver import DivergenceError, Streams
from invgen.problem import InverseProblem
from invgen.solvers._clean_field import check_clean_field, settle_clean_field, start_clean_field, sweep_clean_field
from invgen.solvers._compiled import check_compiler, network_compiled
from invgen.solvers._nuisance import nuisance_values
from invgen.solvers.convolved import ConvolvedLikelihood
from invgen.solvers.guidance import DPS, MMPS, Guidance, PiGDM, noise_levels, start_level
from invgen.solvers.tmpd import TMPD

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
    step (Song et al. 2021, algorithm 4, with a fixed ratio). Every rule but `DPS` becomes right as σ → 0, and a direction
    of posterior sd s follows until about σ = s/√(correction_step · corrections · levels an e-fold of σ): five of 0.1 a
    level divide a guidance's bias by two to four, ten of 0.2 all but remove ΠGDM's. They add a bias of order
    correction_step/2 in the variance where the posterior is as wide as the noise, and diverge with a rule whose
    covariance is far too small somewhere.

    The start is u = m + σ_max ξ with m the posterior denoiser at the prior's mean D(D(0, σ_max), σ_max), so that no trace
    of a prior mean is left.

    With nuisance parameters theta (`InverseProblem.nuisance`: a named noise level; parameters of operators with `MMPS`
    and `DPS`) the target is p(x, theta | d). Guidance runs at the theta of every item, and `sweeps` Gibbs sweeps at
    every level draw a clean field u0 ~ p(u0 | u_σ, d, theta), in the covariance that the rule implies, and theta given
    u0 by Metropolis steps (`_clean_field` derives both); at the end theta is drawn given the finished sample. The
    sweeps add no bias of their own where the rule is exact; otherwise theta inherits the rule's, and a rule that
    overfits takes the noise for smaller than it is. Draws are in `posterior.theta`.

    Measured with 12 correlated unknowns, 8 data and a log-normal prior of the noise level, 4000 samples (2000 for the
    last three) against the exact evidence: error of the mean and sd ratio of log theta, then of x, in posterior sd:
    MMPS and exact TMPD (Heun, 50 levels) 0.00, 0.99, 0.01, 1.00; MMPS (Euler, 100) −0.08, 1.01, 0.00, 0.98; PiGDM (SDE,
    300) +0.22, 0.99, 0.13, 1.05, with 200 levels and ten Langevin steps of 0.2 each +0.04, 0.99, 0.01, 1.01;
    ConvolvedLikelihood with twenty such steps +0.05, 1.01, 0.05, 1.02; row-sum TMPD (SDE, 300) +0.43, 0.90, 0.42, 1.13;
    DPS (ζ = 0.1) −2.0, 0.68, 0.37, 0.64.

    Args:
        guidance: a rule: `MMPS`, `TMPD`, `PiGDM`, `ConvolvedLikelihood`, `DPS`.
        integrator: see above.
        steps: noise levels.
        sigma_max: first level; 7 √λ_max of the prior when omitted. sigma_min: last level before 0.
        rho: warping of the schedule (EDM equation 5).
        corrections: Langevin steps a level. correction_step: ε/σ².
        compile: run the prior's network through `torch.compile`, with its vector–Jacobian products; worth its minute or
            so where the network is large and the steps are many. Needs a prior with a `network`.
        sweeps: Gibbs sweeps a level, with nuisance parameters: one made theta exact in 50 levels, two changed nothing.
        settle: Metropolis passes over theta given the finished sample, four proposals a parameter each.

    Returns with the samples: `residual`, the largest relative residual of an inner solve, and `unconverged`, how many
    inner solves of a sample missed the rule's tolerance.

    Raises:
        TypeError: a problem that the rule cannot treat.
        DivergenceError: a denoiser that is not finite at a noise level, which is named.

    Cost a sample: steps · (calls of the integrator + corrections) + 1 guidance calls and one network pass. A sweep
    costs one more guidance call and 8 to 16 network passes without gradients (the more, the wider σ) with `MMPS` and exact
    `TMPD`, one pass and one solve with the other rules. Needs `HasDenoiser`, an affine transform, Gaussian noise; linear operators except for
    `DPS` and `MMPS`; for nuisance parameters priors with a density.
    """

    guidance: Guidance = field(default_factory=MMPS)
    integrator: Literal["euler", "heun", "ancestral", "sde"] = "heun"
    steps: int = 50
    sigma_max: float | None = None
    sigma_min: float = 0.005
    rho: float = 7.0
    corrections: int = 0
    correction_step: float = 0.1
    compile: bool = False
    sweeps: int = 1
    settle: int = 5

    needs: ClassVar[tuple[type, ...]] = (HasDenoiser,)
    kind: ClassVar[str] = "approximate"

    def __post_init__(self) -> None:
        if self.integrator not in ("euler", "heun", "ancestral", "sde"):
            raise ValueError(f"The integrator must be euler, heun, ancestral or sde, got {self.integrator!r}.")
        if self.steps < 2 or self.corrections < 0 or not 0 < self.correction_step < 2:
            raise ValueError(
                f"GuidedDiffusion needs steps >= 2, corrections >= 0 and 0 < correction_step < 2, got {self.steps}, {self.corrections}, {self.correction_step}."
            )
        if self.sweeps < 0 or self.settle < 0:
            raise ValueError(f"GuidedDiffusion needs sweeps >= 0 and settle >= 0, got {self.sweeps}, {self.settle}.")

    @classmethod
    def examples(cls) -> list[GuidedDiffusion]:
        """Cheap instances for the conformance tests."""
        return [
            cls(MMPS(), "heun", steps=12),
            cls(PiGDM(), "sde", steps=12, corrections=1),
            cls(DPS(0.3), "ancestral", steps=12),
            cls(MMPS(), "euler", steps=12),
            cls(TMPD("exact"), "ancestral", steps=12),
            cls(TMPD("row-sum"), "sde", steps=12),
            cls(ConvolvedLikelihood("full"), "sde", steps=12),
            cls(ConvolvedLikelihood("diagonal"), "ancestral", steps=12),
        ]

    @classmethod
    def exam(cls) -> dict[str, GuidedDiffusion]:
        """Every rule with the integrator that suits it, one setting for all problems: label -> solver."""
        return {
            "mmps": cls(MMPS(iterations=16, rtol=1e-3), "heun", steps=50, sigma_min=0.002),
            "tmpd": cls(TMPD("exact"), "heun", steps=50, sigma_min=0.002),
            "tmpd-row-sum": cls(TMPD("row-sum"), "sde", steps=300, sigma_min=0.002),
            "pigdm": cls(PiGDM(), "sde", steps=300, sigma_min=0.002),
            "pigdm+langevin": cls(PiGDM(), "sde", 200, sigma_min=0.002, corrections=10, correction_step=0.2),
            "convolved": cls(ConvolvedLikelihood("full"), "sde", steps=300, sigma_min=0.002),
            "convolved-diagonal": cls(ConvolvedLikelihood("diagonal"), "sde", steps=300, sigma_min=0.002),
            "convolved+langevin": cls(
                ConvolvedLikelihood("full"), "sde", 200, sigma_min=0.002, corrections=20, correction_step=0.2
            ),
            "dps": cls(DPS(0.1), "ancestral", steps=500, sigma_min=0.002),
        }

    def check(self, problem: InverseProblem) -> None:
        super().check(problem)
        rule = self.guidance
        check_diffusion_problem(
            self,
            problem,
            linear_only=rule.linear_only,
            derivative_order=getattr(rule, "derivative_order", 1),
            nuisance=True,
        )
        check_clean_field(self, problem, rule)
        if hasattr(rule, "check"):
            rule.check(problem)
        check_start(self, problem, self.sigma_max)
        if self.compile:
            check_compiler(problem, self)

    def num_steps(self, problem: InverseProblem) -> int:
        return self.steps

    def levels(self, problem: InverseProblem) -> list[float]:
        """The schedule: `steps` levels and 0."""
        return noise_levels(self, problem, self.steps)

    def init(self, problem: InverseProblem, rng: Streams) -> dict[str, Tensor]:
        top = self.levels(problem)[0]
        xi = rng.normal(problem.model_shape, dtype=problem.dtype, tag="step")
        mean = prior_mean(problem, xi, top)  # a batch of one, which is not worth a compilation of its own
        unknown = start_clean_field(problem, self.guidance, mean, rng)
        theta = nuisance_values(problem, unknown.get("nuisance"))
        with network_compiled(problem, self.compile):
            centre, residual = self.guidance(problem, mean, top, 1.0, **theta)
        residual = xi.new_zeros(len(xi)) if residual is None else residual
        return {
            **unknown,
            "u": centre + top * xi,
            "k": torch.zeros((), dtype=torch.long),
            "stat_residual": residual,
            "stat_unconverged": (residual > self._tolerance).to(xi.dtype),
        }

    @property
    def _tolerance(self) -> float:
        return getattr(self.guidance, "tolerance", 1e-3)

    def step(self, problem: InverseProblem, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        k = int(state["k"])
        now, after = self.levels(problem)[k : k + 2]
        u, worst, missed = state["u"], state["stat_residual"], state["stat_unconverged"]
        theta = nuisance_values(problem, state.get("nuisance"))

        def count(residual: Tensor | None) -> None:
            nonlocal worst, missed
            if residual is not None:
                worst, missed = torch.maximum(worst, residual), missed + (residual > self._tolerance)

        def denoise(v: Tensor, sigma: float, gain: float) -> Tensor:
            clean, residual = self.guidance(problem, v, sigma, gain, **theta)
            count(residual)
            return clean

        def noise() -> Tensor:
            return rng.normal(problem.model_shape, dtype=u.dtype, tag="step")

        with network_compiled(problem, self.compile):
            u = advance(self.integrator, denoise, u, now, after, noise)
            if after > 0:
                for _ in range(self.corrections):
                    step = self.correction_step
                    clean = denoise(u, after, step)
                    u = u + step * (clean - u) + math.sqrt(2 * step) * after * noise()
                for _ in range(self.sweeps if theta else 0):
                    moved, residual = sweep_clean_field(problem, self.guidance, u, after, state, rng)
                    state = {**state, **moved}
                    count(residual)
            elif theta:
                state = {**state, **settle_clean_field(problem, u, state, rng, self.settle)}
        return {**state, "u": u, "k": state["k"] + 1, "stat_residual": worst, "stat_unconverged": missed}

    def finish(self, problem: InverseProblem, state: dict[str, Tensor]) -> dict[str, Tensor]:
        name_bad_level(self, problem, state["u"], self.levels(problem))
        theta = nuisance_values(problem, state.get("nuisance"))
        return {
            "x": problem.prior.transform(state["u"]),
            **{f"theta_{name}": value for name, value in theta.items()},
            **{k: v for k, v in state.items() if k.startswith("stat_")},
        }


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
        return torch.lerp(clean, u, keep).add_(noise(), alpha=spread)
    clean = denoise(u, now, 1 - ratio)
    ahead = torch.lerp(clean, u, ratio)
    if integrator == "heun":
        slope = 0.5 * ((u - clean) / now + (ahead - denoise(ahead, after, 1 - ratio)) / after)
        ahead = u + (after - now) * slope
    return ahead


@torch.no_grad()
def prior_mean(problem: InverseProblem, like: Tensor, sigma: float) -> Tensor:
    """The prior's mean as the denoiser knows it, shaped like `like`: D(D(0)) where the noise swamps everything.

    D(0) alone keeps the part λ/(λ + σ²) of the mean too little, 2 % at σ = 7 √λ: visible where a mean is many sd from 0.
    """
    first = problem.prior.denoise(torch.zeros_like(like[:1]), sigma)
    return problem.prior.denoise(first, sigma).expand_as(like).contiguous()


@torch.no_grad()
def name_bad_level(solver: Solver, problem: InverseProblem, u: Tensor, levels: list[float]) -> None:
    """Where samples are not finite, look for the noise level at which the denoiser itself is not, and name it.

    Args:
        u: `(batch, *shape)` final state. levels: the schedule.

    Raises:
        DivergenceError: there is one and no sample of the chunk is finite; with finite samples left it is a warning.

    Cost: one device synchronisation a chunk; after a failure one network pass a level.
    """
    finite = torch.isfinite(u).flatten(1).all(1)
    if bool(finite.all()):
        return
    mean = torch.zeros_like(u[:1])
    for sigma in levels:
        if sigma > 0 and not bool(torch.isfinite(problem.prior.denoise(mean, sigma)).all()):
            text = f"The denoiser of {type(problem.prior).__name__} returns NaN or infinite values at sigma = {sigma:.4g}, a level of this run of {type(solver).__name__}; check the network there, or choose levels that avoid it."
            if not bool(finite.any()):
                raise DivergenceError(text)
            warnings.warn(text, stacklevel=2)
            return


def check_start(solver: Solver, problem: InverseProblem, sigma_max: float | None) -> None:
    """Warn where a stated first level does not swamp the prior's largest mode."""
    if sigma_max is None or sigma_max >= 0.99 * (needed := start_level(problem)):
        return
    kept = sigma_max / math.hypot(sigma_max, needed / 7)
    warnings.warn(
        f"{type(solver).__name__} starts at sigma_max = {sigma_max:.3g}, below start_level = {needed:.3g} (seven standard deviations of the prior's largest mode): where the data are silent that mode keeps about {kept:.0%} of its spread; leave sigma_max out or raise it.",
        stacklevel=4,
    )


def check_diffusion_problem(
    solver: Solver,
    problem: InverseProblem,
    *,
    linear_only: bool,
    derivative_order: int = 1,
    nuisance: bool = False,
) -> None:
    """Raise a TypeError for what guided and split samplers cannot treat.

    Args:
        linear_only: affine operators with Gaussian noise only.
        derivative_order: derivatives that are taken of operators, where they need not be linear.
        nuisance: whether the solver draws nuisance parameters.
    """
    name = type(solver).__name__
    if not getattr(problem.prior.transform, "affine", False):
        raise TypeError(
            f"{name} works in the prior's coordinates and needs an affine transform, this prior has {type(problem.prior.transform).__name__}; move the non-linear part into the operator with @."
        )
    if problem.nuisance and not nuisance:
        raise TypeError(
            f"{name} does not sample nuisance parameters ({', '.join(problem.nuisance)}); fix them, or use GuidedDiffusion or a split sampler that updates them in turn with the model (PnPDM), or a latent sampler."
        )
    rule = f"{name} with {type(solver.guidance).__name__}" if hasattr(solver, "guidance") else name
    kinds = ", ".join(f"{type(t.operator).__name__} with {type(t.noise).__name__}" for t in problem.terms)
    if linear_only and not problem.is_linear_gaussian:
        raise TypeError(
            f"{rule} needs linear operators with Gaussian noise, got {kinds}; GuidedDiffusion with DPS or MMPS takes non-linear operators, and so do the split samplers with a gradient step."
        )
    moving = [n for n in problem.nuisance if any(n in t.operator.theta_names for t in problem.terms)]
    if linear_only and moving:
        raise TypeError(
            f"{rule} needs one linear system for all samples, and the operators depend on the nuisance parameters {', '.join(moving)}; GuidedDiffusion with DPS or MMPS draws parameters of operators, and so does PnPDM."
        )
    if not all(hasattr(t.noise, "covariance") for t in problem.terms):
        raise TypeError(f"{name} needs Gaussian noise, got {', '.join(type(t.noise).__name__ for t in problem.terms)}.")
    least = min(t.operator.derivative_order for t in problem.terms)
    # second derivatives stand for products with ∂g/∂u, which affine operators have as such
    free = linear_only or (derivative_order == 2 and problem.is_linear_gaussian and not moving)
    if not free and least < derivative_order:
        wanted = "second derivatives" if derivative_order == 2 else "the gradient"
        raise TypeError(
            f"{rule} needs {wanted} of every operator, and one of them has derivative_order {least} ({kinds}); DPS takes order 1, and a black box (0) needs a solver without gradients."
        )
