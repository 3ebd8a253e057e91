"""The PyLops side of the bridge; imported only when it is crossed."""

from __future__ import annotations

import numpy as np
import pylops
import torch

from invgen.contracts import LinearOperator

__all__ = ["PyLopsView"]


class PyLopsView(pylops.LinearOperator):
    """A PyLops operator around an invgen one: numpy in, numpy out."""

    def __init__(self, operator: LinearOperator, dtype: np.dtype) -> None:
        self.operator = operator
        super().__init__(
            dtype=dtype, dims=operator.model_shape, dimsd=operator.data_shape, name=type(operator).__name__
        )

    def _run(self, columns: np.ndarray, forward: bool) -> np.ndarray:
        """All columns as one batch."""
        shape = self.operator.model_shape if forward else self.operator.data_shape
        items = torch.from_numpy(np.ascontiguousarray(columns.T)).reshape(-1, *shape)
        with torch.no_grad():
            out = self.operator(items) if forward else self.operator.adjoint(items)
        return out.resolve_conj().flatten(1).cpu().numpy().T

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return self._run(np.reshape(x, (-1, 1)), True)[:, 0]

    def _rmatvec(self, x: np.ndarray) -> np.ndarray:
        return self._run(np.reshape(x, (-1, 1)), False)[:, 0]

    def _matmat(self, X: np.ndarray) -> np.ndarray:
        return self._run(X, True)

    def _rmatmat(self, X: np.ndarray) -> np.ndarray:
        return self._run(X, False)
