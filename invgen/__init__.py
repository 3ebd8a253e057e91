"""invgen: Bayesian inverse problems with learned priors.

p(x | d)  ∝  p(d | g(x)) · p(x)          d: data, g: physics, x: model
p(z | d)  ∝  p(d | g(f(z))) · N(z; 0, I)  x = f(z): a trained generator
"""

from invgen._lazy import lazy_room

__version__ = "0.1.0"

_exports, _room, __dir__ = lazy_room(__name__, __file__)
_rooms = ("operators", "priors", "solvers", "data", "report", "diagnostics")
for _name in ("cli",):
    _exports = {k: v for k, v in _exports.items() if v != f"{__name__}.{_name}"}
__all__ = sorted(_exports)


def __getattr__(name: str) -> object:
    import importlib

    if name in _exports:
        return _room(name)
    for room in _rooms[:3]:  # invgen.PostStack is invgen.operators.PostStack
        package = importlib.import_module(f"{__name__}.{room}")
        if name in package._exports:
            return getattr(package, name)
    if not name.startswith("_"):
        return _room(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
