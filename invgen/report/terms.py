"""Data sets in words and figures."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from invgen.covariance import Diagonal, Scalar
from invgen.grid import Grid
from invgen.noise import GaussianNoise
from invgen.report.figures import Panel, histogram, panels
from invgen.report.fit import TermFit

__all__ = ["describe_noise", "describe_operator", "fit_figures", "shape_text"]


def shape_text(shape: tuple[int, ...]) -> str:
    """`(1, 64, 64)` as "1 × 64 × 64"."""
    return " × ".join(map(str, shape)) or "1"


def describe_operator(operator: Any) -> str:
    """Class of the operator and the parts it is composed of."""
    name = type(operator).__name__
    children = [type(c).__name__ for _, c in operator.named_children()]
    return f"{name}({', '.join(children)})" if 0 < len(children) <= 4 else name


def describe_noise(noise: Any, data: Tensor) -> str:
    """The noise in words: family, level and, for Gaussian noise, the signal-to-noise ratio."""
    if not isinstance(noise, GaussianNoise):
        facts = ", ".join(
            f"{k} = {float(v):.4g}"
            for k, v in vars(noise).items()
            if isinstance(v, (int, float)) or (isinstance(v, Tensor) and v.numel() == 1)
        )
        return f"{type(noise).__name__.removesuffix('Noise')}{f' ({facts})' if facts else ''}"
    if isinstance(noise.sigma, str):
        return f"Gaussian, standard deviation “{noise.sigma}” unknown and estimated"
    R = noise.covariance(tuple(data.shape))
    if isinstance(R, Scalar):
        sigma = float(R.variance) ** 0.5
        text = f"Gaussian, independent, standard deviation {sigma:.4g}"
    elif isinstance(R, Diagonal):
        sigma = float(R.variance.mean()) ** 0.5
        text = f"Gaussian, independent, a standard deviation for each datum (rms {sigma:.4g})"
    else:
        try:
            sigma = float(R.diagonal().mean()) ** 0.5
        except TypeError:
            return f"Gaussian, correlated ({type(R).__name__} covariance)"
        text = f"Gaussian, correlated ({type(R).__name__} covariance, rms {sigma:.4g})"
    excess = float((data - data.mean()).abs().square().mean()) - sigma**2  # the level of a background is no signal
    return text + (
        f"; signal-to-noise ratio {10 * np.log10(excess / sigma**2):.1f} dB" if excess > 0 and sigma > 0 else ""
    )


def plain(values: Tensor) -> np.ndarray:
    """A tensor as a real array (the real part of complex data)."""
    v = values.detach().cpu()
    return (v.real if v.is_complex() else v).double().numpy()


def _flat_image(values: np.ndarray) -> np.ndarray:
    """An image or a curve out of data of any shape: leading axes of one are dropped, three axes show the middle slice."""
    out = np.squeeze(values)
    while out.ndim > 2:
        out = out[out.shape[0] // 2]
    return np.atleast_1d(out)


def fit_figures(fit: TermFit, grid: Grid | None, point: bool) -> dict[str, str]:
    """Rows of the data-fit table and the two figures of one data set."""
    mask = fit.term.mask
    data, prediction, residual = plain(fit.data), plain(fit.prediction), plain(fit.residual)
    if mask is not None:
        hidden = ~mask.cpu().numpy()
        data = np.where(hidden, np.nan, data)
    residual = residual.reshape(data.shape) if residual.size == data.size else residual
    same = grid is not None and fit.data.shape[-len(grid.shape) :] == grid.shape
    own = getattr(fit.term.operator, "data_grid", None)
    home = own if own is not None else grid if same else None
    signed = np.nanmin(data) < 0 < np.nanmax(data)
    if signed:
        high = float(np.nanpercentile(np.abs(data), 99.7)) or 1.0
        low, cmap = -high, "gray"
    else:
        low, high, cmap = float(np.nanmin(data)), float(np.nanmax(data)), "viridis"
    if not high > low:
        low, high = low - 0.5, low + 0.5
    label = "real part of the data" if fit.data.is_complex() else "amplitude" if signed else "data"
    predicted = "prediction of the estimate" if point else "prediction of the posterior mean"
    row = [
        Panel("data", _flat_image(data), cmap, low, high, label, home),
        Panel(predicted, _flat_image(prediction), cmap, low, high, label, home),
        Panel(
            "(data − prediction)/σ",
            _flat_image(residual),
            "RdBu_r",
            -4.0,
            4.0,
            "standard deviations",
            home if residual.shape == data.shape else None,
        ),
    ]
    seen = residual[np.isfinite(residual)]
    chi2 = np.asarray(fit.chi2_samples)
    return {
        "name": fit.term.name,
        "chi2_mean": f"{fit.chi2_mean:.3f}",
        "chi2_samples": f"{np.median(chi2):.3f} ({chi2.min():.3f} to {chi2.max():.3f})" if chi2.size else "–",
        "mean": f"{seen.mean():+.3f}" if seen.size else "–",
        "sd": f"{seen.std():.3f}" if seen.size else "–",
        "image": panels(row, columns=3),
        "histogram": histogram(seen, "normalised residuals"),
    }
