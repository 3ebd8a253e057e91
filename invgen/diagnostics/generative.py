r"""Generated fields beside held-out ones: one table of distances, each over its floor, and whether examples were memorised.

A distance between two finite sets is not 0 when their laws agree. The floor is what two halves of the held-out set are
apart, averaged over random splits; a ratio of 1 is a generator that cannot be told from the data by this statistic and
this many images.

    sliced wasserstein   of pixels, order 2, along random directions
    variogram            root mean square over lags and both axes of γ_A − γ_B, over the data's variance
    connectivity         root mean square over lags and both axes of τ_A − τ_B
    proportions          Wasserstein-1 distance between the images' proportions
    patterns             Jensen–Shannon divergence of 3 × 3 patterns, square root (a metric)
    minkowski            mean relative difference of area, perimeter and Euler characteristic
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from invgen.diagnostics._arrays import Array, chunks, tensor
from invgen.diagnostics.distances import sliced_wasserstein
from invgen.diagnostics.fields import (
    connectivity_function,
    images,
    minkowski,
    multipoint_distance,
    multipoint_histogram,
    proportions,
    variogram,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "FieldComparison",
    "Memorisation",
    "bits_per_dim",
    "compare_fields",
    "latent_path",
    "memorisation",
    "typicality",
]


@dataclass(frozen=True, eq=False)
class FieldComparison:
    """Distances of generated from held-out fields.

    Attributes:
        distances: statistic -> distance to halves of the held-out set, mean over splits.
        floors: statistic -> distance between the halves, mean over splits. floor_sd: over splits.
        n: images of each set that were compared.
        curves: name -> (generated, held-out) `LagCurve`, for pictures.
    """

    distances: dict[str, float]
    floors: dict[str, float]
    floor_sd: dict[str, float]
    n: int
    curves: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def ratios(self) -> dict[str, float]:
        """Distance over floor."""
        return {k: v / self.floors[k] for k, v in self.distances.items()}

    def table(self) -> str:
        """Plain text: statistic, distance, floor ± sd over splits, ratio."""
        lines = [f"{'statistic':20s} {'distance':>10s} {'floor':>10s} {'± sd':>9s} {'ratio':>7s}"]
        lines += [
            f"{k:20s} {v:10.4g} {self.floors[k]:10.4g} {self.floor_sd[k]:9.2g} {self.ratios[k]:7.2f}"
            for k, v in self.distances.items()
        ]
        return "\n".join(lines)

    def plot(self) -> Figure:
        """Curves of both sets, and the ratios."""
        from invgen.diagnostics import field_figures

        return field_figures.comparison_figure(self)


class _Set:
    """Statistics of every image, taken once: halves are averages of rows."""

    def __init__(self, x: Tensor, threshold: float, max_lag: int) -> None:
        self.pixels = x.flatten(1)
        self.variograms = [variogram(x, axis=a, max_lag=max_lag) for a in "yx"]
        self.connectivity = [connectivity_function(x, axis=a, max_lag=max_lag, threshold=threshold) for a in "yx"]
        self.share = proportions(x, threshold=threshold)[:, 1]
        shapes = minkowski(x, threshold=threshold)
        self.shapes = np.stack([shapes[k] for k in ("area", "perimeter", "euler")], axis=1)
        self.patterns = np.stack([multipoint_histogram(one[None], threshold=threshold) for one in x]).astype(np.float32)


def compare_fields(
    samples: Array,
    held_out: Array,
    *,
    threshold: float = 0.5,
    max_lag: int | None = None,
    splits: int = 10,
    projections: int = 200,
    seed: int = 0,
) -> FieldComparison:
    """Compare generated fields with held-out ones.

    Args:
        samples: `(n, ny, nx)` or `(n, 1, ny, nx)`; the first half of the held-out number is used.
        held_out: images that no training saw, `(m, …)`; halves of m//2 give the floor.
        threshold: the set whose connectivity, proportions, patterns and shapes are compared (facies images: 0.5;
            continuous ones: their median).
        max_lag: of curves, in pixels; half the window when omitted. splits: random halves. projections: directions.

    Cost: seconds for 2000 + 4000 images of 64 × 64.

    Raises:
        ValueError: shapes that differ, fewer samples than half the held-out images.
    """
    a, b = images(samples, "The samples"), images(held_out, "The held-out images")
    half = len(b) // 2
    if a.shape[1:] != b.shape[1:] or len(a) < half or half < 2:
        raise ValueError(
            f"The samples have the shape {tuple(a.shape)} and the held-out images {tuple(b.shape)}; give images of one size, and at least half as many samples as held-out images."
        )
    lag = min(a.shape[1:]) // 2 if max_lag is None else max_lag
    made, real = _Set(a[:half], threshold, lag), _Set(b, threshold, lag)
    rows = np.arange(half)
    generator = np.random.default_rng(seed)
    scale = float(np.mean([c.mean[-1] for c in real.variograms]))
    found: dict[str, list[float]] = {}
    floor: dict[str, list[float]] = {}
    for split in range(splits):
        order = generator.permutation(len(b))
        first, second = order[:half], order[half : 2 * half]
        for store, values in (
            (found, _distances(made, rows, real, second, scale, projections, seed + split)),
            (floor, _distances(real, first, real, second, scale, projections, seed + split)),
        ):
            for k, v in values.items():
                store.setdefault(k, []).append(v)
    curves = {
        f"{c.name}, {c.axis}": (c, d)
        for c, d in zip(made.variograms + made.connectivity, real.variograms + real.connectivity, strict=True)
    }
    return FieldComparison(
        {k: float(np.mean(v)) for k, v in found.items()},
        {k: float(np.mean(v)) for k, v in floor.items()},
        {k: float(np.std(v)) for k, v in floor.items()},
        half,
        curves,
    )


def _distances(
    a: _Set, i: np.ndarray, b: _Set, j: np.ndarray, scale: float, projections: int, seed: int
) -> dict[str, float]:
    def curves(first: list[Any], second: list[Any]) -> float:
        gaps = [
            np.nanmean(c.each[i], axis=0)[1:] - np.nanmean(d.each[j], axis=0)[1:]
            for c, d in zip(first, second, strict=True)
        ]
        return math.sqrt(float(np.nanmean(np.square(np.concatenate(gaps)))))

    x, y = a.pixels[torch.from_numpy(i)], b.pixels[torch.from_numpy(j)]
    shapes_a, shapes_b = a.shapes[i].mean(0), b.shapes[j].mean(0)
    patterns = multipoint_distance(a.patterns[i].mean(0, dtype=float), b.patterns[j].mean(0, dtype=float))
    return {
        "sliced wasserstein": float(sliced_wasserstein(x, y, num_projections=projections, seed=seed)),
        "variogram": curves(a.variograms, b.variograms) / scale,
        "connectivity": curves(a.connectivity, b.connectivity),
        "proportions": float(np.abs(np.sort(a.share[i]) - np.sort(b.share[j])).mean()),
        "patterns": math.sqrt(max(patterns, 0.0)),
        "minkowski": float(np.mean(np.abs(shapes_a - shapes_b) / np.maximum(np.abs(shapes_b), 1e-12))),
    }


@dataclass(frozen=True, eq=False)
class Memorisation:
    """Distances to the nearest training example, of samples and of held-out examples.

    Attributes:
        samples, held_out: root-mean-square distance a pixel to the nearest training example, `(n,)`. nearest: its index.
        ratio: median of samples over median of held-out; well below 1 says that examples are repeated.
        closer: share of samples nearer to the training set than 99 % of held-out examples; 0.01 is expected.
    """

    samples: np.ndarray
    held_out: np.ndarray
    nearest: np.ndarray

    @property
    def ratio(self) -> float:
        return float(np.median(self.samples) / np.median(self.held_out))

    @property
    def closer(self) -> float:
        return float((self.samples < np.quantile(self.held_out, 0.01)).mean())


def memorisation(samples: Array, training: Array, held_out: Array) -> Memorisation:
    """Nearest neighbours in the training set, by matrix products; cost (n + m) · n_train · pixels."""
    t = tensor(training, "The training examples")
    t = t.reshape(len(t), -1).float()

    def nearest(values: Array, what: str) -> tuple[np.ndarray, np.ndarray]:
        v = tensor(values, what)
        v = v.reshape(len(v), -1).float()
        if v.shape[1] != t.shape[1]:
            raise ValueError(f"{what} have {v.shape[1]} entries each, the training examples {t.shape[1]}.")
        squares = t.square().sum(1)
        best, where = torch.empty(len(v)), torch.empty(len(v), dtype=torch.long)
        for rows in chunks(len(v), len(t)):
            d = v[rows].square().sum(1)[:, None] + squares - 2 * v[rows] @ t.mT
            best[rows], where[rows] = d.min(1)
        return (best.clamp_min(0) / t.shape[1]).sqrt().numpy(), where.numpy()

    s, index = nearest(samples, "The samples")
    h, _ = nearest(held_out, "The held-out examples")
    return Memorisation(s, h, index)


def latent_path(decode: Callable[[Tensor], Tensor], start: Tensor, end: Tensor, steps: int = 9) -> Tensor:
    """Decoded points on the great circle between two latents, `(steps, *shape)`: radii stay those of N(0, I).

    Args:
        decode: `(n, *latent_shape)` to fields. start, end: `latent_shape`.
    """
    a, b = tensor(start, "The first latent"), tensor(end, "The last latent")
    ra, rb = a.norm(), b.norm()
    angle = torch.arccos(((a * b).sum() / (ra * rb)).clamp(-1, 1))
    t = torch.linspace(0, 1, steps, dtype=a.dtype).reshape(-1, *(1,) * a.ndim)
    if float(angle.sin()) < 1e-6:
        z = a + t * (b - a)
    else:
        z = (((1 - t) * angle).sin() * a / ra + (t * angle).sin() * b / rb) / angle.sin() * (ra + t * (rb - ra))
    with torch.no_grad():
        return decode(z)


def bits_per_dim(log_prob: Array, dims: int, step: float = 1.0) -> np.ndarray:
    """−log₂ p a dimension of values known to a step: −log p/(dims ln 2) − log₂ step, `(n,)`.

    Args:
        log_prob: natural log-densities. dims: entries of an example. step: quantisation of the data (1/256 for 8 bits
            in [0, 1]; 1 gives the differential entropy in bits).
    """
    value = tensor(log_prob, "The log-densities").double().numpy()
    return np.asarray(-value / (dims * math.log(2)) - math.log2(step))


def typicality(log_prob: Array, reference: Array) -> dict[str, np.ndarray]:
    """Outlier scores from densities, against examples known to be ordinary.

    A high density is no proof of an ordinary example: the flat image is denser than every sample of a Gaussian field
    (Nalisnick et al. 2019, arXiv:1810.09136). Hence two scores.

    Args:
        log_prob: `(n,)`. reference: `(m,)` log-densities of held-out ordinary examples.

    Returns:
        "low": share of the reference with a density as low, small for outliers of low density. "typical": two-sided,
        small also where the density is too high.
    """
    value = tensor(log_prob, "The log-densities").double().numpy()
    known = np.sort(tensor(reference, "The reference log-densities").double().numpy())
    below = (np.searchsorted(known, value, side="right") + 1) / (len(known) + 1)
    above = (len(known) - np.searchsorted(known, value, side="left") + 1) / (len(known) + 1)
    return {"low": np.minimum(below, 1.0), "typical": np.minimum(2 * np.minimum(below, above), 1.0)}
