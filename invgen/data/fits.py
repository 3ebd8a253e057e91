"""Images of the sky in FITS files: science, noise, PSF and mask in, maps of the posterior out.

seen = read_observation("lens.fits")                                   # extensions SCI, ERR | WHT | VAR, PSF, DQ
seen = read_observation("sci.fits", weight="wht.fits", psf="psf.fits[1]", mask="[DQ]", units="electron/s")
problem = seen.problem(GravitationalLens(model, source_grid, seen.grid, psf=seen.psf), prior)
export_fits(posterior, "source.fits", like=seen)                       # mean, sd, samples, with the WCS
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from invgen.checkpoints import atomic
from invgen.data._fits_noise import check_psf, mask_of, noise_sd
from invgen.data._fits_read import Image, need_astropy, read_image, split
from invgen.data._fits_sky import SkyFrame, centred_grid, frame_of, plain_cards
from invgen.grid import Grid
from invgen.noise import GaussianNoise
from invgen.problem import InverseProblem, Term

if TYPE_CHECKING:
    from invgen.contracts import Operator
    from invgen.posterior import Posterior

__all__ = ["Observation", "SkyFrame", "export_fits", "read_observation", "write_maps"]

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Observation:
    """An image of the sky with its noise, and what a lens or a deconvolution needs beside it.

    Attributes:
        data: `(1, ny, nx)`, row 0 at the bottom; 0 where the mask is False; float32 (float64 for 8-byte samples).
        sd: noise standard deviation of each pixel, like data; 1 where the mask is False.
        mask: boolean, like data, True where measured.
        grid: axes ("y", "x") in arcsec, zero in the middle of the image, y up; the unit of the data as channel unit.
        psf: `(h, w)` float64, sums to 1, entry ⌊n/2⌋ is its centre, or None. psf_oversampling: PSF pixels a data pixel.
        counts: pixels, used, nan_pixels, masked (by the mask file), no_noise (sd or weight that says nothing).
        frame: where on the sky, or None. notes: what was found, assumed or looked odd, one sentence each.
        sky_scatter: scatter of the faint half of the image over the stated noise: 1 where the noise map is right and
            most of the image is sky, below 1 for noise that neighbours share (drizzled images), above it for a noise map
            in other units, a bad sky, or an image full of light.
    """

    data: Tensor
    sd: Tensor
    mask: Tensor
    grid: Grid
    psf: Tensor | None = None
    psf_oversampling: int = 1
    counts: Mapping[str, int] = None  # type: ignore[assignment]
    frame: SkyFrame | None = None
    notes: tuple[str, ...] = ()
    sky_scatter: float = math.nan

    @property
    def units(self) -> str:
        """Unit of the data, as BUNIT or the reader was told."""
        return self.grid.channel_units[0]

    @property
    def noise(self) -> GaussianNoise:
        """Independent Gaussian noise of each pixel's own standard deviation."""
        return GaussianNoise(self.sd)

    @property
    def remarks(self) -> str:
        """Counts of what was left out, and the notes."""
        left = [f"{v} {k.replace('_', ' ')}" for k, v in self.counts.items() if v and k not in ("pixels", "used")]
        first = [f"{self.counts['used']} of {self.counts['pixels']} pixels used ({', '.join(left)})."] if left else []
        return " ".join([*first, *self.notes])

    def term(self, operator: Operator, *, name: str = "image", noise: Any = None) -> Term:
        """The data as a term of an inverse problem; `noise` replaces the Gaussian of the noise map."""
        return Term(self.data, operator, self.noise if noise is None else noise, self.mask, name)

    def problem(self, operator: Operator, prior: Any, *, noise: Any = None, **more: Any) -> InverseProblem:
        """The inverse problem of this image alone; `more` is given to `InverseProblem` (nuisance)."""
        return InverseProblem(terms=[self.term(operator, noise=noise)], prior=prior, **more)

    def placement(self, reference: Observation) -> dict[str, float]:
        """Where this image lies on the grid of another: the arguments of `Placement`, as the two WCS say.

        Raises:
            ValueError: one of them has no WCS.

        Both fields are taken as one plane: right to (field/radian)², 1e-7 of an arcmin.
        """
        if self.frame is None or reference.frame is None:
            raise ValueError("An image without a WCS does not say where it lies; give its placement yourself.")
        return self.frame.on(reference.frame)

    def window(self, y: tuple[float, float], x: tuple[float, float]) -> Observation:
        """The part between coordinates in arcsec, both included; the coordinates stay what they are.

        Raises:
            ValueError: a window without pixels, or without a measured one.
        """
        cut = []
        for (low, high), k in zip((y, x), range(2)):
            inside = np.flatnonzero(
                (self.grid.coordinates(k) >= low - 1e-9) & (self.grid.coordinates(k) <= high + 1e-9)
            )
            if not len(inside):
                raise ValueError(
                    f"No pixel lies between {low} and {high} arcsec along {'yx'[k]}; the image spans {self.grid.coordinates(k)[0]:.3g} to {self.grid.coordinates(k)[-1]:.3g}."
                )
            cut.append(slice(int(inside[0]), int(inside[-1]) + 1))
        place = (slice(None), *cut)
        mask = self.mask[place].clone()
        if not bool(mask.any()):
            raise ValueError("The mask leaves no pixel in the window; choose another.")
        counts = {**self.counts, "pixels": mask.numel(), "used": int(mask.sum())}
        return replace(
            self,
            data=self.data[place].clone(),
            sd=self.sd[place].clone(),
            mask=mask,
            grid=self.grid.crop(tuple(cut)),
            counts={k: v if k in ("pixels", "used") else min(v, mask.numel()) for k, v in counts.items()},
        )

    def __repr__(self) -> str:
        (ny, nx), (dy, dx) = self.grid.shape, self.grid.spacing
        size = f"{dx:.4g}″" if math.isclose(dx, dy, rel_tol=1e-6) else f"{dy:.4g}″ × {dx:.4g}″"
        where = "no WCS" if self.frame is None else f"north {self.frame.north:+.1f}° from up"
        psf = "no PSF" if self.psf is None else f"PSF {' × '.join(map(str, self.psf.shape))}"
        return f"Observation({ny} × {nx} pixels of {size}, {self.units}, {where}, {psf}, {self.counts['used']} of {self.counts['pixels']} pixels used)"


def read_observation(
    science: str | Path,
    *,
    error: Any = None,
    variance: Any = None,
    weight: Any = None,
    sigma: float | None = None,
    psf: Any = None,
    mask: Any = None,
    mask_good: bool | None = None,
    units: str | None = None,
    pixel_scale: float | tuple[float, float] | None = None,
    normalise_psf: bool = False,
    psf_oversampling: int = 1,
) -> Observation:
    """Read an image with its noise, PSF and mask from one FITS file or several.

    Every further input is FILE, FILE[EXTENSION], [EXTENSION] of the science file, or an array. What is not given is
    looked for under its usual names among the extensions of the science file (ERR, VAR, WHT, PSF, DQ, MASK …), and
    `notes` says what was taken. Pixels with NaN, and pixels whose noise says nothing (zero weight, infinite error), are
    masked and counted.

    Args:
        science: the image; the extension SCI where there is one, else the first image.
        error, variance, weight, sigma: the noise as standard deviation, variance, inverse variance, or one number: one.
        psf: sums to 1, centre at entry ⌊n/2⌋. normalise_psf: scale a PSF that does not sum to 1.
        psf_oversampling: PSF pixels along a data pixel, if the PSF is sampled more finely.
        mask: an image; needs `mask_good` unless it is a DQ extension (not 0 is bad there).
        mask_good: True where pixels that are not 0 are the ones to use, False where they are the bad ones.
        units: unit of the data, needed where there is no BUNIT. Nothing is converted.
        pixel_scale: arcsec, or (dy, dx), needed where there is no WCS; must agree with the WCS where there is one.

    Returns:
        `Observation`. Cost: the image is held in memory.

    Raises:
        ImportError: astropy is not installed. FileNotFoundError: no such file.
        ValueError: not FITS; no BUNIT and no units, no WCS and no pixel scale, no noise or several; shapes or units that
            do not agree; negative noise; a PSF larger than the image or not normalised; a mask that leaves no pixel.
    """
    need_astropy()
    image = read_image(science, preferred=("SCI",))
    path, _ = split(science, None)
    unit = units if units is not None else image.units
    if not unit:
        raise ValueError(
            f"{image.name} has no BUNIT; say what the pixels hold with units=, e.g. units='electron/s' (a flux a pixel) or 'MJy/sr' (a surface brightness)."
        )
    grid, frame, notes = _placed(image, pixel_scale, unit)
    sd, said = noise_sd(path, image, unit, error=error, variance=variance, weight=weight, sigma=sigma)
    bad, which = mask_of(path, image.pixels.shape, mask, mask_good)
    kernel, about = check_psf(path, image.pixels.shape, psf, normalise_psf, psf_oversampling)
    finite, known = np.isfinite(image.pixels), np.isfinite(sd) & (sd > 0)
    used = finite & known & ~bad
    counts = {
        "pixels": used.size,
        "used": int(used.sum()),
        "nan_pixels": int((~finite).sum()),
        "masked": int(bad.sum()),
        "no_noise": int((~known).sum()),
    }
    if not used.any():
        raise ValueError(
            f"{image.name} has no pixel left: {counts['nan_pixels']} of {used.size} are not finite, {counts['masked']} masked, {counts['no_noise']} without noise; check mask_good and the noise map."
        )
    scatter = _sky_scatter(image.pixels[used] / sd[used])
    notes += [*said, *which, *about]
    if not 0.8 < scatter < 1.25:
        notes.append(
            f"The faint half of the image scatters by {scatter:.2f} of the stated noise: below 1 neighbours share noise (drizzling); above 1 the noise is too small or in other units, or sources cover most of the image."
        )
    dtype = torch.float64 if image.pixels.dtype == np.float64 else torch.float32
    return Observation(
        torch.from_numpy(np.where(used, image.pixels, 0)).to(dtype)[None],
        torch.from_numpy(np.where(used, sd, 1)).to(dtype)[None],
        torch.from_numpy(used)[None],
        grid,
        kernel,
        psf_oversampling,
        counts,
        frame,
        tuple(notes),
        scatter,
    )


def _placed(image: Image, pixel_scale: Any, units: str) -> tuple[Grid, SkyFrame | None, list[str]]:
    shape = (image.pixels.shape[0], image.pixels.shape[1])
    found = frame_of(image.header, shape)
    given = None
    if pixel_scale is not None:
        given = tuple(float(v) for v in np.broadcast_to(np.asarray(pixel_scale, dtype=float), (2,)))
        if not all(math.isfinite(v) and v > 0 for v in given):
            raise ValueError(f"pixel_scale is a positive number of arcsec, or (dy, dx), got {pixel_scale}.")
    if found is None:
        if given is None:
            raise ValueError(
                f"{image.name} has no WCS; say how large a pixel is with pixel_scale=, in arcsec (0.05 for drizzled HST/ACS)."
            )
        return (
            centred_grid(shape, (given[0], given[1]), units),
            None,
            ["There is no WCS: where north is, is not known."],
        )
    frame, scale, notes = found
    if given is not None and not np.allclose(given, scale, rtol=1e-3):
        raise ValueError(
            f"{image.name} has pixels of {scale[1]:.5g} arcsec by its WCS and pixel_scale says {pixel_scale}; leave pixel_scale out, or mend the header."
        )
    if abs(frame.north) > 0.5:
        notes.append(
            f"North is {frame.north:.1f} degrees counter-clockwise from up; angles count from the image's own x axis."
        )
    if frame.mirrored:
        notes.append("The image is mirrored: with north up, east is to the right.")
    return centred_grid(shape, scale, units), frame, notes


def _sky_scatter(z: Array) -> float:
    """(median − 16 % quantile) of data over sd: the sky's, as long as sources cover less than half of the image."""
    low, middle = np.quantile(z, (0.158655, 0.5))
    return float(middle - low)


def write_maps(
    path: str | Path,
    maps: Mapping[str, Any],
    grid: Grid,
    *,
    like: Observation | SkyFrame | None = None,
    units: str = "",
    keywords: Mapping[str, Any] | None = None,
) -> Path:
    """Images on a grid as extensions of one FITS file, with the WCS of the observation they belong to.

    Args:
        path: is overwritten as a whole or not at all; its folder is created.
        maps: extension name -> `(ny, nx)`, or `(n, ny, nx)` for a cube. grid: axes ("y", "x") in arcsec.
        like: the frame in which the grid counts; linear axes in arcsec without one. For a source plane the WCS gives
            the directions in which the source would be seen without the lens.
        units: BUNIT; that of the grid when "". keywords: further header cards of the first header unit.

    Raises:
        ImportError: astropy is not installed. ValueError: a grid that is not (y, x) in arcsec, maps of another shape.
    """
    need_astropy()
    from astropy.io import fits

    if grid.axes != ("y", "x") or grid.units != ("arcsec", "arcsec"):
        raise ValueError(
            f"Maps of the sky need a grid with the axes (y, x) in arcsec, got {grid.axes} in {grid.units}; build one with Grid(…, axes=('y', 'x'), units=('arcsec', 'arcsec'))."
        )
    frame = like.frame if isinstance(like, Observation) else like
    cards = plain_cards(grid) if frame is None else frame.cards(grid)
    hdus = [fits.PrimaryHDU()]
    for key, value in (keywords or {}).items():
        hdus[0].header[key] = value
    for name, values in maps.items():
        values = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
        if values.shape[-2:] != grid.shape or values.ndim not in (2, 3):
            raise ValueError(f"The map {name!r} has the shape {values.shape} and the grid {grid.shape}; give one grid.")
        hdu = fits.ImageHDU(values.astype(np.float32 if values.dtype != np.float64 else np.float64), name=name)
        hdu.header.update(cards)
        unit = units or grid.channel_units[0]
        if unit:
            hdu.header["BUNIT"] = unit
        hdus.append(hdu)
    path = Path(path)
    with atomic(path) as part, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # units FITS does not know are written as they are
        fits.HDUList(hdus).writeto(part, output_verify="fix")
    return path


def export_fits(
    posterior: Posterior,
    path: str | Path,
    *,
    like: Observation | SkyFrame | None = None,
    grid: Grid | None = None,
    samples: int = 0,
) -> Path:
    """Write mean, standard deviation and (if asked for) samples of a posterior of images as one FITS file.

    Args:
        posterior: of models `(channels, ny, nx)`, for one observation. like: the observation that was inverted.
        grid: of the models, where the posterior has none. samples: draws in the cube SAMPLES, at the most.

    Returns:
        The path. Extensions MEAN and SD (and SAMPLES), with `_CHANNEL` where there are several channels; a point estimate
        has neither SD nor SAMPLES. Solver, seed and numbers of calls are in the first header.

    Raises:
        ValueError: several observations, models that are not images on a grid in arcsec.
    """
    grid = grid if grid is not None else posterior.grid
    if grid is None or len(posterior.shape) != 3 or tuple(posterior.shape[1:]) != grid.shape:
        raise ValueError(
            f"FITS maps need models (channels, ny, nx) with their grid, got {tuple(posterior.shape)} and {grid}; pass grid=."
        )
    if posterior.n_obs != 1:
        raise ValueError(f"The posterior holds {posterior.n_obs} observations; export one after the other.")
    draws, weights = posterior.flat()
    fields: dict[str, Tensor] = {"MEAN": posterior.mean()[0]}
    if posterior.kind != "point" and draws.shape[1] > 1:
        fields["SD"] = posterior.std()[0]
        if samples:
            heavy = torch.nonzero(weights[0] > 0).flatten()[:samples]
            fields["SAMPLES"] = draws[0, heavy].movedim(1, 0)
    several = posterior.shape[0] > 1
    maps = {
        f"{name}_{grid.channels[c]}".upper() if several else name: field[c]
        for name, field in fields.items()
        for c in range(posterior.shape[0])
    }
    about = {
        "SOLVER": str(posterior.settings.get("solver", ""))[:60],
        "KIND": posterior.kind,
        "SEED": posterior.seed,
        "NDRAWS": int(draws.shape[1]),
    }
    return write_maps(path, maps, grid, like=like, keywords={k: v for k, v in about.items() if v is not None})
