r"""Samplers of a diffusion in sigma space: from u at the first level to u at the last, through D(u, sigma) alone.

In a variance-preserving process x_t = α (u/s), so every step below is that of the process with β, α or t in it, written
once: with n̂ = (u − D)/sigma, the deterministic step u' = D + sigma' n̂ is DDIM's (Song et al. 2021, arXiv:2010.02502,
equation 12), Euler's in sigma (EDM) and Euler's in the time of flow matching.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]

STOCHASTIC = ("ancestral", "sde")
SAMPLERS = ("euler", "heun", "ddim", "ancestral", "sde", "ode")


def ancestral(denoise: Denoise, u: Tensor, levels: Sequence[float], rng: Any) -> Tensor:
    """Exact sampling of p(u_σ' | u_σ, u0 = D): DDPM's posterior step (Ho et al. 2020, equations 6-7)."""
    for now, after in itertools.pairwise(levels):
        clean = denoise(u, now)
        keep = (after / now) ** 2
        u = clean + keep * (u - clean)
        if after > 0:
            u = u + math.sqrt(keep * (now**2 - after**2)) * rng.normal(u.shape[1:], dtype=u.dtype)
    return u


def ddim(denoise: Denoise, u: Tensor, levels: Sequence[float], rng: Any, eta: float = 0.0) -> Tensor:
    """u' = D + √(σ'² − η²v) n̂ + η √v ε, v = σ'²(σ² − σ'²)/σ²: η = 0 is deterministic, η = 1 ancestral (DDIM, eq. 16)."""
    for now, after in itertools.pairwise(levels):
        clean = denoise(u, now)
        fresh = (eta * after / now) ** 2 * (now**2 - after**2)
        u = clean + math.sqrt(after**2 - fresh) / now * (u - clean)
        if fresh > 0:
            u = u + math.sqrt(fresh) * rng.normal(u.shape[1:], dtype=u.dtype)
    return u


def sde(denoise: Denoise, u: Tensor, levels: Sequence[float], rng: Any) -> Tensor:
    """Euler–Maruyama of the reverse SDE, du = −2σ ∇log p dσ + √(2σ) dw backwards (Song et al. 2021, equation 6).

    u' = u + (σ² − σ'²)(D − u)/σ² + √(σ² − σ'²) ε. Its law is biased in proportion to the step: the ancestral step has
    the same drift and the right variance.
    """
    for now, after in itertools.pairwise(levels):
        u = u + (1 - (after / now) ** 2) * (denoise(u, now) - u)
        if after > 0:
            u = u + math.sqrt(now**2 - after**2) * rng.normal(u.shape[1:], dtype=u.dtype)
    return u


def heun(denoise: Denoise, u: Tensor, levels: Sequence[float]) -> Tensor:
    """Heun's second-order steps of du/dσ = (u − D)/σ (Karras et al. 2022, algorithm 1, no churn)."""
    for now, after in itertools.pairwise(levels):
        slope = (u - denoise(u, now)) / now
        ahead = u + (after - now) * slope
        if after > 0:
            slope = 0.5 * (slope + (ahead - denoise(ahead, after)) / after)
            ahead = u + (after - now) * slope
        u = ahead
    return u


def straight(velocity: Callable[[Tensor, float], Tensor], x: Tensor, steps: int, rule: str) -> Tensor:
    """`steps` equal steps of dx/dt = v(x, t) from t = 0 to 1 by Euler's, the midpoint or Heun's rule."""
    h = 1 / steps
    for i in range(steps):
        t = i * h
        slope = velocity(x, t)
        if rule == "midpoint":
            slope = velocity(x + 0.5 * h * slope, t + 0.5 * h)
        elif rule == "heun":
            slope = 0.5 * (slope + velocity(x + h * slope, min(t + h, 1.0)))
        x = x + h * slope
    return x
