"""Conditional flow matching and diffusion: identities against closed forms, trained moments, files, what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from invgen.contracts import Operator
from invgen.diagnostics import calibrate
from invgen.noise import GaussianNoise
from invgen.operators import Mask, MatrixOperator
from invgen.priors import GaussianMixturePrior, GaussianPrior
from invgen.problem import InverseProblem
from invgen.simulations import Simulations
from invgen.solvers import HMC, ConditionalDiffusion, ConditionalFlowMatching, ExactGaussian, ExactMixture, refined
from invgen.solvers._conditional_field import ConditionalField
from invgen.solvers._conditional_linear import GaussianAnswer, RegressionAnswer, estimated_covariance
from invgen.solvers._conditional_posterior import ConditionalPosterior
from invgen.streams import Streams
from invgen.transforms import Affine, Exp

F64 = torch.float64


def _noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def vector_problem(n_obs: int = 3, dim: int = 8) -> InverseProblem:
    """Correlated, with a mean, x = 2 + 3u."""
    root = _noise(1, dim, dim) / math.sqrt(dim)
    prior = GaussianPrior(_noise(2, dim), root @ root.T + 0.1 * torch.eye(dim, dtype=F64), transform=Affine(2.0, 3.0))
    operator = MatrixOperator(_noise(3, dim // 2, dim) / 3)
    truth = prior.sample(n_obs, seed=4).double()
    return InverseProblem(operator(truth) + 0.5 * _noise(5, n_obs, dim // 2), operator, GaussianNoise(0.5), prior)


def field_problem(n_obs: int = 2, size: int = 8) -> InverseProblem:
    """A stationary field with a trend, half of its pixels seen."""
    mean = 3.0 + torch.linspace(0, 1, size, dtype=F64)[None, :, None].expand(1, size, size)
    prior = GaussianPrior.stationary((1, size, size), sd=0.5, length=(0.6, 0.9), kind="matern", nu=1.5, mean=mean)
    seen = torch.rand(1, size, size, generator=torch.Generator().manual_seed(6)) < 0.5
    operator = Mask(seen)
    truth = prior.sample(n_obs, seed=7).double()
    clean = operator(truth)
    return InverseProblem(clean + 0.2 * _noise(8, *clean.shape), operator, GaussianNoise(0.2), prior)


def moments(problem: InverseProblem) -> tuple[torch.Tensor, torch.Tensor]:
    mean, covariance = ExactGaussian().moments(problem)
    return mean.flatten(1), covariance


def errors(samples: torch.Tensor, problem: InverseProblem) -> tuple[float, float]:
    """Mean error in posterior sd without its Monte-Carlo part, and sd ratio."""
    mean, covariance = moments(problem)
    s, sd = samples.flatten(1, 2).flatten(2).double(), covariance.diagonal().sqrt()
    z = (s.mean(1) - mean) / sd
    return math.sqrt(max(0.0, float(z.square().mean()) - 1 / s.shape[1])), float((s.std(1) / sd).mean())


# --- the linear answer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [4096, 1])
@pytest.mark.parametrize("make", [vector_problem, field_problem])
def test_the_linear_answer_is_the_posterior_of_a_gaussian(make, limit):
    problem = make()
    mean, covariance = moments(problem)
    prior = problem.prior
    answer = GaussianAnswer(problem, prior.mean_u, prior.covariance_u, limit=limit)
    centre, q = answer.estimate(problem)
    torch.testing.assert_close(prior.transform(centre).flatten(1), mean, rtol=1e-6, atol=1e-6)
    assert q.shape == (problem.n_obs,)
    n = 4000
    e = prior.transform(answer.errors(Streams(0, range(n)), F64, "t")) - prior.transform(torch.zeros(1, *prior.shape))
    sd = covariance.diagonal().sqrt()
    found = e.flatten(1).T @ e.flatten(1) / n / sd / sd[:, None]
    # a product of two unit normals has at most the variance 2; five sd over at most 4096 entries
    assert float((found - covariance / sd / sd[:, None]).abs().max()) < 5.5 * math.sqrt(2 / n)


def test_distances_of_simulations_are_chi_squared():
    problem = vector_problem(n_obs=1)
    answer = GaussianAnswer(problem, problem.prior.mean_u, problem.prior.covariance_u, limit=99)
    _, _, data = problem.simulate(2000, seed=3)
    q = 4 * answer.estimate(problem.with_data(*data))[1]  # four data
    assert abs(float(q.mean()) - 4) < 4 * math.sqrt(8 / 2000)


@pytest.mark.parametrize("padding", [0, "auto"])
def test_a_stationary_covariance_is_found_from_simulations(padding):
    prior = GaussianPrior.stationary(
        (2, 12, 10), variance=(1.0, 4.0), length=(1.0, 1.4), kind="matern", nu=1.5, padding=padding, mean=5.0
    )
    v = prior.sample(4000, seed=1).double() - 5.0
    found = estimated_covariance(v)
    assert found.padded == ((12, 10) if padding == 0 else (24, 20))
    truth = prior.covariance_u.dense()
    assert float((found.dense() - truth).norm() / truth.norm()) < 0.06
    torch.testing.assert_close(found.diagonal().flatten(1)[:, 0], v.square().mean((0, 2, 3)), rtol=1e-6, atol=0)


def test_regression_tends_to_the_linear_estimate():
    problem = vector_problem()
    _, _, data = problem.simulate(1, seed=0)
    s = Simulations.of(problem, 20000, seed=2)
    x, _, data = s.batch(slice(0, len(s)), dtype=F64)
    answer = RegressionAnswer.fitted(problem.prior.transform.inverse(x), data[0])
    centre, _ = answer.estimate(problem)
    exact, covariance = moments(problem)
    z = (problem.prior.transform(centre) - exact) / covariance.diagonal().sqrt()
    assert float(z.square().mean().sqrt()) < 0.08  # data dimension over simulations: √(5/20000) = 0.016 a coordinate
    residual = covariance / 9
    torch.testing.assert_close(answer.C.dense(), residual, rtol=0.0, atol=0.1 * float(residual.diagonal().max()))


# --- the flow ------------------------------------------------------------------------------------------------------------


class ExactVelocity(nn.Module):
    """F of a Gaussian ζ₁ ~ N(0, Σ) and white ζ₀, with an angle for each coordinate."""

    def __init__(self, sigma: torch.Tensor, ratio: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", sigma)
        self.register_buffer("ratio", ratio)
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, inputs: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        theta = torch.atan(torch.exp(-4 * level[0]))
        zeta = inputs[:, : len(self.ratio)]
        phi = torch.atan2(self.ratio * theta.sin(), theta.cos())
        c, s = phi.cos(), phi.sin()
        cross = c[:, None] * self.matrix * s - torch.diag(s * c)
        law = s[:, None] * self.matrix * s + torch.diag(c * c)
        return zeta @ torch.linalg.solve(law, cross.T)


def exact_flow(problem: InverseProblem, base: str, sampler: str, steps: int) -> ConditionalPosterior:
    """The posterior whose network is right."""
    prior = problem.prior
    answer = GaussianAnswer(problem, prior.mean_u, prior.covariance_u, limit=999)
    S = moments(problem)[1] / 9  # x = 2 + 3u
    scale, spread = S.diagonal().sqrt(), prior.covariance_u.dense().diagonal().sqrt()
    ratio = scale / spread if base == "white" else torch.ones_like(scale)
    sigma = S / scale / scale[:, None]
    field = ConditionalField(
        ExactVelocity(sigma, ratio), None, problem.model_shape, "uniform", ratio if base == "white" else None
    ).double()
    phi = (torch.arange(32, dtype=F64) + 0.5) / 32 * 0.5 * math.pi  # of F given ζ_φ: Σ/(cos² + sin² Σ), in each mode
    modes = torch.linalg.eigvalsh(sigma)
    misfit = (modes / (phi.cos().square()[:, None] + phi.sin().square()[:, None] * modes)).mean(1)
    chart = {"misfit": misfit, "scale": scale, "spread": spread, "distances": torch.linspace(0, 9, 100, dtype=F64)}
    return ConditionalPosterior(field, answer, problem, chart, base, sampler, steps)


@pytest.mark.parametrize(
    ("base", "sampler"), [("diagonal", "midpoint"), ("white", "midpoint"), ("diagonal", "ancestral")]
)
def test_with_the_exact_velocity_the_draws_are_the_posterior(base, sampler):
    problem = vector_problem(n_obs=1)
    n = 4000
    posterior = exact_flow(problem, base, sampler, 40 if sampler == "midpoint" else 200).solve(problem, n, dtype=F64)
    mean, covariance = moments(problem)
    sd = covariance.diagonal().sqrt()
    z = (posterior.samples[0, 0] - mean[0]) / sd
    assert float(z.mean(0).abs().max()) < 4.2 / math.sqrt(n)
    found, exact = z.T @ z / n, covariance / sd / sd[:, None]
    slack = 0.0 if sampler == "midpoint" else 0.04  # 200 levels of a first-order rule
    assert float((found - exact).abs().max()) < 4.5 * math.sqrt(2 / n) + slack


def test_midpoint_error_falls_with_the_square_of_the_step():
    """The flow of a Gaussian is linear: the map from base draws to draws is compared with its limit."""
    problem = vector_problem(n_obs=1)
    runs = [exact_flow(problem, "white", "midpoint", k).solve(problem, 20, dtype=F64).samples for k in (160, 10, 20)]
    coarse, fine = (float((r - runs[0]).abs().max()) for r in runs[1:])
    assert 2.5 < coarse / fine < 6.5


def test_the_loss_is_smallest_at_the_exact_velocity():
    problem = vector_problem(n_obs=1)
    flow = exact_flow(problem, "diagonal", "midpoint", 1)
    x = problem.prior.transform.inverse(problem.prior.sample(4000, seed=1).double())
    sim = problem.simulate(4000, seed=1)
    zeta = (
        problem.prior.transform.inverse(sim[0].double()) - flow.answer.estimate(problem.with_data(*sim[2]))[0]
    ) / flow.chart["scale"]
    batch = {"x": zeta.double(), "features": torch.zeros(len(x), 16, dtype=F64)}
    one = flow.field.angles(1, torch.Generator().manual_seed(0))

    def loss(factor: float) -> float:
        class Scaled(nn.Module):
            def forward(self, inputs, level):
                return factor * torch.cat(
                    [flow.field.network(inputs[i : i + 1], level[i : i + 1]) for i in range(len(inputs))]
                )

        field = ConditionalField(Scaled(), None, (8,), "uniform", None)
        return float(
            field.training_loss({k: v[:1000] for k, v in batch.items()}, torch.Generator().manual_seed(5)).mean()
        )

    assert 0 < float(one) < 0.5 * math.pi
    assert loss(1.0) < min(loss(0.7), loss(1.3), loss(0.0))


# --- what is trained -----------------------------------------------------------------------------------------------------


def test_trained_on_a_field_the_moments_are_right():
    problem = field_problem(n_obs=4)
    estimator = ConditionalFlowMatching(simulations=2048, updates=60, steps=4)
    posterior = estimator.fit(problem, seed=1).solve(problem, 400)
    error, ratio = errors(posterior.samples, problem)
    assert error < 0.15
    assert 0.93 < ratio < 1.07


@pytest.mark.parametrize(
    "estimator",
    [
        ConditionalFlowMatching(updates=700, steps=12, base="diagonal"),
        ConditionalFlowMatching(updates=700, steps=12, base="white"),
        ConditionalDiffusion(updates=700, steps=64),
    ],
    ids=["diagonal", "white", "diffusion"],
)
def test_trained_on_vectors_the_network_learns_what_the_linear_answer_lacks(estimator):
    problem = vector_problem(n_obs=4)
    fitted = estimator.fit(problem, seed=1)
    # at most noise levels there is nothing to gain, and diffusion looks at many of them
    gain = 0.96 if isinstance(estimator, ConditionalDiffusion) else 0.9
    assert fitted.report["loss"] < gain * fitted.report["loss_linear"]
    error, ratio = errors(fitted.solve(problem, 1000).samples, problem)
    assert error < 0.2
    assert 0.88 < ratio < 1.12


def mixture_problem() -> InverseProblem:
    """Two well separated components in two dimensions, one datum that does not tell them apart."""
    prior = GaussianMixturePrior(
        [0.4, 0.6],
        torch.tensor([[-2.0, 1.0], [2.0, 1.5]], dtype=F64),
        torch.stack([torch.diag(torch.tensor([0.1, 0.3])), torch.diag(torch.tensor([0.2, 0.1]))]).double(),
    )
    operator = MatrixOperator(torch.tensor([[0.3, 1.0]], dtype=F64))
    return InverseProblem(torch.tensor([[1.2], [1.9]], dtype=F64), operator, GaussianNoise(0.5), prior)


@pytest.mark.parametrize("base", ["linear", "white"])
def test_a_mixture_keeps_its_modes(base):
    problem = mixture_problem()
    weights, _, _ = ExactMixture().components(problem)
    fitted = ConditionalFlowMatching(
        base=base, simulations=4096, updates=900, steps=12, batch_size=128, learning_rate=3e-3, ema=0.99
    ).fit(problem, seed=0)
    draws = fitted.solve(problem, 2000).samples[:, 0]
    share = (draws[..., 0] < 0).double().mean(1)
    assert float((share - weights[:, 0]).abs().max()) < 0.1
    # between the modes there is next to nothing
    assert float((draws[..., 0].abs() < 0.5).double().mean()) < 0.06


def test_it_is_calibrated_for_data_of_the_problem():
    problem = vector_problem(n_obs=1, dim=4)
    fitted = ConditionalFlowMatching(simulations=8192, updates=100).fit(problem, seed=3)
    result = calibrate(problem, fitted, n_sim=200, num_samples=40, level=1e-3, seed=5)
    assert result.passed


class Bent(Operator):
    """A pixelwise non-linear operator on the model's grid."""

    def forward(self, x, **theta):
        return torch.tanh(x - 3.0)


def test_non_linear_physics_on_the_grid_and_an_unknown_noise_level():
    linear = field_problem()
    operator = Bent((1, 8, 8), (1, 8, 8))
    data = operator(linear.prior.sample(1, seed=1).double())
    level = GaussianPrior(torch.tensor([-1.5]), 0.01, shape=(1,), transform=Exp())
    problem = InverseProblem(data, operator, GaussianNoise("sigma"), linear.prior, nuisance={"sigma": level})
    fitted = ConditionalFlowMatching(simulations=512, updates=100, base="diagonal", steps=4).fit(problem, seed=0)
    draws = fitted(data, 20)
    assert draws.samples.shape == (1, 1, 20, 1, 8, 8)
    away = (draws.mean()[0] - linear.prior.sample(1, seed=1)[0]).square().mean().sqrt()
    assert float(away) < 0.4  # the prior alone is 0.5 away, in the mean over data


# --- as an object --------------------------------------------------------------------------------------------------------


def test_new_data_one_or_many():
    problem = vector_problem()
    fitted = ConditionalFlowMatching(simulations=256, updates=10).fit(problem)
    many = fitted(problem.terms[0].data, 5, seed=2)
    torch.testing.assert_close(many.samples, fitted.solve(problem, 5, seed=2).samples)
    one = fitted(problem.terms[0].data[0], 5, seed=2)
    torch.testing.assert_close(one.samples, many.samples[:1])


def test_saved_and_loaded_it_draws_the_same(tmp_path):
    problem = field_problem()
    fitted = ConditionalFlowMatching(simulations=256, updates=10, base="white").fit(problem)
    path = fitted.save(tmp_path / "p.safetensors")
    again = ConditionalFlowMatching.load(path, problem)
    torch.testing.assert_close(again.solve(problem, 4).samples, fitted.solve(problem, 4).samples, rtol=1e-5, atol=1e-5)
    assert again.report["simulations"] == 256
    with pytest.raises(ValueError, match="was fitted to models"):
        ConditionalFlowMatching.load(path, vector_problem())
    term = problem.terms[0]
    other = InverseProblem(term.data, term.operator * 2.0, term.noise, problem.prior)
    with pytest.raises(ValueError, match="other physics"):
        ConditionalFlowMatching.load(path, other)


def test_the_same_seed_gives_the_same_weights():
    problem = vector_problem()
    runs = [ConditionalFlowMatching(simulations=256, updates=5).fit(problem, seed=s) for s in (0, 0, 1)]
    first, same, other = (r.field.state_dict()["network.leave.weight"] for r in runs)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_an_unusual_observation_is_flagged_with_its_number():
    problem = vector_problem()
    fitted = ConditionalFlowMatching(simulations=1024, updates=5).fit(problem)
    data = problem.terms[0].data.clone()
    data[1] += 40.0
    with pytest.warns(
        UserWarning, match=r"Observation 1 .* lies outside the simulations: its distance from their centre is"
    ):
        posterior = fitted(data, 2)
    assert float(posterior.stats["unusual"][1].max()) == 0
    assert float(posterior.stats["unusual"][0].min()) > 0


def test_refinement_repairs_wrong_draws():
    problem = field_problem()
    sd = moments(problem)[1].diagonal().sqrt().reshape(problem.model_shape)
    start = ExactGaussian().solve(problem, 100, seed=1, dtype=F64)
    wrong = replace(start, samples=start.samples + 0.5 * sd)
    assert errors(wrong.samples, problem)[0] > 0.4
    better = refined(problem, wrong, HMC(warmup=10, length=1.6, mass="identity"), seed=3, dtype=F64)
    assert better.samples.shape == start.samples.shape
    error, ratio = errors(better.samples, problem)
    assert error < 0.09  # 128 correlated pixels and 100 draws each: 0.1/√(2·20) of Monte-Carlo error
    assert 0.93 < ratio < 1.07


# --- what is refused -----------------------------------------------------------------------------------------------------


def test_too_few_simulations_for_the_network_is_said():
    problem = vector_problem()
    with pytest.raises(ValueError, match="at least 64"):
        ConditionalFlowMatching().fit(problem, 20)
    with pytest.warns(UserWarning, match="are too few for this network"):
        ConditionalFlowMatching(updates=800, learning_rate=5e-3).fit(problem, 80)


def test_bad_settings_and_data():
    problem = vector_problem()
    with pytest.raises(ValueError, match="takes base from linear, diagonal, white"):
        ConditionalFlowMatching(base="purple")
    with pytest.raises(ValueError, match="takes base from diagonal"):
        ConditionalDiffusion(base="linear")
    with pytest.raises(ValueError, match="updates >= 1"):
        ConditionalFlowMatching(updates=0)
    fitted = ConditionalFlowMatching(simulations=128, updates=2).fit(problem)
    with pytest.raises(ValueError, match="NaN"):
        fitted(torch.full((4,), torch.nan))
    with pytest.raises(ValueError):
        fitted(torch.zeros(5))
    with pytest.raises(ValueError, match="fit again"):
        fitted.solve(field_problem(), 2)
    with pytest.raises(ValueError, match="extra=16"):
        ConditionalFlowMatching(network=nn.Linear(8, 8), simulations=128).fit(problem)
    with pytest.raises(ValueError, match="simulate this problem"):
        ConditionalFlowMatching().fit(problem, Simulations.of(field_problem(), 100))


def test_data_off_the_grid_need_an_embedding():
    class Sum(Operator):
        def forward(self, x, **theta):
            return x.flatten(1)[:, :3].square()

    prior = field_problem().prior
    problem = InverseProblem(torch.zeros(3, dtype=F64), Sum((1, 8, 8), (3,)), GaussianNoise(0.1), prior)
    with pytest.raises(ValueError, match="give embedding="):
        ConditionalFlowMatching(simulations=128).fit(problem)
    embedding = nn.Sequential(nn.Linear(3, 128), nn.Unflatten(1, (2, 8, 8)))
    fitted = ConditionalFlowMatching(simulations=128, updates=2, steps=2, embedding=embedding).fit(problem)
    assert fitted(torch.ones(3), 2).samples.shape == (1, 1, 2, 1, 8, 8)


def test_complex_data_of_linear_physics_are_refused():
    prior = GaussianPrior(torch.zeros(3, dtype=F64), 1.0, shape=(3,))
    operator = MatrixOperator(torch.randn(2, 3, dtype=torch.complex128))
    problem = InverseProblem(torch.zeros(2, dtype=torch.complex128), operator, GaussianNoise(0.1), prior)
    with pytest.raises(TypeError, match="real and imaginary"):
        ConditionalFlowMatching(simulations=128, updates=2).fit(problem)
