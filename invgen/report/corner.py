"""Corner plots: marginals of named parameters along the diagonal, pairs below it, several posteriors on one page.

corner_plot({"theta_E": a, "q": b}, truth={"theta_E": 1.2, "q": 0.8}).savefig("corner.png")
corner_plot({"NPE": draws_a, "HMC": draws_b}, names=("log r_s", "gamma"))        # each (n, 2)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from invgen.report.figures import INK, STYLE, TRUTH, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["corner_plot", "mass_levels"]

Array = np.ndarray
COLOURS = ("#14507a", "#c9761a", "#2f7d4f", "#7b4a9e", "#8a8f98")
_CELLS = 96  # density cells an axis
_WIDTH = 0.7  # kernel width in units of Scott's; see `corner_plot`
_MARGIN = 0.3  # of the range, on either side, so that the periodic smoothing does not wrap


def corner_plot(
    posteriors: Any,
    names: Sequence[str] = (),
    *,
    truth: Any = None,
    weights: Any = None,
    levels: Sequence[float] = (0.68, 0.95),
    labels: Mapping[str, str] | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    digits: int = 2,
    size: float = 2.1,
) -> Figure:
    r"""One- and two-dimensional marginals of draws, with contours that hold a stated mass.

    A density is the histogram of the draws on 96 cells an axis, smoothed by a Gaussian kernel of covariance h² Σ with
    h = 0.7 n^(−1/(d+4)), d = 1 or 2, Σ the covariance of the draws, so that correlated parameters are smoothed along
    their correlation. Smoothing widens a Gaussian by the factor √(1 + h²), 2.4 % of its sd at n = 1000, and rounds off
    hard edges. A contour of mass p is the smallest region of that density that holds p (`mass_levels`), not an ellipse
    and not a box of the marginal intervals. The numbers above the diagonal are quantiles of the draws themselves.

    Args:
        posteriors: one posterior as name -> draws `(n,)` or as an array `(n, dim)`; or several, as label -> one of
            those. Draws with more axes (obs, chain, draw) are flattened.
        names: of the columns where arrays are given; with named draws, which to show and in which order.
        truth: name -> value or one value a parameter: lines. weights: `(n,)`, or label -> `(n,)`.
        levels: masses of the contours, each between 0 and 1.
        labels: name -> what stands on the axis (with its unit). ranges: name -> (low, high) of the axis; from the
            smallest to the largest draw but for one in a thousand when omitted.
        digits: significant digits of the uncertainties in the titles. size: inches a panel.

    Returns:
        A matplotlib figure, without the global state of pyplot; `figure.savefig("corner.png")`.

    Raises:
        ValueError: fewer than ten draws, values that are not finite, posteriors with other parameters than the first,
            numbers of names, weights or true values that do not fit.

    Cost: one FFT of 96² cells a pair and posterior.
    """
    sets = _sets(posteriors, names)
    shown = list(next(iter(sets.values())))
    mass = [float(p) for p in levels]
    if not mass or not all(0 < p < 1 for p in mass):
        raise ValueError(f"levels are masses between 0 and 1, got {tuple(levels)}.")
    w = _weights(weights, sets)
    true = _true(truth, shown)
    limits = {k: _limits([s[k] for s in sets.values()], true.get(k), (ranges or {}).get(k)) for k in shown}
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        n = len(shown)
        figure = new_figure(max(size * n + 0.6, 3.6), max(size * n + 0.6, 3.2))
        grid_of_axes = figure.subplots(n, n, squeeze=False)
        for i, row in enumerate(shown):
            for j, column in enumerate(shown):
                axes = grid_of_axes[i, j]
                if j > i:
                    axes.set_axis_off()
                    continue
                axes.set_xlim(limits[column])
                if i == j:
                    _diagonal(axes, row, sets, w, limits[row], true.get(row), digits)
                else:
                    axes.set_ylim(limits[row])
                    _pair(axes, (row, column), sets, w, (limits[row], limits[column]), sorted(mass), true)
                _ticks(axes, (labels or {}).get(row, row), (labels or {}).get(column, column), i, j, n)
        _legend(figure, grid_of_axes, list(sets), bool(true), mass)
    return figure


def mass_levels(density: Array, masses: Sequence[float]) -> Array:
    """Densities whose upper level sets hold the given masses: ∫ p 1{p ≥ c_m} = m ∫ p.

    Args:
        density: non-negative values on cells of equal size, any shape. masses: each between 0 and 1.

    Returns:
        `(len(masses),)`. For a Gaussian in the plane c_m is (1 − m) of the peak.
    """
    values = np.sort(np.asarray(density, dtype=np.float64), axis=None)[::-1]
    held = np.cumsum(values)
    return np.array([values[np.searchsorted(held, m * held[-1])] for m in masses])


def _sets(posteriors: Any, names: Sequence[str]) -> dict[str, dict[str, Array]]:
    """label -> name -> draws."""
    several = isinstance(posteriors, Mapping) and all(
        isinstance(v, Mapping) or np.ndim(v) == 2 for v in posteriors.values()
    )
    given = dict(posteriors) if several else {"": posteriors}
    if not given:
        raise ValueError("A corner plot needs at least one posterior, none was given.")
    sets: dict[str, dict[str, Array]] = {}
    for label, draws in given.items():
        if not isinstance(draws, Mapping):
            values = np.asarray(draws, dtype=np.float64)
            if values.ndim != 2:
                raise ValueError(
                    f"Draws without names are (n, dim), got the shape {values.shape}; give that, or name -> (n,)."
                )
            if names and len(names) != values.shape[1]:
                raise ValueError(f"{len(names)} names were given for {values.shape[1]} parameters; give one each.")
            draws = dict(zip(names or [f"x[{k}]" for k in range(values.shape[1])], values.T))
        wanted = list(names) or list(draws)
        wanted = list(next(iter(sets.values()))) if sets else wanted
        if missing := [k for k in wanted if k not in draws]:
            raise ValueError(f"The posterior {label!r} has no parameter {missing[0]!r}, it has {', '.join(draws)}.")
        sets[label] = {k: np.asarray(draws[k], dtype=np.float64).reshape(-1) for k in wanted}
        counts = {k: len(v) for k, v in sets[label].items()}
        if len(set(counts.values())) != 1 or min(counts.values()) < 10:
            raise ValueError(f"A corner plot needs ten draws or more, as many for every parameter, got {counts}.")
        bad = {k: int((~np.isfinite(v)).sum()) for k, v in sets[label].items() if not np.isfinite(v).all()}
        if bad:
            raise ValueError(f"Draws that are not finite cannot be drawn ({bad}); leave the failed samples out.")
    return sets


def _weights(weights: Any, sets: dict[str, dict[str, Array]]) -> dict[str, Array]:
    """label -> normalised weights."""
    given = weights if isinstance(weights, Mapping) else dict.fromkeys(sets, weights)
    out = {}
    for label, draws in sets.items():
        n = len(next(iter(draws.values())))
        w = np.ones(n) if given.get(label) is None else np.asarray(given[label], dtype=np.float64).reshape(-1)
        if len(w) != n or not np.isfinite(w).all() or (w < 0).any() or w.sum() <= 0:
            raise ValueError(f"The posterior {label!r} of {n} draws needs {n} non-negative weights, got {len(w)}.")
        out[label] = w / w.sum()
    return out


def _true(truth: Any, shown: list[str]) -> dict[str, float]:
    if truth is None:
        return {}
    if isinstance(truth, Mapping):
        return {k: float(truth[k]) for k in shown if k in truth}
    values = np.asarray(truth, dtype=np.float64).reshape(-1)
    if len(values) != len(shown):
        raise ValueError(f"{len(values)} true values were given for {len(shown)} parameters; give one each.")
    return dict(zip(shown, values.tolist()))


def _limits(draws: list[Array], true: float | None, given: tuple[float, float] | None) -> tuple[float, float]:
    if given is not None:
        return float(given[0]), float(given[1])
    ends = [q for d in draws for q in np.quantile(d, (0.001, 0.999))] + ([] if true is None else [true])
    low, high = float(min(ends)), float(max(ends))
    reach = high - low or 1e-3 * abs(high) or 1.0  # one value for all draws
    return low - 0.06 * reach, high + 0.06 * reach


def _density(draws: list[Array], weights: Array, limits: Sequence[tuple[float, float]]) -> tuple[Array, list[Array]]:
    """Smoothed histogram in one or two dimensions, and the centres of its cells."""
    d, n = len(draws), 1 / np.square(weights).sum()
    spread = np.atleast_2d(np.cov(np.stack(draws), aweights=weights))
    edges = []
    for low, high in limits:
        extra = _MARGIN * (high - low)
        edges.append(np.linspace(low - extra, high + extra, _CELLS + 1))
    counts, _ = np.histogramdd(np.stack(draws, 1), bins=edges, weights=weights)
    steps = [e[1] - e[0] for e in edges]
    covariance = (_WIDTH * n ** (-1 / (d + 4))) ** 2 * spread
    covariance = covariance + np.diag([(0.8 * s) ** 2 for s in steps])  # wide enough for the cells, or it rings
    k = np.stack(np.meshgrid(*[2 * np.pi * np.fft.fftfreq(_CELLS, s) for s in steps], indexing="ij"))
    gain = np.exp(-0.5 * np.einsum("i...,ij,j...->...", k, covariance, k))
    smooth = np.fft.ifftn(np.fft.fftn(counts) * gain).real
    return smooth.clip(0), [0.5 * (e[1:] + e[:-1]) for e in edges]


def _diagonal(
    axes: Axes,
    name: str,
    sets: dict[str, dict[str, Array]],
    weights: dict[str, Array],
    limits: tuple[float, float],
    true: float | None,
    digits: int,
) -> None:
    for k, (label, draws) in enumerate(sets.items()):
        colour = COLOURS[k % len(COLOURS)]
        density, (x,) = _density([draws[name]], weights[label], [limits])
        axes.plot(x, density / density.max(), color=colour, lw=1.5)
        axes.fill_between(x, density / density.max(), color=colour, alpha=0.12, lw=0)
        low, middle, high = _quantiles(draws[name], weights[label], (0.16, 0.5, 0.84))
        if len(sets) == 1:
            for q in (low, high):
                axes.axvline(q, color=colour, lw=0.9, ls=(0, (4, 3)))
        axes.annotate(
            _number(low, middle, high, digits),
            (0.5, 1.04 + 0.14 * (len(sets) - 1 - k)),
            xycoords="axes fraction",
            ha="center",
            va="bottom",
            fontsize=9,
            color=INK if len(sets) == 1 else colour,
        )
    if true is not None:
        axes.axvline(true, color=TRUTH, lw=1.2)
    axes.set_ylim(0, 1.1)


def _pair(
    axes: Axes,
    pair: tuple[str, str],
    sets: dict[str, dict[str, Array]],
    weights: dict[str, Array],
    limits: tuple[tuple[float, float], tuple[float, float]],
    mass: list[float],
    true: dict[str, float],
) -> None:
    for k, (label, draws) in enumerate(sets.items()):
        colour = COLOURS[k % len(COLOURS)]
        density, (y, x) = _density([draws[pair[0]], draws[pair[1]]], weights[label], limits)
        heights = mass_levels(density, mass)[::-1]  # from the outermost inwards, as matplotlib wants them
        heights = np.maximum.accumulate(heights + np.arange(len(heights)) * 1e-12 * density.max())
        for depth, height in enumerate(heights):
            axes.contourf(x, y, density, [height, 2 * density.max()], colors=[colour], alpha=0.14 + 0.1 * depth)
        axes.contour(x, y, density, heights, colors=[colour], linewidths=1.1)
    for value, line in ((true.get(pair[1]), axes.axvline), (true.get(pair[0]), axes.axhline)):
        if value is not None:
            line(value, color=TRUTH, lw=1.0)


def _quantiles(draws: Array, weights: Array, at: tuple[float, ...]) -> Array:
    """Weighted quantiles, linear between the midpoints of the steps of the distribution function."""
    order = np.argsort(draws)
    middle = np.cumsum(weights[order]) - 0.5 * weights[order]
    return np.interp(at, middle, draws[order])


def _number(low: float, middle: float, high: float, digits: int) -> str:
    """Median with its distances to the 16 and 84 % quantiles, rounded to the digits of the smaller one."""
    sides = [v for v in (high - middle, middle - low) if v > 0]
    if not sides:
        return f"{middle:g}"
    places = max(digits - 1 - int(np.floor(np.log10(min(sides)))), 0)
    if places > 6 or abs(middle) >= 1e6:
        return rf"${middle:.3g}^{{+{high - middle:.2g}}}_{{-{middle - low:.2g}}}$"
    return rf"${middle:.{places}f}^{{+{high - middle:.{places}f}}}_{{-{middle - low:.{places}f}}}$"


def _ticks(axes: Axes, row: str, column: str, i: int, j: int, n: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(3, prune="both"))
    if i == j:
        axes.set_yticks([])
    else:
        axes.yaxis.set_major_locator(MaxNLocator(3, prune="both"))
    if i == n - 1:
        axes.set_xlabel(column)
        axes.tick_params(axis="x", rotation=40)
    else:
        axes.tick_params(labelbottom=False)
    if j == 0 and i > 0:
        axes.set_ylabel(row)
    elif i != j:
        axes.tick_params(labelleft=False)


def _legend(figure: Figure, grid_of_axes: Any, names: list[str], truth: bool, mass: list[float]) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=COLOURS[k % len(COLOURS)], lw=1.6, label=n) for k, n in enumerate(names) if n]
    lines += [Line2D([], [], color=TRUTH, lw=1.2, label="truth")] if truth else []
    n = len(grid_of_axes)
    note = f"contours hold {' and '.join(f'{100 * p:g} %' for p in sorted(mass))}"
    if n == 1:
        if lines:
            grid_of_axes[0, 0].legend(handles=lines, frameon=False, fontsize=8.5)
        return
    figure.legend(  # not of the axes: the layout would make room for it in every row
        handles=lines or [Line2D([], [], ls="none")], title=note, frameon=False, fontsize=10, loc="upper right"
    )
