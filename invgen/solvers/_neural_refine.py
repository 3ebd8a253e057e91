r"""Amortised draws made exact, where the likelihood and the prior's density are known.

Importance resampling, in few dimensions: w_i ∝ p(d | x_i) p(x_i)/q(x_i | d), the largest weights smoothed by a generalised
Pareto law whose shape k̂ says whether they can be trusted (Vehtari et al. 2024, arXiv:1507.02646, section 3).
Chains otherwise: Hamiltonian Monte Carlo from the amortised draws, which are near the posterior already.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invgen.contracts import HasDensity, require
from invgen.solvers._importance import assess
from invgen.solvers._neural_coordinates import Coordinates
from invgen.solvers._target import Target
from invgen.solvers.hmc import HMC

if TYPE_CHECKING:
    from invgen.driver import Streams
    from invgen.posterior import Posterior
    from invgen.problem import InverseProblem
    from invgen.solvers.amortized import AmortizedPosterior

_MOST = 20  # unknowns up to which weights are tried
_TRUSTED = 0.7  # k̂


def refine(
    amortized: AmortizedPosterior,
    problem: InverseProblem,
    posterior: Posterior,
    *,
    method: str = "auto",
    warmup: int = 100,
    draws: int = 1,
    seed: int = 0,
    **options: Any,
) -> Posterior:
    """The exact posterior from amortised draws.

    Args:
        amortized: what drew. problem: with its likelihood and the data of `posterior`.
        posterior: `amortized.solve(problem, n)`, n draws of each observation.
        method: "importance" (up to 20 unknowns), "chains", or "auto": weights where they apply and k̂ ≤ 0.7 for every
            observation, else chains.
        warmup, draws: steps of each chain before its draws, and draws it keeps; one chain starts from each amortised draw.
        seed: of the chains. options: of `invgen.driver.run`.

    Returns:
        Weighted: the same draws with `weights`, `log_evidence` and `stats["khat"]`. Chains: `(obs, n, draws, *shape)`.
        Both target the exact posterior asymptotically: in the number of draws, and in the length of the chains.

    Raises:
        TypeError: no density of the prior, a black box without a gradient (chains).
        ValueError: more than 20 unknowns for weights.

    Cost: weights: one operator item and one density of the network a draw; chains: as HMC.
    """
    if method not in ("auto", "importance", "chains"):
        raise ValueError(f"refine takes method 'auto', 'importance' or 'chains', got {method!r}.")
    fits = amortized.direct and amortized.coordinates.space != "z" and amortized.coordinates.dim <= _MOST
    if method == "importance" and not fits:
        raise ValueError(
            f"Importance weights need a density of up to {_MOST} unknowns, this one is {amortized.method!r} of {amortized.coordinates.dim} in the space {amortized.coordinates.space!r}; take method='chains'."
        )
    if fits and method != "chains":
        weighted, khat = _weighted(amortized, problem, posterior)
        if method == "importance" or float(khat.max()) <= _TRUSTED:
            if float(khat.max()) > _TRUSTED:
                warnings.warn(
                    f"The importance weights of {int((khat > _TRUSTED).sum())} observations have k̂ up to {float(khat.max()):.2f}, above {_TRUSTED}: they do not mend the estimate; take method='chains'.",
                    stacklevel=3,
                )
            return weighted
    return _chains(amortized, problem, posterior, warmup, draws, seed, options)


def _weighted(amortized: AmortizedPosterior, problem: InverseProblem, posterior: Posterior) -> tuple[Posterior, Tensor]:
    require(problem.prior, HasDensity, "importance resampling")
    n_obs, chains, count = posterior.samples.shape[:3]
    rows = []
    for o in range(n_obs):
        x = posterior.samples[o].flatten(0, 1).double()
        theta = {k: v[o].flatten().double() for k, v in posterior.theta.items()}
        one = problem.select([o], dtype=torch.float64)
        data: Any = [t.data[0] for t in one.terms]
        with torch.no_grad():
            exact = one.log_posterior(x, **theta)
            learnt = amortized.log_prob(x, data if len(data) > 1 else data[0], **theta)
        rows.append(exact - learnt)
    log_weights = torch.stack(rows)
    fit = assess(log_weights)
    smooth = torch.stack([smoothed(row) for row in log_weights])
    weights = torch.softmax(smooth, 1).reshape(n_obs, chains, count)
    khat = fit.khat.to(weights)[:, None, None].expand(n_obs, chains, count)
    settings = {**posterior.settings, "refined": "importance"}
    return (
        replace(
            posterior,
            kind="exact",
            weights=weights.to(posterior.samples.dtype),
            log_evidence=fit.iw_bound,
            stats={**posterior.stats, "khat": khat},
            settings=settings,
            problem=problem,
        ),
        fit.khat,
    )


def smoothed(log_weights: Tensor) -> Tensor:
    """Log weights `(S,)`, the largest replaced by the expected order statistics of a generalised Pareto law.

    The M = min(S/5, 3 √S) largest become F⁻¹((j − ½)/M), j = 1 … M, of the law fitted to them, at most the raw maximum.
    """
    values = torch.nan_to_num(log_weights.double(), nan=-math.inf, posinf=-math.inf)
    values = values - values.max()
    n = len(values)
    tail = min(n // 5, math.ceil(3 * math.sqrt(n)))
    order = values.argsort()
    cut = float(values[order[-tail - 1]].exp())
    above = values[order[-tail:]].exp() - cut
    if tail < 5 or float(above[0]) <= 0:
        return values
    k, scale = _pareto_law(above)
    levels = (torch.arange(tail, dtype=torch.float64) + 0.5) / tail
    growth = torch.expm1(-k * torch.log1p(-levels)) / k if abs(k) > 1e-9 else -torch.log1p(-levels)
    out = values.clone()
    out[order[-tail:]] = (cut + scale * growth).log().clamp_max(0.0)
    return out


def _pareto_law(x: Tensor) -> tuple[float, float]:
    """Shape and scale of the generalised Pareto law of sorted excesses (Zhang & Stephens 2009, Technometrics 51, 316)."""
    n = len(x)
    size = 30 + math.isqrt(n)
    grid = torch.arange(1, size + 1, dtype=x.dtype)
    b = 1 / x[-1] + (1 - (size / (grid - 0.5)).sqrt()) / (3 * x[int(n / 4 + 0.5) - 1])
    k = torch.log1p(-b[:, None] * x).mean(1)
    chosen = float(((n * ((-b / k).log() - k - 1)).softmax(0) * b).sum())
    shape = float(torch.log1p(-chosen * x).mean())
    return shape, -shape / chosen


@dataclass(frozen=True)
class _FromDraws(HMC):
    """Hamiltonian Monte Carlo, chain s of observation o started at `positions[o, s]`."""

    positions: Tensor = field(default_factory=lambda: torch.zeros(1, 1, 1))

    def init(self, problem: InverseProblem, rng: Streams) -> dict[str, Tensor]:
        positions, space = self.positions, self.space
        problem.remember(("target", space), lambda: _Started(problem, space, positions), shared=False)
        return super().init(problem, rng)


class _Started(Target):
    def __init__(self, problem: InverseProblem, space: str, positions: Tensor) -> None:
        super().__init__(problem, space)
        self.positions = positions

    def start(self, rng: Streams, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        q = torch.stack([self.positions[o, s] for o, s in rng.items]).to(device=rng.device, dtype=dtype)
        phi = self.value(q)
        return torch.where(torch.isfinite(phi)[:, None], q, torch.full_like(q, math.nan)), phi


def _chains(
    amortized: AmortizedPosterior,
    problem: InverseProblem,
    posterior: Posterior,
    warmup: int,
    draws: int,
    seed: int,
    options: dict[str, Any],
) -> Posterior:
    coordinates = amortized.coordinates
    latent = coordinates.space == "z" or not isinstance(problem.prior, HasDensity)
    if latent and (posterior.latent is None or coordinates.names):
        raise TypeError(
            f"Chains start in the prior's coordinates, for which {type(problem.prior).__name__} needs a density, or in a latent without nuisance parameters."
        )
    n_obs, chains, count = posterior.samples.shape[:3]
    if latent:
        assert posterior.latent is not None
        q = posterior.latent.reshape(n_obs, chains * count, -1)
    else:
        theta = {k: v.flatten() for k, v in posterior.theta.items()}
        own = Coordinates.of(problem, "u")
        good, x, inside = own.within(posterior.samples.flatten(0, 2), theta)
        v = own.flatten(x, inside)
        v = torch.where(good[:, None], v, torch.full_like(v, math.nan))  # a lost draw starts a lost chain
        q = v.reshape(n_obs, chains * count, -1)
    walk = _FromDraws(draws=draws, warmup=warmup, thin=3, space="z" if latent else "u", positions=q)
    refined = walk.solve(problem, chains * count, seed=seed, **options)
    return replace(refined, settings={**refined.settings, "solver": "AmortizedPosterior", "refined": "chains"})
