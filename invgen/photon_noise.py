r"""Noise of photon counts: photons of source and sky, and the electronics that read them out.

    n_e = k + N(0, r²),   k ~ Poisson(λ),   λ = E μ + B,        d = (n_e − B) / E

μ is the prediction, E the electrons a unit of μ gives in that pixel (gain times exposure time, an exposure map), B the
electrons of the sky, which the data have subtracted, r the read noise in electrons. Moments: E d = μ, Var d = (λ + r²)/E².

| likelihood | p(d | μ) | |
|---|---|---|
| "exact" | Σ_k Poisson(k; λ) N(n_e; k, r²) | the sum over the counts that matter; for r = 0 the Poisson law itself |
| "shifted_poisson" | λ' = λ + r², v = n_e + r²: λ'^v e^(−λ') / Γ(v + 1) | two moments right; cost of one lgamma |
| "gaussian" | N(d; μ, (λ + r²)/E²) with its determinant | two moments right, symmetric; for many counts |

The sum is exact up to rounding: its terms are log-concave in k with a curvature of at least 1/r², so that what lies more
than w r from the largest term is less than 2 e^(−w²/2) of it; w = 7 leaves 5e-11.

References: Snyder, Hammoud & White (1993), JOSA A 10, 1014 (the exact law); Snyder et al. (1995), JOSA A 12, 272 (the
shift by r²).
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from invgen.noise import GaussianNoise

if TYPE_CHECKING:
    from invgen.driver import Streams

__all__ = ["PhotonNoise"]

Likelihood = Literal["exact", "shifted_poisson", "gaussian"]
_REACH = 7.0  # read-noise sds on either side of the largest term
_MOST_TERMS = 512


class PhotonNoise:
    """Photon and read noise, see the module: d = (Poisson(E μ + B) + N(0, r²) − B) / E.

    Args:
        exposure: E, electrons per unit of the data: a number or a map of the data's shape.
        sky: B ≥ 0, electrons a pixel, already subtracted from the data: a number or a map.
        read_noise: r ≥ 0, electrons: a number or a map.
        likelihood: "exact", "shifted_poisson" or "gaussian"; draws are the same for all three.

    Raises:
        ValueError: an exposure that is not positive, a negative or non-finite sky or read noise, a read noise above 35
            electrons with "exact" (there "gaussian" is as good), an unknown likelihood.

    Predictions with λ ≤ 0 are impossible, log p = −∞ ("exact" and "shifted_poisson"): a positive prior or some sky
    keeps samplers that follow gradients away from there. "gaussian" counts negative λ as none.

    Samplers that ask for a Gaussian R (guidance rules, `ExactGaussian`) take `at(prediction)`.

    Cost a pixel: "exact" about 14 r + 4 terms, in float64, kept for the gradient; the others one.
    """

    def __init__(
        self,
        exposure: float | Tensor = 1.0,
        *,
        sky: float | Tensor = 0.0,
        read_noise: float | Tensor = 0.0,
        likelihood: Likelihood = "exact",
    ) -> None:
        if likelihood not in ("exact", "shifted_poisson", "gaussian"):
            raise ValueError(f'likelihood is "exact", "shifted_poisson" or "gaussian", got {likelihood!r}.')
        self.exposure = _map(exposure, "exposure")
        self.sky, self.read_noise = _map(sky, "sky"), _map(read_noise, "read noise")
        if not bool((self.exposure > 0).all()):
            raise ValueError(
                f"The exposure must be positive, the smallest given is {float(self.exposure.min()):g}; pixels without exposure belong under a mask."
            )
        for values, what in ((self.sky, "sky"), (self.read_noise, "read noise")):
            if not bool((values >= 0).all()):
                raise ValueError(f"The {what} must not be negative, the smallest given is {float(values.min()):g}.")
        self.likelihood = likelihood
        # the window of the sum: a whole number on either side of the largest term
        self._half = math.ceil(_REACH * float(self.read_noise.max())) + 1 if bool((self.read_noise > 0).any()) else 0
        if likelihood == "exact" and 2 * self._half + 1 > _MOST_TERMS:
            raise ValueError(
                f'A read noise of {float(self.read_noise.max()):g} electrons needs {2 * self._half + 1} terms a pixel; take likelihood="gaussian", which is as good there.'
            )

    def __call__(self, prediction: Tensor, **theta: Tensor) -> Distribution:
        if prediction.is_complex():
            raise TypeError(f"PhotonNoise is for real data, the prediction is {prediction.dtype}.")
        return Independent(_Photons(prediction, self), prediction.ndim - 1)

    def draw(self, prediction: Tensor, rng: Streams, **theta: Tensor) -> Tensor:
        """Data for every prediction; λ must not be negative."""
        E, B, r = (v.to(prediction) for v in (self.exposure, self.sky, self.read_noise))
        rate = E * prediction + B
        if bool((rate < 0).any()):
            raise ValueError(
                f"Photon noise needs E μ + B of 0 or more, the smallest is {float(rate.min()):g} electrons; compose the operator with Exp or a bound, or check the sky."
            )
        counts = rng.poisson(rate, tag="photons")
        read = r * rng.normal(tuple(prediction.shape[1:]), dtype=prediction.dtype, tag="read")
        return (counts + read - B) / E

    def restricted(self, mask: Tensor) -> PhotonNoise:
        """The same noise on the data where `mask` is True, flattened."""
        other = copy.copy(self)
        for name in ("exposure", "sky", "read_noise"):
            values = getattr(self, name)
            setattr(other, name, values[mask] if values.ndim else values)
        return other

    def at(self, prediction: Tensor) -> GaussianNoise:
        """Gaussian noise with the variance that this noise has at one prediction, (max(λ, 0) + r²)/E².

        Args:
            prediction: of the data's shape: a first fit, smoothed data, a posterior mean. The data themselves are a poor
                choice: pixels that happen to be faint get too much weight, and the flux comes out low by about one
                electron a pixel.

        Raises:
            ValueError: pixels without any variance (no photons, no sky, no read noise).
        """
        E, B, r = (v.to(prediction) for v in (self.exposure, self.sky, self.read_noise))
        variance = ((E * prediction + B).clamp_min(0) + r.square()) / E.square()
        if not bool((variance > 0).all()):
            raise ValueError(
                f"{int((variance <= 0).sum())} pixels have neither photons nor sky nor read noise, and so no variance; give the sky or the read noise."
            )
        return GaussianNoise(variance.sqrt())


def _map(value: float | Tensor, what: str) -> Tensor:
    values = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64)
    if values.is_complex() or not bool(torch.isfinite(values).all()):
        raise ValueError(f"The {what} must be real and finite.")
    return values if values.is_floating_point() else values.double()


_DARK = 1e-290  # electrons


class _Photons(Distribution):
    arg_constraints: dict[str, Any] = {}

    def __init__(self, prediction: Tensor, noise: PhotonNoise) -> None:
        self.prediction, self.noise = prediction, noise
        super().__init__(prediction.shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.prediction

    @property
    def variance(self) -> Tensor:
        rate, r, E = self._rate(self.prediction)
        return ((rate.clamp_min(0) + r.square()) / E.square()).expand(self.prediction.shape)

    def _rate(self, prediction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        E, B, r = (v.to(prediction) for v in (self.noise.exposure, self.noise.sky, self.noise.read_noise))
        return E * prediction + B, r, E

    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = (*sample_shape, *self.prediction.shape)
        rate, r, E = self._rate(self.prediction)
        counts = torch.poisson(rate.expand(shape)) + r * torch.randn(shape, dtype=rate.dtype, device=rate.device)
        return (counts - self.noise.sky.to(rate)) / E

    def log_prob(self, value: Tensor) -> Tensor:
        # differences of numbers as large as λ log λ: float32 would leave 0.1 nat a bright pixel
        rate, r, E = self._rate(self.prediction.double())
        electrons = E * value.double() + self.noise.sky.to(rate)
        if self.noise.likelihood == "gaussian":
            variance = rate.clamp_min(0) + r.square()
            possible = variance > 0  # without light and read noise there is no Gaussian to speak of
            variance = torch.where(possible, variance, torch.ones_like(variance))
            out = -0.5 * ((electrons - rate).square() / variance + (2 * math.pi * variance).log())
            out = torch.where(possible, out, torch.full_like(out, -math.inf))
        else:
            shifted = self.noise.likelihood == "shifted_poisson" or self.noise._half == 0
            # no light is possible (a lens leaves much of an image dark): λ log λ and its derivative in the limit of none;
            # counts below zero are not where nothing was added to them
            possible = (rate >= 0) & ((r > 0) | (electrons > -0.5))
            rate = torch.where(rate >= 0, rate, torch.ones_like(rate)) + _DARK
            out = _shifted(electrons, rate, r) if shifted else _sum(electrons, rate, r, self.noise._half)
            out = torch.where(possible, out, torch.full_like(out, -math.inf))
        return (out + E.log()).to(self.prediction.dtype)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Photons:
        return _Photons(self.prediction.expand(batch_shape), self.noise)


def _shifted(electrons: Tensor, rate: Tensor, r: Tensor) -> Tensor:
    """log of λ'^v e^(−λ')/Γ(v + 1), v = max(n_e + r², 0)."""
    total = rate + r.square()
    v = (electrons + r.square()).clamp_min(0)
    return v * total.log() - total - torch.lgamma(v + 1)


def _sum(electrons: Tensor, rate: Tensor, r: Tensor, half: int) -> Tensor:
    """log Σ_k Poisson(k; λ) N(n_e; k, r²) over 2 half + 1 counts around the largest term; r > 0 for some pixel.

    Pixels without read noise take the Poisson law: there the sum is one delta.
    """
    electrons, rate, r = torch.broadcast_tensors(electrons, rate, r)
    exact = r > 0
    r = torch.where(exact, r, torch.ones_like(r))
    with torch.no_grad():
        # the largest term: log λ − ψ(k + 1) + (n_e − k)/r² = 0, a convex, falling function of k, by Newton
        k = torch.maximum(electrons, rate * 0).clamp_min(0)
        for _ in range(12):
            slope = rate.log() - torch.digamma(k + 1) + (electrons - k) / r.square()
            k = (k + slope / (torch.polygamma(1, k + 1) + r.square().reciprocal())).clamp_min(0)
        first = (k.round() - half).clamp_min(0)
    offsets = torch.arange(2 * half + 1, dtype=rate.dtype, device=rate.device)
    k = first[..., None] + offsets
    terms = k * rate.log()[..., None] - torch.lgamma(k + 1) - 0.5 * ((electrons[..., None] - k) / r[..., None]).square()
    total = torch.logsumexp(terms, dim=-1) - rate - 0.5 * (2 * math.pi * r.square()).log()
    return torch.where(exact, total, electrons * rate.log() - rate - torch.lgamma(electrons.clamp_min(0) + 1))
