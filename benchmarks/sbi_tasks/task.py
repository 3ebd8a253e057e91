"""What a task has: prior, simulator, likelihood and draws of the exact posterior."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from invgen import InverseProblem, SimulatedNoise, Simulator

__all__ = ["Task", "rejected"]

D = torch.float64


class Task(ABC):
    """One task.

    Attributes:
        name: as published. prior: of the unknown `(dim,)`. data_shape: of one observation.
        published: mean C2ST of NPE at 1,000 and 10,000 simulations (results of the paper's repository; the rerun with the
            corrected simulator for the Gaussian mixture).
    """

    name: str
    prior: Any
    data_shape: tuple[int, ...]
    published: tuple[float, float]

    @staticmethod
    @abstractmethod
    def simulate(x: Tensor) -> Tensor:
        """`(n, dim)` to `(n, *data_shape)`, noise from torch's global generator."""

    @abstractmethod
    def log_likelihood(self, x: Tensor, data: Tensor) -> Tensor:
        """log p(data | x), `(n,)`: of `(n, dim)` and `(n or 1, *data_shape)`."""

    @abstractmethod
    def posterior(self, data: Tensor, n: int, seed: int = 0) -> Tensor:
        """`(n, dim)` float64 draws of p(x | data), data `data_shape`."""

    def problem(self, data: Tensor) -> InverseProblem:
        """The problem without a likelihood: what simulation-based inference is given."""
        shape = tuple(self.prior.shape)
        simulator = Simulator(self.simulate, shape, self.data_shape, batched=True, tensors=True)
        return InverseProblem(data, simulator, SimulatedNoise(), self.prior)


def rejected(propose: Callable[[int, torch.Generator], tuple[Tensor, Tensor]], n: int, seed: int) -> Tensor:
    """`n` accepted draws: `propose(k, generator)` returns draws `(k, dim)` and which of them stand."""
    generator = torch.Generator().manual_seed(seed)
    kept: list[Tensor] = []
    while sum(map(len, kept)) < n:
        draws, accepted = propose(2 * n, generator)
        kept.append(draws[accepted])
    return torch.cat(kept)[:n]
