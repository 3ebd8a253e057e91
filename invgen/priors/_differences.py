"""Forward differences along every spatial axis, as a linear operator with its adjoint and a direct normal solve."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from invgen.contracts import LinearOperator

__all__: list[str] = []


class Differences(LinearOperator):
    """K: `(channels, *spatial)` or `(dim,)` to `(axes, channels, *spatial)` or `(1, dim)`.

        (K x)[a, i] = x[i + e_a] − x[i],   0 at the far edge of axis a

    The columns of K for one axis are those of PyLops' `Gradient(kind="forward", edge=False)` with unit sampling.
    ‖K‖² < 4 · axes, exactly Σ_a 4 sin²(π (n_a − 1)/2n_a).

    Args:
        shape: of one model; every axis after the channels is spatial.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.axes = tuple(range(1, len(shape))) if len(shape) > 1 else (0,)
        super().__init__(shape, (len(self.axes), *shape))
        sizes = [shape[a] for a in self.axes]
        self.norm_squared = sum(4 * math.sin(math.pi * (n - 1) / (2 * n)) ** 2 for n in sizes)
        self._bases: dict[Any, tuple[list[Tensor], Tensor]] = {}

    @classmethod
    def examples(cls) -> list[Any]:
        return [cls((2, 4, 3)), cls((5,)), cls((1, 2, 3, 4))]

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        parts = []
        for a in self.axes:
            n = x.shape[a + 1]
            step = x.narrow(a + 1, 1, n - 1) - x.narrow(a + 1, 0, n - 1)
            parts.append(torch.cat([step, torch.zeros_like(x.narrow(a + 1, 0, 1))], dim=a + 1))
        return torch.stack(parts, dim=1)

    def adjoint(self, d: Tensor) -> Tensor:
        out = torch.zeros_like(d[:, 0])
        for k, a in enumerate(self.axes):
            n = out.shape[a + 1]
            flow = d[:, k].narrow(a + 1, 0, n - 1)
            out.narrow(a + 1, 0, n - 1).sub_(flow)
            out.narrow(a + 1, 1, n - 1).add_(flow)
        return out

    def solve_normal(self, rhs: Tensor, a: float | Tensor, b: float | Tensor) -> Tensor:
        """(a + b Kᴴ K)⁻¹ rhs: cosine transforms diagonalise it, each a matrix product along one axis.

        Args:
            rhs: `(batch, *shape)`. a, b: positive numbers, or tensors that broadcast to rhs.
        """
        bases, eigenvalues = self._spectrum(rhs)
        v = rhs
        for basis, axis in zip(bases, self.axes, strict=True):
            v = _along(v, basis, axis + 1)
        v = v / (a + b * eigenvalues)
        for basis, axis in zip(bases, self.axes, strict=True):
            v = _along(v, basis.mT, axis + 1)
        return v

    def _spectrum(self, like: Tensor) -> tuple[list[Tensor], Tensor]:
        key = (like.dtype, like.device)
        if key not in self._bases:
            total = torch.zeros((), dtype=torch.float64)
            bases = []
            for axis in self.axes:
                n = self.model_shape[axis]
                k = torch.arange(n, dtype=torch.float64)
                basis = torch.cos(math.pi * (k[:, None] + 0) * (k[None] + 0.5) / n) * math.sqrt(2 / n)
                basis[0] /= math.sqrt(2)
                bases.append(basis.to(like))
                tail = len(self.model_shape) - 1 - axis
                total = total + (2 - 2 * torch.cos(math.pi * k / n)).reshape(-1, *(1,) * tail)
            self._bases[key] = (bases, total.to(like.real))
        return self._bases[key]


def _along(v: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """matrix @ v along one axis."""
    if axis == v.ndim - 1:
        return v @ matrix.mT
    if axis == v.ndim - 2:
        return matrix @ v
    return torch.movedim(torch.movedim(v, axis, -1) @ matrix.mT, -1, axis)
