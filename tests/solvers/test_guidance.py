"""Guidance rules: every estimate against dense algebra, with correlated noise, offsets, two terms and complex data."""

from __future__ import annotations

import math

import pytest
import torch

from invgen.covariance import Dense
from invgen.noise import GaussianNoise
from invgen.operators import MatrixOperator
from invgen.operators.algebra import AffineOperator
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem, Term
from invgen.solvers import DPS, MMPS, TMPD, ConvolvedLikelihood, GuidedDiffusion, PiGDM
from invgen.transforms import Affine

F64, C128 = torch.float64, torch.complex128
DIM, DATA, SIGMA = 6, 4, 0.7
TIGHT = MMPS(iterations=16, rtol=1e-12)


def normal(seed, *shape, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def spd(seed, n, floor=0.2, dtype=F64):
    root = normal(seed, n, n, dtype=dtype) / math.sqrt(n)
    return root @ root.mH + floor * torch.eye(n, dtype=dtype)


MEAN, COVARIANCE = 2.0 + normal(1, DIM), spd(2, DIM)


def scalar():
    A, d = normal(10, DATA, DIM), normal(11, DATA)
    prior = GaussianPrior.dense(MEAN, COVARIANCE)
    return InverseProblem(d, MatrixOperator(A), GaussianNoise(0.3), prior), A, d, 0.09 * torch.eye(DATA, dtype=F64)


def correlated():
    A, d, R = normal(10, DATA, DIM), normal(11, DATA), spd(12, DATA, 0.05)
    prior = GaussianPrior.dense(MEAN, COVARIANCE)
    return InverseProblem(d, MatrixOperator(A), GaussianNoise(covariance=Dense(R)), prior), A, d, R


def affine():
    """x = 1.5 − 2 u and g(x) = A x + b: in u the matrix is −2 A and the data lose A 1.5 + b."""
    A, d, b, R = normal(10, DATA, DIM), normal(11, DATA), normal(13, DATA), 0.1 + torch.arange(4, dtype=F64) / 5
    prior = GaussianPrior.dense(MEAN, COVARIANCE, transform=Affine(1.5, -2.0))
    operator = AffineOperator(MatrixOperator(A), b)
    problem = InverseProblem(d, operator, GaussianNoise(R.sqrt()), prior)
    return problem, -2 * A, d - b - A @ torch.full((DIM,), 1.5, dtype=F64), torch.diag(R)


def joint():
    A, B, d, e = normal(10, DATA, DIM), normal(14, 3, DIM), normal(11, DATA), normal(15, 3)
    R = spd(12, DATA, 0.05)
    terms = [
        Term(d, MatrixOperator(A), GaussianNoise(covariance=Dense(R))),
        Term(e, MatrixOperator(B), GaussianNoise(0.5)),
    ]
    problem = InverseProblem(terms=terms, prior=GaussianPrior.dense(MEAN, COVARIANCE))
    return (
        problem,
        torch.cat([A, B]),
        torch.cat([d, e]),
        torch.block_diag(R, 0.25 * torch.eye(3, dtype=F64)),
    )


def complex_data():
    """Circular noise with covariance R: the parts of the data have half of it, with the coupling of a Hermitian R."""
    A, d, R = normal(16, 3, DIM, dtype=C128), normal(17, 3, dtype=C128), spd(18, 3, 0.1, dtype=C128)
    problem = InverseProblem(
        d,
        MatrixOperator(A, real_model=True),
        GaussianNoise(covariance=Dense(R)),
        GaussianPrior.dense(MEAN, COVARIANCE),
    )
    half = 0.5 * torch.cat([torch.cat([R.real, -R.imag], 1), torch.cat([R.imag, R.real], 1)])
    return problem, torch.cat([A.real, A.imag]), torch.cat([d.real, d.imag]), half


CASES = [scalar, correlated, affine, joint, complex_data]
POINTS = 1.0 + 1.5 * normal(20, 3, DIM)


def chunk(problem):
    return problem.select([0] * len(POINTS), dtype=F64)


def denoiser():
    """J and D of the Gaussian prior."""
    J = COVARIANCE @ torch.linalg.inv(COVARIANCE + SIGMA**2 * torch.eye(DIM, dtype=F64))
    return J, MEAN + (POINTS - MEAN) @ J.T


def guided(A, d, S, at, fit, J):
    """fit + σ² Jᵀ Aᵀ S⁻¹ (d − A at)."""
    return fit + SIGMA**2 * torch.linalg.solve(S, (d - at @ A.T).T).T @ A @ J


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rule", [TIGHT, TMPD("exact")])
def test_exact_covariance_gives_the_exact_posterior_denoiser(case, rule):
    """u_σ is one more datum of u0 with noise σ: the answer is conjugate algebra, without any guidance formula."""
    problem, A, d, R = case()
    precision = torch.linalg.inv(COVARIANCE) + torch.eye(DIM, dtype=F64) / SIGMA**2 + A.T @ torch.linalg.solve(R, A)
    right = torch.linalg.solve(COVARIANCE, MEAN) + POINTS / SIGMA**2 + A.T @ torch.linalg.solve(R, d)
    got, _ = rule(chunk(problem), POINTS, SIGMA, 1.0)
    torch.testing.assert_close(got, torch.linalg.solve(precision, right.T).T, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("case", CASES)
def test_damping_adds_its_share_of_the_noise_level(case):
    problem, A, d, R = case()
    J, fit = denoiser()
    S = R + SIGMA**2 * A @ (J + 0.1 * torch.eye(DIM, dtype=F64)) @ A.T
    got, _ = MMPS(iterations=16, rtol=1e-12, damping=0.1)(chunk(problem), POINTS, SIGMA, 1.0)
    torch.testing.assert_close(got, guided(A, d, S, fit, fit, J), rtol=1e-8, atol=1e-8)
    with pytest.raises(ValueError, match="damping >= 0"):
        MMPS(damping=-0.1)


@pytest.mark.parametrize("precondition", [True, False])
def test_an_unfinished_solve_does_not_depend_on_the_units_of_a_term(precondition):
    """GMRES minimises the whitened residual, so that a precise datum in small units counts as much as any other."""
    A, B, d, e = normal(10, DATA, DIM), normal(14, 3, DIM), normal(11, DATA), normal(15, 3)
    rule = MMPS(iterations=3, rtol=0, precondition=precondition)
    results = []
    for unit in (1.0, 1e-3):
        terms = [
            Term(d, MatrixOperator(A), GaussianNoise(covariance=Dense(spd(12, DATA, 0.05)))),
            Term(unit * e, MatrixOperator(unit * B), GaussianNoise(0.5 * unit)),
        ]
        problem = InverseProblem(terms=terms, prior=GaussianPrior.dense(MEAN, COVARIANCE))
        results.append(rule(chunk(problem), POINTS, SIGMA, 1.0))
    (first, residual), (second, other) = results
    assert float(residual.min()) > 1e-6
    torch.testing.assert_close(first, second, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(residual, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_pigdm_and_convolved_are_their_formulas(case):
    problem, A, d, R = case()
    J, fit = denoiser()
    s2 = float(COVARIANCE.diagonal().mean())
    r2 = SIGMA**2 * s2 / (SIGMA**2 + s2)
    got, residual = PiGDM()(chunk(problem), POINTS, SIGMA, 1.0)
    torch.testing.assert_close(got, guided(A, d, R + r2 * A @ A.T, fit, fit, J), rtol=1e-8, atol=1e-8)
    assert float(residual.max()) < 1e-9
    eye = torch.eye(DIM, dtype=F64)
    full = guided(A, d, R + SIGMA**2 * A @ A.T, POINTS, fit, eye)
    torch.testing.assert_close(
        ConvolvedLikelihood("full")(chunk(problem), POINTS, SIGMA, 1.0)[0], full, rtol=1e-8, atol=1e-8
    )
    diagonal = guided(A, d, R + SIGMA**2 * torch.diag((A @ A.T).diagonal()), POINTS, fit, eye)
    got, residual = ConvolvedLikelihood("diagonal")(chunk(problem), POINTS, SIGMA, 1.0)
    torch.testing.assert_close(got, diagonal, rtol=1e-7, atol=1e-7)
    assert float(residual.max()) < 1e-9


@pytest.mark.parametrize("case", CASES)
def test_row_sums_replace_the_matrix(case):
    problem, A, d, R = case()
    J, fit = denoiser()
    sums = (A @ J @ A.T).sum(1).abs()
    got, _ = TMPD("row-sum")(chunk(problem), POINTS, SIGMA, 1.0)
    want = guided(A, d, R + SIGMA**2 * torch.diag(sums), fit, fit, J)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("case", [scalar, correlated, affine, joint])
def test_dps_is_its_formula(case):
    """2ζ/α² Jᵀ gᵀ R⁻¹ r / √(rᵀ R⁻¹ r), times the noise's rms, α² = 1/(1 + σ²), over the step's weight of D."""
    problem, A, d, R = case()
    J, fit = denoiser()
    r = d - fit @ A.T
    weighted = torch.linalg.solve(R, r.T).T
    if len(problem.terms) == 1:
        level = R.diagonal().mean().sqrt()
    else:
        level = ((R[:DATA, :DATA].diagonal().mean() + R[DATA:, DATA:].diagonal().mean()) / 2).sqrt()
    size = (r * weighted).sum(1, keepdim=True).sqrt()
    want = fit + 2 * 0.3 * (1 + SIGMA**2) / 0.25 * level * (weighted / size) @ A @ J
    got, residual = DPS(0.3)(chunk(problem), POINTS, SIGMA, 0.25)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
    assert residual is None


class Crooked:
    """A linear denoiser whose Jacobian is not symmetric, as a learned one's is not."""

    shape, grid, transform = (DIM,), None, Affine()
    sigma_data, start_sigma = 1.0, 20.0

    def __init__(self, J):
        self.J = J

    def denoise(self, u, sigma):
        return u @ self.J.T

    def sample(self, n, *, seed=0):
        return torch.zeros(n, DIM)


def test_a_jacobian_that_is_not_symmetric():
    """MMPS solves with Jᵀ, TMPD with the symmetric part; where that has negative eigenvalues they are cut."""
    A, d, R = normal(10, DATA, DIM), normal(11, DATA), 0.09 * torch.eye(DATA, dtype=F64)
    J = 0.4 * torch.eye(DIM, dtype=F64) + 0.15 * normal(30, DIM, DIM)
    problem = chunk(InverseProblem(d, MatrixOperator(A), GaussianNoise(0.3), Crooked(J)))
    fit = POINTS @ J.T
    spread = A @ J @ A.T
    want = guided(A, d, R + SIGMA**2 * spread.T, fit, fit, J)
    torch.testing.assert_close(TIGHT(problem, POINTS, SIGMA, 1.0)[0], want, rtol=1e-8, atol=1e-8)
    want = guided(A, d, R + SIGMA**2 * (spread + spread.T) / 2, fit, fit, J)
    torch.testing.assert_close(TMPD("exact")(problem, POINTS, SIGMA, 1.0)[0], want, rtol=1e-8, atol=1e-8)
    J = J - 0.8 * torch.eye(DIM, dtype=F64)
    problem = chunk(InverseProblem(d, MatrixOperator(A), GaussianNoise(0.3), Crooked(J)))
    fit, spread = POINTS @ J.T, A @ J @ A.T
    values, vectors = torch.linalg.eigh((spread + spread.T) / 2)
    assert float((R + SIGMA**2 * (spread + spread.T) / 2).diagonal().min()) < 0
    positive = (vectors * values.clamp_min(0)) @ vectors.T
    want = guided(A, d, R + SIGMA**2 * positive, fit, fit, J)
    torch.testing.assert_close(TMPD("exact")(problem, POINTS, SIGMA, 1.0)[0], want, rtol=1e-8, atol=1e-8)


RUNS = [
    (correlated, GuidedDiffusion(MMPS(), "heun", steps=40, sigma_min=0.002)),
    (affine, GuidedDiffusion(TMPD("exact"), "heun", steps=40, sigma_min=0.002)),
    (joint, GuidedDiffusion(MMPS(iterations=6, rtol=1e-3), "heun", steps=40, sigma_min=0.002)),
    (correlated, GuidedDiffusion(TMPD("exact"), "sde", steps=300, sigma_min=0.002)),
    (complex_data, GuidedDiffusion(TMPD("exact"), "ancestral", steps=200, sigma_min=0.002)),
]


@pytest.mark.parametrize(("case", "solver"), RUNS, ids=lambda v: getattr(v, "__name__", ""))
def test_samples_have_the_exact_posterior(case, solver):
    """Moments of 1000 samples: 5 runs × (6 means, 6 variances), two-sided 1e-3 over all of them is 4.3 sd each."""
    n = 1000
    mean, covariance = posterior_of(case)
    posterior = solver.solve(case()[0], n, seed=5, dtype=F64)
    x = posterior.samples[0, 0]
    # the second terms: the integrators' own error at these steps
    assert float(((x.mean(0) - mean) / covariance.diagonal().sqrt()).abs().max()) < 4.3 / math.sqrt(n) + 0.02
    assert float((x.var(0) / covariance.diagonal()).log().abs().max()) < 4.3 * math.sqrt(2 / n) + 0.04
    assert float(posterior.stats["unconverged"].max()) == 0
    assert float(posterior.stats["residual"].max()) <= 1e-3


def posterior_of(case):
    """Mean and covariance of x by dense algebra."""
    _, A, d, R = case()
    precision = torch.linalg.inv(COVARIANCE) + A.T @ torch.linalg.solve(R, A)
    covariance = torch.linalg.inv(precision)
    mean = covariance @ (torch.linalg.solve(COVARIANCE, MEAN) + A.T @ torch.linalg.solve(R, d))
    if case is affine:
        return 1.5 - 2 * mean, 4 * covariance
    return mean, covariance


def test_the_start_is_around_the_posterior_of_a_prior_far_from_zero():
    """A mean of 50 sd along the largest mode: D(0) alone would start half a sd from where it should."""
    prior = GaussianPrior.dense(
        torch.full((DIM,), 50.0, dtype=F64), torch.ones(DIM, DIM, dtype=F64) * 0.9 + 0.1 * torch.eye(DIM, dtype=F64)
    )
    A = torch.zeros(1, DIM, dtype=F64)
    A[0, 0] = 1e-6
    problem = InverseProblem(torch.zeros(1, dtype=F64), MatrixOperator(A), GaussianNoise(1.0), prior)
    n = 2000
    x = GuidedDiffusion(MMPS(), "heun", steps=40).solve(problem, n, seed=1, dtype=F64).samples[0, 0]
    # the start's error in units of sd is (λ/(λ + σ²))² 50 √λ/σ = 0.003 of a sd with D(D(0)), 0.14 with D(0)
    assert float((x.mean() - 50).abs()) < 4 / math.sqrt(n) + 0.02
