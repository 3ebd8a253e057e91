"""Train the shipped geology prior: `python -m invgen.priors.pretrained.train_geology --out FILE`.

Everything that decides the result stands in this file: generator, pool, network, noise levels, steps and seed. The
shipped weights come from two stages: 14,000 steps on sections that were all textured (this file at revision 1679d86,
which took no `--start`), then `--start FIRST.safetensors --steps 7500 --rate 1e-3` with the present generator, where
two sections in five are interval models.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from invgen.checkpoints import read_checkpoint
from invgen.data.crops import GeologyCrops
from invgen.grid import Grid
from invgen.priors.diffusion import DepthChannel, DiffusionPrior
from invgen.priors.networks import UNet
from invgen.priors.training import Training
from invgen.transforms import Affine

CROP = (96, 96)
SEED = 20


def build() -> DiffusionPrior:
    """The untrained prior: log-impedance m = ln(2000 v[km/s]) on 4 m cells, u = (m − 8.65)/0.3."""
    torch.manual_seed(SEED)
    grid = Grid(
        CROP,
        (4.0, 4.0),
        axes=("z", "x"),
        units=("m", "m"),
        channels=("log_impedance",),
        channel_units=("ln(kg/m2/s*1e-3)",),
    )
    network = UNet(1, extra=2, widths=(40, 64, 96, 112), blocks=2)
    return DiffusionPrior(
        network,
        grid.field_shape,
        transform=Affine(8.65, 0.3),
        grid=grid,
        sigma_data=1.0,
        sigma_min=0.005,
        sigma_max=300.0,
        mean_variance_of_field=0.7,
        depth=DepthChannel(2000.0),
    )


def write_card(checkpoint: Path) -> Path:
    """The card of a checkpoint as Markdown beside it: data, seed, command, time, validation figures."""
    _, meta = read_checkpoint(checkpoint, "DiffusionPrior")
    card, grid = meta["card"], meta["grid"]
    rows = [f"| {k.removeprefix('rmse_at_')} | {v:.4f} |" for k, v in card["validation"].items()]
    lines = [
        f"# {checkpoint.stem}",
        "",
        "Diffusion prior (EDM preconditioning, UNet with bounded receptive field) on 2-D sections of log-impedance,",
        "m = ln(2000 v[km/s]): density 2 g/cc. Moves to any grid with `.at(shape)`.",
        "",
        f"- Grid of training: {grid['shape'][0]} × {grid['shape'][1]} cells of {grid['spacing'][0]:g} m; depth of every row is an input.",
        f"- Data: {card['data']}. Generated; no field data and no published model was trained on.",
        f"- Command: `{card['command']}`",
        *(
            [f"- Starts from the weights of `{card['start']}`: 14,000 steps by this script at revision 1679d86."]
            if card.get("start")
            else []
        ),
        f"- Seed {card['seed']}, {card['steps']} steps of 16 crops, {card['training_seconds'] / 60:.0f} minutes on {card['threads']} CPU thread(s), bfloat16 autocast.",
        "- Weights: moving average, stored in float16.",
        "",
        "Denoising error on 256 crops of 64 held-out sections, root mean square in units of u = (m − 8.65)/0.3:",
        "",
        "| noise level σ | error |",
        "|---|---|",
        *rows,
        "",
    ]
    path = checkpoint.with_suffix(".md")
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def main() -> None:
    """Command line of the training run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=14_000)
    parser.add_argument("--sections", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rate", type=float, default=1.2e-3, help="peak learning rate")
    parser.add_argument("--start", type=Path, default=None, help="checkpoint whose weights the training starts from")
    parser.add_argument("--state", default=None, help="resumable training state")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    began = time.perf_counter()
    data = GeologyCrops(arguments.sections, CROP, seed=SEED, workers=2)
    held_out = GeologyCrops(64, CROP, seed=SEED, start=1_000_000).batch(0, 256, 1)
    print(f"pool of {arguments.sections} sections: {time.perf_counter() - began:.0f} s", flush=True)
    prior = build()
    if arguments.start:
        prior.network.load_state_dict(DiffusionPrior.load(arguments.start).network.state_dict())
    training = Training(
        steps=arguments.steps,
        batch_size=16,
        learning_rate=arguments.rate,
        ema=0.9995,
        precision="bf16-mixed",
        device=arguments.device,
        seed=SEED,
        checkpoint=arguments.state,
        save_every=500,
    )

    def log(step: int, loss: float) -> None:
        if step % 250 == 0:
            print(f"step {step} loss {loss:.4f} {time.perf_counter() - began:.0f} s", flush=True)

    report = training.fit(prior, data, validation=held_out, progress=False, callback=log)
    card = {
        "data": f"invgen.data.GeologySections(), seed {SEED}, {arguments.sections} sections, crops {CROP}",
        "command": f"python -m invgen.priors.pretrained.train_geology --out {arguments.out.name} --steps {arguments.steps} --sections {arguments.sections}"
        + (f" --start {arguments.start.name} --rate {arguments.rate:g}" if arguments.start else ""),
        "start": arguments.start.name if arguments.start else None,
        "seed": SEED,
        "steps": report.steps,
        "training_seconds": round(report.seconds),
        "threads": arguments.threads,
        "validation": {k: round(v, 5) for k, v in report.validation.items()},
    }
    prior.save(arguments.out, half=True, card=card)
    write_card(arguments.out)
    print(card, flush=True)


if __name__ == "__main__":
    main()
