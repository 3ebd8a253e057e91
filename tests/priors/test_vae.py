"""Variational autoencoders: the bound against exact evidences, likelihoods as sums, draws, collapse, files."""

import importlib.util
import math
import warnings
from pathlib import Path

import pytest
import torch

from invgen.contracts import HasDensity, HasDensityEstimate, HasLatent, Prior
from invgen.driver import Streams
from invgen.priors import VAE, ArrayData, Training
from invgen.priors._likelihoods import likelihood_of
from invgen.priors.networks import MLP, LinearEncoder
from invgen.transforms import Affine, Exp

torch.set_num_threads(1)
F64 = torch.float64
SIGMA = 0.4


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def linear_gaussian(transform=None, exact=True):
    """u = W z + b + sigma n with orthogonal columns of W and the exact encoder, so that ELBO = log evidence."""
    W = torch.linalg.qr(normal(5, 2))[0] * torch.tensor([1.5, 0.6], dtype=F64)
    b = normal(5, seed=1) + 2.0
    encoder, decoder = LinearEncoder(5, 2).to(F64), MLP(2, 5, depth=0).to(F64)
    precision = W.T @ W / SIGMA**2 + torch.eye(2, dtype=F64)  # diagonal, like the posterior covariance of z
    gain = torch.linalg.solve(precision, W.T) / SIGMA**2 * (1.0 if exact else 0.8)
    prior = VAE(encoder, decoder, (5,), latent=2, sigma=SIGMA, transform=transform).to(F64)
    for p, value in (
        (decoder.body[0].weight, W),
        (decoder.body[0].bias, b),
        (encoder.mean.weight, gain),
        (encoder.mean.bias, -gain @ b),
        (encoder.log_variance, -precision.diagonal().log()),
    ):
        p.data.copy_(value)
    law = torch.distributions.MultivariateNormal(b, W @ W.T + SIGMA**2 * torch.eye(5, dtype=F64))
    return prior.eval().requires_grad_(False), law


@pytest.mark.parametrize(("transform", "jacobian"), [(None, 0.0), (Affine(3.0, -2.0), 5 * math.log(2.0))])
def test_bound_with_the_exact_posterior_is_the_evidence(transform, jacobian):
    """Every importance weight is p(u) then: no Monte-Carlo error in L_K, and the ELBO is its mean."""
    prior, law = linear_gaussian(transform)
    u = law.sample((2000,))
    x = prior.transform(u)
    torch.testing.assert_close(prior.log_prob_estimate(x, samples=3), law.log_prob(u) - jacobian)
    figures = prior.validation({"x": x})
    # ELBO of one z an example: log p(u|z) − KL has the right mean; its error is that of log p(u|z) around E_q
    assert abs(figures["elbo"] - float((law.log_prob(u) - jacobian).mean())) < 5 * math.sqrt(2.0 / 2000)
    assert figures["elbo"] == pytest.approx(-figures["rate"] - figures["distortion"])
    assert figures["bits_per_dim"] == pytest.approx(-figures["elbo"] / (5 * math.log(2)))


def test_jacobian_of_a_transform_that_is_not_affine():
    prior, law = linear_gaussian(Exp())
    u = law.sample((4,))
    torch.testing.assert_close(prior.log_prob_estimate(u.exp(), samples=2), law.log_prob(u) - u.sum(1))


def test_more_importance_samples_tighten_the_bound():
    prior, law = linear_gaussian(exact=False)
    u = law.sample((500,))
    exact = law.log_prob(u).mean()
    bounds = [float(exact - prior.log_prob_estimate(u, samples=k, seed=k).mean()) for k in (1, 8, 256)]
    assert bounds[0] > bounds[1] > bounds[2] > -0.01
    assert bounds[2] < 0.05 * bounds[0]
    # the gap of the ELBO is KL(q ‖ p(z | u)) = ½ Σ (Δμ)²/s², the posterior variances being right
    wrong, right = prior.encode(u), linear_gaussian()[0].encode(u)
    gap = 0.5 * ((wrong.mean - right.mean) / right.stddev).square().sum(1)
    assert bounds[0] == pytest.approx(float(gap.mean()), abs=5 * math.sqrt((2 * gap.mean()) / 500))
    few = prior.log_prob_estimate(u[:3], samples=8, seed=8, chunk=2)  # neither the batch nor the chunk decides
    torch.testing.assert_close(few, prior.log_prob_estimate(u, samples=8, seed=8)[:3])


def test_training_loss_is_the_bound_and_beta_weights_the_rate_alone():
    prior, law = linear_gaussian()
    u = law.sample((6,))
    figures = {}
    for beta in (1.0, 4.0):
        prior.beta = beta
        figures[beta] = prior.training_loss({"x": u}, torch.Generator().manual_seed(0))
    q = prior.encode(u)
    standard = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(6, 2, dtype=F64), 1.0), 1)
    kl = torch.distributions.kl_divergence(q, standard)
    torch.testing.assert_close((figures[4.0] - figures[1.0]) * 5, 3 * kl)
    noise = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)).to(F64)
    log_p = torch.distributions.Normal(prior.decode(q.mean + q.stddev * noise), SIGMA).log_prob(u).sum(1)
    torch.testing.assert_close(figures[1.0] * 5, kl - log_p)


@pytest.mark.parametrize("per_entry", [False, True])
def test_gaussian_likelihood(per_entry):
    sigma = torch.tensor([[0.1, 1.0], [2.0, 0.5]]).unsqueeze(0) if per_entry else 0.3
    likelihood = likelihood_of("gaussian", (1, 2, 2), sigma=sigma)
    u, out = normal(3, 1, 2, 2), normal(3, 1, 2, 2, seed=1)
    scale = sigma.to(F64) if per_entry else torch.tensor(0.3, dtype=F64)
    expected = torch.distributions.Normal(out, scale.expand_as(out)).log_prob(u).sum((1, 2, 3))
    torch.testing.assert_close(likelihood.log_prob(u, out), expected)


def test_learned_sigma_is_a_parameter_and_a_stated_one_is_not():
    def networks():
        return MLP(3, 4, depth=0), MLP(2, 3, depth=0)

    def names(prior):
        return {n for n, _ in prior.requires_grad_(True).named_parameters()}

    assert "likelihood.tenth" in names(VAE(*networks(), (3,), latent=2))
    assert "likelihood.tenth" not in names(VAE(*networks(), (3,), latent=2, sigma=0.1))
    assert VAE(*networks(), (3,), latent=2, per_entry=True).likelihood.log_sigma.shape == (3,)


def test_discrete_likelihoods():
    bernoulli = likelihood_of("bernoulli", (4,))
    u = torch.tensor([[0.0, 1.0, 1.0, 0.0]], dtype=F64)
    out = normal(1, 4)
    expected = torch.distributions.Bernoulli(logits=out).log_prob(u).sum(1)
    torch.testing.assert_close(bernoulli.log_prob(u, out), expected)
    torch.testing.assert_close(bernoulli.mean(out), out.sigmoid())

    facies = likelihood_of("categorical", (1, 2, 2), values=(-1.0, 0.5, 4.0))
    u = torch.tensor([[[[0.5, -1.0], [4.0, 4.0]]]], dtype=F64)
    out = normal(1, 3, 2, 2, seed=2)
    law = torch.distributions.Categorical(logits=out.movedim(1, -1))
    expected = law.log_prob(torch.tensor([[[1, 0], [2, 2]]])).sum((1, 2))
    torch.testing.assert_close(facies.log_prob(u, out), expected)
    values = torch.tensor([-1.0, 0.5, 4.0], dtype=F64)
    torch.testing.assert_close(facies.mean(out)[:, 0], (law.probs * values).sum(-1))

    one_hot = likelihood_of("categorical", (3, 2, 2))
    labels = torch.tensor([[[1, 0], [2, 2]]])
    u = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).to(F64)
    torch.testing.assert_close(one_hot.log_prob(u, out), law.log_prob(labels).sum((1, 2)))
    assert one_hot.entries == 4


@pytest.mark.parametrize(
    ("kind", "options", "shape"),
    [
        ("gaussian", {"sigma": 0.7}, (1, 2, 2)),
        ("bernoulli", {}, (1, 2, 2)),
        ("categorical", {"values": (-1.0, 0.5, 4.0)}, (1, 2, 2)),
        ("categorical", {}, (3, 2, 2)),
    ],
)
def test_draws_of_a_likelihood_have_its_mean_and_coding(kind, options, shape):
    likelihood = likelihood_of(kind, shape, **options)
    n = 4000
    out = normal(1, likelihood.multiple * shape[0], 2, 2).expand(n, -1, -1, -1)
    drawn = likelihood.draw(out, Streams(0, range(n)))
    likelihood.check(drawn)
    error = (drawn.mean(0) - likelihood.mean(out)[0]).abs() / (drawn.std(0) / math.sqrt(n))
    assert float(error.max()) < 4.5


def test_wrong_codings_are_refused():
    soft = torch.full((2, 1, 8, 8), 0.5)
    options = {"latent": 2, "widths": (4, 8), "patch": 2}
    prior = VAE.convolutional((1, 8, 8), likelihood="bernoulli", **options)
    with pytest.raises(ValueError, match="0 and 1"):
        prior.training_loss({"x": soft}, torch.Generator())
    with pytest.raises(ValueError, match="0 and 1"):
        prior.log_prob_estimate(soft)
    prior = VAE.convolutional((1, 8, 8), likelihood="categorical", values=(0, 1), **options)
    with pytest.raises(ValueError, match=r"values \[0.0, 1.0\]"):
        prior.validation({"x": soft})
    with pytest.raises(ValueError, match="one-hot"):
        VAE.convolutional((1, 8, 8), likelihood="categorical", **options)
    with pytest.raises(ValueError, match="gaussian, bernoulli"):
        VAE.convolutional((1, 8, 8), likelihood="poisson", **options)
    with pytest.raises(ValueError, match="multiples of 16"):
        VAE.convolutional((1, 40, 40))
    with pytest.raises(ValueError, match="means, log-variances"):
        VAE(MLP(3, 2), MLP(2, 3), (3,), latent=2)
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        VAE(MLP(4, 4), MLP(2, 3), (4,), latent=2)


def test_capabilities_are_those_of_a_variational_autoencoder():
    for prior in VAE.examples():
        assert isinstance(prior, Prior)
        assert isinstance(prior, HasLatent)
        assert isinstance(prior, HasDensityEstimate)
        assert not isinstance(prior, HasDensity)


def test_draws_follow_seed_and_index_and_noise_adds_the_likelihood():
    prior, law = linear_gaussian()
    x = prior.sample(4000, seed=3, noise=True, dtype=F64)
    torch.testing.assert_close(x[:5], prior.sample(5, seed=3, noise=True, chunk=2, dtype=F64))
    assert float(((x.mean(0) - law.mean).abs() / (law.variance / 4000).sqrt()).max()) < 4.5
    spread = x.var(0) / law.variance
    assert float((spread - 1).abs().max()) < 4.5 * math.sqrt(2 / 4000)
    bare = prior.sample(4000, seed=3, dtype=F64).var(0)
    torch.testing.assert_close(bare + SIGMA**2, law.variance, rtol=0.12, atol=0)


def test_rate_distortion_curve_ends_at_the_bound_and_starts_without_rate():
    prior, law = linear_gaussian()
    u = law.sample((4000,))
    curve = prior.rate_distortion(u)
    assert curve["units"].tolist() == [0, 1, 2]
    assert float(curve["rate"][0]) == 0.0
    assert (curve["rate"].diff() > 0).all()
    assert (curve["distortion"].diff() < 0).all()
    bounds = -(curve["rate"] + curve["distortion"])
    exact = law.log_prob(u).mean()
    assert abs(float(bounds[-1] - exact)) < 5 * math.sqrt(2.0 / 4000)
    assert float(bounds.max()) < float(exact) + 0.1
    torch.testing.assert_close(curve["rate_per_unit"].sum(), curve["rate"][-1])


def test_collapse_is_said():
    data = normal(256, 6).float()
    torch.manual_seed(0)
    prior = VAE(MLP(6, 8, width=16, depth=1), MLP(4, 6, width=16, depth=1), (6,), latent=4, beta=50.0)
    Training(steps=150, batch_size=64, learning_rate=1e-2, warmup=5).fit(prior, ArrayData(data), progress=False)
    with pytest.warns(UserWarning, match="Posterior collapse: only 0 of 4"):
        figures = prior.validation({"x": data})
    assert figures["active_units"] == 0
    good, law = linear_gaussian()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert good.validation({"x": law.sample((500,))})["active_units"] == 2


def test_training_finds_what_varies():
    """8 × 8 blocks whose brightness and side vary: the bound must beat that of independent pixels by far."""
    torch.manual_seed(1)
    n = 512
    x = torch.zeros(n, 1, 8, 8)
    level, side = torch.rand(n, 1, 1) + 0.5, torch.rand(n) < 0.5
    x[side, 0, :, :4] += level[side]
    x[~side, 0, :, 4:] += level[~side]
    x += 0.05 * torch.randn_like(x)
    prior = VAE.convolutional((1, 8, 8), latent=3, widths=(8, 12), transform=Affine(0.4, 0.5))
    training = Training(steps=300, batch_size=64, learning_rate=5e-3, warmup=20, ema=0.98)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        report = training.fit(prior, ArrayData(x), validation={"x": x}, progress=False)
    independent = torch.distributions.Normal(x.mean(0), x.std(0)).log_prob(x).flatten(1).sum(1).mean()
    assert report.validation["elbo"] > float(independent) + 40
    assert report.validation["sigma"] * 0.5 < 0.12


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("half", [False, True])
def test_files(tmp_path, learned, half):
    options = {} if learned else {"sigma": torch.full((1, 8, 8), 0.25)}
    prior = VAE.convolutional(
        (1, 8, 8), latent=2, widths=(4, 8), beta=2.0, transform=Affine(1.0, 3.0), **options
    ).eval()
    if learned:
        prior.likelihood.tenth.data.fill_(-0.15)
    path = prior.save(tmp_path / "v.safetensors", half=half, card={"data": "none"})
    other = VAE.load(path)
    z = torch.randn(3, 2)
    torch.testing.assert_close(
        other.decode(z), prior.decode(z), rtol=1e-2 if half else 1e-6, atol=3e-2 if half else 1e-6
    )
    torch.testing.assert_close(other.likelihood.sigma.float(), prior.likelihood.sigma.float())
    assert other.likelihood.learned is learned
    assert (other.beta, other.seen, other.kind) == (2.0, {"data": "none"}, "gaussian")
    with pytest.raises(TypeError, match="affine"):
        VAE.convolutional((1, 8, 8), latent=2, widths=(4, 8), transform=Exp()).save(tmp_path / "w.safetensors")
    facies = VAE.convolutional((1, 8, 8), latent=2, widths=(4, 8), likelihood="categorical", values=(0.0, 2.5)).eval()
    again = VAE.load(facies.save(tmp_path / "f.safetensors"))
    torch.testing.assert_close(again.decode(z), facies.decode(z))


def test_linear_vae_reaches_probabilistic_pca():
    path = Path(__file__).parents[2] / "benchmarks" / "vae_ppca.py"
    spec = importlib.util.spec_from_file_location("vae_ppca", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    x = module.data(200, 6, 2, seed=1)
    centre, scale = x.mean(0), torch.cov(x.mT, correction=0)
    values, vectors = torch.linalg.eigh(scale)
    noise = values[:4].mean()
    loadings = vectors[:, 4:] * (values[4:] - noise).sqrt()
    law = torch.distributions.MultivariateNormal(centre, loadings @ loadings.T + noise * torch.eye(6, dtype=F64))
    assert module.maximum_log_likelihood(x, 2) == pytest.approx(float(law.log_prob(x).mean()))
    assert -1e-3 < module.ppca_gap(n=300, d=8, q=2, steps=500) < 0.01


def test_a_latent_is_a_vector_unless_it_is_asked_to_be_a_map():
    assert not VAE.convolutional((1, 16, 16), latent=5, widths=(4, 4)).decoder.spatial
    spatial = VAE.convolutional((1, 16, 16), latent=32, widths=(4, 4), spatial=True)
    assert spatial.decoder.maps == 2  # of 4 × 4
    assert spatial.latent_shape == (32,)
