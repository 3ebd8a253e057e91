"""Flow matching on two moons: a velocity, its density by an ODE, and a posterior from the denoiser inside it.

    x_t = (1 − t) n + t y,   n ~ N(0, I),  y ~ data, independent:      min over v of E |v(x_t, t) − (y − n)|²
    dx/dt = v(x, t) carries noise to data;      log p(y) = log N(x_0; 0, I) − ∫ div v dt;      E[y | x_t] = x_t + (1 − t) v

The course: σ_min 1e-3, Euler in 100 steps, loss 1.24 (a loss that cannot be read: it is mostly the variance of y − n); the
time t and the noise x_0 are drawn from one and the same random key, so that they depend on each other and the regression
is of another law. Here: all numbers of a step come from one generator in turn, and the model is judged by its likelihood.
Pairs stay independent: pairing noise and data by optimal transport in mini-batches would break the third formula, which
is what guidance lives on.

    python examples/course/flow_matching.py [--fast] [--figure flow_matching.png]
"""

from __future__ import annotations

import time

import lesson
import matplotlib.pyplot as plt
import moons
import numpy as np
import torch

from invgen.priors import FlowMatching
from invgen.priors.networks import MLPDenoiser


def density(prior: FlowMatching, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """p(x) on an n × n grid, by the ODE with exact traces."""
    a, b = np.linspace(-1.6, 2.6, n), np.linspace(-1.0, 1.5, n)
    points = torch.from_numpy(np.stack(np.meshgrid(a, b), -1).reshape(-1, 2)).float()
    return a, b, prior.log_prob_estimate(points, trace="exact", rtol=1e-3).exp().reshape(n, n).numpy()


def main(fast: bool = False, figure: str = "flow_matching.png") -> dict[str, float]:
    """Train, measure, invert, draw; returns what it printed."""
    began, found = time.process_time(), {"entropy": moons.LAW.entropy()}
    torch.manual_seed(0)  # the first weights; training draws from streams of its own
    prior = FlowMatching(MLPDenoiser(2, width=128, depth=3), (2,), transform=moons.STANDARD)
    moons.train(prior, 200 if fast else 6000, 64 if fast else 256, 5e-3, ema=0.999)

    x = moons.held_out(50 if fast else 1000)
    found["nll_gap"] = moons.nll_gap(prior.log_prob_estimate(x, trace="exact", rtol=1e-4), x)

    # The velocity holds the denoiser, and with it every solver for diffusion priors works: guidance (an approximation
    # that weighs separate modes a little wrongly), and particles that correct it (exact as they grow in number).
    draws, scores = moons.guided(prior, fast)
    found |= scores

    fig, axes = plt.subplots(1, 3, figsize=(13, 3.8), width_ratios=(1, 1.15, 1.1), layout="constrained")
    made = prior.sample(200 if fast else 2000, steps=16, chunk=2000)  # the midpoint rule, 32 evaluations
    moons.draw_points(axes[0], made, f"16 midpoint steps:\nNLL = entropy + {found['nll_gap']:.3f} nats")
    image = axes[1].pcolormesh(*density(prior, 20 if fast else 60), cmap="magma", shading="nearest")
    axes[1].set_title("density along the ODE", fontsize=10, loc="left")
    axes[1].set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
    fig.colorbar(image, ax=axes[1], label="p(x), per unit area", shrink=0.7)
    moons.draw_posterior(axes[2], draws)
    return lesson.finish(fig, figure, found, began)


if __name__ == "__main__":
    lesson.command_line(main, __doc__)
