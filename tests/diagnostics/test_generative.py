"""Comparing sets of fields: equal laws have ratios near one, planted differences are found where they were planted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from invgen.diagnostics.generative import bits_per_dim, compare_fields, latent_path, memorisation, typicality


def _blobs(n, seed, *, shift=0.0, wide=2.0):
    """Thresholded smooth fields, 0/1."""
    g = torch.Generator().manual_seed(seed)
    lag = (torch.arange(24)[:, None] - torch.arange(24)).abs().double()
    root = torch.linalg.cholesky(torch.exp(-((lag / wide) ** 2) / 2) + 1e-6 * torch.eye(24, dtype=torch.float64))
    x = root @ torch.randn(n, 24, 24, generator=g, dtype=torch.float64) @ root.T
    return (x > 0.4 - shift).float()[:, None]


def test_equal_laws_have_ratios_near_one():
    """Distance and floor have one law: the ratio of single distances has a spread of 30 % here, means of splits less."""
    result = compare_fields(_blobs(300, 1), _blobs(600, 2), splits=6, projections=50)
    assert result.n == 300
    assert all(0.3 < r < 3 for r in result.ratios.values()), result.ratios
    assert "connectivity" in result.table()


@pytest.mark.parametrize(
    ("change", "statistic"),
    [({"shift": 0.25}, "proportions"), ({"wide": 3.0}, "variogram"), ({"wide": 1.2}, "patterns")],
)
def test_planted_differences_are_found(change, statistic):
    result = compare_fields(_blobs(300, 1, **change), _blobs(600, 2), splits=4, projections=50)
    assert result.ratios[statistic] > 3


def test_repeated_examples_are_seen():
    train, held = _blobs(400, 3), _blobs(200, 4)
    fresh = memorisation(_blobs(200, 5), train, held)
    assert 0.9 < fresh.ratio < 1.1
    assert fresh.closer < 0.08
    copied = memorisation(train[:200], train, held)
    assert copied.ratio == pytest.approx(0.0, abs=1e-3)
    assert copied.closer == 1.0
    assert copied.nearest.tolist() == list(range(200))


def test_latent_path_keeps_radii_and_ends():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 50, generator=g, dtype=torch.float64)
    path = latent_path(lambda z: z, a, b, 5)
    torch.testing.assert_close(path[0], a)
    torch.testing.assert_close(path[-1], b)
    radii = path.flatten(1).norm(dim=1)
    torch.testing.assert_close(radii, torch.linspace(float(a.norm()), float(b.norm()), 5, dtype=torch.float64))


def test_bits_per_dim_of_the_uniform_law():
    """Uniform on [0, 1] known to 1/256: eight bits an entry."""
    np.testing.assert_allclose(bits_per_dim(np.zeros(3), 16, 1 / 256), 8.0)
    gaussian = -0.5 * 10 * math.log(2 * math.pi * math.e)
    np.testing.assert_allclose(bits_per_dim([gaussian], 10), 0.5 * math.log2(2 * math.pi * math.e))


def test_the_densest_point_is_not_typical():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 100, generator=g, dtype=torch.float64)
    log_prob = -0.5 * x.square().sum(1)
    scores = typicality([0.0, float(log_prob.median()), -200.0], log_prob)
    assert scores["low"][0] == 1.0
    assert scores["typical"][0] < 0.01
    assert scores["typical"][1] > 0.9
    assert scores["low"][2] < 0.01


def test_a_picture(tmp_path):
    figure = compare_fields(_blobs(60, 1), _blobs(120, 2), splits=2, projections=20).plot()
    figure.savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_errors():
    with pytest.raises(ValueError, match="one size"):
        compare_fields(np.zeros((10, 8, 8)), np.zeros((10, 9, 8)))
    with pytest.raises(ValueError, match="entries each"):
        memorisation(np.zeros((2, 3)), np.zeros((2, 4)), np.zeros((2, 4)))
