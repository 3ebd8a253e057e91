"""Explicit randomness: every item of a run owns its noise stream, whatever the grouping, the workers or the device."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Streams"]

_EPOCH = 64  # steps one generator serves: resuming walks over at most so many
_BLOCK_BYTES = 2 << 20  # numbers held ahead, for each kind of noise: what stays in a core's cache

_Draw = Callable[[np.random.Generator, np.ndarray], Any]


class _Block(NamedTuple):
    first: int
    values: Tensor  # (items, steps, *shape)
    generators: list[np.random.Generator]


class Streams:
    """One noise stream an item, drawn on the CPU in blocks of many steps and moved to the device.

    Args:
        seed: of the run; 0 is a seed.
        items: the item numbers, or (observation, sample) pairs, that this batch holds.
        device: where the draws are wanted.
        salt: separates streams that must not share numbers.

    Streams are a function of (seed, item, salt, shape, dtype, tag) alone: bit-equal for any batch and device.
    """

    def __init__(
        self, seed: int, items: Iterable[Any], *, device: torch.device | str | None = None, salt: str = ""
    ) -> None:
        self.seed, self.device, self.salt = int(seed), torch.device(device or "cpu"), salt
        self.items = [tuple(i) if isinstance(i, (tuple, list)) else (0, int(i)) for i in items]
        if self.seed < 0:
            raise ValueError(f"A seed must be a non-negative integer, got {seed}.")
        self._blocks: dict[str, _Block] = {}
        self.counters: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.items)

    def spawn(self, salt: str) -> Streams:
        """Independent streams for the same items."""
        return Streams(self.seed, self.items, device=self.device, salt=f"{self.salt}/{salt}")

    def _generator(self, item: tuple[int, ...], key: str, epoch: int) -> np.random.Generator:
        # 128 bits of key: torch's own CPU generator keeps 32 bits of its seed, and 10^5 streams would collide
        digest = hashlib.blake2b(f"{self.seed}|{item}|{key}|{epoch}".encode(), digest_size=16).digest()
        return np.random.Generator(np.random.SFC64(int.from_bytes(digest, "little")))

    def _next(self, kind: str, shape: tuple[int, ...], dtype: torch.dtype, tag: str, draw: _Draw) -> Tensor:
        key = f"{self.salt}|{kind}|{shape}|{dtype}|{tag}"
        count = self.counters.get(key, 0)
        block = self._blocks.get(key)
        if block is None or not block.first <= count < block.first + block.values.shape[1]:
            block = self._blocks[key] = self._draw_block(key, count, shape, dtype, draw, block)
        self.counters[key] = count + 1
        return block.values[:, count - block.first].contiguous().to(self.device, non_blocking=True)

    def _draw_block(
        self, key: str, count: int, shape: tuple[int, ...], dtype: torch.dtype, draw: _Draw, last: _Block | None
    ) -> _Block:
        epoch, offset = divmod(count, _EPOCH)
        wide = (
            torch.promote_types(dtype, torch.float32).to_real()
            if dtype.is_complex
            else torch.promote_types(dtype, torch.float32)
        )
        parts = (*shape, 2) if dtype.is_complex else shape
        precision = np.float64 if wide == torch.float64 else np.float32
        if last is not None and offset and last.first + last.values.shape[1] == count:
            generators = last.generators
        else:
            generators = [self._generator(i, key, epoch) for i in self.items]
            for generator in generators:
                for _ in range(offset):  # after `restore`: walk to where the run stopped
                    draw(generator, np.empty(parts, precision))
        # a generator fills several steps exactly as it fills them one by one, so the block size is free
        size = math.prod(parts) * np.dtype(precision).itemsize * max(len(self.items), 1)
        steps = max(1, min(_EPOCH - offset, _BLOCK_BYTES // max(size, 1)))
        buffer = np.empty((len(self.items), steps, *parts), precision)
        for row, generator in zip(buffer, generators, strict=True):
            draw(generator, row)
        values = torch.from_numpy(buffer)
        if dtype.is_complex:
            values = torch.view_as_complex(values * math.sqrt(0.5) if key.split("|")[1] == "normal" else values)
        return _Block(count, values.to(dtype), generators)

    def normal(self, shape: Sequence[int], *, dtype: torch.dtype = torch.float32, tag: str = "") -> Tensor:
        """`(items, *shape)` of N(0, 1); complex dtypes are circular with unit variance per complex number."""
        return self._next(
            "normal", tuple(shape), dtype, tag, lambda g, out: g.standard_normal(out=out, dtype=out.dtype)
        )

    def uniform(self, shape: Sequence[int], *, dtype: torch.dtype = torch.float32, tag: str = "") -> Tensor:
        """`(items, *shape)` of U(0, 1), in [0, 1)."""
        return self._next("uniform", tuple(shape), dtype, tag, lambda g, out: g.random(out=out, dtype=out.dtype))

    def gamma(
        self, concentration: float, shape: Sequence[int], *, dtype: torch.dtype = torch.float32, tag: str = ""
    ) -> Tensor:
        """`(items, *shape)` of Gamma(concentration, 1)."""
        return self._next(
            f"gamma{concentration}",
            tuple(shape),
            dtype,
            tag,
            lambda g, out: g.standard_gamma(concentration, out=out, dtype=out.dtype),
        )

    def poisson(self, rate: Tensor, *, tag: str = "") -> Tensor:
        """Poisson counts for `(items, *shape)` rates."""
        key = f"{self.salt}|poisson|{tuple(rate.shape[1:])}|{tag}"
        count = self.counters.get(key, 0)
        self.counters[key] = count + 1
        host = rate.detach().cpu().to(torch.float64).numpy()
        drawn = np.stack([self._generator(i, key, count).poisson(row) for i, row in zip(self.items, host, strict=True)])
        return torch.from_numpy(drawn).to(dtype=rate.dtype, device=rate.device)

    def integers(self, high: int, shape: Sequence[int] = (), *, tag: str = "") -> Tensor:
        """`(items, *shape)` integers in [0, high)."""
        return (self.uniform(shape, dtype=torch.float64, tag=f"int{tag}") * high).long().clamp_max(high - 1)

    def restore(self, counters: dict[str, int]) -> None:
        """Continue where a checkpoint stopped."""
        self.counters, self._blocks = dict(counters), {}
