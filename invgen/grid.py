"""Where a field lives: axis names, spacing, origin, units and channel names."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

__all__ = ["Grid", "check_same_grid"]


@dataclass(frozen=True)
class Grid:
    """A regular grid under a `(channels, *spatial)` field.

    Args:
        shape: number of samples along each spatial axis.
        spacing: distance between samples, in `units`.
        origin: coordinate of the first sample, in `units`; zeros when omitted.
        axes: axis names, e.g. `("z", "x")` or `("t", "x")`.
        units: unit of each axis, e.g. `("m", "m")` or `("s", "m")`.
        channels: what each channel holds, e.g. `("log_impedance",)`.
        channel_units: unit of each channel; empty strings when omitted.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...] = ()
    axes: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    channels: tuple[str, ...] = ("value",)
    channel_units: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        n = len(self.shape)
        names = (
            ("x",) if n == 1 else ("z", "x") if n == 2 else ("z", "y", "x")[-n:] if n == 3 else tuple("abcdefgh"[:n])
        )
        fill = {
            "shape": tuple(int(s) for s in self.shape),
            "spacing": tuple(float(s) for s in self.spacing),
            "origin": tuple(float(o) for o in self.origin) or (0.0,) * n,
            "axes": tuple(self.axes) or names,
            "units": tuple(self.units) or ("",) * n,
            "channels": tuple(self.channels),
            "channel_units": tuple(self.channel_units) or ("",) * len(self.channels),
        }
        for name, value in fill.items():
            object.__setattr__(self, name, value)
        for name in ("spacing", "origin", "axes", "units"):
            if len(getattr(self, name)) != n:
                raise ValueError(
                    f"Grid {name} has {len(getattr(self, name))} entries but the shape {self.shape} has {n} axes; give one entry an axis."
                )
        if any(s < 1 for s in self.shape):
            raise ValueError(f"Grid shape {self.shape} has an axis without samples; every axis needs at least one.")
        if not all(math.isfinite(s) and s > 0 for s in self.spacing):
            raise ValueError(f"Grid spacing {self.spacing} must be finite and positive on every axis.")
        if len(self.channel_units) != len(self.channels):
            raise ValueError(
                f"Grid has {len(self.channels)} channels but {len(self.channel_units)} channel units; give one unit a channel."
            )

    @property
    def field_shape(self) -> tuple[int, ...]:
        """`(channels, *spatial)`: the model shape of an operator or prior on this grid."""
        return (len(self.channels), *self.shape)

    def coordinates(self, axis: int | str) -> np.ndarray:
        """Coordinates of the samples along one axis, `(shape[axis],)`, in that axis' unit."""
        if isinstance(axis, str) and axis not in self.axes:
            raise ValueError(f"The grid has the axes {self.axes}, not {axis!r}; give one of those.")
        i = self.axes.index(axis) if isinstance(axis, str) else axis
        return self.origin[i] + self.spacing[i] * np.arange(self.shape[i])

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Left, right, bottom, top of a 2-D grid for `imshow(origin="upper")`, pixel edges included."""
        if len(self.shape) != 2:
            raise ValueError(f"extent needs a 2-D grid, this one has the shape {self.shape}.")
        (n0, n1), (d0, d1), (o0, o1) = self.shape, self.spacing, self.origin
        return (o1 - d1 / 2, o1 + (n1 - 0.5) * d1, o0 + (n0 - 0.5) * d0, o0 - d0 / 2)

    def with_shape(self, shape: tuple[int, ...], origin: tuple[float, ...] | None = None) -> Grid:
        """The same sampling with another number of samples (and, if given, another origin)."""
        return replace(self, shape=tuple(shape), origin=self.origin if origin is None else tuple(origin))

    def crop(self, window: tuple[slice, ...]) -> Grid:
        """The grid of `field[..., window]`; slices with a step are not accepted."""
        bounds = [s.indices(n) for s, n in zip(window, self.shape, strict=True)]
        if any(step != 1 for _, _, step in bounds):
            raise ValueError("Grid.crop takes slices without a step; resample the field and make a new Grid instead.")
        origin = tuple(o + d * b[0] for o, d, b in zip(self.origin, self.spacing, bounds, strict=True))
        return replace(self, shape=tuple(b[1] - b[0] for b in bounds), origin=origin)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON and NetCDF attributes."""
        return {k: list(v) for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Grid:
        """The inverse of `to_dict`."""
        return cls(**{k: tuple(v) for k, v in values.items()})


def check_same_grid(first: Grid | None, second: Grid | None, first_name: str, second_name: str) -> None:
    """Raise a ValueError that shows both grids when they differ; a missing grid agrees with everything.

    Spacing and origin are compared to one part in 10^6 of the spacing.
    """
    if first is None or second is None:
        return
    near = all(
        abs(a - b) <= 1e-6 * abs(s)
        for pair in ("spacing", "origin")
        for a, b, s in zip(getattr(first, pair), getattr(second, pair), first.spacing, strict=False)
    )
    same = first.shape == second.shape and near
    same = same and all(getattr(first, n) == getattr(second, n) for n in ("axes", "units", "channels", "channel_units"))
    if not same:
        raise ValueError(
            f"{first_name} lives on {first} but {second_name} on {second}; resample one, or restate its grid, so that both agree."
        )
