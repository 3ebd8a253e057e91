r"""Annealed sequential Monte Carlo: particles that follow the data from the prior to the posterior.

    p_t(q) ∝ exp(−t Φ(q)) N(q; 0, I),      t from 0 to 1,      Φ = −log p(d | g(f(z)), θ)

From t to t' a particle's weight is multiplied by exp(−(t' − t) Φ); where weights have become uneven particles are drawn
anew, and moves that leave p_t' invariant part them again. The mean weights multiply to Z_1/Z_0 = p(d).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from invgen.contracts import HasLatent, Solver
from invgen.solvers._particles import effective_size, normalised, pick, sets, share, systematic
from invgen.solvers._target import Target, target_of
from invgen.solvers._tempered import (
    EXPLORERS,
    Frame,
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

__all__ = ["AnnealedSMC"]

_BISECTIONS = 50  # of the next temperature
_SWEEPS = 50  # the most moves at one temperature where their number is adapted
_GAIN = 0.5  # of the step's adaptation: all particles of a set are averaged, so that one sweep tells much
_FULL = 10  # particles of a set for each dimension from which a full covariance is trusted


@dataclass(frozen=True)
class AnnealedSMC(Solver):
    r"""SMC sampler with adaptive temperatures (Del Moral, Doucet & Jasra 2006). Targets the exact posterior as particles → ∞.

    The next temperature is the largest t' ≤ 1 at which the conditional effective size

        CESS = N (Σ_j W_j w_j)² / Σ_j W_j w_j²,      w_j = exp(−(t' − t) Φ_j),

    is at least `cess` times N (Zhou, Johansen & Aston 2016, equation 3.16), found by bisection for each observation.
    Particles are resampled (systematic) where their effective size is below `threshold` N. Each temperature ends with
    moves on p_t': a preconditioned random walk or a Hamiltonian trajectory in the frame N(m, C) of the particles' own
    mean and covariance (a diagonal C where particles are fewer than ten a dimension), with a step that follows their mean
    acceptance. Each half of the particles moves in the frame of the other half: a frame fitted to the very particles that it
    moves draws them together, and biases the evidence by +0.3 to +0.5 with 256 particles in 16 dimensions.

    The particles of an observation interact by design: the `num_samples` draws come from one set of at least `particles`
    (rounded up to a multiple of num_samples). Temperatures, moves and steps adapted to the particles leave a bias of order
    1/N in moments and evidence (Beskos, Jasra, Kantas & Thiery 2016).

    A step of the run is one sweep of moves; an observation that has reached t = 1 and made its moves there rests. `steps`
    bounds the sweeps: when one does not arrive it says so, its draws belong to the temperature in `stats["temperature"]`,
    and its evidence is NaN.

    Args:
        particles: of an observation. cess: see above. threshold: effective size over particles that triggers resampling.
        explorer: "pcn" (no derivatives), "hmc" or "auto": hmc where every operator has a gradient.
        moves: sweeps at each temperature, or None: until the mean correlation of the coordinates with where they
            were before the moves is below `correlation`, at most 50 (Kantas, Beskos & Jasra 2014, section 5.3).
        correlation: see moves. leaps: leapfrog steps of a trajectory.
        step_size: the first β or angle h of a leap. target: mean acceptance; 0.3 for pcn and 0.8 for hmc when omitted.
        steps: the most sweeps.

    Returns with the draws: `log_evidence`; stats `ess` at the end and `ess_min`, `ancestors` (of how many first particles
    the last ones descend, effectively), `log_evidence_error` (√(Σ_a W_a² − 1/N), W_a the weight of all that descend from a: the
    estimate of Lee & Whiteley 2018 for resampling that does not spread families by itself; rough), `temperatures` and
    `sweeps` used, `accept` of the last sweep, `temperature`, `particle`.

    Cost: particles · sweeps decodes and forwards ("hmc": times `leaps`, with gradients); one device synchronisation a
    step. Assumes a latent space: particles begin as draws of N(0, I).
    References: Journal of the Royal Statistical Society B 68, 2006; Journal of Computational and Graphical Statistics 25,
    2016, arXiv:1303.3123; Annals of Applied Probability 26, 2016; SIAM/ASA J. Uncertainty Quantification 2, 2014;
    Biometrika 105, 2018, arXiv:1509.00394.
    """

    needs: ClassVar[tuple[Any, ...]] = (HasLatent,)
    kind: ClassVar[str] = "exact"
    pooled: ClassVar[bool] = True
    derivative_free: ClassVar[bool] = True

    particles: int = 2048
    cess: float = 0.9
    threshold: float = 0.5
    explorer: str = "auto"
    moves: int | None = None
    correlation: float = 0.2
    leaps: int = 3
    step_size: float = 0.5
    target: float | None = None
    steps: int = 1000

    def __post_init__(self) -> None:
        for name, least in (("particles", 2), ("leaps", 1), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"AnnealedSMC needs {name} of at least {least}, got {getattr(self, name)}.")
        if self.moves is not None and self.moves < 1:
            raise ValueError(f"AnnealedSMC needs moves of at least 1, or None to adapt them, got {self.moves}.")
        if self.explorer not in EXPLORERS:
            raise ValueError(f"AnnealedSMC takes an explorer of {EXPLORERS}, got {self.explorer!r}.")
        if not (
            0 < self.cess < 1 and 0 <= self.threshold <= 1 and 0 < self.correlation < 1 and 0 < self.step_size <= 1
        ):
            raise ValueError(
                f"AnnealedSMC needs cess and correlation in (0, 1), threshold in [0, 1] and step_size in (0, 1], got {self.cess}, {self.correlation}, {self.threshold}, {self.step_size}."
            )
        if self.target is not None and not 0 < self.target < 1:
            raise ValueError(f"AnnealedSMC aims at an acceptance in (0, 1), got {self.target}.")

    @classmethod
    def examples(cls) -> list[AnnealedSMC]:
        """Small sets, both explorers."""
        return [
            cls(particles=64, explorer="pcn", cess=0.5, moves=2, steps=60),
            cls(particles=48, explorer="hmc", cess=0.5, moves=1, steps=60),
        ]

    @classmethod
    def exam(cls) -> dict[str, AnnealedSMC]:
        """Both explorers: label -> solver."""
        return {"hmc": cls(particles=4096, explorer="hmc"), "pcn": cls(particles=8192, explorer="pcn", correlation=0.1)}

    def check(self, problem: InverseProblem) -> None:
        check_tempered(self, problem, self.explorer)

    def num_steps(self, problem: InverseProblem) -> int:
        return self.steps

    def init(self, problem: InverseProblem, rng: Streams) -> dict[str, Tensor]:
        target, each = target_of(problem, "z"), share(self.particles, rng)
        n_sets, items = sets(rng)
        each += items * each % 2  # two halves
        wide = widened(target, rng, each)
        q = rng.normal((each, target.dim), dtype=problem.dtype, tag="particles")
        state: dict[str, Tensor] = {}
        if explorer_of(problem, self.explorer) == "hmc":
            phi, slope = wide.value_and_grad(q.flatten(0, 1))
            state["slope"] = slope.reshape(q.shape)
        else:
            phi = wide.value(q.flatten(0, 1))
        zero = q.new_zeros(n_sets, dtype=torch.float64)
        equal = q.new_full((n_sets, items * each), 1 / (items * each))
        frame = _frame(q.reshape(n_sets, -1, target.dim), equal)
        return state | {
            "particles": q,
            "phi": torch.where(torch.isnan(phi), math.inf, phi).reshape(-1, each),
            "log_weights": q.new_zeros((len(rng), each), dtype=torch.float64),
            "ancestor": torch.arange(items * each, device=q.device).reshape(items, each).repeat(n_sets, 1),
            "origin": frame.inverse(q.flatten(0, 1)).reshape(q.shape),
            "mean": frame.mean,
            "factor": frame.factor,
            "k": torch.zeros((), dtype=torch.long),
            "t": zero,
            "moved": torch.ones(n_sets, dtype=torch.bool, device=q.device),  # the moves at this temperature are made
            "age": zero.clone(),
            "log_step": zero + math.log(self.step_size),
            "accept": zero + math.nan,
            "log_evidence": zero.clone(),
            "resamplings": zero.clone(),
            "temperatures": zero.clone(),
            "sweeps": zero.clone(),
            "ess_min": zero + items * each,
        }

    def step(self, problem: InverseProblem, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        state = dict(state)
        last = int(state["k"]) + 1 >= self.steps
        state["k"] = state["k"] + 1
        resting = state["moved"] & ((state["t"] >= 1) | torch.isnan(state["log_evidence"]))
        if not bool(resting.all()):  # the one device synchronisation of a step
            self._temper(state, rng)
            self._sweep(target_of(problem, "z"), state, rng, ~resting)
        if last:
            self._draw(problem, state, rng)
        return state

    def _temper(self, state: dict[str, Tensor], rng: Streams) -> None:
        """The next temperature of the sets whose moves are made: weights, evidence, resampling, frame."""
        n_sets = len(state["t"])
        due = state["moved"] & (state["t"] < 1)
        phi = state["phi"].reshape(n_sets, -1).double()
        weights, _ = normalised(state["log_weights"].reshape(n_sets, -1))
        delta = torch.where(due, _next(weights, phi, 1 - state["t"], self.cess), 0.0)
        gain = torch.where(due[:, None], -delta[:, None] * phi, 0.0)
        # one ulp short of 1 would cost a temperature
        t = torch.where(delta >= 1 - state["t"], 1.0, state["t"] + delta)
        increment = (weights.log() + gain).logsumexp(1)
        logs = state["log_weights"].reshape(n_sets, -1) + gain
        weights, _ = normalised(logs)
        size, n = effective_size(weights), weights.shape[1]
        renew = due & (size < self.threshold * n)
        offset = rng.uniform((), dtype=torch.float64, tag="resample").reshape(n_sets, -1)[:, 0].to(weights)
        kept = torch.arange(n, device=phi.device).expand_as(weights)
        chosen = torch.where(renew[:, None], systematic(torch.nan_to_num(weights), offset, n), kept)
        for name in ("particles", "phi", "slope", "ancestor"):
            if name in state:
                state[name] = pick(state[name], chosen).reshape(state[name].shape)
        logs = torch.where(renew[:, None], 0.0, logs)
        state |= {
            "t": t,
            # a set without a finite weight is lost
            "log_evidence": state["log_evidence"] + torch.where(torch.isfinite(increment), increment, math.nan),
            "log_weights": logs.reshape(state["log_weights"].shape),
            "ess_min": torch.where(due, torch.minimum(state["ess_min"], size), state["ess_min"]),
            "resamplings": state["resamplings"] + renew,
            "temperatures": state["temperatures"] + due,
            "age": torch.where(due, 0.0, state["age"]),
            "moved": torch.where(due, torch.isnan(increment) | torch.isinf(increment), state["moved"]),
        }
        flat = state["particles"].reshape(n_sets, n, -1)
        found = _frame(flat, normalised(logs)[0].to(flat))
        both = due.repeat_interleave(2)
        state["mean"] = torch.where(both[:, None], found.mean, state["mean"])
        wide = both.reshape(-1, *(1,) * (found.factor.ndim - 1))
        state["factor"] = torch.where(wide, found.factor, state["factor"])
        y = Frame(state["mean"], state["factor"]).inverse(flat.flatten(0, 1)).reshape(flat.shape)
        origin = state["origin"].reshape(flat.shape)
        state["origin"] = torch.where(due[:, None, None], y, origin).reshape(state["origin"].shape)

    def _sweep(self, target: Target, state: dict[str, Tensor], rng: Streams, awake: Tensor) -> None:
        """One move of every particle of the sets that are awake, and whether they have moved enough."""
        q = state["particles"]
        n_sets, each = len(state["t"]), q.shape[1]
        n = q.shape[0] * each // n_sets
        frame, wide = Frame(state["mean"], state["factor"]), widened(target, rng, each)
        uniform = rng.uniform((each,), dtype=q.dtype, tag="accept").flatten()
        xi = rng.normal((each, target.dim), dtype=q.dtype, tag="move").flatten(0, 1)
        t, size = (v.to(q).repeat_interleave(n) for v in (state["t"], state["log_step"].exp()))
        given = (q.flatten(0, 1), state["phi"].flatten())
        if "slope" in state:
            jitter = 0.5 + 0.5 * rng.uniform((each,), dtype=q.dtype, tag="jitter").flatten()
            goal, most = 0.8, 0.5 * math.pi / self.leaps
            moved = leapfrog(
                wide, frame, *given, state["slope"].flatten(0, 1), t, size * jitter, xi, uniform, self.leaps
            )
        else:
            goal, most = 0.3, 1.0
            moved = walk(wide, frame, *given, t, size, xi, uniform)
        on = awake.repeat_interleave(n)
        state["particles"] = torch.where(on[:, None], moved.q, given[0]).reshape(q.shape)
        state["phi"] = torch.where(on, moved.phi, given[1]).reshape(-1, each)
        if moved.slope is not None:
            state["slope"] = torch.where(on[:, None], moved.slope, state["slope"].flatten(0, 1)).reshape(q.shape)
        accept = moved.chance.reshape(n_sets, -1).mean(1).double()
        goal = goal if self.target is None else self.target
        log_step = (state["log_step"] + _GAIN * (accept - goal)).clamp_max(math.log(most))
        age = state["age"] + 1
        if self.moves is None:
            here = frame.inverse(state["particles"].flatten(0, 1)).reshape(n_sets, n, -1)
            enough = (_correlation(here, state["origin"].reshape(here.shape)) < self.correlation) | (age >= _SWEEPS)
        else:
            enough = age >= self.moves
        state |= {
            "log_step": torch.where(awake, log_step, state["log_step"]),
            "accept": torch.where(awake, accept, state["accept"]),
            "age": torch.where(awake, age, state["age"]),
            "sweeps": state["sweeps"] + awake,
            "moved": torch.where(awake, enough, state["moved"]),
        }

    def _draw(self, problem: InverseProblem, state: dict[str, Tensor], rng: Streams) -> None:
        """One particle for every item, and the figures of the run."""
        n_sets, items = sets(rng)
        weights, _ = normalised(state["log_weights"].reshape(n_sets, -1))
        offset = rng.uniform((), dtype=torch.float64, tag="draw").reshape(n_sets, -1)[:, 0].to(weights)
        chosen = systematic(torch.nan_to_num(weights), offset, items)
        z = pick(state["particles"], chosen)
        size, n = effective_size(weights), weights.shape[1]
        lost = torch.isnan(state["log_evidence"])
        families = torch.zeros_like(weights).scatter_add(1, state["ancestor"].reshape(n_sets, -1), weights)
        concentration = families.square().sum(1)
        # a multinomial draw would spread families by 1/N more each time; systematic resampling hardly does
        variance = (concentration - 1 / n).clamp_min(0)
        arrived = state["t"] >= 1
        evidence = torch.where(arrived, state["log_evidence"] + log_constant(problem), math.nan)
        state["z"] = torch.where(lost.repeat_interleave(items)[:, None], math.nan, z)
        figures = {
            "log_evidence": evidence,
            "stat_log_evidence_error": variance.sqrt(),
            "stat_ess": size,
            "stat_ess_min": torch.minimum(state["ess_min"], size),
            "stat_ancestors": 1 / concentration,
            "stat_temperature": state["t"],
            "stat_temperatures": state["temperatures"],
            "stat_sweeps": state["sweeps"],
            "stat_accept": state["accept"],
        }
        for name, value in figures.items():
            state[f"out_{name}"] = value.repeat_interleave(items)
        state["out_stat_particle"] = chosen.flatten()
        short = ~arrived & ~lost
        if bool(short.any()):
            warnings.warn(
                f"AnnealedSMC: {int(short.sum())} of {n_sets} observations reached only the temperature {float(state['t'][short].min()):.3g} in {self.steps} steps, so their draws are wider than the posterior and have no evidence; raise steps, or lower cess or moves.",
                stacklevel=2,
            )
        related = arrived & ~lost & (1 / concentration < 4)
        if n >= 100 and bool(related.any()):
            warnings.warn(
                f"AnnealedSMC: the particles of {int(related.sum())} of {n_sets} observations descend from fewer than four of the first {n}; separate modes may be wrongly weighed and the evidence wrong by a factor: raise particles.",
                stacklevel=2,
            )

    def finish(self, problem: InverseProblem, state: dict[str, Tensor]) -> Mapping[str, Tensor]:
        target, z = target_of(problem, "z"), state["z"]
        x, theta = target.physical(z)
        return {
            "x": x,
            "latent": z[:, : target.model_dim].reshape(-1, *target.model_shape),
            **{f"theta_{n}": v for n, v in theta.items()},
            **{k.removeprefix("out_"): v for k, v in state.items() if k.startswith("out_")},
        }


def _next(weights: Tensor, phi: Tensor, most: Tensor, cess: float) -> Tensor:
    """The largest step of the temperature, `(sets,)`, with CESS ≥ cess N among particles of finite Φ.

    Args:
        weights, phi: `(sets, N)`. most: what is left to 1, `(sets,)`.
    """
    finite = torch.isfinite(phi)
    w = torch.where(finite, weights, 0.0)
    w = w / w.sum(1, keepdim=True)
    base = torch.where(finite, phi, math.inf).amin(1, keepdim=True)
    relative = torch.where(finite, phi - base, 0.0)

    def enough(step: Tensor) -> Tensor:
        gain = (-step[:, None] * relative).exp()
        return (w * gain).sum(1).square() >= cess * (w * gain.square()).sum(1)

    low, high = torch.zeros_like(most), most.clone()
    low = torch.where(enough(high), high, low)
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        good = enough(middle)
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return low


def _frame(q: Tensor, weights: Tensor) -> Frame:
    """Frames of both halves of each set, `(2 · sets, …)`: mean and covariance of the *other* half's weighted particles.

    Args:
        q: `(sets, N, dim)`. weights: `(sets, N)`, normalised. The covariance is diagonal where N is small.
    """
    n_sets, n, dim = q.shape
    q = q.reshape(n_sets, 2, -1, dim).flip(1).flatten(0, 1)
    w = torch.nan_to_num(weights).reshape(n_sets, 2, -1).flip(1).flatten(0, 1)
    w = w / w.sum(1, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny)
    mean = (w[..., None] * q).sum(1)
    centred = q - mean[:, None]
    w = w / (1 - w.square().sum(1, keepdim=True)).clamp_min(1e-3)  # as n/(n − 1) for equal weights
    variance = (w[..., None] * centred.square()).sum(1).clamp_min(1e-12)
    if n < _FULL * dim:
        return Frame(mean, variance.sqrt())
    covariance = (w[..., None] * centred).mT @ centred
    # a set whose particles are copies has no covariance of full rank
    factor, failed = torch.linalg.cholesky_ex(torch.nan_to_num(covariance) + 1e-6 * torch.diag_embed(variance))
    return Frame(mean, torch.where((failed == 0)[:, None, None], factor, torch.diag_embed(variance.sqrt())))


def _correlation(now: Tensor, before: Tensor) -> Tensor:
    """Mean over coordinates of the correlation of `(sets, N, dim)` with itself before, `(sets,)`."""
    a, b = now - now.mean(1, keepdim=True), before - before.mean(1, keepdim=True)
    norm = (a.square().sum(1) * b.square().sum(1)).sqrt().clamp_min(torch.finfo(a.dtype).tiny)
    return ((a * b).sum(1) / norm).mean(1).double()
