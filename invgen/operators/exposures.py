r"""Exposures of one field: dithered by fractions of a pixel, turned, with PSFs and pixel sizes of their own.

    d_e = B_e P_e D_e x + n_e,      e = 1, 2, …      (one term of the inverse problem each)

D_e reads the model at the pixels of exposure e, which lie at M_e θ + b_e on the model's grid (`Placement`), P_e is its PSF
and B_e bins the finer pixels on which a supersampled PSF is given into those of the detector. Nothing is resampled: the
model is laid onto each exposure, and the noise of the exposures stays independent, unlike that of a drizzled stack.

terms = [
    Term(d, exposure(model_grid, grid, psf=psf, placement=Placement(shift_y=0.013, shift_x=-0.02, rotation=0.1)), noise)
    for d, grid, psf, noise in exposures
]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from invgen.contracts import LinearOperator
from invgen.covariance import Scalar, as_covariance
from invgen.grid import Grid
from invgen.linalg import Solved
from invgen.operators.algebra import compose
from invgen.operators.imaging import _variance
from invgen.operators.lens_models import LensModel
from invgen.operators.lensing import GravitationalLens

__all__ = ["Binning", "Placement", "exposure"]


class Binning(LinearOperator):
    """Fine pixels into coarse ones: d[I] = Σ_i∈I x[i] (flux) or their mean (surface brightness).

    Args:
        shape: `(channels, ny, nx)` of the fine image. factor: s, whole, divides ny and nx.
        quantity: "flux", light per pixel, is summed; "surface_brightness" is averaged.
        model_grid: grid of the fine image.

    Attributes:
        data_grid: grid of the coarse image where the fine one is known.

    Raises:
        ValueError: a factor that does not divide the image, an unknown quantity.

    A Aᵀ = s² I (flux) or I/s²: solves are direct for scalar R and C. Cost: one pass.
    """

    def __init__(
        self, shape: tuple[int, ...], factor: int, quantity: str = "flux", *, model_grid: Grid | None = None
    ) -> None:
        if quantity not in ("flux", "surface_brightness"):
            raise ValueError(f'quantity must be "flux" or "surface_brightness", got {quantity!r}.')
        if len(shape) != 3 or factor < 1 or factor != int(factor) or any(n % factor for n in shape[1:]):
            raise ValueError(
                f"An image {tuple(shape)} is not (channels, ny, nx) with sides that bins of {factor} divide; crop it first."
            )
        s = int(factor)
        super().__init__(shape, (shape[0], shape[1] // s, shape[2] // s), model_grid=model_grid)
        self.factor, self.quantity = s, quantity
        self.weight = 1.0 if quantity == "flux" else 1.0 / s**2
        self.data_grid = None if model_grid is None else _refined(model_grid, 1 / s)

    @classmethod
    def examples(cls) -> list[Any]:
        return [cls((1, 4, 6), 2), cls((2, 3, 3), 3, "surface_brightness")]

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        c, h, w = self.data_shape
        s = self.factor
        return self.weight * x.reshape(-1, c, h, s, w, s).sum((3, 5))

    def adjoint(self, d: Tensor) -> Tensor:
        c, h, w = self.data_shape
        s = self.factor
        spread = d[:, :, :, None, :, None].expand(-1, c, h, s, w, s)
        return (self.weight * spread).reshape(-1, *self.model_shape)

    def solve(self, rhs: Tensor, R: Any, C: Any, **options: Any) -> Solved:
        """(R + A C Aᵀ)⁻¹ rhs: pixel by pixel for scalar or diagonal R and scalar C, otherwise CG."""
        R, C = as_covariance(R, self.data_shape, batched=True), as_covariance(C, self.model_shape, batched=True)
        r, c = _variance(R, rhs, 3), _variance(C, rhs, 3)
        if r is None or c is None or not isinstance(C, Scalar):
            return super().solve(rhs, R, C, **options)
        total = r + c * (self.weight * self.factor) ** 2
        return Solved.direct((rhs.flatten(1) / total).reshape(rhs.shape))


@dataclass(frozen=True)
class Placement(LensModel):
    """Where the pixels of an exposure lie on the model's grid: β = scale R(rotation) diag(1, parity) θ + shift.

    Written for columns (x, y): θ = (θ_x, θ_y) counts on the exposure's own grid, R turns counter-clockwise. A "lens"
    without mass, so that every parameter can be free (`free=("shift_y", "shift_x")`): unknown dithers are sampled like
    lens parameters.

    Args:
        shift_y, shift_x: arcsec, where the exposure's (0, 0) lies on the model's grid.
        rotation: radians counter-clockwise: direction of the exposure's +x on the model's grid.
        scale: model arcsec an exposure arcsec. parity: 1, or −1 for an exposure that is mirrored (y is flipped).
    """

    shift_y: float = 0.0
    shift_x: float = 0.0
    rotation: float = 0.0
    scale: float = 1.0
    parity: float = 1.0
    name: str = "placement"

    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"scale": (0.0, float("inf"))}
    pinned: ClassVar[tuple[str, ...]] = ("name", "parity")

    def _deflect(self, y: Tensor, x: Tensor, p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        cos, sin, flipped = p["rotation"].cos(), p["rotation"].sin(), self.parity * y
        beta_x = p["scale"] * (cos * x - sin * flipped) + p["shift_x"]
        beta_y = p["scale"] * (sin * x + cos * flipped) + p["shift_y"]
        return y - beta_y, x - beta_x


def exposure(
    model_grid: Grid,
    image_grid: Grid,
    *,
    psf: Tensor | None = None,
    psf_oversampling: int = 1,
    placement: Placement | None = None,
    oversampling: int = 1,
    quantity: str = "flux",
    edge: str = "zero",
    interpolation: str = "cubic",
    free: Sequence[str] = (),
    mask: Tensor | None = None,
) -> LinearOperator:
    """The operator of one exposure, B P D (see the module).

    Args:
        model_grid, image_grid: axes ("y", "x") in arcsec, one channel. psf: sums to 1, entry ⌊n/2⌋ is its centre; any
            shape. psf_oversampling: PSF pixels a detector pixel and axis; 1 for a PSF on detector pixels.
        placement: where the exposure lies; as the model's grid when omitted.
        oversampling: samples of the model a pixel (a fine pixel, with a supersampled PSF) and axis are averaged. Take it
            so that the samples lie no further apart than model pixels, or model pixels between them are not seen.
        quantity: what pixels of the model and of the data hold: "flux" or "surface_brightness".
        edge: the model beyond its grid: "zero" or "extrapolate", see `GravitationalLens`; light from beyond the image
            scatters in as far as the model reaches there.
        interpolation: of the model between its pixels, "cubic" or "bilinear"; bilinear blurs by up to half a pixel.
        free: parameters of the placement that `forward` takes (a PSF on detector pixels only).
        mask: boolean `(ny, nx)`, for flat data; a mask of the term does as well.

    Returns:
        A `LinearOperator` with models `(1, h, w)` on `model_grid` and data `(1, ny, nx)`, or `(n,)` with a mask.

    Raises:
        ValueError: grids that are not in arcsec, a PSF that is not normalised or larger than the image, a mask or free
            parameters together with a supersampled PSF.

    Cost: 16 (cubic) or 4 multiply-adds a sample, two FFTs of the (fine) image with a PSF.
    """
    placement = placement if placement is not None else Placement()
    s = int(psf_oversampling)
    if s != psf_oversampling or s < 1:
        raise ValueError(f"psf_oversampling is a whole number of PSF pixels a detector pixel, got {psf_oversampling}.")
    if s > 1 and (mask is not None or free):
        raise ValueError(
            "With a supersampled PSF the mask belongs to the Term and the placement is fixed; bin the PSF to detector pixels to free it."
        )
    fine = _refined(image_grid, s)
    laid = GravitationalLens(
        placement,
        model_grid,
        fine,
        psf,
        oversampling,
        mask,
        quantity,  # type: ignore[arg-type]
        edge,  # type: ignore[arg-type]
        free,
        interpolation=interpolation,  # type: ignore[arg-type]
    )
    return laid if s == 1 else compose(Binning((1, *fine.shape), s, quantity), laid)  # type: ignore[return-value]


def _refined(grid: Grid, factor: float) -> Grid:
    """The same frame with `factor` times the pixels along each axis."""
    shape = tuple(round(n * factor) for n in grid.shape)
    spacing = tuple(d / factor for d in grid.spacing)
    origin = tuple(o - 0.5 * d + 0.5 * e for o, d, e in zip(grid.origin, grid.spacing, spacing, strict=True))
    return replace(grid, shape=shape, spacing=spacing, origin=origin)
