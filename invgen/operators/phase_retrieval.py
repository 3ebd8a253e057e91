"""Phase retrieval: intensities or magnitudes of linear measurements, whose phases are lost.

    g(x) = |A x|²      or      g(x) = |A x|

What the data cannot tell: x and e^{iφ} x (for a real image, x and −x) always; with A a Fourier transform also circular
shifts of x and its twin, conj x(−p). Coded diffraction, A x = F(m_l x) with several random masks, leaves the first
ambiguity alone for almost every x (Candès, Li & Soltanolkotabi 2015); an oversampled Fourier transform of at least
twice the image in each axis leaves all three (Hayes 1982), and shifts then are those inside the zero padding. A prior that
distinguishes them (a positive or a centred image) takes the ambiguity away; one that does not has a posterior with as
many modes, and its mean is no picture.

References: Fienup 1982, Applied Optics 21, 2758; Hayes 1982, IEEE Trans. Acoust. Speech Signal Process. 30, 140;
Candès, Li & Soltanolkotabi 2015, IEEE Trans. Information Theory 61, 1985 (Wirtinger flow) and Appl. Comput. Harmon.
Anal. 39, 277 (coded diffraction); Shechtman et al. 2015, IEEE Signal Process. Mag. 32, 87.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from invgen.contracts import LinearOperator, Operator
from invgen.covariance import Covariance, Diagonal, Scalar, as_covariance
from invgen.grid import Grid
from invgen.linalg import Solved, inner, norm
from invgen.operators._casts import Casts
from invgen.operators._image_kind import ComplexImageOperator, check_complex_field, check_size
from invgen.operators.matrix import MatrixOperator

__all__ = ["CodedDiffraction", "OversampledFourier", "PhaseRetrieval", "align_phase", "phase_masks", "spectral_start"]


class _DiagonalGram(ComplexImageOperator):
    """An operator with AᴴA = diag(w): the update in model space is elementwise for white noise."""

    def _gram_diagonal(self, like: Tensor) -> Tensor:
        """w, broadcasting against `(batch, channels, n_y, n_x)`."""
        raise NotImplementedError(f"{type(self).__name__} does not define _gram_diagonal.")

    def _gain(self, R: Covariance, C: Covariance, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """r and the model covariance after the update, 1 / (w/r + 1/c)."""
        if not (isinstance(R, Scalar) and isinstance(C, (Scalar, Diagonal))):
            return None
        r = R.variance.to(like.real).reshape(-1, *[1] * len(self.model_shape))
        c = C.variance.to(like.real)
        c = c.reshape(-1, *[1] * len(self.model_shape)) if isinstance(C, Scalar) else c
        return r, c / (1 + c * self._gram_diagonal(like.real) / r)

    def solve(self, rhs: Tensor, R: Any, C: Any, **options: Any) -> Solved:
        """(R + A C Aᴴ)⁻¹ rhs = (rhs − A (AᴴA/r + C⁻¹)⁻¹ Aᴴ rhs / r) / r for white R and diagonal C; otherwise CG."""
        R, C = as_covariance(R, self.data_shape, batched=True), as_covariance(C, self.model_shape, batched=True)
        found = self._gain(R, C, rhs)
        if found is None:
            return super().solve(rhs, R, C, **options)
        v = rhs.to(torch.complex128)  # the difference cancels: in double precision whatever rhs is
        r, gain = (t.double() for t in found)
        r = r.reshape(-1, *[1] * len(self.data_shape))
        back = self._pull(v) * gain
        return Solved.direct(((v - self(back) / r) / r).to(rhs.dtype))

    def solve_model(self, rhs: Tensor, R: Any, C: Any, **options: Any) -> Solved:
        """(Aᴴ R⁻¹ A + C⁻¹)⁻¹ rhs, elementwise likewise."""
        R, C = as_covariance(R, self.data_shape, batched=True), as_covariance(C, self.model_shape, batched=True)
        found = self._gain(R, C, rhs)
        return super().solve_model(rhs, R, C, **options) if found is None else Solved.direct(rhs * found[1])

    def _pull(self, d: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not define _pull.")

    def adjoint(self, d: Tensor) -> Tensor:
        return self._pull(d if d.is_complex() else torch.complex(d, torch.zeros_like(d)))


class OversampledFourier(_DiagonalGram):
    """A x = F (x padded with zeros), the far field of an image, with F unitary: AᴴA = I.

    Args:
        size: `(n_y, n_x)` of the image.
        oversampling: samples of the transform over samples of the image along each axis, at least 1; the autocorrelation,
            which intensities determine, needs 2.
        kind: "real" for real images `(1, n_y, n_x)`, "complex", or "parts" for `(2, n_y, n_x)` real and imaginary.
        model_grid: grid of the image.

    Data are complex `(⌈oversampling n_y⌉, ⌈oversampling n_x⌉)`, zero frequency first. Solves are direct for white R and
    diagonal C.

    Cost: one FFT of the padded grid an item and direction.
    """

    def __init__(
        self,
        size: tuple[int, int],
        oversampling: float = 2.0,
        kind: str = "real",
        *,
        model_grid: Grid | None = None,
    ) -> None:
        size = check_size(size, "OversampledFourier")
        if not (math.isfinite(oversampling) and oversampling >= 1):
            raise ValueError(f"The oversampling must be a number of at least 1, got {oversampling}.")
        padded = tuple(math.ceil(oversampling * n - 1e-9) for n in size)
        super().__init__(size, padded, kind, model_grid)

    @classmethod
    def examples(cls) -> list[Any]:
        return [cls((3, 4)), cls((2, 3), 1.5, "complex"), cls((3, 2), kind="parts")]

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        return torch.fft.fft2(self._image(x), s=self.data_shape, norm="ortho")

    def _pull(self, d: Tensor) -> Tensor:
        return self._model(torch.fft.ifft2(d, norm="ortho")[:, : self.model_shape[1], : self.model_shape[2]])

    def _gram_diagonal(self, like: Tensor) -> Tensor:
        return like.new_ones(())


class CodedDiffraction(_DiagonalGram):
    """A x = (F(m_1 x), F(m_2 x), …), F unitary: AᴴA = Σ_l |m_l|².

    Args:
        masks: m, complex `(masks, n_y, n_x)` (`phase_masks` makes some); six or more determine almost every image.
        kind, model_grid: as in `OversampledFourier`.

    Data are complex `(masks, n_y, n_x)`, zero frequency first. Solves are direct for white R and diagonal C.

    Cost: one FFT a mask, item and direction.
    """

    masks: Tensor

    def __init__(self, masks: Tensor, kind: str = "real", *, model_grid: Grid | None = None) -> None:
        masks = torch.as_tensor(masks)
        if masks.ndim != 3:
            raise ValueError(f"The masks of CodedDiffraction must be (masks, n_y, n_x), got {tuple(masks.shape)}.")
        size = check_size(tuple(masks.shape[1:]), "CodedDiffraction")
        masks = check_complex_field(masks, size, "The masks of CodedDiffraction")
        super().__init__(size, tuple(masks.shape), kind, model_grid)
        self.register_buffer("masks", masks)
        self._casts = Casts()

    @classmethod
    def examples(cls) -> list[Any]:
        masks = phase_masks((3, 4), 3, seed=1)
        return [cls(masks), cls(masks[:2] * torch.arange(1.0, 5.0), "complex"), cls(masks[:1], "parts")]

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        image = self._image(x)[:, None]
        return torch.fft.fft2(image * self._casts("masks", image, lambda: self.masks), norm="ortho")

    def _pull(self, d: Tensor) -> Tensor:
        masks = self._casts("masks", d, lambda: self.masks)
        return self._model((torch.fft.ifft2(d, norm="ortho") * masks.conj()).sum(1))

    def _gram_diagonal(self, like: Tensor) -> Tensor:
        return self._casts("gram", like, lambda: self.masks.abs().square().sum(0))


class PhaseRetrieval(Operator):
    """g(x) = |A x|² (power 2) or |A x| (power 1) of a linear operator with complex data.

        Jᵀ r = 2 Aᴴ (r · A x)      or      Aᴴ (r · A x / |A x|)

    Args:
        linear: A, for instance `OversampledFourier`, `CodedDiffraction` or a complex `MatrixOperator`.
        power: 2 for intensities, which are smooth; 1 for magnitudes, which have no derivative where A x = 0 (it counts
            as zero there).

    Data are real, `linear.data_shape`, in the unit of x to the power. The posterior has the ambiguities that the module
    lists; `align_phase` removes the global phase from a comparison, `spectral_start` gives a first image.

    Raises:
        TypeError: an operator that is not linear, or has real data (a real A loses signs only; that is allowed when it
            is stated by a complex matrix).
        ValueError: another power.

    Cost: one application of A an item, one adjoint a derivative.
    """

    def __init__(self, linear: LinearOperator, power: int = 2) -> None:
        if not isinstance(linear, LinearOperator):
            raise TypeError(
                f"PhaseRetrieval needs a linear operator, got {type(linear).__name__}; compose others with it instead."
            )
        if power not in (1, 2):
            raise ValueError(f"The power must be 2 (intensities) or 1 (magnitudes), got {power!r}.")
        if not linear.forward(torch.zeros(1, *linear.model_shape)).is_complex():
            raise TypeError(
                f"{type(linear).__name__} has real data, whose phase is a sign; state it by a complex matrix if that is meant."
            )
        super().__init__(linear.model_shape, linear.data_shape, model_grid=linear.model_grid)
        self.linear, self.power = linear, power
        self.derivative_order, self.vmappable = linear.derivative_order, linear.vmappable  # type: ignore[misc]

    @classmethod
    def examples(cls) -> list[Any]:
        g = torch.Generator().manual_seed(4)
        matrix = MatrixOperator(torch.randn(6, 4, generator=g, dtype=torch.complex128), (1, 2, 2), real_model=True)
        return [cls(OversampledFourier((3, 2))), cls(CodedDiffraction(phase_masks((2, 3), 2), "parts"), 1), cls(matrix)]

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        field = self.linear(x)
        return field.abs() if self.power == 1 else field.real.square() + field.imag.square()


def phase_masks(size: tuple[int, int], masks: int, *, seed: int = 0) -> Tensor:
    """Random masks of modulus one with phases 0, π/2, π and 3π/2: complex `(masks, n_y, n_x)`.

    The coded diffraction patterns of Candès, Li & Soltanolkotabi (2015) without their erasures.
    """
    if int(masks) != masks or masks < 1:
        raise ValueError(f"phase_masks needs at least one mask, got {masks}.")
    quarter = torch.randint(4, (masks, *check_size(size, "phase_masks")), generator=torch.Generator().manual_seed(seed))
    return torch.tensor([1, 1j, -1, -1j], dtype=torch.complex128)[quarter]


def spectral_start(operator: PhaseRetrieval, d: Tensor, *, iterations: int = 100, seed: int = 0) -> Tensor:
    """The leading eigenvector of Aᴴ diag(y) A, y the intensities, scaled to the energy of the data.

        x_0 = s v,      s² = Σ y / |A v|²,      y cut at 9 times its mean

    Args:
        operator: what was measured. d: `(batch, *data_shape)`, intensities or magnitudes. iterations: of the power
            method. seed: of its first vector, the same for every item.

    Returns:
        `(batch, *model_shape)`, up to the global phase; near the truth where A is random or coded (Candès, Li &
        Soltanolkotabi 2015, algorithm 1; the cut of Chen & Candès 2017), of little use for one plain Fourier transform.

    Raises:
        ValueError: data below zero or all zero.
    """
    operator._items(d, operator.data_shape, "The data given to spectral_start")
    if d.is_complex() or bool((d < 0).any()) or not bool((d.flatten(1).amax(1) > 0).all()):
        raise ValueError("spectral_start needs real data that are not negative, and not zero throughout in any item.")
    intensity = d if operator.power == 2 else d.square()
    level = intensity.flatten(1).mean(1).reshape(-1, *[1] * (d.ndim - 1))
    cut = torch.where(intensity <= 9 * level, intensity, torch.zeros_like(intensity))
    first = torch.randn(1, *operator.model_shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    v = first.to(device=d.device, dtype=d.dtype).expand(len(d), *operator.model_shape)

    def wide(size: Tensor) -> Tensor:
        return size.reshape(-1, *[1] * len(operator.model_shape))

    for _ in range(iterations):
        v = operator.linear.adjoint(operator.linear(v) * cut)
        v = v / wide(norm(v).clamp_min(torch.finfo(d.dtype).tiny))
    seen = operator.linear(v)
    return v * wide((intensity.flatten(1).sum(1) / inner(seen, seen)).sqrt())


def align_phase(x: Tensor, reference: Tensor) -> Tensor:
    """x times the phase (for real x the sign) that brings it closest to the reference: e^{iφ} x, φ = arg⟨x, reference⟩.

    Args:
        x: `(batch, …)`. reference: the same shape, or with a batch of one.
    """
    product = (x.conj() * reference).flatten(1).sum(1)
    turn = torch.where(product.abs() > 0, torch.sgn(product), torch.ones_like(product))
    return x * turn.reshape(-1, *[1] * (x.ndim - 1))
