"""Velocity families do what their names say."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from invgen.data.velocity import VelocityFamily, VelocityModels

FAMILIES = get_args(VelocityFamily)
LAYERED = [f for f in FAMILIES if not f.startswith("Style")]


def draw(family: str, n: int = 60, **settings: object) -> np.ndarray:
    return VelocityModels(family, **settings).sample(n, seed=1)[:, 0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(70, 70), (32, 96), (90, 20), (2, 2)])
def test_velocities_stay_in_range_on_any_grid(family: str, shape: tuple[int, int]) -> None:
    v = draw(family, 12, shape=shape, velocity=(1.5, 4.5))
    assert v.shape == (12, *shape)
    assert v.min() >= 1.5
    assert v.max() <= 4.5
    assert draw(family, 3, velocity=(2.0, 2.5)).max() <= 2.5


@pytest.mark.parametrize("family", LAYERED)
@pytest.mark.parametrize(("fewest", "most"), [(2, 5), (1, 1), (12, 12)])
def test_models_have_as_many_velocities_as_layers(family: str, fewest: int, most: int) -> None:
    counts = [np.unique(v).size for v in draw(family, 40, layers=(fewest, most), shape=(200, 30))]
    assert max(counts) <= most
    if family.startswith("FlatVel"):
        assert min(counts) >= min(fewest, 11)  # the thinnest of twelve layers may fall between samples
        assert len(set(counts)) == most - fewest + 1 or most == 12


@pytest.mark.parametrize("family", [f for f in LAYERED if f.endswith("A")])
@pytest.mark.parametrize(
    ("shape", "spacing"), [((70, 70), (10.0, 10.0)), ((140, 35), (10.0, 10.0)), ((40, 40), (5.0, 25.0))]
)
def test_velocity_never_decreases_with_depth_in_the_families_a(
    family: str, shape: tuple[int, int], spacing: tuple[float, float]
) -> None:
    v = draw(family, 200, shape=shape, spacing=spacing)
    assert (np.diff(v, axis=1) >= 0.0).all()
    assert (v[:, -1] > v[:, 0]).mean() > 0.95


@pytest.mark.parametrize("family", [f for f in LAYERED if f.endswith("B")])
def test_velocity_also_decreases_in_the_families_b(family: str) -> None:
    step = np.diff(draw(family, 200), axis=1)
    down = (step < 0).sum() / (step != 0).sum()
    assert 0.4 < down < 0.6
    assert (step < 0).any(axis=(1, 2)).mean() > 0.6


def interface(v: np.ndarray) -> np.ndarray:
    """(n, nx) row at which the first layer of each column ends; the whole height where there is no other."""
    changed = v != v[:, :1]
    return np.where(changed.any(1), changed.argmax(1), v.shape[1])


def test_flat_layers_are_flat_and_curved_ones_are_not() -> None:
    for version in "AB":
        assert (np.diff(draw(f"FlatVel_{version}"), axis=2) == 0).all()
        rows = interface(draw(f"CurveVel_{version}"))
        assert (np.ptp(rows, axis=1) >= 3).mean() > 0.9
        assert np.abs(np.diff(rows, axis=1)).max() <= 2  # a curve does not jump


@pytest.mark.parametrize("family", [f for f in FAMILIES if "Fault" in f])
def test_faults_displace_the_layers(family: str) -> None:
    """An interface jumps at a fault by more than folds and dips do from trace to trace, and by no more than the throws."""
    grid = {"shape": (200, 100), "spacing": (10.0, 30.0), "layers": (5, 5)}
    jump = np.abs(np.diff(interface(draw(family, 100, **grid)), axis=1)).max(1)
    smooth = np.abs(np.diff(interface(draw(family.replace("Fault", "Vel"), 100, **grid)), axis=1)).max(1)
    assert (smooth <= 3).mean() > 0.85  # the rest: the first layer ends at the surface, and the next one is measured
    assert (jump >= 5).mean() > 0.7
    assert np.median(jump) < 0.2 * 200 + 3


def test_the_hanging_wall_of_a_normal_fault_is_down() -> None:
    """One fault, two layers: where the footwall is left of a plane that dips to the right, the right side is deeper."""
    u = np.full((1, 64), 0.5, dtype=np.float32)
    u[0, 1:6] = [0.9, 0.5, 1.0, 0.9, 0.5]  # side: to the right; dip 70 degrees; throw 20 %; through the centre
    model = VelocityModels("FlatFault_A", shape=(100, 100), layers=(2, 2))
    rows = interface(model._layered(u))[0]
    assert rows[95] - rows[5] == pytest.approx(20, abs=1)
    u[0, 1] = 0.1
    rows = interface(model._layered(u))[0]
    assert rows[5] - rows[95] == pytest.approx(20, abs=1)
    edge = np.flatnonzero(np.abs(np.diff(rows)) > 0)
    assert edge.size  # the plane leans by tan 20° over the throw
    assert np.ptp(edge) <= 100 * 0.2 * np.tan(np.radians(20.0)) + 2


def test_blocks_slip_along_the_fault() -> None:
    """Where a point came from lies beside it along the plane: Δx = lean Δz, lean = tan 20° at a dip of 70°."""
    u = np.full((1, 16), 0.5, dtype=np.float32)
    model = VelocityModels("CurveFault_A", shape=(50, 50))
    z, x = (v[None].astype(np.float32) for v in np.mgrid[:50, :50] / 50.0)
    before_z, before_x = model._unfault(u, z, x, normal=True)
    moved = before_z != z
    assert 0.3 < moved.mean() < 0.7
    np.testing.assert_allclose((z - before_z)[moved], 0.13, atol=1e-6)
    np.testing.assert_allclose((x - before_x)[moved], 0.13 * np.tan(np.radians(20.0)), atol=1e-6)


def test_the_same_seed_gives_all_families_the_same_layers() -> None:
    flat, curved = draw("FlatVel_A", 8), draw("CurveVel_A", 8)
    for a, b in zip(flat, curved, strict=True):
        assert set(np.unique(b)) <= set(np.unique(a))


def test_style_a_is_smooth_and_style_b_is_sharp_and_both_use_the_range() -> None:
    a, b = draw("Style_A"), draw("Style_B")
    assert a.min((1, 2)).max() < 1.5001
    assert a.max((1, 2)).min() > 4.4999

    def roughness(v: np.ndarray) -> np.ndarray:
        return np.abs(np.diff(v, 2, axis=1)).mean((1, 2))

    assert np.median(roughness(a)) < 0.4 * np.median(roughness(b))
    assert abs(a.mean() - 3.0) < 0.6


def test_whole_numbers_of_layers_are_asked_for() -> None:
    with pytest.raises(ValueError, match="whole numbers"):
        VelocityModels(layers=(2.5, 3.0))
    with pytest.raises(ValueError, match="layers must be"):
        VelocityModels(layers=(2, 13))
    with pytest.raises(ValueError, match="FlatVel_A, FlatVel_B"):
        VelocityModels("flatvel-a")
