"""Diffusion samplers beside deepinv and azula: time besides the network, end to end, and calibration.

Runs with the interpreter of `make peers`, by itself: called from another environment it starts again with
`.peers/bin/python`; without that, its rows say so and only what needs no peer is measured.

1  DPS with a denoiser of one multiplication: 64 samples of 64 × 64, periodic Gaussian blur, noise 0.05, 50 network calls
   for everybody. Overhead = CPU time − that of the multiplications alone, forward and backward, on the same batches.
2  The same end to end with a UNet of 0.5 M random weights in float32, one function for everybody, 12 calls. Then 50
   calls of ours on one chunk of 16 samples over the bare network's passes and vector–Jacobian products.
3  Calibration with an exact denoiser: `peers_calibration.py`.

Everybody runs on its defaults where nothing else is said: deepinv carries a float64 state through a float32 network and
draws one sample for each item of the data, here 64 copies; azula and invgen carry float32; invgen takes 16 images a
chunk. One thread. `--fast`: 25, 6 and 25 network calls; 250 samples instead of 1000 and fewer steps in 3.
"""

from __future__ import annotations

import importlib.util
import math
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import Benchmark, interleaved
from peers_calibration import NOISE, Shown, calibration, gaussian_kernel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from invgen.noise import GaussianNoise
from invgen.operators import Convolution
from invgen.priors import DiffusionPrior
from invgen.priors.networks import UNet
from invgen.problem import InverseProblem
from invgen.solvers import DPS, GuidedDiffusion

ROOT = Path(__file__).resolve().parents[1]
MISSING = "peers missing: run make peers"
SAMPLES, SIDE = 64, 64


def peers() -> Any:
    """The module with the other libraries; None where they are missing. May replace this process by the right one."""
    if all(importlib.util.find_spec(name) for name in ("deepinv", "azula")):
        import peers_libraries

        return peers_libraries
    python = ROOT / ".peers" / "bin" / "python"
    if python.exists() and Path(sys.prefix).resolve() != python.parents[1].resolve():
        os.execv(python, [str(python), *sys.argv])
    return None


class Count(TorchDispatchMode):
    """Counts tensor operations that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        self.operations += 1
        return function(*arguments, **(keywords or {}))


def dps_runs(
    libraries: Any, denoise: Callable[[Tensor, Any], Tensor], plain_azula: bool
) -> dict[str, Callable[[int, int], Any]]:
    """name -> run(samples, network calls) of DPS on the 64 × 64 problem, every library with its defaults otherwise."""
    kernel = gaussian_kernel(1.5)
    operator = Convolution(kernel, (1, SIDE, SIDE))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        clean = operator(torch.rand(1, 1, SIDE, SIDE, generator=g))
    y = clean + NOISE * torch.randn(clean.shape, generator=g)
    problem = InverseProblem(y, operator, GaussianNoise(NOISE), Shown(denoise, SIDE, 1.0, 50.0))

    def ours(samples: int, calls: int) -> Any:  # one guided call starts the chain, then one a level
        return GuidedDiffusion(DPS(), "ancestral", steps=calls - 1).solve(problem, samples)

    runs: dict[str, Callable[[int, int], Any]] = {"invgen": ours}
    if libraries is None:
        return runs
    from azula.denoise import Denoiser, DiracPosterior
    from azula.guidance.dps import DPSSampler
    from azula.noise import VPSchedule
    from deepinv.sampling import DPS as DeepinvDPS

    class Trivial(Denoiser):
        """No scaling around the one multiplication."""

        schedule = VPSchedule()

        def forward(self, x_t: Tensor, t: Tensor, **_: Any) -> DiracPosterior:
            return DiracPosterior(mean=denoise(x_t, t))

    physics = libraries.deepinv_physics(kernel, SIDE, NOISE)
    network = libraries.DeepinvDenoiser(denoise)
    tiled = y.expand(SAMPLES, 1, SIDE, SIDE).contiguous()  # deepinv draws one sample for each item of y
    blur = libraries.Blur(kernel, SIDE).to(torch.float32)
    wrapped = Trivial() if plain_azula else libraries.AzulaDenoiser(denoise, VPSchedule())

    def deepinv(dtype: torch.dtype) -> Callable[[int, int], Any]:
        # noise levels on linspace(1, 0, num_steps), one network call between neighbours
        return lambda n, calls: DeepinvDPS(network, num_steps=calls + 1, dtype=dtype)(tiled[:n], physics)

    def azula(samples: int, calls: int) -> Any:
        sampler = DPSSampler(wrapped, y, blur, steps=calls, silent=True)
        return sampler(sampler.init((samples, 1, SIDE, SIDE)))

    return runs | {"deepinv": deepinv(torch.float64), "deepinv float32": deepinv(torch.float32), "azula": azula}


def passes(network: Callable[[Tensor], Tensor], batch: int, batches: int, calls: int) -> Callable[[], None]:
    """The network alone: forward and vector–Jacobian product."""
    u = torch.randn(batch, 1, SIDE, SIDE)

    def run() -> None:
        for _ in range(calls * batches):
            leaf = u.detach().requires_grad_()
            torch.autograd.grad(network(leaf), leaf, u)

    return run


def quartiles(values: list[float]) -> tuple[float, float, float]:
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


def overhead(bench: Benchmark, libraries: Any) -> None:
    """DPS around a network of one multiplication."""
    calls = 25 if bench.fast else 50
    batches: list[int] = []

    def halve(u: Tensor, sigma: Any) -> Tensor:
        batches.append(len(u))
        return u * 0.5

    runs = dps_runs(libraries, halve, plain_azula=True)
    chunks, operations = {}, {}
    for name, run in runs.items():
        batches.clear()
        run(SAMPLES, calls)
        largest = max(batches)  # invgen denoises one item twice a chunk besides, for the prior's mean
        chunks[name] = SAMPLES // largest
        if batches.count(largest) != calls * chunks[name]:
            raise RuntimeError(f"{name} called the network {batches.count(largest)} times, not {calls} a batch.")
        counted = []
        for k in (calls, 2 * calls):
            with Count() as count:
                run(largest, k)
            counted.append(count.operations)
        operations[name] = (counted[1] - counted[0]) / calls - 2  # the multiplication, there and back
    split = {c: passes(lambda u: u * 0.5, SAMPLES // c, c, calls) for c in sorted(set(chunks.values()))}
    timed = {name: (lambda run=run: run(SAMPLES, calls)) for name, run in runs.items()}
    times = interleaved({**timed, **{f"network, {c} batches": f for c, f in split.items()}}, repeats=9, warmup=2)
    print(f"\n1  DPS, {SAMPLES} × {SIDE} × {SIDE}, {calls} network calls, network of one multiplication; CPU time")
    print(
        f"   {'':22s} {'seconds':>8s} {'IQR':>7s} {'overhead, ms a call':>20s} {'operations a call':>18s} {'batches':>8s}"
    )
    besides: dict[str, list[float]] = {}
    medians: dict[str, float] = {}
    for name in runs:
        t, own = times[name], times[f"network, {chunks[name]} batches"].median
        besides[name] = [sample - own for sample in t.samples]
        medians[name] = 1e3 * quartiles(besides[name])[1] / calls
        cells = f"{t.median:8.3f} {t.iqr:7.3f} {medians[name]:20.2f} {operations[name]:18.1f} {chunks[name]:8d}"
        print(f"   {name:22s} {cells}")
    for name in runs:
        label = name.replace(" ", "_")
        bench.add(f"dps_overhead_{label}", medians[name], "ms a call", note=f"{SAMPLES} samples")
        bench.add(f"dps_operations_{label}", operations[name], "operations a call", note="of one batch")
    for name in [n for n in runs if n != "invgen"]:
        ratios = [a / b for a, b in zip(besides[name], besides["invgen"], strict=True)]
        q1, median, q3 = quartiles(ratios)
        bench.add(
            f"dps_overhead_ratio_{name.replace(' ', '_')}", median, "x", note=f"over invgen; IQR {q1:.2f} to {q3:.2f}"
        )


def random_unet() -> DiffusionPrior:
    """0.5 M weights; the layers that training starts from zero are random too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = UNet(1, widths=(32, 64, 96), blocks=1)
        for p in network.parameters():
            p.data.add_(0.02 * torch.randn_like(p))
    return DiffusionPrior(network, (1, SIDE, SIDE)).eval().requires_grad_(False)


def end_to_end(bench: Benchmark, libraries: Any) -> None:
    """DPS around a real network."""
    calls = 6 if bench.fast else 12
    prior = random_unet()
    level = torch.zeros(SAMPLES)

    def network(u: Tensor) -> Tensor:
        return prior.network(u, level[: len(u)])

    runs = dps_runs(libraries, prior.denoise, plain_azula=False)
    weights = sum(p.numel() for p in prior.network.parameters()) / 1e6
    print(f"\n2  DPS, {SAMPLES} × {SIDE} × {SIDE}, {calls} network calls, UNet of {weights:.2f} M weights; CPU time")
    if libraries is not None:
        shown = [name for name in runs if name != "deepinv float32"]
        timed = {name: (lambda run=runs[name]: run(SAMPLES, calls)) for name in shown}
        bare = {f"network, {SAMPLES // b} × {b}": passes(network, b, SAMPLES // b, calls) for b in (16, 64)}
        times = interleaved(timed | bare, repeats=3)
        for name, t in times.items():
            print(f"   {name:22s} {t.median:8.2f} s  IQR {t.iqr:.2f}")
        for name in shown:
            bench.add(f"end_to_end_{name}", times[name].median, "s", note=f"{SAMPLES} samples, {calls} network calls")
    small, calls = 16, 25 if bench.fast else 50
    both = {"invgen": lambda: runs["invgen"](small, calls), "network": passes(network, small, 1, calls)}
    pair = interleaved(both, repeats=9)
    ratios = [a / b for a, b in zip(pair["invgen"].samples, pair["network"].samples, strict=True)]
    q1, median, q3 = quartiles(ratios)
    note = f"{small} samples, {calls} calls, {pair['invgen'].median:.2f} s; IQR {q1:.3f} to {q3:.3f}"
    bench.add("overhead_vs_network", median, "x", note=note)


def main() -> None:
    libraries = peers()
    bench = Benchmark("peers_diffusion", "Diffusion samplers beside deepinv and azula: time and calibration.")
    if libraries is None:
        print(f"deepinv, azula: {MISSING}")
        bench.add("dps_overhead_ratio_deepinv", math.nan, "x", note=MISSING)
        bench.add("calibration_worse_than_peer", math.nan, "scores", note=MISSING)
    else:
        overhead(bench, libraries)
    end_to_end(bench, libraries)
    if libraries is not None:
        calibration(bench, libraries)
    bench.finish()


if __name__ == "__main__":
    main()
