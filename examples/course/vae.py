"""Variational autoencoders: a bound that is one, the rate it spends, and the noise level that a wrong loss hides.

    log p(x) ≥ ELBO = E_q log p(x | z) − KL(q(z | x) ‖ N(0, I)),      sums over pixels and over latent units

The courses average: (1 − w)·mean(squared error) + w·KL, or a mean over pixels of the one plus a mean over units of the
other. That is an ELBO too, of another model: a Gaussian likelihood with sigma = 0.69 on pixels in [0, 1] for the first
(0.78, 0.39 in other notebooks), a weight beta = pixels/units (12 to 256) for the second; hence the blur. Here: facies are
0 or 1, their likelihood is Bernoulli, both terms are sums, and the hidden sigma = 0.69 is trained beside it, in the open.

    python examples/course/vae.py [--fast] [--figure vae.png]
"""

from __future__ import annotations

import math
import time
import warnings
from typing import Any

import lesson
import matplotlib.pyplot as plt
import sections
import torch

from invgen.diagnostics import latent_path
from invgen.priors import VAE, ArrayData, Training
from invgen.solvers import MAP


def main(fast: bool = False, figure: str = "vae.png") -> dict[str, float]:
    """Train twice, measure, invert, draw; returns what it printed."""
    began, curves, draws = time.process_time(), {}, {}
    found: dict[str, float] = {}
    x, fresh = sections.examples(300 if fast else 6000), sections.held_out(200 if fast else 1000)
    models: dict[str, VAE] = {}
    likelihoods: dict[str, dict[str, Any]] = {"Bernoulli": {"likelihood": "bernoulli"}, "course": {"sigma": 0.69}}
    for name, likelihood in likelihoods.items():
        torch.manual_seed(0)  # the first weights; training draws from streams of its own
        vae = models[name] = VAE.convolutional(sections.SHAPE, latent=24, widths=(24, 48, 64), **likelihood)
        training = Training(steps=20 if fast else 500, batch_size=16 if fast else 32, learning_rate=2e-3, ema=0.99)
        training.fit(vae, ArrayData(x), progress=False)
        vae.eval().requires_grad_(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of posterior collapse: its numbers are printed
            figures = vae.validation({"x": fresh})
        found |= {f"{name}_{key}": figures[key] for key in ("rate", "active_units", "reconstruction_rmse")}
        curves[name] = vae.rate_distortion(fresh[:200])
        draws[name] = vae.sample(len(fresh) // 2, seed=1)
        found[f"{name}_distance_over_floor"] = sections.quality(draws[name], fresh)
        if name == "Bernoulli":  # bits of a probability of 0 and 1; a density of a pixel has no such unit
            for k in (1, 4 if fast else 64):  # 1: the ELBO; the bound rises with their number
                bound = vae.log_prob_estimate(fresh[:200], samples=k)
                found[f"bits_per_pixel_{k}_samples"] = float(-bound.mean() / (1024 * math.log(2)))

    # Sixty scattered cores, and the best z from many starts: each fits the data, their scatter is not a posterior's.
    vae, truth, cores, sigma = models["Bernoulli"], fresh[:1], sections.points(60), 0.2
    p = sections.problem(vae, cores, sigma, truth)
    modes = MAP(space="z", keep="all", iterations=30 if fast else 150).solve(p, 4 if fast else 16, seed=1)
    best = modes.samples[0, 0, modes.stats["objective"][0, 0].argmin()]
    found["map_misfit"] = sections.misfit(p, modes.samples[0, 0])
    found["map_rmse"] = float((best - truth).square().mean().sqrt())

    fig = plt.figure(figsize=(10, 9.6), layout="constrained")
    top, bottom = fig.subfigures(2, 1, height_ratios=(4, 1.2))
    axes = top.subplots(4, 6)
    sections.gallery(axes[0], fresh, "held-out sections")
    for row, name, title in (
        (1, "Bernoulli", "means of draws, Bernoulli"),
        (2, "course", "means of draws, sigma = 0.69"),
    ):
        ratio = found[f"{name}_distance_over_floor"]
        sections.gallery(axes[row], draws[name], f"{title}: {ratio:.1f} × floor")
    ends = vae.encode(fresh[:2]).mean
    sections.gallery(axes[3], latent_path(vae.decode, ends[0], ends[1], 6), "interpolation on a great circle of z")
    last = bottom.subplots(1, 4, width_ratios=(1, 1, 1, 2.6))
    image = sections.show(last[0], truth, "truth, 60 cores")
    sections.show_data(last[0], cores)
    sections.show(last[1], best, "best of the modes")
    sections.show(last[2], modes.samples[0, 0].mean(0), "mean of the modes")
    last[0].set_ylabel("depth (m)", fontsize=8)
    for ax in (*axes[3], *last[:3]):
        ax.set_xlabel("distance (m)", fontsize=8)
    top.colorbar(image, ax=axes, label="sand (1) or shale (0), probability of sand", shrink=0.5)
    for name, label in (("Bernoulli", "Bernoulli"), ("course", "sigma = 0.69")):
        units, active = curves[name]["units"], found[f"{name}_active_units"]
        last[3].plot(units, curves[name]["rate"], label=f"{label}: {active:.0f} units active")
    last[3].set(xlabel="units, costliest first", ylabel="rate (nats)")
    last[3].set_title("what the latent units cost together", fontsize=9, loc="left")
    last[3].legend(fontsize=8)
    return lesson.finish(fig, figure, found, began, dpi=100)


if __name__ == "__main__":
    lesson.command_line(main, __doc__)
