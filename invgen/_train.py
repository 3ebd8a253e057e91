"""`invgen train`: a learned prior on an array of examples or on generated ones."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from invgen._config import ConfigError, check_output, load_yaml
from invgen._train_material import material
from invgen._train_prior import make_prior
from invgen.priors.training import Training

__all__ = ["train"]

_TOP = (
    *(
        "data",
        "pool",
        "pool_file",
        "transform",
        "network",
        "grid",
        "prior",
        "training",
        "validation",
        "seed",
        "device",
        "out",
    ),
    "progress",
)
_PLAIN = ("validation", "seed", "device", "out", "progress", "training")


def train(
    words: list[str],
    make: Callable[..., Any],
    parse: Callable[..., Any],
    take: Callable[..., Any],
    check_device: Callable[[str], str],
) -> str:
    """Train, save, and say what came out."""
    words = list(words)
    if words and not words[0].startswith("-"):  # invgen train CONFIG
        words = ["--config", *words]
    path = take(words, "--config")
    config = load_yaml(path) if path is not None else {}
    for name in ("training", "grid"):
        if config.get(name) is not None and not isinstance(config[name], dict):
            raise ConfigError(f"{name} must be a mapping of settings, got {config[name]!r}.")
    unknown = [k for k in config if k not in _TOP]
    if unknown:
        raise ConfigError(f"The configuration has the unknown key {unknown[0]!r}; known are {', '.join(_TOP)}.")
    options = _options(words, config, make, parse)
    out = check_output(options.out, ".safetensors")
    settings = {k: v for k, v in options.training.as_dict().items()}
    for name, endings in (("checkpoint", ()), ("log", (".csv",)), ("report", (".html", ".htm"))):
        if settings[name]:
            check_output(settings[name], *endings)
    training = Training(**{**settings, "seed": options.seed, "device": check_device(options.device)})
    data = options.data if options.data is not None else config.get("data")
    if data is None:
        raise ConfigError("train needs --data FILE.npy or --data geology (or data: in the configuration).")
    pool = config.get("pool")
    if pool is not None and (not isinstance(pool, int) or isinstance(pool, bool) or pool < 2):
        raise ConfigError(f"pool is a number of examples, at least 2, got {pool!r}.")
    torch.manual_seed(options.seed)
    given = material(data, options.validation, pool, config.get("grid"), options.seed, config.get("pool_file"))
    prior = make_prior(config.get("prior"), config.get("network"), config.get("transform"), given)
    _try(prior)
    decides = {k: config.get(k) for k in ("prior", "network", "transform", "pool", "grid")}
    decides |= {"data": data, "validation": options.validation}
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = _say
        report = training.fit(prior, given.data, validation=given.held, progress=options.progress, settings=decides)
    before = getattr(prior, "seen", {}).get("started_from")
    card = {
        "data": given.told,
        "command": "invgen train" + (f" --config {Path(path).name}" if path else ""),
        "seed": options.seed,
        "steps": report.steps,
        "training_seconds": round(report.seconds, 1),
        "validation": {k: round(v, 5) for k, v in report.validation.items()},
    }
    if before:  # what the model whose network it started from has cost belongs to its own cost
        earlier = before.get("total_training_seconds", before.get("training_seconds", 0.0))
        card |= {"started_from": before, "total_training_seconds": round(report.seconds + earlier, 1)}
    prior.to("cpu").save(out, card=card)
    figures = ", ".join(f"{k.replace('_at_', ' at sigma ')}: {v:.4f}" for k, v in report.validation.items())
    told = ""
    if report.interrupted:
        told = " (interrupted; call again with the same --training.checkpoint to continue)"
    elif report.stopped_early:
        told = f" (stopped early; the weights are those of step {report.best_step})"
    return f"Wrote {out}: {report.steps} steps in {report.seconds:.0f} s{told}." + (
        f" Validation {figures}." if figures else ""
    )


def _say(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning as the command line says things."""
    print(f"invgen: {' '.join(str(message).split())}", file=sys.stderr)


def _options(words: list[str], config: dict[str, Any], make: Callable[..., Any], parse: Callable[..., Any]) -> Any:
    """Flags over the file's plain values."""
    parser = make(
        "train",
        "prior.safetensors",
        "`invgen train FILE.yaml` (or --config FILE.yaml) holds the same names, and data, pool, pool_file, transform, prior, network and grid settings. Interrupt with Ctrl-C and call again with the same --training.checkpoint to continue.",
    )
    parser.add_argument(
        "--data",
        type=str | None,
        default=None,
        help=".npy (examples, channels, rows, columns), the word geology, or a generator of invgen.data",
    )
    parser.add_argument("--validation", type=float, default=0.05, help="share of the examples held out for validation")
    parser.add_class_arguments(Training, "training", skip={"seed", "device"})
    parser.add_argument("--defaults_from_file", action="config", help="internal: the file's plain values")
    plain: dict[str, Any] = {k: config[k] for k in _PLAIN if k in config}
    if isinstance(config.get("data"), str):
        plain["data"] = config["data"]
    return parse(parser, (["--defaults_from_file", json.dumps(plain)] if plain else []) + words)


def _try(prior: Any) -> None:
    """One denoising of zeros: a network of the wrong kind is found now, and said in our words."""
    if not (hasattr(prior, "denoise") and hasattr(prior, "network")):
        return
    try:
        with torch.no_grad():
            prior.denoise(torch.zeros(1, *prior.shape), torch.ones(1))
    except (RuntimeError, ValueError, IndexError) as error:
        raise ConfigError(
            f"The network {type(prior.network).__name__} cannot denoise examples of the shape {tuple(prior.shape)}; fields need a UNet, vectors an MLPDenoiser."
        ) from error
