"""Gaussian mixture: d ~ ½ N(x, I) + ½ N(x, 0.1² I), x ~ U(−10, 10)², the component chosen for every simulation.

(The first published version chose one component for a whole batch.) The likelihood is symmetric in x and d, so that the
posterior is the same mixture around d, cut by the box.
"""

from __future__ import annotations

import torch
from torch import Tensor

from invgen.priors import UniformPrior
from sbi_tasks.task import D, Task, rejected

__all__ = ["GaussianMixture"]

WIDE, NARROW = 1.0, 0.1


def spread(n: int, generator: torch.Generator | None = None, dtype: torch.dtype | None = None) -> Tensor:
    wide = torch.rand(n, 1, generator=generator) < 0.5
    scale = torch.where(wide, WIDE, NARROW).to(dtype or torch.get_default_dtype())
    return scale * torch.randn(n, 2, generator=generator, dtype=dtype)


def simulate(x: Tensor) -> Tensor:
    return x + spread(len(x), dtype=x.dtype)


class GaussianMixture(Task):
    """Two scales around one mean."""

    name, data_shape, published = "gaussian_mixture", (2,), (0.716, 0.615)
    prior = UniformPrior(-10.0, 10.0, shape=(2,))
    simulate = staticmethod(simulate)

    def log_likelihood(self, x: Tensor, data: Tensor) -> Tensor:
        r = data - x
        parts = [torch.distributions.Normal(0.0, s, validate_args=False).log_prob(r).sum(1) for s in (WIDE, NARROW)]
        return torch.logaddexp(*parts) + torch.tensor(0.5).log().to(x)

    def posterior(self, data: Tensor, n: int, seed: int = 0) -> Tensor:
        d = data.to(D)

        def propose(k: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
            x = d + spread(k, g, D)
            return x, (x.abs() <= 10).all(1)

        return rejected(propose, n, seed)
