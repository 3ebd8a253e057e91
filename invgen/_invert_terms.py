"""Terms of `invgen invert`: data and operator from a specification, on the section where it is one, and wells."""

from __future__ import annotations

import functools
import operator as arithmetic
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invgen._config import ConfigError, build, is_array_file
from invgen._invert_data import Frame, Source, read_mask, read_source
from invgen.contracts import Operator
from invgen.grid import Grid
from invgen.problem import Term

__all__ = ["as_noise", "check_spec", "make_term", "source_of"]

KEYS = ("data", "model", "well", "operator", "noise", "mask", "name")
WELL = ("file", "position", "first", "last", "path", "channels", "smoothing", "logarithm")


def as_noise(spec: Any) -> Any:
    """A number, or a file with one standard deviation a datum, means Gaussian noise."""
    file = isinstance(spec, str) and is_array_file(spec)
    if file or (isinstance(spec, (int, float)) and not isinstance(spec, bool)):
        return {"class_path": "GaussianNoise", "init_args": {"sigma": spec}}
    return spec


def check_spec(spec: Any) -> None:
    """A mapping with the keys of a term: data or model with an operator, or a well; and noise."""
    if not isinstance(spec, Mapping) or any(k not in KEYS for k in spec):
        raise ConfigError(f"A term is a mapping with the keys {', '.join(KEYS)}, got {spec!r}.")
    given = [k for k in ("data", "model", "well") if spec.get(k) is not None]
    if len(given) > 1:
        raise ConfigError(f"A term has one of data, model and well, got {' and '.join(given)}.")
    needed = ("noise",) if given == ["well"] else ("operator", "noise") if given else ("data", "operator", "noise")
    for name in needed:
        if spec.get(name) is None:
            raise ConfigError(f"A data set needs {name}; give it as --{name} or in the configuration.")
    if given == ["well"] and spec.get("operator") is not None:
        raise ConfigError("A well reads the model along its path and takes no operator; leave it out.")


def source_of(spec: Mapping[str, Any]) -> Source | None:
    """The file of a term, or None for a well."""
    for key in ("data", "model"):
        if spec.get(key) is not None:
            return read_source(spec[key], key)
    return None


def make_term(
    spec: Mapping[str, Any], source: Source | None, frame: Frame | None, grid: Grid | None, allow_import: bool
) -> tuple[Term, tuple[str, ...]]:
    """The term of a specification, and what a reader should know about its data.

    Args:
        spec: as `check_spec` has it. source: its file. frame: the section, or None. grid: of the model on it.
    """
    name = str(spec.get("name", "well" if spec.get("well") is not None else "data"))
    noise = build(as_noise(spec["noise"]), what="noise", allow_import=allow_import)
    if source is None:
        if grid is None:
            raise ConfigError(
                f"The well {name!r} needs a section with axes: SEG-Y data, or an array with axes and spacing."
            )
        physics, data, remarks = _well(spec["well"], grid, name)
        mask = None if spec.get("mask") is None else read_mask(spec["mask"], None, physics.data_shape)
        return Term(data, physics, noise, mask, name), remarks
    parts = spec["operator"] if isinstance(spec["operator"], list) else [spec["operator"]]
    if not parts:
        raise ConfigError("The list of operators is empty; name at least one.")
    on = {} if grid is None else {"shape": grid.field_shape, "model_grid": grid, "grid": grid}
    made = [build(p, what="operator", allow_import=allow_import, defaults=on) for p in parts]
    physics = functools.reduce(arithmetic.matmul, made)
    if not isinstance(physics, Operator):
        raise ConfigError(f"{type(physics).__name__} is not an operator.")
    source = source if frame is None else frame.lay(source)
    data, mask = source.values, source.mask
    if spec.get("model") is not None:
        if mask is not None:
            raise ConfigError(f"The model {source.name} has gaps, and its data with it; fill it first.")
        if tuple(data.shape) != tuple(physics.model_shape):
            raise ConfigError(
                f"The model {source.name} has the shape {tuple(data.shape)} but {type(physics).__name__} acts on {tuple(physics.model_shape)}; cut or resample it."
            )
        data = physics(data.double()[None])
    if spec.get("mask") is not None:
        told = read_mask(spec["mask"], frame, tuple(physics.data_shape))
        mask = told if mask is None or mask.shape != told.shape else mask & told
    return Term(data, physics, noise, mask, name), source.remarks


# --- wells -------------------------------------------------------------------------------------------------------------


def _well(spec: Any, grid: Grid, name: str) -> tuple[Operator, Tensor, tuple[str, ...]]:
    """Operator, data `(channels, points)` and remarks of a well."""
    from invgen.data.io import read_array
    from invgen.operators.well import WellLog

    if not isinstance(spec, Mapping) or any(k not in WELL for k in spec) or not isinstance(spec.get("file"), str):
        raise ConfigError(f"A well is a mapping with file and {', '.join(WELL[1:])}, got {spec!r}.")
    log = _read_log(spec["file"])
    logarithm = bool(spec.get("logarithm", False))
    options = {k: spec[k] for k in ("channels", "smoothing") if spec.get(k) is not None}
    if ("path" in spec) == ("position" in spec):
        raise ConfigError(f"The well {name!r} needs its position on the lateral axes, or the file of its path.")
    if "path" in spec:
        physics = WellLog(grid, read_array(spec["path"]), **options)
        values = _values(log, spec, logarithm)
    else:
        position = spec["position"] if isinstance(spec["position"], list) else [spec["position"]]
        if len(position) != len(grid.shape) - 1 or not all(isinstance(p, (int, float)) for p in position):
            raise ConfigError(
                f"The position of the well {name!r} is one number for each of the axes {', '.join(grid.axes[1:])}, got {spec['position']!r}."
            )
        first, last = _reach(log, spec, grid, name)
        physics = WellLog.vertical(grid, position, first, last, **options)
        centres = physics.path[:, 0]
        values = _blocked(log, centres, grid.spacing[0], logarithm) if _has_axis(log) else _values(log, spec, logarithm)
    if values.shape != tuple(physics.data_shape):
        raise ConfigError(
            f"The log {spec['file']} holds {values.shape[1]} values of {values.shape[0]} channel(s) but its well {physics.data_shape[1]} samples of {physics.data_shape[0]}; give one value a sample from first to last, or two columns: {grid.axes[0]} and value."
        )
    if not np.isfinite(values).all():
        raise ConfigError(
            f"The log {spec['file']} has no value at {int((~np.isfinite(values)).sum())} samples; cut it."
        )
    where = physics.path
    said = f"{name}: {len(where)} samples, {grid.axes[0]} from {where[0, 0]:g} to {where[-1, 0]:g} {grid.units[0]}"
    return physics, torch.from_numpy(values), (said.rstrip(),)


def _read_log(path: str) -> np.ndarray:
    """An array, or the columns of a text file; rows with gaps are left out of a log that has its axis."""
    from pathlib import Path

    from invgen.data.io import read_array

    if Path(path).suffix.lower() in (".txt", ".csv", ".dat"):
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no file {path}; check the path.")
        try:
            log = np.loadtxt(path, delimiter="," if path.lower().endswith(".csv") else None, ndmin=2)
        except ValueError as error:
            raise ConfigError(
                f"{path} is no table of numbers ({error}); leave headings out or begin them with #."
            ) from error
        log = log[:, 0] if log.shape[1] == 1 else log
    else:
        log = np.asarray(read_array(path), dtype=np.float64)
    if log.ndim not in (1, 2) or not log.size:
        raise ConfigError(f"A log is (n,) values, or (n, 2): coordinate and value; {path} has the shape {log.shape}.")
    return log[np.isfinite(log).all(1)] if _has_axis(log) else log


def _has_axis(log: np.ndarray) -> bool:
    """Whether the first column of a log is its coordinate."""
    return log.ndim == 2 and log.shape[1] < log.shape[0]


def _values(log: np.ndarray, spec: Mapping[str, Any], logarithm: bool) -> np.ndarray:
    if _has_axis(log):
        raise ConfigError(f"The log {spec['file']} along a path holds one value a point, got columns {log.shape}.")
    return np.atleast_2d(_logarithm(log, spec["file"]) if logarithm else log)


def _logarithm(log: np.ndarray, where: str) -> np.ndarray:
    if not (log > 0).all():
        raise ConfigError(f"{where} holds values that are not positive and have no logarithm; leave logarithm out.")
    return np.log(log)


def _reach(log: np.ndarray, spec: Mapping[str, Any], grid: Grid, name: str) -> tuple[float, float]:
    """First and last coordinate of the well: as given, or those of the section that the log covers."""
    z, axis, unit = grid.coordinates(0), grid.axes[0], grid.units[0]
    ends = first, last = spec.get("first"), spec.get("last")
    if any(e is not None and not isinstance(e, (int, float)) for e in ends):
        raise ConfigError(f"first and last of the well {name!r} are numbers on the axis {axis}, got {list(ends)}.")
    if not _has_axis(log):
        if first is None or last is None:
            raise ConfigError(
                f"The log of the well {name!r} has no coordinates; give first and last, or two columns: {axis} and value."
            )
        return float(first), float(last)
    # a cell of half a sample either side has to lie inside the log
    low, high = (1.5 * log[k, 0] - 0.5 * log[j, 0] + s * grid.spacing[0] / 2 for k, j, s in ((0, 1, 1), (-1, -2, -1)))
    slack = 1e-6 * grid.spacing[0]
    covered = z[(z >= low - slack) & (z <= high + slack)]
    if not len(covered):
        raise ConfigError(
            f"The log {spec['file']} runs from {log[0, 0]:g} to {log[-1, 0]:g} but the section from {z[0]:g} to {z[-1]:g} {unit}; check its units, or move the window."
        )
    return (
        float(covered[0] if first is None else first),
        float(covered[-1] if last is None else last),
    )


def _blocked(log: np.ndarray, centres: np.ndarray, width: float, logarithm: bool) -> np.ndarray:
    """Columns averaged over the samples of the section; the mean of the logarithm is that of the geometric mean."""
    from invgen.operators.well import block_log

    columns = [_logarithm(v, "The log") if logarithm else v for v in log[:, 1:].T]
    return np.stack([block_log(log[:, 0], v, centres, width=width) for v in columns])
