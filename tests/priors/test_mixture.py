"""Mixtures, sums and products against numerical integration and known laws."""

import math

import pytest
import torch

from invgen.covariance import Diagonal, Stationary
from invgen.operators import MatrixOperator
from invgen.priors import GaussianMixturePrior, GaussianPrior, product
from invgen.transforms import Affine, Exp

torch.set_num_threads(1)
F64 = torch.float64
X = torch.linspace(-25, 25, 50001, dtype=F64)


def mixture(shift=0.0, transform=None):
    return GaussianMixturePrior(
        [0.2, 0.5, 0.3],
        torch.tensor([[-2.0], [0.5], [3.0]]) + shift,
        torch.tensor([0.3, 1.0, 0.1]),
        transform=transform,
    )


def density(prior, x=X):
    return prior.log_prob(x[:, None]).exp()


def test_density_and_denoiser_by_quadrature():
    prior = mixture()
    p = density(prior)
    assert float(torch.trapezoid(p, X)) == pytest.approx(1, abs=1e-9)
    for sigma in (0.2, 1.0, 5.0):
        for u in (-4.0, 0.1, 2.5):
            weight = p * torch.exp(-0.5 * ((u - X) / sigma) ** 2)
            expected = float(torch.trapezoid(weight * X, X) / torch.trapezoid(weight, X))
            assert float(prior.denoise(torch.tensor([[u]], dtype=F64), sigma)) == pytest.approx(expected, abs=1e-8)


def test_jacobian_by_quadrature():
    prior = mixture(transform=Exp())
    x = torch.linspace(1e-9, 80, 800001, dtype=F64)
    assert float(torch.trapezoid(density(prior, x), x)) == pytest.approx(1, abs=1e-4)


def test_dense_and_diagonal_components_agree_and_far_fields_stay_finite():
    variances = torch.tensor([[0.5, 2.0], [1.0, 0.1]], dtype=F64)
    means = torch.tensor([[1.0, -1.0], [4.0, 2.0]], dtype=F64)
    a = GaussianMixturePrior([1.0, 3.0], means, variances)
    b = GaussianMixturePrior([0.25, 0.75], means, [torch.diag(v) for v in variances])
    u = torch.tensor([[0.0, 0.0], [1e4, -1e4]], dtype=F64)
    sigma = torch.tensor([0.5, 3.0], dtype=F64)
    torch.testing.assert_close(a.log_prob(u), b.log_prob(u))
    torch.testing.assert_close(a.denoise(u, sigma), b.denoise(u, sigma))
    assert bool(torch.isfinite(a.denoise(u.float(), sigma.float())).all())
    torch.testing.assert_close(a.responsibilities(u, sigma).sum(1), torch.ones(2, dtype=F64))


def test_one_component_is_the_gaussian():
    C = torch.tensor([[1.0, 0.5], [0.5, 2.0]], dtype=F64)
    m = torch.tensor([2.0, -1.0], dtype=F64)
    one, g = GaussianMixturePrior([1.0], m[None], C[None]), GaussianPrior.dense(m, C)
    u = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    torch.testing.assert_close(one.log_prob(u), g.log_prob(u))
    torch.testing.assert_close(one.denoise(u, 0.7), g.denoise(u, 0.7))


def test_moments_of_draws():
    prior = GaussianMixturePrior.examples()[0].affine(torch.tensor([2.0, -1.0]), 3.0)
    n = 20000
    x = prior.sample(n, seed=1, dtype=F64)
    off = x - prior.mean()
    assert float((off.mean(0).abs() / (off.std(0) / math.sqrt(n))).max()) < 5
    pairs = off[:, :, None] * off[:, None, :]
    z = (pairs.mean(0) - prior.covariance().dense()).abs() / (pairs.std(0) / math.sqrt(n))
    assert float(z.max()) < 5


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: GaussianMixturePrior([0.5], torch.zeros(2, 1), [1.0, 1.0]), "weights"),
        (lambda: GaussianMixturePrior([0.5, -0.5], torch.zeros(2, 1), [1.0, 1.0]), "weights"),
        (lambda: GaussianMixturePrior([0.5, 0.5], torch.zeros(2, 1), [1.0]), "covariances"),
        (lambda: GaussianMixturePrior([0.5, 0.5], torch.zeros(2), [1.0, 1.0]), "components"),
        (lambda: GaussianMixturePrior.fit(torch.zeros(5, 2), 2), "equal"),
        (lambda: GaussianMixturePrior.fit(torch.randn(3, 2), 5), "components"),
    ],
)
def test_bad_input(call, text):
    with pytest.raises(ValueError, match=text):
        call()


# --- EM ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["dense", "diagonal"])
@pytest.mark.parametrize("shrinkage", [0.0, 0.2])
def test_em_objective_never_falls(structure, shrinkage):
    x = torch.rand(300, 3, generator=torch.Generator().manual_seed(0), dtype=F64) ** 2  # not a mixture of Gaussians
    prior = GaussianMixturePrior.fit(x, 4, seed=0, structure=structure, shrinkage=shrinkage, tol=0.0, iterations=60)
    gains = torch.tensor(prior.history).diff()
    assert len(gains) > 10
    assert float(gains.min()) > -1e-10


def test_em_recovers_a_known_mixture():
    truth = GaussianMixturePrior.examples()[0]
    n = 5000
    x = truth.sample(n, seed=4, dtype=F64)
    for transform in (None, Affine(1.0, 2.0)):
        data = x if transform is None else transform(x)
        fitted = GaussianMixturePrior.fit(data, 2, seed=0, tol=1e-9, floor=1e-4, transform=transform)
        order = torch.argsort(fitted.weights)
        # well separated: the errors are close to those of labelled data; 2 is a margin for the overlap
        torch.testing.assert_close(fitted.weights[order], truth.weights, atol=5 * 2 * math.sqrt(0.21 / n), rtol=0)
        for j, k in enumerate(order.tolist()):
            C, count = truth.covariances[j].dense(), n * float(truth.weights[j])
            assert bool(((fitted.means[k] - truth.means[j]).abs() < 5 * 2 * (C.diagonal() / count).sqrt()).all())
            spread = ((C**2 + C.diagonal()[:, None] * C.diagonal()) / count).sqrt()
            assert bool(((fitted.covariances[k].dense() - C).abs() < 5 * 2 * spread + 1e-4).all())
        better = (fitted.log_prob(data) - _law(truth, transform).log_prob(data)).sum()
        assert float(better) > 0  # a maximum of the likelihood is above the truth


def _law(prior, transform):
    return GaussianMixturePrior(prior.weights, prior.means, prior.covariances, transform=transform)


def test_em_survives_repeated_examples_and_too_many_components():
    g = torch.Generator().manual_seed(0)
    x = torch.cat([torch.zeros(50, 2, dtype=F64), 5 + torch.randn(20, 2, generator=g, dtype=F64)])
    prior = GaussianMixturePrior.fit(x, 8, seed=0)
    assert bool(torch.isfinite(prior.log_prob(x)).all())
    assert bool((prior.weights > 0).all())
    a, b = (GaussianMixturePrior.fit(x, 3, seed=s).means for s in (0, 0))
    assert torch.equal(a, b)


# --- sums, products, affine maps -----------------------------------------------------------------------------------

PAIRS = [
    (GaussianPrior(torch.tensor([1.0]), 0.5), GaussianPrior(torch.tensor([-2.0]), 2.0, transform=Affine(1.0, -0.5))),
    (mixture(), GaussianPrior(torch.tensor([1.0]), 0.5)),
    (GaussianPrior(torch.tensor([1.0]), 0.5), mixture(1.0)),
    (mixture(), mixture(-1.0, Affine(0.5, 2.0))),
]


@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_sum_is_the_convolution(p, q):
    total = p + q
    for x in (-3.0, 0.0, 2.2):
        expected = float(torch.trapezoid(density(p) * density(q, x - X), X))
        assert float(density(total, torch.tensor([x], dtype=F64))) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_product_is_the_normalised_product(p, q):
    both = density(p) * density(q)
    torch.testing.assert_close(density(product(p, q)), both / torch.trapezoid(both, X), rtol=1e-7, atol=1e-12)


def test_structures_are_kept_and_dense_products_agree():
    a = GaussianPrior.stationary((1, 8), variance=1.0, length=1.0, kind="exponential", mean=2.0)
    b = GaussianPrior.stationary((1, 8), variance=0.3, length=2.0, kind="exponential", mean=-1.0)
    white, field = GaussianPrior(1.0, 0.5, shape=(1, 8)), GaussianPrior.diagonal(1.0, torch.rand(1, 8, dtype=F64) + 0.1)
    for q, kind in ((b, Stationary), (white, Stationary), (field, None)):
        both, total = product(a, q), a + q
        if kind is not None:
            assert isinstance(both.covariance_u, kind)
            assert isinstance(total.covariance_u, kind)
        x = a.sample(4, dtype=F64)
        apart = both.log_prob(x) - a.log_prob(x) - q.log_prob(x)
        torch.testing.assert_close(apart, apart[:1].expand(4), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(
            total.covariance_u.dense(), a.covariance_u.dense() + q.covariance_u.dense(), rtol=1e-10, atol=1e-10
        )
    assert isinstance(product(white, field).covariance_u, Diagonal)


def test_affine_maps():
    A = torch.tensor([[1.0, 2.0], [0.0, -1.0]], dtype=F64)
    for prior in (
        GaussianMixturePrior.examples()[0],
        GaussianPrior.dense(torch.tensor([1.0, 3.0]), torch.tensor([[1.0, 0.4], [0.4, 0.5]])),
    ):
        mapped = prior.affine(A, torch.tensor([1.0, -1.0]))
        x = prior.sample(5, dtype=F64)
        torch.testing.assert_close(
            mapped.log_prob(x @ A.T + torch.tensor([1.0, -1.0])), prior.log_prob(x) - torch.linalg.slogdet(A)[1]
        )
        torch.testing.assert_close(prior.affine(-3.0, 1.0).log_prob(1 - 3 * x), prior.log_prob(x) - 2 * math.log(3))
        torch.testing.assert_close((prior + 2.0).log_prob(x + 2.0), prior.log_prob(x))
        marginal = prior.affine(A[:1])
        torch.testing.assert_close(marginal.mean(), A[:1] @ prior.mean())
        torch.testing.assert_close(prior.affine(MatrixOperator(A)).mean(), A @ prior.mean())
        with pytest.raises(ValueError, match="rows"):
            prior.affine(torch.ones(3, 2))
    with pytest.raises(TypeError, match="affine"):
        mixture(transform=Exp()) + mixture()
    with pytest.raises(ValueError, match="shape"):
        mixture() + GaussianPrior(torch.zeros(2), 1.0)
