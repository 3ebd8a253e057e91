"""The house itself: cheap imports, links, who may import whom, file sizes, what must not be in it."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("operators", "priors", "solvers")
HEAVY = ("sbi", "pylops", "arviz", "deepwave", "lightning_fabric", "matplotlib", "pyproximal")
SOURCES = sorted(
    p for folder in ("invgen", "tests", "benchmarks", "examples", "docs") for p in (ROOT / folder).rglob("*.py")
)


def python(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_import_is_cheap_beyond_torch() -> None:
    """CPU time, best of three, so that a busy machine does not decide."""
    code = "import time, torch, numpy; t = time.process_time(); import invgen; print(time.process_time() - t)"
    assert min(float(python(code).stdout) for _ in range(3)) < 0.3


@pytest.mark.parametrize(
    "what", ["invgen", "invgen.operators, invgen.priors, invgen.solvers, invgen.data, invgen.report, invgen.cli"]
)
def test_heavy_libraries_wait_until_they_are_used(what: str) -> None:
    out = python(f"import sys, {what}; print([m for m in {HEAVY!r} if m in sys.modules])")
    assert out.stdout.strip() == "[]", out.stderr


def test_help_needs_no_torch() -> None:
    out = python("import sys; from invgen.cli import main; main(['--help']); print('torch' in sys.modules)")
    assert out.stdout.strip().endswith("False"), out.stderr


@pytest.mark.parametrize("room", ROOMS)
def test_links_at_the_root_name_the_right_import(room: str) -> None:
    link = ROOT / room
    assert link.is_symlink()
    assert os.readlink(link) == f"invgen/{room}"
    module = next(p.stem for p in sorted((ROOT / "invgen" / room).glob("*.py")) if not p.stem.startswith("_"))
    for name in (room, f"{room}.{module}"):
        out = python(f"import {name}")
        assert out.returncode != 0
        assert f"import invgen.{room} instead of {room}" in out.stderr.splitlines()[-1]


def test_links_are_symbolic_links_in_git() -> None:
    listed = subprocess.run(["git", "ls-files", "-s", *ROOMS], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0 or not listed.stdout:
        pytest.skip("not a git checkout, or nothing is committed yet")
    assert {line.split()[0] for line in listed.stdout.splitlines()} == {"120000"}
    assert len(listed.stdout.splitlines()) == len(ROOMS)


def test_links_are_left_out_of_packages_and_tools() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    hatch = config["tool"]["hatch"]["build"]["targets"]
    assert hatch["wheel"]["packages"] == ["invgen"]
    assert not {p.strip("/") for p in hatch["sdist"]["include"]} & set(ROOMS)
    assert {f"./{room}" for room in ROOMS} <= set(config["tool"]["ruff"]["extend-exclude"])
    assert config["tool"]["mypy"]["files"] == ["invgen"]
    assert config["tool"]["pytest"]["ini_options"]["testpaths"] == ["tests"]
    assert "--import-mode=importlib" in config["tool"]["pytest"]["ini_options"]["addopts"]


def test_ruff_sees_the_rooms_but_not_the_links() -> None:
    seen = subprocess.run(
        [sys.executable, "-m", "ruff", "check", ".", "--show-files"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if seen.returncode != 0:
        pytest.skip("ruff is not installed")
    files = {str(Path(line).relative_to(ROOT)) for line in seen.stdout.splitlines() if line}
    assert {f"invgen/{room}/__init__.py" for room in ROOMS} <= files
    assert not {f"{room}/__init__.py" for room in ROOMS} & files


def imports(path: Path) -> set[str]:
    """Every module a file imports, anywhere in it."""
    found = set()
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    [*package.split(".")[: len(package.split(".")) - node.level + 1], *([base] if base else [])]
                )
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def in_room(module: str, room: str) -> bool:
    return module == f"invgen.{room}" or module.startswith(f"invgen.{room}.")


@pytest.mark.parametrize("room", [*ROOMS, "diagnostics"])
def test_rooms_do_not_import_each_other(room: str) -> None:
    """The operators' algebra is shared ground, like linalg; concrete classes of another room are not."""
    guilty = []
    for path in sorted((ROOT / "invgen" / room).rglob("*.py")):
        if "pretrained" in path.parts:
            continue  # scripts that train what ships
        for other in (*ROOMS, "diagnostics"):
            wrong = [
                m for m in imports(path) if other != room and in_room(m, other) and not in_room(m, "operators.algebra")
            ]
            guilty += [f"{path.relative_to(ROOT)} imports {m}" for m in wrong]
    assert guilty == []


def test_networks_import_only_torch() -> None:
    allowed = {"__future__", "math", "torch", "collections", "typing", "dataclasses", "functools", "itertools"}
    for path in (ROOT / "invgen" / "priors" / "networks").glob("*.py"):
        strangers = {
            m for m in imports(path) if m.split(".")[0] not in allowed and not m.startswith("invgen.priors.networks")
        }
        assert strangers == set(), path


def test_files_are_small_and_named_for_what_they_hold() -> None:
    long = {
        str(p.relative_to(ROOT)): n for p in SOURCES if (n := len(p.read_text(encoding="utf-8").splitlines())) > 450
    }
    assert long == {}
    vague = ("utils.py", "helpers.py", "helper.py", "manager.py", "misc.py", "common.py")
    assert [p for p in SOURCES if p.name in vague] == []


def test_every_public_module_says_what_it_is() -> None:
    for path in (ROOT / "invgen").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), path
        names = [
            t.id for node in tree.body if isinstance(node, ast.Assign) for t in node.targets if isinstance(t, ast.Name)
        ]
        assert "__all__" in names or path.name == "__init__.py" or path.stem.startswith(("_", "train_")), (
            f"{path} has no __all__"
        )


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [p for p in paths if p.is_file() and not p.is_symlink()]


def test_no_machine_paths_or_registry_hosts() -> None:
    text = re.compile(
        r"/(?:home|work|Users)/[a-z]|/root/|index-url|files\.pythonhosted|pypi\.org|download\.pytorch|--find-links"
    )
    guilty = []
    for path in tracked():
        if path.suffix in (".npz", ".npy", ".png", ".safetensors", ".nc") or path == Path(__file__).resolve():
            continue
        guilty += [
            f"{path.relative_to(ROOT)}: {m.group()}"
            for m in text.finditer(path.read_text(encoding="utf-8", errors="ignore"))
        ]
    assert guilty == []


def test_constraints_pin_every_core_dependency() -> None:
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert {re.split(r"[^A-Za-z0-9_.-]", d)[0].lower() for d in wanted} <= pinned


def test_everything_a_room_promises_can_be_fetched() -> None:
    """Everything a room promises can be fetched."""
    import importlib

    for room in (*ROOMS, "diagnostics", "data", "report"):
        module = importlib.import_module(f"invgen.{room}")
        for name in module.__all__:
            assert getattr(module, name) is not None
