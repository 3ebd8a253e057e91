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

from invgen.contracts import HasDensity, HasGaussian, HasLatent, Solver, require
from invgen.solvers import _descent, _newton
from invgen.solvers._stages import Coordinates, Stage, chi2, coordinates, has_chi2, objective, stage_of, to_white
from invgen.solvers._target import _derivative_free, check_target
from invgen.solvers._whitened import check_curvature, curvature

if TYPE_CHECKING:
    from invgen.driver import Streams
    from invgen.posterior import Posterior
    from invgen.problem import InverseProblem

__all__ = ["MAP"]

_NEWTON = ("gauss_newton", "levenberg_marquardt")


@dataclass(frozen=True)
class MAP(Solver):
    """Maximum a posteriori by multi-start descent; `num_samples` is the number of starts, batched in one tensor.

    Targets a mode of the posterior in the coordinates `space`, the global one only as far as the starts reach. Says
    nothing about uncertainty.

    Args:
        space: "x" (physical units), "u" (the prior's own coordinates) or "z" (the latent of a generator). "x" and "u"
            need a prior with `log_prob`, "z" one with `decode`. A mode depends on this choice. Nuisance parameters are
            found along in "z", as standard-normal latents theta = f_theta(z_theta): the mode is one in (z, z_theta).
        optimizer: "lbfgs" (two-loop recursion, weak Wolfe line search), "adam" (for rough objectives; the rate falls as
            a half cosine over `iterations`, anew in each stage), "gauss_newton" or "levenberg_marquardt" (few iterations, each with inner
            conjugate gradients on J and Jᵀ products; Gaussian noise, space "z", or "u" for a Gaussian prior, which is
            whitened; Levenberg–Marquardt is the safer one).
        starts: "prior" for a draw of the prior each (z ~ N(0, I)), "centre" for the point z = 0 or u = 0, or a tensor
            `(n, *shape)` in `space`, used in turn (nuisance latents then start at 0).
        iterations: at the most, for each start, all stages together.
        learning_rate: first rate of Adam, in units of `space`.
        tol: a start has converged at |∇| ≤ tol · max(1, |∇ at the start (of the stage)|).
        keep: "best" returns the start with the lowest objective of each observation, with `stats["objectives"]` of all;
            "all" returns every start as a draw.
        memory: pairs that L-BFGS keeps.
        inner: conjugate-gradient iterations of a Newton step at the most.
        stages: scales from coarse to fine, ending in 1: (4.0, 2.0, 1.0). A start goes on to the next stage when it has
            converged or used its share of `iterations`. The last stage is the misfit itself, so that the result is a
            mode of the true posterior; the others only choose the valley.
        coarse: what a scale s does. "lowpass": data and predictions are low-passed along the last axis of the data with
            the corner at 1/s of the Nyquist frequency (Gaussian noise of known level). "sigma": the noise is s times
            wider.
        stop_chi2: a start is finished as soon as its misfit |R^(-1/2)(d − g)|² / n falls to this value (1: the
            discrepancy principle of Morozov). That regularises by stopping early, and the result is then *not* a MAP;
            `stats["stopped"]` tells. Gaussian noise of known level.

    Cost: a forward and a backward through operator and prior each iteration of Adam, one to three of L-BFGS; of Newton
    methods two of each and `inner` products with J and Jᵀ (about a forward and two backwards each). Memory 2 · `memory`
    vectors a start. `stats`: objective (−log posterior up to a constant), gradient_norm (in `space`, whitened for Newton
    methods), iterations, converged, and chi2 where the noise is Gaussian and known. `latent` holds z for space "z".
    References: Nocedal & Wright, Numerical Optimization, 2006, algorithms 7.4 and 7.5; Madsen, Nielsen & Tingleff,
    Methods for Non-linear Least Squares Problems, 2004, algorithm 3.16; Bunks et al., Geophysics 60(5), 1995 (stages);
    Engl, Hanke & Neubauer, Regularization of Inverse Problems, 1996, equation 4.58 (discrepancy principle).
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
    inner: int = 50
    stages: tuple[float, ...] = (1.0,)
    coarse: str = "lowpass"
    stop_chi2: float | None = None

    def __post_init__(self) -> None:
        allowed = {
            "space": ("x", "u", "z"),
            "optimizer": ("lbfgs", "adam", *_NEWTON),
            "keep": ("best", "all"),
            "coarse": ("lowpass", "sigma"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"MAP takes {name} from {values}, got {getattr(self, name)!r}.")
        if isinstance(self.starts, str) and self.starts not in ("prior", "centre"):
            raise ValueError(f"MAP starts from 'prior', 'centre' or a tensor of points, got {self.starts!r}.")
        if min(self.iterations, self.memory, self.inner) < 1 or not self.learning_rate > 0 or not self.tol >= 0:
            raise ValueError(
                f"MAP needs iterations, memory and inner of at least 1, a positive learning_rate and tol >= 0, got {self}."
            )
        object.__setattr__(self, "stages", tuple(float(s) for s in self.stages))
        falling = all(a > b for a, b in zip(self.stages, self.stages[1:], strict=False))
        if not self.stages or self.stages[-1] != 1.0 or not falling:
            raise ValueError(f"The stages of MAP fall to 1, such as (4.0, 2.0, 1.0), got {self.stages}.")
        if self.stop_chi2 is not None and not self.stop_chi2 > 0:
            raise ValueError(f"MAP stops at a positive normalised chi-square such as 1.0, got {self.stop_chi2}.")

    @classmethod
    def examples(cls) -> list[MAP]:
        """Every optimiser, all coordinates, stages and an early stop."""
        return [
            cls(space="x", keep="all", iterations=15),
            cls(space="z", keep="all", iterations=20),
            cls(space="u", optimizer="adam", keep="all", iterations=30),
            cls(space="z", optimizer="levenberg_marquardt", keep="all", iterations=8, tol=1e-12),
            cls(space="u", optimizer="gauss_newton", keep="all", iterations=4, tol=1e-12),
            cls(space="z", keep="all", iterations=24, stages=(4.0, 2.0, 1.0)),
            cls(
                space="z", optimizer="adam", keep="all", iterations=24, stages=(3.0, 1.0), coarse="sigma", stop_chi2=1.0
            ),
        ]

    def check(self, problem: InverseProblem) -> None:
        prior = problem.prior
        require(prior, HasLatent if self.space == "z" else HasDensity, self)
        drawn = isinstance(self.starts, str) and self.starts == "prior" and self.space != "z"
        if drawn and not hasattr(prior, "sample"):
            raise TypeError(
                f"{type(prior).__name__} cannot be sampled; give MAP starts='centre' or a tensor of points."
            )
        if problem.nuisance and self.space != "z":
            raise TypeError(
                f"MAP(space={self.space!r}) looks for the model alone, but {sorted(problem.nuisance)} are unknown too; fix them, use space='z' or a sampler that treats them."
            )
        if self.space == "z":
            check_target(self, problem, "z", gradient=False)
        if isinstance(self.starts, Tensor) and tuple(self.starts.shape[1:]) != self._shape(problem):
            raise ValueError(
                f"The starts of MAP have the shape {tuple(self.starts.shape)} but {self.space} needs (n, {', '.join(map(str, self._shape(problem)))})."
            )
        order = min(t.operator.derivative_order for t in problem.terms)
        if order < 1:
            from invgen import solvers

            free = ", ".join(_derivative_free(solvers))
            raise TypeError(
                f"MAP needs the gradient of every operator, and one of them is a black box (derivative_order 0); solvers without derivatives: {free}."
            )
        if self.optimizer in _NEWTON:
            check_curvature(problem, f"MAP(optimizer={self.optimizer!r})")
            if self.space == "x" or (self.space == "u" and not isinstance(prior, HasGaussian)):
                raise TypeError(
                    f"MAP(optimizer={self.optimizer!r}) needs a quadratic −log prior: space='z', or space='u' with a Gaussian prior, not space={self.space!r} with {type(prior).__name__}; use one of these or optimizer='lbfgs'."
                )
        early = self.stop_chi2 is not None
        if (early or (len(self.stages) > 1 and self.coarse == "lowpass")) and not has_chi2(problem):
            what = "stop_chi2" if early else "stages with coarse='lowpass'"
            raise TypeError(
                f"MAP takes {what} for Gaussian noise of known level only; leave it out, or use coarse='sigma' for stages."
            )

    def _shape(self, problem: InverseProblem) -> tuple[int, ...]:
        return tuple(problem.prior.latent_shape) if self.space == "z" else problem.model_shape

    def _where(self, problem: InverseProblem) -> Coordinates:
        white = self.space == "u" and self.optimizer in _NEWTON
        return problem.remember(
            ("coordinates", self.space, white),
            lambda: coordinates(problem, "white" if white else self.space),
            shared=False,
        )

    def _stage(self, state: Mapping[str, Tensor]) -> Stage:
        if len(self.stages) == 1:
            return Stage()
        table = torch.tensor(self.stages, dtype=torch.float64, device=state["stage"].device)
        return stage_of(table[state["stage"]], self.coarse)

    def _first(self, problem: InverseProblem, rng: Streams) -> Tensor:
        """`(batch, dim)` starts in the coordinates of the descent; item i depends on its own stream alone."""
        shape, dtype, prior = self._shape(problem), problem.dtype, problem.prior
        where, more = self._where(problem), len(problem.nuisance)
        if isinstance(self.starts, Tensor):
            picks = [s % len(self.starts) for _, s in rng.items]
            v = self.starts[picks].to(device=rng.device, dtype=dtype)
        elif self.space == "z":
            drawn = self.starts == "prior"
            v = (1.0 if drawn else 0.0) * rng.normal(shape, dtype=dtype, tag="start")
            if more and drawn:
                theta = rng.normal((more,), dtype=dtype, tag="start of theta")
                return torch.cat([v.flatten(1), theta], dim=1)
        elif self.starts == "prior" and self._is_white:
            return rng.normal(where.shape, dtype=dtype, tag="start").flatten(1)
        elif self.starts == "prior":
            seeds = rng.integers(2**31 - 1, tag="start").tolist()
            x = torch.cat([prior.sample(1, seed=s) for s in seeds]).to(device=rng.device, dtype=dtype)
            v = prior.transform.inverse(x) if self.space == "u" else x
        else:
            u = torch.zeros(len(rng), *shape, dtype=dtype, device=rng.device)
            v = prior.transform(u) if self.space == "x" else u
        if self._is_white:
            v = to_white(prior, v)
        return torch.cat([v.flatten(1), v.new_zeros(len(v), more)], dim=1)

    @property
    def _is_white(self) -> bool:
        return self.space == "u" and self.optimizer in _NEWTON

    def num_steps(self, problem: InverseProblem) -> int:
        return self.iterations

    def init(self, problem: InverseProblem, rng: Streams) -> dict[str, Tensor]:
        v = self._first(problem, rng)
        clocks: dict[str, Tensor] = {"clock": torch.zeros(len(v), dtype=torch.long, device=v.device)}
        if len(self.stages) > 1:
            clocks |= {"stage": torch.zeros_like(clocks["clock"]), "stage_clock": torch.zeros_like(clocks["clock"])}
        if self.stop_chi2 is not None:
            clocks["stopped"] = torch.zeros(len(v), dtype=torch.bool, device=v.device)
        return _named(self._watch_chi2(problem, {**self._begin(problem, v, clocks), **clocks}))

    def _begin(self, problem: InverseProblem, v: Tensor, stage: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The optimiser's first state at v, with the misfit of each item's stage."""
        f = objective(problem, self._where(problem), self._stage(stage))
        if self.optimizer in _NEWTON:
            return _newton.start(f, v, self.tol)
        return _descent.start(f, v, self.tol, self.memory, adam=self.optimizer == "adam")

    def step(self, problem: InverseProblem, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        state = {**state, "v": state["x"]}
        state.pop("x")
        where, stage, done = self._where(problem), self._stage(state), int(state["clock"].max())
        f = objective(problem, where, stage)
        if self.optimizer == "lbfgs":
            state = _descent.lbfgs_step(f, state)
        elif self.optimizer == "adam":
            rate = self._rate(state, done)
            state = _descent.adam_step(f, state, rate)
        else:
            state = _newton.newton_step(
                f,
                lambda q: curvature(problem, where.physical, q, stage.smooth, stage.weight),
                state,
                damped=self.optimizer == "levenberg_marquardt",
                inner=self.inner,
            )
        state = {**state, "clock": state["clock"] + 1}  # counts steps, frozen items included
        state = self._watch_chi2(problem, state)
        return _named(self._advance(problem, state) if len(self.stages) > 1 else state)

    def _rate(self, state: dict[str, Tensor], done: int) -> float | Tensor:
        """Adam's, a half cosine over the iterations, anew in each stage."""
        if "stage_clock" not in state:
            return 0.5 * self.learning_rate * (1 + math.cos(math.pi * done / self.iterations))
        clock = state["stage_clock"]
        left = self.iterations - done + clock  # the last stage takes all that is left
        length = torch.where(state["stage"] == len(self.stages) - 1, left, self._share)
        turn = (clock / length.clamp_min(1)).clamp_max(1.0)
        return (0.5 * self.learning_rate * (1 + (math.pi * turn).cos()))[:, None]

    @property
    def _share(self) -> int:
        """Iterations of a stage."""
        return -(-self.iterations // len(self.stages))

    def _watch_chi2(self, problem: InverseProblem, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Stop the starts whose normalised misfit has fallen far enough: where they are, not where they were lowest."""
        if self.stop_chi2 is None or not bool(state["active"].any()):
            return state
        with torch.no_grad():
            reached = chi2(problem, *self._where(problem).physical(state["v"])) <= self.stop_chi2
        stop = state["active"] & reached
        out = {**state, "active": state["active"] & ~stop, "stopped": state["stopped"] | stop}
        if self.optimizer == "adam":
            wide = stop[:, None]
            out["best"] = torch.where(wide, state["v"], state["best"])
            out["best_g"] = torch.where(wide, state["g"], state["best_g"])
            out["lowest"] = torch.where(stop, state["f"], state["lowest"])
        return out

    def _advance(self, problem: InverseProblem, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Move the starts that are done with their stage on to the next one."""
        clock = state["stage_clock"] + 1
        out = {**state, "stage_clock": clock}
        due = (state["stage"] < len(self.stages) - 1) & (~state["active"] | (clock >= self._share))
        due = due & torch.isfinite(state["v"]).all(1)
        if "stopped" in state:
            due = due & ~state["stopped"]
        if not bool(due.any()):
            return out
        out["stage"] = state["stage"] + due
        out["stage_clock"] = torch.where(due, 0, clock)
        v = torch.where(due[:, None], state["best"], state["v"]) if self.optimizer == "adam" else state["v"]
        fresh = self._begin(problem, v, out)
        for name, value in fresh.items():
            if name not in ("iterations", "m1", "m2"):  # counted over all stages; Adam's moments carry over
                out[name] = torch.where(due.reshape(-1, *(1,) * (value.ndim - 1)), value, out[name])
        return out

    def finish(self, problem: InverseProblem, state: dict[str, Tensor]) -> Mapping[str, Tensor]:
        adam = self.optimizer == "adam"
        v, f, g = (state["best"], state["lowest"], state["best_g"]) if adam else (state["x"], state["f"], state["g"])
        where = self._where(problem)
        with torch.no_grad():
            x, theta = where.physical(v)
            if len(self.stages) > 1:  # a start may have ended in a coarser one
                f = objective(problem, where, Stage())(v)
        length = g.norm(dim=1)
        last = state["stage"] == len(self.stages) - 1 if "stage" in state else torch.ones_like(state["active"])
        results = {
            "x": x,
            "stat_objective": f,
            "stat_gradient_norm": length,
            "stat_iterations": state["iterations"],
            "stat_converged": (length <= state["goal"]) & last,
            **{f"theta_{name}": value for name, value in theta.items()},
        }
        if has_chi2(problem):
            results["stat_chi2"] = chi2(problem, x, theta)
        if "stopped" in state:
            results["stat_stopped"] = state["stopped"]
        if self.space == "z":
            results["latent"] = v[:, : math.prod(where.shape)].reshape(-1, *where.shape)
        return results

    def solve(self, problem: InverseProblem, num_samples: int = 1, *, seed: int = 0, **options: Any) -> Posterior:
        """Descend from `num_samples` starts for every observation; options go to `invgen.driver.run`."""
        posterior = super().solve(problem, num_samples, seed=seed, **options)
        return posterior if self.keep == "all" else _best(posterior)


def _named(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The driver watches "x" for NaN."""
    return {**{k: w for k, w in state.items() if k != "v"}, "x": state["v"]}


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
        theta={k: chosen(v) for k, v in posterior.theta.items()},
        weights=None if posterior.weights is None else (chosen(posterior.weights) > 0).to(posterior.samples.dtype),
        stats={**{k: chosen(v) for k, v in posterior.stats.items()}, "objectives": objectives[:, :, None]},
    )
