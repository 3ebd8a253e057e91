"""Laws in the plane with known densities: two moons, spirals, eight Gaussians, checkerboard, pinwheel, banana.

Where the course scripts of this field report a negative log-likelihood, the number that it has to be compared with is
the entropy H = −∫ p ln p: no model's expected negative log-likelihood is below it. All six have it here, in closed form
or by quadrature of the exact density.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.special import logsumexp

from invgen.data._stream import Stream

__all__ = ["Banana", "Checkerboard", "EightGaussians", "Pinwheel", "Spirals", "Toy", "TwoMoons"]

Array = np.ndarray

_LOG_2PI = float(np.log(2.0 * np.pi))
_ROWS = 1024  # items that share one generator of random numbers


class Toy(Stream):
    """A law in the plane: seeded draws, `log_prob`, `entropy`; vectors `(n, 2)`, no units.

    Item i of a stream is row i mod 1024 of the random numbers of block i // 1024: it depends on (seed, i) only.
    """

    _block: ClassVar[int] = 1 << 16
    _numbers: ClassVar[tuple[int, int]]  # uniform and normal numbers an item takes

    def _draw(self, seed: int, numbers: range) -> Array:
        first, last = numbers.start // _ROWS, (numbers.stop - 1) // _ROWS
        uniform, normal = zip(
            *(
                (rng.random((_ROWS, self._numbers[0])), rng.standard_normal((_ROWS, self._numbers[1])))
                for rng in self._generators(seed, range(first, last + 1))
            )
        )
        own = slice(numbers.start - first * _ROWS, numbers.stop - first * _ROWS)
        return self._points(np.concatenate(uniform)[own], np.concatenate(normal)[own]).astype(np.float32)

    @abstractmethod
    def _points(self, u: Array, z: Array) -> Array:
        """(n, 2) points from (n, …) uniform and standard normal numbers."""

    @abstractmethod
    def log_prob(self, x: Array) -> Array:
        """Exact log density ln p(x), (n,) float64, of points (n, 2)."""

    @abstractmethod
    def entropy(self) -> float:
        """H = −∫ p ln p in nats, in closed form or by quadrature: the least expected negative log-likelihood."""


def _points(x: Array) -> Array:
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or x.shape[1] != 2:
        raise ValueError(f"Points in the plane have the shape (n, 2), got {x.shape}.")
    return x


def _positive(name: str, value: float) -> None:
    if not (np.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive number, got {value}.")


class _NoisyCurves(Toy):
    """Points on equally likely curves c_k at a random place t, plus white noise of standard deviation `noise`.

    p(x) = (1/K) Σ_k ∫ N(x; c_k(t), noise² I) w(t) dt over [0, 1], by Gauss–Legendre quadrature.
    """

    noise: float
    _numbers = (2, 2)
    _nodes: ClassVar[int] = 256

    @abstractmethod
    def _curve(self, t: Array) -> Array:
        """(curves, 2, n) points of all curves at the places t."""

    def _place(self, u: Array) -> tuple[Array, Array]:
        """Places t of the quantiles u, and the density w of t at the places u."""
        return u, np.ones_like(u)

    def _points(self, u: Array, z: Array) -> Array:
        curves = self._curve(self._place(u[:, 1])[0])
        which = (u[:, 0] * len(curves)).astype(int)
        return curves[which, :, np.arange(len(u))] + self.noise * z

    def _mixture(self) -> tuple[Array, Array]:
        """Centres (m, 2) and weights (m,) of the Gaussians that the quadrature stands for."""
        node, weight = np.polynomial.legendre.leggauss(self._nodes)
        t = 0.5 * (node + 1.0)
        curves = self._curve(t)
        return np.moveaxis(curves, 1, 2).reshape(-1, 2), np.tile(
            0.5 * weight * self._place(t)[1] / len(curves), len(curves)
        )

    def log_prob(self, x: Array) -> Array:
        x = _points(x)
        centres, weight = self._mixture()
        x, centres = x / self.noise, centres / self.noise
        offset = np.log(weight) - 0.5 * np.square(centres).sum(1)
        out = np.empty(len(x))
        for i in range(0, len(x), 512):  # what the cache holds
            part = x[i : i + 512]
            logs = part @ centres.T
            logs += offset
            most = logs.max(1)
            logs -= most[:, None]
            out[i : i + 512] = np.log(np.exp(logs, out=logs).sum(1)) + most - 0.5 * np.square(part).sum(1)
        return out - _LOG_2PI - 2.0 * np.log(self.noise)

    def entropy(self) -> float:
        """H = −∫ p ln p by the trapezoidal rule, which converges geometrically for densities that fade smoothly."""
        (centres, weight), step = self._mixture(), self.noise / 3.0
        kernels = []
        for place in centres.T:  # on a grid, the Gaussians are products
            axis = np.arange(place.min() - 8.0 * self.noise, place.max() + 8.0 * self.noise, step)
            kernels.append(np.exp(-0.5 * np.square((axis[:, None] - place) / self.noise)))
        p = (kernels[0] * (weight / (2.0 * np.pi * self.noise**2))) @ kernels[1].T
        return -float(np.sum(p * np.log(np.maximum(p, 1e-300)))) * step * step


@dataclass(frozen=True)
class TwoMoons(_NoisyCurves):
    """Two interleaving half circles with noise: the law behind `sklearn.datasets.make_moons`, unscaled.

    With t uniform on [0, π] and either moon equally likely, x = (cos t, sin t) or (1 − cos t, 1/2 − sin t), plus
    N(0, noise² I). scikit-learn takes equally spaced t on each moon instead of random ones: the density is that of its
    points for large n.

    Attributes:
        noise: standard deviation, at least 0.02.
    """

    noise: float = 0.1

    def __post_init__(self) -> None:
        _positive("noise", self.noise)
        if self.noise < 0.02:
            raise ValueError(f"noise must be at least 0.02 for the quadrature to be exact, got {self.noise}.")

    def _curve(self, t: Array) -> Array:
        cos, sin = np.cos(np.pi * t), np.sin(np.pi * t)
        return np.stack([np.stack([cos, sin]), np.stack([1.0 - cos, 0.5 - sin])])


@dataclass(frozen=True)
class Spirals(_NoisyCurves):
    """Two intertwined Archimedean spirals with noise.

    The angle is θ = 2π·turns·√u with u uniform, so that points spread about evenly along an arm; the radius is θ/3, the
    second arm is opposite to the first; plus N(0, noise² I).

    Attributes:
        noise: standard deviation, at least 0.05. turns: of each arm, at most 3.
    """

    noise: float = 0.1
    turns: float = 1.5
    _nodes: ClassVar[int] = 512

    def __post_init__(self) -> None:
        _positive("noise", self.noise)
        _positive("turns", self.turns)
        if self.noise < 0.05 or self.turns > 3.0:
            raise ValueError(
                f"Spirals need noise >= 0.05 and turns <= 3 for the quadrature to be exact, got {self.noise} and "
                f"{self.turns}."
            )

    def _place(self, u: Array) -> tuple[Array, Array]:
        return np.sqrt(u), 2.0 * u

    def _curve(self, t: Array) -> Array:
        angle = 2.0 * np.pi * self.turns * t
        arm = angle / 3.0 * np.stack([np.cos(angle), np.sin(angle)])
        return np.stack([arm, -arm])


@dataclass(frozen=True)
class EightGaussians(Toy):
    """Eight equal isotropic Gaussians on a circle: p(x) = (1/8) Σ_k N(x; radius (cos kπ/4, sin kπ/4), sd² I).

    Attributes:
        radius: of the circle. sd: standard deviation of each Gaussian.
    """

    radius: float = 2.0 * 2.0**0.5
    sd: float = 0.25 * 2.0**0.5
    _numbers = (1, 2)

    def __post_init__(self) -> None:
        _positive("radius", self.radius)
        _positive("sd", self.sd)

    def _centres(self) -> Array:
        angle = 0.25 * np.pi * np.arange(8)
        return self.radius * np.column_stack([np.cos(angle), np.sin(angle)])

    def _points(self, u: Array, z: Array) -> Array:
        return self._centres()[(8.0 * u[:, 0]).astype(int)] + self.sd * z

    def log_prob(self, x: Array) -> Array:
        away = np.square(_points(x)[:, None] - self._centres()).sum(-1)
        return logsumexp(-0.5 * away / self.sd**2, axis=1) - np.log(8.0) - _LOG_2PI - 2.0 * np.log(self.sd)

    def entropy(self) -> float:
        """By the trapezoidal rule."""
        step = self.sd / 3.0
        axis = np.arange(-self.radius - 8.0 * self.sd, self.radius + 8.0 * self.sd, step)
        logs = self.log_prob(np.column_stack([v.ravel() for v in np.meshgrid(axis, axis)]))
        return -float(np.exp(logs) @ logs) * step * step


@dataclass(frozen=True)
class Checkerboard(Toy):
    """Uniform on the dark squares of a board [−half, half]² of cells × cells squares; the lower left one is dark.

    p = 2/(2 half)² on the dark squares, 0 elsewhere; H = ln(2 half²).

    Attributes:
        half: half the side of the board. cells: squares a side, even.
    """

    half: float = 4.0
    cells: int = 4
    _numbers = (3, 0)

    def __post_init__(self) -> None:
        _positive("half", self.half)
        if not isinstance(self.cells, int) or self.cells < 2 or self.cells % 2:
            raise ValueError(f"cells must be an even whole number of at least 2, got {self.cells}.")

    def _points(self, u: Array, z: Array) -> Array:
        dark = (u[:, 0] * (self.cells**2 // 2)).astype(int)
        row, pair = np.divmod(dark, self.cells // 2)
        column = 2 * pair + row % 2
        return 2.0 * self.half / self.cells * (np.column_stack([column, row]) + u[:, 1:]) - self.half

    def log_prob(self, x: Array) -> Array:
        square = np.floor((_points(x) + self.half) * (0.5 * self.cells / self.half))
        dark = ((square >= 0) & (square < self.cells)).all(1) & (square.sum(1) % 2 == 0)
        return np.where(dark, -self.entropy(), -np.inf)

    def entropy(self) -> float:
        return float(np.log(2.0 * self.half**2))


@dataclass(frozen=True)
class Banana(Toy):
    """A Gaussian bent along a parabola: x1 ~ N(0, scale²), x2 | x1 ~ N(curvature (x1² − scale²), noise²).

    The bend has Jacobian 1: H = ln(2πe · scale · noise). Mean (0, 0).

    Attributes:
        scale: standard deviation of x1. curvature: of the bend. noise: standard deviation of x2 given x1.
    """

    scale: float = 1.5
    curvature: float = 0.6
    noise: float = 0.5
    _numbers = (0, 2)

    def __post_init__(self) -> None:
        _positive("scale", self.scale)
        _positive("noise", self.noise)
        if not np.isfinite(self.curvature):
            raise ValueError(f"curvature must be a finite number, got {self.curvature}.")

    def _points(self, u: Array, z: Array) -> Array:
        first = self.scale * z[:, 0]
        return np.column_stack([first, self.curvature * (first**2 - self.scale**2) + self.noise * z[:, 1]])

    def log_prob(self, x: Array) -> Array:
        first, second = _points(x).T
        bent = (second - self.curvature * (first**2 - self.scale**2)) / self.noise
        return -_LOG_2PI - np.log(self.scale * self.noise) - 0.5 * ((first / self.scale) ** 2 + bent**2)

    def entropy(self) -> float:
        return _LOG_2PI + 1.0 + float(np.log(self.scale * self.noise))


@dataclass(frozen=True)
class Pinwheel(Toy):
    """Gaussian blades that are bent into a pinwheel (Johnson et al. 2016).

    u ~ N((1, 0), diag(radial², tangential²)) is turned by the angle 2πk/blades + rate·exp(u1), k a random blade, and
    scaled by 2. With ρ = |x|/2 the blade's points that land on x are u = ρ (cos ψ, sin ψ) where
    ψ + rate·exp(ρ cos ψ) = arg x − 2πk/blades (mod 2π); the turn has Jacobian 1 − rate·exp(u1)·u2, so that

        p(x) = (1/blades) Σ_k Σ_u N(u) / (4 |1 − rate·exp(u1)·u2|).

    Attributes:
        blades: their number. radial, tangential: standard deviations. rate: of the turning.

    Reference: Johnson et al. (2016), Composing graphical models with neural networks, NeurIPS, arXiv:1603.06277.
    """

    blades: int = 5
    radial: float = 0.3
    tangential: float = 0.1
    rate: float = 0.25
    _numbers = (1, 2)

    def __post_init__(self) -> None:
        if not isinstance(self.blades, int) or self.blades < 1:
            raise ValueError(f"blades must be a whole number of at least 1, got {self.blades}.")
        _positive("radial", self.radial)
        _positive("tangential", self.tangential)
        if not 0.0 <= self.rate <= 1.0:
            raise ValueError(f"rate must lie between 0 and 1, got {self.rate}.")

    def _turned(self, u: Array, blade: Array) -> Array:
        angle = 2.0 * np.pi * blade / self.blades + self.rate * np.exp(u[:, 0])
        cos, sin = np.cos(angle), np.sin(angle)
        return 2.0 * np.column_stack([cos * u[:, 0] - sin * u[:, 1], sin * u[:, 0] + cos * u[:, 1]])

    def _points(self, u: Array, z: Array) -> Array:
        straight = z * (self.radial, self.tangential) + (1.0, 0.0)
        return self._turned(straight, np.floor(self.blades * u[:, 0]))

    def log_prob(self, x: Array) -> Array:
        x = _points(x)
        out = np.zeros(len(x))
        for i in range(0, len(x), 512):
            out[i : i + 512] = self._density(x[i : i + 512])
        with np.errstate(divide="ignore"):
            return np.log(out)

    def _density(self, x: Array) -> Array:
        distance, angle = 0.5 * np.hypot(x[:, 0], x[:, 1]), np.arctan2(x[:, 1], x[:, 0])
        target = angle[:, None] - 2.0 * np.pi * np.arange(self.blades) / self.blades

        def excess(psi: Array, rho: Array, wanted: Array) -> Array:
            return psi + self.rate * np.exp(rho * np.cos(psi)) - wanted

        # A root lies where the excess passes a multiple of 2π.
        grid = np.linspace(-np.pi, np.pi, 257)
        turns = np.floor(excess(grid, distance[:, None, None], target[..., None]) / (2.0 * np.pi))
        point, blade, cell = np.nonzero(np.diff(turns, axis=-1))
        whole = 2.0 * np.pi * np.maximum(turns[point, blade, cell], turns[point, blade, cell + 1])
        rho, wanted = distance[point], target[point, blade] + whole
        low, high = grid[cell], grid[cell + 1]
        rising = excess(high, rho, wanted) > excess(low, rho, wanted)
        for _ in range(48):
            middle = 0.5 * (low + high)
            beyond = (excess(middle, rho, wanted) > 0.0) == rising
            low, high = np.where(beyond, low, middle), np.where(beyond, middle, high)
        u1, u2 = rho * np.cos(low), rho * np.sin(low)
        normal = np.exp(-0.5 * (((u1 - 1.0) / self.radial) ** 2 + (u2 / self.tangential) ** 2))
        jacobian = 4.0 * np.abs(1.0 - self.rate * np.exp(u1) * u2)
        share = normal / (2.0 * np.pi * self.radial * self.tangential * self.blades * np.maximum(jacobian, 1e-300))
        return np.bincount(point, share, len(x))

    def entropy(self) -> float:
        """H = −E[ln p], over the straight blade before the turn (all blades are alike), by the trapezoidal rule."""
        step = np.arange(-8.0, 8.01, 0.2)
        z1, z2 = (v.ravel() for v in np.meshgrid(step, step))
        weight = np.exp(-0.5 * (z1 * z1 + z2 * z2)) * 0.04 / (2.0 * np.pi)
        kept = weight > 1e-18
        straight = np.column_stack([1.0 + self.radial * z1, self.tangential * z2])[kept]
        return -float(weight[kept] @ self.log_prob(self._turned(straight, np.zeros(len(straight)))))
