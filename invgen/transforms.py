"""Invertible maps between coordinates u and physical units x, as operators with a log-determinant.

They act on any shape (`model_shape` may stay None until they are composed) and compose with `@` like every operator.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from invgen.contracts import Operator

__all__ = ["Affine", "Chain", "Exp", "Identity", "Log", "Probit", "Sigmoid", "Transform"]


class Transform(Operator):
    """x = T(u), invertible, element by element.

    Args:
        shape: shape of one item, or None to accept any.
    """

    affine: bool = False

    def __init__(self, shape: tuple[int, ...] | None = None) -> None:
        super().__init__(shape or (), shape or ())
        self.any_shape = shape is None

    def __call__(self, x: Tensor, **theta: Tensor) -> Tensor:
        if self.any_shape:
            return self.forward(x, **theta)
        return super().__call__(x, **theta)

    def inverse(self, x: Tensor) -> Tensor:
        """u with T(u) = x; raises a ValueError outside the range of T."""
        raise NotImplementedError

    def log_det(self, u: Tensor) -> Tensor:
        """log |det dT/du| of each item, `(batch,)`."""
        raise NotImplementedError

    def within_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Which items `(batch,)` T can produce, and x with the others replaced by something that it can.

        For searches in x: the density is zero outside, while `inverse` has nothing to return there.
        """
        return torch.ones(len(x), dtype=torch.bool, device=x.device), x


class Identity(Transform):
    """x = u."""

    affine = True

    @classmethod
    def examples(cls) -> list[Any]:
        return [cls((3,))]

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        return x

    def inverse(self, x: Tensor) -> Tensor:
        return x

    def log_det(self, u: Tensor) -> Tensor:
        return u.new_zeros(u.shape[0])


class Affine(Transform):
    """x = shift + scale · u.

    Args:
        shift, scale: numbers, one value a channel (first axis of the item), or tensors that broadcast to an item.
        shape: shape of one item, or None.
    """

    affine = True

    shift: Tensor
    scale: Tensor

    def __init__(
        self, shift: float | Tensor = 0.0, scale: float | Tensor = 1.0, shape: tuple[int, ...] | None = None
    ) -> None:
        super().__init__(shape)
        self.register_buffer("shift", torch.as_tensor(shift, dtype=torch.float64))
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float64))
        if not bool((self.scale != 0).all()):
            raise ValueError(
                "An affine transform with a zero scale is not invertible; give every component a non-zero scale."
            )

    def _per_item(self, value: Tensor, like: Tensor) -> Tensor:
        if value.ndim == 1 and like.ndim > 2:  # one value a channel
            value = value.reshape(-1, *(1,) * (like.ndim - 2))
        return value.to(like)

    @classmethod
    def examples(cls) -> list[Any]:
        return [cls(2.0, -0.5, (3,)), cls(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0]), (2, 2, 3))]

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        return self._per_item(self.shift, x) + self._per_item(self.scale, x) * x

    def linear(self, x: Tensor) -> Tensor:
        """scale · x, the part without the shift."""
        return self._per_item(self.scale, x) * x

    def inverse(self, x: Tensor) -> Tensor:
        return (x - self._per_item(self.shift, x)) / self._per_item(self.scale, x)

    def log_det(self, u: Tensor) -> Tensor:
        per_entry = self._per_item(self.scale, u).abs().log().expand_as(u[:1])
        return per_entry.flatten().sum().expand(u.shape[0])


class Exp(Transform):
    """x = exp(u): log-impedance to impedance, log-variance to variance."""

    @classmethod
    def examples(cls) -> list[Any]:
        return [cls((2, 3))]

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        return x.exp()

    def inverse(self, x: Tensor) -> Tensor:
        if not bool((x > 0).all()):
            raise ValueError(f"The inverse of Exp needs positive values, the smallest given is {float(x.min()):g}.")
        return x.log()

    def within_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _replaced(x, x > 0, 1.0)

    def log_det(self, u: Tensor) -> Tensor:
        return u.flatten(1).sum(1)


class Log(Transform):
    """x = ln(u), for positive u."""

    @classmethod
    def examples(cls) -> list[Any]:
        return [cls((2, 3))]

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        return x.log()

    def inverse(self, x: Tensor) -> Tensor:
        return x.exp()

    def log_det(self, u: Tensor) -> Tensor:
        return -u.log().flatten(1).sum(1)


class Sigmoid(Transform):
    """A bound that leaves the inside alone: x stays in (low, high) and equals u away from the edges.

    T(u) = low + softplus_β(u − low) − softplus_β(u − high), the smooth version of clamp: with β = `sharpness`, it
    differs from u by at most exp(−β·distance to the edge)/β, so that a velocity bound is part of the physics and the
    identity on the range that the prior visits.

    Args:
        low, high: bounds in the units of x.
        sharpness: β in 1/units; 400/(high − low) when omitted, 1e-6 of the range at 2 % from an edge.
        shape: shape of one item, or None.
    """

    def __init__(
        self, low: float, high: float, sharpness: float | None = None, shape: tuple[int, ...] | None = None
    ) -> None:
        super().__init__(shape)
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"Bounds must be finite with low < high, got ({low}, {high}).")
        self.low, self.high = float(low), float(high)
        self.sharpness = float(sharpness) if sharpness is not None else 400.0 / (high - low)

    @classmethod
    def examples(cls) -> list[Any]:
        return [cls(-1.0, 5.0, 3.0, (4,))]

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        b = self.sharpness
        return (
            self.low
            + (F.softplus(b * (x - self.low), threshold=50) - F.softplus(b * (x - self.high), threshold=50)) / b
        )

    def inverse(self, x: Tensor) -> Tensor:
        if not bool(((x > self.low) & (x < self.high)).all()):
            raise ValueError(
                f"The inverse of the bound needs values inside ({self.low}, {self.high}), got {float(x.min()):g} to {float(x.max()):g}."
            )
        # with y = b (x - low), L = b (high - low): exp(v) = (e^y - 1) / (1 - e^(y - L)), in logarithms
        b = self.sharpness
        y, remaining = b * (x - self.low), b * (self.high - x)
        log_up = y + torch.log(-torch.expm1(-y))
        log_down = torch.log(-torch.expm1(-remaining))
        return self.low + (log_up - log_down) / b

    def within_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _replaced(x, (x > self.low) & (x < self.high), 0.5 * (self.low + self.high))

    def log_det(self, u: Tensor) -> Tensor:
        b = self.sharpness
        lower, upper = b * (u - self.low), b * (u - self.high)
        # sigmoid(lower) - sigmoid(upper) = sigmoid(lower) sigmoid(-upper) (1 - e^(upper - lower))
        gap = torch.log(-torch.expm1(upper - lower))
        return (F.logsigmoid(lower) + F.logsigmoid(-upper) + gap).flatten(1).sum(1)


class Probit(Transform):
    r"""x = low + (high − low) Φ(u): a standard normal u becomes a uniform x on (low, high).

    Args:
        low, high: bounds in the units of x, numbers or tensors of the item's shape.
        shape: shape of one item, or None.

    Raises:
        ValueError: bounds that are not finite with low < high.
    """

    def __init__(self, low: float | Tensor, high: float | Tensor, shape: tuple[int, ...] | None = None) -> None:
        super().__init__(shape)
        given = (torch.as_tensor(low, dtype=torch.float64), torch.as_tensor(high, dtype=torch.float64))
        first, last = torch.broadcast_tensors(*given)
        if not bool((torch.isfinite(first) & torch.isfinite(last) & (first < last)).all()):
            raise ValueError(f"Bounds must be finite with low < high, got {first.tolist()} and {last.tolist()}.")
        self.register_buffer("low", first.clone())
        self.register_buffer("high", last.clone())
        self.low: Tensor
        self.high: Tensor

    @classmethod
    def examples(cls) -> list[Any]:
        return [cls(-1.0, 5.0, (4,)), cls(torch.tensor([0.0, -2.0]), torch.tensor([4.0, 6.0]), (2,))]

    def _bounds(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return self.low.to(like), self.high.to(like)

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        low, high = self._bounds(x)
        return low + (high - low) * torch.special.ndtr(x)

    def inverse(self, x: Tensor) -> Tensor:
        """u of values in [low, high]; the edges, which rounding reaches, are as far out as the precision goes."""
        low, high = self._bounds(x)
        if not bool(((x >= low) & (x <= high)).all()):
            raise ValueError(
                f"The inverse of Probit needs values from low to high, got {float(x.min()):g} to {float(x.max()):g}."
            )
        eps = torch.finfo(x.dtype).eps
        return torch.special.ndtri(((x - low) / (high - low)).clamp(eps, 1 - eps))

    def within_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self._bounds(x)
        good = ((x >= low) & (x <= high)).flatten(1).all(1)
        return good, torch.where(good.reshape(-1, *(1,) * (x.ndim - 1)), x, 0.5 * (low + high))

    def log_det(self, u: Tensor) -> Tensor:
        low, high = self._bounds(u)
        normal = -0.5 * u.square() - 0.5 * math.log(2 * math.pi)
        return (normal + (high - low).log()).flatten(1).sum(1)


class Chain(Transform):
    """x = T_1(T_2(…(u))): `Chain(T_1, T_2)` applies the last first, like `T_1 @ T_2`."""

    def __init__(self, *parts: Transform) -> None:
        if not parts:
            raise ValueError("Chain needs at least one transform; use Identity for none.")
        shapes = {p.model_shape for p in parts if not p.any_shape}
        if len(shapes) > 1:
            raise ValueError(
                f"The transforms of a Chain need one shape, got {sorted(shapes)}; give them the same, or none."
            )
        super().__init__(next(iter(shapes), None))
        self.parts = torch.nn.ModuleList(parts)
        self.affine = all(p.affine for p in parts)

    @classmethod
    def examples(cls) -> list[Any]:
        return [cls(Affine(1.0, 2.0, (3,)), Exp())]

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        for part in reversed(self.parts):
            x = part(x)
        return x

    def inverse(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part.inverse(x)  # type: ignore[operator]
        return x

    def within_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        good, x = super().within_range(x)
        v = x
        for part in self.parts:
            fits, v = part.within_range(v)  # type: ignore[operator]
            good = good & fits
            v = part.inverse(v)  # type: ignore[operator]
        for part in reversed(self.parts):  # what replaced a bad item, seen from outside
            v = part(v)
        return good, torch.where(good.reshape(-1, *(1,) * (x.ndim - 1)), x, v)

    def log_det(self, u: Tensor) -> Tensor:
        total = u.new_zeros(u.shape[0])
        for part in reversed(self.parts):
            total = total + part.log_det(u)  # type: ignore[operator]
            u = part(u)
        return total


def _replaced(x: Tensor, entries: Tensor, value: float) -> tuple[Tensor, Tensor]:
    good = entries.flatten(1).all(1)
    return good, torch.where(good.reshape(-1, *(1,) * (x.ndim - 1)), x, torch.full_like(x, value))
