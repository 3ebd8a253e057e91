r"""Plurigaussian fields that honour facies seen at points: Gibbs sampling of the truncated Gaussians there, then kriging.

A facies k at the node s says that Y_j(s) lies in the side [a_j, b_j] of its rectangle. For independent fields that is, for each j,

    y | facies ~ N(0, K) restricted to ∏ [a_i, b_i],      K the covariance at the data,

started one after another, each given those before it, and drawn by Gibbs: y_i given the others is N(y_i − (Q y)_i / Q_ii, 1 / Q_ii), Q = K⁻¹, cut to [a_i, b_i]. Then the field given y is
û + C Aᵀ K⁻¹ (y − A û), û an unconditional draw: exact given y, so that the whole is exact once the Gibbs sampler has converged.

References: Freulon & de Fouquet 1993; Armstrong et al., Plurigaussian Simulations in Geosciences, 2011, section 7.4.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from invgen.operators.points import PointSampling
from invgen.streams import Streams

__all__ = ["facies_given"]


@torch.no_grad()
def facies_given(
    prior: Any,
    points: Tensor | np.ndarray,
    codes: Tensor | np.ndarray,
    n: int,
    *,
    sweeps: int = 200,
    seed: int = 0,
) -> Tensor:
    """Draws of facies that agree with what was seen.

    Args:
        prior: a `Plurigaussian` on a `Grid`, its fields independent (no correlation, no shift), without properties.
        points: `(m, d)` in the unit of the grid; each stands for its nearest node. codes: `(m,)`, positions in `prior.names`.
        n: draws, each from a chain of its own. sweeps: of the Gibbs sampler. seed: of the draws; draw i does not depend on n.

    Returns:
        `(n, 1, *spatial)` codes, float64. Approximate where `sweeps` do not suffice: long ranges and many data mix slowly.

    Raises:
        ValueError: codes that name no facies, contradictory codes at one node, a correlation, shift or properties, a facies of
            proportion zero at its datum.

    Cost: a factorisation of m × m and sweeps · m² operations a draw and field; one draw and product of each field.
    """
    if prior.mixing or prior._corner is not None or prior.properties:
        raise ValueError(
            "facies_given needs independent fields and codes (no correlation, shift or properties); use PCN on prior.decode for the others."
        )
    if prior.grid is None:
        raise ValueError("Points have coordinates on a Grid, and this prior has none; make its fields on a Grid.")
    seen = np.asarray(codes, dtype=np.float64).ravel()
    if not np.isin(seen, np.arange(len(prior.names))).all():
        raise ValueError(f"Codes are whole numbers from 0 to {len(prior.names) - 1} ({', '.join(prior.names)}).")
    A = PointSampling.at(prior.grid, points, kind="nearest")
    if len(seen) != A.data_shape[0]:
        raise ValueError(f"{A.data_shape[0]} points were given for {len(seen)} codes; give one code a point.")
    nodes, first = np.unique(A.columns[A.rows.argsort()].numpy(), return_index=True)
    every = A.columns[A.rows.argsort()].numpy()
    apart = seen != seen[first][np.searchsorted(nodes, every)]
    if apart.any():
        raise ValueError(
            f"{int(apart.sum())} data contradict another one at the same node; decide which facies is there."
        )
    kept, m = torch.from_numpy(seen[first]).long(), len(nodes)
    A = PointSampling(
        torch.arange(m),
        torch.from_numpy(nodes),
        torch.ones(m, dtype=torch.float64),
        prior.shape,
        (m,),
        model_grid=prior.grid,
    )
    rng = Streams(seed, range(n), salt="facies")
    fields = []
    for j, field in enumerate((prior.first, prior.second)):
        if field is not None:
            low, high = _sides(prior, kept, torch.from_numpy(nodes), j)
            fields.append(_conditioned(field, A, low, high, n, sweeps, rng.spawn(f"{j}")))
    drawn = prior.rule.codes(fields[0], fields[-1])
    wrong = (drawn.flatten(1)[:, torch.from_numpy(nodes)] != kept.to(drawn)).any(1)
    if bool(wrong.any()):
        raise ValueError(
            f"{int(wrong.sum())} of {n} draws do not honour the facies at the data: the sides of its rectangle are too narrow for a field this smooth; add a Nugget to the field or drop data that crowd."
        )
    return drawn


def _sides(prior: Any, codes: Tensor, nodes: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """[a, b] of each datum along an axis."""
    ends = []
    for k in (2 * axis, 2 * axis + 1):
        wide = torch.stack(
            [prior.rule.rectangles[c][k].expand(prior.shape[1:]).flatten()[nodes] for c in range(len(prior.names))]
        )
        ends.append(wide.gather(0, codes[None])[0])
    if not bool((ends[0] < ends[1]).all()):
        raise ValueError("A datum has a facies whose proportion is zero at its place.")
    return ends[0], ends[1]


def _conditioned(field: Any, A: PointSampling, low: Tensor, high: Tensor, n: int, sweeps: int, rng: Streams) -> Tensor:
    """`(n, 1, *spatial)` draws of a unit Gaussian field whose values at the data lie in [low, high]."""
    m = A.data_shape[0]
    C = field.covariance_u
    rows = C.apply(A.adjoint(torch.eye(m, dtype=torch.float64)))
    K = A(rows)
    factor, info = torch.linalg.cholesky_ex((K + K.mT) / 2)
    if int(info):
        raise ValueError(
            "The covariance of the data is not positive definite: too smooth for their distance; add a Nugget to the field."
        )
    Q = torch.cholesky_inverse(factor)
    sd = Q.diagonal().rsqrt()
    y = _sequential_start(factor, low, high, rng.uniform((m,), dtype=torch.float64, tag="start"))
    for _ in range(sweeps):
        product = y @ Q
        u = rng.uniform((m,), dtype=torch.float64, tag="sweep")
        for i in range(m):
            mean = y[:, i] - product[:, i] * sd[i] ** 2
            fresh = _truncated(mean, sd[i], low[i], high[i], u[:, i])
            product += (fresh - y[:, i])[:, None] * Q[i]
            y[:, i] = fresh
    free = field.decode(rng.normal(field.latent_shape, dtype=torch.float64, tag="field"))
    weight = torch.cholesky_solve((y - A(free)).mT, factor).mT
    out = free + (weight @ rows.flatten(1)).reshape(free.shape)
    flat = out.flatten(1)  # rounding must not carry a datum across its threshold
    flat[:, A.columns[A.rows.argsort()]] = y
    return flat.reshape(out.shape)


def _truncated(mean: Tensor, sd: Tensor, low: Tensor, high: Tensor, u: Tensor) -> Tensor:
    """N(mean, sd²) cut to [low, high], by the inverse distribution function of the tail that is farther from one."""
    a, b = (low - mean) / sd, (high - mean) / sd
    flip = a > 0  # in the right tail Φ is one to rounding: mirror it
    a, b = torch.where(flip, -b, a), torch.where(flip, -a, b)
    p, q = torch.special.ndtr(a), torch.special.ndtr(b)
    w = torch.special.ndtri((p + u * (q - p)).clamp(1e-300, 1 - 1e-16))
    w = torch.minimum(torch.maximum(w, a), b)
    # rounding must not carry a value across its bound, from where a chain would not come back
    return torch.minimum(torch.maximum(mean + sd * torch.where(flip, -w, w), low), high)


def _sequential_start(factor: Tensor, low: Tensor, high: Tensor, u: Tensor) -> Tensor:
    """`(n, m)` values in their intervals, each drawn given those before it (Geweke, Hajivassiliou & Keane).

    With K = L Lᵀ and y = L z, z_i ~ N(0, 1) cut to where a_i ≤ Σ_{j ≤ i} L_ij z_j ≤ b_i. It is N(0, K) itself where the
    intervals are open, and correlated as K is elsewhere, which sweeps through single values reach only slowly.
    """
    y = torch.zeros_like(u)
    z = torch.zeros_like(u)
    for i in range(len(low)):
        before = z[:, :i] @ factor[i, :i]
        y[:, i] = _truncated(before, factor[i, i], low[i], high[i], u[:, i])
        z[:, i] = (y[:, i] - before) / factor[i, i]
    return y
