r"""Seeded, unlimited generator of 2-D elastic sections: ln vp, ln vs and ln ρ of layered, folded and faulted rocks.

The geometry is that of `GeologySections` (folds, faults, unconformities, wedges, pinch-outs): every pixel is carried to
its depositional coordinate and reads a column of beds there. The column is elastic: with b the burial and f the rock,

    ln vp = t(b) + δ_p,
    ln vs = ln vs_f(t(b)) + β_s δ_p + ε_s,          ln ρ = ln ρ_f(t(b)) + β_ρ δ_p + ε_ρ,

t a compaction trend, δ_p what the bed adds, vs_f and ρ_f the regressions of shale, sand and carbonate, and ε_s, ε_ρ bed by
bed (and formation by formation) what vp does not explain. A section draws β_s, β_ρ, the size of ε and a local shift of
the regressions, so that the three properties are correlated, but no function of each other, and by how much differs.

| | range | after |
|---|---|---|
| vs_f | shale, sandstone and limestone regressions of water-filled rocks (the mud-rock line by lithology) | Castagna et al. 1985, Geophysics 50, 571; Greenberg & Castagna 1992, Geophys. Prosp. 40, 195 |
| loose sediments | vs/vp of 0.15 to 0.45 at the least | Hamilton 1979, JASA 66, 1093 |
| ρ_f | d vp^f by lithology | Gardner et al. 1974, Geophysics 39, 770; Castagna et al. 1993 |
| β_s, β_ρ | 0.7 to 1.7 (the regressions have 1.4 to 1.9), 0.08 to 0.4 (Gardner: 0.25) | as above |
| sd of ε_s, ε_ρ | 1 to 6 %, 0.5 to 3 %, log-uniform; 3 % and 1.2 % more from formation to formation | residuals of the regressions |
| gas | 5 % of the sand beds: vp −6 to −20 %, ρ −2 to −7 %, vs 0 to +3 % | Gassmann 1951 |
| coal, dense cement | thin beds in half of the formations, off every trend | Mavko et al. 2009, Rock Physics Handbook, A.4 |

No salt and no water column: a fluid has no ln vs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from invgen.data import _elastic_parts as rock
from invgen.data import _geology_parts as parts
from invgen.data._stream import Stream, check_lengths, check_range, check_shape
from invgen.data.geology import GeologySections
from invgen.grid import Grid

__all__ = ["ElasticSections"]

Array = np.ndarray

_EXTENT = (
    1500.0,
    1500.0,
)  # m a section has at the least: faults and folds are placed by the section, not by the window
_TREND_STEP = 2.0
_VP = tuple(float(v) for v in np.log([1.45, 1.6, 5.2, 6.0]))
_RATIO = tuple(float(v) for v in np.log([0.08, 0.14, 0.62, 0.7]))  # vs/vp; 0.7 is Poisson's ratio 0.02
_RHO = tuple(float(v) for v in np.log([1.2, 1.7, 2.8, 3.4]))


@dataclass(frozen=True)
class ElasticSections(Stream):
    """Random elastic sections (ln vp, ln vs, ln ρ), velocities in km/s and density in g/cm³.

    An item is a window of a section of at least 1500 × 1500 m, at a depth of its own, that is drawn for it alone.

    Attributes:
        shape: (nz, nx) samples.
        spacing: (dz, dx) in m. Sizes of structures and beds are drawn in metres; beds are averaged over a sample.
        depth: range in m of the burial of the first row of the section, drawn uniformly.

    Raises:
        ValueError: sizes, lengths or depths that make no section.

    Cost: 6 ms of one CPU core for 64×64 samples of 15 × 5 m.

    References: module docstring.
    """

    shape: tuple[int, int] = (64, 64)
    spacing: tuple[float, float] = (10.0, 10.0)
    depth: tuple[float, float] = (0.0, 2000.0)

    def __post_init__(self) -> None:
        check_shape(self.shape, 2)
        check_lengths("spacing", self.spacing, 2, "m")
        check_range("depth", self.depth, 0.0, 10_000.0, "m")

    @property
    def grid(self) -> Grid:
        """Axes z and x in m; channels ln_vp, ln_vs, ln_rho of km/s and g/cm³."""
        return Grid(
            self.shape,
            self.spacing,
            axes=("z", "x"),
            units=("m", "m"),
            channels=("ln_vp", "ln_vs", "ln_rho"),
            channel_units=("ln km/s", "ln km/s", "ln g/cm³"),
        )

    def _draw(self, seed: int, numbers: range) -> Array:
        return np.stack([self._window(rng) for rng in self._generators(seed, numbers)])

    def _window(self, rng: np.random.Generator) -> Array:
        (nz, nx), (dz, dx) = self.shape, self.spacing
        full = max(nz, math.ceil(_EXTENT[0] / dz)), max(nx, math.ceil(_EXTENT[1] / dx))
        top, left = int(rng.integers(full[0] - nz + 1)), int(rng.integers(full[1] - nx + 1))
        section = GeologySections(full, self.spacing, depth=rng.uniform(*self.depth))
        x = (np.arange(full[1]) * dx).astype(np.float32)
        z = (section.depth + np.arange(full[0]) * dz).astype(np.float32)
        nothing = np.zeros(full[1], dtype=np.float32)
        strata, package = section._strata(rng, x, z, nothing, nothing)
        rows, columns = slice(top, top + nz), slice(left, left + nx)
        strata = [s[rows, columns] for s in strata]
        return self._fill(rng, strata, package[rows, columns], z[rows], x[columns])

    def _fill(self, rng: np.random.Generator, strata: list[Array], package: Array, z: Array, x: Array) -> Array:
        """(3, nz, nx): beds, trend and texture at the depositional coordinates `strata` of each package."""
        dz, dx = self.spacing
        regime = rock.Regime.draw(rng)
        blocky = rng.random() < 0.4  # interval models, without texture or lateral change, are geology too
        burial = np.repeat(z[:, None], x.size, axis=1)
        mix, step = np.float32(rng.uniform(0.0, 0.6)), dz / 4.0
        here = np.empty(package.shape, dtype=np.float32)
        firsts: list[Array] = []
        seconds: list[Array] = []
        used, jump = 0.0, 0.0
        for k, zeta in enumerate(strata):
            inside = package == k
            if not inside.any():
                continue
            value = zeta[inside]
            low, high = float(value.min()) - dz, float(value.max()) + dz
            pair = rock.elastic_columns(rng, high - low, step, dz, regime)
            for column, kept in zip(pair, (firsts, seconds), strict=True):
                # older rocks under an unconformity are usually harder
                column[:3] += np.float32(jump) * np.array([[1.0], [regime.vs_slope], [regime.rho_slope]], np.float32)
                kept.append(column)
            here[inside] = value - np.float32(low - used)
            # tilted beds carry part of their depositional burial with them: uplifted blocks stay fast
            burial[inside] += mix * np.clip(value - burial[inside], -1500.0, 1500.0)
            used += pair[0].shape[1] * step
            jump += max(0.0, rng.normal(0.05, 0.08))
        np.maximum(burial, 0.0, out=burial)
        trend = parts.compaction_table(rng, np.arange(0.0, float(burial.max()) + 2 * _TREND_STEP, _TREND_STEP))
        level = (burial * (1.0 / _TREND_STEP)).astype(np.int32)
        index = (here * (1.0 / step)).astype(np.int32)
        first = np.concatenate(firsts, axis=1)
        beds = first[:, index]
        if not blocky:
            change = (np.concatenate(seconds, axis=1) - first)[:, index]
            beds += change * parts.facies_blend(rng, here, x, dx)
        m = beds[:3]
        sand, carbonate = beds[3], beds[4]
        m[0] += trend[level]
        for channel, table in zip(m[1:], rock.trend_tables(trend, regime), strict=True):
            differences = (table - table[:1])[:, level]
            channel += table[0][level] + sand * differences[1] + carbonate * differences[2]
        if not blocky:
            self._texture(rng, m, index, x, step, regime)
        rock.soft_limits(m[0], *_VP)
        ratio = m[1] - m[0]
        rock.soft_limits(ratio, *_RATIO)
        m[1] = m[0] + ratio
        rock.soft_limits(m[2], *_RHO)
        return m

    def _texture(
        self, rng: np.random.Generator, m: Array, index: Array, x: Array, step: float, regime: rock.Regime
    ) -> None:
        """Bed-parallel texture below the beds: one pattern of all properties, and one of vs and of ρ alone."""
        size, rows = parts.log_uniform(rng, 0.002, 0.02), 211
        place = (index // max(1, round(max(self.spacing[0], 4.0) / step))) % rows
        column = np.arange(x.size)
        common = parts.texture_tile(rng, rows, x)[place, column]
        for channel, slope, own in zip(m, (1.0, regime.vs_slope, regime.rho_slope), (0.0, 0.6, 0.3), strict=True):
            channel += np.float32(size * slope) * common
            if own:
                channel += np.float32(size * own) * parts.texture_tile(rng, rows, x)[place, column]
