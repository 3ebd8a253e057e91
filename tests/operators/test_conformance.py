"""What every operator promises, checked for each class the rooms export, by itself: a new file is covered by being there."""

import copy
import functools
import inspect
import math
import pickle
import warnings

import pytest
import torch

from invgen import operators, transforms
from invgen.contracts import LinearOperator, Operator
from invgen.covariance import Dense, Diagonal, Scalar
from invgen.linalg import dot_test

torch.set_num_threads(1)
DTYPE = torch.float64


def discover(room):
    """Concrete operator classes a room exports; abstract ones inherit Operator's own forward."""
    found = [getattr(room, name) for name in sorted(room.__all__)]
    return [c for c in found if inspect.isclass(c) and issubclass(c, Operator) and c.forward is not Operator.forward]


def missing_examples(classes):
    """One sentence for each class without `examples` of its own."""
    return [
        f"{c.__name__} has no examples(); add a classmethod that returns one to three small instances."
        for c in classes
        if "examples" not in c.__dict__
    ]


CLASSES = discover(operators) + discover(transforms)
INSTANCES = {
    f"{c.__module__.split('.')[-1]}.{c.__name__}-{i}": (c, i)
    for c in CLASSES
    if "examples" in c.__dict__
    for i in range(len(c.examples()))
}
LINEAR = [k for k, (c, _) in INSTANCES.items() if issubclass(c, LinearOperator)]
TRANSFORMS = [k for k, (c, _) in INSTANCES.items() if issubclass(c, transforms.Transform)]


def make(key):
    cls, i = INSTANCES[key]
    return cls.examples()[i]


def generator(key, salt=0):
    return torch.Generator().manual_seed(sum(map(ord, key)) + 1000 * salt)


def draw(key, shape, batch=3, salt=0, dtype=DTYPE):
    return torch.randn(batch, *shape, generator=generator(key, salt), dtype=dtype)


def model(key, op, batch=3, salt=0):
    """Positive, inside (0.1, 4): in the domain of every operator here (Log, bounds, velocities)."""
    return draw(key, op.model_shape, batch, salt).sigmoid() * 3.9 + 0.1


def data_like(key, op, salt=0):
    out = op(model(key, op))
    return draw(key, op.data_shape, salt=salt, dtype=out.dtype)


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def test_every_class_has_examples():
    missing = missing_examples(CLASSES)
    assert not missing, " ".join(missing)
    assert len(CLASSES) >= 16


def test_a_class_without_examples_is_reported():
    class Lonely(Operator):
        def forward(self, x, **theta):
            return x

    (sentence,) = missing_examples([*CLASSES, Lonely])
    assert sentence.startswith("Lonely has no examples()")


@pytest.mark.parametrize("key", INSTANCES)
def test_shapes(key):
    op = make(key)
    x = model(key, op)
    out = op(x)
    assert tuple(out.shape) == (3, *(op.data_shape or x.shape[1:]))
    wider = torch.ones(2, *op.model_shape[:-1], op.model_shape[-1] + 1, dtype=DTYPE)
    for wrong in (x[..., None], wider, *([] if isinstance(op, operators.PyLopsOperator) else [x[0]])):
        with pytest.raises(ValueError, match="shape"):
            op(wrong)
    with pytest.raises(TypeError):
        op(x.numpy())


@pytest.mark.parametrize("key", LINEAR)
def test_adjoint_checks_its_shape(key):
    op = make(key)
    wrong = torch.ones(2, *op.data_shape[:-1], op.data_shape[-1] + 1, dtype=DTYPE)
    with pytest.raises(ValueError, match="shape"):
        op.adjoint(wrong)


@pytest.mark.parametrize("key", INSTANCES)
def test_derivatives_as_declared(key):
    op = make(key)
    x = model(key, op, batch=2).requires_grad_()
    if op.derivative_order == 0:
        return
    assert torch.autograd.gradcheck(op, (x,))
    if op.derivative_order == 2:
        assert torch.autograd.gradgradcheck(op, (x,))


@pytest.mark.parametrize("key", INSTANCES)
def test_pickle_and_copy(key):
    op = make(key)
    x = model(key, op)
    out = op(x)  # fills the caches first
    for clone in (pickle.loads(pickle.dumps(op)), copy.deepcopy(op)):
        assert torch.equal(clone(x), out)


@pytest.mark.parametrize("key", INSTANCES)
def test_vmap_where_declared(key):
    op = make(key)
    if not op.vmappable:
        return
    x = torch.stack([model(key, op, salt=s) for s in range(4)])
    one_by_one = torch.stack([op(v) for v in x])
    assert relative(torch.func.vmap(op)(x), one_by_one) < 1e-12
    if isinstance(op, LinearOperator):
        d = torch.stack([data_like(key, op, salt=s) for s in range(4)])
        assert relative(torch.func.vmap(op.adjoint)(d), torch.stack([op.adjoint(v) for v in d])) < 1e-12


@pytest.mark.parametrize("key", INSTANCES)
def test_dtype_is_kept(key):
    op = make(key)
    x = model(key, op)
    double, single = op(x), op(x.float())
    assert single.real.dtype == torch.float32
    assert double.real.dtype == DTYPE
    assert single.is_complex() == double.is_complex()
    assert relative(single.to(double), double) < 1e-4
    if isinstance(op, LinearOperator):
        assert (
            op.adjoint(double.to(torch.complex64 if double.is_complex() else torch.float32)).real.dtype == torch.float32
        )


@pytest.mark.parametrize("key", INSTANCES)
def test_items_are_independent(key):
    op = make(key)
    x = model(key, op, batch=5)
    together = op(x)
    for i in range(5):
        assert relative(op(x[i : i + 1]), together[i : i + 1]) < 1e-10
    changed = x.clone()
    changed[0] = 2.0
    assert relative(op(changed)[1:], together[1:]) < 1e-10


@pytest.mark.parametrize("key", INSTANCES)
def test_a_first_call_in_inference_mode_leaves_gradients_intact(key):
    op = make(key)
    x = model(key, op).float()
    with torch.inference_mode():
        op(x)
        if isinstance(op, LinearOperator):
            op.adjoint(op(x))
    if op.derivative_order:
        (g,) = torch.autograd.grad(op(x.requires_grad_()).abs().sum(), x)
        assert torch.isfinite(g).all()


@pytest.mark.parametrize("key", LINEAR)
def test_dot_test(key):
    op = make(key)
    complex_model = op.adjoint(op(model(key, op))).is_complex()
    for dtype in (torch.complex128,) if complex_model else (DTYPE, torch.complex128):
        if getattr(op, "real_model", False) and dtype.is_complex:
            continue
        u = draw(key, op.model_shape, dtype=dtype)
        v = draw(key, op.data_shape, salt=1, dtype=op(u).dtype)
        assert dot_test(op, op.adjoint, u, v) <= 1e-10


@pytest.mark.parametrize("key", LINEAR)
def test_counts(key):
    op = make(key)
    x = model(key, op, batch=4)
    d = op(x)
    op.adjoint(d)
    op.adjoint(d)
    assert (op.forward_count, op.adjoint_count) == (4, 8)


def covariances(key, shape, batch):
    """Scalar, per-item scalar, diagonal and dense, with eigenvalues between 0.4 and 3."""
    n = math.prod(shape)
    g = generator(key, 7)
    W = torch.randn(n, n, generator=g, dtype=DTYPE) / n**0.5
    dense = W @ W.T
    dense = 0.5 * torch.eye(n, dtype=DTYPE) + dense * (2.4 / torch.linalg.matrix_norm(dense, 2))
    each = torch.rand(batch, generator=g, dtype=DTYPE) + 0.5
    variances = torch.rand(shape, generator=g, dtype=DTYPE) + 0.5
    return {
        "scalar": (Scalar(0.7, shape), [0.7 * torch.eye(n, dtype=DTYPE)] * batch),
        "item": (Scalar(each, shape), [v * torch.eye(n, dtype=DTYPE) for v in each]),
        "diagonal": (Diagonal(variances), [variances.flatten().diag()] * batch),
        "dense": (Dense(dense, shape), [dense] * batch),
    }


PAIRS = [
    ("scalar", "scalar"),
    ("item", "item"),
    ("scalar", "item"),
    ("diagonal", "diagonal"),
    ("item", "diagonal"),
    ("dense", "dense"),
    ("scalar", "dense"),
    ("dense", "item"),
]


@functools.cache
def realified(key):
    """The operator, its matrix on real and imaginary parts, and whether models and data are complex.

    On (Re, Im) the adjoint under Re⟨u, v⟩ is a plain transpose, for real and for complex models alike.
    """
    op = make(key)
    complex_data = op(torch.zeros(1, *op.model_shape, dtype=DTYPE)).is_complex()
    complex_model = complex_data and not getattr(op, "real_model", False)
    M = op.to_dense()
    if not complex_data:
        return op, M, False, False
    real = torch.cat([M.real, M.imag])
    return (
        (op, torch.cat([real, torch.cat([-M.imag, M.real])], dim=1), True, True)
        if complex_model
        else (op, real, False, True)
    )


def real_parts(v):
    v = v.flatten(1)
    return torch.cat([v.real, v.imag], dim=1) if v.is_complex() else v


def twice(matrix, double):
    return torch.block_diag(matrix, matrix) if double else matrix


@pytest.mark.parametrize("kinds", PAIRS, ids=["-".join(p) for p in PAIRS])
@pytest.mark.parametrize("key", LINEAR)
def test_solves_against_dense_algebra(key, kinds):
    op, M, complex_model, complex_data = realified(key)
    batch = 3
    R, R_each = covariances(key, op.data_shape, batch)[kinds[0]]
    C, C_each = covariances(key + "C", op.model_shape, batch)[kinds[1]]
    b = draw(key, op.data_shape, salt=2, dtype=torch.complex128 if complex_data else DTYPE)
    m = draw(key, op.model_shape, salt=3, dtype=torch.complex128 if complex_model else DTYPE)
    data, update = op.solve(b, R, C), op.solve_model(m, R, C)
    assert data.converged.all()
    assert update.converged.all()
    assert data.x.shape == b.shape
    assert update.x.shape == m.shape
    for i in range(batch):
        r, c = twice(R_each[i], complex_data), twice(C_each[i], complex_model)
        for system, rhs, got in (
            (r + M @ c @ M.T, b, data.x),
            (M.T @ torch.linalg.solve(r, M) + torch.linalg.inv(c), m, update.x),
        ):
            want = torch.linalg.solve(system, real_parts(rhs)[i])
            # conjugate gradients stop at a residual of 1e-10; the error is larger by the condition number at the most
            bound = 1e-12 + 2e-10 * float(torch.linalg.cond(system))
            assert float((real_parts(got)[i] - want).norm() / want.norm()) < bound


@pytest.mark.parametrize("key", LINEAR)
def test_svd_where_it_exists(key):
    op = make(key)
    if (
        type(op).svd is LinearOperator.svd
        or getattr(op, "real_model", False)
        or isinstance(op, (operators.Adjoint, operators.Scaled))
    ):
        try:
            U, s, Vh = op.svd()
        except TypeError:  # a sentence that names the way out
            with pytest.raises(TypeError, match="SVD"):
                op.svd()
            return
    U, s, Vh = op.svd()
    M = op.to_dense()
    assert relative((U * s.to(U)) @ Vh, M.to(U)) < 1e-12
    assert relative(U.mH @ U, torch.eye(len(s), dtype=U.dtype)) < 1e-12
    assert relative(Vh @ Vh.mH, torch.eye(len(s), dtype=U.dtype)) < 1e-12
    assert (s >= 0).all()


@pytest.mark.parametrize("key", TRANSFORMS)
def test_transforms_invert_and_know_their_volume(key):
    T = make(key)
    u = model(key, T)
    x = T(u)
    assert relative(T.inverse(x), u) < 1e-10
    jacobian = torch.func.vmap(torch.func.jacrev(lambda v: T(v[None])[0]))(u).reshape(3, u[0].numel(), u[0].numel())
    _, logdet = torch.linalg.slogdet(jacobian)
    torch.testing.assert_close(T.log_det(u), logdet, rtol=1e-10, atol=1e-10)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
