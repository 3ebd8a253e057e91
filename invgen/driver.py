"""The one loop that runs solvers: streams of noise, chunks, progress, checkpoints, Ctrl-C, memory back-off.

A run treats `n_obs × num_samples` items. Item (o, s) owns a noise stream derived from (seed, o, s); its numbers do
not depend on how items are grouped into chunks, on the number of workers or on the device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invgen._adjoints import check_adjoints
from invgen._interrupt import Stop
from invgen._memory import keep_freed_memory
from invgen._store import Store
from invgen.streams import Streams

if TYPE_CHECKING:
    from invgen.contracts import Solver
    from invgen.posterior import Posterior
    from invgen.problem import InverseProblem

__all__ = ["DivergenceError", "Streams", "run"]


class DivergenceError(RuntimeError):
    """Every sample of a run became NaN or infinite."""


def default_chunk(shape: tuple[int, ...], device: torch.device) -> int:
    """Items a chunk: at most 32 images of 64 × 64 on a CPU, 64 on an accelerator; thousands of small vectors.

    On a CPU large images go one by one: a network's intermediate tensors above 32 MB are returned to the system after
    every layer and fault their pages in again (a UNet on four 550 × 800 sections takes three times as long as on one).
    """
    images = len(shape) > 1 and math.prod(shape) >= 1024
    if images:
        return max(1, min(32, (1 << 17) // math.prod(shape))) if device.type == "cpu" else 64
    return max(16, min(8192, (1 << 22) // max(math.prod(shape), 1)))


def run(
    solver: Solver,
    problem: InverseProblem,
    num_samples: int,
    *,
    seed: int = 0,
    chunk: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
    checkpoint: str | Path | None = None,
    save_seconds: float = 60.0,
    callbacks: Sequence[Callable[[int, dict[str, Tensor]], object]] = (),
) -> Posterior:
    """Run a solver for every observation and sample.

    Args:
        solver: what to run. problem: on what.
        num_samples: samples (chains, starts) for each observation.
        seed: of every stream.
        chunk: items treated together; see `default_chunk`. Where the items of an observation interact
            (`Solver.pooled`) they stay together: whole observations, one at a time unless chunk holds more.
        device, dtype: of the state; the operator and the prior must already be on that device.
        progress: show a bar on the terminal.
        checkpoint: file that finished chunks and, every `save_seconds` and on Ctrl-C, the running state go to; a run
            with the same settings continues from it.
        callbacks: called after each step with (step, state). One that returns True ends the run of a solver that has
            draws before its end (`finished_draws(state)`: Markov chains), once there is a draw, with the draws made so
            far and `settings["stopped_after"]` steps; all items must be one chunk.

    Returns:
        A `Posterior`. Ctrl-C returns the finished samples (the ones in progress are dropped) with
        `settings["interrupted"]`; in the first chunk it returns the draws made so far of a solver that has some.
        Samples that diverged are reported, weighted zero and left as NaN.

    Raises:
        DivergenceError: every sample became NaN or infinite.
        ValueError: an operator whose adjoint fails the dot test, which is made when a run first meets it.
            A callback that ends the run of a solver without early draws, or of one chunk among several.
        KeyboardInterrupt: Ctrl-C before anything was finished.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from invgen.posterior import Posterior, versions

    if isinstance(num_samples, bool) or not hasattr(num_samples, "__index__") or num_samples < 1:
        raise ValueError(f"num_samples must be a positive integer, got {num_samples!r}.")
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or seed < 0:
        raise ValueError(f"A seed must be a non-negative integer, got {seed!r}.")
    if chunk is not None and (not hasattr(chunk, "__index__") or chunk < 1):
        raise ValueError(f"chunk must be a positive integer or None, got {chunk!r}.")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"The state needs a real floating dtype such as torch.float32, got {dtype!r}.")
    solver.check(problem)
    place = _place(device)
    check_adjoints(problem, dtype, place)
    items = [(o, s) for o in range(problem.n_obs) for s in range(num_samples)]
    unit = num_samples if solver.pooled else 1  # what a chunk holds a whole number of
    size = chunk or (unit if solver.pooled else default_chunk(problem.model_shape, place))
    units, size = len(items) // unit, max(1, size // unit)
    size = -(-units // -(-units // size)) * unit  # equal chunks rather than a small last one
    store = Store(checkpoint, solver, problem, num_samples, seed, dtype)
    began, counts0 = time.perf_counter(), _counts(problem)
    steps = solver.num_steps(problem)
    interrupted, early = False, _Early(len(items))
    columns = (
        TextColumn(type(solver).__name__),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
    )
    large = place.type == "cpu" and size * math.prod(problem.model_shape) >= 1 << 14
    with keep_freed_memory(large), Progress(*columns, disable=not progress) as bar:
        task = bar.add_task("run", total=(steps + 1) * -(-len(items) // size))
        position = store.finished
        bar.update(task, completed=(steps + 1) * (position // size))
        try:
            while position < len(items):
                part = items[position : position + size]
                try:
                    result = _chunk(
                        solver,
                        problem,
                        part,
                        seed,
                        place,
                        dtype,
                        steps,
                        store,
                        save_seconds,
                        callbacks,
                        early,
                        lambda: bar.advance(task),
                    )
                except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                    if len(part) == unit or not _out_of_memory(error):
                        raise
                    size = -(-(len(part) // unit) // 2) * unit
                    torch.cuda.empty_cache()
                    left = (steps + 1) * -(-(len(items) - position) // size)
                    bar.update(
                        task,
                        total=(steps + 1) * -(-position // size) + left,
                        completed=(steps + 1) * -(-position // size),
                    )
                    continue
                store.add(result, position + len(part))
                position += len(part)
        except KeyboardInterrupt:
            interrupted = True
            if store.finished == 0 and not early.result:
                raise
    results, done = (store.results, store.finished) if store.finished else (early.result, early.done)
    if done < len(items):  # only whole rectangles can be returned: all observations, or the first ones, or fewer draws
        whole = done // num_samples
        if whole:
            results = {k: v[: whole * num_samples] for k, v in results.items()}
        rows, draws = (whole, num_samples) if whole else (1, done)
    else:
        rows, draws = problem.n_obs, num_samples
    bad = results.pop("first_bad_step")
    if bool((bad >= 0).all()):
        raise DivergenceError(
            f"All {len(bad)} samples of {type(solver).__name__} became NaN or infinite (first at step {int(bad.min())}); take smaller steps, or check the scales of operator, noise and prior."
        )
    counts = {k: v - counts0.get(k, 0) for k, v in _counts(problem).items()}
    settings = {
        "solver": type(solver).__name__,
        **{k: v for k, v in store.describe(solver).items()},
        "num_samples": num_samples,
        "chunk": size,
        "device": str(place),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "interrupted": interrupted,
        **({"stopped_after": early.steps} if early.steps else {}),
    }
    store.close(keep=interrupted)
    return Posterior.from_items(
        results,
        n_obs=rows,
        num_samples=draws,
        kind=solver.kind,
        first_bad_step=bad,
        counts=counts,
        settings=settings,
        seed=seed,
        seconds=time.perf_counter() - began,
        versions=versions(),
        grid=getattr(problem.prior, "grid", None),
        problem=problem,
    )


@dataclass
class _Early:
    """What becomes of a run that ends before its last step.

    Attributes:
        items: of the whole run. result, done: draws of the `done` items of the first chunk, cut short by Ctrl-C.
        steps: after which a callback ended the run; 0 where none did.
    """

    items: int
    result: dict[str, Tensor] = field(default_factory=dict)
    done: int = 0
    steps: int = 0

    def allow(self, solver: Solver, part: int) -> None:
        """Raise a ValueError where a callback may not end the run."""
        if not hasattr(solver, "finished_draws"):
            raise ValueError(
                f"A callback returned True to end the run, but {type(solver).__name__} has no draws before its last step; let the callback return None."
            )
        if part < self.items:
            raise ValueError(
                f"A callback returned True to end the run of {part} of {self.items} items, and the others would have another number of draws; give chunk={self.items}, which makes one chunk of all."
            )


def _place(device: torch.device | str | None) -> torch.device:
    """The device, once it is known that numbers can be kept there."""
    try:
        place = torch.device(device or "cpu")
        torch.empty(1, device=place).item()
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise ValueError(
            f"The device {str(device)!r} cannot be used here ({' '.join(str(error).split())[:120]}); use cpu."
        ) from error
    return place


def _chunk(
    solver: Solver,
    problem: InverseProblem,
    part: list[tuple[int, int]],
    seed: int,
    place: torch.device,
    dtype: torch.dtype,
    steps: int,
    store: Store,
    save_seconds: float,
    callbacks: Sequence[Callable[[int, dict[str, Tensor]], object]],
    early: _Early,
    tick: Callable[[], None],
) -> dict[str, Tensor]:
    rng = Streams(seed, part, device=place)
    mine = problem.select([o for o, _ in part], dtype=dtype, device=place)
    resumed = store.resume(part)
    if resumed is None:
        state, first = solver.init(mine, rng), 0
        state["first_bad_step"] = torch.full((len(part),), _NEVER, dtype=torch.long, device=place)
    else:
        state, first, counters = resumed
        state = {k: v.to(place) for k, v in state.items()}
        rng.restore(counters)
    tick()
    saved, ending = time.perf_counter(), False
    bad = state["first_bad_step"]

    def draws() -> int:
        return int(solver.finished_draws(state)) if hasattr(solver, "finished_draws") else 0

    try:
        with Stop(active=store.path is not None) as stop:
            for step in range(first, steps):
                bad = state.pop("first_bad_step")
                state = dict(solver.step(mine, state, rng))
                state["first_bad_step"] = bad = _watch(state, bad, step)
                tick()
                if step % 64 == 63 and bool((bad < _NEVER).all()):
                    break  # nothing left to compute
                for callback in callbacks:
                    if callback(step, state) is True:
                        early.allow(solver, len(part))
                        ending = True
                if store.path is not None and (stop.asked or time.perf_counter() - saved > save_seconds):
                    store.pause(part, state, step + 1, rng.counters)
                    saved = time.perf_counter()
                if stop.asked:
                    raise KeyboardInterrupt
                if ending and draws():
                    early.steps = step + 1
                    break
    except KeyboardInterrupt:
        if store.finished == 0 and draws():
            state.pop("first_bad_step", None)
            early.result, early.done = _result(solver, mine, state, bad, steps), len(part)
        raise
    state.pop("first_bad_step", None)
    return _result(solver, mine, state, bad, steps)


def _result(
    solver: Solver, problem: InverseProblem, state: dict[str, Tensor], bad: Tensor, steps: int
) -> dict[str, Tensor]:
    """What the solver makes of a state, on the host, with the first bad step of each item."""
    result = dict(solver.finish(problem, state))
    bad = _watch(result, bad, steps)
    bad = torch.where(bad == _NEVER, -1, bad)
    if "x" in result:  # what went wrong is left as NaN, never as a plausible number
        x = result["x"]
        result["x"] = torch.where(
            (bad >= 0).reshape(-1, *(1,) * (x.ndim - 1)),
            torch.full((), float("nan"), dtype=x.dtype, device=x.device),
            x,
        )
    result["first_bad_step"] = bad
    return {k: v.detach().cpu() for k, v in result.items()}


_NEVER = torch.iinfo(torch.long).max


def _watch(state: dict[str, Tensor], bad: Tensor, step: int) -> Tensor:
    """Remember, on the device, the first step at which an item was not finite (`_NEVER` for a good one)."""
    for name in ("u", "z", "x", "chain"):
        if name in state:
            # 0 · sum is 0 for a finite item (below 1e38) and NaN otherwise: one pass instead of isfinite's five
            test = state[name].reshape(len(bad), -1).sum(1) * 0
            bad = torch.where(test == test, bad, bad.clamp_max(step))
    return bad


def _out_of_memory(error: BaseException) -> bool:
    """True for the accelerator's error and for the CPU allocator's, which is a plain RuntimeError."""
    return (
        isinstance(error, (torch.OutOfMemoryError, MemoryError))
        or "not enough memory" in str(error)
        or "can't allocate memory" in str(error)
    )


def _counts(problem: InverseProblem) -> dict[str, int]:
    return {
        "network": int(getattr(problem.prior, "evaluations", 0)),
        "forward": sum(t.operator.forward_count for t in problem.terms),
        "adjoint": sum(getattr(t.operator, "adjoint_count", 0) for t in problem.terms),
    }
