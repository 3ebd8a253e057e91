r"""Many positions an item on p_t(q) ∝ exp(−t Φ(q)) N(q; 0, I), t from 0 (the prior) to 1 (the posterior), and moves on it.

A frame is a Gaussian N(m, L Lᵀ) beside which the target is nearly flat; with y = L⁻¹(q − m)

    p_t ∝ exp(−V) N(y; 0, I),       V = t Φ(q) + ½|q|² − ½|y|²        (m = 0, L = I: V = t Φ)

and the moves treat N(y; 0, I) exactly: they are those of a latent space whatever the frame.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from invgen.contracts import HasLatent, Solver, require
from invgen.noise import GaussianNoise
from invgen.solvers._inner import has_gradient
from invgen.solvers._target import Target, check_target

if TYPE_CHECKING:
    from invgen.driver import Streams
    from invgen.problem import InverseProblem

EXPLORERS = ("auto", "pcn", "hmc")


def check_tempered(solver: Solver, problem: InverseProblem, explorer: str) -> None:
    """Raise a TypeError where the path from prior to posterior cannot be walked."""
    require(problem.prior, HasLatent, solver)  # the prior's end of the path is N(0, I), and is drawn from
    check_target(solver, problem, "z", gradient=explorer == "hmc")


def explorer_of(problem: InverseProblem, explorer: str) -> str:
    """The explorer "auto" stands for."""
    return explorer if explorer != "auto" else ("hmc" if has_gradient(problem) else "pcn")


def widened(target: Target, rng: Streams, each: int) -> Target:
    """The target of `each` positions an item, items first: row i · each + j belongs to item i."""
    problem = target.problem
    if problem.n_obs == 1:
        return target

    def build() -> Target:
        alone = len({o for o, _ in rng.items}) == 1  # one row of data then serves all
        return Target(problem.select([0] if alone else [i for i in range(len(rng)) for _ in range(each)]), target.space)

    return problem.remember(("widened", each), build, shared=False)


def log_constant(problem: InverseProblem) -> float:
    """What Φ leaves out of −log p(d | x), negated: −½ (log det R + n log 2π) of Gaussian terms of fixed level.

    A complex datum of variance σ² is two real ones of variance σ²/2.
    """

    def build() -> float:
        total = 0.0
        for term in problem.observed_terms():
            if isinstance(term.noise, GaussianNoise) and not isinstance(term.noise.sigma, str):
                log_det = float(term.noise.covariance(term.operator.data_shape).logdet())
                n = math.prod(term.operator.data_shape)
                if term.data.is_complex():
                    total -= log_det + n * math.log(math.pi)
                else:
                    total -= 0.5 * (log_det + n * math.log(2 * math.pi))
        return total

    return problem.remember("constant left out of the misfit", build)


class Frame(NamedTuple):
    """N(m, L Lᵀ) for each set of positions.

    Attributes:
        mean: `(sets, dim)`. factor: L, `(sets, dim, dim)` lower triangular, or its diagonal `(sets, dim)`.
    """

    mean: Tensor
    factor: Tensor

    def forward(self, y: Tensor) -> Tensor:
        """q = m + L y, `(n, dim)`; n rows are the sets one after another."""
        rows = y.reshape(len(self.mean), -1, y.shape[1])
        turned = rows @ self.factor.mT if self.factor.ndim == 3 else rows * self.factor[:, None]
        return (self.mean[:, None] + turned).reshape(y.shape)

    def inverse(self, q: Tensor) -> Tensor:
        """y = L⁻¹(q − m)."""
        rows = q.reshape(len(self.mean), -1, q.shape[1]) - self.mean[:, None]
        if self.factor.ndim == 3:
            rows = torch.linalg.solve_triangular(self.factor, rows.mT, upper=False).mT
        else:
            rows = rows / self.factor[:, None]
        return rows.reshape(q.shape)

    def pull(self, gradient: Tensor) -> Tensor:
        """Lᵀ ∇."""
        rows = gradient.reshape(len(self.mean), -1, gradient.shape[1])
        return (rows @ self.factor if self.factor.ndim == 3 else rows * self.factor[:, None]).reshape(gradient.shape)


class Moved(NamedTuple):
    """Where a move led: positions, Φ, ∇Φ (HMC), the probability of acceptance, and whether the proposal's Φ was NaN."""

    q: Tensor
    phi: Tensor
    slope: Tensor | None
    chance: Tensor
    invalid: Tensor


def walk(
    target: Target, frame: Frame | None, q: Tensor, phi: Tensor, t: Tensor, beta: Tensor, xi: Tensor, uniform: Tensor
) -> Moved:
    """Preconditioned Crank–Nicolson in the frame: y' = √(1 − β²) y + β ξ, accepted with min(1, exp(V − V')).

    Cotter et al. 2013, Statistical Science 28, equation 4.3; with a frame the generalised walk of Rudolf & Sprungk 2018
    (Foundations of Computational Mathematics 18, equation 17).

    Args:
        target: of the rows. q: `(n, dim)`. phi, t, beta, uniform: `(n,)`. xi: `(n, dim)`.
    """
    y = frame.inverse(q) if frame else q
    there = (1 - beta.square()).clamp_min(0).sqrt()[:, None] * y + beta[:, None] * xi
    proposal = frame.forward(there) if frame else there
    value = target.value(proposal)
    invalid = torch.isnan(value)
    value = torch.where(invalid, math.inf, value)  # no likelihood is as good as none
    gain = _potential(frame, q, y, phi, t) - _potential(frame, proposal, there, value, t)
    return _decide(q, phi, None, proposal, value, None, gain, invalid, uniform)


def leapfrog(
    target: Target,
    frame: Frame | None,
    q: Tensor,
    phi: Tensor,
    slope: Tensor,
    t: Tensor,
    h: Tensor,
    momentum: Tensor,
    uniform: Tensor,
    leaps: int,
) -> Moved:
    """Hamiltonian trajectory of `leaps` steps: half a kick −½ h ∇V, a turn of (y, p) by the angle h, half a kick.

    Beskos, Pinski, Sanz-Serna & Stuart 2011 (Stochastic Processes and their Applications 121, section 3).

    Args:
        as `walk`; slope: ∇Φ `(n, dim)`. h: `(n,)`. momentum: `(n, dim)` of N(0, I).
    """
    y, p = (frame.inverse(q) if frame else q), momentum
    before = _potential(frame, q, y, phi, t) + _half(y) + _half(p)
    kick, cosine, sine = 0.5 * h[:, None], h.cos()[:, None], h.sin()[:, None]
    here, force, value = q, slope, phi
    for _ in range(leaps):
        p = p - kick * _gradient(frame, here, y, force, t)
        y, p = cosine * y + sine * p, cosine * p - sine * y
        here = frame.forward(y) if frame else y
        value, force = target.value_and_grad(here)
        p = p - kick * _gradient(frame, here, y, force, t)
    invalid = torch.isnan(value)
    value = torch.where(invalid, math.inf, value)
    gain = before - (_potential(frame, here, y, value, t) + _half(y) + _half(p))
    return _decide(q, phi, slope, here, value, force, gain, invalid, uniform)


def tempered(t: Tensor, phi: Tensor) -> Tensor:
    """t Φ with 0 · ∞ = 0: the prior does not look at the likelihood."""
    return torch.where(t == 0, torch.zeros_like(phi), t * phi)


def _potential(frame: Frame | None, q: Tensor, y: Tensor, phi: Tensor, t: Tensor) -> Tensor:
    value = tempered(t, phi).double()
    return value + _half(q) - _half(y) if frame else value


def _gradient(frame: Frame | None, q: Tensor, y: Tensor, slope: Tensor, t: Tensor) -> Tensor:
    pulled = torch.where(t[:, None] == 0, torch.zeros_like(slope), t[:, None] * slope)
    return frame.pull(pulled + q) - y if frame else pulled


def _half(v: Tensor) -> Tensor:
    return 0.5 * v.square().sum(1, dtype=torch.float64)


def _decide(
    q: Tensor,
    phi: Tensor,
    slope: Tensor | None,
    proposal: Tensor,
    value: Tensor,
    force: Tensor | None,
    gain: Tensor,
    invalid: Tensor,
    uniform: Tensor,
) -> Moved:
    chance = torch.nan_to_num(gain, nan=-math.inf, posinf=0.0).clamp_max(0).exp().to(phi)
    yes = uniform < chance
    wide = yes[:, None]
    slope = torch.where(wide, force, slope) if slope is not None and force is not None else None
    return Moved(torch.where(wide, proposal, q), torch.where(yes, value, phi), slope, chance, invalid)
