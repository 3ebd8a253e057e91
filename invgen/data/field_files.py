"""Fields from files of any format, axes in the order of the package, what is not finite masked and counted.

field = read_field("impedance.h5:/model", axes="xz", spacing={"z": 5.0, "x": 12.5}, units={"z": "m", "x": "m"})
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invgen.data.io import read_array
from invgen.grid import Grid

__all__ = ["Field", "read_field"]

ORDER = "tzyx"  # of the spatial axes: vertical first


@dataclass(frozen=True, eq=False)
class Field:
    """A field `(channels, *spatial)` of a file.

    Attributes:
        values: `(channels, *spatial)`, 0 where the mask is False. mask: boolean, True where the file has a value.
        grid: None where the file does not know its sampling and none was given.
        counts: `not_finite`, or those of `read_segy`.
        source: the `Section` of a SEG-Y file, else None.
    """

    values: Tensor
    mask: Tensor
    grid: Grid | None
    counts: dict[str, int]
    source: Any = None


def read_field(
    path: str | Path,
    axes: str | None = None,
    *,
    key: str | None = None,
    spacing: Mapping[str, float] | None = None,
    origin: Mapping[str, float] | None = None,
    units: Mapping[str, str] | None = None,
    channels: tuple[str, ...] | None = None,
    **options: Any,
) -> Field:
    """Read a field, its axes brought into the order channel, vertical, lateral.

    Args:
        path: .npy, .npz (`FILE.npz:name`), HDF5 (`FILE.h5:/path`), zarr (`FOLDER.zarr:/path`), or SEG-Y (.sgy, .segy).
        axes: one letter for each axis of the array as it lies in the file: c channel, t time, z depth, y, x; "xt" is an
            array `(nx, nt)`. Required but for SEG-Y, which knows its axes.
        key: array of a file with several, as after the colon.
        spacing: axis -> distance of samples, for every spatial axis or for none (then there is no grid).
        origin: axis -> first coordinate, 0 when omitted. units: axis -> unit, "" when omitted.
        channels: their names.
        options: for SEG-Y, those of `read_segy`.

    Returns:
        `Field`; floating values keep their precision, others become float32 (float64 for integers beyond 2²⁴).

    Raises:
        FileNotFoundError, ImportError, ValueError: as `read_array` and `read_segy`; axes that do not match the array.
    """
    name = str(path)
    if Path(name).suffix.lower() in (".sgy", ".segy"):
        given = {"axes": axes, "key": key, "spacing": spacing, "origin": origin, "units": units}
        wrong = [k for k, v in given.items() if v is not None]
        if wrong:
            raise ValueError(
                f"{name} knows its axes and sampling from its headers; leave {', '.join(wrong)} out (dt= and domain= correct the vertical axis)."
            )
        return _from_segy(name, channels, options)
    if options:
        raise ValueError(f"{', '.join(sorted(options))} belong to SEG-Y files, {name} is none; leave them out.")
    array = read_array(path, key)
    if axes is None:
        raise ValueError(
            f"{name} holds an array {array.shape} whose axes are not known; pass axes=, one letter each of c, t, z, y, x, as they lie in the file."
        )
    spatial = _check_axes(name, axes, array.shape)
    order = [axes.index(a) for a in (("c" if "c" in axes else "") + spatial)]
    values = np.ascontiguousarray(np.transpose(array, order))
    values = values if "c" in axes else values[None]
    if values.dtype.kind in "biu":
        wide = values.size and float(np.abs(values.astype(np.float64)).max()) > 2**24
        values = values.astype(np.float64 if wide else np.float32)
    finite = np.isfinite(values)
    bad = int((~finite).sum())
    if bad:
        warnings.warn(f"{name}: {bad} of {values.size} values are not finite and masked.", stacklevel=2)
        values = np.where(finite, values, np.zeros((), values.dtype))
    grid = _grid(name, spatial, values.shape, spacing, origin, units, channels)
    return Field(torch.from_numpy(values), torch.from_numpy(finite), grid, {"not_finite": bad})


def _from_segy(name: str, channels: tuple[str, ...] | None, options: dict[str, Any]) -> Field:
    from invgen.data.segy import read_segy

    if channels is not None:
        if len(channels) != 1:
            raise ValueError(f"A SEG-Y file is one channel, got the names {channels}.")
        options = {"channel": channels[0], **options}
    section = read_segy(name, **options)
    return Field(section.data, section.mask, section.grid, section.counts, section)


def _check_axes(name: str, axes: str, shape: tuple[int, ...]) -> str:
    """The spatial axes in the package's order."""
    if len(axes) != len(shape) or len(set(axes)) != len(axes) or not set(axes) <= set("c" + ORDER):
        raise ValueError(
            f"axes={axes!r} does not describe the array {shape} of {name}; give one letter each of c, t, z, y, x for its {len(shape)} axes."
        )
    if {"t", "z"} <= set(axes):
        raise ValueError(f"axes={axes!r} has two vertical axes; a field has t (time) or z (depth).")
    return "".join(a for a in ORDER if a in axes)


def _grid(
    name: str,
    spatial: str,
    shape: tuple[int, ...],
    spacing: Mapping[str, float] | None,
    origin: Mapping[str, float] | None,
    units: Mapping[str, str] | None,
    channels: tuple[str, ...] | None,
) -> Grid | None:
    for what, given in (("spacing", spacing), ("origin", origin), ("units", units)):
        strange = set(given or ()) - set(spatial)
        if strange:
            raise ValueError(f"{what} names the axes {sorted(strange)}, {name} has {list(spatial)}.")
    if channels is not None and len(channels) != shape[0]:
        raise ValueError(f"{name} has {shape[0]} channels, got the names {channels}.")
    if spacing is None:
        if origin or units:
            raise ValueError("origin and units need spacing too; pass the distance of samples along every axis.")
        return None
    missing = set(spatial) - set(spacing)
    if missing:
        raise ValueError(f"spacing lacks the axes {sorted(missing)} of {name}; give one for every spatial axis.")
    return Grid(
        shape[1:],
        tuple(float(spacing[a]) for a in spatial),
        tuple(float((origin or {}).get(a, 0.0)) for a in spatial),
        tuple(spatial),
        tuple((units or {}).get(a, "") for a in spatial),
        channels or (("value",) if shape[0] == 1 else tuple(f"channel{i}" for i in range(shape[0]))),
    )
