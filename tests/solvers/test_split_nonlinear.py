"""Split samplers where the data step has no closed form: invariance of its Markov steps, quadrature, unknown parameters."""

from __future__ import annotations

import math

import pytest
import torch

from invgen.contracts import Operator
from invgen.driver import Streams
from invgen.noise import GaussianNoise, LaplaceNoise, PoissonNoise, StudentTNoise
from invgen.operators import MatrixOperator
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem, Term
from invgen.solvers import DAPS, DiffPIR, OverrelaxedSplit, PnPDM, REDDiff
from invgen.solvers._inner import conditional_mean, first_step, metropolis_step, misfit
from invgen.solvers._nuisance import nuisance_step, start_nuisance
from invgen.transforms import Affine, Exp

F64 = torch.float64


class Plain(Operator):
    """A linear map that does not say that it is one."""

    def __init__(self, matrix, order=1):
        super().__init__((matrix.shape[1],), (matrix.shape[0],))
        self.register_buffer("matrix", matrix)
        self.derivative_order = order

    def forward(self, x, **theta):
        if self.derivative_order == 0:
            assert not x.requires_grad
        return x @ self.matrix.T


class Scaled(Operator):
    """g(x) = scale · exp(x/2): one unknown, two equal data."""

    theta_names = ("scale",)

    def __init__(self):
        super().__init__((1,), (2,))

    def forward(self, x, scale=None, **theta):
        prediction = (0.5 * x).exp().expand(-1, 2)
        return prediction if scale is None else scale[:, None] * prediction


def _matrices():
    g = torch.Generator().manual_seed(9)
    A = torch.randn(3, 5, generator=g, dtype=F64) / 2
    return A, torch.randn(3, generator=g, dtype=F64), torch.randn(5, generator=g, dtype=F64)


@pytest.mark.parametrize(("order", "angle"), [(1, 0.5 * math.pi), (1, math.pi), (0, 0.5 * math.pi)])
@pytest.mark.parametrize("rho", [0.3, 2.0])
def test_metropolis_steps_leave_the_conditional_alone(order, angle, rho):
    """Started from exact draws of a Gaussian q, in x = 1 − 2u, and far from the starting step size."""
    A, d, u = _matrices()
    n, prior = 3000, GaussianPrior(torch.zeros(5, dtype=F64), 1.0, transform=Affine(1.0, -2.0))
    problem = InverseProblem(d, Plain(A, order), GaussianNoise(0.4), prior).select([0] * n, dtype=F64)
    B, target = -2.0 * A, d - A.sum(1)
    precision = B.T @ B / 0.4**2 + torch.eye(5, dtype=F64) / rho**2
    root = torch.linalg.cholesky(precision)
    mean = torch.cholesky_solve((B.T @ target / 0.4**2 + u / rho**2)[:, None], root)[:, 0]
    white = torch.randn(n, 5, generator=torch.Generator().manual_seed(1), dtype=F64)
    z = mean + torch.linalg.solve_triangular(root.T, white.T, upper=True).T
    rng, step = Streams(2, range(n)), torch.full((n,), math.log(0.1), dtype=F64)
    began, rates = z, []
    for _ in range(4):
        z, step, rate = metropolis_step(problem, z, u.expand(n, 5), rho, step, {}, rng, leaps=5, angle=angle)
        rates.append(float(rate.mean()))
    w = (z - mean) @ root
    assert float(n * w.mean(0).square().sum()) < 5 + 4 * math.sqrt(10) + 8
    values = torch.linalg.eigvalsh(w.T.cov())
    reach = math.sqrt(5 / n) + 4 / math.sqrt(n)
    assert (1 - reach) ** 2 < float(values[0])
    assert float(values[-1]) < (1 + reach) ** 2
    assert 0.3 < min(rates) <= 1.0
    assert float((z - began).abs().mean()) > 0.05, "the steps do not move"


def test_the_first_step_is_the_inverse_root_of_the_largest_curvature():
    A, d, u = _matrices()
    problem = InverseProblem(d, Plain(A), GaussianNoise(0.4), GaussianPrior(torch.zeros(5, dtype=F64), 1.0))
    chunk = problem.select([0, 0], dtype=F64)
    step = first_step(chunk, u.expand(2, 5), {}, 1.0, Streams(0, range(2))).exp()
    exact = 0.4 / torch.linalg.matrix_norm(A, 2)
    assert bool(((step / exact - 1).abs() < 0.1).all())


def test_a_flat_misfit_is_turned_by_the_angle():
    """Without information nothing is rejected, and z keeps cos(angle), averaged from half the angle to all of it."""
    n = 4000
    problem = InverseProblem(
        torch.zeros(1, dtype=F64),
        Plain(torch.full((1, 2), 1e-9, dtype=F64)),
        GaussianNoise(1.0),
        GaussianPrior(torch.zeros(2, dtype=F64), 1.0),
    ).select([0] * n, dtype=F64)
    for angle in (0.5 * math.pi, math.pi):
        z, u, rng = torch.randn(n, 2, dtype=F64), torch.zeros(n, 2, dtype=F64), Streams(0, range(n))
        step = torch.full((n,), 3.0, dtype=F64)
        new, _, rate = metropolis_step(problem, z, u, 1.0, step, {}, rng, leaps=4, angle=angle)
        assert float(rate.min()) > 0.999
        kept = (math.sin(angle) - math.sin(angle / 2)) / (angle / 2)
        correlation = torch.corrcoef(torch.stack([z[:, 0], new[:, 0]]))[0, 1]
        assert abs(float(correlation) - kept) < 4.5 / math.sqrt(n)


def test_misfit_agrees_with_the_log_likelihood():
    g = torch.Generator().manual_seed(3)
    A = MatrixOperator(torch.randn(3, 2, generator=g, dtype=F64))
    C = MatrixOperator(torch.randn(2, 2, generator=g, dtype=torch.complex128))
    prior = GaussianPrior(torch.zeros(2, dtype=F64), 1.0, transform=Affine(0.3, 2.0))
    terms = [
        Term(torch.ones(3, dtype=F64), A, GaussianNoise(torch.tensor([0.3, 0.5, 1.0], dtype=F64))),
        Term(torch.ones(3, dtype=F64), A, LaplaceNoise(0.7)),
        Term(torch.ones(3, dtype=F64), A, StudentTNoise(0.7, 3.0)),
        Term(torch.ones(2, dtype=torch.complex128), C, GaussianNoise(0.4)),
    ]
    for chosen in ([t] for t in terms):
        problem = InverseProblem(terms=chosen, prior=prior)
        u = torch.randn(4, 2, generator=g, dtype=F64)
        both = misfit(problem, u, {}) + problem.log_likelihood(prior.transform(u))
        torch.testing.assert_close(both, both[:1].expand(4))


def _quadrature(log_density, low, high, n=20001):
    """Nodes and distribution function of a density in one unknown."""
    x = torch.linspace(low, high, n, dtype=F64)
    p = log_density(x[:, None]).softmax(0)
    return x, p.cumsum(0) - 0.5 * p


def _matches(samples, nodes, cdf, slack):
    """Kolmogorov–Smirnov: 2.2/√n is passed with probability 1e-4 by exact draws."""
    ordered = samples.flatten().double().sort().values
    n = len(ordered)
    at = torch.searchsorted(nodes, ordered).clamp(max=len(nodes) - 1)
    distance = (cdf[at] - (torch.arange(n, dtype=F64) + 0.5) / n).abs().max()
    assert float(distance) < 2.2 / math.sqrt(n) + slack


NOISES = {
    "gaussian": (GaussianNoise(0.5), [2.4, 1.7]),
    "poisson": (PoissonNoise(3.0), [7 / 3, 4 / 3]),
    "laplace": (LaplaceNoise(0.4), [2.4, 1.7]),
    "student": (StudentTNoise(0.4, 3.0), [2.4, 1.0]),
}


@pytest.mark.parametrize("kind", sorted(NOISES))
@pytest.mark.parametrize(
    "solver",
    [
        PnPDM(iterations=120, inner=2, rho_max=1.0, rho_min=0.02, hold=20),
        OverrelaxedSplit(iterations=25, moves=6, rho_max=1.0, rho_min=0.02, hold=5),
    ],
    ids=lambda s: type(s).__name__,
)
def test_curved_physics_and_any_noise_against_quadrature(solver, kind):
    noise, data = NOISES[kind]
    prior = GaussianPrior(torch.tensor([0.4], dtype=F64), 0.64)
    problem = InverseProblem(torch.tensor(data, dtype=F64), Scaled(), noise, prior)
    nodes, cdf = _quadrature(lambda x: problem.log_likelihood(x) + prior.log_prob(x), -5, 6)
    posterior = solver.solve(problem, 1500, dtype=F64)
    _matches(posterior.samples, nodes, cdf, 0.02)
    assert 0.6 < float(posterior.stats["acceptance"].mean()) <= 1


def test_a_black_box_is_walked():
    class Black(Scaled):
        derivative_order = 0

    prior = GaussianPrior(torch.tensor([0.4], dtype=F64), 0.64)
    problem = InverseProblem(torch.tensor([2.4, 1.7], dtype=F64), Black(), GaussianNoise(0.5), prior)
    nodes, cdf = _quadrature(lambda x: problem.log_likelihood(x) + prior.log_prob(x), -5, 6)
    solver = PnPDM(iterations=120, inner=2, rho_max=1.0, rho_min=0.02, hold=20)
    _matches(solver.solve(problem, 1500, dtype=F64).samples, nodes, cdf, 0.025)
    for other in (DAPS(levels=4), DiffPIR(steps=4), REDDiff(steps=4)):
        with pytest.raises(TypeError, match="black box"):
            other.solve(problem, 1)


def test_coordinates_that_are_not_affine():
    """A positive unknown, x = exp(u): linear physics in x is curved in u, and the draws are of x."""
    prior = GaussianPrior(torch.tensor([0.2], dtype=F64), 0.5, transform=Exp())
    A = MatrixOperator(torch.ones(1, 1, dtype=F64))
    problem = InverseProblem(torch.tensor([0.7], dtype=F64), A, GaussianNoise(0.5), prior)
    nodes, cdf = _quadrature(lambda x: problem.log_likelihood(x) + prior.log_prob(x), 1e-3, 15)
    solver = OverrelaxedSplit(iterations=25, moves=6, rho_max=1.0, rho_min=0.02)
    _matches(solver.solve(problem, 1500, dtype=F64).samples, nodes, cdf, 0.02)


def test_isotropic_daps_draws_what_it_says_for_curved_physics():
    """One level with a small σ: the draws are of N(x̂, σ²) p(d | x), which quadrature knows."""
    prior = GaussianPrior(torch.tensor([0.4], dtype=F64), 0.64)
    problem = InverseProblem(torch.tensor([2.4, 1.7], dtype=F64), Scaled(), GaussianNoise(0.5), prior)
    n, sigma = 2000, 0.6
    chunk, rng = problem.select([0] * n, dtype=F64), Streams(0, range(n))
    solver = DAPS(levels=3, ode_steps=1, trajectories=8, sigma_max=0.6, sigma_min=0.1)
    state = solver.init(chunk, rng)
    state["u"] = torch.full((n, 1), 0.9, dtype=F64)
    centre = prior.denoise(state["u"], sigma)[0]
    drawn = solver._isotropic_draw(chunk, state, sigma, rng)[0]
    near = GaussianPrior(centre, sigma**2)
    nodes, cdf = _quadrature(lambda x: problem.log_likelihood(x) + near.log_prob(x), -4, 5)
    _matches(drawn, nodes, cdf, 0.01)


def test_the_data_step_of_diffpir_finds_the_same_minimum_without_a_closed_form():
    from invgen.solvers.diffpir import _descend

    A, d, u = _matrices()
    prior = GaussianPrior(torch.zeros(5, dtype=F64), 1.0, transform=Affine(1.0, -2.0))
    open_, closed = (InverseProblem(d, g, GaussianNoise(0.4), prior) for g in (Plain(A), MatrixOperator(A)))
    centre = u.expand(2, 5).contiguous()
    found = _descend(open_.select([0, 0], dtype=F64), centre, 0.7, 40)
    torch.testing.assert_close(
        found, conditional_mean(closed.select([0, 0], dtype=F64), centre, 0.7)[0], rtol=1e-5, atol=1e-5
    )


# --- nuisance parameters -----------------------------------------------------------------------------------------------


def _joint(problem, theta_prior, name, lows, highs, n=401):
    """Marginal distribution functions of (x, v), theta = exp(v), by quadrature in two unknowns."""
    axes = [torch.linspace(lo, hi, n, dtype=F64) for lo, hi in zip(lows, highs, strict=True)]
    grid = torch.cartesian_prod(*axes)
    theta = grid[:, 1].exp()
    log_p = problem.log_likelihood(grid[:, :1], **{name: theta}) + problem.prior.log_prob(grid[:, :1])
    log_p = log_p + theta_prior.log_prob(theta[:, None]) + grid[:, 1]
    p = log_p.softmax(0).reshape(n, n)
    return [(axis, m.cumsum(0) - 0.5 * m) for axis, m in zip(axes, (p.sum(1), p.sum(0)), strict=True)]


@pytest.mark.parametrize("name", ["sd", "scale"])
def test_nuisance_steps_draw_the_conditional_given_the_model(name):
    n, at = 4000, 0.8
    prior = GaussianPrior(torch.tensor([0.4], dtype=F64), 0.64)
    theta_prior = GaussianPrior(torch.tensor([-0.5], dtype=F64), 0.4, transform=Exp())
    noise = GaussianNoise("sd" if name == "sd" else 0.5)
    data = torch.tensor([2.4, 1.7], dtype=F64)
    problem = InverseProblem(data, Scaled(), noise, prior, nuisance={name: theta_prior})

    def log_density(v):
        theta = {name: v[:, 0].exp()}
        x = torch.full((len(v), 1), at, dtype=F64)
        return problem.log_likelihood(x, **theta) + theta_prior.log_prob(v.exp()) + v[:, 0]

    nodes, cdf = _quadrature(log_density, -5, 4)
    chunk, rng = problem.select([0] * n, dtype=F64), Streams(0, range(n))
    z = torch.full((n, 1), at, dtype=F64)
    state = start_nuisance(chunk, z[:, 0])
    v, step = state["nuisance"], state["nuisance_step"]
    for k in range(20):
        v, step = nuisance_step(chunk, z, v, step, rng, gain=0.1 if k < 8 else 0.0)
    _matches(v, nodes, cdf, 0.005)


SOLVERS = [
    PnPDM(iterations=150, inner=2, rho_max=1.0, rho_min=0.03, hold=40),
    OverrelaxedSplit(iterations=40, moves=5, rho_max=1.0, rho_min=0.03, hold=20),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_an_unknown_noise_level_is_drawn_with_the_model(solver):
    prior = GaussianPrior(torch.tensor([0.4], dtype=F64), 0.64)
    level = GaussianPrior(torch.tensor([-1.0], dtype=F64), 0.5, transform=Exp())
    A = MatrixOperator(torch.ones(4, 1, dtype=F64))
    d = torch.tensor([1.9, 1.1, 1.6, 0.8], dtype=F64)
    problem = InverseProblem(d, A, GaussianNoise("sd"), prior, nuisance={"sd": level})
    (x, x_cdf), (v, v_cdf) = _joint(problem, level, "sd", (-4, -4), (4, 3))
    posterior = solver.solve(problem, 1500, dtype=F64)
    _matches(posterior.samples, x, x_cdf, 0.025)
    _matches(posterior.theta["sd"].log(), v, v_cdf, 0.025)
    assert posterior.theta["sd"].shape == (1, 1, 1500)
    assert posterior.predict()[0].shape == (1, 1, 1500, 4)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_an_unknown_parameter_of_the_physics_is_drawn_with_the_model(solver):
    prior = GaussianPrior(torch.tensor([0.4], dtype=F64), 0.64)
    gain = GaussianPrior(torch.tensor([0.3], dtype=F64), 0.04, transform=Exp())
    problem = InverseProblem(
        torch.tensor([2.4, 1.7], dtype=F64), Scaled(), GaussianNoise(0.5), prior, nuisance={"scale": gain}
    )
    (x, x_cdf), (v, v_cdf) = _joint(problem, gain, "scale", (-4, -1), (4, 1.6))
    posterior = solver.solve(problem, 1500, dtype=F64)
    _matches(posterior.samples, x, x_cdf, 0.025)
    _matches(posterior.theta["scale"].log(), v, v_cdf, 0.025)


def test_every_item_and_every_resumption_has_the_same_parameters(tmp_path):
    """Chunks and checkpoints know the nuisance state too."""
    prior = GaussianPrior(torch.tensor([0.4], dtype=F64), 0.64)
    level = GaussianPrior(torch.tensor([-1.0], dtype=F64), 0.5, transform=Exp())
    problem = InverseProblem(
        torch.tensor([2.4, 1.7], dtype=F64), Scaled(), GaussianNoise("sd"), prior, nuisance={"sd": level}
    )
    solver = PnPDM(iterations=6, inner=1, rho_max=1.0)
    whole, parts = (solver.solve(problem, 4, chunk=c, dtype=F64) for c in (4, 3))
    torch.testing.assert_close(whole.theta["sd"], parts.theta["sd"], rtol=1e-10, atol=0)
    seen = []

    def interrupt(step, state):
        seen.append(step)
        if len(seen) == 9:
            raise KeyboardInterrupt

    path = tmp_path / "run.safetensors"
    solver.solve(problem, 4, chunk=2, checkpoint=path, save_seconds=0.0, callbacks=[interrupt], dtype=F64)
    done = solver.solve(problem, 4, chunk=2, checkpoint=path, dtype=F64)
    torch.testing.assert_close(done.theta["sd"], whole.theta["sd"], rtol=1e-10, atol=0)


def test_what_cannot_be_treated_is_a_type_error():
    class Nothing:
        shape, grid, transform = (1,), None, Affine()

        def sample(self, n, *, seed=0):
            return torch.zeros(n, 1)

    A = MatrixOperator(torch.ones(2, 1, dtype=F64))
    prior, d = GaussianPrior(torch.zeros(1, dtype=F64), 1.0), torch.zeros(2, dtype=F64)
    problem = InverseProblem(d, A, GaussianNoise("sd"), prior, nuisance={"sd": Nothing()})
    with pytest.raises(TypeError, match="density of its prior"):
        PnPDM().solve(problem, 1)
    for solver in (DAPS(), DAPS(conditional="tweedie"), DiffPIR(), REDDiff()):
        with pytest.raises(TypeError, match="nuisance"):
            solver.solve(problem, 1)
    curved = InverseProblem(d, Scaled(), GaussianNoise(1.0), prior)
    for solver in (DAPS(conditional="tweedie"), REDDiff(optimizer="solve")):
        with pytest.raises(TypeError, match="linear"):
            solver.solve(curved, 1)


def test_a_misfit_that_cannot_be_judged_is_a_bad_sample():
    """Poisson data of a negative prediction have no density: the sample is reported, not invented."""

    class Sign(Operator):
        def __init__(self):
            super().__init__((1,), (1,))

        def forward(self, x, **theta):
            return x - 100

    prior = GaussianPrior(torch.tensor([0.4], dtype=F64), 0.64)
    problem = InverseProblem(torch.tensor([2.0], dtype=F64), Sign(), PoissonNoise(), prior)
    from invgen.driver import DivergenceError

    with pytest.raises(DivergenceError, match="became NaN"):
        PnPDM(iterations=4, inner=1).solve(problem, 3, dtype=F64)
