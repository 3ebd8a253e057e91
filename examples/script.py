"""What the scripts of this folder share: arguments, and the line of JSON with every figure that they end with."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

SAMPLES = "the min-max band of 19 covers 0.90 when calibrated"


def parser(
    doc: str | None, *, samples: int = 19, fast: str | None = None, figure: bool = True
) -> argparse.ArgumentParser:
    """--figure and --samples; `fast` is what --fast does, None for none."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if fast is not None:
        made.add_argument("--fast", action="store_true", help=fast)
    if figure:
        made.add_argument("--figure", help="write the picture here")
    made.add_argument("--samples", type=int, default=samples, help=SAMPLES if samples == 19 else "posterior draws")
    return made


def add_section(parser: argparse.ArgumentParser, folder: Path, times: tuple[float, float]) -> None:
    """Where the real section lies, the window in time, the prior and the threads."""
    parser.add_argument("--data", type=Path, default=folder, help="folder of the three .npy files")
    parser.add_argument("--checkpoint", help="another learned prior than the shipped one")
    parser.add_argument("--times", type=float, nargs=2, default=times, help="first and last time in s")
    parser.add_argument("--iterations", type=int, default=60, help="sweeps of PnP-DM")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", 2)))


def finish(record: dict[str, Any]) -> dict[str, Any]:
    """The last line of the output."""
    print(json.dumps(record))
    return record
