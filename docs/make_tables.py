"""Write docs/capabilities.md from the classes themselves: `python docs/make_tables.py [--check]`."""

from __future__ import annotations

import sys
from pathlib import Path

from invgen._tables import heads, prior_rows, solver_rows

PAGE = Path(__file__).parent / "capabilities.md"


def page() -> str:
    """The whole page."""

    def row(*cells: str) -> str:
        return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"

    lines = [
        "# What fits together",
        "",
        "Made by `python docs/make_tables.py` from the classes themselves; `invgen priors` and `invgen solvers` print the same.",
        "",
    ]
    lines += ["## Priors", "", row("prior", *heads(), "what it is"), row(*["---"] * (len(heads()) + 2))]
    lines += [row(name, *("✓" if h else "–" for h in has), text) for name, has, text in prior_rows()]
    lines += [
        "",
        "## Solvers",
        "",
        row("solver", "result", "the prior must have", "what it is"),
        row("---", "---", "---", "---"),
    ]
    lines += [row(*r) for r in solver_rows()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(
            0
            if PAGE.read_text(encoding="utf-8") == page()
            else "docs/capabilities.md is out of date; run python docs/make_tables.py"
        )
    PAGE.write_text(page(), encoding="utf-8")
