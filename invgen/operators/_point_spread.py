"""Convolution of a frame that reaches beyond the image by as much as the point-spread function does."""

from __future__ import annotations

import torch
from scipy.fft import next_fast_len
from torch import Tensor

from invgen.operators._casts import Casts

__all__: list[str] = []


def check_psf(psf: Tensor, image: tuple[int, int]) -> Tensor:
    """The kernel in float64; a sentence for each way it can be wrong."""
    psf = torch.as_tensor(psf)
    if psf.ndim != 2 or psf.is_complex() or not bool(torch.isfinite(psf).all()):
        raise ValueError(
            f"A PSF must be a real, finite image (height, width), got {tuple(psf.shape)} {psf.dtype}; cut it out and fill its gaps."
        )
    if psf.shape[0] > image[0] or psf.shape[1] > image[1]:
        raise ValueError(
            f"The PSF {tuple(psf.shape)} is larger than the image {tuple(image)}; crop it around its centre, entry n // 2 of each axis, and divide it by its sum."
        )
    psf = psf.detach().to(torch.float64, copy=True)
    total = float(psf.sum())
    if abs(total - 1) > 1e-3:
        raise ValueError(
            f"The PSF sums to {total:.6g} and would change the flux; divide it by its sum, psf / psf.sum()."
        )
    return psf


class PointSpread:
    r"""d[i] = Σ_j k[j] m[i − j + ⌊n/2⌋] for the pixels i of the image, m on the frame around it.

    Args:
        kernel: `(k_y, k_x)`, float64, entry ⌊n/2⌋ of each axis its centre. image: (H, W).

    The frame is `(H + k_y − 1, W + k_x − 1)`: nothing that scatters into the image is left out. A kernel that is an
    outer product (a Gaussian along the axes) to the rounding of float32 is applied axis by axis, any other by real
    FFTs: 1.2 and 4.5 ms for 64 images of 80 × 80 and 15 × 15 kernels on one thread.
    """

    def __init__(self, kernel: Tensor, image: tuple[int, int]) -> None:
        self.kernel, self.image = kernel, image
        self.frame = (image[0] + kernel.shape[0] - 1, image[1] + kernel.shape[1] - 1)
        # pixels of the frame before the image's first
        self.before = tuple(n - 1 - n // 2 for n in kernel.shape)
        self.padded = tuple(next_fast_len(n, real=True) for n in self.frame)
        U, s, Vh = torch.linalg.svd(kernel, full_matrices=False)
        self.factors = (U[:, 0] * s[0], Vh[0]) if bool((s[1:] <= 1e-7 * s[0]).all()) else None
        self._casts = Casts()

    def product(self, columns: Tensor, transpose: bool) -> Tensor:
        """`(frame, n)` to `(image, n)`, or back."""
        if self.factors is None:
            return self._filtered(columns, transpose)
        (h, w), count = (self.image if transpose else self.frame), columns.shape[-1]
        for axis, factor in enumerate(self.factors):
            n, k = self.image[axis], len(factor)
            shape = (1, h, -1) if axis == 0 else (self.frame[0] if transpose else self.image[0], w, count)
            block = self._casts(f"{axis} {transpose}", columns, lambda f=factor: _band(f, transpose))  # type: ignore[misc]
            columns = _along(columns.reshape(shape), block, n + k - 1 if transpose else n, k - 1 if transpose else 0)
        return columns.reshape(-1, count)

    def _transfer(self) -> Tensor:
        """Transfer function of the filter whose output at i is that of the image's pixel i."""
        placed = torch.zeros(self.padded, dtype=torch.float64)
        placed[: self.kernel.shape[0], : self.kernel.shape[1]] = self.kernel
        placed = placed.roll(tuple(1 - k for k in self.kernel.shape), dims=(0, 1))
        return torch.fft.rfftn(placed)

    def _filtered(self, columns: Tensor, transpose: bool) -> Tensor:
        (h, w), (H, W) = (self.image, self.frame) if transpose else (self.frame, self.image)
        K = self._casts("transfer", columns, self._transfer)
        spectrum = torch.fft.rfft(columns.T.reshape(-1, h, w), n=self.padded[1], dim=2)
        spectrum = torch.fft.fft(spectrum, n=self.padded[0], dim=1)
        spectrum = torch.fft.ifft(spectrum * (K.conj() if transpose else K), dim=1)[:, :H]
        # only the rows that are kept go back to pixels
        return torch.fft.irfft(spectrum, n=self.padded[1], dim=2)[..., :W].flatten(1).T


_BLOCK = 20  # rows of a dense block of a banded matrix: much less than the band's length, enough for a fast product


def _band(factor: Tensor, transpose: bool) -> Tensor:
    """`(_BLOCK, _BLOCK + k − 1)`: the rows of the convolution, valid without padding, or full with it."""
    k = len(factor)
    block = torch.zeros(_BLOCK, _BLOCK + k - 1, dtype=torch.float64)
    for c, value in enumerate(factor if transpose else factor.flip(0)):
        block.diagonal(c).fill_(float(value))
    return block


def _along(v: Tensor, block: Tensor, n: int, pad: int) -> Tensor:
    """A banded Toeplitz matrix of n rows along the middle axis of `(l, m, n')`, block by block."""
    if pad:
        v = torch.nn.functional.pad(v, (0, 0, pad, pad))
    full, rest = divmod(n, _BLOCK)
    parts = []
    if full:
        windows = v.unfold(1, block.shape[1], _BLOCK)[:, :full].transpose(-1, -2)
        parts.append((block @ windows).reshape(v.shape[0], full * _BLOCK, -1))
    if rest:
        reach = block.shape[1] - _BLOCK
        parts.append(block[:rest, : rest + reach] @ v[:, full * _BLOCK :])
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class Folding:
    """From the frame of the rays to the data: convolve, and pick the measured pixels; nothing without a PSF."""

    def __init__(self, spread: PointSpread | None, picked: Tensor | None) -> None:
        self.spread, self.picked = spread, picked

    def product(self, columns: Tensor, transpose: bool) -> Tensor:
        """`(frame, n)` to `(n_data, n)`, or back."""
        if self.spread is None:
            return columns
        if not transpose:
            images = self.spread.product(columns, False)
            return images if self.picked is None else images[self.picked.to(images.device)]
        if self.picked is not None:
            images = columns.new_zeros(self.spread.image[0] * self.spread.image[1], columns.shape[1])
            images[self.picked.to(columns.device)] = columns
            columns = images
        return self.spread.product(columns, True)
