"""Random crops of a segmented 3-D volume of rock: 2-D slices or 3-D blocks, from memory or from a file of any size."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from invgen.data._stream import Stream, check_lengths, check_shape
from invgen.grid import Grid

__all__ = ["RockCrops", "open_volume"]

Array = np.ndarray


def open_volume(path: str | Path, shape: tuple[int, int, int] | None = None, dtype: str = "uint8") -> Array:
    """A 3-D volume on disk as a read-only memory map: only what is cropped is read.

    Args:
        path: a .npy file, or a .raw (.bin, .dat) file of bare values in C order, the last axis fastest.
        shape: (n0, n1, n2) of a .raw file. dtype: of its values, e.g. "uint8", "<u2", ">f4".

    Raises:
        FileNotFoundError: no such file. ValueError: another format, a shape that does not fit the file's size.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}; check the path.")
    if file.suffix == ".npy":
        try:
            volume = np.load(file, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{file} is not a complete .npy file ({error}); save it again with numpy.save.") from error
    elif file.suffix in (".raw", ".bin", ".dat"):
        if shape is None:
            raise ValueError(f"{file} holds bare values; give its shape (n0, n1, n2) and dtype.")
        check_shape(tuple(shape), 1, (3,))
        expected = math.prod(shape) * np.dtype(dtype).itemsize
        if file.stat().st_size != expected:
            raise ValueError(
                f"{file} has {file.stat().st_size} bytes but {shape} values of type {dtype} take {expected}; check shape "
                "and dtype."
            )
        volume = np.memmap(file, dtype=dtype, mode="r", shape=tuple(shape))
    else:
        raise ValueError(f"{file} is neither .npy nor .raw; convert it with numpy.save.")
    if volume.ndim != 3 or (shape is not None and volume.shape != tuple(shape)):
        raise ValueError(f"{file} holds an array of shape {volume.shape}, a volume of three axes is expected.")
    return volume


@dataclass(frozen=True, eq=False)
class RockCrops(Stream):
    """Random windows of a binary 3-D volume: 1 in the pores, 0 in the grains.

    A window is uniform over the positions at which it fits. Where the rock is isotropic (`flips`), its axes are a random
    permutation of the volume's axes, each reversed with probability 1/2: the 48 symmetries of the cube. A 2-D window is
    one slice, in any of the three orientations; without flips it is a slice across the first axis.

    `region` splits a volume into parts that share no voxel, for training and for held-out crops: crops come from the
    planes [region[0]·n, region[1]·n) of the first axis.

    Attributes:
        volume: (n0, n1, n2) array of two values, or a memory map of one (`open_volume`); never copied.
        shape: of a crop, two or three sizes.
        voxel: edge of a voxel in micrometres (the volume is cubic).
        pore: the value that means pore; None takes the larger of the two values.
        flips: whether crops are permuted and reversed.
        region: share of the first axis that crops may use.

    Cost: about 0.1 ms a 64×64 slice from memory.
    """

    volume: Array = field(repr=False)
    shape: tuple[int, ...] = (64, 64)
    voxel: float = 1.0
    pore: float | None = None
    flips: bool = True
    region: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not isinstance(self.volume, np.ndarray) or self.volume.ndim != 3 or 0 in self.volume.shape:
            raise ValueError(
                f"volume must be a three-dimensional array, got {getattr(self.volume, 'shape', type(self.volume))}."
            )
        check_shape(self.shape, 1, (2, 3))
        check_lengths("voxel", (self.voxel,), 1, "micrometres")
        low, high = self.region
        if not 0.0 <= low < high <= 1.0:
            raise ValueError(f"region must be two shares 0 <= low < high <= 1 of the first axis, got {self.region}.")
        # A volume may be larger than memory: its values are judged by planes spread over the region.
        first, last = self._planes
        seen = np.unique(self.volume[np.linspace(first, last - 1, min(16, last - first)).astype(int)])
        if seen.dtype.kind == "f" and not np.isfinite(seen).all():
            raise ValueError("The volume holds values that are not finite; segment it into two values first.")
        if seen.size > 2:
            raise ValueError(
                f"The volume holds {seen.size} values, two are expected; segment it into pore and grain first."
            )
        if seen.size == 1 and self.pore is None:
            raise ValueError(f"The volume holds only the value {seen[0]}; name pore if that is meant.")
        if self.pore is not None and self.pore not in seen:
            raise ValueError(f"pore is {self.pore} but the volume holds {seen.tolist()}; name one of its values.")
        if self.pore is None:
            object.__setattr__(self, "pore", seen[-1].item())
        size = (last - first, *self.volume.shape[1:])
        needed = self.shape if len(self.shape) == 3 else (1, *self.shape)
        most = max(needed)
        if any(k > n for k, n in zip(needed, size)) or (self.flips and most > min(size)):
            raise ValueError(
                f"Crops of {self.shape}{' in any orientation' if self.flips else ''} do not fit the {size} voxels to crop "
                "from; take smaller crops, a larger region or flips=False."
            )

    @property
    def _planes(self) -> tuple[int, int]:
        n = self.volume.shape[0]
        first, last = round(self.region[0] * n), round(self.region[1] * n)
        return (first, last) if last > first else (min(first, n - 1), min(first, n - 1) + 1)

    @property
    def grid(self) -> Grid:
        """Axes in micrometres; the value is 1 in pores."""
        rank = len(self.shape)
        return Grid(self.shape, (self.voxel,) * rank, units=("um",) * rank, channels=("pore",))

    def porosity(self) -> float:
        """Share of pore voxels in the region, exactly: reads it once, plane by plane."""
        first, last = self._planes
        pores = sum(int(np.count_nonzero(self.volume[k] == self.pore)) for k in range(first, last))
        return pores / ((last - first) * self.volume.shape[1] * self.volume.shape[2])

    def _draw(self, seed: int, numbers: range) -> Array:
        out = np.empty((len(numbers), 1, *self.shape), dtype=np.float32)
        for i, rng in enumerate(self._generators(seed, numbers)):
            out[i, 0] = self._crop(rng)
        return out

    def _crop(self, rng: np.random.Generator) -> Array:
        size = self.shape if len(self.shape) == 3 else (1, *self.shape)
        # Axis k of the crop is axis order[k] of the volume.
        order = rng.permutation(3) if self.flips else np.arange(3)
        (first, last), extent = self._planes, self.volume.shape
        window = [slice(0)] * 3
        for k, axis in enumerate(order):
            low, high = (first, last) if axis == 0 else (0, extent[axis])
            begin = int(rng.integers(low, high - size[k] + 1))
            window[axis] = slice(begin, begin + size[k])
        block = np.transpose(np.asarray(self.volume[tuple(window)]) == self.pore, order)
        if self.flips:
            block = block[tuple(slice(None, None, -1) if rng.random() < 0.5 else slice(None) for _ in range(3))]
        return block.reshape(self.shape)
