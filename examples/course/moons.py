"""The inverse problem of the scripts in the plane: of a point on two moons, the height is measured.

    x = (x₁, x₂) ~ two moons,      d = x₂ + N(0, 0.1²) = 0.25,      x₁ = ?

At that height the moons are met four times, so that p(x₁ | d) has four modes, and it is known:

    p(x₁ | d)  ∝  ∫ p(x₁, x₂) N(d; x₂, 0.1²) dx₂      on a grid, p the exact density of the moons.

A sampler has to find the modes, weigh them rightly and give each its width; `compare` says how well it did.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invgen.data import TwoMoons
from invgen.diagnostics import wasserstein_1d
from invgen.noise import GaussianNoise
from invgen.operators import MatrixOperator
from invgen.priors import Training
from invgen.problem import InverseProblem
from invgen.solvers import MMPS, TDS, GuidedDiffusion
from invgen.transforms import Affine

LAW = TwoMoons(noise=0.1)
DATUM, SIGMA = 0.25, 0.1
STANDARD = Affine(torch.tensor([0.5, 0.25]), torch.tensor([0.87, 0.50]))  # x = T(u): u has mean 0 and sd 1
VALLEYS = (-0.47, 0.5, 1.47)  # between the modes of x₁


def train(prior: Any, steps: int, batch_size: int, learning_rate: float, **options: Any) -> Any:
    """Fresh draws of the moons at every step: nothing is seen twice, so nothing can be memorised."""
    settings = {"weight_decay": 0.0, "log_every": 1000, **options}
    training = Training(steps=steps, batch_size=batch_size, learning_rate=learning_rate, **settings)
    training.fit(prior, LAW, progress=False)
    return prior.eval()


def held_out(n: int) -> Tensor:
    """Points that training never saw: another seed is another stream."""
    return torch.from_numpy(LAW.sample(n, seed=12345))


def nll_gap(log_prob: Tensor, x: Tensor) -> float:
    """Mean of log p − log q: an estimate of KL(p | q) in nats, what the model's NLL is above the entropy of the moons."""
    return float(np.mean(LAW.log_prob(x.numpy()) - log_prob.numpy()))


def problem(prior: Any) -> InverseProblem:
    """d = x₂ + N(0, SIGMA²)."""
    height = MatrixOperator(torch.tensor([[0.0, 1.0]]))
    return InverseProblem(torch.tensor([DATUM]), height, GaussianNoise(SIGMA), prior)


def exact() -> tuple[np.ndarray, np.ndarray]:
    """x₁ on a grid and p(x₁ | d) there."""
    x1, x2 = np.linspace(-1.7, 2.7, 661), np.linspace(-0.7, 1.2, 286)
    points = np.stack(np.meshgrid(x1, x2, indexing="ij"), -1).reshape(-1, 2)
    joint = np.exp(LAW.log_prob(points)).reshape(len(x1), len(x2)) * np.exp(-0.5 * ((DATUM - x2) / SIGMA) ** 2)
    density = joint.sum(1)
    return x1, density / (density.sum() * (x1[1] - x1[0]))


def weighted(p: InverseProblem, n: int, seed: int = 0) -> tuple[Tensor, Tensor, float]:
    """Importance sampling with the prior as proposal: x_i = f(z_i), z_i ~ N(0, I), w_i ∝ p(d | x_i).

    Right for any generator f as n → ∞, and good here, where one number is measured; hopeless with many data.
    Returns points, weights, and the effective sample size 1/Σ w².
    """
    x = p.prior.sample(n, seed=seed)
    w = p.log_likelihood(x).softmax(0)
    return x, w, float(1 / w.square().sum())


def compare(x: Tensor, weights: Tensor | None = None) -> dict[str, float]:
    """Distance of draws `(n, 2)` of the posterior from the exact one, in x₁.

    "w1": Wasserstein distance; the modes are 1 apart, so that 0.01 is one percent of the mass in the neighbouring mode.
    "worst_mode": the largest error of the mass of a mode (each has about a quarter).
    """
    axis, density = exact()
    w = np.full(len(x), 1 / len(x)) if weights is None else weights.numpy().astype(float)
    w1 = wasserstein_1d(x[:, 0].double().numpy(), axis, 1.0, x_weights=w, y_weights=density / density.sum())
    edges = (-np.inf, *VALLEYS, np.inf)
    mass = [w[(x[:, 0].numpy() > a) & (x[:, 0].numpy() <= b)].sum() for a, b in pairwise(edges)]
    true = [density[(axis > a) & (axis <= b)].sum() / density.sum() for a, b in pairwise(edges)]
    return {"w1": float(w1), "worst_mode": float(np.abs(np.subtract(mass, true)).max())}


def guided(prior: Any, fast: bool) -> tuple[dict[str, tuple[Tensor, None]], dict[str, float]]:
    """Draws of the problem by MMPS guidance and by the particles that correct it (TDS), and `compare` of both."""
    p, n = problem(prior), 64 if fast else 4000
    solvers = {
        "MMPS": GuidedDiffusion(MMPS(), steps=15 if fast else 50),
        "TDS": TDS("mmps", particles=128 if fast else 4000, steps=20 if fast else 60),
    }
    draws: dict[str, tuple[Tensor, None]] = {}
    scores: dict[str, float] = {}
    for name, solver in solvers.items():
        y = solver.solve(p, n, seed=1).samples[0, 0]
        draws[name] = (y, None)
        scores |= {f"{name}_{key}": value for key, value in compare(y).items()}
    return draws, scores


def draw_points(ax: Any, x: Tensor, title: str) -> None:
    """Draws beside the density they should have."""
    a, b = np.linspace(-1.6, 2.6, 120), np.linspace(-1.0, 1.5, 80)
    p = np.exp(LAW.log_prob(np.stack(np.meshgrid(a, b), -1).reshape(-1, 2))).reshape(80, 120)
    ax.contour(a, b, p, levels=(0.05, 0.2, 0.5), colors="tab:red", linewidths=0.8)
    ax.plot(*x[:2000].T.numpy(), ".", ms=1.5, color="k", alpha=0.5)
    ax.axhline(DATUM, color="tab:blue", lw=1)
    ax.set(xlabel="$x_1$", ylabel="$x_2$", xlim=(-1.6, 2.6), ylim=(-1.0, 1.5), aspect="equal")
    ax.set_title(title, fontsize=10, loc="left")


def draw_posterior(ax: Any, draws: Mapping[str, tuple[Any, Any]]) -> None:
    """Histograms of x₁ given d over the exact density."""
    axis, density = exact()
    ax.fill_between(axis, density, color="tab:red", alpha=0.3, lw=0, label="exact, on a grid")
    for (name, (x, w)), colour in zip(draws.items(), ("k", "tab:blue", "tab:green")):
        weights = None if w is None else w.numpy()
        ax.hist(x[:, 0].numpy(), 88, (-1.7, 2.7), True, weights, histtype="step", color=colour, label=name)
    ax.set(xlabel="$x_1$", ylabel="density", ylim=(0, 1.8 * density.max()))
    ax.set_title(f"where is $x_1$, given $x_2$ = {DATUM} ± {SIGMA}?", fontsize=10, loc="left")
    ax.legend(fontsize=8, loc="upper left")
