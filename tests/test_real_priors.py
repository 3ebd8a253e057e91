"""The benchmark on real data: its likelihoods against closed forms, its statistics on laws that are known, files that are missing."""

from __future__ import annotations

import importlib
import math
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def real() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("real_priors")
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("real_priors", "harness"):
            sys.modules.pop(name, None)


class Figures:
    """What a part needs of a benchmark."""

    def __init__(self, figures: str | None = None) -> None:
        self.fast, self.device, self.args = True, "cpu", SimpleNamespace(figures=figures)
        self.found: dict[str, float] = {}
        self.notes: dict[str, str] = {}

    def add(self, id: str, value: float, unit: str = "", mc_error: float | None = None, note: str = "") -> None:
        self.found[id], self.notes[id] = float(value), note


def grains(n: int, size: int, seed: int, share: float = 0.2) -> np.ndarray:
    """`(n, size, size)` binary fields of blobs, periodic."""
    noise = ndimage.gaussian_filter(
        np.random.default_rng(seed).standard_normal((n, size, size)), (0, 3, 3), mode="wrap"
    )
    return (noise > np.quantile(noise, 1 - share)).astype(np.float32)


def test_principal_components_are_the_gaussian_of_most_likelihood(real: ModuleType) -> None:
    n, d, q = 30, 40, 4
    generator = torch.Generator().manual_seed(0)
    loadings = torch.randn(d, q, generator=generator, dtype=torch.float64) * torch.tensor([4.0, 3.0, 2.0, 1.0])
    x = 100 + torch.randn(n, q, generator=generator, dtype=torch.float64) @ loadings.mT
    x = x + 0.5 * torch.randn(n, d, generator=generator, dtype=torch.float64)
    found = real.PrincipalComponents(x, q)
    covariance = found.directions * found.variances @ found.directions.mT
    rest = torch.eye(d, dtype=torch.float64) - found.directions @ found.directions.mT
    dense = torch.distributions.MultivariateNormal(x.mean(0), covariance + found.noise * rest)
    y = 100 + 3 * torch.randn(7, d, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(found.log_prob(y), dense.log_prob(y), rtol=1e-10, atol=1e-8)
    # Tipping and Bishop 1999, equations 3 and 8: the likelihood of the sample at the maximum
    values = torch.linalg.eigvalsh(torch.cov(x.mT, correction=0)).flip(0)
    noise = values[q:].mean()
    log_det = values[:q].log().sum() + (d - q) * noise.log()
    best = -0.5 * float(d * math.log(2 * math.pi) + log_det + d)
    assert float(found.log_prob(x).mean()) == pytest.approx(best, abs=1e-8)


def test_the_number_of_components_is_that_of_the_law(real: ModuleType) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 3, generator=generator) @ (3 * torch.randn(3, 50, generator=generator))
    x = x + torch.randn(200, 50, generator=generator)
    assert real.best_components(x, (1, 3, 30)) == 3
    with pytest.raises(ValueError, match="10 examples of 50 entries has 1 to 8 components"):
        real.PrincipalComponents(x[:10], 9)


def test_uniform_noise_stays_within_its_value(real: ModuleType) -> None:
    k = torch.arange(256, dtype=torch.uint8).repeat(4000)
    x = real.dequantised(k, seed=3)
    assert torch.equal(x.floor(), k.float())
    noise = (x - k).double()
    # a million uniform numbers: 4 standard errors of the mean, and of the mean square
    assert abs(float(noise.mean()) - 0.5) < 4 * math.sqrt(1 / 12 / len(k))
    assert abs(float(noise.square().mean()) - 1 / 3) < 4 * math.sqrt(4 / 45 / len(k))
    assert torch.equal(x, real.dequantised(k, seed=3))
    assert not torch.equal(x, real.dequantised(k, seed=4))


def test_eight_bits_are_eight_bits(real: ModuleType) -> None:
    uniform = torch.full((3,), -12 * math.log(256.0), dtype=torch.float64)
    np.testing.assert_allclose(real.bits_per_dim(uniform, 12), 8.0)


def test_symmetries_are_those_of_the_square(real: ModuleType) -> None:
    x = torch.rand(2, 3, 5, 5)
    all_of = real.symmetries(x)
    assert all_of.shape == (16, 3, 5, 5)
    assert torch.equal(all_of[:2], x)
    assert len(torch.unique(all_of[::2].flatten(1), dim=0)) == 8
    again = real.symmetries(all_of[::2])
    assert len(torch.unique(again.flatten(1), dim=0)) == 8


def test_two_point_ratio_is_one_for_the_same_law_and_large_for_another(real: ModuleType) -> None:
    held = torch.from_numpy(grains(120, 32, 0))
    ratios = [real.two_point_ratio(torch.from_numpy(grains(60, 32, s)), held) for s in range(1, 6)]
    assert 0.5 < np.mean(ratios) < 2.0
    assert real.two_point_ratio(torch.from_numpy(grains(60, 32, 1, share=0.3)), held) > 4 * np.mean(ratios)
    white = (torch.rand(60, 1, 32, 32, generator=torch.Generator().manual_seed(0)) < 0.2).float()
    assert real.two_point_ratio(white, held) > 4 * np.mean(ratios)


def test_porosity_is_judged_by_the_scatter_of_draws_and_of_both_parts(real: ModuleType) -> None:
    draws = torch.zeros(10, 1, 10, 10)
    for i in range(10):
        draws[i, 0].view(-1)[: 15 + i] = 1  # porosities 0.15 to 0.24
    one, other = np.array([0.18, 0.22, 0.2, 0.2]), np.array([0.1, 0.3])
    z, phi = real.porosity_z(draws, one, other, 0.18)
    assert phi == pytest.approx(0.195)
    variance = np.arange(10).var(ddof=1) * 1e-4 / 10 + one.var(ddof=1) / 4 + 0.02 / 2
    assert z == pytest.approx(0.015 / math.sqrt(variance))


def test_blocks_share_out_a_part_of_the_volume(real: ModuleType) -> None:
    volume = np.zeros((20, 8, 8), dtype=np.uint8)
    volume[4:8, :4, :4] = 255
    found = real.block_porosities(volume, (0.2, 0.6))
    assert found.tolist() == [1.0, 0, 0, 0, 0, 0, 0, 0]
    random = np.where(np.random.default_rng(0).random((10, 12, 14)) < 0.3, 255, 0)
    assert real.block_porosities(random, (0.0, 1.0)).mean() == pytest.approx((random == 255).mean())


def archive(path: Path, volume: np.ndarray) -> Path:
    from PIL import Image

    pages = [Image.fromarray(plane) for plane in volume]
    pages[0].save(path.with_suffix(".tif"), save_all=True, append_images=pages[1:])
    with zipfile.ZipFile(path, "w") as out:
        out.write(path.with_suffix(".tif"), "rock.tif")
    return path


def test_a_zip_archive_of_a_tiff_is_a_volume(real: ModuleType, tmp_path: Path) -> None:
    volume = np.random.default_rng(0).integers(0, 2, (5, 6, 7)).astype(np.uint8) * 255
    np.testing.assert_array_equal(real.open_rock(archive(tmp_path / "rock.zip", volume)), volume)


def test_missing_data_are_said_and_not_measured(
    real: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(real, "DATA", tmp_path)
    bench = Figures()
    real.berea(bench)
    real.galaxies(bench)
    assert set(bench.found) == {
        "berea_porosity_z",
        "berea_two_point_ratio",
        "berea_minkowski_ratio",
        "decals_bits_per_dim",
        "decals_bits_per_dim_gaussian",
    }
    assert all(math.isnan(v) for v in bench.found.values())
    assert "berea.zip is not in the shared data folder" in capsys.readouterr().out
    assert "decals_rgb_400_64.npz is not" in bench.notes["decals_bits_per_dim"]


def test_both_parts_from_file_to_picture(
    real: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Made data, a few steps: that everything fits together, not how good it is."""
    settings: dict[str, Any] = {
        "DATA": tmp_path,
        "WIDTHS": (8, 8),
        "STAMPS": 20,
        "FAST_ROCK": {"steps": 2, "draws": 6},
        "FAST_GALAXIES": {"steps": 2, "held": 8, "levels": 4, "draws": 6},
    }
    for name, value in settings.items():
        monkeypatch.setattr(real, name, value)
    (tmp_path / "rock").mkdir()
    (tmp_path / "galaxies").mkdir()
    noise = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((200, 70, 70)), 4)
    archive(tmp_path / "rock" / "berea.zip", np.where(noise > np.quantile(noise, 0.8), 255, 0).astype(np.uint8))
    images = np.random.default_rng(1).integers(0, 256, (30, 64, 64, 3)).astype(np.uint8)
    np.savez(tmp_path / "galaxies" / "decals_rgb_400_64.npz", images=images)
    monkeypatch.setattr(real, "best_components", lambda x, choices: 2)
    bench = Figures(str(tmp_path / "figures"))
    real.berea(bench)
    real.galaxies(bench)
    assert all(math.isfinite(v) for v in bench.found.values())
    assert bench.found["decals_bits_per_dim_gaussian"] == pytest.approx(
        8.25, abs=0.3
    )  # h(U) < the Gaussian of its variance
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {"priors-berea.png", "priors-galaxies.png"}
    said = capsys.readouterr().out
    assert "held-out part" in said
    assert "nearest training stamp" in said
