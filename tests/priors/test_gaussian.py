"""Gaussian priors against dense algebra, with means that are not zero and covariances that are not white."""

import math

import numpy as np
import pytest
import torch

from invgen.covariance import Dense, Stationary
from invgen.grid import Grid
from invgen.linalg import cg
from invgen.priors import GaussianPrior, _closed_form, correlation, fit_gaussian, gaussian, ledoit_wolf
from invgen.transforms import Affine, Exp

torch.set_num_threads(1)
F64 = torch.float64


def random_dense(n, seed=0, **options):
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(n, n, generator=g, dtype=F64)
    return GaussianPrior.dense(
        3 + torch.randn(n, generator=g, dtype=F64), root @ root.T / n + 0.1 * torch.eye(n, dtype=F64), **options
    )


def matrix(prior):
    return prior.covariance_u.dense().double()


EVERY = [
    pytest.param(lambda: random_dense(5), id="dense"),
    pytest.param(
        lambda: GaussianPrior.diagonal(torch.tensor([[1.0, 2.0, -3.0]]), torch.tensor([[0.3, 2.0, 0.01]], dtype=F64)),
        id="diagonal",
    ),
    pytest.param(lambda: GaussianPrior(2.0, 0.7, shape=(1, 4)), id="scalar"),
    pytest.param(
        lambda: GaussianPrior.stationary(
            (2, 4, 5), sd=1.5, length=(1.0, 2.0), kind="exponential", mean=5.0, nugget=0.3
        ),
        id="periodic",
    ),
    pytest.param(
        lambda: GaussianPrior.stationary((1, 6, 4), variance=0.5, length=(2.0, 1.0), nu=1.5, padding="auto", mean=-1.0),
        id="padded",
    ),
]


@pytest.mark.parametrize("make", EVERY)
def test_against_dense_algebra(make):
    prior = make()
    C, m, n = matrix(prior), prior.mean_u.flatten(), prior.dim
    u = m + 2 * torch.randn(3, n, generator=torch.Generator().manual_seed(1), dtype=F64)
    field = u.reshape(3, *prior.shape)
    reference = torch.distributions.MultivariateNormal(m, C).log_prob(u)
    torch.testing.assert_close(prior.log_prob(field), reference, rtol=1e-9, atol=1e-9)
    sigma = torch.tensor([0.1, 1.0, 7.0], dtype=F64)
    for i, s in enumerate(sigma):
        gain = C @ torch.linalg.inv(C + s**2 * torch.eye(n, dtype=F64))
        torch.testing.assert_close(
            prior.denoise(field, sigma)[i].flatten(), m + gain @ (u[i] - m), rtol=1e-8, atol=1e-9
        )
        torch.testing.assert_close(prior.denoise(field, float(s))[i], prior.denoise(field, sigma)[i])
        torch.testing.assert_close(
            prior.posterior_covariance_apply(field, sigma)[i].flatten(), s**2 * gain @ u[i], rtol=1e-8, atol=1e-9
        )
    z = torch.eye(math.prod(prior.latent_shape), dtype=F64).reshape(-1, *prior.latent_shape)
    L = (prior.decode(z).flatten(1) - m).T
    torch.testing.assert_close(L @ L.T, C, rtol=1e-9, atol=1e-9)


def test_jacobian_of_the_transform_by_quadrature():
    for transform in (Affine(2.0, -0.5), Exp()):
        prior = GaussianPrior(torch.tensor([0.4]), 0.3, transform=transform)
        x = torch.linspace(-8, 8, 40001, dtype=F64) if transform.affine else torch.linspace(1e-6, 60, 400001, dtype=F64)
        p = prior.log_prob(x[:, None]).exp()
        assert float(torch.trapezoid(p, x)) == pytest.approx(1, abs=1e-6)
        expected = 2 - 0.5 * 0.4 if transform.affine else math.exp(0.4 + 0.15)
        assert float(torch.trapezoid(p * x, x)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("kind", "nu"), [("matern", 0.5), ("matern", 1.5), ("exponential", 1.0), ("gaussian", 1.0)])
def test_correlation_closed_forms(kind, nu):
    r = np.array([0.0, 1e-8, 0.3, 1.0, 4.0, 30.0])
    forms = {"gaussian": np.exp(-(r**2) / 2), "exponential": np.exp(-r)}
    expected = forms.get(kind, np.exp(-r) if nu == 0.5 else (1 + math.sqrt(3) * r) * np.exp(-math.sqrt(3) * r))
    np.testing.assert_allclose(correlation(r, kind, nu), expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("angle", [0.0, 30.0])
def test_padded_covariance_is_exact_at_every_lag_in_physical_units(angle):
    grid = Grid((6, 8), (10.0, 25.0), units=("m", "m"))
    prior = GaussianPrior.stationary(
        grid, variance=2.0, length=(20.0, 60.0), nu=1.0, padding="auto", angle=angle, mean=1.0
    )
    assert not prior.covariance_u.periodic
    z, x = np.meshgrid(10.0 * np.arange(6), 25.0 * np.arange(8), indexing="ij")
    dz, dx = z.ravel()[:, None] - z.ravel(), x.ravel()[:, None] - x.ravel()
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    r = np.hypot((c * dz + s * dx) / 20.0, (-s * dz + c * dx) / 60.0)
    np.testing.assert_allclose(matrix(prior).numpy(), 2.0 * correlation(r, "matern", 1.0), atol=2e-5)


def test_draws_have_the_stated_covariance_at_lags():
    prior = GaussianPrior.stationary(
        (1, 12, 10), sd=3.0, length=(3.0, 1.5), kind="exponential", padding="auto", mean=7.0
    )
    n = 3000
    x = prior.sample(n, seed=0, dtype=F64)[:, 0] - 7.0
    for dz, dx in ((0, 0), (1, 0), (0, 1), (5, 0), (11, 0), (0, 9), (3, 2)):
        products = x[:, : 12 - dz, : 10 - dx] * x[:, dz:, dx:]
        per_draw = products.mean((1, 2))
        expected = 9.0 * math.exp(-math.hypot(dz / 3.0, dx / 1.5))
        assert abs(float(per_draw.mean()) - expected) < 5 * float(per_draw.std()) / math.sqrt(n), (dz, dx)


def test_a_covariance_that_does_not_fit_the_torus_says_pad_more():
    with pytest.raises(ValueError, match="pad more"):
        GaussianPrior.stationary((1, 16, 16), sd=1.0, length=8.0, nu=1.5)
    padded = GaussianPrior.stationary((1, 16, 16), sd=1.0, length=8.0, nu=1.5, padding="auto")
    assert padded.sample(1).shape == (1, 1, 16, 16)


def test_smooth_correlation_keeps_its_variance_after_the_floor():
    prior = GaussianPrior.stationary((1, 32), variance=2.0, length=3.0, kind="gaussian")
    assert float(prior.covariance_u.diagonal().max()) == pytest.approx(2.0, rel=1e-6)
    assert bool(torch.isfinite(prior.log_prob(prior.sample(2, dtype=F64))).all())


def test_large_padded_field_solves_by_cg_with_its_derivatives(monkeypatch):
    exact = GaussianPrior.stationary((1, 6, 5), variance=0.5, length=2.0, padding="auto", mean=1.0)
    u = 1 + torch.randn(2, 1, 6, 5, generator=torch.Generator().manual_seed(0), dtype=F64)
    sigma = torch.tensor([0.2, 2.0], dtype=F64)
    expected = exact.denoise(u, sigma)
    prior = GaussianPrior(exact.mean_u, exact.covariance_u)
    for module in (gaussian, _closed_form):
        monkeypatch.setattr(module, "DENSE_LIMIT", 10)
    torch.testing.assert_close(prior.denoise(u, sigma), expected, rtol=1e-8, atol=1e-8)
    f = lambda v: prior.denoise(v, sigma)  # noqa: E731
    v = torch.randn(u.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    jv = torch.func.jvp(f, (u,), (v,))[1]
    torch.testing.assert_close(jv, exact.denoise(1 + v, sigma) - 1, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(torch.func.vjp(f, u)[1](v)[0], jv, rtol=1e-8, atol=1e-8)
    assert torch.autograd.gradcheck(f, u.requires_grad_(True), fast_mode=True)
    with pytest.raises(TypeError, match="periodic"):
        prior.log_prob(u.detach())


def test_law_in_x_under_affine_transforms():
    for transform in (Affine(1.0, -3.0), Affine(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 2.0]))):
        for base in (
            GaussianPrior.stationary(
                (2, 6), variance=(0.5, 2.0), length=1.0, kind="exponential", mean=-1.0, transform=transform
            ),
            GaussianPrior.diagonal(torch.ones(2, 6), torch.rand(2, 6, dtype=F64) + 0.1, transform=transform),
        ):
            law = base.in_x()
            assert type(law.covariance_u) is type(base.covariance_u)
            x = base.sample(4, dtype=F64)
            torch.testing.assert_close(law.log_prob(x), base.log_prob(x))
            torch.testing.assert_close(base.mean(), transform(base.mean_u[None])[0])
    field = Affine(0.0, torch.rand(2, 6, dtype=F64) + 0.5)
    base = GaussianPrior.stationary((2, 6), variance=1.0, length=1.0, kind="exponential", transform=field)
    assert isinstance(base.covariance(), Dense)
    x = base.sample(3, dtype=F64)
    torch.testing.assert_close(base.in_x().log_prob(x), base.log_prob(x))
    with pytest.raises(TypeError, match="affine"):
        GaussianPrior(torch.zeros(2), 1.0, transform=Exp()).mean()


def test_given_is_the_conditional():
    prior = random_dense(4, transform=Affine(1.0, 2.0))
    x = prior.sample(1, dtype=F64)[0]
    part = prior.given(torch.tensor([2, 0]), x[[2, 0]])
    base = prior.in_x()
    marginal = GaussianPrior.dense(base.mean_u[[2, 0]], base.covariance_u.dense()[[2, 0]][:, [2, 0]])
    torch.testing.assert_close(
        part.log_prob(x[[1, 3]][None]) + marginal.log_prob(x[[2, 0]][None]), prior.log_prob(x[None])
    )
    with pytest.raises(ValueError, match="distinct"):
        prior.given(torch.tensor([1, 1]), torch.zeros(2))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: GaussianPrior(0.0, 1.0), "shape"),
        (lambda: GaussianPrior(torch.zeros(3), torch.ones(2)), "variances"),
        (lambda: GaussianPrior(torch.zeros(3), -1.0), "positive"),
        (lambda: GaussianPrior(torch.tensor([float("nan")]), 1.0), "finite"),
        (lambda: GaussianPrior(torch.zeros(1, 3), 1.0, grid=Grid((4,), (1.0,))), "grid"),
        (lambda: GaussianPrior.dense(torch.zeros(2), torch.tensor([[1.0, 2.0], [2.0, 1.0]])), "positive definite"),
        (lambda: GaussianPrior.stationary((1, 8), length=1.0), "exactly one"),
        (lambda: GaussianPrior.stationary((1, 8), sd=1.0, length=-1.0), "positive"),
        (lambda: GaussianPrior.stationary((1, 8), sd=1.0, length=1.0, kind="cubic"), "unknown"),
        (lambda: GaussianPrior.stationary((8,), sd=1.0, length=1.0), "channels"),
        (lambda: GaussianPrior.fit(torch.zeros(1, 3)), "two examples"),
        (lambda: GaussianPrior.fit(torch.full((3, 3), float("nan"))), "finite"),
        (lambda: GaussianPrior.fit(torch.randn(3, 9), shrinkage=None), "singular"),
        (lambda: GaussianPrior.fit(torch.randn(3, 9), structure="sparse"), "structure"),
        (lambda: random_dense(3).denoise(torch.zeros(2, 3), torch.ones(3)), "sigma"),
        (lambda: random_dense(3).denoise(torch.zeros(2, 3), -1.0), "sigma"),
    ],
)
def test_bad_input(call, text):
    with pytest.raises(ValueError, match=text):
        call()


# --- fit -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "p"), [(20, 50), (500, 8)])
def test_ledoit_wolf_equals_scikit_learn(n, p):
    sklearn = pytest.importorskip("sklearn.covariance")
    x = random_dense(p).sample(n, seed=3, dtype=F64)
    matrix_, intensity = sklearn.ledoit_wolf(x.numpy())
    own, rho = ledoit_wolf(x - x.mean(0))
    assert rho == pytest.approx(intensity, rel=1e-10)
    np.testing.assert_allclose(own.numpy(), matrix_, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(matrix(GaussianPrior.fit(x)).numpy(), matrix_, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shrinkage", ["ledoit-wolf", None, 0.0])
def test_fit_recovers_in_u(shrinkage):
    n, transform = 6000, Affine(1.0, -2.0)
    truth = random_dense(4, transform=transform)
    x = truth.sample(n, seed=1, dtype=F64)
    fitted = GaussianPrior.fit(x, shrinkage=shrinkage, transform=transform)
    C = matrix(truth)
    mean_se = (C.diagonal() / n).sqrt()
    assert float(((fitted.mean_u - truth.mean_u).abs() / mean_se).max()) < 5
    spread = ((C**2 + C.diagonal()[:, None] * C.diagonal()) / n).sqrt()  # Var S_ij of a Gaussian sample
    allowance = 5 * spread + (0.01 * C.diagonal().mean() if shrinkage == "ledoit-wolf" else 0)
    assert bool(((matrix(fitted) - C).abs() < allowance).all())
    diagonal = GaussianPrior.fit(x, structure="diagonal", shrinkage=shrinkage, transform=transform)
    assert bool(((diagonal.covariance_u.diagonal() - C.diagonal()).abs() < allowance.diagonal()).all())


def test_stationary_fit_recovers_the_periodic_spectrum():
    truth = GaussianPrior.stationary(
        (2, 8, 8),
        variance=(0.5, 4.0),
        length=1.5,
        kind="exponential",
        mean=torch.tensor([1.0, -2.0])[:, None, None].expand(2, 8, 8),
    )
    n = 2000
    fitted = GaussianPrior.fit(
        truth.sample(n, seed=2, dtype=F64), structure="stationary", mean="constant", shrinkage=None
    )
    ratio = fitted.covariance_u.spectrum / truth.covariance_u.spectrum
    # a periodogram ordinate has the relative variance 2 at the real frequencies and 1 elsewhere
    assert float((ratio - 1).abs().max()) < 5 * math.sqrt(2 / n)
    assert float((fitted.mean_u - truth.mean_u).abs().max()) < 5 * math.sqrt(
        4 * float((ratio * 0 + truth.covariance_u.spectrum).max()) / (64 * n)
    )


def test_padded_stationary_fit_has_the_stated_lag_bias():
    truth = GaussianPrior.stationary((1, 16), variance=2.0, length=4.0, kind="exponential", padding="auto", mean=3.0)
    n = 8000
    fitted = GaussianPrior.fit(
        truth.sample(n, seed=2, dtype=F64), structure="stationary", padding="auto", shrinkage=None
    )
    assert isinstance(fitted.covariance_u, Stationary)
    row = matrix(fitted)[0]
    lags = torch.arange(16, dtype=F64)
    expected = 2.0 * torch.exp(-lags / 4) * (1 - lags / 16)
    # each lag is a mean of n products, each with a variance of at most 2 · 2²
    assert float((row - expected).abs().max()) < 5 * math.sqrt(8 / n)


def test_mean_by_rows_and_the_effect_of_shrinkage():
    trend = torch.linspace(0, 9, 6, dtype=F64)[None, :, None].expand(1, 6, 4)
    x = trend + 0.1 * torch.randn(50, 1, 6, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    rows = fit_gaussian(x, structure="diagonal", mean="rows")
    assert float((rows.mean_u - trend).abs().max()) < 5 * 0.1 / math.sqrt(200)
    assert float((rows.mean_u - rows.mean_u[..., :1]).abs().max()) == 0
    full = fit_gaussian(x, structure="diagonal", shrinkage=1.0).covariance_u.diagonal()
    assert float(full.max() - full.min()) < 1e-15
    white = fit_gaussian(x, structure="stationary", shrinkage=1.0).covariance_u.spectrum
    assert float(white.max() - white.min()) < 1e-12


def test_shrinkage_beats_the_sample_covariance():
    truth = random_dense(30, seed=5)
    x = truth.sample(40, seed=0, dtype=F64)
    errors = [float((matrix(GaussianPrior.fit(x, shrinkage=s)) - matrix(truth)).norm()) for s in ("ledoit-wolf", None)]
    assert errors[0] < errors[1]


def test_cg_reference_is_what_the_padded_denoiser_uses():
    prior = GaussianPrior.stationary((1, 5), variance=1.0, length=1.0, padding="auto")
    v = torch.randn(2, 1, 5, generator=torch.Generator().manual_seed(0), dtype=F64)
    x = cg(lambda w: prior.covariance_u.apply(w) + w, prior.covariance_u.apply(v), rtol=1e-12).x
    torch.testing.assert_close(prior.denoise(v, 1.0), x, rtol=1e-9, atol=1e-9)
