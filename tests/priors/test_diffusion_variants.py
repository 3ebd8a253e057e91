"""Parametrisations, weightings, noise levels and samplers of diffusion priors, against closed forms."""

import itertools
import math

import pytest
import torch

from invgen.covariance import Dense
from invgen.priors import (
    AdaptiveLevels,
    ArrayData,
    CosineLevels,
    DiffusionPrior,
    FlowMatching,
    GaussianPrior,
    LinearBetas,
    LogNormalLevels,
    LogUniformLevels,
    Training,
    UniformTime,
)
from invgen.priors._preconditioning import coefficients
from invgen.priors.levels import Levels
from invgen.priors.networks import MLPDenoiser
from invgen.transforms import Affine

torch.set_num_threads(1)
F64 = torch.float64
KINDS = ("edm", "epsilon", "x", "v")
MEAN = torch.tensor([1.0, -2.0, 0.3], dtype=F64)
C = torch.tensor([[1.0, 0.5, 0.0], [0.5, 0.6, 0.1], [0.0, 0.1, 0.2]], dtype=F64)
EYE = torch.eye(3, dtype=F64)


class Exact(torch.nn.Module):
    """The network that makes D the exact denoiser of a law: F = (D − c_skip u)/c_out."""

    def __init__(self, law, s, name, sigma_of=lambda noise: (4 * noise).exp()):
        super().__init__()
        self.law, self.s, self.name, self.sigma_of = law, s, name, sigma_of
        self.anchor = torch.nn.Parameter(torch.zeros(1, dtype=F64))

    def forward(self, x, noise):
        sigma = self.sigma_of(noise)
        skip, out, inner = (c[:, None] for c in coefficients(self.name, sigma, self.s))
        u = x / inner
        return (self.law.denoise(u, sigma) - skip * u) / out


def exact_prior(name="edm", s=0.8, sigma_of=None, **options):
    transform = options.pop("transform", Affine(2.0, 3.0))
    law = GaussianPrior(MEAN, Dense(C), transform=transform)
    network = Exact(law, s, name, sigma_of) if sigma_of else Exact(law, s, name)
    known = {"sigma_data": s, "mean_variance_of_field": 20.0, "transform": transform}
    if name != "edm":
        known["levels"] = LogUniformLevels(0.0025, 375.0)  # 0.002 to 300 in u
    return law, DiffusionPrior(network, (3,), parametrisation=name, **known | options)


# --- parametrisations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*KINDS, "flow"])
def test_the_table_inverts_what_the_papers_define(name):
    g = torch.Generator().manual_seed(0)
    s, sigma = 0.7, torch.tensor([0.01, 0.5, 3.0, 80.0], dtype=F64)
    y, n = torch.randn(2, 4, generator=g, dtype=F64)
    u = s * y + sigma * n
    tau = sigma / s
    alpha, sd = 1 / (1 + tau**2).sqrt(), tau / (1 + tau**2).sqrt()  # x_t = alpha y + sd n
    t = 1 / (1 + tau)  # x_t = (1 − t) n + t y
    target = {"edm": sd * y - alpha * n, "v": alpha * n - sd * y, "epsilon": n, "x": y, "flow": y - n}[name]
    given = (1 - t) * n + t * y if name == "flow" else alpha * y + sd * n
    skip, out, inner = coefficients(name, sigma, s)
    torch.testing.assert_close(inner * u, given)
    torch.testing.assert_close(skip * u + out * target, s * y)


@pytest.mark.parametrize("name", KINDS)
def test_the_optimal_network_is_the_closed_form(name):
    law, prior = exact_prior(name)
    u = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    sigma = torch.tensor([0.01, 0.5, 50.0], dtype=F64)
    torch.testing.assert_close(prior.denoise(u, sigma), law.denoise(u, sigma))


def test_a_network_that_is_told_the_step_is_adapted_at_the_boundary():
    """A DDPM network on (x_t, step t): D(u, sigma) asks it at x_t = α_t u/s and the step whose level sigma is."""
    betas = LinearBetas()
    s, seen = 0.8, []

    def sigma_of(index):
        seen.append(index)
        return s * torch.exp(
            torch.lerp(
                betas.table.log()[index.floor().long()],
                betas.table.log()[(index.floor().long() + 1).clamp_max(999)],
                index - index.floor(),
            )
        )

    law, prior = exact_prior("epsilon", sigma_of=sigma_of, levels=betas, time="index")
    steps = torch.tensor([0, 17, 999])
    u = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    sigma = s * betas.table[steps]
    torch.testing.assert_close(prior.denoise(u, sigma), law.denoise(u, sigma))
    torch.testing.assert_close(seen[0], steps.to(F64), rtol=0, atol=1e-6)
    between = s * (betas.table[100] * betas.table[101]).sqrt()  # half-way in ln sigma
    prior.denoise(u[:1], between)
    assert float(seen[1]) == pytest.approx(100.5)
    torch.testing.assert_close(prior.denoise(u, 0.5), law.denoise(u, 0.5))


class Constant(torch.nn.Module):
    """A network that answers the same whatever it is asked."""

    def __init__(self, value):
        super().__init__()
        self.value = torch.nn.Parameter(torch.as_tensor(value, dtype=F64))

    def forward(self, x, noise):
        return self.value.expand(len(x), 3)


@pytest.mark.parametrize("name", ["epsilon", "v", "x", "flow"])
def test_the_natural_weighting_is_the_loss_of_the_paper(name):
    s = 0.7
    weighting = {"x": "x", "v": "edm"}.get(name)
    cls = FlowMatching if name == "flow" else DiffusionPrior
    prior = cls(Constant([0.2, -0.1, 0.4]), (3,), sigma_data=s, parametrisation=name, weighting=weighting)
    g = torch.Generator().manual_seed(0)
    x, n = torch.randn(2, 4, 3, generator=g, dtype=F64)
    sigma = torch.tensor([0.01, 0.5, 3.0, 80.0], dtype=F64)
    y, tau = x / s, (sigma / s)[:, None]
    alpha, sd = 1 / (1 + tau**2).sqrt(), tau / (1 + tau**2).sqrt()
    target = {"v": alpha * n - sd * y, "epsilon": n, "x": y, "flow": y - n}[name]
    expected = (prior.network.value - target).square().mean(1)
    torch.testing.assert_close(prior.loss(x, sigma, n), expected)


# --- noise levels --------------------------------------------------------------------------------------------------

LAWS = [
    LogNormalLevels(-0.5, 1.2),
    CosineLevels(),
    UniformTime(),
    LogUniformLevels(0.01, 50.0),
    LinearBetas(2000, 1e-4, 0.02),
]


@pytest.mark.parametrize("law", LAWS, ids=lambda v: type(v).__name__)
def test_the_density_is_that_of_the_quantiles(law):
    q = torch.linspace(0.05, 0.95, 9, dtype=F64)
    h = 2e-3  # four steps of the discrete schedule
    slope = (law.quantile(q + h).log() - law.quantile(q - h).log()) / (2 * h)
    torch.testing.assert_close(law.density(law.quantile(q)), 1 / slope, rtol=0.02, atol=0)
    assert Levels.from_dict(law.to_dict()) == law


def test_ddpm_levels_are_those_of_the_paper():
    betas = LinearBetas(1000, 1e-4, 0.02)
    assert float(betas.alpha_bar[0]) == pytest.approx(1 - 1e-4)
    assert float(betas.alpha_bar[-1]) == pytest.approx(4.04e-5, rel=0.01)  # Ho et al.: KL at T is nearly zero
    q = (torch.arange(1000, dtype=F64) + 0.5) / 1000
    torch.testing.assert_close(betas.quantile(q), betas.table)  # every step equally likely
    torch.testing.assert_close(betas.index(betas.table), torch.arange(1000, dtype=F64))


@pytest.mark.parametrize(("steps", "alpha_bar"), [(100, "0.36"), (300, "0.048")])
def test_a_schedule_that_does_not_reach_noise_is_refused(steps, alpha_bar):
    network = MLPDenoiser(2)
    with pytest.raises(ValueError, match=f"alpha_bar = {alpha_bar}.*not noise.*more steps"):
        DiffusionPrior(network, (2,), parametrisation="epsilon", levels=LinearBetas(steps, 1e-4, 0.02))
    DiffusionPrior(network, (2,), parametrisation="epsilon", levels=LinearBetas(steps, 1e-4, 0.2))
    with pytest.raises(ValueError, match="not noise"):
        DiffusionPrior(network, (2,), sigma_data=5.0, sigma_max=20.0)


def adapted():
    law = AdaptiveLevels(0.01, 100.0, bins=16, rate=0.5)
    law.squares.copy_(torch.linspace(0.1, 4.0, 16).square())
    return law


@pytest.mark.parametrize("law", [LogUniformLevels(0.01, 100.0), adapted()], ids=["uniform", "adapted"])
def test_the_elbo_loss_is_the_integral_whatever_the_law(law):
    """E[loss] = ∫ E|u0 − D|²/(n σ²) d ln σ = Σ ½ ln[(1 + λ/σ_min²)/(1 + λ/σ_max²)]/n for the exact denoiser."""
    gaussian, prior = exact_prior("edm", levels=law, weighting="elbo")
    eigen = torch.linalg.eigvalsh(C)
    low, high = prior.sigma_min, prior.sigma_max
    assert (low, high) == pytest.approx((0.008, 80.0))
    expected = float(0.5 * ((1 + eigen / low**2).log() - (1 + eigen / high**2).log()).sum()) / 3
    x = gaussian.sample(10_000, seed=0, dtype=F64)
    loss = prior.training_loss({"x": x}, torch.Generator().manual_seed(0)).detach()
    assert abs(float(loss.mean()) - expected) < 4 * float(loss.std()) / math.sqrt(len(loss))


def test_adaptive_levels_lower_the_variance_and_resume():
    gaussian, prior = exact_prior("edm", levels=AdaptiveLevels(0.0025, 375.0), weighting="elbo")
    x = gaussian.sample(2048, seed=0, dtype=F64)
    g = torch.Generator().manual_seed(0)
    first = prior.training_loss({"x": x}, g)
    for _ in range(60):
        last = prior.training_loss({"x": x}, g)
    assert float(last.var()) < 0.7 * float(first.var())
    mass = prior.levels._mass()
    assert float(mass.sum()) == pytest.approx(1)
    assert "levels.squares" in prior.state_dict()  # a checkpoint continues with it
    with pytest.raises(ValueError, match="integral"):
        DiffusionPrior(MLPDenoiser(2), (2,), levels=AdaptiveLevels())


def test_sigmoid_weighting_is_the_elbo_times_a_sigmoid_of_the_snr():
    _, a = exact_prior("edm", weighting="elbo")
    _, b = exact_prior("edm", weighting="sigmoid", sigmoid_bias=1.5)
    sigma = torch.tensor([0.01, 0.8, 30.0], dtype=F64)
    snr = (0.8 / sigma) ** 2
    torch.testing.assert_close(b._error_weight(sigma), a._error_weight(sigma) * torch.sigmoid(1.5 - snr.log()))


@pytest.mark.parametrize("name", KINDS)
def test_every_parametrisation_learns_the_same_denoiser(name):
    law = GaussianPrior(torch.tensor([1.0, -1.0]), torch.tensor([[0.5, 0.3], [0.3, 0.4]]))
    x = law.sample(4096, seed=0)
    torch.manual_seed(0)
    prior = DiffusionPrior(
        MLPDenoiser(2, width=32, depth=2), (2,), transform=Affine(torch.tensor([1.0, -1.0]), 0.7), parametrisation=name
    )
    levels = prior.validation({"x": x[:512]}, levels=(0.5, 1.0))
    Training(steps=250, batch_size=256, learning_rate=5e-3, warmup=20, ema=0.95).fit(
        prior, ArrayData(x), progress=False
    )
    found = prior.validation({"x": x[:512]}, levels=(0.5, 1.0))
    u = (x[:512] - torch.tensor([1.0, -1.0])) / 0.7
    standard = GaussianPrior(torch.zeros(2), torch.tensor([[0.5, 0.3], [0.3, 0.4]]) / 0.49)
    noise = torch.randn(u.shape, generator=torch.Generator().manual_seed(0))
    for key, sigma in (("rmse_at_0.5", 0.5), ("rmse_at_1", 1.0)):
        best = float((standard.denoise(u + sigma * noise, torch.full((512,), sigma)) - u).square().mean().sqrt())
        assert found[key] < 1.05 * best, (name, key)
        assert levels[key] > 1.05 * best


# --- samplers ------------------------------------------------------------------------------------------------------


def recursion(levels, rule, eta=0.0):
    """Mean and covariance after every step: u' = D + a (u − D) + √b ε with the exact D of N(MEAN, C), closed form."""
    sigma = levels[0]
    centre = MEAN - C @ torch.linalg.solve(C + sigma**2 * EYE, MEAN)  # D(0, σ)
    mean, cov = centre, sigma**2 * EYE
    for now, after in itertools.pairwise(levels):
        up = (after / now) ** 2 * (now**2 - after**2)
        a, b = {
            "ancestral": ((after / now) ** 2, up),
            "ddim": (math.sqrt(after**2 - eta**2 * up) / now, eta**2 * up),
            "euler": (after / now, 0.0),
            "sde": ((after / now) ** 2, now**2 - after**2 if after else 0.0),
        }[rule]
        K = C @ torch.linalg.inv(C + now**2 * EYE)
        M = K + a * (EYE - K)
        mean, cov = MEAN + M @ (mean - MEAN), M @ cov @ M.T + b * EYE
    return mean, cov


@pytest.mark.parametrize(("rule", "eta"), [("ancestral", 0), ("ddim", 0.5), ("ddim", 1.0), ("euler", 0), ("sde", 0)])
def test_each_sampler_has_the_law_its_steps_have(rule, eta):
    from invgen.schedules import sigma_schedule

    _, prior = exact_prior("v")
    n, steps = 4000, 10  # coarse on purpose: the law of ten steps is known too
    mean, cov = recursion(sigma_schedule(prior.sigma_min, prior.start_sigma, steps), rule, eta)
    x = prior.sample(n, seed=0, steps=steps, chunk=n, dtype=F64, sampler=rule, eta=eta)
    off = (x - 2) / 3 - mean
    assert float((off.mean(0).abs() / (off.std(0) / math.sqrt(n))).max()) < 4.5
    pairs = off[:, :, None] * off[:, None]
    assert float(((pairs.mean(0) - cov).abs() / (pairs.std(0) / math.sqrt(n))).max()) < 4.5
    # and the law of many steps is the prior's
    errors = []
    for count in (100, 400, 1600):
        mean, cov = recursion(sigma_schedule(prior.sigma_min, prior.start_sigma, count), rule, eta)
        errors.append(float((cov - C).abs().max()))
        assert float((mean - MEAN).abs().max()) < 0.01
    assert errors[-1] < 0.01
    assert errors[0] > 2.5 * errors[-1] or errors[0] < 1e-3


def affine_law(f, n=3):
    """Mean and covariance of an affine map of z ~ N(0, I), without Monte-Carlo error."""
    z = torch.cat([torch.zeros(1, n, dtype=F64), torch.eye(n, dtype=F64)])
    x = f(z)
    M = (x[1:] - x[0]).T
    return x[0], M @ M.T


class Fixed:
    """Stands for the noise streams: the same start for everyone."""

    def __init__(self, z):
        self.z = z

    def normal(self, shape, *, dtype, tag=""):
        return self.z.to(dtype)


@pytest.mark.parametrize(("sampler", "steps", "tolerance"), [("heun", 150, 0.002), ("ode", 1, 0.002)])
@pytest.mark.parametrize("name", KINDS)
def test_deterministic_samplers_map_noise_to_the_prior(name, sampler, steps, tolerance):
    _, prior = exact_prior(name, transform=None)
    mean, cov = affine_law(lambda z: prior._draw(Fixed(z), steps, F64, sampler, 0.0, 1e-5))
    assert float((mean - MEAN).abs().max()) < tolerance
    assert float((cov - C).abs().max()) < tolerance


def test_ddpm_sampling_uses_the_levels_of_its_schedule():
    _, prior = exact_prior("epsilon", levels=LinearBetas())
    n, before = 3000, prior.evaluations
    for sampler, steps in (("ancestral", 200), ("ddim", 100)):
        x = prior.sample(n, seed=0, steps=steps, chunk=n, dtype=F64, sampler=sampler, eta=0.3)
        table = (0.8 * LinearBetas().table.flip(0))[torch.linspace(0, 999, steps).round().long()].tolist()
        mean, cov = recursion([*table, 0.0], sampler, 0.3)
        off = (x - 2) / 3 - mean
        assert float((off.mean(0).abs() / (off.std(0) / math.sqrt(n))).max()) < 4.5
        pairs = off[:, :, None] * off[:, None]
        assert float(((pairs.mean(0) - cov).abs() / (pairs.std(0) / math.sqrt(n))).max()) < 4.5
    assert prior.evaluations - before == 300 * n + 2


def test_an_unknown_sampler_says_which_there_are():
    with pytest.raises(ValueError, match="'ancestral'"):
        exact_prior()[1].sample(1, sampler="leapfrog")
    for options, text in (
        ({"parametrisation": "score"}, "parametrisation"),
        ({"weighting": "none"}, "weighting"),
        ({"time": "t"}, "time"),
        ({"time": "index"}, "no numbered steps"),
        ({"condition_dropout": 1.0}, "condition_dropout"),
        ({"parametrisation": "flow"}, "parametrisation"),
    ):
        with pytest.raises((ValueError, TypeError), match=text):
            DiffusionPrior(MLPDenoiser(2), (2,), **options)


# --- disk ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*KINDS, "flow", "flow of edm"])
def test_save_and_load(tmp_path, name):
    torch.manual_seed(0)
    network = MLPDenoiser(2, width=8, depth=1)
    network.leave.weight.data.normal_()
    if name in ("flow", "flow of edm"):
        kind = "flow" if name == "flow" else "edm"
        prior = FlowMatching(network, (2,), rule="heun", latent_steps=3, parametrisation=kind)
    else:
        levels = {"epsilon": LinearBetas(1200), "v": CosineLevels(), "x": AdaptiveLevels()}.get(name)
        prior = DiffusionPrior(
            network,
            (2,),
            parametrisation=name,
            levels=levels,
            weighting="sigmoid",
            sigmoid_bias=1.0,
            time="index" if name == "epsilon" else "log_sigma",
            latent_steps=3,
        )
    other = DiffusionPrior.load(prior.save(tmp_path / "p.safetensors"))
    assert type(other) is type(prior)
    assert (other.parametrisation, other.weighting, other.time) == (prior.parametrisation, prior.weighting, prior.time)
    assert (other.sigma_min, other.sigma_max) == (prior.sigma_min, prior.sigma_max)
    z = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(other.decode(z), prior.decode(z))
    if not name.startswith("flow"):
        with pytest.raises(ValueError, match="load it with DiffusionPrior"):
            FlowMatching.load(tmp_path / "p.safetensors")


def test_moving_a_prior_leaves_the_first_where_it_was():
    prior = DiffusionPrior.examples()[0]
    context = prior.context.clone()
    large = prior.at((32, 16))
    assert torch.equal(prior.context, context)
    assert prior.shape == (1, 16, 16)
    assert large.shape == large.latent_shape == (1, 32, 16)
    assert isinstance(FlowMatching.examples()[0].at((32, 32)), FlowMatching)
