r"""The uniform prior on a box, as a Gaussian seen through its distribution function.

    p(x) = Π_k 1(low_k ≤ x_k ≤ high_k) / (high_k − low_k),        x = low + (high − low) Φ(u),  u ~ N(0, I)

In the coordinates u nothing has an edge: a generator f = T, closed-form denoiser and score come with the Gaussian, and
solvers that walk or learn in u never step over a bound.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from invgen.contracts import check_batch
from invgen.driver import Streams
from invgen.grid import Grid
from invgen.priors.gaussian import GaussianPrior
from invgen.transforms import Probit

__all__ = ["UniformPrior"]


class UniformPrior(GaussianPrior):
    """x uniform on [low, high], entry by entry.

    Has `sample`, `HasDensity`, `HasLatent` and, in u, `HasGaussian` and `HasDenoiser`, all exact.

    Args:
        low, high: bounds, tensors of one shape or a number and a tensor; two numbers need `shape` or `grid`.
        shape: of one item. grid: where it lives.

    Raises:
        ValueError: no shape, bounds that are not finite with low < high.

    Example:
        >>> prior = UniformPrior(torch.tensor([-1.0, 0.1]), torch.tensor([2.0, 10.0]))
    """

    has_edges = True  # the density does not vanish there: identities of smooth densities (Stein's) have boundary terms

    def __init__(
        self,
        low: float | Tensor,
        high: float | Tensor,
        *,
        shape: tuple[int, ...] | None = None,
        grid: Grid | None = None,
    ) -> None:
        first, last = (torch.as_tensor(v, dtype=torch.float64) for v in (low, high))
        if shape is None:
            shape = grid.field_shape if grid is not None else tuple(torch.broadcast_shapes(first.shape, last.shape))
        if not shape:
            raise ValueError(
                "A uniform prior with numbers as bounds does not know its shape; give shape=, grid= or tensors."
            )
        super().__init__(
            0.0, 1.0, shape=shape, grid=grid, transform=Probit(first.expand(shape), last.expand(shape), shape)
        )
        self.low, self.high = first.expand(shape).contiguous(), last.expand(shape).contiguous()

    @classmethod
    def examples(cls) -> list[UniformPrior]:  # type: ignore[override]
        """Bounds of their own for each entry; a field."""
        return [
            cls(torch.tensor([-1.0, 0.1, 3.0]), torch.tensor([2.0, 10.0, 3.5])),
            cls(-2.0, 3.0, shape=(1, 4, 3)),
        ]

    def sample(self, n: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """`(n, *shape)` draws; draw i depends on (seed, i) alone."""
        if n < 1:
            raise ValueError(f"The number of draws must be at least 1, got {n}.")
        u = Streams(seed, range(n), salt="UniformPrior").uniform(self.shape, dtype=torch.float64)
        return (self.low + (self.high - self.low) * u).to(dtype)

    def log_prob(self, x: Tensor) -> Tensor:
        """−Σ_k ln(high_k − low_k) inside the box, edges included, −∞ outside, `(batch,)`."""
        check_batch(x, self.shape, "The value given to UniformPrior.log_prob")
        inside = ((x >= self.low.to(x)) & (x <= self.high.to(x))).flatten(1).all(1)
        value = -float((self.high - self.low).log().sum())
        flat = 0.0 * torch.where(inside, x.flatten(1).sum(1), 0.0)  # a gradient, which is zero
        return flat + torch.where(inside, value, -math.inf).to(x)

    def __repr__(self) -> str:
        return f"UniformPrior({self.shape}, {float(self.low.min()):g} to {float(self.high.max()):g})"
