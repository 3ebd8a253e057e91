r"""Preconditioned Crank–Nicolson: a random walk that leaves N(0, I) invariant, in any dimension.

    q' = √(1 − β²) q + β ξ,   ξ ~ N(0, I),        accept with min(1, exp(Φ(q) − Φ(q'))).

In latent coordinates every prior, whatever its mean and covariance, is N(0, I): x = m + L z gives the walk
x' = m + √(1 − β²)(x − m) + β L ξ of Cotter et al. 2013 (Statistical Science 28, equation 4.3 with m = 0).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from invgen.contracts import HasLatent
from invgen.solvers._chain import Chain, groups, pooled_mean
from invgen.solvers._target import Target

if TYPE_CHECKING:
    from invgen.driver import Streams

__all__ = ["PCN"]


@dataclass(frozen=True)
class PCN(Chain):
    """Preconditioned Crank–Nicolson walk on p(z | d) ∝ p(d | g(f(z))) N(z; 0, I). Targets the exact posterior.

    Needs no derivative and no continuity of the likelihood, and its acceptance does not fall with the dimension of the
    latent. The walk is slow where data are many and precise.

    Args:
        draws, warmup, thin, starts, superchains: as for every chain.
        beta: first step β in (0, 1]. target: acceptance the warm-up aims at, pooled over the chains of an observation
            (0.234: Gelman, Gilks & Roberts 1997); None keeps β.

    Cost: one decode and one forward a step. `stats`: accept, invalid, beta.
    Reference: Cotter, Roberts, Stuart & White, MCMC methods for functions, Statistical Science 28, 2013, section 4.2.
    """

    needs: ClassVar[tuple[Any, ...]] = (HasLatent,)
    derivative_free: ClassVar[bool] = True

    warmup: int = 2000
    thin: int = 10
    beta: float = 0.2
    target: float | None = 0.234

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta <= 1 or (self.target is not None and not 0 < self.target < 1):
            raise ValueError(f"PCN needs beta in (0, 1] and target in (0, 1) or None, got {self.beta}, {self.target}.")
        if self.space == "u":
            raise ValueError("PCN walks in latent coordinates alone; leave space out.")

    @classmethod
    def examples(cls) -> list[PCN]:
        """A short run."""
        return [cls(draws=6, warmup=6, thin=2)]

    @classmethod
    def exam(cls) -> dict[str, PCN]:
        """One draw of each of many chains."""
        return {"": cls(draws=1, warmup=4000)}

    def begin(self, target: Target, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        return {"log_beta": torch.full_like(state["phi"], math.log(self.beta))}

    def move(
        self, target: Target, state: dict[str, Tensor], rng: Streams, clock: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        z, phi = state["z"], state["phi"]
        beta = state["log_beta"].exp().clamp_max(1.0)[:, None]
        noise = rng.normal((target.dim,), dtype=z.dtype, tag="walk")
        proposal = (1 - beta.square()).clamp_min(0).sqrt() * z + beta * noise
        there = target.value(proposal)
        invalid = torch.isnan(there) | (there == -math.inf)  # a chain would never leave an infinite likelihood
        chance = torch.where(invalid, torch.zeros_like(phi), (phi - there).clamp_max(0).exp())
        yes = rng.uniform((), dtype=z.dtype, tag="accept") < chance
        new = {"z": torch.where(yes[:, None], proposal, z), "phi": torch.where(yes, there, phi)}
        if self.target is not None and clock < self.warmup:
            living = torch.where(torch.isfinite(phi), chance, torch.full_like(chance, math.nan))
            seen = pooled_mean(living, groups(rng))
            gain = 1.0 / math.sqrt(clock + 1.0)
            new["log_beta"] = (state["log_beta"] + gain * (seen - self.target)).clamp_max(0.0)
        return new, {"accept": chance, "invalid": invalid}

    def report(self, target: Target, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"stat_beta": state["log_beta"].exp().clamp_max(1.0)}
