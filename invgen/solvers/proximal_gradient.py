r"""Proximal gradient steps with momentum: FISTA, with restarts and backtracking.

x_{k+1} = prox_{s R}(y_k − s ∇Φ(y_k)),      y_{k+1} = x_{k+1} + (t_k − 1)/t_{k+1} (x_{k+1} − x_k),
t_{k+1} = (1 + √(1 + 4 t_k²))/2
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from invgen.linalg import inner
from invgen.solvers._proximal_terms import Misfit, Splitting, relative, wide

if TYPE_CHECKING:
    from invgen.problem import InverseProblem

__all__ = ["ProximalGradient"]

_HALVINGS = 40


@dataclass(frozen=True)
class ProximalGradient(Splitting):
    r"""FISTA: accelerated proximal gradients (Beck & Teboulle 2009, SIAM J. Imaging Sciences 2, equations 4.1–4.3).

    Targets the minimum of Φ(x) + R(x), Φ = −log p(d | g(x)) and R = −log p(x): the MAP in x, a point. For convex R and
    linear g the objective falls like 1/k², and linearly where Φ is strongly convex, thanks to the restarts (O'Donoghue
    & Candès 2015, gradient scheme: the momentum of an item starts again when it points uphill). Without momentum it also
    takes penalties that are not convex and non-linear g, and ends in a stationary point (Attouch, Bolte & Svaiter 2013).

    Args:
        iterations: at the most (looked at every 20). tol: an item stops where |x_{k+1} − y_k| ≤ tol |x_{k+1}|.
        rtol: unused here. start: first model `(n, *shape)`, zero when omitted.
        step_size: s; 1/L with L = ‖Aᴴ R⁻¹ A‖ by power iteration when omitted.
        momentum, restart: as above; `momentum=False` is ISTA.
        backtracking: halve s, item by item, until Φ lies below its quadratic model at the new point (Beck & Teboulle,
            FISTA with backtracking); needed for non-linear g, where `step_size` is the first s (1 when omitted).

    Raises:
        ValueError: a step beyond the stability limit, 1/L with momentum and 2/L without: the limit is said.

    Cost: one gradient (operator and adjoint) and one proximal operator an iteration; a further operator for each trial of
    the backtracking. `stats`: objective, change, iterations, converged.
    """

    linear_only: ClassVar[bool] = False

    step_size: float | None = None
    momentum: bool = True
    restart: bool = True
    backtracking: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step_size is not None and not (self.step_size > 0 and math.isfinite(self.step_size)):
            raise ValueError(f"The step of ProximalGradient must be positive and finite, got {self.step_size}.")

    @classmethod
    def examples(cls) -> list[ProximalGradient]:
        """With and without momentum, and with backtracking."""
        return [
            cls(iterations=45),
            cls(iterations=40, momentum=False),
            cls(iterations=40, backtracking=True, step_size=2.0),
        ]

    def check(self, problem: InverseProblem) -> None:
        super().check(problem)
        if not problem.is_linear_gaussian and not self.backtracking:
            raise TypeError(
                "ProximalGradient knows no step for a non-linear g or noise that is not Gaussian; give backtracking=True."
            )

    @property
    def convex_only(self) -> bool:  # type: ignore[override]
        """Momentum is for convex penalties."""
        return self.momentum

    def begin(self, problem: InverseProblem, misfit: Misfit, x: Tensor) -> dict[str, Tensor]:
        if self.backtracking:
            s = x.new_full((len(x),), self.step_size or 1.0)
            if misfit.linear and self.step_size is None:
                s = (2 / misfit.lipschitz()).to(x).expand(len(x)).clone()
        else:
            limit = (1 / misfit.lipschitz()).to(x).expand(len(x))
            most = float(limit.min()) * (1 if self.momentum else 2)
            if self.step_size is not None and self.step_size > 1.03 * most:
                raise ValueError(
                    f"The step {self.step_size:g} of ProximalGradient exceeds its stability limit {most:.4g} = {1 if self.momentum else 2}/L, L = ‖Aᴴ R⁻¹ A‖ by power iteration; leave step_size out or give less."
                )
            s = limit.clone() if self.step_size is None else torch.full_like(limit, self.step_size)
        state = {"y": x.clone(), "t": x.new_ones(len(x)), "size": s}
        if hasattr(problem.prior, "warm_prox"):
            state["dual"] = problem.prior.warm_prox(x[:1], 0.0)[1].expand(len(x), *problem.prior.gradient.data_shape)
        return state

    def iterate(
        self, problem: InverseProblem, misfit: Misfit, state: dict[str, Tensor], last: bool
    ) -> tuple[dict[str, Tensor], Tensor]:
        x, y, t, s = state["x"], state["y"], state["t"], state["size"]
        value, gradient = misfit.value_and_gradient(y)
        new, dual = _prox(problem.prior, y - wide(s, y) * gradient, s, state.get("dual"))
        if self.backtracking:
            for _ in range(_HALVINGS):
                move = new - y
                model = value + inner(gradient, move) + inner(move, move) / (2 * s)
                slack = 8 * torch.finfo(value.dtype).eps * value.abs()  # differences below rounding mean nothing
                short = ~(misfit.value(new) <= model + slack) & torch.isfinite(value)
                if not bool(short.any()):
                    break
                s = torch.where(short, 0.5 * s, s)
                trial, dual = _prox(problem.prior, y - wide(s, y) * gradient, s, state.get("dual"))
                new = torch.where(wide(short, new), trial, new)
        moved = new - y
        out = {**state, "x": new, "size": s}
        if dual is not None:
            out["dual"] = dual
        if self.momentum:
            after = 0.5 * (1 + (1 + 4 * t.square()).sqrt())
            factor = (t - 1) / after
            if self.restart:
                uphill = inner(-moved, new - x) > 0
                after, factor = torch.where(uphill, 1.0, after), torch.where(uphill, 0.0, factor)
            out |= {"t": after.to(t), "y": new + wide(factor, new) * (new - x)}
        else:
            out["y"] = new
        return out, relative(moved, new) if last else state["change"]


def _prox(prior: Any, v: Tensor, step: Tensor, dual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """prox and, where the prior keeps one between calls, its dual."""
    return prior.warm_prox(v, step, dual) if dual is not None else (prior.prox(v, step), None)
