r"""What MALA, HMC and NUTS share: U = −log p(q | d), the mass matrix, and the warm-up that adapts them.

In latent coordinates U(q) = Φ(q) + ½ |q|²; in the prior's own coordinates Φ holds the prior. Adaptation pools the chains
of an observation and ends with the warm-up: the draws that are kept come from one fixed kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from invgen.contracts import HasDensity, HasLatent
from invgen.solvers._chain import Chain, groups
from invgen.solvers._curvature import at_mode, average_curvature
from invgen.solvers._metric import Metric, add_moments, curved_metric, learn_metric, no_moments, unit_metric
from invgen.solvers._target import Target, target_of
from invgen.solvers._warmup import average, first_average, first_length, windows
from invgen.solvers._whitened import check_curvature, has_curvature

if TYPE_CHECKING:
    from invgen.driver import Streams
    from invgen.problem import InverseProblem

DIVERGENT = 1000.0  # error of the energy that counts as a divergence
_FULL = 512  # numbers in a position up to which "auto" learns correlations
_PLACES = 4  # chains of an observation whose curvature is averaged
_LIMIT = 2048  # beyond it the sums of squares of a window would take more than 64 MB an observation
_MASSES = ("auto", "identity", "diagonal", "low-rank", "curvature")


@dataclass(frozen=True)
class Hamiltonian(Chain):
    """Base of chains that follow Hamiltonian trajectories; a subclass writes `move`.

    Args:
        step_size: the first one, in units of the mass matrix; found from one step's acceptance when omitted. With
            `warmup=0` it is the only one.
        target: acceptance the warm-up aims at.
        mass: "identity"; "diagonal" or "low-rank", learnt from positions and gradients; "curvature", the low-rank
            (I + mean of Jᵀ J)⁻¹ of the whitened predictions (Gaussian noise, latent space): known before the chains
            have moved, at the price of about 4 · rank products with J and Jᵀ at the mode and twice at 4 chains; "auto":
            low rank up to 512 numbers in a position, then curvature where there is one, else diagonal.
        rank: directions of the low-rank matrices.
    """

    needs: ClassVar[tuple[Any, ...]] = (HasDensity | HasLatent,)
    gradient: ClassVar[bool] = True
    watched: ClassVar[tuple[str, ...]] = ("accept", "energy", "divergent", "steps")
    first_length: ClassVar[float] = math.pi / 2  # of a trajectory, where nothing is known: a quarter of a turn

    warmup: int = 500
    step_size: float | None = None
    target: float = 0.8
    mass: str = "auto"
    rank: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.step_size is not None and not self.step_size > 0:
            raise ValueError(f"{name} needs step_size > 0 or None, got {self.step_size}.")
        if not 0 < self.target < 1:
            raise ValueError(f"{name} needs target in (0, 1), got {self.target}.")
        if self.mass not in _MASSES:
            raise ValueError(f"{name} takes mass from {_MASSES}, got {self.mass!r}.")
        if self.rank < 1:
            raise ValueError(f"{name} needs rank >= 1, got {self.rank}.")

    def check(self, problem: InverseProblem) -> None:
        super().check(problem)
        dim = target_of(problem, self.space).dim
        if self.mass == "curvature":
            check_curvature(problem, f"{type(self).__name__}(mass='curvature')")
            if not target_of(problem, self.space).gaussian:
                raise ValueError(
                    f"{type(self).__name__}(mass='curvature') knows the prior's curvature in latent space alone; give a prior with decode, or mass='low-rank'."
                )
        if self.mass == "low-rank" and dim > _LIMIT:
            raise ValueError(
                f"A low-rank mass matrix is learnt from the covariance of {dim} numbers, more than {_LIMIT}; take mass='diagonal'."
            )

    def _mass(self, target: Target) -> str:
        if self.mass != "auto":
            return self.mass
        if target.dim <= _FULL:
            return "low-rank"
        return "curvature" if target.gaussian and has_curvature(target.problem) else "diagonal"

    def begin(self, target: Target, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        observations = groups(rng)
        q, grad = state["z"], full_gradient(target, state["z"], state["grad"])
        like = q[:0]
        kind = self._mass(target)
        full = kind == "low-rank"
        if kind == "curvature":
            shape = at_mode(target, state, observations, self.rank)
            metric = curved_metric(shape["vectors"], shape["values"])
        else:
            metric = unit_metric(observations, target.dim, min(self.rank, target.dim) if full else 0, like)
        more = metric.entries() | {"grad": grad}
        more |= first_length(like.new_full((observations,), math.log(self.first_length)))
        if kind in ("diagonal", "low-rank"):
            more |= no_moments(observations, target.dim, full, like)
        if self.step_size is not None:
            log_step = like.new_full((observations,), math.log(self.step_size))
        else:
            log_step = self._first_step(target, state | more, rng, like.new_zeros(observations))
        return more | first_average(log_step)

    def _first_step(self, target: Target, state: dict[str, Tensor], rng: Streams, log_step: Tensor) -> Tensor:
        """A step that one leap accepts in four cases of five on average, to a factor of two; (observations,)."""
        observations, metric = len(log_step), Metric.of(state)
        q = state["z"].unflatten(0, (observations, -1))
        g = state["grad"].unflatten(0, (observations, -1))
        before = potential(target, state["z"], state["phi"]).unflatten(0, (observations, -1))
        xi = rng.normal((target.dim,), dtype=q.dtype, tag="first step").unflatten(0, (observations, -1))
        velocity, force = metric.root(xi), metric.apply(g)
        kinetic = 0.5 * xi.square().sum(2)
        direction, settled = torch.zeros_like(log_step), torch.zeros_like(log_step, dtype=torch.bool)
        for _ in range(60):
            step = log_step.exp()[:, None, None]
            v = velocity - 0.5 * step * force
            there = q + step * v
            phi, grad = target.value_and_grad(there.flatten(0, 1))
            after = potential(target, there.flatten(0, 1), phi).unflatten(0, (observations, -1))
            g_new = full_gradient(target, there.flatten(0, 1), grad).unflatten(0, (observations, -1))
            v = v - 0.5 * step * metric.apply(g_new)
            error = after + 0.5 * (v * metric.inverse(v)).sum(2) - before - kinetic
            chance = torch.nan_to_num((-error).clamp_max(0).exp(), nan=0.0)
            chance = torch.where(torch.isfinite(before), chance, torch.full_like(chance, math.nan)).nanmean(1)
            up = torch.where(chance > 0.8, 1.0, -1.0).to(log_step)
            settled = settled | ((direction != 0) & (up != direction)) | torch.isnan(chance)
            direction = torch.where(direction == 0, up, direction)
            if bool(settled.all()):
                break
            log_step = torch.where(settled, log_step, log_step + up * math.log(2.0))
        return log_step

    def step_of(self, state: dict[str, Tensor], clock: int) -> Tensor:
        """The step sizes now, (observations,): the averaged ones once the warm-up is over."""
        return (state["log_step"] if clock < self.warmup else state["log_step_mean"]).exp()

    def learn(
        self, target: Target, state: dict[str, Tensor], acceptance: Tensor, rng: Streams, clock: int
    ) -> dict[str, Tensor]:
        """What the warm-up changes after a move: `state` already holds it; acceptance is pooled, (observations,)."""
        new = average(state, acceptance, self.target)
        first, ends = windows(self.warmup)
        if clock + 1 in ends[:2] and self._mass(target) == "curvature":
            found = average_curvature(target, state["z"], state["phi"], len(acceptance), self.rank, _PLACES)
            new |= curved_metric(found["metric_vectors"], found["metric_values"]).entries()
            return new | first_average(self._first_step(target, state | new, rng, torch.zeros_like(acceptance)))
        if "moment_count" not in state or not ends or not first <= clock < ends[-1]:
            return new
        observations = len(acceptance)
        q, g = (state[n].unflatten(0, (observations, -1)) for n in ("z", "grad"))
        new |= add_moments(state, q, g)
        if clock + 1 not in ends:
            return new
        metric, longest = learn_metric(state | new, shrink=target.gaussian)
        full = state["moment_qq"].ndim == 3
        new |= metric.entries() | no_moments(observations, target.dim, full, q)
        # a quarter of a turn along the longest direction; what a diagonal leaves out is not known: the length stays
        length = (self.first_length * longest.clamp(1.0, 100.0)).log()
        if clock + 1 > ends[0]:  # one matrix much like the next: what the ascent has gained stays
            length = torch.maximum(length, state["log_length"])
        new |= first_length(torch.where(torch.isfinite(length), length, state["log_length"]))
        start = torch.zeros_like(acceptance)
        return new | first_average(self._first_step(target, state | new, rng, start))

    def report(self, target: Target, state: dict[str, Tensor]) -> dict[str, Tensor]:
        chains = len(state["z"]) // len(state["log_step"])
        step = self.step_of(state, max(int(state["clock"]), self.warmup))
        return {"stat_step_size": step.repeat_interleave(chains)}


def potential(target: Target, q: Tensor, phi: Tensor) -> Tensor:
    """U `(batch,)` of q `(batch, dim)`, given Φ there."""
    return phi + 0.5 * q.square().sum(1) if target.gaussian else phi


def full_gradient(target: Target, q: Tensor, gradient: Tensor) -> Tensor:
    """∇U from ∇Φ."""
    return gradient + q if target.gaussian else gradient
