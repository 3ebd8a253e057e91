"""Random fields: every linear method has P Pᵀ = Σ, and the density, denoiser and code of exactly that law."""

import math
import pickle

import numpy as np
import pytest
import torch

from invgen.contracts import HasDensity, HasGaussian, HasLatent
from invgen.priors._spde import _lattice_variance
from invgen.priors.covariance_models import (
    Cubic,
    Exponential,
    Gaussian,
    Matern,
    NestedCovariance,
    Nugget,
    RationalQuadratic,
    Spherical,
    Stable,
)
from invgen.priors.random_field import RandomField
from invgen.stationary import Stationary

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:The practical range")
F64 = torch.float64

MODELS = [
    pytest.param(Matern(nu=1.0, length=2.0, variance=2.0), (1, 9, 8), (1.0, 1.0), id="matern 1"),
    pytest.param(Matern(nu=0.7, length=(1.0, 1.5, 0.8)), (1, 4, 5, 6), (1.0, 1.0, 0.5), id="matern 0.7, 3-D"),
    pytest.param(
        Exponential(length=(1.0, 2.0), angle=30.0, variance=3.0), (1, 9, 8), (1.0, 0.5), id="exponential, turned"
    ),
    pytest.param(Gaussian(length=1.0) + Nugget(variance=0.05), (1, 10, 9), (1.0, 1.0), id="gaussian and nugget"),
    pytest.param(Spherical(length=5.0) + Matern(nu=2.5, length=1.0), (1, 10, 9), (1.0, 1.0), id="nested"),
    pytest.param(Cubic(length=4.0), (2, 20), (0.5,), id="cubic, 1-D, two channels"),
    pytest.param(Stable(alpha=1.4, length=1.5), (1, 9, 8), (1.0, 1.0), id="stable"),
    pytest.param(
        Matern(nu=1.5, length=(0.7, 1.0, 1.2), angle=(20.0, 30.0, 40.0)),
        (1, 5, 4, 6),
        (1.0, 1.0, 1.0),
        id="3-D, turned",
    ),
    pytest.param(RationalQuadratic(alpha=2.0, length=1.0), (1, 9, 8), (1.0, 1.0), id="rational quadratic"),
]


def nodes(shape, spacing):
    axes = np.meshgrid(*[np.arange(n) * s for n, s in zip(shape[1:], spacing, strict=True)], indexing="ij")
    return np.stack(axes, -1).reshape(-1, len(spacing))


def matrix(model, shape, spacing, wrap=None):
    """C between all nodes, from the covariance function alone; lags wrapped to their nearest image for a torus."""
    p = nodes(shape, spacing)
    lags = p[:, None] - p[None]
    if wrap is not None:
        period = np.asarray(wrap) * np.asarray(spacing)
        lags = lags - period * np.round(lags / period)
    return np.kron(np.eye(shape[0]), model(lags))


def linear_part(field):
    """P, `(n, n_noise)`: row i is the derivative of entry i of item i."""
    n = math.prod(field.shape)
    z = torch.zeros(n, *field.latent_shape, dtype=F64, requires_grad=True)
    field.decode(z).reshape(n, n).diagonal().sum().backward()
    return z.grad.reshape(n, -1).numpy()


def relative(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize("method", ["cholesky", "circulant", "kl", "sequential"])
@pytest.mark.parametrize(("model", "shape", "spacing"), MODELS)
def test_ppt_is_the_covariance(model, shape, spacing, method):
    options = {"kl": {"energy": 1.0}, "sequential": {"neighbours": 1000}}.get(method, {})
    field = RandomField(model, shape, method=method, spacing=spacing, mean=3.0, **options)
    P = linear_part(field)
    assert relative(P @ P.T, matrix(model, shape, spacing)) <= 1e-6


@pytest.mark.parametrize("method", ["periodic", "dct"])
@pytest.mark.parametrize(
    ("model", "shape"), [(Exponential(length=(0.7, 1.0)), (1, 12, 13)), (Cubic(length=4.0), (2, 20))]
)
def test_ppt_with_boundaries(model, shape, method):
    """On a torus the nearest image; between reflecting boundaries the node and its mirror image, an axis."""
    spacing = (1.0,) * (len(shape) - 1)
    field = RandomField(model, shape, method=method)
    if method == "periodic":
        expected = matrix(model, shape, spacing, wrap=shape[1:])
    else:
        p, period = nodes(shape, spacing), 2.0 * np.asarray(shape[1:])
        one = 0.0
        for mirrored in np.ndindex(*(2,) * len(spacing)):
            image = np.where(mirrored, -1 - p, p)
            lags = p[:, None] - image[None]
            one = one + model(lags - period * np.round(lags / period))
        expected = np.kron(np.eye(shape[0]), one)
    P = linear_part(field)
    assert relative(P @ P.T, expected) <= 1e-6
    np.testing.assert_allclose(field.covariance_u.diagonal().numpy().ravel(), np.diag(expected), rtol=1e-6)


SPDE = [
    pytest.param(Matern(nu=1.0, length=2.0, variance=2.0), (1, 9, 8), {}, id="constant"),
    pytest.param(Matern(nu=1.0, length=(2.0, 4.0), angle=35.0), (1, 9, 8), {}, id="turned"),
    pytest.param(Exponential(length=3.0), (1, 30), {}, id="1-D, half a power"),
    pytest.param(Matern(nu=0.7, length=1.5), (1, 5, 6, 4), {}, id="3-D, any power"),
    pytest.param(Matern(nu=1.0), (1, 9, 8), {"varying": True, "margin": 2}, id="varying, cut"),
    pytest.param(Matern(nu=2.0), (1, 9, 8), {"varying": True}, id="varying"),
]


@pytest.mark.parametrize(("model", "shape", "options"), SPDE)
def test_spde_is_a_power_of_its_stencil(model, shape, options):
    """Σ = R M^(−α/2) D² M^(−α/2) Rᵀ by the eigenvectors of the assembled matrix; M is symmetric and at least κ²."""
    options = dict(options)
    if options.pop("varying", False):
        g = torch.Generator().manual_seed(3)
        options["length"] = 1 + 2 * torch.rand(2, *shape[1:], generator=g, dtype=F64)
        options["angle"] = 180 * torch.rand(shape[1:], generator=g, dtype=F64)
    field = RandomField(model, shape, method="spde", tolerance=1e-9, mean=-1.0, **options)
    law = field.covariance_u
    M = law.stencil.matrix().toarray()
    np.testing.assert_allclose(M, M.T, atol=1e-12)
    w, V = np.linalg.eigh(M)
    low, high = law.stencil.bounds
    assert low - 1e-9 <= w[0]
    assert w[-1] <= high + 1e-9
    root = (V * w ** (-law.alpha / 2)) @ V.T
    D = np.broadcast_to(np.asarray(law.scale), law.stencil.shape).ravel()
    window = tuple(slice(m, m + n) for m, n in zip(law.margin, shape[1:], strict=True))
    kept = np.arange(len(M)).reshape(law.stencil.shape)[window].ravel()
    expected = ((root * D**2) @ root)[np.ix_(kept, kept)]
    P = linear_part(field)
    assert relative(P @ P.T, expected) <= 1e-6
    assert relative(law.dense().numpy(), expected) <= 1e-6


@pytest.mark.parametrize(("shape", "length"), [((1.0, 1.0), 1500.0), ((1.0, 1.0, 1.0), 80.0), ((1.0,), 1e4)])
def test_the_lattice_of_a_long_field_has_the_variance_of_the_continuum(shape, length):
    """σ² = Γ(ν) κ^(−2ν) / (Γ(α) (4π)^(d/2) L^d) of the continuous field (Lindgren et al. 2011); the lattice adds O(1/L²)."""
    d, nu = len(shape), 1.0
    alpha, kappa2 = nu + d / 2, 2 * nu
    whole = math.gamma(nu) / (math.gamma(alpha) * (4 * math.pi) ** (d / 2)) * kappa2**-nu / length**d
    found = _lattice_variance(kappa2, np.eye(d) * length**2, shape, alpha, 1.0)
    assert found == pytest.approx(whole, rel=5 / length**2 + 1e-7 if length < 100 else 1e-5)


def test_spde_is_the_matern_covariance_away_from_the_boundaries():
    """The lattice converges to the continuous field: 4 cells a length, lags to two lengths; the variance is exact."""
    model = Matern(nu=1.0, length=(4.0, 6.0), variance=3.0, angle=25.0)
    field = RandomField(model, (1, 17, 17), method="spde", margin=30, tolerance=1e-7)
    e = torch.zeros(1, 1, 17, 17, dtype=F64)
    e[0, 0, 8, 8] = 1.0
    row = field.covariance_u.apply(e)[0, 0].numpy()
    lags = np.stack(np.meshgrid(np.arange(-8, 9), np.arange(-8, 9), indexing="ij"), -1).astype(float)
    assert abs(row[8, 8] - 3.0) < 1e-3
    assert np.abs(row - model(lags)).max() < 0.03 * 3.0


def test_chebyshev_reaches_its_tolerance():
    from invgen.priors._chebyshev import coefficients

    for tolerance in (1e-3, 1e-8):
        c = coefficients(lambda x: 1 / x, 0.005, 8.0, tolerance=tolerance)
        x = np.linspace(0.005, 8.0, 20001)
        error = np.abs(np.polynomial.chebyshev.chebval((2 * x - 8.005) / 7.995, c) - 1 / x).max() * 0.005
        assert 0.1 * tolerance < error <= 1.01 * tolerance
    with pytest.raises(ValueError, match="degree"):
        coefficients(lambda x: 1 / x, 1e-12, 1.0, tolerance=1e-8, max_degree=512)


LAWS = [
    ("cholesky", {}),
    ("circulant", {}),
    ("periodic", {}),
    ("dct", {}),
    ("kl", {"energy": 1.0}),
    ("spde", {"tolerance": 1e-12}),
    ("sequential", {"neighbours": 6}),
]


@pytest.mark.parametrize(("method", "options"), LAWS)
def test_density_denoiser_and_code_are_those_of_the_law(method, options):
    model = Matern(nu=1.0, length=(0.9, 0.7), variance=2.0)
    field = RandomField(model, (1, 6, 5), method=method, mean=1.5, **options)
    P = torch.from_numpy(linear_part(field))
    sigma = P @ P.mT
    g = torch.Generator().manual_seed(0)
    x = 1.5 + torch.randn(3, 1, 6, 5, generator=g, dtype=F64)
    law = torch.distributions.MultivariateNormal(torch.full((30,), 1.5, dtype=F64), sigma)
    torch.testing.assert_close(field.log_prob(x), law.log_prob(x.flatten(1)), rtol=1e-8, atol=1e-8)
    level = torch.tensor([0.1, 1.0, 3.0], dtype=F64)
    for i in range(3):
        v = x[i].flatten() - 1.5
        clean = 1.5 + sigma @ torch.linalg.solve(sigma + level[i] ** 2 * torch.eye(30, dtype=F64), v)
        torch.testing.assert_close(field.denoise(x, level)[i].flatten(), clean, rtol=1e-8, atol=1e-8)
    if field.encode is not None:
        torch.testing.assert_close(field.decode(field.encode(x)), x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("method", "options"), LAWS)
def test_draws_and_denoisers_have_derivatives(method, options):
    field = RandomField(Matern(nu=1.0, length=0.8), (1, 4, 3), method=method, **options)
    z = torch.randn(2, *field.latent_shape, dtype=F64, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    assert torch.autograd.gradcheck(field.decode, (z,))
    u = torch.randn(2, 1, 4, 3, dtype=F64, generator=torch.Generator().manual_seed(2)).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda v: field.denoise(v, 0.7), (u,))


def test_capabilities_are_honest():
    model = Matern(nu=1.0, length=2.0)
    large = RandomField(model, (1, 70, 70))
    assert large.method == "circulant"
    for field, density, code in (
        (RandomField(model, (1, 12, 12)), True, True),
        (RandomField(model, (1, 40, 40)), True, False),
        (large, False, False),
        (RandomField(model, (1, 12, 12), method="kl", rank=20), False, True),
        (RandomField(model, (1, 12, 12), method="spde", margin=3), False, False),
    ):
        assert isinstance(field, HasDensity) == density, field
        assert (field.encode is not None) == code, field
        assert isinstance(field, HasGaussian)
        assert isinstance(field, HasLatent)
    waves = RandomField(model, (1, 12, 12), method="spectral")
    assert not isinstance(waves, (HasDensity, HasLatent, HasGaussian))
    assert not hasattr(waves, "log_prob")
    copy = pickle.loads(pickle.dumps(large))
    torch.testing.assert_close(copy.sample(2, seed=3), large.sample(2, seed=3))


def test_karhunen_loeve_keeps_the_best_subspace():
    model = Gaussian(length=3.0)
    field = RandomField(model, (1, 12, 12), method="kl", energy=0.99)
    values = np.linalg.eigvalsh(matrix(model, (1, 12, 12), (1.0, 1.0)))[::-1]
    r = field.latent_shape[0]
    assert values[: r - 1].sum() < 0.99 * values.sum() <= values[:r].sum() * (1 + 1e-12)
    z = torch.randn(2, r, dtype=F64)
    torch.testing.assert_close(field.encode(field.decode(z)), z)
    with pytest.raises(TypeError, match="terms"):
        field.covariance_u.logdet()
    big = RandomField(model, (1, 72, 72), method="kl", rank=12)
    exact = RandomField(model, (1, 72, 72), method="circulant").covariance_u
    v = big.covariance_u.vectors.mT.reshape(-1, 1, 72, 72)[:6]
    torch.testing.assert_close(exact.apply(v), big.covariance_u.values[:6].reshape(-1, 1, 1, 1) * v, rtol=0, atol=2.0)


# --- methods that are Gaussian in the limit -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["spectral", "turning_bands"])
@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (Matern(nu=1.0, length=2.0, variance=2.0), (1, 7, 6)),
        (Exponential(length=(1.0, 3.0), angle=30.0) + Nugget(variance=0.3), (1, 7, 6)),
        (Cubic(length=4.0), (1, 4, 3, 5)),
        (Spherical(length=3.0) + Gaussian(length=1.0, variance=0.5), (1, 6, 5)),
    ],
)
def test_waves_and_bands_have_the_covariance_in_the_mean(method, model, shape):
    """Second moments over 1000 draws against C: family of at most 946 pairs, |z| < 5 (false alarm 5e-4)."""
    options = {"modes": 60} if method == "spectral" else {"bands": 20, "step": 0.2}
    field = RandomField(model, shape, method=method, mean=2.0, **options)
    x = field.sample(1000, seed=1, dtype=F64).flatten(1) - 2.0
    products = x[:, :, None] * x[:, None]
    expected = torch.from_numpy(matrix(model, shape, (1.0,) * (len(shape) - 1)))
    z = (products.mean(0) - expected) / (products.std(0) / math.sqrt(len(x)))
    assert float(z.abs().max()) < 5


def test_waves_are_the_same_at_nodes_and_points():
    model = Spherical(length=3.0) + Matern(nu=1.0, length=2.0)
    for shape, spacing in (((1, 20), (0.5,)), ((2, 9, 8), (1.0, 0.5)), ((1, 4, 5, 6), (1.0, 1.0, 1.0))):
        field = RandomField(model, shape, method="spectral", spacing=spacing)
        there = field.at(nodes(shape, spacing), 2, seed=5).reshape(2, *shape)
        torch.testing.assert_close(field.sample(2, seed=5, dtype=F64), there, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="Points"):
        field.at(np.zeros((3, 2)))


def test_a_wave_field_is_short_of_gaussian_by_one_over_its_modes():
    """Fourth moment of K waves, 3 − 3/(2K): the statement of the module, at K = 2."""
    x = RandomField(Gaussian(length=1.0), (1, 4, 4), method="spectral", modes=2).sample(4000, dtype=F64)[:, 0, 0, 0]
    fourth = x**4
    assert abs(float(fourth.mean()) - 2.25) < 4.5 * float(fourth.std()) / math.sqrt(len(x))


@pytest.mark.parametrize(
    "model",
    [
        Matern(nu=0.7, length=2.0),
        Exponential(length=(1.0, 2.0), angle=30.0),
        Stable(alpha=1.5),
        Stable(alpha=0.6),
        RationalQuadratic(alpha=1.5),
        Spherical(length=3.0),
        Cubic(length=3.0),
    ],
)
def test_spectral_measure_belongs_to_the_covariance(model):
    h = np.array([[0.3, 0.0], [0.5, 0.7], [1.0, 1.0], [2.0, -1.0]])
    waves = np.cos(model.frequencies(np.random.default_rng(0), 100_000, 2) @ h.T)
    z = (waves.mean(0) - model(h)) / (waves.std(0) / math.sqrt(len(waves)))
    assert np.abs(z).max() < 4.5
    r, e = np.linspace(0.05, 0.9, 20), 1e-5
    slope = ((r + e) * model.correlation(r + e) - (r - e) * model.correlation(r - e)) / (2 * e)
    np.testing.assert_allclose(model.line_correlation(r), slope, atol=1e-7)


# --- embedding, ranges, bad input -----------------------------------------------------------------------------------------


def test_the_embedding_is_minimal_and_reports_its_eigenvalues():
    compact = RandomField(Cubic(length=10.0), (1, 200, 200), method="circulant")
    assert max(compact.embedding.sizes) <= 216  # 199 + 11 samples, and the next size with small factors
    assert compact.embedding.negative <= 1e-7
    smooth = RandomField(Gaussian(length=3.0), (1, 12, 12), method="circulant")
    assert smooth.embedding.trials > 1  # twice the grid was not positive semi-definite
    assert smooth.embedding.sizes[0] > 24


def test_a_known_parity_is_taken_as_given():
    values = torch.rand(1, 6, dtype=F64)
    assert not Stationary(values, (1, 6)).even
    assert Stationary(values, (1, 6), even=True).even


def test_practical_range_follows_the_axes():
    turned = Exponential(length=(10.0, 1.0), angle=90.0)
    reach = turned.range(2)
    np.testing.assert_allclose(reach, [3.0, 30.0], rtol=0.01)
    lags = np.array([[reach[0], 0.0], [0.0, reach[1]]])
    np.testing.assert_allclose(turned(lags), 0.05, rtol=1e-6)
    assert (Spherical(length=7.0) + Nugget(variance=1.0)).range(1)[0] == pytest.approx(7.0)


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: Matern(nu=0.0), ValueError, "nu"),
        (lambda: Matern(nu=-1.0), ValueError, "nu"),
        (lambda: Stable(alpha=2.5), ValueError, "alpha"),
        (lambda: RationalQuadratic(alpha=0.0), ValueError, "alpha"),
        (lambda: Exponential(length=0.0), ValueError, "length"),
        (lambda: Exponential(variance=math.nan), ValueError, "variance"),
        (lambda: NestedCovariance(), ValueError, "structure"),
        (lambda: Exponential(length=(1.0, 2.0, 3.0))(np.zeros((1, 2))), ValueError, "lengths"),
        (lambda: Exponential(length=(1.0, 2.0), angle=(1.0, 2.0, 3.0))(np.zeros((1, 2))), ValueError, "angle"),
        (
            lambda: RandomField(Gaussian(length=3.0), (1, 12, 12), method="cholesky"),
            ValueError,
            "not positive definite",
        ),
        (lambda: RandomField(Gaussian(length=5.0), (1, 20, 20), method="periodic"), ValueError, "not positive semi"),
        (lambda: RandomField(Spherical(length=15.0), (1, 20, 20), method="periodic"), ValueError, "range"),
        (lambda: RandomField(Gaussian(length=9.0), (1, 20, 20), method="dct"), ValueError, "range"),
        (lambda: RandomField(Gaussian(length=(1.0, 2.0), angle=20.0), (1, 9, 9), method="dct"), ValueError, "turned"),
        (lambda: RandomField(Spherical(length=3.0), (1, 9, 9), method="spde"), TypeError, "Matérn"),
        (lambda: RandomField(Matern(), (1, 9, 9), method="spde", length=-torch.ones(9, 9)), ValueError, "positive"),
        (lambda: RandomField(Matern(), (1, 9, 9), method="spde", margin=(1, 2, 3)), ValueError, "margin"),
        (lambda: RandomField(Matern(), (1, 9, 9), method="fft"), ValueError, "unknown"),
        (lambda: RandomField(Matern(), (1, 9, 9), method="dct", modes=3), ValueError, "options"),
        (lambda: RandomField(Matern(), (1, 9, 9), method="spectral", rank=3), ValueError, "options"),
        (lambda: RandomField(Matern(), (1, 9), method="turning_bands"), ValueError, "axes"),
        (lambda: RandomField(Matern(), (1, 9, 9), method="kl", rank=100), ValueError, "rank"),
        (lambda: RandomField(Matern(), (1, 9, 9), method="kl", energy=1.5), ValueError, "energy"),
        (lambda: RandomField(Matern(), (1, 9, 9), spacing=(1.0,)), ValueError, "spacing"),
        (lambda: RandomField(Matern(), (9,)), ValueError, "axes"),
        (lambda: RandomField(Matern(), (1, 9, 9), method="spectral", mean=math.nan), ValueError, "mean"),
        (lambda: RandomField(Matern(), (1, 9, 9), mean=math.nan), ValueError, "mean"),
        (lambda: RandomField(torch.eye(9), (1, 3, 3)), TypeError, "GaussianPrior"),
        (lambda: RandomField(Matern(), (1, 9, 9), method="circulant", padding=-1), ValueError, "padding"),
    ],
)
def test_bad_input(build, error, words):
    with pytest.raises(error, match=words):
        build()


def test_a_range_beyond_the_domain_is_said():
    with pytest.warns(UserWarning, match="larger than the domain"):
        RandomField(Exponential(length=20.0), (1, 12, 12))
