"""Cartesian magnetic resonance imaging: samples of the Fourier transform of an image, seen by one coil or by several.

    d_c(k) = (n_y n_x)^(−1/2) Σ_p S_c(p) x(p) exp(−2πi k · (p − p_0)) + noise,      k in the mask

with the zero frequency in the middle of the mask and p_0 the middle of the image, as scanners store it; the transform
is unitary, so that the noise of an image from all samples is that of the data. Noise of standard deviation σ is complex,
σ²/2 in either part.

References: Lustig, Donoho & Pauly 2007, Magn. Reson. Med. 58, 1182 (undersampling masks); Pruessmann et al. 1999,
Magn. Reson. Med. 42, 952 (several coils); Roemer et al. 1990, Magn. Reson. Med. 16, 192 (their combination).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from invgen.covariance import Covariance, Diagonal, Scalar, Stationary, as_covariance
from invgen.grid import Grid
from invgen.linalg import Solved
from invgen.operators._casts import Casts
from invgen.operators._image_kind import ComplexImageOperator, check_complex_field, check_size

__all__ = ["MRI", "coil_sensitivities", "kspace_mask", "root_sum_of_squares"]


class MRI(ComplexImageOperator):
    """Cartesian MRI: d_c = P F (S_c x), with the samples of all coils in the order of the mask, `(coils, n)`.

    Args:
        mask: boolean `(n_y, n_x)`, True where measured, the zero frequency at `(n_y // 2, n_x // 2)`.
        sensitivities: S, complex `(coils, n_y, n_x)`; one coil that sees everything alike when omitted.
        kind: "complex" for models `(1, n_y, n_x)` of complex numbers, "real" for real images, "parts" for models
            `(2, n_y, n_x)` of real and imaginary parts, the form real priors take.
        model_grid: grid of the image.

    Data are complex, in the unit of the image. `zero_filled` is the adjoint, the usual first picture.

    Raises:
        TypeError: a mask that is not boolean.
        ValueError: a mask of other than two axes or without a sample, sensitivities that do not fit.

    With one coil, solves are direct for white or diagonal R and white or periodic stationary C. With samples alone,
    (R + A C Aᴴ) is diagonal in k for complex images; for a real image k and −k are one pair, and with w = 1/R on the
    samples, λ the spectrum of C, and v†(k) = conj v(−k),

        t = ½(w p + (w p)†) / (1 + λ ½(w + w†)),      (R + A C Aᵀ)⁻¹ p = w (p − λ t).

    With several coils they are conjugate gradients.

    Cost: one FFT a coil, item and direction.
    """

    mask: Tensor
    sensitivities: Tensor | None
    index: Tensor
    place: Tensor
    phase: Tensor

    def __init__(
        self,
        mask: Tensor,
        sensitivities: Tensor | None = None,
        kind: str = "complex",
        *,
        model_grid: Grid | None = None,
    ) -> None:
        mask = torch.as_tensor(mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"MRI needs a boolean mask, True where measured, got {mask.dtype}; use mask > 0.")
        size = check_size(tuple(mask.shape), "MRI")
        n = int(mask.sum())
        if n == 0:
            raise ValueError("The mask of MRI holds no sample; it needs at least one True.")
        maps = None if sensitivities is None else check_complex_field(sensitivities, size, "The sensitivities of MRI")
        super().__init__(size, (1 if maps is None else len(maps), n), kind, model_grid)
        rows, columns = mask.nonzero(as_tuple=True)
        # from the middle of the mask to the order of the FFT
        k_y, k_x = ((k - m // 2) % m for k, m in zip((rows, columns), size, strict=True))
        index = k_y * size[1] + k_x
        place = torch.full((mask.numel(),), n)
        place[index] = torch.arange(n)
        turns = k_y.double() * (size[0] // 2) / size[0] + k_x.double() * (size[1] // 2) / size[1]
        self.register_buffer("mask", mask.clone())
        self.register_buffer("sensitivities", maps)
        self.register_buffer("index", index)
        self.register_buffer("place", place)
        self.register_buffer("phase", torch.polar(torch.ones_like(turns), 2 * math.pi * turns))
        self._casts = Casts()

    @classmethod
    def examples(cls) -> list[Any]:
        g = torch.Generator().manual_seed(5)
        mask = torch.rand(4, 3, generator=g) > 0.4
        even = torch.rand(2, 4, generator=g) > 0.3
        maps = torch.randn(2, 4, 3, generator=g, dtype=torch.complex128)
        return [cls(mask), cls(even, kind="real"), cls(mask, kind="parts"), cls(mask, maps), cls(mask, maps, "real")]

    def _spectrum(self, image: Tensor) -> Tensor:
        """P F: `(batch, …, n_y, n_x)` to `(batch, …, n)`."""
        k = torch.fft.fft2(image, norm="ortho").flatten(-2)[..., self.index.to(image.device)]
        return k * self._casts("phase", k, lambda: self.phase)

    def _grid(self, samples: Tensor) -> Tensor:
        """Pᵀ: samples in their places, in the order of the FFT, zeros elsewhere; `(batch, …, n_y, n_x)`."""
        # reading from the data with a zero appended, not writing into zeros: works under vmap and for any derivative
        padded = torch.cat([samples, torch.zeros_like(samples[..., :1])], dim=-1)
        return padded[..., self.place.to(samples.device)].unflatten(-1, self.model_shape[1:])

    def _maps(self, like: Tensor) -> Tensor | None:
        maps = self.sensitivities
        return None if maps is None else self._casts("maps", like, lambda: maps)

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        image = self._image(x)[:, None]
        maps = self._maps(image)
        return self._spectrum(image if maps is None else image * maps)

    def adjoint(self, d: Tensor) -> Tensor:
        d = d if d.is_complex() else torch.complex(d, torch.zeros_like(d))
        phase = self._casts("phase", d, lambda: self.phase)
        image = torch.fft.ifft2(self._grid(d * phase.conj()), norm="ortho")
        maps = self._maps(image)
        return self._model(image[:, 0] if maps is None else (image * maps.conj()).sum(1))

    def zero_filled(self, d: Tensor) -> Tensor:
        """Aᴴ d: the image from zeros where nothing was measured; `(batch, *model_shape)`."""
        return self.adjoint(d)

    def kspace(self, d: Tensor) -> Tensor:
        """The samples on the grid of the mask, zero frequency in the middle: `(batch, coils, n_y, n_x)`."""
        self._items(d, self.data_shape, "The data given to MRI.kspace")
        return torch.fft.fftshift(self._grid(d), dim=(-2, -1))

    def _variance(self, R: Covariance, like: Tensor) -> Tensor | None:
        """R on the samples of one coil, broadcasting against `(batch, n)`."""
        if isinstance(R, Scalar):
            v = R.variance.to(like.real)
            return v[:, None] if v.ndim else v.reshape(1, 1)
        return R.variance.to(like.real).reshape(-1, self.data_shape[1]) if isinstance(R, Diagonal) else None

    def _power(self, C: Covariance, like: Tensor) -> Tensor | None:
        """Eigenvalues of C on the FFT grid, broadcasting against `(batch, n_y, n_x)`."""
        if isinstance(C, Scalar):
            return C.variance.to(like.real).reshape(-1, 1, 1)
        if isinstance(C, Stationary) and C.periodic and (self.kind == "complex" or C.even):
            spectrum = C.spectrum.to(like.real)
            return spectrum.reshape(-1, *self.model_shape[1:]) if spectrum.shape[-3] == 1 else None
        return None

    def _structure(self, R: Covariance, C: Covariance, like: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.sensitivities is not None:
            return None
        r, power = self._variance(R, like), self._power(C, like)
        return None if r is None or power is None else (r, power)

    def solve(self, rhs: Tensor, R: Any, C: Any, **options: Any) -> Solved:
        """(R + A C Aᴴ)⁻¹ rhs: direct with one coil, white or diagonal R, white or periodic C; otherwise CG."""
        R, C = as_covariance(R, self.data_shape, batched=True), as_covariance(C, self.model_shape, batched=True)
        structure = self._structure(R, C, rhs)
        if structure is None:
            return super().solve(rhs, R, C, **options)
        (r, power), v = structure, rhs[:, 0]
        index = self.index.to(rhs.device)
        flat = power.expand(-1, *self.model_shape[1:]).flatten(1)[:, index]
        if self.kind != "real":
            return Solved.direct((v / (r + flat))[:, None])
        w = self._grid((1 / r).expand(-1, self.data_shape[1]))
        mean = _hermitian(self._grid(v / r)) / (1 + power * _hermitian(w))
        return Solved.direct(((v - flat * mean.flatten(1)[:, index]) / r)[:, None])

    def solve_model(self, rhs: Tensor, R: Any, C: Any, **options: Any) -> Solved:
        """(Aᴴ R⁻¹ A + C⁻¹)⁻¹ rhs = F⁻¹ [λ / (1 + w λ)] F rhs, likewise; w is even where the image is real."""
        R, C = as_covariance(R, self.data_shape, batched=True), as_covariance(C, self.model_shape, batched=True)
        structure = self._structure(R, C, rhs)
        if structure is None:
            return super().solve_model(rhs, R, C, **options)
        r, power = structure
        w = self._grid((1 / r).expand(-1, self.data_shape[1]))
        w = _hermitian(w) if self.kind == "real" else w
        filtered = torch.fft.fft2(self._image(rhs)) * (power / (1 + w * power))
        return Solved.direct(self._model(torch.fft.ifft2(filtered)))

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """For complex images: U = I, s = 1 and the Fourier rows with one coil, LAPACK on the dense matrix with several."""
        if self.kind != "complex":
            return super().svd()
        if self.sensitivities is not None:
            return self._casts.once("svd", lambda: torch.linalg.svd(self.to_dense(), full_matrices=False))  # type: ignore[no-any-return]
        n = self.data_shape[1]
        return torch.eye(n, dtype=torch.complex128), torch.ones(n, dtype=torch.float64), self.to_dense()


def _hermitian(v: Tensor) -> Tensor:
    """½(v + v†), v†(k) = conj v(−k)."""
    return 0.5 * (v + v.flip((-2, -1)).roll((1, 1), (-2, -1)).conj())


def kspace_mask(
    size: tuple[int, int],
    acceleration: float,
    *,
    centre: float = 0.08,
    sampling: str = "lines",
    decay: float = 3.0,
    seed: int = 0,
) -> Tensor:
    """A random undersampling mask with a fully sampled centre, denser towards low frequencies.

        P(k sampled) ∝ (1 − |k| / k_max)^decay       besides the centre

    Args:
        size: `(n_y, n_x)`.
        acceleration: n over the number of samples, at least 1.
        centre: share of the frequencies (lines, or samples of the plane) in the middle that are always measured, the
            autocalibration region.
        sampling: "lines" keeps whole lines along the first axis (the readout), "points" single frequencies of the plane
            (two phase-encoding axes).
        decay: 0 for even density.
        seed: of the draw.

    Returns:
        Boolean `(n_y, n_x)` with round(n / acceleration) lines or points, the zero frequency in the middle.

    Raises:
        ValueError: an acceleration below one, or a centre with more samples than it leaves.

    Reference: Lustig, Donoho & Pauly 2007.
    """
    n_y, n_x = check_size(size, "kspace_mask")
    if sampling not in ("lines", "points"):
        raise ValueError(f'sampling must be "lines" or "points", got {sampling!r}.')
    if not (math.isfinite(acceleration) and acceleration >= 1 and 0 <= centre <= 1 and decay >= 0):
        raise ValueError(
            f"kspace_mask needs acceleration >= 1, a centre between 0 and 1 and decay >= 0, got {acceleration}, {centre} and {decay}."
        )
    x = (torch.arange(n_x, dtype=torch.float64) - n_x // 2) / max(n_x / 2, 1)
    y = (torch.arange(n_y, dtype=torch.float64) - n_y // 2) / max(n_y / 2, 1)
    radius = x.abs() if sampling == "lines" else (y[:, None].square() + x.square()).sqrt().flatten()
    wanted, always = round(len(radius) / acceleration), round(centre * len(radius))
    if always > wanted:
        raise ValueError(
            f"The centre alone takes {always} of the {wanted} samples that an acceleration of {acceleration} leaves; lower one of them."
        )
    order = torch.argsort(radius, stable=True)
    kept = torch.zeros(len(radius), dtype=torch.bool)
    kept[order[:always]] = True
    rest = order[always:]
    if wanted > always:
        density = (1 - radius[rest] / radius.max()).clamp_min(1e-3) ** decay
        draw = torch.multinomial(density, wanted - always, generator=torch.Generator().manual_seed(seed))
        kept[rest[draw]] = True
    return kept.expand(n_y, n_x).clone() if sampling == "lines" else kept.reshape(n_y, n_x)


def coil_sensitivities(size: tuple[int, int], coils: int, *, distance: float = 1.2) -> Tensor:
    """Smooth sensitivities of coils on a circle around the image, normalised to Σ_c |S_c|² = 1.

        S_c(p) ∝ exp(iφ_c(p)) / |p − p_c|,      φ_c the angle under which the coil sees p

    Args:
        size: `(n_y, n_x)`. coils: how many. distance: of the coils from the middle, in half diagonals of the image.

    Returns:
        Complex `(coils, n_y, n_x)`: a stand-in for measured maps, not a model of any scanner.
    """
    n_y, n_x = check_size(size, "coil_sensitivities")
    if int(coils) != coils or coils < 1 or not distance > 1:
        raise ValueError(
            f"coil_sensitivities needs at least one coil outside the image (distance > 1), got {coils} at {distance}."
        )
    half = math.hypot(n_y, n_x) / 2
    y = (torch.arange(n_y, dtype=torch.float64) - (n_y - 1) / 2)[:, None] / half
    x = (torch.arange(n_x, dtype=torch.float64) - (n_x - 1) / 2)[None] / half
    angle = torch.arange(coils, dtype=torch.float64)[:, None, None] * (2 * math.pi / coils)
    across, along = x - distance * angle.cos(), y - distance * angle.sin()
    maps = torch.polar(1 / torch.hypot(across, along), torch.atan2(along, across))
    return maps / root_sum_of_squares(maps[None])[0]


def root_sum_of_squares(images: Tensor) -> Tensor:
    """(Σ_c |x_c|²)^½ over coils: `(batch, coils, n_y, n_x)` to `(batch, n_y, n_x)`, the image without known maps."""
    return images.abs().square().sum(1).sqrt()
