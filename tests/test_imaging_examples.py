"""The imaging examples: each runs in seconds with `--fast`, writes its figure, and its numbers say what its text says."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = ("ct", "mri", "superresolution")


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for shared in ("plots", "reconstruction", "script"):
        monkeypatch.delitem(sys.modules, shared, raising=False)
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shared(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "reconstruction", raising=False)
    return importlib.import_module("reconstruction")


def run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    figure = tmp_path / "pictures" / f"{name}.png"
    line = load(name, monkeypatch).main(["--fast", "--figure", str(figure)])
    assert figure.stat().st_size > 20_000
    assert line["example"] == name
    assert all(math.isfinite(v) for figures in line["figures"].values() for v in figures.values())
    for label, figures in line["figures"].items():
        if label.endswith(
            "Gaussian field"
        ):  # an exact sampler: χ² of draws is one a datum, up to what the prior shrinks
            assert 0.7 < figures["chi2_draws"] < 1.3
    return line


def test_the_table_names_every_script() -> None:
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}.py`" in table for name in SCRIPTS)


def test_ct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = run("ct", tmp_path, monkeypatch)["figures"]
    assert figures["6 views, total variation"]["psnr"] > figures["6 views, back-projection"]["psnr"] + 1


def test_mri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = run("mri", tmp_path, monkeypatch)["figures"]
    for coils in ("one coil", "4 coils"):
        assert figures[f"{coils}, total variation"]["psnr"] > figures[f"{coils}, zero-filled"]["psnr"] + 1
    assert figures["4 coils, total variation"]["psnr"] > figures["one coil, total variation"]["psnr"] + 1


def test_superresolution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = run("superresolution", tmp_path, monkeypatch)["figures"]
    for task in ("super-resolution", "inpainting"):
        assert figures[f"{task}, learned prior"]["psnr"] > figures[f"{task}, as it came"]["psnr"] + 1


def test_the_noise_has_the_share_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    from invgen.operators import MRI, Identity

    reconstruction = shared(monkeypatch)
    truth = torch.ones(1, 1, 64, 64)
    for operator in (Identity((1, 64, 64)), MRI(torch.ones(64, 64, dtype=torch.bool), kind="real")):
        data, sigma = reconstruction.measure(operator, truth, 0.05)
        assert sigma == pytest.approx(0.05)
        found = float((data - operator(truth)).abs().square().mean())
        assert found == pytest.approx(sigma**2, rel=4 * math.sqrt(2 / 4096))


def test_psnr(monkeypatch: pytest.MonkeyPatch) -> None:
    reconstruction = shared(monkeypatch)
    truth = torch.tensor([0.0, 2.0])
    assert reconstruction.psnr(truth, truth + 0.2) == pytest.approx(20.0)
