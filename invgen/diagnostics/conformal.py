r"""Conformal credible regions: coverage that holds whatever the posterior got wrong.

A score s(x, d) orders values of x by how badly they fit what the posterior says of d. With the scores s_i of n simulations
(x_i, d_i) that the posterior was not trained on, and a new pair exchangeable with them,

    q = the ⌈(n + 1)(1 − α)⌉-th smallest s_i,      R(d) = {x : s(x, d) ≤ q},      1 − α ≤ P(x ∈ R(d)) ≤ 1 − α + 1/(n + 1)

(the upper bound for scores without ties; Vovk, Gammerman & Shafer 2005; Lei et al. 2018, theorem 2.2). The probability is over
simulations and the new pair together: coverage is marginal, not for every d, and sharp only where the score is: an
over-confident posterior gets wider regions, a biased one gets regions around the wrong place. Given the n simulations at hand
the coverage is Beta(k, n + 1 − k) distributed, k = ⌈(n + 1)(1 − α)⌉: 0.90 ± 0.013 for n = 500.

References: Vovk, Gammerman & Shafer, Algorithmic learning in a random world, Springer 2005; Lei, G'Sell, Rinaldo, Tibshirani &
Wasserman, Distribution-free predictive inference for regression, JASA 2018, arXiv:1604.04173; Romano, Patterson & Candès,
Conformalized quantile regression, NeurIPS 2019, arXiv:1905.03222; Patel et al., Variational inference with coverage guarantees
in simulation-based inference, ICML 2024, arXiv:2305.14275.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from invgen.diagnostics._arrays import Array, chunks, pair, tensor

__all__ = [
    "ConformalDensity",
    "ConformalEllipsoid",
    "ConformalIntervals",
    "conformal_density",
    "conformal_ellipsoid",
    "conformal_intervals",
    "conformal_quantile",
]


def conformal_quantile(scores: Array, coverage: float = 0.9) -> Tensor:
    """The threshold q of the module's equation, for each column of scores.

    Args:
        scores: s_i, `(n,)` or `(n, m)`, larger is worse. coverage: 1 − α.

    Returns:
        `()` or `(m,)`.

    Raises:
        ValueError: a coverage outside (0, 1), fewer simulations than it needs (n + 1 ≥ 1/α), NaN.
    """
    s = tensor(scores, "The scores", infinite=True)
    if not 0 < coverage < 1:
        raise ValueError(f"The coverage must lie between 0 and 1, got {coverage}.")
    rank = math.ceil((len(s) + 1) * coverage - 1e-9)
    if rank > len(s):
        raise ValueError(
            f"A coverage of {coverage:g} needs at least {math.ceil(coverage / (1 - coverage) - 1e-9)} simulations, got {len(s)}; simulate more."
        )
    return s.sort(0).values[rank - 1]


@dataclass(frozen=True, eq=False)
class ConformalIntervals:
    """Central intervals of posterior draws, widened until they cover.

    s = |x_k − m_k(d)| / h_k(d): m and h are middle and half width of the draws' central interval. `joint`: the largest over
    the coordinates, so that the whole box covers.

    Attributes:
        factor: by which h is multiplied, `(*shape)`; above 1 for an over-confident posterior. coverage: 1 − α, of each
            interval or of the box. n: simulations. joint: see above.
    """

    factor: Tensor
    coverage: float
    n: int
    joint: bool

    def __call__(self, samples: Array) -> tuple[Tensor, Tensor]:
        """Lower and upper ends, `(n_obs, *shape)` each, of draws `(n_obs, draws, *shape)`."""
        middle, half = _central(tensor(samples, "The posterior draws"), self.coverage)
        return middle - self.factor.to(half) * half, middle + self.factor.to(half) * half

    def contains(self, truth: Array, samples: Array) -> Tensor:
        """Does each interval hold the value: `(n_obs, *shape)`, or `(n_obs,)` of the box where `joint`."""
        t, s = pair(truth, samples)
        low, high = self(s)
        inside = (t >= low) & (t <= high)
        return inside.flatten(1).all(1) if self.joint else inside


def _central(samples: Tensor, coverage: float) -> tuple[Tensor, Tensor]:
    tails = torch.tensor([(1 - coverage) / 2, (1 + coverage) / 2], dtype=torch.float64).to(samples)
    parts = [torch.quantile(samples[rows], tails, dim=1) for rows in chunks(len(samples), samples[0].numel())]
    low, high = torch.cat(parts, dim=1)
    half = 0.5 * (high - low)
    return 0.5 * (high + low), half.clamp_min(torch.finfo(half.dtype).tiny)


def conformal_intervals(
    truth: Array, samples: Array, coverage: float = 0.9, *, joint: bool = False
) -> ConformalIntervals:
    """Intervals for every parameter with the coverage that they state.

    Args:
        truth: x_i of simulations that the posterior was not trained on, `(n, *shape)`. samples: draws of the posterior of
            d_i, `(n, draws, *shape)`. coverage: 1 − α. joint: of all parameters together instead of each.

    Raises:
        ValueError: shapes that do not fit, NaN, too few simulations.

    Example:
        >>> x, theta, (d,) = problem.simulate(1000, seed=7)
        >>> draws = amortized.solve(problem.with_data(d), 500).samples.flatten(1, 2)
        >>> low, high = conformal_intervals(x, draws)(amortized(d_obs, 2000).samples.flatten(1, 2))
    """
    t, s = pair(truth, samples)
    middle, half = _central(s, coverage)
    scores = (t - middle).abs() / half
    shape = scores.shape[1:]
    flat = scores.flatten(1)
    if joint:
        factor = conformal_quantile(flat.amax(1), coverage).expand(flat.shape[1])
    else:
        factor = conformal_quantile(flat, coverage)
    return ConformalIntervals(factor.reshape(shape), coverage, len(t), joint)


@dataclass(frozen=True, eq=False)
class ConformalEllipsoid:
    """The ellipsoid of the draws' mean and covariance that covers: s = (x − μ(d))ᵀ Σ(d)⁻¹ (x − μ(d)).

    Attributes:
        radius: squared Mahalanobis radius of the region. coverage: 1 − α. n: simulations.
    """

    radius: float
    coverage: float
    n: int

    def contains(self, x: Array, samples: Array) -> Tensor:
        """`(n_obs,)`: is x `(n_obs, *shape)` inside the ellipsoid of draws `(n_obs, draws, *shape)`."""
        return _mahalanobis(*pair(x, samples)) <= self.radius


def _mahalanobis(x: Tensor, samples: Tensor) -> Tensor:
    t, s = x.double().flatten(1), samples.double().flatten(2)
    if s.shape[1] < s.shape[2] + 2:
        raise ValueError(
            f"{s.shape[1]} draws have no covariance in {s.shape[2]} dimensions; take more draws, or conformal_intervals."
        )
    mean = s.mean(1)
    centred = s - mean[:, None]
    covariance = centred.mT @ centred / (s.shape[1] - 1)
    floor = 1e-12 * covariance.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-300)
    factor = torch.linalg.cholesky(covariance + floor[:, None, None] * torch.eye(s.shape[2]).to(covariance))
    white = torch.linalg.solve_triangular(factor, (t - mean)[..., None], upper=False)[..., 0]
    return white.square().sum(1)


def conformal_ellipsoid(truth: Array, samples: Array, coverage: float = 0.9) -> ConformalEllipsoid:
    """A joint region of all parameters with the coverage that it states.

    Args:
        truth: `(n, *shape)`. samples: `(n, draws, *shape)`, more draws than dimensions. coverage: 1 − α.

    Raises:
        ValueError: as `conformal_intervals`; too few draws for a covariance.

    Cost: one Cholesky factor a simulation.
    """
    t, s = pair(truth, samples)
    return ConformalEllipsoid(float(conformal_quantile(_mahalanobis(t, s), coverage)), coverage, len(t))


@dataclass(frozen=True, eq=False)
class ConformalDensity:
    """The highest-density region that covers: s = mean_l log q(x_l | d) − log q(x | d), x_l draws of the posterior.

    Attributes:
        drop: by how many nats below the draws' mean log-density the region reaches. coverage: 1 − α. n: simulations.
    """

    drop: float
    coverage: float
    n: int

    def contains(self, log_prob: Array, sample_log_prob: Array) -> Tensor:
        """`(n_obs,)`: is the value with log q(x | d) `(n_obs,)` inside, draws having `(n_obs, draws)`."""
        return _drop(log_prob, sample_log_prob) <= self.drop


def _drop(log_prob: Array, sample_log_prob: Array) -> Tensor:
    value, draws = pair(log_prob, sample_log_prob, infinite=True)
    return draws.double().mean(1) - value.double()


def conformal_density(truth_log_prob: Array, sample_log_prob: Array, coverage: float = 0.9) -> ConformalDensity:
    """A joint region in the shape of the posterior's own density, of any form and in any number of pieces.

    Args:
        truth_log_prob: log q(x_i | d_i), `(n,)`. sample_log_prob: of draws, `(n, draws)`; a constant that depends on d_i
            alone may be missing from both. coverage: 1 − α.

    Raises:
        ValueError: shapes that do not fit, NaN, too few simulations.
    """
    scores = _drop(truth_log_prob, sample_log_prob)
    return ConformalDensity(float(conformal_quantile(scores, coverage)), coverage, len(scores))
