"""Arrays of HDF5 files and zarr stores, read without executing anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["read_hdf5", "read_zarr"]


def _choose(names: list[str], key: str | None, file: Path) -> str:
    """The dataset that is asked for, or the only one."""
    plain = [n.strip("/") for n in names]
    if key is None:
        if len(plain) != 1:
            raise ValueError(
                f"{file} cannot be read: it holds {', '.join('/' + n for n in plain) or 'no array'}; pick one with {file.name}:/PATH."
            )
        return plain[0]
    if key.strip("/") not in plain:
        raise ValueError(
            f"{file} cannot be read: it holds no array {key!r} but {', '.join('/' + n for n in plain) or 'none'}."
        )
    return key.strip("/")


def _numeric(dtype: Any, file: Path, name: str) -> None:
    if np.dtype(dtype).kind not in "fiucb":
        raise ValueError(f"{file}:/{name} holds values of type {dtype}, numbers are expected.")


def read_hdf5(file: Path, key: str | None) -> np.ndarray:
    """One dataset of an HDF5 (or NetCDF 4) file.

    Raises:
        ValueError: not a complete HDF5 file, no such dataset, several and none chosen, values that are not numbers.
    """
    import h5py

    try:
        with h5py.File(file, "r") as store:
            names: list[str] = []
            store.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
            name = _choose(names, key, file)
            _numeric(store[name].dtype, file, name)
            return np.asarray(store[name][()])
    except (OSError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"{file} is not a complete HDF5 file ({' '.join(str(error).split())}); write it again."
        ) from error


def read_zarr(folder: Path, key: str | None) -> np.ndarray:
    """One array of a zarr store in a folder, version 2 or 3.

    Raises:
        ImportError: zarr is not installed. ValueError: as `read_hdf5`; codecs that would unpickle.
    """
    try:
        import zarr
    except ImportError as error:
        raise ImportError(
            "Zarr stores need the library zarr; install the extra `zarr`: pip install 'invgen[zarr]'."
        ) from error
    # a pickle codec runs code when a chunk is decoded: refused before anything is opened
    for meta in (*folder.rglob(".zarray"), *folder.rglob("zarr.json"), *folder.rglob(".zmetadata")):
        try:
            if "pickle" in json.dumps(json.loads(meta.read_text(encoding="utf-8"))):
                raise ValueError(f"{folder} holds pickled values, which are not read; store numbers.")
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{folder} is not a complete zarr store ({meta.name}: {error}); write it again."
            ) from error
    try:
        store: Any = zarr.open(str(folder), mode="r")
    except Exception as error:  # zarr 2 and 3 raise kinds of their own
        raise ValueError(
            f"{folder} is not a zarr store ({' '.join(str(error).split())}); give the folder of one."
        ) from error
    name = ""
    if not hasattr(store, "dtype"):
        name = _choose(_arrays(store), key, folder)
        store = store[name]
    elif key is not None and key.strip("/"):
        raise ValueError(f"{folder} is one array, it holds no {key!r}; leave the path away.")
    _numeric(store.dtype, folder, name)
    try:
        return np.asarray(store[...])
    except Exception as error:  # a damaged chunk raises what its codec raises
        raise ValueError(f"{folder}:/{name} has a chunk that cannot be read ({error}); write it again.") from error


def _arrays(group: Any, lead: str = "") -> list[str]:
    """Paths of all arrays below a group."""
    names = [lead + str(name) for name, _ in group.arrays()]
    for name, inner in group.groups():
        names += _arrays(inner, f"{lead}{name}/")
    return names
