r"""Lithotype rules: a tree of cuts that divides the plane of two Gaussian values into one rectangle a facies.

A node cuts its rectangle across one axis at a threshold t; what lies below goes to the left. With the proportions p of the
facies under it, t solves P(left of t | in the rectangle) = p_left / (p_left + p_right) under the law of the two values,

    independent    t = Φ⁻¹(Φ(a) + c [Φ(b) − Φ(a)]),      [a, b] the rectangle's side, c the share on the left
    correlated     the root of the bivariate normal probability of the rectangle [a, t] × [a', b']

exactly, for one proportion or a map of proportions (independent values). Armstrong et al., Plurigaussian Simulations, 2011.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import ndtr
from torch import Tensor

__all__ = ["Cut", "LithotypeRule"]

_FAR = 8.5  # standard deviations: the normal probability beyond is under 1e-17


@dataclass(frozen=True)
class Cut:
    """A cut across an axis: `left` where the value lies below the threshold, `right` above.

    Args:
        axis: 1 or 2, which of the Gaussian values. left, right: a facies' name, or another `Cut`.
    """

    axis: int
    left: str | Cut
    right: str | Cut

    def __post_init__(self) -> None:
        if self.axis not in (1, 2):
            raise ValueError(f"A cut lies across axis 1 or 2, got {self.axis!r}.")

    @property
    def leaves(self) -> list[str]:
        """Names from left to right."""
        return [n for side in (self.left, self.right) for n in ([side] if isinstance(side, str) else side.leaves)]


class LithotypeRule:
    """A tree of cuts with its thresholds.

    Args:
        tree: the root. proportions: facies -> share, a number, or a tensor `(*spatial)` each (non-stationary).
        correlation: ρ of the two values at a place.

    Attributes:
        names: of the facies, in the order of the proportions: facies k has the code k. rectangles: code -> (a1, b1, a2, b2).

    Raises:
        ValueError: proportions that are negative or do not sum to 1, a facies that only one of tree and proportions names, or
            that occurs twice; maps of proportions together with a correlation.
    """

    def __init__(self, tree: Cut, proportions: Mapping[str, Any], *, correlation: float = 0.0) -> None:
        leaves = tree.leaves
        if len(set(leaves)) != len(leaves):
            raise ValueError(f"A facies occurs twice in the rule {leaves}; a leaf has a name of its own.")
        if set(leaves) != set(proportions):
            missing, extra = set(leaves) - set(proportions), set(proportions) - set(leaves)
            raise ValueError(
                f"The rule and the proportions must name the same facies: the proportions lack {sorted(missing)}, the rule lacks {sorted(extra)}."
            )
        if not -1 < correlation < 1:
            raise ValueError(f"The correlation must lie strictly between -1 and 1, got {correlation}.")
        shares = {k: torch.as_tensor(v, dtype=torch.float64) for k, v in proportions.items()}
        total = sum(shares.values())
        off = float((total - 1).abs().max()) if isinstance(total, Tensor) else 1.0
        if off > 1e-6 or any(float(v.min()) < 0 for v in shares.values()) or not math.isfinite(off):
            raise ValueError(f"Proportions are non-negative and sum to 1 everywhere; these miss it by {off:.3g}.")
        self.stationary = all(v.ndim == 0 for v in shares.values())
        if correlation and not self.stationary:
            raise ValueError("Maps of proportions need independent values; leave the correlation out.")
        self.tree, self.names, self.correlation = tree, list(proportions), float(correlation)
        self.proportions = shares
        self.thresholds: dict[Cut, Tensor] = {}
        self.rectangles: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        far = torch.tensor(math.inf, dtype=torch.float64)
        self._divide(tree, (-far, far, -far, far))

    def _share(self, node: str | Cut) -> Tensor:
        names = [node] if isinstance(node, str) else node.leaves
        return torch.stack(torch.broadcast_tensors(*[self.proportions[n] for n in names])).sum(0)

    def _divide(self, node: str | Cut, box: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        if isinstance(node, str):
            self.rectangles[self.names.index(node)] = box
            return
        left, right = self._share(node.left), self._share(node.right)
        c = torch.where(left + right > 0, left / (left + right).clamp_min(1e-300), torch.full_like(left, 0.5))
        i = 2 * (node.axis - 1)
        a, b = box[i], box[i + 1]
        if self.correlation:
            t = self._correlated(node.axis, box, float(left))
        else:
            low, high = torch.special.ndtr(a), torch.special.ndtr(b)
            t = torch.special.ndtri((low + c * (high - low)).clamp(0, 1))
        self.thresholds[node] = t
        self._divide(node.left, (*box[: i + 1], t, *box[i + 2 :]))  # type: ignore[arg-type]
        self._divide(node.right, (*box[:i], t, *box[i + 1 :]))  # type: ignore[arg-type]

    def _correlated(self, axis: int, box: tuple[Tensor, ...], wanted: float) -> Tensor:
        own, other = (0, 2) if axis == 1 else (2, 0)
        a, b = (float(box[own + k].clamp(-_FAR, _FAR)) for k in (0, 1))
        c, d = (float(box[other + k].clamp(-_FAR, _FAR)) for k in (0, 1))
        whole = bivariate(a, b, c, d, self.correlation)
        if wanted <= 1e-15 or wanted >= whole - 1e-15:
            return torch.tensor(a if wanted <= 1e-15 else b, dtype=torch.float64)
        root = brentq(lambda t: bivariate(a, t, c, d, self.correlation) - wanted, a, b, xtol=1e-13)
        return torch.tensor(root, dtype=torch.float64)

    def codes(self, y1: Tensor, y2: Tensor) -> Tensor:
        """Facies codes, shaped like y1 `(…, *spatial)`, as numbers of its dtype."""
        out = torch.zeros_like(y1)

        def fill(node: str | Cut, inside: Tensor) -> None:
            if isinstance(node, str):
                out[inside] = float(self.names.index(node))
                return
            below = (y1 if node.axis == 1 else y2) <= self.thresholds[node].to(y1)
            fill(node.left, inside & below)
            fill(node.right, inside & ~below)

        fill(self.tree, torch.ones_like(y1, dtype=torch.bool))
        return out

    def memberships(self, y1: Tensor, y2: Tensor, temperature: float) -> Tensor:
        """Soft version: `(facies, …)` weights that sum to 1, Φ((t − y)/temperature) at each cut; differentiable in y."""
        if not temperature > 0:
            raise ValueError(f"The temperature of the soft rule must be positive, got {temperature}.")
        parts: dict[int, Tensor] = {}

        def share(node: str | Cut, weight: Tensor) -> None:
            if isinstance(node, str):
                parts[self.names.index(node)] = weight
                return
            y = y1 if node.axis == 1 else y2
            below = torch.special.ndtr((self.thresholds[node].to(y) - y) / temperature)
            share(node.left, weight * below)
            share(node.right, weight * (1 - below))

        share(self.tree, torch.ones_like(y1))
        return torch.stack([parts[k] for k in range(len(self.names))])


def bivariate(a: float, b: float, c: float, d: float, rho: float) -> float:
    """P(a < y1 < b, c < y2 < d) of unit normals with correlation rho: ∫ φ(y) [Φ((d − ρy)/s) − Φ((c − ρy)/s)] dy."""
    a, b = max(a, -_FAR), min(b, _FAR)
    if b <= a:
        return 0.0
    s = math.sqrt(1 - rho * rho)
    total = 0.0
    nodes, weights = np.polynomial.legendre.leggauss(64)
    pieces = np.linspace(a, b, max(2, math.ceil((b - a) / max(0.5, s)) + 1))
    for low, high in itertools.pairwise(pieces):
        y = 0.5 * (high - low) * nodes + 0.5 * (high + low)
        inner = ndtr((d - rho * y) / s) - ndtr((c - rho * y) / s)
        total += 0.5 * (high - low) * float((weights * np.exp(-0.5 * y * y) * inner).sum()) / math.sqrt(2 * math.pi)
    return total
