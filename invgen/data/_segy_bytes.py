"""The bytes of a SEG-Y file: its headers as they are, its layout checked before anything is read.

Headers are kept and written back as raw bytes, so that what no standard names survives too. Offsets count from 0, the
standard's byte numbers from 1. References: SEG-Y revision 1 (2002) and 2 (2017), SEG Technical Standards Committee.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

__all__ = ["FORMATS", "NAMES", "Endian", "Headers", "need_segyio", "read_headers"]

Array = np.ndarray

Endian = Literal["big", "little"]
ENDIANS: tuple[Endian, ...] = ("big", "little")
FORMATS = {1: 4, 2: 4, 3: 2, 5: 4, 6: 8, 8: 1}  # code -> bytes a sample
NAMES = {
    1: "4-byte IBM float",
    2: "4-byte integer",
    3: "2-byte integer",
    5: "4-byte IEEE float",
    6: "8-byte IEEE float",
    8: "1-byte integer",
}
SIZES = {"scalar": 2, "units": 2, "delay": 2, "samples": 2, "interval": 2, "time_scalar": 2}
# byte numbers of the standard
TRACE = {
    "cdp": 21,
    "scalar": 71,
    "source_x": 73,
    "source_y": 77,
    "group_x": 81,
    "group_y": 85,
    "units": 89,
    "delay": 109,
    "samples": 115,
    "interval": 117,
    "cdp_x": 181,
    "cdp_y": 185,
    "inline": 189,
    "crossline": 193,
    "time_scalar": 215,
}
BINARY = {"interval": 3217, "samples": 3221, "format": 3225, "measurement": 3255, "extended": 3505}


def need_segyio() -> Any:
    """The library segyio.

    Raises:
        ImportError: it is not installed; the sentence names the extra.
    """
    try:
        import segyio
    except ImportError as error:
        raise ImportError(
            "SEG-Y files need the library segyio; install the extra `seismic`: pip install 'invgen[seismic]'."
        ) from error
    return segyio


@dataclass(frozen=True, eq=False)
class Headers:
    """Headers of a SEG-Y file as bytes.

    Attributes:
        head: textual header, binary header and extended textual headers. traces: `(n, 240)` unsigned bytes.
        format: sample format code. endian: "big" or "little". samples: samples a trace.
    """

    head: bytes
    traces: Array
    format: int
    endian: Endian
    samples: int

    @property
    def text(self) -> str:
        """The textual header, 40 lines of 80 characters."""
        raw = self.head[:3200]
        text = raw.decode("cp037" if raw[:1] in (b"\xc3", b"\x40", b"\x83") else "latin-1")
        return "\n".join(text[i : i + 80].rstrip() for i in range(0, 3200, 80))

    def binary(self, name: str) -> int:
        """A field of the binary header."""
        at = BINARY[name] - 1
        return int(np.frombuffer(self.head, self._type(2, name in ("interval", "samples")), 1, at)[0])

    def field(self, name: str | int, size: int = 4) -> Array:
        """A field of all trace headers, `(n,)` int64, by name or by the standard's byte number."""
        at = (TRACE[name] if isinstance(name, str) else name) - 1
        size = SIZES.get(name, 4) if isinstance(name, str) else size
        raw = np.ascontiguousarray(self.traces[:, at : at + size])
        kind = self._type(size, name in ("interval", "samples"))
        return raw.view(kind)[:, 0].astype(np.int64)

    def _type(self, size: int, unsigned: bool) -> str:
        return f"{'>' if self.endian == 'big' else '<'}{'u' if unsigned else 'i'}{size}"


def read_headers(path: Path) -> Headers:
    """Headers of a file, its length checked against them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not SEG-Y, a format of samples that is not read, a truncated file, traces of different lengths.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; check the path.")
    size = path.stat().st_size
    if size < 3600 + 240:
        raise ValueError(
            f"{path} has {size} bytes, less than the headers of a SEG-Y file (3600) and one trace; it is truncated or no SEG-Y file."
        )
    with path.open("rb") as file:
        head = file.read(3600)
        codes = {e: int.from_bytes(head[3224:3226], e) for e in ENDIANS}
        endian = next((e for e, c in codes.items() if c in FORMATS), None)
        if endian is None:
            raise ValueError(
                f"{path} gives the sample format {codes['big']}, known are {', '.join(f'{k} ({v})' for k, v in NAMES.items())}; it is no SEG-Y file, or convert it first."
            )
        first = Headers(head, np.zeros((0, 240), np.uint8), codes[endian], endian, 0)
        extended = first.binary("extended")
        if extended < 0:
            raise ValueError(
                f"{path} has a variable number of extended textual headers, which is not read; rewrite it with a fixed number."
            )
        head += file.read(3200 * extended)
    samples = first.binary("samples")
    data = np.memmap(path, np.uint8, "r", offset=len(head)) if size > len(head) else np.zeros(0, np.uint8)
    if samples == 0 and len(data) >= 240:  # some writers leave it to the traces
        samples = int(Headers(head, np.array(data[None, :240]), codes[endian], endian, 0).field("samples")[0])
    if samples == 0:
        raise ValueError(f"{path} does not say how many samples a trace has; repair its binary header (byte 3221).")
    length = 240 + samples * FORMATS[codes[endian]]
    whole, rest = divmod(len(data), length)
    traces = np.array(data[: whole * length].reshape(whole, length)[:, :240])
    headers = Headers(head, traces, codes[endian], endian, samples)
    stated = headers.field("samples")
    odd = np.flatnonzero((stated != samples) & (stated != 0))
    if len(odd):
        raise ValueError(
            f"{path} has traces of different lengths: the binary header says {samples} samples, the header of trace {odd[0] + 1} {stated[odd[0]]}; cut or pad them to one length first."
        )
    if rest or not whole:
        raise ValueError(
            f"{path} holds {whole} traces of {samples} samples and {rest} bytes more, of the {length} of a trace; it is truncated, or its traces differ in length."
        )
    return headers
