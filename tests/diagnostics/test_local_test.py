"""L-C2ST on x ~ N(1, 1), d = x + N(0, 0.25 I): the exact posterior passes, a wrong one fails where it is wrong."""

import numpy as np
import pytest
import torch
from scipy import stats

from invgen.diagnostics import lc2st

NOISE = 0.5
GAIN = 1 / (1 + NOISE**2)
SD = (NOISE**2 * GAIN) ** 0.5
OBSERVED = torch.tensor([[-0.5, 1.0], [2.5, 1.0]])


def exact(d):
    return 1 + GAIN * (d - 1), torch.full_like(d, SD)


def narrow(d):
    mean, sd = exact(d)
    return mean, 0.5 * sd


def wrong_on_the_right(d):
    """Off by 1.5 sd where the first datum is above 1."""
    mean, sd = exact(d)
    return mean + 1.5 * sd * (d[..., :1] > 1), sd


def run(posterior, n=1000, seed=0, **options):
    g = torch.Generator().manual_seed(seed)
    x = 1 + torch.randn(n, 2, generator=g)
    d = x + NOISE * torch.randn(n, 2, generator=g)
    mean, sd = posterior(d)
    drawn = mean + sd * torch.randn(n, 2, generator=g)
    there, spread = posterior(OBSERVED)
    probes = there[:, None] + spread[:, None] * torch.randn(2, 500, 2, generator=g)
    return lc2st(x, drawn, d, OBSERVED, probes, trials=60, epochs=20, seed=seed, **options)


def test_the_exact_posterior_passes():
    """p-values of 10 independent runs are uniform: none of their two combinations is below 1e-4."""
    p = np.stack([run(exact, 200, seed).p_value for seed in range(10)])
    for i in (0, 1):
        count = int((p[:, i] <= 0.1).sum())
        assert stats.binomtest(count, 10, 0.1 * 61 / 60, alternative="greater").pvalue > 5e-5
    assert float(p.mean()) > 0.5 - 3.9 * 0.29 / 10**0.5


def test_a_narrow_posterior_fails_everywhere():
    assert (run(narrow).p_value <= 0.05).all()


def test_an_error_is_found_where_it_is():
    result = run(wrong_on_the_right)
    right = result.statistic / result.null.mean(0)
    assert result.p_value[1] <= 0.05
    assert right[1] > 3 * right[0]


def test_shapes():
    one = lc2st(
        torch.randn(30, 1, 2),
        torch.randn(30, 5, 1, 2),
        torch.randn(30, 3),
        torch.randn(3),
        torch.randn(9, 1, 2),
        trials=19,
        epochs=1,
    )
    assert one.p_value.shape == (1,)
    assert "observation 0" in str(one)
    with pytest.raises(ValueError, match="one of each a simulation"):
        lc2st(torch.randn(30, 2), torch.randn(29, 2), torch.randn(30, 3), torch.randn(3), torch.randn(9, 2))
    with pytest.raises(ValueError, match=r"give \(n_obs"):
        lc2st(torch.randn(30, 2), torch.randn(30, 2), torch.randn(30, 3), torch.randn(4), torch.randn(9, 2))
    with pytest.raises(ValueError, match="at least 20 and 99"):
        lc2st(
            torch.randn(30, 2),
            torch.randn(30, 2),
            torch.randn(30, 3),
            torch.randn(3),
            torch.randn(9, 2),
            trials=50,
            level=0.01,
        )
