"""Where guidance ends: non-linear physics, noise, bad networks and schedules, torch.compile."""

from __future__ import annotations

import warnings

import pytest
import torch

from invgen.contracts import Operator
from invgen.covariance import Dense
from invgen.driver import DivergenceError
from invgen.noise import GaussianNoise, LaplaceNoise
from invgen.operators import MatrixOperator
from invgen.priors import DiffusionPrior, GaussianPrior
from invgen.priors.networks import MLPDenoiser
from invgen.problem import InverseProblem, Term
from invgen.solvers import DDNM, DDRM, DPS, MMPS, TMPD, ConvolvedLikelihood, GuidedDiffusion, PiGDM
from invgen.transforms import Affine

F64, C128 = torch.float64, torch.complex128
LINEAR_ONLY = [PiGDM(), TMPD(), TMPD("exact"), ConvolvedLikelihood(), ConvolvedLikelihood("diagonal")]


def normal(seed, *shape, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Bent(Operator):
    """g(x) = tanh(A x) + 0.1 (A x)²."""

    def __init__(self, matrix, order=2):
        super().__init__((matrix.shape[1],), (matrix.shape[0],))
        self.register_buffer("matrix", matrix)
        self.derivative_order = order

    def forward(self, x, **theta):
        y = x.to(self.matrix.dtype) @ self.matrix.T
        return y.tanh() + 0.1 * y.square()


def gaussian():
    root = normal(1, 5, 5) / 2
    return GaussianPrior.dense(
        1.0 + normal(2, 5), root @ root.T + 0.2 * torch.eye(5, dtype=F64), transform=Affine(0.5, 2.0)
    )


def bent_terms(complex_data=False):
    R = torch.tensor([[0.3, 0.1], [0.1, 0.2]], dtype=F64)
    if complex_data:
        A = normal(3, 2, 5, dtype=C128) / 3
        return [Term(normal(5, 2, dtype=C128), Bent(A), GaussianNoise(0.4))]
    A, B = normal(3, 2, 5) / 3, normal(4, 3, 5) / 3
    return [
        Term(normal(5, 2), Bent(A), GaussianNoise(covariance=Dense(R))),
        Term(normal(6, 3), MatrixOperator(B), GaussianNoise(0.5)),
    ]


@pytest.mark.parametrize("complex_data", [False, True])
def test_mmps_linearises_once_at_the_clean_estimate(complex_data):
    """D + σ² Jᵀ Gᵀ (R + σ² G J Gᵀ)⁻¹ (d − g(D)), G by automatic differentiation of the stacked terms."""
    prior, sigma = gaussian(), 0.6
    problem = InverseProblem(terms=bent_terms(complex_data), prior=prior)
    u = 1.0 + normal(7, 2, 5)
    chunk = problem.select([0, 0], dtype=F64)
    got, residual = MMPS(iterations=8, rtol=1e-11)(chunk, u, sigma, 1.0)
    C = prior.covariance_u.dense()
    J = C @ torch.linalg.inv(C + sigma**2 * torch.eye(5, dtype=F64))

    def physics(v):
        parts = [t.operator(prior.transform(v)) for t in problem.terms]
        flat = torch.cat([p.flatten(1) for p in parts], 1)
        return torch.view_as_real(flat).flatten(1) if flat.is_complex() else flat

    data = torch.cat([t.data.flatten(1) for t in problem.terms], 1)
    data = torch.view_as_real(data).flatten(1) if complex_data else data
    if complex_data:
        R = torch.eye(4, dtype=F64) * 0.4**2 / 2
    else:
        R = torch.block_diag(problem.terms[0].noise.covariance((2,)).dense(), 0.25 * torch.eye(3, dtype=F64))
    for item, estimate in zip(u, got, strict=True):
        fit = prior.mean_u + J @ (item - prior.mean_u)
        G = torch.autograd.functional.jacobian(lambda v: physics(v[None])[0], fit)
        with torch.no_grad():
            v = torch.linalg.solve(R + sigma**2 * G @ J @ G.T, (data - physics(fit[None]))[0])
        torch.testing.assert_close(estimate, fit + sigma**2 * J @ G.T @ v, rtol=1e-8, atol=1e-8)
    assert float(residual.max()) < 1e-9


def test_mmps_samples_a_mildly_bent_problem():
    """A posterior much narrower than the bend: the linearised answer, from a second Gauss–Newton start at the mode."""
    prior = gaussian()
    A = normal(3, 4, 5) / 3
    truth = prior.sample(1, seed=3, dtype=F64)
    operator, noise = Bent(A), 0.02
    with torch.no_grad():
        data = operator(truth) + noise * normal(8, 1, 4)
    problem = InverseProblem(data, operator, GaussianNoise(noise), prior)
    x = GuidedDiffusion(MMPS(iterations=8), "heun", steps=40).solve(problem, 200, seed=1, dtype=F64).samples[0, 0]
    misfit = ((operator(x) - data) / noise).square().sum(1)
    # chi-squared of about as many degrees of freedom as data (a bound: the prior takes a part of them)
    assert 1.5 < float(misfit.mean()) < 7.0


@pytest.mark.parametrize("rule", LINEAR_ONLY, ids=lambda r: type(r).__name__)
def test_other_rules_refuse_non_linear_physics_and_name_what_fits(rule):
    problem = InverseProblem(terms=bent_terms(), prior=gaussian())
    with pytest.raises(TypeError, match=rf"{type(rule).__name__} needs linear operators.*DPS or MMPS.*split"):
        GuidedDiffusion(rule, "sde", steps=4).solve(problem, 1)
    for solver in (GuidedDiffusion(MMPS(), "euler", steps=4), GuidedDiffusion(DPS(0.1), "sde", steps=4)):
        assert bool(torch.isfinite(solver.solve(problem, 2, dtype=F64).samples).all())


@pytest.mark.parametrize("order", [0, 1])
def test_derivatives_that_are_missing_are_named(order):
    problem = InverseProblem(normal(5, 2), Bent(normal(3, 2, 5), order), GaussianNoise(0.4), gaussian())
    with pytest.raises(TypeError, match=rf"second derivatives.*derivative_order {order}"):
        GuidedDiffusion(MMPS(), steps=4).solve(problem, 1)
    if order == 0:
        with pytest.raises(TypeError, match=r"the gradient.*derivative_order 0"):
            GuidedDiffusion(DPS(), steps=4).solve(problem, 1)
    else:
        assert GuidedDiffusion(DPS(0.1), "euler", steps=4).solve(problem, 1).samples.shape[-1] == 5


@pytest.mark.parametrize("solver", [GuidedDiffusion(MMPS(), steps=4), GuidedDiffusion(DPS(), steps=4), DDRM(), DDNM()])
def test_other_noise_is_refused_and_nuisance_parameters_by_ddrm(solver):
    prior = gaussian()
    positive = GaussianPrior.diagonal(torch.ones(1, dtype=F64), torch.full((1,), 0.01, dtype=F64))
    problem = InverseProblem(
        normal(5, 2), MatrixOperator(normal(3, 2, 5)), GaussianNoise("level"), prior, nuisance={"level": positive}
    )
    if not isinstance(solver, GuidedDiffusion):
        with pytest.raises(TypeError, match=r"nuisance parameters \(level\).*split sampler"):
            solver.solve(problem, 1)
    with pytest.raises(TypeError, match="Gaussian noise"):
        solver.solve(InverseProblem(normal(5, 2), MatrixOperator(normal(3, 2, 5)), LaplaceNoise(0.3), prior), 1)


class Failing:
    """The exact denoiser of N(0, 1), but NaN between two noise levels, for the fields a test picks."""

    shape, grid, transform = (3,), None, Affine()
    sigma_data, start_sigma = 1.0, 7.0

    def __init__(self, low, high, victims=None):
        self.low, self.high, self.victims = low, high, victims

    def denoise(self, u, sigma):
        out = u / (1 + sigma**2)
        if not self.low < sigma < self.high:
            return out
        bad = torch.ones_like(u, dtype=torch.bool) if self.victims is None or len(u) == 1 else self.victims(u)
        return torch.where(bad, torch.full_like(out, torch.nan), out)

    def sample(self, n, *, seed=0):
        return torch.zeros(n, 3)


@pytest.mark.parametrize(
    "solver", [GuidedDiffusion(MMPS(), "euler", steps=20), GuidedDiffusion(DPS(0.1), "sde", steps=20), DDRM(steps=20)]
)
def test_a_denoiser_that_fails_at_one_level_is_named_with_it(solver):
    def problem(prior):
        return InverseProblem(normal(5, 2), MatrixOperator(normal(3, 2, 3)), GaussianNoise(0.4), prior)

    levels = solver.levels(problem(Failing(0, 0)))
    bad = levels[8]
    prior = Failing(0.99 * bad, 1.01 * bad)
    with pytest.raises(DivergenceError, match=rf"Failing returns NaN.*sigma = {bad:.4g}"):
        solver.solve(problem(prior), 4, dtype=F64)
    some = Failing(0.99 * bad, 1.01 * bad, lambda u: (u[:, :1] > 0).expand_as(u))
    with pytest.warns(UserWarning, match="NaN") as caught:
        posterior = solver.solve(problem(some), 40, dtype=F64)
    texts = [str(w.message) for w in caught]
    assert any(f"sigma = {bad:.4g}" in t for t in texts)
    assert any("became NaN" in t for t in texts)
    assert 0 < int((posterior.stats["first_bad_step"] >= 0).sum()) < 40


def test_a_schedule_below_the_largest_mode_is_warned_of():
    prior = GaussianPrior.dense(torch.zeros(4, dtype=F64), 2.0 * torch.ones(4, 4, dtype=F64) + torch.eye(4, dtype=F64))
    problem = InverseProblem(normal(5, 2), MatrixOperator(normal(3, 2, 4)), GaussianNoise(0.4), prior)
    for solver in (GuidedDiffusion(steps=4, sigma_max=3.0), DDRM(steps=4, sigma_max=3.0), DDNM(steps=4, sigma_max=3.0)):
        with pytest.warns(UserWarning, match=r"starts at sigma_max = 3, below start_level = 2\d"):
            solver.solve(problem, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GuidedDiffusion(MMPS(), "euler", steps=4).solve(problem, 1)
        GuidedDiffusion(MMPS(), "euler", steps=4, sigma_max=40.0).solve(problem, 1)
    with pytest.raises(ValueError, match="schedule"), pytest.warns(UserWarning, match="start_level"):
        GuidedDiffusion(MMPS(), "euler", steps=4, sigma_max=0.001).solve(problem, 1)


def test_inner_solves_that_miss_their_tolerance_are_counted():
    prior = gaussian()
    problem = InverseProblem(normal(5, 4), MatrixOperator(normal(3, 4, 5)), GaussianNoise(0.05), prior)
    short = GuidedDiffusion(MMPS(iterations=1, rtol=1e-4), "heun", steps=10).solve(problem, 3, dtype=F64)
    enough = GuidedDiffusion(MMPS(iterations=5, rtol=1e-4), "heun", steps=10).solve(problem, 3, dtype=F64)
    calls = 1 + 2 * 9 + 1  # the start, nine Heun steps, the last denoising
    assert bool((short.stats["unconverged"] > 5).all())
    assert bool((short.stats["unconverged"] <= calls).all())
    assert bool((short.stats["residual"] > 1e-2).all())
    assert bool((enough.stats["unconverged"] == 0).all())


def test_the_exact_matrix_has_a_limit_that_says_what_to_use():
    prior = GaussianPrior.diagonal(0.0, torch.ones(40, dtype=F64))
    problem = InverseProblem(torch.zeros(30), MatrixOperator(normal(3, 30, 40)), GaussianNoise(0.1), prior)
    with pytest.raises(TypeError, match=r"30 × 30 data.*limit of 20.*MMPS"):
        GuidedDiffusion(TMPD("exact", limit=20)).solve(problem, 1)
    with pytest.raises(ValueError, match="row-sum"):
        TMPD("diagonal")
    with pytest.raises(ValueError, match="diagonal"):
        ConvolvedLikelihood("row-sum")


def network_problem():
    torch.manual_seed(0)
    network = MLPDenoiser(6, width=8, depth=1)
    for p in network.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    prior = DiffusionPrior(network.eval().requires_grad_(False), (6,), transform=Affine(1.0, 2.0))
    return InverseProblem(normal(5, 3).float(), MatrixOperator(normal(3, 3, 6).float()), GaussianNoise(0.4), prior)


def test_compiled_steps_give_the_same_samples_and_leave_the_prior_alone():
    problem = network_problem()
    network = problem.prior.network
    plain = GuidedDiffusion(MMPS(iterations=2, rtol=0), "euler", steps=5)
    fast = GuidedDiffusion(MMPS(iterations=2, rtol=0), "euler", steps=5, compile=True)
    want = plain.solve(problem, 4, seed=2)
    try:
        got = fast.solve(problem, 4, seed=2)
    except RuntimeError as error:
        if "needs a compiler" not in str(error):
            raise
        pytest.skip("torch.compile finds no compiler here")
    torch.testing.assert_close(got.samples, want.samples, rtol=1e-3, atol=1e-3)
    assert got.counts["network"] == want.counts["network"]
    assert problem.prior.network is network


def test_compile_without_a_compiler_or_a_network_is_an_error_that_says_so(monkeypatch):
    def broken(*_, **__):
        raise OSError("no working C++ compiler")

    with pytest.raises(TypeError, match="GaussianPrior has none"):
        GuidedDiffusion(compile=True).solve(
            InverseProblem(normal(5, 2), MatrixOperator(normal(3, 2, 5)), GaussianNoise(0.4), gaussian()), 1
        )
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(RuntimeError, match=r"needs a compiler.*no working C\+\+ compiler.*leave compile off"):
        GuidedDiffusion(compile=True, steps=4).solve(network_problem(), 1)


@pytest.mark.parametrize("bad", [{"integrator": "rk4"}, {"steps": 1}, {"corrections": -1}, {"correction_step": 2.5}])
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=r"must be|needs"):
        GuidedDiffusion(**bad)


def test_halving_the_steps_doubles_the_error_of_euler():
    """The probability-flow ODE of N(0, 1) seen through noise is linear: two of its paths tell the ratio of spreads."""
    problem = InverseProblem(
        torch.zeros(1, dtype=F64),
        MatrixOperator(torch.ones(1, 1, dtype=F64)),
        GaussianNoise(0.5),
        GaussianPrior.diagonal(torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64)),
    )

    def apart(integrator, steps):
        x = GuidedDiffusion(MMPS(), integrator, steps=steps).solve(problem, 2, seed=0, dtype=F64).samples.flatten()
        return float(x[0] - x[1])

    exact = apart("heun", 300)
    coarse, fine = (apart("euler", steps) / exact - 1 for steps in (50, 100))
    assert coarse / fine == pytest.approx(2.0, rel=0.15)
