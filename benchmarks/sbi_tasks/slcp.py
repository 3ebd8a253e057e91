r"""SLCP, a simple likelihood and a complex posterior: four draws of a two-dimensional Gaussian, x ~ U(−3, 3)⁵.

    d_i ~ N((x_1, x_2), Σ),   Σ = [[s_1², ρ s_1 s_2], [ρ s_1 s_2, s_2²]] + 10⁻⁶ I,   s_1 = x_3², s_2 = x_4², ρ = tanh x_5

The posterior, exactly: with the mean d̄ and the scatter S of the four points,

    p(x | d) ∝ N(m; d̄, Σ/4) 1(m in the box) · |Σ|^(−3/2) exp(−½ tr Σ⁻¹ S),   m = (x_1, x_2).

The second factor, a density of (|x_3|, |x_4|, x_5), is bounded on the cells of a grid that follows its mass, and drawn from
by rejection; then m, kept when it lies in the box; then independent signs of x_3 and x_4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from invgen.priors import UniformPrior
from sbi_tasks.task import D, Task, rejected

__all__ = ["SLCP"]

POINTS, BOUND, JITTER = 4, 3.0, 1e-6
CELLS, ENVELOPE = 64, 1.5  # cells an axis; how much the density may exceed its largest value at a cell's corners


def parts(shape: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Σ_11, Σ_22, Σ_12 of `(…, 3)` (x_3, x_4, x_5)."""
    s1, s2, rho = shape[..., 0].square(), shape[..., 1].square(), shape[..., 2].tanh()
    return s1.square() + JITTER, s2.square() + JITTER, rho * s1 * s2


def simulate(x: Tensor) -> Tensor:
    a, b, c = parts(x[:, 2:])
    white = torch.randn(len(x), POINTS, 2, dtype=x.dtype)
    first = a.sqrt()[:, None] * white[..., 0]
    second = (c / a.sqrt())[:, None] * white[..., 0] + (b - c.square() / a).clamp_min(0).sqrt()[:, None] * white[..., 1]
    return (x[:, None, :2] + torch.stack([first, second], 2)).reshape(len(x), 2 * POINTS)


def marginal(shape: Tensor, S: Tensor) -> Tensor:
    """log of |Σ|^(−3/2) exp(−½ tr Σ⁻¹ S), `(…,)`."""
    a, b, c = parts(shape)
    det = a * b - c.square()
    trace = (b * S[0, 0] + a * S[1, 1] - 2 * c * S[0, 1]) / det
    return -0.5 * (POINTS - 1) * det.log() - 0.5 * trace


def bounds(low: Tensor, high: Tensor, S: Tensor) -> Tensor:
    """The largest of the log-density at the eight corners of each cell of a grid, `(CELLS, CELLS, CELLS)`."""
    axes = [torch.linspace(float(low[k]), float(high[k]), CELLS + 1, dtype=D) for k in range(3)]
    corners = marginal(torch.stack(torch.meshgrid(*axes, indexing="ij"), -1), S)
    return torch.nn.functional.max_pool3d(corners[None, None], 2, stride=1)[0, 0]


class SLCP(Task):
    """Four modes by symmetry, ridges between scales and correlation."""

    name, data_shape, published = "slcp", (2 * POINTS,), (0.975, 0.901)
    prior = UniformPrior(-BOUND, BOUND, shape=(5,))
    simulate = staticmethod(simulate)

    def log_likelihood(self, x: Tensor, data: Tensor) -> Tensor:
        a, b, c = (v[:, None] for v in parts(x[:, 2:]))
        r = data.reshape(-1, POINTS, 2) - x[:, None, :2]
        det = a * b - c.square()
        square = (b * r[..., 0].square() + a * r[..., 1].square() - 2 * c * r[..., 0] * r[..., 1]) / det
        return (-0.5 * square - 0.5 * det.log() - torch.log(torch.tensor(2 * torch.pi))).sum(1)

    def posterior(self, data: Tensor, n: int, seed: int = 0) -> Tensor:
        points = data.to(D).reshape(POINTS, 2)
        mean = points.mean(0)
        S = (points - mean).mT @ (points - mean)
        low, high = torch.tensor([0.0, 0.0, -BOUND], dtype=D), torch.tensor([BOUND] * 3, dtype=D)
        for _ in range(3):  # the grid shrinks to where the mass is
            log_f = bounds(low, high, S)
            held, size, first = log_f > log_f.max() - 21, (high - low) / CELLS, low.clone()
            for k in range(3):
                used = torch.nonzero(held.movedim(k, 0).reshape(CELLS, -1).any(1))[:, 0]
                low[k] = first[k] + size[k] * max(int(used[0]) - 1, 0)
                high[k] = first[k] + size[k] * min(int(used[-1]) + 2, CELLS)
        size, log_f = (high - low) / CELLS, bounds(low, high, S).flatten()
        cumulative = (log_f - log_f.max()).exp().cumsum(0)

        def propose(k: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
            cell = torch.searchsorted(cumulative, torch.rand(k, generator=g, dtype=D) * cumulative[-1])
            cell = cell.clamp_max(len(log_f) - 1)
            index = torch.stack([cell // CELLS**2, cell // CELLS % CELLS, cell % CELLS], 1)
            shape = low + size * (index + torch.rand(k, 3, generator=g, dtype=D))
            ratio = (marginal(shape, S) - log_f[cell]).exp()
            accepted = torch.rand(k, generator=g, dtype=D) * ENVELOPE < ratio
            a, b, c = parts(shape)
            white = torch.randn(k, 2, generator=g, dtype=D) / POINTS**0.5
            first = a.sqrt() * white[:, 0]
            second = c / a.sqrt() * white[:, 0] + (b - c.square() / a).sqrt() * white[:, 1]
            m = mean + torch.stack([first, second], 1)
            sign = torch.where(torch.rand(k, 2, generator=g) < 0.5, 1.0, -1.0).to(D)
            x = torch.cat([m, sign * shape[:, :2], shape[:, 2:]], 1)
            return x, accepted & (x.abs() <= BOUND).all(1)

        return rejected(propose, n, seed)
