"""Velocity models of several families in one stream: what a prior that does not know the family is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np

from invgen.data._stream import Stream, check_draw
from invgen.data.velocity import VelocityFamily, VelocityModels
from invgen.grid import Grid

__all__ = ["VelocityMixture"]

Array = np.ndarray

_FAMILIES: tuple[VelocityFamily, ...] = get_args(VelocityFamily)
_NUMBERS = 64  # uniform numbers a layered model is made from, as in `VelocityModels`


@dataclass(frozen=True)
class VelocityMixture(Stream):
    """Random velocity models of all families of `VelocityModels`, a model's family drawn with its own random numbers:

        p(v) = Σ_k w_k p(v | family k),   w_k ≥ 0,  Σ_k w_k = 1.

    Item i depends on (seed, i) only, its family included; within a family the law is that of `VelocityModels`.

    Attributes:
        shares: w of FlatVel_A, FlatVel_B, CurveVel_A, CurveVel_B, FlatFault_A, FlatFault_B, CurveFault_A, CurveFault_B,
            Style_A, Style_B, in this order; they are scaled to sum 1. Curved and faulted layers have most by default.
        shape: (nz, nx) samples.
        spacing: (dz, dx) in m.
        velocity: smallest and largest velocity in km/s.
        layers: fewest and most layers of a layered model, at most 12.

    Raises:
        ValueError: shares that are not ten non-negative numbers with a positive sum, and what `VelocityModels` refuses.

    Cost: 0.1 to 0.4 ms of one CPU core for 64×64 samples, by the share of the style families.
    """

    shares: tuple[float, ...] = (0.08, 0.08, 0.12, 0.12, 0.1, 0.1, 0.15, 0.15, 0.05, 0.05)
    shape: tuple[int, int] = (64, 64)
    spacing: tuple[float, float] = (10.0, 10.0)
    velocity: tuple[float, float] = (1.5, 4.5)
    layers: tuple[int, int] = (2, 5)

    def __post_init__(self) -> None:
        good = len(self.shares) == len(_FAMILIES) and all(np.isfinite(w) and w >= 0 for w in self.shares)
        if not good or sum(self.shares) <= 0:
            raise ValueError(
                f"shares must be {len(_FAMILIES)} non-negative numbers, not all zero, one for each of {', '.join(_FAMILIES)}, got {self.shares}."
            )
        self._model(_FAMILIES[0])

    def _model(self, family: VelocityFamily) -> VelocityModels:
        return VelocityModels(family, self.shape, self.spacing, self.velocity, self.layers)

    @property
    def grid(self) -> Grid:
        """Axes z and x in m, velocity in km/s."""
        return self._model(_FAMILIES[0]).grid

    def families(self, n: int, *, seed: int = 0, start: int = 0) -> list[VelocityFamily]:
        """The families of the items that `sample(n, seed=seed, start=start)` returns."""
        check_draw(n, seed, start)
        return [self._family(rng) for rng in self._generators(seed, range(start, start + n))]

    def _family(self, rng: np.random.Generator) -> VelocityFamily:
        """The family of one item, from the first of its random numbers."""
        edges = np.cumsum(self.shares, dtype=float)
        edges /= edges[-1]  # exactly 1 at the end: no uniform number falls beyond it, or on a family without a share
        return _FAMILIES[int(np.searchsorted(edges, rng.random(), side="right"))]

    def _draw(self, seed: int, numbers: range) -> Array:
        generators = self._generators(seed, numbers)
        families = [self._family(rng) for rng in generators]
        out = np.empty((len(numbers), 1, *self.shape), dtype=np.float32)
        for family in dict.fromkeys(families):
            rows = [i for i, name in enumerate(families) if name == family]
            model = self._model(family)
            if family.startswith("Style"):
                out[rows, 0] = np.stack([model._style(generators[i]) for i in rows])
            else:
                u = np.stack([generators[i].random(_NUMBERS) for i in rows]).astype(np.float32)
                out[rows, 0] = model._layered(u)
        return out
