"""Galaxies: Sérsic bulges and inclined discs with spiral arms, bars and clumps, in flux per pixel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from invgen.data import _galaxy_parts as parts
from invgen.data._smoothing import mirror_blur
from invgen.data._stream import Stream, check_lengths, check_range, check_shape
from invgen.grid import Grid

__all__ = ["SersicGalaxies"]

Array = np.ndarray

_FINE = 2  # samples a pixel and axis; the pixel value is their mean
_KNOTS = 32  # most clumps of a galaxy


@dataclass(frozen=True)
class SersicGalaxies(Stream):
    """Images of single galaxies, centred up to a pixel: elliptical, disc (with and without a bar) and irregular ones.

    The light of a galaxy is a sum of components, each a Sérsic profile in elliptical radius R,

        I(R) = I_e exp(−b_n [(R/R_e)^(1/n) − 1]),   total light 2π q n R_e² I_e e^(b_n) b_n^(−2n) Γ(2n),

    with b_n such that half of the light lies within R_e, γ(2n, b_n) = Γ(2n)/2 (Ciotti and Bertin 1999). Elliptical: one component, n from 2 to 6. Disc: an exponential
    disc (n = 1) seen under a random inclination, and a bulge (n from 1 to 4) of up to 60 % of the light; the disc's light
    is redistributed at constant mean by logarithmic spiral arms, R ∝ exp(φ tan(pitch)), of 2 to 4 arms with pitch 10 to
    35 degrees, joined in part by a bar, and by clumps (star-forming knots) that prefer the arms. Irregular: a disc without
    order, lopsided, with strong clumps.

    Values are the flux received by each pixel in nJy, positive, and add up to the galaxy's flux, 3631e9·10^(−m/2.5) nJy
    for AB magnitude m. Divide by the pixel's area in arcsec² for surface brightness. There is no noise and no sky.

    Attributes:
        shape: (ny, nx) pixels.
        spacing: (dy, dx) in arcsec.
        magnitude: AB magnitudes, uniform between the two.
        half_light: half-light radius along the major axis in arcsec, log-uniform.
        kinds: shares of elliptical, disc and irregular galaxies; they are scaled to sum 1.
        psf_fwhm: full width at half maximum of a Gaussian point-spread function in arcsec; 0 for the intrinsic light,
            averaged over the pixels.

    Cost: about 1 ms of one CPU core for 64×64 pixels.

    References: Sérsic (1963), Boletín de la Asociación Argentina de Astronomía 6, 41; Ciotti and Bertin (1999),
    Astronomy and Astrophysics 352, 447. The laws of the parameters are plain choices, not fits to a survey.
    """

    shape: tuple[int, int] = (64, 64)
    spacing: tuple[float, float] = (0.05, 0.05)
    magnitude: tuple[float, float] = (20.0, 23.5)
    half_light: tuple[float, float] = (0.15, 0.5)
    kinds: tuple[float, float, float] = (0.25, 0.6, 0.15)
    psf_fwhm: float = 0.1

    _block: ClassVar[int] = 8

    def __post_init__(self) -> None:
        check_shape(self.shape, 4)
        check_lengths("spacing", self.spacing, 2, "arcsec")
        check_range("magnitude", self.magnitude, -30.0, 40.0, "AB magnitudes")
        check_range("half_light", self.half_light, 1e-3, 1e3, "arcsec")
        if len(self.kinds) != 3 or not all(np.isfinite(k) and k >= 0 for k in self.kinds) or sum(self.kinds) <= 0:
            raise ValueError(f"kinds must be three non-negative shares, not all zero, got {self.kinds}.")
        if not (np.isfinite(self.psf_fwhm) and self.psf_fwhm >= 0):
            raise ValueError(f"psf_fwhm must be a non-negative width in arcsec, got {self.psf_fwhm}.")

    @property
    def grid(self) -> Grid:
        """Axes y and x in arcsec around the centre, flux in nJy a pixel."""
        origin = tuple(-0.5 * d * (n - 1) for n, d in zip(self.shape, self.spacing))
        return Grid(
            self.shape, self.spacing, origin, ("y", "x"), ("arcsec", "arcsec"), ("flux",), channel_units=("nJy/pixel",)
        )

    def _draw(self, seed: int, numbers: range) -> Array:
        n, (ny, nx), (dy, dx) = len(numbers), self.shape, self.spacing
        u, knots = np.empty((n, 32)), np.empty((n, _KNOTS, 5))
        for i, rng in enumerate(self._generators(seed, numbers)):
            u[i], knots[i] = rng.random(32), rng.random((_KNOTS, 5))

        def uniform(k: int, low: float, high: float) -> Array:
            return (low + (high - low) * u[:, k])[:, None, None]

        kind = np.searchsorted(np.cumsum(self.kinds) / sum(self.kinds), u[:, 0], side="right")[:, None, None]
        elliptical, irregular = kind == 0, kind == 2
        low, high = np.log(self.half_light)
        size = np.exp(uniform(1, low, high))
        # A thin disc of thickness 0.2 seen under a random inclination; elliptical and irregular galaxies are rounder.
        axis_ratio = np.where(kind == 1, np.sqrt(0.04 + 0.96 * uniform(2, 0.0, 1.0) ** 2), uniform(2, 0.5, 1.0))
        y = ((np.arange(_FINE * ny) + 0.5) / _FINE - 0.5 * ny) * dy - uniform(3, -0.5, 0.5)[..., 0] * dy
        x = ((np.arange(_FINE * nx) + 0.5) / _FINE - 0.5 * nx) * dx - uniform(4, -0.5, 0.5)[..., 0] * dx
        position = uniform(5, 0.0, np.pi)
        major, minor = parts.turned(y[:, :, None].astype(np.float32), x[:, None, :].astype(np.float32), position)
        deep = minor / axis_ratio.astype(np.float32)  # across, in the plane of the disc
        radius, angle = np.hypot(major, deep), np.arctan2(deep, major)

        index = np.where(elliptical, uniform(6, 2.0, 6.0), np.where(irregular, uniform(6, 0.5, 1.2), 1.0))
        main = parts.sersic(radius, size, index, axis_ratio)
        scale = size / 1.678  # exponential scale length of the disc
        barred = (kind == 1) & (uniform(7, 0.0, 1.0) < 0.4)
        start = np.where(barred, uniform(8, 0.5, 1.1), uniform(8, 0.3, 0.7)) * scale  # where the arms begin
        arms = np.array([2.0, 2.0, 2.0, 3.0, 4.0])[(5.0 * u[:, 9]).astype(int)][:, None, None]
        pitch, phase = np.radians(uniform(10, 10.0, 35.0)), uniform(11, 0.0, 2.0 * np.pi)
        sharpness = uniform(12, 0.8, 2.5)
        winding = np.where(uniform(13, 0.0, 1.0) < 0.5, 1.0, -1.0)  # arms trail to either side
        ripple = 0.35 * np.sin(3.0 * angle + (uniform(14, 2.0, 6.0) / scale).astype(np.float32) * radius)
        wave = parts.spiral(
            radius, angle + ripple / arms.astype(np.float32), arms, winding * pitch, start, phase, sharpness
        )
        rise = 1.0 - np.exp(-np.square(radius / start.astype(np.float32)))
        contrast = np.where(kind == 1, uniform(15, 0.2, 1.0), 0.0).astype(np.float32) * rise
        lean = np.where(irregular, uniform(16, 0.2, 0.7), np.where(elliptical, 0.0, uniform(16, 0.0, 0.3)))
        lopsided = lean.astype(np.float32) * (radius / (radius + scale.astype(np.float32)))
        main *= 1.0 + contrast * (wave - 1.0) + lopsided * np.cos(angle - uniform(17, 0.0, 2.0 * np.pi))

        bulge_share = np.where(kind == 1, uniform(18, 0.0, 0.6) ** 1.5, 0.0)
        bulge_ratio = np.maximum(axis_ratio, uniform(19, 0.6, 0.95))
        bulge_radius = np.hypot(major, minor / bulge_ratio.astype(np.float32))
        bulge = parts.sersic(bulge_radius, size * uniform(20, 0.12, 0.35), uniform(21, 1.0, 4.0), bulge_ratio)
        # A bar is a Gaussian in the plane of the disc from which two arms begin.
        bar_share = np.where(barred, uniform(22, 0.1, 0.3), 0.0)
        along, across = parts.turned(deep, major, phase / arms)
        bar_radius = np.hypot(along, across / np.float32(0.3))
        bar = parts.sersic(bar_radius, 0.7 * start, np.array(0.5), 0.3 * axis_ratio)

        knot_share = np.where(irregular, uniform(23, 0.1, 0.4), np.where(elliptical, 0.0, uniform(23, 0.0, 0.2)))[
            ..., 0
        ]
        # Knots follow the disc's light: R is a Gamma variable of order 2; most of a disc's lie on its arms.
        far = np.minimum(-np.log1p(-knots[..., 0]) - np.log1p(-knots[..., 1]), 4.5) * scale[..., 0]
        crest = (
            np.log(np.maximum(far / start[..., 0], 1e-3)) / np.tan(winding * pitch)[..., 0]
            + (phase[..., 0] + 2.0 * np.pi * np.floor(arms[..., 0] * knots[..., 2])) / arms[..., 0]
        )
        on_arm = (kind[..., 0] == 1) & (knots[..., 3] < 0.8)
        turn = np.where(on_arm, crest + 1.2 * (knots[..., 3] - 0.4), 2.0 * np.pi * knots[..., 2])
        knot_major, knot_minor = far * np.cos(turn), far * np.sin(turn) * axis_ratio[..., 0]
        back_x, back_y = parts.turned(knot_minor[..., None], knot_major[..., None], -position)
        weight = np.exp(2.5 * knots[..., 4]) * (np.arange(_KNOTS) < 4 + (_KNOTS - 4) * u[:, 24:25])
        weight *= knot_share / weight.sum(axis=1, keepdims=True)
        width = np.maximum(size[..., 0] * (0.02 + 0.08 * knots[..., 1]), 0.5 * max(dy, dx))
        light = (1.0 - bulge_share - bar_share - knot_share[..., None]) * main + bulge_share * bulge + bar_share * bar
        light = light + parts.gaussians(y, x, back_y[..., 0], back_x[..., 0], width, weight)

        sd = self.psf_fwhm / 2.354820
        rows, columns = (_pixels(n) @ mirror_blur(_FINE * n, _FINE * sd / d) for n, d in zip(self.shape, self.spacing))
        image = np.matmul(np.matmul(rows.astype(np.float32), light.astype(np.float32)), columns.T.astype(np.float32))
        flux = 3631e9 * 10.0 ** (-0.4 * uniform(25, *self.magnitude))
        image = np.maximum(image, np.float32(1e-12) * image.max(axis=(1, 2), keepdims=True))
        return (image * (flux / image.sum(axis=(1, 2), keepdims=True, dtype=np.float64)).astype(np.float32))[:, None]


def _pixels(n: int) -> Array:
    """(n, _FINE·n) matrix of the mean over the samples of a pixel."""
    return np.kron(np.eye(n), np.full((1, _FINE), 1.0 / _FINE))
