"""The interface of a covariance, and the two kinds without correlation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["Covariance", "Diagonal", "Scalar"]


def expand_items(value: Tensor, like: Tensor) -> Tensor:
    """A `(batch,)` scalar per item, ready to multiply `(batch, *shape)`."""
    return value.to(like).reshape(-1, *(1,) * (like.ndim - 1)) if value.ndim == 1 else value.to(like)


class Covariance:
    """A symmetric positive definite operator on `(batch, *shape)`.

    Args:
        shape: shape of one item, without the batch axis.
    """

    shape: tuple[int, ...]

    def apply(self, v: Tensor) -> Tensor:
        """C v."""
        raise NotImplementedError

    def solve(self, v: Tensor) -> Tensor:
        """C⁻¹ v."""
        raise NotImplementedError

    def sqrt(self, white: Tensor) -> Tensor:
        """L w with L Lᴴ = C: white noise `(batch, *shape)` in, a draw of N(0, C) out."""
        raise NotImplementedError

    def whiten(self, v: Tensor) -> Tensor:
        """W v with Wᴴ W = C⁻¹, so that |W v|² = vᴴ C⁻¹ v."""
        raise NotImplementedError

    def logdet(self) -> Tensor:
        """log det C, a scalar or `(batch,)`."""
        raise NotImplementedError

    def diagonal(self) -> Tensor:
        """Marginal variances: a scalar or `(batch,)` for `Scalar`, elsewhere `shape` or `(batch, *shape)`."""
        raise NotImplementedError

    def scaled(self, factor: float | Tensor) -> Covariance:
        """factor · C; a `(batch,)` tensor gives every item its own factor."""
        raise NotImplementedError

    def plus(self, other: Covariance) -> Covariance:
        """C + other, in the simplest structure that holds both."""
        if other.shape != self.shape:
            raise ValueError(
                f"A covariance on {self.shape} cannot be added to one on {other.shape}; give both on one shape."
            )
        first, second = (self, other) if self._rank >= other._rank else (other, self)
        return first._add(second)

    _rank = 0

    def _add(self, other: Covariance) -> Covariance:
        raise TypeError(
            f"A sum of {type(self).__name__} and {type(other).__name__} covariances has no closed structure here; give one of them as Dense."
        )

    def dense(self) -> Tensor:
        """The `(n, n)` matrix over the flattened item, float64 (complex where the covariance is)."""
        if self.per_item:
            raise ValueError(
                f"This {type(self).__name__} covariance has one scale for each item of a batch and no single matrix; scale a plain one instead."
            )
        n = math.prod(self.shape)
        return self.apply(torch.eye(n, dtype=torch.float64).reshape(n, *self.shape)).reshape(n, n).T

    def mean_variance(self) -> Tensor:
        """tr C / n, a scalar or `(batch,)`."""
        diagonal = self.diagonal()
        return diagonal if isinstance(self, Scalar) else diagonal.flatten(-len(self.shape)).mean(-1)

    @property
    def per_item(self) -> bool:
        """True when every item of a batch has its own scale or variances."""
        return False

    @property
    def has_solve(self) -> bool:
        """True when `solve`, `whiten` and `logdet` have a closed form."""
        return True

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of the white noise that `sqrt` takes for one item."""
        return self.shape


class Scalar(Covariance):
    """variance · I; the variance a number or, one for each item, a `(batch,)` tensor."""

    _rank = 0

    def __init__(self, variance: float | Tensor, shape: tuple[int, ...]) -> None:
        self.variance = torch.as_tensor(variance, dtype=None if isinstance(variance, Tensor) else torch.float64)
        self.shape = tuple(shape)
        if self.variance.ndim > 1:
            raise ValueError(
                f"A scalar covariance takes a number or a (batch,) tensor, got {tuple(self.variance.shape)}; use Diagonal for one variance a datum."
            )
        require_positive(self.variance)

    @property
    def per_item(self) -> bool:
        return self.variance.ndim == 1

    def _v(self, like: Tensor) -> Tensor:
        return expand_items(
            self.variance.to(like.real.dtype if like.is_complex() else like.dtype),
            like.real if like.is_complex() else like,
        )

    def apply(self, v: Tensor) -> Tensor:
        return v * self._v(v)

    def solve(self, v: Tensor) -> Tensor:
        return v / self._v(v)

    def sqrt(self, white: Tensor) -> Tensor:
        return white * self._v(white).sqrt()

    def whiten(self, v: Tensor) -> Tensor:
        return v / self._v(v).sqrt()

    def logdet(self) -> Tensor:
        return math.prod(self.shape) * self.variance.log()

    def diagonal(self) -> Tensor:
        return self.variance

    def scaled(self, factor: float | Tensor) -> Scalar:
        return Scalar(self.variance * factor, self.shape)

    def _add(self, other: Covariance) -> Covariance:
        assert isinstance(other, Scalar)
        return Scalar(self.variance + other.variance, self.shape)


class Diagonal(Covariance):
    """Independent components with variances `shape` or `(batch, *shape)`."""

    _rank = 1

    def __init__(self, variance: Tensor, shape: tuple[int, ...] | None = None) -> None:
        self.variance = torch.as_tensor(variance)
        self.shape = tuple(shape if shape is not None else self.variance.shape)
        if self.variance.ndim > len(self.shape) + 1 or tuple(self.variance.shape)[-len(self.shape) :] != self.shape:
            raise ValueError(
                f"Variances have the shape {tuple(self.variance.shape)} but the data {self.shape}; give one variance a datum."
            )
        require_positive(self.variance)

    @property
    def per_item(self) -> bool:
        return self.variance.ndim > len(self.shape)

    def _v(self, like: Tensor) -> Tensor:
        return self.variance.to(device=like.device, dtype=like.real.dtype if like.is_complex() else like.dtype)

    def apply(self, v: Tensor) -> Tensor:
        return v * self._v(v)

    def solve(self, v: Tensor) -> Tensor:
        return v / self._v(v)

    def sqrt(self, white: Tensor) -> Tensor:
        return white * self._v(white).sqrt()

    def whiten(self, v: Tensor) -> Tensor:
        return v / self._v(v).sqrt()

    def logdet(self) -> Tensor:
        return self.variance.log().flatten(-len(self.shape)).sum(-1)

    def diagonal(self) -> Tensor:
        return self.variance

    def scaled(self, factor: float | Tensor) -> Diagonal:
        factor = torch.as_tensor(factor).to(self.variance)
        return Diagonal(self.variance * factor.reshape(factor.shape + (1,) * len(self.shape)), self.shape)

    def _add(self, other: Covariance) -> Covariance:
        extra = other.diagonal()
        extra = extra.reshape(extra.shape + (1,) * len(self.shape)) if isinstance(other, Scalar) else extra
        return Diagonal(self.variance + extra.to(self.variance), self.shape)


def scale_factor(factor: float | Tensor, like: Tensor) -> Tensor:
    """A positive number, or one for each item, in the real precision of `like`."""
    value = torch.as_tensor(factor).to(device=like.device, dtype=like.real.dtype)
    if value.ndim > 1:
        raise ValueError(f"A covariance is scaled by a number or a (batch,) tensor, got {tuple(value.shape)}.")
    require_positive(value)
    return value


def require_positive(variance: Tensor) -> None:
    """Raise a ValueError unless every variance is positive and finite."""
    if not bool((variance > 0).all()) or not bool(torch.isfinite(variance).all()):
        raise ValueError(
            f"Variances must be positive and finite, the smallest given is {float(variance.min()):g}; mask data that carry no information."
        )
