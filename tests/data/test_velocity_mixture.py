"""A mixture of velocity families: shares, laws within a family, items of their own, refusals."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from invgen.data.velocity import VelocityFamily, VelocityModels
from invgen.data.velocity_mixture import VelocityMixture

FAMILIES = get_args(VelocityFamily)


def only(family: str) -> tuple[float, ...]:
    return tuple(float(name == family) for name in FAMILIES)


def test_families_come_in_their_shares() -> None:
    n = 4000
    mixture = VelocityMixture(shares=(2, 0, 1, 1, 0, 3, 1, 1, 1, 0))
    found = mixture.families(n, seed=3)
    for family, share in zip(FAMILIES, mixture.shares, strict=True):
        p = share / 10
        # ten binomial counts: 4.5 standard deviations are a false alarm of 7e-5 in all
        assert abs(found.count(family) - n * p) <= 4.5 * np.sqrt(n * p * (1 - p))


def test_an_item_does_not_depend_on_the_block_it_is_drawn_with() -> None:
    mixture = VelocityMixture(shape=(24, 32))
    whole = mixture.sample(70, seed=5)  # more than one block
    for i in (0, 13, 63, 64, 69):
        np.testing.assert_array_equal(whole[i : i + 1], mixture.sample(1, seed=5, start=i))
    assert mixture.families(70, seed=5)[60:] == mixture.families(10, seed=5, start=60)


def test_items_have_the_structure_of_their_family() -> None:
    mixture = VelocityMixture()
    x, families = mixture.sample(300, seed=1)[:, 0], mixture.families(300, seed=1)
    for v, family in zip(x, families, strict=True):
        values = len(np.unique(v))
        if family.startswith("Style"):
            assert values > 100
            continue
        assert 2 <= values <= 5
        if family.endswith("A"):
            assert (np.diff(v, axis=0) >= 0).all()
        if family.startswith("FlatVel"):
            assert (v == v[:, :1]).all()
        if family.startswith("Curve"):
            assert not (v == v[:, :1]).all()
    assert set(families) == set(FAMILIES)


@pytest.mark.parametrize("family", ["FlatVel_A", "CurveFault_B", "Style_A"])
def test_one_family_alone_has_the_law_of_its_models(family: VelocityFamily) -> None:
    n = 400
    a = VelocityMixture(only(family)).sample(n, seed=1)[:, 0]
    b = VelocityModels(family, (64, 64)).sample(n, seed=2)[:, 0]
    assert set(VelocityMixture(only(family)).families(200)) == {family}
    for figure in (
        lambda v: v.mean((1, 2)),
        lambda v: v.std((1, 2)),
        lambda v: np.abs(np.diff(v, axis=1)).mean((1, 2)),
    ):
        u, v = figure(a), figure(b)
        # nine comparisons of means of 400: 4.5 standard errors are a false alarm of 6e-5 in all
        assert abs(u.mean() - v.mean()) < 4.5 * np.sqrt((u.var() + v.var()) / n)


def test_settings_reach_every_family() -> None:
    mixture = VelocityMixture(shape=(20, 30), spacing=(5.0, 8.0), velocity=(2.0, 3.0), layers=(3, 3))
    x = mixture.sample(100)
    assert x.shape == (100, 1, 20, 30)
    assert x.min() >= 2.0
    assert x.max() <= 3.0
    layered = [v for v, f in zip(x, mixture.families(100), strict=True) if not f.startswith("Style")]
    assert max(len(np.unique(v)) for v in layered) == 3
    assert mixture.grid.spacing == (5.0, 8.0)
    assert mixture.grid.channel_units == ("km/s",)


@pytest.mark.parametrize(
    "shares", [(1.0,) * 9, (0.0,) * 10, (-1.0, *(1.0,) * 9), (float("nan"), *(1.0,) * 9), (float("inf"), *(1.0,) * 9)]
)
def test_shares_that_are_none(shares: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="10 non-negative numbers, not all zero, one for each of FlatVel_A"):
        VelocityMixture(shares)


def test_what_the_families_refuse_the_mixture_refuses() -> None:
    with pytest.raises(ValueError, match="layers must be"):
        VelocityMixture(layers=(2, 13))
    with pytest.raises(ValueError, match="spacing must be"):
        VelocityMixture(spacing=(0.0, 10.0))
    with pytest.raises(ValueError, match="n must be"):
        VelocityMixture().families(0)
