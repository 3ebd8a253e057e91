r"""What every Markov chain of the house shares: starts, warm-up, thinning, kept draws, statistics.

All chains of an observation are one batch, and adaptation during the warm-up pools them (`pooled`): they then depend on
each other through step sizes and mass matrices alone. After the warm-up nothing is adapted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from invgen.contracts import Solver, require
from invgen.solvers._target import Target, check_target, target_of

if TYPE_CHECKING:
    from invgen.driver import Streams
    from invgen.problem import InverseProblem

_WINDOW = 64  # steps between looks at NaN likelihoods: each look waits for the device


@dataclass(frozen=True)
class Chain(Solver):
    """Base of Markov chains; a subclass writes `begin` and `move`.

    Args:
        draws: kept of each chain. warmup: steps before them, when steps are adapted; thin: steps for each kept draw.
        space: "z" (the latent of a generator), "u" (the prior's own coordinates, for a prior with a density) or "auto".
        starts: "prior", or positions `(n, dim)` used in turn.
        superchains: number of groups of chains that share a start, for nested R̂; None for a start of its own each.

    The state: `z` `(batch, dim)` the position, `phi` `(batch,)` the misfit Φ there, `clock`, kept draws, and what the
    subclass adds. A start without a finite likelihood is drawn again, and after 20 tries the chain is left as NaN.
    """

    pooled: ClassVar[bool] = True
    kind: ClassVar[str] = "exact"
    gradient: ClassVar[bool] = False
    watched: ClassVar[tuple[str, ...]] = ("accept",)  # figures of each step that `move` returns and draws keep

    draws: int = 1000
    warmup: int = 1000
    thin: int = 1
    space: str = "auto"
    starts: str | Tensor = "prior"
    superchains: int | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        for field, least in (("draws", 1), ("warmup", 0), ("thin", 1)):
            value = getattr(self, field)
            if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
                raise ValueError(f"{name} needs {field} as a whole number of at least {least}, got {value!r}.")
        if isinstance(self.starts, str) and self.starts != "prior":
            raise ValueError(f"{name} starts from 'prior' or from a tensor of positions, got {self.starts!r}.")
        if self.superchains is not None and self.superchains < 1:
            raise ValueError(f"{name} needs superchains >= 1 or None, got {self.superchains}.")

    # --- what a subclass writes ----------------------------------------------------------------------------------------

    def begin(self, target: Target, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        """What the first state holds beside `z`, `phi` and, with `gradient`, `grad`."""
        return {}

    def move(
        self, target: Target, state: dict[str, Tensor], rng: Streams, clock: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One transition of every chain: the entries of the state that change, and the figures named in `watched`.

        Adapt while clock < warmup and never later. A proposal with a NaN likelihood is rejected and counted under
        "invalid" in the figures.
        """
        raise NotImplementedError

    # --- the loop ------------------------------------------------------------------------------------------------------

    def check(self, problem: InverseProblem) -> None:
        for capability in self.needs:
            if isinstance(capability, type):  # the space decides between the members of a union
                require(problem.prior, capability, self)
        check_target(self, problem, self.space, gradient=self.gradient)
        dim = target_of(problem, self.space).dim
        if isinstance(self.starts, Tensor) and (self.starts.ndim != 2 or self.starts.shape[1] != dim):
            raise ValueError(
                f"The starts of {type(self).__name__} have the shape {tuple(self.starts.shape)} but positions here have {dim} numbers; give (n, {dim})."
            )

    def num_steps(self, problem: InverseProblem) -> int:
        return self.warmup + self.draws * self.thin

    def init(self, problem: InverseProblem, rng: Streams) -> dict[str, Tensor]:
        target = target_of(problem, self.space)
        if isinstance(self.starts, Tensor):
            picks = [s % len(self.starts) for _, s in rng.items]
            z = self.starts[picks].to(device=rng.device, dtype=problem.dtype)
            phi = target.value(z)
            z = torch.where(torch.isfinite(phi)[:, None], z, torch.full_like(z, math.nan))
        else:
            z, phi = target.start(rng, problem.dtype)
        if self.superchains is not None:
            leader = torch.tensor(_leaders(rng, self.superchains), device=z.device)
            z, phi = z[leader].clone(), phi[leader].clone()
        return self.started(target, z, phi, rng)

    def started(self, target: Target, z: Tensor, phi: Tensor, rng: Streams) -> dict[str, Tensor]:
        """The state of chains that have not moved from z `(batch, dim)`, where the misfit is phi `(batch,)`."""
        state = {"z": z, "phi": phi, "clock": torch.zeros((), dtype=torch.long)}
        if self.gradient:
            state["phi"], state["grad"] = target.value_and_grad(z)
        state |= self.begin(target, state, rng)
        state["kept"] = z.new_full((len(z), self.draws, target.dim), math.nan)
        for name in self.watched:
            state[f"kept_{name}"] = z.new_full((len(z), self.draws), math.nan)
        state["invalid"] = z.new_zeros(len(z))
        return state

    def step(self, problem: InverseProblem, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        target, clock = target_of(problem, self.space), int(state["clock"])
        new, figures = self.move(target, state, rng, clock)
        state = {**state, **new, "clock": state["clock"] + 1}
        if "invalid" in figures:
            state["invalid"] = state["invalid"] + figures["invalid"].to(state["invalid"])
        row, rest = divmod(clock - self.warmup, self.thin)
        if row >= 0 and rest == self.thin - 1:  # written in place: a copy of all kept draws a step would be quadratic
            state["kept"][:, row] = state["z"]
            for name in self.watched:
                state[f"kept_{name}"][:, row] = figures[name].to(state["z"])
        if clock % _WINDOW == _WINDOW - 1:
            self._watch(state, clock + 1)
        return state

    def _watch(self, state: dict[str, Tensor], steps: int) -> None:
        """Stop when the likelihood is NaN more often than not in more than half of the living chains."""
        alive = torch.isfinite(state["z"]).all(1)
        broken = alive & (state["invalid"] > 0.5 * steps)
        if bool(2 * broken.sum() > alive.sum()):
            from invgen.driver import DivergenceError

            raise DivergenceError(
                f"The likelihood is NaN at most proposals of {int(broken.sum())} of {len(alive)} chains after {steps} steps of {type(self).__name__}; mask or bound what the operator cannot compute (a transform on the prior), or start nearer."
            )

    def finish(self, problem: InverseProblem, state: dict[str, Tensor]) -> Mapping[str, Tensor]:
        target = target_of(problem, self.space)
        done = self.finished_draws(state)
        kept = state["kept"][:, :done]
        batch = len(kept)
        x, theta = target.physical(kept.reshape(-1, target.dim))
        results = {
            "chain": x.reshape(batch, done, *x.shape[1:]),
            "stat_invalid": state["invalid"],
            **{f"theta_{n}": v.reshape(batch, done) for n, v in theta.items()},
            **{f"stat_{n}": state[f"kept_{n}"][:, :done] for n in self.watched},
        }
        if target.gaussian:
            results["latent_chain"] = kept[..., : target.model_dim].reshape(batch, done, *target.model_shape)
        return results | self.report(target, state)

    def report(self, target: Target, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Further results of the subclass, `stat_… (batch,)`."""
        return {}

    def finished_draws(self, state: Mapping[str, Tensor]) -> int:
        """Kept draws so far: what a run that stops early has."""
        if not bool(torch.isfinite(state["z"]).all(1).any()):
            return self.draws  # a chunk that is lost ends early, and its NaN stand beside the draws of other chunks
        return max(0, min(self.draws, (int(state["clock"]) - self.warmup) // self.thin))


def _leaders(rng: Streams, superchains: int) -> list[int]:
    """For each item the index of the item whose start it takes."""
    first: dict[int, int] = {}
    count: dict[int, int] = {}
    for i, (o, _) in enumerate(rng.items):
        first.setdefault(o, i)
        count[o] = count.get(o, 0) + 1
    found = []
    for o, s in rng.items:
        if count[o] % superchains:
            raise ValueError(
                f"{count[o]} chains do not divide into {superchains} superchains; ask for a multiple of {superchains} samples."
            )
        size = count[o] // superchains
        found.append(first[o] + s // size * size)
    return found


def groups(rng: Streams) -> int:
    """Observations in the chunk: items are (observation, chain), observations first, all with the same number of chains."""
    return len({o for o, _ in rng.items})


def pooled_mean(values: Tensor, observations: int) -> Tensor:
    """Mean over the living chains of each observation, `(batch, …)` to `(batch, …)`; NaN entries are left out."""
    v = values.reshape(observations, -1, *values.shape[1:])
    return v.nanmean(1, keepdim=True).expand_as(v).reshape(values.shape)
