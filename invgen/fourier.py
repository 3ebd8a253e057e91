"""Filters of real fields by real FFTs, with derivatives that are filters as well."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["filter_real", "half_of"]


def half_of(gain: Tensor) -> Tensor:
    """The columns of a full-grid gain that `rfftn` keeps; a gain that is constant along its last axis stays."""
    return gain[..., : gain.shape[-1] // 2 + 1] if gain.ndim and gain.shape[-1] > 1 else gain


def filter_real(v: Tensor, gain: Tensor, padded: tuple[int, ...], spatial: tuple[int, ...] | None = None) -> Tensor:
    """P F⁻¹ K F Pᵀ v of real fields: pad with zeros, multiply by K in the Fourier domain, cut out.

    Args:
        v: `(batch, …, *spatial)`, real. gain: K on the half grid of `rfftn`, broadcasting against the spectrum; the
            transform of a real kernel: K(−k) = K̄(k). padded: the FFT grid, at least as large as the field.
        spatial: what is cut out; the size of v when omitted.

    Returns:
        `(batch, …, *spatial)`.

    The transpose is the same filter with K̄, so a vector–Jacobian product costs one pair of real FFTs; a graph through
    `rfftn` goes back by a complex FFT of the full grid. A gain that needs gradients goes through such a graph.
    """
    spatial = tuple(v.shape[-len(padded) :]) if spatial is None else tuple(spatial)
    if gain.requires_grad:
        return _filter(v, gain, padded, spatial)
    out: Tensor = _Filter.apply(v, gain, padded, spatial)
    return out


def _filter(v: Tensor, gain: Tensor, padded: tuple[int, ...], spatial: tuple[int, ...]) -> Tensor:
    axes = tuple(range(-len(padded), 0))
    out = torch.fft.irfftn(torch.fft.rfftn(v, s=padded, dim=axes) * gain, s=padded, dim=axes)
    # a view would not do as the result of a function with derivatives of its own
    return out if spatial == tuple(padded) else out[(..., *(slice(n) for n in spatial))].contiguous()


class _Filter(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, gain: Tensor, padded: tuple[int, ...], spatial: tuple[int, ...]) -> Tensor:
        return _filter(v, gain, padded, spatial)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        v, gain, ctx.padded, ctx.spatial = inputs
        ctx.shape = v.shape
        ctx.save_for_backward(gain)
        ctx.save_for_forward(v, gain)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        (gain,) = ctx.saved_tensors
        back = gain.conj() if gain.is_complex() else gain
        out = filter_real(cotangent, back, ctx.padded, tuple(ctx.shape[-len(ctx.padded) :]))
        return out.sum_to_size(ctx.shape), None, None, None  # one field may have met a gain an item

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, gain_tangent: Tensor | None, *_: Any) -> Any:
        v, gain = ctx.saved_tensors
        parts = [] if tangent is None else [filter_real(tangent, gain, ctx.padded, ctx.spatial)]
        parts += [] if gain_tangent is None else [filter_real(v, gain_tangent, ctx.padded, ctx.spatial)]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]
