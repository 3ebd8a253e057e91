r"""Sparsity in an orthonormal wavelet basis: R(x) = Σ |details of W x|, with an exact proximal operator.

W is the periodic discrete wavelet transform with Daubechies' filters h of p vanishing moments (2p taps),

    a[k] = Σ_j h[j] x[2k + j],     d[k] = Σ_j (−1)^j h[2p − 1 − j] x[2k + j],

repeated on a along every axis. Wᵀ W = I, so that the proximal operator shrinks coefficients: prox(x) = Wᵀ soft(W x).
The filters are computed here: |H(ω)|² = (1 + cos ω)^p P(½ − ½ cos ω)/2^(p−1) with P(y) = Σ_k C(p − 1 + k, k) y^k, and h takes the
roots inside the unit circle (Daubechies, Ten Lectures on Wavelets, 1992, section 6.1). They are normalised to Σ h² = 1.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invgen.contracts import LinearOperator
from invgen.grid import Grid
from invgen.priors._differences import _along
from invgen.priors._regularizer import Density, Regularizer

__all__ = ["WaveletSparsity"]


@functools.lru_cache
def daubechies(moments: int) -> tuple[float, ...]:
    """The 2p taps of the extremal-phase scaling filter with p vanishing moments; p = 1 is Haar."""
    # P(y) with y = (2 − z − 1/z)/4, times z^(p−1): a polynomial in z whose roots come in pairs (r, 1/r)
    y = np.array([-0.25, 0.5, -0.25])
    total = np.zeros(2 * moments - 1)
    power = np.ones(1)
    for k in range(moments):
        padding = (len(total) - len(power)) // 2
        total[padding : len(total) - padding] += math.comb(moments - 1 + k, k) * power
        power = np.convolve(power, y)
    roots = np.roots(total) if moments > 1 else np.zeros(0)
    h = np.ones(1)
    for _ in range(moments):
        h = np.convolve(h, [1.0, 1.0])
    for r in roots[np.abs(roots) < 1]:
        h = np.convolve(h, [1.0, -r])
    h = np.real(h)
    return tuple(float(v) for v in h * (math.sqrt(2) / h.sum()))


class Wavelets(LinearOperator):
    """W: the coefficients of every level in place, `(channels, *spatial)` to the same shape; orthonormal.

    The approximation of level L lies in the first n/2^L entries of each axis, the details of a level behind it.

    Args:
        shape: `(channels, *spatial)` or `(dim,)`. moments: vanishing moments p. levels: how often to divide by two.
    """

    def __init__(self, shape: tuple[int, ...], moments: int, levels: int) -> None:
        super().__init__(shape, shape)
        self.axes = tuple(range(1, len(shape))) if len(shape) > 1 else (0,)
        self.moments, self.levels = moments, levels
        self._matrices: dict[Any, Tensor] = {}

    @classmethod
    def examples(cls) -> list[Any]:
        return [cls((2, 8, 4), 2, 2), cls((16,), 4, 1)]

    def _matrix(self, n: int, like: Tensor) -> Tensor:
        """One level along one axis: `(n, n)`, averages above details."""
        key = (n, like.dtype, like.device)
        if key not in self._matrices:
            h = torch.tensor(daubechies(self.moments), dtype=torch.float64)
            signs = torch.tensor([(-1.0) ** j for j in range(len(h))], dtype=torch.float64)
            rows = torch.zeros(2, n // 2, n, dtype=torch.float64)
            k = torch.arange(n // 2)
            for j in range(len(h)):  # filters longer than the axis wrap around and add up
                rows[0, k, (2 * k + j) % n] += h[j]
                rows[1, k, (2 * k + j) % n] += (signs * h.flip(0))[j]
            self._matrices[key] = rows.reshape(n, n).to(like)
        return self._matrices[key]

    def _corner(self, v: Tensor, level: int) -> Tensor:
        for a in self.axes:
            v = v.narrow(a + 1, 0, self.model_shape[a] >> level)
        return v

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        out = x.clone()
        for level in range(self.levels):
            corner = self._corner(out, level)
            new = corner
            for a in self.axes:
                new = _along(new, self._matrix(new.shape[a + 1], x), a + 1)
            corner.copy_(new)
        return out

    def adjoint(self, d: Tensor) -> Tensor:
        out = d.clone()
        for level in reversed(range(self.levels)):
            corner = self._corner(out, level)
            new = corner
            for a in self.axes:
                new = _along(new, self._matrix(new.shape[a + 1], d).mT, a + 1)
            corner.copy_(new)
        return out


class WaveletSparsity(Density, Regularizer):
    """R(x) = Σ |wavelet coefficients of x|, the coarsest averages left alone.

    prox: exact, Wᵀ soft(W x, step · w). `log_prob` is improper unless the averages are penalised too.

    Args:
        shape: `(channels, *spatial)` or `(dim,)`, every spatial axis divisible by 2^levels. weight: w.
        moments: vanishing moments of Daubechies' wavelet; 1 is Haar, 2 to 4 are usual.
        levels: of the transform. averages: penalise the coarsest averages, too.
        grid: where the model lives.

    The boundary is periodic: an edge of the section counts as a jump. Cost: one matrix product an axis and level.

    Raises:
        ValueError: an axis that is not divisible, moments outside 1 to 10.
    """

    def __init__(
        self,
        shape: tuple[int, ...] | None = None,
        weight: float = 1.0,
        *,
        moments: int = 2,
        levels: int = 3,
        averages: bool = False,
        grid: Grid | None = None,
    ) -> None:
        super().__init__(shape, weight, grid=grid)
        if not 1 <= moments <= 10 or levels < 1:
            raise ValueError(
                f"WaveletSparsity takes 1 to 10 moments and at least one level, got {moments} and {levels}."
            )
        spatial = self.shape[1:] or self.shape
        if any(n % (1 << levels) for n in spatial):
            raise ValueError(
                f"WaveletSparsity halves every axis {levels} times, which {spatial} does not allow; use fewer levels, or pad to multiples of {1 << levels}."
            )
        self.wavelets, self.averages = Wavelets(self.shape, moments, levels), bool(averages)

    @classmethod
    def examples(cls) -> list[WaveletSparsity]:
        return [cls((1, 8, 4), 0.4, levels=2), cls((16,), 0.6, moments=4, levels=1, averages=True)]

    def _penalised(self, v: Tensor) -> Tensor:
        """1 where a coefficient is penalised."""
        mask = torch.ones(v.shape[1:], dtype=v.real.dtype, device=v.device)[None]
        if not self.averages:
            self.wavelets._corner(mask, self.wavelets.levels).zero_()
        return mask

    def value(self, x: Tensor) -> Tensor:
        """Σ |details|, `(batch,)`."""
        self._check(x, "value")
        v = self.wavelets(x)
        return (v.abs() * self._penalised(v)).flatten(1).sum(1)

    def _prox(self, x: Tensor, step: Tensor) -> Tensor:
        v = self.wavelets(x)
        size = v.abs()
        keep = (size - step * self._penalised(v)).clamp_min(0)
        return self.wavelets.adjoint(v * (keep / size.clamp_min(torch.finfo(size.dtype).tiny)))
