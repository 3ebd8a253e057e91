r"""Draws on disk: every n-th state of running chains, decoded, in one file that a killed run goes on writing.

The chains of a run are rows of a NumPy file `(chain, draw, *shape)` that is written in place as a memory map, so that
neither the draws nor their decoding are held in memory. Which row a state belongs to follows from its own clock; a run
that was killed and continues from its checkpoint writes the rows after the checkpoint a second time, with the same
numbers. A second file notes which rows are complete, each after its numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from invgen.contracts import Solver
    from invgen.problem import InverseProblem

__all__ = ["DrawFile"]


class DrawFile:
    """Callback of `invgen.driver.run` that writes decoded states of Markov chains to a file.

    Args:
        path: file to write, `.npy`. Beside it: `NAME.rows.npy` (which draws are complete) and, with nuisance parameters,
            `NAME.theta.npy` `(chain, draw, parameter)` in the order of `problem.nuisance`.
        solver: the chain that runs (its warm-up, draws and thinning are read). problem: as given to it.
        num_samples: chains of an observation, as given to `run`.
        every: steps between draws; the solver's `thin` when omitted. The solver's own `draws` may be small: the file takes
            every `every`-th of all its draws · thin steps after the warm-up.
        dtype: of the file.

    The chains of all observations are one axis, observations first, and the run is one chunk (`chunk=` all items, the
    default with one observation). A fresh run overwrites the file; one that continues from a checkpoint continues the file.

    A kill at any moment loses nothing that a checkpoint has (the pages belong to the system); a power failure may, between
    calls of `flush`, which happens every 256 draws and at the end.

    Raises:
        ValueError: chains in another number than the file has; a run that continues without the rows made before.
        OSError: a folder that cannot be written to.

    Cost: one decode of every chain for each draw. Example:
        >>> file = DrawFile("draws.npy", solver, problem, 16, every=10)
        >>> solver.solve(problem, 16, checkpoint="run.ckpt", callbacks=[file])
        >>> DrawFile.read("draws.npy").shape
    """

    def __init__(
        self,
        path: str | Path,
        solver: Solver,
        problem: InverseProblem,
        num_samples: int,
        *,
        every: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        from invgen.solvers._chain import Chain
        from invgen.solvers._target import Target

        if not isinstance(solver, Chain):
            raise TypeError(
                f"DrawFile writes the states of Markov chains, and {type(solver).__name__} is none; save its posterior instead."
            )
        self.path = Path(path)
        if self.path.suffix != ".npy":
            raise ValueError(f"DrawFile writes NumPy files, got {self.path.name!r}; name it something.npy.")
        self.warmup, self.every = solver.warmup, int(solver.thin if every is None else every)
        self.draws = solver.draws * solver.thin // self.every if self.every > 0 else 0
        if self.draws < 1:
            raise ValueError(
                f"Every {self.every}-th of {solver.draws * solver.thin} steps makes no draw; give every between 1 and that."
            )
        self.target = Target(problem, solver.space)
        self.chains = problem.n_obs * num_samples
        self.dtype = np.dtype(str(dtype).removeprefix("torch."))
        self._files: dict[str, np.memmap[Any, Any]] = {}

    def __call__(self, step: int, state: dict[str, Tensor]) -> None:
        """Write the state if it is one of the draws."""
        clock = int(state["clock"])  # steps made
        if not self._files:
            self._open(clock, len(state["z"]))
        row, rest = divmod(clock - self.warmup, self.every)
        if rest or not 1 <= row <= self.draws:
            return
        x, theta = self.target.physical(state["z"])
        self._files["x"][:, row - 1] = x.cpu().numpy()
        for i, values in enumerate(theta.values()):
            self._files["theta"][:, row - 1, i] = values.cpu().numpy()
        self._files["rows"][row - 1] = 1  # after the numbers: a row is complete or not there
        if row % 256 == 0 or row == self.draws:
            self.flush()

    def flush(self) -> None:
        """Hand everything written to the disk."""
        for file in self._files.values():
            file.flush()

    def _open(self, clock: int, chains: int) -> None:
        if chains != self.chains:
            raise ValueError(
                f"The state holds {chains} chains but the file {self.chains}; give DrawFile the num_samples of the run, and the run chunk={self.chains}."
            )
        shapes = {"x": (self.chains, self.draws, *self.target.problem.model_shape), "rows": (self.draws,)}
        if self.target.names:
            shapes["theta"] = (self.chains, self.draws, len(self.target.names))
        made = max(0, min(self.draws, (clock - 1 - self.warmup) // self.every))  # before this step
        if clock > 1:
            self._files = {name: self._continue(name, shape, made) for name, shape in shapes.items()}
            found = int(self._files["rows"][:made].sum())
            if found < made:
                self._files = {}
                raise ValueError(
                    f"The run continues after {made} draws, but {self.path} holds {found} of them; give the file of that run, or start the run anew without its checkpoint."
                )
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kinds = {"x": self.dtype, "rows": np.dtype(np.uint8), "theta": self.dtype}
            # the notes first: numbers of another run must not look complete
            for name in sorted(shapes, key=lambda n: n != "rows"):
                self._files[name] = np.lib.format.open_memmap(
                    _part(self.path, name), mode="w+", dtype=kinds[name], shape=shapes[name]
                )
        except OSError as error:
            self._files = {}
            raise OSError(
                f"Cannot write the draws to {self.path}: {error.strerror or error}; choose a folder with room."
            ) from error

    def _continue(self, name: str, shape: tuple[int, ...], made: int) -> np.memmap[Any, Any]:
        path = _part(self.path, name)
        if not path.is_file():
            if made == 0:  # killed before the first draw of the file
                return np.lib.format.open_memmap(
                    path, mode="w+", dtype=np.uint8 if name == "rows" else self.dtype, shape=shape
                )
            raise ValueError(
                f"The run continues after {made} draws, but there is no file {path}; start the run anew without its checkpoint."
            )
        file = np.lib.format.open_memmap(path, mode="r+")
        if file.shape != shape or (name != "rows" and file.dtype != self.dtype):
            raise ValueError(
                f"{path} holds {file.dtype} {file.shape} but this run writes {self.dtype} {shape}; give the file of that run."
            )
        return file

    @staticmethod
    def read(path: str | Path, *, theta: bool = False) -> np.memmap[Any, Any]:
        """Complete draws `(chain, draw, *shape)`, or theta `(chain, draw, parameter)`, as a read-only memory map.

        Numbers are read from disk when they are used; a run may still be writing.

        Raises:
            FileNotFoundError: no such file. ValueError: a file without its notes.
        """
        path = Path(path)
        for name in ("x", "rows", *(("theta",) if theta else ())):
            if not _part(path, name).is_file():
                raise FileNotFoundError(f"There are no draws at {_part(path, name)}; check the path.")
        rows = np.load(_part(path, "rows"))
        complete = int(np.logical_and.accumulate(rows == 1).sum())
        return np.load(_part(path, "theta" if theta else "x"), mmap_mode="r")[:, :complete]


def _part(path: Path, name: str) -> Path:
    return path if name == "x" else path.with_suffix(f".{name}.npy")
