"""A Gaussian prior from examples: sample mean, sample covariance, and how far to shrink it."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from invgen.covariance import Covariance, Dense, Diagonal, Stationary
from invgen.grid import Grid
from invgen.priors.gaussian import GaussianPrior
from invgen.transforms import Transform

__all__ = ["fit_gaussian", "ledoit_wolf"]


def ledoit_wolf(residuals: Tensor) -> tuple[Tensor, float]:
    """Sample covariance shrunk towards μ I, μ = tr S / p, with the intensity that minimises the expected error.

    Σ̂ = (1 − ρ) S + ρ μ I,   ρ = min(b², d²)/d²,   d² = |S − μ I|²,   b² = (1/n²) Σ_k |x_k x_kᵀ − S|²

    Args:
        residuals: `(n, p)` examples with their mean removed.

    Returns:
        Σ̂ `(p, p)` and ρ.

    Reference: Ledoit & Wolf 2004, J. Multivariate Anal. 88, 365, section 3.3.
    """
    n, p = residuals.shape
    sample = residuals.mT @ residuals / n
    average = sample.diagonal().mean()
    spread = float((sample - average * torch.eye(p).to(sample)).square().sum())
    error = float((residuals.square().sum(1).square().sum() / n - sample.square().sum()) / n)
    intensity = min(max(error, 0.0), spread) / spread if spread > 0 else 0.0
    return (1 - intensity) * sample + intensity * average * torch.eye(p).to(sample), intensity


def _shrunk_variances(powers: Tensor, shrinkage: str | float | None, axes: tuple[int, ...]) -> Tensor:
    """Mean over examples of `(n, …)` powers, shrunk towards its average over `axes` by the same rule as the matrix."""
    mean = powers.mean(0)
    average = mean.mean(axes, keepdim=True)
    if shrinkage == "ledoit-wolf":
        spread = (mean - average).square().sum(axes, keepdim=True)
        error = ((powers - mean).square().mean(0) / powers.shape[0]).sum(axes, keepdim=True)
        intensity = (error / spread.clamp_min(1e-300)).clamp(0.0, 1.0)
    else:
        intensity = torch.as_tensor(float(shrinkage or 0.0)).to(mean)
    return (1 - intensity) * mean + intensity * average


def as_examples(data: Tensor | np.ndarray) -> Tensor | np.ndarray:
    """Numeric NumPy arrays as tensors, whatever their byte order; anything else as it is."""
    if isinstance(data, np.ndarray) and data.dtype.kind in "fiub" and not isinstance(data, np.ma.MaskedArray):
        return torch.from_numpy(data.astype(data.dtype.newbyteorder("="), order="C"))
    return data


def fit_gaussian(
    data: Tensor | np.ndarray,
    *,
    structure: str = "dense",
    shrinkage: str | float | None = "ledoit-wolf",
    mean: str = "field",
    padding: int | str = 0,
    grid: Grid | None = None,
    transform: Transform | None = None,
) -> GaussianPrior:
    """Fit N(m, C) to `(n, *shape)` examples of x, in the coordinates u = T⁻¹(x).

    Args:
        data: examples in physical units, n ≥ 2.
        structure: "dense", "diagonal" or "stationary" (channels independent).
        shrinkage: "ledoit-wolf", a part in [0, 1] of C that is replaced by its mean variance times I, or None. Without
            shrinkage, and with a given part, S divides by n − 1; Ledoit–Wolf divides by n, as in the paper. For the
            diagonal and the stationary structure the Ledoit–Wolf rule is applied to the variances of the entries and
            of the Fourier modes (a circulant covariance is diagonal there).
        mean: "field" (one value an entry), "constant" (one a channel; one in all for vectors) or "rows" (one a
            channel and row of the first spatial axis: a depth trend).
        padding: of the stationary structure. 0: the average periodogram |FFT(u − m)|²/N, no taper, the maximum
            likelihood estimate of a periodic field; on fields that do not wrap around it leaks across the edges.
            "auto": residuals are padded with zeros to twice the size, which gives the autocovariance
            Σ r(x) r(x + h)/N inside the grid: positive semi-definite by construction, lags h too low by (1 − |h|/n).
        grid, transform: of the prior.

    Returns:
        `GaussianPrior`. Cost: O(n p² + p³) dense, n FFTs stationary.

    Raises:
        ValueError: fewer than two examples, non-finite values, unknown options, a singular covariance.
    """
    data = as_examples(data)
    if not isinstance(data, Tensor) or data.ndim < 2 or data.shape[0] < 2:
        raise ValueError(
            f"fit needs at least two examples as a tensor or NumPy array (n, *shape), got {tuple(data.shape) if isinstance(data, Tensor) else type(data).__name__}."
        )
    if not bool(torch.isfinite(data).all()):
        raise ValueError("fit needs finite examples; drop or fill the NaN and infinite values first.")
    if not (
        shrinkage is None or shrinkage == "ledoit-wolf" or (isinstance(shrinkage, (int, float)) and 0 <= shrinkage <= 1)
    ):
        raise ValueError(f"shrinkage must be 'ledoit-wolf', None or a number in [0, 1], got {shrinkage!r}.")
    if mean not in ("field", "constant", "rows"):
        raise ValueError(f"mean must be 'field', 'constant' or 'rows', got {mean!r}.")
    u = (transform.inverse(data) if transform is not None else data).double()
    shape = tuple(u.shape[1:])
    if mean == "rows" and len(shape) < 2:
        raise ValueError(f"mean='rows' needs a field (channels, rows, …), the examples have the shape {shape}.")
    axes = {
        "field": (0,),
        "constant": (0, *range(2, u.ndim)) if u.ndim > 2 else (0, 1),
        "rows": (0, *range(3, u.ndim)),
    }[mean]
    centre = u.mean(axes, keepdim=True)
    residuals = u - centre
    n = u.shape[0]
    # a mean per entry costs one degree of freedom an entry, the others next to none
    bessel = n / (n - 1) if mean == "field" and shrinkage != "ledoit-wolf" else 1.0
    covariance: Covariance
    if structure == "dense":
        flat = residuals.flatten(1)
        if shrinkage == "ledoit-wolf":
            matrix = ledoit_wolf(flat)[0]
        else:
            part, sample = float(shrinkage or 0.0), bessel * flat.mT @ flat / n
            matrix = (1 - part) * sample + part * sample.diagonal().mean() * torch.eye(flat.shape[1]).to(sample)
        try:
            covariance = Dense((matrix + matrix.mT) / 2, shape)
        except ValueError as error:
            if not bool(flat.any()):
                raise ValueError(
                    f"The {n} examples are all equal, so there is no covariance to fit; give examples that differ."
                ) from error
            raise ValueError(
                f"The covariance of {n} examples with {flat.shape[1]} entries is singular; use shrinkage='ledoit-wolf' or another structure."
            ) from error
    elif structure == "diagonal":
        powers = bessel * residuals.square().flatten(1)
        covariance = Diagonal(_shrunk_variances(powers, shrinkage, (0,)).reshape(shape), shape)
    elif structure == "stationary":
        if len(shape) < 2:
            raise ValueError(
                f"structure='stationary' needs fields (channels, *spatial), the examples have the shape {shape}; use 'dense' or 'diagonal'."
            )
        spatial = shape[1:]
        if padding not in (0, "auto"):
            raise ValueError(f"padding must be 0 (periodic) or 'auto', got {padding!r}.")
        sizes = spatial if padding == 0 else tuple(s if s == 1 else 2 * s for s in spatial)
        dims = tuple(range(2, u.ndim))
        powers = bessel * torch.fft.fftn(residuals, s=sizes, dim=dims).abs().square() / math.prod(spatial)
        spectrum = _shrunk_variances(powers, shrinkage, tuple(range(1, len(shape))))
        top = spectrum.amax(dim=tuple(range(1, spectrum.ndim)), keepdim=True)
        covariance = Stationary(spectrum.clamp_min(1e-12 * top), shape)
    else:
        raise ValueError(f"structure must be 'dense', 'diagonal' or 'stationary', got {structure!r}.")
    return GaussianPrior(centre[0].expand(shape), covariance, grid=grid, transform=transform)
