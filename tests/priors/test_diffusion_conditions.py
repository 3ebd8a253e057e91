"""Conditional priors: what `given` means, dropping in training, guidance, conditions beside depth."""

import math

import pytest
import torch

from invgen.grid import Grid
from invgen.priors import Condition, DepthChannel, DiffusionPrior, FlowMatching, Training
from invgen.priors._preconditioning import coefficients
from invgen.priors.networks import MLPDenoiser, UNet

torch.set_num_threads(1)
F64 = torch.float64


class Shifted(torch.nn.Module):
    """Exact EDM network of p(x | c) = N(c, 0.5 I), and of p(x) = N(0, 2 I) where c is not given."""

    def __init__(self):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1, dtype=F64))
        self.flags = []

    def forward(self, inputs, noise):
        x, c, flag = inputs[:, :2], inputs[:, 2:4], inputs[:, 4:5]
        self.flags.append(flag[:, 0])
        sigma = (4 * noise).exp()[:, None]
        skip, out, inner = coefficients("edm", sigma, 1.0)
        u = x / inner
        variance = torch.where(flag > 0.5, 0.5, 2.0)
        return ((variance * u + sigma**2 * flag * c) / (variance + sigma**2) - skip * u) / out


def conditional():
    return DiffusionPrior(
        Shifted(), (2,), conditions={"c": Condition(2, shift=0.0, scale=1.0)}, mean_variance_of_field=10.0
    ).requires_grad_(False)


def test_given_is_the_conditional_prior():
    prior = conditional()
    u = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    told = prior.given(c=[1.5, -0.5])
    sigma = 0.7
    free = 2 * u / (2 + sigma**2)
    tied = (0.5 * u + sigma**2 * torch.tensor([1.5, -0.5], dtype=F64)) / (0.5 + sigma**2)
    torch.testing.assert_close(prior.denoise(u, sigma), free)
    torch.testing.assert_close(told.denoise(u, sigma), tied)
    guided = prior.given(c=[1.5, -0.5], weight=3.0)
    torch.testing.assert_close(guided.denoise(u, sigma), free + 3 * (tied - free))
    torch.testing.assert_close(prior.given().denoise(u, sigma), free)
    assert guided.evaluations == 8
    assert told.network is prior.network
    x = told.sample(2000, seed=0, steps=100, chunk=2000, dtype=F64)
    assert float((x.mean(0) - torch.tensor([1.5, -0.5])).abs().max()) < 5 * math.sqrt(0.5 / 2000)
    log_prob = told.log_prob_estimate(x[:5], trace="exact")
    expected = -((x[:5] - torch.tensor([1.5, -0.5], dtype=F64)).square().sum(1)) - math.log(2 * math.pi * 0.5)
    torch.testing.assert_close(log_prob, expected, rtol=0, atol=2e-3)


def test_conditions_are_dropped_at_their_rate_in_training():
    prior = conditional()
    x = torch.randn(5000, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    loss = prior.training_loss({"x": x, "c": x}, torch.Generator().manual_seed(0))
    assert loss.shape == (5000,)
    share = float((prior.network.flags[-1] == 0).double().mean())
    assert abs(share - 0.1) < 4 * math.sqrt(0.09 / 5000)
    prior.validation({"x": x[:8], "c": x[:8]})
    assert all(bool((f == 1).all()) for f in prior.network.flags[-9:])


def test_a_bad_condition_is_refused():
    prior = conditional()
    with pytest.raises(ValueError, match="not conditioned on colour"):
        prior.given(colour=1.0)
    with pytest.raises(ValueError, match="2 finite numbers"):
        prior.given(c=[1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="2 finite numbers"):
        prior.given(c=[1.0, math.nan])
    with pytest.raises(ValueError, match="weight"):
        prior.given(c=[1.0, 2.0], weight=math.inf)
    with pytest.raises(TypeError, match="not conditional"):
        DiffusionPrior(MLPDenoiser(2), (2,)).given(c=1.0)
    with pytest.raises(ValueError, match="class numbers from 0 to 2"):
        Condition(3, classes=True).encode(torch.tensor([3]), "kind")


def test_conditions_of_fields_stand_beside_depth(tmp_path):
    torch.manual_seed(0)
    grid = Grid((8, 8), (10.0, 10.0), axes=("z", "x"), units=("m", "m"))
    conditions = {"kind": Condition(3, classes=True), "share": Condition(1, shift=0.4, scale=0.2)}
    network = UNet(1, extra=2 + 4 + 2, widths=(4, 6), blocks=1, embedding=8)
    for p in network.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    prior = DiffusionPrior(network, grid.field_shape, grid=grid, depth=DepthChannel(100.0), conditions=conditions)
    told = prior.given(kind=2, share=0.5).eval()
    assert told.context.shape == (8, 8, 8)
    assert told.context[2:, 3, 5].tolist() == pytest.approx([0, 0, 1, 1, 0.5, 1])
    torch.testing.assert_close(told.context[:2], prior.context[:2])
    assert float(prior.context[2:].abs().max()) == 0
    large = told.at((16, 12))
    assert large.context.shape == (8, 16, 12)
    assert large.context[2:, 15, 11].tolist() == pytest.approx([0, 0, 1, 1, 0.5, 1])
    batch = {
        "x": torch.randn(4, 1, 8, 8),
        "context": prior.context[None, :2].expand(4, -1, -1, -1),
        "kind": torch.tensor([0, 1, 2, 0]),
        "share": torch.rand(4),
    }
    assert prior.training_loss(batch, torch.Generator().manual_seed(0)).shape == (4,)
    u = torch.randn(2, 1, 8, 8)
    assert float((told.denoise(u, 1.0) - prior.denoise(u, 1.0)).abs().max().detach()) > 1e-4
    other = DiffusionPrior.load(prior.save(tmp_path / "c.safetensors"))
    assert torch.equal(other.given(kind=2, share=0.5).denoise(u, 1.0), told.denoise(u, 1.0))


def test_a_conditional_prior_learns_its_conditions():
    g = torch.Generator().manual_seed(0)
    c = torch.rand(4096, 1, generator=g)
    x = torch.cat([2 * c - 1, 1 - 2 * c], 1) + 0.2 * torch.randn(4096, 2, generator=g)

    class Pairs:
        def batch(self, step, size, seed):
            pick = torch.randint(0, 4096, (size,), generator=torch.Generator().manual_seed(step))
            return {"x": x[pick], "c": c[pick]}

    torch.manual_seed(0)
    prior = FlowMatching(
        MLPDenoiser(2, extra=2, width=32, depth=2),
        (2,),
        sigma_data=0.6,
        conditions={"c": Condition(1, shift=0.5, scale=0.3)},
        condition_dropout=0.3,
    )
    Training(steps=500, batch_size=256, learning_rate=5e-3, warmup=20, ema=0.97).fit(prior, Pairs(), progress=False)
    for value in (0.1, 0.9):
        draws = prior.given(c=value).sample(500, seed=0, chunk=500)
        assert float((draws.mean(0) - torch.tensor([2 * value - 1, 1 - 2 * value])).abs().max()) < 0.08
        assert float(draws.std(0).max()) < 0.3
    assert float(prior.sample(500, seed=0, chunk=500).std(0).min()) > 0.45  # unconditional: √(1/3 + 0.04) = 0.61
