"""Latent space: chains through learned generators, against themselves, their data and known answers.

Cross-hole travel times, 24 sources × 24 receivers, straight rays through 64 × 64 channels: velocity 2500 m/s in the
mud and 3000 m/s in the sand, noise of 1 % of the mean travel time. Truths are draws f(z*), z* ~ N(0, I), of the prior
itself, so that the posterior is well specified.

    chains    64 chains of HMC in 8 superchains (4 for the diffusion's 16 chains): nested R-hat of every latent number,
              smallest bulk ESS of any of them over the superchains, χ² of the draws [latent_rhat, latent_chi2] for the
              VAE and the 2-step consistency prior; the diffusion's 8-step ODE and the WGAN printed
    sbc       100 data sets × 4 chains in one batch, ranks of every latent number, of |z|² and of the misfit [latent_sbc:
              1 where nothing fails family-wise at 0.1 %]
    gain      chain-steps a second of 64 chains over 64 times one chain, over the network's own gain [batch_gain]
    sgan      a 15-number convolutional latent, 24 × 24 straight rays through 80 × 48 pixels: posterior means and standard
              deviations of HMC against a long reference run of pCN, largest |z| of the differences [sgan_reference]
    resume    killed at 5 random moments and resumed [resume_identical]

    python benchmarks/latent.py [--fast] [--parts chains,sbc,gain,sgan,resume] [--priors vae,consistency,diffusion,wgan]
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from harness import Benchmark
from torch import Tensor

from invgen.diagnostics import ess, nested_rhat, sbc
from invgen.noise import GaussianNoise
from invgen.operators import StraightRays
from invgen.priors import pretrained
from invgen.problem import InverseProblem
from invgen.solvers import HMC, PCN
from invgen.transforms import Affine

MUD, SAND = 2500.0, 3000.0  # m/s
PRIORS = {
    "vae": "channels-vae",
    "consistency": "channels-consistency",
    "diffusion": "channels-diffusion",
    "wgan": "channels-wgan",
}


# chains, superchains, warm-up, draws; the diffusion and the WGAN are printed, not judged
RUNS = {
    "vae": (64, 8, 150, 200),
    "consistency": (64, 8, 100, 100),
    "diffusion": (16, 4, 30, 30),
    "wgan": (64, 8, 60, 60),
}


def load(name: str) -> Any:
    prior = pretrained.load(name)
    if name == PRIORS["diffusion"]:
        prior.latent_steps = 8
    return prior


def tomography(prior: Any, n: int, *, seed: int, noise: float = 0.01) -> tuple[InverseProblem, Tensor]:
    """Data of n truths f(z*), and z* `(n, *latent_shape)`."""
    rays = StraightRays.crosshole(prior.grid, 24, 24)
    operator = rays @ Affine(1.0 / MUD, 1.0 / SAND - 1.0 / MUD)
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, *prior.latent_shape, generator=g)
    with torch.no_grad():
        times = torch.cat([operator(prior.decode(part)) for part in z.split(32)])
    sigma = noise * float(rays(torch.full((1, *prior.shape), 1.0 / MUD)).mean())
    data = times + sigma * torch.randn(times.shape, generator=g)
    return InverseProblem(data, operator, GaussianNoise(sigma), prior), z


def chi2(problem: InverseProblem, x: Tensor) -> Tensor:
    """Normalised residual sum of squares of each draw `(n, *shape)` of the first observation."""
    term = problem.terms[0]
    with torch.no_grad():
        predicted = torch.cat([term.operator(part) for part in x.split(64)])
    return ((term.data[:1] - predicted) / float(term.noise.sigma)).square().flatten(1).sum(1)


def chains(bench: Benchmark, names: list[str]) -> None:
    """R-hat, ESS and χ² of one data set each."""
    worst = {"latent_rhat": [], "latent_chi2": []}
    for name in names:
        if PRIORS[name] not in pretrained.available():
            print(f"{name}: there is no pretrained prior {PRIORS[name]}")
            continue
        prior = load(PRIORS[name]).to(bench.args.device)
        problem, _ = tomography(prior, 1, seed=5)
        count, groups, warmup, draws = RUNS[name]
        if bench.fast:
            warmup = draws = 20
        solver = HMC(draws=draws, warmup=warmup, superchains=groups)
        began = time.process_time()
        posterior = solver.solve(problem, count, seed=1, device=bench.args.device)
        seconds = time.process_time() - began
        z = posterior.latent[0].flatten(2).double().reshape(groups, count // groups, draws, -1)
        nested = nested_rhat(z)
        worth = ess(z.flatten(0, 1))
        fit = chi2(problem, posterior.samples[0].flatten(0, 1))
        n = math.prod(problem.terms[0].operator.data_shape)
        off = abs(float(fit.mean()) - n) / math.sqrt(2 * n)
        leaps = float(posterior.stats["steps"].mean())
        print(
            f"{name}: {count} chains × {draws} draws in {groups} superchains, {leaps:.0f} leaps a draw, {seconds:.0f} s of CPU; "
            f"nested R-hat {nested.max():.4f}, smallest ESS {worth.min():.0f} ({worth.min() / groups:.0f} a superchain), "
            f"chi2/N {float(fit.mean()) / n:.3f} ({off:.1f} sd), accept {float(posterior.stats['accept'].mean()):.2f}",
            flush=True,
        )
        bench.add(f"{name}_rhat", float(nested.max()), "", note=f"{seconds:.0f} s of CPU, {leaps:.0f} leaps a draw")
        bench.add(f"{name}_ess", float(worth.min() / groups), "a superchain")
        bench.add(f"{name}_chi2", off, "sd")
        if name in ("vae", "consistency"):
            enough = float(worth.min()) >= 50 * groups
            worst["latent_rhat"].append(float(nested.max()) if enough else math.inf)
            worst["latent_chi2"].append(off)
    both = {"vae", "consistency"} <= set(names)
    for key, values in worst.items():
        if both:
            value = max(values) if len(values) == 2 else math.nan
            bench.add(key, value, "", note="the worse of VAE and consistency; infinite where the ESS is too small")


def simulation_based(bench: Benchmark) -> None:
    """Ranks of z* among the draws."""
    if PRIORS["vae"] not in pretrained.available():
        bench.add("latent_sbc", math.nan, "", note="no pretrained VAE")
        return
    prior = load(PRIORS["vae"]).to(bench.args.device)
    sets, count = (20, 4) if bench.fast else (100, 4)
    problem, truth = tomography(prior, sets, seed=6)
    # the misfit of chains from the prior is the posterior's after 50 steps; four chains would adapt the length poorly
    solver = HMC(draws=12, thin=2, warmup=20 if bench.fast else 60, length=5.0)
    began = time.process_time()
    posterior = solver.solve(problem, count, seed=2, chunk=sets * count, device=bench.args.device)
    seconds = time.process_time() - began
    z = posterior.latent.flatten(3).flatten(1, 2).double()  # (sets, draws, dim)
    x = posterior.samples.flatten(1, 2)
    with torch.no_grad():
        misfit = torch.stack([-problem.select([i] * x.shape[1]).log_likelihood(x[i]) for i in range(sets)], 0)
        at_truth = -problem.log_likelihood(torch.cat([prior.decode(part) for part in truth.split(32)]))
    flat = truth.flatten(1).double()
    quantities = torch.cat([flat, flat.square().sum(1)[:, None], at_truth[:, None].double()], dim=1)
    drawn = torch.cat([z, z.square().sum(2)[..., None], misfit[..., None].double()], dim=2)
    # draws of 4 chains: autocorrelated, so that ranks are taken among as many as are worth it
    worth = float(np.median([np.min(ess(z[i].reshape(count, -1, z.shape[2]).numpy())) for i in range(0, sets, 10)]))
    keep = max(1, int(z.shape[1] // max(1.0, min(worth, z.shape[1]))))
    result = sbc(quantities, drawn[:, ::keep], level=0.001)
    print(f"SBC: {result} (every {keep}th of {z.shape[1]} draws; {seconds:.0f} s of CPU)", flush=True)
    bench.add("latent_sbc", float(result.passed), "", note=f"{sets} data sets × {count} chains, {seconds:.0f} s of CPU")


def batch_gain(bench: Benchmark) -> None:
    """Chain-steps a second of a batch, and the network's own gain."""
    if PRIORS["vae"] not in pretrained.available():
        bench.add("batch_gain", math.nan, "", note="no pretrained VAE")
        return
    prior = load(PRIORS["vae"]).to(bench.args.device)
    problem, _ = tomography(prior, 1, seed=5)
    repeats = 3 if bench.fast else 9
    solver = HMC(draws=20, warmup=0, step_size=0.05, length=0.5)

    def run(count: int) -> float:
        began = time.process_time()
        posterior = solver.solve(problem, count, seed=3, device=bench.args.device)
        return count * float(posterior.stats["steps"].sum(2).mean()) / (time.process_time() - began)

    def gradients(count: int) -> float:
        z = torch.randn(count, *prior.latent_shape)
        times = 256 // count if count < 64 else 8
        began = time.process_time()
        for _ in range(times):
            at = z.clone().requires_grad_()
            torch.autograd.grad(prior.decode(at).square().sum(), at)
        return times * count / (time.process_time() - began)

    for f in (run, gradients):
        f(64)
    chain, own = [], []
    for _ in range(repeats):
        chain.append(run(64) / run(1))
        own.append(gradients(64) / gradients(1))
    value = float(np.median(chain) / np.median(own))
    note = f"64 chains: {np.median(chain):.2f} × one chain a chain-step; network alone {np.median(own):.2f}"
    bench.add("batch_gain", value, "of the network's", note=note)


def sgan(bench: Benchmark) -> None:
    """Fifteen latent numbers: HMC against a long run of pCN."""
    if "channels-spatial15" not in pretrained.available():
        bench.add("sgan_reference", math.nan, "", note="no pretrained prior channels-spatial15")
        return
    prior = load("channels-spatial15").to(bench.args.device)
    problem, _ = tomography(prior, 1, seed=7)
    began = time.process_time()
    short = HMC(draws=250, warmup=200).solve(problem, 64, seed=4, dtype=torch.float32)
    middle = time.process_time()
    long = PCN(draws=400, thin=5 if bench.fast else 50, warmup=1000).solve(problem, 128, seed=5)
    end = time.process_time()
    a, b = (p.latent[0].flatten(2).double().numpy() for p in (short, long))
    worst = 0.0
    for moment in (1, 2):
        centre = b.mean((0, 1))
        u, v = (x if moment == 1 else (x - centre) ** 2 for x in (a, b))
        error = np.sqrt(u.var((0, 1)) / ess(u, kind="mean") + v.var((0, 1)) / ess(v, kind="mean"))
        worst = max(worst, float(np.abs((u.mean((0, 1)) - v.mean((0, 1))) / error).max()))
    print(
        f"15 numbers: HMC {middle - began:.0f} s of CPU, ESS {ess(a).min():.0f}; reference pCN {end - middle:.0f} s, ESS {ess(b).min():.0f}, "
        f"largest |z| of means and variances {worst:.2f}",
        flush=True,
    )
    bench.add("sgan_reference", worst, "standard errors", note=f"reference ESS {ess(b).min():.0f}")


def resume(bench: Benchmark) -> None:
    """Killed and resumed."""
    import tempfile
    from pathlib import Path

    from chain_resume import resumed_identical

    kills = 2 if bench.fast else 5
    with tempfile.TemporaryDirectory() as folder:
        bench.add("resume_identical", resumed_identical(Path(folder), kills=kills), f"of {kills}")


def main() -> None:
    bench = Benchmark(
        "latent",
        "Chains in latent space.",
        {
            "--parts": {"default": "chains,sbc,gain,sgan,resume", "help": "what to measure, comma-separated"},
            "--priors": {"default": ",".join(PRIORS), "help": "priors of the chains, comma-separated"},
        },
    )
    parts = {"sbc": simulation_based, "gain": batch_gain, "sgan": sgan, "resume": resume}
    for part in bench.args.parts.split(","):
        if part == "chains":
            chains(bench, bench.args.priors.split(","))
        else:
            parts[part](bench)
    bench.finish()


if __name__ == "__main__":
    main()
