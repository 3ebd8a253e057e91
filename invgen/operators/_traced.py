"""Rays traced by another program, in the place of a lens model."""

from __future__ import annotations

import torch
from torch import Tensor

from invgen.operators.lens_models import LensModel

__all__: list[str] = []

_NOWHERE = 1e9  # arcsec: no source reaches there


class Traced(LensModel):
    """Source-plane positions of the rays of a regular lattice; a ray beyond it sees nothing.

    Args:
        beta_y, beta_x: `(rows, columns)`, arcsec. y, x: the lattice itself, likewise.

    Raises:
        ValueError: shapes that differ, or numbers that are not finite.
    """

    def __init__(self, beta_y: Tensor, beta_x: Tensor, y: Tensor, x: Tensor) -> None:
        beta = [torch.as_tensor(b).detach().to(torch.float64, copy=True) for b in (beta_y, beta_x)]
        if not all(b.shape == y.shape and bool(torch.isfinite(b).all()) for b in beta):
            raise ValueError(
                f"Rays must be finite and {tuple(y.shape)}, got {tuple(beta[0].shape)} and {tuple(beta[1].shape)}; trace them at GravitationalLens.ray_positions."
            )
        self.__dict__.update(beta=beta, first=(y[0, 0], x[0, 0]), step=(y[1, 0] - y[0, 0], x[0, 1] - x[0, 0]))

    @property
    def parameters(self) -> dict[str, float]:
        return {}

    def rays(self, y: Tensor, x: Tensor, **theta: Tensor | float) -> tuple[Tensor, Tensor]:
        inside, place = torch.ones_like(y, dtype=torch.bool), []
        for v, o, d, n in zip((y, x), self.first, self.step, self.beta[0].shape):  # type: ignore[attr-defined]
            index = ((v - o) / d).round().long()
            inside = inside & (index >= 0) & (index < n)
            place.append(index.clamp(0, n - 1))
        found = [torch.where(inside, b[place[0], place[1]], _NOWHERE) for b in self.beta]  # type: ignore[attr-defined]
        return found[0], found[1]
