"""Building blocks of the synthetic sections: stratigraphic columns, lateral curves, fault families, bodies.

All lengths are metres, all values are natural logarithms of velocity relative to the compaction trend.
The ingredients are textbook ones: exponential compaction (Athy 1930; Faust 1951 for velocity), hierarchical
lognormal bed thickness with cyclic alternation of lithologies (e.g. Drummond and Wilkinson 1996), and
"fold, then shift across faults" deformation of a layered model as in Wu et al. (2019, FaultSeg3D).
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray
Rng = np.random.Generator


def log_uniform(rng: Rng, low: float, high: float) -> float:
    """Draw from the law whose logarithm is uniform between ``low`` and ``high``."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def smooth_curve(rng: Rng, x: Array, scale: float, terms: int = 4) -> Array:
    """Zero-mean random curve of unit rms over ``x`` [m] whose wavelengths spread around ``scale`` [m]."""
    wavelength = scale * np.exp(rng.uniform(-0.7, 0.7, terms))
    weight = rng.uniform(0.3, 1.0, terms) * wavelength / scale
    phase = rng.uniform(0.0, 2.0 * np.pi, terms)
    curve = np.sin(2.0 * np.pi * x[:, None] / wavelength + phase) @ weight
    return (curve / np.sqrt(0.5 * np.sum(weight**2))).astype(np.float32)


def compaction_table(rng: Rng, depths: Array) -> Array:
    """Log velocity [ln km/s] against burial depth [m]: exponential approach to an asymptote, or a linear gradient."""
    burial = depths + (rng.uniform(200.0, 1800.0) if rng.random() < 0.35 else 0.0)  # exhumed basins are overcompacted
    v0 = rng.uniform(1.5, 2.1)
    if rng.random() < 0.6:
        v_inf = rng.uniform(3.4, 5.6)
        v = v_inf - (v_inf - v0) * np.exp(-burial / log_uniform(rng, 1200.0, 5000.0))
    else:
        v = v0 + rng.uniform(0.25, 1.1) * burial / 1000.0
    return np.log(np.minimum(v, 5.2)).astype(np.float32)


def _beds(rng: Rng, thickness: float) -> tuple[Array, Array, Array]:
    """One formation: bed thicknesses [m], bed values and the top-to-base drift of the value inside each bed."""
    scale = min(log_uniform(rng, 7.0, 70.0), 0.5 * thickness)
    count = max(2, int(np.ceil(1.5 * thickness / scale)))
    bed = np.maximum(scale * np.exp(rng.normal(-0.15, rng.uniform(0.2, 0.7), count)), 5.0)
    last = int(np.searchsorted(np.cumsum(bed), thickness))
    bed = bed[: max(1, last)]
    n = bed.size
    contrast = log_uniform(rng, 0.025, 0.20)
    kind = rng.choice(5, p=[0.34, 0.24, 0.16, 0.14, 0.12])
    drift = np.zeros(n)
    if kind == 0:  # two lithologies in alternation, with independent thickness ratios
        side = 2.0 * (np.arange(n) % 2) - 1.0
        bed = bed * np.exp(side * rng.normal(0.0, 0.4))
        value = contrast * side + rng.normal(0.0, 0.35 * contrast, n)
    elif kind == 1:  # unordered stack
        value = rng.normal(0.0, contrast, n)
    elif kind == 2:  # fining- or coarsening-upward cycles: each bed starts sharp and grades
        sign = 1.0 if rng.random() < 0.5 else -1.0
        value = rng.normal(0.0, 0.4 * contrast, n)
        drift = sign * contrast * rng.uniform(1.0, 2.5, n)
    elif kind == 3:  # homogeneous unit, a few partings at most
        value = rng.normal(0.0, 0.012, n)
        if rng.random() < 0.5:
            bed, value, drift = np.array([thickness]), value[:1], drift[:1]  # massive: one bed, no parting
    else:  # background with sparse hard (carbonate, evaporite) or soft (coal, organic shale) stringers
        value = rng.normal(0.0, 0.3 * contrast, n)
        strong = rng.random(n) < 0.22
        hard = rng.random() < 0.7
        value = value + strong * (rng.uniform(0.12, 0.45) if hard else -rng.uniform(0.10, 0.30))
        bed = np.where(strong, np.minimum(bed, 25.0), bed)
    return bed, value, drift


def column(rng: Rng, length: float, step: float, window: float) -> tuple[Array, Array]:
    """Two related facies columns covering ``length`` [m], sampled every ``step`` [m], values in ln velocity.

    Both share the bed boundaries; a section blends them laterally to make facies change along beds.
    The running mean over ``window`` [m] is the anti-alias average over one output sample.
    """
    beds, values, drifts, shifts = [], [], [], []
    total = 0.0
    calm = rng.uniform(0.35, 1.15)  # how contrasted the whole package is
    spread = rng.uniform(0.04, 0.14)
    offset = rng.normal(0.0, spread)
    while total < length:
        bed, value, drift = _beds(rng, float(np.clip(np.exp(rng.normal(4.9, 0.6)), 50.0, 420.0)))
        # Neighbouring formations are related in marine basins, hence an autoregressive mean.
        offset = 0.4 * offset + rng.normal(0.0, spread)
        beds.append(bed)
        values.append(calm * value + offset)
        drifts.append(calm * drift)
        shifts.append(np.full(bed.size, rng.normal(0.0, 0.035)))
        total += float(bed.sum())
    bed = np.concatenate(beds)
    edges = np.concatenate(([0.0], np.cumsum(bed)))
    depth = np.arange(int(np.ceil(length / step)) + 1) * step
    which = np.minimum(np.searchsorted(edges, depth, side="right") - 1, bed.size - 1)
    inside = (depth - edges[which]) / bed[which] - 0.5
    value = np.concatenate(values)
    first = value[which] + np.concatenate(drifts)[which] * inside
    change = np.concatenate(shifts) + rng.normal(0.0, rng.uniform(0.01, 0.06), bed.size)
    second = first * rng.uniform(0.5, 1.1) + change[which]
    width = max(1, round(window / step))
    kernel = np.full(width, 1.0 / width)
    out = [np.convolve(np.pad(c, width, mode="edge"), kernel, mode="same")[width:-width] for c in (first, second)]
    return out[0].astype(np.float32), out[1].astype(np.float32)


def facies_blend(rng: Rng, strata: Array, x: Array, dx: float) -> Array:
    """Weight in [0, 1] of the second facies column: belts that migrate sideways through the stack (Walther's law)."""
    slant = np.float32(rng.uniform(-6.0, 6.0))
    pitch = 4.0 * dx
    place = (strata * slant + x) * np.float32(1.0 / pitch)
    low = float(place.min())
    along = np.arange(int(float(place.max()) - low) + 2) * pitch
    curve = smooth_curve(rng, along, log_uniform(rng, 1500.0, 12000.0))
    place -= np.float32(low)
    return (0.5 + 0.5 * np.tanh(1.2 * curve)).astype(np.float32)[place.astype(np.int32)]


def texture_tile(rng: Rng, rows: int, x: Array) -> Array:
    """Bed-parallel texture (rows, nx) of unit variance: white across beds, correlated over tens of metres along."""
    knots = np.arange(x[0], x[-1] + 1.0, log_uniform(rng, 25.0, 250.0))
    knots = np.append(knots, 2.0 * knots[-1] - knots[-2] if knots.size > 1 else knots[-1] + 250.0)
    pitch = knots[1] - knots[0]
    left = np.minimum(((x - x[0]) / pitch).astype(np.int64), knots.size - 2)
    part = ((x - x[0]) / pitch - left).astype(np.float32)
    noise = rng.standard_normal((rows, knots.size), dtype=np.float32)
    noise = noise + 0.7 * np.roll(noise, 1, axis=0)
    return (noise[:, left] * (1.0 - part) + noise[:, left + 1] * part) * np.float32(0.95)


def fault_family(rng: Rng, z: Array, x: Array, dx: float, throw_scale: float, dense: bool) -> Array:
    """Undo one set of parallel normal faults: (nz, nx) present depth [m] -> depth before faulting [m].

    Material is sheared vertically, so the hanging wall at depth ``z`` came from ``z - throw``. The throw is a
    function of the distance across the fault set, read from a table to stay sharp at pixel scale, times a growth
    function of depth. Its slope in depth stays below one so that beds keep their order.
    """
    span = float(x[-1] - x[0]) + dx
    side = 1.0 if rng.random() < 0.5 else -1.0
    lean = 1.0 / np.tan(np.radians(rng.uniform(48.0, 82.0)))
    listric = rng.uniform(0.5, 1.6) if (not dense and rng.random() < 0.4) else 0.0
    height = float(z.max() - z.min()) + 1.0
    shift = lean * (z - z.min())
    if listric:  # the dip flattens downwards
        shift = shift * (1.0 + listric * (z - z.min()) / (2.0 * height))
    across = side * x[None, :] - shift  # grows towards the hanging wall
    low, high = float(across.min()), float(across.max())
    grid = np.arange(low, high + dx, dx / 4.0)
    if dense:
        pitch = log_uniform(rng, 90.0, 500.0)
        places = np.cumsum(pitch * np.exp(rng.normal(0.0, 0.4, int(2.0 * (high - low) / pitch) + 2))) + low - pitch
        places = places[places < high]
    else:
        reach = 0.15 * span
        count = rng.integers(1, 3) if high - low > 2 * reach else 0
        places = rng.uniform(low + reach, high - reach, count) if count else np.array([low])
    throw = np.zeros_like(grid)
    most = 0.0
    for place in places:
        size = min(max(throw_scale * np.exp(rng.normal(0.0, 0.4)), 8.0), 220.0)
        far = grid - place
        hanging = far >= 0.0
        fade = pitch * rng.uniform(0.8, 1.6) if dense else log_uniform(rng, 400.0, 8000.0)  # rollover, block rotation
        step = np.where(hanging, np.exp(-np.maximum(far, 0.0) / fade), 0.0)
        drag = rng.uniform(0.0, 0.45) * np.exp(-np.abs(far) / rng.uniform(20.0, 90.0))
        throw += size * (step - drag * np.where(hanging, 0.5, -0.5))
        most = max(most, size)
    index = ((across - low) * (4.0 / dx)).astype(np.int32)
    tip = float(z.min()) + (rng.uniform(-0.5, 0.45) * height if rng.random() < 0.7 else -height)
    ramp = max(2.5 * max(most, float(throw.max())), rng.uniform(0.1, 1.2) * height)
    grow = np.clip((z - tip) * (1.0 / ramp), 0.0, 1.0)
    return z - throw.astype(np.float32)[index] * grow


def add_lens(rng: Rng, m: Array, strata: Array, trend: Array, x: Array, dz: float) -> None:
    """Write one channel, gas lens or mound into ``m`` in place, in bedding coordinates ``strata`` [m]."""
    nz, nx = m.shape
    kind = rng.choice(3, p=[0.6, 0.22, 0.18])
    width = log_uniform(rng, 100.0, 800.0)
    thick = min(log_uniform(rng, 6.0, 40.0) * (1.0 if kind != 2 else 2.0), 0.25 * width)
    iz, ix = int(rng.integers(nz)), int(rng.integers(nx))
    i0, i1 = np.searchsorted(x, (x[ix] - width / 2.0, x[ix] + width / 2.0))
    change = (rng.normal(0.0, 0.13), -rng.uniform(0.1, 0.3), rng.uniform(0.08, 0.3))[kind]
    internal = rng.normal(0.0, 0.3) * change
    if i1 - i0 < 2:
        return
    lobe = np.maximum(1.0 - ((x[i0:i1] - x[ix]) * (2.0 / width)) ** 2, 0.0) ** rng.uniform(0.5, 1.2)
    part = strata[:, i0:i1] - strata[iz, ix]
    if kind:  # flat base, convex top
        part = -part
    rows = np.flatnonzero(((part > -dz) & (part < thick + dz)).any(axis=1))
    if rows.size == 0:
        return
    r0, r1 = int(rows[0]), int(rows[-1]) + 1
    part = part[r0:r1]
    # Linear edges of one sample: the same anti-alias rule as for the beds.
    inside = np.clip(part / dz + 0.5, 0.0, 1.0) * np.clip((thick * lobe - part) / dz + 0.5, 0.0, 1.0)
    keep = np.float32(rng.uniform(0.2, 0.8))  # what remains of the host layering inside the body
    host = m[r0:r1, i0:i1]
    body = trend[r0:r1, i0:i1] + np.float32(change) + np.float32(internal) * part / np.float32(thick)
    host += inside.astype(np.float32) * ((1.0 - keep) * (body - host) + keep * np.float32(change))


def add_salt(rng: Rng, m: Array, x: Array, z: Array, centre: float, width: float, top: float) -> None:
    """Write a homogeneous salt body into ``m`` in place: a star-shaped stock or a pillow with a wavy roof."""
    value = np.float32(np.log(rng.uniform(4.4, 4.7)))
    if rng.random() < 0.5:  # pillow: open downwards
        roof = top + ((x - centre) / width) ** 2 * width * rng.uniform(0.5, 2.0) + 12.0 * smooth_curve(rng, x, 500.0)
        base = roof.min() + rng.uniform(250.0, 1500.0)
        inside = (z[:, None] >= roof) & (z[:, None] <= base + 15.0 * smooth_curve(rng, x, 1500.0))
    else:
        half = rng.uniform(0.5, 2.0) * width
        dx, dz = (x - centre)[None, :] / width, ((z - top - half) / half)[:, None]
        angle = np.arctan2(dz, dx)
        radius = np.ones_like(angle)
        for order in range(2, 7):
            radius += rng.normal(0.0, 0.28 / order) * np.cos(order * angle + np.float32(rng.uniform(0.0, 6.28)))
        inside = dx * dx + dz * dz <= radius * radius
    m[inside] = value
