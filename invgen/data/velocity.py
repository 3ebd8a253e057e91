"""Velocity models in the families that OpenFWI made customary: flat and curved layers, faults, and style."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from scipy import fft

from invgen.data._smoothing import mirror_blur
from invgen.data._stream import Stream, check_lengths, check_range, check_shape
from invgen.grid import Grid

__all__ = ["VelocityFamily", "VelocityModels"]

Array = np.ndarray

VelocityFamily = Literal[
    "FlatVel_A", "FlatVel_B", "CurveVel_A", "CurveVel_B", "FlatFault_A", "FlatFault_B", "CurveFault_A", "CurveFault_B",
    "Style_A", "Style_B",
]  # fmt: skip

_WAVES, _FAULTS = 2, 3  # most of a model
_NUMBERS = 64  # uniform numbers drawn for a model: 0–15 faults, 16 tilt, 17–22 curve, from 24 on layers
_FINEST = 32.0  # finest waves of the style field, in cycles a height or a length
_SMOOTH = (0.02, 0.026, 0.032, 0.038, 0.044)  # standard deviations of the smoothing in Style_A, as shares of the height
_SHARP = 0.007  # and in Style_B


@dataclass(frozen=True)
class VelocityModels(Stream):
    """Random velocity models of one family, named after the families of OpenFWI (Deng et al. 2022).

    A layered model is one velocity function of a depositional depth, v(z, x) = v_layer(ζ(z, x)):

        FlatVel     ζ = z
        CurveVel    ζ = z − Σ_{k ≤ 2} a_k sin(2π f_k x + φ_k), the same curve for all interfaces
        …Fault      (z, x) is first carried back to its place before faulting: a fault is a straight line of
                    60 to 80 degrees of dip whose hanging wall has slipped along it, so that ζ jumps by the throw
        FlatFault   also tilts the layers, by up to 6 degrees

    In the families A velocity increases with depth everywhere: layers in increasing order, one normal fault. In the
    families B the velocities come in random order, and one to three faults are normal or reverse.
    Style is a surrogate: OpenFWI transfers the style of a seismic model to photographs; here a random field, with
    bedding that follows its contours, is mapped linearly to the range of velocities, smoothed in Style_A, sharpened in
    Style_B.

    The families are theirs; the draws are ours and follow the published description, not their data: the statistics
    are alike, not equal.

    Attributes:
        family: one of `VelocityFamily`.
        shape: (nz, nx) samples, 70×70 as in OpenFWI.
        spacing: (dz, dx) in m. Sizes of structures are shares of the model's height and length: the same geology at
            any sampling.
        velocity: smallest and largest velocity in km/s.
        layers: fewest and most layers, at most 12.

    Cost: 0.1 ms of one CPU core for 70×70 samples in blocks of 64, 0.4 ms for the style families.

    Reference: Deng et al. (2022), OpenFWI: large-scale multi-structural benchmark datasets for full waveform inversion,
    NeurIPS datasets and benchmarks, arXiv:2111.02926.
    """

    family: VelocityFamily = "FlatVel_A"
    shape: tuple[int, int] = (70, 70)
    spacing: tuple[float, float] = (10.0, 10.0)
    velocity: tuple[float, float] = (1.5, 4.5)
    layers: tuple[int, int] = (2, 5)

    def __post_init__(self) -> None:
        if self.family not in get_args(VelocityFamily):
            raise ValueError(f"family must be one of {', '.join(get_args(VelocityFamily))}, got {self.family!r}.")
        check_shape(self.shape, 2)
        check_lengths("spacing", self.spacing, 2, "m")
        check_range("velocity", self.velocity, 0.1, 12.0, "km/s")
        check_range("layers", self.layers, 1, 12, "layers")
        if any(int(k) != k for k in self.layers):
            raise ValueError(f"layers must be two whole numbers, got {self.layers}.")
        if self.velocity[0] == self.velocity[1]:
            raise ValueError(f"velocity must be a range of some width in km/s, got {self.velocity}.")

    @property
    def grid(self) -> Grid:
        """Axes z and x in m, velocity in km/s."""
        return Grid(self.shape, self.spacing, units=("m", "m"), channels=("velocity",), channel_units=("km/s",))

    def _draw(self, seed: int, numbers: range) -> Array:
        generators = self._generators(seed, numbers)
        if self.family.startswith("Style"):
            return np.stack([self._style(rng) for rng in generators])[:, None]
        u = np.stack([rng.random(_NUMBERS) for rng in generators]).astype(np.float32)
        return self._layered(u)[:, None]

    def _layered(self, u: Array) -> Array:
        """(n, nz, nx) models from (n, 64) uniform numbers."""
        n, (nz, nx) = len(u), self.shape
        increasing = self.family.endswith("A")
        # Depth and distance as shares of the height and the length.
        z = np.broadcast_to(((np.arange(nz, dtype=np.float32) + 0.5) / nz)[:, None], (n, nz, nx))
        x = np.broadcast_to((np.arange(nx, dtype=np.float32) + 0.5) / nx, (n, nz, nx))
        if "Fault" in self.family:
            z, x = self._unfault(u[:, :16], z, x, increasing)
        if self.family.startswith("FlatFault"):
            length_over_height = nx * self.spacing[1] / (nz * self.spacing[0])
            slope = np.tan(np.radians(12.0 * u[:, 16] - 6.0)) * np.float32(length_over_height)
            z = z - slope[:, None, None] * (x - np.float32(0.5))
        elif self.family.startswith("Curve"):
            z = z - self._curve(u[:, 17:23], x)
        return self._velocities(u[:, 24:], z, increasing)

    def _unfault(self, u: Array, z: Array, x: Array, normal: bool) -> tuple[Array, Array]:
        """Carry points back to where they were before faulting, the youngest fault first.

        A fault through (z, x) = (1/2, x_f) leans by `lean` = Δx/Δz. Points above its plane have slipped down (normal)
        or up (reverse) by the throw t along it: they came from (z − t, x − lean·t).
        """
        count = np.ones(len(u)) if normal else 1.0 + np.floor(u[:, 0] * _FAULTS)
        aspect = self.shape[0] * self.spacing[0] / (self.shape[1] * self.spacing[1])
        for k in range(1 if normal else _FAULTS):
            v = u[:, 1 + 5 * k : 6 + 5 * k, None, None]
            side = np.where(v[:, 0] < 0.5, np.float32(-1.0), np.float32(1.0))
            lean = side * np.tan(np.radians(10.0 + 20.0 * v[:, 1])) * np.float32(aspect)
            throw = (0.06 + 0.14 * v[:, 2]) * (count > k)[:, None, None]
            if not normal:
                throw = throw * np.where(v[:, 3] < 0.5, np.float32(-1.0), np.float32(1.0))
            place = 0.15 + 0.7 * v[:, 4]
            above = side * (x - place - lean * (z - np.float32(0.5))) > 0.0
            slip = throw.astype(np.float32) * above
            z = z - slip
            x = x - lean.astype(np.float32) * slip
        return z, x

    def _curve(self, u: Array, x: Array) -> Array:
        """Σ a_k sin(2π f_k x + φ_k): two waves of half to three cycles; the slopes leave faults room to be normal."""
        height_over_length = self.shape[0] * self.spacing[0] / (self.shape[1] * self.spacing[1])
        out = np.zeros(x.shape, dtype=np.float32)
        for k in range(_WAVES):
            v = u[:, 3 * k : 3 * k + 3, None, None]
            cycles = 0.5 + 2.5 * v[:, 0]
            amplitude = (0.02 + 0.05 * v[:, 1]) * (1.0 - 0.4 * k) / np.sqrt(cycles) / max(1.0, height_over_length)
            out += amplitude.astype(np.float32) * np.sin(np.float32(2.0 * np.pi) * (cycles * x + v[:, 2]))
        return out

    def _velocities(self, u: Array, depth: Array, increasing: bool) -> Array:
        """Velocity of the layer in which each depositional depth lies; the outer layers go on for ever."""
        fewest, most = (int(k) for k in self.layers)
        count = fewest + np.floor(u[:, 0] * (most - fewest + 1)).astype(int)[:, None]
        number = np.arange(most)
        exponential = 0.3 - np.log1p(
            -u[:, 1 : 2 * most + 2].astype(float)
        )  # no layer, no contrast is vanishingly small
        exponential[:, [most]] -= 0.3  # the limits themselves may be reached
        np.put_along_axis(exponential, most + count, np.take_along_axis(exponential, most + count, 1) - 0.3, 1)
        thickness = exponential[:, :most] * (number < count)
        base = (np.cumsum(thickness, axis=1) / thickness.sum(axis=1, keepdims=True)).astype(np.float32)
        steps = exponential[:, most:] * (np.arange(most + 1) <= count)  # below, between and above the velocities
        low, high = self.velocity
        velocity = low + (high - low) * np.cumsum(steps, axis=1)[:, :most] / steps.sum(axis=1, keepdims=True)
        if not increasing:
            order = np.argsort(np.where(number < count, u[:, 2 * most + 1 : 3 * most + 1], 2.0), axis=1)
            velocity = np.take_along_axis(velocity, order, axis=1)
        layer = np.zeros(depth.shape, dtype=np.int32)
        for k in range(most - 1):
            layer += (depth > base[:, k, None, None]) & (k + 1 < count)[..., None]
        layer += (most * np.arange(len(u), dtype=np.int32))[:, None, None]
        return velocity.astype(np.float32).ravel()[layer]

    def _style(self, rng: np.random.Generator) -> Array:
        """One (nz, nx) model of the style families: a power-law random field, read through a table of beds."""
        (nz, nx), smooth = self.shape, self.family.endswith("A")
        padded = fft.next_fast_len(nz + nz // 2, True), fft.next_fast_len(nx + nx // 2, True)  # no wrap-around in sight
        kz, kx = np.fft.fftfreq(padded[0], 1.0 / nz), np.fft.rfftfreq(padded[1], 1.0 / nx)  # cycles a height, a length
        rows, columns = np.flatnonzero(np.abs(kz) < _FINEST), np.flatnonzero(kx < _FINEST)
        kz, kx = kz[rows, None].astype(np.float32), kx[columns].astype(np.float32)
        dip, stretch = np.radians(rng.uniform(-35.0, 35.0)), rng.uniform(1.0, 3.0)
        cos, sin = np.float32(np.cos(dip)), np.float32(np.sin(dip))
        power = (
            np.square(np.float32(stretch) * (cos * kx + sin * kz)) + np.square(cos * kz - sin * kx) + np.float32(0.5)
        )
        amplitude = np.exp(np.float32(-0.5 * rng.uniform(3.0, 4.0)) * np.log(power))
        noise = rng.standard_normal((2, *power.shape), dtype=np.float32)
        noise[..., 0] *= np.float32(np.sqrt(2.0))  # only the real part of the waves without kx counts
        spectrum = np.zeros((padded[0], padded[1] // 2 + 1), dtype=np.complex64)
        spectrum[rows[:, None], columns] = amplitude * (noise[0] + np.complex64(1j) * noise[1])
        field = fft.irfft2(spectrum, s=padded)[:nz, :nx]
        field = _stretched(field, 0.0, 1.0)
        field += np.float32(rng.uniform(0.0, 0.8)) * ((np.arange(nz, dtype=np.float32) + 0.5) / nz)[:, None]
        beds = int(rng.integers(12, 40))
        table = np.arange(2 * beds) / beds + rng.uniform(0.1, 0.3) * rng.standard_normal(2 * beds)
        field = table.astype(np.float32)[(field * np.float32(beds)).astype(np.int32)]
        share = _SMOOTH[int(rng.integers(len(_SMOOTH)))] if smooth else _SHARP
        metres = share * nz * self.spacing[0]
        across, along = (mirror_blur(n, metres / d) for n, d in zip(self.shape, self.spacing))
        field = across.astype(np.float32) @ field @ along.astype(np.float32)
        return _stretched(field, *self.velocity)


def _stretched(field: Array, low: float, high: float) -> Array:
    """The field mapped linearly to [low, high]."""
    least, most = field.min(), field.max()
    unit = (field - least) * np.float32(1.0 / max(float(most - least), 1e-12))
    return np.float32(low) + unit * np.float32(high - low)
