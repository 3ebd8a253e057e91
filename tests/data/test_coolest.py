"""COOLEST: conventions by the profiles' own formulas on the sky, statistics by the draws, and back again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from invgen.data import read_coolest, write_coolest
from invgen.data._fits_sky import SkyFrame

lens_models = pytest.importorskip("invgen.operators.lens_models")
EPL, NFW, SIE, SIS, ExternalShear, PointMass = (
    getattr(lens_models, n) for n in ("EPL", "NFW", "SIE", "SIS", "ExternalShear", "PointMass")
)


def values(path: Path) -> dict[str, dict[str, dict]]:
    """profile type -> parameter -> what the file says."""
    content = json.loads(path.read_text())
    assert content["standard"] == "COOLEST"
    return {p["type"]: p["parameters"] for e in content["lensing_entities"] for p in e["mass_model"]}


def turned(north: float, mirrored: bool) -> SkyFrame:
    """A frame whose north lies so many degrees counter-clockwise from +y."""
    c, s = math.cos(math.radians(north)), math.sin(math.radians(north))
    east = (c, s) if mirrored else (-c, -s)
    return SkyFrame((10.0, 20.0), (0.3, -0.2), (east, (-s, c)))


@pytest.mark.parametrize(("north", "mirrored"), [(0, False), (35, False), (-110, True)])
def test_convergence_is_that_of_the_standard_on_the_sky(tmp_path: Path, north: float, mirrored: bool) -> None:
    """κ at places on the sky by COOLEST's formula, against ours at the same places in the image."""
    lens = EPL(1.3, 0.7, 0.4, 0.05, -0.1, slope=1.2)
    frame = turned(north, mirrored)
    p = {
        k: v["point_estimate"]["value"]
        for k, v in values(write_coolest(tmp_path / "l.json", lens, like=frame))["PEMD"].items()
    }
    rng = np.random.default_rng(0)
    x, y = rng.uniform(-2, 2, (2, 20))
    east, up = np.array(frame.matrix) @ (x, y)
    # COOLEST: x to the west, y to the north; phi from north to east, so that the major axis lies at phi + 90° from +x
    dx, dy = -east - p["center_x"], up - p["center_y"]
    a = math.radians(p["phi"] + 90)
    major, minor = dx * math.cos(a) + dy * math.sin(a), dy * math.cos(a) - dx * math.sin(a)
    r = np.sqrt(p["q"] * major**2 + minor**2 / p["q"])
    want = (3 - p["gamma"]) / 2 * (p["theta_E"] / r) ** (p["gamma"] - 1)
    got = lens.convergence(torch.from_numpy(y), torch.from_numpy(x))
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-7)
    assert -90 < p["phi"] <= 90


@pytest.mark.parametrize(("north", "mirrored"), [(0, False), (35, False), (-110, True)])
def test_shear_is_that_of_the_standard_on_the_sky(tmp_path: Path, north: float, mirrored: bool) -> None:
    lens = ExternalShear(0.03, -0.05)
    frame = turned(north, mirrored)
    p = {
        k: v["point_estimate"]["value"]
        for k, v in values(write_coolest(tmp_path / "l.json", lens, like=frame))["ExternalShear"].items()
    }
    x, y = np.random.default_rng(0).uniform(-2, 2, (2, 20))
    east, up = np.array(frame.matrix) @ (x, y)
    a = 2 * math.radians(p["phi_ext"] + 90)
    g1, g2 = p["gamma_ext"] * math.cos(a), p["gamma_ext"] * math.sin(a)
    west_deflection, north_deflection = g1 * -east + g2 * up, g2 * -east - g1 * up
    ay, ax = lens.deflection(torch.from_numpy(y), torch.from_numpy(x))
    east_ours, north_ours = np.array(frame.matrix) @ (ax.numpy(), ay.numpy())
    np.testing.assert_allclose(-east_ours, west_deflection, atol=1e-12)
    np.testing.assert_allclose(north_ours, north_deflection, atol=1e-12)


@pytest.mark.parametrize("frame", [None, turned(50, False), turned(-20, True)])
def test_there_and_back(tmp_path: Path, frame: SkyFrame | None) -> None:
    lens = (
        SIE(1.2, 0.8, 2.5, 0.03, -0.07, name="main")
        + ExternalShear(-0.02, 0.04)
        + EPL(0.2, 0.9, 0.1, 1.0, 1.1, slope=0.9, name="satellite")
    )
    path = write_coolest(tmp_path / "new" / "lens.json", lens, redshifts=(0.5, 1.5), like=frame)
    back = {p.type: p for p in read_coolest(path, like=frame)}
    assert {p.name for p in back.values()} == {"main", "satellite", "shear"}
    assert back["SIE"].redshift == 0.5
    again = (
        SIE(**back["SIE"].parameters)
        + ExternalShear(**back["ExternalShear"].parameters)
        + EPL(**back["PEMD"].parameters)
    )
    x, y = (torch.from_numpy(v) for v in np.random.default_rng(0).uniform(-2, 2, (2, 20)))
    for one, other in zip(lens.deflection(y, x), again.deflection(y, x), strict=True):
        torch.testing.assert_close(one, other)


def test_posterior_statistics_are_those_of_the_draws_in_its_parameters(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    n = 4001
    theta = {
        "einstein_radius": rng.normal(1.2, 0.01, (1, 1, n)),
        "angle": np.pi / 2 + rng.normal(np.pi / 2 - 0.02, 0.05, n),  # around phi = 90 degrees, where it wraps
        "gamma_1": rng.normal(0, 0.02, n),
        "gamma_2": rng.normal(0, 0.02, n),
    }
    lens = SIE(1.0, 0.8, 0.0) + ExternalShear()
    read = values(write_coolest(tmp_path / "l.json", lens, theta))
    radius = read["SIE"]["theta_E"]
    assert not radius["fixed"]
    draws = theta["einstein_radius"].reshape(-1)
    assert radius["posterior_stats"]["mean"] == pytest.approx(draws.mean(), rel=1e-12)
    want = np.quantile(draws, (0.16, 0.5, 0.84))
    got = [radius["posterior_stats"][k] for k in ("percentile_16th", "median", "percentile_84th")]
    np.testing.assert_allclose(got, want, atol=1e-4)  # two definitions of a quantile
    assert read["SIE"]["q"]["fixed"]
    assert read["SIE"]["q"]["posterior_stats"]["mean"] is None
    phi = read["SIE"]["phi"]["posterior_stats"]
    assert phi["percentile_84th"] - phi["percentile_16th"] == pytest.approx(2 * 0.9945 * math.degrees(0.05), rel=0.08)
    assert abs(abs(phi["median"]) - (90 - math.degrees(0.02))) < 4 * 1.25 * math.degrees(0.05) / math.sqrt(n)
    strength = read["ExternalShear"]["gamma_ext"]
    assert strength["posterior_stats"]["mean"] == pytest.approx(np.hypot(theta["gamma_1"], theta["gamma_2"]).mean())
    assert strength["point_estimate"]["value"] > 0.01  # not the strength of the mean shear, which is none


def test_weights_of_the_draws_count(tmp_path: Path) -> None:
    theta = {"einstein_radius": np.array([1.0, 2.0])}
    read = values(write_coolest(tmp_path / "l.json", SIE(1.0), theta, weights=[3.0, 1.0]))
    assert read["SIE"]["theta_E"]["posterior_stats"]["mean"] == pytest.approx(1.25)


def test_halo_sphere_and_dictionaries(tmp_path: Path) -> None:
    path = write_coolest(tmp_path / "n.json", NFW(5.0, 0.1) + SIS(0.3), critical_density=2e9)
    read = values(path)
    assert read["NFW"]["rho_c"]["point_estimate"]["value"] == pytest.approx(0.1 * 2e9 / 5)
    assert read["SIE"]["q"]["point_estimate"]["value"] == 1
    (halo,) = [p for p in read_coolest(path, critical_density=2e9) if p.type == "NFW"]
    assert NFW(**halo.parameters) == NFW(5.0, 0.1)
    plain = write_coolest(tmp_path / "d.json", {"type": "SIE", "einstein_radius": 1.2, "axis_ratio": 0.9, "angle": 0.2})
    assert values(plain)["SIE"]["theta_E"]["point_estimate"]["value"] == 1.2


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda p: write_coolest(p / "a.json", PointMass(1.0)), "no profile for a PointMass"),
        (lambda p: write_coolest(p / "a.json", NFW(5.0, 0.1)), "give critical_density"),
        (lambda p: write_coolest(p / "a.json", SIE(1.0), {"slope": [1.0]}), "no parameter slope"),
        (lambda p: write_coolest(p / "a.json", SIE(1.0), {"angle": [math.nan]}), "must be finite"),
        (lambda p: write_coolest(p / "a.json", SIE(1.0), {"angle": [1.0]}, weights=[1, 2]), "2 weights were given"),
        (lambda p: write_coolest(p / "a.txt", SIE(1.0)), "a .json file"),
        (lambda p: read_coolest(_text(p, "{")), "is not JSON"),
        (lambda p: read_coolest(_text(p, "{}")), "no plain COOLEST template"),
        (lambda p: read_coolest(_profile(p, "SPEMD", 1.0)), "SPEMD is not known"),
        (lambda p: read_coolest(_profile(p, "SIE", None)), "no point estimate of theta_E"),
    ],
)
def test_bad_input(tmp_path: Path, call, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call(tmp_path)


def _text(folder: Path, text: str) -> Path:
    (folder / "x.json").write_text(text)
    return folder / "x.json"


def _profile(folder: Path, kind: str, value: float | None) -> Path:
    model = [{"type": kind, "parameters": {"theta_E": {"point_estimate": {"value": value}}}}]
    entity = {"type": "Galaxy", "name": "g", "redshift": 0.5, "mass_model": model}
    return _text(folder, json.dumps({"standard": "COOLEST", "lensing_entities": [entity]}))
