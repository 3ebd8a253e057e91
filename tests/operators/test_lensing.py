"""The lens operator against its definition, pixel by pixel."""

import math
import warnings

import pytest
import torch

from invgen.grid import Grid
from invgen.operators import EPL, SIE, ExternalShear, GravitationalLens, sky_grid

torch.set_num_threads(1)
D = torch.float64
LENS = EPL(0.9, 0.7, 0.4, 0.02, -0.03, 1.1) + ExternalShear(0.04, -0.03)
SOURCE, IMAGE = sky_grid((14, 11), 0.11, center=(0.02, -0.01)), sky_grid((17, 20), (0.16, 0.14))


def kernel(shape, separable=False):
    g = torch.Generator().manual_seed(sum(shape))
    psf = (
        torch.rand(shape[0], 1, generator=g, dtype=D) * torch.rand(1, shape[1], generator=g, dtype=D)
        if separable
        else torch.rand(shape, generator=g, dtype=D)
    )
    return psf / psf.sum()


def draw(shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def interpolated(source, y, x, grid, edge="zero"):
    """Bilinear value of `source` at one position, written out."""
    p, q = (y - grid.origin[0]) / grid.spacing[0], (x - grid.origin[1]) / grid.spacing[1]
    n, m = grid.shape
    if edge == "extrapolate":
        if not (-0.5 <= p <= n - 0.5 and -0.5 <= q <= m - 0.5):
            return 0.0
        i, j = min(max(math.floor(p), 0), n - 2), min(max(math.floor(q), 0), m - 2)
    else:
        i, j = math.floor(p), math.floor(q)
    total = 0.0
    for a in (i, i + 1):
        for b in (j, j + 1):
            if 0 <= a < n and 0 <= b < m:
                weight = (p - i if a > i else 1 - p + i) * (q - j if b > j else 1 - q + j)
                total += weight * float(source[a, b])
    return total


def imaged(source, s=1, psf=None, edge="zero", flux=False):
    """The image by loops: rays of a frame around it, the mean of a pixel, the convolution."""
    psf = torch.ones(1, 1, dtype=D) if psf is None else psf
    (H, W), (ky, kx) = IMAGE.shape, psf.shape
    cy, cx = ky // 2, kx // 2

    def pixel(i, j):
        total = 0.0
        for a in range(s):
            for b in range(s):
                y = IMAGE.origin[0] + IMAGE.spacing[0] * (i + (a + 0.5) / s - 0.5)
                x = IMAGE.origin[1] + IMAGE.spacing[1] * (j + (b + 0.5) / s - 0.5)
                beta = LENS.rays(torch.tensor(y, dtype=D), torch.tensor(x, dtype=D))
                total += interpolated(source, float(beta[0]), float(beta[1]), SOURCE, edge)
        return total / s**2

    known = {(i, j): pixel(i, j) for i in range(-ky, H + ky) for j in range(-kx, W + kx)}
    out = torch.zeros(H, W, dtype=D)
    for i in range(H):
        for j in range(W):
            out[i, j] = sum(
                float(psf[a, b]) * known[i - a + cy, j - b + cx] for a in range(ky) for b in range(kx) if psf[a, b] != 0
            )
    area = math.prod(IMAGE.spacing) / math.prod(SOURCE.spacing)
    return out * area if flux else out


@pytest.mark.parametrize(
    ("shape", "separable", "s", "edge", "flux"),
    [
        (None, False, 1, "zero", False),
        (None, False, 2, "extrapolate", True),
        ((3, 3), False, 1, "zero", True),
        ((4, 3), False, 1, "zero", False),
        ((2, 5), True, 2, "zero", False),
    ],
)
def test_image_is_the_definition(shape, separable, s, edge, flux):
    psf = None if shape is None else kernel(shape, separable)
    quantity = "flux" if flux else "surface_brightness"
    A = GravitationalLens(LENS, SOURCE, IMAGE, psf, s, edge=edge, quantity=quantity)
    assert (A.plane.spread is not None and A.plane.spread.factors is not None) == separable
    x = draw((1, 1, *SOURCE.shape))
    torch.testing.assert_close(A(x)[0, 0], imaged(x[0, 0], s, psf, edge, flux), rtol=0, atol=1e-12)


SHAPES = [None, (1, 1), (5, 5), (4, 6), (3, 7), (17, 20)]


@pytest.mark.parametrize("separable", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [True, False])
def test_dot_test_and_own_matrix(shape, masked, separable):
    psf = None if shape is None else kernel(shape, separable)
    mask = draw(IMAGE.shape, 5) > 0 if masked else None
    A = GravitationalLens(LENS, SOURCE, IMAGE, psf, 2, mask)
    x, d = draw((3, *A.model_shape), 1), draw((3, *A.data_shape), 2)
    left, right = (A(x) * d).flatten(1).sum(1), (A.adjoint(d) * x).flatten(1).sum(1)
    torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-11)
    M = A.to_dense()
    torch.testing.assert_close(A(x).flatten(1), x.flatten(1) @ M.T, rtol=0, atol=1e-12)
    if masked:
        whole = GravitationalLens(LENS, SOURCE, IMAGE, psf, 2)
        torch.testing.assert_close(A(x), whole(x)[:, 0][:, mask], rtol=0, atol=1e-12)
    single = A(x.float())
    assert single.dtype == torch.float32
    assert float((single - A(x)).abs().max()) < 1e-5


def test_no_lens_is_the_source_and_keeps_its_flux():
    grid = sky_grid((9, 12), 0.1)
    A = GravitationalLens.from_rays(*GravitationalLens.ray_positions(grid), grid, grid)
    x = draw((2, 1, 9, 12))
    torch.testing.assert_close(A(x), x, rtol=0, atol=1e-12)
    assert A.outside_fraction == 0.0
    coarse = sky_grid((6, 8), 0.2)
    rays = GravitationalLens.ray_positions(coarse, 8)
    B = GravitationalLens.from_rays(*rays, grid, coarse, oversampling=8, quantity="flux")
    inner = torch.zeros(1, 1, 9, 12, dtype=D)
    inner[..., 2:-2, 2:-2] = 1.0
    torch.testing.assert_close(B(inner).sum(), inner.sum(), rtol=1e-3, atol=0)


@pytest.mark.filterwarnings("ignore:.*miss the source frame")
def test_images_of_an_isothermal_lens():
    """A source β behind a singular isothermal sphere is seen at β ± θ_E."""
    source, image = sky_grid((41, 41), 0.02), sky_grid((101, 101), 0.04)
    A = GravitationalLens(SIE(1.2), source, image, oversampling=4)
    x = torch.zeros(1, 1, 41, 41, dtype=D)
    x[0, 0, 20, 30] = 1.0  # β_x = 0.2
    d = A(x)[0, 0]
    seen = d[50]  # the row y = 0
    place = torch.as_tensor(image.coordinates("x"))
    assert abs(float(place[60:][seen[60:].argmax()]) - 1.4) <= 0.04
    assert abs(float(place[:40][seen[:40].argmax()]) + 1.0) <= 0.04


def test_rays_of_another_program():
    psf = kernel((4, 5))
    A = GravitationalLens(LENS, SOURCE, IMAGE, psf, 2)
    y, x = GravitationalLens.ray_positions(IMAGE, 2, psf)
    B = GravitationalLens.from_rays(*LENS.rays(y, x), SOURCE, IMAGE, psf=psf, oversampling=2)
    v = draw((2, *A.model_shape))
    torch.testing.assert_close(A(v), B(v), rtol=0, atol=1e-14)
    # rays of the image alone: what is beyond it is dark, which its middle does not see
    y, x = GravitationalLens.ray_positions(IMAGE, 2)
    C = GravitationalLens.from_rays(*LENS.rays(y, x), SOURCE, IMAGE, psf=psf, oversampling=2)
    torch.testing.assert_close(A(v)[..., 4:-4, 4:-4], C(v)[..., 4:-4, 4:-4], rtol=0, atol=1e-13)
    assert not torch.allclose(A(v), C(v))
    with pytest.raises(ValueError, match="ray_positions"):
        GravitationalLens.from_rays(y[1:], x[1:], SOURCE, IMAGE, oversampling=2)


def test_rays_outside_the_source_are_counted():
    A = GravitationalLens(LENS, SOURCE, IMAGE)
    y, x = LENS.rays(*GravitationalLens.ray_positions(IMAGE))
    missed = 0
    for b, q in zip(y.flatten().tolist(), x.flatten().tolist()):
        p, r = (b - SOURCE.origin[0]) / SOURCE.spacing[0], (q - SOURCE.origin[1]) / SOURCE.spacing[1]
        missed += not (-0.5 <= p <= 13.5 and -0.5 <= r <= 10.5)
    assert A.outside_fraction == pytest.approx(missed / 340)
    assert missed > 0
    with pytest.warns(UserWarning, match="miss the source frame"):
        GravitationalLens(LENS, sky_grid((5, 5), 0.01), IMAGE)
    ring = (LENS.rays(*GravitationalLens.ray_positions(IMAGE))[0].abs() < 0.3) & (x.abs() < 0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert GravitationalLens(LENS, SOURCE, IMAGE, mask=ring).outside_fraction == 0.0


@pytest.mark.parametrize("size", [(6, 5), (14, 11)])
def test_solves_are_direct_where_the_smaller_side_is_small(size):
    A = GravitationalLens(LENS, sky_grid(size, 0.2), sky_grid((9, 8), 0.3), kernel((3, 4)))
    M = A.to_dense()
    b, m = draw((2, *A.data_shape), 3), draw((2, *A.model_shape), 4)
    r, c = torch.tensor([0.3, 1e-4], dtype=D), torch.tensor([2.0, 5.0], dtype=D)
    data, update = A.solve(b, r, c), A.solve_model(m, r, c)
    assert int(data.iterations) == int(update.iterations) == 0
    for i in range(2):
        S = r[i] * torch.eye(len(M), dtype=D) + c[i] * M @ M.T
        torch.testing.assert_close(data.x[i].flatten(), torch.linalg.solve(S, b[i].flatten()), rtol=1e-7, atol=1e-7)
        S = M.T @ M / r[i] + torch.eye(M.shape[1], dtype=D) / c[i]
        torch.testing.assert_close(update.x[i].flatten(), torch.linalg.solve(S, m[i].flatten()), rtol=1e-7, atol=1e-7)
    iterated = GravitationalLens(LENS, sky_grid(size, 0.2), sky_grid((9, 8), 0.3), kernel((3, 4)), direct_limit=0)
    solved = iterated.solve(b, 0.3, 2.0)
    assert int(solved.iterations) > 0
    torch.testing.assert_close(solved.x, A.solve(b, 0.3, 2.0).x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"psf": torch.ones(3, 3)}, "sums to 9.*psf / psf.sum"),
        ({"psf": torch.full((19, 3), 1 / 57)}, "larger than the image"),
        ({"psf": torch.tensor([1.0])}, "real, finite image"),
        ({"mask": torch.zeros(17, 20, dtype=torch.bool)}, "leaves no pixel"),
        ({"mask": torch.ones(17, 20)}, "must be boolean"),
        ({"quantity": "counts"}, "quantity must be"),
        ({"edge": "wrap"}, "edge must be"),
        ({"oversampling": 0}, "oversampling"),
        ({"free": ("slop",)}, "no parameter slop"),
    ],
)
def test_bad_input(options, words):
    with pytest.raises(ValueError, match=words):
        GravitationalLens(LENS, SOURCE, IMAGE, **options)


def test_grids_without_units_ask_for_them():
    with pytest.raises(ValueError, match="sky_grid"):
        GravitationalLens(LENS, Grid((14, 11), (0.1, 0.1)), IMAGE)
    with pytest.raises(ValueError, match="arcsec"):
        GravitationalLens(LENS, SOURCE, Grid((14, 11), (0.1, 0.1), axes=("y", "x"), units=("deg", "deg")))
