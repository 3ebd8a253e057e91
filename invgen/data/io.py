"""Arrays in files: .npy, .npz, HDF5 and zarr, read without executing anything."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from invgen.data._stores import read_hdf5, read_zarr

__all__ = ["read_array", "write_array"]

HDF5 = (".h5", ".hdf5", ".nc")


def read_array(path: str | Path, key: str | None = None) -> np.ndarray:
    """A numeric array of a .npy, .npz, HDF5 or zarr file.

    Args:
        path: the file; `FILE.npz:name`, `FILE.h5:/path` and `FOLDER.zarr:/path` pick one array of several.
        key: name or path of the array in a file that holds several.

    Raises:
        FileNotFoundError: no such file. ImportError: zarr is not installed.
        ValueError: another format, a truncated or pickled file, an array that is not numeric, a missing or open choice
            among several arrays.
    """
    text = str(path)
    if key is None and any(f"{suffix}:" in text for suffix in (".npz", *HDF5, ".zarr")):
        text, key = text.rsplit(":", 1)
    file = Path(text)
    if not file.is_file() and not (file.suffix == ".zarr" and file.is_dir()):
        raise FileNotFoundError(f"There is no file {file}; check the path.")
    if file.suffix in (*HDF5, ".zarr"):
        array = read_zarr(file, key) if file.suffix == ".zarr" else read_hdf5(file, key)
    elif file.suffix in (".npy", ".npz"):
        array = _read_numpy(file, key)
    else:
        raise ValueError(
            f"{file} is neither .npy, .npz, .h5 nor .zarr; convert it with numpy.save (SEG-Y is read by read_segy)."
        )
    return array.astype(array.dtype.newbyteorder("="), order="C", copy=False)  # torch reads native numbers only


def _read_numpy(file: Path, key: str | None) -> np.ndarray:
    try:
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.lib.npyio.NpzFile):
            with loaded:
                names = list(loaded.files)
                if key is None and len(names) != 1:
                    raise KeyError(f"it holds {', '.join(names) or 'nothing'}; pick one with {file.name}:NAME")
                if key is not None and key not in names:
                    raise KeyError(f"it holds no {key!r} but {', '.join(names)}")
                array = loaded[key if key is not None else names[0]]
        else:
            array = loaded
    except KeyError as error:
        raise ValueError(f"{file} cannot be read: {error.args[0]}.") from error
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"{file} is not a complete array file ({error}); pickled or truncated files are not read, save it again with numpy.save."
        ) from error
    except Exception as error:  # zipfile raises its own kinds for broken archives
        raise ValueError(f"{file} is not a complete array file ({error}); save it again with numpy.savez.") from error
    if array.dtype.kind not in "fiucb":
        raise ValueError(f"{file} holds values of type {array.dtype}, numbers are expected.")
    return array


def write_array(path: str | Path, array: np.ndarray) -> Path:
    """Write a .npy file; its folder is created.

    Raises:
        ValueError: another suffix. OSError: the folder cannot be written to.
    """
    path = Path(path)
    if path.suffix != ".npy":
        raise ValueError(f"Arrays are written as .npy, got the name {path.name}.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array, allow_pickle=False)
    except OSError as error:
        raise OSError(
            f"Cannot write {path}: {error.strerror or error}; choose a folder that can be written to."
        ) from error
    return path
