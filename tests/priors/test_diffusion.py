"""The diffusion prior: preconditioning, larger grids, disk."""

import itertools
import math

import pytest
import torch

from invgen.covariance import Dense
from invgen.grid import Grid
from invgen.priors import DepthChannel, DiffusionPrior, GaussianPrior, sigma_schedule
from invgen.priors.networks import MLPDenoiser, UNet
from invgen.transforms import Affine, Exp

torch.set_num_threads(1)
F64 = torch.float64


def randomise(network, seed=0):
    """Weights of a useful size everywhere, the layers that start at zero included."""
    g = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        fan = p[0].numel() if p.ndim > 1 else 1
        p.data = (
            torch.randn(p.shape, generator=g, dtype=p.dtype) / math.sqrt(fan)
            if p.ndim > 1
            else p.data + 0.3 * torch.randn(p.shape, generator=g, dtype=p.dtype)
        )
    return network


def tiny(extra=0, widths=(4, 6), blocks=1, patch=2):
    return (
        randomise(UNet(1, extra=extra, widths=widths, blocks=blocks, patch=patch, embedding=8))
        .double()
        .requires_grad_(False)
    )


# --- schedule and preconditioning ----------------------------------------------------------------------------------


def test_schedule_is_edm_equation_5():
    levels = sigma_schedule(0.002, 80.0, 18)
    assert len(levels) == 19
    assert levels[0] == pytest.approx(80)
    assert levels[-2] == pytest.approx(0.002)
    assert levels[-1] == 0.0
    middle = (80 ** (1 / 7) + 5 / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert levels[5] == pytest.approx(middle)
    assert all(a > b for a, b in itertools.pairwise(levels))
    assert sigma_schedule(0.1, 1.0, 1) == pytest.approx([1.0, 0.0])
    for bad in ((0.0, 1.0, 5), (1.0, 0.5, 5), (0.1, 1.0, 0)):
        with pytest.raises(ValueError, match="schedule"):
            sigma_schedule(*bad)


class Exact(torch.nn.Module):
    """The network that makes EDM's D the exact denoiser of a Gaussian: F = (D − c_skip u)/c_out."""

    def __init__(self, law, s):
        super().__init__()
        self.law, self.s = law, s
        self.anchor = torch.nn.Parameter(torch.zeros(1, dtype=F64))

    def forward(self, x, noise):
        sigma = (4 * noise).exp()
        total = (sigma.square() + self.s**2).sqrt()[:, None]
        u = x * total
        return (self.law.denoise(u, sigma) - (self.s / total) ** 2 * u) * total / (sigma[:, None] * self.s)


def exact_prior(transform=None):
    C = torch.tensor([[1.0, 0.5, 0.0], [0.5, 0.6, 0.1], [0.0, 0.1, 0.2]], dtype=F64)
    law = GaussianPrior(torch.tensor([1.0, -2.0, 0.3], dtype=F64), Dense(C), transform=transform)
    return (
        law,
        C,
        DiffusionPrior(
            Exact(law, 0.8), (3,), sigma_data=0.8, transform=transform, mean_variance_of_field=600.0, latent_steps=200
        ),
    )


def test_the_optimal_network_is_the_closed_form():
    law, C, prior = exact_prior(Affine(2.0, 3.0))
    x = law.sample(20000, seed=0, dtype=F64)
    u = law.transform.inverse(x)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    sigma = torch.tensor([0.05, 0.5, 5.0], dtype=F64)
    torch.testing.assert_close(prior.denoise(u[:3], sigma), law.denoise(u[:3], sigma))
    torch.testing.assert_close(prior.denoise(u[:3], 0.5), law.denoise(u[:3], 0.5))
    for s in sigma.tolist():
        losses = prior.loss(x, torch.full((len(x),), s, dtype=F64), noise)
        posterior = s**2 * C @ torch.linalg.inv(C + s**2 * torch.eye(3, dtype=F64))
        expected = (s**2 + 0.64) / (s * 0.8) ** 2 * float(posterior.trace()) / 3
        assert abs(float(losses.mean()) - expected) < 5 * float(losses.std()) / math.sqrt(len(x)), s


def test_an_untrained_network_has_loss_one_on_data_of_sd_s():
    prior = DiffusionPrior(MLPDenoiser(2, width=8, depth=1).double(), (2,), sigma_data=2.0)
    x = 2 * torch.randn(20000, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    for s in (0.02, 1.0, 50.0):
        losses = prior.loss(x, torch.full((len(x),), s, dtype=F64), noise).detach()
        assert abs(float(losses.mean()) - 1) < 5 * float(losses.std()) / math.sqrt(len(x))


def test_samplers_of_the_exact_denoiser_have_its_law():
    law, _, prior = exact_prior(Affine(2.0, 3.0))
    n = 4000
    z = torch.randn(n, 3, generator=torch.Generator().manual_seed(4), dtype=F64)
    for x in (prior.sample(n, seed=0, steps=250, chunk=n, dtype=F64), prior.decode(z)):
        off = x - law.mean()
        assert float((off.mean(0).abs() / (off.std(0) / math.sqrt(n))).max()) < 5
        pairs = off[:, :, None] * off[:, None]
        allowance = 5 * pairs.std(0) / math.sqrt(n)
        assert bool(((pairs.mean(0) - law.covariance().dense()).abs() < allowance).all())


def test_samplers_start_around_the_mean_of_the_prior():
    # a mean 10 times the first noise level: a start around zero would leave part of it behind
    C = torch.tensor([[1.0, 0.5, 0.0], [0.5, 0.6, 0.1], [0.0, 0.1, 0.2]], dtype=F64)
    law = GaussianPrior(torch.tensor([100.0, -200.0, 30.0], dtype=F64), Dense(C))
    prior = DiffusionPrior(Exact(law, 0.8), (3,), sigma_data=0.8, mean_variance_of_field=2.7, latent_steps=60)
    assert 19 < prior.start_sigma < 21
    n = 1000
    z = torch.randn(n, 3, generator=torch.Generator().manual_seed(4), dtype=F64)
    z = torch.cat([z, -z])  # f is affine for a Gaussian: the mean of the pairs is f(0), without Monte-Carlo error
    mean = prior.decode(z).mean(0)
    assert float(((mean - law.mean()) / law.covariance().diagonal().sqrt()).abs().max()) < 0.02
    x = prior.sample(n, seed=0, steps=100, chunk=n, dtype=F64)
    assert float(((x.mean(0) - law.mean()).abs() / (x.std(0) / math.sqrt(n))).max()) < 5


# --- larger grids --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("widths", "blocks", "patch"), [((4, 6), 1, 2), ((4,), 2, 1), ((3, 4, 5), 1, 1)])
def test_receptive_radius_bounds_what_reaches_a_pixel(widths, blocks, patch):
    network = tiny(widths=widths, blocks=blocks, patch=patch)
    radius = network.receptive_radius
    size = 2 * radius + 2 * network.multiple
    size += -size % network.multiple
    x = torch.randn(1, 1, size, size, generator=torch.Generator().manual_seed(0), dtype=F64, requires_grad=True)
    level = torch.zeros(1, dtype=F64)
    for offset in range(network.multiple):
        centre = size // 2 + offset
        reach = torch.autograd.grad(network(x, level)[0, 0, centre, centre], x)[0][0, 0].abs() > 0
        rows, columns = (
            (torch.nonzero(reach.any(1)).flatten() - centre).abs(),
            (torch.nonzero(reach.any(0)).flatten() - centre).abs(),
        )
        assert int(rows.max()) <= radius
        assert int(columns.max()) <= radius
        assert int(rows.max()) >= radius // 3  # a bound that says something


def test_interior_of_a_large_field_is_the_crops():
    network = tiny(extra=2)
    radius, multiple = network.receptive_radius, network.multiple
    small = 2 * radius + 4 * multiple
    grid = Grid((small, small), (10.0, 10.0), axes=("z", "x"), units=("m", "m"))
    prior = DiffusionPrior(network, grid.field_shape, grid=grid, transform=Affine(8.0, 0.3), depth=DepthChannel(500.0))
    large = prior.at((small + 6 * multiple, small + 5 * multiple))
    i, j = 3 * multiple, 2 * multiple
    crop = prior.at((small, small), origin=(10.0 * i, 10.0 * j))
    u = torch.randn(1, *large.shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    inside = slice(radius, small - radius)
    for sigma in (0.1, 2.0):
        whole = large.denoise(u, sigma)[..., i : i + small, j : j + small][..., inside, inside]
        part = crop.denoise(u[..., i : i + small, j : j + small], sigma)[..., inside, inside]
        assert whole.numel() > 0
        torch.testing.assert_close(part, whole, rtol=1e-9, atol=1e-9)
        # the depth channel matters: the crop as if it began at the surface is another field
        assert (
            prior.denoise(u[..., i : i + small, j : j + small], sigma)[..., inside, inside] - whole
        ).abs().max() > 1e-5


def test_at_keeps_settings_and_raises_the_starting_level():
    prior = DiffusionPrior.examples()[0]
    prior.noise_levels = (-1.0, 1.0)
    large = prior.at((64, 32))
    assert large.noise_levels == (-1.0, 1.0)
    assert large.network is prior.network
    assert large.grid.shape == (64, 32)
    assert large.start_sigma > prior.start_sigma
    assert large.start_sigma == pytest.approx(7 * math.sqrt(64 * 32 * 0.25))
    assert large.context[0, 1, 0] == pytest.approx(110.0 / 2000.0)
    time = Grid((8, 8), (0.004, 12.5), axes=("t", "x"), units=("s", "m"))
    assert float(prior.at((8, 8), grid=time).context.abs().max()) == 0.0  # depth unknown
    with pytest.raises(ValueError, match="rows"):
        prior.at((8, 8), grid=time, depth=torch.zeros(5))
    with pytest.raises(ValueError, match="grid"):
        prior.at((9, 8), grid=time)
    half = prior.with_precision(torch.bfloat16)
    u = torch.randn(1, *prior.shape, generator=torch.Generator().manual_seed(0))
    difference = (half.denoise(u, 1.0) - prior.denoise(u, 1.0)).abs().max()
    assert 0 < float(difference) < 0.1
    assert half.denoise(u, 1.0).dtype == torch.float32


# --- disk ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [False, True])
def test_save_and_load(tmp_path, half):
    prior = DiffusionPrior.examples()[0]
    path = prior.save(tmp_path / "prior.safetensors", half=half, card={"data": "none"})
    other = DiffusionPrior.load(path)
    assert other.grid == prior.grid
    assert other.shape == prior.shape
    assert other.seen == {"data": "none"}
    assert other.depth == prior.depth
    u = torch.randn(2, *prior.shape, generator=torch.Generator().manual_seed(0))
    a, b = prior.denoise(u, 0.7), other.denoise(u, 0.7)
    if half:
        assert 0 < float((a - b).abs().max()) < 1e-2
    else:
        assert torch.equal(a, b)
    assert torch.equal(prior.transform(u), other.transform(u))


def test_save_and_load_of_a_vector_prior(tmp_path):
    prior = DiffusionPrior(randomise(MLPDenoiser(3, width=8, depth=1)), (3,), sigma_data=0.5, latent_steps=7)
    other = DiffusionPrior.load(prior.save(tmp_path / "v.safetensors"))
    z = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(prior.decode(z), other.decode(z))
    assert other.latent_steps == 7


def test_files_that_are_not_checkpoints(tmp_path):
    from safetensors.torch import save_file

    prior = DiffusionPrior.examples()[0]
    good = prior.save(tmp_path / "good.safetensors")
    payload = good.read_bytes()
    for name, size in (("half", len(payload) // 2), ("header", 20), ("empty", 0)):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(payload[:size])
        with pytest.raises(ValueError, match="not a complete safetensors"):
            DiffusionPrior.load(path)
    save_file({"w": torch.zeros(3)}, str(tmp_path / "foreign.safetensors"))
    with pytest.raises(ValueError, match="another program"):
        DiffusionPrior.load(tmp_path / "foreign.safetensors")
    torch.save({"w": torch.zeros(3), "network": prior}, tmp_path / "pickle.pt")
    with pytest.raises(ValueError, match="pickled"):
        DiffusionPrior.load(tmp_path / "pickle.pt")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        DiffusionPrior.load(tmp_path / "missing.safetensors")


def test_edited_checkpoints_are_refused(tmp_path):
    from invgen.checkpoints import read_checkpoint, write_checkpoint

    tensors, meta = read_checkpoint(DiffusionPrior.examples()[0].save(tmp_path / "p.safetensors"), "DiffusionPrior")
    meta.pop("kind")
    edits = (
        (tensors, {**meta, "network": "os.system"}, "does not have"),
        (tensors, {**meta, "settings": {**meta["settings"], "widths": [4, 4]}}, "do not fit"),
        (tensors, {**meta, "settings": {"colour": 3}}, "damaged"),
        (tensors, {k: v for k, v in meta.items() if k != "sigma_data"}, "damaged"),
    )
    for i, (t, m, text) in enumerate(edits):
        path = write_checkpoint(tmp_path / f"{i}.safetensors", "DiffusionPrior", t, m)
        with pytest.raises(ValueError, match=text):
            DiffusionPrior.load(path)


def test_what_cannot_be_saved_says_so(tmp_path):
    prior = DiffusionPrior(MLPDenoiser(2), (2,), transform=Exp())
    with pytest.raises(TypeError, match="affine"):
        prior.save(tmp_path / "p.safetensors")


def test_bad_construction():
    with pytest.raises(ValueError, match="sigma_min"):
        DiffusionPrior(MLPDenoiser(2), (2,), sigma_min=1.0, sigma_max=0.5)
    with pytest.raises(ValueError, match="grid"):
        DiffusionPrior(tiny(), (1, 8, 8), grid=Grid((4, 4), (1.0, 1.0)))
    with pytest.raises(ValueError, match="depth"):
        DiffusionPrior(tiny(extra=2), (1, 8, 8), depth=DepthChannel())
