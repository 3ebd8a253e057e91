r"""The Gauss–Newton curvature of the misfit at a batch of positions q, without a matrix.

With d = g(f(q)) + N(0, R) the misfit ½|R^(-1/2)(d − g(f(q)))|² has the Gauss–Newton Hessian

    H(q) = Jᵀ J,        J = ∂/∂q R^(-1/2) g(f(q)),

which is also the Fisher information of the data about q. Where R depends on q (an unknown noise level) the information
of log R joins it: for independent data with variances v_i(q) it is ½ Σ_i ∇log v_i ∇log v_iᵀ (Kay, Fundamentals of
Statistical Signal Processing: Estimation Theory, 1993, equation 3.31), here further rows of J. J v is the
vector–Jacobian product of a vector–Jacobian product: it needs right second derivatives and no forward mode.

A position is q = (z, z_theta): the flattened latent of the prior and one standard-normal number a nuisance parameter,
theta = decode(z_theta).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from invgen.covariance import Covariance, Scalar
from invgen.noise import GaussianNoise
from invgen.problem import InverseProblem
from invgen.solvers._inner import Theta, accepted
from invgen.solvers._target import Target

Map = Callable[[Tensor], Tensor]
Physical = Callable[[Tensor], tuple[Tensor, Theta]]


def latent_position(problem: InverseProblem) -> Physical:
    """q `(batch, n)` -> x = f(z) `(batch, *shape)` and theta, name -> `(batch,)`, with a graph."""
    return Target(problem, "z")._physical


def check_curvature(problem: InverseProblem, name: str) -> None:
    """Raise a TypeError where the Gauss–Newton curvature is not defined or cannot be computed."""
    for term in problem.terms:
        if not isinstance(term.noise, GaussianNoise):
            raise TypeError(
                f"{name} needs Gaussian noise, whose whitened residuals it linearises, but term {term.name!r} has {type(term.noise).__name__}; use MAP(optimizer='lbfgs') or a sampler."
            )
        if term.operator.derivative_order < 2:
            raise TypeError(
                f"{name} differentiates the gradient of every operator once more (J v), and {type(term.operator).__name__} declares derivative_order {term.operator.derivative_order}; use MAP(optimizer='lbfgs'), or a derivative-free solver for a black box."
            )


def has_curvature(problem: InverseProblem) -> bool:
    """True where `check_curvature` is content."""
    return all(isinstance(t.noise, GaussianNoise) and t.operator.derivative_order >= 2 for t in problem.terms)


def over_reals(v: Tensor) -> Tensor:
    """Whitened data, flat and real: a complex datum of variance σ² is two real ones of variance σ²/2."""
    v = v.flatten(1)
    return math.sqrt(2.0) * torch.cat([v.real, v.imag], dim=1) if v.is_complex() else v


def term_covariance(problem: InverseProblem, index: int, theta: Theta) -> Covariance:
    """R of an observed term: factorised once a run where it does not depend on theta."""
    term = problem.observed_terms()[index]
    if isinstance(term.noise.sigma, str):
        R: Covariance = term.noise.covariance(term.operator.data_shape, **theta)
        return R
    return problem.remember(("R of term", index), lambda: term.noise.covariance(term.operator.data_shape))


def observed_part(problem: InverseProblem, index: int, v: Tensor, smooth: Map | None) -> Tensor:
    """Filter data, or a prediction of the whole term, and keep what was measured, flattened where there is a mask."""
    mask = problem.terms[index].mask
    if mask is not None:
        mask = mask.to(v.device)
        v = torch.where(mask, v, torch.zeros((), dtype=v.dtype, device=v.device))
    v = v if smooth is None else smooth(v)
    return v if mask is None else v[:, mask]


def features(
    problem: InverseProblem, x: Tensor, theta: Theta, smooth: Map | None = None, weight: Tensor | None = None
) -> Tensor:
    """What J differentiates, `(batch, m)`: whitened predictions of all terms, and rows for an unknown noise level.

    Args:
        x: `(batch, *shape)`. theta: nuisance parameters. smooth: a linear filter on data, item by item.
        weight: `(batch,)`, by which the misfit is multiplied.
    """
    fixed = {k: v.detach() for k, v in theta.items()}
    rows = []
    for i, term in enumerate(problem.terms):
        prediction = observed_part(problem, i, term.operator(x, **accepted(term, theta)), smooth)
        rows.append(over_reals(term_covariance(problem, i, fixed).whiten(prediction)))
        if isinstance(term.noise.sigma, str):
            R = term_covariance(problem, i, theta)
            # log v carries the information 1/2 of a real datum and 1 of a complex one
            share = 1.0 if prediction.is_complex() else 0.5
            if isinstance(R, Scalar):
                rows.append(math.sqrt(share * math.prod(R.shape)) * R.variance.log()[:, None].to(x))
            else:
                rows.append(math.sqrt(share) * R.diagonal().log().flatten(1).to(x))
    joined = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
    return joined if weight is None else joined * weight.sqrt()[:, None]


@dataclass(frozen=True)
class Curvature:
    """J at the positions q `(batch, n)`: `push` v -> J v `(batch, m)`, `pull` w -> Jᵀ w `(batch, n)`."""

    push: Map
    pull: Map

    def product(self, v: Tensor) -> Tensor:
        """H v = Jᵀ J v."""
        return self.pull(self.push(v))


def curvature(
    problem: InverseProblem,
    physical: Physical,
    q: Tensor,
    smooth: Map | None = None,
    weight: Tensor | None = None,
) -> Curvature:
    """Linearise at q `(batch, n)`; the other arguments as in `features`.

    Cost: a forward and a backward now; two backwards a push, one a pull. Holds the graph of both until dropped.
    """
    with torch.enable_grad():
        point = q.detach().requires_grad_(True)
        phi = features(problem, *physical(point), smooth, weight)
        slot = torch.zeros_like(phi, requires_grad=True)
        # Jᵀ w as a function of w: linear, so that its own vector–Jacobian product at any w is J
        (pulled,) = torch.autograd.grad(phi, point, slot, create_graph=True)

    def push(v: Tensor) -> Tensor:
        return torch.autograd.grad(pulled, slot, v, retain_graph=True)[0]

    def pull(w: Tensor) -> Tensor:
        return torch.autograd.grad(phi, point, w, retain_graph=True)[0]

    return Curvature(push, pull)
