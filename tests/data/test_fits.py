"""FITS in and out: what is in the file comes back, what is missing is asked for, what is wrong is one sentence."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from invgen.data import Observation, export_fits, read_observation, write_maps
from invgen.grid import Grid
from invgen.noise import GaussianNoise
from invgen.operators import Convolution, Identity
from invgen.posterior import Posterior
from invgen.priors import GaussianPrior
from invgen.solvers import ExactGaussian

fits = pytest.importorskip("astropy.io.fits")
NY, NX = 12, 16
SCALE = 0.04  # arcsec


def kernel(h: int = 5, w: int = 5) -> np.ndarray:
    y, x = np.mgrid[:h, :w]
    k = np.exp(-0.5 * (((y - h // 2) / 1.0) ** 2 + ((x - w // 2) / 1.3) ** 2))
    return k / k.sum()


def celestial(rotation: float = 0.0, mirrored: bool = False, scale: float = SCALE) -> dict[str, Any]:
    """A tangent-plane WCS whose y axis lies `rotation` degrees clockwise of north, by the textbook CD matrix."""
    c, s, d = math.cos(math.radians(rotation)), math.sin(math.radians(rotation)), scale / 3600
    sign = 1 if mirrored else -1  # east to the left
    return {
        "CTYPE1": "RA---TAN",
        "CTYPE2": "DEC--TAN",
        "CRVAL1": 150.1,
        "CRVAL2": 2.2,
        "CRPIX1": 4.0,
        "CRPIX2": 9.0,
        "CD1_1": sign * d * c,
        "CD1_2": sign * d * -s,
        "CD2_1": d * s,
        "CD2_2": d * c,
    }


def written(path: Path, *, wcs: dict[str, Any] | None = None, unit: str = "electron/s", **extensions: Any) -> Path:
    """A multi-extension file: SCI and whatever is given."""
    hdus = [fits.PrimaryHDU()]
    for name, values in {"SCI": science(), **extensions}.items():
        hdu = fits.ImageHDU(values, name=name)
        if name == "SCI":
            hdu.header.update(celestial() if wcs is None else wcs)
            if unit:
                hdu.header["BUNIT"] = unit
        hdus.append(hdu)
    fits.HDUList(hdus).writeto(path)
    return path


def science() -> np.ndarray:
    return np.random.default_rng(0).normal(0.0, 0.1, size=(NY, NX)).astype(np.float32)


@pytest.fixture
def full(tmp_path: Path) -> Path:
    image = science()
    image[2, 3] = np.nan
    dq = np.zeros((NY, NX), np.int16)
    dq[:, 0] = 4
    weight = np.full((NY, NX), 100.0, np.float32)
    weight[1, 1] = 0
    return written(tmp_path / "all.fits", SCI=image, WHT=weight, PSF=kernel(), DQ=dq)


def test_one_file_with_everything(full: Path) -> None:
    seen = read_observation(full)
    assert seen.data.shape == seen.sd.shape == seen.mask.shape == (1, NY, NX)
    assert seen.counts == {"pixels": 192, "used": 178, "nan_pixels": 1, "masked": 12, "no_noise": 1}
    assert seen.units == "electron/s"
    assert seen.grid.spacing == pytest.approx((SCALE, SCALE), rel=1e-9)
    assert seen.grid.axes == ("y", "x")
    assert seen.grid.coordinates("x").mean() == pytest.approx(0, abs=1e-12)
    inside = seen.mask[0].numpy()
    np.testing.assert_array_equal(seen.data[0].numpy()[inside], science()[inside])
    assert (seen.data[~seen.mask] == 0).all()
    torch.testing.assert_close(seen.sd[seen.mask], torch.full((178,), 0.1))
    assert seen.psf is not None
    assert float(seen.psf.sum()) == pytest.approx(1, abs=1e-12)
    assert seen.frame is not None
    assert seen.frame.north == 0
    assert not seen.frame.mirrored
    assert "WHT, read as inverse variances" in seen.remarks
    assert "1 nan pixels" in seen.remarks
    # 178 draws: sd of the (median − 16 %) distance about 1.7/√n
    assert seen.sky_scatter == pytest.approx(1, abs=4 * 1.7 / math.sqrt(178))
    assert "PSF 5 × 5" in repr(seen)


def test_the_parts_make_a_problem(full: Path) -> None:
    seen = read_observation(full)
    assert seen.psf is not None
    g = Convolution(seen.psf, (1, NY, NX), "zero", model_grid=seen.grid)
    prior = GaussianPrior(torch.zeros(1, NY, NX), 0.5, grid=seen.grid)
    problem = seen.problem(g, prior)
    x = prior.sample(2, seed=1)
    seen_pixels = seen.mask[0]
    r = (seen.data - g(x))[:, 0, seen_pixels] / 0.1
    want = -0.5 * r.square().sum(1) - 178 * math.log(0.1 * math.sqrt(2 * math.pi))
    torch.testing.assert_close(problem.log_likelihood(x), want, rtol=1e-5, atol=1e-3)
    assert isinstance(seen.noise, GaussianNoise)
    assert ExactGaussian().solve(problem, 2).mean().shape == (1, 1, NY, NX)


def test_several_files_and_every_kind_of_noise_agree(tmp_path: Path) -> None:
    sd = np.random.default_rng(1).uniform(0.05, 0.2, (NY, NX))
    path = written(tmp_path / "sci.fits")
    for kind, values in {"error": sd, "variance": sd**2, "weight": 1 / sd**2}.items():
        fits.PrimaryHDU(values).writeto(tmp_path / f"{kind}.fits")
        seen = read_observation(path, **{kind: tmp_path / f"{kind}.fits"})  # type: ignore[arg-type]
        np.testing.assert_allclose(seen.sd[0].numpy(), sd, rtol=1e-6)
        again = read_observation(path, **{kind: values})  # type: ignore[arg-type]
        torch.testing.assert_close(again.sd, seen.sd)
    fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(kernel(4, 5))]).writeto(tmp_path / "psf.fits")
    seen = read_observation(path, sigma=0.1, psf=f"{tmp_path}/psf.fits[1]")
    assert seen.psf is not None
    assert seen.psf.shape == (4, 5)
    assert seen.sd.unique().tolist() == [pytest.approx(0.1)]


@pytest.mark.parametrize(("rotation", "mirrored"), [(0, False), (30, False), (-120, False), (30, True), (175, True)])
def test_scale_north_and_parity_are_those_of_the_sky(tmp_path: Path, rotation: float, mirrored: bool) -> None:
    """Against astropy: a step to the north on the sky, seen in pixels."""
    from astropy.wcs import WCS

    cards = celestial(rotation, mirrored, 0.065)
    seen = read_observation(written(tmp_path / "a.fits", wcs=cards), sigma=0.1)
    assert seen.grid.spacing == pytest.approx((0.065, 0.065), rel=1e-9)
    assert seen.frame is not None
    assert seen.frame.mirrored is mirrored
    wcs = WCS(fits.Header(cards))
    x0, y0 = wcs.all_world2pix(150.1, 2.2, 0)
    x1, y1 = wcs.all_world2pix(150.1, 2.2 + 1e-5, 0)
    assert seen.frame.north == pytest.approx(math.degrees(math.atan2(-(x1 - x0), y1 - y0)), abs=1e-4)
    assert ("mirrored" in seen.remarks) is mirrored


def test_the_wcs_of_another_grid_points_at_the_same_sky(tmp_path: Path) -> None:
    from astropy.wcs import WCS

    cards = celestial(20.0)
    seen = read_observation(written(tmp_path / "a.fits", wcs=cards), sigma=0.1)
    fine = Grid((30, 20), (0.013, 0.011), (-0.2, -0.1), ("y", "x"), ("arcsec", "arcsec"), ("flux",), ("electron/s",))
    values = np.random.default_rng(0).normal(size=(30, 20))
    path = write_maps(tmp_path / "new" / "maps.fits", {"mean": values, "cube": np.zeros((3, 30, 20))}, fine, like=seen)
    with fits.open(path) as hdus:
        np.testing.assert_array_equal(hdus["MEAN"].data, values)
        assert hdus["MEAN"].header["BUNIT"] == "electron/s"
        assert hdus["CUBE"].data.shape == (3, 30, 20)
        theirs = WCS(hdus["MEAN"].header)
    # grid coordinate (x, y) is image pixel x/scale + (n − 1)/2
    for row, column in ((0, 0), (29, 3), (11, 19)):
        x, y = fine.coordinates("x")[column], fine.coordinates("y")[row]
        there = WCS(fits.Header(cards)).all_pix2world(x / SCALE + 0.5 * (NX - 1), y / SCALE + 0.5 * (NY - 1), 0)
        np.testing.assert_allclose(theirs.all_pix2world(column, row, 0), there, atol=1e-11)


def test_maps_without_a_frame_come_back_with_their_coordinates(tmp_path: Path) -> None:
    from astropy.wcs import WCS

    grid = Grid((4, 5), (0.1, 0.2), (-0.15, 0.3), ("y", "x"), ("arcsec", "arcsec"))
    path = write_maps(tmp_path / "m.fits", {"A": np.zeros((4, 5))}, grid)
    with fits.open(path) as hdus:
        x, _ = WCS(hdus["A"].header).all_pix2world(np.arange(5), np.zeros(5), 0)
    # axes that are not celestial keep arcsec or turn into degrees, as the version of astropy likes
    np.testing.assert_allclose(x * 3600 if abs(x).max() < 1e-2 else x, grid.coordinates("x"), rtol=1e-9)


def test_export_of_a_posterior(full: Path, tmp_path: Path) -> None:
    seen = read_observation(full)
    draws = torch.randn(1, 1, 7, 1, NY, NX, generator=torch.Generator().manual_seed(0))
    posterior = Posterior(draws, kind="approximate", settings={"solver": "MMPS"}, seed=3)
    path = export_fits(posterior, tmp_path / "post.fits", like=seen, grid=seen.grid, samples=2)
    with fits.open(path) as hdus:
        np.testing.assert_allclose(hdus["MEAN"].data, draws[0, 0].mean(0)[0], atol=1e-6)
        np.testing.assert_allclose(hdus["SD"].data, posterior.std()[0, 0], atol=1e-6)
        np.testing.assert_allclose(hdus["SAMPLES"].data, draws[0, 0, :2, 0])
        assert hdus[0].header["SOLVER"] == "MMPS"
        assert hdus[0].header["NDRAWS"] == 7
    back = read_observation(f"{path}[MEAN]", error="[SD]")
    assert back.frame == pytest.approx(back.frame)
    assert back.grid.spacing == pytest.approx(seen.grid.spacing, rel=1e-9)
    point = Posterior(draws[:, :, :1], kind="point")
    with fits.open(export_fits(point, tmp_path / "point.fits", grid=seen.grid)) as hdus:
        assert [h.name for h in hdus] == ["PRIMARY", "MEAN"]


def test_a_window_keeps_the_sky(full: Path) -> None:
    seen = read_observation(full)
    part = seen.window(y=(-0.1, 0.1), x=(-0.2, 0.1))
    assert part.grid.coordinates("x")[0] == pytest.approx(-0.18)
    assert part.data.shape == (1, *part.grid.shape)
    j = int(np.argmin(abs(seen.grid.coordinates("x") + 0.18)))
    i = int(np.argmin(abs(seen.grid.coordinates("y") - part.grid.coordinates("y")[0])))
    assert float(part.data[0, 0, 0]) == float(seen.data[0, i, j])
    assert part.frame == seen.frame  # in grid coordinates, which stay
    with pytest.raises(ValueError, match="No pixel lies between 5 and 6"):
        seen.window(y=(5, 6), x=(0, 1))


@pytest.mark.parametrize(("rotation", "mirrored"), [(0, False), (40, False), (-100, True)])
def test_two_images_know_where_the_other_lies(tmp_path: Path, rotation: float, mirrored: bool) -> None:
    """A pixel of one, through the sky by astropy, in the coordinates of the other."""
    from astropy.wcs import WCS

    from invgen.operators import Placement

    first = celestial(15.0)
    second = celestial(rotation, mirrored, 0.05) | {"CRVAL1": 150.1 + 2e-5, "CRVAL2": 2.2 - 1e-5}
    one = read_observation(written(tmp_path / "one.fits", wcs=first), sigma=0.1)
    two = read_observation(written(tmp_path / "two.fits", wcs=second), sigma=0.1)
    place = Placement(**two.placement(one))
    for row, column in ((0, 0), (11, 3), (5, 15)):
        sky = WCS(fits.Header(second)).all_pix2world(column, row, 0)
        x, y = WCS(fits.Header(first)).all_world2pix(*sky, 0)
        want = (SCALE * (float(y) - 0.5 * (NY - 1)), SCALE * (float(x) - 0.5 * (NX - 1)))
        at = (two.grid.coordinates("y")[row], two.grid.coordinates("x")[column])
        got = place.rays(*(torch.tensor(v, dtype=torch.float64) for v in at))
        assert [float(v) for v in got] == pytest.approx(want, abs=1e-5)


def test_a_distorted_wcs_is_said(tmp_path: Path) -> None:
    cards = celestial() | {
        "CTYPE1": "RA---TAN-SIP",
        "CTYPE2": "DEC--TAN-SIP",
        "A_ORDER": 2,
        "B_ORDER": 2,
        "A_2_0": 1e-4,
    }
    seen = read_observation(written(tmp_path / "a.fits", wcs=cards), sigma=0.1)
    assert "distortions" in seen.remarks
    assert seen.grid.spacing == pytest.approx((SCALE, SCALE), rel=2e-3)


def test_noise_in_other_units_is_noticed(tmp_path: Path) -> None:
    seen = read_observation(written(tmp_path / "a.fits"), sigma=0.3)
    assert seen.sky_scatter == pytest.approx(1 / 3, abs=0.1)
    assert "neighbours share noise" in seen.remarks


def refused(tmp_path: Path) -> dict[str, tuple[str, Any]]:
    dark = np.zeros((NY, NX), np.int16)
    negative = np.full((NY, NX), 0.01)
    negative[3, 3] = -1
    lost = science()
    lost[:] = np.nan
    named = tmp_path / "named.fits"
    written(named, ERR=np.full((NY, NX), 0.1), WHT=np.full((NY, NX), 1.0))
    junk = tmp_path / "junk.fits"
    junk.write_bytes(b"not a FITS file" * 300)
    table = tmp_path / "table.fits"
    fits.HDUList([fits.PrimaryHDU(), fits.BinTableHDU.from_columns([fits.Column("a", "E", array=[1.0])])]).writeto(
        table
    )
    plain = written(tmp_path / "plain.fits")
    off = fits.PrimaryHDU(np.full((NY, NX), 0.1))
    off.header["BUNIT"] = "Jy"
    off.writeto(tmp_path / "off.fits")
    return {
        "no unit": ("no BUNIT; say", lambda: read_observation(written(tmp_path / "u.fits", unit=""), sigma=0.1)),
        "no wcs": ("no WCS; say", lambda: read_observation(written(tmp_path / "w.fits", wcs={}), sigma=0.1)),
        "wcs and scale": ("by its WCS", lambda: read_observation(plain, sigma=0.1, pixel_scale=0.05)),
        "scale": ("positive number of arcsec", lambda: read_observation(plain, sigma=0.1, pixel_scale=-1)),
        "no noise": ("holds no noise map; say", lambda: read_observation(plain)),
        "two noises": ("holds ERR and WHT; say", lambda: read_observation(named)),
        "two given": ("error and sigma; give one", lambda: read_observation(plain, error=negative, sigma=1.0)),
        "negative variance": ("negative at 1 of 192", lambda: read_observation(plain, variance=negative)),
        "sigma": ("positive and finite", lambda: read_observation(plain, sigma=0.0)),
        "noise shape": ("cut both alike", lambda: read_observation(plain, error=np.ones((3, 3)))),
        "noise units": ("is in Jy and the data are in", lambda: read_observation(plain, error=tmp_path / "off.fits")),
        "psf sum": ("sums to 2 and not to 1", lambda: read_observation(plain, sigma=0.1, psf=2 * kernel())),
        "psf negative": ("no point-spread", lambda: read_observation(plain, sigma=0.1, psf=-kernel())),
        "psf large": ("larger than the image", lambda: read_observation(plain, sigma=0.1, psf=kernel(13, 5))),
        "psf nan": ("finite image", lambda: read_observation(plain, sigma=0.1, psf=kernel() * np.nan)),
        "mask all": ("has no pixel left", lambda: read_observation(plain, sigma=0.1, mask=dark, mask_good=True)),
        "all nan": (
            "192 of 192 are not finite",
            lambda: read_observation(written(tmp_path / "n.fits", SCI=lost), sigma=1.0),
        ),
        "mask sense": ("mask_good=True", lambda: read_observation(plain, sigma=0.1, mask=dark)),
        "extension": ("no extension 'NOPE'", lambda: read_observation(plain, error="[NOPE]")),
        "number": ("not number 7", lambda: read_observation(f"{plain}[7]", sigma=1.0)),
        "not fits": ("not a complete FITS file", lambda: read_observation(junk, sigma=1.0)),
        "table": ("holds no image", lambda: read_observation(table, sigma=1.0)),
        "cube": (
            "\\(ny, nx\\) is expected",
            lambda: read_observation(written(tmp_path / "c.fits", SCI=np.zeros((2, 3, 4))), sigma=1.0),
        ),
        "oversampling": ("whole number", lambda: read_observation(plain, sigma=1.0, psf=kernel(), psf_oversampling=0)),
        "grid": ("\\(y, x\\) in arcsec", lambda: write_maps(tmp_path / "m.fits", {}, Grid((3, 4), (1.0, 1.0)))),
        "map": (
            "give one grid",
            lambda: write_maps(tmp_path / "m.fits", {"A": np.zeros((2, 2))}, read_observation(plain, sigma=1.0).grid),
        ),
    }


CASES = (
    "no unit|no wcs|wcs and scale|scale|no noise|two noises|two given|negative variance|sigma|noise shape|noise units|"
    "psf sum|psf negative|psf large|psf nan|mask all|all nan|mask sense|extension|number|not fits|table|cube|"
    "oversampling|grid|map"
).split("|")


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_sentence(case: str, tmp_path: Path) -> None:
    sentence, call = refused(tmp_path)[case]
    with pytest.raises(ValueError, match=sentence) as caught:
        call()
    assert str(caught.value).endswith((".", ")."))


def test_a_missing_file_and_a_missing_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="There is no file"):
        read_observation(tmp_path / "nowhere.fits", sigma=1.0)
    import sys

    monkeypatch.setitem(sys.modules, "astropy", None)
    with pytest.raises(ImportError, match=r"invgen\[lensing\]"):
        read_observation(tmp_path / "nowhere.fits", sigma=1.0)


def test_a_psf_that_is_asked_to_be_scaled_is(tmp_path: Path) -> None:
    seen = read_observation(written(tmp_path / "a.fits"), sigma=0.1, psf=3 * kernel(), normalise_psf=True)
    assert seen.psf is not None
    np.testing.assert_allclose(seen.psf.numpy(), kernel(), rtol=1e-12)
    assert "summed to 3" in seen.remarks
    shifted = read_observation(tmp_path / "a.fits", sigma=0.1, psf=np.roll(kernel(), 1, axis=0))
    assert "centroid" in shifted.remarks


def test_identity_and_units_of_the_grid(full: Path) -> None:
    seen: Observation = read_observation(full, units="nJy/pixel")
    assert seen.grid.channel_units == ("nJy/pixel",)
    assert seen.term(Identity((1, NY, NX)), name="F814W").name == "F814W"
