"""What the chains are examined on: inverse problems whose posterior is known by matrices or by quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import exam_problems
import torch
from exam_problems import F64, Answer, grid_answer, linear_answer, normal_cdf
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from invgen.contracts import Operator
from invgen.noise import GaussianNoise
from invgen.operators import MatrixOperator
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem


@dataclass(frozen=True)
class Target:
    """One column of the exam.

    Attributes:
        name: as in the table. problem: solved. make: its answer. shown: one line for the page.
        flags: for which samplers a warning (R-hat, E-BFMI, divergences) is as good as being right: "all", "local" (those
            that do not temper) or "" (none).
        smooth: Φ has a gradient everywhere.
    """

    name: str
    problem: InverseProblem
    make: Callable[[], Answer]
    shown: str
    flags: str = ""
    smooth: bool = True
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def answer(self) -> Answer:
        if "answer" not in self.kept:
            self.kept["answer"] = self.make()
        return self.kept["answer"]


def targets() -> list[Target]:
    """All columns."""
    return [gauss16(), gauss128(), *curved(), modes(), truncated(), funnel()]


# --- Gaussian ----------------------------------------------------------------------------------------------------------


def gauss16() -> Target:
    paper = exam_problems.gauss16(1.0, 1)
    return Target(
        "gauss16", paper.problem, paper.make, "16 correlated unknowns with a mean, 8 random measurements, noise 1"
    )


def gauss128() -> Target:
    """A line of 128 values with exponential covariance around a mean, 16 noisy local averages."""
    n, i = 128, torch.arange(128, dtype=F64)
    mean = 3 + torch.sin(2 * math.pi * i / n)
    covariance = torch.exp(-(i[:, None] - i).abs() / 12)
    A = torch.zeros(16, n, dtype=F64)
    for row in range(16):
        A[row, 8 * row : 8 * row + 8] = 1 / 8
    g = torch.Generator().manual_seed(21)
    truth = mean + torch.linalg.cholesky(covariance) @ torch.randn(n, generator=g, dtype=F64)
    noise = 0.5
    d = A @ truth + noise * torch.randn(16, generator=g, dtype=F64)
    problem = InverseProblem(d, MatrixOperator(A), GaussianNoise(noise), GaussianPrior.dense(mean, covariance))
    return Target(
        "gauss128",
        problem,
        lambda: linear_answer(mean, covariance, A, d, noise),
        "128 values of an exponential field with a mean of 3, 16 local averages, noise 0.5",
    )


# --- curved and split --------------------------------------------------------------------------------------------------


def curved() -> list[Target]:
    shown = {
        "banana": "x₂ + ½ x₁² measured once, correlated prior with a mean",
        "ring": "|x|² measured once (a donut), correlated prior with a mean",
    }
    papers = {p.name: p for p in exam_problems.curved(1)}
    return [Target(name, papers[name].problem, papers[name].make, text) for name, text in shown.items()]


class _Square(Operator):
    """g(x) = x₁²: the sign is lost."""

    def __init__(self) -> None:
        super().__init__((2,), (1,))

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        return x[:, :1].square()


def modes() -> Target:
    """Modes near x₁ = ±2, 32 nats apart, with unequal masses."""
    mean, covariance = (
        torch.tensor([0.25, -0.5], dtype=F64),
        torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=F64),
    )
    d, noise, operator = torch.tensor([4.0], dtype=F64), 0.5, _Square()
    problem = InverseProblem(d, operator, GaussianNoise(noise), GaussianPrior.dense(mean, covariance))
    return Target(
        "modes",
        problem,
        lambda: grid_answer(operator, d, noise, mean, covariance),
        "x₁² measured once: two modes 32 nats apart, a quarter and three quarters of the mass",
        flags="local",
    )


# --- a wall ------------------------------------------------------------------------------------------------------------


class _Wall(Distribution):
    """A likelihood of one where the prediction exceeds the datum and of zero elsewhere."""

    arg_constraints: dict[str, Any] = {}

    def __init__(self, prediction: Tensor) -> None:
        self.prediction = prediction
        super().__init__(prediction.shape[:1], prediction.shape[1:], validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        inside = (self.prediction > value).all(1)
        return torch.where(inside, 0 * self.prediction.sum(1), torch.full_like(self.prediction[:, 0], -math.inf))


class WallNoise:
    """d < a·x is all that is known."""

    def __call__(self, prediction: Tensor, **theta: Tensor) -> Distribution:
        return _Wall(prediction)


def truncated() -> Target:
    """Four correlated unknowns in a half-space that holds 0.4 of the prior."""
    i = torch.arange(4, dtype=F64)
    covariance = 0.7 ** (i[:, None] - i).abs() * (1 + i)[:, None].sqrt() * (1 + i).sqrt()
    mean, a = torch.tensor([3.0, -1.0, 0.5, 2.0], dtype=F64), torch.tensor([1.0, 0.5, -0.5, 1.0], dtype=F64)
    centre, spread = a @ mean, (a @ covariance @ a).sqrt()
    wall = centre + 0.25 * spread
    problem = InverseProblem(wall[None], MatrixOperator(a[None]), WallNoise(), GaussianPrior.dense(mean, covariance))

    def make() -> Answer:
        # x = m + b t + rest, t = (a·x − a·m)/sd a standard normal above 1/4, the rest independent of t
        b = covariance @ a / spread
        t = 0.25 + (torch.arange(1000, dtype=F64) + 0.5) * (7.75 / 1000)
        p = torch.softmax(-0.5 * t.square(), 0)
        rest = covariance - b[:, None] * b
        first = float(p @ t)
        second = float(p @ t.square()) - first**2
        root, sd_rest = torch.linalg.cholesky(rest + 1e-12 * torch.eye(4, dtype=F64)), rest.diagonal().clamp_min(0)

        def cdf(x: Tensor) -> Tensor:
            columns = []
            for j in range(4):
                z = (x[:, j, None] - mean[j] - b[j] * t) / sd_rest[j].sqrt()
                columns.append(normal_cdf(z) @ p)
            return torch.stack(columns, 1)

        def draw(n: int, seed: int) -> Tensor:
            g = torch.Generator().manual_seed(seed)
            low = normal_cdf(torch.tensor(0.25, dtype=F64))
            u = low + (1 - low) * torch.rand(n, generator=g, dtype=F64)
            w = torch.special.ndtri(u)
            return mean + w[:, None] * b + torch.randn(n, 4, generator=g, dtype=F64) @ root.T

        return Answer(mean + first * b, (rest.diagonal() + second * b.square()).sqrt(), cdf, draw)

    return Target(
        "truncated", problem, make, "4 correlated unknowns cut by a plane: a likelihood that jumps", smooth=False
    )


# --- a funnel ----------------------------------------------------------------------------------------------------------


class SelfNoise:
    """0 = x + N(0, eᵛ), prediction (v, x): the unknown v is the log-variance of the noise."""

    def __call__(self, prediction: Tensor, **theta: Tensor) -> Distribution:
        v, x = prediction[:, :1], prediction[:, 1:]
        return _Second(Independent(Normal(x, (0.5 * v).exp(), validate_args=False), 1))


class _Second(Distribution):
    """The law of the second datum; the first says nothing."""

    arg_constraints: dict[str, Any] = {}

    def __init__(self, base: Distribution) -> None:
        self.base = base
        super().__init__(base.batch_shape, torch.Size((2,)), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.base.log_prob(value[:, 1:])


def funnel() -> Target:
    """Neal's funnel in two dimensions: v ~ N(0, 9), x ~ N(0, 100), and 0 = x + N(0, eᵛ) was measured."""
    mean, variance = torch.zeros(2, dtype=F64), torch.tensor([9.0, 100.0], dtype=F64)
    problem = InverseProblem(
        torch.zeros(2, dtype=F64), MatrixOperator(torch.eye(2, dtype=F64)), SelfNoise(), GaussianPrior(mean, variance)
    )

    def make() -> Answer:
        n = 2401
        v = torch.linspace(-24, 24, n, dtype=F64)
        p = torch.softmax(-v.square() / 18 - 0.5 * torch.log(100 + v.exp()), 0)
        s = (0.01 + (-v).exp()).rsqrt()  # sd of x given v
        first = p @ v
        cumulative, step = p.cumsum(0), v[1] - v[0]

        def cdf(x: Tensor) -> Tensor:
            position = ((x[:, 0] - v[0]) / step + 0.5).clamp(0, n - 1.001)
            low = position.floor().long()
            of_v = cumulative[low] - p[low] + (position - low) * p[low]
            of_x = torch.cat([normal_cdf(part[:, None] / s) @ p for part in x[:, 1].split(2000)])
            return torch.stack([of_v, of_x], 1)

        def draw(k: int, seed: int) -> Tensor:
            g = torch.Generator().manual_seed(seed)
            index = torch.multinomial(p, k, replacement=True, generator=g)
            of_v = v[index] + step * (torch.rand(k, generator=g, dtype=F64) - 0.5)
            scale = (0.01 + (-of_v).exp()).rsqrt()
            return torch.stack([of_v, scale * torch.randn(k, generator=g, dtype=F64)], 1)

        sd = torch.stack([(p @ (v - first).square()).sqrt(), (p @ s.square()).sqrt()])
        return Answer(torch.stack([first, torch.zeros((), dtype=F64)]), sd, cdf, draw)

    return Target(
        "funnel", problem, make, "2-d funnel: the unknown v is the log-variance of the noise of x", flags="all"
    )
