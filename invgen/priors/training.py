"""One training loop for every learned prior: resumable to the bit, seeded update by update, averaged weights, early stop.

**What a prior offers.** A prior is a `torch.nn.Module`. With one optimiser it has

    training_loss(batch, generator) -> (batch,)     losses of `batch = {"x": (batch, *shape), …}`,

all randomness drawn from `generator` (on the CPU). A prior that needs several optimisers (a GAN) has instead

    parameter_groups() -> dict[str, list[Parameter]]      e.g. {"critic": […], "generator": […]}; no parameter in two
    losses(name, batch, generator) -> (batch,)            what group `name` minimises
    schedule(step) -> list[str]                           groups to update in this step, in order: ["critic"]*5 + ["generator"]

Each entry of the schedule is one update with a fresh batch; only its group's parameters ask for gradients and move.
Parameters in no group are not trained. Both kinds may have

    optimizer_settings(name) -> dict     AdamW's lr, betas, eps, weight_decay, amsgrad; "schedule": "cosine" (default) or
                                         "constant" after the warm-up; "clip": largest gradient norm, None for none.
                                         What is left out is as in `Training`, betas (0.9, 0.99). Of a prior without
                                         groups the name is "weights".
    averaged() -> list[str]              names, or prefixes of names, of the state that the moving average follows, e.g.
                                         ["generator"]; everything where it is missing. The rest ends as trained last.
    validation(batch) -> {name: value}   figures on held-out examples, called in eval mode with the averaged weights.

**What data offer.** `batch(step, size, seed) -> {"x": …}`, a pure function of its arguments, so that an interrupted run
continues on exactly the numbers it would have seen: `ArrayData`, files larger than memory in `training_data.py`, and every
generator of `invgen.data`, which then simulates while training. `step` counts batches, several a step where the schedule
has several updates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from invgen.priors._train_run import Run, TrainingReport
from invgen.priors.training_data import ArrayData as ArrayData
from invgen.priors.training_data import TrainingData as TrainingData

__all__ = ["Training", "TrainingReport"]

# a resumed run may go on with other values of these; all others decide its result
_MAY_DIFFER = frozenset(
    "steps device devices strategy checkpoint save_every save_minutes log_every log report validate_every patience monitor".split()
)
_PRECISIONS = ("32-true", "bf16-mixed")


@dataclass(frozen=True)
class Training:
    """AdamW with warm-up and cosine decay, gradient clipping and an exponential moving average of the weights.

    With θ_t the weights after step t, the average is a_t = β_t a_{t−1} + (1 − β_t) θ_t, β_t = min(ema, (1+t)/(10+t)).

    Args:
        steps: optimiser steps in all, those before a resume included.
        batch_size: examples an update, those of all devices together.
        learning_rate: peak rate; decays to a hundredth by the last step.
        warmup: steps of linear warm-up.
        weight_decay: decoupled weight decay.
        clip: largest gradient norm.
        ema: decay of the moving average; early on it is (1 + step)/(10 + step) if that is smaller.
        precision: "32-true", or "bf16-mixed" for the forward pass in bfloat16 where that is safe.
        device: "cpu", "cuda", "cuda:0", …
        devices: how many of them, each with its part of every batch. strategy: of Lightning Fabric ("ddp"), for several.
        seed: decides initial order, noise levels and noise.
        checkpoint: file the whole state is written to, and resumed from if it exists. The state before it is kept as
            `NAME.previous` and used, with a warning, when the newest is damaged. A resumed run ends in the same weights
            to the bit (on a CPU). Of these settings steps, device, devices, strategy, validate_every, patience, monitor
            and where and how often to save, log and report may differ from the interrupted run's; others are refused.
        save_every: steps between two writes. save_minutes: minutes between two writes, whichever comes first.
        log_every: steps between two looks at the loss (one device synchronisation each).
        log: CSV file with a row a look; continued, without duplicates, when the run is resumed.
        report: HTML page written at the end: curves, and draws beside training examples.
        validate_every: steps between two evaluations on the validation batch, with the averaged weights.
        patience: stop after so many evaluations without improvement and keep the best averaged weights.
        monitor: the figure that has to fall for patience: "validation_loss" (the training loss on the validation batch
            with fixed noise; the default), or one of the prior's `validation`.

    Cost: beside the network's own passes, one pass over the weights each for clipping, AdamW and the average.
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
    devices: int = 1
    strategy: str = "auto"
    seed: int = 0
    checkpoint: str | None = None
    save_every: int = 500
    save_minutes: float = 10.0
    log_every: int = 50
    log: str | None = None
    report: str | None = None
    validate_every: int | None = None
    patience: int | None = None
    monitor: str = "validation_loss"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(f"Training needs steps >= 1 and batch_size >= 1, got {self.steps} and {self.batch_size}.")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"The learning_rate must be positive, got {self.learning_rate}.")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is a decay in [0, 1), got {self.ema}.")
        if not self.clip > 0 or not self.save_minutes > 0:
            raise ValueError(f"clip and save_minutes must be positive, got {self.clip} and {self.save_minutes}.")
        for name in ("save_every", "log_every", "validate_every", "patience", "devices"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.precision not in _PRECISIONS:
            raise ValueError(f"The precision is one of {', '.join(_PRECISIONS)}, got {self.precision!r}.")
        if self.report is not None and not self.report.endswith((".html", ".htm")):
            raise ValueError(f"The training report is an HTML page, got the name {self.report!r}; end it in .html.")
        if self.patience is not None and self.validate_every is None:
            raise ValueError("patience counts evaluations on the validation batch; give validate_every as well.")
        if self.batch_size % self.devices:
            raise ValueError(f"batch_size {self.batch_size} does not divide among {self.devices} devices.")

    def fit(
        self,
        prior: Any,
        data: TrainingData,
        *,
        validation: dict[str, Tensor] | None = None,
        progress: bool = True,
        callback: Callable[[int, float], None] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> TrainingReport:
        """Train `prior` in place; its weights end as the moving average.

        Ctrl-C stops after the step in progress, writes the checkpoint and returns a report with `interrupted` set
        (without validation figures). When memory runs out the batch is split into parts, and said so.

        Args:
            prior: see the module's text. data: likewise; its examples have the prior's shape.
            validation: held-out examples as `data.batch` gives them.
            progress: show a bar with the time remaining. callback: called with step and loss at every look.
            settings: further plain values that decide the result (a configuration's, say); a resumed run must have the same.

        Raises:
            ValueError: data that cannot be learned from (constant, NaN, one example, another shape), a network that
                cannot take them, a checkpoint of another network or of other settings.
            FloatingPointError: the loss is no longer finite (the last checkpoint is kept).
            MemoryError: one example alone does not fit.
        """
        if self.patience is not None and validation is None:
            raise ValueError("Early stopping (patience) needs validation examples; give validation.")
        fabric = self._fabric()
        prior.to(fabric.device)
        with _own_random_numbers(fabric.device):
            return Run(self, prior, data, validation, fabric, settings).go(progress, callback)

    def _fabric(self) -> Any:
        from lightning_fabric import Fabric
        from lightning_fabric.plugins.precision import MixedPrecision

        accelerator, _, index = self.device.partition(":")
        if index and self.devices > 1:
            raise ValueError(
                f"device {self.device!r} names one device but devices is {self.devices}; leave the number out."
            )
        fabric = Fabric(
            accelerator=accelerator,
            devices=[int(index)] if index else self.devices,
            strategy=self.strategy,
            # as a plugin, for by its name Fabric announces it on stderr
            plugins=[MixedPrecision("bf16-mixed", device=accelerator)] if self.precision == "bf16-mixed" else None,
        )
        fabric.launch()
        return fabric

    def decides(self, prior: Any, data: TrainingData, further: Mapping[str, Any] | None) -> dict[str, Any]:
        """What a resumed run must have in common with the one that wrote the checkpoint."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _MAY_DIFFER}
        count = {"examples": len(data)} if isinstance(data, Sized) else {}
        return {**own, "prior class": type(prior).__name__, **count, **(further or {})}


@contextmanager
def _own_random_numbers(device: torch.device) -> Iterator[None]:
    """Leave torch's global generators as they were found."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
