"""Fitted laws against closed forms: the full Gaussian is exact where it can be, the diagonal one is too narrow as known."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from invgen.contracts import Operator
from invgen.covariance import Dense
from invgen.noise import GaussianNoise, StudentTNoise
from invgen.operators import BlackBox, MatrixOperator
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem
from invgen.solvers import ExactGaussian, VariationalFlow, VariationalGaussian
from invgen.solvers._importance import _pareto, assess
from invgen.transforms import Affine, Exp

F64 = torch.float64
N, M = 6, 4


def _draw(g, *shape):
    return torch.randn(*shape, generator=g, dtype=F64)


def _problem(noise=0.1, n_obs=2):
    """Six correlated unknowns with a mean, x = 2 + 3u; four data with correlated noise."""
    g = torch.Generator().manual_seed(7)
    root, r = _draw(g, N, N) / math.sqrt(N), _draw(g, M, M) / math.sqrt(M)
    prior = GaussianPrior(2 * _draw(g, N), root @ root.T + 0.1 * torch.eye(N, dtype=F64), transform=Affine(2.0, 3.0))
    R = Dense(noise**2 * (r @ r.T + 0.3 * torch.eye(M, dtype=F64)))
    A = MatrixOperator(_draw(g, M, N) / 3)
    data = A(prior.sample(n_obs, seed=3).double()) + noise * _draw(g, n_obs, M)
    return InverseProblem(data, A, GaussianNoise(covariance=R), prior)


def _latent(problem):
    """Mean `(obs, N)` and precision of the exact posterior of z."""
    system, prior = problem.linear_gaussian("x"), problem.prior
    centre = prior.decode(torch.zeros(1, N, dtype=F64))
    columns = prior.decode(torch.eye(N, dtype=F64)) - centre
    G = system.R.whiten(system.operator(columns)).T
    P = torch.eye(N, dtype=F64) + G.T @ G
    pulled = system.R.whiten(system.data - system.operator(centre)) @ G
    return torch.linalg.solve(P, pulled.T).T, P


def _solve(solver, problem, n, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return solver.solve(problem, n, **{"dtype": F64, "chunk": n * problem.n_obs, **options})


class Parabola(Operator):
    """d = x_1 + x_0²/2: a banana."""

    def __init__(self):
        super().__init__((2,), (1,))

    def forward(self, x, **theta):
        return (x[:, 1] + 0.5 * x[:, 0] ** 2)[:, None]


def _banana():
    prior = GaussianPrior(torch.tensor([0.5, -1.0], dtype=F64), torch.tensor([[1.0, 0.3], [0.3, 1.5]], dtype=F64))
    return InverseProblem(torch.tensor([[0.3]], dtype=F64), Parabola(), GaussianNoise(0.2), prior)


def _quadrature(problem):
    """Mean, sd and log evidence on a grid."""
    line = torch.linspace(-6, 6, 801, dtype=F64)
    x = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
    log = problem.log_likelihood(x) + problem.prior.log_prob(x)
    w = log.softmax(0)[:, None]
    mean = (w * x).sum(0)
    return mean, (w * (x - mean) ** 2).sum(0).sqrt(), float(log.logsumexp(0)) + 2 * math.log(12 / 800)


def test_the_full_gaussian_is_the_posterior_of_a_linear_problem():
    problem = _problem()
    posterior = _solve(VariationalGaussian(steps=500), problem, 4000)
    mean, covariance = ExactGaussian().moments(problem)
    w = torch.linalg.solve_triangular(
        torch.linalg.cholesky(covariance), (posterior.samples[:, 0] - mean[:, None]).mT, upper=False
    ).mT
    assert float(w.mean(1).abs().max()) < 1e-3 + 4.5 / math.sqrt(4000)
    identity = torch.eye(N, dtype=F64)
    assert float((w.mT @ w / 4000 - identity).abs().max()) < 1e-3 + 4.5 * math.sqrt(2 / 4000)
    evidence = ExactGaussian().log_evidence(problem)
    torch.testing.assert_close(posterior.stats["elbo"][:, 0, 0], evidence, rtol=0, atol=1e-3)
    torch.testing.assert_close(posterior.stats["iw_bound"][:, 0, 0], evidence, rtol=0, atol=1e-3)
    assert bool((posterior.stats["khat"] < 0.67).all())


def test_the_fit_does_not_depend_on_the_number_of_samples():
    problem, solver = _problem(), VariationalGaussian(steps=20)
    few, many = _solve(solver, problem, 2), _solve(solver, problem, 7)
    torch.testing.assert_close(many.samples[:, :, :2], few.samples, rtol=1e-10, atol=1e-10)
    assert many.counts["forward"] == few.counts["forward"]


def test_mean_field_has_the_right_mean_and_the_known_spread():
    """KL(q ‖ p) of a Gaussian posterior of precision P is least at the sds 1/√P_ii; 8 % for the optimisation."""
    problem = _problem(0.3)
    mean, P = _latent(problem)
    posterior = _solve(VariationalGaussian("mean-field", steps=1000), problem, 4000)
    z = posterior.latent[:, 0]
    truth = torch.linalg.inv(P).diagonal().sqrt()
    sd = P.diagonal() ** -0.5
    assert float(truth.div(sd).max()) > 1.5  # the case is one where the families differ
    assert float(((z.mean(1) - mean) / truth).abs().max()) < 0.02 + 4.5 / math.sqrt(4000)
    assert float((z.std(1) / sd - 1).abs().max()) < 0.08 + 4.5 / math.sqrt(8000)


def test_a_bad_fit_is_flagged():
    """A diagonal law on a strongly correlated posterior: k̂ above its threshold; a warning that says so."""
    with pytest.warns(UserWarning, match=r"Pareto k of 2 of 2 observations"):
        posterior = VariationalGaussian("mean-field", steps=300).solve(_problem(0.03), 10, dtype=F64, chunk=20)
    assert bool((posterior.stats["khat"] > 0.7).all())


def test_the_banana_by_gaussian_and_flow():
    """The Gaussian keeps to one bend, half as wide; the flow closes four fifths of the gap to the evidence."""
    problem = _banana()
    mean, sd, evidence = _quadrature(problem)
    plain = _solve(VariationalGaussian(steps=300), problem, 1000)
    flow = _solve(VariationalFlow(steps=700, hidden=16, draws=64, rate=1e-2), problem, 1000)
    assert float(plain.samples[0, 0].std(0)[0] / sd[0]) < 0.7
    gap = evidence - float(plain.stats["elbo"][0, 0, 0])
    assert gap > 0.3
    assert 0 < evidence - float(flow.stats["elbo"][0, 0, 0]) < 0.2 * gap
    assert abs(float(flow.stats["iw_bound"][0, 0, 0]) - evidence) < 0.1
    x = flow.samples[0, 0]
    assert float(((x.mean(0) - mean) / sd).abs().max()) < 0.2 + 4.5 / math.sqrt(1000)
    assert float((x.std(0) / sd - 1).abs().max()) < 0.25


def test_the_flow_inverts_and_knows_its_volume():
    problem = _problem(n_obs=1)
    seen = {}
    solver = VariationalFlow(layers=3, hidden=8, bins=4, steps=40, draws=16, search=0, rate=0.05, check_draws=100)
    _solve(solver, problem, 3, callbacks=[lambda step, state: seen.update(state)])
    g = torch.Generator().manual_seed(1)
    white = _draw(g, 1, 5, N)
    v, log_det = solver._flow(seen, white, inverse=False)
    back, back_det = solver._flow(seen, v, inverse=True)
    assert float((v - white).abs().max()) > 0.02  # it was trained away from the identity
    torch.testing.assert_close(back, white, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(back_det, -log_det, rtol=1e-8, atol=1e-8)
    for i in range(5):
        J = torch.autograd.functional.jacobian(
            lambda e: solver._flow(seen, e[None, None], inverse=False)[0][0, 0], white[0, i]
        )
        torch.testing.assert_close(torch.linalg.slogdet(J)[1], log_det[0, i], rtol=1e-8, atol=1e-8)


def test_an_unknown_noise_level_is_fitted_along():
    """Four data of a constant, level under Exp: the ELBO is a bound, the importance-weighted one is tight; quadrature."""
    data = torch.tensor([[1.0, 1.4, 0.7, 1.2]], dtype=F64)
    A = MatrixOperator(torch.ones(4, 1, dtype=F64))
    prior = GaussianPrior(torch.ones(1, dtype=F64), 4.0)
    level = GaussianPrior(torch.full((1,), -1.0, dtype=F64), 0.5, transform=Exp())
    problem = InverseProblem(data, A, GaussianNoise("sigma"), prior, nuisance={"sigma": level})
    posterior = _solve(VariationalGaussian(steps=300), problem, 2000)
    u, v = torch.meshgrid(torch.linspace(-3, 5, 1601, dtype=F64), torch.linspace(-5, 3, 801, dtype=F64), indexing="ij")
    log = -0.5 * ((data[0][:, None, None] - u) / v.exp()).square().sum(0) - 4 * v - 2 * math.log(2 * math.pi)
    log = log - (u - 1) ** 2 / 8 - (v + 1) ** 2 - math.log(2 * math.pi) - 0.5 * math.log(4.0 * 0.5)
    evidence = float(log.flatten().logsumexp(0)) + math.log(0.005 * 0.01)
    elbo, bound = (float(posterior.stats[k][0, 0, 0]) for k in ("elbo", "iw_bound"))
    assert evidence - 0.3 < elbo < evidence
    assert abs(bound - evidence) < 0.1
    w = log.flatten().softmax(0).reshape(log.shape)
    centre = float((w * v).sum())
    spread = float((w * (v - centre) ** 2).sum().sqrt())
    assert abs(float(posterior.theta["sigma"].log().mean()) - centre) < 0.3 * spread
    heavy = InverseProblem(data, A, StudentTNoise(0.3, 4.0), prior)
    assert bool(torch.isfinite(_solve(VariationalGaussian(steps=50), heavy, 10).samples).all())


def test_pareto_shape_is_that_of_arviz():
    from arviz import psislw

    g = np.random.default_rng(3)
    for scale in (0.3, 1.0, 2.0, 4.0):
        log_weights = scale * g.standard_normal(1000)
        assert _pareto(torch.from_numpy(log_weights)) == pytest.approx(float(psislw(log_weights)[1]), abs=1e-6)


def test_figures_of_weights_by_hand():
    """Two sets: equal weights, and weights with a third lost."""
    w = torch.zeros(2, 300, dtype=F64)
    w[1, :200] = torch.linspace(-2, 0, 200, dtype=F64)
    w[1, 200:] = torch.nan
    fit = assess(w)
    assert float(fit.elbo[0]) == 0
    assert float(fit.iw_bound[0]) == pytest.approx(0, abs=1e-12)
    assert float(fit.khat[0]) == -math.inf
    assert float(fit.elbo[1]) == pytest.approx(-1)
    assert float(fit.iw_bound[1]) == pytest.approx(float(w[1, :200].logsumexp(0)) - math.log(300))
    w[1, 100:] = torch.nan
    assert math.isnan(float(assess(w).khat[1]))


def test_what_they_refuse():
    problem = _problem()
    term = problem.terms[0]
    box = InverseProblem(term.data, BlackBox(np.sum, (N,), (M,)), term.noise, problem.prior)
    with pytest.raises(TypeError, match=r"black box.*EnsembleKalmanInversion"):
        VariationalGaussian().solve(box, 1)
    one = InverseProblem(
        torch.ones(1, 1), MatrixOperator(torch.ones(1, 1)), GaussianNoise(1.0), GaussianPrior(torch.zeros(1), 1.0)
    )
    with pytest.raises(TypeError, match="at least two"):
        VariationalFlow().solve(one, 1)
    with pytest.raises(ValueError, match="families"):
        VariationalGaussian("rank-one")
