"""Plurigaussian facies: exact proportions, exact covariances of the fields underneath, rules that are partitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from invgen.data.facies import FaciesRule, PlurigaussianFacies

RULES = {
    "two cuts": ((1, 0, (2, 1, 2)), (0.4, 0.35, 0.25)),
    "a truncated Gaussian": ((1, 0, (1, 1, 2)), (0.2, 0.5, 0.3)),
    "four corners": ((1, (2, 0, 1), (2, 2, 3)), (0.1, 0.2, 0.3, 0.4)),
    "nested cuts of both axes": ((2, (1, 0, (2, 1, 2)), (1, (1, 3, 4), 5)), (0.1, 0.15, 0.2, 0.05, 0.3, 0.2)),
    "one facies": (0, (1.0,)),
}


@pytest.mark.parametrize("name", RULES)
def test_independent_normal_numbers_give_the_proportions(name: str) -> None:
    tree, proportions = RULES[name]
    y1, y2 = np.random.default_rng(0).standard_normal((2, 400_000))
    share = np.bincount(FaciesRule(tree, proportions).facies(y1, y2), minlength=len(proportions)) / y1.size
    p = np.array(proportions)
    assert (np.abs(share - p) <= 5.0 * np.sqrt(p * (1 - p) / y1.size)).all()


@pytest.mark.parametrize("name", ["two cuts", "four corners"])
def test_images_have_the_proportions_on_average(name: str) -> None:
    rule, proportions = RULES[name]
    images = PlurigaussianFacies(shape=(40, 40), proportions=proportions, rule=rule).sample(300, seed=1)
    for k, p in enumerate(proportions):
        share = (images == k).mean((1, 2, 3))
        assert abs(share.mean() - p) < 4.5 * share.std() / len(share) ** 0.5


@pytest.mark.parametrize("kind", ["gaussian", "exponential", "spherical", "cubic", "matern32"])
def test_the_fields_have_the_stated_covariance(kind: str) -> None:
    law = PlurigaussianFacies(shape=(30, 36), spacing=(10.0, 5.0), covariance=(kind, "cubic"),
                              ranges=((120.0, 60.0), (50.0, 50.0)), azimuth=(35.0, 0.0))  # fmt: skip
    y = law.fields(2500, seed=2)
    r = {
        "gaussian": lambda h: np.exp(-3.0 * h * h),
        "exponential": lambda h: np.exp(-3.0 * h),
        "spherical": lambda h: 1.0 - 1.5 * min(h, 1.0) + 0.5 * min(h, 1.0) ** 3,
        "cubic": lambda h: (
            1 - 7 * min(h, 1) ** 2 + 8.75 * min(h, 1) ** 3 - 3.5 * min(h, 1) ** 5 + 0.75 * min(h, 1) ** 7
        ),
        "matern32": lambda h: (1.0 + 4.743865 * h) * np.exp(-4.743865 * h),
    }[kind]
    angle = np.radians(35.0)
    for rows, columns in ((0, 0), (0, 3), (0, 29), (3, 0), (25, 0), (4, 7), (4, -7)):
        dz, dx = 10.0 * rows, 5.0 * columns
        major = (np.cos(angle) * dx + np.sin(angle) * dz) / 120.0
        minor = (np.cos(angle) * dz - np.sin(angle) * dx) / 60.0
        expected = r(np.hypot(major, minor))
        first = y[:, 0, 2, 20 if columns < 0 else 1]
        second = y[:, 0, 2 + rows, (20 if columns < 0 else 1) + columns]
        error = np.sqrt((1.0 + expected**2) / len(y))
        assert abs(np.mean(first * second) - expected) < 5.0 * error, (rows, columns)
    assert abs(np.mean(y[:, 0, 5, 5] * y[:, 1, 5, 5])) < 5.0 / len(y) ** 0.5  # the two fields are independent
    assert abs(np.mean(y[:, 0])) < 0.1


def test_sample_cuts_the_fields_it_returns() -> None:
    law = PlurigaussianFacies(shape=(20, 20))
    y = law.fields(4, seed=3, start=2)
    facies = FaciesRule(law.rule, law.proportions).facies(y[:, 0], y[:, 1])
    np.testing.assert_array_equal(law.sample(4, seed=3, start=2)[:, 0], facies)
    only = PlurigaussianFacies(shape=(20, 20), indicator=2)
    np.testing.assert_array_equal(only.sample(4, seed=3, start=2)[:, 0], facies == 2)


def test_a_truncated_gaussian_puts_its_facies_in_order() -> None:
    smooth = {"covariance": ("gaussian", "gaussian"), "ranges": ((400.0, 400.0), (400.0, 400.0))}
    x = PlurigaussianFacies(rule=(1, 0, (1, 1, 2)), proportions=(0.3, 0.4, 0.3), **smooth).sample(60, seed=4)[:, 0]
    step = np.abs(np.diff(x, axis=2))
    assert (step == 2).sum() < 0.01 * (step > 0).sum()


@pytest.mark.parametrize(
    ("tree", "proportions", "message"),
    [((1, 0, 1), (0.5, 0.6), "add up to 1"), ((1, 0, 1), (1.0, 0.0), "positive"), ((1, 0, 0), (0.5, 0.5), "each once"),
     ((3, 0, 1), (0.5, 0.5), "axis 1 or 2"), ((1, 0), (0.5, 0.5), "axis 1 or 2"), ((1, 0, 2), (0.5, 0.5), "number the"),
     ("01", (0.5, 0.5), "axis 1 or 2")],
)  # fmt: skip
def test_rules_that_are_no_partition_are_refused(tree: Any, proportions: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FaciesRule(tree, proportions)


def test_a_range_that_no_embedding_holds_is_refused() -> None:
    with pytest.raises(ValueError, match="take shorter ranges"):
        PlurigaussianFacies(ranges=((1e6, 1e6), (100.0, 100.0)))
