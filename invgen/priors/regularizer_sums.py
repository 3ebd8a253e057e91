r"""Sums of regularisers, and their joint proximal operator by a Dykstra-like iteration.

    R = Σ_k w_k R_k,        prox_R(x) = argmin_y ½|y − x|² + Σ_k w_k R_k(y)

has no closed form even where every prox_k has one. From z_k = x, repeat

    p_k = prox_{m R_k}(z_k),     y' = (1/m) Σ_k p_k,     z_k ← y' + z_k − p_k                (m parts),

which converges to prox_R(x) for convex R_k (Combettes & Pesquet, Proximal Splitting Methods in Signal Processing, 2011, algorithm
10.31). Solvers that split (`PrimalDual`) take the parts one by one instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from invgen.contracts import HasDensity, LinearOperator
from invgen.priors._regularizer import Density, Regularizer, _positive

__all__ = ["RegularizerSum"]


class RegularizerSum(Regularizer):
    """R(x) = Σ_k w_k R_k(x); `a + b` makes one. Has `HasDensity` where all parts have it.

    Args:
        parts: regularisers of one shape; sums among them are taken apart.
        tol: `prox` stops where the p_k agree to `tol` of their norm. iterations: at the most.

    Raises:
        ValueError: no parts, or parts of different shapes. TypeError: something without `value` and `prox`.

    Cost of `prox`: that of every part, tens to hundreds of times.
    """

    exact_prox = False
    summands: tuple[Any, ...]

    def __new__(cls, parts: Sequence[Any] = (), **options: Any) -> RegularizerSum:
        if cls is RegularizerSum and parts and all(isinstance(p, HasDensity) for p in parts):
            return super().__new__(_WithDensity)
        return super().__new__(cls)

    def __init__(self, parts: Sequence[Any], *, tol: float = 1e-6, iterations: int = 500) -> None:
        flat: list[Any] = []
        for p in parts:
            if not (hasattr(p, "value") and hasattr(p, "prox")):
                raise TypeError(f"A part of RegularizerSum is a {type(p).__name__}, which is no regulariser.")
            flat += list(p.summands) if isinstance(p, RegularizerSum) else [p]
        shapes = {tuple(p.shape) for p in flat}
        if len(shapes) != 1:
            raise ValueError(f"RegularizerSum needs parts of one shape, got {sorted(shapes)}.")
        grids = [p.grid for p in flat if p.grid is not None]
        super().__init__(flat[0].shape, 1.0, grid=grids[0] if grids else None)
        self.summands, self.tol, self.iterations = (
            tuple(flat),
            _positive(tol, "The tol of RegularizerSum"),
            int(iterations),
        )
        self.convex = all(p.convex for p in flat)
        self.takes_complex = all(p.takes_complex for p in flat)

    @classmethod
    def examples(cls) -> list[RegularizerSum]:
        from invgen.priors.regularizers import L1, L2, Box
        from invgen.priors.wavelet_sparsity import WaveletSparsity

        return [
            cls([L1((1, 8, 4), 0.4), WaveletSparsity((1, 8, 4), 0.3, levels=2)], tol=1e-8, iterations=1000),
            cls([L1((6,), 0.4), L2((6,), 0.8), Box((6,), -1.0, 0.7)], tol=1e-8, iterations=1000),
        ]

    def value(self, x: Tensor) -> Tensor:
        """Σ_k w_k R_k(x), `(batch,)`."""
        self._check(x, "value")
        return torch.stack([p.penalty(x) for p in self.summands]).sum(0)

    def parts(self) -> list[tuple[LinearOperator | None, Any]]:
        """The parts of every part, with their weights times that of the sum."""
        return [pair for p in self.summands for pair in p.reweighted(self.weight * p.weight).parts()]

    def reweighted(self, weight: float) -> Any:
        """The sum with its weight, which multiplies those of the parts, replaced."""
        return super().reweighted(weight)

    @torch.no_grad()
    def _prox(self, x: Tensor, step: Tensor) -> Tensor:
        count = len(self.summands)
        lam = count * step.expand(x.shape[0], *step.shape[1:]).reshape(-1)
        z = [x for _ in self.summands]
        y, active = x, torch.ones_like(lam, dtype=torch.bool).reshape(-1, *(1,) * (x.ndim - 1))
        for _ in range(self.iterations):
            p = [part.prox(v, lam) for part, v in zip(self.summands, z, strict=True)]
            new = torch.stack(p).mean(0)
            # Σ (z_k − p_k)/m = x − y' throughout, with z_k − p_k in m ∂f_k(p_k): optimal once all p_k agree
            apart = torch.stack([torch.linalg.vector_norm((new - v).flatten(1), dim=1) for v in p]).amax(0)
            z = [torch.where(active, new + v - each, v) for v, each in zip(z, p, strict=True)]
            y = torch.where(active, new, y)
            active = active & (apart > self.tol * torch.linalg.vector_norm(new.flatten(1), dim=1)).reshape(active.shape)
            if not bool(active.any()):
                break
        for part in self.summands:
            if getattr(part, "indicator", False):  # bounds hold exactly, not only in the limit
                y = part.prox(y, 1.0)
        return y


class _WithDensity(Density, RegularizerSum):
    pass
