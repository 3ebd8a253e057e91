r"""Data as one standardised vector, and how far an observation lies from those of the simulations.

All measured data of all terms side by side, complex ones as two numbers, each with the mean and the standard deviation
of the simulations taken off: c = (d − m)/s. An observation is judged by its Mahalanobis distance

    D² = (c − c̄)ᵀ C⁻¹ (c − c̄)

and by the share of held-out simulations at least as far away, p = (1 + #{D²_i ≥ D²})/(1 + n), which is uniform for
data from the simulator whatever their law (a conformal p-value: Vovk, Gammerman & Shafer 2005, chapter 2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from invgen.problem import InverseProblem

_MOST = 1024  # numbers up to which their covariance is held
_FLOOR = 1e-6  # of the largest eigenvalue of C: what lies below is rounding


class Features:
    """Which numbers of the data the network sees.

    Args:
        shapes: of the data, one a term. complex_terms: which of them are complex.
        masks: one boolean tensor a term, or None.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], complex_terms: Sequence[bool], masks: Sequence[Tensor | None]
    ) -> None:
        self.shapes = [tuple(s) for s in shapes]
        self.complex_terms = [bool(c) for c in complex_terms]
        self.masks = [None if m is None else m.detach().cpu() for m in masks]

    @classmethod
    def of(cls, problem: InverseProblem) -> Features:
        """Those of a problem's terms."""
        terms = problem.terms
        return cls(
            [tuple(t.operator.data_shape) for t in terms], [t.data.is_complex() for t in terms], [t.mask for t in terms]
        )

    @property
    def dim(self) -> int:
        """Numbers in c."""
        return sum(self._sizes())

    def _sizes(self) -> list[int]:
        counts = [math.prod(s) if m is None else int(m.sum()) for s, m in zip(self.shapes, self.masks, strict=True)]
        return [n * (2 if c else 1) for n, c in zip(counts, self.complex_terms, strict=True)]

    @property
    def layout(self) -> list[tuple[int, ...]]:
        """Shape of each term as embeddings see it: the data's, with a last axis of two where complex."""
        return [(*s, 2) if c else s for s, c in zip(self.shapes, self.complex_terms, strict=True)]

    @property
    def kept(self) -> Tensor | None:
        """Positions of the measured numbers among all, or None where all were measured."""
        if all(m is None for m in self.masks):
            return None
        flags = []
        for shape, mask, two in zip(self.shapes, self.masks, self.complex_terms, strict=True):
            flag = torch.ones(shape, dtype=torch.bool) if mask is None else mask
            flags.append((flag[..., None].expand(*flag.shape, 2) if two else flag).reshape(-1))
        return torch.cat(flags).nonzero()[:, 0]

    def flatten(self, data: Sequence[Tensor]) -> Tensor:
        """`(n, dim)` real numbers, not yet standardised, of one `(n, *data_shape)` a term."""
        parts = []
        for value, mask in zip(data, self.masks, strict=True):
            flat = value.reshape(len(value), -1) if mask is None else value[:, mask.to(value.device)]
            parts.append(torch.view_as_real(flat.resolve_conj()).flatten(1) if flat.is_complex() else flat)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def check(self, data: Sequence[Tensor]) -> None:
        """Raise a ValueError for data of other shapes."""
        found = [tuple(d.shape[1:]) for d in data]
        if found != self.shapes:
            raise ValueError(
                f"The estimator was trained for data of the shapes {self.shapes}, these have {found}; give data like those that were simulated."
            )

    def __repr__(self) -> str:
        return f"Features({self.shapes}, {self.dim} numbers)"

    def describe(self) -> dict[str, Any]:
        """JSON-able shapes; masks are tensors of the file."""
        return {"shapes": [list(s) for s in self.shapes], "complex": self.complex_terms}


class Typical(nn.Module):
    """Where the simulated data lie, and the distances of held-out ones.

    Args:
        dim: of the standardised data (or of their embedding). count: held-out simulations kept.
    """

    centre: Tensor
    whiten: Tensor
    reached: Tensor

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("whiten", torch.zeros(dim, dim, dtype=torch.float64))
        self.register_buffer("reached", torch.zeros(count, dtype=torch.float64))

    @classmethod
    def of(cls, train: Tensor, held: Tensor) -> Typical:
        """From vectors of training and of held-out simulations, `(n, dim)` each."""
        made = cls(train.shape[1], len(held))
        rows = train.double()
        made.centre = rows.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov(rows.T).reshape(rows.shape[1], -1))
        # the noise of an estimate from few simulations makes small eigenvalues smaller: Ledoit and Wolf's pull to the mean
        pull = min(1.0, rows.shape[1] / max(len(rows), 1)) * 0.1
        values = (1 - pull) * values + pull * values.mean()
        made.whiten = vectors * values.clamp_min(_FLOOR * values.max().clamp_min(1e-300)).rsqrt()
        made.reached = made.distance(held).sort().values
        return made

    def distance(self, c: Tensor) -> Tensor:
        """D² `(n,)` of `(n, dim)`."""
        return ((c.double() - self.centre) @ self.whiten).square().sum(1)

    def p_value(self, squared: Tensor) -> Tensor:
        """Share of held-out simulations at least as far away, `(n,)`."""
        n = len(self.reached)
        below = torch.searchsorted(self.reached, torch.nan_to_num(squared, nan=math.inf).contiguous())
        return (1 + n - below).double() / (1 + n)


def has_covariance(dim: int) -> bool:
    """Whether the data are few enough numbers for the covariance of all."""
    return dim <= _MOST
