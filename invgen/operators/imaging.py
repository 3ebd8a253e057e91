"""Denoising, inpainting and deblurring: the identity, masks and convolutions."""

from __future__ import annotations

import math
from typing import Any

import torch
from scipy.fft import next_fast_len
from torch import Tensor

from invgen.contracts import LinearOperator
from invgen.covariance import Covariance, Diagonal, Scalar, Stationary, as_covariance
from invgen.fourier import filter_real, half_of
from invgen.grid import Grid
from invgen.linalg import Solved, inner
from invgen.operators._casts import Casts

__all__ = ["Convolution", "Identity", "Mask"]


class Identity(LinearOperator):
    """g(x) = x: the data are the model plus noise (denoising, or a background model as a second term).

    (R + C)⁻¹ is direct wherever the sum of the two covariances keeps a structure.

    Args:
        shape: shape of the model and the data.
        model_grid: grid of the model.
    """

    def __init__(self, shape: tuple[int, ...], *, model_grid: Grid | None = None) -> None:
        super().__init__(shape, shape, model_grid=model_grid)

    @classmethod
    def examples(cls) -> list[Any]:
        return [cls((1, 3, 4)), cls((5,))]

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        return x

    def adjoint(self, d: Tensor) -> Tensor:
        return d

    def _sum_solve(self, rhs: Tensor, R: Covariance, C: Covariance) -> Tensor | None:
        try:
            return R.plus(C).solve(rhs)
        except TypeError:  # no closed structure: conjugate gradients
            return None

    def solve(self, rhs: Tensor, R: Any, C: Any, **options: Any) -> Solved:
        """(R + C)⁻¹ rhs."""
        R, C = as_covariance(R, self.data_shape, batched=True), as_covariance(C, self.model_shape, batched=True)
        x = self._sum_solve(rhs, R, C)
        return super().solve(rhs, R, C, **options) if x is None else Solved.direct(x)

    def solve_model(self, rhs: Tensor, R: Any, C: Any, **options: Any) -> Solved:
        """(R⁻¹ + C⁻¹)⁻¹ rhs = C (R + C)⁻¹ R rhs."""
        R, C = as_covariance(R, self.data_shape, batched=True), as_covariance(C, self.model_shape, batched=True)
        x = self._sum_solve(R.apply(rhs), R, C)
        return super().solve_model(rhs, R, C, **options) if x is None else Solved.direct(C.apply(x))

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        eye = torch.eye(math.prod(self.model_shape), dtype=torch.float64)
        return eye, torch.ones(len(eye), dtype=torch.float64), eye


class Mask(LinearOperator):
    """The entries of a model that were measured, flat: d = x[mask].

    Args:
        mask: boolean, shape of the model, True where measured.
        model_grid: grid of the model.

    Raises:
        TypeError: a mask that is not boolean.
        ValueError: a mask that hides everything.

    Data are `(batch, n)` in the row-major order of the True entries; the adjoint puts zeros elsewhere. Solves are
    direct for scalar and diagonal R and C.
    """

    mask: Tensor
    index: Tensor
    place: Tensor

    def __init__(self, mask: Tensor, *, model_grid: Grid | None = None) -> None:
        mask = torch.as_tensor(mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"Mask needs a boolean tensor, True where measured, got {mask.dtype}; use mask > 0.")
        n = int(mask.sum())
        if n == 0:
            raise ValueError("The mask hides every entry of the model; it needs at least one True.")
        super().__init__(tuple(mask.shape), (n,), model_grid=model_grid)
        index = mask.flatten().nonzero().flatten()
        place = torch.full((mask.numel(),), n)
        place[index] = torch.arange(n)
        self.register_buffer("mask", mask.clone())
        self.register_buffer("index", index)
        self.register_buffer("place", place)  # where each model entry is found in the data; n for nowhere

    @classmethod
    def examples(cls) -> list[Any]:
        g = torch.Generator().manual_seed(2)
        return [cls(torch.rand(2, 3, 4, generator=g) > 0.5), cls(torch.tensor([True, False, True, True]))]

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        return x.flatten(1)[:, self.index.to(x.device)]

    def adjoint(self, d: Tensor) -> Tensor:
        # reading from the data with a zero appended, not writing into zeros: works under vmap and for any derivative
        padded = torch.cat([d, torch.zeros_like(d[:, :1])], dim=1)
        return padded[:, self.place.to(d.device)].reshape(-1, *self.model_shape)

    def solve(self, rhs: Tensor, R: Any, C: Any, **options: Any) -> Solved:
        """(R + A C Aᴴ)⁻¹ rhs: datum by datum for scalar and diagonal R and C, otherwise CG."""
        R, C = as_covariance(R, self.data_shape, batched=True), as_covariance(C, self.model_shape, batched=True)
        r, c = _variance(R, rhs, 1), _variance(C, rhs, len(self.model_shape))
        if r is None or c is None:
            return super().solve(rhs, R, C, **options)
        seen = c if isinstance(C, Scalar) else c[..., self.index.to(rhs.device)]
        return Solved.direct(rhs / (r + seen))

    def solve_model(self, rhs: Tensor, R: Any, C: Any, **options: Any) -> Solved:
        """(Aᴴ R⁻¹ A + C⁻¹)⁻¹ rhs, likewise."""
        R, C = as_covariance(R, self.data_shape, batched=True), as_covariance(C, self.model_shape, batched=True)
        r, c = _variance(R, rhs, 1), _variance(C, rhs, len(self.model_shape))
        if r is None or c is None:
            return super().solve_model(rhs, R, C, **options)
        precision = (1 / r).expand(rhs.shape[0], *self.data_shape).contiguous()
        x = rhs.flatten(1) / (self._scatter(precision) + 1 / c)
        return Solved.direct(x.reshape(rhs.shape))

    def _scatter(self, precision: Tensor) -> Tensor:
        padded = torch.cat([precision, torch.zeros_like(precision[:, :1])], dim=1)
        return padded[:, self.place.to(precision.device)]

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        n = self.data_shape[0]
        rows = torch.eye(math.prod(self.model_shape), dtype=torch.float64)[self.index]
        return torch.eye(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64), rows


def _variance(covariance: Covariance, like: Tensor, axes: int) -> Tensor | None:
    """Variances that broadcast to a flattened `(batch, n)`; None for a covariance with correlations."""
    if isinstance(covariance, Scalar):
        v = covariance.variance.to(like.real)
        return v[:, None] if v.ndim else v
    if isinstance(covariance, Diagonal):
        return covariance.variance.to(like.real).flatten(-axes)
    return None


class Convolution(LinearOperator):
    """d = k * m along the spatial axes, every channel with the same kernel, by FFT.

        d[i] = Σ_j k[j] m[i − j + ⌊n_k / 2⌋]

    Args:
        kernel: real, one axis for each spatial axis, any size; its entry ⌊n/2⌋ along every axis is the centre.
        shape: `(channels, *spatial)` of the model and the data.
        boundary: "periodic", or "zero" outside the model (as `scipy.ndimage.convolve` with "wrap" or "constant").
        model_grid: grid of the model.

    Raises:
        ValueError: axes that do not fit, a kernel that is not finite, an unknown boundary.

    With a periodic boundary, solves are direct for covariances with a spectrum (scalar, one value an item, periodic
    `Stationary`): F⁻¹ [1 / (R + |K|² C)] F.

    Cost: two FFTs an item and direction.
    """

    kernel: Tensor

    def __init__(
        self, kernel: Tensor, shape: tuple[int, ...], boundary: str = "periodic", *, model_grid: Grid | None = None
    ) -> None:
        kernel = torch.as_tensor(kernel)
        spatial = tuple(shape[1:])
        if kernel.ndim != len(spatial) or not spatial:
            raise ValueError(
                f"The kernel has {kernel.ndim} axes but the model {tuple(shape)} has {len(spatial)} spatial ones after its channel axis; give one kernel axis each."
            )
        if kernel.is_complex() or not bool(torch.isfinite(kernel).all()):
            raise ValueError("The kernel of a Convolution must be real and finite; check how it was built.")
        if boundary not in ("periodic", "zero"):
            raise ValueError(f'boundary must be "periodic" or "zero", got {boundary!r}.')
        super().__init__(shape, shape, model_grid=model_grid)
        self.register_buffer("kernel", kernel.detach().to(torch.float64, copy=True))
        self.boundary = boundary
        self.spatial = spatial
        reach = [max(k // 2, k - 1 - k // 2) for k in kernel.shape]
        # zeros on one side are enough: the kernel's reach wraps around into them from either end
        padded = [next_fast_len(n + min(r, n - 1), real=True) for n, r in zip(spatial, reach)]
        self.padded = spatial if boundary == "periodic" else tuple(padded)
        self._axes = tuple(range(-len(spatial), 0))
        self._casts = Casts()

    @classmethod
    def examples(cls) -> list[Any]:
        g = torch.Generator().manual_seed(3)
        kernel = torch.randn(3, 4, generator=g, dtype=torch.float64)
        return [cls(kernel, (2, 5, 4)), cls(kernel, (1, 4, 6), "zero"), cls(kernel[0], (1, 7))]

    def _transfer(self) -> Tensor:
        """K on the full FFT grid, complex128, the centre of the kernel at the origin."""
        placed = torch.zeros(self.padded, dtype=torch.float64)
        kept, where = self.kernel.cpu(), []
        for axis, (k, n, p) in enumerate(zip(self.kernel.shape, self.spatial, self.padded)):
            offset = torch.arange(k) - k // 2
            if self.boundary == "zero":  # entries further than the model is long meet only zeros
                near = (offset.abs() < n).nonzero().flatten()
                kept, offset = kept.index_select(axis, near), offset[near]
            where.append(offset % p)
        placed.index_put_(tuple(torch.meshgrid(*where, indexing="ij")), kept, accumulate=True)
        return torch.fft.fftn(placed)

    def _apply_transfer(self, v: Tensor, conjugate: bool) -> Tensor:
        if not v.is_complex():
            K = self._casts("half", v, lambda: half_of(self._transfer()))
            return filter_real(v, K.conj() if conjugate else K, self.padded)
        K = self._casts("full", v, self._transfer)
        spectrum = torch.fft.fftn(v, s=self.padded, dim=self._axes) * (K.conj() if conjugate else K)
        out = torch.fft.ifftn(spectrum, dim=self._axes)
        return out if self.padded == self.spatial else out[(..., *(slice(n) for n in self.spatial))]

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        return self._apply_transfer(x, conjugate=False)

    def adjoint(self, d: Tensor) -> Tensor:
        return self._apply_transfer(d, conjugate=True)

    def pull_residual(self, x: Tensor, d: Tensor, R: Covariance) -> tuple[Tensor, Tensor]:
        """Both in the Fourier domain for one periodic, white, real problem: one pair of FFTs instead of two."""
        real = not x.is_complex() and not d.is_complex() and d.dtype == x.dtype
        if not (isinstance(R, Scalar) and R.variance.ndim == 0 and self.boundary == "periodic" and real):
            return super().pull_residual(x, d, R)
        items = self._items(x, self.model_shape, "The model given to Convolution.pull_residual")
        self.forward_count += items
        self.adjoint_count += items
        K = self._casts("half", x, lambda: half_of(self._transfer()))
        residual = torch.fft.rfftn(x, dim=self._axes).mul_(-K).add_(torch.fft.rfftn(d, dim=self._axes))
        # Parseval: every column but the first, and the last of an even length, stands for its mirror image too
        own = residual[..., :: residual.shape[-1] - 1] if self.spatial[-1] % 2 == 0 else residual[..., :1]
        total = 2 * inner(residual, residual) - inner(own, own)
        variance = R.variance.to(x)
        pulled = torch.fft.irfftn(residual * (K.conj() / variance), s=self.padded, dim=self._axes)
        return pulled, total / (variance * math.prod(self.spatial))

    def _spectrum(self, covariance: Covariance, like: Tensor) -> Tensor | None:
        """Eigenvalues on the FFT grid, None where the covariance has no such structure."""
        if isinstance(covariance, Scalar):
            v = covariance.variance.to(like.real)
            return v.reshape(-1, *(1,) * (like.ndim - 1)) if v.ndim else v
        if isinstance(covariance, Stationary) and covariance.periodic:
            return covariance.spectrum.to(like.real)
        return None

    def _spectra(self, R: Covariance, C: Covariance, like: Tensor) -> tuple[Tensor, Tensor] | None:
        r, c = self._spectrum(R, like), self._spectrum(C, like)
        return None if self.boundary != "periodic" or r is None or c is None else (r, c)

    def _filter(self, v: Tensor, gain: Any, r: Tensor, c: Tensor) -> Tensor:
        power = self._casts("power", v.real, lambda: self._transfer().abs().square())
        if v.is_complex():
            return torch.fft.ifftn(torch.fft.fftn(v, dim=self._axes) * gain(power, r, c), dim=self._axes)
        return filter_real(v, gain(*(half_of(t) for t in (power, r, c))), self.spatial)

    def solve(self, rhs: Tensor, R: Any, C: Any, **options: Any) -> Solved:
        """(R + A C Aᴴ)⁻¹ rhs: direct for a periodic boundary and covariances with a spectrum, otherwise CG."""
        R, C = as_covariance(R, self.data_shape, batched=True), as_covariance(C, self.model_shape, batched=True)
        spectra = self._spectra(R, C, rhs)
        if spectra is None:
            return super().solve(rhs, R, C, **options)
        return Solved.direct(self._filter(rhs, lambda power, r, c: 1 / (r + power * c), *spectra))

    def solve_model(self, rhs: Tensor, R: Any, C: Any, **options: Any) -> Solved:
        """(Aᴴ R⁻¹ A + C⁻¹)⁻¹ rhs, likewise."""
        R, C = as_covariance(R, self.data_shape, batched=True), as_covariance(C, self.model_shape, batched=True)
        spectra = self._spectra(R, C, rhs)
        if spectra is None:
            return super().solve_model(rhs, R, C, **options)
        return Solved.direct(self._filter(rhs, lambda power, r, c: r * c / (power * c + r), *spectra))
