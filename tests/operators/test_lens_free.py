"""Free lens parameters: one lens for each sample, gradients, and light with few parameters."""

import math

import pytest
import torch
from scipy.special import gammainc

from invgen.linalg import dot_test
from invgen.operators import (
    EPL,
    SIE,
    ExternalShear,
    GravitationalLens,
    LensLight,
    ParametricImage,
    Sersic,
    sky_grid,
)

torch.set_num_threads(1)
D = torch.float64
LENS = EPL(0.9, 0.7, 0.4, 0.02, -0.03, 1.1) + ExternalShear(0.04, -0.03)
SOURCE, IMAGE = sky_grid((14, 11), 0.11), sky_grid((17, 20), (0.16, 0.14))
FREE = ("einstein_radius", "axis_ratio", "angle", "center_y", "center_x", "slope", "gamma_1", "gamma_2")
VALUES = {n: torch.tensor([v, v + 0.03, v - 0.02], dtype=D) for n, v in LENS.parameters.items()}


def kernel(separable):
    psf = torch.tensor([[0.05, 0.1, 0.05], [0.1, 0.4, 0.1], [0.05, 0.1, 0.05], [0.0, 0.0, 0.0]], dtype=D)
    if separable:
        psf = torch.outer(torch.tensor([0.3, 0.5, 0.2], dtype=D), torch.tensor([0.2, 0.8], dtype=D))
    return psf / psf.sum()


OPTIONS = {
    "plain": {},
    "psf": {"psf": kernel(False), "oversampling": 2, "quantity": "flux"},
    "separable": {"psf": kernel(True), "edge": "extrapolate"},
    "masked": {"mask": (torch.arange(340) % 3 > 0).reshape(17, 20)},
    "masked psf": {"mask": (torch.arange(340) % 3 > 0).reshape(17, 20), "psf": kernel(False)},
    "cubic": {"interpolation": "cubic", "psf": kernel(False)},
}


def draw(shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


@pytest.mark.parametrize("key", OPTIONS)
def test_samples_have_the_image_of_their_own_lens(key):
    A = GravitationalLens(LENS, SOURCE, IMAGE, free=FREE, **OPTIONS[key])
    x, d = draw((3, *A.model_shape)), draw((3, *A.data_shape), 1)
    together, samples = A(x, **VALUES), A.fixed(**VALUES)
    back = samples.adjoint(d)
    for i in range(3):
        one = A.fixed(**{n: float(v[i]) for n, v in VALUES.items()})
        assert isinstance(one, GravitationalLens)
        torch.testing.assert_close(together[i : i + 1], one(x[i : i + 1]), rtol=0, atol=1e-12)
        torch.testing.assert_close(back[i : i + 1], one.adjoint(d[i : i + 1]), rtol=0, atol=1e-12)
    assert dot_test(samples, samples.adjoint, x, d) < 1e-12
    own = {n: torch.full((3,), v, dtype=D) for n, v in LENS.parameters.items()}
    torch.testing.assert_close(A(x, **own), A(x), rtol=0, atol=1e-12)


def test_samples_solve_with_their_own_matrix():
    A = GravitationalLens(LENS, sky_grid((5, 6), 0.25), sky_grid((7, 6), 0.4), kernel(False), free=FREE)
    samples, b = A.fixed(**VALUES), draw((3, *A.data_shape), 2)
    solved = samples.solve(b, 0.1, 2.0)
    assert solved.converged.all()
    for i in range(3):
        M = A.fixed(**{n: float(v[i]) for n, v in VALUES.items()}).to_dense()
        S = 0.1 * torch.eye(len(M), dtype=D) + 2.0 * M @ M.T
        torch.testing.assert_close(solved.x[i].flatten(), torch.linalg.solve(S, b[i].flatten()), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("interpolation", ["bilinear", "cubic"])
def test_gradient_against_differences(interpolation):
    """A smooth source and a step of 1e-7: a ray that crosses a line of pixel centres within it, where the bilinear
    derivative jumps, is one in ten thousand."""
    A = GravitationalLens(LENS, SOURCE, IMAGE, kernel(False), 2, free=FREE, interpolation=interpolation)
    y, x = (torch.as_tensor(SOURCE.coordinates(k)) for k in ("y", "x"))
    source = torch.exp(-((y[:, None] - 0.1) ** 2 + (x - 0.05) ** 2) / (2 * 0.25**2))[None, None]
    d = draw((1, *A.data_shape), 3)

    def misfit(values):
        return (A(source, **dict(zip(FREE, values))) - d).square().sum()

    at = [torch.tensor([v], dtype=D, requires_grad=True) for v in LENS.parameters.values()]
    gradient = torch.autograd.grad(misfit(at), at)
    for k, g in enumerate(gradient):
        h = 1e-7
        plus, minus = ([v + h * (j == k) for j, v in enumerate(at)] for h in (h, -h))
        numeric = (misfit(plus) - misfit(minus)) / (2 * h)
        assert abs(float((g - numeric).detach())) <= 1e-5 * float(torch.stack(gradient).abs().max())


def test_cubic_interpolation_has_no_kinks():
    """Second differences of the image along θ_E: those of the bilinear one jump with the step's square root fewer rays."""
    source = draw((1, 1, 14, 11))
    radii = torch.linspace(0.9, 0.905, 201, dtype=D)
    jumps = {}
    for kind in ("bilinear", "cubic"):
        A = GravitationalLens(LENS, SOURCE, IMAGE, free=FREE, interpolation=kind)
        images = A(source.expand(201, -1, -1, -1), einstein_radius=radii).flatten(1)
        jumps[kind] = float((images[2:] - 2 * images[1:-1] + images[:-2]).abs().max())
    assert jumps["cubic"] < 0.05 * jumps["bilinear"]


def test_rays_are_kept_for_the_same_parameters_and_no_others():
    A = GravitationalLens(LENS, SOURCE, IMAGE, free=("einstein_radius",))
    x, radius = draw((2, *A.model_shape)), torch.tensor([0.9, 1.0], dtype=D)
    first = A(x, einstein_radius=radius)
    kept = A._last(A, {"einstein_radius": radius})
    assert A._last(A, {"einstein_radius": radius}) is kept
    assert A._last(A, {"einstein_radius": radius.clone()}) is not kept
    torch.testing.assert_close(A(x, einstein_radius=radius), first)
    radius += 0.1
    moved = A(x, einstein_radius=radius)
    assert not torch.allclose(moved, first)
    torch.testing.assert_close(moved, A(x, einstein_radius=radius.clone()))
    one = torch.tensor(0.9, dtype=D, requires_grad=True)
    assert torch.autograd.grad(A(x, einstein_radius=one).sum(), one)[0].abs() > 0
    assert A._last._kept is None


def test_a_bad_proposal_spoils_its_own_item_only():
    A = GravitationalLens(LENS, SOURCE, IMAGE, kernel(False), free=FREE)
    out = A(draw((3, *A.model_shape)), axis_ratio=torch.tensor([0.7, 1.2, 0.5], dtype=D))
    assert torch.isfinite(out[0]).all()
    assert torch.isfinite(out[2]).all()
    assert not torch.isfinite(out[1]).any()


def test_what_free_lenses_refuse():
    A = GravitationalLens(LENS, SOURCE, IMAGE, free=("einstein_radius",))
    with pytest.raises(ValueError, match="gamma_1 are not free"):
        A.fixed(gamma_1=0.1)
    samples = A.fixed(einstein_radius=torch.ones(3, dtype=D))
    with pytest.raises(ValueError, match="one item a sample"):
        samples(draw((2, *A.model_shape)))


# --- light with few parameters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0.5, 1.0, 2.5, 4.0])
def test_half_of_the_light_is_within_the_half_light_radius(n):
    light = Sersic(2.0, 0.7, n, 0.6, 0.3, 0.1, -0.2)
    # γ(2n, b)/Γ(2n) = 1/2 defines b_n; I(R)/I_e = exp(−b (…)) gives it back
    y, x = 0.1 + 0.35 * math.sin(0.3), -0.2 + 0.35 * math.cos(0.3)  # half the radius, along the major axis
    value = light.brightness(torch.tensor(y, dtype=D), torch.tensor(x, dtype=D))
    b = -math.log(float(value) / 2.0) / (0.5 ** (1 / n) - 1)
    assert gammainc(2 * n, b) == pytest.approx(0.5, abs=2e-4 * (0.5 / n) ** 3)  # the error of the series
    if n <= 1:
        fine = sky_grid((601, 601), 0.02)
        yy, xx = torch.meshgrid(*(torch.as_tensor(fine.coordinates(k)) for k in ("y", "x")), indexing="ij")
        assert float(light.brightness(yy, xx).sum()) * 0.02**2 == pytest.approx(light.total(), rel=1e-3)


def test_a_stack_of_profiles_is_the_sum_and_its_image_the_lensed_one():
    bulge, disc = Sersic(1.0, 0.2, 3.0, name="bulge"), Sersic(0.5, 0.5, 1.0, 0.5, 0.2, name="disc")
    both = bulge + disc
    y, x = draw((2, 50), 4)
    torch.testing.assert_close(
        both.brightness(y, x, disc_index=2.0), bulge.brightness(y, x) + disc.at(index=2.0).brightness(y, x)
    )
    psf, s = kernel(False), 3
    A = ParametricImage(both, IMAGE, ("bulge_index", "gamma_1"), lens=LENS, psf=psf, oversampling=s)
    v = torch.tensor([[2.0, 0.04], [1.5, 0.1]], dtype=D)
    for i in range(2):
        rays = GravitationalLens.ray_positions(IMAGE, s, psf)
        b = LENS.at(gamma_1=float(v[i, 1])).rays(*rays)
        light = both.at(bulge_index=float(v[i, 0])).brightness(*b)
        frame = light.reshape(light.shape[0] // s, s, light.shape[1] // s, s).mean((1, 3))[None, None]
        want = torch.nn.functional.conv2d(frame, psf.flip(0, 1)[None, None])
        torch.testing.assert_close(A(v)[i : i + 1], want, rtol=0, atol=1e-13)
    assert torch.autograd.gradcheck(A, (v.requires_grad_(),), fast_mode=True)


def test_pixelated_source_sees_smooth_light_alike():
    """A Gaussian source on pixels a tenth of its width: bilinear interpolation is right to h²/8 of its curvature."""
    light = Sersic(1.0, 0.4, 0.5)
    grid = sky_grid((161, 161), 0.04)
    y, x = torch.meshgrid(*(torch.as_tensor(grid.coordinates(k)) for k in ("y", "x")), indexing="ij")
    A = GravitationalLens(LENS, grid, IMAGE, kernel(True), 2, quantity="flux")
    flux = light.brightness(y, x)[None, None] * 0.04**2
    B = ParametricImage(light, IMAGE, ("intensity",), lens=LENS, psf=kernel(True), oversampling=2, quantity="flux")
    assert float((A(flux) - B(torch.ones(1, 1, dtype=D))).abs().max()) < 5e-3 * float(A(flux).max())


def test_names_that_light_and_lens_share():
    A = ParametricImage(Sersic(1.0, 0.2), IMAGE, ("source_center_x", "lens_center_x", "gamma_1"), lens=SIE(1.0) + ExternalShear())  # fmt: skip
    assert A.defaults["source_axis_ratio"] == 1.0
    with pytest.raises(ValueError, match="each once"):
        ParametricImage(Sersic(1.0, 0.2), IMAGE, ("center_x",), lens=SIE(1.0))


def test_light_of_the_lens_is_added():
    A = GravitationalLens(LENS, SOURCE, IMAGE, kernel(False), free=("einstein_radius",), quantity="flux")
    light = Sersic(1.0, 0.5, 2.0)
    both = LensLight(A, light, ("lens_intensity",))
    assert both.theta_names == ("einstein_radius", "lens_intensity")
    x, radius, bright = draw((2, *A.model_shape)), torch.tensor([0.9, 1.0], dtype=D), torch.tensor([1.0, 3.0], dtype=D)
    out = both(x, einstein_radius=radius, lens_intensity=bright)
    alone = ParametricImage(light, IMAGE, ("intensity",), psf=kernel(False), quantity="flux")
    torch.testing.assert_close(out, A(x, einstein_radius=radius) + alone(bright[:, None]), rtol=0, atol=1e-12)
    torch.testing.assert_close(both(x), A(x) + both.image(), rtol=0, atol=1e-12)
