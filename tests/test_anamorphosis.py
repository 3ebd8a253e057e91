"""Marginals: increasing, invertible, with the moments and quantiles of the data."""

import math

import numpy as np
import pytest
import torch

from invgen.anamorphosis import Hermite, NormalScore

torch.set_num_threads(1)
F64 = torch.float64
DATA = np.exp(0.4 * np.random.default_rng(1).standard_normal(3000) + 1)


@pytest.mark.parametrize("transform", [NormalScore(DATA), NormalScore(np.round(DATA, 1)), Hermite(DATA, degree=8)])
def test_inverse_and_log_determinant(transform):
    u = torch.linspace(-4, 4, 201, dtype=F64)[None]
    x = transform(u)
    assert bool((x[:, 1:] > x[:, :-1]).all())
    torch.testing.assert_close(transform.inverse(x), u, rtol=1e-8, atol=1e-8)
    v = u.clone().requires_grad_(True)
    slope = torch.autograd.grad(transform(v).sum(), v)[0]
    torch.testing.assert_close(transform.log_det(u), slope.log().sum(1))
    w = x.clone().requires_grad_(True)
    back = torch.autograd.grad(transform.inverse(w).sum(), w)[0]
    torch.testing.assert_close(back, 1 / slope, rtol=1e-4, atol=1e-6)


def test_marginals_are_those_of_the_data():
    u = torch.from_numpy(np.random.default_rng(2).standard_normal((1, 200_000)))
    for transform in (NormalScore(DATA), Hermite(DATA, degree=12)):
        x = transform(u)[0].numpy()
        assert abs(x.mean() / DATA.mean() - 1) < 0.01
        assert abs(x.std() / DATA.std() - 1) < 0.03
        for q in (0.05, 0.5, 0.95):
            assert abs(np.quantile(x, q) / np.quantile(DATA, q) - 1) < 0.03


def test_hermite_coefficients_of_a_lognormal_law():
    """x = exp(σu): φ_k = e^(σ²/2) σ^k/√k!; from exact quantiles, by the resolution of 20,000 of them."""
    from scipy.special import ndtri

    n, sigma = 20_000, 0.5
    h = Hermite(np.exp(sigma * ndtri((np.arange(n) + 0.5) / n)), degree=6)
    expected = [math.exp(sigma**2 / 2) * sigma**k / math.sqrt(math.factorial(k)) for k in range(7)]
    np.testing.assert_allclose(h.coefficients.numpy(), expected, atol=3e-3)


@pytest.mark.parametrize("cls", [NormalScore, Hermite])
def test_bad_data(cls):
    for data, words in (([1.0, math.nan, 2.0, 3.0], "1 of 4"), ([1.0, 1.0, 2.0], "three")):
        with pytest.raises(ValueError, match=words):
            cls(np.array(data))
    with pytest.raises(ValueError, match="degree"):
        Hermite(DATA, degree=0)
