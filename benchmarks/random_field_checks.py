"""The checks of `random_field.py` that need no peer: covariances, conditional simulation, facies."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from scipy.stats import multivariate_normal

from invgen import InverseProblem
from invgen.grid import Grid
from invgen.kriging import observe
from invgen.noise import GaussianNoise
from invgen.operators.points import PointSampling
from invgen.priors.covariance_models import (
    CovarianceModel,
    Cubic,
    Exponential,
    Gaussian,
    Matern,
    Nugget,
    RationalQuadratic,
    Spherical,
    Stable,
)
from invgen.priors.lithotypes import Cut
from invgen.priors.plurigaussian import Plurigaussian
from invgen.priors.random_field import RandomField, covariance_matrix
from invgen.solvers import PCN, RandomizeThenOptimize

F64 = torch.float64

MODELS: list[tuple[CovarianceModel, tuple[int, ...]]] = [
    (Matern(nu=1.0, length=2.0), (1, 14, 12)),
    (Matern(nu=0.7, length=(1.0, 1.5, 0.8)), (1, 5, 6, 7)),
    (Matern(nu=2.5, length=(1.0, 2.0), angle=30.0), (1, 14, 12)),
    (Exponential(length=(1.0, 2.0), angle=60.0), (1, 14, 12)),
    (Exponential(length=3.0), (1, 60)),
    (Gaussian(length=1.0) + Nugget(variance=0.05), (1, 14, 12)),
    (Spherical(length=5.0), (1, 6, 5, 7)),
    (Cubic(length=5.0) + Exponential(length=1.0, variance=0.5), (1, 14, 12)),
    (Stable(alpha=1.4, length=1.5), (1, 14, 12)),
    (RationalQuadratic(alpha=2.0, length=1.0), (1, 14, 12)),
    (Matern(nu=1.5, length=(0.7, 1.0, 1.2), angle=(20.0, 30.0, 40.0)), (1, 5, 4, 6)),
]


def ppt(field: Any) -> np.ndarray:
    """P Pᵀ: row i of P is the derivative of entry i of item i."""
    n = math.prod(field.shape)
    z = torch.zeros(n, *field.latent_shape, dtype=F64, requires_grad=True)
    field.decode(z).reshape(n, n).diagonal().sum().backward()
    P = z.grad.reshape(n, -1)  # type: ignore[union-attr]
    return (P @ P.mT).numpy()


def ppt_error() -> tuple[float, str]:
    """Largest relative |P Pᵀ − Σ| and where."""
    worst, where = 0.0, ""
    for model, shape in MODELS:
        spacing = (1.0,) * (len(shape) - 1)
        exact = covariance_matrix(model, shape, spacing).numpy()
        # the matrix itself from the covariance function, lag by lag
        nodes = np.stack(np.meshgrid(*[np.arange(n) for n in shape[1:]], indexing="ij"), -1).reshape(-1, len(spacing))
        assert np.abs(exact - model((nodes[:, None] - nodes[None]).astype(float))).max() < 1e-12
        for method, options in (
            ("cholesky", {}),
            ("circulant", {}),
            ("kl", {"energy": 1.0}),
            ("sequential", {"neighbours": 10_000}),
        ):
            error = np.abs(ppt(RandomField(model, shape, method=method, **options)) - exact).max() / exact.max()
            print(f"{method:12s} {type(model).__name__:18s} {error:.2e}", flush=True)
            if error > worst:
                worst, where = error, f"{method}, {type(model).__name__}"
    for method, options in (("periodic", {}), ("dct", {}), ("spde", {}), ("spde", {"varying": True})):
        error = _own_law(method, options)
        print(f"{method:12s} {'varying' if options else 'Matern':18s} {error:.2e}", flush=True)
        if error > worst:
            worst, where = error, method
    return worst, where


def _own_law(method: str, options: dict[str, Any]) -> float:
    """The same for methods with boundaries of their own, whose Σ is written down independently."""
    shape, model = (1, 14, 12), Matern(nu=1.0, length=0.6)
    if method == "spde":
        more: dict[str, Any] = {"tolerance": 1e-8}
        if options:
            g = torch.Generator().manual_seed(0)
            more |= {
                "length": 1 + 2 * torch.rand(2, 14, 12, generator=g),
                "angle": 180 * torch.rand(14, 12, generator=g),
            }
        field = RandomField(Matern(nu=1.0, length=2.0), shape, method="spde", **more)
        law = field.covariance_u  # type: ignore[attr-defined]
        w, V = np.linalg.eigh(law.stencil.matrix().toarray())
        root = (V * w ** (-law.alpha / 2)) @ V.T
        exact = (root * np.broadcast_to(np.asarray(law.scale), (14, 12)).ravel() ** 2) @ root
    else:
        field = RandomField(model, shape, method=method)
        p = np.stack(np.meshgrid(np.arange(14), np.arange(12), indexing="ij"), -1).reshape(-1, 2)
        period = np.array([14, 12]) * (1 if method == "periodic" else 2)
        exact = np.zeros((168, 168))
        for mirrored in [(0, 0)] if method == "periodic" else np.ndindex(2, 2):
            lags = p[:, None] - np.where(mirrored, -1 - p, p)[None]
            exact += model(lags - period * np.round(lags / period))
    return float(np.abs(ppt(field) - exact).max() / exact.max())


def limit_z(draws: int) -> tuple[float, str]:
    """Largest |z| of second moments of the methods that are Gaussian only in the limit, over all pairs."""
    worst, where = 0.0, ""
    for method, options in (("spectral", {"modes": 100}), ("turning_bands", {"bands": 30, "step": 0.1})):
        for model, shape in MODELS[:1] + MODELS[3:4] + MODELS[7:8]:
            x = RandomField(model, shape, method=method, **options).sample(draws, seed=1, dtype=F64).flatten(1)
            products = x[:, :, None] * x[:, None]
            exact = covariance_matrix(model, shape, (1.0,) * (len(shape) - 1))
            z = float(((products.mean(0) - exact) / (products.std(0) / math.sqrt(draws))).abs().max())
            if z > worst:
                worst, where = z, f"{method}, {type(model).__name__}, {products[0].numel()} pairs"
    return worst, where


def conditional_z(draws: int) -> tuple[float, str]:
    """Largest |z| of mean, variance and covariance of conditional draws on 24 × 24 nodes given 60 data.

    The covariances of all 166,000 pairs are too many for a bound of four: a fixed set of 300 pairs among the data's
    neighbours and of 300 at random is looked at, for which a perfect sampler stays under four with probability 0.93.
    """
    rng = np.random.default_rng(0)
    grid = Grid((24, 24), (1.0, 1.0))
    field = RandomField(Matern(nu=1.0, length=5.0, variance=2.0), grid, method="circulant", mean=3.0)
    points = rng.uniform(0, 23, (60, 2))
    points[30:40] = np.clip(points[20:30] + 0.7, 0, 23)  # neighbours of others
    values = 3 + rng.standard_normal(60)
    problem = observe(field, points, torch.from_numpy(values), sd=0.2)
    x = RandomizeThenOptimize().solve(problem, draws, seed=1, chunk=1000).samples.reshape(draws, -1).double()
    C = field.covariance_u.dense()  # type: ignore[attr-defined]
    G = problem.terms[0].operator.to_dense()
    K = torch.linalg.solve(G @ C @ G.mT + 0.04 * torch.eye(60, dtype=F64), G @ C).mT
    mean, cov = 3 + K @ (torch.from_numpy(values) - 3 * G.sum(1)), C - K @ G @ C
    v = cov.diagonal()
    centred = x - mean
    near = np.unique(np.rint(points).astype(int) @ [24, 1])
    i = np.concatenate([rng.choice(near, 300), rng.integers(0, 576, 300)])
    j = np.concatenate([rng.choice(near, 300), rng.integers(0, 576, 300)])
    chosen = torch.from_numpy(rng.choice(576, 100, replace=False))
    z_mean = float((centred.mean(0).abs() / (v / draws).sqrt())[chosen].max())
    z_var = float(((centred.square().mean(0) - v).abs() / (2 * v**2 / draws).sqrt())[chosen].max())
    products = (centred[:, i] * centred[:, j]).mean(0)
    spread = ((v[i] * v[j] + cov[i, j] ** 2) / draws).sqrt()
    z_cov = float(((products - cov[i, j]).abs() / spread).max())
    largest = float((products - cov[i, j]).abs().max() / v.max())
    note = f"mean {z_mean:.2f}, variance {z_var:.2f}, covariance {z_cov:.2f} (largest error {largest:.1g} of the variance); {draws} draws"
    return max(z_mean, z_var, z_cov), note


def conditional_seconds(size: int, data: int) -> tuple[float, str]:
    """CPU seconds from the statement of the problem to one conditional draw, and how well it honours the data."""
    grid = Grid((size, size), (1.0, 1.0))
    model = Matern(nu=1.0, length=20.0)
    truth = RandomField(model, grid).sample(1, seed=7)
    points = np.random.default_rng(0).uniform(0, size - 1, (data, 2))
    start, cpu = time.perf_counter(), time.process_time()
    field = RandomField(model, grid)
    problem = observe(field, points, np.zeros(data, dtype=np.float32), sd=0.1)
    A = problem.terms[0].operator
    d = A(truth)[0] + 0.1 * torch.randn(data, generator=torch.Generator().manual_seed(0))
    problem = observe(field, A, d, sd=0.1)  # type: ignore[arg-type]
    posterior = RandomizeThenOptimize(method="cg").solve(problem, 1, seed=0)
    wall, spent = time.perf_counter() - start, time.process_time() - cpu
    misfit = float((A(posterior.samples.reshape(1, 1, size, size).float())[0] - d).std())
    return (
        spent,
        f"{data} data on {size} x {size}, {wall:.1f} s on the wall, sd of the residual {misfit:.3f} at noise 0.1",
    )


def pluri_exact(*, fast: bool) -> tuple[float, str]:
    """Largest |z|: proportions of five facies over 200 draws, and pCN on three nodes against all 27 configurations."""
    tree = Cut(1, Cut(2, "clay", "silt"), Cut(2, "sand", Cut(1, "gravel", "cobble")))
    shares = {"sand": 0.3, "clay": 0.25, "gravel": 0.1, "silt": 0.15, "cobble": 0.2}
    first = RandomField(Matern(nu=1.0, length=4.0), (1, 64, 64))
    second = RandomField(Cubic(length=15.0), (1, 64, 64))
    prior = Plurigaussian(tree, shares, first, second, correlation=0.5)
    draws = 200
    x = prior.sample(draws, seed=1)
    z_share = 0.0
    for k, name in enumerate(prior.names):
        share = (x == k).double().flatten(1).mean(1)
        z_share = max(z_share, abs(float(share.mean()) - shares[name]) / float(share.std()) * math.sqrt(draws))

    model = Exponential(length=3.0)
    grid = Grid((3,), (1.0,))
    small = Plurigaussian(Cut(1, "a", Cut(1, "b", "c")), {"a": 0.3, "b": 0.4, "c": 0.3}, RandomField(model, grid))
    A = PointSampling.at(grid, np.array([[0.0], [2.0]]), kind="nearest")
    data, sd, n = torch.tensor([[0.4, 1.6]], dtype=F64), 0.7, 1000 if fast else 4000
    K = model(np.array([[[float(i - j)] for j in range(3)] for i in range(3)]))
    exact = np.zeros((3, 3, 3))
    for codes in np.ndindex(3, 3, 3):
        boxes = [small.rule.rectangles[c] for c in codes]
        low, high = (np.array([float(b[i].clamp(-9, 9)) for b in boxes]) for i in (0, 1))
        p = multivariate_normal(np.zeros(3), K, maxpts=200_000, abseps=1e-7).cdf(high, lower_limit=low)
        exact[codes] = p * math.exp(-0.5 * ((codes[0] - 0.4) ** 2 + (codes[2] - 1.6) ** 2) / sd**2)
    exact /= exact.sum()
    problem = InverseProblem(data, A, GaussianNoise(sd), small)
    found = PCN(draws=1, warmup=300).solve(problem, n, seed=1, chunk=n).samples.reshape(n, 3).round().long().numpy()
    counts = np.zeros((3, 3, 3))
    np.add.at(counts, tuple(found.T), 1)
    z = (counts / n - exact) / np.sqrt(exact * (1 - exact) / n)
    likely = exact > 0.02
    z_pcn = float(np.abs(z[likely]).max())
    note = (
        f"proportions {z_share:.2f} ({draws} draws), pCN {z_pcn:.2f} ({int(likely.sum())} configurations, {n} chains)"
    )
    return max(z_share, z_pcn), note
