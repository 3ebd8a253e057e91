"""NUTS and HMC where targets are curved: the donut that starves other warm-ups, a banana, a funnel that must not lie."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from invgen.contracts import Operator
from invgen.diagnostics import ebfmi, ess, rhat
from invgen.noise import GaussianNoise
from invgen.operators import MatrixOperator
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem
from invgen.solvers import HMC, NUTS
from invgen.transforms import Affine

F64 = torch.float64


class Radius(Operator):
    """|x|."""

    def __init__(self):
        super().__init__((2,), (1,))

    def forward(self, x, **theta):
        return x.norm(dim=1, keepdim=True)


class Bend(Operator):
    """x₂ + x₁²."""

    def __init__(self):
        super().__init__((2,), (1,))

    def forward(self, x, **theta):
        return x[:, 1:] + x[:, :1].square()


def _flat_problem(operator, datum, noise):
    """A wide Gaussian prior with a mean, and one precise datum."""
    prior = GaussianPrior.diagonal(torch.tensor([0.5, 0.0], dtype=F64), torch.full((2,), 4.0, dtype=F64))
    return InverseProblem(torch.full((1,), datum, dtype=F64), operator, GaussianNoise(noise), prior)


def _quadrature(problem, functions):
    """Posterior means of functions of x on a fine grid."""
    axis = torch.linspace(-9, 9, 1801, dtype=F64)
    x = torch.cartesian_prod(axis, axis)
    term = problem.terms[0]
    logp = -0.5 * ((term.operator(x) - term.data) / term.noise.sigma).square().sum(1)
    logp = logp + problem.prior.log_prob(x)
    weight = (logp - logp.max()).exp()
    return [float((weight * f(x)).sum() / weight.sum()) for f in functions]


DONUT = _flat_problem(Radius(), 2.6, 0.18)  # CUQIpy's: radius 2.6, variance 0.033
BANANA = _flat_problem(Bend(), 1.0, 0.3)
MOMENTS = [lambda x: x[..., 0], lambda x: x[..., 1], lambda x: x[..., 0] ** 2, lambda x: x[..., 1] ** 2]


@pytest.mark.parametrize(
    ("problem", "solver"),
    [
        (DONUT, HMC(draws=200, warmup=100)),
        (BANANA, HMC(draws=200, warmup=100)),
        (BANANA, NUTS(draws=60, warmup=50)),
    ],
    ids=["donut-hmc", "banana-hmc", "banana-nuts"],
)
def test_curved_targets_are_right(problem, solver):
    x = solver.solve(problem, 16, dtype=F64).samples[0]
    for f, expected in zip(MOMENTS, _quadrature(problem, MOMENTS), strict=True):
        value = f(x)[..., None]
        error = float(value.std() / math.sqrt(float(ess(value, kind="mean")[0])))
        assert abs(float(value.mean()) - expected) < 4.5 * error, (expected, float(value.mean()), error)


def test_the_warm_up_of_a_donut_never_starves():
    """CUQIpy's NUTS adapts ten times in all: of 8 chains of 2000 draws 5 end with an ESS below 15 (0.75 %)."""
    posterior = NUTS(draws=80, warmup=40).solve(DONUT, 8, dtype=F64)
    each = [float(ess(c[None]).min()) for c in posterior.samples[0]]
    assert min(each) > 0.05 * 80, each
    assert float(ess(posterior.samples[0]).min()) > 0.1 * 640
    assert float(posterior.stats["steps"].mean()) < 40


class FunnelPrior:
    """v ~ N(0, 3²), x given v ~ N(0, e^v): Neal's funnel in two dimensions, as a density alone."""

    shape, grid, transform = (2,), None, Affine()

    def sample(self, n, *, seed=0):
        g = torch.Generator().manual_seed(seed)
        z = torch.randn(n, 2, generator=g, dtype=F64)
        return torch.stack([3 * z[:, 0], (1.5 * z[:, 0]).exp() * z[:, 1]], 1)

    def log_prob(self, x):
        v = x[:, 0]
        return -0.5 * (v / 3).square() - 0.5 * x[:, 1].square() * (-v).exp() - 0.5 * v


@pytest.mark.parametrize("solver", [HMC(draws=150, warmup=80), NUTS(draws=50, warmup=40)], ids=["hmc", "nuts"])
def test_a_funnel_is_right_or_flagged(solver):
    """No silent bias: the mean and spread of v within Monte-Carlo error, or R-hat, E-BFMI or divergences say so."""
    operator = MatrixOperator(torch.zeros(1, 2, dtype=F64))
    problem = InverseProblem(torch.zeros(1, dtype=F64), operator, GaussianNoise(1.0), FunnelPrior())
    posterior = solver.solve(problem, 16, dtype=F64)
    v = posterior.samples[0, :, :, :1] / 3
    wrong = False
    for value, expected in ((v, 0.0), (v.square(), 1.0)):
        error = float(value.std() / math.sqrt(float(ess(value, kind="mean")[0])))
        wrong |= abs(float(value.mean()) - expected) > 4.5 * error
    flagged = (
        float(rhat(posterior.samples[0]).max()) > 1.01
        or float(np.min(ebfmi(posterior.stats["energy"][0]))) < 0.3
        or float(posterior.stats["divergent"].sum()) > 0
    )
    assert flagged or not wrong


def test_a_period_that_doubles_past_itself_is_seen():
    """With a step of a sixteenth of the period, the tree of 16 leaps would end where it began; it stops before."""
    prior = GaussianPrior.diagonal(torch.tensor([1.0, -2.0], dtype=F64), torch.ones(2, dtype=F64))
    operator = MatrixOperator(torch.zeros(1, 2, dtype=F64))
    problem = InverseProblem(torch.zeros(1, dtype=F64), operator, GaussianNoise(1.0), prior)
    solver = NUTS(draws=40, warmup=0, step_size=2 * math.pi / 16, mass="identity")
    steps = solver.solve(problem, 16, dtype=F64).stats["steps"]
    assert float(steps.max()) <= 15
    assert float(steps.mean()) > 3
