"""A GAN on channel sections: the non-saturating game with a penalty, judged by figures, and wells drilled into it.

    critic     min_f  E softplus(−f(x)) + E softplus(f(G(z))) + r1/2 E |∇f(x)|²
    generator  min_G  E softplus(−f(G(z))),      z ~ N(0, I)

The course: a perceptron on MNIST (which fails on rocks), DCGANs on beadpack and Berea with StepLR(30, 0.1) over 200
epochs, which ends at a learning rate of 2e-10: little moves after epoch 90 of 200. No figure of merit anywhere.
Here: the rate falls once, as a cosine to a hundredth; the penalty r1 keeps the game from circling; draws are judged by
diversity (0 for mode collapse), by what is missing (recall), by copying (memorisation): 1 is right for each.

    python examples/course/gan.py [--fast] [--figure gan.png]
"""

from __future__ import annotations

import time
import warnings

import lesson
import matplotlib.pyplot as plt
import sections
import torch

from invgen.diagnostics import latent_path
from invgen.priors import GAN, ArrayData, Training
from invgen.solvers import MAP


def main(fast: bool = False, figure: str = "gan.png") -> dict[str, float]:
    """Train, judge, invert, draw; returns what it printed."""
    began = time.process_time()
    found: dict[str, float] = {}
    x, fresh = sections.examples(300 if fast else 6000), sections.held_out(200 if fast else 1000)
    torch.manual_seed(0)  # the first weights; training draws from streams of its own
    shape, widths = sections.SHAPE, (24, 48, 64)
    gan = GAN.convolutional(shape, latent=24, widths=widths, critic_widths=widths, r1=50.0, output="sigmoid")
    training = Training(steps=20 if fast else 900, batch_size=16 if fast else 32, learning_rate=5e-4, ema=0.99)
    training.fit(gan, ArrayData(x), progress=False)
    gan.eval().requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of mode collapse: its number is printed
        judged = gan.validation({"x": fresh, "train": x[:1000]})
    found |= {name: judged[name] for name in ("diversity", "precision_distance", "recall_distance", "memorisation")}
    draws = gan.sample(len(fresh) // 2, seed=1)
    found["distance over floor"] = sections.quality(draws, fresh)
    found["sand, draws"], found["sand, held out"] = float(draws.mean()), float(fresh.mean())

    # Three wells. A GAN has no density and no encoder: the way in is its latent. The starts end in different modes,
    # which all fit; their scatter shows what the wells leave open, but is not the width of a posterior.
    truth, drill, sigma = fresh[:1], sections.wells(), 0.2
    p = sections.problem(gan, drill, sigma, truth)
    modes = MAP(space="z", keep="all", iterations=30 if fast else 150).solve(p, 4 if fast else 16, seed=1).samples[0, 0]
    found["map_misfit"] = sections.misfit(p, modes)
    found["prior_misfit"] = sections.misfit(p, draws[:100])

    fig, axes = plt.subplots(4, 6, figsize=(10, 7.6), layout="constrained")
    sections.gallery(axes[0], fresh, "held-out sections")
    sections.gallery(axes[1], draws, f"draws: {found['distance over floor']:.1f} × floor")
    ends = torch.randn(2, 24, generator=torch.Generator().manual_seed(5))
    sections.gallery(axes[2], latent_path(gan.decode, ends[0], ends[1], 6), "interpolation on a great circle of z")
    image = sections.show(axes[3, 0], truth, "truth, wells")
    sections.show_data(axes[3, 0], drill)
    for ax, mode in zip(axes[3, 1:4], modes):
        sections.show(ax, mode, "a mode in z")
    sections.show(axes[3, 4], modes.mean(0), "mean of the modes")
    sections.show(axes[3, 5], modes.std(0), "their sd (same scale)")
    axes[3, 0].set_ylabel("depth (m)", fontsize=8)
    for ax in axes[3]:
        ax.set_xlabel("distance (m)", fontsize=8)
    fig.colorbar(image, ax=axes[:, -1], label="sand (1) or shale (0)", shrink=0.5)
    return lesson.finish(fig, figure, found, began, dpi=100)


if __name__ == "__main__":
    lesson.command_line(main, __doc__)
