"""The prior of `invgen invert`: a name, a checkpoint or a class, moved to the grid of the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from invgen._config import ConfigError, build, split_spec
from invgen._invert_data import Frame, read_source
from invgen.grid import Grid

__all__ = ["channels_of", "named_prior", "place_prior"]

KEYS = ("name", "shift", "velocity", "precision")
_PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def named_prior(spec: Any) -> tuple[Any, dict[str, Any]]:
    """`{name: geology, shift: …}` as its name and its options; everything else as it is."""
    if not (isinstance(spec, Mapping) and "name" in spec):
        return spec, {}
    strange = [k for k in spec if k not in KEYS]
    if strange:
        raise ConfigError(f"The prior has no option {strange[0]!r}; with a name it takes {', '.join(KEYS[1:])}.")
    for key in ("shift", "velocity"):
        value = spec.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ConfigError(f"The {key} of the prior is a number, got {value!r}.")
    if spec.get("precision") not in (None, *_PRECISIONS):
        raise ConfigError(f"The precision of the prior is {' or '.join(_PRECISIONS)}, got {spec['precision']!r}.")
    return spec["name"], {k: v for k, v in spec.items() if k != "name" and v is not None}


def channels_of(spec: Any) -> dict[str, str]:
    """Names and units of the model's channels: `{log_impedance: "ln(m/s·g/cc)"}` or a list of names."""
    if isinstance(spec, list) and all(isinstance(c, str) for c in spec):
        spec = dict.fromkeys(spec, "")
    if not isinstance(spec, Mapping) or not spec or not all(isinstance(v, (str, type(None))) for v in spec.values()):
        raise ConfigError(f"channels is a mapping of names to units, or a list of names, got {spec!r}.")
    return {str(k): v or "" for k, v in spec.items()}


def place_prior(
    spec: Any,
    shape: list[int] | None,
    frame: Frame | None,
    channels: Mapping[str, str] | None,
    allow_import: bool,
    make: Callable[..., Any],
) -> tuple[Any, Grid | None, tuple[str, ...]]:
    """The prior, the model's grid on the section (None where the model does not live on it), and remarks.

    Args:
        spec: name, checkpoint, `{name: …, shift, velocity, precision}` or a class. shape: asked for by prior_shape.
        frame: the section. channels: of the model, those of the prior when None. make: the prior as the file has it.

    A learned prior is read *sample for sample* on the section: what it learned at 4 m becomes, say, 2 ms and 12.5 m.
    `velocity` (m/s) turns two-way times into depths t v / 2 for priors that know how rocks change with depth; `shift`
    is added to every draw, x = T(u) + shift, for sections of another level (density, overburden) than the examples.
    """
    spec, options = named_prior(spec)
    on_section = frame is not None and (shape is None or tuple(shape) == frame.grid.shape)
    if not (on_section and frame is not None):
        if "velocity" in options:
            raise ConfigError("velocity needs a section in time under the model; leave it out here.")
        if channels is not None:
            raise ConfigError("channels name the model on a section; leave them out where the model is on none.")
        prior = make(spec, shape, allow_import)
        return _adjusted(prior, options), None, ()
    if isinstance(spec, (Mapping, str)) and _is_class(spec):
        grid = _with_channels(frame.grid, channels or {"model": ""})
        if options:
            raise ConfigError(f"{', '.join(options)} belong to a learned prior, {spec} is a class; leave them out.")
        name, arguments = split_spec(spec, "prior")
        extra: dict[str, Any] = {}
        if isinstance(arguments.get("mean"), str):  # a background: a file on the section
            mean = frame.lay(read_source(arguments.pop("mean"), "mean"))
            if mean.mask is not None:
                raise ConfigError(f"{'; '.join(mean.remarks)}: the mean of a prior has no gaps, fill them first.")
            extra["mean"] = mean.values
        prior = build(
            {"class_path": name, "init_args": arguments},
            what="prior",
            allow_import=allow_import,
            extra=extra,
            defaults={"grid": grid, "where": grid, "shape": grid.field_shape},
        )
        if not (hasattr(prior, "sample") and hasattr(prior, "shape")):
            raise ConfigError(f"{type(prior).__name__} is not a prior; see `invgen priors`.")
        return prior, grid, ()
    prior = make(spec, None, allow_import)
    learned = getattr(prior, "grid", None)
    if channels is None:
        names = learned.channels if learned is not None else tuple(f"channel{i}" for i in range(prior.shape[0]))
        units = learned.channel_units if learned is not None else ("",) * len(names)
        channels = dict(zip(names, units, strict=True))
    if len(channels) != prior.shape[0]:
        raise ConfigError(f"The prior has {prior.shape[0]} channel(s), the configuration names {', '.join(channels)}.")
    grid = _with_channels(frame.grid, channels)
    if not hasattr(prior, "at"):
        raise ConfigError(f"{type(prior).__name__} cannot be moved to the section {grid.shape}; use another prior.")
    depth = None
    if "velocity" in options:
        if grid.axes[0] != "t" or grid.units[0] != "s" or getattr(prior, "depth", None) is None:
            raise ConfigError("velocity turns times in s into depths, for priors that know depths; leave it out here.")
        depth = torch.from_numpy(grid.coordinates(0) * options["velocity"] / 2)
    moved = prior.at(grid.shape, grid=grid, **({} if depth is None else {"depth": depth}))
    return _adjusted(moved, options), grid, _reading(spec, learned, grid, moved, depth is not None)


def _is_class(spec: Any) -> bool:
    return isinstance(spec, Mapping) or (
        spec.partition(".")[0].isidentifier() and spec[:1].isupper() and not spec.endswith(".safetensors")
    )


def _with_channels(grid: Grid, channels: Mapping[str, str]) -> Grid:
    return replace(grid, channels=tuple(channels), channel_units=tuple(channels.values()))


def _steps(grid: Grid) -> str:
    return " × ".join(f"{d:g} {u}".strip() for d, u in zip(grid.spacing, grid.units, strict=True))


def _reading(spec: Any, learned: Grid | None, grid: Grid, moved: Any, has_depth: bool) -> tuple[str, ...]:
    said = []
    if learned is not None and (learned.spacing, learned.units) != (grid.spacing, grid.units):
        said.append(f"the prior {spec}, learned at {_steps(learned)}, is read sample for sample at {_steps(grid)}")
    if getattr(moved, "depth", None) is not None and grid.axes[0] != "z" and not has_depth:
        said.append(f"the prior {spec} knows depths but the section has times; velocity: (m/s) would tell it")
    return tuple(said)


def _adjusted(prior: Any, options: Mapping[str, Any]) -> Any:
    """Shift and precision, on a copy of what `at` made."""
    from invgen.transforms import Affine

    if options.get("shift"):
        transform = prior.transform
        if not isinstance(transform, Affine):
            raise ConfigError(
                f"shift moves priors whose coordinates are affine, this one has {type(transform).__name__}; leave it out."
            )
        prior.transform = Affine(transform.shift + options["shift"], transform.scale)
    if "precision" in options:
        if not hasattr(prior, "with_precision"):
            raise ConfigError(f"{type(prior).__name__} runs in its own precision; leave precision out.")
        prior = prior.with_precision(_PRECISIONS[options["precision"]])
    return prior
