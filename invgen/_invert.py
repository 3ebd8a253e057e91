"""`invgen invert`: a problem and a solver from YAML and flags."""

from __future__ import annotations

import functools
import json
import operator as arithmetic
from collections.abc import Callable, Mapping
from typing import Any

from invgen._config import ConfigError, build, class_parser, flag_parameters, load_yaml, resolve_class, split_spec

__all__ = ["invert_options", "invert_problem"]

_GROUPS = ("operator", "noise", "solver")
_DEFAULTS = {
    "num_samples": 19,
    "prior_shape": None,
    "checkpoint": None,
    "report": None,
    "data": None,
    "mask": None,
    "prior": None,
}
_KEYS = (*_GROUPS, *_DEFAULTS, "terms", "seed", "device", "out", "progress")


def invert_options(
    words: list[str], make: Callable[..., Any], parse: Callable[..., Any], take: Callable[..., Any]
) -> tuple[Any, dict[str, Any], bool]:
    """Options, specifications of operator, noise, solver, prior and terms, and whether imports are allowed.

    Two looks at the command line: the first finds the classes named, the second parses the arguments of exactly those
    classes by their own signatures. Flags win over the file.
    """
    allow = "--allow-import" in words
    words[:] = [w for w in words if w != "--allow-import"]
    config_path = take(words, "--config")
    config = load_yaml(config_path) if config_path is not None else {}
    unknown = [k for k in config if k not in _KEYS]
    if unknown:
        raise ConfigError(f"The configuration has the unknown key {unknown[0]!r}; known are {', '.join(_KEYS)}.")
    parser = make(
        "invert",
        "posterior.nc",
        "--config FILE.yaml holds the same names as the flags, and `terms` for several data sets; --operator, --noise, --solver NAME choose classes of invgen, "
        "whose arguments follow as --operator.NAME VALUE; --allow-import permits classes outside invgen.",
    )
    parser.add_argument(
        "--data", type=str | None, default=None, help=".npy or .npz file, data_shape or (n_obs, *data_shape)"
    )
    parser.add_argument("--mask", type=str | None, default=None, help=".npy of booleans, true where measured")
    parser.add_argument("--prior", type=str | None, default=None, help="pretrained name, checkpoint, or class")
    parser.add_argument(
        "--prior_shape", type=list[int] | None, default=None, help="spatial shape the prior is moved to, e.g. [64,64]"
    )
    parser.add_argument("--num_samples", type=int, default=19, help="samples for each observation")
    parser.add_argument("--checkpoint", type=str | None, default=None, help="file to resume an interrupted run from")
    parser.add_argument("--report", type=str | None, default=None, help="also write this HTML page, data fit included")
    specs: dict[str, Any] = {k: config[k] for k in ("terms",) if k in config}
    classes: dict[str, type] = {}
    for group in _GROUPS:
        named = take(words, f"--{group}")
        spec = config.get(group)
        if named is not None:
            spec = _number(named) if group == "noise" else named
        if group == "noise":
            spec = _noise(spec)
        if spec is None:
            continue
        specs[group] = spec
        if not isinstance(spec, list):
            classes[group] = resolve_class(split_spec(spec, group)[0], allow_import=allow)
    for word in words:
        head = word.split("=")[0].removeprefix("--").split(".")
        if word.startswith("--") and len(head) == 2 and head[0] in _GROUPS:
            group, name = head
            if group not in classes:
                raise ConfigError(f"{word} was given without --{group} NAME; say which class it is.")
            if name not in flag_parameters(classes[group]):
                raise ConfigError(
                    f"{classes[group].__name__} has no argument {name!r} that a flag can set; flags set {', '.join(flag_parameters(classes[group])) or 'none'}."
                )
    overrides = _overrides(words, classes)
    plain = {k: v for k, v in config.items() if k in (*_DEFAULTS, "seed", "device", "out", "progress") and k != "prior"}
    if isinstance(config.get("prior"), str):
        plain["prior"] = config["prior"]
    parser.add_argument("--defaults_from_file", action="config", help="internal: the file's plain values")
    if "--help" in words or "-h" in words:
        class_parser(classes, parser)
    options = parse(parser, (["--defaults_from_file", json.dumps(plain)] if plain else []) + words)
    specs["prior"] = options.prior if options.prior is not None else config.get("prior")
    for group, changes in overrides.items():
        name, arguments = split_spec(specs[group], group)
        specs[group] = {"class_path": name, "init_args": {**arguments, **changes}}
    if options.num_samples < 1:
        raise ConfigError(f"num_samples must be at least 1, got {options.num_samples}.")
    return options, specs, allow


def _noise(spec: Any) -> Any:
    """A number, or a file with one standard deviation a datum, means Gaussian noise."""
    file = isinstance(spec, str) and (spec.endswith((".npy", ".npz")) or ".npz:" in spec)
    if file or (isinstance(spec, (int, float)) and not isinstance(spec, bool)):
        return {"class_path": "GaussianNoise", "init_args": {"sigma": spec}}
    return spec


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _overrides(words: list[str], classes: Mapping[str, type]) -> dict[str, dict[str, Any]]:
    """Take `--group.name value` flags out of the words."""
    import yaml

    out: dict[str, dict[str, Any]] = {}
    i = 0
    while i < len(words):
        flag, equals, value = words[i].partition("=")
        group, dot, name = flag.removeprefix("--").partition(".")
        if flag.startswith("--") and dot and group in classes:
            if not equals and i + 1 == len(words):
                raise ConfigError(f"{flag} needs a value.")
            text = value if equals else words[i + 1]
            del words[i : i + (1 if equals else 2)]
            try:
                out.setdefault(group, {})[name] = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ConfigError(f"The value {text!r} of {flag} cannot be read.") from error
            continue
        i += 1
    return out


def invert_problem(
    specs: Mapping[str, Any], options: Any, allow_import: bool, make_prior: Callable[..., Any]
) -> tuple[Any, Any]:
    """The inverse problem and the solver."""
    from invgen.problem import InverseProblem

    for name in ("prior", "solver"):
        if specs.get(name) is None:
            raise ConfigError(f"invert needs --{name} (or {name}: in the configuration).")
    solver = build(specs["solver"], what="solver", allow_import=allow_import)
    from invgen.contracts import Solver

    if not isinstance(solver, Solver):
        raise ConfigError(f"{type(solver).__name__} is not a solver; see `invgen solvers`.")
    terms = []
    if options.data is not None:
        terms.append(
            _term(
                {
                    "data": options.data,
                    "operator": specs.get("operator"),
                    "noise": specs.get("noise"),
                    "mask": options.mask,
                },
                allow_import,
            )
        )
    more = specs.get("terms", [])
    if not isinstance(more, list):
        raise ConfigError("terms must be a list of mappings with data, operator and noise.")
    terms += [_term(t, allow_import) for t in more]
    if not terms:
        raise ConfigError(
            "invert needs --data FILE, --operator NAME and --noise SIGMA (or terms: in the configuration)."
        )
    return InverseProblem(terms=terms, prior=make_prior(specs["prior"], options.prior_shape, allow_import)), solver


def _term(spec: Any, allow_import: bool) -> Any:
    import torch

    from invgen.contracts import Operator
    from invgen.data.io import read_array
    from invgen.problem import Term

    known = ("data", "operator", "noise", "mask", "name")
    if not isinstance(spec, Mapping) or any(k not in known for k in spec):
        raise ConfigError(f"A term is a mapping with the keys {', '.join(known)}, got {spec!r}.")
    for name in ("data", "operator", "noise"):
        if spec.get(name) is None:
            raise ConfigError(f"A data set needs {name}; give it as --{name} or in the configuration.")
    parts = spec["operator"] if isinstance(spec["operator"], list) else [spec["operator"]]
    if not parts:
        raise ConfigError("The list of operators is empty; name at least one.")
    physics = functools.reduce(arithmetic.matmul, [build(p, what="operator", allow_import=allow_import) for p in parts])
    if not isinstance(physics, Operator):
        raise ConfigError(f"{type(physics).__name__} is not an operator.")
    noise = _noise(spec["noise"])
    data = torch.from_numpy(read_array(spec["data"]))
    data = data if data.is_floating_point() or data.is_complex() else data.float()
    mask = None
    if spec.get("mask") is not None:
        mask = torch.from_numpy(read_array(spec["mask"]))
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ConfigError(f"The mask {spec['mask']} holds other values than 0 and 1; 1 (true) means measured.")
        mask = mask.bool()
    return Term(
        data, physics, build(noise, what="noise", allow_import=allow_import), mask, str(spec.get("name", "data"))
    )
