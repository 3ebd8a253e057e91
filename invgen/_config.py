"""From YAML and flags to objects: only classes of invgen, arguments checked against the classes' own signatures.

A class is written the way jsonargparse writes it, `{class_path: PostStack, init_args: {dt: 0.004}}`, or by its name
alone. Files are read by a loader without tags. jsonargparse only ever sees plain types (numbers, strings, lists, arrays
in files), so that no text of a configuration reaches an import; arguments that are objects themselves are built here.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "ConfigError",
    "build",
    "check_output",
    "class_parser",
    "flag_parameters",
    "is_array_file",
    "load_yaml",
    "plain_parameters",
    "resolve_class",
]

_LEAVES = (int, float, str, bool, complex, type(None), Path)
_CONTAINERS = (list, tuple, dict, set)


class ConfigError(ValueError):
    """Something in a configuration or on the command line that cannot be used; the message is one sentence."""


def load_yaml(path: str | Path) -> dict[str, Any]:
    """A mapping from a YAML file, tags refused.

    Raises:
        FileNotFoundError: no such file. ConfigError: not YAML, tags in it, not a mapping.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no configuration file {path}; check the path.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ConfigError(f"{path} cannot be read as YAML without tags: {reason}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of names to values, got {type(values).__name__}.")
    return values


def resolve_class(name: str, *, allow_import: bool = False) -> type:
    """The class a configuration names: `PostStack`, `invgen.operators.PostStack` or, if allowed, any importable one.

    Raises:
        ConfigError: an unknown name, a class outside invgen, something that is not a class.
    """
    import invgen

    if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(f"A class is named like PostStack or invgen.operators.PostStack, got {name!r}.")
    rooms = [importlib.import_module(f"invgen.{room}") for room in ("operators", "priors", "solvers", "data")]
    short = name.rsplit(".", 1)[-1] if name.startswith("invgen.") else name
    if "." not in short:
        networks = importlib.import_module("invgen.priors.networks")
        for room in (*rooms, invgen):
            if short in room._exports:
                found = getattr(room, short)
                break
        else:
            found = getattr(networks, short) if short in networks.__all__ else None
        if isinstance(found, type):
            return found
        if found is not None:
            raise ConfigError(f"{name} is not a class.")
        if not (allow_import and name.startswith("invgen.")):
            import difflib

            known = sorted({n for room in (*rooms, invgen) for n in room._exports} | set(networks.__all__))
            near = difflib.get_close_matches(short, known, 1)
            raise ConfigError(
                f"invgen has no class {name!r}{f'; did you mean {near[0]}?' if near else '; see `invgen solvers`, `invgen priors` and the documentation.'}"
            )
    if not allow_import:
        raise ConfigError(
            f"{name} is outside invgen and is not imported; pass --allow-import if you trust this configuration."
        )
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{name} cannot be imported ({error}).") from error
    if not isinstance(found, type):
        raise ConfigError(f"{name} is not a class.")
    return found


def _maker(name: str, allow_import: bool) -> Callable[..., Any]:
    """The class a configuration names, or one of its constructors: `GaussianPrior.stationary`."""
    owner, _, method = name.rpartition(".") if isinstance(name, str) else ("", "", "")
    if owner and not owner.startswith("invgen.") and "." not in owner and owner[:1].isupper():
        cls = resolve_class(owner)
        if not method.startswith("_") and isinstance(inspect.getattr_static(cls, method, None), classmethod):
            made: Callable[..., Any] = getattr(cls, method)
            return made
        raise ConfigError(f"{owner} has no constructor {method!r}.")
    return resolve_class(name, allow_import=allow_import)


def _hints(cls: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(inspect.getattr_static(cls, "__init__") if isinstance(cls, type) else cls)
    except (NameError, TypeError):  # names known to type checkers only
        return {}


def _is_plain(annotation: Any) -> bool:
    if annotation in _LEAVES or annotation is Ellipsis or annotation in _CONTAINERS:
        return True
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return True
    if origin in (typing.Union, types.UnionType) or (
        isinstance(origin, type)
        and origin.__module__ in ("builtins", "collections.abc")
        and "Callable" not in origin.__name__
        and origin is not type
    ):
        return all(_is_plain(a) for a in typing.get_args(annotation))
    return False


def _takes_none(annotation: Any) -> bool:
    return annotation in (Any, None, type(None)) or type(None) in typing.get_args(annotation)


def _is_array(annotation: Any) -> bool:
    import numpy as np
    import torch

    leaves = typing.get_args(annotation) or (annotation,)
    return torch.Tensor in leaves or np.ndarray in leaves


def _parameters(cls: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    skip = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {n: p for n, p in inspect.signature(cls).parameters.items() if p.kind not in skip}


def plain_parameters(cls: Callable[..., Any]) -> list[str]:
    """Arguments of a class that jsonargparse reads: numbers, strings, lists."""
    hints = _hints(cls)
    return [name for name in _parameters(cls) if _is_plain(hints.get(name, Any))]


def flag_parameters(cls: type) -> list[str]:
    """Arguments that a flag can set: plain ones, and arrays by the name of their file."""
    hints = _hints(cls)
    return [name for name in _parameters(cls) if _is_plain(hints.get(name, Any)) or _is_array(hints.get(name, Any))]


def is_array_file(name: str) -> bool:
    """Whether a text names a file that `read_array` reads, `FILE.npz:name` included."""
    suffixes = (".npy", ".npz", ".h5", ".hdf5", ".nc", ".zarr")
    return name.endswith(suffixes) or any(f"{s}:" in name for s in suffixes[1:])


def _array(value: Any, annotation: Any, what: str) -> Any:
    """A tensor from a list or a .npy file; numbers and names stay what they are where the signature takes them."""
    import torch

    leaves = typing.get_args(annotation)
    if value is None or (isinstance(value, (int, float)) and float in leaves):
        return value
    if isinstance(value, str):
        from invgen.data.io import read_array

        if is_array_file(value):
            value = read_array(value)
        elif str in leaves:
            return value
        else:
            raise ConfigError(
                f"The array {what} is a list of numbers or a file (.npy, .npz, .h5, .zarr), got {value!r}."
            )
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"The array {what} cannot be read: {sentence(error)}.") from error
    return (
        tensor
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool
        else tensor.to(torch.get_default_dtype())
    )


def class_parser(groups: Mapping[str, type], parser: Any = None) -> Any:
    """A jsonargparse parser with the plain arguments of each class under its group's name."""
    from jsonargparse import ArgumentParser

    parser = parser or ArgumentParser(exit_on_error=False, add_help=False)
    for group, cls in groups.items():
        plain = plain_parameters(cls)
        parser.add_class_arguments(cls, group, skip=set(_parameters(cls)) - set(plain), fail_untyped=False)
    return parser


def sentence(error: BaseException) -> str:
    """The message of an error on one line, jsonargparse's words about types in a user's."""
    import re

    text = " ".join(str(error).split())
    found = re.match(
        r'Parser key "(?P<key>[^"]+)": (?P<why>.*?)\.? (?:Got|Given) value(?: type: .*?Given value)?: (?P<value>.*)$',
        text,
    )
    if found is None:
        found = re.match(r'Parser key "(?P<key>[^"]+)": Not of type NonNegativeInt: .*(?P<value>\'.*\'|-\d+)', text)
        return f"{found['key']} must be a whole number from 0, got {found['value']}." if found is not None else text
    kinds = re.findall(r"\[(list\[.*?\]|<class '\w+'>)|Expected an? <class '(\w+)'>", found["why"])
    wanted = next((re.sub(r"<class '(.*)'>", r"\1", name) for pair in kinds for name in pair if name), None)
    expected = f"a value of type {wanted} is expected" if wanted else f"{found['why'][0].lower()}{found['why'][1:]}"
    return f"{found['key']} cannot be {found['value']!r}: {expected}."


def build(
    spec: Any,
    *,
    what: str,
    allow_import: bool = False,
    extra: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Any:
    """The object a specification describes.

    Args:
        spec: a class name (or one of its constructors, `GaussianPrior.stationary`), or `{class_path: …, init_args: {…}}`.
        what: how errors call it.
        allow_import: whether classes outside invgen may be imported.
        extra: arguments that are objects already.
        defaults: objects for arguments that the specification leaves out, for those that the class takes.

    Raises:
        ConfigError: unknown class or argument, a value of the wrong type.
    """
    name, arguments = split_spec(spec, what)
    cls = _maker(name, allow_import)
    known, plain, hints = _parameters(cls), plain_parameters(cls), _hints(cls)
    arguments = {**arguments}
    objects = dict(extra or {})
    objects |= {k: v for k, v in (defaults or {}).items() if k in known and k not in arguments and k not in objects}
    for key in list(arguments):
        if key not in known:
            raise ConfigError(f"{cls.__qualname__} has no argument {key!r}; it takes {', '.join(known) or 'none'}.")
        annotation = hints.get(key, Any)
        # an annotated default tells jsonargparse that None will do
        if arguments[key] is None and known[key].default is not None and not _takes_none(annotation):
            raise ConfigError(f"{what}.{key} needs a value, got none; leave it out for the default.")
        if key not in plain:
            objects[key] = _nested(arguments.pop(key), hints.get(key, Any), f"{what}.{key}", allow_import)
    missing = [n for n, p in known.items() if p.default is p.empty and n not in arguments and n not in objects]
    if missing:
        raise ConfigError(
            f"{cls.__qualname__} needs the argument{'s' if len(missing) > 1 else ''} {', '.join(missing)}; give {'them' if len(missing) > 1 else 'it'} as {what}.{missing[0]}."
        )
    group = what.rsplit(".", 1)[-1]
    required = {n for n in plain if n in objects}
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False, add_help=False)
    skip: set[str | int] = {*(set(known) - set(plain)), *required}  # given as objects already: nothing to parse
    if isinstance(cls, type):
        parser.add_class_arguments(cls, group, skip=skip, fail_untyped=False)
    else:
        constructor: Any = cls  # `_maker` gives classes and class methods
        parser.add_method_arguments(constructor.__self__, constructor.__name__, group, skip=skip, fail_untyped=False)

    try:
        parsed = parser.parse_object({group: arguments}) if arguments or set(plain) - required else None
    except (ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(f"An argument of {cls.__qualname__} cannot be used: {sentence(error)}") from error
    values = {k: getattr(parsed, group)[k] for k in arguments} if parsed is not None else {}
    return cls(**values, **objects)


def split_spec(spec: Any, what: str) -> tuple[str, dict[str, Any]]:
    """Class name and arguments of a specification."""
    if isinstance(spec, str):
        return spec, {}
    if isinstance(spec, Mapping) and isinstance(spec.get("class_path"), str):
        strange = set(spec) - {"class_path", "init_args"}
        if strange:
            raise ConfigError(f"The {what} has the key {sorted(strange)[0]!r}; arguments belong under init_args.")
        arguments = spec.get("init_args") or {}
        if isinstance(arguments, Mapping) and all(isinstance(k, str) for k in arguments):
            return spec["class_path"], dict(arguments)
    raise ConfigError(f"The {what} must be a class name or a mapping with class_path and init_args, got {spec!r}.")


def _nested(value: Any, annotation: Any, what: str, allow_import: bool) -> Any:
    if isinstance(value, Mapping) and "class_path" in value:
        return build(value, what=what, allow_import=allow_import)
    if _is_array(annotation) and not isinstance(value, Mapping):
        return _array(value, annotation, what)
    if isinstance(value, Mapping):
        from invgen.grid import Grid

        leaves = typing.get_args(annotation) or (annotation,)
        if Grid in leaves:
            known = [f.name for f in dataclasses.fields(Grid)]
            wrong = [k for k in value if k not in known]
            if wrong:
                raise ConfigError(f"A Grid has no argument {wrong[0]!r}; it takes {', '.join(known)}.")
            try:
                return Grid(**{k: tuple(v) for k, v in value.items()})
            except TypeError as error:
                raise ConfigError(f"The grid {what} cannot be made: {sentence(error)}.") from error
    if isinstance(value, list) and value and all(isinstance(v, Mapping) and "class_path" in v for v in value):
        return [build(v, what=what, allow_import=allow_import) for v in value]
    if isinstance(value, (int, float, bool, type(None), list)):
        return value
    if isinstance(value, str) and annotation in (Any, inspect.Parameter.empty):
        return value
    raise ConfigError(
        f"The argument {what} is an object: write it as a mapping with class_path and init_args, got {value!r}."
    )


def check_output(path: str | Path, *suffixes: str) -> Path:
    """Raise now, not after an hour of sampling, when a file cannot be written or has another ending than `suffixes`."""
    import os

    path = Path(path)
    if suffixes and path.suffix not in suffixes:
        raise ConfigError(f"The result is written as {' or '.join(suffixes)}, got the name {str(path)!r}; end it so.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder, a file is expected")
        if not os.access(path.parent, os.W_OK | os.X_OK) or (path.exists() and not os.access(path, os.W_OK)):
            raise PermissionError(None, "permission denied")
    except (FileExistsError, NotADirectoryError) as error:
        raise OSError(f"Cannot write {path}: a folder in it is a file; choose another folder.") from error
    except OSError as error:
        raise OSError(
            f"Cannot write {path}: {error.strerror or error}; choose a folder that can be written to."
        ) from error
    return path
