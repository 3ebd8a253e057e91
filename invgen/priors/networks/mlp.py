"""A multilayer perceptron for unstructured unknowns."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["MLPDenoiser"]


class MLPDenoiser(nn.Module):
    """Fully connected network on vectors, conditioned on the noise level.

    Args:
        channels: dimension of the vector.
        extra: extra inputs that are not returned.
        width: hidden units. depth: hidden layers.
    """

    multiple = 1

    def __init__(self, channels: int, *, extra: int = 0, width: int = 128, depth: int = 3) -> None:
        super().__init__()
        self.settings = {"channels": channels, "extra": extra, "width": width, "depth": depth}
        self.channels, self.extra = channels, extra
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.exp(torch.linspace(0.0, math.log(30.0), 8)), persistent=False)
        layers: list[nn.Module] = []
        size = channels + extra + 16
        for _ in range(depth):
            layers += [nn.Linear(size, width), nn.SiLU()]
            size = width
        self.body = nn.Sequential(*layers)
        self.leave = nn.Linear(size, channels)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """x `(batch, channels + extra)`, noise `(batch,)` -> `(batch, channels)`."""
        angles = noise[:, None] * self.frequencies.to(noise.dtype)
        return self.leave(self.body(torch.cat([x, angles.sin(), angles.cos()], dim=1)))
