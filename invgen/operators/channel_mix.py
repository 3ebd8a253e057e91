r"""Linear maps between channels: y_c = Σ_d M_cd x_d at every point, and the terms of a time-lapse pair made of them.

A pair of surveys, baseline b and monitor m, is described by x = (b, δ), δ = m − b, because what is known beforehand about
a reservoir is known about b (geology) and about δ (small, local), and they are independent: p(b, δ) = p(b) p(δ)
(`invgen.priors.ProductPrior`). Each survey sees a mix,

    d_1 = A_1 [1 0] x + n_1,        d_2 = A_2 [1 1] x + n_2,

two terms of one problem. Two inversions on their own would leave the noise of both in their difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from invgen.contracts import LinearOperator, Operator
from invgen.grid import Grid
from invgen.operators.algebra import compose
from invgen.problem import Term

__all__ = ["ChannelMix", "time_lapse_terms"]


class ChannelMix(LinearOperator):
    """y = M x along the channel axis, `(channels in, *spatial)` to `(channels out, *spatial)`.

    Args:
        matrix: `(channels out, channels in)`, real.
        spatial: shape of the spatial axes, or a `Grid` of the model.

    Raises:
        ValueError: not a finite real matrix, or one whose columns are not the channels of the grid.

    Cost: channels in × channels out multiply-adds a point.
    """

    matrix: Tensor

    def __init__(self, matrix: Tensor | Sequence[Sequence[float]], spatial: tuple[int, ...] | Grid) -> None:
        M = torch.as_tensor(matrix, dtype=torch.float64)
        if M.ndim != 2 or not bool(torch.isfinite(M).all()):
            raise ValueError(f"Channels are mixed by a finite matrix (out, in), got the shape {tuple(M.shape)}.")
        grid = spatial if isinstance(spatial, Grid) else None
        shape = tuple(spatial.shape if isinstance(spatial, Grid) else spatial)
        if grid is not None and len(grid.channels) != M.shape[1]:
            raise ValueError(f"The matrix has {M.shape[1]} columns but the grid the channels {grid.channels}.")
        super().__init__((M.shape[1], *shape), (M.shape[0], *shape), model_grid=grid)
        self.register_buffer("matrix", M)

    @classmethod
    def examples(cls) -> list[Any]:
        """The monitor of (baseline, difference), and a mix of three channels into two."""
        return [cls([[1.0, 1.0]], (3, 2)), cls([[1.0, 0.0, -2.0], [0.5, 1.0, 0.0]], (4,))]

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        return torch.einsum("cd,bd...->bc...", self.matrix.to(x), x)

    def adjoint(self, d: Tensor) -> Tensor:
        return torch.einsum("cd,bc...->bd...", self.matrix.to(d), d)


def time_lapse_terms(baseline: Term, monitor: Term, *, grid: Grid | None = None) -> list[Term]:
    """The two surveys as terms on x = (baseline, difference), fields of 2 c channels.

    Args:
        baseline, monitor: terms on one survey's model `(c, *spatial)` each, with operators, noise and data of their own.
        grid: of x, with 2 c channels, where grids are to be checked.

    Returns:
        `[baseline, monitor]` with the operators A_1 [1 0] and A_2 [1 1], for `InverseProblem(terms=…, prior=…)`.

    Raises:
        ValueError: operators on models of different shapes (resample one survey first).
    """
    shape = tuple(baseline.operator.model_shape)
    if shape != tuple(monitor.operator.model_shape):
        raise ValueError(
            f"The baseline's operator acts on models {shape} and the monitor's on {tuple(monitor.operator.model_shape)}; give both surveys one model grid."
        )
    eye = torch.eye(shape[0], dtype=torch.float64)
    where: tuple[int, ...] | Grid = shape[1:] if grid is None else grid

    def seen(term: Term, share: float, name: str) -> Term:
        operator: Operator = compose(term.operator, ChannelMix(torch.cat([eye, share * eye], dim=1), where))
        return Term(term.data, operator, term.noise, term.mask, name if term.name == "data" else term.name)

    return [seen(baseline, 0.0, "baseline"), seen(monitor, 1.0, "monitor")]
