"""Solvers: how the posterior is computed."""

from invgen._lazy import lazy_room

_exports, __getattr__, __dir__ = lazy_room(__name__, __file__)
__all__ = sorted([*_exports, "solvers_for"])


def solvers_for(prior: object) -> list[str]:
    """Names of the solvers whose needs this prior meets."""
    import importlib

    from invgen.contracts import Solver

    names = []
    for name, module in _exports.items():
        item = getattr(importlib.import_module(module), name)
        if isinstance(item, type) and issubclass(item, Solver) and all(isinstance(prior, need) for need in item.needs):
            names.append(name)
    return names
