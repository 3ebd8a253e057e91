"""Capability tables of priors and solvers, read from the classes themselves."""

from __future__ import annotations

import inspect
import typing

__all__ = ["prior_rows", "solver_rows"]

CAPABILITIES = ("HasDensity", "HasDensityEstimate", "HasLatent", "HasDenoiser", "HasProx")
_MARKS = {
    "HasDensity": "log_prob",
    "HasDensityEstimate": "log_prob_estimate",
    "HasLatent": "decode",
    "HasDenoiser": "denoise",
    "HasProx": "prox",
}


def _first_line(cls: type) -> str:
    doc = inspect.getdoc(cls) or ""
    return " ".join(doc.split("\n\n")[0].split())


def solver_rows() -> list[tuple[str, str, str, str]]:
    """`(name, kind, needs, what it is)` of every exported solver."""
    import invgen.solvers as room
    from invgen.contracts import Solver

    rows = []
    for name in sorted(room._exports):
        cls = getattr(room, name)
        if isinstance(cls, type) and issubclass(cls, Solver):
            needs = (
                ", ".join(" or ".join(c.__name__ for c in (typing.get_args(need) or (need,))) for need in cls.needs)
                or "–"
            )
            rows.append((name, cls.kind, needs, _first_line(cls)))
    return rows


def prior_rows() -> list[tuple[str, tuple[bool, ...], str]]:
    """`(name, sample and capabilities, what it is)` of every exported prior, as its example instances truly have them."""
    import invgen.contracts as contracts
    import invgen.priors as room

    protocols = [getattr(contracts, c) for c in CAPABILITIES]
    rows = []
    for name in sorted(room._exports):
        cls = getattr(room, name)
        if (
            not isinstance(cls, type)
            or not hasattr(cls, "examples")
            or not (hasattr(cls, "sample") or hasattr(cls, "prox"))
        ):
            continue
        example = cls.examples()[0]  # type: ignore[attr-defined]
        rows.append(
            (name, (hasattr(example, "sample"), *(isinstance(example, p) for p in protocols)), _first_line(cls))
        )
    return rows


def heads() -> tuple[str, ...]:
    """Column heads of the prior table: the method that each capability is."""
    return ("sample", *(_MARKS[c] for c in CAPABILITIES))
