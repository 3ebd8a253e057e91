"""Exposures: laid where they are said to lie, blurred and binned as by hand, and better together than apart."""

from __future__ import annotations

import math

import pytest
import torch

from invgen.grid import Grid, check_same_grid
from invgen.noise import GaussianNoise
from invgen.operators import Binning, Convolution, Placement, exposure, sky_grid
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem, Term
from invgen.solvers import ExactGaussian

MODEL = sky_grid((40, 36), 0.05)


def blob(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A smooth, lopsided source, in surface brightness."""
    return torch.exp(-0.5 * (((x - 0.1) / 0.2) ** 2 + ((y + 0.05) / 0.15) ** 2 + x * y / 0.05))


def pixels(grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    y, x = torch.meshgrid(*(torch.from_numpy(grid.coordinates(k)) for k in range(2)), indexing="ij")
    return y, x


def psf(h: int, w: int) -> torch.Tensor:
    k = torch.rand(h, w, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return k / k.sum()


@pytest.mark.parametrize(
    "placement",
    [
        Placement(),
        Placement(0.013, -0.021),
        Placement(0.01, 0.02, rotation=0.6),
        Placement(-0.03, 0.0, rotation=-2.0, scale=1.1, parity=-1.0),
    ],
)
def test_an_exposure_reads_the_model_where_it_lies(placement: Placement) -> None:
    """Against the source itself at the turned and shifted places; cubic interpolation is off by (pixel/width)³."""
    image = sky_grid((14, 12), 0.06)
    A = exposure(MODEL, image, placement=placement, quantity="surface_brightness")
    y, x = pixels(image)
    c, s = math.cos(placement.rotation), math.sin(placement.rotation)
    px = placement.scale * (c * x - s * placement.parity * y) + placement.shift_x
    py = placement.scale * (s * x + c * placement.parity * y) + placement.shift_y
    got = A(blob(*pixels(MODEL))[None, None])[0, 0]
    torch.testing.assert_close(got, blob(py, px), atol=0.01, rtol=0)


@pytest.mark.parametrize("shape", [(3, 3), (4, 5), (7, 2)])
def test_without_a_placement_it_is_a_convolution(shape: tuple[int, int]) -> None:
    x = torch.randn(2, 1, 40, 36, dtype=torch.float64)
    want = Convolution(psf(*shape), (1, 40, 36), "zero")(x)
    torch.testing.assert_close(exposure(MODEL, MODEL, psf=psf(*shape))(x), want)


def test_a_supersampled_psf_is_applied_on_fine_pixels() -> None:
    """By hand: convolve on the fine grid, sum 3 × 3."""
    image = sky_grid((8, 6), 0.15)
    fine = sky_grid((24, 18), 0.05)
    k = psf(7, 8)
    x = torch.randn(2, 1, 24, 18, dtype=torch.float64)
    blurred = Convolution(k, (1, 24, 18), "zero")(x)
    want = blurred.reshape(2, 1, 8, 3, 6, 3).sum((3, 5))
    A = exposure(fine, image, psf=k, psf_oversampling=3)
    torch.testing.assert_close(A(x), want)
    mean = exposure(fine, image, psf=k, psf_oversampling=3, quantity="surface_brightness")
    torch.testing.assert_close(mean(x), want / 9)
    assert A.data_shape == (1, 8, 6)


def test_flux_is_kept_whatever_the_pixels() -> None:
    light = blob(*pixels(MODEL))[None, None]
    image = sky_grid((30, 28), 0.08)
    # samples no further apart than model pixels, or some of them are not seen
    A = exposure(MODEL, image, psf=psf(3, 4), placement=Placement(0.01, -0.03, rotation=0.4), oversampling=4)
    assert float(A(light).sum() / light.sum()) == pytest.approx(1, abs=2e-3)


def test_dithers_together_tell_more_than_apart() -> None:
    """Four exposures half a detector pixel apart: exact posterior sd against the dense formula, and against one alone."""
    grid, coarse = sky_grid((8, 8), 0.05), sky_grid((4, 4), 0.1)
    shifts = [(0.0, 0.0), (0.05, 0.0), (0.0, 0.05), (0.05, 0.05)]
    operators = [
        exposure(grid, coarse, placement=Placement(y, x), oversampling=2, interpolation="bilinear") for y, x in shifts
    ]
    prior = GaussianPrior(torch.zeros(1, 8, 8, dtype=torch.float64), 1.0, grid=grid)
    x = prior.sample(1, seed=3)
    terms = [Term(A(x)[0], A, GaussianNoise(0.1), name=str(k)) for k, A in enumerate(operators)]
    eye = torch.eye(64, dtype=torch.float64).reshape(64, 1, 8, 8)

    def spread(some: list[Term]) -> torch.Tensor:
        rows = torch.cat([t.operator(eye).flatten(1).T for t in some])
        return torch.linalg.inv(rows.T @ rows / 0.01 + torch.eye(64, dtype=torch.float64)).diagonal().sqrt()

    posterior = ExactGaussian().solve(InverseProblem(terms=terms, prior=prior), 2000, seed=0)
    sd = posterior.std().flatten()
    assert ((sd / spread(terms) - 1).abs() < 5 / math.sqrt(4000)).all()
    assert spread(terms).mean() < 0.7 * spread(terms[:1]).mean()


def test_unknown_dithers_are_differentiated() -> None:
    image = sky_grid((10, 9), 0.08)
    A = exposure(MODEL, image, psf=psf(3, 3), free=("shift_y", "rotation"))
    x = blob(*pixels(MODEL))[None, None]
    # away from the lines where a ray changes its cell
    theta = (torch.tensor([0.0131], dtype=torch.float64), torch.tensor([0.217], dtype=torch.float64))
    for t in theta:
        t.requires_grad_()
    assert torch.autograd.gradcheck(lambda s, r: A(x, shift_y=s, rotation=r), theta, eps=1e-7, atol=1e-5)


def test_binning_solves_and_grids() -> None:
    grid = sky_grid((6, 4), 0.1)
    A = Binning((1, 6, 4), 2, model_grid=grid)
    check_same_grid(A.data_grid, sky_grid((3, 2), 0.2), "binned", "coarse")
    rhs = torch.randn(2, 1, 3, 2, dtype=torch.float64)
    x = A.solve(rhs, 0.3, 0.7).x
    torch.testing.assert_close(0.3 * x + A(0.7 * A.adjoint(x)), rhs)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Binning((1, 5, 4), 2), "crop it first"),
        (lambda: Binning((1, 4, 4), 2, "light"), "quantity must be"),
        (lambda: exposure(MODEL, MODEL, psf=2 * psf(3, 3)), "sums to 2"),
        (lambda: exposure(MODEL, sky_grid((4, 4), 0.1), psf=psf(5, 3)), "larger than the image"),
        (lambda: exposure(MODEL, MODEL, psf=psf(3, 3), psf_oversampling=0), "whole number"),
        (lambda: exposure(MODEL, MODEL, psf=psf(3, 3), psf_oversampling=2, free=("shift_y",)), "bin the PSF"),
        (lambda: exposure(MODEL, MODEL, mask=torch.zeros(40, 36, dtype=torch.bool)), "no pixel"),
        (lambda: Placement(scale=0.0), "scale above 0"),
    ],
)
def test_bad_input(call, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()
