r"""The reverse chain of a diffusion with Gaussian transitions whose density is known: what particle weights need.

A chain u_T → … → u_min → u0 of noise levels σ_T > … > σ_min is started at N(m, σ_T²) around the prior's mean and moved by

    p(u' | u) = N(u'; F(u), c I)

from σ to σ', and by p(u0 | u) = N(u0; D(u), σ_min² I) at the end. Two means F:

- "ancestral": F = D + (σ'²/σ²)(u − D) and c = σ'² (1 − σ'²/σ²), equation 7 of Ho et al. 2020 (arXiv:2006.11239) in
  sigma space. The true transition has the same mean and the covariance c I + (1 − σ'²/σ²)² Cov[u0 | u]: too narrow in
  the first order of the step.
- "heun": F follows the probability-flow ODE du/dσ = (u − D)/σ by one Heun step from σ down to s, and noise of variance
  c = σ'² − s² takes the law up to σ' again (the split of Karras et al. 2022, arXiv:2206.00364, algorithm 2, with the ODE
  before the noise, which is what keeps the transition Gaussian). Every level has the law of the diffusion up to the
  error of the Heun step, for any c. What c decides is how levels hang together, p(u0 | u): for a white Gaussian prior
  of variance v the ODE multiplies by √((v + s²)/(v + σ²)), and Cov(u, u') = v + σ'² of the diffusion asks for

      s² = (v + σ'²)²/(v + σ²) − v,

  that is c = σ² − σ'² where σ ≪ √v, and the ancestral c where σ ≫ √v, which v = 0 takes everywhere. Samplers that
  compare u0 with data need the levels alone; those that condition u_σ on data need p(u0 | u_σ).
"""

from __future__ import annotations

import itertools
import math
from typing import Literal

import torch
from torch import Tensor

from invgen.problem import InverseProblem
from invgen.solvers._particles import in_blocks

__all__: list[str] = []

Kernel = Literal["heun", "ancestral"]
KERNELS = ("heun", "ancestral")


def spread(now: float, after: float, variance: float = 0.0) -> float:
    """√c, the standard deviation of a transition; variance: v of the "heun" chain."""
    return math.sqrt(after**2 - turning_level(now, after, variance) ** 2)


def turning_level(now: float, after: float, variance: float = 0.0) -> float:
    """s, the level at which the ODE of the "heun" chain ends and the noise begins; variance: v."""
    ancestral = after**4 / now**2
    if variance == 0:
        return math.sqrt(ancestral)
    # coarse steps have no such s: the ODE is not taken further than one Heun step bears
    return math.sqrt(max((variance + after**2) ** 2 / (variance + now**2) - variance, 0.5 * ancestral))


def network_levels(kernel: Kernel, levels: list[float], variance: float = 0.0) -> list[float]:
    """The noise levels at which a chain of `levels` calls the denoiser."""
    down = [turning_level(now, after, variance) for now, after in itertools.pairwise(levels) if after > 0]
    return sorted({*levels, *(down if kernel == "heun" else [])} - {0.0}, reverse=True)


@torch.no_grad()
def transition_mean(
    problem: InverseProblem,
    kernel: Kernel,
    u: Tensor,
    clean: Tensor,
    now: float,
    after: float,
    variance: float = 0.0,
) -> Tensor:
    """F(u), `(n, *shape)`; clean is D(u, now). Cost: one network pass an item for "heun", none for "ancestral"."""
    if kernel == "ancestral":
        return torch.lerp(clean, u, (after / now) ** 2)
    down = turning_level(now, after, variance)

    def heun(v: Tensor, d: Tensor) -> tuple[Tensor]:
        slope = (v - d) / now
        ahead = v + (down - now) * slope
        return (v + (down - now) * 0.5 * (slope + (ahead - problem.prior.denoise(ahead, down)) / down),)

    return in_blocks(problem, heun, u, clean)[0]


@torch.no_grad()
def widened_start(problem: InverseProblem, mean: Tensor, xi: Tensor, sigma: float) -> Tensor:
    """Draws of the diffusion's law at a level that swamps the prior: v + ½ (D(v) − D(m)) with v = m + σ ξ.

    N(m, σ²) lacks the prior's own covariance C, 2 % of the variance at σ = 7 √λ, which displaces the weights of far
    modes. With D(v) − D(m) ≈ C/σ² (v − m) these draws have σ² (I + C/2σ²)² = σ² + C + C²/4σ²: 0.01 % too much.
    """
    at_mean = problem.prior.denoise(mean[:1], sigma)
    v = mean + sigma * xi
    return v + 0.5 * (in_blocks(problem, lambda w: (problem.prior.denoise(w, sigma),), v)[0] - at_mean)
