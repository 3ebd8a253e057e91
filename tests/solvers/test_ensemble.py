"""Ensemble Kalman methods against the closed form, on black boxes, with failing model runs, and on curved physics."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from invgen.covariance import Dense
from invgen.noise import GaussianNoise, LaplaceNoise
from invgen.operators import BlackBox, MatrixOperator
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem
from invgen.solvers import EnsembleKalmanInversion, EnsembleKalmanSampler, ExactGaussian
from invgen.transforms import Affine, Exp

F64 = torch.float64
N, M = 6, 4


def _draw(g, *shape):
    return torch.randn(*shape, generator=g, dtype=F64)


def _problem(noise=0.3, repeat=1):
    """Six correlated unknowns with a mean, x = 2 + 3u; four data with correlated noise, `repeat` times the same."""
    g = torch.Generator().manual_seed(7)
    root, r = _draw(g, N, N) / math.sqrt(N), _draw(g, M, M) / math.sqrt(M)
    prior = GaussianPrior(2 * _draw(g, N), root @ root.T + 0.1 * torch.eye(N, dtype=F64), transform=Affine(2.0, 3.0))
    R = Dense(noise**2 * (r @ r.T + 0.3 * torch.eye(M, dtype=F64)))
    A = MatrixOperator(_draw(g, M, N) / 3)
    data = A(prior.sample(1, seed=3).double()) + noise * _draw(g, 1, M)
    return InverseProblem(data.expand(repeat, -1).contiguous(), A, GaussianNoise(covariance=R), prior)


def _black_box(problem, function):
    term = problem.terms[0]
    return InverseProblem(term.data, BlackBox(function, (N,), (M,)), term.noise, problem.prior)


def _whitened(problem, posterior):
    """Samples in the coordinates where the exact posterior is N(0, I), `(obs, draws, N)`."""
    mean, covariance = ExactGaussian().moments(problem)
    away = posterior.samples[:, 0] - mean[0]
    return torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), away.mT, upper=False).mT


def _solve(solver, problem, n, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return solver.solve(problem, n, **{"dtype": F64, "chunk": n * problem.n_obs, **options})


@pytest.mark.parametrize(
    "solver",
    [EnsembleKalmanInversion(ensemble=1500), EnsembleKalmanSampler(ensemble=1500, steps=40)],
    ids=["EKI", "ALDI"],
)
@pytest.mark.parametrize("noise", [0.3, 0.01])
def test_moments_of_a_linear_problem(solver, noise):
    """Mean 0 and covariance I when whitened; members of an ensemble are nearly independent. 2.5 % for 1500 members."""
    problem = _problem(noise)
    w = _whitened(problem, _solve(solver, problem, 1500))[0]
    n = len(w)
    # sampling error of covariances accumulates over a few updates, each like that of one ensemble
    assert float(w.mean(0).abs().max()) < 0.025 + 2 * 4.0 / math.sqrt(n)
    assert float((w.T @ w / n - torch.eye(N, dtype=F64)).abs().max()) < 0.025 + 2 * 4.5 * math.sqrt(2 / n)


def test_aldi_is_exact_for_small_ensembles_and_the_plain_sampler_is_not():
    """12 members of 6 unknowns, 300 ensembles: the correction is what keeps the spread."""
    problem = _problem(repeat=300)
    found = {}
    for correction in (True, False):
        solver = EnsembleKalmanSampler(ensemble=12, steps=60, step_size=0.5, correction=correction)
        each = _whitened(problem, _solve(solver, problem, 12)).square().mean((1, 2))
        found[correction] = (float(each.mean()), float(each.std()) / math.sqrt(len(each)))
    mean, error = found[True]
    assert abs(mean - 1) < 0.02 + 3.5 * error
    assert found[False][0] < 0.8


@pytest.mark.parametrize(
    "solver", [EnsembleKalmanInversion(ensemble=400), EnsembleKalmanSampler(ensemble=400, steps=30)]
)
def test_a_black_box_gives_what_the_operator_gives(solver):
    problem = _problem()
    matrix = problem.terms[0].operator.to_dense().numpy()
    box = _black_box(problem, lambda x: matrix @ x)
    torch.testing.assert_close(_solve(solver, box, 5).samples, _solve(solver, problem, 5).samples, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "solver", [EnsembleKalmanInversion(ensemble=1500), EnsembleKalmanSampler(ensemble=1500, steps=30)]
)
def test_failed_runs_are_left_out_and_counted(solver):
    """One run in ten fails at random: the posterior stays."""
    problem = _problem()
    matrix, g = problem.terms[0].operator.to_dense().numpy(), np.random.default_rng(1)

    def unreliable(x):
        if g.random() < 0.1:
            raise ArithmeticError("no convergence")
        return matrix @ x

    posterior = solver.solve(_black_box(problem, unreliable), 1500, dtype=F64)
    w = _whitened(problem, posterior)[0]
    assert float(w.mean(0).abs().max()) < 0.04 + 2 * 4.0 / math.sqrt(1350)
    assert float((w.T @ w / len(w) - torch.eye(N, dtype=F64)).abs().max()) < 0.04 + 2 * 4.5 * math.sqrt(2 / 1350)
    runs = 1500 * float(posterior.stats["updates"][0, 0, 0])
    assert abs(float(posterior.stats["failed_runs"][0, 0, 0]) / runs - 0.1) < 4 * 0.3 / math.sqrt(runs)


@pytest.mark.parametrize("solver", [EnsembleKalmanInversion(ensemble=60), EnsembleKalmanSampler(ensemble=60, steps=4)])
def test_more_than_half_failed_gives_an_observation_up_with_the_reason(solver):
    problem = _problem(repeat=2)
    data = problem.terms[0].data.clone()
    data[1] = 1e308
    with pytest.warns(UserWarning, match=r"gave up observation 1: 60 of 60 model runs"):
        posterior = solver.solve(problem.with_data(data), 4, dtype=F64)
    assert bool((posterior.stats["first_bad_step"][0] < 0).all())
    assert bool((posterior.stats["first_bad_step"][1] >= 0).all())

    def broken(x):
        raise ArithmeticError("mesh is broken")

    with pytest.warns(UserWarning, match="mesh is broken"), pytest.raises(RuntimeError, match="became NaN"):
        solver.solve(_black_box(problem, broken), 2, dtype=F64)


def test_discrepancy_stops_where_the_data_are_explained():
    problem = _problem(noise=0.02)
    posterior = _solve(EnsembleKalmanInversion(ensemble=200, stop="discrepancy", tau=1.5, steps=20), problem, 200)
    assert float(posterior.stats["time"][0, 0, 0]) == 1
    assert 1 <= float(posterior.stats["updates"][0, 0, 0]) < 20
    term = problem.terms[0]
    residual = term.data - term.operator(posterior.mean())
    R = term.noise.covariance((M,))
    assert float(R.whiten(residual).square().sum()) <= 1.5**2 * M


def test_curved_physics_and_a_nuisance_parameter():
    """d = s·exp(u/2) + noise, two data on one unknown and one on the scale s: against quadrature."""

    operator = BlackBox(
        lambda x, s: np.array([s * np.exp(x[0] / 2), s * np.exp(-x[0] / 4), s]), (1,), (3,), theta_names=("s",)
    )
    data = torch.tensor([[3.0, 1.1, 1.9]], dtype=F64)
    prior = GaussianPrior(torch.ones(1, dtype=F64), 1.0)
    scale = GaussianPrior(torch.zeros(1, dtype=F64), 0.25, transform=Exp())
    problem = InverseProblem(data, operator, GaussianNoise(0.3), prior, nuisance={"s": scale})
    u = torch.linspace(-4, 6, 801, dtype=F64)[:, None]
    s = torch.exp(torch.linspace(-2, 2.5, 801, dtype=F64))[None]
    fit = [s * torch.exp(u / 2), s * torch.exp(-u / 4), s * torch.ones_like(u)]
    log = sum(-0.5 * ((data[0, i] - f) / 0.3) ** 2 for i, f in enumerate(fit))
    log = log - 0.5 * (u - 1) ** 2 - 0.5 * s.log().square() / 0.25
    p = torch.exp(log - log.max())
    p = p / p.sum()
    mean = float((p * u).sum()), float((p * s).sum())
    sd = float((p * (u - mean[0]) ** 2).sum().sqrt()), float((p * (s - mean[1]) ** 2).sum().sqrt())
    for solver in (EnsembleKalmanInversion(ensemble=800), EnsembleKalmanSampler(ensemble=800, steps=30)):
        posterior = _solve(solver, problem, 800)
        for values, m, spread in zip(
            (posterior.samples[0, 0, :, 0], posterior.theta["s"][0, 0]), mean, sd, strict=True
        ):
            # Gaussian-like: a third of a posterior sd, and a fifth in the spread
            assert abs(float(values.mean()) - m) < 0.33 * spread
            assert abs(float(values.std()) / spread - 1) < 0.2


def test_what_they_cannot_treat():
    problem = _problem()
    term = problem.terms[0]
    for noise, word in ((LaplaceNoise(0.3), "LaplaceNoise"), (GaussianNoise("sigma"), "noise level")):
        nuisance = {"sigma": GaussianPrior(torch.zeros(1), 1.0, transform=Exp())} if word == "noise level" else None
        other = InverseProblem(term.data, term.operator, noise, problem.prior, nuisance=nuisance)
        with pytest.raises(TypeError, match=word):
            EnsembleKalmanSampler().solve(other, 2)
    with pytest.warns(UserWarning, match="span at most 3 of 6"):
        EnsembleKalmanInversion(ensemble=4).solve(problem, 2, dtype=F64)
    with pytest.warns(UserWarning, match="raise steps"):
        EnsembleKalmanSampler(ensemble=100, steps=2).solve(problem, 2, dtype=F64)
    with pytest.warns(UserWarning, match="did not bring the misfit"):
        EnsembleKalmanInversion(ensemble=50, stop="discrepancy", steps=1).solve(_problem(0.01), 2, dtype=F64)
