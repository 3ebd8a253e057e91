"""Draw docs/images/data.png, a few examples of every generator: `python docs/make_data_picture.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

from invgen.data.channels import HalfCircleChannels, MeanderingChannels
from invgen.data.facies import PlurigaussianFacies
from invgen.data.galaxies import SersicGalaxies
from invgen.data.rock import RockCrops
from invgen.data.toys import Banana, Checkerboard, EightGaussians, Pinwheel, Spirals, TwoMoons
from invgen.data.velocity import VelocityFamily, VelocityModels

RIVER = ListedColormap(["#55705a", "#ead98c", "#2d6cab", "#75604d"])
FACIES = ListedColormap(["#55705a", "#ead98c", "#c98b4a"])
COLUMNS = 10


def volume() -> np.ndarray:
    """A stand-in for a segmented rock: spheres of grain, porosity about 0.3."""
    rng = np.random.default_rng(0)
    z, y, x = np.mgrid[:96, :96, :96]
    rock = np.ones((96, 96, 96), dtype=np.uint8)
    for c, r in zip(rng.uniform(-8, 104, (330, 3)), rng.uniform(7, 13, 330), strict=True):
        rock[(z - c[0]) ** 2 + (y - c[1]) ** 2 + (x - c[2]) ** 2 < r * r] = 0
    return rock


def rows() -> list[tuple[str, list[np.ndarray], dict[str, Any]]]:
    """Title, images and drawing options of each row."""
    galaxies = SersicGalaxies().sample(COLUMNS, seed=1)[:, 0]
    stretched = np.arcsinh(galaxies / np.quantile(galaxies, 0.7, axis=(1, 2), keepdims=True))
    one_each = [VelocityModels(f).sample(1, seed=2)[0, 0] for f in get_args(VelocityFamily)]
    return [
        ("MeanderingChannels, facies", list(MeanderingChannels(quantity="facies").sample(COLUMNS, seed=2)[:, 0]),
         {"cmap": RIVER, "vmin": 0, "vmax": 3}),
        ("MeanderingChannels, channel", list(MeanderingChannels().sample(COLUMNS, seed=2)[:, 0]), {"cmap": "Greys"}),
        ("HalfCircleChannels, velocity", list(HalfCircleChannels((64, 64), quantity="velocity").sample(COLUMNS)[:, 0]),
         {"cmap": "viridis"}),
        ("VelocityModels: FlatVel A B, CurveVel A B, FlatFault A B, CurveFault A B, Style A B", one_each,
         {"cmap": "viridis", "vmin": 1.5, "vmax": 4.5}),
        ("PlurigaussianFacies", list(PlurigaussianFacies().sample(COLUMNS)[:, 0]), {"cmap": FACIES, "vmin": 0, "vmax": 2}),
        ("SersicGalaxies, asinh stretch", list(stretched), {"cmap": "magma", "origin": "lower"}),
        ("RockCrops of packed spheres", list(RockCrops(volume()).sample(COLUMNS)[:, 0]), {"cmap": "Greys"}),
    ]  # fmt: skip


def main() -> None:
    """Draw and write."""
    drawn = rows()
    figure = plt.figure(figsize=(10.0, 9.6), dpi=100)
    parts = figure.subfigures(len(drawn) + 1, 1)
    for part, (title, images, options) in zip(parts, drawn, strict=False):
        part.suptitle(title, fontsize=8, x=0.01, ha="left", y=0.99)
        for axis, image in zip(part.subplots(1, COLUMNS), images, strict=True):
            axis.imshow(image, interpolation="nearest", **options)
            axis.set_axis_off()
        part.subplots_adjust(0.01, 0.01, 0.99, 0.86, wspace=0.04)
    toys = (TwoMoons(), Spirals(), EightGaussians(), Checkerboard(), Pinwheel(), Banana())
    parts[-1].suptitle(
        "TwoMoons, Spirals, EightGaussians, Checkerboard, Pinwheel, Banana", fontsize=8, x=0.01, ha="left", y=0.99
    )
    for axis, toy in zip(parts[-1].subplots(1, COLUMNS), toys, strict=False):
        axis.plot(*toy.sample(1500).T, ",", color="k")
    for axis in parts[-1].axes:
        axis.set_axis_off()
    parts[-1].subplots_adjust(0.01, 0.01, 0.99, 0.86, wspace=0.04)
    figure.savefig(Path(__file__).parent / "images" / "data.png")


if __name__ == "__main__":
    main()
