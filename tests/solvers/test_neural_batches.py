"""Batches of simulations: every row once an epoch, in an order that the seed decides."""

from __future__ import annotations

import pytest
import torch

from invgen.simulations import Simulations
from invgen.solvers._neural_batches import Batches, FreshBatches, StreamedBatches


def _pairs(n):
    rows = torch.arange(n, dtype=torch.float32)
    return rows[:, None], rows[:, None] + 0.5


def test_an_epoch_is_a_permutation_and_pairs_stay_together():
    x, d = _pairs(103)
    batches = Batches(x, d, size=10, seed=1)
    epoch = list(batches.epoch(0))
    assert len(epoch) == len(batches) == 10
    seen = torch.cat([b[0] for b in epoch])[:, 0]
    assert len(seen.unique()) == 100  # the last three wait for another epoch
    assert all(torch.equal(b[0] + 0.5, b[1]) for b in epoch)
    again, other = list(batches.epoch(0)), list(batches.epoch(1))
    assert torch.equal(epoch[0][0], again[0][0])
    assert not torch.equal(epoch[0][0], other[0][0])


def test_fewer_rows_than_a_batch_are_one_batch():
    batches = Batches(*_pairs(7), size=10)
    assert [len(b[0]) for b in batches.epoch(0)] == [7]


def test_streamed_rows_are_all_read_and_mixed():
    x, d = _pairs(1000)
    pairs = Simulations(x, {}, (d,))
    batches = StreamedBatches(pairs, lambda x, theta, data: (x, data[0]), size=64, piece=16, seed=3)
    epoch = list(batches.epoch(0))
    assert len(epoch) == len(batches) == 15
    assert all(len(b[0]) == 64 and torch.equal(b[0] + 0.5, b[1]) for b in epoch)
    seen = torch.cat([b[0] for b in epoch])[:, 0]
    assert len(seen.unique()) == 960
    # the first batch comes from many places of the file
    assert float(epoch[0][0].max() - epoch[0][0].min()) > 500


def test_fresh_batches_ask_for_new_pairs():
    asked = []

    def simulate(epoch):
        asked.append(epoch)
        return _pairs(40)

    batches = FreshBatches(simulate, rows=40, size=20)
    for epoch in range(2):
        assert [len(b[0]) for b in batches.epoch(epoch)] == [20, 20]
    assert asked == [0, 1]


def test_bad_batches():
    with pytest.raises(ValueError, match="one length"):
        Batches(torch.zeros(3), torch.zeros(4), size=2)
    with pytest.raises(ValueError, match="at least one row"):
        Batches(torch.zeros(3), size=0)
