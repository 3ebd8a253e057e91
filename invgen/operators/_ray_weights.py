"""Where rays meet a pixelated source: the pixels each one reads, and their weights."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from invgen.grid import Grid

__all__: list[str] = []

Edge = Literal["zero", "extrapolate"]
Interpolation = Literal["bilinear", "cubic"]


def _taps(fraction: Tensor, kind: Interpolation) -> tuple[int, list[Tensor]]:
    """First tap relative to the pixel below, and the weight of each."""
    if kind == "bilinear":
        return 0, [1 - fraction, fraction]
    f = fraction  # Keys (1981), a = −1/2: passes through the pixels, with a continuous derivative
    return -1, [
        ((-0.5 * f + 1) * f - 0.5) * f,
        (1.5 * f - 2.5) * f * f + 1,
        ((-1.5 * f + 2) * f + 0.5) * f,
        (0.5 * f - 0.5) * f * f,
    ]


def _axis(position: Tensor, n: int, edge: Edge, kind: Interpolation) -> tuple[list[Tensor], list[Tensor]]:
    """Pixel indices and weights along one axis; pixels beyond the frame have weight zero.

    Args:
        position: in pixels from the centre of the first one. NaN stays NaN in the weights.
    """
    # rays far away all read nothing, and their index must fit an integer
    below = torch.nan_to_num(position.detach().clamp(-4.0, n + 4.0).floor())
    inside = None
    if edge == "extrapolate":
        inside = (position >= -0.5) & (position <= n - 0.5) | position.isnan()
        below = below.clamp(0, max(n - 2, 0))
    fraction = torch.where((position > -4) & (position < n + 4) | position.isnan(), position - below, 0.0)
    start, weights = _taps(fraction, kind)
    index = below.long()
    indices, kept = [], []
    for k, weight in enumerate(weights):
        tap = index + (start + k)
        seen = (tap >= 0) & (tap < n)
        seen = seen if inside is None else seen & inside
        indices.append(tap.clamp(0, n - 1))
        kept.append(torch.where(seen | position.isnan(), weight, torch.zeros_like(weight)))
    return indices, kept


def ray_weights(
    beta_y: Tensor, beta_x: Tensor, grid: Grid, edge: Edge = "zero", kind: Interpolation = "bilinear"
) -> tuple[Tensor, Tensor]:
    """Flat pixel indices and weights, `(*rays, taps)` each: 4 taps for bilinear, 16 for cubic interpolation.

    Args:
        beta_y, beta_x: where rays meet the source plane, in the grid's unit.
        edge: "zero", the source is zero beyond its outermost pixel centres' neighbours, so that it fades within one
            pixel; "extrapolate", the outermost cell is continued to the pixels' edge, and zero from there.

    The weights carry the derivative with respect to the rays.
    """
    n_y, n_x = grid.shape
    rows, row_weights = _axis((beta_y - grid.origin[0]) / grid.spacing[0], n_y, edge, kind)
    columns, column_weights = _axis((beta_x - grid.origin[1]) / grid.spacing[1], n_x, edge, kind)
    index = torch.stack([r * n_x + c for r in rows for c in columns], dim=-1)
    weight = torch.stack([a * b for a in row_weights for b in column_weights], dim=-1)
    return index, weight


def outside(beta_y: Tensor, beta_x: Tensor, grid: Grid) -> Tensor:
    """Which rays miss the source's pixels, edges included."""
    found = torch.zeros_like(beta_y, dtype=torch.bool)
    for beta, n, d, o in zip((beta_y, beta_x), grid.shape, grid.spacing, grid.origin, strict=True):
        p = (beta - o) / d
        found |= (p < -0.5) | (p > n - 0.5)
    return found
