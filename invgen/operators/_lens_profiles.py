"""The functions behind lens models: elementwise, smooth in their parameters, right in float32 as in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__: list[str] = []

CORE = 1e-8  # arcsec added in quadrature to radii, so that the centre of a cusp has a derivative


def arc_ratio(s: Tensor) -> Tensor:
    """A(s) = artanh(√s)/√s for 0 < s < 1, arctan(√−s)/√−s for s < 0; A(0) = 1, and smooth there.

    Around zero it is the series Σ s^k/(2k + 1), so that values and derivatives stay finite; elsewhere no square root
    is taken of a number whose derivative would be infinite.
    """
    near = s.abs() < 0.03
    # both roots see harmless numbers where the other branch is taken: a derivative 0 · ∞ would be NaN
    high = torch.where(near | (s <= 0), torch.full_like(s, 0.25), s).sqrt()
    low = torch.where(near | (s >= 0), torch.full_like(s, 0.25), -s).sqrt()
    far = torch.where(s > 0, torch.atanh(high) / high, torch.atan(low) / low)
    small = torch.where(near, s, torch.zeros_like(s))
    series = torch.full_like(s, 1 / 23)
    for k in range(10, -1, -1):  # 0.03^12 / 25 is below the rounding of float64
        series = series * small + 1 / (2 * k + 1)
    return torch.where(near, series, far)


def fraction_terms(axis_ratio: float, tolerance: float) -> int:
    """Terms of `gauss_fraction` for a relative error below `tolerance` at |z| ≤ f = (1 − q)/(1 + q).

    The n-th convergent is wrong by about ρⁿ, ρ = |(1 − √(1 − z))/(1 + √(1 − z))|, which is largest at z = f.
    """
    root = math.sqrt(2 * axis_ratio / (1 + axis_ratio))  # √(1 − f)
    rho = (1 - root) / (1 + root)
    return 2 if rho < 1e-12 else 2 + math.ceil(math.log(tolerance) / math.log(rho))


def gauss_fraction(b: Tensor, c: Tensor, z: Tensor, terms: int) -> Tensor:
    r"""₂F₁(1, b; c; z) by the continued fraction of Gauss, from the last of `terms` terms upwards.

        ₂F₁ = 1/(1 − e₁ z/(1 − e₂ z/(1 − …))),
        e_{2m+1} = (b + m)(c + m − 1)/((c + 2m − 1)(c + 2m)),        e_{2m} = m (c − b + m − 1)/((c + 2m − 2)(c + 2m − 1))

    (Jones & Thron 1980, section 6.1). It converges for every z off the cut [1, ∞). The coefficients tend to 1/4, so
    that the terms left out are replaced by their limit w = 1 − z/(4 w) = (1 + √(1 − z))/2.

    Args:
        b, c: real, broadcasting against z. z: complex.
    """
    tail = 0.5 * (1 + torch.sqrt(1 - z))
    for n in range(terms, 0, -1):
        m = n // 2
        if n == 1:
            e = b / c
        elif n % 2:
            e = (b + m) * (c + m - 1) / ((c + 2 * m - 1) * (c + 2 * m))
        else:
            e = m * (c - b + m - 1) / ((c + 2 * m - 2) * (c + 2 * m - 1))
        tail = 1 - e * z / tail
    return 1 / tail


def power_law(major: Tensor, minor: Tensor, radius: Tensor, q: Tensor, t: Tensor, terms: int) -> tuple[Tensor, Tensor]:
    r"""Deflection of the elliptical power law in its own axes, major axis first.

    With R = √(q² x² + y² + core²) and the elliptical angle φ, R e^{iφ} = q x + i y (Tessore & Metcalf 2015,
    equation 13; b = θ_E √q),

        α = 2b/(1 + q) (b/R)^{t−1} e^{iφ} ₂F₁(1, t/2; 2 − t/2; −f e^{2iφ}),        f = (1 − q)/(1 + q).

    The paper sums the hypergeometric function as a power series in f, which needs 184 terms at q = 0.1; the
    continued fraction needs 40.
    """
    core = torch.finfo(major.dtype).tiny + CORE**2
    R = (q.square() * major.square() + minor.square() + core).sqrt()
    unit = torch.complex(q * major / R, minor / R)
    b = radius * q.sqrt()
    z = -((1 - q) / (1 + q)) * unit.square()
    total = unit * gauss_fraction(0.5 * t, 2 - 0.5 * t, z, terms)
    scale = 2 * b / (1 + q) * torch.exp((t - 1) * torch.log(b / R))
    return scale * total.real, scale * total.imag


def isothermal(major: Tensor, minor: Tensor, radius: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    r"""Deflection of the singular isothermal ellipsoid in its own axes (Kormann, Schneider & Bartelmann 1994).

        α_x = θ_E √q/e arctan(e x/ψ),  α_y = θ_E √q/e artanh(e y/ψ),  e² = 1 − q²,  ψ² = q² x² + y²

    written with A(s) of `arc_ratio`, which has no 0/0 at q = 1.
    """
    core = torch.finfo(major.dtype).tiny + CORE**2
    psi = (q.square() * major.square() + minor.square() + core).sqrt()
    scale, flat = radius * q.sqrt(), 1 - q.square()
    x, y = major / psi, minor / psi
    # |y| reaches 1 on the minor axis: artanh of e y is finite there, but not the rounding of e y for a thin ellipse
    steep = (flat * y.square()).clamp_max(1 - torch.finfo(major.dtype).eps)
    return scale * x * arc_ratio(-flat * x.square()), scale * y * arc_ratio(steep)


def nfw_mass(x: Tensor) -> Tensor:
    r"""g(x) = ln(x/2) + A(1 − x²): mass of an NFW halo within the projected radius x r_s, over 4π ρ_s r_s³.

    (Wright & Brainerd 2000, equation 13.) Below x = 1/2 the logarithms cancel to x²; with r = √(1 − x²) it is there

        g = [ln(1 − x²/(2(1 + r))) − x² ln(x/2)/(1 + r)]/r.
    """
    inside = x < 0.5
    far = torch.where(inside, torch.full_like(x, 0.5), x)
    outer = torch.log(0.5 * far) + arc_ratio(1 - far.square())
    near = torch.where(inside, x, torch.full_like(x, 0.25))
    square = near.square()
    r = (1 - square).sqrt()
    inner = (torch.log1p(-0.5 * square / (1 + r)) - square * torch.log(0.5 * near) / (1 + r)) / r
    return torch.where(inside, inner, outer)
