r"""The search for modes: populations of annealed particles, a short HMC from some of them, a mixture, pilot draws of it.

A stage is a step of the run, so that a search is interrupted and resumed like any chain: `sweeps` steps of AnnealedSMC, 32 of
HMC, five rounds of importance sampling. Populations are sets of their own in one batch, observations first.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from invgen.solvers._importance import observation_streams, repeated_target
from invgen.solvers._mode_mixture import NU, Mixture, improved, joined, labels, mixed, together
from invgen.solvers._particles import normalised
from invgen.solvers._target import target_of
from invgen.solvers.annealed_smc import AnnealedSMC
from invgen.solvers.hmc import HMC
from invgen.streams import Streams

if TYPE_CHECKING:
    from invgen.problem import InverseProblem

__all__: list[str] = []

_SETTLE, _SETTLED = 24, 8  # steps of HMC that adapt to a mode, and steps that show its shape
_EARLY = 0.5  # temperature at which modes of small shares still hold particles: a share p has about √p there
ROUNDS = 5  # of pilot draws; the last one is of the final mixture
_EVEN_SEARCH, _EVEN = (
    0.5,
    0.2,
)  # part of the shares that is spread evenly: while the mixture is improved, and afterwards


class ModeSearch(NamedTuple):
    """Settings of a search, and its steps. `name`: of the solver that searches."""

    runs: int
    particles: int
    cess: float
    moves: int
    sweeps: int
    settlers: int
    pilot: int
    name: str

    @property
    def explorer(self) -> AnnealedSMC:
        """The sampler of populations; it never makes its last step, which would draw single particles."""
        return AnnealedSMC(
            particles=self.particles, cess=self.cess, moves=self.moves, explorer="hmc", steps=self.sweeps + 1
        )

    @property
    def settler(self) -> HMC:
        return HMC(draws=_SETTLED, warmup=_SETTLE, max_leaps=8, space="z")

    @property
    def num_steps(self) -> int:
        return self.sweeps + _SETTLE + _SETTLED + ROUNDS

    def init(self, problem: InverseProblem, rng: Streams) -> dict[str, Tensor]:
        found = self.explorer.init(self._repeated(problem, rng, 1), self._streams(problem, rng, 1))
        return {"stage": torch.zeros((), dtype=torch.long), "early": found["particles"]} | _put("smc", found)

    def step(self, problem: InverseProblem, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        """The state one stage later."""
        state, stage = dict(state), int(state["stage"])
        settled = self.sweeps + _SETTLE + _SETTLED
        if stage < self.sweeps:
            smc = self.explorer.step(
                self._repeated(problem, rng, 1), _take("smc", state), self._streams(problem, rng, 1)
            )
            state |= _put("smc", smc)
            state["early"] = torch.where((smc["t"] < _EARLY)[:, None, None], smc["particles"], state["early"])
        elif stage < settled:
            part, streams = self._repeated(problem, rng, self.settlers), self._streams(problem, rng, self.settlers)
            if stage == self.sweeps:
                state = self._arrived(problem, state, rng)
            moved = self.settler.step(part, _take("hmc", state), streams)
            state |= _put("hmc", moved)
            if stage + 1 == settled:
                state = self._fitted(state, _observations(rng))
        else:
            state = self._piloted(problem, state, rng, last=stage + 1 == self.num_steps)
        return state | {"stage": state["stage"] + 1}

    def _repeated(self, problem: InverseProblem, rng: Streams, chains: int) -> InverseProblem:
        """The problem of `runs` times `chains` items an observation."""

        def build() -> InverseProblem:
            each = len(rng) // _observations(rng)
            return problem.select([o * each for o in range(_observations(rng)) for _ in range(self.runs * chains)])

        return problem.remember(("mode search", chains), build, shared=False)

    def _streams(self, problem: InverseProblem, rng: Streams, chains: int) -> Streams:
        """A set of streams for each population, a stream for each of its chains; counted with those of the run."""

        def build() -> Streams:
            observations = list(dict.fromkeys(o for o, _ in rng.items))
            items = [(o * self.runs + r, j) for o in observations for r in range(self.runs) for j in range(chains)]
            streams = Streams(rng.seed, items, device=rng.device, salt=f"{rng.salt}/mode search {chains}")
            streams.counters = rng.counters
            return streams

        return problem.remember(("mode search streams", chains), build, shared=False)

    def _arrived(self, problem: InverseProblem, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        """Particles of every population as chains: half of them at t = 1, half from before t = ½, far from each other."""
        smc, part = _take("smc", state), self._repeated(problem, rng, self.settlers)
        late = self.settlers - self.settlers // 2
        z = torch.cat([_spread(smc["particles"], late), _spread(state.pop("early"), self.settlers // 2)], 1).flatten(
            0, 1
        )
        lost = torch.isnan(smc["log_evidence"]).repeat_interleave(self.settlers)
        z = torch.where(lost[:, None], math.nan, z)
        target = target_of(part, "z")
        reached = smc["t"].reshape(_observations(rng), -1)
        short = (reached.amax(1) < 1) & ~torch.isnan(smc["log_evidence"]).reshape(reached.shape).all(1)
        if bool(short.any()):
            warnings.warn(
                f"{self.name}: no population of {int(short.sum())} of {len(reached)} observations reached the posterior in {self.sweeps} sweeps, so that modes may be missing; raise sweeps.",
                stacklevel=2,
            )
        state = {n: v for n, v in state.items() if not n.startswith("smc_")}
        phi = target.value(z)
        z = torch.where(torch.isfinite(phi)[:, None], z, math.nan)
        chains = self.settler.started(target, z, phi, self._streams(problem, rng, self.settlers))
        return state | _put("hmc", chains) | {"search_temperature": reached.mean(1)}

    def _fitted(self, state: dict[str, Tensor], observations: int) -> dict[str, Tensor]:
        """A first mixture, from the settled chains."""
        shape = (observations, self.runs, self.settlers)
        draws = state["hmc_kept"].unflatten(0, shape)
        energy = state["hmc_kept_energy"].double().mean(1).reshape(shape)
        mixture = together([joined(x, e) for x, e in zip(draws, energy, strict=True)])
        state = {n: v for n, v in state.items() if not n.startswith("hmc_")}
        return state | mixed(mixture, _EVEN_SEARCH).entries()

    def _piloted(
        self, problem: InverseProblem, state: dict[str, Tensor], rng: Streams, last: bool
    ) -> dict[str, Tensor]:
        """Weighted draws of the mixture, and a better one; in the last round what they say of the evidence."""
        mixture, streams = Mixture.of(state), observation_streams(problem, rng, "pilot")
        target = repeated_target(problem, rng, self.pilot)
        xi = streams.normal((self.pilot, target.dim), dtype=torch.float64, tag="pilot")
        gamma = streams.gamma(NU / 2, (self.pilot,), dtype=torch.float64, tag="pilot")
        u = streams.uniform((self.pilot,), dtype=torch.float64, tag="pilot")
        z = mixture.draw(u, xi, gamma).to(state["z"])
        phi = target.value(z.flatten(0, 1)).double().reshape(z.shape[:2])
        logs = -phi - 0.5 * z.double().square().sum(2) - mixture.parts(z).logsumexp(2)
        logs = torch.where(torch.isnan(logs), -math.inf, logs)
        if not last:
            found = improved(mixture, z, logs)
            final = int(state["stage"]) + 2 == self.num_steps
            return state | mixed(found, _EVEN if final else _EVEN_SEARCH).entries()
        weights, mean = normalised(logs)
        size = 1 / weights.square().sum(1)
        if bool((size < _FEW).any()):
            warnings.warn(
                f"{self.name}: the mixture is far from the posterior of {int((size < _FEW).sum())} of {len(size)} observations, {self.pilot} draws of it are worth {float(size.min()):.3g}: jumps will be rare and the evidence is rough; raise pilot, or settle with more settlers.",
                stacklevel=2,
            )
        return state | {
            "pilot_draws": z,
            "pilot_logs": logs,
            "mixture_mode": labels(mixture),
            "search_log_evidence": torch.where(torch.isfinite(mean), mean, math.nan),
            "search_error": (1 / size - 1 / self.pilot).clamp_min(0).sqrt(),
            "search_ess": size / self.pilot,
        }


def _spread(particles: Tensor, n: int) -> Tensor:
    """n of the particles `(sets, N, dim)` that are far from each other: each next one is the farthest from those taken.

    Drawn by weight, a place that holds one particle of the set would mostly be left out; here it is among the first.
    Distances are in units of the set's covariance (Gonzalez, Theoretical Computer Science 38, 1985).
    """
    dim = particles.shape[2]
    x = torch.nan_to_num(particles.double())
    x = x - x.mean(1, keepdim=True)
    C = x.mT @ x / x.shape[1]
    C = C + (0.01 * C.diagonal(dim1=1, dim2=2) + 1e-12)[..., None] * torch.eye(dim, dtype=C.dtype, device=C.device)
    y = torch.linalg.solve_triangular(torch.linalg.cholesky(C), x.mT, upper=False).mT
    taken = [torch.zeros(len(y), dtype=torch.long, device=y.device)]
    sets = torch.arange(len(y), device=y.device)
    nearest = y.new_full(y.shape[:2], math.inf)
    for _ in range(n - 1):
        nearest = torch.minimum(nearest, (y - y[sets, taken[-1]][:, None]).square().sum(2))
        taken.append(nearest.argmax(1))
    return particles[sets[:, None], torch.stack(taken, 1)]


_FEW = 20.0  # effective pilot draws below which a run warns


def _observations(rng: Streams) -> int:
    return len({o for o, _ in rng.items})


def _put(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}_{n}": v for n, v in state.items()}


def _take(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(f"{prefix}_"): v for n, v in state.items() if n.startswith(f"{prefix}_")}
