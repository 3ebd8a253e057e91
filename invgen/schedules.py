"""Noise levels of a diffusion, from much noise to none: host floats, computed once a run."""

from __future__ import annotations

__all__ = ["sigma_schedule"]


def sigma_schedule(sigma_min: float, sigma_max: float, steps: int, rho: float = 7.0) -> list[float]:
    """The levels of Karras et al. 2022 (arXiv:2206.00364, equation 5), then 0.

        σ_i = (σ_max^(1/ρ) + i/(steps − 1) (σ_min^(1/ρ) − σ_max^(1/ρ)))^ρ,   i = 0 … steps − 1

    Args:
        sigma_min, sigma_max: last and first level, in units of u.
        steps: levels before the 0.
        rho: ρ; 7 spends the steps as the paper does, large values approach a geometric sequence.

    Returns:
        `steps` + 1 floats, falling.

    Raises:
        ValueError: no steps, or levels that are not 0 < sigma_min < sigma_max.
    """
    if steps < 1 or not 0 < sigma_min < sigma_max:
        raise ValueError(
            f"A schedule needs steps >= 1 and 0 < sigma_min < sigma_max, got steps={steps}, sigma_min={sigma_min}, sigma_max={sigma_max}."
        )
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [*((top + i / max(steps - 1, 1) * (bottom - top)) ** rho for i in range(steps)), 0.0]
