r"""The curvature of the misfit, at a mode or averaged over chains: the shape that proposals and mass matrices take.

In latent coordinates the posterior is about N(m, (I + V Λ Vᵀ)⁻¹) at a mode m (`_lowrank`); the mean of V Λ Vᵀ over
positions of chains is the expected Fisher information (Cui, Law & Marzouk 2016, section 3.3), which serves everywhere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from invgen.solvers import _descent
from invgen.solvers._lowrank import laplace_factors
from invgen.solvers._target import Target

_STARTS, _ITERATIONS = 4, 100  # of the search for the mode
_PLACES = 16  # chains of an observation whose curvature is averaged
_LEAST = 1e-2  # eigenvalue, against the prior's 1, below which a direction is left out


def at_mode(target: Target, state: dict[str, Tensor], observations: int, rank: int | None) -> dict[str, Tensor]:
    """Mode and curvature of each observation: L-BFGS from its likeliest starts, then a randomised decomposition."""
    z, phi = state["z"], state["phi"]
    chains = len(z) // observations
    order = phi.reshape(observations, chains).argsort(1)[:, : min(_STARTS, chains)]  # NaN comes last
    picks = (order + chains * torch.arange(observations, device=z.device)[:, None]).flatten()
    part = target.of_some(picks)

    def objective(q: Tensor) -> Tensor:
        return part.misfit(q) + 0.5 * q.square().sum(1)

    found = _descent.start(objective, z[picks], 1e-4, 10, adam=False)
    for _ in range(_ITERATIONS):
        if not bool(found["active"].any()):
            break
        found = _descent.lbfgs_step(objective, found)
    value = found["f"].nan_to_num(nan=math.inf).reshape(observations, -1)
    mode = found["v"].reshape(observations, -1, z.shape[1])[torch.arange(observations), value.argmin(1)]
    one = target.of_some(picks[:: order.shape[1]]).problem
    factors = laplace_factors(one, mode, rank, physical=target._physical)
    return {"mode": factors.mode, "vectors": factors.vectors, "values": factors.values}


def average_curvature(
    target: Target, z: Tensor, phi: Tensor, observations: int, rank: int | None, places: int = _PLACES
) -> dict[str, Tensor]:
    """Curvature averaged over up to `places` living chains of each observation: mean of V_k Λ_k V_kᵀ, by an SVD of its root."""
    chains = len(z) // observations
    dead = (~torch.isfinite(phi)).reshape(observations, chains).to(torch.int8)
    order = dead.argsort(dim=1, stable=True)[:, : min(places, chains)]
    places = order.shape[1]
    picks = (order + chains * torch.arange(observations, device=z.device)[:, None]).flatten()
    here = laplace_factors(target.of_some(picks).problem, z[picks], rank, physical=target._physical)
    alive = torch.isfinite(here.mode).all(1).reshape(observations, -1).sum(1).clamp_min(1)
    root = (here.values[..., None].sqrt() * here.vectors).reshape(observations, places * here.rank, -1)
    _, singular, rows = torch.linalg.svd(root / alive.to(root)[:, None, None].sqrt(), full_matrices=False)
    values = singular.square()
    keep = values >= _LEAST
    used = max(1, int(keep.sum(1).max())) if rank is None else min(rank, values.shape[1])
    values = torch.where(keep, values, torch.zeros_like(values))[:, :used]
    rows = torch.where(keep[..., None], rows, torch.zeros_like(rows))[:, :used]
    return {"metric_vectors": rows.contiguous(), "metric_values": values.contiguous()}
