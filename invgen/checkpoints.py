"""Tensors and plain values on disk, read without executing anything: safetensors with a JSON header."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["read_checkpoint", "write_checkpoint"]


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that replaces it once the block ends well, and is removed otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_checkpoint(path: str | Path, kind: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
    """Write atomically: a reader sees the old file or the new one, never half of one.

    Args:
        path: file to write; its folder is created.
        kind: what the file holds ("DiffusionPrior", "training"), checked on reading.
        tensors: named tensors. meta: JSON-able values.

    Raises:
        OSError: the folder cannot be written to.
    """
    from safetensors.torch import save

    path = Path(path)
    try:
        payload = save(
            {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()},
            metadata={"invgen": json.dumps({**meta, "kind": kind})},
        )
        with atomic(path) as partial:
            partial.write_bytes(payload)
    except OSError as error:
        raise OSError(
            f"Cannot write the checkpoint {path}: {error.strerror or error}; choose a folder that can be written to."
        ) from error
    return path


def read_checkpoint(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and meta values of a checkpoint written by `write_checkpoint`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file (a pickle, a truncated file), or one of another program or kind.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint at {path}; check the path or train one with `invgen train`.")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is not a complete safetensors checkpoint ({error}); pickled or truncated files are not read, save it again with invgen."
        ) from error
    try:
        meta = dict(json.loads(header["invgen"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is a safetensors file of another program: it carries no invgen header; give a checkpoint written by invgen."
        ) from error
    if meta.get("kind") != kind:
        raise ValueError(f"{path} holds a {meta.get('kind')!r} checkpoint but a {kind!r} one was expected.")
    return tensors, meta
