r"""Critical curves and caustics of a lens, for figures and for the radius they define.

Images merge where det ∂β/∂θ = 0, the critical curves; their light comes from the caustics β(critical curve). A profile
with a cusp (isothermal or shallower) has a further line in the source plane, the cut β of a small circle around its
centre, across which an image appears or vanishes without merging.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import contourpy
import numpy as np
import torch
from torch import Tensor

from invgen.grid import Grid
from invgen.operators.lens_models import LensModel

__all__ = ["LensCurves", "critical_curves", "effective_einstein_radius"]


class LensCurves(NamedTuple):
    """Lines as arrays `(n, 2)` of (y, x) in arcsec; closed ones end where they begin.

    Attributes:
        critical: in the image plane. caustics: in the source plane, one for each critical curve, point by point.
    """

    critical: list[np.ndarray]
    caustics: list[np.ndarray]


def critical_curves(lens: LensModel, image_grid: Grid, *, fine: int = 4, steps: int = 3, **theta: float) -> LensCurves:
    """Lines where det ∂β/∂θ = 0, and the caustics they map to.

    Args:
        lens: the model. image_grid: where to look, axes (y, x). fine: samples a pixel and axis in search of lines.
        steps: Newton steps along the gradient of the determinant, which refine the points of the contour.
        theta: parameters instead of the model's own, numbers.

    Cost: one Jacobian on the fine grid, and three on the points for each step. Curves smaller than a fine pixel are
    not found.
    """
    y, x = (
        o + d * ((torch.arange(n * fine, dtype=torch.float64) + 0.5) / fine - 0.5)
        for n, d, o in zip(image_grid.shape, image_grid.spacing, image_grid.origin, strict=True)
    )
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    # the arctangent of det: it falls to −∞ at a cusp, where lines would be drawn through far values
    level = torch.atan(_determinant(lens, grid_y, grid_x, theta)).nan_to_num(-0.5 * math.pi)
    lines = contourpy.contour_generator(x.numpy(), y.numpy(), level.numpy()).lines(0.0)
    pixel = min(image_grid.spacing) / fine
    critical = [_refined(lens, np.asarray(line)[:, ::-1].copy(), theta, steps, pixel) for line in lines]
    caustics = []
    for line in critical:
        beta = lens.rays(torch.from_numpy(line[:, 0]), torch.from_numpy(line[:, 1]), **theta)
        caustics.append(torch.stack(beta, dim=1).numpy())
    return LensCurves(critical, caustics)


def effective_einstein_radius(lens: LensModel, image_grid: Grid, **theta: float) -> float:
    """√(area/π) of the largest closed critical curve in arcsec: what "Einstein radius" means for any lens.

    Raises:
        ValueError: no closed critical curve within the grid.
    """
    areas = [
        _area(line)
        for line in critical_curves(lens.at(**theta), image_grid).critical
        if np.array_equal(line[0], line[-1])
    ]
    if not areas:
        raise ValueError("The lens has no closed critical curve within the grid; give a larger one, or more pixels.")
    return math.sqrt(max(areas) / math.pi)


def _determinant(lens: LensModel, y: Tensor, x: Tensor, theta: dict[str, float]) -> Tensor:
    J = lens.jacobian(y, x, **theta)
    return J[..., 0, 0] * J[..., 1, 1] - J[..., 0, 1] * J[..., 1, 0]


def _refined(lens: LensModel, line: np.ndarray, theta: dict[str, float], steps: int, pixel: float) -> np.ndarray:
    y, x = torch.from_numpy(line[:, 0].copy()), torch.from_numpy(line[:, 1].copy())
    h = 1e-5 * pixel
    for _ in range(steps):
        value = _determinant(lens, y, x, theta)
        slope_y = (_determinant(lens, y + h, x, theta) - value) / h
        slope_x = (_determinant(lens, y, x + h, theta) - value) / h
        length = -value / (slope_y.square() + slope_x.square()).clamp_min(1e-30)
        # a point that would leave its pixel sits at a cusp of the curve, and stays
        far = (length * slope_y).abs().maximum((length * slope_x).abs()) > pixel
        length = torch.where(far, torch.zeros_like(length), length)
        y, x = y + length * slope_y, x + length * slope_x
    out = torch.stack([y, x], dim=1).numpy()
    if np.array_equal(line[0], line[-1]):
        out[-1] = out[0]
    return out


def _area(line: np.ndarray) -> float:
    y, x = line[:, 0], line[:, 1]
    return 0.5 * abs(float(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1])))
