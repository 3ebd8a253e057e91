r"""Which noise levels a diffusion prior is trained at.

A level is named by its ratio τ = sigma/s to the standard deviation s of the data (coordinates u), so that one law
serves data of any scale. In the variance-preserving form of the same process, x_t = α y + σ_t n with y = u0/s and
α² + σ_t² = 1, it is τ = σ_t/α, and the log-SNR of Kingma et al. 2021 (arXiv:2107.00630) is λ = −2 ln τ. A law is given
by its quantile function τ(q), q ∈ (0, 1), and by the density p(ln τ) that a weighted integral over ln τ is divided by.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = [
    "AdaptiveLevels",
    "CosineLevels",
    "Levels",
    "LinearBetas",
    "LogNormalLevels",
    "LogUniformLevels",
    "UniformTime",
]


class Levels:
    """A law of training noise levels τ = sigma/s.

    Attributes:
        bounds: smallest and largest τ where the law has ends of its own, else None.
    """

    bounds: tuple[float, float] | None = None
    # the classes a file may name
    known: ClassVar[dict[str, type[Levels]]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        Levels.known[cls.__name__] = cls

    def quantile(self, q: Tensor) -> Tensor:
        """τ below which the share q of the levels lies; q and τ `(n,)`, float64."""
        raise NotImplementedError

    def density(self, tau: Tensor) -> Tensor:
        """p(ln τ), `(n,)`."""
        raise NotImplementedError

    def index(self, tau: Tensor) -> Tensor:
        """Number of the step that has the level τ, for networks that are told a step; interpolated between steps."""
        raise TypeError(
            f"{type(self).__name__} has no numbered steps; give a LinearBetas schedule, or time='log_sigma'."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `Levels.from_dict` reads."""
        return {"levels": type(self).__name__, **asdict(self)}  # type: ignore[call-overload]

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Levels:
        """Inverse of `to_dict`; only classes of this module are made."""
        rest = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k != "levels"}
        return Levels.known[values["levels"]](**rest)


@dataclass(frozen=True)
class LogNormalLevels(Levels):
    """ln τ ~ N(mean, sd²): EDM (Karras et al. 2022, table 1, where it is N(−1.2, 1.2²))."""

    mean: float = -0.7
    sd: float = 1.6

    def quantile(self, q: Tensor) -> Tensor:
        return torch.exp(self.mean + self.sd * torch.special.ndtri(q))

    def density(self, tau: Tensor) -> Tensor:
        z = (tau.log() - self.mean) / self.sd
        return torch.exp(-0.5 * z.square()) / (self.sd * math.sqrt(2 * math.pi))


@dataclass(frozen=True)
class CosineLevels(Levels):
    """α = cos(πq/2), σ_t = sin(πq/2): τ = tan(πq/2), p(ln τ) = (2/π) τ/(1 + τ²) (Nichol & Dhariwal 2021, no offset)."""

    def quantile(self, q: Tensor) -> Tensor:
        return torch.tan(0.5 * math.pi * q)

    def density(self, tau: Tensor) -> Tensor:
        return 2 / math.pi * tau / (1 + tau.square())


@dataclass(frozen=True)
class UniformTime(Levels):
    """Uniform time of flow matching: τ = (1 − t)/t with t = 1 − q, p(ln τ) = τ/(1 + τ)²."""

    def quantile(self, q: Tensor) -> Tensor:
        return q / (1 - q)

    def density(self, tau: Tensor) -> Tensor:
        return tau / (1 + tau).square()


@dataclass(frozen=True)
class LogUniformLevels(Levels):
    """ln τ uniform on [ln low, ln high]: the linear log-SNR schedule of VDM (Kingma et al. 2021, appendix H)."""

    low: float = 0.002
    high: float = 300.0

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high:
            raise ValueError(f"LogUniformLevels needs 0 < low < high, got {self.low} and {self.high}.")

    @property
    def bounds(self) -> tuple[float, float]:  # type: ignore[override]
        return self.low, self.high

    def quantile(self, q: Tensor) -> Tensor:
        return torch.exp(math.log(self.low) + q * math.log(self.high / self.low))

    def density(self, tau: Tensor) -> Tensor:
        return torch.full_like(tau, 1 / math.log(self.high / self.low))


@dataclass(frozen=True)
class LinearBetas(Levels):
    """The discrete levels of DDPM (Ho et al. 2020, arXiv:2006.11239): β_t linear, ᾱ_t = Π_i≤t (1 − β_i).

    τ_t = √((1 − ᾱ_t)/ᾱ_t), each of the `steps` levels equally likely.

    Args:
        steps: T. first, last: β_1 and β_T.
    """

    steps: int = 1000
    first: float = 1e-4
    last: float = 0.02

    def __post_init__(self) -> None:
        if self.steps < 2 or not 0 < self.first <= self.last < 1:
            raise ValueError(
                f"LinearBetas needs steps >= 2 and 0 < first <= last < 1, got steps={self.steps}, first={self.first}, last={self.last}."
            )

    @cached_property
    def alpha_bar(self) -> Tensor:
        """ᾱ_1 … ᾱ_T, float64."""
        betas = torch.linspace(self.first, self.last, self.steps, dtype=torch.float64)
        return torch.cumprod(1 - betas, 0)

    @cached_property
    def table(self) -> Tensor:
        """τ_1 … τ_T, float64."""
        return ((1 - self.alpha_bar) / self.alpha_bar).sqrt()

    @property
    def bounds(self) -> tuple[float, float]:  # type: ignore[override]
        return float(self.table[0]), float(self.table[-1])

    def quantile(self, q: Tensor) -> Tensor:
        return self.table.to(q.device)[(q * self.steps).long().clamp(0, self.steps - 1)]

    def density(self, tau: Tensor) -> Tensor:
        slope = torch.gradient(self.table.log())[0].to(tau.device)  # d ln τ / dt
        nearest = torch.searchsorted(self.table.to(tau), tau.contiguous()).clamp(0, self.steps - 1)
        return 1 / (self.steps * slope.to(tau)[nearest])

    def index(self, tau: Tensor) -> Tensor:
        """0 for τ_1, T − 1 for τ_T; linear in ln τ between, held at the ends."""
        logs, wanted = self.table.log().to(tau), tau.log()
        right = torch.searchsorted(logs, wanted.contiguous()).clamp(1, self.steps - 1)
        share = (wanted - logs[right - 1]) / (logs[right] - logs[right - 1])
        return (right - 1 + share).clamp(0, self.steps - 1)


class AdaptiveLevels(torch.nn.Module, Levels):
    """A learned schedule: levels are drawn where the weighted loss is large, which makes its variance least.

    Kingma et al. 2021 (arXiv:2107.00630, section 5.1) train the interior of the schedule to minimise the variance of the
    estimator; Kingma & Gao 2023 (arXiv:2303.00848, adaptive noise schedule) track the loss instead. The estimator
    loss/p(ln τ) of an integral over ln τ has the least variance for p ∝ √E[loss²], and the piecewise constant p here
    follows a moving average of the squared loss in bins of ln τ; `floor` of the mass stays uniform. The ends are stated,
    not learned: the integral is unbiased for every p.

    Args:
        low, high: smallest and largest τ. bins: of equal width in ln τ. rate: of the moving average. floor: uniform share.
    """

    squares: Tensor

    def __init__(
        self, low: float = 0.002, high: float = 300.0, bins: int = 64, rate: float = 0.02, floor: float = 0.1
    ) -> None:
        super().__init__()
        if not (0 < low < high and bins >= 2 and 0 < rate <= 1 and 0 < floor <= 1):
            raise ValueError(
                f"AdaptiveLevels needs 0 < low < high, bins >= 2, and rate and floor in (0, 1], got low={low}, high={high}, bins={bins}, rate={rate}, floor={floor}."
            )
        self.low, self.high, self.bins, self.rate, self.floor = low, high, bins, rate, floor
        self.register_buffer("squares", torch.ones(bins))

    @property
    def bounds(self) -> tuple[float, float]:  # type: ignore[override]
        return self.low, self.high

    def _mass(self) -> Tensor:
        # on the CPU: the draws do not depend on the device
        size = self.squares.double().cpu().sqrt()
        return self.floor / self.bins + (1 - self.floor) * size / size.sum()

    def quantile(self, q: Tensor) -> Tensor:
        mass = self._mass()
        ends = mass.cumsum(0)
        bin = torch.searchsorted(ends, q.double().cpu().contiguous()).clamp(0, self.bins - 1)
        inside = (q.double().cpu() - (ends[bin] - mass[bin])) / mass[bin]
        step = math.log(self.high / self.low) / self.bins
        return torch.exp(math.log(self.low) + step * (bin + inside.clamp(0, 1))).to(q.device)

    def _bin(self, tau: Tensor) -> Tensor:
        place = (tau.log() - math.log(self.low)) / math.log(self.high / self.low)
        return (place * self.bins).long().clamp(0, self.bins - 1)

    def density(self, tau: Tensor) -> Tensor:
        mass = self._mass().to(tau)
        return mass[self._bin(tau)] * self.bins / math.log(self.high / self.low)

    @torch.no_grad()
    def observe(self, tau: Tensor, loss: Tensor) -> None:
        """Move the averages of the bins of τ `(n,)` towards the squares of the undivided losses `(n,)`."""
        where = self._bin(tau)
        count = torch.zeros_like(self.squares).index_add_(0, where, torch.ones_like(loss, dtype=self.squares.dtype))
        total = torch.zeros_like(self.squares).index_add_(0, where, loss.to(self.squares).square())
        # a bin that was visited k times moves as k single visits would
        move = 1 - (1 - self.rate) ** count
        self.squares.lerp_(torch.where(count > 0, total / count.clamp_min(1), self.squares), move)

    def to_dict(self) -> dict[str, Any]:
        names = ("low", "high", "bins", "rate", "floor")
        return {"levels": "AdaptiveLevels", **{k: getattr(self, k) for k in names}}
