"""Simulations: pairs of unknown and data, drawn from the joint law p(x) p(theta) p(d | x, theta).

What every likelihood-free method learns from. The pairs lie in memory or on disk; estimators read them in batches by
row numbers and never see the difference.

Failed simulations are left out and counted. What is left is then drawn from p(x, d | no failure): a posterior that is
learned from it is ∝ p(d | x) p(no failure | x, d) p(x), which is the posterior of the problem only where a failure does
not depend on the unknown. Where failures crowd in a corner of the prior, that corner is lost: state it in the prior.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from invgen import _simulation_store as store
from invgen._simulation_run import FailedSimulation, Sink, read_failures, run

if TYPE_CHECKING:
    from invgen.problem import InverseProblem

__all__ = ["Simulations"]

Rows = slice | range | Sequence[int] | np.ndarray | Tensor
_SCAN_BYTES = 64 << 20  # read at a time when everything is looked at


class _Picked:
    """Some rows of an array, picked when they are read."""

    def __init__(self, array: Any, index: np.ndarray) -> None:
        if isinstance(array, _Picked):
            array, index = array.array, array.index[index]
        self.array: Any = array
        self.index = index
        self.shape, self.dtype = (len(index), *array.shape[1:]), array.dtype

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: Any) -> Any:
        return _read(self.array, self.index[rows])


def _read(array: Any, rows: slice | np.ndarray) -> Any:
    """Rows of a tensor, a NumPy array or memory map, an HDF5 or zarr dataset."""
    if isinstance(rows, slice) or isinstance(array, (np.ndarray, _Picked)):
        return array[rows]
    if isinstance(array, Tensor):
        return array.index_select(0, torch.from_numpy(rows).to(array.device))
    wanted, back = np.unique(rows, return_inverse=True)  # files want growing numbers, each once
    return np.asarray(array[wanted])[back]


def _numbers(rows: Rows, n: int) -> slice | np.ndarray:
    if isinstance(rows, slice):
        return rows
    if isinstance(rows, range) and rows.step == 1 and rows.start >= 0:
        return slice(rows.start, rows.stop)
    index = (rows.cpu().numpy() if isinstance(rows, Tensor) else np.asarray(rows)).astype(np.int64, copy=False)
    if index.ndim != 1 or (index.size and (index.min() < -n or index.max() >= n)):
        raise ValueError(f"Rows are a list of numbers below {n}, got {rows!r}.")
    return np.where(index < 0, index + n, index)


def _tensor(values: Any, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    if not isinstance(values, Tensor):
        values = np.asarray(values)
        if not values.flags.writeable or not values.dtype.isnative:  # maps of a file: torch would share its pages
            values = values.astype(values.dtype.newbyteorder("="), order="C", copy=True)
        values = torch.from_numpy(np.ascontiguousarray(values))
    if dtype is not None:
        dtype = dtype.to_complex() if values.is_complex() else dtype
    return values.to(device=device, dtype=dtype)


@dataclass(frozen=True, eq=False)
class Simulations:
    """Pairs of unknown and data, row i drawn from p(x, theta, d).

    Args:
        x: models `(n, *model_shape)` in the prior's physical units.
        theta: nuisance parameters, name -> `(n,)`.
        data: one `(n, *data_shape)` a term of the problem, zero where a mask hides a datum; one array stands for a tuple of one.
        failed: simulations that gave no data; they are not among the rows (see the module's docstring for the bias).
        failures: the first 1000 of them, with `row`, `reason`, `x` and `theta`, where they are known.

    x, theta and data are each anything that can be sliced by rows: a torch tensor, a NumPy array or memory map, an HDF5 or zarr dataset.

    Raises:
        ValueError: different numbers of rows.
    """

    x: Any
    theta: Mapping[str, Any] = field(default_factory=dict)
    data: Any = ()
    failed: int = 0
    failures: Sequence[FailedSimulation] = ()

    def __post_init__(self) -> None:
        data = tuple(self.data) if isinstance(self.data, (tuple, list)) else (self.data,)
        object.__setattr__(self, "data", data)
        object.__setattr__(self, "theta", dict(self.theta))
        if not data:
            raise ValueError("Simulations need data, one array a term of the problem.")
        lengths = {"x": len(self.x), **{k: len(v) for k, v in self.theta.items()}}
        lengths |= {f"data {i}": len(d) for i, d in enumerate(data)}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"Simulations hold one row a simulation in every array, got {lengths} rows.")
        for name, values in self.theta.items():
            if len(values.shape) != 1:
                raise ValueError(
                    f"The nuisance parameter {name!r} has the shape {tuple(values.shape)}, (n,) is expected."
                )

    def __len__(self) -> int:
        return len(self.x)

    def __repr__(self) -> str:
        theta = f", theta {', '.join(self.theta)}" if self.theta else ""
        data = ", ".join(str(tuple(d.shape[1:])) for d in self.data)
        return f"Simulations({len(self)} of x {tuple(self.x.shape[1:])}{theta}, data {data}, {self.failed} failed)"

    def batch(
        self, rows: Rows, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, ...]]:
        """Some rows as tensors: x `(b, *model_shape)`, theta (name -> `(b,)`), data (one `(b, *data_shape)` a term).

        Args:
            rows: a slice, or row numbers in any order. device, dtype: of the tensors (the complex one for complex
                data); as stored when omitted. Slices of tensors in memory are views.
        """
        picked = _numbers(rows, len(self))

        def get(a: Any) -> Tensor:
            return _tensor(_read(a, picked), device, dtype)

        return get(self.x), {k: get(v) for k, v in self.theta.items()}, tuple(get(d) for d in self.data)

    def take(self, rows: Rows) -> Simulations:
        """The given rows, nothing read or copied yet."""
        picked = _numbers(rows, len(self))
        index = np.arange(len(self))[picked] if isinstance(picked, slice) else picked
        return Simulations(
            _Picked(self.x, index),
            {k: _Picked(v, index) for k, v in self.theta.items()},
            tuple(_Picked(d, index) for d in self.data),
            self.failed,
            self.failures,
        )

    def split(self, share: float = 0.1, seed: int = 0) -> tuple[Simulations, Simulations]:
        """`(train, held)`: a random share of the rows is held out, nothing copied.

        Args:
            share: of the rows in `held`, above 0 and below 1; at least one row lands on each side. seed: of the choice.

        Raises:
            ValueError: fewer than two rows, a share that is none.
        """
        n = len(self)
        if not 0 < share < 1 or n < 2:
            raise ValueError(f"A split needs a share between 0 and 1 and two rows or more, got {share} of {n} rows.")
        order = np.random.default_rng([seed, 31]).permutation(n)
        count = min(max(round(share * n), 1), n - 1)
        return self.take(np.sort(order[count:])), self.take(np.sort(order[:count]))

    def finite(self) -> Simulations:
        """Only the rows without NaN or infinite values; the others are counted in `failed`, with a warning.

        Cost: everything is read once, in pieces.
        """
        arrays = [self.x, *self.theta.values(), *self.data]
        good = np.ones(len(self), bool)
        for array in arrays:
            for rows in _pieces(array):
                values = np.asarray(array[rows].cpu() if isinstance(array, Tensor) else array[rows])
                good[rows] &= np.isfinite(values.reshape(len(values), -1)).all(1)
        bad = int((~good).sum())
        if not bad:
            return self
        kept = self.take(np.flatnonzero(good))
        object.__setattr__(kept, "failed", self.failed + bad)
        _warn(kept)
        return kept

    def check(self, problem: InverseProblem, rows: int = 1000) -> None:
        """Do these pairs belong to this problem?

        Args:
            problem: names and shapes are compared, and log p(x) of the first `rows` rows where the prior has a density.

        Raises:
            ValueError: no rows, other shapes or names, models where the prior has no support.
        """
        shapes = [tuple(t.operator.data_shape) for t in problem.terms]
        mine = [tuple(d.shape[1:]) for d in self.data]
        if len(self) == 0:
            raise ValueError(f"There are no simulations to learn from ({self.failed} failed).")
        if tuple(self.x.shape[1:]) != problem.model_shape or mine != shapes or set(self.theta) != set(problem.nuisance):
            raise ValueError(
                f"The simulations hold x {tuple(self.x.shape[1:])}, theta {sorted(self.theta)} and data {mine}, the problem has {problem.model_shape}, {sorted(problem.nuisance)} and {shapes}; simulate this problem."
            )
        from invgen.contracts import HasDensity

        x, theta, _ = self.batch(slice(0, rows))
        laws = [("x", problem.prior, x), *((k, p, theta[k].reshape(-1, 1)) for k, p in problem.nuisance.items())]
        for name, prior, values in laws:
            if isinstance(prior, HasDensity):
                outside = int((~torch.isfinite(prior.log_prob(values))).sum())
                if outside:
                    raise ValueError(
                        f"{outside} of {len(values)} simulations have {name} where {type(prior).__name__} has no support (log p(x) = −∞); simulate with the prior of the problem, or widen it."
                    )

    @staticmethod
    def of(
        problem: InverseProblem,
        n: int,
        seed: int = 0,
        *,
        chunk: int | None = None,
        path: str | Path | None = None,
        progress: bool = False,
    ) -> Simulations:
        """`n` draws of the problem's joint law, one part a seed of its own: row i does not depend on n or on `chunk`.

        Args:
            problem: prior, nuisance priors, operators, noise and masks; its data are not used.
            n: simulations asked for; failed ones are not replaced. seed: of everything.
            chunk: operator items at a time (and between two states of the file); chosen when omitted.
            path: HDF5 file that receives them, for more than fit into memory, or that should not be lost. The file of the
                same simulator, prior, noise and seed is continued: where a killed run stopped, or to a larger n.
            progress: show a bar on the terminal.

        Returns:
            `Simulations`, with data zero where a mask hides them, as the problem's own data are. Failures (NaN, an exception
            of a `Simulator`, `BlackBox` or program) are counted in `failed` and the first 1000 listed in `failures`.

        Raises:
            ValueError: n or chunk below one; every simulation failed; a file that another simulator made (by hash).

        Cost: n draws of the prior, n operator items.
        """
        if n < 1 or (chunk is not None and chunk < 1):
            raise ValueError(f"Simulations.of needs n >= 1 and chunk >= 1, got {n} and {chunk}.")
        path = None if path is None else Path(path)
        sink, failures = run(problem, n, seed, chunk, path, progress)
        arrays = store.arrays(path) if path is not None else sink.arrays
        result = _assembled({k: v[:n] for k, v in arrays.items()}, [f for f in failures if f.row < n])
        if len(result) == 0:
            reasons = f"; the first: {failures[0].reason}" if failures else ""
            raise ValueError(
                f"All {result.failed} simulations failed{reasons}. Try the operator on one draw of the prior."
            )
        if result.failed:
            _warn(result)
        return result

    def save(self, path: str | Path) -> Path:
        """Write an HDF5 file in pieces; numbers keep their precision.

        Raises:
            ValueError: nothing to save. OSError: the file cannot be written to.
        """
        path = Path(path)
        sink: Sink | None = None
        for rows in _pieces(self.x, *self.theta.values(), *self.data):
            part = self.batch(rows)
            sink = sink or Sink.like(part, len(self), path, {"failed": self.failed})
            sink.write(part, rows.start)
        if sink is None:
            raise ValueError("There are no simulations to save.")
        sink.flush()
        return path

    @staticmethod
    def open(path: str | Path) -> Simulations:
        """A file of `save` or of `of(path=)`, mapped and not read: it may be larger than memory.

        Rows that wait or failed are left out.

        Raises:
            FileNotFoundError: no such file. ValueError: another file.
        """
        path = Path(path)
        before = int(store.read_meta(path).get("failed", 0))
        return _assembled(store.arrays(path), read_failures(path), before)


def _assembled(arrays: Mapping[str, Any], failures: Sequence[FailedSimulation], failed: int = 0) -> Simulations:
    """The rows that are done."""
    state = np.asarray(arrays["state"])
    wrap = {k: v if isinstance(v, np.memmap) else torch.from_numpy(v) for k, v in arrays.items() if k != "state"}
    theta = {k.removeprefix("theta/"): v for k, v in wrap.items() if k.startswith("theta/")}
    data = tuple(wrap[f"data/{i}"] for i in range(sum(k.startswith("data/") for k in wrap)))
    every = Simulations(wrap["x"], theta, data, failed + int((state == store.FAILED).sum()), tuple(failures))
    return every if (state == store.DONE).all() else every.take(np.flatnonzero(state == store.DONE))


def _pieces(*arrays: Any) -> list[slice]:
    """Row ranges of at most 64 MB."""
    n = len(arrays[0])
    width = sum(int(np.prod(a.shape[1:], dtype=np.int64)) * 8 for a in arrays)
    step = max(1, _SCAN_BYTES // max(width, 1))
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]


def _warn(s: Simulations) -> None:
    warnings.warn(
        f"{s.failed} of {s.failed + len(s)} simulations failed and are left out: what is learned is the posterior given that the simulator works, which differs from the problem's where failures depend on the unknown.",
        stacklevel=3,
    )
