"""Neural estimators of vectors: against exact posteriors, on disk, and with data they should refuse."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from invgen.diagnostics import calibrate
from invgen.noise import GaussianNoise
from invgen.operators import MatrixOperator
from invgen.priors import GaussianPrior, UniformPrior
from invgen.problem import InverseProblem, Term
from invgen.simulations import Simulations
from invgen.solvers import FMPE, NLE, NPE, NPSE, NRE, AmortizedPosterior, ExactGaussian
from invgen.transforms import Affine, Exp, Transform

F64 = torch.float64
SMALL = {
    "NPE": NPE(members=1, hidden=16, layers=2, epochs=15),
    "FMPE": FMPE(hidden=48, layers=3, epochs=80, learning_rate=2e-3),
    "NPSE": NPSE(hidden=48, layers=3, epochs=80, learning_rate=2e-3),
    "NLE": NLE(hidden=16, layers=2, epochs=15, warmup=20),
    "NRE": NRE(hidden=48, layers=2, epochs=80, warmup=20),
}
# posterior means in posterior sd, and sd ratios: what a network of this size learns from 2000 pairs. The linear part
# makes flows errors of sqrt((dim + data)/n) = 0.05; fields and classifiers know only what they have learnt
BIAS = {"NPE": 0.2, "NLE": 0.2, "FMPE": 0.3, "NPSE": 0.3, "NRE": 0.6}
SPREAD = {"NPE": 0.1, "NLE": 0.1, "FMPE": 0.2, "NPSE": 0.2, "NRE": 0.3}


def linear_problem(n_obs: int = 3) -> InverseProblem:
    """Two correlated unknowns with a mean, x = 2 + 3u, three data."""
    g = torch.Generator().manual_seed(3)
    prior = GaussianPrior(
        torch.tensor([1.0, -2.0], dtype=F64),
        torch.tensor([[1.0, 0.6], [0.6, 0.8]], dtype=F64),
        transform=Affine(2.0, 3.0),
    )
    operator = MatrixOperator(torch.randn(3, 2, generator=g, dtype=F64))
    truth = prior.sample(n_obs, seed=5).double()
    return InverseProblem(
        operator(truth) + 1.5 * torch.randn(n_obs, 3, generator=g, dtype=F64), operator, GaussianNoise(1.5), prior
    )


def fitted(name: str, problem: InverseProblem, n: int = 2000, **options) -> AmortizedPosterior:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SMALL[name].fit(problem, n, **options)


@pytest.fixture(scope="module")
def problem() -> InverseProblem:
    return linear_problem()


class _Trained(dict):
    """Fitted when first asked for."""

    def __missing__(self, name):
        self[name] = fitted(name, linear_problem(), seed=1)
        return self[name]


@pytest.fixture(scope="module")
def trained() -> dict[str, AmortizedPosterior]:
    return _Trained()


@pytest.mark.parametrize("name", SMALL)
def test_moments_of_a_linear_gaussian_posterior(name, trained, problem):
    exact = ExactGaussian().solve(problem, 4000, seed=1, dtype=F64)
    q = trained[name].solve(problem, 1000, seed=2, dtype=F64)
    assert q.samples.shape == (3, 1, 1000, 2)
    monte_carlo = 4.5 / math.sqrt(1000)
    bias = ((q.mean() - exact.mean()) / exact.std()).abs().max()
    assert float(bias) < BIAS[name] + monte_carlo
    assert float((q.std() / exact.std() - 1).abs().max()) < SPREAD[name] + monte_carlo / math.sqrt(2)


@pytest.mark.parametrize("name", SMALL)
def test_simulation_based_calibration(name, trained, problem):
    # few observations: power against errors of half a posterior sd, not against those that 2000 pairs leave
    sizes = (30, 20) if name in ("NLE", "NRE") else (60, 60)
    result = calibrate(problem, trained[name], *sizes, seed=9, level=1e-3)
    assert result.passed


@pytest.mark.parametrize("name", ["NPE", "FMPE", "NPSE"])
def test_log_prob_is_that_of_the_draws(name, trained, problem):
    """E_q[p/q] = 1 over draws of q, for the exact density p; and q integrates to one on a grid."""
    d = problem.terms[0].data[0]
    exact = ExactGaussian().solve(problem.select([0]), 4000, seed=4, dtype=F64)
    mean, sd = exact.mean()[0], exact.std()[0]
    axis = torch.linspace(-6, 6, 41, dtype=F64)
    grid = mean + sd * torch.cartesian_prod(axis, axis)
    total = trained[name].log_prob(grid, d).exp().sum() * (axis[1] - axis[0]) ** 2 * sd.prod()
    assert abs(float(total) - 1) < 0.02


def test_saved_and_loaded_without_problem_or_data(trained, problem, tmp_path):
    for name in ("NPE", "FMPE"):
        path = trained[name].save(tmp_path / f"{name}.safetensors")
        loaded = AmortizedPosterior.load(path)
        d = problem.terms[0].data
        assert torch.equal(loaded(d, 20, seed=3).samples, trained[name](d, 20, seed=3).samples)
        assert path.stat().st_size < 2_000_000
    with pytest.raises(ValueError, match="checkpoint"):
        AmortizedPosterior.load(path.with_suffix(".no")) if path.with_suffix(".no").write_bytes(b"x") else None


def test_chains_are_loaded_with_the_problem(trained, problem, tmp_path):
    path = trained["NLE"].save(tmp_path / "nle.safetensors")
    d = problem.terms[0].data[0]
    with pytest.raises(TypeError, match=r"needs|Density|Latent"):
        AmortizedPosterior.load(path)(d, 5)
    loaded = AmortizedPosterior.load(path, problem)
    assert torch.equal(loaded(d, 20, seed=3).samples, trained["NLE"](d, 20, seed=3).samples)


def test_several_observations_are_each_as_if_alone(trained, problem):
    d = problem.terms[0].data
    together = trained["NPE"](d, 30, seed=4, dtype=F64)
    assert together.samples.shape == (3, 1, 30, 2)
    alone = trained["NPE"](d[:1], 30, seed=4, dtype=F64)
    torch.testing.assert_close(together.samples[:1], alone.samples, rtol=1e-10, atol=1e-10)


def test_observations_that_are_refused(trained, problem):
    d = problem.terms[0].data[0]
    with pytest.raises(ValueError, match="shape"):
        trained["NPE"](d[:2])
    with pytest.raises(ValueError, match="1 NaN"):
        trained["NPE"](torch.where(torch.arange(3) == 1, torch.nan, d))
    prior = GaussianPrior(torch.zeros(3), torch.ones(3))
    other = InverseProblem(torch.zeros(3), MatrixOperator(torch.eye(3)), GaussianNoise(1.0), prior)
    with pytest.raises(TypeError, match="trained for"):
        trained["NPE"].solve(other)


def test_observation_outside_the_simulations_is_flagged_with_its_number(trained, problem):
    _, _, usual = problem.simulate(400, seed=77)
    distance, p = trained["NPE"].typicality(usual[0])
    # conformal p-values of data from the simulator are uniform: 400 of them below 0.05 are 20 ± 4.4
    assert abs(float((p < 0.05).double().mean()) - 0.05) < 0.05
    assert float(distance.mean()) == pytest.approx(3.0, abs=0.6)
    far = problem.terms[0].data[0] + 100.0
    with pytest.warns(UserWarning, match="outside the simulated data"):
        posterior = trained["NPE"](far, 5)
    assert float(posterior.stats["p_value"].max()) < 0.01
    assert float(posterior.stats["distance"].min()) > 100


def box_problem() -> InverseProblem:
    """Data that push the posterior against an edge of the box."""
    prior = UniformPrior(torch.tensor([0.0, -1.0]), torch.tensor([1.0, 1.0]))
    return InverseProblem(torch.tensor([0.02, 0.3]), MatrixOperator(torch.eye(2)), GaussianNoise(0.3), prior)


@pytest.mark.parametrize("space", ["x", "u"])
def test_draws_keep_to_the_support_and_the_density_integrates_to_one(space):
    problem = box_problem()
    fit = NPE(members=1, hidden=16, layers=2, epochs=15, space=space).fit(problem, 2000, seed=0)
    q = fit.solve(problem, 2000, seed=1)
    x = q.samples[0, 0]
    assert bool(torch.isfinite(problem.prior.log_prob(x)).all())
    if space == "x":
        assert float(q.stats["tries"].mean()) > 1.05
    grid = torch.cartesian_prod(torch.linspace(0.005, 0.995, 100), torch.linspace(-0.99, 0.99, 100)).double()
    total = fit.log_prob(grid, problem.terms[0].data[0]).exp().mean() * 2
    assert abs(float(total) - 1) < 0.05
    outside = torch.tensor([[-0.1, 0.0]], dtype=F64)
    assert float(fit.log_prob(outside, problem.terms[0].data[0])) == -math.inf


def test_nuisance_parameters_are_inferred_beside_the_model():
    """An unknown noise level, positive by its transform: larger residuals, larger level."""
    prior = GaussianPrior(torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64))
    level = GaussianPrior(torch.zeros(1, dtype=F64), 0.25 * torch.ones(1, dtype=F64), transform=Exp((1,)))
    operator = MatrixOperator(torch.ones(12, 1, dtype=F64))
    g = torch.Generator().manual_seed(2)
    noise = torch.randn(1, 12, generator=g, dtype=F64)
    data = torch.cat([0.5 + 0.5 * noise, 0.5 + 2.0 * noise])
    problem = InverseProblem(data, operator, GaussianNoise("level"), prior, nuisance={"level": level})
    fit = NPE(members=1, hidden=32, layers=3, epochs=40, learning_rate=3e-3).fit(problem, 3000, seed=0)
    q = fit.solve(problem, 500, seed=1)
    assert bool((q.theta["level"] > 0).all())
    small, large = q.theta["level"].flatten(1).median(1).values.tolist()
    assert small < 0.8 < 1.3 < large
    assert fit.log_prob(q.samples[0, 0, :5].double(), data[0], level=q.theta["level"][0, 0, :5].double()).shape == (5,)


def test_latent_of_a_field_is_inferred_and_decoded():
    prior = GaussianPrior(torch.full((1, 9, 9), 3.0, dtype=F64), 0.5)
    operator = MatrixOperator(torch.eye(81, dtype=F64)[:4].reshape(4, 81))

    class Corner(MatrixOperator):
        def __init__(self):
            super().__init__(torch.zeros(1, 1))
            self.model_shape, self.data_shape = (1, 9, 9), (4,)

        def forward(self, x, **theta):
            return operator(x.reshape(-1, 81).to(F64)).to(x)

        def adjoint(self, d):
            return operator.adjoint(d.to(F64)).to(d).reshape(-1, 1, 9, 9)

    problem = InverseProblem(torch.full((4,), 4.0, dtype=F64), Corner(), GaussianNoise(0.1), prior)
    fit = NPE(members=1, hidden=16, layers=2, epochs=5).fit(problem, 2000, seed=0)
    assert fit.coordinates.space == "z"
    q = fit.solve(problem, 300, seed=1)
    assert q.latent is not None
    assert q.latent.shape == (1, 1, 300, 1, 9, 9)
    mean = q.mean()[0].flatten()
    assert float((mean[:4] - 3.98).abs().max()) < 0.25  # posterior mean 3 + 0.5/0.51
    assert float((mean[4:] - 3.0).abs().max()) < 0.35
    with pytest.raises(TypeError, match="no density"):
        fit.log_prob(q.samples[0, 0, :2], problem.terms[0].data[0])


def test_simulations_of_the_user_and_bad_ones(problem):
    pairs = Simulations.of(problem, 300, seed=4)
    fit = NPE(members=1, hidden=8, layers=1, epochs=2).fit(problem, pairs)
    assert fit.history["simulations"] == 300
    bad = Simulations(pairs.x.clone(), {}, (pairs.data[0].clone(),))
    bad.data[0][:7] = torch.nan
    with pytest.warns(UserWarning, match="7 of 300 simulations failed"):
        assert NPE(members=1, hidden=8, layers=1, epochs=1).fit(problem, bad).history["failed"] == 7
    with pytest.raises(ValueError, match="at least 20"):
        NPE().fit(problem, 10)
    box = box_problem()
    outside = Simulations(torch.full((50, 2), 5.0), {}, (torch.randn(50, 2),))
    with pytest.raises(ValueError, match="no support"):
        NPE().fit(box, outside)


def test_file_larger_than_memory_is_streamed(problem, tmp_path, monkeypatch):
    from invgen.solvers import _neural_fit

    pairs = Simulations.of(problem, 1200, seed=4, path=tmp_path / "pairs.h5")
    whole = NPE(members=1, hidden=8, layers=1, epochs=3).fit(problem, pairs, seed=2)
    monkeypatch.setattr(_neural_fit, "_MEMORY", 0)
    streamed = NPE(members=1, hidden=8, layers=1, epochs=3).fit(problem, pairs, seed=2)
    assert streamed.history["steps"] == whole.history["steps"]
    assert streamed.history["held_out_loss"][0] == pytest.approx(whole.history["held_out_loss"][0], abs=0.1)


def test_fresh_simulations_every_epoch(problem):
    fit = NPE(members=1, hidden=8, layers=1, epochs=3, fresh=True).fit(problem, 200, seed=1)
    assert fit.history["epochs"] == [3]
    with pytest.raises(ValueError, match="fresh"):
        NPE(fresh=True).fit(problem, Simulations.of(problem, 100))


def test_too_few_simulations_are_said(problem):
    """A large flow on 60 pairs learns them by heart."""
    with pytest.warns(UserWarning, match="simulations are few"):
        NPE(members=1, hidden=64, layers=4, epochs=60, patience=60, linear=False, learning_rate=5e-3, ema=0.0).fit(
            problem, 60
        )


def test_embeddings_of_traces_sets_and_a_module():
    prior = GaussianPrior(torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64))
    g = torch.Generator().manual_seed(0)
    matrix = torch.randn(100, 2, generator=g, dtype=F64)
    trace = InverseProblem(torch.zeros(100, dtype=F64), MatrixOperator(matrix), GaussianNoise(1.0), prior)

    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(100, 4)

        def forward(self, d):
            return self.layer(d)

    for embedding in ("auto", "mlp", Head()):
        fit = NPE(members=1, hidden=8, layers=1, epochs=1, embedding=embedding).fit(trace, 200)
        assert fit.network.members[0].embedding is not None
        assert fit(torch.zeros(2, 100), 3).samples.shape == (2, 1, 3, 2)
    with pytest.raises(ValueError, match="must return"):
        NPE(members=1, epochs=1, embedding=torch.nn.Unflatten(1, (10, 10))).fit(trace, 200)


def test_set_embeddings_do_not_mind_the_order():
    from invgen.solvers._neural_embeddings import Embedding

    d = torch.randn(2, 12)
    shuffled = d.reshape(2, 6, 2)[:, [3, 1, 5, 0, 2, 4]].reshape(2, 12)
    for kind in ("deepsets", "transformer"):
        net = Embedding([(6, 2)], None, kind, 8).eval()
        torch.testing.assert_close(net(d), net(shuffled), rtol=1e-5, atol=1e-6)


def test_masked_data_do_not_reach_the_network(problem):
    term = problem.terms[0]
    masked = InverseProblem(
        terms=[Term(term.data, term.operator, term.noise, torch.tensor([True, False, True]))], prior=problem.prior
    )
    fit = NPE(members=1, hidden=8, layers=1, epochs=2).fit(masked, 500)
    d = term.data.clone()
    before = fit(d, 10).samples
    d[:, 1] = torch.nan
    assert torch.equal(fit(d, 10).samples, before)


def test_members_are_mixed_and_hold_out_different_shares(problem):
    fit = NPE(hidden=8, layers=1, epochs=2, members=3).fit(problem, 300, seed=1)
    assert len(set(fit.history["held_out_loss"])) == 3
    assert fit(problem.terms[0].data, 10).samples.shape == (3, 1, 10, 2)


def test_an_own_transform_is_named_when_loading(problem, tmp_path):
    class Cubed(Transform):
        def forward(self, x, **theta):
            return x + 0.1 * x**3

        def inverse(self, x):
            u = x.clone()
            for _ in range(60):
                u = u - (u + 0.1 * u**3 - x) / (1 + 0.3 * u**2)
            return u

        def log_det(self, u):
            return (1 + 0.3 * u**2).log().sum(1)

    prior = GaussianPrior(torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64), transform=Cubed((2,)))
    own = InverseProblem(torch.zeros(2, dtype=F64), MatrixOperator(torch.eye(2)), GaussianNoise(1.0), prior)
    fit = NPE(members=1, hidden=8, layers=1, epochs=1, space="u").fit(own, 100)
    path = fit.save(tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match="problem="):
        AmortizedPosterior.load(path)
    assert torch.equal(AmortizedPosterior.load(path, own)(torch.zeros(2), 3).samples, fit(torch.zeros(2), 3).samples)


def test_later_rounds_simulate_where_the_posterior_is():
    """Half of the pairs lie in the truncated prior, and the moments stay those of the exact posterior."""
    problem = linear_problem(1)
    exact = ExactGaussian().solve(problem, 4000, seed=1, dtype=F64)
    solver = NPE(members=1, simulations=1000, hidden=16, layers=2, epochs=10, rounds=2)
    q = solver.solve(problem, 1000, seed=2, dtype=F64)
    tolerance = 0.25 + 4.5 / math.sqrt(1000)
    assert float(((q.mean() - exact.mean()) / exact.std()).abs().max()) < tolerance
    assert float((q.std() / exact.std() - 1).abs().max()) < 0.15 + 4.5 / math.sqrt(2000)
    from invgen.solvers._neural_rounds import _truncated

    rough = NPE(members=1, hidden=16, layers=2, epochs=10).fit(problem, 500)
    x, _ = _truncated(rough, problem, [problem.terms[0].data], 500, 0)
    assert bool((x.std(0) < 0.9 * problem.prior.sample(2000).std(0)).all())
    draws = exact.samples[0, 0]
    inside = ((draws > x.amin(0)) & (draws < x.amax(0))).all(1).double().mean()
    assert float(inside) > 0.97
    with pytest.raises(ValueError, match="one observation"):
        solver.solve(linear_problem(2), 3)
    with pytest.raises(TypeError, match="number of simulations"):
        solver.fit(problem, Simulations.of(problem, 50))


def _near_exact(refined, problem, n):
    exact = ExactGaussian().solve(problem, 4000, seed=1, dtype=F64)
    tolerance = 4.5 / math.sqrt(n) + 0.03
    assert refined.kind == "exact"
    assert float(((refined.mean() - exact.mean()) / exact.std()).abs().max()) < tolerance
    assert float((refined.std() / exact.std() - 1).abs().max()) < tolerance


def test_importance_weights_mend_a_wide_fit_and_say_so(trained, problem, tmp_path):
    wide = AmortizedPosterior.load(trained["NPE"].save(tmp_path / "wide.safetensors"), problem)
    wide.network.affine.root.mul_(1.4)
    q = wide.solve(problem, 3000, seed=2, dtype=F64)
    exact = ExactGaussian().solve(problem, 4000, seed=1, dtype=F64)
    assert float((q.std() / exact.std()).min()) > 1.25  # there is something to mend
    refined = wide.refine(problem, q, method="importance")
    assert refined.weights is not None
    assert float(refined.stats["khat"].max()) < 0.7
    _near_exact(refined, problem, 1000)


def test_chains_from_a_poor_fit_reach_the_posterior(problem):
    rough = NPE(members=1, hidden=8, layers=1, epochs=1, linear=False, learning_rate=1e-2).fit(problem, 400, seed=3)
    q = rough.solve(problem, 500, seed=2, dtype=F64)
    exact = ExactGaussian().solve(problem, 4000, seed=1, dtype=F64)
    assert float((q.std() / exact.std() - 1).abs().max()) > 0.3  # there is something to refine
    _near_exact(rough.refine(problem, q, method="chains", dtype=F64), problem, 500)


def test_smoothed_weights_of_a_known_tail():
    """Pareto weights of shape k: the fit finds it, and smoothing takes the luck out of the largest."""
    from invgen.solvers._neural_refine import _pareto_law, smoothed

    g = torch.Generator().manual_seed(1)
    excess = (torch.rand(4000, generator=g, dtype=F64).pow(-0.5) - 1).sort().values  # k = 0.5, scale 0.5
    k, scale = _pareto_law(excess)
    assert abs(k - 0.5) < 4.5 * 1.5 / math.sqrt(4000)
    assert abs(scale - 0.5) < 0.06
    weights = excess.log1p()
    out = smoothed(weights)
    assert float(out.max()) <= 0
    assert torch.equal(out.argsort()[:3000], (weights - weights.max()).argsort()[:3000])


def test_nothing_is_written_into_the_working_directory(tmp_path):
    code = (
        "from invgen import InverseProblem\n"
        "import torch\n"
        "from invgen.noise import GaussianNoise\n"
        "from invgen.operators import MatrixOperator\n"
        "from invgen.priors import GaussianPrior\n"
        "from invgen.solvers import NPE\n"
        "p = InverseProblem(torch.zeros(2), MatrixOperator(torch.eye(2)), GaussianNoise(1.0), GaussianPrior(torch.zeros(2), torch.ones(2)))\n"
        "NPE(members=1, hidden=8, layers=1, epochs=1).fit(p, 50)(torch.zeros(2), 3)\n"
    )
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert [p.name for p in tmp_path.iterdir() if p.name != "home"] == []
