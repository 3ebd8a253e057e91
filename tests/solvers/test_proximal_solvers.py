"""Splitting solvers against closed forms and against each other: all of them minimise the same function."""

from __future__ import annotations

import pytest
import torch

from invgen.contracts import LinearOperator
from invgen.noise import GaussianNoise, LaplaceNoise
from invgen.operators import Convolution, Identity, MatrixOperator
from invgen.priors import L1, L2, SCAD, TV, Box, GaussianPrior, RegularizerSum
from invgen.problem import InverseProblem
from invgen.solvers import (
    ADMM,
    DouglasRachford,
    ExactGaussian,
    HalfQuadraticSplitting,
    LinearizedADMM,
    PrimalDual,
    ProximalGradient,
    PyProximalSolver,
    TotalVariation,
)
from invgen.transforms import Affine

F64 = torch.float64
TIGHT = [
    ProximalGradient(iterations=6000, tol=1e-11),
    ProximalGradient(iterations=6000, tol=1e-11, backtracking=True, step_size=10.0),
    PrimalDual(iterations=8000, tol=1e-10, data="prox"),
    ADMM(iterations=8000, tol=1e-11),
    LinearizedADMM(iterations=20000, tol=1e-11),
    DouglasRachford(iterations=8000, tol=1e-11),
]
tight = pytest.mark.parametrize("solver", TIGHT, ids=lambda s: f"{type(s).__name__}-{TIGHT.index(s)}")


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def matrix_problem(prior, n_obs=2, sigma=0.4, rows=12):
    n = prior.shape
    A = MatrixOperator(noise(rows, int(torch.tensor(n).prod()), seed=3) / 3, n)
    return InverseProblem(noise(n_obs, rows, seed=4), A, GaussianNoise(sigma), prior)


def gaussian_problem():
    root = noise(16, 16, seed=5) / 4
    prior = GaussianPrior(noise(16, seed=6), root @ root.T + 0.1 * torch.eye(16, dtype=F64), transform=Affine(2.0, 3.0))
    A = MatrixOperator(noise(8, 16, seed=7) / 3)
    return InverseProblem(A(prior.sample(2, seed=11).double()) + 0.3 * noise(2, 8), A, GaussianNoise(0.3), prior)


@tight
def test_the_gaussian_posterior_mean(solver):
    """With a Gaussian prior (mean not zero, correlated, x = 2 + 3u) the minimum is the posterior mean."""
    problem = gaussian_problem()
    found = solver.solve(problem, dtype=F64)
    assert bool(found.stats["converged"].all())
    torch.testing.assert_close(found.samples[:, 0, 0], ExactGaussian().mean(problem), rtol=0, atol=1e-5)


@tight
def test_the_lasso(solver):
    """Optimality of ½|W(Ax − d)|² + w|x − c|₁: gradients of modulus at most w, equal to it where x ≠ c."""
    centre = 0.3
    problem = matrix_problem(L1((20,), 2.5, centre=centre))
    found = solver.solve(problem, dtype=F64)
    x = found.samples[:, 0, 0]
    assert bool(found.stats["converged"].all())
    A = problem.terms[0].operator.to_dense()
    g = (x @ A.T - problem.terms[0].data) @ A / 0.4**2
    away = (x - centre).abs() > 1e-6
    assert 0 < int(away.sum()) < away.numel()
    assert float(g.abs().max()) <= 2.5 + 1e-3
    torch.testing.assert_close(g[away], -2.5 * (x - centre)[away].sign(), rtol=0, atol=1e-3)
    want = 0.5 * ((x @ A.T - problem.terms[0].data) / 0.4).square().sum(1) + 2.5 * (x - centre).abs().sum(1)
    torch.testing.assert_close(found.stats["objective"][:, 0, 0], want)


def test_total_variation_deblurring():
    """Four roads to one objective, and the solver that runs PyProximal near it."""
    shape = (1, 12, 10)
    kernel = torch.outer(*[torch.tensor([1.0, 2.0, 4.0, 2.0, 1.0], dtype=F64) / 10] * 2)
    m = torch.zeros(1, *shape, dtype=F64)
    m[..., 3:8, 2:7] = 2.0
    A = Convolution(kernel, shape)
    for isotropic in (True, False):
        others = (
            (PrimalDual(iterations=1000, tol=1e-6, data="gradient"), 1e-4),
            (LinearizedADMM(iterations=400), 1e-3),
            (ProximalGradient(iterations=40), 1e-2),
            (TotalVariation(weight=3.0, iterations=400, tol=1e-9), 1e-3),
        )
        prior = TV(shape, 3.0, isotropic=isotropic, tol=1e-3, iterations=100)
        problem = InverseProblem(A(m) + 0.1 * noise(1, *shape), A, GaussianNoise(0.1), prior)
        best = PrimalDual(iterations=6000, tol=1e-6).solve(problem, dtype=F64)
        assert bool(best.stats["converged"].all())
        for solver, rtol in ((ADMM(iterations=2000, tol=1e-7), 1e-6), *(others if isotropic else ())):
            found = solver.solve(problem, dtype=F64)
            torch.testing.assert_close(found.stats["objective"], best.stats["objective"], rtol=rtol, atol=0)


def test_sums_and_bounds():
    """No feasible point is lower; primal–dual takes the parts one by one, the others the joint proximal operator."""
    shape = (1, 4, 5)
    smooth = TV(shape, 0.5) + Box(shape, 0.0) + L2(shape, 0.2)
    sparse = RegularizerSum([L1(shape, 0.5), Box(shape, 0.0)], tol=1e-9, iterations=200)
    primal_dual = PrimalDual(iterations=4000, tol=1e-8)
    for prior, solvers in (
        (smooth, [primal_dual]),
        (sparse, [primal_dual, ProximalGradient(iterations=300, tol=1e-8), ADMM(iterations=300, tol=1e-8)]),
    ):
        problem = matrix_problem(prior, n_obs=1, rows=30)

        def objective(v, problem=problem, prior=prior):
            return -problem.log_likelihood(v) + prior.penalty(v)

        for solver in solvers:
            x = solver.solve(problem, dtype=F64).samples[0, 0]
            assert float(x.min()) >= -1e-6
            x = x.clamp_min(0)
            base = objective(x)
            for size in (1e-1, 1e-2, 1e-3):
                moved = (x + size * noise(200, *shape, seed=9)).clamp_min(0)
                assert float((objective(moved) - base).min()) > -1e-5 * float(base.abs()), solver


def test_one_threshold_and_zero_data():
    """With g the identity the minimum is one proximal step; zero data have the answer zero at once."""
    prior = L1((9,), 2.0)
    d = 3 * noise(2, 9)
    want = prior.prox(d, 0.5**2)
    for solver in TIGHT:
        problem = InverseProblem(d, Identity((9,)), GaussianNoise(0.5), prior)
        torch.testing.assert_close(solver.solve(problem, dtype=F64).samples[:, 0, 0], want, rtol=0, atol=1e-7)
        zero = solver.solve(problem.with_data(torch.zeros_like(d)), dtype=F64)
        assert float(zero.samples.abs().max()) < 1e-12
        assert bool(zero.stats["converged"].all())


def test_a_solve_that_is_iterated_is_not_taken_for_a_direct_one():
    """Two terms whose joint solve is conjugate gradients: both ways with the data end in the posterior mean."""

    class Plain(LinearOperator):
        def __init__(self, matrix):
            super().__init__((matrix.shape[1],), (matrix.shape[0],))
            self.matrix = matrix

        def forward(self, x, **theta):
            return x @ self.matrix.T

        def adjoint(self, d):
            return d @ self.matrix

    problem = gaussian_problem()
    plain = Plain(problem.terms[0].operator.to_dense())
    same = InverseProblem(problem.terms[0].data, plain, GaussianNoise(0.3), problem.prior)
    assert not PrimalDual().misfit(same).direct
    found = PrimalDual(data="prox", iterations=2000, tol=1e-8, rtol=1e-6).solve(same, dtype=F64)
    torch.testing.assert_close(found.samples[:, 0, 0], ExactGaussian().mean(problem), rtol=0, atol=1e-4)


def test_half_quadratic_splitting_ends_near_the_minimum():
    prior = L1((20,), 2.5)
    problem = matrix_problem(prior)
    exact = ProximalGradient(iterations=6000, tol=1e-11).solve(problem, dtype=F64)
    gaps = []
    for last in (0.1, 10.0, 1000.0):
        found = HalfQuadraticSplitting(iterations=2000, rho_last=last).solve(problem, dtype=F64)
        gaps.append(float((found.stats["objective"] - exact.stats["objective"]).max()))
    assert gaps[0] > gaps[1] > gaps[2] > 0
    assert gaps[2] < 1e-2


def test_penalties_that_are_not_convex():
    problem = matrix_problem(SCAD((20,), 20.0, 0.3))
    for solver in (ProximalGradient(), PrimalDual(), ADMM(), LinearizedADMM(), DouglasRachford()):
        with pytest.raises(TypeError, match="convex"):
            solver.solve(problem)
    found = ProximalGradient(momentum=False, iterations=4000, tol=1e-12).solve(problem, dtype=F64)
    x, A = found.samples[:, 0, 0], problem.terms[0].operator.to_dense()
    g = (x @ A.T - problem.terms[0].data) @ A / 0.4**2
    step = 0.5 / torch.linalg.matrix_norm(A.T @ A / 0.4**2, 2)
    torch.testing.assert_close(problem.prior.prox(x - step * g, float(step)), x, rtol=0, atol=1e-6)  # stationary


def test_a_nonlinear_operator_and_another_noise():
    """g(x) = exp(x): the minimum of every entry by itself is known to a root finder."""
    from invgen.operators.algebra import compose
    from invgen.transforms import Exp

    d = torch.tensor([[0.5, 1.0, 4.0, 2.0]], dtype=F64)
    problem = InverseProblem(d, compose(Identity((4,)), Exp((4,))), GaussianNoise(0.5), L1((4,), 1.5))
    with pytest.raises(TypeError, match="backtracking"):
        ProximalGradient().solve(problem)
    for solver in (PrimalDual(), ADMM()):
        with pytest.raises(TypeError, match="linear"):
            solver.solve(problem)
    x = ProximalGradient(backtracking=True, iterations=2000, tol=1e-12).solve(problem, dtype=F64).samples[0, 0, 0]
    grid = torch.linspace(-3, 3, 60001, dtype=F64)
    cost = 0.5 * ((grid.exp()[:, None] - d[0]) / 0.5).square() + 1.5 * grid.abs()[:, None]
    torch.testing.assert_close(x, grid[cost.argmin(0)], rtol=0, atol=2e-4)
    laplace = InverseProblem(d, Identity((4,)), LaplaceNoise(0.5), L2((4,), 1.0))
    assert ProximalGradient(backtracking=True).solve(laplace, dtype=F64).kind == "point"


def test_steps_beyond_the_limit_are_said():
    problem = matrix_problem(L1((20,), 1.0))
    L = torch.linalg.matrix_norm(problem.terms[0].operator.to_dense() / 0.4, 2) ** 2
    with pytest.raises(ValueError, match="stability limit") as error:
        ProximalGradient(step_size=float(1.2 / L)).solve(problem, dtype=F64)
    said = float(str(error.value).split("limit ")[1].split(" ")[0])
    assert abs(said * float(L) - 1) < 0.05
    ProximalGradient(step_size=float(1.2 / L), momentum=False, iterations=20).solve(problem, dtype=F64)
    with pytest.raises(ValueError, match="stability limit"):
        PrimalDual(data="gradient", tau=float(3 / L)).solve(problem, dtype=F64)


def test_bad_settings():
    for bad in (
        lambda: ProximalGradient(iterations=0),
        lambda: ProximalGradient(step_size=-1.0),
        lambda: PrimalDual(relaxation=2.0),
        lambda: PrimalDual(data="both"),
        lambda: ADMM(rho=0.0),
        lambda: LinearizedADMM(mu=-1.0),
        lambda: DouglasRachford(relaxation=2.0),
        lambda: HalfQuadraticSplitting(rho_first=2.0, rho_last=1.0),
    ):
        with pytest.raises(ValueError, match=r"needs|must|lies|takes"):
            bad()
    with pytest.raises(ValueError, match="start"):
        ADMM(start=torch.zeros(1, 3)).solve(matrix_problem(L1((20,), 1.0)))


@pytest.mark.parametrize(
    "method",
    ["ProximalGradient", "ADMM", "DouglasRachfordSplitting", "PrimalDual", "AdaptivePrimalDual", "LinearizedADMM"],
)
def test_the_solvers_of_pyproximal_find_the_same_minimum(method):
    problem = matrix_problem(L1((20,), 2.5, centre=0.3))
    exact = ProximalGradient(iterations=3000, tol=1e-10).solve(problem, dtype=F64)
    found = PyProximalSolver(method=method, iterations=2000).solve(problem, dtype=F64)
    torch.testing.assert_close(found.stats["objective"], exact.stats["objective"], rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match="method"):
        PyProximalSolver(method="Guess")
