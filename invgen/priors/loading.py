"""A learned prior from its file, whatever its class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from invgen.checkpoints import read_checkpoint

__all__ = ["checkpoint_kind", "load_prior"]


def checkpoint_kind(path: str | Path) -> str:
    """What a checkpoint holds, by its header alone: the name of a prior's class, or "training".

    Raises:
        FileNotFoundError: no such file. ValueError: not a checkpoint of invgen.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return str(json.loads((file.metadata() or {})["invgen"])["kind"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return str(read_checkpoint(path, "prior")[1]["kind"])  # says what is wrong with the file


def load_prior(path: str | Path) -> Any:
    """The prior that `save` of any learned prior wrote; nothing in the file is executed.

    Raises:
        FileNotFoundError: no such file. ValueError: a damaged file, or one that holds no prior.
    """
    from invgen import priors

    kind = checkpoint_kind(path)
    cls = getattr(priors, kind, None) if kind in priors.__all__ else None
    if not (isinstance(cls, type) and hasattr(cls, "load")):
        raise ValueError(
            f"{path} holds {kind!r}, which is no prior of this version; give a file that a prior's save wrote."
        )
    return cls.load(path)
