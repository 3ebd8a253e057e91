"""SVGD: the mean of a Gaussian posterior is right, the spread collapses with the dimension as documented."""

from __future__ import annotations

import math

import pytest
import torch

from invgen.covariance import Dense
from invgen.noise import GaussianNoise
from invgen.operators import MatrixOperator
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem
from invgen.solvers import SVGD, ExactGaussian
from invgen.solvers.svgd import stein_direction
from invgen.transforms import Affine

F64 = torch.float64


def _draw(g, *shape):
    return torch.randn(*shape, generator=g, dtype=F64)


def test_direction_against_the_sum_it_is():
    """φ by autograd of the kernel, particle by particle, with one particle left out."""
    g = torch.Generator().manual_seed(3)
    q, score = _draw(g, 2, 5, 3), _draw(g, 2, 5, 3)
    good = torch.ones(2, 5, dtype=torch.bool)
    good[1, 2] = False
    score[1, 2] = 0
    phi, h = stein_direction(q, score, good)
    for s in range(2):
        distances = torch.linalg.norm(q[s, :, None] - q[s], dim=-1).flatten()
        assert float(h[s]) == pytest.approx(float(distances.median() ** 2 / math.log(5)))
        for i in range(5):
            total = torch.zeros(3, dtype=F64)
            for j in range(5):
                if good[s, j]:
                    a = q[s, j].clone().requires_grad_()
                    k = torch.exp(-(a - q[s, i]).square().sum() / h[s])
                    total += k.detach() * score[s, j] + torch.autograd.grad(k, a)[0]
            torch.testing.assert_close(phi[s, i], total / int(good[s].sum()), rtol=1e-10, atol=1e-12)


def test_mean_of_a_correlated_gaussian():
    """Three unknowns with a mean, x = 2 + 3u, correlated noise: the mean to 5 % of a posterior sd, the spread to 20 %."""
    g = torch.Generator().manual_seed(7)
    root, r = _draw(g, 3, 3) / math.sqrt(3), _draw(g, 2, 2) / math.sqrt(2)
    prior = GaussianPrior(2 * _draw(g, 3), root @ root.T + 0.1 * torch.eye(3, dtype=F64), transform=Affine(2.0, 3.0))
    R = Dense(0.25 * (r @ r.T + 0.3 * torch.eye(2, dtype=F64)))
    problem = InverseProblem(3 * _draw(g, 1, 2), MatrixOperator(_draw(g, 2, 3) / 3), GaussianNoise(covariance=R), prior)
    posterior = SVGD(particles=100, steps=600).solve(problem, 100, dtype=F64)
    mean, covariance = ExactGaussian().moments(problem)
    sd = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    x = posterior.samples[0, 0]
    assert float(((x.mean(0) - mean[0]) / sd).abs().max()) < 0.05
    assert float((x.std(0) / sd - 1).abs().max()) < 0.2
    assert float(posterior.stats["phi"][0, 0, 0]) < 1e-2


@pytest.mark.parametrize(("n", "low", "high"), [(2, 0.9, 1.0), (8, 0.66, 0.8), (32, 0.3, 0.44)])
def test_the_spread_collapses_with_the_dimension_as_documented(n, low, high):
    """Unknowns N(1, I), each measured with noise 1: sd ratio of 100 particles; the mean stays."""
    prior = GaussianPrior(torch.ones(n, dtype=F64), 1.0)
    operator = MatrixOperator(torch.eye(n, dtype=F64))
    problem = InverseProblem(torch.full((1, n), 3.0, dtype=F64), operator, GaussianNoise(1.0), prior)
    x = SVGD(particles=100, steps=300).solve(problem, 100, seed=2, dtype=F64).samples[0, 0]
    assert float((x.mean(0) - 2).abs().max()) < 0.05
    assert low < float(x.var(0).mean().sqrt() / math.sqrt(0.5)) < high


def test_particles_without_a_likelihood_are_counted_and_do_not_pull():
    class Holes(MatrixOperator):
        def forward(self, x, **theta):
            out = super().forward(x)
            return torch.where(x[:, :1] > 2.2, torch.full_like(out, torch.nan), out)

    prior = GaussianPrior(torch.zeros(2, dtype=F64), 1.0)
    problem = InverseProblem(
        torch.tensor([[-1.0, 0.5]], dtype=F64), Holes(torch.eye(2, dtype=F64)), GaussianNoise(0.5), prior
    )
    posterior = SVGD(particles=300, steps=300).solve(problem, 300, dtype=F64)
    assert float(posterior.stats["failed_runs"][0, 0, 0]) > 0
    assert bool(torch.isfinite(posterior.samples).all())
    wanted = torch.tensor([-0.8, 0.4], dtype=F64)
    assert float((posterior.samples[0, 0].mean(0) - wanted).abs().max()) < 0.1
