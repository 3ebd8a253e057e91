r"""Simulators: any procedure that turns an unknown into data with the noise already in them.

    d = simulator(x, theta; noise),        p(d | x, theta) unknown

Such a simulator is the operator of a problem whose noise is `SimulatedNoise()`: there is no likelihood, and the solvers
that learn from simulations take it as it is.

The noise of a call follows from (seed, x, theta) alone, hashed with x rounded to float32: a simulation gives the same data
in every batch, process, precision and repetition. Two calls at one x give one data set; draws of a prior with a
density never meet twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invgen._source import source_hash
from invgen.grid import Grid
from invgen.operators.black_box import BlackBox, Executable

__all__ = ["ProgramSimulator", "Simulator"]

_OWN = ("rng", "seed")  # arguments through which a simulator takes its randomness


class Simulator(BlackBox):
    """A Python function `simulator(x, **theta) -> data` with its noise inside.

    Args:
        function: takes one model, a float64 array `model_shape`, and returns one data set `data_shape`. Randomness: a
            function with an argument `rng` is given a `numpy.random.Generator`, one with `seed` an integer; for others the
            generators of `random`, `numpy.random` and torch are seeded before each call and put back after it. An
            exception costs that item alone.
        model_shape, data_shape: of one item.
        batched: the function takes `(n, *model_shape)` and returns `(n, *data_shape)`, nuisance parameters are `(n,)`,
            and a batch has one stream of noise: its data depend on what is simulated together. A batch that raises is
            halved until the items that raise are alone.
        tensors: give torch tensors of the default dtype instead of NumPy arrays; they may be returned too.
        workers: processes that share the items; 0 computes in this one. The function must then lie at the top of a
            module, and a script must start its work under `if __name__ == "__main__":`.
        theta_names: nuisance parameters the function takes; read off its signature when omitted (arguments after the first
            without a default).
        seed: of all noise. model_grid: grid of the model.

    Attributes:
        source: hash of the function's source and of what it calls in its package: what a cache of simulations is
            checked with. failures, failure_count, calls: as those of `BlackBox`.

    Raises:
        TypeError: something that cannot be called, or not be pickled for other processes; a gradient through it.
        ValueError: a result of another shape than data_shape.

    Cost: one call of the function an item.

    Example:
        >>> problem = InverseProblem(d_obs, Simulator(simulate_galaxy, (6,), (32,), workers=4), SimulatedNoise(), prior)
        >>> posterior = NPE().solve(problem, 1000)
    """

    def __init__(
        self,
        function: Callable[..., Any],
        model_shape: tuple[int, ...],
        data_shape: tuple[int, ...],
        *,
        batched: bool = False,
        tensors: bool = False,
        workers: int = 0,
        theta_names: tuple[str, ...] | None = None,
        seed: int = 0,
        model_grid: Grid | None = None,
    ) -> None:
        if not callable(function):
            raise TypeError(f"Simulator takes a function of one model, got {type(function).__name__}.")
        if seed < 0:
            raise ValueError(f"The seed of a simulator must be a non-negative integer, got {seed}.")
        own, needed = _arguments(function)
        super().__init__(
            _Seeded(function, int(seed), tensors, own),
            model_shape,
            data_shape,
            batched=batched,
            workers=workers,
            theta_names=needed if theta_names is None else tuple(theta_names),
            model_grid=model_grid,
        )
        self.source = source_hash(function)
        self.seed = int(seed)

    @classmethod
    def examples(cls) -> list[Any]:
        """With a generator, with the global one, batched without noise."""
        return [
            cls(_noisy_sums, (2, 3), (4,)),
            cls(_noisy_tanh, (5,), (5,), seed=3),
            cls(_squares, (4,), (2,), batched=True),
        ]

    def extra_repr(self) -> str:
        seeded: Any = self.function  # `_Seeded`
        inner = seeded.function
        name = getattr(inner, "__qualname__", type(inner).__name__)
        return f"{self.model_shape} -> {self.data_shape}, {getattr(inner, '__module__', '')}.{name}, source {self.source}, seed {self.seed}"

    def _batches(self, models: list[np.ndarray], theta: list[dict[str, float]]) -> list[np.ndarray | str]:
        found = super()._batches(models, theta)
        bad = [i for i, result in enumerate(found) if isinstance(result, str)]
        if len(models) > 1:
            for half in (bad[: len(bad) // 2], bad[len(bad) // 2 :]):
                again = self._batches([models[i] for i in half], [theta[i] for i in half])
                for i, result in zip(half, again, strict=True):
                    found[i] = result
        return found


class ProgramSimulator(Executable):
    """An external program with its noise inside: a model goes into arguments or files, the data come out of a file.

    Every call has a scratch folder of its own, which is the program's working folder and is removed afterwards; no shell.

    Args:
        command: program and arguments, as a list or a line. In it and in the templates stand `{seed}` for a number below
            2³¹ of the call, `{input}`, `{output}` and `{folder}` for the two files and the folder, and `{NAME}` for the
            entries of the model in `names` and the nuisance parameters, written with all their digits. Other braces stay.
        model_shape, data_shape: of one item.
        names: one name for each entry of the model, where the program takes them one by one.
        templates: file name -> text, or a `Path` to the template, written into the scratch folder with the placeholders
            filled in.
        output: name of the file that the program writes; `{output}` stands for it.
        write: writes the model to `{input}`, `write(path, x)`; `numpy.save` when omitted. read: reads the data,
            `read(path)`; when omitted `numpy.load` for .npy, else `numpy.loadtxt` brought into data_shape.
        timeout: seconds a call may take. retries: further attempts after a failure, with the same seed: a failure that
            the random numbers cause is part of the simulator. workers: programs that run at the same time.
        theta_names: nuisance parameters. seed: of all noise. model_grid: grid of the model.

    Attributes:
        source: hash of the command, of the files that it names, of the templates, and of `write` and `read`.
        failures, failure_count, calls: as those of `Executable`.

    Raises:
        ValueError: an empty command, settings out of range, another number of names than the model has entries.
        FileNotFoundError: on use, a program that does not exist.

    Cost: one run of the program an item, more with retries.

    Example:
        >>> ProgramSimulator("./galaxy --seed {seed} config.ini", (2,), (32,), names=("mass", "radius"), output="v.txt",
        ...                  templates={"config.ini": "[halo]\\nmass = {mass}\\nradius = {radius}\\n"}, timeout=60, workers=4)
    """

    def __init__(
        self,
        command: str | Sequence[str],
        model_shape: tuple[int, ...],
        data_shape: tuple[int, ...],
        *,
        names: Sequence[str] | None = None,
        templates: Mapping[str, str | Path] | None = None,
        output: str = "data.npy",
        write: Callable[[Path, np.ndarray], Any] | None = None,
        read: Callable[[Path], Any] | None = None,
        timeout: float | None = None,
        retries: int = 0,
        workers: int = 1,
        theta_names: tuple[str, ...] = (),
        seed: int = 0,
        model_grid: Grid | None = None,
    ) -> None:
        super().__init__(
            command,
            model_shape,
            data_shape,
            write=write,
            read=read or (None if output.endswith(".npy") else _Table(tuple(data_shape))),
            timeout=timeout,
            retries=retries,
            workers=workers,
            model_grid=model_grid,
        )
        entries = int(np.prod(model_shape))
        self.names = tuple(names or ())
        self.theta_names = tuple(theta_names)  # type: ignore[misc]
        every = [*self.names, *self.theta_names]
        if self.names and len(self.names) != entries:
            raise ValueError(f"The model has {entries} entries but there are {len(self.names)} names; name each entry.")
        if len({*every, "input", "output", "folder", "seed"}) != len(every) + 4:
            raise ValueError(f"The names {every} must differ from each other and from input, output, folder and seed.")
        if seed < 0:
            raise ValueError(f"The seed of a simulator must be a non-negative integer, got {seed}.")
        self.templates = {
            name: text.read_text(encoding="utf-8") if isinstance(text, Path) else text
            for name, text in (templates or {}).items()
        }
        self.output, self.seed = output, int(seed)
        self.source = self._hash()

    @classmethod
    def examples(cls) -> list[Any]:
        """A running sum and a seed by another Python, through a template."""
        import sys

        script = "import sys, itertools; v = map(float, open('model.txt').read().split()); open(sys.argv[1], 'w').write(' '.join(map(repr, itertools.accumulate(v))))"
        return [
            cls(
                [sys.executable, "-I", "-S", "-c", script, "{output}"],
                (3,),
                (3,),
                names=("a", "b", "c"),
                templates={"model.txt": "{a} {b}\n{c}"},
                output="sums.txt",
                timeout=60.0,
                workers=2,
            )
        ]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, source {self.source}, seed {self.seed}"

    def _hash(self) -> str:
        digest = hashlib.sha256(repr([self.command, sorted(self.templates.items()), self.names, self.output]).encode())
        for k, part in enumerate(self.command):
            file = (shutil.which(part) if k == 0 else None) or part
            with contextlib.suppress(OSError, ValueError):  # an argument that is no file
                if Path(file).is_file():
                    digest.update(Path(file).read_bytes())
        for function in (self.write, self.read):
            digest.update(source_hash(function).encode())
        return digest.hexdigest()[:16]

    def _run(self, models: list[np.ndarray], theta: list[dict[str, float]]) -> list[np.ndarray | str]:
        given: list[Any] = [_Given(m, t) for m, t in zip(models, theta, strict=True)]
        return super()._run(given, [])

    def _prepare(self, folder: Path, model: Any) -> dict[str, Any]:
        x, theta = model.x, model.theta
        names: dict[str, Any] = {
            "{input}": folder / "model.npy",
            "{output}": folder / self.output,
            "{folder}": folder,
            "{seed}": _number(self.seed, x, theta) >> 33,  # many programs keep 31 bits
        }
        values = [complex(v) if np.iscomplexobj(x) else float(v) for v in x.reshape(-1)]
        names |= {f"{{{name}}}": repr(v) for name, v in zip(self.names, values, strict=False)}
        names |= {f"{{{name}}}": repr(float(v)) for name, v in theta.items()}
        self.write(folder / "model.npy", x)
        for name, text in self.templates.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            for placeholder, value in names.items():
                text = text.replace(placeholder, str(value))
            target.write_text(text, encoding="utf-8")
        return names


class _Given:
    """One model with its nuisance parameters."""

    def __init__(self, x: np.ndarray, theta: dict[str, float]) -> None:
        self.x, self.theta = x, theta


class _Table:
    """Numbers of a text file in the data's shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def __call__(self, path: Path) -> np.ndarray:
        values = np.loadtxt(path, dtype=float, ndmin=1)
        return values.reshape(self.shape) if values.size == int(np.prod(self.shape)) else values


class _Seeded:
    """A simulator whose randomness follows from the seed and its arguments."""

    def __init__(self, function: Callable[..., Any], seed: int, tensors: bool, own: str) -> None:
        self.function, self.seed, self.tensors, self.own = function, seed, tensors, own

    def __call__(self, x: np.ndarray, **theta: Any) -> np.ndarray:
        number = _number(self.seed, x, theta)
        given: Any = x
        if self.tensors:
            kind = torch.get_default_dtype()
            given = torch.from_numpy(x).to(kind.to_complex() if np.iscomplexobj(x) else kind)
            theta = {k: torch.as_tensor(v, dtype=kind) for k, v in theta.items()}
        if self.own:
            extra = {self.own: np.random.default_rng(number) if self.own == "rng" else number >> 33}
            result = self.function(given, **theta, **extra)
        else:
            with _global_seeds(number):
                result = self.function(given, **theta)
        return result.detach().cpu().resolve_conj().numpy() if isinstance(result, Tensor) else np.asarray(result)


@contextlib.contextmanager
def _global_seeds(number: int) -> Iterator[None]:
    """Seed the generators that a plain function may use, and put them back afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 — theirs, not ours
    try:
        random.seed(number)
        np.random.seed(number & 0xFFFFFFFF)  # noqa: NPY002
        torch.default_generator.manual_seed(number >> 1)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def _number(seed: int, x: np.ndarray, theta: Mapping[str, Any]) -> int:
    """64 bits of (seed, x, theta); x rounded to float32, so that both precisions see the same noise."""
    digest = hashlib.blake2b(str(seed).encode(), digest_size=8)
    single = np.complex64 if np.iscomplexobj(x) else np.float32
    digest.update(np.ascontiguousarray(x, single).tobytes())
    for name in sorted(theta):
        digest.update(name.encode() + np.ascontiguousarray(theta[name], np.float32).tobytes())
    return int.from_bytes(digest.digest(), "little")


def _arguments(function: Callable[..., Any]) -> tuple[str, tuple[str, ...]]:
    """The argument for randomness, and those that a caller must give after the model."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[1:]
    except (TypeError, ValueError):  # compiled functions without a signature
        return "", ()
    plain = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    own = next((p.name for p in plain if p.name in _OWN), "")
    return own, tuple(p.name for p in plain if p.name not in _OWN and p.default is p.empty)


def _noisy_sums(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.tanh(x).reshape(-1).cumsum()[:4] + 0.1 * rng.standard_normal(4)


def _noisy_tanh(x: np.ndarray) -> np.ndarray:
    return np.tanh(x) + 0.1 * np.random.standard_normal(5)  # noqa: NPY002 — what many simulators do


def _squares(x: np.ndarray) -> np.ndarray:
    return np.stack([(x**2).sum(1), x.sum(1)], 1)
