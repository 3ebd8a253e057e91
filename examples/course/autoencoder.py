"""An autoencoder is no prior until its codes have a law: a box, a Gaussian, a kernel density; then two inversions.

    min over e, d of  E |x − d(e(x))|²  (cross-entropy for facies);      p(x): x = d(y), y ~ a law fitted to the codes

The course: codes squeezed by tanh and drawn from U(−1, 1), whose samples are poor; that is used to motivate the VAE. But
codes fill no box: the fault is the box's. Here: the same decoder with three laws of codes, measured against held-out
sections; the Gaussian and the kernel density are `Pushforward` priors, and inverse problems are solved under both.

    python examples/course/autoencoder.py [--fast] [--figure autoencoder.png]
"""

from __future__ import annotations

import time

import lesson
import matplotlib.pyplot as plt
import sections
import torch
from torch import Tensor

from invgen.contracts import Operator
from invgen.priors import ArrayData, Autoencoder, Training
from invgen.problem import InverseProblem
from invgen.solvers import MAP, MMPS, GuidedDiffusion


class Decoded(Operator):
    """g(d(y)): physics behind a decoder, a non-linear operator on codes."""

    def __init__(self, autoencoder: Autoencoder, physics: Operator) -> None:
        super().__init__((autoencoder.codes,), physics.data_shape)
        self.autoencoder, self.physics = autoencoder, physics

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        return self.physics(self.autoencoder.decode(x))


def main(fast: bool = False, figure: str = "autoencoder.png") -> dict[str, float]:
    """Train, fit laws to the codes, measure, invert, draw; returns what it printed."""
    began = time.process_time()
    found: dict[str, float] = {}
    x, fresh = sections.examples(300 if fast else 6000), sections.held_out(200 if fast else 2000)
    torch.manual_seed(0)  # the first weights; training draws from streams of its own
    autoencoder = Autoencoder.convolutional(sections.SHAPE, codes=24, widths=(24, 48, 64), loss="bernoulli")
    training = Training(steps=20 if fast else 700, batch_size=16 if fast else 32, learning_rate=2e-3, ema=0.99)
    training.fit(autoencoder, ArrayData(x), progress=False)
    autoencoder.eval().requires_grad_(False)
    found["reconstruction_rmse"] = autoencoder.validation({"x": fresh})["reconstruction_rmse"]

    codes = torch.cat([autoencoder.encode(part) for part in x[:2000].split(100)])
    low, high = codes.amin(0), codes.amax(0)
    gaussian, kernels = autoencoder.prior(x[:2000]), autoencoder.prior(x[:2000], kind="kde")
    n = len(fresh) // 2
    box = low + (high - low) * torch.rand(n, 24, generator=torch.Generator().manual_seed(1))
    draws = {
        "box": autoencoder.decode(box),
        "Gaussian": gaussian.sample(n, seed=1),
        "kernel density": kernels.sample(n, seed=1),
    }
    found |= {f"distance over floor, {name}": sections.quality(made, fresh) for name, made in draws.items()}

    # 1. Gaussian codes have a latent z ~ N(0, I): the best z from many starts. Modes, whose scatter is not a posterior's.
    truth, drill, sigma = fresh[:1], sections.wells(), 0.2
    p = sections.problem(gaussian, drill, sigma, truth)
    modes = MAP(space="z", keep="all", iterations=30 if fast else 150).solve(p, 4 if fast else 16, seed=1).samples[0, 0]
    found["map_misfit"] = sections.misfit(p, modes)
    # 2. The kernel density has an exact denoiser: guided diffusion of the codes, the decoder a part of the physics.
    coded = InverseProblem(p.terms[0].data, Decoded(autoencoder, drill), p.terms[0].noise, kernels.base)
    sampler = GuidedDiffusion(MMPS(iterations=16), steps=10 if fast else 40)
    y = sampler.solve(coded, 4 if fast else 16, seed=1).samples[0, 0]
    posterior = autoencoder.decode(y)
    found["guided_misfit"] = sections.misfit(p, posterior)

    fig, axes = plt.subplots(4, 6, figsize=(10, 7.6), layout="constrained")
    sections.gallery(axes[0], fresh, "held-out sections")
    for row, name in zip(axes[1:], draws):
        ratio = found[f"distance over floor, {name}"]
        sections.gallery(row[:3], draws[name], f"{name}: {ratio:.1f} × floor")
    image = sections.show(axes[1, 3], truth, "truth, wells")
    sections.show_data(axes[1, 3], drill)
    sections.show(axes[1, 4], autoencoder.decode(autoencoder.encode(truth)), "its reconstruction")
    fig.colorbar(image, ax=axes, label="sand (1) or shale (0), probability of sand; sd", shrink=0.5)
    for row, name, found_x in ((axes[2], "modes in z, Gaussian", modes), (axes[3], "guided, kernels", posterior)):
        sections.show(row[3], found_x[0], name)
        sections.show(row[4], found_x.mean(0), f"mean of {len(found_x)}")
        sections.show(row[5], found_x.std(0), f"sd, {float(found_x.std(0).mean()):.2f} on average")
    axes[1, 5].set_axis_off()
    for ax in axes[:, 1:].flat:
        ax.set_yticklabels([])
    for ax in axes[3]:
        ax.set_xlabel("distance (m)", fontsize=8)
    return lesson.finish(fig, figure, found, began)


if __name__ == "__main__":
    lesson.command_line(main, __doc__)
