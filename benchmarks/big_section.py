"""A 2000 × 3000 post-stack section with the shipped prior: peak memory and seconds, the network evaluated in tiles.

Six million unknowns and twice as many data: Ricker of 15 Hz at 4 ms, white noise 20 dB below the data, and a background
smoothed by 60 × 50 samples, the two terms of `poststack.py` on a generated section. Two samples, 20 sweeps of `PnPDM` each.

**Memory.** The network runs on tiles with a margin of its receptive radius, cut off afterwards, so that the result is
that of one pass over the whole section (figure `tile_error`, float32). The data step has no block a column, which would
be 96 GB here, but one decomposition a noise level (`invgen/operators/_pencil.py`). Samples run one after the other.
Measured, the whole run: 3.75 GB, 1.1 GB of which before it; 1949 s for two samples of 20 sweeps on one busy core of an AMD EPYC
(36 s of CPU a sweep after the first), SNR 34.5 dB from a background of 22.0. A sweep is 4 network passes.

The run is a process of its own and its peak resident memory is the kernel's (`ru_maxrss`), with Python, PyTorch and the
making of the section in it. `--stop K` ends after K of the 20 sweeps of the first sample and extrapolates the seconds.
Sweeps are alike from the second on (it makes its decomposition while the last one is still held); the peak after each is
printed, at 500 × 750 0.55, 0.56, 0.56, 0.56 GB, at 2000 × 3000 3.04, 3.20. Left out is a finished sample of 24 MB.
`--fast`: 500 × 750; the figure of the target is then not measured.

Rows below 2.2 km are deeper than any the prior was trained on (their depth channel is held there); the SNR of a whole
run is printed as information.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any, cast

import torch
from harness import Benchmark
from poststack import SECTION_SOLVER, SPACING, ladder, snr
from torch import Tensor, nn

from invgen.data import GeologySections
from invgen.priors import pretrained

FULL, FAST = (2000, 3000), (500, 750)
SAMPLES, STEPS, INNER = 2, 20, 2
TILE = (1008, 3008)  # rows and columns of a tile without its margins: two strips of the full section
FAST_TILE = (256, 400)
DEEPEST = 2196.0  # m, the last row of a training section


class Tiled(nn.Module):
    """A fully convolutional network on overlapping tiles: the same numbers, the memory of a tile.

    A pixel depends on what is within the receptive radius r of it. A tile with a margin of at least r, starting at a
    multiple of the network's stride, therefore returns the pixels inside the margin as the whole image would; at the
    image's own edges there is no margin, and the padding is the same.

    Args:
        network: with `receptive_radius` and `multiple`, such as `UNet`. tile: `(rows, columns)`, rounded up to `multiple`.

    For evaluation without gradients. Cost: Π (tile + 2 margin)/tile of a whole pass, less at the edges.
    """

    def __init__(self, network: nn.Module, tile: tuple[int, int]) -> None:
        super().__init__()
        self.network = network
        self.multiple = int(cast(Any, network).multiple)
        self.margin = self._up(int(cast(Any, network).receptive_radius))
        self.tile = tuple(self._up(n) for n in tile)

    def _up(self, n: int) -> int:
        return -(-n // self.multiple) * self.multiple

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("A tiled network evaluates without gradients; call it under torch.no_grad().")
        height, width = x.shape[-2:]
        out: Tensor | None = None
        for top in range(0, height, self.tile[0]):
            for left in range(0, width, self.tile[1]):
                rows, columns = self._span(top, height, 0), self._span(left, width, 1)
                part = self.network(x[..., rows, columns].contiguous(), noise)
                if out is None:
                    out = part.new_empty(*part.shape[:-2], height, width)
                down, right = min(top + self.tile[0], height), min(left + self.tile[1], width)
                out[..., top:down, left:right] = part[
                    ..., top - rows.start : down - rows.start, left - columns.start : right - columns.start
                ]
        assert out is not None
        return out

    def _span(self, first: int, size: int, axis: int) -> slice:
        """The tile with its margins, inside the image; what would leave less than a stride takes the rest along."""
        last = first + self.tile[axis] + self.margin
        return slice(max(0, first - self.margin), size if last + self.multiple > size else last)


def tiled_prior(shape: tuple[int, int], tile: tuple[int, int] | None) -> Any:
    """The shipped geology prior on this grid in bfloat16, with a tiled network."""
    prior = pretrained.load("geology")
    depth = (SPACING * torch.arange(shape[0], dtype=torch.float64)).clamp(max=DEEPEST)
    moved = prior.at(shape, origin=(0.0, 0.0), depth=depth)
    moved.precision = torch.bfloat16
    if tile is not None:
        moved.network = Tiled(moved.network, tile)
    return moved


def peak_gb() -> float:
    """Peak resident memory of this process so far, GB (10⁹ bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


class Enough(Exception):
    """Ends a run that was asked for some of its sweeps only."""


def work(shape: tuple[int, int], tile: tuple[int, int] | None, stop: int) -> dict[str, float]:
    """The run, in this process: peaks, seconds and, when all sweeps were made, the SNR of the mean."""
    began = time.perf_counter()
    truth = torch.from_numpy(GeologySections(shape=shape).sample(1, seed=7)[0, 0])
    problem = ladder(truth, tiled_prior(shape, tile))
    solver = replace(SECTION_SOLVER, iterations=STEPS, inner=INNER)
    found = {"built_gb": peak_gb(), "built_seconds": time.perf_counter() - began}
    print(f"built: {found['built_seconds']:.0f} s, peak {found['built_gb']:.2f} GB", file=sys.stderr, flush=True)
    clocks = [(time.perf_counter(), time.process_time())]

    def look(step: int, state: dict[str, Tensor]) -> None:
        clocks.append((time.perf_counter(), time.process_time()))
        (wall, cpu), (wall_before, cpu_before) = clocks[-1], clocks[-2]
        print(
            f"sweep {step + 1}: {wall - wall_before:.0f} s ({cpu - cpu_before:.0f} s of CPU), peak {peak_gb():.2f} GB",
            file=sys.stderr,
            flush=True,
        )
        if stop and len(clocks) > stop:
            raise Enough

    try:
        posterior = solver.solve(problem, SAMPLES, seed=0, callbacks=[look])
        found["snr_db"] = snr(truth, posterior.samples[0, 0, :, 0].mean(0))
        found["background_snr_db"] = snr(truth, problem.terms[1].data[0, 0])
    except Enough:
        pass
    wall, cpu = (clocks[-1][k] - clocks[0][k] for k in (0, 1))
    sweeps = len(clocks) - 1
    first = [clocks[1][k] - clocks[0][k] for k in (0, 1)]
    # decompositions of the first sweep serve all: what a further sweep costs needs a second one
    rest = [(clocks[-1][k] - clocks[1][k]) / max(sweeps - 1, 1) if sweeps > 1 else first[k] for k in (0, 1)]
    found |= {"peak_gb": peak_gb(), "sweeps": sweeps, "seconds": wall, "cpu_seconds": cpu}
    return found | {"first_seconds": first[0], "step_seconds": rest[0], "step_cpu_seconds": rest[1]}


@torch.no_grad()
def tile_error() -> float:
    """Largest difference of tiled and whole denoising over the rms of the whole, float32, a size no tile divides."""
    shape = (500, 516)
    whole, tiles = tiled_prior(shape, None), tiled_prior(shape, (256, 256))
    whole.precision = tiles.precision = None
    u = torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(3))
    a, b = whole.denoise(u, 0.3), tiles.denoise(u, 0.3)
    return float((a - b).abs().max() / a.square().mean().sqrt())


def main() -> None:
    bench = Benchmark(
        "big_section",
        "Peak memory and seconds of a 2000 × 3000 post-stack section, 2 samples, 20 steps, tiled.",
        {
            "--stop": {"type": int, "default": 0, "help": "end after so many sweeps of the first sample (0: run all)"},
            "--whole": {"action": "store_true", "help": "no tiles, to compare"},
            "--worker": {"action": "store_true", "help": "do the work in this process and print it as JSON"},
        },
    )
    shape, tile = (FAST, FAST_TILE) if bench.fast else (FULL, TILE)
    if bench.args.worker:
        print(json.dumps(work(shape, None if bench.args.whole else tile, bench.args.stop)))
        return
    command = [sys.executable, __file__, "--worker", "--threads", str(bench.args.threads)]
    command += ["--stop", str(bench.args.stop)] + ["--fast"] * bench.fast + ["--whole"] * bench.args.whole
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    sweeps, total = int(found["sweeps"]), SAMPLES * STEPS
    made = f"{sweeps} of {total} sweeps"
    size = f"{shape[0]} × {shape[1]}"
    which = "after the first" if sweeps > 1 else "the first, with the start and all decompositions"
    name = "fast_section_gb" if bench.fast else "big_section_gb"
    bench.add(
        name, found["peak_gb"], "GB", note=f"{size}, {made}, {'no tiles' if bench.args.whole else f'tiles {tile}'}"
    )
    bench.add("built_gb", found["built_gb"], "GB", note="section, data and operators made, nothing run")
    bench.add("seconds_per_step", found["step_seconds"], "s", note=f"one sample, one sweep, {which}")
    bench.add("cpu_seconds_per_step", found["step_cpu_seconds"], "s", note=f"{bench.args.threads} threads")
    if sweeps == total:
        bench.add("seconds", found["seconds"], "s", note="2 samples, 20 sweeps")
        bench.add("snr_db", found["snr_db"], "dB", note=f"background alone {found['background_snr_db']:.2f} dB")
    else:
        estimate = found["first_seconds"] + (total - 1) * found["step_seconds"]
        bench.add("seconds", estimate, "s", note=f"extrapolated from {made}")
    if not bench.args.whole:
        bench.add("tile_error", tile_error(), "", note="largest, float32, 500 × 516, against one pass")
    bench.finish()


if __name__ == "__main__":
    main()
