"""Figures of the model: mean, standard deviation, samples, truth and error, and a line through the middle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invgen.grid import Grid
from invgen.posterior import Posterior
from invgen.report.figures import Panel, axis_label, marginals, panels, profile

__all__ = ["Draws", "model_figures"]

_MOST_CHANNELS = 4


@dataclass(frozen=True, eq=False)
class Draws:
    """One observation of a posterior as real arrays.

    Attributes:
        samples: `(n, *shape)`, those without weight left out. weights: `(n,)` summing to one.
        mean, std, truth: `shape`; std is None for a point estimate, truth where it is not known.
        grid: of the model, or None. point: a point estimate. equal: all weights are the same.
    """

    samples: np.ndarray
    weights: np.ndarray
    mean: np.ndarray
    std: np.ndarray | None
    truth: np.ndarray | None
    grid: Grid | None
    point: bool
    equal: bool

    @classmethod
    def of(cls, posterior: Posterior, observation: int, truth: Tensor | None) -> Draws:
        """Pick one observation."""
        samples, weights = (v[observation] for v in posterior.flat())
        good = weights > 0
        kept = weights[good]
        spread = posterior.kind != "point" and int(good.sum()) > 1
        grid = posterior.grid if posterior.grid is not None and posterior.grid.field_shape == posterior.shape else None
        return cls(
            _real(samples[good]),
            kept.double().numpy(),
            _real(posterior.mean()[observation]),
            _real(posterior.std()[observation]) if spread else None,
            None if truth is None else _real(truth),
            grid,
            posterior.kind == "point",
            bool(torch.allclose(kept, kept[:1])),
        )

    def coverage(self) -> float:
        """Share of the truth's values between the smallest and the largest sample."""
        assert self.truth is not None
        return float(((self.samples.min(0) <= self.truth) & (self.truth <= self.samples.max(0))).mean())

    def shown(self, n: int) -> np.ndarray:
        """The first n samples, or n drawn by weight where weights differ."""
        if self.equal or len(self.samples) <= n:
            return self.samples[:n]
        pick = np.random.default_rng(0).choice(len(self.samples), n, p=self.weights / self.weights.sum())
        return self.samples[pick]


def _real(values: Tensor) -> np.ndarray:
    v = values.detach().cpu()
    return (v.real if v.is_complex() else v).double().numpy()


def model_figures(draws: Draws) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """`(figures, profiles)` for the page, whatever the shape of the model."""
    shape = draws.mean.shape
    if len(shape) <= 1:
        return [_vector(draws)], []
    figures, profiles = [], []
    for channel in range(min(shape[0], _MOST_CHANNELS)):
        heading = _channel_name(draws.grid, channel) if shape[0] > 1 else ""
        if len(shape) > 2:
            figures += [{**f, "heading": heading if i == 0 else ""} for i, f in enumerate(_images(draws, channel))]
        profiles.append(_line(draws, channel))
    return figures, profiles


def _channel_name(grid: Grid | None, channel: int) -> str:
    return grid.channels[channel].replace("_", " ") if grid is not None else f"channel {channel}"


def _channel_label(grid: Grid | None, channel: int) -> str:
    if grid is None:
        return "value"
    unit = grid.channel_units[channel]
    return _channel_name(grid, channel) + (f" [{unit}]" if unit else "")


def _vector(draws: Draws) -> dict[str, Any]:
    dim = draws.mean.size
    samples = None if draws.point else draws.samples.reshape(-1, dim)
    truth = None if draws.truth is None else draws.truth.reshape(-1)
    names = draws.grid.channels if draws.grid is not None and len(draws.grid.channels) == dim else ()
    shown = min(dim, 12)
    return {
        "heading": "",
        "alt": "Marginals of the model's components",
        "image": marginals(samples, None if draws.point else draws.weights, draws.mean.reshape(-1), truth, names=names),
        "caption": ("The estimate" if draws.point else "Marginal posterior")
        + (f" of the first {shown} of {dim} components." if dim > shown else " of every component."),
    }


def _slice(values: np.ndarray, channel: int) -> np.ndarray:
    """One channel as an image; volumes show the middle slice along their second axis (z, y, x: y in the middle)."""
    out = values[channel]
    while out.ndim > 2:
        out = out.take(out.shape[-2] // 2, axis=-2)
    return out


def _slice_grid(grid: Grid | None) -> Grid | None:
    if grid is None or len(grid.shape) == 2:
        return grid
    keep = (0, len(grid.shape) - 1)
    pick = {k: tuple(getattr(grid, k)[i] for i in keep) for k in ("shape", "spacing", "origin", "axes", "units")}
    return Grid(**pick, channels=grid.channels, channel_units=grid.channel_units)


def _images(draws: Draws, channel: int) -> list[dict[str, Any]]:
    grid, label = _slice_grid(draws.grid), _channel_label(draws.grid, channel)
    mean = _slice(draws.mean, channel)
    truth = None if draws.truth is None else _slice(draws.truth, channel)
    some = [_slice(s, channel) for s in draws.shown(4)]
    pool = np.concatenate([v.ravel() for v in (mean, *some, *([truth] if truth is not None else []))])
    low, high = (float(v) for v in np.percentile(pool, (0.2, 99.8)))
    if high <= low:
        low, high = low - 0.5, high + 0.5

    def value(title: str, field: np.ndarray) -> Panel:
        return Panel(title, field, "viridis", low, high, label, grid)

    top = ([value("truth", truth)] if truth is not None else []) + [
        value("estimate" if draws.point else "posterior mean", mean)
    ]
    std = None if draws.std is None else _slice(draws.std, channel)
    if std is not None:
        top.append(
            Panel(
                "posterior standard deviation", std, "magma", 0.0, float(np.percentile(std, 99.5)) or 1.0, label, grid
            )
        )
    if truth is not None:
        error = mean - truth
        reach = float(np.percentile(np.abs(error), 99.5)) or 1.0
        top.append(
            Panel("estimate − truth" if draws.point else "mean − truth", error, "RdBu_r", -reach, reach, label, grid)
        )
    volume = " (middle slice)" if len(draws.mean.shape) > 3 else ""
    out = [
        {
            "alt": "Mean and standard deviation",
            "image": panels(top, columns=2 if len(top) == 4 else 3),
            "caption": f"{label}{volume}."
            + (
                " Truth and estimate share one colour scale."
                if draws.point and truth is not None
                else ""
                if draws.point
                else f" Mean, samples{' and truth' if truth is not None else ''} share one colour scale."
            )
            + (
                " Where the standard deviation is large, the data and the prior leave the model open."
                if std is not None
                else ""
            ),
        }
    ]
    if not draws.point and len(some) > 1:
        numbered = [value(f"sample {k + 1}", s) for k, s in enumerate(some)]
        out.append(
            {
                "alt": "Posterior samples",
                "image": panels(numbered, columns=4, bars="shared"),
                "caption": f"{len(some)} of {len(draws.samples)} samples: each is a model that the data and the prior allow. What differs between them is not known.",
            }
        )
    return out


def _line(draws: Draws, channel: int) -> dict[str, Any]:
    """A vertical line through the middle of an image or volume, or the whole of a 1-D field."""
    grid, label = draws.grid, _channel_label(draws.grid, channel)
    spatial = draws.mean.shape[1:]
    middle = tuple(n // 2 for n in spatial[1:])
    pick = (channel, slice(None), *middle)
    mean = draws.mean[pick]
    samples = None if draws.point else draws.samples[(slice(None), *pick)]
    truth = None if draws.truth is None else draws.truth[pick]
    position = grid.coordinates(0) if grid is not None else np.arange(spatial[0])
    where = ""
    if middle:
        names = [
            f"{grid.axes[i + 1]} = {grid.coordinates(i + 1)[m]:g} {grid.units[i + 1]}".strip()
            if grid is not None
            else f"column {m}"
            for i, m in enumerate(middle)
        ]
        where = f" at {', '.join(names)}"
    vertical = bool(middle) or (grid is not None and grid.axes[0] in ("z", "t", "depth", "time"))
    rows: list[tuple[str, str]] = []
    if truth is not None:
        rows.append(
            (
                "rms error of the " + ("estimate" if draws.point else "mean"),
                f"{np.sqrt(np.mean((mean - truth) ** 2)):.4g}",
            )
        )
        if truth.std() > 0 and mean.std() > 0:
            rows.append(("correlation with the truth", f"{np.corrcoef(mean, truth)[0, 1]:.3f}"))
    caption = (
        "The line through the middle of the model, as a well would see it." if middle else "The model along its axis."
    )
    if samples is not None and len(samples) > 2:
        n = len(samples)
        expected = (n - 1) / (n + 1)
        caption += (
            f" The band runs from the smallest to the largest of {n} samples; for a calibrated posterior it holds the truth at {100 * expected:.0f} % of the depths on average."
            if middle
            else f" The band of {n} samples holds the truth at {100 * expected:.0f} % of the points on average if calibrated."
        )
        rows.append(("mean width of the band", f"{np.mean(samples.max(0) - samples.min(0)):.4g}"))
        if truth is not None:
            inside = np.mean((samples.min(0) <= truth) & (truth <= samples.max(0)))
            rows.append(("truth inside the band, this line", f"{100 * inside:.0f} %"))
            rows.append(("truth inside the band, everywhere", f"{100 * draws.coverage():.0f} %"))
    name = _channel_name(grid, channel)
    return {
        "heading": f"Profile of {name}{where}",
        "alt": f"Profile of {name}",
        "image": profile(
            position,
            samples,
            mean,
            truth,
            axis=axis_label(grid, 0, max(len(spatial), 1)),
            label=label,
            title=f"{name}{where}",
            vertical=vertical,
        ),
        "caption": caption,
        "table": rows,
    }
