"""Networks between fields and latents: sizes, borders, settings, items one by one."""

import json

import pytest
import torch

from invgen.priors.networks import (
    MLP,
    ConvCritic,
    ConvDecoder,
    ConvEncoder,
    LinearEncoder,
    StationaryCritic,
    StationaryGenerator,
)

torch.set_num_threads(1)


@pytest.mark.parametrize("n", [5, 16, 33, 64, 100])
def test_latent_shapes_cover_the_image_and_not_more(n):
    generator = StationaryGenerator(1, latent_channels=3, widths=(4, 4, 4))
    c, h, w = generator.latent_shape((n, n + 3))
    assert c == 3
    made = generator.image_size((h, w))
    assert made[0] >= n
    assert made[1] >= n + 3
    assert generator.image_size((h - 1, w))[0] < n
    assert tuple(generator(torch.zeros(1, c, h, w)).shape[2:]) == made


def test_critics_treat_items_one_by_one():
    x = torch.randn(5, 1, 16, 16)
    for critic in (StationaryCritic(1, widths=(4, 6)), ConvCritic(1, (16, 16), widths=(4, 6))):
        torch.testing.assert_close(critic(x)[:2], critic(x[:2]), rtol=1e-5, atol=1e-6)
        assert critic(x).shape == (5, 1)
    assert StationaryCritic(1, widths=(4, 6))(torch.randn(2, 1, 32, 48)).shape == (2, 1)


def test_outputs_are_bounded_where_asked():
    z = torch.randn(2, 3, 8, 8)
    for output, low, high in (("tanh", -1, 1), ("sigmoid", 0, 1)):
        image = StationaryGenerator(1, latent_channels=3, widths=(4, 4), output=output)(50 * z)
        assert image.min() >= low
        assert image.max() <= high
        image = ConvDecoder(3, 1, (8, 8), widths=(4, 4), output=output)(50 * torch.randn(2, 3))
        assert image.min() >= low
        assert image.max() <= high
    with pytest.raises(ValueError, match="linear, tanh, sigmoid"):
        StationaryGenerator(output="softmax")
    with pytest.raises(ValueError, match="multiples of 8"):
        StationaryCritic(1, widths=(4, 4, 4))(torch.zeros(1, 1, 20, 16))


def test_encoder_and_decoder_of_fields_fit_each_other():
    encoder, decoder = ConvEncoder(2, (16, 32), 10), ConvDecoder(5, 2, (16, 32))
    x = torch.randn(3, 2, 16, 32)
    assert encoder(x).shape == (3, 10)
    assert decoder(encoder(x)[:, :5]).shape == x.shape


def test_sizes_that_cannot_be_halved_are_refused():
    for cls, arguments in ((ConvEncoder, (1, (40, 40), 4)), (ConvDecoder, (4, 1, (64, 40))), (ConvCritic, (1, (8, 8)))):
        with pytest.raises(ValueError, match="multiples of 16"):
            cls(*arguments)
    with pytest.raises(ValueError, match="at least 1"):
        ConvEncoder(1, (16, 16), 4, widths=())
    with pytest.raises(ValueError, match="at least 1"):
        MLP(0, 3)


def test_every_network_is_made_again_from_its_settings():
    made = [
        MLP(3, 2, width=5, depth=1),
        LinearEncoder(3, 2),
        ConvEncoder(2, (8, 8), 3, widths=(4, 6)),
        ConvDecoder(3, 2, (8, 8), widths=(4, 6), output="tanh"),
        ConvCritic(2, (8, 8), widths=(4, 6)),
        StationaryGenerator(2, latent_channels=3, widths=(4, 6), output="sigmoid"),
        StationaryCritic(2, widths=(4, 6)),
    ]
    for network in made:
        settings = {
            k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(json.dumps(network.settings)).items()
        }
        again = type(network)(**settings)
        again.load_state_dict(network.state_dict())
        assert again.settings == network.settings


def test_decoders_and_encoders_treat_items_one_by_one():
    encoder, decoder = ConvEncoder(1, (16, 16), 4, widths=(4, 8)), ConvDecoder(4, 1, (16, 16), widths=(4, 8))
    x, z = torch.randn(5, 1, 16, 16), torch.randn(5, 4)
    torch.testing.assert_close(encoder(x)[:2], encoder(x[:2]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decoder(z)[:2], decoder(z[:2]), rtol=1e-4, atol=1e-5)


def test_generators_start_without_a_checkerboard():
    for image in (
        StationaryGenerator(1, latent_channels=2, widths=(6, 6))(torch.randn(2, 2, 9, 9)),
        ConvDecoder(3, 1, (16, 16), widths=(4, 6))(torch.randn(2, 3)),
    ):
        blocks = torch.nn.functional.avg_pool2d(image, 2)
        torch.testing.assert_close(blocks.repeat_interleave(2, 2).repeat_interleave(2, 3), image, rtol=1e-4, atol=1e-6)
        assert blocks.std() > 1e-4


def test_a_number_of_a_spatial_latent_shapes_the_field_around_its_own_place():
    torch.manual_seed(0)
    decoder = ConvDecoder(15, 1, (80, 48), widths=(4, 4, 6, 8), spatial=True)
    again = ConvDecoder(**{k: tuple(v) if isinstance(v, list) else v for k, v in decoder.settings.items()})
    assert [p.shape for p in again.parameters()] == [p.shape for p in decoder.parameters()]
    for p in decoder.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    z = torch.zeros(2, 15)
    z[1, 0] = 0.1  # the corner of the 5 × 3 map; group norms spread a faint change everywhere
    with torch.no_grad():
        change = decoder(z).diff(dim=0)[0, 0].abs()
    assert float(change[:32, :32].mean()) > 2 * float(change[-32:].mean())
    with pytest.raises(ValueError, match="multiple of 15"):
        ConvDecoder(16, 1, (80, 48), spatial=True)
