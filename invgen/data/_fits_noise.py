"""What comes with an image of the sky: its noise as standard deviations, its bad pixels, its PSF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invgen.data._fits_read import ERROR, MASK, VARIANCE, WEIGHT, Image, listed, read_image, same_unit

Array = np.ndarray


def _given(value: Any, path: Path, shape: tuple[int, ...], what: str) -> tuple[Array, str, str]:
    """Pixels, unit and name of an input that is an array or a place in a file."""
    if isinstance(value, (str, Path)):
        image = read_image(value, path)
        pixels, unit, name = image.pixels, image.units, image.name
    else:
        pixels, unit, name = np.asarray(value), "", f"the {what} given"
    if pixels.shape != tuple(shape):
        raise ValueError(f"The {what} of {name} is {pixels.shape} and the image {tuple(shape)}; cut both alike.")
    return pixels, unit, name


def noise_sd(
    path: Path, image: Image, unit: str, *, error: Any, variance: Any, weight: Any, sigma: float | None
) -> tuple[Array, list[str]]:
    """Standard deviations `(ny, nx)`; zero or not finite where nothing is known."""
    shape, notes = image.pixels.shape, []
    given = {"error": error, "variance": variance, "weight": weight, "sigma": sigma}
    stated = [k for k, v in given.items() if v is not None]
    if len(stated) > 1:
        raise ValueError(f"The noise was given as {' and '.join(stated)}; give one of them.")
    if not stated:
        found = [
            (kind, n)
            for kind, names in (("error", ERROR), ("variance", VARIANCE), ("weight", WEIGHT))
            for n in listed(path, names)
        ]
        if len(found) != 1:
            held = f"holds {' and '.join(n for _, n in found)}" if found else "holds no noise map"
            raise ValueError(
                f"{path} {held}; say what the noise is with error=, variance= or weight= (e.g. weight='[WHT]', inverse variances), or sigma= for one number."
            )
        kind, name = found[0]
        given[kind] = f"[{name}]"
        stated = [kind]
        said = {"error": "standard deviations", "variance": "variances", "weight": "inverse variances"}[kind]
        notes.append(f"The noise is the extension {name}, read as {said}.")
    kind = stated[0]
    if kind == "sigma":
        if not (sigma is not None and np.isfinite(sigma) and sigma > 0):
            raise ValueError(f"The noise sigma must be positive and finite, got {sigma}.")
        return np.full(shape, float(sigma)), notes
    pixels, its_unit, name = _given(given[kind], path, shape, kind)
    negative = int((pixels < 0).sum())
    if negative:
        raise ValueError(
            f"The {kind} of {name} is negative at {negative} of {pixels.size} pixels, the lowest is {float(np.nanmin(pixels)):g}; give a {kind} that is not, with 0 or NaN where nothing is known."
        )
    power = {"error": "", "variance": "2", "weight": "-2"}[kind]
    wanted = unit if not power else f"({unit})**({power})"
    # pipelines often repeat the unit of the data for every extension
    if its_unit and its_unit != unit and not same_unit(its_unit, wanted):
        raise ValueError(
            f"The {kind} of {name} is in {its_unit} and the data are in {unit}, so {wanted} is expected; convert one of them."
        )
    values = pixels.astype(np.float64)
    if kind == "error":
        return values, notes
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sqrt(values) if kind == "variance" else np.where(values > 0, 1 / np.sqrt(values), np.inf), notes


def mask_of(path: Path, shape: tuple[int, ...], mask: Any, good: bool | None) -> tuple[Array, list[str]]:
    """True where a pixel is bad."""
    notes: list[str] = []
    if mask is None:
        found = listed(path, MASK)
        if not found:
            return np.zeros(shape, dtype=bool), notes
        mask = f"[{'DQ' if 'DQ' in found else found[0]}]"
        notes.append(f"The mask is the extension {mask[1:-1]}.")
    pixels, _, name = _given(mask, path, shape, "mask")
    if good is None:
        if isinstance(mask, (str, Path)) and str(mask).upper().endswith("[DQ]"):
            good = False
        elif pixels.dtype == bool:
            good = True  # the convention of this package
        else:
            raise ValueError(
                f"Say whether the pixels of {name} that are not 0 are to be used (mask_good=True) or to be left out (mask_good=False)."
            )
    set_ = np.nan_to_num(pixels.astype(np.float64), nan=0.0 if good else 1.0) != 0
    return (~set_ if good else set_), notes


def check_psf(
    path: Path, shape: tuple[int, ...], psf: Any, normalise: bool, oversampling: int
) -> tuple[Tensor | None, list[str]]:
    """The PSF as `(h, w)` float64 with sum 1, or None."""
    notes: list[str] = []
    if psf is None:
        if not listed(path, ("PSF",)):
            return None, notes
        psf = "[PSF]"
        notes.append("The PSF is the extension PSF.")
    if isinstance(psf, (str, Path)):
        image = read_image(psf, path)
        kernel, name = image.pixels, image.name
    else:
        kernel, name = np.asarray(psf), "the PSF given"
    kernel = kernel.astype(np.float64)
    if oversampling < 1 or oversampling != int(oversampling):
        raise ValueError(f"psf_oversampling is a whole number of PSF pixels along a data pixel, got {oversampling}.")
    if kernel.ndim != 2 or not np.isfinite(kernel).all():
        raise ValueError(
            f"The PSF of {name} must be a finite image (h, w), got the shape {kernel.shape}; mend it first."
        )
    if any(k > n * oversampling for k, n in zip(kernel.shape, shape)):
        raise ValueError(
            f"The PSF of {name} is {kernel.shape} at {oversampling} pixels a data pixel, larger than the image {tuple(shape)}; cut the PSF around its centre, or take a larger cut-out."
        )
    total = float(kernel.sum())
    if not abs(total - 1) <= 1e-3:
        if not normalise or total <= 0:
            raise ValueError(
                f"The PSF of {name} sums to {total:.5g} and not to 1; pass normalise_psf=True to scale it, or mend the file (a cut PSF that lost light is meant to sum to less: then scale the data instead)."
                if total > 0
                else f"The PSF of {name} sums to {total:.5g}; it is no point-spread function."
            )
        notes.append(f"The PSF summed to {total:.5g} and was scaled to 1.")
    kernel = kernel / total
    positions = [np.arange(n) - n // 2 for n in kernel.shape]
    off = [float((kernel.sum(1 - k) * positions[k]).sum()) for k in range(2)]
    # an even PSF centred between pixels is half a pixel off, too
    if max(abs(v) for v in off) > 0.3 * oversampling:
        notes.append(
            f"The PSF's centroid is ({off[0]:+.2f}, {off[1]:+.2f}) PSF pixels (y, x) off its entry ⌊n/2⌋; the model is shifted by as much."
        )
    if float(kernel.min()) < -1e-3 * float(kernel.max()):
        notes.append(f"The PSF is negative in places, down to {kernel.min() / kernel.max():.1%} of its peak.")
    return torch.from_numpy(np.ascontiguousarray(kernel)), notes
