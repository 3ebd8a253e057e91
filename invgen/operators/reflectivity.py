r"""Reflection coefficients of plane waves, linearised in the contrasts, and what is asked of angles and backgrounds.

With Snell's law sin φ = γ sin θ, γ = Vs/Vp, and a contrast Δ ln v ≈ Δv/v̄, R(θ) = Σ_k G_k(θ, γ) Δm_k with

    aki_richards   (ln vp, ln vs, ln ρ):   1/(2 cos²θ),           −4 γ² sin²θ,   ½ − 2 γ² sin²θ
    fatti          (ln Ip, ln Is, ln ρ):   ½ (1 + tan²θ),         −4 γ² sin²θ,   2 γ² sin²θ − ½ tan²θ
    ps             (ln vp, ln vs, ln ρ):   0,    t (4 sin²φ − 4 γ cos θ cos φ),   −t (1 − 2 sin²φ + 2 γ cos θ cos φ),
                                           t = tan φ / (2 γ) = sin θ / (2 cos φ)

The numbers of the first two are those of `pylops.avo.avo.akirichards` and `fatti`. For converted waves they are not: PyLops
(2.8) has tan φ / 2 for t and (γ sin φ)² for sin²φ, which is no limit of the Zoeppritz equations (amplitudes about γ times
the right ones: a factor of two). "ps" here is the exact equations' first order; "ps_pylops" gives PyLops' numbers.

References: Aki & Richards 1980, Quantitative Seismology, eq. 5.44 (PP and PS); Fatti et al. 1994, Geophysics 59, 1362;
Xu & Bancroft 1997, CREWES Research Report 9 (PS beside PP).
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from invgen.grid import Grid

__all__ = ["ava_coefficients", "check_angles"]

ALIASES = {"akirich": "aki_richards", "PS": "ps"}


def check_angles(
    angles: Tensor | np.ndarray | list[float], gathers: int | None = None, *, unit: str | None = None
) -> Tensor:
    """Angles of incidence in degrees, `(n_angles,)` float64, after they were questioned.

    Args:
        angles: `(n_angles,)`. gathers: how many angles the data have. unit: "degrees", "radians", or None: degrees,
            but several angles that are all below π/2 look like radians and are asked about.

    Raises:
        ValueError: another number than the data have, a magnitude of 90 degrees and more, values that look like radians.
    """
    theta = torch.as_tensor(angles, dtype=torch.float64).detach().cpu()
    if unit not in (None, "degrees", "radians"):
        raise ValueError(f'The unit of the angles is "degrees" or "radians", got {unit!r}.')
    if theta.ndim != 1 or len(theta) == 0 or not bool(torch.isfinite(theta).all()):
        raise ValueError(
            f"Angles are a vector (n_angles,) of finite numbers, got a tensor of shape {tuple(theta.shape)}."
        )
    if gathers is not None and gathers != len(theta):
        raise ValueError(f"{len(theta)} angles were given for data with {gathers}; give one angle for each gather.")
    if unit == "radians":
        theta = torch.rad2deg(theta)
    largest = float(theta.abs().max())
    if unit is None and len(theta) > 1 and 0 < largest < 1.6:
        raise ValueError(
            f"The angles run from {float(theta.min()):g} to {float(theta.max()):g}, which looks like radians; "
            'say unit="radians" (angle_unit in PreStack), or unit="degrees" if they really are that small.'
        )
    if largest >= 90:
        raise ValueError(f"Angles of incidence lie below 90 degrees, got {largest:g}; give degrees from the vertical.")
    return theta


def check_vsvp(vsvp: float | Tensor | np.ndarray, nz: int, nx: int) -> Tensor:
    """Vs/Vp of the background as `(1, 1)`, `(nz, 1)` or `(nz, nx)`, float64; constant where it is constant."""
    ratio = torch.as_tensor(vsvp, dtype=torch.float64).detach().cpu()
    if tuple(ratio.shape) not in ((), (nz,), (nz, nx), (nz, 1)):
        raise ValueError(
            f"Vs/Vp is a number, a profile ({nz},) or a field ({nz}, {nx}), got a tensor of shape {tuple(ratio.shape)}."
        )
    if not bool(torch.isfinite(ratio).all()) or not bool((ratio > 0).all()):
        raise ValueError(
            "Vs/Vp of the background must be positive and finite; fill fluids with a small number like 0.01."
        )
    if not bool((ratio < 1).all()):
        top = float(ratio.max())
        raise ValueError(f"Vs/Vp lies below one, got {top:g}, which looks like Vp/Vs; give its inverse {1 / top:.3g}.")
    ratio = ratio.reshape(-1, 1) if ratio.ndim < 2 else ratio
    if bool((ratio == ratio[:, :1]).all()):
        ratio = ratio[:, :1]
    return ratio[:1] if bool((ratio == ratio[:1]).all()) else ratio


def ava_coefficients(angles: Tensor, vsvp: Tensor, linearization: str = "aki_richards") -> Tensor:
    """G_k(θ, γ) of the three channels, by the equations above.

    Args:
        angles: `(n_angles,)` in degrees. vsvp: γ, any shape. linearization: "aki_richards" (or "akirich"), "fatti",
            "ps" (or "PS"), "ps_pylops".

    Returns:
        `(n_angles, 3, *vsvp.shape)`.
    """
    kind = ALIASES.get(linearization, linearization)
    theta = torch.deg2rad(angles).reshape(-1, *[1] * vsvp.ndim)
    g, same = vsvp, torch.zeros_like(theta + vsvp)
    s2, tan2 = theta.sin().square(), theta.tan().square()
    if kind == "aki_richards":
        terms = [0.5 / theta.cos().square() + same, -4 * g**2 * s2, 0.5 - 2 * g**2 * s2]
    elif kind == "fatti":
        terms = [0.5 * (1 + tan2) + same, -4 * g**2 * s2, 2 * g**2 * s2 - 0.5 * tan2]
    elif kind in ("ps", "ps_pylops"):
        phi = torch.asin(g * theta.sin())
        both = g * theta.cos() * phi.cos()
        t, ps2 = phi.tan() / (2 * g), phi.sin().square()
        if kind == "ps_pylops":
            t, ps2 = phi.tan() / 2, (g * phi.sin()).square()
        terms = [same, t * (4 * ps2 - 4 * both), -t * (1 - 2 * ps2 + 2 * both)]
    else:
        raise ValueError(
            f'linearization must be "aki_richards", "fatti", "ps" or "ps_pylops", got {linearization!r}; for other formulas pass coefficients=.'
        )
    return torch.stack(terms, dim=1)


def check_channels(grid: Grid, linearization: str, where: str) -> None:
    """Refuse a grid whose channel names contradict the linearization, and warn of plain values for logarithms."""
    names = [name.lower().replace("-", "_") for name in grid.channels]
    impedances = [n for n in names if n.split("_")[-1] in ("ip", "is", "ai", "si", "impedance")]
    velocities = [n for n in names if n.split("_")[-1] in ("vp", "vs", "velocity")]
    fatti = ALIASES.get(linearization, linearization) == "fatti"
    if (velocities if fatti else impedances) and not (impedances if fatti else velocities):
        wanted = "(ln Ip, ln Is, ln rho)" if fatti else "(ln vp, ln vs, ln rho)"
        raise ValueError(
            f'linearization="{linearization}" takes {wanted}, the grid has the channels {grid.channels}; choose "{"aki_richards" if fatti else "fatti"}" or convert the model.'
        )
    plain = [n for n in names if n in ("vp", "vs", "rho", "ip", "is", "density")]
    if plain:
        warnings.warn(
            f"{where} takes logarithms, but the grid has the channels {grid.channels}: right only as {where}(…) @ Log().",
            stacklevel=3,
        )
