"""Learned priors on disk: networks by name and settings, weights as safetensors, transform and grid, a card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from invgen.checkpoints import read_checkpoint, write_checkpoint
from invgen.grid import Grid
from invgen.priors import networks
from invgen.transforms import Affine, Identity, Transform

__all__: list[str] = []


class Stored(NamedTuple):
    """What a file holds: networks by the name of their part, further tensors, settings, coordinates, the card."""

    networks: dict[str, nn.Module]
    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    transform: Transform | None
    grid: Grid | None
    card: dict[str, Any]


def write_prior(
    path: str | Path,
    prior: Any,
    parts: Mapping[str, nn.Module],
    settings: Mapping[str, Any],
    *,
    tensors: Mapping[str, Tensor] | None = None,
    half: bool = False,
    card: dict[str, Any] | None = None,
) -> Path:
    """Write the networks `parts` of a prior with what it takes to build it again.

    Args:
        prior: has `transform`, `grid` and `seen`; its class name is the kind of the file.
        settings: JSON-able arguments of the constructor. tensors: further tensors, stored as they are.
        half: store float16 weights (half the size, 1e-3 relative).

    Raises:
        TypeError: a network that is not one of invgen's, or a transform that is not affine.
    """
    require_storable(parts.values(), prior.transform)
    meta = {
        "networks": {name: {"class": type(p).__name__, "settings": p.settings} for name, p in parts.items()},
        "settings": dict(settings),
        "grid": prior.grid.to_dict() if prior.grid else None,
        "card": card or prior.seen,
    }
    out = {
        f"{name}.{key}": value.half() if half and value.is_floating_point() else value
        for name, part in parts.items()
        for key, value in part.state_dict().items()
    }
    out |= {f"prior.{key}": value for key, value in (tensors or {}).items()}
    return write_checkpoint(path, type(prior).__name__, out | affine_tensors(prior.transform), meta)


def read_prior(path: str | Path, kind: str) -> Stored:
    """Read what `write_prior` wrote; nothing in the file is executed, and only invgen's networks are built.

    Raises:
        FileNotFoundError, ValueError: no file, another kind, an unknown network, settings or weights that do not fit.
    """
    tensors, meta = read_checkpoint(path, kind)
    try:
        made: dict[str, nn.Module] = {}
        for name, entry in meta["networks"].items():
            require_known(path, entry["class"])
            made[name] = built(path, entry["class"], entry["settings"], _under(name, tensors))
        grid = Grid.from_dict(meta["grid"]) if meta["grid"] else None
        return Stored(
            made, _under("prior", tensors), dict(meta["settings"]), affine_of(tensors), grid, dict(meta["card"])
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise damaged(path, error) from error


def _under(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}


def require_storable(parts: Iterable[nn.Module], transform: Transform) -> None:
    """Raise a TypeError for networks or a transform that a file cannot name."""
    foreign = [type(p).__name__ for p in parts if type(p).__name__ not in networks.__all__]
    if foreign or not isinstance(transform, (Affine, Identity)):
        raise TypeError(
            f"Only priors with networks of invgen.priors.networks and an affine transform can be saved, this one has {', '.join(foreign) or 'known networks'} and {type(transform).__name__}."
        )


def require_known(path: str | Path, network: Any) -> None:
    """Raise a ValueError for a file that names a network invgen does not have."""
    if network not in networks.__all__:
        raise ValueError(
            f"{path} names the network {network!r}, which invgen does not have; known are {', '.join(networks.__all__)}."
        )


def built(path: str | Path, name: str, settings: Mapping[str, Any], state: dict[str, Tensor]) -> nn.Module:
    """The network of a file with its weights; float64 weights stay float64, halves widen."""
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    network: nn.Module = getattr(networks, name)(**options)
    kinds = {v.dtype for v in state.values() if v.is_floating_point()}
    if kinds == {torch.float64}:
        network = network.double()
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"The weights in {path} do not fit its network {name}; the file is damaged or was edited."
        ) from error
    return network


def affine_tensors(transform: Transform) -> dict[str, Tensor]:
    """What a file holds of a transform.

    Raises:
        TypeError: a transform that is not affine.
    """
    if isinstance(transform, Affine):
        return {"transform.shift": transform.shift, "transform.scale": transform.scale}
    if not isinstance(transform, Identity):
        raise TypeError(f"Only priors with an affine transform can be saved, this one has {type(transform).__name__}.")
    return {}


def affine_of(tensors: dict[str, Tensor]) -> Affine | None:
    """The transform of a file, taken out of its tensors."""
    if "transform.shift" not in tensors:
        return None
    return Affine(tensors.pop("transform.shift"), tensors.pop("transform.scale"))


def damaged(path: str | Path, error: Exception) -> ValueError:
    """What to raise when settings are missing or do not fit."""
    return ValueError(
        f"The settings in {path} are incomplete or of another version ({error}); the file is damaged or was edited."
    )
