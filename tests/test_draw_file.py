"""Draws that go to disk while chains run, and after a kill."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from invgen.draw_file import DrawFile
from invgen.noise import GaussianNoise
from invgen.operators import MatrixOperator
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem
from invgen.solvers import PCN, ExactGaussian
from invgen.transforms import Affine, Exp

F64 = torch.float64


def problem(n_obs=1, nuisance=False):
    """Three correlated unknowns, x = 2 + 3u."""
    prior = GaussianPrior(
        torch.tensor([1.0, -2.0, 0.5], dtype=F64), torch.eye(3, dtype=F64) + 0.5, transform=Affine(2.0, 3.0)
    )
    noise = GaussianNoise("sigma" if nuisance else 1.0)
    law = {"sigma": GaussianPrior(torch.zeros(1, dtype=F64), 0.25, transform=Exp())} if nuisance else None
    return InverseProblem(
        terms=InverseProblem(torch.ones(n_obs, 2, dtype=F64), MatrixOperator(torch.eye(3)[:2]), noise, prior).terms,
        prior=prior,
        nuisance=law,
    )


SOLVER = PCN(draws=20, warmup=8, thin=3)


def interrupt(after):
    def callback(step, state):
        if step + 1 == after:
            raise KeyboardInterrupt

    return callback


@pytest.mark.parametrize("nuisance", [False, True])
def test_the_file_holds_the_draws_of_the_posterior(tmp_path, nuisance):
    task = problem(2, nuisance)
    file = DrawFile(tmp_path / "deep" / "draws.npy", SOLVER, task, 3, dtype=F64)
    posterior = SOLVER.solve(task, 3, dtype=F64, chunk=6, callbacks=[file])
    draws = DrawFile.read(tmp_path / "deep" / "draws.npy")
    assert isinstance(draws, np.memmap)
    assert draws.shape == (6, 20, 3)
    np.testing.assert_allclose(draws, posterior.samples.flatten(0, 1).numpy(), rtol=1e-12)
    if nuisance:
        theta = DrawFile.read(tmp_path / "deep" / "draws.npy", theta=True)
        np.testing.assert_allclose(theta[..., 0], posterior.theta["sigma"].flatten(0, 1).numpy(), rtol=1e-12)


def test_the_file_has_its_own_thinning(tmp_path):
    task = problem()
    dense = PCN(draws=60, warmup=8, thin=1).solve(task, 2, dtype=F64)
    file = DrawFile(tmp_path / "draws.npy", SOLVER, task, 2, every=7, dtype=F64)
    SOLVER.solve(task, 2, dtype=F64, callbacks=[file])
    np.testing.assert_allclose(DrawFile.read(tmp_path / "draws.npy"), dense.samples[0][:, 6::7].numpy(), rtol=1e-12)


@pytest.mark.parametrize("stop", [4, 8, 11, 40, 67])
def test_a_run_that_goes_on_fills_the_same_file(tmp_path, stop):
    task, path, saved = problem(), tmp_path / "draws.npy", tmp_path / "run.ckpt"
    whole = SOLVER.solve(task, 2, dtype=F64)

    def go(*callbacks, **options):
        file = DrawFile(path, SOLVER, task, 2, dtype=F64)  # a new process has a new one
        return SOLVER.solve(task, 2, dtype=F64, checkpoint=saved, callbacks=[*callbacks, file], **options)

    try:
        go(interrupt(stop), save_seconds=0.0)
    except KeyboardInterrupt:
        assert stop <= 10
    complete = max(0, (stop - 1 - 8) // 3)  # of the last step the file was not told
    assert DrawFile.read(path).shape == (2, complete, 3)
    np.testing.assert_allclose(DrawFile.read(path), whole.samples[0][:, :complete].numpy(), rtol=1e-12)
    go()
    np.testing.assert_allclose(DrawFile.read(path), whole.samples[0].numpy(), rtol=1e-12)
    go()  # a fresh run starts over
    np.testing.assert_allclose(DrawFile.read(path), whole.samples[0].numpy(), rtol=1e-12)


def test_rows_that_were_not_finished_are_not_read(tmp_path):
    task, path = problem(), tmp_path / "draws.npy"
    SOLVER.solve(task, 2, dtype=F64, callbacks=[DrawFile(path, SOLVER, task, 2)])
    rows = np.lib.format.open_memmap(tmp_path / "draws.rows.npy", mode="r+")
    rows[12] = 0
    rows.flush()
    assert DrawFile.read(path).shape == (2, 12, 3)
    assert DrawFile.read(path).dtype == np.float32


def test_what_does_not_fit_is_named(tmp_path):
    task, path, saved = problem(2), tmp_path / "draws.npy", tmp_path / "run.ckpt"
    with pytest.raises(TypeError, match="ExactGaussian is none"):
        DrawFile(path, ExactGaussian(), task, 2)
    with pytest.raises(ValueError, match="NumPy files"):
        DrawFile(tmp_path / "draws.h5", SOLVER, task, 2)
    with pytest.raises(ValueError, match="makes no draw"):
        DrawFile(path, SOLVER, task, 2, every=61)
    with pytest.raises(ValueError, match="chunk=4"):
        SOLVER.solve(task, 2, callbacks=[DrawFile(path, SOLVER, task, 2)])  # one observation at a time
    with pytest.raises(FileNotFoundError, match="no draws at"):
        DrawFile.read(path)
    SOLVER.solve(task, 2, chunk=4, checkpoint=saved, save_seconds=0.0, callbacks=[interrupt(30)])
    with pytest.raises(ValueError, match="without its checkpoint"):
        SOLVER.solve(task, 2, chunk=4, checkpoint=saved, callbacks=[DrawFile(path, SOLVER, task, 2)])
