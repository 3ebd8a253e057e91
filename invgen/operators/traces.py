r"""Which traces were recorded: irregular and dead traces.

A section on a regular grid `(channels, …, nx)` is seen by traces at the positions p_i, in samples of its last axis,

    d[…, i] = Σ_j X_ij m[…, j],        X_ij = δ(p_i − j)                                   "index"
                                              max(0, 1 − |p_i − j|)                         "linear"
                                              sinc(p_i − j) = sin π(p_i − j) / (π(p_i − j)) "sinc"

the operators `pylops.Restriction` and `pylops.signalprocessing.Interp`. Sinc is the exact interpolation of a band-limited
section only on an endless grid: near the ends it takes the traces beyond for zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from invgen.contracts import LinearOperator
from invgen.covariance import Scalar, as_covariance
from invgen.grid import Grid
from invgen.linalg import Solved
from invgen.operators._casts import Casts

__all__ = ["TraceSampling", "dead_traces"]


def dead_traces(data: Tensor | np.ndarray, *, floor: float = 1e-6) -> Tensor:
    """Which traces hold nothing: a NaN or infinity, one value throughout, or hardly any energy.

    A trace is dead where its range of values is at most `floor` times the median range of the traces that are finite.

    Args:
        data: `(…, nt, nx)`, traces along the last axis, time along the one before; leading axes are looked at together.
        floor: the share of the median range below which a trace is taken for dead.

    Returns:
        bool `(nx,)`, True where dead; `int(dead.sum())` counts them. `TraceSampling(…, dead=dead)` leaves them out.
    """
    d = torch.as_tensor(data).detach()
    if d.ndim < 2:
        raise ValueError(f"Traces are (…, nt, nx), got a tensor of shape {tuple(d.shape)}; add the axis of the traces.")
    d = d.flatten(0, -2).to(torch.float64)
    finite = torch.isfinite(d).all(0)
    d = torch.where(finite, d, torch.zeros_like(d))  # without a range, like a flat trace
    reach = d.amax(0) - d.amin(0)
    usual = reach[finite].median() if bool(finite.any()) else reach.new_zeros(())
    return reach <= floor * usual


class TraceSampling(LinearOperator):
    """Traces at given positions of a regular section: restriction, linear or sinc interpolation along the last axis.

        d = m Xᵀ,  (r + c A Aᴴ)⁻¹ d = d P diag(1 / (r + c b)) Pᵀ,  X Xᵀ = P diag(b) Pᵀ

    Args:
        shape: `(channels, *spatial)` of the section; traces along the last axis.
        positions: `(n,)` places of the traces in samples (0 is the first), any order. A trace recorded twice is given
            twice.
        kind: "index" for whole numbers (`pylops.Restriction`), "linear" or "sinc" (`pylops.signalprocessing.Interp`).
        dead: bool `(n,)`, True for traces that were recorded but hold nothing; `live(recorded)` picks the others.
        model_grid: grid of the model.

    Data are `(channels, …, n_live)`. The numbers of `Interp` with positions inside the grid; linear interpolation at the
    very last sample is that sample (PyLops moves it by one part in 10^16 and warns).

    Raises:
        ValueError: positions outside the grid (extrapolation), not whole numbers for "index", a mask of another length,
            no trace left.

    Cost: a copy ("index"), or n nx multiply-adds a row. `solve` and `solve_model` are direct for scalar R and C.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        positions: Tensor | np.ndarray | list[float],
        *,
        kind: str = "linear",
        dead: Tensor | np.ndarray | None = None,
        model_grid: Grid | None = None,
    ) -> None:
        p = torch.as_tensor(positions, dtype=torch.float64).detach().cpu()
        nx = shape[-1]
        if kind not in ("index", "linear", "sinc"):
            raise ValueError(f'kind must be "index", "linear" or "sinc", got {kind!r}.')
        if len(shape) < 2:
            raise ValueError(f"TraceSampling needs a section (channels, …, nx), got {tuple(shape)}; write (1, …, nx).")
        if p.ndim != 1 or not len(p) or not bool(torch.isfinite(p).all()):
            raise ValueError(f"Positions are a vector (n,) of finite numbers, got a tensor of shape {tuple(p.shape)}.")
        if float(p.min()) < 0 or float(p.max()) > nx - 1:
            raise ValueError(
                f"The traces lie at {float(p.min()):g} to {float(p.max()):g} samples but the section has 0 to {nx - 1}; "
                "give positions in samples, (x − origin) / spacing, or a wider section."
            )
        if kind == "index" and not bool((p == p.round()).all()):
            raise ValueError('kind="index" needs whole numbers; positions between the samples take "linear" or "sinc".')
        gone = torch.zeros(len(p), dtype=torch.bool) if dead is None else torch.as_tensor(dead).cpu()
        if gone.dtype != torch.bool or tuple(gone.shape) != tuple(p.shape):
            raise ValueError(
                f"The mask of dead traces is boolean with the shape {tuple(p.shape)} of the positions, got {gone.dtype} {tuple(gone.shape)}."
            )
        if bool(gone.all()):
            raise ValueError(f"All {len(p)} traces are marked dead, nothing is left to invert; check the mask.")
        super().__init__(tuple(shape), (*shape[:-1], int((~gone).sum())), model_grid=model_grid)
        self.kind = kind
        self.register_buffer("positions", p[~gone])
        self.register_buffer("kept", torch.nonzero(~gone).flatten())
        self.n_recorded = len(p)
        self._casts = Casts()

    positions: Tensor
    kept: Tensor

    @classmethod
    def examples(cls) -> list[Any]:
        dead = torch.tensor([False, True, False])
        return [
            cls((1, 3, 6), [4, 0, 1], kind="index", dead=dead),
            cls((1, 3, 5), [0.3, 3.0, 2.25, 4.0], kind="linear"),
            cls((2, 5), [0.3, 1.6, 2.25], kind="sinc"),
        ]

    @classmethod
    def at(cls, grid: Grid, x: Tensor | np.ndarray | list[float], **options: Any) -> TraceSampling:
        """Traces at the coordinates x, in the unit of the grid's last axis; options as of the class."""
        places = (np.asarray(x, dtype=np.float64) - grid.origin[-1]) / grid.spacing[-1]
        return cls(grid.field_shape, places, model_grid=grid, **options)

    def live(self, recorded: Tensor) -> Tensor:
        """The traces of `(…, n)` recorded ones that are not dead, `(…, n_live)`: what to give as data."""
        if recorded.shape[-1] != self.n_recorded:
            raise ValueError(
                f"{self.n_recorded} traces were recorded, got {recorded.shape[-1]} along the last axis; give all of them, the dead ones too."
            )
        return recorded[..., self.kept.to(recorded.device)]

    def matrix(self) -> Tensor:
        """X, `(n_live, nx)` float64."""
        away = self.positions[:, None] - torch.arange(
            self.model_shape[-1], dtype=torch.float64, device=self.positions.device
        )
        return torch.sinc(away) if self.kind == "sinc" else (1 - away.abs()).clamp_min(0)

    def _X(self, like: Tensor) -> Tensor:
        return self._casts("X", like, self.matrix)

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        if self.kind == "index":
            return x[..., self._index(x)]
        return torch.matmul(x, self._X(x).mT)

    def adjoint(self, d: Tensor) -> Tensor:
        if self.kind == "index":
            return d.new_zeros(*d.shape[:-1], self.model_shape[-1]).index_add(-1, self._index(d), d)
        return torch.matmul(d, self._X(d))

    def _index(self, like: Tensor) -> Tensor:
        return self._casts.once(f"index {like.device}", lambda: self.positions.round().long().to(like.device))  # type: ignore[no-any-return]

    def solve(self, rhs: Tensor, R: Any, C: Any, **options: Any) -> Solved:
        """(R + A C Aᴴ)⁻¹ rhs: direct for scalar R and C (also one value an item), otherwise CG."""
        return self._direct(rhs, R, C, "solve", options)

    def solve_model(self, rhs: Tensor, R: Any, C: Any, **options: Any) -> Solved:
        """(Aᴴ R⁻¹ A + C⁻¹)⁻¹ rhs: direct like `solve`."""
        return self._direct(rhs, R, C, "solve_model", options)

    def _direct(self, rhs: Tensor, R: Any, C: Any, name: str, options: dict[str, Any]) -> Solved:
        R, C = as_covariance(R, self.data_shape, batched=True), as_covariance(C, self.model_shape, batched=True)
        if not (isinstance(R, Scalar) and isinstance(C, Scalar)):
            return getattr(super(), name)(rhs, R, C, **options)  # type: ignore[no-any-return]
        data = name == "solve"

        def gram() -> tuple[Tensor, Tensor]:
            X = self.matrix()
            values, vectors = torch.linalg.eigh(X @ X.mT if data else X.mT @ X)
            return values.clamp_min(0), vectors

        b, P = (self._casts(f"{name} {i}", rhs, lambda i=i: self._casts.once(name, gram)[i]) for i in (0, 1))  # type: ignore[misc]
        r, c = (
            v.to(rhs.real).reshape(-1, *[1] * (rhs.ndim - 1)) if v.ndim else v.to(rhs.real)
            for v in (R.variance, C.variance)
        )
        gain = 1 / (r + c * b) if data else 1 / (b / r + 1 / c)
        return Solved.direct(torch.matmul(torch.matmul(rhs, P) * gain, P.mT))
