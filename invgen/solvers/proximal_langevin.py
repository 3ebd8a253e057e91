r"""Langevin sampling with proximal operators: error bars for total variation and other penalties with kinks.

Of p(x | d) ∝ e^{−Φ(x) − R(x)}, Φ = −log p(d | g(x)) is smooth and R = −log p(x) convex with a proximal operator. The Moreau
envelope R_λ(x) = min_y R(y) + |x − y|²/2λ has the gradient (x − prox_{λR}(x))/λ, so that

    MYULA:  x' = x − δ ∇Φ(x) − (δ/λ)(x − prox_{λR}(x)) + √(2δ) ξ,  ξ ~ N(0, I)
    P-MALA: x* = prox_{hR}(x − h ∇Φ(x)) + √(2h) ξ,  accepted by Metropolis & Hastings
    SK-ROCK: s stages of MYULA's drift under Chebyshev polynomials, for a step that is s² as long

P-MALA has p(x | d) as its law, whatever the step. The other two are unadjusted: their law is off by the envelope (λ) and by the
step (δ), and the bias does not go away with more draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from invgen.contracts import HasDensity, HasProx
from invgen.solvers._proximal_terms import Misfit, Splitting, penalty, wide

if TYPE_CHECKING:
    from invgen.driver import Streams
    from invgen.problem import InverseProblem

__all__ = ["MYULA", "SKROCK", "ProximalMALA"]


@dataclass(frozen=True)
class _Langevin(Splitting):
    """Chains in x: the loop, the kept draws and the start.

    Args:
        draws: kept of each chain. warmup: steps before them. thin: steps for each kept draw.
        start: first models `(n, *shape)`, used in turn; when omitted 200 iterations of FISTA towards the MAP.
    """

    needs: ClassVar[tuple[type, ...]] = (HasProx, HasDensity)
    kind: ClassVar[str] = "approximate"
    linear_only: ClassVar[bool] = False

    draws: int = 1000
    warmup: int = 1000
    thin: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("draws", 1), ("warmup", 0), ("thin", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
                raise ValueError(
                    f"{type(self).__name__} needs {name} as a whole number of at least {least}, got {value!r}."
                )

    def move(
        self, problem: InverseProblem, misfit: Misfit, state: dict[str, Tensor], rng: Streams, clock: int
    ) -> dict[str, Tensor]:
        """One transition of every chain."""
        raise NotImplementedError

    def check(self, problem: InverseProblem) -> None:
        super().check(problem)
        if not problem.is_linear_gaussian and self.start is None:
            raise TypeError(
                f"{type(self).__name__} finds its start by least squares, which a non-linear g has not; give start= (a MAP, say)."
            )

    def num_steps(self, problem: InverseProblem) -> int:
        return self.warmup + self.draws * self.thin

    @torch.no_grad()
    def init(self, problem: InverseProblem, rng: Streams) -> dict[str, Tensor]:
        misfit, n = self.misfit(problem), len(rng)
        if self.start is not None:
            picks = [s % len(self.start) for _, s in rng.items]
            x = self.start[picks].to(device=rng.device, dtype=problem.dtype)
        else:
            x = torch.zeros(n, *problem.model_shape, dtype=problem.dtype, device=rng.device)
            x = _descend(problem, misfit, x)
        state = {"x": x, "clock": torch.zeros((), dtype=torch.long), **self.begin(problem, misfit, x)}
        state["kept"] = x.new_full((n, self.draws, *problem.model_shape), math.nan)
        return state

    @torch.no_grad()
    def step(self, problem: InverseProblem, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        clock = int(state["clock"])
        state = {**state, **self.move(problem, self.misfit(problem), state, rng, clock), "clock": state["clock"] + 1}
        row, rest = divmod(clock - self.warmup, self.thin)
        if row >= 0 and rest == self.thin - 1:  # written in place: a copy of all kept draws a step would be quadratic
            state["kept"][:, row] = state["x"]
        return state

    def finished_draws(self, state: Mapping[str, Tensor]) -> int:
        """Kept draws so far: what a run that stops early has."""
        return max(0, min(self.draws, (int(state["clock"]) - self.warmup) // self.thin))

    def finish(self, problem: InverseProblem, state: dict[str, Tensor]) -> Mapping[str, Tensor]:
        # a chain that went wrong after its last kept draw is wrong, too
        bad = ~torch.isfinite(state["x"]).flatten(1).all(1)
        kept = state["kept"][:, : self.finished_draws(state)]
        return {"chain": torch.where(wide(bad, kept), torch.full_like(kept, math.nan), kept)} | self.report(state)

    def report(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Statistics of the subclass."""
        return {}


def _descend(problem: InverseProblem, misfit: Misfit, x: Tensor, iterations: int = 200) -> Tensor:
    """FISTA without a stop: a start near the mode."""
    s = (1 / misfit.lipschitz()).to(x).expand(len(x))
    y = x
    t = 1.0
    for _ in range(iterations):
        new = problem.prior.prox(y - wide(s, y) * misfit.value_and_gradient(y)[1], s)
        after = 0.5 * (1 + math.sqrt(1 + 4 * t * t))
        x, y, t = new, new + (t - 1) / after * (new - x), after
    return x


@dataclass(frozen=True)
class ProximalMALA(_Langevin):
    r"""The proximal Metropolis-adjusted Langevin algorithm (Pereyra 2016, Statistics and Computing 26, section 3.2).

        x* = m(x) + √(2h) ξ,   m(x) = prox_{hR}(x − h ∇Φ(x)),       α = min(1, π(x*) q(x | x*)/π(x) q(x* | x))

    Targets the exact posterior e^{−Φ(x) − R(x)}, asymptotically, kinks and bounds included: the proximal operator shapes the
    proposal alone, and an inexact one (total variation) is as good, as long as it is the same at every call. Geometrically
    ergodic where a plain MALA is not (Laplace tails, theorem 3.2). Assumes a convex R with its exact density.

    Args:
        draws, warmup, thin: as for every chain. start: first models `(n, *shape)`; a descent to the mode when omitted.
        step_size: h; adapted chain by chain in the warm-up when omitted, from 1/L. target: acceptance it aims at.
        iterations, tol, rtol: not used.

    Cost a step: one gradient and value of the physics, one proximal operator. `stats`: accept, step_size.
    """

    kind: ClassVar[str] = "exact"

    step_size: float | None = None
    target: float = 0.574

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step_size is not None and not (self.step_size > 0 and math.isfinite(self.step_size)):
            raise ValueError(f"The step_size of ProximalMALA must be positive and finite, got {self.step_size}.")
        if not 0 < self.target < 1:
            raise ValueError(f"The target of ProximalMALA lies between 0 and 1, got {self.target}.")

    @classmethod
    def examples(cls) -> list[ProximalMALA]:
        return [cls(draws=6, warmup=6, thin=2), cls(draws=4, warmup=0, step_size=0.01)]

    @classmethod
    def exam(cls) -> dict[str, ProximalMALA]:
        """Long enough for condition numbers of a thousand."""
        return {"": cls(draws=40, warmup=2000, thin=100)}

    def begin(self, problem: InverseProblem, misfit: Misfit, x: Tensor) -> dict[str, Tensor]:
        if self.step_size is not None:
            log_step = x.new_full((len(x),), math.log(self.step_size))
        elif misfit.linear:
            log_step = -misfit.lipschitz().to(x).expand(len(x)).log()
        else:
            log_step = x.new_zeros(len(x))
        value, gradient = misfit.value_and_gradient(x)
        rate = x.new_zeros(len(x))
        return {
            "energy": value + penalty(problem.prior, x),
            "gradient": gradient,
            "log_step": log_step,
            "accept": rate,
        }

    def move(
        self, problem: InverseProblem, misfit: Misfit, state: dict[str, Tensor], rng: Streams, clock: int
    ) -> dict[str, Tensor]:
        x, gradient, energy, log_step = (state[k] for k in ("x", "gradient", "energy", "log_step"))
        h = log_step.exp()
        prior = problem.prior
        # the mean is computed anew with the step of now: a kept one would belong to another step while it is adapted
        xi = rng.normal(problem.model_shape, dtype=x.dtype, tag="langevin")
        mean = prior.prox(x - wide(h, x) * gradient, h)
        new = mean + wide((2 * h).sqrt(), x) * xi
        value, after = misfit.value_and_gradient(new)
        proposed = value + penalty(prior, new)
        back = prior.prox(new - wide(h, x) * after, h)
        forth = 0.5 * xi.square().flatten(1).sum(1)
        log_ratio = energy - proposed + forth - (x - back).square().flatten(1).sum(1) / (4 * h)
        chance = torch.nan_to_num(log_ratio, nan=-math.inf).clamp_max(0).exp()
        take = rng.uniform((), dtype=x.dtype, tag="accept") < chance
        lost = ~torch.isfinite(energy)  # a start without a density: nothing to compare with
        adapting = self.step_size is None and clock < self.warmup
        if adapting:
            log_step = log_step + (chance - self.target) * (clock + 1) ** -0.6
        kept = clock - self.warmup
        rate = state["accept"] + (chance - state["accept"]) / (kept + 1) if kept >= 0 else state["accept"]
        wide_take = wide(take, x)
        return {
            "x": torch.where(wide(lost, x), torch.full_like(x, math.nan), torch.where(wide_take, new, x)),
            "energy": torch.where(take, proposed, energy),
            "gradient": torch.where(wide_take, after, gradient),
            "log_step": log_step,
            "accept": rate,
        }

    def report(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"stat_accept": state["accept"], "stat_step_size": state["log_step"].exp()}


@dataclass(frozen=True)
class _Unadjusted(_Langevin):
    """What MYULA and SK-ROCK share: λ, and the drift of the smoothed potential."""

    smoothing: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.smoothing is not None and not (self.smoothing > 0 and math.isfinite(self.smoothing)):
            raise ValueError(
                f"The smoothing of {type(self).__name__} must be positive and finite, got {self.smoothing}."
            )

    def check(self, problem: InverseProblem) -> None:
        super().check(problem)
        if not problem.is_linear_gaussian:
            raise TypeError(
                f"{type(self).__name__} takes its step from ‖Aᴴ R⁻¹ A‖, which a non-linear g has not; use ProximalMALA."
            )

    def begin(self, problem: InverseProblem, misfit: Misfit, x: Tensor) -> dict[str, Tensor]:
        L = misfit.lipschitz().to(x).expand(len(x))
        smooth = 1 / L if self.smoothing is None else torch.full_like(L, self.smoothing)
        return {"smooth": smooth.clone(), "total": L + 1 / smooth}

    def _drift(self, problem: InverseProblem, misfit: Misfit, x: Tensor, smooth: Tensor) -> Tensor:
        """∇(Φ + R_λ)."""
        return misfit.value_and_gradient(x)[1] + (x - problem.prior.prox(x, smooth)) / wide(smooth, x)

    def report(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"stat_smoothing": state["smooth"]}


@dataclass(frozen=True)
class MYULA(_Unadjusted):
    r"""The Moreau–Yosida unadjusted Langevin algorithm (Durmus, Moulines & Pereyra 2018, SIAM J. Imaging Sciences 11).

    Targets e^{−Φ(x) − R_λ(x)}, the posterior with the Moreau envelope in the place of R, up to the bias of the step δ: unadjusted,
    so that neither error shrinks with more draws. With a Laplace prior of weight 1.2 √L and the defaults posterior means were off
    by 0.14 standard deviations, and standard deviations 4 to 30 per cent too large (`benchmarks/proximal.py`).

    Args:
        draws, warmup, thin: as for every chain. start: first models; a descent to the mode when omitted.
        smoothing: λ, 1/L when omitted. fraction: δ = fraction/(L + 1/λ), stable below 2 and accurate below 1/2.
        iterations, tol, rtol: not used.

    Cost a step: one gradient of the physics, one proximal operator. `stats`: smoothing.
    """

    fraction: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.fraction < 2:
            raise ValueError(
                f"The fraction of MYULA lies between 0 and 2, the stability limit of its step 2/(L + 1/λ), got {self.fraction}."
            )

    @classmethod
    def examples(cls) -> list[MYULA]:
        return [cls(draws=6, warmup=6, thin=2)]

    @classmethod
    def exam(cls) -> dict[str, MYULA]:
        """A small step, and chains long enough for it."""
        return {"": cls(draws=40, warmup=2000, thin=100, fraction=0.2)}

    def move(
        self, problem: InverseProblem, misfit: Misfit, state: dict[str, Tensor], rng: Streams, clock: int
    ) -> dict[str, Tensor]:
        x = state["x"]
        delta = wide(self.fraction / state["total"], x)
        xi = rng.normal(problem.model_shape, dtype=x.dtype, tag="langevin")
        drift = self._drift(problem, misfit, x, state["smooth"])
        return {"x": x - delta * drift + (2 * delta).sqrt() * xi}


@dataclass(frozen=True)
class SKROCK(_Unadjusted):
    r"""SK-ROCK: Langevin steps of s stages, stable for steps about s² as long (Pereyra, Vargas Mieles & Zygalakis 2020,
    SIAM J. Imaging Sciences 13, algorithm 1).

        K_1 = x − μ_1 δ ∇U(x + ν_1 Z) + κ_1 Z,      K_j = −μ_j δ ∇U(K_{j−1}) + ν_j K_{j−1} + κ_j K_{j−2},      x' = K_s,

    Z = √(2δ) ξ, with μ, ν, κ from Chebyshev's T_j at ω_0 = 1 + η/s², η = 0.05, ω_1 = T_s(ω_0)/T_s'(ω_0), and U = Φ + R_λ. Targets what
    MYULA targets, unadjusted, with a bias of its own: long steps leave stiff directions too narrow (with five stages and the
    defaults standard deviations were 0.5 to 0.8 of the true ones where MYULA's were 1.04 to 1.3), which a smaller fraction cures.

    Args:
        draws, warmup, thin: as for every chain. start: first models; a descent to the mode when omitted.
        smoothing: λ, 1/L when omitted. stages: s, at least 2.
        fraction: of the longest stable step, δ = fraction · l_s/(L + 1/λ), l_s = (s − ½)²(2 − 4η/3) − 3/2.
        iterations, tol, rtol: not used.

    Cost a step: s gradients of the physics and s proximal operators. `stats`: smoothing.
    """

    stages: int = 10
    fraction: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stages < 2 or not 0 < self.fraction <= 1:
            raise ValueError(
                f"SKROCK needs at least two stages and a fraction in (0, 1] of its longest stable step, got {self.stages} and {self.fraction}."
            )

    @classmethod
    def examples(cls) -> list[SKROCK]:
        return [cls(draws=6, warmup=6, stages=3)]

    @classmethod
    def exam(cls) -> dict[str, SKROCK]:
        """Ten stages."""
        return {"": cls(draws=40, warmup=200, thin=10)}

    def coefficients(self) -> tuple[float, list[tuple[float, float, float]]]:
        """l_s, and (μ_j, ν_j, κ_j) of the stages."""
        s, eta = self.stages, 0.05
        w0 = 1 + eta / s**2
        T, U = [1.0, w0], [1.0, 2 * w0]  # Chebyshev's polynomials of both kinds at ω_0; T_s' = s U_{s−1}
        for _ in range(s - 1):
            T.append(2 * w0 * T[-1] - T[-2])
            U.append(2 * w0 * U[-1] - U[-2])
        w1 = T[s] / (s * U[s - 1])
        table = [(w1 / w0, s * w1 / 2, s * w1 / w0)]
        for j in range(2, s + 1):
            nu = 2 * w0 * T[j - 1] / T[j]
            table.append((2 * w1 * T[j - 1] / T[j], nu, -T[j - 2] / T[j]))
        return (s - 0.5) ** 2 * (2 - 4 * eta / 3) - 1.5, table

    def move(
        self, problem: InverseProblem, misfit: Misfit, state: dict[str, Tensor], rng: Streams, clock: int
    ) -> dict[str, Tensor]:
        x, smooth = state["x"], state["smooth"]
        reach, table = self.coefficients()
        delta = wide(self.fraction * reach / state["total"], x)
        Z = (2 * delta).sqrt() * rng.normal(problem.model_shape, dtype=x.dtype, tag="langevin")
        mu, nu, kappa = table[0]
        before, now = x, x - mu * delta * self._drift(problem, misfit, x + nu * Z, smooth) + kappa * Z
        for mu, nu, kappa in table[1:]:
            drift = self._drift(problem, misfit, now, smooth)
            before, now = now, nu * now + kappa * before - mu * delta * drift
        return {"x": now}
