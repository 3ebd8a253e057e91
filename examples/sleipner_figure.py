"""The picture of `sleipner.py`: section, impedance, uncertainty, residuals and the well."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

UNIT = "AI (m/s·g/cc)"


def draw(path: str, s: Any, results: dict[str, Any], kind: str = "model error") -> None:
    """Eight panels of the runs under one noise model, written to `path`."""
    learned, gaussian = results[f"learned, {kind}"], results[f"Gaussian, {kind}"]
    ai, ai_g = learned["samples"].double().exp().numpy(), gaussian["samples"].double().exp().numpy()
    problem = learned["problem"]
    term, background = problem.terms[0], problem.terms[1].data[0, 0, :, s.column].exp().numpy()
    nt, nx = s.grid.shape
    t, dt = s.grid.coordinates("t"), s.grid.spacing[0]
    extent = (s.first_trace - 0.5, s.first_trace + nx - 0.5, t[-1] + dt / 2, t[0] - dt / 2)
    well = s.first_trace + s.column
    log = np.exp(s.smooth_log)
    low, high = np.percentile(np.concatenate([ai.mean(0).ravel(), log]), (1, 99))
    clip = float(np.percentile(np.abs(s.data), 99))
    fig, axes = plt.subplots(2, 4, figsize=(19, 10), constrained_layout=True)

    def panel(axis: Axes, image: np.ndarray, title: str, label: str, log_column: bool = False, **style: Any) -> None:
        shown = axis.imshow(image, extent=extent, aspect="auto", interpolation="nearest", **style)
        if log_column:
            # the log in a strip a few traces wide, in the section's own colours
            wide = max(1.5, nx / 40)
            axis.imshow(
                log[:, None], extent=(well - wide, well + wide, extent[2], extent[3]), aspect="auto", zorder=2, **style
            )
            for side in (-wide, wide):
                axis.axvline(well + side, color="k", lw=0.6, zorder=3)
        else:
            axis.axvline(well, color="k", lw=0.8, ls="--")
        axis.set(title=title, xlabel="trace (12.5 m)", ylabel="two-way time (s)")
        axis.set_xlim(extent[:2])
        axis.set_ylim(extent[2:])
        fig.colorbar(shown, ax=axis, label=label)

    colours = {"cmap": "viridis", "vmin": low, "vmax": high}
    panel(axes[0, 0], s.data, "seismic (dashed: well 15/9-13)", "amplitude", cmap="gray_r", vmin=-clip, vmax=clip)
    panel(axes[0, 1], ai.mean(0), "learned prior: posterior mean, log inserted", UNIT, True, **colours)
    relative = 100 * ai.std(0, ddof=1) / ai.mean(0)
    panel(axes[0, 2], relative, "learned prior: relative sd", "sd of AI (%)", cmap="magma", vmin=0)
    panel(axes[0, 3], ai[0], "learned prior: one sample", UNIT, True, **colours)
    panel(axes[1, 0], ai_g.mean(0), "Gaussian prior: posterior mean, log inserted", UNIT, True, **colours)
    predicted = term.operator(learned["samples"][:, None].double()).mean(0)[0].numpy()
    sd = float(term.noise.covariance(term.operator.data_shape).diagonal().double().mean().sqrt())
    residual = (s.data - predicted) / sd
    panel(
        axes[1, 1], residual, f"residual of the mean, 1 = {sd:.3f}", "residual / sigma", cmap="RdBu_r", vmin=-3, vmax=3
    )
    track(axes[1, 2], t, log, background, ai[:, :, s.column], ai_g[:, :, s.column])
    spectra(axes[1, 3], s, predicted, residual * sd, sd)
    fig.suptitle(f"Sleipner inline 57, {nt} x {nx} samples, {len(ai)} posterior samples, noise model: {kind}")
    fig.savefig(path, dpi=90)
    plt.close(fig)


def track(axis: Axes, t: np.ndarray, log: np.ndarray, low: np.ndarray, ai: np.ndarray, ai_g: np.ndarray) -> None:
    """Log, background, means and min-max bands at the well."""
    for values, colour, name in ((ai_g, "tab:blue", "Gaussian"), (ai, "tab:red", "learned")):
        axis.fill_betweenx(t, values.min(0), values.max(0), color=colour, alpha=0.2, lw=0, label=f"{name}: min-max")
        axis.plot(values.mean(0), t, color=colour, lw=1.2, label=f"{name}: mean")
    axis.plot(log, t, "k", lw=1.1, label="log, below 80 Hz")
    axis.plot(low, t, "k--", lw=0.9, label="background")
    axis.set(title="trace of the well", xlabel=UNIT, ylabel="two-way time (s)", ylim=(t[-1], t[0]))
    axis.legend(fontsize=7, loc="lower right")
    axis.grid(alpha=0.3)


def spectra(axis: Axes, s: Any, predicted: np.ndarray, residual: np.ndarray, sd: float) -> None:
    """Mean amplitude spectra of data, prediction and residual against the white noise that was assumed."""
    taper = np.hanning(len(s.data))[:, None]
    scale = 2 / taper.sum()
    f = np.fft.rfftfreq(len(s.data), s.grid.spacing[0])
    for values, colour, name in (
        (s.data, "k", "data"),
        (predicted, "tab:red", "predicted"),
        (residual, "tab:orange", "residual"),
    ):
        axis.plot(
            f, scale * np.sqrt((np.abs(np.fft.rfft(values * taper, axis=0)) ** 2).mean(1)), color=colour, label=name
        )
    white = scale * sd * float(torch.from_numpy(taper).square().sum().sqrt())
    axis.axhline(white, color="0.5", ls=":", label=f"assumed white noise, sd {sd:.3f}")
    axis.set(title="spectra", xlabel="frequency (Hz)", ylabel="rms amplitude", xlim=(0, 125), yscale="log")
    axis.set_ylim(white / 100, None)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
