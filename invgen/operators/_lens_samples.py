"""A lens for each sample: the operator of a batch whose items have rays of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invgen.contracts import LinearOperator
from invgen.operators._linear_map import LinearMap
from invgen.operators._ray_weights import ray_weights

if TYPE_CHECKING:
    from invgen.operators.lensing import GravitationalLens

__all__: list[str] = []


class LensSamples(LinearOperator):
    """A_i x_i for i in a batch: what `GravitationalLens.fixed` returns for parameters `(batch,)`.

    Rays and weights are computed once, in the precision of the parameters, and carry their derivative. A parameter
    out of its range makes its item NaN.

    Args:
        lens: the operator. theta: name -> `(batch,)`.

    Cost: as many weights as rays, times 4 or 16, in memory an item; a gather an item forwards, a scatter backwards.
    """

    def __init__(self, lens: GravitationalLens, theta: Mapping[str, Tensor]) -> None:
        super().__init__(lens.model_shape, lens.data_shape, model_grid=lens.model_grid)
        theta = {k: v[None] if v.ndim == 0 else v for k, v in theta.items()}
        sizes = {v.shape[0] for v in theta.values()}
        if len(sizes - {1}) > 1 or any(v.ndim > 1 for v in theta.values()):
            raise ValueError(
                f"Lens parameters must be (batch,) with one batch, got {', '.join(f'{k} {tuple(v.shape)}' for k, v in theta.items())}."
            )
        self.size = max(sizes)
        self.lens = lens
        like = next(iter(theta.values()))
        y, x = (v.to(like)[None] for v in lens.plane.positions())
        beta_y, beta_x = lens.lens.rays(y, x, **theta)
        index, self.weight = ray_weights(beta_y, beta_x, lens.source_grid, lens.edge, lens.interpolation)
        self.index = index.flatten(1)

    def _expanded(self, n: int) -> tuple[Tensor, Tensor]:
        if self.size not in (1, n):
            raise ValueError(f"{n} items were given to lenses of {self.size} samples; give one item a sample.")
        return self.index.expand(n, -1), self.weight

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        n = len(x)
        index, weight = self._expanded(n)
        read = x.flatten(1).gather(1, index).reshape(n, *weight.shape[1:])
        seen = (read * weight.to(x.dtype)).sum((2, 3)) * self.lens.factor
        out: Tensor = LinearMap.apply(seen, self.lens.plane.folding, False)
        return out.reshape(n, *self.data_shape)

    def adjoint(self, d: Tensor) -> Tensor:
        n = len(d)
        index, weight = self._expanded(n)
        seen: Tensor = LinearMap.apply(d.flatten(1), self.lens.plane.folding, True) * self.lens.factor
        spread = (seen[:, :, None, None] * weight.to(d.dtype)).flatten(1)
        zero = d.new_zeros(n, math.prod(self.model_shape))
        return zero.scatter_add(1, index, spread).reshape(n, *self.model_shape)


class LastSamples:
    """The `LensSamples` of the last parameters: a trajectory asks for many predictions at the same ones.

    The same means the same tensors, unchanged since; with a graph or inside a transform nothing is kept. Empty again
    after pickling or copying.
    """

    def __init__(self) -> None:
        self._kept: tuple[dict[str, tuple[Tensor, int]], LensSamples] | None = None

    def __getstate__(self) -> dict[str, None]:
        return {"_kept": None}

    def __call__(self, lens: GravitationalLens, theta: Mapping[str, Tensor]) -> LensSamples:
        """Those of `theta`, `(batch,)` or `()` each."""
        if self._kept is not None:
            known, samples = self._kept
            if known.keys() == theta.keys() and all(
                known[k][0] is v and known[k][1] == v._version for k, v in theta.items()
            ):
                return samples
        plain = not any(
            v.requires_grad or v.is_inference() or torch._C._functorch.is_functorch_wrapped_tensor(v)
            for v in theta.values()
        )
        samples = LensSamples(lens, theta)
        self._kept = ({k: (v, v._version) for k, v in theta.items()}, samples) if plain else None
        return samples
