r"""Draws and densities of a vector field by its ordinary differential equation, dw/dt = v(w, t; c).

Classical Runge–Kutta of order four in steps of one size; the log-density follows

    d log p(w_t)/dt = −∇·v(w_t, t; c)                    (Chen et al. 2018, arXiv:1806.07366, theorem 1)

with the exact divergence, one vector–Jacobian product a dimension.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

VectorField = Callable[[Tensor, Tensor], Tensor]  # (w (n, dim), t (n,)) -> (n, dim)


@torch.no_grad()
def integrate(velocity: VectorField, w: Tensor, start: float, end: float, steps: int) -> Tensor:
    """w at `end` of w `(n, dim)` at `start`. Cost: four networks a step."""
    h = (end - start) / steps
    for k in range(steps):
        w, _ = _step(lambda at, t: (velocity(at, t), None), w, start + k * h, h)
    return w


def integrate_density(velocity: VectorField, w: Tensor, start: float, end: float, steps: int) -> tuple[Tensor, Tensor]:
    """w at `end`, and log p_start(w_start) − log p_end(w_end) `(n,)`. Cost: 4 (1 + dim) networks a step."""
    h = (end - start) / steps
    gained = w.new_zeros(len(w))

    def rates(at: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        with torch.enable_grad():
            leaf = at.detach().requires_grad_(True)
            v = velocity(leaf, t)
            trace = w.new_zeros(len(w))
            for i in range(at.shape[1]):
                (row,) = torch.autograd.grad(v[:, i].sum(), leaf, retain_graph=True)
                trace = trace + row[:, i]
        return v.detach(), trace

    for k in range(steps):
        w, change = _step(rates, w, start + k * h, h)
        assert change is not None
        gained = gained + change
    return w, gained


def _step(
    rates: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]], w: Tensor, time: float, h: float
) -> tuple[Tensor, Tensor | None]:
    def at(t: float) -> Tensor:
        return w.new_full((len(w),), t)

    a, ta = rates(w, at(time))
    b, tb = rates(w + 0.5 * h * a, at(time + 0.5 * h))
    c, tc = rates(w + 0.5 * h * b, at(time + 0.5 * h))
    d, td = rates(w + h * c, at(time + h))
    new = w + (h / 6) * (a + 2 * b + 2 * c + d)
    if ta is None or tb is None or tc is None or td is None:
        return new, None
    return new, (h / 6) * (ta + 2 * tb + 2 * tc + td)
