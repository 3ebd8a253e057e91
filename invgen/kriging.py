r"""Kriging and conditional simulation: a Gaussian field given data, as the linear inverse problem that it is.

    d = A u + ε,  ε ~ N(0, R),  u ~ N(μ, C):        S = R + A C Aᵀ
    kriging mean      E[u | d]     = μ + C Aᵀ S⁻¹ (d − A μ)
    kriging variance  diag Cov     = diag C − diag(C Aᵀ S⁻¹ A C)
    Matheron's rule   u_c = û + C Aᵀ S⁻¹ (d + ε̂ − A û),   û ~ N(μ, C),  ε̂ ~ N(0, R):   a draw of the conditional law

(simple kriging: the mean is known). `observe` states the problem and checks the data; `solvers.RandomizeThenOptimize` is Matheron's
rule, any other solver sees the same problem, `krige` gives the two moments.

Reference: Chilès & Delfiner, Geostatistics, 2012, sections 3.3 and 7.3.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invgen.contracts import LinearOperator
from invgen.noise import GaussianNoise
from invgen.operators.points import PointSampling
from invgen.problem import InverseProblem

__all__ = ["krige", "leave_one_out", "observe"]

_ENTRIES = 1 << 27  # of the matrix A C: 1 GB in float64


def observe(
    field: Any,
    where: LinearOperator | Tensor | np.ndarray,
    values: Tensor | np.ndarray,
    *,
    sd: float | Tensor | np.ndarray,
    kind: str = "linear",
) -> InverseProblem:
    """A field given data, as an `InverseProblem`.

    Args:
        field: a prior on a `Grid`, say a `RandomField`. where: points `(n, d)` in the unit of the grid, or an operator (blocks,
            tomography, any linear data). values: `(n,)`, or the data shape of the operator, in the unit of the field.
        sd: of the errors, one number or one a datum, positive. kind: of interpolation to points, "linear" or "nearest".

    Raises:
        ValueError: values that are not finite, points outside the grid, data at one place that contradict each other (further
            apart than eight standard deviations of their errors), sd that is not positive.
    """
    d = torch.as_tensor(np.asarray(values)) if not isinstance(values, Tensor) else values
    d = d if d.is_floating_point() else d.double()
    bad = int((~torch.isfinite(d)).sum())
    if bad:
        raise ValueError(f"{bad} of {d.numel()} data are NaN or infinite; leave them and their points out.")
    spread = torch.as_tensor(sd, dtype=d.dtype).expand(d.shape)
    if not bool((spread > 0).all()):
        raise ValueError(
            "The sd of the errors must be positive; data without errors take a small one, say 1e-3 of the field's sd."
        )
    if isinstance(where, LinearOperator):
        operator = where
    else:
        if getattr(field, "grid", None) is None:
            raise ValueError(
                "Points have coordinates on a Grid, and this field has none; make it on a Grid, or give an operator."
            )
        points = np.asarray(where, dtype=np.float64)
        operator = PointSampling.at(field.grid, points, kind=kind)
        if len(points) != d.numel():
            raise ValueError(f"{len(points)} points were given for {d.numel()} data; give one value a point.")
        _check_duplicates(points, d.double().flatten().numpy(), spread.double().flatten().numpy())
    if tuple(d.shape) != tuple(operator.data_shape):
        raise ValueError(
            f"The data have the shape {tuple(d.shape)} but the operator makes {tuple(operator.data_shape)}."
        )
    noise = GaussianNoise(
        float(spread.flatten()[0]) if bool((spread == spread.flatten()[0]).all()) else spread.contiguous()
    )
    return InverseProblem(d[None], operator, noise, field)


def _check_duplicates(points: np.ndarray, values: np.ndarray, sd: np.ndarray) -> None:
    _, group, count = np.unique(points, axis=0, return_inverse=True, return_counts=True)
    group = group.reshape(-1)
    if count.max() == 1:
        return
    lowest, highest, widest = np.full(len(count), np.inf), np.full(len(count), -np.inf), np.zeros(len(count))
    np.minimum.at(lowest, group, values)
    np.maximum.at(highest, group, values)
    np.maximum.at(widest, group, sd)
    apart = (highest - lowest) > 8 * math.sqrt(2) * widest
    if apart.any():
        i = int(np.nonzero(apart)[0][0])
        first = points[np.nonzero(group == i)[0][0]]
        raise ValueError(
            f"{int(apart.sum())} place(s) have data that contradict each other, the first at {tuple(first)} with values from {lowest[i]:g} to "
            f"{highest[i]:g} and errors of sd {widest[i]:g}; average them, or state larger errors."
        )


def krige(problem: InverseProblem) -> tuple[Tensor, Tensor]:
    """Mean `(obs, *shape)` and variance `(*shape)` of the field given its data, float64, exact.

    Raises:
        ValueError: data times nodes beyond 2^27; estimate the variance from draws of `RandomizeThenOptimize` then.
        TypeError: a problem that is not linear and Gaussian.

    Cost: one product with C and one adjoint a datum, and n_data² (n_data / 3 + nodes) operations.
    """
    from invgen.solvers.exact import ExactGaussian

    mean = ExactGaussian(method="cg").mean(problem, dtype=torch.float64)
    system, prior = problem.select(range(problem.n_obs), dtype=torch.float64).linear_gaussian("u"), problem.prior
    A, C = system.operator, prior.covariance_u
    n, m = math.prod(A.model_shape), math.prod(A.data_shape)
    if n * m > _ENTRIES:
        raise ValueError(
            f"The kriging variance of {n} nodes given {m} data takes a matrix of {n * m} entries, more than {_ENTRIES}; take the variance of draws."
        )
    rows = torch.empty(m, n, dtype=torch.float64)
    step = max(1, (1 << 24) // n)
    for i in range(0, m, step):
        unit = torch.zeros(min(step, m - i), m, dtype=torch.float64)
        unit[torch.arange(len(unit)), i + torch.arange(len(unit))] = 1
        rows[i : i + step] = C.apply(A.adjoint(unit.reshape(-1, *A.data_shape))).flatten(1)
    S = A(rows.reshape(m, *A.model_shape)).flatten(1) + system.R_update.dense().to(rows)
    factor = torch.linalg.cholesky((S + S.mT) / 2)
    variance = C.diagonal().double().expand(A.model_shape).flatten().clone()
    for i in range(0, n, 1 << 15):
        half = torch.linalg.solve_triangular(factor, rows[:, i : i + (1 << 15)], upper=False)
        variance[i : i + (1 << 15)] -= half.square().sum(0)
    one = torch.ones(1, *A.model_shape, dtype=torch.float64)
    slope = (prior.transform(one) - prior.transform(0 * one))[0]
    return mean, variance.clamp_min(0).reshape(A.model_shape) * slope.square()


def leave_one_out(
    covariance: Any,
    points: Tensor | np.ndarray,
    values: Tensor | np.ndarray,
    *,
    sd: float = 0.0,
    mean: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Kriging of each datum from all others: errors d_i − E[d_i | others] and their standard deviations, `(n,)` each.

    With Q = (C + sd²)⁻¹: error_i = (Q (d − μ))_i / Q_ii and variance_i = 1 / Q_ii (Dubrule 1983); no system is solved twice.

    Args:
        covariance: a function of lags `(…, d)`, say a covariance model. points: `(n, d)`. values: `(n,)`. sd: of the errors.
        mean: μ; estimated by generalised least squares when omitted (which the standard deviations then leave out).

    Raises:
        ValueError: points that coincide without errors.

    Cost: one factorisation of n × n.
    """
    p, d = np.asarray(points, dtype=np.float64), np.asarray(values, dtype=np.float64)
    matrix = covariance(p[:, None] - p[None]) + sd**2 * np.eye(len(p))
    try:
        Q = np.linalg.inv(np.linalg.cholesky(matrix))
    except np.linalg.LinAlgError:
        raise ValueError(
            "The covariance of the data is not positive definite: points coincide; drop duplicates, or give sd."
        ) from None
    Q = Q.T @ Q
    centre = float(Q.sum(0) @ d / Q.sum()) if mean is None else mean
    variance = 1 / np.diag(Q)
    return (Q @ (d - centre)) * variance, np.sqrt(variance)
