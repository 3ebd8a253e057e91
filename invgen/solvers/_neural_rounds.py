r"""Sequential estimation for one observation by truncated proposals.

Round r + 1 simulates from the prior restricted to where the estimate of round r has all but ε of its mass,

    p̃(x) ∝ p(x) 1(q_r(x | d) ≥ τ),      τ the ε-quantile of q_r(x | d) under q_r,

and trains on the pairs of all rounds with the plain loss: inside every truncation the pairs follow the prior up to a
constant, so that the estimate at d needs no correction (Deistler, Gonçalves & Macke 2022, arXiv:2210.04815, section 3).
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invgen.driver import Streams
from invgen.simulations import Simulations
from invgen.solvers._neural_fit import Recipe, derived, fit

if TYPE_CHECKING:
    from invgen.problem import InverseProblem
    from invgen.solvers.amortized import AmortizedPosterior

_LOST = 1e-4  # ε
_DRAWS = 10_000  # of the estimate, for τ
_TRIES = 200  # times as many draws of the prior as are wanted, at the most


def fit_in_rounds(
    recipe: Recipe, rounds: int, problem: InverseProblem, simulations: int, *, seed: int = 0, **options: Any
) -> AmortizedPosterior:
    """Train for the problem's observation on `simulations` pairs in all.

    Raises:
        ValueError: several observations. TypeError: a latent, whose truncation would need its density.
    """
    if problem.n_obs != 1:
        raise ValueError(
            f"Rounds are for one observation, the problem holds {problem.n_obs}; take rounds=1, which serves all of them."
        )
    data = [t.data for t in problem.terms]
    each = [simulations // rounds + (1 if r < simulations % rounds else 0) for r in range(rounds)]
    pairs = Simulations.of(problem, each[0], derived(seed, 1))
    amortized = fit(recipe, problem, pairs, seed=seed, **options)
    for r in range(1, rounds):
        if amortized.coordinates.space == "z":
            raise TypeError(
                "Rounds need a density of the unknowns, which a latent of a generator has not; take rounds=1."
            )
        x, theta = _truncated(amortized, problem, data, each[r], derived(seed, 12, r))
        pairs = _joined(pairs, _observed(problem, x, theta, derived(seed, 13, r)))
        amortized = fit(recipe, problem, pairs, seed=derived(seed, 14, r), **options)
    return amortized


def _truncated(
    amortized: AmortizedPosterior, problem: InverseProblem, data: list[Tensor], n: int, seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """`n` draws of the prior where the estimate is above τ."""
    d: Any = data if len(data) > 1 else data[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a strange observation is told about when it is solved for
        drawn = amortized(d, _DRAWS, seed=seed)
    own = {k: v.flatten() for k, v in drawn.theta.items()}
    with torch.no_grad():
        reached = amortized.log_prob(drawn.samples.flatten(0, 2), d, **own)
    level = reached.quantile(_LOST)
    kept: list[Tensor] = []
    others: list[dict[str, Tensor]] = []
    count, size = 0, max(n, 1000)
    for attempt in range(_TRIES):
        x = problem.prior.sample(size, seed=derived(seed, 1, attempt))
        theta = {
            name: law.sample(size, seed=derived(seed, 2 + i, attempt)).reshape(size)
            for i, (name, law) in enumerate(problem.nuisance.items())
        }
        with torch.no_grad():
            good = amortized.log_prob(x, d, **theta) >= level
        kept.append(x[good])
        others.append({k: v[good] for k, v in theta.items()})
        count += int(good.sum())
        if count >= n:
            break
    if count < 20:
        raise ValueError(
            f"Only {count} of {size * _TRIES} draws of the prior lie where the estimate has mass; take fewer rounds, or more simulations in each."
        )
    return torch.cat(kept)[:n], {k: torch.cat([o[k] for o in others])[:n] for k in problem.nuisance}


def _observed(problem: InverseProblem, x: Tensor, theta: dict[str, Tensor], seed: int) -> Simulations:
    """Data of given unknowns."""
    rng = Streams(seed, range(len(x)), salt="simulate")
    with torch.no_grad():
        predictions = problem.predict(x, **theta)
        data = []
        for i, (term, prediction) in enumerate(zip(problem.terms, predictions, strict=True)):
            drawn = term.noise.draw(prediction, rng.spawn(f"term{i}"), **theta)
            zero = torch.zeros((), dtype=drawn.dtype)
            data.append(drawn if term.mask is None else torch.where(term.mask, drawn, zero))
    return Simulations(x, theta, tuple(data)).finite()


def _joined(first: Simulations, second: Simulations) -> Simulations:
    (x, theta, data), (y, more, observed) = first.batch(slice(None)), second.batch(slice(None))
    return Simulations(
        torch.cat([x, y]),
        {k: torch.cat([theta[k], more[k]]) for k in theta},
        tuple(torch.cat([a, b.to(a)]) for a, b in zip(data, observed, strict=True)),
        first.failed + second.failed,
    )
