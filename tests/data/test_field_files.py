"""Fields from files: every format gives the same field, axes and sampling are asked for, oddities are counted."""

from __future__ import annotations

import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from invgen.data.field_files import read_field
from invgen.data.io import read_array
from invgen.data.segy import write_segy
from invgen.grid import Grid

X = np.random.default_rng(0).standard_normal((2, 5, 4)).astype(np.float32)  # x, z, channel


def stored(folder: Path, kind: str) -> str:
    if kind == "npy":
        np.save(folder / "a.npy", X)
        return f"{folder}/a.npy"
    if kind == "npz":
        np.savez(folder / "a.npz", model=X, other=X[0])
        return f"{folder}/a.npz:model"
    if kind == "h5":
        with h5py.File(folder / "a.h5", "w") as f:
            f["deep/model"], f["other"] = X.astype(">f4"), X[0]
        return f"{folder}/a.h5:/deep/model"
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(f"{folder}/a.zarr", mode="w")
    for name, value in (("deep/model", X), ("other", X[0])):
        group.create_array(name, shape=value.shape, dtype=value.dtype, chunks=(1,) * value.ndim)[...] = value
    return f"{folder}/a.zarr:/deep/model"


@pytest.mark.parametrize("kind", ["npy", "npz", "h5", "zarr"])
def test_every_format_gives_the_same_field(tmp_path: Path, kind: str) -> None:
    path = stored(tmp_path, kind)
    np.testing.assert_array_equal(read_array(path), X)
    sampling = {"spacing": {"z": 5.0, "x": 12.5}, "origin": {"z": 100.0}, "units": {"z": "m", "x": "m"}}
    field = read_field(path, "xzc", **sampling, channels=("vp", "vs", "rho", "q"))
    np.testing.assert_array_equal(field.values.numpy(), X.transpose(2, 1, 0))
    assert field.values.dtype == torch.float32
    assert field.grid == Grid((5, 2), (5.0, 12.5), (100.0, 0.0), ("z", "x"), ("m", "m"), ("vp", "vs", "rho", "q"))
    assert field.mask.all()
    assert read_field(path, "cyt").values.shape == (2, 4, 5)
    assert read_field(path, "cyt").grid is None
    assert read_field(path, "xzy").values.shape == (1, 5, 4, 2)


def test_values_that_are_not_finite_and_whole_numbers(tmp_path: Path) -> None:
    x = X.copy()
    x[0, 1, 2], x[1, 1, 1] = np.nan, np.inf
    np.save(tmp_path / "a.npy", x)
    with pytest.warns(UserWarning, match="2 of 40 values are not finite and masked"):
        field = read_field(tmp_path / "a.npy", "xzc")
    np.testing.assert_array_equal(field.mask.numpy(), np.isfinite(x).transpose(2, 1, 0))
    assert torch.isfinite(field.values).all()
    assert field.counts == {"not_finite": 2}
    np.save(tmp_path / "b.npy", np.array([[1, 2], [3, 2**24 + 1]]))
    assert read_field(tmp_path / "b.npy", "zx").values.dtype == torch.float64
    np.save(tmp_path / "b.npy", np.array([[True, False]]))
    assert read_field(tmp_path / "b.npy", "zx").values.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "axes are not known"),
        ({"axes": "xz"}, "does not describe the array"),
        ({"axes": "xzz"}, "does not describe the array"),
        ({"axes": "xzq"}, "does not describe the array"),
        ({"axes": "xzt"}, "two vertical axes"),
        ({"axes": "xzc", "spacing": {"z": 1.0}}, r"spacing lacks the axes \['x'\]"),
        ({"axes": "xzc", "spacing": {"z": 1.0, "x": 1.0, "y": 1.0}}, "spacing names the axes"),
        ({"axes": "xzc", "units": {"z": "m"}}, "need spacing too"),
        ({"axes": "xzc", "channels": ("vp",)}, "has 4 channels"),
        ({"axes": "xzc", "dt": 0.004}, "belong to SEG-Y files"),
    ],
)
def test_descriptions_that_do_not_fit(tmp_path: Path, arguments: dict, words: str) -> None:
    np.save(tmp_path / "a.npy", X)
    with pytest.raises(ValueError, match=words):
        read_field(tmp_path / "a.npy", **arguments)


def test_segy_knows_its_axes(tmp_path: Path) -> None:
    path = write_segy(tmp_path / "a.sgy", X[0], dt=0.004)
    field = read_field(path, channels=("seismic",))
    np.testing.assert_array_equal(field.values[0].numpy(), X[0])
    assert field.grid is not None
    assert field.grid.channels == ("seismic",)
    assert field.source.counts == field.counts
    with pytest.warns(UserWarning, match="overruled"):
        assert read_field(path, dt=0.002).grid.spacing[0] == 0.002
    with pytest.raises(ValueError, match="leave axes, spacing out"):
        read_field(path, "tx", spacing={"t": 0.004})


def test_stores_that_cannot_be_read(tmp_path: Path) -> None:
    stored(tmp_path, "h5")
    with pytest.raises(ValueError, match=r"holds /deep/model, /other; pick one with a\.h5:/PATH"):
        read_array(tmp_path / "a.h5")
    with pytest.raises(ValueError, match="holds no array 'gone'"):
        read_array(f"{tmp_path}/a.h5:gone")
    with h5py.File(tmp_path / "text.h5", "w") as f:
        f["words"] = ["a", "b"]
    with pytest.raises(ValueError, match="numbers are expected"):
        read_array(tmp_path / "text.h5")
    whole = (tmp_path / "a.h5").read_bytes()
    (tmp_path / "a.h5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a complete HDF5 file"):
        read_array(f"{tmp_path}/a.h5:/other")
    with pytest.raises(FileNotFoundError, match="no file"):
        read_array(tmp_path / "gone.h5")


def test_zarr_stores_that_cannot_be_read(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    stored(tmp_path, "zarr")
    with pytest.raises(ValueError, match="pick one with"):
        read_array(tmp_path / "a.zarr")
    with pytest.raises(ValueError, match="holds no array '/gone'"):
        read_array(f"{tmp_path}/a.zarr:/gone")
    with pytest.raises(FileNotFoundError, match="no file"):
        read_array(tmp_path / "gone.zarr")
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(ValueError, match="not a zarr store"):
        read_array(tmp_path / "empty.zarr")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zarr.save_array(f"{tmp_path}/one.zarr", X)
    np.testing.assert_array_equal(read_array(tmp_path / "one.zarr"), X)
    meta = next(iter([*(tmp_path / "one.zarr").glob("zarr.json"), *(tmp_path / "one.zarr").glob(".zarray")]))
    meta.write_text(meta.read_text().replace("zstd", "pickle"))
    with pytest.raises(ValueError, match="pickled values, which are not read"):
        read_array(tmp_path / "one.zarr")
