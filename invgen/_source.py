"""What a function does, as a hash: its source, and that of everything of its own package that it calls."""

from __future__ import annotations

import functools
import hashlib
import inspect
import types
from typing import Any

import numpy as np
import torch

from invgen._store import absorb


def source_hash(function: Any) -> str:
    """SHA-256 of a callable's source, 16 hexadecimal digits.

    Followed: functions and classes of the same top-level package that the code names, values of globals and closures,
    default arguments, attributes of callable objects, the arguments of `functools.partial`. Of other packages the name
    and the version count. Compiled code counts by name only: what changes inside it is not seen.
    """
    digest = hashlib.sha256()
    _follow(digest, function, set(), _package(function))
    return digest.hexdigest()[:16]


def _package(value: Any) -> str:
    return str(getattr(value, "__module__", None) or type(value).__module__).split(".")[0]


def _follow(digest: Any, value: Any, seen: set[int], home: str) -> None:
    if isinstance(value, functools.partial):
        for part in (value.func, *value.args, *(v for kv in sorted(value.keywords.items()) for v in kv)):
            _follow(digest, part, seen, home)
    elif isinstance(value, types.ModuleType):
        digest.update(f"{value.__name__} {getattr(value, '__version__', '')}".encode())
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, dict):
        for k in sorted(value, key=repr):
            digest.update(repr(k).encode())
            _follow(digest, value[k], seen, home)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for part in sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value:
            _follow(digest, part, seen, home)
    elif isinstance(value, (int, float, complex, str, bytes, type(None), torch.Tensor)):
        absorb(digest, value.decode("latin1") if isinstance(value, bytes) else value)
    elif id(value) not in seen:
        seen.add(id(value))
        if isinstance(value, types.MethodType):
            _follow(digest, value.__self__, seen, home)
            _follow(digest, value.__func__, seen, home)
        elif isinstance(value, (types.FunctionType, type)):
            _code(digest, value, seen, home)
        else:
            _follow(digest, type(value), seen, home)
            if isinstance(value, torch.nn.Module):
                _follow(digest, dict(value.state_dict()), seen, home)
            plain = {k: v for k, v in getattr(value, "__dict__", {}).items() if not k.startswith("_")}
            _follow(digest, plain, seen, home)


def _code(digest: Any, value: Any, seen: set[int], home: str) -> None:
    digest.update(f"{value.__module__}.{value.__qualname__}".encode())
    if _package(value) != home:
        return
    try:
        digest.update(inspect.getsource(value).encode())
    except (OSError, TypeError):  # typed at a prompt, or compiled
        if isinstance(value, types.FunctionType):
            digest.update(
                value.__code__.co_code + repr([c for c in value.__code__.co_consts if not _is_code(c)]).encode()
            )
    if isinstance(value, type):
        functions: list[Any] = [v for v in vars(value).values() if isinstance(v, types.FunctionType)]
        functions += [v.__func__ for v in vars(value).values() if isinstance(v, (staticmethod, classmethod))]
    else:
        functions = [value]
        for part in (value.__defaults__, value.__kwdefaults__):
            _follow(digest, part, seen, home)
        for cell in value.__closure__ or ():
            try:
                _follow(digest, cell.cell_contents, seen, home)
            except ValueError:  # not filled yet: the function itself
                continue
    for function in functions:
        for name in sorted(_names(function.__code__)):
            if name in function.__globals__:
                digest.update(name.encode())
                _follow(digest, function.__globals__[name], seen, home)


def _is_code(value: Any) -> bool:
    return isinstance(value, types.CodeType)


def _names(code: types.CodeType) -> set[str]:
    """Every name a function's code looks up, its inner functions included."""
    return set(code.co_names).union(*(_names(c) for c in code.co_consts if _is_code(c)))
