r"""Parallel tempering: a ladder of chains from the prior to the posterior that exchange their positions.

    p_t(q) ∝ exp(−t Φ(q)) N(q; 0, I),      0 = t_0 < t_1 < … < t_K = 1,      Φ = −log p(d | g(f(z)), θ)

Neighbours swap with min(1, exp((t_{k+1} − t_k)(Φ_{k+1} − Φ_k))): what was found where the likelihood is weak, modes that
are far apart, travels to t = 1. Swapping all even pairs, then all odd pairs, and so on, carries positions along the ladder
instead of letting them diffuse; the rate of round trips tends to 1/(2 + 2 Λ) with Λ the sum of the rejection rates, the
communication barrier, however many levels there are.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from invgen.contracts import HasLatent
from invgen.solvers._chain import Chain, _leaders, groups, pooled_mean
from invgen.solvers._target import Target
from invgen.solvers._tempered import (
    EXPLORERS,
    check_tempered,
    explorer_of,
    leapfrog,
    log_constant,
    walk,
    widened,
)

if TYPE_CHECKING:
    from invgen.driver import Streams
    from invgen.problem import InverseProblem

__all__ = ["ParallelTempering"]

_TRIES = 20  # draws of the prior until a start has a finite likelihood
_BLOCKS = 8  # stretches of the run whose evidence is kept apart, for its error
_POWER = (
    4.0  # first ladder t = (k/K)^4, and the coordinate in which it is interpolated: likelihoods fall off fast near 0
)


@dataclass(frozen=True)
class ParallelTempering(Chain):
    r"""Non-reversible parallel tempering (Syed, Bouchard-Côté, Deligiannidis & Doucet 2022). Targets the exact posterior.

    Each item is a ladder of `temperatures` replicas with its own swaps, and its chain is what stands at t = 1. A step:
    every replica makes `sweeps` moves on its p_t, then the even pairs (odd pairs at odd steps) may swap: the DEO scheme
    of the paper (algorithm 1). The replica at t = 0 is drawn anew from N(0, I). In the warm-up the ladder is moved at
    1/16, 1/8, 1/4 and 1/2 of it so that all rejection rates are equal (section 5.3: the levels cut the cumulated rejection
    into equal parts; between levels it is interpolated linearly in t^(1/4) where the paper uses a monotone cubic in t),
    and each level has its own step; both are pooled over the chains of an observation, and fixed afterwards.

    The evidence is the product of bridges between neighbours (Meng & Wong 1996, geometric bridge; a stepping stone, Xie
    et al. 2011, from both sides),

        Z_{k+1}/Z_k = E_k[exp(−½ Δ Φ)] / E_{k+1}[exp(½ Δ Φ)],        Δ = t_{k+1} − t_k,        log p(d) = Σ_k log Z_{k+1}/Z_k.

    Args:
        draws, warmup, thin, superchains: as for every chain. starts: "prior": each replica from its own draw of the
            prior; positions: all replicas of an item at its position.
        temperatures: levels, t = 0 and t = 1 included; about 2 Λ of them are best (`stats["barrier"]`).
        explorer: "pcn" (no derivatives), "hmc" (a few leapfrog steps; one of them is MALA) or "auto": hmc where every
            operator has a gradient.
        sweeps: moves between swaps. leaps: leapfrog steps of a trajectory.
        step_size: the first, of all levels, β of pcn or the angle h of a leap.
        target: acceptance the warm-up aims at; 0.3 for pcn and 0.8 for hmc when omitted.

    Assumes a latent space (the path starts at N(0, I)); a prior with a density alone is refused.

    Returns with the draws: `log_evidence`; stats `accept` (at t = 1), `temperature` (the ladder) and `swap` (acceptance of
    each pair), `barrier` Λ, `round_trips` (from t = 0 to t = 1 and back, after the warm-up), `log_evidence_error` (standard
    error from the spread of chains, or of eighths of the run where there are fewer than eight chains), `invalid`. A warning
    tells of a run without a round trip.

    Cost: temperatures · sweeps decodes and forwards a step for "pcn", times `leaps` and with as many gradients for "hmc".
    References: Journal of the Royal Statistical Society B 84, 2022, arXiv:1905.02939; Meng & Wong, Statistica Sinica 6, 1996.
    """

    needs: ClassVar[tuple[Any, ...]] = (HasLatent,)
    derivative_free: ClassVar[bool] = True

    temperatures: int = 12
    explorer: str = "auto"
    sweeps: int = 1
    leaps: int = 3
    step_size: float = 0.3
    target: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("temperatures", 2), ("sweeps", 1), ("leaps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"ParallelTempering needs {name} of at least {least}, got {getattr(self, name)}.")
        if self.explorer not in EXPLORERS:
            raise ValueError(f"ParallelTempering takes an explorer of {EXPLORERS}, got {self.explorer!r}.")
        if not 0 < self.step_size <= 1 or (self.target is not None and not 0 < self.target < 1):
            raise ValueError(
                f"ParallelTempering needs step_size in (0, 1] and target in (0, 1) or None, got {self.step_size}, {self.target}."
            )
        if self.space == "u":
            raise ValueError("ParallelTempering starts its path at N(0, I) of latent coordinates; leave space out.")

    @classmethod
    def examples(cls) -> list[ParallelTempering]:
        """Short runs of both explorers."""
        return [
            cls(draws=6, warmup=16, thin=2, temperatures=4, explorer="pcn"),
            cls(draws=6, warmup=16, temperatures=3, explorer="hmc", sweeps=2),
        ]

    @classmethod
    def exam(cls) -> dict[str, ParallelTempering]:
        """Both explorers: label -> solver."""
        return {
            "hmc": cls(draws=1000, warmup=1000, temperatures=10, explorer="hmc", leaps=6),
            "pcn": cls(draws=1000, warmup=2000, thin=5, temperatures=12, explorer="pcn", sweeps=4),
        }

    def check(self, problem: InverseProblem) -> None:
        check_tempered(self, problem, self.explorer)
        super().check(problem)

    def begin(self, target: Target, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        z, K = state["z"], self.temperatures
        wide = widened(target, rng, K)
        q = rng.normal((K, target.dim), dtype=z.dtype, tag="ladder")
        q = z[:, None].expand_as(q) if isinstance(self.starts, Tensor) else torch.cat([q[:, :-1], z[:, None]], 1)
        phi = wide.value(q.flatten(0, 1)).reshape(-1, K)
        for _ in range(_TRIES):
            bad = ~torch.isfinite(phi)
            if not bool(bad.any()):
                break
            q = torch.where(bad[..., None], rng.normal((K, target.dim), dtype=z.dtype, tag="ladder"), q)
            phi = wide.value(q.flatten(0, 1)).reshape(-1, K)
        alive = torch.isfinite(z).all(1)[:, None]
        usable = alive & torch.isfinite(phi)  # a replica without a likelihood begins where its chain does
        q = torch.where(usable[..., None], q, z[:, None])
        if self.superchains is not None:
            q = q[torch.tensor(_leaders(rng, self.superchains), device=q.device)]
        found = {"replicas": q, "levels_phi": z.new_full((len(z), K), math.nan)}
        if explorer_of(target.problem, self.explorer) == "hmc":
            phi, slope = wide.value_and_grad(q.flatten(0, 1))
            found["slope"] = slope.reshape(q.shape)
        else:
            phi = wide.value(q.flatten(0, 1))
        found["levels_phi"] = phi.reshape(-1, K)
        ladder = torch.linspace(0, 1, K, dtype=torch.float64, device=z.device).pow(_POWER)
        first: dict[int, int] = {}
        zeros = torch.zeros(len(z), K - 1, dtype=torch.float64, device=z.device)
        return found | {
            "ladder": ladder.expand(len(z), K).clone(),
            "log_step": z.new_full((len(z), K), math.log(self.step_size)),
            "rejected": zeros,  # since the ladder was last moved, or since the warm-up
            "swapped": zeros.clone(),
            "stones": zeros.new_full((len(z), 2, _BLOCKS, K - 1), -math.inf),
            "journey": torch.zeros(len(z), K, dtype=torch.long, device=z.device),  # 1 from the prior, 2 back from t = 1
            "trips": z.new_zeros(len(z)),
            "owner": torch.tensor([first.setdefault(o, len(first)) for o, _ in rng.items], device=z.device),
        }

    def move(
        self, target: Target, state: dict[str, Tensor], rng: Streams, clock: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        K = self.temperatures
        state = dict(state)
        invalid = torch.zeros_like(state["phi"])
        accepted = torch.zeros_like(state["phi"])
        for _ in range(self.sweeps):
            chance, failed = self._explore(target, state, rng, clock)
            accepted = accepted + chance[:, -1] / self.sweeps
            invalid = invalid + failed.reshape(-1, K)[:, -1].to(invalid) / self.sweeps
        self._exchange(state, rng, clock)
        new = {k: v for k, v in state.items() if not k.startswith("kept") and k not in ("clock", "invalid")}
        new |= {"z": state["replicas"][:, -1], "phi": state["levels_phi"][:, -1]}
        return new, {"accept": accepted, "invalid": invalid}

    def _explore(self, target: Target, state: dict[str, Tensor], rng: Streams, clock: int) -> tuple[Tensor, Tensor]:
        """One move of every replica, and the step sizes."""
        q, K = state["replicas"], self.temperatures
        wide, t = widened(target, rng, K), state["ladder"].to(q)
        uniform = rng.uniform((K,), dtype=q.dtype, tag="accept").flatten()
        xi = rng.normal((K, target.dim), dtype=q.dtype, tag="explore").flatten(0, 1)
        given = (q.flatten(0, 1), state["levels_phi"].flatten())
        bottom = torch.arange(K, device=q.device) == 0
        if "slope" in state:
            jitter = 0.5 + 0.5 * rng.uniform((K,), dtype=q.dtype, tag="jitter")
            quarter = 0.5 * math.pi / self.leaps  # at t = 0 a quarter turn is an independent draw
            h = torch.where(bottom, quarter, (state["log_step"].exp() * jitter).clamp_max(quarter))
            moved = leapfrog(
                wide, None, *given, state["slope"].flatten(0, 1), t.flatten(), h.flatten(), xi, uniform, self.leaps
            )
            assert moved.slope is not None
            state["slope"] = moved.slope.reshape(q.shape)
            goal, most = 0.8, math.log(quarter)
        else:
            beta = torch.where(bottom, 1.0, state["log_step"].exp())
            moved = walk(wide, None, *given, t.flatten(), beta.flatten(), xi, uniform)
            goal, most = 0.3, 0.0
        state["replicas"], state["levels_phi"] = moved.q.reshape(q.shape), moved.phi.reshape(-1, K)
        chance = moved.chance.reshape(-1, K)
        if clock < self.warmup:
            living = torch.where(torch.isfinite(state["replicas"]).all(2), chance, math.nan)
            error = pooled_mean(living, groups(rng)) - (goal if self.target is None else self.target)
            gain = 1 / math.sqrt(1.0 + clock - max((s for s in self._moments() if s <= clock), default=0))
            state["log_step"] = (state["log_step"] + gain * error).clamp_max(most)
        return chance, moved.invalid

    def _moments(self) -> list[int]:
        """Steps after which the ladder is moved."""
        return sorted({self.warmup >> k for k in range(1, 5)} - {0})

    def _exchange(self, state: dict[str, Tensor], rng: Streams, clock: int) -> None:
        """Swaps, the figures they give, and the ladder."""
        K, phi, ladder = self.temperatures, state["levels_phi"].double(), state["ladder"]
        gap = ladder.diff(dim=1)
        chance = torch.nan_to_num(gap * phi.diff(dim=1), nan=-math.inf).clamp_max(0).exp()
        state["rejected"] = state["rejected"] + (1 - chance)
        if clock >= self.warmup:
            block = (clock - self.warmup) * _BLOCKS // (self.draws * self.thin)
            state["swapped"] = state["swapped"] + chance
            stones = state["stones"].clone()
            ends = torch.stack([-0.5 * gap * phi[:, :-1], 0.5 * gap * phi[:, 1:]], 1)
            stones[:, :, block] = torch.logaddexp(stones[:, :, block], ends)
            state["stones"] = stones
        uniform = rng.uniform((K - 1,), dtype=torch.float64, tag="swap")
        turn = torch.arange(K - 1, device=phi.device) % 2 == clock % 2
        swap = turn & (uniform < chance)
        place = torch.arange(K, device=phi.device).expand_as(phi).clone()
        place[:, :-1] += swap.long()
        place[:, 1:] -= swap.long()
        for name in ("replicas", "levels_phi", "slope", "journey"):
            if name in state:
                values = state[name]
                index = place[..., None].expand_as(values) if values.ndim == 3 else place
                state[name] = values.gather(1, index)
        journey = state["journey"].clone()
        if clock >= self.warmup:
            state["trips"] = state["trips"] + (journey[:, 0] == 2)
        journey[:, -1] = torch.where(journey[:, -1] == 1, 2, journey[:, -1])
        journey[:, 0] = 1
        if clock + 1 == self.warmup:
            journey.zero_()
        state["journey"] = journey
        if clock < self.warmup and clock + 1 in self._moments():
            steps = clock + 1 - max((s for s in self._moments() if s <= clock), default=0)
            rate = torch.where(torch.isnan(phi).any(1, keepdim=True), math.nan, state["rejected"] / steps)
            state["ladder"] = _equalised(ladder, pooled_mean(rate, groups(rng)))
            state["rejected"] = torch.zeros_like(state["rejected"])

    def report(self, target: Target, state: dict[str, Tensor]) -> dict[str, Tensor]:
        done = self.finished_draws(state)
        steps = max(1, int(state["clock"]) - self.warmup)
        rates = state["swapped"] / steps
        evidence, error = _evidence(state, log_constant(target.problem))
        alive = torch.isfinite(state["replicas"]).flatten(1).all(1)
        if steps >= 200 and float(state["trips"][alive].sum()) == 0 and bool(alive.any()):
            warnings.warn(
                f"ParallelTempering: no replica went from the prior to the posterior and back in {steps} steps of {int(alive.sum())} chains, so modes may be missing or wrongly weighed; the barrier is {float((1 - rates[alive]).sum(1).mean()):.1f}: take about twice as many temperatures, and more draws.",
                stacklevel=2,
            )

        def each_draw(v: Tensor) -> Tensor:
            return v[:, None].expand(-1, done, -1)

        return {
            "log_evidence": evidence,
            "stat_log_evidence_error": error,
            "stat_swap": each_draw(rates),
            "stat_temperature": each_draw(state["ladder"]),
            "stat_barrier": (1 - rates).sum(1),
            "stat_round_trips": state["trips"],
        }


def _equalised(ladder: Tensor, rejected: Tensor) -> Tensor:
    """The levels that cut the cumulated rejection into equal parts, `(batch, K)`.

    Args:
        ladder: `(batch, K)`, from 0 to 1. rejected: mean rejection of each pair, `(batch, K − 1)`.
    """
    total = torch.nn.functional.pad(rejected.clamp_min(1e-3).cumsum(1), (1, 0))
    wanted = total[:, -1:] * torch.linspace(0, 1, ladder.shape[1], dtype=ladder.dtype, device=ladder.device)
    above = torch.searchsorted(total, wanted).clamp(1, ladder.shape[1] - 1)
    low, high = total.gather(1, above - 1), total.gather(1, above)
    s = ladder.pow(1 / _POWER)
    found = torch.lerp(s.gather(1, above - 1), s.gather(1, above), (wanted - low) / (high - low)).pow(_POWER)
    found[:, 0], found[:, -1] = 0.0, 1.0
    return found


def _evidence(state: dict[str, Tensor], constant: float) -> tuple[Tensor, Tensor]:
    """log p(d) and its standard error, `(batch,)` each, from the sums of exp(∓½ Δ Φ)."""
    stones, owner = state["stones"], state["owner"]
    used = torch.isfinite(stones[:, 0, :, 0]).any(0) | torch.isfinite(stones[:, 1, :, 0]).any(0)
    evidence = torch.full((len(stones),), math.nan, dtype=stones.dtype, device=stones.device)
    error = evidence.clone()
    for o in range(int(owner.max()) + 1):
        mine = owner == o
        alive = mine & torch.isfinite(state["replicas"]).flatten(1).all(1)
        sums = stones[alive][:, :, used]  # (chains, 2, blocks, K − 1)
        if not sums.numel():
            continue
        if len(sums) >= _BLOCKS:  # chains do not know of one another: the best units
            sums = sums.logsumexp(2, keepdim=True)
        units = sums.transpose(1, 2).flatten(0, 1)  # (units, 2, K − 1)
        total = units.logsumexp(0)  # as many terms below as above: their number cancels
        evidence[mine] = (total[0] - total[1]).sum() + constant
        share = (units - total).exp() * len(units)
        if len(units) > 1:
            error[mine] = (share[:, 0] - share[:, 1]).sum(1).std() / math.sqrt(len(units))
    return evidence, error
