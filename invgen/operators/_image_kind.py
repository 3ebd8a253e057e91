"""How a complex image is stated to a prior: as itself, as a real image, or as two real channels."""

from __future__ import annotations

import torch
from torch import Tensor

from invgen.contracts import LinearOperator
from invgen.grid import Grid

__all__: list[str] = []

KINDS = {"complex": 1, "real": 1, "parts": 2}


class ComplexImageOperator(LinearOperator):
    """A linear operator on a complex image of two spatial axes, stated in one of three ways.

    "complex": models `(1, n_y, n_x)`, complex (real ones are taken, too). "real": models `(1, n_y, n_x)`, real, the
    adjoint its real part. "parts": models `(2, n_y, n_x)`, real part and imaginary part, which is what real priors of
    complex images are made for. In all three the adjoint is the one under Re⟨u, v⟩.
    """

    def __init__(
        self, size: tuple[int, ...], data_shape: tuple[int, ...], kind: str, model_grid: Grid | None = None
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}.")
        super().__init__((KINDS[kind], *size), data_shape, model_grid=model_grid)
        self.kind, self.real_model = kind, kind != "complex"

    def _image(self, x: Tensor) -> Tensor:
        """`(batch, *model_shape)` as a complex `(batch, n_y, n_x)`."""
        if self.kind == "parts":
            return torch.complex(x[:, 0], x[:, 1])
        return x[:, 0] if x.is_complex() else torch.complex(x[:, 0], torch.zeros_like(x[:, 0]))

    def _model(self, image: Tensor) -> Tensor:
        """The adjoint of `_image`."""
        if self.kind == "parts":
            return torch.stack([image.real, image.imag], dim=1)
        return (image.real if self.kind == "real" else image)[:, None]


def check_size(size: tuple[int, ...], name: str) -> tuple[int, int]:
    """Two positive whole numbers."""
    size = tuple(size)
    if len(size) != 2 or any(int(n) != n or n < 1 for n in size):
        raise ValueError(f"{name} needs an image of two axes (n_y, n_x), got {size}.")
    return int(size[0]), int(size[1])


def check_complex_field(field: Tensor, size: tuple[int, int], what: str) -> Tensor:
    """`(count, n_y, n_x)`, finite, complex, in double precision."""
    field = torch.as_tensor(field)
    if field.ndim != 3 or tuple(field.shape[1:]) != size or not len(field):
        raise ValueError(f"{what} must have the shape (count, {size[0]}, {size[1]}), got {tuple(field.shape)}.")
    if not bool(torch.isfinite(field.abs()).all()):
        raise ValueError(f"{what} hold NaN or infinite entries; every entry must be finite, check how they were made.")
    return field.detach().to(torch.complex128, copy=True)
