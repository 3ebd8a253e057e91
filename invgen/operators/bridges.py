"""PyLops both ways.

`from_pylops` turns a PyLops operator into a differentiable one. The backward pass is the adjoint *as an operator that
is differentiable itself*, so second derivatives are right; forward-mode derivatives, `torch.func.vmap` and pickling
work; the precision of the result is that of the input. `to_pylops` is the way back.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from invgen.contracts import LinearOperator, Operator

if TYPE_CHECKING:
    import pylops

__all__ = ["PyLopsOperator", "from_pylops", "to_pylops"]


class _Apply(torch.autograd.Function):
    """x -> A x (or Aᴴ x), whose derivative in either mode is the other one of the two, by the same class."""

    @staticmethod
    def forward(x: Tensor, bridge: PyLopsOperator, adjoint: bool, real: bool) -> Tensor:
        return bridge._numpy(x, adjoint, real)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.bridge, ctx.adjoint, ctx.real = inputs
        ctx.complex_input = x.is_complex()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        # the gradient by a real x is real, whatever the operator: Re(Aᴴ g)
        return _Apply.apply(grad, ctx.bridge, not ctx.adjoint, not ctx.complex_input), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:  # type: ignore[override]
        return _Apply.apply(tangent, ctx.bridge, ctx.adjoint, ctx.real)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], x: Tensor, bridge: PyLopsOperator, adjoint: bool, real: bool
    ) -> tuple[Tensor, int]:
        # leading axes are free, so that the mapped one is just one more
        return _Apply.apply(x.movedim(in_dims[0], 0), bridge, adjoint, real), 0


class PyLopsOperator(LinearOperator):
    """A PyLops operator acting on tensors, made by `from_pylops`.

    Args:
        op: the PyLops operator.
        model_shape: shape of one model; `op.dims` when omitted.
        data_shape: shape of one data set; `op.dimsd` when omitted.

    Models are `(*leading, *model_shape)` with any leading axes, none included. float32, float64 and their complex
    partners are computed in their own precision (an operator that works in one precision inside stays with it),
    float16 and bfloat16 in float32. Data are complex where the operator makes them so. Computed on the CPU.

    Raises:
        ValueError: shapes that do not hold the operator's columns and rows.

    Cost: one `op.matmat` (or `rmatmat`) for all items together, twice for complex items through a real operator.
    """

    def __init__(
        self,
        op: pylops.LinearOperator,
        model_shape: tuple[int, ...] | None = None,
        data_shape: tuple[int, ...] | None = None,
    ) -> None:
        if not all(hasattr(op, name) for name in ("dims", "dimsd", "shape", "matvec")):
            raise TypeError(
                f"from_pylops takes a pylops.LinearOperator, got {type(op).__name__}; a matrix goes into MatrixOperator."
            )
        model_shape = tuple(int(n) for n in (model_shape if model_shape is not None else op.dims))
        data_shape = tuple(int(n) for n in (data_shape if data_shape is not None else op.dimsd))
        if (math.prod(data_shape), math.prod(model_shape)) != tuple(op.shape):
            raise ValueError(
                f"The PyLops operator is {tuple(op.shape)} but models {model_shape} and data {data_shape} were given; their sizes must be its columns and rows."
            )
        super().__init__(model_shape, data_shape)
        self.op = op

    @classmethod
    def examples(cls) -> list[Any]:
        import pylops

        g = np.random.default_rng(4)
        mixed = g.standard_normal((4, 3)) + 1j * g.standard_normal((4, 3))
        return [
            cls(pylops.FirstDerivative((4, 3), axis=0), model_shape=(1, 4, 3)),
            cls(pylops.MatrixMult(g.standard_normal((5, 6)))),
            cls(pylops.MatrixMult(mixed, dtype="complex128")),
        ]

    def _items(self, value: Tensor, shape: tuple[int, ...], what: str) -> int:
        """Any number of leading axes: how many items they hold."""
        if not isinstance(value, Tensor):
            raise TypeError(f"{what} must be a torch tensor, got {type(value).__name__}; use torch.as_tensor.")
        if tuple(value.shape[value.ndim - len(shape) :]) != shape or value.ndim < len(shape):
            raise ValueError(
                f"{what} must have the shape (*leading, {', '.join(map(str, shape))}), got {tuple(value.shape)}."
            )
        return math.prod(value.shape[: value.ndim - len(shape)])

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        return _Apply.apply(x, self, False, False)

    def adjoint(self, d: Tensor) -> Tensor:
        return _Apply.apply(d, self, True, False)

    def _numpy(self, x: Tensor, adjoint: bool, real: bool) -> Tensor:
        """Apply to a plain tensor; `real` keeps the real part."""
        if not (x.is_floating_point() or x.is_complex()):
            raise TypeError(
                f"{type(self).__name__} needs floating-point or complex input, got {x.dtype}; use x.to(torch.float32)."
            )
        shape_in, shape_out = (self.data_shape, self.model_shape) if adjoint else (self.model_shape, self.data_shape)
        leading = x.shape[: x.ndim - len(shape_in)]
        wide = torch.promote_types(x.dtype, torch.float32)
        columns = (
            x.detach()
            .to(device="cpu", dtype=wide)
            .resolve_conj()
            .resolve_neg()
            .reshape(-1, math.prod(shape_in))
            .numpy()
            .T
        )
        times = self.op.rmatmat if adjoint else self.op.matmat
        if columns.shape[1] == 0:
            out = np.zeros((math.prod(shape_out), 0), dtype=columns.dtype)
        elif np.iscomplexobj(columns) and not np.issubdtype(np.dtype(self.op.dtype), np.complexfloating):
            # many real PyLops operators drop imaginary parts
            out = times(np.ascontiguousarray(columns.real)) + 1j * times(np.ascontiguousarray(columns.imag))
        else:
            out = times(columns)
        result = torch.from_numpy(np.ascontiguousarray(out.T)).reshape(*leading, *shape_out)
        if real and result.is_complex():
            result = result.real
        real_dtype = x.real.dtype if x.is_complex() else x.dtype
        if result.is_complex():
            dtype = torch.complex128 if real_dtype == torch.float64 else torch.complex64
        else:
            dtype = real_dtype
        return result.to(dtype=dtype, device=x.device).contiguous()


def from_pylops(
    op: pylops.LinearOperator, model_shape: tuple[int, ...] | None = None, data_shape: tuple[int, ...] | None = None
) -> PyLopsOperator:
    """A PyLops operator as an invgen one.

    Args:
        op: any `pylops.LinearOperator`.
        model_shape: shape of one model, e.g. `(1, nz, nx)` for `op.dims == (nz, nx)`; `op.dims` when omitted.
        data_shape: shape of one data set; `op.dimsd` when omitted.

    Returns:
        `PyLopsOperator`: right first and second derivatives, `torch.func.vmap` and forward mode, the dtype of the
        input, any leading axes, picklable where `op` is.
    """
    return PyLopsOperator(op, model_shape, data_shape)


def to_pylops(operator: Operator, dtype: Any = None) -> pylops.LinearOperator:
    """Any linear operator as a `pylops.LinearOperator` with `dims = model_shape` and `dimsd = data_shape`.

    Args:
        operator: a `LinearOperator`.
        dtype: numpy dtype it announces; float64, or complex128 where the data are complex, when omitted.

    Raises:
        TypeError: an operator that is not linear.
    """
    if not isinstance(operator, LinearOperator):
        raise TypeError(
            f"to_pylops needs a LinearOperator, got {type(operator).__name__}; move the offset of an affine operator into the data."
        )
    from invgen.operators._pylops import PyLopsView

    if dtype is None:
        with torch.no_grad():
            complex_data = operator(torch.zeros(1, *operator.model_shape, dtype=torch.float64)).is_complex()
        dtype = np.complex128 if complex_data else np.float64
    return PyLopsView(operator, np.dtype(dtype))
