r"""Ordinary differential equations with a step of its own for every item, and the densities they carry.

Dormand & Prince (1980), orders 5(4): seven stages, the last of which is the first of the next step. An item's steps
depend on that item alone, so a batch gives what its items give one by one; items that have arrived are not evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
# fifth order minus fourth
_ERROR = (
    35 / 384 - 5179 / 57600,
    0.0,
    500 / 1113 - 7571 / 16695,
    125 / 192 - 393 / 640,
    -2187 / 6784 + 92097 / 339200,
    11 / 84 - 187 / 2100,
    -1 / 40,
)

Slope = Callable[[Tensor, Tensor, Tensor], Tensor]


def integrate(
    slope: Slope,
    y: Tensor,
    start: float,
    end: float,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    first: float = 0.05,
    max_steps: int = 10_000,
) -> Tensor:
    """y(end) of dy/dt = slope(t, y, items), each item with its own adaptive steps.

    Args:
        slope: t `(k,)` float64, y `(k, m)`, items `(k,)` numbers of the items these rows belong to -> `(k, m)`.
        y: `(batch, m)` at `start`. rtol, atol: of the root-mean-square error of a step, per item.
        first: first step as a share of the interval.

    Raises:
        RuntimeError: an item needs more than `max_steps` steps, or its slope is not finite.

    Cost: six slopes a step. One device synchronisation a step.
    """
    y = y.clone()
    rows = torch.arange(len(y), device=y.device)
    span = end - start
    t = torch.full((len(y),), start, dtype=torch.float64, device=y.device)
    h = torch.full_like(t, first * span)
    k = [slope(t, y, rows)] + [torch.empty_like(y)] * 6
    items, yi, ti, hi = rows, y, t, h
    for _ in range(max_steps):
        # never past the end; what is left in rounding counts as arrived
        remaining = end - ti
        hi = torch.where(hi.abs() < remaining.abs(), hi, remaining)
        wide = hi.to(yi)[:, None]
        for stage, (node, row) in enumerate(zip(_NODES, _STAGES, strict=True), start=1):
            ahead = yi + wide * sum(a * k[j] for j, a in enumerate(row) if a)
            k[stage] = slope(ti + node * hi, ahead, items)
        error = wide * sum(e * k[j] for j, e in enumerate(_ERROR) if e)
        scale = atol + rtol * torch.maximum(yi.abs(), ahead.abs())
        size = (error / scale).square().mean(1).sqrt().double()
        if not bool(torch.isfinite(size).all()):
            raise RuntimeError(
                f"The ODE of item {int(items[~torch.isfinite(size)][0])} is no longer finite; check the network's weights and the data's range."
            )
        good = size <= 1
        keep = good[:, None]
        yi, k[0] = torch.where(keep, ahead, yi), torch.where(keep, k[6], k[0])
        ti = torch.where(good, ti + hi, ti)
        hi = hi * (0.9 * size.clamp_min(1e-10) ** -0.2).clamp(0.2, 5.0)
        arrived = (end - ti).abs() <= 1e-12 * abs(span)
        if bool(arrived.any()):
            y[items[arrived]] = yi[arrived]
            if bool(arrived.all()):
                return y
            left = ~arrived
            items, yi, ti, hi = items[left], yi[left], ti[left], hi[left]
            k[0] = k[0][left]
            k[1:] = [k[0]] * 6
    raise RuntimeError(
        f"The ODE needs more than {max_steps} steps at rtol={rtol:g}, atol={atol:g}; loosen the tolerances."
    )


def exact_trace(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """f(x) and tr ∂f/∂x `(batch,)`, by one forward-mode pass over n copies of the batch. Differentiable.

    Args:
        f: `(m, *shape)` -> `(m, *shape)`, row by row, m = batch · n. x: `(batch, *shape)` of n entries.
    """
    value, jacobian = full_jacobian(f, x)
    return value, jacobian.diagonal(dim1=1, dim2=2).sum(1)


def full_jacobian(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """f(x) and ∂f/∂x `(batch, n, n)`, columns by forward mode."""
    batch, n = len(x), x[0].numel()
    copies = x.repeat_interleave(n, 0)
    basis = torch.eye(n, dtype=x.dtype, device=x.device).repeat(batch, 1).reshape(copies.shape)
    value, columns = torch.func.jvp(f, (copies,), (basis,))  # type: ignore[misc]
    return value[::n], columns.reshape(batch, n, n).transpose(1, 2)


def probed_trace(f: Callable[[Tensor], Tensor], x: Tensor, probe: Tensor) -> tuple[Tensor, Tensor]:
    """f(x) and vᵀ(∂f/∂x)v, Hutchinson's unbiased estimate of the trace for a probe v with unit covariance."""
    value, pushed = torch.func.jvp(f, (x,), (probe,))  # type: ignore[misc]
    return value, (pushed * probe).flatten(1).sum(1)


def rademacher(seed: int, n: int, shape: tuple[int, ...], like: Tensor, tag: str) -> Tensor:
    """`(n, *shape)` of ±1, row i a function of (seed, i)."""
    from invgen.streams import Streams

    uniform = Streams(seed, range(n), device=like.device).uniform(shape, dtype=torch.float64, tag=tag)
    return torch.where(uniform < 0.5, -1.0, 1.0).to(like)


def log_normal(z: Tensor) -> Tensor:
    """log N(z; 0, I), `(batch,)`."""
    flat = z.flatten(1)
    return -0.5 * flat.square().sum(1) - 0.5 * flat.shape[1] * math.log(2 * math.pi)


def transported(
    velocity: Callable[[Tensor, Tensor, Tensor], Tensor],
    y: Tensor,
    start: float,
    end: float,
    probe: Tensor | None,
    *,
    rtol: float,
    atol: float,
) -> tuple[Tensor, Tensor]:
    """y(end) and ∫ div v dt from `start` to `end` along dy/dt = v(y, t): the instantaneous change of variables.

        log p_start(y(start)) = log p_end(y(end)) + ∫_start^end div v dt

    (Chen et al. 2018, arXiv:1806.07366, theorem 1; Song et al. 2021, arXiv:2011.13456, equation 39).

    Args:
        velocity: y `(m, *shape)`, t `(m,)`, item numbers `(m,)` -> `(m, *shape)`.
        y: `(batch, *shape)`. probe: like y, for Hutchinson's estimate (Grathwohl et al. 2019), or None for the trace.
    """
    shape, n = y.shape[1:], y[0].numel()

    def slope(t: Tensor, state: Tensor, items: Tensor) -> Tensor:
        at = state[:, :n].reshape(-1, *shape)
        if probe is None:
            value, trace = exact_trace(lambda v: velocity(v, t.repeat_interleave(n), items.repeat_interleave(n)), at)
        else:
            value, trace = probed_trace(lambda v: velocity(v, t, items), at, probe[items])
        return torch.cat([value.flatten(1), trace[:, None].to(value)], dim=1)

    state = torch.cat([y.flatten(1), y.new_zeros(len(y), 1)], dim=1)
    state = integrate(slope, state, start, end, rtol=rtol, atol=atol)
    return state[:, :n].reshape(y.shape), state[:, n]
