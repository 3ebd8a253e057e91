"""Channels: meandering rivers in plan view (Howard–Knutson) and half-circle channels in cross-section (Mosser et al.)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from invgen.data._rivers import Rivers
from invgen.data._stream import Stream, check_lengths, check_range, check_shape
from invgen.grid import Grid

__all__ = ["HalfCircleChannels", "MeanderingChannels"]

Array = np.ndarray
Range = tuple[float, float]


@dataclass(frozen=True)
class MeanderingChannels(Stream):
    """Horizontal slices through the deposits of meandering rivers: a stationary random field of channel facies.

    Parallel belts, `belt_spacing` apart, are each the history of one river: a centreline that migrates by the curvature
    law of Howard and Knutson (1984; equations in `invgen.data._meanders`), cuts off its necks (oxbow lakes), leaves
    point bars behind and is now and then relocated by an avulsion, while its bed aggrades. The slice holds what was
    deposited at its level last: the bed is a parabola of depth D, so that a river whose water surface stands u·D above
    the slice is W √(1 − u) wide in it, and what a river did while its surface was below the slice lies deeper and is
    not seen. Belts are independent of each other and lie over each other in random order.

    The law is stationary and does not depend on `shape`: a window of a large image is distributed like a small image.

    Attributes:
        shape: (ny, nx) pixels.
        spacing: (dy, dx) in m. All sizes below are in m: the grid does not change the rivers.
        quantity: "channel" 1 in channels, active or abandoned, else 0; "sand" 1 in point bars and active channels, else
            0; "facies" 0 floodplain mud, 1 point bar, 2 channel, 3 abandoned channel (oxbow lakes, avulsed reaches).
        width: bankfull width W of a river in m, uniform between the two.
        aspect: W/D, uniform. Bends are about 8.25 W/(2 · friction · aspect) long, 11 W at 33.
        azimuth: direction of the valley in degrees from +x towards +y, uniform, one for each image.
        age: simulated time in units of W/k_l (a bend at the limit of tightness migrates one width), uniform. Necks
            begin to be cut off near 8; deposits of the first 30 % are not recorded.
        belt_spacing: distance between the axes of belts in m (each shifted by up to 15 % of it).
        aggradation: rise of the river during its age in depths D, uniform.
        level: depth of the slice below the final water surface in depths D, uniform, below 1.
        avulsions: mean number of avulsions in 30 widths of valley during the age of a belt; each relocates 8 to 24 widths.
        friction: Chézy-like friction coefficient C_f.

    Cost: about 7 ms of one CPU core for a 64×64 image in blocks of 64 (30 ms alone), 20 ms for 128×128; grows with the age.

    Reference: Howard and Knutson (1984), Sufficient conditions for river meandering: a simulation approach, Water
    Resources Research 20(11), 1659–1667, doi:10.1029/WR020i011p01659. What differs from the paper: belts are periodic
    along the valley, and cutoffs, bars, aggradation and avulsions follow the plain rules above.
    """

    shape: tuple[int, int] = (64, 64)
    spacing: tuple[float, float] = (50.0, 50.0)
    quantity: Literal["channel", "sand", "facies"] = "channel"
    width: Range = (150.0, 270.0)
    aspect: Range = (25.0, 40.0)
    azimuth: Range = (-30.0, 30.0)
    age: Range = (7.0, 20.0)
    belt_spacing: float = 2800.0
    aggradation: Range = (0.0, 1.0)
    level: Range = (0.0, 0.4)
    avulsions: float = 0.5
    friction: float = 0.011

    def __post_init__(self) -> None:
        check_shape(self.shape, 1)
        check_lengths("spacing", self.spacing, 2, "m")
        if self.quantity not in ("channel", "sand", "facies"):
            raise ValueError(f"quantity must be 'channel', 'sand' or 'facies', got {self.quantity!r}.")
        check_range("width", self.width, 1e-3, 1e5, "m")
        check_range("aspect", self.aspect, 5.0, 200.0, "width over depth")
        check_range("azimuth", self.azimuth, -360.0, 360.0, "degrees")
        check_range("age", self.age, 0.5, 200.0, "widths over migration constant")
        check_range("aggradation", self.aggradation, 0.0, 100.0, "depths")
        check_range("level", self.level, 0.0, 0.95, "depths")
        check_lengths("belt_spacing and friction", (self.belt_spacing, self.friction), 2, "m and a coefficient")
        if not (np.isfinite(self.avulsions) and 0.0 <= self.avulsions <= 100.0):
            raise ValueError(f"avulsions must be a mean number between 0 and 100, got {self.avulsions}.")
        if self.width[0] * np.sqrt(1.0 - self.level[1]) < max(self.spacing):
            raise ValueError(
                f"A river {self.width[0]:g} m wide is less than one pixel wide in a slice at level {self.level[1]:g} on a "
                f"grid of {self.spacing} m; take wider rivers or a finer grid."
            )

    @property
    def grid(self) -> Grid:
        """Axes y and x in m."""
        return Grid(self.shape, self.spacing, axes=("y", "x"), units=("m", "m"), channels=(self.quantity,))

    def _draw(self, seed: int, numbers: range) -> Array:
        law = Rivers(
            self.shape, self.spacing, self.width, self.aspect, self.azimuth, self.age, self.belt_spacing,
            self.aggradation, self.level, self.avulsions, self.friction,
        )  # fmt: skip
        codes = law.facies(self._generators(seed, numbers))[:, None]
        if self.quantity == "channel":
            codes = codes >= 2
        elif self.quantity == "sand":
            codes = (codes == 1) | (codes == 2)
        return codes.astype(np.float32)


@dataclass(frozen=True)
class HalfCircleChannels(Stream):
    """Vertical sections of sand channels with half-circle cross-sections in finely layered shale.

    The object model that Mosser, Dubrule and Blunt (2020) train their generator on, in the form of a Boolean model:
    half-discs, flat side up, whose centres are a Poisson process; later ones cut earlier ones. The sand covers a share
    p = 1 − exp(−λ π E[r²]/2) of the section, λ the centres an area, and λ is chosen for the wanted p. Shale is layers of
    one sample with independent velocities; every channel has one velocity. Density follows Gardner's relation
    ρ = 1.741 v^0.25 (g/cm³, v in km/s) times a scatter of 2 % per layer and channel.

    The facies geometry is theirs; the numbers below are chosen to reproduce the range of their velocities (1.61 to 2.91
    km/s) and are not from the paper.

    Attributes:
        shape: (nz, nx) samples.
        spacing: (dz, dx) in m.
        quantity: "facies" 1 in sand, else 0; "velocity" in km/s; "density" in g/cm³; "all" for the three as channels.
        radius: of the channels in m, uniform between the two.
        proportion: of sand, the expected one of an image, uniform between the two.
        shale, sand: velocities in km/s, uniform between the two.

    Cost: about 1 ms for 64×128 samples.

    Reference: Mosser, Dubrule and Blunt (2020), Stochastic seismic waveform inversion using generative adversarial
    networks as a geological prior, Mathematical Geosciences 52, 53–79, arXiv:1806.03720.
    """

    shape: tuple[int, int] = (64, 128)
    spacing: tuple[float, float] = (10.0, 10.0)
    quantity: Literal["facies", "velocity", "density", "all"] = "facies"
    radius: Range = (50.0, 140.0)
    proportion: Range = (0.3, 0.6)
    shale: Range = (1.6, 2.0)
    sand: Range = (2.6, 2.9)

    def __post_init__(self) -> None:
        check_shape(self.shape, 1)
        check_lengths("spacing", self.spacing, 2, "m")
        if self.quantity not in ("facies", "velocity", "density", "all"):
            raise ValueError(f"quantity must be 'facies', 'velocity', 'density' or 'all', got {self.quantity!r}.")
        check_range("radius", self.radius, 1e-3, 1e5, "m")
        check_range("proportion", self.proportion, 0.0, 0.99, "share of sand")
        check_range("shale", self.shale, 0.1, 10.0, "km/s")
        check_range("sand", self.sand, 0.1, 10.0, "km/s")

    @property
    def grid(self) -> Grid:
        """Axes z and x in m, the channels with their units."""
        units = {"facies": "", "velocity": "km/s", "density": "g/cm3"}
        names = tuple(units) if self.quantity == "all" else (self.quantity,)
        unit = tuple(units[name] for name in names)
        return Grid(self.shape, self.spacing, units=("m", "m"), channels=names, channel_units=unit)

    def _draw(self, seed: int, numbers: range) -> Array:
        channels = 3 if self.quantity == "all" else 1
        out = np.empty((len(numbers), channels, *self.shape), dtype=np.float32)
        for i, rng in enumerate(self._generators(seed, numbers)):
            out[i] = self._section(rng)
        return out

    def _section(self, rng: np.random.Generator) -> Array:
        (nz, nx), (dz, dx) = self.shape, self.spacing
        most = self.radius[1]
        low, high = self.radius
        mean_area = np.pi / 6.0 * (low * low + low * high + high * high)  # half of π E[r²]
        density = -np.log1p(-rng.uniform(*self.proportion)) / mean_area
        # Centres of all the half-discs that can touch the section.
        size = np.array([nz * dz + most, nx * dx + 2.0 * most])
        count = int(rng.poisson(density * size[0] * size[1]))
        centre = rng.random((count, 2)) * size - most
        radius = rng.uniform(low, high, count)
        below = np.arange(nz) * dz - centre[:, :1]
        aside = np.arange(nx) * dx - centre[:, 1:]
        owner = np.full((nz, nx), -1)
        for k in range(count):
            rows = np.flatnonzero((below[k] >= 0.0) & (below[k] <= radius[k]))
            columns = np.flatnonzero(np.abs(aside[k]) <= radius[k])
            if rows.size and columns.size:
                window = owner[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
                window[below[k, rows, None] ** 2 + aside[k, columns] ** 2 <= radius[k] ** 2] = k
        facies = owner >= 0
        layers, bodies = rng.uniform(*self.shale, nz), rng.uniform(*self.sand, count)
        velocity = np.where(facies, np.append(bodies, 0.0)[owner], layers[:, None])
        scatter = np.where(facies, rng.normal(1.0, 0.02, count + 1)[owner], rng.normal(1.0, 0.02, nz)[:, None])
        density_map = 1.741 * velocity**0.25 * scatter
        if self.quantity == "all":
            return np.stack([facies, velocity, density_map]).astype(np.float32)
        return {"facies": facies, "velocity": velocity, "density": density_map}[self.quantity][None].astype(np.float32)
