"""The dot test at first use: a wrong adjoint gives wrong posteriors without a sign of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invgen.contracts import LinearOperator, Operator
from invgen.linalg import dot_test

if TYPE_CHECKING:
    from invgen.problem import InverseProblem

__all__: list[str] = []

# relative to |A u| |v|; rounding leaves 1e-5 of long recursions in single precision
_ALLOWED = {torch.float32: 1e-3, torch.float64: 1e-6}


@torch.no_grad()
def check_adjoints(problem: InverseProblem, dtype: torch.dtype, device: torch.device) -> None:
    """Test every linear operator of a problem once in its life.

    Args:
        dtype, device: of the run.

    Raises:
        ValueError: ⟨A u, v⟩ and ⟨u, Aᴴ v⟩ differ; names the innermost operator whose adjoint is wrong.

    Cost: one operator and one adjoint on one item, the first time a solver meets the operator.
    """
    for term in problem.terms:
        for operator in _outermost(term.operator):
            if operator.__dict__.get("_adjoint_checked"):
                continue
            error, allowed = _mismatch(operator, dtype, device)
            if error > allowed:
                _name(operator, error, allowed, dtype, device)
            operator.__dict__["_adjoint_checked"] = True


def _outermost(operator: Operator) -> list[LinearOperator]:
    if isinstance(operator, LinearOperator):
        return [operator]
    return [o for child in operator.children() if isinstance(child, Operator) for o in _outermost(child)]


def _mismatch(operator: LinearOperator, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """The dot test for a random u and v = A u/|A u| + a random unit vector, so that factors show, and what is allowed.

    0 where it is not finite. An operator that answers with single-precision numbers computes with them.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...], like: torch.dtype) -> Tensor:
        return torch.randn(1, *shape, generator=generator, dtype=like).to(device)

    u = draw(operator.model_shape, dtype)
    try:
        image = operator(u)
    except (TypeError, RuntimeError, ValueError) as refused:  # the run itself reports what the operator cannot take
        del refused
        return 0.0, math.inf
    noise = draw(operator.data_shape, image.dtype)
    v = image / image.norm().clamp_min(1e-30) + noise / noise.norm()
    error = dot_test(lambda _: image, operator.adjoint, u, v)
    real = torch.view_as_real(image) if image.is_complex() else image
    single = real.dtype != torch.float64 or torch.equal(real.float().double(), real)
    # a NaN is the business of the solvers
    return error if error == error else 0.0, _ALLOWED[torch.float32 if single else torch.float64]


def _name(operator: LinearOperator, error: float, allowed: float, dtype: torch.dtype, device: torch.device) -> None:
    for child in operator.children():
        if isinstance(child, LinearOperator):
            inner, limit = _mismatch(child, dtype, device)
            if inner > limit:
                _name(child, inner, limit, dtype, device)
    raise ValueError(
        f"The adjoint of {type(operator).__name__} is not that of its forward: the dot test is off by {error:.2g}, and rounding explains {allowed:g}; correct {type(operator).__name__}.adjoint."
    )
