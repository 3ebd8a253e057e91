"""Gaussian smoothing as a matrix: the borders mirror, so that nothing is lost."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

Array = np.ndarray


@lru_cache(maxsize=64)
def mirror_blur(n: int, sd: float) -> Array:
    """(n, n) symmetric, non-negative matrix of rows of sum 1: a Gaussian of `sd` samples, mirrored at half samples."""
    reach = int(np.ceil(6.0 * sd))
    step = np.arange(-reach, reach + 1)
    weight = np.exp(-0.5 * np.square(step / max(sd, 1e-9)))
    weight /= weight.sum()
    target = (np.arange(n)[:, None] + step) % (2 * n)
    target = np.where(target < n, target, 2 * n - 1 - target)
    out = np.zeros((n, n))
    np.add.at(out, (np.arange(n)[:, None], target), weight)
    out.setflags(write=False)
    return out
