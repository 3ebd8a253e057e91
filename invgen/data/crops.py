"""Training crops cut from a pool of generated geological sections."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from invgen.data.geology import GeologySections

__all__ = ["GeologyCrops"]


# Subtracted before the cast: log-impedances lie near 8, where neighbouring float16 numbers are 0.008 apart; around
# zero they are below 5e-4 apart, far finer than the beds' contrasts.
_CENTRE = np.float32(8.65)


def _section(generator: GeologySections, seed: int, index: int) -> np.ndarray:
    return (generator.sample(1, seed=seed, start=index)[0, 0] - _CENTRE).astype(np.float16)


@dataclass
class GeologyCrops:
    """Random crops (left-right flips included) of a pool of sections, with the depth of every row.

    A crop costs microseconds while a section costs tens of milliseconds, so sections are made once, in parallel, and
    kept as float16 deviations from 8.65 (rounding below 2.5e-4, far below the texture of the sections).

    Args:
        sections: size of the pool.
        crop: rows and columns of an example.
        generator: where the sections come from.
        seed: seed of the pool.
        depth_scale: metres that map to 1 in the depth channel.
        unknown_depth: share of examples whose depth is hidden, so that the network also works without it.
        workers: processes that make the pool.
    """

    sections: int = 2000
    crop: tuple[int, int] = (96, 96)
    generator: GeologySections = field(default_factory=GeologySections)
    seed: int = 0
    depth_scale: float = 2000.0
    unknown_depth: float = 0.15
    workers: int = 1
    start: int = 0

    def __post_init__(self) -> None:
        nz, nx = self.generator.shape
        if self.sections < 1 or min(self.crop) < 1:
            raise ValueError(
                f"GeologyCrops needs sections >= 1 and crops of at least 1 × 1, got {self.sections} and {self.crop}."
            )
        if self.crop[0] > nz or self.crop[1] > nx:
            raise ValueError(
                f"Crops of {self.crop} do not fit sections of {self.generator.shape}; take smaller crops or larger sections."
            )
        make = partial(_section, self.generator, self.seed)
        indices = range(self.start, self.start + self.sections)
        if self.workers > 1:
            with ProcessPoolExecutor(self.workers) as pool:
                made = list(pool.map(make, indices, chunksize=16))
        else:
            made = [make(i) for i in indices]
        self.pool = torch.from_numpy(np.stack(made))

    def batch(self, step: int, size: int, seed: int) -> dict[str, Tensor]:
        """`{"x": (size, 1, *crop) log-impedance, "context": (size, 2, *crop) depth / scale and 1 where known}`."""
        rng = np.random.default_rng((seed, step, 77))
        nz, nx = self.generator.shape
        cz, cx = self.crop
        which = rng.integers(self.sections, size=size)
        rows, columns = rng.integers(nz - cz + 1, size=size), rng.integers(nx - cx + 1, size=size)
        flips, hidden = rng.random(size) < 0.5, rng.random(size) < self.unknown_depth
        x = torch.empty(size, 1, cz, cx)
        context = torch.zeros(size, 2, cz, cx)
        for i in range(size):
            part = self.pool[which[i], rows[i] : rows[i] + cz, columns[i] : columns[i] + cx].float() + float(_CENTRE)
            x[i, 0] = part.flip(-1) if flips[i] else part
            if not hidden[i]:
                depth = self.generator.depth + self.generator.spacing[0] * np.arange(rows[i], rows[i] + cz)
                context[i, 0] = torch.from_numpy(depth / self.depth_scale).float()[:, None]
                context[i, 1] = 1.0
        return {"x": x, "context": context}
