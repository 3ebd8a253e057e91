"""Every covariance against its dense matrix."""

import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from invgen.covariance import BlockDiagonal, Dense, Diagonal, Kronecker, Scalar, Stationary, as_covariance
from invgen.kronecker import toeplitz


def spectrum(shape, *, seed=0):
    """A positive, even spectrum: that of a smooth correlation plus a nugget."""
    r = torch.zeros(shape, dtype=torch.float64)
    for i, n in enumerate(shape):
        k = torch.arange(n, dtype=torch.float64)
        lag = torch.minimum(k, n - k).reshape(-1, *(1,) * (len(shape) - 1 - i))
        r = r + (lag / (1.0 + 0.3 * seed)) ** 2
    return torch.fft.fftn((-0.5 * r).exp()).real.clamp_min(0) + 0.1


def matrix(n, *, seed=0, dtype=torch.float64):
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return a @ a.mH / n + 0.5 * torch.eye(n, dtype=dtype)


def variances(*shape):
    return torch.rand(*shape, dtype=torch.float64) + 0.2


def block():
    return BlockDiagonal(
        [Scalar(0.7, (3,)), Diagonal(variances(2, 2)), Dense(matrix(4), (4,)), Stationary(spectrum((5,)), (1, 5))]
    )


CASES = {
    "scalar": lambda: Scalar(0.7, (2, 3)),
    "diagonal": lambda: Diagonal(variances(2, 3)),
    "dense": lambda: Dense(matrix(6), (2, 3)),
    "dense-factor": lambda: Dense(matrix(6), (2, 3)).scaled(3.0),
    "stationary-1d": lambda: Stationary(spectrum((7,)), (1, 7)),
    "stationary-even": lambda: Stationary(spectrum((6, 4)), (1, 6, 4)),
    "stationary-odd": lambda: Stationary(torch.stack([spectrum((5, 7)), 2 * spectrum((5, 7), seed=3)]), (2, 5, 7)),
    "kronecker": lambda: Kronecker(matrix(3), matrix(4, seed=1), (2, 3, 4), nugget=0.1),
    "kronecker-time": lambda: Kronecker(matrix(3), None, (1, 3, 4)),
    "block": block,
}
PADDED = {
    "padded": lambda: Stationary(spectrum((9, 8)), (2, 4, 5)),
    "padded-block": lambda: BlockDiagonal([Scalar(0.4, (3,)), Stationary(spectrum((8,)), (1, 5))]),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("name", list(CASES))
def test_against_dense(name, dtype):
    C = CASES[name]()
    full, n = C.dense().to(dtype), math.prod(C.shape)
    v = torch.randn(4, *C.shape, dtype=dtype)
    flat = v.flatten(1)
    torch.testing.assert_close(C.apply(v).flatten(1), flat @ full.mT, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(C.solve(v).flatten(1), torch.linalg.solve(full, flat.mT).mT, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(C.solve(C.apply(v)), v, rtol=1e-10, atol=1e-12)
    whitened = C.whiten(v).abs().square().flatten(1).sum(1)
    torch.testing.assert_close(
        whitened, (flat.conj() * torch.linalg.solve(full, flat.mT).mT).sum(1).real, rtol=1e-10, atol=1e-12
    )
    L = C.sqrt(torch.eye(n, dtype=dtype).reshape(n, *C.noise_shape)).reshape(n, n).mT
    torch.testing.assert_close(L @ L.mH, full, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(C.logdet().double(), torch.linalg.slogdet(full.real)[1], rtol=1e-10, atol=1e-10)
    d = C.diagonal() if C.diagonal().ndim else C.diagonal().expand(C.shape)
    torch.testing.assert_close(d.reshape(n).double(), full.real.diagonal(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(C.mean_variance().double(), full.real.diagonal().mean(), rtol=1e-10, atol=1e-12)
    assert C.has_solve
    assert not C.per_item


@pytest.mark.parametrize("name", list(PADDED))
def test_padded_against_dense(name):
    C = PADDED[name]()
    n, m = math.prod(C.shape), math.prod(C.noise_shape)
    full = C.dense()
    torch.testing.assert_close(full, full.mT, rtol=0, atol=1e-12)
    L = C.sqrt(torch.eye(m, dtype=torch.float64).reshape(m, *C.noise_shape)).reshape(m, n).mT
    torch.testing.assert_close(L @ L.mT, full, rtol=1e-10, atol=1e-12)
    d = C.diagonal().reshape(n)
    torch.testing.assert_close(d, full.diagonal(), rtol=1e-10, atol=1e-12)
    assert not C.has_solve
    for call in (lambda: C.solve(torch.ones(1, *C.shape)), lambda: C.whiten(torch.ones(1, *C.shape)), C.logdet):
        with pytest.raises(TypeError, match="padded"):
            call()


@pytest.mark.parametrize("name", [*CASES, *PADDED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_dtype_is_kept(name, dtype):
    C = {**CASES, **PADDED}[name]()
    v, white = torch.randn(2, *C.shape, dtype=dtype), torch.randn(2, *C.noise_shape, dtype=dtype)
    results = [C.apply(v), C.sqrt(white)] + ([C.solve(v), C.whiten(v)] if C.has_solve else [])
    assert {r.dtype for r in results} == {dtype}
    assert {tuple(r.shape) for r in results} == {tuple(v.shape)}
    torch.testing.assert_close(C.apply(v), pickle.loads(pickle.dumps(C)).apply(v))


@pytest.mark.parametrize("name", list(CASES))
def test_scaled_per_item(name):
    C, factors = CASES[name](), torch.tensor([0.5, 2.0, 7.0], dtype=torch.float64)
    many = C.scaled(factors)
    assert many.per_item
    v = torch.randn(3, *C.shape, dtype=torch.float64)
    white = torch.randn(3, *C.noise_shape, dtype=torch.float64)
    for i, factor in enumerate(factors.tolist()):
        one = C.scaled(factor)
        for method, argument in (("apply", v), ("solve", v), ("whiten", v), ("sqrt", white)):
            torch.testing.assert_close(
                getattr(many, method)(argument)[i], getattr(one, method)(argument[i : i + 1])[0], rtol=1e-10, atol=1e-12
            )
        torch.testing.assert_close(many.logdet()[i], one.logdet(), rtol=1e-10, atol=1e-10, check_dtype=False)
        torch.testing.assert_close(many.diagonal()[i], one.diagonal(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(many.mean_variance()[i], one.mean_variance(), rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="no single matrix"):
        many.dense()
    with pytest.raises(ValueError, match="positive"):
        C.scaled(torch.tensor([1.0, -1.0, 1.0]))


def test_block_diagonal_mixes_shared_and_per_item():
    C = BlockDiagonal([Scalar(torch.tensor([1.0, 2.0]), (2,)), Scalar(5.0, (3,)), Diagonal(variances(2, 2), (2,))])
    assert tuple(C.diagonal().shape) == (2, 7)
    torch.testing.assert_close(C.apply(torch.ones(2, 7, dtype=torch.float64)), C.diagonal())
    torch.testing.assert_close(C.logdet(), C.diagonal().log().sum(1))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda: Scalar(0.3, (2, 3)), CASES["scalar"]),
        (CASES["scalar"], CASES["diagonal"]),
        (CASES["dense"], CASES["diagonal"]),
        (CASES["dense"], CASES["dense-factor"]),
        (CASES["scalar"], CASES["dense-factor"]),
        (lambda: Stationary(spectrum((6,)), (3, 6)), lambda: Scalar(0.2, (3, 6))),
        (lambda: Stationary(spectrum((9,)), (1, 6)), lambda: Stationary(spectrum((9,), seed=2), (1, 6))),
        (lambda: Stationary(spectrum((9,)), (1, 6)), lambda: Dense(matrix(6), (1, 6))),
        (lambda: Kronecker(matrix(2), matrix(3)), lambda: Scalar(0.2, (1, 2, 3))),
        (lambda: Kronecker(matrix(2), matrix(3)), lambda: Dense(matrix(6), (1, 2, 3))),
        (block, lambda: Scalar(0.2, (16,))),
        (lambda: BlockDiagonal([Scalar(0.7, (3,)), Dense(matrix(4))]), lambda: Diagonal(variances(7))),
        (block, block),
    ],
)
def test_plus(first, second):
    a, b = first(), second()
    total = a.plus(b)
    torch.testing.assert_close(total.dense(), a.dense() + b.dense(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(b.plus(a).dense(), total.dense(), rtol=1e-10, atol=1e-12)


def test_sums_without_structure_say_so():
    with pytest.raises(TypeError, match="no closed structure"):
        Stationary(spectrum((6,)), (1, 6)).plus(Diagonal(variances(1, 6)))
    with pytest.raises(ValueError, match="one shape"):
        Scalar(1.0, (3,)).plus(Scalar(1.0, (4,)))


def test_complex_hermitian_dense():
    M = matrix(5, dtype=torch.complex128)
    C, v = Dense(M), torch.randn(3, 5, dtype=torch.complex128)
    torch.testing.assert_close(C.apply(v), v @ M.mT, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(C.solve(C.apply(v)), v, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(C.dense(), M)
    with pytest.raises(TypeError, match="complex"):
        C.apply(v.real)


@given(st.lists(st.integers(1, 7), min_size=1, max_size=3), st.integers(1, 2), st.integers(0, 3), st.integers(1, 3))
def test_stationary_any_shape(spatial, channels, padding, batch):
    shape = (channels, *spatial)
    C = Stationary(spectrum(tuple(n + padding for n in spatial)), shape)
    v = torch.randn(batch, *shape, dtype=torch.float64)
    full = C.dense()
    torch.testing.assert_close(C.apply(v).flatten(1), v.flatten(1) @ full.mT, rtol=1e-9, atol=1e-11)
    # a real field through the half-spectrum transform equals the full one
    torch.testing.assert_close(C.apply(v), C.apply(v.to(torch.complex128)).real, rtol=1e-9, atol=1e-11)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 4), st.booleans())
def test_uncorrelated_any_shape(shape, batch, per_item):
    shape = tuple(shape)
    variance = variances(batch, *shape) if per_item else variances(*shape)
    C, v = Diagonal(variance, shape), torch.randn(batch, *shape, dtype=torch.float64)
    torch.testing.assert_close(C.apply(v), variance * v)
    torch.testing.assert_close(C.solve(C.apply(v)), v)
    assert C.logdet().shape == ((batch,) if per_item else ())
    assert C.mean_variance().shape == ((batch,) if per_item else ())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Scalar(0.0, (2,)), "positive"),
        (lambda: Scalar(float("nan"), (2,)), "positive"),
        (lambda: Scalar(torch.ones(2, 2), (2, 2)), "Diagonal"),
        (lambda: Diagonal(torch.tensor([1.0, -1.0])), "positive"),
        (lambda: Diagonal(torch.ones(3), (2, 2)), "one variance a datum"),
        (lambda: Dense(torch.ones(2, 3)), "needs"),
        (lambda: Dense(torch.tensor([[1.0, 0.5], [0.0, 1.0]])), "not symmetric"),
        (lambda: Dense(torch.tensor([[1.0, 2.0], [2.0, 1.0]])), "positive definite"),
        (lambda: Stationary(-torch.ones(4), (1, 4)), "non-negative"),
        (lambda: Stationary(torch.ones(3), (1, 4)), "cover the field"),
        (lambda: Stationary(torch.ones(3, 4), (2, 4)), "cover the field"),
        (lambda: Stationary(torch.arange(1.0, 6.0), (1, 5)).apply(torch.ones(1, 1, 5)), "not even"),
        (lambda: Stationary(torch.tensor([1.0, 0.0, 0.0]), (1, 3)).solve(torch.ones(1, 1, 3)), "nugget"),
        (lambda: Stationary(torch.ones(6), (1, 4)).sqrt(torch.ones(1, 1, 4)), "padded grid"),
        (lambda: Kronecker(torch.eye(3), torch.eye(4), (1, 4, 3)), "one row a sample"),
        (lambda: Kronecker(torch.eye(3)), "width"),
        (lambda: Kronecker(torch.ones(3, 3), torch.eye(4)), "nugget"),
        (lambda: Kronecker(toeplitz(torch.tensor([1.0, 0.9]), 5), torch.eye(2)), "taper"),
        (lambda: as_covariance(Scalar(1.0, (3,)), (4,)), "lives on"),
        (lambda: as_covariance(torch.ones(2, 2), (4,)), "one variance a datum"),
    ],
)
def test_bad_covariances(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_as_covariance_reads_shapes():
    assert isinstance(as_covariance(2.0, (3,)), Scalar)
    assert isinstance(as_covariance(torch.ones(3), (3,)), Diagonal)
    assert isinstance(as_covariance(torch.ones(3), (3,), batched=True), Scalar)
    assert as_covariance(torch.ones(5), (3,)).per_item
    assert as_covariance(torch.ones(5, 3), (3,)).per_item
