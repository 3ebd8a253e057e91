"""What cannot be learned from, found before the first step and said in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from invgen.priors._train_groups import Group, out_of_memory

_LOOK = 256  # examples of a file that are looked at


def check_data(data: Any, prior: Any) -> None:
    """Count and values of data held in an array; a stream is judged by its first batch.

    Raises:
        ValueError: fewer than two examples, NaN, nothing but copies of one example.
    """
    if not callable(getattr(data, "batch", None)):
        raise ValueError(
            f"Training data need a method batch(step, size, seed), a {type(data).__name__} has none; wrap a tensor as ArrayData(x)."
        )
    if hasattr(data, "__len__") and len(data) < 2:
        raise ValueError(f"Training needs at least two examples, got {len(data)}; there is no law in a single one.")
    if isinstance(getattr(data, "x", None), Tensor):
        check_values(data.x, prior.shape)
    elif hasattr(data, "rows"):
        every = max(1, len(data) // _LOOK)
        check_values(torch.cat([data.rows(i, i + 1) for i in range(0, len(data), every)]), prior.shape)


def check_values(x: Tensor, shape: tuple[int, ...], what: str = "training data") -> None:
    """Shape, finiteness, and that there is anything to learn."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise ValueError(
            f"The {what} must be a tensor of real floating-point numbers, got {getattr(x, 'dtype', type(x).__name__)}; convert with .float()."
        )
    if tuple(x.shape[1:]) != tuple(shape):
        axes = "(examples, channels, …), one channel included" if len(shape) > 1 else "(examples, dim)"
        raise ValueError(
            f"The {what} have the shape {tuple(x.shape)} but the prior learns examples of {tuple(shape)}; give {axes}."
        )
    finite = torch.isfinite(x)
    if not bool(finite.all()):
        bad = int((~finite.flatten(1).all(1)).sum())
        raise ValueError(
            f"The {what} hold NaN or infinite values in {bad} of {len(x)} examples; remove those examples."
        )
    if len(x) > 1 and bool((x == x[:1]).all()):
        same = f"all values equal {float(x.flatten()[0]):g}" if bool((x == x.flatten()[0]).all()) else "all are equal"
        raise ValueError(f"The {what} hold one example {len(x)} times ({same}); there is nothing to learn.")


def check_validation(batch: Mapping[str, Tensor], prior: Any) -> None:
    """A validation batch must be such as the prior is trained on."""
    if "x" not in batch or len(batch["x"]) < 1:
        raise ValueError(f'The validation batch needs examples under "x", got {sorted(batch)}.')
    check_values(batch["x"][:1], prior.shape, "validation data")
    if not bool(torch.isfinite(batch["x"]).all()):
        check_values(batch["x"], prior.shape, "validation data")


def check_batch_of(prior: Any, groups: Mapping[str, Group], batch: dict[str, Tensor], device: torch.device) -> None:
    """The first batch, and one trial of every loss on two of its examples, in eval mode so that nothing is remembered.

    Raises:
        ValueError: values that cannot be learned from, a network that cannot take examples of this size.
    """
    check_values(batch["x"], prior.shape)
    few = {k: v[:2].to(device) for k, v in batch.items()}
    modes = [(m, m.training) for m in prior.modules()]
    prior.eval()
    try:
        for name, group in groups.items():
            losses = group.losses(few, torch.Generator().manual_seed(0))
            if losses.shape != (len(few["x"]),):
                raise ValueError(
                    f"The loss of {name!r} of {type(prior).__name__} has the shape {tuple(losses.shape)} for {len(few['x'])} examples; return one number an example."
                )
    except (RuntimeError, IndexError) as error:
        if out_of_memory(error):
            raise
        network = type(getattr(prior, "network", prior)).__name__
        raise ValueError(
            f"The network {network} cannot take examples of the shape {tuple(prior.shape)} ({' '.join(str(error).split())[:160]}); choose another size or fewer levels."
        ) from error
    finally:
        for module, mode in modes:
            module.training = mode
