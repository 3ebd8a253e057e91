"""Flow matching: the denoiser in the velocity, its ODE, its loss, against closed forms."""

import math

import pytest
import torch

from invgen.covariance import Dense
from invgen.priors import ArrayData, DiffusionPrior, FlowMatching, GaussianMixturePrior, GaussianPrior, Training
from invgen.priors.networks import MLPDenoiser
from invgen.transforms import Affine

torch.set_num_threads(1)
F64 = torch.float64
MEAN = torch.tensor([1.0, -2.0, 0.3], dtype=F64)
C = torch.tensor([[1.0, 0.5, 0.0], [0.5, 0.6, 0.1], [0.0, 0.1, 0.2]], dtype=F64)


class Velocity(torch.nn.Module):
    """v(x, t) = E[y − n | x_t = x] of a Gaussian y ~ N(m, K), from the joint law of (y − n, x_t)."""

    def __init__(self, m, K, s):
        super().__init__()
        self.m, self.K, self.s = m, K, s
        self.anchor = torch.nn.Parameter(torch.zeros(1, dtype=F64))

    def forward(self, x, noise):
        t = (1 / (1 + (4 * noise).exp() / self.s))[:, None]
        values, basis = torch.linalg.eigh(self.K)
        # Cov(y − n, x_t) = t K − (1 − t), Var x_t = t² K + (1 − t)²
        gain = (t * values - (1 - t)) / (t**2 * values + (1 - t) ** 2)
        return self.m + (gain * ((x - t * self.m) @ basis)) @ basis.T


def exact(s=0.8, **options):
    law = GaussianPrior(MEAN, Dense(C), transform=Affine(2.0, 3.0))
    network = Velocity(MEAN / s, C / s**2, s)
    known = {"sigma_data": s, "transform": law.transform, "sigma_max": 1e6, "mean_variance_of_field": 20.0}
    return law, FlowMatching(network, (3,), **known | options).requires_grad_(False)


def test_the_denoiser_is_in_the_velocity():
    law, prior = exact()
    u = 3 * torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    sigma = torch.tensor([0.01, 0.3, 1.0, 10.0, 200.0], dtype=F64)
    torch.testing.assert_close(prior.denoise(u, sigma), law.denoise(u, sigma))
    # and back: v = (D/s − x_t)/(1 − t)
    t = 0.8 / (0.8 + sigma)
    x = t[:, None] * u / 0.8
    velocity = (law.denoise(u, sigma) / 0.8 - x) / (1 - t)[:, None]
    torch.testing.assert_close(prior.velocity(x, t), velocity)


def affine_law(f, n=3):
    """Mean and covariance of an affine map of z ~ N(0, I), without Monte-Carlo error."""
    z = torch.cat([torch.zeros(1, n, dtype=F64), torch.eye(n, dtype=F64)])
    x = f(z)
    M = (x[1:] - x[0]).T
    return x[0], M @ M.T


@pytest.mark.parametrize(("rule", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_decode_approaches_the_law_at_the_order_of_its_rule(rule, order):
    errors = []
    for steps in (20, 40, 80):
        law, prior = exact(rule=rule, latent_steps=steps)
        mean, cov = affine_law(prior.decode)
        # a straight path carries the mean exactly: v is constant along it
        torch.testing.assert_close(mean, law.mean(), rtol=1e-3, atol=1e-3)
        errors.append(float((cov - law.covariance().dense()).abs().max()))
    assert errors[-1] < (0.7 if order == 1 else 0.02)
    rate = math.log2(errors[1] / errors[2])
    assert rate > order - 0.25  # a Gaussian may be kinder than the rule


def test_the_adaptive_ode_has_the_law_of_the_prior():
    class Fixed:
        def normal(self, shape, *, dtype, tag=""):
            return torch.cat([torch.zeros(1, 3, dtype=F64), torch.eye(3, dtype=F64)])

    _, prior = exact()
    u = prior._draw(Fixed(), 1, F64, "ode", 0.0, 1e-6)
    M = (u[1:] - u[0]).T
    torch.testing.assert_close(u[0], MEAN, rtol=0, atol=2e-3)  # the level is told down to sigma_min only
    torch.testing.assert_close(M @ M.T, C, rtol=0, atol=2e-3)


@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "midpoint"])
def test_samplers_have_the_law_of_the_prior(sampler):
    law, prior = exact()
    n = 2000
    x = prior.sample(n, seed=0, steps=150, chunk=n, dtype=F64, sampler=sampler)
    off = x - law.mean()
    assert float((off.mean(0).abs() / (off.std(0) / math.sqrt(n))).max()) < 4.5
    pairs = off[:, :, None] * off[:, None]
    allowance = 4.5 * pairs.std(0) / math.sqrt(n) + 0.02 * 9
    assert bool(((pairs.mean(0) - law.covariance().dense()).abs() < allowance).all())


def test_the_loss_is_the_regression_on_the_velocity_at_uniform_times():
    """E|v − (y − n)|² over t ~ U(0, 1), u0 and n: for the exact velocity it is ∫ tr Cov(y − n | x_t) dt / dim."""
    law, prior = exact()
    K, eye = C / 0.64, torch.eye(3, dtype=F64)
    expected, count = 0.0, 2000
    for i in range(count):
        t = (i + 0.5) / count
        cross = t * K - (1 - t) * eye
        expected += (
            float((K + eye - cross @ torch.linalg.solve(t**2 * K + (1 - t) ** 2 * eye, cross)).trace()) / 3 / count
        )
    x = law.sample(8000, seed=0, dtype=F64)
    loss = prior.training_loss({"x": x}, torch.Generator().manual_seed(0))
    assert abs(float(loss.mean()) - expected) < 4 * float(loss.std()) / math.sqrt(len(x))


def test_training_finds_the_denoiser_and_the_density_of_a_mixture():
    law = GaussianMixturePrior(
        torch.tensor([0.4, 0.6]), torch.tensor([[-1.0, 0.5], [0.8, -0.3]]), [0.15 * torch.eye(2), 0.1 * torch.eye(2)]
    )
    x = law.sample(8192, seed=0)
    torch.manual_seed(0)
    prior = FlowMatching(MLPDenoiser(2, width=48, depth=2), (2,), sigma_data=0.9)
    held = law.sample(1500, seed=1)

    def gap():  # KL(law | prior)
        return float((law.log_prob(held) - prior.log_prob_estimate(held, trace="exact", rtol=1e-3, atol=1e-3)).mean())

    before = gap()
    Training(steps=500, batch_size=256, learning_rate=5e-3, warmup=20, ema=0.98).fit(
        prior, ArrayData(x), progress=False
    )
    noise = torch.randn(held.shape, generator=torch.Generator().manual_seed(0))
    for sigma in (0.3, 1.0):
        u, level = held + sigma * noise, torch.full((1500,), sigma)
        off = (prior.denoise(u, level) - law.denoise(u, level)).square().mean().sqrt()
        spread = (law.denoise(u, level) - held).square().mean().sqrt()
        assert float(off) < 0.35 * float(spread)
    assert -0.02 < gap() < 0.35 * before


def test_bad_options():
    with pytest.raises(ValueError, match="rule"):
        FlowMatching(MLPDenoiser(2), (2,), rule="rk9")
    with pytest.raises(ValueError, match="sampler"):
        FlowMatching(MLPDenoiser(2), (2,)).sample(1, sampler="none")
    with pytest.raises(ValueError, match="shape"):
        FlowMatching(MLPDenoiser(2), (2,)).velocity(torch.zeros(3, 3), 0.5)


def test_a_flow_of_a_diffusion_is_the_same_denoiser_and_its_velocity_follows():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = MLPDenoiser(3, width=8, depth=1).double()
        for p in network.parameters():
            p.data.add_(0.3 * torch.randn_like(p))
    teacher = DiffusionPrior(network, (3,), transform=Affine(2.0, 3.0), sigma_data=1.7)
    flow = FlowMatching.of(teacher)
    u = 3 * torch.randn(5, 3, dtype=F64, generator=torch.Generator().manual_seed(2))
    sigma = torch.tensor([0.01, 0.3, 1.7, 9.0, 100.0], dtype=F64)
    clean = teacher.denoise(u, sigma)
    torch.testing.assert_close(flow.denoise(u, sigma), clean, rtol=1e-10, atol=1e-10)
    t = 1.7 / (1.7 + sigma)
    x = u / (1.7 + sigma)[:, None]
    velocity = (clean / 1.7 - x) / (1 - t)[:, None]
    torch.testing.assert_close(flow.velocity(x, t), velocity, rtol=1e-8, atol=1e-8)
    assert flow.weighting == "velocity"
    with pytest.raises(TypeError, match="a parametrisation of flow, edm"):
        FlowMatching.of(DiffusionPrior(network, (3,), parametrisation="v"))
