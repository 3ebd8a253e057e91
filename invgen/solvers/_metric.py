r"""The mass matrix of Hamiltonian chains, learnt from positions and gradients pooled over the chains of an observation.

With M⁻¹ = Σ, S Sᵀ = Σ and momenta p ~ N(0, M), a leapfrog step in velocities v = Σ p ~ N(0, Σ) is

    v ← v − (ε/2) Σ ∇U(q),   q ← q + ε v,   v ← v − (ε/2) Σ ∇U(q),        kinetic energy ½ vᵀ Σ⁻¹ v,

    Σ = D (I + V (Λ − I) Vᵀ) D,      Σ⁻¹ and S the same with 1/Λ and √Λ (V orthonormal, D diagonal).

The Σ that brings U closest to a standard normal one in Fisher divergence solves Σ Cov(∇U) Σ = Cov(q): the geometric
mean of Cov(q) and Cov(∇U)⁻¹ (Seyboldt, Carlson & Carpenter 2026, arXiv:2603.18845). For a Gaussian target, where
∇U = C⁻¹(q − m), it is C whatever law the positions have, so that chains on their way to the posterior teach the right
matrix already. Diagonal: D² = sd(q) / sd(∇U). Low rank: the eigenvectors of the geometric mean, in units of D, whose
eigenvalues are farthest from the mean of the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

_PRIOR_DRAWS = 5.0  # draws that the reference (unit variance in z) is worth against the diagonal that was seen
_LEAST, _MOST = 1e-12, 1e12  # variances


class Metric(NamedTuple):
    """Σ of each observation.

    Attributes:
        scale: the diagonal of D, `(observations, 1, dim)`. basis: V `(observations, dim, rank)`, rank 0 for a diagonal.
        spread: the diagonal of Λ, `(observations, 1, rank)`. dense: Σ itself, where that is cheaper than two thin
            products; otherwise of size 0.
    """

    scale: Tensor
    basis: Tensor
    spread: Tensor
    dense: Tensor

    @staticmethod
    def of(state: Mapping[str, Tensor]) -> Metric:
        """What the state of a chain holds."""
        return Metric(*(state[f"metric_{n}"] for n in Metric._fields))

    def entries(self) -> dict[str, Tensor]:
        """For the state of a chain."""
        return {f"metric_{n}": v for n, v in zip(self._fields, self, strict=True)}

    def of_some(self, observations: Tensor) -> Metric:
        """Σ of the observations of an index."""
        return Metric(*(v[observations] for v in self))

    def root(self, x: Tensor) -> Tensor:
        """S x = D (I + V (√Λ − I) Vᵀ) x for x `(observations, chains, dim)`."""
        return self.scale * self._stretch(x, self.spread.sqrt())

    def root_transpose(self, x: Tensor) -> Tensor:
        """Sᵀ x."""
        return self._stretch(self.scale * x, self.spread.sqrt())

    def apply(self, x: Tensor) -> Tensor:
        """Σ x."""
        if self.dense.numel():
            return x @ self.dense
        return self.scale * self._stretch(self.scale * x, self.spread)

    def inverse(self, x: Tensor) -> Tensor:
        """Σ⁻¹ x."""
        return self._stretch(x / self.scale, 1 / self.spread) / self.scale

    def _stretch(self, x: Tensor, by: Tensor) -> Tensor:
        if not self.basis.shape[-1]:
            return x
        return x + ((x @ self.basis) * (by - 1)) @ self.basis.mT


def unit_metric(observations: int, dim: int, rank: int, like: Tensor) -> Metric:
    """The identity, with room for `rank` directions."""
    basis = torch.eye(dim, rank, dtype=like.dtype, device=like.device).expand(observations, dim, rank).contiguous()
    scale = like.new_ones(observations, 1, dim)
    return _filled(scale, basis, like.new_ones(observations, 1, rank))


def curved_metric(vectors: Tensor, values: Tensor) -> Metric:
    """(I + V Λ Vᵀ)⁻¹ for orthonormal rows `(observations, rank, dim)` and their curvatures `(observations, rank)`."""
    basis = torch.nan_to_num(vectors).mT.contiguous()
    scale = basis.new_ones(len(basis), 1, basis.shape[1])
    return _filled(scale, basis, (1 / (1 + torch.nan_to_num(values)))[:, None])


def _filled(scale: Tensor, basis: Tensor, spread: Tensor) -> Metric:
    observations, dim, rank = basis.shape
    dense = scale.new_zeros(observations, 0, 0)
    if 2 * rank >= dim:
        inner = torch.eye(dim, dtype=scale.dtype, device=scale.device) + (basis * (spread - 1)) @ basis.mT
        dense = scale.mT * inner * scale
    return Metric(scale, basis, spread, dense)


# --- moments of a window -----------------------------------------------------------------------------------------------


def no_moments(observations: int, dim: int, full: bool, like: Tensor) -> dict[str, Tensor]:
    """Sums of a window: `moment_count` (observations,), sums and sums of squares (or outer products) of q and ∇U."""
    wide = (observations, dim, dim) if full else (observations, dim)
    zeros = {n: like.new_zeros(observations, dim) for n in ("moment_centre", "moment_q", "moment_g")}
    return zeros | {
        "moment_count": like.new_zeros(observations),
        "moment_qq": like.new_zeros(wide),
        "moment_gg": like.new_zeros(wide),
    }


def add_moments(state: Mapping[str, Tensor], q: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """The sums with one more draw of every living chain; q and ∇U are `(observations, chains, dim)`.

    Positions are summed about the first draw's mean, so that a small spread about a large mean is not lost.
    """
    full = state["moment_qq"].ndim == 3
    alive = torch.isfinite(q.sum(2, keepdim=True)) & torch.isfinite(gradient.sum(2, keepdim=True))
    weight = alive.to(q.dtype)
    count = weight.sum((1, 2))
    zero = torch.zeros((), dtype=q.dtype, device=q.device)
    clean, g = torch.where(alive, q, zero), torch.where(alive, gradient, zero)
    first = (state["moment_count"] == 0)[:, None]
    centre = torch.where(first, clean.sum(1) / count.clamp_min(1)[:, None], state["moment_centre"])
    x = (clean - centre[:, None]) * weight
    return {
        "moment_centre": centre,
        "moment_count": state["moment_count"] + count,
        "moment_q": state["moment_q"] + x.sum(1),
        "moment_g": state["moment_g"] + g.sum(1),
        "moment_qq": state["moment_qq"] + (x.mT @ x if full else x.square().sum(1)),
        "moment_gg": state["moment_gg"] + (g.mT @ g if full else g.square().sum(1)),
    }


def window_mean(state: Mapping[str, Tensor]) -> Tensor:
    """Mean position of the window so far, `(observations, 1, dim)`."""
    count = state["moment_count"].clamp_min(1)[:, None]
    return (state["moment_centre"] + state["moment_q"] / count)[:, None]


def _covariance(total: Tensor, squares: Tensor, count: Tensor) -> Tensor:
    """Covariances `(observations, dim, dim)`, or variances, in float64."""
    n = count.clamp_min(2).double()
    mean = total.double() / n[:, None]
    if squares.ndim == 2:
        return (squares.double() / n[:, None] - mean.square()).clamp_min(0)
    return squares.double() / n[:, None, None] - mean[:, :, None] * mean[:, None, :]


# --- what they teach ---------------------------------------------------------------------------------------------------


def learn_metric(state: Mapping[str, Tensor], *, shrink: bool) -> tuple[Metric, Tensor]:
    """Σ from the sums of a window, and the sd of the longest direction it leaves out, in its units.

    Args:
        state: with the sums of `add_moments` and the metric so far, which an observation without two draws keeps.
        shrink: variances are drawn to 1, on a log scale, as if five draws had shown it.

    Returns:
        the metric; `(observations,)`, NaN where only variances were summed.
    """
    old = Metric.of(state)
    count = state["moment_count"]
    covariance = _covariance(state["moment_q"], state["moment_qq"], count)
    curvature = _covariance(state["moment_g"], state["moment_gg"], count)
    full = covariance.ndim == 3
    variances = [m.diagonal(dim1=1, dim2=2) if full else m for m in (covariance, curvature)]
    seen = (variances[0] > 0) & (variances[1] > 0)
    usable = (count >= 2) & torch.isfinite(variances[0].sum(1) + variances[1].sum(1))
    sure = torch.where(seen & usable[:, None], variances[0], 1.0).log()
    sure = 0.5 * (sure - torch.where(seen & usable[:, None], variances[1], 1.0).log())  # log of sd(q) / sd(∇U)
    if shrink:
        sure = sure * (count / (count + _PRIOR_DRAWS)).double()[:, None]
    kept = 2 * old.scale[:, 0].double().log()
    variance = torch.where(seen & usable[:, None], sure, kept).exp().clamp(_LEAST, _MOST)
    scale, like = variance.sqrt(), old.scale
    if not full:
        metric = Metric(scale[:, None].to(like), old.basis, old.spread, old.dense)
        return metric, like.new_full((len(count),), math.nan)
    rank = old.basis.shape[-1]
    units = scale[:, :, None] * scale[:, None, :]
    eye = torch.eye(scale.shape[1], dtype=scale.dtype, device=scale.device)
    ok = usable[:, None, None]
    # one draw's worth of the identity: directions that neither positions nor gradients have shown stay as they are
    n = count.double()[:, None, None].clamp_min(1)
    C = torch.where(ok, (n * covariance / units + eye) / (n + 1), eye)
    G = torch.where(ok, (n * curvature * units + eye) / (n + 1), eye)
    values, vectors = torch.linalg.eigh(_geometric_mean(C, G))
    values = values.clamp(_LEAST, _MOST)
    chosen, rest, most = _extreme(values.log(), rank)
    common = rest.exp()  # what the directions that are left out have on average goes into D
    longest = (0.5 * (most - rest)).exp()
    basis = torch.take_along_dim(vectors, chosen[:, None, :], 2)
    spread = torch.take_along_dim(values, chosen, 1) / common[:, None]
    scale = scale * common.sqrt()[:, None]
    good = usable[:, None, None]
    metric = _filled(
        torch.where(good, scale[:, None].to(like), old.scale),
        torch.where(good, basis.to(like), old.basis),
        torch.where(good, spread[:, None].to(like), old.spread),
    )
    return metric, longest.to(like)


def _geometric_mean(C: Tensor, G: Tensor) -> Tensor:
    """The symmetric Σ with Σ G Σ = C: G^(−1/2) (G^(1/2) C G^(1/2))^(1/2) G^(−1/2)."""
    w, V = torch.linalg.eigh(G)
    w = w.clamp_min(_LEAST).sqrt()
    root, back = (V * w[:, None]) @ V.mT, (V / w[:, None]) @ V.mT
    inner = root @ C @ root
    w, V = torch.linalg.eigh(0.5 * (inner + inner.mT))
    middle = (V * w.clamp_min(0).sqrt()[:, None]) @ V.mT
    mean = back @ middle @ back
    return 0.5 * (mean + mean.mT)


def _extreme(logs: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the `rank` values farthest from the median; mean and maximum of the others (0 where there are none)."""
    if rank >= logs.shape[1]:
        none = logs.new_zeros(len(logs))
        return torch.arange(logs.shape[1], device=logs.device).expand_as(logs), none, none
    distance = (logs - logs.median(1, keepdim=True).values).abs()
    order = distance.argsort(1, descending=True)
    rest = torch.take_along_dim(logs, order[:, rank:], 1)
    return order[:, :rank], rest.mean(1), rest.amax(1)
