"""Covariances of Gaussian noise and Gaussian priors: one small interface, several structures.

A covariance acts on batches `(batch, *shape)` and knows how to apply itself, solve, draw and measure its determinant.
Solvers never ask what kind it is; operators do, where they share the structure (`LinearOperator.solve`).
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from invgen._covariance import Covariance, Diagonal, Scalar, expand_items, scale_factor
from invgen.kronecker import Kronecker
from invgen.stationary import Stationary

__all__ = ["BlockDiagonal", "Covariance", "Dense", "Diagonal", "Kronecker", "Scalar", "Stationary", "as_covariance"]


class Dense(Covariance):
    """A full `(n, n)` matrix over the flattened item."""

    _rank = 3

    def __init__(self, matrix: Tensor, shape: tuple[int, ...] | None = None, *, factor: float | Tensor = 1.0) -> None:
        matrix = torch.as_tensor(matrix)
        self.shape = tuple(shape if shape is not None else matrix.shape[:1])
        n = math.prod(self.shape)
        if tuple(matrix.shape) != (n, n):
            raise ValueError(
                f"The covariance matrix is {tuple(matrix.shape)} but the item {self.shape} needs ({n}, {n})."
            )
        if not torch.allclose(matrix, matrix.mH, rtol=1e-5, atol=1e-8 * float(matrix.abs().max())):
            raise ValueError("The covariance matrix is not symmetric; pass (C + C.T) / 2 if the asymmetry is rounding.")
        self.matrix, self.factor = matrix, scale_factor(factor, matrix)
        cholesky, info = torch.linalg.cholesky_ex(matrix)
        if int(info) != 0:
            raise ValueError(
                "The covariance matrix is not positive definite; add a small multiple of the identity or check its construction."
            )
        self.cholesky = cholesky

    @property
    def per_item(self) -> bool:
        return self.factor.ndim == 1

    def dense(self) -> Tensor:
        if self.per_item:
            return super().dense()
        return (self.factor * self.matrix).to(torch.complex128 if self.matrix.is_complex() else torch.float64)

    def _flat(self, v: Tensor, f: Any) -> Tensor:
        return f(v.flatten(-len(self.shape)).mT if v.ndim > len(self.shape) else v.flatten()[:, None]).mT.reshape(
            v.shape
        )

    def _rows(self, v: Tensor, matrix: Tensor) -> Tensor:
        """matrix @ v of every item; items stay rows in memory, or the product after this one runs at a third."""
        items = v.flatten(-len(self.shape)) if v.ndim > len(self.shape) else v.flatten()
        return (items @ matrix.mT).reshape(v.shape)

    def _f(self, like: Tensor, power: float) -> Tensor:
        if self.matrix.is_complex() and not like.is_complex():
            raise TypeError(
                "A complex covariance acts on complex vectors only, got a real one; use its real part or make the data complex."
            )
        return expand_items(self.factor.to(device=like.device, dtype=like.real.dtype) ** power, like)

    def apply(self, v: Tensor) -> Tensor:
        scale = self._f(v, 1.0)
        return self._rows(v, self.matrix.to(v)) * scale

    def solve(self, v: Tensor) -> Tensor:
        return self._flat(v, lambda a: torch.cholesky_solve(a, self.cholesky.to(v))) / self._f(v, 1.0)

    def sqrt(self, white: Tensor) -> Tensor:
        return self._rows(white, self.cholesky.to(white)) * self._f(white, 0.5)

    def whiten(self, v: Tensor) -> Tensor:
        return self._flat(v, lambda a: torch.linalg.solve_triangular(self.cholesky.to(v), a, upper=False)) / self._f(
            v, 0.5
        )

    def logdet(self) -> Tensor:
        n = math.prod(self.shape)
        return 2 * self.cholesky.diagonal().real.log().sum() + n * self.factor.log()

    def diagonal(self) -> Tensor:
        d = self.matrix.diagonal().real.reshape(self.shape)
        return d * self.factor.reshape(self.factor.shape + (1,) * len(self.shape))

    def scaled(self, factor: float | Tensor) -> Dense:
        other = copy.copy(self)  # shares the matrix and its Cholesky factor
        other.factor = self.factor * scale_factor(factor, self.matrix)
        return other

    def _add(self, other: Covariance) -> Covariance:
        if self.per_item or other.per_item:
            return super()._add(other)
        mine, its = self.dense(), other.dense()
        return Dense((mine + its).to(self.matrix.dtype if not its.is_complex() else torch.complex128), self.shape)


class Blocks(Covariance):
    """Independent blocks, diag(C_1, C_2, …); a subclass says how an item divides into theirs (`_each`)."""

    _rank = 4
    blocks: list[Covariance]

    def _each(self, name: str, v: Tensor) -> Tensor:
        """The method of that name of every block on its part of v, joined again."""
        raise NotImplementedError(f"{type(self).__name__} does not define _each.")

    @property
    def per_item(self) -> bool:
        return any(b.per_item for b in self.blocks)

    @property
    def has_solve(self) -> bool:
        return all(b.has_solve for b in self.blocks)

    def apply(self, v: Tensor) -> Tensor:
        return self._each("apply", v)

    def solve(self, v: Tensor) -> Tensor:
        return self._each("solve", v)

    def sqrt(self, white: Tensor) -> Tensor:
        return self._each("sqrt", white)

    def whiten(self, v: Tensor) -> Tensor:
        return self._each("whiten", v)

    def logdet(self) -> Tensor:
        total = self.blocks[0].logdet()
        for block in self.blocks[1:]:
            part = block.logdet()
            wide = torch.promote_types(total.dtype, part.dtype)
            total = total.to(wide) + part.to(device=total.device, dtype=wide)
        return total


class BlockDiagonal(Blocks):
    """Independent blocks over a flat, concatenated item `(batch, n_1 + n_2 + …)`: the noise of several data terms."""

    def __init__(self, blocks: list[Covariance]) -> None:
        self.blocks = list(blocks)
        self.sizes = [math.prod(b.shape) for b in self.blocks]
        self.shape = (sum(self.sizes),)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return (sum(math.prod(b.noise_shape) for b in self.blocks),)

    def split(self, v: Tensor) -> list[Tensor]:
        """`(batch, n)` into one `(batch, *block.shape)` a block."""
        return self._split(v, [b.shape for b in self.blocks])

    @staticmethod
    def _split(v: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
        parts = v.split([math.prod(s) for s in shapes], dim=-1)
        return [p.reshape(*p.shape[:-1], *s) for p, s in zip(parts, shapes, strict=True)]

    def _each(self, name: str, v: Tensor) -> Tensor:
        parts = self._split(v, [b.noise_shape if name == "sqrt" else b.shape for b in self.blocks])
        return torch.cat(
            [getattr(b, name)(p).flatten(-len(b.shape)) for b, p in zip(self.blocks, parts, strict=True)], dim=-1
        )

    def diagonal(self) -> Tensor:
        parts = []
        for block, size in zip(self.blocks, self.sizes, strict=True):
            d = block.diagonal()
            parts.append(
                d[..., None].expand(*d.shape, size) if isinstance(block, Scalar) else d.flatten(-len(block.shape))
            )
        if self.per_item:  # blocks with one scale for all items join those with a scale each
            items = max(p.shape[0] for p in parts if p.ndim == 2)
            parts = [p.expand(items, -1) for p in parts]
        return torch.cat(parts, dim=-1)

    def scaled(self, factor: float | Tensor) -> BlockDiagonal:
        return BlockDiagonal([b.scaled(factor) for b in self.blocks])

    def _add(self, other: Covariance) -> Covariance:
        if isinstance(other, BlockDiagonal) and other.sizes == self.sizes:
            return BlockDiagonal([a.plus(b) for a, b in zip(self.blocks, other.blocks, strict=True)])
        if isinstance(other, Scalar):
            return BlockDiagonal([b.plus(Scalar(other.variance, b.shape)) for b in self.blocks])
        if isinstance(other, Diagonal):
            parts = self.split(other.variance)
            return BlockDiagonal([b.plus(Diagonal(v, b.shape)) for b, v in zip(self.blocks, parts, strict=True)])
        return super()._add(other)


def as_covariance(value: float | Tensor | Covariance, shape: tuple[int, ...], *, batched: bool = False) -> Covariance:
    """A number, a `(batch,)` tensor, a tensor of the item's shape or a covariance, as a covariance on `shape`.

    Args:
        value: variance(s) or a covariance, which must live on `shape`.
        shape: shape of one item.
        batched: read a one-axis tensor as one variance an item, even where `shape` has one axis of that length.
    """
    if isinstance(value, Covariance):
        if value.shape != tuple(shape):
            raise ValueError(f"The covariance lives on {value.shape} but {tuple(shape)} was expected.")
        return value
    if (
        not isinstance(value, Tensor)
        or value.ndim == 0
        or (value.ndim == 1 and (batched or tuple(value.shape) != tuple(shape)))
    ):
        return Scalar(value, shape)
    return Diagonal(value, tuple(shape))
