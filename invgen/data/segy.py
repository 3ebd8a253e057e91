"""SEG-Y files in and out: lines and cubes, headers kept byte for byte, what is missing masked and counted.

section = read_segy("line.sgy")                      # data (1, nt, nx), grid, mask, counts
section = section.window(t=(0.4, 1.2))               # samples, traces and headers cut together
write_segy("mean.sgy", mean, like=section)           # the input's headers, other samples
export_segy(posterior, "out", like=section)          # mean, sd and samples
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from invgen.checkpoints import atomic
from invgen.data._segy_bytes import FORMATS, NAMES, Headers, need_segyio, read_headers
from invgen.data._segy_layout import Lateral, lateral, vertical
from invgen.data._segy_new import new_headers
from invgen.data._segy_window import counted, cut_headers, cut_lateral, window_slices
from invgen.grid import Grid

if TYPE_CHECKING:
    from invgen.posterior import Posterior

__all__ = ["Section", "export_segy", "read_segy", "write_segy"]

Array = np.ndarray
CODES = {"ibm": 1, "ieee": 5}


@dataclass(frozen=True, eq=False)
class Section:
    """A line or a cube of a SEG-Y file.

    Attributes:
        data: `(1, nt, nx)`, or `(1, nt, inlines, crosslines)`: channel, vertical axis, then as named; float32 (float64 for
            8-byte samples). 0 where the mask is False.
        grid: axes ("t" or "z", "x") or ("t" or "z", "inline", "crossline"), spacing, start and units as the headers say;
            lateral units are "trace" where the headers have no usable coordinates.
        mask: boolean, like data: False in dead traces, at samples that are not finite, and where a cube has no trace.
        counts: traces, dead_traces, nan_traces, nan_samples, missing, duplicates.
        headers: as bytes. lateral: places of the traces, their numbers and scaled coordinates.
        notes: what was assumed or looked odd, one sentence each.
    """

    data: Tensor
    grid: Grid
    mask: Tensor
    counts: dict[str, int]
    headers: Headers
    lateral: Lateral
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The textual header."""
        return self.headers.text

    @property
    def format(self) -> str:
        """Name of the sample format."""
        return NAMES[self.headers.format]

    @property
    def coordinates(self) -> Array | None:
        """`(traces, 2)` coordinates of the traces in the order of the file, scaled, or None."""
        return self.lateral.xy

    @property
    def numbers(self) -> tuple[Array, ...]:
        """Numbers along the lateral axes: CDP of a line; inlines and crosslines of a cube."""
        return self.lateral.labels

    @property
    def remarks(self) -> str:
        """What was masked, missing, duplicated or assumed, "" where there is nothing to say."""
        return _report(self.counts, self.notes)

    def window(self, **ranges: Sequence[float]) -> Section:
        """The part between coordinates, headers included: `write_segy(…, like=section.window(t=(0.4, 1.2)))`.

        Args:
            ranges: axis -> (first, last) in the units of the grid, both included; axes left out stay whole. Lateral
                coordinates are distances from the first trace of the file (`grid.coordinates`).

        Returns:
            `Section` whose headers have the new number of samples and start; numbers and coordinates of the traces that
            are left stay what they are, so that the file read back starts at x = 0 again.

        Raises:
            ValueError: an axis that the section has not, a window out of it or without samples, a start that is not a
                whole number of ms where the headers need one.
        """
        rows, *lateral_window = cut = window_slices(self.grid, ranges)
        places, kept = cut_lateral(self.lateral, lateral_window)
        grid = self.grid.crop(cut)
        domain = "time" if grid.axes[0] == "t" else "depth"
        headers = cut_headers(self.headers, kept, grid.shape[0], grid.origin[0] if rows.start else None, domain)
        mask = self.mask[(slice(None), *cut)].clone()
        counts = counted(self.counts, mask[0].numpy(), kept, places)
        return Section(self.data[(slice(None), *cut)].clone(), grid, mask, counts, headers, places, self.notes)

    def __repr__(self) -> str:
        step = ", ".join(f"{d:g} {u}" for d, u in zip(self.grid.spacing, self.grid.units, strict=True))
        odd = ", ".join(f"{v} {k.replace('_', ' ')}" for k, v in self.counts.items() if v and k != "traces")
        return f"Section({' × '.join(map(str, self.grid.shape))}, {step}, {self.format}{', ' + odd if odd else ''})"


def read_segy(
    path: str | Path,
    *,
    domain: str = "time",
    dims: int | None = None,
    dt: float | None = None,
    inline: int = 189,
    crossline: int = 193,
    channel: str = "amplitude",
) -> Section:
    """Read a SEG-Y file.

    Args:
        path: revision 0, 1 or 2, big- or little-endian; samples IBM, IEEE (4 or 8 bytes) or integers.
        domain: "time" (intervals in µs, starts in ms, as the standard) or "depth" (both in m or ft, intervals times 1000).
        dims: 2 for a line in the order of the file, 3 for a cube by inline and crossline number; found from the numbers
            when omitted.
        dt: sampling interval in s (m or ft in depth), where the headers are wrong or silent.
        inline, crossline: bytes of their numbers in the trace headers, counted from 1.
        channel: name of the channel in the grid.

    Returns:
        `Section`. Of traces at one place of a cube the first is taken, places without a trace are masked.

    Raises:
        ImportError: segyio is missing. FileNotFoundError: no such file.
        ValueError: a truncated file, traces of different lengths or starts, contradicting sampling intervals, numbers that
            make neither line nor cube.

    A `UserWarning` says what was masked, missing, duplicated or assumed. The samples are read through a memory map and
    held in memory once.
    """
    segyio = need_segyio()
    if domain not in ("time", "depth"):
        raise ValueError(f'domain must be "time" or "depth", got {domain!r}.')
    if dims not in (None, 2, 3):
        raise ValueError(f"dims must be 2 (a line) or 3 (a cube), got {dims!r}.")
    path = Path(path)
    headers = read_headers(path)
    step, start, unit, notes = vertical(headers, str(path), domain, dt)
    places = lateral(headers, str(path), dims, inline, crossline)
    with segyio.open(str(path), "r", ignore_geometry=True, endian=headers.endian) as file:
        file.mmap()
        traces = file.trace.raw[:]
    traces = traces if traces.dtype == np.float64 else traces.astype(np.float32, copy=False)
    finite = np.isfinite(traces)
    dead = (traces == 0).all(1)
    values, seen = _place(np.where(finite, traces, 0), places), _place(finite & ~dead[:, None], places)
    axes = ("t" if domain == "time" else "z", *(("x",) if len(places.shape) == 1 else ("inline", "crossline")))
    grid = Grid(
        values.shape,
        (step, *places.spacing),
        (start, *(0.0,) * len(places.shape)),
        axes,
        (unit, *(places.unit,) * len(places.shape)),
        (channel,),
    )
    counts = {
        "traces": len(traces),
        "dead_traces": int(dead.sum()),
        "nan_traces": int((~finite).any(1).sum()),
        "nan_samples": int((~finite).sum()),
        "missing": places.missing,
        "duplicates": places.duplicates,
    }
    section = Section(
        torch.from_numpy(values)[None],
        grid,
        torch.from_numpy(seen)[None],
        counts,
        headers,
        places,
        (*notes, *places.notes),
    )
    if section.remarks:
        warnings.warn(f"{path}: {section.remarks}.", stacklevel=2)
    return section


def _report(counts: dict[str, int], notes: tuple[str, ...]) -> str:
    n = counts["traces"]
    parts = [f"{counts['dead_traces']} of {n} traces are dead and masked"] if counts["dead_traces"] else []
    if counts["nan_samples"]:
        parts.append(f"{counts['nan_samples']} samples in {counts['nan_traces']} traces are not finite and masked")
    if counts["missing"]:
        parts.append(f"{counts['missing']} places of the cube have no trace and are masked")
    if counts["duplicates"]:
        parts.append(f"{counts['duplicates']} traces lie where another one does already")
    return "; ".join([*parts, *notes])


def _place(traces: Array, places: Lateral) -> Array:
    """`(n, nt)` in the order of the file to `(nt, *lateral)`, zeros where there is none, the first of several."""
    out = np.zeros((int(np.prod(places.shape)), traces.shape[1]), traces.dtype)
    out[places.cells[::-1]] = traces[::-1]
    return np.ascontiguousarray(np.moveaxis(out.reshape(*places.shape, -1), -1, 0))


def write_segy(
    path: str | Path,
    array: Tensor | Array,
    *,
    like: Section | str | Path | None = None,
    dt: float | None = None,
    format: str | None = None,
    grid: Grid | None = None,
    domain: str = "time",
    text: str = "",
) -> Path:
    """Write a SEG-Y file, with another file's headers or with new ones.

    Args:
        path: file to write; its folder is created, an old file replaced only when all is written.
        array: `(nt, nx)` or `(nt, inlines, crosslines)`, with or without one channel in front.
        like: a section, or the file of one: every header, textual, binary and of traces, is written as it is there, and
            so are the order of the traces and the sample format (IEEE where that is an integer). Places of a cube
            without a trace are left out.
        dt: without like and grid: sampling interval in s (in m in depth).
        format: "ieee" (bit-exact in single precision) or "ibm" (24 bits, at least 21 of them significant).
        grid: without like: spacings and start; sources of CDP coordinates.
        domain: without like: "time" or "depth".
        text: first line of a new textual header.

    Raises:
        ImportError: segyio is missing. OSError: the folder cannot be written to.
        ValueError: a shape that is not that of `like`, values the format has not (NaN in IBM), an interval that no
            header can hold.
    """
    segyio = need_segyio()
    path = Path(path)
    values = _plain(array)
    if format is not None and format not in CODES:
        raise ValueError(f'format must be "ieee" or "ibm", got {format!r}.')
    if like is None:
        headers, places = new_headers(
            values.shape, dt=dt, grid=grid, domain=domain, code=CODES[format or "ieee"], text=text
        )
    else:
        if dt is not None or grid is not None:
            raise ValueError("write_segy(like=…) takes sampling and geometry from there; leave dt and grid out.")
        section = like if isinstance(like, Section) else _quietly(like)
        headers, places = section.headers, section.lateral
        if values.shape != section.grid.shape:
            raise ValueError(
                f"The array {values.shape} has not the shape of the section it is written like, {section.grid.shape} {section.grid.axes}; crop or transpose it."
            )
    code = CODES[format] if format else headers.format if headers.format in (1, 5, 6) else 5
    traces = np.moveaxis(values, 0, -1).reshape(-1, values.shape[0])[places.cells]
    traces = np.ascontiguousarray(traces, np.float64 if code == 6 else np.float32)
    if code == 1 and not np.isfinite(traces).all():
        raise ValueError(
            f"{int((~np.isfinite(traces)).sum())} values are NaN or infinite, which IBM floats have not; replace them or write format='ieee'."
        )
    head = bytearray(headers.head)
    head[3224:3226] = code.to_bytes(2, headers.endian)
    step = 240 + traces.shape[1] * FORMATS[code]
    try:
        with atomic(path) as partial:
            with partial.open("wb") as file:
                file.write(head)
                file.truncate(len(head) + len(traces) * step)
            raw = np.memmap(partial, np.uint8, "r+", offset=len(head), shape=(len(traces), step))
            raw[:, :240] = headers.traces
            raw.flush()
            del raw
            with segyio.open(str(partial), "r+", ignore_geometry=True, endian=headers.endian) as file:
                file.mmap()
                file.trace = traces
    except OSError as error:
        raise OSError(
            f"Cannot write {path}: {error.strerror or error}; choose a folder that can be written to."
        ) from error
    return path


def _plain(array: Tensor | Array) -> Array:
    """Vertical axis first, without the channel."""
    values = array.detach().cpu().numpy() if isinstance(array, Tensor) else np.asarray(array)
    if values.dtype.kind not in "fiu":
        raise ValueError(f"SEG-Y holds real numbers, got values of type {values.dtype}.")
    if values.ndim in (3, 4) and values.shape[0] == 1:
        values = values[0]
    if values.ndim not in (2, 3) or not values.size:
        raise ValueError(
            f"SEG-Y takes (nt, nx) or (nt, inlines, crosslines), with one channel in front or without, got {values.shape}; write channels one by one."
        )
    return values


def _quietly(path: str | Path) -> Section:
    """The section of a file that was read, and warned about, before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return read_segy(path)


def export_segy(
    posterior: Posterior,
    folder: str | Path,
    *,
    like: Section | str | Path,
    samples: int | None = None,
    format: str | None = None,
) -> dict[str, Path]:
    """Write mean, standard deviation and samples of a posterior as SEG-Y files with the headers of its input.

    Args:
        posterior: of models `(channels, nt, nx)` or `(channels, nt, inlines, crosslines)` on the section's grid.
        folder: where `mean.sgy`, `sd.sgy` and `sample_000.sgy` … go; `_CHANNEL` and `obs0_` are added where there are
            several channels or observations.
        like: the section that was inverted, or its file.
        samples: how many samples at the most; all with weight when omitted.
        format: as in `write_segy`; that of the input when omitted.

    Returns:
        What was written, name -> path. A point estimate has neither sd nor samples: its mean is the estimate.

    Raises:
        ValueError: models of another shape than the section.
    """
    section = like if isinstance(like, Section) else _quietly(like)
    if tuple(posterior.shape[1:]) != section.grid.shape:
        raise ValueError(
            f"The posterior's models {posterior.shape} are not (channels, {', '.join(map(str, section.grid.shape))}), the grid of the section they are written like; crop the section or pass the right one."
        )
    fields: dict[str, Tensor] = {"mean": posterior.mean()}
    draws, weights = posterior.flat()
    count = draws.shape[1]
    if posterior.kind != "point" and count > 1:
        fields["sd"] = posterior.std()
    written: dict[str, Path] = {}
    names = posterior.grid.channels if posterior.grid is not None else tuple(map(str, range(posterior.shape[0])))

    def put(name: str, models: Tensor) -> None:
        for c in range(posterior.shape[0]):
            full = f"{name}_{names[c]}" if posterior.shape[0] > 1 else name
            written[full] = write_segy(Path(folder) / f"{full}.sgy", models[c], like=section, format=format)

    for o in range(posterior.n_obs):
        lead = f"obs{o}_" if posterior.n_obs > 1 else ""
        for name, field in fields.items():
            put(lead + name, field[o])
        if posterior.kind != "point":
            heavy = [k for k in range(count) if float(weights[o, k]) > 0]
            for n, k in enumerate(heavy[:samples]):
                put(f"{lead}sample_{n:03d}", draws[o, k])
    return written
