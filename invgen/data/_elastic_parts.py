"""Rock physics of the elastic sections: velocity and density trends of three rocks, and columns of beds in three properties.

Lengths are metres, velocities km/s, densities g/cm³; what a bed adds is a natural logarithm relative to the trend.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from invgen.data._geology_parts import _beds, log_uniform

Array = np.ndarray
Rng = np.random.Generator

SHALE, SAND, CARBONATE = range(3)
# vs = a vp² + b vp + c [km/s] of water-filled rocks: Greenberg & Castagna 1992, table 1 (shale, sandstone, limestone)
_VS = np.array([[0.0, 0.76969, -0.86735], [0.0, 0.80416, -0.85588], [-0.05508, 1.01677, -1.03049]])
# ρ = d vp^f [g/cm³]: Gardner et al. 1974 by lithology, as fitted in Castagna et al. 1993 (see Mavko et al. 2009, 7.10)
_RHO = np.array([[1.75, 0.265], [1.66, 0.261], [1.36, 0.386]])
# pairs of rocks in a formation with their frequency, slower member first, and how often the order is the other way round
_PAIRS = (
    (SHALE, SAND, 0.58, 0.4),
    (SHALE, CARBONATE, 0.2, 0.05),
    (SAND, CARBONATE, 0.1, 0.1),
    (SHALE, SHALE, 0.12, 0.0),
)


@dataclass(frozen=True)
class Regime:
    """What is common to a section: how its beds leave the trends, in natural logarithms.

    Attributes:
        vs_slope, rho_slope: ∂ ln vs/∂ ln vp and ∂ ln ρ/∂ ln vp from bed to bed.
        vs_scatter, rho_scatter: standard deviation of what vp does not explain, bed by bed.
        vs_shift, rho_shift: local calibration of the trends.
        soft: vs/vp that loose sediments keep where the regressions of rocks tend to zero.
    """

    vs_slope: float
    rho_slope: float
    vs_scatter: float
    rho_scatter: float
    vs_shift: float
    rho_shift: float
    soft: float

    @classmethod
    def draw(cls, rng: Rng) -> Regime:
        return cls(
            vs_slope=rng.uniform(0.7, 1.7),  # the regressions have 1.4 to 1.9; cement, fluid and clay lower it
            rho_slope=rng.uniform(0.08, 0.4),  # Gardner: 0.25
            vs_scatter=log_uniform(rng, 0.01, 0.06),
            rho_scatter=log_uniform(rng, 0.005, 0.03),
            vs_shift=rng.normal(0.0, 0.05),
            rho_shift=rng.normal(0.0, 0.015),
            soft=rng.uniform(0.15, 0.45),
        )


def trend_tables(ln_vp: Array, regime: Regime) -> tuple[Array, Array]:
    """ln vs and ln ρ `(3, n)` of shale, sand and carbonate where the trend of ln vp is `(n,)`.

    vs is the regression of the rock, or `soft`·vp where that is larger (loose sediments, Hamilton 1979); the two blend
    over a few per cent of vp.
    """
    vp = np.exp(ln_vp.astype(np.float64))
    vs = np.maximum(_VS[:, :1] * vp**2 + _VS[:, 1:2] * vp + _VS[:, 2:], 0.0)
    vs = (vs**8 + (regime.soft * vp) ** 8) ** 0.125
    rho = _RHO[:, :1] * vp ** _RHO[:, 1:]
    return (np.log(vs) + regime.vs_shift).astype(np.float32), (np.log(rho) + regime.rho_shift).astype(np.float32)


def _rocks(rng: Rng, value: Array) -> Array:
    """The rock of every bed of one formation: two rocks, told apart by velocity except for one bed in ten."""
    pair = _PAIRS[int(rng.choice(len(_PAIRS), p=[p[2] for p in _PAIRS]))]
    slow, fast = pair[:2] if rng.random() >= pair[3] else pair[1::-1]
    is_fast = (value > np.median(value)) ^ (rng.random(value.size) < 0.1)
    return np.where(is_fast, fast, slow)


def _residuals(rng: Rng, n: int, regime: Regime, formation: tuple[float, float]) -> Array:
    """`(2, n)` of ln vs and ln ρ that vp does not explain."""
    scatter = np.array([[regime.vs_scatter], [regime.rho_scatter]])
    return scatter * rng.standard_normal((2, n)) + np.array(formation)[:, None]


def _minerals(rng: Rng, bed: Array, rock: Array, change: Array) -> None:
    """Gas in a few sands, and rare stringers that follow no trend; adds to `change (3, n)` and thins the beds in place."""
    n = bed.size
    gas = (rock == SAND) & (rng.random(n) < 0.05)
    for row, (low, high) in enumerate(
        ((-0.2, -0.06), (0.0, 0.03), (-0.07, -0.02))
    ):  # Gassmann: vp and ρ fall, vs does not
        change[row] += gas * rng.uniform(low, high, n)
    odd = rng.random(n) < rng.choice([0.0, 0.03])
    coal = rng.random() < 0.5  # coal, or dense cement (anhydrite, siderite): one kind a formation
    for row, (low, high) in enumerate(((-0.2, 0.0), (-0.2, 0.0), (-0.5, -0.25)) if coal else ((0.05, 0.3),) * 3):
        change[row] += odd * rng.uniform(low, high, n)
    bed[odd] = np.minimum(bed[odd], 20.0)


def elastic_columns(rng: Rng, length: float, step: float, window: float, regime: Regime) -> tuple[Array, Array]:
    """Two related columns over `length` [m], sampled every `step`: `(5, n)` each, averaged over `window`.

    Rows: what beds add to ln vp, ln vs and ln ρ, and the shares of sand and of carbonate. Boundaries are shared; a
    section blends the two columns laterally, so that facies change along beds. Averages are of logarithms (not
    Backus's of stiffness: for the contrasts here the difference is second order).
    """
    beds: list[Array] = []
    parts: list[tuple[Array, Array]] = []
    total, calm, spread = 0.0, rng.uniform(0.35, 1.15), rng.uniform(0.03, 0.1)
    offset = rng.normal(0.0, spread)
    slopes = np.array([[1.0], [regime.vs_slope], [regime.rho_slope]])
    while total < length:
        bed, value, drift = _beds(rng, float(np.clip(np.exp(rng.normal(4.9, 0.6)), 50.0, 420.0)))
        offset = 0.4 * offset + rng.normal(0.0, spread)
        rock = _rocks(rng, value)
        formation = (rng.normal(0.0, 0.03), rng.normal(0.0, 0.012))
        residual = _residuals(rng, bed.size, regime, formation)
        middle = slopes * (calm * value + offset)
        middle[1:] += residual
        # the same beds some kilometres on: other values, other residuals, now and then another rock; no gas
        other = slopes * (rng.uniform(0.5, 1.1) * (calm * value + offset) + rng.normal(0.0, 0.03, bed.size))
        other[1:] += 0.6 * residual + 0.8 * _residuals(rng, bed.size, regime, (0.0, 0.0))
        moved = np.where(rng.random(bed.size) < 0.25, rng.permutation(rock), rock)
        _minerals(rng, bed, rock, middle)
        shares = [np.stack([r == SAND, r == CARBONATE]).astype(np.float64) for r in (rock, moved)]
        slant = slopes * (calm * drift)
        beds.append(bed)
        parts.append(
            (
                np.concatenate([middle, shares[0], other, shares[1]]),
                np.concatenate([slant, 0 * shares[0], slant, 0 * shares[1]]),
            )
        )
        total += float(bed.sum())
    bed = np.concatenate(beds)
    value, drift = (np.concatenate([p[k] for p in parts], axis=1) for k in (0, 1))
    edges = np.concatenate(([0.0], np.cumsum(bed)))
    depth = np.arange(int(np.ceil(length / step)) + 1) * step
    which = np.minimum(np.searchsorted(edges, depth, side="right") - 1, bed.size - 1)
    sampled = value[:, which] + drift[:, which] * ((depth - edges[which]) / bed[which] - 0.5)
    width = max(1, round(window / step))
    padded = np.pad(sampled, ((0, 0), (width // 2, width - width // 2 - 1)), mode="edge")
    sums = np.cumsum(np.pad(padded, ((0, 0), (1, 0))), axis=1)
    averaged = (sums[:, width:] - sums[:, :-width]) / width
    return averaged[:5].astype(np.float32), averaged[5:].astype(np.float32)


def soft_limits(m: Array, low: float, low_knee: float, high_knee: float, high: float) -> None:
    """Bring m smoothly between `low` and `high`, in place; what lies between the knees stays."""
    for knee, end in ((high_knee, high), (low_knee, low)):
        room, sign = np.float32(abs(end - knee)), np.float32(np.sign(end - knee))
        over = np.maximum(sign * (m - np.float32(knee)), np.float32(0.0))
        m -= sign * over * (over / (room + over))
