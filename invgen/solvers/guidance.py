r"""Guidance: from the denoiser E[u0 | u_σ] to the posterior denoiser E[u0 | u_σ, d].

With u_σ = u0 + σ n and a Gaussian approximation N(D, V) of p(u0 | u_σ), linear physics d = A u0 + N(0, R) gives

    p(d | u_σ) ≈ N(A D, R + A V Aᵀ),
    E[u0 | u_σ, d] = D + σ² ∇ log p(d | u_σ) ≈ D + σ² Jᵀ Aᵀ (R + A V Aᵀ)⁻¹ (d − A D),      J = ∂D/∂u.

The rules differ in V alone. The exact conditional covariance is V = σ² J (Tweedie's second-order formula), used by
`MMPS` and `TMPD`; `PiGDM` replaces it by a multiple of the identity; `DPS` drops it and rescales the step;
`ConvolvedLikelihood` puts p(u0 | u_σ) ≈ N(u_σ, σ²), as if there were no prior. The covariance decides the calibration.

Every rule says what it measured in the exam (docs/exam.md): a correlated 16-d Gaussian with a non-zero mean, eight
data, noise 0.05 / 0.3 / 1; 4000 samples in float64 with the settings of `GuidedDiffusion.exam()`. Mean error is in
posterior standard deviations, sd ratio and coverage of a nominal 90 % interval are averages over coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from invgen.linalg import Solved, gmres, inner
from invgen.problem import InverseProblem
from invgen.schedules import sigma_schedule
from invgen.solvers._inner import accepted, has_exact_step
from invgen.solvers._linearised import Linearised, from_reals, linearised, over_reals, solve_in_data

__all__ = ["DPS", "MMPS", "Guidance", "PiGDM"]


class Guidance(Protocol):
    """A rule that turns a denoiser into a posterior denoiser.

    Attributes:
        linear_only: needs affine operators; the others are checked for `derivative_order` right derivatives.
        derivative_order: derivatives of a non-linear operator that the rule takes.
        tolerance: relative residual above which an inner solve counts as unconverged.

    A rule that also has `conditional`, "tweedie" or "isotropic", takes problems with nuisance parameters: its call
    reads physics and noise at **theta, `(batch,)` each, and `GuidedDiffusion` draws theta through clean fields of that
    conditional covariance (V = σ² J or r² I).
    """

    linear_only: bool
    derivative_order: int

    @property
    def tolerance(self) -> float: ...

    def __call__(
        self, problem: InverseProblem, u: Tensor, sigma: float, gain: float, **theta: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """E[u0 | u_σ = u, d] for a chunk.

        Args:
            problem: the chunk's problem.
            u: `(batch, *shape)`. sigma: noise level.
            gain: weight of the clean estimate in the integrator's step (1 − σ'/σ for Euler), for rules that are
                defined by a step rather than by an estimate.
            theta: nuisance parameters by name, `(batch,)` each; none where the problem has none.

        Returns:
            The posterior denoiser `(batch, *shape)` and the relative residual of inner solves `(batch,)`, None
            where there are none.
        """
        ...


def denoise_with_graph(problem: InverseProblem, u: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """(u, D(u, σ)) with the graph between them, for products with Jᵀ."""
    with torch.enable_grad():
        leaf = u.detach().requires_grad_(True)
        return leaf, problem.prior.denoise(leaf, sigma)


def pull_back(clean: Tensor, leaf: Tensor, cotangent: Tensor, *, keep: bool = False) -> Tensor:
    """Jᵀ w."""
    (out,) = torch.autograd.grad(clean, leaf, cotangent, retain_graph=keep)
    return out


@dataclass(frozen=True)
class DPS:
    """Diffusion posterior sampling (Chung et al. 2023, arXiv:2209.14687, algorithm 1), not calibrated by construction.

    The paper subtracts (ζ/|r|) ∇|r|², r = d − g(D(u)), from each step of a variance-preserving chain; in sigma space,
    with α = 1/√(1 + σ²), that is the shift 2ζ/α² Jᵀ gᵀ r / |r| of u. The norm is one for each sample. For noise that
    is not white the residual is whitened and rescaled by the noise's rms, which changes nothing for R = σ_d² I.

    Args:
        scale: ζ; the paper uses 0.1 to 1, chosen by problem.

    Non-linear operators are allowed; the noise must be Gaussian. Cost: 1 network pass and 1 vector–Jacobian product
    through network and physics.

    Measured (ζ = 0.1, ancestral, 500 levels): mean error 0.39 / 0.42 / 0.68, sd ratio 1.02 / 1.00 / 0.85, coverage
    0.87 / 0.85 / 0.74; stiff directions are far worse than these averages (noise 0.05: 3000 times the variance).
    """

    scale: float = 1.0

    linear_only = False
    derivative_order = 1
    tolerance = math.inf
    conditional = "isotropic"

    def __call__(
        self, problem: InverseProblem, u: Tensor, sigma: float, gain: float, **theta: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        terms = problem.in_u()
        if theta:
            noises = [t.noise.covariance(t.operator.data_shape, **theta) for t in terms]
            level: float | Tensor = (sum(R.mean_variance().to(u) for R in noises) / len(noises)).sqrt()
        else:
            noises = problem.remember("R of terms", lambda: [t.noise.covariance(t.operator.data_shape) for t in terms])
            level = problem.remember(
                "noise rms", lambda: math.sqrt(sum(float(R.mean_variance()) for R in noises) / len(noises))
            )
        leaf, clean = denoise_with_graph(problem, u, sigma)
        # 2ζ/α² · rms, and the steps divide by |r| / rms
        size = 2 * self.scale * (1 + sigma**2) / max(gain, 1e-3) * level
        # the adjoint itself: a graph through an operator costs more than the operator
        if problem.remember("one linear system", lambda: has_exact_step(problem)):
            system = problem.linear_gaussian("u", **theta)
            fit = clean.detach()
            pull, square = system.operator.pull_residual(fit, system.data, system.R)
            return fit + pull_back(clean, leaf, pull * _wide(_step_factor(square, size), fit)), None
        with torch.enable_grad():
            predictions = [t.operator(clean, **accepted(t, theta)) for t in terms]
        residuals = [t.data - p.detach() for t, p in zip(terms, predictions, strict=True)]
        parts = [R.solve(r) for R, r in zip(noises, residuals, strict=True)]
        square = torch.stack([inner(r, w) for r, w in zip(residuals, parts, strict=True)]).sum(0)
        factor = _step_factor(square, size)
        (shift,) = torch.autograd.grad(predictions, leaf, [w * _wide(factor, w) for w in parts])
        return clean.detach() + shift, None


def _step_factor(square: Tensor, size: float | Tensor) -> Tensor:
    # a perfect fit has no direction: the smallest float keeps its step zero instead of NaN
    return size * (square + torch.finfo(square.dtype).tiny).rsqrt()


def _wide(factor: Tensor, like: Tensor) -> Tensor:
    return factor.reshape(-1, *(1,) * (like.ndim - 1))


@dataclass(frozen=True)
class PiGDM:
    """Pseudo-inverse guidance (Song et al. 2023, ICLR, equation 8) with V = r² I.

    r² = σ² s²/(σ² + s²) is the conditional variance of a white prior of variance s² (appendix A.3 with the prior's own
    scale instead of 1). Exact only when Cov[u0 | u_σ] is a multiple of the identity: a correlated prior leaves a bias.

    Args:
        variance: s², the prior's mean variance tr Σ/n in u; taken from the prior when omitted.

    Needs linear-Gaussian terms. Cost: 1 network pass, 1 vector–Jacobian product, one `operator.solve`.

    Measured (SDE, 300 levels): mean error 0.42 / 0.41 / 0.29, sd ratio 1.06 / 1.06 / 1.05, coverage 0.89 / 0.89 / 0.90;
    with 200 levels and ten Langevin steps of 0.2 at each: 0.03 / 0.03 / 0.02, 1.00, 0.90. Where one mode of the prior
    is far wider than s, r² is far too small for it: the Langevin steps then diverge (32 × 32 fields of range 4).
    """

    variance: float | None = None

    linear_only = True
    derivative_order = 1
    tolerance = 1e-3
    conditional = "isotropic"

    def __call__(
        self, problem: InverseProblem, u: Tensor, sigma: float, gain: float, **theta: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        system = problem.linear_gaussian("u", **theta)
        A, data = system.operator, system.data
        leaf, clean = denoise_with_graph(problem, u, sigma)
        s2 = self.variance if self.variance is not None else prior_variance(problem)
        r2 = sigma**2 * s2 / (sigma**2 + s2)
        fit = clean.detach()
        solved = solve_in_data(problem, data - A(fit), r2, **theta)
        return fit + sigma**2 * pull_back(clean, leaf, A.adjoint(solved.x)), solved.residual


@dataclass(frozen=True)
class MMPS:
    """Moment-matching posterior sampling (Rozet et al. 2024, arXiv:2405.13712, equations 16–20) with V = σ² J.

    The system (R + σ² A Jᵀ Aᵀ) v = d − A D is solved by GMRES, because a learned J is not symmetric and a
    vector–Jacobian product gives Jᵀ; the estimate is D + σ² Jᵀ Aᵀ v. Right preconditioning with the ΠGDM covariance
    (R + r² A Aᵀ)⁻¹ through `operator.solve` makes a few iterations enough. Exact for a Gaussian prior, linear physics
    and Gaussian noise, in the limit of small steps and a converged solve: stopping after one iteration is a bias.

    The residual that GMRES minimises, and that `rtol` and the reported figure refer to, is that of the whitened data,
    |R^(−½)(rhs − S v)| / |R^(−½) rhs|, S the matrix of the system: in the units of the data coloured noise would hide
    the precise ones.

    Where noise is next to nothing and J is silent, or is not positive because it was learned, the system is next to
    singular. `damping` δ > 0 takes V = σ² (J + δ I) and preconditions with (R + σ² A Aᵀ)⁻¹, which bounds the
    preconditioned system from about δ to 1 at every level, whatever the prior's modes: GMRES then gains a factor
    (1 − √δ)/(1 + √δ) an iteration. For a Gaussian prior, modes of variance 1e-2 to 1e3 and noise from 1e-3 to 10 of
    it, the mean moves by at most 0.24 posterior sd towards the prior for data one sd off, and the standard deviation
    is at most 1.18 times too large, at δ = 0.02 (0.43 and 1.32 at 0.05).

    Non-linear operators are linearised once a call at the clean estimate, g(u0) ≈ g(D) + G (u0 − D) (Gauss–Newton):
    right to the second order of the width of p(u0 | u_σ), a bias where g bends within it. Their systems are
    preconditioned by R⁻¹ only and want more iterations.

    Args:
        iterations: size of the Krylov space, at the most.
        rtol: stop when every sample reached it; 0 always spends all iterations and never looks.
        precondition: use `operator.solve`; switch off where it is as expensive as the network.
        damping: δ, a few hundredths; 0 is the published rule.

    Raises:
        ValueError: a negative damping.

    Cost: 1 network pass and iterations + 1 vector–Jacobian products, operators and adjoints; for non-linear operators
    1 pass and iterations (products with G) + iterations + 1 (with Gᵀ) derivatives.

    Measured (Heun, 50 levels): mean error 0.02 / 0.02 / 0.02, sd ratio 1.001 / 1.001 / 1.000, coverage 0.90 at all
    three; on 64 × 64 Gaussian fields behind a mask, a blur, a post-stack and a sparse operator at most 0.01 and 0.90.
    """

    iterations: int = 8
    rtol: float = 1e-4
    precondition: bool = True
    damping: float = 0.0

    linear_only = False
    derivative_order = 2
    conditional = "tweedie"

    def __post_init__(self) -> None:
        if not self.damping >= 0:
            raise ValueError(f"MMPS needs damping >= 0, got {self.damping}; 0 is the published rule.")

    @property
    def tolerance(self) -> float:
        """`rtol`, or 1e-3 for runs that always spend all iterations."""
        return self.rtol or 1e-3

    def __call__(
        self, problem: InverseProblem, u: Tensor, sigma: float, gain: float, **theta: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        leaf, clean = denoise_with_graph(problem, u, sigma)
        physics = linearised(problem, clean.detach(), **theta)
        pulled, residual = self.pull(problem, physics, leaf, clean, physics.residual, sigma)
        return clean.detach() + sigma**2 * pulled, residual

    def pull(
        self, problem: InverseProblem, physics: Linearised, leaf: Tensor, clean: Tensor, rhs: Tensor, sigma: float
    ) -> tuple[Tensor, Tensor]:
        """Jᵀ Gᵀ (R + σ² G (Jᵀ + δ) Gᵀ)⁻¹ rhs, and the relative residual of the whitened solve."""
        r2 = sigma**2 if self.damping else conditional_variance(problem, sigma)
        R = physics.R
        # colour undoes whiten only where the noise is drawn from as many numbers as there are data
        square = R.has_solve and tuple(getattr(R, "noise_shape", rhs.shape[1:])) == tuple(rhs.shape[1:])
        colour, whiten = (R.sqrt, R.whiten) if square else (_as_it_is, _as_it_is)

        def ease(v: Tensor) -> Tensor:
            v = colour(v)
            if self.precondition:
                return physics.ease(v, r2)
            return R.solve(v) if square else v  # R^(−½) S R^(−½)ᵀ, the whitened system as it is

        def system(v: Tensor) -> Tensor:
            w = ease(v)
            back = physics.adjoint(w)
            spread = pull_back(clean, leaf, back, keep=True)
            spread = spread + self.damping * back if self.damping else spread
            return whiten(R.apply(w) + sigma**2 * physics.forward(spread))

        solved = _gmres(system, whiten(rhs), self.iterations, self.rtol)
        return pull_back(clean, leaf, physics.adjoint(ease(solved.x))), solved.residual


def _as_it_is(v: Tensor) -> Tensor:
    return v


def _gmres(system: Callable[[Tensor], Tensor], rhs: Tensor, iterations: int, rtol: float) -> Solved:
    # v -> A Jᵀ Re(Aᴴ v) is not linear over the complex numbers
    solved = gmres(lambda v: over_reals(system(from_reals(v, rhs))), over_reals(rhs), iterations=iterations, rtol=rtol)
    return solved._replace(x=from_reals(solved.x, rhs))


def conditional_variance(problem: InverseProblem, sigma: float) -> float:
    """r² = σ² s²/(σ² + s²), the variance of u0 given u_σ under a white prior of the prior's mean variance s²."""
    s2 = prior_variance(problem)
    return sigma**2 * s2 / (sigma**2 + s2)


def prior_variance(problem: InverseProblem) -> float:
    """s² = tr Σ / n of the prior in u: stated by the prior (`sigma_data`, `covariance_u`), else from 256 draws."""
    return problem.remember("prior_variance", lambda: _prior_variance(problem.prior))


def _prior_variance(prior: Any) -> float:
    if hasattr(prior, "sigma_data"):
        return float(prior.sigma_data) ** 2
    if hasattr(prior, "covariance_u"):
        return float(prior.covariance_u.mean_variance().mean())
    draws = prior.transform.inverse(prior.sample(256, seed=0))
    return float(draws.var(0).mean())


def start_level(problem: InverseProblem) -> float:
    """A noise level that swamps the prior's largest mode, 7 √λ_max: stated by the prior (`start_sigma`), else from draws.

    From draws, λ_max of the sample covariance of 512 draws: biased up by sampling noise, which is on the safe side.
    """
    return problem.remember("start_level", lambda: _start_level(problem.prior))


def noise_levels(solver: Any, problem: InverseProblem, count: int) -> list[float]:
    """`count` falling levels and 0, from the solver's `sigma_max` (or `start_level`) to its `sigma_min`, warped by `rho`.

    Host floats, computed once a run.
    """
    return problem.remember(
        ("levels", solver),
        lambda: sigma_schedule(solver.sigma_min, solver.sigma_max or start_level(problem), count, solver.rho),
    )


def _start_level(prior: Any) -> float:
    if hasattr(prior, "start_sigma"):
        return float(prior.start_sigma)
    draws = prior.transform.inverse(prior.sample(512, seed=0)).flatten(1).double()
    draws = draws - draws.mean(0)
    gram = draws @ draws.T if draws.shape[1] > draws.shape[0] else draws.T @ draws
    return 7.0 * float((torch.linalg.eigvalsh(gram)[-1] / draws.shape[0]).sqrt())
