"""The derivative of a linear map is the map, and backwards its adjoint, whatever it is computed with."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

__all__: list[str] = []


class Map(Protocol):
    """Something with a product and its transpose on real columns: the batch last, as sparse products like it."""

    def product(self, columns: Tensor, transpose: bool) -> Tensor:
        """`(size_in, n)` to `(size_out, n)`."""
        ...


class LinearMap(torch.autograd.Function):
    """`LinearMap.apply(x, map, transpose)`: rows `(..., size)`, real; derivatives of any order in either mode, vmap."""

    @staticmethod
    def forward(x: Tensor, map: Map, transpose: bool) -> Tensor:
        out = map.product(x.reshape(-1, x.shape[-1]).T, transpose).T
        return out.reshape(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.map, ctx.transpose = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return LinearMap.apply(grad, ctx.map, not ctx.transpose), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:  # type: ignore[override]
        return LinearMap.apply(tangent, ctx.map, ctx.transpose)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, map: Map, transpose: bool) -> Any:
        return LinearMap.apply(x.movedim(in_dims[0], 0), map, transpose), 0
