"""The section generator: reproducible streams, physical range, crops that are windows of sections."""

from __future__ import annotations

import numpy as np
import pytest

from invgen.data.geology import GeologySections

SMALL = GeologySections(shape=(90, 120), spacing=(8.0, 8.0))


def test_shape_dtype_and_range() -> None:
    m = SMALL.sample(20, seed=1)
    assert m.shape == (20, 1, 90, 120)
    assert m.dtype == np.float32
    assert np.isfinite(m).all()
    v = np.exp(m) / 2000.0
    assert v.min() > 1.44
    assert v.max() < 5.81


def test_an_item_depends_on_seed_and_number_only() -> None:
    whole = SMALL.sample(5, seed=7)
    np.testing.assert_array_equal(whole[3:], SMALL.sample(2, seed=7, start=3))
    np.testing.assert_array_equal(whole[:1], SMALL.sample(1, seed=7))


def test_seeds_and_items_differ() -> None:
    a, b = SMALL.sample(2, seed=0), SMALL.sample(2, seed=1)
    assert not np.allclose(a, b)
    assert not np.allclose(a[0], a[1])


def test_velocity_is_the_same_section_in_other_units() -> None:
    velocity = GeologySections(shape=SMALL.shape, spacing=SMALL.spacing, quantity="velocity")
    np.testing.assert_allclose(np.log(2000.0 * velocity.sample(2, seed=3)), SMALL.sample(2, seed=3), rtol=1e-5)


def test_velocity_grows_with_depth_on_average() -> None:
    profile = GeologySections(shape=(100, 40), spacing=(20.0, 20.0)).sample(40).mean(axis=(0, 1, 3))
    assert profile[-20:].mean() > profile[:20].mean() + 0.1


@pytest.mark.parametrize(
    ("shape", "spacing"), [((2, 2), (4.0, 4.0)), ((64, 64), (12.5, 25.0)), ((33, 300), (1.0, 10.0))]
)
def test_other_grids(shape: tuple[int, int], spacing: tuple[float, float]) -> None:
    m = GeologySections(shape=shape, spacing=spacing, depth=1000.0).sample(15)
    assert m.shape == (15, 1, *shape)
    assert np.isfinite(m).all()


def test_crops_are_windows_of_sections_at_the_reported_depth() -> None:
    geology = GeologySections(shape=(60, 70), spacing=(5.0, 10.0), depth=300.0)
    crops, depth = geology.crops(8, (16, 24), seed=5, start=4, per_section=4)
    sections = geology.sample(3, seed=5)
    assert crops.shape == (8, 1, 16, 24)
    assert crops.dtype == np.float32
    assert depth.shape == (8,)
    for i in range(8):
        row = round((float(depth[i]) - 300.0) / 5.0)
        rows = sections[(4 + i) // 4, 0, row : row + 16]
        assert any(np.array_equal(rows[:, j : j + 24], crops[i, 0]) for j in range(70 - 24 + 1))


def test_crops_do_not_depend_on_the_batch() -> None:
    crops, depth = SMALL.crops(9, (16, 16), seed=2, per_section=4)
    again, depth_again = SMALL.crops(4, (16, 16), seed=2, start=5, per_section=4)
    np.testing.assert_array_equal(crops[5:], again)
    np.testing.assert_array_equal(depth[5:], depth_again)


@pytest.mark.parametrize(
    "arguments",
    [{"shape": (0, 10)}, {"shape": (10, -1)}, {"spacing": (0.0, 4.0)}, {"spacing": (4.0, float("nan"))},
     {"depth": -1.0}, {"quantity": "density"}],
)  # fmt: skip
def test_bad_sections_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match=r"must be .*\.$"):
        GeologySections(**arguments)


def test_bad_draws_are_refused() -> None:
    with pytest.raises(ValueError, match="n must be at least 1"):
        SMALL.sample(0)
    with pytest.raises(ValueError, match="non-negative"):
        SMALL.sample(1, seed=-1)
    with pytest.raises(ValueError, match="crop must fit"):
        SMALL.crops(1, (91, 16))
    with pytest.raises(ValueError, match="per_section"):
        SMALL.crops(1, (16, 16), per_section=0)
