r"""A mixture of multivariate Student t's for each observation, fitted to modes and then to importance weights.

    q(z) = Σ_m s_m t_ν(z; μ_m, L_m L_mᵀ)

`joined` finds the modes among chains that have settled. `improved` is one step of population Monte Carlo with t components
(Cappé, Douc, Guillin, Marin & Robert 2008, section 4, arXiv:0710.4242): for draws z_i of q with normalised weights w_i ∝ π/q,
responsibilities ρ_im = s_m t_m(z_i)/q(z_i) and γ_im = (ν + d)/(ν + |L_m⁻¹(z_i − μ_m)|²),

    s_m = Σ_i w_i ρ_im,   μ_m = Σ_i w_i ρ_im γ_im z_i / Σ_i w_i ρ_im γ_im,   Σ_m = Σ_i w_i ρ_im γ_im (z_i − μ_m)(z_i − μ_m)ᵀ / s_m,

which raises E_π log q. Means and covariances count for as many draws as their weights are worth, and the former ones for 2 d.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

NU = 8.0  # ν: finite moments, and tails that lie above those of any posterior with a N(0, I) factor
_INFLATION = 1.2  # of the first covariances: too wide costs less than too narrow
_MOST = 32  # components of an observation
_APART = 16.0  # squared distance of means, in units of the mean covariance, from which two components are two modes


class Mixture(NamedTuple):
    """q of each set, in float64.

    Attributes:
        means: `(sets, M, dim)`. factors: L, `(sets, M, dim, dim)`. log_shares: `(sets, M)`; −∞ for a place not in use.
    """

    means: Tensor
    factors: Tensor
    log_shares: Tensor

    @staticmethod
    def of(state: Mapping[str, Tensor]) -> Mixture:
        """What the state of a run holds."""
        return Mixture(*(state[f"mixture_{n}"] for n in Mixture._fields))

    def entries(self) -> dict[str, Tensor]:
        """For the state of a run."""
        return {f"mixture_{n}": v for n, v in zip(self._fields, self, strict=True)}

    def distances(self, z: Tensor) -> Tensor:
        """|L_m⁻¹(z − μ_m)|², `(sets, n, M)` for z `(sets, n, dim)`."""
        centred = z.double()[:, None] - self.means[:, :, None]
        y = torch.linalg.solve_triangular(self.factors, centred.mT, upper=False)
        return y.square().sum(2).mT

    def parts(self, z: Tensor) -> Tensor:
        """log s_m t_m(z), `(sets, n, M)`: q is their logsumexp, responsibilities their softmax."""
        dim = z.shape[2]
        constant = math.lgamma((NU + dim) / 2) - math.lgamma(NU / 2) - 0.5 * dim * math.log(NU * math.pi)
        volume = self.factors.diagonal(dim1=2, dim2=3).log().sum(2)
        tails = 0.5 * (NU + dim) * torch.log1p(self.distances(z) / NU)
        return constant + (self.log_shares - volume)[:, None] - tails

    def draw(self, uniform: Tensor, xi: Tensor, gamma: Tensor) -> Tensor:
        """Draws `(sets, n, dim)` of q from U(0, 1) `(sets, n)`, N(0, I) `(sets, n, dim)`, Gamma(ν/2, 1) `(sets, n)`."""
        m = chosen(self.log_shares[:, None].expand(-1, uniform.shape[1], -1), uniform)
        rows = torch.arange(len(m), device=m.device)[:, None]
        scale = (NU / 2 / gamma).sqrt()[..., None]
        # per component, as factors of each draw would be n matrices
        out = self.means[rows, m]
        for k in range(self.means.shape[1]):
            turned = (xi * scale) @ self.factors[:, k].mT
            out = torch.where((m == k)[..., None], out + turned, out)
        return out


def chosen(logs: Tensor, uniform: Tensor) -> Tensor:
    """An index `(…)` of the last axis with probabilities softmax(logs), by inversion; logs `(…, n)`, uniform `(…)`."""
    steps = torch.nan_to_num(logs.softmax(-1), nan=0.0).cumsum(-1)
    return torch.searchsorted(steps, (uniform * steps[..., -1])[..., None].contiguous(), right=True)[..., 0].clamp_max(
        logs.shape[-1] - 1
    )


# --- modes -------------------------------------------------------------------------------------------------------------


def joined(draws: Tensor, energy: Tensor) -> Mixture:
    """A component for each group of chains that are in one place, of one observation.

    Chains are linked when their means are nearer than |Δ|² < 2 d + 8 √d in units of the covariance within the chains of their
    runs: twice what independent draws of one Gaussian have, plus four standard deviations of that. Groups are what links hold
    together. Shares follow Laplace's estimate of what a group holds, exp(−mean energy) √det Σ, and half of them is equal.

    Args:
        draws: `(runs, chains, n, dim)`. energy: mean of U + kinetic energy, `(runs, chains)`.
    """
    runs, chains, n, dim = draws.shape
    x = draws.double()
    good = (torch.isfinite(x).flatten(2).all(2) & torch.isfinite(energy)).flatten()
    if not bool(good.any()):
        return Mixture(
            x.new_full((1, 1, dim), math.nan),
            torch.eye(dim, dtype=x.dtype, device=x.device)[None, None],
            x.new_zeros(1, 1),
        )
    x = torch.nan_to_num(x)
    centres = x.mean(2)
    inside = (x - centres[:, :, None]) * good.reshape(runs, chains, 1, 1)
    within = torch.einsum("rcnd,rcne->rde", inside, inside) / max(1, chains * (n - 1))
    within = _shrunk(within, chains * n / 4, torch.diag_embed(within.diagonal(dim1=1, dim2=2).clamp_min(1e-12)), dim)
    roots = torch.linalg.cholesky(within)
    flat = centres.flatten(0, 1)
    y = torch.linalg.solve_triangular(roots, flat.T.expand(runs, -1, -1), upper=False).mT  # (runs, all chains, dim)
    near = torch.cdist(y, y).square()
    run = torch.arange(runs, device=x.device).repeat_interleave(chains)
    every = torch.arange(len(run), device=x.device)
    own = near[run, every]  # row i in the units of the run of i
    linked = 0.5 * (own + own.T) < 2 * dim + 8 * math.sqrt(dim)
    linked = linked & good & good[:, None]
    label = _components(linked)
    found = []
    for k in label[good].unique().tolist():
        member = (label == k) & good
        z = x.flatten(0, 1)[member].flatten(0, 1)
        mean = z.mean(0)
        C = (z - mean).mT @ (z - mean) / max(1, len(z) - 1)
        C = _shrunk(C, len(z) / 4, within[run[member]].mean(0), dim)
        factor = torch.linalg.cholesky(_INFLATION * C)
        found.append((mean, factor, factor.diagonal().log().sum() - energy.flatten()[member].double().mean()))
    score = torch.stack([s for _, _, s in found])
    best = score.argsort(descending=True)[:_MOST].tolist()
    shares = 0.5 * score[best].softmax(0) + 0.5 / len(best)
    return Mixture(
        torch.stack([found[i][0] for i in best])[None],
        torch.stack([found[i][1] for i in best])[None],
        shares.log()[None],
    )


def _shrunk(C: Tensor, n: float, to: Tensor, weight: float) -> Tensor:
    """A covariance of n draws with another one that is worth `weight` draws."""
    return (n * C + weight * to) / (n + weight)


def _components(linked: Tensor) -> Tensor:
    """The smallest index that links lead to, for each of `(n, n)`."""
    n = len(linked)
    label = torch.arange(n, device=linked.device)
    for _ in range(n):
        new = torch.where(linked, label, n).amin(1).minimum(label)
        if bool((new == label).all()):
            break
        label = new
    return label


def together(mixtures: list[Mixture]) -> Mixture:
    """Mixtures of one observation each as one of all, with empty places where they have fewer components."""
    most = max(m.means.shape[1] for m in mixtures)

    def padded(m: Mixture) -> Mixture:
        gap = most - m.means.shape[1]
        again = (slice(None), [0] * gap)
        return Mixture(
            torch.cat([m.means, m.means[again]], 1),
            torch.cat([m.factors, m.factors[again]], 1),
            torch.nn.functional.pad(m.log_shares, (0, gap), value=-math.inf),
        )

    return Mixture(*(torch.cat(v) for v in zip(*map(padded, mixtures), strict=True)))


def labels(mixture: Mixture) -> Tensor:
    """The mode of each component, `(sets, M)`: components whose means are near are parts of one."""
    C = mixture.factors @ mixture.factors.mT
    roots = torch.linalg.cholesky(0.5 * (C[:, :, None] + C[:, None]))
    gap = mixture.means[:, :, None] - mixture.means[:, None]
    y = torch.linalg.solve_triangular(roots, gap[..., None], upper=False)[..., 0]
    linked = y.square().sum(3) < _APART
    return torch.stack([_components(v) for v in linked])


# --- weights -----------------------------------------------------------------------------------------------------------


def mixed(mixture: Mixture, equal: float) -> Mixture:
    """Shares (1 − e) s + e/M over the places in use."""
    used = torch.isfinite(mixture.log_shares)
    shares = (1 - equal) * mixture.log_shares.exp() + equal * used / used.sum(1, keepdim=True)
    return mixture._replace(log_shares=shares.log())


def improved(mixture: Mixture, z: Tensor, log_weights: Tensor) -> Mixture:
    """One step of population Monte Carlo from draws z `(sets, n, dim)` of q and their log π/q `(sets, n)`."""
    dim = z.shape[2]
    z = z.double()
    w = torch.nan_to_num(log_weights, nan=-math.inf).softmax(1)
    rho = torch.nan_to_num(mixture.parts(z).softmax(2))
    part = w[..., None] * rho
    share = part.sum(1)
    worth = (share.square() / part.square().sum(1).clamp_min(1e-300))[..., None]  # draws, (sets, M, 1)
    pull = part * (NU + dim) / (NU + mixture.distances(z))
    mean = pull.mT @ z / pull.sum(1)[..., None]
    mean = (worth * mean + 2 * dim * mixture.means) / (worth + 2 * dim)
    # one component at a time: the draws about every mean at once would be large
    C = torch.stack(
        [
            ((z - mean[:, k, None]) * pull[:, :, k, None]).mT @ (z - mean[:, k, None]) / share[:, k, None, None]
            for k in range(mean.shape[1])
        ],
        1,
    )
    old = mixture.factors @ mixture.factors.mT
    wide = worth[..., None]
    C = (wide * C + 2 * dim * old) / (wide + 2 * dim)
    factors, failed = torch.linalg.cholesky_ex(torch.nan_to_num(C))
    fine = torch.isfinite(C).flatten(2).all(2) & (failed == 0) & torch.isfinite(mean).all(2) & (share > 0)
    logs = torch.where(torch.isfinite(mixture.log_shares), share.clamp_min(1e-300).log(), -math.inf)
    return Mixture(
        torch.where(fine[..., None], mean, mixture.means),
        torch.where(fine[..., None, None], factors, mixture.factors),
        torch.where(torch.isnan(w).any(1, keepdim=True), mixture.log_shares, logs.log_softmax(1)),
    )
