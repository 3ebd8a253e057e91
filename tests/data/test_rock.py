"""Crops of a volume: windows of it in one of 48 orientations, from memory or from disk."""

from __future__ import annotations

import io
import zipfile
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest

from invgen.data.rock import RockCrops, open_volume

RNG = np.random.default_rng(1)
VOLUME = (RNG.random((12, 14, 16)) < 0.3).astype(np.uint8) * 255


def windows(volume: np.ndarray, size: tuple[int, int, int]) -> set[bytes]:
    view = np.lib.stride_tricks.sliding_window_view(volume, size)
    return {w.tobytes() for w in view.reshape(-1, *size)}


def test_a_slice_is_a_window_of_the_volume_in_some_orientation() -> None:
    crops = RockCrops(VOLUME, shape=(6, 7)).sample(60, seed=1)[:, 0] > 0
    every = set()
    for order in permutations(range(3)):
        turned = np.transpose(VOLUME > 0, order)
        for a, b in product((1, -1), repeat=2):
            every |= windows(turned[:, ::a, ::b], (1, 6, 7))
    assert all(crop.tobytes() in every for crop in crops)


def test_a_block_without_flips_is_a_plain_window() -> None:
    crops = RockCrops(VOLUME, shape=(4, 5, 6), flips=False).sample(40, seed=2)[:, 0] > 0
    every = windows(VOLUME > 0, (4, 5, 6))
    assert all(crop.tobytes() in every for crop in crops)


def test_all_48_orientations_occur() -> None:
    marked = np.zeros((3, 3, 3), dtype=np.uint8)
    marked[0, 0, 1] = marked[0, 0, 2] = marked[0, 2, 0] = 1  # no symmetry of its own
    seen = {crop.tobytes() for crop in RockCrops(marked, shape=(3, 3, 3)).sample(600, seed=3)}
    assert len(seen) == 48


def test_porosity_is_the_share_of_pores_and_crops_have_it_on_average() -> None:
    rock = RockCrops(VOLUME, shape=(8, 8))
    assert rock.porosity() == pytest.approx((VOLUME == 255).mean())
    share = rock.sample(1500, seed=4).mean((1, 2, 3))
    # Windows weigh the interior more than the faces: 0.3 is what every voxel has.
    assert abs(share.mean() - 0.3) < 0.03
    grains = RockCrops(VOLUME, shape=(8, 8), pore=0)
    np.testing.assert_array_equal(grains.sample(5, seed=4), 1.0 - rock.sample(5, seed=4))


def test_regions_share_no_voxel() -> None:
    numbered = np.zeros((20, 20, 20), dtype=np.uint8)
    numbered[10:] = 1
    first = RockCrops(numbered, shape=(8, 8), region=(0.0, 0.5), pore=0)
    second = RockCrops(numbered, shape=(8, 8), region=(0.5, 1.0), pore=1)
    assert first.sample(50).min() == 1.0
    assert second.sample(50).min() == 1.0
    assert first.porosity() == second.porosity() == 1.0


def test_files_are_mapped_and_give_the_same_crops(tmp_path: Path) -> None:
    np.save(tmp_path / "rock.npy", VOLUME)
    VOLUME.tofile(tmp_path / "rock.raw")
    expected = RockCrops(VOLUME, shape=(6, 6)).sample(8, seed=5)
    for volume in (open_volume(tmp_path / "rock.npy"), open_volume(tmp_path / "rock.raw", (12, 14, 16))):
        assert isinstance(volume, np.memmap)
        np.testing.assert_array_equal(RockCrops(volume, shape=(6, 6)).sample(8, seed=5), expected)
    big = VOLUME.astype(">u2")
    big.tofile(tmp_path / "big.raw")
    np.testing.assert_array_equal(open_volume(tmp_path / "big.raw", (12, 14, 16), ">u2"), VOLUME)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    VOLUME.tofile(tmp_path / "rock.raw")
    np.save(tmp_path / "flat.npy", VOLUME[0])
    (tmp_path / "broken.npy").write_bytes(b"nothing")
    (tmp_path / "rock.tif").write_bytes(b"II")
    with pytest.raises(FileNotFoundError, match="check the path"):
        open_volume(tmp_path / "none.npy")
    with pytest.raises(ValueError, match="give its shape"):
        open_volume(tmp_path / "rock.raw")
    with pytest.raises(ValueError, match="bytes but"):
        open_volume(tmp_path / "rock.raw", (12, 14, 17))
    with pytest.raises(ValueError, match="three axes"):
        open_volume(tmp_path / "flat.npy")
    with pytest.raises(ValueError, match="not a complete"):
        open_volume(tmp_path / "broken.npy")
    with pytest.raises(ValueError, match="neither"):
        open_volume(tmp_path / "rock.tif")


@pytest.mark.parametrize(
    ("volume", "settings", "message"),
    [(VOLUME[0], {}, "three-dimensional"), (np.zeros((0, 4, 4)), {}, "three-dimensional"),
     (RNG.random((12, 12, 12)), {"shape": (4, 4)}, "two are expected"), (np.zeros((9, 9, 9)), {"shape": (4, 4)}, "only the value"),
     (np.full((9, 9, 9), np.nan), {"shape": (4, 4)}, "finite"), (VOLUME, {"shape": (13, 4)}, "do not fit"),
     (VOLUME, {"shape": (13, 4, 4), "flips": False}, "do not fit"), (VOLUME, {"shape": (4, 4), "pore": 7}, "name one"),
     (VOLUME, {"shape": (4, 4), "region": (0.5, 0.5)}, "region must"), (VOLUME, {"shape": (4,)}, "shape must"),
     (VOLUME, {"shape": (4, 4), "voxel": 0.0}, "voxel must"), ([1, 2], {}, "three-dimensional")],
)  # fmt: skip
def test_bad_volumes_and_settings_are_refused(volume: np.ndarray, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RockCrops(volume, **settings)


@pytest.mark.data
def test_berea_sandstone_has_its_porosity(data_dir: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    with zipfile.ZipFile(data_dir / "rock" / "berea.zip") as archive:
        stack = image.open(io.BytesIO(archive.read("berea.tif")))
    planes = []
    for k in range(0, 80):
        stack.seek(k)
        planes.append(np.asarray(stack))
    rock = RockCrops(np.stack(planes), shape=(64, 64), voxel=3.0)
    assert rock.porosity() == pytest.approx(0.196, abs=0.03)
    share = rock.sample(200).mean((1, 2, 3))
    assert abs(share.mean() - rock.porosity()) < 5.0 * share.std() / 200**0.5
