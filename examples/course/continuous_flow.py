"""A continuous normalizing flow (neural ODE) on two moons, and a posterior by weights.

    du/dt = g(u, t) from z ~ N(0, I) at t = 0 to u at t = 1:      log p(u) = log N(z; 0, I) − ∫ tr ∂g/∂u dt

The course: FFJORD by Heun with steps of 0.01, 2000 steps of training in 6m38s, NLL 1.415; the error of the ODE solver is
not looked at. It should be: the loss rewards a field that the solver gets wrong, by any number of nats. Here: the loss
counts what is stiff (`stiffness`), the density is computed with twice the steps as well, the trace is exact (two
dimensions allow it), and Hutchinson's estimate stands beside it with its scatter.

    python examples/course/continuous_flow.py [--fast] [--figure continuous_flow.png]
"""

from __future__ import annotations

import time

import lesson
import matplotlib.pyplot as plt
import moons
import torch

from invgen.priors import ContinuousFlow


def main(fast: bool = False, figure: str = "continuous_flow.png") -> dict[str, float]:
    """Train, measure, invert, draw; returns what it printed."""
    began, found = time.process_time(), {"entropy": moons.LAW.entropy()}
    torch.manual_seed(0)  # the first weights; training draws from streams of its own
    flow = ContinuousFlow(2, width=64, depth=3, training_steps=4, kinetic=0.005, transform=moons.STANDARD)
    moons.train(flow, 25 if fast else 1200, 64 if fast else 256, 6e-3, ema=0.98)

    x = moons.held_out(200 if fast else 5000)
    with torch.no_grad():
        once = flow.log_prob(x)
        flow.steps *= 2
        twice = flow.log_prob(x)
        flow.steps //= 2
        probed = torch.stack([flow.log_prob_estimate(x[:200], seed=s) for s in range(4 if fast else 16)])
    found["nll_gap"] = moons.nll_gap(once, x)
    found["solver_error"] = float((once - twice).abs().max())  # nats, the worst point
    found["hutchinson_sd"] = float(probed.std(0).mean())  # nats a point: unbiased, but never for an acceptance step
    found["hutchinson_mean_error"] = float((probed - once[:200]).mean())

    # The posterior: draws of the prior, weighted by the likelihood (see moons.weighted).
    p = moons.problem(flow)
    y, w, found["effective_draws"] = moons.weighted(p, 500 if fast else 20_000)
    found |= moons.compare(y, w)

    fig, axes = plt.subplots(1, 3, figsize=(13, 3.8), width_ratios=(1, 1, 1.1), layout="constrained")
    moons.draw_points(axes[0], flow.sample(2000), f"draws: NLL = entropy + {found['nll_gap']:.3f} nats")
    for radius in (0.5, 1.0, 1.5, 2.0, 2.5):  # the map is continuous: it tears nothing, the two moons stay joined
        angle = torch.linspace(0, 2 * torch.pi, 400)
        with torch.no_grad():
            circle = flow.decode(radius * torch.stack([angle.cos(), angle.sin()], 1))
        axes[1].plot(*circle.T.numpy(), lw=1, label=f"|z| = {radius}")
    axes[1].set(title="circles of z, carried to t = 1", xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
    axes[1].set(xlim=(-1.6, 2.6), ylim=(-1.0, 1.5))
    axes[1].legend(fontsize=7, loc="upper right")
    moons.draw_posterior(axes[2], {f"continuous flow ({found['effective_draws']:.0f} effective draws)": (y, w)})
    return lesson.finish(fig, figure, found, began)


if __name__ == "__main__":
    lesson.command_line(main, __doc__)
