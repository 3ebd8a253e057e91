r"""The primal–dual hybrid gradient method, over-relaxed, with steps that balance its two residuals.

x̃ = prox_{τΦ}(x − τ Σ K_iᴴ y_i)     or     x − τ (∇Φ(x) + Σ K_iᴴ y_i)
ỹ_i = prox_{σ_i f_i*}(y_i + σ_i K_i (2x̃ − x))
(x, y) ← (x, y) + ρ ((x̃, ỹ) − (x, y))
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from invgen.linalg import norm
from invgen.solvers._proximal_terms import BLOCK, Misfit, Splitting, conjugate_prox, norm_squared, parts_of, wide

if TYPE_CHECKING:
    from invgen.problem import InverseProblem

__all__ = ["PrimalDual"]

_FIRST = 20  # iterations before the steps are balanced for the first time; then after twice as many, and so on


@dataclass(frozen=True)
class PrimalDual(Splitting):
    r"""Primal–dual splitting: Chambolle & Pock 2011, algorithm 1, and Condat 2013, algorithm 3.1.

    Targets the minimum of Φ(x) + Σ_i f_i(K_i x), Φ = −log p(d | g(x)) and Σ f_i = −log p(x): the MAP in x, a point. For
    convex Φ and f_i. The regulariser states its parts: total variation is a norm of the gradient, a sum is all of its
    parts, each with a closed proximal operator, so that nothing is iterated inside.

    Args:
        iterations: at the most (looked at every 20). tol: an item stops where both residuals of the optimality
            conditions, in x relative to |Kᴴ y| and in y relative to |K x|, are below `tol`.
        rtol: of the solves in the data term where they are iterated. start: first model `(n, *shape)`; damped least
            squares when omitted.
        data: how Φ enters. "prox" by (Aᴴ R⁻¹ A + 1/τ)⁻¹, `operator.solve_model`; "gradient" by its gradient (Condat–Vũ),
            the cheaper one where that solve is iterated; "auto" by the solve where it is direct.
        tau: τ, from the size of the slopes K x of the start and the weight when omitted.
        relaxation: ρ in [1, 2); 1 is the plain method, which "gradient" always is.
        adaptive: balance τ against σ, item by item and with fixed τσ, after 20, 40, 80, … iterations: τ becomes the geometric
            mean of itself and |Δx|/(‖K‖ |Δy|), the distances travelled since the last time. The best constant τ is that
            ratio of the distances from start to solution (the primal weight of PDLP, Applegate et al. 2021,
            arXiv:2106.04756, section 3.3, without its restarts).

    Raises:
        ValueError: tau beyond the limit 1.9/L of "gradient", which is said.

    Cost an iteration: K and Kᴴ of every part, one prox each, and one solve or gradient of the data term. The dual step is
    σ_i = 0.99/(m τ‖K_i‖²) for m parts. `stats`: objective, change, iterations, converged.
    """

    linear_only: ClassVar[bool] = False

    data: str = "auto"
    tau: float | None = None
    relaxation: float = 1.8
    adaptive: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data not in ("auto", "prox", "gradient"):
            raise ValueError(f"PrimalDual takes data from 'auto', 'prox' and 'gradient', got {self.data!r}.")
        if self.tau is not None and not (self.tau > 0 and math.isfinite(self.tau)):
            raise ValueError(f"The tau of PrimalDual must be positive and finite, got {self.tau}.")
        if not 1 <= self.relaxation < 2:
            raise ValueError(f"The relaxation of PrimalDual lies in [1, 2), got {self.relaxation}.")

    @classmethod
    def examples(cls) -> list[PrimalDual]:
        """Both forms of the data term."""
        return [cls(iterations=45), cls(iterations=40, data="gradient", relaxation=1.0, adaptive=False)]

    def check(self, problem: InverseProblem) -> None:
        super().check(problem)
        if not problem.is_linear_gaussian:
            raise TypeError(
                "PrimalDual needs linear operators with Gaussian noise; use ProximalGradient with backtracking=True for a non-linear g."
            )

    def _by_prox(self, misfit: Misfit) -> bool:
        return self.data == "prox" or (self.data == "auto" and misfit.direct)

    def begin(self, problem: InverseProblem, misfit: Misfit, x: Tensor) -> dict[str, Tensor]:
        parts, n = parts_of(problem.prior), len(x)
        L = misfit.lipschitz().to(x).expand(n)
        # directions with less than a thousandth of the largest gain stay near the start
        guess = (
            misfit.prox(x, 1e3 / L)
            if self._by_prox(misfit)
            else x + (misfit.back / wide(L, x) if self.start is None else 0)
        )
        x = guess if self.start is None else x
        K, f = next(((K, f) for K, f in parts if K is not None), parts[0])
        flow = guess if K is None else K(guess)
        slope = norm(flow) / math.sqrt(math.prod(flow.shape[1:]))
        slope = torch.where((slope > 0) & torch.isfinite(slope), 0.3 * slope, torch.ones_like(slope))
        tau = slope / (float(getattr(f, "weight", 1.0)) * math.sqrt(norm_squared(K, x)))
        if self.tau is not None:
            tau = torch.full_like(tau, self.tau)
        if not self._by_prox(misfit):
            most = float((1.9 / L).min())
            if self.tau is not None and self.tau > most:
                raise ValueError(
                    f"The tau {self.tau:g} of PrimalDual(data='gradient') exceeds its stability limit {most:.4g} = 1.9/L, L = ‖Aᴴ R⁻¹ A‖ by power iteration; leave tau out or give less."
                )
            tau = torch.minimum(tau, 1 / L)
        state = {"x": x, "tau": tau, "due": torch.tensor(_FIRST), "x_then": x}
        for i, (K, _) in enumerate(parts):
            shape = problem.model_shape if K is None else K.data_shape
            state[f"y{i}"] = state[f"y{i}_then"] = x.new_zeros(n, *shape)
        return state

    def _lengths(self, problem: InverseProblem, x: Tensor) -> list[float]:
        return problem.remember(
            ("norms of the parts", x.dtype), lambda: [norm_squared(K, x) for K, _ in parts_of(problem.prior)]
        )

    def iterate(
        self, problem: InverseProblem, misfit: Misfit, state: dict[str, Tensor], last: bool
    ) -> tuple[dict[str, Tensor], Tensor]:
        parts, x, tau = parts_of(problem.prior), state["x"], state["tau"]
        lengths, m = self._lengths(problem, x), len(parts)
        duals = [state[f"y{i}"] for i in range(m)]
        pull = _pull(parts, duals)
        rho = self.relaxation
        room: float | Tensor = 0.99
        if self._by_prox(misfit):
            new = misfit.prox(x - wide(tau, x) * pull, tau)
        else:
            L = misfit.lipschitz().to(x)
            room = (1 - 0.5 * tau * L).clamp(0.02, 0.99)  # 1/τ − σ‖K‖² ≥ L/2, Condat 2013, theorem 3.1
            rho = 1.0
            new = x - wide(tau, x) * (misfit.value_and_gradient(x)[1] + pull)
        ahead = 2 * new - x
        out, moved = dict(state), []
        for i, ((K, f), y, length) in enumerate(zip(parts, duals, lengths, strict=True)):
            sigma = room / (m * tau * max(length, 1e-30))
            fresh = conjugate_prox(f, y + wide(sigma, y) * (ahead if K is None else K(ahead)), sigma)
            if last:
                moved.append((sigma, y, fresh))
            out[f"y{i}"] = torch.lerp(y, fresh, rho)
        out["x"] = torch.lerp(x, new, rho)
        if not last:
            return out, state["change"]
        gap = (x - new) / wide(tau, x) - (pull - _pull(parts, [fresh for _, _, fresh in moved]))
        if not self._by_prox(misfit):
            gap = gap + misfit.value_and_gradient(new)[1] - misfit.value_and_gradient(x)[1]
        primal = norm(gap)
        dual, flows = torch.zeros_like(primal), torch.zeros_like(primal)
        for (K, _), (sigma, y, fresh) in zip(parts, moved, strict=True):
            step, flow = (x - new, new) if K is None else (K(x - new), K(new))
            dual = dual + norm((y - fresh) / wide(sigma, y) - step).square()
            flows = flows + norm(flow).square()
        tiny = torch.finfo(primal.dtype).tiny
        pulled = norm(pull)
        a, b = primal / pulled.clamp_min(tiny), dual.sqrt() / flows.sqrt().clamp_min(tiny)
        change = torch.where(pulled + flows > 0, torch.maximum(a, b), norm(new - x))
        if self.adaptive and int(state["clock"]) + BLOCK >= int(state["due"]):
            out |= self._balanced(misfit, out, math.sqrt(max(m * max(lengths), 1e-30)), m)
        return out, change

    def _balanced(self, misfit: Misfit, state: dict[str, Tensor], length: float, m: int) -> dict[str, Tensor]:
        """Steps in the ratio of the distances travelled since the last time."""
        x, tau = state["x"], state["tau"]
        far = torch.stack([norm(state[f"y{i}"] - state[f"y{i}_then"]).square() for i in range(m)]).sum(0).sqrt()
        ratio = norm(x - state["x_then"]) / (length * far)
        good = torch.isfinite(ratio) & (ratio > 0)
        tau = torch.where(good, (tau * torch.where(good, ratio, tau)).sqrt(), tau)
        if not self._by_prox(misfit):
            tau = torch.minimum(tau, 1 / misfit.lipschitz().to(x))
        then = {f"y{i}_then": state[f"y{i}"] for i in range(m)}
        return {"tau": tau, "due": 2 * state["due"], "x_then": x, **then}


def _pull(parts: list[tuple[Any, Any]], duals: list[Tensor]) -> Tensor:
    """Σ K_iᴴ y_i."""
    pulled = [y if K is None else K.adjoint(y) for (K, _), y in zip(parts, duals, strict=True)]
    return pulled[0] if len(pulled) == 1 else torch.stack(pulled).sum(0)
