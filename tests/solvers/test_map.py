"""MAP against closed forms, in every coordinate system, and the batched L-BFGS by itself."""

from __future__ import annotations

import pytest
import torch

from invgen.contracts import Operator
from invgen.noise import GaussianNoise
from invgen.operators import MatrixOperator
from invgen.priors import GaussianMixturePrior, GaussianPrior
from invgen.problem import InverseProblem
from invgen.solvers import MAP, ExactGaussian, _descent
from invgen.transforms import Affine, Exp

F64 = torch.float64


def _randn(g, *shape):
    return torch.randn(*shape, generator=g, dtype=F64)


def _problem(transform=None, n_obs=3, noise=1.0):
    g = torch.Generator().manual_seed(1)
    root = _randn(g, 16, 16) / 4
    prior = GaussianPrior(
        _randn(g, 16), root @ root.T + 0.3 * torch.eye(16, dtype=F64), transform=transform or Affine(2.0, 3.0)
    )
    return InverseProblem(5 * _randn(g, n_obs, 8), MatrixOperator(_randn(g, 8, 16) / 3), GaussianNoise(noise), prior)


@pytest.mark.parametrize("space", ["x", "u", "z"])
@pytest.mark.parametrize(("optimizer", "iterations", "rate"), [("lbfgs", 400, 0.1), ("adam", 3000, 0.2)])
def test_linear_gaussian_map_is_the_closed_form_mean(space, optimizer, iterations, rate):
    problem = _problem()
    mean, _ = ExactGaussian().moments(problem)
    solver = MAP(space=space, optimizer=optimizer, iterations=iterations, learning_rate=rate, tol=1e-9)
    posterior = solver.solve(problem, 2, dtype=F64)
    assert posterior.kind == "point"
    # Adam ends at what its last, small steps leave: a hundred-thousandth of an sd
    torch.testing.assert_close(posterior.samples[:, 0, 0], mean, rtol=0, atol=1e-6 if optimizer == "lbfgs" else 1e-5)
    assert posterior.stats["objectives"].shape == (3, 1, 1, 2)
    if optimizer == "lbfgs":
        assert bool(posterior.stats["converged"].all())


def test_modes_depend_on_coordinates_as_they_should():
    """u ~ N(m, s²) observed directly as x = e^u: in u and z the Gaussian's own mode; in x it moves by −s²."""
    m, s = torch.tensor([0.3, -0.2], dtype=F64), 0.5
    prior = GaussianPrior.diagonal(m, torch.full((2,), s**2, dtype=F64), transform=Exp())
    # data so noisy that only the prior speaks
    problem = InverseProblem(
        torch.zeros(2, dtype=F64), MatrixOperator(torch.eye(2, dtype=F64)), GaussianNoise(1e6), prior
    )
    modes = {c: MAP(space=c, tol=1e-10).solve(problem, 2, dtype=F64).samples[0, 0, 0].log() for c in "xuz"}
    torch.testing.assert_close(modes["u"], m, rtol=0, atol=1e-6)
    torch.testing.assert_close(modes["z"], m, rtol=0, atol=1e-6)
    torch.testing.assert_close(modes["x"], m - s**2, rtol=0, atol=1e-6)


def test_best_of_many_starts_finds_the_higher_mode():
    eye = 0.01 * torch.eye(2, dtype=F64)
    prior = GaussianMixturePrior(
        [0.3, 0.7], torch.tensor([[-2.0, 0.0], [2.0, 0.0]], dtype=F64), torch.stack([eye, eye])
    )
    problem = InverseProblem(
        torch.zeros(1, dtype=F64), MatrixOperator(torch.ones(1, 2, dtype=F64)), GaussianNoise(10.0), prior
    )
    every = MAP(keep="all").solve(problem, 12, dtype=F64)
    sides = every.samples[0, 0, :, 0].sign()
    assert set(sides.tolist()) == {-1.0, 1.0}
    best = MAP(keep="best").solve(problem, 12, dtype=F64)
    assert best.samples.shape == (1, 1, 1, 2)
    assert float(best.samples[0, 0, 0, 0]) == pytest.approx(2.0, abs=0.01)
    torch.testing.assert_close(best.stats["objectives"].flatten(), every.stats["objective"].flatten())
    assert float(best.stats["objective"]) == float(every.stats["objective"].min())


def test_starts_given_and_centre():
    problem = _problem(n_obs=1)
    mean, _ = ExactGaussian().moments(problem)
    done = MAP(starts=mean, tol=1e-6, keep="all").solve(problem, 2, dtype=F64)
    torch.testing.assert_close(done.samples[0, 0], mean.expand(2, 16))
    assert int(done.stats["iterations"].max()) <= 2
    for space in "xuz":
        found = MAP(starts="centre", space=space, tol=1e-9).solve(problem, 1, dtype=F64)
        torch.testing.assert_close(found.samples[0, 0], mean, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="starts of MAP"):
        MAP(starts=torch.zeros(2, 5)).solve(problem, 1)


def test_capabilities_and_bad_arguments():
    problem = _problem(n_obs=1)

    class Blind(Operator):
        derivative_order = 0

        def forward(self, x, **theta):
            return x.detach()[:, :8]

    blind = InverseProblem(problem.terms[0].data, Blind((16,), (8,)), GaussianNoise(1.0), problem.prior)
    with pytest.raises(TypeError, match="black box"):
        MAP().solve(blind, 1)
    for bad in (
        {"space": "w"},
        {"optimizer": "sgd"},
        {"keep": "some"},
        {"starts": "random"},
        {"iterations": 0},
        {"learning_rate": -1.0},
    ):
        with pytest.raises(ValueError, match="MAP"):
            MAP(**bad)
    eye = torch.eye(16, dtype=F64)
    mixture = GaussianMixturePrior([1.0], torch.zeros(1, 16, dtype=F64), eye[None])
    no_latent = InverseProblem(problem.terms[0].data, problem.terms[0].operator, GaussianNoise(1.0), mixture)
    with pytest.raises(TypeError, match="HasLatent"):
        MAP(space="z").solve(no_latent, 1)


def test_batched_lbfgs_minimises_rosenbrock_from_everywhere_and_freezes_what_is_done():
    def rosenbrock(v):
        return (1 - v[:, 0]).square() + 100 * (v[:, 1] - v[:, 0].square()).square()

    g = torch.Generator().manual_seed(0)
    v = torch.cat([3 * _randn(g, 30, 2), torch.ones(1, 2, dtype=F64)])
    state = _descent.start(rosenbrock, v, 1e-13, 6, adam=False)  # gradients start at up to 1e5
    assert not bool(state["active"][-1])
    for _ in range(150):
        state = _descent.lbfgs_step(rosenbrock, state)
    torch.testing.assert_close(state["v"], torch.ones_like(v), rtol=0, atol=1e-6)
    assert torch.equal(state["v"][-1], v[-1])
    assert int(state["iterations"][-1]) == 0
    assert int(state["iterations"].max()) < 150


def test_an_item_does_not_feel_the_others():
    def quartic(v):
        return (v - torch.arange(3)).pow(4).sum(1) + 0.1 * v.square().sum(1)

    g = torch.Generator().manual_seed(0)
    v = 3 * _randn(g, 8, 3)
    both = []
    for points in (v, v[:1]):
        state = _descent.start(quartic, points, 1e-10, 5, adam=False)
        for _ in range(20):
            state = _descent.lbfgs_step(quartic, state)
        both.append(state["v"][0])
    torch.testing.assert_close(both[0], both[1], rtol=0, atol=1e-12)


def test_two_loop_direction_is_that_of_the_dense_bfgs_inverse():
    """Nocedal & Wright equation 7.16 with explicit matrices; a wrong recursion still descends, only slower."""
    g = torch.Generator().manual_seed(6)
    batch, memory, n = 3, 4, 6
    root = _randn(g, batch, n, n)
    S = _randn(g, batch, memory, n)
    Y = S @ (root @ root.mT + torch.eye(n, dtype=F64))
    rho = 1 / (S * Y).sum(-1)
    gradient = _randn(g, batch, n)
    got = _descent.direction({"S": S, "Y": Y, "rho": rho, "g": gradient})
    eye = torch.eye(n, dtype=F64)
    for b in range(batch):
        H = (S[b, -1] @ Y[b, -1]) / (Y[b, -1] @ Y[b, -1]) * eye
        for i in range(memory):
            V = eye - rho[b, i] * torch.outer(Y[b, i], S[b, i])
            H = V.T @ H @ V + rho[b, i] * torch.outer(S[b, i], S[b, i])
        torch.testing.assert_close(got[b], -H @ gradient[b])
