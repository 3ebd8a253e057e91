"""What the generators share: item i of a stream depends on (seed, i) only, batches for training, pools to train from."""

from __future__ import annotations

import zlib
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray


def check_whole(name: str, value: int, least: int) -> None:
    """Refuse what is not a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")


def check_draw(n: int, seed: int, start: int) -> None:
    """Refuse what is not a window of a stream."""
    check_whole("n", n, 1)
    check_whole("seed", seed, 0)
    check_whole("start", start, 0)


def check_shape(shape: tuple[int, ...], least: int, ranks: tuple[int, ...] = (2,)) -> None:
    """Refuse shapes that are not `ranks` whole numbers of at least `least`."""
    words = " or ".join(str(r) for r in ranks)
    whole = all(isinstance(s, (int, np.integer)) and not isinstance(s, bool) for s in shape)
    if len(shape) not in ranks or not whole or min(shape) < least:
        raise ValueError(f"shape must be {words} whole numbers of at least {least}, got {shape}.")


def check_lengths(name: str, lengths: tuple[float, ...], count: int, unit: str) -> None:
    """Refuse what is not `count` positive finite lengths."""
    if len(lengths) != count or not all(np.isfinite(s) and s > 0 for s in lengths):
        raise ValueError(f"{name} must be {count} positive finite numbers ({unit}), got {lengths}.")


def check_range(name: str, bounds: tuple[float, float], low: float, high: float, unit: str) -> None:
    """Refuse a pair that is not low <= first <= second <= high."""
    if len(bounds) != 2 or not (np.isfinite(bounds).all() and low <= bounds[0] <= bounds[1] <= high):
        raise ValueError(
            f"{name} must be a lower and an upper bound between {low:g} and {high:g} ({unit}), got {bounds}."
        )


class Stream:
    """A seeded, unlimited stream of examples; a generator says how to draw the items with given numbers.

    Every generator is training data: `batch` simulates while training, `pool` makes an array once.
    """

    _block: ClassVar[int] = 64  # items computed together: large enough to amortise calls, small enough for the caches

    def _draw(self, seed: int, numbers: range) -> Array:
        """Items `numbers` of the stream `seed`: (len(numbers), …) float32; each from its own random numbers."""
        raise NotImplementedError

    def _generators(self, seed: int, numbers: range) -> list[np.random.Generator]:
        """One generator of random numbers an item; the class name keeps streams of one seed apart."""
        tag = zlib.crc32(type(self).__name__.encode())
        return [np.random.default_rng(np.random.SeedSequence((seed, tag, i))) for i in numbers]

    def sample(self, n: int, *, seed: int = 0, start: int = 0) -> Array:
        """Draw items `start` to `start + n − 1` of the stream `seed`.

        Returns:
            (n, channels, *shape) float32; (n, dim) where the unknown is a vector. Item i depends on (seed, start + i)
            only, whatever else is drawn with it.

        Raises:
            ValueError: n below one, a negative seed or start.
        """
        check_draw(n, seed, start)
        blocks = [range(i, min(i + self._block, start + n)) for i in range(start, start + n, self._block)]
        return np.concatenate([self._draw(seed, numbers) for numbers in blocks])

    def batch(self, step: int, size: int, seed: int) -> dict[str, Tensor]:
        """`{"x": (size, …)}`: items `step·size` to `(step + 1)·size − 1`, so that training never sees one twice.

        Validation draws take another seed.
        """
        check_whole("size", size, 1)
        check_whole("step", step, 0)
        return {"x": torch.from_numpy(self.sample(size, seed=seed, start=step * size))}

    def pool(self, n: int, seed: int = 0, *, workers: int = 1) -> Tensor:
        """(n, …) float32 tensor of the first `n` items, made once, by `workers` processes, to train from as an array."""
        check_draw(n, seed, 0)
        check_whole("workers", workers, 1)
        if workers == 1:
            return torch.from_numpy(self.sample(n, seed=seed))
        starts = range(0, n, self._block)
        with ProcessPoolExecutor(workers) as processes:
            parts = processes.map(partial(_part, self, seed, n), starts)
            return torch.from_numpy(np.concatenate(list(parts)))


def _part(stream: Stream, seed: int, n: int, start: int) -> Array:
    return stream.sample(min(stream._block, n - start), seed=seed, start=start)
