"""The Sleipner example: its estimators on made-up data, and a small run on the real section where it is at hand."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data" / "seismic"


@pytest.fixture
def sleipner(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    spec = importlib.util.spec_from_file_location("sleipner", ROOT / "examples" / "sleipner.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "sleipner", module)
    spec.loader.exec_module(module)
    return module


def test_the_tie_finds_shift_and_scale(sleipner: ModuleType) -> None:
    rng = np.random.default_rng(0)
    log = 8.2 + np.cumsum(rng.normal(0, 0.02, 680))
    wavelet = np.exp(-((np.arange(-30, 31) / 4.0) ** 2)) * np.cos(np.arange(-30, 31) / 4.0)
    trace = 3.0 * np.roll(sleipner.synthetic(log, wavelet), -6)
    found = sleipner.tie(trace, log, wavelet, slice(180, 540))
    assert found["shift"] == -6
    assert found["correlation"] == pytest.approx(1.0, abs=1e-9)
    assert found["least_squares"] == pytest.approx(3.0, rel=1e-9)
    energy = sleipner.noise_models(found, 0.0)["random noise"]
    assert energy["scale"] == pytest.approx(3.0, rel=1e-9)
    assert energy["model_error"] == 0


def test_shared_blame_is_the_geometric_mean_of_the_two_scales(sleipner: ModuleType) -> None:
    rho, var_d, var_s = 0.4, 2.0, 0.1
    found = {"correlation": rho, "var_data": var_d, "var_synthetic": var_s}
    models = sleipner.noise_models(found, 0.0)
    least_squares = rho * math.sqrt(var_d / var_s)
    wanted = math.sqrt(models["random noise"]["scale"] * least_squares)
    assert models["model error"]["scale"] == pytest.approx(wanted, rel=1e-12)
    assert models["model error"]["model_error"] == pytest.approx((1 - rho) * var_d, rel=1e-12)


def test_random_noise_is_measured_and_flat_events_are_not(sleipner: ModuleType) -> None:
    rng = np.random.default_rng(1)
    n = 400 * 200
    section = 5 * rng.normal(size=(400, 1)) + 0.3 * rng.normal(size=(400, 200))
    # sd of a median-based scale: about 1.17/√n for independent values; neighbouring differences share a trace, so n/2
    assert sleipner.random_noise(section) == pytest.approx(0.3, rel=5 * 1.17 / math.sqrt(n / 2))


def test_missing_data_is_one_sentence(sleipner: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        sleipner.main(["--data", str(tmp_path)])
    assert stopped.value.code == 2
    assert "--data" in capsys.readouterr().err


@pytest.mark.skipif(
    not (DATA / "Sleipner_01_il_57.npy").exists(),
    reason="the Sleipner section is private test data and is not in ../shared/data/seismic",
)
def test_runs_on_the_real_section(sleipner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from invgen.priors import DiffusionPrior

    checkpoint = DiffusionPrior.examples()[0].save(tmp_path / "tiny.safetensors")
    monkeypatch.setattr(sleipner, "GENERATED", 2)
    figure = tmp_path / "out.png"
    line = sleipner.main(
        ["--checkpoint", str(checkpoint), "--traces", "16", "--times", "0.6", "0.8", "--step", "4", "--samples", "3"]
        + ["--iterations", "3", "--inner", "1", "--threads", "1", "--figure", str(figure)]
    )
    assert line["tie"]["shift"] == -5
    assert line["tie"]["correlation"] == pytest.approx(0.37, abs=0.02)
    assert line["models"]["random noise"]["scale"] > line["models"]["model error"]["scale"] > 1.0
    assert len(line["figures"]) == 4
    assert all(math.isfinite(v) for figures in line["figures"].values() for v in figures.values())
    assert figure.stat().st_size > 10_000


def test_sleipner_through_the_command_line_without_data_is_skipped_with_a_reason(
    sleipner: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import sleipner_cli

    assert sleipner_cli.main(["--data", str(tmp_path)]) == {"example": "sleipner_cli", "skipped": True}
    assert "private section" in capsys.readouterr().out


@pytest.mark.skipif(
    not (DATA / "Sleipner_01_il_57.npy").exists(),
    reason="the Sleipner section is private test data and is not in ../shared/data/seismic",
)
def test_sleipner_through_the_command_line(
    sleipner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sleipner_cli

    from invgen.priors import DiffusionPrior

    checkpoint = DiffusionPrior.examples()[0].save(tmp_path / "tiny.safetensors")
    monkeypatch.setattr(sleipner_cli, "GENERATED", 1)
    out = tmp_path / "run"
    line = sleipner_cli.main(
        [
            "--checkpoint",
            str(checkpoint),
            "--out",
            str(out),
            "--traces",
            "8",
            "--times",
            "0.6",
            "0.76",
            "--samples",
            "3",
        ]
        + ["--iterations", "3", "--inner", "1", "--threads", "1"]
    )
    blind, _, held, _, seen = (line["figures"][k] for k in line["figures"])
    assert seen["rms"] < held["rms"]  # the part that is data is closer than the part that is not
    assert blind["samples"] == held["samples"] == 80
    assert (out / "well_a" / "sd.sgy").is_file()
    assert (out / "well_b" / "report.html").is_file()
