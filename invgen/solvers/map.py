r"""The most probable model, from many starts at once.

A density changes with its coordinates and so does its mode: with x = T(u) or x = f(z),

    in x:  max p(d | g(x)) p(x),      in u:  max p(d | g(T(u))) p(x) |dT/du|,      in z:  max p(d | g(f(z))) N(z; 0, I)

are three different estimates (equal where T and f are affine). A result says in which coordinates it is one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from invgen.contracts import HasDensity, HasLatent, Solver, require
from invgen.solvers import _descent

if TYPE_CHECKING:
    from invgen.driver import Streams
    from invgen.posterior import Posterior
    from invgen.problem import InverseProblem

__all__ = ["MAP"]


@dataclass(frozen=True)
class MAP(Solver):
    """Maximum a posteriori by multi-start descent; `num_samples` is the number of starts, batched in one tensor.

    Targets a mode of the posterior in the coordinates `space`, the global one only as far as the starts reach. Says
    nothing about uncertainty.

    Args:
        space: "x" (physical units), "u" (the prior's own coordinates) or "z" (the latent of a generator). "x" and "u"
            need a prior with `log_prob`, "z" one with `decode`. A mode depends on this choice.
        optimizer: "lbfgs" (two-loop recursion, weak Wolfe line search) or "adam" (for rough objectives; the rate falls
            as a half cosine over `iterations`).
        starts: "prior" for a draw of the prior each (z ~ N(0, I)), "centre" for the point z = 0 or u = 0, or a tensor
            `(n, *shape)` in `space`, used in turn.
        iterations: at the most, for each start.
        learning_rate: first rate of Adam, in units of `space`.
        tol: a start has converged at |∇| ≤ tol · max(1, |∇ at the start|).
        keep: "best" returns the start with the lowest objective of each observation, with `stats["objectives"]` of all;
            "all" returns every start as a draw.
        memory: pairs that L-BFGS keeps.

    Cost: a forward and a backward through operator and prior each iteration of Adam, one to three of L-BFGS; memory
    2 · `memory` vectors a start. `stats`: objective (−log posterior up to a constant), gradient_norm, iterations,
    converged. `latent` holds z for space "z".
    Reference: Nocedal & Wright, Numerical Optimization, 2006, algorithms 7.4 and 7.5.
    """

    needs: ClassVar[tuple[Any, ...]] = (HasDensity | HasLatent,)
    kind: ClassVar[str] = "point"

    space: str = "x"
    optimizer: str = "lbfgs"
    starts: str | Tensor = "prior"
    iterations: int = 500
    learning_rate: float = 0.05
    tol: float = 1e-6
    keep: str = "best"
    memory: int = 10

    def __post_init__(self) -> None:
        allowed = {"space": ("x", "u", "z"), "optimizer": ("lbfgs", "adam"), "keep": ("best", "all")}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"MAP takes {name} from {values}, got {getattr(self, name)!r}.")
        if isinstance(self.starts, str) and self.starts not in ("prior", "centre"):
            raise ValueError(f"MAP starts from 'prior', 'centre' or a tensor of points, got {self.starts!r}.")
        if self.iterations < 1 or self.memory < 1 or not self.learning_rate > 0 or not self.tol >= 0:
            raise ValueError(
                f"MAP needs iterations and memory of at least 1, a positive learning_rate and tol >= 0, got {self}."
            )

    @classmethod
    def examples(cls) -> list[MAP]:
        """Both optimisers, two coordinates."""
        return [
            cls(space="x", keep="all", iterations=15),
            cls(space="z", keep="all", iterations=20),
            cls(space="u", optimizer="adam", keep="all", iterations=30),
        ]

    def check(self, problem: InverseProblem) -> None:
        require(problem.prior, HasLatent if self.space == "z" else HasDensity, self)
        drawn = isinstance(self.starts, str) and self.starts == "prior" and self.space != "z"
        if drawn and not hasattr(problem.prior, "sample"):
            raise TypeError(
                f"{type(problem.prior).__name__} cannot be sampled; give MAP starts='centre' or a tensor of points."
            )
        if problem.nuisance:
            raise TypeError(
                f"MAP looks for the model alone, but {sorted(problem.nuisance)} are unknown too; fix them or use a sampler that treats them."
            )
        if isinstance(self.starts, Tensor) and tuple(self.starts.shape[1:]) != self._shape(problem):
            raise ValueError(
                f"The starts of MAP have the shape {tuple(self.starts.shape)} but {self.space} needs (n, {', '.join(map(str, self._shape(problem)))})."
            )
        order = min(t.operator.derivative_order for t in problem.terms)
        if order < 1:
            raise TypeError(
                "MAP needs the gradient of every operator, and one of them is a black box (derivative_order 0); use a solver without gradients."
            )

    def _shape(self, problem: InverseProblem) -> tuple[int, ...]:
        return tuple(problem.prior.latent_shape) if self.space == "z" else problem.model_shape

    def _objective(self, problem: InverseProblem) -> _descent.Objective:
        """−log posterior of flat points in `space`."""
        shape, prior = self._shape(problem), problem.prior

        def objective(v: Tensor) -> Tensor:
            w = v.reshape(-1, *shape)
            if self.space == "x":  # the density is zero where the transform cannot reach: line searches try such points
                good, w = prior.transform.within_range(w)
                value = -problem.log_posterior(w)
                return torch.where(good, value, torch.full_like(value, math.inf))
            if self.space == "z":
                return -problem.latent_log_posterior(w)
            return -problem.log_posterior(prior.transform(w)) - prior.transform.log_det(w)

        return objective

    def _first(self, problem: InverseProblem, rng: Streams) -> Tensor:
        """`(batch, *shape)` starts in `space`; item i depends on its own stream alone."""
        shape, dtype, prior = self._shape(problem), problem.dtype, problem.prior
        if isinstance(self.starts, Tensor):
            picks = [s % len(self.starts) for _, s in rng.items]
            return self.starts[picks].to(device=rng.device, dtype=dtype)
        if self.space == "z":
            return (1.0 if self.starts == "prior" else 0.0) * rng.normal(shape, dtype=dtype, tag="start")
        if self.starts == "prior":
            seeds = rng.integers(2**31 - 1, tag="start").tolist()
            x = torch.cat([prior.sample(1, seed=s) for s in seeds]).to(device=rng.device, dtype=dtype)
            return prior.transform.inverse(x) if self.space == "u" else x
        u = torch.zeros(len(rng), *shape, dtype=dtype, device=rng.device)
        return prior.transform(u) if self.space == "x" else u

    def num_steps(self, problem: InverseProblem) -> int:
        return self.iterations

    def init(self, problem: InverseProblem, rng: Streams) -> dict[str, Tensor]:
        v = self._first(problem, rng).flatten(1)
        state = _descent.start(self._objective(problem), v, self.tol, self.memory, adam=self.optimizer == "adam")
        return self._named(state)

    def step(self, problem: InverseProblem, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        state = {**state, "v": state["x"]}
        state.pop("x")
        if self.optimizer == "lbfgs":
            return self._named(_descent.lbfgs_step(self._objective(problem), state))
        done = int(state["clock"].max())
        rate = 0.5 * self.learning_rate * (1 + math.cos(math.pi * done / self.iterations))
        return self._named(_descent.adam_step(self._objective(problem), state, rate))

    @staticmethod
    def _named(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The driver watches "x" for NaN; `clock` counts steps, frozen items included."""
        out = {k: w for k, w in state.items() if k != "v"}
        clock = state["clock"] + 1 if "clock" in state else torch.zeros_like(state["iterations"])
        return {**out, "x": state["v"], "clock": clock}

    def finish(self, problem: InverseProblem, state: dict[str, Tensor]) -> Mapping[str, Tensor]:
        adam = self.optimizer == "adam"
        v, f, g = (state["best"], state["lowest"], state["best_g"]) if adam else (state["x"], state["f"], state["g"])
        w = v.reshape(-1, *self._shape(problem))
        with torch.no_grad():
            x = w if self.space == "x" else problem.prior.decode(w) if self.space == "z" else problem.prior.transform(w)
        length = g.norm(dim=1)
        results = {
            "x": x,
            "stat_objective": f,
            "stat_gradient_norm": length,
            "stat_iterations": state["iterations"],
            "stat_converged": length <= state["goal"],
        }
        return {**results, "latent": w} if self.space == "z" else results

    def solve(self, problem: InverseProblem, num_samples: int = 1, *, seed: int = 0, **options: Any) -> Posterior:
        """Descend from `num_samples` starts for every observation; options go to `invgen.driver.run`."""
        posterior = super().solve(problem, num_samples, seed=seed, **options)
        return posterior if self.keep == "all" else _best(posterior)


def _best(posterior: Posterior) -> Posterior:
    """The start with the lowest objective of each observation, with the objectives of all."""
    objectives = posterior.stats["objective"]
    good = torch.isfinite(objectives) & (posterior.stats["first_bad_step"] < 0)
    pick = torch.where(good, objectives, torch.full_like(objectives, math.inf)).argmin(dim=2)  # (obs, 1)
    rows = torch.arange(len(pick))

    def chosen(v: Tensor) -> Tensor:
        return v[rows, 0, pick[:, 0]][:, None, None]

    return dataclasses.replace(
        posterior,
        samples=chosen(posterior.samples),
        latent=None if posterior.latent is None else chosen(posterior.latent),
        weights=None if posterior.weights is None else (chosen(posterior.weights) > 0).to(posterior.samples.dtype),
        stats={**{k: chosen(v) for k, v in posterior.stats.items()}, "objectives": objectives[:, :, None]},
    )
