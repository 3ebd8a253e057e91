import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from invgen.checkpoints import read_checkpoint, write_checkpoint

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3).mT,
    "n": torch.tensor(3),
    "half": torch.ones(2, dtype=torch.bfloat16),
    "flag": torch.tensor([True]),
}


def test_round_trip(tmp_path):
    path = write_checkpoint(
        tmp_path / "deep" / "er" / "c.safetensors", "run", TENSORS, {"step": 3, "names": ["x", "é"]}
    )
    tensors, meta = read_checkpoint(path, "run")
    assert {k: v.dtype for k, v in tensors.items()} == {k: v.dtype for k, v in TENSORS.items()}
    assert all(torch.equal(tensors[k], v) for k, v in TENSORS.items())
    assert meta == {"kind": "run", "step": 3, "names": ["x", "é"]}
    write_checkpoint(path, "run", {}, {"kind": "impostor"})
    assert read_checkpoint(path, "run") == ({}, {"kind": "run"})


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o022)
    try:
        assert write_checkpoint(tmp_path / "c", "run", TENSORS, {}).stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(old)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, error):
    path = write_checkpoint(tmp_path / "c", "run", TENSORS, {"step": 1})

    def fail(*_):
        raise error

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(error):
        write_checkpoint(path, "run", TENSORS, {"step": 2})
    monkeypatch.undo()
    assert read_checkpoint(path, "run")[1]["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


class Boom:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def test_foreign_files_are_refused_with_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = write_checkpoint(tmp_path / "c", "run", TENSORS, {}).read_bytes()
    files = {
        "empty": b"",
        "pickle": pickle.dumps(Boom()),
        "text": b"not a checkpoint",
        "half": whole[: len(whole) // 2],
        "short": whole[:-1],
        "header": whole[:4],
        "huge": b"\xff" * 64,
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="not a complete safetensors checkpoint"):
            read_checkpoint(tmp_path / name, "run")
    torch.save({"weights": Boom()}, tmp_path / "torch.pt")
    with pytest.raises(ValueError, match="pickled or truncated"):
        read_checkpoint(tmp_path / "torch.pt", "run")
    assert not (tmp_path / "executed").exists()
    for metadata in (None, {"other": "1"}, {"invgen": "{"}, {"invgen": "3"}):
        save_file({"a": torch.ones(2)}, tmp_path / "foreign", metadata=metadata)
        with pytest.raises(ValueError, match="another program"):
            read_checkpoint(tmp_path / "foreign", "run")
    with pytest.raises(ValueError, match="'run' checkpoint but a 'DiffusionPrior'"):
        read_checkpoint(tmp_path / "c", "DiffusionPrior")
    with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
        read_checkpoint(tmp_path / "nowhere", "run")


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="choose a folder that can be written to"):
        write_checkpoint(tmp_path / "file" / "c", "run", TENSORS, {})
