"""The main job on an embedded problem: log-impedance from a noisy post-stack section and a smooth background."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["demo_problem", "run_demo"]

SIZE, STEP = 64, 4.0  # samples and metres
SECTION = (256, 256)  # the section the window is cut from
TOP, LEFT = 96, 96
FREQUENCY = 15.0  # Hz
SNR_DB = 20.0
BACKGROUND_SD = 0.05
SMOOTHING = (30, 30)  # samples of the running mean that makes the background


def demo_problem(prior: Any = None, *, seed: int = 2026) -> tuple[Any, Tensor]:
    """The problem and the true model.

    The truth is a 64 × 64 window (4 m cells, 384 m deep) of a section made by `invgen.data.GeologySections` with the
    stated seed, which no prior was trained on. The data are post-stack traces (Ricker 15 Hz, 4 ms, factor ½ in the
    wavelet) with noise 20 dB below them, and a smooth background with noise of standard deviation 0.05.

    Args:
        prior: on log-impedance, `(1, 64, 64)`; the pretrained "geology" when omitted. seed: of the section and noise.

    Returns:
        `InverseProblem` with the terms "seismic" and "background", and the truth `(1, 64, 64)`.
    """
    from invgen.data.geology import GeologySections
    from invgen.driver import Streams
    from invgen.noise import GaussianNoise
    from invgen.operators.seismic import PostStack, Smooth, ricker
    from invgen.priors import pretrained
    from invgen.problem import InverseProblem, Term

    if prior is None:
        prior = pretrained.load("geology").at((SIZE, SIZE), origin=(TOP * STEP, 0.0))
    section = GeologySections(shape=SECTION, spacing=(STEP, STEP)).sample(1, seed=seed)
    truth = torch.from_numpy(section[:, :, TOP : TOP + SIZE, LEFT : LEFT + SIZE].copy())
    wavelet = ricker(torch.arange(-40, 41, dtype=torch.float64) * 0.004, FREQUENCY) / 2
    seismic = PostStack(wavelet, prior.shape, model_grid=prior.grid)
    background = Smooth(prior.shape, SMOOTHING, model_grid=prior.grid)
    clean = seismic(truth)
    noise = GaussianNoise(float(clean.std()) * 10 ** (-SNR_DB / 20))
    vague = GaussianNoise(BACKGROUND_SD)
    terms = [
        Term(noise.draw(clean, Streams(seed, range(1), salt="seismic")), seismic, noise, name="seismic"),
        Term(
            vague.draw(background(truth), Streams(seed, range(1), salt="background")),
            background,
            vague,
            name="background",
        ),
    ]
    return InverseProblem(terms=terms, prior=prior), truth[0]


def run_demo(
    out: str | Path = "demo",
    *,
    prior: Any = None,
    solver: Any = None,
    num_samples: int = 19,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = False,
) -> Path:
    """Solve `demo_problem` and write `report.html`, `posterior.nc` and `truth.npy` to the folder `out`.

    Returns:
        Path of the report.
    """
    import numpy as np

    from invgen.data.io import write_array
    from invgen.solvers.diffusion import GuidedDiffusion
    from invgen.solvers.guidance import MMPS

    problem, truth = demo_problem(prior)
    solver = solver or GuidedDiffusion(MMPS(iterations=6, rtol=0), "heun", steps=24)
    if hasattr(problem.prior, "to"):
        problem.prior.to(device)
    posterior = solver.solve(problem, num_samples, seed=seed, device=device, progress=progress)
    out = Path(out)
    write_array(out / "truth.npy", np.asarray(truth))
    posterior.save(out / "posterior.nc")
    return posterior.report(out / "report.html", truth=truth, title="Log-impedance from a post-stack section")
