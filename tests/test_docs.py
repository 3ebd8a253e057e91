"""The Python blocks of README and docs run, each page in one namespace; the capability tables are up to date."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if BLOCK.search(p.read_text(encoding="utf-8"))], ids=lambda p: p.name
)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # dataclasses look their module up
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        exec(compile(block, str(page), "exec"), module.__dict__)


def test_links_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http") and not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert broken == []


def test_capability_tables_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "docs/make_tables.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_yaml_in_the_docs_is_what_the_command_takes() -> None:
    import yaml

    from invgen import _invert, _train

    blocks = re.findall(
        r"^```yaml\n(.*?)^```", (ROOT / "docs" / "cli.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    invert, train, section = (yaml.safe_load(b) for b in blocks)
    assert set(invert) <= set(_invert._KEYS)
    assert set(section) <= set(_invert._KEYS)
    assert set(train) <= set(_train._TOP)
