r"""The prior step that split samplers share: a draw of p(u0 | u_σ) from denoiser calls alone.

From level σ to σ' = r σ the exact reverse transition p(u_σ' | u_σ) has, for any prior, the moments

    mean  r² u + (1 − r²) D(u),        covariance  Δ [r² I + (1 − r²) J],        Δ = σ² − σ'²,   J = ∂D/∂u,

because E[u0 | u] = D and Cov[u0 | u] = σ² J (Tweedie). A step takes the mean as it is and the square root of the
covariance as √Δ [r I + (1 − r) J], which is right where J is 0 or 1 and loses Δ (1 − r)² J(1 − J) between: second order
in 1 − r, where a step of the reverse SDE (J = 1) or of ancestral sampling (J = 0) is off in the first. Noise ξ is pushed
through J by a central difference of the denoiser, whose two calls also give D:

    D± = D(u ± ε √Δ ξ),       u' = r² u + (1 − r²) ½(D₊ + D₋) + √Δ r ξ + (1 − r) (D₊ − D₋)/2ε.

References: Efron 2011 (Tweedie's formula); Ho et al. 2020, arXiv:2006.11239, equations 6–7 (mean and J = 0).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from invgen.driver import Streams
from invgen.problem import InverseProblem

# small against the noise the denoiser expects (its level is then off by (1 + ε²)^½, three per cent), large against rounding
_EPSILON = 0.25


def transition_levels(sigma: float, steps: int, floor: float) -> list[float]:
    """The noise levels at which `reverse_draw` calls the denoiser."""
    return [sigma * floor ** (i / max(steps - 1, 1)) for i in range(steps)]


@torch.no_grad()
def reverse_draw(
    problem: InverseProblem, u: Tensor, sigma: float, rng: Streams, *, steps: int, floor: float, tag: str = "prior"
) -> Tensor:
    """A draw of p(u0 | u_σ = u), exact as `steps` grows and floor falls.

    Args:
        problem: the chunk's, whose prior denoises. u: `(batch, *shape)` at level sigma.
        steps: transitions: steps − 1 from sigma to floor · sigma, evenly in log σ, and one from there to 0.
        floor: last level over sigma. tag: of the noise.

    Returns:
        u0 like u. Cost: 2 · steps network passes without gradients.

    On a Gaussian prior the mean is exact for any number of steps. The last transition gives a direction of prior
    variance c the variance floor² σ² J², J = c/(c + floor² σ²), instead of floor² σ² J: too little where
    c is small against (floor · σ)².
    """
    denoise = problem.prior.denoise
    ratios = [floor ** (1 / (steps - 1))] * (steps - 1) if steps > 1 else []
    for r in [*ratios, 0.0]:
        xi = sigma * math.sqrt(1 - r * r) * rng.normal(problem.model_shape, dtype=u.dtype, tag=tag)
        above, below = denoise(u + _EPSILON * xi, sigma), denoise(u - _EPSILON * xi, sigma)
        moved = (0.5 * (1 - r * r)) * (above + below) + ((1 - r) / (2 * _EPSILON)) * (above - below)
        u = moved if r == 0 else moved + r * r * u + r * xi
        sigma = r * sigma
    return u
