r"""Proper scores of posterior draws: small is good, and the true posterior has the smallest expectation.

CRPS(F, y) = E|X − y| − ½ E|X − X'|,  ES(F, y) = E|X − y|^β − ½ E|X − X'|^β (Euclidean norms). With L draws the second
expectation is estimated over pairs of different draws, 1/(L(L − 1)) Σ_{l≠m}: unbiased for any L ("fair"), while the
familiar 1/L² rewards an ensemble that is too narrow.

References: Gneiting & Raftery, Strictly proper scoring rules, JASA 2007; Ferro, Fair scores for ensemble forecasts,
QJRMS 2014; Zamo & Naveau, Estimation of the CRPS with limited information, Mathematical Geosciences 2018.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from invgen.diagnostics._arrays import Array, chunks, pair

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Score", "crps", "energy_score"]


@dataclass(frozen=True, eq=False)
class Score:
    """A score of each simulation.

    Attributes:
        name: of the score. values: `(n_sim, *shape)` (one a coordinate) or `(n_sim,)`; in units of x.
    """

    name: str
    values: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """Over simulations, `(*shape)`."""
        return self.values.mean(0)

    @property
    def mc_error(self) -> np.ndarray:
        """Standard error of `mean`, `(*shape)`; NaN for one simulation."""
        n = len(self.values)
        return self.values.std(0, ddof=1) / np.sqrt(n) if n > 1 else np.full(self.values.shape[1:], np.nan)

    def __float__(self) -> float:
        return float(self.values.mean())

    def plot(self, ax: Axes | None = None) -> Axes:
        """Mean and standard error of each coordinate, or the histogram over simulations of a single score."""
        from invgen.diagnostics import figures

        return figures.score_figure(self, ax)


def crps(truth: Array, samples: Array) -> Score:
    r"""Continuous ranked probability score of every coordinate, the fair ensemble estimator.

    CRPS = 1/L Σ_l |x_l − y| − 1/(L(L − 1)) Σ_l (2l − L − 1) x_(l),  x_(1) ≤ … ≤ x_(L): the sum over pairs of sorted draws.

    Args:
        truth: y, `(n_sim, *shape)`. samples: x, `(n_sim, draws, *shape)`, two draws or more.

    Returns:
        `Score` with values `(n_sim, *shape)`, in units of x; single values may be negative, their expectation is not.

    Raises:
        ValueError: shapes that do not fit, NaN, a single draw.

    Cost: L log L a coordinate. References: module docstring.
    """
    t, s = _several(truth, samples, "CRPS")
    draws = s.shape[1]
    weight = (2 * torch.arange(1, draws + 1, dtype=torch.float64, device=s.device) - draws - 1) / (draws * (draws - 1))
    out = torch.empty(t.shape, dtype=torch.float64)
    for rows in chunks(len(s), 3 * s[0].numel()):
        x, y = s[rows].double(), t[rows, None].double()
        spread = torch.tensordot(weight, x.sort(1).values, dims=([0], [1]))
        out[rows] = ((x - y).abs().mean(1) - spread).cpu()
    return Score("CRPS", out.numpy())


def energy_score(truth: Array, samples: Array, *, beta: float = 1.0) -> Score:
    """Energy score of the joint law of all coordinates, the fair ensemble estimator.

    ES = 1/L Σ_l |x_l − y|^β − 1/(2 L (L − 1)) Σ_{l≠m} |x_l − x_m|^β. Coordinates of different units should be scaled
    by the caller.

    Args:
        truth: y, `(n_sim, *shape)`. samples: x, `(n_sim, draws, *shape)`, two draws or more.
        beta: in (0, 2).

    Returns:
        `Score` with values `(n_sim,)`, in units of x^β.

    Raises:
        ValueError: shapes that do not fit, NaN, a single draw, beta outside (0, 2).

    Cost: L² distances a simulation, 64 MB at a time. References: module docstring.
    """
    if not 0 < beta < 2:
        raise ValueError(f"The energy score is proper for beta in (0, 2), got {beta}.")
    t, s = _several(truth, samples, "The energy score")
    draws = s.shape[1]
    out = torch.empty(len(t), dtype=torch.float64)
    for rows in chunks(len(s), s[0].numel() + draws):
        x, y = s[rows].double().flatten(2), t[rows, None].double().flatten(2)
        apart = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for some in chunks(draws, len(x) * draws):
            # not the shortcut |a|² + |b|² − 2ab: it loses half of the digits of small distances
            distance = torch.cdist(x[:, some], x, compute_mode="donot_use_mm_for_euclid_dist")
            apart += distance.pow(beta).sum((1, 2))
        near = (x - y).square().sum(2).sqrt().pow(beta).mean(1)
        out[rows] = (near - apart / (2 * draws * (draws - 1))).cpu()
    return Score("energy score", out.numpy())


def _several(truth: Array, samples: Array, what: str) -> tuple[Tensor, Tensor]:
    t, s = pair(truth, samples)
    if s.shape[1] < 2:
        raise ValueError(f"{what} needs two draws a simulation or more, got {s.shape[1]}.")
    return t, s
