"""Proximal samplers against quadrature: P-MALA exact, MYULA and SK-ROCK with the bias that theory gives them."""

from __future__ import annotations

import math

import pytest
import torch
from numpy.polynomial import Chebyshev

from invgen.noise import GaussianNoise
from invgen.operators import Identity
from invgen.priors import L1, SCAD, Box, GaussianPrior
from invgen.problem import InverseProblem
from invgen.solvers import MYULA, SKROCK, ExactGaussian, ProximalMALA

F64 = torch.float64


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def laplace_problem():
    """Six numbers with one datum each: every marginal is a one-dimensional integral."""
    d = torch.tensor([-2.0, -0.5, 0.0, 0.4, 1.0, 3.0], dtype=F64)
    return InverseProblem(d, Identity((6,)), GaussianNoise(0.8), L1((6,), 1.7, centre=0.3))


def moments(potential, low=-12.0, high=12.0):
    """Mean and standard deviation of e^{−potential} on a fine grid, entry by entry."""
    t = torch.linspace(low, high, 200001, dtype=F64)[:, None]
    p = (-(potential(t) - potential(t).amin(0))).exp()
    p = p / p.sum(0)
    mean = (p * t).sum(0)
    return mean, ((p * (t - mean) ** 2).sum(0)).sqrt()


def chains(solver, problem, n=100):
    """Draws `(chains, draws, dim)`."""
    return solver.solve(problem, n, dtype=F64, seed=3).samples[0].flatten(2)


def z_scores(draws, mean, sd):
    """Of the mean and of the spread, from independent chains: each chain is one number."""
    first = (draws - mean) / sd
    second = first.square() - 1
    out = []
    for f in (first, second):
        each = f.mean(1)
        out.append(each.mean(0) / (each.std(0) / math.sqrt(len(each))))
    return out


def test_proximal_mala_is_exact_with_a_laplace_prior():
    problem = laplace_problem()
    d = problem.terms[0].data[0]
    mean, sd = moments(lambda t: 0.5 * ((t - d) / 0.8) ** 2 + 1.7 * (t - 0.3).abs())
    draws = chains(ProximalMALA(draws=300, warmup=200), problem)
    for z in z_scores(draws, mean, sd):
        assert float(z.abs().max()) < 4.3  # twelve numbers, family-wise 2e-4


def test_proximal_mala_is_exact_with_a_gaussian_prior_and_bounds():
    root = noise(5, 5, seed=1) / 2
    prior = GaussianPrior(noise(5, seed=2), root @ root.T + 0.2 * torch.eye(5, dtype=F64))
    problem = InverseProblem(noise(5, seed=3), Identity((5,)), GaussianNoise(0.7), prior)
    exact = ExactGaussian()
    reference = exact.solve(problem, 20000, dtype=F64)
    draws = chains(ProximalMALA(draws=300, warmup=200), problem)
    for z in z_scores(draws, exact.mean(problem)[0], reference.std()[0]):
        assert float(z.abs().max()) < 4.5
    box = InverseProblem(
        torch.tensor([-0.5, 0.5, 1.4], dtype=F64), Identity((3,)), GaussianNoise(0.8), Box((3,), 0.0, 1.0)
    )
    d = box.terms[0].data[0]
    mean, sd = moments(lambda t: 0.5 * ((t - d) / 0.8) ** 2, 0.0, 1.0)
    draws = chains(ProximalMALA(draws=300, warmup=200), box)
    assert float(draws.min()) >= 0
    assert float(draws.max()) <= 1
    for z in z_scores(draws, mean, sd):
        assert float(z.abs().max()) < 4.3


@pytest.mark.parametrize(
    "solver",
    [
        MYULA(draws=200, warmup=300, thin=8, smoothing=0.5, fraction=0.1),
        SKROCK(draws=200, warmup=50, stages=4, smoothing=0.5, fraction=0.05),
    ],
    ids=lambda s: type(s).__name__,
)
def test_unadjusted_chains_target_the_envelope(solver):
    """With small steps the law is e^{−Φ − R_λ}, which is not the posterior: envelopes of |x| are Huber functions."""
    problem = laplace_problem()
    d, lam = problem.terms[0].data[0], 0.5
    r = lambda t: (t - 0.3).abs()  # noqa: E731
    huber = lambda t: torch.where(  # noqa: E731
        r(t) <= 1.7 * lam, r(t) ** 2 / (2 * lam), 1.7 * r(t) - 1.7**2 * lam / 2
    )
    mean, sd = moments(lambda t: 0.5 * ((t - d) / 0.8) ** 2 + huber(t))
    draws = chains(solver, problem)
    error = ((draws.mean((0, 1)) - mean) / sd).abs()
    spread = draws.flatten(0, 1).std(0) / sd
    assert float(error.max()) < 0.07  # 4.3 standard errors, plus a bias of about δL/4 in the spread
    assert float((spread - 1).abs().max()) < 0.07
    _, exact = moments(lambda t: 0.5 * ((t - d) / 0.8) ** 2 + 1.7 * r(t))
    assert float((sd / exact).max()) > 1.1  # the envelope is another law


def test_the_bias_of_myula_in_the_step_is_that_of_euler():
    """On N(0, 1) without a prior's pull Euler's chain has the variance 1/(1 − δ/2)."""
    problem = InverseProblem(torch.zeros(1, 2, dtype=F64), Identity((2,)), GaussianNoise(1.0), L1((2,), 1e-9))
    solver = MYULA(draws=300, warmup=50, smoothing=1e6, fraction=0.5)
    draws = chains(solver, problem, 200)
    delta = 0.5 / (1.02 + 1e-6)
    each = draws.square().mean((1, 2))
    z = (each.mean() - 1 / (1 - delta / 2)) / (each.std() / math.sqrt(len(each)))
    assert abs(float(z)) < 4


@pytest.mark.parametrize("stages", [2, 5, 10])
def test_stages_of_skrock_are_chebyshev_polynomials(stages):
    """On a linear drift −λx a step is x' = A(−δλ) x + B(−δλ) Z with A = T_s(ω0 + ω1 p)/T_s(ω0) and
    B = (1 + ω1 p/2) U_{s−1}(ω0 + ω1 p)/U_{s−1}(ω0) (Abdulle, Almuslimani & Vilmart 2018, equation 13)."""

    class Given:
        def __init__(self, xi):
            self.xi = xi

        def normal(self, shape, *, dtype, tag):
            return torch.full((1, *shape), self.xi, dtype=dtype)

    problem = InverseProblem(torch.zeros(1, 1, dtype=F64), Identity((1,)), GaussianNoise(1.0), L1((1,), 1e-12))
    solver = SKROCK(stages=stages, smoothing=1e9, fraction=0.7)
    misfit = solver.misfit(problem)
    x = torch.ones(1, 1, dtype=F64)
    state = solver.begin(problem, misfit, x)
    reach, _ = solver.coefficients()
    delta = 0.7 * reach / float(state["total"])
    w0 = 1 + 0.05 / stages**2
    T, U = Chebyshev.basis(stages), Chebyshev.basis(stages).deriv() / stages  # T_s' = s U_{s−1}
    w1 = T(w0) / (stages * U(w0))
    p = -delta
    for start, xi in ((1.0, 0.0), (0.0, 1.0)):
        new = solver.move(problem, misfit, {**state, "x": start * x}, Given(xi), 0)["x"]
        A = T(w0 + w1 * p) / T(w0)
        B = (1 + w1 * p / 2) * U(w0 + w1 * p) / U(w0)
        torch.testing.assert_close(new, torch.full_like(x, A * start + B * math.sqrt(2 * delta) * xi))


def test_refusals():
    problem = laplace_problem()
    with pytest.raises(TypeError, match="HasDensity"):
        ProximalMALA().solve(InverseProblem(problem.terms[0].data, Identity((6,)), GaussianNoise(0.8), SCAD((6,))))
    for bad in (
        lambda: ProximalMALA(draws=0),
        lambda: ProximalMALA(step_size=0.0),
        lambda: ProximalMALA(target=1.0),
        lambda: MYULA(fraction=2.0),
        lambda: MYULA(smoothing=-1.0),
        lambda: SKROCK(stages=1),
    ):
        with pytest.raises(ValueError, match=r"needs|must|lies"):
            bad()
