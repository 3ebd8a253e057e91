"""Runs that are watched, and end when there are enough draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from invgen.diagnostics import StopAtESS, ess, nested_rhat, rhat
from invgen.diagnostics.running import kept_so_far
from invgen.noise import GaussianNoise
from invgen.operators import MatrixOperator
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem
from invgen.solvers import PCN, ExactGaussian

F64 = torch.float64


def problem(n_obs=1):
    """Three correlated unknowns with a mean."""
    prior = GaussianPrior(torch.tensor([1.0, -2.0, 0.5], dtype=F64), torch.eye(3, dtype=F64) + 0.5)
    return InverseProblem(torch.ones(n_obs, 2, dtype=F64), MatrixOperator(torch.eye(3)[:2]), GaussianNoise(1.0), prior)


def test_a_run_stops_when_the_target_is_met_and_not_before():
    stop = StopAtESS(300, every=100, rhat=1.05)
    posterior = PCN(draws=20000, warmup=200, thin=1, beta=0.5).solve(problem(), 4, dtype=F64, callbacks=[stop])
    assert stop.stopped
    assert posterior.samples.shape[2] < 20000
    last = stop.history[-1]
    assert posterior.settings["stopped_after"] == last.step + 1 == last.draws + 200
    assert posterior.samples.shape[1:3] == (4, last.draws)
    # the figures are those of the draws that come back
    latent = posterior.latent[0]
    assert last.ess == pytest.approx(float(np.min(ess(latent))))
    assert last.rhat == pytest.approx(float(np.max(rhat(latent))))
    assert last.ess >= 300
    assert last.rhat < 1.05
    assert all(look.ess < 300 or look.rhat >= 1.05 for look in stop.history[:-1])
    assert [look.step % 100 for look in stop.history] == [99] * len(stop.history)


def test_superchains_are_judged_by_nested_rhat(capsys):
    stop = StopAtESS(100, every=250, rhat=1.1, superchains=3, progress=True)
    posterior = PCN(draws=20000, warmup=200, thin=1, beta=0.5, superchains=3).solve(
        problem(), 12, dtype=F64, callbacks=[stop]
    )
    draws = posterior.latent[0]
    wanted = nested_rhat(draws.reshape(3, 4, *draws.shape[1:]), rank_normalize=True)
    assert stop.history[-1].rhat == pytest.approx(float(np.max(wanted)))
    assert "R-hat" in capsys.readouterr().out


def test_every_observation_counts_and_broken_chains_do_not():
    g = torch.Generator().manual_seed(0)
    draws = torch.randn(8, 400, 5, generator=g, dtype=F64)
    good = StopAtESS(1, observations=2).look(draws)
    sizes = [float(np.min(ess(part))) for part in draws.reshape(2, 4, 400, 5)]
    assert good[0] == pytest.approx(min(sizes))
    shifted = draws.clone()
    shifted[5] += 3.0  # one chain of the second observation is elsewhere
    assert StopAtESS(1, observations=2).look(shifted)[1] > 1.2
    shifted[5] = math.nan
    assert StopAtESS(1, observations=2).look(shifted)[1] < 1.05
    shifted[5:] = math.nan  # one chain left of four: nothing to compare
    assert StopAtESS(1, observations=2).look(shifted) == (0.0, math.inf)
    assert StopAtESS(1).look(torch.ones(4, 100, 2))[1] == math.inf  # chains that never moved
    few = StopAtESS(1, coordinates=2).look(draws)
    assert few[0] == pytest.approx(float(np.min(ess(draws[:, :, ::3]))))


def test_rows_to_come_are_not_draws():
    kept = torch.full((3, 10, 2), math.nan)
    assert kept_so_far(kept) == 0
    kept[1:, :4] = 0.0  # the first chain is broken
    assert kept_so_far(kept) == 4


@pytest.mark.parametrize(
    "wrong",
    [{"target": 0}, {"rhat": 1.0}, {"every": 0}, {"superchains": 1}, {"least": 2}, {"observations": 0}],
)
def test_bad_settings(wrong):
    with pytest.raises(ValueError, match=r"StopAtESS needs|Nested R-hat"):
        StopAtESS(**{"target": 10, **wrong})


def test_bad_runs():
    with pytest.raises(ValueError, match="do not divide"):
        StopAtESS(10, superchains=3).look(torch.randn(4, 100, 2))
    with pytest.raises(ValueError, match="keep draws"):
        ExactGaussian().solve(problem(), 2, callbacks=[StopAtESS(10, every=1)])
    with pytest.raises(ValueError, match="chunk=8"):
        PCN(draws=2000, warmup=10, thin=1).solve(problem(2), 4, chunk=4, callbacks=[StopAtESS(1, every=60, rhat=100.0)])


def test_enough_draws_of_chains_that_disagree_do_not_end_a_run():
    draws = torch.randn(4, 400, 2, generator=torch.Generator().manual_seed(1), dtype=F64)
    assert StopAtESS(4, every=1)(0, {"kept": draws}) is True
    draws[1] += 1.0
    stop = StopAtESS(4, every=1)
    assert stop(0, {"kept": draws}) is None
    assert stop.history[0].ess > 4
    assert not stop.stopped
