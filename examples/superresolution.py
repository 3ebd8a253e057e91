"""Super-resolution and inpainting of a galaxy: pixels four times finer than the detector's, and pixels that were lost.

    python examples/superresolution.py --figure superresolution.png          (about two minutes of one core)

The unknown is a galaxy of 3.2 arcsec on pixels of 0.05 arcsec, in nJy a pixel. Two instruments see it:

- super-resolution: a point-spread function of 0.2 arcsec and pixels of 0.2 arcsec (`SuperResolution`: blur, then every
  fourth sample), 256 data for 4096 pixels. Its linear-Gaussian solves are direct, by folding the spectrum.
- inpainting: the fine pixels, of which a stripe (a bleeding column), a disc (a star) and every second one of the rest are
  lost (`Mask`).

The prior is the shipped diffusion model of galaxies; the truth comes from the generator it was trained on, another seed.
Beside it: the best linear estimate (a Gaussian field), total variation with the weight that is best on another galaxy, and what
one shows without a model, repeated pixels and zeros. Galaxies are steep, and images are drawn through asinh. Measured, dB of
the mean, Gaussian field and learned prior: 32.3 and 42.8 (super-resolution), 35.6 and 40.9 (inpainting); the min–max bands
of 19 draws of the learned posterior hold 0.96 and 0.94 of the true pixels, and their chi-squared is 0.95 and 1.09 a datum.
"""

from __future__ import annotations

import math
from typing import Any

import reconstruction
import script
import torch
from torch import Tensor

from invgen.data import SersicGalaxies
from invgen.operators import Mask, SuperResolution, box_kernel, gaussian_kernel
from invgen.priors import pretrained

SIDE, PIXEL, FACTOR, NOISE, SEED = 64, 0.05, 4, 0.03, 7
FWHM = 0.2  # arcsec
WEIGHTS = (0.01, 0.03, 0.1, 0.3, 1.0)  # per nJy


def lost() -> Tensor:
    """Which pixels are measured, `(1, n_y, n_x)`: a stripe, a disc and half of the rest are not."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    star = (y - 24).square() + (x - 40).square() < 7**2
    stripe = (x >= 24) & (x < 28)
    kept = torch.rand(SIDE, SIDE, generator=torch.Generator().manual_seed(3)) < 0.5
    return (kept & ~star & ~stripe)[None]


def instruments(grid: Any) -> dict[str, Any]:
    """The two operators on the grid of the prior."""
    sd = FWHM / math.sqrt(8 * math.log(2)) / PIXEL
    blur = torch.nn.functional.conv2d(
        gaussian_kernel(sd)[None, None], box_kernel(FACTOR)[None, None] * FACTOR**2, padding=FACTOR - 1
    )[0, 0]  # light is collected over a coarse pixel: sums, not means
    return {
        "super-resolution": SuperResolution(blur, (1, SIDE, SIDE), FACTOR, model_grid=grid),
        "inpainting": Mask(lost(), model_grid=grid),
    }


def picture(operator: Any, data: Tensor) -> Tensor:
    """The data as an image on the fine grid `(1, 1, n_y, n_x)`: pixels repeated, or zeros where nothing was measured."""
    if isinstance(operator, Mask):
        return operator.adjoint(data)
    return data.repeat_interleave(FACTOR, -1).repeat_interleave(FACTOR, -2) / FACTOR**2


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Observe, reconstruct in four ways, score, draw; returns the line of JSON."""
    args = script.parser(__doc__, fast="few sweeps and draws, to see that it runs").parse_args(argv)
    samples, sweeps = (3, 3) if args.fast else (args.samples, 60)
    weights, iterations = (WEIGHTS[3:5], 60) if args.fast else (WEIGHTS, 1000)

    prior = pretrained.load("galaxies-diffusion")
    generator = SersicGalaxies(magnitude=(21.5, 22.5), half_light=(0.3, 0.6), psf_fwhm=0.15)
    truth, other = torch.as_tensor(generator.sample(2, seed=SEED)).float()[:, None]
    examples = torch.as_tensor(generator.sample(20 if args.fast else 200, seed=SEED + 1)).float()

    found: dict[str, dict[str, float]] = {}
    rows = []
    for name, operator in instruments(prior.grid).items():
        # the share is of the brightest datum: sky noise
        clean = operator(truth)
        sigma = NOISE * float(clean.max())
        g = torch.Generator().manual_seed(0)
        data, theirs = (operator(v) + sigma * torch.randn(clean.shape, generator=g) for v in (truth, other))
        shown = picture(operator, data)
        variation, weight = reconstruction.total_variation(
            data, operator, sigma, (other[0], theirs), weights, iterations
        )
        answers = {
            "as it came": reconstruction.Answer(shown[0], None, 0.0),
            "Gaussian field": reconstruction.gaussian_field(data, operator, sigma, examples, samples),
            "total variation": variation,
            "learned prior": reconstruction.learned(data, operator, sigma, prior, samples, sweeps=sweeps, rho_min=0.01),
        }
        scores = {k: reconstruction.figures(operator, truth[0], data, sigma, a) for k, a in answers.items()}
        print(f"{name}, {data[0].numel()} data, sigma {sigma:.3f} nJy, weight of TV {weight:g} per nJy")
        reconstruction.table(scores)
        found |= {f"{name}, {k}": v for k, v in scores.items()}
        rows.append((f"{name}: data", torch.asinh(shown[0, 0]), answers, truth[0]))
    if args.figure:
        left, right, bottom, top = prior.grid.extent
        reconstruction.draw(
            args.figure,
            "a galaxy from coarse pixels, and from half of its pixels (asinh of the flux)",
            rows,
            label="nJy a pixel",
            extent=(left, right, bottom, top),
            axes=("x (arcsec)", "y (arcsec)"),
            stretch=torch.asinh,
        )
    return script.finish({"example": "superresolution", "figures": found, "samples": samples})


if __name__ == "__main__":
    main()
