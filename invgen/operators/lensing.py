r"""A pixelated source behind a gravitational lens: rays traced once, then one sparse product.

    d = M P L x,        (L x)_p = mean over the rays of pixel p of x(θ − α(θ)),

L interpolates the source at the rays of a frame that reaches beyond the image by as much as the point-spread function
P does, P convolves and cuts the image out, M picks the pixels that were measured.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from invgen.contracts import LinearOperator
from invgen.covariance import Scalar, as_covariance
from invgen.grid import Grid
from invgen.linalg import Solved
from invgen.operators._casts import Casts
from invgen.operators._image_plane import ImagePlane, Quantity, check_grid, sky_grid
from invgen.operators._lens_samples import LastSamples, LensSamples
from invgen.operators._linear_map import LinearMap
from invgen.operators._ray_weights import Edge, Interpolation, outside, ray_weights
from invgen.operators._row_bags import RowBags
from invgen.operators._traced import Traced
from invgen.operators.lens_models import SIE, ExternalShear, LensModel
from invgen.operators.sparse import SparseOperator, _column

__all__ = ["GravitationalLens", "sky_grid"]

_OUTSIDE_LIMIT = 0.5  # of the rays; more of them than that usually means a wrong unit or a wrong centre
_SVD_LIMIT = 1 << 22  # entries of a matrix that svd() builds


class GravitationalLens(LinearOperator):
    r"""The lensed, blurred and pixelated image of a source.

    Args:
        lens: deflection, e.g. `SIE(1.2, 0.8) + ExternalShear(0.03)`.
        source_grid, image_grid: axes ("y", "x") in arcsec, one channel; see `sky_grid`.
        psf: point-spread function on image pixels, any shape, its entry ⌊n/2⌋ along every axis the centre; it must sum
            to 1. None for none.
        oversampling: s, so that a pixel is the mean over s × s rays on a regular lattice.
        mask: boolean `(H, W)`, True where a pixel was measured; the data are then flat, in row-major order.
        quantity: what pixels hold, of source and image alike. "surface_brightness" is kept by lensing. "flux" is light
            per pixel: the image of an unlensed source then has its total flux (factor image pixel/source pixel area).
        edge: "zero", the source fades to zero within one pixel of its outermost centres and is zero beyond;
            "extrapolate", its outermost cell is continued by half a pixel and cut there.
        free: lens parameters that `forward` takes by name, `(batch,)` each; see below.
        interpolation: "bilinear" (4 entries a ray), or "cubic" (16; passes through the pixels and has a continuous
            derivative, for gradients with respect to the lens).
        direct_limit: a solve is direct where data or model have at most so many entries; see `solve`.

    Raises:
        ValueError: grids without arcsec, a PSF that is not normalised or larger than the image, a mask without a
            pixel, unknown parameters.

    Attributes:
        outside_fraction: share of the rays of the measured pixels that miss the source frame; a warning above 1/2.

    Model `(1, h, w)`; data `(1, H, W)`, or `(n,)` with a mask.

    With `free` the operator is still linear in the source: without values it is the lens it was made with (and what
    `adjoint`, `solve`, `svd` refer to); `forward(x, einstein_radius=t)` traces the rays of each sample and is
    differentiated with respect to source and parameters. Bilinear interpolation makes the prediction continuous in
    the parameters, its derivative jumps where a ray crosses a line of pixel centres. `fixed(**theta)` is the linear
    operator at given parameters, one lens for each item.

    Cost: 4 multiply-adds a ray and direction (fewer where rays of a pixel share source pixels), and two real FFTs for a
    PSF, or two banded products for one that is an outer product. CPU time on one thread, 64 sources of 64 × 64 to
    80 × 80 pixels in float32: 0.5 ms without a PSF, 2 ms with an 11 × 11 Gaussian, 7 ms with any 25 × 25; caustics under
    vmap 16, 24 and 36 ms. With free parameters, 16 samples: 13 ms (`SIE`) or 30 ms (`EPL`) to trace the rays, which are
    kept for further calls with the same tensors, and 2 ms a product.

    References: Warren & Dye (2003), ApJ 590, 673 (the matrix of a lens); Suyu et al. (2006), MNRAS 371, 983.
    """

    def __init__(
        self,
        lens: LensModel,
        source_grid: Grid,
        image_grid: Grid,
        psf: Tensor | None = None,
        oversampling: int = 1,
        mask: Tensor | None = None,
        quantity: Quantity = "surface_brightness",
        edge: Edge = "zero",
        free: Sequence[str] = (),
        *,
        interpolation: Interpolation = "bilinear",
        direct_limit: int = 4096,
    ) -> None:
        plane = ImagePlane(image_grid, psf, oversampling, mask, quantity)
        check_grid(source_grid, "source_grid")
        if edge not in ("zero", "extrapolate") or interpolation not in ("bilinear", "cubic"):
            raise ValueError(
                f'edge must be "zero" or "extrapolate" and interpolation "bilinear" or "cubic", got {edge!r} and {interpolation!r}.'
            )
        unknown = [n for n in free if n not in lens.parameters]
        if unknown:
            raise ValueError(
                f"The lens has no parameter {', '.join(unknown)} to be free; it has {', '.join(lens.parameters) or 'none'}."
            )
        super().__init__((1, *source_grid.shape), plane.data_shape, model_grid=source_grid)
        self.lens, self.source_grid, self.image_grid, self.plane = lens, source_grid, image_grid, plane
        self.edge, self.interpolation, self.direct_limit = edge, interpolation, direct_limit
        self.theta_names = tuple(free)  # type: ignore[misc]
        # of a ray: what a pixel holds, and its share of the pixel
        area = plane.pixel_area / math.prod(source_grid.spacing)
        self.factor = (area if quantity == "flux" else 1.0) / oversampling**2
        self._casts, self._last = Casts(), LastSamples()
        self._trace()

    @classmethod
    def from_rays(
        cls, beta_y: Tensor, beta_x: Tensor, source_grid: Grid, image_grid: Grid, **options: Any
    ) -> GravitationalLens:
        """The operator of rays traced elsewhere.

        Args:
            beta_y, beta_x: source-plane positions in arcsec of the rays at `ray_positions(image_grid, oversampling)`,
                `(H·s, W·s)`; or at those with `psf=`, then what scatters into the image from beyond it is included.
            options: as of the class, without `free`.
        """
        if options.get("free"):
            raise ValueError("Rays traced elsewhere have no free parameters; give a lens model to free some.")
        s, psf = options.get("oversampling", 1), options.get("psf")
        y, x = cls.ray_positions(image_grid, s)
        if psf is not None and tuple(torch.as_tensor(beta_y).shape) != tuple(y.shape):
            y, x = cls.ray_positions(image_grid, s, psf)
        return cls(Traced(beta_y, beta_x, y, x), source_grid, image_grid, **options)

    @staticmethod
    def ray_positions(image_grid: Grid, oversampling: int = 1, psf: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(y, x) of the rays in arcsec, float64, `(H·s, W·s)`; with a PSF those of the frame that it needs."""
        axes = ImagePlane(image_grid, psf, oversampling, None, "surface_brightness").axes()
        y, x = torch.meshgrid(*(a.flatten() for a in axes), indexing="ij")
        return y, x

    @classmethod
    def examples(cls) -> list[Any]:
        psf = torch.tensor([[0.0, 0.1, 0.05, 0.0], [0.1, 0.4, 0.15, 0.05], [0.05, 0.1, 0.0, 0.0]], dtype=torch.float64)
        lens = SIE(0.4, 0.7, 0.3, 0.02, -0.03) + ExternalShear(0.05, -0.02)
        source, image = sky_grid((4, 5), 0.2), sky_grid((6, 5), 0.25)
        return [
            cls(lens, source, image),
            cls(lens, source, image, psf, 2, quantity="flux", free=("einstein_radius", "gamma_1")),
            cls(lens, source, image, psf, mask=torch.arange(30).reshape(6, 5) % 3 > 0, interpolation="cubic"),
        ]

    def _trace(self) -> None:
        """Rays of the lens itself into the sparse matrix L."""
        y, x = self.plane.positions()
        beta_y, beta_x = self.lens.rays(y, x)
        missed = outside(beta_y, beta_x, self.source_grid).double().mean(1)
        self.outside_fraction = float(self.plane.measured(missed).mean())
        if self.outside_fraction > _OUTSIDE_LIMIT:
            warnings.warn(
                f"{100 * self.outside_fraction:.0f} % of the rays miss the source frame {self.source_grid.shape} of {self.source_grid.spacing[0]:g} arcsec pixels; check the units and centres of both grids, or mask the pixels without an image of the source.",
                stacklevel=3,
            )
        index, weight = ray_weights(beta_y, beta_x, self.source_grid, self.edge, self.interpolation)
        keep = weight != 0
        rows = torch.arange(len(y))[:, None, None].expand_as(index)[keep]
        size = (1, *self.plane.frame) if len(y) == math.prod(self.plane.frame) else self.data_shape
        self.matrix = SparseOperator(rows, index[keep], weight[keep] * self.factor, self.model_shape, size)
        self.bags = RowBags(self.matrix)

    def product(self, columns: Tensor, transpose: bool) -> Tensor:
        """A on real columns `(h·w, n)`, or Aᵀ on `(n_data, n)`: what `forward` and `adjoint` differentiate by each other."""
        if transpose:
            return self.bags.product(self.plane.folding.product(columns, True), True)
        return self.plane.folding.product(self.bags.product(columns, False), False)

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        """The image of the source, with the lens it was made with or the free parameters given, `(batch,)` each."""
        if theta:
            self._check_free(theta)
            return self._last(self, {k: torch.as_tensor(v) for k, v in theta.items()})(x)
        return self._real_rows(x, False).reshape(-1, *self.data_shape)

    def adjoint(self, d: Tensor) -> Tensor:
        return self._real_rows(d, True).reshape(-1, *self.model_shape)

    def _real_rows(self, v: Tensor, transpose: bool) -> Tensor:
        if v.is_complex():
            return torch.complex(self._real_rows(v.real, transpose), self._real_rows(v.imag, transpose))
        return LinearMap.apply(v.flatten(1), self, transpose)  # type: ignore[no-any-return]

    def fixed(self, **theta: Tensor | float) -> LinearOperator:
        """The linear operator at given values of the free parameters.

        Args:
            theta: numbers for one lens, or `(batch,)` tensors for one lens an item. Parameters that are left out keep
                the values the lens was made with.

        Returns:
            A `GravitationalLens` for numbers; a `LensSamples` for tensors, whose models and data must come in batches
            of that size.
        """
        self._check_free(theta)
        if all(not isinstance(v, Tensor) or v.ndim == 0 for v in theta.values()):
            return self._with(self.lens.at(**{k: float(v) for k, v in theta.items()}))
        return LensSamples(self, {k: torch.as_tensor(v) for k, v in theta.items()})

    def _check_free(self, theta: Mapping[str, Any]) -> None:
        unknown = set(theta) - set(self.theta_names)
        if unknown:
            raise ValueError(
                f"The lens parameters {', '.join(sorted(unknown))} are not free; name them in free=, which has {', '.join(self.theta_names) or 'none'}."
            )

    def _with(self, lens: LensModel) -> GravitationalLens:
        plane = self.plane
        return GravitationalLens(
            lens,
            self.source_grid,
            self.image_grid,
            plane.psf,
            plane.oversampling,
            plane.mask,
            plane.quantity,
            self.edge,
            self.theta_names,
            interpolation=self.interpolation,
            direct_limit=self.direct_limit,
        )

    def _decomposed(self) -> tuple[bool, Tensor, Tensor]:
        """Whether it is that of A Aᵀ (else of Aᵀ A), eigenvalues and eigenvectors in float64."""

        def make() -> tuple[bool, Tensor, Tensor]:
            A = self._matrix()
            in_data = A.shape[0] <= A.shape[1]
            values, vectors = torch.linalg.eigh(A @ A.T if in_data else A.T @ A)
            return in_data, values.clamp_min(0.0), vectors

        return self._casts.once("decomposed", make)  # type: ignore[no-any-return]

    def _matrix(self) -> Tensor:
        """A as `(n_data, n_model)` float64, without counting the items."""
        return self.product(torch.eye(math.prod(self.model_shape), dtype=torch.float64), False)

    def _eigen(self, rhs: Tensor, R: Any, C: Any) -> tuple[bool, Tensor, Tensor, Tensor, Tensor] | None:
        """The decomposition and the variances r, c for rhs, where a solve can be direct."""
        small = min(math.prod(self.data_shape), math.prod(self.model_shape)) <= self.direct_limit
        if not (small and isinstance(R, Scalar) and isinstance(C, Scalar)) or rhs.is_complex():
            return None
        in_data = self._decomposed()[0]
        values = self._casts("values", rhs, lambda: self._decomposed()[1])
        vectors = self._casts("vectors", rhs, lambda: self._decomposed()[2])
        return in_data, values, vectors, _column(R, rhs), _column(C, rhs)

    def solve(self, rhs: Tensor, R: Any, C: Any, **options: Any) -> Solved:
        """(R + A C Aᵀ)⁻¹ rhs: direct for scalar R and C (one for all or one an item), otherwise CG.

        The eigenvectors of A Aᵀ or of Aᵀ A, whichever is smaller, are made once where it has at most `direct_limit`
        rows: 0.3 s at 1024, 3 s at 2048, 28 s at 4096 of one thread. A solve is then two dense products: 0.1 s for 16
        images of 80 × 80 from 64 × 64 pixels, where conjugate gradients take 0.7 s (228 iterations at a noise of 0.1).
        Lower the limit for an operator that is used for a few solves only. For
        Aᵀ A = W λ Wᵀ it is [rhs − A W (c/(r + c λ)) Wᵀ Aᵀ rhs]/r, a difference that cancels and is taken in float64.
        """
        R, C = as_covariance(R, self.data_shape, batched=True), as_covariance(C, self.model_shape, batched=True)
        wide = rhs.flatten(1) if rhs.is_complex() else rhs.flatten(1).double()
        known = self._eigen(wide, R, C)
        if known is None:
            return super().solve(rhs, R, C, **options)
        in_data, values, V, r, c = known
        if in_data:
            x = ((wide @ V) / (r + c * values)) @ V.T
        else:
            inner = (self.product(wide.T, True).T @ V) * (c / (r + c * values))
            x = (wide - self.product(V @ inner.T, False).T) / r
        return Solved.direct(x.to(rhs.dtype).reshape(rhs.shape))

    def solve_model(self, rhs: Tensor, R: Any, C: Any, **options: Any) -> Solved:
        """(Aᵀ R⁻¹ A + C⁻¹)⁻¹ rhs, likewise."""
        R, C = as_covariance(R, self.data_shape, batched=True), as_covariance(C, self.model_shape, batched=True)
        wide = rhs.flatten(1) if rhs.is_complex() else rhs.flatten(1).double()
        known = self._eigen(wide, R, C)
        if known is None:
            return super().solve_model(rhs, R, C, **options)
        in_data, values, V, r, c = known
        if in_data:
            inner = (self.product(wide.T, False).T @ V) * (c / (r + c * values))
            x = c * (wide - self.product(V @ inner.T, True).T)
        else:
            x = ((wide @ V) / (values / r + 1 / c)) @ V.T
        return Solved.direct(x.to(rhs.dtype).reshape(rhs.shape))

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Thin SVD of the dense matrix, float64, made once; for at most 2²² entries (2048 × 2048)."""
        if math.prod(self.data_shape) * math.prod(self.model_shape) > _SVD_LIMIT:
            raise TypeError(
                f"The SVD of a lens with {math.prod(self.data_shape)} × {math.prod(self.model_shape)} entries is not built; use solve, or a smaller source and a mask."
            )
        return self._casts.once(  # type: ignore[no-any-return]
            "svd", lambda: tuple(torch.linalg.svd(self._matrix(), full_matrices=False))
        )
