"""One verdict on a posterior: simulation-based calibration with the log-likelihood, and TARP, as one family of tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from invgen.diagnostics._arrays import Array
from invgen.diagnostics.bands import holm
from invgen.diagnostics.calibration import sbc
from invgen.diagnostics.coverage import tarp
from invgen.diagnostics.rank_tests import RankTest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Calibration", "check_calibration"]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Several tests of one posterior, judged together.

    Attributes:
        tests: the single tests, each with its own ranks, band and figure.
        level: α of all p-values of all tests together.
        dropped: simulations left out before (their draws were not finite).
    """

    tests: tuple[RankTest, ...]
    level: float
    dropped: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """ "test: quantity" of every p-value."""
        return tuple(f"{t.title}: {n}" for t in self.tests for n in t.names)

    @cached_property
    def p_values(self) -> np.ndarray:
        """Not adjusted."""
        return np.concatenate([t.p_values for t in self.tests])

    @cached_property
    def adjusted(self) -> np.ndarray:
        """Adjusted by Holm over all tests."""
        return holm(self.p_values)

    @property
    def p_value(self) -> float:
        """The smallest adjusted p-value."""
        return float(self.adjusted.min())

    @property
    def passed(self) -> bool:
        """Nothing is rejected at the level."""
        return self.p_value > self.level

    @property
    def failing(self) -> tuple[str, ...]:
        """What is rejected."""
        return tuple(self.names[i] for i in np.flatnonzero(self.adjusted <= self.level))

    def plot(self, axes: Sequence[Axes] | None = None) -> Sequence[Axes]:
        """One panel a test: empirical distribution of the ranks minus the uniform one, in the family's band."""
        from invgen.diagnostics import figures

        return figures.calibration_figure(self, axes)

    def __str__(self) -> str:
        head = f"calibration {'passed' if self.passed else 'FAILED'} at the family-wise level {self.level:g} (p = {self.p_value:.3g})"
        if self.dropped:
            head += f"; {self.dropped} simulations with bad draws were left out"
        lines = [f"  {n}: adjusted p = {p:.3g}" for n, p in zip(self.names, self.adjusted, strict=True)]
        order = np.argsort(self.adjusted)[:12]
        return "\n".join([head, *(lines[i] for i in order)])


def check_calibration(
    truth: Array,
    samples: Array,
    *,
    log_likelihood: tuple[Array, Array] | None = None,
    data: Array | None = None,
    references: Array | None = None,
    quantities: Mapping[str, tuple[Array, Array]] | None = None,
    names: Sequence[str] | None = None,
    level: float = 0.01,
    seed: int = 0,
) -> Calibration:
    """Is the posterior right? SBC of every coordinate and of log p(d | x), and TARP, with one family-wise level.

    A correct posterior fails with a probability of at most `level`: every p-value is exact and Holm's adjustment holds
    for dependent tests. SBC of coordinates sees bias and spread, log p(d | x) sees a posterior that learnt too little
    (or nothing) from the data, TARP errors of the joint law.

    Args:
        truth: x drawn from the prior, `(n_sim, *shape)`. samples: `(n_sim, draws, *shape)`, independent posterior draws.
        log_likelihood: log p(d_i | x_i) `(n_sim,)` and log p(d_i | x_il) `(n_sim, draws)`; without it (a simulator whose
            likelihood is unknown) TARP alone sees a posterior that learnt nothing.
        data: d, `(n_sim, *data_shape)`, from which TARP makes its references; or `references` themselves.
        quantities: further f(x, d), name -> (of the truth, of the draws).
        names: of the coordinates. level: family-wise α. seed: of ties and references.

    Raises:
        ValueError: shapes that do not fit, NaN, neither data nor references.

    References: `invgen.diagnostics.calibration`, `invgen.diagnostics.coverage`, `invgen.diagnostics.bands`.
    """
    if (data is None) == (references is None):
        raise ValueError(
            "TARP needs references that follow the data, otherwise draws from the prior pass; give either data or references."
        )
    common: dict[str, Any] = {"level": level, "seed": seed}
    ranked = sbc(truth, samples, log_likelihood=log_likelihood, quantities=quantities, names=names, **common)
    family = len(ranked.names) + 1
    return Calibration(
        (
            replace(ranked, family=family),
            tarp(truth, samples, data=data, references=references, family=family, **common),
        ),
        level,
    )
