"""Operators made of operators: products, sums, multiples, adjoints, stacks, and affine maps.

Products know the structure they keep: a linear operator after an affine transform is an `AffineOperator`, a multiple
passes its factor on to the structured solve underneath, a stack of separable operators solves by blocks.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from invgen import transforms
from invgen.contracts import LinearOperator, Operator
from invgen.covariance import BlockDiagonal, Covariance, Kronecker, as_covariance
from invgen.linalg import Solved, cg

__all__ = [
    "Adjoint",
    "AffineOperator",
    "Composition",
    "LinearComposition",
    "Multiply",
    "Scaled",
    "Stack",
    "Sum",
    "compose",
    "stack",
]


def compose(outer: Operator, inner: Operator) -> Operator:
    """outer ∘ inner, as the simplest operator that it is: transform, linear, affine or general.

    Raises:
        ValueError: the shapes or grids do not chain.
    """
    if isinstance(outer, transforms.Transform) and isinstance(inner, transforms.Transform):
        return transforms.Chain(outer, inner)
    if isinstance(inner, transforms.Identity):
        return outer
    if isinstance(outer, transforms.Identity):
        return inner
    if isinstance(inner, transforms.Transform) and inner.affine and isinstance(outer, (LinearOperator, AffineOperator)):
        return _after_affine(outer, inner)
    if isinstance(outer, AffineOperator) and isinstance(inner, (LinearOperator, AffineOperator)):
        offset = outer.offset + _offset(outer.linear, inner)
        return AffineOperator(_linear(outer, inner), offset, general=Composition(outer, inner))
    if isinstance(outer, LinearOperator) and isinstance(inner, AffineOperator):
        linear = LinearComposition(outer, inner.linear)
        return AffineOperator(linear, outer(inner.offset), general=Composition(outer, inner))
    if isinstance(outer, LinearOperator) and isinstance(inner, LinearOperator):
        return LinearComposition(outer, inner)
    return Composition(outer, inner)


def _linear(outer: AffineOperator, inner: LinearOperator | AffineOperator) -> LinearOperator:
    return LinearComposition(outer.linear, inner.linear if isinstance(inner, AffineOperator) else inner)


def _offset(outer: LinearOperator, inner: LinearOperator | AffineOperator) -> Tensor | float:
    return outer(inner.offset) if isinstance(inner, AffineOperator) else 0.0


def _after_affine(outer: LinearOperator | AffineOperator, inner: transforms.Transform) -> AffineOperator:
    """A(shift + scale·u) + b = (A·scale) u + (A shift + b): the offset moves, the structure of A stays."""
    linear, base = (outer.linear, outer.offset) if isinstance(outer, AffineOperator) else (outer, 0.0)
    centre = inner(torch.zeros(1, *outer.model_shape, dtype=torch.float64))
    scaled: LinearOperator
    if isinstance(inner, transforms.Affine) and inner.scale.numel() == 1:
        scaled = Scaled(linear, float(inner.scale))
    elif isinstance(inner, transforms.Affine) and inner.scale.ndim == 1:
        scaled = linear.scaled_by_channel(inner.scale)
    else:
        scale = (inner(torch.ones(1, *outer.model_shape, dtype=torch.float64)) - centre)[0]
        scaled = LinearComposition(linear, Multiply(scale))
    return AffineOperator(scaled, linear(centre) + base, general=Composition(outer, inner))


def stack(*parts: LinearOperator) -> LinearOperator:
    """All parts applied to one model, their data concatenated flat: `(batch, n_1 + n_2 + …)`."""
    return parts[0] if len(parts) == 1 else Stack(*parts)


def _check_chain(outer: Operator, inner: Operator) -> None:
    if inner.data_shape != outer.model_shape:
        raise ValueError(
            f"{type(outer).__name__} takes {outer.model_shape} but {type(inner).__name__} gives {inner.data_shape}; the product needs equal shapes."
        )


def _separable() -> LinearOperator:
    """A small operator for examples, (1, 4, 3) -> (1, 2, 3)."""
    from invgen.operators.separable import SeparableOperator

    return SeparableOperator(torch.tensor([[1.0, -1.0, 0.5, 0.0], [0.0, 2.0, 1.0, -1.0]]), width=3)


def _taken(operator: Operator, theta: dict[str, Tensor]) -> dict[str, Tensor]:
    """The nuisance parameters this operator declares."""
    return {k: v for k, v in theta.items() if k in operator.theta_names}


class Composition(Operator):
    """g = outer ∘ inner for operators that need not be linear; nuisance parameters go to whoever declares them."""

    def __init__(self, outer: Operator, inner: Operator) -> None:
        free_outer = isinstance(outer, transforms.Transform) and outer.any_shape
        free_inner = isinstance(inner, transforms.Transform) and inner.any_shape
        if not free_outer and not free_inner:
            _check_chain(outer, inner)
        model = outer.model_shape if free_inner else inner.model_shape
        super().__init__(
            model,
            inner.data_shape if free_outer else outer.data_shape,
            model_grid=outer.model_grid if free_inner else inner.model_grid,
        )
        self.outer, self.inner = outer, inner
        self.theta_names = (*outer.theta_names, *inner.theta_names)  # type: ignore[misc]
        self.derivative_order = min(outer.derivative_order, inner.derivative_order)  # type: ignore[misc]
        self.vmappable = outer.vmappable and inner.vmappable  # type: ignore[misc]

    @classmethod
    def examples(cls) -> list[Any]:
        return [
            cls(Multiply(torch.tensor([1.0, -2.0, 0.5])), transforms.Exp()),
            cls(transforms.Exp(), Multiply(torch.ones(2, 2))),
        ]

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        return self.outer(self.inner(x, **_taken(self.inner, theta)), **_taken(self.outer, theta))


class _Derived(LinearOperator):
    """A linear operator that takes its derivative order, vmap support and nuisance parameters from its parts."""

    def _inherit(self, *parts: Operator) -> None:
        self.derivative_order = min(p.derivative_order for p in parts)  # type: ignore[misc]
        self.vmappable = all(p.vmappable for p in parts)  # type: ignore[misc]
        self.theta_names = tuple(dict.fromkeys(n for p in parts for n in p.theta_names))  # type: ignore[misc]


class LinearComposition(_Derived):
    """A B."""

    def __init__(self, outer: LinearOperator, inner: LinearOperator) -> None:
        _check_chain(outer, inner)
        super().__init__(inner.model_shape, outer.data_shape, model_grid=inner.model_grid)
        self.outer, self.inner = outer, inner
        self._inherit(outer, inner)

    @classmethod
    def examples(cls) -> list[Any]:
        return [cls(Multiply(torch.arange(1.0, 7.0).reshape(1, 2, 3)), _separable())]

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        return self.outer(self.inner(x, **_taken(self.inner, theta)), **_taken(self.outer, theta))

    def adjoint(self, d: Tensor) -> Tensor:
        return self.inner.adjoint(self.outer.adjoint(d))


class Adjoint(_Derived):
    """Aᴴ as an operator."""

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(operator.data_shape, operator.model_shape)
        self.operator = operator
        self._inherit(operator)
        self.theta_names = ()  # type: ignore[misc]  # adjoints take no nuisance parameters

    @classmethod
    def examples(cls) -> list[Any]:
        return [cls(_separable())]

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        return self.operator.adjoint(x)

    def adjoint(self, d: Tensor) -> Tensor:
        return self.operator(d)

    @property
    def H(self) -> LinearOperator:
        return self.operator

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = self.operator.svd()
        return vh.mH, s, u.mH


class Sum(_Derived):
    """A + B on one model."""

    def __init__(self, first: LinearOperator, second: LinearOperator) -> None:
        if (first.model_shape, first.data_shape) != (second.model_shape, second.data_shape):
            raise ValueError(
                f"A sum needs equal shapes, got {first.model_shape} -> {first.data_shape} and {second.model_shape} -> {second.data_shape}."
            )
        super().__init__(first.model_shape, first.data_shape, model_grid=first.model_grid or second.model_grid)
        self.first, self.second = first, second
        self._inherit(first, second)

    @classmethod
    def examples(cls) -> list[Any]:
        return [cls(_separable(), _separable() * -3.0)]

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        return self.first(x, **_taken(self.first, theta)) + self.second(x, **_taken(self.second, theta))

    def adjoint(self, d: Tensor) -> Tensor:
        return self.first.adjoint(d) + self.second.adjoint(d)


class Scaled(_Derived):
    """c · A with a real number c; solves pass c on."""

    def __init__(self, operator: LinearOperator, factor: float) -> None:
        super().__init__(operator.model_shape, operator.data_shape, model_grid=operator.model_grid)
        self.operator, self.factor = operator, float(factor)
        self._inherit(operator)

    @classmethod
    def examples(cls) -> list[Any]:
        return [cls(_separable(), -2.0)]

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        return self.factor * self.operator(x, **theta)

    def adjoint(self, d: Tensor) -> Tensor:
        return self.factor * self.operator.adjoint(d)

    def solve(self, rhs: Tensor, R: Any, C: Any, **options: Any) -> Solved:
        """(R + c² A C Aᴴ)⁻¹ rhs: A's own solve with c² C."""
        return self.operator.solve(
            rhs, R, as_covariance(C, self.model_shape, batched=True).scaled(self.factor**2), **options
        )

    def solve_model(self, rhs: Tensor, R: Any, C: Any, **options: Any) -> Solved:
        """(c² Aᴴ R⁻¹ A + C⁻¹)⁻¹ rhs: A's own solve with c² C, divided by c²."""
        inner = self.operator.solve_model(
            rhs, R, as_covariance(C, self.model_shape, batched=True).scaled(self.factor**2), **options
        )
        return inner._replace(x=inner.x / self.factor**2)

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = self.operator.svd()
        return u * (1.0 if self.factor >= 0 else -1.0), s * abs(self.factor), vh


class Multiply(LinearOperator):
    """Elementwise product with a fixed real field: diag(w).

    Args:
        weights: `shape` of the model and the data.
    """

    weights: Tensor

    def __init__(self, weights: Tensor) -> None:
        super().__init__(tuple(weights.shape), tuple(weights.shape))
        self.register_buffer("weights", weights)

    @classmethod
    def examples(cls) -> list[Any]:
        return [cls(torch.tensor([[1.0, -2.0, 0.5]]))]

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        return x * self.weights.to(device=x.device, dtype=x.real.dtype)

    def adjoint(self, d: Tensor) -> Tensor:
        return d * self.weights.to(device=d.device, dtype=d.real.dtype)


class AffineOperator(Operator):
    """x -> A x + b.

    Args:
        linear: A. offset: b, `(1, *data_shape)` or `data_shape`.
        general: the same map with nuisance parameters, used when some are given (b may depend on them).
    """

    offset: Tensor

    def __init__(self, linear: LinearOperator, offset: Tensor, *, general: Operator | None = None) -> None:
        super().__init__(linear.model_shape, linear.data_shape, model_grid=linear.model_grid)
        self.linear = linear
        self.register_buffer("offset", offset.reshape(1, *linear.data_shape))
        self.derivative_order, self.vmappable = linear.derivative_order, linear.vmappable  # type: ignore[misc]
        self.general = general if general is not None and general.theta_names else None
        self.theta_names = self.general.theta_names if self.general is not None else linear.theta_names  # type: ignore[misc]

    @classmethod
    def examples(cls) -> list[Any]:
        return [cls(_separable(), torch.arange(6.0)), compose(_separable(), transforms.Affine(1.0, 2.0))]

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        if theta and self.general is not None:
            return self.general(x, **theta)
        d = self.linear(x, **theta)
        return d + self.offset.to(d)


class Stack(_Derived):
    """[A_1; A_2; …] on one model, data flat and concatenated."""

    def __init__(self, *parts: LinearOperator) -> None:
        if len({p.model_shape for p in parts}) != 1:
            raise ValueError(f"A stack needs operators on one model shape, got {[p.model_shape for p in parts]}.")
        self.sizes = [math.prod(p.data_shape) for p in parts]
        super().__init__(
            parts[0].model_shape,
            (sum(self.sizes),),
            model_grid=next((p.model_grid for p in parts if p.model_grid), None),
        )
        self.parts = nn.ModuleList(parts)
        self._inherit(*parts)
        self._cache: dict[Any, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}}

    def _parts(self) -> list[LinearOperator]:
        return [cast(LinearOperator, p) for p in self.parts]

    @classmethod
    def examples(cls) -> list[Any]:
        return [cls(_separable(), Multiply(torch.arange(1.0, 13.0).reshape(1, 4, 3)))]

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        return torch.cat([p(x, **_taken(p, theta)).flatten(1) for p in self._parts()], dim=1)

    def adjoint(self, d: Tensor) -> Tensor:
        total: Tensor | None = None
        for part, piece in zip(self._parts(), d.split(self.sizes, dim=1), strict=True):
            back = part.adjoint(piece.reshape(-1, *part.data_shape))
            total = back if total is None else total + back
        assert total is not None
        return total

    def solve(self, rhs: Tensor, R: Any, C: Any, **options: Any) -> Solved:
        """(R + A C Aᴴ)⁻¹ rhs through the smaller model space, R⁻¹ − R⁻¹ A (Aᴴ R⁻¹ A + C⁻¹)⁻¹ Aᴴ R⁻¹, when blocks allow.

        That difference cancels: it is taken in float64 whatever rhs is, and its residual is that in model space.
        """
        R, C = as_covariance(R, self.data_shape, batched=True), as_covariance(C, self.model_shape, batched=True)
        if self._blocks(R, C) is None:
            return super().solve(rhs, R, C, **options)
        weighted = R.solve(rhs.to(torch.complex128 if rhs.is_complex() else torch.float64))
        options = {k: v for k, v in options.items() if k != "start"}
        inner = self.solve_model(self.adjoint(weighted), R, C, **options)
        x = weighted - R.solve(self(inner.x))
        return inner._replace(x=x.to(rhs.dtype), residual=inner.residual.to(rhs.real.dtype))

    def solve_model(self, rhs: Tensor, R: Any, C: Any, **options: Any) -> Solved:
        """(Aᴴ R⁻¹ A + C⁻¹)⁻¹ rhs; a stack of separable operators with scalar noise is solved by blocks."""
        R, C = as_covariance(R, self.data_shape, batched=True), as_covariance(C, self.model_shape, batched=True)
        blocks = self._blocks(R, C)
        if blocks is None:
            return super().solve_model(rhs, R, C, **options)
        options.setdefault("rtol", 1e-10 if rhs.dtype == torch.float64 else 1e-5)
        first = blocks.solve(rhs, C.diagonal())
        if blocks.exact:
            return Solved.direct(first)
        return cg(
            lambda v: self.adjoint(R.solve(self(v))) + C.solve(v),
            rhs,
            preconditioner=lambda v: blocks.solve(v, C.diagonal()),
            start=options.pop("start", first),
            check_every=1,
            **options,
        )

    def _blocks(self, R: Covariance, C: Covariance) -> Any:
        from invgen.operators._column_blocks import ColumnBlocks
        from invgen.operators.separable import SeparableBlocks

        if not isinstance(R, BlockDiagonal):
            return None
        if any(isinstance(block, Kronecker) for block in R.blocks):
            return ColumnBlocks.build(self._parts(), R, C, self.model_shape, self._cache)
        return SeparableBlocks.build(self._parts(), R, C, self._cache)
