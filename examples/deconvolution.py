"""Deconvolution: a galaxy from one HST image, its point-spread function taken off, with what the data leave open.

    python examples/deconvolution.py --figure deconvolution.png          (20 s)
    python examples/deconvolution.py --simulated                         (a made-up galaxy, whose truth is known)

The data are a real 64 × 64 stamp of the COSMOS survey (HST/ACS, F814W, 0.03″ a pixel; Mandelbaum et al. 2012), read from
`--data`, or with `--simulated` a galaxy of the generator behind a PSF of the same width and the same kind of noise.

**What the unknown is.** The shipped prior `galaxies-diffusion` knows galaxies of AB magnitude 21.5 to 22.5 in nJy a pixel,
half-light radii of 6 to 12 pixels and nothing finer than 3 pixels. Galaxies look alike at all brightnesses and sizes, so
it is used here with 0.03″ pixels for its 0.05″, and the brightness goes into the operator: x is the galaxy as it would be
at magnitude 22, and

    d = f P x + n,      f = 10^(−0.4 (31.4 − 25.94)) · 10^(−0.4 (m − 22)) electrons/s a nJy,

with P the PSF (zero beyond the frame) and m the catalogue's magnitude; 25.94 is the AB zero point of the survey, 31.4 that
of a nJy. The reconstruction is the sky at 0.09″ resolution: that nothing is finer is the prior's word, not the data's.

**The noise.** Drizzling from 0.05″ to 0.03″ pixels made neighbours share noise: the correlation ρ is measured on the blank
corners of several stamps (0.47 to the side). The level of a pixel is that of the sky plus the photons of the galaxy,
sd² = σ² + flux/(T Σρ), T = 2028 s: neighbours that share noise have less of it each.
Taken as independent, the noise of broad structure would be Σρ = 4.2 times too small in variance.

**Check.** χ² of the residuals under R, over the number of pixels: 1 for a good fit. It does not see a bias of what the data
do not constrain; for that `--simulated` prints the error of the mean over the posterior sd (1 where the sd is right).
Measured: χ²/N 0.99 for stamp 2, whose flux is known to 2 % and the brightest pixel to 7 %; 1.02 and 1.08 posterior sd
for the simulated galaxy. Galaxies that are not in the prior show: χ²/N is 1.5 for stamp 20, larger than its frame.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import script
import torch
from torch import Tensor

from invgen.data import SersicGalaxies, drizzled_noise, sky_correlation
from invgen.driver import Streams
from invgen.noise import GaussianNoise
from invgen.operators import Convolution, sky_grid
from invgen.priors import pretrained
from invgen.problem import InverseProblem
from invgen.solvers import MMPS, GuidedDiffusion

STAMPS = Path(__file__).resolve().parents[2] / "shared" / "data" / "galaxies" / "cosmos_f814w_50_64.npz"
ZERO_POINT, NANOJANSKY, EXPOSURE = 25.94, 31.4, 2028.0  # AB, AB, s
BLANK, CORNER = (2, 4, 11, 16, 23), 12  # stamps with sky in their corners, pixels
PIXEL = 0.03  # arcsec
MEASURED = ((0.01, 0.23, 0.02), (0.47, 1.0, 0.47), (0.02, 0.23, 0.01))  # replaced by what --data says


def correlation(images: np.ndarray, variance: np.ndarray) -> Tensor:
    """ρ̂ of the noise, (5, 5), from the corners of stamps; each corner's own level is taken off."""
    corners = []
    for k in BLANK:
        z = images[k] / np.sqrt(variance[k])
        for part in (z[:CORNER, :CORNER], z[:CORNER, -CORNER:], z[-CORNER:, :CORNER], z[-CORNER:, -CORNER:]):
            corners.append(part - part.mean())
    return sky_correlation(np.stack(corners), lags=2)


def moffat(size: int = 51, fwhm: float = 3.9, beta: float = 3.0) -> Tensor:
    """A PSF of about HST's width in pixels, with wings."""
    r = torch.hypot(*torch.meshgrid(*[torch.arange(size) - size // 2.0] * 2, indexing="ij"))
    core = fwhm / 2 / (2 ** (1 / beta) - 1) ** 0.5
    k = (1 + (r / core).square()).pow(-beta).double()
    return k / k.sum()


def noise_of(image: Tensor, sigma: float, rho: Tensor) -> tuple[GaussianNoise, Tensor]:
    """The noise model of an image in electrons/s, and its sd a pixel `(1, ny, nx)`."""
    middle = rho.shape[0] // 2
    rho = rho / rho[middle, middle]
    # photons of the galaxy from a smoothed image: single pixels would follow their own noise
    flux = torch.nn.functional.avg_pool2d(image[None].double(), 5, 1, 2)[0].clamp_min(0)
    sd = (sigma**2 + flux / (EXPOSURE * float(rho.sum()))).sqrt()
    return drizzled_noise(rho, tuple(image.shape), sd), sd


def real(path: Path, stamp: int) -> dict[str, Any]:
    """One stamp with its PSF, noise and brightness."""
    with np.load(path, allow_pickle=False) as held:
        images, psfs, magnitude, variance = (held[k] for k in ("images", "psf", "mag", "noise_variance"))
    if (images[stamp] == 0).mean() > 0.001:
        raise ValueError(f"Stamp {stamp} is smaller than its frame, which is padded with zeros; take one that is not.")
    rho = correlation(images, variance)
    image = torch.from_numpy(images[stamp])[None]
    noise, sd = noise_of(image, float(np.sqrt(variance[stamp] * rho[2, 2].item())), rho)
    psf = torch.from_numpy(psfs[stamp]).double()
    return {"image": image, "psf": psf, "noise": noise, "sd": sd, "magnitude": float(magnitude[stamp]), "truth": None}


def simulated(seed: int, sigma: float = 2.6e-3, magnitude: float = 22.6) -> dict[str, Any]:
    """A galaxy that the prior has not seen, behind a PSF and noise like those of the survey."""
    galaxies = SersicGalaxies(magnitude=(21.5, 22.5), half_light=(0.3, 0.6), psf_fwhm=0.15)
    truth = torch.from_numpy(galaxies.sample(1, seed=50_000 + seed)).float().reshape(1, 64, 64)
    psf = moffat()
    clean = scale(magnitude) * Convolution(psf, (1, 64, 64), "zero")(truth[None])
    noise, _ = noise_of(clean[0], sigma, torch.tensor(MEASURED, dtype=torch.float64))
    image = noise.draw(clean, Streams(seed, [0]))[0]
    noise, sd = noise_of(image, sigma, torch.tensor(MEASURED, dtype=torch.float64))
    return {"image": image, "psf": psf, "noise": noise, "sd": sd, "magnitude": magnitude, "truth": truth}


def scale(magnitude: float) -> float:
    """Electrons/s of this galaxy for one nJy of the galaxy of magnitude 22 that the prior knows."""
    return float(10 ** (-0.4 * (NANOJANSKY - ZERO_POINT)) * 10 ** (-0.4 * (magnitude - 22)))


def deconvolve(seen: dict[str, Any], samples: int, steps: int, seed: int) -> tuple[InverseProblem, Tensor, float]:
    """The problem, draws `(n, 1, 64, 64)` of the galaxy, and the largest relative residual of an inner solve."""
    # a plain number: the prior's own grid says 0.05″, see the text
    operator = scale(seen["magnitude"]) * Convolution(seen["psf"], (1, 64, 64), "zero")
    problem = InverseProblem(seen["image"], operator, seen["noise"], pretrained.load("galaxies-diffusion"))
    rule = MMPS(iterations=8, rtol=1e-2, precondition=False)
    posterior = GuidedDiffusion(rule, integrator="euler", steps=steps).solve(problem, samples, seed=seed)
    return problem, posterior.flat()[0][0], float(posterior.stats["residual"].max())


def score(problem: InverseProblem, draws: Tensor, seen: dict[str, Any]) -> dict[str, float]:
    """χ² of the draws under R, signal to noise before and after, flux; with a truth, errors."""
    term = problem.terms[0]
    residual = term.data - term.operator(draws)
    whitened = term.noise.covariance(tuple(residual.shape[1:])).whiten(residual)
    mean, sd = draws.mean(0), draws.std(0)
    out = {
        "chi2": float(whitened.square().mean()),
        "flux_error": float(draws.sum((1, 2, 3)).std() / mean.sum()),
        "sd_over_mean_at_peak": float(sd.flatten()[mean.argmax()] / mean.max()),
    }
    if seen["truth"] is not None:
        error = mean - seen["truth"]
        n = len(draws)
        out["error_over_sd"] = float(error.square().mean().sqrt() / (sd.square().mean() * (1 + 1 / n)).sqrt())
        out["flux_bias"] = float(error.sum() / seen["truth"].sum())
    return out


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = script.parser(__doc__, samples=16, fast="few steps and samples in seconds, to see that it runs")
    parser.add_argument("--data", type=Path, default=STAMPS, help="the .npz file of stamps")
    parser.add_argument("--stamp", type=int, default=2, help="which; 2, 4 and 23 fill their frame and fit")
    parser.add_argument("--simulated", action="store_true", help="a galaxy of the generator, whose truth is known")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if not args.simulated and not args.data.exists():
        print(f"There is no {args.data}; --simulated runs without it.", file=sys.stderr)
        raise SystemExit(2)
    began = time.process_time()
    seen = simulated(args.seed) if args.simulated else real(args.data, args.stamp)
    samples, steps = (3, 4) if args.fast else (args.samples, 40)
    problem, draws, unsolved = deconvolve(seen, samples, steps, args.seed)
    figures = {"deconvolved": score(problem, draws, seen) | {"cpu_seconds": time.process_time() - began}}
    for name, value in figures["deconvolved"].items():
        print(f"{name:22}{value:10.3f}")
    print(f"inner solves left a residual of up to {unsolved:.2f} (a Krylov space of 8)")
    if args.figure:
        import lens_plots

        grid = sky_grid((64, 64), PIXEL)
        term = problem.terms[0]
        figure = lens_plots.posterior_page(
            seen["image"][0],
            term.operator(draws.mean(0, keepdim=True))[0, 0],
            seen["sd"][0],
            draws[:, 0],
            grid,
            grid,
            truth=None if seen["truth"] is None else seen["truth"][0],
            units=("electrons/s", "nJy/pixel at 22 mag"),
            names=("simulated image" if args.simulated else f"HST stamp {args.stamp}", "galaxy"),
            title=f"deconvolution with the learned prior, χ²/N = {figures['deconvolved']['chi2']:.2f}",
        )
        lens_plots.save(figure, args.figure)
    return script.finish({"example": "deconvolution", "figures": figures, "samples": samples})


if __name__ == "__main__":
    main()
