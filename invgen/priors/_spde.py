r"""Matérn fields as solutions of a stochastic differential equation, by Chebyshev polynomials of a sparse matrix.

    (κ² − ∇·H∇)^(α/2) u = c |H|^(1/4) W,     α = ν + d/2,  κ² = 2ν,  H = A⁻¹ A⁻ᵀ,  c² = σ² (4π)^(d/2) Γ(α)/Γ(ν) κ^(2ν)

has the Matérn covariance of variance σ² whose lag is measured by A (Whittle 1954; Lindgren, Rue & Lindström 2011, equation 2).
On the grid, with M the stencil of κ² − ∇·H∇ between reflecting boundaries and white noise of variance 1/volume,

    u = P(M) D z,   P(λ) ≈ λ^(−α/2),       Σ = P(M) D² P(M),       Σ⁻¹ = D⁻¹ M^α D⁻¹  (where D is constant).

H may vary from cell to cell: ranges and angles that change in space; the variance then stays about constant where they change
slowly. For a constant H the factor D is such that the variance of the *lattice* field is σ² away from the boundaries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import scipy.fft
import scipy.sparse.linalg
import torch
from torch import Tensor

from invgen.covariance import Covariance, Dense, Scalar
from invgen.linalg import cg
from invgen.priors._chebyshev import clenshaw, coefficients
from invgen.priors._linear_map import linear
from invgen.priors._stencil import Stencil, diffusion
from invgen.priors.covariance_models import CovarianceModel, Exponential, Matern

_BLOCK = 1 << 20  # entries taken through the recurrence together, so that its fields stay in the cache


class ChebyshevField(Covariance):
    """Σ = R P(M) D² P(M) Rᵀ on `(channels, *spatial)`, R cutting off the margin.

    Args:
        stencil: M on the grid and its margin. alpha: α. scale: D, a number or one value an entry of the stencil's grid.
        shape: of one item. margin: cells beyond each side, an axis. tolerance: of P, relative to its largest value.

    Without a margin there are `solve`, `whiten` and `logdet` (a sparse factorisation where M is not diagonal under the cosine
    transform); with one there are draws and products alone.

    Cost: one polynomial a draw, two a product; degree about ln(2/tolerance) / 2 · √(b/a), b/a the condition of M.
    """

    _rank = 3

    def __init__(
        self,
        stencil: Stencil,
        alpha: float,
        scale: float | Tensor,
        shape: tuple[int, ...],
        *,
        margin: tuple[int, ...] = (),
        tolerance: float = 1e-6,
    ) -> None:
        self.stencil, self.alpha, self.scale, self.shape = stencil, float(alpha), scale, tuple(shape)
        self.margin = tuple(margin) or (0,) * (len(shape) - 1)
        self.tolerance = float(tolerance)
        self._X = stencil.mapped()
        self.coefficients = self._fit(lambda x: x ** (-alpha / 2), tolerance)

    @property
    def degree(self) -> int:
        """Of P."""
        return len(self.coefficients) - 1

    @property
    def has_solve(self) -> bool:
        return not any(self.margin)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return (self.shape[0], *self.stencil.shape)

    def _fit(self, f: Callable[[np.ndarray], np.ndarray], tolerance: float) -> np.ndarray:
        return coefficients(f, *self.stencil.bounds, tolerance=tolerance)

    def _polynomial(self, c: np.ndarray, v: Tensor) -> Tensor:
        """Σ_k c_k T_k(X) v, block by block of items."""

        def run(a: Tensor) -> Tensor:
            a = a.detach().contiguous()
            if c.ndim > 1:  # one polynomial an item: all of them together
                return clenshaw(self._X, c, a)
            flat = a.reshape(-1, *self.stencil.shape)
            many = max(1, _BLOCK // math.prod(self.stencil.shape))
            return torch.cat([clenshaw(self._X, c, part) for part in flat.split(many)]).reshape(a.shape)

        return linear(v, run)

    def _D(self, v: Tensor) -> float | Tensor:
        return self.scale.to(v) if isinstance(self.scale, Tensor) else self.scale

    def _crop(self, v: Tensor) -> Tensor:
        if self.has_solve:
            return v
        for i, (m, n) in enumerate(zip(self.margin, self.shape[1:], strict=True)):
            v = v.narrow(i - len(self.margin), m, n)
        return v

    def _extend(self, v: Tensor) -> Tensor:
        if self.has_solve:
            return v
        return torch.nn.functional.pad(v, [m for m in reversed(self.margin) for _ in (0, 1)])

    def sqrt(self, white: Tensor) -> Tensor:
        """P(M) D w, cut; white `(batch, *noise_shape)`."""
        return self._crop(self._polynomial(self.coefficients, white * self._D(white)))

    def apply(self, v: Tensor) -> Tensor:
        inner = self._polynomial(self.coefficients, self._extend(v))
        return self._crop(self._polynomial(self.coefficients, self._D(v) ** 2 * inner))

    def _require_solve(self, what: str) -> None:
        if not self.has_solve:
            raise TypeError(f"{what} of a field that was cut out of a margin has no closed form; use margin=0.")

    def _root(self, v: Tensor) -> Tensor:
        """M^(α/2) v: products with M, times a fractional power of it, which is between −1 and 0."""
        whole = math.ceil(self.alpha / 2 - 1e-9)
        rest = self.alpha / 2 - whole
        if rest < -1e-9:
            v = self._polynomial(self._fit(lambda x: x**rest, 1e-3 * self.tolerance), v)
        for _ in range(whole):
            v = linear(v, lambda a: self.stencil.apply(a.detach()))
        return v

    def whiten(self, v: Tensor) -> Tensor:
        """D⁻¹ M^(α/2) v, the inverse of `sqrt` to the tolerance."""
        self._require_solve("The whitening")
        return self._root(v) / self._D(v)

    def solve(self, v: Tensor) -> Tensor:
        self._require_solve("The inverse")
        return self._root(self._root(v) / self._D(v) ** 2)

    def shrink(self, v: Tensor, noise: Tensor) -> Tensor:
        """Σ (Σ + noise)⁻¹ v; noise `(batch or 1, 1, …)`: a polynomial where D is constant, conjugate gradients elsewhere."""
        tolerance = 1e-12 if v.dtype == torch.float64 else 1e-6
        if isinstance(self.scale, Tensor) or not self.has_solve:
            solved = cg(lambda w: self.apply(w) + noise * w, self.apply(v), rtol=tolerance, max_iter=2000)
            if not bool(solved.converged.all()):
                raise RuntimeError(
                    f"The denoiser did not converge in {solved.iterations} iterations (relative residual {float(solved.residual.max()):.1e})."
                )
            return solved.x
        ratio = noise.detach().double().cpu().flatten().numpy() / self.scale**2
        c = self._fit(lambda x: 1 / (1 + ratio * x[:, None] ** self.alpha), tolerance)
        return self._polynomial(c if len(ratio) > 1 else c[:, 0], v)

    def logdet(self) -> Tensor:
        self._require_solve("The determinant")
        n = math.prod(self.stencil.shape)
        values = self.stencil.eigenvalues()
        if values is not None:
            log_m = float(values.log().sum())
        else:
            factor = scipy.sparse.linalg.splu(self.stencil.matrix())
            log_m = float(np.log(np.abs(factor.U.diagonal())).sum())
        log_d = n * math.log(self.scale) if not isinstance(self.scale, Tensor) else float(self.scale.log().sum())
        return torch.tensor(self.shape[0] * (2 * log_d - self.alpha * log_m), dtype=torch.float64)

    def diagonal(self) -> Tensor:
        values = self.stencil.eigenvalues()
        if values is not None and not isinstance(self.scale, Tensor):
            out = self.scale**2 * values**-self.alpha
            for i, n in enumerate(self.stencil.shape):  # Σ_k D_ki² λ_k^(−α), one axis after the other
                basis = torch.from_numpy(scipy.fft.dct(np.eye(n), type=2, norm="ortho", axis=0)).square()
                out = torch.movedim(torch.tensordot(basis, out, dims=([0], [i])), 0, i)
            return self._crop(out).expand(self.shape)
        if math.prod(self.shape) > 4096:
            raise TypeError(
                "The variances of a field with ranges that vary in space take a solve an entry; estimate them from draws."
            )
        return self.dense().diagonal().reshape(self.shape)

    def scaled(self, factor: float | Tensor) -> Covariance:
        if isinstance(factor, Tensor) and factor.ndim:
            raise TypeError("This covariance takes one factor for all items.")
        root = math.sqrt(float(factor))
        return ChebyshevField(
            self.stencil, self.alpha, self.scale * root, self.shape, margin=self.margin, tolerance=self.tolerance
        )

    def _add(self, other: Covariance) -> Covariance:
        if math.prod(self.shape) > 4096 or not isinstance(other, (Scalar, Dense, ChebyshevField)):
            return super()._add(other)
        matrix = self.dense()
        return Dense((matrix + matrix.mT) / 2, self.shape).plus(
            Dense(other.dense(), self.shape) if isinstance(other, ChebyshevField) else other
        )


def spde_covariance(
    model: CovarianceModel,
    shape: tuple[int, ...],
    spacing: Sequence[float],
    *,
    length: Tensor | None = None,
    angle: Tensor | None = None,
    margin: int | Sequence[int] = 0,
    tolerance: float = 1e-6,
) -> ChebyshevField:
    """The field of a Matérn (or exponential) model on a grid `(channels, *spatial)`, channels independent and alike.

    Args:
        model: its smoothness and variance; its length and angle where they do not vary.
        shape, spacing: of the grid.
        length: `(*spatial)` or `(d, *spatial)`, where it varies (along the turned axes). angle: `(*spatial)` in degrees, 2-D.
        margin: cells beyond each side that are simulated and cut off: the boundaries reflect, and raise the variance within
            about a range of them.
        tolerance: of the polynomial, relative.

    Raises:
        TypeError: a covariance that is not one Matérn structure. ValueError: lengths that are not positive, wrong shapes.
    """
    spatial, d = tuple(shape[1:]), len(shape) - 1
    if len(model.parts) != 1 or not isinstance(model, (Matern, Exponential)):
        raise TypeError(
            f"method='spde' simulates one Matérn or exponential structure, got {type(model).__name__}; use 'circulant' for others, or add fields."
        )
    nu = float(model.nu)
    alpha, kappa2 = nu + d / 2, 2 * nu
    pad = tuple(int(margin) for _ in spatial) if isinstance(margin, (int, float)) else tuple(int(m) for m in margin)
    if len(pad) != d or min(pad) < 0:
        raise ValueError(f"margin is a number of cells, or one for each of the {d} axes, got {margin!r}.")
    outer = tuple(n + 2 * m for n, m in zip(spatial, pad, strict=True))
    c2 = model.variance * (4 * math.pi) ** (d / 2) * math.gamma(alpha) / math.gamma(nu) * kappa2**nu
    volume = math.prod(spacing)
    if length is None and angle is None:
        inverse = np.linalg.inv(model.metric(d))
        stencil = diffusion(kappa2, inverse @ inverse.T, outer, spacing)
        continuous = math.sqrt(c2 * math.sqrt(np.linalg.det(inverse @ inverse.T)) / volume)
        root = continuous * math.sqrt(
            model.variance / _lattice_variance(kappa2, inverse @ inverse.T, spacing, alpha, continuous)
        )
        return ChebyshevField(stencil, alpha, root, shape, margin=pad, tolerance=tolerance)
    H = _varying(model, spatial, length, angle)
    H = np.pad(H, [(0, 0), (0, 0), *((m, m) for m in pad)], mode="edge")
    stencil = diffusion(kappa2, H, outer, spacing)
    determinant = np.linalg.det(np.moveaxis(H, (0, 1), (-2, -1)))
    scale = torch.from_numpy(np.sqrt(c2 * np.sqrt(determinant) / volume))
    return ChebyshevField(stencil, alpha, scale, shape, margin=pad, tolerance=tolerance)


def _varying(
    model: CovarianceModel, spatial: tuple[int, ...], length: Tensor | None, angle: Tensor | None
) -> np.ndarray:
    """H of every cell, `(d, d, *spatial)`."""
    d = len(spatial)
    own = [model.length] * d if isinstance(model.length, (int, float)) else list(model.length)
    if length is None:
        lengths = np.broadcast_to(np.asarray(own, dtype=np.float64).reshape(d, *(1,) * d), (d, *spatial))
    else:
        lengths = np.asarray(torch.as_tensor(length).double())
        lengths = np.broadcast_to(lengths, (d, *spatial)) if lengths.shape == spatial else lengths
    if lengths.shape != (d, *spatial) or not (np.isfinite(lengths).all() and (lengths > 0).all()):
        raise ValueError(
            f"Lengths that vary in space are positive, {spatial} or {(d, *spatial)}; got the shape {tuple(lengths.shape)}."
        )
    H = np.zeros((d, d, *spatial))
    for i in range(d):
        H[i, i] = lengths[i] ** 2
    turned = angle if angle is not None else model.angle
    if np.any(np.asarray(turned)):
        if d != 2:
            raise ValueError(f"Angles that vary in space need a 2-D grid, this one has {d} axes.")
        a = np.deg2rad(np.asarray(torch.as_tensor(turned).double()))
        if a.shape not in ((), spatial):
            raise ValueError(f"Angles that vary in space have the shape {spatial}, got {a.shape}.")
        c, s, p, q = np.cos(a), np.sin(a), lengths[0] ** 2, lengths[1] ** 2
        H[0, 0], H[1, 1] = c * c * p + s * s * q, s * s * p + c * c * q
        H[0, 1] = H[1, 0] = c * s * (p - q)
    return H


def _lattice_variance(kappa2: float, H: np.ndarray, spacing: Sequence[float], alpha: float, scale: float) -> float:
    """Variance of D M^(−α/2) z on an endless lattice: the mean of D² λ(k)^(−α) over the wavenumbers k.

    λ^(−α) has a peak of width √κ²/c at k = 0, c the length in cells. Gauss–Legendre nodes in t with k = w sinh(t)
    resolve it at every length, w = √κ²/c: equal steps in t are equal steps in k within the peak and in ln k outside.
    """
    d = len(spacing)
    nodes, weights = np.polynomial.legendre.leggauss({1: 512, 2: 256, 3: 96}[d])
    k, share = [], []
    for i in range(d):
        width = math.sqrt(kappa2) * spacing[i] / math.sqrt(H[i, i])
        reach = math.asinh(math.pi / width)
        t = 0.5 * reach * (nodes + 1)
        own, weight = width * np.sinh(t), 0.5 * reach * weights * width * np.cosh(t) / math.pi
        if i == 0 and d == 2 and H[0, 1]:  # λ(k) = λ(−k) only with both signs turned: one axis has both
            own, weight = np.concatenate([-own[::-1], own]), 0.5 * np.concatenate([weight[::-1], weight])
        k.append(own.reshape(-1, *(1,) * (d - 1 - i)))
        share.append(weight.reshape(-1, *(1,) * (d - 1 - i)))
    total = np.full((1,) * d, kappa2)
    for i in range(d):
        total = total + H[i, i] / spacing[i] ** 2 * 2 * (1 - np.cos(k[i]))
    if d == 2 and H[0, 1]:
        total = total + 2 * H[0, 1] * np.sin(k[0]) * np.sin(k[1]) / (spacing[0] * spacing[1])
    density = total**-alpha
    for weight in share:
        density = density * weight
    return float(scale**2 * density.sum())
