"""What a training run is made of between two steps: averaged weights, counters, and the file that holds them all."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from invgen.checkpoints import read_checkpoint, write_checkpoint
from invgen.priors._train_groups import Group

KIND, VERSION = "training", 2


class Average:
    """Exponential moving average of a network's floating-point weights and buffers.

    Args:
        network: whose state is followed (its tensors must stay the same objects).
        names: what is averaged: names of the state, or prefixes of them ("generator"); everything when None.
    """

    def __init__(self, network: nn.Module, names: list[str] | None = None) -> None:
        state = {k: v for k, v in network.state_dict().items() if v.is_floating_point()}
        if names is not None:
            unknown = [n for n in names if not any(_under(k, n) for k in state)]
            if unknown:
                raise ValueError(f"averaged() names {unknown[0]!r}, which is no weight of {type(network).__name__}.")
            state = {k: v for k, v in state.items() if any(_under(k, n) for n in names)}
        self.names = list(state)
        self.live = list(state.values())
        self.mean = [v.clone() for v in self.live]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        torch._foreach_lerp_(self.mean, self.live, 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.mean, strict=True))

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, mean in zip(self.names, self.mean, strict=True):
            mean.copy_(tensors[name])

    @torch.no_grad()
    def install(self) -> None:
        """Put the average in the place of the weights, for good."""
        for live, mean in zip(self.live, self.mean, strict=True):
            live.copy_(mean)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Within the block the network holds the average."""
        with torch.no_grad():
            kept = [v.clone() for v in self.live]
            self.install()
        try:
            yield
        finally:
            with torch.no_grad():
                for live, v in zip(self.live, kept, strict=True):
                    live.copy_(v)


def _under(key: str, name: str) -> bool:
    return key == name or key.startswith(name + ".")


@dataclass
class Progressed:
    """Counters and curves of a run.

    Attributes:
        step: steps done. updates: batches drawn. seconds: training time. micro: largest part of a batch in memory.
        history: one row a look at the loss. best: (validation loss, step) seen so far. stale: validations since.
        sums: (loss, gradient norm, count) of each group since the last look.
    """

    step: int = 0
    updates: int = 0
    seconds: float = 0.0
    micro: int | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    best: tuple[float, int] | None = None
    stale: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    best_weights: dict[str, Tensor] = field(default_factory=dict)


class CheckpointFile:
    """The state of a run in one file, the one before it kept as `NAME.previous`.

    A new state is written beside the file and then moved into place, so that at every moment one whole state is on disk.

    Args:
        path: the file. settings: what decides the result; a resumed run must have the same.
    """

    def __init__(self, path: str, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = Path(path), dict(settings)
        self.previous = self.path.with_name(self.path.name + ".previous")
        self._new = self.path.with_name(self.path.name + ".new")

    def save(self, network: nn.Module, groups: Mapping[str, Group], average: Average, run: Progressed) -> None:
        """Write; a disk that is full or gone is a warning, and the old file stays."""
        tensors = {f"network.{k}": v for k, v in network.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in average.tensors().items()}
        tensors |= {f"best.{k}": v for k, v in run.best_weights.items()}
        tensors |= {f"sums.{k}": v for k, v in run.sums.items()}
        for name, group in groups.items():
            for i, state in group.optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{name}.{i}.{k}": torch.as_tensor(v) for k, v in state.items()}
        meta = {k: getattr(run, k) for k in ("step", "updates", "seconds", "micro", "history", "best", "stale")}
        try:
            write_checkpoint(self._new, KIND, tensors, {**meta, "version": VERSION, "settings": self.settings})
            if self.path.exists():
                os.replace(self.path, self.previous)
            os.replace(self._new, self.path)
        except OSError as error:
            warnings.warn(f"{error} Training goes on; the last checkpoint is kept.", stacklevel=3)

    def load(self, network: nn.Module, groups: Mapping[str, Group], average: Average) -> Progressed | None:
        """Continue where the newest readable file stopped; None where there is none.

        Raises:
            ValueError: the settings or the network differ, or no file is readable.
        """
        for partial in self.path.parent.glob(f".{self._new.name}.*"):  # a killed writer left it
            partial.unlink(missing_ok=True)
        found = self._read()
        if found is None:
            return None
        tensors, meta = found
        if meta.get("version") != VERSION:
            raise ValueError(
                f"The checkpoint {self.path} was written by another version of invgen; give another file to start anew."
            )
        self._compare(meta["settings"])
        own = network.state_dict()
        saved = _part(tensors, "network.")
        if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in own.items()}:
            raise ValueError(
                f"The checkpoint {self.path} was written by another network; give another file or the network it belongs to."
            )
        network.load_state_dict(saved)
        average.load(_part(tensors, "average."))
        for name, group in groups.items():
            states: dict[int, dict[str, Tensor]] = {}
            for key, value in _part(tensors, f"optimizer.{name}.").items():
                i, what = key.split(".", 1)
                like = group.parameters[int(i)]
                # in the memory layout of the weights (channels last, say): fused AdamW walks through both side by side
                laid_out = torch.empty_like(like).copy_(value) if value.shape == like.shape else value
                states.setdefault(int(i), {})[what] = laid_out.detach()
            group.optimizer.load_state_dict(
                {"state": states, "param_groups": group.optimizer.state_dict()["param_groups"]}
            )
        device = next(network.parameters()).device
        best = meta["best"]
        return Progressed(
            **{k: meta[k] for k in ("step", "updates", "seconds", "micro", "history", "stale")},
            best=None if best is None else (float(best[0]), int(best[1])),
            sums={k: v.to(device) for k, v in _part(tensors, "sums.").items()},
            best_weights={k: v.to(device) for k, v in _part(tensors, "best.").items()},
        )

    def _read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest file that can be read."""
        if not self.path.is_file():
            # killed between the two moves of a save, or never written
            return read_checkpoint(self.previous, KIND) if self.previous.is_file() else None
        try:
            return read_checkpoint(self.path, KIND)
        except ValueError as error:
            try:
                found = read_checkpoint(self.previous, KIND)
            except (FileNotFoundError, ValueError):
                raise error from None
            damaged = self.path.with_name(self.path.name + ".damaged")
            os.replace(self.path, damaged)  # or the next save would move it over the good one
            warnings.warn(
                f"The checkpoint {self.path} is damaged (kept as {damaged.name}); going on from {self.previous.name}, step {found[1].get('step')}.",
                stacklevel=4,
            )
            return found

    def _compare(self, saved: Mapping[str, Any]) -> None:
        now = {**self.settings}
        if "examples" not in saved or "examples" not in now:  # a stream has no number of examples
            saved, now = ({k: v for k, v in d.items() if k != "examples"} for d in (saved, now))
        differ = [
            f"{k} (was {saved.get(k)!r}, now {now.get(k)!r})"
            for k in sorted({*saved, *now})
            if _plain(saved.get(k)) != _plain(now.get(k))
        ]
        if differ:
            raise ValueError(
                f"The checkpoint {self.path} belongs to a run with other settings: {', '.join(differ)}; go back to them, or give another checkpoint to start anew."
            )


def _plain(value: Any) -> Any:
    """As it comes back from JSON: tuples are lists."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
