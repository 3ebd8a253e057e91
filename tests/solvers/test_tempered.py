"""Parallel tempering and annealed SMC on posteriors whose moments, mode weights and evidence are known."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from invgen.contracts import Operator
from invgen.diagnostics import ess
from invgen.driver import Streams
from invgen.noise import GaussianNoise
from invgen.operators import MatrixOperator
from invgen.priors import GaussianPrior, KernelDensityPrior
from invgen.problem import InverseProblem
from invgen.solvers import AnnealedSMC, ParallelTempering
from invgen.solvers._tempered import Frame, log_constant
from invgen.solvers.annealed_smc import _next
from invgen.solvers.tempering import _equalised
from invgen.transforms import Affine

F64 = torch.float64


def gaussian(n_obs=1, mean=0.0):
    """Four correlated unknowns with a mean, x = 2 + 3u, three data; a shift of the prior's mean makes another model."""
    g = torch.Generator().manual_seed(4)
    root = torch.randn(4, 4, generator=g, dtype=F64) / 2
    where = torch.randn(4, generator=g, dtype=F64)
    A = torch.randn(3, 4, generator=g, dtype=F64) / 3
    prior = GaussianPrior(where + mean, root @ root.T + 0.1 * torch.eye(4, dtype=F64), transform=Affine(2.0, 3.0))
    data = (2 + 3 * where) @ A.T + 1.5 * torch.randn(n_obs, 3, generator=g, dtype=F64)
    return InverseProblem(data, MatrixOperator(A), GaussianNoise(0.5), prior)


class Square(Operator):
    """(x0², x1 + 0.3 x0): both signs of x0 explain the first datum."""

    def __init__(self):
        super().__init__((2,), (2,))

    def forward(self, x, **theta):
        return torch.stack([x[:, 0] ** 2, x[:, 1] + 0.3 * x[:, 0]], 1)


class BlackSquare(Square):
    """The same without a gradient."""

    derivative_order = 0

    def forward(self, x, **theta):
        return super().forward(x.detach())


def modes(black_box=False):
    """Two modes fourteen of their widths apart, on a prior with mean and correlation."""
    prior = GaussianPrior(torch.tensor([0.25, 0.5], dtype=F64), torch.tensor([[1.0, 0.4], [0.4, 1.0]], dtype=F64))
    operator = BlackSquare() if black_box else Square()
    return InverseProblem(torch.tensor([2.0, 0.6], dtype=F64), operator, GaussianNoise(0.1), prior)


def quadrature(problem):
    """Weight of x0 > 0, and log p(d)."""
    line = torch.linspace(-6, 6, 1201, dtype=F64)
    x = torch.cartesian_prod(line, line)
    logs = problem.log_likelihood(x) + problem.prior.log_prob(x)
    total = logs.logsumexp(0)
    return float((logs - total).exp()[x[:, 0] > 0].sum()), float(total) + 2 * math.log(float(line[1] - line[0]))


def exact(problem):
    """Mean, sd and evidence of the linear-Gaussian problem by dense algebra, nothing of the library's solvers."""
    u = problem.prior
    C, A = u.covariance_u.dense(), 3 * problem.terms[0].operator.to_dense()
    data = problem.terms[0].data - (2 + 0 * u.mean_u) @ problem.terms[0].operator.to_dense().T
    S = A @ C @ A.T + 0.25 * torch.eye(3, dtype=F64)
    gain = C @ A.T @ torch.linalg.inv(S)
    residual = data - u.mean_u @ A.T
    sd = 3 * (C - gain @ A @ C).diagonal().sqrt()
    law = torch.distributions.MultivariateNormal(torch.zeros(3, dtype=F64), S)
    return 2 + 3 * (u.mean_u + residual @ gain.T), sd, law.log_prob(residual)


# --- parallel tempering -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("explorer", ["hmc", "pcn"])
def test_tempering_is_exact_on_a_gaussian(explorer):
    problem = gaussian()
    mean, sd, evidence = exact(problem)
    solver = ParallelTempering(
        draws=300, warmup=200, thin=1 if explorer == "hmc" else 4, temperatures=6, explorer=explorer
    )
    posterior = solver.solve(problem, 16, seed=1, dtype=F64)
    draws = posterior.samples[0]
    size = torch.from_numpy(ess(draws, kind="mean"))
    assert bool((size > 150).all())
    assert bool(((posterior.mean()[0] - mean[0]).abs() < 4.2 * sd / size.sqrt()).all())
    of_squares = torch.from_numpy(ess((draws - mean[0]).square(), kind="mean"))
    ratio = (draws - mean[0]).square().mean((0, 1)) / sd.square()
    assert bool(((ratio - 1).abs() < 4.2 * (2 / of_squares).sqrt()).all())
    error = posterior.stats["log_evidence_error"][0, 0, 0]
    assert float(error) < 0.15
    assert abs(float(posterior.log_evidence[0] - evidence[0])) < 5.5 * float(
        error
    )  # 16 chains: Student's t, 15 degrees


@pytest.mark.parametrize("explorer", ["hmc", "pcn"])
def test_tempering_weighs_two_modes_rightly(explorer):
    problem = modes(black_box=explorer == "pcn")
    weight, evidence = quadrature(modes())
    posterior = ParallelTempering(draws=400, warmup=200, temperatures=8, explorer="auto").solve(
        problem, 32, seed=2, dtype=F64
    )
    each = (posterior.samples[0, :, :, 0] > 0).double().mean(1)
    assert abs(float(each.mean()) - weight) < 4.5 * float(each.std()) / math.sqrt(32)
    assert float(each.std()) < 0.25  # a chain that stays in its mode: 0.43
    error = float(posterior.stats["log_evidence_error"][0, 0, 0])
    assert abs(float(posterior.log_evidence[0]) - evidence) < 4.5 * error < 0.4
    swaps, ladder = posterior.stats["swap"][0, 0, 0], posterior.stats["temperature"][0, 0, 0]
    assert float(swaps.max() - swaps.min()) < 0.3  # nearly equal rejection; 0.6 on the first ladder
    assert ladder[0] == 0
    assert ladder[-1] == 1
    assert bool((ladder.diff() > 0).all())
    assert float(posterior.stats["round_trips"][0, :, 0].mean()) > 8


def test_the_ladder_is_moved_to_equal_rejection():
    """Rejection λ(t) dt with λ = 1/(2 √t): levels at equal Λ = √t are (k/K)², whatever ladder it was measured on."""
    start = torch.linspace(0, 1, 40, dtype=F64).pow(3)[None]
    found = _equalised(start, start.sqrt().diff(dim=1))
    torch.testing.assert_close(found, torch.linspace(0, 1, 40, dtype=F64).pow(2)[None], rtol=0.03, atol=1e-3)
    assert found[0, 0] == 0
    assert found[0, -1] == 1


def test_a_run_without_round_trips_says_so():
    problem = modes()
    precise = InverseProblem(problem.terms[0].data, problem.terms[0].operator, GaussianNoise(1e-4), problem.prior)
    with pytest.warns(UserWarning, match="no replica went from the prior"):
        ParallelTempering(draws=200, warmup=16, temperatures=3, explorer="pcn").solve(precise, 2, dtype=F64)


def test_nothing_is_adapted_after_the_warmup():
    solver = ParallelTempering(draws=20, warmup=16, temperatures=4, explorer="hmc")
    problem = gaussian().select([0, 0])
    rng, found = Streams(0, [(0, 0), (0, 1)]), []
    state = solver.init(problem, rng)
    for step in range(36):
        state = solver.step(problem, state, rng)
        found.append((state["ladder"].clone(), state["log_step"].clone()))
        assert bool((state["ladder"] == state["ladder"][:1]).all()), step  # pooled
    assert not torch.equal(found[0][0], found[15][0])
    assert all(torch.equal(a[0], found[15][0]) and torch.equal(a[1], found[15][1]) for a in found[15:])


# --- annealed SMC -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("explorer", ["hmc", "pcn"])
def test_annealed_smc_on_a_gaussian_and_its_evidence(explorer):
    problem = gaussian(n_obs=2)
    mean, sd, evidence = exact(problem)
    n = 2048
    solver = AnnealedSMC(particles=n, explorer=explorer, correlation=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior = solver.solve(problem, n, seed=1, dtype=F64)
    # resampled particles are not independent: three times their Monte-Carlo error and a bias of order 1/N
    assert bool(((posterior.mean() - mean).abs() / sd < 4.2 * 3 / math.sqrt(n)).all())
    assert bool(((posterior.std() / sd - 1).abs() < 4.2 * 3 / math.sqrt(2 * n)).all())
    error = posterior.stats["log_evidence_error"][:, 0, 0]
    assert bool((error < 0.1).all())
    assert bool(((posterior.log_evidence - evidence).abs() < 4.5 * error + 0.02).all())
    assert bool((posterior.stats["temperature"] == 1).all())


@pytest.mark.parametrize("black_box", [False, True])
def test_annealed_smc_weighs_two_modes_rightly(black_box):
    weight, evidence = quadrature(modes())
    n = 1024
    posterior = AnnealedSMC(particles=n, moves=4).solve(modes(black_box), n, seed=3, dtype=F64)
    found = float((posterior.samples[0, 0, :, 0] > 0).double().mean())
    relatives = float(posterior.stats["ancestors"].flatten()[0])  # as many independent choices of a mode at least
    assert relatives > 80
    assert abs(found - weight) < 4.2 * math.sqrt(weight * (1 - weight) / relatives)
    error = float(posterior.stats["log_evidence_error"].flatten()[0])
    assert abs(float(posterior.log_evidence[0]) - evidence) < 4.5 * error < 0.5


def test_evidence_compares_priors():
    """The log Bayes factor of two priors, against dense algebra."""
    problems = [gaussian(), gaussian(mean=0.7)]
    wanted = exact(problems[0])[2] - exact(problems[1])[2]
    found = [AnnealedSMC(particles=2048, explorer="pcn").solve(p, 4, seed=4, dtype=F64) for p in problems]
    error = math.hypot(*(float(f.stats["log_evidence_error"][0, 0, 0]) for f in found))
    assert abs(float(wanted)) > 10 * error  # they do differ
    assert abs(float(found[0].log_evidence[0] - found[1].log_evidence[0] - wanted[0])) < 4.2 * error + 0.04


def test_smc_that_does_not_arrive_says_so():
    with pytest.warns(UserWarning, match="reached only the temperature"):
        posterior = AnnealedSMC(particles=128, moves=2, steps=3).solve(modes(), 4, dtype=F64)
    assert bool(torch.isnan(posterior.log_evidence).all())
    assert bool((posterior.stats["temperature"] < 1).all())
    assert bool(torch.isfinite(posterior.samples).all())


def test_particles_without_a_likelihood_weigh_nothing():
    """x0 > 0 or no data at all: half of the prior; the evidence counts the lost half."""

    class Positive(Operator):
        derivative_order = 0

        def __init__(self):
            super().__init__((2,), (1,))

        def forward(self, x, **theta):
            return torch.where(x[:, :1] > 0, x[:, 1:], torch.nan)

    prior = GaussianPrior(torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64))
    problem = InverseProblem(torch.zeros(1, dtype=F64), Positive(), GaussianNoise(1.0), prior)
    posterior = AnnealedSMC(particles=2048, moves=3).solve(problem, 1024, dtype=F64)
    assert bool((posterior.samples[..., 0] > 0).all())
    wanted = math.log(0.5) - 0.5 * math.log(2 * math.pi * 2)
    assert abs(float(posterior.log_evidence[0]) - wanted) < 4.5 * 1.3 / math.sqrt(2048)


def test_the_next_temperature_has_the_effective_size_asked_for():
    phi = torch.tensor([[0.0, 1.0, 5.0, 20.0, math.inf]], dtype=F64)
    weights = torch.tensor([[0.1, 0.3, 0.2, 0.3, 0.1]], dtype=F64)
    step = _next(weights, phi, torch.ones(1, dtype=F64), 0.9)
    w = weights[:, :4] / weights[:, :4].sum() * (-step * phi[:, :4]).exp()
    base = weights[:, :4] / weights[:, :4].sum()
    gain = (-step * phi[:, :4]).exp()
    assert abs(float(w.sum() ** 2 / (base * gain.square()).sum()) - 0.9) < 1e-9
    assert float(_next(weights, 1e-3 * phi, torch.ones(1, dtype=F64), 0.9)) == 1.0


# --- both ---------------------------------------------------------------------------------------------------------------


def test_frames_undo_themselves():
    g = torch.Generator().manual_seed(0)
    q = torch.randn(12, 3, generator=g, dtype=F64)
    root = torch.linalg.cholesky(torch.eye(3, dtype=F64) + torch.ones(2, 3, 3, dtype=F64))
    for factor in (root, torch.rand(2, 3, generator=g, dtype=F64) + 0.5):
        frame = Frame(torch.randn(2, 3, generator=g, dtype=F64), factor)
        torch.testing.assert_close(frame.forward(frame.inverse(q)), q)
        y = q.clone().requires_grad_()
        (slope,) = torch.autograd.grad((frame.forward(y) * q).sum(), y)
        torch.testing.assert_close(frame.pull(q), slope)


def test_the_constant_of_complex_and_masked_data():
    real = gaussian()
    assert log_constant(real) == pytest.approx(-3 * math.log(0.5) - 1.5 * math.log(2 * math.pi))
    x = real.prior.sample(1, seed=0).double()
    residual = real.terms[0].data - real.terms[0].operator(x)
    assert float(real.log_likelihood(x)) == pytest.approx(log_constant(real) - 2 * float(residual.square().sum()))


@pytest.mark.parametrize("solver", [ParallelTempering, AnnealedSMC])
def test_bad_problems_and_settings(solver):
    problem = modes(black_box=True)
    with pytest.raises(TypeError, match=r"derivative_order 0.*ParallelTempering"):
        solver(explorer="hmc").solve(problem, 2)
    density = KernelDensityPrior(torch.randn(20, 2))
    if not hasattr(density, "decode"):
        with pytest.raises(TypeError, match="HasLatent"):
            solver().solve(InverseProblem(problem.terms[0].data, Square(), GaussianNoise(0.1), density), 2)
    with pytest.raises(ValueError, match="explorer"):
        solver(explorer="gibbs")
    with pytest.raises(ValueError, match="step_size"):
        solver(step_size=0.0)
    with pytest.raises(ValueError, match=r"latent coordinates|moves"):
        ParallelTempering(space="u") if solver is ParallelTempering else AnnealedSMC(moves=0)
    with pytest.raises(ValueError, match="at least"):
        solver(**({"temperatures": 1} if solver is ParallelTempering else {"particles": 1}))
