"""What every benchmark shares: arguments, timing side by side, comparison with the targets, one line of JSON at the end.

from harness import Benchmark, interleaved

bench = Benchmark("operators", "What is measured.")
bench.add("poststack_speedup", 6.1, "x")
bench.finish()
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["Benchmark", "Row", "Timing", "compare", "interleaved", "load_targets", "table"]

TARGETS = Path(__file__).with_name("targets.toml")

# A script's folder comes first on the path, where sbi.py would stand for the library sbi: it goes last.
if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path.append(sys.path.pop(0))


@dataclass(frozen=True)
class Row:
    """One line of the comparison.

    Attributes:
        id: figure. value: measured, None when it was not. unit, note: as given. target: the bound in words, "" without
        one. status: "met", "MISSED", "MISSED (not measured)" or "information".
    """

    id: str
    value: float | None
    unit: str
    mc_error: float | None
    target: str
    status: str
    note: str = ""


@dataclass(frozen=True)
class Timing:
    """CPU seconds: median and inter-quartile range."""

    median: float
    iqr: float
    samples: tuple[float, ...]


def load_targets(benchmark: str, path: Path = TARGETS) -> dict[str, dict[str, Any]]:
    """Targets of one benchmark, by figure; empty where it has none."""
    if not path.exists():
        return {}
    return tomllib.loads(path.read_text(encoding="utf-8")).get(benchmark, {})


def _bound(target: Mapping[str, Any]) -> tuple[str, Callable[[float], bool]]:
    known = {"min", "max", "between", "equals", "measured"}
    chosen = known & set(target)
    if len(chosen) != 1:
        raise ValueError(f"A target needs exactly one of {sorted(known)}, got {sorted(target)}.")
    kind = chosen.pop()
    bound = target[kind]
    if kind == "min":
        return f"≥ {bound:g}", lambda v: v >= bound
    if kind == "max":
        return f"≤ {bound:g}", lambda v: v <= bound
    if kind == "measured":
        return "measured", lambda v: True
    if kind == "equals":
        return f"= {bound:g}", lambda v: v == bound
    low, high = bound
    return f"{low:g} to {high:g}", lambda v: low <= v <= high


def compare(figures: Sequence[Mapping[str, Any]], targets: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Figures beside targets. A target without a figure, or with one that is not a finite number, counts as missed."""
    by_id = {f["id"]: f for f in figures}
    rows = []
    for name in [*targets, *(i for i in by_id if i not in targets)]:
        f = by_id.get(name, {})
        value = f.get("value")
        if name not in targets:
            text, status = "", "information"
        else:
            text, holds = _bound(targets[name])
            if value is None or not math.isfinite(value):
                status = "MISSED (not measured)"
            else:
                status = "met" if holds(value) else "MISSED"
        rows.append(Row(name, value, f.get("unit", ""), f.get("mc_error"), text, status, f.get("note", "")))
    return rows


def _number(value: float | None, mc_error: float | None) -> str:
    if value is None:
        return "—"
    return f"{value:.4g}" + (f" ± {mc_error:.2g}" if mc_error is not None else "")


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Cells of the comparison, without a header."""
    return [[r.id, _number(r.value, r.mc_error), r.unit, r.target, r.status, r.note] for r in rows]


HEADER = ["figure", "value", "unit", "target", "result", "note"]


def interleaved(functions: Mapping[str, Callable[[], Any]], repeats: int = 9, warmup: int = 1) -> dict[str, Timing]:
    """Time functions side by side: each repeat runs all of them in turn, so that drift of the machine hits them alike.

    Args:
        functions: name -> call without arguments. repeats: rounds. warmup: rounds that are not counted.

    Returns:
        CPU time (`time.process_time`) of each, which a busy machine disturbs less than wall-clock time.
    """
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for k in range(warmup + repeats):
        for name, function in functions.items():
            start = time.process_time()
            function()
            if k >= warmup:
                samples[name].append(time.process_time() - start)
    out = {}
    for name, s in samples.items():
        q1, _, q3 = statistics.quantiles(s, n=4, method="inclusive") if len(s) > 1 else (s[0], s[0], s[0])
        out[name] = Timing(statistics.median(s), q3 - q1, tuple(s))
    return out


class Benchmark:
    """A benchmark script: `python benchmarks/NAME.py [--fast] [--device cpu] [--threads 1]`.

    Args:
        name: table of `targets.toml`. description: first lines of `--help`.
        arguments: further arguments, flag -> keywords of `argparse.add_argument`.
        argv: command line, `sys.argv` when omitted.
    """

    def __init__(
        self,
        name: str,
        description: str,
        arguments: Mapping[str, dict[str, Any]] | None = None,
        argv: Sequence[str] | None = None,
    ) -> None:
        parser = argparse.ArgumentParser(prog=f"{name}.py", description=description)
        parser.add_argument(
            "--fast", action="store_true", help="smaller sizes, stated in the script; at most 3 minutes"
        )
        parser.add_argument("--device", default="cpu", help="torch device")
        parser.add_argument("--threads", type=int, default=1, help="torch threads")
        for flag, options in (arguments or {}).items():
            parser.add_argument(flag, **options)
        self.name = name
        self.args = parser.parse_args(argv)
        self.fast, self.device = self.args.fast, self.args.device
        self.figures: list[dict[str, Any]] = []
        self._start = time.perf_counter()
        import torch

        torch.set_num_threads(self.args.threads)

    def add(self, id: str, value: float, unit: str = "", mc_error: float | None = None, note: str = "") -> None:
        """Record one figure; `mc_error` is its Monte-Carlo standard error."""
        figure: dict[str, Any] = {"id": id, "value": float(value), "unit": unit}
        if mc_error is not None:
            figure["mc_error"] = float(mc_error)
        if note:
            figure["note"] = note
        self.figures.append(figure)
        print(f"{id}: {_number(float(value), mc_error)} {unit}  {note}".rstrip(), flush=True)

    def finish(self) -> None:
        """Print the comparison and, last, the line of JSON. A miss is printed, never raised."""
        rows = [HEADER, *table(compare(self.figures, load_targets(self.name)))]
        widths = [max(len(r[k]) for r in rows) for k in range(len(HEADER))]
        print()
        for row in rows:
            print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
        record = {
            "benchmark": self.name,
            # JSON knows no NaN: a figure that is not a number was not measured
            "figures": [{**f, "value": f["value"] if math.isfinite(f["value"]) else None} for f in self.figures],
            "threads": self.args.threads,
            "machine": _machine(self.device),
            "versions": _versions(),
            "seconds": round(time.perf_counter() - self._start, 1),
            "fast": self.fast,
        }
        print(flush=True)
        print(json.dumps(record, ensure_ascii=False), flush=True)


def _machine(device: str) -> str:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0] if models else name
    text = f"{name}, {os.cpu_count()} cores"
    if device.startswith("cuda"):
        import torch

        text += f", {torch.cuda.get_device_name(device)}"
    return text


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("invgen", "torch", "numpy", "scipy", "pylops", "pyproximal"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit("harness.py is imported by the benchmarks; run one of them, or run_all.py.")
