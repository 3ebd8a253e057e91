"""Facies from two Gaussian fields: exact proportions, rules, shifts, properties, pCN against an enumeration."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from invgen import InverseProblem
from invgen.contracts import HasDensity, HasLatent
from invgen.grid import Grid
from invgen.noise import GaussianNoise
from invgen.operators.points import PointSampling
from invgen.priors.covariance_models import Cubic, Exponential
from invgen.priors.lithotypes import Cut, LithotypeRule, bivariate
from invgen.priors.plurigaussian import Plurigaussian
from invgen.priors.random_field import RandomField
from invgen.solvers import PCN
from invgen.transforms import Exp

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:The practical range")
F64 = torch.float64
TREE = Cut(1, Cut(2, "clay", "silt"), Cut(2, "sand", Cut(1, "gravel", "cobble")))
SHARES = {"sand": 0.3, "clay": 0.25, "gravel": 0.1, "silt": 0.15, "cobble": 0.2}


def field(shape=(1, 12, 11), length=1.0, **options):
    return RandomField(Exponential(length=length), shape, **options)


@pytest.mark.parametrize("rho", [0.0, 0.6, -0.9])
def test_rectangles_have_the_proportions_exactly(rho):
    rule = LithotypeRule(TREE, SHARES, correlation=rho)
    for code, box in rule.rectangles.items():
        a1, b1, a2, b2 = (float(v) for v in box)
        assert bivariate(a1, b1, a2, b2, rho) == pytest.approx(SHARES[rule.names[code]], abs=1e-9)
    law = multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]])
    assert bivariate(-math.inf, 0.3, -math.inf, -0.5, 0.6) == pytest.approx(law.cdf([0.3, -0.5]), abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"correlation": -0.7}, {"shift": (2, -1)}])
def test_proportions_of_draws(options):
    """250 draws: each mean share within 4.5 standard errors of its target."""
    second = None if "shift" in options else field()
    prior = Plurigaussian(TREE, SHARES, field(), second, **options)
    x = prior.sample(250, seed=3)
    for k, name in enumerate(prior.names):
        share = (x == k).double().flatten(1).mean(1)
        assert abs(float(share.mean()) - SHARES[name]) < 4.5 * float(share.std()) / math.sqrt(250), name
    if "shift" in options:
        z = torch.randn(2, *prior.latent_shape, dtype=F64)
        y = prior.first.decode(z.reshape(2, *prior.first.latent_shape))
        y1, y2 = prior.gaussians(z)
        torch.testing.assert_close(y1, y[..., :10, 1:])
        torch.testing.assert_close(y2, y[..., 2:, :10])


def test_maps_of_proportions():
    ramp = torch.linspace(0.1, 0.9, 12, dtype=F64)[:, None].expand(12, 11)
    prior = Plurigaussian(Cut(1, "clay", "sand"), {"clay": ramp, "sand": 1 - ramp}, field())
    clay = (prior.sample(400, seed=1) == 0).double().mean(3)[:, 0]
    z = (clay.mean(0) - ramp[:, 0]) / (clay.std(0) / 20)
    assert float(z.abs().max()) < 4.5


def test_properties_and_the_soft_rule():
    own = RandomField(Cubic(length=3.0, variance=0.04), (1, 12, 11), mean=5.0)
    values = {"sand": own, "clay": 1.0, "gravel": 2.0, "silt": 3.0, "cobble": 4.0}
    prior = Plurigaussian(TREE, SHARES, field(), field(), properties=values)
    z = torch.randn(4, *prior.latent_shape, dtype=F64, generator=torch.Generator().manual_seed(2))
    codes, x = prior.facies(z), prior.decode(z)
    for k, name in enumerate(prior.names):
        if name != "sand":
            assert bool((x[codes == k] == values[name]).all())
    assert 0.1 < float(x[codes == 0].std()) < 0.3
    assert abs(float(x[codes == 0].mean()) - 5) < 0.3
    sharp = prior.soft(z, 1e-6)
    assert float(((sharp - x).abs() < 1e-6).double().mean()) > 0.999
    z.requires_grad_(True)
    gradient = torch.autograd.grad(prior.soft(z, 0.3).sum(), z)[0]
    assert float(gradient.abs().max()) > 0
    assert isinstance(prior, HasLatent)
    assert not isinstance(prior, HasDensity)


def test_pcn_is_exact_on_a_case_that_can_be_enumerated():
    """Three nodes, three facies, two noisy data: 27 configurations. 600 chains, one draw each, |z| < 4.5."""
    grid = Grid((3,), (1.0,))
    model = Exponential(length=1.5)
    prior = Plurigaussian(Cut(1, "a", Cut(1, "b", "c")), {"a": 0.3, "b": 0.4, "c": 0.3}, RandomField(model, grid))
    operator = PointSampling.at(grid, np.array([[0.0], [2.0]]), kind="nearest")
    data, sd = torch.tensor([[0.4, 1.6]], dtype=F64), 0.7
    K = model(np.array([[[float(i - j)] for j in range(3)] for i in range(3)]))
    weight = np.zeros((3, 3, 3))
    for codes in np.ndindex(3, 3, 3):
        boxes = [prior.rule.rectangles[c] for c in codes]
        low, high = (np.array([float(b[i].clamp(-9, 9)) for b in boxes]) for i in (0, 1))
        p = multivariate_normal(np.zeros(3), K, maxpts=200_000, abseps=1e-7).cdf(high, lower_limit=low)
        misfit = (codes[0] - 0.4) ** 2 + (codes[2] - 1.6) ** 2
        weight[codes] = p * math.exp(-0.5 * misfit / sd**2)
    weight /= weight.sum()
    n = 600
    posterior = PCN(draws=1, warmup=150).solve(
        InverseProblem(data, operator, GaussianNoise(sd), prior), n, seed=1, chunk=n
    )
    x = posterior.samples.reshape(n, 3).round().long().numpy()
    counts = np.zeros((3, 3, 3))
    np.add.at(counts, tuple(x.T), 1)
    likely = weight * n > 15
    z = (counts / n - weight) / np.sqrt(weight * (1 - weight) / n)
    assert likely.sum() >= 6
    assert np.abs(z[likely]).max() < 4.5


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: LithotypeRule(TREE, SHARES | {"sand": 0.4}), ValueError, "sum to 1"),
        (lambda: LithotypeRule(TREE, SHARES | {"sand": -0.3, "clay": 0.85}), ValueError, "non-negative"),
        (lambda: LithotypeRule(TREE, {k: v for k, v in SHARES.items() if k != "silt"}), ValueError, "silt"),
        (lambda: LithotypeRule(Cut(1, "a", "b"), {"a": 0.5, "b": 0.3, "c": 0.2}), ValueError, "the rule lacks"),
        (lambda: LithotypeRule(Cut(1, "a", Cut(2, "b", "a")), {"a": 0.5, "b": 0.5}), ValueError, "twice"),
        (lambda: LithotypeRule(TREE, SHARES, correlation=1.0), ValueError, "correlation"),
        (lambda: Cut(3, "a", "b"), ValueError, "axis"),
        (lambda: Plurigaussian(TREE, SHARES, field()), ValueError, "second"),
        (lambda: Plurigaussian(TREE, SHARES, field(), field((1, 5, 5))), ValueError, "shapes"),
        (lambda: Plurigaussian(TREE, SHARES, field(), shift=(20, 0)), ValueError, "larger"),
        (lambda: Plurigaussian(TREE, SHARES, field(method="spectral"), field()), TypeError, "linear"),
        (lambda: Plurigaussian(TREE, SHARES, field(mean=1.0), field()), ValueError, "mean 0"),
        (lambda: Plurigaussian(TREE, SHARES, field(transform=Exp()), field()), ValueError, "leave it out"),
        (lambda: Plurigaussian(TREE, SHARES, field(), field(), properties={"sand": 1.0}), ValueError, "Properties"),
    ],
)
def test_bad_input(build, error, words):
    with pytest.raises(error, match=words):
        build()
