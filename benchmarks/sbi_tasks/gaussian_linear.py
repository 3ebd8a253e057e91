"""Gaussian linear: d ~ N(x, 0.1 I), x ~ N(0, 0.1 I) in ten dimensions, 0.1 the variances: p(x | d) = N(d/2, 0.05 I)."""

from __future__ import annotations

import torch
from torch import Tensor

from invgen.priors import GaussianPrior
from sbi_tasks.task import D, Task

__all__ = ["GaussianLinear"]

DIM, VARIANCE = 10, 0.1


def simulate(x: Tensor) -> Tensor:
    return x + VARIANCE**0.5 * torch.randn_like(x)


class GaussianLinear(Task):
    """Conjugate."""

    name, data_shape, published = "gaussian_linear", (DIM,), (0.694, 0.552)
    prior = GaussianPrior.diagonal(torch.zeros(DIM), VARIANCE)
    simulate = staticmethod(simulate)

    def log_likelihood(self, x: Tensor, data: Tensor) -> Tensor:
        return torch.distributions.Normal(x, VARIANCE**0.5, validate_args=False).log_prob(data).sum(1)

    def posterior(self, data: Tensor, n: int, seed: int = 0) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        return data.to(D) / 2 + (VARIANCE / 2) ** 0.5 * torch.randn(n, DIM, generator=g, dtype=D)
