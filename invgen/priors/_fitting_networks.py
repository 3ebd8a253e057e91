"""Whether a network fits the shapes a prior states, asked once at construction."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__: list[str] = []


@torch.no_grad()
def made_from(
    network: nn.Module, shape: tuple[int, ...], call: Callable[[Tensor], Tensor] | None = None
) -> tuple[int, ...]:
    """Shape of the item a network makes from a zero item of `shape`; `call` stands for what is done with it.

    Raises:
        ValueError: it cannot take one.
    """
    mode = network.training
    network.eval()
    zero = next(network.parameters()).new_zeros(1, *shape)
    try:
        made = (call or network)(zero)
    except (RuntimeError, IndexError) as error:
        raise ValueError(
            f"The network {type(network).__name__} cannot take items of the shape {tuple(shape)} ({str(error).splitlines()[0]}); give one that fits."
        ) from error
    finally:
        network.train(mode)
    return tuple(made.shape[1:])
