"""The papers of the exam: problems whose posterior is known, by dense float64 algebra or by quadrature.

Nothing here uses a solver of invgen: the answers are computed from matrices and grids alone, so that a mistake in the
library's own exact solvers would show as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from invgen.contracts import LinearOperator, Operator
from invgen.noise import GaussianNoise
from invgen.operators import Convolution, Mask, MatrixOperator, PostStack, SparseOperator, ricker
from invgen.priors import GaussianMixturePrior, GaussianPrior
from invgen.problem import InverseProblem

F64 = torch.float64


@dataclass(frozen=True)
class Answer:
    """A known posterior over flattened unknowns.

    Attributes:
        mean, sd: `(dim,)`.
        cdf: marginal distribution functions, `(k, dim)` values to `(k, dim)` probabilities.
        draw: `draw(n, seed)`, independent exact draws `(n, dim)`.
        whiten: maps draws to N(0, I) where the posterior is Gaussian, else None.
    """

    mean: Tensor
    sd: Tensor
    cdf: Callable[[Tensor], Tensor]
    draw: Callable[[int, int], Tensor]
    whiten: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Paper:
    """One cell column: a problem and its answer (made on first use, it may be large)."""

    column: str
    name: str
    problem: InverseProblem
    make: Callable[[], Answer]
    samples: int
    kept: dict[str, Answer] = field(default_factory=dict)

    @property
    def answer(self) -> Answer:
        if "answer" not in self.kept:
            self.kept["answer"] = self.make()
        return self.kept["answer"]


def normal_cdf(z: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-z / math.sqrt(2))


def gaussian_answer(mean: Tensor, covariance: Tensor) -> Answer:
    """N(mean, covariance)."""
    root = torch.linalg.cholesky(covariance)
    sd = covariance.diagonal().sqrt()

    def draw(n: int, seed: int) -> Tensor:
        xi = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed), dtype=F64)
        return mean + xi @ root.T

    def whiten(x: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(root, (x - mean).T, upper=False).T

    return Answer(mean, sd, lambda x: normal_cdf((x - mean) / sd), draw, whiten)


def linear_answer(mean: Tensor, covariance: Tensor, A: Tensor, d: Tensor, noise: float) -> Answer:
    """Posterior of u ~ N(mean, covariance), d = A u + N(0, noise²), by Cholesky in data space."""
    AC = A @ covariance
    S = AC @ A.T
    S.diagonal().add_(noise**2)
    root = torch.linalg.cholesky(S)
    half = torch.linalg.solve_triangular(root, AC, upper=False)
    centre = mean + half.T @ torch.linalg.solve_triangular(root, (d - A @ mean)[:, None], upper=False)[:, 0]
    left = covariance - half.T @ half
    return gaussian_answer(centre, (left + left.T) / 2)


# --- (a) 16 correlated unknowns, 8 random measurements ---------------------------------------------------------------


def gauss16(noise: float, samples: int, seed: int = 3) -> Paper:
    """The problem of guidance.py: correlated prior with a mean and unequal variances."""
    generator = torch.Generator().manual_seed(seed)
    i = torch.arange(16, dtype=F64)
    scale = (0.5 + i / 10).sqrt()
    covariance = torch.exp(-(i[:, None] - i).abs() / 4) * scale[:, None] * scale
    mean = 1 + 1.5 * torch.sin(i / 2)
    A = torch.randn(8, 16, generator=generator, dtype=F64)
    truth = mean + torch.linalg.cholesky(covariance) @ torch.randn(16, generator=generator, dtype=F64)
    d = A @ truth + noise * torch.randn(8, generator=generator, dtype=F64)
    problem = InverseProblem(d, MatrixOperator(A), GaussianNoise(noise), GaussianPrior.dense(mean, covariance))
    return Paper("gauss16", f"noise {noise:g}", problem, lambda: linear_answer(mean, covariance, A, d, noise), samples)


# --- (b) stationary Gaussian fields ----------------------------------------------------------------------------------


def field_operators(n: int) -> dict[str, tuple[LinearOperator, float]]:
    """name -> (operator, noise sd over the rms of its clean data)."""
    g = torch.Generator().manual_seed(17)
    x = torch.arange(-6, 7, dtype=F64)
    blur = torch.exp(-(x[:, None] ** 2 + x**2) / (2 * 1.5**2))
    wavelet = ricker(torch.arange(-12, 13, dtype=F64) * 0.004, 25.0)
    return {
        "mask": (Mask(torch.rand(1, n, n, generator=g) < 0.3), 0.1),
        "blur": (Convolution(blur / blur.sum(), (1, n, n)), 0.05),
        "poststack": (PostStack(wavelet, (1, n, n)), 0.1),
        "sparse": (lens_like(n, g), 0.1),
    }


def lens_like(n: int, generator: torch.Generator) -> SparseOperator:
    """Half as many data as pixels; each is a 12-point beam around a random place, bilinear, of unit weight."""
    n_data, beam = n * n // 2, 12
    centre = torch.rand(n_data, 1, 2, generator=generator, dtype=F64) * (n - 1)
    place = (centre + 1.2 * torch.randn(n_data, beam, 2, generator=generator, dtype=F64)).clamp(0, n - 1.001)
    corner = place.floor().long()
    part = place - corner
    rows, columns, values = [], [], []
    for a in (0, 1):
        for b in (0, 1):
            weight = (part[..., 0] if a else 1 - part[..., 0]) * (part[..., 1] if b else 1 - part[..., 1])
            columns.append(((corner[..., 0] + a) * n + corner[..., 1] + b).flatten())
            values.append(weight.flatten() / beam)
            rows.append(torch.arange(n_data)[:, None].expand(n_data, beam).flatten())
    return SparseOperator(torch.cat(rows), torch.cat(columns), torch.cat(values), (1, n, n), (n_data,))


def fields(n: int, samples: int) -> list[Paper]:
    """A Matérn field (ν = 1, length 4 cells, 2 below 32 × 32, periodic) with sd 0.8 around a mean that varies, behind four operators."""
    i = torch.arange(n, dtype=F64) / n
    mean = (1.5 + torch.sin(2 * math.pi * i)[:, None] + 0.5 * torch.cos(2 * math.pi * i))[None]
    prior = GaussianPrior.stationary((1, n, n), variance=0.64, length=4.0 if n >= 32 else 2.0, nu=1.0, mean=mean)
    papers = []
    for k, (name, (operator, relative)) in enumerate(field_operators(n).items()):
        truth = prior.sample(1, seed=40 + k, dtype=F64)
        with torch.no_grad():
            clean = operator(truth)
        noise = relative * float(clean.square().mean().sqrt())
        generator = torch.Generator().manual_seed(50 + k)
        data = clean + noise * torch.randn(clean.shape, generator=generator, dtype=F64)
        problem = InverseProblem(data, operator, GaussianNoise(noise), prior)

        def make(operator: LinearOperator = operator, data: Tensor = data, noise: float = noise) -> Answer:
            with torch.no_grad():
                A = operator.to_dense()
            return linear_answer(mean.flatten(), prior.covariance_u.dense(), A, data.flatten(), noise)

        papers.append(Paper(f"field{n}", name, problem, make, samples))
    return papers


# --- (c) the mixture family of Cardoso et al. 2023 (arXiv:2308.07983, section 5) --------------------------------------


def mixture25(d_x: int, d_y: int, seed: int, samples: int) -> Paper:
    """25 components, means (8i, 8j, 8i, 8j, …), unit covariances, weights ∝ squared normals, random A and noise."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.arange(-2, 3, dtype=F64)
    pairs = torch.cartesian_prod(steps, steps) * 8
    means = pairs.repeat(1, d_x // 2)
    weights = torch.randn(25, generator=generator, dtype=F64).square()
    weights = weights / weights.sum()
    U = torch.linalg.qr(torch.randn(d_y, d_y, generator=generator, dtype=F64)).Q
    V = torch.linalg.qr(torch.randn(d_x, d_y, generator=generator, dtype=F64)).Q
    singular = torch.rand(d_y, generator=generator, dtype=F64).sort(descending=True).values
    A = U @ torch.diag(singular) @ V.T
    noise = float(torch.rand((), generator=generator, dtype=F64) * singular[0])
    which = int(torch.multinomial(weights, 1, generator=generator))
    truth = means[which] + torch.randn(d_x, generator=generator, dtype=F64)
    d = A @ truth + noise * torch.randn(d_y, generator=generator, dtype=F64)
    prior = GaussianMixturePrior(weights, means, torch.ones(25, d_x, dtype=F64))
    problem = InverseProblem(d, MatrixOperator(A), GaussianNoise(noise), prior)

    def make() -> Answer:
        S = A @ A.T + noise**2 * torch.eye(d_y, dtype=F64)
        root = torch.linalg.cholesky(S)
        residual = d - means @ A.T
        white = torch.linalg.solve_triangular(root, residual.T, upper=False).T
        posterior = torch.softmax(weights.log() - 0.5 * white.square().sum(1), 0)
        gain = torch.cholesky_solve(A, root).T  # A' S^-1
        centres = means + residual @ gain.T
        covariance = torch.eye(d_x, dtype=F64) - gain @ A
        factor = torch.linalg.cholesky((covariance + covariance.T) / 2)
        spread = covariance.diagonal().sqrt()
        mean = posterior @ centres
        sd = (posterior @ (centres - mean).square() + spread.square()).sqrt()

        def cdf(x: Tensor) -> Tensor:
            return (posterior[:, None] * normal_cdf((x[:, None, :] - centres) / spread)).sum(1)

        def draw(n: int, s: int) -> Tensor:
            g = torch.Generator().manual_seed(s)
            k = torch.multinomial(posterior, n, replacement=True, generator=g)
            return centres[k] + torch.randn(n, d_x, generator=g, dtype=F64) @ factor.T

        return Answer(mean, sd, cdf, draw)

    return Paper("mixture25", f"d_x {d_x}, d_y {d_y}, seed {seed}", problem, make, samples)


# --- (d) two unknowns, one curved datum ------------------------------------------------------------------------------


class Banana(Operator):
    """g(x) = x₂ + ½ x₁²."""

    def __init__(self) -> None:
        super().__init__((2,), (1,))

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        return x[:, 1:] + 0.5 * x[:, :1].square()


class Ring(Operator):
    """g(x) = |x|²: the phase is lost."""

    def __init__(self) -> None:
        super().__init__((2,), (1,))

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        return x.square().sum(1, keepdim=True)


def curved(samples: int) -> list[Paper]:
    """A banana and a ring under a correlated Gaussian prior with a mean; the posterior by quadrature on 1201² nodes."""
    cases = {"banana": (Banana(), 1.0, 0.3), "ring": (Ring(), 4.0, 0.5)}
    mean = torch.tensor([0.4, -0.3], dtype=F64)
    covariance = torch.tensor([[1.5, 0.4], [0.4, 1.0]], dtype=F64)
    papers = []
    for name, (operator, d, noise) in cases.items():
        data = torch.tensor([d], dtype=F64)
        problem = InverseProblem(data, operator, GaussianNoise(noise), GaussianPrior.dense(mean, covariance))

        def make(operator: Operator = operator, data: Tensor = data, noise: float = noise) -> Answer:
            return grid_answer(operator, data, noise, mean, covariance)

        papers.append(Paper("curved", name, problem, make, samples))
    return papers


def grid_answer(operator: Operator, d: Tensor, noise: float, mean: Tensor, covariance: Tensor, n: int = 1201) -> Answer:
    """Posterior of two unknowns by the rectangle rule on ± 6 prior sd."""
    sd = covariance.diagonal().sqrt()
    axes = [torch.linspace(float(m - 6 * s), float(m + 6 * s), n, dtype=F64) for m, s in zip(mean, sd, strict=True)]
    points = torch.cartesian_prod(*axes)
    away = points - mean
    with torch.no_grad():
        misfit = (operator(points) - d).square().sum(1) / noise**2
    log_p = -0.5 * (misfit + (away @ torch.linalg.inv(covariance) * away).sum(1))
    p = torch.softmax(log_p, 0).reshape(n, n)
    marginals = [p.sum(1), p.sum(0)]
    centre = torch.stack([(m * a).sum() for m, a in zip(marginals, axes, strict=True)])
    spread = torch.stack([(m * (a - c).square()).sum().sqrt() for m, a, c in zip(marginals, axes, centre, strict=True)])
    steps = [a[1] - a[0] for a in axes]
    cumulative = [m.cumsum(0) for m in marginals]

    def cdf(x: Tensor) -> Tensor:
        out = []
        for j in range(2):  # the cumulative sum reaches its value at the upper edge of the node's cell
            position = ((x[:, j] - axes[j][0]) / steps[j] + 0.5).clamp(0, n - 1.001)
            low = position.floor().long()
            below = torch.where(low > 0, cumulative[j][(low - 1).clamp_min(0)], torch.zeros((), dtype=F64))
            out.append(below + (position - low) * marginals[j][low])
        return torch.stack(out, 1)

    def draw(k: int, seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        flat = p.flatten().cumsum(0)
        index = torch.searchsorted(flat, torch.rand(k, generator=g, dtype=F64) * flat[-1]).clamp_max(n * n - 1)
        jitter = (torch.rand(k, 2, generator=g, dtype=F64) - 0.5) * torch.stack(steps)
        return points[index] + jitter

    return Answer(centre, spread, cdf, draw)


# --- what a denoiser-only solver is shown ----------------------------------------------------------------------------


class DenoiserOnly:
    """A prior reduced to its denoiser, its scale and its shape; draws and densities are hidden.

    What remains is what a trained diffusion model offers: `denoise`, `sigma_data` (rms scale) and `start_sigma`.
    """

    def __init__(self, prior: Any) -> None:
        self.shape, self.grid, self.transform = prior.shape, prior.grid, prior.transform
        self._denoise = prior.denoise
        self.evaluations = 0
        if isinstance(prior, GaussianMixturePrior):
            flat = prior.means.double().flatten(1)
            centre = prior.weights @ flat
            between = (flat - centre) * prior.weights.sqrt()[:, None]
            variance = float(between.square().sum()) / flat.shape[1] + 1.0
            largest = float(torch.linalg.matrix_norm(between, 2)) ** 2 + 1.0
        else:
            variance = float(prior.covariance_u.mean_variance().mean())
            matrix = prior.covariance_u.dense() if math.prod(self.shape) <= 1024 else None
            largest = (
                float(torch.linalg.eigvalsh(matrix)[-1])
                if matrix is not None
                else float(prior.covariance_u.spectrum.max())
            )
        self.sigma_data, self.start_sigma = math.sqrt(variance), 7 * math.sqrt(largest)

    def denoise(self, u: Tensor, sigma: Tensor | float) -> Tensor:
        self.evaluations += u.shape[0]
        return self._denoise(u, sigma)

    def sample(self, n: int, *, seed: int = 0) -> Tensor:
        raise RuntimeError("The exam shows this prior by its denoiser alone; a solver that draws from it cannot sit.")
