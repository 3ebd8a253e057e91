"""Functions on the sky with named parameters, and sums of them: what lenses and light profiles share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

__all__: list[str] = []

POSITIVE = (0.0, math.inf)


@dataclass(frozen=True)
class Profile:
    """A frozen dataclass of numbers that can be replaced at a call by one tensor entry for each sample.

    Class attributes:
        ranges: parameter -> open interval of its values; a parameter without one may be any finite number.
        closed: parameters whose upper bound is allowed.
        pinned: fields that are never free.
    """

    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {}
    closed: ClassVar[tuple[str, ...]] = ()
    pinned: ClassVar[tuple[str, ...]] = ("name",)

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name == "name":
                if not (isinstance(value, str) and value.isidentifier()):
                    raise ValueError(
                        f"The name of a profile must be a word that may begin a parameter's, got {value!r}."
                    )
            else:
                object.__setattr__(self, entry.name, self._number(entry.name, value))

    @classmethod
    def _number(cls, name: str, value: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{cls.__name__} needs a number for {name}, got {type(value).__name__}.") from error
        low, high = cls.ranges.get(name, (-math.inf, math.inf))
        if not (low < number < high or (number == high and name in cls.closed)) or not math.isfinite(number):
            bound = f"between {low:g} and {high:g}" if math.isfinite(high) else f"above {low:g}"
            bound = bound if math.isfinite(low) else "finite"
            raise ValueError(f"{cls.__name__} needs {name} {bound}, got {number:g}.")
        return number

    @property
    def parameters(self) -> dict[str, float]:
        """Every parameter that may be free, and its value."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in self.pinned}

    def at(self, **theta: float) -> Self:
        """The same with other numbers."""
        self._check_names(theta)
        return replace(self, **theta)

    def _check_names(self, theta: Mapping[str, Any]) -> None:
        unknown = set(theta) - set(self.parameters)
        if unknown:
            raise ValueError(
                f"{type(self).__name__} has no parameter {', '.join(sorted(unknown))}; it has {', '.join(self.parameters)}."
            )

    def _value(self, name: str, value: Tensor | float, like: Tensor) -> Tensor:
        if not isinstance(value, Tensor):
            return torch.as_tensor(self._number(name, value), dtype=like.dtype, device=like.device)
        value = value.to(dtype=like.dtype, device=like.device)
        low, high = self.ranges.get(name, (-math.inf, math.inf))
        fits = (value > low) & (value <= high if name in self.closed else value < high)
        value = torch.where(fits, value, torch.full_like(value, math.nan))
        return value.reshape(*value.shape, *(1,) * (like.ndim - value.ndim)) if value.ndim else value

    def _values(self, theta: Mapping[str, Tensor | float], like: Tensor) -> dict[str, Any]:
        """Every parameter as a tensor that broadcasts against `like`, whose first axis is the batch."""
        self._check_names(theta)
        return {n: self._value(n, theta.get(n, own), like) for n, own in self.parameters.items()}


def own_axes(y: Tensor, x: Tensor, p: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Coordinates along the major and minor axis from the centre, and cosine and sine of the angle between."""
    y, x = y - p["center_y"], x - p["center_x"]
    cos, sin = p["angle"].cos(), p["angle"].sin()
    return cos * x + sin * y, cos * y - sin * x, cos, sin


@dataclass(frozen=True)
class ProfileSum(Profile):
    """Several profiles.

    A parameter keeps its name where one part has it. Where several do it is `NAME_parameter`, NAME being the part's.

    Raises:
        ValueError: two parts of one name that share parameters.
    """

    parts: tuple[Any, ...]

    def __post_init__(self) -> None:
        names = [name for taken in self._names() for name in taken.values()]
        double = sorted({n for n in names if names.count(n) > 1})
        if double:
            raise ValueError(
                f"Two parts of the sum have the parameters {', '.join(double)}; give each a name of its own, e.g. name='satellite'."
            )

    def _names(self) -> list[dict[str, str]]:
        """For each part: its own name of a parameter -> that of the sum."""
        own = [list(p.parameters) for p in self.parts]
        every = [n for names in own for n in names]
        return [
            {n: n if every.count(n) == 1 else f"{part.name}_{n}" for n in names}
            for part, names in zip(self.parts, own, strict=True)
        ]

    def _split(self, theta: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [{own: theta[n] for own, n in names.items() if n in theta} for names in self._names()]

    @property
    def parameters(self) -> dict[str, float]:
        return {
            shared: part.parameters[own]
            for part, names in zip(self.parts, self._names(), strict=True)
            for own, shared in names.items()
        }

    def at(self, **theta: float) -> Self:
        self._check_names(theta)
        return type(self)(tuple(p.at(**own) for p, own in zip(self.parts, self._split(theta), strict=True)))
