"""A linear-Gaussian problem in the singular components of its whitened operator, with what its evidence needs."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from invgen.problem import InverseProblem
from invgen.solvers._linearised import over_reals
from invgen.solvers.spectral import _factors, _whitened

__all__: list[str] = []


class Measured(NamedTuple):
    """Whitened data d' = U S Vᴴ u + N(0, I), read as ȳ = Vᴴ u + N(0, diag(1/s²)).

    Attributes:
        basis: Vᴴ, `(r, n_model)`, orthonormal rows. noise: 1/s, `(r,)`. data: ȳ, `(items, r)`.
        outside: |d' − U Uᵀ d'|², `(items,)` float64: what no model explains.
    """

    basis: Tensor
    noise: Tensor
    data: Tensor
    outside: Tensor


def measured(solver: object, problem: InverseProblem, like: Tensor) -> Measured:
    """The components of a chunk, in the dtype and on the device of `like`.

    Raises:
        TypeError: an operator without SVD that is too large to be built.
    """

    def build() -> Measured:
        left, noise, basis = (f.to(like.device) for f in factors(solver, problem))
        system = problem.linear_gaussian("u")
        white = _whitened(system, system.data).double()
        along = white @ left
        outside = (white.square().sum(1) - along.square().sum(1)).clamp_min(0)
        return Measured(basis.to(like), noise.to(like), (along * noise).to(like), outside)

    return problem.remember(("measured", like.dtype, like.device), build, shared=False)


def factors(solver: object, problem: InverseProblem) -> tuple[Tensor, Tensor, Tensor]:
    """U `(n, r)`, 1/s `(r,)`, Vᴴ `(r, n_model)` of the whitened operator, float64, computed once a run."""
    return _factors(solver, problem)  # type: ignore[arg-type]


def log_constant(problem: InverseProblem) -> float:
    """−½ (log det R + n_data log 2π) over the reals, the constant of log p(d | x)."""

    def build() -> float:
        system = problem.linear_gaussian("u")
        n = over_reals(system.data[:1]).numel()
        log_det = float(system.R_update.logdet()) * (2 if system.data.is_complex() else 1)
        return -0.5 * (log_det + n * math.log(2 * math.pi))

    return problem.remember("log constant", build)


def log_determinant(solver: object, problem: InverseProblem, variance: float) -> float | None:
    """log det(I + variance · A' A'ᵀ) of the whitened operator; None where its SVD is out of reach."""
    try:
        _, noise, _ = factors(solver, problem)
    except TypeError:
        return None
    return float(torch.log1p(variance / noise.square()).sum())
