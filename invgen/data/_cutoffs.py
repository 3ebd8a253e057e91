"""What changes the topology of a meandering belt: neck cutoffs and avulsions of one periodic centreline.

A belt is its nodes (x along the valley, y across, in channel widths) over one period: node n is node 0 shifted by the
period along x.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

Array = np.ndarray
Piece = tuple[Array, Array]

NECK = 1.1  # limbs this close, in widths, have met bank to bank
LOOP = 7  # nodes that a loop has at least


def suspects(x: Array, y: Array, count: Array, period: Array, shift: bool) -> Array:
    """Belts that may hold a closed loop, judged by every second node: cheap, and late by a few steps at most.

    Args:
        x, y: (belts, most nodes), rows filled up to `count`. period: (belts,). shift: cut the belts open half a period
            further on, to see the loops at the other seam.
    """
    node = np.arange(0, x.shape[1], 2)[None, :]
    valid = node < count[:, None]
    turn = np.zeros_like(valid)
    if shift:
        node = node + count[:, None] // 2
        turn = node >= count[:, None]
        node = np.where(valid, node - turn * count[:, None], 0)
        x, y = np.take_along_axis(x, node, 1), np.take_along_axis(y, node, 1)
    else:
        x, y = x[:, ::2], y[:, ::2]
    px = np.where(valid, x + turn * period[:, None], np.nan).astype(np.float32)
    py = np.where(valid, y, np.nan).astype(np.float32)
    far = np.arange(px.shape[1])[None, :] - np.arange(px.shape[1])[:, None] > LOOP // 2
    found = []
    for first in range(0, len(px), 8):  # as many pairs as the cache holds
        own = slice(first, first + 8)
        near = px[own, None, :] - px[own, :, None]
        near *= near
        dy = py[own, None, :] - py[own, :, None]
        dy *= dy
        near += dy
        found.append(((near < np.float32((1.3 * NECK) ** 2)) & far).any(axis=(1, 2)))
    return np.flatnonzero(np.concatenate(found))


def _neck(x: Array, y: Array, period: float) -> tuple[int, int] | None:
    """The longest closed loop: its first node and the number of nodes to its other limb."""
    n = x.size
    points = np.column_stack([np.concatenate([x, x + period]), np.concatenate([y, y])])
    pairs = cKDTree(points).query_pairs(NECK, output_type="ndarray")
    pairs = pairs[pairs[:, 0] < n]
    ahead = pairs[:, 1] - pairs[:, 0]
    ahead = np.where(ahead <= n - LOOP, ahead, 0)
    best = int(np.lexsort((pairs[:, 0], -ahead))[0])
    return (int(pairs[best, 0]), int(ahead[best])) if ahead[best] >= LOOP else None


def _from_node(x: Array, y: Array, period: float, first: int) -> Piece:
    """The same belt with its nodes counted from `first`."""
    return np.concatenate([x[first:], x[:first] + period]), np.concatenate([y[first:], y[:first]])


def _round_joint(x: Array, y: Array, period: float) -> Piece:
    """Smooth the corner that a cut leaves at node 0, so that its curvature stays finite."""
    n = x.size
    drift = period * np.arange(n) / n  # without it x is periodic; smoothing leaves straight lines alone
    x, y = x - drift, y.copy()
    at = np.arange(-2, 3)
    for _ in range(3):
        for line in (x, y):
            line[at] = 0.5 * line[at] + 0.25 * (line[at - 1] + line[at + 1])
    return x + drift, y


def cut_loops(x: Array, y: Array, period: float) -> tuple[Array, Array, list[Piece]]:
    """Remove every closed loop (neck cutoff): the nodes that stay, and the abandoned loops, later oxbow lakes."""
    loops = []
    while x.size > 3 * LOOP and (neck := _neck(x, y, period)) is not None:
        first, ahead = neck
        x, y = _from_node(x, y, period, first)
        loops.append((x[: ahead + 1], y[: ahead + 1]))
        x, y = np.concatenate([x[:1], x[ahead:]]), np.concatenate([y[:1], y[ahead:]])
        x, y = _round_joint(x, y, period)
    return x, y, loops


def avulse(
    x: Array,
    y: Array,
    period: float,
    place: float,
    length: float,
    swing: float,
    phase: float,
    spacing: float,
) -> tuple[Array, Array, Piece]:
    """Leave the course at one node and rejoin it downstream by a new and straighter one.

    Args:
        place: where, as a share of the nodes. length: valley length of the new course, at most 0.9 periods. swing: how
            far it goes aside. phase: of its first gentle bends, in turns. spacing: between its nodes. Lengths in widths.

    Returns:
        the nodes, and the abandoned reach.
    """
    x, y = _from_node(x, y, period, int(place * x.size))
    beyond = np.flatnonzero(x >= x[0] + min(length, 0.9 * period))
    last = max(int(beyond[0]) if beyond.size else x.size - 1, LOOP)
    old = x[: last + 1], y[: last + 1]
    chord = float(np.hypot(x[last] - x[0], y[last] - y[0]))
    part = np.linspace(0.0, 1.0, max(int(chord / spacing), 3))[:-1]
    bends = swing * np.sin(np.pi * part) ** 2
    bends += 0.4 * np.sin(np.pi * part) * np.sin(2.0 * np.pi * (part * chord / 9.0 + phase))
    new_x = x[0] + part * (x[last] - x[0])
    new_y = y[0] + part * (y[last] - y[0]) + bends
    return np.concatenate([new_x, x[last:]]), np.concatenate([new_y, y[last:]]), old
