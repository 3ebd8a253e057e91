"""Noise models: p(d | prediction) as torch distributions whose event is one data set.

`noise(prediction, **theta)` returns a distribution with `log_prob(d)` of shape `(batch,)`: log-likelihoods are sums
over data, never means. `noise.draw(prediction, rng)` draws with the stream of every item. Gaussian noise also exposes
its covariance R to the solvers; correlated noise is a covariance like any other.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, constraints

from invgen.covariance import BlockDiagonal, Covariance, Dense, Diagonal, Scalar, as_covariance

if TYPE_CHECKING:
    from invgen.driver import Streams

__all__ = ["GaussianField", "GaussianNoise", "LaplaceNoise", "PoissonNoise", "StudentTNoise"]


class GaussianField(Distribution):
    """N(mean, C) over whole data sets; circular for complex data, whose variance is per complex datum.

    Args:
        mean: `(batch, *shape)`. covariance: on `shape`.
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.real
    has_rsample = True

    def __init__(self, mean: Tensor, covariance: Covariance) -> None:
        self.mean_field, self.covariance = mean, covariance
        super().__init__(mean.shape[:1], mean.shape[1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.mean_field

    @property
    def variance(self) -> Tensor:
        d = self.covariance.diagonal().to(self.mean_field.real)
        if isinstance(self.covariance, Scalar):  # a number, or one an item
            d = d.reshape(d.shape + (1,) * (self.mean_field.ndim - d.ndim))
        return d.expand(self.mean_field.shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        white_shape = (*self.mean_field.shape[:1], *self.covariance.noise_shape)

        def draw() -> Tensor:
            return self.covariance.sqrt(
                torch.randn(white_shape, dtype=self.mean_field.dtype, device=self.mean_field.device)
            )

        drawn = torch.stack(
            [draw() for _ in range(math.prod(sample_shape))]
        )  # one by one: a covariance may differ by item
        return self.mean_field + drawn.reshape(*sample_shape, *self.mean_field.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        r = value - self.mean_field
        quadratic = self.covariance.whiten(r).abs().square().flatten(1).sum(1)
        n, logdet = math.prod(self.mean_field.shape[1:]), self.covariance.logdet().to(quadratic)
        if r.is_complex():
            return -quadratic - logdet - n * math.log(math.pi)
        return -0.5 * (quadratic + logdet + n * math.log(2 * math.pi))


class GaussianNoise:
    """d = prediction + N(0, R).

    Args:
        sigma: standard deviation: a number, a tensor of the data's shape, or the name of a nuisance parameter.
        covariance: R itself, instead of sigma: a covariance (a full matrix as `Dense(matrix)`), or a tensor of
            variances of the data's shape.
        model_error: covariance (or variance) that is added to R: what the physics leaves out.

    Raises:
        ValueError: neither or both of sigma and covariance, a negative or non-finite sigma; on use, a tensor for a
            covariance that is not of the data's shape.
    """

    def __init__(
        self,
        sigma: float | Tensor | str | None = None,
        *,
        covariance: Covariance | None = None,
        model_error: Covariance | float | None = None,
    ) -> None:
        if (sigma is None) == (covariance is None):
            raise ValueError("GaussianNoise takes either sigma or covariance; give exactly one of them.")
        if sigma is not None and not isinstance(sigma, str):
            values = sigma = torch.as_tensor(sigma, dtype=None if isinstance(sigma, Tensor) else torch.float64)
            if not bool(((values > 0) & torch.isfinite(values)).all()):
                raise ValueError(
                    f"The noise standard deviation must be positive and finite, the smallest given is {float(values.min()):g}; data without information belong under a mask."
                )
        self.sigma, self._covariance, self.model_error = sigma, covariance, model_error

    def covariance(self, shape: tuple[int, ...], **theta: Tensor) -> Covariance:
        """R on data of the given shape; with a named sigma, theta must hold it as `(batch,)`."""
        if self._covariance is not None:
            R = _stated(self._covariance, shape, "noise covariance")
        else:
            sigma = self._lookup(theta)
            if isinstance(sigma, Tensor) and sigma.ndim and not isinstance(self.sigma, str):
                R = Diagonal(sigma.square(), shape)
            else:
                R = Scalar(sigma**2, shape)
        if self.model_error is not None:
            R = R.plus(_stated(self.model_error, shape, "model error"))
        return R

    def _lookup(self, theta: dict[str, Tensor]) -> float | Tensor:
        if not isinstance(self.sigma, str):
            assert self.sigma is not None
            return self.sigma
        if self.sigma not in theta:
            raise ValueError(
                f"The noise level is the nuisance parameter {self.sigma!r}, which was not given; pass {self.sigma}=… or fix the level."
            )
        level = theta[self.sigma]
        if not bool((level > 0).all()):
            raise ValueError(
                f"The noise level {self.sigma!r} must be positive, the smallest given is {float(level.min()):g}; give it a prior on positive numbers."
            )
        return level.reshape(-1)

    def __call__(self, prediction: Tensor, **theta: Tensor) -> GaussianField:
        return GaussianField(prediction, self.covariance(tuple(prediction.shape[1:]), **theta))

    def draw(self, prediction: Tensor, rng: Streams, **theta: Tensor) -> Tensor:
        """A noisy data set for every prediction."""
        R = self.covariance(tuple(prediction.shape[1:]), **theta)
        return prediction + R.sqrt(rng.normal(R.noise_shape, dtype=prediction.dtype, tag="noise"))

    def restricted(self, mask: Tensor) -> GaussianNoise:
        """The same noise on the data where `mask` is True, flattened."""
        if isinstance(self.sigma, str):
            extra = (
                None
                if self.model_error is None
                else _restrict(_stated(self.model_error, tuple(mask.shape), "model error"), mask)
            )
            return GaussianNoise(self.sigma, model_error=extra)
        if self.model_error is not None or self._covariance is not None:
            return GaussianNoise(covariance=_restrict(self.covariance(tuple(mask.shape)), mask))
        sigma = self.sigma
        return GaussianNoise(sigma[mask] if isinstance(sigma, Tensor) and sigma.ndim else sigma)


def _stated(value: Any, shape: tuple[int, ...], what: str) -> Covariance:
    """A covariance as a person states it: a tensor with one row an item would give every sample another noise."""
    if not isinstance(value, (Covariance, float, int)):
        value = torch.as_tensor(value)
        if value.ndim and tuple(value.shape) != tuple(shape):
            raise ValueError(
                f"The {what} is an array of the shape {tuple(value.shape)} and the data have {tuple(shape)}; give one variance a datum, or a full matrix as Dense(matrix, {tuple(shape)})."
            )
    return as_covariance(value, shape)


def _restrict(R: Covariance, mask: Tensor) -> Covariance:
    n = int(mask.sum())
    if isinstance(R, Scalar):
        return Scalar(R.variance, (n,))
    if isinstance(R, Diagonal):
        return Diagonal(R.variance[..., mask])
    if mask.numel() > 4096:
        raise TypeError(
            f"A mask on {type(R).__name__} noise needs the dense matrix of {mask.numel()} data, more than 4096; restate the noise on the observed data."
        )
    rows = mask.flatten()
    return Dense(R.dense()[rows][:, rows])


class _Scaled:
    """Shared by the heavy-tailed families: one scale, independent data."""

    def __init__(self, scale: float | Tensor) -> None:
        values = torch.as_tensor(scale)
        if values.is_complex() or not bool(((values > 0) & torch.isfinite(values)).all()):
            raise ValueError(
                f"The noise scale must be positive and finite, the smallest given is {float(values.min()):g}."
            )
        self.scale = values

    def restricted(self, mask: Tensor) -> Any:
        """The same noise on the data where `mask` is True, flattened."""
        import copy

        other = copy.copy(self)
        other.scale = self.scale[mask] if self.scale.ndim else self.scale
        return other


def _real(prediction: Tensor, noise: object) -> Tensor:
    if prediction.is_complex():
        raise TypeError(
            f"{type(noise).__name__} is for real data, the prediction is {prediction.dtype}; use GaussianNoise for complex data."
        )
    return prediction


class LaplaceNoise(_Scaled):
    """d = prediction + Laplace(0, scale): misfit |r|₁ / scale; the standard deviation is √2 scale."""

    def __call__(self, prediction: Tensor, **theta: Tensor) -> Distribution:
        base = torch.distributions.Laplace(_real(prediction, self), self.scale.to(prediction), validate_args=False)
        return Independent(base, prediction.ndim - 1)

    def draw(self, prediction: Tensor, rng: Streams, **theta: Tensor) -> Tensor:
        """A noisy data set for every prediction, by the inverse distribution function."""
        v = rng.uniform(tuple(prediction.shape[1:]), dtype=prediction.dtype, tag="noise") - 0.5
        return prediction - self.scale.to(prediction) * v.sign() * torch.log1p(
            (-2 * v.abs()).clamp_min(-1 + torch.finfo(v.dtype).eps)
        )


class StudentTNoise(_Scaled):
    """d = prediction + scale · t_ν: robust to outliers.

    Args:
        scale: scale of the distribution (its sd is scale √(ν/(ν−2)) for ν > 2). dof: ν > 0.
    """

    def __init__(self, scale: float | Tensor, dof: float = 4.0) -> None:
        super().__init__(scale)
        if not dof > 0:
            raise ValueError(f"Student-t noise needs dof > 0, got {dof}.")
        self.dof = float(dof)

    def __call__(self, prediction: Tensor, **theta: Tensor) -> Distribution:
        base = torch.distributions.StudentT(
            self.dof, _real(prediction, self), self.scale.to(prediction), validate_args=False
        )
        return Independent(base, prediction.ndim - 1)

    def draw(self, prediction: Tensor, rng: Streams, **theta: Tensor) -> Tensor:
        """A noisy data set for every prediction: a normal over the root of an independent gamma."""
        shape = tuple(prediction.shape[1:])
        normal = rng.normal(shape, dtype=prediction.dtype, tag="noise")
        gamma = rng.gamma(self.dof / 2, shape, dtype=prediction.dtype, tag="noise")
        return prediction + self.scale.to(prediction) * normal / (2 * gamma / self.dof).sqrt()


class PoissonNoise:
    """Counts: d ~ Poisson(exposure · prediction) / exposure; predictions must be non-negative.

    Args:
        exposure: counts per unit of prediction.
    """

    def __init__(self, exposure: float = 1.0) -> None:
        if not (exposure > 0 and math.isfinite(exposure)):
            raise ValueError(f"The exposure must be positive and finite, got {exposure}.")
        self.exposure = float(exposure)

    def __call__(self, prediction: Tensor, **theta: Tensor) -> Distribution:
        return Independent(_ScaledPoisson(prediction, self.exposure), prediction.ndim - 1)

    def draw(self, prediction: Tensor, rng: Streams, **theta: Tensor) -> Tensor:
        """Counts over exposure for every prediction."""
        if bool((prediction < 0).any()):
            raise ValueError(
                f"Poisson noise needs non-negative predictions, the smallest is {float(prediction.min()):g}; compose the operator with Exp or a bound."
            )
        return rng.poisson(prediction * self.exposure, tag="noise") / self.exposure

    def restricted(self, mask: Tensor) -> PoissonNoise:
        """The same noise on the data where `mask` is True."""
        return self


class _ScaledPoisson(Distribution):
    arg_constraints: dict[str, Any] = {}

    def __init__(self, rate: Tensor, exposure: float) -> None:
        self.rate, self.exposure = rate, exposure
        super().__init__(rate.shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.rate

    @property
    def variance(self) -> Tensor:
        return self.rate / self.exposure

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return torch.poisson((self.rate * self.exposure).expand(*sample_shape, *self.rate.shape)) / self.exposure

    def log_prob(self, value: Tensor) -> Tensor:
        rate, counts = self.rate * self.exposure, value * self.exposure
        return torch.xlogy(counts, rate) - rate - torch.lgamma(counts + 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _ScaledPoisson:
        return _ScaledPoisson(self.rate.expand(batch_shape), self.exposure)


def stack_covariances(parts: list[Covariance]) -> Covariance:
    """The covariance of several independent data terms, concatenated flat."""
    return parts[0] if len(parts) == 1 else BlockDiagonal(parts)
