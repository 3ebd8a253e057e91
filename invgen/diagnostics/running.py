"""Convergence watched while chains run: R̂ and ESS of what is kept so far, and a stop when it is enough.

A callback of `invgen.driver.run` for Markov chains. It looks at the positions kept so far, all chains of all observations
together, so that the whole run has to be one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from invgen.diagnostics.chains import ess, nested_rhat, rhat

__all__ = ["Look", "StopAtESS"]


class Look(NamedTuple):
    """What was found at one look.

    Attributes:
        step: of the run. draws: kept of each chain so far. ess: smallest bulk effective sample size. rhat: largest R̂,
        nested where chains are in superchains.
    """

    step: int
    draws: int
    ess: float
    rhat: float


@dataclass(eq=False)
class StopAtESS:
    """Ends a run when every coordinate has enough independent draws and chains agree.

    Looks every `every` steps at the kept latent positions: smallest bulk ESS over coordinates and observations, and
    largest R̂ (split and rank-normalised, or nested for chains in superchains). Stops when ESS ≥ target and R̂ < rhat.

    A rule that looks often stops too early now and then: ESS and R̂ of few draws are uncertain. `least` draws of each chain
    are awaited first.

    Args:
        target: effective draws of an observation, all of its chains together. every: steps between looks.
        rhat: limit of R̂. Nested R̂ of M chains of N draws each is about √(1 + 1/(M N_eff)) at its best, so that a limit of
            1.01 asks for about 50 effective draws a superchain.
        superchains: number of groups of chains with one start (as given to the solver), None for split R̂.
        observations: of the problem. coordinates: looked at, at most, evenly spread over the positions.
        least: draws of each chain before the first look that may end the run.
        progress: print each look above the bar.

    Attributes:
        history: every `Look`. stopped: whether the target was met.

    Raises:
        ValueError: positions that do not divide into the observations and superchains given; a solver whose state keeps
            no draws.

    Cost: a look sorts and transforms all kept draws of the coordinates looked at.
    Reference: Vehtari et al. 2021, arXiv:1903.08008; Margossian et al. 2022, arXiv:2110.13017.

    Example:
        >>> stop = StopAtESS(400)
        >>> posterior = PCN(draws=100_000).solve(problem, 8, callbacks=[stop])
    """

    target: float
    every: int = 200
    rhat: float = 1.01
    superchains: int | None = None
    observations: int = 1
    coordinates: int = 256
    least: int = 50
    progress: bool = False
    history: list[Look] = field(default_factory=list, init=False)
    stopped: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if not self.target > 0 or not self.rhat > 1:
            raise ValueError(f"StopAtESS needs target > 0 and rhat > 1, got {self.target} and {self.rhat}.")
        if min(self.every, self.observations, self.coordinates) < 1 or self.least < 4:
            raise ValueError(
                f"StopAtESS needs every, observations and coordinates of at least 1 and least of at least 4, got {self.every}, {self.observations}, {self.coordinates}, {self.least}."
            )
        if self.superchains is not None and self.superchains < 2:
            raise ValueError(f"Nested R-hat compares two superchains at least, got {self.superchains}.")

    def __call__(self, step: int, state: dict[str, Tensor]) -> bool | None:
        """True where the run may end."""
        if (step + 1) % self.every:
            return None
        if "kept" not in state:
            raise ValueError(
                "StopAtESS watches solvers that keep draws of positions (Markov chains); the state of this one has none."
            )
        draws = kept_so_far(state["kept"])
        if draws < max(4, self.least):
            return None
        look = Look(step, draws, *self.look(state["kept"][:, :draws]))
        self.history.append(look)
        if self.progress:
            from rich import get_console

            get_console().print(
                f"step {step + 1}: {draws} draws, ESS {look.ess:.0f} of {self.target:g}, R-hat {look.rhat:.4f} (limit {self.rhat:g})"
            )
        self.stopped = look.ess >= self.target and look.rhat < self.rhat
        return True if self.stopped else None

    def look(self, draws: Tensor) -> tuple[float, float]:
        """Smallest bulk ESS and largest R̂ of draws `(chains, draws, dim)`; chains that are not finite are left out.

        An observation without two finite chains has neither, and never stops a run.
        """
        chains, _, dim = draws.shape
        groups = self.observations * (self.superchains or 1)
        if chains % groups:
            raise ValueError(
                f"The state holds {chains} chains, which do not divide into {self.observations} observations of {self.superchains or 1} superchains; give the numbers of the run, and one chunk."
            )
        step = max(1, -(-dim // self.coordinates))
        sizes, ratios = [], []
        for mine in (
            draws[:, :, ::step].detach().cpu().double().reshape(self.observations, -1, *draws[0, :, ::step].shape)
        ):
            finite = torch.isfinite(mine).flatten(1).all(1)
            if self.superchains is None:
                good = mine[finite]
                if len(good) < 2:
                    return 0.0, float("inf")
                ratio = rhat(good)
            else:
                groups_of = mine.reshape(self.superchains, -1, *mine.shape[1:])
                good_group = finite.reshape(self.superchains, -1).all(1)
                if int(good_group.sum()) < 2:
                    return 0.0, float("inf")
                good = groups_of[good_group].flatten(0, 1)
                ratio = nested_rhat(groups_of[good_group], rank_normalize=True)
            sizes.append(float(np.min(ess(good))))
            # constant draws have no R̂: chains that never moved have not met
            ratios.append(float(np.max(np.where(np.isnan(ratio), np.inf, ratio))))
        return min(sizes), max(ratios)


def kept_so_far(kept: Tensor) -> int:
    """Leading rows of `(chains, draws, dim)` that some chain has filled: rows to come are NaN."""
    filled = torch.isfinite(kept[..., 0]).any(0)
    return int(filled.sum())
