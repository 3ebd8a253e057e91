"""One training loop for every learned prior: resumable, seeded step by step, averaged weights, validation.

A prior that can be trained offers `training_loss(batch, generator) -> (batch,)` losses and, optionally,
`validation(batch) -> {name: value}`; data offer `batch(step, size, seed) -> {"x": …}`, a pure function of its
arguments, so that an interrupted run continues on exactly the numbers it would have seen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from invgen._interrupt import Stop
from invgen.checkpoints import read_checkpoint, write_checkpoint

__all__ = ["ArrayData", "Training", "TrainingData", "TrainingReport"]


class TrainingData(Protocol):
    """A stream of examples addressed by step."""

    def batch(self, step: int, size: int, seed: int) -> dict[str, Tensor]:
        """Examples of one step: "x" `(size, *shape)` and what else the prior's loss takes, on the CPU."""
        ...


@dataclass(frozen=True)
class ArrayData:
    """Examples held in one tensor, visited in seeded random order without replacement in each epoch.

    Args:
        x: `(n, *shape)` examples.
    """

    x: Tensor

    def batch(self, step: int, size: int, seed: int) -> dict[str, Tensor]:
        n = self.x.shape[0]
        wanted = torch.arange(step * size, (step + 1) * size)
        out = torch.empty(size, dtype=torch.long)
        for epoch in torch.unique(wanted // n).tolist():
            order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
            mask = wanted // n == epoch
            out[mask] = order[wanted[mask] % n]
        return {"x": self.x[out]}


@dataclass
class TrainingReport:
    """What a run did: steps done, seconds, loss curve and validation figures."""

    steps: int
    seconds: float
    losses: list[tuple[int, float]] = field(default_factory=list)
    validation: dict[str, float] = field(default_factory=dict)
    interrupted: bool = False


def _require_finite(value: float, step: int) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(
            f"The training loss is {value} at step {step}; lower learning_rate or check the data for outliers."
        )


@dataclass(frozen=True)
class Training:
    """AdamW with warm-up and cosine decay, gradient clipping and an exponential moving average of the weights.

    Args:
        steps: optimiser steps in all, those before a resume included.
        batch_size: examples a step.
        learning_rate: peak rate; decays to a hundredth by the last step.
        warmup: steps of linear warm-up.
        weight_decay: decoupled weight decay.
        clip: largest gradient norm.
        ema: decay of the moving average; early on it is (1 + step)/(10 + step) if that is smaller.
        precision: "32-true", "bf16-mixed", … as in Lightning Fabric.
        device: "cpu", "cuda", "cuda:0", …
        seed: decides initial order, noise levels and noise.
        checkpoint: file the whole state is written to every `save_every` steps, and resumed from if it exists.
        save_every: steps between two writes.
        log_every: steps between two looks at the loss (one device synchronisation each).
    """

    steps: int = 10_000
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup: int = 200
    weight_decay: float = 1e-4
    clip: float = 1.0
    ema: float = 0.999
    precision: str = "32-true"
    device: str = "cpu"
    seed: int = 0
    checkpoint: str | None = None
    save_every: int = 500
    log_every: int = 50

    def fit(
        self,
        prior: Any,
        data: TrainingData,
        *,
        validation: dict[str, Tensor] | None = None,
        progress: bool = True,
        callback: Callable[[int, float], None] | None = None,
    ) -> TrainingReport:
        """Train `prior` in place; its weights end as the moving average.

        Ctrl-C stops after the step in progress, writes the checkpoint and returns a report with `interrupted` set
        (without validation figures).

        Raises:
            ValueError: the checkpoint belongs to another network.
            FloatingPointError: the loss is no longer finite (the last checkpoint is kept).
        """
        from lightning_fabric import Fabric
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        accelerator, _, index = self.device.partition(":")
        fabric = Fabric(accelerator=accelerator, devices=[int(index)] if index else 1, precision=self.precision)  # type: ignore[arg-type]
        network: nn.Module = prior.to(fabric.device)
        network.train().requires_grad_(True)
        parameters = [p for p in network.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, lr=self.learning_rate, weight_decay=self.weight_decay, betas=(0.9, 0.99)
        )
        average = {k: v.detach().clone() for k, v in network.state_dict().items()}
        first, losses = self._resume(network, optimizer, average)
        began, done, interrupted = time.perf_counter(), first, False
        running, counted = torch.zeros((), device=fabric.device), 0
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TimeRemainingColumn(),
        )
        with Stop() as stop, Progress(*columns, disable=not progress) as bar:
            task = bar.add_task("training", total=self.steps, completed=first, loss=float("nan"))
            try:
                for step in range(first, self.steps):
                    if stop.asked:
                        raise KeyboardInterrupt
                    for group in optimizer.param_groups:
                        group["lr"] = self._rate(step)
                    batch = {k: v.to(fabric.device) for k, v in data.batch(step, self.batch_size, self.seed).items()}
                    generator = torch.Generator().manual_seed(self.seed * 7_919 + 1_000_003 * (step + 1))
                    with fabric.autocast():
                        loss = prior.training_loss(batch, generator).mean()
                    optimizer.zero_grad(set_to_none=True)
                    fabric.backward(loss)
                    torch.nn.utils.clip_grad_norm_(parameters, self.clip)
                    optimizer.step()
                    self._update(average, network, step)
                    running += loss.detach()
                    counted += 1
                    done = step + 1
                    if done % self.log_every == 0 or done == self.steps:
                        value = float(running) / counted  # fewer than log_every right after a resume
                        running.zero_()
                        counted = 0
                        _require_finite(value, done)
                        losses.append((done, value))
                        bar.update(task, completed=done, loss=value)
                        if callback is not None:
                            callback(done, value)
                    if self.checkpoint and done % self.save_every == 0:
                        _require_finite(float(running), done)  # never overwrite a good checkpoint with a bad one
                        self._save(network, optimizer, average, done, losses)
            except KeyboardInterrupt:
                interrupted = True
        if self.checkpoint and math.isfinite(float(running)):
            self._save(network, optimizer, average, done, losses)
        network.load_state_dict(average)
        network.eval().requires_grad_(False)
        figures = (
            prior.validation(validation)
            if validation is not None and not interrupted and hasattr(prior, "validation")
            else {}
        )
        return TrainingReport(done, time.perf_counter() - began, losses, figures, interrupted)

    def _rate(self, step: int) -> float:
        warm = min(1.0, (step + 1) / max(self.warmup, 1))
        fall = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(self.steps, 1))))
        return self.learning_rate * warm * (0.01 + 0.99 * fall)

    @torch.no_grad()
    def _update(self, average: dict[str, Tensor], network: nn.Module, step: int) -> None:
        decay = min(self.ema, (1 + step) / (10 + step))
        state = network.state_dict()
        names = [k for k, v in state.items() if v.is_floating_point()]
        torch._foreach_lerp_([average[k] for k in names], [state[k] for k in names], 1 - decay)

    def _save(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: dict[str, Tensor],
        step: int,
        losses: list[tuple[int, float]],
    ) -> None:
        assert self.checkpoint is not None
        tensors = {f"network.{k}": v for k, v in network.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in average.items()}
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in state.items()}
        write_checkpoint(self.checkpoint, "training", tensors, {"step": step, "losses": losses})

    def _resume(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, Tensor]
    ) -> tuple[int, list[tuple[int, float]]]:
        if not self.checkpoint or not Path(self.checkpoint).is_file():
            return 0, []
        tensors, meta = read_checkpoint(self.checkpoint, "training")
        own = network.state_dict()
        saved = {k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")}
        if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in own.items()}:
            raise ValueError(
                f"The checkpoint {self.checkpoint} was written by another network; give another file or the network it belongs to."
            )
        network.load_state_dict(saved)
        for k in average:
            average[k].copy_(tensors[f"average.{k}"])
        states: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, i, name = key.split(".", 2)
                states.setdefault(int(i), {})[name] = value
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
        return int(meta["step"]), [(int(s), float(v)) for s, v in meta["losses"]]
