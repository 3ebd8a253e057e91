"""Groups of parameters with an optimiser each, and one update of a group: gradients, clipping, AdamW, micro-batches."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from invgen.priors.training import Training

WHOLE = "weights"  # the one group of a prior that declares none

_ADAMW = ("lr", "betas", "eps", "weight_decay", "amsgrad")
_OWN = ("schedule", "clip")


@dataclass
class Group:
    """Parameters updated together, their optimiser, and how its learning rate moves."""

    name: str
    parameters: list[nn.Parameter]
    optimizer: torch.optim.AdamW
    peak: float
    constant: bool
    clip: float | None
    losses: Callable[[dict[str, Tensor], torch.Generator], Tensor]

    def rate(self, step: int, training: Training) -> float:
        """Linear warm-up, then a cosine down to a hundredth of the peak by the last step (or a constant)."""
        warm = min(1.0, (step + 1) / max(training.warmup, 1))
        if self.constant:
            return self.peak * warm
        fall = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(training.steps, 1))))
        return self.peak * warm * (0.01 + 0.99 * fall)


def make_groups(prior: Any, training: Training) -> dict[str, Group]:
    """The groups a prior declares, or all its weights as one.

    Raises:
        ValueError: a parameter in two groups, an empty group, an unknown optimiser setting.
    """
    if not hasattr(prior, "parameter_groups"):
        if not hasattr(prior, "training_loss"):
            raise ValueError(
                f"{type(prior).__name__} cannot be trained by steps: it has no training_loss(batch, generator); see `invgen priors`."
            )
        return {WHOLE: _group(prior, WHOLE, list(prior.parameters()), training, prior.training_loss)}
    owner: dict[int, str] = {}
    groups = {}
    for name, parameters in prior.parameter_groups().items():
        parameters = list(parameters)
        for p in parameters:
            if owner.setdefault(id(p), name) != name:
                raise ValueError(
                    f"A parameter of {type(prior).__name__} is in the groups {owner[id(p)]!r} and {name!r}; give it to one."
                )

        def losses(batch: dict[str, Tensor], generator: torch.Generator, name: str = name) -> Tensor:
            return prior.losses(name, batch, generator)

        groups[name] = _group(prior, name, parameters, training, losses)
    for p in prior.parameters():
        p.requires_grad_(id(p) in owner)  # a teacher, say, is not trained
    return groups


def _group(prior: Any, name: str, parameters: list[nn.Parameter], training: Training, losses: Any) -> Group:
    parameters = [p for p in parameters if p.requires_grad]
    if not parameters:
        raise ValueError(f"{type(prior).__name__} has no weights to train in the group {name!r}.")
    settings: dict[str, Any] = {
        "lr": training.learning_rate,
        "weight_decay": training.weight_decay,
        "betas": (0.9, 0.99),
    }
    settings |= dict(prior.optimizer_settings(name)) if hasattr(prior, "optimizer_settings") else {}
    unknown = [k for k in settings if k not in _ADAMW + _OWN]
    schedule = settings.pop("schedule", "cosine")
    clip = settings.pop("clip", training.clip)
    if unknown or schedule not in ("cosine", "constant"):
        what = f"the setting {unknown[0]!r}" if unknown else f"the schedule {schedule!r}"
        raise ValueError(
            f"The optimiser of {name!r} has no {what.removeprefix('the ')}; settings are {', '.join(_ADAMW + _OWN)}, schedules cosine and constant."
        )
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    optimizer = torch.optim.AdamW(parameters, fused=fused or None, **settings)
    return Group(name, parameters, optimizer, float(settings["lr"]), schedule == "constant", clip, losses)


class Updates:
    """One update of one group: the gradient of the mean loss of a batch, clipped, and a step of AdamW.

    When memory runs out the batch is split: the gradient of the mean is the weighted sum of the gradients of the parts,

        ∇ (1/B) Σ_i ℓ_i = Σ_parts (b/B) ∇ (1/b) Σ_{i in part} ℓ_i,

    so that the examples of an update stay the same; only the noise drawn with them is dealt out anew. Losses that mix
    examples (batch normalisation) see the smaller parts.

    Args:
        groups: by name. fabric: device, precision and processes. micro: largest part of a batch, None for all of it.
    """

    def __init__(self, groups: dict[str, Group], fabric: Any, micro: int | None = None) -> None:
        self.groups, self.fabric, self.micro = groups, fabric, micro
        self._active: str | None = None
        self._one = torch.ones((), device=fabric.device)

    def __call__(self, name: str, rate: float, batch: dict[str, Tensor], seed: int) -> Tensor:
        """Update group `name`; returns (loss, gradient norm before clipping, 1) on the device."""
        group = self.groups[name]
        self._activate(name)
        for settings in group.optimizer.param_groups:
            settings["lr"] = rate
        size = len(batch["x"])
        while True:
            part = min(self.micro or size, size)
            loss = self._gradient(group, batch, size, part, seed)
            if loss is not None:
                break
            self._halve(size, part)
        if self.fabric.world_size > 1:
            self._share(group)
        limit = math.inf if group.clip is None else group.clip
        norm = nn.utils.clip_grad_norm_(group.parameters, limit, foreach=_foreach(self.fabric.device))
        group.optimizer.step()
        return torch.stack([loss, norm.to(loss), self._one.to(loss)])

    def _activate(self, name: str) -> None:
        """Only the group's own weights ask for gradients: those of a frozen critic would be computed for nothing."""
        if len(self.groups) > 1 and self._active != name:
            for other in self.groups.values():
                for p in other.parameters:
                    p.requires_grad_(other.name == name)
            self._active = name

    def _gradient(self, group: Group, batch: dict[str, Tensor], size: int, part: int, seed: int) -> Tensor | None:
        """Accumulate the gradient; the mean loss, or None where memory ran out."""
        group.optimizer.zero_grad(set_to_none=True)
        generator = torch.Generator().manual_seed(seed)
        total: Tensor | None = None
        try:
            for first in range(0, size, part):
                piece = batch if part == size else {k: v[first : first + part] for k, v in batch.items()}
                share = len(piece["x"]) / size
                with self.fabric.autocast():
                    loss = group.losses(piece, generator).mean()
                    loss = loss if share == 1 else share * loss
                self.fabric.backward(loss)
                total = loss.detach() if total is None else total + loss.detach()
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            if part == 1:
                raise MemoryError(
                    "Memory runs out with a single example; take a smaller network or smaller examples."
                ) from error
            total = None
        return total

    def _halve(self, size: int, part: int) -> None:
        """Called outside the except block: the error's frames held the tensors that filled the memory."""
        for group in self.groups.values():
            group.optimizer.zero_grad(set_to_none=True)
        if self.fabric.device.type == "cuda":
            torch.cuda.empty_cache()
        self.micro = max(1, part // 2)
        warnings.warn(
            f"Memory ran out with {part} examples at once; going on with {self.micro} at once, {-(-size // self.micro)} parts a batch of {size}.",
            stacklevel=4,
        )

    def _share(self, group: Group) -> None:
        """Average the gradients over the processes, in one message."""
        for p in group.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        gradients = [p.grad for p in group.parameters if p.grad is not None]
        mean = self.fabric.all_reduce(torch.cat([g.flatten() for g in gradients]), reduce_op="mean")
        for g, m in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
            g.copy_(m.view(g.shape))  # in place: the memory layout stays that of the weights


def _foreach(device: torch.device) -> bool | None:
    return True if device.type in ("cpu", "cuda") else None


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocator gave up: CUDA's, PyTorch's on the CPU, or Python's."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in str(error) for words in ("not enough memory", "can't allocate memory", "out of memory")
    )
