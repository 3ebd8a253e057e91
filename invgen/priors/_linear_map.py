"""Linear maps written outside of autograd (in place, or by SciPy), with both derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]


class _Linear(torch.autograd.Function):
    """v -> A v; the derivative in either mode is the same map, or its transpose."""

    @staticmethod
    def forward(v: Tensor, forward: Map, transpose: Map) -> Tensor:
        return forward(v)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.map, ctx.transpose = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _Linear.apply(grad.contiguous(), ctx.transpose, ctx.map), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:  # type: ignore[override]
        return _Linear.apply(tangent, ctx.map, ctx.transpose)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], v: Tensor, forward: Map, transpose: Map) -> Any:
        # a map may hold one number an item: the items of each call stay together
        return torch.stack([_Linear.apply(part, forward, transpose) for part in v.movedim(in_dims[0], 0)]), 0


def linear(v: Tensor, forward: Map, transpose: Map | None = None) -> Tensor:
    """A v with derivatives; `transpose` is A itself where omitted (A symmetric). Both return new tensors."""
    out: Tensor = _Linear.apply(v, forward, transpose or forward)
    return out
