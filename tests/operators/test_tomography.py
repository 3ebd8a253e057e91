"""CT: line integrals of discs, the two geometries against each other, filtered back-projection, bad input."""

import math
import pickle

import numpy as np
import pytest
import torch

from invgen.grid import Grid
from invgen.linalg import dot_test
from invgen.operators import FanBeamCT, ParallelBeamCT

torch.set_num_threads(1)


def disc(n: int, radius: float, y: float, x: float, fine: int = 8) -> torch.Tensor:
    """Share of every pixel that lies in a disc, `(1, 1, n, n)`; pixels of size one around the middle."""
    s = (np.arange(n * fine) + 0.5) / fine - n / 2
    inside = ((s[:, None] - y) ** 2 + (s[None] - x) ** 2 <= radius**2).astype(float)
    return torch.from_numpy(inside.reshape(n, fine, n, fine).mean((1, 3)))[None, None]


def chords(operator, radius: float, y: float, x: float, rays: int) -> torch.Tensor:
    """Chords of the disc, the mean of `rays` rays a cell; from the rays' definition, not from the matrix."""
    middle = (np.arange(operator.cells) - (operator.cells - 1) / 2) * operator.cell_width
    rows = []
    for angle in operator.angles.tolist():
        total = np.zeros(operator.cells)
        for share in (np.arange(rays) + 0.5) / rays - 0.5:
            p = middle + share * operator.cell_width
            if isinstance(operator, FanBeamCT):
                # a line through the source and a detector point, as two points of the plane
                along = np.array([-math.sin(angle), math.cos(angle)])
                across = np.array([math.cos(angle), math.sin(angle)])
                source = -operator.source_distance * along
                ends = operator.detector_distance * along + p[:, None] * across
                d = (ends - source) / np.linalg.norm(ends - source, axis=1, keepdims=True)
                distance = d[:, 0] * (y - source[1]) - d[:, 1] * (x - source[0])
            else:
                distance = p - (x * math.cos(angle) + y * math.sin(angle))
            total += 2 * np.sqrt(np.clip(radius**2 - distance**2, 0, None)) / rays
        rows.append(total)
    return torch.from_numpy(np.stack(rows))


GEOMETRIES = {
    "parallel strip": (lambda n: ParallelBeamCT((1, n, n), 30), 16),
    "parallel line": (lambda n: ParallelBeamCT((1, n, n), 30, footprint="line"), 1),
    "fan strip": (lambda n: FanBeamCT((1, n, n), 30, 1.5 * n, 0.5 * n), 16),
    "fan line": (lambda n: FanBeamCT((1, n, n), 30, 1.5 * n, 0.5 * n, footprint="line"), 1),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_line_integrals_of_a_disc(name):
    make, rays = GEOMETRIES[name]
    operator = make(128)
    radius, y, x = 41.3, -8.6, 11.4
    want = chords(operator, radius, y, x, rays)
    error = operator(disc(128, radius, y, x))[0, 0] - want
    assert (
        float(error.norm() / want.norm()) < 0.01
    )  # staircases: 0.5 % at a radius of 80 pixels, measured in benchmarks
    assert abs(float(error.sum() / want.sum())) < 1e-3


@pytest.mark.parametrize("footprint", ["strip", "line"])
def test_a_pixel_is_cut_like_a_square(footprint):
    """One pixel 3 × 2 under 0.7 rad: chords by clipping the ray to the rectangle, on its own code path."""
    angle = 0.7
    operator = ParallelBeamCT(
        (1, 1, 1),
        torch.tensor([angle], dtype=torch.float64),
        cells=80,
        cell_width=0.05,
        spacing=(3.0, 2.0),
        footprint=footprint,
    )
    got = operator(torch.ones(1, 1, 1, 1, dtype=torch.float64))[0, 0, 0].numpy()

    def chord(s: float) -> float:
        # p = s n + t u, |x| <= 1, |y| <= 1.5
        low, high = -np.inf, np.inf
        for start, step, half in (
            (s * math.cos(angle), -math.sin(angle), 1.0),
            (s * math.sin(angle), math.cos(angle), 1.5),
        ):
            a, b = sorted(((-half - start) / step, (half - start) / step))
            low, high = max(low, a), min(high, b)
        return max(0.0, high - low)

    middle = (np.arange(80) - 39.5) * 0.05
    if footprint == "line":
        want = np.array([chord(s) for s in middle])
        np.testing.assert_allclose(got, want, atol=1e-12)
    else:
        fine = (np.arange(400) + 0.5) / 400 - 0.5
        want = np.array([np.mean([chord(s + 0.05 * f) for f in fine]) for s in middle])
        np.testing.assert_allclose(got, want, atol=1e-5)
        assert got.sum() * 0.05 == pytest.approx(6.0, rel=1e-12)  # the area of the pixel


def test_rays_along_the_axes_sum_rows_and_columns():
    """Angle 0 looks along y, π/2 along x, and no pixel on a border is counted twice or lost."""
    x = torch.randn(1, 1, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for footprint in ("strip", "line"):
        d = ParallelBeamCT(
            (1, 5, 4), torch.tensor([0.0, math.pi / 2], dtype=torch.float64), cells=9, footprint=footprint
        )(x)[0, 0]
        # five rows fit nine cells; four columns fall between them, by halves
        torch.testing.assert_close(d[1, 2:7], x[0, 0].sum(1), rtol=0, atol=1e-5)
        columns = torch.nn.functional.pad(x[0, 0].sum(0), (1, 1))
        torch.testing.assert_close(d[0, 2:7], 0.5 * (columns[1:] + columns[:-1]), rtol=0, atol=1e-5)


def test_a_fan_from_far_away_is_parallel():
    x = disc(24, 7.0, 2.0, -3.0)
    angles = torch.tensor([0.3, 2.1, 4.4])
    near = ParallelBeamCT((1, 24, 24), angles, cells=41)(x)
    far = FanBeamCT((1, 24, 24), angles, 1e7, 0.0, cells=41, cell_width=1.0)(x)
    torch.testing.assert_close(far, near, rtol=0, atol=1e-4)


def test_spacing_and_channels():
    grid = Grid((12, 10), (0.5, 0.5), axes=("y", "x"), units=("mm", "mm"), channels=("a", "b"))
    x = torch.rand(3, 2, 12, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    both = ParallelBeamCT((2, 12, 10), 7, model_grid=grid)(x)
    single = ParallelBeamCT((1, 12, 10), 7)(x[:, 1:])
    torch.testing.assert_close(both[:, 1:], 0.5 * single)  # half the length, and cells half as wide


@pytest.mark.parametrize("operator", [ParallelBeamCT((1, 64, 64), 180), FanBeamCT((1, 64, 64), 200, 70.0, 40.0)])
def test_filtered_back_projection_of_a_disc(operator):
    truth = disc(64, 18.0, 4.0, -6.0)
    found = operator.filtered_back_projection(operator(truth))[0, 0]
    inside, outside = disc(64, 14.0, 4.0, -6.0)[0, 0] == 1, disc(64, 22.0, 4.0, -6.0)[0, 0] == 0
    assert float(found[inside].mean()) == pytest.approx(1.0, abs=2e-3)
    assert abs(float(found[outside].mean())) < 2e-3
    smooth = operator.filtered_back_projection(operator(truth), "hann")[0, 0]
    assert float(smooth[inside].mean()) == pytest.approx(1.0, abs=5e-3)


def test_uneven_views_are_weighted_by_their_gaps():
    truth = disc(64, 18.0, 4.0, -6.0)
    even = torch.arange(90, dtype=torch.float64) * math.pi / 90
    uneven = torch.cat([even, even[:30] + math.pi / 180])  # a third of the range twice as dense
    found = ParallelBeamCT((1, 64, 64), uneven)
    inside = disc(64, 14.0, 4.0, -6.0)[0, 0] == 1
    assert float(found.filtered_back_projection(found(truth))[0, 0][inside].mean()) == pytest.approx(1, abs=0.01)


def test_the_exact_adjoint_at_full_size():
    operator = ParallelBeamCT((1, 96, 80), 12)
    g = torch.Generator().manual_seed(3)
    u = torch.randn(2, 1, 96, 80, generator=g, dtype=torch.float64)
    v = torch.randn(2, 1, 12, operator.cells, generator=g, dtype=torch.float64)
    assert dot_test(operator, operator.adjoint, u, v) <= 1e-12


def test_pickles_leave_the_matrix_out():
    operator = ParallelBeamCT((1, 64, 64), 30)
    operator(torch.zeros(1, 1, 64, 64))
    assert len(pickle.dumps(operator)) < 10_000


def test_direct_solve_in_float32_follows_float64():
    operator = ParallelBeamCT((1, 16, 16), 6)
    m = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(2))
    found = operator.solve_model(m, 1e-4, 1.0)
    assert found.iterations == 0
    want = operator.solve_model(m.double(), 1e-4, 1.0).x
    torch.testing.assert_close(found.x.double(), want, rtol=0, atol=1e-3 * float(want.abs().max()))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ParallelBeamCT((4, 4), 3), r"\(channels, n_y, n_x\)"),
        (lambda: ParallelBeamCT((1, 4, 4), 0), "at least one view"),
        (lambda: ParallelBeamCT((1, 4, 4), torch.tensor([0.0, float("nan")])), "finite angles"),
        (lambda: ParallelBeamCT((1, 4, 4), torch.arange(0.0, 180.0, 3.0)), "radians"),
        (lambda: ParallelBeamCT((1, 4, 4), 3, cell_width=0.0), "positive width"),
        (lambda: ParallelBeamCT((1, 4, 4), 3, spacing=(1.0, -1.0)), "positive pixel sizes"),
        (lambda: ParallelBeamCT((1, 4, 4), 3, footprint="pixel"), "footprint"),
        (lambda: FanBeamCT((1, 4, 4), 3, 2.0), "outside"),
        (lambda: FanBeamCT((1, 4, 4), 3, 9.0, -1.0), "behind"),
        (
            lambda: FanBeamCT((1, 4, 4), torch.arange(20) * 0.1, 9.0).filtered_back_projection(
                torch.zeros(1, 1, 20, 6)
            ),
            "circle",
        ),
        (lambda: ParallelBeamCT((1, 4, 4), 3).filtered_back_projection(torch.zeros(1, 1, 3, 6), "hat"), "window"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(ValueError, match=words):
        make()
