"""Runs that cannot go right, for every sampler with a denoiser: each says so, and why."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import warnings

import pytest
import torch

from invgen.contracts import LinearOperator
from invgen.driver import DivergenceError
from invgen.noise import GaussianNoise
from invgen.operators import MatrixOperator
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem
from invgen.solvers import (
    DAPS,
    DDNM,
    DDRM,
    MMPS,
    TDS,
    DiffPIR,
    ExactGaussian,
    GuidedDiffusion,
    MCGDiff,
    OverrelaxedSplit,
    PnPDM,
    REDDiff,
)
from invgen.solvers._particles import bookkeeping, last_draw, resample
from invgen.solvers._transitions import spread, transition_mean, turning_level
from invgen.streams import Streams
from invgen.transforms import Affine

F64 = torch.float64
SOLVERS = [
    GuidedDiffusion(MMPS(), steps=12),
    DDRM(steps=12),
    DDNM(steps=12),
    TDS("mmps", particles=64, steps=12),
    TDS("pigdm", particles=64, steps=12, kernel="ancestral"),
    MCGDiff(particles=64, steps=12),
    DAPS(levels=12),
    DAPS(levels=12, conditional="tweedie"),
    PnPDM(iterations=12),
    OverrelaxedSplit(iterations=12),
    DiffPIR(steps=12),
    REDDiff(steps=12),
]


def _label(solver):
    return f"{type(solver).__name__}-{getattr(solver, 'twist', getattr(solver, 'conditional', ''))}"


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Failing:
    """The exact denoiser of N(0, 1), but NaN between two noise levels; remembers where it was asked."""

    shape, grid, transform = (3,), None, Affine()
    sigma_data, start_sigma = 1.0, 7.0

    def __init__(self, low, high):
        self.low, self.high, self.asked = low, high, []

    def denoise(self, u, sigma):
        self.asked.append(float(sigma))
        return u / (1 + sigma**2) if not self.low < sigma < self.high else torch.full_like(u, torch.nan) * u

    def sample(self, n, *, seed=0):
        return torch.zeros(n, 3)


@pytest.mark.parametrize("solver", SOLVERS, ids=_label)
def test_a_denoiser_that_fails_at_any_one_level_is_named_with_it(solver):
    def problem(prior):
        return InverseProblem(normal(5, 2), MatrixOperator(normal(3, 2, 3)), GaussianNoise(0.4), prior)

    healthy = Failing(0, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few particles
        solver.solve(problem(healthy), 4, dtype=F64)
    levels = sorted({s for s in healthy.asked if s < 7})
    apart = [s for s, up in itertools.pairwise(levels) if up > 1.01 * s]
    for bad in (apart[len(apart) // 3], apart[2 * len(apart) // 3]):
        with pytest.raises(DivergenceError, match=r"Failing returns NaN.*a level of this run") as caught:
            solver.solve(problem(Failing(0.996 * bad, 1.004 * bad)), 4, dtype=F64)
        assert float(re.search(r"sigma = ([\d.e-]+),", str(caught.value))[1]) == pytest.approx(bad, rel=5e-3)


@pytest.mark.parametrize("solver", [s for s in SOLVERS if hasattr(s, "sigma_max")], ids=_label)
def test_a_start_below_the_largest_mode_is_warned_of(solver):
    prior = GaussianPrior.dense(torch.zeros(4, dtype=F64), 2.0 * torch.ones(4, 4, dtype=F64) + torch.eye(4, dtype=F64))
    problem = InverseProblem(normal(5, 2), MatrixOperator(normal(3, 2, 4)), GaussianNoise(0.4), prior)
    with pytest.warns(UserWarning, match=r"starts at sigma_max = 3, below start_level = 2\d"):
        dataclasses.replace(solver, sigma_max=3.0).solve(problem, 1)


def test_a_matrix_of_noise_that_is_no_covariance_is_refused():
    """Read as one row of variances a sample it would give wrong samples without a word."""
    C = torch.exp(-(torch.arange(4.0)[:, None] - torch.arange(4.0)).abs())
    prior = GaussianPrior(torch.zeros(5), 1.0)
    for noise in (GaussianNoise(covariance=C), GaussianNoise(0.3, model_error=C), GaussianNoise(covariance=C.numpy())):
        problem = InverseProblem(normal(5, 4), MatrixOperator(normal(3, 4, 5)), noise, prior)
        for solver in (PnPDM(iterations=3), GuidedDiffusion(steps=4), ExactGaussian()):
            with pytest.raises(ValueError, match=r"array of the shape \(4, 4\).*Dense\(matrix, \(4,\)\)"):
                solver.solve(problem, 4)
    variances = GaussianNoise(covariance=torch.full((4,), 0.09)).covariance((4,))
    torch.testing.assert_close(variances.diagonal(), torch.full((4,), 0.09))


class Stiff(LinearOperator):
    """A matrix without a direct solve, of a condition that a few iterations in float32 do not meet."""

    def __init__(self, n):
        super().__init__((n,), (n,))
        self.register_buffer("scales", torch.logspace(0, -5, n, dtype=F64))

    def forward(self, x, **theta):
        return x * self.scales.to(x)

    def adjoint(self, d):
        return d * self.scales.to(d)

    def solve(self, rhs, R, C, **options):
        return super().solve(rhs, R, C, **{**options, "max_iter": 3})


def test_particle_samplers_count_last_solves_that_miss_their_tolerance():
    n = 1100  # more data than are decomposed
    problem = InverseProblem(
        torch.zeros(n, dtype=F64), Stiff(n), GaussianNoise(1e-4), GaussianPrior(torch.zeros(n, dtype=F64), 1.0)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = TDS("pigdm", particles=4, steps=3).solve(problem, 2, dtype=F64)
    assert posterior.stats["unconverged"].flatten().tolist() == [3.0, 3.0]  # two particles and a draw each


# --- particles ---------------------------------------------------------------------------------------------------------


def test_ancestors_are_those_of_the_weights():
    """Five of eight particles descend from particle 2, three from 6: 1/(w² + (1 − w)²) with their weights."""
    rng = Streams(0, [(0, 0), (0, 1), (1, 0), (1, 1)])
    start = torch.full((4, 4), -math.inf, dtype=F64)
    start[0, 2], start[1, 2] = math.log(5.0), math.log(3.0)  # set 0: particles 2 and 6
    start[2:] = 0.0  # set 1: nobody is picked
    state = resample(bookkeeping(rng, start), rng, 0.5, ())
    found = state["ancestor"][:2].flatten()
    assert torch.equal(found.unique(), torch.tensor([2, 6]))
    assert int((found == 2).sum()) == 5
    assert torch.equal(state["ancestor"][2:].flatten(), torch.arange(8))
    state["log_weights"] = torch.where(state["ancestor"] == 2, math.log(2.0), 0.0).to(F64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, out = last_draw(None, state, rng)
    share = 10 / 13
    torch.testing.assert_close(out["stat_ancestors"][0], torch.tensor(1 / (share**2 + (1 - share) ** 2), dtype=F64))
    assert float(out["stat_ancestors"][3]) > 7


def test_few_ancestors_are_warned_of_though_weights_are_even():
    """Eight data of a correlated prior: potentials that learn of it late leave a few families."""
    root = normal(1, 16, 16) / 4
    prior = GaussianPrior(torch.zeros(16, dtype=F64), root @ root.T + 0.1 * torch.eye(16, dtype=F64))
    problem = InverseProblem(normal(5, 8), MatrixOperator(normal(3, 8, 16)), GaussianNoise(0.3), prior)
    with pytest.warns(UserWarning, match=r"MCGDiff: the 400 particles of 1 of 1 observations descend from"):
        posterior = MCGDiff(particles=400, steps=60).solve(problem, 10, seed=2, dtype=F64)
    assert float(posterior.stats["ess_min"].min()) > 50  # which alone would say that all is well
    assert float(posterior.stats["ancestors"].max()) < 4


def test_the_heun_chain_has_the_joint_law_of_the_diffusion():
    """Var and Cov over one step of a white Gaussian prior, up to the error of the Heun step: O(step³) of it."""
    v = 2.25
    prior = GaussianPrior(torch.zeros(1, dtype=F64), v)
    problem = InverseProblem(
        torch.zeros(1, dtype=F64), MatrixOperator(torch.ones(1, 1, dtype=F64)), GaussianNoise(1.0), prior
    )
    for now in (30.0, 1.5, 0.1):
        after = 0.9 * now
        one = torch.ones(1, 1, dtype=F64)
        (gain,) = transition_mean(problem, "heun", one, prior.denoise(one, now), now, after, v).flatten().tolist()
        before, wanted = v + now**2, v + after**2
        assert gain * before == pytest.approx(wanted, rel=2e-3)
        assert gain**2 * before + spread(now, after, v) ** 2 == pytest.approx(wanted, rel=4e-3)
    assert turning_level(1.0, 0.9) == pytest.approx(0.81)
    assert turning_level(1.0, 0.9, 1e9) == pytest.approx(math.sqrt(2 * 0.81 - 1), rel=1e-4)
    assert turning_level(1.0, 0.2, 1e9) > 0


@pytest.mark.parametrize("datum", [2.0, 6.0])
def test_a_datum_at_its_level_says_what_it_should(datum):
    """One unknown, one datum: the law after the datum's level is p(u0 | u_τ), whose spread depends on the chain."""
    prior = GaussianPrior(torch.ones(1, dtype=F64), 2.25)
    one = MatrixOperator(torch.ones(1, 1, dtype=F64))
    problem = InverseProblem(torch.tensor([datum], dtype=F64), one, GaussianNoise(0.5), prior)
    mean, sd = 1 + 0.9 * (datum - 1), math.sqrt(0.225)
    posterior = MCGDiff(particles=8000, steps=60).solve(problem, 4000, seed=1, dtype=F64)
    z = (posterior.samples.flatten() - mean) / sd
    # draws are independent given the point u_τ = d that all pass; 0.03 for the steps
    assert abs(float(z.mean())) < 0.03 + 4 / math.sqrt(4000)
    assert abs(float(z.std()) - 1) < 0.03 + 4 / math.sqrt(8000)
