r"""L-C2ST: is the posterior right at *this* observation? A classifier test that needs no reference posterior.

A classifier learns from simulations to tell (x_i, d_i), the truth, from (x̃_i, d_i), a draw of the posterior estimate q(x | d_i).
Where q is right nothing can be learnt and its answer is ½. At the observation d_o the statistic is

    t(d_o) = mean_l (c(x̃_l, d_o) − ½)²,      x̃_l ~ q(x | d_o)                                   (Linhart et al. 2023, eq. 9)

with c the probability of "draw of q". Its law under the null hypothesis comes from the same classifier trained on exchanged
pairs: truth and draw of a random half of the simulations change places, which changes nothing if q(x | d) = p(x | d) for
all d, so that p = (1 + #{null t ≥ t}) / (1 + trials) is exact for that hypothesis. What SBC, TARP and coverage average over
observations, this looks at one by one; its power is the classifier's.

All classifiers (one, and one a trial) are trained at once, as one batched network of two hidden layers on the same batches.

Reference: Linhart, Gramfort & Rodrigues, L-C2ST: local diagnostics for posterior approximations in simulation-based inference,
NeurIPS 2023, arXiv:2306.03580.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from invgen.diagnostics._arrays import Array, random_tensor, tensor

__all__ = ["LocalTest", "lc2st"]


@dataclass(frozen=True, eq=False)
class LocalTest:
    """The verdict at observations.

    Attributes:
        statistic: t, `(n_obs,)`. null: `(trials, n_obs)`. level: α of each observation.
    """

    statistic: np.ndarray
    null: np.ndarray
    level: float

    @property
    def p_value(self) -> np.ndarray:
        """`(n_obs,)`, not adjusted for several observations."""
        return (1 + (self.null >= self.statistic).sum(0)) / (1 + len(self.null))

    @property
    def passed(self) -> np.ndarray:
        """`(n_obs,)`: nothing was found at the level."""
        return self.p_value > self.level

    def __str__(self) -> str:
        lines = [
            f"observation {i}: {'passed' if ok else 'FAILED'} (p = {p:.3g}, t = {t:.3g}, null mean {m:.3g})"
            for i, (ok, p, t, m) in enumerate(
                zip(self.passed, self.p_value, self.statistic, self.null.mean(0), strict=True)
            )
        ]
        return "\n".join(lines)


def lc2st(
    truth: Array,
    samples: Array,
    data: Array,
    observed: Array,
    observed_samples: Array,
    *,
    trials: int = 100,
    epochs: int = 40,
    width: int | None = None,
    level: float = 0.05,
    seed: int = 0,
) -> LocalTest:
    """Local classifier two-sample test of a posterior estimate at given observations.

    Args:
        truth: x_i of simulations that the estimate was not trained on, `(n, *shape)`. samples: one draw of q(x | d_i) each,
            `(n, *shape)`, or several `(n, draws, *shape)` of which the first is taken. data: d_i, `(n, *data_shape)`, or
            summaries of them.
        observed: `data_shape` or `(n_obs, *data_shape)`. observed_samples: draws of q at them, `(draws, *shape)` or
            `(n_obs, draws, *shape)`.
        trials: classifiers of the null hypothesis. epochs: of training. width: hidden units, 10 (dim x + dim d) and at most
            100 when omitted. level: α. seed: of exchanges, weights and batches.

    Returns:
        `LocalTest`.

    Raises:
        ValueError: shapes that do not fit, NaN, too few trials for the level, fewer than 20 simulations.

    Cost: (1 + trials) classifiers on 2 n points; seconds at n = 1000 in ten dimensions.
    """
    x, d = tensor(truth, "The true values").float(), tensor(data, "The data").float()
    drawn = tensor(samples, "The posterior draws").float()
    drawn = drawn[:, 0] if drawn.ndim == x.ndim + 1 else drawn
    seen, probes = tensor(observed, "The observations").float(), tensor(observed_samples, "The draws there").float()
    if seen.ndim == d.ndim - 1:
        seen, probes = seen[None], probes[None]
    if drawn.shape != x.shape or len(d) != len(x):
        raise ValueError(
            f"The draws have the shape {tuple(drawn.shape)}, the truths {tuple(x.shape)} and {len(d)} data; give one of each a simulation."
        )
    if (
        seen.shape[1:] != d.shape[1:]
        or probes.ndim != x.ndim + 1
        or probes.shape[2:] != x.shape[1:]
        or len(seen) != len(probes)
    ):
        raise ValueError(
            f"The observations have the shape {tuple(seen.shape)} with draws {tuple(probes.shape)}, the simulations {tuple(d.shape)} with {tuple(x.shape)}; give (n_obs, *data_shape) and (n_obs, draws, *shape)."
        )
    if len(x) < 20 or (1 + trials) * level < 1:
        raise ValueError(
            f"{len(x)} simulations and {trials} trials do not make a test at the level {level:g}; give at least 20 and {math.ceil(1 / level) - 1}."
        )
    x, drawn, d, seen, probes = x.flatten(1), drawn.flatten(1), d.flatten(1), seen.flatten(1), probes.flatten(2)
    # symmetric in truth and draw, so that exchanging them changes nothing but the labels
    both = torch.cat([x, drawn])
    x_mean, x_sd, d_mean, d_sd = both.mean(0), _sd(both), d.mean(0), _sd(d)
    x, drawn, probes = (x - x_mean) / x_sd, (drawn - x_mean) / x_sd, (probes - x_mean) / x_sd
    d, seen = (d - d_mean) / d_sd, (seen - d_mean) / d_sd
    rng = np.random.default_rng([seed, 51])
    swap = torch.from_numpy(rng.random((1 + trials, len(x))) < 0.5).to(x.device)
    swap[0] = False
    network = _Classifiers(
        1 + trials, x.shape[1] + d.shape[1], width or min(10 * (x.shape[1] + d.shape[1]), 100), seed, x
    )
    network.train(torch.cat([x, d], 1), torch.cat([drawn, d], 1), swap, epochs, rng)
    statistics = []
    with torch.no_grad():
        for one, draws in zip(seen, probes, strict=True):
            c = network(torch.cat([draws, one.expand(len(draws), -1)], 1)).sigmoid()
            statistics.append((c - 0.5).square().double().mean(1))
    t = torch.stack(statistics, 1).cpu().numpy()
    return LocalTest(t[0], t[1:], level)


def _sd(values: Tensor) -> Tensor:
    sd = values.std(0)
    return torch.where(sd > 0, sd, torch.ones_like(sd))


class _Classifiers:
    """K networks on the same inputs with labels of their own: weights `(K, in, out)`."""

    def __init__(self, count: int, dim: int, width: int, seed: int, like: Tensor) -> None:
        self.parameters = []
        for i, (before, after) in enumerate(((dim, width), (width, width), (width, 1))):
            # one start for all: the networks differ by their labels alone
            start = random_tensor([seed, 53, i], (before, after), like) * math.sqrt((2 if i < 2 else 0.1) / before)
            self.parameters.append(start.expand(count, -1, -1).clone().requires_grad_(True))
            self.parameters.append(torch.zeros(count, 1, after, device=like.device, requires_grad=True))

    def __call__(self, inputs: Tensor) -> Tensor:
        """Logits `(K, n)` of `(n, dim)`."""
        W1, b1, W2, b2, W3, b3 = self.parameters
        hidden = torch.relu(inputs @ W1 + b1)
        return torch.baddbmm(b3, torch.relu(torch.baddbmm(b2, hidden, W2)), W3)[..., 0]

    def train(self, truth: Tensor, drawn: Tensor, swap: Tensor, epochs: int, rng: np.random.Generator) -> None:
        n = len(truth)
        batch = min(100, n)
        optimizer = torch.optim.AdamW(self.parameters, lr=3e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=epochs * (n // batch))
        with torch.enable_grad():
            for _ in range(epochs):
                order = torch.from_numpy(rng.permutation(n)).to(truth.device)
                for start in range(0, n - batch + 1, batch):
                    rows = order[start : start + batch]
                    logits = self(torch.cat([truth[rows], drawn[rows]]))
                    truths = swap[:, rows].to(logits)  # 0 for a truth, 1 for a draw, exchanged where swapped
                    labels = torch.cat([truths, 1 - truths], 1)
                    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
                    optimizer.zero_grad(set_to_none=True)
                    (loss * len(swap)).backward()
                    optimizer.step()
                    schedule.step()
