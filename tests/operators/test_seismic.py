"""Wavelets that vary with time and place, against PyLops, and everything that can be wrong with a wavelet."""

import warnings

import numpy as np
import pytest
import torch
from pylops.avo.poststack import PoststackLinearModelling
from pylops.signalprocessing import NonStationaryConvolve1D

from invgen.grid import Grid
from invgen.linalg import dot_test
from invgen.operators import (
    LateralPostStack,
    PostStack,
    check_zero_phase,
    convolution_matrix,
    interpolate_wavelets,
    phase_of_wavelet,
    ricker,
    rotate_phase,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
D = torch.float64
NZ, NX = 22, 4
TIMES = np.arange(-30, 31) * 0.004


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


# --- a wavelet that varies with time ----------------------------------------------------------------------------------


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("kind", ["centered", "forward"])
@pytest.mark.parametrize("n_w", [1, 7, 10])
def test_one_wavelet_a_reflector_is_pylops(explicit, kind, n_w):
    wavelets = randn(NZ, n_w, seed=1)
    theirs = PoststackLinearModelling(wavelets.numpy(), nt0=NZ, spatdims=NX, explicit=explicit, kind=kind)
    ours = PostStack(wavelets, (1, NZ, NX), kind=kind)
    m, d = randn(2, 1, NZ, NX, seed=2), randn(2, 1, NZ, NX, seed=3)
    want = np.stack([theirs.matvec(v[0].numpy().ravel()).reshape(NZ, NX) for v in m])
    back = np.stack([theirs.rmatvec(v[0].numpy().ravel()).reshape(NZ, NX) for v in d])
    assert relative(ours(m)[:, 0], torch.from_numpy(want)) < 1e-12
    assert relative(ours.adjoint(d)[:, 0], torch.from_numpy(back)) < 1e-12


@pytest.mark.parametrize("at", [(3, 9, 15), (0, 21), (5, 11)])
def test_interpolation_between_a_few_wavelets_is_pylops(at):
    few = randn(len(at), 7, seed=1)
    theirs = NonStationaryConvolve1D(dims=(NZ,), hs=few.numpy(), ih=at)
    each = interpolate_wavelets(few, at, NZ)
    assert relative(each, torch.from_numpy(theirs.hsinterp)) < 1e-13
    r = randn(NZ, seed=2)
    assert relative(convolution_matrix(each, NZ) @ r, torch.from_numpy(theirs @ r.numpy())) < 1e-12
    m = randn(1, 1, NZ, NX, seed=3)
    assert relative(PostStack(few, (1, NZ, NX), at=at)(m), PostStack(each, (1, NZ, NX))(m)) < 1e-12


def test_the_wavelet_belongs_to_the_reflector():
    """A spike of reflectivity at j comes back as wavelet j, whole."""
    wavelets = randn(NZ, 5, seed=1)
    m = torch.zeros(1, 1, NZ, 1, dtype=D)
    m[0, 0, 11:] = 1.0  # forward difference: the reflector is sample 10
    d = PostStack(wavelets, (1, NZ, 1), kind="forward")(m).flatten()
    assert torch.allclose(d[8:13], wavelets[10])
    assert (d.abs() > 1e-12).sum() == 5


def test_places_between_samples_and_uneven_ones():
    few = randn(3, 5, seed=1)
    each = interpolate_wavelets(few, [2.5, 4.0, 10.0], 12)
    assert torch.allclose(each[3], few[0] * (2 / 3) + few[1] / 3)
    assert torch.allclose(each[7], 0.5 * (few[1] + few[2]))
    assert torch.equal(each[0], few[0])
    assert torch.equal(each[11], few[2])


def test_a_varying_wavelet_keeps_the_direct_solve():
    op = PostStack(randn(3, 5, seed=1), (1, 9, 2), at=[1, 4, 7])
    b, before = randn(2, 1, 9, 2), op.forward_count
    x = op.solve(b, 0.1, 2.0).x
    assert op.forward_count == before
    A = op.to_dense()
    want = torch.linalg.solve(0.1 * torch.eye(18, dtype=D) + 2.0 * A @ A.T, b.flatten(1).T).T
    assert relative(x.flatten(1), want) < 1e-10


# --- and with place ---------------------------------------------------------------------------------------------------


def test_lateral_wavelets_trace_by_trace():
    wavelets, m, d = randn(3, 7, seed=1), randn(2, 1, NZ, 6, seed=2), randn(2, 1, NZ, 6, seed=3)
    op = LateralPostStack(wavelets, [1.0, 2.0, 4.5], (1, NZ, 6))
    each = interpolate_wavelets(wavelets, [1.0, 2.0, 4.5], 6)
    for i in range(6):
        one = PostStack(each[i], (1, NZ, 1))
        assert relative(op(m)[..., i : i + 1], one(m[..., i : i + 1])) < 1e-12
        assert relative(op.adjoint(d)[..., i : i + 1], one.adjoint(d[..., i : i + 1])) < 1e-12
    assert relative(op(m, wavelet_scale=3.0), 3 * op(m)) < 1e-12


def test_lateral_wavelets_that_also_vary_with_time():
    wavelets = randn(2, NZ, 5, seed=1)
    op = LateralPostStack(wavelets, [0, 5], (1, NZ, 6))
    m = randn(1, 1, NZ, 6, seed=2)
    assert relative(op(m)[..., :1], PostStack(wavelets[0], (1, NZ, 1))(m[..., :1])) < 1e-12
    assert relative(op(m)[..., 5:], PostStack(wavelets[1], (1, NZ, 1))(m[..., 5:])) < 1e-12
    assert dot_test(op, op.adjoint, m, randn(1, 1, NZ, 6, seed=3)) < 1e-12


# --- bad input --------------------------------------------------------------------------------------------------------


def grid(unit="s", spacing=0.004):
    return Grid((NZ, NX), (spacing, 12.5), axes=("t", "x"), units=(unit, "m"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"wavelet": torch.ones(40)}, "longer than the trace: 99%"),
        ({"wavelet": torch.zeros(5)}, "zero everywhere"),
        ({"wavelet": torch.ones(5, 3)}, "one row for each of the 22"),
        ({"wavelet": torch.ones(2, 3, 4)}, "wavelet"),
        ({"wavelet": torch.ones(3, 5), "at": [1, 2]}, "3 wavelets need 3 increasing places"),
        ({"wavelet": torch.ones(2, 5), "at": [5, 2]}, "increasing"),
        ({"wavelet": torch.ones(2, 5), "at": [100, 200]}, "in samples, not in s"),
        ({"wavelet": torch.ones(5), "at": [1]}, "leave at out"),
        ({"dt": 0.004}, "model_grid"),
        ({"dt": -1.0, "model_grid": grid()}, "positive"),
        ({"dt": 0.002, "model_grid": grid()}, "resample"),
        ({"dt": 4.0, "model_grid": grid()}, "one of them is in s and the other in ms"),
        ({"dt": 0.004, "model_grid": grid("m", 5.0)}, "resample the wavelet"),
    ],
)
def test_poststack_bad_input(change, words):
    with pytest.raises(ValueError, match=words):
        PostStack(**{"wavelet": torch.ones(5), "shape": (1, NZ, NX), **change})


def test_a_right_interval_passes_and_zeros_at_the_ends_do_not_make_a_wavelet_long():
    PostStack(torch.ones(5), (1, NZ, NX), dt=0.004, model_grid=grid())
    padded = torch.nn.functional.pad(torch.ones(5), (60, 60))
    PostStack(padded, (1, NZ, NX))


def test_lateral_bad_input():
    with pytest.raises(ValueError, match="PostStack"):
        LateralPostStack(torch.ones(5), [0], (1, NZ, NX))
    with pytest.raises(ValueError, match="places"):
        LateralPostStack(torch.ones(2, 5), [0], (1, NZ, NX))


# --- phase ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [0.0, 30.0, -75.0, 90.0, 135.0, 180.0])
@pytest.mark.parametrize("delay", [0.0, 3.0, -2.25])
def test_the_phase_of_a_rotated_and_delayed_wavelet_is_found(degrees, delay):
    wavelet = rotate_phase(ricker(TIMES - delay * 0.004, 25.0), degrees)
    found, shift, misfit = phase_of_wavelet(wavelet)
    assert abs((found - degrees + 180) % 360 - 180) < 3
    assert abs(shift - delay) < 0.1
    assert misfit < 0.01


def test_rotations_add_up():
    wavelet = ricker(TIMES, 25.0)
    assert relative(rotate_phase(rotate_phase(wavelet, 50), -50)[20:40], wavelet[20:40]) < 1e-2
    assert relative(rotate_phase(wavelet, 180), -wavelet) < 1e-12
    turned = rotate_phase(wavelet, 90)
    assert relative(turned.flip(0), -turned) < 1e-10


def test_minimum_phase_is_said_and_a_symmetric_wavelet_passes_quietly():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_zero_phase(ricker(TIMES, 25.0))
    with pytest.warns(UserWarning, match="constant phase of about 60"):
        assert not check_zero_phase(rotate_phase(ricker(TIMES, 25.0), 60))
    with pytest.warns(UserWarning, match="polarity is reversed"):
        assert check_zero_phase(-ricker(TIMES, 25.0))
    with pytest.warns(UserWarning, match="samples from the middle"):
        assert not check_zero_phase(ricker(TIMES - 0.02, 25.0))
    t = np.arange(61) * 0.004
    causal = np.concatenate([np.zeros(30), (np.exp(-40 * t) * np.sin(2 * np.pi * 25 * t))[:31]])
    with pytest.warns(UserWarning, match="no constant phase explains"):
        assert not check_zero_phase(causal)


@pytest.mark.parametrize("bad", [torch.ones(2), torch.zeros(9), torch.ones(3, 3), torch.tensor([1.0, float("nan"), 2])])
def test_phase_bad_input(bad):
    with pytest.raises(ValueError, match="phase of a wavelet"):
        phase_of_wavelet(bad)
