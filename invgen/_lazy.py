"""Rooms export what their files declare in `__all__`, imported on first use.

The declarations are read from the source without importing it, so that `import invgen` stays cheap and a new file in a
room is exported by being there.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["lazy_room"]


def lazy_room(package: str, file: str) -> tuple[dict[str, str], Callable[[str], Any], Callable[[], list[str]]]:
    """`(exports, __getattr__, __dir__)` for the `__init__` of a room.

    Args:
        package: `__name__` of the room. file: its `__file__`.

    Returns:
        exports: public name -> module name.
    """
    if package.split(".")[0] != "invgen":  # reached through a link at the repository's root
        raise ImportError(
            f"The folder {package} at the root is a link for readers; import invgen.{package} instead of {package}."
        )
    exports: dict[str, str] = {}
    for path in sorted(Path(file).parent.glob("*.py")):
        if path.name.startswith("_"):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            targets = (
                node.targets
                if isinstance(node, ast.Assign)
                else [node.target]
                if isinstance(node, ast.AnnAssign)
                else []
            )
            if (
                any(isinstance(t, ast.Name) and t.id == "__all__" for t in targets)
                and getattr(node, "value", None) is not None
            ):
                for name in ast.literal_eval(node.value):  # type: ignore[union-attr, attr-defined]
                    exports[name] = f"{package}.{path.stem}"

    def getattribute(name: str) -> Any:
        if name in exports:
            return getattr(importlib.import_module(exports[name]), name)
        try:
            return importlib.import_module(f"{package}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{package}.{name}":
                raise
            raise AttributeError(
                f"module {package!r} has no attribute {name!r}; it exports {', '.join(sorted(exports))}."
            ) from None

    return exports, getattribute, lambda: sorted(exports)
