"""The adaptive integrator, and the likelihood of the probability flow against closed forms."""

import math

import pytest
import torch

from invgen.covariance import Dense
from invgen.priors import DiffusionPrior, FlowMatching, GaussianMixturePrior, GaussianPrior, LogUniformLevels
from invgen.priors._ode import exact_trace, full_jacobian, integrate, probed_trace, rademacher
from invgen.priors._preconditioning import coefficients
from invgen.transforms import Affine, Exp

torch.set_num_threads(1)
F64 = torch.float64
KINDS = ("edm", "epsilon", "x", "v", "flow")


class Exact(torch.nn.Module):
    """The network that makes D the exact denoiser of a law: F = (D − c_skip u)/c_out."""

    def __init__(self, law, s, name):
        super().__init__()
        self.law, self.s, self.name = law, s, name
        self.anchor = torch.nn.Parameter(torch.zeros(1, dtype=F64))

    def forward(self, x, noise):
        sigma = (4 * noise).exp()
        wide = (-1, *(1,) * (x.ndim - 1))
        skip, out, inner = (c.reshape(wide) for c in coefficients(self.name, sigma, self.s))
        u = x / inner
        return (self.law.denoise(u, sigma) - skip * u) / out


def prior_of(law, name, s=0.8, **options):
    known = {"sigma_data": s, "mean_variance_of_field": 0.5, "transform": law.transform, "sigma_max": 1e5}
    if name == "flow":
        return FlowMatching(Exact(law, s, name), law.shape, **known | options)
    if name != "edm":
        known["levels"] = LogUniformLevels(1e-3, 1e4)
    return DiffusionPrior(Exact(law, s, name), law.shape, parametrisation=name, **known | options)


def correlated(n=6, transform=None):
    g = torch.Generator().manual_seed(2)
    A = torch.randn(n, n, generator=g, dtype=F64) / math.sqrt(n)
    return GaussianPrior(
        3 * torch.randn(n, generator=g, dtype=F64), Dense(A @ A.T + 0.05 * torch.eye(n, dtype=F64)), transform=transform
    )


# --- the integrator ------------------------------------------------------------------------------------------------


def test_integrator_reaches_its_tolerance_for_every_item():
    A = torch.tensor([[-0.2, 3.0], [-3.0, -0.2]], dtype=F64)
    y = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    speed = torch.tensor([1.0, 2.0, 0.1, 5.0, 3.0], dtype=F64)[:, None]
    for start, end in ((0.0, 2.0), (2.0, 0.5)):
        exact = torch.stack([torch.linalg.matrix_exp(float(s) * (end - start) * A) @ v for s, v in zip(speed, y)])
        for tolerance in (1e-4, 1e-8):
            found = integrate(lambda t, v, i: speed[i] * v @ A.T, y, start, end, rtol=tolerance, atol=tolerance)
            assert float((found - exact).abs().max()) < 200 * tolerance  # global error: over tens of steps


def test_integrator_has_order_five():
    counts, errors = [], []
    for tolerance in (1e-5, 1e-7, 1e-9):
        calls = []

        def slope(t, v, items, calls=calls):
            calls.append(1)
            return torch.cos(t)[:, None] * v

        y = integrate(slope, torch.ones(1, 1, dtype=F64), 0.0, 6.0, rtol=tolerance, atol=tolerance)
        counts.append(len(calls))
        errors.append(abs(float(y) - math.exp(math.sin(6.0))))
    # 10⁴ in the tolerance is 10^(4/5) = 6.3 in the number of steps
    assert 4 < counts[2] / counts[0] < 9
    assert errors[2] < 1e-3 * errors[0]


def test_items_of_a_batch_do_not_meet():
    def slope(t, v, items):
        return torch.sin(3 * v) * (1 + t[:, None])

    y = torch.linspace(-2, 2, 7, dtype=F64)[:, None]
    together = integrate(slope, y, 0.0, 1.0)
    for i in range(7):
        torch.testing.assert_close(integrate(slope, y[i : i + 1], 0.0, 1.0)[0], together[i], rtol=1e-13, atol=1e-13)


def test_integrator_says_when_it_cannot():
    with pytest.raises(RuntimeError, match="no longer finite"):
        integrate(lambda t, v, i: v / 0, torch.ones(1, 1, dtype=F64), 0.0, 1.0)
    with pytest.raises(RuntimeError, match="more than 5 steps"):
        integrate(lambda t, v, i: torch.cos(100 * t)[:, None], torch.ones(1, 1, dtype=F64), 0.0, 9.0, max_steps=5)


def test_traces():
    A = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    x = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(1), dtype=F64)

    def f(v):
        return (v.flatten(1).square() @ A.T).reshape(v.shape)

    J = A * 2 * x.flatten(1)[:, None, :]
    value, trace = exact_trace(f, x)
    torch.testing.assert_close(value, f(x))
    torch.testing.assert_close(trace, J.diagonal(dim1=1, dim2=2).sum(1))
    torch.testing.assert_close(full_jacobian(f, x)[1], J)
    probe = rademacher(0, 3, (2, 2), x, "t")
    assert set(probe.flatten().tolist()) == {-1.0, 1.0}
    v = probe.flatten(1)
    torch.testing.assert_close(probed_trace(f, x, probe)[1], torch.einsum("bi,bij,bj->b", v, J, v))


# --- the likelihood ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_exact_trace_gives_the_log_density_of_a_correlated_gaussian(name):
    law = correlated(transform=Affine(2.0, 3.0))
    prior = prior_of(law, name)
    x = law.sample(12, seed=0, dtype=F64)
    error = (prior.log_prob_estimate(x, trace="exact") - law.log_prob(x)) / 6
    assert float(error.abs().max()) < 1e-3  # nats a dimension; σ_min²/λ = 1e-4 of a point's quadratic form is in it
    assert float(error.mean().abs()) < 1e-4


def test_the_end_at_noise_is_exact_for_a_gaussian_whatever_its_level():
    # σ_T = 7 s is only 1.4 sd of the largest mode, which has a mean of its own: N(0, σ_T²) would be far off
    law = GaussianPrior(torch.tensor([4.0, -2.0], dtype=F64), Dense(torch.tensor([[30.0, 3.0], [3.0, 0.5]], dtype=F64)))
    prior = prior_of(law, "edm", s=1.0, mean_variance_of_field=0.1, sigma_max=1e3)
    assert prior.start_sigma == 7.0
    x = law.sample(8, seed=0, dtype=F64)
    error = prior.log_prob_estimate(x, trace="exact", rtol=1e-7, atol=1e-7) - law.log_prob(x)
    from invgen.priors._densities import terminal

    u = 7 * torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    noisy = torch.distributions.MultivariateNormal(law.mean(), law.covariance().dense() + 49 * torch.eye(2, dtype=F64))
    mean_only_converged = (30.0 / 79) ** 4 * 4  # what four iterations leave of the mean
    assert float((terminal(prior, u, 7.0, None) - noisy.log_prob(u)).abs().max()) < mean_only_converged
    assert float(error.abs().max()) < mean_only_converged


def test_exact_trace_gives_the_log_density_of_a_mixture():
    law = GaussianMixturePrior(
        torch.tensor([0.3, 0.7], dtype=F64),
        torch.tensor([[-2.0, 1.0], [1.0, 0.5]], dtype=F64),
        [torch.tensor([[0.3, 0.1], [0.1, 0.2]], dtype=F64), torch.tensor([[0.2, -0.1], [-0.1, 0.3]], dtype=F64)],
    )
    x = law.sample(10, seed=0, dtype=F64)
    for name in ("edm", "flow"):
        prior = prior_of(law, name, s=1.3, mean_variance_of_field=4.0)
        error = prior.log_prob_estimate(x, trace="exact", rtol=1e-6, atol=1e-6) - law.log_prob(x)
        assert float(error.abs().max()) < 2e-3, name


@pytest.mark.parametrize("name", ["edm", "flow"])
def test_hutchinson_is_unbiased_and_depends_on_seed_and_item(name):
    law = correlated(4)
    prior = prior_of(law, name)
    x = law.sample(1, seed=0, dtype=F64).repeat(600, 1)
    off = prior.log_prob_estimate(x, seed=1, rtol=1e-4, atol=1e-4) - law.log_prob(x)
    assert float(off.std()) > 0.01  # it is an estimate
    assert abs(float(off.mean())) < 4 * float(off.std()) / math.sqrt(600) + 1e-3
    a = prior.log_prob_estimate(x[:2], seed=1, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a, law.log_prob(x[:2]) + off[:2], rtol=1e-9, atol=1e-9)
    assert not torch.equal(a, prior.log_prob_estimate(x[:2], seed=2, rtol=1e-4, atol=1e-4))


def test_the_jacobian_of_a_curved_transform_is_in_it():
    law = correlated(3, transform=Exp())
    x = law.sample(5, seed=0, dtype=F64)
    found = prior_of(law, "v").log_prob_estimate(x, trace="exact")
    torch.testing.assert_close(found, law.log_prob(x), rtol=0, atol=3e-3)


def test_fields_and_single_precision():
    law = GaussianPrior(torch.tensor(1.0), torch.tensor(0.5), shape=(1, 3, 2))
    prior = prior_of(law, "edm", s=0.7)
    x = law.sample(4, seed=0)
    found = prior.log_prob_estimate(x, trace="exact", rtol=1e-4, atol=1e-4)
    assert found.dtype == x.dtype
    torch.testing.assert_close(found, law.log_prob(x), rtol=0, atol=5e-3)


# --- the variational bound -----------------------------------------------------------------------------------------


def test_elbo_is_the_closed_form_of_an_exact_denoiser():
    """E[ELBO] = −H + ½ Σ ln λ/(λ + σ_min²) − … : every term of the bound is known for a Gaussian."""
    law = correlated(5, transform=Affine(1.0, 2.0))
    prior = prior_of(law, "edm", sigma_min=0.01)
    n, s2, low2, high2 = 5, 0.64, 0.01**2, prior.start_sigma**2
    eigen = torch.linalg.eigvalsh(law.covariance_u.dense())
    # ∫ λ/(λ + σ²) d ln σ = ½ ln[σ²/(λ + σ²)]
    integral = 0.5 * float((high2 / (eigen + high2)).log().sum() - (low2 / (eigen + low2)).log().sum())
    kl = 0.5 * (n * (high2 / (high2 + s2) - 1 + math.log1p(s2 / high2)) + float(eigen.sum()) / (high2 + s2))
    expected = -0.5 * n * math.log(2 * math.pi * math.e * low2) - kl - integral - n * math.log(2.0)
    x = law.sample(3000, seed=0, dtype=F64)
    bound = prior.elbo(x, levels=24, seed=1)
    assert abs(float(bound.mean()) - expected) < 4 * float(bound.std()) / math.sqrt(len(x))
    assert float((law.log_prob(x) - bound).mean()) > -4 * float(bound.std()) / math.sqrt(len(x))  # a lower bound
    bits = prior.bits_per_dim(x, bin_width=0.5, levels=24, seed=1)
    torch.testing.assert_close(bits, -(bound / n + math.log(0.5)) / math.log(2))


def test_bad_options():
    prior = prior_of(correlated(2), "edm")
    with pytest.raises(ValueError, match="trace"):
        prior.log_prob_estimate(torch.zeros(1, 2), trace="guess")
    with pytest.raises(ValueError, match="shape"):
        prior.log_prob_estimate(torch.zeros(2))
    with pytest.raises(ValueError, match="shape"):
        prior.elbo(torch.zeros(2))
