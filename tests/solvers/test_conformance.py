"""Every exported solver, whatever file it comes from, on problems it accepts."""

from __future__ import annotations

import dataclasses
import importlib
import warnings

import pytest
import torch

from invgen import solvers
from invgen.contracts import LinearOperator, Solver
from invgen.driver import DivergenceError
from invgen.noise import GaussianNoise
from invgen.operators import MatrixOperator
from invgen.priors import GaussianMixturePrior, GaussianPrior
from invgen.problem import InverseProblem
from invgen.transforms import Affine

F64 = torch.float64


def _solver_classes() -> list[type[Solver]]:
    found = []
    for name, module in sorted(solvers._exports.items()):
        item = getattr(importlib.import_module(module), name)
        if isinstance(item, type) and issubclass(item, Solver):
            found.append(item)
    return found


CLASSES = _solver_classes()
INSTANCES = [
    pytest.param(s, id=f"{c.__name__}-{i}")
    for c in CLASSES
    if hasattr(c, "examples")
    for i, s in enumerate(c.examples())
]


def _noise(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=F64)


def gaussian_problem(n_obs: int = 2) -> InverseProblem:
    """16 correlated unknowns with a mean, x = 2 + 3u, eight data."""
    g = torch.Generator().manual_seed(4)
    root = _noise(g, 16, 16) / 4
    prior = GaussianPrior(_noise(g, 16), root @ root.T + 0.1 * torch.eye(16, dtype=F64), transform=Affine(2.0, 3.0))
    operator = MatrixOperator(_noise(g, 8, 16) / 3)
    truth = prior.sample(n_obs, seed=11).double()
    return InverseProblem(operator(truth) + 0.3 * _noise(g, n_obs, 8), operator, GaussianNoise(0.3), prior)


def mixture_problem(n_obs: int = 2) -> InverseProblem:
    """Two components in four dimensions, x = 2 + 3u, two data that leave both alive."""
    g = torch.Generator().manual_seed(5)
    roots = _noise(g, 2, 4, 4) / 2
    covariances = roots @ roots.mT + 0.1 * torch.eye(4, dtype=F64)
    prior = GaussianMixturePrior([0.35, 0.65], _noise(g, 2, 4), covariances, transform=Affine(2.0, 3.0))
    operator = MatrixOperator(_noise(g, 2, 4) / 3)
    truth = prior.sample(n_obs, seed=11).double()
    return InverseProblem(operator(truth) + 1.0 * _noise(g, n_obs, 2), operator, GaussianNoise(1.0), prior)


def accepted_problem(solver: Solver, n_obs: int = 2) -> InverseProblem:
    """The first canonical problem whose prior has what the solver needs."""
    for problem in (gaussian_problem(n_obs), mixture_problem(n_obs)):
        try:
            solver.check(problem)
        except TypeError:
            continue
        return problem
    raise AssertionError(
        f"{solver} accepts none of the canonical problems; add one to tests/solvers/test_conformance.py."
    )


def solve(solver: Solver, problem: InverseProblem, n: int, **options):
    """Float64 unless said otherwise; a warning about unconverged items is for the tests of that solver."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return solver.solve(problem, n, **{"dtype": F64, **options})


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_is_a_documented_frozen_dataclass_with_examples(cls):
    assert dataclasses.is_dataclass(cls), f"{cls.__name__} must be a frozen dataclass of hyper-parameters."
    assert cls.__dataclass_params__.frozen, f"{cls.__name__} must be frozen: @dataclass(frozen=True)."
    assert hasattr(cls, "examples"), f"{cls.__name__} needs a classmethod examples() of cheap instances."
    assert cls.examples()
    assert cls.kind in ("exact", "approximate", "point")
    assert cls.__doc__
    assert "arget" in cls.__doc__, f"The docstring of {cls.__name__} must say what it targets."


class _NothingPrior:
    """A shape, and no capability."""

    shape, grid, transform = (16,), None, Affine()


@pytest.mark.parametrize("solver", INSTANCES)
def test_missing_capability_is_a_type_error_that_names_what_fits(solver):
    if not type(solver).needs:
        pytest.skip("needs nothing of the prior")
    good = gaussian_problem()
    term = good.terms[0]
    problem = InverseProblem(term.data, term.operator, term.noise, _NothingPrior())
    with pytest.raises(TypeError, match=r"solvers that fit this prior: .*TotalVariation"):
        solver.solve(problem, 1)


@pytest.mark.parametrize("solver", INSTANCES)
def test_seed_decides_and_dims_and_dtype(solver):
    problem = accepted_problem(solver)
    first, again, other = (solve(solver, problem, 3, seed=s) for s in (0, 0, 1))
    assert torch.equal(first.samples, again.samples)
    if solver.kind != "point":
        assert not torch.allclose(first.samples, other.samples)
    assert first.samples.dtype == F64
    assert first.samples.shape[0] == 2
    assert first.samples.shape[1] * first.samples.shape[2] >= 3
    assert first.samples.shape[3:] == problem.model_shape
    assert bool(torch.isfinite(first.samples).all())
    assert first.kind == solver.kind
    assert first.settings["solver"] == type(solver).__name__
    assert solve(solver, problem, 2, dtype=torch.float32).samples.dtype == torch.float32
    if solver.kind == "point":
        with pytest.raises(TypeError, match="uncertainty"):
            first.std()
    else:
        assert first.std().shape == (2, *problem.model_shape)


@pytest.mark.parametrize("solver", INSTANCES)
def test_independent_of_chunks_and_of_other_observations(solver):
    problem = accepted_problem(solver)
    whole, parts = solve(solver, problem, 4, chunk=8), solve(solver, problem, 4, chunk=3)
    scale = whole.samples.abs().max()
    torch.testing.assert_close(parts.samples, whole.samples, rtol=1e-10, atol=float(1e-10 * scale))
    alone = InverseProblem(terms=[dataclasses.replace(t, data=t.data[:1]) for t in problem.terms], prior=problem.prior)
    torch.testing.assert_close(
        solve(solver, alone, 4).samples, whole.samples[:1], rtol=1e-10, atol=float(1e-10 * scale)
    )


@pytest.mark.parametrize("solver", INSTANCES)
def test_interrupted_run_keeps_what_is_finished_and_resumes(solver, tmp_path):
    problem = accepted_problem(solver)
    path = tmp_path / "run.safetensors"
    steps = solver.num_steps(problem)
    assert steps >= 1, f"{type(solver).__name__} must have at least one step, so that callbacks see its work."
    whole = solve(solver, problem, 4, chunk=4)
    seen = []

    def interrupt(step, state):
        seen.append(step)
        if len(seen) == steps + (steps + 1) // 2:  # half-way through the second of two chunks
            raise KeyboardInterrupt

    half = solve(solver, problem, 4, chunk=4, checkpoint=path, save_seconds=0.0, callbacks=[interrupt])
    assert half.settings["interrupted"]
    torch.testing.assert_close(half.samples, whole.samples[:1], rtol=1e-12, atol=1e-12)
    assert path.is_file()
    rest = []
    done = solve(solver, problem, 4, chunk=4, checkpoint=path, callbacks=[lambda step, state: rest.append(step)])
    assert not done.settings["interrupted"]
    assert len(rest) <= steps, "a finished chunk was computed again"
    torch.testing.assert_close(done.samples, whole.samples, rtol=1e-12, atol=1e-12)
    for name, value in whole.stats.items():
        torch.testing.assert_close(done.stats[name], value, rtol=1e-10, atol=1e-10, equal_nan=True)
    assert not path.exists()


class Fragile(LinearOperator):
    """A matrix that answers absurd input with NaN, and has no solve of its own."""

    def __init__(self, matrix):
        super().__init__((matrix.shape[1],), (matrix.shape[0],))
        self.register_buffer("matrix", matrix)

    @staticmethod
    def _guarded(v):
        return torch.where(v.detach().abs().amax(1, keepdim=True) > 1e100, torch.full_like(v, torch.nan), v)

    def forward(self, x, **theta):
        return self._guarded(x) @ self.matrix.T.to(x)

    def adjoint(self, d):
        return self._guarded(d) @ self.matrix.to(d)


@pytest.mark.parametrize("solver", INSTANCES)
def test_one_observation_that_overflows_leaves_the_others_alone(solver):
    good = accepted_problem(solver)
    term = good.terms[0]
    problem = InverseProblem(term.data, Fragile(term.operator.to_dense()), term.noise, good.prior)
    data = term.data.clone()
    whole = solve(solver, problem, 3)
    data[0] = 1e308  # finite data whose misfit is not, and that the operator answers with NaN
    with pytest.warns(UserWarning, match="became NaN or infinite"):
        posterior = solver.solve(problem.with_data(data), 3, dtype=F64)
    assert bool((posterior.stats["first_bad_step"][0] >= 0).all())
    assert bool((posterior.stats["first_bad_step"][1] < 0).all())
    assert posterior.weights is not None
    assert bool((posterior.weights[0] == 0).all())
    torch.testing.assert_close(posterior.weights[1].sum(), torch.ones((), dtype=F64))
    torch.testing.assert_close(posterior.samples[1], whole.samples[1], rtol=1e-9, atol=1e-9)
    data[:] = 1e308
    with pytest.raises(DivergenceError, match="became NaN"):
        solve(solver, problem.with_data(data), 2)


@pytest.mark.parametrize("solver", INSTANCES)
def test_bad_numbers_of_samples_and_seeds(solver):
    problem = accepted_problem(solver)
    with pytest.raises(ValueError, match="num_samples"):
        solver.solve(problem, 0)
    with pytest.raises(ValueError, match="seed"):
        solver.solve(problem, 1, seed=-1)
