r"""Densities of a diffusion prior: the probability-flow ODE, and the variational bound.

**ODE.** In the angle φ, tan φ = sigma/s, and y = u/√(sigma² + s²), the probability flow is dy/dφ = −sin φ D/s + cos φ
(u − D)/sigma, of order one everywhere. The change of variables along it gives

    log p_0(u0) ≈ log p_σmin(u0) = log p_σT(u_T) + (n/2) ln[(σ_T² + s²)/(σ_min² + s²)] + ∫ div(dy/dφ) dφ.

*The end at noise.* p_σT is the prior convolved with N(0, σ_T²). N(0, σ_T²) alone is wrong by the prior's mean, and by
λ/σ_T² in the variance of a mode of variance λ. Here p_σT is the Gaussian that has the denoiser's own score
(D − u)/σ_T² and its Jacobian J = ∂D/∂u at u_T. For a Gaussian prior of covariance C it is exact: I − J = σ_T²(C + σ_T²)⁻¹,

    log p_σT(u) = −(n/2) ln(2π σ_T²) + ½ ln det(I − J) − ½ (u − m)ᵀ(u − D(u))/σ_T²,   m = D(m);

for another prior what is left out is the skewness of order (√λ/σ_T)³. With Hutchinson's probe v, ln det(I − J) is
−vᵀJv − ½|Jv|², right to (λ/σ_T²)³.

*The end at data.* log p_σmin stands for log p_0: for a mode of variance λ ≫ σ_min² the difference is of order σ_min²/λ.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from invgen.priors._ode import full_jacobian, integrate, rademacher, transported


def _angles(prior: Any, low: float, high: float) -> tuple[float, float]:
    return math.atan(low / prior.sigma_data), math.atan(high / prior.sigma_data)


def flow_to(prior: Any, u: Tensor, start: float, end: float, rtol: float) -> Tensor:
    """u at the noise level `end` along the probability flow from `start`, adaptive steps for each item."""
    first, last = _angles(prior, start, end)
    s = prior.sigma_data
    y = (u / math.hypot(start, s)).double()

    def slope(t: Tensor, state: Tensor, items: Tensor) -> Tensor:
        return prior._velocity(state.reshape(-1, *u.shape[1:]), t, items).flatten(1)

    y = integrate(slope, y.flatten(1), first, last, rtol=rtol, atol=rtol).reshape(u.shape)
    return (y * math.hypot(end, s)).to(u)


def probability_flow(prior: Any, u: Tensor, seed: int | None, rtol: float, atol: float) -> Tensor:
    """log p(u), `(batch,)` float64; exact traces when `seed` is None."""
    low, high, s, n = prior.sigma_min, prior.start_sigma, prior.sigma_data, u[0].numel()
    probe = None if seed is None else rademacher(seed, len(u), u.shape[1:], u.double(), "trace")
    start, end = _angles(prior, low, high)
    y = u.double() / math.hypot(low, s)
    y, gain = transported(prior._velocity, y, start, end, probe, rtol=rtol, atol=atol)
    u_end = y * math.hypot(high, s)
    scale = n * math.log(math.hypot(high, s) / math.hypot(low, s))
    return terminal(prior, u_end, high, probe) + scale + gain


def terminal(prior: Any, u: Tensor, sigma: float, probe: Tensor | None) -> Tensor:
    """log p_σ(u) at a noise level that swamps the prior, `(batch,)`: see the module's text."""
    n = u[0].numel()
    mean = torch.zeros_like(u[:1])
    for _ in range(4):  # D(m) is a contraction by λ/σ², at most 1/50
        mean = prior.denoise(mean, sigma)
    if probe is None:
        clean, jacobian = full_jacobian(lambda v: prior.denoise(v, sigma), u)
        identity = torch.eye(n, dtype=u.dtype, device=u.device)
        determinant = torch.linalg.slogdet(identity - jacobian).logabsdet
    else:
        clean, pushed = torch.func.jvp(lambda v: prior.denoise(v, sigma), (u,), (probe,))  # type: ignore[misc]
        determinant = -(probe * pushed).flatten(1).sum(1) - 0.5 * pushed.square().flatten(1).sum(1)
    square = ((u - mean) * (u - clean)).flatten(1).sum(1) / sigma**2
    return -0.5 * n * math.log(2 * math.pi * sigma**2) + 0.5 * determinant - 0.5 * square


def variational_bound(prior: Any, u: Tensor, levels: int, seed: int) -> Tensor:
    """ELBO of log p(u), `(batch,)` float64: −(KL at σ_T) − ∫ E|u0 − D|²/σ² d ln σ + E ln N(u0; u_σmin, σ_min²).

    Kingma et al. 2021, equations 11-17, in sigma space (SNR = 1/σ²), with p(u_σT) = N(m, σ_T² + s²). The
    integral is the mean over `levels` stratified values of ln σ with one noise each, an item's own: an unbiased estimate.
    """
    from invgen.streams import Streams

    low, high, s, n = prior.sigma_min, prior.start_sigma, prior.sigma_data, u[0].numel()
    rng = Streams(seed, range(len(u)), device=u.device)
    width = math.log(high / low)
    mean = torch.zeros_like(u[:1])
    for _ in range(4):
        mean = prior.denoise(mean, high)
    wide = (-1, *(1,) * (u.ndim - 1))
    loss = torch.zeros(len(u), dtype=torch.float64, device=u.device)
    for i in range(levels):
        place = (i + rng.uniform((), dtype=torch.float64, tag="level")) / levels
        sigma = torch.exp(math.log(low) + width * place)
        noise = rng.normal(u.shape[1:], dtype=u.dtype, tag="noise")
        error = prior.denoise(u + sigma.to(u).reshape(wide) * noise, sigma) - u
        loss += width / levels * error.double().square().flatten(1).sum(1) / sigma.square()
    total = high**2 + s**2
    off = (u - mean).double().square().flatten(1).sum(1)
    prior_term = 0.5 * (n * (high**2 / total - 1 + math.log(total / high**2)) + off / total)
    data_term = -0.5 * n * math.log(2 * math.pi * low**2) - 0.5 * n
    return data_term - prior_term - loss
