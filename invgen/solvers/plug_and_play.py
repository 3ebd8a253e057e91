r"""Plug-and-play: a denoiser in the place of a proximal operator, and regularisation by denoising.

With Φ(u) = −log p(d | g(T(u))) and D(u; σ) the denoiser of the prior, in its coordinates u:

    hqs    z = argmin Φ(z) + λ|z − u|²/2σ_k²,              u ← D(z; σ_k),              σ_k falling evenly in log σ
    admm   x = argmin Φ(x) + λ|x − v + p|²/2σ²,            v ← D(x + p; σ),            p ← p + x − v
    pgd    u ← D(u − (σ²/λ) ∇Φ(u); σ)
    RED    x ← argmin Φ(x) + λ|x − D(x; σ)|²/2σ²

A denoiser that is the posterior mean is no proximal operator of −log p: what these iterations end in is stated with each.
Whether they end at all depends on how much the denoiser expands distances, which is measured where they stop.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from invgen.contracts import HasDenoiser, Solver
from invgen.linalg import norm
from invgen.solvers._inner import conditional_mean, has_exact_step
from invgen.solvers._proximal_terms import wide

if TYPE_CHECKING:
    from collections.abc import Mapping

    from invgen.driver import Streams
    from invgen.problem import InverseProblem

__all__ = ["RED", "PlugAndPlay", "expansion"]


def expansion(prior: Any, u: Tensor, sigma: float, iterations: int = 15) -> Tensor:
    """The largest factor by which the denoiser stretches small differences at u: ‖∂D/∂u‖₂, `(batch,)`.

    Power iteration on Jᵀ J, Jᵀ by backpropagation and J by a difference of two denoised fields; an estimate from below.
    At most 1 everywhere and with a symmetric J, D is firmly non-expansive up to relaxation and plug-and-play iterations with
    convex Φ converge (Ryu et al. 2019, arXiv:1905.05406); above 1 nothing is guaranteed.

    Args:
        prior: with `denoise`. u: `(batch, *shape)`. sigma: level. iterations: of the power method.

    Cost: three network passes an iteration.
    """
    count = torch.arange(u[0].numel(), device=u.device).to(u)
    v = (1 + (1.7 * count).cos()).reshape(u.shape[1:]).expand(u.shape)
    size = norm(u - u.flatten(1).mean(1).reshape(-1, *(1,) * (u.ndim - 1))) / math.sqrt(u[0].numel())
    reach = torch.finfo(u.dtype).eps ** (1 / 3) * size.clamp_min(1e-3) * math.sqrt(u[0].numel())
    gain = u.new_zeros(len(u))
    centre = prior.denoise(u, sigma).detach()
    for _ in range(iterations):
        v = v / wide(norm(v).clamp_min(1e-30), v)
        with torch.no_grad():
            pushed = (prior.denoise(u + wide(reach, u) * v, sigma) - centre) / wide(reach, u)
        gain = norm(pushed)
        with torch.enable_grad():
            leaf = u.detach().requires_grad_(True)
            (v,) = torch.autograd.grad((prior.denoise(leaf, sigma) * pushed).sum(), leaf)
    return gain


@dataclass(frozen=True)
class _Denoised(Solver):
    """What both share: linear-Gaussian terms, a start at the prior's mean, the end."""

    needs: ClassVar[tuple[type, ...]] = (HasDenoiser,)
    kind: ClassVar[str] = "point"

    weight: float = 1.0
    iterations: int = 24
    check_expansion: bool = False

    def __post_init__(self) -> None:
        if self.iterations < 1 or not (self.weight > 0 and math.isfinite(self.weight)):
            raise ValueError(
                f"{type(self).__name__} needs iterations >= 1 and a positive, finite weight, got {self.iterations} and {self.weight}."
            )

    def levels(self) -> list[float]:
        """σ of every iteration."""
        raise NotImplementedError

    def check(self, problem: InverseProblem) -> None:
        super().check(problem)
        if problem.nuisance or not has_exact_step(problem):
            raise TypeError(
                f"{type(self).__name__} needs linear operators with Gaussian noise, an affine transform of the prior and nothing else unknown; use DiffPIR or a sampler."
            )

    def num_steps(self, problem: InverseProblem) -> int:
        return self.iterations

    def first(self, problem: InverseProblem, rng: Streams) -> Tensor:
        """The prior's mean: what the denoiser makes of a field under noise that swamps it."""
        like = torch.zeros(1, *problem.model_shape, dtype=problem.dtype, device=rng.device)
        top = float(getattr(problem.prior, "start_sigma", 1e2))
        with torch.no_grad():
            centre = problem.prior.denoise(problem.prior.denoise(like, top), top)
        return centre.expand(len(rng), *problem.model_shape).clone()

    def finish(self, problem: InverseProblem, state: dict[str, Tensor]) -> Mapping[str, Tensor]:
        x = problem.prior.transform(state["u"])
        results = {"x": x, "stat_change": state["change"], "stat_residual": state["residual"]}
        if self.check_expansion:
            sigma = self.levels()[-1]
            gain = expansion(problem.prior, state["u"], sigma)
            results["stat_expansion"] = gain
            if bool((gain > 1.01).any()):
                warnings.warn(
                    f"The denoiser stretches distances by {float(gain.max()):.2f} at sigma {sigma:g} where {type(self).__name__} stopped: its convergence is not guaranteed; use more noise, or a sampler.",
                    stacklevel=2,
                )
        return results


@dataclass(frozen=True)
class PlugAndPlay(_Denoised):
    r"""Plug-and-play restoration: HQS with annealed noise levels (DPIR, Zhang et al. 2021, arXiv:2008.13751, algorithm 1), ADMM
    (Venkatakrishnan et al. 2013; Chan et al. 2017, arXiv:1605.01710) or proximal gradients (Meinhardt et al. 2017).

    Targets a fixed point, with no claim to be an optimum of a posterior. For a Gaussian prior D(u) = m + C(C + σ²)⁻¹(u − m), and
    the fixed points are those of ∇Φ + λ Q (u − m) = 0 with Q = (C + σ²)⁻¹ for "hqs" (at its last level, given iterations
    enough there) and Q = C⁻¹ for "admm" and "pgd", whatever σ: with λ = 1 the posterior mean and mode.

    Args:
        weight: λ. iterations: and network passes. method: "hqs", "admm" or "pgd".
        sigma_first, sigma_last: noise levels in u. "hqs" falls from one to the other, "admm" and "pgd" stay at the last.
        check_expansion: measure ‖∂D/∂u‖ at the end, `stats["expansion"]`, and warn above 1 (45 network passes more).

    Raises:
        ValueError: "pgd" with a step σ²/λ beyond 2/L, L = ‖Aᴴ R⁻¹ A‖: the limit is said.

    Cost an iteration: one network pass without gradients, one solve (or gradient, "pgd"). `stats`: change, residual.
    """

    method: str = "hqs"
    sigma_first: float = 1.0
    sigma_last: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in ("hqs", "admm", "pgd"):
            raise ValueError(f"PlugAndPlay takes method from ('hqs', 'admm', 'pgd'), got {self.method!r}.")
        if not 0 < self.sigma_last <= self.sigma_first < math.inf:
            raise ValueError(
                f"PlugAndPlay needs 0 < sigma_last <= sigma_first, got {self.sigma_last} and {self.sigma_first}."
            )

    @classmethod
    def examples(cls) -> list[PlugAndPlay]:
        return [
            cls(iterations=10),
            cls(method="admm", iterations=10, sigma_last=0.5),
            cls(method="pgd", iterations=10, sigma_last=0.01),
        ]

    def levels(self) -> list[float]:
        if self.method != "hqs" or self.iterations == 1:
            return [self.sigma_last] * self.iterations
        ratio = (self.sigma_last / self.sigma_first) ** (1 / (self.iterations - 1))
        return [self.sigma_first * ratio**k for k in range(self.iterations)]

    def init(self, problem: InverseProblem, rng: Streams) -> dict[str, Tensor]:
        u = self.first(problem, rng)
        zero = u.new_zeros(len(u))
        state = {"u": u, "k": torch.zeros((), dtype=torch.long), "change": zero + math.inf, "residual": zero}
        if self.method == "admm":
            state["p"] = torch.zeros_like(u)
        if self.method == "pgd":
            self._check_step(problem, u)
        return state

    def _check_step(self, problem: InverseProblem, u: Tensor) -> None:
        from invgen.solvers._proximal_terms import power

        system = problem.linear_gaussian("u")
        L = float(power(lambda v: system.operator.adjoint(system.R_update.solve(system.operator(v))), u[:1]).max())
        step = self.sigma_last**2 / self.weight
        if step > 2 / L:
            raise ValueError(
                f"The step sigma_last²/weight = {step:g} of PlugAndPlay(method='pgd') exceeds its stability limit 2/L = {2 / L:.4g}; take sigma_last below {math.sqrt(2 * self.weight / L):.3g}, or 'admm'."
            )

    @torch.no_grad()
    def step(self, problem: InverseProblem, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        sigma, u, residual = self.levels()[int(state["k"])], state["u"], state["residual"]
        width, out = sigma / math.sqrt(self.weight), dict(state)
        if self.method == "pgd":
            system = problem.linear_gaussian("u")
            pull, _ = system.operator.pull_residual(u, system.data, system.R_update)
            new = problem.prior.denoise(u + width**2 * pull, sigma)
        elif self.method == "admm":
            x, residual, _ = conditional_mean(problem, u - state["p"], width)
            new = problem.prior.denoise(x + state["p"], sigma)
            out["p"] = state["p"] + x - new
        else:
            z, residual, _ = conditional_mean(problem, u, width)
            new = problem.prior.denoise(z, sigma)
        change = norm(new - u) / norm(new).clamp_min(torch.finfo(u.dtype).tiny)
        worst = torch.maximum(state["residual"], residual)
        return {**out, "u": new, "k": state["k"] + 1, "change": change, "residual": worst}


@dataclass(frozen=True)
class RED(_Denoised):
    r"""Regularisation by denoising, its fixed-point strategy (Romano, Elad & Milanfar 2017, arXiv:1611.02862, equation 37).

        x ← argmin Φ(x) + λ|x − D(x_k; σ)|²/2σ²,      at its end  ∇Φ(x) + (λ/σ²)(x − D(x; σ)) = 0

    For the posterior-mean denoiser x − D(x; σ) = −σ² ∇ log p_σ(x) (Tweedie; Reehorst & Schniter 2019, arXiv:1806.02296, section IV): with λ = 1
    it targets a stationary point of −log p(d | x) − log p_σ(x), the MAP under the prior blurred by σ. A learned denoiser gives a
    fixed point, whether or not an energy belongs to it.

    Args:
        weight: λ. iterations: and network passes. sigma: σ in u.
        check_expansion: measure ‖∂D/∂u‖ at the end, `stats["expansion"]`, and warn above 1.

    Cost an iteration: one network pass without gradients, one solve. `stats`: change, residual.
    """

    sigma: float = 0.1
    iterations: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.sigma > 0 and math.isfinite(self.sigma)):
            raise ValueError(f"RED needs a positive, finite sigma, got {self.sigma}.")

    @classmethod
    def examples(cls) -> list[RED]:
        return [cls(iterations=12, sigma=0.5)]

    def levels(self) -> list[float]:
        return [self.sigma] * self.iterations

    def init(self, problem: InverseProblem, rng: Streams) -> dict[str, Tensor]:
        u = self.first(problem, rng)
        zero = u.new_zeros(len(u))
        return {"u": u, "change": zero + math.inf, "residual": zero}

    @torch.no_grad()
    def step(self, problem: InverseProblem, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        u = state["u"]
        near = problem.prior.denoise(u, self.sigma)
        new, residual, _ = conditional_mean(problem, near, self.sigma / math.sqrt(self.weight))
        change = norm(new - u) / norm(new).clamp_min(torch.finfo(u.dtype).tiny)
        return {"u": new, "change": change, "residual": torch.maximum(state["residual"], residual)}
