"""Products of priors against one Gaussian with the block-diagonal covariance, in float64, means that are not zero."""

import math
import pickle

import pytest
import torch

from invgen.contracts import HasDenoiser, HasDensity, HasGaussian, HasLatent, HasMixture, HasProx
from invgen.covariance import Scalar
from invgen.grid import Grid
from invgen.noise import GaussianNoise
from invgen.operators import MatrixOperator
from invgen.priors import GaussianMixturePrior, GaussianPrior, ProductPrior, Pushforward
from invgen.priors._channel_blocks import ChannelBlocks
from invgen.problem import InverseProblem
from invgen.solvers import MMPS, ExactGaussian, GuidedDiffusion, RandomizeThenOptimize
from invgen.transforms import Affine

torch.set_num_threads(1)
F64 = torch.float64


def parts():
    """A dense and a stationary Gaussian on (1, 3, 2) and (2, 3, 2), each in its own units."""
    g = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=g, dtype=F64)
    first = GaussianPrior.dense(
        torch.randn(1, 3, 2, generator=g, dtype=F64),
        root @ root.mT / 6 + 0.1 * torch.eye(6),
        transform=Affine(3.0, 0.5),
    )
    second = GaussianPrior.stationary((2, 3, 2), variance=0.4, length=1.0, mean=-1.0, transform=Affine(-1.0, 2.0))
    return first, second


def whole():
    """The same law as one dense Gaussian in x, and in u."""
    first, second = parts()
    laws = [p.in_x() for p in (first, second)]
    in_x = GaussianPrior.dense(
        torch.cat([p.mean_u for p in laws]), torch.block_diag(*(p.covariance_u.dense() for p in laws))
    )
    in_u = GaussianPrior.dense(
        torch.cat([p.mean_u for p in (first, second)]),
        torch.block_diag(*(p.covariance_u.dense() for p in (first, second))),
    )
    return in_x, in_u


def test_closed_forms_equal_one_dense_gaussian():
    product = ProductPrior(parts())
    in_x, in_u = whole()
    assert product.shape == (3, 3, 2)
    for capability in (HasDensity, HasLatent, HasDenoiser, HasProx, HasGaussian):
        assert isinstance(product, capability)
    x = torch.randn(4, 3, 3, 2, dtype=F64)
    torch.testing.assert_close(product.log_prob(x), in_x.log_prob(x))
    torch.testing.assert_close(product.prox(x, 0.7), in_x.prox(x, 0.7))
    sigma = torch.tensor([0.1, 0.5, 1.0, 5.0], dtype=F64)
    torch.testing.assert_close(product.denoise(x, sigma), in_u.denoise(x, sigma))
    torch.testing.assert_close(product.mean_u, in_u.mean_u)
    torch.testing.assert_close(product.covariance_u.dense(), in_u.covariance_u.dense(), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(product.posterior_covariance_apply(x, 0.6), in_u.posterior_covariance_apply(x, 0.6))
    torch.testing.assert_close(product.transform.inverse(product.transform(x)), x)


def test_draws_have_the_law_and_parts_are_independent():
    product, (in_x, _) = ProductPrior(parts()), whole()
    n = 20000
    x = product.sample(n, seed=3, dtype=F64).flatten(1)
    want = in_x.covariance_u.dense()
    found = torch.cov(x.mT)
    error = ((want.diagonal()[:, None] * want.diagonal() + want**2) / n).sqrt()
    assert ((found - want).abs() / error).max() < 5
    assert ((x.mean(0) - in_x.mean_u.flatten()).abs() / (want.diagonal() / n).sqrt()).max() < 5
    # neither do parts share draws with each other under other seeds
    twins = ProductPrior([parts()[1], parts()[1]])
    a, b = twins.sample(3, seed=0), twins.sample(3, seed=1)
    for first, second in ((a[:, :2], a[:, 2:]), (a[:, 2:], b[:, :2]), (a[:, :2], b[:, 2:]), (a[:, :2], b[:, :2])):
        assert (first - second).abs().min() > 1e-6


def problem(prior, noise=0.3):
    g = torch.Generator().manual_seed(5)
    operator = MatrixOperator(torch.randn(7, 18, generator=g, dtype=F64), (3, 3, 2))
    return InverseProblem(torch.randn(7, generator=g, dtype=F64) * 3, operator, GaussianNoise(noise), prior)


@pytest.mark.parametrize("method", ["dense", "cg"])
def test_exact_posterior_equals_that_of_the_dense_law(method):
    solver = ExactGaussian(method=method, **({"rtol": 1e-13} if method == "cg" else {}))
    got, want = solver.mean(problem(ProductPrior(parts()))), solver.mean(problem(whole()[0]))
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
    if method == "dense":
        evidence = [solver.solve(problem(p), 1, dtype=F64).log_evidence for p in (ProductPrior(parts()), whole()[0])]
        torch.testing.assert_close(evidence[0], evidence[1])


def test_samplers_find_the_exact_moments():
    """RandomizeThenOptimize is exact; guided diffusion uses the joint denoiser, one sigma for both parts."""
    p = problem(ProductPrior(parts()))
    exact = ExactGaussian(method="dense").solve(p, 6000, seed=9, dtype=F64).samples[0, 0].flatten(1)
    mean, sd = ExactGaussian(method="dense").mean(p)[0].flatten(), exact.std(0)
    for solver, n, ratio in (
        (RandomizeThenOptimize(), 3000, 0.06),
        (GuidedDiffusion(MMPS(iterations=7, rtol=0), "heun", steps=40), 1500, 0.09),
    ):
        x = solver.solve(p, n, seed=1, dtype=F64).samples[0, 0].flatten(1)
        z = (x.mean(0) - mean) / sd
        assert float(z.abs().max()) < 4.5 / math.sqrt(n) + 0.03, type(solver).__name__
        # sd of a sd: 1/√(2n), of draws and of the exact reference
        assert float((x.std(0) / sd - 1).abs().max()) < ratio, type(solver).__name__


def test_only_shared_capabilities_exist():
    first, _ = parts()
    mixture = GaussianMixturePrior(
        torch.tensor([0.5, 0.5], dtype=F64), torch.randn(2, 1, 3, 2, dtype=F64), torch.tensor([0.2, 0.4], dtype=F64)
    )
    with_mixture = ProductPrior([first, mixture])
    assert isinstance(with_mixture, HasDensity)
    assert isinstance(with_mixture, HasDenoiser)
    assert not isinstance(with_mixture, (HasGaussian, HasMixture, HasProx))
    pushed = ProductPrior([first, Pushforward(torch.exp, parts()[0])])
    assert isinstance(pushed, HasLatent)
    assert not isinstance(pushed, (HasDensity, HasDenoiser))
    with pytest.raises(TypeError, match="HasGaussian"):
        ExactGaussian().solve(problem(ProductPrior([mixture, mixture, mixture])), 1)


def test_padded_parts_have_a_flat_latent():
    padded = GaussianPrior.stationary((1, 4, 3), variance=0.5, length=1.5, padding=3, kind="exponential")
    product = ProductPrior([padded, GaussianPrior(0.0, 1.0, shape=(1, 4, 3))])
    n = math.prod(padded.latent_shape) + 12
    assert product.latent_shape == (n,)
    assert product.covariance_u.noise_shape == (n,)
    z = torch.randn(2, n, dtype=F64)
    torch.testing.assert_close(product.decode(z), product.transform(product.mean_u + product.covariance_u.sqrt(z)))


def test_scales_are_stated_or_measured():
    first, second = parts()
    product = ProductPrior([first, second])
    rms = math.sqrt(float(product.covariance_u.diagonal().mean()))
    assert abs(product.sigma_data / rms - 1) < 0.15  # 256 draws
    largest = float(torch.linalg.eigvalsh(product.covariance_u.dense())[-1])
    assert 0.8 < product.start_sigma / (7 * math.sqrt(largest)) < 1.4


def test_grids_join_and_pickle_keeps_everything():
    grid = Grid((3, 2), (4.0, 4.0), channels=("baseline",))
    a = GaussianPrior(0.0, 1.0, grid=grid)
    b = GaussianPrior(1.0, 0.1, grid=Grid((3, 2), (4.0, 4.0), channels=("difference",)))
    product = ProductPrior([a, b])
    assert product.grid.channels == ("baseline", "difference")
    again = pickle.loads(pickle.dumps(product))
    x = torch.randn(2, 2, 3, 2, dtype=F64)
    torch.testing.assert_close(again.log_prob(x), product.log_prob(x))
    assert again.grid == product.grid
    assert ProductPrior([a, GaussianPrior(0.0, 1.0, shape=(1, 3, 2))]).grid is None


def test_channel_blocks_scale_and_add():
    blocks = ProductPrior(parts()).covariance_u
    v = torch.randn(2, 3, 3, 2, dtype=F64)
    factors = torch.tensor([0.5, 3.0], dtype=F64)
    torch.testing.assert_close(blocks.scaled(factors).apply(v), blocks.apply(v) * factors.reshape(2, 1, 1, 1))
    total = blocks.plus(Scalar(0.3, blocks.shape))
    assert isinstance(total, ChannelBlocks)
    torch.testing.assert_close(total.dense(), blocks.dense() + 0.3 * torch.eye(18, dtype=F64))
    torch.testing.assert_close(blocks.plus(blocks).solve(blocks.apply(v)), 0.5 * v)
    torch.testing.assert_close(blocks.diagonal().flatten(), blocks.dense().diagonal())
    assert tuple(blocks.scaled(factors).diagonal().shape) == (2, 3, 3, 2)
    torch.testing.assert_close(blocks.logdet(), torch.linalg.slogdet(blocks.dense())[1])


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: ProductPrior([]), ValueError, "at least one"),
        (lambda: ProductPrior([parts()[0], 3]), TypeError, "no prior"),
        (lambda: ProductPrior([parts()[0], GaussianPrior(0.0, 1.0, shape=(1, 2, 2))]), ValueError, "spatial shape"),
        (
            lambda: ProductPrior([GaussianPrior(0.0, 1.0, grid=Grid((3,), (s,))) for s in (1.0, 2.0)]),
            ValueError,
            "resample",
        ),
        (lambda: ProductPrior(parts(), grid=Grid((3, 2), (1.0, 1.0))), ValueError, "its grid"),
    ],
)
def test_bad_products_are_named(call, error, says):
    with pytest.raises(error, match=says):
        call()
