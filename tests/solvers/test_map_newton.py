"""Newton methods, coarse-to-fine misfits, early stops and nuisance parameters of MAP, against closed forms and grids."""

from __future__ import annotations

import math

import pytest
import torch

from invgen.contracts import Operator
from invgen.noise import GaussianNoise, LaplaceNoise
from invgen.operators import MatrixOperator
from invgen.priors import GaussianMixturePrior, GaussianPrior
from invgen.problem import InverseProblem, Term
from invgen.solvers import MAP, ExactGaussian, _newton
from invgen.solvers._stages import low_pass
from invgen.solvers._whitened import Curvature
from invgen.transforms import Affine, Exp

F64 = torch.float64
NEWTON = ("gauss_newton", "levenberg_marquardt")


def _randn(g, *shape):
    return torch.randn(*shape, generator=g, dtype=F64)


def _linear(transform=None, n_obs=3):
    g = torch.Generator().manual_seed(1)
    root = _randn(g, 16, 16) / 4
    prior = GaussianPrior(
        _randn(g, 16), root @ root.T + 0.3 * torch.eye(16, dtype=F64), transform=transform or Affine(2.0, 3.0)
    )
    return InverseProblem(5 * _randn(g, n_obs, 8), MatrixOperator(_randn(g, 8, 16) / 3), GaussianNoise(0.2), prior)


def _bent(noise=0.05, **more):
    """The exponential of a correlated field through a blur."""
    g = torch.Generator().manual_seed(0)
    t = torch.arange(32, dtype=F64)
    prior = GaussianPrior(
        torch.full((32,), 0.5, dtype=F64), 0.3 * torch.exp(-(t[:, None] - t).abs() / 10), transform=Exp()
    )
    A = MatrixOperator(torch.exp(-0.5 * ((t[::2, None] - t) / 2) ** 2) / 5)
    data = A(prior.sample(2, seed=1).double()) + 0.05 * _randn(g, 2, 16)
    return InverseProblem(data, A, GaussianNoise(noise), prior, **more)


@pytest.mark.parametrize("space", ["u", "z"])
@pytest.mark.parametrize("optimizer", NEWTON)
def test_linear_gaussian_newton_is_the_closed_form_mean_in_few_iterations(space, optimizer):
    problem = _linear()
    mean, _ = ExactGaussian().moments(problem)
    found = MAP(space=space, optimizer=optimizer, tol=1e-10, keep="all").solve(problem, 2, dtype=F64)
    torch.testing.assert_close(found.samples[:, 0], mean[:, None].expand(-1, 2, -1), rtol=0, atol=1e-6)
    assert bool(found.stats["converged"].all())
    assert int(found.stats["iterations"].max()) <= (5 if optimizer == "gauss_newton" else 15)


def test_starts_and_padded_covariances_are_whitened():
    """u = μ + L w with more w than u: the shortest w is the start, the mode is that of u."""
    prior = GaussianPrior.stationary((1, 12), length=3.0, variance=0.5, kind="exponential", padding=8, mean=1.0)
    g = torch.Generator().manual_seed(2)
    A = MatrixOperator(_randn(g, 5, 12), (1, 12))
    problem = InverseProblem(_randn(g, 5), A, GaussianNoise(0.3), prior)
    mean, _ = ExactGaussian().moments(problem)
    for starts in ("prior", "centre", mean):
        found = MAP(space="u", optimizer="gauss_newton", starts=starts, tol=1e-9).solve(problem, 1, dtype=F64)
        torch.testing.assert_close(found.samples[:, 0, 0], mean, rtol=0, atol=1e-6)
    assert int(found.stats["iterations"].max()) <= 1


def test_all_optimisers_find_the_mode_of_a_bent_problem_and_newton_needs_few_steps():
    problem = _bent()
    found = {
        o: MAP(space="z", optimizer=o, iterations=500, keep="all").solve(problem, 6, dtype=F64)
        for o in ("lbfgs", *NEWTON)
    }
    lowest = found["lbfgs"].stats["objective"].min()
    for o in NEWTON:
        assert bool(found[o].stats["converged"].all())
        torch.testing.assert_close(
            found[o].stats["objective"], found["lbfgs"].stats["objective"], rtol=1e-5, atol=float(1e-5 * lowest.abs())
        )
        assert int(found[o].stats["iterations"].max()) < 40
        assert found[o].counts["forward"] < found["lbfgs"].counts["forward"] / 3
    assert bool(MAP(space="z", optimizer=NEWTON[1]).solve(problem, 3).stats["converged"].all())  # float32


def _least_squares(residual):
    """½|r(v)|² + ½|v|² with its dense Jacobian, item by item."""

    def objective(v):
        return 0.5 * residual(v).square().sum(1) + 0.5 * v.square().sum(1)

    def linearise(v):
        J = torch.func.vmap(torch.func.jacrev(lambda w: residual(w[None])[0]))(v)
        return Curvature(lambda w: torch.einsum("bij,bj->bi", J, w), lambda w: torch.einsum("bij,bi->bj", J, w))

    return objective, linearise


def test_a_newton_step_is_the_dense_one():
    g = torch.Generator().manual_seed(4)
    M = _randn(g, 7, 5)
    objective, linearise = _least_squares(lambda v: torch.sin(v) @ M.T - 1)
    v = 0.1 * _randn(g, 3, 5)
    state = _newton.start(objective, v, 1e-12)
    J = M * torch.cos(v)[:, None, :]
    H = torch.eye(5, dtype=F64) + J.mT @ J
    wanted = v - torch.linalg.solve(H, state["g"])
    plain = _newton.newton_step(objective, linearise, state, damped=False, inner=50)
    torch.testing.assert_close(plain["v"], wanted, rtol=1e-3, atol=1e-3)
    state["damping"] = torch.tensor([5.0, 0.1, 40.0], dtype=F64)
    damped = _newton.newton_step(objective, linearise, state, damped=True, inner=50)
    shifted = H + state["damping"][:, None, None] * torch.eye(5, dtype=F64)
    torch.testing.assert_close(damped["v"], v - torch.linalg.solve(shifted, state["g"]), rtol=1e-3, atol=1e-3)


def test_damping_refuses_what_makes_it_worse_and_gets_there():
    """A valley with a wall: full steps overshoot. Damping grows until a step is taken, then eases off."""
    objective, linearise = _least_squares(
        lambda v: torch.stack([30 * (v[:, 1] - v[:, 0].square()), 5 * (1 - v[:, 0])], dim=1)
    )
    g = torch.Generator().manual_seed(4)
    state = _newton.start(objective, 3 * _randn(g, 20, 2), 1e-12)
    refused = False
    for _ in range(200):
        before = state
        state = _newton.newton_step(objective, linearise, state, damped=True, inner=20)
        assert bool((state["f"] <= before["f"] * (1 + 1e-14)).all())
        refused = refused or bool((state["growth"] > 2).any())
    assert refused
    lowest = objective(torch.cartesian_prod(*[torch.linspace(0.5, 1.2, 701, dtype=F64)] * 2)).min()
    assert float(state["f"].max()) <= float(lowest)
    assert float(state["g"].norm(dim=1).max()) < 1e-6
    assert not bool(state["active"].any())


def test_an_item_does_not_feel_the_others():
    objective, linearise = _least_squares(lambda v: torch.stack([v[:, 0].exp() - 3, v[:, 1].pow(3) + v[:, 0]], dim=1))
    g = torch.Generator().manual_seed(6)
    v = _randn(g, 6, 2)
    ends = []
    for points in (v, v[:1]):
        state = _newton.start(objective, points, 1e-12)
        for _ in range(4):
            state = _newton.newton_step(objective, linearise, state, damped=True, inner=20)
        ends.append(state["v"][0])
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-9)


# --- nuisance parameters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["lbfgs", *NEWTON])
def test_joint_mode_of_a_latent_and_a_noise_level_against_a_grid(optimizer):
    prior = GaussianPrior(torch.tensor([1.0], dtype=F64), torch.tensor([[0.25]], dtype=F64), transform=Exp())
    level = GaussianPrior(torch.tensor([-1.0], dtype=F64), torch.tensor([[0.5]], dtype=F64), transform=Exp())
    data = torch.tensor([2.0, 2.9, 2.4, 3.3], dtype=F64)
    A = MatrixOperator(torch.ones(4, 1, dtype=F64))
    problem = InverseProblem(data, A, GaussianNoise("s"), prior, nuisance={"s": level})
    found = MAP(space="z", optimizer=optimizer, tol=1e-9).solve(problem, 5, dtype=F64)
    axis = torch.linspace(-3, 3, 1201, dtype=F64)
    z, v = torch.meshgrid(axis, axis, indexing="ij")
    x, s = (1 + 0.5 * z).exp(), (-1 + math.sqrt(0.5) * v).exp()
    f = 0.5 * ((data - x[..., None]) / s[..., None]).square().sum(-1) + 4 * s.log() + 0.5 * z**2 + 0.5 * v**2
    best = int(f.argmin())
    assert float(found.latent) == pytest.approx(float(z.flatten()[best]), abs=0.004)
    assert float(found.theta["s"]) == pytest.approx(float(s.flatten()[best]), rel=0.004)
    assert found.theta["s"].shape == (1, 1, 1)
    assert found.latent.shape == (1, 1, 1, 1)
    assert "chi2" not in found.stats
    with pytest.raises(TypeError, match="space='z'"):
        MAP(space="u").solve(problem, 1)


def test_levels_that_overflow_are_a_no_to_the_search_not_an_error():
    level = GaussianPrior(torch.tensor([0.0], dtype=F64), torch.tensor([[1e4]], dtype=F64), transform=Exp())
    problem = InverseProblem(
        torch.zeros(2, dtype=F64),
        MatrixOperator(torch.eye(2, dtype=F64)),
        GaussianNoise("s"),
        GaussianPrior(torch.ones(2, dtype=F64), 1.0),
        nuisance={"s": level},
    )
    with pytest.warns(UserWarning, match="became NaN"):  # some starts overflow themselves
        found = MAP(space="z", keep="all", iterations=60).solve(problem, 20)
    assert bool(torch.isfinite(found.samples).any())


# --- from coarse to fine -----------------------------------------------------------------------------------------------


def test_low_pass_keeps_what_is_below_the_corner_and_1_changes_nothing():
    n = 64
    t = torch.arange(n, dtype=F64)
    v = torch.stack([torch.cos(math.pi * k * (t + 0.5) / n) for k in (2, 60)])[:, None]  # at 1/32 and 15/16 of Nyquist
    out = low_pass(v, torch.tensor([4.0, 4.0], dtype=F64))
    torch.testing.assert_close(out[0], v[0], rtol=0, atol=1e-3)
    assert float(out[1].abs().max()) < 0.01
    half = torch.cos(math.pi * 16 * (t + 0.5) / n)[None]  # the corner itself: 1/√2
    torch.testing.assert_close(low_pass(half, torch.tensor([4.0], dtype=F64)), half / math.sqrt(2))
    torch.testing.assert_close(low_pass(v, torch.ones(2, dtype=F64)), v)
    both = low_pass(torch.complex(v, 2 * v), torch.tensor([4.0, 1.0], dtype=F64))
    torch.testing.assert_close(both.imag[0], 2 * out[0])
    a, b = _randn(torch.Generator().manual_seed(1), 2, 1, n)
    s = torch.tensor([3.0], dtype=F64)
    torch.testing.assert_close((low_pass(a, s) * b).sum(), (a * low_pass(b, s)).sum())  # zero phase: symmetric


class Arrival(Operator):
    """A wavelet that arrives at time x: its misfit has a local minimum a period away."""

    def __init__(self, n=200):
        super().__init__((1,), (1, n))
        self.n = n

    def forward(self, x, **theta):
        t = torch.arange(self.n, dtype=x.dtype) - self.n / 2
        a = (math.pi * 0.06 * (t - x)).square()
        return ((1 - 2 * a) * (-a).exp())[:, None]


@pytest.mark.parametrize("optimizer", ["lbfgs", "levenberg_marquardt"])
def test_stages_cross_the_local_minima_of_a_shifted_wavelet(optimizer):
    prior = GaussianPrior(torch.zeros(1, dtype=F64), torch.tensor([[400.0]], dtype=F64))
    operator = Arrival()
    problem = InverseProblem(operator(torch.tensor([[12.0]], dtype=F64)), operator, GaussianNoise(0.05), prior)
    starts = torch.linspace(-4.0, 1.0, 6, dtype=F64)[:, None] / 20
    fixed = {"space": "z", "optimizer": optimizer, "starts": starts, "keep": "all"}
    direct = MAP(**fixed).solve(problem, 6, dtype=F64)
    staged = MAP(**fixed, stages=(50.0, 25.0, 12.0, 1.0), iterations=800).solve(problem, 6, dtype=F64)
    assert bool((direct.samples[..., 0] - 12).abs().max() > 3)
    torch.testing.assert_close(staged.samples, torch.full_like(staged.samples, 12.0), rtol=0, atol=0.02)
    want = -problem.latent_log_posterior(staged.latent.flatten(0, 2)) - 200 * math.log(0.05 * math.sqrt(2 * math.pi))
    torch.testing.assert_close(staged.stats["objective"].flatten(), want, rtol=1e-9, atol=1e-9)
    assert bool(staged.stats["converged"].all())


@pytest.mark.parametrize("coarse", ["lowpass", "sigma"])
@pytest.mark.parametrize("optimizer", ["lbfgs", "gauss_newton", "levenberg_marquardt"])
def test_stages_end_in_the_mode_of_the_misfit_itself(coarse, optimizer):
    """Two terms, a mask, several observations: where the problem has one mode, stages change nothing."""
    g = torch.Generator().manual_seed(1)
    mask = torch.rand(8, generator=g) > 0.3
    base = _linear()
    term = base.terms[0]
    terms = [
        Term(term.data, term.operator, term.noise, mask),
        Term(_randn(g, 5), MatrixOperator(_randn(g, 5, 16)), GaussianNoise(0.5)),
    ]
    problem = InverseProblem(terms=terms, prior=base.prior)
    mean, _ = ExactGaussian().moments(problem)
    solver = MAP(space="z", optimizer=optimizer, stages=(4.0, 2.0, 1.0), coarse=coarse, tol=1e-9, iterations=900)
    found = solver.solve(problem, 2, dtype=F64)
    torch.testing.assert_close(found.samples[:, 0, 0], mean, rtol=0, atol=1e-6)


def test_non_gaussian_noise_takes_wider_stages_only():
    problem = _linear()
    term = problem.terms[0]
    heavy = InverseProblem(term.data, term.operator, LaplaceNoise(0.3), problem.prior)
    wide = MAP(space="z", stages=(4.0, 1.0), coarse="sigma", optimizer="adam", iterations=50).solve(heavy, 1, dtype=F64)
    assert bool(torch.isfinite(wide.samples).all())
    with pytest.raises(TypeError, match="lowpass"):
        MAP(space="z", stages=(4.0, 1.0)).solve(heavy, 1)


# --- the discrepancy principle -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam", "levenberg_marquardt"])
def test_starts_stop_where_the_misfit_is_as_large_as_the_noise(optimizer):
    problem = _bent()
    whole = MAP(space="z", optimizer=optimizer, keep="all", iterations=400).solve(problem, 4, dtype=F64)
    early = MAP(space="z", optimizer=optimizer, keep="all", iterations=400, stop_chi2=1.0).solve(problem, 4, dtype=F64)
    stopped = early.stats["stopped"]
    assert bool(stopped.any())
    chi2 = early.stats["chi2"]
    residual = problem.terms[0].data[:, None, None] - early.predict()[0]
    torch.testing.assert_close(chi2, (residual / 0.05).square().mean(-1))
    assert float(chi2[stopped].max()) <= 1.0
    assert float(whole.stats["chi2"].mean()) < float(chi2.mean())  # the mode fits more than that
    assert bool((early.stats["iterations"] <= whole.stats["iterations"])[stopped].all())
    assert not bool((early.stats["converged"] & stopped).any())


# --- what it refuses ---------------------------------------------------------------------------------------------------


def test_newton_says_what_it_needs():
    problem = _linear()
    term = problem.terms[0]
    with pytest.raises(TypeError, match="quadratic"):
        MAP(space="x", optimizer="gauss_newton").solve(problem, 1)
    heavy = InverseProblem(term.data, term.operator, LaplaceNoise(1.0), problem.prior)
    with pytest.raises(TypeError, match=r"Gaussian noise.*LaplaceNoise"):
        MAP(space="z", optimizer="levenberg_marquardt").solve(heavy, 1)
    with pytest.raises(TypeError, match="known level"):
        MAP(space="z", stop_chi2=1.0).solve(heavy, 1)
    eye = torch.eye(16, dtype=F64)
    mixture = GaussianMixturePrior([1.0], torch.zeros(1, 16, dtype=F64), eye[None])
    with pytest.raises(TypeError, match="Gaussian prior"):
        MAP(space="u", optimizer="gauss_newton").solve(InverseProblem(term.data, term.operator, term.noise, mixture), 1)
    for bad in ({"stages": ()}, {"stages": (2.0, 4.0, 1.0)}, {"stages": (4.0, 2.0)}, {"coarse": "blur"}, {"stop_chi2": 0.0}, {"inner": 0}):  # fmt: skip
        with pytest.raises(ValueError, match="MAP"):
            MAP(**bad)
