r"""What a descent minimises: coordinates, misfits from coarse to fine, and the discrepancy principle.

    objective(q) = w_s · ½ |R^(-1/2) F_s (d − g(x(q)))|² − log p(q)

A stage s either filters the residual, F_s a zero-phase low-pass along the last axis of the data with its corner at
1/s of the Nyquist frequency, w_s = 1 (Bunks et al., Geophysics 60(5), 1995: coarse data have fewer local minima), or
widens the noise, F_s = I and w_s = 1/s². The last stage, s = 1, is the misfit itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from invgen.linalg import cg
from invgen.noise import GaussianNoise
from invgen.problem import InverseProblem
from invgen.solvers._inner import Theta, accepted, term_misfit
from invgen.solvers._target import Target, sound
from invgen.solvers._whitened import Map, Physical, observed_part, over_reals, term_covariance


@dataclass(frozen=True)
class Coordinates:
    """Where a descent walks.

    Attributes:
        shape: of one point, nuisance latents left out; a position is flat, `(batch, dim)`.
        physical: q -> x, theta. penalty: q -> −log p(q), `(batch,)`, up to a constant.
        reachable: q -> which items `(batch,)` have a density, and q with the others replaced.
    """

    shape: tuple[int, ...]
    dim: int
    physical: Physical
    penalty: Map
    reachable: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None


def _half_square(q: Tensor) -> Tensor:
    return 0.5 * q.square().sum(1)


def coordinates(problem: InverseProblem, space: str) -> Coordinates:
    """Physical units "x", the prior's coordinates "u", a latent "z" with nuisance parameters, or "white": u = μ + L w."""
    prior: Any = problem.prior
    shape = problem.model_shape
    n = math.prod(shape)
    if space == "z":
        target = Target(problem, "z")
        return Coordinates(target.model_shape, target.dim, target._physical, _half_square)
    if space == "white":
        white_shape = tuple(prior.covariance_u.noise_shape)

        def coloured(q: Tensor) -> tuple[Tensor, Theta]:
            return prior.transform(from_white(prior, q.reshape(-1, *white_shape))), {}

        return Coordinates(white_shape, math.prod(white_shape), coloured, _half_square)
    if space == "u":

        def density_in_u(q: Tensor) -> Tensor:
            u = q.reshape(-1, *shape)
            return -prior.log_prob(prior.transform(u)) - prior.transform.log_det(u)

        return Coordinates(shape, n, lambda q: (prior.transform(q.reshape(-1, *shape)), {}), density_in_u)

    def within(q: Tensor) -> tuple[Tensor, Tensor]:
        good, x = prior.transform.within_range(q.reshape(-1, *shape))
        return good, x.flatten(1)

    return Coordinates(
        shape,
        n,
        lambda q: (q.reshape(-1, *shape), {}),
        lambda q: -prior.log_prob(q.reshape(-1, *shape)),
        within,  # the density is zero where the transform cannot reach: line searches try such points
    )


def from_white(prior: Any, w: Tensor) -> Tensor:
    """u = μ + L w."""
    return prior.mean_u.to(w) + prior.covariance_u.sqrt(w)


def to_white(prior: Any, u: Tensor) -> Tensor:
    """The shortest w with μ + L w = u: Lᵀ C⁻¹ (u − μ)."""
    C, v = prior.covariance_u, u - prior.mean_u.to(u)
    solved = C.solve(v) if C.has_solve else cg(C.apply, v, rtol=100 * torch.finfo(v.dtype).eps).x
    with torch.enable_grad():
        w = torch.zeros(len(u), *C.noise_shape, dtype=u.dtype, device=u.device, requires_grad=True)
        return torch.autograd.grad(C.sqrt(w), w, solved)[0]


@dataclass(frozen=True)
class Stage:
    """A misfit on the way from coarse to fine: `smooth` filters data, `weight` `(batch,)` multiplies the misfit."""

    smooth: Map | None = None
    weight: Tensor | None = None


def stage_of(scales: Tensor, kind: str) -> Stage:
    """The stage of each item from its scale `(batch,)`, 1 for the misfit itself."""
    if kind == "sigma":
        return Stage(weight=scales.pow(-2))
    return Stage(smooth=lambda v: low_pass(v, scales))


def low_pass(v: Tensor, scales: Tensor) -> Tensor:
    """Zero-phase low-pass along the last axis with the corner at 1/scale of Nyquist, item by item; 1 changes nothing.

    Amplitude (1 + (f/f_c)⁸)^(-1/2) (Butterworth, order 4) on the even extension, so that ends do not wrap around.
    """
    if v.is_complex():
        return torch.complex(low_pass(v.real, scales), low_pass(v.imag, scales))
    n = v.shape[-1]
    f = torch.arange(n + 1, dtype=v.dtype, device=v.device) / n  # in units of Nyquist
    gain = (1 + (f * scales.to(v)[:, None]).pow(8)).rsqrt()
    gain = torch.where(scales[:, None] > 1, gain, torch.ones_like(gain))
    spectrum = torch.fft.rfft(torch.cat([v, v.flip(-1)], dim=-1), dim=-1)
    return torch.fft.irfft(spectrum * gain.reshape(len(v), *(1,) * (v.ndim - 2), n + 1), n=2 * n, dim=-1)[..., :n]


def misfit(problem: InverseProblem, x: Tensor, theta: Theta, stage: Stage) -> Tensor:
    """−log p(d | x, theta) of a stage, `(batch,)`, up to a constant where no noise level is unknown."""
    total = x.new_zeros(len(x))
    for i, (whole, term) in enumerate(zip(problem.terms, problem.observed_terms(), strict=True)):
        if stage.smooth is None:
            total = total + term_misfit(problem, i, term, term.operator(x, **accepted(term, theta)), theta)
            continue
        residual = whole.data - whole.operator(x, **accepted(whole, theta))
        seen = observed_part(problem, i, residual, stage.smooth)
        total = total + 0.5 * over_reals(term_covariance(problem, i, theta).whiten(seen)).square().sum(1)
    return total if stage.weight is None else total * stage.weight


def objective(problem: InverseProblem, where: Coordinates, stage: Stage) -> Map:
    """−log posterior of positions q `(batch, dim)`, up to a constant."""

    def value(q: Tensor) -> Tensor:
        good, q = where.reachable(q) if where.reachable is not None else (None, q)
        x, theta = where.physical(q)
        if theta:
            fine, theta = sound(problem, theta)
            good = fine if good is None else good & fine
        total = misfit(problem, x, theta, stage) + where.penalty(q)
        return total if good is None else torch.where(good, total, torch.full_like(total, math.inf))

    return value


def has_chi2(problem: InverseProblem) -> bool:
    """True where every noise is Gaussian with a known level."""
    return all(isinstance(t.noise, GaussianNoise) and not isinstance(t.noise.sigma, str) for t in problem.terms)


@torch.no_grad()
def chi2(problem: InverseProblem, x: Tensor, theta: Theta) -> Tensor:
    """|R^(-1/2)(d − g(x))|² over the number of real data, `(batch,)`: 1 is expected of the truth."""
    total, count = x.new_zeros(len(x)), 0
    for i, term in enumerate(problem.observed_terms()):
        white = over_reals(
            term_covariance(problem, i, theta).whiten(term.data - term.operator(x, **accepted(term, theta)))
        )
        total, count = total + white.square().sum(1), count + white.shape[1]
    return total / count
