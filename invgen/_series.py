"""Sums over correlated series, as wells and wavelets are compared."""

from __future__ import annotations

import math

import numpy as np

__all__: list[str] = []


def inflation(a: np.ndarray, b: np.ndarray) -> float:
    """1 + 2 Σ_k v_k ρ_a(k) ρ_b(k): the variance of ⟨a, b⟩ over that of two white series of the same length.

    v is Bartlett's window over 3 √n lags; a and b are taken about zero, and 1 is returned where one of them vanishes.
    """
    n = len(a)
    if not (a @ a > 0 and b @ b > 0):
        return 1.0
    lags = np.arange(1, min(n - 1, int(3 * math.sqrt(n))) + 1)
    rho = [np.array([v[k:] @ v[: n - k] for k in lags]) / float(v @ v) for v in (a, b)]
    return 1 + 2 * float(((1 - lags / (len(lags) + 1)) * rho[0] * rho[1]).sum())
