"""Plug-and-play and RED against their fixed points, which Gaussian priors have in closed form."""

from __future__ import annotations

import pytest
import torch

from invgen.contracts import LinearOperator
from invgen.noise import GaussianNoise
from invgen.operators import MatrixOperator
from invgen.priors import GaussianMixturePrior, GaussianPrior
from invgen.problem import InverseProblem
from invgen.solvers import RED, PlugAndPlay, expansion
from invgen.transforms import Affine, Exp

F64 = torch.float64


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def gaussian():
    """Eight correlated unknowns with a mean, x = 2 + 3u; five data."""
    root = noise(8, 8, seed=1) / 2
    C = root @ root.T + 0.2 * torch.eye(8, dtype=F64)
    prior = GaussianPrior(noise(8, seed=2), C, transform=Affine(2.0, 3.0))
    A = MatrixOperator(noise(5, 8, seed=3) / 3)
    return InverseProblem(noise(2, 5, seed=4), A, GaussianNoise(0.5), prior), C


def fixed_point(problem, Q, weight):
    """x with ∇Φ + λ Q (u − m) = 0, x = 2 + 3u."""
    A, m = 3 * problem.terms[0].operator.to_dense(), problem.prior.mean_u
    d = problem.terms[0].data - problem.terms[0].operator(torch.full((1, 8), 2.0, dtype=F64))
    H = A.T @ A / 0.25 + weight * Q
    return 2 + 3 * torch.linalg.solve(H, (d @ A / 0.25 + weight * Q @ m).T).T


@pytest.mark.parametrize("weight", [1.0, 2.5])
def test_fixed_points(weight):
    problem, C = gaussian()
    one = torch.eye(8, dtype=F64)
    inverse = torch.linalg.inv(C)
    cases = {
        PlugAndPlay(method="admm", iterations=200, sigma_last=0.7, weight=weight): inverse,
        PlugAndPlay(method="pgd", iterations=3000, sigma_last=0.17, weight=weight): inverse,
        PlugAndPlay(method="hqs", iterations=400, sigma_first=0.4, sigma_last=0.4, weight=weight): torch.linalg.inv(
            C + 0.16 * one
        ),
        RED(iterations=400, sigma=0.4, weight=weight): torch.linalg.inv(C + 0.16 * one),
    }
    for solver, Q in cases.items():
        found = solver.solve(problem, dtype=F64)
        want = fixed_point(problem, Q, weight)
        if isinstance(solver, PlugAndPlay) and solver.method == "hqs":  # u is D(z) of the z that solves it
            u = problem.prior.transform.inverse(want)
            want = problem.prior.transform(problem.prior.denoise(u, 0.4))
        torch.testing.assert_close(found.samples[:, 0, 0], want, rtol=0, atol=1e-4, msg=lambda s, v=solver: f"{v}: {s}")
        assert float(found.stats["change"].max()) < 1e-5


def test_annealing_ends_near_the_posterior_mean():
    problem, C = gaussian()
    found = PlugAndPlay(iterations=400, sigma_first=2.0, sigma_last=0.02).solve(problem, dtype=F64)
    want = fixed_point(problem, torch.linalg.inv(C), 1.0)
    assert float((found.samples[:, 0, 0] - want).norm()) < 0.05 * float((want - 2).norm())


def test_expansion_is_the_norm_of_the_jacobian():
    problem, C = gaussian()
    u = noise(3, 8, seed=9)
    want = torch.linalg.matrix_norm(C @ torch.linalg.inv(C + 0.49 * torch.eye(8, dtype=F64)), 2)
    torch.testing.assert_close(expansion(problem.prior, u, 0.7, 60), want.expand(3), rtol=1e-3, atol=0)
    # two narrow modes: between them the posterior mean runs from one to the other
    two = GaussianMixturePrior(
        [0.5, 0.5], torch.tensor([[-1.0], [1.0]], dtype=F64), torch.tensor([1e-4, 1e-4], dtype=F64)
    )
    assert float(expansion(two, torch.zeros(1, 1, dtype=F64), 0.3)) > 5
    near = InverseProblem(
        torch.zeros(1, 1, dtype=F64), MatrixOperator(torch.ones(1, 1, dtype=F64)), GaussianNoise(0.1), two
    )
    with pytest.warns(UserWarning, match="stretches distances"):
        RED(iterations=3, sigma=0.3, check_expansion=True).solve(near, dtype=F64)


def test_refusals():
    problem, C = gaussian()
    with pytest.raises(ValueError, match="stability limit"):
        PlugAndPlay(method="pgd", sigma_last=3.0, sigma_first=3.0).solve(problem, dtype=F64)
    curved = InverseProblem(
        problem.terms[0].data,
        problem.terms[0].operator,
        GaussianNoise(0.5),
        GaussianPrior(noise(8), C, transform=Exp()),
    )
    assert isinstance(problem.terms[0].operator, LinearOperator)
    for solver in (PlugAndPlay(), RED()):
        with pytest.raises(TypeError, match="affine"):
            solver.solve(curved)
    for bad in (
        lambda: PlugAndPlay(method="red"),
        lambda: PlugAndPlay(sigma_last=2.0),
        lambda: PlugAndPlay(weight=0.0),
        lambda: RED(sigma=-1.0),
        lambda: RED(iterations=0),
    ):
        with pytest.raises(ValueError, match=r"needs|takes"):
            bad()
