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
              deviations of mode-jumping chains against a reference by importance sampling, largest |z| of the
              differences [sgan_reference]. The misfit has dozens of local minima, one of which holds nearly all of
              the posterior and another a few thousandths: chains of HMC or pCN from the prior stay where they fall,
              and errors from inside such chains mean nothing. Errors are the spread of chains, and the figure is infinite
              where chains have not met (nested R-hat above 1.05). The reference is made of searches of its own, from
              other seeds and from the truth. Beside it: the share of the posterior in modes where the chains have
              not been, z without that share, and HMC alone [sgan_elsewhere, sgan_within, sgan_hmc, sgan_hmc_rhat]
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
from latent_reference import Agreement, Reference, StudentMixture, agreement, importance
from torch import Tensor

from invgen.diagnostics import ess, nested_rhat, sbc
from invgen.noise import GaussianNoise
from invgen.operators import StraightRays
from invgen.priors import pretrained
from invgen.problem import InverseProblem
from invgen.solvers import HMC, AnnealedSMC, ModeJumping
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
    """Fifteen latent numbers, many modes: mode-jumping chains against importance sampling; what HMC alone would say."""
    if "channels-spatial15" not in pretrained.available():
        bench.add("sgan_reference", math.nan, "", note="no pretrained prior channels-spatial15")
        return
    prior = load("channels-spatial15").to(bench.args.device)
    problem, truth = tomography(prior, 1, seed=7)
    reference, found, alone, figures = against_reference(problem, truth, fast=bench.fast)
    note = f"{len(found.away)} mode-jumping chains, worth {found.ess:.0f} draws, nested R-hat {found.rhat:.3f} (infinite above 1.05); reference worth {reference.ess:.0f}"
    bench.add("sgan_reference", found.judged, "standard errors", note=note)
    notes = {
        "sgan_elsewhere": "share of the posterior in smaller modes where these chains have not been",
        "sgan_within": "largest |z| without that share",
        "sgan_hmc": f"{len(alone.away)} chains of HMC from the prior, {alone.reached:.0%} of them near the posterior",
        "sgan_hmc_rhat": "nested R-hat of these chains",
    }
    for name, note in notes.items():
        bench.add(name, figures[name], "", note=f"{note}; information")


def against_reference(
    problem: InverseProblem, truth: Tensor, *, fast: bool = False
) -> tuple[Reference, Agreement, Agreement, dict[str, float]]:
    """The reference, mode-jumping chains against it, and HMC from the prior against it.

    The truth z* is itself a draw of the posterior, as data are made by the model: chains that start there (a search
    that a user could not make) give the reference its first component; every one of its runs of SMC gives one more. The
    tested chains make their own search, from another seed.
    """
    began = time.process_time()

    def told(what: str) -> None:
        print(f"{time.process_time() - began:5.0f} s of CPU: {what}", flush=True)

    smc = AnnealedSMC(particles=96 if fast else 256, cess=0.6, moves=2)
    found = []
    for r in range(3 if fast else 6):
        posterior = smc.solve(problem, smc.particles, seed=40 + r)
        found.append(posterior.latent[0].flatten(0, 1))
        with torch.no_grad():
            fit = chi2(problem, problem.prior.decode(found[-1][:16])).mean() / problem.terms[0].data[0].numel()
        told(f"annealed SMC {r}: log-evidence {float(posterior.log_evidence[0]):.1f}, chi2/N {fit:.3f}")
    warmup, draws = (40, 20) if fast else (80, 50)
    near = HMC(draws=draws, warmup=warmup, starts=truth.flatten(1), max_leaps=16).solve(problem, 16, seed=4)
    told("HMC from the truth")
    mixture = StudentMixture.fitted([near.latent[0].flatten(0, 1), *found], [1.0, *[1 / len(found)] * len(found)])

    def log_density(z: Tensor) -> Tensor:
        with torch.no_grad():
            logs = torch.cat([problem.latent_log_posterior(part) for part in z.to(problem.dtype).split(32)])
        return logs.double() - 0.5 * z.shape[1] * math.log(2 * math.pi)

    reference = importance(log_density, mixture, 3_000 if fast else 24_000, seed=6)
    told(
        f"reference of importance sampling: ESS {reference.ess:.0f}, largest weight {reference.largest:.4f}, log-evidence {reference.log_evidence:.2f} ± {reference.log_evidence_error:.2f}"
    )
    jumping = ModeJumping(runs=4, particles=96, draws=60, pilot=1000) if fast else ModeJumping(draws=200)
    chains = jumping.solve(problem, 16 if fast else 32, seed=8)
    stats = {n: float(v.double().mean()) for n, v in chains.stats.items()}
    told(
        f"mode-jumping chains: log-evidence {float(chains.log_evidence[0]):.2f} ± {stats['log_evidence_error']:.2f}, {stats['modes']:.0f} modes, mixture ESS {stats['mixture_ess']:.1%}, jumps {stats['jump']:.2f}, trajectories {stats['accept']:.2f}, {stats['mode_changes']:.1f} changes of mode a chain"
    )
    label = chains.stats["mode"][0].flatten().tolist()
    told(f"draws in each mode: { {int(k): label.count(k) for k in sorted(set(label))} }")
    tested = agreement(chains.latent[0].flatten(2), reference, groups=4)
    told(f"mode-jumping chains against it: {tested}")
    part = reference.within(near_to(chains.latent[0].flatten(2).flatten(0, 1), reference.draws))
    there = agreement(chains.latent[0].flatten(2), part, groups=4)
    share = -math.expm1(part.log_evidence - reference.log_evidence)
    told(f"without the {share:.3%} of the posterior where they have not been: {there}")
    lost = HMC(draws=draws, warmup=warmup, max_leaps=16).solve(problem, 16, seed=3)
    alone = agreement(lost.latent[0].flatten(2), reference)
    told(f"HMC alone against it: {alone}")
    figures = {"sgan_elsewhere": share, "sgan_within": there.z, "sgan_hmc": alone.z, "sgan_hmc_rhat": alone.rhat}
    return reference, tested, alone, figures


def near_to(been: Tensor, places: Tensor, reach: float = 10.0) -> Tensor:
    """Which places `(n, dim)` are within `reach` sd of the nearest draw of `been`, `(draws, dim)`.

    The sd are those of the draws' largest mode: draws that are farther than `reach` from its mean are left out of them.
    """
    been = been.double()
    inside = been
    for _ in range(4):
        mean, root = inside.mean(0), torch.linalg.cholesky(torch.cov(inside.T))
        away = torch.linalg.solve_triangular(root, (been - mean).T, upper=False).norm(dim=0)
        inside = been[away < reach]
    units = [torch.linalg.solve_triangular(root, v.T, upper=False).T for v in (been, places.double())]
    return torch.cat([torch.cdist(part, units[0]).amin(1) < reach for part in units[1].split(500)])


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
