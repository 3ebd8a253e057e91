"""MRI: the transform against the textbook's sum, direct solves, masks and coils, bad input."""

import math

import pytest
import torch

from invgen.contracts import LinearOperator
from invgen.covariance import Diagonal, Scalar, Stationary
from invgen.operators import MRI, coil_sensitivities, kspace_mask, root_sum_of_squares

torch.set_num_threads(1)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.complex128) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (4, 3)])
def test_samples_are_the_centred_sum(size):
    mask = torch.rand(size, generator=torch.Generator().manual_seed(1)) > 0.4
    x = draw(2, 1, *size)
    y, p = (torch.arange(n, dtype=torch.float64) - n // 2 for n in size)
    rows, columns = (torch.exp(-2j * math.pi * torch.outer(v, v) / len(v)) for v in (y, p))
    want = torch.einsum("ky,bcyx,lx->bckl", rows, x, columns) / math.sqrt(math.prod(size))
    operator = MRI(mask)
    torch.testing.assert_close(operator(x), want[:, :, mask])
    torch.testing.assert_close(operator.kspace(operator(x)), want * mask)


def test_all_samples_lose_nothing():
    x = draw(2, 1, 6, 5)
    operator = MRI(torch.ones(6, 5, dtype=torch.bool))
    torch.testing.assert_close(operator.zero_filled(operator(x)), x)


def test_kinds_state_one_image():
    mask, maps = kspace_mask((8, 8), 2), coil_sensitivities((8, 8), 3)
    x = draw(2, 1, 8, 8)
    data = MRI(mask, maps)(x)
    torch.testing.assert_close(MRI(mask, maps, "parts")(torch.cat([x.real, x.imag], 1)), data)
    torch.testing.assert_close(MRI(mask, maps, "real")(x.real), MRI(mask, maps)(x.real + 0j))


@pytest.mark.parametrize("kind", ["complex", "real", "parts"])
@pytest.mark.parametrize("size", [(6, 4), (5, 7)])
def test_direct_solves_with_one_coil(kind, size):
    mask = torch.rand(size, generator=torch.Generator().manual_seed(2)) > 0.4
    operator, n = MRI(mask, kind=kind), int(mask.sum())
    k2 = torch.fft.fftfreq(size[0])[:, None].square() + torch.fft.fftfreq(size[1]).square()
    C = Stationary(torch.exp(-20 * k2.double()) + 0.1, operator.model_shape)
    R = Diagonal(torch.rand(1, n, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.5)
    d = draw(3, 1, n, seed=4)
    m = draw(3, *operator.model_shape, seed=5, dtype=torch.complex128 if kind == "complex" else torch.float64)
    each = Scalar(torch.tensor([0.2, 0.5, 2.0], dtype=torch.float64), (1, n))
    for noise in (R, each):
        data, update = operator.solve(d, noise, C), operator.solve_model(m, noise, C)
        assert (data.iterations, update.iterations) == (0, 0)
        torch.testing.assert_close(noise.apply(data.x) + operator(C.apply(operator.adjoint(data.x))), d)
        torch.testing.assert_close(operator.adjoint(noise.solve(operator(update.x))) + C.solve(update.x), m)


def test_several_coils_go_by_conjugate_gradients():
    operator = MRI(kspace_mask((8, 8), 2), coil_sensitivities((8, 8), 4), "parts")
    m = draw(2, 2, 8, 8, dtype=torch.float64)
    got, want = operator.solve_model(m, 0.1, 1.0), LinearOperator.solve_model(operator, m, 0.1, 1.0)
    assert got.converged.all()
    torch.testing.assert_close(got.x, want.x)


def test_mask_has_the_samples_it_was_asked_for():
    lines = kspace_mask((32, 60), 4, centre=0.1, seed=1)
    assert int(lines.sum()) == 32 * 15
    assert bool((lines == lines[0]).all())
    assert bool(lines[0, 30 - 3 : 30 + 3].all())
    points = kspace_mask((32, 30), 5, centre=0.02, sampling="points", seed=1)
    assert int(points.sum()) == 32 * 30 // 5
    assert bool(points[16, 15])
    assert not torch.equal(points, kspace_mask((32, 30), 5, centre=0.02, sampling="points", seed=2))
    y, x = torch.meshgrid(torch.arange(32) - 16, torch.arange(30) - 15, indexing="ij")
    inner = (y.square() + x.square()) < 100
    assert float(points[inner].float().mean()) > 2 * float(points[~inner].float().mean())


def test_sensitivities_are_normalised():
    maps = coil_sensitivities((9, 12), 5)
    torch.testing.assert_close(root_sum_of_squares(maps[None])[0], torch.ones(9, 12, dtype=torch.float64))
    x = draw(1, 1, 9, 12)
    torch.testing.assert_close(root_sum_of_squares(maps * x)[0], x[0, 0].abs())


def test_bad_input():
    mask = torch.ones(4, 4, dtype=torch.bool)
    with pytest.raises(TypeError, match="boolean"):
        MRI(mask.float())
    with pytest.raises(ValueError, match="two axes"):
        MRI(mask[0])
    with pytest.raises(ValueError, match="no sample"):
        MRI(~mask)
    with pytest.raises(ValueError, match="sensitivities"):
        MRI(mask, torch.ones(2, 4, 5))
    with pytest.raises(ValueError, match="NaN"):
        MRI(mask, torch.full((2, 4, 4), float("nan")))
    with pytest.raises(ValueError, match="kind"):
        MRI(mask, kind="magnitude")
    with pytest.raises(ValueError, match="acceleration"):
        kspace_mask((8, 8), 0.5)
    with pytest.raises(ValueError, match="centre alone"):
        kspace_mask((8, 8), 4, centre=0.5)
    with pytest.raises(ValueError, match="sampling"):
        kspace_mask((8, 8), 4, sampling="radial")
    with pytest.raises(ValueError, match="coil"):
        coil_sensitivities((8, 8), 0)


@pytest.mark.parametrize("kind", ["real", "parts"])
def test_real_priors_keep_the_direct_solve_and_the_exact_posterior(kind):
    """Complex data, a real Gaussian prior in other units: the mean by dense algebra on real and imaginary parts."""
    from invgen.noise import GaussianNoise
    from invgen.priors import GaussianPrior
    from invgen.problem import InverseProblem
    from invgen.solvers import ExactGaussian
    from invgen.transforms import Affine

    mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(6)) > 0.5
    operator = MRI(mask, kind=kind)
    shape, sigma = operator.model_shape, 0.3
    k2 = torch.fft.fftfreq(4)[:, None].square() + torch.fft.fftfreq(6).square()
    C = Stationary(torch.exp(-20 * k2.double()) + 0.1, shape)
    prior = GaussianPrior(draw(*shape, seed=7, dtype=torch.float64), C, transform=Affine(2.0, 3.0))
    d = draw(1, 1, int(mask.sum()), seed=8)
    problem = InverseProblem(d, operator, GaussianNoise(sigma), prior)
    system = problem.linear_gaussian("u")
    assert system.operator.solve(d, system.R_update, C).iterations == 0
    M = operator.to_dense()
    M = torch.cat([M.real, M.imag]) * 3.0
    centre = 2.0 + 3.0 * prior.mean_u.flatten()
    parts = torch.cat([d.real, d.imag], -1).flatten() - M / 3.0 @ centre
    c = C.dense()
    gain = c @ M.T @ torch.linalg.inv(M @ c @ M.T + sigma**2 / 2 * torch.eye(len(M), dtype=torch.float64))
    want = centre + 3.0 * (gain @ parts)
    torch.testing.assert_close(ExactGaussian().mean(problem).flatten(), want, rtol=0, atol=1e-8)
