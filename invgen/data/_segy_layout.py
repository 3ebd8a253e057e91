"""Which trace of a SEG-Y file lies where: lines and cubes, scaled coordinates, sampling."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from invgen.data._segy_bytes import Headers

__all__ = ["Lateral", "coordinates", "lateral", "vertical"]

Array = np.ndarray

ANGLES = {2: "seconds of arc", 3: "decimal degrees", 4: "degrees, minutes, seconds"}


@dataclass(frozen=True, eq=False)
class Lateral:
    """Places of the traces.

    Attributes:
        shape: `(nx,)` or `(inlines, crosslines)`. spacing, unit: of its axes.
        cells: `(n,)` flat place of every trace. labels: numbers along each axis (CDP; inline and crossline).
        xy: `(n, 2)` scaled coordinates, or None. duplicates, missing: counts. notes: what a reader should know.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    unit: str
    cells: Array
    labels: tuple[Array, ...]
    xy: Array | None
    duplicates: int
    missing: int
    notes: tuple[str, ...]


def vertical(headers: Headers, where: str, domain: str, step: float | None) -> tuple[float, float, str, list[str]]:
    """Spacing, origin and unit of the vertical axis, and notes.

    Time: microseconds and milliseconds of the headers become seconds. Depth: thousandths of the unit of length, as usual.
    """
    notes = []
    unit = "s" if domain == "time" else "ft" if headers.binary("measurement") == 2 else "m"
    scale = 1e-6 if domain == "time" else 1e-3
    named = {headers.binary("interval"), *np.unique(headers.field("interval")).tolist()} - {0}
    if step is None:
        if not named:
            raise ValueError(f"{where} does not state its sampling interval; pass dt= (in {unit}).")
        if len(named) > 1:
            raise ValueError(
                f"{where} states several sampling intervals, {', '.join(f'{v * scale:g} {unit}' for v in sorted(named))}; pass dt= (in {unit}) to say which is right."
            )
        step = named.pop() * scale
        if domain == "time" and not 5e-5 <= step <= 0.1:
            notes.append(
                f"the sampling interval is {step:g} s, unusual for seismic data; if its headers are wrong pass dt="
            )
    elif not step > 0:
        raise ValueError(f"The sampling interval dt must be positive, got {step}.")
    elif any(abs(v * scale - step) > 1e-3 * step for v in named):
        notes.append(
            f"its headers state {', '.join(f'{v * scale:g}' for v in sorted(named))} {unit}, overruled by dt={step:g}"
        )
    delay = headers.field("delay").astype(float) * _factors(headers.field("time_scalar"))
    if np.ptp(delay) > 0:
        raise ValueError(
            f"Traces of {where} start at different times, {delay.min():g} to {delay.max():g} ms; shift them to one start first."
        )
    origin = float(delay[0]) * 1e-3 if domain == "time" else float(delay[0])
    return step, origin, unit, notes


def _factors(scalar: Array) -> Array:
    """Multipliers of a scalar field: positive multiplies, negative divides, 0 counts as 1."""
    s = scalar.astype(float)
    return np.where(s > 0, s, np.where(s < 0, 1 / np.where(s < 0, -s, 1.0), 1.0))


def coordinates(headers: Headers) -> tuple[Array | None, str, list[str]]:
    """Scaled `(n, 2)` coordinates (of the CDP, or the midpoints of source and receiver), their unit, and notes."""
    notes = []
    raw = [headers.field(n) for n in ("cdp_x", "cdp_y")]
    if not any(v.any() for v in raw):
        raw = [(headers.field(f"source_{a}") + headers.field(f"group_{a}")) / 2 for a in "xy"]
        if any(v.any() for v in raw):
            notes.append("it has no CDP coordinates, midpoints of source and receiver are taken")
    if not any(v.any() for v in raw):
        return None, "trace", notes
    codes = set(np.unique(headers.field("units")).tolist()) & set(ANGLES)
    if codes:
        notes.append(
            f"its coordinates are angles ({', '.join(ANGLES[c] for c in sorted(codes))}), spacings are in traces"
        )
        return None, "trace", notes
    scalar = headers.field("scalar")
    if (scalar == 0).any():
        notes.append(f"the coordinate scalar of {int((scalar == 0).sum())} traces is 0 and taken as 1")
    if len(np.unique(scalar)) > 1:
        notes.append(
            f"its traces have {len(np.unique(scalar))} different coordinate scalars, each applied to its trace"
        )
    unit = "ft" if headers.binary("measurement") == 2 else "m"
    return np.stack(raw, 1) * _factors(scalar)[:, None], unit, notes


def lateral(headers: Headers, where: str, dims: int | None, inline: int, crossline: int) -> Lateral:
    """Places of the traces: a line in the order of the file, or a cube by inline and crossline numbers."""
    xy, unit, notes = coordinates(headers)
    i, j = headers.field(inline), headers.field(crossline)
    if dims is None:
        ni, nj = len(np.unique(i)), len(np.unique(j))
        dims = 3 if ni > 1 and nj > 1 and (ni < len(i) or nj < len(j)) else 2
    if dims == 3:
        return _cube(where, i, j, xy, unit, notes)
    n = len(i)
    labels = headers.field("cdp") if headers.field("cdp").any() else np.arange(1, n + 1)
    spacing, same = 1.0, 0
    if xy is not None and n > 1:
        steps = np.linalg.norm(np.diff(xy, axis=0), axis=1)
        same = int((steps == 0).sum())
        spacing = float(np.median(steps))
        if spacing == 0:
            notes.append("most of its traces share a position, the spacing is in traces")
            spacing, unit = 1.0, "trace"
        elif np.abs(steps - spacing).max() > 0.01 * spacing:
            notes.append(
                f"its traces are {steps.min():.6g} to {steps.max():.6g} {unit} apart, the grid has the median, {spacing:.6g}"
            )
    else:
        unit = "trace"
    return Lateral((n,), (spacing,), unit, np.arange(n), (labels,), xy, same, 0, tuple(notes))


def _numbers(values: Array, where: str, name: str) -> Array:
    """Regular numbers that hold all values."""
    found = np.unique(values)
    if len(found) == 1:
        return found
    step = int(np.gcd.reduce(np.diff(found)))
    if (found[-1] - found[0]) // step + 1 > 20 * len(found):
        raise ValueError(
            f"{where} has the {name} numbers {found[0]} to {found[-1]} but only {len(found)} of them; pass the header bytes of inline and crossline, or dims=2 for a line."
        )
    return np.arange(found[0], found[-1] + 1, step)


def _cube(where: str, i: Array, j: Array, xy: Array | None, unit: str, notes: list[str]) -> Lateral:
    inlines, crosslines = _numbers(i, where, "inline"), _numbers(j, where, "crossline")
    shape = (len(inlines), len(crosslines))
    a, b = np.searchsorted(inlines, i), np.searchsorted(crosslines, j)
    cells = np.ravel_multi_index((a, b), shape)
    filled = len(np.unique(cells))
    total = shape[0] * shape[1]
    if filled * 10 < total:
        raise ValueError(
            f"The {len(cells)} traces of {where} fill {filled} of {total} places of inlines × crosslines; pass the header bytes of inline and crossline, or dims=2 for a line."
        )
    spacing = (1.0, 1.0)
    if xy is not None:
        design = np.stack([np.ones(len(a)), a, b], 1)
        fit, *_ = np.linalg.lstsq(design, xy, rcond=None)
        lengths = np.linalg.norm(fit[1:], axis=1)
        off = float(np.abs(xy - design @ fit).max())
        if min(lengths[k] for k in range(2) if shape[k] > 1) == 0:
            notes.append("its coordinates do not change along an axis, spacings are in traces")
            unit = "trace"
        else:
            first, second = (float(v) if v > 0 else 1.0 for v in lengths)
            spacing = (first, second)
            if off > 0.05 * min(v for v in lengths if v > 0):
                notes.append(f"its coordinates are up to {off:.3g} {unit} off a regular grid")
    else:
        unit = "trace"
    return Lateral(
        shape,
        spacing,
        unit,
        cells,
        (inlines, crosslines),
        xy,
        len(cells) - filled,
        total - filled,
        tuple(notes),
    )
