"""Networks on vectors: a perceptron, and the linear encoder under which a variational autoencoder has a closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MLP", "LinearEncoder"]


class MLP(nn.Module):
    """Fully connected network on vectors, `(batch, inputs)` -> `(batch, outputs)`; linear for a depth of 0.

    Without normalisation and with a leaky rectifier, so that it also serves as a critic (its gradient is penalised).

    Args:
        inputs, outputs: dimensions.
        width: hidden units. depth: hidden layers.
    """

    def __init__(self, inputs: int, outputs: int, *, width: int = 128, depth: int = 3) -> None:
        super().__init__()
        if min(inputs, outputs, width) < 1 or depth < 0:
            raise ValueError(
                f"An MLP needs inputs, outputs and width of at least 1 and a depth of at least 0, got {inputs}, {outputs}, {width} and {depth}."
            )
        self.settings: dict[str, Any] = {"inputs": inputs, "outputs": outputs, "width": width, "depth": depth}
        self.inputs, self.outputs = inputs, outputs
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [nn.Linear(inputs, width), nn.LeakyReLU(0.2)]
            inputs = width
        self.body = nn.Sequential(*layers, nn.Linear(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class LinearEncoder(nn.Module):
    """Mean W x + b and a log-variance that is the same for every x: `(batch, inputs)` -> `(batch, 2 latent)`.

    The exact posterior of a linear-Gaussian model whose loadings are orthogonal has this form.

    Args:
        inputs: dimension of x. latent: dimension of z.
    """

    def __init__(self, inputs: int, latent: int) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {"inputs": inputs, "latent": latent}
        self.mean = nn.Linear(inputs, latent)
        self.log_variance = nn.Parameter(torch.zeros(latent))

    def forward(self, x: Tensor) -> Tensor:
        mean = self.mean(x)
        return torch.cat([mean, self.log_variance.expand_as(mean)], dim=1)
