"""Galaxies: flux as stated, Sérsic profiles as defined, arms that keep the mean, kinds that differ."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from invgen.data import _galaxy_parts as parts
from invgen.data.galaxies import SersicGalaxies


def shape_of(image: np.ndarray) -> tuple[float, float, float]:
    """Axis ratio, asymmetry under rotation by 180 degrees and concentration 5 log10(r80/r20) of one image."""
    n = image.shape[0]
    y, x = np.mgrid[:n, :n] - 0.5 * (n - 1)
    w = np.where((np.hypot(x, y) < 0.45 * n) & (image > 0.02 * image.max()), image, 0.0).astype(float)
    total = w.sum()
    centre = (w * y).sum() / total, (w * x).sum() / total
    x, y = x - centre[1], y - centre[0]
    second = np.array([[(w * x * x).sum(), (w * x * y).sum()], [(w * x * y).sum(), (w * y * y).sum()]])
    low, high = np.linalg.eigvalsh(second)
    r = np.hypot(x, y).ravel()
    order = np.argsort(r)
    grown = np.cumsum(w.ravel()[order]) / total
    r20, r80 = (r[order][np.searchsorted(grown, v)] for v in (0.2, 0.8))
    centred = ndimage.shift(w, (-centre[0], -centre[1]), order=1)
    asymmetry = np.abs(centred - centred[::-1, ::-1]).sum() / (2 * total)
    return float(np.sqrt(low / high)), float(asymmetry), float(5 * np.log10(r80 / r20))


def test_the_image_adds_up_to_the_flux_of_its_magnitude() -> None:
    for magnitude in (18.0, 23.0):
        x = SersicGalaxies(magnitude=(magnitude, magnitude)).sample(24, seed=1)
        np.testing.assert_allclose(x.sum((1, 2, 3), dtype=float), 3631e9 * 10 ** (-0.4 * magnitude), rtol=1e-4)
        assert (x > 0).all()
    assert SersicGalaxies().grid.channel_units == ("nJy/pixel",)


@pytest.mark.parametrize("n", [0.5, 1.0, 2.5, 4.0, 6.0])
def test_a_sersic_profile_has_unit_light_and_half_of_it_within_its_radius(n: float) -> None:
    r = np.geomspace(1e-7, 3e3, 200_000).astype(np.float32)
    index, q = np.array(n), np.array(0.6)
    light = parts.sersic(r, np.array(0.7), index, q).astype(float) * 2.0 * np.pi * 0.6 * r
    grown = np.concatenate([[0.0], np.cumsum(0.5 * (light[1:] + light[:-1]) * np.diff(r.astype(float)))])
    assert grown[-1] == pytest.approx(1.0, abs=2e-3)
    assert np.interp(0.7, r, grown) == pytest.approx(0.5, abs=2e-3)


def test_arms_keep_the_mean_of_every_circle() -> None:
    angle = np.linspace(-np.pi, np.pi, 2000, endpoint=False, dtype=np.float32)
    for radius in (0.2, 1.0, 3.0):
        wave = parts.spiral(
            np.float32(radius), angle, np.array(3.0), np.array(0.3), np.array(0.5), np.array(1.0), np.array(2.0)
        )
        assert wave.mean() == pytest.approx(1.0, abs=1e-5)
        assert wave.max() > 3.0 * wave.min()


def test_arms_wind_with_their_pitch() -> None:
    """The crest moves by ln(R2/R1)/tan(pitch) from R1 to R2."""
    angle = np.linspace(-np.pi, np.pi, 7200, endpoint=False)
    pitch, arms = np.array(0.4), np.array(2.0)
    crest = [
        angle[np.argmax(parts.spiral(np.float32(r), angle, arms, pitch, np.array(0.5), np.array(0.0), np.array(2.0)))]
        for r in (1.0, 1.3)
    ]
    turned = (crest[1] - crest[0] - np.log(1.3) / np.tan(0.4) + np.pi / 2) % np.pi - np.pi / 2
    assert abs(turned) < 0.01


def test_kinds_look_like_what_they_are() -> None:
    def draw(kind: int) -> np.ndarray:
        kinds = tuple(float(k == kind) for k in range(3))
        images = SersicGalaxies(kinds=kinds, half_light=(0.3, 0.3), psf_fwhm=0.05).sample(60, seed=2)[:, 0]
        return np.array([shape_of(image) for image in images])

    elliptical, disc, irregular = (draw(k) for k in range(3))
    assert elliptical[:, 1].max() < 0.12  # smooth: what asymmetry there is comes from centres between pixels
    assert np.median(irregular[:, 1]) > 2.0 * np.median(elliptical[:, 1])
    assert np.median(disc[:, 1]) > np.median(elliptical[:, 1])
    assert np.quantile(disc[:, 0], 0.1) < 0.45  # discs seen from the side
    assert elliptical[:, 0].min() > 0.4
    assert np.median(elliptical[:, 2]) > np.median(irregular[:, 2]) + 0.2


def test_galaxies_are_centred_and_point_everywhere() -> None:
    images = SersicGalaxies(kinds=(1.0, 0.0, 0.0)).sample(120, seed=3)[:, 0].astype(float)
    y, x = np.mgrid[:64, :64] - 31.5
    total = images.sum((1, 2))
    assert np.abs((images * x).sum((1, 2)) / total).max() < 1.0
    angle = 0.5 * np.arctan2(2 * (images * x * y).sum((1, 2)), (images * (x * x - y * y)).sum((1, 2)))
    assert np.abs(np.exp(2j * angle).mean()) < 4.0 / 120**0.5


def test_the_point_spread_function_blurs_and_keeps_the_flux() -> None:
    sharp, blurred = (SersicGalaxies(psf_fwhm=f).sample(12, seed=4) for f in (0.0, 0.3))
    assert (blurred.max((1, 2, 3)) < 0.8 * sharp.max((1, 2, 3))).all()
    np.testing.assert_allclose(blurred.sum((1, 2, 3)), sharp.sum((1, 2, 3)), rtol=1e-3)


def test_sizes_are_arcseconds_whatever_the_pixels() -> None:
    coarse = SersicGalaxies(shape=(32, 32), spacing=(0.1, 0.1), psf_fwhm=0.3).sample(16, seed=5)
    fine = SersicGalaxies(shape=(64, 64), spacing=(0.05, 0.05), psf_fwhm=0.3).sample(16, seed=5)
    binned = fine.reshape(16, 1, 32, 2, 32, 2).sum((3, 5))
    difference = np.abs(binned - coarse).sum((1, 2, 3)) / coarse.sum((1, 2, 3))
    assert np.median(difference) < 0.08  # centres are drawn in pixels: up to a half of one


@pytest.mark.data
def test_shapes_lie_in_the_range_of_real_galaxies(data_dir: Path) -> None:
    """400 DECaLS stamps: the middle of our axis ratios and concentrations lies within the spread of theirs."""
    real = np.load(data_dir / "galaxies" / "decals_rgb_400_64.npz")["images"].mean(-1)
    real = real - np.median(real[:, :4], axis=(1, 2))[:, None, None]
    ours = SersicGalaxies(psf_fwhm=0.12).sample(200, seed=6)[:, 0]
    ours = np.arcsinh(ours / (2.0 * np.quantile(ours, 0.8, axis=(1, 2), keepdims=True)))  # stamps come stretched
    theirs = np.array([shape_of(np.maximum(i, 0.0)) for i in real])
    mine = np.array([shape_of(i) for i in ours])
    for k in (0, 2):
        low, high = np.quantile(theirs[:, k], [0.1, 0.9])
        assert low < np.median(mine[:, k]) < high
