r"""Batched Gauss–Newton and Levenberg–Marquardt with conjugate gradients inside; every item is its own problem.

    objective f(q) = misfit(q) + ½|q|²,        (I + Jᵀ J + μ I) p = −∇f(q),        q ← q + p

Gauss–Newton has μ = 0 and a line search (weak Wolfe). Levenberg–Marquardt takes or refuses the whole step by its gain
ratio ρ = (f(q) − f(q + p)) / (m(0) − m(p)), m the quadratic model, and adapts the damping of each item:

    ρ > 0: μ ← μ max(1/3, 1 − (2ρ − 1)³), ν ← 2;        otherwise: μ ← ν μ, ν ← 2ν.

The gradient is that of f itself, whatever the curvature leaves out: minima are those of f.

References: Nielsen, Damping parameter in Marquardt's method, IMM-REP-1999-05, DTU; Madsen, Nielsen & Tingleff, Methods
for Non-linear Least Squares Problems, DTU 2004, algorithm 3.16; Steihaug 1983 (truncated inner solves).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from invgen.linalg import cg
from invgen.solvers._descent import _PATIENCE, Objective, State, _rounding, line_search, value_and_gradient
from invgen.solvers._whitened import Curvature

_INNER_TOLERANCE = 1e-3  # relative, of a step's linear system
_FIRST_DAMPING = 1e-3  # of the curvature along the gradient
_LEAST_DAMPING = 1e-3  # against the prior's 1: less changes no step
_GIVE_UP = 1e12  # damping beyond which no step will do


def start(objective: Objective, v: Tensor, tol: float) -> State:
    """First state at the points `v` `(batch, n)`; an item without a finite value starts frozen."""
    f, g = value_and_gradient(objective, v)
    scale = g.norm(dim=1)
    finite = torch.isfinite(f) & torch.isfinite(scale)
    goal = tol * scale.clamp_min(1.0)
    return {
        "v": torch.where(finite[:, None], v, torch.full_like(v, torch.nan)),
        "f": f,
        "g": g,
        "goal": goal,
        "active": finite & (scale > goal),
        "iterations": torch.zeros(len(v), dtype=torch.long, device=v.device),
        "stalls": torch.zeros(len(v), dtype=torch.long, device=v.device),
        "lowest_g": scale,
        "damping": torch.full_like(f, -1.0),  # not known before the first curvature
        "growth": torch.full_like(f, 2.0),
    }


def newton_step(
    objective: Objective, linearise: Callable[[Tensor], Curvature], state: State, *, damped: bool, inner: int
) -> State:
    """One outer iteration; items that are done do not change.

    Args:
        linearise: q -> J there. damped: Levenberg–Marquardt. inner: conjugate-gradient iterations at the most.

    Cost: a linearisation, 1 + inner products with Jᵀ J, one or a few values and gradients.
    """
    active = state["active"]
    if not bool(active.any()):
        return state
    v, f, g = state["v"], state["f"], state["g"]
    tiny = torch.finfo(f.dtype).tiny
    J = linearise(torch.where(active[:, None], v, torch.zeros_like(v)))
    rhs = torch.where(active[:, None], -g, torch.zeros_like(g))
    damping = torch.zeros_like(f)
    if damped:
        along = J.push(rhs).square().sum(1) / rhs.square().sum(1).clamp_min(tiny)
        damping = torch.where(state["damping"] < 0, _FIRST_DAMPING * (1 + along), state["damping"])
    shift = (1 + damping)[:, None]
    solved = cg(lambda w: shift * w + J.product(w), rhs, rtol=_INNER_TOLERANCE, max_iter=inner)
    p = torch.where(torch.isfinite(solved.x), solved.x, torch.zeros_like(solved.x))
    if damped:
        out = _judged(objective, state, p, J, damping)
    else:
        downhill = (p * g).sum(1) < 0
        p = torch.where(downhill[:, None], p, rhs)
        new_v, new_f, new_g, found = line_search(objective, state, p)
        out = {**state, **_moved(state, active & found, new_v, new_f, new_g)}
        out["active"] = active & found
    out["iterations"] = state["iterations"] + active
    # an item that neither descends beyond rounding nor flattens its gradient has reached what this dtype resolves
    length = out["g"].norm(dim=1)
    gains = (out["f"] < f - _rounding(f)) | (length < state["lowest_g"])
    refused = damped & (out["growth"] > 2)  # a larger damping is still to be tried
    out["lowest_g"] = torch.minimum(length, state["lowest_g"])
    out["stalls"] = torch.where(gains, 0, state["stalls"] + torch.where(refused, 0, 1))
    out["active"] = out["active"] & (length > out["goal"]) & (out["stalls"] < _PATIENCE)
    return out


def _judged(objective: Objective, state: State, p: Tensor, J: Curvature, damping: Tensor) -> State:
    """Take the step where the gain ratio is positive; adapt the damping of every active item."""
    active, f = state["active"], state["f"]
    trial = torch.where(active[:, None], state["v"] + p, state["v"])
    new_f, new_g = value_and_gradient(objective, trial)
    model = -(state["g"] * p).sum(1) - 0.5 * (p.square().sum(1) + J.push(p).square().sum(1))
    rounding = _rounding(f)
    gain = (f - new_f + rounding) / model.clamp_min(torch.finfo(f.dtype).tiny)
    taken = active & torch.isfinite(new_f) & torch.isfinite(new_g).all(1) & (gain > 0) & (model > 0)
    eased = (damping * (1 - (2 * gain.clamp(0, 1) - 1).pow(3)).clamp_min(1 / 3)).clamp_min(_LEAST_DAMPING)
    grown = damping * state["growth"]
    out = {**state, **_moved(state, taken, trial, new_f, new_g)}
    out["damping"] = torch.where(active, torch.where(taken, eased, grown), state["damping"])
    two = torch.full_like(f, 2.0)
    out["growth"] = torch.where(active, torch.where(taken, two, 2 * state["growth"]), state["growth"])
    out["active"] = active & (out["damping"] < _GIVE_UP)
    return out


def _moved(state: State, taken: Tensor, v: Tensor, f: Tensor, g: Tensor) -> State:
    wide = taken[:, None]
    return {
        "v": torch.where(wide, v, state["v"]),
        "f": torch.where(taken, f, state["f"]),
        "g": torch.where(wide, g, state["g"]),
    }
