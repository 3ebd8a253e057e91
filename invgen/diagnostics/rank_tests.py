r"""Ranks of true values among posterior draws, and what their distribution says.

If θ ~ p(θ), d ~ p(d | θ) and the draws θ_1 … θ_L come from p(θ | d), then (θ, θ_1, …, θ_L) are exchangeable given d, and
for every quantity f(θ, d) the rank

    r = #{l: f(θ_l, d) < f(θ, d)} + ties in random order

is uniform on {0, …, L} (Talts et al. 2018; quantities that depend on the data: Modrák et al. 2023, theorem 2). All tests
of calibration here are this statement for some f: coordinates, log p(d | θ), distances to a reference point, densities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from invgen.diagnostics._arrays import Array, array, chunks, pair
from invgen.diagnostics.bands import counts_below, ecdf_band, ecdf_p_value, holm, rank_p_value_chi2

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["RankTest", "rank_test", "ranks"]

_POINTS = 128  # levels at which an empirical distribution is read


def ranks(truth: Array, samples: Array, *, seed: int = 0) -> np.ndarray:
    """Ranks of true values among posterior draws, coordinate by coordinate, ties in random order.

    r = #{l: θ_l < θ} + ⌊U (1 + #{l: θ_l = θ})⌋, U ~ U(0, 1).

    Args:
        truth: θ, `(n_sim, *shape)`. samples: `(n_sim, draws, *shape)`, independent draws (thin chains first).
        seed: of the ties.

    Returns:
        Whole numbers in 0 … draws, `(n_sim, *shape)`.

    Raises:
        ValueError: shapes that do not fit, NaN.

    Cost: one pass over the draws, 64 MB at a time.
    """
    t, s = pair(truth, samples, infinite=True)
    return _ranks(t, s, np.random.default_rng(seed))


def _ranks(t: Tensor, s: Tensor, rng: np.random.Generator) -> np.ndarray:
    below = torch.empty(t.shape, dtype=torch.long)
    equal = torch.empty(t.shape, dtype=torch.long)
    for rows in chunks(len(s), s[0].numel()):
        value, draws = t[rows, None], s[rows]
        below[rows] = (draws < value).sum(1).cpu()
        equal[rows] = (draws == value).sum(1).cpu()
    low, ties = array(below), array(equal)
    return low + rng.integers(0, ties + 1) if ties.any() else low


def rank_levels(num_draws: int, *, folded: bool = False, points: int = _POINTS) -> np.ndarray:
    """Cuts c_1 < … < c_K inside 0 … L + 1 at which P(rank < c) = c/(L + 1) holds.

    Folded ranks |2r − L| have the parity of L, so that only cuts of the parity of L + 1 qualify.
    """
    if num_draws < (2 if folded else 1):
        raise ValueError(
            f"{num_draws} posterior draws a simulation give no ranks to test; take more (a hundred is usual)."
        )
    if folded:
        every = np.arange(2 - (num_draws + 1) % 2, num_draws + 1, 2)
    else:
        every = np.arange(1, num_draws + 1)
    count = min(len(every), points - 1)
    return every[np.unique(np.round((np.arange(count) + 0.5) * len(every) / count - 0.5).astype(int))]


@dataclass(frozen=True, eq=False)
class RankTest:
    """Uniformity of the ranks of several quantities, tested together.

    Attributes:
        title: what was tested. names: of the quantities, m of them.
        ranks: `(n_sim, m)` on 0 … num_draws. num_draws: L.
        level: α of the whole family. family: how many p-values share it (m, or more inside a larger family).
        test: "ecdf" (exact simultaneous band) or "chi2".
        folded: the ranks are |2r − L|, depths of central intervals.
    """

    title: str
    names: tuple[str, ...]
    ranks: np.ndarray
    num_draws: int
    level: float
    family: int
    test: str = "ecdf"
    folded: bool = False

    @property
    def n_sim(self) -> int:
        """Simulations."""
        return len(self.ranks)

    @cached_property
    def cuts(self) -> np.ndarray:
        """Ranks c_k at which the empirical distribution is read, `(K,)`."""
        return rank_levels(self.num_draws, folded=self.folded)

    @cached_property
    def levels(self) -> np.ndarray:
        """z_k = P(rank < c_k), `(K,)`: nominal coverage of the k-th set."""
        return self.cuts / (self.num_draws + 1)

    @cached_property
    def counts(self) -> np.ndarray:
        """#{rank < c_k}, `(m, K)`."""
        return counts_below(self.ranks, self.num_draws, self.cuts)

    @property
    def observed(self) -> np.ndarray:
        """Empirical distribution, `(m, K)`: the coverage that was observed at each nominal one."""
        return self.counts / self.n_sim

    @cached_property
    def p_values(self) -> np.ndarray:
        """One a quantity, `(m,)`, not adjusted."""
        if self.test == "chi2":
            return rank_p_value_chi2(self.ranks, self.num_draws)
        return ecdf_p_value(self.counts, self.n_sim, self.levels)

    @cached_property
    def adjusted(self) -> np.ndarray:
        """p-values adjusted by Holm for the family, `(m,)`."""
        return holm(self.p_values, self.family)

    @property
    def p_value(self) -> float:
        """Of the whole: the smallest adjusted p-value."""
        return float(self.adjusted.min())

    @property
    def passed(self) -> bool:
        """No quantity is rejected at the family's level."""
        return self.p_value > self.level

    @property
    def failing(self) -> tuple[str, ...]:
        """Quantities whose adjusted p-value is at most the level."""
        return tuple(self.names[i] for i in np.flatnonzero(self.adjusted <= self.level))

    @cached_property
    def band(self) -> tuple[np.ndarray, np.ndarray]:
        """Fractions `(K,)`, `(K,)` that all curves of a calibrated posterior stay within, up to probability `level`."""
        low, high = ecdf_band(self.n_sim, self.levels, self.level / self.family)
        return low / self.n_sim, high / self.n_sim

    def coverage(self, nominal: float) -> np.ndarray:
        """Observed coverage `(m,)` at the attainable level nearest to `nominal`."""
        return self.observed[:, int(np.abs(self.levels - nominal).argmin())]

    def plot(self, ax: Axes | None = None, *, kind: str = "difference") -> Axes:
        """Draw "difference" (empirical distribution minus uniform), "coverage" (against nominal) or "histogram"."""
        from invgen.diagnostics import figures

        return figures.rank_figure(self, ax, kind=kind)

    def __str__(self) -> str:
        verdict = "passed" if self.passed else f"FAILED for {', '.join(self.failing[:6])}"
        if len(self.failing) > 6:
            verdict += f" and {len(self.failing) - 6} more"
        return f"{self.title}: {verdict} (p = {self.p_value:.3g}, {self.n_sim} simulations of {self.num_draws} draws, {len(self.names)} quantities)"


def rank_test(
    ranks: Array,
    num_draws: int,
    *,
    names: Sequence[str] | None = None,
    level: float = 0.01,
    family: int | None = None,
    test: str = "ecdf",
    title: str = "Ranks",
    folded: bool = False,
) -> RankTest:
    """Test that ranks are uniform on {0, …, num_draws}.

    Args:
        ranks: `(n_sim,)` or `(n_sim, *shape)`, one column a quantity. num_draws: L.
        names: of the quantities; "x[0]", … when omitted.
        level: α: a calibrated posterior fails any of the tests with a probability of at most α.
        family: p-values that share α; the number of quantities when omitted.
        test: "ecdf", the exact simultaneous band of Säilynoja et al. (2022), or "chi2", Pearson's.
        title: of figures and messages. folded: the ranks are |2r − L|.

    Raises:
        ValueError: ranks outside 0 … num_draws, an unknown test, a level outside (0, 1).

    References: `invgen.diagnostics.bands`.
    """
    r = np.asarray(ranks.cpu() if isinstance(ranks, Tensor) else ranks)
    shape = r.shape[1:]
    if r.ndim < 1 or r.size == 0 or not np.issubdtype(r.dtype, np.integer) or r.min() < 0 or r.max() > num_draws:
        raise ValueError(f"Ranks are whole numbers in 0 … {num_draws}, got {r.dtype} of the shape {r.shape}.")
    if test not in ("ecdf", "chi2") or (test == "chi2" and folded):
        raise ValueError(f"The test is 'ecdf' or (ranks that are not folded) 'chi2', got {test!r}.")
    if not 0 < level < 1:
        raise ValueError(f"The level of a test lies in (0, 1), got {level}.")
    r = r.reshape(len(r), -1)
    labels = tuple(names) if names is not None else coordinate_names(shape)
    if len(labels) != r.shape[1]:
        raise ValueError(f"{len(labels)} names were given for {r.shape[1]} quantities; give one each.")
    rank_levels(num_draws, folded=folded)
    return RankTest(title, labels, r, num_draws, level, family or len(labels), test, folded)


def coordinate_names(shape: Sequence[int], letter: str = "x") -> tuple[str, ...]:
    """ "x[0]", "x[1]", … or "x[0,3,2]" of fields; "x" of a number."""
    if len(shape) == 0:
        return (letter,)
    return tuple(f"{letter}[{','.join(map(str, i))}]" for i in np.ndindex(*shape))
