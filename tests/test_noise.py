import math

import numpy as np
import pytest
import scipy.stats
import torch

from invgen.covariance import Dense, Diagonal, Scalar, Stationary
from invgen.driver import Streams
from invgen.noise import GaussianNoise, LaplaceNoise, PoissonNoise, StudentTNoise

SHAPE = (3, 4)
PREDICTION = torch.linspace(0.5, 3.0, 24, dtype=torch.float64).reshape(2, *SHAPE)
DATA = PREDICTION + torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(2, *SHAPE) ** 3


def spd(n):
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return a @ a.mT / n + 0.3 * torch.eye(n, dtype=torch.float64)


def padded():
    k = torch.arange(16.0, dtype=torch.float64)
    S = torch.fft.fft((-0.5 * (torch.minimum(k, 16 - k) / 1.2) ** 2).exp()).real.clamp_min(0)
    return Stationary(S, SHAPE)


def reference(covariance):
    mean, data = PREDICTION.flatten(1).numpy(), DATA.flatten(1).numpy()
    return torch.tensor([scipy.stats.multivariate_normal(m, covariance.numpy()).logpdf(d) for m, d in zip(mean, data)])


SD = torch.linspace(0.2, 2.0, 12, dtype=torch.float64).reshape(SHAPE)


@pytest.mark.parametrize(
    ("noise", "R"),
    [
        (GaussianNoise(0.7), 0.49 * torch.eye(12, dtype=torch.float64)),
        (GaussianNoise(SD), torch.diag(SD.flatten() ** 2)),
        (GaussianNoise(covariance=Dense(spd(12), SHAPE)), spd(12)),
        (GaussianNoise(0.7, model_error=Dense(spd(12), SHAPE)), spd(12) + 0.49 * torch.eye(12, dtype=torch.float64)),
        (GaussianNoise(SD, model_error=0.25), torch.diag(SD.flatten() ** 2 + 0.25)),
    ],
)
def test_gaussian_log_prob(noise, R):
    torch.testing.assert_close(noise(PREDICTION).log_prob(DATA), reference(R), rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(noise.covariance(SHAPE).dense(), R, rtol=1e-10, atol=1e-10)
    variance = noise(PREDICTION).variance
    torch.testing.assert_close(variance.flatten(1), R.diagonal().expand(2, 12), rtol=1e-10, atol=1e-10)


def test_variance_of_flat_data():
    sd = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    for R in (Diagonal(sd.square()), Dense(torch.diag(sd.square()))):
        for n in (2, 3):  # 3 items of 3 data: one variance a datum is not one an item
            got = GaussianNoise(covariance=R)(torch.zeros(n, 3, dtype=torch.float64)).variance
            torch.testing.assert_close(got, sd.square().expand(n, 3))


def test_complex_gaussian_is_circular_with_variance_per_datum():
    z = torch.randn(2, 5, dtype=torch.complex128)
    got = GaussianNoise(0.8)(torch.zeros_like(z)).log_prob(z)
    part = torch.distributions.Normal(0.0, 0.8 / math.sqrt(2))
    torch.testing.assert_close(got, (part.log_prob(z.real) + part.log_prob(z.imag)).sum(1))
    H = torch.randn(5, 5, dtype=torch.complex128)
    H = H @ H.mH + torch.eye(5, dtype=torch.complex128)
    got = GaussianNoise(covariance=Dense(H))(torch.zeros_like(z)).log_prob(z)
    want = (
        -torch.einsum("bi,ij,bj->b", z.conj(), torch.linalg.inv(H), z).real
        - torch.linalg.slogdet(H)[1]
        - 5 * math.log(math.pi)
    )
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_named_sigma_is_one_level_an_item():
    noise, level = GaussianNoise("sd"), torch.tensor([0.3, 2.0], dtype=torch.float64)
    got = noise(PREDICTION, sd=level).log_prob(DATA)
    want = torch.stack(
        [GaussianNoise(float(s))(PREDICTION[i : i + 1]).log_prob(DATA[i : i + 1])[0] for i, s in enumerate(level)]
    )
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(noise(PREDICTION, sd=level[:, None]).log_prob(DATA), want)
    with pytest.raises(ValueError, match="was not given"):
        noise(PREDICTION)
    with pytest.raises(ValueError, match="must be positive"):
        noise(PREDICTION, sd=-level)


def test_other_families_against_scipy():
    p, d = PREDICTION.numpy(), DATA.numpy()
    torch.testing.assert_close(
        LaplaceNoise(0.6)(PREDICTION).log_prob(DATA), torch.tensor(scipy.stats.laplace(p, 0.6).logpdf(d).sum((1, 2)))
    )
    torch.testing.assert_close(
        LaplaceNoise(SD)(PREDICTION).log_prob(DATA),
        torch.tensor(scipy.stats.laplace(p, SD.numpy()).logpdf(d).sum((1, 2))),
    )
    torch.testing.assert_close(
        StudentTNoise(0.6, 3.0)(PREDICTION).log_prob(DATA),
        torch.tensor(scipy.stats.t(3.0, p, 0.6).logpdf(d).sum((1, 2))),
    )
    counts = torch.tensor(np.round(p * 4) / 4)
    got = PoissonNoise(4.0)(PREDICTION).log_prob(counts)
    torch.testing.assert_close(got, torch.tensor(scipy.stats.poisson(4 * p).logpmf(np.round(p * 4)).sum((1, 2))))


FAMILIES = [
    (GaussianNoise(0.7), 0.7),
    (GaussianNoise(SD), SD),
    (GaussianNoise(covariance=padded()), None),
    (GaussianNoise(0.5, model_error=padded()), None),
    (GaussianNoise(covariance=Dense(spd(12), SHAPE)), None),
    (LaplaceNoise(0.6), 0.6 * math.sqrt(2)),
    (StudentTNoise(0.6, 9.0), 0.6 * math.sqrt(9 / 7)),
    (PoissonNoise(4.0), None),
]


@pytest.mark.parametrize(("noise", "sd"), FAMILIES)
def test_draws_have_the_right_moments(noise, sd):
    n = 8000
    prediction = PREDICTION[:1].expand(n, *SHAPE)
    d = noise.draw(prediction, Streams(3, range(n)))
    assert d.dtype == torch.float64
    if isinstance(noise, GaussianNoise):
        variance = noise.covariance(SHAPE).diagonal()
        variance = variance.expand(SHAPE) if variance.ndim == 0 else variance
    else:
        variance = PREDICTION[0] / 4 if sd is None else torch.as_tensor(sd, dtype=torch.float64).expand(SHAPE) ** 2
    r = d - prediction
    z = r.mean(0) / (variance / n).sqrt()
    assert z.abs().max() < 5
    second = r.square()
    assert ((second.mean(0) - variance) / (second.std(0) / n**0.5)).abs().max() < 5
    if isinstance(noise, GaussianNoise):  # correlations too
        flat, R = r.flatten(1), noise.covariance(SHAPE).dense()
        error = (flat.mT @ flat / n - R) / ((R.diagonal()[:, None] * R.diagonal() + R**2) / n).sqrt()
        assert error.abs().max() < 5


@pytest.mark.parametrize(("noise", "sd"), FAMILIES)
def test_draws_do_not_depend_on_the_batch(noise, sd):
    prediction = PREDICTION[:1].expand(6, *SHAPE)
    together = noise.draw(prediction, Streams(3, range(6)))
    apart = torch.cat(
        [noise.draw(prediction[:2], Streams(3, [0, 1])), noise.draw(prediction[:4], Streams(3, [2, 3, 4, 5]))]
    )
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-12)


def test_heavy_tails_follow_their_law():
    prediction = torch.zeros(1, 40000, dtype=torch.float64)
    for noise, law in (
        (LaplaceNoise(0.6), scipy.stats.laplace(0, 0.6)),
        (StudentTNoise(0.6, 2.5), scipy.stats.t(2.5, 0, 0.6)),
    ):
        d = noise.draw(prediction, Streams(0, [0]))[0].numpy()
        assert scipy.stats.kstest(d, law.cdf).pvalue > 1e-5


def test_laplace_draw_is_finite_at_the_end_of_the_stream():
    class Zero:
        def uniform(self, shape, **_):
            return torch.zeros(1, *shape)

    assert torch.isfinite(LaplaceNoise(1.0).draw(torch.zeros(1, 3), Zero())).all()


def test_distribution_samples():
    noise = GaussianNoise("sd", model_error=Scalar(0.01, SHAPE))
    law = noise(PREDICTION, sd=torch.tensor([0.1, 3.0], dtype=torch.float64))
    draws = law.sample((4000,))
    assert draws.shape == (4000, 2, *SHAPE)
    sd = (torch.tensor([0.1, 3.0], dtype=torch.float64) ** 2 + 0.01).sqrt()[:, None, None]
    assert ((draws.std(0) / sd - 1) * math.sqrt(8000)).abs().max() < 5
    assert GaussianNoise(covariance=padded())(PREDICTION).rsample((2, 3)).shape == (2, 3, 2, *SHAPE)
    assert PoissonNoise(2.0)(PREDICTION).sample().shape == (2, *SHAPE)


@pytest.mark.parametrize(
    "noise",
    [
        GaussianNoise(0.7),
        GaussianNoise(SD),
        GaussianNoise(covariance=Dense(spd(12), SHAPE)),
        GaussianNoise(covariance=Diagonal(SD)),
        GaussianNoise(0.7, model_error=Dense(spd(12), SHAPE)),
        GaussianNoise("sd", model_error=Diagonal(SD)),
        GaussianNoise("sd", model_error=0.3),
        LaplaceNoise(SD),
        StudentTNoise(SD, 3.0),
        PoissonNoise(4.0),
    ],
)
def test_restricted_is_the_marginal(noise):
    mask = torch.tensor([True, False, True, True] * 3).reshape(SHAPE)
    theta = {"sd": torch.tensor([0.4, 1.5], dtype=torch.float64)} if getattr(noise, "sigma", None) == "sd" else {}
    data = (PREDICTION * 4).round() / 4
    part = noise.restricted(mask)(PREDICTION[:, mask], **theta).log_prob(data[:, mask])
    if isinstance(noise, GaussianNoise):
        rows = mask.flatten()
        for i in range(2):
            R = noise.covariance(
                SHAPE, **{k: v[i] for k, v in theta.items()} if not theta else {"sd": theta["sd"][i : i + 1]}
            )
            R = R.dense() if not R.per_item else torch.diag(R.diagonal()[0].expand(SHAPE).flatten())
            law = scipy.stats.multivariate_normal(PREDICTION[i][mask].numpy(), R[rows][:, rows].numpy())
            assert abs(law.logpdf(data[i][mask].numpy()) - float(part[i])) < 1e-8
    else:
        alone = noise(PREDICTION)
        full = alone.base_dist.log_prob(data)[:, mask].sum(1)
        torch.testing.assert_close(part, full)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: GaussianNoise(-0.1), "positive"),
        (lambda: GaussianNoise(0.0), "positive"),
        (lambda: GaussianNoise(float("nan")), "positive"),
        (lambda: GaussianNoise(torch.tensor([1.0, -1.0])), "smallest given is -1"),
        (lambda: GaussianNoise(), "exactly one"),
        (lambda: GaussianNoise(1.0, covariance=Scalar(1.0, (3,))), "exactly one"),
        (lambda: LaplaceNoise(-1.0), "positive"),
        (lambda: StudentTNoise(1.0, 0.0), "dof"),
        (lambda: StudentTNoise(float("inf")), "finite"),
        (lambda: PoissonNoise(-2.0), "exposure"),
        (lambda: PoissonNoise().draw(-torch.ones(1, 2), Streams(0, [0])), "non-negative"),
        (lambda: GaussianNoise(torch.ones(5))(PREDICTION), "one variance a datum"),
        (lambda: GaussianNoise(covariance=Scalar(1.0, (5,)))(PREDICTION), "lives on"),
    ],
)
def test_bad_noise(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_heavy_tails_refuse_complex_data():
    with pytest.raises(TypeError, match="GaussianNoise"):
        LaplaceNoise(1.0)(torch.zeros(1, 2, dtype=torch.complex64))
