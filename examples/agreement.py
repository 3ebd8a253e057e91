"""How the examples of simulation-based inference compare posteriors: with a reference, and with true values."""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

__all__ = ["agreement", "beside", "covered"]


def agreement(
    draws: Tensor, reference: Tensor, *, ess: float | None = None, own: float | None = None
) -> dict[str, float]:
    """Mean error, largest mean error and sd ratio of draws `(n, dim)` against those of a reference `(m, dim)`.

    With z_j = (mean − reference mean)/(reference sd) of coordinate j the mean error is √max(0, mean_j z_j² − 1/n − 1/m): what
    two exact sets of draws differ by is taken off. Both are in posterior standard deviations.

    Args:
        ess: effective number of the reference's draws, m when omitted. own: of the draws, n when omitted.
    """
    a, b = draws.double().flatten(1), reference.double().flatten(1)
    z = (a.mean(0) - b.mean(0)) / b.std(0)
    chance = 1 / (own or len(a)) + 1 / (ess or len(b))
    return {
        "mean_error": math.sqrt(max(0.0, float(z.square().mean()) - chance)),
        "worst_mean": float(z.abs().max()),
        "sd_ratio": float((a.std(0) / b.std(0)).mean()),
    }


def covered(truth: Tensor, low: Tensor, high: Tensor) -> float:
    """Share of true values between the ends of their intervals."""
    return float(((truth >= low) & (truth <= high)).double().mean())


def beside(path: str | Path, what: str) -> Path:
    """The file name of a second picture: figure.png -> figure_corner.png."""
    path = Path(path)
    return path.with_name(f"{path.stem}_{what}{path.suffix}")
