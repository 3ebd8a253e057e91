r"""How a network becomes a denoiser: one table for every parametrisation, in sigma space.

All of them write D(u, sigma) = c_skip u + c_out F(c_in u, ·) around a network F. With s the standard deviation of the
data, τ = sigma/s and y = u0/s:

| name | F estimates | c_skip | c_out | c_in u is |
|---|---|---|---|---|
| edm | EDM's target (Karras et al. 2022, table 1) | 1/(1 + τ²) | s τ/√(1 + τ²) | x_t of a VP process |
| v | v = α n − σ_t y (Salimans & Ho 2022) | 1/(1 + τ²) | −s τ/√(1 + τ²) | x_t |
| epsilon | the noise n (Ho et al. 2020) | 1 | −s τ | x_t |
| x | y | 0 | s | x_t |
| flow | v = y − n on x_t = (1 − t) n + t y (Lipman et al. 2023) | 1/(1 + τ) | s τ/(1 + τ) | x_t, t = 1/(1 + τ) |

A variance-preserving process x_t = α y + σ_t n, α² + σ_t² = 1, is u scaled by α/s at τ = σ_t/α: c_in = 1/√(sigma² + s²).
Two derivations: y = α x_t − σ_t v gives the row of v, which is EDM's with the other sign; and on the straight path
E[y | x_t] = x_t + (1 − t) E[v | x_t] with x_t = u/(s + sigma), 1 − t = τ/(1 + τ), gives the row of flow matching, while
sigma = s (1 − t)/t.
"""

from __future__ import annotations

import torch
from torch import Tensor

PARAMETRISATIONS = ("edm", "epsilon", "x", "v", "flow")
WEIGHTINGS = ("edm", "epsilon", "x", "velocity", "elbo", "sigmoid")


def known(value: str, names: tuple[str, ...], what: str) -> str:
    """The value, or a ValueError that lists the names there are."""
    if value not in names:
        raise ValueError(f"There is no {what} {value!r}; known are {', '.join(map(repr, names))}.")
    return value


def coefficients(name: str, sigma: Tensor, s: float) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out and c_in of a parametrisation, shaped like sigma."""
    if name == "flow":
        total = sigma + s
        return s / total, sigma * s / total, 1 / total
    total = (sigma.square() + s**2).sqrt()
    if name == "edm":
        return (s / total).square(), sigma * s / total, 1 / total
    if name == "v":
        return (s / total).square(), -sigma * s / total, 1 / total
    if name == "epsilon":
        return torch.ones_like(sigma), -sigma, 1 / total
    return torch.zeros_like(sigma), torch.full_like(sigma, s), 1 / total


def error_weight(name: str, sigma: Tensor, s: float, bias: float) -> Tensor:
    """w(sigma) of the loss w |D − u0|², before a division by the density of ln sigma where the loss is an integral.

    Args:
        name: "edm": (sigma² + s²)/(sigma s)², |F − target|² of EDM and v. "epsilon": 1/sigma², |ε̂ − n|² of DDPM. "x":
            1/s². "velocity": ((s + sigma)/(s sigma))², |v̂ − v|² of flow matching. "elbo": 1/sigma², the integrand over
            ln sigma of VDM (Kingma et al. 2021, equation 17: −½ ∫ SNR'(t) |x − x̂|² dt with SNR = 1/sigma²). "sigmoid":
            the same times sigmoid(bias − λ), λ = −2 ln(sigma/s) (Kingma & Gao 2023).
        sigma: `(batch,)`. s: sd of the data. bias: of the sigmoid.
    """
    if name == "edm":
        return (sigma.square() + s**2) / (sigma * s).square()
    if name == "x":
        return torch.full_like(sigma, s**-2)
    if name == "velocity":
        return ((sigma + s) / (sigma * s)).square()
    weight = 1 / sigma.square()
    if name == "sigmoid":
        weight = weight * torch.sigmoid(bias + 2 * (sigma / s).log())
    return weight


def angular_velocity(name: str, y: Tensor, out: Tensor, angle: Tensor) -> Tensor:
    """dy/dφ of the probability-flow ODE for y = u/√(sigma² + s²), tan φ = sigma/s.

    y = cos φ ŷ0 + sin φ n̂ with the estimates ŷ0 = D/s and n̂ = (u − D)/sigma, so that dy/dφ = −sin φ ŷ0 + cos φ n̂: the
    velocity that v-prediction estimates. It stays of order one from no noise to noise alone.

    Args:
        name: parametrisation, not "flow". y, out: `(batch, …)`, input and output of the network F. angle: φ, broadcast.
    """
    if name == "v":
        return out
    if name == "edm":
        return -out
    if name == "epsilon":  # out is n̂
        return (out - angle.sin() * y) / angle.cos()
    return (angle.cos() * y - out) / angle.sin()  # out is ŷ0
