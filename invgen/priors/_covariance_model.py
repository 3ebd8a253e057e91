"""What all covariance functions of random fields share: lags, ranges, anisotropy, sums."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

__all__ = ["CovarianceModel", "NestedCovariance", "Nugget"]

Array = np.ndarray


@dataclass(frozen=True, kw_only=True)
class CovarianceModel:
    """One structure: variance · ρ(|A h|).

    Args:
        length: in the unit of the grid, one number or one an axis; the range (end of the support) of the compact models.
        variance: in squared units of the field.
        angle: degrees by which the length axes are turned: from the first axis towards the second (2-D), or three numbers,
            in the planes of axes (0, 1), (0, 2) and (1, 2), one after the other (3-D).

    Raises:
        ValueError: lengths or variances that are not positive and finite.
    """

    length: float | tuple[float, ...] = 1.0
    variance: float = 1.0
    angle: float | tuple[float, float, float] = 0.0

    support: ClassVar[float] = math.inf  # ρ is zero from here on, in units of the length

    def __post_init__(self) -> None:
        if not isinstance(self.length, (int, float)):
            object.__setattr__(self, "length", tuple(float(v) for v in self.length))
        for value, what in ((self.length, "length"), (self.variance, "variance")):
            if not all(math.isfinite(v) and v > 0 for v in np.atleast_1d(value)):
                raise ValueError(f"The {what} of {type(self).__name__} must be positive and finite, got {value}.")

    # --- what a structure defines --------------------------------------------------------------------------------------

    def correlation(self, r: Array) -> Array:
        """ρ(r), r ≥ 0 in units of the length."""
        raise NotImplementedError

    def _slope(self, r: Array) -> Array:
        """r ρ'(r)."""
        raise NotImplementedError

    def _scale_mixture(self, rng: np.random.Generator, n: int) -> Array:
        """`(n,)` draws of s with ρ(r) = E exp(−s² r²/2): ω is s times a standard normal vector."""
        raise NotImplementedError

    # --- what follows ----------------------------------------------------------------------------------------------------

    @property
    def parts(self) -> tuple[CovarianceModel, ...]:
        """The structures of the sum."""
        return (self,)

    @property
    def sill(self) -> float:
        """C(0)."""
        return sum(p.variance for p in self.parts)

    @property
    def axis_aligned(self) -> bool:
        """Whether C is even in every axis by itself."""
        return not any(np.any(p.angle) and not isinstance(p.length, (int, float)) for p in self.parts)

    def metric(self, dimension: int) -> Array:
        """A, `(dimension, dimension)`: the lag in units of the length, along the turned axes, is A h."""
        lengths = [self.length] * dimension if isinstance(self.length, (int, float)) else list(self.length)
        if len(lengths) != dimension:
            raise ValueError(
                f"{type(self).__name__} has {len(lengths)} lengths for a grid of {dimension} axes; give one, or one an axis."
            )
        return np.diag(1 / np.asarray(lengths, dtype=np.float64)) @ _rotation(self.angle, dimension)

    def __call__(self, lags: Array) -> Array:
        """C(h) for lags `(…, dimension)` in the unit of the grid."""
        lags = np.asarray(lags, dtype=np.float64)
        total = np.zeros(lags.shape[:-1])
        for part in self.parts:
            r = np.sqrt(np.square(lags @ part.metric(lags.shape[-1]).T).sum(-1))
            total += part.variance * part.correlation(r)
        return total

    def on_axes(self, axes: Sequence[Array]) -> Array:
        """C on the product of the lags along each axis, without an array of all lag vectors."""
        d = len(axes)
        total = np.zeros(tuple(len(a) for a in axes))
        shaped = [np.asarray(a, dtype=np.float64).reshape(-1, *(1,) * (d - 1 - i)) for i, a in enumerate(axes)]
        for part in self.parts:
            A = part.metric(d)
            square = np.zeros(total.shape)
            for row in A:
                if np.count_nonzero(row) == 1:  # broadcasts: one axis alone
                    i = int(np.nonzero(row)[0][0])
                    square += (row[i] * shaped[i]) ** 2
                else:
                    square += sum(c * s for c, s in zip(row, shaped, strict=True)) ** 2
            np.sqrt(square, out=square)
            near = square < part.reach(1e-14)
            if near.all():
                total += part.variance * part.correlation(square)
            else:
                total[near] += part.variance * part.correlation(square[near])
        return total

    def line_correlation(self, r: Array) -> Array:
        """ρ₁(r) = ρ(r) + r ρ'(r) of the lines of turning bands."""
        r = np.asarray(r, dtype=np.float64)
        return self.correlation(r) + self._slope(r)

    def frequencies(self, rng: np.random.Generator, n: int, dimension: int) -> Array:
        """`(n, dimension)` draws of ω from the spectral measure, in radians per unit of the grid: E cos(ω·h) = C(h)/C(0)."""
        white = rng.standard_normal((n, dimension))
        return (self._scale_mixture(rng, n)[:, None] * white) @ self.metric(dimension)

    def reach(self, tolerance: float = 1e-8) -> float:
        """r beyond which |ρ| ≤ tolerance, in units of the length; at most 1e9."""
        if math.isfinite(self.support):
            return self.support
        return _reach(replace(self, length=1.0, variance=1.0, angle=0.0), tolerance)

    def range(self, dimension: int, tolerance: float = 0.05) -> Array:
        """`(dimension,)` lag along each axis of the grid beyond which C ≤ tolerance · C(0): the practical range."""
        out = np.zeros(dimension)
        for part in self.parts:
            share = tolerance * self.sill / part.variance / len(self.parts)
            if share < 1:
                # the ellipsoid |A h| = r reaches r sqrt((AᵀA)⁻¹_ii) along axis i
                A = part.metric(dimension)
                out = np.maximum(out, part.reach(share) * np.sqrt(np.diag(np.linalg.inv(A.T @ A))))
        return out

    def scaled(self, factor: float) -> CovarianceModel:
        """factor · C."""
        return replace(self, variance=self.variance * factor)

    def __add__(self, other: CovarianceModel) -> NestedCovariance:
        return NestedCovariance(structures=(*self.parts, *other.parts))


@functools.lru_cache(maxsize=256)
def _reach(model: CovarianceModel, tolerance: float) -> float:
    high = 1.0
    while high < 1e9 and float(np.abs(model.correlation(np.array([high])))[0]) > tolerance:
        high *= 2
    low = high / 2 if high > 1 else 0.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        if float(np.abs(model.correlation(np.array([middle])))[0]) > tolerance:
            low = middle
        else:
            high = middle
    return min(high, 1e9)


def _rotation(angle: float | tuple[float, ...], dimension: int) -> Array:
    angles = np.atleast_1d(np.asarray(angle, dtype=np.float64))
    turn = np.eye(dimension)
    if not angles.any():
        return turn
    if dimension == 2 and len(angles) == 1:
        planes = [(0, 1)]
    elif dimension == 3 and len(angles) == 3:
        planes = [(0, 1), (0, 2), (1, 2)]
    else:
        raise ValueError(
            f"{len(angles)} angle(s) were given for a grid of {dimension} axes; give one number in 2-D, three in 3-D, none in 1-D."
        )
    for (i, j), a in zip(planes, np.deg2rad(angles), strict=True):
        step = np.eye(dimension)
        step[i, i] = step[j, j] = math.cos(a)
        step[i, j], step[j, i] = math.sin(a), -math.sin(a)
        turn = step @ turn
    return turn


@dataclass(frozen=True, kw_only=True)
class Nugget(CovarianceModel):
    """variance · δ(h): white on the grid."""

    support: ClassVar[float] = 1e-9

    def correlation(self, r: Array) -> Array:
        return (np.asarray(r) <= 1e-9).astype(np.float64)

    def reach(self, tolerance: float = 1e-8) -> float:
        return 1e-8

    def line_correlation(self, r: Array) -> Array:
        raise TypeError("A nugget has no line covariance; the methods add it as white noise.")

    def frequencies(self, rng: np.random.Generator, n: int, dimension: int) -> Array:
        raise TypeError("A nugget has no spectral measure; the methods add it as white noise.")


@dataclass(frozen=True, kw_only=True)
class NestedCovariance(CovarianceModel):
    """A sum of structures, C = C₁ + C₂ + …; made by `+`."""

    structures: tuple[CovarianceModel, ...] = ()

    def __post_init__(self) -> None:
        if not self.structures:
            raise ValueError("A nested covariance needs at least one structure.")

    @property
    def parts(self) -> tuple[CovarianceModel, ...]:
        return self.structures

    def correlation(self, r: Array) -> Array:
        raise TypeError(
            "A nested covariance has no one correlation function of r; call it with lags, or ask its parts."
        )

    def reach(self, tolerance: float = 1e-8) -> float:
        raise TypeError("A nested covariance has a reach an axis: ask range(dimension, tolerance).")

    def frequencies(self, rng: np.random.Generator, n: int, dimension: int) -> Array:
        raise TypeError("A nested covariance is simulated structure by structure: ask its parts.")

    def scaled(self, factor: float) -> NestedCovariance:
        return NestedCovariance(structures=tuple(p.scaled(factor) for p in self.structures))


def smooth_and_nugget(model: CovarianceModel) -> tuple[list[CovarianceModel], float]:
    """The structures without the nugget, and the variance of the nugget."""
    parts = [p for p in model.parts if not isinstance(p, Nugget)]
    return parts, sum(p.variance for p in model.parts if isinstance(p, Nugget))
