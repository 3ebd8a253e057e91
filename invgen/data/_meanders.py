"""Migration of meandering channels after Howard and Knutson (1984), many periodic belts at once.

Lengths are in channel widths W and times in W/k_l (k_l: the migration constant), which leaves one number of a river in
the equations: alpha = 2 k C_f W/D, the rate at which the influence of upstream curvature decays (k = 1, C_f: friction,
D: depth).

    R0(s) = W·curvature(s)                                                       nominal rate, in units of k_l
    R1(s) = sinuosity^(−2/3) [Ω R0(s) + Γ ∫ R0(s − ξ) e^(−αξ) dξ / ∫ e^(−αξ) dξ]  Ω = −1, Γ = 2.5

and the centreline moves by R1 along its outward normal. A small sinusoid of wavenumber κ grows at the rate
κ²(Ω + Γα²/(α² + κ²)): waves shorter than 2π/(1.22 α) die out, the fastest has κ = 0.76 α, a wavelength near 11 W for
α = 0.73. Belts are periodic along the valley, so that their law is the same everywhere along it.

Reference: Howard and Knutson (1984), Sufficient conditions for river meandering: a simulation approach, Water Resources
Research 20(11), 1659–1667, doi:10.1029/WR020i011p01659.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from invgen.data._cutoffs import LOOP, avulse, cut_loops, suspects

Array = np.ndarray

OMEGA, GAMMA = -1.0, 2.5
SPACING = 0.6  # between nodes, in widths
STEP = 0.1  # of time; the explicit scheme is stable below SPACING²/2
GHOSTS = 16  # upstream nodes that carry the exponential weight (a power of two): ten widths
ROUND = 4  # steps between two resamplings

LINE, FINAL, ABANDONED = 1, 2, 3  # what a recorded piece of centreline was


@dataclass
class Belts:
    """Start and fate of many belts, the belt first in every array.

    Attributes:
        alpha: decay rate of the upstream influence, per width.
        period: length of valley after which a belt repeats, in widths.
        age: time simulated, in W/k_l. since: time from which centrelines are recorded.
        cosine, sine: (belts, modes) amplitudes in widths of the initial centreline; mode m has m + 1 waves a period.
        avulsions: for each belt its events (time, place, length, swing, phase), see `invgen.data._cutoffs.avulse`.
    """

    alpha: Array
    period: Array
    age: Array
    since: Array
    cosine: Array
    sine: Array
    avulsions: list[list[tuple[float, float, float, float, float]]]


@dataclass
class Record:
    """Points of centrelines in the order of time.

    Attributes:
        belt: number. time: in W/k_l. code: LINE, FINAL or ABANDONED. x, y: along and across the valley, in widths.
    """

    belt: list[Array] = field(default_factory=list)
    time: list[Array] = field(default_factory=list)
    code: list[Array] = field(default_factory=list)
    x: list[Array] = field(default_factory=list)
    y: list[Array] = field(default_factory=list)

    def add(self, belt: Array, time: float, code: Array | int, x: Array, y: Array) -> None:
        self.belt.append(belt)
        self.time.append(np.full(belt.size, time))
        self.code.append(np.broadcast_to(np.asarray(code, dtype=np.int8), belt.shape))
        self.x.append(x)
        self.y.append(y)


class Nodes:
    """Periodic centrelines in padded rows: `GHOSTS` copies from a period before, `count` nodes, two copies, nothing."""

    def __init__(self, x: Array, y: Array, count: Array, period: Array) -> None:
        """From (belts, most) rows without copies."""
        rows, most = x.shape
        self.count, self.period = count, period
        self.x = np.zeros((rows, GHOSTS + most + 2))
        self.y = np.zeros_like(self.x)
        self.x[:, GHOSTS:-2], self.y[:, GHOSTS:-2] = x, y
        self._rows = np.arange(rows)
        self._left = np.arange(GHOSTS)[None, :] + count[:, None]
        self.close()

    def close(self) -> None:
        """Refresh the copies."""
        rows, end = self._rows, self.count + GHOSTS
        self.x[:, :GHOSTS] = np.take_along_axis(self.x, self._left, 1) - self.period[:, None]
        self.y[:, :GHOSTS] = np.take_along_axis(self.y, self._left, 1)
        for j in (0, 1):
            self.x[rows, end + j] = self.x[:, GHOSTS + j] + self.period
            self.y[rows, end + j] = self.y[:, GHOSTS + j]

    def chords(self) -> tuple[Array, Array, Array]:
        """(belts, most) mask of nodes, length of the chord after each, and arc length at the chord's end.

        Sums run along each row, so that a belt's numbers do not depend on the others computed with it.
        """
        inside = np.arange(self.x.shape[1] - GHOSTS - 2)[None, :] < self.count[:, None]
        chord = np.hypot(np.diff(self.x[:, GHOSTS:-1]), np.diff(self.y[:, GHOSTS:-1])) * inside
        return inside, chord, np.cumsum(chord, axis=1)


def migration_rate(x: Array, y: Array, alpha: Array) -> tuple[Array, Array, Array]:
    """R1 without the factor of sinuosity, and the unit tangent, at all but the first and last node of padded rows.

    The integral over upstream nodes is the geometric sum Σ_{j < J} a^j R0_{i−j}, a = e^(−αΔs), J = `GHOSTS`, by
    doubling: S_{2k}(i) = S_k(i) + a^k S_k(i − k).
    """
    tx, ty = 0.5 * (x[:, 2:] - x[:, :-2]), 0.5 * (y[:, 2:] - y[:, :-2])
    rate = tx * (y[:, 2:] - 2.0 * y[:, 1:-1] + y[:, :-2])
    rate -= ty * (x[:, 2:] - 2.0 * x[:, 1:-1] + x[:, :-2])
    speed = np.sqrt(tx * tx + ty * ty)
    np.maximum(speed, 1e-3, out=speed)  # nothing moves beyond the last copy
    tx /= speed
    ty /= speed
    rate /= speed
    rate /= speed * speed
    np.clip(rate, -1.0, 1.0, out=rate)  # no bend is tighter than one width
    decay = np.exp(-alpha * SPACING)[:, None]
    total, weight, reach = rate.copy(), decay, 1
    while reach < GHOSTS:
        total[:, reach:] += weight * total[:, :-reach].copy()
        weight = weight * weight
        reach *= 2
    total *= GAMMA * (1.0 - decay) / (1.0 - weight)
    rate *= OMEGA
    rate += total
    return rate, tx, ty


def _advance(nodes: Nodes, alpha: Array) -> None:
    """`ROUND` explicit steps along the outward normal, with the sinuosity at their beginning."""
    pace = STEP * (nodes.chords()[2][:, -1] / nodes.period) ** (-2.0 / 3.0)
    own = slice(GHOSTS - 1, None)  # the copies have no complete upstream sum: they are refreshed instead
    for _ in range(ROUND):
        rate, tx, ty = migration_rate(nodes.x, nodes.y, alpha)
        rate *= pace[:, None]
        np.clip(rate, -0.5 * SPACING, 0.5 * SPACING, out=rate)
        nodes.x[:, 1:-1][:, own] += rate[:, own] * ty[:, own]
        nodes.y[:, 1:-1][:, own] -= rate[:, own] * tx[:, own]
        nodes.close()


def _resample(nodes: Nodes) -> tuple[Array, Array, Array]:
    """Nodes at equal distances near SPACING by Catmull–Rom interpolation: (belts, most) x and y, and their counts."""
    inside, chord, arc = nodes.chords()
    length = arc[:, -1]
    count = np.maximum(np.rint(length / SPACING).astype(np.int64), 4 * LOOP)
    rows, k = np.nonzero(np.arange(count.max())[None, :] < count[:, None])
    place = k * (length / count)[rows]
    # One search for all belts: the arc lengths of belt b are mapped into (b, b + 1/2].
    keys = (0.5 * arc / length[:, None] + np.arange(length.size)[:, None])[inside]
    before = np.cumsum(nodes.count) - nodes.count
    node = np.searchsorted(keys, 0.5 * place / length[rows] + rows, side="right") - before[rows]
    node = np.clip(node, 0, nodes.count[rows] - 1)
    part = 1.0 + (place - arc[rows, node]) / np.maximum(chord[rows, node], 1e-9)
    flat = rows * nodes.x.shape[1] + node + GHOSTS
    x, y = np.zeros((2, count.size, int(count.max())))
    for new, line in ((x, nodes.x.ravel()), (y, nodes.y.ravel())):
        p0, p1, p2, p3 = (line.take(flat + j) for j in (-1, 0, 1, 2))
        cubic = 0.5 * (p3 - p0) + 1.5 * (p1 - p2)
        square = p0 - 2.5 * p1 + 2.0 * p2 - 0.5 * p3
        new[rows, k] = p1 + part * (0.5 * (p2 - p0) + part * (square + part * cubic))
    return x, y, count


def _initial(belts: Belts) -> tuple[Array, Array, Array]:
    """Nodes of the initial centrelines, equally spaced along the valley (nearly straight, hence along the belt too)."""
    count = np.maximum(np.rint(belts.period / SPACING).astype(np.int64), 4 * LOOP)
    most = int(count.max())
    part = np.arange(most)[None, :] / count[:, None]
    y = np.zeros((count.size, most))
    for m in range(belts.cosine.shape[1]):
        angle = 2.0 * np.pi * (m + 1) * part
        y += belts.cosine[:, m, None] * np.cos(angle) + belts.sine[:, m, None] * np.sin(angle)
    return part * belts.period[:, None], y, count


def _replace(x: Array, y: Array, count: Array, changed: dict[int, tuple[Array, Array]]) -> tuple[Array, Array, Array]:
    """Write new nodes of some belts into the rows."""
    if not changed:
        return x, y, count
    count = count.copy()
    for b, (line, _) in changed.items():
        count[b] = line.size
    more = max(int(count.max()) - x.shape[1], 0)
    x, y = (np.pad(v, ((0, 0), (0, more))) for v in (x, y))
    for b, (line_x, line_y) in changed.items():
        x[b, : line_x.size], y[b, : line_x.size] = line_x, line_y
    return x, y, count


def _halved(line: Array) -> Array:
    """Points and midpoints of an open line."""
    out = np.empty(2 * line.size - 1)
    out[::2] = line
    out[1::2] = 0.5 * (line[1:] + line[:-1])
    return out


def _record_lines(record: Record, nodes: Nodes, belt: Array, time: float, code: Array) -> None:
    """Record points and midpoints of the whole centrelines of the rows with a code above zero."""
    rows, k = np.nonzero(
        (np.arange(nodes.x.shape[1] - GHOSTS - 2)[None, :] < nodes.count[:, None]) & (code > 0)[:, None]
    )
    flat = rows * nodes.x.shape[1] + k + GHOSTS
    lines = []
    for line in (nodes.x.ravel(), nodes.y.ravel()):
        p0, p1, p2, p3 = (line.take(flat + j) for j in (-1, 0, 1, 2))
        lines.append(np.concatenate([p1, (9.0 * (p1 + p2) - p0 - p3) / 16.0]))
    record.add(np.tile(belt[rows], 2), time, np.tile(code[rows], 2), *lines)


def migrate(belts: Belts) -> Record:
    """Run all belts to their age.

    Returns:
        the FINAL centrelines, the LINEs on the way there (about every third of a width of migration, from `since` on) and
        the ABANDONED reaches, sampled every SPACING/2.
    """
    record = Record()
    steps = ROUND * np.maximum(np.rint(belts.age / (STEP * ROUND)).astype(np.int64), 1)
    order = np.argsort(-steps, kind="stable")  # the oldest first, so that active belts are always the first rows
    x, y, count = (v[order] for v in _initial(belts))
    period, alpha, last = belts.period[order], belts.alpha[order], steps[order]
    for step in range(0, int(last[0]) + 1, ROUND):
        time, every_other = step * STEP, step % (2 * ROUND) == 0
        changed: dict[int, tuple[Array, Array]] = {}
        odd = step % (4 * ROUND) == 0
        looped = set(suspects(x, y, count, period, odd).tolist()) if every_other else set()
        for b in range(count.size):
            due = [e for e in belts.avulsions[order[b]] if time - STEP * ROUND < e[0] <= time]
            if not due and b not in looped:
                continue
            line_x, line_y, length = x[b, : count[b]], y[b, : count[b]], float(period[b])
            old = []
            for _, place, valley, swing, phase in due:
                line_x, line_y, reach = avulse(line_x, line_y, length, place, valley, swing, phase, SPACING)
                old.append(reach)
            line_x, line_y, loops = cut_loops(line_x, line_y, length)
            changed[b] = line_x, line_y
            if time >= belts.since[order[b]]:
                for piece_x, piece_y in old + loops:
                    fine = _halved(piece_x)
                    record.add(np.full(fine.size, order[b]), time, ABANDONED, fine, _halved(piece_y))
        nodes = Nodes(*_replace(x, y, count, changed), period)
        recorded = every_other & (time >= belts.since[order])
        code = np.where(last == step, FINAL, np.where(recorded, LINE, 0)).astype(np.int8)
        if code.any():
            _record_lines(record, nodes, order, time, code)
        active = int(np.count_nonzero(last > step))
        if active == 0:
            break
        if active < last.size:
            most = GHOSTS + int(nodes.count[:active].max())
            order, period, alpha, last = order[:active], period[:active], alpha[:active], last[:active]
            own = slice(GHOSTS, most)
            nodes = Nodes(nodes.x[:active, own], nodes.y[:active, own], nodes.count[:active], period)
        _advance(nodes, alpha)
        x, y, count = _resample(nodes)
    return record
