"""Toys: draws follow the densities, densities integrate to one, entropies are exact."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from invgen.data.toys import Banana, Checkerboard, EightGaussians, Pinwheel, Spirals, Toy, TwoMoons

TOYS = {
    "moons": TwoMoons(),
    "sharp moons": TwoMoons(noise=0.05),
    "spirals": Spirals(),
    "eight": EightGaussians(),
    "eight that overlap": EightGaussians(radius=1.0, sd=0.6),
    "checkerboard": Checkerboard(),
    "six by six": Checkerboard(half=1.5, cells=6),
    "pinwheel": Pinwheel(),
    "three blades": Pinwheel(blades=3, radial=0.2, tangential=0.15, rate=0.5),
    "banana": Banana(),
}


@pytest.mark.parametrize("name", TOYS)
def test_the_mean_negative_log_likelihood_of_draws_is_the_entropy(name: str) -> None:
    toy = TOYS[name]
    x = toy.sample(6_000, seed=1)
    assert x.shape == (6_000, 2)
    value = -toy.log_prob(x)
    assert abs(value.mean() - toy.entropy()) <= 4.5 * value.std() / len(value) ** 0.5 + 1e-6


@pytest.mark.parametrize("name", TOYS)
def test_densities_integrate_to_one(name: str) -> None:
    toy = TOYS[name]
    x = toy.sample(20_000, seed=2)
    low, high = x.min(0) - 1.5, x.max(0) + 1.5
    axes = [np.linspace(a, b, 201)[:-1] + 0.5 * (b - a) / 200 for a, b in zip(low, high, strict=True)]
    grid = np.column_stack([v.ravel() for v in np.meshgrid(*axes)])
    mass = np.exp(toy.log_prob(grid)).sum() * np.prod((high - low) / 200)
    assert mass == pytest.approx(1.0, abs=0.03 if isinstance(toy, Checkerboard) else 1e-3)


@pytest.mark.parametrize("name", TOYS)
def test_draws_fill_the_plane_as_the_density_says(name: str) -> None:
    """Counts in 100 cells against the integral of the density, chi-squared."""
    toy = TOYS[name]
    n = 30_000
    x = toy.sample(n, seed=3).astype(float)
    edges = [np.quantile(x[:2000, k], np.linspace(0.02, 0.98, 11)) for k in (0, 1)]
    counts = np.histogram2d(x[:, 0], x[:, 1], edges)[0]
    fine = 12
    nodes = [np.concatenate([a + (b - a) * (np.arange(fine) + 0.5) / fine for a, b in pairwise(e)]) for e in edges]
    p = np.exp(toy.log_prob(np.column_stack([v.ravel() for v in np.meshgrid(*nodes, indexing="ij")])))
    area = np.outer(np.repeat(np.diff(edges[0]) / fine, fine), np.repeat(np.diff(edges[1]) / fine, fine))
    expected = n * (p.reshape(area.shape) * area).reshape(10, fine, 10, fine).sum((1, 3))
    used = expected > 20
    excess = np.square(counts - expected)[used] / expected[used]
    quadrature = 0.25 * expected[used].mean() if isinstance(toy, Checkerboard) else 0.0  # cells cut by sharp edges
    assert excess.sum() < used.sum() + 5.0 * np.sqrt(2.0 * used.sum()) + quadrature * used.sum()


def test_entropies_in_closed_form() -> None:
    assert Checkerboard().entropy() == pytest.approx(np.log(32.0))
    assert Banana(1.0, 0.7, 1.0).entropy() == pytest.approx(1.0 + np.log(2.0 * np.pi))
    far = EightGaussians(radius=20.0, sd=0.5)
    assert far.entropy() == pytest.approx(np.log(8.0) + 1.0 + np.log(2.0 * np.pi * 0.25), abs=1e-9)
    straight = Pinwheel(blades=1, rate=0.0)
    assert straight.entropy() == pytest.approx(1.0 + np.log(2.0 * np.pi * 4.0 * 0.3 * 0.1), abs=1e-9)


@pytest.mark.parametrize(("noise", "expected"), [(0.1, 1.00758), (0.05, 0.28923)])
def test_the_entropy_of_two_moons_by_another_quadrature(noise: float, expected: float) -> None:
    """H = −∫ w(t) ∫ N(z) ln p(c(t) + noise z): Gauss–Legendre along a moon, Gauss–Hermite across."""
    moons = TwoMoons(noise=noise)
    node, weight = np.polynomial.legendre.leggauss(120)
    z, across = np.polynomial.hermite_e.hermegauss(32)
    across /= across.sum()
    t = 0.5 * np.pi * (node + 1.0)
    centre = np.column_stack([np.cos(t), np.sin(t)])
    noise_xy = noise * np.stack(np.meshgrid(z, z), -1).reshape(-1, 2)
    logs = moons.log_prob((centre[:, None] + noise_xy).reshape(-1, 2)).reshape(120, -1)
    value = -float(0.5 * weight @ logs @ np.outer(across, across).ravel())
    assert moons.entropy() == pytest.approx(value, abs=1e-6)
    assert value == pytest.approx(expected, abs=1e-5)


def test_moons_are_those_of_scikit_learn() -> None:
    """Their equally spaced points have the same density: the same mean and spread of ln p."""
    datasets = pytest.importorskip("sklearn.datasets")
    x, label = datasets.make_moons(20_000, noise=0.1, random_state=0)
    moons = TwoMoons()
    value = -moons.log_prob(x)
    assert abs(value.mean() - moons.entropy()) < 4.5 * value.std() / len(value) ** 0.5
    mine = moons.sample(20_000, seed=1)
    np.testing.assert_allclose(mine.mean(0), x.mean(0), atol=4.5 * np.hypot(*x.std(0)) * (2 / 20_000) ** 0.5)
    np.testing.assert_allclose(np.cov(mine.T), np.cov(x.T), atol=0.03)
    assert 0 < label.mean() < 1


def test_densities_outside_are_zero_or_tiny() -> None:
    assert Checkerboard().log_prob(np.array([[-5.0, 0.0], [-3.0, -1.0]])).tolist() == [-np.inf, -np.inf]
    assert TwoMoons().log_prob(np.array([[50.0, 50.0]]))[0] < -1e5


@pytest.mark.parametrize(
    ("toy", "settings"),
    [(TwoMoons, {"noise": 0.0}), (TwoMoons, {"noise": 0.001}), (Spirals, {"turns": 9.0}), (Spirals, {"noise": -1.0}),
     (EightGaussians, {"sd": 0.0}), (Checkerboard, {"cells": 3}), (Pinwheel, {"blades": 0}), (Pinwheel, {"rate": 2.0}),
     (Banana, {"curvature": float("nan")}), (Banana, {"scale": 0.0})],
)  # fmt: skip
def test_bad_settings_are_refused(toy: type[Toy], settings: dict) -> None:
    with pytest.raises(ValueError, match=r"\.$"):
        toy(**settings)


def test_points_of_another_dimension_are_refused() -> None:
    for toy in TOYS.values():
        with pytest.raises(ValueError, match=r"shape \(n, 2\), got"):
            toy.log_prob(np.zeros((4, 3)))
