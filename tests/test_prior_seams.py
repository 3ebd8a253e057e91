"""A 64 × 64 prior at 256 × 256: a seam is measured as large as it is, none as none, and moving the noise changes no law."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from invgen.priors import DiffusionPrior
from invgen.streams import Streams

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCALED = ("variance along x", "variogram at lag 1 along x")  # the figures of the two columns beside a border alone


@pytest.fixture(scope="module")
def priors() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("priors")
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("priors", "real_priors", "harness"):
            sys.modules.pop(name, None)


class Smooth(nn.Module):
    """A stationary Gaussian field of variance 1, periodic: white noise averaged over 5 × 5 pixels."""

    def __init__(self, size: int = 256) -> None:
        super().__init__()
        self.shape, self.latent_steps = (1, size, size), 1
        self.anchor = nn.Parameter(torch.zeros(1))

    def decode(self, z: Tensor) -> Tensor:
        return sum(z.roll((i, j), (2, 3)) for i in range(5) for j in range(5)) / 5


@pytest.fixture(scope="module")
def independent() -> Tensor:
    """`(24, 1, 256, 256)`: 24 groups of one image."""
    return Smooth().decode(torch.randn(24, 1, 256, 256, generator=torch.Generator().manual_seed(0))).double()


def test_a_seam_is_as_large_as_it_is(priors: ModuleType, independent: Tensor) -> None:
    x = independent.clone()
    x[..., [63, 64, 127, 128, 191, 192]] *= math.sqrt(1.5)  # half as much variance again beside each border
    value, error, which = priors.seam_difference(x)
    assert which in SCALED
    assert error < 0.05
    assert abs(value - 0.5) < 3.5 * error


def test_without_seams_no_more_is_found_than_the_noise(priors: ModuleType, independent: Tensor) -> None:
    value, error, _ = priors.seam_difference(independent)
    assert value < 5 * error  # the largest of 18, the error itself known to 15 %


def test_moved_noise_gives_the_same_figures_with_less_noise(priors: ModuleType, independent: Tensor) -> None:
    moved = priors.moved_draws(Smooth(), 4, moves=32, step=66).double()
    assert moved.shape == (4, 32, 256, 256)
    torch.testing.assert_close(moved[1, 3], moved[1, 0].roll((198, 198), (0, 1)))
    few, error, _ = priors.seam_difference(moved)
    many, noise, _ = priors.seam_difference(independent)
    assert max(few, error) < 0.02 < max(many, noise)
    # a seam stays what it is
    moved[..., [63, 64, 127, 128, 191, 192]] *= math.sqrt(1.5)
    value, _, which = priors.seam_difference(moved)
    assert which in SCALED
    assert value == pytest.approx(0.5, abs=0.03)


def test_images_at_the_first_place_are_the_draws_of_sample(priors: ModuleType) -> None:
    prior = DiffusionPrior.examples()[0]
    found = priors.moved_draws(prior, 2, moves=2, step=8, seed=5)
    torch.testing.assert_close(found[:, 0], prior.sample(2, seed=5, steps=32)[:, 0])
    moved = Streams(5, [1]).normal(prior.shape, dtype=torch.float32).roll((8, 8), (2, 3))
    torch.testing.assert_close(found[1, 1], prior.decode(moved)[0, 0])


def test_power_is_compared_with_the_error_of_both_sides(priors: ModuleType) -> None:
    generator = torch.Generator().manual_seed(1)
    x = 2 * torch.randn(30, 4, 32, 32, generator=generator, dtype=torch.float64)
    y = torch.randn(200, 32, 32, generator=generator, dtype=torch.float64)
    value, error = priors.spectrum_difference(x, y)
    # ring 1 holds the fewest wavenumbers: 8, in pairs; 120 and 200 images
    assert error < 4 * math.sqrt(1 / 480 + 1 / 800) * 1.5
    assert abs(value - 3) < 4 * error
