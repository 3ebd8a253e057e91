"""docs/exam_chains.md from the cells of the exam of chains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

MARKS = {"right": "🟩", "flagged": "🟨", "short": "🟨", "wrong": "🟥", "failed": "🟥", "refused": "⬜"}

HEAD = """# The exam of chains

Made by `python benchmarks/exam_chains.py`; every number is measured, none is edited. Every sampler that claims the exact
posterior sits with its **default settings**, 64 chains from draws of the prior (particle solvers: 16 runs of 512), on
posteriors that are known by matrices or by quadrature.

- 🟩 **right**: means, second moments, products, halves and quarters of the plane and marginals (Kolmogorov–Smirnov) agree with
  the exact posterior within Monte-Carlo error, with a probability of a false alarm anywhere of 10⁻³.
- 🟨 **flagged**: they do not (or fewer than 100 effective draws came out), and the diagnostics say so: R-hat ≥ 1.01, E-BFMI < 0.3,
  divergences. **short**: too few draws to tell, without a warning.
- 🟥 **wrong**: they do not agree, and nothing warns.

A warning is as good as being right on the funnel, and on separated modes for samplers that do not temper. *p* is the smallest
p-value times the number of tests of the cell; *ESS* that of the worst coordinate over all chains; *mean error* the root mean
square error of the mean in posterior sd without its Monte-Carlo part; *W* the sliced Wasserstein distance of thinned draws to
exact draws, over that of exact draws to exact draws. *After 20 steps*: 1000 chains started from exact posterior draws.

"""


class Column(Protocol):
    """What the page needs of a target."""

    name: str
    shown: str


def _mark(cell: dict[str, Any]) -> str:
    return f"{MARKS[cell['verdict']]} {cell['verdict']}"


def overview(table: dict[str, Any], columns: Sequence[Column]) -> list[str]:
    """Solvers by targets."""
    out = ["| sampler | " + " | ".join(c.name for c in columns) + " |", "| --- |" + " --- |" * len(columns)]
    for name, row in table.items():
        cells = [row["cells"].get(c.name) for c in columns]
        out.append(f"| {name} | " + " | ".join("" if c is None else _mark(c) for c in cells) + " |")
    return out


def line(name: str, cell: dict[str, Any], later: dict[str, Any] | None) -> str:
    if "why" in cell:
        why = cell["why"].replace("|", "\\|")
        return f"| {name} | {_mark(cell)}: {why if len(why) < 110 else why[:107] + '…'} |" + " |" * 9
    warning = [f"{cell['divergent']} divergent"] if cell.get("divergent") else []
    warning += [f"E-BFMI {cell['ebfmi']:.2f}"] if "ebfmi" in cell else []
    after = "" if later is None else _mark(later)
    return (
        f"| {name} | {_mark(cell)} | {cell['p']:.2g} | {cell['ess']:.0f} | {cell['rhat']:.3f} | {', '.join(warning)} | "
        f"{cell['mean_error']:.3f} | {cell['sd_ratio']:.3f} | {cell['wasserstein']:.2f} | {after} | {cell['cpu_seconds']:g} |"
    )


def page(table: dict[str, Any], columns: Sequence[Column]) -> str:
    """The whole page."""
    out = [HEAD, *overview(table, columns), ""]
    for column in columns:
        out += [f"## {column.name}\n", f"{column.shown}.\n"]
        out.append(
            "| sampler | verdict | p | ESS | R-hat | warnings | mean error | sd ratio | W | after 20 steps | CPU seconds |"
        )
        out.append("|" + " --- |" * 11)
        out += [
            line(name, row["cells"][column.name], row["invariance"].get(column.name))
            for name, row in table.items()
            if column.name in row["cells"]
        ]
        out.append("")
    out.append("## Settings\n")
    out += [f"- **{name}**: `{row['settings']}`" for name, row in table.items()]
    return "\n".join(out) + "\n"
