"""Meanders grow at the rate of the linear theory, cut their necks and leave what they should; half-circle channels."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from invgen.data import _meanders as meanders
from invgen.data._cutoffs import LOOP, NECK, avulse, cut_loops
from invgen.data.channels import HalfCircleChannels, MeanderingChannels

# One river in the window, straight down to the pixel: no avulsions, no slice below the surface.
LONELY = {"belt_spacing": 20_000.0, "avulsions": 0.0, "level": (0.0, 0.0), "aggradation": (0.0, 0.0)}


def belts(ages: np.ndarray, alpha: float = 0.73) -> meanders.Belts:
    n = len(ages)
    cosine, sine = 0.2 * np.random.default_rng(0).standard_normal((2, n, 12))
    period = np.full(n, 36.0)
    return meanders.Belts(np.full(n, alpha), period, ages, np.zeros(n), cosine, sine, [[] for _ in range(n)])


def points(record: meanders.Record) -> tuple[np.ndarray, ...]:
    return tuple(np.concatenate(v) for v in (record.belt, record.time, record.code, record.x, record.y))


@pytest.mark.parametrize("waves", [1, 2, 3, 5, 8])
def test_a_small_sinusoid_grows_and_travels_as_the_linear_theory_says(waves: int) -> None:
    """κ²(Ω + Γ(1 − a)/(1 − a e^{−iκΔ})) on the nodes, whose limit is κ²(Ω + Γα/(α + iκ))."""
    alpha, count = 0.73, 60
    period, step = count * meanders.SPACING, meanders.SPACING
    wave = 2.0 * np.pi * waves / period
    place = np.arange(count) * step
    small = 1e-5
    nodes = meanders.Nodes(place[None], small * np.cos(wave * place)[None], np.array([count]), np.array([period]))
    rate, _, _ = meanders.migration_rate(nodes.x, nodes.y, np.array([alpha]))
    # The centreline moves by −rate along its left normal, here y: fit dy/dt = Re(growth e^{iκx}).
    moved = -rate[0, meanders.GHOSTS - 1 :][:count] / small
    growth = 2.0 / count * np.sum(moved * np.exp(-1j * wave * place))
    decay, phase = np.exp(-alpha * step), np.exp(-1j * wave * step)
    j = meanders.GHOSTS
    kernel = (1.0 - decay) / (1.0 - decay**j) * (1.0 - (decay * phase) ** j) / (1.0 - decay * phase)
    curvature = 2.0 * (1.0 - np.cos(wave * step)) / step**2
    expected = curvature * (meanders.OMEGA + meanders.GAMMA * kernel)
    np.testing.assert_allclose(growth, expected, rtol=1e-6, atol=1e-6)
    limit = wave**2 * (meanders.OMEGA + meanders.GAMMA * alpha / (alpha + 1j * wave))
    if waves <= 3:  # well sampled
        assert abs(growth - limit) < 0.25 * abs(limit)
        assert growth.real > 0
    if 2.0 * np.pi / wave < 2.0 * np.pi / (1.3 * alpha):
        assert growth.real < 0
    assert np.sign(growth.imag) == np.sign(limit.imag)  # bends travel downstream


def test_bends_grow_into_loops_that_are_cut_off() -> None:
    ages = np.repeat([2.0, 8.0, 20.0], 12)
    belt, time, code, _, y = points(meanders.migrate(belts(ages)))
    final = np.bincount(belt[code == meanders.FINAL], minlength=36) * 0.5 * meanders.SPACING / 36.0
    young, middle, old = final.reshape(3, 12)
    assert young.mean() < 1.35
    assert middle.mean() > 1.5
    assert (old > 1.3).all()
    assert (final < 8.0).all()
    cut = np.array([np.unique(time[(belt == b) & (code == meanders.ABANDONED)]).size for b in range(36)])
    assert cut[:12].sum() == 0
    assert cut[24:].mean() > 1.0
    width = np.array([np.ptp(y[(belt == b) & (code == meanders.FINAL)]) for b in range(36)]).reshape(3, 12).mean(1)
    assert width[0] < width[1] < width[2]


def test_belts_do_not_cross_themselves() -> None:
    """After a run no belt has limbs closer than half a width that are far apart along it."""
    belt, _, code, x, y = points(meanders.migrate(belts(np.full(10, 15.0))))
    for b in range(10):
        own = (belt == b) & (code == meanders.FINAL)
        n = own.sum() // 2  # nodes come before midpoints
        px, py = x[own][:n], y[own][:n]
        dx = px - px[:, None]
        dx -= 36.0 * np.rint(dx / 36.0)
        apart = np.abs(np.arange(n) - np.arange(n)[:, None])
        apart = np.minimum(apart, n - apart)
        assert np.hypot(dx, py - py[:, None])[apart > LOOP].min() > 0.3


def test_a_loop_is_cut_where_its_limbs_meet() -> None:
    t = np.linspace(-1.0, 1.0, 120)
    angle = np.pi * 1.25 * t[np.abs(t) < 0.7]  # an omega: 7/8 of a circle of radius 3 on a straight belt
    loop_x, loop_y = 20.0 + 3.0 * np.sin(angle / 0.9), 3.0 - 3.0 * np.cos(np.pi - angle / 0.9)
    low = loop_y[0]
    left = np.arange(0.0, loop_x[0], 0.6)
    right = np.arange(loop_x[-1] + 0.6, 40.0, 0.6)
    x = np.concatenate([left, loop_x, right])
    y = np.concatenate([np.full(left.size, low), loop_y, np.full(right.size, low)])
    assert np.hypot(loop_x[-1] - loop_x[0], loop_y[-1] - loop_y[0]) < NECK
    new_x, new_y, loops = cut_loops(x, y, 40.0)
    assert len(loops) == 1
    assert np.ptp(loops[0][1]) > 4.0  # the whole loop is abandoned
    assert np.ptp(new_y) < 1.5  # a straight belt is left
    assert new_x.size + loops[0][0].size == x.size + 2  # the two limbs belong to both
    assert cut_loops(new_x, new_y, 40.0)[2] == []


def test_an_avulsion_leaves_at_one_node_and_rejoins_downstream() -> None:
    place = np.arange(0.0, 60.0, 0.5)
    x, y = place, 4.0 * np.sin(2.0 * np.pi * place / 15.0)
    new_x, new_y, (old_x, old_y) = avulse(x, y, 60.0, place=0.25, length=30.0, swing=2.0, phase=0.3, spacing=0.6)
    assert (new_x[0], new_y[0]) == (old_x[0], old_y[0])
    rejoin = np.flatnonzero((new_x == old_x[-1]) & (new_y == old_y[-1]))
    assert rejoin.size == 1
    assert old_x[-1] - old_x[0] == pytest.approx(30.0, abs=0.5)
    new = np.hypot(np.diff(new_x[: rejoin[0] + 1]), np.diff(new_y[: rejoin[0] + 1])).sum()
    assert new < 0.9 * np.hypot(np.diff(old_x), np.diff(old_y)).sum()


def test_the_quantities_are_views_of_the_same_facies() -> None:
    facies = MeanderingChannels(quantity="facies").sample(24, seed=2)
    assert set(np.unique(facies)) == {0.0, 1.0, 2.0, 3.0}
    np.testing.assert_array_equal(MeanderingChannels().sample(24, seed=2), facies >= 2)
    np.testing.assert_array_equal(MeanderingChannels(quantity="sand").sample(24, seed=2), (facies == 1) | (facies == 2))


@pytest.mark.parametrize(("level", "expected"), [(0.0, 240.0), (0.4, 240.0 * 0.6**0.5)])
def test_rivers_are_as_wide_as_stated_at_the_level_of_the_slice(level: float, expected: float) -> None:
    settings = {**LONELY, "level": (level, level), "width": (240.0, 240.0), "age": (2.0, 3.0), "belt_spacing": 4000.0,
                "aggradation": (1.0, 1.0)}  # fmt: skip
    river = MeanderingChannels(shape=(320, 320), spacing=(10.0, 10.0), quantity="facies", **settings)
    images = river.sample(6, seed=1)[:, 0] == 2
    ridge = []
    for image in images:
        inside = ndimage.distance_transform_edt(np.pad(image, 1, mode="edge"))[1:-1, 1:-1]
        ridge += inside[(inside == ndimage.maximum_filter(inside, 15)) & (inside > 4.0)].tolist()
    assert len(ridge) > 20
    # A strip of 2k pixels has its ridge at k, one of 2k + 1 at k + 1.
    assert 10.0 * (2.0 * np.median(ridge) - 0.5) == pytest.approx(expected, abs=12.0)


@pytest.mark.parametrize("azimuth", [-40.0, 0.0, 25.0, 90.0])
def test_valleys_run_along_their_azimuth(azimuth: float) -> None:
    settings = {**LONELY, "belt_spacing": 3000.0, "age": (0.5, 0.5)}
    images = MeanderingChannels(azimuth=(azimuth, azimuth), **settings).sample(16, seed=4)[:, 0]
    smooth = ndimage.gaussian_filter(images, (0, 1, 1))
    gy, gx = np.gradient(smooth, axis=(1, 2))
    # The direction of least change, as an angle from +x towards +y.
    along = 0.5 * np.degrees(np.arctan2(2.0 * (gx * gy).sum(), (gx * gx - gy * gy).sum())) + 90.0
    assert abs((along - azimuth + 90.0) % 180.0 - 90.0) < 6.0


def test_rivers_do_not_end_inside_the_image() -> None:
    images = MeanderingChannels(quantity="facies", **{**LONELY, "age": (7.0, 20.0), "belt_spacing": 9000.0}).sample(60)
    seen = 0
    for image in images[:, 0] == 2:
        labels, count = ndimage.label(image, np.ones((3, 3)))
        border = np.unique(np.concatenate([labels[[0, -1]].ravel(), labels[:, [0, -1]].ravel()]))
        assert set(range(1, count + 1)) <= set(border.tolist())
        seen += count
    assert seen > 20


def test_old_rivers_leave_oxbows_and_point_bars_and_young_ones_do_not() -> None:
    def shares(age: float, **more: tuple[float, float]) -> np.ndarray:
        settings = {**LONELY, "belt_spacing": 3000.0, "age": (age, age), **more}
        facies = MeanderingChannels(quantity="facies", **settings).sample(32, seed=5)
        return np.bincount(facies.astype(int).ravel(), minlength=4) / facies.size

    young, old = shares(1.0), shares(20.0)
    assert young[3] == 0.0
    assert young[1] < 0.03
    assert old[3] > 0.02
    assert old[1] > 0.15
    buried = shares(20.0, aggradation=(3.0, 3.0), level=(0.2, 0.2))  # the slice holds the last fifteenth of the life
    assert buried[1] < 0.4 * old[1]


def test_avulsions_leave_abandoned_reaches() -> None:
    settings = {**LONELY, "belt_spacing": 3000.0, "age": (6.0, 6.0), "quantity": "facies"}
    never = MeanderingChannels(**settings).sample(32, seed=6)
    often = MeanderingChannels(**{**settings, "avulsions": 2.0}).sample(32, seed=6)
    assert (often == 3).mean() > (never == 3).mean() + 0.02


def test_a_window_of_a_large_image_is_a_small_image() -> None:
    """Stationarity: the same proportion everywhere, the same proportion and variogram from windows of larger images."""
    small = MeanderingChannels().sample(110, seed=8)[:, 0]
    large = MeanderingChannels(shape=(64, 160)).sample(55, seed=9)[:, 0]

    def differs(a: np.ndarray, b: np.ndarray) -> float:
        return abs(a.mean() - b.mean()) / np.hypot(a.std() / len(a) ** 0.5, b.std() / len(b) ** 0.5)

    assert differs(small.mean((1, 2)), large.mean((1, 2))) < 4.5
    for lag in (2, 6, 16):
        a = np.square(small[:, :, lag:] - small[:, :, :-lag]).mean((1, 2))
        b = np.square(large[:, :, lag:] - large[:, :, :-lag]).mean((1, 2))
        assert differs(a, b) < 4.5
    for window in (np.s_[:, :20], np.s_[:, -20:]):  # within an image: first rows, last rows against the whole
        gap = small[window].mean((1, 2)) - small.mean((1, 2))
        assert abs(gap.mean()) < 4.5 * gap.std() / len(gap) ** 0.5


def test_sizes_are_metres_whatever_the_pixels() -> None:
    coarse = MeanderingChannels(shape=(48, 48), spacing=(50.0, 50.0)).sample(32, seed=3).mean((1, 2, 3))
    fine = MeanderingChannels(shape=(96, 60), spacing=(25.0, 40.0)).sample(32, seed=3).mean((1, 2, 3))
    assert np.abs(coarse - fine).mean() < 0.01  # the same rivers on another grid


def test_rivers_thinner_than_a_pixel_are_refused() -> None:
    with pytest.raises(ValueError, match="less than one pixel"):
        MeanderingChannels(spacing=(150.0, 150.0))


def test_half_circles_cover_the_wanted_share() -> None:
    """A Boolean model: every point is sand with probability p exactly."""
    for wanted in (0.2, 0.5):
        share = HalfCircleChannels(proportion=(wanted, wanted)).sample(200, seed=1).mean((1, 2, 3))
        assert abs(share.mean() - wanted) < 4.5 * share.std() / len(share) ** 0.5


def test_half_circles_have_flat_tops() -> None:
    sections = HalfCircleChannels(proportion=(0.01, 0.01), radius=(80.0, 80.0)).sample(100, seed=2)[:, 0]
    seen = 0
    for section in sections:
        labels, _ = ndimage.label(section)
        for rows, columns in ndimage.find_objects(labels):
            body = labels[rows, columns] > 0
            inside = rows.start > 0 and rows.stop < 64 and columns.start > 0 and columns.stop < 128
            width = body.sum(1)
            if inside and len(width) <= 9 and width.max() <= 17:  # no second one touches it
                assert width[0] == width.max()
                assert (np.diff(width) <= 0).all()
                assert abs(width[0] * 10.0 - 160.0) <= 10.0
                assert abs(len(width) * 10.0 - 80.0) <= 10.0
                seen += 1
    assert seen > 5


def test_half_circle_properties_follow_the_facies() -> None:
    everything = HalfCircleChannels(quantity="all").sample(20, seed=3)
    facies, velocity, density = np.moveaxis(everything, 1, 0)
    for quantity, values in (("facies", facies), ("velocity", velocity), ("density", density)):
        np.testing.assert_array_equal(HalfCircleChannels(quantity=quantity).sample(20, seed=3)[:, 0], values)
    assert velocity[facies == 1].min() >= 2.6
    assert velocity[facies == 1].max() <= 2.9
    assert velocity[facies == 0].min() >= 1.6
    assert velocity[facies == 0].max() <= 2.0
    layer = np.where(facies == 0, velocity, np.nan)
    assert np.nanmax(np.nanmax(layer[:, 5:], axis=2) - np.nanmin(layer[:, 5:], axis=2)) == 0.0  # one value a layer
    scatter = density / (1.741 * velocity**0.25)
    assert abs(scatter.mean() - 1.0) < 0.01
    assert 0.01 < scatter.std() < 0.03
