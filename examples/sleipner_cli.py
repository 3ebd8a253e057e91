"""Sleipner inline 57 through the command line, from a SEG-Y file, without the well and with it as data.

    python examples/sleipner_cli.py --out run          (needs the private test data; see README.md here)

Writes what a processing house would hand over: `line57.sgy` (IEEE, 2 ms, 12.5 m), `background.sgy`, `wavelet.npy` (scaled
by the tie, halved for the reflectivity), `log.txt`, and the configurations `blind.yaml`, `well_a.yaml`, `well_b.yaml`. Each
is run by `invgen invert`, and NetCDF and SEG-Y are read back. Estimates of wavelet scale, noise and level are those of
`sleipner.py`, noise model "model error".

What is compared, all at the well:

    without the well     every sample of the log is blind (but for what the tie and the background took from it)
    with the well        two-fold: the log is cut into blocks of 60 ms, every other one is data (sd 0.05 of ln AI), and
                         the others are held back; a second run swaps them. Each sample is judged in the run that did
                         not see it, so both rows judge the same samples. A held-back sample has data at most 30 ms
                         away: this is interpolation along the well, not a second well.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import script
import sleipner
import torch
import yaml

from invgen.cli import main as invgen
from invgen.data import GeologySections
from invgen.data.segy import read_segy, write_segy
from invgen.diagnostics import BlindWell, blind_well
from invgen.grid import Grid
from invgen.operators import Smooth
from invgen.posterior import Posterior

Array = np.ndarray

WELL_SD = 0.05  # of ln AI: what the log and the field may differ by at a sample
BLOCK = 30  # samples, 60 ms: of the log, in turn data and held back
GENERATED = 16  # sections whose mean level is that of the prior


def write_files(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Section, background, wavelet and log as files; estimates of scale, noise and level."""
    section, log, wavelet = sleipner.read(args.data)
    section, wavelet = sleipner.low_cut(section, wavelet)
    times = slice(*(round(t / sleipner.DT) for t in sleipner.TIMES))
    found = sleipner.tie(section[:, sleipner.WELL_TRACES].mean(1), log, wavelet, times)
    log = np.roll(log, int(found["shift"]))
    rows = slice(*(round(t / sleipner.DT) for t in args.times))
    first = sleipner.WELL - args.traces // 2
    traces = slice(first, first + args.traces)
    sigma = sleipner.random_noise(section[rows, traces])
    model = sleipner.noise_models(found, sigma)["model error"]

    grid = Grid(section.shape, (sleipner.DT, sleipner.DX), axes=("t", "x"), units=("s", "m"))
    write_segy(folder / "line57.sgy", section, grid=grid, format="ieee", text="Sleipner inline 57, 8 Hz low cut")
    trend = np.tile(log[:, None], (1, section.shape[1]))
    write_segy(folder / "background.sgy", trend, grid=grid, text="Background: ln AI of 15/9-13, constant along x")
    np.save(folder / "wavelet.npy", model["scale"] * wavelet / 2)
    np.savetxt(
        folder / "log.txt", np.stack([np.arange(len(log)) * sleipner.DT, log], 1), fmt="%.6f", header="t (s)  ln AI"
    )
    part = grid.crop((rows, traces))
    return {
        "log": log[rows],
        "grid": part,
        "column": sleipner.WELL - first,
        "tie": found,
        "sigma": sigma,
        "model_error": model["model_error"],
        "shift": float(log[rows].mean()) - generated_level(part),
    }


def generated_level(grid: Grid) -> float:
    """Mean ln AI of generated sections at the depths of the window."""
    full = GeologySections()
    nt = grid.shape[0]
    top = min(int(grid.origin[0] * sleipner.HALF_VELOCITY / full.spacing[0]), full.shape[0] - nt)
    draws = [full.sample(1, seed=sleipner.SEED, start=i)[0, 0, top : top + nt] for i in range(GENERATED)]
    return float(np.mean(draws))


def configuration(files: dict[str, Any], args: argparse.Namespace, name: str, mask: str | None) -> dict[str, Any]:
    """What `invgen invert --config` reads; with a mask the well is data where it is true."""
    grid: Grid = files["grid"]
    t, x = grid.coordinates("t"), grid.coordinates("x")
    background = {
        "name": "background",
        "model": "background.sgy",
        "operator": {"class_path": "Smooth", "init_args": {"lengths": list(smoothing(grid))}},
        "noise": sleipner.BACKGROUND_SD,
    }
    position = float(x[files["column"]])
    log = {"file": "log.txt", "position": position, "first": float(t[0]), "last": float(t[-1])}
    well = {"name": "15/9-13", "well": log, "noise": WELL_SD, "mask": mask}
    noise = {"sigma": files["sigma"], "model_error": files["model_error"]}
    return {
        "data": "line57.sgy",
        "window": {"t": [float(t[0]), float(t[-1])], "x": [float(x[0]), float(x[-1])]},
        "operator": {"class_path": "PostStack", "init_args": {"wavelet": "wavelet.npy", "dt": sleipner.DT}},
        "noise": {"class_path": "GaussianNoise", "init_args": noise},
        "terms": [background] + ([well] if mask else []),
        "prior": {
            "name": args.checkpoint or "geology",
            "shift": round(files["shift"], 4),
            "velocity": 2 * sleipner.HALF_VELOCITY,
            "precision": "bfloat16",
        },
        "channels": {"log_impedance": "ln(m/s g/cc)"},
        "solver": {"class_path": "PnPDM", "init_args": {"iterations": args.iterations, "inner": args.inner}},
        "num_samples": args.samples,
        "seed": args.seed,
        "out": f"{name}/posterior.nc",
        "segy": name,
        "report": f"{name}/report.html",
    }


def invert(folder: Path, name: str, config: dict[str, Any]) -> Array:
    """Run the command line; draws of ln AI `(n, nt, nx)` from the NetCDF, checked against the SEG-Y of the mean."""
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    with contextlib.chdir(folder):  # names in a configuration are those of the working directory
        invgen(["invert", "--config", f"{name}.yaml", "--no-progress"])
    posterior = Posterior.load(folder / config["out"])
    mean = read_segy(folder / name / "mean.sgy")
    if not torch.allclose(mean.data, posterior.mean()[0].float(), atol=1e-5):
        raise RuntimeError(f"{name}/mean.sgy is not the mean of {config['out']}.")
    origin = float(config["window"]["t"][0])
    if abs(mean.grid.origin[0] - origin) > 1e-6:
        raise RuntimeError(f"{name}/mean.sgy starts at {mean.grid.origin[0]} s, the window at {origin} s.")
    return posterior.samples[0, 0, :, 0].double().numpy()


def smoothing(grid: Grid) -> tuple[int, int]:
    """Running means of the background in samples and traces."""
    seconds, metres = sleipner.SMOOTH_SECONDS / sleipner.DT, sleipner.SMOOTH_METRES / sleipner.DX
    return min(round(seconds), grid.shape[0]), min(round(metres), grid.shape[1])


def background_at_well(log: Array, grid: Grid, column: int) -> Array:
    """The trend every run is given, `(nt,)`."""
    smooth = Smooth((1, *grid.shape), smoothing(grid))
    field = torch.from_numpy(log)[None, None, :, None].expand(1, 1, *grid.shape)
    return smooth(field)[0, 0, :, column].numpy()


def held_back(n: int) -> Array:
    """True in every other block of the log."""
    return (np.arange(n) // BLOCK) % 2 == 0


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = script.parser(__doc__, figure=False)
    script.add_section(parser, sleipner.DATA, sleipner.TIMES)
    parser.add_argument("--out", type=Path, help="keep files, configurations and results here")
    parser.add_argument("--traces", type=int, default=32, help="traces around the well")
    parser.add_argument("--inner", type=int, default=3, help="noise levels of a prior step")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if not (args.data / "Sleipner_01_il_57.npy").exists():
        print(
            f"Skipped: {args.data} does not hold the private section Sleipner_01_il_57.npy; give its folder with --data."
        )
        return {"example": "sleipner_cli", "skipped": True}
    with contextlib.ExitStack() as stack:
        folder = args.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        return run(folder, args)


def run(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Three runs of the command line and the figures at the well."""
    began = time.perf_counter()
    files = write_files(folder, args)
    grid, log, column = files["grid"], files["log"], files["column"]
    first_fold = held_back(len(log))
    masks = {"well_a": ~first_fold, "well_b": first_fold}  # True: data
    for name, mask in masks.items():
        np.save(folder / f"{name}.npy", mask)
    draws: dict[str, Array] = {}
    for name in ("blind", *masks):
        start = time.perf_counter()
        draws[name] = invert(folder, name, configuration(files, args, name, f"{name}.npy" if name in masks else None))
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    # each sample from the run that did not see it
    at_well = {name: d[:, :, column] for name, d in draws.items()}
    crossed = np.where(first_fold, at_well["well_a"], at_well["well_b"])
    seen = np.where(first_fold, at_well["well_b"], at_well["well_a"])
    # a log is the field and an error, and the well's term says which: what a held-back sample should lie in
    error = WELL_SD * np.random.default_rng(args.seed).standard_normal(crossed.shape)
    trend = background_at_well(log, grid, column)
    rows: dict[str, BlindWell] = {
        "without the well": blind_well(at_well["blind"], log, trend=trend),
        "without the well, error of the log added": blind_well(at_well["blind"] + error, log, trend=trend),
        "with the well, held-back part": blind_well(crossed, log, trend=trend),
        "with the well, held-back part, error added": blind_well(crossed + error, log, trend=trend),
        "with the well, part that is data": blind_well(seen, log, trend=trend),
    }
    alone = float(np.corrcoef(trend, log)[0, 1])
    print(f"\n{len(log)} samples of the log; the background alone correlates {alone:.2f} with it")
    for name, row in rows.items():
        print(f"{name}\n    {row}")
    line = {
        "example": "sleipner_cli",
        "traces": grid.shape[1],
        "samples": args.samples,
        "background_alone": alone,
        "figures": {name: {k: v for k, v in vars(row).items() if v == v} for name, row in rows.items()},
        "seconds": time.perf_counter() - began,
        "threads": args.threads,
    }
    return script.finish(line)


if __name__ == "__main__":
    main()
