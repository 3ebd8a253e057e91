"""Wells as data, and the problem of post-stack data, background and wells."""

import numpy as np
import pytest
import torch

from invgen.grid import Grid
from invgen.kronecker import Kronecker, toeplitz
from invgen.noise import GaussianNoise
from invgen.operators import (
    ChannelMix,
    PostStack,
    Smooth,
    WellLog,
    backus_average,
    block_log,
    impedance_problem,
    ricker,
    time_lapse_terms,
)
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem, Term
from invgen.solvers import ExactGaussian

torch.set_num_threads(1)
F64 = torch.float64
GRID = Grid((12, 9), (2.0, 12.5), origin=(100.0, 50.0), units=("ms", "m"))


def plane(grid, a=1.0, b=-0.5, c=0.3):
    z, x = np.meshgrid(grid.coordinates(0), grid.coordinates(1), indexing="ij")
    return torch.from_numpy(a + b * z + c * x)[None, None]


def test_a_plane_is_read_exactly_along_any_path():
    path = np.array([[100.0, 50.0], [103.7, 61.1], [122.0, 150.0], [111.1, 99.9]])
    read = WellLog(GRID, path)(plane(GRID))[0, 0].numpy()
    np.testing.assert_allclose(read, 1 - 0.5 * path[:, 0] + 0.3 * path[:, 1], rtol=1e-12)


def test_a_vertical_well_is_a_column():
    x = torch.randn(2, 1, 12, 9, dtype=F64)
    torch.testing.assert_close(WellLog.vertical(GRID, (75.0,), 104.0, 118.0)(x)[:, 0], x[:, 0, 2:10, 2])


def test_running_mean_along_the_path_shortens_at_the_ends():
    x = torch.randn(1, 1, 12, 9, dtype=F64)
    column = x[0, 0, :, 2]
    read = WellLog.vertical(GRID, (75.0,), 100.0, 122.0, smoothing=5)(x)[0, 0]
    torch.testing.assert_close(read[4], column[2:7].mean())
    torch.testing.assert_close(read[0], column[:3].mean())
    torch.testing.assert_close(read[-2], column[-4:].mean())


def test_channels_are_read_by_name():
    grid = Grid((4, 3), (1.0, 1.0), channels=("vp", "vs", "rho"))
    x = torch.randn(1, 3, 4, 3, dtype=F64)
    read = WellLog.vertical(grid, (1.0,), 0.0, 3.0, channels=["rho", 0])(x)[0]
    torch.testing.assert_close(read, torch.stack([x[0, 2, :, 1], x[0, 0, :, 1]]))


def test_upscaling_by_cells_conserves_and_orders_the_means():
    rng = np.random.default_rng(0)
    z = np.arange(0, 60, 0.5)
    v = np.exp(0.3 * rng.standard_normal(len(z)))
    cells = np.arange(5, 55, 10.0)
    means = {m: block_log(z, v, cells, mean=m) for m in ("arithmetic", "geometric", "harmonic")}
    assert (means["arithmetic"] > means["geometric"]).all()
    assert (means["geometric"] > means["harmonic"]).all()
    # 20 samples a cell, but a cell's border cuts samples in half
    inside = np.abs(z - cells[1]) < 10 / 2
    edge = np.isclose(np.abs(z - cells[1]), 5)
    np.testing.assert_allclose(means["arithmetic"][1], (v[inside].sum() + 0.5 * v[edge].sum()) / 20)
    np.testing.assert_allclose(block_log(z, np.full(len(z), 3.0), cells, width=4.0, mean="harmonic"), 3.0)


def test_backus_average_of_two_layers():
    z = np.arange(0.5, 40)  # 1 m layers, two kinds in turn
    hard = np.arange(len(z)) % 2 == 0
    v, rho = np.where(hard, 4000.0, 2000.0), np.where(hard, 2.6, 2.2)
    slow, dense = backus_average(z, v, rho, np.array([10.0, 20.0, 30.0]), width=10.0)
    modulus = 2 / (1 / (2.6 * 4000.0**2) + 1 / (2.2 * 2000.0**2))
    np.testing.assert_allclose(dense, 2.4, rtol=1e-12)
    np.testing.assert_allclose(slow, np.sqrt(modulus / 2.4), rtol=1e-12)


def setting(noise=0.01, seed=0, wells=()):
    """A stationary field with a mean that is not zero, its section, and the prior."""
    mean = plane(GRID, 8.0, 0.01, 0.001)[0]
    prior = GaussianPrior(
        mean,
        GaussianPrior.stationary(GRID, sd=0.2, length=(6.0, 60.0), kind="exponential", padding=6).covariance_u,
        grid=GRID,
    )
    wavelet = ricker((torch.arange(7, dtype=F64) - 3) * 0.002, 60.0)
    truth = prior.sample(1, seed=seed, dtype=F64)
    clean = PostStack(wavelet / 2, (1, 12, 9))(truth)
    g = torch.Generator().manual_seed(seed)
    return prior, wavelet, truth, clean + noise * torch.randn(clean.shape, generator=g, dtype=F64)


def dense_posterior(problem):
    """Mean and variance by plain algebra, term by term."""
    prior = problem.prior
    P = torch.linalg.inv(prior.covariance_u.dense().double())
    mean = prior.mean_u.flatten()
    rhs = P @ mean
    for t in problem.terms:
        A, R = t.operator.to_dense(), t.noise.covariance(t.operator.data_shape).dense()
        P = P + A.mT @ torch.linalg.solve(R, A)
        rhs = rhs + A.mT @ torch.linalg.solve(R, t.data[0].flatten())
    C = torch.linalg.inv(P)
    return (C @ rhs).reshape(prior.shape), C.diagonal().reshape(prior.shape)


@pytest.mark.parametrize("coloured", [False, True])
def test_joint_inversion_of_section_background_and_well_is_exact(coloured):
    prior, wavelet, truth, data = setting()
    operator = WellLog.vertical(GRID, (100.0,), 104.0, 118.0, smoothing=3)
    well = Term(operator(truth), operator, GaussianNoise(0.02), name="well 1")
    noise = Kronecker(
        1e-4 * toeplitz(0.6 ** torch.arange(12, dtype=F64), 12), toeplitz(0.3 ** torch.arange(9, dtype=F64), 9)
    )
    problem = impedance_problem(
        data[0, 0], wavelet, prior, noise if coloured else 0.01, background=truth[0, 0], lengths=(5, 4), wells=[well]
    )
    assert [t.name for t in problem.terms] == ["seismic", "background", "well 1"]
    torch.testing.assert_close(problem.terms[1].data, Smooth((1, 12, 9), (5, 4))(truth))
    mean, variance = dense_posterior(problem)
    got = ExactGaussian(method="cg", rtol=1e-12).mean(problem)[0]
    torch.testing.assert_close(got, mean, rtol=1e-7, atol=1e-7)
    without = impedance_problem(data, wavelet, prior, 0.01)
    assert [t.name for t in without.terms] == ["seismic"]
    # the well narrows the posterior where it is, and helps away from it
    _, blind = dense_posterior(without)
    assert (variance[0, 3:9, 4] < 0.7 * blind[0, 3:9, 4]).all()
    assert (variance <= blind + 1e-12).all()


def test_well_outside_the_section_is_an_error_that_says_where():
    with pytest.raises(ValueError, match=r"1 of 2 points.*t?z? ?100 to 122 ms.*\(130, 60\)"):
        WellLog(GRID, [[110.0, 60.0], [130.0, 60.0]])
    with pytest.raises(ValueError, match="cut the log to the section"):
        WellLog.vertical(GRID, (75.0,), 90.0, 110.0)
    with pytest.raises(ValueError, match="outside the section"):
        WellLog.vertical(GRID, (500.0,), 104.0, 110.0)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: WellLog(GRID, [[1.0, 2.0, 3.0]]), "2\\) coordinates"),
        (lambda: WellLog(GRID, [[np.nan, 60.0]]), "not finite"),
        (lambda: WellLog.vertical(GRID, (75.0,), 104.0, 110.0, smoothing=2), "odd"),
        (lambda: WellLog.vertical(GRID, (75.0,), 104.0, 110.0, channels=["vp"]), "channels"),
        (lambda: WellLog.vertical(GRID, (75.0,), 104.5, 105.0), "No sample"),
        (lambda: block_log(np.arange(5.0), np.ones(5), [10.0], width=2.0), "inside the log"),
        (lambda: block_log(np.arange(5.0), np.ones(5), [2.0]), "width"),
        (lambda: block_log(np.arange(5.0), np.ones(5), [2.0], width=1.0, mean="max"), "mean is"),
        (lambda: backus_average(np.arange(5.0), -np.ones(5), np.ones(5), [2.0], width=1.0), "positive"),
        (lambda: impedance_problem(np.ones((3, 3)), np.ones(3), setting()[0], 0.1), "section has the shape"),
        (lambda: impedance_problem(np.ones((12, 9)), np.ones(13), setting()[0], 0.1), "more than the 12"),
        (lambda: ChannelMix([[1.0, 1.0]], GRID), "columns"),
        (lambda: ChannelMix([1.0, 1.0], (3,)), "matrix"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_time_lapse_terms_see_baseline_and_sum():
    wavelet = ricker((torch.arange(7, dtype=F64) - 3) * 0.002, 60.0) / 2
    A, B = PostStack(wavelet, (1, 12, 9)), PostStack(2 * wavelet, (1, 12, 9), kind="forward")
    b, delta = torch.randn(2, 1, 1, 12, 9, dtype=F64)
    pair = time_lapse_terms(
        Term(A(b), A, GaussianNoise(0.1)), Term(B(b + delta), B, GaussianNoise(0.1), name="survey 2001")
    )
    assert [t.name for t in pair] == ["baseline", "survey 2001"]
    x = torch.cat([b, delta], dim=1)
    for t in pair:
        torch.testing.assert_close(t.operator(x), t.data)
    with pytest.raises(ValueError, match="one model grid"):
        time_lapse_terms(pair[0], Term(A(b), A, GaussianNoise(0.1)))


def test_joint_difference_beats_the_difference_of_two_inversions():
    """Exact posteriors of both ways: the variance of the difference, with the covariance of independent runs."""
    from invgen.priors import ProductPrior

    prior, wavelet, truth, data = setting()
    shape = (1, 12, 9)
    plain = GaussianPrior(prior.mean_u, prior.covariance_u)
    difference = GaussianPrior.diagonal(torch.zeros(shape, dtype=F64), torch.full(shape, 0.02**2, dtype=F64))
    operator = PostStack(wavelet / 2, shape)
    change = torch.zeros(1, *shape, dtype=F64)
    change[0, 0, 5:7, 3:6] = 0.05
    g = torch.Generator().manual_seed(4)
    second = operator(truth + change) + 0.01 * torch.randn(data.shape, generator=g, dtype=F64)
    terms = time_lapse_terms(Term(data, operator, GaussianNoise(0.01)), Term(second, operator, GaussianNoise(0.01)))
    joint = InverseProblem(terms=terms, prior=ProductPrior([plain, difference]))
    mean, variance = dense_posterior(joint)
    got = ExactGaussian(method="cg", rtol=1e-12).mean(joint)[0]
    torch.testing.assert_close(got, mean, rtol=1e-6, atol=1e-6)
    apart = [dense_posterior(InverseProblem(d, operator, GaussianNoise(0.01), plain)) for d in (data, second)]
    assert (variance[1] < apart[0][1][0] + apart[1][1][0]).all()
    error = (mean[1] - change[0, 0]).square().mean()
    separate = (apart[1][0][0] - apart[0][0][0] - change[0, 0]).square().mean()
    assert error < 0.5 * separate
