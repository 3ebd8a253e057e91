"""Pushforward priors, x = f(y) with y ~ base: what stands behind codes of an autoencoder, latent diffusion, plurigaussians.

    p(x) = ∫ δ(x − f(y)) p_base(y) dy

The law is known through its draws, f(draw of the base), and, where the base has a generator of its own, through
x = f(base.decode(z)), z ~ N(0, I).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from invgen.contracts import HasLatent
from invgen.grid import Grid
from invgen.priors.gaussian import GaussianPrior
from invgen.transforms import Identity, Transform

__all__ = ["Pushforward"]


class Pushforward:
    """The law of x = f(y), y ~ base.

    Has `sample`, and `HasLatent` where the base has it: `decode(z)` = f(base.decode(z)). No density: f need not be
    invertible, and a generator into more dimensions has none. (Where it is invertible, give the base f as `transform`.)

    Args:
        f: maps `(batch, *base.shape)` to `(batch, *shape)`, physical units included: a decoder, an operator, a rule. A
            module is called in its own dtype; random numbers in f would make `decode` random.
        base: a prior.
        shape: of x; found by one call of f when omitted.
        grid: where x lives.

    Raises:
        ValueError: f returns items of another shape.

    Cost: one draw of the base and one call of f an item.

    Example:
        >>> facies = Pushforward(lambda y: (y > 0).to(y), GaussianPrior.stationary(grid, length=(30.0, 200.0)))
    """

    latent_shape: tuple[int, ...]

    def __new__(cls, f: Any = None, base: Any = None, **options: Any) -> Pushforward:
        # a prior *has* the capabilities it truly has: decode exists where the base can serve it
        return super().__new__(_LatentPushforward if cls is Pushforward and isinstance(base, HasLatent) else cls)

    def __init__(
        self,
        f: Callable[[Tensor], Tensor],
        base: Any,
        *,
        shape: tuple[int, ...] | None = None,
        grid: Grid | None = None,
    ) -> None:
        self.f, self.base, self.grid = f, base, grid
        self.transform: Transform = Identity()
        made = tuple(self._push(base.sample(1, seed=0)).shape)
        wanted = tuple(shape) if shape is not None else grid.field_shape if grid is not None else made[1:]
        if made != (1, *wanted):
            raise ValueError(
                f"f turns a draw of the base, {(1, *base.shape)}, into the shape {made}; expected {(1, *wanted)}, the batch axis first."
            )
        self.shape: tuple[int, ...] = wanted

    def _push(self, y: Tensor) -> Tensor:
        weight = next(self.f.parameters(), None) if isinstance(self.f, nn.Module) else None
        return self.f(y) if weight is None else self.f(y.to(weight.dtype)).to(y.dtype)

    @torch.no_grad()
    def sample(self, n: int, *, seed: int = 0, chunk: int = 256, dtype: torch.dtype = torch.float32) -> Tensor:
        """`(n, *shape)` draws f(y), y drawn from the base with the same seed."""
        typed = "dtype" in inspect.signature(self.base.sample).parameters
        y = self.base.sample(n, seed=seed, **({"dtype": dtype} if typed else {})).to(dtype)
        return torch.cat([self._push(y[i : i + chunk]) for i in range(0, n, chunk)])

    @classmethod
    def examples(cls) -> list[Pushforward]:
        """A bent Gaussian, which has a latent, and a bent mixture, which has none."""
        from invgen.priors.mixture import GaussianMixturePrior

        mean = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
        matrix = torch.tensor([[1.0, 0.5, 0.1], [0.5, 0.8, 0.2], [0.1, 0.2, 0.3]], dtype=torch.float64)
        means = torch.tensor([[1.5, -1.0], [-1.0, 2.0]], dtype=torch.float64)
        mixture = GaussianMixturePrior([0.3, 0.7], means, torch.tensor([0.2, 0.5], dtype=torch.float64))
        return [
            cls(_bend, GaussianPrior.dense(mean, matrix)),
            cls(_bend, mixture, grid=None),
        ]


class _LatentPushforward(Pushforward):
    """A pushforward whose base has a latent."""

    def __init__(self, f: Callable[[Tensor], Tensor], base: Any, **options: Any) -> None:
        super().__init__(f, base, **options)
        self.latent_shape = tuple(base.latent_shape)

    def decode(self, z: Tensor) -> Tensor:
        """f(base.decode(z)): `(batch, *latent_shape)` to `(batch, *shape)`; differentiable where f and the base are."""
        return self._push(self.base.decode(z))


def _bend(y: Tensor) -> Tensor:
    """A smooth map to one dimension more."""
    return torch.cat([y + 0.3 * y.sin(), y[:, :1] * y[:, 1:2]], 1)
