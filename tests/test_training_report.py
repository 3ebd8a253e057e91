"""The page about a training run: whole, without anything from outside, and no danger to the weights."""

import base64
import re

import pytest
import torch

from invgen.grid import Grid
from invgen.priors import ArrayData, DiffusionPrior, Training
from invgen.priors.networks import MLPDenoiser, UNet
from invgen.transforms import Affine

torch.set_num_threads(1)
X = torch.randn(32, 1, 8, 12, generator=torch.Generator().manual_seed(0))


def field_prior():
    torch.manual_seed(0)
    grid = Grid((8, 12), (5.0, 5.0), axes=("z", "x"), units=("m", "m"), channels=("velocity",), channel_units=("km/s",))
    network = UNet(1, widths=(8, 8), blocks=1, embedding=16)
    return DiffusionPrior(network, (1, 8, 12), grid=grid, transform=Affine(0.0, 1.0))


def pngs(page):
    return [base64.b64decode(p) for p in re.findall(r"data:image/png;base64,([^\"]+)", page)]


def test_page_of_fields(tmp_path):
    path = tmp_path / "deep" / "report.html"
    prior = field_prior()
    Training(steps=30, batch_size=4, log_every=5, validate_every=10, report=str(path)).fit(
        prior, ArrayData(X), validation={"x": X[:4]}, progress=False
    )
    page = path.read_text()
    assert len(pngs(page)) == 2
    assert all(p.startswith(b"\x89PNG") for p in pngs(page))
    for words in ("Training of DiffusionPrior", "30 steps", "1 × 8 × 12", "rmse_at_1", "learning_rate", "batch_size"):
        assert words in page
    assert "lowest validation loss" in page
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)


@pytest.mark.parametrize("dim", [2, 5])
def test_page_of_vectors(tmp_path, dim):
    torch.manual_seed(0)
    prior = DiffusionPrior(MLPDenoiser(dim, width=8, depth=1), (dim,))
    data = ArrayData(torch.randn(20, dim, generator=torch.Generator().manual_seed(1)))
    Training(steps=4, batch_size=4, log_every=2, report=str(tmp_path / "r.html")).fit(prior, data, progress=False)
    assert len(pngs((tmp_path / "r.html").read_text())) == 2


def test_a_page_that_fails_does_not_cost_the_weights(tmp_path):
    class Mute(DiffusionPrior):
        def sample(self, *args, **options):
            raise RuntimeError("no draws today")

    prior = Mute(MLPDenoiser(2, width=8, depth=1), (2,))
    with pytest.warns(UserWarning, match="no draws today"):
        report = Training(steps=2, batch_size=4, report=str(tmp_path / "r.html")).fit(
            prior, ArrayData(torch.randn(9, 2)), progress=False
        )
    assert report.steps == 2
    with pytest.raises(ValueError, match=r"end it in \.html"):
        Training(report="r.pdf")
