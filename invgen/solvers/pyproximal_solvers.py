r"""PyProximal's own solvers on an `InverseProblem`: the bridge to what its users know.

    x̂ = argmin_x Φ(x) + f(K x),        Φ = −log p(d | A x) with its gradient and proximal operator, f(K x) = −log p(x)

Φ and f are handed over as PyProximal functions, K as a PyLops operator. Everything runs in NumPy and float64, one
observation after another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from invgen.solvers._proximal_terms import Misfit, Splitting, norm_squared, parts_of

if TYPE_CHECKING:
    from invgen.driver import Streams
    from invgen.problem import InverseProblem

__all__ = ["PyProximalSolver"]

METHODS = (
    "ProximalGradient",
    "AndersonProximalGradient",
    "HQS",
    "ADMM",
    "LinearizedADMM",
    "DouglasRachfordSplitting",
    "PrimalDual",
    "AdaptivePrimalDual",
)
_SPLIT = ("LinearizedADMM", "PrimalDual", "AdaptivePrimalDual")  # take K apart from f


@dataclass(frozen=True)
class PyProximalSolver(Splitting):
    """One of PyProximal's solvers, with its own algorithm and stopping. Targets what that solver does: for convex
    penalties the minimum of Φ(x) − log p(x), the MAP in x, a point.

    Args:
        method: "ProximalGradient" (FISTA), "AndersonProximalGradient", "HQS", "ADMM", "LinearizedADMM", "DouglasRachfordSplitting",
            "PrimalDual" or "AdaptivePrimalDual", as `pyproximal.optimization` calls them.
        iterations: its `niter`. options: pairs (name, value) of further arguments of the solver, replacing the steps chosen
            here: tau = 1/L of Φ for gradients, 30/L elsewhere, mu = 0.98/(tau ‖K‖²).
        rtol: of iterated solves with the physics. start: first model `(n, *shape)`, zero when omitted. tol: not used.

    Raises:
        ValueError: an unknown method. TypeError: a sum of regularisers for a method that takes K apart.

    Cost: that of the solver, for one observation after another (draws of one observation are solved once). `stats`:
    objective, iterations.
    Reference: Ravasi et al. 2024, J. Open Source Software 9, 6326; https://pyproximal.readthedocs.io.
    """

    method: str = "PrimalDual"
    options: tuple[tuple[str, Any], ...] = ()

    linear_only: ClassVar[bool] = True
    convex_only: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in METHODS:
            raise ValueError(f"PyProximalSolver takes method from {METHODS}, got {self.method!r}.")
        object.__setattr__(self, "options", tuple((str(k), v) for k, v in self.options))

    @classmethod
    def examples(cls) -> list[PyProximalSolver]:
        return [cls(iterations=20), cls(method="ADMM", iterations=20), cls(method="ProximalGradient", iterations=20)]

    def check(self, problem: InverseProblem) -> None:
        super().check(problem)
        if self.method in _SPLIT and len(parts_of(problem.prior)) != 1:
            raise TypeError(f"PyProximal's {self.method} takes one regulariser, not a sum; use invgen's PrimalDual.")

    def num_steps(self, problem: InverseProblem) -> int:
        return 1

    def begin(self, problem: InverseProblem, misfit: Misfit, x: Tensor) -> dict[str, Tensor]:
        return {}

    @torch.no_grad()
    def step(self, problem: InverseProblem, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        x, done = state["x"].clone(), {}
        for i, (o, s) in enumerate(rng.items):
            key = o if self.start is None else (o, s % len(self.start))
            if key not in done:
                rows = [i if t.n_obs > 1 else 0 for t in problem.terms]
                data = [t.data[r : r + 1].double() for t, r in zip(problem.terms, rows, strict=True)]
                done[key] = self._one(problem.with_data(*data), state["x"][i : i + 1].double())
            x[i] = done[key].to(x)
        return {**state, "x": x, "count": state["count"] + self.iterations, "change": torch.zeros_like(state["change"])}

    def _one(self, problem: InverseProblem, start: Tensor) -> Tensor:
        """The result for one observation, `shape`; NaN where the data overflow."""
        import pyproximal.optimization as theirs

        misfit = Misfit(problem, self.rtol)
        if not bool(torch.isfinite(misfit.back).all()):
            return torch.full_like(start[0], math.nan)
        parts, split = parts_of(problem.prior), self.method in _SPLIT
        K, f = parts[0] if split else (None, problem.prior)
        L = float(misfit.lipschitz()[0])
        length = norm_squared(K, start)
        gradient = self.method in ("ProximalGradient", "AndersonProximalGradient")
        settings: dict[str, Any] = {"tau": (1.0 if gradient else 30.0) / L, **dict(self.options)}
        if split and "mu" not in settings:
            settings["mu"] = 0.98 / (settings["tau"] * max(length, 1e-30))
        if self.method == "LinearizedADMM":  # its tau is λ and its mu the step, μ ≤ λ/‖K‖²
            settings["mu"] = dict(self.options).get("mu", 0.98 * settings["tau"] / max(length, 1e-30))
        if self.method == "ProximalGradient":
            settings.setdefault("acceleration", "fista")
        first = _function(misfit.value, misfit.prox, start, lambda x: misfit.value_and_gradient(x)[1])
        like = start if K is None else K(start)
        second = _function(lambda v: getattr(f, "penalty", lambda y: -f.log_prob(y))(v), f.prox, like, None)
        module = theirs.primaldual if "PrimalDual" in self.method else theirs.primal
        arguments: list[Any] = [first, second]
        if split:
            arguments.append(_pylops(K, start))
        found = getattr(module, self.method)(
            *arguments, x0=start.cpu().numpy().ravel().copy(), niter=self.iterations, **settings
        )
        x = found[0] if isinstance(found, tuple) else found
        return torch.from_numpy(np.ascontiguousarray(x)).to(start).reshape(start.shape[1:])

    def finish(self, problem: InverseProblem, state: dict[str, Tensor]) -> dict[str, Tensor]:
        results = dict(super().finish(problem, state))
        del results["stat_change"], results["stat_converged"]  # PyProximal does not say
        return results


def _function(value: Any, prox: Any, like: Tensor, gradient: Any) -> Any:
    """A `pyproximal.ProxOperator` around functions of torch tensors."""
    from pyproximal.ProxOperator import ProxOperator

    def tensor(v: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(v)).to(like).reshape(like.shape)

    class Function(ProxOperator):
        def __call__(self, x: np.ndarray) -> float:
            return float(value(tensor(x)))

        def prox(self, x: np.ndarray, tau: float, **options: Any) -> np.ndarray:
            step = torch.full((1,), float(tau), dtype=like.dtype, device=like.device)
            return prox(tensor(x), step).cpu().numpy().ravel()

        def grad(self, x: np.ndarray) -> np.ndarray:
            return gradient(tensor(x)).cpu().numpy().ravel()

    return Function(None, gradient is not None)


def _pylops(K: Any, like: Tensor) -> Any:
    """K as a PyLops operator on flat vectors."""
    import pylops

    if K is None:
        return pylops.Identity(like.numel(), dtype="float64")

    def run(map: Any, shape: tuple[int, ...]) -> Any:
        return lambda v: (
            map(torch.from_numpy(np.ascontiguousarray(v)).to(like).reshape(1, *shape)).cpu().numpy().ravel()
        )

    return pylops.FunctionOperator(
        run(K, K.model_shape),
        run(K.adjoint, K.data_shape),
        math.prod(K.data_shape),
        math.prod(K.model_shape),
        dtype="float64",
    )
