"""Whether Markov chains that are killed and continued from their checkpoint are the chains that were not killed.

Runs of adapting chains (a random walk, and parallel tempering with Hamiltonian trajectories, whose ladder, steps and swaps
must all come back) are each killed with SIGKILL in a process of their own at a random moment between their first step and
their end, with a checkpoint every 50 ms, so that some are hit while one is written. The run is then continued here and
compared with the run that was not killed, bit for bit: every draw, its latent position, every figure, and the draws that
went to disk.

--fast: the same (it takes half a minute).
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from harness import Benchmark
from torch import Tensor

from invgen.draw_file import DrawFile
from invgen.noise import GaussianNoise
from invgen.operators import MatrixOperator
from invgen.posterior import Posterior
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem
from invgen.solvers import PCN, ParallelTempering

KILLS, SEED, CHAINS = 5, 11, 4


def problem() -> InverseProblem:
    """24 correlated unknowns with a mean, eight data."""
    g = torch.Generator().manual_seed(2)
    root = torch.randn(24, 24, generator=g, dtype=torch.float64) / 5
    prior = GaussianPrior(
        torch.randn(24, generator=g, dtype=torch.float64), root @ root.T + 0.1 * torch.eye(24).double()
    )
    operator = MatrixOperator(torch.randn(8, 24, generator=g, dtype=torch.float64) / 5)
    data = operator(prior.sample(1, seed=3).double()) + 0.3 * torch.randn(1, 8, generator=g, dtype=torch.float64)
    return InverseProblem(data, operator, GaussianNoise(0.3), prior)


def solvers(steps: int) -> list[PCN | ParallelTempering]:
    """What is killed: `steps` is about the number of steps of each."""
    return [
        PCN(draws=steps // 4, warmup=steps // 2, thin=2),
        ParallelTempering(draws=steps // 8, warmup=steps // 8, temperatures=5, explorer="hmc", leaps=2),
    ]


def solve(
    which: int,
    steps: int,
    folder: Path,
    *,
    checkpoint: bool,
    callback: Callable[[int, dict[str, Tensor]], None] | None = None,
) -> Posterior:
    """The run, with its draws in `folder` as well."""
    torch.set_num_threads(1)
    task, solver = problem(), solvers(steps)[which]
    file = DrawFile(folder / "draws.npy", solver, task, CHAINS, dtype=torch.float64)
    callbacks = [file] if callback is None else [callback, file]
    path = folder / "run.ckpt" if checkpoint else None
    return solver.solve(
        task, CHAINS, seed=1, dtype=torch.float64, checkpoint=path, save_seconds=0.05, callbacks=callbacks
    )


def run(folder: str, which: int, steps: int) -> None:
    """The run that is killed: prints a line when its first step is made, and one at its end."""
    told: list[int] = []

    def announce(step: int, state: dict[str, Tensor]) -> None:
        if not told:
            told.append(step)
            print("running", flush=True)

    solve(which, steps, Path(folder), checkpoint=True, callback=announce)
    print("done", flush=True)


def identical(a: Posterior, b: Posterior) -> bool:
    """Every number of two posteriors, bit for bit."""
    if a.latent is None or b.latent is None:
        return False
    return (
        torch.equal(a.samples, b.samples)
        and torch.equal(a.latent, b.latent)
        and a.stats.keys() == b.stats.keys()
        and all(torch.equal(v.nan_to_num(-7.0), b.stats[k].nan_to_num(-7.0)) for k, v in a.stats.items())
    )


class _Steps:
    """A callback that remembers the steps it saw."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, step: int, _: dict[str, Tensor]) -> None:
        self.seen.append(step)


def resumed_identical(folder: Path, kills: int = KILLS, steps: int = 800, seed: int = SEED) -> int:
    """How many of the killed and continued runs are the one that was not killed.

    Args:
        folder: to work in. kills: runs to kill, the solvers in turn. steps: of a run. seed: of the moments.
    """
    moments, same = random.Random(seed), 0
    whole: dict[int, tuple[Posterior, float]] = {}
    for k in range(kills):
        which = k % len(solvers(steps))
        if which not in whole:
            place = folder / f"whole{which}"
            place.mkdir()
            began = time.perf_counter()
            whole[which] = (solve(which, steps, place, checkpoint=True), time.perf_counter() - began)
        expected, length = whole[which]
        killed = folder / f"killed{k}"
        killed.mkdir()
        moment = _kill(killed, which, steps, moments, length)
        left = sorted(p.name for p in killed.iterdir())
        resumed = _Steps()
        found = solve(which, steps, killed, checkpoint=True, callback=resumed)
        drawn = [DrawFile.read(f / "draws.npy") for f in (killed, folder / f"whole{which}")]
        equal = identical(found, expected) and drawn[0].shape == drawn[1].shape and bool((drawn[0] == drawn[1]).all())
        same += equal
        print(
            f"{type(solvers(steps)[which]).__name__} killed {moment:.2f} s after its first step (a whole run: {length:.2f} s), leaving {', '.join(left) or 'nothing'}, continued at step {resumed.seen[0]}: "
            f"{'identical' if equal else 'DIFFERENT'} chains",
            flush=True,
        )
    return same


def _kill(folder: Path, which: int, steps: int, moments: random.Random, length: float) -> float:
    """Start the run in `folder` and kill it before its end; the moment, in seconds after its first step."""
    code = "import sys, chain_resume as c; c.run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))"
    while True:  # until it was killed before its end
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(folder), str(which), str(steps)],
            cwd=Path(__file__).parent,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        if not child.stdout.readline():
            raise RuntimeError(f"The run in {folder} ended with code {child.wait()} before its first step.")
        moment = moments.uniform(0, length)
        time.sleep(moment)
        child.send_signal(signal.SIGKILL)
        rest = child.stdout.read()
        if child.wait() == -signal.SIGKILL and "done" not in rest:
            return moment
        for file in folder.iterdir():
            file.unlink()


def main() -> None:
    bench = Benchmark("latent", "Chains after SIGKILL.")
    with tempfile.TemporaryDirectory() as folder:
        bench.add("resume_identical", resumed_identical(Path(folder)), f"of {KILLS} killed runs")
    bench.finish()


if __name__ == "__main__":
    main()
