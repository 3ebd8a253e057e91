"""Autoencoders, laws of codes, pushforwards and kernel densities against closed forms."""

import math

import pytest
import torch

from invgen.contracts import HasDenoiser, HasDensity, HasLatent, Prior
from invgen.grid import Grid
from invgen.priors import (
    ArrayData,
    Autoencoder,
    GaussianMixturePrior,
    GaussianPrior,
    KernelDensityPrior,
    Pushforward,
    Training,
)
from invgen.priors.networks import MLP
from invgen.transforms import Affine, Exp

torch.set_num_threads(1)
F64 = torch.float64
MEAN = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
MATRIX = torch.tensor([[1.0, 0.6, 0.1], [0.6, 0.8, -0.2], [0.1, -0.2, 0.5]], dtype=F64)
LIFT = torch.linalg.qr(torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=F64))[0]


def linear(transform=None):
    """Codes y = Qᵀ u, u = Q y: exact on the span of Q."""
    model = Autoencoder(MLP(5, 3, depth=0), MLP(3, 5, depth=0), (5,), codes=3, transform=transform).to(F64)
    for layer, weight in ((model.encoder.body[0], LIFT.T), (model.decoder.body[0], LIFT)):
        layer.weight.data.copy_(weight)
        layer.bias.data.zero_()
    return model.eval().requires_grad_(False)


def fields(n, seed=0):
    return GaussianPrior.dense(MEAN, MATRIX).sample(n, seed=seed, dtype=F64) @ LIFT.T


def test_gaussian_codes_give_the_law_of_the_fields():
    """With a linear decoder the pushforward is N(Q m, Q Σ̂ Qᵀ), and decode is Q (m + L z)."""
    x = fields(3000)
    prior = linear().prior(x)
    assert isinstance(prior, HasLatent)
    assert prior.latent_shape == (3,)
    jacobian = torch.func.jacrev(lambda z: prior.decode(z[None])[0])(torch.zeros(3, dtype=F64))
    torch.testing.assert_close(jacobian @ jacobian.T, torch.cov(x.mT), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(prior.decode(torch.zeros(1, 3, dtype=F64))[0], x.mean(0))
    drawn = prior.sample(6000, seed=4, dtype=F64)
    se = (x.var(0) / 6000).sqrt()
    assert float(((drawn.mean(0) - x.mean(0)).abs() / se).max()) < 4.5


def test_codes_live_in_u_and_the_prior_in_x():
    x = 3.0 + 2.0 * fields(200)
    model = linear(Affine(3.0, 2.0))
    torch.testing.assert_close(model.decode(model.encode(x)), x)
    for kind in ("gaussian", "kde"):
        drawn = model.prior(x, kind=kind).sample(2000, seed=1, dtype=F64)
        assert float(((drawn.mean(0) - x.mean(0)).abs() / x.std(0)).max()) < 4.5 / math.sqrt(2000)


def test_kernel_density_of_codes_keeps_two_clusters():
    x = torch.cat([fields(150) * 0.1, fields(150, seed=1) * 0.1 + 3.0 * LIFT[:, 0]])
    prior = linear().prior(x, kind="kde")
    assert not isinstance(prior, HasLatent)
    first = prior.sample(2000, seed=0, dtype=F64) @ LIFT[:, 0]
    centre = float((x @ LIFT[:, 0]).mean())
    assert float((abs(first - centre) < 0.7).double().mean()) < 0.05
    gaussian = linear().prior(x).sample(2000, seed=0, dtype=F64) @ LIFT[:, 0]
    assert float((abs(gaussian - centre) < 0.7).double().mean()) > 0.2


def test_fewer_examples_than_codes():
    model = linear()
    for kind in ("gaussian", "kde"):
        assert torch.isfinite(model.prior(fields(2), kind=kind).sample(3)).all()
        with pytest.raises(ValueError, match="two examples"):
            model.prior(fields(1), kind=kind)
        with pytest.raises(ValueError, match=r"equal|vary"):
            model.prior(fields(1).expand(4, -1), kind=kind)
    with pytest.raises(ValueError, match="'gaussian' or 'kde'"):
        model.prior(fields(4), kind="uniform")


def test_training_reaches_the_principal_components():
    """The linear autoencoder's least error is the sum of the variances it must drop (Baldi and Hornik 1989)."""
    variances = torch.tensor([4.0, 2.0, 1.0, 0.1, 0.05])
    x = torch.randn(512, 5, generator=torch.Generator().manual_seed(2)) * variances.sqrt()
    least = float(torch.linalg.eigvalsh(torch.cov(x.mT, correction=0))[:2].sum()) / 5
    torch.manual_seed(0)
    model = Autoencoder(MLP(5, 3, depth=0), MLP(3, 5, depth=0), (5,), codes=3)
    training = Training(steps=500, batch_size=128, learning_rate=2e-2, warmup=10, ema=0.9)
    report = training.fit(model, ArrayData(x), validation={"x": x}, progress=False)
    assert report.validation["reconstruction_rmse"] ** 2 == pytest.approx(least, rel=0.03)


def test_bernoulli_loss_and_files(tmp_path):
    torch.manual_seed(0)
    model = Autoencoder.convolutional(
        (1, 8, 8), codes=4, widths=(4, 8), loss="bernoulli", grid=Grid((8, 8), (1.0, 1.0))
    )
    x = (torch.rand(3, 1, 8, 8) < 0.4).float()
    expected = -torch.distributions.Bernoulli(probs=model.decode(model.encode(x))).log_prob(x).flatten(1).mean(1)
    torch.testing.assert_close(model.training_loss({"x": x}, torch.Generator()), expected, rtol=1e-4, atol=1e-5)
    again = Autoencoder.load(model.eval().save(tmp_path / "a.safetensors", card={"n": 3}))
    torch.testing.assert_close(again.decode(again.encode(x)), model.decode(model.encode(x)))
    assert (again.loss, again.codes, again.grid, again.seen) == ("bernoulli", 4, model.grid, {"n": 3})
    prior = again.prior(x, kind="gaussian")
    assert prior.grid == model.grid
    assert prior.sample(2).shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="0 and 1"):
        Autoencoder.convolutional((1, 8, 8), codes=4, widths=(4, 8), loss="bernoulli").training_loss(
            {"x": 0.5 * x}, torch.Generator()
        )
    with pytest.raises(ValueError, match="squared, bernoulli"):
        Autoencoder(MLP(5, 3), MLP(3, 5), (5,), codes=3, loss="poisson")
    with pytest.raises(ValueError, match="cannot take items"):
        Autoencoder(MLP(5, 3), MLP(2, 5), (5,), codes=3)
    with pytest.raises(ValueError, match="an encoder to"):
        Autoencoder(MLP(5, 2), MLP(3, 5), (5,), codes=3)


def test_pushforward_has_what_its_base_has():
    gaussian = GaussianPrior.dense(MEAN, MATRIX)
    mixture = GaussianMixturePrior([0.5, 0.5], torch.stack([MEAN, -MEAN]), [1.0, 2.0])
    for base, latent in ((gaussian, True), (mixture, False)):
        prior = Pushforward(lambda y: y.exp(), base)
        assert isinstance(prior, Prior)
        assert isinstance(prior, Pushforward)
        assert isinstance(prior, HasLatent) is latent
        assert not isinstance(prior, HasDensity)
        torch.testing.assert_close(prior.sample(4, seed=2, dtype=F64), base.sample(4, seed=2, dtype=F64).exp())
    prior = Pushforward(lambda y: y.exp(), gaussian)
    z = torch.randn(3, 3, dtype=F64)
    torch.testing.assert_close(prior.decode(z), GaussianPrior.dense(MEAN, MATRIX, transform=Exp()).decode(z))


def test_pushforwards_chain_and_take_modules():
    inner = Pushforward(lambda y: 2 * y, GaussianPrior.dense(MEAN, MATRIX))
    outer = Pushforward(torch.nn.Linear(3, 2), inner)  # float32 weights, any dtype in
    z = torch.randn(2, 3, dtype=F64)
    assert outer.decode(z).dtype == F64
    torch.testing.assert_close(outer.decode(z).float(), outer.f(inner.decode(z).float()))
    with pytest.raises(ValueError, match="batch axis first"):
        Pushforward(lambda y: y.sum(), inner)
    with pytest.raises(ValueError, match="expected"):
        Pushforward(lambda y: y, inner, shape=(4,))


def test_truncated_gaussian_facies_have_their_proportion():
    """The simplest plurigaussian: a threshold at the quantile gives the proportion."""
    grid = Grid((6, 6), (1.0, 1.0))
    base = GaussianPrior.stationary(grid, variance=1.0, length=(1.0, 1.0))
    threshold = math.sqrt(2) * torch.erfinv(torch.tensor(2 * 0.7 - 1)).item()
    prior = Pushforward(lambda y: (y > threshold).to(y), base, grid=grid)
    assert prior.shape == grid.field_shape
    share = prior.sample(4000, seed=0).flatten(1).mean(1)
    assert abs(float(share.mean()) - 0.3) < 4 * float(share.std()) / math.sqrt(4000)


def test_kernel_density_is_a_gaussian_mixture():
    examples = torch.randn(7, 2, generator=torch.Generator().manual_seed(3), dtype=F64) @ MATRIX[:2, :2] + MEAN[:2]
    h = 0.5
    prior = KernelDensityPrior(examples, bandwidth=h, transform=Affine(1.0, 2.0))
    u = (examples - 1.0) / 2.0
    covariance = torch.cov(u.mT)
    centres = u.mean(0) + math.sqrt(1 - h * h) * (u - u.mean(0))
    mixture = GaussianMixturePrior(
        [1 / 7] * 7, centres, (h * h * covariance).expand(7, 2, 2), transform=Affine(1.0, 2.0)
    )
    x = examples + 0.3
    torch.testing.assert_close(prior.log_prob(x), mixture.log_prob(x))
    sigma = torch.tensor([0.1, 0.2, 0.5, 1.0, 2.0, 0.0, 5.0], dtype=F64)
    torch.testing.assert_close(prior.denoise(u, sigma), mixture.denoise(u, sigma), rtol=1e-6, atol=1e-8)
    drawn = prior.sample(20000, seed=0, dtype=F64)
    total = torch.cov(examples.mT) * (1 - h * h) * 6 / 7 + torch.cov(examples.mT) * h * h
    torch.testing.assert_close(torch.cov(drawn.mT), total, rtol=0.06, atol=0.02)
    assert isinstance(prior, HasDensity)
    assert isinstance(prior, HasDenoiser)


def test_bandwidths():
    normal = torch.randn(300, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    clusters = torch.cat([0.02 * normal, 0.02 * normal + 5.0])
    assert KernelDensityPrior(normal, bandwidth="silverman").bandwidth == pytest.approx((4 / (4 * 300)) ** (1 / 6))
    # a Gaussian is best described by one; clusters by kernels of their own size
    assert KernelDensityPrior(normal).bandwidth > 0.5
    assert KernelDensityPrior(clusters).bandwidth < 0.05
    for wrong in (0.0, 1.5, "scott"):
        with pytest.raises(ValueError, match="bandwidth"):
            KernelDensityPrior(normal, bandwidth=wrong)
    with pytest.raises(ValueError, match="finite"):
        KernelDensityPrior(normal * float("nan"))
