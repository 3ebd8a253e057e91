"""Arrays in files: what is read back, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from invgen.data.io import read_array, write_array


def test_round_trip_and_choice_in_an_archive(tmp_path: Path) -> None:
    a = np.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(read_array(write_array(tmp_path / "new" / "a.npy", a)), a)
    np.savez(tmp_path / "two.npz", a=a, b=2 * a)
    np.testing.assert_array_equal(read_array(f"{tmp_path}/two.npz:b"), 2 * a)
    with pytest.raises(ValueError, match=r"holds a, b; pick one"):
        read_array(tmp_path / "two.npz")
    with pytest.raises(ValueError, match="holds no 'c'"):
        read_array(tmp_path / "two.npz", "c")


def test_refused_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        read_array(tmp_path / "gone.npy")
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "s.npy", np.array(["a"]))
    np.save(tmp_path / "t.npy", np.zeros(100))
    whole = (tmp_path / "t.npy").read_bytes()
    (tmp_path / "t.npy").write_bytes(whole[:200])
    np.savez(tmp_path / "z.npz", a=np.zeros(100))
    (tmp_path / "z.npz").write_bytes((tmp_path / "z.npz").read_bytes()[:100])
    for name in ("o.npy", "t.npy", "z.npz"):
        with pytest.raises(ValueError, match="not a complete array file"):
            read_array(tmp_path / name)
    with pytest.raises(ValueError, match="numbers are expected"):
        read_array(tmp_path / "s.npy")
    with pytest.raises(ValueError, match=r"written as \.npy"):
        write_array(tmp_path / "x.txt", np.zeros(1))
