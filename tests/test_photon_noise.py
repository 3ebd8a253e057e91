"""Photon and read noise: the exact law against numerical sums, approximations by their moments, draws by all of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

from invgen.driver import Streams
from invgen.noise import PoissonNoise
from invgen.operators import Identity, MatrixOperator
from invgen.photon_noise import PhotonNoise
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem
from invgen.solvers import EllipticalSlice

SHAPE = (3, 4)
EXPOSURE = torch.linspace(2.0, 9.0, 12, dtype=torch.float64).reshape(SHAPE)
SKY = torch.linspace(0.5, 30.0, 12, dtype=torch.float64).reshape(SHAPE)
PREDICTION = torch.linspace(0.0, 6.0, 24, dtype=torch.float64).reshape(2, *SHAPE)


def brute(d: np.ndarray, mu: np.ndarray, E: np.ndarray, B: np.ndarray, r: float) -> np.ndarray:
    """Density of d by the sum over every count up to far beyond both."""
    electrons, rate = E * d + B, E * mu + B
    k = np.arange(0, 3000)
    poisson = scipy.stats.poisson.logpmf(k, rate[..., None])
    normal = scipy.stats.norm.logpdf(electrons[..., None], k, r)
    return np.logaddexp.reduce(poisson + normal, axis=-1) + np.log(E)


@pytest.mark.parametrize("r", [0.3, 1.0, 4.0, 20.0])
def test_the_exact_law_is_the_whole_sum(r: float) -> None:
    noise = PhotonNoise(EXPOSURE, sky=SKY, read_noise=r)
    rng = np.random.default_rng(0)
    for reach in (1.0, 8.0):  # data that belong to the prediction, and data far away, as early samples see them
        d = PREDICTION + torch.from_numpy(rng.normal(0, reach, (2, *SHAPE)))
        got = noise(PREDICTION).log_prob(d)
        want = brute(d.numpy(), PREDICTION.numpy(), EXPOSURE.numpy(), SKY.numpy(), r).sum((1, 2))
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-9)


def test_it_is_a_density() -> None:
    """∫ p(d | μ) dd = 1 with the moments of the law, at few counts."""
    mu, noise = torch.tensor([[0.7]], dtype=torch.float64), PhotonNoise(3.0, sky=1.5, read_noise=0.8)
    d = torch.linspace(-4, 12, 8001, dtype=torch.float64)[:, None]
    p = noise(mu.expand(len(d), 1)).log_prob(d).exp().numpy()
    step = 16 / 8000
    assert p.sum() * step == pytest.approx(1, abs=1e-6)
    mean = (p * d[:, 0].numpy()).sum() * step
    assert mean == pytest.approx(0.7, abs=1e-5)
    variance = (p * (d[:, 0].numpy() - mean) ** 2).sum() * step
    assert variance == pytest.approx((3 * 0.7 + 1.5 + 0.64) / 9, abs=1e-5)
    assert float(noise(mu).variance) == pytest.approx((3 * 0.7 + 1.5 + 0.64) / 9, rel=1e-12)


def test_without_read_noise_it_is_the_poisson_law() -> None:
    counts = (PREDICTION * 4).round() / 4
    got = PhotonNoise(4.0)(PREDICTION + 0.1).log_prob(counts)
    # PoissonNoise counts mass a count, this density a unit of d
    torch.testing.assert_close(got, PoissonNoise(4.0)(PREDICTION + 0.1).log_prob(counts) + 12 * math.log(4.0))
    some = torch.zeros(SHAPE, dtype=torch.float64)
    some[1] = 2.0
    mixed = PhotonNoise(4.0, sky=1.0, read_noise=some)(PREDICTION).log_prob(counts)
    parts = [
        PhotonNoise(4.0, sky=1.0, read_noise=float(some[i, 0]))(PREDICTION[:, i]).log_prob(counts[:, i])
        for i in range(3)
    ]
    torch.testing.assert_close(mixed, sum(parts))


@pytest.mark.parametrize("likelihood", ["shifted_poisson", "gaussian"])
def test_approximations_come_close_with_many_counts(likelihood: str) -> None:
    """Differences of log p over two σ of a common level, which are what samplers see.

    The Gaussian's score has (z² − 1)/(2λ) too much a pixel: over Δλ = 2 √(λ/N) a random term of sd √(2/λ). The shifted
    law has a third cumulant of λ + r² for λ, and so r²/λ of that.
    """
    mu = torch.full((1, 400), 50.0, dtype=torch.float64)
    exact = PhotonNoise(40.0, sky=100.0, read_noise=5.0)
    other = PhotonNoise(40.0, sky=100.0, read_noise=5.0, likelihood=likelihood)  # type: ignore[arg-type]
    d = exact.draw(mu, Streams(0, [0]))
    sd = exact(mu).variance.sqrt().mean() / 20  # of the common level of 400 pixels
    change = [noise(mu + 2 * sd).log_prob(d) - noise(mu).log_prob(d) for noise in (exact, other)]
    rate = 40.0 * 50.0 + 100.0
    reach = 4 * math.sqrt(2 / rate)
    assert float((change[0] - change[1]).abs()) < reach * (1 if likelihood == "gaussian" else 25 / rate + 0.01)


def test_the_shift_has_the_two_moments() -> None:
    """The score of the right mean vanishes on average for all three, which is what two moments mean."""
    n = 200_000
    mu = torch.full((200, n // 200), 2.0, dtype=torch.float64)
    d = PhotonNoise(3.0, sky=4.0, read_noise=1.5).draw(mu, Streams(1, range(200)))
    for likelihood in ("exact", "shifted_poisson"):
        m = mu.clone().requires_grad_()
        noise = PhotonNoise(3.0, sky=4.0, read_noise=1.5, likelihood=likelihood)  # type: ignore[arg-type]
        (score,) = torch.autograd.grad(noise(m).log_prob(d).sum(), m)
        assert float(score.mean().abs() / (score.std() / math.sqrt(n))) < 4
        information = 9 / (3 * 2 + 4 + 1.5**2)  # of a law with that mean and variance; the exact one knows more
        assert float(score.square().mean()) == pytest.approx(information, rel=0.03 if likelihood != "exact" else 0.1)


@pytest.mark.parametrize("likelihood", ["exact", "shifted_poisson", "gaussian"])
def test_gradients(likelihood: str) -> None:
    noise = PhotonNoise(EXPOSURE, sky=SKY, read_noise=2.0, likelihood=likelihood)  # type: ignore[arg-type]
    d = PREDICTION + 0.3
    mu = (PREDICTION + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: noise(m).log_prob(d), (mu,))


def test_draws_have_the_moments_and_their_own_streams() -> None:
    n = 8000
    noise = PhotonNoise(EXPOSURE, sky=SKY, read_noise=2.0)
    d = noise.draw(PREDICTION[:1].expand(n, *SHAPE), Streams(3, range(n)))
    variance = (EXPOSURE * PREDICTION[0] + SKY + 4) / EXPOSURE**2
    assert ((d.mean(0) - PREDICTION[0]) / (variance / n).sqrt()).abs().max() < 5
    r = (d - PREDICTION[0]).square()
    assert ((r.mean(0) - variance) / (r.std(0) / n**0.5)).abs().max() < 5
    apart = noise.draw(PREDICTION[:1].expand(2, *SHAPE), Streams(3, [5, 6]))
    torch.testing.assert_close(apart, d[5:7])
    assert noise(PREDICTION).sample((3,)).shape == (3, 2, *SHAPE)


@pytest.mark.parametrize("likelihood", ["exact", "shifted_poisson", "gaussian"])
def test_restricted_is_the_marginal(likelihood: str) -> None:
    mask = torch.tensor([True, False, True, True] * 3).reshape(SHAPE)
    noise = PhotonNoise(EXPOSURE, sky=SKY, read_noise=2.0, likelihood=likelihood)  # type: ignore[arg-type]
    d = PREDICTION + 0.3
    kept = noise.restricted(mask)(PREDICTION[:, mask]).log_prob(d[:, mask])
    other = noise.restricted(~mask)(PREDICTION[:, ~mask]).log_prob(d[:, ~mask])
    torch.testing.assert_close(kept + other, noise(PREDICTION).log_prob(d))


def test_float32_keeps_its_nats_in_bright_pixels() -> None:
    mu = torch.full((1, 50), 2e5, dtype=torch.float64)
    noise = PhotonNoise(1.0, sky=100.0, read_noise=4.0)
    d = noise.draw(mu, Streams(0, [0]))
    exact = noise(mu).log_prob(d)
    assert float((noise(mu.float()).log_prob(d.float()) - exact).abs()) < 1e-3 * 50


def test_impossible_predictions() -> None:
    mu = torch.tensor([[1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    noise = PhotonNoise(1.0, sky=1.0, read_noise=1.0)
    value = noise(mu).log_prob(torch.zeros(1, 2, dtype=torch.float64))
    assert value.item() == -math.inf
    (g,) = torch.autograd.grad(noise(mu).log_prob(torch.zeros(1, 2, dtype=torch.float64)).sum(), mu)
    assert torch.isfinite(g).all()
    with pytest.raises(ValueError, match="0 or more"):
        noise.draw(mu.detach(), Streams(0, [0]))


def test_gaussian_at_a_prediction_and_in_a_problem() -> None:
    noise = PhotonNoise(EXPOSURE, sky=SKY, read_noise=2.0)
    R = noise.at(PREDICTION[0]).covariance(SHAPE).diagonal()
    torch.testing.assert_close(R, noise(PREDICTION[:1]).variance[0])
    with pytest.raises(ValueError, match="no variance"):
        PhotonNoise(1.0).at(torch.zeros(3))
    problem = InverseProblem(PREDICTION[0], Identity(SHAPE), noise, GaussianPrior(torch.ones(SHAPE), 0.1), mask=SKY > 3)
    assert torch.isfinite(problem.log_likelihood(torch.ones(2, *SHAPE, dtype=torch.float64))).all()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"exposure": 0.0}, "exposure must be positive"),
        ({"sky": -1.0}, "sky must not be negative"),
        ({"read_noise": math.nan}, "finite"),
        ({"read_noise": 80.0}, "needs 1123 terms"),
        ({"likelihood": "normal"}, "likelihood is"),
    ],
)
def test_bad_settings(settings: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        PhotonNoise(**settings)
    assert PhotonNoise(read_noise=80.0, likelihood="gaussian") is not None


@pytest.mark.parametrize("likelihood", ["exact", "shifted_poisson", "gaussian"])
def test_a_sampler_finds_the_posterior_of_few_counts(likelihood: str) -> None:
    """Three pixels of a few electrons each, one brightness: elliptical slices against the integral on a fine grid."""
    noise = PhotonNoise(4.0, sky=2.0, read_noise=1.2, likelihood=likelihood)  # type: ignore[arg-type]
    data = torch.tensor([0.9, 2.1, 0.2], dtype=torch.float64)
    A = MatrixOperator(torch.tensor([[1.0], [1.5], [0.5]], dtype=torch.float64))
    prior = GaussianPrior(torch.tensor([1.5], dtype=torch.float64), 0.36)
    problem = InverseProblem(data, A, noise, prior)
    x = torch.linspace(-2, 5, 4001, dtype=torch.float64)[:, None]
    log_p = problem.log_posterior(x)
    w = torch.softmax(log_p, 0)
    mean = float((w * x[:, 0]).sum())
    sd = float((w * (x[:, 0] - mean).square()).sum().sqrt())
    draws = (
        EllipticalSlice(draws=10, warmup=20, thin=3)
        .solve(problem, 600, seed=0, dtype=torch.float64)
        .flat()[0]
        .flatten()
    )
    n = len(draws)
    assert abs(float(draws.mean()) - mean) < 5 * sd / math.sqrt(n / 4)  # a quarter of the draws, to be careful
    assert float(draws.std()) / sd == pytest.approx(1, abs=5 / math.sqrt(2 * n / 4))


@pytest.mark.parametrize("likelihood", ["exact", "shifted_poisson", "gaussian"])
def test_dark_pixels_are_possible(likelihood: str) -> None:
    """λ = 0 with read noise: N(n; 0, r²) for the exact law, and a finite likelihood and gradient for all."""
    noise = PhotonNoise(1.0, read_noise=2.0, likelihood=likelihood)
    dark = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    data = torch.tensor([[0.0, 1.5, -2.5]], dtype=torch.float64)
    level = noise(dark).log_prob(data)
    (slope,) = torch.autograd.grad(level.sum(), dark)
    assert bool(torch.isfinite(level).all() & torch.isfinite(slope).all())
    if likelihood == "exact":
        right = torch.distributions.Normal(0.0, torch.tensor(2.0, dtype=torch.float64))
        assert float(level.detach()) == pytest.approx(float(right.log_prob(data).sum()), rel=1e-12)
        # d/dλ log Σ_k Poisson(k; λ) N(n; k, r²) = N(n; 1, r²)/N(n; 0, r²) − 1
        other = torch.distributions.Normal(1.0, torch.tensor(2.0, dtype=torch.float64))
        want = (other.log_prob(data) - right.log_prob(data)).exp() - 1
        torch.testing.assert_close(slope, want, rtol=1e-9, atol=1e-9)


def test_counts_without_read_noise_are_not_negative() -> None:
    noise = PhotonNoise(1.0)
    assert float(noise(torch.zeros(1, 1)).log_prob(torch.zeros(1, 1))) == 0.0
    assert float(noise(torch.ones(1, 1)).log_prob(-3.0 * torch.ones(1, 1))) == -math.inf
