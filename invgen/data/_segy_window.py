"""Part of a SEG-Y section: samples, traces and their headers cut together, so that the cut section is written back right.

Of the headers only what says how many samples there are and where they start is rewritten; every other byte stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from invgen.data._segy_bytes import BINARY, TRACE, Headers
from invgen.data._segy_layout import Lateral
from invgen.grid import Grid

__all__ = ["counted", "cut_headers", "cut_lateral", "window_slices"]

Array = np.ndarray
FINER = (-10, -100, -1000)  # scalars that divide the times of a trace header
TIMES = slice(94, 114)  # bytes the time scalar applies to, counted from 0
EXTENDED_SAMPLES = slice(3268, 3272)  # revision 2: where it is not 0 it overrules the two-byte number


def window_slices(grid: Grid, ranges: Mapping[str, Sequence[float]]) -> tuple[slice, ...]:
    """The samples of each axis from the first to the last coordinate named, both included.

    Raises:
        ValueError: an axis the grid has not, not two numbers, a window that reaches out of the grid or holds no sample.
    """
    for axis, ends in ranges.items():
        if axis not in grid.axes:
            raise ValueError(f"The window names the axis {axis!r} but the section has {', '.join(grid.axes)}.")
        if len(ends) != 2 or not all(np.isfinite(e) for e in ends) or ends[0] > ends[1]:
            raise ValueError(
                f"The window of the axis {axis} must be two numbers, first and last, got {list(ends)}; write [first, last]."
            )
    out = []
    for i, axis in enumerate(grid.axes):
        x, step = grid.coordinates(i), grid.spacing[i]
        first, last = ranges.get(axis, (x[0], x[-1]))
        # the end of a section of n samples is often given as n · spacing, one sample beyond the last
        if first < x[0] - 0.5 * step or last > x[-1] + 1.001 * step:
            raise ValueError(
                f"The window {first:g} to {last:g} reaches out of the section, which has {axis} from {x[0]:g} to {x[-1]:g} {grid.units[i]}; narrow it."
            )
        kept = np.flatnonzero((x >= first - 1e-3 * step) & (x <= last + 1e-3 * step))
        if not len(kept):
            raise ValueError(
                f"The window {first:g} to {last:g} {grid.units[i]} lies between two samples of the axis {axis}; widen it."
            )
        out.append(slice(int(kept[0]), int(kept[-1]) + 1))
    return tuple(out)


def cut_lateral(places: Lateral, window: Sequence[slice]) -> tuple[Lateral, Array]:
    """Places of the traces inside the window, and which traces of the file they are."""
    index = np.unravel_index(places.cells, places.shape)
    inside = np.ones(len(places.cells), bool)
    for i, s in zip(index, window, strict=True):
        inside &= (i >= s.start) & (i < s.stop)
    kept = np.flatnonzero(inside)
    shape = tuple(s.stop - s.start for s in window)
    if not len(kept):
        raise ValueError(f"The window holds {shape} places of the cube but not one trace; move it.")
    cells = np.ravel_multi_index(tuple(i[kept] - s.start for i, s in zip(index, window, strict=True)), shape)
    filled = len(np.unique(cells))
    total = int(np.prod(shape))
    line = len(shape) == 1
    cut = replace(
        places,
        shape=shape,
        cells=cells,
        labels=tuple(v[s] for v, s in zip(places.labels, window, strict=True)),
        xy=None if places.xy is None else places.xy[kept],
        # along a line duplicates are neighbours at one position, in a cube traces at one place
        duplicates=_repeated(places.xy[kept]) if line and places.xy is not None else len(cells) - filled,
        missing=total - filled,
    )
    return cut, kept


def _repeated(xy: Array) -> int:
    return int((np.abs(np.diff(xy, axis=0)).max(1) == 0).sum()) if len(xy) > 1 else 0


def cut_headers(headers: Headers, kept: Array, samples: int, start: float | None, domain: str) -> Headers:
    """Headers of the kept traces with another number of samples and, unless None, another start (s, or m or ft).

    Raises:
        ValueError: a start that the two bytes of the header cannot hold.
    """
    head, traces = bytearray(headers.head), headers.traces[kept].copy()
    endian = headers.endian
    head[BINARY["samples"] - 1 : BINARY["samples"] + 1] = samples.to_bytes(2, endian)
    if any(head[EXTENDED_SAMPLES]):
        head[EXTENDED_SAMPLES] = samples.to_bytes(4, endian)
    stated = headers.field("samples")[kept] != 0
    _put(traces, TRACE["samples"], np.where(stated, samples, 0), endian)
    if start is not None:
        _put_start(traces, headers, start * (1e3 if domain == "time" else 1.0), kept)
    return Headers(bytes(head), traces, headers.format, endian, samples)


def _put_start(traces: Array, headers: Headers, start: float, kept: Array) -> None:
    """The delay, by the file's own time scalar; by a finer one where no other time of the header depends on it."""
    scalar = headers.field("time_scalar")[kept].astype(float)
    factor = np.where(scalar > 0, scalar, np.where(scalar < 0, -1 / np.where(scalar < 0, scalar, -1.0), 1.0))
    if _fits(start / factor):
        _put(traces, TRACE["delay"], np.round(start / factor), headers.endian)
        return
    others = traces[:, TIMES].copy()
    others[:, 14:16] = 0  # the delay itself
    finer = next((s for s in FINER if _fits(np.array([start * -s]))), None)
    if others.any() or finer is None:
        raise ValueError(
            f"A trace header cannot hold the start {start:g} ms (or units of depth); start the window at a whole number of them."
        )
    _put(traces, TRACE["delay"], np.full(len(traces), round(start * -finer)), headers.endian)
    _put(traces, TRACE["time_scalar"], np.full(len(traces), finer), headers.endian)


def _fits(values: Array) -> bool:
    return bool((np.abs(values - np.round(values)) <= 1e-3).all() and (np.abs(values) <= 32767).all())


def _put(traces: Array, number: int, values: Array, endian: str) -> None:
    """Two bytes of every trace header."""
    order = ">" if endian == "big" else "<"
    traces[:, number - 1 : number + 1] = values.astype(np.int64).astype(f"{order}i2")[:, None].view(np.uint8)


def counted(counts: Mapping[str, int], mask: Array, kept: Array, places: Lateral) -> dict[str, int]:
    """The counts of the section that is left: traces without any sample are dead, others with gaps were not finite."""
    by_place = mask.reshape(len(mask), -1)[:, places.cells]  # (nt, traces)
    dead = ~by_place.any(0)
    gaps = ~by_place & ~dead
    return {
        **counts,
        "traces": len(kept),
        "dead_traces": int(dead.sum()),
        "nan_traces": int(gaps.any(0).sum()),
        "nan_samples": int(gaps.sum()),
        "missing": places.missing,
        "duplicates": places.duplicates,
    }
