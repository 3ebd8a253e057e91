"""Where an image is taken: its pixels, the rays behind them, the point-spread function and the mask."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from invgen.grid import Grid
from invgen.operators._linear_map import LinearMap
from invgen.operators._point_spread import Folding, PointSpread, check_psf

__all__: list[str] = []

Quantity = Literal["surface_brightness", "flux"]


def sky_grid(
    shape: tuple[int, int],
    spacing: float | tuple[float, float],
    *,
    center: tuple[float, float] = (0.0, 0.0),
    channels: tuple[str, ...] = ("flux",),
    channel_units: tuple[str, ...] = (),
) -> Grid:
    """Pixels of the sky in arcsec: axes y (up) and x, the middle of the frame at `center`.

    Args:
        shape: (height, width). spacing: arcsec a pixel, one number or (dy, dx). center: (y, x).
        channels, channel_units: what a pixel holds.
    """
    d = (spacing, spacing) if isinstance(spacing, (int, float)) else tuple(spacing)
    origin = tuple(c - 0.5 * step * (n - 1) for c, step, n in zip(center, d, shape, strict=True))
    return Grid(tuple(shape), d, origin, ("y", "x"), ("arcsec", "arcsec"), channels, channel_units)


class ImagePlane:
    """Pixels of an image, and of what the point-spread function reaches of its surroundings (the frame).

    Args:
        grid: of the image, see `sky_grid`. psf, oversampling, mask, quantity: as in `GravitationalLens`.

    Attributes:
        data_shape: `(1, H, W)`, or `(n,)` with a mask. folding: from the frame to the data.
    """

    def __init__(
        self, grid: Grid, psf: Tensor | None, oversampling: int, mask: Tensor | None, quantity: Quantity
    ) -> None:
        check_grid(grid, "image_grid")
        if quantity not in ("surface_brightness", "flux"):
            raise ValueError(f'quantity must be "surface_brightness" or "flux", got {quantity!r}.')
        if not isinstance(oversampling, int) or oversampling < 1:
            raise ValueError(f"oversampling must be a whole number of rays a pixel and axis, got {oversampling!r}.")
        image: tuple[int, int] = grid.shape  # type: ignore[assignment]
        self.grid, self.oversampling, self.quantity = grid, oversampling, quantity
        self.pixel_area = math.prod(grid.spacing)
        self.spread = None if psf is None else PointSpread(check_psf(psf, image), image)
        self.picked = _check_mask(mask, image)
        self.folding = Folding(self.spread, self.picked)
        self.data_shape = (1, *image) if self.picked is None else (len(self.picked),)
        self.frame = image if self.spread is None else self.spread.frame

    @property
    def mask(self) -> Tensor | None:
        """Boolean `(H, W)`."""
        if self.picked is None:
            return None
        mask = torch.zeros(math.prod(self.grid.shape), dtype=torch.bool)
        mask[self.picked] = True
        return mask.reshape(self.grid.shape)

    @property
    def psf(self) -> Tensor | None:
        """The kernel, float64."""
        return None if self.spread is None else self.spread.kernel

    def axes(self) -> tuple[Tensor, Tensor]:
        """y `(rows, s)` and x `(columns, s)` of the rays of the frame's pixels, float64."""
        s, before = self.oversampling, (0, 0) if self.spread is None else self.spread.before
        within = (torch.arange(s, dtype=torch.float64) + 0.5) / s - 0.5
        y, x = (
            o + d * (torch.arange(n, dtype=torch.float64)[:, None] - b + within)
            for n, b, d, o in zip(self.frame, before, self.grid.spacing, self.grid.origin, strict=True)
        )
        return y, x

    def positions(self) -> tuple[Tensor, Tensor]:
        """(y, x) of the rays, float64 `(rows, s²)`: a row for each pixel of the frame, or for each measured one
        where there is no PSF that would mix them."""
        (rows, columns), s, (H, W) = self.axes(), self.oversampling, self.frame
        y = rows[:, None, :, None].expand(H, W, s, s).reshape(H * W, s * s)
        x = columns[None, :, None, :].expand(H, W, s, s).reshape(H * W, s * s)
        return (y, x) if self.spread is not None or self.picked is None else (y[self.picked], x[self.picked])

    def image(self, brightness: Tensor) -> Tensor:
        """Data `(batch, *data_shape)` of the surface brightness at the rays, `(batch, rows, s²)`."""
        seen = brightness.mean(2) * (self.pixel_area if self.quantity == "flux" else 1.0)
        out: Tensor = LinearMap.apply(seen, self.folding, False)
        return out.reshape(-1, *self.data_shape)

    def measured(self, rows: Tensor) -> Tensor:
        """A value for each row of the rays, of the measured pixels alone."""
        if self.spread is not None:
            (top, left), (H, W) = self.spread.before, self.grid.shape
            rows = rows.reshape(self.frame)[top : top + H, left : left + W].flatten()
            return rows if self.picked is None else rows[self.picked]
        return rows


def check_grid(grid: Grid, what: str) -> None:
    if tuple(grid.axes) != ("y", "x") or tuple(grid.units) != ("arcsec", "arcsec"):
        raise ValueError(
            f'{what} must have the axes ("y", "x") in ("arcsec", "arcsec"), got {grid.axes} in {grid.units}; state them, or make it with sky_grid(shape, pixel_scale).'
        )
    if len(grid.channels) != 1 or min(grid.shape) < 2:
        raise ValueError(
            f"{what} must have one channel and two pixels an axis at the least, got {len(grid.channels)} and {grid.shape}; use one operator a band."
        )


def _check_mask(mask: Tensor | None, image: tuple[int, ...]) -> Tensor | None:
    """Flat positions of the measured pixels."""
    if mask is None:
        return None
    mask = torch.as_tensor(mask)
    if mask.dtype != torch.bool or tuple(mask.shape) != tuple(image):
        raise ValueError(
            f"The mask must be boolean with the image's shape {tuple(image)}, True where measured, got {mask.dtype} {tuple(mask.shape)}."
        )
    if not bool(mask.any()):
        raise ValueError("The mask leaves no pixel; it needs True where a pixel was measured.")
    return mask.flatten().nonzero().flatten()
