r"""Covariance functions of random fields: C(h) = Σ_s variance_s ρ_s(|A_s h|), in one, two or three dimensions.

    Matérn               ρ(r) = 2^(1−ν)/Γ(ν) x^ν K_ν(x),  x = √(2ν) r          (ν = 1/2: exponential, ν -> ∞: Gaussian)
    exponential          exp(−r)                             Gaussian            exp(−r²/2)
    stable               exp(−r^α), 0 < α ≤ 2                rational quadratic  (1 + r²/2α)^(−α)
    spherical            1 − 3r/2 + r³/2 for r < 1           cubic               1 − 7r² + 35r³/4 − 7r⁵/2 + 3r⁷/4 for r < 1

r is the lag in units of the length. A_s holds the lengths of a structure and the rotation of its axes (geometric
anisotropy). What the simulation methods ask of a model besides ρ:

    line covariance    ρ₁(r) = d/dr [r ρ(r)], of the turning bands in three dimensions (Matheron 1973)
    spectral measure   ρ(|h|) = E cos(ω·h): draws of ω. A restriction to fewer dimensions is a projection of ω, so that the
                       measure in three dimensions serves for all.

References: Chilès & Delfiner, Geostatistics, 2012, section 2.5; Rasmussen & Williams 2006, section 4.2.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import scipy.special

from invgen.priors._covariance_model import Array, CovarianceModel, NestedCovariance, Nugget
from invgen.priors.correlations import correlation

__all__ = [
    "CovarianceModel",
    "Cubic",
    "Exponential",
    "Gaussian",
    "Matern",
    "NestedCovariance",
    "Nugget",
    "RationalQuadratic",
    "Spherical",
    "Stable",
]


@dataclass(frozen=True, kw_only=True)
class Matern(CovarianceModel):
    """Matérn of smoothness ν > 0: the field has ⌈ν⌉ − 1 derivatives in mean square."""

    nu: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.nu) and self.nu > 0):
            raise ValueError(
                f"A Matérn covariance needs a positive, finite nu, got {self.nu}; use Gaussian for nu -> ∞."
            )

    def correlation(self, r: Array) -> Array:
        x = math.sqrt(2 * self.nu) * np.asarray(r, dtype=np.float64)
        if self.nu == 0.5:
            return np.exp(-x)
        if self.nu == 1.0:  # an order of magnitude faster than a general order
            return np.where(x > 1e-10, x * scipy.special.k1e(np.maximum(x, 1e-10)) * np.exp(-x), 1.0)
        if self.nu == 1.5:
            return (1 + x) * np.exp(-x)
        if self.nu == 2.5:
            return (1 + x + x * x / 3) * np.exp(-x)
        return correlation(r, "matern", self.nu)

    def _slope(self, r: Array) -> Array:
        # d/dx [x^ν K_ν(x)] = −x^ν K_(ν−1)(x)
        x = math.sqrt(2 * self.nu) * np.asarray(r, dtype=np.float64)
        safe = np.maximum(x, 1e-10)
        log_value = (
            (1 - self.nu) * math.log(2)
            - scipy.special.gammaln(self.nu)
            + (self.nu + 1) * np.log(safe)
            + np.log(np.maximum(scipy.special.kve(self.nu - 1, safe), 1e-300))
            - safe
        )
        return np.where(x > 1e-10, -np.exp(log_value), 0.0)

    def _scale_mixture(self, rng: np.random.Generator, n: int) -> Array:
        # the spectral density (2ν + ω²)^(−ν−d/2) is a multivariate t with 2ν degrees of freedom
        return 1 / np.sqrt(rng.standard_gamma(self.nu, n) / self.nu)


@dataclass(frozen=True, kw_only=True)
class Exponential(CovarianceModel):
    """exp(−r), the Matérn of ν = 1/2: continuous, without derivatives."""

    nu: ClassVar[float] = 0.5

    def correlation(self, r: Array) -> Array:
        return np.exp(-np.asarray(r, dtype=np.float64))

    def _slope(self, r: Array) -> Array:
        return -r * np.exp(-r)

    def _scale_mixture(self, rng: np.random.Generator, n: int) -> Array:
        return 1 / np.sqrt(rng.standard_gamma(0.5, n) / 0.5)


@dataclass(frozen=True, kw_only=True)
class Gaussian(CovarianceModel):
    """exp(−r²/2): analytic fields; ill-conditioned without a nugget."""

    def correlation(self, r: Array) -> Array:
        return np.exp(-0.5 * np.square(np.asarray(r, dtype=np.float64)))

    def _slope(self, r: Array) -> Array:
        return -np.square(r) * np.exp(-0.5 * np.square(r))

    def _scale_mixture(self, rng: np.random.Generator, n: int) -> Array:
        return np.ones(n)


@dataclass(frozen=True, kw_only=True)
class Stable(CovarianceModel):
    """exp(−r^α), 0 < α ≤ 2."""

    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha <= 2:
            raise ValueError(f"A stable covariance needs 0 < alpha ≤ 2, got {self.alpha}.")

    def correlation(self, r: Array) -> Array:
        return np.exp(-(np.asarray(r, dtype=np.float64) ** self.alpha))

    def _slope(self, r: Array) -> Array:
        power = np.asarray(r, dtype=np.float64) ** self.alpha
        return -self.alpha * power * np.exp(-power)

    def _scale_mixture(self, rng: np.random.Generator, n: int) -> Array:
        # exp(−q^a) = E exp(−q S), S positive stable of index a = α/2 (Kanter 1975), and s² = 2 S
        a = self.alpha / 2
        if a == 1:
            return np.full(n, math.sqrt(2.0))
        u, e = math.pi * rng.random(n), rng.standard_exponential(n)
        S = np.sin(a * u) / np.sin(u) ** (1 / a) * (np.sin((1 - a) * u) / e) ** ((1 - a) / a)
        return np.sqrt(2 * S)


@dataclass(frozen=True, kw_only=True)
class RationalQuadratic(CovarianceModel):
    """(1 + r²/2α)^(−α), a mixture of Gaussian lengths; a long tail."""

    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"A rational quadratic covariance needs a positive, finite alpha, got {self.alpha}.")

    def correlation(self, r: Array) -> Array:
        return (1 + np.square(np.asarray(r, dtype=np.float64)) / (2 * self.alpha)) ** -self.alpha

    def _slope(self, r: Array) -> Array:
        square = np.square(np.asarray(r, dtype=np.float64))
        return -square * (1 + square / (2 * self.alpha)) ** (-self.alpha - 1)

    def _scale_mixture(self, rng: np.random.Generator, n: int) -> Array:
        return np.sqrt(rng.standard_gamma(self.alpha, n) / self.alpha)


class _Compact(CovarianceModel):
    """A polynomial on [0, 1): its spectral measure is drawn from a table of the radial law in three dimensions."""

    support: ClassVar[float] = 1.0
    coefficients: ClassVar[tuple[float, ...]]
    tail: ClassVar[int]  # P(|ω| > w) falls like w^(−tail)

    def correlation(self, r: Array) -> Array:
        r = np.asarray(r, dtype=np.float64)
        return np.where(r < 1, np.polynomial.polynomial.polyval(np.minimum(r, 1.0), self.coefficients), 0.0)

    def _slope(self, r: Array) -> Array:
        r = np.asarray(r, dtype=np.float64)
        slope = [k * c for k, c in enumerate(self.coefficients)]
        return np.where(r < 1, np.polynomial.polynomial.polyval(np.minimum(r, 1.0), slope), 0.0)

    def frequencies(self, rng: np.random.Generator, n: int, dimension: int) -> Array:
        w, below = _radial_table(self.coefficients)
        u = rng.random(n)
        radius = np.where(
            u < below[-1],
            np.interp(u, below, w),
            w[-1] * ((1 - below[-1]) / np.maximum(1 - u, 1e-300)) ** (1 / self.tail),
        )
        direction = rng.standard_normal((n, 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        return (radius[:, None] * direction[:, :dimension]) @ self.metric(dimension)


@functools.lru_cache(maxsize=8)
def _radial_table(coefficients: tuple[float, ...], top: float = 400.0) -> tuple[Array, Array]:
    """|ω| and P(|ω| < ·) in three dimensions: density (2/π) w ∫ r ρ(r) sin(w r) dr."""
    nodes, weights = np.polynomial.legendre.leggauss(600)
    r, weights = 0.5 * (nodes + 1), 0.5 * weights
    w = np.linspace(0, top, 20001)
    kernel = weights * r * np.polynomial.polynomial.polyval(r, coefficients)
    density = np.concatenate(
        [part[:, None] * np.sin(part[:, None] * r) @ kernel[:, None] for part in np.array_split(w, 20)]
    )
    density = np.maximum(2 / math.pi * density[:, 0], 0.0)
    below = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1]) * np.diff(w))])
    return w, np.minimum(below, 1.0)


@dataclass(frozen=True, kw_only=True)
class Spherical(_Compact):
    """1 − 3r/2 + r³/2 for r < 1: the overlap of two balls; linear at the origin, in at most three dimensions."""

    coefficients: ClassVar[tuple[float, ...]] = (1.0, -1.5, 0.0, 0.5)
    tail: ClassVar[int] = 1


@dataclass(frozen=True, kw_only=True)
class Cubic(_Compact):
    """1 − 7r² + 35r³/4 − 7r⁵/2 + 3r⁷/4 for r < 1: once differentiable fields, in at most three dimensions."""

    coefficients: ClassVar[tuple[float, ...]] = (1.0, 0.0, -7.0, 8.75, 0.0, -3.5, 0.0, 0.75)
    tail: ClassVar[int] = 3
