"""Examples to train from: tensors, and arrays in files that are larger than memory.

All are visited in seeded random order without replacement in each epoch, and batch `step` depends on (step, size, seed)
only. Generators of `invgen.data` are training data by themselves.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = ["ArrayData", "HDF5Data", "MemmapData", "TrainingData", "ZarrData"]


class TrainingData(Protocol):
    """A stream of examples addressed by step."""

    def batch(self, step: int, size: int, seed: int) -> dict[str, Tensor]:
        """Examples of one step: "x" `(size, *shape)` and what else the prior's loss takes, on the CPU."""
        ...


@functools.lru_cache(maxsize=4)
def _order(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def visited(n: int, step: int, size: int, seed: int) -> Tensor:
    """`(size,)` numbers of the examples of one step: a new random order of all n in each epoch."""
    first = step * size
    if first // n == (first + size - 1) // n:
        return _order(n, seed, first // n)[first % n : first % n + size]
    wanted = torch.arange(first, first + size)
    out = torch.empty(size, dtype=torch.long)
    for epoch in torch.unique(wanted // n).tolist():
        mask = wanted // n == epoch
        out[mask] = _order(n, seed, epoch)[wanted[mask] % n]
    return out


@dataclass(frozen=True)
class ArrayData:
    """Examples held in one tensor.

    Args:
        x: `(n, *shape)` examples.
    """

    x: Tensor

    def __len__(self) -> int:
        return self.x.shape[0]

    def batch(self, step: int, size: int, seed: int) -> dict[str, Tensor]:
        return {"x": self.x[visited(len(self), step, size, seed)]}


class _FileData:
    """Rows of an array in a file, read when they are asked for; picklable, the file is opened where it is used."""

    file: str | Path
    start: int
    stop: int | None

    def _open(self) -> Any:
        """The array; sliced by rows, with `shape` and `dtype`."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        shape, dtype = self._array.shape, self._array.dtype
        if len(shape) < 2 or np.dtype(dtype).kind not in "fiub":
            raise ValueError(
                f"{self.file} holds an array of shape {tuple(shape)} and type {dtype}; training takes real numbers, (examples, channels, …) or (examples, dim)."
            )
        if not 0 <= self.start < self._stop <= shape[0]:
            raise ValueError(
                f"The rows {self.start} to {self._stop} are not in {self.file}, which has {shape[0]}; choose 0 <= start < stop."
            )

    @property
    def _array(self) -> Any:
        if "_opened" not in self.__dict__:
            object.__setattr__(self, "_opened", self._open())
        return self.__dict__["_opened"]

    @property
    def _stop(self) -> int:
        return int(self._array.shape[0] if self.stop is None else self.stop)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_opened"}

    def __len__(self) -> int:
        return self._stop - self.start

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example."""
        return tuple(int(s) for s in self._array.shape[1:])

    def rows(self, first: int, last: int) -> Tensor:
        """`(last − first, *shape)` float32 examples, in the order of the file, counted from `start`."""
        return torch.from_numpy(np.array(self._array[self.start + first : self.start + last], dtype=np.float32))

    def batch(self, step: int, size: int, seed: int) -> dict[str, Tensor]:
        wanted = visited(len(self), step, size, seed).numpy() + self.start
        out = np.empty((size, *self.shape), dtype=np.float32)
        for i in np.argsort(wanted, kind="stable"):  # in the order of the file: neighbours share chunks and pages
            out[i] = self._array[int(wanted[i])]
        return {"x": torch.from_numpy(out)}


@dataclass(frozen=True)
class MemmapData(_FileData):
    """Examples in a .npy file larger than memory, mapped, never read as a whole.

    Args:
        file: .npy of shape (examples, channels, …) or (examples, dim), without pickled objects.
        start, stop: first row and the row after the last; all when omitted.

    Raises:
        FileNotFoundError, ValueError: no such file, not an array of real numbers, rows that do not exist.
    """

    file: str | Path
    start: int = 0
    stop: int | None = None

    def _open(self) -> Any:
        _require_file(self.file)
        try:
            return np.load(self.file, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(
                f"{self.file} is not a complete .npy file ({error}); pickled or truncated files are not read, save it again with numpy.save."
            ) from error


@dataclass(frozen=True)
class HDF5Data(_FileData):
    """Examples in a dataset of an HDF5 file, read row by row. Fast where a chunk of the file is one example.

    Args:
        file: the file. dataset: name of the array in it; may be left out where there is one only.
        start, stop: first row and the row after the last; all when omitted.

    Raises:
        ImportError: h5py is missing. FileNotFoundError, ValueError: as `MemmapData`.
    """

    file: str | Path
    dataset: str | None = None
    start: int = 0
    stop: int | None = None

    def _open(self) -> Any:
        try:
            import h5py
        except ImportError as error:
            raise ImportError(
                "HDF5 files are read with h5py, which comes with invgen; install it with `pip install h5py`."
            ) from error
        _require_file(self.file)
        try:
            file = h5py.File(self.file, "r")
        except OSError as error:
            raise ValueError(f"{self.file} is not a complete HDF5 file ({error}).") from error
        names: list[str] = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        return file[_one_of(names, self.dataset, self.file)]


@dataclass(frozen=True)
class ZarrData(_FileData):
    """Examples in an array of a zarr store, read row by row. Fast where a chunk is one example.

    Args:
        file: folder or file of the store. array: name of the array in a group; left out for a store of one array.
        start, stop: first row and the row after the last; all when omitted.

    Raises:
        ImportError: zarr is missing. FileNotFoundError, ValueError: as `MemmapData`.
    """

    file: str | Path
    array: str | None = None
    start: int = 0
    stop: int | None = None

    def _open(self) -> Any:
        try:
            import zarr
        except ImportError as error:
            raise ImportError(
                'zarr stores are read with zarr; install it with `pip install "invgen[zarr]"`.'
            ) from error
        if not Path(self.file).exists():
            raise FileNotFoundError(f"There is no zarr store at {self.file}; check the path.")
        try:
            found = zarr.open(str(self.file), mode="r")
        except Exception as error:  # zarr's kinds of errors differ between its versions
            raise ValueError(f"{self.file} is not a zarr store ({error}).") from error
        if hasattr(found, "dtype"):
            return found
        return found[_one_of([str(k) for k, _ in found.arrays()], self.array, self.file)]


def _require_file(file: str | Path) -> None:
    if not Path(file).is_file():
        raise FileNotFoundError(f"There is no file {file}; check the path.")


def _one_of(names: list[str], wanted: str | None, file: str | Path) -> str:
    """The array that is meant: the named one, or the only one."""
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted not in names:
        asked = "which array is meant" if wanted is None else f"for {wanted!r}"
        raise ValueError(f"{file} does not say {asked}: it holds {', '.join(names) or 'no arrays'}; name one of them.")
    return str(wanted)
