"""Observations and reference posteriors: the published files where `make peers` put them, otherwise made here.

The published ones are ten observations a task with 10,000 posterior draws each, CSV files of the package sbibm, which are
read without importing it. Without them the observations are simulated at ten draws of the prior, and the draws are those of
the task's exact sampler: the same protocol on other observations.
"""

from __future__ import annotations

import bz2
import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sbi_tasks.task import Task

__all__ = ["Reference", "published_files", "references"]

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, eq=False)
class Reference:
    """One observation: data `data_shape`, the `truth` that made them, posterior draws `samples` `(n, dim)`, float32.

    `source` is "sbibm" for published files, "exact" otherwise.
    """

    data: Tensor
    truth: Tensor
    samples: Tensor
    source: str


def published_files(name: str) -> Path | None:
    """Folder of a task's files in the peers' environment (`PEERS`, or `.peers`), None where there is none."""
    peers = Path(os.environ.get("PEERS", ".peers"))
    found = sorted(
        (peers if peers.is_absolute() else ROOT / peers).glob(f"lib/python*/site-packages/sbibm/tasks/{name}/files")
    )
    return found[0] if found else None


def _table(path: Path) -> Tensor:
    text = bz2.decompress(path.read_bytes()).decode() if path.suffix == ".bz2" else path.read_text()
    return torch.from_numpy(np.loadtxt(io.StringIO(text), delimiter=",", skiprows=1, ndmin=2)).float()


def references(task: Task, count: int = 10, samples: int = 10_000, *, published: bool = True) -> list[Reference]:
    """The first `count` observations of a task.

    Args:
        task: of `TASKS`. count: at most 10. samples: posterior draws of each, at most 10,000.
        published: take the files of sbibm where they are.
    """
    folder = published_files(task.name) if published else None
    out = []
    for i in range(count):
        if folder is not None:
            one = folder / f"num_observation_{i + 1}"
            draws = _table(one / "reference_posterior_samples.csv.bz2")[:samples]
            data, truth = _table(one / "observation.csv")[0], _table(one / "true_parameters.csv")[0]
            out.append(Reference(data.reshape(task.data_shape), truth, draws, "sbibm"))
        else:
            truth = task.prior.sample(count, seed=1000)[i]
            data = task.problem(torch.zeros(task.data_shape)).simulate(count, seed=1000)[2][0][i]
            out.append(Reference(data, truth, task.posterior(data, samples, seed=2000 + i).float(), "exact"))
    return out
