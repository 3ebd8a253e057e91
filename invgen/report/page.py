"""One self-contained HTML page about a posterior: what was solved, the answer, the data fit, the cost, how to repeat it."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invgen.posterior import Posterior
from invgen.problem import InverseProblem
from invgen.report.fit import TermFit, data_fit
from invgen.report.model import Draws, model_figures
from invgen.report.terms import describe_noise, describe_operator, fit_figures, shape_text

__all__ = ["write_report"]


def write_report(
    posterior: Posterior,
    path: str | Path,
    *,
    truth: Tensor | None = None,
    title: str | None = None,
    observation: int = 0,
    problem: InverseProblem | None = None,
) -> Path:
    """Write one HTML page, figures included; nothing outside the file is needed to read it.

    Args:
        posterior: what a solver returned.
        path: the file to write, e.g. `demo/report.html`.
        truth: `shape` or `(1, *shape)`, the model the data came from, where it is known.
        title: headline of the page.
        observation: which of several observations to show.
        problem: what was solved, for posteriors read from a file; data fits need it.

    Returns:
        The path.

    Raises:
        ValueError: a truth of another shape, an observation that does not exist.
        OSError: the folder cannot be written to.

    Cost: one forward item for the mean and one for each of at most 64 samples; about a second of drawing a figure.
    """
    import jinja2

    path = Path(path)
    if path.suffix not in (".html", ".htm"):
        raise ValueError(f"The report is an HTML page, got the name {path.name!r}; end it in .html.")
    if not 0 <= observation < posterior.n_obs:
        raise ValueError(
            f"The posterior holds {posterior.n_obs} observation(s), so observation {observation} does not exist; give 0 to {posterior.n_obs - 1}."
        )
    if truth is not None:
        truth = torch.as_tensor(truth)
        if tuple(truth.shape) == (1, *posterior.shape):
            truth = truth[0]
        if tuple(truth.shape) != posterior.shape:
            raise ValueError(
                f"The truth has the shape {tuple(truth.shape)} but the models {posterior.shape}; give one model."
            )
    problem = problem if problem is not None else posterior.problem
    point = posterior.kind == "point"
    draws = Draws.of(posterior, observation, truth)
    fits = data_fit(posterior, problem, observation) if problem is not None else []
    fields, profiles = model_figures(draws)
    solver = str(posterior.settings.get("solver", "unknown"))
    context: dict[str, Any] = {
        "title": title or f"Posterior of {solver}",
        "lead": _lead(posterior, observation),
        "warnings": _warnings(posterior, fits, observation),
        "headline": _headline(posterior, draws, fits),
        "model": _model(posterior),
        "prior": _prior(problem, solver),
        "terms": [
            {
                "name": f.term.name,
                "operator": describe_operator(f.term.operator),
                "shape": shape_text(f.term.operator.data_shape),
                "measured": f"{int(f.term.mask.sum()) if f.term.mask is not None else f.data.numel():,}",
                "noise": describe_noise(f.term.noise, f.data),
            }
            for f in fits
        ],
        "solver": solver,
        "solver_doc": _solver_doc(solver),
        "point": point,
        "fields": fields,
        "profiles": profiles,
        "fits": [fit_figures(f, posterior.grid, point) for f in fits],
        "cost": _cost(posterior),
        "code": _code(posterior, solver),
        "settings": [(k, v) for k, v in _settings(posterior)],
    }
    template = (Path(__file__).parent / "page.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(template).render(**context)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise OSError(
            f"Cannot write the report to {path}: {error.strerror or error}; choose a folder that can be written to."
        ) from error
    return path


def _lead(posterior: Posterior, observation: int) -> str:
    obs, chain, draw = posterior.samples.shape[:3]
    what = {
        "exact": "an exact posterior: its samples target p(x | d) itself",
        "approximate": "an approximate posterior",
        "point": "a point estimate, which says nothing about uncertainty",
    }.get(posterior.kind, posterior.kind)
    many = f"{chain} chains of {draw} draws" if chain > 1 else f"{draw} sample{'s' if draw != 1 else ''}"
    which = f" Observation {observation} of {obs}." if obs > 1 else ""
    return f"{what[0].upper()}{what[1:]}; {many} of {shape_text(posterior.shape)} values in {_seconds(posterior.seconds)}.{which}"


def _warnings(posterior: Posterior, fits: list[TermFit], observation: int) -> list[str]:
    out = []
    if posterior.kind == "approximate":
        out.append(
            "Approximate: this solver does not converge to the exact posterior. Read the widths as its estimate of the uncertainty, and check calibration on simulated data before relying on them."
        )
    bad = posterior.stats.get("first_bad_step")
    if bad is not None and bool((bad[observation] >= 0).any()):
        n = int((bad[observation] >= 0).sum())
        out.append(
            f"{n} of {bad[observation].numel()} samples became NaN or infinite and are left out of everything below."
        )
    for name, value in posterior.stats.items():
        if "unconverged" in name and float(value[observation].double().sum()) > 0:
            touched = int((value[observation] > 0).sum())
            out.append(
                f"Linear solves did not reach their tolerance in {touched} of {value[observation].numel()} samples ({name}: {float(value[observation].double().sum()):g} in all); allow more iterations."
            )
        if name == "converged" and not bool(value[observation].bool().all()):
            out.append(
                f"{int((~value[observation].bool()).sum())} of {value[observation].numel()} samples did not converge."
            )
    if posterior.settings.get("interrupted"):
        out.append("The run was interrupted; this is the part that had finished.")
    if posterior.weights is not None:
        w = posterior.weights[observation].flatten().double()
        ess = float(w.sum() ** 2 / w.square().sum().clamp_min(1e-300))
        if ess < 0.1 * len(w):
            out.append(f"The weights are uneven: the effective number of samples is {ess:.1f} of {len(w)}.")
    for f in fits:
        level = float(np.median(f.chi2_samples)) if posterior.kind != "point" else f.chi2_mean
        n = max(int(torch.isfinite(f.residual.abs()).sum()), 1)
        if not math.isfinite(level) or level > 1.2 + 5 * math.sqrt(2 / n):
            out.append(
                f"The data set “{f.term.name}” is not explained to within its noise (χ² per datum {level:.2f}): the noise is understated, the physics incomplete, the prior too narrow, or the solver has not converged."
            )
    return out


def _headline(posterior: Posterior, draws: Draws, fits: list[TermFit]) -> list[tuple[str, str]]:
    out = []
    if posterior.kind != "point":
        out.append(("samples", f"{len(draws.samples):,}"))
    out.append(("time", _seconds(posterior.seconds)))
    for f in fits:
        out.append(
            (
                f"χ² per datum, {f.term.name}",
                f"{np.median(f.chi2_samples) if posterior.kind != 'point' else f.chi2_mean:.2f}",
            )
        )
    if draws.truth is not None:
        error = draws.mean - draws.truth
        out.append(
            (
                "rms error of the mean" if posterior.kind != "point" else "rms error",
                f"{float(np.sqrt(np.mean(np.abs(error) ** 2))):.4g}",
            )
        )
        if posterior.kind != "point" and len(draws.samples) > 2:
            out.append(("truth inside the min–max band", f"{100 * draws.coverage():.0f} %"))
    return out


def _model(posterior: Posterior) -> str:
    grid = posterior.grid
    text = f"shape {shape_text(posterior.shape)}"
    if grid is None:
        return text + (" (channels × grid)" if len(posterior.shape) > 1 else "")
    names = ", ".join(f"{c} [{u}]" if u else c for c, u in zip(grid.channels, grid.channel_units, strict=True))
    axes = ", ".join(
        f"{a}: {n} samples of {d:g} {u}".rstrip()
        for a, n, d, u in zip(grid.axes, grid.shape, grid.spacing, grid.units, strict=True)
    )
    return f"{names}; {axes}"


def _prior(problem: InverseProblem | None, solver: str) -> str:
    import invgen.solvers as room

    if problem is None:
        return ""
    prior = problem.prior
    text = type(prior).__name__
    if solver in room._exports and not getattr(room, solver).needs:
        return f"{text}, of which {solver} takes nothing but the shape; its own penalty stands in p(x)'s place"
    card = getattr(prior, "seen", None)
    if isinstance(card, dict) and card.get("data"):
        text += f", trained on {card['data']}"
    return text


def _solver_doc(name: str) -> str:
    """First paragraph of the solver's docstring, which says what it targets."""
    import invgen.solvers as room

    if name not in room._exports:
        return ""
    doc = inspect.getdoc(getattr(room, name)) or ""
    return " ".join(doc.split("\n\n")[0].split())


def _cost(posterior: Posterior) -> list[tuple[str, str, str]]:
    n = max(math.prod(posterior.samples.shape[:3]), 1)
    names = {"network": "network items", "forward": "forward items g(x)", "adjoint": "adjoint items gᴴ(d)"}
    rows = [(names.get(k, k), f"{v:,}", f"{v / n:,.1f}") for k, v in posterior.counts.items()]
    each = posterior.seconds / n
    return [("wall-clock time", _seconds(posterior.seconds), _seconds(each)), *rows]


def _seconds(value: float) -> str:
    if not math.isfinite(value):
        return "not recorded"
    if value >= 120:
        return f"{value / 60:.1f} min"
    return f"{value:.1f} s" if value >= 10 else f"{value:.2g} s"


_RUN = ("solver", "num_samples", "chunk", "device", "dtype", "threads", "interrupted")


def _code(posterior: Posterior, solver: str) -> str:
    arguments = []
    for name, value in posterior.settings.items():
        if name in _RUN:
            continue
        plain = not isinstance(value, str) or "(" not in value  # settings that are objects were kept as their repr
        arguments.append(f"    {name}={value!r}," if plain else f"    {name}={value},")
    constructor = (
        f"solver = invgen.{solver}(\n" + "\n".join(arguments) + "\n)" if arguments else f"solver = invgen.{solver}()"
    )
    dtype = posterior.settings.get("dtype", "float32")
    options = "" if dtype == "float32" else f", dtype=torch.{dtype}"
    return "\n".join(
        [
            "import invgen" + ("\nimport torch" if options else ""),
            "",
            "problem = ...  # invgen.InverseProblem: the data, physics, noise and prior stated above",
            constructor,
            f"posterior = solver.solve(problem, {posterior.settings.get('num_samples', 1)}, seed={posterior.seed}{options})",
            'posterior.save("posterior.nc")',
            'posterior.report("report.html")',
        ]
    )


def _settings(posterior: Posterior) -> list[tuple[str, str]]:
    rows = [("seed", str(posterior.seed))]
    rows += [(k.replace("_", " "), str(v)) for k, v in posterior.settings.items() if k in _RUN and k != "solver"]
    rows.append(("versions", ", ".join(f"{k} {v}" for k, v in posterior.versions.items())))
    return rows
