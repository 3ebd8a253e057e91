"""Where a learned prior lives and what its network is told beside the field: depth, classes, parameters."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from invgen.grid import Grid
from invgen.priors import conditions as conditioning
from invgen.priors.conditions import Condition


@dataclass(frozen=True)
class DepthChannel:
    """Two input channels that tell the network how deep a row is: depth / scale, and 1 where depth is known.

    Args:
        scale: metres that map to 1.
    """

    scale: float = 2000.0

    def build(self, grid: Grid, depth: Tensor | None) -> Tensor:
        """`(2, *grid.shape)`; depth `(grid.shape[0],)` in metres, zeros and "unknown" when None."""
        out = torch.zeros(2, *grid.shape)
        if depth is not None:
            if tuple(depth.shape) != grid.shape[:1]:
                raise ValueError(
                    f"depth has the shape {tuple(depth.shape)} but the grid has {grid.shape[0]} rows; give one depth in metres a row."
                )
            out[0] = (depth.to(torch.float32) / self.scale).reshape(-1, *(1,) * (len(grid.shape) - 1))
            out[1] = 1.0
        return out


class Placed:
    """`at` and `given`: the same weights on another grid, or with conditions."""

    shape: tuple[int, ...]
    latent_shape: tuple[int, ...]
    grid: Grid | None
    depth: DepthChannel | None
    conditions: dict[str, Condition]
    condition: Tensor | None
    weight: float
    context: Tensor | None
    blank: Tensor | None
    evaluations: int

    @property
    def _device(self) -> torch.device:
        raise NotImplementedError

    def at(
        self,
        shape: tuple[int, ...],
        *,
        origin: tuple[float, ...] | None = None,
        grid: Grid | None = None,
        depth: Tensor | None = None,
    ) -> Self:
        """The same prior on another grid, the weights shared.

        Args:
            shape: spatial shape of the new grid, e.g. `(550, 800)`.
            origin: coordinate of its first sample; the present one when omitted.
            grid: state the whole grid instead: its spacing and units may differ from the training grid (a time axis,
                say), and then the learned geology is read per sample. That is an assumption; it is never made silently.
            depth: `(rows,)` depth of each row in metres; computed from a grid in metres when omitted, unknown
                otherwise.
        """
        spatial = tuple(shape)
        if grid is None and self.grid is not None:
            grid = self.grid.with_shape(spatial, origin)
        if grid is not None and grid.shape != spatial:
            raise ValueError(f"at() was asked for the shape {spatial} but the grid given has {grid.shape}.")
        if depth is None and grid is not None:
            depth = depth_of(grid)
        other = self._twin()
        other.shape = other.latent_shape = (self.shape[0], *spatial)
        other.grid = grid
        if grid is not None and grid.field_shape != other.shape:
            raise ValueError(f"The prior's shape {other.shape} does not fit its grid {grid.field_shape}.")
        other._place(depth)
        return other

    def given(self, *, weight: float = 1.0, **condition: Any) -> Self:
        """The prior p(x | condition), the weights shared.

            D_w = D(u | no condition) + weight (D(u | condition) − D(u | no condition))

        Args:
            weight: 1 is p(x | condition). Another weight is classifier-free guidance (Ho & Salimans 2022,
                arXiv:2207.12598, equation 6, whose w is weight − 1), at two network evaluations for each: above 1 the draws
                satisfy the condition more closely and vary less. D_w is then no posterior mean of any prior, and what is
                built on it is no longer calibrated.
            condition: one value for each of `conditions`; what is left out stays unknown.

        Raises:
            ValueError: a condition the prior does not know, or a value that does not fit it.
            TypeError: the prior was not trained with conditions.
        """
        if not self.conditions:
            raise TypeError("This prior is not conditional; train one with conditions={name: Condition(…)}.")
        values = {k: torch.as_tensor(v)[None] for k, v in condition.items()}
        if not math.isfinite(weight):
            raise ValueError(f"The guidance weight must be finite, got {weight}.")
        code = conditioning.encode(self.conditions, values)
        assert code is not None
        other = self._twin()
        other.condition, other.weight = code[0].to(self._device), float(weight)
        other._place(depth_of(self.grid) if self.grid is not None else None, self.context)
        return other

    def _twin(self) -> Self:
        other = copy.copy(self)
        for name in ("_buffers", "_modules", "_parameters"):  # the dictionaries, not what is in them
            other.__dict__[name] = dict(self.__dict__[name])
        other.evaluations = 0
        return other

    def _place(self, depth: Tensor | None, like: Tensor | None = None) -> None:
        """Build the input channels beside the field: depth, then the conditions (blank: none of them given)."""
        channels = sum(c.size + 1 for c in self.conditions.values())
        parts = []
        if self.depth is not None and like is not None:
            parts = [like[:2]]
        elif self.depth is not None and self.grid is not None:
            parts = [self.depth.build(self.grid, depth)]
        parts = [p.to(self._device) for p in parts]
        if not channels:
            self.context = parts[0] if parts else None
            return
        spatial = self.shape[1:]
        known = torch.zeros(channels, device=self._device) if self.condition is None else self.condition
        wide = known.reshape(-1, *(1,) * len(spatial)).expand(-1, *spatial)
        self.context = torch.cat([*parts, wide.to(torch.float32)])
        self.blank = torch.cat([*parts, torch.zeros_like(wide, dtype=torch.float32)])


def depth_of(grid: Grid) -> Tensor | None:
    """Depth in metres of each row, when the first axis is one of depth."""
    if grid.axes[0] != "z" or grid.units[0] not in ("m", "km"):
        return None
    return torch.as_tensor(grid.coordinates(0) * (1000.0 if grid.units[0] == "km" else 1.0))
