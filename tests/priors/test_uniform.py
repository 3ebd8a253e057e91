import math

import pytest
import torch

from invgen.priors import UniformPrior
from invgen.transforms import Probit

D = torch.float64
LOW, HIGH = torch.tensor([-1.0, 0.1, 3.0], dtype=D), torch.tensor([2.0, 10.0, 3.5], dtype=D)
PRIOR = UniformPrior(LOW, HIGH)


def test_draws_fill_the_box_evenly():
    """Largest gap of 60 empirical distribution functions: Kolmogorov's 1 − 1e-4 / 3 quantile is below 2.35/√n."""
    x = PRIOR.sample(20_000, seed=1, dtype=D)
    u = ((x - LOW) / (HIGH - LOW)).sort(0).values
    gap = (u - (torch.arange(20_000, dtype=D)[:, None] + 0.5) / 20_000).abs().amax(0)
    assert (gap * 20_000**0.5 < 2.35).all()
    assert (torch.corrcoef(x.T).fill_diagonal_(0).abs() < 5 / 20_000**0.5).all()


def test_density_is_the_inverse_volume_and_that_of_the_gaussian_in_u():
    x = PRIOR.sample(50, seed=2, dtype=D)
    expected = -math.log(3.0 * 9.9 * 0.5)
    assert PRIOR.log_prob(x) == pytest.approx(expected)
    u = PRIOR.transform.inverse(x)
    normal = (-0.5 * u.square() - 0.5 * math.log(2 * math.pi)).sum(1)
    assert torch.allclose(normal - PRIOR.transform.log_det(u), torch.tensor(expected, dtype=D))
    outside = torch.stack([LOW, HIGH + 1e-9, torch.tensor([0.0, 0.0, 3.2], dtype=D)])
    assert torch.isfinite(PRIOR.log_prob(outside)).tolist() == [True, False, False]


def test_the_edges_survive_single_precision():
    u = torch.tensor([[-40.0, 40.0, 9.0]])
    x = PRIOR.decode(u)
    assert torch.equal(x, torch.stack([LOW[0], HIGH[1], HIGH[2]]).float()[None])
    assert torch.isfinite(PRIOR.transform.inverse(x)).all()


@pytest.mark.parametrize("bounds", [(1.0, 1.0), (0.0, math.inf), (torch.tensor([0.0, 2.0]), 1.0)])
def test_bad_bounds_are_named(bounds):
    with pytest.raises(ValueError, match="finite with low < high"):
        Probit(*bounds)


def test_numbers_alone_have_no_shape():
    with pytest.raises(ValueError, match="does not know its shape"):
        UniformPrior(0.0, 1.0)
