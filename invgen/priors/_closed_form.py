"""What Gaussian priors and mixtures share: coordinates x = T(u), checks, and functions of a covariance.

Everything closed-form about a Gaussian is a function of its covariance, f(C) v = Q f(Λ) Qᵀ v, and the three
structures differ only in Q: the identity (diagonal), the Fourier transform (stationary on a periodic grid), or the
eigenvectors of a matrix, which are computed once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from invgen.contracts import check_batch
from invgen.covariance import Covariance, Dense, Diagonal, Scalar, Stationary
from invgen.fourier import filter_real, half_of
from invgen.grid import Grid
from invgen.transforms import Identity, Transform

__all__: list[str] = []

DENSE_LIMIT = 4096  # largest item that is turned into a matrix: 128 MB in float64


def draws_together(shape: tuple[int, ...]) -> int:
    """Draws a chunk, so that the blocks of the noise streams (64 steps of an item, at most 1 MB) stay under 128 MB."""
    return max(16, min(4096, (1 << 27) // min(1 << 20, 512 * math.prod(shape))))


class ClosedForm:
    """Coordinates and casts of a prior whose law is known in the coordinates u.

    Args:
        shape: of one item. grid: where it lives. transform: x = T(u).
    """

    def __init__(self, shape: tuple[int, ...], grid: Grid | None, transform: Transform | None) -> None:
        self.shape, self.grid = tuple(int(s) for s in shape), grid
        self.transform: Transform = transform or Identity()
        if grid is not None and grid.field_shape != self.shape:
            raise ValueError(
                f"The prior's shape {self.shape} does not fit its grid {grid.field_shape}; give a mean of the grid's shape."
            )
        self.dim = math.prod(self.shape)
        self._casts: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def _as(self, name: str, value: Tensor, like: Tensor) -> Tensor:
        """`value` in the dtype and on the device of `like`, kept so that a solver pays for the copy once."""
        key = (name, like.dtype, like.device)
        if key not in self._casts:
            self._casts[key] = value.to(like)
        return self._casts[key]

    def _level(self, sigma: Tensor | float, u: Tensor, what: str = "sigma") -> Tensor:
        """sigma as `(batch or 1, 1, …)` next to u."""
        if not isinstance(sigma, Tensor):
            if not (sigma >= 0 and math.isfinite(sigma)):
                raise ValueError(f"{what} must be finite and non-negative, got {sigma}.")
            return u.new_full((1,) * u.ndim, float(sigma))
        if sigma.ndim > 1 or (sigma.ndim == 1 and sigma.shape[0] not in (1, u.shape[0])):
            raise ValueError(
                f"{what} has the shape {tuple(sigma.shape)} but the batch holds {u.shape[0]} items; give a number or one value an item."
            )
        return sigma.to(u).reshape(-1, *(1,) * (u.ndim - 1))

    def _to_u(self, x: Tensor, method: str) -> Tensor:
        check_batch(x, self.shape, f"The x given to {type(self).__name__}.{method}")
        return self.transform.inverse(x)

    def _affine_parts(self, what: str) -> tuple[Tensor, Tensor]:
        """Shift and scale of an affine transform, float64 of the item's shape."""
        if not self.transform.affine:
            raise TypeError(
                f"{what} has no closed form under the transform {type(self.transform).__name__}; use a prior with an affine transform, or work in the coordinates u."
            )
        zero = torch.zeros(1, *self.shape, dtype=torch.float64)
        shift = self.transform(zero)[0]
        return shift, self.transform(zero + 1)[0] - shift

    # overridden by the two families; `invgen.priors.sums` has the mathematics
    def __add__(self, other: Any) -> Any:
        from invgen.priors.sums import add

        return add(self, other)

    __radd__ = __add__

    def affine(self: Any, scale: float | Tensor, shift: float | Tensor = 0.0) -> Any:
        """The law of A x + b; see `invgen.priors.affine`."""
        from invgen.priors.sums import affine

        return affine(self, scale, shift)


def closest_dense(covariance: Covariance, what: str) -> Dense:
    """The covariance as a matrix, where the item is small enough for one.

    Raises:
        TypeError: more than `DENSE_LIMIT` entries.
    """
    if isinstance(covariance, Dense):
        return covariance
    n = math.prod(covariance.shape)
    if n > DENSE_LIMIT:
        raise TypeError(
            f"{what} of a {type(covariance).__name__} covariance on {covariance.shape} needs a matrix of {n} entries a side, more than {DENSE_LIMIT}; use a periodic grid (padding=0) or a smaller item."
        )
    matrix = covariance.dense()
    return Dense((matrix + matrix.mT) / 2, covariance.shape)


class Eigen:
    """C = Q Λ Qᵀ of one covariance: `values` Λ, `analyse` v -> Qᵀ v and `synthesise`, for batches.

    Args:
        covariance: Scalar, Diagonal, periodic Stationary, or anything up to `DENSE_LIMIT` entries.
    """

    def __init__(self, covariance: Covariance) -> None:
        self.shape = covariance.shape
        self.vectors: Tensor | None = None
        self.padded: tuple[int, ...] = ()  # of a spectrum that is a filter of real fields
        self._casts: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor | None]] = {}
        self.analyse: Callable[[Tensor], Tensor] = lambda v: v
        self.synthesise: Callable[[Tensor], Tensor] = lambda v: v
        if isinstance(covariance, (Scalar, Diagonal)):
            self.values = covariance.diagonal().double().expand(self.shape)
        elif isinstance(covariance, Stationary) and covariance.periodic:
            self.values = covariance.spectrum.double()
            axes = tuple(range(-len(covariance.padded), 0))
            self.analyse = lambda v: torch.fft.fftn(v, dim=axes)
            self.synthesise = lambda v: torch.fft.ifftn(v, dim=axes).real
            self.padded = covariance.padded if covariance.even else ()
        else:
            dense = closest_dense(covariance, "The eigendecomposition")
            values, self.vectors = torch.linalg.eigh((dense.matrix * dense.factor).double())
            # rounding may push the smallest of a positive definite matrix below zero
            self.values = values.clamp_min(0.0)

    def function(self, v: Tensor, gain: Callable[[Tensor], Tensor]) -> Tensor:
        """f(C) v for `(batch, *shape)`; `gain` maps eigenvalues, which broadcast against v, to f of them."""
        key = (v.dtype, v.device)
        if key not in self._casts:
            self._casts[key] = (self.values.to(v), None if self.vectors is None else self.vectors.to(v))
        values, vectors = self._casts[key]
        if self.padded and not v.is_complex():
            return filter_real(v, half_of(gain(values)), self.padded)
        if vectors is None:
            return self.synthesise(gain(values) * self.analyse(v))
        wide = gain(values.reshape(1, *(1,) * (v.ndim - 2), -1))
        wide = wide.reshape(wide.shape[0], -1)
        return ((v.flatten(1) @ vectors) * wide @ vectors.mT).reshape(v.shape)


def congruence(covariance: Covariance, scale: Tensor) -> Covariance:
    """S C S for S = diag(scale), in the simplest structure; scale has the item's shape."""
    first = float(scale.flatten()[0])
    if bool((scale == first).all()):
        return covariance.scaled(first**2)
    if isinstance(covariance, (Scalar, Diagonal)):
        return Diagonal(covariance.diagonal().to(scale) * scale.square(), covariance.shape)
    per_channel = scale.reshape(scale.shape[0], -1)
    if isinstance(covariance, Stationary) and bool((per_channel == per_channel[:, :1]).all()):
        gain = per_channel[:, 0].reshape(-1, *(1,) * (scale.ndim - 1)).square()
        return Stationary(covariance.spectrum.to(scale) * gain, covariance.shape)
    dense = closest_dense(covariance, "Rescaling entry by entry")
    flat = scale.flatten().to(dense.matrix)
    return Dense(flat[:, None] * (dense.matrix * dense.factor) * flat, covariance.shape)
