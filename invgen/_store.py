"""What a run has finished, and the state in progress, in memory and in one file that only the same run continues."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invgen.checkpoints import read_checkpoint, write_checkpoint

if TYPE_CHECKING:
    from invgen.contracts import Solver
    from invgen.problem import InverseProblem

__all__ = ["Store"]


_COUNTERS = ("adjoint_count", "evaluations", "forward_count", "training")  # change while nothing else does


def absorb(digest: Any, value: Any, depth: int = 0) -> None:
    """Feed a value to a hash: tensors, plain values, modules, and objects by their public attributes."""
    if isinstance(value, Tensor):
        plain = value.detach().cpu().resolve_conj().contiguous()
        digest.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    elif isinstance(value, (int, float, complex, str, bool, type(None))):
        digest.update(repr(value).encode())
    elif isinstance(value, (list, tuple)):
        for part in value:
            absorb(digest, part, depth + 1)
    else:
        digest.update(type(value).__name__.encode())
        if isinstance(value, torch.nn.Module):
            for name, tensor in itertools.chain(value.named_parameters(), value.named_buffers()):
                absorb(digest, (name, tensor), depth + 1)
        if depth < 4:  # noises, covariances, priors; underscored attributes are caches, except the covariance
            for name, part in sorted(getattr(value, "__dict__", {}).items()):
                if (not name.startswith("_") and name not in _COUNTERS) or name == "_covariance":
                    digest.update(name.encode())
                    absorb(digest, part, depth + 1)


def fingerprint(problem: InverseProblem) -> str:
    """SHA-256 over data, masks, physics, noise and priors: a checkpoint continues the problem it was made for."""
    digest = hashlib.sha256()
    for term in problem.terms:
        absorb(digest, (term.data, term.mask, type(term.operator).__name__, str(term.operator)))
        for name, tensor in term.operator.state_dict().items():
            absorb(digest, (name, tensor))
        absorb(digest, term.noise)
    absorb(digest, problem.prior)
    absorb(
        digest, (problem.model_shape, sorted(problem.nuisance), [problem.nuisance[k] for k in sorted(problem.nuisance)])
    )
    return digest.hexdigest()


class Store:
    """Finished items, and the state in progress, in memory and (if asked) in one file."""

    def __init__(
        self,
        path: str | Path | None,
        solver: Solver,
        problem: InverseProblem,
        num_samples: int,
        seed: int,
        dtype: torch.dtype,
    ) -> None:
        self.path = Path(path) if path is not None else None
        self.results: dict[str, Tensor] = {}
        self.finished = 0
        self._paused: tuple[dict[str, Tensor], int, dict[str, int], list[list[int]]] | None = None
        self.key = ""
        if self.path is not None:
            text = json.dumps(
                [type(solver).__name__, self.describe(solver), num_samples, seed, str(dtype), fingerprint(problem)],
                sort_keys=True,
            )
            self.key = hashlib.sha256(text.encode()).hexdigest()
        if self.path is not None and self.path.is_file():
            tensors, meta = read_checkpoint(self.path, "run")
            if meta.get("key") != self.key:
                raise ValueError(
                    f"The checkpoint {self.path} belongs to a run with other settings, data or seed; give another file or delete it."
                )
            self.finished = int(meta["finished"])
            self.results = {k.removeprefix("done."): v for k, v in tensors.items() if k.startswith("done.")}
            # cloned: tensors of a file are not aligned in memory as torch's own, and matrix products then round otherwise
            state = {k.removeprefix("state."): v.clone() for k, v in tensors.items() if k.startswith("state.")}
            if state:
                self._paused = (
                    state,
                    int(meta["step"]),
                    {k: int(v) for k, v in meta["counters"].items()},
                    meta["part"],
                )

    @staticmethod
    def describe(solver: Any) -> dict[str, Any]:
        """Hyper-parameters as plain values."""
        if not dataclasses.is_dataclass(solver):
            return {}
        out: dict[str, Any] = {}
        for f in dataclasses.fields(solver):
            value = getattr(solver, f.name)
            if isinstance(value, Tensor):  # its repr leaves numbers out
                content = hashlib.sha256(
                    value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                )
                value = f"{value.dtype} {tuple(value.shape)} {content.hexdigest()[:16]}"
            out[f.name] = value if isinstance(value, (int, float, str, bool, type(None))) else repr(value)
        return out

    def resume(self, part: list[tuple[int, int]]) -> tuple[dict[str, Tensor], int, dict[str, int]] | None:
        if self._paused is None:
            return None
        state, step, counters, saved = self._paused
        self._paused = None
        return (state, step, counters) if [tuple(p) for p in saved] == part else None

    def add(self, result: dict[str, Tensor], finished: int) -> None:
        self.results = {k: torch.cat([self.results[k], v]) for k, v in result.items()} if self.results else result
        self.finished = finished
        self._write({}, {})

    def pause(self, part: list[tuple[int, int]], state: dict[str, Tensor], step: int, counters: dict[str, int]) -> None:
        self._write(
            {f"state.{k}": v for k, v in state.items()},
            {"step": step, "counters": counters, "part": [list(p) for p in part]},
        )

    def _write(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        if self.path is not None:
            write_checkpoint(
                self.path,
                "run",
                {**{f"done.{k}": v for k, v in self.results.items()}, **tensors},
                {"key": self.key, "finished": self.finished, **meta},
            )

    def close(self, *, keep: bool) -> None:
        """Leave the checkpoint of an interrupted run; a finished one needs it no longer."""
        if self.path is not None and not keep:
            self.path.unlink(missing_ok=True)
