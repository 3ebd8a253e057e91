"""Normalizing flows on two moons: RealNVP and neural spline flows, and a posterior by weights.

    u = f(z), z ~ N(0, I):      log p(u) = log N(f⁻¹(u); 0, I) + log |det ∂f⁻¹/∂u|            maximised over f

The courses: RealNVP, 4 couplings, 10 000 steps, NLL 1.408 with nothing to compare it with; a Glow whose "−2.22 bits a
dimension" are impossible for 8-bit images (wrong scale, no dequantisation), and whose NaN losses are skipped in silence.
Here: the NLL is one of x in its own units (the Jacobian of the standardisation is part of it) and stands beside the
exact entropy of the moons, 1.0076 nats, below which no honest NLL can lie. A NaN loss stops the training.

    python examples/course/flow.py [--fast] [--figure flow.png]
"""

from __future__ import annotations

import time

import lesson
import matplotlib.pyplot as plt
import moons
import torch

from invgen.priors import Flow
from invgen.solvers import MAP


def main(fast: bool = False, figure: str = "flow.png") -> dict[str, float]:
    """Train, measure, invert, draw; returns what it printed."""
    began, found, flows = time.process_time(), {"entropy": moons.LAW.entropy()}, {}
    x = moons.held_out(500 if fast else 10_000)
    for kind, layers, steps in (("realnvp", 10, 3000), ("nsf", 5, 2000)):
        torch.manual_seed(0)  # the first weights; training draws from streams of its own
        flow = Flow(2, kind=kind, transforms=layers, hidden=(64, 64), transform=moons.STANDARD)
        flows[kind] = moons.train(flow, 60 if fast else steps, 64 if fast else 256, 2e-3)
        with torch.no_grad():
            found[f"{kind}_nll_gap"] = moons.nll_gap(flow.log_prob(x), x)

    # 1. The most probable z, from many starts: points, and no word about how much mass each has. The modes in z are
    #    those of p(d | g(f(z))) N(z; 0, I): other coordinates have other modes.
    p = moons.problem(flows["nsf"])
    modes = MAP(space="z", keep="all", iterations=20 if fast else 100).solve(p, 8 if fast else 64, seed=1)
    points = modes.samples[0, 0]
    found["map_rms_misfit"] = float(((points[:, 1] - moons.DATUM) / moons.SIGMA).square().mean().sqrt())

    # 2. The posterior: draws of the prior, weighted by the likelihood. Exact for this flow up to Monte-Carlo error, so
    #    that what is left of the distance to the grid is the flow's own error.
    draws = {}
    for kind, flow in flows.items():
        y, w, ess = moons.weighted(moons.problem(flow), 500 if fast else 20_000)
        draws[f"{kind} ({ess:.0f} effective draws)"] = (y, w)
        found |= {f"{kind}_{name}": value for name, value in moons.compare(y, w).items()}

    fig, axes = plt.subplots(1, 3, figsize=(13, 3.8), width_ratios=(1, 1, 1.1), layout="constrained")
    for ax, (kind, flow) in zip(axes, flows.items()):
        gap = found[f"{kind}_nll_gap"]
        moons.draw_points(ax, flow.sample(2000), f"{kind}: NLL = entropy + {gap:.3f} nats")
    axes[1].plot(*points.T.numpy(), "o", mfc="none", color="tab:green", label="modes in z")
    axes[1].legend(fontsize=8, loc="lower left")
    moons.draw_posterior(axes[2], draws)
    return lesson.finish(fig, figure, found, began)


if __name__ == "__main__":
    lesson.command_line(main, __doc__)
