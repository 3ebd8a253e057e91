"""What diagnostics accept: NumPy arrays and torch tensors, of any layout, checked once."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray | Tensor
BYTES = 64 << 20  # of intermediate results held at a time


def tensor(values: Any, what: str, *, infinite: bool = False) -> Tensor:
    """A real floating tensor without NaN.

    Args:
        values: NumPy array, tensor or nested list. what: its name in messages. infinite: ±∞ is a value too (a
            log-likelihood of −∞ has a rank).

    Raises:
        TypeError: complex numbers, or no numbers. ValueError: NaN (or infinite) values.
    """
    if isinstance(values, np.ndarray):
        values = values.astype(values.dtype.newbyteorder("="), order="C", copy=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # read-only memory maps are only read here
            out = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{what} are a {type(values).__name__} that does not convert to numbers; give a NumPy array or a tensor."
        ) from error
    if out.is_complex():
        raise TypeError(f"{what} are complex and have no order; give real and imaginary parts as coordinates.")
    if not out.is_floating_point():
        out = out.double()
    out = out.detach()
    bad = 0
    for rows in chunks(len(out) if out.ndim else 1, out[:1].numel() if out.ndim else 1):
        part = out[rows] if out.ndim else out
        bad += int((part.isnan() if infinite else ~part.isfinite()).sum())
    if bad:
        raise ValueError(
            f"{what} hold {bad} {'NaN' if infinite else 'NaN or infinite'} values; leave those simulations or samples out and report how many they were."
        )
    return out


def pair(truth: Any, samples: Any, *, infinite: bool = False) -> tuple[Tensor, Tensor]:
    """Truths `(n_sim, *shape)` and draws `(n_sim, draws, *shape)` that belong together, on one device."""
    t, s = (
        tensor(truth, "The true values", infinite=infinite),
        tensor(samples, "The posterior draws", infinite=infinite),
    )
    if s.ndim != t.ndim + 1 or t.ndim < 1 or s.shape[0] != t.shape[0] or s.shape[2:] != t.shape[1:]:
        raise ValueError(
            f"The true values have the shape {tuple(t.shape)} and the draws {tuple(s.shape)}; give (n_sim, *shape) and (n_sim, draws, *shape)."
        )
    if min(s.shape[:2]) < 1:
        raise ValueError(f"The draws have the shape {tuple(s.shape)}; at least one simulation and one draw are needed.")
    return t.to(s.device), s


def two_samples(x: Any, y: Any) -> tuple[Tensor, Tensor]:
    """Two samples `(n, dim)` and `(m, dim)` of vectors; fields `(n, *shape)` are flattened, numbers `(n,)` get dim 1."""
    a, b = tensor(x, "The first sample's values"), tensor(y, "The second sample's values")
    if a.ndim < 1 or a.shape[1:] != b.shape[1:] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"The samples have the shapes {tuple(a.shape)} and {tuple(b.shape)}; give (n, *shape) and (m, *shape) with at least two rows each."
        )
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.reshape(len(a), -1).to(dtype), b.reshape(len(b), -1).to(device=a.device, dtype=dtype)


def chunks(rows: int, numbers_a_row: int, limit: int = BYTES) -> Iterator[slice]:
    """Slices of `rows` whose intermediate float64 results stay within `limit` bytes."""
    size = max(1, limit // (8 * max(numbers_a_row, 1)))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def array(values: Tensor) -> np.ndarray:
    """On the host, as NumPy."""
    return values.cpu().numpy()


def random_tensor(seed: int | list[int], shape: tuple[int, ...], like: Tensor) -> Tensor:
    """N(0, 1) numbers, the same on every device."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(like)
