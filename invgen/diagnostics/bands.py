r"""Is a sample of ranks uniform? Exact simultaneous bands of the empirical distribution, χ², and families of tests.

n ranks uniform on {0, …, L} have the empirical distribution R_k = #{rank < c_k} ~ Binomial(n, z_k), z_k = c_k/(L + 1).
Säilynoja, Bürkner & Vehtari (2022) read it at several z_k at once through the smallest pointwise tail,

    γ = 2 min_k min{ P(Bin(n, z_k) ≤ R_k),  P(Bin(n, z_k) ≥ R_k) },

whose null distribution is free of parameters: their algorithm walks the Markov chain R_1, R_2, … forward inside the
band {γ > t}. Here the walk is made with independent Poisson increments, conditioned on ending at n (n points of a Poisson
process on [0, 1], given their number, are n uniform points): one small matrix a step, every t at once.

    P(γ > t) = P(a_k(t) ≤ S_k ≤ b_k(t) for all k, S(1) = n) / P(S(1) = n),      S(z) a Poisson process of rate n.

The p-value is exact for independent ranks, discreteness included (P(p ≤ α) ≤ α with equality at attainable levels).

References: Säilynoja et al., Graphical test for discrete uniformity, Statistics and Computing 32:32, 2022
(arXiv:2103.10522), sections 2.2-2.3; Holm, A simple sequentially rejective multiple test procedure, 1979.
"""

from __future__ import annotations

import numpy as np
from scipy import special, stats

__all__ = ["ecdf_band", "ecdf_p_value", "holm", "rank_p_value_chi2"]

_TIE = 1 + 1e-9  # tails equal up to rounding count as equal


def holm(p_values: np.ndarray, family: int | None = None) -> np.ndarray:
    """p-values adjusted for their number: reject those ≤ α and P(any false rejection) ≤ α, whatever their dependence.

    p̃_(i) = max_{j ≤ i} min(1, (m − j + 1) p_(j)) for the sorted p_(1) ≤ … ≤ p_(m) (Holm 1979).

    Args:
        p_values: `(m,)`. family: number of p-values that share α, when these are not all: the others count as larger,
            which never gives a smaller adjusted p-value than the whole family would.

    Returns:
        `(m,)`, in the order given.
    """
    p = np.asarray(p_values, dtype=float).reshape(-1)
    order = np.argsort(p, kind="stable")
    left = max(family or 0, len(p)) - np.arange(len(p))
    stepped = np.maximum.accumulate(np.minimum(1.0, p[order] * left))
    out = np.empty_like(p)
    out[order] = stepped
    return out


def _tails(counts: np.ndarray, n: int, levels: np.ndarray) -> np.ndarray:
    """min(P(Bin ≤ R), P(Bin ≥ R)) of counts `(…, K)`."""
    below = special.bdtr(counts, n, levels)
    above = np.where(counts > 0, special.bdtrc(counts - 1, n, levels), 1.0)
    return np.minimum(below, above)


def _check(n: int, levels: np.ndarray) -> np.ndarray:
    z = np.asarray(levels, dtype=float).reshape(-1)
    if len(z) == 0 or z[0] <= 0 or z[-1] >= 1 or (np.diff(z) <= 0).any():
        raise ValueError("The levels must increase strictly inside (0, 1); leave out 0 and 1.")
    if n < 1:
        raise ValueError(f"At least one rank is needed, got n = {n}.")
    return z


def _stay_inside(thresholds: np.ndarray, n: int, z: np.ndarray) -> np.ndarray:
    """P(γ > t) for thresholds t `(G,)`, all at once."""
    least = min(max(float(thresholds.min()) / 2, 1e-300), 0.25)
    low = np.maximum(stats.binom.ppf(least, n, z) - 2, 0).astype(int)
    high = np.minimum(stats.binom.isf(least, n, z) + 2, n).astype(int)
    log_factorial = special.gammaln(np.arange(n + 1) + 1.0)
    increments = np.diff(z, prepend=0.0)
    kernels: dict[float, np.ndarray] = {}

    def kernel(mean: float) -> np.ndarray:
        """Poisson probabilities of 0 … n, and n + 1 zeros that negative steps point to."""
        key = round(mean, 9)
        if key not in kernels:
            steps = np.arange(n + 1)
            kernels[key] = np.concatenate([np.exp(steps * np.log(mean) - mean - log_factorial), np.zeros(n + 1)])
        return kernels[key]

    state, where = np.ones((len(thresholds), 1)), np.zeros(1, dtype=int)
    for k in range(len(z)):
        there = np.arange(low[k], high[k] + 1)
        state = state @ kernel(n * increments[k])[there[None] - where[:, None]]
        state *= _TIE * thresholds[:, None] < 2 * _tails(there, n, z[k])[None]
        where = there
    last = n * (1 - z[-1])
    end = np.exp((n - where) * np.log(last) - last - log_factorial[n - where])
    return state @ end / np.exp(n * np.log(n) - n - log_factorial[n])


def ecdf_p_value(counts: np.ndarray, n: int, levels: np.ndarray) -> np.ndarray:
    """Exact p-values of the simultaneous test that counts below levels are those of uniform numbers.

    Args:
        counts: R_k, `(…, K)`: how many of the n values lie below level k. n: values.
        levels: z_k, `(K,)`, strictly increasing inside (0, 1): the probability to lie below.

    Returns:
        p-values `(…,)`. Below 1e-9, where 1 − P(γ > t) cancels, the union bound min(1, K t) stands in: still valid.

    Raises:
        ValueError: levels outside (0, 1) or not increasing.

    Cost: K matrix products of size W × W and W × G, W ≈ 14 √(n/4), G different tails.
    Reference: module docstring.
    """
    z = _check(n, levels)
    counts = np.asarray(counts)
    gamma = 2 * _tails(counts, n, z).min(-1)  # may exceed 1: both tails hold the most likely count
    unique, back = np.unique(gamma, return_inverse=True)
    bound = np.minimum(1, len(z) * unique)
    p = bound.copy()
    large = np.flatnonzero(bound > 1e-10)  # wide bands are costly to walk, and their p-values cancel
    for start in range(0, len(large), 4096):
        part = large[start : start + 4096]
        exact = 1 - _stay_inside(unique[part], n, z)
        p[part] = np.where(exact < 1e-9, bound[part], np.clip(exact, 0, bound[part]))
    return p[back].reshape(gamma.shape)


def ecdf_band(n: int, levels: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """The band that counts of uniform numbers leave somewhere with a probability of at most `level`.

    Args:
        n: values. levels: z_k, `(K,)`. level: α, of the whole curve.

    Returns:
        Smallest and largest counts `(K,)` inside; a curve is inside exactly when its `ecdf_p_value` exceeds α.

    Raises:
        ValueError: levels outside (0, 1), α outside (0, 1).
    """
    z = _check(n, levels)
    if not 0 < level < 1:
        raise ValueError(f"The level of a band lies in (0, 1), got {level}.")
    low, high = level / len(z) / 2, 1.0  # P(γ ≤ low) ≤ α by the union bound
    for _ in range(4):
        grid = np.geomspace(low, high, 24)
        p = 1 - _stay_inside(grid, n, z)
        last = int(np.flatnonzero(p <= level).max(initial=0))
        if last == len(grid) - 1:
            low = high
            break
        low, high = grid[last], grid[last + 1]
    inside = np.maximum(stats.binom.ppf(low / 2, n, z) - 2, 0).astype(int)
    outside = np.minimum(stats.binom.isf(low / 2, n, z) + 2, n).astype(int)
    least, most = np.empty(len(z), int), np.empty(len(z), int)
    for k in range(len(z)):
        there = np.arange(inside[k], outside[k] + 1)
        kept = there[2 * _tails(there, n, z[k]) > low * _TIE]
        least[k], most[k] = (kept[0], kept[-1]) if len(kept) else (there[0], there[-1])
    return least, most


def rank_p_value_chi2(ranks: np.ndarray, num_draws: int, bins: int | None = None) -> np.ndarray:
    """p-values of Pearson's χ² that ranks are uniform on {0, …, num_draws}, with the exact expectation of each bin.

    χ² = Σ_b (O_b − n p_b)² / (n p_b) against the χ² law with bins − 1 degrees of freedom (asymptotic in n).

    Args:
        ranks: `(n,)` or `(n, m)`. num_draws: L.
        bins: B; min(20, L + 1, n // 10) when omitted, so that at least about 10 are expected in each.

    Returns:
        `()` or `(m,)`.

    Raises:
        ValueError: fewer than two bins.
    """
    r = np.asarray(ranks)
    flat = r.reshape(len(r), -1)
    bins = min(20, num_draws + 1, len(r) // 10) if bins is None else min(bins, num_draws + 1)
    if bins < 2:
        raise ValueError(
            f"χ² needs at least two bins, and {len(r)} ranks of {num_draws} draws give {bins}; take more simulations."
        )
    cuts = np.round(np.arange(bins + 1) * (num_draws + 1) / bins).astype(int)
    below = counts_below(flat, num_draws, cuts[1:-1])
    observed = np.diff(below, axis=-1, prepend=0, append=len(r))
    expected = len(r) * np.diff(cuts) / (num_draws + 1)
    statistic = ((observed - expected) ** 2 / expected).sum(-1)
    return stats.chi2.sf(statistic, bins - 1).reshape(r.shape[1:])


def counts_below(ranks: np.ndarray, num_draws: int, cuts: np.ndarray) -> np.ndarray:
    """#{rank < c_k} of ranks `(n, m)`: `(m, K)`."""
    m = ranks.shape[1]
    flat = ranks.astype(np.int64) + (num_draws + 1) * np.arange(m)
    histogram = np.bincount(flat.reshape(-1), minlength=(num_draws + 1) * m).reshape(m, num_draws + 1)
    return np.cumsum(histogram, axis=1)[:, np.asarray(cuts, dtype=int) - 1]
