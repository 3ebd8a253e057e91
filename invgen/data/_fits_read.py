"""Images in FITS files: which extension, read without executing anything, in the byte order torch reads."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray
ERROR = ("ERR", "ERROR", "RMS", "SIGMA", "NOISE", "NOISE_MAP", "UNCERT", "STD")
VARIANCE = ("VAR", "VARIANCE")
WEIGHT = ("WHT", "WEIGHT", "IVAR", "INVVAR")
MASK = ("DQ", "MASK", "BADPIX")
_EXTENSION = re.compile(r"^(.*?)\[([^\[\]]+)\]$")


class Image(NamedTuple):
    """Pixels `(ny, nx)`, row 0 at the bottom, their unit ("" where the file has none), header and where they came from."""

    pixels: Array
    units: str
    header: Any
    name: str


def need_astropy() -> Any:
    """The library astropy.

    Raises:
        ImportError: it is not installed; the sentence names the extra.
    """
    try:
        import astropy
    except ImportError as error:
        raise ImportError(
            "FITS files need the library astropy; install the extra `lensing`: pip install 'invgen[lensing]'."
        ) from error
    return astropy


def split(source: str | Path, main: Path | None) -> tuple[Path, str | int | None]:
    """`file.fits`, `file.fits[EXT]` or `[EXT]` (of the main file) as file and extension."""
    text, extension = str(source), None
    if found := _EXTENSION.match(text):
        text, inside = found.groups()
        extension = int(inside) if inside.isdigit() else inside
    if not text:
        if main is None:
            raise ValueError(f"{source} names an extension and no file; give FILE[{extension}].")
        return main, extension
    return Path(text), extension


def read_image(source: str | Path, main: Path | None = None, *, preferred: Sequence[str] = ()) -> Image:
    """One image; without an extension the preferred one, or else the first that holds an image.

    Raises:
        FileNotFoundError: no such file. ValueError: not FITS, truncated, no such extension or not an image.
    """
    need_astropy()
    from astropy.io import fits

    path, extension = split(source, main)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; check the path (an extension of it is given as FILE[EXT]).")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with fits.open(path, memmap=False) as hdus:
                names = [h.name or str(k) for k, h in enumerate(hdus)]
                hdu = _pick(hdus, extension, preferred, path, names)
                pixels, header = np.asarray(hdu.data), hdu.header.copy()
                units = str(header.get("BUNIT", hdus[0].header.get("BUNIT", ""))).strip()
                name = f"{path.name}[{hdu.name or hdus.index_of(hdu)}]" if len(hdus) > 1 else path.name
    except (OSError, TypeError, KeyError, IndexError) as error:
        raise ValueError(
            f"{path} is not a complete FITS file ({str(error).strip(chr(34))}); copy or download it again."
        ) from error
    return Image(_plane(pixels, name), units, header, name)


def _pick(hdus: Any, extension: str | int | None, preferred: Sequence[str], path: Path, names: list[str]) -> Any:
    if isinstance(extension, int):
        if extension >= len(hdus):
            raise ValueError(f"{path} has {len(hdus)} extensions (from 0) and not number {extension}.")
        chosen = hdus[extension]
    elif extension is not None:
        found = [h for h in hdus if h.name.upper() == extension.upper()]
        if not found:
            raise ValueError(f"{path} has no extension {extension!r}, it has {', '.join(names)}.")
        chosen = found[0]
    else:
        images = [h for h in hdus if h.is_image and h.data is not None]
        if not images:
            raise ValueError(f"{path} holds no image, only {', '.join(names)}; name the right file.")
        wanted = [h for h in images if h.name.upper() in preferred]
        return (wanted or images)[0]
    if not chosen.is_image or chosen.data is None:
        raise ValueError(f"Extension {extension!r} of {path} holds no image; name one of {', '.join(names)}.")
    return chosen


def _plane(pixels: Array, name: str) -> Array:
    while pixels.ndim > 2 and pixels.shape[0] == 1:
        pixels = pixels[0]
    if pixels.ndim != 2 or pixels.dtype.kind not in "fiub":
        raise ValueError(f"{name} holds an array {pixels.shape} of {pixels.dtype}, an image (ny, nx) is expected.")
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), order="C", copy=False)
    return pixels if pixels.dtype.kind == "f" else pixels.astype(np.float32 if pixels.itemsize < 4 else np.float64)


def listed(path: Path, names: Sequence[str]) -> list[str]:
    """Those extensions of a file that have one of the names, as the file spells them."""
    from astropy.io import fits

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with fits.open(path, memmap=False) as hdus:
            return [h.name for h in hdus if h.name.upper() in names]


def same_unit(first: str, second: str) -> bool:
    """False only where both units can be read and are not the same."""
    if not first or not second or first == second:
        return True
    from astropy import units

    try:
        return bool(units.Unit(first) == units.Unit(second))
    except (ValueError, TypeError):
        return True
