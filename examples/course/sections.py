"""What the image scripts share: sand channels in shale, and three ways to look at them from two wells.

A section is 32 × 32 samples of 15 m, 1 in sand and 0 in shale: half-discs that cut each other (Mosser et al. 2020), 0.4 ms
each, so that every network sees tens of thousands of different ones. The truth of every inverse problem is a section of
a stream that training never touches, and the data are its physics plus noise of a stated standard deviation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from invgen.contracts import LinearOperator
from invgen.data import HalfCircleChannels
from invgen.diagnostics import sliced_wasserstein
from invgen.noise import GaussianNoise
from invgen.operators import Mask, MatrixOperator
from invgen.problem import InverseProblem

LAW = HalfCircleChannels(shape=(32, 32), spacing=(15.0, 15.0))  # m
SHAPE = LAW.grid.field_shape
EXTENT = (0.0, 480.0, 480.0, 0.0)  # m, for imshow: depth downwards


def examples(n: int) -> Tensor:
    """Training examples `(n, 1, 32, 32)`."""
    return LAW.pool(n, seed=0)


def held_out(n: int) -> Tensor:
    """Examples that no training sees."""
    return LAW.pool(n, seed=12345)


def wells(columns: tuple[int, ...] = (4, 16, 27)) -> LinearOperator:
    """The facies along vertical wells: d = x[well], 32 samples each."""
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[:, :, list(columns)] = True
    return Mask(mask)


def points(n: int = 60, seed: int = 3) -> LinearOperator:
    """The facies at scattered points (old cores)."""
    pick = torch.randperm(32 * 32, generator=torch.Generator().manual_seed(seed))[:n]
    mask = torch.zeros(32 * 32, dtype=torch.bool)
    mask[pick] = True
    return Mask(mask.reshape(SHAPE))


def rays(sources: int = 12) -> LinearOperator:
    """Share of sand along straight rays from a well at the left edge to one at the right: crosswell tomography."""
    depth = np.linspace(0.5, 30.5, sources)
    rows = np.zeros((sources**2, 32, 32))
    for i, (a, b) in enumerate((a, b) for a in depth for b in depth):
        along = np.linspace(0, 1, 512)
        np.add.at(rows[i], ((a + (b - a) * along).round().astype(int), (31 * along).round().astype(int)), 1 / 512)
    return MatrixOperator(torch.from_numpy(rows).float().flatten(1), SHAPE)


def problem(prior: Any, operator: LinearOperator, sigma: float, truth: Tensor) -> InverseProblem:
    """Data of held-out sections `(n, 1, 32, 32)`, n observations."""
    clean = operator(truth)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(7))
    return InverseProblem(clean + sigma * noise, operator, GaussianNoise(sigma), prior)


def misfit(p: InverseProblem, x: Tensor) -> float:
    """Root mean square of (d − g(x))/sigma over draws of the first observation; 1 for the truth."""
    term = p.terms[0]
    return float(((term.data[:1] - term.operator(x)) / term.noise.sigma).square().mean().sqrt())


def quality(draws: Tensor, truth: Tensor) -> float:
    """Sliced Wasserstein distance of draws from held-out sections, over that between two sets of true ones: 1 is perfect."""
    n = min(len(draws), len(truth) // 2)
    floor = float(sliced_wasserstein(truth[:n], truth[n : 2 * n], 100))
    return float(sliced_wasserstein(draws[:n], truth[n : 2 * n], 100)) / floor


def show(ax: Any, field: Tensor, title: str, *, cmap: str = "cividis", limits: tuple[float, float] = (0.0, 1.0)) -> Any:
    """One section, axes in metres."""
    image = ax.imshow(
        field.reshape(32, 32), cmap=cmap, vmin=limits[0], vmax=limits[1], extent=EXTENT, interpolation="nearest"
    )
    ax.set_title(title, fontsize=9, loc="left")
    ax.set(xticks=(0, 240, 480), yticks=(0, 240, 480))
    ax.tick_params(labelsize=7)
    return image


def show_data(ax: Any, operator: LinearOperator) -> None:
    """Where the data are taken: samples of a mask, on the section shown in `ax`."""
    row, column = np.nonzero(operator.adjoint(torch.ones(1, *operator.data_shape)).reshape(32, 32).numpy())
    ax.plot(15 * column + 7.5, 15 * row + 7.5, "s", ms=2.5, color="tab:red")


def gallery(axes: Any, fields: Tensor, title: str) -> None:
    """A row of draws; the title on the first."""
    for i, (ax, field) in enumerate(zip(axes, fields)):
        show(ax, field, title if i == 0 else "")
        if i:
            ax.set_yticklabels([])
    axes[0].set_ylabel("depth (m)", fontsize=8)
