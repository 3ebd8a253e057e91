r"""Penalties that are not convex: less biased than L1 on what they keep, with many local minima in return.

    L0: number of x_i ≠ 0          LogPenalty: Σ ln(1 + γ|x_i|)/ln(1 + γ)          SCAD: quadratic between λ and aλ, then flat

Their proximal operators are global minimisers (of two or three candidates an entry, compared), and where two candidates
tie the smaller one is taken. They have no density: e^{−w R} has no finite integral for L0 and SCAD, and for LogPenalty
only from w > ln(1 + γ) on. Solvers that need convexity refuse them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from invgen.grid import Grid
from invgen.priors._regularizer import Separable, _positive

__all__ = ["L0", "SCAD", "LogPenalty"]


def _best(r: Tensor, step: Tensor, phi: object, candidates: list[Tensor]) -> Tensor:
    """The candidate with the lowest ½(s − r)² + step φ(s), entry by entry; the first of equals."""
    best, low = candidates[0], 0.5 * (candidates[0] - r).square() + step * phi(candidates[0])  # type: ignore[operator]
    for s in candidates[1:]:
        cost = 0.5 * (s - r).square() + step * phi(s)  # type: ignore[operator]
        better = cost < low
        best, low = torch.where(better, s, best), torch.where(better, cost, low)
    return best


class L0(Separable):
    """R(x) = number of entries with x_i ≠ c_i.

    prox: hard thresholding, x where |x| > √(2 step · w) and 0 elsewhere (½x² against step · w).

    Args:
        shape: of one model. weight: w. centre: c, a number or a tensor. grid: where the model lives.
    """

    convex = False

    @classmethod
    def examples(cls) -> list[L0]:
        return [cls((1, 5, 4), 0.3), cls((6,), 0.2, centre=1.0)]

    def _phi(self, r: Tensor) -> Tensor:
        return (r > 0).to(r)

    def _shrink(self, r: Tensor, step: Tensor) -> Tensor:
        return torch.where(0.5 * r.square() > step, r, torch.zeros_like(r))


class LogPenalty(Separable):
    """R(x) = Σ_i ln(1 + γ|x_i − c_i|)/ln(1 + γ): 0 at 0, 1 at 1, between L1 (γ → 0) and L0 (γ → ∞).

    prox: with k = step · w/ln(1 + γ), stationary points solve γs² + (1 − γr)s + kγ − r = 0; the larger root against 0.

    Args:
        shape: of one model. weight: w. gamma: γ > 0, in 1/unit of x.
        centre: c, a number or a tensor. grid: where the model lives.

    Reference: Friedman 2012, Int. J. Forecasting 28; the scaling is PyProximal's `Log`.
    """

    convex = False

    def __init__(
        self,
        shape: tuple[int, ...] | None = None,
        weight: float = 1.0,
        gamma: float = 1.3,
        *,
        centre: float | Tensor = 0.0,
        grid: Grid | None = None,
    ) -> None:
        super().__init__(shape, weight, centre=centre, grid=grid)
        self.gamma = _positive(gamma, "The gamma of LogPenalty")

    @classmethod
    def examples(cls) -> list[LogPenalty]:
        return [cls((1, 5, 4), 0.3), cls((6,), 0.6, 4.0)]

    def _phi(self, r: Tensor) -> Tensor:
        return torch.log1p(self.gamma * r) / math.log1p(self.gamma)

    def _shrink(self, r: Tensor, step: Tensor) -> Tensor:
        k = step / math.log1p(self.gamma)
        b = self.gamma * r - 1
        discriminant = b.square() + 4 * self.gamma * (r - k * self.gamma)
        root = ((b + discriminant.clamp_min(0).sqrt()) / (2 * self.gamma)).clamp_min(0)
        root = torch.where(discriminant >= 0, root, torch.zeros_like(r))
        return _best(r, step, self._phi, [torch.zeros_like(r), root])


class SCAD(Separable):
    """Smoothly clipped absolute deviation: R(x) = Σ_i φ(|x_i − c_i|), flat beyond aλ.

        φ(r) = λr  (r ≤ λ),      (2aλr − r² − λ²)/2(a − 1)  (λ < r ≤ aλ),      (a + 1)λ²/2  (r > aλ)

    prox: the minimisers of the three pieces, compared: max(r − tλ, 0) below λ, ((a − 1)r − taλ)/(a − 1 − t) between
    (where t = step · w < a − 1), r beyond aλ; and the ends of the pieces.

    Args:
        shape: of one model. weight: w. threshold: λ > 0, in the unit of x. a: above 2.
        centre: c, a number or a tensor. grid: where the model lives.

    Reference: Fan & Li 2001, JASA 96, equation 2.7 (their λ is also the weight).
    """

    convex = False

    def __init__(
        self,
        shape: tuple[int, ...] | None = None,
        weight: float = 1.0,
        threshold: float = 1.0,
        a: float = 3.7,
        *,
        centre: float | Tensor = 0.0,
        grid: Grid | None = None,
    ) -> None:
        super().__init__(shape, weight, centre=centre, grid=grid)
        self.threshold = _positive(threshold, "The threshold of SCAD")
        if not (a > 2 and math.isfinite(a)):
            raise ValueError(f"SCAD needs a finite a above 2 (Fan & Li use 3.7), got {a}.")
        self.a = float(a)

    @classmethod
    def examples(cls) -> list[SCAD]:
        return [cls((1, 5, 4), 0.8, 0.5), cls((6,), 3.5, 0.4, 2.5)]

    def _phi(self, r: Tensor) -> Tensor:
        lam, a = self.threshold, self.a
        middle = (2 * a * lam * r - r.square() - lam**2) / (2 * (a - 1))
        return torch.where(
            r <= lam, lam * r, torch.where(r <= a * lam, middle, torch.full_like(r, (a + 1) * lam**2 / 2))
        )

    def _shrink(self, r: Tensor, step: Tensor) -> Tensor:
        lam, a = self.threshold, self.a
        first = (r - step * lam).clamp(0, lam)
        slope = a - 1 - step
        middle = ((a - 1) * r - step * a * lam) / torch.where(slope > 0, slope, torch.ones_like(slope))
        middle = torch.where(slope > 0, middle, r).clamp(lam, a * lam)
        return _best(r, step, self._phi, [first, middle, r.clamp_min(a * lam)])
