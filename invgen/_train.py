"""`invgen train`: a diffusion prior on an array of examples or on generated geology."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from invgen._config import ConfigError, build, check_output, load_yaml, resolve_class, split_spec
from invgen.priors.diffusion import DepthChannel, DiffusionPrior
from invgen.priors.training import ArrayData, Training

__all__ = ["train"]

_TOP = ("data", "network", "grid", "prior", "training", "validation", "seed", "device", "out", "progress")
_PRIOR = ("sigma_min", "sigma_max", "latent_steps")


def train(
    words: list[str],
    make: Callable[..., Any],
    parse: Callable[..., Any],
    take: Callable[..., Any],
    check_device: Callable[[str], str],
) -> str:
    """Train, save, and say what came out."""
    words = list(words)
    path = take(words, "--config")
    config = load_yaml(path) if path is not None else {}
    for name in ("training", "prior", "grid"):
        if config.get(name) is not None and not isinstance(config[name], dict):
            raise ConfigError(f"{name} must be a mapping of settings, got {config[name]!r}.")
    unknown = [k for k in config if k not in _TOP]
    if unknown:
        raise ConfigError(f"The configuration has the unknown key {unknown[0]!r}; known are {', '.join(_TOP)}.")
    parser = make(
        "train",
        "prior.safetensors",
        "--config FILE.yaml holds the same names, and network, grid and prior settings. Interrupt with Ctrl-C and call again with the same --training.checkpoint to continue.",
    )
    parser.add_argument(
        "--data", type=str | None, default=None, help=".npy (examples, channels, rows, columns), or the word geology"
    )
    parser.add_argument("--validation", type=float, default=0.05, help="share of an array held out for validation")
    parser.add_class_arguments(Training, "training", skip={"seed", "device"})
    parser.add_argument("--defaults_from_file", action="config", help="internal: the file's plain values")
    plain: dict[str, Any] = {
        k: config[k] for k in ("validation", "seed", "device", "out", "progress", "training") if k in config
    }
    if isinstance(config.get("data"), str):
        plain["data"] = config["data"]
    options = parse(parser, (["--defaults_from_file", json.dumps(plain)] if plain else []) + words)
    out = check_output(options.out, ".safetensors")
    if options.training.checkpoint:
        check_output(options.training.checkpoint)
    training = Training(**{**options.training.as_dict(), "seed": options.seed, "device": check_device(options.device)})
    if training.steps < 1 or training.batch_size < 1:
        raise ConfigError(
            f"Training needs steps >= 1 and batch_size >= 1, got {training.steps} and {training.batch_size}."
        )
    if not training.learning_rate > 0:
        raise ConfigError(f"The learning_rate must be positive, got {training.learning_rate}.")
    settings = config.get("prior") or {}
    wrong = [k for k in settings if k not in _PRIOR]
    if wrong:
        raise ConfigError(f"The prior has no setting {wrong[0]!r} to train with; known are {', '.join(_PRIOR)}.")
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in settings.values()):
        raise ConfigError(f"The settings of the prior are numbers, got {settings}.")
    data = options.data if options.data is not None else config.get("data")
    if data is None:
        raise ConfigError("train needs --data FILE.npy or --data geology (or data: in the configuration).")
    if not isinstance(data, (str, dict)):
        raise ConfigError(f"data is the name of a .npy file, the word geology or a GeologyCrops, got {data!r}.")
    torch.manual_seed(options.seed)
    network = config.get("network")
    if data == "geology" or isinstance(data, dict):
        prior, examples, held, told = _on_geology(data, network, settings, options.seed)
    else:
        prior, examples, held, told = _on_array(
            data, network, settings, config.get("grid"), options.validation, options.seed
        )
    _try(prior)
    report = training.fit(prior, examples, validation=held, progress=options.progress)
    card = {
        "data": told,
        "command": "invgen train" + (f" --config {path}" if path else ""),
        "seed": options.seed,
        "steps": report.steps,
        "training_seconds": round(report.seconds, 1),
        "validation": {k: round(v, 5) for k, v in report.validation.items()},
    }
    prior.to("cpu").save(out, card=card)
    figures = ", ".join(f"{k.replace('_at_', ' at sigma ')}: {v:.4f}" for k, v in report.validation.items())
    stopped = " (interrupted; call again with the same --training.checkpoint to continue)" if report.interrupted else ""
    return f"Wrote {out}: {report.steps} steps in {report.seconds:.0f} s{stopped}." + (
        f" Validation {figures}." if figures else ""
    )


def _network(spec: Any, fallback: str, **fixed: Any) -> Any:
    """A network of invgen.priors.networks, its channels decided by the data."""
    from invgen.priors import networks

    name, arguments = split_spec(spec if spec is not None else fallback, "network")
    if resolve_class(name).__name__ not in networks.__all__:
        raise ConfigError(f"{name} is not a network; known are {', '.join(networks.__all__)}.")
    taken = [k for k in arguments if k in fixed]
    if taken:
        raise ConfigError(f"The network's {taken[0]} follows from the data; leave it out.")
    return build({"class_path": name, "init_args": {**arguments, **fixed}}, what="network")


def _try(prior: Any) -> None:
    """One denoising of zeros: a network of the wrong kind is found now, and said in our words."""
    try:
        with torch.no_grad():
            prior.denoise(torch.zeros(1, *prior.shape), torch.ones(1))
    except (RuntimeError, ValueError, IndexError) as error:
        raise ConfigError(
            f"The network {type(prior.network).__name__} cannot denoise examples of the shape {tuple(prior.shape)}; fields need a UNet, vectors an MLPDenoiser."
        ) from error


def _on_geology(
    data: Any, network: Any, settings: dict[str, Any], seed: int
) -> tuple[Any, Any, dict[str, Tensor] | None, str]:
    from invgen.data.crops import GeologyCrops
    from invgen.grid import Grid
    from invgen.transforms import Affine

    spec = {"class_path": "GeologyCrops", "init_args": {"seed": seed}} if data == "geology" else data
    crops = build(spec, what="data")
    if not isinstance(crops, GeologyCrops):
        raise ConfigError(
            f"Training takes a .npy file, the word geology or a GeologyCrops, got {type(crops).__name__}."
        )
    held = GeologyCrops(min(16, crops.sections), crops.crop, crops.generator, seed=crops.seed, start=1_000_000).batch(
        0, 64, 1
    )
    grid = Grid(
        tuple(crops.crop),
        crops.generator.spacing,
        axes=("z", "x"),
        units=("m", "m"),
        channels=("log_impedance",),
        channel_units=("ln(kg/m2/s*1e-3)",),
    )
    module = _network(network, "UNet", channels=1, extra=2)
    prior = DiffusionPrior(
        module,
        grid.field_shape,
        transform=Affine(8.65, 0.3),
        grid=grid,
        **{"sigma_min": 0.005, **settings},
        mean_variance_of_field=0.7,
        depth=DepthChannel(crops.depth_scale),
    )
    return (
        prior,
        crops,
        held,
        f"invgen.data.GeologySections, seed {crops.seed}, {crops.sections} sections, crops {tuple(crops.crop)}",
    )


def _on_array(
    file: str, network: Any, settings: dict[str, Any], grid_spec: Any, share: float, seed: int
) -> tuple[Any, Any, dict[str, Tensor] | None, str]:
    from invgen.data.io import read_array
    from invgen.grid import Grid
    from invgen.transforms import Affine

    array = torch.from_numpy(read_array(file))
    if array.is_complex():
        raise ConfigError(f"{file} holds complex numbers; give their real and imaginary parts as two channels.")
    array = array.float()
    if array.ndim < 2 or array.shape[0] < 2:
        raise ConfigError(
            f"{file} must hold examples first: (examples, channels, rows, columns) or (examples, dim), got {tuple(array.shape)}."
        )
    if array.ndim == 3:
        raise ConfigError(
            f"{file} has the shape {tuple(array.shape)}; fields carry a channel axis, (examples, channels, rows, columns), one channel included."
        )
    if array.ndim > 4 or 0 in array.shape:
        raise ConfigError(
            f"{file} has the shape {tuple(array.shape)}; networks of invgen learn (examples, channels, rows, columns) or (examples, dim)."
        )
    if not bool(torch.isfinite(array).all()):
        raise ConfigError(
            f"{file} holds {int((~torch.isfinite(array)).sum())} NaN or infinite values; remove those examples."
        )
    if not 0 <= share < 1:
        raise ConfigError(f"validation is a share of the examples in [0, 1), got {share}.")
    order = torch.randperm(len(array), generator=torch.Generator().manual_seed(seed))
    count = int(share * len(array))
    held, kept = array[order[:count]], array[order[count:]]
    if len(kept) < 2:
        raise ConfigError(
            f"{len(array)} examples with validation={share} leave {len(kept)} to learn from; hold out fewer."
        )
    mean, sd = float(kept.mean()), float(kept.std())
    if not sd > 0:
        raise ConfigError(f"All values in {file} are equal; there is nothing to learn.")
    shape = tuple(array.shape[1:])
    fields = array.ndim > 2
    module = _network(network, "UNet" if fields else "MLPDenoiser", channels=shape[0])
    of_mean = float(((kept - mean) / sd).flatten(1).mean(1).var())
    # seven standard deviations of the largest mode, estimated by the field's mean (see DiffusionPrior.start_sigma)
    enough = max(80.0, 7.0 * math.sqrt(math.prod(shape) * of_mean))
    try:
        grid = Grid(**{k: tuple(v) for k, v in grid_spec.items()}) if grid_spec else None
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"The grid cannot be made: {error}.") from error
    prior = DiffusionPrior(
        module,
        shape,
        transform=Affine(mean, sd),
        grid=grid,
        **{"sigma_max": enough, **settings},
        mean_variance_of_field=of_mean,
    )
    from pathlib import Path

    return prior, ArrayData(kept), {"x": held} if count else None, f"{Path(file).name}, {len(kept)} examples"
