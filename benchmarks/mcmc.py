"""Chains on a deconvolution with a known posterior: HMC, RTO and pCN beside CUQIpy and Pyro.

d = A x + n: x has 128 samples, A is a periodic Gaussian blur (sd 2.5 samples), n ~ N(0, 0.05²); x ~ N(m, C) with C exponential
(length 16 samples, sd 1) and m = 3 + sin. The posterior is Gaussian and known. Nobody is told that it is: every library is
given the dense A and C.

hmc   effective draws per CPU second, warm-up included: bulk ESS of the worst coordinate / CPU seconds of the whole call.
      Ours: HMC, 256 chains of 200 + 400 draws, other settings its defaults. CUQIpy: NUTS, the better of its default warm-up and one that tunes at
      every step. Pyro: NUTS with its defaults, in whitened coordinates.
rto   independent draws per CPU second: RandomizeThenOptimize against LinearRTO with maxit = 100.
pcn   CPU seconds of one step of one chain: PCN with 256 chains against CUQIpy's.

One thread. The peers run with `.peers/bin/python` (`make peers`); without that their rows say so. `--part` picks parts;
`--fast` shortens the runs: CUQIpy 200 + 400 draws, Pyro 100 + 100, ours one repeat instead of three.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Benchmark

from invgen.diagnostics import ess
from invgen.noise import GaussianNoise
from invgen.operators import MatrixOperator
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem
from invgen.solvers import HMC, NUTS, PCN, ExactGaussian, RandomizeThenOptimize

ROOT = Path(__file__).resolve().parents[1]
DIM, NOISE, CHAINS = 128, 0.05, 256
PARTS = ("hmc", "rto", "pcn")


def deconvolution() -> dict[str, np.ndarray]:
    """A, d, noise, mean and covariance of the problem."""
    g = np.random.default_rng(7)
    i = np.arange(DIM)
    lag = np.abs(i[:, None] - i[None])
    around = np.minimum(lag, DIM - lag)
    blur = np.exp(-0.5 * (around / 2.5) ** 2)
    A = blur / blur.sum(1, keepdims=True)
    covariance = np.exp(-lag / 16.0)
    mean = 3.0 + np.sin(2 * np.pi * i / DIM)
    truth = mean + np.linalg.cholesky(covariance) @ g.standard_normal(DIM)
    d = A @ truth + NOISE * g.standard_normal(DIM)
    return {"A": A, "d": d, "noise": np.array(NOISE), "mean": mean, "covariance": covariance}


def stated(arrays: dict[str, np.ndarray]) -> InverseProblem:
    """The same as an inverse problem."""
    prior = GaussianPrior.dense(torch.as_tensor(arrays["mean"]), torch.as_tensor(arrays["covariance"]))
    operator = MatrixOperator(torch.as_tensor(arrays["A"]))
    return InverseProblem(torch.as_tensor(arrays["d"]), operator, GaussianNoise(float(arrays["noise"])), prior)


def closed_form(problem: InverseProblem) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sd of the posterior, `(dim,)`."""
    mean, covariance = ExactGaussian().moments(problem)
    return mean[0].numpy(), covariance.reshape(DIM, DIM).diagonal().sqrt().numpy()


def judged(draws: np.ndarray, mean: np.ndarray, sd: np.ndarray) -> tuple[float, float, float]:
    """Smallest bulk ESS, mean ratio of sd, mean error in posterior sd, of draws `(chain, draw, dim)`."""
    flat = draws.reshape(-1, draws.shape[-1]).astype(float)
    least = float(np.min(ess(torch.as_tensor(draws, dtype=torch.float64))))
    error = math.sqrt(max(0.0, float(np.mean(((flat.mean(0) - mean) / sd) ** 2)) - 1 / least))
    return least, float(np.mean(flat.std(0, ddof=1) / sd)), error


def timed(function: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """The last result and the median CPU seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        result = function()
        seconds.append(time.process_time() - start)
    return result, statistics.median(seconds)


def peers(arrays: dict[str, np.ndarray], parts: list[str], fast: bool) -> dict[str, Any]:
    """What `peers_chains.py` found; empty where the environment is missing."""
    python = ROOT / ".peers" / "bin" / "python"
    if not python.exists():
        return {}
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "problem.npz"), Path(folder, "out.npz")
        np.savez(source, **arrays)
        command = [str(python), str(Path(__file__).with_name("peers_chains.py")), str(source), str(out), *parts]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, *(["--fast"] if fast else [])], env=environment, capture_output=True, text=True
        )
        if done.returncode or not out.exists():
            print("peers_chains.py failed:", done.stderr.strip().splitlines()[-1:], flush=True)
            return {}
        return dict(np.load(out))


def missing(found: dict[str, Any], name: str) -> str:
    """Why a peer has no row."""
    return "peers missing: run make peers" if f"{name}_seconds" not in found else ""


def run_hmc(bench: Benchmark, problem: InverseProblem, found: dict[str, Any]) -> None:
    """Effective draws a second."""
    mean, sd = closed_form(problem)
    runs = {
        "hmc": HMC(draws=400, warmup=200),
        "nuts": NUTS(draws=50, warmup=200),
    }
    rates = {}
    for name, solver in runs.items():
        posterior, seconds = timed(
            lambda solver=solver: solver.solve(problem, CHAINS, device=bench.device), 1 if bench.fast else 3
        )
        least, ratio, error = judged(posterior.samples[0].numpy(), mean, sd)
        rates[name] = least / seconds
        steps = float(posterior.stats["steps"].mean())
        note = f"{CHAINS} chains x {solver.draws} draws in {seconds:.2f} s, {steps:.1f} leaps a draw, float32"
        bench.add(f"{name}_ess_per_second", rates[name], "1/s", note=note)
        bench.add(f"{name}_sd_ratio", ratio, note=f"mean error {error:.3f} posterior sd")
    for name in ("cuqipy_nuts", "cuqipy_nuts_tuned", "pyro_nuts"):
        if missing(found, name):
            bench.add(f"{name}_ess_per_second", math.nan, "1/s", note=missing(found, name))
            continue
        draws, seconds = found[f"{name}_draws"], float(found[f"{name}_seconds"])
        least, ratio, error = judged(draws[None], mean, sd)
        rates[name] = least / seconds
        note = (
            f"ESS {least:.0f} of {len(draws)} draws in {seconds:.1f} s, sd ratio {ratio:.2f}, mean error {error:.2f} sd"
        )
        bench.add(f"{name}_ess_per_second", rates[name], "1/s", note=note)
    best = max((rates[n] for n in ("cuqipy_nuts", "cuqipy_nuts_tuned") if n in rates), default=math.nan)
    bench.add("hmc_vs_cuqipy_nuts", rates["hmc"] / best, "x", note=missing(found, "cuqipy_nuts"))
    pyro = rates.get("pyro_nuts", math.nan)
    bench.add("hmc_vs_pyro", rates["hmc"] / pyro, "x", note=missing(found, "pyro_nuts"))


def run_rto(bench: Benchmark, problem: InverseProblem, found: dict[str, Any]) -> None:
    """Independent draws a second."""
    mean, sd = closed_form(problem)
    draws = 1000 if bench.fast else 4000
    posterior, seconds = timed(
        lambda: RandomizeThenOptimize().solve(problem, draws, device=bench.device, dtype=torch.float64), 3
    )
    _, ratio, error = judged(posterior.samples[0].reshape(1, draws, DIM).numpy(), mean, sd)
    bench.add(
        "rto_draws_per_second", draws / seconds, "1/s", note=f"sd ratio {ratio:.3f}, mean error {error:.3f} sd, float64"
    )
    if missing(found, "cuqipy_rto"):
        bench.add("rto_vs_cuqipy", math.nan, "x", note=missing(found, "cuqipy_rto"))
        return
    theirs, cost = found["cuqipy_rto_draws"], float(found["cuqipy_rto_seconds"])
    _, ratio, error = judged(theirs[None], mean, sd)
    rate = len(theirs) / cost
    bench.add(
        "cuqipy_rto_draws_per_second", rate, "1/s", note=f"maxit 100, sd ratio {ratio:.3f}, mean error {error:.3f} sd"
    )
    bench.add("rto_vs_cuqipy", draws / seconds / rate, "x")


def run_pcn(bench: Benchmark, problem: InverseProblem, found: dict[str, Any]) -> None:
    """Cost of a step of a chain."""
    steps = 500 if bench.fast else 2000
    solver = PCN(draws=steps // 10, warmup=0, thin=10, target=None, beta=0.02)
    _, seconds = timed(lambda: solver.solve(problem, CHAINS, device=bench.device, dtype=torch.float64), 3)
    ours = seconds / (steps * CHAINS)
    bench.add("pcn_step_microseconds", 1e6 * ours, "us", note=f"{CHAINS} chains, float64")
    if missing(found, "cuqipy_pcn"):
        bench.add("pcn_vs_cuqipy", math.nan, "x", note=missing(found, "cuqipy_pcn"))
        return
    theirs = float(found["cuqipy_pcn_seconds"]) / len(found["cuqipy_pcn_draws"])
    bench.add("cuqipy_pcn_step_microseconds", 1e6 * theirs, "us")
    bench.add("pcn_vs_cuqipy", theirs / ours, "x")


def main() -> None:
    """Run the parts."""
    bench = Benchmark(
        "mcmc",
        "Chains on a deconvolution with a known posterior, beside CUQIpy and Pyro.",
        {"--part": {"nargs": "+", "choices": PARTS, "default": list(PARTS), "help": "parts to run"}},
    )
    arrays = deconvolution()
    problem = stated(arrays)
    wanted = {"hmc": ["nuts", "pyro"], "rto": ["rto"], "pcn": ["pcn"]}
    found = peers(arrays, [p for part in bench.args.part for p in wanted[part]], bench.fast)
    for package in ("CUQIpy", "pyro-ppl"):
        if f"version_{package}" in found:
            print(package, found[f"version_{package}"], flush=True)
    for part in bench.args.part:
        {"hmc": run_hmc, "rto": run_rto, "pcn": run_pcn}[part](bench, problem, found)
    bench.finish()


if __name__ == "__main__":
    sys.exit(main())
