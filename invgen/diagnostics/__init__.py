"""Diagnostics: is the posterior right? On plain arrays, whoever made them."""

from invgen._lazy import lazy_room

_exports, __getattr__, __dir__ = lazy_room(__name__, __file__)
__all__ = sorted(_exports)
