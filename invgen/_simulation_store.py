"""Simulations in an HDF5 file of a fixed layout: written row by row, mapped into memory, safe against a kill.

    x (n, …)   theta/NAME (n,)   data/0, data/1, … (n, …)   state (n,): 0 waiting, 1 done, 2 failed

Every dataset is contiguous and allocated when the file is made, which is then closed: rows are written through memory
maps at the offsets HDF5 chose, so that a run killed at any moment leaves a valid file whose `state` says what is done.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from invgen.checkpoints import atomic

WAITING, DONE, FAILED = 0, 1, 2
KIND = "simulations"


def create(
    path: Path,
    n: int,
    x: tuple[tuple[int, ...], Any],
    theta: Mapping[str, Any],
    data: Sequence[tuple[tuple[int, ...], Any]],
    meta: Mapping[str, Any] | None = None,
) -> Path:
    """A new file of `n` waiting rows.

    Args:
        path: file, replaced if it exists. x: shape and dtype of one model. theta: name -> dtype. data: shape and dtype
            of one data set, a term. meta: JSON-able values kept with it.

    Raises:
        OSError: the file cannot be written.
    """
    import h5py

    early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    with atomic(path) as partial, h5py.File(partial, "w") as file:
        file.attrs["invgen"] = json.dumps({**(meta or {}), "kind": KIND})

        def add(name: str, shape: tuple[int, ...], dtype: Any) -> None:
            file.create_dataset(name, (n, *shape), dtype=np.dtype(dtype), dcpl=early)

        add("x", *x)
        for name, dtype in theta.items():
            add(f"theta/{name}", (), dtype)
        for i, one in enumerate(data):
            add(f"data/{i}", *one)
        add("state", (), np.uint8)
    return path


def read_meta(path: Path) -> dict[str, Any]:
    """What was stated when the file was made.

    Raises:
        FileNotFoundError: no such file. ValueError: not a file of simulations.
    """
    import h5py

    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; check the path.")
    try:
        with h5py.File(path, "r") as file:
            meta = json.loads(file.attrs["invgen"])
        if meta.get("kind") != KIND:
            raise KeyError("kind")
        return meta
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not a complete file of simulations ({error}); write it with Simulations.save."
        ) from error


def arrays(path: Path, mode: Literal["r", "r+"] = "r") -> dict[str, Any]:
    """Name -> memory map of each dataset ("x", "theta/NAME", "data/0", …, "state"); mode "r" or "r+".

    Memory maps pickle by path, are shared by processes and read any row without reading its neighbours.
    """
    import h5py

    found: dict[str, Any] = {}
    with h5py.File(path, "r") as file:

        def visit(name: str, item: Any) -> None:
            if not isinstance(item, h5py.Dataset):
                return
            if item.dtype.kind not in "fiucb":
                raise ValueError(f"{path}:/{name} holds values of type {item.dtype}, numbers are expected.")
            offset = item.id.get_offset()
            if item.size and offset is None:
                raise ValueError(
                    f"{path}:/{name} is stored in chunks or compressed; open it with h5py and give the dataset to Simulations."
                )
            found[name] = (
                np.memmap(path, dtype=item.dtype, mode=mode, offset=offset, shape=item.shape)
                if item.size
                else np.empty(item.shape, item.dtype)
            )

        file.visititems(visit)
    return found
