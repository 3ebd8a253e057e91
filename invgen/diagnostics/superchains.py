"""Many short chains in superchains: whether the starts are forgotten, with a picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from invgen.diagnostics._arrays import Array, tensor
from invgen.diagnostics.chains import nested_rhat

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["SuperchainCheck", "check_superchains"]


@dataclass(frozen=True, eq=False)
class SuperchainCheck:
    """Nested R̂ of every coordinate against its limit.

    Attributes:
        nested_rhat: `(*shape)`. limit: √(1 + 1/M + τ). superchains, chains, draws: K, M (in each), N.
    """

    nested_rhat: np.ndarray
    limit: float
    superchains: int
    chains: int
    draws: int

    @property
    def passed(self) -> bool:
        """Every coordinate is below the limit; NaN (constant draws) fails."""
        return bool((self.nested_rhat < self.limit).all())

    def plot(self, ax: Axes | None = None) -> Axes:
        """Histogram over coordinates with the limit."""
        from invgen.diagnostics import figures

        return figures.superchain_figure(self, ax)


def check_superchains(draws: Array, *, tolerance: float = 0.01, rank_normalize: bool = True) -> SuperchainCheck:
    """Nested R̂ (Margossian et al. 2022, arXiv:2110.13017, section 3) of chains that share starts in groups.

    Args:
        draws: `(superchain, chain, draw, *shape)`; all chains of a superchain start at one point.
        tolerance: τ, the squared bias of a superchain's mean in units of the variance that is tolerated.
        rank_normalize: normal scores instead of the draws.

    Raises:
        ValueError: too few superchains or draws, NaN, a tolerance that is not positive.
    """
    if not tolerance > 0:
        raise ValueError(
            f"The tolerance is a squared bias in units of the variance and must be positive, got {tolerance}."
        )
    value = nested_rhat(draws, rank_normalize=rank_normalize)
    K, M, N = tensor(draws, "The draws").shape[:3]
    return SuperchainCheck(np.asarray(value), math.sqrt(1 + 1 / M + tolerance), K, M, N)
