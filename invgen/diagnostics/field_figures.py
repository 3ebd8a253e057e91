"""Pictures of field statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from invgen.diagnostics.figures import BAND, CURVE, FAILED, LAW, _axes, _legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from invgen.diagnostics.fields import LagCurve
    from invgen.diagnostics.generative import FieldComparison

__all__ = ["comparison_figure", "lag_figure"]


def lag_figure(
    curve: LagCurve, ax: Axes | None, *, spacing: float = 1.0, unit: str = "pixels", label: str = "", color: str = CURVE
) -> Axes:
    """Mean over images with two standard errors."""
    ax = _axes(ax)
    h, mean, error = curve.lags * spacing, curve.mean, 2 * curve.error
    ax.fill_between(h, mean - error, mean + error, color=color, alpha=0.25, lw=0)
    ax.plot(h, mean, color=color, label=label or None)
    ax.set_xlabel(f"lag along {curve.axis} ({unit})")
    ax.set_ylabel(curve.name)
    if label:
        _legend(ax)
    return ax


def comparison_figure(result: FieldComparison) -> Figure:
    """Curves of generated and held-out images, and every distance over its floor."""
    import matplotlib.pyplot as plt

    names = list(result.curves)
    columns = -(-(len(names) + 1) // 2)
    figure, axes = plt.subplots(2, columns, figsize=(3.4 * columns, 5.6), layout="constrained")
    for ax, name in zip(axes.flat, names, strict=False):
        made, real = result.curves[name]
        lag_figure(real, ax, label="held out", color=LAW)
        lag_figure(made, ax, label="generated", color=FAILED)
    ax = axes.flat[len(names)]
    ratios = result.ratios
    places = np.arange(len(ratios))[::-1]
    ax.barh(places, list(ratios.values()), color=BAND, edgecolor=CURVE)
    ax.axvline(1, color=LAW, lw=1)
    for y, value in zip(places, ratios.values(), strict=True):
        ax.text(value, y, f" {value:.2f}", va="center", fontsize="small")
    ax.set_yticks(places, list(ratios))
    ax.set_xlim(0, 1.25 * max(*ratios.values(), 1))
    ax.set_xlabel("distance / floor")
    for ax in axes.flat[len(names) + 1 :]:
        ax.axis("off")
    return figure
