r"""Functions of a symmetric matrix by Chebyshev polynomials: f(M) v ≈ Σ_k c_k T_k(X) v, X = (2 M − (b + a)) / (b − a).

The sum is taken by Clenshaw's recurrence, which is stable at any degree (a Horner scheme in powers of M is not):

    b_k = c_k v + 2 X b_{k+1} − b_{k+2},      f(M) v = c_0 v + X b_1 − b_2.

With signs σ_k = −σ_{k+2} carried along, σ_k b_k overwrites σ_{k+2} b_{k+2}: two fields of memory, additions alone.

Reference: Mason & Handscomb, Chebyshev Polynomials, 2003, sections 2.4 and 6.3; Pereira & Desassis 2019, Spatial Statistics 30,
41 (Chebyshev simulation of fields on meshes).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
import scipy.fft
import torch
from torch import Tensor


class InPlace(Protocol):
    """A symmetric matrix that adds its products to a field."""

    def accumulate(self, out: Tensor, v: Tensor, alpha: float) -> None:
        """out += alpha · X v."""


def coefficients(
    f: Callable[[np.ndarray], np.ndarray], low: float, high: float, *, tolerance: float, max_degree: int = 1 << 15
) -> np.ndarray:
    """c_k of f on [low, high], `(degree + 1,)` or `(degree + 1, items)` for a vector of functions.

    What is cut off changes f by at most `tolerance` · max |f| anywhere on the interval.

    Raises:
        ValueError: more than `max_degree` terms: too wide an interval, or too small a tolerance.
    """
    n = 64
    while n <= 2 * max_degree:
        nodes = np.cos(math.pi * (np.arange(n) + 0.5) / n)
        values = f(0.5 * (high - low) * nodes + 0.5 * (high + low))
        c = scipy.fft.dct(values, type=2, axis=0) / n
        c[0] *= 0.5
        # |T_k| ≤ 1: the terms left out add up to the error at worst
        size = np.abs(c).reshape(n, -1) / np.abs(values).reshape(n, -1).max(0)
        left = np.cumsum(size[::-1], axis=0)[::-1].max(1)
        small = np.nonzero(left <= tolerance)[0]
        if len(small) and small[0] <= n // 2:  # the upper half of the terms is the check that none is aliased
            return c[: max(int(small[0]), 2)]
        n *= 2
    raise ValueError(
        f"A Chebyshev polynomial of degree {max_degree} is not enough on [{low:.3g}, {high:.3g}] for a tolerance of {tolerance:g}; raise "
        "the tolerance, or shorten the correlation length (in cells)."
    )


def clenshaw(X: InPlace, c: np.ndarray, v: Tensor) -> Tensor:
    """Σ_k c_k T_k(X) v, as a new tensor; c `(degree + 1,)`, or `(degree + 1, items)` with one polynomial an item.

    Cost: degree products with X and additions in place.
    """
    shaped: list[float] | list[Tensor]
    if c.ndim == 1:
        shaped = [float(x) for x in c]
    else:
        shaped = list(torch.from_numpy(c).to(v).reshape(len(c), -1, *(1,) * (v.ndim - 1)).unbind(0))

    def add(out: Tensor, k: int, sign: float) -> None:
        x = shaped[k]
        if isinstance(x, float):
            out.add_(v, alpha=sign * x)
        else:
            out.addcmul_(v, x, value=sign)

    top = len(c) - 1
    newer, older = torch.zeros_like(v), torch.zeros_like(v)  # σ b_{k+1}, σ b_{k+2}
    sign = [1.0, 1.0]  # of `newer` and `older`
    for k in range(top, 0, -1):
        # −b_{k+2} is what `older` holds times −1: its new sign is the opposite one
        s = -sign[1]
        X.accumulate(older, newer, 2.0 * s * sign[0])
        add(older, k, s)
        newer, older = older, newer
        sign = [s, sign[0]]
    s = -sign[1]
    X.accumulate(older, newer, s * sign[0])
    add(older, 0, s)
    return older if s > 0 else older.neg_()
