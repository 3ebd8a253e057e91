r"""The trained part of a conditional posterior: the velocity of a flow from base draws to normalised residuals.

With the linear answer m(d) and the sd s of its error over simulations (`_conditional_linear`), the unknown is
u = m(d) + s ζ₁: ζ₁ has unit variance, and what a network must learn is its law given d. A base draw ζ₀ of unit variance
is carried to it along

    ζ_φ = cos φ ζ₀ + sin φ ζ₁,       dζ/dφ = F(ζ, φ, d) = E[cos φ ζ₁ − sin φ ζ₀ | ζ_φ = ζ, d],       0 ≤ φ ≤ π/2.

This is the straight path x_t = (1 − t) ζ₀ + t ζ₁ of flow matching (Lipman et al. 2023, equation 22 with σ_min = 0) on the
circle: tan φ = t/(1 − t), x_t = N ζ_φ with N² = t² + (1 − t)², and

    v(x_t, t) = ((2t − 1) ζ_φ + F)/N,     dφ/dt = 1/N²,     so that   ∫₀¹ |v̂ − v|² dt = ∫₀^(π/2) |F̂ − F|² dφ:

the flow-matching loss with uniform times is the plain squared error of F with uniform angles, whose targets have unit
variance throughout. It is the denoising problem, too: ζ_φ/sin φ is ζ₁ under noise of level σ = cot φ, and

    E[ζ₁ | ζ_φ, d] = sin φ ζ_φ + cos φ F,         E[ζ₀ | ζ_φ, d] = cos φ ζ_φ − sin φ F.

A white base in the standardised unknown itself, x₀ ~ N(μ, σ²) with x₁ = u (FMPE: Wildberger et al. 2023), preconditioned
by the linear answer, is the same ζ with an angle for each pixel, tan φ = (s/σ) tan θ, θ that of the straight path:
x_θ − E[x_θ | d] = σ cos θ ζ₀ + s sin θ ζ₁, divided by the root of its variance, is ζ_φ.

Where the posterior is N(m(d), S) and the base has its law, F = 0 is the answer and the network starts there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__: list[str] = []

_LEVELS = (math.log(0.002), math.log(300.0))  # range of ln cot φ that the network is told


class ConditionalField(nn.Module):
    """F of the module's text, and its regression loss.

    Args:
        network: `(batch, channels + extra, *spatial)` and `(batch,)` ln(cot θ)/4 to `(batch, channels, *spatial)`; vectors
            have no spatial axes. embedding: of the data, `(batch, m)` to extra channels `(batch, k, *spatial)`, or None.
        shape: of the unknown. law: of the training angles: "uniform" (flow matching) or "lognormal" (ln cot φ ~
            N(0.5, 1.7²), Karras et al. 2022). ratio: s/σ `(*shape)` for one angle a pixel, or None.
    """

    def __init__(
        self,
        network: nn.Module,
        embedding: nn.Module | None,
        shape: tuple[int, ...],
        law: str,
        ratio: Tensor | None,
    ) -> None:
        super().__init__()
        self.network, self.embedding, self.shape, self.law = network, embedding, tuple(shape), law
        self.ratio: Tensor | None
        self.register_buffer("ratio", None if ratio is None else ratio.float())
        self.typical = 1.0 if ratio is None else math.exp(float(ratio.double().log().mean()))

    def angle(self, theta: Tensor) -> Tensor:
        """φ of each pixel `(batch, *shape)`, or of each item, of the path's angle θ `(batch,)`."""
        wide = theta.reshape(-1, *(1,) * len(self.shape))
        return wide if self.ratio is None else torch.atan2(self.ratio.to(theta) * wide.sin(), wide.cos())

    def path_angle(self, phi: Tensor) -> Tensor:
        """θ of a typical pixel's φ."""
        return phi if self.ratio is None else torch.atan2(phi.sin(), self.typical * phi.cos())

    def forward(self, zeta: Tensor, theta: Tensor, features: Tensor, data: Tensor | None = None) -> Tensor:
        """F `(batch, *shape)` at θ `(batch,)`, given features `(batch, k, *spatial)` and, for an embedding, flat data."""
        inputs = [zeta, features]
        if self.embedding is not None:
            assert data is not None
            inputs.append(self.embedding(data))
        level = torch.log(theta.cos().clamp_min(1e-12) / theta.sin().clamp_min(1e-12)).clamp(*_LEVELS) / 4
        out: Tensor = self.network(torch.cat(inputs, dim=1), level.to(zeta.dtype))
        return out

    def angles(self, n: int, generator: torch.Generator) -> Tensor:
        """θ of `n` training examples, spread evenly over the batch (one in each n-th part of the law)."""
        even = (torch.arange(n) + torch.rand(n, generator=generator)) / n
        even = even[torch.randperm(n, generator=generator)]
        if self.law == "uniform":
            return self.path_angle(0.5 * math.pi * even)
        log_sigma = 0.5 + 1.7 * math.sqrt(2) * torch.erfinv((2 * even - 1).clamp(-0.99999, 0.99999))
        return self.path_angle(torch.atan(torch.exp(-log_sigma)))

    def training_loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """|F̂ − (cos φ ζ₁ − sin φ ζ₀)|² per number, `(batch,)`."""
        one = batch["x"]
        base = batch.get("base")
        if base is None:
            base = torch.randn(one.shape, generator=generator).to(one)
        zeta, target, theta = self._pair(one, base, generator)
        out = self(zeta, theta, batch["features"], batch.get("data"))
        return (out - target).square().flatten(1).mean(1)

    def _pair(self, one: Tensor, base: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        theta = self.angles(len(one), generator).to(one)
        phi = self.angle(theta)
        cos, sin = phi.cos(), phi.sin()
        return cos * base + sin * one, cos * one - sin * base, theta

    @torch.no_grad()
    def held_out(self, batch: dict[str, Tensor], size: int) -> tuple[float, float]:
        """Loss of the network, and of F = 0 (the linear answer with the base's own law), on the same noise."""
        generator, totals = torch.Generator().manual_seed(0), [0.0, 0.0]
        n = len(batch["x"])
        for i in range(0, n, size):
            part = {k: v[i : i + size] for k, v in batch.items()}
            one, base = part["x"], part.get("base")
            if base is None:
                base = torch.randn(one.shape, generator=generator).to(one)
            zeta, target, theta = self._pair(one, base, generator)
            out = self(zeta, theta, part["features"], part.get("data"))
            totals[0] += float((out - target).square().flatten(1).mean(1).sum())
            totals[1] += float(target.square().flatten(1).mean(1).sum())
        return totals[0] / n, totals[1] / n

    @torch.no_grad()
    def misfit(self, batch: dict[str, Tensor], levels: int = 32) -> Tensor:
        """Mean |F̂ − F*|² at the angles (k + ½) π/2·levels: over cos² φ, the mean variance of ζ₁ given ζ_φ and d."""
        generator, found = torch.Generator().manual_seed(1), []
        one = batch["x"]
        for k in range(levels):
            base = torch.randn(one.shape, generator=generator).to(one)
            theta = torch.full((len(one),), 0.5 * math.pi * (k + 0.5) / levels).to(one)
            phi = self.angle(theta)
            out = self(phi.cos() * base + phi.sin() * one, theta, batch["features"], batch.get("data"))
            found.append((out - phi.cos() * one + phi.sin() * base).square().mean())
        return torch.stack(found)
