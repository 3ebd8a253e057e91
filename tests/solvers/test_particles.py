"""Particle samplers against closed forms: evidence, moments, weights of modes; and what collapse looks like."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from invgen.covariance import Dense
from invgen.noise import GaussianNoise
from invgen.operators import MatrixOperator
from invgen.priors import GaussianMixturePrior, GaussianPrior
from invgen.problem import InverseProblem, Term
from invgen.solvers import TDS, ExactGaussian, ExactMixture, MCGDiff
from invgen.solvers._particles import effective_size, normalised, systematic
from invgen.transforms import Affine

F64 = torch.float64


def _draw(g, *shape):
    return torch.randn(*shape, generator=g, dtype=F64)


def _gaussian(typical=False):
    """Six correlated unknowns with a mean, x = 2 + 3u; three data with correlated noise, far from what the prior expects
    unless typical."""
    g = torch.Generator().manual_seed(7)

    def covariance(n):
        root = _draw(g, n, n) / math.sqrt(n)
        return root @ root.T + 0.1 * torch.eye(n, dtype=F64)

    prior = GaussianPrior(2 * _draw(g, 6), covariance(6), transform=Affine(2.0, 3.0))
    noise = GaussianNoise(covariance=Dense(0.3 * covariance(3)))
    data, A = 3 * _draw(g, 3), MatrixOperator(_draw(g, 3, 6) / 3)
    data = A(prior.mean()[None])[0] + 0.3 * data if typical else data
    return InverseProblem(terms=[Term(data, A, noise)], prior=prior)


def _modes():
    """Three modes 8 apart in four dimensions, one precise datum that two of them explain about equally well."""
    means = torch.tensor([[0.0, 0, 0, 0], [8.0, 8, 0, 0], [8.0, -8, 0, 8]], dtype=F64)
    prior = GaussianMixturePrior([0.5, 0.3, 0.2], means, torch.eye(4, dtype=F64).expand(3, 4, 4))
    A = torch.tensor([[0.8, 0.05, 0.5, 0.1]], dtype=F64)
    return InverseProblem(torch.tensor([6.2], dtype=F64), MatrixOperator(A), GaussianNoise(0.1), prior), means


SOLVERS = [
    TDS("mmps", particles=1024, steps=120),
    TDS("pigdm", particles=1024, steps=120),
    MCGDiff(particles=4096, steps=80),
]


def _label(solver):
    return f"{type(solver).__name__}-{getattr(solver, 'twist', 'potentials')}"


@pytest.mark.parametrize("solver", SOLVERS[:2], ids=_label)
def test_evidence_is_that_of_the_gaussian(solver):
    """The mean weight is unbiased for p(d) of the chain; 120 levels are within 5 % of the prior where data are far out."""
    problem = _gaussian()
    exact = float(ExactGaussian().log_evidence(problem)[0])
    found = [float(solver.solve(problem, 8, seed=s, dtype=F64).log_evidence[0]) - exact for s in range(6)]
    ratios = torch.tensor(found, dtype=F64).exp()
    error = float(ratios.std()) / math.sqrt(len(ratios))
    assert abs(float(ratios.mean()) - 1) < 0.05 + 4.5 * error, found
    assert error < 0.1


@pytest.mark.parametrize("solver", SOLVERS, ids=_label)
def test_moments_of_the_gaussian(solver):
    """Whitened by the exact posterior: mean 0, covariance I; data that surprise, where particles stand it (TDS)."""
    problem = _gaussian(typical=isinstance(solver, MCGDiff))
    mean, covariance = ExactGaussian().moments(problem)
    root = torch.linalg.cholesky(covariance)
    posterior = solver.solve(problem, 1000, seed=3, dtype=F64)
    white = torch.linalg.solve_triangular(root, (posterior.samples[0, 0] - mean[0]).T, upper=False).T
    n = min(1000.0, float(posterior.stats["ess"].min()))
    bias = 0.12 if isinstance(solver, MCGDiff) else 0.02  # few ancestors, which ess does not count
    assert float(white.mean(0).abs().max()) < bias + 4.5 / math.sqrt(n)
    values = torch.linalg.eigvalsh(white.T.cov())
    reach = math.sqrt(6 / n) + 4 / math.sqrt(n) + bias
    assert (1 - reach) ** 2 < float(values[0])
    assert float(values[-1]) < (1 + reach) ** 2


@pytest.mark.parametrize("solver", SOLVERS, ids=_label)
def test_modes_are_weighed(solver):
    problem, means = _modes()
    exact = ExactMixture().solve(problem, 40_000, seed=1, dtype=F64).samples[0, 0]
    posterior = solver.solve(problem, 1000, seed=5, dtype=F64)

    def shares(x):
        return torch.bincount(torch.cdist(x, means).argmin(1), minlength=3) / len(x)

    wanted, found = shares(exact), shares(posterior.samples[0, 0])
    assert float(wanted.min()) < 0.02 < 0.2 < float(wanted.sort().values[1])  # one mode is out, two compete
    n = min(1000.0, float(posterior.stats["ancestors"].min()))  # the relative variance of the evidence is 1/n
    assert n > 20
    assert float((found - wanted).abs().max()) < 4.5 * 0.5 / math.sqrt(n) + 0.02
    assert abs(float(posterior.log_evidence[0]) - float(ExactMixture().log_evidence(problem)[0])) < 4.5 / math.sqrt(n)


def test_collapse_is_reported():
    """Few particles and a twist that does not know the prior: a warning with the numbers, and ESS in the statistics."""
    g = torch.Generator().manual_seed(0)
    means = 8 * torch.randint(-2, 3, (25, 8), generator=g).to(F64)
    prior = GaussianMixturePrior([1 / 25] * 25, means, torch.eye(8, dtype=F64).expand(25, 8, 8))
    problem = InverseProblem(torch.zeros(4, dtype=F64), MatrixOperator(_draw(g, 4, 8)), GaussianNoise(0.01), prior)
    with pytest.warns(UserWarning, match=r"TDS: the weights of 1 of 1 observations collapsed, to an effective size of"):
        posterior = TDS("pigdm", particles=1024, steps=12).solve(problem, 16, dtype=F64)
    assert float(posterior.stats["ess_min"].min()) < 6


def test_draws_name_their_particle_and_none_is_favoured():
    problem = _gaussian()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior = TDS("mmps", particles=500, steps=30).solve(problem, 50, dtype=F64)
    chosen = posterior.stats["particle"].flatten()
    assert int(chosen.min()) >= 0
    assert int(chosen.max()) < 500
    assert torch.equal(chosen, chosen.sort().values)  # systematic: in the order of the set


def test_systematic_resampling_takes_the_floor_or_the_ceiling():
    g = torch.Generator().manual_seed(1)
    weights = torch.rand(50, 37, generator=g, dtype=F64)
    weights = weights / weights.sum(1, keepdim=True)
    offsets = torch.rand(50, generator=g, dtype=F64)
    counts = torch.stack([torch.bincount(row, minlength=37) for row in systematic(weights, offsets, 200)])
    assert bool((counts.sum(1) == 200).all())
    assert bool(((counts - 200 * weights).abs() < 1 + 1e-9).all())


def test_weights_that_are_not_finite_weigh_nothing():
    log_weights = torch.tensor([[0.0, math.nan, math.log(3.0), -math.inf], [math.nan] * 4], dtype=F64)
    weights, mean = normalised(log_weights)
    torch.testing.assert_close(weights[0], torch.tensor([0.25, 0, 0.75, 0], dtype=F64))
    assert float(mean[0]) == pytest.approx(0.0)
    assert float(effective_size(weights)[0]) == pytest.approx(1.6)
    assert bool(weights[1].isnan().all())
