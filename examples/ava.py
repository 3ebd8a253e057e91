"""Angle gathers to vp, vs and density with error bars: the first hour of pre-stack Bayesian inversion.

    python examples/ava.py --figure ava.png          (--fast, and the Gaussian prior: 32 × 64 samples; else 64 × 128)

A section that the prior has never seen, three angle gathers of it with noise 15 dB down, and a smooth background: what a
pre-stack project starts from. The posterior is sampled under the elastic prior, p(ln vp, ln vs, ln ρ), that was trained on
generated geology with rock physics (`invgen.data.ElasticSections`; configs/elastic-diffusion.yaml), or, with
`--prior gaussian` and where the trained one does not ship, exactly under a stationary Gaussian fitted to that generator.

**With data of your own** replace `survey`: gathers `(n_angles, nz, nx)` in depth at the grid's interval (or in time, read
sample by sample: `prior.at(shape, grid=…)` says so), their angles, one wavelet or one an angle at the same interval, and a
background (3, nz, nx) in ln km/s and ln g/cm³. The noise level is the residual of your well tie; a background's is how far
logs leave it once both are smoothed. `check_elastic_model` tells whether the units are what the prior takes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import script
import torch
from torch import Tensor

from invgen.contracts import Solver
from invgen.data import ElasticSections
from invgen.grid import Grid
from invgen.noise import GaussianNoise
from invgen.operators import PreStack, Smooth, check_elastic_model, ricker
from invgen.priors import DiffusionPrior, GaussianPrior, pretrained
from invgen.problem import InverseProblem, Term
from invgen.solvers import ExactGaussian, PnPDM
from invgen.transforms import Affine

ANGLES = (5.0, 17.5, 30.0)  # degrees
WAVELENGTH = 75.0  # m, peak of the wavelet in depth: v / 2f, 17 Hz at 2.5 km/s
SNR_DB = 15.0  # signal over noise of the gathers
SMOOTH = (20, 60)  # running means of the background, samples: 300 m each
BACKGROUND_SD = 0.05  # of the smoothed logarithms


@dataclass
class Survey:
    """What an inversion is given, and the truth, which only the figure and the scores see."""

    gathers: Tensor
    background: Tensor
    wavelet: Tensor
    noise: float
    grid: Grid
    truth: Tensor


def survey(shape: tuple[int, int], seed: int) -> Survey:
    """A generated section and its data; replace this function by reading your own."""
    sections = ElasticSections(shape, (15.0, 5.0), depth=(600.0, 600.0))
    truth = torch.from_numpy(sections.sample(1, seed=seed)).double()
    steps = torch.arange(-12, 13, dtype=torch.float64) * sections.spacing[0]
    wavelet = ricker(steps, 1 / WAVELENGTH)
    ratio = (truth[0, 1] - truth[0, 0]).exp().mean()
    clean = PreStack(wavelet, ANGLES, truth.shape[1:], vsvp=ratio, kind="forward")(truth)
    low = Smooth(truth.shape[1:], SMOOTH)(truth)
    generator = torch.Generator().manual_seed(seed)
    noise = float(clean.square().mean().sqrt()) * 10 ** (-SNR_DB / 20)
    return Survey(
        gathers=clean + noise * torch.randn(clean.shape, generator=generator, dtype=torch.float64),
        background=low + BACKGROUND_SD * torch.randn(low.shape, generator=generator, dtype=torch.float64),
        wavelet=wavelet,
        noise=noise,
        grid=sections.grid,
        truth=truth[0],
    )


def gaussian(grid: Grid) -> GaussianPrior:
    """A stationary Gaussian fitted to 128 generated sections on this grid, channels independent."""
    sections = ElasticSections((grid.shape[0], grid.shape[1]), (15.0, 5.0), depth=(600.0, 600.0))
    x = torch.from_numpy(sections.sample(128, seed=5_000_001)).double()
    units = Affine(x.mean((0, 2, 3)), x.transpose(0, 1).flatten(1).std(1))
    return GaussianPrior.fit(x, structure="stationary", mean="constant", transform=units, grid=grid)


def invert(data: Survey, prior: DiffusionPrior | GaussianPrior, samples: int) -> tuple[Tensor, dict[str, float]]:
    """Posterior draws `(samples, 3, nz, nx)`, and how the data are fitted."""
    shape = data.grid.field_shape
    print("units:", ", ".join(check_elastic_model(data.background)))
    # one Vs/Vp for the coefficients, from the background: a constant keeps every solve a closed form
    ratio = (data.background[0, 1] - data.background[0, 0]).mean().exp()
    seismic = PreStack(data.wavelet, ANGLES, shape, vsvp=ratio, kind="forward")
    terms = [
        Term(data.gathers, seismic, GaussianNoise(data.noise), name="gathers"),
        Term(data.background, Smooth(shape, SMOOTH), GaussianNoise(BACKGROUND_SD), name="background"),
    ]
    problem = InverseProblem(terms=terms, prior=prior)
    solver: Solver
    if isinstance(prior, GaussianPrior):
        solver = ExactGaussian(method="cg", rtol=1e-4)
    else:
        solver = PnPDM(iterations=80, inner=3, rho_max=20.0, rho_min=0.01)
    began = time.perf_counter()
    dtype = torch.float64 if isinstance(prior, GaussianPrior) else torch.float32
    posterior = solver.solve(problem, samples, seed=0, dtype=dtype)
    fit = {
        f"chi2_{t.name}": float(((t.data - p[0, 0]) / t.noise.sigma).square().mean())
        for t, p in zip(terms, posterior.predict(), strict=True)
    }
    return posterior.samples[0, 0].double(), {**fit, "seconds": time.perf_counter() - began}


def figure(path: Path, data: Survey, drawn: Tensor) -> None:
    """Gathers, truth, posterior mean and spread on depth axes, and the middle trace with its band."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    (z0, x0), (dz, dx), (nz, nx) = data.grid.origin, data.grid.spacing, data.grid.shape
    extent, depth = (x0, x0 + nx * dx, z0 + nz * dz, z0), z0 + dz * np.arange(nz)
    names = ("vp (km/s)", "vs (km/s)", "density (g/cm³)")
    fig, axes = plt.subplots(3, 5, figsize=(19, 11), constrained_layout=True)
    clip = float(data.gathers.abs().max()) / 2
    for k, name in enumerate(names):
        truth, mean = data.truth[k].exp(), drawn[:, k].exp().mean(0)
        low, high = float(truth.min()), float(truth.max())
        panels = [
            (f"gather at {ANGLES[k]:g}°", data.gathers[0, k], "gray", -clip, clip, "amplitude"),
            ("truth", truth, "viridis", low, high, name),
            ("posterior mean", mean, "viridis", low, high, name),
            ("posterior standard deviation", drawn[:, k].exp().std(0), "magma", 0.0, None, name),
        ]
        for axis, (title, image, colours, least, most, label) in zip(axes[k], panels, strict=False):
            shown = axis.imshow(image, extent=extent, aspect="auto", cmap=colours, vmin=least, vmax=most)
            axis.set(title=title, xlabel="distance (m)", ylabel="depth below the first sample (m)")
            fig.colorbar(shown, ax=axis, label=label)
        axis, trace = axes[k, 4], drawn[:, k, :, nx // 2].exp()
        band = (trace.min(0).values, trace.max(0).values)
        axis.fill_betweenx(depth, *band, color="tab:red", alpha=0.3, lw=0, label=f"all {len(trace)} draws")
        axis.plot(trace.mean(0), depth, "tab:red", lw=1, label="posterior mean")
        axis.plot(data.background[0, k, :, nx // 2].exp(), depth, "tab:blue", lw=0.8, label="background")
        axis.plot(truth[:, nx // 2], depth, "k", lw=1, label="truth")
        axis.set(title=f"trace at {x0 + dx * (nx // 2):g} m", xlabel=name, ylabel="depth below the first sample (m)")
        axis.invert_yaxis()
        axis.legend(fontsize=7)
    fig.savefig(path, dpi=80)


def main() -> None:
    parser = script.parser(__doc__, fast="a smaller window")
    parser.add_argument("--seed", type=int, default=101, help="of the section and its noise")
    parser.add_argument("--prior", choices=["learned", "gaussian"], default="learned")
    parser.add_argument("--checkpoint", default=None, help="another elastic prior than the shipped one")
    options = parser.parse_args()
    trained = options.prior == "learned" and (options.checkpoint or "elastic-diffusion" in pretrained.available())
    # conjugate gradients through both terms take minutes on the larger window
    shape = (64, 128) if trained and not options.fast else (32, 64)
    data = survey(shape, options.seed)
    prior: DiffusionPrior | GaussianPrior
    if trained:
        learned = (
            DiffusionPrior.load(options.checkpoint) if options.checkpoint else pretrained.load("elastic-diffusion")
        )
        prior = learned.at(shape, grid=data.grid).with_precision(torch.bfloat16)
    else:
        if options.prior == "learned":
            print(
                "The elastic prior does not ship with this version: a Gaussian fitted to its generator takes its place."
            )
        prior = gaussian(data.grid)
    drawn, record = invert(data, prior, options.samples)
    low, high = drawn.min(0).values, drawn.max(0).values
    smooth = Smooth(data.grid.field_shape, SMOOTH)(data.truth[None])[0]
    for k, name in enumerate(("vp", "vs", "rho")):
        pair = torch.stack([(drawn.mean(0) - smooth)[k].flatten(), (data.truth - smooth)[k].flatten()])
        record[f"correlation_{name}"] = float(torch.corrcoef(pair)[0, 1])  # of what the background does not know
        record[f"coverage_{name}"] = float(((data.truth >= low) & (data.truth <= high))[k].double().mean())
    if options.figure:
        figure(options.figure, data, drawn)
    script.finish({k: round(v, 4) for k, v in record.items()})


if __name__ == "__main__":
    main()
