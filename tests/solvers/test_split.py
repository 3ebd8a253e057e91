"""Split samplers on linear-Gaussian problems, against closed forms: a mean that is not zero, correlated priors and noise."""

from __future__ import annotations

import math

import pytest
import torch

from invgen.covariance import Dense
from invgen.driver import Streams
from invgen.linalg import norm
from invgen.noise import GaussianNoise
from invgen.operators import MatrixOperator
from invgen.priors import GaussianMixturePrior, GaussianPrior
from invgen.problem import InverseProblem, Term
from invgen.solvers import DAPS, DiffPIR, ExactGaussian, OverrelaxedSplit, PnPDM, REDDiff
from invgen.solvers._inner import conditional_mean, likelihood_step
from invgen.solvers._reverse import reverse_draw
from invgen.transforms import Affine

F64 = torch.float64


def _draw(generator, *shape, dtype=F64):
    return torch.randn(*shape, generator=generator, dtype=dtype)


def _covariance(generator, n, floor=0.1):
    root = _draw(generator, n, n) / math.sqrt(n)
    return root @ root.T + floor * torch.eye(n, dtype=F64)


def _problem(kind="plain"):
    """Ten correlated unknowns with a mean, x = 2 + 3u; six data, with correlated noise, in two terms, or complex."""
    g = torch.Generator().manual_seed(7)
    prior = GaussianPrior(2 * _draw(g, 10), _covariance(g, 10), transform=Affine(2.0, 3.0))
    if kind == "complex":
        A = MatrixOperator(_draw(g, 4, 10, dtype=torch.complex128) / 3)
        return InverseProblem(2 * _draw(g, 4, dtype=torch.complex128), A, GaussianNoise(0.5), prior)
    A, B = MatrixOperator(_draw(g, 6, 10) / 3), MatrixOperator(_draw(g, 2, 10) / 3)
    first = Term(3 * _draw(g, 6), A, GaussianNoise(covariance=Dense(0.3 * _covariance(g, 6))))
    if kind == "plain":
        return InverseProblem(terms=[first], prior=prior)
    return InverseProblem(terms=[first, Term(_draw(g, 2), B, GaussianNoise(0.2))], prior=prior)


def _is_standard_normal(w):
    """Whether draws `(n, d)` have mean 0 and covariance I, at a false alarm of about 1e-4.

    n |mean|² is χ²_d; the extreme eigenvalues of a sample covariance lie within (1 ± √(d/n) ± 4/√n)².
    """
    n, d = w.shape
    tail = d + 4 * math.sqrt(2 * d) + 8
    assert float(n * w.mean(0).square().sum()) < tail, "the mean is off"
    values = torch.linalg.eigvalsh((w - w.mean(0)).T @ (w - w.mean(0)) / (n - 1))
    reach = math.sqrt(d / n) + 4 / math.sqrt(n)
    assert (1 - reach) ** 2 < float(values[0]), "some direction is too narrow"
    assert float(values[-1]) < (1 + reach) ** 2, "some direction is too wide"


def _whitened(x, mean, covariance):
    return torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), (x - mean).flatten(1).T, upper=False).T


def _against_exact(solver, problem, n=1000, seed=0):
    x = solver.solve(problem, n, seed=seed, dtype=F64).samples[0, 0]
    mean, covariance = ExactGaussian().moments(problem)
    _is_standard_normal(_whitened(x, mean.reshape(-1, 10)[0], covariance))


@pytest.mark.parametrize("kind", ["plain", "two terms", "complex"])
@pytest.mark.parametrize(
    "solver",
    [
        OverrelaxedSplit(iterations=30, moves=10, rho_min=0.01),
        DAPS(levels=30, conditional="tweedie", inner=10, floor=0.06, iterations=8, rtol=1e-6),
    ],
    ids=lambda s: type(s).__name__,
)
def test_calibrated_samplers_draw_the_exact_posterior(solver, kind):
    _against_exact(solver, _problem(kind))


def test_pnpdm_tends_to_the_posterior_like_one_over_the_sweeps():
    problem = _problem("plain")
    x = PnPDM(iterations=400, inner=2, floor=0.5).solve(problem, 1000, dtype=F64).samples[0, 0]
    mean, covariance = ExactGaussian().moments(problem)
    w = _whitened(x, mean.reshape(-1, 10)[0], covariance)
    # 400 sweeps over 5.7 e-folds: variances within 1 + 1/70, means within a few hundredths
    n, d = w.shape
    assert float(w.mean(0).square().mean()) < 0.05**2 + (1 + 4 * math.sqrt(2 / d)) / n
    values = torch.linalg.eigvalsh(w.T.cov())
    reach = math.sqrt(d / n) + 4 / math.sqrt(n)
    assert 0.98 * (1 - reach) ** 2 < float(values[0])
    assert float(values[-1]) < 1.03 * (1 + reach) ** 2


@pytest.mark.parametrize("rho", [0.1, 0.6])
def test_overrelaxed_sweeps_leave_the_split_posterior_alone(rho):
    """Started from draws of the posterior with R + ρ² A Aᵀ, three levels at the same ρ end there again."""
    problem, n = _problem("plain"), 3000
    term, scale = problem.terms[0], math.sqrt(float(problem.prior.covariance_u.mean_variance()))
    A = 3.0 * term.operator.matrix  # A∘T without its shift
    wide = Dense(term.noise.covariance((6,)).dense() + rho**2 * A @ A.T)
    inflated = InverseProblem(term.data, term.operator, GaussianNoise(covariance=wide), problem.prior)
    mean, covariance = ExactGaussian().moments(inflated)
    exact = ExactGaussian().solve(inflated, n, seed=5, dtype=F64).samples[0, 0]
    solver = OverrelaxedSplit(
        iterations=3, rho_max=rho / scale, rho_min=0.9999999 * rho / scale, inner=16, floor=0.03, moves=12
    )
    chunk, rng = problem.select([0] * n, dtype=F64), Streams(1, range(n))
    state = solver.init(chunk, rng)
    state["u"] = problem.prior.transform.inverse(exact)
    for _ in range(3):
        state = solver.step(chunk, state, rng)
    _is_standard_normal(_whitened(problem.prior.transform(state["u"]), mean.reshape(10), covariance))


def test_without_moves_the_overrelaxed_sampler_is_pnpdm():
    problem = _problem("plain")
    a = OverrelaxedSplit(iterations=6, inner=2, moves=0).solve(problem, 3, dtype=F64).samples
    b = PnPDM(iterations=6, inner=2).solve(problem, 3, dtype=F64).samples
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("sigma", [0.2, 1.0, 5.0])
def test_reverse_draw_has_the_law_of_a_gaussian_prior(sigma):
    problem, n = _problem("plain"), 3000
    prior, g = problem.prior, torch.Generator().manual_seed(2)
    C, m = prior.covariance_u.dense(), prior.mean_u
    z = (m + math.sqrt(1 + sigma**2) * _draw(g, 10)).expand(n, 10)
    u = reverse_draw(problem, z, sigma, Streams(3, range(n)), steps=24, floor=0.01 if sigma > 1 else 0.03)
    shrink = C @ torch.linalg.inv(C + sigma**2 * torch.eye(10, dtype=F64))
    _is_standard_normal(_whitened(u, m + shrink @ (z[0] - m), sigma**2 * (shrink + shrink.T) / 2))


def test_reverse_draw_has_the_exact_mean_in_any_number_of_steps():
    problem, n = _problem("plain"), 4000
    C, m = problem.prior.covariance_u.dense(), problem.prior.mean_u
    z = (m + 1.5).expand(n, 10)
    for steps in (1, 2, 5):
        u = reverse_draw(problem, z, 1.0, Streams(steps, range(n)), steps=steps, floor=0.3)
        shrink = C @ torch.linalg.inv(C + torch.eye(10, dtype=F64))
        off = (u.mean(0) - m - shrink @ (z[0] - m)) / (u.std(0) / math.sqrt(n))
        assert float(off.abs().max()) < 5


def test_reverse_draw_of_a_mixture_is_its_conditional_law():
    weights, means, variances = (
        torch.tensor([0.35, 0.65], dtype=F64),
        torch.tensor([[-1.0], [1.0]], dtype=F64),
        torch.tensor([0.1, 0.15], dtype=F64),
    )
    prior = GaussianMixturePrior(weights, means, variances)
    A = MatrixOperator(torch.eye(1, dtype=F64))
    problem, n = InverseProblem(torch.zeros(1, dtype=F64), A, GaussianNoise(1.0), prior), 4000
    for sigma, at in ((0.3, 0.3), (1.0, 0.4), (1.0, 1.5)):
        u = reverse_draw(
            problem, torch.full((n, 1), at, dtype=F64), sigma, Streams(0, range(n)), steps=16, floor=0.03
        ).flatten()
        total = variances + sigma**2
        share = (weights.log() - 0.5 * total.log() - 0.5 * (at - means[:, 0]) ** 2 / total).softmax(0)
        centre = means[:, 0] + variances / total * (at - means[:, 0])
        law = torch.distributions.Normal(centre, sigma * (variances / total).sqrt())
        ordered = u.sort().values
        cdf = (share * law.cdf(ordered[:, None])).sum(1)
        empirical = (torch.arange(n, dtype=F64) + 0.5) / n
        # Kolmogorov–Smirnov: 2.2/√n is passed with probability 1e-4; 0.02 for the transitions' own error
        assert float((cdf - empirical).abs().max()) < 2.2 / math.sqrt(n) + 0.02


@pytest.mark.parametrize(("flow_steps", "expected"), [(40, (1.75, 2.15)), (1, (0.93, 1.09))])
def test_isotropic_daps_doubles_the_variance_where_nothing_is_measured(flow_steps, expected):
    """Its docstring's claim: the flow's end has the prior's spread already, the conditional mean has not."""
    prior = GaussianPrior(torch.tensor([3.0, -1.0], dtype=F64), 0.5)
    A = MatrixOperator(torch.tensor([[1.0, 0.0]], dtype=F64))
    problem = InverseProblem(torch.tensor([2.0], dtype=F64), A, GaussianNoise(0.3), prior)
    solver = DAPS(levels=150, ode_steps=flow_steps, width="prior", sigma_max=20.0)
    x = solver.solve(problem, 4000, dtype=F64).samples[0, 0]
    assert expected[0] < float(x[:, 1].var()) / 0.5 < expected[1]
    assert abs(float(x[:, 1].mean()) + 1) < 0.07


def test_one_euler_step_of_the_flow_is_the_denoiser():
    problem = _problem("plain")
    u = torch.randn(3, 10, dtype=F64)
    torch.testing.assert_close(DAPS(ode_steps=1)._flow(problem, u, 0.7), problem.prior.denoise(u, 0.7))


def test_the_flow_ends_where_the_probability_flow_does():
    problem = _problem("plain")
    C, m, sigma = problem.prior.covariance_u.dense(), problem.prior.mean_u, 1.3
    u = m + 2 * torch.randn(4, 10, dtype=F64)
    values, vectors = torch.linalg.eigh(C)
    shrink = (vectors * (values / (values + sigma**2)).sqrt()) @ vectors.T
    end = DAPS(ode_steps=4000)._flow(problem, u, sigma)
    torch.testing.assert_close(end, m + (u - m) @ shrink, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("kind", ["plain", "two terms"])
def test_data_steps_minimise_and_draw_what_they_say(kind):
    """The conditional mean zeroes the gradient of −log q, and draws scatter around it with the inverse of its Hessian."""
    problem, n, rho = _problem(kind), 20000, 0.7
    chunk = problem.select([0] * n, dtype=F64)
    u = torch.linspace(-1, 2, 10, dtype=F64).expand(n, 10)
    system = chunk.linear_gaussian("u")
    A, R = system.operator.to_dense(), system.R.dense()
    precision = A.T @ torch.linalg.solve(R, A) + torch.eye(10, dtype=F64) / rho**2
    mean, residual, missed = conditional_mean(chunk, u, rho)
    gradient = precision @ mean[0] - A.T @ torch.linalg.solve(R, system.data[0]) - u[0] / rho**2
    assert float(gradient.abs().max()) < 1e-8 * float(precision.abs().max())
    assert float(residual.max()) < 1e-8
    assert float(missed.sum()) == 0
    z = likelihood_step(chunk, u, rho, Streams(4, range(n)))[0]
    _is_standard_normal((z - mean) @ torch.linalg.cholesky(precision))


def test_diffpir_takes_the_steps_of_its_equations():
    problem = _problem("plain")
    solver = DiffPIR(steps=5, weight=3.0, zeta=0.4, sigma_max=2.0, sigma_min=0.1)
    chunk, rng = problem.select([0, 0], dtype=F64), Streams(0, range(2))
    state = solver.init(chunk, rng)
    u, (now, after) = state["u"], solver.schedule(chunk)[:2]
    xi = Streams(0, range(2))
    xi.normal((10,), dtype=F64, tag="step")
    fresh = xi.normal((10,), dtype=F64, tag="step")
    system = chunk.linear_gaussian("u")
    A, R, r2 = system.operator.to_dense(), system.R.dense(), now**2 / 3.0
    clean = problem.prior.denoise(u, now)
    gain = r2 * A.T @ torch.linalg.inv(R + r2 * A @ A.T)
    fit = clean + (system.data - clean @ A.T) @ gain.T
    expected = fit + after * (math.sqrt(0.6) * (u - fit) / now + math.sqrt(0.4) * fresh)
    torch.testing.assert_close(solver.step(chunk, state, rng)["u"], expected)


def test_red_diff_moves_by_the_gradient_of_its_equation():
    """The first step of Adam is its rate times the gradient's sign; a solve lands on the minimum."""
    problem = _problem("plain")
    chunk, s2 = problem.select([0], dtype=F64), float(problem.prior.covariance_u.mean_variance())
    system = chunk.linear_gaussian("u")
    A, R = system.operator.to_dense(), system.R.dense()
    for optimizer in ("adam", "solve"):
        solver = REDDiff(steps=4, weight=0.5, optimizer=optimizer, sigma_max=3.0)
        state = solver.init(chunk, Streams(0, [0]))
        u = state["u"]
        xi = Streams(0, [0])
        xi.normal((10,), dtype=F64, tag="step")
        clean = problem.prior.denoise(u + 3.0 * xi.normal((10,), dtype=F64, tag="step"), 3.0)
        rng = Streams(0, [0])
        rng.normal((10,), dtype=F64, tag="step")
        after = solver.step(chunk, state, rng)
        moved = after["u"]
        if optimizer == "adam":
            gradient = (u @ A.T - system.data) @ torch.linalg.solve(R, A) + 0.5 / s2 * (u - clean)
            torch.testing.assert_close(after["m1"], 0.1 * gradient)
            torch.testing.assert_close(moved - u, -0.1 * math.sqrt(s2) * gradient.sign(), rtol=1e-6, atol=1e-6)
        else:
            gradient = (moved @ A.T - system.data) @ torch.linalg.solve(R, A) + 0.5 / s2 * (moved - clean)
            assert float(norm(gradient)) < 1e-8


def test_red_diff_ends_between_the_mode_and_the_data():
    """As its docstring says: it explains the data, better than the mode does, and far better than the prior's mean."""
    problem = _problem("plain")
    x = REDDiff(steps=300).solve(problem, 3, dtype=F64).samples[0, 0]
    mode, prior = ExactGaussian().mean(problem), problem.prior.mean()[None]
    assert bool((problem.log_likelihood(x) > problem.log_likelihood(mode) - 1).all())
    assert bool((problem.log_posterior(x) > problem.log_posterior(prior) + 10).all())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PnPDM(iterations=1), "iterations >= 2"),
        (lambda: PnPDM(rho_min=4.0), "rho_min < rho_max"),
        (lambda: OverrelaxedSplit(moves=-1), "moves >= 0"),
        (lambda: DAPS(width="one"), "width sigma or prior"),
        (lambda: DAPS(levels=1), "levels >= 2"),
        (lambda: DiffPIR(zeta=1.5), "zeta in"),
        (lambda: REDDiff(optimizer="sgd"), "adam or solve"),
        (lambda: REDDiff(weight=0.0), "weight > 0"),
    ],
)
def test_impossible_settings_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
