"""The loop behind `Simulations.of`: blocks with seeds of their own, failures listed, files that only the same simulator continues."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from invgen import _simulation_store as store
from invgen._source import source_hash
from invgen._store import absorb
from invgen.driver import Streams

if TYPE_CHECKING:
    from invgen.problem import InverseProblem

BLOCK = 4096  # simulations that share a seed: numbers do not depend on how many run at a time
_LISTED, _SHOWN = 1000, 64  # failures listed; entries of the model kept of each

Part = tuple[Tensor, Mapping[str, Tensor], Sequence[Tensor]]


@dataclass(frozen=True, eq=False)
class FailedSimulation:
    """A simulation that gave no data.

    Attributes:
        row: its number among all that were asked for. reason: the exception, or what was not finite.
        x: the first 64 entries of the model. theta: nuisance parameters.
    """

    row: int
    reason: str
    x: tuple[float, ...]
    theta: dict[str, float]


class Sink:
    """Rows on their way into memory or a file; those that are not finite are marked as failed."""

    def __init__(self, arrays: dict[str, Any]) -> None:
        self.arrays, self.state = arrays, arrays["state"]

    @classmethod
    def like(cls, part: Part, n: int, path: Path | None = None, meta: Mapping[str, Any] | None = None) -> Sink:
        """Room for `n` rows such as those of `part`."""
        named = {k: (tuple(v.shape[1:]), torch.empty(0, dtype=v.dtype).numpy().dtype) for k, v in _named(part).items()}
        if path is None:
            arrays: dict[str, Any] = {k: np.empty((n, *shape), dtype) for k, (shape, dtype) in named.items()}
            return cls({**arrays, "state": np.zeros(n, np.uint8)})
        theta = {k.removeprefix("theta/"): v[1] for k, v in named.items() if k.startswith("theta/")}
        data = [named[f"data/{i}"] for i in range(len(part[2]))]
        store.create(path, n, named["x"], theta, data, meta)
        return cls(store.arrays(path, "r+"))

    def write(self, part: Part, start: int) -> np.ndarray:
        """Store rows from `start` on; which of them are finite."""
        rows = slice(start, start + len(part[0]))
        good = torch.ones(len(part[0]), dtype=torch.bool)
        for name, values in _named(part).items():
            values = values.detach().cpu().resolve_conj()
            good &= torch.isfinite(values).reshape(len(values), -1).all(1)
            self.arrays[name][rows] = values.numpy()
        # last: a row is done when everything of it is there
        self.state[rows] = np.where(good.numpy(), store.DONE, store.FAILED)
        return good.numpy()

    def flush(self) -> None:
        for array in self.arrays.values():
            if isinstance(array, np.memmap):
                array.flush()


def _named(part: Part) -> dict[str, Tensor]:
    x, theta, data = part
    return {"x": x, **{f"theta/{k}": v for k, v in theta.items()}, **{f"data/{i}": d for i, d in enumerate(data)}}


def run(
    problem: InverseProblem, n: int, seed: int, chunk: int | None, path: Path | None, progress: bool
) -> tuple[Sink, list[FailedSimulation]]:
    """Simulate the rows that wait; see `Simulations.of`."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    origin = provenance(problem, seed) if path is not None else {}
    sink = _continued(path, origin, n) if path is not None and path.exists() else None
    failures: list[FailedSimulation] = []
    size = chunk or _chunk(problem)
    columns = (TextColumn("simulations"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task("simulate", total=n)
        for block, first in enumerate(range(0, n, BLOCK)):
            count = min(BLOCK, n - first)
            if sink is not None and (sink.state[first : first + count] != store.WAITING).all():
                bar.advance(task, count)
                continue
            own = int(np.random.SeedSequence([seed, block]).generate_state(1)[0])
            x, theta = _unknowns(problem, count, own)
            for start in range(0, count, size):
                rows = range(start, min(start + size, count))
                place = slice(first + rows.start, first + rows.stop)
                if sink is None or (sink.state[place] == store.WAITING).any():
                    some = {k: v[rows.start : rows.stop] for k, v in theta.items()}
                    part, reasons = _data(problem, x[rows.start : rows.stop], some, rows, own)
                    sink = sink or Sink.like(part, n, path, {"origin": origin})
                    bad = np.flatnonzero(~_finite(part))
                    new = [_failure(part, int(i), place.start, reasons) for i in bad[: _LISTED - len(failures)]]
                    if path is not None and new:
                        _append(path, new)
                    failures += new
                    sink.write(part, place.start)
                bar.advance(task, len(rows))
    assert sink is not None
    sink.flush()
    return sink, (failures if path is None else read_failures(path))


def _unknowns(problem: InverseProblem, n: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """x and theta as `InverseProblem.simulate` draws them."""
    from invgen.problem import _derived

    x = problem.prior.sample(n, seed=seed)
    laws = enumerate(problem.nuisance.items())
    return x, {k: p.sample(n, seed=_derived(seed, i)).reshape(n) for i, (k, p) in laws}


def _data(
    problem: InverseProblem, x: Tensor, theta: dict[str, Tensor], rows: range, seed: int
) -> tuple[Part, dict[int, str]]:
    """Data of some rows of a block, zero where masked, and why rows failed where the operator says so."""
    boxes: list[Any] = [m for t in problem.terms for m in t.operator.modules() if hasattr(m, "failures")]
    before = [(box.calls, len(box.failures)) for box in boxes]
    with torch.no_grad():
        predictions = problem.predict(x, **theta)
    reasons: dict[int, str] = {}
    for box, (calls, listed) in zip(boxes, before, strict=True):
        for failure in box.failures[listed:]:
            reasons.setdefault(failure.call - calls, failure.reason)
    streams = Streams(seed, rows, salt="simulate")
    data = []
    for i, (term, prediction) in enumerate(zip(problem.terms, predictions, strict=True)):
        whole = torch.isfinite(prediction).reshape(len(x), -1).all(1)
        filled = torch.where(_column(whole, prediction), prediction, torch.ones_like(prediction))
        with torch.no_grad():
            d = term.noise.draw(filled, streams.spawn(f"term{i}"), **theta)  # Poisson noise refuses NaN
        d = torch.where(_column(whole, d), d, torch.full_like(d, torch.nan))
        if term.mask is not None:
            d = torch.where(term.mask.to(d.device) | ~_column(whole, d), d, torch.zeros_like(d))
        data.append(d)
    return (x, theta, data), reasons


def _column(flags: Tensor, like: Tensor) -> Tensor:
    return flags.reshape(-1, *[1] * (like.ndim - 1))


def _finite(part: Part) -> np.ndarray:
    good = [torch.isfinite(v).reshape(len(v), -1).all(1) for v in _named(part).values()]
    return torch.stack([g.cpu() for g in good]).all(0).numpy()


def _failure(part: Part, i: int, first: int, reasons: Mapping[int, str]) -> FailedSimulation:
    x, theta, _ = part
    entries = x[i].reshape(-1)[:_SHOWN].real.tolist()
    reason = reasons.get(i, "NaN or infinite values")
    return FailedSimulation(first + i, reason, tuple(entries), {k: float(v[i]) for k, v in theta.items()})


def _chunk(problem: InverseProblem) -> int:
    """A block of an operator in torch; a few calls a worker of a procedure, so that a kill costs little."""
    workers = [max(getattr(t.operator, "workers", 0), 1) for t in problem.terms if hasattr(t.operator, "failures")]
    batched = all(getattr(t.operator, "batched", True) for t in problem.terms)
    return min(BLOCK, 16 * max(workers)) if workers and not batched else BLOCK


# --- files --------------------------------------------------------------------------------------------------------------


def provenance(problem: InverseProblem, seed: int) -> dict[str, str]:
    """What decides the numbers of a simulation, each as a hash (the seed as it is)."""
    parts: dict[str, list[Any]] = {"simulator": [], "noise or mask": [], "prior": [problem.prior], "nuisance": []}
    for term in problem.terms:
        operator = term.operator
        parts["simulator"] += [type(operator).__name__, str(operator), sorted(operator.state_dict().items())]
        for module in operator.modules():
            if hasattr(module, "function"):
                parts["simulator"].append(getattr(module, "source", None) or source_hash(module.function))
            elif type(module).__module__.split(".")[0] not in ("invgen", "torch"):
                parts["simulator"].append(source_hash(type(module)))
        parts["noise or mask"] += [term.noise, term.mask]
    parts["nuisance"] = [[k, p] for k, p in sorted(problem.nuisance.items())]
    out = {"seed": str(seed)}
    for name, values in parts.items():
        digest = hashlib.sha256()
        absorb(digest, values)
        out[name] = digest.hexdigest()[:16]
    return out


def _continued(path: Path, origin: Mapping[str, str], n: int) -> Sink:
    """The file of an earlier run of the same simulations, with room for `n`."""
    meta = store.read_meta(path)
    then = meta.get("origin")
    if not then:
        raise ValueError(
            f"The simulations in {path} do not say what made them, so that they cannot be continued; open them with Simulations.open, or give another path."
        )
    changed = [f"{name} ({then.get(name)} there, {now} now)" for name, now in origin.items() if then.get(name) != now]
    if changed:
        raise ValueError(
            f"The simulations in {path} are stale: they were made with another {', another '.join(changed)}. Delete the file or give another path; Simulations.open reads the old ones as they are."
        )
    old = store.arrays(path, "r+")
    if len(old["state"]) >= n:
        return Sink(old)
    theta = {k.removeprefix("theta/"): v.dtype for k, v in old.items() if k.startswith("theta/")}
    data = [
        (old[f"data/{i}"].shape[1:], old[f"data/{i}"].dtype) for i in range(sum(k.startswith("data/") for k in old))
    ]
    larger = path.with_name(f".{path.name}.larger")
    store.create(larger, n, (old["x"].shape[1:], old["x"].dtype), theta, data, meta)
    new = store.arrays(larger, "r+")
    for name in [k for k in old if k != "state"] + ["state"]:
        for start in range(0, len(old[name]), BLOCK):
            new[name][start : min(start + BLOCK, len(old[name]))] = old[name][start : start + BLOCK]
    Sink(new).flush()
    larger.replace(path)
    return Sink(store.arrays(path, "r+"))


def _list(path: Path) -> Path:
    return path.with_name(path.name + ".failures.jsonl")


def _append(path: Path, failures: Sequence[FailedSimulation]) -> None:
    with open(_list(path), "a", encoding="utf-8") as file:
        for f in failures:
            file.write(json.dumps({"row": f.row, "reason": f.reason, "x": f.x, "theta": f.theta}) + "\n")


def read_failures(path: Path) -> list[FailedSimulation]:
    """The failures listed beside a file, each row once; a line cut by a kill is left out."""
    found: dict[int, FailedSimulation] = {}
    if _list(path).is_file():
        for line in _list(path).read_text(encoding="utf-8").splitlines():
            try:
                f = json.loads(line)
                found[f["row"]] = FailedSimulation(f["row"], f["reason"], tuple(f["x"]), f["theta"])
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
    return [found[k] for k in sorted(found)][:_LISTED]
