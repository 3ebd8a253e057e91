"""One self-contained HTML page about a training run: curves, and draws of the prior beside what it learned from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invgen.report.figures import BAND, INK, MEAN, TRUTH, Panel, encode, new_figure, panels, styled

__all__ = ["write_training_report"]

_COLOURS = (MEAN, TRUTH, "#2e7d4f", "#8a5a00", INK)


def write_training_report(path: str | Path, prior: Any, report: Any, examples: Tensor, training: Any) -> Path:
    """Write one HTML page about a run of `Training.fit`; nothing outside the file is needed to read it.

    Args:
        path: the file to write, ends in .html.
        prior: trained; draws are shown if it has `sample`.
        report: the `TrainingReport`. training: the `Training` that made it.
        examples: `(n, *shape)` training examples; as many draws are shown beside them.

    Returns:
        The path.

    Raises:
        ValueError: another ending. OSError: the folder cannot be written to.

    Cost: n draws of the prior and about two seconds of drawing figures.
    """
    import jinja2

    path = Path(path)
    if path.suffix not in (".html", ".htm"):
        raise ValueError(f"The training report is an HTML page, got the name {path.name!r}; end it in .html.")
    draws = None
    if hasattr(prior, "sample"):
        with torch.no_grad():
            draws = prior.sample(len(examples), seed=training.seed).cpu().float()
    folder = Path(__file__).parent
    style = (folder / "page.html.jinja").read_text(encoding="utf-8").split("<style>")[1].split("</style>")[0]
    page = (
        jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
        .from_string((folder / "training.html.jinja").read_text(encoding="utf-8"))
        .render(
            style=style,
            title=f"Training of {type(prior).__name__}",
            lead=_lead(prior, report),
            headline=_headline(prior, report),
            curves=curves(report.history) if report.history else None,
            pictures=_pictures(prior, examples.cpu().float(), draws),
            validation=[(name, f"{value:.5g}") for name, value in report.validation.items()],
            settings=[(f.name, str(getattr(training, f.name))) for f in dataclasses.fields(training)],
        )
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise OSError(
            f"Cannot write the report to {path}: {error.strerror or error}; choose a folder that can be written to."
        ) from error
    return path


def _lead(prior: Any, report: Any) -> str:
    end = "interrupted by hand" if report.interrupted else "run to its end"
    if report.stopped_early:
        end = f"stopped early; the weights are those of step {report.best_step:,}"
    return f"{report.steps:,} steps, {end}. An example has the shape {' × '.join(map(str, prior.shape))}."


def _headline(prior: Any, report: Any) -> list[tuple[str, str]]:
    seconds = report.seconds
    time = (
        f"{seconds / 3600:.1f} h"
        if seconds > 5400
        else f"{seconds / 60:.1f} min"
        if seconds > 90
        else f"{seconds:.1f} s"
    )
    out = [("steps", f"{report.steps:,}"), ("time", time)]
    out.append(("weights", f"{sum(p.numel() for p in prior.parameters()):,}"))
    if report.losses:
        out.append(("last loss", f"{report.losses[-1][1]:.4g}"))
    held = [row["validation_loss"] for row in report.history if "validation_loss" in row]
    if held:
        out.append(("lowest validation loss", f"{min(held):.4g}"))
    return out


@styled
def curves(history: Sequence[Mapping[str, float]]) -> str:
    """Loss, validation, learning rate and gradient norm against the step, as PNG in base64."""
    names = list(dict.fromkeys(name for row in history for name in row if name not in ("step", "seconds")))
    rates = [n for n in names if n.startswith("learning_rate")]
    norms = [n for n in names if n.startswith("gradient_norm")]
    losses = [n for n in names if n == "loss" or n.startswith("loss_")]
    figures = [n for n in names if n not in (*rates, *norms, *losses, "validation_loss")]
    losses += [n for n in names if n == "validation_loss"]
    parts = [("loss", losses), ("learning rate", rates), ("gradient norm, before clipping", norms)]
    parts += [("figures on held-out examples", figures)] if figures else []
    figure = new_figure(11.8, 3.4 * ((len(parts) + 1) // 2))
    grid = figure.subplots((len(parts) + 1) // 2, 2, squeeze=False)
    for k, axes in enumerate(grid.flat):
        if k >= len(parts):
            axes.set_axis_off()
            continue
        title, chosen = parts[k]
        every: list[float] = []
        for i, name in enumerate(chosen):
            points = [(row["step"], row[name]) for row in history if name in row]
            steps, values = zip(*points, strict=True)
            every += values
            held = name == "validation_loss"
            axes.plot(
                steps,
                values,
                color=TRUTH if held else (*_COLOURS[:1], *_COLOURS[2:])[i % 4] if i < 4 else None,
                lw=1.4,
                marker="o" if held or len(points) < 30 else None,
                ms=3,
                label={"loss": "training", "validation_loss": "validation, averaged weights"}.get(name, name),
            )
        if every and min(every) > 0 and max(every) > 5 * min(every):
            axes.set_yscale("log")
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        if len(chosen) > 4:
            axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.01, 0.5))
        elif len(chosen) > 1:
            axes.legend(frameon=False, fontsize=8.5)
    return encode(figure)


def _pictures(prior: Any, examples: Tensor, draws: Tensor | None) -> list[dict[str, Any]]:
    """Figures of examples and draws, and a table of their values."""
    sets = {"training examples": examples.numpy(), **({} if draws is None else {"draws": draws.numpy()})}
    rows = [(name, *(f"{v:.4g}" for v in (x.mean(), x.std(), x.min(), x.max()))) for name, x in sets.items()]
    if len(prior.shape) == 3:
        images = [(k, _fields(prior, sets, k)) for k in range(prior.shape[0])]
        names = prior.grid.channels if prior.grid is not None else ()
        titles = [names[k] if k < len(names) else f"channel {k}" for k, _ in images]
    else:
        images, titles = [(0, _vectors(sets))], [""]
    captions = (
        "Training examples and draws of the prior with the examples' scale of colours."
        if len(prior.shape) == 3
        else "Training examples and draws of the prior."
    )
    return [
        {
            "image": image,
            "heading": title if len(images) > 1 else "",
            "caption": captions,
            "table": rows if i == 0 else [],
        }
        for i, ((_, image), title) in enumerate(zip(images, titles, strict=True))
    ]


def _fields(prior: Any, sets: Mapping[str, np.ndarray], channel: int) -> str:
    """Rows of four examples, then rows of four draws, of one channel."""
    shown = {name: x[:8, channel] for name, x in sets.items()}
    low, high = np.quantile(shown["training examples"], (0.002, 0.998))
    high = high if high > low else low + 1
    grid = prior.grid
    unit = grid.channel_units[channel] if grid is not None and channel < len(grid.channel_units) else ""
    items = [
        Panel(
            f"{'example' if name.startswith('training') else 'draw'} {i + 1}",
            image,
            low=float(low),
            high=float(high),
            label=unit,
            grid=grid,
        )
        for name, x in shown.items()
        for i, image in enumerate(x)
    ]
    return panels(items, columns=4, bars="shared")


@styled
def _vectors(sets: Mapping[str, np.ndarray]) -> str:
    """A scatter plot in the plane; the first marginals of longer vectors and of other fields."""
    flat = {name: x.reshape(len(x), -1) for name, x in sets.items()}
    dim = next(iter(flat.values())).shape[1]
    if dim == 2:
        figure = new_figure(5.2 * len(flat), 4.8)
        grid = figure.subplots(1, len(flat), squeeze=False, sharex=True, sharey=True)
        for axes, (name, x) in zip(grid.flat, flat.items(), strict=True):
            axes.plot(x[:, 0], x[:, 1], ".", ms=3, color=MEAN, alpha=0.6)
            axes.set_title(name)
            axes.set_aspect("equal")
            axes.set_xlabel("x[0]")
        grid[0, 0].set_ylabel("x[1]")
        return encode(figure)
    count = min(dim, 8)
    figure = new_figure(11.8, 2.5 * -(-count // 4) + 0.4)
    grid = figure.subplots(-(-count // 4), min(count, 4), squeeze=False)
    for k, axes in enumerate(grid.flat):
        if k >= count:
            axes.set_axis_off()
            continue
        edges = np.histogram_bin_edges(np.concatenate([x[:, k] for x in flat.values()]), 30).tolist()
        for (name, x), colour in zip(flat.items(), (BAND, TRUTH), strict=False):
            kind: Any = "stepfilled" if colour == BAND else "step"
            axes.hist(x[:, k], bins=edges, density=True, histtype=kind, color=colour, label=name)
        axes.set_title(f"x[{k}]")
        axes.set_yticks([])
    grid[0, 0].legend(frameon=False, fontsize=8.5)
    return encode(figure)
