"""Single operators against what others compute."""

import pickle
import warnings

import numpy as np
import pylops
import pytest
import scipy.ndimage
import torch
from pylops.avo.poststack import PoststackLinearModelling
from scipy.signal import filtfilt
from torch.autograd import gradcheck, gradgradcheck

from invgen import transforms
from invgen.contracts import LinearOperator
from invgen.covariance import BlockDiagonal, Dense, Scalar
from invgen.operators import (
    AffineOperator,
    Composition,
    Convolution,
    Mask,
    MatrixOperator,
    PostStack,
    Smooth,
    Stack,
    from_pylops,
    ricker,
    stack,
    to_pylops,
)
from invgen.operators.algebra import LinearComposition, Scaled, compose
from invgen.operators.imaging import Identity
from invgen.stationary import Stationary

pytestmark = pytest.mark.filterwarnings("ignore")
D = torch.float64


def randn(*shape, seed=0, dtype=D):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


# --- post-stack -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["centered", "forward"])
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("n_w", [1, 9, 12, 19])  # 12: even
def test_poststack_equals_pylops_for_the_same_wavelet(kind, explicit, n_w):
    wavelet = randn(n_w, seed=n_w).numpy() / 2
    theirs = PoststackLinearModelling(wavelet, nt0=20, spatdims=5, explicit=explicit, kind=kind)
    ours = PostStack(wavelet, (1, 20, 5), kind=kind)
    m, d = randn(3, 1, 20, 5, seed=1), randn(3, 1, 20, 5, seed=2)
    want = np.stack([theirs @ v[0].numpy() for v in m])
    back = np.stack([theirs.H @ v[0].numpy() for v in d])
    assert relative(ours(m)[:, 0], torch.from_numpy(want)) < 1e-12
    assert relative(ours.adjoint(d)[:, 0], torch.from_numpy(back)) < 1e-12


def test_poststack_long_wavelets_match_the_explicit_matrix():
    wavelet = randn(31, seed=3).numpy() * np.exp(-(((np.arange(31) - 15) / 5.0) ** 2))  # most of it inside the trace
    theirs = PoststackLinearModelling(wavelet, nt0=20, explicit=True)
    m = randn(1, 1, 20, 1, seed=1)
    assert relative(PostStack(wavelet, (1, 20, 1))(m).flatten(), torch.from_numpy(theirs @ m.flatten().numpy())) < 1e-12


def test_poststack_does_not_halve_the_wavelet():
    m = torch.zeros(1, 1, 9, 1, dtype=D)
    m[0, 0, 5:] = 1.0
    unit = torch.tensor([1.0], dtype=D)
    assert PostStack(unit, (1, 9, 1), kind="forward")(m).abs().max() == 1.0


def test_poststack_wavelet_scale():
    op = PostStack.examples()[0]
    x, s = randn(4, *op.model_shape), torch.tensor([1.0, 2.0, 0.5, -1.0], dtype=D, requires_grad=True)
    assert torch.equal(op(x, wavelet_scale=s), op(x) * s[:, None, None, None])
    assert torch.equal(op(x, wavelet_scale=2.0), 2 * op(x))
    assert gradcheck(lambda v, t: op(v, wavelet_scale=t), (x.requires_grad_(), s))
    with pytest.raises(TypeError, match="wavelet_scale"):
        op(x, scale=s)


def test_nuisance_parameters_reach_through_products_and_affine_maps():
    op = PostStack.examples()[0]
    T = transforms.Affine(randn(*op.model_shape, seed=5), 0.3)  # the physics of a constant shift would be zero
    mask = torch.rand(op.data_shape, generator=torch.Generator().manual_seed(1)) > 0.3
    u, s = randn(3, *op.model_shape), torch.tensor([1.0, 2.0, 0.5], dtype=D)
    want = op(T(u), wavelet_scale=s)
    moved = op @ T
    assert isinstance(moved, AffineOperator)
    assert moved.theta_names == ("wavelet_scale",)
    assert relative(moved(u, wavelet_scale=s), want) < 1e-12
    assert relative((Mask(mask) @ op @ T)(u, wavelet_scale=s), want[:, mask]) < 1e-12
    assert relative((Mask(mask) @ (op @ T))(u, wavelet_scale=s), want[:, mask]) < 1e-12
    assert relative((2 * op + op)(u, wavelet_scale=s), 3 * op(u, wavelet_scale=s)) < 1e-12
    both = stack(op, Identity(op.model_shape))(u, wavelet_scale=s)
    assert relative(both, torch.cat([op(u, wavelet_scale=s).flatten(1), u.flatten(1)], 1)) < 1e-12


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"wavelet": torch.ones(2, 3), "shape": (1, 9, 2)}, "wavelet"),
        ({"wavelet": torch.tensor([1.0, float("nan")]), "shape": (1, 9, 2)}, "finite"),
        ({"wavelet": torch.ones(3), "shape": (9, 2)}, "channels"),
        ({"wavelet": torch.ones(3), "shape": (1, 9, 2), "kind": "backward"}, "kind"),
        ({"wavelet": torch.ones(3), "shape": (1, 2, 2)}, "vertical samples"),
    ],
)
def test_poststack_bad_input(arguments, words):
    with pytest.raises(ValueError, match=words):
        PostStack(**arguments)


def test_ricker_is_pylops_ricker():
    t = np.arange(20) * 0.004
    wavelet, both, _ = pylops.utils.wavelets.ricker(t, f0=15)
    assert np.allclose(ricker(both, 15).numpy(), wavelet, atol=1e-14)
    with pytest.raises(ValueError, match="positive"):
        ricker(both, 0.0)


def test_smooth_is_filtfilt():
    m = randn(2, 1, 200, 31, seed=4)
    want = filtfilt(np.ones(60) / 60, 1, m.numpy(), axis=2)  # SciPy's default padding, 3 n
    want = filtfilt(np.ones(50) / 50, 1, want, axis=3, padlen=30)  # the axis is shorter than that
    assert relative(Smooth((1, 200, 31))(m), torch.from_numpy(want.copy())) < 1e-12
    one = torch.ones(1, 1, 9, 9, dtype=D)
    assert relative(Smooth((1, 9, 9), (3, 4))(one), one) < 1e-12
    with pytest.raises(ValueError, match="lengths"):
        Smooth((1, 9, 9), (0, 4))


# --- convolution ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("boundary", "mode"), [("periodic", "wrap"), ("zero", "constant")])
@pytest.mark.parametrize("size", [(1, 1), (3, 3), (4, 5), (2, 6), (6, 7)])
def test_convolution_is_scipy(boundary, mode, size):
    kernel, m = randn(*size, seed=5), randn(2, 3, 6, 7, seed=6)
    want = np.stack([[scipy.ndimage.convolve(c, kernel.numpy(), mode=mode) for c in v] for v in m.numpy()])
    assert relative(Convolution(kernel, (3, 6, 7), boundary)(m), torch.from_numpy(want)) < 1e-12


@pytest.mark.parametrize("boundary", ["periodic", "zero"])
@pytest.mark.parametrize("size", [9, 12, 25])
def test_convolution_with_a_kernel_longer_than_the_model(boundary, size):
    n, kernel, m = 5, randn(size, seed=7), randn(1, 1, 5, seed=8)
    want = torch.zeros(n, dtype=D)
    for i in range(n):
        for j in range(size):
            k = i - j + size // 2
            if boundary == "periodic" or 0 <= k < n:
                want[i] += kernel[j] * m[0, 0, k % n]
    op = Convolution(kernel, (1, n), boundary)
    assert relative(op(m)[0, 0], want) < 1e-12


@pytest.mark.parametrize("shape", [(2, 4, 5), (1, 6, 4)])
def test_convolution_solves_directly_for_stationary_covariances(shape):
    op = Convolution(randn(3, 2, seed=9), shape)
    field = randn(*shape[1:], seed=10)
    C = Stationary(torch.fft.fft2(field).abs().square() + 0.1, shape)
    rhs, each = randn(3, *shape, seed=11), torch.tensor([0.5, 1.0, 2.0], dtype=D)
    M, S = op.to_dense(), C.dense()
    out, model = op.solve(rhs, each, C), op.solve_model(rhs, each, C)
    assert out.iterations == model.iterations == 0
    for i, r in enumerate(each):
        want = torch.linalg.solve(M @ S @ M.T + r * torch.eye(len(M), dtype=D), rhs[i].flatten())
        assert relative(out.x[i].flatten(), want) < 1e-10
        want = torch.linalg.solve(M.T @ M / r + torch.linalg.inv(S), rhs[i].flatten())
        assert relative(model.x[i].flatten(), want) < 1e-10


def test_direct_solves_are_direct():
    rhs = randn(2, 1, 4, 3)
    for op in (
        Identity((1, 4, 3)),
        Mask(torch.ones(1, 4, 3, dtype=torch.bool)),
        MatrixOperator(randn(12, 12), (1, 4, 3)),
    ):
        v = rhs.reshape(2, *op.data_shape)
        assert op.solve(v, 0.5, torch.tensor([1.0, 2.0])).iterations == 0
        assert op.solve(v, 0.5, torch.rand(1, 4, 3, dtype=D) + 0.1).iterations == 0
        assert op.solve_model(rhs, 0.5, torch.tensor([1.0, 2.0])).iterations == 0


def test_float32_matrix_solve_survives_a_bad_condition():
    M = randn(20, 20, seed=12) * torch.logspace(0, -4, 20, dtype=D)
    op, rhs = MatrixOperator(M), randn(2, 20, seed=13)
    want = torch.linalg.solve(M @ M.T + 1e-3 * torch.eye(20, dtype=D), rhs.T).T
    assert relative(op.solve(rhs.float(), 1e-3, 1.0).x.double(), want) < 1e-4
    assert relative(op.solve(rhs.float(), Dense(1e-3 * torch.eye(20, dtype=D)), 1.0).x.double(), want) < 1e-4


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Mask(torch.ones(3)), TypeError, "boolean"),
        (lambda: Mask(torch.zeros(3, dtype=torch.bool)), ValueError, "hides"),
        (lambda: Convolution(torch.ones(3), (1, 4, 4)), ValueError, "axes"),
        (lambda: Convolution(torch.ones(3, 3), (1, 4, 4), "reflect"), ValueError, "boundary"),
        (lambda: MatrixOperator(torch.ones(3)), ValueError, "matrix"),
        (lambda: MatrixOperator(torch.full((2, 2), float("nan"))), ValueError, "finite"),
        (lambda: MatrixOperator(torch.ones(3, 4), (5,)), ValueError, "columns"),
        (lambda: from_pylops(pylops.Identity(4), model_shape=(5,)), ValueError, "columns"),
        (lambda: to_pylops(transforms.Exp((3,))), TypeError, "LinearOperator"),
        (lambda: Identity((3,)) + Identity((4,)), ValueError, "equal shapes"),
        (lambda: Identity((3,)) @ Identity((4,)), ValueError, "equal shapes"),
    ],
)
def test_bad_input(make, error, words):
    with pytest.raises(error, match=words):
        make()


# --- algebra ----------------------------------------------------------------------------------------------------------


def test_algebra_identities():
    A, B, E = (
        MatrixOperator(randn(4, 5, seed=1)),
        MatrixOperator(randn(4, 5, seed=2)),
        MatrixOperator(randn(5, 3, seed=3)),
    )
    a, b, e = A.matrix, B.matrix, E.matrix
    for op, matrix in (
        (A + B, a + b),
        (2 * A, 2 * a),
        (A * 2.0, 2 * a),
        (-A, -a),
        (A @ E, a @ e),
        ((A @ E).H, (a @ e).T),
        (A.H, a.T),
        ((A + B) @ E, (a + b) @ e),
        (stack(A, 3 * B), torch.cat([a, 3 * b])),
    ):
        assert relative(op.to_dense(), matrix) < 1e-14
        assert relative(op.H.to_dense(), matrix.T) < 1e-14
    assert A.H.H is A
    x, R = randn(2, 5), torch.rand(4, dtype=D) + 0.5
    assert relative(A.normal(x, R), x @ (a.T @ (a / R[:, None])).T) < 1e-12


def test_products_know_what_they_are():
    A, shift = MatrixOperator(randn(4, 6, seed=1), (2, 3)), torch.tensor([1.0, -1.0])
    x = randn(3, 2, 3)
    uniform, channelwise = transforms.Affine(0.5, 2.0), transforms.Affine(shift, torch.tensor([2.0, 3.0]))
    for T in (uniform, channelwise, uniform @ channelwise):
        op = A @ T
        assert isinstance(op, AffineOperator)
        assert relative(op(x), A(T(x))) < 1e-12
        assert relative(op.linear(x) + op.offset, A(T(x))) < 1e-12
    assert isinstance((A @ uniform).linear, Scaled)
    assert compose(A, transforms.Identity()) is A
    assert isinstance(A @ transforms.Exp(), Composition)
    assert not isinstance(A @ transforms.Exp(), LinearOperator)
    assert isinstance(A.H @ A, LinearComposition)
    twice = MatrixOperator(randn(3, 4, seed=2)) @ (A @ uniform)
    assert isinstance(twice, AffineOperator)
    assert relative(twice(x), MatrixOperator(randn(3, 4, seed=2))(A(uniform(x)))) < 1e-12


@pytest.mark.parametrize("exact", [True, False])
def test_stack_of_separable_operators_solves_by_blocks(exact):
    # exact: every column has a block of its own; otherwise weak columns share one and the blocks precondition
    shape = (1, 10, 8)
    physics = PostStack(ricker(torch.arange(-3, 4, dtype=D) * 0.004, 30.0) / 2, shape)
    lengths, noise = ((2, 2), 1e-4) if exact else ((3, 9), 1.0)
    background = Smooth(shape, lengths)
    op = stack(physics, 2.0 * background)
    assert isinstance(op, Stack)
    R = BlockDiagonal([Scalar(0.2, physics.data_shape), Scalar(noise, background.data_shape)])
    C = Scalar(torch.tensor([0.5, 2.0, 50.0], dtype=D), shape)
    blocks = op._blocks(R, C)
    assert blocks.exact is exact
    rhs, m = randn(3, *op.data_shape, seed=1), randn(3, *shape, seed=2)
    data, model = op.solve(rhs, R, C), op.solve_model(m, R, C)
    assert data.converged.all()
    assert model.converged.all()
    A, r = op.to_dense(), R.dense()
    for i, c in enumerate(C.variance):
        want = torch.linalg.solve(r + c * A @ A.T, rhs[i])
        assert relative(data.x[i], want) < 1e-7
        want = torch.linalg.solve(A.T @ torch.linalg.solve(r, A) + torch.eye(80, dtype=D) / c, m[i].flatten())
        assert relative(model.x[i].flatten(), want) < 1e-7


# --- PyLops both ways -------------------------------------------------------------------------------------------------


@pytest.fixture
def theirs():
    return PoststackLinearModelling(np.array([-0.2, 1.0, -0.3]), nt0=5, spatdims=3)


def test_bridge_derivatives(theirs):
    x = randn(2, 5, 3).requires_grad_()
    op = from_pylops(theirs)
    assert gradcheck(op, (x,), check_forward_ad=True)
    assert gradgradcheck(lambda v: op(v.square()).square(), (x,))
    with pytest.raises(RuntimeError):  # what the bridge is for
        gradgradcheck(
            lambda v: pylops.TorchOperator(theirs, batch=True, flatten=False).apply(v.square()).square(), (x,)
        )


def test_bridge_vmap(theirs):
    op, x = from_pylops(theirs), randn(4, 2, 5, 3)
    want = torch.stack([op(v) for v in x])
    assert torch.equal(torch.func.vmap(op)(x), want)
    assert torch.equal(torch.func.vmap(op, in_dims=1, out_dims=1)(x), want)
    jacobian = torch.func.vmap(torch.func.jacrev(op))(x[0])
    assert relative(jacobian.reshape(2, 15, 15)[0], torch.from_numpy(theirs.todense()).to(D)) < 1e-12
    assert relative(torch.func.jacfwd(op)(x[0, 0]).reshape(15, 15), torch.from_numpy(theirs.todense()).to(D)) < 1e-12
    with pytest.raises(RuntimeError):
        torch.func.vmap(pylops.TorchOperator(theirs, batch=True, flatten=False).apply)(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64])
def test_bridge_keeps_the_dtype(theirs, dtype):
    op, x = from_pylops(theirs), randn(2, 5, 3).to(dtype).requires_grad_()
    out = op(x)
    assert out.dtype == dtype
    assert op.adjoint(out).dtype == dtype
    (g,) = torch.autograd.grad(out.abs().sum(), x)
    assert g.dtype == dtype
    wide = op(x.detach().to(torch.complex128 if dtype.is_complex else D))
    assert relative(out.detach().to(wide), wide) < 4 * torch.finfo(dtype).eps
    with pytest.raises(TypeError, match="floating"):
        op(torch.ones(2, 5, 3, dtype=torch.long))


def test_bridge_takes_any_leading_axes(theirs):
    op, x = from_pylops(theirs), randn(2, 4, 5, 3)
    want = torch.stack([torch.stack([torch.from_numpy(theirs @ m.numpy()) for m in v]) for v in x])
    assert relative(op(x), want) < 1e-12
    assert relative(op(x[0]), want[0]) < 1e-12
    assert relative(op(x[0, 0]), want[0, 0]) < 1e-12
    assert op(x[:0]).shape == (0, 4, 5, 3)
    assert op.forward_count == 8 + 4 + 1
    assert op.adjoint(x).shape == x.shape
    with pytest.raises(ValueError, match="leading"):
        op(x[..., :2])


def test_bridge_pickles(theirs):
    op, x = from_pylops(theirs), randn(2, 5, 3)
    assert torch.equal(pickle.loads(pickle.dumps(op))(x), op(x))
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(pylops.TorchOperator(theirs, batch=True))


def test_bridge_of_a_complex_operator_has_real_gradients_for_real_models():
    op = from_pylops(pylops.signalprocessing.FFT(6, real=False, dtype="complex128"))
    x = randn(2, 6).requires_grad_()
    assert op(x).is_complex()
    assert gradcheck(op, (x,))
    assert gradgradcheck(op, (x,))


@pytest.mark.parametrize(
    "op", [PostStack.examples()[0], Mask.examples()[0], MatrixOperator.examples()[2]], ids=["real", "mask", "complex"]
)
def test_to_pylops(op):
    there = to_pylops(op)
    assert there.dims == op.model_shape
    assert there.dimsd == op.data_shape
    assert pylops.utils.dottest(
        there, rtol=1e-10, complexflag=3 if op(torch.zeros(1, *op.model_shape)).is_complex() else 0
    )
    assert relative(torch.from_numpy(there.todense()), op.to_dense()) < 1e-12
    x = randn(1, *op.model_shape)
    again = from_pylops(pickle.loads(pickle.dumps(there)))
    assert relative(again(x), op(x)) < 1e-12
    assert np.allclose((there @ x[0].numpy()), op(x)[0].numpy())
    solved = pylops.optimization.basic.cgls(there, op(x)[0].numpy().ravel(), niter=3)[0]
    assert solved.size == x[0].numel()


def test_from_pylops_is_quiet(theirs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_pylops(theirs)(randn(1, 5, 3))


@pytest.mark.parametrize("sd", [1e-2, 1e-3])
def test_stacked_solves_survive_float32(sd):
    g = torch.Generator().manual_seed(0)
    shape = (1, 20, 12)
    A = stack(PostStack(torch.tensor([-0.1, 0.25, 0.5, 0.25, -0.1]), shape), Smooth(shape, (9, 5)))
    R = BlockDiagonal([Scalar(sd**2, shape), Scalar(sd**2, shape)])
    m = torch.randn(2, *shape, generator=g, dtype=torch.float64)
    d = A(m) + sd * torch.randn(2, 480, generator=g, dtype=torch.float64)
    wide = A.adjoint(A.solve(d, R, 0.5).x)
    solved = A.solve(d.float(), R, 0.5)
    assert solved.x.dtype == torch.float32
    # rounding of the right-hand side alone, 6e-8, is amplified by 1/sd at most
    assert float((A.adjoint(solved.x).double() - wide).norm() / wide.norm()) < 1e-7 / sd
