"""Runs that end before their last step: a callback that says so, Ctrl-C, and what is left to go on from."""

import signal
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from invgen.contracts import LinearOperator, Solver
from invgen.driver import run
from invgen.noise import GaussianNoise
from invgen.problem import InverseProblem
from invgen.transforms import Identity


class Same(LinearOperator):
    def __init__(self):
        super().__init__((3,), (3,))

    def forward(self, x, **theta):
        return x

    def adjoint(self, d):
        return d


class Box:
    shape, grid, transform = (3,), None, Identity()

    def sample(self, n, *, seed=0):
        return torch.zeros(n, 3)


def problem(n_obs=1):
    return InverseProblem(torch.arange(3.0 * n_obs).reshape(n_obs, 3), Same(), GaussianNoise(0.1), Box())


class Interrupt:
    def __init__(self, after):
        self.left = after

    def __call__(self, step, state):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


@dataclass(frozen=True)
class Walk(Solver):
    """A random walk from the data: every draw of noise shows in the result."""

    kind: ClassVar[str] = "approximate"

    def num_steps(self, problem):
        return 70

    def init(self, problem, rng):
        data = problem.terms[0].data
        return {"x": data.expand(len(rng), -1) + rng.normal((3,), dtype=data.dtype)}

    def step(self, problem, state, rng):
        return {"x": 0.9 * state["x"] + rng.normal((3,), dtype=state["x"].dtype)}


@dataclass(frozen=True)
class Kept(Walk):
    """The walk, and every state of it after the tenth step."""

    def init(self, problem, rng):
        x = super().init(problem, rng)["x"]
        return {"x": x, "kept": torch.full((len(x), 60, 3), float("nan")), "clock": torch.tensor(0)}

    def step(self, problem, state, rng):
        clock = int(state["clock"])
        new = super().step(problem, {"x": state["x"]}, rng)
        if clock >= 10:
            state["kept"][:, clock - 10] = new["x"]
        return {**new, "kept": state["kept"], "clock": torch.tensor(clock + 1)}

    def finished_draws(self, state):
        return max(0, int(state["clock"]) - 10)

    def finish(self, problem, state):
        return {"chain": state["kept"][:, : self.finished_draws(state)]}


@pytest.mark.parametrize("asked", [5, 10, 40])
def test_a_callback_that_returns_true_ends_the_run_with_the_draws_so_far(asked, tmp_path):
    whole = run(Kept(), problem(2), 3, seed=3)
    file = tmp_path / "run"
    seen = []

    def stop(step, state):
        seen.append(step)
        return True if step + 1 == asked else None

    part = run(Kept(), problem(2), 3, seed=3, callbacks=[stop], checkpoint=file)
    draws = max(asked - 10, 1)  # a wish before the first draw waits for it
    assert part.samples.shape == (2, 3, draws, 3)
    assert torch.equal(part.samples, whole.samples[:, :, :draws])
    assert len(seen) == max(asked, 11)
    assert part.settings["stopped_after"] == max(asked, 11)
    assert not part.settings["interrupted"]
    assert not file.exists()
    assert "stopped_after" not in whole.settings


def test_a_run_of_several_chunks_cannot_be_ended_by_a_callback():
    with pytest.raises(ValueError, match="chunk=6"):
        run(Kept(), problem(2), 3, chunk=3, callbacks=[lambda step, state: True])
    with pytest.raises(ValueError, match="Walk has no draws before its last step"):
        run(Walk(), problem(), 3, callbacks=[lambda step, state: True])
    run(Walk(), problem(), 3, callbacks=[lambda step, state: 1])  # only True itself ends a run


@pytest.mark.parametrize("chunk", [6, 3])
def test_ctrl_c_in_the_first_chunk_returns_the_draws_made_so_far(tmp_path, chunk):
    whole = run(Kept(), problem(2), 3, seed=3)
    file = tmp_path / "run"

    def interrupt(step, state):
        if step == 29:
            signal.raise_signal(signal.SIGINT)

    part = run(Kept(), problem(2), 3, seed=3, chunk=chunk, checkpoint=file, callbacks=[interrupt])
    assert part.settings["interrupted"]
    assert torch.equal(part.samples, whole.samples[: chunk // 3, :, :20])
    assert torch.equal(run(Kept(), problem(2), 3, seed=3, chunk=chunk, checkpoint=file).samples, whole.samples)
    bare = run(
        Kept(), problem(2), 3, seed=3, chunk=chunk, callbacks=[Interrupt(29)]
    )  # no checkpoint, inside a callback
    assert torch.equal(bare.samples, whole.samples[: chunk // 3, :, :20])
    with pytest.raises(KeyboardInterrupt):
        run(Kept(), problem(2), 3, callbacks=[Interrupt(5)])  # nothing kept yet


def test_a_resumed_state_lies_in_memory_as_a_fresh_one_does(tmp_path):
    """Matrix products round by the alignment of what they are given: a chain would leave its path after a resume."""
    file = tmp_path / "run"
    run(Kept(), problem(), 3, checkpoint=file, callbacks=[lambda i, s: i == 29 and signal.raise_signal(signal.SIGINT)])
    places = []

    @dataclass(frozen=True)
    class Watched(Kept):
        def step(self, problem, state, rng):
            places.extend(v.data_ptr() % 64 for v in state.values() if v.ndim)
            return super().step(problem, state, rng)

    Watched.__name__ = "Kept"
    run(Watched(), problem(), 3, checkpoint=file)
    assert set(places) == {0}
