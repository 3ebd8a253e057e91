"""How every script of the course begins and ends: its command line, its picture, its numbers."""

from __future__ import annotations

import argparse
import inspect
import json
import time
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt

Figures = dict[str, float]


def finish(fig: Any, figure: str, found: Figures, began: float, dpi: int = 110) -> Figures:
    """Write the picture, print and return what was found; `began` is the CPU time at the start."""
    fig.savefig(figure, dpi=dpi)
    plt.close(fig)
    found["cpu_seconds"] = time.process_time() - began
    print(json.dumps(found, indent=1), f"\nfigure: {figure}")
    return found


def command_line(main: Callable[..., Figures], text: str | None, **files: str) -> None:
    """Run `main` with --fast, --figure and one option for each of `files` (name -> help)."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="a few seconds, to see that it runs")
    for name, told in files.items():
        parser.add_argument(f"--{name}", help=told)
    parser.add_argument("--figure", default=inspect.signature(main).parameters["figure"].default)
    main(**vars(parser.parse_args()))
