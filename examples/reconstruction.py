"""What the imaging examples share: a posterior under a learned prior beside total variation and a Gaussian field.

Three answers to the same data, from the same operator and the same noise:

- `learned`: draws of the posterior under a shipped diffusion prior (`PnPDM`), their mean and bands.
- `total_variation`: the MAP under w·TV, with the weight that does best on another image of the same kind: an oracle for
  that kind of image, which gives the baseline all it can have.
- `gaussian_field`: the exact posterior mean under a stationary Gaussian field fitted to generated images, the best
  linear estimate there is.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invgen.contracts import LinearOperator
from invgen.noise import GaussianNoise
from invgen.priors import TV, GaussianPrior
from invgen.problem import InverseProblem
from invgen.solvers import ExactGaussian, PnPDM, PrimalDual

__all__ = ["Answer", "draw", "figures", "gaussian_field", "learned", "measure", "psnr", "total_variation"]


@dataclass
class Answer:
    """An estimate `(1, n_y, n_x)`, draws `(n, 1, n_y, n_x)` where there are some, and wall-clock seconds."""

    mean: Tensor
    draws: Tensor | None
    seconds: float


def measure(operator: LinearOperator, truth: Tensor, share: float, seed: int = 0) -> tuple[Tensor, float]:
    """Data of `(n, *model_shape)` with noise of this share of their root mean square, and its standard deviation.

    Complex noise has the standard deviation per complex number, half of the variance in either part.
    """
    clean = operator(truth)
    sigma = share * float(clean.abs().square().mean().sqrt())
    g = torch.Generator().manual_seed(seed)
    return clean + sigma * torch.randn(clean.shape, generator=g, dtype=clean.dtype), sigma


def psnr(truth: Tensor, estimate: Tensor) -> float:
    """10 log10 of the squared range of the truth over the mean squared error, in dB."""
    peak = float(truth.max() - truth.min())
    return 10 * float(torch.log10(peak**2 / (truth - estimate).square().mean()))


def learned(
    data: Tensor,
    operator: LinearOperator,
    sigma: float,
    prior: Any,
    samples: int,
    *,
    sweeps: int,
    rho_min: float,
    inner: int = 4,
) -> Answer:
    """Posterior draws under a prior with a denoiser; `sweeps`, `rho_min` and `inner` are those of `PnPDM`."""
    began = time.perf_counter()
    problem = InverseProblem(data, operator, GaussianNoise(sigma), prior)
    solver = PnPDM(iterations=sweeps, rho_min=rho_min, inner=inner)
    draws = solver.solve(problem, samples, seed=0).samples[0, 0]
    return Answer(draws.mean(0), draws, time.perf_counter() - began)


def total_variation(
    data: Tensor,
    operator: LinearOperator,
    sigma: float,
    other: tuple[Tensor, Tensor],
    weights: Sequence[float],
    iterations: int = 1000,
) -> tuple[Answer, float]:
    """The MAP under total variation, and the weight w (in 1/unit of x) that was best for another image and its data."""

    def restore(d: Tensor, weight: float) -> Tensor:
        prior = TV(operator.model_shape, weight=weight, grid=operator.model_grid)
        problem = InverseProblem(d, operator, GaussianNoise(sigma), prior)
        return PrimalDual(iterations=iterations).solve(problem).samples[0, 0, 0]

    truth, their_data = other
    best = max(weights, key=lambda w: psnr(truth, restore(their_data, w)))
    began = time.perf_counter()
    return Answer(restore(data, best), None, time.perf_counter() - began), best


def gaussian_field(data: Tensor, operator: LinearOperator, sigma: float, examples: Tensor, samples: int) -> Answer:
    """Exact mean and draws under a stationary field with the mean and the spectrum of examples `(n, 1, n_y, n_x)`."""
    began = time.perf_counter()
    prior = GaussianPrior.fit(examples, structure="stationary", mean="constant", grid=operator.model_grid)
    problem = InverseProblem(data, operator, GaussianNoise(sigma), prior)
    solver = ExactGaussian(method="cg", rtol=1e-3)
    draws = solver.solve(problem, samples, seed=0).samples[0, 0]
    return Answer(solver.mean(problem)[0].to(draws), draws, time.perf_counter() - began)


def figures(operator: LinearOperator, truth: Tensor, data: Tensor, sigma: float, answer: Answer) -> dict[str, float]:
    """PSNR, χ² per datum of the mean (and of draws), and for draws the bands: error over sd, coverage of the min–max band."""
    inside = data[0] - operator(answer.mean[None])[0]
    out = {
        "psnr": psnr(truth, answer.mean),
        "chi2": float((inside.abs() / sigma).square().mean()),
        "seconds": answer.seconds,
    }
    if answer.draws is not None:
        draws = answer.draws
        sd = draws.std(0)
        held = (truth >= draws.amin(0)) & (truth <= draws.amax(0))
        misfit = (data - operator(draws)).abs() / sigma
        out |= {
            "chi2_draws": float(misfit.square().mean()),
            "error_over_sd": float((answer.mean - truth).square().mean().sqrt() / sd.square().mean().sqrt()),
            "coverage": float(held.double().mean()),
        }
    return out


def table(results: dict[str, dict[str, float]]) -> None:
    """Print the figures of every answer."""
    columns = ("psnr", "chi2", "chi2_draws", "error_over_sd", "coverage", "seconds")
    print(f"{'':22}" + "".join(f"{c:>15}" for c in columns))
    for name, values in results.items():
        print(f"{name:22}" + "".join(f"{values[c]:15.2f}" if c in values else f"{'':>15}" for c in columns))


def draw(
    path: str | Path,
    title: str,
    rows: Sequence[tuple[str, Tensor, dict[str, Answer], Tensor]],
    *,
    label: str,
    extent: tuple[float, float, float, float] | None = None,
    axes: tuple[str, str] = ("x", "y"),
    stretch: Any = None,
) -> None:
    """A row for each data set: what was measured, estimates, one draw, sd and error of the learned posterior, the truth.

    Args:
        rows: title of the first panel, its picture `(h, w)`, answers ("learned prior" among them), truth `(1, n_y, n_x)`.
        label: quantity and unit, of sd and error. extent, axes: of the images. stretch: applied to the images (not to
            their sd and error), e.g. `torch.asinh`.
    """
    import plots

    shown = stretch or (lambda v: v)
    count = 5 + max(len(answers) for _, _, answers, _ in rows)
    figure, panels = plots.page(len(rows), count, width=3.1, height=3.1, title=title)
    for line, (name, picture, answers, truth) in zip(panels, rows, strict=True):
        best = answers["learned prior"]
        assert best.draws is not None
        low, high = float(shown(truth).min()), float(shown(truth).max())
        sd, error = best.draws.std(0), (best.mean - truth).abs()
        reach = float(np.percentile(error.numpy(), 99.5)) or 1.0
        images = [
            *((f"{k}: {psnr(truth, a.mean):.1f} dB", shown(a.mean), {}) for k, a in answers.items()),
            ("one draw", shown(best.draws[0]), {}),
            ("truth", shown(truth), {}),
            ("error of the mean", error, {"cmap": "magma", "vmin": 0, "vmax": reach}),
            ("posterior sd", sd, {"cmap": "magma", "vmin": 0, "vmax": reach}),
        ]
        first = line[0].imshow(picture, cmap="gray", aspect="auto", interpolation="nearest")
        line[0].set(title=name, xticks=[], yticks=[])
        figure.colorbar(first, ax=line[0], fraction=0.05, pad=0.02)
        for axis, (caption, image, style) in zip(line[1:], images, strict=False):
            style = {"cmap": "viridis", "vmin": low, "vmax": high, **style}
            seen = axis.imshow(image[0], extent=extent, interpolation="nearest", **style)
            axis.set(title=caption, xlabel=axes[0], ylabel=axes[1])
            axis.title.set_fontsize(9)
        figure.colorbar(seen, ax=list(line[-2:]), label=f"{label}, sd and error", fraction=0.03, pad=0.02)
    plots.save(figure, path)
