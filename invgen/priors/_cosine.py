r"""A covariance that is diagonal under the cosine transform: a stationary field between reflecting boundaries.

    Σ = Dᵀ Λ D,      D the orthonormal DCT-II,      Λ_k = Σ_h c(h) cos(π k h / n),   c(h) = C(h) of period 2n

C at the nearest image of each lag: Σ_ij = c(i − j) + c(i + j + 1) in each axis, the sample and its mirror image about the edge
of the grid. The variance rises towards the edges (at most twice C(0) an axis) and is right some ranges away from them.

Reference: Strang 1999, SIAM Review 41, 135 (the DCT as eigenvectors under Neumann conditions).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.fft
import torch
from torch import Tensor

from invgen.covariance import Covariance, Dense, Scalar
from invgen.priors._circulant import ALLOWED, _negative, spectrum
from invgen.priors._linear_map import linear
from invgen.priors.covariance_models import CovarianceModel

_FLOOR = 1e-12


class Cosine(Covariance):
    """Σ = Dᵀ Λ D on `(channels, *spatial)`; draws, inverse and determinant are exact.

    Args:
        values: Λ, `(*spatial)`, positive. shape: of one item.

    Cost: two cosine transforms an application, one a draw.
    """

    _rank = 2

    def __init__(self, values: Tensor, shape: tuple[int, ...]) -> None:
        self.values, self.shape = values, tuple(shape)
        self._roots: dict[Any, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_roots": {}}

    def _power(self, power: float, like: Tensor) -> Tensor:
        key = (power, like.dtype, like.device)
        if key not in self._roots:
            self._roots[key] = (self.values**power).to(like)
        return self._roots[key]

    def _analyse(self, v: Tensor) -> Tensor:
        d = len(self.shape) - 1
        return linear(v, lambda a: _dct(a, d, False), lambda a: _dct(a, d, True))

    def _synthesise(self, w: Tensor) -> Tensor:
        d = len(self.shape) - 1
        return linear(w, lambda a: _dct(a, d, True), lambda a: _dct(a, d, False))

    def apply(self, v: Tensor) -> Tensor:
        return self._synthesise(self._analyse(v) * self._power(1.0, v))

    def solve(self, v: Tensor) -> Tensor:
        return self._synthesise(self._analyse(v) * self._power(-1.0, v))

    def sqrt(self, white: Tensor) -> Tensor:
        return self._synthesise(white * self._power(0.5, white))

    def whiten(self, v: Tensor) -> Tensor:
        return self._analyse(v) * self._power(-0.5, v)

    def shrink(self, v: Tensor, noise: Tensor) -> Tensor:
        """Σ (Σ + noise)⁻¹ v; noise `(batch or 1, 1, …)`."""
        values = self._power(1.0, v)
        return self._synthesise(self._analyse(v) * (values / (values + noise)))

    def logdet(self) -> Tensor:
        return self.shape[0] * self.values.log().sum()

    def diagonal(self) -> Tensor:
        out = self.values
        for i, n in enumerate(self.shape[1:]):  # Σ_k D_ki² Λ_k, one axis after the other
            basis = torch.from_numpy(scipy.fft.dct(np.eye(n), type=2, norm="ortho", axis=0)).square()
            out = torch.movedim(torch.tensordot(basis, out, dims=([0], [i])), 0, i)
        return out.expand(self.shape)

    def scaled(self, factor: float | Tensor) -> Covariance:
        if isinstance(factor, Tensor) and factor.ndim:
            raise TypeError(
                "A cosine covariance takes one factor for all items; use method='periodic' for one an item."
            )
        return Cosine(self.values * float(factor), self.shape)

    def _add(self, other: Covariance) -> Covariance:
        if isinstance(other, Scalar) and not other.per_item:
            return Cosine(self.values + other.variance.to(self.values), self.shape)
        if isinstance(other, Cosine):
            return Cosine(self.values + other.values, self.shape)
        return Dense(self.dense(), self.shape).plus(other)


def _dct(a: Tensor, d: int, inverse: bool) -> Tensor:
    axes = tuple(range(-d, 0))
    if a.device.type == "cpu":
        transform = scipy.fft.idctn if inverse else scipy.fft.dctn
        return torch.from_numpy(transform(a.detach().numpy(), type=2, norm="ortho", axes=axes))
    for i in axes:  # a matrix product an axis: no cosine transform on the device
        basis = torch.from_numpy(scipy.fft.dct(np.eye(a.shape[i]), type=2, norm="ortho", axis=0)).to(a)
        a = torch.movedim(torch.tensordot(basis.mT if inverse else basis, a, dims=([1], [i])), 0, i)
    return a


def cosine_covariance(model: CovarianceModel, shape: tuple[int, ...], spacing: Sequence[float]) -> Cosine:
    """C between reflecting boundaries.

    Raises:
        ValueError: axes that are turned, or negative eigenvalues (a range beyond the domain).
    """
    if not model.axis_aligned:
        raise ValueError(
            "method='dct' reflects each axis, which turned axes of anisotropy do not survive; use 'circulant', 'periodic' or 'spde'."
        )
    sizes = [2 * n for n in shape[1:]]
    values = spectrum(model, sizes, spacing)
    share = _negative(values, sizes, model.sill)
    if share > ALLOWED:
        reach = ", ".join(f"{r:.4g}" for r in model.range(len(sizes)))
        width = ", ".join(f"{n * d:.4g}" for n, d in zip(shape[1:], spacing, strict=True))
        raise ValueError(
            f"The covariance is not positive semi-definite between reflecting boundaries (negative eigenvalues hold {share:.2g} of the "
            f"variance; practical range {reach}, width of the domain {width}); shorten the range, or use method='circulant' or 'cholesky'."
        )
    values = values[tuple(slice(n) for n in shape[1:])]
    return Cosine(torch.from_numpy(np.maximum(values, _FLOOR * values.max())), shape)
