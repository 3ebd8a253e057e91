r"""Gravitational lenses: thin mass distributions given by their deflection angle.

A ray seen at θ left the source plane at β = θ − α(θ). Angles are in arcsec, positions (y, x) with y up; position
angles in radians counter-clockwise from +x. Models are frozen dataclasses of numbers; `a + b` deflects by the sum.

Every parameter can be replaced at the call by a tensor, one value for each sample, and is differentiated:
`lens.deflection(y, x, einstein_radius=theta)`. A number out of its range raises; an entry of a tensor that is out of
range makes its own item NaN, so that one bad proposal does not end a run of samplers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from invgen.operators._lens_profiles import CORE, fraction_terms, isothermal, nfw_mass, power_law
from invgen.operators._profiles import POSITIVE, Profile, ProfileSum, own_axes

__all__ = ["EPL", "NFW", "SIE", "SIS", "ExternalShear", "LensModel", "LensSum", "PointMass"]


@dataclass(frozen=True)
class LensModel(Profile):
    """A mass distribution; subclasses define `_deflect`."""

    def deflection(self, y: Tensor, x: Tensor, **theta: Tensor | float) -> tuple[Tensor, Tensor]:
        """(α_y, α_x) in arcsec.

        Args:
            y, x: positions in arcsec, of one shape.
            theta: parameters instead of the model's own, numbers or tensors. A `(batch,)` tensor runs along the first
                axis of the positions, `(batch or 1, ...)`.

        Returns:
            Shaped like the positions, with the batch where parameters have one.
        """
        y, x = torch.as_tensor(y), torch.as_tensor(x)
        return self._deflect(y, x, self._values(theta, x))

    def _deflect(self, y: Tensor, x: Tensor, p: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} does not define _deflect.")

    def rays(self, y: Tensor, x: Tensor, **theta: Tensor | float) -> tuple[Tensor, Tensor]:
        """(β_y, β_x) = θ − α(θ), where the rays seen at (y, x) meet the source plane."""
        alpha_y, alpha_x = self.deflection(y, x, **theta)
        return y - alpha_y, x - alpha_x

    def jacobian(self, y: Tensor, x: Tensor, **theta: Tensor | float) -> Tensor:
        """∂β/∂θ, `(*positions, 2, 2)`, rows β_y, β_x and columns y, x, by forward differentiation."""
        y, x = (torch.as_tensor(v).contiguous() for v in (y, x))  # forward mode takes no expanded tensor

        def rays(y: Tensor, x: Tensor) -> Tensor:
            return torch.stack(self.rays(y, x, **theta), dim=-1)

        one, zero = torch.ones_like(y), torch.zeros_like(y)
        columns = [torch.func.jvp(rays, (y, x), tangent)[1] for tangent in ((one, zero), (zero, one))]
        return torch.stack(columns, dim=-1)

    def convergence(self, y: Tensor, x: Tensor, **theta: Tensor | float) -> Tensor:
        """κ = ½ ∇·α, the surface density over the critical one."""
        jacobian = self.jacobian(y, x, **theta)
        return 1 - 0.5 * (jacobian[..., 0, 0] + jacobian[..., 1, 1])

    def magnification(self, y: Tensor, x: Tensor, **theta: Tensor | float) -> Tensor:
        """μ = 1/det(∂β/∂θ), negative where the image is mirrored."""
        J = self.jacobian(y, x, **theta)
        return 1 / (J[..., 0, 0] * J[..., 1, 1] - J[..., 0, 1] * J[..., 1, 0])

    def __add__(self, other: LensModel) -> LensSum:
        parts = [p.parts if isinstance(p, LensSum) else (p,) for p in (self, other)]
        return LensSum(parts[0] + parts[1])


@dataclass(frozen=True)
class SIE(LensModel):
    r"""Singular isothermal ellipsoid: κ = θ_E / (2 √(q x² + y²/q)), x along its major axis.

    The critical curve encloses π θ_E². Deflection: see `isothermal` (Kormann, Schneider & Bartelmann 1994).

    Args:
        einstein_radius: θ_E > 0, arcsec. axis_ratio: 0 < q ≤ 1. angle: of the major axis, radians from +x.
        center_y, center_x: arcsec. name: begins the parameters' names where a sum has them twice.

    Raises:
        ValueError: a number out of its range.
    """

    einstein_radius: float
    axis_ratio: float = 1.0
    angle: float = 0.0
    center_y: float = 0.0
    center_x: float = 0.0
    name: str = "sie"

    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"einstein_radius": POSITIVE, "axis_ratio": (0.0, 1.0)}
    closed: ClassVar[tuple[str, ...]] = ("axis_ratio",)

    def _deflect(self, y: Tensor, x: Tensor, p: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        major, minor, cos, sin = own_axes(y, x, p)
        along, across = isothermal(major, minor, p["einstein_radius"], p["axis_ratio"])
        return sin * along + cos * across, cos * along - sin * across


@dataclass(frozen=True)
class EPL(LensModel):
    r"""Elliptical power law: κ = (2 − t)/2 (θ_E √q / R)^t, R² = q² x² + y², x along its major axis.

    In three dimensions the density falls as r^{−(t + 1)}; t = 1 is the `SIE`. Deflection by the hypergeometric
    function of Tessore & Metcalf (2015, A&A 580, A79), summed as a continued fraction that converges for every q
    and t: see `power_law`.

    Args:
        einstein_radius, axis_ratio, angle, center_y, center_x, name: as in `SIE`.
        slope: 0 < t < 2.
        smallest_axis_ratio: the number of terms is derived for this q (and for `axis_ratio`); a smaller one given as
            a tensor is out of range.

    Raises:
        ValueError: a number out of its range.

    Relative error below 1e-14 in float64 and 1e-8, less than its rounding, in float32. Cost: a complex division a ray
    and term, 48 and 28 terms for q ≥ 0.05.
    """

    einstein_radius: float
    axis_ratio: float = 1.0
    angle: float = 0.0
    center_y: float = 0.0
    center_x: float = 0.0
    slope: float = 1.0
    smallest_axis_ratio: float = 0.05
    name: str = "epl"

    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        "einstein_radius": POSITIVE,
        "axis_ratio": (0.0, 1.0),
        "slope": (0.0, 2.0),
        "smallest_axis_ratio": (0.0, 1.0),
    }
    closed: ClassVar[tuple[str, ...]] = ("axis_ratio", "smallest_axis_ratio")
    pinned: ClassVar[tuple[str, ...]] = ("name", "smallest_axis_ratio")

    def _values(self, theta: Mapping[str, Tensor | float], like: Tensor) -> dict[str, Any]:
        p, given = super()._values(theta, like), theta.get("axis_ratio", self.axis_ratio)
        smallest = min(self.axis_ratio, self.smallest_axis_ratio) if isinstance(given, Tensor) else float(given)
        if isinstance(given, Tensor):  # no look at its values, which would wait for the device
            p["axis_ratio"] = torch.where(p["axis_ratio"] < smallest, math.nan, p["axis_ratio"])
        p["terms"] = fraction_terms(smallest, 1e-14 if like.dtype == torch.float64 else 1e-8)
        return p

    def _deflect(self, y: Tensor, x: Tensor, p: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        major, minor, cos, sin = own_axes(y, x, p)
        along, across = power_law(major, minor, p["einstein_radius"], p["axis_ratio"], p["slope"], p["terms"])
        return sin * along + cos * across, cos * along - sin * across


@dataclass(frozen=True)
class ExternalShear(LensModel):
    r"""Tidal field of what is not modelled: α_x = γ₁ x + γ₂ y, α_y = γ₂ x − γ₁ y.

    Args:
        gamma_1, gamma_2: components of the shear. center_y, center_x: where it vanishes, arcsec; not free, because
            moving it only moves the source. name: as in `SIE`.
    """

    gamma_1: float = 0.0
    gamma_2: float = 0.0
    center_y: float = 0.0
    center_x: float = 0.0
    name: str = "shear"

    pinned: ClassVar[tuple[str, ...]] = ("name", "center_y", "center_x")

    def _deflect(self, y: Tensor, x: Tensor, p: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        y, x = y - self.center_y, x - self.center_x
        return p["gamma_2"] * x - p["gamma_1"] * y, p["gamma_1"] * x + p["gamma_2"] * y


@dataclass(frozen=True)
class _Round(LensModel):
    """A circular lens: α = a(r) (y, x)/r."""

    def _deflect(self, y: Tensor, x: Tensor, p: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        y, x = y - p["center_y"], x - p["center_x"]
        r = (y.square() + x.square() + torch.finfo(x.dtype).tiny + CORE**2).sqrt()
        ratio = self._angle(r, p) / r
        return ratio * y, ratio * x

    def _angle(self, r: Tensor, p: Mapping[str, Any]) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not define _angle.")


@dataclass(frozen=True)
class SIS(_Round):
    """Singular isothermal sphere: α = θ_E θ/|θ|.

    Args:
        einstein_radius: θ_E > 0, arcsec. center_y, center_x: arcsec. name: as in `SIE`.
    """

    einstein_radius: float
    center_y: float = 0.0
    center_x: float = 0.0
    name: str = "sis"

    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"einstein_radius": POSITIVE}

    def _angle(self, r: Tensor, p: Mapping[str, Any]) -> Tensor:
        return p["einstein_radius"]


@dataclass(frozen=True)
class PointMass(_Round):
    """A point mass: α = θ_E² θ/|θ|².

    Args:
        einstein_radius: θ_E > 0, arcsec. center_y, center_x: arcsec. name: as in `SIE`.

    A core of 1e-8 arcsec keeps the ray through the mass itself finite.
    """

    einstein_radius: float
    center_y: float = 0.0
    center_x: float = 0.0
    name: str = "point"

    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"einstein_radius": POSITIVE}

    def _angle(self, r: Tensor, p: Mapping[str, Any]) -> Tensor:
        return p["einstein_radius"].square() / r


@dataclass(frozen=True)
class NFW(_Round):
    r"""Spherical Navarro–Frenk–White halo, ρ = ρ_s / [(r/r_s)(1 + r/r_s)²].

        α(r) = 4 κ_s r_s g(x)/x,        x = r/r_s,  κ_s = ρ_s r_s/Σ_cr,

    g in `nfw_mass` (Wright & Brainerd 2000), by a series around x = 1 and without cancellation below 1/2.

    Args:
        scale_radius: r_s > 0, arcsec. kappa_s: κ_s > 0. center_y, center_x: arcsec. name: as in `SIE`.
    """

    scale_radius: float
    kappa_s: float
    center_y: float = 0.0
    center_x: float = 0.0
    name: str = "nfw"

    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"scale_radius": POSITIVE, "kappa_s": POSITIVE}

    def _angle(self, r: Tensor, p: Mapping[str, Any]) -> Tensor:
        x = r / p["scale_radius"]
        return 4 * p["kappa_s"] * p["scale_radius"] * nfw_mass(x) / x


@dataclass(frozen=True)
class LensSum(ProfileSum, LensModel):
    """Several lenses in one plane; made by `+`.

    A parameter keeps its name where one part has it. Where several do it is `NAME_parameter`, NAME being the part's:
    `SIE(1.2, name="main") + SIE(0.3, name="satellite")` has `main_einstein_radius`.

    Raises:
        ValueError: two parts of one name that share parameters.
    """

    def deflection(self, y: Tensor, x: Tensor, **theta: Tensor | float) -> tuple[Tensor, Tensor]:
        self._check_names(theta)
        each = [p.deflection(y, x, **own) for p, own in zip(self.parts, self._split(theta), strict=True)]
        total_y, total_x = each[0]
        for alpha_y, alpha_x in each[1:]:
            total_y, total_x = total_y + alpha_y, total_x + alpha_x
        return total_y, total_x
