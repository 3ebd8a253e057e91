"""Irregular and dead traces, and simultaneous sources, against PyLops."""

import warnings

import numpy as np
import pylops
import pytest
import torch
from pylops.signalprocessing import Interp
from pylops.waveeqprocessing import BlendingContinuous, BlendingGroup, BlendingHalf

from invgen.grid import Grid
from invgen.linalg import dot_test
from invgen.noise import GaussianNoise
from invgen.operators import Blend, Mask, TraceSampling, dead_traces
from invgen.problem import Term

D = torch.float64
NT, NX = 6, 9


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


# --- positions --------------------------------------------------------------------------------------------------------


def test_whole_positions_are_pylops_restriction():
    places = np.array([7, 0, 3, 4])
    theirs = pylops.Restriction((NT, NX), places, axis=1)
    ours = TraceSampling((1, NT, NX), places, kind="index")
    m, d = randn(2, 1, NT, NX), randn(2, 1, NT, 4, seed=1)
    for i in range(2):
        assert torch.equal(ours(m)[i, 0], torch.from_numpy((theirs @ m[i, 0].numpy().ravel()).reshape(NT, 4)))
        assert torch.equal(
            ours.adjoint(d)[i, 0], torch.from_numpy((theirs.H @ d[i, 0].numpy().ravel()).reshape(NT, NX))
        )
    assert torch.equal(ours(m), TraceSampling((1, NT, NX), places, kind="linear")(m))


@pytest.mark.parametrize("kind", ["linear", "sinc"])
def test_places_between_traces_are_pylops_interp(kind):
    places = np.array([0.25, 7.5, 3.0, 4.9])
    theirs, _ = Interp((NT, NX), places, axis=1, kind=kind)
    ours = TraceSampling((1, NT, NX), places, kind=kind)
    m, d = randn(2, 1, NT, NX), randn(2, 1, NT, 4, seed=1)
    for i in range(2):
        want = theirs.matvec(m[i, 0].numpy().ravel()).reshape(NT, 4)
        back = theirs.rmatvec(d[i, 0].numpy().ravel()).reshape(NT, NX)
        assert relative(ours(m)[i, 0], torch.from_numpy(want)) < 1e-12
        assert relative(ours.adjoint(d)[i, 0], torch.from_numpy(back)) < 1e-12


@pytest.mark.parametrize("kind", ["index", "linear", "sinc"])
def test_solves_are_direct(kind):
    places = [1, 4, 6, 7] if kind == "index" else [0.3, 4.0, 6.5, 8.0]
    op = TraceSampling((1, 3, NX), places, kind=kind)
    A, c = op.to_dense(), torch.tensor([0.5, 4.0], dtype=D)
    b, m = randn(2, 1, 3, 4), randn(2, 1, 3, NX, seed=1)
    before = op.forward_count
    data, model = op.solve(b, 0.1, c), op.solve_model(m, 0.1, c)
    assert op.forward_count == before
    for i in range(2):
        want = torch.linalg.solve(0.1 * torch.eye(12, dtype=D) + c[i] * A @ A.T, b[i].flatten())
        assert relative(data.x[i].flatten(), want) < 1e-10
        want = torch.linalg.solve(A.T @ A / 0.1 + torch.eye(27, dtype=D) / c[i], m[i].flatten())
        assert relative(model.x[i].flatten(), want) < 1e-10


def test_a_trace_given_twice_and_positions_in_metres():
    grid = Grid((NT, NX), (0.004, 12.5), origin=(0.0, 100.0), axes=("t", "x"), units=("s", "m"))
    op = TraceSampling.at(grid, [100.0, 118.75, 100.0], kind="linear")
    m = randn(1, 1, NT, NX)
    assert torch.allclose(op(m)[..., 1], 0.5 * (m[..., 1] + m[..., 2]))
    assert torch.equal(op(m)[..., 0], op(m)[..., 2])
    with pytest.raises(ValueError, match="samples but the section has 0 to 8"):
        TraceSampling.at(grid, [50.0])


def test_dead_traces_are_found_counted_and_left_out():
    recorded = randn(NT, 6)
    recorded[:, 1] = 0.0
    recorded[2, 3] = float("nan")
    recorded[:, 4] = 17.0
    dead = dead_traces(recorded)
    assert dead.tolist() == [False, True, False, True, True, False]
    op = TraceSampling((1, NT, NX), [0, 1, 2, 3, 4, 5], kind="index", dead=dead)
    data = op.live(recorded[None])
    assert data.shape == op.data_shape
    Term(data, op, GaussianNoise(0.1))  # no NaN is left, no mask needed
    assert dead_traces(torch.zeros(NT, 3)).all()
    assert not dead_traces(randn(NT, 3) * 1e-9).any()  # small units are not death


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "cubic"}, "kind"),
        ({"positions": [0.5], "kind": "index"}, "whole numbers"),
        ({"positions": [9.0]}, "wider section"),
        ({"positions": [float("nan")]}, "finite"),
        ({"shape": (5,)}, "section"),
        ({"dead": torch.tensor([True])}, "mask of dead traces"),
        ({"dead": torch.tensor([True, True])}, "nothing is left"),
    ],
)
def test_positions_bad_input(change, words):
    with pytest.raises(ValueError, match=words):
        TraceSampling(**{"shape": (1, NT, NX), "positions": [1.0, 2.0], **change})


def test_live_wants_all_recorded_traces():
    op = TraceSampling((1, NT, NX), [1, 2, 3], dead=torch.tensor([False, True, False]))
    with pytest.raises(ValueError, match="3 traces were recorded"):
        op.live(torch.zeros(1, NT, 2))


# --- blending ---------------------------------------------------------------------------------------------------------

SHOTS, RECEIVERS, DT = 4, 2, 0.004


def as_pylops(gathers):
    """(receivers, nt, shots) to (shots, receivers, nt)."""
    return gathers.permute(2, 0, 1).numpy()


@pytest.mark.parametrize("nt", [10, 11])
@pytest.mark.parametrize("shiftall", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_continuous_blending_is_pylops(nt, shiftall, whole):
    times = np.array([0.0, 5, 9, 20]) * DT if whole else np.array([0.0, 0.0213, 0.0371, 0.0902])
    theirs = BlendingContinuous(nt, RECEIVERS, SHOTS, DT, times, shiftall=shiftall)
    ours = Blend((RECEIVERS, nt, SHOTS), times, DT)
    assert ours.data_shape == (RECEIVERS, theirs.nttot, 1)
    m, d = randn(2, *ours.model_shape), randn(2, *ours.data_shape, seed=1)
    for i in range(2):
        want = (theirs @ as_pylops(m[i]).ravel()).reshape(RECEIVERS, -1)
        assert relative(ours(m)[i, ..., 0], torch.from_numpy(want)) < 1e-12
        back = (theirs.H @ d[i, ..., 0].numpy().ravel()).reshape(SHOTS, RECEIVERS, nt)
        assert relative(ours.adjoint(d)[i], torch.from_numpy(back).permute(1, 2, 0)) < 1e-12


@pytest.mark.parametrize("half", [False, True])
def test_group_and_half_blending_are_pylops(half):
    nt, size, n = 11, 2, 3
    times = np.array([[0.0, 0.0, 0.001], [0.0213, 0.0171, 0.008]])
    theirs = (BlendingHalf if half else BlendingGroup)(nt, RECEIVERS, size * n, DT, times, size, n)
    ours = Blend.in_groups((RECEIVERS, nt, size * n), times, DT, half=half, circular=True)
    m, d = randn(1, *ours.model_shape), randn(1, *ours.data_shape, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = (theirs @ as_pylops(m[0]).ravel()).real.reshape(n, RECEIVERS, nt)
        back = (theirs.H @ d[0].permute(2, 0, 1).numpy().ravel()).real.reshape(size * n, RECEIVERS, nt)
    assert relative(ours(m)[0], torch.from_numpy(want).permute(1, 2, 0)) < 1e-12
    assert relative(ours.adjoint(d)[0], torch.from_numpy(back).permute(1, 2, 0)) < 1e-12


def test_a_real_record_does_not_wrap_around():
    """Late energy of a delayed shot lies after the first shot's record, not at its start."""
    m = torch.zeros(1, 1, 10, 2, dtype=D)
    m[0, 0, 9, 1] = 1.0
    times = np.array([[0.0], [3 * DT]])
    record = Blend.in_groups((1, 10, 2), times, DT)(m)[0, 0, :, 0]
    assert int(record.abs().argmax()) == 12
    wrapped = Blend.in_groups((1, 10, 2), times, DT, circular=True)(m)[0, 0, :, 0]
    assert int(wrapped.abs().argmax()) == 2


def test_deblending_beats_pseudo_deblending_by_iteration():
    """Least squares with a prior that knows the shots are alike: the crosstalk goes."""
    nt, shots = 40, 8
    t = torch.arange(nt, dtype=D)[:, None]
    gather = torch.exp(-(((t - 12 - 0.5 * torch.arange(shots)) / 2.0) ** 2))[None, None]  # a dipping event
    times = torch.cumsum(torch.rand(shots, generator=torch.Generator().manual_seed(2), dtype=D) * 0.06 + 0.02, 0)
    op = Blend((1, nt, shots), times, DT)
    d = op(gather)
    across = torch.exp(-((torch.arange(shots)[:, None] - torch.arange(shots)).double() / 3.0).square())
    down = torch.exp(-((torch.arange(nt)[:, None] - torch.arange(nt)).double() / 1.5).square())
    from invgen.covariance import Dense

    C = Dense(torch.kron(down, across) + 1e-9 * torch.eye(nt * shots, dtype=D), (1, nt, shots))
    found = op.solve(d, 1e-6, C)
    assert found.converged.all()
    estimate = C.apply(op.adjoint(found.x))
    crosstalk = (op.adjoint(d) - gather).norm()
    assert (estimate - gather).norm() < 0.2 * crosstalk


def test_missing_receivers_through_a_mask():
    op = Blend((3, 8, 2), [0.0, 0.011], DT)
    recorded = torch.ones(op.data_shape, dtype=torch.bool)
    recorded[1] = False
    part = Mask(recorded) @ op
    m = randn(2, 3, 8, 2)
    assert torch.equal(part(m), op(m)[:, recorded])
    assert dot_test(part, part.adjoint, m, randn(2, int(recorded.sum()), seed=1)) < 1e-12


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"times": [0.0]}, "one finite firing time a shot"),
        ({"times": [0.0, float("inf")]}, "one finite firing time a shot"),
        ({"times": [-0.01, 0.0]}, "before the record starts"),
        ({"times": [0.0, 5000.0]}, "look like samples or ms"),
        ({"dt": 0.0}, "positive"),
        ({"groups": [0, 2]}, "without gaps"),
        ({"n_total": 9}, "ends before the last shot"),
        ({"circular": True, "n_total": 99}, "leave n_total out"),
        ({"shape": (8, 2)}, "n_receivers"),
    ],
)
def test_blending_bad_input(change, words):
    with pytest.raises(ValueError, match=words):
        Blend(**{"shape": (1, 8, 2), "times": [0.0, 0.01], "dt": DT, **change})
