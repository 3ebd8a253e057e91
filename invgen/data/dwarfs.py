r"""Dwarf galaxies: stars in equilibrium in a dark halo, as positions on the sky and line-of-sight velocities.

Halo (generalised NFW) and stars (Plummer), with the relative potential Ψ = −Φ > 0:

    ρ(r) = ρ_0 (r/r_s)^(−γ) (1 + r/r_s)^(γ−3),      ν(r) ∝ (1 + r²/r_*²)^(−5/2)

Orbits after Osipkov (1979), Merritt (1985) and Cuddeford (1991), from an anisotropy β_0 in the centre to radial outside r_a:

    f(E, L) = L^(−2β_0) f_0(Q),   Q = Ψ − v²/2 − L²/(2 r_a²),      β(r) = (r² + β_0 r_a²)/(r² + r_a²)

With u² = v_r² + v_t² (1 + r²/r_a²) = 2 (Ψ − Q) and v_r = u cos η, the law of a star's velocity at r factorises:

    p(u, η) ∝ u^(2−2β_0) f_0(Ψ(r) − u²/2) · sin^(1−2β_0) η,

and integrating it gives g(Ψ) := r^(2β_0) (1 + r²/r_a²)^(1−β_0) ν(r) ∝ ∫_0^Ψ (Ψ − Q)^(1/2−β_0) f_0(Q) dQ, an Abel equation with the
solution (Cuddeford 1991, eq. 30, for |β_0| < ½; Eddington's formula for β_0 = 0 and r_a = ∞)

    f_0(Q) ∝ ∫_0^Q (Q − Ψ)^(β_0−1/2) g''(Ψ) dΨ.

On a logarithmic grid of radii both integrals are sums over cells with the powers of the kernel integrated exactly; g'' enters by
its exact mean over the cell, (g'_j − g'_(j+1))/(Ψ_j − Ψ_(j+1)), and the tilt between its ends.

f_0 must not be negative. It is where r_a is small, and close to the centre for every β_0 > 0, because Plummer's core is flat
(β_0 ≤ half the central slope of ν), in a cusp for β_0 = 0 too (An & Evans 2006). Such galaxies are refused, 52 % of the prior
below, or f_0 is cut at zero (`negative="cut"`), as Agama does: positions then follow ν and velocities the cut f_0, whose own
density is off by 0.2 to 3 % of the stars, growing with β_0.

References: Cuddeford, MNRAS 253, 414, 1991; Merritt, AJ 90, 1027, 1985; An & Evans, ApJ 642, 752, 2006; the family of galaxies
and the law of its parameters: Nguyen, Mishra-Sharma, Williams & Necib, PRD 107, 043015, 2023, arXiv:2208.12825.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

__all__ = ["DwarfGalaxies", "Stars"]

G = 4.300917e-6  # kpc (km/s)² / solar mass
_CHUNK = 32  # galaxies tabulated together: their tables stay in the cache
_REACH = 7.0  # |ln r/r_*| at the ends of the grid


class Stars(NamedTuple):
    """Stars of n galaxies, filled up to m with zeros.

    Attributes:
        position: x and y on the sky, kpc, `(n, m, 2)`. velocity: along the line of sight, km/s, `(n, m)`.
        present: which entries are stars, `(n, m)`. refused: galaxies whose distribution function is negative, `(n,)`; NaN.
    """

    position: Tensor
    velocity: Tensor
    present: Tensor
    refused: Tensor


class _Tables(NamedTuple):
    psi: Tensor  # (n, K + 1), relative potential at the nodes, falling, 0 at the end; in units of 4π G ρ_0 r_s²
    f0: Tensor  # (n, K + 1) at Q = psi, up to a constant
    log_r: Tensor  # (K,) ln r/r_* of the nodes


@dataclass(frozen=True)
class DwarfGalaxies:
    """A simulator of dwarf galaxies, many at a time.

    Parameters, in this order (`names`), with the bounds of a uniform prior in `low` and `high`:
        gamma: inner slope γ of the halo. log_r_s: log₁₀ of r_s in kpc. log_rho_0: log₁₀ of ρ_0 in solar masses per kpc³.
        r_star: r_*/r_s. beta_0: β_0. r_a: r_a/r_*.

    Args:
        stars: mean number a galaxy. poisson: the number is Poisson distributed, else fixed.
        max_stars: entries a galaxy; stars beyond are left out. 5 sd above the mean when omitted.
        error: sd of the errors of velocities, km/s.
        negative: "refuse" galaxies with a negative distribution function (NaN), or "cut" it at zero.
        nodes: of the table of f_0.

    Raises:
        ValueError: settings out of range.

    Called with parameters `(n, 6)` it returns data `(n, max_stars, 4)`: x, y (kpc), velocity (km/s), 1 for a star and 0 for an
    empty entry; a refused galaxy is NaN, which `Simulations` counts as failed. Randomness: torch's global generator, or
    `generator`.

    Cost: 1.2 ms of one core a galaxy of 100 stars, 32 at a time.

    Example:
        >>> dwarfs = DwarfGalaxies()
        >>> prior = UniformPrior(torch.tensor(dwarfs.low), torch.tensor(dwarfs.high))
        >>> simulator = Simulator(dwarfs, (6,), dwarfs.data_shape, batched=True, tensors=True)
    """

    stars: float = 100.0
    poisson: bool = True
    max_stars: int | None = None
    error: float = 0.0
    negative: str = "refuse"
    nodes: int = 160

    names: ClassVar[tuple[str, ...]] = ("gamma", "log_r_s", "log_rho_0", "r_star", "beta_0", "r_a")
    low: ClassVar[tuple[float, ...]] = (-1.0, -1.0, 5.0, 0.2, -0.5, 0.5)
    high: ClassVar[tuple[float, ...]] = (2.0, 1.0, 8.0, 1.0, 0.5, 2.0)

    def __post_init__(self) -> None:
        if not (self.stars > 0 and self.error >= 0 and self.nodes >= 16):
            raise ValueError(
                f"Dwarf galaxies need stars > 0, error >= 0 and nodes >= 16, got {self.stars}, {self.error} and {self.nodes}."
            )
        if self.negative not in ("refuse", "cut"):
            raise ValueError(f"negative is 'refuse' or 'cut', got {self.negative!r}.")
        if self.max_stars is not None and self.max_stars < 1:
            raise ValueError(f"max_stars must be at least 1, got {self.max_stars}.")

    @property
    def data_shape(self) -> tuple[int, int]:
        """`(max_stars, 4)`."""
        return self._room, 4

    @property
    def _room(self) -> int:
        if self.max_stars is not None:
            return self.max_stars
        return math.ceil(self.stars + 5 * math.sqrt(self.stars)) if self.poisson else round(self.stars)

    def __call__(self, parameters: Tensor, generator: torch.Generator | None = None) -> Tensor:
        drawn = self.sample(parameters, generator=generator)
        data = torch.cat([drawn.position, drawn.velocity[..., None], drawn.present[..., None].to(drawn.velocity)], 2)
        return torch.where(drawn.refused[:, None, None], torch.full_like(data, torch.nan), data)

    def sample(self, parameters: Tensor, *, generator: torch.Generator | None = None) -> Stars:
        """Stars of galaxies with the parameters `(n, 6)`.

        Raises:
            ValueError: another shape; γ ≥ 2, |β_0| ≥ ½, radii that are not positive.
        """
        p = self._checked(parameters)
        parts = [self._sample(p[i : i + _CHUNK], generator) for i in range(0, len(p), _CHUNK)]
        joined = Stars(*(torch.cat(v) for v in zip(*parts, strict=True)))
        kind = parameters.dtype if parameters.is_floating_point() else torch.get_default_dtype()
        return joined._replace(position=joined.position.to(kind), velocity=joined.velocity.to(kind))

    def acceptable(self, parameters: Tensor) -> Tensor:
        """`(n,)`: is the distribution function non-negative everywhere."""
        p = self._checked(parameters)
        return torch.cat([~_negative(self._tables(p[i : i + _CHUNK]).f0) for i in range(0, len(p), _CHUNK)])

    def _checked(self, parameters: Tensor) -> Tensor:
        if parameters.ndim != 2 or parameters.shape[1] != len(self.names):
            raise ValueError(
                f"Parameters have the shape (n, {len(self.names)}) in the order {', '.join(self.names)}, got {tuple(parameters.shape)}."
            )
        p = parameters.double()
        gamma, _, _, r_star, beta, r_a = p.unbind(1)
        if not bool(((gamma < 2) & (beta.abs() < 0.5) & (r_star > 0) & (r_a > 0)).all()):
            raise ValueError(
                "Dwarf galaxies need γ < 2, |β_0| < 1/2 and positive radii; check the order of the parameters."
            )
        return p

    def _sample(self, p: Tensor, generator: torch.Generator | None) -> Stars:
        n, m = len(p), self._room

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, dtype=torch.float64, device=p.device)

        tables = self._tables(p)
        refused = (
            _negative(tables.f0) if self.negative == "refuse" else torch.zeros(n, dtype=torch.bool, device=p.device)
        )
        _, log_r_s, log_rho, r_star, beta, r_a = p.unbind(1)
        # Plummer's mass within r is (1 + r_*²/r²)^(−3/2)
        r = (
            (uniform(n, m).clamp_min(1e-12).pow(-2 / 3) - 1)
            .clamp_min(1e-9)
            .rsqrt()
            .clamp(1.1 * math.exp(-_REACH), 0.9 * math.exp(_REACH))
        )
        u = self._speeds(tables, r, beta, uniform(n, m))
        # cos² η ~ Beta(½, 1 − β_0)
        cos2 = _beta(beta[:, None].expand(n, m), generator)
        radial = u * cos2.sqrt() * torch.where(uniform(n, m) < 0.5, -1.0, 1.0)
        tangential = u * (1 - cos2).clamp_min(0).sqrt() * (1 + (r / r_a[:, None]).square()).rsqrt()
        cos_polar, azimuth, turn = 2 * uniform(n, m) - 1, 2 * math.pi * uniform(n, m), 2 * math.pi * uniform(n, m)
        sin_polar = (1 - cos_polar.square()).clamp_min(0).sqrt()
        length = (r_star * 10**log_r_s)[:, None]
        scale = (4 * math.pi * G * 10**log_rho).sqrt()[:, None] * 10 ** log_r_s[:, None]
        v = scale * (radial * cos_polar - tangential * sin_polar * turn.cos())
        if self.error:
            v = v + self.error * torch.randn(n, m, generator=generator, dtype=torch.float64, device=p.device)
        count = torch.full((n,), self.stars, dtype=torch.float64, device=p.device)
        count = torch.poisson(count, generator=generator) if self.poisson else count.round()
        present = torch.arange(m, device=p.device) < count[:, None]
        xy = length[..., None] * (r * sin_polar)[..., None] * torch.stack([azimuth.cos(), azimuth.sin()], 2)
        return Stars(torch.where(present[..., None], xy, 0.0), torch.where(present, v, 0.0), present, refused)

    def _tables(self, p: Tensor) -> _Tables:
        """Ψ and f_0 at radii between e^(−7) and e^7 times r_*."""
        gamma, _, _, r_star, beta, r_a = (v[:, None] for v in p.unbind(1))
        log_r = torch.linspace(-_REACH, _REACH, self.nodes, dtype=torch.float64, device=p.device)
        y = log_r.exp().expand(len(p), -1)
        x = r_star * y
        mass = _enclosed(x, gamma)
        force = mass / x  # −dΨ/d ln r
        inside = x / (1 + x)
        psi = force + (1 - inside.pow(2 - gamma)) / (2 - gamma)
        a2 = r_a.square()
        log_g = 2 * beta * log_r + (1 - beta) * torch.log1p(y.square() / a2) - 2.5 * torch.log1p(y.square())
        slope = 2 * beta + 2 * (1 - beta) * y.square() / (a2 + y.square()) - 5 * y.square() / (1 + y.square())
        bend = 4 * (1 - beta) * y.square() * a2 / (a2 + y.square()).square() - 10 * (y / (1 + y.square())).square()
        first = -log_g.exp() * slope / force  # g'(Ψ)
        local = x.pow(2 - gamma) * (1 + x).pow(gamma - 3) / force
        second = log_g.exp() / force.square() * (slope.square() + bend + slope * (1 - local))
        zero = torch.zeros_like(psi[:, :1])
        # the last node is at infinity, where Ψ, g' and g'' vanish
        psi, first, second = (torch.cat([v, zero], 1) for v in (psi, first, second))
        width = psi[:, :-1] - psi[:, 1:]
        mean, tilt = (first[:, :-1] - first[:, 1:]) / width, (second[:, 1:] - second[:, :-1]) / width
        # (Q − Ψ)^(β_0−½) times mean and tilt of g'' over each cell, integrated exactly
        alpha = (beta + 0.5)[..., None]
        t = (psi[:, :, None] - psi[:, None, :]).clamp_min(0)
        power = t.pow(alpha)
        zeroth, raised = power.diff(dim=2) / alpha, (power * t).diff(dim=2) / (alpha + 1)
        centre = 0.5 * (t[:, :, :-1] + t[:, :, 1:])
        f0 = (zeroth @ mean[..., None] + (raised - centre * zeroth) @ tilt[..., None])[..., 0]
        return _Tables(psi, f0, log_r)

    def _speeds(self, tables: _Tables, r: Tensor, beta: Tensor, level: Tensor) -> Tensor:
        """u of each star `(n, m)`, in units of (4π G ρ_0)^½ r_s, by the inverse distribution function."""
        psi, f0 = tables.psi, tables.f0.clamp_min(0)
        step = float(tables.log_r[1] - tables.log_r[0])
        place = ((r.log() - tables.log_r[0]) / step).clamp(0, len(tables.log_r) - 1.001)
        cell = place.long()
        share = place - cell
        here = psi.gather(1, cell) * (1 - share) + psi.gather(1, cell + 1) * share
        height = 0.5 * (f0[:, :-1] + f0[:, 1:])
        s = (1.5 - beta)[:, None, None]
        below = (here[:, :, None] - psi[:, None, :]).clamp_min(0).pow(s)  # (Ψ_r − Q)^(3/2−β_0): grows along the nodes
        cumulative = ((below[:, :, 1:] - below[:, :, :-1]) * height[:, None, :]).cumsum(2)
        target = level * cumulative[:, :, -1]
        k = torch.searchsorted(cumulative, target[..., None]).clamp_max(cumulative.shape[2] - 1)
        before = torch.where(k > 0, cumulative.gather(2, (k - 1).clamp_min(0)), 0.0)
        gap = (cumulative.gather(2, k) - before).clamp_min(1e-300)
        inside = ((target[..., None] - before) / gap).clamp(0, 1)
        low, high = below.gather(2, k), below.gather(2, k + 1)
        return (2 * (low + inside * (high - low)).pow(1 / s)).sqrt()[..., 0]


def _negative(f0: Tensor) -> Tensor:
    """Rounding makes f_0 of a few 1e-12 of its largest value."""
    scale = f0.abs().amax(1, keepdim=True)
    return (f0 < -1e-9 * scale).any(1)


def _enclosed(x: Tensor, gamma: Tensor) -> Tensor:
    """∫_0^x t^(2−γ) (1 + t)^(γ−3) dt at growing x `(n, K)`: its power series below the first node, Gauss-Legendre beyond."""
    nodes, weights = (0.0, -math.sqrt(0.6), math.sqrt(0.6)), (8 / 9, 5 / 9, 5 / 9)
    log_x = x.log()
    middle, half = 0.5 * (log_x[:, 1:] + log_x[:, :-1]), 0.5 * (log_x[:, 1:] - log_x[:, :-1])
    cells = torch.zeros_like(middle)
    for node, weight in zip(nodes, weights, strict=True):
        t = (middle + node * half).exp()
        cells = cells + weight * half * t.pow(3 - gamma) * (1 + t).pow(gamma - 3)
    first, a = x[:, :1], 3 - gamma
    start = first.pow(a) * (1 / a - a * first / (a + 1) + 0.5 * a * (a + 1) * first.square() / (a + 2))
    return torch.cat([start, start + cells.cumsum(1)], 1)


def _beta(beta: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws of Beta(½, 1 − β_0): a squared normal over its sum with a gamma of twice the rate."""
    square = torch.randn(beta.shape, generator=generator, dtype=torch.float64, device=beta.device).square()
    gamma = torch._standard_gamma(1 - beta, generator=generator)
    return square / (square + 2 * gamma).clamp_min(1e-300)
