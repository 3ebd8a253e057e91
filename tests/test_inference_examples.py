"""The examples of simulation-based inference: each runs in seconds with `--fast`, and its parts do what its text says."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = ("dwarf_galaxies", "lens_parameters", "nine_layers", "source_latent")


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for shared in ("plots", "agreement", "script"):
        monkeypatch.delitem(sys.modules, shared, raising=False)
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> dict[str, Any]:
    figure = tmp_path / "pictures" / f"{name}.png"
    line = load(name, monkeypatch).main(["--fast", "--figure", str(figure), *more])
    assert figure.stat().st_size > 20_000
    assert figure.with_name(f"{name}_corner.png").stat().st_size > 20_000
    assert line["example"] == name
    assert all(math.isfinite(v) for figures in line["figures"].values() for v in figures.values())
    return line


def test_the_table_names_every_script() -> None:
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}.py`" in table for name in SCRIPTS)


@pytest.mark.filterwarnings("ignore")  # few simulations, and it says so
def test_nine_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = run("nine_layers", tmp_path, monkeypatch)
    # χ² per datum of draws of the reference, its mean: nine velocities of 384 data, sd √(2/384)
    assert abs(line["figures"]["SMC"]["chi2"] - 1) < 4 * math.sqrt(2 / 384)
    # 30 gathers of nine layers, which are of one prior: conformal coverage is 0.9 whatever the network is
    assert line["figures"]["conformal"]["coverage"] > 0.75


def test_the_response_of_two_layers_is_one_echo(monkeypatch: pytest.MonkeyPatch) -> None:
    nine = load("nine_layers", monkeypatch)
    operator = nine.LayeredResponse(layers=2, thickness=400.0, quality=1e9, slowness=(0.0, 0.2e-3))
    v = torch.tensor([[2000.0, 2600.0]], dtype=torch.float64)
    d, t = operator(v)[0], nine.DT * torch.arange(nine.SAMPLES, dtype=torch.float64)
    for k, p in enumerate((0.0, 0.2e-3)):
        q = (v[0] ** -2 - p**2).sqrt()
        a = (math.pi * nine.PEAK * (t - 800.0 * q[0])).square()
        echo = (q[0] - q[1]) / (q[0] + q[1]) * (1 - 2 * a) * torch.exp(-a)
        # what is cut of the spectrum beyond 3.2 peak frequencies
        torch.testing.assert_close(d[k], echo, atol=2e-3 * float(echo.abs().max()), rtol=0)


def test_multiples_carry_what_transmission_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lossless stack in which a thin layer's echoes add up: amplitudes of primary and first internal multiple."""
    nine = load("nine_layers", monkeypatch)
    operator = nine.LayeredResponse(layers=3, thickness=400.0, quality=1e9, slowness=(0.0,), samples=256)
    v = torch.tensor([[2000.0, 4000.0, 2000.0]], dtype=torch.float64)
    d = operator(v)[0, 0]
    r = 1.0 / 3.0  # (4 − 2)/(4 + 2), and −r below
    arrivals = {0.4: r, 0.6: -r * (1 - r**2), 0.8: (1 - r**2) * (-r) * (-r) * (-r)}
    for time, amplitude in arrivals.items():
        sample = round(time / nine.DT)
        a = (math.pi * nine.PEAK * (sample * nine.DT - time)) ** 2
        assert float(d[sample]) == pytest.approx(amplitude * (1 - 2 * a) * math.exp(-a), abs=0.01)


@pytest.mark.filterwarnings("ignore")
def test_dwarf_galaxies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "dwarf.safetensors"
    line = run("dwarf_galaxies", tmp_path, monkeypatch, "--save", str(file), "--data", str(tmp_path / "none.h5"))
    assert file.stat().st_size > 10_000
    assert line["galaxies"] == "simulator"
    # a valid p-value of 100 clean galaxies, calibrated by 80: 3.5 standard errors of both
    assert line["figures"]["flagged"]["clean"] < 0.05 + 3.5 * math.sqrt(0.05 * 0.95 * (1 / 100 + 1 / 80))
    assert line["figures"]["flagged"]["a fifth foreground"] > line["figures"]["flagged"]["clean"]


def test_the_mass_within_the_half_light_radius(monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.integrate import quad

    dwarf = load("dwarf_galaxies", monkeypatch)
    x = torch.tensor([[1.0, 0.3, 7.0, 0.4, 0.0, 1.0], [-1.0, -0.5, 6.0, 1.0, 0.2, 2.0], [1.9, 0.0, 5.5, 0.2, 0.0, 1.0]])
    for row, found in zip(x.double().tolist(), dwarf.log_mass(x).tolist(), strict=True):
        gamma, log_r_s, log_rho, share = row[:4]
        end = dwarf.HALF * share
        shells, _ = quad(lambda t, g=gamma: t ** (2 - g) * (1 + t) ** (g - 3), 0, end, epsabs=0, epsrel=1e-10)
        assert found == pytest.approx(math.log10(4 * math.pi * shells) + log_rho + 3 * log_r_s, abs=1e-4)
    r = dwarf.HALF  # half of a Plummer sphere: r³/(1 + r²)^(3/2)
    assert r**3 / (1 + r**2) ** 1.5 == pytest.approx(0.5, rel=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_source_latent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = run("source_latent", tmp_path, monkeypatch)["figures"]
    # the reference fits an image of the generator: 484 data
    assert abs(figures["generated: HMC"]["chi2"] - 1) < 4 * math.sqrt(2 / 484)
    # and what no decoder of 150 steps can draw shows in the misfit of a new galaxy
    assert figures["a new galaxy: HMC"]["chi2"] > figures["generated: HMC"]["chi2"]


@pytest.mark.filterwarnings("ignore")
def test_lens_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "lens.safetensors"
    figures = run("lens_parameters", tmp_path, monkeypatch, "--save", str(file))["figures"]
    assert file.stat().st_size > 10_000
    # 20 images of the simulator itself, calibrated by 80: 3.5 standard errors of both
    assert figures["like the simulated"]["pixels"] < 0.05 + 3.5 * math.sqrt(0.05 * 0.95 * (1 / 20 + 1 / 80))
    # blunt after two epochs, but not wrong: 90 % intervals of 60 lenses, each parameter
    assert all(figures[name]["coverage"] > 0.9 - 4 * math.sqrt(0.09 / 60) for name in ("theta_E", "e_1", "gamma_1"))


def test_ellipticity_is_axis_ratio_and_angle(monkeypatch: pytest.MonkeyPatch) -> None:
    lens = load("lens_parameters", monkeypatch)
    q, angle = torch.tensor([0.6, 0.9], dtype=torch.float64), torch.tensor([0.4, -1.2], dtype=torch.float64)
    e = (1 - q) / (1 + q)
    x = torch.stack([torch.ones(2).double(), e * torch.cos(2 * angle), e * torch.sin(2 * angle), 0 * q, 0 * q], 1)
    back = lens.shape_of(x)
    torch.testing.assert_close(back[0], q)
    torch.testing.assert_close(back[1], angle)


def test_a_lens_image_has_a_ring_of_the_einstein_radius(monkeypatch: pytest.MonkeyPatch) -> None:
    lens = load("lens_parameters", monkeypatch)
    monkeypatch.setattr(lens, "SHIFT", 0)
    torch.manual_seed(0)
    images = lens.Observatory()(torch.tensor([[1.2, 0.0, 0.0, 0.0, 0.0]]).expand(8, -1))
    y, x = (torch.from_numpy(lens.GRID.coordinates(a)) for a in ("y", "x"))
    radius = torch.hypot(y[:, None], x[None, :])
    light = images.sinh().mean(0)[0].double()
    profile = torch.stack([light[(radius - r).abs() < 0.1].mean() for r in torch.arange(0.1, 1.95, 0.1)])
    assert 0.1 + 0.1 * int(profile.argmax()) == pytest.approx(1.2, abs=0.15)


def test_agreement_of_draws_of_one_law(monkeypatch: pytest.MonkeyPatch) -> None:
    agreement = load("agreement", monkeypatch)
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2000, 40, generator=g, dtype=torch.float64) for _ in range(2))
    same, moved = agreement.agreement(3 * a + 1, 3 * b + 1), agreement.agreement(6 * a + 4, 3 * b + 1)
    assert same["mean_error"] < 0.03  # √(1/1000 · 3.5 √(2/40)) = 0.028
    assert moved["mean_error"] == pytest.approx(1.0, abs=0.05)
    assert moved["sd_ratio"] == pytest.approx(2.0, rel=0.02)
    assert agreement.beside("a/b.png", "corner") == Path("a/b_corner.png")
