"""Facies seen at points: always honoured, and the rest has its conditional law."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, truncnorm

from invgen.facies_data import _sequential_start, _truncated, facies_given
from invgen.grid import Grid
from invgen.priors.covariance_models import Exponential, Matern, Spherical
from invgen.priors.lithotypes import Cut
from invgen.priors.plurigaussian import Plurigaussian
from invgen.priors.random_field import RandomField

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:The practical range")
TREE, SHARES = Cut(1, "clay", Cut(2, "silt", "sand")), {"clay": 0.4, "silt": 0.25, "sand": 0.35}


def test_the_conditional_law_on_a_case_that_can_be_integrated():
    """Nodes 0 and 2 of 4 seen: probabilities of node 1's facies by rectangle probabilities; 2000 chains, |z| < 4.5."""
    grid = Grid((4,), (1.0,))
    one, two = Exponential(length=5.0), Spherical(length=7.0)
    prior = Plurigaussian(TREE, SHARES, RandomField(one, grid), RandomField(two, grid))
    codes = [2, 0]
    x = facies_given(prior, np.array([[0.0], [2.0]]), np.array(codes), 2000, sweeps=30, seed=1)
    assert bool((x[:, 0, 0] == 2).all())
    assert bool((x[:, 0, 2] == 0).all())
    lags = np.array([[[0.0], [1.0], [2.0]], [[1.0], [0.0], [1.0]], [[2.0], [1.0], [0.0]]])
    weight = []
    for k in range(3):
        p = 1.0
        for axis, model in enumerate((one, two)):
            boxes = [prior.rule.rectangles[c] for c in (2, k, 0)]
            low, high = ([float(b[2 * axis + e].clamp(-9, 9)) for b in boxes] for e in (0, 1))
            p *= multivariate_normal(np.zeros(3), model(lags), maxpts=300_000, abseps=1e-8).cdf(high, lower_limit=low)
        weight.append(p)
    weight = np.array(weight) / np.sum(weight)
    found = np.array([float((x[:, 0, 1] == k).double().mean()) for k in range(3)])
    z = (found - weight) / np.sqrt(weight * (1 - weight) / 2000)
    assert np.abs(z).max() < 4.5
    torch.testing.assert_close(
        facies_given(prior, np.array([[0.0], [2.0]]), np.array(codes), 5, sweeps=30, seed=1), x[:5]
    )


def test_many_data_on_a_map_of_proportions_are_honoured():
    grid = Grid((20, 20), (5.0, 5.0))
    ramp = torch.linspace(0.2, 0.7, 20, dtype=torch.float64)[:, None].expand(20, 20)
    prior = Plurigaussian(
        Cut(1, "clay", "sand"), {"clay": ramp, "sand": 1 - ramp}, RandomField(Exponential(length=20.0), grid)
    )
    truth = prior.sample(1, seed=4)
    rng = np.random.default_rng(0)
    nodes = rng.integers(0, 20, (60, 2))
    seen = truth[0, 0][nodes[:, 0], nodes[:, 1]].numpy()
    x = facies_given(prior, 5.0 * nodes, seen, 8, sweeps=20)
    assert bool((x[:, 0][:, nodes[:, 0], nodes[:, 1]] == torch.from_numpy(seen)).all())
    assert float((x == truth).double().mean()) > 0.6


def test_truncated_normal_is_the_quantile_function():
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    y = _truncated(torch.full((99,), 0.5, dtype=torch.float64), *torch.tensor([0.8, -0.3, 1.9], dtype=torch.float64), u)
    expected = truncnorm.ppf(u.numpy(), -1.0, 1.75, loc=0.5, scale=0.8)
    np.testing.assert_allclose(y.numpy(), expected, atol=1e-9)


def test_truncated_normal_in_both_tails():
    u = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    for a, b in ((6.0, 7.0), (-7.0, -6.0), (-1.0, 2.0), (30.0, math.inf)):
        y = _truncated(torch.zeros(999, dtype=torch.float64), torch.tensor(1.0), torch.tensor(a), torch.tensor(b), u)
        assert bool(((y >= a) & (y <= b)).all())
        assert bool((y[1:] >= y[:-1]).all() or (y[1:] <= y[:-1]).all())


def test_bad_data():
    grid = Grid((6, 6), (1.0, 1.0))
    field = RandomField(Exponential(length=1.0), grid)
    prior = Plurigaussian(TREE, SHARES, field, field)
    here = np.array([[0.0, 0.0], [3.0, 3.0]])
    for points, codes, words in (
        (here, [0, 5], "whole numbers"),
        (here, [0, math.nan], "whole numbers"),
        (here[[0, 0]], [0, 1], "contradict"),
        (here + 20, [0, 1], "outside"),
        (here, [0], "one code"),
    ):
        with pytest.raises(ValueError, match=words):
            facies_given(prior, points, np.array(codes), 2)
    with pytest.raises(ValueError, match="independent"):
        facies_given(Plurigaussian(TREE, SHARES, field, field, correlation=0.3), here, np.array([0, 1]), 2)


def test_a_smooth_well_has_the_variance_of_its_field_from_the_start():
    """Open intervals leave N(0, K): variance of the mean of 20 neighbours of 4000 draws, without any sweep, |z| < 4."""
    factor = torch.linalg.cholesky(
        torch.from_numpy(Matern(nu=1.5, length=8.0)(np.subtract.outer(np.arange(20.0), np.arange(20.0))[..., None]))
        + 1e-9 * torch.eye(20, dtype=torch.float64)
    )
    wide = torch.full((20,), math.inf, dtype=torch.float64)
    u = torch.rand(4000, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = _sequential_start(factor, -wide, wide, u)
    right = float((factor @ factor.mT).mean())
    assert abs(float(y.mean(1).var()) / right - 1) < 4 * math.sqrt(2 / 4000)


def test_facies_that_a_smooth_field_can_hardly_have_are_honoured_or_refused():
    grid = Grid((12,), (1.0,))
    prior = Plurigaussian(Cut(1, "a", "b"), {"a": 0.3, "b": 0.7}, RandomField(Matern(nu=2.5, length=4.0), grid))
    places, codes = np.array([[2.0], [3.0], [4.0], [5.0]]), np.array([0, 1, 0, 1])
    try:
        x = facies_given(prior, places, codes, 64, sweeps=20, seed=0)
    except ValueError as error:
        assert "do not honour" in str(error)  # noqa: PT017
    else:
        assert bool((x[:, 0, 2:6] == torch.from_numpy(codes)).all())
