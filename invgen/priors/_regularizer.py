r"""What every regulariser is: R(x) with a weight, its proximal operator, and the density e^{−weight · R} where convex.

    p(x) ∝ e^{−w R(x)},        prox(x, t) = argmin_y ½|y − x|² + t w R(y)

Coordinates are the model's own: the transform is the identity. Fields are `(batch, channels, *spatial)` or `(batch, dim)`.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from invgen.contracts import LinearOperator, check_batch
from invgen.grid import Grid
from invgen.transforms import Identity

__all__: list[str] = []


class Regularizer:
    """Base of the regularisers; a subclass writes `value` and `_prox`.

    Args:
        shape: of one model. weight: w > 0, multiplies R in `prox` and `log_prob`, not in `value`.
        grid: where the model lives; its shape stands for `shape` when that is None.

    Attributes:
        convex: R is convex; solvers that need it refuse the others.
        exact_prox: the proximal operator is a closed form; otherwise it is iterated to a stated tolerance.
        takes_complex: complex models are allowed (moduli take the place of absolute values).
        indicator: R is 0 on a set and infinite elsewhere: `prox` is the projection, whatever the step.

    Raises:
        ValueError: a weight that is not positive and finite, no shape, a shape that is not the grid's.
    """

    convex: bool = True
    exact_prox: bool = True
    takes_complex: bool = True
    indicator: bool = False

    def __init__(self, shape: tuple[int, ...] | None, weight: float = 1.0, *, grid: Grid | None = None) -> None:
        name = type(self).__name__
        if shape is None:
            if grid is None:
                raise ValueError(f"{name} does not know the shape of its models; give shape= or grid=.")
            shape = grid.field_shape
        self.shape = tuple(int(n) for n in shape)
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"{name} needs a shape with at least one entry an axis, got {self.shape}.")
        if grid is not None and grid.field_shape != self.shape:
            raise ValueError(f"{name} has the shape {self.shape} but its grid {grid.field_shape}; give one of the two.")
        self.grid, self.transform, self.weight = grid, Identity(), _positive(weight, f"The weight of {name}")

    def value(self, x: Tensor) -> Tensor:
        """R(x), `(batch,)`, without the weight."""
        raise NotImplementedError

    def _prox(self, x: Tensor, step: Tensor) -> Tensor:
        """argmin_y ½|y − x|² + step R(y); step `(batch or 1, 1, …)`, the weight included."""
        raise NotImplementedError

    def penalty(self, x: Tensor) -> Tensor:
        """w R(x), `(batch,)`: what a solver adds to the misfit."""
        return self.weight * self.value(x)

    def prox(self, x: Tensor, step: float | Tensor) -> Tensor:
        """argmin_y ½|y − x|² + step · w R(y).

        Args:
            x: `(batch, *shape)`. step: a number or `(batch,)`, finite and not negative.

        Raises:
            ValueError: another shape, a step that is negative or not finite.
            TypeError: complex x for a regulariser of real models.
        """
        self._check(x, "prox")
        return self._prox(x, self._step(step, x))

    def conjugate_prox(self, v: Tensor, sigma: Tensor) -> Tensor:
        """prox of σ (wR)* at v, by Moreau's identity v − σ prox_{wR/σ}(v/σ); sigma `(batch,)`, positive."""
        s = sigma.reshape(-1, *(1,) * (v.ndim - 1))
        return v - s * self.prox(v / s, 1 / sigma)

    def parts(self) -> list[tuple[LinearOperator | None, Any]]:
        """R as Σ_i R_i(K_i x) with a proximal operator for each R_i: pairs (K_i or None for the identity, R_i)."""
        return [(None, self)]

    def reweighted(self, weight: float) -> Any:
        """The same regulariser with another weight."""
        other = copy.copy(self)
        other.weight = _positive(weight, f"The weight of {type(self).__name__}")
        return other

    def __add__(self, other: Any) -> Any:
        from invgen.priors.regularizer_sums import RegularizerSum

        return RegularizerSum([self, other])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shape}, weight={self.weight:g})"

    def _check(self, x: Tensor, method: str) -> None:
        check_batch(x, self.shape, f"The x given to {type(self).__name__}.{method}")
        if x.is_complex() and not self.takes_complex:
            raise TypeError(
                f"{type(self).__name__} is a regulariser of real models, got {x.dtype}; stack real and imaginary parts as channels, or use one that takes complex models."
            )

    def _step(self, step: float | Tensor, x: Tensor) -> Tensor:
        """w · step as `(batch or 1, 1, …)`."""
        if not isinstance(step, Tensor):
            if not (step >= 0 and math.isfinite(step)):
                raise ValueError(f"The step of a proximal operator must be finite and not negative, got {step}.")
            return x.real.new_full((1,) * x.ndim, self.weight * float(step))
        if step.ndim > 1 or (step.ndim == 1 and step.shape[0] not in (1, x.shape[0])):
            raise ValueError(
                f"The step has the shape {tuple(step.shape)} but the batch holds {x.shape[0]} items; give a number or one value an item."
            )
        return self.weight * step.to(x.real).reshape(-1, *(1,) * (x.ndim - 1))


class Density:
    """The density of a convex regulariser."""

    def log_prob(self: Any, x: Tensor) -> Tensor:
        """−w R(x), `(batch,)`: the log-density up to a constant (improper where R does not grow in every direction)."""
        return -self.penalty(x)


def _positive(value: float, what: str) -> float:
    if isinstance(value, bool) or not (float(value) > 0 and math.isfinite(value)):
        raise ValueError(f"{what} must be positive and finite, got {value}.")
    return float(value)


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape broadcasts to an item of shape `to`."""
    tail = to[len(to) - len(shape) :] if len(shape) <= len(to) else ()
    return len(shape) <= len(to) and all(n in (1, m) for n, m in zip(shape, tail, strict=True))


def signs(x: Tensor, modulus: Tensor) -> Tensor:
    """x/|x|, 1 where x is zero."""
    return torch.where(modulus > 0, x / modulus.clamp_min(torch.finfo(modulus.dtype).tiny), torch.ones_like(x))


class Separable(Regularizer):
    """R(x) = Σ_i φ(|x_i − c_i|): a subclass writes φ and the proximal operator of φ on [0, ∞).

    Args:
        centre: c, a number or a tensor that broadcasts to `shape`: where the penalty is zero.
    """

    def __init__(
        self,
        shape: tuple[int, ...] | None = None,
        weight: float = 1.0,
        *,
        centre: float | Tensor = 0.0,
        grid: Grid | None = None,
    ) -> None:
        super().__init__(shape, weight, grid=grid)
        c = torch.as_tensor(centre)
        if not bool(torch.isfinite(c).all()):
            raise ValueError(f"The centre of {type(self).__name__} must be finite.")
        if not broadcasts(c.shape, self.shape):
            raise ValueError(
                f"The centre of {type(self).__name__} has the shape {tuple(c.shape)}, which does not broadcast to {self.shape}."
            )
        self._centre = c.to(torch.promote_types(c.dtype, torch.float64)) if bool((c != 0).any()) else None

    def _phi(self, r: Tensor) -> Tensor:
        """φ(r), entry by entry, r ≥ 0."""
        raise NotImplementedError

    def _shrink(self, r: Tensor, step: Tensor) -> Tensor:
        """argmin_{s ≥ 0} ½(s − r)² + step φ(s), entry by entry, r ≥ 0."""
        raise NotImplementedError

    def _moved(self, x: Tensor) -> Tensor:
        return x if self._centre is None else x - self._centre.to(x)

    def value(self, x: Tensor) -> Tensor:
        """Σ_i φ(|x_i − c_i|), `(batch,)`."""
        self._check(x, "value")
        return self._phi(self._moved(x).abs()).flatten(1).sum(1)

    def _prox(self, x: Tensor, step: Tensor) -> Tensor:
        v = self._moved(x)
        r = v.abs()
        y = signs(v, r) * self._shrink(r, step)
        return y if self._centre is None else y + self._centre.to(x)
