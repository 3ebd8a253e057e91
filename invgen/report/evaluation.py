"""One self-contained HTML page about how good a prior is: its draws beside held-out examples, distances over floors."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from invgen.report.figures import Panel, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from invgen.diagnostics.generative import FieldComparison, Memorisation

__all__ = ["write_evaluation"]


def write_evaluation(
    path: str | Path,
    title: str,
    comparison: FieldComparison,
    samples: np.ndarray,
    held_out: np.ndarray,
    *,
    memory: Memorisation | None = None,
    training: np.ndarray | None = None,
    facts: dict[str, str] | None = None,
) -> Path:
    """Write the page; nothing outside the file is needed to read it.

    Args:
        path: ends in .html. title: of the page. comparison: the distances.
        samples, held_out: `(n, ny, nx)`; the first six of each are shown.
        memory: nearest training neighbours, with `training` `(n, ny, nx)` to show them. facts: name -> text.

    Raises:
        ValueError: another ending. OSError: the folder cannot be written to.
    """
    import jinja2

    path = Path(path)
    if path.suffix not in (".html", ".htm"):
        raise ValueError(f"The evaluation is an HTML page, got the name {path.name!r}; end it in .html.")
    low, high = float(np.quantile(held_out, 0.001)), float(np.quantile(held_out, 0.999))

    def row(name: str, images: np.ndarray) -> list[Panel]:
        return [Panel(f"{name} {k + 1}", image, "viridis", low, high) for k, image in enumerate(images)]

    shown = min(6, len(samples), len(held_out))
    rows = [row("held out", held_out[:shown]), row("draw", samples[:shown])]
    closest = []
    if memory is not None and training is not None:
        order = np.argsort(memory.samples)[:shown]
        closest = [row("draw", samples[order]), row("nearest", training[memory.nearest[order]])]
    folder = Path(__file__).parent
    style = (folder / "page.html.jinja").read_text(encoding="utf-8").split("<style>")[1].split("</style>")[0]
    ratios = comparison.ratios
    page = (
        jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
        .from_string((folder / "evaluation.html.jinja").read_text(encoding="utf-8"))
        .render(
            style=style,
            title=title,
            n=comparison.n,
            facts=list((facts or {}).items()),
            table=[
                (k, f"{v:.4g}", f"{comparison.floors[k]:.4g} ± {comparison.floor_sd[k]:.2g}", f"{ratios[k]:.2f}")
                for k, v in comparison.distances.items()
            ],
            curves=_png(comparison.plot()),
            pictures=[panels(r) for r in rows],
            memory=memory and (f"{memory.ratio:.3f}", f"{100 * memory.closer:.1f} %"),
            closest=[panels(r) for r in closest],
        )
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise OSError(
            f"Cannot write the page to {path}: {error.strerror or error}; choose a folder that can be written to."
        ) from error
    return path


def _png(figure: Figure) -> str:
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def facts_about(prior: Any) -> dict[str, str]:
    """Class, weights, shape and what the card says of training."""
    out = {"prior": type(prior).__name__, "shape": " × ".join(map(str, prior.shape))}
    if hasattr(prior, "parameters"):
        out["weights"] = f"{sum(p.numel() for p in prior.parameters()):,}"
    card = getattr(prior, "seen", None) or {}
    for name in ("data", "steps", "training_seconds"):
        if name in card:
            out[name.replace("_", " ")] = str(card[name])
    return out
