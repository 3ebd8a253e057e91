"""Simulations in memory and on disk: the joint law, batches, splits, failures."""

import pickle

import h5py
import numpy as np
import pytest
import torch

from invgen import Simulations
from invgen.contracts import Operator
from invgen.noise import GaussianNoise
from invgen.operators import BlackBox, MatrixOperator
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem, Term

D = torch.float64
MEAN = torch.tensor([2.0, -1.0, 0.5], dtype=D)
COVARIANCE = torch.tensor([[1.0, 0.6, 0.0], [0.6, 0.8, -0.2], [0.0, -0.2, 0.5]], dtype=D)
MATRIX = torch.tensor([[1.0, 0.5, 0.0], [0.0, -1.0, 2.0]], dtype=D)


class Gain(Operator):
    theta_names = ("gain",)

    def forward(self, x, *, gain):
        return gain.reshape(-1, 1) * x


def linear(**options):
    return InverseProblem(
        torch.zeros(2, dtype=D),
        MatrixOperator(MATRIX),
        GaussianNoise(0.3),
        GaussianPrior.dense(MEAN, COVARIANCE),
        **options,
    )


def random_pairs(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, gain = torch.randn(n, 2, 3, generator=g), torch.rand(n, generator=g, dtype=D)
    return x, {"gain": gain}, (torch.randn(n, 4, generator=g), torch.randn(n, 2, generator=g, dtype=torch.complex64))


def test_pairs_follow_the_joint_law():
    """Cov(x, d) = C Aᵀ and Cov(d) = A C Aᵀ + R, each entry within 5 standard errors: 25 entries, 1.5e-5 in all."""
    n = 20_000
    s = Simulations.of(linear(), n, seed=3, chunk=3000)
    assert (len(s), s.failed) == (n, 0)
    joint = torch.cat([s.x, s.data[0]], 1).double()
    mean = torch.cat([MEAN, MATRIX @ MEAN])
    cross = COVARIANCE @ MATRIX.T
    expected = torch.cat(
        [
            torch.cat([COVARIANCE, cross], 1),
            torch.cat([cross.T, MATRIX @ cross + 0.09 * torch.eye(2, dtype=D)], 1),
        ]
    )
    sd = expected.diagonal().sqrt()
    assert ((joint.mean(0) - mean).abs() < 5 * sd / n**0.5).all()
    spread = (expected.square() + torch.outer(sd.square(), sd.square())).sqrt() / n**0.5
    assert ((torch.cov(joint.T) - expected).abs() < 5 * spread).all()


def test_chunks_do_not_repeat_each_other_and_the_seed_decides():
    s = Simulations.of(linear(), 60, seed=1, chunk=20)
    assert len(torch.unique(s.x[:, 0])) == 60
    assert torch.equal(Simulations.of(linear(), 60, seed=1, chunk=20).data[0], s.data[0])
    assert not torch.equal(Simulations.of(linear(), 60, seed=2, chunk=20).x, s.x)


def test_masked_data_are_zero_and_nuisance_is_kept():
    prior = GaussianPrior.dense(torch.ones(3, dtype=D), COVARIANCE)
    gain = GaussianPrior.dense(torch.ones(1, dtype=D), torch.eye(1, dtype=D))
    mask = torch.tensor([True, False, True])
    terms = [
        Term(torch.zeros(3, dtype=D), Gain((3,), (3,)), GaussianNoise(0.01), mask),
        Term(torch.zeros(2, dtype=D), MatrixOperator(MATRIX), GaussianNoise(0.01)),
    ]
    s = Simulations.of(InverseProblem(terms=terms, prior=prior, nuisance={"gain": gain}), 50)
    assert [tuple(d.shape) for d in s.data] == [(50, 3), (50, 2)]
    assert (s.data[0][:, 1] == 0).all()
    assert torch.allclose(s.data[0][:, 0], s.theta["gain"] * s.x[:, 0], atol=0.06)
    assert s.theta["gain"].shape == (50,)


def storages(tmp_path):
    """The same pairs as tensors, NumPy arrays, an own file and HDF5 datasets in chunks."""
    x, theta, data = random_pairs(40)
    plain = Simulations(x, theta, data)
    plain.save(tmp_path / "own.h5")
    file = h5py.File(tmp_path / "chunks.h5", "w")
    for name, values in (("x", x), ("gain", theta["gain"]), ("d0", data[0]), ("d1", data[1])):
        file.create_dataset(name, data=values.numpy(), chunks=True, compression="gzip")
    arrays = Simulations(x.numpy(), {"gain": theta["gain"].numpy()}, tuple(d.numpy() for d in data))
    chunks = Simulations(file["x"], {"gain": file["gain"]}, (file["d0"], file["d1"]))
    return {"tensor": plain, "numpy": arrays, "own": Simulations.open(tmp_path / "own.h5"), "hdf5": chunks}


def test_every_storage_gives_the_same_batches(tmp_path):
    kinds = storages(tmp_path)
    for rows in (slice(3, 9), range(5, 8), [7, 2, 2, 39], torch.tensor([0, -1]), np.array([4])):
        x, theta, data = kinds["tensor"].batch(rows)
        for name, other in kinds.items():
            for part in (other, other.split(0.25, 5)[0].take(range(30))):
                if part is not other and not isinstance(rows, slice | range):
                    continue
                whole = kinds["tensor"] if part is other else kinds["tensor"].split(0.25, 5)[0]
                x, theta, data = whole.batch(rows)
                y, phi, e = part.batch(rows)
                assert torch.equal(x, y), name
                assert torch.equal(theta["gain"], phi["gain"]), name
                assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(data, e)), name
    x, theta, data = kinds["own"].batch(slice(0, 2), dtype=D)
    assert (x.dtype, data[0].dtype, data[1].dtype) == (D, D, torch.complex128)


def test_split_parts_the_rows_once(tmp_path):
    for s in storages(tmp_path).values():
        train, held = s.split(0.25, seed=4)
        assert (len(train), len(held)) == (30, 10)
        together = torch.cat([train.batch(slice(None))[0], held.batch(slice(None))[0]])
        order = torch.argsort(together[:, 0, 0])
        whole = s.batch(slice(None))[0]
        assert torch.equal(together[order], whole[torch.argsort(whole[:, 0, 0])])
        again = s.split(0.25, seed=4)[1].batch(slice(None))[0]
        assert torch.equal(again, held.batch(slice(None))[0])


def test_opened_files_pickle_and_need_no_writer(tmp_path):
    s = storages(tmp_path)["own"]
    train = pickle.loads(pickle.dumps(s.split(0.5)[0]))
    assert torch.equal(train.batch([0, 1])[0], s.split(0.5)[0].batch([0, 1])[0])


def sometimes(x):
    if x[0] > 2.5:
        raise RuntimeError("no convergence")
    return x[:2] * (np.nan if x[1] > 0 else 1.0)


def test_failures_are_left_out_counted_and_warned_about(tmp_path):
    prior = GaussianPrior.dense(MEAN, COVARIANCE)
    problem = InverseProblem(torch.zeros(2, dtype=D), BlackBox(sometimes, (3,), (2,)), GaussianNoise(0.1), prior)
    for path in (None, tmp_path / "s.h5"):
        with pytest.warns(UserWarning, match="of 300 simulations failed"):
            s = Simulations.of(problem, 300, chunk=70, path=path)
        x, _, (d,) = s.batch(slice(None))
        assert len(s) + s.failed == 300
        assert 0 < s.failed < 300
        assert torch.isfinite(d).all()
        assert (x[:, 0] <= 2.5).all()
        assert (x[:, 1] <= 0).all()
        s.save(tmp_path / "again.h5")
        assert Simulations.open(tmp_path / "again.h5").failed == s.failed


def test_streaming_to_a_file_gives_the_numbers_of_memory(tmp_path):
    s, t = (Simulations.of(linear(), 100, seed=9, chunk=30, path=p) for p in (None, tmp_path / "a.h5"))
    assert isinstance(t.x, np.memmap)
    assert torch.equal(s.x, t.batch(slice(None))[0])
    assert torch.equal(s.data[0], t.batch(slice(None))[2][0])


def test_all_failed_is_an_error():
    problem = InverseProblem(
        torch.zeros(2, dtype=D),
        BlackBox(lambda x: x[:2] * np.nan, (3,), (2,)),
        GaussianNoise(0.1),
        GaussianPrior.dense(MEAN, COVARIANCE),
    )
    with pytest.raises(ValueError, match="All 5 simulations failed"):
        Simulations.of(problem, 5)


def test_finite_leaves_bad_rows_of_given_arrays_out():
    x, theta, data = random_pairs(20)
    data[0][3, 1], x[7, 0, 0] = float("inf"), float("nan")
    with pytest.warns(UserWarning, match="3 of 21 simulations failed"):
        s = Simulations(x, theta, data, failed=1).finite()
    assert (len(s), s.failed) == (18, 3)
    assert torch.equal(s.batch([3])[0], x[4:5])


def test_check_names_what_does_not_fit():
    s = Simulations.of(linear(), 50)
    s.check(linear())
    other = InverseProblem(
        torch.zeros(3, dtype=D),
        MatrixOperator(torch.eye(3, dtype=D)),
        GaussianNoise(0.1),
        GaussianPrior.dense(MEAN, COVARIANCE),
    )
    with pytest.raises(ValueError, match="simulate this problem"):
        s.check(other)

    class Above:
        shape, grid = (3,), None

        def sample(self, n, *, seed=0):
            return torch.rand(n, 3)

        def log_prob(self, x):
            return torch.where((x > 0).all(1), 0.0, -torch.inf)

    above = InverseProblem(torch.zeros(2, dtype=D), MatrixOperator(MATRIX), GaussianNoise(0.3), Above())
    with pytest.raises(ValueError, match="no support"):
        s.check(above)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Simulations(torch.zeros(3, 2), {}, torch.zeros(4, 2)), "one row a simulation"),
        (lambda: Simulations(torch.zeros(3, 2)), "need data"),
        (lambda: Simulations(torch.zeros(3, 2), {"a": torch.zeros(3, 1)}, torch.zeros(3, 2)), r"\(n,\) is expected"),
        (lambda: Simulations(torch.zeros(3, 2), {}, torch.zeros(3, 2)).batch([3]), "Rows are"),
        (lambda: Simulations(torch.zeros(3, 2), {}, torch.zeros(3, 2)).split(1.5), "share between"),
        (lambda: Simulations.of(linear(), 0), "n >= 1"),
    ],
)
def test_bad_input_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_another_file_is_refused(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f["x"] = np.zeros(3)
    with pytest.raises(ValueError, match="not a complete file of simulations"):
        Simulations.open(tmp_path / "a.h5")
    with pytest.raises(FileNotFoundError):
        Simulations.open(tmp_path / "b.h5")
