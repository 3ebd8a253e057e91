r"""Convex regularisers with closed proximal operators, in torch, for batches of any dtype on any device.

    L1: Σ|x_i|         L2: ½ Σ|x_i|²        L2Norm: √Σ|x_i|²        L21: Σ_pixels √Σ_channels |x|²
    Huber: Σ h(|x_i|)       Box: 0 on [low, high], ∞ outside        Nuclear: Σ singular values

Each has `value(x)` (without the weight), `prox(x, step)` = argmin_y ½|y − x|² + step · w R(y), and, e^{−w R} being
log-concave, `log_prob(x)` = −w R(x). Complex models take moduli for absolute values. The conventions are PyProximal's
(`sigma` there is the weight here), with two differences that its users may meet: its `Huber.prox` shrinks moduli between
α and α + step by the L1 rule and its `L0.prox` cuts at step · sigma; the minimisers scale up to α + step, and cut at
√(2 step · sigma), as here.

Reference: Parikh & Boyd, Proximal Algorithms, Foundations and Trends in Optimization 1, 2014, section 6.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from invgen.grid import Grid
from invgen.priors._regularizer import Density, Regularizer, Separable, _positive, broadcasts

__all__ = ["L1", "L2", "L21", "Box", "Huber", "L2Norm", "Nuclear"]


class L1(Density, Separable):
    """R(x) = Σ_i |x_i − c_i|: sparsity; with its weight w the Laplace prior Π (w/2) e^{−w|x_i − c_i|}.

    prox: soft thresholding, sign(x) max(|x| − step · w, 0).

    Args:
        shape: of one model. weight: w. centre: c, a number or a tensor. grid: where the model lives.
    """

    @classmethod
    def examples(cls) -> list[L1]:
        return [cls((1, 5, 4), 0.7), cls((6,), 1.3, centre=torch.linspace(-1, 1, 6))]

    def _phi(self, r: Tensor) -> Tensor:
        return r

    def _shrink(self, r: Tensor, step: Tensor) -> Tensor:
        return (r - step).clamp_min(0)

    def conjugate_prox(self, v: Tensor, sigma: Tensor) -> Tensor:
        """The projection of v − σc onto [−w, w]."""
        if self._centre is not None:
            v = v - sigma.reshape(-1, *(1,) * (v.ndim - 1)) * self._centre.to(v)
        return (
            v * (self.weight / v.abs().clamp_min(self.weight)) if v.is_complex() else v.clamp(-self.weight, self.weight)
        )


class L2(Density, Separable):
    """R(x) = ½ Σ_i |x_i − c_i|²: the white Gaussian prior of mean c and variance 1/w.

    prox: (x + step · w c)/(1 + step · w).

    Args:
        shape: of one model. weight: w. centre: c, a number or a tensor. grid: where the model lives.
    """

    @classmethod
    def examples(cls) -> list[L2]:
        return [cls((1, 5, 4), 0.7), cls((6,), 1.3, centre=2.0)]

    def _phi(self, r: Tensor) -> Tensor:
        return 0.5 * r.square()

    def _shrink(self, r: Tensor, step: Tensor) -> Tensor:
        return r / (1 + step)


class Huber(Density, Separable):
    """R(x) = Σ_i h(|x_i − c_i|), h(r) = r²/2α up to α and r − α/2 beyond: L1 with a round tip.

    prox: x (1 − step/max(|x|, α + step)).

    Args:
        shape: of one model. weight: w. alpha: α > 0, in the unit of x.
        centre: c, a number or a tensor. grid: where the model lives.
    """

    def __init__(
        self,
        shape: tuple[int, ...] | None = None,
        weight: float = 1.0,
        alpha: float = 1.0,
        *,
        centre: float | Tensor = 0.0,
        grid: Grid | None = None,
    ) -> None:
        super().__init__(shape, weight, centre=centre, grid=grid)
        self.alpha = _positive(alpha, "The alpha of Huber")

    @classmethod
    def examples(cls) -> list[Huber]:
        return [cls((1, 5, 4), 0.7, 0.5), cls((6,), 1.3, 2.0, centre=-0.5)]

    def _phi(self, r: Tensor) -> Tensor:
        return torch.where(r <= self.alpha, 0.5 * r.square() / self.alpha, r - 0.5 * self.alpha)

    def _shrink(self, r: Tensor, step: Tensor) -> Tensor:
        return r * (1 - step / torch.maximum(r, step + self.alpha))


class _Groups(Density, Regularizer):
    """R(x) = Σ_groups |x_group|, groups along the axes `_axes` of the batch."""

    def _axes(self) -> tuple[int, ...]:
        raise NotImplementedError

    def value(self, x: Tensor) -> Tensor:
        """Σ of the norms of the groups, `(batch,)`."""
        self._check(x, "value")
        return torch.linalg.vector_norm(x, dim=self._axes()).reshape(x.shape[0], -1).sum(1)

    def _prox(self, x: Tensor, step: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=self._axes(), keepdim=True)
        tiny = torch.finfo(size.dtype).tiny
        return x * (1 - step / torch.maximum(size, step).clamp_min(tiny))

    def conjugate_prox(self, v: Tensor, sigma: Tensor) -> Tensor:
        """The projection of every group onto the ball of radius w."""
        square = (v.abs().square() if v.is_complex() else v * v).sum(self._axes(), keepdim=True)
        return v * (self.weight * square.clamp_min(self.weight**2).rsqrt())


class L2Norm(_Groups):
    """R(x) = √Σ_i |x_i|², the Euclidean norm of the model (not squared).

    prox: block soft thresholding, x (1 − step · w/max(|x|, step · w)).

    Args:
        shape: of one model. weight: w. grid: where the model lives.
    """

    @classmethod
    def examples(cls) -> list[L2Norm]:
        return [cls((1, 5, 4), 0.7), cls((6,), 1.3)]

    def _axes(self) -> tuple[int, ...]:
        return tuple(range(1, 1 + len(self.shape)))


class L21(_Groups):
    """R(x) = Σ_pixels √Σ_channels |x|²: channels are zero together.

    prox: block soft thresholding, pixel by pixel.

    Args:
        shape: `(channels, *spatial)`. weight: w. grid: where the model lives.
    """

    @classmethod
    def examples(cls) -> list[L21]:
        return [cls((3, 4, 2), 0.7)]

    def _axes(self) -> tuple[int, ...]:
        return (1,)


class Box(Density, Regularizer):
    """R(x) = 0 where low ≤ x ≤ high in every entry, ∞ elsewhere: bounds, positivity.

    prox: the projection, whatever the step. `log_prob` is 0 inside, edges included, and −∞ outside.

    Args:
        shape: of one model. low, high: numbers or tensors that broadcast to `shape`; one of them may be infinite.
        grid: where the model lives.

    Raises:
        ValueError: bounds that leave nothing, low > high, or that are NaN.
    """

    takes_complex, indicator = False, True

    def __init__(
        self,
        shape: tuple[int, ...] | None = None,
        low: float | Tensor = 0.0,
        high: float | Tensor = math.inf,
        *,
        grid: Grid | None = None,
    ) -> None:
        super().__init__(shape, 1.0, grid=grid)
        self.low, self.high = (torch.as_tensor(v, dtype=torch.float64) for v in (low, high))
        for b in (self.low, self.high):
            if not broadcasts(b.shape, self.shape):
                raise ValueError(f"The bounds of Box have the shape {tuple(b.shape)}, but models have {self.shape}.")
        if not bool((self.low <= self.high).all()):  # NaN included
            worst = float((self.low - self.high).max())
            raise ValueError(
                f"The bounds of Box leave nothing: low exceeds high by {worst:g} somewhere (or one is NaN); exchange them or widen the box."
            )

    @classmethod
    def examples(cls) -> list[Box]:
        return [cls((1, 5, 4), -0.5, 0.8), cls((6,), torch.linspace(-2, 0, 6))]

    def value(self, x: Tensor) -> Tensor:
        """0 inside and ∞ outside, `(batch,)`."""
        self._check(x, "value")
        inside = ((x >= self.low.to(x)) & (x <= self.high.to(x))).flatten(1).all(1)
        # flat inside, with a gradient, which is zero
        flat = torch.where(inside, x.flatten(1).sum(1), 0.0) * 0.0
        return flat + torch.where(inside, 0.0, math.inf).to(x)

    def _prox(self, x: Tensor, step: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(x, self.low.to(x)), self.high.to(x))


class Nuclear(Density, Regularizer):
    """R(X) = Σ singular values of the model as a matrix: low rank.

    A shape with two axes or `(channels, rows, columns)`: each channel is a matrix of its own, and their norms add.
    prox: soft thresholding of the singular values.

    Args:
        shape: of one model. weight: w. grid: where the model lives.

    Raises:
        ValueError: a shape of another number of axes. Cost: one singular value decomposition an item and channel.
    """

    def __init__(self, shape: tuple[int, ...] | None = None, weight: float = 1.0, *, grid: Grid | None = None) -> None:
        super().__init__(shape, weight, grid=grid)
        if len(self.shape) not in (2, 3):
            raise ValueError(
                f"Nuclear needs a matrix (rows, columns) or (channels, rows, columns), got the shape {self.shape}."
            )

    @classmethod
    def examples(cls) -> list[Nuclear]:
        return [cls((1, 5, 4), 0.7), cls((3, 6), 1.3)]

    def value(self, x: Tensor) -> Tensor:
        """Σ singular values, `(batch,)`."""
        self._check(x, "value")
        return torch.linalg.svdvals(x).reshape(x.shape[0], -1).sum(1)

    def _prox(self, x: Tensor, step: Tensor) -> Tensor:
        U, s, V = torch.linalg.svd(x, full_matrices=False)
        shrunk = (s - step.reshape(-1, *(1,) * (s.ndim - 1))).clamp_min(0)
        return (U * shrunk[..., None, :]) @ V
