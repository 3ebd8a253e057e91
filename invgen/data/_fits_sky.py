r"""Where an image lies on the sky: pixel scale, north and parity from a WCS, and the WCS of any grid in its frame.

A grid counts arcsec from the middle of the image, x with the columns and y with the rows (upwards, as FITS is drawn).
Nothing is resampled: an image that was not drizzled to north up keeps its pixels, and `SkyFrame` says where north is.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from invgen.grid import Grid

Array = np.ndarray


@dataclass(frozen=True)
class SkyFrame:
    """The tangent plane of an image in the coordinates of its grid.

    Attributes:
        sky: right ascension and declination (or the lon and lat of `ctype`) of the reference point, degrees.
        point: (x, y) of that point on the grid, arcsec.
        matrix: ((∂ξ/∂x, ∂ξ/∂y), (∂η/∂x, ∂η/∂y)): ξ to the east and η to the north in the plane, dimensionless.
        ctype: axes of the projection. system: RADESYS, "" where not stated.
    """

    sky: tuple[float, float]
    point: tuple[float, float]
    matrix: tuple[tuple[float, float], tuple[float, float]]
    ctype: tuple[str, str] = ("RA---TAN", "DEC--TAN")
    system: str = ""

    @property
    def north(self) -> float:
        """Direction of north in degrees counter-clockwise from +y, in (−180, 180]."""
        x, y = np.linalg.solve(np.array(self.matrix), (0.0, 1.0))
        angle = math.degrees(math.atan2(-x, y))
        return 0.0 if abs(angle) < 1e-9 else angle

    @property
    def mirrored(self) -> bool:
        """True where east is clockwise of north, other than on the sky."""
        return float(np.linalg.det(np.array(self.matrix))) > 0

    def on(self, other: SkyFrame) -> dict[str, float]:
        """β = R(rotation) diag(1, parity) θ + shift, from coordinates in this frame to those in the other."""
        mine, its = np.array(self.matrix), np.array(other.matrix)
        apart = np.array([(self.sky[0] - other.sky[0] + 180) % 360 - 180, self.sky[1] - other.sky[1]]) * (
            3600 * math.cos(math.radians(0.5 * (self.sky[1] + other.sky[1]))),
            3600,
        )
        turn = np.linalg.solve(its, mine)
        x, y = np.linalg.solve(its, apart - mine @ self.point) + other.point
        parity = math.copysign(1.0, np.linalg.det(turn))
        return {
            "shift_y": float(y),
            "shift_x": float(x),
            "rotation": math.atan2(turn[1, 0], turn[0, 0]),
            "parity": parity,
        }

    def cards(self, grid: Grid) -> dict[str, Any]:
        """The WCS of a grid in this frame, as header cards."""
        (dy, dx), (oy, ox) = grid.spacing, grid.origin
        m = np.array(self.matrix) / 3600.0
        cards: dict[str, Any] = {
            "WCSAXES": 2,
            "CTYPE1": self.ctype[0],
            "CTYPE2": self.ctype[1],
            "CUNIT1": "deg",
            "CUNIT2": "deg",
            "CRVAL1": self.sky[0],
            "CRVAL2": self.sky[1],
            "CRPIX1": 1.0 + (self.point[0] - ox) / dx,
            "CRPIX2": 1.0 + (self.point[1] - oy) / dy,
            "CD1_1": m[0, 0] * dx,
            "CD1_2": m[0, 1] * dy,
            "CD2_1": m[1, 0] * dx,
            "CD2_2": m[1, 1] * dy,
        }
        return cards | ({"RADESYS": self.system} if self.system else {})


def plain_cards(grid: Grid) -> dict[str, Any]:
    """Linear axes in arcsec, for a grid of which nobody knows where on the sky it is."""
    (dy, dx), (oy, ox) = grid.spacing, grid.origin
    cards: dict[str, Any] = {"WCSAXES": 2}
    for k, (step, start, name) in enumerate(((dx, ox, "X"), (dy, oy, "Y")), 1):
        cards |= {f"CTYPE{k}": name, f"CUNIT{k}": "arcsec", f"CRPIX{k}": 1.0, f"CRVAL{k}": start, f"CDELT{k}": step}
    return cards


def frame_of(header: Any, shape: tuple[int, int]) -> tuple[SkyFrame, tuple[float, float], list[str]] | None:
    """Frame, (dy, dx) in arcsec and remarks; None where the header has no celestial WCS.

    A distorted WCS (SIP and others) is taken as linear, with the scale and rotation at the middle of the image.
    """
    from astropy.wcs import WCS

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wcs = WCS(header, naxis=2)
        except Exception:  # wcslib has errors of its own kinds for headers that say nothing sensible
            return None
        if not wcs.has_celestial:
            return None
        wcs = wcs.celestial
        notes = []
        ny, nx = shape
        if wcs.has_distortion:
            middle = (0.5 * (nx - 1), 0.5 * (ny - 1))
            reference, matrix, at = _linearised(wcs, middle)
            notes.append(
                "The WCS has distortions; the grid has the scale and rotation of the middle of the image and is off towards its edges."
            )
        else:
            matrix = np.array(wcs.pixel_scale_matrix, dtype=float)
            reference = (float(wcs.wcs.crval[0]), float(wcs.wcs.crval[1]))
            at = (float(wcs.wcs.crpix[0]) - 1, float(wcs.wcs.crpix[1]) - 1)
    matrix = matrix * 3600.0  # arcsec a pixel
    dx, dy = (float(np.hypot(*matrix[:, k])) for k in range(2))
    if not (math.isfinite(dx * dy) and dx * dy > 0 and abs(np.linalg.det(matrix)) > 1e-6 * dx * dy):
        return None
    skew = abs(float(matrix[:, 0] @ matrix[:, 1])) / (dx * dy)
    if skew > 0.01:
        notes.append(
            f"The pixel axes are {math.degrees(math.acos(skew)):.1f} degrees apart; the grid takes them as 90."
        )
    unit = matrix / (dx, dy)
    frame = SkyFrame(
        reference,
        (dx * (at[0] - 0.5 * (nx - 1)), dy * (at[1] - 0.5 * (ny - 1))),
        ((float(unit[0, 0]), float(unit[0, 1])), (float(unit[1, 0]), float(unit[1, 1]))),
        tuple(str(c).replace("-SIP", "") for c in wcs.wcs.ctype),  # type: ignore[arg-type]
        str(wcs.wcs.radesys or ""),
    )
    return frame, (dy, dx), notes


def _linearised(wcs: Any, middle: tuple[float, float]) -> tuple[tuple[float, float], Array, tuple[float, float]]:
    """Sky at a pixel, and (ξ, η) in degrees a pixel there."""
    x, y = middle
    lon, lat = (np.asarray(v) for v in wcs.all_pix2world([x, x + 0.5, x - 0.5, x, x], [y, y, y, y + 0.5, y - 0.5], 0))
    xi = (np.remainder(lon - lon[0] + 180, 360) - 180) * np.cos(np.radians(lat[0]))
    eta = lat - lat[0]
    matrix = np.array([[xi[1] - xi[2], xi[3] - xi[4]], [eta[1] - eta[2], eta[3] - eta[4]]])
    return (float(lon[0]), float(lat[0])), matrix, middle


def centred_grid(shape: tuple[int, int], scale: tuple[float, float], units: str) -> Grid:
    """A grid in arcsec with zero in the middle of the image, like that of the galaxy generators."""
    origin = tuple(-0.5 * d * (n - 1) for n, d in zip(shape, scale))
    return Grid(shape, scale, origin, ("y", "x"), ("arcsec", "arcsec"), ("flux",), (units,))
