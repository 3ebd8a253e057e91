r"""What particle samplers share: weights, effective sample size, systematic resampling, evidence.

N weighted particles stand for one law: Σ_j W_j δ(u_j), with normalised weights W. They are kept in two axes,
`(items, share, …)`: item (o, s) of the run owns `share` = ⌈particles/num_samples⌉ particles of its observation o, with
its own stream of noise, and all num_samples · share particles of an observation are one set. Sets do not touch.

- Effective sample size 1/Σ W_j² (Kong, Liu & Wong 1994): N for equal weights, 1 when one particle holds all.
- Systematic resampling (Kitagawa 1996): draw j takes the particle at (j + U)/n of the cumulated weights, one U ~ U(0, 1)
  a set. Particle j is taken ⌊n W_j⌋ or ⌈n W_j⌉ times and n W_j times on average; order is kept, so that neighbours stay
  relatives and every stretch of the set keeps its share: less noise than n independent draws.
- Evidence: the product over resampling times of the mean weight since the last one; unbiased for p(d).
- Ancestors: 1/Σ_a W_a², W_a the weight of all particles that descend from particle a of the start. The effective sample
  size is that of one moment, and equal weights say nothing of a set whose particles are all cousins; 1/ancestors is about
  the relative variance of the evidence (Lee & Whiteley 2018, arXiv:1509.00394), and the last particles are hardly better
  unless the chain forgets where it started.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from invgen.driver import Streams, default_chunk
from invgen.problem import InverseProblem

__all__: list[str] = []

State = dict[str, Tensor]


def share(particles: int, rng: Streams) -> int:
    """Particles of an item: what makes the set of an observation at least `particles` large."""
    return -(-particles // sets(rng)[1])


def sets(rng: Streams) -> tuple[int, int]:
    """(observations, items of each) of a chunk, which holds whole observations."""
    observations = len({o for o, _ in rng.items})
    return observations, len(rng) // observations


def owners(problem: InverseProblem, items: int, each: int) -> Tensor:
    """Row of the data that each of items · each particles explains; one row serves all where there is one."""
    data = problem.linear_gaussian("u").data
    rows = (
        torch.arange(items, device=data.device)
        if data.shape[0] > 1
        else torch.zeros(items, dtype=torch.long, device=data.device)
    )
    return rows.repeat_interleave(each)


def normalised(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weights that sum to one and log of the mean weight.

    Args:
        log_weights: `(sets, particles)`; NaN and infinite ones weigh nothing.

    Returns:
        `(sets, particles)`, NaN for a set without any finite weight, and `(sets,)`.
    """
    finite = torch.where(torch.isfinite(log_weights), log_weights, -math.inf)
    total = finite.logsumexp(1)
    return (finite - total[:, None]).exp(), total - math.log(log_weights.shape[1])


def effective_size(weights: Tensor) -> Tensor:
    """1/Σ W² of normalised weights `(sets, particles)`, `(sets,)`."""
    return 1 / weights.square().sum(1)


def systematic(weights: Tensor, offset: Tensor, draws: int) -> Tensor:
    """Indices `(sets, draws)` of particles, in rising order, by systematic resampling.

    Args:
        weights: `(sets, particles)`, normalised. offset: U in [0, 1), `(sets,)`.
    """
    steps = weights.cumsum(1)
    steps = steps / steps[:, -1:]
    places = (torch.arange(draws, dtype=steps.dtype, device=steps.device) + offset[:, None]) / draws
    return torch.searchsorted(steps, places, right=True).clamp_max(weights.shape[1] - 1)


def pick(values: Tensor, chosen: Tensor) -> Tensor:
    """Rows of `(items, share, …)` by their index in the set, `(sets, n)` to `(sets · n, …)`."""
    n_sets = chosen.shape[0]
    size = values.shape[0] * values.shape[1] // n_sets
    start = size * torch.arange(n_sets, device=chosen.device)
    return values.flatten(0, 1)[(chosen + start[:, None]).flatten()]


def bookkeeping(rng: Streams, log_weights: Tensor) -> State:
    """The entries of a first state that every particle sampler has; log_weights `(items, share)`."""
    zero = log_weights.new_zeros(len(rng))
    n_sets, each = sets(rng)
    first = torch.arange(each * log_weights.shape[1], device=log_weights.device).reshape(each, -1)
    return {
        "log_weights": log_weights,
        "ancestor": first.repeat(n_sets, 1),
        "log_evidence": zero,
        "k": torch.zeros((), dtype=torch.long),
        "stat_ess": zero + math.prod(log_weights.shape) / sets(rng)[0],
        "stat_ess_min": zero + math.prod(log_weights.shape) / sets(rng)[0],
        "stat_resamplings": zero.clone(),
    }


def resample(state: State, rng: Streams, threshold: float, names: Iterable[str]) -> State:
    """Resample the sets whose effective size is below `threshold` times their size.

    Args:
        state: with the entries of `bookkeeping`. names: what belongs to a particle, `(items, share, …)` each.

    Returns:
        The state with particles and their ancestors picked, weights reset and evidence taken in, where that was due.
    """
    n_sets, each = sets(rng)
    weights, mean = normalised(state["log_weights"].reshape(n_sets, -1))
    size = effective_size(weights)
    due = size < threshold * weights.shape[1]  # False for a set that is lost (NaN)
    out = {
        **state,
        "stat_ess": size.repeat_interleave(each),
        "stat_ess_min": torch.minimum(state["stat_ess_min"], size.repeat_interleave(each)),
    }
    offset = rng.uniform((), dtype=torch.float64, tag="resample").reshape(n_sets, each)[:, 0].to(weights)
    if not bool(due.any()):  # the one device synchronisation of a step
        return out
    here = due[:, None]
    kept = torch.arange(weights.shape[1], device=weights.device).expand_as(weights)
    chosen = torch.where(here, systematic(weights, offset, weights.shape[1]), kept)
    for name in ("ancestor", *names):
        out[name] = pick(state[name], chosen).reshape(state[name].shape)
    gain = torch.where(due, mean, torch.zeros_like(mean)).repeat_interleave(each)
    wide = due.repeat_interleave(each)
    return {
        **out,
        "log_weights": torch.where(wide[:, None], torch.zeros_like(state["log_weights"]), state["log_weights"]),
        "log_evidence": state["log_evidence"] + gain,
        "stat_resamplings": state["stat_resamplings"] + wide.to(gain),
    }


def last_draw(solver: object, state: State, rng: Streams) -> tuple[Tensor, State]:
    """One particle for every item, and the figures of the run; warns when the particles collapsed.

    Returns:
        Indices `(sets, items of each)` in the set, and `log_evidence`, the statistics, `valid`: `(items,)` each. A set
        without a finite weight is not valid.
    """
    n_sets, each = sets(rng)
    weights, mean = normalised(state["log_weights"].reshape(n_sets, -1))
    size = effective_size(weights)
    offset = rng.uniform((), dtype=torch.float64, tag="draw").reshape(n_sets, each)[:, 0].to(weights)
    chosen = systematic(weights, offset, each)
    smallest = torch.minimum(state["stat_ess_min"].reshape(n_sets, each)[:, 0], size)
    families = torch.zeros_like(weights).scatter_add(1, state["ancestor"].reshape(n_sets, -1), weights)
    ancestors = effective_size(families)
    _warn(solver, smallest, ancestors, weights.shape[1])
    wide = size.repeat_interleave(each)
    return chosen, {
        "log_evidence": state["log_evidence"] + mean.repeat_interleave(each),
        "stat_ess": wide,
        "stat_ess_min": smallest.repeat_interleave(each),
        "stat_ancestors": ancestors.repeat_interleave(each),
        "stat_resamplings": state["stat_resamplings"],
        "stat_particle": chosen.flatten(),
        "valid": torch.isfinite(wide),
    }


def _warn(solver: object, smallest: Tensor, ancestors: Tensor, particles: int) -> None:
    collapsed, related = smallest < max(COLLAPSE * particles, 2.0), ancestors < FAMILIES
    if particles > 100 and bool(related.any()):
        warnings.warn(
            f"{type(solver).__name__}: the {particles} particles of {int(related.sum())} of {len(ancestors)} observations descend from {float(ancestors[related].min()):.2g} of the first ones, whatever their weights are now: the evidence may be wrong by a factor, and other seeds will give other samples; raise particles, or take a twist that knows more (TDS with mmps).",
            stacklevel=4,
        )
    if particles > 2 and bool(collapsed.any()):
        warnings.warn(
            f"{type(solver).__name__}: the weights of {int(collapsed.sum())} of {len(smallest)} observations collapsed, to an effective size of {float(smallest[collapsed].min()):.3g} of {particles} particles at the worst; the samples may miss parts of the posterior: raise particles and steps, or take another twist.",
            stacklevel=4,
        )


FAMILIES = 4.0  # ancestors below which a run warns: a relative error of the evidence above one half
COLLAPSE = 0.005  # effective size over particles below which a run warns


_CACHED = 1 << 18  # numbers


def in_blocks(
    problem: InverseProblem, function: Callable[..., tuple[Tensor, ...]], *values: Tensor
) -> tuple[Tensor, ...]:
    """Apply a function to `(n, …)` tensors by blocks, and join.

    A block is at most what the driver gives a chunk; on a CPU it fits a core's cache too, which is what the many
    elementwise operations on thousands of particles cost (8192 in 800 dimensions: a quarter of the time).
    """
    n, device = len(values[0]), values[0].device
    size = default_chunk(problem.model_shape, device)
    if device.type == "cpu":
        size = min(size, max(1, _CACHED // math.prod(problem.model_shape)))
    if n <= size:
        return function(*values)
    parts = [function(*(v[i : i + size] for v in values)) for i in range(0, n, size)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))
