"""Gradient chains against closed forms; the kernel alone from exact draws; the mass matrix; bad likelihoods; kills."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from invgen.contracts import Operator
from invgen.diagnostics import ess
from invgen.driver import Streams
from invgen.noise import GaussianNoise
from invgen.operators import MatrixOperator
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem
from invgen.solvers import HMC, MALA, NUTS, ExactGaussian, _metric, _warmup, hmc, nuts
from invgen.solvers._target import target_of
from invgen.transforms import Affine

F64 = torch.float64
DIM = 8


def _randn(g, *shape):
    return torch.randn(*shape, generator=g, dtype=F64)


def _problem(n_obs=1, spread=2.0):
    """Correlated unknowns with a mean, x = 2 + 3u, and data whose precision in z spans 1 to 10^(2·spread)."""
    g = torch.Generator().manual_seed(3)
    root = _randn(g, DIM, DIM) / 2
    prior = GaussianPrior(
        3 + _randn(g, DIM), root @ root.T + 0.2 * torch.eye(DIM, dtype=F64), transform=Affine(2.0, 3.0)
    )
    A = _randn(g, DIM, DIM) * torch.logspace(-1, spread - 1, DIM, dtype=F64)[:, None]
    operator = MatrixOperator(A / 3)
    data = operator(prior.sample(n_obs, seed=5).double()) + _randn(g, n_obs, DIM)
    return InverseProblem(data, operator, GaussianNoise(1.0), prior)


def _moments(problem):
    mean, covariance = ExactGaussian().moments(problem)
    return mean, covariance.reshape(-1, DIM, DIM)[0]


def _whitened(problem, x):
    """Draws `(…, DIM)` of the first observation in units of its posterior: N(0, I)."""
    mean, covariance = _moments(problem)
    return torch.linalg.solve_triangular(
        torch.linalg.cholesky(covariance), (x.double() - mean[0]).reshape(-1, DIM).T, upper=False
    ).T.reshape(x.shape)


@pytest.mark.parametrize(
    ("solver", "chains"),
    [
        (HMC(draws=100, warmup=80), 16),
        (HMC(draws=150, warmup=80, space="u"), 8),
        (HMC(draws=100, warmup=80, mass="low-rank", rank=3), 16),
        (HMC(draws=100, warmup=80, mass="curvature"), 16),
        (HMC(draws=100, warmup=80, mass="curvature", rank=3), 16),
        (MALA(draws=300, warmup=100), 16),
        (NUTS(draws=40, warmup=60), 16),
    ],
    ids=["hmc", "hmc-u", "hmc-rank", "HMC curvature", "HMC curvature 3", "mala", "nuts"],
)
def test_moments_of_a_badly_scaled_gaussian_are_exact(solver, chains):
    problem = _problem()
    posterior = solver.solve(problem, chains, dtype=F64)
    z = _whitened(problem, posterior.samples[0])
    assert float(ess(z).min()) > 100
    squares = z.square()
    first = z.mean((0, 1)) * torch.as_tensor(ess(z, kind="mean")).sqrt()
    second = (squares.mean((0, 1)) - 1) * (torch.as_tensor(ess(squares, kind="mean")) / 2).sqrt()
    # 16 scores in each of 6 cases: 4.8 is a family-wise 1e-4 for normal scores, room for the error of the ESS
    assert float(first.abs().max()) < 4.8
    assert float(second.abs().max()) < 4.8
    assert posterior.kind == "exact"


KERNELS = [
    pytest.param(HMC(draws=1, warmup=0, thin=8, step_size=0.23, length=0.57, mass="identity"), hmc, id="hmc"),
    pytest.param(MALA(draws=1, warmup=0, thin=8, step_size=0.23, mass="identity"), hmc, id="mala"),
    pytest.param(NUTS(draws=1, warmup=0, thin=4, step_size=0.23, mass="identity"), nuts, id="nuts"),
]


def _drift(solver, chains=3000):
    """Smallest p-value that 16 whitened directions and the squared norm stay as they started: exact draws."""
    problem = _problem(spread=1.0)
    exact = ExactGaussian().solve(problem, chains, seed=8, dtype=F64).samples.reshape(chains, DIM)
    prior = problem.prior
    u = (exact - 2.0) / 3.0
    L = prior.decode(torch.eye(DIM, dtype=F64)) - prior.decode(torch.zeros(1, DIM, dtype=F64))
    z0 = torch.linalg.solve(L.T / 3.0, (u - prior.mean_u.double()).T).T
    posterior = type(solver)(**{**solver.__dict__, "starts": z0}).solve(problem, chains, dtype=F64)
    z = _whitened(problem, posterior.samples[0, :, 0]).numpy()
    assert 0.3 < float(posterior.stats["accept"].mean()) < 0.97, "the acceptance step must matter"
    moved = np.abs(z - _whitened(problem, exact).numpy()).mean()
    assert moved > 0.1, "the chains must move"
    turned = z @ np.linalg.qr(np.random.default_rng(0).standard_normal((DIM, DIM)))[0]
    p = [stats.kstest(c, "norm").pvalue for c in (*z.T, *turned.T)]
    return min(*p, stats.kstest((z**2).sum(1), "chi2", args=(DIM,)).pvalue)


@pytest.mark.parametrize(("solver", "module"), KERNELS)
def test_exact_draws_stay_exact(solver, module):
    assert _drift(solver) > 1e-3 / (3 * 17)


@pytest.mark.parametrize(("solver", "module"), KERNELS)
def test_a_wrong_energy_would_be_seen(solver, module, monkeypatch):
    monkeypatch.setattr(module, "potential", lambda t, q, phi: 0.7 * (phi + 0.5 * q.square().sum(1)))
    assert _drift(solver) < 1e-6


def test_the_mass_matrix_of_a_gaussian_is_its_covariance_wherever_the_chains_are():
    """Σ Cov(∇U) Σ = Cov(q) has the solution C for ∇U = C⁻¹(q − m) and any law of q."""
    g = torch.Generator().manual_seed(0)
    root = _randn(g, 2, 6, 6)
    C = root @ root.mT + 0.05 * torch.eye(6, dtype=F64)
    q = 100 + 7 * torch.rand(2, 5000, 6, generator=g, dtype=F64) ** 3  # neither the mean, the scale nor the law
    gradient = torch.linalg.solve(C, (q - 1).mT).mT
    q[0, 0], gradient[1, 3] = math.nan, math.nan  # lost chains stay out of the sums
    state = _metric.unit_metric(2, 6, 6, q[0, 1]).entries() | _metric.no_moments(2, 6, True, q[0, 1])
    state |= _metric.add_moments(state, q, gradient)
    metric, longest = _metric.learn_metric(state, shrink=False)
    eye = torch.eye(6, dtype=F64).expand(2, 6, 6)
    L = torch.linalg.cholesky(C)
    left = torch.linalg.solve_triangular(L, metric.apply(eye), upper=False)
    ratios = torch.linalg.eigvalsh(torch.linalg.solve_triangular(L, left.mT, upper=False))
    assert float((ratios - 1).abs().max()) < 0.15, "one draw of 5000 is worth the identity; the condition of C is 1e3"
    assert float(torch.linalg.cond(C).max()) > 100
    torch.testing.assert_close(metric.inverse(metric.apply(eye)), eye.clone(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(metric.root(metric.root_transpose(eye)), metric.apply(eye), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(longest, torch.ones(2, dtype=F64))
    thin = _metric.unit_metric(2, 6, 2, q[0, 1])
    metric, _ = _metric.learn_metric(state | thin.entries(), shrink=False)
    assert metric.basis.shape == (2, 6, 2)
    assert not metric.dense.numel()
    torch.testing.assert_close(metric.root(metric.root_transpose(eye)), metric.apply(eye), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("warmup", [20, 50, 200, 500, 1000])
def test_windows_fill_the_slow_part_and_double(warmup):
    first, ends = _warmup.windows(warmup)
    lengths = np.diff([first, *ends])
    assert 0 < first < ends[0]
    assert ends[-1] < warmup
    assert (lengths[1:] >= lengths[:-1]).all()
    assert _warmup.windows(19) == (0, [])


def test_a_rejection_is_no_stuck_chain():
    """Four chains that accept 0.8 on average keep the step; one that never moves brings it down to a tenth."""
    g = torch.Generator().manual_seed(1)
    rate = torch.full((1, 4), 0.8, dtype=F64)
    judged = []
    for _ in range(400):
        accepted = (torch.rand(1, 4, generator=g, dtype=F64) < 0.8).to(F64)
        value, rate = _warmup.pooled_acceptance(rate, accepted)
        judged.append(float(value))
    assert 0.7 < np.mean(judged) < 0.8  # the harmonic mean of rates over eight steps lies a few per cent below theirs
    for _ in range(40):
        value, rate = _warmup.pooled_acceptance(rate, torch.tensor([[0.8, 0.8, 0.0, 0.8]], dtype=F64))
    assert float(value) < 0.08
    lost = torch.tensor([[0.8, math.nan, math.nan, 0.8]], dtype=F64)
    value, after = _warmup.pooled_acceptance(torch.full((1, 4), 0.8, dtype=F64), lost)
    torch.testing.assert_close(value, torch.tensor([0.8], dtype=F64))
    torch.testing.assert_close(after, torch.full((1, 4), 0.8, dtype=F64))


def test_trajectories_of_unequal_numbers_of_leaps_are_those_of_each_observation_alone():
    """Observations that are done leave the batch: what the others do, and they themselves, must not notice."""
    problem, chains = _problem(n_obs=5), 3
    g = torch.Generator().manual_seed(2)
    q, xi = _randn(g, 5, chains, DIM), _randn(g, 5, chains, DIM)
    root = _randn(g, 5, DIM, DIM) / 3
    metric = _metric.unit_metric(5, DIM, DIM, q[0, 0])._replace(
        dense=torch.linalg.cholesky(root @ root.mT + torch.eye(DIM, dtype=F64))
    )
    step, counts = torch.linspace(0.01, 0.05, 5, dtype=F64), [1.0, 7.0, 2.0, 13.0, 2.0]
    target = target_of(problem.select([i for i in range(5) for _ in range(chains)]), "z")
    _, gradient = target.value_and_grad(q.flatten(0, 1))
    force = (gradient + q.flatten(0, 1)).unflatten(0, (5, chains))
    phi, *ends = hmc._leapfrog(target, metric, q, xi, force, step, counts)
    for i, count in enumerate(counts):
        alone = target_of(problem.select([i] * chains), "z")
        part = slice(i, i + 1)
        lone_phi, *lone = hmc._leapfrog(
            alone, metric.of_some(torch.tensor([i])), q[part], xi[part], force[part], step[part], [count]
        )
        torch.testing.assert_close(phi.unflatten(0, (5, chains))[i], lone_phi)
        for together, single in zip(ends, lone, strict=True):
            torch.testing.assert_close(together[part], single)


def test_a_new_mass_matrix_keeps_what_the_length_has_gained(monkeypatch):
    """The first matrix sets a quarter of a turn, whatever was before; the next ones keep a longer trajectory."""
    ends = _warmup.windows(60)[1]
    assert len(ends) > 1
    after = {}
    plain = HMC.learn

    def watched(self, target, state, acceptance, rng, clock):
        if clock + 1 in ends:
            state = state | {"log_length": torch.full_like(state["log_length"], math.log(40.0))}
        new = plain(self, target, state, acceptance, rng, clock)
        after[clock + 1] = float(new["log_length"].exp().min()) if "log_length" in new else None
        return new

    monkeypatch.setattr(HMC, "learn", watched)
    HMC(draws=1, warmup=60).solve(_problem(), 8, seed=3, dtype=F64)
    assert after[ends[0]] < 39
    assert all(after[end] >= 39 for end in ends[1:])


def test_jitter_is_the_sequence_of_van_der_corput():
    assert [_warmup.radical_inverse(n) for n in range(1, 6)] == [0.5, 0.25, 0.75, 0.125, 0.625]


class Undefined(Operator):
    """The identity, NaN where the first number is below −1.5."""

    def __init__(self):
        super().__init__((2,), (2,))

    def forward(self, x, **theta):
        return torch.where(x[:, :1] < -1.5, torch.full_like(x, math.nan), x)


@pytest.mark.parametrize("solver", [HMC(draws=150, warmup=60), NUTS(draws=60, warmup=60)], ids=["hmc", "nuts"])
def test_an_undefined_likelihood_is_rejected_and_counted(solver):
    """The posterior is the Gaussian truncated to where the likelihood is defined: mean φ(1.5)/Φ(1.5)."""
    prior = GaussianPrior.diagonal(torch.tensor([0.0, 1.0], dtype=F64), torch.ones(2, dtype=F64))
    problem = InverseProblem(torch.zeros(2, dtype=F64), Undefined(), GaussianNoise(1e3), prior)
    posterior = solver.solve(problem, 24, dtype=F64)
    x = posterior.samples[0]
    assert float(posterior.stats["invalid"].max()) > 0
    assert bool((x[..., 0] >= -1.5).all())
    error = float(x[..., 0].std() / math.sqrt(float(ess(x[..., :1], kind="mean")[0])))
    assert abs(float(x[..., 0].mean()) - stats.norm.pdf(1.5) / stats.norm.cdf(1.5)) < 4.5 * error


def test_a_lost_chain_leaves_the_others_as_they_are():
    """A start without a finite likelihood is NaN for good; the pools leave it out."""
    problem = _problem(spread=1.0)
    starts = _randn(torch.Generator().manual_seed(1), 6, DIM)
    starts[2] = math.nan
    with pytest.warns(UserWarning, match="became NaN"):
        posterior = HMC(draws=20, warmup=60, starts=starts).solve(problem, 6, dtype=F64)
    finite = torch.isfinite(posterior.samples[0]).all(2).all(1)
    assert finite.tolist() == [True, True, False, True, True, True]
    assert bool((posterior.stats["accept"][0, finite].mean(1) > 0.2).all())


@pytest.mark.parametrize(
    "solver", [HMC(draws=8, warmup=24), NUTS(draws=4, warmup=24, max_depth=5)], ids=["hmc", "nuts"]
)
def test_killed_and_resumed_chains_are_the_same_to_the_bit(solver, tmp_path):
    problem = _problem(n_obs=2, spread=1.0)
    whole = solver.solve(problem, 3, dtype=F64)
    for at in (3, 17, 26):
        path = tmp_path / f"{at}.safetensors"

        def stop(step, state, at=at):
            if step == at:
                raise RuntimeError("killed")

        with pytest.raises(RuntimeError, match="killed"):
            solver.solve(problem, 3, dtype=F64, checkpoint=path, save_seconds=0.0, chunk=6, callbacks=[stop])
        again = solver.solve(problem, 3, dtype=F64, checkpoint=path, chunk=6)
        reference = solver.solve(problem, 3, dtype=F64, chunk=6)
        assert torch.equal(again.samples, reference.samples)
        torch.testing.assert_close(again.samples, whole.samples, rtol=1e-8, atol=1e-8)


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="mass"):
        HMC(mass="dense")
    with pytest.raises(ValueError, match="step_size"):
        HMC(step_size=0.0)
    with pytest.raises(ValueError, match="max_depth"):
        NUTS(max_depth=0)
    with pytest.raises(ValueError, match="length"):
        HMC(length=-1.0)


def test_the_curvature_of_a_linear_problem_is_the_posterior_precision():
    problem = _problem()
    solver = HMC(draws=1, warmup=0, mass="curvature", step_size=0.1)
    mine = problem.select([0] * 4, dtype=F64)
    state = solver.init(mine, Streams(0, [(0, s) for s in range(4)]))
    metric = _metric.Metric.of(state)
    root = torch.linalg.cholesky(problem.prior.covariance_u.dense())
    A = 3.0 * problem.terms[0].operator.matrix @ root  # x = 2 + 3 u, u = mean + root z, noise 1
    exact = torch.linalg.inv(torch.eye(DIM, dtype=F64) + A.T @ A)
    found = metric.apply(torch.eye(DIM, dtype=F64)[None])[0]
    # directions with a curvature below 0.01 are left out: their variance is 1 instead of 1/1.01
    torch.testing.assert_close(found, exact, rtol=0, atol=0.01)


def test_a_curvature_needs_gaussian_noise_and_a_latent_space():
    problem = _problem()
    with pytest.raises(ValueError, match="latent space alone"):
        HMC(draws=1, warmup=1, mass="curvature", space="u").solve(problem, 2)
