"""Components of galaxy images, for many galaxies at once: every argument has the galaxy first.

Maps are (n, rows, columns) float32; parameters are (n, 1, 1).
"""

from __future__ import annotations

import numpy as np
from scipy.special import gamma, gammaincinv, iv

Array = np.ndarray


def sersic(radius: Array, half_light: Array, n: Array, axis_ratio: Array) -> Array:
    """Sérsic profile of unit total light, in light per area in units of the radius."""
    b = gammaincinv(2.0 * n, 0.5)  # half of the light lies within the half-light radius
    total = 2.0 * np.pi * axis_ratio * n * half_light**2 * np.exp(b) * b ** (-2.0 * n) * gamma(2.0 * n)
    power = (1.0 / n).astype(np.float32)
    shape = np.exp(-b.astype(np.float32) * ((radius / half_light.astype(np.float32)) ** power - np.float32(1.0)))
    return shape * (1.0 / total).astype(np.float32)


def turned(y: Array, x: Array, angle: Array) -> tuple[Array, Array]:
    """Coordinates along (first) and across an axis at `angle` from +x."""
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    return cos * x + sin * y, cos * y - sin * x


def spiral(
    radius: Array, angle: Array, arms: Array, pitch: Array, start: Array, phase: Array, sharpness: Array
) -> Array:
    """Logarithmic spiral arms: mean over the angle 1 at every radius; largest where arms (φ − ln(R/R0)/tan pitch) = phase."""
    winding = (1.0 / np.tan(pitch)).astype(np.float32) * np.log(np.maximum(radius / start.astype(np.float32), 1e-3))
    turn = arms.astype(np.float32) * (angle - winding) - phase.astype(np.float32)
    return np.exp(sharpness.astype(np.float32) * np.cos(turn)) * (1.0 / iv(0, sharpness)).astype(np.float32)


def gaussians(y: Array, x: Array, place_y: Array, place_x: Array, sd: Array, share: Array) -> Array:
    """Σ_k share_k N((y, x); place_k, sd_k²), as products of (n, rows, knots) and (n, knots, columns).

    Args:
        y, x: (n, rows) and (n, columns) axes. place_y, place_x, sd, share: (n, knots).
    """
    across = np.exp(-0.5 * np.square((y[:, :, None] - place_y[:, None]) / sd[:, None]))
    along = np.exp(-0.5 * np.square((x[:, None] - place_x[:, :, None]) / sd[:, :, None]))
    scale = share / (2.0 * np.pi * sd**2)
    return np.matmul(across.astype(np.float32), (scale[:, :, None] * along).astype(np.float32))
