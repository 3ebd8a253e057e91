"""Random fields: seconds a field beside GSTools and gstlearn, the covariance of every method, large grids, conditioning.

Matérn, ν = 1, length 20 cells, 512 × 512, CPU-seconds a field of one thread, float32, noise included, set-up excluded (it
is in the table). GSTools: SRF, 1000 modes; its randomisation method is our "spectral" with as many modes. gstlearn: SPDE by
Chebyshev polynomials over 8 fields (its own tolerance; ours 1e-3 of the largest value of the polynomial, as many
cells around), and the faster of that and its FFT over 8 fields.

ppt_error: largest |P Pᵀ − Σ| / Σ_00 of the linear methods over small grids and eleven covariances, Σ from the covariance function
alone (for "spde" from the eigenvectors of the assembled matrix). The others are Gaussian and right in the limit alone: largest |z|
of the covariance at all lags of 1000 draws [limit_covariance_z].

Large grids: one field from the covariance on, 4096² and 256³, one thread; all seconds are CPU time, which a busy machine disturbs
least (the wall clock is in the note).

Conditioning: 60 data, some next to each other, on 24 × 24 nodes; 20,000 draws by RandomizeThenOptimize against the dense closed
form: largest |z| of mean, variance and covariance between nodes, the data's neighbours among them [conditional_covariance_z]. 512 ×
512 with 10,000 data of noise sd 0.1: CPU seconds from the problem to one draw [conditional_seconds].

    python benchmarks/random_field.py [--fast] [--parts speed,error,big,conditional,facies,table,real]

Facies: see `pluri_exact`. Real data: random_field_real.py.

The peers run with `.peers/bin/python` (`make peers`); without that their rows say so. --fast: 256 × 256 without peers and large
grids, fewer draws.
"""

from __future__ import annotations

import json
import math
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Benchmark
from random_field_checks import conditional_seconds, conditional_z, limit_z, pluri_exact, ppt_error
from random_field_real import real

from invgen.priors.covariance_models import Matern
from invgen.priors.random_field import RandomField

ROOT = Path(__file__).resolve().parents[1]
LENGTH = 20.0


def seconds_a_field(field: Any, fields: int = 4, rounds: int = 5) -> float:
    """Median CPU seconds a draw."""
    field.sample(1, seed=99)
    taken = []
    for k in range(rounds):
        start = time.process_time()
        field.sample(fields, seed=k)
        taken.append((time.process_time() - start) / fields)
    return float(np.median(taken))


def peers(size: int) -> dict[str, Any]:
    """What `peers_fields.py` found; empty where the environment is missing."""
    python = ROOT / ".peers" / "bin" / "python"
    if not python.exists():
        return {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "peers.json"
        command = [str(python), str(Path(__file__).with_name("peers_fields.py")), str(out), str(size), str(LENGTH)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not out.exists():
            print("peers_fields.py failed:", done.stderr.strip().splitlines()[-1:], flush=True)
            return {}
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def speed(bench: Benchmark) -> None:
    """Seconds a field, ours and theirs."""
    size = 256 if bench.fast else 512
    model = Matern(nu=1.0, length=LENGTH)
    shape = (1, size, size)
    ours = {
        "circulant": RandomField(model, shape, method="circulant"),
        "spectral": RandomField(model, shape, method="spectral", modes=1000),
        "spde": RandomField(model, shape, method="spde", margin=64, tolerance=1e-3),
        "dct": RandomField(model, shape, method="dct"),
    }
    mine = {name: seconds_a_field(field) for name, field in ours.items()}
    found = {} if bench.fast else peers(size)
    for name, value in {**mine, **found}.items():
        print(f"{name:24s} {value if not isinstance(value, float) else round(value, 4)}", flush=True)
    missing = "peers missing: run make peers" if not found else ""
    srf, cheb = found.get("gstools_srf", math.nan), found.get("gstlearn_spde_8", math.nan)
    theirs = [
        found[k] for k in ("gstlearn_spde_8", "gstlearn_fft_8", "gstlearn_spde_1", "gstlearn_fft_1") if k in found
    ]
    for figure, name, other in (
        ("ce_vs_gstools", "circulant", srf),
        ("spectral_vs_gstools", "spectral", srf),
        ("chebyshev_vs_gstlearn", "spde", cheb),
        ("dct_vs_gstlearn", "dct", min(theirs, default=math.nan)),
    ):
        note = missing or f"{mine[name] * 1e3:.2f} ms against {other * 1e3:.1f} ms of CPU a field"
        bench.add(figure, other / mine[name], "x", note=note)


def error(bench: Benchmark) -> None:
    """Covariances on small grids."""
    value, where = ppt_error()
    bench.add("ppt_error", value, "", note=where)
    value, where = limit_z(200 if bench.fast else 1000)
    bench.add("limit_covariance_z", value, "sd", note=where)


def big(bench: Benchmark) -> None:
    """One field on a large grid, set-up included: CPU seconds, and the peak of the process."""
    if bench.fast:
        return
    for name, shape in (("big2d", (1, 4096, 4096)), ("big3d", (1, 256, 256, 256))):
        start, cpu = time.perf_counter(), time.process_time()
        field = RandomField(Matern(nu=1.0, length=LENGTH), shape, method="circulant")
        x = field.sample(1, seed=1)
        taken, spent = time.perf_counter() - start, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        note = f"{taken:.1f} s on the wall, embedding {field.embedding.sizes}, variance {float(x.var()):.3f}"  # type: ignore[union-attr]
        bench.add(f"{name}_seconds", spent, "s", note=note)
        bench.add(f"{name}_gb", peak, "GB", note="peak of the process so far")
        del field, x


def conditional(bench: Benchmark) -> None:
    """Conditional simulation against the closed form, and its time on a large grid."""
    value, where = conditional_z(4000 if bench.fast else 20_000)
    bench.add("conditional_covariance_z", value, "sd", note=where)
    taken, note = conditional_seconds(*((256, 2500) if bench.fast else (512, 10_000)))
    bench.add("conditional_seconds", taken, "s", note=note)


def facies(bench: Benchmark) -> None:
    """Plurigaussian proportions, and pCN against an enumeration."""
    value, note = pluri_exact(fast=bench.fast)
    bench.add("pluri_exact", value, "sd", note=note)


def table(bench: Benchmark) -> None:
    """Who wins where: set-up and CPU seconds a field."""
    sizes = [(1, 64, 64), (1, 256, 256)] if bench.fast else [(1, 32, 32), (1, 256, 256), (1, 512, 512), (1, 64, 64, 64)]
    methods: dict[str, tuple[dict[str, Any], int]] = {
        "cholesky": ({}, 4096),
        "circulant": ({}, 1 << 30),
        "periodic": ({}, 1 << 30),
        "dct": ({}, 1 << 30),
        "kl": ({"rank": 100}, 4096),
        "spde": ({"margin": 16, "tolerance": 1e-3}, 1 << 30),
        "sequential": ({"neighbours": 24}, 1 << 16),
        "spectral": ({"modes": 1000}, 1 << 30),
        "turning_bands": ({"bands": 200}, 1 << 17),
    }
    print(
        f"\nset-up / a field, milliseconds of CPU; Matérn, ν = 1, length 3 cells\n{'':16s}"
        + "".join(f"{'x'.join(map(str, s[1:])):>22s}" for s in sizes)
    )
    for name, (options, limit) in methods.items():
        cells = []
        for shape in sizes:
            if math.prod(shape) > limit:
                cells.append("—")
                continue
            start = time.process_time()
            try:
                field = RandomField(Matern(nu=1.0, length=3.0), shape, method=name, **options)
            except ValueError:  # no positive semi-definite covariance with these boundaries
                cells.append("not positive")
                continue
            made = time.process_time() - start
            cells.append(f"{made * 1e3:.0f} / {seconds_a_field(field, 2, 3) * 1e3:.2f}")
        print(f"{name:16s}" + "".join(f"{c:>22s}" for c in cells), flush=True)


def real_data(bench: Benchmark) -> None:
    """A log and a rock: fitted covariances, conditional simulation, leave-one-out coverage."""
    for name, value, unit, note in real():
        bench.add(name, value, unit, note=note)


PARTS: dict[str, Callable[[Benchmark], None]] = {
    "speed": speed,
    "error": error,
    "big": big,
    "conditional": conditional,
    "facies": facies,
    "table": table,
    "real": real_data,
}


def main() -> None:
    bench = Benchmark(
        "random_field",
        "Random fields beside GSTools and gstlearn.",
        {"--parts": {"default": ",".join(PARTS), "help": "what to measure, comma-separated"}},
    )
    for name in bench.args.parts.split(","):
        PARTS[name](bench)
    bench.finish()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
