"""What all generators promise: items of their own, batches for training, pools, grids, refusals."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from invgen.data.channels import HalfCircleChannels, MeanderingChannels
from invgen.data.facies import PlurigaussianFacies
from invgen.data.galaxies import SersicGalaxies
from invgen.data.rock import RockCrops
from invgen.data.toys import Banana, Checkerboard, EightGaussians, Pinwheel, Spirals, TwoMoons
from invgen.data.velocity import VelocityModels
from invgen.data.velocity_mixture import VelocityMixture
from invgen.priors.training import ArrayData

VOLUME = (np.random.default_rng(0).random((30, 31, 32)) < 0.2).astype(np.uint8)
FIELDS = {
    "meanders": MeanderingChannels(shape=(40, 48), age=(5.0, 9.0)),
    "facies of meanders": MeanderingChannels(shape=(40, 48), age=(5.0, 9.0), quantity="facies"),
    "half circles": HalfCircleChannels(shape=(32, 48)),
    "half circles, all": HalfCircleChannels(shape=(32, 48), quantity="all"),
    "layers": VelocityModels("CurveFault_B", shape=(33, 47)),
    "style": VelocityModels("Style_A", shape=(33, 47)),
    "velocities": VelocityMixture(shape=(33, 47)),
    "plurigaussian": PlurigaussianFacies(shape=(33, 40)),
    "galaxies": SersicGalaxies(shape=(33, 40)),
    "slices of rock": RockCrops(VOLUME, shape=(16, 18)),
    "blocks of rock": RockCrops(VOLUME, shape=(8, 9, 10)),
}
TOYS = {c.__name__: c() for c in (TwoMoons, Spirals, EightGaussians, Checkerboard, Pinwheel, Banana)}
ALL = {**FIELDS, **TOYS}


@pytest.mark.parametrize("name", ALL)
def test_an_item_depends_on_seed_and_number_only(name: str) -> None:
    stream = ALL[name]
    whole = stream.sample(11, seed=7)
    assert whole.dtype == np.float32
    assert np.isfinite(whole).all()
    np.testing.assert_array_equal(whole[4:], stream.sample(7, seed=7, start=4))
    np.testing.assert_array_equal(whole[9:10], stream.sample(1, seed=7, start=9))


@pytest.mark.parametrize("name", ALL)
def test_seeds_and_items_differ(name: str) -> None:
    a, b = ALL[name].sample(8, seed=0), ALL[name].sample(8, seed=1)
    assert not np.array_equal(a, b)
    assert len(np.unique(a.reshape(8, -1), axis=0)) > 4


@pytest.mark.parametrize("name", FIELDS)
def test_fields_have_channels_and_live_on_their_grid(name: str) -> None:
    stream = FIELDS[name]
    x = stream.sample(2)
    assert x.shape == (2, *stream.grid.field_shape)
    assert all(stream.grid.units)


@pytest.mark.parametrize("name", ALL)
def test_batches_are_windows_of_the_stream(name: str) -> None:
    stream = ALL[name]
    batch = stream.batch(3, 4, 5)
    assert list(batch) == ["x"]
    assert batch["x"].dtype == torch.float32
    np.testing.assert_array_equal(batch["x"].numpy(), stream.sample(4, seed=5, start=12))


def test_a_pool_is_training_data_whoever_makes_it() -> None:
    stream = VelocityModels("FlatVel_A", shape=(8, 9))
    pool = stream.pool(130, seed=3)
    np.testing.assert_array_equal(pool.numpy(), stream.sample(130, seed=3))
    assert torch.equal(pool, stream.pool(130, seed=3, workers=2))
    assert ArrayData(pool).batch(0, 16, 0)["x"].shape == (16, 1, 8, 9)


@pytest.mark.parametrize("name", ["meanders", "plurigaussian", "galaxies", "TwoMoons"])
def test_a_pickled_stream_goes_on(name: str) -> None:
    stream = ALL[name]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(stream)).sample(2, seed=4), stream.sample(2, seed=4))


@pytest.mark.parametrize("name", ALL)
def test_draws_that_make_no_sense_are_refused(name: str) -> None:
    stream = ALL[name]
    for arguments in ({"n": 0}, {"n": 1, "seed": -1}, {"n": 1, "start": -1}, {"n": 2.5}, {"n": True}):
        with pytest.raises(ValueError, match=r"must be a whole number of at least .*, got"):
            stream.sample(**arguments)
    with pytest.raises(ValueError, match="size must be"):
        stream.batch(0, 0, 0)
    with pytest.raises(ValueError, match="step must be"):
        stream.batch(-1, 2, 0)
    with pytest.raises(ValueError, match="workers must be"):
        stream.pool(2, workers=0)


SETTINGS = {
    MeanderingChannels: {"width": (9.0, 8.0), "aspect": (1.0, 2.0), "azimuth": (0.0,), "age": (0.0, 1.0), "avulsions": -1.0,
                         "level": (0.0, 1.0), "belt_spacing": 0.0, "aggradation": (-1.0, 0.0), "quantity": "mud"},
    HalfCircleChannels: {"radius": (0.0, 1.0), "proportion": (0.2, 1.0), "shale": (2.0, 1.0), "quantity": "salt"},
    VelocityModels: {"family": "FlatVel_C", "velocity": (2.0, 2.0), "layers": (0, 3)},
    PlurigaussianFacies: {"proportions": (0.5, 0.2, 0.2), "covariance": ("linear", "cubic"), "ranges": ((1.0, -1.0), (1.0, 1.0)),
                          "azimuth": (float("nan"), 0.0), "indicator": 3, "rule": (1, 0, 1)},
    SersicGalaxies: {"magnitude": (21.0, 20.0), "half_light": (0.0, 1.0), "kinds": (0.0, 0.0, 0.0), "psf_fwhm": -0.1},
}  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, values in SETTINGS.items() for n in values])
def test_bad_settings_are_refused_with_what_was_expected(kind: type, name: str) -> None:
    with pytest.raises(ValueError, match=r"\.$"):
        kind(**{name: SETTINGS[kind][name]})


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize(
    "bad", [{"shape": (0, 8)}, {"shape": (8,)}, {"shape": (8.5, 8)}, {"spacing": (1.0, -1.0)}, {"spacing": (1.0, float("inf"))}]
)  # fmt: skip
def test_bad_grids_are_refused(kind: type, bad: dict) -> None:
    with pytest.raises(ValueError, match=r"must be .*got"):
        kind(**bad)
