"""Adversarial priors: losses and penalties against closed forms, bigger latents, diagnostics, training, files."""

import math
import warnings

import pytest
import torch

from invgen.contracts import HasDensity, HasLatent, Prior
from invgen.priors import GAN, VAE, WGAN, ArrayData, Training
from invgen.priors._adversarial import sample_figures
from invgen.priors.networks import MLP
from invgen.transforms import Affine, Exp

torch.set_num_threads(1)
F64 = torch.float64


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=F64)


def vectors(cls, dim=3, **options):
    torch.manual_seed(0)
    return cls(MLP(2, dim, width=16), MLP(dim, 1, width=16), (dim,), latent_shape=(2,), **options).to(F64)


def play(prior, batch_of, steps, *, rate=1e-3, players=None, seed=0):
    """The game as a training loop plays it: one Adam a player, a fresh batch an update, the other one frozen."""
    groups = {k: v for k, v in prior.parameter_groups().items() if players is None or k in players}
    adams = {k: torch.optim.Adam(v, lr=rate, betas=prior.optimizer_settings(k)["betas"]) for k, v in groups.items()}
    generator = rng(seed)
    for step in range(steps):
        for name in prior.schedule(step):
            if name not in adams:
                continue
            adams[name].param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            for other, parameters in prior.parameter_groups().items():
                for p in parameters:
                    p.requires_grad_(other == name)
            loss = prior.losses(name, {"x": batch_of(generator)}, generator).mean()
            adams[name].zero_grad(set_to_none=True)
            loss.backward()
            adams[name].step()
    return prior


@pytest.mark.parametrize("norm", [0.0, 0.3, 1.0, 2.5])
def test_gradient_penalty_of_a_linear_critic(norm):
    """f(u) = w · u + c has the gradient w everywhere: the penalty is λ (|w| − 1)² for every example."""
    prior = WGAN(MLP(2, 3, depth=0), MLP(3, 1, depth=0), (3,), latent_shape=(2,), weight=10.0).to(F64)
    w = torch.tensor([[2.0, -1.0, 2.0]], dtype=F64) / 3 * norm
    prior.critic.body[0].weight.data.copy_(w)
    u, made = normal(5, 3), normal(5, 3, seed=1)
    penalty = prior.penalty(u, made, rng())
    torch.testing.assert_close(penalty, torch.full((5,), 10.0 * (norm - 1) ** 2, dtype=F64))
    (slope,) = torch.autograd.grad(penalty.sum(), prior.critic.body[0].weight)
    assert torch.isfinite(slope).all()  # also where the gradient vanishes
    if norm:
        torch.testing.assert_close(slope, 5 * 20.0 * (norm - 1) * w / norm)


def test_gradient_penalty_is_taken_between_the_example_and_the_draw():
    """f = |u|²/2 has |∇f(û)| = |û|; û must lie on the segment, with one ε an example."""

    class Square(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones((), dtype=F64))

        def forward(self, u):
            return 0.5 * self.scale * u.square().flatten(1).sum(1, keepdim=True)

    prior = WGAN(MLP(2, 3), Square(), (3,), latent_shape=(2,), weight=1.0).to(F64)
    u, made = normal(4, 3), normal(4, 3, seed=1)
    share = torch.rand(4, generator=rng(7)).to(F64)[:, None]
    expected = ((share * u + (1 - share) * made).norm(dim=1) - 1).square()
    torch.testing.assert_close(prior.penalty(u, made, rng(7)), expected)
    # d/ds λ (s |û| − 1)² at s = 1: the penalty reaches the critic's weights through its gradient
    (slope,) = torch.autograd.grad(prior.penalty(u, made, rng(7)).sum(), prior.critic.scale)
    length = (share * u + (1 - share) * made).norm(dim=1)
    torch.testing.assert_close(slope, (2 * (length - 1) * length).sum())


@pytest.mark.parametrize("cls", [GAN, WGAN])
def test_losses_are_those_of_the_papers(cls):
    prior = vectors(cls, transform=Affine(1.0, 2.0), **({"r1": 0.6} if cls is GAN else {}))
    x = normal(6, 3)
    u = (x - 1.0) / 2.0
    z = torch.randn(6, 2, generator=rng(3)).to(F64)
    made = prior.generator(z)
    real, fake = prior.critic(u)[:, 0], prior.critic(made)[:, 0]
    share = rng(3)
    torch.randn(6, 2, generator=share)
    if cls is GAN:
        critic = -real.sigmoid().log() - (1 - fake.sigmoid()).log()
        generator = -fake.sigmoid().log()
        at = u.clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(prior.critic(at).sum(), at)
        critic = critic + 0.3 * slope.square().sum(1)
    else:
        critic = fake - real + prior.penalty(u, made, share)
        generator = -fake
    torch.testing.assert_close(prior.losses("critic", {"x": x}, rng(3)), critic)
    torch.testing.assert_close(prior.losses("generator", {"x": x}, rng(3)), generator)
    with pytest.raises(ValueError, match="players"):
        prior.losses("referee", {"x": x}, rng())


def test_an_update_of_the_critic_leaves_the_generator_alone():
    prior = vectors(WGAN)
    prior.losses("critic", {"x": normal(6, 3)}, rng()).mean().backward()
    assert all(p.grad is None for p in prior.generator.parameters())
    assert all(p.grad is not None for p in prior.critic.parameters())


def test_protocol_of_training():
    prior = vectors(WGAN, critic_steps=3)
    groups = prior.parameter_groups()
    assert set(groups) == {"critic", "generator"}
    assert sum(p.numel() for g in groups.values() for p in g) == sum(p.numel() for p in prior.parameters())
    assert prior.schedule(7) == ["critic"] * 3 + ["generator"]
    assert prior.optimizer_settings("critic")["betas"] == (0.0, 0.9)
    assert vectors(GAN).optimizer_settings("generator")["betas"] == (0.0, 0.99)
    assert prior.averaged() == ["generator"]


def test_critic_estimates_the_distance_of_shifted_gaussians():
    """W1 between N(0, I) and N(m, I) is |m|, with the optimal critic u · m/|m|; the penalty lets its slope exceed 1.

    The linear critic c u · m/|m| minimises −c |m| + λ (c − 1)², at c = 1 + |m|/(2 λ).
    """
    shift = torch.tensor([1.2, -0.9], dtype=F64)
    prior = vectors(WGAN, dim=2)
    prior.generator = MLP(2, 2, depth=0).to(F64)
    prior.generator.body[0].weight.data.copy_(torch.eye(2))
    prior.generator.body[0].bias.data.zero_()
    prior.critic = MLP(2, 1, depth=0).to(F64)
    play(prior, lambda g: torch.randn(256, 2, generator=g).to(F64) + shift, 120, rate=1e-2, players=("critic",))
    w = prior.critic.body[0].weight[0].detach()
    size = float(shift.norm())
    assert float(w @ shift / (w.norm() * size)) > 0.99
    assert float(w.norm()) == pytest.approx(1 + size / 20, abs=0.03)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figures = prior.validation({"x": normal(4000, 2, seed=5) + shift})
    assert figures["critic_gap"] / float(w.norm()) == pytest.approx(size, abs=5 * math.sqrt(2 / 4000))
    assert figures["critic_gradient"] == pytest.approx(float(w.norm()))


@pytest.mark.parametrize(("cls", "steps", "rate", "options"), [(GAN, 900, 1e-2, {"r1": 0.2}), (WGAN, 300, 2e-2, {})])
def test_the_game_finds_a_correlated_gaussian(cls, steps, rate, options):
    """A linear generator must reach mean and covariance of the data, from far away."""
    root = torch.tensor([[1.0, 0.0], [0.7, 0.5]], dtype=F64)
    mean = torch.tensor([1.5, -1.0], dtype=F64)
    torch.manual_seed(0)
    prior = cls(MLP(2, 2, depth=0), MLP(2, 1, width=32, depth=2), (2,), latent_shape=(2,), **options).to(F64)
    play(prior, lambda g: torch.randn(128, 2, generator=g).to(F64) @ root.T + mean, steps, rate=rate)
    layer = prior.generator.body[0]
    covariance = (layer.weight @ layer.weight.T).detach()
    assert float((layer.bias.detach() - mean).abs().max()) < 0.25
    assert float((covariance - root @ root.T).abs().max()) < 0.35


def test_capabilities():
    for prior in (*GAN.examples(), *WGAN.examples()):
        assert isinstance(prior, Prior)
        assert isinstance(prior, HasLatent)
        assert not isinstance(prior, HasDensity)


def stationary():
    torch.manual_seed(1)
    return WGAN.stationary((1, 32, 32), latent_channels=2, widths=(10, 8, 6), critic_widths=(6, 8)).to(F64).eval()


def test_a_bigger_latent_makes_a_bigger_image_of_which_the_small_one_is_a_crop():
    small, f = stationary(), 8
    large = small.at((64, 48))
    assert large.shape == (1, 64, 48)
    assert large.generator is small.generator
    z = normal(2, *large.latent_shape)
    image = large.decode(z)
    for i, j in ((0, 0), (2, 1), (4, 2)):
        cut = z[:, :, i : i + small.latent_shape[1], j : j + small.latent_shape[2]]
        crop = small.decode(cut)
        torch.testing.assert_close(crop, image[:, :, f * i : f * i + 32, f * j : f * j + 32])
    with pytest.raises(TypeError, match="one size"):
        WGAN.convolutional((1, 16, 16), widths=(4, 6), critic_widths=(4, 6)).at((32, 32))


def test_editing_the_latent_changes_its_footprint_alone():
    prior = stationary()
    z = normal(1, *prior.latent_shape)
    other = z.clone()
    i, j = 3, 4
    other[0, 1, i, j] += 1.0
    changed = (prior.decode(other) - prior.decode(z))[0, 0] != 0
    (top, bottom), (left, right) = (prior.generator.footprint(k) for k in (i, j))
    rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
    assert int(rows.min()) >= max(top, 0)
    assert int(rows.max()) <= bottom
    assert int(columns.min()) >= max(left, 0)
    assert int(columns.max()) <= right
    wide = prior.at((160, 160))  # where the whole footprint is in the image it is reached exactly
    z = normal(1, *wide.latent_shape)
    other = z.clone()
    other[0, 0, 12, 12] += 1.0
    rows = ((wide.decode(other) - wide.decode(z))[0, 0] != 0).any(1).nonzero().flatten()
    assert (int(rows.min()), int(rows.max())) == prior.generator.footprint(12)


def test_the_field_is_stationary_to_its_borders():
    """Nothing is padded: moments at the same phase of the upsampling agree at the border and inside."""
    prior = stationary()
    x = prior.sample(3000, seed=0, dtype=F64)[:, 0]
    phases = x.reshape(3000, 4, 8, 4, 8)
    for value in (phases, phases.square()):
        border, inside = value[:, 0, :, 0, :], value[:, 1, :, 2, :]
        se = ((border.var(0) + inside.var(0)) / 3000).sqrt()
        assert float(((border.mean(0) - inside.mean(0)).abs() / se).max()) < 5


def test_figures_of_perfect_collapsed_and_copied_draws():
    data, train, fresh = normal(400, 2), normal(400, 2, seed=1), normal(400, 2, seed=2)
    good = sample_figures(fresh, data, train)
    for name, value in good.items():
        assert value == pytest.approx(1.0, abs=0.2), name
    assert sample_figures(0.01 * fresh, data)["diversity"] < 0.02
    copies = sample_figures(train + 1e-3 * fresh, data, train)
    assert copies["memorisation"] < 0.05
    half = fresh.clone()
    half[:, 0] = half[:, 0].abs() + 0.5  # a part of the data is never made
    assert sample_figures(half, data)["recall_distance"] > 1.5
    assert sample_figures(fresh + 5.0, data)["precision_distance"] > 5


def test_validation_finds_collapse_and_an_overfitted_critic():
    prior = vectors(WGAN)
    held, train = normal(60, 3, seed=3), normal(60, 3, seed=4)
    with torch.no_grad():
        for p in prior.generator.parameters():
            p.mul_(0.05)
    with pytest.warns(UserWarning, match="Mode collapse"):
        figures = prior.validation({"x": held})
    assert figures["diversity"] < 0.5
    assert "critic_overfit" not in figures

    class Knowing(torch.nn.Module):
        """A critic that knows the training examples by heart."""

        def __init__(self):
            super().__init__()
            self.examples = torch.nn.Parameter(train.clone())

        def forward(self, u):
            return torch.exp(-50 * torch.cdist(u, self.examples).amin(1, keepdim=True))

    prior.critic = Knowing()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figures = prior.validation({"x": held, "train": train})
        assert figures["critic_gap_train"] > 0.9
        assert figures["critic_overfit"] > 3
        prior.losses("critic", {"x": train}, rng())  # without "train" it is the last batch that was trained on
        assert prior.validation({"x": held})["critic_gap_train"] == figures["critic_gap_train"]


@pytest.mark.parametrize("cls", [GAN, WGAN])
def test_files(tmp_path, cls):
    torch.manual_seed(0)
    options = {"r1": 0.5} if cls is GAN else {"weight": 7.0}
    prior = cls.stationary(
        (1, 16, 16),
        latent_channels=2,
        widths=(6, 4),
        critic_widths=(4, 6),
        output="tanh",
        transform=Affine(1.0, 3.0),
        critic_steps=2,
        **options,
    ).eval()
    bare = cls.load(prior.save(tmp_path / "g.safetensors", card={"data": "none"}))
    z = torch.randn(2, *prior.latent_shape)
    torch.testing.assert_close(bare.decode(z), prior.decode(z))
    assert bare.critic is None
    assert (bare.seen, bare.critic_steps) == ({"data": "none"}, 2)
    full = cls.load(prior.save(tmp_path / "f.safetensors", critic=True))
    x = torch.randn(3, 1, 16, 16)
    torch.testing.assert_close(full.losses("critic", {"x": x}, rng()), prior.losses("critic", {"x": x}, rng()))
    half = cls.load(prior.save(tmp_path / "h.safetensors", half=True))
    torch.testing.assert_close(half.decode(z), prior.decode(z), rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match="expected"):
        (WGAN if cls is GAN else GAN).load(tmp_path / "g.safetensors")
    vector = vectors(cls).eval()
    again = cls.load(vector.save(tmp_path / "v.safetensors"))
    torch.testing.assert_close(again.decode(normal(2, 2)), vector.decode(normal(2, 2)))
    with pytest.raises(TypeError, match="affine"):
        vectors(cls, transform=Exp()).save(tmp_path / "e.safetensors")


@pytest.mark.parametrize("cls", [GAN, WGAN])
def test_the_training_loop_plays_the_game(cls):
    torch.manual_seed(0)
    prior = cls.stationary((1, 16, 16), latent_channels=2, widths=(6, 4), critic_widths=(4, 6), critic_steps=2)
    before = {k: v.clone() for k, v in prior.state_dict().items()}
    x = torch.randn(40, 1, 16, 16, generator=rng()).cumsum(-1) * 0.3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        report = Training(steps=6, batch_size=8, warmup=1, learning_rate=1e-3).fit(
            prior, ArrayData(x), validation={"x": x[:16]}, progress=False
        )
    assert report.steps == 6
    assert {"critic_gap", "critic_gap_train", "diversity", "critic_gradient"} <= set(report.validation)
    assert all(math.isfinite(v) for v in report.validation.values())
    moved = {k for k, v in prior.state_dict().items() if not torch.equal(v, before[k])}
    assert set(before) - moved <= {"critic.leave.bias"}  # a constant of f cancels in the Wasserstein game


def test_networks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="latent_shape"):
        GAN(MLP(2, 3), None, (3,))
    with pytest.raises(ValueError, match="shape"):
        GAN(MLP(2, 4), None, (3,), latent_shape=(2,))
    with pytest.raises(ValueError, match="one number"):
        GAN(MLP(2, 3), MLP(3, 2), (3,), latent_shape=(2,))
    with pytest.raises(ValueError, match="without its critic"):
        GAN(MLP(2, 3), None, (3,), latent_shape=(2,)).losses("critic", {"x": torch.zeros(2, 3)}, rng())


@pytest.mark.parametrize("kind", ["bernoulli", "gaussian"])
def test_a_game_that_starts_from_a_vae_decodes_what_the_vae_does(kind):
    torch.manual_seed(3)
    vae = VAE.convolutional((1, 16, 16), latent=5, widths=(8, 8), likelihood=kind)
    game = WGAN.of(vae, critic_widths=(6, 8), critic_steps=2)
    z = torch.randn(4, 5)
    torch.testing.assert_close(game.decode(z), vae.decode(z))
    assert (game.latent_shape, game.critic_steps) == ((5,), 2)
    kept = vae.decode(z)
    for p in game.generator.parameters():
        p.data.add_(1.0)
    assert torch.equal(vae.decode(z), kept)
    with pytest.raises(TypeError, match="Only a VAE with a ConvDecoder"):
        WGAN.of(game)
