"""Run every benchmark and write RESULTS.md: `python benchmarks/run_all.py [--fast] [--device cpu] [--threads 1] [NAME …]`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from harness import HEADER, TARGETS, compare, load_targets, table

HERE = Path(__file__).parent


def scripts() -> list[Path]:
    """Benchmark scripts: those that use the harness."""
    return [
        p
        for p in sorted(HERE.glob("*.py"))
        if p.name not in ("harness.py", "run_all.py") and "Benchmark(" in p.read_text(encoding="utf-8")
    ]


def run(script: Path, options: list[str]) -> dict[str, Any] | None:
    """The JSON of one script, None when it failed."""
    print(f"== {script.stem}", flush=True)
    last = ""
    with subprocess.Popen(
        [sys.executable, str(script), *options], stdout=subprocess.PIPE, text=True, encoding="utf-8"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line if line.strip() else last
    if process.returncode != 0:
        return None
    try:
        record = json.loads(last)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and "figures" in record else None


def section(name: str, record: dict[str, Any] | None) -> list[str]:
    """Markdown of one benchmark; without a record every target of it is missed."""
    rows = table(compare(record["figures"] if record else [], load_targets(name)))
    lines = [f"## {name}", ""]
    if record is None:
        lines += ["The script failed or is missing: its figures were not measured.", ""]
    else:
        versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
        sizes = ", fast sizes" if record["fast"] else ""
        lines += [f"{record['machine']}; {record['threads']} thread(s); {record['seconds']} s{sizes}; {versions}", ""]
    lines += ["| " + " | ".join(HEADER) + " |", "|" + " --- |" * len(HEADER)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="benchmarks to run; all when omitted")
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md")
    args = parser.parse_args()
    options = ["--device", args.device, "--threads", str(args.threads), *(["--fast"] if args.fast else [])]
    found = {p.stem: p for p in scripts()}
    with_targets = list(tomllib.loads(TARGETS.read_text(encoding="utf-8"))) if TARGETS.exists() else []
    names = args.names or sorted({*found, *with_targets})
    lines = ["# Benchmarks", "", "Written by `make bench`; targets are those of `targets.toml`.", ""]
    for name in names:
        lines += section(name, run(found[name], options) if name in found else None)
        args.out.write_text("\n".join(lines), encoding="utf-8")  # after each: an interrupted run keeps what is done
    print(f"Wrote {args.out}.")


if __name__ == "__main__":
    main()
