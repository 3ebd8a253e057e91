"""Functions and programs as physics: failures, timeouts, retries, processes, and the gradient there is not."""

from __future__ import annotations

import os
import pickle
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from invgen.noise import GaussianNoise
from invgen.operators import BlackBox, Executable
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem
from invgen.solvers import MAP

F64 = torch.float64
X = torch.arange(8, dtype=F64).reshape(4, 2)


def total(x, shift=0.0):
    return np.array([x.sum() + shift])


def stumbling(x):
    if x[0] > 3:
        raise ArithmeticError("no convergence")
    return x * 2


def deadly(x):
    if x[0] == 2:
        os._exit(3)
    return x * 2


def test_failures_are_nan_for_their_item_alone_and_listed():
    g = BlackBox(stumbling, (2,), (2,))
    out = g(X)
    assert torch.equal(out[:2], 2 * X[:2])
    assert bool(torch.isnan(out[2:]).all())
    assert (g.calls, g.failure_count) == (4, 2)
    assert [f.call for f in g.failures] == [2, 3]
    assert g.failures[0].reason == "ArithmeticError: no convergence"
    bad = X.clone()
    bad[0, 1] = torch.nan
    assert bool(torch.isnan(g(bad)[0]).all())
    assert "not run" in g.failures[2].reason


def test_a_result_of_another_shape_is_an_error():
    with pytest.raises(ValueError, match=r"returned an array \(2,\).*data_shape is \(3,\)"):
        BlackBox(stumbling, (2,), (3,))(X)


def test_a_gradient_is_refused_by_name():
    g = BlackBox(total, (2,), (1,))
    out = g(X.clone().requires_grad_())
    with pytest.raises(TypeError, match=r"BlackBox is a black box \(derivative_order 0\) and has no gradient"):
        out.sum().backward()
    with pytest.raises(TypeError, match="no gradient"):
        torch.func.jvp(g, (X,), (X,))
    problem = InverseProblem(torch.ones(1), g, GaussianNoise(1.0), GaussianPrior(torch.zeros(2), 1.0))
    with pytest.raises(TypeError, match="black box"):
        MAP().solve(problem, 1)


def test_nuisance_parameters_come_by_name():
    g = BlackBox(total, (2,), (1,), theta_names=("shift",))
    shift = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64)
    assert torch.equal(g(X, shift=shift)[:, 0], X.sum(1) + shift)


def test_several_processes_give_the_same_and_survive_a_death():
    g = BlackBox(deadly, (2,), (2,), workers=2)
    out = g(X)
    keep = X[:, 0] != 2
    assert torch.equal(out[keep], 2 * X[keep])
    assert bool(torch.isnan(out[~keep]).all())
    assert [f.reason for f in g.failures] == ["the process that computed it died"]
    assert torch.equal(pickle.loads(pickle.dumps(g))(X[2:]), 2 * X[2:])
    with pytest.raises(TypeError, match="cannot be sent to other processes"):
        BlackBox(lambda x: x, (2,), (2,), workers=1)


def program(body, *more):
    """Another Python that has the model as `v` and writes what it prints to the result."""
    script = f"import sys, os, time; v = [float(w) for w in open(sys.argv[1]).read().split()]\n{body}"
    return [sys.executable, "-I", "-S", "-c", script, "{input}", "{output}", *more]


def text(path, x):
    Path(path).write_text(" ".join(map(repr, x.tolist())))


def numbers(path):
    return np.array([float(w) for w in Path(path).read_text().split()])


FILES = {"write": text, "read": numbers}


def test_a_program_reads_and_writes_npy_by_default():
    script = "import sys, numpy; numpy.save(sys.argv[2], 2 * numpy.load(sys.argv[1]))"
    g = Executable([sys.executable, "-c", script, "{input}", "{output}"], (2,), (2,), timeout=60)
    assert torch.equal(g(X[:1]), 2 * X[:1])
    assert g.failures == []


def test_a_program_that_fails_is_reported_with_what_it_said():
    body = "assert v[0] < 3, 'grid too coarse'\nopen(sys.argv[2], 'w').write(' '.join(map(repr, v)))"
    g = Executable(program(body), (2,), (2,), timeout=60, workers=2, **FILES)
    out = g(X)
    assert torch.equal(out[:2], X[:2])
    assert bool(torch.isnan(out[2:]).all())
    assert g.failure_count == 2
    assert "exit code 1" in g.failures[0].reason
    assert "grid too coarse" in g.failures[0].reason
    silent = Executable(program("pass"), (2,), (2,), timeout=60, **FILES)
    assert bool(torch.isnan(silent(X[:1])).all())
    assert "cannot be read" in silent.failures[0].reason
    short = Executable(program("open(sys.argv[2], 'w').write('1.0')"), (2,), (2,), timeout=60, **FILES)
    short(X[:1])
    assert "shape (1,)" in short.failures[0].reason


def test_a_program_that_hangs_is_killed_with_its_children(tmp_path):
    note = tmp_path / "child"
    body = f"pid = os.fork()\nif pid: open({str(note)!r}, 'w').write(str(pid))\ntime.sleep(600)"
    g = Executable(program(body), (2,), (2,), timeout=1.5, **FILES)
    began = time.monotonic()
    assert bool(torch.isnan(g(X[:1])).all())
    assert time.monotonic() - began < 60
    assert g.failures[0].reason == "no result after 1.5 s"
    child = int(note.read_text())
    for _ in range(100):
        status = Path(f"/proc/{child}/status")
        if not status.exists() or "Z (zombie)" in status.read_text():
            break
        time.sleep(0.05)
    else:
        raise AssertionError("the child of a program that was killed still runs")


def test_retries_and_scratch_folders(tmp_path):
    """The first two attempts fail; every attempt has an empty folder of its own, which is gone afterwards."""
    log = tmp_path / "log"
    body = (
        f"open({str(log)!r}, 'a').write(os.getcwd() + '\\n')\n"
        f"assert len(open({str(log)!r}).readlines()) > 2\n"
        "open(sys.argv[2], 'w').write(' '.join(map(repr, v)))"
    )
    g = Executable(program(body), (2,), (2,), timeout=60, retries=2, **FILES)
    assert torch.equal(g(X[:1]), X[:1])
    assert g.failure_count == 0
    folders = log.read_text().split()
    assert len(set(folders)) == 3
    assert not any(Path(f).exists() for f in folders)


def test_no_shell_unless_asked(tmp_path):
    mark = tmp_path / "mark"
    g = Executable(["echo", "x;", "touch", str(mark)], (2,), (2,), timeout=60, **FILES)
    g(X[:1])
    assert not mark.exists()
    asked = Executable("cp {input} {output} && touch " + str(mark), (2,), (2,), timeout=60, shell=True, **FILES)
    assert torch.equal(asked(X[:1]), X[:1])
    assert mark.exists()
    with pytest.raises(FileNotFoundError):
        Executable(["no-such-program-here"], (2,), (2,), **FILES)(X[:1])
    with pytest.raises(ValueError, match="needs a command"):
        Executable([], (2,), (2,))
