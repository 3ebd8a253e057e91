r"""The alternating direction method of multipliers, plain and linearised, and half-quadratic splitting.

min Φ(x) + R(z)  subject to  x = z:
x ← argmin Φ(x) + (ρ/2)|x − z + u|²,     z ← prox_{R/ρ}(x̂ + u),     u ← u + x̂ − z,     x̂ = αx + (1 − α)z
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from invgen.contracts import LinearOperator
from invgen.linalg import norm
from invgen.solvers._proximal_terms import Misfit, Splitting, norm_squared, parts_of, relative, wide

if TYPE_CHECKING:
    from invgen.problem import InverseProblem

__all__ = ["ADMM", "DouglasRachford", "HalfQuadraticSplitting", "LinearizedADMM"]


def _first_rho(misfit: Misfit, x: Tensor) -> Tensor:
    """√(largest · thousandth of the largest) eigenvalue of Aᴴ R⁻¹ A: the middle of what the data see, `(batch,)`."""
    return misfit.lipschitz().to(x).expand(len(x)) * 1e-3**0.5


def _positive(value: float | None, what: str) -> None:
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{what} must be positive and finite, got {value}.")


@dataclass(frozen=True)
class ADMM(Splitting):
    r"""The alternating direction method of multipliers (Boyd et al. 2011, Foundations and Trends 3, section 3).

    Targets the minimum of Φ(x) + R(x): the MAP in x, a point, for convex R. Where R = f(K x) and K has a direct normal
    solve (total variation: cosine transforms), both terms are split, x = v and K x = z, so that every step is a closed
    form (Figueiredo & Bioucas-Dias 2010, IEEE Trans. Image Processing 19, PIDAL, equations 22–25); elsewhere x = z and
    the proximal operator of R itself is used.

    Args:
        iterations: at the most (looked at every 20). tol: an item stops where both |x − z| and ρ|Δz| are below `tol`,
            relative to |x| and ρ|u|. rtol: of the solves in the data term where they are iterated.
        start: first model `(n, *shape)`; zero when omitted.
        rho: ρ; from the gain of the operator when omitted, and adapted.
        relaxation: α in [1, 2). adaptive: double or halve ρ every 20 iterations where one residual is ten times the other
            (section 3.4.1), ten times at the most so that the method converges.

    Cost an iteration: one solve with the data term, one proximal operator of R (or, split, K, Kᴴ and one normal solve).
    `stats`: objective, change, iterations, converged.
    """

    rho: float | None = None
    relaxation: float = 1.6
    adaptive: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self.rho, f"The rho of {type(self).__name__}")
        if not 1 <= self.relaxation < 2:
            raise ValueError(f"The relaxation of {type(self).__name__} lies in [1, 2), got {self.relaxation}.")

    @classmethod
    def examples(cls) -> list[ADMM]:
        return [cls(iterations=45), cls(iterations=20, relaxation=1.0, adaptive=False, rho=0.5)]

    def begin(self, problem: InverseProblem, misfit: Misfit, x: Tensor) -> dict[str, Tensor]:
        rho = _first_rho(misfit, x) if self.rho is None else x.new_full((len(x),), self.rho)
        state = {"z": x.clone(), "u": torch.zeros_like(x), "rho": rho, "turns": torch.zeros_like(rho)}
        K = _splittable(problem)
        if K is not None:
            state |= {"w": K(x), "p": x.new_zeros(len(x), *K.data_shape), "ratio": self._ratio(problem, misfit, x)}
        return state

    def _ratio(self, problem: InverseProblem, misfit: Misfit, x: Tensor) -> Tensor:
        """Penalty of K x = w over that of x = z: it weighs slopes of the size that the start has."""
        K, f = parts_of(problem.prior)[0]
        assert K is not None
        guess = misfit.prox(torch.zeros_like(x), 1e3 / misfit.lipschitz().to(x).expand(len(x)))
        slope = 0.3 * norm(K(guess)) / math.sqrt(math.prod(K.data_shape))
        slope = torch.where((slope > 0) & torch.isfinite(slope), slope, torch.ones_like(slope))
        return float(getattr(f, "weight", 1.0)) / slope / _first_rho(misfit, x)

    def iterate(
        self, problem: InverseProblem, misfit: Misfit, state: dict[str, Tensor], last: bool
    ) -> tuple[dict[str, Tensor], Tensor]:
        K = _splittable(problem)
        if K is not None:
            return self._split(problem, misfit, state, last)
        z, u, rho = state["z"], state["u"], state["rho"]
        x = misfit.prox(z - u, 1 / rho)
        ahead = torch.lerp(z, x, self.relaxation)
        new = problem.prior.prox(ahead + u, 1 / rho)
        out = {**state, "x": new, "z": new, "u": u + ahead - new}
        if not last:
            return out, state["change"]
        tiny = torch.finfo(rho.dtype).tiny
        a = norm(x - new) / torch.maximum(norm(x), norm(new)).clamp_min(tiny)
        b = norm(new - z) / norm(out["u"]).clamp_min(tiny)
        return self._adapted(out, a, b, ("u",)), torch.where(norm(x) + norm(u) > 0, torch.maximum(a, b), a)

    def _split(
        self, problem: InverseProblem, misfit: Misfit, state: dict[str, Tensor], last: bool
    ) -> tuple[dict[str, Tensor], Tensor]:
        """x = z with multiplier u, K x = w with multiplier p."""
        (K, f), rho, ratio = parts_of(problem.prior)[0], state["rho"], state["ratio"]
        assert K is not None
        z, u, w, p = (state[k] for k in "zuwp")
        both = wide(ratio, z)
        x = K.solve_normal(z - u + both * K.adjoint(w - p), 1.0, both)  # type: ignore[operator]
        flow = K(x)
        ahead, steep = torch.lerp(z, x, self.relaxation), torch.lerp(w, flow, self.relaxation)
        new, bent = misfit.prox(ahead + u, 1 / rho), f.prox(steep + p, 1 / (rho * ratio))
        out = {**state, "x": new, "z": new, "u": u + ahead - new, "w": bent, "p": p + steep - bent}
        if not last:
            return out, state["change"]
        tiny = torch.finfo(rho.dtype).tiny
        a = torch.maximum(norm(x - new) / norm(new).clamp_min(tiny), norm(flow - bent) / norm(flow).clamp_min(tiny))
        b = torch.maximum(
            norm(new - z) / norm(out["u"]).clamp_min(tiny), norm(bent - w) / norm(out["p"]).clamp_min(tiny)
        )
        return self._adapted(out, a, b, ("u", "p")), torch.where(norm(x) > 0, torch.maximum(a, b), a)

    def _adapted(
        self, state: dict[str, Tensor], primal: Tensor, dual: Tensor, scaled: tuple[str, ...]
    ) -> dict[str, Tensor]:
        if not self.adaptive:
            return state
        can = state["turns"] < 10
        factor = torch.where(can & (primal > 10 * dual), 2.0, torch.where(can & (dual > 10 * primal), 0.5, 1.0)).to(
            primal
        )
        out = {**state, "rho": state["rho"] * factor, "turns": state["turns"] + (factor != 1).to(factor)}
        for name in scaled:  # multipliers over ρ: they change with it
            out[name] = state[name] / wide(factor, state[name])
        return out


def _splittable(problem: InverseProblem) -> LinearOperator | None:
    """K where the penalty is one f(K x) with a direct normal solve."""
    parts = parts_of(problem.prior)
    K = parts[0][0]
    return K if len(parts) == 1 and K is not None and hasattr(K, "solve_normal") else None


@dataclass(frozen=True)
class LinearizedADMM(Splitting):
    r"""ADMM for f(K x) without a solve in K: the quadratic in x is replaced by its linear bound.

        x ← prox_{μΦ}(x − (μ/λ) Kᴴ (K x − z + u)),     z ← prox_{λf}(K x + u),     u ← u + K x − z,     0 < μ ≤ λ/‖K‖²

    (Parikh & Boyd 2014, section 4.4.2.) Targets the minimum of Φ(x) + f(K x): the MAP in x, a point, for convex f; one part,
    with K the identity where the regulariser has none.

    Args:
        iterations: at the most (looked at every 20). tol: an item stops where |K x − z| and |KᴴΔz| are below `tol`,
            relative to |K x| and |Kᴴ u|. rtol: of iterated solves. start: first model, zero when omitted.
        mu: μ; from the weight and the slopes of a damped least-squares model when omitted. λ = μ‖K‖².

    Raises:
        TypeError: a sum of regularisers. Cost: one solve with the data term, two K, one Kᴴ, one proximal operator.
    """

    mu: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self.mu, "The mu of LinearizedADMM")

    @classmethod
    def examples(cls) -> list[LinearizedADMM]:
        return [cls(iterations=45)]

    def check(self, problem: InverseProblem) -> None:
        super().check(problem)
        if len(parts_of(problem.prior)) != 1:
            raise TypeError("LinearizedADMM takes one regulariser, not a sum; use PrimalDual.")

    def begin(self, problem: InverseProblem, misfit: Misfit, x: Tensor) -> dict[str, Tensor]:
        K, f = parts_of(problem.prior)[0]
        guess = misfit.prox(torch.zeros_like(x), 1e3 / misfit.lipschitz().to(x).expand(len(x)))
        flow = guess if K is None else K(guess)
        slope = 0.3 * norm(flow) / math.sqrt(math.prod(flow.shape[1:]))
        slope = torch.where((slope > 0) & torch.isfinite(slope), slope, torch.ones_like(slope))
        mu = slope / (float(getattr(f, "weight", 1.0)) * math.sqrt(norm_squared(K, x)))
        if self.mu is not None:
            mu = torch.full_like(mu, self.mu)
        z = x.clone() if K is None else K(x)
        return {"z": z, "u": torch.zeros_like(z), "mu": mu}

    def iterate(
        self, problem: InverseProblem, misfit: Misfit, state: dict[str, Tensor], last: bool
    ) -> tuple[dict[str, Tensor], Tensor]:
        K, f = parts_of(problem.prior)[0]
        x, z, u, mu = state["x"], state["z"], state["u"], state["mu"]
        length = problem.remember(("norm of K", x.dtype), lambda: norm_squared(K, x))
        apart = (x if K is None else K(x)) - z + u
        new = misfit.prox(x - (apart if K is None else K.adjoint(apart)) / (1.01 * length), mu)
        flow = new if K is None else K(new)
        bent = f.prox(flow + u, mu * (1.01 * length))
        out = {**state, "x": new, "z": bent, "u": u + flow - bent}
        if not last:
            return out, state["change"]
        tiny = torch.finfo(mu.dtype).tiny
        back = (lambda v: v) if K is None else K.adjoint
        a = norm(flow - bent) / norm(flow).clamp_min(tiny)
        b = norm(back(bent - z)) / norm(back(out["u"])).clamp_min(tiny)
        return out, torch.where(norm(flow) > 0, torch.maximum(a, b), relative(new - x, new))


@dataclass(frozen=True)
class DouglasRachford(Splitting):
    r"""Douglas–Rachford splitting (Combettes & Pesquet 2011, algorithm 10.15).

        x = prox_{γΦ}(y),     z = prox_{γR}(2x − y),     y ← y + α (z − x)

    Targets the minimum of Φ(x) + R(x): the MAP in x, a point, for convex R.

    Args:
        iterations: at the most (looked at every 20). tol: an item stops where |z − x| ≤ tol |x|.
        rtol: of iterated solves. start: first y `(n, *shape)`, zero when omitted.
        gamma: γ; from the gain of the operator when omitted. relaxation: α in (0, 2).

    Cost an iteration: one solve with the data term and one proximal operator. The result is z, which obeys bounds.
    """

    gamma: float | None = None
    relaxation: float = 1.6

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self.gamma, "The gamma of DouglasRachford")
        if not 0 < self.relaxation < 2:
            raise ValueError(f"The relaxation of DouglasRachford lies in (0, 2), got {self.relaxation}.")

    @classmethod
    def examples(cls) -> list[DouglasRachford]:
        return [cls(iterations=45), cls(iterations=20, gamma=0.7, relaxation=1.0)]

    def begin(self, problem: InverseProblem, misfit: Misfit, x: Tensor) -> dict[str, Tensor]:
        gamma = 1 / _first_rho(misfit, x) if self.gamma is None else x.new_full((len(x),), self.gamma)
        return {"y": x.clone(), "gamma": gamma}

    def iterate(
        self, problem: InverseProblem, misfit: Misfit, state: dict[str, Tensor], last: bool
    ) -> tuple[dict[str, Tensor], Tensor]:
        y, gamma = state["y"], state["gamma"]
        x = misfit.prox(y, gamma)
        z = problem.prior.prox(2 * x - y, gamma)
        out = {**state, "x": z, "y": y + self.relaxation * (z - x)}
        return out, relative(z - x, x) if last else state["change"]


@dataclass(frozen=True)
class HalfQuadraticSplitting(Splitting):
    r"""Half-quadratic splitting with a growing penalty (Geman & Yang 1995, IEEE Trans. Image Processing 4).

        x = argmin Φ(x) + (ρ_k/2)|x − z|²,     z = prox_{R/ρ_k}(x),     ρ_k from ρ_0 to ρ_K, evenly in log ρ

    Targets the minimum of Φ(x) + R(x) only as ρ_K grows and slowly: at a fixed ρ it is that of Φ plus the Moreau envelope
    of R. Penalties that are not convex are allowed; the growth then steers which stationary point it ends in.

    Args:
        iterations: K, all of them are made. rho_first, rho_last: times the gain ‖Aᴴ R⁻¹ A‖ of the operator.
        tol, rtol, start: as in the other splittings; `converged` says |x − z| ≤ tol |x| at the end.

    Cost an iteration: one solve with the data term and one proximal operator. The result is z, which obeys bounds.
    """

    convex_only: ClassVar[bool] = False

    iterations: int = 200
    tol: float = 1e-3
    rho_first: float = 1e-3
    rho_last: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rho_first <= self.rho_last < math.inf:
            raise ValueError(
                f"HalfQuadraticSplitting needs 0 < rho_first <= rho_last, got {self.rho_first} and {self.rho_last}."
            )

    @classmethod
    def examples(cls) -> list[HalfQuadraticSplitting]:
        return [cls(iterations=45)]

    def begin(self, problem: InverseProblem, misfit: Misfit, x: Tensor) -> dict[str, Tensor]:
        first = self.rho_first * misfit.lipschitz().to(x).expand(len(x))
        return {"z": x.clone(), "rho": first.clone(), "gap": torch.full_like(first, math.inf)}

    def iterate(
        self, problem: InverseProblem, misfit: Misfit, state: dict[str, Tensor], last: bool
    ) -> tuple[dict[str, Tensor], Tensor]:
        z, rho = state["z"], state["rho"]
        x = misfit.prox(z, 1 / rho)
        new = problem.prior.prox(x, 1 / rho)
        growth = (self.rho_last / self.rho_first) ** (1 / max(self.iterations - 1, 1))
        out = {**state, "x": new, "z": new, "rho": rho * growth}
        if last:  # the penalty has to grow to its end, whatever moves on the way
            out["gap"] = relative(x - new, x)
        return out, torch.full_like(rho, math.inf)

    def finish(self, problem: InverseProblem, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(super().finish(problem, {**state, "change": state["gap"]}))
