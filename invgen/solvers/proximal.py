r"""Convex baselines through PyProximal: total variation.

    m̂ = argmin_m  ½ Σ_terms |W (A m − d)|² + weight · TV(m),      Wᴴ W = R⁻¹,

solved by the primal-dual method of Chambolle & Pock (J. Math. Imaging Vision 40, 2011, algorithm 1). The data term
enters by its proximal operator, (Aᴴ R⁻¹ A + I/τ)⁻¹ (Aᴴ R⁻¹ d + m/τ), which is `operator.solve_model`: direct where the
operator has structure (a post-stack operator with a background, say), conjugate gradients elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from invgen.contracts import Solver
from invgen.covariance import Scalar

if TYPE_CHECKING:
    from invgen.driver import Streams
    from invgen.problem import InverseProblem, LinearGaussian

__all__ = ["TotalVariation", "tune_weight"]

_BLOCK = 20  # primal-dual iterations between two looks at convergence: one step of the driver


class _DataTerm:
    """½ |W (A m − d)|² of one observation, as PyProximal expects a function: a value and a proximal operator."""

    def __init__(self, system: LinearGaussian, data: Tensor, rtol: float) -> None:
        self.operator, self.R, self.data, self.rtol = system.operator, system.R_update, data, rtol
        self.back = self.operator.adjoint(self.R.solve(data))

    def torch(self, m: np.ndarray) -> Tensor:
        """A flat model as `(1, *model_shape)`."""
        return torch.from_numpy(np.ascontiguousarray(m)).to(self.back).reshape(1, *self.operator.model_shape)

    def __call__(self, m: np.ndarray) -> float:
        return 0.5 * float(self.R.whiten(self.operator(self.torch(m)) - self.data).abs().square().sum())

    def prox(self, m: np.ndarray, tau: float) -> np.ndarray:
        """argmin_y f(y) + |y − m|²/2τ."""
        now = self.torch(m)
        C = Scalar(float(tau), self.operator.model_shape)
        solved = self.operator.solve_model(self.back + now / tau, self.R, C, rtol=self.rtol, start=now)
        return solved.x.cpu().numpy().ravel()

    def gain(self, iterations: int = 15) -> float:
        """Largest eigenvalue of Aᴴ R⁻¹ A by power iteration (a scale, to one digit)."""
        # ones and an incommensurate wave: no structured operator annihilates both
        v = 1.0 + torch.arange(self.back.numel()).to(self.back).cos().reshape(self.back.shape)
        size = 1.0
        for _ in range(iterations):
            v = self.operator.adjoint(self.R.solve(self.operator(v / v.norm().clamp_min(1e-300))))
            size = float(v.norm())
        return size if math.isfinite(size) else 1.0


def _gradient(shape: tuple[int, ...]) -> tuple[Any, int]:
    """Forward differences along every spatial axis, zero across the far edge, stacked; and the number of axes."""
    import pylops

    axes = range(1, len(shape)) if len(shape) > 1 else range(1)
    parts = [pylops.FirstDerivative(shape, axis=a, kind="forward", edge=False, dtype="float64") for a in axes]
    return (parts[0] if len(parts) == 1 else pylops.VStack(parts)), len(parts)


def _norm(operator: Any, iterations: int = 60) -> float:
    """Spectral norm of a real pylops operator by power iteration, rounded up by two per cent."""
    v = np.random.default_rng(0).standard_normal(operator.shape[1])
    size = 1.0
    for _ in range(iterations):
        v = operator.rmatvec(operator.matvec(v / max(np.linalg.norm(v), 1e-300)))
        size = float(np.linalg.norm(v))
    return 1.02 * math.sqrt(size)


@dataclass(frozen=True)
class TotalVariation(Solver):
    """Total-variation regularised least squares: the classical edge-preserving baseline.

    Targets the minimum of ½ Σ |W (A m − d)|² + weight · Σ_pixels |∇m|, a point. The prior is not used, except for its
    shape and grid: the regulariser takes its place. Assumes linear operators and Gaussian noise. Several channels are
    penalised apart; differences are per grid sample, not per metre.

    Args:
        weight: of TV, in units of 1/x (the data term is in units of the noise).
        isotropic: |∇m| = √(Σ_axes ∂m²); False sums absolute differences.
        iterations: of the primal-dual method, at the most (looked at every 20).
        tol: an item stops where 20 iterations change the model by less than `tol` relative to its own
            spread.
        rtol: relative tolerance of the solves inside the data term, where they are iterative.

    Cost: a gradient, its adjoint and one `operator.solve_model` an iteration; float64 NumPy inside, one observation after
    another (draws of one observation are the same point and are solved once). `stats`: objective, change, converged.
    Reference: Chambolle & Pock 2011, algorithm 1; PyProximal's `PrimalDual`, https://pyproximal.readthedocs.io.
    """

    needs: ClassVar[tuple[type, ...]] = ()
    kind: ClassVar[str] = "point"

    weight: float = 1.0
    isotropic: bool = True
    iterations: int = 3000
    tol: float = 1e-4
    rtol: float = 1e-6

    def __post_init__(self) -> None:
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ValueError(f"The weight of TotalVariation must be positive and finite, got {self.weight}.")
        if self.iterations < 1 or not self.tol >= 0 or not self.rtol > 0:
            raise ValueError(f"TotalVariation needs iterations >= 1, tol >= 0 and rtol > 0, got {self}.")

    @classmethod
    def examples(cls) -> list[TotalVariation]:
        """Both kinds of variation."""
        return [cls(weight=0.5, iterations=60), cls(weight=0.5, iterations=40, isotropic=False)]

    def check(self, problem: InverseProblem) -> None:
        if problem.nuisance or not problem.is_linear_gaussian:
            kinds = ", ".join(f"{type(t.operator).__name__} with {type(t.noise).__name__}" for t in problem.terms)
            raise TypeError(
                f"TotalVariation needs linear operators with Gaussian noise and nothing else unknown, this problem has {kinds}; use MAP for non-linear problems."
            )

    def num_steps(self, problem: InverseProblem) -> int:
        return -(-self.iterations // _BLOCK)

    def _terms(self, problem: InverseProblem, rng: Streams) -> dict[int, _DataTerm]:
        """One data term an observation of the chunk, in float64."""

        def build() -> dict[int, _DataTerm]:
            system = problem.select(range(problem.n_obs), dtype=torch.float64).linear_gaussian("x")
            data = system.data.expand(len(rng), *system.operator.data_shape)
            rows: dict[int, int] = {}
            for i, (o, _) in enumerate(rng.items):
                rows.setdefault(o, i)
            return {o: _DataTerm(system, data[i : i + 1], self.rtol) for o, i in rows.items()}

        return problem.remember(("total variation", self.rtol), build, shared=False)

    def init(self, problem: InverseProblem, rng: Streams) -> dict[str, Tensor]:
        starts = {}
        for o, term in self._terms(problem, rng).items():
            # damped least squares: directions with less than a thousandth of the largest gain stay near zero
            starts[o] = torch.from_numpy(
                term.prox(np.zeros(math.prod(problem.model_shape)), 1e3 / max(term.gain(), 1e-300))
            )
        gradient, _ = _gradient(problem.model_shape)
        x = torch.stack([starts[o] for o, _ in rng.items])
        slopes = {o: float(np.sqrt(np.mean(gradient.matvec(s.numpy()) ** 2))) for o, s in starts.items()}
        device = problem.terms[0].data.device
        state = {
            "m": x,
            "dual": x.new_zeros(len(rng), gradient.shape[0]),
            "change": x.new_full((len(rng),), math.inf),
            # the typical slope of the model balances primal against dual steps; noise inflates that of the start
            "slope": torch.tensor(
                [0.3 * s if s > 0 and math.isfinite(s) else 1.0 for s in (slopes[o] for o, _ in rng.items)],
                dtype=torch.float64,
            ),
        }
        return {k: v.to(device) for k, v in {**state, "x": x.reshape(-1, *problem.model_shape)}.items()}

    def step(self, problem: InverseProblem, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        from pyproximal import L1, L21
        from pyproximal.optimization.primaldual import PrimalDual

        todo = (state["change"] > self.tol) & torch.isfinite(state["m"]).all(1)
        if not bool(todo.any()):
            return state
        gradient, axes = _gradient(problem.model_shape)
        length = _norm(gradient)
        penalty = L21(axes, sigma=self.weight) if self.isotropic else L1(sigma=self.weight)
        device = state["m"].device
        m, dual, change = state["m"].cpu().clone(), state["dual"].cpu().clone(), state["change"].cpu().clone()
        terms = self._terms(problem, rng)
        done: dict[int, int] = {}
        for i, (o, _) in enumerate(rng.items):
            if not bool(todo[i]):
                continue
            if o in done:
                m[i], dual[i], change[i] = m[done[o]], dual[done[o]], change[done[o]]
                continue
            done[o] = i
            term = terms[o]
            slope = float(state["slope"][i])
            # tau sigma L² = 0.98 < 1; the ratio tau/sigma follows the sizes of model slope and dual ball
            tau, sigma = slope / (self.weight * length), 0.98 * self.weight / (slope * length)
            before = m[i].numpy().copy()
            after, y = PrimalDual(
                term,
                penalty,
                gradient,
                x0=before,
                tau=tau,
                mu=sigma,
                y0=dual[i].numpy().copy(),
                niter=_BLOCK,
                gfirst=True,
                returny=True,
            )
            m[i], dual[i] = torch.from_numpy(after), torch.from_numpy(y)
            spread = max(float(np.linalg.norm(after - after.mean())), 1e-300)
            change[i] = float(np.linalg.norm(after - before)) / spread
        out = {**state, "m": m, "dual": dual, "change": change, "x": m.reshape(-1, *problem.model_shape)}
        return {k: v.to(device) for k, v in out.items()}

    def finish(self, problem: InverseProblem, state: dict[str, Tensor]) -> Mapping[str, Tensor]:
        data = problem.terms[0].data
        gradient, axes = _gradient(problem.model_shape)
        likelihood = problem.select(range(problem.n_obs), dtype=torch.float64)
        variation = []
        for m in state["m"].cpu().numpy():
            slopes = np.abs(gradient.matvec(m)).reshape(axes, -1)
            variation.append(self.weight * float(np.sqrt((slopes**2).sum(0)).sum() if self.isotropic else slopes.sum()))
        objective = torch.tensor(variation, dtype=torch.float64, device=data.device) + _misfit(likelihood, state["x"])
        return {
            "x": state["x"].to(data.real.dtype),
            "stat_objective": objective,
            "stat_change": state["change"],
            "stat_converged": state["change"] <= self.tol,
        }


def _misfit(problem: InverseProblem, x: Tensor) -> Tensor:
    """½ Σ |W (A m − d)|² of each item (without the ½ for complex data)."""
    system = problem.linear_gaussian("x")
    r = system.R.whiten(system.operator(x) - system.data)
    return (1.0 if r.is_complex() else 0.5) * r.abs().square().flatten(1).sum(1)


def tune_weight(
    problems: Sequence[tuple[InverseProblem, Tensor]], weights: Sequence[float], **settings: Any
) -> tuple[float, dict[float, float]]:
    """The TV weight with the best mean signal-to-noise ratio on problems whose truth is known.

    SNR = 10 log10(mean (m − mean m)² / mean (m − m̂)²), averaged over problems; tune on generated models, never on the
    one that is reported.

    Args:
        problems: pairs (problem, truth), the truth `(*shape)` or `(obs, *shape)`. weights: to try.
        settings: other hyper-parameters of `TotalVariation`.

    Returns:
        The best weight, and the mean SNR in dB of every weight.

    Raises:
        ValueError: no problems or no weights.
    """
    if not problems or not weights:
        raise ValueError(
            f"tune_weight needs problems with their truth and weights to try, got {len(problems)} and {len(weights)}."
        )
    scores: dict[float, float] = {}
    for weight in weights:
        solver = replace(TotalVariation(**settings), weight=float(weight))
        snr = []
        for problem, truth in problems:
            m = torch.as_tensor(truth, dtype=torch.float64).reshape(-1, *problem.model_shape)
            error = solver.solve(problem, dtype=torch.float64).mean() - m
            spread = m - m.flatten(1).mean(1).reshape(-1, *(1,) * (m.ndim - 1))
            snr.append(10 * (spread.square().flatten(1).mean(1) / error.square().flatten(1).mean(1)).log10().mean())
        scores[float(weight)] = float(torch.stack(snr).mean())
    return max(scores, key=lambda w: scores[w]), scores
