"""Correlated noise whose level changes from datum to datum: R = D C D with D = diag(sd)."""

from __future__ import annotations

import torch
from torch import Tensor

from invgen._covariance import Covariance, Diagonal, Scalar, require_positive

__all__ = ["Modulated"]


class Modulated(Covariance):
    """A covariance C between data divided by their own standard deviations, R = diag(sd) C diag(sd).

    Args:
        sd: one positive number a datum, `shape`. inner: C, e.g. a `Stationary` correlation; its diagonal is 1 where sd
            is to be the standard deviation of the data.

    Raises:
        ValueError: sd of another shape than C, or not positive.

    Cost: that of C.
    """

    _rank = 5

    def __init__(self, sd: Tensor, inner: Covariance) -> None:
        self.sd, self.inner = torch.as_tensor(sd), inner
        self.shape = inner.shape
        if tuple(self.sd.shape) != tuple(self.shape):
            raise ValueError(
                f"Standard deviations have the shape {tuple(self.sd.shape)} and the covariance {tuple(self.shape)}; give one a datum."
            )
        require_positive(self.sd)

    def _sd(self, like: Tensor) -> Tensor:
        return self.sd.to(device=like.device, dtype=like.real.dtype)

    @property
    def per_item(self) -> bool:
        return self.inner.per_item

    @property
    def has_solve(self) -> bool:
        return self.inner.has_solve

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return self.inner.noise_shape

    def apply(self, v: Tensor) -> Tensor:
        return self._sd(v) * self.inner.apply(self._sd(v) * v)

    def solve(self, v: Tensor) -> Tensor:
        return self.inner.solve(v / self._sd(v)) / self._sd(v)

    def sqrt(self, white: Tensor) -> Tensor:
        return self._sd(white) * self.inner.sqrt(white)

    def whiten(self, v: Tensor) -> Tensor:
        return self.inner.whiten(v / self._sd(v))

    def logdet(self) -> Tensor:
        inner = self.inner.logdet()
        return inner + 2 * self.sd.log().sum().to(inner)

    def diagonal(self) -> Tensor:
        d = self.inner.diagonal()
        d = d.reshape(d.shape + (1,) * len(self.shape)) if isinstance(self.inner, Scalar) else d
        return d * self.sd.to(d).square()

    def scaled(self, factor: float | Tensor) -> Modulated:
        return Modulated(self.sd, self.inner.scaled(factor))

    def _add(self, other: Covariance) -> Covariance:
        if isinstance(other, Modulated) and other.sd is self.sd:
            return Modulated(self.sd, self.inner.plus(other.inner))
        if isinstance(other, (Scalar, Diagonal)) and isinstance(self.inner, (Scalar, Diagonal)):
            return Diagonal(self.diagonal(), self.shape).plus(other)
        return super()._add(other)
