"""Source and lens unknown together: draws of the samplers against the evidence of the lens on a grid.

The source is Gaussian, so that given the lens everything is known: log p(d | θ) = log N(d; A_θ m, R + A_θ C A_θᵀ), and
the source's posterior is the mixture of its conditional laws over p(θ | d).
"""

import math

import pytest
import torch

from invgen.noise import GaussianNoise
from invgen.operators import SIE, ExternalShear, GravitationalLens, sky_grid
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem
from invgen.solvers import MMPS, GuidedDiffusion, PnPDM
from invgen.transforms import Exp

torch.set_num_threads(1)
D = torch.float64
SIDE, NOISE = 6, 0.3
LAWS = {"einstein_radius": (math.log(1.0), 0.1), "gamma_1": (0.0, 0.1)}  # of the logarithm, of the number itself


def joint_problem():
    y, x = torch.meshgrid(torch.arange(float(SIDE)).double(), torch.arange(float(SIDE)).double(), indexing="ij")
    place = torch.stack([y.flatten(), x.flatten()], 1)
    covariance = torch.exp(-0.5 * torch.cdist(place, place).square() / 1.5**2) + 0.02 * torch.eye(SIDE**2, dtype=D)
    mean = 1.5 * torch.exp(-((y - 2.5) ** 2 + (x - 2.5) ** 2) / 6)
    operator = GravitationalLens(
        SIE(1.0, 0.8, 0.3, 0.02, -0.03) + ExternalShear(),
        sky_grid((SIDE, SIDE), 0.2),
        sky_grid((11, 10), 0.3),
        free=tuple(LAWS),
    )
    nuisance = {
        "einstein_radius": GaussianPrior(torch.tensor([LAWS["einstein_radius"][0]], dtype=D), 0.1**2, transform=Exp()),
        "gamma_1": GaussianPrior(torch.tensor([0.0], dtype=D), 0.1**2),
    }
    prior = GaussianPrior(mean[None], covariance)
    empty = torch.zeros(operator.data_shape, dtype=D)
    problem = InverseProblem(empty, operator, GaussianNoise(NOISE), prior, nuisance=nuisance)
    _, _, data = problem.simulate(1, seed=5)
    return problem.with_data(*data), operator, mean.flatten(), covariance


def exact(data, operator, mean, covariance, first, second):
    """Moments of (log θ_E, γ₁) and of the source on the grid first × second."""
    v = torch.cartesian_prod(first, second)
    samples = operator.fixed(einstein_radius=v[:, 0].exp(), gamma_1=v[:, 1])
    units = torch.eye(SIDE**2, dtype=D).reshape(-1, 1, SIDE, SIDE)
    A = torch.stack([samples(u.expand(len(v), -1, -1, -1)).flatten(1) for u in units], dim=2)
    S = A @ covariance @ A.mT + NOISE**2 * torch.eye(A.shape[1], dtype=D)
    L = torch.linalg.cholesky(S)
    residual = (data.flatten() - A @ mean)[..., None]
    white = torch.linalg.solve_triangular(L, residual, upper=False)[..., 0]
    evidence = -0.5 * white.square().sum(1) - L.diagonal(dim1=1, dim2=2).log().sum(1)
    evidence = evidence - 0.5 * sum(((v[:, k] - m) / s) ** 2 for k, (m, s) in enumerate(LAWS.values()))
    w = evidence.softmax(0)
    gain = covariance @ A.mT
    means = mean + (gain @ torch.cholesky_solve(residual, L))[..., 0]
    spread = covariance.diagonal() - (gain * torch.cholesky_solve(gain.mT, L).mT).sum(2)
    centre, source = w @ v, w @ means
    edge = w.reshape(len(first), len(second))
    border = torch.cat([edge[0], edge[-1], edge[:, 0], edge[:, -1]]).sum()
    assert float(border) < 1e-4, "the grid cuts the posterior"
    return (centre, (w @ (v - centre).square()).sqrt()), (source, (w @ (spread + (means - source).square())).sqrt())


SOLVERS = {
    "guided": GuidedDiffusion(MMPS(iterations=24, rtol=1e-3), "heun", steps=25),
    "split": PnPDM(iterations=120, inner=2, floor=0.5, rho_min=0.01, hold=10),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_source_and_lens_have_their_joint_law(name):
    """Two runs × (2 + 36) means and sds: two-sided 1e-3 over all of them is 4.5 Monte-Carlo sd each; annealing costs
    up to a tenth of a standard deviation beyond that (800 draws: −0.09 and 1.05 with 40 levels of MMPS)."""
    n = 160
    problem, operator, mean, covariance = joint_problem()
    data = problem.terms[0].data[0]
    first = torch.linspace(-0.3, 0.3, 41, dtype=D)
    (centre, width), _ = exact(data, operator, mean, covariance, first, first)
    grids = [torch.linspace(float(c - 6 * s), float(c + 6 * s), 41, dtype=D) for c, s in zip(centre, width)]
    lens, source = exact(data, operator, mean, covariance, *grids)
    posterior = SOLVERS[name].solve(problem, n, seed=5, dtype=D)
    theta = posterior.theta
    v = torch.stack([theta["einstein_radius"].flatten().log(), theta["gamma_1"].flatten()], dim=1)
    for draws, (want, sd) in ((v, lens), (posterior.samples[0, 0].flatten(1), source)):
        assert float(((draws.mean(0) - want) / sd).abs().max()) < 4.5 / math.sqrt(n) + 0.1
        assert float((draws.std(0) / sd - 1).abs().max()) < 4.5 / math.sqrt(2 * n) + 0.1
    assert float(lens[1][0]) < 0.02  # the data speak: a prior of 0.1
