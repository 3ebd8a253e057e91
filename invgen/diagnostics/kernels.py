r"""Maximum mean discrepancy, and permutation tests that two samples have one law.

MMD²(P, Q) = E k(X, X') + E k(Y, Y') − 2 E k(X, Y), estimated without bias (Gretton et al. 2012, equation 3):

    MMD²_u = 1/(n(n−1)) Σ_{i≠j} k(x_i, x_j) + 1/(m(m−1)) Σ_{i≠j} k(y_i, y_j) − 2/(nm) Σ_{ij} k(x_i, y_j),

with the Gaussian kernel k(x, y) = exp(−|x − y|²/(2 h²)) and h the median distance between points of the pooled samples.
Permuting which point belongs to which sample gives the null distribution exactly when all points are independent
(Phipson & Smyth 2010: p = (1 + #{permuted ≥ observed})/(1 + permutations)).

Reference: Gretton et al., A kernel two-sample test, JMLR 2012.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from invgen.diagnostics._arrays import Array, chunks, two_samples

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["TwoSampleTest", "mmd", "permutation_test"]


@dataclass(frozen=True, eq=False)
class TwoSampleTest:
    """A distance between two samples and what it is between samples of one law; `float(test)` is the distance.

    Attributes:
        name: of the distance. value: observed. null: of permuted samples, `(permutations,)`, empty when none.
        p_value: P(null ≥ observed), NaN without permutations. level: α.
        bandwidth: h of the kernel, NaN elsewhere.
    """

    name: str
    value: float
    null: np.ndarray
    p_value: float
    level: float
    bandwidth: float = float("nan")

    @property
    def passed(self) -> bool:
        """Both samples may have one law."""
        return not self.p_value <= self.level

    def __float__(self) -> float:
        return self.value

    def plot(self, ax: Axes | None = None) -> Axes:
        """Histogram of the permuted distances with the observed one."""
        from invgen.diagnostics import figures

        return figures.permutation_figure(self, ax)


def mmd(
    x: Array,
    y: Array,
    *,
    bandwidth: float | None = None,
    permutations: int = 200,
    level: float = 0.01,
    seed: int = 0,
) -> TwoSampleTest:
    """Unbiased squared maximum mean discrepancy with a Gaussian kernel, and its permutation test.

    Args:
        x: `(n, *shape)`, independent. y: `(m, *shape)`, independent.
        bandwidth: h, in units of x; the median distance of the pooled samples (of at most 2000 points) when omitted.
        permutations: of the test; 0 for the distance alone.
        level: α. seed: of permutations.

    Returns:
        `TwoSampleTest` of MMD²_u, which may be negative.

    Raises:
        ValueError: shapes that do not fit, NaN, a bandwidth that is not positive.

    Cost: (n + m)² kernel values, once, in rows of 64 MB; every permutation is a column of one matrix product.
    Reference: module docstring.
    """
    a, b = two_samples(x, y)
    points = torch.cat([a, b]).double()
    points = points - points.mean(0)  # distances from inner products lose digits far from the origin
    n, total = len(a), len(a) + len(b)
    rng = np.random.default_rng(seed)
    h = _median_distance(points, rng) if bandwidth is None else float(bandwidth)
    if not h > 0:
        raise ValueError(f"The bandwidth of a kernel is positive, got {h}; are all points equal?")
    labels = np.zeros((1 + permutations, total), dtype=bool)
    labels[0, :n] = True
    labels[1:] = rng.permuted(np.broadcast_to(labels[0], (permutations, total)), axis=1)
    first = torch.from_numpy(labels).to(points)
    within_x, from_x, everything = points.new_zeros(1 + permutations), points.new_zeros(1 + permutations), 0.0
    squares = points.square().sum(1)
    for rows in chunks(total, 2 * total):
        distance = squares[rows, None] + squares - 2 * points[rows] @ points.mT
        K = torch.exp(distance.clamp_min(0) * (-0.5 / h**2))
        K[torch.arange(len(K)), torch.arange(rows.start, rows.stop)] = 0  # pairs of different points
        reached = K @ first.mT  # (rows, 1 + permutations): Σ_j k(i, j) over j in the first sample
        within_x += (first[:, rows].mT * reached).sum(0)
        from_x += reached.sum(0)
        everything += float(K.sum())
    m = total - n
    cross = from_x - within_x
    within_y = everything - within_x - 2 * cross
    values = (within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * cross / (n * m)).cpu().numpy()
    return _verdict("MMD²", values, level, h)


def permutation_test(
    x: Array,
    y: Array,
    distance: Callable[[Tensor, Tensor], object],
    *,
    permutations: int = 100,
    level: float = 0.01,
    seed: int = 0,
    name: str = "distance",
) -> TwoSampleTest:
    """Is a distance between two samples larger than between samples of one law?

    Args:
        x: `(n, *shape)`, independent. y: `(m, *shape)`, independent.
        distance: (x, y) -> a number, such as `lambda a, b: sliced_wasserstein(a, b, 50)`.
        permutations: of the pooled points. level: α. seed: of permutations. name: of the distance.

    Raises:
        ValueError: shapes that do not fit, NaN.

    Cost: permutations + 1 distances. Exact for independent points: p ≤ α with a probability of at most α.
    """
    a, b = two_samples(x, y)
    points, n, rng = torch.cat([a, b]), len(a), np.random.default_rng(seed)
    values = [float(distance(a, b))]  # type: ignore[arg-type]
    for _ in range(permutations):
        shuffled = points[torch.from_numpy(rng.permutation(len(points))).to(points.device)]
        values.append(float(distance(shuffled[:n], shuffled[n:])))  # type: ignore[arg-type]
    return _verdict(name, np.array(values), level)


def _verdict(name: str, values: np.ndarray, level: float, h: float = float("nan")) -> TwoSampleTest:
    null = values[1:]
    p = (1 + int((null >= values[0]).sum())) / (1 + len(null)) if len(null) else float("nan")
    return TwoSampleTest(name, float(values[0]), null, p, level, h)


def _median_distance(points: Tensor, rng: np.random.Generator, most: int = 2000) -> float:
    """Median heuristic over all pairs of (at most 2000 random) points."""
    some = points
    if len(points) > most:
        some = points[torch.from_numpy(rng.choice(len(points), most, replace=False)).to(points.device)]
    return float(torch.nn.functional.pdist(some.double()).median())
