"""Diffusion and flow-matching priors on disk: weights and settings, nothing executed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from invgen.checkpoints import read_checkpoint, write_checkpoint
from invgen.grid import Grid
from invgen.priors import conditions as conditioning
from invgen.priors._placement import DepthChannel
from invgen.priors._saving import affine_of, affine_tensors, built, damaged, require_known, require_storable
from invgen.priors.conditions import Condition
from invgen.priors.levels import Levels
from invgen.transforms import Affine

_VARIANT = ("parametrisation", "weighting", "sigmoid_bias", "time", "condition_dropout")


def common(prior: Any, half: bool, card: dict[str, Any] | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and meta values of the network, the transform and the place of a learned prior.

    Raises:
        TypeError: a network or a transform that a file cannot name.
    """
    require_storable([prior.network], prior.transform)
    meta = {
        "network": type(prior.network).__name__,
        "settings": prior.network.settings,
        "shape": list(prior.shape),
        "grid": prior.grid.to_dict() if prior.grid else None,
        "sigma_data": prior.sigma_data,
        "sigma_min": prior.sigma_min,
        "sigma_max": prior.sigma_max,
        "card": card or prior.seen,
    }
    tensors = {k: v.half() if half and v.is_floating_point() else v for k, v in prior.network.state_dict().items()}
    return tensors | affine_tensors(prior.transform), meta


def network_of(path: str | Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> tuple[nn.Module, Affine | None]:
    """The network with its weights, and the transform; both are taken out of `tensors`."""
    transform = affine_of(tensors)
    full = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
    return built(path, meta["network"], meta["settings"], full), transform


def open_checkpoint(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Contents of a checkpoint whose network is one of invgen's."""
    tensors, meta = read_checkpoint(path, kind)
    require_known(path, meta.get("network"))
    return tensors, meta


def write(prior: Any, path: str | Path, half: bool, card: dict[str, Any] | None) -> Path:
    """Write a diffusion or flow-matching prior."""
    tensors, meta = common(prior, half, card)
    meta |= {
        "mean_variance_of_field": prior.mean_variance_of_field,
        "depth": prior.depth.scale if prior.depth else None,
        "latent_steps": prior.latent_steps,
        "levels": prior.levels.to_dict() if prior.levels is not None else None,
        "conditions": conditioning.to_dict(prior.conditions),
        **{name: getattr(prior, name) for name in (*_VARIANT, *prior.own_settings)},
    }
    return write_checkpoint(path, "DiffusionPrior", tensors, meta)


def read(cls: type[Any], path: str | Path) -> Any:
    """Read one; a file of a flow-matching prior gives a `FlowMatching`, whichever class is asked."""
    tensors, meta = open_checkpoint(path, "DiffusionPrior")
    flows = "rule" in meta  # the rule of its ODE tells a flow: networks of both kinds may have one parametrisation
    if flows and "rule" not in cls.own_settings:
        from invgen.priors.flow_matching import FlowMatching

        cls = FlowMatching
    elif not flows and "rule" in cls.own_settings:
        raise ValueError(
            f"{path} holds a prior of the kind {meta.get('parametrisation', 'edm')!r}; load it with DiffusionPrior."
        )
    try:
        network, transform = network_of(path, tensors, meta)
        # files written before there were variants have none of these
        variant = {name: meta[name] for name in _VARIANT if name in meta}
        variant |= {name: meta[name] for name in cls.own_settings}
        prior = cls(
            network,
            tuple(meta["shape"]),
            transform=transform,
            grid=Grid.from_dict(meta["grid"]) if meta["grid"] else None,
            sigma_data=meta["sigma_data"],
            sigma_min=meta["sigma_min"],
            sigma_max=meta["sigma_max"],
            mean_variance_of_field=meta["mean_variance_of_field"],
            depth=DepthChannel(meta["depth"]) if meta["depth"] else None,
            latent_steps=meta["latent_steps"],
            levels=Levels.from_dict(meta["levels"]) if meta.get("levels") else None,
            conditions={k: Condition(**v) for k, v in meta.get("conditions", {}).items()},
            **variant,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise damaged(path, error) from error
    prior.seen = meta.get("card", {})
    return prior.eval().requires_grad_(False)
