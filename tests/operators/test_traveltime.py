"""Straight rays against line integrals computed another way."""

import numpy as np
import pytest
import torch

from invgen.grid import Grid
from invgen.operators import StraightRays

F64 = torch.float64


def sampled_integral(grid, field, a, b, n=400_000):
    """∫ s dl by the midpoint rule: the error is about one sample for each border crossed."""
    t = (np.arange(n) + 0.5) / n
    points = a + t[:, None] * (b - a)
    index = [
        np.clip(np.floor((points[:, k] - grid.origin[k]) / grid.spacing[k] + 0.5), 0, grid.shape[k] - 1).astype(int)
        for k in range(len(grid.shape))
    ]
    return field[tuple(index)].mean() * np.linalg.norm(b - a)


@pytest.mark.parametrize("shape", [(7, 5), (4, 3, 5)])
def test_times_are_line_integrals_of_slowness(shape):
    rng = np.random.default_rng(3)
    spacing, origin = rng.uniform(0.5, 3.0, len(shape)), rng.uniform(-5, 5, len(shape))
    grid = Grid(shape, tuple(spacing), tuple(origin))
    low = origin - 0.5 * spacing
    size = np.array(shape) * spacing
    a, b = low + rng.random((12, len(shape))) * size, low + rng.random((12, len(shape))) * size
    field = rng.uniform(0.1, 1.0, shape)
    rays = StraightRays(grid, a, b)
    times = rays(torch.from_numpy(field)[None, None])[0].numpy()
    truth = np.array([sampled_integral(grid, field, p, q) for p, q in zip(a, b, strict=True)])
    np.testing.assert_allclose(times, truth, rtol=2e-4)
    # a constant field: the lengths add up to the ray's, exactly
    lengths = rays(torch.ones(1, 1, *shape, dtype=F64))[0].numpy()
    np.testing.assert_allclose(lengths, np.linalg.norm(b - a, axis=1), rtol=1e-12)


def clipped(grid, a, b):
    """Lengths of rays in cells by clipping every ray to every cell (Liang & Barsky), `(rays, cells)`."""
    enter, leave = np.zeros((len(a), *grid.shape)), np.ones((len(a), *grid.shape))
    for axis, n in enumerate(grid.shape):
        edges = grid.origin[axis] + (np.arange(n + 1) - 0.5) * grid.spacing[axis]
        at = (edges[None] - a[:, axis, None]) / (b - a)[:, axis, None]
        wide = (slice(None), *(slice(None) if k == axis else None for k in range(len(grid.shape))))
        enter = np.maximum(enter, np.minimum(at[:, 1:], at[:, :-1])[wide])
        leave = np.minimum(leave, np.maximum(at[:, 1:], at[:, :-1])[wide])
    return np.maximum(leave - enter, 0.0).reshape(len(a), -1) * np.linalg.norm(b - a, axis=1)[:, None]


@pytest.mark.parametrize("shape", [(17, 12), (5, 6, 4)])
def test_every_length_is_that_of_the_ray_clipped_to_the_cell(shape):
    rng = np.random.default_rng(5)
    spacing, origin = rng.uniform(0.5, 3.0, len(shape)), rng.uniform(-5, 5, len(shape))
    grid = Grid(shape, tuple(spacing), tuple(origin))
    a, b = (origin + (rng.random((60, len(shape))) * shape - 0.5) * spacing for _ in range(2))
    want = clipped(grid, a, b)
    assert np.abs(StraightRays(grid, a, b).to_dense().numpy() - want).max() < 1e-12 * want.max()


def test_rays_along_an_axis_and_along_a_border_keep_their_length():
    grid = Grid((3, 4), (1.0, 2.0))
    rays = StraightRays(grid, [[1.0, -1.0], [0.5, -1.0], [-0.5, 2.0]], [[1.0, 7.0], [0.5, 7.0], [2.5, 2.0]])
    dense = rays.to_dense()
    np.testing.assert_allclose(dense.sum(1).numpy(), [8.0, 8.0, 3.0])
    np.testing.assert_allclose(dense[0].reshape(3, 4)[1].numpy(), [2.0] * 4)


def test_crosshole_has_every_pair_of_depths():
    grid = Grid((64, 64), (1.0, 1.0))
    rays = StraightRays.crosshole(grid, 24, 24)
    assert rays.data_shape == (576,)
    lengths = rays.to_dense().sum(1).reshape(24, 24)
    np.testing.assert_allclose(lengths.diagonal().numpy(), 64.0)
    np.testing.assert_allclose(float(lengths[0, 23]), np.hypot(64.0, 64.0 * 23 / 24))


@pytest.mark.parametrize(
    ("source", "receiver", "words"),
    [
        ([[9.0, 0.0]], [[0.0, 0.0]], "1 of 1 rays end outside"),
        ([[0.0, 0.0]], [[0.0, 0.0]], "no length"),
        ([[0.0, np.nan]], [[0.0, 0.0]], "finite"),
        ([[0.0, 0.0], [1.0, 1.0]], [[0.0, 1.0]], "one pair a ray"),
    ],
)
def test_rays_that_cannot_be(source, receiver, words):
    with pytest.raises(ValueError, match=words):
        StraightRays(Grid((4, 4), (1.0, 1.0)), source, receiver)
