import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from invgen.grid import Grid, check_same_grid

GRID = Grid((20, 30), (4.0, 10.0), (100.0, -50.0), units=("m", "m"), channels=("log_impedance", "velocity"))


def test_fields_and_defaults():
    assert GRID.field_shape == (2, 20, 30)
    assert GRID.axes == ("z", "x")
    assert Grid((5,), (1.0,)).axes == ("x",)
    assert Grid((5, 6, 7), (1, 1, 1)).axes == ("z", "y", "x")
    assert Grid((5, 6), (1, 2)).origin == (0.0, 0.0)
    np.testing.assert_allclose(GRID.coordinates("z"), 100 + 4.0 * np.arange(20))
    np.testing.assert_allclose(GRID.coordinates(1), -50 + 10.0 * np.arange(30))
    assert GRID.extent == (-55.0, 245.0, 178.0, 98.0)


@given(st.integers(0, 19), st.integers(0, 29), st.integers(1, 20), st.integers(1, 30))
def test_crop_keeps_coordinates(i, j, m, n):
    window = (slice(i, min(i + m, 20)), slice(j, min(j + n, 30)))
    part = GRID.crop(window)
    for axis in (0, 1):
        np.testing.assert_allclose(part.coordinates(axis), GRID.coordinates(axis)[window[axis]])


def test_round_trip_through_json():
    assert Grid.from_dict(json.loads(json.dumps(GRID.to_dict()))) == GRID


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"shape": (4, 4), "spacing": (1.0,)}, "spacing has 1 entries"),
        ({"shape": (4, 0), "spacing": (1.0, 1.0)}, "without samples"),
        ({"shape": (4, 4), "spacing": (1.0, -1.0)}, "positive"),
        ({"shape": (4, 4), "spacing": (1.0, float("nan"))}, "finite"),
        ({"shape": (4, 4), "spacing": (1.0, 1.0), "axes": ("z",)}, "axes has 1"),
        ({"shape": (4, 4), "spacing": (1.0, 1.0), "channel_units": ("m", "s")}, "channel units"),
    ],
)
def test_bad_grids(arguments, says):
    with pytest.raises(ValueError, match=says):
        Grid(**arguments)


def test_bad_questions():
    with pytest.raises(ValueError, match="axes"):
        GRID.coordinates("depth")
    with pytest.raises(ValueError, match="step"):
        GRID.crop((slice(0, 10, 2), slice(0, 4)))
    with pytest.raises(ValueError, match="2-D"):
        _ = Grid((5,), (1.0,)).extent


@pytest.mark.parametrize(
    "other",
    [
        {"spacing": (10.0, 10.0)},
        {"origin": (0.0, -50.0)},
        {"units": ("m", "km")},
        {"channels": ("a", "b")},
        {"axes": ("t", "x")},
        {"channel_units": ("m/s", "km/s")},
    ],
)
def test_mismatch_shows_both(other):
    second = Grid.from_dict({**GRID.to_dict(), **other})
    with pytest.raises(ValueError) as caught:
        check_same_grid(GRID, second, "The prior", "the operator")
    assert str(GRID) in str(caught.value)
    assert str(second) in str(caught.value)


def test_agreement():
    check_same_grid(GRID, None, "a", "b")
    check_same_grid(GRID, Grid.from_dict({**GRID.to_dict(), "spacing": [4.0 + 1e-9, 10.0]}), "a", "b")
