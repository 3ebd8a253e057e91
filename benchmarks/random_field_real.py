"""Real data of `random_field.py`: the impedance log of Sleipner, and the pores of Berea sandstone; read from `../shared/data`.

**Sleipner.** Log-impedance of well 15/9-13 where it is not constant, less its running mean over 81 samples: a residual on a 2 ms
axis. A nested covariance is fitted to its variogram. Leave-one-out on every second sample, the scores of the residual's
anamorphosis being krigged: share of 90 % intervals that hold the datum [sleipner_loo_coverage]; conditional simulation from every
fourth sample: share of the others within the 5–95 % band of 400 draws [sleipner_conditional_coverage].

**Berea.** One plane in the middle of the volume. Its indicator (pore or grain): variogram fit, leave-one-out kriging of 600
random pixels, mean square of the errors over their kriging sd [berea_loo_chi2], 1 where the fit is right; an indicator is far from
Gaussian, an interval of it has no meaning. Its porosity in blocks of 8 × 8 pixels, by anamorphosis a Gaussian field on 50 × 50
nodes: covariance by Whittle, 250 blocks known, the others within the band of 400 conditional draws
[berea_conditional_coverage].
"""

from __future__ import annotations

import math
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch

from invgen.anamorphosis import NormalScore
from invgen.grid import Grid
from invgen.kriging import leave_one_out, observe
from invgen.priors.covariance_fits import experimental_variogram, fit_variogram, fit_whittle
from invgen.priors.covariance_models import CovarianceModel, Exponential, Matern, Nugget, Spherical
from invgen.priors.random_field import RandomField
from invgen.solvers import RandomizeThenOptimize

__all__ = ["real"]

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
Row = tuple[str, float, str, str]


def _inside(draws: np.ndarray, truth: np.ndarray) -> float:
    """Share of the truths between the 5 and 95 % quantiles of the draws."""
    low, high = np.quantile(draws, [0.05, 0.95], axis=0)
    return float(((truth >= low) & (truth <= high)).mean())


def _words(model: CovarianceModel) -> str:
    parts = []
    for p in model.parts:
        length = "" if isinstance(p, Nugget) else f", length {np.round(p.length, 2).tolist()}"
        parts.append(f"{type(p).__name__} {p.variance:.3f}{length}")
    return " + ".join(parts)


def sleipner() -> list[Row]:
    """Coverage of the log."""
    file = DATA / "seismic" / "Sleipner_impedance_log.npy"
    if not file.exists():
        return [(k, math.nan, "", "data missing") for k in ("sleipner_loo_coverage", "sleipner_conditional_coverage")]
    log = np.log(np.load(file))
    moving = np.nonzero(np.abs(np.diff(log)) > 1e-9)[0]
    log = log[moving[0] + 1 : moving[-1] + 1]
    n = len(log)
    padded = np.pad(log, 40, mode="reflect")
    residual = log - np.convolve(padded, np.full(81, 1 / 81), mode="valid")
    score = NormalScore(residual)
    u = score.inverse(torch.from_numpy(residual)[None])[0].numpy()
    t = 2.0 * np.arange(n)[:, None]  # ms
    curve = experimental_variogram(t, u, width=2.0, classes=40)
    model = fit_variogram(
        Exponential(length=20.0, variance=0.6) + Spherical(length=60.0, variance=0.3) + Nugget(variance=0.05), curve
    )
    every = slice(None, None, 2)
    error, sd = leave_one_out(model, t[every], u[every], mean=0.0)
    covered = float((np.abs(error) <= 1.6449 * sd).mean())
    grid = Grid((n,), (2.0,), axes=("t",), units=("ms",))
    field = RandomField(model, grid, method="cholesky")
    known = np.arange(0, n, 4)
    others = np.setdiff1d(np.arange(known[-1]), known)
    problem = observe(field, t[known], torch.from_numpy(u[known]), sd=0.02, kind="nearest")
    draws = RandomizeThenOptimize().solve(problem, 400, seed=0, chunk=400).samples.reshape(400, n).double().numpy()
    note = f"{n} samples, {_words(model)} (lengths in ms, scores)"
    return [
        ("sleipner_loo_coverage", covered, "", note),
        ("sleipner_conditional_coverage", _inside(draws[:, others], u[others]), "", f"{len(known)} samples known"),
    ]


def berea() -> list[Row]:
    """The indicator and the porosity of one plane."""
    file = DATA / "rock" / "berea.zip"
    if not file.exists():
        return [(k, math.nan, "", "data missing") for k in ("berea_loo_chi2", "berea_conditional_coverage")]
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(file) as archive:
        pages = Image.open(archive.extract(archive.namelist()[0], folder))
        pages.seek(200)
        plane = (np.asarray(pages) == 255).astype(float)
    rng = np.random.default_rng(0)
    pixels = rng.choice(plane.size, 600, replace=False)
    points = np.stack(np.unravel_index(pixels, plane.shape), -1).astype(float)
    # lags up to 24 pixels, from all pixels along both axes
    block = np.stack(np.meshgrid(np.arange(96), np.arange(96), indexing="ij"), -1).reshape(-1, 2).astype(float)
    curve = experimental_variogram(block, plane[:96, :96].ravel(), width=2.0, classes=12, most=1_000_000)
    model = fit_variogram(Exponential(length=6.0, variance=0.15) + Nugget(variance=0.01), curve)
    error, sd = leave_one_out(model, points, plane.ravel()[pixels])
    rows: list[Row] = [
        (
            "berea_loo_chi2",
            float(np.square(error / sd).mean()),
            "",
            f"{_words(model)} (pixels), porosity {plane.mean():.3f}",
        )
    ]
    porosity = plane.reshape(50, 8, 50, 8).mean((1, 3))
    noise = 1e-4 * rng.standard_normal(porosity.shape)  # shares of 64 pixels: ties have no order
    score = NormalScore(porosity + noise)
    u = score.inverse(torch.from_numpy(porosity + noise)[None])
    fitted = fit_whittle(Matern(nu=0.5, length=1.0), u, spacing=(1.0, 1.0), free=("variance", "length", "nu"), mean=0.0)
    field = RandomField(fitted, Grid((50, 50), (1.0, 1.0)))
    known = rng.choice(2500, 250, replace=False)
    where = np.stack(np.unravel_index(known, (50, 50)), -1).astype(float)
    problem = observe(field, where, u.flatten()[known], sd=0.02, kind="nearest")
    draws = RandomizeThenOptimize().solve(problem, 400, seed=0, chunk=400).samples.reshape(400, 2500).double().numpy()
    others = np.setdiff1d(np.arange(2500), known)
    note = f"blocks of 8 x 8 pixels, {_words(fitted)}, nu {fitted.parts[0].nu:.2f}"  # type: ignore[attr-defined]
    rows.append(("berea_conditional_coverage", _inside(draws[:, others], u.flatten().numpy()[others]), "", note))
    return rows


def real() -> list[Row]:
    """All rows."""
    return [*sleipner(), *berea()]
