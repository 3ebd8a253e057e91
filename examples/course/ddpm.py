"""DDPM and EDM on two moons: noise prediction, a schedule that reaches noise, and a posterior by guidance.

    x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) n,     min over ε̂ of E |n − ε̂(x_t, t)|²,     E[x_0 | x_t] = (x_t − √(1 − ᾱ_t) ε̂)/√ᾱ_t

Both courses stop the noise too early: β from 1e-4 to 0.02 over T = 300 or T = 100 steps leaves √ᾱ_T = 0.22 or 0.60 of the
data in x_T, while sampling starts from pure noise: from another law than training ended with. (One of them also trains
with 100 steps and samples with 50, and weighs the score so that t → 0 is all of the loss.) Here: T = 1000 as published,
√ᾱ_T = 0.006; the short schedules are refused with a sentence. EDM is the same model with other weights and levels, and
learns faster: of the 1000 levels of DDPM only 88 lie below 0.3 of the data's scale, where the width of a moon is decided.

    python examples/course/ddpm.py [--fast] [--figure ddpm.png]
"""

from __future__ import annotations

import time
from typing import Any

import lesson
import matplotlib.pyplot as plt
import moons
import torch

from invgen.priors import DiffusionPrior, LinearBetas
from invgen.priors.networks import MLPDenoiser


def prior(**options: Any) -> DiffusionPrior:
    """A small network; `parametrisation` says what it estimates, `levels` which noise it is trained at."""
    torch.manual_seed(0)
    return DiffusionPrior(MLPDenoiser(2, width=128, depth=3), (2,), transform=moons.STANDARD, **options)


def main(fast: bool = False, figure: str = "ddpm.png") -> dict[str, float]:
    """Train, measure, invert, draw; returns what it printed."""
    began, found = time.process_time(), {"entropy": moons.LAW.entropy()}
    for T in (100, 300):
        found[f"signal_left_at_{T}"] = float(LinearBetas(T).alpha_bar[-1].sqrt())
        try:
            prior(parametrisation="epsilon", levels=LinearBetas(T))
        except ValueError as refused:
            print(f"T = {T}: {refused}\n")
    found["signal_left_at_1000"] = float(LinearBetas(1000).alpha_bar[-1].sqrt())

    steps, batch = (200, 64) if fast else (5000, 256)
    models = {
        "DDPM": prior(parametrisation="epsilon", levels=LinearBetas(1000)),  # the loss |n − ε̂|², T = 1000
        "EDM": prior(),  # the loss |x_0 − D|² weighted to 1 at every level, log-normal levels
    }
    x = moons.held_out(50 if fast else 1000)
    for name, model in models.items():
        moons.train(model, steps, batch, 2e-3, ema=0.999)
        # the density along the probability-flow ODE, exact trace
        q = model.log_prob_estimate(x, trace="exact", rtol=1e-3 if fast else 1e-4)
        found[f"{name}_nll_gap"] = moons.nll_gap(q, x)

    # Guidance: MMPS takes p(x_0 | x_σ) for Gaussian, which is not so between the moons, and weighs modes a little wrongly.
    # TDS corrects the same guidance by weights: exact as particles and steps grow, for the law this network samples.
    draws, scores = moons.guided(models["EDM"], fast)
    found |= scores

    fig, axes = plt.subplots(1, 3, figsize=(13, 3.8), width_ratios=(1, 1, 1.1), layout="constrained")
    for ax, (name, model), how in zip(axes, models.items(), ("1000 steps, ancestral", "30 steps, Heun")):
        options: dict[str, Any] = (
            {"sampler": "ancestral", "steps": 1000} if name == "DDPM" else {"sampler": "heun", "steps": 30}
        )
        made = model.sample(200 if fast else 2000, chunk=2000, **options)
        moons.draw_points(ax, made, f"{name} ({how}):\nNLL = entropy + {found[f'{name}_nll_gap']:.3f} nats")
    moons.draw_posterior(axes[2], draws)
    return lesson.finish(fig, figure, found, began)


if __name__ == "__main__":
    lesson.command_line(main, __doc__)
