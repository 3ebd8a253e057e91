"""DDRM and DDNM: the variance of every branch against the papers, and the same samples however a problem is stated."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from invgen.covariance import Dense
from invgen.driver import Streams
from invgen.noise import GaussianNoise
from invgen.operators import Convolution, Mask, MatrixOperator
from invgen.operators.algebra import AffineOperator
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem, Term
from invgen.solvers import DDNM, DDRM
from invgen.transforms import Affine, Exp

F64 = torch.float64
DIM, DATA = 5, 3
SOLVERS = [DDRM(steps=12), DDRM(steps=9, eta=0.4, eta_b=0.6), DDNM(steps=12)]


def normal(seed, *shape, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Known:
    """A prior whose clean field is known: D(u, σ) = x0 for every u, so that all that moves is the methods' own noise."""

    grid, transform = None, Affine()
    sigma_data, start_sigma = 1.0, 8.0

    def __init__(self, truth):
        self.truth, self.shape = truth, tuple(truth.shape)

    def denoise(self, u, sigma):
        return self.truth.to(u).expand_as(u)

    def sample(self, n, *, seed=0):
        return self.truth.expand(n, *self.shape)


def spread_out():
    """A matrix with singular values 4, 1 and 0.2, so that with noise 0.5 the data weigh in at σ = 0.125, 0.5 and 2.5."""
    U = torch.linalg.qr(normal(1, DATA, DATA)).Q
    V = torch.linalg.qr(normal(2, DIM, DIM)).Q
    return U @ torch.diag(torch.tensor([4.0, 1.0, 0.2], dtype=F64)) @ V[:, :DATA].T, V


def moments_are(values, mean, variance, comparisons):
    """Two-sided z-tests of mean and variance, `comparisons` of them at a family-wise 1e-4 together."""
    n = len(values)
    limit = float(torch.special.ndtri(torch.tensor(1 - 0.5e-4 / (2 * comparisons), dtype=F64)))
    z = (values.mean(0) - mean) / (variance / n).sqrt()
    assert float(z.abs().max()) < limit
    ratio = (values - mean).square().mean(0) / variance
    assert float((ratio - 1).abs().max()) < limit * math.sqrt(2 / n)


@pytest.mark.parametrize(("eta", "eta_b"), [(0.85, 1.0), (1.0, 0.5), (0.3, 0.8)])
def test_ddrm_keeps_the_marginal_of_the_diffusion(eta, eta_b):
    """Proposition 3.1: over the noise of the data, every component has N(x0, σ²) at every level, in every branch."""
    A, V = spread_out()
    truth, noise, n = 1.0 + normal(3, DIM), 0.5, 4000
    data = truth @ A.T + noise * normal(4, n, DATA)
    problem = InverseProblem(data, MatrixOperator(A), GaussianNoise(noise), Known(truth))
    solver = DDRM(steps=10, eta=eta, eta_b=eta_b, sigma_min=0.05)
    levels = solver.levels(problem)
    weigh_in = noise / torch.tensor([4.0, 1.0, 0.2])
    assert all(bool((weigh_in > s).any()) and bool((weigh_in < s).any()) for s in (levels[6], levels[3]))
    states = {}
    solver.solve(problem, 1, seed=7, dtype=F64, chunk=n, callbacks=[lambda k, s: states.update({k: s["u"]})])
    for k in range(9):
        sigma = levels[k + 1]
        components = (states[k] - truth) @ V
        moments_are(components, torch.zeros(DIM, dtype=F64), torch.full((DIM,), sigma**2, dtype=F64), 9 * DIM * 3)
    torch.testing.assert_close(states[9], truth.expand(n, DIM))


@pytest.mark.parametrize(("eta", "eta_b"), [(0.85, 1.0), (0.5, 0.7)])
def test_ddrm_given_the_data_has_the_variance_of_its_branch(eta, eta_b):
    """Equation 5 line by line for one data set; a noise off by √2 fails by twenty standard errors."""
    A, V = spread_out()
    truth, noise, n = 1.0 + normal(3, DIM), 0.5, 4000
    data = truth @ A.T + noise * normal(5, DATA)
    problem = InverseProblem(data, MatrixOperator(A), GaussianNoise(noise), Known(truth))
    solver = DDRM(steps=10, eta=eta, eta_b=eta_b, sigma_min=0.05)
    chunk = problem.select([0] * n, dtype=F64)
    sigma, after = solver.levels(chunk)[6:8]
    u = truth + sigma * normal(6, DIM).expand(n, DIM)
    out = solver.step(chunk, {"u": u, "k": torch.tensor(6)}, Streams(0, range(n)))["u"] @ V
    s = torch.tensor([4.0, 1.0, 0.2], dtype=F64)
    datum = data @ torch.linalg.inv(A @ V[:, :DATA]).T
    clean, before = truth @ V, u[0] @ V
    keep = math.sqrt(1 - eta**2)
    mean = clean + keep * after * (before - clean) / sigma
    variance = torch.full((DIM,), (eta * after) ** 2, dtype=F64)
    branches = set()
    for i in range(DATA):
        level = noise / float(s[i])
        branches.add(after < level)
        if after < level:
            mean[i] = clean[i] + keep * after * (datum[i] - clean[i]) / level
        else:
            mean[i] = (1 - eta_b) * clean[i] + eta_b * datum[i]
            variance[i] = after**2 - (eta_b * level) ** 2
    assert branches == {True, False}
    moments_are(out, mean, variance, 2 * DIM)


def test_ddnm_counts_the_noise_of_the_data_in_the_step():
    """Equations 17–19: the noise a Λ/s that the datum brings in and the added Φ make the ancestral variance."""
    A, V = spread_out()
    truth, noise, n = 1.0 + normal(3, DIM), 0.5, 6000
    data = truth @ A.T + noise * normal(8, n, DATA)
    problem = InverseProblem(data, MatrixOperator(A), GaussianNoise(noise), Known(truth))
    solver = DDNM(steps=10, sigma_min=0.05)
    chunk = problem.select(range(n), dtype=F64)
    for k in (2, 5, 7):
        sigma, after = solver.levels(chunk)[k : k + 2]
        u = truth + sigma * normal(9, DIM).expand(n, DIM)
        out = solver.step(chunk, {"u": u, "k": torch.tensor(k)}, Streams(k, range(n)))["u"] @ V
        a = 1 - (after / sigma) ** 2
        mean = a * truth @ V + (1 - a) * u[0] @ V
        moments_are(out, mean, torch.full((DIM,), after**2 * a, dtype=F64), 3 * DIM)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_precise_data_are_met(solver):
    A = spread_out()[0]
    prior = GaussianPrior.dense(2.0 + normal(10, DIM), torch.eye(DIM, dtype=F64) + 0.5)
    data = A @ normal(11, DIM)
    problem = InverseProblem(data, MatrixOperator(A), GaussianNoise(1e-5), prior)
    fine = dataclasses.replace(solver, steps=60, sigma_min=1e-4)
    x = fine.solve(problem, 20, dtype=F64).samples[0, 0]
    assert float((x @ A.T - data).abs().max()) < 1e-2
    assert float(x.std(0).max()) > 0.05


def same_samples(first, second, solver):
    a, b = (solver.solve(p, 6, seed=3, dtype=F64).samples for p in (first, second))
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_whitening_joint_terms_offsets_and_complex_data(solver):
    """Each statement of one problem gives the same samples as its plain matrix with white noise of variance one."""
    prior = GaussianPrior.dense(2.0 + normal(10, DIM), torch.eye(DIM, dtype=F64) + 0.5)
    A, B, d, e = normal(12, DATA, DIM), normal(13, 2, DIM), normal(14, DATA), normal(15, 2)
    root = torch.linalg.cholesky(torch.eye(DATA, dtype=F64) + 0.4)
    R = root @ root.T

    def white(matrix, data):
        return torch.linalg.solve(root, matrix), torch.linalg.solve(root, data)

    def plain(matrix, data, law=prior):
        return InverseProblem(data, MatrixOperator(matrix), GaussianNoise(1.0), law)

    correlated = GaussianNoise(covariance=Dense(R))
    Aw, dw = white(A, d)
    same_samples(InverseProblem(d, MatrixOperator(A), correlated, prior), plain(Aw, dw), solver)
    same_samples(InverseProblem(d, MatrixOperator(A), GaussianNoise(0.2), prior), plain(A / 0.2, d / 0.2), solver)
    terms = [Term(d, MatrixOperator(A), correlated), Term(e, MatrixOperator(B), GaussianNoise(0.5))]
    both = plain(torch.cat([Aw, 2 * B]), torch.cat([dw, 2 * e]))
    same_samples(InverseProblem(terms=terms, prior=prior), both, solver)
    b = normal(16, DATA)
    shifted = InverseProblem(d + b, AffineOperator(MatrixOperator(A), b), GaussianNoise(1.0), prior)
    same_samples(shifted, plain(A, d), solver)
    C = torch.complex(A[:2], normal(17, 2, DIM))
    c = torch.complex(d[:2], normal(18, 2))
    real = plain(torch.cat([C.real, C.imag]) * math.sqrt(2) / 0.3, torch.cat([c.real, c.imag]) * math.sqrt(2) / 0.3)
    same_samples(InverseProblem(c, MatrixOperator(C, real_model=True), GaussianNoise(0.3), prior), real, solver)


def test_an_affine_transform_is_part_of_the_physics():
    A, d = normal(12, DATA, DIM), normal(14, DATA)
    covariance = torch.eye(DIM, dtype=F64) + 0.5
    scaled = GaussianPrior.dense(2.0 + normal(10, DIM), covariance, transform=Affine(1.5, -2.0))
    plain = GaussianPrior.dense(2.0 + normal(10, DIM), covariance)
    x = DDRM().solve(InverseProblem(d, MatrixOperator(A), GaussianNoise(0.4), scaled), 4, dtype=F64).samples
    moved = d - A @ torch.full((DIM,), 1.5, dtype=F64)
    u = DDRM().solve(InverseProblem(moved, MatrixOperator(-2 * A), GaussianNoise(0.4), plain), 4, dtype=F64).samples
    torch.testing.assert_close(x, 1.5 - 2 * u, rtol=1e-8, atol=1e-8)


def test_what_the_singular_basis_cannot_hold_is_a_type_error():
    prior = GaussianPrior.diagonal(0.0, torch.ones(1, 80, 80, dtype=F64))
    blur = Convolution(torch.ones(3, 3, dtype=F64) / 9, (1, 80, 80))
    problem = InverseProblem(torch.zeros(1, 80, 80), blur, GaussianNoise(0.1), prior)
    with pytest.raises(TypeError, match=r"singular value decomposition.*6400 × 6400.*GuidedDiffusion"):
        DDRM().solve(problem, 1)
    small = GaussianPrior.diagonal(0.0, torch.ones(3, dtype=F64))
    with pytest.raises(TypeError, match="needs linear operators"):
        DDNM().solve(InverseProblem(torch.ones(3), _exp(), GaussianNoise(0.1), small), 1)


def _exp():
    return MatrixOperator(torch.eye(3, dtype=F64)) @ Exp()


def test_a_mask_uses_its_own_basis():
    mask = torch.tensor([True, False, True, True, False])
    prior = GaussianPrior.dense(2.0 + normal(10, DIM), torch.eye(DIM, dtype=F64) + 0.5)
    d = normal(14, 3)
    same_samples(
        InverseProblem(d, Mask(mask), GaussianNoise(0.3), prior),
        InverseProblem(d, MatrixOperator(torch.eye(DIM, dtype=F64)[mask]), GaussianNoise(0.3), prior),
        DDRM(steps=8),
    )


@pytest.mark.parametrize("bad", [{"steps": 1}, {"eta": 1.2}, {"eta_b": -0.1}])
def test_bad_settings(bad):
    with pytest.raises(ValueError, match="DDRM needs"):
        DDRM(**bad)
