"""Physics that is only a procedure: a numpy function, or a program of its own.

Nothing is known of g but its values. Such an operator has `derivative_order` 0: solvers that follow gradients refuse it
by name, and a gradient that is asked for all the same is an error, not a silent zero. A call that fails gives NaN for
that item alone; failures are counted and listed, and the solvers without derivatives leave such items out.
"""

from __future__ import annotations

import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from invgen.grid import Grid
from invgen.operators._procedure import Failure, Procedure

__all__ = ["BlackBox", "Executable", "Failure"]


class BlackBox(Procedure):
    """A numpy function as physics: d = function(x), without derivatives.

    Args:
        function: takes one model, a float64 array `model_shape` (complex128 for complex models), and returns one data
            set `data_shape`; nuisance parameters come by name, as numbers. An exception makes that item NaN.
        model_shape, data_shape: of one item.
        batched: the function takes `(n, *model_shape)` and returns `(n, *data_shape)`; nuisance parameters are then
            arrays `(n,)`. An exception makes the whole batch NaN.
        workers: processes that share the items; 0 computes in this one. They are started on first use (seconds) and
            need a function that can be pickled: one defined at the top of a module. One that dies costs its item.
        theta_names: nuisance parameters the function takes.
        model_grid: grid of the model.

    Attributes:
        failures: the first 1000 failed calls with their reason; `failure_count` counts all, `calls` all items.

    Raises:
        TypeError: something that cannot be called, or cannot be pickled for other processes; a gradient through it.
        ValueError: a result of another shape than data_shape.

    Cost: one call of the function an item. Computed on the CPU in float64; the result has the precision of the input.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        model_shape: tuple[int, ...],
        data_shape: tuple[int, ...],
        *,
        batched: bool = False,
        workers: int = 0,
        theta_names: tuple[str, ...] = (),
        model_grid: Grid | None = None,
    ) -> None:
        if not callable(function):
            raise TypeError(f"BlackBox takes a function of one numpy array, got {type(function).__name__}.")
        if workers < 0:
            raise ValueError(f"BlackBox needs workers >= 0, got {workers}.")
        if workers:
            try:
                pickle.dumps(function)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise TypeError(
                    f"The function given to BlackBox cannot be sent to other processes ({error}); define it at the top of a module, or set workers=0."
                ) from error
        super().__init__(model_shape, data_shape, model_grid)
        self.function, self.batched, self.workers = function, batched, workers
        self.theta_names = tuple(theta_names)  # type: ignore[misc]
        self._pool: ProcessPoolExecutor | None = None

    @classmethod
    def examples(cls) -> list[Any]:
        """Item by item, batched, with complex data."""
        return [
            cls(_saturating, (2, 3), (4,)),
            cls(_saturating_batch, (5,), (5,), batched=True),
            cls(_spectrum, (6,), (4,)),
        ]

    def extra_repr(self) -> str:
        name = getattr(self.function, "__qualname__", type(self.function).__name__)
        return f"{super().extra_repr()}, {getattr(self.function, '__module__', '')}.{name}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}  # processes stay where they were started

    def _run(self, models: list[np.ndarray], theta: list[dict[str, float]]) -> list[np.ndarray | str]:
        if self.batched:
            results = self._batches(models, theta)
        elif self.workers and len(models) > 1:
            results = self._shared([(m, t) for m, t in zip(models, theta, strict=True)])
        else:
            results = [_call(self.function, m, t) for m, t in zip(models, theta, strict=True)]
        for result in results:
            if not isinstance(result, str) and tuple(np.shape(result)) != self.data_shape:
                raise ValueError(
                    f"The function of this BlackBox returned an array {tuple(np.shape(result))} for one model but data_shape is {self.data_shape}; make the two agree."
                )
        return results

    def _batches(self, models: list[np.ndarray], theta: list[dict[str, float]]) -> list[np.ndarray | str]:
        """One call in this process, or one a worker."""
        if not models:
            return []
        shares = np.array_split(np.arange(len(models)), min(max(self.workers, 1), len(models)))
        jobs = [
            (np.stack([models[i] for i in share]), {k: np.array([theta[i][k] for i in share]) for k in theta[0]})
            for share in shares
        ]
        answers = self._shared(jobs) if len(jobs) > 1 else [_call(self.function, *jobs[0])]
        results: list[np.ndarray | str] = []
        for share, answer in zip(shares, answers, strict=True):
            if not isinstance(answer, str) and len(answer) != len(share):
                raise ValueError(
                    f"The batched function of this BlackBox returned {len(answer)} data sets for {len(share)} models; it must return one each."
                )
            results += [answer] * len(share) if isinstance(answer, str) else list(answer)
        return results

    def _shared(self, jobs: list[tuple[np.ndarray, dict[str, Any]]]) -> list[np.ndarray | str]:
        """Jobs on the worker processes; after a process died, the jobs left are given out one at a time."""
        results: list[np.ndarray | str | None] = [None] * len(jobs)
        waiting: list[Future[Any]] = []
        try:
            waiting = [self._executor().submit(_call, self.function, *job) for job in jobs]
            for i, future in enumerate(waiting):
                results[i] = future.result()
        except BrokenExecutor:
            self._pool = None
        except BaseException:
            for future in waiting:
                future.cancel()
            raise
        for i, job in enumerate(jobs):
            if results[i] is None:
                try:
                    results[i] = self._executor().submit(_call, self.function, *job).result()
                except BrokenExecutor:
                    self._pool = None
                    results[i] = "the process that computed it died"
        return [r for r in results if r is not None]

    def _executor(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # a fork would copy the locks of PyTorch's threads
            self._pool = ProcessPoolExecutor(self.workers, mp_context=get_context("spawn"))
        return self._pool


class Executable(Procedure):
    """An external program as physics: the model goes into a file, the program runs, the data come out of a file.

    Every call has a scratch folder of its own, which is the program's working folder and is removed afterwards. The
    program is started without a shell, in a process group of its own, which is killed when its time is up.

    Args:
        command: program and arguments, as a list or as a line that is split like a shell would; `{input}`, `{output}`
            and `{folder}` stand for the two files and the scratch folder.
        model_shape, data_shape: of one item.
        write: writes a model (float64 array) to a path, `write(path, x)`; `numpy.save` when omitted. read: reads the
            data from a path, `read(path)`; `numpy.load` when omitted.
        timeout: seconds a call may take; None waits for ever.
        retries: further attempts after a failure.
        workers: programs that run at the same time.
        shell: give the command, a string, to /bin/sh: only for command lines you wrote yourself.
        model_grid: grid of the model.

    Attributes:
        failures: the first 1000 failed calls with their reason (exit code and the end of stderr, timeout, a result that
            cannot be read or has another shape); `failure_count` counts all, `calls` all items.

    Raises:
        ValueError: an empty command, settings out of range. TypeError: a gradient through it.
        FileNotFoundError: on use, a program that does not exist.

    Cost: one run of the program an item, more with retries.
    """

    def __init__(
        self,
        command: str | Sequence[str],
        model_shape: tuple[int, ...],
        data_shape: tuple[int, ...],
        *,
        write: Callable[[Path, np.ndarray], Any] | None = None,
        read: Callable[[Path], Any] | None = None,
        timeout: float | None = None,
        retries: int = 0,
        workers: int = 1,
        shell: bool = False,
        model_grid: Grid | None = None,
    ) -> None:
        if shell and not isinstance(command, str):
            raise ValueError("Executable with shell=True takes the command as one string.")
        self_command = command if shell else shlex.split(command) if isinstance(command, str) else list(command)
        if not self_command:
            raise ValueError("Executable needs a command: the program and its arguments.")
        if retries < 0 or workers < 1 or (timeout is not None and not timeout > 0):
            raise ValueError(
                f"Executable needs retries >= 0, workers >= 1 and a positive timeout or None, got {retries}, {workers} and {timeout}."
            )
        super().__init__(model_shape, data_shape, model_grid)
        self.command, self.shell = self_command, shell
        self.write, self.read = write or _save, read or _load
        self.timeout, self.retries, self.workers = timeout, retries, workers

    @classmethod
    def examples(cls) -> list[Any]:
        """A running sum by another Python, through text files."""
        script = "import sys, itertools; v = map(float, open(sys.argv[1]).read().split()); open(sys.argv[2], 'w').write(' '.join(map(repr, itertools.accumulate(v))))"
        command = [sys.executable, "-I", "-S", "-c", script, "{input}", "{output}"]
        return [cls(command, (4,), (4,), write=_write_text, read=_read_text, timeout=60.0, workers=2)]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.command if self.shell else shlex.join(self.command)}"

    def _run(self, models: list[np.ndarray], theta: list[dict[str, float]]) -> list[np.ndarray | str]:
        live: set[subprocess.Popen[bytes]] = set()
        stop = threading.Event()

        def attempt(model: np.ndarray) -> np.ndarray | str:
            result: np.ndarray | str = ""
            for _ in range(self.retries + 1):
                result = self._once(model, live, stop)
                if not isinstance(result, str) or stop.is_set():
                    break
            return result

        if self.workers == 1 or len(models) < 2:
            return [attempt(m) for m in models]
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                return list(pool.map(attempt, models))
            except BaseException:  # Ctrl-C reaches this thread alone: the programs are in groups of their own
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(live):
                    _kill(process)
                raise

    def _once(self, model: np.ndarray, live: set[subprocess.Popen[bytes]], stop: threading.Event) -> np.ndarray | str:
        folder = Path(tempfile.mkdtemp(prefix="invgen-run-"))
        try:
            names = self._prepare(folder, model)
            reason = self._execute(folder, names, live, stop)
            if reason:
                return reason
            try:
                result = np.asarray(self.read(names["{output}"]))
                if tuple(result.shape) != self.data_shape:
                    return f"the result has the shape {tuple(result.shape)} and not {self.data_shape}"
                return result
            except Exception as error:
                return f"the result cannot be read ({type(error).__name__}: {error})"
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _prepare(self, folder: Path, model: np.ndarray) -> dict[str, Any]:
        """Write what the program reads; what the placeholders of its command stand for."""
        self.write(folder / "model.npy", model)
        return {"{input}": folder / "model.npy", "{output}": folder / "data.npy", "{folder}": folder}

    def _execute(
        self, folder: Path, names: dict[str, Any], live: set[subprocess.Popen[bytes]], stop: threading.Event
    ) -> str:
        """Why the run failed; nothing when it did not."""
        quoted = {k: shlex.quote(str(v)) if self.shell else str(v) for k, v in names.items()}
        command = _filled(self.command, quoted) if self.shell else [_filled(c, quoted) for c in self.command]
        # a file, not a pipe: a grandchild that keeps a pipe open would be waited for
        with open(folder / "messages.txt", "wb") as messages:
            if stop.is_set():
                return "the run was stopped"
            process = subprocess.Popen(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=messages,
                shell=self.shell,
                start_new_session=True,
            )
            live.add(process)
            try:
                if stop.is_set():
                    _kill(process)
                code = process.wait(self.timeout)
            except subprocess.TimeoutExpired:
                return f"no result after {self.timeout:g} s"
            finally:
                _kill(process)  # what it may have left running
                live.discard(process)
        if code == 0:
            return ""
        said = (folder / "messages.txt").read_bytes()[-300:].decode(errors="replace").strip().replace("\n", " ")
        return f"exit code {code}{': ' + said if said else ''}"


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a program and everything it started, and wait for it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)  # its group has its own number: start_new_session
    except (ProcessLookupError, PermissionError):
        pass
    process.wait()


def _filled(text: str | Any, names: dict[str, str]) -> str:
    for name, value in names.items():
        text = text.replace(name, value)
    return str(text)


def _call(function: Callable[..., Any], model: np.ndarray, theta: dict[str, Any]) -> np.ndarray | str:
    try:
        return np.asarray(function(model.copy(), **theta))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _save(path: Path, x: np.ndarray) -> None:
    np.save(path, x, allow_pickle=False)


def _load(path: Path) -> np.ndarray:
    return np.load(path, allow_pickle=False)


def _write_text(path: Path, x: np.ndarray) -> None:
    path.write_text(" ".join(repr(float(v)) for v in x.reshape(-1)))


def _read_text(path: Path) -> np.ndarray:
    return np.array([float(v) for v in path.read_text().split()])


def _saturating(x: np.ndarray) -> np.ndarray:
    return np.tanh(x).reshape(-1).cumsum()[:4]


def _saturating_batch(x: np.ndarray) -> np.ndarray:
    return np.tanh(x).cumsum(1)


def _spectrum(x: np.ndarray) -> np.ndarray:
    return np.fft.rfft(x)
