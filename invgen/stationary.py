"""Stationary covariances: diagonal under the Fourier transform, padded where the field must not wrap around."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from invgen._covariance import Covariance, Scalar, scale_factor
from invgen.fourier import filter_real

__all__ = ["Stationary"]


class Stationary(Covariance):
    """A stationary covariance on a periodic grid, or the restriction of one to a grid it is padded around.

    C = P F⁻¹ S F Pᵀ, with S the power spectrum on the padded grid and P the restriction. Apply and draw are exact;
    `solve`, `whiten` and `logdet` exist only without padding (P = I): elsewhere they raise and operators use CG.

    Args:
        spectrum: eigenvalues S on `padded`, `(channels, *padded)` or `(batch, channels, *padded)` (one for each item),
            real, non-negative, in `fftn` order; even, S(k) = S(−k), where the fields are real.
        shape: `(channels, *spatial)` of the item.
        even: whether S(k) = S(−k), where that is known; looked up when omitted, which copies the spectrum twice.

    Cost: two FFTs of the padded grid an application, half of that for real fields.
    """

    _rank = 2

    def __init__(self, spectrum: Tensor, shape: tuple[int, ...], *, even: bool | None = None) -> None:
        self.shape = tuple(shape)
        spectrum = torch.as_tensor(spectrum)
        spectrum = spectrum[None] if spectrum.ndim == len(self.shape) - 1 else spectrum
        spatial = len(self.shape) - 1
        fits = (
            spatial > 0
            and spectrum.ndim in (spatial + 1, spatial + 2)
            and spectrum.shape[-spatial - 1] in (1, self.shape[0])
        )
        if not fits or any(p < s for p, s in zip(spectrum.shape[-spatial:], self.shape[1:], strict=True)):
            raise ValueError(
                f"The spectrum {tuple(spectrum.shape)} must cover the field (channels, *spatial) = {self.shape}: one value a padded grid point."
            )
        if spectrum.is_complex() or not bool((spectrum >= 0).all()) or not bool(torch.isfinite(spectrum).all()):
            raise ValueError(
                "A power spectrum must be real, finite and non-negative; the covariance it came from is not positive semi-definite on this padding."
            )
        self.spectrum = spectrum
        self.padded = tuple(spectrum.shape[-spatial:])
        self.periodic = self.padded == self.shape[1:]
        if even is None:
            axes = tuple(range(-spatial, 0))
            mirrored = torch.roll(spectrum.flip(axes), (1,) * spatial, axes)
            even = bool(torch.allclose(spectrum, mirrored, rtol=1e-4, atol=1e-6 * float(spectrum.max())))
        self.even = even
        self._gains: dict[Any, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_gains": {}}

    @property
    def per_item(self) -> bool:
        return self.spectrum.ndim > len(self.shape)

    @property
    def has_solve(self) -> bool:
        return self.periodic and bool((self.spectrum > 0).all())

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return (self.shape[0], *self.padded)

    def _filter(self, v: Tensor, power: float) -> Tensor:
        """P F⁻¹ S^power F Pᵀ v."""
        axes, half = tuple(range(-len(self.padded), 0)), not v.is_complex()
        if half and not self.even:
            raise ValueError(
                "The power spectrum is not even, S(k) = S(−k), and gives no real covariance; use its even part for real fields."
            )
        key = (power, half, v.real.dtype, v.device)
        if key not in self._gains:
            gain = self.spectrum[..., : self.padded[-1] // 2 + 1] if half else self.spectrum
            self._gains[key] = (gain**power).to(device=v.device, dtype=v.real.dtype)
        if half:
            return filter_real(v, self._gains[key], self.padded, self.shape[1:])
        out = torch.fft.ifftn(torch.fft.fftn(v, s=self.padded, dim=axes) * self._gains[key], dim=axes)
        return out if self.periodic else out[(..., *(slice(n) for n in self.shape[1:]))]

    def _require_solve(self, what: str) -> None:
        if not self.periodic:
            raise TypeError(
                f"{what} of a padded stationary covariance has no closed form; use a solver that needs only C v and draws (CG), or a periodic grid."
            )
        if not self.has_solve:
            raise ValueError(
                f"{what} of a stationary covariance needs a positive spectrum, this one has zeros; add a small nugget (Scalar)."
            )

    def apply(self, v: Tensor) -> Tensor:
        return self._filter(v, 1.0)

    def solve(self, v: Tensor) -> Tensor:
        self._require_solve("The inverse")
        return self._filter(v, -1.0)

    def sqrt(self, white: Tensor) -> Tensor:
        """Draw from white noise `(batch, *noise_shape)`: the padded grid where there is padding, which makes it exact."""
        if tuple(white.shape[-len(self.padded) :]) != self.padded:
            raise ValueError(
                f"A stationary draw needs white noise on the padded grid {self.noise_shape}, got {tuple(white.shape)}."
            )
        return self._filter(white, 0.5)

    def whiten(self, v: Tensor) -> Tensor:
        self._require_solve("The whitening")
        return self._filter(v, -0.5)

    def logdet(self) -> Tensor:
        self._require_solve("The determinant")
        axes = tuple(range(-len(self.shape), 0))
        return self.spectrum.expand(*self.spectrum.shape[: -len(self.shape)], *self.noise_shape).log().sum(axes)

    def diagonal(self) -> Tensor:
        axes = tuple(range(-len(self.padded), 0))
        return self.spectrum.mean(axes, keepdim=True).expand(*self.spectrum.shape[: -len(self.shape)], *self.shape)

    def scaled(self, factor: float | Tensor) -> Stationary:
        factor = scale_factor(factor, self.spectrum)
        return Stationary(self.spectrum * factor.reshape(factor.shape + (1,) * len(self.shape)), self.shape)

    def _add(self, other: Covariance) -> Covariance:
        if isinstance(other, Stationary) and other.padded == self.padded:
            return Stationary(self.spectrum + other.spectrum, self.shape)
        if isinstance(other, Scalar):
            extra = other.variance.to(self.spectrum)
            return Stationary(self.spectrum + extra.reshape(extra.shape + (1,) * len(self.shape)), self.shape)
        return super()._add(other)
