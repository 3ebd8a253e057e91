"""Consistency distillation on two moons: a diffusion in one or two steps, and a posterior in its latent.

    f(u, σ) = the end of the ODE path through u:      f(u_{σ_{k+1}}, σ_{k+1}) ≈ f(û_{σ_k}, σ_k),   f(u, σ_min) = u

with û one Heun step of the teacher's ODE. The course's stored run trains for five steps. Here the student starts from
the teacher's weights, and is judged against its teacher and against the floor, the distance between two sets of true
draws. It is not the teacher: what is left is printed.

What a generator of two evaluations is good for: its latent can be searched. 20 000 prior draws cost 40 000 evaluations
here; the teacher's own ODE takes 35 a draw.

    python examples/course/consistency.py [--fast] [--figure consistency.png]
"""

from __future__ import annotations

import time

import lesson
import matplotlib.pyplot as plt
import moons
import torch

from invgen.diagnostics import sliced_wasserstein
from invgen.priors import Consistency, DiffusionPrior
from invgen.priors.networks import MLPDenoiser
from invgen.solvers import MAP


def main(fast: bool = False, figure: str = "consistency.png") -> dict[str, float]:
    """Train, distil, measure, invert, draw; returns what it printed."""
    began = time.process_time()
    torch.manual_seed(0)  # the first weights; training draws from streams of its own
    teacher = DiffusionPrior(MLPDenoiser(2, width=128, depth=3), (2,), transform=moons.STANDARD)
    moons.train(teacher, 200 if fast else 3500, 64 if fast else 256, 5e-3, ema=0.999)
    student = Consistency.of(teacher, steps=2)
    moons.train(student, 100 if fast else 3500, 64 if fast else 256, 2e-3, ema=0.999)
    # the same function in one step: another number of steps takes no new training
    single = Consistency.of(teacher, steps=1)
    single.network = student.network
    single.eval()

    n = 500 if fast else 10_000
    truth = moons.held_out(n)
    draws = {
        "teacher, 18 Heun steps": teacher.sample(n, seed=2, sampler="heun", steps=18, chunk=n),
        "student, 2 steps": student.sample(n, seed=2),
        "student, 1 step": single.sample(n, seed=2),
        "floor": torch.from_numpy(moons.LAW.sample(n, seed=999)),
    }
    found = {f"distance, {name}": float(sliced_wasserstein(x, truth, 50)) for name, x in draws.items()}

    # 1. The best z from many starts: fits the datum, but a point has no width, and the likeliest z is not a likely x: all
    # starts end in the z nearest to 0, which lies between the moons.
    p = moons.problem(student)
    modes = MAP(space="z", keep="all", iterations=20 if fast else 100).solve(p, 8 if fast else 64, seed=1)
    misfit = (modes.samples[0, 0, :, 1] - moons.DATUM) / moons.SIGMA
    found["map_rms_misfit"] = float(misfit.square().mean().sqrt())
    # 2. The posterior under the student: its draws weighted by the likelihood (see moons.weighted).
    y, w, found["effective_draws"] = moons.weighted(p, 500 if fast else 20_000)
    found |= moons.compare(y, w)

    fig, axes = plt.subplots(1, 3, figsize=(13, 3.8), width_ratios=(1, 1, 1.1), layout="constrained")
    for ax, name in zip(axes, ("student, 1 step", "student, 2 steps")):
        far, best, least = (found[f"distance, {k}"] for k in (name, "teacher, 18 Heun steps", "floor"))
        moons.draw_points(ax, draws[name], f"{name}: distance {far:.3f}\n(teacher {best:.3f}, floor {least:.3f})")
    axes[1].plot(
        *modes.samples[0, 0].T.numpy(),
        "o",
        mfc="none",
        color="tab:green",
        label=f"modes in z, {modes.samples.shape[2]} starts",
    )
    axes[1].legend(fontsize=8, loc="lower left")
    moons.draw_posterior(axes[2], {f"student ({found['effective_draws']:.0f} effective draws)": (y, w)})
    return lesson.finish(fig, figure, found, began)


if __name__ == "__main__":
    lesson.command_line(main, __doc__)
