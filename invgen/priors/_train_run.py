"""One run of the training loop: the pieces, the loop over them, and what is looked at from outside."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from invgen._interrupt import Stop
from invgen.priors._train_checks import check_batch_of, check_data, check_validation
from invgen.priors._train_groups import WHOLE, Group, Updates, make_groups
from invgen.priors._train_log import CsvLog
from invgen.priors._train_state import Average, CheckpointFile, Progressed
from invgen.priors.training_data import TrainingData

if TYPE_CHECKING:
    from invgen.priors.training import Training


@dataclass
class TrainingReport:
    """What a run did.

    Attributes:
        steps: done, those before a resume included. seconds: of training, likewise.
        losses: (step, mean loss since the last entry); of the last group of the schedule where there are several.
        validation: figures of the final weights. interrupted: by Ctrl-C.
        history: one row a look at the run: step, seconds, loss, learning_rate, gradient_norm (with the group's name
            appended where there are several), and validation figures where they were evaluated.
        stopped_early: whether the validation loss stopped falling. best_step: of the weights kept, then.
    """

    steps: int
    seconds: float
    losses: list[tuple[int, float]] = field(default_factory=list)
    validation: dict[str, float] = field(default_factory=dict)
    interrupted: bool = False
    history: list[dict[str, float]] = field(default_factory=list)
    stopped_early: bool = False
    best_step: int | None = None


class Run:
    """One call of `fit`: the pieces, and the loop over them."""

    def __init__(
        self,
        training: Training,
        prior: Any,
        data: TrainingData,
        validation: dict[str, Tensor] | None,
        fabric: Any,
        settings: Mapping[str, Any] | None,
    ) -> None:
        self.training, self.prior, self.data, self.fabric = training, prior, data, fabric
        self.network: nn.Module = prior
        self.network.train().requires_grad_(True)
        self.groups = make_groups(prior, training)
        if fabric.world_size > 1:
            for tensor in self.network.state_dict().values():
                tensor.copy_(fabric.broadcast(tensor))
        self.average = Average(self.network, prior.averaged() if hasattr(prior, "averaged") else None)
        self.file = (
            CheckpointFile(training.checkpoint, training.decides(prior, data, settings))
            if training.checkpoint
            else None
        )
        self.run = (self.file.load(self.network, self.groups, self.average) if self.file else None) or Progressed()
        self.updates = Updates(self.groups, fabric, self.run.micro)
        self.csv = CsvLog(training.log, self.run.history) if training.log and fabric.is_global_zero else None
        self.finished = self.run.step >= training.steps or self._stale
        self.validation = validation
        if validation is not None:
            check_validation(validation, prior)
            self.validation = {k: v.to(fabric.device) for k, v in validation.items()}
        if not self.finished:
            check_data(data, prior)

    def go(self, progress: bool, callback: Callable[[int, float], None] | None) -> TrainingReport:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        training, run = self.training, self.run
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TimeRemainingColumn(),
        )
        interrupted, self.half_done = False, False
        self.before, self.began = run.seconds, time.perf_counter()
        first = run.step
        saved = self.began
        show = progress and self.fabric.is_global_zero
        with Stop() as stop, Progress(*columns, disable=not show) as bar:
            task = bar.add_task("training", total=training.steps, completed=run.step, loss=float("nan"))
            try:
                while not self.finished:
                    if self._anywhere(stop.asked):
                        raise KeyboardInterrupt
                    self._step(run.step)
                    if run.step % training.log_every == 0 or run.step == training.steps:
                        loss = self._look()
                        bar.update(task, completed=run.step, loss=loss)
                        if callback is not None:
                            callback(run.step, loss)
                    if (
                        training.validate_every
                        and self.validation is not None
                        and run.step % training.validate_every == 0
                    ):
                        self._validate()
                    self.finished = run.step >= training.steps or self._stale
                    due = time.perf_counter() - saved > 60 * training.save_minutes
                    if self.file and not self.finished and (run.step % training.save_every == 0 or due):
                        self._save()
                        saved = time.perf_counter()
            except KeyboardInterrupt:
                interrupted = True
        run.seconds = self.before + time.perf_counter() - self.began
        moved = run.step > first or not run.step  # a finished run that is asked for again has nothing new to save
        if self.file and moved and not self.half_done and all(math.isfinite(float(s[0])) for s in run.sums.values()):
            self._save()
        return self._finish(interrupted)

    # --- one step ---------------------------------------------------------------------------------------------------

    def _step(self, step: int) -> None:
        training, run = self.training, self.run
        for name in self.prior.schedule(step) if hasattr(self.prior, "schedule") else (WHOLE,):
            batch = self._batch(run.updates)
            group = self._group(name)
            # one stream an update and process, also for layers that draw from torch's own generator
            seed = training.seed * 7_919 + 1_000_003 * (run.updates + 1) + 998_244_353 * self.fabric.global_rank
            torch.default_generator.manual_seed(seed)
            if self.fabric.device.type == "cuda":
                torch.cuda.manual_seed(seed)
            self.half_done = True
            seen = self.updates(name, group.rate(step, training), batch, seed)
            run.sums[name] = run.sums[name] + seen if name in run.sums else seen
            run.updates += 1
        self.average.update(min(training.ema, (1 + step) / (10 + step)))
        run.step, self.half_done = step + 1, False

    def _group(self, name: str) -> Group:
        if name not in self.groups:
            raise ValueError(
                f"The schedule of {type(self.prior).__name__} names the group {name!r}; its groups are {', '.join(self.groups)}."
            )
        return self.groups[name]

    def _batch(self, number: int) -> dict[str, Tensor]:
        """This process's part of a batch: with n processes, batch n·number + rank of a size n times smaller."""
        world, device = self.fabric.world_size, self.fabric.device
        size = self.training.batch_size // world
        batch = self.data.batch(number * world + self.fabric.global_rank, size, self.training.seed)
        if not getattr(self, "_checked", False):
            check_batch_of(self.prior, self.groups, batch, device)
            self._checked = True
        return batch if device.type == "cpu" else {k: v.to(device, non_blocking=True) for k, v in batch.items()}

    # --- looks from outside -----------------------------------------------------------------------------------------

    def _look(self) -> float:
        """Write a row of the history; the loss of the last group. The one place that waits for the device."""
        run, row = self.run, {"step": float(self.run.step), "seconds": self._seconds}
        value = float("nan")
        for name, group in self.groups.items():
            if name not in run.sums:
                continue
            total = self.fabric.all_reduce(run.sums.pop(name), reduce_op="sum").tolist()
            value, norm = total[0] / total[2], total[1] / total[2]
            _require_finite(value, run.step)
            tail = "" if name == WHOLE else f"_{name}"
            row |= {
                f"loss{tail}": value,
                f"learning_rate{tail}": float(group.optimizer.param_groups[0]["lr"]),
                f"gradient_norm{tail}": norm,
            }
        self._row(row)
        return value

    def _row(self, row: dict[str, float]) -> None:
        history = self.run.history
        if history and history[-1]["step"] == row["step"]:
            history[-1] |= row
        else:
            history.append(row)
        if self.csv:
            self.csv.write(history)

    def _validate(self) -> None:
        run, training = self.run, self.training
        with self.average.swapped():
            self.network.eval()
            figures = self.fabric.broadcast(self._figures())
            self.network.train()
        self._row({"step": float(run.step), "seconds": self._seconds, **figures})
        if training.patience is None:
            return
        if training.monitor not in figures:
            raise ValueError(
                f"patience watches {training.monitor!r}, which {type(self.prior).__name__} does not report; known are {', '.join(figures) or 'none'}."
            )
        if run.best is None or figures[training.monitor] < run.best[0]:
            run.best, run.stale = (figures[training.monitor], run.step), 0
            run.best_weights = {k: v.clone() for k, v in self.average.tensors().items()}
        else:
            run.stale += 1

    def _figures(self) -> dict[str, float]:
        """The training loss on the validation batch with fixed noise, and what the prior itself reports."""
        assert self.validation is not None
        figures = {}
        if WHOLE in self.groups:
            size, n = self.training.batch_size, len(self.validation["x"])
            generator, total = torch.Generator().manual_seed(0), 0.0
            with torch.no_grad(), self.fabric.autocast():
                for i in range(0, n, size):
                    part = {k: v[i : i + size] for k, v in self.validation.items()}
                    total += float(self.prior.training_loss(part, generator).sum())
            figures["validation_loss"] = total / n
        return figures | (self.prior.validation(self.validation) if hasattr(self.prior, "validation") else {})

    @property
    def _stale(self) -> bool:
        return self.training.patience is not None and self.run.stale >= self.training.patience

    @property
    def _seconds(self) -> float:
        return self.before + time.perf_counter() - self.began

    def _anywhere(self, asked: bool) -> bool:
        """Whether any process was asked to stop; all must leave after the same step."""
        if self.fabric.world_size == 1:
            return asked
        flag = torch.tensor(float(asked), device=self.fabric.device)
        return bool(self.fabric.all_reduce(flag, reduce_op="sum") > 0)

    def _save(self) -> None:
        if self.file is None or not self.fabric.is_global_zero:
            return
        for total in self.run.sums.values():  # never overwrite a good checkpoint with a bad one
            _require_finite(float(total[0]), self.run.step)
        self.run.seconds, self.run.micro = self._seconds, self.updates.micro
        self.file.save(self.network, self.groups, self.average, self.run)

    def _finish(self, interrupted: bool) -> TrainingReport:
        run, training = self.run, self.training
        if training.patience is not None and run.best_weights and not interrupted:
            self.average.load(run.best_weights)
        self.average.install()
        self.network.eval().requires_grad_(False)
        known = self.validation is not None and not interrupted and hasattr(self.prior, "validation")
        figures = self.prior.validation(self.validation) if known else {}
        heads = ["loss"] if WHOLE in self.groups else [f"loss_{name}" for name in reversed(self.groups)]
        report = TrainingReport(
            run.step,
            run.seconds,
            [(int(row["step"]), row[h]) for row in run.history for h in heads[:1] if h in row],
            figures,
            interrupted,
            run.history,
            self._stale and run.step < training.steps,
            run.best[1] if run.best and training.patience is not None else None,
        )
        if training.report and self.fabric.is_global_zero:
            self._write_report(report)
        return report

    def _write_report(self, report: TrainingReport) -> None:
        from invgen.report.training import write_training_report

        fields = len(self.prior.shape) > 1
        examples = self.data.batch(0, 8 if fields else 500, self.training.seed)["x"]
        try:
            write_training_report(str(self.training.report), self.prior, report, examples, self.training)
        except Exception as error:  # a page that fails must not cost the weights of a long run
            warnings.warn(f"The training report could not be written: {error}", stacklevel=4)


def _require_finite(value: float, step: int) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(
            f"The training loss is {value} at step {step}; lower learning_rate or check the data for outliers."
        )
