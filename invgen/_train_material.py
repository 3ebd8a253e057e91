"""What `invgen train` trains on: examples from files and generators, split into those to learn from and those held out."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invgen._config import ConfigError, build, resolve_class, split_spec
from invgen.priors.diffusion import DepthChannel
from invgen.priors.training_data import ArrayData, TrainingData

HELD_OUT = 128  # examples a stream makes for validation
_WATCHED = 512  # held-out examples that figures are computed on, at most
_JUDGED = 2048  # examples of a stream or a file that means and standard deviations are taken from, at most


@dataclass(frozen=True)
class Material:
    """Examples to train on, what is held out, and what a prior must know about them.

    Attributes:
        data: for `Training.fit`. held: a validation batch or None. told: for the card.
        look: examples that decide the transform. offers: arguments a prior may take: shape, grid, …
        network: arguments of the network that follow from the data.
    """

    data: TrainingData
    held: dict[str, Tensor] | None
    told: str
    look: Tensor | None
    offers: dict[str, Any]
    network: dict[str, Any] = field(default_factory=dict)


def material(spec: Any, share: float, pool: int | None, grid: Any, seed: int, pool_file: str | None = None) -> Material:
    """The examples a configuration names.

    Args:
        spec: a .npy file, the word geology, or a class: a generator of invgen.data, `MemmapData`, `HDF5Data`, `ZarrData`.
        share: of the examples, held out. pool: examples a generator makes beforehand; None simulates while training.
        grid: mapping of a Grid, for arrays. seed: of generators and of what is held out.
        pool_file: a .npy file that keeps the pool and is read instead of making the same one again.

    Raises:
        ConfigError: something that cannot be trained on.
    """
    from invgen.data._stream import Stream

    if not 0 <= share < 1:
        raise ConfigError(f"validation is a share of the examples in [0, 1), got {share}.")
    if spec == "geology" or (isinstance(spec, Mapping) and spec.get("class_path") == "GeologyCrops"):
        if pool is not None or grid is not None:
            raise ConfigError(f"Geology comes with its own {'pool' if pool is not None else 'grid'}; leave it out.")
        return _geology(spec, seed)
    if pool_file is not None and pool is None:
        raise ConfigError("pool_file keeps the pool of a generator; give pool as well.")
    if isinstance(spec, str) and not spec[:1].isupper():
        made: Any = _array(spec)
        told = Path(spec).name
    else:
        made, told = _object(spec, seed), _words(spec)
    if isinstance(made, Stream):
        if grid is not None:
            raise ConfigError(f"The grid of {type(made).__name__} follows from its own settings; leave grid out.")
        return _stream(made, told, share, pool, seed, pool_file)
    if pool is not None:
        raise ConfigError("pool is a number of examples that a generator makes; leave it out for a file.")
    return _rows(made, told, share, grid, seed)


def _object(spec: Any, seed: int) -> Any:
    from invgen.data._stream import Stream

    try:
        name, arguments = split_spec(spec, "data")
    except ConfigError:
        raise ConfigError(
            f"data is the name of a .npy file, the word geology, a generator of invgen.data, MemmapData, HDF5Data or ZarrData, got {spec!r}."
        ) from None
    cls = resolve_class(name)
    extra: dict[str, Any] = {}
    if cls.__name__ == "RockCrops" and isinstance(arguments.get("volume"), str):
        from invgen.data.rock import open_volume

        extra["volume"] = open_volume(arguments.pop("volume"))  # larger than memory, perhaps: mapped
    if not (issubclass(cls, Stream) or hasattr(cls, "rows")):
        raise ConfigError(
            f"Training takes a .npy file, the word geology, a generator of invgen.data, MemmapData, HDF5Data or ZarrData, got {cls.__name__}."
        )
    return build({"class_path": name, "init_args": arguments}, what="data", extra=extra)


def _words(spec: Any) -> str:
    name, arguments = split_spec(spec, "data")
    return f"{name}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"


def _array(file: str) -> Tensor:
    from invgen.data.io import read_array

    array = torch.from_numpy(read_array(file))
    if array.is_complex():
        raise ConfigError(f"{file} holds complex numbers; give their real and imaginary parts as two channels.")
    return array.float()


def _stream(
    stream: Any, told: str, share: float, pool: int | None, seed: int, pool_file: str | None = None
) -> Material:
    data = stream if pool is None else ArrayData(_pool(stream, told, pool, seed, pool_file))
    held = {"x": torch.from_numpy(stream.sample(HELD_OUT, seed=seed + 1))} if share > 0 else None
    look = data.x if isinstance(data, ArrayData) else torch.from_numpy(stream.sample(HELD_OUT, seed=seed + 2))
    shape = tuple(look.shape[1:])
    how = "simulated while training" if pool is None else f"{pool} examples"
    offers = {"shape": shape, "grid": getattr(stream, "grid", None)}
    return Material(data, held, f"invgen.data.{told}, seed {seed}, {how}", look, offers, {"channels": shape[0]})


def _pool(stream: Any, told: str, pool: int, seed: int, file: str | None) -> Any:
    """`pool` examples of a generator, from `file` if it keeps just these; its recipe lies beside it."""
    if file is None:
        return stream.pool(pool, seed=seed)
    kept, recipe = Path(file), {"data": f"invgen.data.{told}", "seed": seed, "examples": pool}
    beside = kept.with_suffix(".json")
    if kept.exists():
        found = json.loads(beside.read_text()) if beside.exists() else None
        if found != recipe:
            raise ConfigError(
                f"{file} keeps {found or 'examples of unknown origin'}, not {recipe}; name another pool_file or delete it."
            )
        return torch.from_numpy(np.load(kept, allow_pickle=False))
    examples = stream.pool(pool, seed=seed)
    partial = kept.with_name(f"{kept.name}.{os.getpid()}.npy")
    np.save(partial, np.asarray(examples))
    beside.write_text(json.dumps(recipe))
    partial.replace(kept)
    return examples


def _rows(made: Any, told: str, share: float, grid_spec: Any, seed: int) -> Material:
    """Examples that are counted: a tensor or a file."""
    shape = tuple(made.shape[1:]) if isinstance(made, Tensor) else made.shape
    full, count = (len(made), *shape), int(share * len(made))
    if len(shape) < 1 or len(made) < 2:
        raise ConfigError(
            f"{told} must hold examples first: (examples, channels, rows, columns) or (examples, dim), got {full}."
        )
    if len(shape) == 2:
        raise ConfigError(
            f"{told} has the shape {full}; fields carry a channel axis, (examples, channels, rows, columns), one channel included."
        )
    if len(shape) > 3 or 0 in full:
        raise ConfigError(
            f"{told} has the shape {full}; networks of invgen learn (examples, channels, rows, columns) or (examples, dim)."
        )
    if len(made) - count < 2:
        raise ConfigError(
            f"{len(made)} examples with validation={share} leave {len(made) - count} to learn from; hold out fewer."
        )
    if isinstance(made, Tensor):
        if not bool(torch.isfinite(made).all()):
            raise ConfigError(
                f"{told} holds {int((~torch.isfinite(made)).sum())} NaN or infinite values; remove those examples."
            )
        order = torch.randperm(len(made), generator=torch.Generator().manual_seed(seed))
        held, kept = made[order[:count]], made[order[count:]]
        data: Any = ArrayData(kept)
        look = kept
    else:  # the last rows of a file are held out: a random choice would be read all over it
        kept_rows = len(made) - count
        held = made.rows(kept_rows, kept_rows + min(count, _WATCHED))
        data = dataclasses.replace(made, stop=made.start + kept_rows)
        every = max(1, kept_rows // _JUDGED)
        look = torch.cat([data.rows(i, i + 1) for i in range(0, kept_rows, every)])
    if not float(look.std()) > 0:
        raise ConfigError(f"All values in {told} are equal; there is nothing to learn.")
    offers = {"shape": shape, "grid": _grid(grid_spec)}
    return Material(
        data,
        {"x": held[:_WATCHED]} if count else None,
        f"{told}, {len(data)} examples",
        look,
        offers,
        {"channels": shape[0]},
    )


def _grid(spec: Any) -> Any:
    from invgen.grid import Grid

    try:
        return Grid(**{k: tuple(v) for k, v in spec.items()}) if spec else None
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"The grid cannot be made: {error}.") from error


def _geology(spec: Any, seed: int) -> Material:
    from invgen.data.crops import GeologyCrops
    from invgen.grid import Grid
    from invgen.transforms import Affine

    crops = build(
        {"class_path": "GeologyCrops", "init_args": {"seed": seed}} if spec == "geology" else spec, what="data"
    )
    held = GeologyCrops(min(16, crops.sections), crops.crop, crops.generator, seed=crops.seed, start=1_000_000)
    grid = Grid(
        tuple(crops.crop),
        crops.generator.spacing,
        axes=("z", "x"),
        units=("m", "m"),
        channels=("log_impedance",),
        channel_units=("ln(kg/m2/s*1e-3)",),
    )
    offers = {
        "shape": grid.field_shape,
        "transform": Affine(8.65, 0.3),
        "grid": grid,
        "sigma_min": 0.005,
        "mean_variance_of_field": 0.7,
        "depth": DepthChannel(crops.depth_scale),
    }
    told = f"invgen.data.GeologySections, seed {crops.seed}, {crops.sections} sections, crops {tuple(crops.crop)}"
    return Material(crops, held.batch(0, 64, 1), told, None, offers, {"channels": 1, "extra": 2})
