"""Two processes that share every batch train as one does."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

# One process imports everything and forks the runs; it never runs a backward pass itself.
RUN = """
import json, os, sys, torch
torch.set_num_threads(1)
from torch import nn
import lightning_fabric, rich.progress
from invgen.priors.training import ArrayData, Training
from invgen.transforms import Identity

class Fit(nn.Module):
    shape, grid, transform = (2, 4, 4), None, Identity()

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.map = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)

    def training_loss(self, batch, generator):
        x = batch["x"]
        return (self.map(x) - 2 * x.mean(1, keepdim=True)[..., 1:, 1:]).square().flatten(1).sum(1)

def run(count, rank):
    data = ArrayData(torch.randn(64, 2, 4, 4, generator=torch.Generator().manual_seed(1)))
    prior = Fit(rank)  # processes that start from other weights get those of the first
    training = Training(steps=12, batch_size=8, warmup=3, log_every=4, devices=count, strategy="ddp" if count > 1 else "auto",
                        checkpoint=f"run{count}.ckpt", log=f"log{count}.csv")
    report = training.fit(prior, data, progress=False)
    with open(f"out{count}{rank}.json", "w") as file:
        json.dump({"weights": prior.map.weight.flatten().tolist(), "losses": report.losses}, file)

children = []
for count in (1, 2):
    for rank in range(count):
        if count > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                           "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[1]}
        pid = os.fork()
        if pid == 0:
            run(count, rank)
            os._exit(0)
        children.append(pid)
sys.exit(sum(os.waitpid(pid, 0)[1] != 0 for pid in children))
"""


@pytest.mark.skipif(not (hasattr(os, "fork") and torch.distributed.is_available()), reason="needs POSIX and gloo")
def test_two_processes_train_as_one(tmp_path):
    (tmp_path / "run.py").write_text(RUN)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    done = subprocess.run(
        [sys.executable, "run.py", port], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    alone, first, second = (json.loads((tmp_path / f"out{name}.json").read_text()) for name in ("10", "20", "21"))
    assert first["weights"] == second["weights"]
    assert first["weights"] == pytest.approx(alone["weights"], rel=1e-5, abs=1e-6)
    assert [v for _, v in first["losses"]] == pytest.approx([v for _, v in alone["losses"]], rel=1e-5)
    for name in ("log1.csv", "log2.csv"):  # one process writes
        assert len((tmp_path / name).read_text().splitlines()) == 4
