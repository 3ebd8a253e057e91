r"""Sequential Gaussian simulation: every node of the grid given those simulated before it near by.

    x_i = Σ_{j ∈ N(i)} w_ij x_j + s_i z_i

along one path for all draws, coarse nodes first and in random order within a level. Path, neighbours and kriging weights are
the same for every draw, so that a draw is one sparse triangular solve. The law is exactly Gaussian with the covariance
B⁻¹ S² B⁻ᵀ of `invgen.vecchia`, which is Σ where all predecessors are neighbours, and near it otherwise: its density, inverse
and determinant are those of this law.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from invgen.covariance import Covariance, Dense
from invgen.linalg import cg
from invgen.priors._linear_map import linear
from invgen.priors.covariance_models import CovarianceModel
from invgen.vecchia import Vecchia


class Sequential(Covariance):
    """(B⁻¹ S) (B⁻¹ S)ᵀ on `(channels, *spatial)`, channels independent and alike.

    Cost: a sparse triangular solve a draw, two a product; on the CPU in float64.
    """

    _rank = 3

    def __init__(self, factor: Vecchia, shape: tuple[int, ...], scale: float = 1.0) -> None:
        self.factor, self.shape, self.scale = factor, tuple(shape), scale

    def _columns(self, v: Tensor, f: Callable[[np.ndarray], np.ndarray]) -> Tensor:
        flat = v.detach().double().cpu().reshape(-1, math.prod(self.shape[1:])).numpy()
        return torch.from_numpy(np.ascontiguousarray(f(flat.T).T)).to(v).reshape(v.shape)

    def _map(
        self, v: Tensor, forward: Callable[[np.ndarray], np.ndarray], back: Callable[[np.ndarray], np.ndarray]
    ) -> Tensor:
        return linear(v, lambda a: self._columns(a, forward), lambda a: self._columns(a, back))

    def sqrt(self, white: Tensor) -> Tensor:
        """The noise is in the order of the path."""
        return self.scale * self._map(white, self.factor.draw, self.factor.draw_transposed)

    def _sqrt_transposed(self, v: Tensor) -> Tensor:
        return self.scale * self._map(v, self.factor.draw_transposed, self.factor.draw)

    def apply(self, v: Tensor) -> Tensor:
        return self.sqrt(self._sqrt_transposed(v))

    def whiten(self, v: Tensor) -> Tensor:
        return self._map(v, self.factor.whiten, self.factor.whiten_transposed) / self.scale

    def solve(self, v: Tensor) -> Tensor:
        return self._map(v, self.factor.solve, self.factor.solve) / self.scale**2

    def shrink(self, v: Tensor, noise: Tensor) -> Tensor:
        """Σ (Σ + noise)⁻¹ v = (I + noise Σ⁻¹)⁻¹ v, by conjugate gradients on the sparse inverse."""

        def run(a: Tensor) -> Tensor:
            wide = a.double()
            solved = cg(lambda w: w + noise.double() * self.solve(w), wide, rtol=1e-12, max_iter=5000)
            if not bool((solved.residual < 1e-8).all()):
                raise RuntimeError(
                    f"The denoiser did not converge in {solved.iterations} iterations (relative residual {float(solved.residual.max()):.1e})."
                )
            return solved.x.to(a)

        return linear(v, run)

    def logdet(self) -> Tensor:
        n = math.prod(self.shape)
        return torch.tensor(self.shape[0] * self.factor.logdet() + 2 * n * math.log(self.scale), dtype=torch.float64)

    def diagonal(self) -> Tensor:
        if math.prod(self.shape) > 4096:
            raise TypeError("The variances of sequential simulation take a solve an entry; estimate them from draws.")
        return self.dense().diagonal().reshape(self.shape)

    def scaled(self, factor: float | Tensor) -> Covariance:
        if isinstance(factor, Tensor) and factor.ndim:
            raise TypeError("This covariance takes one factor for all items.")
        return Sequential(self.factor, self.shape, self.scale * math.sqrt(float(factor)))

    def _add(self, other: Covariance) -> Covariance:
        if math.prod(self.shape) > 4096:
            return super()._add(other)
        matrix = self.dense() + other.dense()
        return Dense((matrix + matrix.mT) / 2, self.shape)


def path(shape: Sequence[int], seed: int = 0) -> np.ndarray:
    """Nodes of a grid in the order they are visited: every 2^k-th of each axis first, at random within a level."""
    rng = np.random.default_rng(seed)
    level = np.zeros(tuple(shape), dtype=np.int64)
    top = max(1, math.ceil(math.log2(max(shape))))
    for k in range(1, top + 1):
        level[tuple(slice(None, None, 2**k) for _ in shape)] = k
    return np.lexsort((rng.random(level.size), -level.ravel()))


def sequential_covariance(
    model: CovarianceModel, shape: tuple[int, ...], spacing: Sequence[float], *, neighbours: int = 32, seed: int = 0
) -> Sequential:
    """Sequential simulation of C on a grid `(channels, *spatial)`.

    Args:
        neighbours: of each node, at the most. seed: of the path.

    Cost: one kriging system of the neighbours a node, once; the covariance is looked up in a table of all lags.
    """
    spatial = tuple(shape[1:])
    numbers = np.stack(np.meshgrid(*[np.arange(n) for n in spatial], indexing="ij"), -1).reshape(-1, len(spatial))
    table = model.on_axes([np.arange(1 - n, n) * d for n, d in zip(spatial, spacing, strict=True)]).ravel()
    strides = np.cumprod([1, *[2 * n - 1 for n in spatial[:0:-1]]])[::-1]
    centre = int(sum((n - 1) * s for n, s in zip(spatial, strides, strict=True)))

    def covariance(lags: np.ndarray) -> np.ndarray:
        found: np.ndarray = table[(lags @ strides).astype(np.int64) + centre]
        return found

    smooth = max(model.parts, key=lambda p: p.variance)
    metric = smooth.metric(len(spatial)) @ np.diag(spacing)
    factor = Vecchia(numbers, covariance, neighbours=neighbours, order=path(spatial, seed), metric=metric)
    return Sequential(factor, shape)
