r"""Fields given by their power spectrum instead of their covariance, on a torus.

    C(h) = ∫ S(ω) e^{iω·h} dω / (2π)^d,      λ_k = S(ω_k) / v,    ω_k the wavenumbers of the grid, v the volume of a cell

The field is periodic and its covariance diagonal in Fourier modes: density, denoiser and draws are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from invgen.grid import Grid
from invgen.priors._covariance_model import CovarianceModel
from invgen.priors.covariance_models import Exponential, Gaussian, Matern
from invgen.priors.gaussian import GaussianPrior
from invgen.stationary import Stationary
from invgen.transforms import Transform

__all__ = ["spectral_density", "spectrum_field"]


def spectral_density(model: CovarianceModel) -> Callable[[np.ndarray], np.ndarray]:
    """S of a sum of Matérn, exponential and Gaussian structures, as a function of ω `(…, d)` in radians per unit of length.

    Matérn: variance |A|⁻¹ (4π)^(d/2) Γ(ν + d/2)/Γ(ν) (2ν)^ν (2ν + |A⁻ᵀω|²)^(−ν − d/2)  (Rasmussen & Williams 2006, 4.15);
    Gaussian: variance |A|⁻¹ (2π)^(d/2) exp(−|A⁻ᵀω|²/2).

    Raises:
        TypeError: structures whose spectrum has no closed form here.
    """
    strangers = [type(p).__name__ for p in model.parts if not isinstance(p, (Matern, Exponential, Gaussian))]
    if strangers:
        raise TypeError(f"The spectra of {strangers} have no closed form here; use RandomField with their covariance.")

    def density(omega: np.ndarray) -> np.ndarray:
        d = omega.shape[-1]
        total = np.zeros(omega.shape[:-1])
        for part in model.parts:
            inverse = np.linalg.inv(part.metric(d))
            square = np.square(omega @ inverse).sum(-1)
            front = part.variance * abs(np.linalg.det(inverse))
            if isinstance(part, Gaussian):
                total += front * (2 * math.pi) ** (d / 2) * np.exp(-0.5 * square)
            else:
                nu = float(part.nu)  # type: ignore[attr-defined]
                scale = math.exp(math.lgamma(nu + d / 2) - math.lgamma(nu)) * (4 * math.pi) ** (d / 2)
                total += front * scale * (2 * nu) ** nu * (2 * nu + square) ** (-nu - d / 2)
        return total

    return density


def spectrum_field(
    power: Callable[[np.ndarray], np.ndarray],
    where: Grid | tuple[int, ...],
    *,
    mean: Tensor | float = 0.0,
    spacing: Sequence[float] | None = None,
    transform: Transform | None = None,
) -> GaussianPrior:
    """The periodic Gaussian field with a given power spectrum.

    Args:
        power: S, a function of ω `(…, d)` in radians per unit of the grid, non-negative and even: S(−ω) = S(ω).
        where: a `Grid`, or the shape `(channels, *spatial)` with `spacing` (1 when omitted); channels are independent.
        mean, transform: as for `GaussianPrior`.

    Raises:
        ValueError: a spectrum that is negative, infinite (a power law at ω = 0: give it a finite value there) or not even.

    Example:
        >>> field = spectrum_field(lambda w: (0.01 + (w**2).sum(-1)) ** -1.5, (1, 128, 128))
    """
    grid = where if isinstance(where, Grid) else None
    shape = where.field_shape if isinstance(where, Grid) else tuple(where)
    steps = grid.spacing if grid is not None else tuple(spacing or (1.0,) * (len(shape) - 1))
    axes = [2 * math.pi * np.fft.fftfreq(n, s) for n, s in zip(shape[1:], steps, strict=True)]
    omega = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    values = np.asarray(power(omega), dtype=np.float64) / math.prod(steps)
    if values.shape != tuple(shape[1:]) or not np.isfinite(values).all() or not (values >= 0).all():
        raise ValueError(
            f"A power spectrum takes (…, d) and returns one finite, non-negative value each; this one returned the shape {values.shape} with values from {np.nanmin(values):g} to {np.nanmax(values):g}."
        )
    every = tuple(range(values.ndim))
    mirrored = np.roll(np.flip(values, every), 1, every)
    # at the highest wavenumber of an axis +ω and −ω are one entry: there the mean of both is meant
    inner = np.ix_(*[np.nonzero(2 * np.arange(n) != n)[0] for n in values.shape])
    if not np.allclose(values[inner], mirrored[inner], rtol=1e-6, atol=1e-9 * float(values.max())):
        raise ValueError("A power spectrum of a real field is even, S(−ω) = S(ω); this one is not.")
    law = Stationary(torch.from_numpy(0.5 * (values + mirrored))[None], shape, even=True)
    return GaussianPrior(mean, law, shape=shape, grid=grid, transform=transform)
