"""Seeded, unlimited generator of 2-D geological sections in log-impedance or velocity.

Sections are built in the order of geology: a stratigraphic column is deposited, wedges and hiatuses change its
thickness laterally, it is folded, faulted and truncated by unconformities under younger packages, and bodies
(channels, gas lenses, mounds, salt, water) complete it. Everything is computed backwards: each pixel is carried
to its depositional coordinate and reads the column there, so the cost is a few array operations per event.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from invgen.data import _geology_parts as parts

__all__ = ["GeologySections"]

Array = np.ndarray

# Soft limits of log velocity [ln km/s]: values pass unchanged between the knees and saturate towards the ends.
_LOW, _LOW_KNEE = np.log(1.45), np.log(1.60)
_HIGH_KNEE, _HIGH = np.log(5.0), np.log(5.8)
_LOG_2000 = float(np.log(2000.0))


def _soft_limit(m: Array) -> None:
    """Bring log velocity [ln km/s] smoothly within its physical range, in place; no piling up at the ends."""
    for knee, end in ((_HIGH_KNEE, _HIGH), (_LOW_KNEE, _LOW)):
        room, sign = np.float32(abs(end - knee)), np.float32(np.sign(end - knee))
        over = np.maximum(sign * (m - np.float32(knee)), np.float32(0.0))
        m -= sign * over * (over / (room + over))


@dataclass(frozen=True)
class GeologySections:
    """Family of random geological sections.

    Attributes:
        shape: (nz, nx) samples.
        spacing: (dz, dx) in m. Structure sizes are drawn in metres, so the grid does not change the geology's scale.
        depth: depth of the first row in m below the surface or sea level.
        quantity: "log_impedance" for m = ln(2000 v) with v in km/s (density 2 g/cc), "velocity" for v in km/s.
    """

    shape: tuple[int, int] = (550, 800)
    spacing: tuple[float, float] = (4.0, 4.0)
    depth: float = 0.0
    quantity: Literal["log_impedance", "velocity"] = "log_impedance"

    def __post_init__(self) -> None:
        if len(self.shape) != 2 or min(self.shape) < 2:
            raise ValueError(f"shape must be two sizes of at least 2 samples, got {self.shape}.")
        if len(self.spacing) != 2 or not all(np.isfinite(s) and s > 0 for s in self.spacing):
            raise ValueError(f"spacing must be two positive lengths in m, got {self.spacing}.")
        if not (np.isfinite(self.depth) and self.depth >= 0):
            raise ValueError(f"depth must be a non-negative length in m, got {self.depth}.")
        if self.quantity not in ("log_impedance", "velocity"):
            raise ValueError(f"quantity must be 'log_impedance' or 'velocity', got {self.quantity!r}.")

    def sample(self, n: int, *, seed: int = 0, start: int = 0) -> Array:
        """Draw sections ``start`` to ``start + n - 1`` of the stream ``seed``.

        Returns:
            (n, 1, nz, nx) float32. Item i depends on (seed, start + i) only.
        """
        _check_count(n, seed, start)
        out = np.empty((n, 1, *self.shape), dtype=np.float32)
        for i in range(n):
            out[i, 0] = self._section(np.random.default_rng(np.random.SeedSequence((seed, 0, start + i))))
        return out

    def crops(
        self, n: int, crop: tuple[int, int], *, seed: int = 0, start: int = 0, per_section: int = 16
    ) -> tuple[Array, Array]:
        """Draw random windows, uniform over the section; ``per_section`` consecutive crops share one section.

        Crop number k is cut from section ``k // per_section`` of :meth:`sample` with the same seed, whatever
        the batch it is drawn in.

        Returns:
            (n, 1, cz, cx) float32 crops and (n,) float32 depth of the first row of each crop in m.
        """
        _check_count(n, seed, start)
        if per_section < 1:
            raise ValueError(f"per_section must be at least 1, got {per_section}.")
        cz, cx = crop
        if not (1 <= cz <= self.shape[0] and 1 <= cx <= self.shape[1]):
            raise ValueError(f"crop must fit in the section of shape {self.shape}, got {crop}.")
        out = np.empty((n, 1, cz, cx), dtype=np.float32)
        depth = np.empty(n, dtype=np.float32)
        held, section = -1, np.empty(0, dtype=np.float32)
        for i in range(n):
            number = start + i
            if number // per_section != held:
                held = number // per_section
                section = self.sample(1, seed=seed, start=held)[0, 0]
            rng = np.random.default_rng(np.random.SeedSequence((seed, 1, number)))
            iz = int(rng.integers(self.shape[0] - cz + 1))
            ix = int(rng.integers(self.shape[1] - cx + 1))
            out[i, 0] = section[iz : iz + cz, ix : ix + cx]
            depth[i] = self.depth + iz * self.spacing[0]
        return out, depth

    def _section(self, rng: np.random.Generator) -> Array:
        """One (nz, nx) float32 section."""
        (nz, nx), (dz, dx) = self.shape, self.spacing
        x = (np.arange(nx) * dx).astype(np.float32)
        z = (self.depth + np.arange(nz) * dz).astype(np.float32)
        span, height = nx * dx, nz * dz
        # Interval models (constant beds without texture or lateral change) beside logs-like sections: both are geology.
        blocky = rng.random() < 0.4
        water = rng.random() < 0.3
        seabed = np.zeros(nx, dtype=np.float32)
        if water:
            relief = rng.uniform(20.0, 500.0) * (1.0 + rng.uniform(0.02, 0.15) * parts.smooth_curve(rng, x, 3000.0))
            seabed = np.maximum(relief, 0.0).astype(np.float32)
        salt = rng.random() < 0.12
        dome = np.zeros(nx, dtype=np.float32)
        if salt:
            salt_x, salt_w = rng.uniform(0.0, span), parts.log_uniform(rng, 200.0, 900.0)
            salt_top = self.depth + rng.uniform(0.2, 0.9) * height
            dome = np.exp(-0.5 * ((x - salt_x) / (1.3 * salt_w)) ** 2).astype(np.float32) * np.float32(
                rng.uniform(0.05, 0.45)
            )

        strata, package = self._strata(rng, x, z, seabed, dome)
        burial = np.maximum(z[:, None] - seabed, 0.0)
        mix = np.float32(rng.uniform(0.0, 0.6))
        step = dz / 4.0
        columns: list[Array] = []
        others: list[Array] = []
        position = np.empty((nz, nx), dtype=np.float32)
        used = 0.0
        jump = 0.0
        for k, zeta in enumerate(strata):
            inside = package == k
            if not inside.any():
                continue
            here = zeta[inside]
            low, high = float(here.min()) - dz, float(here.max()) + dz
            first, second = parts.column(rng, high - low, step, dz)
            columns.append(first + np.float32(jump))
            others.append(second + np.float32(jump))
            position[inside] = here - np.float32(low - used)
            # Tilted beds carry part of their depositional burial with them: uplifted blocks stay fast.
            burial[inside] += mix * np.clip(here - burial[inside], -1500.0, 1500.0)
            used += first.size * step
            jump += max(0.0, rng.normal(0.05, 0.08))  # older rocks under an unconformity are usually harder
        trend_step = 2.0
        np.maximum(burial, 0.0, out=burial)
        table = parts.compaction_table(rng, np.arange(0.0, float(burial.max()) + 2 * trend_step, trend_step))
        trend = table[(burial * (1.0 / trend_step)).astype(np.int32)]
        index = (position * (1.0 / step)).astype(np.int32)
        first = np.concatenate(columns)
        m = first[index]
        m += trend
        if not blocky:
            m += (np.concatenate(others) - first)[index] * parts.facies_blend(rng, position, x, dx)
            rows = 211
            tile = parts.texture_tile(rng, rows, x) * np.float32(parts.log_uniform(rng, 0.002, 0.02))
            index //= max(1, round(max(dz, 4.0) / step))
            index %= rows
            index *= nx
            index += np.arange(nx, dtype=np.int32)
            m += tile.ravel()[index]
        for _ in range(int(rng.poisson(rng.choice([0.0, 3.0, 9.0]) * span * height / 7.0e6))):
            parts.add_lens(rng, m, position, trend, x, dz)
        _soft_limit(m)
        if salt:
            parts.add_salt(rng, m, x, z, salt_x, salt_w, salt_top)
        if water:
            weight = np.clip((seabed - z[:, None]) / np.float32(dz) + 0.5, 0.0, 1.0)
            m += weight * (np.float32(np.log(rng.uniform(1.48, 1.53))) - m)
        return np.exp(m) if self.quantity == "velocity" else m + np.float32(_LOG_2000)

    def _strata(
        self, rng: np.random.Generator, x: Array, z: Array, seabed: Array, dome: Array
    ) -> tuple[list[Array], Array]:
        """Depositional coordinate [m] of each package, youngest first, and the (nz, nx) package number."""
        (nz, nx), (dz, dx) = self.shape, self.spacing
        height = nz * dz
        now = np.repeat(z[:, None], nx, axis=1)
        package = np.zeros((nz, nx), dtype=np.int8)
        count = int(rng.choice(3, p=[0.35, 0.42, 0.23]))
        # Surfaces stay in the frame of the package above, so folding and faulting affect them too.
        levels = np.sort(rng.uniform(0.12, 0.85, count)) * height + self.depth
        strength = rng.choice([0.12, 0.5, 1.0], p=[0.25, 0.4, 0.35])
        throw = parts.log_uniform(rng, 10.0, 150.0)
        strata = []
        frame = now
        for k in range(count + 1):
            if k == 0:
                families = int(rng.choice(4, p=[0.27, 0.32, 0.26, 0.15]))
            else:
                families = int(rng.choice(3, p=[0.45, 0.35, 0.2]))
            dense = rng.random() < 0.15
            for _ in range(max(families, int(dense))):
                size = 0.45 * throw if dense else throw
                frame = parts.fault_family(rng, frame, x, dx, size, dense)
                dense = False
            follow = seabed * np.float32(rng.uniform(0.2, 1.0)) if k == 0 else 0.0
            frame = self._unfold(rng, frame, x, strength * (0.6 if k == 0 and count else 1.0), dome if k == 0 else None)
            frame = frame - follow if k == 0 else frame
            strata.append(self._rework(rng, frame, x))
            if k < count:
                relief = parts.log_uniform(rng, 2.0, 40.0) * parts.smooth_curve(rng, x, 1500.0)
                relief -= rng.uniform(0.0, 0.06) * (x - x.mean())
                below = frame > (np.float32(levels[k]) + relief - (follow if k == 0 else 0.0))
                package[below] = k + 1
                strength = rng.uniform(0.5, 1.4)  # what lies under an unconformity is more deformed than its cover
        return strata, package

    def _unfold(self, rng: np.random.Generator, frame: Array, x: Array, strength: float, dome: Array | None) -> Array:
        """Undo folds and regional dip: ``zeta = z - a(x) - b(x) z``; b makes folds grow or fade with depth."""
        span = float(x[-1] - x[0]) + 1.0
        scale = parts.log_uniform(rng, 500.0, 6000.0)
        slope = abs(rng.normal(0.0, 0.16)) * strength  # rms slope of the fold flanks
        amplitude = min(slope * scale / 6.28, 350.0)
        dip = np.tan(np.radians(np.clip(rng.normal(0.0, 13.0) * strength, -36.0, 36.0)))
        fold = amplitude * parts.smooth_curve(rng, x, scale) + dip * (x - rng.uniform(0.0, span))
        # The factor 1 - b(x) must stay well above zero: it is the inverse of the bed thickness ratio.
        reach = float(np.abs(frame - self.depth).max()) + 1.0
        rate = min(abs(rng.normal(0.0, 0.12)) * strength, 0.3 * 2.0 * scale / (6.28 * reach))  # flanks below ~20 deg
        growth = 0.4 * np.tanh(2.5 * rate * parts.smooth_curve(rng, x, 2.0 * scale))
        if dome is not None:
            growth = growth - dome
        if rng.random() < 0.25:  # inclined axial planes: read the fold at a place that moves with depth
            lean = rng.uniform(-0.7, 0.7)
            where = np.clip((x[None, :] + lean * (frame - frame.mean())) / (x[1] - x[0]), 0.0, x.size - 1.001)
            left = where.astype(np.int32)
            part = where - left
            # The shear must not overturn the beds.
            gain = min(1.0, 0.6 / (abs(lean) * float(np.abs(np.gradient(fold, x)).max()) + 1e-6))
            fold = (gain * fold).astype(np.float32)
            fold = fold[left] * (1.0 - part) + fold[left + 1] * part
        base = np.float32(self.depth)
        return (frame - fold.astype(np.float32)) - (frame - base) * growth.astype(np.float32)

    def _rework(self, rng: np.random.Generator, frame: Array, x: Array) -> Array:
        """Change thickness along beds: wedges stretch an interval, hiatuses remove beds and make pinch-outs."""
        zeta = frame
        low, high = float(frame.min()), float(frame.max())
        for _ in range(int(rng.integers(0, 3))):
            top, thick = rng.uniform(low, high), parts.log_uniform(rng, 60.0, 400.0)
            curve = parts.smooth_curve(rng, x, parts.log_uniform(rng, 800.0, 8000.0))
            factor = (np.exp(0.5 * rng.uniform(0.3, 1.4) * curve) - 1.0).astype(np.float32)
            zeta = zeta + np.clip(frame - np.float32(top), 0.0, np.float32(thick)) * factor
        for _ in range(int(rng.integers(0, 3))):
            top = rng.uniform(low, high)
            curve = parts.smooth_curve(rng, x, parts.log_uniform(rng, 600.0, 5000.0)) - rng.uniform(-0.5, 0.8)
            gap = np.maximum(curve, 0.0) ** 1.7 * np.float32(parts.log_uniform(rng, 8.0, 90.0))
            zeta = zeta + gap.astype(np.float32) * (frame > np.float32(top))
        return zeta


def _check_count(n: int, seed: int, start: int) -> None:
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}.")
    if seed < 0 or start < 0:
        raise ValueError(f"seed and start must be non-negative, got {seed} and {start}.")
