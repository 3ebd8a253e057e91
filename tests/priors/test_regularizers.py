"""Every regulariser against what a proximal operator is: the minimiser, by subgradients, candidates and PyProximal."""

from __future__ import annotations

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch

import invgen.priors
from invgen.contracts import HasDensity, HasProx
from invgen.linalg import dot_test
from invgen.priors import (
    L0,
    L1,
    L2,
    L21,
    SCAD,
    TV,
    Box,
    Huber,
    L2Norm,
    LogPenalty,
    Nuclear,
    PyProximalRegularizer,
    RegularizerSum,
    WaveletSparsity,
)
from invgen.priors._differences import Differences
from invgen.priors.wavelet_sparsity import Wavelets, daubechies

F64 = torch.float64


def _classes():
    found = [getattr(invgen.priors, name) for name in invgen.priors.__all__]
    return [c for c in found if inspect.isclass(c) and all(hasattr(c, m) for m in ("value", "prox", "parts"))]


EXAMPLES = [pytest.param(r, id=f"{c.__name__}-{i}") for c in _classes() for i, r in enumerate(c.examples())]
every = pytest.mark.parametrize("prior", EXAMPLES)


def noise(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def points(prior, n, seed=0, scale=1.5, dtype=F64):
    return scale * noise(n, *prior.shape, seed=seed, dtype=dtype)


def accuracy(prior):
    """How far an iterated prox may be from the minimiser."""
    return 1e-9 if prior.exact_prox else 2e-5


def test_all_are_found():
    names = {c.__name__ for c in _classes()}
    assert names >= {"L0", "L1", "L2", "L21", "SCAD", "TV", "Box", "Huber", "L2Norm", "LogPenalty", "Nuclear"}
    assert names >= {"PyProximalRegularizer", "RegularizerSum", "WaveletSparsity"}


@every
def test_contract(prior):
    assert isinstance(prior, HasProx)
    assert isinstance(prior, HasDensity) == prior.convex
    x = points(prior, 3)
    step = torch.tensor([0.1, 0.7, 0.0], dtype=F64)
    y, value = prior.prox(x, step), prior.value(x)
    assert y.shape == x.shape
    assert value.shape == (3,)
    torch.testing.assert_close(prior.penalty(x), prior.weight * value)
    if prior.convex:
        torch.testing.assert_close(prior.log_prob(x), -prior.weight * value)
    if not (isinstance(prior, Box) or (isinstance(prior, RegularizerSum) and len(prior.summands) == 3)):
        torch.testing.assert_close(y[2], x[2], rtol=0, atol=1e-9)  # a zero step moves nothing
    for i in range(3):  # items do not depend on each other
        torch.testing.assert_close(prior.prox(x[i : i + 1], float(step[i]))[0], y[i], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(prior.value(x[i : i + 1])[0], value[i])
    low = copy.copy(prior)
    if hasattr(low, "tol"):
        low.tol, low.iterations = 1e-4, 300
    single = low.prox(x.float(), step.float())
    assert single.dtype == torch.float32
    assert prior.value(x.float()).dtype == torch.float32
    torch.testing.assert_close(single.double(), y, rtol=0, atol=2e-3 if hasattr(prior, "tol") else 1e-5)
    again = pickle.loads(pickle.dumps(prior))
    torch.testing.assert_close(again.prox(x, step), y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(prior.reweighted(2.0).penalty(x), 2.0 * value)


@every
def test_parts_add_up(prior):
    x = points(prior, 4, seed=3)
    total = sum(f.penalty(x if K is None else K(x)) for K, f in prior.parts())
    torch.testing.assert_close(total, prior.penalty(x))


@every
def test_prox_is_a_subgradient_step(prior):
    """(x − y)/(step · w) is a subgradient of R at y = prox(x): R(z) ≥ R(y) + ⟨(x − y)/(step · w), z − y⟩ for all z."""
    if not prior.convex:
        pytest.skip("subgradients are for convex functions")
    x = points(prior, 4, seed=1)
    step = torch.tensor([0.05, 0.3, 1.0, 4.0], dtype=F64)
    y = prior.prox(x, step)
    slope = (x - y) / (prior.weight * step.reshape(-1, *(1,) * (x.ndim - 1)))
    for seed, scale in enumerate((1.0, 0.1, 1e-2, 3.0)):
        for base in (y, torch.zeros_like(y), y.flatten(1).mean(1).reshape(-1, *(1,) * (x.ndim - 1))):
            z = base + scale * points(prior, 4, seed=10 + seed)
            if any(isinstance(p, Box) for p in getattr(prior, "summands", (prior,))):
                z = Box(prior.shape, -0.5, 0.6).prox(z, 1.0)  # outside the bounds R is infinite
            bound = prior.value(y) + (slope * (z - y)).flatten(1).sum(1)
            slack = prior.value(z) - bound
            size = 1 + slope.flatten(1).norm(dim=1) * (1 + (z - y).flatten(1).norm(dim=1))
            assert bool((slack >= -accuracy(prior) * size).all()), (seed, slack)


@every
def test_prox_is_firmly_non_expansive(prior):
    if not prior.convex:
        pytest.skip("not convex")
    a, b = points(prior, 6, seed=1), points(prior, 6, seed=2)
    for step in (0.1, 1.0):
        pa, pb = prior.prox(a, step), prior.prox(b, step)
        inner = ((pa - pb) * (a - b)).flatten(1).sum(1)
        assert bool(((pa - pb).square().flatten(1).sum(1) <= inner + accuracy(prior)).all())


@pytest.mark.parametrize(
    "prior",
    [
        L0((1,), 0.3),
        LogPenalty((1,), 0.6, 4.0),
        LogPenalty((1,), 0.6, 0.2),
        SCAD((1,), 0.8, 0.5),
        SCAD((1,), 3.5, 0.4, 2.5),
        SCAD((1,), 1.5, 0.4, 2.5),
        Huber((1,), 0.8, 0.4),
    ],
    ids=repr,
)
def test_prox_beats_every_candidate(prior):
    """Global minimum over a fine grid: what stationarity cannot say of penalties that are not convex."""
    x = torch.linspace(-3, 3, 241, dtype=F64)[:, None] + 1e-4
    y = prior.prox(x, 0.7)
    grid = torch.linspace(-4, 4, 4001, dtype=F64)[:, None]
    costs = 0.5 * (grid[None, :, 0] - x) ** 2 + 0.7 * prior.penalty(grid)[None]
    mine = 0.5 * (y - x)[:, 0] ** 2 + 0.7 * prior.penalty(y)
    assert float((mine - costs.min(1).values).max()) <= 1e-12


def test_moreau_identity():
    """x = prox_{tR}(x) + t Π(x/t), Π the projection onto the unit ball of the dual norm."""
    x, t = noise(5, 3, 4, 2, seed=4), 0.4
    cases = {
        L1((3, 4, 2)): x.div(t).clamp(-1, 1),
        L21((3, 4, 2)): x / t / (x / t).norm(dim=1, keepdim=True).clamp_min(1),
        L2Norm((3, 4, 2)): x / t / (x / t).flatten(1).norm(dim=1).reshape(-1, 1, 1, 1).clamp_min(1),
    }
    for prior, projected in cases.items():
        torch.testing.assert_close(prior.prox(x, t) + t * projected, x)


@every
def test_conjugates_by_moreau(prior):
    """x = prox_{σR*}(x) + σ prox_{R/σ}(x/σ), whatever way the conjugate is written."""
    if not prior.convex:
        pytest.skip("the identity is for convex functions")
    x, sigma = points(prior, 3, seed=5), torch.tensor([0.3, 1.0, 4.0], dtype=F64)
    wide = sigma.reshape(-1, *(1,) * (x.ndim - 1))
    for K, f in prior.parts():
        v = x if K is None else K(x)
        again = f.conjugate_prox(v, sigma) + wide.reshape(-1, *(1,) * (v.ndim - 1)) * f.prox(
            v / wide.reshape(-1, *(1,) * (v.ndim - 1)), 1 / sigma
        )
        torch.testing.assert_close(again, v)


@pytest.mark.parametrize("kind", ["L1", "L2", "Euclidean", "L21", "Huber", "L0", "Box", "Nuclear", "Log", "SCAD"])
def test_equal_to_pyproximal(kind):
    pp = pytest.importorskip("pyproximal")
    x, t = 1.5 * noise(3, 2, 4, 5, seed=6), 0.35
    shape = (2, 4, 5)
    theirs, ours, step = {
        "L1": (pp.L1(sigma=0.7), L1(shape, 0.7), t),
        "L2": (pp.L2(sigma=0.7), L2(shape, 0.7), t),
        "Euclidean": (pp.Euclidean(sigma=0.7), L2Norm(shape, 0.7), t),
        "L21": (pp.L21(2, sigma=0.7), L21(shape, 0.7), t),
        "Huber": (None, Huber(shape, 1.0, 0.6), t),
        # its rule cuts at step · sigma where ½x² against step · sigma cuts at its root
        "L0": (pp.L0(sigma=0.7), L0(shape, 0.7), (t * 0.7) ** 2 / 2 / 0.7),
        "Box": (pp.Box(-0.4, 0.9), Box(shape, -0.4, 0.9), t),
        "Nuclear": (pp.Nuclear((8, 5), sigma=0.7), Nuclear((8, 5), 0.7), t),
        "Log": (pp.Log(sigma=0.7, gamma=1.7), LogPenalty(shape, 0.7, 1.7), t),
        "SCAD": (pp.SCAD(sigma=0.7, a=3.7), SCAD(shape, 1.0, 0.7, 3.7), t),
    }[kind]
    if kind == "Nuclear":
        x = x.reshape(3, 8, 5)
    y, values = ours.prox(x, step), ours.penalty(x)
    for item, mine, value in zip(x, y, values, strict=True):
        flat = item.numpy().ravel().copy()
        if theirs is None:  # one entry at a time its circular Huber is the Huber function
            circular = pp.HuberCircular(alpha=0.6)
            expected = np.array([circular.prox(v[None].copy(), t)[0] for v in flat])
            total = sum(circular(v[None]) for v in flat)
        else:
            expected, total = theirs.prox(flat.copy(), t), theirs(flat)
        np.testing.assert_allclose(mine.numpy().ravel(), np.asarray(expected).ravel(), rtol=0, atol=1e-6)
        if kind == "L0":
            total = 0.7 * total  # which its value leaves out
        if kind != "Box":
            np.testing.assert_allclose(float(value), total, rtol=1e-6)


def test_tv_equals_pyproximal():
    pp = pytest.importorskip("pyproximal")
    for shape in ((12,), (6, 5), (3, 4, 3)):
        x = noise(*shape, seed=8)
        theirs = pp.TV(shape, sigma=0.6, niter=2000, rtol=0.0)
        expected = theirs.prox(x.numpy().ravel().copy(), 0.4)
        ours = TV(shape if len(shape) == 1 else (1, *shape), 0.6, tol=1e-7, iterations=10000)
        mine = ours.prox(x.reshape(1, *ours.shape), 0.4)
        np.testing.assert_allclose(mine.numpy().ravel(), expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(float(ours.penalty(x.reshape(1, *ours.shape))), theirs(x.numpy().ravel()), rtol=1e-9)


def test_tv_of_a_step_and_the_gap():
    """Each plateau of a clean step moves by step · w over its length; the stated gap bounds the distance."""
    x = torch.cat([torch.zeros(10, dtype=F64), torch.full((20,), 5.0, dtype=F64)])[None]
    want = torch.cat([torch.full((10,), 2 / 10, dtype=F64), torch.full((20,), 5 - 2 / 20, dtype=F64)])[None]
    for tol in (1e-1, 1e-3, 1e-6):
        prior = TV((30,), 4.0, tol=tol, iterations=100000)
        y = prior.prox(x, 0.5)
        assert prior.last_gap <= tol
        assert float((y - want).norm()) <= tol * float((x - y).norm()) + 1e-12


def test_tv_warm_start_takes_fewer_iterations():
    x = noise(2, 1, 16, 16, seed=2)
    prior = TV((1, 16, 16), 1.0, tol=1e-6, iterations=100000)
    y, dual = prior.warm_prox(x, 0.5)
    short = TV((1, 16, 16), 1.0, tol=1e-6, iterations=10)
    warm, _ = short.warm_prox(x, 0.5, dual)
    assert float((warm - y).norm()) < 1e-6 * float((x - y).norm())
    assert float((short.prox(x, 0.5) - y).norm()) > 1e-3 * float((x - y).norm())
    torch.testing.assert_close(prior.prox(torch.zeros_like(x), 0.5), torch.zeros_like(x))


@pytest.mark.parametrize("operator", [*Differences.examples(), *Wavelets.examples()], ids=lambda o: type(o).__name__)
def test_dot_products(operator):
    x, d = noise(2, *operator.model_shape, seed=1), noise(2, *operator.data_shape, seed=2)
    assert float(dot_test(operator, operator.adjoint, x, d)) < 1e-10


def test_normal_solve_of_differences_is_direct():
    for K in Differences.examples():
        M = K.to_dense()
        rhs = noise(2, *K.model_shape)
        expected = torch.linalg.solve(0.7 * torch.eye(M.shape[1], dtype=F64) + 1.3 * M.T @ M, rhs.flatten(1).T).T
        torch.testing.assert_close(K.solve_normal(rhs, 0.7, 1.3).flatten(1), expected)
        torch.testing.assert_close(torch.linalg.matrix_norm(M, 2) ** 2, torch.tensor(K.norm_squared, dtype=F64))


def test_wavelets_are_orthonormal_with_vanishing_moments():
    for shape, moments, levels in (((16,), 3, 1), ((1, 8, 16), 2, 3), ((2, 4, 4, 4), 4, 2)):
        W = Wavelets(shape, moments, levels).to_dense()
        torch.testing.assert_close(W @ W.T, torch.eye(len(W), dtype=F64), rtol=0, atol=1e-10)
    ramp = torch.arange(32, dtype=F64)[None] ** 2
    details = Wavelets((32,), 3, 1)(ramp)[:, 16:]
    assert float(details[:, :13].abs().max()) < 1e-9  # away from the wrap-around
    np.testing.assert_allclose(daubechies(2)[0], (1 + np.sqrt(3)) / (4 * np.sqrt(2)))


def test_complex_models():
    g = torch.complex(noise(3, 1, 4, 4, seed=1), noise(3, 1, 4, 4, seed=2))
    shape = (1, 4, 4)
    for prior in (
        L1(shape),
        L2(shape),
        L2Norm(shape),
        L21(shape),
        Huber(shape),
        TV(shape),
        WaveletSparsity(shape, levels=1),
    ):
        y = prior.prox(g, 0.3)
        assert y.is_complex()
        torch.testing.assert_close(prior.prox(1j * g, 0.3), 1j * y, rtol=1e-4, atol=1e-4)  # the phase goes through
        assert not prior.value(g).is_complex()
        torch.testing.assert_close(prior.prox(g.real + 0j, 0.3).real, prior.prox(g.real, 0.3), rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match="real models"):
        Box(shape).prox(g, 0.3)
    with pytest.raises(TypeError, match="real models"):
        (L1(shape) + Box(shape)).prox(g, 0.3)


@every
def test_refusals(prior):
    for wrong in (torch.zeros(prior.shape, dtype=F64), torch.zeros(2, *prior.shape, 1, dtype=F64)):
        for call in (prior.value, lambda x: prior.prox(x, 1.0)):
            with pytest.raises(ValueError, match="shape"):
                call(wrong)
    x = points(prior, 2)
    for step in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="step"):
            prior.prox(x, step)
    with pytest.raises(ValueError, match="step"):
        prior.prox(x, torch.ones(3, dtype=F64))


def test_bad_settings():
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight"):
            L1((3,), weight)
    with pytest.raises(ValueError, match="low exceeds high"):
        Box((3,), 1.0, 0.0)
    with pytest.raises(ValueError, match="NaN"):
        Box((3,), float("nan"), 1.0)
    with pytest.raises(ValueError, match="above 2"):
        SCAD((3,), a=2.0)
    with pytest.raises(ValueError, match="fewer levels"):
        WaveletSparsity((1, 12, 8), levels=3)
    with pytest.raises(ValueError, match="matrix"):
        Nuclear((3,))
    with pytest.raises(ValueError, match="one shape"):
        RegularizerSum([L1((3,)), L1((4,))])
    with pytest.raises(TypeError, match="no regulariser"):
        RegularizerSum([L1((3,)), 3])
    with pytest.raises(TypeError, match="ProxOperator"):
        PyProximalRegularizer(3, (4,))
    with pytest.raises(ValueError, match="broadcast"):
        L1((3,), centre=torch.zeros(4))
    with pytest.raises(ValueError, match="shape"):
        L1()


def test_values_differentiate_where_they_are_kinked():
    """MAP and Langevin steps meet flat pieces: gradients there are subgradients, never NaN."""
    for prior in (TV((1, 4, 4)), L21((2, 4, 4)), L2Norm((1, 4, 4)), L1((1, 4, 4)), Box((1, 4, 4)), Huber((1, 4, 4))):
        x = torch.zeros(2, *prior.shape, dtype=F64, requires_grad=True)
        (g,) = torch.autograd.grad(prior.log_prob(x).sum(), x)
        assert bool(torch.isfinite(g).all()), prior
