"""The seismic examples: each runs in seconds with `--fast`, writes its figure, and its numbers say what its text says."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from invgen.grid import Grid

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = ("poststack_well", "crosshole", "time_lapse", "deblending")


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "plots", raising=False)
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    figure = tmp_path / "pictures" / f"{name}.png"
    line = load(name, monkeypatch).main(["--fast", "--figure", str(figure)])
    assert figure.stat().st_size > 20_000
    assert line["example"] == name
    assert all(math.isfinite(v) for figures in line["figures"].values() for v in figures.values())
    return line


def test_the_table_names_every_script() -> None:
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}.py`" in table for name in SCRIPTS)


def test_poststack_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = run("poststack_well", tmp_path, monkeypatch)
    # the tie states a standard error of its scale of 0.04: three and a half of them
    assert line["wavelet_peak"] == pytest.approx(3.0, rel=0.14)
    # one window of 96 × 16 samples of noise correlated over a few samples
    assert line["noise_sd"] == pytest.approx(line["true_noise_sd"], rel=0.15)
    # four sweeps of three samples are no posterior, but the well is seen, at its trace and on the way to it
    alone, both = line["figures"]["seismic alone"], line["figures"]["with well A"]
    assert both["well_a_rms"] < alone["well_a_rms"]
    assert both["section_rms"] < alone["section_rms"]


def test_crosshole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = run("crosshole", tmp_path, monkeypatch)
    assert line["physics_error_ms"]["straight"] > 2 * line["physics_error_ms"]["bent"]
    bent, straight = line["figures"]["bent"], line["figures"]["straight"]
    # mean of χ² per datum over draws: sd below √(2/36)
    assert abs(bent["chi2"] - 1) < 3.5 * math.sqrt(2 / 36)
    assert bent["rms_error_percent"] < straight["rms_error_percent"]


def test_rays_of_a_homogeneous_medium_cover_both_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    from invgen.operators import StraightRays, TravelTime

    crosshole = load("crosshole", monkeypatch)
    grid = Grid((8, 4), (5.0, 5.0), axes=("z", "x"), units=("m", "m"))
    even = torch.full((1, 8, 4), 4e-4, dtype=torch.float64)
    lengths = [
        crosshole.coverage_of_rays(operator, even)
        for operator in (StraightRays.crosshole(grid, 3, 3), TravelTime.crosshole(grid, 3, 3, model="slowness"))
    ]
    sources, receivers = crosshole.ends(grid, 3)
    total = np.linalg.norm(sources[:, None] - receivers[None], axis=-1).sum()
    for found in lengths:
        assert found.sum() == pytest.approx(total, rel=1e-6)


def test_time_lapse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = run("time_lapse", tmp_path, monkeypatch)["figures"]
    joint, separate = figures["joint"], figures["separate"]
    assert joint["sd"] < 0.5 * separate["sd"]
    assert joint["rms_error"] < separate["rms_error"]
    for f in (joint, separate):  # 2 · 48 · 16 data
        assert abs(f["chi2"] - 1) < 3.5 * math.sqrt(2 / 1536)


def test_deblending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = run("deblending", tmp_path, monkeypatch)["figures"]
    assert figures["dithered"]["snr_after"] > figures["dithered"]["snr_before"] + 3
    assert 0.9 < figures["dithered"]["chi2"] < 1.1


def test_firing_later_is_shifting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator on aligned gathers is `Blend` of the shifted ones, here by whole samples."""
    from invgen.operators import Blend

    deblending = load("deblending", monkeypatch)
    monkeypatch.setattr(deblending, "first_arrival", lambda shots: 6 * deblending.DT * np.ones(shots))
    fired = np.array([0.0, 0.0, 3.0, 5.0]) * deblending.DT
    aligned = torch.randn(1, 1, 20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gather = torch.nn.functional.pad(aligned, (0, 0, 6, 0))
    plain = Blend((1, 26, 4), fired, deblending.DT, groups=[0, 1, 0, 1])
    torch.testing.assert_close(deblending.blend((20, 4), fired)(aligned), plain(gather), atol=1e-12, rtol=0)


def test_wiggles_stay_in_the_section(monkeypatch: pytest.MonkeyPatch) -> None:
    plots = load("plots", monkeypatch)
    grid = Grid((10, 8), (0.004, 12.5), (0.4, 100.0), ("t", "x"), ("s", "m"))
    figure, axes = plots.page(1, 1)
    data = np.random.default_rng(0).normal(size=grid.shape)
    plots.section(axes[0, 0], data, grid, title="seismic", label="amplitude", wells={"A": 125.0})
    plots.wiggles(axes[0, 0], data, grid)
    axis = axes[0, 0]
    assert axis.get_xlabel() == "distance (m)"
    assert axis.get_ylabel() == "two-way time (s)"
    assert axis.get_ylim() == pytest.approx((0.438, 0.398))  # time downwards
    assert axis.get_xlim() == pytest.approx((93.75, 193.75))
    assert [a.get_ylabel() for a in figure.axes] == ["two-way time (s)", "amplitude"]
