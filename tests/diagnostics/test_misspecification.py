"""The test of observations against simulations: size on a well-specified problem, power against known errors."""

import numpy as np
import pytest
import torch
from scipy import stats

from invgen import Simulations
from invgen.diagnostics import MisspecificationTest

SIGMA = 0.2


def gather(n, seed, receivers=16, samples=50):
    """Two arrivals with moveout, time, velocity and amplitude unknown, in white noise."""
    g = torch.Generator().manual_seed(seed)
    u = torch.rand(n, 6, 1, 1, generator=g)
    x, t = torch.linspace(0, 1, receivers)[:, None], torch.linspace(0, 1, samples)
    d = SIGMA * torch.randn(n, receivers, samples, generator=g)
    for j in range(2):
        time, velocity, amplitude = 0.15 + 0.35 * j + 0.2 * u[:, 3 * j], 1.2 + u[:, 3 * j + 1], 0.5 + u[:, 3 * j + 2]
        w = 20 * (t - (time.square() + (x / velocity / 2).square()).sqrt())
        d = d + amplitude * (1 - w.square()) * torch.exp(-0.5 * w.square())
    return d


@pytest.fixture(scope="module")
def test_of():
    return MisspecificationTest(gather(1800, 1))


def test_false_alarms_come_at_their_rate():
    """Fresh simulations each time: p ≤ α has a probability of at most α; 400 data in 8 tests, binomial at 1e-4."""
    count = total = 0
    for k in range(8):
        result = MisspecificationTest(gather(300, 100 + k, 4, 20), seed=k)(gather(50, 200 + k, 4, 20))
        count, total = count + int(result.flagged.sum()), total + 50
    assert 3 <= count <= stats.binom.isf(1e-4, total, 0.05) + 8  # tests of one calibration are dependent


def spoiled(kind, n=200):
    d, g = gather(n, 5), torch.Generator().manual_seed(9)
    if kind == "gain":
        return 1.2 * d
    if kind == "outliers":
        hit = torch.rand(d.shape, generator=g) < 0.02
        return d + 5 * SIGMA * torch.where(hit, torch.randn(d.shape, generator=g).sign(), torch.zeros(()))
    worst = torch.argsort(torch.rand(n, 16, generator=g), 1) < 3  # a fifth of the receivers
    change = torch.ones(()) if kind == "offset" else torch.randn(d.shape, generator=g)
    return d + SIGMA * change * worst[:, :, None]


@pytest.mark.parametrize(("kind", "power"), [("gain", 0.95), ("offset", 0.95), ("outliers", 0.95), ("noise", 0.8)])
def test_power(test_of, kind, power):
    result = test_of(spoiled(kind))
    assert result.flagged.mean() > power
    if kind == "outliers":
        assert set(result.suspect) <= {"outliers", "tails", "energy", "groups"}


def test_terms_of_different_units_and_complex_data():
    g = torch.Generator().manual_seed(0)

    def simulate(n):
        x = torch.randn(n, 1, generator=g)
        field = torch.randn(n, 30, generator=g, dtype=torch.complex64) + x
        return 1e6 * (x + 0.1 * torch.randn(n, 40, generator=g)), field

    test = MisspecificationTest(simulate(900))
    one, two = simulate(60)
    assert test((one, two)).flagged.mean() < 0.25
    one = one + 2e5 * torch.randn(60, 40, generator=g)
    assert test((one, two)).flagged.mean() > 0.95
    single = test((one[0], two[0]))
    assert single.p_value.shape == (1,)
    assert "MISSPECIFIED" in str(single)


def test_a_prediction_takes_the_place_of_components():
    """Signals of one unknown frequency need many components; a fit of the frequency leaves white noise."""
    t = torch.linspace(0, 1, 300)

    def simulate(n, seed):
        g = torch.Generator().manual_seed(seed)
        f = 5 + 40 * torch.rand(n, 1, generator=g)
        return torch.cos(f * t) + 0.1 * torch.randn(n, 300, generator=g), f

    grid = torch.cos(torch.linspace(4.5, 45.5, 4000)[:, None] * t)

    def predict(data):
        (d,) = data
        return grid[torch.cdist(d.float(), grid).argmin(1)]

    d = simulate(150, 2)[0] + 0.07 * torch.randn(150, 300, generator=torch.Generator().manual_seed(1))
    plain, fitted = (MisspecificationTest(simulate(600, 1)[0], predict=p)(d).flagged.mean() for p in (None, predict))
    assert fitted > 0.95
    assert fitted > plain + 0.2


def test_simulations_are_taken_as_they_are():
    s = Simulations(torch.zeros(120, 2), {}, gather(120, 3, 4, 20))
    assert MisspecificationTest(s)(gather(2, 4, 4, 20)).p_value.shape == (2,)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MisspecificationTest(torch.randn(50, 3)), "too few"),
        (lambda: MisspecificationTest(torch.randn(90, 3), level=0.01), "at least 300"),
        (lambda: MisspecificationTest(torch.full((90, 3), torch.nan)), "NaN"),
        (lambda: MisspecificationTest(torch.randn(90, 3))(torch.randn(2, 4)), "have the shape"),
        (lambda: MisspecificationTest(torch.randn(90, 3))(torch.full((3,), torch.nan)), "NaN"),
        (lambda: MisspecificationTest(torch.randn(90, 3))([torch.randn(3)] * 2), "1 terms, 2 data"),
    ],
)
def test_bad_input_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_p_values_are_those_of_ranks():
    """The smallest possible is 1/(n/3 + 1), and of simulations themselves they spread evenly."""
    test = MisspecificationTest(np.random.default_rng(1).standard_normal((900, 6)))
    far = test(np.full((1, 6), 50.0))
    assert far.p_value[0] == pytest.approx(1 / 301)
    p = test(np.random.default_rng(2).standard_normal((400, 6))).p_value
    assert stats.kstest(p, "uniform").pvalue > 1e-4
