"""What independent channels need: a transform and a covariance that act on each group of channels apart."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from invgen.covariance import Blocks, Covariance, Scalar
from invgen.transforms import Transform

__all__: list[str] = []


class ChannelBlocks(Blocks):
    """Independent blocks along the first axis of an item: diag(C_1, C_2, …).

    White noise for draws is flat where the blocks' own has other shapes (padded stationary ones).
    """

    def __init__(self, blocks: list[Covariance]) -> None:
        self.blocks = list(blocks)
        self.sizes = [b.shape[0] for b in self.blocks]
        self.shape = (sum(self.sizes), *self.blocks[0].shape[1:])

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return joint_shape([b.noise_shape for b in self.blocks], [b.shape for b in self.blocks])

    def _each(self, name: str, v: Tensor) -> Tensor:
        if name == "sqrt":
            pieces = split_joint(v, [b.noise_shape for b in self.blocks], [b.shape for b in self.blocks])
        else:
            pieces = list(v.split(self.sizes, dim=-len(self.shape)))
        return torch.cat([getattr(b, name)(p) for b, p in zip(self.blocks, pieces, strict=True)], dim=-len(self.shape))

    def diagonal(self) -> Tensor:
        parts = []
        for b in self.blocks:
            d = b.diagonal().double()
            if isinstance(b, Scalar):
                d = d.reshape(*d.shape, *(1,) * len(b.shape)).expand(*d.shape, *b.shape)
            parts.append(d)
        if self.per_item:
            items = max(p.shape[0] for p in parts if p.ndim > len(self.shape))
            parts = [p.expand(items, *p.shape[-len(self.shape) :]) for p in parts]
        return torch.cat(parts, dim=-len(self.shape))

    def scaled(self, factor: float | Tensor) -> ChannelBlocks:
        return ChannelBlocks([b.scaled(factor) for b in self.blocks])

    def _add(self, other: Covariance) -> Covariance:
        if isinstance(other, ChannelBlocks) and other.sizes == self.sizes:
            return ChannelBlocks([a.plus(b) for a, b in zip(self.blocks, other.blocks, strict=True)])
        if isinstance(other, Scalar):
            return ChannelBlocks([b.plus(Scalar(other.variance, b.shape)) for b in self.blocks])
        return super()._add(other)


class ChannelTransform(Transform):
    """x = (T_1(u_1), T_2(u_2), …), groups of channels with a transform each.

    Args:
        parts: transforms. sizes: channels of each. shape: of the whole item.
    """

    def __init__(self, parts: list[Any], sizes: list[int], shape: tuple[int, ...]) -> None:
        super().__init__(shape)
        self.parts, self.sizes = nn.ModuleList(parts), list(sizes)
        self.affine = all(p.affine for p in parts)

    def _parts(self) -> list[Transform]:
        return [cast(Transform, p) for p in self.parts]

    def _each(self, x: Tensor, name: str) -> Tensor:
        pieces = x.split(self.sizes, dim=1)
        return torch.cat([getattr(p, name)(v) for p, v in zip(self._parts(), pieces, strict=True)], dim=1)

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        return self._each(x, "__call__")

    def inverse(self, x: Tensor) -> Tensor:
        return self._each(x, "inverse")

    def log_det(self, u: Tensor) -> Tensor:
        pieces = u.split(self.sizes, dim=1)
        return torch.stack([p.log_det(v) for p, v in zip(self._parts(), pieces, strict=True)]).sum(0)

    def within_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = [p.within_range(v) for p, v in zip(self._parts(), x.split(self.sizes, dim=1), strict=True)]
        return torch.stack([ok for ok, _ in found]).all(0), torch.cat([v for _, v in found], dim=1)


def joint_shape(inner: list[tuple[int, ...]], outer: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The channels joined where every inner shape is that of its part, flat elsewhere."""
    if all(tuple(a) == tuple(b) for a, b in zip(inner, outer, strict=True)):
        return (sum(s[0] for s in inner), *inner[0][1:])
    return (sum(math.prod(s) for s in inner),)


def split_joint(v: Tensor, inner: list[tuple[int, ...]], outer: list[tuple[int, ...]]) -> list[Tensor]:
    """The parts of `(batch, *joint_shape)`."""
    if len(joint_shape(inner, outer)) == len(outer[0]) and len(outer[0]) > 1:
        return list(v.split([s[0] for s in inner], dim=1))
    return [p.reshape(-1, *s) for p, s in zip(v.split([math.prod(s) for s in inner], dim=1), inner, strict=True)]
