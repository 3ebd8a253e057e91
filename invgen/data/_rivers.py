"""From random numbers to slices of river deposits: the belts of each image, their migration, and the painting."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from invgen.data import _meanders as meanders
from invgen.data._painting import paint

Array = np.ndarray
Range = tuple[float, float]

FINEST = 3.0  # shortest wave of an initial centreline, in widths: such waves die out at once
SPIN_UP = 0.3  # share of a belt's life before its deposits are recorded: the nearly straight start is not seen
_LENGTH, _SWING = (8.0, 24.0), 4.0  # valley length of an avulsed course, and how far it swings, in widths


def _between(bounds: Range, uniform: Array) -> Array:
    return bounds[0] + (bounds[1] - bounds[0]) * uniform


@dataclass(frozen=True)
class Rivers:
    """The law of the belts in an image; see `invgen.data.channels.MeanderingChannels` for the meaning of each."""

    shape: tuple[int, int]
    spacing: tuple[float, float]
    width: Range
    aspect: Range
    azimuth: Range
    age: Range
    belt_spacing: float
    aggradation: Range
    level: Range
    avulsions: float
    friction: float

    def facies(self, generators: list[np.random.Generator]) -> Array:
        """(n, ny, nx) int8 codes: 0 floodplain, 1 point bar, 2 channel, 3 abandoned channel."""
        (ny, nx), (dy, dx) = self.shape, self.spacing
        height, length = ny * dy, nx * dx
        lanes = self._lanes()
        angles = np.radians(np.linspace(*self.azimuth, 33))
        along = float(np.max(length * np.abs(np.cos(angles)) + height * np.abs(np.sin(angles))))
        longest = float(_period(along, np.array(self.width[0])))
        modes, events_a_belt = int(longest / FINEST), self.avulsions * longest / 30.0
        n, count = len(generators), lanes.size
        image, uniform, normal, events = np.empty((n, 2)), np.empty((n, count, 7)), np.empty((n, count, 2, modes)), []
        for i, rng in enumerate(generators):
            image[i], uniform[i] = rng.random(2), rng.random((count, 7))
            normal[i] = rng.standard_normal((count, 2, modes))
            events += [rng.random((rng.poisson(events_a_belt), 6)) for _ in range(count)]

        azimuth = np.radians(_between(self.azimuth, image[:, 0]))
        width, age = _between(self.width, uniform[..., 0]), _between(self.age, uniform[..., 1])
        place = (lanes + image[:, 1:] + 0.3 * (uniform[..., 2] - 0.5)) * self.belt_spacing
        half = 0.5 * (length * np.abs(np.sin(azimuth)) + height * np.abs(np.cos(azimuth)))
        item, lane = np.nonzero(np.abs(place) < half[:, None] + _reach(width, age))
        width, age, place, other = width[item, lane], age[item, lane], place[item, lane], uniform[item, lane, 3:].T
        aspect, rise, level = (_between(b, u) for b, u in zip((self.aspect, self.aggradation, self.level), other))
        alpha = 2.0 * self.friction * aspect
        period = _period(along, width)
        # Waves of the initial centreline lie around the fastest growing one, 2π/(0.76 alpha). Their power per wavenumber
        # does not depend on the period, which is a matter of the image's size.
        wavelength = period[:, None] / np.arange(1, modes + 1)
        amplitude = (
            0.5 * np.sqrt(30.0 / period[:, None]) * np.exp(-2.0 * np.log(wavelength * alpha[:, None] / 8.25) ** 2)
        )
        cosine, sine = np.moveaxis(normal[item, lane] * amplitude[:, None], 1, 0)
        # A water surface below the slice leaves nothing in it.
        shown = np.where(rise > level, level / np.maximum(rise, 1e-9), 1.0)
        since = age * np.maximum(SPIN_UP, 1.0 - shown)
        avulsions = [
            [
                (t * age[b], place, _LENGTH[0] + (_LENGTH[1] - _LENGTH[0]) * u, _SWING * (2.0 * v - 1.0), phase)
                for t, place, u, v, phase, w in events[k].tolist()
                if w * longest < period[b]  # as many for a length of valley, whatever the period
            ]
            for b, k in enumerate((item * count + lane).tolist())
        ]
        record = meanders.migrate(meanders.Belts(alpha, period, age, since, cosine, sine, avulsions))

        belt, time, code, x, y = (
            np.concatenate(v) for v in (record.belt, record.time, record.code, record.x, record.y)
        )
        # The bed is a parabola: at depth u·D below the water surface the channel is W √(1 − u) wide.
        depth = np.maximum(level[belt] - rise[belt] * (1.0 - time / age[belt]), 0.0)
        radius = 0.5 * width[belt] * np.sqrt(1.0 - depth)
        x = (x - period[belt] * np.rint(x / period[belt])) * width[belt]
        y = y * width[belt] + place[belt]
        owner = item[belt]
        cos, sin = np.cos(azimuth)[owner], np.sin(azimuth)[owner]
        row = (x * sin + y * cos) / dy + 0.5 * (ny - 1)
        column = (x * cos - y * sin) / dx + 0.5 * (nx - 1)
        near_y, near_x = radius / dy + 0.5, radius / dx + 0.5
        inside = (row > -near_y) & (row < ny - 1 + near_y) & (column > -near_x) & (column < nx - 1 + near_x)
        seen = np.flatnonzero(inside)
        # Belts of an image lie over each other in random order; within a belt, time decides.
        seen = seen[np.argsort((item + 0.999 * other[3])[belt[seen]], kind="stable")]
        out = np.zeros((n, ny, nx), dtype=np.int8)
        paint(out, owner[seen], row[seen], column[seen], radius[seen], code[seen], self.spacing)
        return out

    def _lanes(self) -> Array:
        """Numbers of the lanes whose belts can touch the window."""
        (ny, nx), (dy, dx) = self.shape, self.spacing
        far = 0.5 * np.hypot(ny * dy, nx * dx) + float(_reach(np.array(self.width[1]), np.array(self.age[1])))
        most = int(far / self.belt_spacing) + 2
        return np.arange(-most, most + 1)


def _period(along: float, width: Array) -> Array:
    """Length of valley after which a belt repeats, in widths: beyond the window, and beyond the bends' correlation."""
    return np.maximum(24.0, along / width + 8.0)


def _reach(width: Array, age: Array) -> Array:
    """How far a belt strays from its axis: grows with age, about 4 W at 5 W/k_l and 11 W at 20 W/k_l at most."""
    return width * (3.5 + 0.5 * age)
