"""Chain diagnostics against ArviZ and theory."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from invgen.diagnostics import check_chains, ebfmi, ess, nested_rhat, rhat


def ar(phi, chains, draws, dim, seed=0):
    """Stationary first-order autoregressions of unit variance."""
    rng = np.random.default_rng(seed)
    e = rng.standard_normal((chains, draws, dim)) * np.sqrt(1 - phi**2)
    x = np.empty_like(e)
    x[:, 0] = e[:, 0] / np.sqrt(1 - phi**2)
    for t in range(1, draws):
        x[:, t] = phi * x[:, t - 1] + e[:, t]
    return x


@pytest.mark.parametrize("phi", [-0.6, 0.0, 0.9])
@pytest.mark.parametrize("size", [(4, 200), (4, 201), (1, 60), (2, 8), (3, 5), (2, 4)])
def test_agrees_with_arviz(phi, size):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arviz = pytest.importorskip("arviz")
    x = ar(phi, *size, 6)

    def each(function):
        return np.array([function(x[:, :, j]) for j in range(6)])

    np.testing.assert_allclose(ess(x), each(lambda v: arviz.ess(v, method="bulk")), rtol=1e-10)
    np.testing.assert_allclose(ess(x, kind="tail"), each(lambda v: arviz.ess(v, method="tail")), rtol=1e-10)
    np.testing.assert_allclose(ess(x, kind="mean"), each(lambda v: arviz.ess(v, method="mean")), rtol=1e-10)
    if size[0] > 1:
        np.testing.assert_allclose(rhat(x), each(arviz.rhat), rtol=1e-10)


@pytest.mark.parametrize("phi", [-0.5, 0.5, 0.8])
def test_effective_sample_size_of_an_autoregression(phi):
    """The mean of an AR(1) is worth N (1 − φ)/(1 + φ) draws."""
    x = ar(phi, 4, 4000, 40)
    want = 16_000 * (1 - phi) / (1 + phi)
    got = ess(x, kind="mean")
    assert got.mean() == pytest.approx(want, rel=0.05)
    assert (ess(x).mean() / want) == pytest.approx(1, rel=0.05)


def test_rhat_sees_shifts_and_spreads_and_heavy_tails():
    x = ar(0.0, 4, 500, 3)
    assert (rhat(x) < 1.01).all()
    shifted = x + np.array([0, 0, 0, 1.0])[:, None, None]
    assert (rhat(shifted) > 1.05).all()
    wide = x * np.array([1, 1, 1, 3.0])[:, None, None]
    assert (rhat(wide) > 1.05).all()  # only the folded draws show it
    trend = x + np.linspace(0, 1.5, 500)[:, None]
    assert (rhat(trend) > 1.03).all()  # only split chains show it
    cauchy = np.random.default_rng(1).standard_cauchy((4, 500, 3))
    assert (rhat(cauchy) < 1.02).all()
    np.testing.assert_allclose(rhat(np.exp(x))[0], rhat(x)[0], atol=0.01)


def test_shapes_and_tensors():
    x = ar(0.3, 4, 50, 6)
    fields = torch.as_tensor(x).reshape(4, 50, 2, 3)
    np.testing.assert_allclose(rhat(fields), rhat(x).reshape(2, 3))
    assert ess(x[:, :, 0]).shape == ()
    result = check_chains(ar(0.0, 4, 1000, 5), rhat_limit=1.02)
    assert result.passed
    assert result.ess_limit == 400
    assert not check_chains(x).passed
    constant = np.ones((4, 50, 1))
    assert not check_chains(constant).passed
    assert ess(constant)[0] == 200


def test_nested_rhat_by_hand():
    x = np.random.default_rng(2).normal(size=(5, 3, 4, 2)) + np.arange(5)[:, None, None, None] * 0.3
    chain = x.mean(2)
    B = chain.mean(1).var(0, ddof=1)
    W = (chain.var(1, ddof=1) + x.var(2, ddof=1).mean(1)).mean(0)
    np.testing.assert_allclose(nested_rhat(x), np.sqrt(1 + B / W), rtol=1e-12)
    one = x[:, :, :1]
    W = one[:, :, 0].var(1, ddof=1).mean(0)
    np.testing.assert_allclose(nested_rhat(one), np.sqrt(1 + one[:, :, 0].mean(1).var(0, ddof=1) / W), rtol=1e-12)


def test_nested_rhat_of_many_short_chains():
    """Independent chains of one draw: B/W → 1/M, the threshold of the paper without tolerance."""
    rng = np.random.default_rng(3)
    M = 50
    met = nested_rhat(rng.normal(size=(200, M, 1, 4)))
    assert np.abs(met**2 - 1 - 1 / M).max() < 5 * np.sqrt(2 / 199) / M
    start = 2 * rng.normal(size=(200, 1, 1, 4))
    assert (nested_rhat(start + rng.normal(size=(200, M, 1, 4))) > 2).all()
    heavy = rng.standard_cauchy((200, M, 1, 4))
    assert np.abs(nested_rhat(heavy, rank_normalize=True) - np.sqrt(1 + 1 / M)).max() < 0.01


@pytest.mark.parametrize("phi", [0.0, 0.6, 0.95])
def test_missing_information_of_an_autoregression_of_energies(phi):
    """Var(E_n − E_{n−1}) / Var(E) = 2 (1 − φ): independent energies have 2, chains that creep through them little."""
    g = np.random.default_rng(1)
    chains, draws = 8, 20000
    energy = np.empty((chains, draws))
    energy[:, 0] = g.standard_normal(chains)
    for n in range(1, draws):
        energy[:, n] = phi * energy[:, n - 1] + np.sqrt(1 - phi**2) * g.standard_normal(chains)
    found = ebfmi(100 + 3 * energy)
    assert found.shape == (chains,)
    # the ratio of two averages of n (1 − φ)/(1 + φ) independent terms or more: 4.5 standard errors
    np.testing.assert_allclose(found, 2 * (1 - phi), rtol=4.5 * np.sqrt(4 / draws * (1 + phi) / (1 - phi)))
    with pytest.raises(ValueError, match=r"\(chain, draw\)"):
        ebfmi(energy[0])


def test_bad_input_says_what_to_do():
    with pytest.raises(ValueError, match="2 chains and 4 draws"):
        rhat(np.zeros((1, 10)))
    with pytest.raises(ValueError, match="two superchains"):
        nested_rhat(np.zeros((1, 4, 4)))
    with pytest.raises(ValueError, match="'bulk', 'tail' or 'mean'"):
        ess(np.zeros((2, 10)), kind="sd")
    with pytest.raises(ValueError, match="NaN"):
        ess(np.full((2, 10), np.nan))
