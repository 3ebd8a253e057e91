"""The deconvolution example and the figures of astronomy: they run, their noise is what they say, and panels are legible."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from invgen.operators import EPL, SIE, ExternalShear, GravitationalLens, sky_grid

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
STAMPS = EXAMPLES.parents[1] / "shared" / "data" / "galaxies" / "cosmos_f814w_50_64.npz"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "lens_plots", raising=False)
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_deconvolution_of_a_simulated_galaxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "new" / "galaxy.png"
    line = load("deconvolution", monkeypatch).main(["--simulated", "--fast", "--figure", str(picture)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == line
    figures = line["figures"]["deconvolved"]
    assert all(math.isfinite(v) for v in figures.values())
    assert picture.stat().st_size > 50_000
    # three draws of a fitting source: (1 + something) χ² of 4096 pixels; the four levels of --fast are crude
    assert figures["chi2"] == pytest.approx(1, abs=0.15)
    assert abs(figures["flux_bias"]) < 0.15


@pytest.mark.data
@pytest.mark.skipif(not STAMPS.exists(), reason="the HST stamps are not in ../shared/data/galaxies")
def test_the_noise_of_real_stamps_is_correlated_as_the_text_says(monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("deconvolution", monkeypatch)
    with np.load(STAMPS, allow_pickle=False) as held:
        rho = example.correlation(held["images"], held["noise_variance"])
    assert float(rho[2, 2]) == pytest.approx(1, abs=0.1)  # the catalogue's variance is right
    assert float(rho[2, 3]) == pytest.approx(0.47, abs=0.06)
    assert float((rho / rho[2, 2]).sum()) == pytest.approx(4.2, abs=0.4)
    seen = example.real(STAMPS, 2)
    assert seen["image"].shape == (1, 64, 64)
    with pytest.raises(ValueError, match="padded with zeros"):
        example.real(STAMPS, 10)


def test_missing_stamps_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        load("deconvolution", monkeypatch).main(["--data", str(tmp_path / "nowhere.npz")])
    assert "--simulated runs without it" in capsys.readouterr().err


def test_critical_curves_and_caustics_of_an_isothermal_lens(monkeypatch: pytest.MonkeyPatch) -> None:
    """An SIE's critical curve is κ = ½, the ellipse q x² + y²/q = θ_E², and shear stretches its caustic to a diamond."""
    plots = load("lens_plots", monkeypatch)
    lens = SIE(1.2, 0.7, 0.0)
    (curve,) = plots.critical_curves(lens, sky_grid((60, 60), 0.1))
    radius = np.sqrt(0.7 * curve[:, 1] ** 2 + curve[:, 0] ** 2 / 0.7)
    np.testing.assert_allclose(radius, 1.2, atol=2e-3)
    (tangential,) = plots.caustics(lens, [curve])
    # cusps on the axes of the lens: β where the critical ellipse meets them
    y = torch.tensor([0.0], dtype=torch.float64)
    x = torch.tensor([1.2 / math.sqrt(0.7)], dtype=torch.float64)
    assert np.abs(tangential[:, 1]).max() == pytest.approx(abs(float(lens.rays(y, x)[1])), abs=5e-3)


def test_the_page_shows_what_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plots = load("lens_plots", monkeypatch)
    image, source = sky_grid((30, 36), 0.1), sky_grid((20, 24), 0.08)
    lens = EPL(1.0, 0.8, 0.3, slope=1.1) + ExternalShear(0.05)
    y, x = torch.meshgrid(*(torch.from_numpy(source.coordinates(k)) for k in range(2)), indexing="ij")
    truth = torch.exp(-0.5 * ((x - 0.1) ** 2 + y**2) / 0.04)
    model = GravitationalLens(lens, source, image)(truth[None, None])[0, 0]
    rng = torch.Generator().manual_seed(0)
    data = model + 0.05 * torch.randn(model.shape, generator=rng)
    samples = truth + 0.05 * torch.randn(5, 20, 24, generator=rng)
    mask = torch.ones(30, 36, dtype=torch.bool)
    mask[:5] = False
    figure = plots.posterior_page(
        data, model, 0.05, samples, image, source, lens=lens, truth=truth, mask=mask, units=("e/s", "e/s")
    )
    titles = [a.get_title() for a in figure.axes if a.get_title()]
    assert titles[:4] == ["data", "model of the mean", titles[2], "source: truth"]
    # 25 · 36 pixels, sd of the mean square √(2/900)
    assert float(titles[2].split()[-1]) == pytest.approx(1, abs=4 * math.sqrt(2 / 900) + 0.005)
    assert figure.axes[0].images[0].get_extent() == pytest.approx([-1.8, 1.8, -1.5, 1.5])
    assert figure.axes[0].images[0].origin == "lower"
    assert [t.get_text() for t in figure.axes[1].get_legend().get_texts()] == ["critical curves"]
    plots.save(figure, tmp_path / "new" / "page.png")
    assert (tmp_path / "new" / "page.png").stat().st_size > 50_000
