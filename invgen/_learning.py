"""Networks and their training for whoever learns something and is no prior: the one place where rooms meet for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

__all__ = ["build_network", "default_network", "describe_network", "train"]


def default_network(shape: tuple[int, ...], extra: int) -> nn.Module:
    """A network on fields `(channels, height, width)` or vectors `(dim,)` with `extra` further input channels.

    Raises:
        ValueError: another number of axes.
    """
    from invgen.priors.networks import MLPDenoiser, UNet

    if len(shape) == 1:
        return MLPDenoiser(shape[0], extra=extra)
    if len(shape) != 3:
        raise ValueError(
            f"There is no default network for unknowns of the shape {tuple(shape)}; give network=, a module on (batch, channels + {extra}, *spatial)."
        )
    small = min(shape[1:]) < 32
    return UNet(
        shape[0], extra=extra, widths=(24, 32) if small else (32, 48, 64, 64), blocks=1, patch=1 if small else 2
    )


def describe_network(network: nn.Module) -> dict[str, Any]:
    """Class and settings, as plain values.

    Raises:
        TypeError: not a network of invgen.priors.networks, which alone can be built again from a file.
    """
    from invgen.priors import networks

    name, settings = type(network).__name__, getattr(network, "settings", None)
    if name not in networks.__all__ or not isinstance(settings, dict):
        raise TypeError(
            f"{name} cannot be stored by name and settings; use a network of invgen.priors.networks, or save its state_dict yourself."
        )
    return {"class": name, "settings": dict(settings)}


def build_network(stored: dict[str, Any]) -> nn.Module:
    """What `describe_network` described, with fresh weights."""
    from invgen.priors import networks

    if stored["class"] not in networks.__all__:
        raise ValueError(f"The file names the network {stored['class']!r}, which invgen does not have.")
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in stored["settings"].items()}
    network: nn.Module = getattr(networks, stored["class"])(**settings)
    return network


def train(
    module: nn.Module,
    data: Any,
    validation: dict[str, Tensor] | None,
    *,
    progress: bool = False,
    callback: Callable[[int, float], None] | None = None,
    **settings: Any,
) -> Any:
    """Run the training loop of `invgen.priors.training` on a module with `training_loss` and `shape`.

    Args:
        settings: of `Training`.

    Returns:
        `TrainingReport`.
    """
    from invgen.priors.training import Training

    return Training(**settings).fit(module, data, validation=validation, progress=progress, callback=callback)
