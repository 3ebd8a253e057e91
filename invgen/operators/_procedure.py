"""What black boxes share: items one by one, failed ones as NaN, no derivative."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from invgen.contracts import Operator
from invgen.grid import Grid

_LISTED = 1000  # failures kept with their reason; all are counted


class Failure(NamedTuple):
    """One call that gave no data: its number among all calls of the operator, from 0, and why."""

    call: int
    reason: str


class _Values(torch.autograd.Function):
    """The values of a black box; a derivative in either mode is an error that names the operator."""

    @staticmethod
    def forward(x: Tensor, operator: Procedure, theta: dict[str, Tensor]) -> Tensor:
        return operator._values(x, theta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name = type(inputs[1]).__name__

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise TypeError(_no_gradient(ctx.name))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise TypeError(_no_gradient(ctx.name))


def _no_gradient(name: str) -> str:
    return f"{name} is a black box (derivative_order 0) and has no gradient; use a solver without derivatives, such as EnsembleKalmanInversion, or write the operator in PyTorch."


class Procedure(Operator):
    """What a function and a program share: items one by one, failures, types."""

    derivative_order = 0
    vmappable = False

    def __init__(self, model_shape: tuple[int, ...], data_shape: tuple[int, ...], model_grid: Grid | None) -> None:
        super().__init__(model_shape, data_shape, model_grid=model_grid)
        self.calls = self.failure_count = 0
        self.failures: list[Failure] = []

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        return _Values.apply(x, self, theta)

    def _values(self, x: Tensor, theta: dict[str, Tensor]) -> Tensor:
        single = x.dtype in (torch.float32, torch.complex64, torch.float16, torch.bfloat16)
        models = x.detach().cpu().resolve_conj().to(torch.complex128 if x.is_complex() else torch.float64).numpy()
        given = {k: v.detach().cpu().double().reshape(-1).expand(len(models)).numpy() for k, v in theta.items()}
        fit = np.isfinite(models.reshape(len(models), -1)).all(1)
        found: list[np.ndarray | str] = ["the model holds NaN or infinite values, so it was not run"] * len(models)
        rows = [int(i) for i in np.flatnonzero(fit)]
        computed = self._run([models[i] for i in rows], [{k: float(v[i]) for k, v in given.items()} for i in rows])
        for i, result in zip(rows, computed, strict=True):
            found[i] = result
        return torch.from_numpy(self._collected(found, single)).to(x.device)

    def _collected(self, found: Sequence[np.ndarray | str], single: bool) -> np.ndarray:
        """Data of all items, NaN where there are none."""
        made = [r for r in found if not isinstance(r, str)]
        complex_data = any(np.iscomplexobj(r) for r in made)
        kind = (np.complex64 if single else np.complex128) if complex_data else (np.float32 if single else np.float64)
        out = np.full((len(found), *self.data_shape), np.nan, dtype=kind)
        for i, result in enumerate(found):
            if isinstance(result, str):
                self._failed(self.calls + i, result)
                continue
            out[i] = result
            bad = int((~np.isfinite(out[i])).sum())
            if bad:
                self._failed(self.calls + i, f"{bad} of {out[i].size} values of the result are NaN or infinite")
        self.calls += len(found)
        return out

    def _failed(self, call: int, reason: str) -> None:
        self.failure_count += 1
        if len(self.failures) < _LISTED:
            self.failures.append(Failure(call, reason))

    def _run(self, models: list[np.ndarray], theta: list[dict[str, float]]) -> list[np.ndarray | str]:
        """Data of each model, or the reason why there are none."""
        raise NotImplementedError
