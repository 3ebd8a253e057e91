r"""Residual χ² at posterior draws, with its null distribution.

χ²(x) = |R^(-1/2) (d − g(x))|² is χ² with n degrees of freedom at the truth. At a posterior draw it is not, for given data:
a linear-Gaussian problem with whitened operator G = R^(-1/2) A, posterior covariance P and H = G P Gᵀ (eigenvalues
h_k ∈ [0, 1), the leverages) has

    residual at the posterior mean ~ N(0, I − H) over data,       spread of predictions around it ~ N(0, H),

so that the posterior mean leaves Σ(1 − h_k) < n, and the mean of χ² over S draws is distributed as

    Σ_k (1 − h_k + h_k/S) χ²_1 + Σ_k (h_k/S) χ²_{S−1},      mean n, variance below 2n.

Over data *and* draws the law is that of the truth, since (x̃, d) and (x, d) have one law for a correct posterior, linear
or not: one draw an observation gives exactly χ²_n. Draws of one observation share their data, so their p-values are
averaged and doubled, which keeps them valid (Rüschendorf 1982; Vovk & Wang 2020).

A good χ² proves little: it is nearly blind to a wrong prior and to wrong spread in unmeasured directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import stats

from invgen.diagnostics._arrays import Array, tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ResidualChi2", "residual_chi2", "weighted_chi2_sf"]


@dataclass(frozen=True, eq=False)
class ResidualChi2:
    """χ² of residuals at posterior draws against its law under a correct posterior.

    Attributes:
        values: χ² of each draw, `(n_obs, draws)`. n: degrees of freedom (real data) of one observation.
        mean: over draws and observations; n is expected. sd: of that mean under the null, an upper bound without
            leverages. p_value: two-sided. level: α.
        leverages: `(n,)`, when given.
    """

    values: np.ndarray
    n: int
    mean: float
    sd: float
    p_value: float
    level: float
    leverages: np.ndarray | None = None

    @property
    def passed(self) -> bool:
        """The residuals are of the size that noise and posterior say."""
        return self.p_value > self.level

    def plot(self, ax: Axes | None = None) -> Axes:
        """Histogram of the draws' χ² with the law of the truth's."""
        from invgen.diagnostics import figures

        return figures.residual_figure(self, ax)


def residual_chi2(
    residuals: Array,
    sigma: Any = 1.0,
    *,
    mask: Array | None = None,
    leverages: Array | None = None,
    level: float = 0.01,
) -> ResidualChi2:
    """Are residuals at posterior draws of the size that the noise model says?

    Args:
        residuals: d − g(x) at posterior draws, `(n_obs, draws, *data_shape)`, real or complex; correlated noise is
            whitened by the caller (R^(-1/2), sigma = 1).
        sigma: noise sd in data units, a number or anything that broadcasts to the data; of a complex datum as a whole
            (σ²/2 a part).
        mask: boolean `data_shape`, True where measured.
        leverages: eigenvalues of R^(-1/2) A P Aᵀ R^(-1/2), `(n,)`: makes the test of a linear-Gaussian problem exact
            for the mean over draws, and much sharper. Without them the p-values of single draws are combined.
        level: α.

    Returns:
        `ResidualChi2`.

    Raises:
        ValueError: a shape that does not fit, NaN, leverages outside [0, 1].

    Targets: the null law over the prior predictive (data that really come from prior and noise model).
    References: module docstring; Vovk & Wang, Combining p-values via averaging, Biometrika 2020.
    """
    if isinstance(residuals, np.ndarray):
        residuals = torch.from_numpy(np.ascontiguousarray(residuals))
    residuals = torch.as_tensor(residuals).detach()
    scaled = residuals / torch.as_tensor(sigma, device=residuals.device)
    if scaled.ndim < 2:
        raise ValueError(f"Residuals have the shape (n_obs, draws, *data_shape), got {tuple(scaled.shape)}.")
    parts = 2 if scaled.is_complex() else 1
    power = scaled.abs().square() * parts
    if mask is not None:  # first: what was not measured may hold NaN
        power = power[:, :, torch.as_tensor(mask, dtype=torch.bool, device=power.device)]
    power = tensor(power, "The residuals")
    n = parts * max(int(np.prod(power.shape[2:])), 1)
    chi2 = power.double().reshape(*power.shape[:2], -1).sum(2).cpu().numpy()
    n_obs, draws = chi2.shape
    mean = float(chi2.mean())
    if leverages is None:
        total = chi2.sum(0)  # over observations: n · n_obs degrees of freedom for each draw
        tails = np.minimum(stats.chi2.cdf(total, n * n_obs), stats.chi2.sf(total, n * n_obs))
        p = float(np.minimum(1, 2 * tails).mean()) * (2 if draws > 1 else 1)
        return ResidualChi2(chi2, n, mean, float(np.sqrt(2 * n / n_obs)), min(1.0, p), level)
    h = np.asarray(tensor(leverages, "The leverages").cpu(), dtype=float).reshape(-1)
    if len(h) != n or h.min() < -1e-9 or h.max() > 1 + 1e-9:
        raise ValueError(
            f"Leverages are {n} numbers in [0, 1], one a real datum, got {len(h)} in [{h.min():.3g}, {h.max():.3g}]; pad with zeros."
        )
    h = h.clip(0, 1)
    weights = np.concatenate([1 - h + h / draws, h / draws])
    freedom = np.concatenate([np.ones(n), np.full(n, draws - 1.0)]) * n_obs
    upper = weighted_chi2_sf(mean * n_obs, weights, freedom)
    sd = float(np.sqrt(2 * (weights**2 * freedom).sum())) / n_obs
    return ResidualChi2(chi2, n, mean, sd, min(1.0, 2 * min(upper, 1 - upper)), level, h)


def weighted_chi2_sf(x: float, weights: Array, freedom: Array) -> float:
    r"""P(Σ_k w_k χ²_{ν_k} > x) of independent χ² variables with positive weights, by Imhof's inversion formula.

    P = 1/2 + (1/π) ∫_0^∞ sin θ(u) / (u ρ(u)) du,  θ = ½ Σ ν_k arctan(w_k u) − ½ x u,  ρ = ∏ (1 + w_k² u²)^(ν_k/4).

    Args:
        x: threshold. weights: w_k ≥ 0, `(K,)`. freedom: ν_k ≥ 0, `(K,)`.

    Returns:
        Probability, absolute error about 1e-8. One common weight, and x ≤ 0, are treated in closed form.

    Reference: Imhof, Computing the distribution of quadratic forms in normal variables, Biometrika 1961, (3.2).
    """
    w, nu = np.asarray(weights, dtype=float), np.asarray(freedom, dtype=float)
    keep = (w > 0) & (nu > 0)
    if not keep.any():
        return float(x < 0)
    w, back = np.unique(w[keep], return_inverse=True)
    nu = np.bincount(back, weights=nu[keep])
    if x <= 0:
        return 1.0
    if w[-1] - w[0] < 1e-12 * w[-1]:
        return float(stats.chi2.sf(x / w[-1], nu.sum()))
    mean, sd = float((w * nu).sum()), float(np.sqrt(2 * (w**2 * nu).sum()))
    w, x = w / sd, x / sd  # then the integrand lives on u of order one

    def integrand(u: np.ndarray) -> np.ndarray:
        grid = np.multiply.outer(u, w)
        theta = 0.5 * (np.arctan(grid) @ nu) - 0.5 * x * u
        rho = np.exp(0.25 * (np.log1p(grid**2) @ nu))
        return np.sin(theta) / (u * rho)

    # beyond `end` the integrand is below 1e-11: ρ grows at least like (1 + w² u²)^(ν/4)
    end = 1.0
    while np.exp(-0.25 * (np.log1p((end * w) ** 2) @ nu)) > 1e-11 and end < 1e6:
        end *= 1.3
    half_period = 6.0 / max(x, mean / sd)
    dense = np.linspace(0, min(16.0, end), int(np.ceil(min(16.0, end) / min(0.5, half_period))) + 1)
    rest = np.linspace(dense[-1], end, int(np.clip((end - dense[-1]) / half_period, 0, 200_000)) + 1)
    edges = np.concatenate([dense, rest[1:]])
    nodes, node_weights = np.polynomial.legendre.leggauss(12)
    half = np.diff(edges)[:, None] / 2
    u = edges[:-1, None] + half * (1 + nodes)
    total = 0.0
    for start in range(0, len(u), 4096):
        part = slice(start, start + 4096)
        total += float((integrand(u[part].reshape(-1)).reshape(u[part].shape) * node_weights * half[part]).sum())
    return float(np.clip(0.5 + total / np.pi, 0, 1))
