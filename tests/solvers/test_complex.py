"""Complex data of a real model: every rule that solves with R must see half of it in each part."""

import pytest
import torch

from invgen.covariance import Dense
from invgen.driver import Streams
from invgen.noise import GaussianNoise
from invgen.operators import MatrixOperator
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem
from invgen.solvers import MMPS, ExactGaussian, GuidedDiffusion, PiGDM, PnPDM
from invgen.solvers.split import likelihood_step

torch.set_num_threads(1)
F64 = torch.float64


def _problem(real_model, covariance):
    g = torch.Generator().manual_seed(3)
    M = torch.randn(3, 4, generator=g, dtype=torch.complex128)
    prior = GaussianPrior(torch.tensor([1.0, -2.0, 0.5, 0.3], dtype=F64), covariance)
    d = torch.randn(3, generator=g, dtype=torch.complex128)
    return InverseProblem(d, MatrixOperator(M, real_model=real_model), GaussianNoise(0.7), prior)


def _correlated():
    root = torch.randn(4, 4, generator=torch.Generator().manual_seed(4), dtype=F64)
    return Dense(root @ root.T + 0.2 * torch.eye(4, dtype=F64))


@pytest.mark.parametrize("real_model", [True, False])
@pytest.mark.parametrize("rule", [MMPS(iterations=6, rtol=1e-10), PiGDM()])
def test_posterior_denoiser_is_the_exact_one(rule, real_model):
    # a white prior makes both rules exact: u is a further datum of the prior, with noise sigma
    white = isinstance(rule, PiGDM)
    problem = _problem(real_model, 0.8 if white else _correlated())
    sigma, u = 0.9, torch.randn(2, 4, generator=torch.Generator().manual_seed(5), dtype=F64)
    got, residual = rule(problem.select([0, 0], dtype=F64), u, sigma, 1.0)
    C, m = problem.prior.covariance_u.dense(), problem.prior.mean_u
    eye = torch.eye(4, dtype=F64)
    shrink = C @ torch.linalg.inv(C + sigma**2 * eye)
    for item, estimate in zip(u, got, strict=True):
        given = GaussianPrior(m + shrink @ (item - m), Dense(sigma**2 * (shrink + shrink.T) / 2))
        term = problem.terms[0]
        want = ExactGaussian().mean(InverseProblem(term.data, term.operator, term.noise, given))[0]
        torch.testing.assert_close(estimate, want, rtol=1e-7, atol=1e-7)
    assert residual is not None
    assert float(residual.max()) < 1e-7


@pytest.mark.parametrize("real_model", [True, False])
def test_likelihood_step_draws_from_its_gaussian(real_model):
    problem, n, rho = _problem(real_model, _correlated()), 4000, 0.8
    u = torch.tensor([0.4, -1.0, 0.2, 2.0], dtype=F64)
    z, residual, missed = likelihood_step(problem.select([0] * n, dtype=F64), u.expand(n, 4), rho, Streams(0, range(n)))
    term = problem.terms[0]
    mean, C = ExactGaussian().moments(InverseProblem(term.data, term.operator, term.noise, GaussianPrior(u, rho**2)))
    assert z.dtype == F64
    assert float(missed.sum()) == 0
    off = torch.linalg.solve_triangular(torch.linalg.cholesky(C), (z - mean).T, upper=False).T
    assert float(off.mean(0).abs().max()) * n**0.5 < 5
    assert float((off.square().mean(0) - 1).abs().max()) * (n / 2) ** 0.5 < 5
    assert float(residual.max()) < 1e-8


@pytest.mark.parametrize("solver", [GuidedDiffusion(MMPS(), steps=8), PnPDM(iterations=6, inner=2)])
def test_models_stay_real(solver):
    assert solver.solve(_problem(False, _correlated()), 3, dtype=F64).samples.dtype == F64
