"""Training data in arrays and files: what a batch is, and what is refused before the first step."""

import pickle
import sys

import numpy as np
import pytest
import torch
from torch import nn

from invgen.data.toys import TwoMoons
from invgen.priors import ArrayData, HDF5Data, MemmapData, Training, ZarrData
from invgen.transforms import Identity

torch.set_num_threads(1)
X = np.random.default_rng(0).standard_normal((50, 1, 4, 6)).astype(np.float32)


def npy(folder, x=X):
    np.save(folder / "x.npy", x)
    return MemmapData(folder / "x.npy")


def hdf5(folder, x=X):
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "x.h5", "w") as file:
        file.create_dataset("fields/x", data=x, chunks=(1, *x.shape[1:]))
    return HDF5Data(folder / "x.h5")


def zarr(folder, x=X):
    module = pytest.importorskip("zarr")
    module.save_array(str(folder / "x.zarr"), x)
    return ZarrData(folder / "x.zarr")


@pytest.mark.parametrize("make", [npy, hdf5, zarr])
def test_a_file_gives_the_batches_of_the_tensor(tmp_path, make):
    data, tensor = make(tmp_path), ArrayData(torch.from_numpy(X))
    assert len(data) == 50
    assert data.shape == (1, 4, 6)
    for step, size in ((0, 8), (6, 8), (0, 120)):  # inside an epoch, across two, across three
        assert torch.equal(data.batch(step, size, 3)["x"], tensor.batch(step, size, 3)["x"])
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again.batch(1, 8, 0)["x"], data.batch(1, 8, 0)["x"])
    assert torch.equal(data.rows(3, 6), torch.from_numpy(X[3:6]))


@pytest.mark.parametrize("make", [npy, hdf5, zarr])
def test_rows_are_kept_apart_and_numbers_become_float32(tmp_path, make):
    numbers = np.arange(20, dtype=np.int16)[:, None] * np.ones((20, 3), np.int16)
    whole = make(tmp_path, numbers)
    cut = type(whole)(whole.file, start=5, stop=9)
    assert len(cut) == 4
    seen = cut.batch(0, 12, 0)["x"]
    assert seen.dtype == torch.float32
    assert sorted(seen[:, 0].tolist()) == sorted([5.0, 6.0, 7.0, 8.0] * 3)
    with pytest.raises(ValueError, match="which has 20"):
        type(whole)(whole.file, start=5, stop=30)


def test_a_mapped_file_is_not_read_as_a_whole(tmp_path):
    shape = (1_000_000, 64, 64)  # 16 GB, of which nothing is on the disk
    np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.float32, shape=shape)
    data = MemmapData(tmp_path / "x.npy")
    assert len(data) == 1_000_000
    assert data.batch(0, 4, 0)["x"].shape == (4, 64, 64)


def test_files_that_are_not_what_they_should_be(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no file"):
        MemmapData(tmp_path / "gone.npy")
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY nothing")
    with pytest.raises(ValueError, match=r"not a complete \.npy file"):
        MemmapData(tmp_path / "x.npy")
    np.save(tmp_path / "o.npy", np.array([[1, None]], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="pickled"):
        MemmapData(tmp_path / "o.npy")
    with pytest.raises(ValueError, match="real numbers"):
        npy(tmp_path, X.astype(complex))
    with pytest.raises(ValueError, match=r"\(50,\)"):
        npy(tmp_path, X[:, 0, 0, 0])
    with pytest.raises(ValueError, match="not a complete HDF5 file"):
        HDF5Data(tmp_path / "x.npy")
    hdf5(tmp_path)
    with pytest.raises(ValueError, match="it holds fields/x"):
        HDF5Data(tmp_path / "x.h5", "y")
    for name, cls in (("h5py", HDF5Data), ("zarr", ZarrData)):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=f"pip install .*{name}"):
            cls(tmp_path / "x.h5")


class Mean(nn.Module):
    """Learns the mean of fields of one shape, by pooling `levels` times."""

    grid, transform = None, Identity()

    def __init__(self, shape=(1, 4, 6), levels=0):
        super().__init__()
        self.shape, self.levels = shape, levels
        self.mean = nn.Parameter(torch.zeros(()))
        self.calls = 0

    def training_loss(self, batch, generator):
        self.calls += 1
        x = batch["x"]
        for _ in range(self.levels):
            x = nn.functional.avg_pool2d(x, 2)
        return (x - self.mean).square().flatten(1).mean(1)


class Stream:
    def __init__(self, x):
        self.x_ = x

    def batch(self, step, size, seed):
        return {"x": self.x_[:size]}


FIELD = torch.from_numpy(X)
NAN = FIELD.clone()
NAN[7, 0, 1, 1] = float("nan")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (ArrayData(torch.full((9, 1, 4, 6), 2.5)), "all values equal 2.5.*nothing to learn"),
        (ArrayData(FIELD[:1].expand(9, 1, 4, 6)), "one example 9 times"),
        (ArrayData(NAN), "NaN or infinite values in 1 of 50 examples"),
        (ArrayData(FIELD[:1]), "at least two examples, got 1"),
        (ArrayData(FIELD[:0]), "at least two examples, got 0"),
        (ArrayData(FIELD[:, 0]), r"\(50, 4, 6\).*one channel included"),
        (ArrayData(FIELD.int()), "float"),
        (Stream(torch.full((9, 1, 4, 6), 2.5)), "all values equal 2.5"),
        (Stream(NAN), "NaN"),
        (Stream(FIELD[:, :, :3]), r"the prior learns examples of \(1, 4, 6\)"),
        (FIELD, "wrap a tensor as ArrayData"),
        (TwoMoons(), r"\(8, 2\)"),
    ],
)
def test_data_that_cannot_be_learned_from(data, says):
    with pytest.raises(ValueError, match=says):
        Training(steps=2, batch_size=8).fit(Mean(), data, progress=False)


def test_nan_in_a_file_is_found(tmp_path):
    with pytest.raises(ValueError, match="NaN"):
        Training(steps=2, batch_size=8).fit(Mean(), npy(tmp_path, NAN.numpy()), progress=False)


def test_validation_data_are_looked_at_too():
    for bad, says in ((NAN, "validation data hold NaN"), (FIELD[:, 0], "validation data have the shape")):
        with pytest.raises(ValueError, match=says):
            Training(steps=2, batch_size=8).fit(Mean(), ArrayData(FIELD), validation={"x": bad}, progress=False)
    with pytest.raises(ValueError, match='under "x"'):
        Training(steps=2, batch_size=8).fit(Mean(), ArrayData(FIELD), validation={}, progress=False)


def test_a_size_the_network_cannot_downsample():
    prior = Mean(levels=3)
    with pytest.raises(ValueError, match=r"cannot take examples of the shape \(1, 4, 6\)"):
        Training(steps=2, batch_size=8).fit(prior, ArrayData(FIELD), progress=False)
    assert prior.calls == 1  # found before the first step


def test_something_that_cannot_be_trained():
    module = nn.Linear(2, 2)
    module.shape = (2,)
    with pytest.raises(ValueError, match="no training_loss"):
        Training(steps=2, batch_size=8).fit(module, ArrayData(torch.randn(9, 2)), progress=False)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 0}, "steps >= 1"),
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"ema": 1.0}, r"ema is a decay in \[0, 1\)"),
        ({"clip": 0.0}, "must be positive"),
        ({"save_every": 0}, "save_every must be at least 1"),
        ({"precision": "16-mixed"}, "bf16-mixed"),
        ({"patience": 3}, "validate_every"),
        ({"devices": 3}, "does not divide"),
        ({"device": "cuda:1", "devices": 2}, "leave the number out"),
    ],
)
def test_settings_that_make_no_sense(options, says):
    with pytest.raises(ValueError, match=says):
        Training(**options).fit(Mean(), ArrayData(FIELD), progress=False)


def test_patience_needs_something_to_watch():
    with pytest.raises(ValueError, match="needs validation examples"):
        Training(steps=4, batch_size=8, validate_every=2, patience=1).fit(Mean(), ArrayData(FIELD), progress=False)
    with pytest.raises(ValueError, match=r"watches 'beauty'.*validation_loss"):
        Training(steps=4, batch_size=8, validate_every=2, patience=1, monitor="beauty").fit(
            Mean(), ArrayData(FIELD), validation={"x": FIELD}, progress=False
        )


def test_generators_simulate_while_training():
    report = Training(steps=4, batch_size=8, log_every=2).fit(Mean((2,)), TwoMoons(), progress=False)
    assert report.steps == 4
