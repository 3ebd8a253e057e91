"""Learned priors on disk: networks by name and settings, weights as safetensors, transform and grid, a card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

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
    foreign = [type(p).__name__ for p in parts.values() if type(p).__name__ not in networks.__all__]
    if foreign or not isinstance(prior.transform, (Affine, Identity)):
        raise TypeError(
            f"Only priors with networks of invgen.priors.networks and an affine transform can be saved, this one has {', '.join(foreign) or 'known networks'} and {type(prior.transform).__name__}."
        )
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
    if isinstance(prior.transform, Affine):
        out |= {"transform.shift": prior.transform.shift, "transform.scale": prior.transform.scale}
    return write_checkpoint(path, type(prior).__name__, out, meta)


def read_prior(path: str | Path, kind: str) -> Stored:
    """Read what `write_prior` wrote; nothing in the file is executed, and only invgen's networks are built.

    Raises:
        FileNotFoundError, ValueError: no file, another kind, an unknown network, settings or weights that do not fit.
    """
    tensors, meta = read_checkpoint(path, kind)
    try:
        built: dict[str, nn.Module] = {}
        for name, entry in meta["networks"].items():
            if entry["class"] not in networks.__all__:
                raise ValueError(
                    f"{path} names the network {entry['class']!r}, which invgen does not have; known are {', '.join(networks.__all__)}."
                )
            built[name] = _network(path, entry, _under(name, tensors))
        transform = None
        if "transform.shift" in tensors:
            transform = Affine(tensors["transform.shift"], tensors["transform.scale"])
        grid = Grid.from_dict(meta["grid"]) if meta["grid"] else None
        return Stored(built, _under("prior", tensors), dict(meta["settings"]), transform, grid, dict(meta["card"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"The settings in {path} are incomplete or of another version ({error}); the file is damaged or was edited."
        ) from error


def _under(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}


def _network(path: str | Path, entry: Mapping[str, Any], state: dict[str, Tensor]) -> nn.Module:
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in entry["settings"].items()}
    network: nn.Module = getattr(networks, entry["class"])(**settings)
    kinds = {v.dtype for v in state.values() if v.is_floating_point()}
    if len(kinds) == 1 and kinds != {next(network.parameters()).dtype}:
        full = next(iter(kinds))
        network = network.to(full) if full.itemsize > 4 else network  # float64 weights stay float64, halves widen
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"The weights in {path} do not fit its network {entry['class']}; the file is damaged or was edited."
        ) from error
    return network
