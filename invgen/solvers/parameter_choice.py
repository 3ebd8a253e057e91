r"""The weight of a regulariser from the data: discrepancy principle, SURE, generalised cross-validation, L-curve.

With r(w) = W(d − A x̂_w) the whitened residual of the minimiser at weight w, n the number of data and
dof(w) = tr ∂(W A x̂_w)/∂(W d) its degrees of freedom,

    discrepancy   the largest w with |r|² ≤ n                              (Morozov 1966)
    residual      the largest w with |r|² ≤ n − dof, what the residuals of the truth's fit have (Hall & Titterington 1987)
    SURE          min |r|² − n + 2 dof, unbiased for |W A (x̂ − x)|²       (Stein 1981; Eldar 2009)
    GCV           min n |r|²/(n − dof)²                                    (Golub, Heath & Wahba 1979)
    L-curve       the corner of (ln |r|², ln R(x̂)), its largest curvature  (Hansen 1992)

dof is a Monte-Carlo estimate, bᵀ (W A x̂(d + ε W⁻¹ b) − W A x̂(d))/ε with b ~ N(0, I) (Ramani, Blu & Unser 2008), which needs no
derivative of the solver. The level of the noise has to be right for the first three; the others take it up to a factor. The
discrepancy principle smooths too much by construction, since a fit takes dof from the residuals; "residual" does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from invgen.contracts import Solver
from invgen.linalg import inner
from invgen.noise import GaussianNoise

if TYPE_CHECKING:
    from invgen.problem import InverseProblem

__all__ = ["WeightChoice", "choose_weight"]

RULES = ("discrepancy", "residual", "sure", "gcv", "l_curve")


class WeightChoice(NamedTuple):
    """What `choose_weight` found.

    Attributes:
        weight: `(n_obs,)` chosen, each of `weights`. x: `(n_obs, *shape)` the minimisers at them.
        weights: `(k,)` tried, rising. score: `(n_obs, k)` of the rule (|r|²/n, (|r|² + dof)/n, SURE/n, GCV, curvature).
        chi2: `(n_obs, k)` |r|²/n. dof: `(n_obs, k)`, NaN where the rule does not need it.
        at_edge: `(n_obs,)` True where the choice is the first or the last weight: the grid may be too short.
    """

    weight: Tensor
    x: Tensor
    weights: Tensor
    score: Tensor
    chi2: Tensor
    dof: Tensor
    at_edge: Tensor


def choose_weight(
    problem: InverseProblem,
    solver: Solver,
    weights: Sequence[float],
    rule: str = "sure",
    *,
    epsilon: float = 0.1,
    seed: int = 0,
    **options: Any,
) -> WeightChoice:
    """The weight of the problem's regulariser, observation by observation, by a rule that needs no truth.

    Args:
        problem: linear terms with Gaussian noise and a regulariser (a prior with `reweighted`).
        solver: finds the minimiser at one weight (`PrimalDual()`, say), to more accuracy than the rule asks for.
        weights: to try, positive; steps of a factor of two or less.
        rule: "discrepancy", "residual", "sure", "gcv" or "l_curve".
        epsilon: ε of the perturbation, in standard deviations of the noise. seed: of b.
        options: go to `solver.solve`; float64 unless `dtype` says otherwise.

    Returns:
        `WeightChoice`.

    Raises:
        TypeError: a prior without a weight, non-linear terms or other noise, complex data.
        ValueError: an unknown rule, fewer than two weights (four for the L-curve), weights that are not positive.

    Cost: one solve a weight, two for "residual", "sure" and "gcv". All observations are solved together.
    """
    if rule not in RULES:
        raise ValueError(f"choose_weight takes rule from {RULES}, got {rule!r}.")
    tried = torch.tensor(sorted(float(w) for w in weights), dtype=torch.float64)
    if len(tried) < (4 if rule == "l_curve" else 2) or not bool((tried > 0).all() & torch.isfinite(tried).all()):
        raise ValueError(
            f"choose_weight needs positive, finite weights, at least two (four for the L-curve), got {list(weights)}."
        )
    prior = problem.prior
    if not hasattr(prior, "reweighted"):
        raise TypeError(f"choose_weight needs a regulariser with a weight, {type(prior).__name__} has none.")
    if not problem.is_linear_gaussian or any(t.data.is_complex() for t in problem.terms):
        raise TypeError("choose_weight needs linear operators with real data and Gaussian noise.")
    options = {"dtype": torch.float64, **options}
    plain = _with(problem, prior, None, 0.0)
    probes = None
    if rule in ("residual", "sure", "gcv"):
        probes = [
            torch.randn(problem.n_obs, *t.operator.data_shape, dtype=torch.float64, generator=_generator(seed, i)).to(
                t.data.device
            )
            for i, t in enumerate(plain.terms)
        ]
    models, square, sizes, dof = [], [], [], []
    for w in tried.tolist():
        now = prior.reweighted(w)
        x = solver.solve(_with(problem, now, None, 0.0), **options).samples[:, 0, 0].double()
        seen = _whitened(plain, x)
        models.append(x)
        square.append(torch.stack([inner(r, r) for r in _residuals(plain, seen)]).sum(0))
        sizes.append(now.value(x))
        if probes is None:
            dof.append(torch.full_like(square[-1], math.nan))
            continue
        moved = solver.solve(_with(problem, now, probes, epsilon), **options).samples[:, 0, 0].double()
        change = _whitened(plain, moved)
        gain = [inner(b, c - s) for b, c, s in zip(probes, change, seen, strict=True)]
        dof.append(torch.stack(gain).sum(0) / epsilon)
    n = sum(math.prod(t.operator.data_shape) for t in plain.terms)
    chi2, free = torch.stack(square, 1) / n, torch.stack(dof, 1)
    score, pick = _scored(rule, chi2, free / n, torch.stack(sizes, 1), tried)
    rows = torch.arange(len(pick))
    return WeightChoice(
        tried[pick],
        torch.stack(models, 1)[rows, pick],
        tried,
        score,
        chi2,
        free,
        (pick == 0) | (pick == len(tried) - 1),
    )


def _scored(rule: str, chi2: Tensor, dof: Tensor, size: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Scores `(n_obs, k)` and the index chosen; dof in units of n."""
    if rule == "discrepancy":  # the misfit rises with the weight: the last one that is not too large, or the first
        return chi2, ((chi2 <= 1).sum(1) - 1).clamp_min(0)
    if rule == "residual":
        score = chi2 + dof
        return score, ((score <= 1).sum(1) - 1).clamp_min(0)
    if rule == "sure":
        score = chi2 - 1 + 2 * dof
        return score, score.argmin(1)
    if rule == "gcv":
        score = chi2 / (1 - dof).clamp_min(1e-6).square()
        return score, score.argmin(1)
    tiny = torch.finfo(chi2.dtype).tiny
    t, a, b = weights.log(), chi2.clamp_min(tiny).log(), size.clamp_min(tiny).log()
    da, db = (torch.gradient(v, spacing=(t,), dim=1)[0] for v in (a, b))
    dda, ddb = (torch.gradient(v, spacing=(t,), dim=1)[0] for v in (da, db))
    score = (da * ddb - dda * db) / (da.square() + db.square()).clamp_min(tiny).pow(1.5)
    inside = score[:, 1:-1]  # one-sided differences at the ends invent corners
    return score, 1 + inside.argmax(1)


def _with(problem: InverseProblem, prior: Any, probes: list[Tensor] | None, epsilon: float) -> InverseProblem:
    """The problem of what was measured, with this prior and data moved by ε W⁻¹ b."""
    from invgen.problem import InverseProblem as Problem
    from invgen.problem import Term

    terms = []
    for i, t in enumerate(problem.observed_terms()):
        data = t.data
        if probes is not None:
            b = probes[i]
            data = data.double().expand_as(b) + epsilon * t.noise.covariance(t.operator.data_shape).sqrt(b)
        terms.append(Term(data, t.operator, t.noise, None, t.name))
    return Problem(terms=terms, prior=prior)


def _whitened(problem: InverseProblem, x: Tensor) -> list[Tensor]:
    """W A x of every term."""
    return [_white(t, t.operator(x)) for t in problem.terms]


def _residuals(problem: InverseProblem, seen: list[Tensor]) -> list[Tensor]:
    return [_white(t, t.data.double()) - s for t, s in zip(problem.terms, seen, strict=True)]


def _white(term: Any, values: Tensor) -> Tensor:
    noise: GaussianNoise = term.noise
    return noise.covariance(term.operator.data_shape).whiten(values)


def _generator(seed: int, term: int) -> torch.Generator:
    return torch.Generator().manual_seed(1_000_003 * term + seed)
