r"""Hamiltonian Monte Carlo and the Metropolis-adjusted Langevin algorithm, all chains of an observation in one batch.

    q' , v' = L leapfrog steps of size ε from q, v ~ N(0, Σ),      accept with min(1, exp(H(q, v) − H(q', v'))),

    H(q, v) = U(q) + ½ vᵀ Σ⁻¹ v,      U = −log p(q | d).

One leap is the Langevin proposal: q' = q − (ε²/2) Σ ∇U(q) + ε S ξ, ξ ~ N(0, I), S Sᵀ = Σ, and the acceptance is the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invgen.solvers._chain import groups
from invgen.solvers._hamiltonian import DIVERGENT, Hamiltonian, full_gradient, potential
from invgen.solvers._metric import Metric, window_mean
from invgen.solvers._target import Target
from invgen.solvers._warmup import chees_gradient, first_rate, lengthen, pooled_acceptance, radical_inverse, windows

if TYPE_CHECKING:
    from invgen.driver import Streams

__all__ = ["HMC", "MALA"]

_UNLEARNT = 16  # leaps at the most before a mass matrix is known


@dataclass(frozen=True)
class HMC(Hamiltonian):
    """Hamiltonian Monte Carlo with jittered trajectories whose length is adapted by ChEES. Targets the exact posterior.

    All chains take the same number of leaps, so that none waits for another. The length is t = T (½ + h), h the next
    number of a Halton sequence, T found by stochastic ascent on the change of the squared distance from the mean. The
    warm-up pools the chains of an observation: with sixteen or more it is short and sure; one chain works, too.
    Assumes a gradient almost everywhere; proposals whose likelihood or gradient is not finite are rejected and counted.

    Args:
        draws, warmup, thin, space, starts, superchains: as for every chain.
        step_size, mass, rank: as for every Hamiltonian chain: found and learnt in the warm-up.
        target: acceptance the warm-up aims at (0.651 is the best for many independent numbers, Beskos et al. 2013; more
            is safer where curvature varies); a chain that is stuck pulls the step down.
        length: T in units of the mass matrix; adapted when omitted (π/2 with `warmup=0`).
        max_leaps: bound on L.

    Cost: L gradients a step (decode, forward and their vector-Jacobian products), L in `stats["steps"]`; a few for a
    Gaussian. `stats`: accept, energy (for `ebfmi`), divergent, steps, invalid, step_size, length.
    References: Neal, MCMC using Hamiltonian dynamics, 2011, arXiv:1206.1901; Beskos et al. 2013, Bernoulli 19, 1501-1534;
    Hoffman, Radul & Sountsov, An adaptive-MCMC scheme for setting trajectory lengths in Hamiltonian Monte Carlo, AISTATS
    2021; Seyboldt, Carlson & Carpenter 2026, arXiv:2603.18845 (mass).
    """

    target: float = 0.8
    length: float | None = None
    max_leaps: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length is not None and not self.length > 0:
            raise ValueError(f"{type(self).__name__} needs length > 0 or None, got {self.length}.")
        if self.max_leaps < 1:
            raise ValueError(f"{type(self).__name__} needs max_leaps >= 1, got {self.max_leaps}.")

    @classmethod
    def examples(cls) -> list[HMC]:
        """A short run."""
        return [cls(draws=6, warmup=6, thin=2), cls(draws=4, warmup=24, mass="diagonal", max_leaps=8)]

    @classmethod
    def exam(cls) -> dict[str, HMC]:
        """The defaults."""
        return {"HMC": cls(draws=40, thin=2)}

    def begin(self, target: Target, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        return super().begin(target, state, rng) | first_rate(state["phi"], self.target)

    def leaps(self, state: dict[str, Tensor], step: Tensor, clock: int) -> Tensor:
        """L of each observation, (observations,): ⌈t/ε⌉ with t = T (½ + h)."""
        jitter = 0.5 + radical_inverse(clock + 1)
        length = state["log_length"].exp() if self.length is None else torch.full_like(step, self.length)
        # an observation whose chains are all lost has no step size
        count = torch.nan_to_num(jitter * length / step, nan=1.0).ceil()
        return count.clamp(1, min(self.max_leaps, _UNLEARNT) if self._unlearnt(state, clock) else self.max_leaps)

    def _unlearnt(self, state: dict[str, Tensor], clock: int) -> bool:
        """True until a first mass matrix is learnt: short steps from the start teach it as well as long ones."""
        ends = windows(self.warmup)[1]
        return "moment_count" in state and bool(ends) and clock < ends[0]

    def move(
        self, target: Target, state: dict[str, Tensor], rng: Streams, clock: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        observations, metric = groups(rng), Metric.of(state)
        q, g = (state[n].unflatten(0, (observations, -1)) for n in ("z", "grad"))
        xi = rng.normal((target.dim,), dtype=q.dtype, tag="momentum").unflatten(0, (observations, -1))
        uniform = rng.uniform((), dtype=q.dtype, tag="accept")
        step = self.step_of(state, clock)
        leaps = self.leaps(state, step, clock)
        counts = leaps.tolist()  # the one wait for the device in a trajectory
        phi, there, g_there, v = _leapfrog(target, metric, q, metric.root(xi), g, step, counts)
        flat = there.flatten(0, 1)
        before = potential(target, state["z"], state["phi"]) + 0.5 * xi.square().sum(2).flatten()
        after = potential(target, flat, phi) + 0.5 * (v * metric.inverse(v)).sum(2).flatten()
        alive = torch.isfinite(before)
        fine = torch.isfinite(after) & torch.isfinite(g_there.sum(2).flatten())
        error = torch.where(fine, after - before, torch.full_like(before, math.inf))
        chance = (-error).clamp_max(0).exp()
        yes = (uniform < chance) & alive
        pick = yes[:, None]
        new = {
            "z": torch.where(pick, flat, state["z"]),
            "phi": torch.where(yes, phi, state["phi"]),
            "grad": torch.where(pick, g_there.flatten(0, 1), state["grad"]),
        }
        figures = {
            "accept": chance,
            "energy": torch.where(yes, after, before),
            "divergent": alive & ~(error < DIVERGENT),
            "steps": leaps.repeat_interleave(q.shape[1]),
            # a likelihood of zero is an answer; NaN, or a gradient that is not finite where there is one, is not
            "invalid": alive & (torch.isnan(phi) | (torch.isfinite(phi) & ~fine)),
        }
        if clock < self.warmup:
            seen = torch.where(alive, chance, torch.full_like(chance, math.nan)).unflatten(0, (observations, -1))
            new |= self._lengthened(state, metric, q, there, v, seen, leaps * step)
            wall = (alive & ~torch.isfinite(phi)).unflatten(0, (observations, -1))
            rate = state["rate"].unflatten(0, (observations, -1))
            accepted, rate = pooled_acceptance(rate, _without_walls(seen, wall))
            new |= {"rate": rate.flatten()}
            new |= self.learn(target, state | new, accepted, rng, clock)
        return new, figures

    def _lengthened(
        self, state: dict[str, Tensor], metric: Metric, q: Tensor, there: Tensor, v: Tensor, seen: Tensor, t: Tensor
    ) -> dict[str, Tensor]:
        """The length of trajectories after one more of them."""
        if self.length is not None:
            return {}
        mean = torch.where(torch.isfinite(q), q, torch.full_like(q, math.nan)).nanmean(1, keepdim=True)
        if "moment_count" in state:
            mean = torch.where(state["moment_count"][:, None, None] > 0, window_mean(state), mean)
        before, after = q - mean, there - mean
        pull = metric.inverse(after)
        chance = torch.nan_to_num(seen, nan=0.0)
        slope = chees_gradient(before, after, pull, v, metric.inverse(before), chance, t[:, None])
        return lengthen(state, slope)

    def report(self, target: Target, state: dict[str, Tensor]) -> dict[str, Tensor]:
        found = super().report(target, state)
        length = state["log_length"].exp()
        if self.length is not None:
            length = torch.full_like(length, self.length)
        return found | {"stat_length": length.repeat_interleave(len(state["z"]) // len(length))}


@dataclass(frozen=True)
class MALA(HMC):
    """Metropolis-adjusted Langevin algorithm, preconditioned by the mass matrix. Targets the exact posterior.

        q' = q − (ε²/2) Σ ∇U(q) + ε S ξ,   ξ ~ N(0, I),   S Sᵀ = Σ ≈ Cov(q | d)

    One gradient a step: cheap, and a random walk: HMC needs fewer gradients in all but a few dimensions.

    Args:
        draws, warmup, thin, space, starts, superchains, step_size, mass, rank: as for HMC.
        target: acceptance (0.574: Roberts & Rosenthal 1998).

    Cost: one gradient a step. `stats` as HMC.
    References: Roberts & Tweedie 1996, Bernoulli 2, 341-363; Roberts & Rosenthal 1998, JRSS B 60, 255-268; as one leap of
    Hamiltonian Monte Carlo: Neal 2011, section 5.5.2.
    """

    target: float = 0.574

    @classmethod
    def examples(cls) -> list[HMC]:
        """A short run."""
        return [cls(draws=6, warmup=24, thin=2)]

    @classmethod
    def exam(cls) -> dict[str, HMC]:
        """Long enough for a random walk."""
        return {"MALA": cls(draws=40, warmup=1000, thin=20)}

    def leaps(self, state: dict[str, Tensor], step: Tensor, clock: int) -> Tensor:
        return torch.ones_like(step)

    def _lengthened(
        self, state: dict[str, Tensor], metric: Metric, q: Tensor, there: Tensor, v: Tensor, seen: Tensor, t: Tensor
    ) -> dict[str, Tensor]:
        return {}


def _without_walls(seen: Tensor, wall: Tensor) -> Tensor:
    """Acceptance without the chains that ended where the likelihood is zero or undefined, unless nine of ten did.

    A shorter step meets the edge of the support as often as a long one: counted, it would shrink the step to nothing.
    """
    few = 10 * wall.sum(1, keepdim=True) < 9 * torch.isfinite(seen).sum(1, keepdim=True)
    return torch.where(wall & few, torch.full_like(seen, math.nan), seen)


def _leapfrog(
    target: Target, metric: Metric, q: Tensor, v: Tensor, g: Tensor, step: Tensor, counts: list[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Φ `(batch,)`, q, ∇U and v `(observations, chains, dim)` after `counts` leaps of each observation.

    Observations that are done wait with a step of zero, which leaves them where they are, until they are a quarter of
    the batch; the others then go on without them.
    """
    chains, phi = q.shape[1], q.new_zeros(q.shape[:2])
    ends = (phi, q.clone(), g.clone(), v.clone())
    rows = torch.arange(len(q), device=q.device)
    place = list(range(len(q)))
    part, mass, size = target, metric, step[:, None, None]
    force = mass.apply(g)
    for leap in range(int(max(counts))):
        going = [counts[i] > leap for i in place]
        if 4 * sum(going) <= 3 * len(place):
            for end, now in zip(ends, (phi, q, g, v), strict=True):
                end[rows] = now
            stay = torch.tensor([k for k, yes in enumerate(going) if yes], device=q.device)
            place = [i for i, yes in zip(place, going, strict=True) if yes]
            rows, phi, q, g, v, force = (x[stay] for x in (rows, phi, q, g, v, force))
            items = rows[:, None] * chains + torch.arange(chains, device=q.device)
            part, mass, size = target.of_some(items.flatten()), metric.of_some(rows), size[stay]
            going = [True] * len(place)
        ahead = size if all(going) else size * torch.tensor(going, dtype=q.dtype, device=q.device)[:, None, None]
        half = -0.5 * ahead
        v = torch.addcmul(v, half, force)
        q = torch.addcmul(q, ahead, v)
        flat = q.flatten(0, 1)
        value, gradient = part.value_and_grad(flat)
        phi = value.unflatten(0, (len(q), -1))
        g = full_gradient(part, flat, gradient).unflatten(0, (len(q), -1))
        force = mass.apply(g)
        v = torch.addcmul(v, half, force)
    if len(rows) < len(ends[0]):
        for end, now in zip(ends, (phi, q, g, v), strict=True):
            end[rows] = now
        phi, q, g, v = ends
    return phi.flatten(), q, g, v
