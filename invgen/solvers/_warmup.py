r"""What a warm-up adapts besides the mass matrix: when, the step size, the length of trajectories.

Windows (Stan's, Carpenter et al. 2017): a first stretch for the step size alone, windows that double and end with a new mass
matrix, a last stretch for the step size. Dual averaging (Hoffman & Gelman 2014, equation 6, γ = 0.05, t₀ = 10, κ = 0.75)
of the acceptance δ − a_t:

    H̄_t = (1 − 1/(t + t₀)) H̄_{t−1} + (δ − a_t)/(t + t₀),   log ε_t = μ − √t/γ H̄_t,   log ε̄_t = t^−κ log ε_t + (1 − t^−κ) log ε̄_{t−1}.

Trajectory length T by ChEES (Hoffman, Radul & Sountsov 2021): ascent with Adam (β₁ = 0, β₂ = 0.95, rate 0.025) in log T on

    C(T) = ¼ E[(|q' − m|² − |q − m|²)²],  norms in units of the mass matrix,

whose derivative by log t along a trajectory of length t that ends at (q', v') is t (|q' − m|² − |q − m|²) ⟨q' − m, v'⟩.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

_GAMMA, _T0, _KAPPA = 0.05, 10.0, 0.75
_RATE, _BETA = 0.025, 0.95
_LENGTHS = (math.log(0.05), math.log(1000.0))  # bounds of T in units of the mass matrix
_WORST = 0.01  # acceptance of a stuck chain in the harmonic mean: one of a hundred chains halves it
_MEMORY = 8  # steps over which a chain's acceptance is averaged before it counts as stuck


def windows(warmup: int) -> tuple[int, list[int]]:
    """The first step whose draw is used, and the steps after which the mass matrix is renewed (none below 20 steps)."""
    if warmup < 20:
        return 0, []
    first, last = max(5, warmup // 14), warmup - max(5, warmup // 7)
    length, ends, at = max(5, warmup // 20), [], first
    while at < last:
        at = last if at + 3 * length > last else at + length  # the next window would not fit: this one takes the rest
        ends.append(at)
        length *= 2
    return first, ends


def radical_inverse(n: int) -> float:
    """The n-th number of the Halton sequence in base 2, in (0, 1) for n ≥ 1."""
    value, unit = 0.0, 0.5
    while n:
        value += unit * (n & 1)
        n, unit = n >> 1, unit / 2
    return value


# --- step size ---------------------------------------------------------------------------------------------------------


def first_average(log_step: Tensor) -> dict[str, Tensor]:
    """Dual averaging that begins at `log_step` (observations,), and tries ten times that first of all."""
    return {
        "log_step": log_step,
        "log_step_mean": log_step,
        "step_centre": log_step + math.log(10.0),
        "step_error": torch.zeros_like(log_step),
        "step_count": torch.zeros_like(log_step),
    }


def average(state: Mapping[str, Tensor], accepted: Tensor, goal: float) -> dict[str, Tensor]:
    """One step of dual averaging with the acceptance of each observation, `(observations,)`; NaN leaves it as it is."""
    seen = torch.isfinite(accepted)
    t = state["step_count"] + 1
    error = (1 - 1 / (t + _T0)) * state["step_error"] + (goal - accepted) / (t + _T0)
    log_step = state["step_centre"] - t.sqrt() / _GAMMA * error
    weight = t**-_KAPPA
    new = {
        "log_step": log_step,
        "log_step_mean": weight * log_step + (1 - weight) * state["log_step_mean"],
        "step_error": error,
        "step_count": t,
    }
    return {n: torch.where(seen, v, state[n]) for n, v in new.items()}


def first_rate(like: Tensor, goal: float) -> dict[str, Tensor]:
    """The running acceptance of each chain `(batch,)`, which begins at the goal."""
    return {"rate": torch.full_like(like, goal)}


def pooled_acceptance(rate: Tensor, acceptance: Tensor) -> tuple[Tensor, Tensor]:
    """What the step size is judged by, and the chains' running acceptances after one more step.

    The mean ā of the acceptances times H(r)/A(r), the harmonic over the arithmetic mean of the running ones: ā answers at
    once, as dual averaging needs; the ratio is 1 while all chains accept alike and falls with a chain that is stuck,
    whose part of a mean over many chains would not be noticed (Hoffman et al. 2021 take the harmonic mean of single
    steps for that: over a few chains, one rejection then counts as much as a chain that never moves).

    Args:
        rate, acceptance: `(observations, chains)`; NaN acceptances leave the rate as it is and are left out of ā.

    Returns:
        `(observations,)`, NaN where no chain was seen, and the new rates.
    """
    seen = torch.isfinite(acceptance)
    rate = torch.where(seen, rate + (acceptance - rate) / _MEMORY, rate)
    living = rate.clamp_min(_WORST)
    ratio = 1 / ((1 / living).mean(1) * living.mean(1))
    return acceptance.nanmean(1) * ratio, rate


# --- trajectory length -------------------------------------------------------------------------------------------------


def first_length(log_length: Tensor) -> dict[str, Tensor]:
    """Adam on log T (observations,)."""
    return {
        "log_length": log_length,
        "length_square": torch.zeros_like(log_length),
        "length_count": torch.zeros_like(log_length),
    }


def lengthen(state: Mapping[str, Tensor], gradient: Tensor) -> dict[str, Tensor]:
    """One ascent with Adam in log T; gradients that are not finite leave it as it is."""
    seen = torch.isfinite(gradient)
    g = torch.where(seen, gradient, torch.zeros_like(gradient))
    count = state["length_count"] + 1
    square = _BETA * state["length_square"] + (1 - _BETA) * g.square()
    unbiased = square / (1 - _BETA**count)
    move = _RATE * g / (unbiased.sqrt() + torch.finfo(g.dtype).tiny)
    new = {"log_length": (state["log_length"] + move).clamp(*_LENGTHS), "length_square": square, "length_count": count}
    return {n: torch.where(seen, v, state[n]) for n, v in new.items()}


def chees_gradient(
    before: Tensor, after: Tensor, pull: Tensor, velocity: Tensor, pull_before: Tensor, chance: Tensor, t: Tensor
) -> Tensor:
    """The derivative of the criterion by log T, pooled over the chains with their acceptance as weights.

    Args:
        before, after: q − m and q' − m, `(observations, chains, dim)`; pull_before, pull: Σ⁻¹ times these.
        velocity: v'. chance: acceptance `(observations, chains)`. t: lengths of the trajectories, `(observations, 1)`.

    Returns:
        `(observations,)`; 0 where no chain lives.
    """
    change = (after * pull).sum(2) - (before * pull_before).sum(2)
    each = t * change * (pull * velocity).sum(2)
    weight = torch.where(torch.isfinite(each) & (chance > 1e-4), chance, torch.zeros_like(chance))
    each = torch.where(weight > 0, each, torch.zeros_like(each))
    return (weight * each).sum(1) / weight.sum(1).clamp_min(torch.finfo(each.dtype).tiny)
