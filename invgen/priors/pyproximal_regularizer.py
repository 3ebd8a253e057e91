"""Any proximal operator of PyProximal as a regulariser of batches of torch tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from invgen.grid import Grid
from invgen.priors._regularizer import Regularizer

__all__ = ["PyProximalRegularizer"]


class PyProximalRegularizer(Regularizer):
    """R(x) and prox of a `pyproximal.ProxOperator`, item after item through NumPy.

        R(x) = op(x.ravel()),        prox(x, step) = op.prox(x.ravel(), step · w)

    Args:
        op: the operator, on flat vectors of prod(shape) entries (its own `sigma` stays part of R).
        shape: of one model. weight: w, multiplies R.
        convex: declare R convex. PyProximal does not say: False refuses it to solvers that need convexity, and keeps
            solvers from treating e^{−w R} as a density.
        takes_complex: op works on complex vectors. grid: where the model lives.

    Has `log_prob` where `convex`. Gradients do not pass through it.

    Raises:
        TypeError: an op without `prox`, or complex models where they were not declared.
    """

    exact_prox = False

    def __new__(cls, op: Any = None, *args: Any, convex: bool = False, **options: Any) -> PyProximalRegularizer:
        return super().__new__(_Convex if cls is PyProximalRegularizer and convex else cls)

    def __init__(
        self,
        op: Any,
        shape: tuple[int, ...] | None = None,
        weight: float = 1.0,
        *,
        convex: bool = False,
        takes_complex: bool = False,
        grid: Grid | None = None,
    ) -> None:
        if not callable(getattr(op, "prox", None)) or not callable(op):
            raise TypeError(f"PyProximalRegularizer needs a pyproximal.ProxOperator, got {type(op).__name__}.")
        super().__init__(shape, weight, grid=grid)
        self.op, self.convex, self.takes_complex = op, bool(convex), bool(takes_complex)

    @classmethod
    def examples(cls) -> list[PyProximalRegularizer]:
        import pyproximal

        return [cls(pyproximal.L1(sigma=0.7), (1, 3, 4), 1.5, convex=True), cls(pyproximal.SCAD(0.5), (6,))]

    def _rows(self, x: Tensor) -> np.ndarray:
        return x.detach().cpu().numpy().reshape(len(x), -1)

    def value(self, x: Tensor) -> Tensor:
        """op(x), `(batch,)`; an indicator that answers False is ∞."""
        self._check(x, "value")
        found = [self.op(row.copy()) for row in self._rows(x)]
        numbers = [(0.0 if v else np.inf) if isinstance(v, (bool, np.bool_)) else float(v) for v in found]
        return torch.tensor(numbers, dtype=x.real.dtype, device=x.device)

    def _prox(self, x: Tensor, step: Tensor) -> Tensor:
        steps = step.expand(x.shape[0], *step.shape[1:]).flatten().tolist()
        # PyProximal refuses a zero step, whose answer is the point itself
        rows = [self.op.prox(r.copy(), t) if t > 0 else r for r, t in zip(self._rows(x), steps, strict=True)]
        return torch.from_numpy(np.stack([np.asarray(r).reshape(x.shape[1:]) for r in rows])).to(x)


class _Convex(PyProximalRegularizer):
    def log_prob(self, x: Tensor) -> Tensor:
        """−w op(x), `(batch,)`: the log-density up to a constant."""
        return -self.penalty(x)
