"""A Wasserstein GAN with gradient penalty on rock: an image of any size, rock statistics, and a coarse scan sharpened.

    critic     min_f  E f(G(z)) − E f(x) + λ E (|∇f(x̂)| − 1)²,   x̂ on the line between a crop and a draw
    generator  min_G  −E f(G(z)),      z a field of N(0, 1)

The course writes the formula down and never runs it; its rock GANs are judged by eye. Here: it runs, and porosity and
the two-point probability (the chance that two points h apart are both pore) of draws stand beside those of rock that
training never saw. The generator is convolutional without borders: a bigger latent is a bigger rock.

The rock is packed spheres, porosity about 0.3, unless `--rock FILE` names a two-valued volume (.npy, pores 1).

    python examples/course/wgan.py [--fast] [--rock berea.npy] [--figure wgan.png]
"""

from __future__ import annotations

import time

import lesson
import matplotlib.pyplot as plt
import numpy as np
import torch

from invgen.data import RockCrops, open_volume
from invgen.diagnostics import proportions, two_point_probability
from invgen.noise import GaussianNoise
from invgen.operators import MatrixOperator
from invgen.priors import WGAN, ArrayData, Training
from invgen.problem import InverseProblem
from invgen.solvers import MAP


def spheres() -> np.ndarray:
    """A stand-in for a segmented rock: overlapping grains of radius 4 to 7 voxels."""
    rng, n = np.random.default_rng(0), 96
    z, y, x = np.ogrid[:n, :n, :n]
    rock = np.ones((n, n, n), dtype=np.uint8)
    for c, r in zip(rng.uniform(-6, n + 6, (1900, 3)), rng.uniform(4, 7, 1900), strict=True):
        i, j, k = (slice(max(int(a - r), 0), int(a + r) + 2) for a in c)  # the box around it
        rock[i, j, k][(z[i] - c[0]) ** 2 + (y[:, j] - c[1]) ** 2 + (x[:, :, k] - c[2]) ** 2 < r * r] = 0
    return rock


def blocks(n: int, size: int) -> MatrixOperator:
    """Means over size × size blocks of an n × n image: what a coarser scanner sees."""
    one = torch.kron(torch.eye(n // size), torch.full((1, size), 1.0 / size))
    return MatrixOperator(torch.kron(one, one), (1, n, n))


def main(fast: bool = False, figure: str = "wgan.png", rock: str | None = None) -> dict[str, float]:
    """Train, judge, invert, draw; returns what it printed."""
    began = time.process_time()
    found: dict[str, float] = {}
    volume = np.asarray(open_volume(rock)) if rock else spheres()
    crops = RockCrops(volume, (32, 32), region=(0.0, 0.6))
    unseen = RockCrops(volume, (32, 32), region=(0.6, 1.0))  # shares no voxel with the training crops
    x, fresh = crops.pool(300 if fast else 8000), unseen.pool(100 if fast else 1000, seed=1)
    torch.manual_seed(0)  # the first weights; training draws from streams of its own
    prior = WGAN.stationary(
        (1, 32, 32),
        latent_channels=4,
        widths=(48, 32, 16),
        critic_widths=(16, 32, 48),
        critic_steps=3,
        output="sigmoid",
    )
    training = Training(steps=15 if fast else 600, batch_size=16 if fast else 32, learning_rate=5e-4, ema=0.98)
    training.fit(prior, ArrayData(x), progress=False)
    prior.eval().requires_grad_(False)
    made = prior.sample(len(fresh), seed=1)
    judged = prior.validation({"x": fresh, "train": x[: len(fresh)]})
    found |= {name: judged[name] for name in ("critic_gap", "critic_gradient", "diversity", "memorisation")}
    for name, images in (("draws", made), ("unseen rock", fresh)):
        share = proportions(images)[:, 1]
        found[f"porosity, {name}"], found[f"its sd over images, {name}"] = float(share.mean()), float(share.std())

    # A scan eight times coarser, noise 0.02 of porosity: which rocks at full resolution does it leave possible? The best
    # z from many starts; each fits, their scatter shows what the scan leaves open and is not the width of a posterior.
    scan, sigma, truth = blocks(32, 8), 0.02, fresh[:1]
    data = scan(truth) + sigma * torch.randn(1, 16, generator=torch.Generator().manual_seed(7))
    p = InverseProblem(data, scan, GaussianNoise(sigma), prior)
    modes = MAP(space="z", keep="all", iterations=30 if fast else 150).solve(p, 4 if fast else 16, seed=1).samples[0, 0]
    found["map_misfit"] = float(((data - scan(modes)) / sigma).square().mean().sqrt())
    found["prior_misfit"] = float(((data - scan(made[:100])) / sigma).square().mean().sqrt())

    fig, axes = plt.subplots(3, 6, figsize=(11, 6.2), layout="constrained")
    coarse = data.reshape(1, 4, 4).repeat_interleave(8, 1).repeat_interleave(8, 2)
    row = [truth[0], coarse, modes[0], modes[1], modes.mean(0), modes.std(0)]
    titles = ["truth", "scan, 4 × 4, data", "a mode in z", "another", "mean of the modes", "their sd"]
    images = [*zip(axes[0], fresh[:3], ["unseen rock", "", ""]), *zip(axes[1], made[:3], ["draws", "", ""])]
    for ax in axes[:2, 3:].flat:
        ax.remove()
    big, curve = (fig.add_subplot(axes[0, 0].get_gridspec()[:2, part]) for part in (slice(3, 5), 5))
    wide = prior.at((96, 96)).sample(1, seed=3)[0]
    for ax, image, title in [*images, *zip(axes[2], row, titles), (big, wide, "the same generator, a bigger latent")]:
        extent = (0, image.shape[-1], image.shape[-2], 0)
        shown = ax.imshow(image[0], cmap="gray_r", vmin=0, vmax=1, extent=extent, interpolation="nearest")
        ax.set_title(title, fontsize=9)
    for ax in (*axes[2], big):
        ax.set_xlabel("x (voxels)", fontsize=8)
    for ax in axes[:, 0]:
        ax.set_ylabel("y (voxels)", fontsize=8)
    fig.colorbar(shown, ax=axes[2, -1], label="pore (1), grain (0)")
    for name, of, colour in (("unseen rock", fresh, "tab:red"), ("draws", made, "k")):
        statistic = two_point_probability(of, max_lag=16)
        curve.errorbar(statistic.lags, statistic.mean, 2 * statistic.error, color=colour, lw=1, label=name)
    curve.set(xlabel="lag h (voxels)", title="$S_2(h)$", ylim=(0, None))
    curve.legend(fontsize=7)
    return lesson.finish(fig, figure, found, began, dpi=100)


if __name__ == "__main__":
    lesson.command_line(main, __doc__, rock="a two-valued volume (.npy) instead of packed spheres")
