"""Headers of a SEG-Y file made from nothing: revision 1, big-endian, EBCDIC text, CDP coordinates with their scalar."""

from __future__ import annotations

import numpy as np

from invgen.data._segy_bytes import BINARY, SIZES, TRACE, Headers
from invgen.data._segy_layout import Lateral
from invgen.grid import Grid

__all__ = ["new_headers"]

Array = np.ndarray
SCALARS = (1, -10, -100, -1000, -10000)  # a coordinate is the header's number, divided by −scalar


def new_headers(
    shape: tuple[int, ...], *, dt: float | None, grid: Grid | None, domain: str, code: int, text: str
) -> tuple[Headers, Lateral]:
    """Headers and places of a line `(nt, nx)` or a cube `(nt, inlines, crosslines)`, numbered from 1.

    Raises:
        ValueError: neither or both of dt and grid, a grid of another shape, numbers that the headers cannot hold.
    """
    if domain not in ("time", "depth"):
        raise ValueError(f'domain must be "time" or "depth", got {domain!r}.')
    if (dt is None) == (grid is None):
        raise ValueError(
            "A new SEG-Y file needs its sampling: pass dt= (s, or m in depth), grid= or like=, one of them."
        )
    if grid is not None and grid.shape != shape:
        raise ValueError(f"The grid has the shape {grid.shape}, the array {shape}; make them agree.")
    step = grid.spacing[0] if grid is not None else float(dt or 0.0)
    start = grid.origin[0] if grid is not None else 0.0
    interval = _whole(step * (1e6 if domain == "time" else 1e3), 1, 65535, "sampling interval", step, domain)
    delay = _whole(start * (1e3 if domain == "time" else 1.0), -32768, 32767, "start", start, domain)
    if shape[0] > 65535:
        raise ValueError(f"A SEG-Y trace has at most 65535 samples, got {shape[0]}; cut it.")
    places = _places(shape[1:], grid)
    head = bytearray(_text(text, shape, step, domain) + bytes(400))
    for name, value in {
        "interval": interval,
        "samples": shape[0],
        "format": code,
        "measurement": 2 if grid is not None and "ft" in grid.units else 1,
    }.items():
        head[BINARY[name] - 1 : BINARY[name] + 1] = value.to_bytes(2, "big")
    head[3500:3504] = bytes([1, 0, 0, 1])  # revision 1.0, traces of one length
    n = len(places.cells)
    traces = np.zeros((n, 240), np.uint8)
    index = np.unravel_index(np.arange(n), shape[1:])
    fields: dict[str, Array] = {
        "cdp": np.arange(1, n + 1),
        "delay": np.full(n, delay),
        "samples": np.full(n, shape[0]),
        "interval": np.full(n, interval),
        "inline": index[0] + 1 if len(shape) == 3 else np.ones(n, int),
        "crossline": index[-1] + 1,
    }
    if grid is not None:
        along = [o + d * i for o, d, i in zip(grid.origin[1:], grid.spacing[1:], index, strict=True)]
        along = along if len(along) == 2 else [along[0], np.zeros(n)]
        scalar, (x, y) = _scaled(along)
        fields |= {"cdp_x": x, "cdp_y": y, "scalar": np.full(n, scalar), "units": np.ones(n, int)}
    for number, values in ((1, np.arange(1, n + 1)), (5, np.arange(1, n + 1)), (29, np.ones(n, int))):
        _put(traces, number, 2 if number == 29 else 4, values)
    for name, values in fields.items():
        _put(traces, TRACE[name], SIZES.get(name, 4), values)
    return Headers(bytes(head), traces, code, "big", shape[0]), places


def _put(traces: Array, number: int, size: int, values: Array) -> None:
    wide = np.asarray(values, np.int64).astype(f">i{size}")  # unsigned ones wrap to the same bytes
    traces[:, number - 1 : number - 1 + size] = wide[:, None].view(np.uint8)


def _whole(value: float, low: int, high: int, what: str, given: float, domain: str) -> int:
    n = round(value)
    if not low <= n <= high or abs(value - n) > 1e-3:
        unit = (
            ("µs" if what == "sampling interval" else "ms") if domain == "time" else "1/1000" if low == 1 else "units"
        )
        raise ValueError(
            f"A SEG-Y header holds the {what} as a whole number of {unit} from {low} to {high}, got {given:g} ({value:g}); resample or shift the data."
        )
    return n


def _scaled(along: list[Array]) -> tuple[int, tuple[Array, Array]]:
    """The coarsest scalar that keeps the coordinates to 1e-6 of their size, and the numbers.

    Raises:
        ValueError: no scalar does with numbers of four bytes.
    """
    both = np.stack(along)
    for scalar in SCALARS:
        numbers = np.round(both * abs(scalar))
        tolerance = 1e-6 * max(float(np.ptp(both)), 1e-30)
        if np.abs(numbers).max() < 2**31 and np.abs(numbers / abs(scalar) - both).max() <= tolerance:
            return scalar, (numbers[0], numbers[1])
    raise ValueError(
        f"Coordinates up to {np.abs(both).max():g} at this spacing do not fit the four-byte integers of SEG-Y; choose another origin or unit."
    )


def _places(shape: tuple[int, ...], grid: Grid | None) -> Lateral:
    n = int(np.prod(shape))
    spacing = grid.spacing[1:] if grid is not None else (1.0,) * len(shape)
    labels = tuple(np.arange(1, k + 1) for k in shape)
    return Lateral(tuple(shape), tuple(spacing), "m", np.arange(n), labels, None, 0, 0, ())


def _text(first: str, shape: tuple[int, ...], step: float, domain: str) -> bytes:
    axis = f"{step:g} s" if domain == "time" else f"{step:g} units of length"
    what = f"{shape[1]} traces" if len(shape) == 2 else f"{shape[1]} inlines x {shape[2]} crosslines"
    lines = [
        first or "Written by invgen",
        f"{what} of {shape[0]} samples, vertical axis: {domain}, interval {axis}",
        "Inline: bytes 189-192, crossline: bytes 193-196, CDP X and Y: bytes 181-188",
    ]
    page = [f"C{i + 1:2d} {lines[i] if i < len(lines) else ''}"[:80].ljust(80) for i in range(40)]
    page[38], page[39] = "C39 SEG Y REV1".ljust(80), "C40 END TEXTUAL HEADER".ljust(80)
    return "".join(page).encode("cp037", "replace")
