"""Pretrained priors that ship with the package: one safetensors file each, its card in the header.

>>> from invgen.priors import pretrained
>>> pretrained.available()
['channels-consistency', …, 'velocity-diffusion', 'velocity-wgan']
>>> prior = pretrained.load("geology").at((64, 64))
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["available", "card", "load", "path"]

_HERE = Path(__file__).parent


def available() -> list[str]:
    """Names that `load` takes."""
    return sorted(p.stem for p in _HERE.glob("*.safetensors"))


def path(name: str) -> Path:
    """File of a pretrained prior.

    Raises:
        ValueError: no such prior.
    """
    if name not in available():
        raise ValueError(
            f"There is no pretrained prior {name!r}; available are: {', '.join(available()) or 'none in this installation'}."
        )
    return _HERE / f"{name}.safetensors"


def load(name: str) -> Any:
    """A pretrained prior on its training grid; `.at(shape)` moves it to another one.

    Raises:
        ValueError: no such prior, or a damaged file.
    """
    from invgen.priors.loading import load_prior

    return load_prior(path(name))


def card(name: str) -> dict[str, Any]:
    """What the prior was trained on, with which command, for how long, and its validation figures."""
    from invgen.checkpoints import read_checkpoint
    from invgen.priors.loading import checkpoint_kind

    return dict(read_checkpoint(path(name), checkpoint_kind(path(name)))[1].get("card", {}))
