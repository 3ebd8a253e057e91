"""The Laplace approximation: exact where the posterior is Gaussian in z, its factors, its rank, its evidence."""

from __future__ import annotations

import math

import pytest
import torch

from invgen.contracts import Operator
from invgen.noise import GaussianNoise, LaplaceNoise
from invgen.operators import MatrixOperator
from invgen.priors import GaussianMixturePrior, GaussianPrior
from invgen.problem import InverseProblem, Term
from invgen.solvers import MAP, ExactGaussian, Laplace
from invgen.solvers._lowrank import laplace_factors
from invgen.transforms import Affine, Exp

F64 = torch.float64


def _randn(g, *shape):
    return torch.randn(*shape, generator=g, dtype=F64)


def _gaussian(n=24, m=10, n_obs=3, transform=None, noise=None):
    """Correlated unknowns with a mean, x = 2 + 3u, correlated noise."""
    g = torch.Generator().manual_seed(1)
    root = _randn(g, n, n) / math.sqrt(n)
    prior = GaussianPrior(
        _randn(g, n), root @ root.T + 0.1 * torch.eye(n, dtype=F64), transform=transform or Affine(2.0, 3.0)
    )
    mixing = _randn(g, m, m) / 5
    R = mixing @ mixing.T + 0.2 * torch.eye(m, dtype=F64)
    from invgen.covariance import Dense

    return InverseProblem(
        5 * _randn(g, n_obs, m),
        MatrixOperator(_randn(g, m, n) / 3),
        noise or GaussianNoise(covariance=Dense(R)),
        prior,
    )


def _dense(factors, item=0):
    n = factors.mode.shape[1]
    eye = torch.eye(n, dtype=F64)
    return torch.stack([factors.rows(torch.tensor([item])).covariance(row[None])[0] for row in eye])


def test_is_the_exact_posterior_of_a_linear_gaussian_problem():
    problem = _gaussian()
    mean, covariance = ExactGaussian().moments(problem)
    factors = Laplace(mode=MAP(space="z", optimizer="levenberg_marquardt", tol=1e-12), threshold=1e-9).factors(problem)
    decoded = problem.prior.decode(factors.mode)
    torch.testing.assert_close(decoded, mean, rtol=0, atol=1e-9)
    L = 3 * problem.prior.covariance_u.cholesky
    for item in range(3):
        torch.testing.assert_close(L @ _dense(factors, item) @ L.T, covariance, rtol=0, atol=1e-10)
    posterior = Laplace(threshold=1e-9).solve(problem, 2, dtype=F64)
    torch.testing.assert_close(posterior.log_evidence, ExactGaussian().log_evidence(problem), rtol=1e-9, atol=1e-8)
    assert posterior.kind == "approximate"
    assert bool((posterior.stats["rank"] == 10).all())
    torch.testing.assert_close(
        posterior.samples, problem.prior.decode(posterior.latent.flatten(0, 2)).reshape(3, 1, 2, 24)
    )


def test_draws_have_the_exact_moments():
    problem = _gaussian(n_obs=1)
    mean, covariance = ExactGaussian().moments(problem)
    n = 4000
    draws = Laplace(starts=1).solve(problem, n, dtype=F64).samples[0, 0]
    sd = covariance.diagonal().sqrt()
    z = (draws.mean(0) - mean[0]) / sd * math.sqrt(n)
    # 24 means and 24 variances: |z| <= 4.6 fails by chance in 2e-4 of runs
    assert float(z.abs().max()) < 4.6
    ratio = draws.var(0) / covariance.diagonal()
    assert float((ratio - 1).abs().max()) < 4.6 * math.sqrt(2 / n) + 1e-2  # the threshold's share


def test_factors_invert_and_measure():
    problem = _gaussian()
    factors = laplace_factors(problem, torch.zeros(3, 24, dtype=F64), 6)
    v = _randn(torch.Generator().manual_seed(2), 3, 24)
    torch.testing.assert_close(factors.precision(factors.covariance(v)), v, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(factors.whiten(factors.sqrt(v)), v, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(factors.sqrt(factors.sqrt(v)), factors.covariance(v), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(factors.logdet()[0], torch.logdet(_dense(factors)))
    q = factors.mode + 0.3 * v
    whole = torch.distributions.MultivariateNormal(factors.mode[0], _dense(factors))
    torch.testing.assert_close(
        factors.log_prob(q)[0] - 12 * math.log(2 * math.pi), whole.log_prob(q[0]), rtol=1e-9, atol=1e-9
    )


def _smooth_problem(n=150, n_obs=2):
    """Exponential of a smooth field seen through a blur: the spectrum of the curvature falls over many decades."""
    t = torch.arange(n, dtype=F64)
    prior = GaussianPrior(
        torch.full((n,), 0.5, dtype=F64),
        0.3 * torch.exp(-(t[:, None] - t).abs() / 30) + 1e-6 * torch.eye(n, dtype=F64),
        transform=Exp(),
    )
    A = MatrixOperator(torch.exp(-0.5 * ((t[::2, None] - t) / 3) ** 2) / 8)
    data = A(prior.sample(n_obs, seed=1).double()) + 0.05 * _randn(torch.Generator().manual_seed(3), n_obs, len(t[::2]))
    return InverseProblem(data, A, GaussianNoise(0.05), prior)


def _dense_curvature(problem, q):
    A, noise = problem.terms[0].operator.to_dense(), float(problem.terms[0].noise.sigma)
    x = problem.prior.decode(q[None])[0]
    J = A @ torch.diag(x) @ problem.prior.covariance_u.cholesky / noise  # x = exp(m + L z)
    return J.T @ J


def test_low_rank_agrees_with_the_dense_curvature_and_grows_to_the_threshold():
    problem = _smooth_problem()
    q = 0.3 * _randn(torch.Generator().manual_seed(5), 2, 150)
    factors = laplace_factors(problem, q, threshold=1e-2)
    for item in range(2):
        H = _dense_curvature(problem, q[item])
        exact = torch.linalg.eigvalsh(H).flip(0)
        wanted = int((exact >= 1e-2).sum())
        assert wanted > 32  # the first guess of the rank was not enough
        got = factors.values[item][factors.values[item] > 0]
        assert abs(len(got) - wanted) <= 1
        torch.testing.assert_close(got[:20], exact[:20], rtol=1e-6, atol=0)
        inverse = torch.linalg.inv(torch.eye(150, dtype=F64) + H)
        error = torch.linalg.matrix_norm(_dense(factors, item) - inverse, ord=2)
        assert float(error) < 2e-2  # what is left out changes no variance by more than the threshold, twice for chance
    alone = laplace_factors(problem, q[:1], threshold=1e-2)
    torch.testing.assert_close(alone.values[0], factors.values[0, : alone.rank], rtol=1e-9, atol=1e-12)


def test_a_bad_item_has_no_directions_and_leaves_the_others_alone():
    problem = _smooth_problem()
    q = torch.zeros(2, 150, dtype=F64)
    whole = laplace_factors(problem, q, 5)
    q[0, 3] = math.nan
    factors = laplace_factors(problem, q, 5)
    assert bool(torch.isnan(factors.mode[0]).all())
    assert float(factors.values[0].abs().max()) == 0
    torch.testing.assert_close(factors.values[1], whole.values[1])


class Square(Operator):
    """x²: bends the posterior."""

    def __init__(self):
        super().__init__((1,), (1,))

    def forward(self, x, **theta):
        return x.square()


def test_evidence_and_width_of_a_bent_problem_against_quadrature():
    prior = GaussianPrior(torch.tensor([3.0], dtype=F64), torch.tensor([[0.25]], dtype=F64))
    problem = InverseProblem(torch.tensor([10.0], dtype=F64), Square(), GaussianNoise(0.5), prior)
    grid = torch.linspace(-12, 12, 100_001, dtype=F64)[:, None]
    log_joint = problem.latent_log_posterior(grid) - 0.5 * math.log(2 * math.pi)
    exact = torch.logsumexp(log_joint, 0) + math.log(24 / 100_000)
    posterior = Laplace(mode=MAP(space="z", optimizer="levenberg_marquardt", tol=1e-10), starts=8).solve(
        problem, 4, dtype=F64
    )
    weights = (log_joint - log_joint.max()).exp()
    z = posterior.latent
    assert abs(float(posterior.log_evidence[0] - exact)) < 0.01  # the leading term is right to a per cent here
    mode = grid[log_joint.argmax(), 0]
    factors = Laplace(starts=8).factors(problem)
    assert float(factors.mode[0, 0]) == pytest.approx(float(mode), abs=1e-3)
    mean = (weights * grid[:, 0]).sum() / weights.sum()
    sd = ((weights * (grid[:, 0] - mean).square()).sum() / weights.sum()).sqrt()
    assert float(factors.sqrt(torch.ones(1, 1, dtype=F64))[0, 0]) == pytest.approx(float(sd), rel=0.02)
    assert z.shape == (1, 1, 4, 1)


def test_an_unknown_noise_level_and_an_operator_parameter_join_the_curvature():
    """Against the Fisher information of the same model, differentiated densely."""
    g = torch.Generator().manual_seed(7)

    class Gain(Operator):
        theta_names = ("gain",)

        def __init__(self, A):
            super().__init__((A.shape[1],), (A.shape[0],))
            self.register_buffer("A", A)

        def forward(self, x, *, gain=None, **theta):
            return gain[:, None] * (x @ self.A.T)

    A = _randn(g, 12, 4)
    prior = GaussianPrior(_randn(g, 4), torch.eye(4, dtype=F64) * 0.5)
    nuisance = {
        "gain": GaussianPrior(torch.tensor([1.0], dtype=F64), torch.tensor([[0.04]], dtype=F64)),
        "level": GaussianPrior(torch.tensor([-1.0], dtype=F64), torch.tensor([[0.25]], dtype=F64), transform=Exp()),
    }
    problem = InverseProblem(_randn(g, 2, 12), Gain(A), GaussianNoise("level"), prior, nuisance=nuisance)
    q = 0.5 * _randn(g, 2, 6)
    factors = laplace_factors(problem, q, threshold=1e-10)
    for item in range(2):
        level = float((-1.0 + 0.5 * q[item, 5]).exp())

        def predicted(v):
            x = prior.mean_u + math.sqrt(0.5) * v[:4]
            return (1 + 0.2 * v[4]) * (A @ x)

        J = torch.autograd.functional.jacobian(predicted, q[item]) / level
        H = J.T @ J
        H[5, 5] += 2 * 12 * 0.5**2  # 2n information about log sigma, which moves by 0.5 a unit of z
        wanted = torch.linalg.inv(torch.eye(6, dtype=F64) + H)
        torch.testing.assert_close(_dense(factors, item), wanted, rtol=1e-9, atol=1e-10)
    posterior = Laplace(starts=2).solve(problem, 3, dtype=F64)
    assert set(posterior.theta) == {"gain", "level"}
    assert bool((posterior.theta["level"] > 0).all())


def test_two_terms_one_complex_and_masked():
    """The curvature of a complex datum of variance σ² is that of two real ones of variance σ²/2."""
    g = torch.Generator().manual_seed(8)
    prior = GaussianPrior(_randn(g, 6), torch.eye(6, dtype=F64))

    class Rotated(Operator):
        def __init__(self):
            super().__init__((6,), (6,))

        def forward(self, x, **theta):
            return x * torch.polar(torch.ones(6, dtype=F64), torch.arange(6, dtype=F64)).to(x.dtype.to_complex())

    mask = torch.tensor([True, False, True, True, False, True])
    terms = [
        Term(torch.zeros(6, dtype=torch.complex128), Rotated(), GaussianNoise(0.5), mask),
        Term(torch.zeros(6, dtype=F64), MatrixOperator(torch.eye(6, dtype=F64)), GaussianNoise(2.0)),
    ]
    problem = InverseProblem(terms=terms, prior=prior)
    factors = laplace_factors(problem, torch.zeros(1, 6, dtype=F64), threshold=1e-10)
    information = 2 / 0.25 * mask.double() + 0.25
    torch.testing.assert_close(_dense(factors), torch.diag(1 / (1 + information)), rtol=1e-10, atol=1e-12)


def test_modes_are_found_once_for_all_chunks(monkeypatch):
    problem = _gaussian(n_obs=2)
    solver, calls = Laplace(starts=2), []
    plain = MAP.init

    def counted(self, *given):
        calls.append(1)
        return plain(self, *given)

    monkeypatch.setattr(MAP, "init", counted)
    parts = solver.solve(problem, 6, dtype=F64, chunk=2)
    assert len(calls) == 2  # two observations, six chunks
    monkeypatch.undo()
    fresh = _gaussian(n_obs=2)
    torch.testing.assert_close(parts.samples, solver.solve(fresh, 6, dtype=F64).samples, rtol=1e-9, atol=1e-9)


def test_what_it_refuses():
    problem = _gaussian()
    with pytest.raises(TypeError, match="Gaussian noise"):
        Laplace().solve(_gaussian(noise=LaplaceNoise(1.0)), 1)

    class Once(Operator):
        derivative_order = 1

        def forward(self, x, **theta):
            return x[:, :10]

    once = InverseProblem(problem.terms[0].data, Once((24,), (10,)), GaussianNoise(1.0), problem.prior)
    with pytest.raises(TypeError, match="derivative_order 1"):
        Laplace().solve(once, 1)
    mixture = GaussianMixturePrior([1.0], torch.zeros(1, 24, dtype=F64), torch.eye(24, dtype=F64)[None])
    with pytest.raises(TypeError, match="HasLatent"):
        Laplace().solve(
            InverseProblem(problem.terms[0].data, problem.terms[0].operator, GaussianNoise(1.0), mixture), 1
        )
    for bad in ({"mode": MAP(space="x")}, {"starts": 0}, {"rank": 0}, {"mode": MAP(space="z", stop_chi2=1.0)}):
        with pytest.raises(ValueError, match="Laplace"):
            Laplace(**bad)
