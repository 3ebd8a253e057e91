"""New laws from Gaussians and mixtures: affine maps, sums of independent variables, products of densities.

    A x + b ~ Σ_k w_k N(A m_k + b, A C_k Aᵀ)          x + y ~ Σ_jk w_j v_k N(m_j + n_k, C_j + D_k)
    p q / ∫ p q = Σ_jk s_jk N(μ_jk, (C_j⁻¹ + D_k⁻¹)⁻¹),      s_jk ∝ w_j v_k N(m_j − n_k; 0, C_j + D_k)

A Gaussian is the mixture of one. Everything is in x: priors with an affine transform are restated there first, others
have no closed form and raise.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from invgen.contracts import LinearOperator
from invgen.covariance import Covariance, Dense, Diagonal, Scalar, Stationary
from invgen.grid import Grid, check_same_grid
from invgen.priors._closed_form import closest_dense, congruence
from invgen.priors.gaussian import GaussianPrior
from invgen.priors.mixture import GaussianMixturePrior

__all__ = ["affine", "product"]

Closed = GaussianPrior | GaussianMixturePrior


def _parts(prior: Closed) -> tuple[Tensor, Tensor, list[Covariance]]:
    """Log weights `(K,)`, means `(K, *shape)` and covariances of the law of x."""
    law = prior.in_x()
    if isinstance(law, GaussianPrior):
        return torch.zeros(1, dtype=torch.float64), law.mean_u[None], [law.covariance_u]
    return law.log_weights, law.means, law.covariances


def _build(log_weights: Tensor, means: Tensor, covariances: list[Covariance], grid: Grid | None) -> Closed:
    if len(covariances) == 1:
        return GaussianPrior(means[0], covariances[0], grid=grid)
    # a weight that underflows would be refused: such a component is never drawn
    weights = log_weights.softmax(0).clamp_min(1e-300)
    return GaussianMixturePrior(weights, means, covariances, grid=grid)


def _matrix(covariance: Covariance, what: str) -> Tensor:
    dense = closest_dense(covariance, what)
    return (dense.matrix * dense.factor).double()


def affine(prior: Closed, scale: float | Tensor | LinearOperator, shift: float | Tensor = 0.0) -> Closed:
    """The law of A x + b.

    Args:
        prior: Gaussian or mixture, affine transform.
        scale: A: a number, a tensor of the item's shape (entry by entry), an `(m, n)` matrix over the flattened item,
            or a linear operator. Numbers and entry-by-entry factors keep the grid and the structure of the covariance.
        shift: b: a number or a tensor of the new item's shape.

    Returns:
        A prior of the same family, x its coordinates; on `(m,)`, or the operator's data shape, for a matrix.

    Raises:
        ValueError: shapes that do not fit, or A C Aᵀ without an inverse (more rows than columns).
    """
    log_weights, means, covariances = _parts(prior)
    shape = prior.shape
    if isinstance(scale, LinearOperator):
        if scale.model_shape != shape:
            raise ValueError(f"The operator acts on models {scale.model_shape} but the prior has {shape}.")
        matrix, out = scale.to_dense(), tuple(scale.data_shape)
    else:
        factor = torch.as_tensor(scale, dtype=torch.float64)
        if factor.ndim == 0 or tuple(factor.shape) == shape:
            if not bool((factor != 0).all()):
                raise ValueError("A factor of zero leaves no density; give non-zero factors.")
            factor = factor.expand(shape)
            moved = [congruence(c, factor) for c in covariances]
            return _build(log_weights, factor * means + torch.as_tensor(shift, dtype=torch.float64), moved, prior.grid)
        if factor.ndim != 2 or factor.shape[1] != prior.dim:
            raise ValueError(
                f"A has the shape {tuple(factor.shape)}; give a number, a tensor of the shape {shape} or a matrix with {prior.dim} columns."
            )
        matrix, out = factor, (factor.shape[0],)
    if matrix.shape[0] > matrix.shape[1]:
        raise ValueError(
            f"A maps {matrix.shape[1]} entries to {matrix.shape[0]}: the law has no density; use at most as many rows as columns."
        )
    means = (means.flatten(1) @ matrix.mT).reshape(-1, *out) + torch.as_tensor(shift, dtype=torch.float64)
    mapped: list[Covariance] = []
    for c in covariances:
        full = matrix @ _matrix(c, "An affine map") @ matrix.mT
        mapped.append(Dense((full + full.mT) / 2, out))
    return _build(log_weights, means, mapped, None)


def add(first: Any, second: Any) -> Any:
    """The law of x + y, independent; a number or a tensor of the item's shape shifts the law."""
    if isinstance(second, (int, float, Tensor)):
        return affine(first, 1.0, second)
    if not isinstance(second, (GaussianPrior, GaussianMixturePrior)):
        return NotImplemented
    _check(first, second, "A sum")
    a, b = _parts(first), _parts(second)
    log_weights = (a[0][:, None] + b[0]).flatten()
    means = (a[1][:, None] + b[1]).flatten(0, 1)
    covariances = [_plus(c, d) for c in a[2] for d in b[2]]
    return _build(log_weights, means, covariances, first.grid if first.grid is not None else second.grid)


def _check(first: Closed, second: Closed, what: str) -> None:
    if first.shape != second.shape:
        raise ValueError(f"{what} needs priors of one shape, got {first.shape} and {second.shape}.")
    check_same_grid(first.grid, second.grid, "The first prior", "the second")


def _plus(first: Covariance, second: Covariance) -> Covariance:
    try:
        return first.plus(second)
    except TypeError:  # structures without a common one
        matrix = _matrix(first, "A sum") + _matrix(second, "A sum")
        return Dense(matrix, first.shape)


def product(first: Closed, second: Closed) -> Closed:
    """The law with density ∝ p(x) q(x): two sources of knowledge about one unknown.

    Args:
        first, second: Gaussians or mixtures of one shape, affine transforms.

    Returns:
        A Gaussian, or a mixture of K₁ K₂ components. Diagonal pairs stay diagonal, stationary ones on one periodic grid
        (with a constant variance as well) stationary; others are dense, O(n³) a pair.
    """
    _check(first, second, "A product")
    a, b = _parts(first), _parts(second)
    log_weights, means, covariances = [], [], []
    for la, ma, ca in zip(*a, strict=True):
        for lb, mb, cb in zip(*b, strict=True):
            overlap = _plus(ca, cb)
            apart = (mb - ma)[None].double()
            if isinstance(overlap, Stationary) and not overlap.periodic:
                overlap = closest_dense(overlap, "A product")
            quadratic = overlap.whiten(apart).square().sum()
            log_weights.append(la + lb - 0.5 * (quadratic + overlap.logdet() + ma.numel() * math.log(2 * math.pi)))
            means.append(ma + ca.apply(overlap.solve(apart))[0])
            covariances.append(_harmonic(ca, cb, overlap))
    return _build(
        torch.stack(log_weights), torch.stack(means), covariances, first.grid if first.grid is not None else second.grid
    )


def _harmonic(first: Covariance, second: Covariance, total: Covariance) -> Covariance:
    """(C⁻¹ + D⁻¹)⁻¹ = C (C + D)⁻¹ D."""
    if isinstance(total, (Scalar, Diagonal)):
        variance = first.diagonal().double() * second.diagonal() / total.diagonal()
        return Scalar(variance, total.shape) if variance.ndim == 0 else Diagonal(variance, total.shape)
    if isinstance(total, Stationary) and total.periodic:
        spectra = [c.spectrum if isinstance(c, Stationary) else c.diagonal() for c in (first, second)]
        return Stationary(spectra[0] * spectra[1] / total.spectrum, total.shape)
    c, d = _matrix(first, "A product"), _matrix(second, "A product")
    matrix = c @ torch.linalg.solve(_matrix(total, "A product"), d)
    return Dense((matrix + matrix.mT) / 2, total.shape)
