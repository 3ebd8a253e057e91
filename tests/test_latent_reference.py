"""Importance sampling from found places, and runs judged by their spread, on a posterior that is known: two Gaussians."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
F64 = torch.float64
WEIGHTS = torch.tensor([0.3, 0.7], dtype=F64)
MEANS = torch.tensor([[1.0, -2.0, 0.5], [3.0, 1.0, -1.0]], dtype=F64)
ROOTS = torch.tensor(
    [[[0.5, 0, 0], [0.3, 0.4, 0], [0.1, -0.2, 0.3]], [[0.2, 0, 0], [-0.1, 0.6, 0], [0.2, 0.1, 0.2]]], dtype=F64
)
EVIDENCE = -7.3


@pytest.fixture
def module():
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("latent_reference")
    finally:
        sys.path.remove(str(FOLDER))


def log_density(z):
    laws = torch.distributions.MultivariateNormal(MEANS, scale_tril=ROOTS)
    return (laws.log_prob(z[:, None]) + WEIGHTS.log()).logsumexp(1) + EVIDENCE


def exact():
    """Draws of the mixture, and its mean and variances."""
    g = torch.Generator().manual_seed(1)

    def draw(n, weights=WEIGHTS):
        k = torch.multinomial(weights, n, replacement=True, generator=g)
        return MEANS[k] + (ROOTS[k] @ torch.randn(n, 3, 1, generator=g, dtype=F64))[..., 0]

    mean = WEIGHTS @ MEANS
    variance = WEIGHTS @ (ROOTS.square().sum(2) + (MEANS - mean).square())
    return draw, mean, variance


def places(draw):
    """What two searches found: each mode, as often as not, whatever it holds."""
    return [draw(200, torch.tensor([p, 1 - p])) for p in (1.0, 0.0, 1.0)]


def test_the_reference_weighs_modes_by_what_they_hold(module):
    draw, mean, variance = exact()
    mixture = module.StudentMixture.fitted(places(draw), [1.0, 1.0, 1.0])
    found = module.importance(log_density, mixture, 20_000, seed=2)
    assert found.ess > 5000
    assert ((torch.from_numpy(found.mean) - mean).abs() < 4.2 * torch.from_numpy(found.mean_error)).all()
    assert ((torch.from_numpy(found.variance) - variance).abs() < 4.2 * torch.from_numpy(found.variance_error)).all()
    assert abs(found.log_evidence - EVIDENCE) < 4.2 * found.log_evidence_error < 0.1
    # errors of the size of independent draws'
    assert (torch.from_numpy(found.mean_error) < 2 * (variance / found.ess).sqrt()).all()


def test_the_reference_of_a_part(module):
    """One of the two modes, as the other is far: its moments, and its share of the evidence."""
    draw, _, _ = exact()
    found = module.importance(log_density, module.StudentMixture.fitted(places(draw), [1.0, 1.0, 1.0]), 20_000, seed=2)
    near = [
        (torch.linalg.solve_triangular(r, (found.draws - m).mT, upper=False)).square().sum(0)
        for r, m in zip(ROOTS, MEANS, strict=True)
    ]
    part = found.within(near[0] < near[1])
    assert ((torch.from_numpy(part.mean) - MEANS[0]).abs() < 4.2 * torch.from_numpy(part.mean_error) + 0.01).all()
    assert abs(part.log_evidence - found.log_evidence - math.log(0.3)) < 0.05


def test_the_density_of_the_proposal_is_that_of_its_draws(module):
    """E_q[p/q] = 1 for a Gaussian p well inside q, and the other way round in moments."""
    mixture = module.StudentMixture(MEANS, ROOTS, torch.tensor([0.25, 0.75], dtype=F64), nu=6.0)
    z = mixture.draw(40_000, torch.Generator().manual_seed(3))
    mean = mixture.shares @ MEANS
    variance = mixture.shares @ (1.5 * ROOTS.square().sum(2) + (MEANS - mean).square())  # ν/(ν − 2) = 1.5
    assert ((z.mean(0) - mean).abs() < 4.2 * (variance / len(z)).sqrt()).all()
    assert ((z.var(0) / variance - 1).abs() < 0.1).all()
    inside = torch.distributions.MultivariateNormal(MEANS[0], scale_tril=0.7 * ROOTS[0])
    w = (inside.log_prob(z) - mixture.log_prob(z)).exp()
    assert abs(float(w.mean()) - 1) < 4.2 * float(w.std()) / math.sqrt(len(z))


def test_right_runs_agree_and_wrong_ones_do_not(module):
    draw, _, _ = exact()
    mixture = module.StudentMixture.fitted(places(draw), [1.0, 1.0, 1.0])
    reference = module.importance(log_density, mixture, 20_000, seed=2)
    right = module.agreement(torch.stack([draw(500) for _ in range(8)]), reference)
    assert right.judged < 4.2  # six numbers: a false alarm in 6000
    assert right.reached == 1
    assert right.ess > 1000
    shifted = module.agreement(torch.stack([draw(500) + 0.15 for _ in range(8)]), reference)
    assert shifted.judged > 4.2
    one_mode = module.agreement(torch.stack([draw(500, torch.tensor([0.0, 1.0])) for _ in range(8)]), reference)
    assert one_mode.judged > 6
    # runs that sit in one mode each excuse any difference by their spread, and are refused for it
    stuck = torch.stack([draw(500, torch.tensor([float(k % 2), 1 - k % 2])) for k in range(8)])
    apart = module.agreement(stuck, reference)
    assert apart.z < 3
    assert apart.judged == math.inf


def test_positions_are_drawn_by_evidence(module):
    """Three places that hold 2/3, 1/3 and e⁻³⁰: 20, 10 and no positions, spread over the particles."""
    found = [torch.arange(40.0)[:, None] + 100 * r for r in range(3)]
    starts, search = module.by_evidence(found, [-5 + math.log(2), -5.0, -35.0], 30)
    assert search == [0] * 20 + [1] * 10
    assert starts[:, 0].tolist() == [2.0 * k for k in range(20)] + [100 + 4.0 * k for k in range(10)]


def test_groups_that_have_not_met_are_refused(module):
    """Chains that are wide inside their groups and apart between them."""
    draw, _, _ = exact()
    mixture = module.StudentMixture.fitted(places(draw), [1.0, 1.0, 1.0])
    reference = module.importance(log_density, mixture, 20_000, seed=2)
    runs = torch.stack([draw(50) for _ in range(12)])
    assert module.agreement(runs, reference, groups=3).rhat < 1.05
    runs = runs + 2 * torch.tensor([1.0, -1.0, 0.0], dtype=F64).repeat_interleave(4)[:, None, None]
    apart = module.agreement(runs, reference, groups=3)
    assert apart.z < 4.2
    assert apart.judged == math.inf
