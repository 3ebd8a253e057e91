"""Data of `invgen invert`: files of any format, laid on the section of the first one that knows its axes.

The *frame* is that section: its grid after the window, what was cut, and the SEG-Y headers the results are written with.
Arrays without axes lie on it when their shape says so, whole or cut.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invgen._config import ConfigError
from invgen.data.io import read_array
from invgen.data.segy import Section
from invgen.grid import Grid

__all__ = ["Frame", "Source", "find_frame", "read_mask", "read_source"]

SEGY = (".sgy", ".segy")
OPTIONS = ("axes", "key", "spacing", "origin", "units", "channels", "domain", "dims", "dt", "inline", "crossline")


@dataclass(frozen=True, eq=False)
class Source:
    """One data file as read.

    Attributes:
        name: of the file. values: as in the file, `(channels, *spatial)` where its axes are known.
        mask: False where there is nothing, None where nothing is missing. grid: None for an array without axes.
        section: of a SEG-Y file. remarks: what a reader should know.
    """

    name: str
    values: Tensor
    mask: Tensor | None = None
    grid: Grid | None = None
    section: Section | None = None
    remarks: tuple[str, ...] = ()

    def cut(self, window: Sequence[slice]) -> Source:
        """The part in a window of samples."""
        part: Any = (..., *window)
        mask = None if self.mask is None else self.mask[part].clone()
        grid, section = self.grid, self.section
        if section is not None and grid is not None:
            ends = {a: grid.coordinates(i)[[s.start, s.stop - 1]] for i, (a, s) in enumerate(_named(grid, window))}
            section = section.window(**{a: (float(v[0]), float(v[1])) for a, v in ends.items()})
        return replace(
            self,
            values=self.values[part].clone(),
            mask=mask,
            grid=None if grid is None else grid.crop(tuple(window)),
            section=section,
            remarks=_remarks(self.name, section, mask, self.remarks),
        )


def _named(grid: Grid, window: Sequence[slice]) -> list[tuple[str, slice]]:
    return list(zip(grid.axes, window, strict=True))


def _remarks(name: str, section: Section | None, mask: Tensor | None, others: tuple[str, ...]) -> tuple[str, ...]:
    if section is not None:
        return (f"{name}: {section.remarks}",) if section.remarks else ()
    hidden = 0 if mask is None else int((~mask).sum())
    if hidden and mask is not None:
        return (f"{name}: {hidden} of {mask.numel()} values are not finite and masked",)
    return others if mask is None else ()


def is_segy(path: Any) -> bool:
    """Whether a name is that of a SEG-Y file."""
    return isinstance(path, str) and path.lower().endswith(SEGY)


def read_source(spec: Any, what: str) -> Source:
    """A file by its name, or `{path: NAME, axes: tx, spacing: {…}, …}` with the options of `read_field`.

    Raises:
        ConfigError: neither, or an option that does not exist. As `read_field` and `read_array`.
    """
    path, options = (
        (spec.get("path"), {k: v for k, v in spec.items() if k != "path"}) if _is_mapping(spec) else (spec, {})
    )
    if not isinstance(path, str):
        raise ConfigError(f"The {what} is the name of a file, or a mapping with path and its axes, got {spec!r}.")
    strange = [k for k in options if k not in OPTIONS]
    if strange:
        raise ConfigError(f"The {what} has no option {strange[0]!r}; it takes path, {', '.join(OPTIONS)}.")
    if not is_segy(path) and "axes" not in options:
        if set(options) - {"key"}:
            raise ConfigError(
                f"The options {', '.join(options)} of {path} need its axes: one letter each, as they lie."
            )
        values = torch.from_numpy(read_array(path, options.get("key")))
        return Source(path, values if values.is_floating_point() or values.is_complex() else values.float())
    from invgen.data.field_files import read_field

    if "channels" in options:
        options["channels"] = tuple(options["channels"])
    with warnings.catch_warnings():  # said as remarks, counted inside the window
        warnings.simplefilter("ignore", UserWarning)
        try:
            field = read_field(path, options.pop("axes", None), **options)
        except (TypeError, AttributeError) as error:
            raise ConfigError(f"The options of {path} cannot be used: {error}.") from error
    mask = None if bool(field.mask.all()) else field.mask
    return Source(path, field.values, mask, field.grid, field.source, _remarks(path, field.source, mask, ()))


def _is_mapping(spec: Any) -> bool:
    return isinstance(spec, Mapping)


@dataclass(frozen=True, eq=False)
class Frame:
    """The section that model and data live on.

    Attributes:
        grid: after the window, with the channels of the data. whole: spatial shape of the file. window: what was cut.
        section: with the headers of the part, or None where the file is no SEG-Y. name: of the file.
    """

    grid: Grid
    whole: tuple[int, ...]
    window: tuple[slice, ...]
    section: Section | None
    name: str

    def __str__(self) -> str:
        ends = [(self.grid.coordinates(i)[[0, -1]], u) for i, u in enumerate(self.grid.units)]
        reach = ", ".join(
            f"{a} {e[0]:g} to {e[1]:g} {u}".rstrip() for a, (e, u) in zip(self.grid.axes, ends, strict=True)
        )
        return f"{' × '.join(map(str, self.grid.shape))} samples, {reach}"

    def placed(self, values: Tensor) -> Tensor:
        """An array on the whole section cut like it, a channel in front where it has none; others as they are."""
        n = len(self.whole)
        if values.ndim >= n and tuple(values.shape[-n:]) == self.whole:
            part: Any = (..., *self.window)
            values = values[part]
        if values.ndim == n and tuple(values.shape) == self.grid.shape:
            values = values[None]
        return values.contiguous()

    def lay(self, source: Source) -> Source:
        """Another file cut like the section, where it covers the whole of it.

        Raises:
            ConfigError: the same number of samples but another sampling, start or place.
        """
        if source.grid is None:
            return replace(source, values=self.placed(source.values))
        if source.grid.shape == self.whole and source.grid.shape != self.grid.shape:
            source = source.cut(self.window)
        assert source.grid is not None
        if source.grid.shape == self.grid.shape:
            self._same_place(source.name, source.grid, source.section)
        return source

    def _same_place(self, name: str, grid: Grid, section: Section | None) -> None:
        ours = self.grid
        for i, axis in enumerate(ours.axes):
            if abs(grid.spacing[i] - ours.spacing[i]) > 1e-4 * ours.spacing[i] or grid.units[i] != ours.units[i]:
                raise ConfigError(
                    f"{name} is sampled every {grid.spacing[i]:g} {grid.units[i]} along {axis} but {self.name} every {ours.spacing[i]:g} {ours.units[i]}; resample one of them."
                )
        if abs(grid.origin[0] - ours.origin[0]) > 0.01 * ours.spacing[0]:
            raise ConfigError(
                f"{name} starts at {grid.origin[0]:g} {grid.units[0]} but {self.name} at {ours.origin[0]:g} {ours.units[0]}; cut them to one window."
            )
        there = None if section is None else section.coordinates
        here = None if self.section is None else self.section.coordinates
        if there is not None and here is not None and there.shape == here.shape:
            off = float(np.abs(there - here).max())
            if off > 0.5 * min(ours.spacing[1:]):
                raise ConfigError(f"Traces of {name} and {self.name} lie up to {off:g} apart; cut them to one window.")


def find_frame(sources: Sequence[Source], window: Any) -> Frame | None:
    """The first source with a grid, cut to the window; None where no file knows its axes.

    Raises:
        ConfigError: a window that is no mapping, or that nothing can be cut by. ValueError: a window out of the section.
    """
    from invgen.data._segy_window import window_slices

    if window is not None and not (
        isinstance(window, Mapping) and all(isinstance(v, (list, tuple)) for v in window.values())
    ):
        raise ConfigError(f"The window is a mapping of axes to [first, last], e.g. {{t: [0.4, 1.2]}}, got {window!r}.")
    first = next((s for s in sources if s.grid is not None), None)
    if first is None or first.grid is None:
        if window:
            raise ConfigError(
                "A window needs data whose axes are known: a SEG-Y file, or an array with axes and spacing."
            )
        return None
    try:
        ranges = {str(k): [float(e) for e in v] for k, v in (window or {}).items()}
    except (TypeError, ValueError) as error:
        raise ConfigError(f"The window holds something that is no number: {window!r}.") from error
    slices = window_slices(first.grid, ranges)
    cut = first.cut(slices)
    assert cut.grid is not None
    return Frame(cut.grid, first.grid.shape, slices, cut.section, first.name)


def read_mask(path: Any, frame: Frame | None, shape: tuple[int, ...]) -> Tensor:
    """Booleans, True where measured, from a file of 0 and 1 on the section or of the data's shape.

    Raises:
        ConfigError: other values. As `read_source`.
    """
    source = read_source(path, "mask")
    values = (source if frame is None else frame.lay(source)).values
    if not bool(((values == 0) | (values == 1)).all()):
        raise ConfigError(f"The mask {source.name} holds other values than 0 and 1; 1 (true) means measured.")
    if tuple(values.shape) != shape and values.numel() == int(np.prod(shape)):
        values = values.reshape(shape)  # a well's mask (n,) for data (1, n)
    return values.bool()
