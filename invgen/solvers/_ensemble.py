"""What ensemble Kalman methods share: whitened predictions of a set of positions, and members whose model run failed.

The ensemble of an observation has two axes in the state, `(items, share, …)` (`_particles`), and one here, `(sets, J,
…)`. Algebra on the ensemble is in float64 whatever the state: spectra of prior over posterior variance span many
decades.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from invgen.contracts import Solver
from invgen.driver import Streams, default_chunk
from invgen.noise import GaussianNoise
from invgen.problem import InverseProblem
from invgen.solvers._inner import accepted
from invgen.solvers._particles import sets, share
from invgen.solvers._target import check_target, target_of


class Runs(NamedTuple):
    """Model runs of an ensemble.

    Attributes:
        predicted: R^(−1/2) g, `(sets, J, M)`, zero where a run failed. data: R^(−1/2) d, `(sets, M)`.
        good: `(sets, J)`, True for members whose run succeeded. misfit: ½ |R^(−1/2) (d − g)|², `(sets, J)`.
    """

    predicted: Tensor
    data: Tensor
    good: Tensor
    misfit: Tensor


def check_ensemble(solver: Solver, problem: InverseProblem) -> None:
    """Raise a TypeError where there is no latent space, or no fixed Gaussian noise to whiten by."""
    check_target(solver, problem, "z", gradient=False)
    name = type(solver).__name__
    for term in problem.terms:
        if not isinstance(term.noise, GaussianNoise) or isinstance(term.noise.sigma, str):
            kind = (
                "a noise level that is unknown" if isinstance(term.noise, GaussianNoise) else type(term.noise).__name__
            )
            raise TypeError(
                f"{name} needs Gaussian noise of a known covariance, but term {term.name!r} has {kind}; state one, or use a sampler that takes any noise, such as PCN."
            )
    taken = {n for t in problem.terms for n in t.operator.theta_names}
    idle = sorted(set(problem.nuisance) - taken)
    if idle:
        raise TypeError(f"{name} found no operator that takes the nuisance parameters {idle}; leave them out.")


def members(rng: Streams, ensemble: int, solver: Solver, dim: int, dtype: torch.dtype) -> Tensor:
    """`(items, share, dim)` draws of N(0, I): an ensemble of the prior."""
    each = share(ensemble, rng)
    size = each * sets(rng)[1]
    if size < dim + 2:
        warnings.warn(
            f"{type(solver).__name__}: {size} members span at most {size - 1} of {dim} latent directions, and nothing outside their span is ever found; the spread of the samples is too small: raise ensemble to a few times {dim} where the physics allows it.",
            stacklevel=5,
        )
    return rng.normal((each, dim), dtype=dtype, tag="start")


def _covariance(problem: InverseProblem, index: int) -> object:
    term = problem.observed_terms()[index]
    return problem.remember(("R of term", index), lambda: term.noise.covariance(term.operator.data_shape))


def _whitened(problem: InverseProblem, index: int, values: Tensor) -> Tensor:
    """R^(−1/2) v, flat, real (a complex datum is two real ones of half the variance) and float64."""
    v = _covariance(problem, index).whiten(values).flatten(1)  # type: ignore[attr-defined]
    return (math.sqrt(2.0) * torch.cat([v.real, v.imag], dim=1) if v.is_complex() else v).double()


def whitened_data(problem: InverseProblem, n_sets: int) -> Tensor:
    """R^(−1/2) d of every set, `(sets, M)`."""

    def build() -> Tensor:
        parts = [_whitened(problem, i, t.data) for i, t in enumerate(problem.observed_terms())]
        items = max(len(p) for p in parts)
        flat = torch.cat([p.expand(items, -1) for p in parts], dim=1)
        return flat[:: max(items // n_sets, 1)].expand(n_sets, -1)

    return problem.remember(("whitened data", n_sets), build, shared=False)


@torch.no_grad()
def predict(problem: InverseProblem, q: Tensor) -> Tensor:
    """R^(−1/2) g(f(q)) `(n, M)` of q `(n, dim)`, in blocks; no observation enters."""
    target = target_of(problem, "z")

    def block(part: Tensor) -> Tensor:
        x, theta = target.physical(part)
        terms = problem.observed_terms()
        return torch.cat(
            [_whitened(problem, i, t.operator(x, **accepted(t, theta))) for i, t in enumerate(terms)], dim=1
        )

    # a program with several workers wants all its models at once, and they are few
    free = all(t.operator.derivative_order == 0 for t in problem.terms)
    size = len(q) if free and q.numel() < 1 << 24 else default_chunk(problem.model_shape, q.device)
    return torch.cat([block(part) for part in q.split(size)])


def run_models(
    solver: Solver, problem: InverseProblem, q: Tensor, active: Tensor, rng: Streams
) -> tuple[Runs, Tensor, Tensor]:
    """Model runs of the active sets.

    Args:
        q: `(sets, J, dim)`. active: `(sets,)`, on the host.

    Returns:
        The runs (those of sets that are not active are not made), failed runs of each set `(sets,)`, and the sets that
        are given up: more than half of their runs failed.
    """
    n_sets, J, dim = q.shape
    data = whitened_data(problem, n_sets)
    predicted = data.new_zeros(n_sets, J, data.shape[1])
    if bool(active.any()):
        predicted[active.to(q.device)] = predict(problem, q[active.to(q.device)].reshape(-1, dim)).reshape(
            -1, J, data.shape[1]
        )
    misfit = 0.5 * (data[:, None] - predicted).square().sum(-1)
    good = torch.isfinite(misfit)
    failed = (~good & active.to(q.device)[:, None]).sum(1)
    lost = 2 * failed > J
    if bool(lost.any()):
        observations = list(dict.fromkeys(o for o, _ in rng.items))
        which = [observations[i] for i in lost.nonzero().flatten().tolist()]
        warnings.warn(
            f"{type(solver).__name__} gave up observation {', '.join(map(str, which))}: {int(failed[lost][0])} of {J} model runs gave no finite misfit{_reason(problem)}; check the data and the range of the prior against what the physics can compute.",
            stacklevel=4,
        )
    predicted = torch.where(good[..., None], predicted, torch.zeros_like(predicted))
    return Runs(predicted, data, good, misfit), failed, lost


def _reason(problem: InverseProblem) -> str:
    """The last failure a black box listed."""
    for term in problem.terms:
        for module in term.operator.modules():
            listed = getattr(module, "failures", None)
            if isinstance(listed, list) and listed:
                return f" (the last of those listed: {listed[-1].reason})"
    return ""


def deviations(values: Tensor, good: Tensor, normaliser: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `(sets, k)` over good members, and deviations from it `(sets, J, k)` over √normaliser, zero for the others."""
    wide = good[..., None]
    count = good.sum(1).clamp_min(1)[:, None].to(values)
    mean = torch.where(wide, values, torch.zeros_like(values)).sum(1) / count
    spread = torch.where(wide, values - mean[:, None], torch.zeros_like(values))
    return mean, spread / normaliser.to(values).clamp_min(1).sqrt()[:, None, None]


def refill(q: Tensor, good: Tensor, rng: Streams, step: int) -> Tensor:
    """Members whose run failed become draws of N(mean, covariance) of the others.

    Args:
        q: `(sets, J, dim)`, moved already. good: `(sets, J)`. step: gives the draws streams of their own.
    """
    if bool(good.all()):
        return q
    n_sets, J, _ = q.shape
    mean, E = deviations(q, good, good.sum(1) - 1)
    each = len(rng) // n_sets
    white = rng.spawn(f"refill{step}").normal((J // each, J), dtype=q.dtype, tag="refill").reshape(n_sets, J, J)
    return torch.where(good[..., None], q, mean[:, None] + white @ E)
