"""Refinement: exact Markov chains started from the draws of an amortised posterior."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invgen.contracts import HasDensity, HasGaussian, HasLatent
from invgen.posterior import Posterior
from invgen.solvers._chain import Chain

if TYPE_CHECKING:
    from invgen.problem import InverseProblem

__all__: list[str] = []


def refined(problem: InverseProblem, posterior: Posterior, chain: Chain, *, seed: int = 0, **options: Any) -> Posterior:
    """Run one chain from every draw, and keep where each ends. Targets the exact posterior, asymptotically in the length.

    The law of a chain's state approaches p(x | d) from the amortised one: their distance falls with every step, whatever it
    was, and a good start leaves little of it. What the draws missed altogether (a mode) a short chain does not find.

    Args:
        problem: likelihood and prior, with the observations that `posterior` belongs to, in the same order.
        posterior: of an amortised solver; draws that diverged are replaced by good ones of the same observation.
        chain: which one, and how long: PCN, GPCN, HMC, …; warm-up + draws · thin steps, of which the last draw is kept. Its
            `starts` and `space` are set here: the latent space where draws can be carried there, else u.
        options: for `chain.solve`.

    Returns:
        Posterior of as many draws, `(obs, 1, n, *shape)`, with the chain's statistics.

    Raises:
        TypeError: nuisance parameters (amortised draws hold none); a prior without density or invertible generator.
        ValueError: a posterior of other shape or of another number of observations.

    Cost: that of the chain, one observation after the other.
    """
    if problem.nuisance:
        raise TypeError(
            f"Refinement starts from draws of x alone, but {sorted(problem.nuisance)} are unknown too; run the chain without starts."
        )
    if posterior.n_obs != problem.n_obs or posterior.shape != problem.model_shape:
        raise ValueError(
            f"The posterior holds {posterior.n_obs} observations of {posterior.shape}, the problem {problem.n_obs} of {problem.model_shape}; give the draws of this problem."
        )
    draws = posterior.samples.flatten(1, 2)
    parts = []
    for o in range(problem.n_obs):
        good = draws[o][torch.isfinite(draws[o].flatten(1)).all(1)]
        if not len(good):
            raise ValueError(f"All draws of observation {o} diverged; there is nothing to start from.")
        space, starts = _positions(problem.prior, good)
        one = replace(chain, draws=1, starts=starts, space=space if chain.space == "auto" else chain.space)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*R-hat.*")
            parts.append(one.solve(problem.select([o]), draws.shape[1], seed=seed + 7919 * o, **options))
    return Posterior(
        torch.cat([p.samples.transpose(1, 2) for p in parts]),
        kind="exact",
        stats={k: torch.cat([p.stats[k].transpose(1, 2) for p in parts]) for k in parts[0].stats},
        counts={k: sum(p.counts.get(k, 0) for p in parts) for k in parts[0].counts},
        settings={**parts[0].settings, "refined": posterior.settings.get("solver", "")},
        seed=seed,
        seconds=sum(p.seconds for p in parts),
        versions=parts[0].versions,
        grid=parts[0].grid,
        problem=problem,
    )


def _positions(prior: Any, x: Tensor) -> tuple[str, Tensor]:
    """The space, and the draws in it, `(n, dim)`."""
    u = prior.transform.inverse(x)
    if isinstance(prior, HasGaussian) and isinstance(prior, HasLatent) and prior.covariance_u.has_solve:
        z = prior.covariance_u.whiten(u.double() - prior.mean_u.double())
        back = prior.decode(z[:1])
        if torch.allclose(back, x[:1].to(back), rtol=1e-3, atol=1e-3 * float(x.std())):
            return "z", z.flatten(1)
    elif isinstance(prior, HasLatent) and isinstance(prior, HasDensity) and hasattr(prior, "encode"):
        return "z", prior.encode(x).flatten(1)  # a flow: the generator has an inverse
    if isinstance(prior, HasDensity):
        return "u", u.flatten(1)
    raise TypeError(
        f"{type(prior).__name__} has neither a density nor a generator that can be inverted, so draws of x give a chain no start; run it without starts."
    )
