r"""Marginals other than the Gaussian: x = T(u) with u standard normal and x as the data are.

    normal score    T piecewise linear through (Φ⁻¹((k − ½)/n), x_(k)), the order statistics of the data
    Hermite         T(u) = Σ_k φ_k H_k(u)/√k!,      φ_k = E[x(u) H_k(u)]/√k!,   Var x = Σ_{k ≥ 1} φ_k²

Both are increasing, invertible and continued as straight lines beyond the data (Hermite: where the polynomial turns).

Reference: Chilès & Delfiner, Geostatistics, 2012, section 6.2 and A.5.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

from invgen.transforms import Transform

__all__ = ["Hermite", "NormalScore"]


def _values(data: Tensor | np.ndarray) -> np.ndarray:
    x = np.asarray(data.detach().cpu() if isinstance(data, Tensor) else data, dtype=np.float64).ravel()
    bad = int((~np.isfinite(x)).sum())
    if bad:
        raise ValueError(f"{bad} of {len(x)} values are NaN or infinite; leave them out.")
    if len(np.unique(x)) < 3:
        raise ValueError(f"An anamorphosis needs at least three different values, got {len(np.unique(x))}.")
    return np.sort(x)


class NormalScore(Transform):
    """The empirical anamorphosis of data.

    Args:
        data: values, any shape; equal ones share their mean score. shape: of one item, or None.
        knots: at the most; more data are thinned to as many quantiles.

    Raises:
        ValueError: values that are not finite, or fewer than three different ones.

    Cost: a binary search an entry.
    """

    u_knots: Tensor
    x_knots: Tensor

    def __init__(self, data: Tensor | np.ndarray, *, shape: tuple[int, ...] | None = None, knots: int = 512) -> None:
        super().__init__(shape)
        x = _values(data)
        score = ndtri((np.arange(len(x)) + 0.5) / len(x))
        unique, group = np.unique(x, return_inverse=True)
        u = np.bincount(group.reshape(-1), score) / np.bincount(group.reshape(-1))
        if len(unique) > knots:
            kept = np.unique(np.rint(np.linspace(0, len(unique) - 1, knots)).astype(int))
            u, unique = u[kept], unique[kept]
        self.register_buffer("u_knots", torch.from_numpy(u))
        self.register_buffer("x_knots", torch.from_numpy(unique))

    @classmethod
    def examples(cls) -> list[Any]:
        rng = np.random.default_rng(0)
        return [cls(rng.gamma(2.0, 1.0, 50), shape=(3, 4)), cls(np.round(rng.standard_normal(40), 1), shape=(5,))]

    def _lines(self, v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The piecewise linear map a -> b at v, and its slope; straight on beyond the ends."""
        a, b = a.to(v), b.to(v)
        k = torch.searchsorted(a, v.detach().contiguous(), right=True).clamp(1, len(a) - 1)
        slope = (b[1:] - b[:-1]) / (a[1:] - a[:-1])
        s = slope[k - 1]
        return b[k - 1] + s * (v - a[k - 1]), s

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        return self._lines(x, self.u_knots, self.x_knots)[0]

    def inverse(self, x: Tensor) -> Tensor:
        return self._lines(x, self.x_knots, self.u_knots)[0]

    def log_det(self, u: Tensor) -> Tensor:
        return self._lines(u, self.u_knots, self.x_knots)[1].log().flatten(1).sum(1)


class Hermite(Transform):
    """The Hermite expansion of the anamorphosis of data.

    Args:
        data: values, any shape. degree: of the polynomial. shape: of one item, or None.

    Attributes:
        coefficients: φ_k, `(degree + 1,)`; φ_0 is the mean, the squares of the others add up to the variance.
        interval: where the polynomial increases; beyond it T goes on straight with the slope at its ends.

    Raises:
        ValueError: data as for `NormalScore`; a polynomial that does not increase at 0 (take another degree).

    Cost: degree multiplications an entry; the inverse is a table of 4096 entries and three Newton steps.
    """

    coefficients: Tensor
    table_u: Tensor

    def __init__(self, data: Tensor | np.ndarray, *, degree: int = 12, shape: tuple[int, ...] | None = None) -> None:
        super().__init__(shape)
        if not 1 <= degree <= 60:
            raise ValueError(f"The degree of a Hermite expansion lies between 1 and 60, got {degree}.")
        x = _values(data)
        edges = ndtri(np.arange(1, len(x)) / len(x))
        density = np.exp(-0.5 * edges**2) / math.sqrt(2 * math.pi)
        h = _hermite(edges, degree)
        # E[x H_k] of the step function with the order statistics as steps: ∫ H_k g = −H_{k−1} g
        phi = [x.mean()]
        for k in range(1, degree + 1):
            phi.append(float(((x[1:] - x[:-1]) * h[k - 1] * density).sum()) / math.sqrt(k))
        c = np.array(phi)
        u = np.linspace(-5, 5, 4097)
        slope = _slope(u, c)
        if slope[2048] <= 0:
            raise ValueError(f"The Hermite expansion of degree {degree} does not increase at 0; take another degree.")
        falling = np.nonzero(slope <= 0.02 * slope[2048])[0]
        low = u[falling[falling < 2048].max() + 1] if (falling < 2048).any() else -5.0
        high = u[falling[falling > 2048].min() - 1] if (falling > 2048).any() else 5.0
        self.interval = (float(low), float(high))
        self.register_buffer("coefficients", torch.from_numpy(c))
        self.register_buffer("table_u", torch.linspace(low, high, 4096, dtype=torch.float64))

    @classmethod
    def examples(cls) -> list[Any]:
        rng = np.random.default_rng(0)
        return [cls(np.exp(0.5 * rng.standard_normal(400)), degree=6, shape=(3, 4))]

    def _parts(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """T(u) and T'(u)."""
        c = self.coefficients.tolist()
        inside = u.clamp(*self.interval)
        before, now = torch.ones_like(inside), inside
        value, slope = c[0] + c[1] * now, torch.full_like(inside, c[1])
        for k in range(1, len(c) - 1):
            slope = slope + c[k + 1] * math.sqrt(k + 1) * now
            before, now = now, (inside * now - math.sqrt(k) * before) / math.sqrt(k + 1)
            value = value + c[k + 1] * now
        return value + slope * (u - inside), slope

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        return self._parts(x)[0]

    def inverse(self, x: Tensor) -> Tensor:
        u = self.table_u.to(x)
        t = self._parts(u)[0]
        k = torch.searchsorted(t, x.detach().contiguous(), right=True).clamp(1, len(u) - 1)
        out = u[k - 1] + (x - t[k - 1]) * (u[k] - u[k - 1]) / (t[k] - t[k - 1])
        for _ in range(3):
            value, slope = self._parts(out)
            out = out - (value - x) / slope
        return out

    def log_det(self, u: Tensor) -> Tensor:
        return self._parts(u)[1].log().flatten(1).sum(1)


def _hermite(u: np.ndarray, degree: int) -> np.ndarray:
    """H_k(u)/√k!, k = 0 … degree."""
    out = np.ones((degree + 1, len(u)))
    if degree:
        out[1] = u
    for k in range(1, degree):
        out[k + 1] = (u * out[k] - math.sqrt(k) * out[k - 1]) / math.sqrt(k + 1)
    return out


def _slope(u: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Σ φ_k √k H_{k−1}(u)/√(k−1)!."""
    h = _hermite(u, len(c) - 1)
    total: np.ndarray = sum(c[k] * math.sqrt(k) * h[k - 1] for k in range(1, len(c)))  # type: ignore[assignment]
    return total
