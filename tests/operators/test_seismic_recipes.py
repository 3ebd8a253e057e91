"""PyLops' seismic operators through `from_pylops`: each recipe of docs/seismic_recipes.md, with its traps, on a tiny case."""

import importlib.util

import numpy as np
import pylops
import pytest
import torch
from pylops.signalprocessing import Radon2D
from pylops.utils.wavelets import ricker
from pylops.waveeqprocessing import LSM, MDC, Kirchhoff, Marchenko
from torch.autograd import gradcheck

from invgen import ExactGaussian, GaussianNoise, GaussianPrior, InverseProblem, from_pylops
from invgen.linalg import dot_test

pytestmark = pytest.mark.filterwarnings("ignore")
D = torch.float64
NX, NZ, DX, DT, NT = 8, 7, 10.0, 0.004, 41
X, Z, T = np.arange(NX) * DX, np.arange(NZ) * DX, np.arange(NT) * DT
SOURCES = np.array([[0.0, 40.0, 70.0], [0.0, 0.0, 0.0]])
RECEIVERS = np.array([[10.0, 30.0, 60.0, 70.0], [0.0, 0.0, 0.0, 0.0]])
WAVELET, _, CENTRE = ricker(T[:11], f0=30)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def check_dot(op):
    x = randn(2, *op.model_shape)
    d = op(x)
    v = torch.randn(d.shape, generator=torch.Generator().manual_seed(1), dtype=d.dtype)
    assert dot_test(op, op.adjoint, x, v) < 1e-12


def posterior_mean(op, d, noise, sd):
    """By the toolkit, and by dense algebra."""
    n = op.to_dense().shape[1]
    prior = GaussianPrior.dense(torch.zeros(op.model_shape, dtype=D), sd**2 * torch.eye(n, dtype=D))
    problem = InverseProblem(d, op, GaussianNoise(noise), prior)
    A = op.to_dense()
    H = A.T @ A / noise**2 + torch.eye(n, dtype=D) / sd**2
    want = torch.linalg.solve(H, A.T @ d.flatten() / noise**2).reshape(op.model_shape)
    return ExactGaussian().mean(problem)[0], want


# --- Kirchhoff and least-squares migration ----------------------------------------------------------------------------


def kirchhoff(mode, velocity):
    theirs = Kirchhoff(Z, X, T, SOURCES, RECEIVERS, velocity, WAVELET, CENTRE, mode=mode, engine="numpy")
    # PyLops has x before z: a section (z, x) is turned on its way in
    turned = theirs @ pylops.Transpose((NZ, NX), axes=(1, 0))
    return theirs, from_pylops(turned, (1, NZ, NX), (3, 4, NT))


def test_kirchhoff_and_least_squares_migration():
    theirs, op = kirchhoff("analytic", 1500.0)
    check_dot(op)
    reflectivity = torch.zeros(1, 1, NZ, NX, dtype=D)
    reflectivity[0, 0, 4, 2] = 1.0
    want = theirs.matvec(reflectivity[0, 0].T.numpy().ravel()).reshape(3, 4, NT)
    d = op(reflectivity)
    assert torch.allclose(d[0], torch.from_numpy(want))
    # the diffraction arrives when the analytic travel times say
    way = np.hypot(X[2] - SOURCES[0, 1], Z[4]) + np.hypot(X[2] - RECEIVERS[0, 2], Z[4])
    assert abs(int(d[0, 1, 2].abs().argmax()) - way / 1500.0 / DT) < 1.5
    noise = 0.02 * float(d.std())
    mean, want = posterior_mean(op, d[0], noise, 0.3)
    torch.testing.assert_close(mean, want, rtol=1e-6, atol=1e-8)
    assert int(mean.argmax()) == int(reflectivity.argmax())  # least squares focus


def test_the_operator_inside_lsm_is_the_one_to_wrap():
    lsm = LSM(Z, X, T, SOURCES, RECEIVERS, 1500.0, WAVELET, CENTRE, mode="analytic", engine="numpy")
    with pytest.raises(TypeError, match="from_pylops takes"):
        from_pylops(lsm)
    theirs, _ = kirchhoff("analytic", 1500.0)
    m = randn(1, NX, NZ)
    assert torch.allclose(from_pylops(lsm.Demop)(m), from_pylops(theirs)(m))


def test_kirchhoff_with_eikonal_times():
    pytest.importorskip("skfmm", reason="eikonal travel times in PyLops need scikit-fmm")
    velocity = 1500.0 + 5.0 * Z[None, :] + np.zeros((NX, 1))  # (nx, nz): x first here too
    _, op = kirchhoff("eikonal", velocity)
    check_dot(op)
    assert gradcheck(lambda m: op(m)[:, 1, 2], randn(1, 1, NZ, NX).requires_grad_())


# --- multi-dimensional convolution ------------------------------------------------------------------------------------

NS, NR, NTM = 3, 4, 11


def reflections():
    return np.random.default_rng(0).standard_normal((NS, NR, NTM))


def mdc(two_sided):
    """Kernel in time (ns, nr, nt) to the operator; two-sided times run from −(nt − 1) to nt − 1."""
    G, n = reflections(), 2 * NTM - 1 if two_sided else NTM
    if two_sided:
        G = np.concatenate([np.zeros((NS, NR, NTM - 1)), G], axis=-1)
    spectrum = np.fft.rfft(G, n, axis=-1).transpose(2, 0, 1)  # frequency first
    return from_pylops(MDC(spectrum, nt=n, nv=1, dt=1.0, dr=1.0, twosided=two_sided), (1, n, NR), (1, n, NS))


@pytest.mark.parametrize("two_sided", [False, True])
def test_multi_dimensional_convolution_and_deconvolution(two_sided):
    op = mdc(two_sided)
    check_dot(op)
    m = torch.zeros(1, *op.model_shape, dtype=D)
    first = NTM - 1 if two_sided else 0  # time zero of the model
    m[0, 0, first, 2] = 1.0  # a spike at time zero at receiver 2 gives the kernel of that receiver
    d = op(m)
    # PyLops takes unitary transforms for granted: with numpy's the data are √nt times the convolution
    want = op.model_shape[1] ** 0.5 * torch.from_numpy(reflections()[:, 2].T)
    assert torch.allclose(d[0, 0, first : first + NTM], want)
    # multi-dimensional deconvolution: the posterior mean of the model
    x = op.solve_model(op.adjoint(d) / 1e-4, 1e-4, 1.0)
    assert x.converged.all()
    A = op.to_dense()
    want = torch.linalg.solve(A.T @ A / 1e-4 + torch.eye(A.shape[1], dtype=D), A.T @ d.flatten() / 1e-4)
    assert torch.allclose(x.x.flatten(), want, atol=1e-6)


# --- Marchenko --------------------------------------------------------------------------------------------------------


def marchenko(R, window, dt, dr):
    """The Marchenko equations as an operator on (f⁻, f_m⁺), each (2 nt − 1, nr); PyLops has it inside `Marchenko` only."""
    inside = Marchenko(R, dt=dt, dr=dr)  # its scaled two-sided spectrum
    n, ns = inside.nt2, R.shape[0]
    kernel = {"nt": n, "nv": 1, "dt": dt, "dr": dr, "twosided": True}
    forth, back = (MDC(inside.Rtwosided_fft, conj=conj, **kernel) for conj in (False, True))
    later = pylops.Roll((n, ns), axis=0, shift=-1)
    W, I = pylops.Diagonal(window.T.ravel()), pylops.Identity(n * ns)
    equations = pylops.Block([[I, -1 * W * forth], [-1 * W * later * back, I]]) * pylops.BlockDiag([W, W])
    return from_pylops(equations, (2, n, ns), (2, n, ns)), from_pylops(W * forth, (1, n, ns), (1, n, ns))


def test_marchenko_focusing_functions():
    ns, nt, dt, dr = 5, 12, 0.004, 5.0
    R = 0.1 * np.random.default_rng(1).standard_normal((ns, ns, nt))
    R = R + R.transpose(1, 0, 2)  # reciprocity; one spread of sources and receivers
    window = np.zeros((ns, 2 * nt - 1))
    window[:, 4:-4] = 1.0
    op, first = marchenko(R, window, dt, dr)
    check_dot(op)
    direct = torch.zeros(1, 1, 2 * nt - 1, ns, dtype=D)
    direct[0, 0, 6] = 1.0
    d = torch.cat([first(direct), torch.zeros_like(direct)], dim=1)
    found = op.solve_model(op.adjoint(d) / 1e-8, 1e-8, 1.0, rtol=1e-12)
    assert found.converged.all()
    assert float((op(found.x) - d).norm() / d.norm()) < 1e-3  # the equations hold


# --- Radon ------------------------------------------------------------------------------------------------------------


def test_radon_puts_time_last_and_shots_first():
    nt, nh, n_p = 20, 9, 7
    t, h, p = np.arange(nt) * DT, np.arange(-4, 5) * 10.0, np.linspace(-1e-3, 1e-3, n_p)  # s, m and s/m
    theirs = Radon2D(t, h, p, kind="linear", engine="numpy", dtype="float64")  # (n_p, nt) to (nh, nt)
    turn = pylops.Transpose
    op = from_pylops(turn((nh, nt), axes=(1, 0)) @ theirs @ turn((nt, n_p), axes=(1, 0)), (1, nt, n_p), (1, nt, nh))
    check_dot(op)
    m = torch.zeros(1, 1, nt, n_p, dtype=D)
    m[0, 0, 8, 5] = 1.0
    d = op(m)
    picks = (t[8] + p[5] * h) / DT  # the line t = tau + p h, tau at h = 0 in the middle
    assert (d[0, 0].argmax(0) - torch.from_numpy(picks)).abs().max() <= 1.0
    mean, want = posterior_mean(op, d[0], 0.05, 1.0)
    torch.testing.assert_close(mean, want, rtol=1e-6, atol=1e-8)
    assert int(mean.argmax()) == int(m.argmax())
    x = randn(1, 1, nt, n_p).requires_grad_()
    (g,) = torch.autograd.grad(0.5 * (op(x) - d).square().sum(), x)
    assert torch.allclose(g, op.adjoint(op(x) - d))


# --- curvelets --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("curvelets") is None, reason="pylops' UDCT needs the package curvelets")
def test_curvelets_are_a_tight_frame():
    from pylops.signalprocessing import UDCT

    op = from_pylops(UDCT((32, 32), num_scales=2), (1, 32, 32))
    check_dot(op)
    x = randn(1, 1, 32, 32).requires_grad_()
    c = op(x)
    assert c.is_complex()  # coefficients are complex, sections real: the inner product is Re⟨u, v⟩
    assert torch.allclose(op.adjoint(c), x)
    (g,) = torch.autograd.grad(c.abs().sum(), x)
    assert g.dtype == D
    assert torch.isfinite(g).all()


@pytest.mark.skipif(importlib.util.find_spec("curvelops") is None, reason="curvelops needs a licensed CurveLab")
def test_fast_discrete_curvelets():
    import curvelops

    op = from_pylops(curvelops.FDCT2D((32, 32)), (1, 32, 32))
    check_dot(op)
