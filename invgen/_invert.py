"""`invgen invert`: a problem and a solver from YAML and flags."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from invgen._config import ConfigError, build, class_parser, flag_parameters, load_yaml, resolve_class, split_spec

if TYPE_CHECKING:
    from invgen.data.segy import Section
    from invgen.problem import InverseProblem

__all__ = ["Inversion", "invert_options", "invert_problem"]

_GROUPS = ("operator", "noise", "solver")
_DEFAULTS = {
    "num_samples": 19,
    "prior_shape": None,
    "checkpoint": None,
    "report": None,
    "data": None,
    "mask": None,
    "prior": None,
    "segy": None,
    "window": None,
    "dtype": "float32",
}
_SHAPED = ("data", "prior", "window")  # names of files, or mappings, which no flag can say
_KEYS = (*_GROUPS, *_DEFAULTS, "terms", "channels", "seed", "device", "out", "progress")


class Inversion(NamedTuple):
    """What `invert` runs: the problem, the solver, the section the results go out like (or None), what is to be said."""

    problem: InverseProblem
    solver: Any
    section: Section | None
    remarks: tuple[str, ...]


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
        "--data",
        type=str | None,
        default=None,
        help="SEG-Y, or .npy, .npz, HDF5, zarr: data_shape or (n_obs, *data_shape)",
    )
    parser.add_argument("--mask", type=str | None, default=None, help="file of booleans, true where measured")
    parser.add_argument(
        "--window", type=str | None, default=None, help='part of the section, e.g. "{t: [0.4, 1.2], x: [0, 900]}"'
    )
    parser.add_argument(
        "--segy", type=str | None, default=None, help="folder for mean, sd and samples with the input's SEG-Y headers"
    )
    parser.add_argument("--dtype", type=Literal["float32", "float64"], default="float32", help="of the samples")
    parser.add_argument("--prior", type=str | None, default=None, help="pretrained name, checkpoint, or class")
    parser.add_argument(
        "--prior_shape", type=list[int] | None, default=None, help="spatial shape the prior is moved to, e.g. [64,64]"
    )
    parser.add_argument("--num_samples", type=int, default=19, help="samples for each observation")
    parser.add_argument("--checkpoint", type=str | None, default=None, help="file to resume an interrupted run from")
    parser.add_argument("--report", type=str | None, default=None, help="also write this HTML page, data fit included")
    specs: dict[str, Any] = {k: config[k] for k in ("terms", "channels") if k in config}
    classes: dict[str, type] = {}
    for group in _GROUPS:
        named = take(words, f"--{group}")
        spec = config.get(group)
        if named is not None:
            spec = _number(named) if group == "noise" else named
        if group == "noise":
            from invgen._invert_terms import as_noise

            spec = as_noise(spec)
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
    plain = {
        k: v
        for k, v in config.items()
        if k in (*_DEFAULTS, "seed", "device", "out", "progress") and not (k in _SHAPED and isinstance(v, Mapping))
    }
    parser.add_argument("--defaults_from_file", action="config", help="internal: the file's plain values")
    if "--help" in words or "-h" in words:
        class_parser(classes, parser)
    options = parse(parser, (["--defaults_from_file", json.dumps(plain)] if plain else []) + words)
    for name in _SHAPED:
        given = getattr(options, name)
        specs[name] = given if given is not None else config.get(name)
    if isinstance(specs["window"], str):
        specs["window"] = _yaml(specs["window"], "--window")
    for group, changes in overrides.items():
        name, arguments = split_spec(specs[group], group)
        specs[group] = {"class_path": name, "init_args": {**arguments, **changes}}
    if options.num_samples < 1:
        raise ConfigError(f"num_samples must be at least 1, got {options.num_samples}.")
    return options, specs, allow


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _yaml(text: str, flag: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"The value {text!r} of {flag} cannot be read.") from error


def _overrides(words: list[str], classes: Mapping[str, type]) -> dict[str, dict[str, Any]]:
    """Take `--group.name value` flags out of the words."""
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
            out.setdefault(group, {})[name] = _yaml(text, flag)
            continue
        i += 1
    return out


def invert_problem(
    specs: Mapping[str, Any], options: Any, allow_import: bool, make_prior: Callable[..., Any]
) -> Inversion:
    """The inverse problem and the solver.

    The first file that knows its axes is the section of everything: prior and operators are put on its grid where they
    do not state another one.
    """
    from invgen._invert_data import find_frame
    from invgen._invert_prior import channels_of, place_prior
    from invgen._invert_terms import check_spec, make_term, source_of
    from invgen.contracts import Solver
    from invgen.problem import InverseProblem

    for name in ("prior", "solver"):
        if specs.get(name) is None:
            raise ConfigError(f"invert needs --{name} (or {name}: in the configuration).")
    solver = build(specs["solver"], what="solver", allow_import=allow_import)
    if not isinstance(solver, Solver):
        raise ConfigError(f"{type(solver).__name__} is not a solver; see `invgen solvers`.")
    more = specs.get("terms", [])
    if not isinstance(more, list):
        raise ConfigError("terms must be a list of mappings with data, operator and noise.")
    first = {"data": specs["data"], "mask": options.mask} | {k: specs.get(k) for k in ("operator", "noise")}
    wanted = [*([first] if specs["data"] is not None else []), *more]
    if not wanted:
        raise ConfigError(
            "invert needs --data FILE, --operator NAME and --noise SIGMA (or terms: in the configuration)."
        )
    for spec in wanted:
        check_spec(spec)
    sources = [source_of(spec) for spec in wanted]
    frame = find_frame([s for s in sources if s is not None], specs.get("window"))
    if options.segy is not None and (frame is None or frame.section is None):
        raise ConfigError("segy writes results with the headers of SEG-Y data, and there are none; leave it out.")
    channels = None if specs.get("channels") is None else channels_of(specs["channels"])
    prior, grid, remarks = place_prior(specs["prior"], options.prior_shape, frame, channels, allow_import, make_prior)
    said = [] if frame is None else [f"{frame.name}: {frame}"]
    terms = []
    for spec, source in zip(wanted, sources, strict=True):
        term, notes = make_term(spec, source, frame, grid, allow_import)
        terms.append(term)
        said += notes
    problem = InverseProblem(terms=terms, prior=prior)
    section = frame.section if frame is not None and options.segy is not None else None
    if section is not None and tuple(problem.model_shape[1:]) != section.grid.shape:
        raise ConfigError(
            f"segy needs models on the section {section.grid.shape}, they have the shape {problem.model_shape}; leave it out."
        )
    return Inversion(problem, solver, section, (*said, *remarks))
