r"""Expected coverage: how often credible sets hold the truth, against how often they promise to.

Central intervals between order statistics: with L draws and rank r, the truth lies between the k-th smallest and the
k-th largest draw when k ≤ r ≤ L − k, with probability exactly (L + 1 − 2k)/(L + 1) for a correct posterior. That is the
uniformity of the folded rank |2r − L|, and no quantile has to be interpolated (a 5-95 % interval of n perfect draws
covers less than 90 %: 72 % at n = 8).

Highest-density sets: the credibility of the truth is #{l: q(θ_l | d) > q(θ | d)}/L (Hermans et al. 2022, section 2).

TARP: credibility from distances to a reference point θ_r(d), #{l: |θ_l − θ_r| < |θ − θ_r|}/L (Lemos et al. 2023).
Their theorem needs all references that depend on the data: with references that ignore d, draws from the prior pass.
Here θ_r(d) is a linear regression of θ on d, fitted on the other simulations, plus noise of the size of its error.

References: Hermans et al., A crisis in simulation-based inference?, TMLR 2022, arXiv:2110.06581; Lemos, Coogan, Hezaveh
& Perreault-Levasseur, Sampling-based accuracy testing of posterior estimators, ICML 2023, arXiv:2302.03026.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invgen.diagnostics._arrays import Array, chunks, pair, random_tensor, tensor
from invgen.diagnostics.rank_tests import RankTest, _ranks, rank_test, ranks

__all__ = ["expected_coverage", "hpd_coverage", "regression_references", "tarp"]


def expected_coverage(
    truth: Array,
    samples: Array,
    *,
    names: Sequence[str] | None = None,
    level: float = 0.01,
    family: int | None = None,
    seed: int = 0,
) -> RankTest:
    """Coverage of the central credible intervals of every coordinate, at all levels at once.

    Args:
        truth: θ, `(n_sim, *shape)`. samples: `(n_sim, draws, *shape)`, independent draws.
        names: of the coordinates. level: family-wise α. family: p-values that share it. seed: of ties.

    Returns:
        `RankTest`: `observed` coverage `(m, K)` at the nominal `levels` `(K,)`, exact for finite draws; `coverage(0.9)`;
        `plot(kind="coverage")`. A bias and a wrong spread both show; the sign of a bias does not.

    Raises:
        ValueError: shapes that do not fit, NaN.
    """
    r = ranks(truth, samples, seed=seed)
    draws = np.shape(samples)[1]
    return rank_test(
        np.abs(2 * r - draws), draws, names=names, level=level, family=family, title="Central intervals", folded=True
    )


def hpd_coverage(
    truth_log_prob: Array, sample_log_prob: Array, *, level: float = 0.01, family: int | None = None, seed: int = 0
) -> RankTest:
    """Coverage of the highest-density sets of a posterior with a density.

    The truth lies in the set of credibility c when less than a fraction c of the draws has a higher density.

    Args:
        truth_log_prob: log q(θ_i | d_i), `(n_sim,)`. sample_log_prob: log q(θ_il | d_i), `(n_sim, draws)`; any constant
            that depends on d_i alone may be missing from both.
        level: α. family: p-values that share it. seed: of ties.

    Raises:
        ValueError: shapes that do not fit, NaN.
    """
    t, s = pair(truth_log_prob, sample_log_prob, infinite=True)
    if t.ndim != 1:
        raise ValueError(f"Log-densities of the truth have the shape (n_sim,), got {tuple(t.shape)}.")
    r = _ranks(-t, -s, np.random.default_rng(seed))
    return rank_test(r, s.shape[1], names=["density"], level=level, family=family, title="Highest-density sets")


def tarp(
    truth: Array,
    samples: Array,
    *,
    data: Array | None = None,
    references: Array | None = None,
    level: float = 0.01,
    family: int | None = None,
    seed: int = 0,
) -> RankTest:
    """Tests of accuracy with random points: coverage of balls around reference points, in all coordinates jointly.

    Coordinates are z-scored by mean and sd of truths and draws together (a choice that does not tell them apart, so
    that the test stays exact). The fraction of draws nearer to the reference than the truth is a rank, uniform when the
    posterior is correct.

    Args:
        truth: θ, `(n_sim, *shape)`. samples: `(n_sim, draws, *shape)`, independent draws.
        data: d, `(n_sim, *data_shape)`: references come from `regression_references`.
        references: θ_r, `(n_sim, *shape)`, instead: any function of d_i and of independent noise.
        level: α. family: p-values that share it. seed: of references and ties.

    Returns:
        `RankTest` of one quantity; `levels` and `observed[0]` are the credibility level and the expected coverage
        probability of the paper.

    Raises:
        ValueError: shapes that do not fit, NaN, both `data` and `references`.

    With neither `data` nor `references`, θ_r is uniform in the box of the z-scored truths, as in the paper's experiments
    without data: such references are blind to a posterior that is the prior. A bias shows in second order only: pair
    it with `sbc`.
    """
    t, s = pair(truth, samples)
    if data is not None and references is not None:
        raise ValueError("TARP takes its references from data or as they are given; pass one of the two.")
    t, centre, scale = t.double().flatten(1), *_pooled(t, s)
    z = (t - centre) / scale
    if references is not None:
        given = tensor(references, "The references")
        if given.reshape(len(given), -1).shape != t.shape:
            raise ValueError(
                f"The references have the shape {tuple(given.shape)}, the truths {tuple(np.shape(truth))}."
            )
        r = (given.to(t.device).double().flatten(1) - centre) / scale
    elif data is not None:
        r = _regression(z, tensor(_real(data), "The data").to(t.device), seed)
    else:
        span = torch.from_numpy(np.random.default_rng([seed, 7]).random(tuple(z.shape))).to(z)
        r = z.amin(0) + span * (z.amax(0) - z.amin(0))
    nearer = torch.empty(s.shape[:2], dtype=torch.float64, device=s.device)
    for rows in chunks(len(s), s[0].numel()):
        draws = (s[rows].double().flatten(2) - centre) / scale
        nearer[rows] = (draws - r[rows, None]).square().sum(2)
    found = _ranks((z - r).square().sum(1), nearer, np.random.default_rng(seed))
    return rank_test(found, s.shape[1], names=["distance to reference"], level=level, family=family, title="TARP")


def regression_references(truth: Array, data: Array, *, seed: int = 0, folds: int = 5) -> np.ndarray:
    """Reference points that follow the data: cross-fitted ridge regression of θ on d, plus noise of its error.

    θ_r(d_i) = θ̂(d_i) + s ε, ε ~ N(0, 1) a coordinate, where θ̂ and the residual sd s come from the folds without i:
    given d_i, the reference knows nothing of θ_i.

    Args:
        truth: θ, `(n_sim, *shape)`. data: d, `(n_sim, *data_shape)`, complex allowed. seed: of ε and of the folds.
        folds: parts of the cross-fitting.

    Returns:
        `(n_sim, *shape)`.

    Cost: one singular value decomposition of (data, or simulations if fewer) a fold.
    """
    t = tensor(truth, "The true values")
    flat = t.double().flatten(1)
    centre, scale = flat.mean(0), flat.std(0).clamp_min(1e-300)
    d = tensor(_real(data), "The data").to(t.device)
    r = _regression((flat - centre) / scale, d, seed, folds) * scale + centre
    return r.reshape(t.shape).cpu().numpy()


def _real(d: Any) -> Any:
    """Complex data as pairs of real ones."""
    if isinstance(d, Tensor) and d.is_complex():
        return torch.view_as_real(d.resolve_conj())
    return np.stack([d.real, d.imag], -1) if isinstance(d, np.ndarray) and np.iscomplexobj(d) else d


def _pooled(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sd `(dim,)` over truths and draws together."""
    flat = t.double().flatten(1)
    first, n = flat.sum(0), len(t) * (s.shape[1] + 1)
    for rows in chunks(len(s), s[0].numel()):
        first = first + s[rows].double().flatten(2).sum((0, 1))
    mean = first / n
    second = (flat - mean).square().sum(0)
    for rows in chunks(len(s), s[0].numel()):
        second = second + (s[rows].double().flatten(2) - mean).square().sum((0, 1))
    sd = (second / n).sqrt()
    return mean, torch.where(sd > 0, sd, torch.ones_like(sd))


def _regression(z: Tensor, data: Tensor, seed: int, folds: int = 5) -> Tensor:
    """Cross-fitted ridge predictions of z `(n, dim)` plus noise; the penalty by leave-one-out error in the fold."""
    n = len(z)
    if len(data) != n or n < 2 * folds:
        raise ValueError(
            f"The data hold {len(data)} simulations and the true values {n}; give the same number, at least {2 * folds}."
        )
    d = data.double().flatten(1)
    part = torch.from_numpy(np.random.default_rng([seed, 3]).permutation(n) % folds).to(z.device)
    out = torch.empty_like(z)
    noise = random_tensor([seed, 5], tuple(z.shape), z)
    for k in range(folds):
        held, fit = part == k, part != k
        d_mean, d_sd = d[fit].mean(0), d[fit].std(0)
        d_sd = torch.where(d_sd > 0, d_sd, torch.ones_like(d_sd))
        z_mean = z[fit].mean(0)
        U, S, Vh = torch.linalg.svd((d[fit] - d_mean) / d_sd, full_matrices=False)
        target = z[fit] - z_mean
        seen = U.mT @ target
        best = None
        for penalty in np.geomspace(1e-6, 1e2, 9) * float(S[0].square()):
            shrink = S.square() / (S.square() + penalty)
            left = 1 - 1 / len(target) - U.square() @ shrink  # leave-one-out residual = residual / (1 − leverage)
            residual = (target - U @ (shrink[:, None] * seen)) / left.clamp_min(1e-6)[:, None]
            error = float(residual.square().mean())
            if best is None or error < best[0]:
                best = (error, penalty, residual.square().mean(0).sqrt())
        assert best is not None
        weights = Vh.mT @ ((S / (S.square() + best[1]))[:, None] * seen)
        out[held] = ((d[held] - d_mean) / d_sd) @ weights + z_mean + best[2] * noise[held]
    return out
