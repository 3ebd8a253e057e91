r"""Posterior moments that do not hang on chains having met: importance sampling, and runs judged by their spread.

A chain that stays in the mode it fell into looks converged from inside. Here neither side is judged from inside:

    reference   draws of a mixture of Student t's q(z) = Σ_m s_m t_ν(z; μ_m, Σ_m), one component for every place that
                any search has found, a fixed share s_m of the draws of each, weights w = p(d | f(z)) N(z; 0, I)/q(z) with
                the whole mixture below (deterministic mixture, Owen & Zhou 2000, section 4; equal to the balance heuristic
                of Veach & Guibas 1995): the mean weight is p(d), and modes are weighed by what they hold, not by
                how they were found. Draws are independent; errors are those of their batches.
    runs        R independent runs (or chains), one estimate of each moment from each; the error is the spread of the
                R estimates over √R, which contains what a run got wrong about modes.

A difference over its error is a Student t of Welch's degrees of freedom and is told as the normal deviate z of the same
tail probability. Runs in different modes have a wide spread, which would excuse any difference: nested R-hat over
them must therefore be small, or nothing is agreed on.

Searches by annealed SMC come with an unbiased estimate Ẑ_r of p(d), as Ẑ_r f̂_r is of p(d) E f: Σ_r Ẑ_r f̂_r / Σ_r Ẑ_r is
their consistent combination, and `by_evidence` draws positions from it.

References: Owen & Zhou, Safe and effective importance sampling, JASA 95, 2000; Veach & Guibas, SIGGRAPH 1995; Welch,
Biometrika 34, 1947; Margossian et al., arXiv:2110.13017 (nested R-hat).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from invgen.diagnostics import nested_rhat

__all__ = ["Agreement", "Reference", "StudentMixture", "agreement", "by_evidence", "importance"]

RHAT = 1.05  # of the runs: above it they do not describe one distribution


@dataclass(frozen=True)
class StudentMixture:
    """q(z) = Σ_m s_m t_ν(z; μ_m, L_m L_mᵀ).

    Attributes:
        means: `(M, dim)`. factors: L, `(M, dim, dim)`, lower triangular. shares: s, `(M,)`, of sum 1. nu: ν.
    """

    means: Tensor
    factors: Tensor
    shares: Tensor
    nu: float = 8.0

    @classmethod
    def fitted(cls, places: Sequence[Tensor], shares: Sequence[float], inflation: float = 1.2) -> StudentMixture:
        """A component for each set of draws `(n, dim)`: their mean, and their covariance times `inflation`."""
        sets = [p.double() for p in places]
        roots = []
        for draws in sets:
            C = torch.cov(draws.T)  # draws fewer than twice the numbers leave a covariance nearly without rank
            roots.append(torch.linalg.cholesky(inflation * (C + 1e-3 * torch.diag(C.diagonal()))))
        total = torch.tensor(shares, dtype=torch.float64)
        return cls(torch.stack([d.mean(0) for d in sets]), torch.stack(roots), total / total.sum())

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """About n draws `(≈ n, dim)`: of component m the whole number next to s_m n, components one after another."""
        parts = []
        for mean, root, share in zip(self.means, self.factors, self.shares.tolist(), strict=True):
            count = max(1, round(share * n))
            xi = torch.randn(count, len(mean), generator=generator, dtype=torch.float64)
            gamma = torch.randn(count, int(self.nu), generator=generator, dtype=torch.float64).square().mean(1)
            parts.append(mean + xi @ root.T / gamma.sqrt()[:, None])
        return torch.cat(parts)

    def log_prob(self, z: Tensor) -> Tensor:
        """log q(z), `(n,)`."""
        dim, nu = z.shape[1], self.nu
        y = torch.linalg.solve_triangular(self.factors, (z - self.means[:, None]).mT, upper=False)
        constant = math.lgamma((nu + dim) / 2) - math.lgamma(nu / 2) - 0.5 * dim * math.log(nu * math.pi)
        volume = self.factors.diagonal(dim1=1, dim2=2).log().sum(1)
        logs = constant - volume[:, None] - 0.5 * (nu + dim) * torch.log1p(y.square().sum(1) / nu)
        return (logs + self.shares.log()[:, None]).logsumexp(0)


@dataclass(frozen=True)
class Reference:
    """Moments with errors.

    Attributes:
        mean, variance: `(dim,)`; mean_error, variance_error: standard errors from `batches` batches, a variance's of the
        mean of (z − mean)². log_evidence, log_evidence_error. ess: (Σ w)²/Σ w². largest: largest share of a draw.
        batches: of independent draws. held: share of the posterior within reach of each component, `(M,)`: the
        weights times the responsibilities s_m t_m/q.
    """

    mean: np.ndarray
    variance: np.ndarray
    mean_error: np.ndarray
    variance_error: np.ndarray
    log_evidence: float
    log_evidence_error: float
    ess: float
    largest: float
    batches: int
    draws: Tensor = field(repr=False)
    logs: Tensor = field(repr=False)

    def within(self, inside: Tensor) -> Reference:
        """The posterior cut to the draws `inside`, `(n,)`; its evidence falls by the share that it holds."""
        return _moments(self.draws, torch.where(inside, self.logs, -math.inf), self.batches)


def importance(
    log_density: Callable[[Tensor], Tensor], mixture: StudentMixture, n: int, *, seed: int = 0, batches: int = 64
) -> Reference:
    """Self-normalised importance sampling from a mixture, with errors from batches.

    Args:
        log_density: `(n, dim)` to `(n,)`, normalised up to p(d). mixture: q. n: draws, about. batches: they come in.
    """
    g = torch.Generator().manual_seed(seed)
    # whole numbers of draws: the density below is that of the shares that they make
    counts = (mixture.shares * (n // batches)).round().clamp_min(1)
    mixture = replace(mixture, shares=counts / counts.sum())
    draws = [mixture.draw(int(counts.sum()), g) for _ in range(batches)]
    z = torch.cat(draws)
    logs = log_density(z).double() - mixture.log_prob(z)
    return _moments(z, torch.where(torch.isnan(logs), -math.inf, logs), batches)


def _moments(z: Tensor, logs: Tensor, batches: int) -> Reference:
    """Of weighted draws that come in batches of one size."""
    total = logs.logsumexp(0)
    w = (logs - total).exp()
    mean = w @ z
    square = (z - mean).square()
    variance = w @ square

    def error(values: Tensor, centre: Tensor) -> np.ndarray:
        """Of a ratio: the residuals w (f − mean) of batches are independent, of mean 0, and add up to nothing."""
        sums = (w[:, None] * (values - centre)).reshape(batches, -1, z.shape[1]).sum(1)
        return (sums.std(0) * math.sqrt(batches)).numpy()

    share = w.reshape(batches, -1).sum(1) * batches
    return Reference(
        mean.numpy(),
        variance.numpy(),
        error(z, mean),
        error(square, variance),
        float(total) - math.log(len(z)),
        float(share.std()) / math.sqrt(batches),
        float(1 / w.square().sum()),
        float(w.max()),
        batches,
        z,
        logs,
    )


def by_evidence(found: Sequence[Tensor], log_evidence: Sequence[float], n: int) -> tuple[Tensor, list[int]]:
    """Positions `(n, dim)` from Σ_r Ẑ_r p̂_r, systematically, and the search of each.

    Args:
        found: particles of equal weight of each search, `(particles, dim)`. log_evidence: log Ẑ_r.
    """
    logs = np.asarray(log_evidence) - max(log_evidence)
    edges = np.cumsum(np.exp(logs)) / np.exp(logs).sum()
    search = np.searchsorted(edges, (np.arange(n) + 0.5) / n).tolist()
    rank = [search[:k].count(r) for k, r in enumerate(search)]
    return torch.stack(
        [found[r][j * len(found[r]) // search.count(r)] for r, j in zip(search, rank, strict=True)]
    ), search


@dataclass(frozen=True)
class Agreement:
    """How far runs are from a reference.

    Attributes:
        away: the largest distance of each run's mean from the reference's in posterior sd, `(R,)`. z: largest |z| of
            means and variances. means, variances: z of each, `(dim,)`. rhat: nested R-hat of the runs in their groups.
        ess: of the runs together, the smallest over the means: the posterior's variance over the squared error.
    """

    away: np.ndarray = field(repr=False)
    z: float
    means: np.ndarray = field(repr=False)
    variances: np.ndarray = field(repr=False)
    rhat: float
    ess: float

    @property
    def reached(self) -> float:
        """Share of the runs whose mean is within three posterior sd of the reference's in every number."""
        return float((self.away < 3).mean())

    @property
    def judged(self) -> float:
        """z, infinite where the runs do not describe one distribution."""
        return self.z if self.rhat <= RHAT else math.inf


def agreement(runs: Tensor, reference: Reference, groups: int | None = None) -> Agreement:
    """Runs `(R, n, dim)` against a reference: R estimates of each mean and of each mean of (z − reference mean)².

    Args:
        groups: of runs that follow one another, their number, for nested R-hat; each run alone when omitted.
    """
    x = runs.double().numpy()
    R, n, dim = x.shape
    found = []
    for values, wanted, error in (
        (x, reference.mean, reference.mean_error),
        (np.square(x - reference.mean), reference.variance, reference.variance_error),
    ):
        each = values.mean(1)
        own, other = each.var(0, ddof=1) / R, error**2
        freedom = (own + other) ** 2 / (own**2 / (R - 1) + other**2 / (reference.batches - 1))
        t = (each.mean(0) - wanted) / np.sqrt(own + other)
        tail = np.maximum(stats.t.sf(np.abs(t), freedom), 1e-300)  # z of 37 at the most
        found.append((np.sign(t) * stats.norm.isf(tail), own))
    (means, own), (variances, _) = found
    return Agreement(
        (np.abs(x.mean(1) - reference.mean) / np.sqrt(reference.variance)).max(1),
        float(max(np.abs(means).max(), np.abs(variances).max())),
        means,
        variances,
        float(nested_rhat(x.reshape(groups or R, -1, n, dim)).max()),
        float((reference.variance / own).min()),
    )
