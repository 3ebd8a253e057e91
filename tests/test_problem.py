import math

import pytest
import scipy.stats
import torch

from invgen.contracts import LinearOperator, Operator
from invgen.covariance import Dense, Diagonal
from invgen.grid import Grid
from invgen.noise import GaussianNoise, LaplaceNoise, PoissonNoise
from invgen.operators import MatrixOperator, PostStack
from invgen.posterior import Posterior
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem, Term
from invgen.transforms import Affine, Chain, Exp, Identity

D = torch.float64


def spd(n, seed=0):
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=D)
    return a @ a.mT / n + 0.3 * torch.eye(n, dtype=D)


class Flat:
    """A prior that only states its shape and coordinates."""

    def __init__(self, shape, transform=None, grid=None):
        self.shape, self.transform, self.grid = shape, transform or Identity(), grid

    def sample(self, n, *, seed=0):
        return torch.randn(n, *self.shape, generator=torch.Generator().manual_seed(seed), dtype=D)


class Gain(Operator):
    theta_names = ("gain",)

    def forward(self, x, *, gain):
        return gain.reshape(-1, 1) * x


class PositiveScale:
    """Log-normal prior of one positive unknown."""

    shape, grid, transform = (1,), None, Exp()

    def sample(self, n, *, seed=0):
        return (0.3 * torch.randn(n, 1, generator=torch.Generator().manual_seed(seed), dtype=D)).exp()

    def log_prob(self, x):
        return torch.distributions.LogNormal(0.0, 0.3).log_prob(x).sum(1)


def matrices(*rows, n=4):
    return [MatrixOperator(torch.randn(r, n, dtype=D)) for r in rows]


def test_likelihoods_add_over_terms():
    A, B = matrices(3, 5)
    terms = [
        Term(torch.randn(3, dtype=D), A, GaussianNoise(0.5)),
        Term(torch.randn(5, dtype=D), B, LaplaceNoise(0.3), name="second"),
    ]
    x = torch.randn(6, 4, dtype=D)
    joint = InverseProblem(terms=terms, prior=Flat((4,)))
    alone = [InverseProblem(terms=[t], prior=Flat((4,))).log_likelihood(x) for t in terms]
    torch.testing.assert_close(joint.log_likelihood(x), alone[0] + alone[1])
    want = torch.distributions.Normal(x @ A.matrix.mT, 0.5).log_prob(terms[0].data).sum(1)
    torch.testing.assert_close(alone[0], want)
    assert [tuple(p.shape) for p in joint.predict(x)] == [(6, 3), (6, 5)]


@pytest.mark.parametrize(
    "noise",
    [
        GaussianNoise(0.5),
        GaussianNoise(torch.linspace(0.2, 1, 5, dtype=D)),
        GaussianNoise(covariance=Dense(spd(5))),
        LaplaceNoise(0.3),
    ],
)
def test_a_mask_equals_leaving_the_data_out(noise):
    (A,) = matrices(5)
    d, mask = torch.randn(2, 5, dtype=D), torch.tensor([True, False, True, True, False])
    holes = torch.where(mask, d, float("nan"))
    x = torch.randn(2, 4, dtype=D)
    got = InverseProblem(holes, A, noise, Flat((4,)), mask=mask).log_likelihood(x)
    fewer = MatrixOperator(A.matrix[mask])
    want = InverseProblem(d[:, mask], fewer, noise.restricted(mask), Flat((4,))).log_likelihood(x)
    torch.testing.assert_close(got, want)
    whole = InverseProblem(d, A, noise, Flat((4,)), mask=torch.ones(5, dtype=torch.bool)).log_likelihood(x)
    torch.testing.assert_close(whole, InverseProblem(d, A, noise, Flat((4,))).log_likelihood(x))


def test_several_observations():
    (A,) = matrices(3)
    d = torch.randn(4, 3, dtype=D)
    problem = InverseProblem(d, A, GaussianNoise(0.5), Flat((4,)))
    assert problem.n_obs == 4
    x = torch.randn(4, 4, dtype=D)
    want = torch.stack(
        [InverseProblem(d[i], A, GaussianNoise(0.5), Flat((4,))).log_likelihood(x[i : i + 1])[0] for i in range(4)]
    )
    torch.testing.assert_close(problem.log_likelihood(x), want)
    picked = problem.select([2, 2, 0])
    torch.testing.assert_close(picked.log_likelihood(x[[2, 2, 0]]), want[[2, 2, 0]])
    assert picked.select([1], dtype=torch.float32).terms[0].data.dtype == torch.float32
    with pytest.raises(ValueError, match="3 models were given for 4 observations"):
        problem.log_likelihood(x[:3])
    other = problem.with_data(torch.zeros(2, 3, dtype=D))
    assert other.n_obs == 2
    B = matrices(2)[0]
    mixed = InverseProblem(
        terms=[Term(d, A, GaussianNoise(0.5)), Term(torch.zeros(2, dtype=D), B, GaussianNoise(1.0))], prior=Flat((4,))
    )
    assert mixed.n_obs == 4
    assert mixed.linear_gaussian().data.shape == (4, 5)
    assert [t.data.shape[0] for t in mixed.select([3, 1]).terms] in ([2, 1], [2, 2])


def explicit(problem, lg, x, offset=0.0):
    """log N(d; A x, R) up to a constant, from the dense matrices."""
    A, R = lg.operator.to_dense(), lg.R.dense()
    r = (lg.data.flatten(1) - x.flatten(1) @ A.mT - offset).mT
    return (
        -0.5 * (r * torch.linalg.solve(R, r)).sum(0)
        - 0.5 * torch.linalg.slogdet(R)[1]
        - 0.5 * len(A) * math.log(2 * math.pi)
    )


@pytest.mark.parametrize("n_terms", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_linear_gaussian_in_x(n_terms, masked):
    A, B = matrices(3, 5)
    mask = torch.tensor([True, False, True]) if masked else None
    terms = [
        Term(torch.randn(3, dtype=D), A, GaussianNoise(covariance=Dense(spd(3))), mask),
        Term(torch.randn(2, 5, dtype=D), B, GaussianNoise(0.4)),
    ]
    problem = InverseProblem(terms=terms[:n_terms], prior=Flat((4,)))
    x = torch.randn(2, 4, dtype=D)
    assert problem.is_linear_gaussian
    torch.testing.assert_close(
        explicit(problem, problem.linear_gaussian(), x), problem.log_likelihood(x), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize(
    "transform",
    [
        Identity(),
        Affine(2.0, 3.0),
        Affine(torch.linspace(-1, 1, 4), torch.linspace(0.5, 2, 4)),
        Chain(Affine(1.0, 2.0), Affine(torch.linspace(-1, 1, 4), 0.5)),
    ],
)
@pytest.mark.parametrize("n_terms", [1, 2])
def test_linear_gaussian_in_u(transform, n_terms):
    A, B = matrices(3, 5)
    terms = [
        Term(torch.randn(3, dtype=D), A, GaussianNoise(covariance=Diagonal(torch.rand(3, dtype=D) + 0.1))),
        Term(torch.randn(5, dtype=D), B, GaussianNoise(0.4)),
    ]
    problem = InverseProblem(terms=terms[:n_terms], prior=Flat((4,), transform))
    u = torch.randn(2, 4, dtype=D)
    lg = problem.linear_gaussian("u")
    torch.testing.assert_close(explicit(problem, lg, u), problem.log_likelihood(transform(u)), rtol=1e-9, atol=1e-9)


def test_linear_gaussian_refuses_what_is_not():
    (A,) = matrices(3)
    d = torch.zeros(3, dtype=D)
    for given, kind in (
        (InverseProblem(d, A, LaplaceNoise(1.0), Flat((4,))), "x"),
        (InverseProblem(d, A, GaussianNoise(1.0), Flat((4,), Exp())), "u"),
    ):
        with pytest.raises(TypeError, match="not linear"):
            given.linear_gaussian(kind)


def test_linear_gaussian_with_a_noise_level_for_each_item():
    (A,) = matrices(3)
    problem = InverseProblem(
        torch.randn(3, dtype=D), A, GaussianNoise("sd"), Flat((4,)), nuisance={"sd": PositiveScale()}
    )
    level = torch.tensor([0.3, 2.0], dtype=D)
    lg = problem.linear_gaussian(sd=level)
    torch.testing.assert_close(lg.R.variance, level**2)
    with pytest.raises(ValueError, match="was not given"):
        problem.linear_gaussian()


def test_posteriors_against_the_formula():
    (A,) = matrices(3)
    mean, C, d = torch.randn(4, dtype=D), spd(4), torch.randn(3, dtype=D)
    prior = GaussianPrior(mean, Dense(C))
    problem = InverseProblem(d, A, GaussianNoise("sd"), prior, nuisance={"sd": PositiveScale()})
    x, sd = torch.randn(5, 4, dtype=D), torch.rand(5, dtype=D) + 0.2
    parts = [
        scipy.stats.norm((A.matrix @ x[i]).numpy(), float(sd[i])).logpdf(d.numpy()).sum()
        + scipy.stats.multivariate_normal(mean.numpy(), C.numpy()).logpdf(x[i].numpy())
        + scipy.stats.lognorm(0.3).logpdf(float(sd[i]))
        for i in range(5)
    ]
    got = problem.log_posterior(x, sd=sd)
    want = torch.tensor(parts, dtype=D)
    torch.testing.assert_close(got - got[0], want - want[0], rtol=1e-8, atol=1e-8)
    z = torch.randn(5, 4, dtype=D)
    latent = problem.latent_log_posterior(z, sd=sd)
    direct = (
        problem.log_likelihood(prior.decode(z), sd=sd) - 0.5 * z.square().sum(1) + PositiveScale().log_prob(sd[:, None])
    )
    torch.testing.assert_close(latent, direct)
    with pytest.raises(ValueError, match=r"\['sd'\] were not given"):
        problem.log_posterior(x)


def test_nuisance_of_the_operator():
    problem = InverseProblem(
        torch.ones(3, dtype=D),
        Gain((3,), (3,)),
        GaussianNoise("sd"),
        Flat((3,)),
        nuisance={"gain": PositiveScale(), "sd": PositiveScale()},
    )
    x, gain, sd = torch.randn(2, 3, dtype=D), torch.tensor([2.0, 3.0], dtype=D), torch.tensor([0.5, 1.0], dtype=D)
    want = torch.distributions.Normal(x * gain[:, None], sd[:, None]).log_prob(torch.ones(3, dtype=D)).sum(1)
    torch.testing.assert_close(problem.log_likelihood(x, gain=gain, sd=sd), want)
    with pytest.raises(TypeError):
        problem.linear_gaussian(gain=gain, sd=sd)


def test_linear_gaussian_refuses_nuisance_parameters_of_an_operator():
    section = PostStack(torch.tensor([0.5, 1.0, 0.5]), (1, 4, 2))
    problem = InverseProblem(torch.zeros(1, 1, 4, 2, dtype=D), section, GaussianNoise(0.1), Flat((1, 4, 2)))
    assert problem.linear_gaussian().operator is section
    with pytest.raises(TypeError, match="wavelet_scale"):
        problem.linear_gaussian(wavelet_scale=torch.tensor([2.0], dtype=D))


def test_linear_gaussian_refuses_real_beside_complex_terms():
    A, B = matrices(3, 2)
    terms = [
        Term(torch.zeros(3, dtype=D), A, GaussianNoise(1.0)),
        Term(
            torch.zeros(2, dtype=torch.complex128),
            MatrixOperator(torch.complex(B.matrix, B.matrix)),
            GaussianNoise(1.0),
        ),
    ]
    with pytest.raises(TypeError, match="imaginary"):
        InverseProblem(terms=terms, prior=Flat((4,))).linear_gaussian()


def test_simulate_draws_the_joint_law():
    n = 6000
    A, B = matrices(3, 2)
    mean, C = torch.randn(4, dtype=D), spd(4)
    prior = GaussianPrior(mean, Dense(C))
    problem = InverseProblem(
        terms=[
            Term(torch.zeros(3, dtype=D), A, GaussianNoise("sd")),
            Term(torch.zeros(2, dtype=D), B, GaussianNoise(0.7)),
        ],
        prior=prior,
        nuisance={"sd": PositiveScale()},
    )
    x, theta, (d, e) = problem.simulate(n, seed=3)
    x, d, e = x.to(D), d.to(D), e.to(D)
    assert theta["sd"].shape == (n,)
    M = torch.cat([A.matrix, B.matrix])
    second = math.exp(2 * 0.3**2)  # E sd²
    noise = torch.diag(torch.tensor([second] * 3 + [0.49] * 2, dtype=D))
    joint = torch.cat([torch.cat([C, C @ M.mT], 1), torch.cat([M @ C, M @ C @ M.mT + noise], 1)])
    centred = torch.cat([x, d, e], 1) - torch.cat([mean, M @ mean])
    z = centred.mean(0) / (joint.diagonal() / n).sqrt()
    assert z.abs().max() < 5
    product = centred[:, :, None] * centred[:, None, :]
    assert ((product.mean(0) - joint) / (product.std(0) / n**0.5)).abs().max() < 5
    again = problem.simulate(n, seed=3)
    assert torch.equal(again[0].to(D), x)
    assert torch.equal(again[2][0].to(D), d)
    residual = (d - x @ A.matrix.mT) / theta["sd"].to(D)[:, None]
    assert scipy.stats.kstest(residual.flatten().numpy(), "norm").pvalue > 1e-5
    other = problem.simulate(10, seed=4)
    assert not torch.isin(other[0].flatten().double(), x.flatten()).any()


def test_counts_become_numbers_and_masks_follow():
    operator = MatrixOperator(torch.eye(3, dtype=D))
    problem = InverseProblem(torch.tensor([1, 2, 3]), operator, PoissonNoise(), Flat((3,)))
    assert problem.terms[0].data.is_floating_point()
    assert torch.isfinite(problem.log_likelihood(torch.ones(2, 3, dtype=D))).all()


def test_grids_are_compared():
    class On(LinearOperator):
        def forward(self, x, **theta):
            return x

    coarse = Grid((3, 4), (10.0, 10.0), units=("m", "m"))
    fine = Grid((3, 4), (4.0, 10.0), units=("m", "m"))
    larger = Grid((6, 8), (5.0, 5.0), units=("m", "m"))
    for first, second in ((coarse, fine), (coarse, larger)):
        operator = On(second.field_shape, second.field_shape, model_grid=second)
        with pytest.raises(ValueError) as caught:
            InverseProblem(
                torch.zeros(second.field_shape), operator, GaussianNoise(1.0), Flat(first.field_shape, grid=first)
            )
        assert str(first) in str(caught.value)
        assert str(second) in str(caught.value)


def test_a_problem_is_left_alone():
    problem = InverseProblem(torch.zeros(3, dtype=D), matrices(3)[0], GaussianNoise(1.0), Flat((4,)))
    with pytest.raises(AttributeError):
        problem.prior = None
    assert problem != InverseProblem(terms=problem.terms, prior=problem.prior)
    assert isinstance(Posterior(torch.zeros(1, 1, 1, 4), "exact", problem=problem).predict()[0], torch.Tensor)
