"""What the training loop costs beside a bare one, and whether a killed run ends in the same weights.

Efficiency: CPU time of a bare loop (batch, loss, backward, fused AdamW; no averaging, clipping, log or checks) over that of
`Training.fit` doing the same steps on the same network, start and end of `fit` included; interleaved repeats, the median
of the ratios. UNet of the default size on 64 × 64 fields, and an MLP on the plane whose step is mostly Python.

Resume: ten runs of a small UNet in processes of their own, each killed with SIGKILL at a random moment between its first
step and its end (it writes a checkpoint every 3 steps, so that many are hit while writing), started again, and compared
with the run that was not killed, bit for bit.

--fast: 3 repeats of 4 steps instead of 9 of 6; the ten kills stay.
"""

from __future__ import annotations

import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from harness import Benchmark, interleaved
from safetensors.torch import load_file, save_file
from torch import Tensor

from invgen.priors import ArrayData, DiffusionPrior, Training
from invgen.priors.networks import MLPDenoiser, UNet

KILLS, STEPS, SEED = 10, 150, 7


def unet_prior() -> DiffusionPrior:
    """The prior whose training is timed."""
    torch.manual_seed(0)
    return DiffusionPrior(UNet(1), (1, 64, 64))


def mlp_prior() -> DiffusionPrior:
    """A prior whose step is mostly Python's own work."""
    torch.manual_seed(0)
    return DiffusionPrior(MLPDenoiser(2, width=128, depth=3), (2,))


def bare(make: Callable[[], DiffusionPrior], data: ArrayData, steps: int, size: int) -> None:
    """Nothing but what makes a network learn."""
    prior = make()
    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-3, weight_decay=1e-4, betas=(0.9, 0.99), fused=True)
    for step in range(steps):
        batch = data.batch(step, size, 0)
        generator = torch.Generator().manual_seed(step)
        loss = prior.training_loss(batch, generator).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def efficiency(
    make: Callable[[], DiffusionPrior], x: Tensor, steps: int, size: int, repeats: int
) -> tuple[float, float, float]:
    """Median and inter-quartile range of bare / fit, and CPU seconds a step of `fit`."""
    data = ArrayData(x)
    timing = interleaved(
        {
            "bare": lambda: bare(make, data, steps, size),
            "fit": lambda: Training(steps=steps, batch_size=size).fit(make(), data, progress=False),
        },
        repeats,
    )
    ratios = [a / b for a, b in zip(timing["bare"].samples, timing["fit"].samples, strict=True)]
    q1, _, q3 = statistics.quantiles(ratios, n=4, method="inclusive")
    return statistics.median(ratios), q3 - q1, timing["fit"].median / steps


def run(folder: str) -> None:
    """The run that is killed: prints a line when its first step begins and writes its weights when it is done."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    prior = DiffusionPrior(UNet(1, widths=(8, 12), blocks=1, embedding=16), (1, 16, 16))
    x = torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    Announced = type("Announced", (ArrayData,), {"batch": _announced})
    training = Training(
        steps=STEPS,
        batch_size=8,
        warmup=10,
        log_every=10,
        save_every=3,
        checkpoint=f"{folder}/run.ckpt",
        log=f"{folder}/log.csv",
    )
    training.fit(prior, Announced(x), progress=False)
    print("done", flush=True)
    save_file({k: v.contiguous() for k, v in prior.state_dict().items()}, f"{folder}/weights.safetensors")


def _announced(data: ArrayData, step: int, size: int, seed: int) -> dict[str, Tensor]:
    global _told
    if not _told:
        _told = True
        print("running", flush=True)
    return ArrayData.batch(data, step, size, seed)


_told = False


def start(folder: Path) -> subprocess.Popen[str]:
    """The run in a process of its own, returned once its first step begins."""
    code = "import sys, training; training.run(sys.argv[1])"
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    child.stdout.readline()
    return child


def weights(folder: Path) -> dict[str, Tensor]:
    """What a run ended in."""
    return load_file(folder / "weights.safetensors")


def resumed_identical(folder: Path, kills: int = KILLS) -> int:
    """How many of the killed runs end in the same weights as the one that was not killed."""
    whole = folder / "whole"
    whole.mkdir()
    child = start(whole)
    began = time.perf_counter()
    assert child.stdout is not None
    child.stdout.readline()
    length = time.perf_counter() - began
    child.wait()
    expected, moments, same = weights(whole), random.Random(SEED), 0
    for k in range(kills):
        killed = folder / f"killed{k}"
        killed.mkdir()
        while True:  # until it was killed before its end
            child = start(killed)
            moment = moments.uniform(0, length)
            time.sleep(moment)
            child.send_signal(signal.SIGKILL)
            if child.wait() == -signal.SIGKILL and not (killed / "weights.safetensors").exists():
                break
            for file in killed.iterdir():
                file.unlink()
        left = sorted(p.name for p in killed.iterdir())
        start(killed).wait()
        found = weights(killed)
        equal = found.keys() == expected.keys() and all(torch.equal(v, expected[name]) for name, v in found.items())
        same += equal
        log = (killed / "log.csv").read_text().splitlines()
        print(
            f"killed after {moment:.2f} of {length:.2f} s, leaving {', '.join(left) or 'nothing'}: "
            f"{'identical' if equal else 'DIFFERENT'} weights, {len(log) - 1} rows of log",
            flush=True,
        )
    return same


def main() -> None:
    bench = Benchmark("training", "Overhead of the training loop, and resuming after SIGKILL.")
    generator = torch.Generator().manual_seed(0)
    repeats, steps = (3, 4) if bench.fast else (9, 6)
    print(
        f"UNet: {sum(p.numel() for p in unet_prior().parameters()):,} weights, 16 fields of 64 × 64 a step", flush=True
    )
    value, iqr, seconds = efficiency(unet_prior, torch.randn(64, 1, 64, 64, generator=generator), steps, 16, repeats)
    bench.add("training_efficiency", value, "of a bare loop", note=f"IQR {iqr:.3f}; {seconds:.3f} s CPU a step")
    value, iqr, seconds = efficiency(mlp_prior, torch.randn(4096, 2, generator=generator), 50 * steps, 128, repeats)
    bench.add("mlp_efficiency", value, "of a bare loop", note=f"IQR {iqr:.3f}; {1e3 * seconds:.2f} ms CPU a step")
    with tempfile.TemporaryDirectory() as folder:
        bench.add("resume_identical", resumed_identical(Path(folder)), f"of {KILLS} killed runs")
    bench.finish()


if __name__ == "__main__":
    main()
