"""Volumes are drawn with their axes, slices at the point that was asked for, and refused with a reason."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from invgen import Grid
from invgen.report import volume_plot

GRID = Grid(
    (6, 5, 8), (2.0, 10.0, 5.0), (100.0, 0.0, 0.0), ("z", "y", "x"), ("m", "m", "m"), ("v",), channel_units=("m/s",)
)


def test_slices_are_those_through_the_point() -> None:
    values = np.arange(240.0).reshape(6, 5, 8)
    figure = volume_plot(torch.from_numpy(values)[None], GRID, at=(104.3, 21.0, 9.0))
    shown = [np.asarray(a.images[0].get_array()) for a in figure.axes if a.images and len(a.images)]
    np.testing.assert_array_equal(shown[0], values[2])
    np.testing.assert_array_equal(shown[1], values[:, 2])
    np.testing.assert_array_equal(shown[2], values[:, :, 2])
    titles = [a.get_title() for a in figure.axes]
    assert "z = 104 m" in titles
    assert "y = 20 m" in titles
    assert figure.axes[1].get_ylim() == (111.0, 99.0)  # depth points down
    figure.draw_without_rendering()


def test_a_volume_without_grid_has_sample_numbers() -> None:
    figure = volume_plot(np.random.default_rng(0).normal(size=(3, 4, 5)), title="noise")
    assert figure.axes[0].get_xlim() == (-0.5, 4.5)


@pytest.mark.parametrize(
    ("field", "options", "said"),
    [
        (np.zeros((4, 5)), {}, "pick one sample"),
        (np.zeros((2, 3, 4, 5)), {"channel": 2}, "channel 2"),
        (np.zeros((3, 4, 5)), {"grid": GRID}, "must agree"),
        (np.zeros((6, 5, 8)), {"grid": GRID, "at": (0.0, 0.0, 0.0)}, "outside the grid"),
        (np.full((3, 4, 5), np.nan), {}, "no finite value"),
    ],
)
def test_what_cannot_be_drawn_is_refused(field: np.ndarray, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        volume_plot(field, **options)
