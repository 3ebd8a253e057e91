"""Exact solvers against dense algebra, and their draws against the closed form within Monte-Carlo error."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from invgen.contracts import LinearOperator
from invgen.covariance import Dense
from invgen.noise import GaussianNoise, LaplaceNoise
from invgen.operators import MatrixOperator
from invgen.priors import GaussianMixturePrior, GaussianPrior
from invgen.problem import InverseProblem, Term
from invgen.solvers import ExactGaussian, ExactMixture, RandomizeThenOptimize
from invgen.transforms import Affine, Exp

F64 = torch.float64
N = 6000


def _randn(g, *shape):
    return torch.randn(*shape, generator=g, dtype=F64)


def _gaussian(n_obs=2, transform=None):
    """Two terms (8 data with one sigma each, 3 with correlated noise) on 16 unknowns; dense pieces beside it."""
    g = torch.Generator().manual_seed(7)
    root = _randn(g, 16, 16) / 4
    mean, C = _randn(g, 16), root @ root.T + 0.1 * torch.eye(16, dtype=F64)
    A1, A2 = _randn(g, 8, 16) / 3, _randn(g, 3, 16) / 3
    sigma = 0.2 + torch.rand(8, generator=g, dtype=F64)
    half = _randn(g, 3, 3) / 3
    R2 = half @ half.T + 0.1 * torch.eye(3, dtype=F64)
    prior = GaussianPrior(mean, C, transform=transform or Affine(2.0, 3.0))
    terms = [
        Term(5 * _randn(g, n_obs, 8), MatrixOperator(A1), GaussianNoise(sigma)),
        Term(5 * _randn(g, n_obs, 3), MatrixOperator(A2), GaussianNoise(covariance=Dense(R2))),
    ]
    A, R = torch.cat([A1, A2]), torch.block_diag(sigma.square().diag(), R2)
    data = torch.cat([t.data for t in terms], dim=1)
    return InverseProblem(terms=terms, prior=prior), 2 + 3 * mean, 9 * C, A, R, data


def _dense_posterior(m, C, A, R, d):
    K = C @ A.T @ torch.linalg.inv(A @ C @ A.T + R)
    return m + (d - m @ A.T) @ K.T, C - K @ A @ C


def check_draws(samples, mean, covariance):
    """z-scores of the whitened mean and of the whitened second moments of `(n, dim)` independent draws."""
    n = samples.shape[0]
    L = torch.linalg.cholesky(covariance)
    w = torch.linalg.solve_triangular(L, (samples - mean).T, upper=False).T
    z_mean = w.mean(0) * math.sqrt(n)
    second = w.T @ w / n - torch.eye(w.shape[1], dtype=F64)
    sd = torch.full_like(second, 1 / math.sqrt(n)).fill_diagonal_(math.sqrt(2 / n))
    assert float(z_mean.abs().max()) < 5
    assert float((second / sd).abs().max()) < 5


def test_gaussian_moments_and_evidence_are_those_of_dense_algebra():
    problem, m, C, A, R, d = _gaussian()
    mean, covariance = ExactGaussian().moments(problem)
    want_mean, want_covariance = _dense_posterior(m, C, A, R, d)
    torch.testing.assert_close(mean, want_mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(covariance, want_covariance, rtol=1e-9, atol=1e-9)
    want = MultivariateNormal(m @ A.T, A @ C @ A.T + R).log_prob(d)
    torch.testing.assert_close(ExactGaussian().log_evidence(problem), want, rtol=1e-10, atol=1e-9)
    posterior = ExactGaussian().solve(problem, 3, dtype=F64)
    torch.testing.assert_close(posterior.log_evidence, want, rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(ExactGaussian(method="cg", rtol=1e-13).mean(problem), want_mean, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "solver", [ExactGaussian(), ExactGaussian(method="cg", rtol=1e-12), RandomizeThenOptimize(rtol=1e-12)], ids=repr
)
def test_gaussian_draws_have_the_posterior_moments(solver):
    problem, m, C, A, R, d = _gaussian()
    mean, covariance = _dense_posterior(m, C, A, R, d)
    posterior = solver.solve(problem, N, dtype=F64, seed=3)
    assert posterior.kind == "exact"
    for o in range(2):
        check_draws(posterior.samples[o, 0], mean[o], covariance)
    if "converged" in posterior.stats:
        assert bool(posterior.stats["converged"].all())


def test_check_draws_sees_a_wrong_law():
    g = torch.Generator().manual_seed(0)
    with pytest.raises(AssertionError):
        check_draws(1.1 * _randn(g, N, 4), torch.zeros(4, dtype=F64), torch.eye(4, dtype=F64))


def test_the_joint_law_is_left_invariant():
    """x ~ prior, d | x, then a draw of x | d: the draw has the prior's law again (several thousand observations)."""
    small, m, C, *_ = _gaussian(1)
    x, _, data = small.simulate(3000, seed=5)
    problem = InverseProblem(
        terms=[Term(d.double(), t.operator, t.noise) for d, t in zip(data, small.terms, strict=True)], prior=small.prior
    )
    assert x.shape == (3000, 16)
    for solver in (ExactGaussian(), RandomizeThenOptimize(rtol=1e-12)):
        check_draws(solver.solve(problem, 1, dtype=F64, seed=9).samples[:, 0, 0], m, C)


@pytest.mark.parametrize("real_model", [True, False])  # False: the problem itself keeps models real
def test_complex_data_of_a_real_model(real_model):
    g = torch.Generator().manual_seed(2)
    A = torch.complex(_randn(g, 5, 4), _randn(g, 5, 4))
    prior = GaussianPrior(_randn(g, 4), torch.eye(4, dtype=F64) * 0.5)
    d = torch.complex(_randn(g, 2, 5), _randn(g, 2, 5))
    problem = InverseProblem(d, MatrixOperator(A, real_model=real_model), GaussianNoise(0.8), prior)
    real = torch.cat([A.real, A.imag])
    R = 0.32 * torch.eye(10, dtype=F64)  # half of 0.64 a part
    flat, m, C = torch.cat([d.real, d.imag], dim=1), prior.mean_u, 0.5 * torch.eye(4, dtype=F64)
    mean, covariance = _dense_posterior(m, C, real, R, flat)
    got = ExactGaussian().moments(problem)
    torch.testing.assert_close(got[0], mean)
    torch.testing.assert_close(got[1], covariance)
    torch.testing.assert_close(ExactGaussian(method="cg", rtol=1e-13).mean(problem), mean)
    want = MultivariateNormal(real @ m, real @ C @ real.T + R).log_prob(flat)
    torch.testing.assert_close(ExactGaussian().log_evidence(problem), want)
    check_draws(RandomizeThenOptimize(rtol=1e-12).solve(problem, N, dtype=F64).samples[1, 0], mean[1], covariance)


def _mixture():
    g = torch.Generator().manual_seed(8)
    roots = _randn(g, 2, 4, 4) / 2
    covariances, means = roots @ roots.mT + 0.1 * torch.eye(4, dtype=F64), 0.6 * _randn(g, 2, 4)
    A = _randn(g, 2, 4) / 3
    prior = GaussianMixturePrior([0.35, 0.65], means, covariances, transform=Affine(2.0, 3.0))
    d = (2 + 3 * means).mean(0) @ A.T + 0.5 * _randn(g, 2, 2)
    problem = InverseProblem(d, MatrixOperator(A), GaussianNoise(0.8), prior)
    return problem, 2 + 3 * means, 9 * covariances, A, 0.64 * torch.eye(2, dtype=F64), d


def test_mixture_components_and_evidence_are_those_of_dense_algebra():
    problem, m, C, A, R, d = _mixture()
    each = torch.stack([MultivariateNormal(m[k] @ A.T, A @ C[k] @ A.T + R).log_prob(d) for k in range(2)], dim=1)
    joint = each + torch.tensor([0.35, 0.65], dtype=F64).log()
    torch.testing.assert_close(ExactMixture().log_evidence(problem), joint.logsumexp(1))
    weights, means, covariances = ExactMixture().components(problem)
    torch.testing.assert_close(weights, joint.softmax(1))
    for k in range(2):
        mean, covariance = _dense_posterior(m[k], C[k], A, R, d)
        torch.testing.assert_close(means[:, k], mean)
        torch.testing.assert_close(covariances[k], covariance)
    assert float(weights.min()) > 0.02, "the problem must keep both components alive to test the draws"


def test_mixture_draws_have_the_right_shares_and_moments():
    problem, *_ = _mixture()
    weights, means, covariances = ExactMixture().components(problem)
    posterior = ExactMixture().solve(problem, N, dtype=F64, seed=1)
    torch.testing.assert_close(posterior.log_evidence, ExactMixture().log_evidence(problem))
    for o in range(2):
        component, x = posterior.stats["component"][o, 0], posterior.samples[o, 0]
        share = float((component == 0).double().mean())
        p = float(weights[o, 0])
        assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / N)
        for k in range(2):
            check_draws(x[component == k], means[o, k], covariances[k])


class PlainMatrix(LinearOperator):
    """A matrix without a solve of its own."""

    def __init__(self, matrix):
        super().__init__((matrix.shape[1],), (matrix.shape[0],))
        self.matrix = matrix

    def forward(self, x, **theta):
        return x @ self.matrix.T

    def adjoint(self, d):
        return d @ self.matrix


def test_rto_reports_solves_that_did_not_converge():
    problem, *_ = _gaussian(1)
    A = torch.cat([t.operator.to_dense() for t in problem.terms])
    hard = InverseProblem(torch.zeros(11, dtype=F64), PlainMatrix(A), GaussianNoise(0.01), problem.prior)
    with pytest.warns(UserWarning, match="stopped at a relative residual"):
        posterior = RandomizeThenOptimize(max_iter=2, method="cg").solve(hard, 3, dtype=F64)
    assert not bool(posterior.stats["converged"].any())
    assert float(posterior.stats["residual"].min()) > 1e-10


def _two_fields(prior):
    means = torch.stack([prior.mean_u, prior.mean_u + 1])
    return GaussianMixturePrior([0.5, 0.5], means, [prior.covariance_u, prior.covariance_u])


def test_what_is_not_linear_gaussian_is_refused():
    problem, *_ = _gaussian(1)
    term = problem.terms[0]
    laplace = InverseProblem(term.data, term.operator, LaplaceNoise(0.1), problem.prior)
    with pytest.raises(TypeError, match="RandomizedMAP"):
        RandomizeThenOptimize().solve(laplace, 1)
    with pytest.raises(TypeError, match="linear operators with Gaussian noise only"):
        ExactGaussian().solve(laplace, 1)
    with pytest.raises(TypeError, match=r"HasGaussian.*ExactMixture"):  # its moments are not its law
        ExactGaussian().solve(InverseProblem(term.data, term.operator, term.noise, _two_fields(problem.prior)), 1)
    curved, *_ = _gaussian(1, Exp())
    for solver in (ExactGaussian(), RandomizeThenOptimize()):
        with pytest.raises(TypeError, match="affine transform"):
            solver.solve(curved, 1)
    with pytest.raises(ValueError, match="limit"):
        ExactGaussian(method="dense", limit=8).solve(problem, 1)
    with pytest.raises(ValueError, match="method"):
        ExactGaussian(method="qr")
