"""Dimension-robust walks against closed forms: PCN, GPCN, InfMALA, EllipticalSlice."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch.distributions import Distribution

from invgen.contracts import Operator
from invgen.driver import DivergenceError
from invgen.noise import GaussianNoise
from invgen.operators import MatrixOperator
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem
from invgen.solvers import GPCN, PCN, EllipticalSlice, InfMALA
from invgen.transforms import Exp

F64 = torch.float64
CHAINS = 48
# 1e-3 over the ~150 comparisons of this file, two-sided, CHAINS − 1 degrees of freedom
LIMIT = float(stats.t.isf(1e-3 / 300, CHAINS - 1))


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


MEAN = tensor(3.0, 3.0, 3.0, 3.0)  # pCN that forgets the prior mean is off by several posterior sd here
COVARIANCE = tensor(1.0, 0.6, 0.3, 0.1)[(torch.arange(4)[:, None] - torch.arange(4)).abs()] * 0.8
A = tensor(1.0, -0.5, 0.3, 0.0, 0.2, 0.8, -0.4, 0.6).reshape(2, 4)
DATA, NOISE = tensor(3.5, 2.0), 0.4


def gaussian() -> tuple[InverseProblem, torch.Tensor, torch.Tensor]:
    """Four correlated unknowns with a mean of 3, two data; posterior mean and covariance by dense algebra."""
    problem = InverseProblem(DATA, MatrixOperator(A), GaussianNoise(NOISE), GaussianPrior.dense(MEAN, COVARIANCE))
    gain = torch.linalg.solve(A @ COVARIANCE @ A.T + NOISE**2 * torch.eye(2, dtype=F64), A @ COVARIANCE).T
    return problem, MEAN + gain @ (DATA - A @ MEAN), COVARIANCE - gain @ A @ COVARIANCE


def t_of(values: torch.Tensor, exact: torch.Tensor | float) -> float:
    """Largest Student t of chain means: values `(chains, draws, …)`."""
    means = values.flatten(2).mean(1) if values.ndim > 2 else values.mean(1)[:, None]
    t = (means.mean(0) - exact) / (means.std(0) / math.sqrt(len(means)))
    return float(t.abs().max())


WALKS = {
    "pcn": PCN(draws=80, warmup=200, thin=10),
    "gpcn both": GPCN(draws=80, warmup=100, thin=3),
    "gpcn prior": GPCN(draws=80, warmup=100, thin=5, reference="prior"),
    "gpcn laplace": GPCN(draws=80, warmup=100, thin=3, reference="laplace"),
    "gpcn laplace of rank 1": GPCN(draws=80, warmup=100, thin=5, reference="laplace", rank=1),
    "inf-mala": InfMALA(draws=80, warmup=100, thin=3),
    "inf-mala plain": InfMALA(draws=80, warmup=100, thin=5, precondition=False),
    "slice": EllipticalSlice(draws=200, warmup=60),
}


@pytest.mark.parametrize("name", WALKS)
def test_gaussian_with_a_mean(name):
    problem, mean, covariance = gaussian()
    posterior = WALKS[name].solve(problem, CHAINS, seed=3, dtype=F64)
    z = (posterior.samples[0] - mean) / covariance.diagonal().sqrt()
    assert t_of(z, 0.0) < LIMIT
    assert t_of(z.square(), 1.0) < LIMIT
    whitened = torch.linalg.solve_triangular(
        torch.linalg.cholesky(covariance), (posterior.samples[0] - mean).mT, upper=False
    ).mT
    assert t_of(whitened[..., :-1] * whitened[..., 1:], 0.0) < LIMIT
    assert float(posterior.stats["invalid"].max()) == 0


FIXED = {
    "pcn": PCN(beta=0.4, target=None),
    "gpcn prior": GPCN(beta=0.7, target=None, reference="prior"),
    "gpcn laplace": GPCN(beta=0.9, target=None, reference="laplace", rank=1),
    "inf-mala": InfMALA(step_size=1.5, target=None),
    "inf-mala plain": InfMALA(step_size=0.3, target=None, precondition=False),
    "slice": EllipticalSlice(),
}


@pytest.mark.parametrize("name", FIXED)
def test_exact_draws_stay_exact_in_a_banana(name):
    """d = x₂ + ½ x₁² under N(0, I): exact starts by rejection, 10 steps without adaptation later still exact."""
    n = 4000
    operator = Banana()
    prior = GaussianPrior(tensor(0.5, -0.5), tensor(1.0, 1.0))
    problem = InverseProblem(tensor(1.0), operator, GaussianNoise(0.4), prior)
    z = torch.randn(40 * n, 2, generator=torch.Generator().manual_seed(1), dtype=F64)
    level = torch.exp(-0.5 * ((operator(prior.decode(z))[:, 0] - 1) / 0.4) ** 2)
    exact = z[torch.rand(len(z), generator=torch.Generator().manual_seed(2), dtype=F64) < level]
    assert len(exact) > 2 * n
    chain = dataclasses.replace(FIXED[name], draws=1, warmup=0, thin=10, starts=exact[:n])
    posterior = chain.solve(problem, n, seed=5, dtype=F64)
    moved = posterior.latent[0, :, 0]
    assert float((moved - exact[:n]).abs().sum(1).gt(0).double().mean()) > 0.5  # it did walk
    for j in range(2):
        assert stats.ks_2samp(moved[:, j].numpy(), exact[n:, j].numpy()).pvalue > 1e-3 / 50
    curve = [v[:, 1] + 0.5 * v[:, 0].square() for v in (moved, exact[n:])]
    assert stats.ks_2samp(curve[0].numpy(), curve[1].numpy()).pvalue > 1e-3 / 50


class Banana(Operator):
    def __init__(self) -> None:
        super().__init__((2,), (1,))

    def forward(self, x, **theta):
        return x[:, 1:] + 0.5 * x[:, :1].square()


class _Wall(Distribution):
    arg_constraints: dict[str, Any] = {}

    def __init__(self, prediction, outside) -> None:
        self.prediction, self.outside = prediction, outside
        super().__init__(prediction.shape[:1], prediction.shape[1:], validate_args=False)

    def log_prob(self, value):
        zero = 0 * self.prediction.sum(1)
        return torch.where((self.prediction > value).all(1), zero, torch.full_like(zero, self.outside))


class WallNoise:
    """All that is known is d < prediction; `outside` is the logarithm of the likelihood elsewhere."""

    def __init__(self, outside: float) -> None:
        self.outside = outside

    def __call__(self, prediction, **theta):
        return _Wall(prediction, self.outside)


@pytest.mark.parametrize("outside", [-math.inf, math.nan], ids=["zero", "nan"])
@pytest.mark.parametrize(
    "solver", [PCN(draws=80, warmup=50, thin=10, beta=0.3, target=None), WALKS["slice"]], ids=["pcn", "slice"]
)
def test_truncated_gaussian(solver, outside):
    """a·x above its prior mean + sd/4: mean m + C a/s · φ(¼)/(1 − Φ(¼)), and nothing beyond the wall."""
    a = tensor(1.0, -0.5, 0.3, 0.4)
    spread = (a @ COVARIANCE @ a).sqrt()
    wall = a @ MEAN + 0.25 * spread
    problem = InverseProblem(
        wall[None], MatrixOperator(a[None]), WallNoise(outside), GaussianPrior.dense(MEAN, COVARIANCE)
    )
    x = (posterior := solver.solve(problem, CHAINS, seed=1, dtype=F64)).samples[0]
    hazard = stats.norm.pdf(0.25) / stats.norm.sf(0.25)
    along = COVARIANCE @ a / spread
    assert bool((x @ a > wall).all())
    assert t_of(x, MEAN + along * hazard) < LIMIT
    second = 1 + 0.25 * hazard  # of the truncated standard normal
    assert t_of((((x - MEAN) @ a) / spread).square(), second) < LIMIT
    assert (float(posterior.stats["invalid"].max()) > 0) == math.isnan(outside)


@pytest.mark.parametrize("name", ["pcn", "gpcn both", "inf-mala", "slice"])
def test_unknown_noise_level_against_quadrature(name):
    """x ~ N(2, 1.5²), log s ~ N(−½, 0.6²), five data x + s n."""
    data = tensor(1.1, 1.9, 1.4, 2.6, 0.9)
    problem = InverseProblem(
        data,
        MatrixOperator(torch.ones(5, 1, dtype=F64)),
        GaussianNoise("s"),
        GaussianPrior(tensor(2.0), tensor(2.25)),
        nuisance={"s": GaussianPrior(tensor(-0.5), tensor(0.36), transform=Exp())},
    )
    x, v = torch.linspace(-3, 6, 1801, dtype=F64)[:, None], torch.linspace(-3, 3, 1201, dtype=F64)
    misfit = 0.5 * (data[:, None, None] - x).square().sum(0) / (2 * v).exp() + 5 * v
    p = torch.softmax((-misfit - (x - 2).square() / 4.5 - (v + 0.5).square() / 0.72).flatten(), 0).reshape(1801, 1201)
    posterior = WALKS[name].solve(problem, CHAINS, seed=2, dtype=F64)
    drawn, log_s = posterior.samples[0, ..., 0], posterior.theta["s"][0].log()
    centre, level = float((p.sum(1) * x[:, 0]).sum()), float((p.sum(0) * v).sum())
    assert t_of(drawn, centre) < LIMIT
    assert t_of(log_s, level) < LIMIT
    assert t_of((drawn - centre).square(), float((p.sum(1) * (x[:, 0] - centre).square()).sum())) < LIMIT
    assert t_of((log_s - level).square(), float((p.sum(0) * (v - level).square()).sum())) < LIMIT


@pytest.mark.parametrize(
    "solver",
    [PCN(beta=0.3, target=None), GPCN(beta=0.8, target=None), InfMALA(step_size=1.5, target=None)],
    ids=["pcn", "gpcn", "inf-mala"],
)
def test_acceptance_does_not_fall_with_the_dimension(solver):
    """Four informed coordinates among 4 or 400: the same law of the misfit, and so the same acceptance."""
    rates, errors = [], []
    for n in (4, 400):
        picks = torch.eye(n, dtype=F64)[:4]
        prior = GaussianPrior(torch.ones(n, dtype=F64), torch.ones(n, dtype=F64))
        problem = InverseProblem(tensor(1.0, 2.0, 0.5, 1.5), MatrixOperator(picks), GaussianNoise(0.5), prior)
        chain = dataclasses.replace(solver, draws=60, warmup=60, thin=1)
        accept = chain.solve(problem, 64, seed=1, dtype=F64).stats["accept"][0].mean(1)
        rates.append(float(accept.mean()))
        errors.append(float(accept.std()) / 8)
    assert 0.1 < rates[0] < 0.995
    assert abs(rates[0] - rates[1]) < 4.5 * math.hypot(*errors)


def test_a_laplace_reference_draws_independently_where_the_posterior_is_gaussian():
    """s = 1 about the exact posterior: every proposal is an accepted, independent draw."""
    problem, _, _ = gaussian()
    solver = GPCN(draws=400, warmup=0, thin=1, reference="laplace", beta=1.0, target=None)
    posterior = solver.solve(problem, 16, seed=0, dtype=F64)
    assert float(posterior.stats["accept"].min()) > 1 - 1e-4  # the mode is found to a relative gradient of 1e-4
    x = posterior.samples[0]
    x = x - x.mean((0, 1))
    lag = (x[:, 1:] * x[:, :-1]).mean((0, 1)) / x.square().mean((0, 1))
    assert float(lag.abs().max()) < 4.5 / math.sqrt(16 * 399)


def test_slices_that_find_nothing_stay_and_say_so():
    problem, mean, covariance = gaussian()
    solver = EllipticalSlice(draws=800, warmup=50, shrinks=1)  # one try: accepted or not
    posterior = solver.solve(problem, CHAINS, seed=1, dtype=F64)
    z = (posterior.samples[0] - mean) / covariance.diagonal().sqrt()
    still = (posterior.samples[0, :, 1:] == posterior.samples[0, :, :-1]).all(-1).double().mean()
    assert 0.1 < float(still) < 0.95
    assert float(posterior.stats["evaluations"].max()) == 1
    assert t_of(z, 0.0) < LIMIT
    assert t_of(z.square(), 1.0) < LIMIT


@pytest.mark.parametrize("solver", [PCN(draws=50), EllipticalSlice(draws=50, warmup=100)], ids=["pcn", "slice"])
def test_nan_almost_everywhere_stops_with_the_reason(solver):
    class Broken(Operator):
        """A number at the start and NaN wherever a chain goes next."""

        derivative_order = 0

        def __init__(self) -> None:
            super().__init__((2,), (1,))
            self.calls = 0

        def forward(self, x, **theta):
            self.calls += 1
            return x[:, :1] * (1.0 if self.calls < 3 else math.nan)

    problem = InverseProblem(
        tensor(0.0), Broken(), GaussianNoise(1.0), GaussianPrior(tensor(0.0, 0.0), tensor(1.0, 1.0))
    )
    with pytest.raises(DivergenceError, match="NaN at most proposals"):
        solver.solve(problem, 8, dtype=F64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PCN(beta=0.0), "beta in"),
        (lambda: PCN(space="u"), "latent coordinates"),
        (lambda: GPCN(reference="mean"), "takes reference from"),
        (lambda: GPCN(beta=1.5), "beta in"),
        (lambda: GPCN(rank=0), "rank of at least 1"),
        (lambda: InfMALA(step_size=5.0), "step_size in"),
        (lambda: InfMALA(space="u"), "latent coordinates"),
        (lambda: EllipticalSlice(shrinks=0), "shrinks as a whole number"),
        (lambda: EllipticalSlice(draws=0), "draws as a whole number"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_a_curvature_needs_is_said():
    problem = InverseProblem(
        tensor(0.0), MatrixOperator(A[:1]), WallNoise(-math.inf), GaussianPrior.dense(MEAN, COVARIANCE)
    )
    for solver in (GPCN(), InfMALA(precondition=True)):
        with pytest.raises(TypeError, match="needs Gaussian noise"):
            solver.solve(problem, 4)
    InfMALA(draws=2, warmup=2).solve(problem, 4, dtype=F64)  # does without
