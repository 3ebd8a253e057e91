"""The Wasserstein game with gradient penalty of Gulrajani et al. 2017 (arXiv:1704.00028, equation 3).

    critic     min_f  E f(G(z)) − E f(u) + λ E (|∇f(û)| − 1)²,   û = ε u + (1 − ε) G(z),  ε ~ U(0, 1) for each example
    generator  min_G  −E f(G(z))

so that E f(u) − E f(G(z)) of a good critic, nearly 1-Lipschitz, estimates the Wasserstein distance between the data and
the generator's draws (in the coordinates u).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from invgen.grid import Grid
from invgen.priors.gan import GAN
from invgen.transforms import Transform

__all__ = ["WGAN"]


class WGAN(GAN):
    """A generator trained by the Wasserstein game with gradient penalty (Gulrajani et al. 2017); see the module's text.

    Has `sample` and `HasLatent`, no density.

    Args:
        generator, critic, shape, latent_shape, transform, grid: as for `GAN`. The critic must treat items one by one
            (no batch normalisation): the penalty is on the gradient of each.
        critic_steps: updates of the critic for each one of the generator.
        weight: λ of the gradient penalty.

    Training: learning rate 1e-4 to 3e-4, Adam betas (0, 0.9) without weight decay; the moving average covers the
    generator. Cost of one step: `critic_steps` + 1 generator calls and about 9 `critic_steps` + 3 critic calls an example.
    """

    betas = (0.0, 0.9)

    def __init__(
        self,
        generator: nn.Module,
        critic: nn.Module | None,
        shape: tuple[int, ...],
        *,
        latent_shape: tuple[int, ...] | None = None,
        transform: Transform | None = None,
        grid: Grid | None = None,
        critic_steps: int = 5,
        weight: float = 10.0,
    ) -> None:
        if not weight > 0:
            raise ValueError(f"The weight of the gradient penalty must be positive, got {weight}.")
        super().__init__(
            generator,
            critic,
            shape,
            latent_shape=latent_shape,
            transform=transform,
            grid=grid,
            critic_steps=critic_steps,
        )
        self.weight = float(weight)

    def _options(self) -> dict[str, float]:
        return {"critic_steps": self.critic_steps, "weight": self.weight}

    def critic_loss(self, data: Tensor, made: Tensor) -> Tensor:
        """f(G(z)) − f(u), from scores `(batch,)`."""
        return made - data

    def generator_loss(self, made: Tensor) -> Tensor:
        """−f(G(z))."""
        return -made

    def penalty(self, u: Tensor, made: Tensor, generator: torch.Generator) -> Tensor:
        """λ (|∇f(û)| − 1)² of each example, `(batch,)`, û uniform between an example and a draw."""
        share = torch.rand(len(u), generator=generator).to(u).reshape(-1, *(1,) * (u.ndim - 1))
        gradient = self._gradient(torch.lerp(made, u, share))
        # the root has no derivative at a vanishing gradient: a constant critic must not give NaN
        norm = (gradient.square().flatten(1).sum(1) + 1e-24).sqrt()
        return self.weight * (norm - 1).square()
