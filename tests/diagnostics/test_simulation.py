"""Calibration of solvers: right ones pass, wrong ones fail, whatever shape the posterior has."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from invgen.contracts import Solver
from invgen.diagnostics import calibrate
from invgen.noise import GaussianNoise
from invgen.operators import MatrixOperator
from invgen.posterior import Posterior
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem, Term
from invgen.solvers import MAP, ExactGaussian
from invgen.transforms import Exp

F64 = torch.float64


@pytest.fixture
def problem():
    g = torch.Generator().manual_seed(0)
    root = torch.randn(3, 3, generator=g, dtype=F64)
    prior = GaussianPrior.dense(
        torch.tensor([1.0, -2.0, 0.5], dtype=F64), root @ root.T + 0.2 * torch.eye(3, dtype=F64)
    )
    A1, A2 = torch.randn(2, 3, generator=g, dtype=F64), torch.randn(1, 3, generator=g, dtype=F64)
    terms = [
        Term(torch.zeros(2, dtype=F64), MatrixOperator(A1), GaussianNoise(0.4)),
        Term(torch.zeros(1, dtype=F64), MatrixOperator(A2), GaussianNoise(0.8)),
    ]
    return InverseProblem(terms=terms, prior=prior)


class Changed:
    """A solver whose posterior is changed after the fact."""

    kind = "exact"

    def __init__(self, change):
        self.change = change

    def solve(self, problem, num_samples, *, seed=0, **options):
        return self.change(ExactGaussian().solve(problem, num_samples, seed=seed, **options))


@dataclass(frozen=True)
class PriorOnly(Solver):
    """Draws from the prior, nuisance parameters included."""

    def init(self, problem, rng):
        def draw(prior, tag):
            white = rng.normal(tuple(prior.shape), dtype=problem.dtype, tag=tag)
            return prior.transform(prior.mean_u + prior.covariance_u.sqrt(white))

        unknown = {f"theta_{k}": draw(p, k)[:, 0] for k, p in problem.nuisance.items()}
        return {"x": draw(problem.prior, "x"), **unknown}


def test_an_exact_solver_passes(problem):
    result = calibrate(problem, ExactGaussian(), 300, 40, dtype=F64, level=1e-3)
    assert result.passed, str(result)
    assert result.dropped == 0
    assert result.tests[0].ranks.shape == (300, 4)  # three coordinates and the log-likelihood
    assert result.names[3].endswith("log p(d | x)")


def test_wrong_posteriors_fail(problem):
    def narrow(p: Posterior) -> Posterior:
        centre = p.samples.mean(2, keepdim=True)
        return replace(p, samples=centre + 0.6 * (p.samples - centre))

    assert not calibrate(problem, Changed(narrow), 300, 40, dtype=F64, level=1e-3).passed
    ignorant = calibrate(problem, PriorOnly(), 300, 40, dtype=F64, level=1e-3)
    assert not ignorant.passed
    assert all("x[" not in name for name in ignorant.failing)


def test_chains_are_pooled_and_thinned(problem):
    def chains(p: Posterior) -> Posterior:
        """Chains that stay 30 steps at each draw."""
        return replace(p, samples=p.samples.reshape(p.n_obs, 2, 2, 3).repeat_interleave(30, 2), stats={})

    result = calibrate(problem, Changed(chains), 400, 4, thin=30, dtype=F64, level=1e-3)
    assert result.passed
    assert result.tests[0].num_draws == 4
    assert not calibrate(problem, Changed(chains), 400, 4, dtype=F64, level=1e-3).passed


def test_weighted_draws_are_resampled(problem):
    """Prior draws weighted by likelihood are posterior draws; unweighted they are not."""
    problem = InverseProblem(terms=[replace(t, noise=GaussianNoise(2.0)) for t in problem.terms], prior=problem.prior)
    root = torch.linalg.cholesky(problem.prior.covariance_u.dense())

    def importance(p: Posterior) -> Posterior:
        n_obs, draws = p.n_obs, 4000
        g = torch.Generator().manual_seed(1)
        x = problem.prior.mean_u + torch.randn(n_obs * draws, 3, generator=g, dtype=F64) @ root.T
        each = p.problem.select([i // draws for i in range(n_obs * draws)], dtype=F64)
        w = each.log_likelihood(x).reshape(n_obs, 1, draws).softmax(2)
        return replace(p, samples=x.reshape(n_obs, 1, draws, 3), weights=w, stats={})

    weighted = calibrate(problem, Changed(importance), 150, 2, dtype=F64, level=1e-3)
    assert weighted.passed, str(weighted)
    assert weighted.tests[0].num_draws > 50
    forgotten = calibrate(problem, Changed(lambda p: replace(importance(p), weights=None)), 150, 2, dtype=F64)
    assert forgotten.tests[0].p_values[3] < 1e-6


def test_simulations_that_diverged_are_left_out_and_counted(problem):
    def broken(p: Posterior) -> Posterior:
        samples = p.samples.clone()
        samples[5, 0, 3] = float("nan")
        samples[9] = float("inf")
        return replace(p, samples=samples)

    with pytest.warns(UserWarning, match="2 of 100"):
        result = calibrate(problem, Changed(broken), 100, 20, dtype=F64, level=1e-3)
    assert result.dropped == 2
    assert result.tests[0].n_sim == 98
    with pytest.warns(UserWarning, match="30 of 30"), pytest.raises(ValueError, match="Every one of the 30"):
        calibrate(problem, Changed(lambda p: replace(p, samples=p.samples * float("nan"))), 30, 20, dtype=F64)


def test_nuisance_parameters_and_further_quantities_are_ranked(problem):
    unknown = GaussianPrior.dense(torch.tensor([-1.0], dtype=F64), torch.tensor([[0.04]], dtype=F64), transform=Exp())
    case = InverseProblem(
        terms=[replace(t, noise=GaussianNoise("sd")) for t in problem.terms],
        prior=problem.prior,
        nuisance={"sd": unknown},
    )
    result = calibrate(
        case, PriorOnly(), 200, 30, dtype=F64, level=1e-3, quantities={"x0 d0": lambda x, d: x[:, 0] * d[0][:, 0]}
    )
    names = result.tests[0].names
    assert names == ("x[0]", "x[1]", "x[2]", "log p(d | x)", "sd", "x0 d0")
    assert result.tests[0].p_values[4] > 1e-4


def test_points_are_refused(problem):
    with pytest.raises(TypeError, match="no ranks"):
        calibrate(problem, MAP(), 10, 1)
