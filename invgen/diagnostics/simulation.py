"""Calibration of a solver on a problem: truths from the prior, data from the noise model, posteriors in one batch."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from invgen.diagnostics._arrays import chunks
from invgen.diagnostics.battery import Calibration, check_calibration

if TYPE_CHECKING:
    from invgen.contracts import Solver
    from invgen.problem import InverseProblem

__all__ = ["calibrate"]


def calibrate(
    problem: InverseProblem,
    solver: Solver,
    n_sim: int = 500,
    num_samples: int = 100,
    *,
    thin: int = 1,
    level: float = 0.01,
    seed: int = 0,
    quantities: Mapping[str, Any] | None = None,
    **options: Any,
) -> Calibration:
    """Does this solver sample the posterior of this problem, for data that the problem itself would give?

    x_i ~ prior, d_i ~ p(d | x_i), i = 1 … n_sim; the solver draws from p(x | d_i) for all observations in one batch; the
    ranks of every coordinate, of nuisance parameters and of log p(d_i | x) (where the noise model has a density), and TARP with
    references that follow the data, are tested together (`check_calibration`).

    Args:
        problem: prior, operators and noise; its data only give shapes and dtype.
        solver: under test; it must return samples, not a point.
        n_sim: observations. num_samples: draws of each (items of `solver.solve`; a chain is one item of many draws).
        thin: keep every thin-th draw of chains, which must then be nearly independent.
        level: family-wise α. seed: of simulations, draws, ties and references.
        quantities: name -> function of (x `(n, *shape)`, data: list of `(n, *data_shape)`) -> `(n,)`, further f(x, d).
        options: for `solver.solve`, e.g. dtype=torch.float64, chunk=….

    Returns:
        `Calibration`. Observations with draws that diverged are left out, counted in `dropped` and warned about.

    Raises:
        TypeError: a point estimate. ValueError: complex models, too few draws or simulations, divergence everywhere.

    Cost: n_sim × num_samples items of the solver, and one forward item each for the likelihood.
    Weighted draws are resampled, to a quarter of their effective number (exact for many particles only).
    References: `invgen.diagnostics.calibration`.
    """
    if getattr(solver, "kind", None) == "point":
        raise TypeError(
            f"{type(solver).__name__} returns a point, which has no ranks; calibrate a solver that draws samples."
        )
    x, theta, data = problem.simulate(n_sim, seed=seed)
    simulated = problem.with_data(*data)
    # a seed of its own: the posterior's noise must not be the noise that made the truth
    other = int(np.random.SeedSequence([seed, 101]).generate_state(1)[0])
    posterior = solver.solve(simulated, num_samples, seed=other, **options)
    x, theta = x[: posterior.n_obs], {k: v[: posterior.n_obs] for k, v in theta.items()}  # fewer after Ctrl-C
    draws = posterior.samples[:, :, ::thin].flatten(1, 2)
    if draws.is_complex():
        raise ValueError("Complex models have no ranks; state the problem in real and imaginary parts.")
    unknown = {k: v[:, :, ::thin].flatten(1, 2) for k, v in posterior.theta.items()}
    weights = None if posterior.weights is None else posterior.weights[:, :, ::thin].flatten(1, 2)
    good = torch.isfinite(draws.flatten(2)).all(2).all(1)
    if weights is not None and bool((weights[good].amax(1) > weights[good].amin(1) * (1 + 1e-6)).any()):
        index = _resampled(weights, seed)
        draws = torch.take_along_dim(draws, index.reshape(*index.shape, *(1,) * (draws.ndim - 2)), 1)
        unknown = {k: torch.take_along_dim(v, index, 1) for k, v in unknown.items()}
        good = torch.isfinite(draws.flatten(2)).all(2).all(1)
    dropped = int((~good).sum())
    if dropped:
        warnings.warn(
            f"{dropped} of {len(x)} simulations have draws that diverged and are left out of the calibration.",
            stacklevel=2,
        )
    kept = torch.nonzero(good)[:, 0].tolist()
    if not kept:
        raise ValueError(
            f"Every one of the {len(x)} simulations has draws that diverged; make the solver stable before it is calibrated."
        )
    subset = simulated.select(kept)
    truth, draws = x[good], draws[good]
    theta, unknown = {k: v[good] for k, v in theta.items()}, {k: v[good] for k, v in unknown.items()}
    own = {name: (theta[name], unknown[name]) for name in unknown}
    for name, function in (quantities or {}).items():
        own[name] = _of_data(function, subset, truth, draws)
    known = all(getattr(t.noise, "has_density", True) for t in problem.terms)
    result = check_calibration(
        truth,
        draws,
        log_likelihood=_log_likelihoods(subset, truth, draws, theta, unknown) if known else None,
        data=np.concatenate([_flat(t.data) for t in subset.terms], axis=1),
        quantities=own,
        level=level,
        seed=seed,
    )
    return replace(result, dropped=dropped)


def _flat(data: Tensor) -> np.ndarray:
    """Real numbers `(n_obs, n_data)`."""
    d = torch.view_as_real(data.resolve_conj()) if data.is_complex() else data
    return d.reshape(len(d), -1).double().cpu().numpy()


def _resampled(weights: Tensor, seed: int) -> Tensor:
    """Indices `(n_obs, fewer draws)` drawn by weight: unweighted draws of weighted ones, in the limit of many particles.

    Particles chosen twice make draws dependent, so that only a quarter of the effective sample size is drawn.
    """
    w = weights.double()
    effective = w.sum(1).square() / w.square().sum(1).clamp_min(1e-300)
    count = int(effective.quantile(0.05)) // 4
    if count < 9:
        warnings.warn(
            f"The weights of 5 % of the observations leave fewer than {float(effective.quantile(0.05)):.0f} effective draws; the ranks are not to be trusted, take more samples.",
            stacklevel=3,
        )
    rng = np.random.default_rng([seed, 11])
    u = torch.from_numpy(rng.random((len(w), min(max(count, 9), w.shape[1])))).to(w.device)
    cumulative = w.cumsum(1)
    return torch.searchsorted(cumulative, u * cumulative[:, -1:]).clamp_max(w.shape[1] - 1)


def _log_likelihoods(
    problem: InverseProblem, truth: Tensor, draws: Tensor, theta: dict[str, Tensor], unknown: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """log p(d_i | x_i) `(n_obs,)` and log p(d_i | x_il) `(n_obs, draws)`, the same arithmetic for both."""
    every = torch.cat([truth[:, None].to(draws), draws], dim=1)
    n_obs, count = every.shape[:2]
    flat = every.flatten(0, 1)
    joint = {k: torch.cat([theta[k][:, None].to(v), v], dim=1).flatten() for k, v in unknown.items()}
    out = flat.new_empty(len(flat), dtype=flat.dtype)
    width = flat[0].numel() + sum(t.data[0].numel() for t in problem.terms)
    with torch.no_grad():
        for rows in chunks(len(flat), 4 * width):
            items = problem.select([i // count for i in range(rows.start, rows.stop)], dtype=flat.dtype)
            out[rows] = items.log_likelihood(flat[rows], **{k: v[rows] for k, v in joint.items()})
    both = out.reshape(n_obs, count)
    return both[:, 0], both[:, 1:]


def _of_data(function: Any, problem: InverseProblem, truth: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    count = draws.shape[1]
    data = [t.data for t in problem.terms]
    repeated = [d.repeat_interleave(count, 0) for d in data]
    return function(truth, data), function(draws.flatten(0, 1), repeated).reshape(len(draws), count)
