r"""Covariance models fitted to data: least squares on the variogram, and the Whittle likelihood of fields on grids.

    variogram    min Σ_k N_k (γ̂(h_k)/γ_θ(h_k) − 1)²,    γ_θ(h) = C_θ(0) − C_θ(h)                  (Cressie 1985, weights N/γ_θ²)
    Whittle      min Σ_ω log Ī_θ(ω) + I(ω)/Ī_θ(ω),       Ī_θ = F[C_θ(h) w(h)],  w(h) = ∏ (1 − |h_i|/n_i)

I is the periodogram of the field and Ī_θ its expectation *on this grid*, edges included, so that the fit has none of the bias
of the plain Whittle likelihood (debiased: Sykulski et al. 2019, Biometrika 106, 251; Guillaumin et al. 2022, JRSS B 84, 1526).

The parameters of a template that are free start from its values: variances, lengths, and by name others (`nu`, `alpha`, `angle`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.fft
import scipy.optimize
import torch
from torch import Tensor

from invgen.priors._covariance_model import CovarianceModel, NestedCovariance, Nugget

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Variogram", "experimental_variogram", "fit_variogram", "fit_whittle"]

Array = np.ndarray


@dataclass(frozen=True)
class Variogram:
    """An experimental variogram.

    Attributes:
        lags: mean lag vector of the pairs of each class, `(k, d)`, in the unit of the coordinates. gamma: `(k,)`, half the mean square
            difference. pairs: how many, `(k,)`.
    """

    lags: Array
    gamma: Array
    pairs: Array

    def plot(self, ax: Axes | None = None, *, model: CovarianceModel | None = None, unit: str = "") -> Axes:
        """γ̂ against the length of the lag, points as large as their pairs are many, with a model's curve where one is given."""
        import matplotlib.pyplot as plt

        ax = ax if ax is not None else plt.figure().add_subplot()
        h = np.linalg.norm(self.lags, axis=1)
        ax.scatter(h, self.gamma, s=10 + 60 * self.pairs / self.pairs.max(), alpha=0.7)
        if model is not None:
            along = self.lags[-1] / max(h[-1], 1e-300) * np.linspace(1e-6, h[-1], 200)[:, None]
            ax.plot(np.linspace(0, h[-1], 200), model.sill - model(along))
        ax.set(xlabel=f"lag [{unit}]" if unit else "lag", ylabel="variogram", ylim=(0, None), xlim=(0, None))
        return ax


def experimental_variogram(
    points: Tensor | Array,
    values: Tensor | Array,
    *,
    width: float,
    classes: int = 12,
    direction: Sequence[float] | None = None,
    tolerance: float = 22.5,
    most: int = 2_000_000,
    seed: int = 0,
) -> Variogram:
    """γ̂ of scattered values.

    Args:
        points: `(n, d)`. values: `(n,)`; NaN are left out. width: of a class of lags. classes: how many, from lag 0 on.
        direction: of the pairs, with a tolerance in degrees; all directions when omitted. most: pairs at the most, drawn at
            random beyond it. seed: of that draw.

    Raises:
        ValueError: fewer than two values, or no pair in any class.
    """
    p, v = np.asarray(points, dtype=np.float64), np.asarray(values, dtype=np.float64).ravel()
    kept = np.isfinite(v)
    p, v = p[kept], v[kept]
    n = len(v)
    if n < 2:
        raise ValueError(f"A variogram needs at least two values that are not NaN, got {n}.")
    if n * (n - 1) // 2 <= most:
        i, j = np.triu_indices(n, 1)
    else:
        rng = np.random.default_rng(seed)
        i, j = rng.integers(0, n, most), rng.integers(0, n, most)
        i, j = i[i != j], j[i != j]
    h = p[j] - p[i]
    distance = np.linalg.norm(h, axis=1)
    if direction is not None:
        unit = np.asarray(direction, dtype=np.float64) / np.linalg.norm(direction)
        along = h @ unit
        inside = np.abs(along) >= distance * math.cos(math.radians(tolerance))
        h = np.where(along[:, None] < 0, -h, h)
    else:
        inside = np.ones(len(h), dtype=bool)
    inside &= distance < classes * width
    k = (distance[inside] / width).astype(int)
    counts = np.bincount(k, minlength=classes)
    if not counts.any():
        raise ValueError(f"No pair of the {n} values lies within {classes * width:g}; give wider classes.")
    used = counts > 0
    gamma = np.bincount(k, 0.5 * (v[j[inside]] - v[i[inside]]) ** 2, classes)[used] / counts[used]
    if direction is None:  # lags have no direction of their own: their length, along the first axis
        lags = np.zeros((int(used.sum()), p.shape[1]))
        lags[:, 0] = np.bincount(k, distance[inside], classes)[used] / counts[used]
    else:
        lags = np.stack([np.bincount(k, h[inside, c], classes)[used] / counts[used] for c in range(p.shape[1])], 1)
    return Variogram(lags, gamma, counts[used])


class _Parameters:
    """The free numbers of a template, as a vector: logarithms of what is positive."""

    def __init__(self, template: CovarianceModel, free: Sequence[str]) -> None:
        self.template, self.slots = template, []
        for i, part in enumerate(template.parts):
            for name in free:
                own = {f.name for f in fields(part)}  # ν of an exponential is a number of its class, and not free
                if name not in own or (isinstance(part, Nugget) and name != "variance"):
                    continue
                value = np.atleast_1d(np.asarray(getattr(part, name), dtype=np.float64))
                self.slots += [(i, name, k, len(value) > 1, name != "angle") for k in range(len(value))]
        if not self.slots:
            raise ValueError(f"The covariance has none of the parameters {list(free)}; name those to fit.")
        self.start = np.array([self._get(*s) for s in self.slots])

    def _get(self, i: int, name: str, k: int, many: bool, log: bool) -> float:
        value = float(np.atleast_1d(np.asarray(getattr(self.template.parts[i], name)))[k])
        return math.log(value) if log else value / 90

    def model(self, vector: Array) -> CovarianceModel:
        """The template with these numbers."""
        parts: list[Any] = list(self.template.parts)
        for (i, name, k, many, log), x in zip(self.slots, vector, strict=True):
            number = math.exp(min(max(float(x), -60.0), 60.0)) if log else 90 * float(x)
            if name == "alpha" and hasattr(parts[i], "alpha") and type(parts[i]).__name__ == "Stable":
                number = min(number, 2.0)
            old = getattr(parts[i], name)
            value: Any = number if not many else tuple(number if j == k else float(v) for j, v in enumerate(old))
            parts[i] = replace(parts[i], **{name: value})
        return parts[0] if len(parts) == 1 else NestedCovariance(structures=tuple(parts))

    def minimise(self, loss: Callable[[CovarianceModel], float]) -> CovarianceModel:
        """The model of least loss, from the template: quasi-Newton, then a simplex for what is left."""

        def value(x: Array) -> float:
            out = loss(self.model(x))
            return out if math.isfinite(out) else 1e30

        low, high = self.start - 7, self.start + 7
        found = scipy.optimize.minimize(value, self.start, method="L-BFGS-B", bounds=list(zip(low, high, strict=True)))
        polished = scipy.optimize.minimize(
            value, found.x, method="Nelder-Mead", options={"maxiter": 200 * len(found.x), "xatol": 1e-5, "fatol": 1e-9}
        )
        return self.model(polished.x if polished.fun < found.fun else found.x)


def fit_variogram(
    template: CovarianceModel,
    variograms: Variogram | Sequence[Variogram],
    *,
    free: Sequence[str] = ("variance", "length"),
) -> CovarianceModel:
    """The covariance of the template's form whose variogram is nearest.

    Args:
        template: structures and starting values. variograms: one, or several (directions) fitted together.
        free: parameters that are fitted, of every structure that has them; the rest stays.
    """
    several = [variograms] if isinstance(variograms, Variogram) else list(variograms)
    parameters = _Parameters(template, free)

    def loss(model: CovarianceModel) -> float:
        total = 0.0
        for v in several:
            gamma = np.maximum(model.sill - model(v.lags), 1e-12 * model.sill)
            total += float((v.pairs * (v.gamma / gamma - 1) ** 2).sum()) / float(v.pairs.sum())
        return total

    return parameters.minimise(loss)


def fit_whittle(
    template: CovarianceModel,
    fields: Tensor | Array,
    *,
    spacing: Sequence[float],
    free: Sequence[str] = ("variance", "length"),
    mean: float | None = None,
) -> CovarianceModel:
    """The covariance of greatest (debiased) Whittle likelihood of fields on a complete grid.

    Args:
        template: structures and starting values. fields: `(n, *spatial)` or `(n, 1, *spatial)` independent fields, no NaN.
        spacing: of the grid. free: parameters that are fitted. mean: of the fields; their overall mean when omitted, in which
            case the wavenumber zero is left out.

    Raises:
        ValueError: shapes that do not fit the spacing, NaN.

    Cost: two Fourier transforms of twice the grid an evaluation, some hundred evaluations.
    """
    x = np.asarray(torch.as_tensor(fields).double())
    d = len(spacing)
    if x.ndim == d + 2 and x.shape[1] == 1:
        x = x[:, 0]
    if x.ndim != d + 1:
        raise ValueError(f"Fields are (n, *spatial) with {d} axes, got the shape {tuple(x.shape)}.")
    if not np.isfinite(x).all():
        raise ValueError(
            f"{int((~np.isfinite(x)).sum())} values are NaN or infinite; the Whittle likelihood needs a complete grid."
        )
    spatial, axes = x.shape[1:], tuple(range(1, d + 1))
    x = x - (x.mean() if mean is None else mean)
    power = (np.abs(scipy.fft.fftn(x, axes=axes)) ** 2).mean(0) / math.prod(spatial)
    signed = [np.concatenate([np.arange(n), np.arange(-n + 1, 0)]) for n in spatial]
    taper = np.ones(tuple(2 * n - 1 for n in spatial))
    for i, (k, n) in enumerate(zip(signed, spatial, strict=True)):
        taper = taper * (1 - np.abs(k) / n).reshape(-1, *(1,) * (d - 1 - i))
    lags = [k * s for k, s in zip(signed, spacing, strict=True)]
    used = np.ones(spatial, dtype=bool)
    if mean is None:
        used[(0,) * d] = False

    def loss(model: CovarianceModel) -> float:
        folded = model.on_axes(lags) * taper
        for i, n in enumerate(spatial):  # lags h and h − n meet at the same wavenumbers
            head = np.take(folded, np.arange(n), i)
            tail = np.take(folded, np.arange(n, 2 * n - 1), i)
            pad = [(1, 0) if j == i else (0, 0) for j in range(d)]
            folded = head + np.pad(tail, pad)
        expected = np.maximum(scipy.fft.fftn(folded).real, 1e-14 * model.sill)[used]
        return float((np.log(expected) + power[used] / expected).mean())

    return _Parameters(template, free).minimise(loss)
