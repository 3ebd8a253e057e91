"""User simulators: functions and programs with their noise inside, kept on disk, continued after a kill."""

import functools
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from invgen import ProgramSimulator, SimulatedNoise, Simulations, Simulator
from invgen._source import source_hash
from invgen.noise import GaussianNoise
from invgen.operators import MatrixOperator
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem

D = torch.float64
PRIOR = GaussianPrior.dense(torch.tensor([1.0, -2.0], dtype=D), torch.tensor([[1.0, 0.5], [0.5, 0.8]], dtype=D))


def by_generator(x, rng):
    return np.array([x.sum(), x[0] * x[1], 1.0]) + 0.5 * rng.standard_normal(3)


def by_globals(x):
    return np.array([x.sum(), x[0] * x[1], 1.0]) + 0.5 * np.random.standard_normal(3)  # noqa: NPY002


def in_torch(x):
    return torch.stack([x.sum(1), x[:, 0] * x[:, 1], torch.ones(len(x))], 1) + 0.5 * torch.randn(len(x), 3)


def scaled(x, gain, seed):
    return gain * x + 0.1 * np.random.default_rng(seed).standard_normal(2)


def fragile(x, rng):
    if x[0] > 2:
        raise RuntimeError(f"no convergence at {x[0]:.2f}")
    return np.array([np.nan if x[1] > -1 else x[1], 0.0, 0.0]) + rng.standard_normal(3)


def fragile_batch(x):
    if (x[:, 0] > 2).any():
        raise RuntimeError("one of them does not converge")
    return np.concatenate([x, x[:, :1]], 1)


def problem(function=by_generator, prior=PRIOR, **options):
    return InverseProblem(torch.zeros(3, dtype=D), Simulator(function, (2,), (3,), **options), SimulatedNoise(), prior)


@pytest.mark.parametrize(
    ("function", "options"),
    [(by_generator, {}), (by_globals, {}), (in_torch, {"batched": True, "tensors": True})],
)
def test_noise_is_fresh_for_each_model_and_right(function, options):
    """Residuals of 3000 simulations are N(0, 0.25): mean and variance within 5 standard errors, uncorrelated with x."""
    s = Simulations.of(problem(function, **options), 3000)
    x, (d,) = s.x.double(), s.data
    clean = torch.stack([x.sum(1), x[:, 0] * x[:, 1], torch.ones(3000, dtype=D)], 1)
    r = d.double() - clean
    assert (r.mean(0).abs() < 5 * 0.5 / 3000**0.5).all()
    assert ((r.var(0) - 0.25).abs() < 5 * 0.25 * (2 / 3000) ** 0.5).all()
    together = torch.corrcoef(torch.cat([r, x], 1).T)[:3]
    assert (together.fill_diagonal_(0).abs() < 5 / 3000**0.5).all()


def test_a_simulation_is_the_same_in_every_batch_process_and_precision():
    op, x = Simulator(by_globals, (2,), (3,)), PRIOR.sample(6, seed=2)
    together = op(x)
    assert torch.equal(op(x[2:4]), together[2:4])
    assert torch.allclose(op(x.double()).float(), together, atol=1e-6)
    assert not torch.equal(Simulator(by_globals, (2,), (3,), seed=1)(x), together)
    shared = Simulator(by_globals, (2,), (3,), workers=1)
    assert torch.equal(shared(x), together)


def test_the_callers_generators_are_left_alone():
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    expected = np.random.random(), torch.rand(1)  # noqa: NPY002
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    Simulator(by_globals, (2,), (3,))(torch.zeros(4, 2))
    assert (np.random.random(), torch.rand(1)) == expected  # noqa: NPY002


def test_nuisance_parameters_come_by_name():
    gain = GaussianPrior.dense(torch.full((1,), 3.0, dtype=D), torch.eye(1, dtype=D) * 0.01)
    op = Simulator(scaled, (2,), (2,))
    assert op.theta_names == ("gain",)
    p = InverseProblem(torch.zeros(2), op, SimulatedNoise(), PRIOR, nuisance={"gain": gain})
    s = Simulations.of(p, 200)
    assert (s.data[0] - s.theta["gain"][:, None] * s.x).std() == pytest.approx(0.1, rel=0.2)


def test_there_is_no_likelihood_and_the_message_says_what_to_use():
    p = problem()
    with pytest.raises(TypeError, match="learns from simulations, such as NPE"):
        p.log_likelihood(torch.zeros(1, 2))


def test_failures_are_listed_with_their_parameters(tmp_path):
    for path in (None, tmp_path / "s.h5"):
        with pytest.warns(UserWarning, match="simulations failed"):
            s = Simulations.of(problem(fragile), 80, path=path)
        whole = Simulations.of(problem(by_generator), 80).x
        assert len(s) + s.failed == 80
        assert s.failed == len(s.failures) > 5
        for f in s.failures:
            assert torch.allclose(torch.tensor(f.x), whole[f.row])
            raised = f.x[0] > 2
            assert ("no convergence at" in f.reason) if raised else ("1 of 3 values" in f.reason and f.x[1] > -1)
        assert torch.isfinite(s.batch(slice(None))[2][0]).all()


def test_a_batch_that_raises_costs_only_the_items_that_raise():
    x = PRIOR.sample(64, seed=3)
    bad = x[:, 0] > 2
    assert bad.any()
    op = Simulator(fragile_batch, (2,), (3,), batched=True)
    out = op(x)
    assert torch.equal(torch.isnan(out).all(1), bad)
    assert op.failure_count == int(bad.sum())


def test_rows_do_not_depend_on_chunk_or_total():
    a, b = Simulations.of(problem(), 50, chunk=7), Simulations.of(problem(), 80, chunk=33)
    assert torch.equal(a.x, b.x[:50])
    assert torch.equal(a.data[0], b.data[0][:50])


def test_a_file_is_read_instead_of_simulating_and_grows(tmp_path):
    p, path = problem(), tmp_path / "s.h5"
    first = Simulations.of(p, 40, path=path)
    calls = p.terms[0].operator.calls
    again = Simulations.of(p, 40, path=path)
    assert p.terms[0].operator.calls == calls
    assert torch.equal(again.batch(slice(None))[0], first.batch(slice(None))[0])
    fewer, more = Simulations.of(p, 30, path=path), Simulations.of(p, 70, path=path)
    assert p.terms[0].operator.calls == calls + 38  # rows 32 to 69: the chunk of 16 in which row 40 lies is done again
    assert (len(fewer), len(more)) == (30, 70)
    assert torch.equal(more.batch(slice(None))[2][0], Simulations.of(p, 70).data[0])


def other(x, rng):
    return by_generator(x, rng) + 1


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"function": other}, "simulator"),
        ({"function": functools.partial(other)}, "simulator"),
        ({"prior": GaussianPrior.dense(torch.zeros(2, dtype=D), torch.eye(2, dtype=D))}, "prior"),
        ({"seed": 1}, "simulator"),
    ],
)
def test_a_file_of_something_else_is_stale(tmp_path, change, name):
    path = tmp_path / "s.h5"
    Simulations.of(problem(), 20, path=path)
    with pytest.raises(ValueError, match=f"stale: they were made with another {name} .*Delete the file"):
        Simulations.of(problem(**change), 20, path=path)
    with pytest.raises(ValueError, match="another seed"):
        Simulations.of(problem(), 20, seed=9, path=path)


def test_files_of_an_operator_and_of_save(tmp_path):
    def linear(factor):
        matrix = MatrixOperator(torch.tensor([[1.0, factor]], dtype=D))
        return InverseProblem(torch.zeros(1, dtype=D), matrix, GaussianNoise(0.3), PRIOR)

    Simulations.of(linear(1.0), 20, path=tmp_path / "a.h5")
    Simulations.of(linear(1.0), 20, path=tmp_path / "a.h5")
    with pytest.raises(ValueError, match="another simulator"):
        Simulations.of(linear(2.0), 20, path=tmp_path / "a.h5")
    Simulations.of(linear(1.0), 20).save(tmp_path / "b.h5")
    with pytest.raises(ValueError, match="do not say what made them"):
        Simulations.of(linear(1.0), 20, path=tmp_path / "b.h5")


LEVEL = 2.0


def level():
    return LEVEL


def uses_level(x):
    return level() * x


def test_the_hash_follows_what_the_function_uses(monkeypatch):
    before = source_hash(uses_level)
    assert source_hash(uses_level) == before
    monkeypatch.setattr(sys.modules[__name__], "LEVEL", 3.0)
    assert source_hash(uses_level) != before
    monkeypatch.undo()
    monkeypatch.setattr(sys.modules[__name__], "level", lambda: 2.0)
    assert source_hash(uses_level) != before

    def closed(factor):
        return lambda x: factor * x

    assert source_hash(closed(1.0)) != source_hash(closed(2.0))
    assert source_hash(functools.partial(uses_level, a=1)) != source_hash(functools.partial(uses_level, a=2))


SCRIPT = """
import sys, time
from pathlib import Path
import numpy as np, torch
from invgen import InverseProblem, SimulatedNoise, Simulations, Simulator
from invgen.priors import GaussianPrior

def slow(x, rng):
    time.sleep(0.01)
    with open(sys.argv[2], "a") as log:
        log.write("call\\n")
    return x + rng.standard_normal(2)

prior = GaussianPrior.diagonal(torch.zeros(2), 1.0)
problem = InverseProblem(torch.zeros(2), Simulator(slow, (2,), (2,)), SimulatedNoise(), prior)
s = Simulations.of(problem, 200, path=sys.argv[1], chunk=5)
print(len(s), float(s.batch(slice(None))[2][0].sum()))
"""


def test_a_killed_run_is_continued(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    log = tmp_path / "log.txt"
    run = [sys.executable, str(script), str(tmp_path / "s.h5"), str(log)]
    process = subprocess.Popen(run, stdout=subprocess.PIPE)
    while process.poll() is None and not (log.exists() and len(log.read_text().split()) >= 30):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(log.read_text().split())
    assert before < 200
    assert 20 <= len(Simulations.open(tmp_path / "s.h5")) <= before
    resumed = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert len(log.read_text().split()) <= 200 + 5 + 1
    fresh = subprocess.run([*run[:2], str(tmp_path / "t.h5"), str(log)], capture_output=True, text=True, check=True)
    assert resumed == fresh.stdout


PROGRAM = """
import random, sys
a, b = map(float, open("halo.ini").read().split()[2::3])
random.seed(int(sys.argv[1]))
if a > 2: sys.exit("too heavy")
open("out.txt", "w").write(f"{a + b!r} {a * b!r} {random.gauss(0, 1)!r}")
"""


def program(**options):
    return ProgramSimulator(
        [sys.executable, "-I", "-S", "-c", PROGRAM, "{seed}"],
        (2,),
        (3,),
        names=("mass", "radius"),
        templates={"halo.ini": "mass = {mass}\nradius = {radius}\n"},
        output="out.txt",
        timeout=60.0,
        **options,
    )


def test_a_program_with_templates_and_seed():
    x = torch.tensor([[0.5, -1.25], [1.0 / 3.0, 4.0], [3.0, 0.0], [0.5, 1.0]], dtype=D)
    op = program()
    out = op(x)
    kept = [0, 1, 3]
    assert torch.equal(out[kept, 0], x[kept].sum(1))
    assert torch.equal(out[kept, 1], x[kept].prod(1))
    assert len(torch.unique(out[kept, 2])) == 3
    assert torch.isnan(out[2]).all()
    assert "too heavy" in op.failures[0].reason
    assert torch.equal(op(x[1:2]), out[1:2])


def test_a_program_hash_follows_command_template_and_files(tmp_path):
    assert program().source == program(seed=2).source
    assert "seed 2" in program(seed=2).extra_repr()
    tool = tmp_path / "tool.py"
    tool.write_text("print(1)")
    first = ProgramSimulator([sys.executable, str(tool)], (2,), (3,)).source
    tool.write_text("print(2)")
    assert ProgramSimulator([sys.executable, str(tool)], (2,), (3,)).source != first


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Simulator(3, (2,), (3,)), TypeError, "takes a function"),
        (lambda: Simulator(by_globals, (2,), (3,), seed=-1), ValueError, "non-negative"),
        (lambda: Simulator(lambda x: x, (2,), (3,), workers=2), TypeError, "other processes"),
        (lambda: ProgramSimulator("tool", (2,), (3,), names=("a",)), ValueError, "2 entries but there are 1 names"),
        (lambda: ProgramSimulator("tool", (2,), (3,), names=("seed", "a")), ValueError, "must differ"),
        (lambda: Simulator(by_globals, (2,), (4,))(torch.zeros(1, 2)), ValueError, "data_shape is"),
    ],
)
def test_bad_input_is_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_the_file_is_where_it_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Simulations.of(problem(), 5, path="s.h5")
    assert [p.name for p in Path().iterdir()] == ["s.h5"]


def test_a_problem_without_likelihood_can_be_calibrated():
    """A rejection sampler by distance, exact for a discrete simulator, and one that ignores the data."""
    from dataclasses import dataclass

    from invgen.contracts import Solver
    from invgen.diagnostics import calibrate

    @dataclass(frozen=True)
    class FromPrior(Solver):
        def init(self, problem, rng):
            x = rng.normal((2,), dtype=D, tag="x")
            return {"x": torch.tensor([1.0, -2.0], dtype=D) + x @ torch.linalg.cholesky(PRIOR.covariance_u.dense()).T}

    result = calibrate(problem(), FromPrior(), n_sim=200, num_samples=49, dtype=D)
    assert "TARP: distance to reference" in result.failing
    assert not any("log" in name for name in result.names)
