"""Figures of diagnostics: each result draws itself with these, on given axes or new ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from invgen.diagnostics.battery import Calibration
    from invgen.diagnostics.chains import ChainCheck
    from invgen.diagnostics.classifier import ClassifierTest
    from invgen.diagnostics.distances import SlicedDistance
    from invgen.diagnostics.kernels import TwoSampleTest
    from invgen.diagnostics.rank_tests import RankTest
    from invgen.diagnostics.residuals import ResidualChi2
    from invgen.diagnostics.scores import Score
    from invgen.diagnostics.superchains import SuperchainCheck

__all__ = [
    "calibration_figure",
    "chain_figure",
    "classifier_figure",
    "permutation_figure",
    "quantile_figure",
    "rank_figure",
    "residual_figure",
    "score_figure",
    "superchain_figure",
]

CURVE, BAND, FAILED, LAW = "#14507a", "#cfe0ee", "#c0392b", "#1f2933"
REDS = ("#c0392b", "#e67e22", "#8e44ad", "#7a4b12")


def _axes(ax: Axes | None, width: float = 5.2, height: float = 3.6) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def _percent(level: float) -> str:
    return f"{100 * (1 - level):.6g} %"


def _number(value: float) -> str:
    """Three digits, powers of ten as such."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return rf"${mantissa}\times 10^{{{int(exponent)}}}$"


def _legend(ax: Axes, columns: int = 1) -> None:
    """Legible over curves."""
    ax.legend(fontsize="small", framealpha=0.85, edgecolor="none", handlelength=1.4, ncols=columns)


def rank_figure(result: RankTest, ax: Axes | None = None, *, kind: str = "difference") -> Axes:
    """Ranks of a test, with the band that all curves together stay in.

    Args:
        result: test. ax: axes; new ones when omitted.
        kind: "difference": empirical distribution minus the uniform one; "coverage": observed against nominal coverage;
            "histogram": of up to six quantities, the worst ones.

    Raises:
        ValueError: an unknown kind.
    """
    ax = _axes(ax)
    if kind == "histogram":
        return _histogram(result, ax)
    if kind not in ("difference", "coverage"):
        raise ValueError(f"The kind of a rank figure is 'difference', 'coverage' or 'histogram', got {kind!r}.")
    z, (low, high) = result.levels, result.band
    base = z if kind == "difference" else np.zeros_like(z)
    ends = np.concatenate([[0.0], z, [1.0]])

    def closed(values: np.ndarray) -> np.ndarray:
        """The curve with its ends, where it is known."""
        return np.concatenate([[0.0], values - base, [0.0 if kind == "difference" else 1.0]])

    ax.fill_between(
        ends, closed(low), closed(high), color=BAND, lw=0, label=f"{_percent(result.level)} band, all curves"
    )
    ax.plot([0, 1], [0, 0] if kind == "difference" else [0, 1], color=LAW, lw=0.8)
    failing = set(result.failing)
    order = np.argsort(result.p_values)[::-1]  # the worst on top
    if len(order) > 200:
        order = order[-200:]
    good = [i for i in order if result.names[i] not in failing]
    bad = [i for i in order if result.names[i] in failing]
    for k, i in enumerate(good):
        label = f"{len(result.names) - len(failing)} inside" if k == 0 and len(result.names) > 1 else result.names[i]
        ax.plot(
            ends, closed(result.observed[i]), color=CURVE, lw=1.1, alpha=0.8, label=label if k == 0 else "_nolegend_"
        )
    for k, i in enumerate(reversed(bad)):  # k = 0 is the worst
        named = k < len(REDS)
        label = f"{result.names[i]}, p = {_number(float(result.adjusted[i]))}" if named else "_nolegend_"
        ax.plot(
            ends,
            closed(result.observed[i]),
            color=REDS[k] if named else FAILED,
            lw=1.4 if named else 0.6,
            label=label,
            zorder=3 if named else 2,
        )
    more = len(failing) - len(REDS)
    if more > 0:
        ax.plot([], [], color=FAILED, lw=0.6, label=f"and {more} more")
    ax.set_xlim(0, 1)
    folded = result.folded or kind == "coverage"
    ax.set_xlabel("nominal coverage" if folded else "rank / number of draws")
    if kind == "coverage":
        ax.set_ylim(0, 1)
        ax.set_ylabel("observed coverage")
    else:
        ax.set_ylabel("observed − nominal coverage" if folded else "empirical − uniform distribution")
    ax.set_title(f"{result.title}: {'passed' if result.passed else 'FAILED'}")
    _legend(ax)
    return ax


def _histogram(result: RankTest, ax: Axes) -> Axes:
    from scipy import stats

    top = result.num_draws + 1
    bins = max(2, min(20, top, result.n_sim // 10))
    cuts = np.round(np.arange(bins + 1) * top / bins).astype(int)
    share = np.diff(cuts) / top
    order = np.argsort(result.p_values)[:6]
    # each bar of each histogram: a Bonferroni share of the level
    alpha = result.level / (bins * len(result.names))
    low = stats.binom.ppf(alpha / 2, result.n_sim, share) / share / result.n_sim
    high = stats.binom.isf(alpha / 2, result.n_sim, share) / share / result.n_sim
    edges = cuts / top
    ax.fill_between(
        edges,
        np.append(low, low[-1]),
        np.append(high, high[-1]),
        step="post",
        color=BAND,
        lw=0,
        label=f"{_percent(result.level)} band, all bars",
    )
    ax.axhline(1, color=LAW, lw=0.8)
    for k, i in enumerate(order):
        density = np.histogram(result.ranks[:, i], cuts - 0.5)[0] / share / result.n_sim
        color = CURVE if len(order) == 1 else f"C{k}"
        ax.stairs(density, edges, color=color, lw=1.3, label=result.names[i])
    ax.set_xlim(0, 1)
    ax.set_ylim(0, None)
    ax.set_xlabel("|2 rank − draws| / draws" if result.folded else "rank / number of draws")
    ax.set_ylabel("density")
    shown = f" (worst {len(order)} of {len(result.names)})" if len(result.names) > len(order) else ""
    ax.set_title(f"{result.title}: {'passed' if result.passed else 'FAILED'}{shown}")
    _legend(ax, columns=2 if len(order) > 3 else 1)
    return ax


def calibration_figure(result: Calibration, axes: Sequence[Axes] | None = None) -> Sequence[Axes]:
    """One panel a test of a family."""
    if axes is None:
        import matplotlib.pyplot as plt

        count = len(result.tests)
        axes = list(plt.subplots(1, count, figsize=(5.2 * count, 3.8), layout="constrained", squeeze=False)[1][0])
    if len(axes) != len(result.tests):
        raise ValueError(f"{len(result.tests)} tests need as many axes, got {len(axes)}.")
    for test, ax in zip(result.tests, axes, strict=True):
        rank_figure(test, ax)
    return axes


def score_figure(result: Score, ax: Axes | None = None) -> Axes:
    """Mean score of each coordinate with its standard error, or the histogram of a single score."""
    ax = _axes(ax)
    mean, error = np.atleast_1d(result.mean).reshape(-1), np.atleast_1d(result.mc_error).reshape(-1)
    if len(mean) > 1:
        ax.errorbar(np.arange(len(mean)), mean, _bars(error), fmt="o", ms=3, color=CURVE, label="mean ± standard error")
        ax.set_xlabel("coordinate")
        ax.set_ylabel(f"{result.name} [units of x]")
        ax.set_ylim(0, None)
    else:
        ax.hist(result.values.reshape(-1), bins="auto", color=BAND, edgecolor=CURVE, lw=0.5)
        ax.axvline(mean[0], color=FAILED, lw=1.4, label=f"mean {_number(float(mean[0]))} ± {_number(float(error[0]))}")
        ax.set_xlabel(f"{result.name} [units of x]")
        ax.set_ylabel("simulations")
    ax.set_title(f"{result.name[:1].upper()}{result.name[1:]} of {len(result.values)} simulations")
    _legend(ax)
    return ax


def _bars(error: np.ndarray) -> Any:
    """Error bars, none where there is no standard error."""
    return error if np.isfinite(error).all() else None


def quantile_figure(result: SlicedDistance, ax: Axes | None = None) -> Axes:
    """Quantiles of both samples along the direction in which they differ most."""
    ax = _axes(ax, 4.4, 4.2)
    first, second = result.quantiles[1]
    span = [min(first[0], second[0]), max(first[-1], second[-1])]
    ax.plot(span, span, color=LAW, lw=0.8, label="equal")
    ax.plot(first, second, ".", ms=4, color=CURVE, label=f"quantiles, W = {_number(float(result.per_direction.max()))}")
    ax.set_xlabel("first sample, along the worst direction")
    ax.set_ylabel("second sample, same direction")
    ax.set_title(f"{result.name}: {_number(result.value)}")
    _legend(ax)
    ax.set_aspect("equal", adjustable="datalim")
    return ax


def permutation_figure(result: TwoSampleTest, ax: Axes | None = None) -> Axes:
    """Permuted distances with the observed one."""
    ax = _axes(ax)
    if len(result.null):
        ax.hist(result.null, bins="auto", color=BAND, edgecolor=CURVE, lw=0.5, label="samples of one law (permuted)")
    label = f"observed, p = {_number(result.p_value)}" if len(result.null) else "observed"
    ax.axvline(result.value, color=CURVE if result.passed else FAILED, lw=1.6, label=label)
    ax.set_xlabel(
        result.name if np.isnan(result.bandwidth) else f"{result.name}, bandwidth {_number(result.bandwidth)}"
    )
    ax.set_ylabel("permutations")
    ax.set_title(f"{result.name}: {'passed' if result.passed else 'FAILED'}")
    _legend(ax)
    return ax


def classifier_figure(result: ClassifierTest, ax: Axes | None = None) -> Axes:
    """Accuracy of each fold."""
    from scipy import stats

    ax = _axes(ax)
    k = len(result.folds)
    width = float(stats.norm.isf(result.level)) * np.sqrt((1 + k / (k - 1)) / (4 * result.n_points))
    ax.axhspan(0.5 - width, 0.5 + width, color=BAND, lw=0, label=f"mean of guesses, {_percent(result.level)}")
    ax.axhline(0.5, color=LAW, lw=0.8)
    ax.plot(1 + np.arange(k), result.folds, "o", color=CURVE, label="folds")
    ax.axhline(result.accuracy, color=CURVE if result.passed else FAILED, lw=1.6, label=f"mean {result.accuracy:.3f}")
    ax.set_ylim(min(0.4, result.folds.min() - 0.02), 1.0)
    ax.set_xticks(1 + np.arange(k))
    ax.set_xlabel("fold")
    ax.set_ylabel("accuracy")
    ax.set_title(f"Classifier two-sample test: {'passed' if result.passed else 'FAILED'}")
    _legend(ax)
    return ax


def residual_figure(result: ResidualChi2, ax: Axes | None = None) -> Axes:
    """χ² of the draws per degree of freedom, and the law of the truth's."""
    from scipy import stats

    ax = _axes(ax)
    n = result.n
    ax.hist(
        result.values.reshape(-1) / n,
        bins="auto",
        density=True,
        color=BAND,
        edgecolor=CURVE,
        lw=0.5,
        label="posterior draws",
    )
    grid = np.linspace(float(stats.chi2.ppf(1e-4, n)), float(stats.chi2.isf(1e-4, n)), 300)
    ax.plot(grid / n, stats.chi2.pdf(grid, n) * n, color=LAW, lw=1.2, label=f"law over data, {n} degrees of freedom")
    color = CURVE if result.passed else FAILED
    ax.axvline(
        result.mean / n, color=color, lw=1.6, label=f"mean {_number(result.mean / n)}, p = {_number(result.p_value)}"
    )
    ax.set_xlabel("residual χ² / degrees of freedom")
    ax.set_ylabel("density")
    ax.set_title(f"Residuals of {result.values.shape[0]} observations: {'passed' if result.passed else 'FAILED'}")
    _legend(ax)
    return ax


def chain_figure(result: ChainCheck, ax: Axes | None = None) -> Axes:
    """Effective sample size against R-hat of every coordinate, with the limits."""
    ax = _axes(ax)
    r = np.atleast_1d(result.rhat).reshape(-1)
    for values, color, marker, name in (
        (result.ess_bulk, CURVE, "o", "bulk"),
        (result.ess_tail, "#e67e22", "^", "tail"),
    ):
        ax.plot(r, np.atleast_1d(values).reshape(-1), marker, ms=4, color=color, alpha=0.7, ls="none", label=name)
    ax.axvline(result.rhat_limit, color=LAW, lw=0.8, ls="--", label="limits")
    ax.axhline(result.ess_limit, color=LAW, lw=0.8, ls="--")
    ax.set_yscale("log")
    ax.set_xlabel("rank-normalised split R-hat")
    ax.set_ylabel("effective sample size")
    ax.set_title(f"{result.num_chains} chains of {result.num_draws} draws: {'passed' if result.passed else 'FAILED'}")
    _legend(ax)
    return ax


def superchain_figure(result: SuperchainCheck, ax: Axes | None = None) -> Axes:
    """Nested R-hat over coordinates with its limit."""
    ax = _axes(ax)
    values = np.atleast_1d(result.nested_rhat).ravel()
    finite = values[np.isfinite(values)]
    if len(finite):
        ax.hist(finite, bins=min(40, max(5, len(finite) // 5)), color=BAND, edgecolor=CURVE, lw=0.5)
    ax.axvline(result.limit, color=CURVE if result.passed else FAILED, lw=1.6, label=f"limit {result.limit:.4f}")
    ax.set_xlabel("nested R-hat")
    ax.set_ylabel("coordinates")
    ax.set_title(
        f"{result.superchains} superchains of {result.chains} chains: {'passed' if result.passed else 'FAILED'}"
    )
    _legend(ax)
    return ax
