"""Computed tomography: line integrals of an image along parallel rays or along the rays of a fan.

    d(θ, s) = ∫ x(p) δ(p · n(θ) − s) dp,      n(θ) = (cos θ, sin θ) in (x, y)

An image is constant on its pixels, so every entry of the matrix has a closed form: the chord that a ray at the angle θ
cuts out of a pixel a × b at the distance t from its centre is a trapezoid in t,

    L(t) = h clip((m − |t|)/w + ½, 0, 1),   m = max(a|cos θ|, b|sin θ|)/2,   w = min(a|cos θ|, b|sin θ|),   h = ab/(2m),

the same lengths that Siddon (1985) finds by walking along the ray. The average of L over the width of a detector cell
is a difference of its integrals: what a detector with cells as wide as their distance measures. The matrix is kept in
compressed rows in either direction, so that forward and adjoint are exact transposes.

References: Siddon 1985, Medical Physics 12, 252; Kak & Slaney 1988, Principles of Computerized Tomographic Imaging,
chapter 3; Long, Fessler & Balter 2010, IEEE Trans. Med. Imaging 29, 1839 (footprints in a diverging beam).
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from invgen.contracts import LinearOperator
from invgen.covariance import Covariance, Scalar, as_covariance
from invgen.grid import Grid
from invgen.linalg import Solved
from invgen.operators._backprojection import ramp_filtered, view_weights
from invgen.operators._casts import Casts
from invgen.operators.sparse import EIGEN_LIMIT, _Product

__all__ = ["FanBeamCT", "ParallelBeamCT"]

Array = np.ndarray


class _Projections(LinearOperator):
    """What both geometries share: the matrix from their rays, products with it, and direct solves where it is small."""

    angles: Tensor
    turn: float  # the angles over which the views are a complete set

    def __init__(
        self,
        shape: tuple[int, ...],
        angles: Tensor | int,
        cells: int,
        cell_width: float,
        spacing: tuple[float, float],
        footprint: str,
        model_grid: Grid | None,
    ) -> None:
        name = type(self).__name__
        views = _views(angles, self.turn, name)
        if footprint not in ("strip", "line"):
            raise ValueError(
                f'footprint must be "strip" (mean over a detector cell) or "line" (a thin ray), got {footprint!r}.'
            )
        if not (int(cells) == cells and cells >= 1 and math.isfinite(cell_width) and cell_width > 0):
            raise ValueError(
                f"{name} needs at least one detector cell of positive width, got {cells} cells of width {cell_width}."
            )
        super().__init__(shape, (shape[0], len(views), int(cells)), model_grid=model_grid)
        self.register_buffer("angles", views)
        self.cells, self.cell_width, self.spacing, self.footprint = int(cells), float(cell_width), spacing, footprint
        self._casts = Casts()

    def _rays(self, view: int, position: Array) -> tuple[Array, Array]:
        """Angle θ and offset s of the rays that meet the detector at these positions."""
        raise NotImplementedError(f"{type(self).__name__} does not define _rays.")

    def _place(self, view: int, y: Array, x: Array) -> Array:
        """Where on the detector the ray through each point ends."""
        raise NotImplementedError(f"{type(self).__name__} does not define _place.")

    def _centres(self) -> tuple[Array, Array]:
        """y and x of the pixels, flat, with the axis of rotation in the middle of the image."""
        axes = [(np.arange(n) - (n - 1) / 2) * d for n, d in zip(self.model_shape[1:], self.spacing, strict=True)]
        y, x = np.meshgrid(*axes, indexing="ij")
        return y.ravel(), x.ravel()

    def _view(self, view: int, y: Array, x: Array) -> Any:
        """Rows of one view, `(cells, pixels)` in compressed rows."""
        dy, dx = self.spacing
        start = -self.cells / 2 * self.cell_width
        corners = [self._place(view, y + i * dy / 2, x + j * dx / 2) for i in (-1, 1) for j in (-1, 1)]
        low, high = np.minimum.reduce(corners), np.maximum.reduce(corners)
        first, last = (np.floor((v - start) / self.cell_width).astype(np.int64) for v in (low, high))
        theta, s = self._rays(view, start + (np.arange(self.cells) + 0.5) * self.cell_width)
        theta_edge, s_edge = self._rays(view, start + np.arange(self.cells + 1) * self.cell_width)
        a, b = dx * np.abs(np.cos(theta)), dy * np.abs(np.sin(theta))
        # along the axes the ramp has no width: a ray on the border of two pixels then belongs to both by half
        middle, ramp = np.maximum(a, b) / 2, np.maximum(np.minimum(a, b), 1e-6 * np.maximum(a, b))
        height = dx * dy / (2 * middle)
        parts = []
        for j in range(int((last - first).max()) + 1):
            cell = first + j
            pixel = np.flatnonzero((cell <= last) & (cell >= 0) & (cell < self.cells))
            cell = cell[pixel]
            m, w, h = middle[cell], ramp[cell], height[cell]
            if self.footprint == "line":
                t = s[cell] - _along(y[pixel], x[pixel], theta[cell])
                weight = h * np.clip((m - np.abs(t)) / w + 0.5, 0.0, 1.0)
            else:
                left, right = (s_edge[cell + k] - _along(y[pixel], x[pixel], theta_edge[cell + k]) for k in (0, 1))
                weight = h * (_integral(right, m, w) - _integral(left, m, w)) / (right - left)
            kept = weight > 1e-9 * h
            parts.append((weight[kept], cell[kept], pixel[kept]))
        values, rows, columns = (np.concatenate([p[i] for p in parts]) for i in range(3))
        return scipy.sparse.coo_matrix((values, (rows, columns)), (self.cells, len(y))).tocsr()

    def matrix(self) -> Any:
        """The `(views · cells, pixels)` matrix as a `scipy.sparse` array in compressed rows, computed anew."""
        y, x = self._centres()
        return scipy.sparse.vstack([self._view(k, y, x) for k in range(len(self.angles))], format="csr")

    def _csr(self, like: Tensor, adjoint: bool) -> Tensor:
        def compressed(matrix: Any) -> Tensor:
            rows, columns = torch.from_numpy(matrix.indptr), torch.from_numpy(matrix.indices)
            values = torch.from_numpy(matrix.data).to(like.dtype)
            with warnings.catch_warnings():  # compressed rows announce themselves as beta once a process
                warnings.simplefilter("ignore", UserWarning)
                return torch.sparse_csr_tensor(rows, columns, values, matrix.shape, check_invariants=False).to(
                    like.device
                )

        def make() -> tuple[Tensor, Tensor]:
            matrix = self.matrix()
            return compressed(matrix), compressed(matrix.T.tocsr())

        return self._casts.once(("csr", like.dtype, like.device), make)[adjoint]  # type: ignore[arg-type,no-any-return]

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        if x.is_complex():
            return torch.complex(self.forward(x.real), self.forward(x.imag))
        return _Product.apply(x.flatten(-2), self, False).unflatten(-1, self.data_shape[1:])  # type: ignore[no-any-return]

    def adjoint(self, d: Tensor) -> Tensor:
        return self._back(d)

    def _back(self, d: Tensor) -> Tensor:
        if d.is_complex():
            return torch.complex(self._back(d.real), self._back(d.imag))
        return _Product.apply(d.flatten(-2), self, True).unflatten(-1, self.model_shape[1:])  # type: ignore[no-any-return]

    def _gram(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors of A Aᵀ for one channel."""

        def make() -> tuple[Tensor, Tensor]:
            matrix = self.matrix()
            values, vectors = torch.linalg.eigh(torch.from_numpy((matrix @ matrix.T).toarray()))
            return values.clamp_min(0.0), vectors

        return self._casts.once("gram", make)  # type: ignore[no-any-return]

    def _direct(self, v: Tensor, R: Covariance, C: Covariance) -> bool:
        small = math.prod(self.data_shape[1:]) <= EIGEN_LIMIT
        return small and not v.is_complex() and isinstance(R, Scalar) and isinstance(C, Scalar)

    def solve(self, rhs: Tensor, R: Any, C: Any, **options: Any) -> Solved:
        """(R + A C Aᵀ)⁻¹ rhs: direct for scalar R and C and at most 4096 rays (eigenvectors once), otherwise CG."""
        R, C = as_covariance(R, self.data_shape, batched=True), as_covariance(C, self.model_shape, batched=True)
        if not self._direct(rhs, R, C):
            return super().solve(rhs, R, C, **options)
        squares = self._casts("gram values", rhs, lambda: self._gram()[0])
        basis = self._casts("gram vectors", rhs, lambda: self._gram()[1])
        r, c = (_column(v, rhs) for v in (R, C))
        return Solved.direct((((rhs.flatten(2) @ basis) / (r + c * squares)) @ basis.mT).reshape(rhs.shape))

    def solve_model(self, rhs: Tensor, R: Any, C: Any, **options: Any) -> Solved:
        """(Aᵀ R⁻¹ A + C⁻¹)⁻¹ rhs = C rhs − C Aᵀ (R + A C Aᵀ)⁻¹ A C rhs where `solve` is direct, otherwise CG."""
        R, C = as_covariance(R, self.data_shape, batched=True), as_covariance(C, self.model_shape, batched=True)
        if not self._direct(rhs, R, C):
            return super().solve_model(rhs, R, C, **options)
        spread = C.apply(rhs.double())  # the difference cancels: in float64 whatever rhs is
        inner = self.solve(self(spread), R, C).x
        return Solved.direct((spread - C.apply(self.adjoint(inner))).to(rhs.dtype))

    def _check_data(self, d: Tensor) -> None:
        self._items(d, self.data_shape, f"The data given to {type(self).__name__}.filtered_back_projection")


class ParallelBeamCT(_Projections):
    """Parallel-beam CT: d(k, j) = ∫ x along the rays p · n(θ_k) = s_j, for any set of views.

    Args:
        shape: `(channels, n_y, n_x)` of the image, in 1/length; every channel is projected by itself.
        angles: θ in radians, `(views,)`, or a number of views spread evenly over [0, π). At θ = 0 the rays run along
            the first axis (y) and s is x; at π/2 they run along x and s is y. The axis of rotation is the middle of
            the image.
        cells: detector cells; enough for the diagonal of the image when omitted.
        cell_width: distance of their centres, in the length unit of the grid; one pixel when omitted.
        footprint: "strip" for the mean over a cell, "line" for a thin ray through its middle (half as many entries,
            but rays a pixel apart see single pixels unevenly).
        spacing: pixel sizes (dy, dx) where there is no grid.
        model_grid: grid of the image; its spacing is used.

    Data `(channels, views, cells)` in the unit of x times length (attenuation: pure numbers, −log of the transmitted
    share).

    Raises:
        ValueError: a shape that is no image, angles that are not finite, cells of no width.

    Cost: about 2.3 (strip) or 1.3 (line) multiply-adds a pixel, view and direction at cells of a pixel, 8 or 12 bytes
    of memory each in both directions; the matrix is made at the first use and left out of pickles. Direct solves for
    scalar covariances and at most 4096 rays, by CG elsewhere.
    """

    turn = math.pi

    def __init__(
        self,
        shape: tuple[int, ...],
        angles: Tensor | int,
        cells: int | None = None,
        cell_width: float | None = None,
        *,
        footprint: str = "strip",
        spacing: tuple[float, float] = (1.0, 1.0),
        model_grid: Grid | None = None,
    ) -> None:
        spacing = _spacing(shape, spacing, model_grid, "ParallelBeamCT")
        width = float(cell_width) if cell_width is not None else min(spacing)
        diagonal = math.hypot(*(n * d for n, d in zip(shape[1:], spacing, strict=True)))
        count = cells if cells is not None else max(1, math.ceil(diagonal / width - 1e-9)) if width > 0 else 1
        super().__init__(shape, angles, count, width, spacing, footprint, model_grid)

    @classmethod
    def examples(cls) -> list[Any]:
        grid = Grid((3, 4), (2.0, 1.5), axes=("y", "x"), units=("mm", "mm"))
        return [
            cls((1, 4, 5), 5),
            cls((1, 3, 4), torch.tensor([0.1, 1.3, 4.0]), cells=3, cell_width=2.5, model_grid=grid),
            cls((2, 3, 3), 4, footprint="line"),
        ]

    def _rays(self, view: int, position: Array) -> tuple[Array, Array]:
        return np.full_like(position, float(self.angles[view])), position

    def _place(self, view: int, y: Array, x: Array) -> Array:
        return _along(y, x, np.asarray(float(self.angles[view])))

    def filtered_back_projection(self, d: Tensor, window: str = "ramp") -> Tensor:
        """x ≈ Σ_k Δθ_k (h ∗ d_k)(p · n(θ_k)), the inverse of the Radon transform on its samples: a start, not a solve.

        Args:
            d: `(batch, channels, views, cells)`. window: "ramp" (Ram–Lak), "shepp-logan", "cosine" or "hann", which
                trade resolution for noise.

        Returns:
            `(batch, *model_shape)`; gaps between views that are more than four times the usual one count as not measured.

        Reference: Kak & Slaney 1988, equations 3.61 and 3.67. Cost: one adjoint and one pair of FFTs of the data.
        """
        self._check_data(d)
        filtered = ramp_filtered(d, self.cell_width, window)
        weights = view_weights(self.angles, self.turn).to(d.real) * (self.cell_width / math.prod(self.spacing))
        return self._back(filtered * weights[:, None])


class FanBeamCT(_Projections):
    """Fan-beam CT: a point source and a flat detector that turn around the image together.

        θ = β − γ,   s = D_source sin γ,   tan γ = p / (D_source + D_detector):

    the ray that meets the detector at p in the view β is the parallel ray (θ, s) of `ParallelBeamCT`.

    Args:
        shape, angles, cells, cell_width, spacing, model_grid: as in `ParallelBeamCT`; a number of angles is spread over
            [0, 2π), and cell_width is measured on the detector (one pixel, magnified, when omitted).
        source_distance: from the axis of rotation to the source, in the length unit of the grid; the source must stay
            outside the image.
        detector_distance: from the axis to the detector.
        footprint: "strip" for the mean over the sliver of rays that ends in a cell, in which they count as parallel
            within one pixel; "line" for the exact chords of thin rays.

    Raises:
        ValueError: as `ParallelBeamCT`, and a source inside the image.

    Cost: as `ParallelBeamCT`, in proportion to pixels per cell.
    """

    turn = 2 * math.pi

    def __init__(
        self,
        shape: tuple[int, ...],
        angles: Tensor | int,
        source_distance: float,
        detector_distance: float = 0.0,
        cells: int | None = None,
        cell_width: float | None = None,
        *,
        footprint: str = "strip",
        spacing: tuple[float, float] = (1.0, 1.0),
        model_grid: Grid | None = None,
    ) -> None:
        spacing = _spacing(shape, spacing, model_grid, "FanBeamCT")
        reach = math.hypot(*(n * d for n, d in zip(shape[1:], spacing, strict=True))) / 2
        if not (math.isfinite(source_distance) and source_distance > reach):
            raise ValueError(
                f"The source turns at {source_distance} from the middle of an image that reaches to {reach:.6g}; it must stay outside."
            )
        if not (math.isfinite(detector_distance) and detector_distance >= 0):
            raise ValueError(
                f"The detector must lie behind the axis of rotation, got the distance {detector_distance}; give zero or more."
            )
        self.source_distance, self.detector_distance = float(source_distance), float(detector_distance)
        length = self.source_distance + self.detector_distance
        width = float(cell_width) if cell_width is not None else min(spacing) * length / self.source_distance
        # the ray that touches the circle around the image ends here
        edge = length * reach / math.sqrt(self.source_distance**2 - reach**2)
        count = cells if cells is not None else max(1, math.ceil(2 * edge / width - 1e-9)) if width > 0 else 1
        super().__init__(shape, angles, count, width, spacing, footprint, model_grid)

    @classmethod
    def examples(cls) -> list[Any]:
        return [cls((1, 4, 5), 5, 9.0, 4.0), cls((1, 4, 3), torch.tensor([0.2, 2.0]), 6.0, footprint="line")]

    def _rays(self, view: int, position: Array) -> tuple[Array, Array]:
        gamma = np.arctan(position / (self.source_distance + self.detector_distance))
        return float(self.angles[view]) - gamma, self.source_distance * np.sin(gamma)

    def _place(self, view: int, y: Array, x: Array) -> Array:
        beta = float(self.angles[view])
        depth = self.source_distance + y * math.cos(beta) - x * math.sin(beta)
        return (self.source_distance + self.detector_distance) * _along(y, x, np.asarray(beta)) / depth

    def filtered_back_projection(self, d: Tensor, window: str = "ramp") -> Tensor:
        """x ≈ Σ_k Δβ_k U⁻² (½h ∗ d cos γ)(p_k), U the distance from the source in units of the axis': a start.

        Args:
            d: `(batch, channels, views, cells)`. window: as `ParallelBeamCT.filtered_back_projection`.

        Returns:
            `(batch, *model_shape)`, linear between the cells.

        Raises:
            ValueError: views that leave more than a tenth of the circle open (a short scan counts rays once or twice,
                and has no formula here; solve the least-squares problem instead).

        Reference: Kak & Slaney 1988, section 3.4.2. Cost: views · pixels · 2 multiply-adds.
        """
        self._check_data(d)
        weights = view_weights(self.angles, self.turn)
        if float(weights.sum()) < 0.9 * self.turn:
            raise ValueError(
                f"The views cover {math.degrees(float(weights.sum())):.0f} of 360 degrees; filtered back-projection of a fan needs the full circle, solve the linear problem instead."
            )
        scale = self.source_distance / (self.source_distance + self.detector_distance)
        width = self.cell_width * scale  # of a cell seen at the axis of rotation
        position = (torch.arange(self.cells, dtype=torch.float64) - (self.cells - 1) / 2) * width
        cosine = self.source_distance / (self.source_distance**2 + position.square()).sqrt()
        filtered = torch.nn.functional.pad(0.5 * ramp_filtered(d * cosine.to(d.real), width, window), (1, 1))
        y, x = self._centres()
        total = torch.zeros(*d.shape[:2], len(y), dtype=d.dtype, device=d.device)
        for k, weight in enumerate(weights.tolist()):
            beta = float(self.angles[k])
            place = self._place(k, y, x) / self.cell_width + (self.cells - 1) / 2 + 1
            place = np.clip(place, 0, self.cells + 1)
            left = np.minimum(np.floor(place).astype(np.int64), self.cells)
            inverse = self.source_distance / (self.source_distance + y * math.cos(beta) - x * math.sin(beta))
            index, share, gain = (torch.from_numpy(v).to(d.device) for v in (left, place - left, weight * inverse**2))
            row, share = filtered[:, :, k], share.to(d.real)
            total += gain.to(d.real) * (row[..., index] * (1 - share) + row[..., index + 1] * share)
        return total.unflatten(-1, self.model_shape[1:])


def _along(y: Array, x: Array, theta: Array) -> Array:
    """p · n(θ)."""
    return x * np.cos(theta) + y * np.sin(theta)


def _integral(t: Array, m: Array, w: Array) -> Array:
    """∫_{−∞}^t L / h, from the integral of the ramp clip(u/w + ½, 0, 1)."""

    def ramp(u: Array) -> Array:
        inside = np.clip(u, -w / 2, w / 2) + w / 2
        return inside**2 / (2 * w) + np.maximum(u - w / 2, 0)  # type: ignore[no-any-return]

    return ramp(t + m) - ramp(t - m)


def _column(covariance: Covariance, like: Tensor) -> Tensor:
    variance = covariance.variance.to(like)  # type: ignore[attr-defined]
    return variance[:, None, None] if variance.ndim else variance


def _spacing(shape: tuple[int, ...], spacing: Any, grid: Grid | None, name: str) -> tuple[float, float]:
    if len(shape) != 3 or any(int(n) != n or n < 1 for n in shape):
        raise ValueError(f"{name} needs the shape (channels, n_y, n_x) of an image, got {tuple(shape)}.")
    steps = tuple(float(d) for d in (grid.spacing if grid is not None else spacing))
    if len(steps) != 2 or not all(math.isfinite(d) and d > 0 for d in steps):
        raise ValueError(f"{name} needs two positive pixel sizes (dy, dx), got {steps}.")
    return steps  # type: ignore[return-value]


def _views(angles: Tensor | int, turn: float, name: str) -> Tensor:
    if isinstance(angles, int):
        if angles < 1:
            raise ValueError(f"{name} needs at least one view, got {angles}.")
        return torch.arange(angles, dtype=torch.float64) * (turn / angles)
    views = torch.as_tensor(angles, dtype=torch.float64).detach().clone()
    if views.ndim != 1 or not len(views) or not bool(torch.isfinite(views).all()):
        raise ValueError(
            f"{name} needs a vector of finite angles in radians or a number of views, got {tuple(views.shape)}."
        )
    if float(views.abs().max()) > 4 * math.pi:
        raise ValueError(
            f"The angles of {name} reach {float(views.abs().max()):.4g}; they are in radians: convert degrees with torch.deg2rad."
        )
    return views
