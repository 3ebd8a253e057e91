"""What the examples of astronomy draw with: maps of the sky in arcsec, north where the image has it, asinh stretch.

    figure = posterior_page(data, prediction, sd, samples, image_grid, source_grid, lens=lens)
    save(figure, "lens.png")

Images are drawn with row 0 at the bottom, as FITS is. Functions draw on axes they are given; `posterior_page` makes a
figure. A corner plot of lens parameters is `invgen.report.corner_plot`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import AsinhNorm, Normalize
from matplotlib.figure import Figure

from invgen.grid import Grid

__all__ = ["caustics", "critical_curves", "extent", "lines", "page", "posterior_page", "residual", "save", "sky"]

Array = np.ndarray
CRITICAL, CAUSTIC = "#35e0ff", "#39d353"


def page(rows: int, columns: int, *, width: float = 3.9, height: float = 3.5, title: str = "") -> tuple[Figure, Any]:
    """A figure of panels, `width` by `height` inches each, and its axes `(rows, columns)`."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    if title:
        figure.suptitle(title, fontsize=13)
    return figure, axes


def save(figure: Figure, path: str | Path, dpi: int = 90) -> None:
    """Write the picture; its folder is created."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi, facecolor="white")


def extent(grid: Grid) -> tuple[float, float, float, float]:
    """Left, right, bottom, top with pixel edges, for `imshow(origin="lower")`."""
    left, right, high, low = grid.extent
    return left, right, low, high


def sky(
    axes: Axes,
    values: Any,
    grid: Grid,
    *,
    title: str = "",
    label: str = "",
    soft: float | None = None,
    limits: tuple[float, float] | None = None,
    cmap: str = "inferno",
    bar: bool = True,
) -> Any:
    """A map in arcsec with its colour bar.

    Args:
        values: `(ny, nx)`, NaN where nothing was measured (grey). label: quantity and unit, on the colour bar.
        soft: asinh stretch, linear below this value and logarithmic above: a few noise sds; linear throughout if None.
        limits: of the colours; from the 0.5 to the 99.9 percentile when omitted.
    """
    v = np.asarray(values, dtype=float).reshape(grid.shape)
    low, high = limits if limits is not None else np.nanpercentile(v, (0.5, 99.9))
    high = high if high > low else low + 1e-12
    norm = Normalize(low, high) if soft is None else AsinhNorm(soft, vmin=low, vmax=high)
    image = axes.imshow(v, origin="lower", extent=extent(grid), cmap=cmap, norm=norm, interpolation="nearest")
    axes.set_facecolor("0.7")
    axes.set(xlabel="x (arcsec)", ylabel="y (arcsec)")
    axes.set_title(title, fontsize=10.5)
    if bar and axes.figure is not None:
        colours = axes.figure.colorbar(image, ax=axes, label=label, fraction=0.046, pad=0.02)
        if soft is not None:  # decades would crowd around zero
            ticks = _round_ticks(low, high, soft)
            colours.set_ticks(ticks, labels=[f"{t:g}" for t in ticks])
            colours.ax.minorticks_off()
    return image


def _round_ticks(low: float, high: float, soft: float) -> list[float]:
    """About five values evenly spaced in the stretch, with one digit each."""
    at = soft * np.sinh(np.linspace(np.arcsinh(low / soft), np.arcsinh(high / soft), 6)[1:])
    digit = 10.0 ** np.floor(np.log10(np.maximum(np.abs(at), 1e-300)))
    rounded = {float(f"{v:.3g}") for v in np.floor(np.abs(at) / digit) * digit * np.sign(at)}
    reach = np.arcsinh(high / soft) - np.arcsinh(low / soft)
    apart = [t for t in rounded if low <= t <= high and abs(np.arcsinh(t / soft)) > 0.1 * reach]
    return sorted([0.0, *apart]) if low <= 0 <= high else sorted(apart)


def residual(
    axes: Axes, data: Any, model: Any, sd: Any, grid: Grid, *, mask: Any = None, reach: float = 4.0, title: str = ""
) -> Any:
    """(data − model)/sd between ±reach, grey where masked; χ² per pixel in the title (white noise only)."""
    z = (np.asarray(data, dtype=float) - np.asarray(model, dtype=float)) / np.asarray(sd, dtype=float)
    z = z.reshape(grid.shape)
    if mask is not None:
        z = np.where(np.asarray(mask, dtype=bool).reshape(grid.shape), z, np.nan)
    title = title or f"residual / sd, mean square {np.nanmean(z**2):.2f}"
    return sky(axes, z, grid, title=title, label="(data − model) / sd", limits=(-reach, reach), cmap="RdBu_r")


def critical_curves(lens: Any, grid: Grid, *, fine: int = 401) -> list[Array]:
    """Where det ∂β/∂θ = 0, each curve `(n, 2)` (y, x) in arcsec, on `fine` positions an axis over the grid."""
    from contourpy import contour_generator

    left, right, low, high = extent(grid)
    # an odd number would put a ray through a singular centre in the middle
    n = fine + fine % 2
    y, x = np.linspace(low, high, n), np.linspace(left, right, n)
    place = [v.contiguous() for v in torch.meshgrid(torch.from_numpy(y), torch.from_numpy(x), indexing="ij")]
    J = lens.jacobian(*place)
    det = (J[..., 0, 0] * J[..., 1, 1] - J[..., 0, 1] * J[..., 1, 0]).detach().numpy()
    curves = contour_generator(x, y, np.clip(det, -10, 10)).lines(0.0)
    # det has a pole at the centre of singular lenses, around which the contour is a few cells long
    cell = max(x[1] - x[0], y[1] - y[0])
    return [c[:, ::-1] for c in curves if np.ptp(c, axis=0).max() > 6 * cell]


def caustics(lens: Any, critical: list[Array]) -> list[Array]:
    """The critical curves on the source plane, `(n, 2)` (y, x) each."""
    out = []
    for curve in critical:
        rays = lens.rays(*(torch.from_numpy(np.ascontiguousarray(curve[:, k])) for k in range(2)))
        out.append(np.stack([r.detach().numpy() for r in rays], axis=1))
    return out


def lines(axes: Axes, curves: list[Array], colour: str, label: str) -> None:
    """Curves `(n, 2)` (y, x) over a map, whose frame stays what it is."""
    frame = axes.get_xlim(), axes.get_ylim()
    for k, curve in enumerate(curves):
        axes.plot(curve[:, 1], curve[:, 0], color=colour, lw=1.1, label=label if k == 0 else None)
    axes.set(xlim=frame[0], ylim=frame[1])
    if curves:
        axes.legend(loc="upper right", fontsize=8, framealpha=0.6)


def posterior_page(
    data: Any,
    model: Any,
    sd: Any,
    samples: Any,
    image_grid: Grid,
    source_grid: Grid,
    *,
    lens: Any = None,
    truth: Any = None,
    mask: Any = None,
    units: tuple[str, str] = ("", ""),
    names: tuple[str, str] = ("data", "source"),
    title: str = "",
) -> Figure:
    """Data | model | normalised residual | a sample, then samples, mean and sd of the unknown (and the truth).

    Args:
        data, model, sd: `(ny, nx)` each; the model is the prediction of the posterior mean, or the mean prediction.
        samples: `(n, h, w)`. lens: for critical curves over the model and caustics over the mean.
        truth: `(h, w)`, instead of one of the samples. mask: boolean, True where measured.
        units: of data and unknown. names: what they are called.
    """
    d, draws = np.asarray(data, dtype=float), np.asarray(samples, dtype=float)
    noise = np.broadcast_to(np.asarray(sd, dtype=float), d.shape)
    shown = d if mask is None else np.where(np.asarray(mask, dtype=bool), d, np.nan)
    figure, axes = page(2, 4, title=title)
    soft = 3 * float(np.nanmedian(noise))
    limits = (-soft, float(np.nanmax(shown)))
    sky(axes[0, 0], shown, image_grid, title=names[0], label=units[0], soft=soft, limits=limits)
    sky(axes[0, 1], model, image_grid, title="model of the mean", label=units[0], soft=soft, limits=limits)
    residual(axes[0, 2], d, model, noise, image_grid, mask=mask)
    mean, spread = draws.mean(0), draws.std(0)
    level = max(3 * float(np.median(spread)), 1e-12)
    style: dict[str, Any] = {"label": units[1], "soft": level, "limits": (-level, float(mean.max()))}
    first = (truth, f"{names[1]}: truth") if truth is not None else (draws[0], f"{names[1]}: sample")
    sky(axes[0, 3], first[0], source_grid, title=first[1], **style)
    for k in range(2):
        sky(axes[1, k], draws[-1 - k], source_grid, title=f"{names[1]}: sample", **style)
    sky(axes[1, 2], mean, source_grid, title=f"{names[1]}: mean of {len(draws)}", **style)
    sky(axes[1, 3], spread, source_grid, title=f"{names[1]}: sd", label=units[1], cmap="viridis")
    if lens is not None:
        critical = critical_curves(lens, image_grid)
        lines(axes[0, 1], critical, CRITICAL, "critical curves")
        lines(axes[1, 2], caustics(lens, critical), CAUSTIC, "caustics")
    return figure
