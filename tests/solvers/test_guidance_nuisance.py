"""Guided diffusion draws nuisance parameters with the model: against exact evidences, quadrature, and per item."""

from __future__ import annotations

import math

import pytest
import torch

from invgen.contracts import LinearOperator, Operator
from invgen.covariance import Dense
from invgen.noise import GaussianNoise
from invgen.operators import MatrixOperator
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem, Term
from invgen.solvers import DPS, MMPS, TMPD, ConvolvedLikelihood, GuidedDiffusion, PiGDM
from invgen.transforms import Affine, Exp

F64, C128 = torch.float64, torch.complex128
DIM, DATA = 12, 8
LINEAR_ONLY = [PiGDM(), TMPD(), TMPD("exact"), ConvolvedLikelihood(), ConvolvedLikelihood("diagonal")]
RULES = [MMPS(iterations=16, rtol=1e-10), DPS(0.3), *LINEAR_ONLY]


def normal(seed, *shape, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def log_normal(mean, sd):
    return GaussianPrior(torch.tensor([mean], dtype=F64), sd**2, transform=Exp())


ROOT = normal(1, DIM, DIM) * 1.5 / math.sqrt(DIM)
COVARIANCE, MEAN = ROOT @ ROOT.T + 0.1 * torch.eye(DIM, dtype=F64), 2 * normal(2, DIM)
MATRIX = normal(3, DATA, DIM) / math.sqrt(DIM)
LEVEL = (-1.0, 0.6)


def unknown_level(n_obs=None, seed=4, true_sd=0.3):
    prior = GaussianPrior(MEAN, COVARIANCE)
    nuisance = {"sd": log_normal(*LEVEL)}
    if n_obs is None:
        x = MEAN + normal(seed, DIM) @ torch.linalg.cholesky(COVARIANCE).T
        data = x @ MATRIX.T + true_sd * normal(seed + 1, DATA)
        return InverseProblem(data, MatrixOperator(MATRIX), GaussianNoise("sd"), prior, nuisance=nuisance)
    problem = InverseProblem(
        torch.zeros(DATA, dtype=F64), MatrixOperator(MATRIX), GaussianNoise("sd"), prior, nuisance=nuisance
    )
    x, theta, data = problem.simulate(n_obs, seed=seed)
    return problem.with_data(*data), x, theta


def exact(data, n=4001):
    """Moments of log sd and of x: the evidence in the eigenbasis of A C Aᵀ on a grid of log sd, and mixing over it."""
    v = torch.linspace(LEVEL[0] - 6 * LEVEL[1], LEVEL[0] + 6 * LEVEL[1], n, dtype=F64)
    values, Q = torch.linalg.eigh(MATRIX @ COVARIANCE @ MATRIX.T)
    r = Q.T @ (data - MATRIX @ MEAN)
    variance = values + (2 * v).exp()[:, None]
    weights = (-0.5 * (r**2 / variance + variance.log()).sum(1) - 0.5 * ((v - LEVEL[0]) / LEVEL[1]) ** 2).softmax(0)
    centre = (weights * v).sum()
    gain = COVARIANCE @ MATRIX.T @ Q
    means = MEAN + (r / variance) @ gain.T
    mean = weights @ means
    spread = weights @ (COVARIANCE.diagonal() - (1 / variance) @ (gain**2).T + (means - mean) ** 2)
    return centre, (weights @ (v - centre) ** 2).sqrt(), mean, spread.sqrt()


EXACT = [
    GuidedDiffusion(MMPS(iterations=16, rtol=1e-3), "heun", steps=50, sigma_min=0.002),
    GuidedDiffusion(TMPD("exact"), "heun", steps=50, sigma_min=0.002),
    GuidedDiffusion(PiGDM(), "sde", steps=150, sigma_min=0.002, corrections=10, correction_step=0.2),
]


@pytest.mark.parametrize("solver", EXACT, ids=lambda s: type(s.guidance).__name__)
def test_an_unknown_noise_level_and_the_model_have_their_exact_law(solver):
    """3 runs × 13 means and sds: two-sided 1e-3 over all of them is 4.3 Monte-Carlo sd each."""
    n = 1500
    problem = unknown_level()
    centre, width, mean, spread = exact(problem.terms[0].data[0])
    posterior = solver.solve(problem, n, seed=5, dtype=F64)
    v, x = posterior.theta["sd"].flatten().log(), posterior.samples[0, 0]
    # the second terms: steps and adaptation
    slack_mean, slack_sd = 4.3 / math.sqrt(n) + 0.03, 4.3 / math.sqrt(2 * n) + 0.02
    assert float((v.mean() - centre).abs() / width) < slack_mean
    assert abs(float(v.std() / width) - 1) < slack_sd * 1.2  # log sd has heavier tails than a normal law
    assert float(((x.mean(0) - mean) / spread).abs().max()) < slack_mean
    assert float((x.std(0) / spread - 1).abs().max()) < slack_sd
    assert float(posterior.stats["unconverged"].max()) == 0


def test_ranks_of_the_parameter_and_of_the_likelihood_are_uniform():
    """Simulation-based calibration: 100 data sets, 31 draws each; χ² of 8 bins at 1e-4 for each of four quantities."""
    problem, x, theta = unknown_level(100)
    solver = GuidedDiffusion(MMPS(iterations=12, rtol=1e-3), "heun", steps=30)
    posterior = solver.solve(problem, 31, seed=1, dtype=F64)
    v, fields = posterior.theta["sd"][:, 0], posterior.samples[:, 0]
    flat = InverseProblem(
        problem.terms[0].data.repeat_interleave(31, 0), MatrixOperator(MATRIX), GaussianNoise("sd"), problem.prior
    )
    drawn = flat.log_likelihood(fields.flatten(0, 1), sd=v.flatten()).reshape(100, 31)
    ranks = [
        (v < theta["sd"][:, None]).sum(1),
        (drawn < problem.log_likelihood(x, sd=theta["sd"])[:, None]).sum(1),
        (fields[..., 0] < x[:, None, 0]).sum(1),
        (fields[..., 5] < x[:, None, 5]).sum(1),
    ]
    for rank in ranks:
        counts = torch.bincount(rank // 4, minlength=8).double()
        assert float(((counts - 12.5) ** 2 / 12.5).sum()) < 30.0  # χ²₇ exceeds it with probability 1e-4


# --- the rules at one parameter an item --------------------------------------------------------------------------------

LEVELS = torch.tensor([0.2, 0.5, 1.3], dtype=F64)
POINTS, SIGMA = MEAN[:6] + 1.5 * normal(7, 3, 6), 0.7


def small_prior():
    return GaussianPrior(MEAN[:6], COVARIANCE[:6, :6], transform=Affine(0.5, 2.0))


def one_term(noise):
    return [Term(normal(8, 4), MatrixOperator(normal(9, 4, 6)), noise("sd"))]


def two_terms(noise):
    R = torch.tensor([[0.3, 0.1], [0.1, 0.2]], dtype=F64)
    joint = Term(normal(10, 2), MatrixOperator(normal(11, 2, 6)), GaussianNoise(covariance=Dense(R)))
    return [*one_term(noise), joint]


def complex_term(noise):
    return [Term(normal(12, 3, dtype=C128), MatrixOperator(normal(13, 3, 6, dtype=C128)), noise("sd"))]


def masked_term(noise):
    mask = torch.tensor([True, False, True, True])
    return [Term(normal(8, 4), MatrixOperator(normal(9, 4, 6)), noise("sd"), mask)]


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("terms", [one_term, two_terms, complex_term, masked_term])
def test_a_rule_reads_the_noise_of_every_item(rule, terms):
    """A batch with three noise levels is three problems with a known level each."""
    whole = InverseProblem(terms=terms(GaussianNoise), prior=small_prior(), nuisance={"sd": log_normal(0.0, 1.0)})
    got, _ = rule(whole.select([0, 0, 0], dtype=F64), POINTS, SIGMA, 0.5, sd=LEVELS)
    for level, point, estimate in zip(LEVELS, POINTS, got, strict=True):
        known = InverseProblem(terms=terms(lambda _, s=level: GaussianNoise(float(s))), prior=small_prior())
        want, _ = rule(known.select([0], dtype=F64), point[None], SIGMA, 0.5)
        torch.testing.assert_close(estimate, want[0], rtol=1e-7, atol=1e-7)


class Bent(Operator):
    """g(x) = scale · (A x + 0.1 (A x)²)."""

    theta_names = ("scale",)

    def __init__(self, matrix, scale=None):
        super().__init__((matrix.shape[1],), (matrix.shape[0],))
        self.register_buffer("matrix", matrix)
        self.scale = scale

    def forward(self, x, scale=None, **theta):
        y = x @ self.matrix.T
        factor = self.scale if scale is None else scale[:, None]
        return factor * (y + 0.1 * y.square())


class Stretched(LinearOperator):
    """A matrix times an unknown number: linear at every value, but no one linear system for a batch."""

    theta_names = ("scale",)

    def __init__(self, matrix):
        super().__init__((matrix.shape[1],), (matrix.shape[0],))
        self.register_buffer("matrix", matrix)

    def forward(self, x, scale=None, **theta):
        y = x @ self.matrix.T
        return y if scale is None else scale[:, None] * y

    def adjoint(self, d):
        return d @ self.matrix


@pytest.mark.parametrize("rule", [MMPS(iterations=8, rtol=1e-10), DPS(0.3)], ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("kind", [Bent, Stretched])
def test_a_rule_reads_the_physics_of_every_item(rule, kind):
    A, d = normal(9, 4, 6), normal(8, 4)
    nuisance = {"scale": log_normal(0.0, 0.5), "sd": log_normal(0.0, 1.0)}
    whole = InverseProblem(d, kind(A), GaussianNoise("sd"), small_prior(), nuisance=nuisance)
    scales = torch.tensor([0.6, 1.0, 1.4], dtype=F64)
    got, _ = rule(whole.select([0, 0, 0], dtype=F64), POINTS, SIGMA, 0.5, sd=LEVELS, scale=scales)
    for scale, level, point, estimate in zip(scales, LEVELS, POINTS, got, strict=True):
        operator = Bent(A, float(scale)) if kind is Bent else MatrixOperator(float(scale) * A)
        known = InverseProblem(d, operator, GaussianNoise(float(level)), small_prior())
        want, _ = rule(known.select([0], dtype=F64), point[None], SIGMA, 0.5)
        torch.testing.assert_close(estimate, want[0], rtol=1e-7, atol=1e-7)


# --- unknown physics ---------------------------------------------------------------------------------------------------


def bent_problem():
    prior, gain = GaussianPrior(torch.tensor([0.4], dtype=F64), 0.25), log_normal(0.3, 0.2)
    data = torch.tensor([1.4, 0.9], dtype=F64)
    return InverseProblem(data, Bent(torch.ones(2, 1, dtype=F64)), GaussianNoise(0.3), prior, nuisance={"scale": gain})


def test_an_unknown_scale_of_bent_physics():
    """Against quadrature in (x, log scale), as closely as the linearisation allows."""
    problem = bent_problem()
    x, v = torch.linspace(-3, 4, 500, dtype=F64), torch.linspace(-1.2, 1.8, 500, dtype=F64)
    at = torch.cartesian_prod(x, v)
    scale = at[:, 1].exp()
    log_p = problem.log_likelihood(at[:, :1], scale=scale) + problem.prior.log_prob(at[:, :1])
    p = (log_p + problem.nuisance["scale"].log_prob(scale[:, None]) + at[:, 1]).softmax(0)
    moments = [(m := p @ at[:, k], (p @ (at[:, k] - m) ** 2).sqrt()) for k in (0, 1)]
    n = 1000
    posterior = GuidedDiffusion(MMPS(), "heun", steps=50, sigma_min=0.002).solve(problem, n, seed=2, dtype=F64)
    drawn = (posterior.samples.flatten(), posterior.theta["scale"].flatten().log())
    for draws, (mean, sd) in zip(drawn, moments, strict=True):
        assert float((draws.mean() - mean).abs() / sd) < 4 / math.sqrt(n) + 0.05
        assert abs(float((draws.std() / sd).log())) < 4 / math.sqrt(2 * n) + 0.05


@pytest.mark.parametrize("rule", [MMPS(), DPS(0.1)], ids=lambda r: type(r).__name__)
def test_theta_has_its_exact_law_given_the_sample(rule):
    """Whatever a rule makes of the model: the distribution function of theta given its own x is uniform."""
    problem, n = bent_problem(), 1500
    posterior = GuidedDiffusion(rule, "ancestral", steps=60, settle=10).solve(problem, n, seed=2, dtype=F64)
    x, v = posterior.samples.reshape(n, 1), posterior.theta["scale"].flatten().log()
    nodes = torch.linspace(-1.2, 1.8, 400, dtype=F64)
    scale = nodes.exp().repeat(n)
    log_p = problem.log_likelihood(x.repeat_interleave(400, 0), scale=scale)
    log_p = log_p + problem.nuisance["scale"].log_prob(scale[:, None]) + scale.log()
    p = log_p.reshape(n, 400).softmax(1)
    below = torch.where(nodes < v[:, None], p, torch.zeros_like(p)).sum(1).sort().values
    distance = (below - (torch.arange(n, dtype=F64) + 0.5) / n).abs().max()
    assert float(distance) < 2.2 / math.sqrt(n) + 0.01  # Kolmogorov–Smirnov at 1e-4, and the nodes


# --- the run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("integrator", ["euler", "heun", "ancestral", "sde"])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_every_rule_and_integrator_draws_theta(rule, integrator):
    posterior = GuidedDiffusion(rule, integrator, steps=12, corrections=1).solve(unknown_level(), 16, dtype=F64)
    sd = posterior.theta["sd"]
    assert sd.shape == (1, 1, 16)
    assert bool(torch.isfinite(posterior.samples).all())
    assert bool((sd > 0).all())
    assert len(sd.unique()) > 12, "chains do not move"
    assert posterior.predict()[0].shape == (1, 1, 16, DATA)


@pytest.mark.parametrize("solver", [GuidedDiffusion(steps=8), GuidedDiffusion(DPS(0.3), "sde", steps=8)], ids=repr)
@pytest.mark.parametrize("physics", ["level", "scale"])
def test_every_item_and_every_resumption_has_the_same_parameters(solver, physics, tmp_path):
    problem = unknown_level()
    if physics == "scale":
        nuisance = {"scale": log_normal(0.0, 0.3)}
        problem = InverseProblem(
            problem.terms[0].data, Bent(MATRIX), GaussianNoise(0.5), problem.prior, nuisance=nuisance
        )
    (name,) = problem.nuisance
    whole, parts = (solver.solve(problem, 4, chunk=c, dtype=F64) for c in (4, 3))
    torch.testing.assert_close(whole.theta[name], parts.theta[name], rtol=1e-8, atol=0)
    seen = []

    def interrupt(step, state):
        seen.append(step)
        if len(seen) == 13:
            raise KeyboardInterrupt

    path = tmp_path / "run.safetensors"
    solver.solve(problem, 4, chunk=2, checkpoint=path, save_seconds=0.0, callbacks=[interrupt], dtype=F64)
    done = solver.solve(problem, 4, chunk=2, checkpoint=path, dtype=F64)
    torch.testing.assert_close(done.theta[name], whole.theta[name], rtol=1e-8, atol=0)
    torch.testing.assert_close(done.samples, whole.samples, rtol=1e-8, atol=1e-8)


def test_single_precision_follows_the_data():
    posterior = GuidedDiffusion(steps=8).solve(unknown_level(), 3)
    assert posterior.theta["sd"].dtype == torch.float32
    assert bool(torch.isfinite(posterior.samples).all())


@pytest.mark.parametrize("rule", LINEAR_ONLY, ids=repr)
def test_parameters_of_operators_are_refused_by_rules_for_one_linear_system(rule):
    nuisance = {"scale": log_normal(0.0, 0.3)}
    problem = InverseProblem(
        normal(8, 4), Stretched(normal(9, 4, 6)), GaussianNoise(0.5), small_prior(), nuisance=nuisance
    )
    with pytest.raises(TypeError, match=rf"{type(rule).__name__}.*parameters scale.*MMPS"):
        GuidedDiffusion(rule, steps=4).solve(problem, 1)


def test_what_cannot_be_treated_is_a_type_error():
    class Plain:
        linear_only, derivative_order, tolerance = True, 1, 1e-3

        def __call__(self, problem, u, sigma, gain):
            return problem.prior.denoise(u, sigma), None

    class Nothing:
        shape, grid, transform = (1,), None, Exp()

        def sample(self, n, *, seed=0):
            return torch.ones(n, 1)

    problem = unknown_level()
    with pytest.raises(TypeError, match=r"Plain does not take nuisance parameters \(sd\).*theta"):
        GuidedDiffusion(Plain(), steps=4).solve(problem, 1)
    term = problem.terms[0]
    silent = InverseProblem(term.data, term.operator, term.noise, problem.prior, nuisance={"sd": Nothing()})
    with pytest.raises(TypeError, match="density of its prior"):
        GuidedDiffusion(steps=4).solve(silent, 1)
    known = InverseProblem(term.data, term.operator, GaussianNoise(0.3), problem.prior)
    assert GuidedDiffusion(Plain(), steps=4).solve(known, 2, dtype=F64).theta == {}
    for bad in ({"sweeps": -1}, {"settle": -1}):
        with pytest.raises(ValueError, match="sweeps"):
            GuidedDiffusion(**bad)
