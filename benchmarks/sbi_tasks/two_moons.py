r"""Two moons: a crescent, folded along a diagonal.

    d = (r cos a + ¼, r sin a) + (−|x_1 + x_2|, −x_1 + x_2)/√2,      a ~ U(−π/2, π/2),  r ~ N(0.1, 0.01²),  x ~ U(−1, 1)²

With (s, t) = (x_1 + x_2, −x_1 + x_2)/√2, a rotation, and p = d + (|s|, −t): p is the crescent's point, so that
p(d | x) = N(ρ; 0.1, 0.01²)/(π ρ) with ρ = |p − (¼, 0)| and p_1 > ¼, and a draw of the posterior is a crescent point with
|s| = p_1 − d_1 ≥ 0, either sign of s, t = d_2 − p_2, kept when x lies in the box.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from invgen.priors import UniformPrior
from sbi_tasks.task import D, Task, rejected

__all__ = ["TwoMoons"]

OFFSET, RADIUS, WIDTH = 0.25, 0.1, 0.01


def crescent(n: int, generator: torch.Generator | None = None, dtype: torch.dtype | None = None) -> Tensor:
    a = math.pi * (torch.rand(n, generator=generator, dtype=dtype) - 0.5)
    r = RADIUS + WIDTH * torch.randn(n, generator=generator, dtype=dtype)
    return torch.stack([r * a.cos() + OFFSET, r * a.sin()], 1)


def folded(x: Tensor) -> Tensor:
    return torch.stack([-(x[:, 0] + x[:, 1]).abs(), x[:, 1] - x[:, 0]], 1) / math.sqrt(2)


def simulate(x: Tensor) -> Tensor:
    return crescent(len(x), dtype=x.dtype) + folded(x)


class TwoMoons(Task):
    """Bimodal in two dimensions."""

    name, data_shape, published = "two_moons", (2,), (0.725, 0.606)
    prior = UniformPrior(-1.0, 1.0, shape=(2,))
    simulate = staticmethod(simulate)

    def log_likelihood(self, x: Tensor, data: Tensor) -> Tensor:
        p = data - folded(x) - torch.tensor([OFFSET, 0.0]).to(x)
        rho = p.square().sum(1).sqrt()
        value = (
            -0.5 * ((rho - RADIUS) / WIDTH).square() - math.log(WIDTH * math.sqrt(2 * math.pi) * math.pi) - rho.log()
        )
        return torch.where(p[:, 0] > 0, value, -math.inf)

    def posterior(self, data: Tensor, n: int, seed: int = 0) -> Tensor:
        d = data.to(D)

        def propose(k: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
            p = crescent(k, g, D)
            size = p[:, 0] - d[0]
            s = torch.where(torch.rand(k, generator=g) < 0.5, size, -size)
            t = d[1] - p[:, 1]
            x = torch.stack([s - t, s + t], 1) / math.sqrt(2)
            return x, (size >= 0) & (x.abs() <= 1).all(1)

        return rejected(propose, n, seed)
