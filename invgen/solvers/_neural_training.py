r"""The training of one member: AdamW under a cosine, gradients clipped, averaged weights, the best ones kept.

With θ_t the weights after step t the average is a_t = β_t a_{t−1} + (1 − β_t) θ_t, β_t = min(β, (1 + t)/(10 + t)). After
every epoch the average is judged on simulations that were held out; training ends when it has not improved for a while,
and the best average stays. The gap between the held-out and the training loss says whether the simulations are enough:
for a density it is in nats, the over-confidence that has been learnt by heart.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from invgen.solvers._neural_batches import Pair
from invgen.solvers._neural_members import Member

_ROWS = 4096  # evaluated at a time
_REPEATS = 4  # of a loss with random times, on the held-out simulations
_GAP = 0.5  # nats by which the held-out loss may exceed the training loss before that is said
_MOST_JUDGED = 10_000  # training simulations whose loss is computed at the end


class Source(Protocol):
    """What gives batches: see `_neural_batches`."""

    def __len__(self) -> int: ...

    def epoch(self, number: int) -> Iterator[Pair]: ...


@dataclass(frozen=True)
class Plan:
    """How a member is trained.

    Args:
        learning_rate: at first; it falls as a half cosine to a hundredth over `epochs`. warmup: steps of linear rise.
        epochs: at the most. patience: epochs without improvement after which training ends.
        weight_decay: decoupled. clip: largest gradient norm. ema: β.
    """

    learning_rate: float
    epochs: int
    patience: int
    weight_decay: float
    clip: float
    ema: float
    warmup: int = 20


@dataclass(frozen=True)
class History:
    """What happened: losses per epoch, the best, and the training loss of the weights that stay."""

    held: tuple[float, ...]
    best: float
    best_epoch: int
    train: float
    steps: int

    @property
    def gap(self) -> float:
        """Held-out loss minus training loss."""
        return self.best - self.train


@contextmanager
def own_random_numbers(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's generators inside, leave them as they were found outside."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def judge(member: Member, pair: Pair, seed: int = 0) -> float:
    """Mean loss on pairs, with the same random times every time it is asked."""
    member.eval()
    repeats = _REPEATS if member.method in ("fmpe", "npse") else 1
    total, count = 0.0, 0
    with own_random_numbers(seed, pair[0].device):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(repeats):
            for first in range(0, len(pair[0]), _ROWS):
                part = tuple(t[first : first + _ROWS] for t in pair)
                losses = member.loss(*part, generator)  # type: ignore[call-arg, arg-type]
                total, count = total + float(losses.double().sum()), count + len(losses)
    return total / count


def train(
    member: Member,
    source: Source,
    held: Pair,
    seen: Callable[[], Pair],
    plan: Plan,
    *,
    seed: int = 0,
    tell: Callable[[int, float], None] | None = None,
) -> History:
    """Train in place; the weights end as the best average.

    Args:
        member: what is trained. source: batches. held: held-out pairs. seen: gives training pairs, for the gap.
        plan: how. seed: of random times and contrasts. tell: called after each epoch with (epoch, held-out loss).

    Raises:
        FloatingPointError: a held-out loss that is not finite from the first epoch on.
    """
    device = held[0].device
    weights = [p for p in member.parameters() if p.requires_grad]
    decayed = [p for p in weights if p.ndim > 1]
    optimiser = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": plan.weight_decay},
            {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=plan.learning_rate,
    )
    average = [p.detach().clone() for p in weights]
    # a flow that starts as the best linear-Gaussian law may already be the best there is
    best_weights, best, best_epoch = [p.clone() for p in average], judge(member, held), -1
    best = best if math.isfinite(best) else math.inf
    total, step, losses = max(1, plan.epochs * len(source)), 0, []
    with own_random_numbers(seed, device):
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, 7]).generate_state(1)[0]))
        for epoch in range(plan.epochs):
            member.train()
            for batch in source.epoch(epoch):
                share = 0.505 + 0.495 * math.cos(math.pi * min(step / total, 1.0))
                for group in optimiser.param_groups:
                    group["lr"] = plan.learning_rate * share * min(1.0, (step + 1) / plan.warmup)
                optimiser.zero_grad(set_to_none=True)
                member.loss(*batch, generator).mean().backward()  # type: ignore[call-arg, arg-type]
                size = torch.nn.utils.clip_grad_norm_(weights, plan.clip)
                # one bad batch must not end in NaN weights: a gradient that is not finite moves nothing
                scale = torch.where(torch.isfinite(size), 1.0, 0.0)
                for p in weights:
                    if p.grad is not None:
                        p.grad = torch.nan_to_num(p.grad, nan=0.0, posinf=0.0, neginf=0.0) * scale
                optimiser.step()
                step += 1
                beta = min(plan.ema, (1 + step) / (10 + step))
                torch._foreach_lerp_(average, [p.detach() for p in weights], 1 - beta)
            with _instead(weights, average):
                value = judge(member, held)
            losses.append(value)
            if tell is not None:
                tell(epoch, value)
            if value < best:
                best, best_epoch, best_weights = value, epoch, [p.clone() for p in average]
            if epoch - best_epoch >= plan.patience:
                break
    if not math.isfinite(best):
        raise FloatingPointError(
            f"The held-out loss of {member.method!r} was never finite; look for data or unknowns with extreme values, or lower the learning rate ({plan.learning_rate:g})."
        )
    with torch.no_grad():
        for p, value_ in zip(weights, best_weights, strict=True):
            p.copy_(value_)
    member.eval().requires_grad_(False)
    pair = seen()
    return History(tuple(losses), best, best_epoch, judge(member, tuple(t[:_MOST_JUDGED] for t in pair)), step)


@contextmanager
def _instead(weights: list[torch.nn.Parameter], others: list[Tensor]) -> Iterator[None]:
    """Other values in the parameters for a while."""
    own = [p.data for p in weights]
    for p, other in zip(weights, others, strict=True):
        p.data = other
    try:
        yield
    finally:
        for p, mine in zip(weights, own, strict=True):
            p.data = mine


def warn_too_few(method: str, histories: list[History], count: int) -> None:
    """Say so where the held-out loss exceeds the training loss by much."""
    gap = sum(h.gap for h in histories) / len(histories)
    if method in ("npe", "nle", "nre") and gap > _GAP:
        held = sum(h.best for h in histories) / len(histories)
        warnings.warn(
            f"{count} simulations are few for this estimator: its held-out loss {held:.2f} is {gap:.2f} nats above its training loss, which makes the posterior over-confident; simulate more, or take a smaller network or more members.",
            stacklevel=4,
        )
