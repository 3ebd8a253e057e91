r"""What the splitting solvers share: the misfit Φ(x) = −log p(d | g(x)) as a function with a gradient and a proximal
operator, the penalty −log p(x) as a sum of simple functions of linear maps, and the loop with its stop.

    x̂ = argmin_x Φ(x) + Σ_i f_i(K_i x)                            (K_i = None is the identity)

Regularisers state their parts (`parts()`); any other prior is one part, −log p with the identity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from invgen.contracts import HasDensity, HasProx, LinearOperator, Solver
from invgen.linalg import norm
from invgen.solvers._inner import has_gradient, term_misfit

if TYPE_CHECKING:
    from invgen.driver import Streams
    from invgen.problem import InverseProblem

__all__: list[str] = []

BLOCK = 20  # iterations between two looks at convergence: one step of the driver
_MARGIN = 1.02  # power iterations end below the norm


class Misfit:
    """Φ of the items of a chunk, in physical coordinates x.

    Args:
        problem: the chunk's. rtol: relative tolerance of iterated solves.

    Attributes:
        linear: Φ = ½ |W(A x − d)|²; otherwise it has a gradient by automatic differentiation and no proximal operator.
        direct: the proximal operator is a closed form.
    """

    def __init__(self, problem: InverseProblem, rtol: float) -> None:
        self.problem, self.rtol = problem, rtol
        self.linear = problem.is_linear_gaussian
        self.limit: Tensor | None = None
        if self.linear:
            system = problem.linear_gaussian("x")
            self.A, self.R, self.data = system.operator, system.R_update, system.data
            self.back = self.A.adjoint(self.R.solve(self.data))
            # not of zeros, which iterations solve at once
            probe = self.A.solve_model(torch.ones_like(self.back), self.R, 1.0, max_iter=1)
            self.direct = probe.iterations == 0

    def value(self, x: Tensor) -> Tensor:
        """Φ(x), `(batch,)`."""
        if self.linear:
            return 0.5 * self.R.whiten(self.data - self.A(x)).abs().square().flatten(1).sum(1)
        parts = [
            term_misfit(self.problem, i, t, t.operator(x), {}) for i, t in enumerate(self.problem.observed_terms())
        ]
        return torch.stack(parts).sum(0)

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Φ `(batch,)` and ∇Φ like x."""
        if self.linear:
            pull, square = self.A.pull_residual(x, self.data, self.R)
            return 0.5 * square, -pull
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            value = self.value(leaf)
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), gradient

    def prox(self, v: Tensor, tau: Tensor) -> Tensor:
        """argmin_x Φ(x) + |x − v|²/2τ; tau `(batch,)`. Iterated solves are for the change of v."""
        if self.direct:
            return self.A.solve_model(self.back + v / wide(tau, v), self.R, tau).x
        pull, _ = self.A.pull_residual(v, self.data, self.R)
        return v + self.A.solve_model(pull, self.R, tau, rtol=self.rtol).x

    def lipschitz(self) -> Tensor:
        """‖Aᴴ R⁻¹ A‖ by power iteration, two per cent above where it ended, `(batch,)`."""
        if self.limit is None:
            # R may differ from item to item: each has a vector of its own
            rows = len(self.data) if self.R.per_item else 1
            like = self.back[:1].expand(rows, *self.back.shape[1:])
            gain = power(lambda v: self.A.adjoint(self.R.solve(self.A(v))), like)
            self.limit = gain.expand(len(self.data)).clamp_min(torch.finfo(gain.dtype).tiny)
        return self.limit


def wide(value: Tensor, like: Tensor) -> Tensor:
    """`(batch,)` as `(batch, 1, …)`."""
    return value.reshape(-1, *(1,) * (like.ndim - 1))


def power(normal: Any, like: Tensor, iterations: int = 60) -> Tensor:
    """Largest eigenvalue of a symmetric positive map, `(batch,)`, two per cent above the estimate."""
    # ones and an incommensurate wave: no structured operator annihilates both
    n = math.prod(like.shape[1:])
    v = (1.0 + torch.arange(n, device=like.device).to(like.real.dtype).mul(1.7).cos()).reshape(like.shape[1:])
    v = v.expand(like.shape).to(like)
    size = like.real.new_ones(len(like))
    for _ in range(iterations):
        v = normal(v / wide(norm(v).clamp_min(torch.finfo(size.dtype).tiny), v))
        size = norm(v)
    return _MARGIN * size


def parts_of(prior: Any) -> list[tuple[LinearOperator | None, Any]]:
    """−log p as pairs (K_i, f_i)."""
    return prior.parts() if hasattr(prior, "parts") else [(None, prior)]


def penalty(prior: Any, x: Tensor) -> Tensor:
    """−log p(x) up to a constant, `(batch,)`; NaN for a prior without a value."""
    if hasattr(prior, "penalty"):
        return prior.penalty(x)
    return -prior.log_prob(x) if isinstance(prior, HasDensity) else x.real.new_full((len(x),), math.nan)


def norm_squared(K: LinearOperator | None, like: Tensor) -> float:
    """‖K‖², exact where the operator knows it, by power iteration elsewhere."""
    if K is None:
        return 1.0
    known = getattr(K, "norm_squared", None)
    return float(known) if known is not None else float(power(lambda v: K.adjoint(K(v)), like[:1])[0])


def conjugate_prox(f: Any, v: Tensor, sigma: Tensor) -> Tensor:
    """prox of σ f* at v, by Moreau's identity v − σ prox_{f/σ}(v/σ); sigma `(batch,)`."""
    if hasattr(f, "conjugate_prox"):
        return f.conjugate_prox(v, sigma)
    s = wide(sigma, v)
    return v - s * f.prox(v / s, 1 / sigma)


@dataclass(frozen=True)
class Splitting(Solver):
    """Base of the splitting solvers: a subclass writes `begin` and `iterate`.

    Args:
        iterations: at the most (looked at every 20). tol: an item stops where one iteration moves it by less than
            `tol`, relative to its norm, in the measure that the subclass states. rtol: of iterated solves with the
            physics. start: first model `(n, *shape)`, used in turn; zero when omitted.
    """

    needs: ClassVar[tuple[type, ...]] = (HasProx,)
    kind: ClassVar[str] = "point"
    linear_only: ClassVar[bool] = True  # the data term enters by its proximal operator
    convex_only: ClassVar[bool] = True

    iterations: int = 1000
    tol: float = 1e-6
    rtol: float = 1e-4
    start: Tensor | None = None

    def __post_init__(self) -> None:
        if self.iterations < 1 or not self.tol >= 0 or not self.rtol > 0:
            raise ValueError(
                f"{type(self).__name__} needs iterations >= 1, tol >= 0 and rtol > 0, got {self.iterations}, {self.tol}, {self.rtol}."
            )

    # --- what a subclass writes ----------------------------------------------------------------------------------------

    def begin(self, problem: InverseProblem, misfit: Misfit, x: Tensor) -> dict[str, Tensor]:
        """The state beside `x`, batch axis first."""
        raise NotImplementedError

    def iterate(
        self, problem: InverseProblem, misfit: Misfit, state: dict[str, Tensor], last: bool
    ) -> tuple[dict[str, Tensor], Tensor]:
        """One iteration: the state after it, and its relative movement `(batch,)` (used where `last`)."""
        raise NotImplementedError

    # --- the loop ------------------------------------------------------------------------------------------------------

    def check(self, problem: InverseProblem) -> None:
        super().check(problem)
        name, prior = type(self).__name__, problem.prior
        if problem.nuisance:
            raise TypeError(
                f"{name} looks for the model alone, but {sorted(problem.nuisance)} are unknown too; fix them, or use a sampler that treats them."
            )
        if not getattr(prior.transform, "affine", False):
            raise TypeError(
                f"{name} works in the coordinates x, where {type(prior).__name__} under {type(prior.transform).__name__} has no proximal operator; give the prior an affine transform and the operator the rest."
            )
        if self.linear_only and not problem.is_linear_gaussian:
            raise TypeError(
                f"{name} needs linear operators with Gaussian noise; use ProximalGradient with backtracking=True for a non-linear g."
            )
        if not self.linear_only and not has_gradient(problem):
            raise TypeError(
                f"{name} needs the gradient of every operator, and one of them is a black box (derivative_order 0)."
            )
        if self.convex_only and not all(getattr(f, "convex", True) for _, f in parts_of(prior)):
            raise TypeError(
                f"{name} needs a convex regulariser and {prior} is not convex; use ProximalGradient(momentum=False), which finds a stationary point."
            )
        if self.start is not None and tuple(self.start.shape[1:]) != problem.model_shape:
            raise ValueError(
                f"The start of {name} has the shape {tuple(self.start.shape)}, it needs (n, {', '.join(map(str, problem.model_shape))})."
            )

    def num_steps(self, problem: InverseProblem) -> int:
        return -(-self.iterations // BLOCK)

    def misfit(self, problem: InverseProblem) -> Misfit:
        """Φ of a chunk, built once."""
        return problem.remember(("misfit", self.rtol), lambda: Misfit(problem, self.rtol), shared=False)

    @torch.no_grad()
    def init(self, problem: InverseProblem, rng: Streams) -> dict[str, Tensor]:
        misfit, n = self.misfit(problem), len(rng)
        if self.start is None:
            x = torch.zeros(n, *problem.model_shape, dtype=problem.dtype, device=rng.device)
        else:
            picks = [s % len(self.start) for _, s in rng.items]
            x = self.start[picks].to(device=rng.device, dtype=problem.dtype)
        return {
            "x": x,
            "change": x.new_full((n,), math.inf),
            "count": torch.zeros(n, dtype=torch.long, device=x.device),
            "clock": torch.zeros((), dtype=torch.long),
            **self.begin(problem, misfit, x),
        }

    @torch.no_grad()
    def step(self, problem: InverseProblem, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        active = ~(state["change"] <= self.tol)
        if not bool(active.any()):
            return state
        misfit, all_active = self.misfit(problem), bool(active.all())
        rounds = min(BLOCK, self.iterations - int(state["clock"]))
        new, change = dict(state), state["change"]
        for k in range(rounds):
            new, change = self.iterate(problem, misfit, new, k == rounds - 1)
        new = {**new, "change": change, "count": state["count"] + rounds}
        if not all_active:  # items that have converged stay as they are, whatever the others need
            new = {k: torch.where(wide(active, v), v, state[k]) if v.ndim else v for k, v in new.items()}
        return {**new, "clock": state["clock"] + rounds}

    def result(self, problem: InverseProblem, state: dict[str, Tensor]) -> Tensor:
        """The model of a state."""
        return state["x"]

    @torch.no_grad()
    def finish(self, problem: InverseProblem, state: dict[str, Tensor]) -> Mapping[str, Tensor]:
        x = self.result(problem, state)
        return {
            "x": x,
            "stat_objective": self.misfit(problem).value(x) + penalty(problem.prior, x),
            "stat_change": state["change"],
            "stat_iterations": state["count"],
            "stat_converged": state["change"] <= self.tol,
        }


def relative(change: Tensor, x: Tensor) -> Tensor:
    """|change|/|x|, `(batch,)`; 0 where nothing moved."""
    return norm(change) / norm(x).clamp_min(torch.finfo(x.real.dtype).tiny)
