r"""How far a fitted law q(q) is from the posterior, by importance weights w = p(d, q)/q(q) of S of its draws.

- ELBO: mean of log w, a lower bound of log p(d); the gap is KL(q ‖ posterior).
- Importance-weighted bound: log of the mean weight, E ≤ log p(d) and tighter than the ELBO (Burda, Grosse &
  Salakhutdinov 2016, arXiv:1509.00519, with all S draws).
- PSIS k̂: shape of the generalised Pareto law that fits the largest weights (Vehtari, Simpson, Gelman, Yao & Gabry
  2024, arXiv:1507.02646, fit by Zhang & Stephens 2009). Above min(1 − 1/log10 S, 0.7) the weights do not mend the fit,
  and the fit is bad: too narrow somewhere, or a mode is missing (a mode that no draw of q comes near is seen by
  nothing).
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from invgen.driver import Streams
from invgen.noise import GaussianNoise
from invgen.problem import InverseProblem
from invgen.solvers._particles import sets
from invgen.solvers._target import Target


class Fit(NamedTuple):
    """Figures of a fitted law, `(sets,)` each."""

    elbo: Tensor
    iw_bound: Tensor
    khat: Tensor


def observation_streams(problem: InverseProblem, rng: Streams, purpose: str) -> Streams:
    """One stream an observation, whatever the number of samples; counted with those of the run, so that it resumes."""

    def build() -> Streams:
        observations = list(dict.fromkeys(o for o, _ in rng.items))
        streams = Streams(rng.seed, [(o, 0) for o in observations], device=rng.device, salt=f"{rng.salt}/{purpose}")
        streams.counters = rng.counters
        return streams

    return problem.remember(("streams", purpose), build, shared=False)


def repeated_target(problem: InverseProblem, rng: Streams, draws: int) -> Target:
    """The latent target of `draws` positions for every set of the chunk, set by set."""
    n_sets, each = sets(rng)

    def build() -> Target:
        rows = [i * each for i in range(n_sets) for _ in range(draws)] if problem.n_obs > 1 else [0]
        return Target(problem.select(rows), "z")

    return problem.remember(("repeated target", draws), build, shared=False)


def likelihood_constant(problem: InverseProblem) -> float:
    """What `Target.misfit` leaves out of log p(d | q): the normalisation of Gaussian terms of known covariance."""

    def build() -> float:
        total = 0.0
        for term in problem.observed_terms():
            if not isinstance(term.noise, GaussianNoise) or isinstance(term.noise.sigma, str):
                continue
            shape = tuple(term.operator.data_shape)
            R = term.noise.covariance(shape)
            m, log_det = math.prod(shape), float(R.logdet())
            total -= (
                log_det + m * math.log(math.pi)
                if term.data.is_complex()
                else 0.5 * (log_det + m * math.log(2 * math.pi))
            )
        return total

    return problem.remember("likelihood constant", build)


def assess(log_weights: Tensor) -> Fit:
    """ELBO, importance-weighted bound and k̂ of `(sets, S)` log weights; draws without a finite weight weigh nothing.

    NaN for a set whose weights are mostly not finite.
    """
    values = log_weights.double()
    good = torch.isfinite(values)
    count = good.sum(1)
    zero = torch.where(good, values, torch.zeros_like(values))
    elbo = zero.sum(1) / count
    bound = torch.where(good, values, torch.full_like(values, -math.inf)).logsumexp(1) - math.log(values.shape[1])
    bad = 2 * count < values.shape[1]
    khat = torch.tensor(
        [math.nan if lost else _pareto(row[keep]) for row, keep, lost in zip(values, good, bad.tolist())],
        dtype=torch.float64,
        device=values.device,
    )
    lost = torch.full_like(elbo, math.nan)
    return Fit(torch.where(bad, lost, elbo), torch.where(bad, lost, bound), khat)


def _pareto(log_weights: Tensor) -> float:
    """k̂ of one set of finite log weights `(S,)`; −inf where the weights are equal, which is a perfect fit."""
    ordered = (log_weights - log_weights.max()).sort().values
    n = len(ordered)
    if float(-ordered[0]) < 1e-9:
        return -math.inf
    tail = math.ceil(min(0.2 * n, 3 * math.sqrt(n)))  # as many as the paper takes
    cut = ordered[-tail - 1].clamp_min(math.log(torch.finfo(torch.float64).tiny))
    above = ordered[ordered > cut].exp() - cut.exp()
    return _pareto_shape(above[above > 0]) if int((above > 0).sum()) > 4 else math.inf


def _pareto_shape(x: Tensor) -> float:
    """Shape k of the generalised Pareto law of rising, positive x: the mean of k over a profile likelihood.

    With k(b) = ave log(1 − b x_i) the likelihood at b is n (log(−b/k) − k − 1); b is averaged over a grid (Zhang &
    Stephens 2009), and k is drawn to ½ with the weight of ten observations (Vehtari et al. 2024).
    """
    n, size = len(x), 30 + int(math.sqrt(len(x)))
    grid = torch.arange(1, size + 1, dtype=x.dtype, device=x.device)
    b = 1 / x[-1] + (1 - (size / (grid - 0.5)).sqrt()) / (3 * x[int(n / 4 + 0.5) - 1])
    k = torch.log1p(-b[:, None] * x).mean(1)
    weights = (n * ((-b / k).log() - k - 1)).softmax(0)
    shape = torch.log1p(-(weights * b).sum() * x).mean()
    return float((n * shape + 10 * 0.5) / (n + 10))


def warn_of_bad_fits(solver: object, fit: Fit, draws: int) -> None:
    """One warning for all observations whose k̂ is above the threshold of the paper."""
    threshold = min(1 - 1 / math.log10(draws), 0.7)
    bad = fit.khat > threshold
    if bool(bad.any()):
        warnings.warn(
            f"{type(solver).__name__}: the Pareto k of {int(bad.sum())} of {len(bad)} observations is up to {float(fit.khat[bad].max()):.2f}, above {threshold:.2f}: the fitted law is far from the posterior; take a richer law or a sampler.",
            stacklevel=4,
        )
