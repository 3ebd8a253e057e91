"""Simulation-based inference: posteriors from simulations alone, on tasks with known posteriors; what guards them.

    c2st        sbibm's protocol (Lueckmann et al. 2021): ten observations, 1,000 and 10,000 simulations, 10,000 draws of one
                amortised posterior each, accuracy of sbibm's classifier (scikit-learn, five folds, z-scored by the reference)
                between draws and reference; mean over observations. Defaults of `NPE` throughout; published figures of NPE in
                the notes. The references are sbibm's files where `make peers` has put them, exact draws for other observations
                otherwise, which the note then says.
    loader      CPU time to hand out one epoch of 45,000 pairs in batches of 200, against sbi's loader, no training.
    misspec     a gather of 16 receivers (channels) × 50 samples with two reflections of unknown time, velocity and amplitude
                in white noise. Detection at a level of 5 % of: an offset of one noise sd on a fifth of the channels, a gain of
                1.2, 2 % outliers of 5 noise sd. misspec_power is the smallest of the three rates, mean of six calibrations; noise of one more sd on a
                fifth of the channels instead of an offset is printed beside.
    conformal   a conjugate Gaussian in three dimensions whose posterior is stated with half its sd; 90 % regions from 500
                simulations, coverage over 500 others, mean of 200 repeats: the worst of four kinds of region. The target is
                0.9 (exactly 451/501 in expectation) within three standard errors of that mean.

    dwarfs      six parameters of a dwarf galaxy from positions and velocities of about 100 stars, 20,000 simulations, DeepSets;
                ranks of 300 new galaxies among 200 draws: dwarf_sbc is the smallest p-value, adjusted for all that are looked
                at; coverage of the 90 % intervals on 60 galaxies of another code where the shared data are there.
    image       64 × 64 Gaussian fields behind a mask and a post-stack: `sbi_image.py`, which runs alone, too.

`--only c2st` (loader, misspec, conformal, dwarfs, image) runs one part, `--tasks` and `--budgets` a share of it. `--fast`: two observations, 1,000 simulations, the fast classifier on
2,000 draws; 60 repeats. Everything that decides the result stands in this file.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from harness import Benchmark, interleaved
from sbi_tasks import TASKS, Task, references
from torch import Tensor

from invgen import InverseProblem, SimulatedNoise, Simulations, Simulator
from invgen.data import DwarfGalaxies
from invgen.diagnostics import (
    MisspecificationTest,
    c2st,
    calibrate,
    conformal_density,
    conformal_ellipsoid,
    conformal_intervals,
)
from invgen.priors import UniformPrior

SEED = 3
SIGMA, RECEIVERS, SAMPLES, CALIBRATIONS = 0.2, 16, 50, 6


# --- accuracy of the posterior ------------------------------------------------------------------------------------------


def task_c2st(bench: Benchmark, task: Task, budgets: tuple[int, ...] = (1000, 10_000)) -> None:
    """Mean accuracy over observations, for the budgets wanted."""
    from invgen.solvers import NPE

    refs = references(task, 2 if bench.fast else 10, 2000 if bench.fast else 10_000)
    method = "fast" if bench.fast else "sbibm"
    for budget, published in zip((1000, 10_000), task.published, strict=True):
        if budget not in budgets or (bench.fast and budget > 1000):
            continue
        problem = task.problem(refs[0].data)
        start = time.process_time()
        amortized = NPE().fit(problem, Simulations.of(problem, budget, seed=SEED), seed=SEED)
        trained = time.process_time() - start
        scores = []
        for ref in refs:
            draws = amortized(ref.data, len(ref.samples), seed=SEED).samples.reshape(len(ref.samples), -1)
            scores.append(float(c2st(ref.samples, draws, method=method)))
        score = torch.tensor(scores, dtype=torch.float64)
        note = f"published {published:g}; {refs[0].source} references; trained in {trained:.0f} CPU s; {score.min():.3f} to {score.max():.3f}"
        name = f"c2st_{task.name}_{budget // 1000}k"
        bench.add(name, float(score.mean()), "accuracy", float(score.std()) / math.sqrt(len(scores)), note)


# --- cost of loading ----------------------------------------------------------------------------------------------------


def loader(bench: Benchmark) -> None:
    """CPU time of an epoch of batches."""
    from sbi.inference import NPE as Peer

    from invgen.solvers._neural_batches import Batches

    n, size = 45_000, 200
    x, d = torch.randn(n, 5), torch.randn(n, 8)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # sbi writes its logs where it stands
        peer = Peer(
            prior=torch.distributions.MultivariateNormal(torch.zeros(5), torch.eye(5)), show_progress_bars=False
        )
        peer.append_simulations(x, d)
    theirs = peer.get_dataloaders(training_batch_size=size, validation_fraction=1e-4)[0]
    ours = Batches(x, d, size=size, seed=SEED)

    def through(batches: Iterable[Any]) -> int:
        return sum(len(b[0]) for b in batches)

    timing = interleaved({"invgen": lambda: through(ours.epoch(0)), "sbi": lambda: through(theirs)}, 9)
    ratio = timing["sbi"].median / timing["invgen"].median
    note = f"an epoch: sbi {timing['sbi'].median:.3f} s, invgen {timing['invgen'].median:.4f} s"
    bench.add("loader_ratio", ratio, "x", note=note)


# --- observations that the simulator does not make ----------------------------------------------------------------------


def gather(x: Tensor) -> Tensor:
    """`(n, 6)` times, velocities and amplitudes of two reflections to `(n, RECEIVERS, SAMPLES)` with noise."""
    offset, t = torch.linspace(0, 1, RECEIVERS)[:, None], torch.linspace(0, 1, SAMPLES)
    d = SIGMA * torch.randn(len(x), RECEIVERS, SAMPLES)
    for j in range(2):
        time0, velocity, amplitude = (x[:, 3 * j + k, None, None] for k in range(3))
        w = 20 * (t - (time0.square() + (offset / velocity / 2).square()).sqrt())
        d = d + amplitude * (1 - w.square()) * torch.exp(-0.5 * w.square())
    return d


def spoiled(d: Tensor) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(SEED)
    chosen = torch.argsort(torch.rand(len(d), RECEIVERS, generator=g), 1) < round(0.2 * RECEIVERS)
    hit = torch.rand(d.shape, generator=g) < 0.02
    sign = torch.randn(d.shape, generator=g).sign()
    return {
        "none": d,
        "offset": d + SIGMA * chosen[:, :, None],
        "gain": 1.2 * d,
        "outliers": d + 5 * SIGMA * hit * sign,
        "noise": d + SIGMA * chosen[:, :, None] * torch.randn(d.shape, generator=g),
    }


def misspecification(bench: Benchmark) -> None:
    low, high = torch.tensor([0.15, 1.2, 0.5, 0.5, 1.2, 0.5]), torch.tensor([0.35, 2.2, 1.5, 0.7, 2.2, 1.5])
    simulator = Simulator(gather, (6,), (RECEIVERS, SAMPLES), batched=True, tensors=True)
    problem = InverseProblem(torch.zeros(RECEIVERS, SAMPLES), simulator, SimulatedNoise(), UniformPrior(low, high))
    n = 200 if bench.fast else 500
    found: dict[str, list[float]] = {}
    for k in range(CALIBRATIONS):
        test = MisspecificationTest(Simulations.of(problem, 3000, seed=2 * k), level=0.05, seed=k)
        for name, d in spoiled(Simulations.of(problem, n, seed=2 * k + 1).data[0]).items():
            found.setdefault(name, []).append(float(test(d).flagged.mean()))
    rates = {k: sum(v) / CALIBRATIONS for k, v in found.items()}
    power, n = min(rates[k] for k in ("offset", "gain", "outliers")), n * CALIBRATIONS
    note = ", ".join(f"{k} {v:.3f}" for k, v in rates.items() if k != "none")
    bench.add("misspec_power", power, "rate", math.sqrt(max(power * (1 - power), 1 / n) / n), note)
    error = float(torch.tensor(found["none"], dtype=torch.float64).std()) / math.sqrt(CALIBRATIONS)
    bench.add("misspec_false_alarms", rates["none"], "rate", error, "nominal 0.05")


# --- regions that cover -------------------------------------------------------------------------------------------------


def conformal(bench: Benchmark) -> None:
    D = torch.float64
    g = torch.Generator().manual_seed(SEED)
    mean = torch.tensor([2.0, -1.0, 0.5], dtype=D)
    covariance = torch.tensor([[1.0, 0.6, 0.0], [0.6, 0.8, -0.2], [0.0, -0.2, 0.5]], dtype=D)
    A, noise = torch.tensor([[1.0, 0.5, 0.0], [0.0, -1.0, 2.0]], dtype=D), 0.3
    gain = covariance @ A.mT @ torch.linalg.inv(A @ covariance @ A.mT + noise**2 * torch.eye(2, dtype=D))
    root = 0.5 * torch.linalg.cholesky(covariance - gain @ A @ covariance)  # half the sd: over-confident

    def simulate(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = mean + torch.randn(n, 3, generator=g, dtype=D) @ torch.linalg.cholesky(covariance).mT
        d = x @ A.mT + noise * torch.randn(n, 2, generator=g, dtype=D)
        centre = mean + (d - mean @ A.mT) @ gain.mT
        white = torch.randn(n, 60, 3, generator=g, dtype=D)
        own = torch.linalg.solve_triangular(root, (x - centre).mT, upper=False).mT
        return x, centre[:, None] + white @ root.mT, -0.5 * own.square().sum(1), -0.5 * white.square().sum(2)

    repeats = 60 if bench.fast else 200
    rates: dict[str, list[float]] = {"intervals": [], "box": [], "ellipsoid": [], "density": [], "none": []}
    for _ in range(repeats):
        (x, s, lx, ls), (y, r, ly, lr) = simulate(500), simulate(500)
        inside = {
            "intervals": conformal_intervals(x, s).contains(y, r),
            "box": conformal_intervals(x, s, joint=True).contains(y, r),
            "ellipsoid": conformal_ellipsoid(x, s).contains(y, r),
            "density": conformal_density(lx, ls).contains(ly, lr),
            "none": (y > r.quantile(0.05, 1)) & (y < r.quantile(0.95, 1)),
        }
        for k, v in inside.items():
            rates[k].append(float(v.double().mean()))
    found = {k: torch.tensor(v, dtype=D) for k, v in rates.items()}
    worst = max((k for k in found if k != "none"), key=lambda k: abs(float(found[k].mean()) - 0.9))
    note = ", ".join(f"{k} {v.mean():.4f}" for k, v in found.items() if k != "none")
    value = found[worst]
    note = f"{note}; uncorrected intervals {found['none'].mean():.3f}"
    bench.add("conformal_coverage", float(value.mean()), "coverage", float(value.std()) / math.sqrt(repeats), note)


# --- dwarf galaxies -----------------------------------------------------------------------------------------------------

GALAXIES = DwarfGalaxies(negative="cut")  # the prior as published, whose corners have no positive distribution function


def features(stars: Tensor) -> Tensor:
    """lg R, lg |v| and 1 of every star: all that spherical symmetry leaves; empty entries are zero."""
    radius = torch.hypot(stars[..., 0], stars[..., 1])
    there = stars[..., 3]
    logs = torch.stack([radius, stars[..., 2].abs()], -1).clamp_min(1e-4).log10()
    return torch.cat([logs * there[..., None], there[..., None]], -1)


def observed(parameters: Tensor) -> Tensor:
    """The simulator."""
    return features(GALAXIES(parameters))


def dwarfs(bench: Benchmark) -> None:
    """Ranks, and galaxies of another code."""
    from invgen.solvers import NPE

    low, high = (torch.tensor(v) for v in (GALAXIES.low, GALAXIES.high))
    shape = (GALAXIES.data_shape[0], 3)
    simulator = Simulator(observed, (6,), shape, batched=True, tensors=True)
    problem = InverseProblem(torch.zeros(shape), simulator, SimulatedNoise(), UniformPrior(low, high))
    budget, sets = (1000, 60) if bench.fast else (20_000, 300)
    start = time.process_time()
    simulations = Simulations.of(problem, budget, seed=SEED)
    simulated = time.process_time() - start
    amortized = NPE(embedding="deepsets", space="u", members=1).fit(problem, simulations, seed=SEED)
    trained = time.process_time() - start - simulated
    verdict = calibrate(problem, amortized, sets, 200, seed=SEED + 1)
    print(verdict, flush=True)
    bench.add("dwarf_sbc", verdict.p_value, "p", note=f"simulated in {simulated:.0f}, trained in {trained:.0f} CPU s")
    real = agama(shape)
    if real is None:
        print("The dwarf galaxies of the shared data are missing; coverage on them is left out.")
        return
    data, truth = real
    draws = amortized(data, 400, seed=SEED).samples[:, 0]
    inside = (draws.quantile(0.05, 1) <= truth) & (truth <= draws.quantile(0.95, 1))
    for name, share in zip(GALAXIES.names, inside.double().mean(0).tolist(), strict=True):
        bench.add(
            f"dwarf_coverage_{name}", share, "of 60", math.sqrt(0.09 / len(truth)), "nominal 0.90, galaxies of Agama"
        )


def agama(shape: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
    """Features of the 60 galaxies and their parameters in the order of `DwarfGalaxies.names`."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data" / "dwarfs" / "agama_60.h5"
    if not path.exists():
        return None
    import h5py

    with h5py.File(path) as file:
        ends, position, velocity = (torch.from_numpy(file[k][()]) for k in ("end", "pos_kpc", "v_los_kms"))
        label = {k: torch.from_numpy(v[()]).double() for k, v in file["labels"].items()}
    stars = torch.zeros(len(ends), shape[0], 4)
    first = 0
    for i, end in enumerate(ends.tolist()):
        count = min(end - first, shape[0])
        stars[i, :count, :2] = position[first : first + count].float()
        stars[i, :count, 2] = velocity[first : first + count].float()
        stars[i, :count, 3] = 1.0
        first = end
    star, halo = label["stellar_log_r_star"], label["dm_log_r_dm"]
    columns = [label["dm_gamma"], halo, label["dm_log_rho_0"], 10 ** (star - halo), label["df_beta_0"]]
    columns.append(10 ** (label["df_log_r_a"] - star))
    return features(stars), torch.stack(columns, 1)


# --- images -------------------------------------------------------------------------------------------------------------


def image(bench: Benchmark) -> None:
    """Conditional flow matching against closed forms."""
    from sbi_image import FAST, measure

    for figure in measure(**(FAST if bench.fast else {})):
        bench.add(figure["id"], figure["value"], figure["unit"], figure["mc_error"], figure["note"])


def main() -> None:
    parts = ("c2st", "loader", "misspec", "conformal", "dwarfs", "image")
    arguments: dict[str, Any] = {
        "--only": {"choices": parts, "default": None, "help": "one part"},
        "--tasks": {"default": ",".join(TASKS), "help": "of c2st, comma-separated"},
        "--budgets": {"default": "1000,10000", "help": "of c2st, comma-separated"},
    }
    bench = Benchmark("sbi", __doc__ or "", arguments)
    chosen = parts if bench.args.only is None else (bench.args.only,)
    budgets = tuple(int(n) for n in bench.args.budgets.split(","))
    if "conformal" in chosen:
        conformal(bench)
    if "misspec" in chosen:
        misspecification(bench)
    if "loader" in chosen:
        loader(bench)
    if "dwarfs" in chosen:
        dwarfs(bench)
    if "image" in chosen:
        image(bench)
    if "c2st" in chosen:
        for name in bench.args.tasks.split(","):
            task_c2st(bench, TASKS[name], budgets)
    bench.finish()


if __name__ == "__main__":
    main()
