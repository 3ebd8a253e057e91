r"""First-arrival times on a grid by fast sweeping along diagonals, and the exact adjoint of the discrete equations.

The eikonal equation |∇t| = s is discretised at node i by Godunov's upwind rule (Rouy & Tourin 1992; Zhao 2005, eq. 2.2),
with t_z, t_x the times of the neighbours on the side where the wave comes from:

    [u² + β_z σ_z u] / (h_z σ_z)² + [v² + β_x σ_x v] / (h_x σ_x)² = 1,      u = (t − t_z)₊,  v = (t − t_x)₊       (1)

Two things differ from the textbook (β = 0, σ = s_i). σ is the mean slowness of the two nodes of an edge, so that times
along the axes are trapezoidal integrals of s, and in smooth media only the curvature of the wavefronts is left of the
error of first order. β ≥ 0 takes care of the largest curvature, that of the source: with the distances r, r' of the
node and its neighbour from the source, Δ = r − r' and D = h |∂r|,

    β = (D² − Δ²) / Δ      makes (1) exact for t = s r:   Δ² + β Δ = (h ∂r)².                                    (2)

That is the purpose of the factored eikonal equation (Fomel, Luo & Zhao 2009), t = t₀ τ with t₀ = s r; unlike there, (1)
stays monotone in its neighbours and never takes a time from a later node, whatever the contrast of the medium: fixed
point and adjoint exist for every positive slowness. In the row (column) of cells that contains the source no
neighbour can tell the derivative across it, and it is at least that of the straight wave, floor f = |∂r|; the nodes of
the source's cell have t = r · (mean of their slowness and the source's).

Sweeping: every node is visited along the four diagonal orders, all nodes of a diagonal, sources and items at once,
until no node can be lowered (a few rounds; one where no ray turns back). Adjoint: with W the derivative of (1) by the
neighbours' times, triangular in the order of time, λ = ĝ + Wᵀ λ is solved by the same sweeps backwards and ends at the
exact solution after as many sweeps as a ray has turns (Leung & Qian 2006; implicit function theorem).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

__all__ = ["Diagonals", "Geometry", "pull", "solve"]

BIG = 1e30  # later than every time, also in single precision
ROUNDS = 1000  # of four sweeps; a handful are needed
QUADRANTS = tuple(product((-1, 1), (-1, 1)))  # where the neighbours lie along z and x


@dataclass(frozen=True)
class Geometry:
    """What (1) needs beside the slowness, for `N = nz · nx` nodes and S sources, float64.

    Attributes:
        shape: `(nz, nx)`. spacing: `(h_z, h_x)`.
        beta, mu, eta: `(2, 2, N, S)`: axis, side of the neighbour (−, +). β of (2); the increments of t / σ at which one
            neighbour alone satisfies (1), given the floor of the other axis; and at which a term is at its own floor.
        fixed: `(N, S)`, nodes of the source's cell.
        corners: `(S, 4)` their indices (repeated ones have weight 0), weights `(S, 4)` of bilinear interpolation at
            the source, radii `(S, 4)`.
    """

    shape: tuple[int, int]
    spacing: tuple[float, float]
    beta: Tensor
    mu: Tensor
    eta: Tensor
    fixed: Tensor
    corners: Tensor
    weights: Tensor
    radii: Tensor

    @classmethod
    def of(cls, shape: tuple[int, int], spacing: tuple[float, float], sources: np.ndarray) -> Geometry:
        """Sources `(S, 2)` as distances from node (0, 0), inside the hull of the nodes."""
        offset = [
            (np.arange(n) * h)[:, None] - p[None, :] for n, h, p in zip(shape, spacing, sources.T, strict=True)
        ]  # (n, S)
        dz, dx = np.broadcast_arrays(offset[0][:, None], offset[1][None])
        d = np.stack([dz.reshape(-1, len(sources)), dx.reshape(-1, len(sources))])  # axis, N, S
        r = np.hypot(d[0], d[1])
        h = np.asarray(spacing)[:, None, None]
        astride = np.abs(d) < h * (1 - 1e-9)
        slope = np.abs(d) / np.maximum(r, 1e-300)
        floor = np.where(astride, slope, 0.0)
        beta = np.zeros((2, 2, *r.shape))
        for side in range(2):
            moved = d + h * (2 * side - 1)  # the neighbour
            for axis in range(2):
                delta = r - np.hypot(moved[axis], d[1 - axis])
                kappa = np.maximum(h[axis] * slope[axis] - delta, 0.0)
                towards = (delta > 0) & (d[axis] * (2 * side - 1) < 0)
                with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                    exact = kappa * (2 + np.where(astride[axis], 0.0, kappa / delta))
                beta[axis, side] = np.where(towards, exact, 0.0)
        half, other = beta / 2, floor[::-1]
        mu = np.sqrt(half**2 + (h**2 * (1 - other**2))[:, None]) - half
        eta = np.sqrt(half**2 + (h * floor)[:, None] ** 2) - half
        corners, weights = bilinear(shape, spacing, sources)
        radii = np.take_along_axis(r.T, corners, axis=1)
        return cls(
            (int(shape[0]), int(shape[1])),
            (float(spacing[0]), float(spacing[1])),
            torch.from_numpy(beta),
            torch.from_numpy(np.ascontiguousarray(mu)),
            torch.from_numpy(np.ascontiguousarray(eta)),
            torch.from_numpy(astride.all(0)),
            torch.from_numpy(corners),
            torch.from_numpy(weights),
            torch.from_numpy(radii),
        )

    def to(self, like: Tensor) -> Geometry:
        """In the precision and on the device of a tensor."""
        return Geometry(
            self.shape,
            self.spacing,
            *(v.to(like) for v in (self.beta, self.mu, self.eta)),
            *(v.to(like.device) for v in (self.fixed, self.corners)),
            *(v.to(like) for v in (self.weights, self.radii)),
        )

    def part(self, where: slice) -> Geometry:
        """Some of the sources."""
        return Geometry(
            self.shape,
            self.spacing,
            *(v[..., where] for v in (self.beta, self.mu, self.eta, self.fixed)),
            *(v[where] for v in (self.corners, self.weights, self.radii)),
        )


def bilinear(shape: tuple[int, int], spacing: tuple[float, float], points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The four nodes around each point `(P, 2)` and their weights, `(P, 4)` each; positions from node (0, 0)."""
    at = points / np.asarray(spacing)
    near = np.round(at)
    at = np.where(np.abs(at - near) < 1e-9, near, at)  # a point on a node has that node alone
    base = np.clip(np.floor(at), 0, np.asarray(shape) - 2).astype(np.int64)
    part = at - base
    nodes = [(base[:, 0] + i) * shape[1] + base[:, 1] + j for i in (0, 1) for j in (0, 1)]
    weights = [
        (part[:, 0] if i else 1 - part[:, 0]) * (part[:, 1] if j else 1 - part[:, 1]) for i in (0, 1) for j in (0, 1)
    ]
    return np.stack(nodes, 1), np.stack(weights, 1)


class Diagonals:
    """Nodes in the order of the diagonals i + j (or i − j), in a frame where neighbours on a diagonal are neighbours.

    Row k of the frame holds diagonal k, its entries the rows of the grid, with one empty entry at each end.
    """

    def __init__(self, shape: tuple[int, int], mirrored: bool) -> None:
        nz, nx = shape
        k = np.arange(nz + nx - 1)
        first, last = np.maximum(0, k - nx + 1), np.minimum(nz - 1, k)
        rows = [np.arange(a, b + 1) for a, b in zip(first, last, strict=True)]
        columns = [kk - i for kk, i in zip(k, rows, strict=True)]
        if mirrored:
            columns = [nx - 1 - j for j in columns]
        self.lengths = [len(i) for i in rows]
        self.width = nz + 2
        self.size = (len(k) + 2) * self.width
        self.start = [int((kk + 1) * self.width + a + 1) for kk, a in zip(k, first, strict=True)]
        self.nodes = torch.from_numpy(np.concatenate([i * nx + j for i, j in zip(rows, columns, strict=True)]))
        self.places = torch.from_numpy(
            np.concatenate([s + np.arange(n) for s, n in zip(self.start, self.lengths, strict=True)])
        )

    def to(self, device: torch.device) -> Diagonals:
        """The same with its indices on a device."""
        moved = copy.copy(self)
        moved.nodes, moved.places = self.nodes.to(device), self.places.to(device)
        return moved

    def shift(self, axis: int, side: int) -> int:
        """From a place in the frame to that of the neighbour: z − (side −1), z +, x − or x + (mirrored: x +, x −)."""
        return side * (self.width + (1 if axis == 0 else 0))

    def views(self, frame: Tensor, shift: int = 0) -> list[Tensor]:
        """One view a diagonal of the frame `(size, B)`, moved by `shift` places."""
        return [frame.narrow(0, s + shift, n) for s, n in zip(self.start, self.lengths, strict=True)]

    def gather(self, frame: Tensor, shift: int = 0) -> Tensor:
        """Values at the places (moved), `(N, B)` in the order of the diagonals."""
        return frame.index_select(0, self.places + shift)

    def scatter(self, values: Tensor, fill: float) -> Tensor:
        """A frame that holds values `(N, B)` of the grid's order."""
        frame = values.new_full((self.size, values.shape[1]), fill)
        return frame.index_copy_(0, self.places.to(values.device), values.index_select(0, self.nodes.to(values.device)))

    def back(self, frame: Tensor) -> Tensor:
        """The grid's order again, `(N, B)`."""
        out = frame.new_empty(len(self.nodes), frame.shape[1])
        return out.index_copy_(0, self.nodes, self.gather(frame))


@dataclass
class _Rule:
    """(1) for the neighbours of one quadrant, solved for t: with e = t_x − t_z clipped to [low, high],

    t = min(t_z, t_x − e) + α e − b + √(G + e (H − J e)).

    Clipped, one neighbour alone decides; all tensors `(N, items · S)`.
    """

    alpha: Tensor
    b: Tensor
    G: Tensor
    H: Tensor
    J: Tensor
    low: Tensor
    high: Tensor

    def ordered(self, nodes: Tensor) -> tuple[Tensor, ...]:
        """The seven tensors in the order of the diagonals."""
        fields = (self.alpha, self.b, self.G, self.H, self.J, self.low, self.high)
        return tuple(v.index_select(0, nodes) for v in fields)


def _edges(s: Tensor, shape: tuple[int, int]) -> list[list[Tensor]]:
    """σ at the edge of every node towards (axis, side): `(N, items)`; s at the border of the grid."""
    grid = s.reshape(*shape, -1)
    padded = torch.cat([grid[:1], grid, grid[-1:]])
    z = 0.5 * (padded[1:] + padded[:-1])
    padded = torch.cat([grid[:, :1], grid, grid[:, -1:]], dim=1)
    x = 0.5 * (padded[:, 1:] + padded[:, :-1])
    return [[z[:-1].reshape_as(s), z[1:].reshape_as(s)], [x[:, :-1].reshape_as(s), x[:, 1:].reshape_as(s)]]


def _rule(g: Geometry, sigma: list[list[Tensor]], quadrant: tuple[int, int]) -> _Rule:
    i, j = (int(side > 0) for side in quadrant)
    sz, sx = sigma[0][i][:, :, None], sigma[1][j][:, :, None]
    bz, bx, mz, mx, nz, nx = (v[axis, side][:, None] for v in (g.beta, g.mu, g.eta) for axis, side in ((0, i), (1, j)))
    a, c = 1 / (g.spacing[0] ** 2 * sz), 1 / (g.spacing[1] ** 2 * sx)
    total = a / sz + c / sx
    alpha = (c / sx) / total
    last = c * bx / total
    b = (a * bz + c * bx) / (2 * total)
    G, H = b * b + 1 / total, last - 2 * b * alpha
    low, high = sz * nz - sx * mx, sz * mz - sx * nx
    b = torch.where(g.fixed[:, None], -BIG, b)
    wide = (len(b), b.shape[1] * b.shape[2])
    full = [v.expand(b.shape).reshape(wide) for v in (alpha, b, G, H, alpha * (1 - alpha), low, high)]
    return _Rule(*full)


def _times(tz: Tensor, tx: Tensor, rule: Sequence[Tensor]) -> Tensor:
    alpha, b, G, H, J, low, high = rule
    e = torch.sub(tx, tz).clamp_(min=low, max=high)
    first = torch.minimum(torch.sub(tx, e), tz)
    root = torch.addcmul(H, J, e, value=-1)
    return torch.addcmul(G, root, e).sqrt_().addcmul_(alpha, e).add_(first).sub_(b)


def _first(g: Geometry, s: Tensor) -> Tensor:
    """Times at the nodes of the source's cell, BIG elsewhere: `(N, items · S)`."""
    items = s.shape[1]
    near = s[g.corners]  # S, 4, items
    source = (g.weights[..., None] * near).sum(1, keepdim=True)
    value = 0.5 * g.radii[..., None] * (source + near)
    t = s.new_full((len(s), items, len(g.corners)), BIG)
    which = torch.arange(len(g.corners), device=s.device)[:, None].expand_as(g.corners)
    here = g.fixed[g.corners, which]
    t[g.corners[here], :, which[here]] = value[here]
    return t.reshape(len(s), -1)


def solve(g: Geometry, s: Tensor, frames: tuple[Diagonals, Diagonals]) -> Tensor:
    """First arrivals at every node.

    Args:
        g: geometry in the dtype and on the device of s. s: `(N, items)` slowness, positive.
        frames: the diagonals i + j and i − j, on that device.

    Returns:
        `(N, items · S)`, sources fastest. Fixed point of (1) to a few rounding errors.
    """
    sigma = _edges(s, g.shape)
    t = _first(g, s)
    plan = []
    for d, pair in ((frames[0], ((-1, -1), (1, 1))), (frames[1], ((-1, 1), (1, -1)))):
        plan.append((d, [(q[0], _rule(g, sigma, q).ordered(d.nodes)) for q in pair]))
    due = {(f, side) for f in range(2) for side in (-1, 1)}
    slack = 1 + 16 * torch.finfo(s.dtype).eps
    for _ in range(ROUNDS):
        left = set()
        for f, (d, rules) in enumerate(plan):
            frame = d.scatter(t, BIG)
            current = d.views(frame)
            for side, rule in rules:
                if (f, side) not in due:
                    continue
                tz, tx = d.views(frame, d.shift(0, side)), d.views(frame, d.shift(1, side))
                rows = list(zip(current, tz, tx, *(v.split(d.lengths) for v in rule), strict=True))
                for now, a, b, *coefficients in rows if side < 0 else reversed(rows):
                    torch.minimum(now, _times(a, b, coefficients), out=now)
            t = d.back(frame)
        for f, (d, rules) in enumerate(plan):
            frame = d.scatter(t, BIG)
            now = d.gather(frame)
            for side, rule in rules:
                better = _times(d.gather(frame, d.shift(0, side)), d.gather(frame, d.shift(1, side)), rule)
                if bool((now > better * slack).any()):
                    left.add((f, side))
        due = left
        if not due:
            break
    return t


def _neighbour(t: Tensor, shape: tuple[int, int], axis: int, side: int, outside: float) -> Tensor:
    """The value at the neighbour of every node, `(N, B)`."""
    grid = t.reshape(*shape, -1)
    n = shape[axis]
    edge = torch.full_like(grid.narrow(axis, 0, 1), outside)
    kept = grid.narrow(axis, 1 if side > 0 else 0, n - 1)
    return torch.cat([kept, edge] if side > 0 else [edge, kept], dim=axis).reshape_as(t)


def _weights(g: Geometry, s: Tensor, t: Tensor) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """∂t_i/∂t_neighbour and ∂t_i/∂σ_edge of (1) at its fixed point, by axis and side: `(N, B)` each.

    With D_z = ∂(1)/∂t_z: W_z = D_z / (D_z + D_x), and ∂t/∂σ_z = W_z u / σ_z since (1) has degree one in (t, σ).
    """
    sigma = _edges(s, g.shape)
    near = [[_neighbour(t, g.shape, axis, side, BIG) for side in (-1, 1)] for axis in range(2)]
    best, winner = torch.full_like(t, BIG), torch.zeros_like(t, dtype=torch.long)
    share = torch.zeros_like(t)
    for n, quadrant in enumerate(QUADRANTS):
        rule = _rule(g, sigma, quadrant)
        tz, tx = (near[axis][int(side > 0)] for axis, side in enumerate(quadrant))
        value = _times(tz, tx, (rule.alpha, rule.b, rule.G, rule.H, rule.J, rule.low, rule.high))
        e = tx - tz
        inner = e.clamp(min=rule.low, max=rule.high)
        root = torch.addcmul(rule.G, torch.addcmul(rule.H, rule.J, inner, value=-1), inner).sqrt()
        x_share = rule.alpha + 0.5 * (rule.H - 2 * rule.J * inner) / root
        x_share = torch.where(e >= rule.high, 0.0, torch.where(e <= rule.low, 1.0, x_share))
        wins = value < best
        best, share = torch.where(wins, value, best), torch.where(wins, x_share, share)
        winner = torch.where(wins, n, winner)
    by_time: list[list[Tensor]] = []
    by_sigma: list[list[Tensor]] = []
    fixed = g.fixed[:, None].expand(-1, s.shape[1], -1).reshape_as(t)
    for axis in range(2):
        by_time.append([])
        by_sigma.append([])
        part = torch.where(fixed, 0.0, share if axis else 1 - share)
        for k, side in enumerate((-1, 1)):
            here = torch.zeros_like(fixed)
            for n, quadrant in enumerate(QUADRANTS):
                here |= (winner == n) if quadrant[axis] == side else False
            w = torch.where(here, part, 0.0)
            step = (t - near[axis][k]).reshape(len(t), s.shape[1], -1) / sigma[axis][k][:, :, None]
            by_time[axis].append(w)
            by_sigma[axis].append(w * step.reshape_as(t))
    return by_time, by_sigma


def _transposed(g_bar: Tensor, W: list[list[Tensor]], frames: tuple[Diagonals, Diagonals]) -> Tensor:
    """λ = ĝ + Wᵀ λ by sweeps along the diagonals; ends when a round changes no bit."""
    work = []
    for d, flip in zip(frames, (False, True), strict=True):
        z, x = W[0], W[1][::-1] if flip else W[1]
        work.append((d, d.scatter(g_bar, 0.0), [[d.scatter(v, 0.0) for v in sides] for sides in (z, x)]))
    lam = g_bar
    for _ in range(ROUNDS):
        before = lam
        for d, start, w in work:
            frame = d.scatter(lam, 0.0)
            current = d.views(frame)
            # the nodes that follow lie at `side`; their neighbour on the other side, where the wave came from, is this one
            for side in (1, -1):
                k = int(side < 0)
                base = start.clone()
                for axis in range(2):
                    others = d.gather(w[axis][1 - k] * frame, d.shift(axis, -side))
                    base.index_add_(0, d.places, others)
                terms = [d.views(v, d.shift(axis, side)) for axis in range(2) for v in (frame, w[axis][k])]
                rows = list(zip(current, d.views(base), *terms, strict=True))
                for now, b, lz, wz, lx, wx in reversed(rows) if side > 0 else rows:
                    torch.addcmul(torch.addcmul(b, lz, wz), lx, wx, out=now)
            lam = d.back(frame)
        if not bool(((lam != before) & (lam == lam)).any()):
            break
    return lam


def pull(g: Geometry, s: Tensor, t: Tensor, g_bar: Tensor, frames: tuple[Diagonals, Diagonals]) -> Tensor:
    """(∂t/∂s)ᵀ ĝ at the fixed point t = solve(g, s, frames): `(N, items · S)` to `(N, items)`."""
    W, by_sigma = _weights(g, s, t)
    lam = _transposed(g_bar, W, frames)
    out = torch.zeros_like(s)
    items = s.shape[1]
    for axis in range(2):
        for k, side in enumerate((-1, 1)):
            edge = 0.5 * (lam * by_sigma[axis][k]).reshape(len(s), items, -1).sum(2)
            # half of an edge's slowness is that of the neighbour
            out += edge + _neighbour(edge, g.shape, axis, -side, 0.0)
    # the source's cell: t_k = r_k (s_k + Σ w s) / 2
    which = torch.arange(len(g.corners), device=s.device)[:, None].expand_as(g.corners)
    here = g.fixed[g.corners, which].to(s.dtype)
    part = lam.reshape(len(s), items, -1)[g.corners, :, which] * (0.5 * g.radii * here)[..., None]  # S, 4, items
    flat = (part + g.weights[..., None] * part.sum(1, keepdim=True)).reshape(-1, items)
    return out.index_add_(0, g.corners.reshape(-1), flat)
