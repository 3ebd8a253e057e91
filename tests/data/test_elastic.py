"""Elastic sections: physical ranges, trends of the rocks, and properties that are related but not by a function."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from invgen.data import _elastic_parts as rock
from invgen.data.elastic import ElasticSections
from invgen.operators.elastic import check_elastic_model

SMALL = ElasticSections((40, 48), (15.0, 5.0))


def detrended(x: np.ndarray) -> np.ndarray:
    """(n, 3, pixels) without the cubic in depth that fits each section's channel."""
    z = np.vander(np.linspace(-1, 1, x.shape[2]), 4)
    Q, _ = np.linalg.qr(z)
    x = x.astype(np.float64)
    x = x - np.einsum("zk,wk,ncwx->nczx", Q, Q, x)
    return x.reshape(*x.shape[:2], -1)


def test_an_item_depends_on_seed_and_number_only() -> None:
    whole = SMALL.sample(5, seed=7)
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(whole[3:], SMALL.sample(2, seed=7, start=3))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(SMALL)).sample(2, seed=7), whole[:2])
    assert not np.allclose(whole[0], whole[1])
    assert not np.allclose(whole[:1], SMALL.sample(1, seed=8))


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((64, 64), (15.0, 5.0)), ((2, 3), (10.0, 10.0)), ((33, 400), (4.0, 12.5)), ((130, 20), (30.0, 25.0))],
)
def test_values_are_rocks_on_any_grid(shape: tuple[int, int], spacing: tuple[float, float]) -> None:
    generator = ElasticSections(shape, spacing)
    x = generator.sample(12, seed=1)
    assert x.shape == (12, *generator.grid.field_shape)
    assert np.isfinite(x).all()
    vp, vs, rho = np.exp(x.astype(np.float64)).swapaxes(0, 1)
    assert 1.44 < vp.min() < vp.max() < 6.01
    assert 0.079 < (vs / vp).min() < (vs / vp).max() < 0.701  # Poisson's ratio above 0.02, below 0.497
    assert 1.19 < rho.min() < rho.max() < 3.41


def test_the_operators_recognise_the_units() -> None:
    import torch

    assert check_elastic_model(torch.from_numpy(SMALL.sample(16, seed=2))) == ("km/s", "km/s", "g/cm³")


def test_properties_are_correlated_and_no_function_of_each_other() -> None:
    """Per section: vs and ρ follow vp on the whole, and vp explains neither all of vs nor of ρ."""
    x = detrended(ElasticSections((64, 64), (15.0, 5.0)).sample(120, seed=3))
    r = np.stack([np.corrcoef(s) for s in x])
    with_vs, with_rho = r[:, 0, 1], r[:, 0, 2]
    # the medians of 120 sections move by 0.02 and 0.04 (bootstrap); sections differ by much more
    assert 0.75 < np.median(with_vs) < 0.95
    assert 0.2 < np.median(with_rho) < 0.65
    assert (with_vs < 0.98).mean() > 0.9
    assert np.ptp(np.quantile(with_rho, [0.1, 0.9])) > 0.4
    sd = np.median(x.std(2), axis=0)
    assert sd[1] > sd[0] > sd[2]  # contrasts of vs are the largest, those of density the smallest


def test_trends_are_those_of_the_rocks() -> None:
    """At 3 km/s, without a shift: the published regressions; carbonate is slow in shear for its vp at 5 km/s."""
    regime = rock.Regime(1.3, 0.25, 0.03, 0.01, 0.0, 0.0, 0.2)
    vs, rho = (np.exp(t) for t in rock.trend_tables(np.log(np.array([2.0, 3.0, 5.0])), regime))
    np.testing.assert_allclose(vs[:, 1], [1.4417, 1.5566, 1.5241], rtol=1e-3)
    np.testing.assert_allclose(rho[:, 1], [1.75 * 3**0.265, 1.66 * 3**0.261, 1.36 * 3**0.386], rtol=1e-4)
    # the mud-rock line, vp = 1.16 vs + 1.36, within 8 % of the shale regression
    assert abs(vs[rock.SHALE, 1] / ((3.0 - 1.36) / 1.16) - 1) < 0.08
    assert vs[rock.CARBONATE, 2] < vs[rock.SHALE, 2] < vs[rock.SAND, 2]
    loose = np.exp(rock.trend_tables(np.log(np.array([1.5])), rock.Regime(1.3, 0.25, 0.03, 0.01, 0.0, 0.0, 0.4))[0])
    np.testing.assert_allclose(loose, 0.6, rtol=0.02)


def test_sands_without_texture_have_the_slopes_that_were_drawn() -> None:
    """Columns: what is left of ln vs after slope · ln vp is residual, rock and mineral, and has the size drawn for it."""
    rng = np.random.default_rng(0)
    left, gas_free = [], []
    for _ in range(20):
        regime = rock.Regime(1.5, 0.3, 0.02, 0.01, 0.0, 0.0, 0.2)
        first, _ = rock.elastic_columns(rng, 2000.0, 5.0, 5.0, regime)
        left.append(first[1] - 1.5 * first[0])
        gas_free.append(first[2] - 0.3 * first[0])
    # median absolute deviations: stringers and gas are rare. sd² = scatter² + 0.03² (vs), + 0.012² (ρ), few formations each
    vs, rho = (1.4826 * np.median(np.abs(np.concatenate(v))) for v in (left, gas_free))
    assert 0.7 * np.hypot(0.02, 0.03) < vs < 1.4 * np.hypot(0.02, 0.03)
    assert 0.7 * np.hypot(0.01, 0.012) < rho < 1.4 * np.hypot(0.01, 0.012)


def test_a_sample_averages_the_beds_in_it() -> None:
    """The running mean over four steps is the mean of the unaveraged column."""
    regime = rock.Regime(1.3, 0.25, 0.03, 0.01, 0.0, 0.0, 0.2)
    fine, _ = rock.elastic_columns(np.random.default_rng(4), 600.0, 2.0, 2.0, regime)
    wide, _ = rock.elastic_columns(np.random.default_rng(4), 600.0, 2.0, 8.0, regime)
    i = np.arange(20, 250)
    mean = sum(fine[:, i + k] for k in (-2, -1, 0, 1)) / 4
    np.testing.assert_allclose(wide[:, i], mean, atol=1e-5)


def test_velocity_grows_with_depth_and_starts_slow() -> None:
    shallow = ElasticSections((100, 4), (15.0, 5.0), depth=(0.0, 0.0)).sample(60, seed=5)[:, 0]
    deep = ElasticSections((100, 4), (15.0, 5.0), depth=(3000.0, 3000.0)).sample(60, seed=5)[:, 0]
    profile = shallow.mean((0, 2))
    assert profile[-20:].mean() > profile[:20].mean() + 0.1
    assert deep.mean() > shallow.mean() + 0.2


@pytest.mark.parametrize(
    "wrong",
    [{"shape": (1, 64)}, {"shape": (64,)}, {"spacing": (0.0, 5.0)}, {"depth": (-1.0, 2.0)}, {"depth": (500.0, 100.0)}],
)
def test_what_makes_no_section_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        ElasticSections(**wrong)  # type: ignore[arg-type]
