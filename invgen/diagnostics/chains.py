r"""Chains: have they met, and how many independent draws are they worth?

R̂² = ((N − 1)/N · W + B/N) / W with the within-chain variance W and the between-chain variance B of chains split in halves
(Gelman & Rubin 1992). Vehtari et al. (2021) compute it for rank-normalised draws z = Φ⁻¹((rank − 3/8)/(S + 1/4)) (finite
for heavy tails) and for |x − median| (sees chains of different spread), and take the larger. The effective sample size is

    ESS = M N / τ,   τ = −1 + 2 Σ_t (ρ_2t + ρ_2t+1),   ρ_t = 1 − (W − mean over chains of s²_m ρ_{m,t}) / var⁺,

the sum cut where a pair is no longer positive and made to fall monotonically (Geyer 1992). "Bulk" is that of rank-normalised
draws, "tail" the smaller one of the indicators of the 5 % and 95 % quantiles.

Nested R̂ (Margossian et al. 2022) is for many short chains: K superchains of M chains, each superchain started at one point,
compare the variance of superchain means B with that inside superchains W (which counts the spread of chain means):
nR̂ = √(1 + B/W). It works for chains of a single draw.

References: Vehtari, Gelman, Simpson, Carpenter & Bürkner, Rank-normalization, folding, and localization: an improved R̂,
Bayesian Analysis 2021, arXiv:1903.08008; Margossian et al., Nested R̂: assessing the convergence of Markov chain Monte
Carlo when running many short chains, arXiv:2110.13017.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import fft, special, stats

from invgen.diagnostics._arrays import Array, chunks, tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ChainCheck", "check_chains", "ebfmi", "ess", "nested_rhat", "rhat"]


@dataclass(frozen=True, eq=False)
class ChainCheck:
    """Convergence figures of every coordinate.

    Attributes:
        rhat: rank-normalised split R̂, `(*shape)`. ess_bulk, ess_tail: effective sample sizes, `(*shape)`.
        num_chains, num_draws: of the chains. rhat_limit, ess_limit: what passes.
    """

    rhat: np.ndarray
    ess_bulk: np.ndarray
    ess_tail: np.ndarray
    num_chains: int
    num_draws: int
    rhat_limit: float
    ess_limit: float

    @property
    def passed(self) -> bool:
        """Every R̂ is below its limit and every effective sample size above its own; NaN (constant draws) fails."""
        return bool(
            (self.rhat < self.rhat_limit).all()
            and (self.ess_bulk > self.ess_limit).all()
            and (self.ess_tail > self.ess_limit).all()
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Effective sample size against R̂, one point a coordinate."""
        from invgen.diagnostics import figures

        return figures.chain_figure(self, ax)

    def __str__(self) -> str:
        return (
            f"{self.num_chains} chains of {self.num_draws} draws {'passed' if self.passed else 'FAILED'}: largest R-hat {np.max(self.rhat):.4f} (limit {self.rhat_limit:g}), "
            f"smallest ESS {np.min(self.ess_bulk):.0f} bulk, {np.min(self.ess_tail):.0f} tail (limit {self.ess_limit:g})"
        )


def check_chains(draws: Array, *, rhat_limit: float = 1.01, ess_limit: float | None = None) -> ChainCheck:
    """R̂ and effective sample sizes of every coordinate, against the limits that Vehtari et al. (2021) recommend.

    Args:
        draws: `(chain, draw, *shape)`. rhat_limit: R̂ must be below; four chains or more make it meaningful.
        ess_limit: bulk and tail ESS must exceed it; 100 a chain when omitted.

    Raises:
        ValueError: fewer than two chains or four draws, NaN.
    """
    chains, count = np.shape(draws)[:2] if np.ndim(draws) >= 2 else (0, 0)
    return ChainCheck(
        rhat(draws),
        ess(draws),
        ess(draws, kind="tail"),
        chains,
        count,
        rhat_limit,
        100.0 * chains if ess_limit is None else ess_limit,
    )


def rhat(draws: Array) -> np.ndarray:
    """Rank-normalised split R̂: the larger one of bulk and folded draws.

    Args:
        draws: `(chain, draw, *shape)`, two chains and four draws at least.

    Returns:
        `(*shape)`; NaN where all draws are equal.

    Raises:
        ValueError: fewer chains or draws, NaN.

    Reference: Vehtari et al. (2021), section 4.1 (rank-normalised, folded) with equations 1-4.
    """

    def of(x: np.ndarray) -> np.ndarray:
        halves = _split(x)
        folded = np.abs(halves - np.median(halves, axis=(0, 1)))
        return np.maximum(_rhat(_normal_scores(halves)), _rhat(_normal_scores(folded)))

    return _each(draws, of, chains=2)


def ess(draws: Array, *, kind: str = "bulk") -> np.ndarray:
    """Effective sample size of M chains of N draws.

    Args:
        draws: `(chain, draw, *shape)`, four draws at least.
        kind: "bulk" (rank-normalised split chains: means and medians), "tail" (5 % and 95 % quantiles, the smaller) or
            "mean" (the draws as they are: the Monte-Carlo error of their mean).

    Returns:
        `(*shape)`, at most M N log10(M N); M N for draws that are all equal.

    Raises:
        ValueError: too few draws, NaN, an unknown kind.

    Cost: one fast Fourier transform of each chain. Reference: Vehtari et al. (2021), equations 10-14; Geyer 1992.
    """

    def bulk(x: np.ndarray) -> np.ndarray:
        return _ess(_normal_scores(_split(x)))

    def tail(x: np.ndarray) -> np.ndarray:
        q = np.quantile(x, [0.05, 0.95], axis=(0, 1))
        return np.minimum(*(_ess(_split((x <= at).astype(float))) for at in q))

    kinds = {"bulk": bulk, "tail": tail, "mean": lambda x: _ess(_split(x))}
    if kind not in kinds:
        raise ValueError(f"The kind of an effective sample size is 'bulk', 'tail' or 'mean', got {kind!r}.")
    return _each(draws, kinds[kind], chains=1)


def ebfmi(energy: Array) -> np.ndarray:
    """Energy Bayesian fraction of missing information of Hamiltonian chains: E-BFMI = Σ (E_n − E_{n−1})² / Σ (E_n − Ē)².

    How far one draw of the momenta moves the energy, against how far the energy ranges. Near 1 (2 at most for independent
    energies) momenta reach all levels; below 0.3 the chain walks through them slowly and misses the tails, as in a funnel.

    Args:
        energy: `(chain, draw)`, H of each draw, `stats["energy"][observation]` of HMC and NUTS; of every step (thin=1),
            as thinned energies look more independent than the chain is.

    Returns:
        `(chain,)`; NaN where the energy never changes.

    Raises:
        ValueError: fewer than four draws, NaN.

    Reference: Betancourt, Diagnosing suboptimal cotangent disintegrations in Hamiltonian Monte Carlo, 2016,
    arXiv:1604.00695, section 3.
    """
    x = tensor(energy, "The energies")
    if x.ndim != 2 or x.shape[1] < 4:
        raise ValueError(f"Energies have the shape (chain, draw) with four draws at least, got {tuple(x.shape)}.")
    values = x.cpu().numpy().astype(float)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.square(np.diff(values, axis=1)).sum(1) / (values.var(1) * values.shape[1])


def nested_rhat(draws: Array, *, rank_normalize: bool = False) -> np.ndarray:
    """Nested R̂ of many short chains in superchains that started at one point each: nR̂ = √(1 + B/W).

    B is the variance of the K superchain means; W the mean over superchains of (variance of the M chain means + mean
    within-chain variance), the first absent for M = 1 and the second for N = 1. Its threshold is √(1 + 1/M + τ) with the
    tolerated squared bias τ in units of the variance (Margossian et al. 2022, section 3): the larger M, the sharper.

    Args:
        draws: `(superchain, chain, draw, *shape)`, two superchains at least, M·N at least 2.
        rank_normalize: normal scores instead of the draws, for heavy tails.

    Returns:
        `(*shape)`; NaN where all draws are equal.

    Raises:
        ValueError: too few superchains or draws, NaN.
    """
    x = tensor(draws, "The draws")
    if x.ndim < 3 or x.shape[0] < 2 or x.shape[1] * x.shape[2] < 2:
        raise ValueError(
            f"Nested R-hat needs (superchain, chain, draw, *shape) with two superchains of two draws at least, got {tuple(x.shape)}."
        )
    K, M, N = x.shape[:3]

    def of(flat: np.ndarray) -> np.ndarray:
        z = (_normal_scores(flat) if rank_normalize else flat).reshape(K, M, N, -1)
        means = z.mean(2)
        between = means.mean(1).var(0, ddof=1)
        within = np.zeros(means.shape[::2])
        if M > 1:
            within = within + means.var(1, ddof=1)
        if N > 1:
            within = within + z.var(2, ddof=1).mean(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.sqrt(1 + between / within.mean(0))

    return _each(x.reshape(K * M, N, *x.shape[3:]), of, chains=2, least=1)


def _each(draws: Array, function: Callable[[np.ndarray], np.ndarray], *, chains: int, least: int = 4) -> np.ndarray:
    """A function of `(chain, draw, some coordinates)` -> `(some coordinates,)`, a bounded number of them at a time."""
    x = tensor(draws, "The draws")
    if x.ndim < 2 or x.shape[0] < chains or x.shape[1] < least:
        raise ValueError(
            f"Draws have the shape (chain, draw, *shape) with {chains} chains and {least} draws at least, got {tuple(x.shape)}."
        )
    flat = x.reshape(x.shape[0], x.shape[1], -1)
    out = [
        function(flat[:, :, c].cpu().numpy().astype(float)) for c in chunks(flat.shape[2], 8 * flat[:, :, 0].numel())
    ]
    return np.concatenate(out).reshape(x.shape[2:])


def _split(x: np.ndarray) -> np.ndarray:
    """Halves of chains as chains; the middle draw of an odd number is left out."""
    half = x.shape[1] // 2
    return np.concatenate([x[:, :half], x[:, -half:]])


def _normal_scores(x: np.ndarray) -> np.ndarray:
    """Φ⁻¹((rank − 3/8)/(S + 1/4)) over all chains and draws, ties sharing their mean rank."""
    flat = x.reshape(-1, x.shape[-1])
    rank = stats.rankdata(flat, axis=0)
    return special.ndtri((rank - 0.375) / (len(flat) + 0.25)).reshape(x.shape)


def _rhat(x: np.ndarray) -> np.ndarray:
    n = x.shape[1]
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = n * x.mean(1).var(0, ddof=1) / x.var(1, ddof=1).mean(0)
        return np.sqrt((ratio + n - 1) / n)


def _ess(x: np.ndarray) -> np.ndarray:
    """Effective sample size of chains `(chain, draw, dim)` as they are, all coordinates at once."""
    m, n = x.shape[:2]
    centred = x - x.mean(1, keepdims=True)
    size = fft.next_fast_len(2 * n, real=True)
    spectrum = fft.rfft(centred, size, axis=1)
    covariance = fft.irfft(np.abs(spectrum) ** 2, size, axis=1)[:, :n].mean(0) / n  # of lag t, biased, over chains
    within = covariance[0] * n / (n - 1)
    total = covariance[0] + (x.mean(1).var(0, ddof=1) if m > 1 else 0.0)
    constant = np.ptp(x, axis=(0, 1)) < np.finfo(float).resolution
    rho = 1 - (within - covariance) / np.where(constant, 1.0, total)
    rho[0] = 1.0
    # pairs (ρ_0 + ρ_1), (ρ_2 + ρ_3), …; the covariances of the last lags are hardly estimates
    pairs = 1 + max((n - 3) // 2, 0)
    even, odd = rho[0 : 2 * pairs : 2], rho[1 : 2 * pairs : 2]
    sums = even + odd
    positive = np.logical_and.accumulate(sums[1:] > 0, axis=0)
    cut = np.minimum(1 + positive.sum(0), pairs - 1)  # the first pair left out, the last one at the latest
    kept = np.arange(pairs)[:, None] < cut
    tau = -1 + 2 * np.where(kept, np.minimum.accumulate(sums, axis=0), 0.0).sum(0)
    # of the pair left out, a positive even part still counts once: less variance for antithetic chains
    tau += np.maximum(np.take_along_axis(even, cut[None], axis=0)[0], 0)
    tau = np.maximum(tau, 1 / np.log10(m * n))
    return np.where(constant, float(m * n), m * n / tau)
