"""Imaging operators: CT beside deepinv's `Tomography` in the same run, its adjoint, and line integrals of discs.

Runs with the interpreter of `make peers`; called from another environment it starts again with `.peers/bin/python`;
without that, the rows of the comparison say so and the rest is measured.

1  Forward and adjoint of 8 images of 256 x 256 under 60 views over 180 degrees and 363 detector cells, float32, one
   thread, CPU time. deepinv has two adjoints, one by automatic differentiation (its default) and an approximate one
   that is faster; the ratio is to the faster pair.
2  Dot test of `ParallelBeamCT` and `FanBeamCT` at that size in float64.
3  Ten discs of 60 to 100 pixels radius at random places, drawn as the share of each pixel that they cover: relative
   difference (over the sinogram, root mean square) to the chords 2 (r^2 - t^2)^(1/2), for thin rays through the middle of
   the cells, and for the mean over a cell, which is what the operator models. The largest of the ten.

`--fast`: 9 instead of 31 repeats, and three discs.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Benchmark, interleaved
from torch import Tensor

from invgen.linalg import dot_test
from invgen.operators import FanBeamCT, ParallelBeamCT

ROOT = Path(__file__).resolve().parents[1]
SIDE, VIEWS, BATCH = 256, 60, 8


def deepinv_tomography() -> Any:
    """deepinv's class; None where it is missing. May replace this process by the interpreter that has it."""
    if importlib.util.find_spec("deepinv"):
        import peers_libraries  # noqa: F401  # stands in for a torchvision that cannot be imported
        from deepinv.physics import Tomography

        return Tomography
    python = ROOT / ".peers" / "bin" / "python"
    if python.exists() and Path(sys.prefix).resolve() != python.parents[1].resolve():
        os.execv(python, [str(python), *sys.argv])
    return None


def pair(forward: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return adjoint(forward(x))

    return run


def speed(bench: Benchmark) -> None:
    x = torch.rand(BATCH, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).to(bench.device)
    ours = {f: ParallelBeamCT((1, SIDE, SIDE), VIEWS, footprint=f) for f in ("strip", "line")}
    runs = {f: pair(operator, operator.adjoint, x) for f, operator in ours.items()}
    Tomography = deepinv_tomography()
    if Tomography is None:
        print("ct_speed: peers missing, run make peers")
    else:
        for name, exact in (("autograd", True), ("iradon", False)):
            theirs = Tomography(
                VIEWS, SIDE, circle=False, normalize=False, adjoint_via_backprop=exact, device=bench.device
            )
            runs[name] = pair(theirs.A, theirs.A_adjoint, x)
    times = interleaved(runs, repeats=9 if bench.fast else 31, warmup=1)
    for name, t in times.items():
        bench.add(f"ct_seconds_{name}", t.median, "s", note=f"forward and adjoint; IQR {t.iqr:.3g}")
    if Tomography is not None:
        best = np.minimum(times["autograd"].samples, times["iradon"].samples)
        for figure, base, note in (
            ("ct_speed", best, "the faster of its two adjoints, which is not the exact one"),
            ("ct_speed_exact", np.array(times["autograd"].samples), "its exact adjoint"),
        ):
            q1, median, q3 = np.quantile(base / np.array(times["strip"].samples), [0.25, 0.5, 0.75])
            bench.add(figure, float(median), "x", note=f"deepinv over ours: {note}; IQR {q1:.0f} to {q3:.0f}")


def dot(bench: Benchmark) -> None:
    g, worst = torch.Generator().manual_seed(1), 0.0
    for operator in (
        ParallelBeamCT((1, SIDE, SIDE), VIEWS),
        ParallelBeamCT((1, SIDE, SIDE), VIEWS, footprint="line"),
        FanBeamCT((1, SIDE, SIDE), VIEWS, 1.5 * SIDE, 0.5 * SIDE),
    ):
        operator.to(bench.device)
        u = torch.randn(2, *operator.model_shape, generator=g, dtype=torch.float64).to(bench.device)
        v = torch.randn(2, *operator.data_shape, generator=g, dtype=torch.float64).to(bench.device)
        # Au and v are independent: against |Au| |v| a product near zero would hide an error, so the parts are compared
        d = operator(u)
        worst = max(worst, dot_test(operator, operator.adjoint, u, d + v * float(d.norm() / v.norm())))
    bench.add("ct_dot_test", worst, note="parallel (strip and line) and fan, relative to |Au| |v|")


def disc(radius: float, y: float, x: float, fine: int = 8) -> Tensor:
    """Share of every pixel that the disc covers, `(1, 1, SIDE, SIDE)`."""
    s = (np.arange(SIDE * fine) + 0.5) / fine - SIDE / 2
    inside = (s[:, None] - y) ** 2 + (s[None] - x) ** 2 <= radius**2
    return torch.from_numpy(inside.reshape(SIDE, fine, SIDE, fine).mean((1, 3)))[None, None]


def chords(operator: ParallelBeamCT, radius: float, y: float, x: float, rays: int) -> Tensor:
    """Mean chord of `rays` parallel rays in every cell, `(views, cells)`."""
    middle = torch.arange(operator.cells) - (operator.cells - 1) / 2
    s = (middle[:, None] + (torch.arange(rays) + 0.5) / rays - 0.5).double() * operator.cell_width
    angle = operator.angles[:, None, None]
    return 2 * (radius**2 - (s - x * angle.cos() - y * angle.sin()).square()).clamp_min(0).sqrt().mean(-1)


def discs(bench: Benchmark) -> None:
    rng, operator = np.random.default_rng(0), ParallelBeamCT((1, SIDE, SIDE), VIEWS)
    errors: dict[str, list[float]] = {"ray": [], "cell": [], "total": []}
    for _ in range(3 if bench.fast else 10):
        radius = float(rng.uniform(60, 100))
        reach = (SIDE / 2 - radius - 2) / math.sqrt(2)
        y, x = (float(v) for v in rng.uniform(-reach, reach, 2))
        found = operator(disc(radius, y, x))[0, 0]
        for name, rays in (("ray", 1), ("cell", 64)):
            want = chords(operator, radius, y, x, rays)
            errors[name].append(float((found - want).norm() / want.norm()))
        errors["total"].append(float((found.sum(1) / (math.pi * radius**2) - 1).abs().max()))
    bench.add(
        "ct_disc_error", max(errors["ray"]), note="chords of thin rays, relative root mean square, largest of the discs"
    )
    bench.add("ct_disc_error_cell", max(errors["cell"]), note="chords averaged over a cell, likewise")
    bench.add("ct_disc_mass_error", max(errors["total"]), note="sum of a view against the area of the disc")


def main() -> None:
    bench = Benchmark("imaging", "CT beside deepinv, its adjoint, and line integrals of discs.")
    speed(bench)
    dot(bench)
    discs(bench)
    bench.finish()


if __name__ == "__main__":
    main()
