r"""Batches of simulations for training: slices of tensors in memory, of a file, or of simulations made on the way.

A loader that collects examples one by one spends more time on Python than a small network on arithmetic. Here an epoch
is one permutation of the rows, and a batch one slice of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from invgen.simulations import Simulations

Prepare = Callable[[Tensor, dict[str, Tensor], tuple[Tensor, ...]], tuple[Tensor, ...]]
Pair = tuple[Tensor, ...]

_HELD_AT_ONCE = 16  # pieces of a file that are shuffled together


class Batches:
    """Shuffled slices of tensors in memory.

    Args:
        tensors: each `(n, …)`, on the device of the training. size: rows a batch.
        seed: with the number of the epoch it decides the order.

    An epoch leaves out the rows that do not fill a batch, others every time; with fewer rows than one batch, the batch
    is all of them. Cost an epoch: one permutation, and one `index_select` a batch and tensor.
    """

    def __init__(self, *tensors: Tensor, size: int, seed: int = 0) -> None:
        if not tensors or len({len(t) for t in tensors}) != 1 or len(tensors[0]) == 0:
            raise ValueError(f"Batches need tensors of one length, got {[len(t) for t in tensors]} rows.")
        if size < 1:
            raise ValueError(f"A batch holds at least one row, got {size}.")
        self.tensors, self.seed = tensors, seed
        self.size = min(size, len(tensors[0]))

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.tensors[0]) // self.size

    def epoch(self, number: int) -> Iterator[Pair]:
        """The batches of one epoch."""
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0]))
        order = torch.randperm(len(self.tensors[0]), generator=generator).to(self.tensors[0].device)
        for first in range(0, len(self) * self.size, self.size):
            rows = order[first : first + self.size]
            yield tuple(t.index_select(0, rows) for t in self.tensors)


class StreamedBatches:
    """Batches of simulations that are read while training, for files larger than memory.

    The rows are cut into pieces of neighbours, which is how files are read fast; the pieces are visited in a new order
    every epoch, and the rows of sixteen at a time are shuffled together.

    Args:
        simulations: pairs in a file. prepare: (x, theta, data) -> tensors of a batch. size: rows a batch.
        piece: rows read at once. seed: of the order. device: where batches go.
    """

    def __init__(
        self,
        simulations: Simulations,
        prepare: Prepare,
        *,
        size: int,
        piece: int = 1024,
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self.simulations, self.prepare, self.seed, self.device = simulations, prepare, seed, device
        self.size = min(size, len(simulations))
        self.piece = max(1, min(piece, len(simulations) // _HELD_AT_ONCE))

    def __len__(self) -> int:
        return len(self.simulations) // self.size

    def epoch(self, number: int) -> Iterator[Pair]:
        rng = np.random.default_rng([self.seed, number])
        n = len(self.simulations)
        starts = rng.permutation(np.arange(0, n, self.piece))
        given, rest = 0, None
        for group in range(0, len(starts), _HELD_AT_ONCE):
            read = []
            for start in starts[group : group + _HELD_AT_ONCE]:
                rows = slice(int(start), int(min(start + self.piece, n)))
                read.append(self.prepare(*self.simulations.batch(rows, device=self.device)))
            held = [torch.cat(parts) for parts in zip(*read, strict=True)]
            order = torch.from_numpy(rng.permutation(len(held[0]))).to(held[0].device)
            held = [t.index_select(0, order) for t in held]
            if rest is not None:
                held = [torch.cat([a, b]) for a, b in zip(rest, held, strict=True)]
            whole = len(held[0]) // self.size
            for k in range(whole):
                if given < len(self):
                    given += 1
                    yield tuple(t[k * self.size : (k + 1) * self.size] for t in held)
            rest = [t[whole * self.size :] for t in held]


class FreshBatches:
    """Simulations made while training: no pair is seen twice, and nothing can be learnt by heart.

    Args:
        simulate: number of an epoch -> tensors of its pairs. rows: pairs an epoch. size: rows a batch. seed: of the order.
    """

    def __init__(self, simulate: Callable[[int], Pair], *, rows: int, size: int, seed: int = 0) -> None:
        self.simulate, self.rows, self.seed, self.size = simulate, rows, seed, min(size, rows)

    def __len__(self) -> int:
        return self.rows // self.size

    def epoch(self, number: int) -> Iterator[Pair]:
        pairs = self.simulate(number)  # failed simulations make it shorter
        yield from Batches(*pairs, size=min(self.size, len(pairs[0])), seed=self.seed).epoch(number)
