"""What a conditional prior is told: classes or parameters, as constant input channels of its network."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Condition"]


@dataclass(frozen=True)
class Condition:
    """One quantity c of p(x | c): `size` numbers, or one of `size` classes; it takes size + 1 input channels.

    The channels hold (c − shift)/scale (a one-hot code for classes) and a flag that is 1 where c is given and 0 where it
    is not, so that one network learns p(x | c) and p(x) (classifier-free guidance, Ho & Salimans 2022).

    Args:
        size: numbers, or classes. classes: c is a class number 0 … size − 1.
        shift, scale: centre and spread of c over the training data.
    """

    size: int = 1
    classes: bool = False
    shift: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.size < 1 or not self.scale > 0:
            raise ValueError(f"A condition needs size >= 1 and scale > 0, got size={self.size}, scale={self.scale}.")

    def encode(self, value: Tensor | float | int | list[float] | tuple[float, ...], name: str) -> Tensor:
        """`(batch, size + 1)` channels of values `(batch, size)`, or `(batch,)` for a class or a single number.

        Raises:
            ValueError: another number of values, a class that does not exist, or values that are not finite.
        """
        value = torch.as_tensor(value)
        if self.classes:
            number = value.reshape(-1)
            if number.is_floating_point() or bool(((number < 0) | (number >= self.size)).any()):
                raise ValueError(f"{name} must be class numbers from 0 to {self.size - 1}, got {value.tolist()}.")
            code = torch.nn.functional.one_hot(number.long(), self.size).to(torch.float32)
        else:
            code = value if value.is_floating_point() else value.to(torch.float32)
            code = code.reshape(-1, 1) if self.size == 1 else code.reshape(-1, code.shape[-1] if code.ndim else 1)
            if code.shape[-1] != self.size or not bool(torch.isfinite(code).all()):
                raise ValueError(
                    f"{name} takes {self.size} finite numbers, got {tuple(value.shape)}: {value.tolist()}."
                )
            code = (code - self.shift) / self.scale
        return torch.cat([code, torch.ones_like(code[:, :1])], dim=1)


def encode(
    conditions: dict[str, Condition], values: dict[str, Any], keep: dict[str, Tensor] | None = None
) -> Tensor | None:
    """`(batch, channels)` of all conditions in their declared order; zeros (flag included) where one is not given.

    Args:
        keep: `(batch,)` booleans for each condition; False drops it.
    """
    if not conditions:
        return None
    unknown = sorted(set(values) - set(conditions))
    if unknown:
        raise ValueError(f"This prior is not conditioned on {', '.join(unknown)}; it knows {', '.join(conditions)}.")
    codes = {name: conditions[name].encode(value, name) for name, value in values.items()}
    rows = max((len(c) for c in codes.values()), default=1)
    like = next(iter(codes.values()), torch.zeros(1))
    parts = []
    for name, condition in conditions.items():
        code = codes.get(name)
        if code is None:
            code = like.new_zeros(rows, condition.size + 1)
        if keep is not None:
            code = code * keep[name].to(code)[:, None]
        parts.append(code.expand(rows, -1))
    return torch.cat(parts, dim=1)


def dropped(conditions: dict[str, Condition], n: int, rate: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Which conditions each of n examples keeps: none of them at the rate given, and each other one at 1 − rate."""
    alone = len(conditions) == 1
    together = torch.rand(n, generator=generator) >= rate
    return {name: together if alone else together & (torch.rand(n, generator=generator) >= rate) for name in conditions}


def to_dict(conditions: dict[str, Condition]) -> dict[str, Any]:
    """Plain values."""
    return {name: asdict(c) for name, c in conditions.items()}
