"""Hierarchical Gibbs: noise levels and prior strength against marginals by quadrature, with a mean and correlations."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Gamma, MultivariateNormal

from invgen.noise import GaussianNoise
from invgen.operators import MatrixOperator
from invgen.priors import GaussianPrior, InverseGammaPrior
from invgen.problem import InverseProblem, Term
from invgen.solvers import HierarchicalGibbs
from invgen.transforms import Affine, Exp

F64 = torch.float64
CHAINS = 1500  # independent draws: one a chain
KS_LIMIT = 2.4 / math.sqrt(CHAINS)  # exceeded by chance in 2 exp(-2 · 2.4²) = 2e-5 of comparisons


def _randn(g, *shape):
    return torch.randn(*shape, generator=g, dtype=F64)


def _model(n=6, m=9):
    g = torch.Generator().manual_seed(3)
    root = _randn(g, n, n) / 2
    mean, C = 2 * _randn(g, n), root @ root.T + 0.1 * torch.eye(n, dtype=F64)
    A = _randn(g, m, n) / 2
    data = A @ (2 + 3 * mean) + 3 * _randn(g, m)
    return mean, C, A, data, GaussianPrior(mean, C, transform=Affine(2.0, 3.0))


def _ks(draws, grid, log_weights):
    """Largest distance of the draws' distribution from that of weights on an even grid."""
    mass = (log_weights - log_weights.max()).exp()
    mass = (mass[1:] + mass[:-1]) / 2  # trapezia
    cdf = torch.cat([mass.new_zeros(1), mass.cumsum(0)]) / mass.sum()
    ordered = draws.sort().values
    place = torch.searchsorted(grid, ordered).clamp(1, len(grid) - 1)
    share = (ordered - grid[place - 1]) / (grid[place] - grid[place - 1])
    exact = torch.lerp(cdf[place - 1], cdf[place], share.clamp(0, 1))
    steps = torch.arange(len(ordered), dtype=F64) / len(ordered)
    return float(torch.maximum((exact - steps).abs(), (exact - steps - 1 / len(ordered)).abs()).max())


LOG_SIGMA = torch.linspace(math.log(0.2), math.log(30.0), 400, dtype=F64)


def _log_marginal(mean, S, R_of, log_sigma, data):
    """log N(d; A m, S + R(σ)) on a grid."""
    return torch.stack([MultivariateNormal(mean, S + R_of(s)).log_prob(data) for s in log_sigma.exp()])


@pytest.mark.parametrize(
    "prior",
    [
        InverseGammaPrior(2.0, 6.0),
        GaussianPrior(torch.tensor([0.5], dtype=F64), torch.tensor([[0.3]], dtype=F64), transform=Exp()),
    ],
    ids=["conjugate", "lognormal"],
)
@pytest.mark.parametrize("limit", [2048, 0], ids=["decomposed", "solved"])
def test_noise_level_and_model_have_the_exact_marginals(prior, limit):
    mean, C, A, data, field = _model()
    problem = InverseProblem(data, MatrixOperator(A), GaussianNoise("sigma"), field, nuisance={"sigma": prior})
    solver = HierarchicalGibbs(draws=1, warmup=60, limit=limit)
    posterior = solver.solve(problem, CHAINS, dtype=F64)
    assert posterior.kind == "exact"
    mx, S = A @ (2 + 3 * mean), 9 * A @ C @ A.T
    eye = torch.eye(len(data), dtype=F64)
    log_sigma = LOG_SIGMA
    weights = _log_marginal(mx, S, lambda s: s**2 * eye, log_sigma, data)
    weights = weights + prior.log_prob(log_sigma.exp()[:, None]) + log_sigma  # even in log sigma
    assert _ks(posterior.theta["sigma"].flatten().log(), log_sigma, weights) < KS_LIMIT
    # the model: mixture of the conditional Gaussians
    mass = (weights - weights.max()).exp()
    mass = mass / mass.sum()
    gains = torch.stack([9 * C @ A.T @ torch.linalg.inv(S + s**2 * eye) for s in log_sigma.exp()])
    means = 2 + 3 * mean + gains @ (data - mx)
    covariances = 9 * C - gains @ (9 * A @ C)
    want = mass @ means
    variance = mass @ (covariances.diagonal(dim1=1, dim2=2) + means.square()) - want.square()
    x = posterior.samples.flatten(0, 2)
    z = (x.mean(0) - want) / (variance / CHAINS).sqrt()
    assert float(z.abs().max()) < 5
    fourth = (x - want).pow(4).mean(0)
    z = (((x - want).square()).mean(0) - variance) / ((fourth - variance.square()) / CHAINS).sqrt()
    assert float(z.abs().max()) < 5


@pytest.mark.parametrize("limit", [2048, 0], ids=["decomposed", "solved"])
def test_strength_of_the_prior_with_a_noise_level(limit):
    """Both marginals against a two-dimensional quadrature."""
    mean, C, A, data, field = _model()
    a, b = 2.0, 1.5
    level = InverseGammaPrior(3.0, 10.0)
    problem = InverseProblem(data, MatrixOperator(A), GaussianNoise("sigma"), field, nuisance={"sigma": level})
    posterior = HierarchicalGibbs(strength=(a, b), draws=1, warmup=120, limit=limit).solve(problem, CHAINS, dtype=F64)
    mx, S = A @ (2 + 3 * mean), 9 * A @ C @ A.T
    eye = torch.eye(len(data), dtype=F64)
    log_sigma = torch.linspace(math.log(0.2), math.log(30.0), 140, dtype=F64)
    log_delta = torch.linspace(math.log(1e-3), math.log(20.0), 140, dtype=F64)
    joint = torch.stack(
        [
            MultivariateNormal(mx, S / d + log_sigma.exp().square()[:, None, None] * eye).log_prob(data)
            for d in log_delta.exp()
        ]
    )
    joint = joint + Gamma(a, b).log_prob(log_delta.exp())[:, None] + log_delta[:, None]
    joint = joint + level.log_prob(log_sigma.exp()[:, None]) + log_sigma
    assert _ks(posterior.theta["sigma"].flatten().log(), log_sigma, joint.logsumexp(0)) < KS_LIMIT
    assert _ks(posterior.theta["strength"].flatten().log(), log_delta, joint.logsumexp(1)) < KS_LIMIT


def test_two_levels_in_two_terms():
    mean, C, A, data, field = _model()
    laws = {"near": InverseGammaPrior(3.0, 10.0), "far": InverseGammaPrior(4.0, 2.0)}
    terms = [
        Term(data[:5], MatrixOperator(A[:5]), GaussianNoise("near")),
        Term(data[5:], MatrixOperator(A[5:]), GaussianNoise("far")),
    ]
    problem = InverseProblem(terms=terms, prior=field, nuisance=laws)
    posterior = HierarchicalGibbs(draws=1, warmup=60).solve(problem, CHAINS, dtype=F64)
    mx, S = A @ (2 + 3 * mean), 9 * A @ C @ A.T
    grid = torch.linspace(math.log(0.2), math.log(30.0), 140, dtype=F64)
    near, far = torch.eye(9, dtype=F64), torch.eye(9, dtype=F64)
    near[5:], far[:5] = 0, 0
    joint = torch.stack(
        [
            MultivariateNormal(mx, S + s.square() * near + grid.exp().square()[:, None, None] * far).log_prob(data)
            for s in grid.exp()
        ]
    )
    joint = joint + (laws["near"].log_prob(grid.exp()[:, None]) + grid)[:, None]
    joint = joint + laws["far"].log_prob(grid.exp()[:, None]) + grid
    assert _ks(posterior.theta["near"].flatten().log(), grid, joint.logsumexp(1)) < KS_LIMIT
    assert _ks(posterior.theta["far"].flatten().log(), grid, joint.logsumexp(0)) < KS_LIMIT


def test_complex_data_count_twice():
    """A complex problem and its real and imaginary parts with half the variance are one posterior."""
    g = torch.Generator().manual_seed(5)
    A = torch.complex(_randn(g, 4, 3), _randn(g, 4, 3))
    field = GaussianPrior(_randn(g, 3), 0.5 * torch.eye(3, dtype=F64))
    data = torch.complex(2 * _randn(g, 4), 2 * _randn(g, 4))
    law = InverseGammaPrior(2.0, 1.0)
    problem = InverseProblem(data, MatrixOperator(A, real_model=True), GaussianNoise("s"), field, nuisance={"s": law})
    both = torch.cat([A.real, A.imag])
    flat = torch.cat([data.real, data.imag])
    S = both @ (0.5 * torch.eye(3, dtype=F64)) @ both.T
    weights = _log_marginal(both @ field.mean_u, S, lambda s: 0.5 * s**2 * torch.eye(8, dtype=F64), LOG_SIGMA, flat)
    weights = weights + law.log_prob(LOG_SIGMA.exp()[:, None]) + LOG_SIGMA
    for limit in (2048, 0):
        posterior = HierarchicalGibbs(draws=1, warmup=40, limit=limit).solve(problem, CHAINS, dtype=F64)
        assert _ks(posterior.theta["s"].flatten().log(), LOG_SIGMA, weights) < KS_LIMIT


def test_long_chains_keep_thin_and_are_reported():
    _, _, A, data, field = _model()
    problem = InverseProblem(
        data, MatrixOperator(A), GaussianNoise("sigma"), field, nuisance={"sigma": InverseGammaPrior(2.0, 6.0)}
    )
    posterior = HierarchicalGibbs(draws=7, warmup=3, thin=2).solve(problem, 4, dtype=F64)
    assert posterior.samples.shape == (1, 4, 7, 6)
    assert posterior.theta["sigma"].shape == (1, 4, 7)
    assert "strength" not in posterior.theta
    assert bool((posterior.stats["accept"] == 1).all())


def test_what_it_refuses():
    _, _, A, data, field = _model()
    known = InverseProblem(data, MatrixOperator(A), GaussianNoise(1.0), field)
    with pytest.raises(TypeError, match="nothing is unknown"):
        HierarchicalGibbs().solve(known, 1)
    law = InverseGammaPrior(1.0, 1.0)
    stray = InverseProblem(data, MatrixOperator(A), GaussianNoise("s"), field, nuisance={"s": law, "t": law})
    with pytest.raises(TypeError, match="'t' is none"):
        HierarchicalGibbs().solve(stray, 1)
    beside = InverseProblem(data, MatrixOperator(A), GaussianNoise("s", model_error=0.1), field, nuisance={"s": law})
    with pytest.raises(TypeError, match="model_error"):
        HierarchicalGibbs().solve(beside, 1)
    for bad in ({"draws": 0}, {"warmup": -1}, {"strength": (1.0, 0.0)}):
        with pytest.raises(ValueError, match="HierarchicalGibbs"):
            HierarchicalGibbs(**bad)
    with pytest.raises(ValueError, match="positive rate"):
        InverseGammaPrior(1.0, -1.0)
