"""What `invgen train` trains: an untrained prior from a class, its settings, and what the examples say about it."""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from invgen._config import ConfigError, build, resolve_class, sentence, split_spec
from invgen._train_material import Material
from invgen.priors.diffusion import DiffusionPrior

_FLAT = ("sigma_min", "sigma_max", "latent_steps")  # settings of a prior without a class


def make_prior(spec: Any, network: Any, transform: str | None, given: Material) -> Any:
    """The untrained prior a configuration describes.

    Args:
        spec: None or a mapping of sigma_min, sigma_max, latent_steps for a DiffusionPrior; or a class with its arguments,
            one of its constructors included ("VAE.convolutional", "WGAN.stationary", "Consistency.of").
        network: of the priors that take one; chosen by the data when None.
        transform: "standard" (mean and standard deviation of the examples), "range" (onto [−1, 1]) or "none".

    Raises:
        ConfigError: an unknown class, constructor or argument.
    """
    if isinstance(spec, str) and spec.isidentifier() and not spec[0].isupper():
        raise ConfigError(f"prior must be a mapping of settings or the name of a class, got {spec!r}.")
    cls: type
    make: Callable[..., Any]
    if spec is None or (isinstance(spec, Mapping) and "class_path" not in spec):
        cls, make, label, arguments = DiffusionPrior, DiffusionPrior, "The prior", dict(spec or {})
        wrong = [k for k in arguments if k not in _FLAT]
        if wrong:
            raise ConfigError(
                f"The prior has no setting {wrong[0]!r} to train with; known are {', '.join(_FLAT)}, or name a class as class_path with init_args."
            )
        if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in arguments.values()):
            raise ConfigError(f"The settings of the prior are numbers, got {arguments}.")
    elif isinstance(spec, (str, Mapping)):
        label, arguments = split_spec(spec, "prior")
        cls, make = _constructor(label)
    else:
        raise ConfigError(f"prior must be a mapping of settings or the name of a class, got {spec!r}.")
    if "depth" in given.offers and not issubclass(cls, DiffusionPrior):
        raise ConfigError(f"Geology with its depth channels trains a DiffusionPrior, not a {cls.__name__}.")
    known, hints = _known(cls, make)
    offers = _offers(given, transform, arguments, known)
    if "network" in known and "teacher" not in arguments:
        fallback = "UNet" if len(given.offers["shape"]) > 1 else "MLPDenoiser"
        offers["network"] = _network(network, fallback, **given.network)
    elif network is not None:
        raise ConfigError(f"{label} makes its networks by its own arguments; leave network out.")
    values = {}
    for key, value in arguments.items():
        if key not in known:
            own = [k for k in known if k not in given.offers and k not in ("network", "transform")]
            raise ConfigError(f"{label} has no argument {key!r}; it takes {', '.join(own)}.")
        values[key] = _value(value, hints.get(key, Any), f"prior.{key}")
    missing = [k for k, p in known.items() if p.default is p.empty and k not in values and k not in offers]
    if missing:
        others = [f"{cls.__name__}.{name}" for name in ("stationary", "convolutional") if hasattr(cls, name)]
        advice = f"build it by {' or '.join(others)}" if others and make is cls else f"give it as prior.{missing[0]}"
        raise ConfigError(
            f"{label} needs the argument{'s' if len(missing) > 1 else ''} {', '.join(missing)}; {advice}."
        )
    try:
        return make(**{**offers, **values})
    except (TypeError, RuntimeError, IndexError) as error:
        raise ConfigError(
            f"{label} cannot be built for examples of the shape {given.offers['shape']}: {sentence(error)}"
        ) from error


def _constructor(label: str) -> tuple[type, Callable[..., Any]]:
    """A class of invgen that can be trained, and the way it is made."""
    head, _, method = label.rpartition(".")
    named = method[:1].islower() and head
    cls = resolve_class(head if named else label)
    if not (hasattr(cls, "training_loss") or hasattr(cls, "parameter_groups")):
        raise ConfigError(f"{cls.__name__} is not trained by steps; see `invgen priors` for the learned ones.")
    if not named:
        return cls, cls
    make = getattr(cls, method, None)
    ways = [
        name
        for name in dir(cls)
        if inspect.ismethod(found := getattr(cls, name))
        and next(iter(inspect.signature(found).parameters), "") in ("shape", "dim", "teacher")
        and not name.startswith("_")
    ]
    if method not in ways or make is None:
        raise ConfigError(f"{cls.__name__} has no constructor {method!r}; known are {', '.join(ways) or 'none'}.")
    return cls, make


def _known(cls: type, make: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], dict[str, Any]]:
    """Arguments of a constructor; what it hands on to the class (`**options`) included, as optional ones."""
    parameters = dict(inspect.signature(make).parameters)
    start = cls.__init__  # type: ignore[misc]
    hints = typing.get_type_hints(start)
    if make is not cls:
        hints |= typing.get_type_hints(make)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        handed = {k: p for k, p in inspect.signature(cls).parameters.items() if p.kind is p.KEYWORD_ONLY}
        parameters = {**{k: p.replace(default=None) for k, p in handed.items()}, **parameters}
    return {k: p for k, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}, hints


def _offers(
    given: Material, transform: str | None, arguments: Mapping[str, Any], known: Mapping[str, Any]
) -> dict[str, Any]:
    """What the data tell a prior, as far as it asks."""
    from invgen.transforms import Affine

    offers = dict(given.offers)
    shape, x = offers["shape"], given.look
    if x is None:
        if transform is not None:
            raise ConfigError("Geology has its own transform; leave transform out.")
    else:
        if transform is None:  # probabilities of values: the values must stay what they are
            kept = {arguments.get("likelihood"), arguments.get("loss")} & {"bernoulli", "categorical"}
            transform = "none" if kept else "standard"
        if transform not in ("standard", "range", "none"):
            raise ConfigError(f"transform is one of standard, range, none, got {transform!r}.")
        shift, scale = _affine(x, transform)
        if transform != "none":
            offers["transform"] = Affine(shift, scale)
        wide = (-1, *(1,) * (x.ndim - 2))
        u = (x - (shift.reshape(wide).float() if shift.ndim else float(shift))) / (
            scale.reshape(wide).float() if scale.ndim else float(scale)
        )
        of_mean = float(u.flatten(1).mean(1).var())
        offers["mean_variance_of_field"] = of_mean
        offers["sigma_data"] = 1.0 if transform == "standard" else float(u.std())
        # seven standard deviations of the largest mode, estimated by the field's mean (see DiffusionPrior.start_sigma)
        offers["sigma_max"] = max(80.0 * offers["sigma_data"], 7.0 * math.sqrt(math.prod(shape) * of_mean))
    if len(shape) == 1:
        offers["dim"] = shape[0]
    if "teacher" in arguments:  # its coordinates are the teacher's
        return {}
    if "dim" in known and len(shape) > 1:
        raise ConfigError(f"This prior learns vectors, (examples, dim), but the examples have the shape {shape}.")
    return {k: v for k, v in offers.items() if k in known}


def _affine(x: Tensor, transform: str) -> tuple[Tensor, Tensor]:
    """Shift and scale, one a channel where there are several."""
    per = x.transpose(0, 1).flatten(1) if x.ndim > 2 and x.shape[1] > 1 else x.reshape(1, -1)
    if transform == "none":
        return torch.zeros(()), torch.ones(())
    if transform == "range":
        low, high = per.amin(1).double(), per.amax(1).double()
        shift, scale = (low + high) / 2, (high - low) / 2
    else:
        shift, scale = per.mean(1).double(), per.std(1).double()
    if not bool((scale > 0).all()):
        raise ConfigError(
            f"Channel {int((scale <= 0).nonzero()[0])} has one value everywhere; there is nothing to learn in it."
        )
    return (shift, scale) if len(shift) > 1 else (shift[0], scale[0])


def _value(value: Any, annotation: Any, what: str) -> Any:
    """A plain value as its argument expects it, a nested class, or the teacher of a student."""
    if what == "prior.teacher":
        from invgen.priors.loading import load_prior

        if not isinstance(value, str):
            raise ConfigError(f"The teacher is the .safetensors file of a prior, got {value!r}.")
        return load_prior(value)
    if isinstance(value, Mapping) and "class_path" in value:
        return build(value, what=what)
    if isinstance(value, list):
        return tuple(_value(v, Any, what) for v in value)
    for kind, names in ((bool, "true or false"), (int, "a whole number"), (float, "a number"), (str, "a word")):
        takes = (int, float) if kind is float else kind
        if annotation is kind and (not isinstance(value, takes) or (isinstance(value, bool) and kind is not bool)):
            raise ConfigError(f"{what} cannot be {value!r}: {names} is expected.")
    return value


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
