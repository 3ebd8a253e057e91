"""Batched minimisers: every item of a batch is its own problem, stepped together and frozen apart.

A state is a dict of tensors with the batch axis first, so that the driver can checkpoint it. `objective` maps flat
points `(batch, n)` to values `(batch,)`, item by item.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Objective = Callable[[Tensor], Tensor]
State = dict[str, Tensor]

# sufficient decrease and curvature of the weak Wolfe conditions, Nocedal & Wright 2006, equation 3.6
_DECREASE, _CURVATURE = 1e-4, 0.9
_PATIENCE = 5  # iterations without progress after which an item is left as it is


def _rounding(f: Tensor) -> Tensor:
    """What two evaluations of f may differ by without meaning anything."""
    return 4 * torch.finfo(f.dtype).eps * f.abs()


def value_and_gradient(objective: Objective, v: Tensor) -> tuple[Tensor, Tensor]:
    """f `(batch,)` and its gradient `(batch, n)`: the sum over items differentiates each by its own variables."""
    with torch.enable_grad():
        v = v.detach().requires_grad_(True)
        f = objective(v)
        (g,) = torch.autograd.grad(f.sum(), v)
    return f.detach(), g.detach()


def start(objective: Objective, v: Tensor, tol: float, memory: int, *, adam: bool) -> State:
    """First state at the points `v` `(batch, n)`; an item without a finite value starts frozen."""
    f, g = value_and_gradient(objective, v)
    batch, n = v.shape
    scale = g.norm(dim=1)
    finite = torch.isfinite(f) & torch.isfinite(scale)
    state = {
        "v": torch.where(finite[:, None], v, torch.full_like(v, torch.nan)),
        "f": f,
        "g": g,
        "goal": tol * scale.clamp_min(1.0),
        "active": finite & (scale > tol * scale.clamp_min(1.0)),
        "iterations": torch.zeros(batch, dtype=torch.long, device=v.device),
    }
    if adam:
        return {
            **state,
            "m1": torch.zeros_like(v),
            "m2": torch.zeros_like(v),
            "lowest": f,
            "best": state["v"],
            "best_g": g,
        }
    return {
        **state,
        "S": v.new_zeros(batch, memory, n),  # differences of points, newest last
        "Y": v.new_zeros(batch, memory, n),  # differences of gradients
        "rho": v.new_zeros(batch, memory),  # 1 / (sᵀ y), zero where there is no pair yet
        "lowest_g": scale,
        "stalls": torch.zeros(batch, dtype=torch.long, device=v.device),
    }


def direction(state: State) -> Tensor:
    """−H g by the two-loop recursion over the memory of each item (Nocedal & Wright algorithm 7.4)."""
    S, Y, rho, q = state["S"], state["Y"], state["rho"], state["g"].clone()
    memory = S.shape[1]
    alphas = []
    for i in reversed(range(memory)):
        alpha = rho[:, i] * (S[:, i] * q).sum(1)
        q = q - alpha[:, None] * Y[:, i]
        alphas.append(alpha)
    newest = Y[:, -1].square().sum(1)
    has = rho[:, -1] > 0
    # H0 = (sᵀ y / yᵀ y) I, equation 7.20; before the first pair a unit step along the gradient
    first = 1 / state["g"].norm(dim=1).clamp_min(torch.finfo(q.dtype).tiny)
    gamma = torch.where(has, 1 / (rho[:, -1] * newest).clamp_min(torch.finfo(q.dtype).tiny), first)
    q = gamma[:, None] * q
    for i in range(memory):
        beta = rho[:, i] * (Y[:, i] * q).sum(1)
        q = q + (alphas[memory - 1 - i] - beta)[:, None] * S[:, i]
    return -q


def line_search(
    objective: Objective, state: State, d: Tensor, trials: int = 25
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Step length of each item under the weak Wolfe conditions: bracket, interpolate, bisect.

    Decrease is judged up to rounding of f, so that the search does not fail next to a minimum.

    Returns:
        point, value, gradient, and found `(batch,)`, False where no trial satisfied sufficient decrease.

    Reference: Lewis & Overton, Math. Programming 141, 2013, algorithm 2.6.
    """
    v, f0, active = state["v"], state["f"], state["active"]
    slope = (state["g"] * d).sum(1)
    rounding = _rounding(f0)
    low, high = torch.zeros_like(f0), torch.full_like(f0, torch.inf)
    t = torch.ones_like(f0)
    best_v, best_f, best_g = v, f0, state["g"]
    found, open_ = torch.zeros_like(active), active.clone()
    for _ in range(trials):
        if not bool(open_.any()):
            break
        trial = v + torch.where(open_, t, torch.zeros_like(t))[:, None] * torch.where(
            open_[:, None], d, torch.zeros_like(d)
        )
        f, g = value_and_gradient(objective, trial)
        new_slope = (g * d).sum(1)
        decreases = (f <= f0 + _DECREASE * t * slope + rounding) & torch.isfinite(f) & torch.isfinite(new_slope)
        curves = new_slope >= _CURVATURE * slope
        take = open_ & decreases
        best_v, best_g = torch.where(take[:, None], trial, best_v), torch.where(take[:, None], g, best_g)
        best_f, found = torch.where(take, f, best_f), found | take
        low, high = torch.where(take & ~curves, t, low), torch.where(open_ & ~decreases, t, high)
        open_ = open_ & ~(decreases & curves)
        # minimiser of the parabola through f0, its slope and f; inside the bracket, away from its ends
        parabola = -slope * t.square() / (2 * (f - f0 - slope * t)).clamp_min(torch.finfo(f0.dtype).tiny)
        width = high - low
        inside = torch.maximum(torch.minimum(parabola, low + 0.9 * width), low + 0.1 * width)
        middle = torch.where(decreases | ~torch.isfinite(inside) | (low > 0), low + 0.5 * width, inside)
        t = torch.where(torch.isfinite(high), middle, torch.where(low > 0, 2 * low, t))
    return best_v, best_f, best_g, found


def lbfgs_step(objective: Objective, state: State) -> State:
    """One iteration of L-BFGS (Nocedal & Wright algorithm 7.5); items that are done do not change."""
    active = state["active"]
    if not bool(active.any()):
        return state
    d = direction(state)
    downhill = (d * state["g"]).sum(1) < 0
    d = torch.where(downhill[:, None], d, -state["g"])  # rounding spoiled the memory: steepest descent
    v, f, g, found = line_search(objective, state, d)
    moved = active & found
    s, y = v - state["v"], g - state["g"]
    sy = (s * y).sum(1)
    keep = moved & (sy > torch.finfo(sy.dtype).eps * s.norm(dim=1) * y.norm(dim=1)) & (sy > torch.finfo(sy.dtype).tiny)

    def push(history: Tensor, value: Tensor) -> Tensor:
        shifted = torch.cat([history[:, 1:], value[:, None]], dim=1)
        return torch.where(keep.reshape(-1, *(1,) * (history.ndim - 1)), shifted, history)

    out = {
        **state,
        "v": torch.where(moved[:, None], v, state["v"]),
        "f": torch.where(moved, f, state["f"]),
        "g": torch.where(moved[:, None], g, state["g"]),
        "S": push(state["S"], s),
        "Y": push(state["Y"], y),
        "rho": push(state["rho"], 1 / torch.where(keep, sy, torch.ones_like(sy))),
        "iterations": state["iterations"] + active,
    }
    # a failed search with a stale memory gets one try from the gradient before the item is given up
    retry = active & ~found & (state["rho"][:, -1] > 0)
    out["rho"] = torch.where(retry[:, None], torch.zeros_like(out["rho"]), out["rho"])
    # an item that neither descends beyond rounding nor flattens its gradient has reached what this dtype resolves
    length = out["g"].norm(dim=1)
    gains = (out["f"] < state["f"] - _rounding(state["f"])) | (length < state["lowest_g"])
    out["lowest_g"] = torch.minimum(length, state["lowest_g"])
    out["stalls"] = torch.where(gains, 0, state["stalls"] + 1)
    out["active"] = ((moved & (length > state["goal"])) | retry) & (out["stalls"] < _PATIENCE)
    return out


def adam_step(objective: Objective, state: State, rate: float | Tensor) -> State:
    """One step of Adam (Kingma & Ba, arXiv:1412.6980, algorithm 1), of one rate or `(batch, 1)`; best points are kept."""
    active = state["active"]
    if not bool(active.any()):
        return state
    wide, count = active[:, None], state["iterations"] + active
    m1 = torch.where(wide, 0.9 * state["m1"] + 0.1 * state["g"], state["m1"])
    m2 = torch.where(wide, 0.999 * state["m2"] + 0.001 * state["g"].square(), state["m2"])
    k = count.clamp_min(1).to(m1)[:, None]
    size = (m1 / (1 - 0.9**k)) / ((m2 / (1 - 0.999**k)).sqrt() + 1e-12)
    v = torch.where(wide, state["v"] - rate * size, state["v"])
    f, g = value_and_gradient(objective, v)
    finite = torch.isfinite(f) & torch.isfinite(g).all(1)
    better = active & finite & (f < state["lowest"])
    out = {
        **state,
        "v": v,
        "f": torch.where(active, f, state["f"]),
        "g": torch.where(wide, g, state["g"]),
        "m1": m1,
        "m2": m2,
        "lowest": torch.where(better, f, state["lowest"]),
        "best": torch.where(better[:, None], v, state["best"]),
        "best_g": torch.where(better[:, None], g, state["best_g"]),
        "iterations": count,
    }
    out["active"] = active & finite & (g.norm(dim=1) > state["goal"])
    return out
