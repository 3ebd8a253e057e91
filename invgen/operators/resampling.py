"""Super-resolution and blur with an open edge: convolutions that keep only some of their samples.

    d = S (k ∗ m) + noise,      S keeps every s-th sample

On a periodic grid S folds the spectrum: each coarse frequency is the mean of the q = Π s fine ones it is the alias of,

    F_c S K m = (1/q) Σ_aliases K̂ m̂,      so that      S K C Kᴴ Sᴴ = F_c⁻¹ [(1/q) Σ_aliases λ |K̂|²] F_c

is diagonal for a stationary C with the spectrum λ, and every linear-Gaussian solve is direct (Zhao et al. 2016, IEEE
Trans. Image Process. 25, 3683, equations 12 to 18, there for λ = 1 and in model space).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from invgen.contracts import LinearOperator
from invgen.covariance import Covariance, Scalar, Stationary, as_covariance
from invgen.fourier import filter_real
from invgen.grid import Grid
from invgen.linalg import Solved
from invgen.operators._casts import Casts
from invgen.operators.imaging import Convolution

__all__ = ["SuperResolution", "ValidConvolution", "bicubic_kernel", "box_kernel", "gaussian_kernel"]


class SuperResolution(LinearOperator):
    """Blur, then every s-th sample: d[i] = (k ∗ m)[s i + offset], with a periodic edge.

    Args:
        kernel: real, one axis for each spatial axis, centred at ⌊n/2⌋; None for no blur.
        shape: `(channels, *spatial)` of the fine image.
        factor: s, a whole number for all axes or one for each; it must divide the axis.
        offset: the first sample kept along each axis, 0 to s − 1; with the default ⌊(s − 1)/2⌋ a coarse pixel lies in
            the middle of its s fine ones, and is their mean after `box_kernel(s)`.
        model_grid: grid of the fine image.

    Attributes:
        data_grid: grid of the coarse image where the fine one is known; a kernel with an even number of entries has
            its middle half a fine pixel behind the sample that is kept.

    Raises:
        ValueError: axes that do not fit, a factor that does not divide them, an offset outside it.

    Solves are direct for covariances with a spectrum (white, one value an item, periodic `Stationary`): F_c⁻¹ [1 / (R +
    fold(λ |K̂|²))] F_c in data space, and by Woodbury's identity in model space; conjugate gradients otherwise.

    Cost: two FFTs of the fine grid an item and direction.
    """

    def __init__(
        self,
        kernel: Tensor | None,
        shape: tuple[int, ...],
        factor: int | Sequence[int],
        *,
        offset: int | Sequence[int] | None = None,
        model_grid: Grid | None = None,
    ) -> None:
        spatial = tuple(shape[1:])
        factors = (factor,) * len(spatial) if isinstance(factor, int) else tuple(int(f) for f in factor)
        if len(factors) != len(spatial) or any(f < 1 or n % f for f, n in zip(factors, spatial)):
            raise ValueError(
                f"The factor {factor} must be whole numbers that divide the axes {spatial}; crop or pad the image first."
            )
        starts = tuple((f - 1) // 2 for f in factors)
        if offset is not None:
            starts = (offset,) * len(spatial) if isinstance(offset, int) else tuple(int(o) for o in offset)
        if len(starts) != len(factors) or any(not 0 <= o < f for o, f in zip(starts, factors)):
            raise ValueError(f"The offset {offset} must lie between 0 and the factor {factors} less one on every axis.")
        coarse = tuple(n // f for n, f in zip(spatial, factors, strict=True))
        super().__init__(shape, (shape[0], *coarse), model_grid=model_grid)
        self.factors: tuple[int, ...] = factors
        self.starts: tuple[int, ...] = starts
        blur = torch.ones((1,) * len(spatial), dtype=torch.float64) if kernel is None else kernel
        self.blur = Convolution(blur, shape)
        self.data_grid = (
            None
            if model_grid is None
            else _coarse_grid(
                model_grid, factors, [o + (1 - n % 2) / 2 for o, n in zip(starts, blur.shape, strict=True)]
            )
        )
        self._casts = Casts()

    @classmethod
    def examples(cls) -> list[Any]:
        g = torch.Generator().manual_seed(8)
        kernel = torch.randn(3, 2, generator=g, dtype=torch.float64)
        return [
            cls(kernel, (1, 4, 6), 2),
            cls(kernel[0], (2, 9), 3, offset=0),
            cls(box_kernel((2, 1)), (1, 4, 3), (2, 1)),
        ]

    def _kept(self, v: Tensor) -> Tensor:
        kept: Any = (..., *(slice(o, None, f) for o, f in zip(self.starts, self.factors, strict=True)))
        return v[kept]

    def _spread(self, d: Tensor) -> Tensor:
        """Sᵀ: the samples in their places, zeros between them."""
        for axis, (o, f) in enumerate(zip(self.starts, self.factors, strict=True), start=2):
            if f > 1:
                row = d.unsqueeze(axis + 1)
                parts = [torch.zeros_like(row)] * o + [row] + [torch.zeros_like(row)] * (f - 1 - o)
                d = torch.cat(parts, dim=axis + 1).flatten(axis, axis + 1)
        return d

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        return self._kept(self.blur._apply_transfer(x, conjugate=False))

    def adjoint(self, d: Tensor) -> Tensor:
        return self.blur._apply_transfer(self._spread(d), conjugate=True)

    def _folded(self, C: Covariance, like: Tensor) -> Tensor | None:
        """Eigenvalues of A C Aᴴ on the coarse FFT grid, `(batch or 1, channels or 1, *coarse)`; None without a spectrum."""
        power = self._casts("power", like.real, lambda: self.blur._transfer().abs().square())
        if isinstance(C, Scalar):
            key = "folded"
            return C.variance.to(like.real).reshape(-1, 1, *[1] * power.ndim) * self._casts(
                key, like.real, lambda: self._fold(self.blur._transfer().abs().square())
            )
        if isinstance(C, Stationary) and C.periodic and (C.even or like.is_complex()):
            spectrum = C.spectrum.to(like.real)
            return self._fold(
                spectrum if C.per_item else spectrum.reshape(-1, *spectrum.shape[-power.ndim - 1 :]), power
            )
        return None

    def _fold(self, spectrum: Tensor, power: Tensor | float = 1.0) -> Tensor:
        """The mean over aliases: fine frequency k + j n_coarse belongs to the coarse one k."""
        v = spectrum * power
        lead = v.ndim - len(self.factors)
        sizes = [m for f, n in zip(self.factors, self.data_shape[1:], strict=True) for m in (f, n)]
        return v.reshape(*v.shape[:lead], *sizes).mean(dim=tuple(lead + 2 * i for i in range(len(self.factors))))

    def _noise(self, R: Covariance, like: Tensor) -> Tensor | None:
        if isinstance(R, Scalar):
            return R.variance.to(like.real).reshape(-1, 1, *[1] * len(self.factors))
        return R.spectrum.to(like.real) if isinstance(R, Stationary) and R.periodic and R.even else None

    def solve(self, rhs: Tensor, R: Any, C: Any, **options: Any) -> Solved:
        """(R + A C Aᴴ)⁻¹ rhs: direct for covariances with a spectrum, otherwise CG."""
        R, C = as_covariance(R, self.data_shape, batched=True), as_covariance(C, self.model_shape, batched=True)
        noise, signal = self._noise(R, rhs), self._folded(C, rhs)
        if noise is None or signal is None:
            return super().solve(rhs, R, C, **options)
        gain = 1 / (noise + signal)
        if rhs.is_complex():
            axes = tuple(range(2, rhs.ndim))
            return Solved.direct(torch.fft.ifftn(torch.fft.fftn(rhs, dim=axes) * gain, dim=axes))
        half = gain[..., : gain.shape[-1] // 2 + 1] if gain.shape[-1] > 1 else gain
        return Solved.direct(filter_real(rhs, half, self.data_shape[1:]))

    def solve_model(self, rhs: Tensor, R: Any, C: Any, **options: Any) -> Solved:
        """(Aᴴ R⁻¹ A + C⁻¹)⁻¹ rhs = C rhs − C Aᴴ (R + A C Aᴴ)⁻¹ A C rhs where `solve` is direct, otherwise CG."""
        R, C = as_covariance(R, self.data_shape, batched=True), as_covariance(C, self.model_shape, batched=True)
        if self._noise(R, rhs) is None or self._folded(C, rhs) is None:
            return super().solve_model(rhs, R, C, **options)
        # the difference cancels: in float64 whatever rhs is
        spread = C.apply(rhs.to(torch.complex128 if rhs.is_complex() else torch.float64))
        inner = self.solve(self(spread), R, C).x
        return Solved.direct((spread - C.apply(self.adjoint(inner))).to(rhs.dtype))


class ValidConvolution(LinearOperator):
    """d = (k ∗ m) where the kernel lies inside the image: nothing is assumed about what lies outside.

        d[i] = Σ_j k[j] m[i + n_k − 1 − j],      i < n_m − n_k + 1

    The image is larger than the data, and its margin of n_k − 1 pixels is unknown like the rest (as
    `scipy.signal.convolve` with "valid").

    Args:
        kernel: real, one axis for each spatial axis. shape: `(channels, *spatial)` of the image.
        model_grid: grid of the image.

    Attributes:
        data_grid: grid of the data where the image's is known, each datum at the centre ⌊n_k/2⌋ of its kernel.

    Raises:
        ValueError: a kernel with other axes than the image, longer than it, complex or not finite.

    Cost: two FFTs of the image an item and direction; solves are conjugate gradients.
    """

    def __init__(self, kernel: Tensor, shape: tuple[int, ...], *, model_grid: Grid | None = None) -> None:
        kernel, spatial = torch.as_tensor(kernel), tuple(shape[1:])
        if kernel.ndim == len(spatial) and any(k > n for k, n in zip(kernel.shape, spatial, strict=True)):
            raise ValueError(f"A kernel {tuple(kernel.shape)} nowhere lies inside an image {spatial}; crop the kernel.")
        blur = Convolution(kernel, shape)
        smaller = tuple(n - k + 1 for k, n in zip(kernel.shape, spatial, strict=True))
        super().__init__(shape, (shape[0], *smaller), model_grid=model_grid)
        self.blur = blur
        # the periodic convolution is right where it does not wrap around; the kernel's own centre moves that window
        self.starts: tuple[int, ...] = tuple(k - 1 - k // 2 for k in kernel.shape)
        self.data_grid = None
        if model_grid is not None:
            window = tuple(slice(s, s + n) for s, n in zip(self.starts, smaller, strict=True))
            self.data_grid = model_grid.crop(window)

    @classmethod
    def examples(cls) -> list[Any]:
        g = torch.Generator().manual_seed(9)
        kernel = torch.randn(2, 3, generator=g, dtype=torch.float64)
        return [cls(kernel, (1, 4, 5)), cls(kernel[0], (2, 6))]

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        full = self.blur._apply_transfer(x, conjugate=False)
        inside: Any = (..., *(slice(s, s + n) for s, n in zip(self.starts, self.data_shape[1:], strict=True)))
        return full[inside]

    def adjoint(self, d: Tensor) -> Tensor:
        margins: list[int] = []
        for start, n, m in zip(self.starts, self.data_shape[1:], self.model_shape[1:], strict=True):
            margins = [start, m - n - start, *margins]
        return self.blur._apply_transfer(torch.nn.functional.pad(d, margins), conjugate=True)


def _coarse_grid(grid: Grid, factors: tuple[int, ...], starts: list[float]) -> Grid:
    return Grid(
        tuple(n // f for n, f in zip(grid.shape, factors, strict=True)),
        tuple(d * f for d, f in zip(grid.spacing, factors, strict=True)),
        tuple(o + d * s for o, d, s in zip(grid.origin, grid.spacing, starts, strict=True)),
        grid.axes,
        grid.units,
        grid.channels,
        grid.channel_units,
    )


def box_kernel(size: int | Sequence[int], axes: int = 2) -> Tensor:
    """The mean over a block of `size` pixels: what a coarse detector pixel does.

    Args:
        size: pixels along every axis, or one number for each. axes: how many axes, for a single number.
    """
    sizes = (size,) * axes if isinstance(size, int) else tuple(size)
    if any(n < 1 for n in sizes):
        raise ValueError(f"box_kernel needs at least one pixel along every axis, got {sizes}.")
    return torch.full(sizes, 1 / math.prod(sizes), dtype=torch.float64)


def gaussian_kernel(sd: float, axes: int = 2, *, reach: float = 4.0) -> Tensor:
    """exp(−|p|²/(2 sd²)) with sum one, cut at `reach` standard deviations; odd along every axis.

    Args:
        sd: standard deviation in pixels. axes: how many axes.
    """
    if not (math.isfinite(sd) and sd > 0):
        raise ValueError(f"gaussian_kernel needs a positive standard deviation in pixels, got {sd}.")
    half = max(1, math.ceil(reach * sd))
    line = torch.exp(-0.5 * (torch.arange(-half, half + 1, dtype=torch.float64) / sd).square())
    return _product(line / line.sum(), axes)


def bicubic_kernel(factor: int, axes: int = 2) -> Tensor:
    """Keys' cubic (a = −½) stretched by the factor, with sum one: the low-pass filter of a bicubic reduction.

        w(t) = 1.5|t|³ − 2.5|t|² + 1 for |t| ≤ 1,   −0.5|t|³ + 2.5|t|² − 4|t| + 2 for |t| ≤ 2,   at t = p / factor

    Args:
        factor: s of the `SuperResolution` it goes before; a coarse pixel is centred on its fine ones, so that the
            taps of an even factor lie at half pixels. axes: how many axes.

    Reference: Keys 1981, IEEE Trans. Acoust. Speech Signal Process. 29, 1153.
    """
    if int(factor) != factor or factor < 1:
        raise ValueError(f"bicubic_kernel needs a whole factor of at least one, got {factor}.")
    n = 4 * factor if factor % 2 == 0 else 4 * factor + 1
    t = ((torch.arange(n, dtype=torch.float64) - (n - 1) / 2) / factor).abs()
    near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    line = torch.where(t <= 1, near, torch.where(t <= 2, far, torch.zeros_like(t)))
    return _product(line / line.sum(), axes)


def _product(line: Tensor, axes: int) -> Tensor:
    kernel = line
    for _ in range(axes - 1):
        kernel = kernel[..., None] * line
    return kernel
