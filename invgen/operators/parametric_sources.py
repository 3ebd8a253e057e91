r"""Light with few parameters: Sérsic profiles and stacks of them, as sources behind a lens and as the lens's own light.

A profile is a frozen dataclass of numbers with `brightness(y, x, **theta)`, like a lens model with its deflection;
`a + b` adds light. Operators make images of them: `ParametricImage` of a vector of parameters, `LensLight` adds a
profile to the image of another operator.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from invgen.contracts import Operator
from invgen.grid import Grid
from invgen.operators._image_plane import ImagePlane, Quantity, sky_grid
from invgen.operators._lens_profiles import CORE
from invgen.operators._profiles import POSITIVE, Profile, ProfileSum, own_axes
from invgen.operators.lens_models import SIE, ExternalShear, LensModel
from invgen.operators.lensing import GravitationalLens

__all__ = ["LensLight", "LightProfile", "LightSum", "ParametricImage", "Sersic"]


@dataclass(frozen=True)
class LightProfile(Profile):
    """Light on the sky; subclasses define `_shine`."""

    def brightness(self, y: Tensor, x: Tensor, **theta: Tensor | float) -> Tensor:
        """Surface brightness at positions in arcsec; parameters as in `LensModel.deflection`."""
        y, x = torch.as_tensor(y), torch.as_tensor(x)
        return self._shine(y, x, self._values(theta, x))

    def _shine(self, y: Tensor, x: Tensor, p: Mapping[str, Any]) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not define _shine.")

    def __add__(self, other: LightProfile) -> LightSum:
        parts = [p.parts if isinstance(p, LightSum) else (p,) for p in (self, other)]
        return LightSum(parts[0] + parts[1])


@dataclass(frozen=True)
class Sersic(LightProfile):
    r"""Sérsic profile: I(R) = I_e exp(−b_n [(R/R_e)^{1/n} − 1]), R² = x² + y²/q², x along the major axis.

    Half of the light is within R_e; n = 1 is an exponential disc, 1/2 a Gaussian, 4 de Vaucouleurs' law. b_n is the
    asymptotic series of Ciotti & Bertin (1999, A&A 352, 447, equation 18) to n⁻⁴: the share of the light within R_e is
    then 1/2 to 1e-4 at n = 1/2, 1e-5 at 1 and 1e-6 from 2 on. The total
    light is 2π q n R_e² I_e e^{b} b^{−2n} Γ(2n).

    Args:
        intensity: I_e, surface brightness at R_e; any sign. half_light_radius: R_e > 0 along the major axis, arcsec.
        index: 0.36 < n < 12. axis_ratio: 0 < q ≤ 1. angle: of the major axis, radians from +x.
        center_y, center_x: arcsec. name: begins the parameters' names where a stack has them twice.

    Raises:
        ValueError: a number out of its range.
    """

    intensity: float
    half_light_radius: float
    index: float = 1.0
    axis_ratio: float = 1.0
    angle: float = 0.0
    center_y: float = 0.0
    center_x: float = 0.0
    name: str = "source"

    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        "half_light_radius": POSITIVE,
        "index": (0.36, 12.0),
        "axis_ratio": (0.0, 1.0),
    }
    closed: ClassVar[tuple[str, ...]] = ("axis_ratio",)

    def _shine(self, y: Tensor, x: Tensor, p: Mapping[str, Any]) -> Tensor:
        major, minor, _, _ = own_axes(y, x, p)
        n, b = p["index"], _half_light(p["index"])
        square = major.square() + (minor / p["axis_ratio"]).square() + CORE**2 + torch.finfo(x.dtype).tiny
        # (R/R_e)^{1/n} from the logarithm of the square: no root whose derivative is infinite at the centre
        power = torch.exp((0.5 * torch.log(square) - torch.log(p["half_light_radius"])) / n)
        return p["intensity"] * torch.exp(-b * (power - 1))  # type: ignore[no-any-return]

    def total(self) -> float:
        """Total light, in units of I_e arcsec²."""
        n, b = self.index, float(_half_light(torch.tensor(self.index, dtype=torch.float64)))
        area = 2 * math.pi * self.axis_ratio * n * self.half_light_radius**2
        return self.intensity * area * math.exp(b) * b ** (-2 * n) * math.gamma(2 * n)


def _half_light(n: Tensor) -> Tensor:
    """b_n with γ(2n, b) = Γ(2n)/2."""
    r = 1 / n
    series = 4 / 405 + r * (46 / 25515 + r * (131 / 1148175 - r * (2194697 / 30690717750)))
    return 2 * n - 1 / 3 + r * series


@dataclass(frozen=True)
class LightSum(ProfileSum, LightProfile):
    """Several profiles; made by `+`. Names of parameters as in `LensSum`: `bulge_index` for a part named "bulge"."""

    def brightness(self, y: Tensor, x: Tensor, **theta: Tensor | float) -> Tensor:
        self._check_names(theta)
        each = [p.brightness(y, x, **own) for p, own in zip(self.parts, self._split(theta), strict=True)]
        total = each[0]
        for more in each[1:]:
            total = total + more
        return total


class ParametricImage(Operator):
    r"""The image of a light profile, seen through a lens or not, as a function of a vector of parameters.

        d = M P [mean over a pixel's rays of I(θ − α(θ))]

    Args:
        light: `Sersic`, or a sum. image_grid, psf, oversampling, mask: as in `GravitationalLens`.
        free: the parameters, of light and lens, that are the entries of the model, in this order.
        lens: deflection; None for light that is not lensed. A name that both have begins with `source_` and `lens_`
            (`source_center_x`, `lens_center_x`); `defaults` lists all names and values.
        quantity: "surface_brightness", or "flux" for the light of a pixel (times its area in arcsec²).

    Raises:
        ValueError: unknown parameters, and the grids, PSFs and masks that `GravitationalLens` refuses.

    Model `(len(free),)`; data as of `GravitationalLens`. Differentiable to second order; a value out of its range makes
    its own item NaN. A cuspy profile (n > 2) needs oversampling where a pixel covers its centre.
    """

    def __init__(
        self,
        light: LightProfile,
        image_grid: Grid,
        free: Sequence[str],
        *,
        lens: LensModel | None = None,
        psf: Tensor | None = None,
        oversampling: int = 1,
        mask: Tensor | None = None,
        quantity: Quantity = "surface_brightness",
    ) -> None:
        self_light, self_lens = _told_apart(light, lens)
        known = {**self_light, **self_lens}
        unknown = [n for n in free if n not in known]
        if unknown or not free or len(set(free)) < len(free):
            raise ValueError(
                f"free must name parameters of the light and the lens, each once, got {tuple(free)}; they are {', '.join(known)}."
            )
        plane = ImagePlane(image_grid, psf, oversampling, mask, quantity)
        super().__init__((len(free),), plane.data_shape)
        self.light, self.lens, self.free, self.plane = light, lens, tuple(free), plane
        self.defaults = {n: value for n, (_, value) in known.items()}
        self._light_names = {n: own for n, (own, _) in self_light.items()}
        self._lens_names = {n: own for n, (own, _) in self_lens.items()}

    @classmethod
    def examples(cls) -> list[Any]:
        psf = torch.tensor([[0.1, 0.2, 0.1], [0.1, 0.3, 0.2]], dtype=torch.float64)
        grid = sky_grid((5, 4), 0.3)
        lens = SIE(0.6, 0.7, 0.3, 0.02, -0.03) + ExternalShear(0.05, -0.02)
        return [
            cls(Sersic(1.0, 0.5, 1.5, 0.7, 0.4, 0.05, 0.02), grid, ("intensity", "half_light_radius"), psf=psf),
            cls(Sersic(1.0, 0.5, 1.5, 0.7, 0.4), grid, ("index", "einstein_radius"), lens=lens, oversampling=2),
        ]

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        values = dict(zip(self.free, x.unbind(1), strict=True))
        y0, x0 = (v.to(x)[None] for v in self.plane.positions())
        if self.lens is not None:
            own = {self._lens_names[n]: v for n, v in values.items() if n in self._lens_names}
            y0, x0 = self.lens.rays(y0, x0, **own)
        own = {self._light_names[n]: v for n, v in values.items() if n in self._light_names}
        return self.plane.image(self.light.brightness(y0, x0, **own)).expand(len(x), *self.data_shape)


def _told_apart(
    light: LightProfile, lens: LensModel | None
) -> tuple[dict[str, tuple[str, float]], dict[str, tuple[str, float]]]:
    """Public name -> (own name, value), for light and for lens."""
    of_light, of_lens = light.parameters, {} if lens is None else lens.parameters
    shared = set(of_light) & set(of_lens)

    def told(parameters: Mapping[str, float], prefix: str) -> dict[str, tuple[str, float]]:
        return {(prefix + n if n in shared else n): (n, v) for n, v in parameters.items()}

    return told(of_light, "source_"), told(of_lens, "lens_")


class LensLight(Operator):
    r"""Another operator's image and the lens galaxy's own light: d = A(x) + M P I(θ).

    Args:
        operator: a `GravitationalLens`; its grid, PSF, oversampling, mask and quantity are used for the light too.
        light: `Sersic`, or a sum. free: its parameters that `forward` takes by name, as `lens_NAME`.

    `theta_names` are those of the operator and of the light. Without any free parameter of the light,
    `AffineOperator(lens, LensLight(lens, light).image())` keeps the lens's direct solves.
    """

    def __init__(self, operator: GravitationalLens, light: LightProfile, free: Sequence[str] = ()) -> None:
        unknown = [n for n in free if n.removeprefix("lens_") not in light.parameters or not n.startswith("lens_")]
        if unknown:
            raise ValueError(
                f"The light has no parameter {', '.join(unknown)}; it has {', '.join('lens_' + n for n in light.parameters)}."
            )
        super().__init__(operator.model_shape, operator.data_shape, model_grid=operator.model_grid)
        self.operator, self.light, self.free = operator, light, tuple(free)
        self.theta_names = (*operator.theta_names, *free)  # type: ignore[misc]

    @classmethod
    def examples(cls) -> list[Any]:
        lens = GravitationalLens.examples()[1]
        return [cls(lens, Sersic(1.0, 0.5, 1.5, 0.7), ("lens_intensity", "lens_index"))]

    def image(self, **theta: Tensor) -> Tensor:
        """The light alone, `(batch or 1, *data_shape)`."""
        like = next(iter(theta.values()), torch.zeros((), dtype=torch.float64))
        y, x = (v.to(like)[None] for v in self.operator.plane.positions())
        own = {n.removeprefix("lens_"): v for n, v in theta.items()}
        return self.operator.plane.image(self.light.brightness(y, x, **own))

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        own = {n: v for n, v in theta.items() if n in self.free}
        rest = {n: v for n, v in theta.items() if n not in self.free}
        return self.operator(x, **rest) + self.image(**own).to(x)
