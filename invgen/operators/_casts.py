"""Tensors derived from an operator's matrix, made once for each dtype and device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Casts"]


class Casts:
    """A cache that is empty again after pickling or copying.

    Derived tensors are kept in double precision under their name and cast on first use, so that a decomposition is
    computed once and never in single precision.
    """

    def __init__(self) -> None:
        self._kept: dict[Any, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": {}}

    def __call__(self, name: str, like: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """`make()` in the precision and on the device of `like`; stays complex where it is complex."""
        key = (name, like.dtype, like.device)
        if key not in self._kept:
            # a tensor born under inference_mode could not take part in a gradient later
            with torch.inference_mode(False), torch.no_grad():
                full = self.once(name, make)
                dtype = like.dtype.to_complex() if full.is_complex() and not like.is_complex() else like.dtype
                self._kept[key] = full.to(dtype=dtype, device=like.device).contiguous()
        return self._kept[key]

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """`make()`, remembered as it is."""
        if name not in self._kept:
            with torch.inference_mode(False), torch.no_grad():
                self._kept[name] = make()
        return self._kept[name]
