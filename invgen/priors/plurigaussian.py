r"""Plurigaussian facies: two Gaussian fields, and a rule that turns each pair of values into a facies.

    F(s) = k   iff   (Y₁(s), Y₂(s)) ∈ D_k,      P(F(s) = k) = p_k(s) exactly

Y₂ may be correlated with Y₁ (Y₂ ← ρ Y₁ + √(1 − ρ²) Y₂) or be Y₁ itself somewhere else, Y₂(s) = Y₁(s + shift): facies that border
each other in one direction. A property a facies (its own mean and field) makes a rock model of it. z ~ N(0, I) is exactly the
latent, so that pCN is exact through the discontinuous rule; `soft` is a differentiable version for gradients.

References: Armstrong et al., Plurigaussian Simulations in Geosciences, 2011, chapters 2, 5 and 7; Le Loc'h & Galli 1997.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from invgen.contracts import HasGaussian, check_batch
from invgen.driver import Streams
from invgen.grid import Grid
from invgen.priors._closed_form import draws_together
from invgen.priors.covariance_models import Exponential
from invgen.priors.lithotypes import Cut, LithotypeRule
from invgen.priors.random_field import RandomField
from invgen.transforms import Identity, Transform

__all__ = ["Plurigaussian"]


class Plurigaussian:
    """Facies codes 0, 1, … (or a property), `(1, *spatial)`.

    Has `sample` and `HasLatent`. No density: codes are discrete.

    Args:
        tree: `Cut`s. proportions: facies -> share, numbers or maps; their order is that of the codes.
        first: field of Y₁, Gaussian with mean 0 and variance 1 (a `RandomField` with a linear method, a `GaussianPrior`).
        second: field of Y₂; omitted where no cut lies across axis 2, or with `shift`.
        correlation: ρ of Y₁ and Y₂ at a place.
        shift: cells an axis, Y₂(s) = Y₁(s + shift); `first` must then be larger than the facies by |shift| an axis.
        properties: facies -> number, or a prior of its own shape: what `sample` and `decode` return instead of codes.

    Raises:
        ValueError: fields whose variance is not 1 or whose mean is not 0, shapes that do not fit, what `LithotypeRule` refuses.
        TypeError: fields that are Gaussian only in the limit.

    Cost: a draw of each field and a comparison a cut.

    Example:
        >>> rule = Cut(1, "shale", Cut(2, "silt", "sand"))
        >>> facies = Plurigaussian(rule, {"shale": 0.5, "silt": 0.2, "sand": 0.3}, field, other)
    """

    def __init__(
        self,
        tree: Cut,
        proportions: Mapping[str, Any],
        first: Any,
        second: Any = None,
        *,
        correlation: float = 0.0,
        shift: tuple[int, ...] | None = None,
        properties: Mapping[str, Any] | None = None,
    ) -> None:
        for field in (first, second):
            _check_field(field)
        self.first, self.second, self.mixing = first, second, float(correlation)
        self.transform: Transform = Identity()
        spatial = tuple(first.shape[1:])
        self._corner: tuple[tuple[int, ...], tuple[int, ...]] | None = None
        if shift is not None:
            if second is not None or correlation or len(shift) != len(spatial):
                raise ValueError(
                    f"A shift is {len(spatial)} numbers of cells and takes the place of a second field and of a correlation."
                )
            own = tuple(max(0, -s) for s in shift)
            spatial = tuple(n - abs(s) for n, s in zip(spatial, shift, strict=True))
            if min(spatial) < 1:
                raise ValueError(
                    f"A field of {tuple(first.shape[1:])} nodes cannot be shifted by {tuple(shift)}; make it larger."
                )
            self._corner = (own, tuple(o + s for o, s in zip(own, shift, strict=True)))
            correlation = _lag_correlation(first, shift)
        self.rule = LithotypeRule(tree, proportions, correlation=correlation)
        if second is None and shift is None and any(c.axis == 2 for c in _cuts(tree)):
            raise ValueError("A cut lies across axis 2, but there is no second field; give second= or shift=.")
        if second is not None and tuple(second.shape) != tuple(first.shape):
            raise ValueError(f"The two fields have the shapes {first.shape} and {second.shape}; give them one.")
        for name, p in self.rule.proportions.items():
            if p.ndim and tuple(p.shape) != spatial:
                raise ValueError(
                    f"The map of the proportion of {name!r} has the shape {tuple(p.shape)}, the facies {spatial}."
                )
        self.shape: tuple[int, ...] = (1, *spatial)
        grid = first.grid
        self.grid: Grid | None = grid if grid is None or shift is None else grid.with_shape(spatial)
        self.properties = self._property_priors(properties)
        parts = [p for p in (first, second, *self.properties) if hasattr(p, "latent_shape")]
        self._sizes = [math.prod(p.latent_shape) for p in parts]
        self.latent_shape: tuple[int, ...] = (sum(self._sizes),)

    @property
    def names(self) -> list[str]:
        """Of the facies, by code."""
        return self.rule.names

    def _property_priors(self, properties: Mapping[str, Any] | None) -> list[Any]:
        if properties is None:
            return []
        if set(properties) != set(self.rule.names):
            raise ValueError(
                f"Properties are given for {sorted(properties)}, the facies are {sorted(self.rule.names)}."
            )
        found = [properties[name] for name in self.rule.names]
        for name, p in zip(self.rule.names, found, strict=True):
            if not isinstance(p, (int, float)) and tuple(getattr(p, "shape", ())) != self.shape:
                raise ValueError(f"The property of {name!r} is a number or a prior of the shape {self.shape}.")
        return found

    def _split(self, z: Tensor) -> list[Tensor]:
        check_batch(z, self.latent_shape, f"The z given to {type(self).__name__}.decode")
        return list(z.split(self._sizes, dim=1))

    def gaussians(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Y₁ and Y₂, `(batch, 1, *spatial)` each, of latents `(batch, *latent_shape)`."""
        parts = self._split(z)
        y1 = self.first.decode(parts[0].reshape(-1, *self.first.latent_shape))
        if self._corner is not None:
            cut = [(..., *(slice(o, o + n) for o, n in zip(c, self.shape[1:], strict=True))) for c in self._corner]
            return y1[cut[0]], y1[cut[1]]
        if self.second is None:
            return y1, y1
        y2 = self.second.decode(parts[1].reshape(-1, *self.second.latent_shape))
        rho = self.mixing
        return y1, rho * y1 + math.sqrt(1 - rho * rho) * y2 if rho else y2

    def _filled(self, z: Tensor, weights: Tensor) -> Tensor:
        """Σ_k weight_k property_k, `(batch, 1, *spatial)`."""
        parts = self._split(z)[1 + (self.second is not None) :]
        out, used = torch.zeros_like(weights[0]), 0
        for k in range(len(self.rule.names)):
            value: Any = float(k)
            if self.properties:
                p = self.properties[k]
                if isinstance(p, (int, float)):
                    value = float(p)
                else:
                    value = p.decode(parts[used].reshape(-1, *p.latent_shape))
                    used += 1
            out = out + weights[k] * value
        return out

    def facies(self, z: Tensor) -> Tensor:
        """Codes of latents, `(batch, 1, *spatial)`."""
        return self.rule.codes(*self.gaussians(z))

    def decode(self, z: Tensor) -> Tensor:
        """Codes, or properties where they were given, of latents `(batch, *latent_shape)`; constant almost everywhere."""
        codes = self.facies(z)
        if not self.properties:
            return codes
        return self._filled(z, torch.stack([(codes == k).to(codes) for k in range(len(self.rule.names))]))

    def soft(self, z: Tensor, temperature: float = 0.1) -> Tensor:
        """`decode` with soft cuts, differentiable; approaches it as the temperature falls (a bias: not the same law)."""
        return self._filled(z, self.rule.memberships(*self.gaussians(z), temperature))

    @torch.no_grad()
    def sample(self, n: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """`(n, 1, *spatial)` draws; draw i does not depend on n."""
        if n < 1:
            raise ValueError(f"The number of draws must be at least 1, got {n}.")
        chunk = draws_together(self.latent_shape)
        parts = (
            Streams(seed, range(i, min(i + chunk, n)), salt="prior").normal(self.latent_shape, dtype=dtype)
            for i in range(0, n, chunk)
        )
        return torch.cat([self.decode(z) for z in parts])

    @classmethod
    def examples(cls) -> list[Plurigaussian]:
        """Two independent fields with properties, one field shifted, one with a map of proportions."""
        make = RandomField(Exponential(length=1.0), (1, 5, 4))
        tree = Cut(1, "shale", Cut(2, "silt", "sand"))
        p = {"shale": 0.5, "silt": 0.2, "sand": 0.3}
        own = RandomField(Exponential(length=0.8, variance=0.01), (1, 5, 4), mean=2.0)
        ramp = torch.linspace(0.2, 0.8, 20, dtype=torch.float64).reshape(5, 4)
        return [
            cls(tree, p, make, make, correlation=0.4, properties={"shale": 1.0, "silt": 1.5, "sand": own}),
            cls(tree, p, make, shift=(1, -1)),
            cls(Cut(1, "shale", "sand"), {"shale": ramp, "sand": 1 - ramp}, make),
        ]


def _cuts(node: str | Cut) -> list[Cut]:
    return [] if isinstance(node, str) else [node, *_cuts(node.left), *_cuts(node.right)]


def _check_field(field: Any) -> None:
    if field is None:
        return
    if not isinstance(field, HasGaussian):
        raise TypeError(
            f"Plurigaussian fields are Gaussian with a latent, {field!r} is not; take a RandomField with a linear method."
        )
    transform = getattr(field, "transform", Identity())
    if not isinstance(transform, Identity):
        raise ValueError(
            f"The fields under a lithotype rule are Gaussian themselves, and this one has the transform {transform!r}; leave it out."
        )
    shape: tuple[int, ...] = getattr(field, "shape", ())
    variance = field.covariance_u.diagonal().double()
    if shape[0] != 1 or float((variance - 1).abs().max()) > 0.01 or bool(field.mean_u.any()):
        raise ValueError(
            f"The fields under a lithotype rule have one channel, mean 0 and variance 1; this one has the shape {shape} and variances from {float(variance.min()):.4g} to {float(variance.max()):.4g}."
        )


def _lag_correlation(field: Any, shift: tuple[int, ...]) -> float:
    """Cov[Y(s), Y(s + shift)] of a stationary field, from its middle."""
    unit = torch.zeros(1, *field.shape, dtype=torch.float64)
    start = tuple(max(0, -s) for s in shift)
    unit[(0, 0, *start)] = 1.0
    row = field.covariance_u.apply(unit)
    return float(row[(0, 0, *(a + s for a, s in zip(start, shift, strict=True)))])
