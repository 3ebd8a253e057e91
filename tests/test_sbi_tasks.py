"""The tasks of simulation-based inference: simulator, likelihood and exact posterior belong together."""

import sys
from pathlib import Path

import pytest
import torch

from invgen import Simulations
from invgen.diagnostics import c2st, sbc

D = torch.float64
NAMES = ("two_moons", "gaussian_mixture", "slcp", "gaussian_linear")


@pytest.fixture(scope="module")
def sbi_tasks():
    folder = str(Path(__file__).parent.parent / "benchmarks")
    sys.path.append(folder)  # last: benchmarks/sbi.py is not the library sbi
    try:
        import sbi_tasks

        yield sbi_tasks
    finally:
        sys.path.remove(folder)


@pytest.mark.parametrize("name", ["two_moons", "gaussian_mixture"])
def test_likelihood_integrates_to_one_and_fits_the_simulator(sbi_tasks, name):
    """∫p = 1 on a grid, and the mean log-likelihood of simulations is ∫p log p, within 5 standard errors."""
    task = sbi_tasks.TASKS[name]
    x = torch.tensor([[0.3, -0.5]], dtype=D)
    torch.manual_seed(1)
    d = task.simulate(x.expand(20_000, 2))
    centre, half = (d.mean(0), 0.25) if name == "two_moons" else (x[0], 6.0)
    axis = torch.linspace(-half, half, 3001, dtype=D)
    grid = torch.cartesian_prod(centre[0] + axis, centre[1] + axis)
    ll = task.log_likelihood(x, grid)
    mass = (axis[1] - axis[0]).square() * ll.exp()
    assert float(mass.sum()) == pytest.approx(1.0, abs=2e-3)  # the crescent has a sharp edge
    expected = float((mass * ll.clamp_min(-1e3)).sum())
    found = task.log_likelihood(x, d)
    assert abs(float(found.mean()) - expected) < 5 * float(found.std()) / 20_000**0.5 + 0.01


@pytest.mark.parametrize("name", ["slcp", "gaussian_linear"])
def test_likelihood_ratios_have_mean_one_under_the_simulator(sbi_tasks, name):
    """E[p(d | x')/p(d | x)] = 1 for d ~ p(d | x): x' inside the scale of x, so that the ratio has a variance."""
    task = sbi_tasks.TASKS[name]
    x = task.prior.sample(1, seed=4, dtype=D) * 0.5 + 0.4
    other = x.clone()
    other[:, 0] += 0.1
    if name == "slcp":
        x[:, 2:], other[:, 2:] = torch.tensor([1.1, -1.2, 0.5]), torch.tensor([1.05, -1.15, 0.45])
    torch.manual_seed(2)
    d = task.simulate(x.expand(40_000, -1))
    ratio = (task.log_likelihood(other, d) - task.log_likelihood(x, d)).exp()
    assert abs(float(ratio.mean()) - 1) < 5 * float(ratio.std()) / 200


def test_the_mean_of_slcp_is_integrated_out_exactly(sbi_tasks):
    """∫ p(d | m, Σ) dm on a grid is the tabulated marginal of Σ, up to one constant."""
    from sbi_tasks.slcp import marginal

    task = sbi_tasks.TASKS["slcp"]
    shapes = torch.tensor([[1.0, -1.3, 0.2], [0.7, 0.9, -0.8], [1.6, 1.1, 1.5], [0.9, 0.9, 0.0]], dtype=D)
    torch.manual_seed(3)
    points = torch.randn(4, 2, dtype=D) * torch.tensor([1.0, 0.7], dtype=D) + 0.3
    centred = points - points.mean(0)
    axis = torch.linspace(-8, 8, 401, dtype=D)
    m = torch.cartesian_prod(axis, axis) + points.mean(0)
    integrals = [
        task.log_likelihood(torch.cat([m, s.expand(len(m), 3)], 1), points.reshape(1, 8)).logsumexp(0) for s in shapes
    ]
    difference = torch.stack(integrals) - marginal(shapes, centred.mT @ centred)
    assert float(difference.max() - difference.min()) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_the_exact_posterior_is_calibrated(sbi_tasks, name):
    """Ranks of the truth, and of its likelihood, among posterior draws of simulated data; family-wise at 1e-4."""
    task = sbi_tasks.TASKS[name]
    n, draws = (60, 29) if name == "slcp" else (300, 29)
    x, _, (d,) = Simulations.of(task.problem(torch.zeros(task.data_shape)), n, seed=5).batch(slice(None), dtype=D)
    samples = torch.stack([task.posterior(d[i], draws, seed=i) for i in range(n)])
    likelihood = torch.stack([task.log_likelihood(samples[i], d[i : i + 1]) for i in range(n)])
    result = sbc(x, samples, log_likelihood=(task.log_likelihood(x, d), likelihood), level=1e-4)
    assert result.passed, str(result)


def test_references_are_made_where_none_are_installed(sbi_tasks, monkeypatch, tmp_path):
    monkeypatch.setenv("PEERS", str(tmp_path))
    one, two = sbi_tasks.references(sbi_tasks.TASKS["two_moons"], 2, 100)
    assert (one.source, tuple(one.samples.shape), tuple(one.data.shape)) == ("exact", (100, 2), (2,))
    assert not torch.equal(one.data, two.data)


@pytest.mark.parametrize("name", NAMES)
def test_published_references_have_the_same_law(sbi_tasks, name):
    task = sbi_tasks.TASKS[name]
    if sbi_tasks.published_files(name) is None:
        pytest.skip("sbibm's files are not installed (make peers)")
    reference = sbi_tasks.references(task, 1, 3000)[0]
    assert reference.source == "sbibm"
    assert torch.isfinite(task.log_likelihood(reference.truth[None].to(D), reference.data[None].to(D))).all()
    accuracy = float(c2st(reference.samples, task.posterior(reference.data, 3000).float(), epochs=20))
    assert abs(accuracy - 0.5) < 0.04  # five sd of guessing over 6000 dependent answers
