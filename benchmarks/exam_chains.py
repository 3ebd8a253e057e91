"""The exam of Markov chains and particles: exact samplers with default settings on posteriors that are known.

Rows are found, not listed: every exported solver that derives from `Chain`, and every other one with `kind` "exact"
that needs a latent and nothing else (annealed particles). Columns are those of exam_chains_targets.py. A cell is judged
on whole groups of draws that know nothing of each other (64 chains; 16 runs of a particle solver):

    means and second moments    t_j = (mean over groups − exact)/(standard error over groups) of every coordinate
    test functions              products of neighbouring coordinates, halves and quarters of the plane, alike
    marginals                   Kolmogorov–Smirnov on draws thinned to twice the autocorrelation time

All p-values of a cell are compared with 10⁻³ over the number of cells over the number of tests of the cell, so that an
exam of exact samplers fails anywhere with a probability of 10⁻³. A cell is

    right     no test fails, and the smallest effective sample size is at least 100
    flagged   a test fails or draws are few, and the sampler's own figures warn: R-hat ≥ 1.01, E-BFMI < 0.3, divergences
    wrong     a test fails and nothing warns
    short     no test fails, nothing warns, and there are too few draws to tell

Flagged counts where the target allows it: everywhere on the funnel, and on separated modes for samplers that do not
temper. Invariance: 1000 chains started from exact posterior draws, 50 steps of warm-up and 20 more; the last positions
are independent exact draws, if the sampler is right.

What is finished is kept in docs/exam_chains.json and read again by the next call, unless a solver's settings changed.

    python benchmarks/exam_chains.py [--fast] [--targets ring,funnel] [--solvers PCN] [--again]
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from exam_chains_page import page
from exam_chains_targets import Target, targets
from exam_problems import F64, Answer
from harness import Benchmark
from scipy import stats
from torch import Tensor

from invgen import solvers
from invgen.contracts import HasLatent, Solver
from invgen.diagnostics import ess, rhat, sliced_wasserstein
from invgen.driver import DivergenceError
from invgen.solvers._chain import Chain

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "docs" / "exam_chains.json", ROOT / "docs" / "exam_chains.md"
CHAINS, RUNS, PARTICLES = 64, 16, 512
FALSE_ALARM = 1e-3
RHAT_LIMIT, EBFMI_LIMIT, ESS_LEAST = 1.01, 0.3, 100
STARTS, SETTLE, STEPS = 1000, 50, 20  # of the invariance test
MOST = 20_000  # thinned draws that the marginals are tested with


def rows(fast: bool) -> Iterator[tuple[str, Solver]]:
    """(name, solver) of every sampler that claims the exact posterior of a latent, with default settings."""
    for name, module in sorted(solvers._exports.items()):
        cls = getattr(importlib.import_module(module), name)
        if not (isinstance(cls, type) and issubclass(cls, Solver)) or cls is Chain or cls.kind != "exact":
            continue
        if not issubclass(cls, Chain) and tuple(cls.needs) != (HasLatent,):
            continue
        solver = cls()
        if fast and isinstance(solver, Chain):
            solver = dataclasses.replace(solver, draws=max(1, solver.draws // 4), warmup=solver.warmup // 4)
        yield name, solver


def tempers(solver: Solver) -> bool:
    """True for samplers that are meant to find all modes."""
    return hasattr(solver, "temperatures") or not isinstance(solver, Chain)


def functions(z: Tensor) -> Tensor:
    """Test functions of standardised draws `(…, dim)`: neighbouring products, two halves and a quarter."""
    halves = (z[..., :2] > 0).to(z)
    return torch.cat([z[..., :-1] * z[..., 1:], halves, halves.prod(-1, keepdim=True)], -1)


def expected(answer: Answer, kept: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Means of the test functions over independent exact draws, and their standard errors."""
    if "functions" not in kept:
        n = 400_000 if len(answer.mean) <= 16 else 50_000
        values = functions((answer.draw(n, 77) - answer.mean) / answer.sd)
        kept["functions"] = values.mean(0), values.std(0) / math.sqrt(n)
    return kept["functions"]


def t_values(values: Tensor, exact: Tensor | float, error: Tensor | float, least: Tensor | float) -> Tensor:
    """Student's t of group means `(groups, k)` against exact ones whose standard error is `error`.

    `least` is a standard error by other means (the effective sample size); the larger one counts.
    """
    groups = len(values)
    spread = torch.maximum(values.std(0) / math.sqrt(groups), torch.as_tensor(least, dtype=F64))
    return (values.mean(0) - exact) / (spread.square() + torch.as_tensor(error, dtype=F64).square()).sqrt()


def judge(draws: Tensor, target: Target) -> dict[str, Any]:
    """Figures of `(groups, n, dim)` float64 draws: ESS, R-hat, the worst p-value times the number of tests, errors."""
    answer = target.answer
    groups, n, dim = draws.shape
    z = (draws - answer.mean) / answer.sd
    worth = torch.from_numpy(ess(z.numpy(), kind="mean")) if n >= 4 else torch.full((dim,), float(groups), dtype=F64)
    centres, error = expected(answer, target.kept)
    tests = [
        t_values(z.mean(1), 0.0, 0.0, worth.rsqrt()),
        t_values(z.square().mean(1), 1.0, 0.0, 0.0),
        t_values(functions(z).mean(1), centres, error, 0.0),
    ]
    t = torch.cat(tests).nan_to_num(nan=math.inf)  # a group without spread cannot have been sampled
    p = 2 * torch.from_numpy(stats.t.sf(t.abs().numpy(), groups - 1))
    # twice the spacing of independent draws: what is left of the correlation only makes the test a little stricter
    spacing = max(1, math.ceil(2 * groups * n / float(worth.min()))) if n > 1 else 1
    thin = draws[:, spacing // 2 :: spacing].flatten(0, 1) if spacing // 2 < n else draws[:, -1]
    thin = thin[:: -(-len(thin) // MOST)]
    levels = answer.cdf(thin).clamp(0, 1)
    ks = [stats.kstest(levels[:, j].numpy(), "uniform") for j in range(dim)]
    p = torch.cat([p, torch.tensor([float(k.pvalue) for k in ks], dtype=F64)])
    some = thin[torch.linspace(0, len(thin) - 1, min(2000, len(thin))).long()]
    exact = [(answer.draw(len(some), 200 + k) - answer.mean) / answer.sd for k in range(2)]
    floor = float(sliced_wasserstein(exact[0], exact[1], seed=0))
    error2 = float((z.mean((0, 1)).square() - 1 / worth).mean())
    return {
        "ess": float(worth.min()),
        "rhat": float(rhat(z.numpy()).max()) if groups > 1 and n >= 4 else None,
        "worst_t": float(t.abs().max()),
        "worst_ks": max(float(k.statistic) for k in ks),
        "tests": len(p),
        "p": min(1.0, float(p.min()) * len(p)),
        "mean_error": math.sqrt(max(0.0, error2)),
        "sd_ratio": float(z.flatten(0, 1).std(0).mean()),
        "wasserstein": float(sliced_wasserstein((some - answer.mean) / answer.sd, exact[0], seed=0)) / floor,
        "thinned": len(thin),
    }


def ebfmi(energy: Tensor) -> float:
    """Smallest Σ (E_n − E_{n−1})² / Σ (E_n − mean)² of chains `(chain, draw)`: how well energies are explored."""
    change = energy.diff(dim=1).square().sum(1)
    return float((change / (energy - energy.mean(1, keepdim=True)).square().sum(1)).nanmedian())


def sit(solver: Solver, target: Target, cells: int, seed: int = 1) -> dict[str, Any]:
    """One cell."""
    particles = not isinstance(solver, Chain)
    problem = target.problem
    if particles:  # runs that share nothing but their batch
        problem = problem.with_data(*(t.data.expand(RUNS, *t.data.shape[1:]) for t in problem.terms))
    try:
        solver.check(problem)
    except TypeError as error:
        return {"verdict": "refused", "why": str(error)}
    cpu = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            posterior = solver.solve(problem, PARTICLES if particles else CHAINS, seed=seed, dtype=F64)
        except (DivergenceError, ValueError, RuntimeError) as error:
            return {"verdict": "failed", "why": f"{type(error).__name__}: {error}"}
    cpu = time.process_time() - cpu
    draws = posterior.samples.flatten(3).double()
    draws = draws[:, 0] if particles else draws[0]
    if posterior.weights is not None and particles:
        picked = torch.multinomial(
            posterior.weights[:, 0].double(),
            draws.shape[1],
            replacement=True,
            generator=torch.Generator().manual_seed(9),
        )
        draws = draws.gather(1, picked[..., None].expand(draws.shape))
    good = draws.isfinite().all(2).all(1)
    if int(good.sum()) < 2:
        return {"verdict": "failed", "why": f"{int((~good).sum())} of {len(good)} chains are not finite"}
    cell = judge(draws[good], target) | {"bad": int((~good).sum()), "cpu_seconds": round(cpu, 1)}
    cell["forward"] = posterior.counts["forward"] / (draws.shape[0] * draws.shape[1])
    stat = {k: v[0] for k, v in posterior.stats.items()}
    if "divergent" in stat:
        cell["divergent"] = int(stat["divergent"][good].sum())
    if "energy" in stat:
        cell["ebfmi"] = ebfmi(stat["energy"][good].double())
    return cell | {"verdict": verdict(cell, particles, cells)}


def warned(cell: dict[str, Any]) -> bool:
    """What a careful reader of the diagnostics would see."""
    return (
        cell["rhat"] is None
        or not cell["rhat"] < RHAT_LIMIT
        or cell.get("ebfmi", 1.0) < EBFMI_LIMIT
        or cell.get("divergent", 0) > 0
        or cell["bad"] > 0
    )


def verdict(cell: dict[str, Any], particles: bool, cells: int) -> str:
    """right, flagged, wrong or short."""
    fails, few = cell["p"] < FALSE_ALARM / cells, not particles and cell["ess"] < ESS_LEAST
    if not fails and not few and cell["bad"] == 0:
        return "right"
    if warned(cell) and not particles:
        return "flagged"
    return "wrong" if fails else "short"


def positions(target: Target, n: int) -> Tensor:
    """Latents `(n, dim)` of exact posterior draws: x = m + L z is inverted."""
    prior, dim = target.problem.prior, len(target.answer.mean)
    basis = torch.cat([torch.zeros(1, dim, dtype=F64), torch.eye(dim, dtype=F64)])
    columns = prior.decode(basis.reshape(-1, *prior.latent_shape)).flatten(1)
    return torch.linalg.solve((columns[1:] - columns[0]).T, (target.answer.draw(n, 31) - columns[0]).T).T.contiguous()


def invariance(solver: Chain, target: Target, cells: int, seed: int = 2) -> dict[str, Any]:
    """Exact draws, some steps later: still exact?"""
    chain = dataclasses.replace(
        solver, draws=1, warmup=min(SETTLE, solver.warmup), thin=STEPS, starts=positions(target, STARTS)
    )
    try:
        chain.check(target.problem)
    except TypeError as error:
        return {"verdict": "refused", "why": str(error)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = chain.solve(target.problem, STARTS, seed=seed, dtype=F64)
    draws = posterior.samples[0].flatten(2).double()
    cell = judge(draws[draws.isfinite().all(2).all(1)], target)
    return cell | {"verdict": "right" if cell["p"] >= FALSE_ALARM / cells else "wrong"}


def credited(solver: Solver, target: Target, cell: dict[str, Any]) -> bool:
    """Right, or flagged where a warning is as good."""
    if cell["verdict"] == "right":
        return True
    allowed = target.flags == "all" or (target.flags == "local" and not tempers(solver))
    return cell["verdict"] == "flagged" and allowed


def summary(cell: dict[str, Any]) -> str:
    """A cell as one line of text."""
    if "why" in cell:
        return f"{cell['verdict']}: {cell['why'][:90]}"
    met = "" if cell["rhat"] is None else f"  R-hat {cell['rhat']:.3f}"
    return (
        f"{cell['verdict']:8s} p {cell['p']:.2g}  ESS {cell['ess']:.0f}{met}  worst t {cell['worst_t']:.1f}  "
        f"mean error {cell['mean_error']:.3f}  sd ratio {cell['sd_ratio']:.3f}  W {cell['wasserstein']:.2f}  "
        + "  ".join(f"{k} {cell[k]:.3g}" for k in ("divergent", "ebfmi", "cpu_seconds") if k in cell)
    )


def main() -> None:
    bench = Benchmark(
        "exam_chains",
        "Chains and particles with default settings on known posteriors.",
        {
            "--targets": {"default": None, "help": "comma-separated columns, all when omitted"},
            "--solvers": {"default": None, "help": "comma-separated names, all when omitted"},
            "--again": {"action": "store_true", "help": "measure finished cells again"},
        },
    )
    wanted = bench.args.targets.split(",") if bench.args.targets else None
    names = bench.args.solvers.split(",") if bench.args.solvers else None
    columns = [t for t in targets() if not (bench.fast and t.name == "gauss128")]
    sitting = list(rows(bench.fast))
    cells = len(columns) * len(sitting)
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() and not bench.fast else {}
    table: dict[str, Any] = {}
    for name, solver in sitting:
        row = kept.get(name, {})
        row = row if row.get("settings") == repr(solver) else {"cells": {}, "invariance": {}}
        row = table[name] = row | {"settings": repr(solver), "tempers": tempers(solver)}
        for target in columns:
            if (names and name not in names) or (wanted and target.name not in wanted):
                continue
            if target.name not in row["cells"] or bench.args.again:
                row["cells"][target.name] = sit(solver, target, cells)
                print(f"{name:20s} {target.name:10s} {summary(row['cells'][target.name])}", flush=True)
                if isinstance(solver, Chain) and not tempers(solver) and not bench.fast:
                    row["invariance"][target.name] = invariance(solver, target, cells)
                    later = summary(row["invariance"][target.name])
                    print(f"{name:20s} {target.name:10s} after {STEPS} steps {later}", flush=True)
            row["cells"][target.name]["credited"] = credited(solver, target, row["cells"][target.name])
            if not bench.fast:
                RESULTS.write_text(json.dumps(kept | table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    found = [c for row in table.values() for c in row["cells"].values() if c["verdict"] != "refused"]
    right = sum(c["credited"] for c in found)
    bench.add("chains_right", right / max(1, len(found)), "of cells", note=f"{right} of {len(found)}")
    if not bench.fast:
        later = [c for row in table.values() for c in row["invariance"].values() if c["verdict"] != "refused"]
        same = sum(c["verdict"] == "right" for c in later)
        bench.add("chains_invariant", same / max(1, len(later)), "of cells", note=f"{same} of {len(later)}")
        RESULTS.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        PAGE.write_text(page(table, columns), encoding="utf-8")
    bench.finish()


if __name__ == "__main__":
    main()
