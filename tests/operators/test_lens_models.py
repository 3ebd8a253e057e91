"""Deflection angles against closed forms, each other and finite differences."""

import math

import numpy as np
import pytest
import torch
from scipy.special import hyp2f1

from invgen.operators import (
    EPL,
    NFW,
    SIE,
    SIS,
    ExternalShear,
    PointMass,
    critical_curves,
    effective_einstein_radius,
    sky_grid,
)

torch.set_num_threads(1)
LENSES = {
    "sie": SIE(1.2, 0.7, 0.4, 0.1, -0.05),
    "sie round": SIE(1.2, 1.0),
    "epl": EPL(1.1, 0.6, -0.3, 0.05, 0.02, 1.3),
    "epl steep": EPL(0.9, 0.8, 1.0, slope=1.9),
    "epl thin": EPL(0.9, 0.06, 1.0, slope=0.6),
    "shear": ExternalShear(0.05, -0.08),
    "sis": SIS(0.8, 0.1, 0.2),
    "point": PointMass(0.7, -0.1, 0.05),
    "nfw": NFW(0.7, 0.3, 0.02, 0.03),
    "sum": EPL(1.1, 0.6, -0.3, slope=1.1) + ExternalShear(0.05, -0.08) + PointMass(0.2, 0.5, 0.5),
}


def positions(n=200, seed=0):
    return torch.randn(2, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1.5


def power_law(q, t, y, x, radius=1.2):
    """Tessore & Metcalf (2015) equation 13 with SciPy's hypergeometric function."""
    y, x = y.numpy(), x.numpy()
    R, phi, b = np.sqrt(q * q * x * x + y * y), np.arctan2(y, q * x), radius * math.sqrt(q)
    z = -(1 - q) / (1 + q) * np.exp(2j * phi)
    return 2 * b / (1 + q) * (b / R) ** (t - 1) * np.exp(1j * phi) * hyp2f1(1, t / 2, 2 - t / 2, z)


@pytest.mark.parametrize("q", [1.0, 0.999999, 0.7, 0.2, 0.05])
@pytest.mark.parametrize("t", [0.3, 0.9, 1.0, 1.4, 1.9])
def test_power_law_against_the_hypergeometric_function(q, t):
    y, x = positions()
    alpha_y, alpha_x = EPL(1.2, q, slope=t).deflection(y, x)
    want = power_law(q, t, y, x)
    scale = abs(want).max()
    assert abs(alpha_x.numpy() - want.real).max() < 1e-11 * scale
    assert abs(alpha_y.numpy() - want.imag).max() < 1e-11 * scale
    single = EPL(1.2, q, slope=t).deflection(y.float(), x.float())
    assert single[0].dtype == torch.float32
    assert float((single[1] - alpha_x).abs().max()) < 5e-6 * scale


def test_number_of_terms_follows_the_axis_ratio_of_the_call():
    y, x = positions()
    want = EPL(1.2, 0.1, slope=1.3).deflection(y, x)[0]
    for q in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        torch.testing.assert_close(EPL(1.2, 0.95, slope=1.3).deflection(y, x, axis_ratio=q)[0], want)


@pytest.mark.parametrize("q", [1.0, 0.9, 0.3, 0.05])
def test_isothermal_power_law_is_the_isothermal_ellipsoid(q):
    y, x = positions()
    for a, b in zip(EPL(1.2, q, 0.4, 0.1, -0.05).deflection(y, x), SIE(1.2, q, 0.4, 0.1, -0.05).deflection(y, x)):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-11)
    if q == 1.0:
        for a, b in zip(SIS(1.2, 0.1, -0.05).deflection(y, x), SIE(1.2, q, 0.4, 0.1, -0.05).deflection(y, x)):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_convergence_is_the_stated_one():
    y, x = positions()
    sie, epl = SIE(1.2, 0.6), EPL(1.2, 0.6, slope=1.4)
    torch.testing.assert_close(sie.convergence(y, x), 0.6 / (0.6 * x**2 + y**2 / 0.6).sqrt(), rtol=1e-10, atol=0)
    R = (0.36 * x**2 + y**2).sqrt()
    torch.testing.assert_close(epl.convergence(y, x), 0.3 * (1.2 * math.sqrt(0.6) / R) ** 1.4, rtol=1e-9, atol=0)
    assert float(PointMass(1.0).convergence(y, x).abs().max()) < 1e-9
    assert float(ExternalShear(0.1, 0.2).convergence(y, x).abs().max()) < 1e-15
    # NFW: κ = 2 κ_s (1 − A(1 − x²))/(x² − 1) (Wright & Brainerd 2000, equation 11), away from x = 1
    r = torch.tensor([0.01, 0.2, 0.5, 1.5, 4.0], dtype=torch.float64)
    s = r / 0.7
    A = torch.where(s < 1, torch.acosh(1 / s) / (1 - s**2).abs().sqrt(), torch.acos(1 / s) / (s**2 - 1).abs().sqrt())
    torch.testing.assert_close(
        NFW(0.7, 0.3).convergence(torch.zeros_like(r), r), 0.6 * (1 - A) / (s**2 - 1), rtol=1e-9, atol=0
    )


def test_halo_is_smooth_through_its_scale_radius():
    r = 0.7 * (1 + torch.tensor([-1e-2, -1e-6, -1e-12, 0.0, 1e-12, 1e-6, 1e-2], dtype=torch.float64))
    kappa = NFW(0.7, 0.3).convergence(torch.zeros_like(r), r)
    assert float((kappa - 0.2).abs()[1:-1].max()) < 1e-6  # κ(r_s) = 2 κ_s/3
    assert (kappa.diff() <= 1e-12).all()


@pytest.mark.parametrize("key", LENSES)
def test_gradients_in_parameters_and_positions(key):
    lens = LENSES[key]
    y, x = (p.requires_grad_() for p in positions(6, seed=3))
    names = list(lens.parameters)
    values = [torch.full((1,), v, dtype=torch.float64, requires_grad=True) for v in lens.parameters.values()]
    if "axis_ratio" in names and lens.parameters["axis_ratio"] == 1.0:
        values[names.index("axis_ratio")] = torch.tensor([0.999999], dtype=torch.float64, requires_grad=True)

    def deflect(y, x, *values):
        return torch.stack(lens.deflection(y, x, **dict(zip(names, values))))

    assert torch.autograd.gradcheck(deflect, (y, x, *values), eps=1e-7, atol=1e-5)


def test_gradients_are_finite_at_a_circle_and_at_the_centre():
    for lens in (SIE(1.2), EPL(1.2), NFW(0.5, 0.2), SIS(1.0), PointMass(1.0)):
        values = {n: torch.tensor([v], requires_grad=True) for n, v in lens.parameters.items()}
        y, x = torch.tensor([0.0, 1e-3, 0.5]), torch.tensor([0.0, 0.0, 0.5])
        total = sum(a.sum() for a in lens.deflection(y, x, **values))
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(total, list(values.values())))


def test_jacobian_against_differences():
    lens, h = LENSES["sum"], 1e-6
    y, x = positions(50)
    J = lens.jacobian(y, x)
    for column, (dy, dx) in enumerate(((h, 0), (0, h))):
        plus, minus = lens.rays(y + dy, x + dx), lens.rays(y - dy, x - dx)
        for row in range(2):
            torch.testing.assert_close(J[:, row, column], (plus[row] - minus[row]) / (2 * h), rtol=1e-6, atol=1e-6)
    assert float((J[:, 0, 1] - J[:, 1, 0]).abs().max()) < 1e-10 * float(J.abs().max())  # no rotation
    torch.testing.assert_close(lens.magnification(y, x), 1 / torch.linalg.det(J))


def test_parameters_of_a_batch_are_those_of_each_item():
    lens = LENSES["sum"]
    y, x = positions(30)
    radius, gamma = torch.tensor([0.8, 1.0, 1.3], dtype=torch.float64), torch.tensor([0.0, 0.1, -0.1])
    both = lens.deflection(y[None], x[None], epl_einstein_radius=radius, gamma_1=gamma)
    for i in range(3):
        one = lens.at(epl_einstein_radius=float(radius[i]), gamma_1=float(gamma[i])).deflection(y, x)
        torch.testing.assert_close(both[0][i], one[0])
        torch.testing.assert_close(both[1][i], one[1])


def test_names_in_a_sum():
    both = SIE(1.2, name="main") + SIE(0.3, 0.9, name="satellite") + ExternalShear(0.02)
    assert {"main_einstein_radius", "satellite_einstein_radius", "gamma_1", "gamma_2"} <= set(both.parameters)
    assert both.parameters["satellite_axis_ratio"] == 0.9
    assert set((SIE(1.0) + ExternalShear()).parameters) == {
        "einstein_radius", "axis_ratio", "angle", "center_y", "center_x", "gamma_1", "gamma_2",
    }  # fmt: skip
    with pytest.raises(ValueError, match="name of its own"):
        SIE(1.2) + SIE(0.3)
    with pytest.raises(ValueError, match="no parameter slope"):
        both.deflection(*positions(3), slope=1.0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SIE(-1.0), "einstein_radius above 0, got -1"),
        (lambda: SIE(0.0), "einstein_radius above 0"),
        (lambda: SIE(1.0, 0.0), "axis_ratio between 0 and 1"),
        (lambda: SIE(1.0, 1.1), "axis_ratio between 0 and 1"),
        (lambda: EPL(1.0, slope=2.0), "slope between 0 and 2"),
        (lambda: NFW(0.0, 1.0), "scale_radius above 0"),
        (lambda: SIS(math.nan), "einstein_radius above 0"),
        (lambda: SIE(1.0, angle=math.inf), "angle finite"),
        (lambda: SIE(1.0).at(axis_ratio=2.0), "axis_ratio between 0 and 1"),
        (lambda: SIE(1.0).deflection(*positions(2), axis_ratio=-0.5), "axis_ratio between 0 and 1"),
    ],
)
def test_numbers_out_of_range_raise(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_tensors_out_of_range_spoil_their_own_item_only():
    y, x = positions(10)
    for lens in (SIE(1.0, 0.8), EPL(1.0, 0.8)):
        q = torch.tensor([0.8, 1.2, -0.1], dtype=torch.float64)
        alpha = lens.deflection(y[None], x[None], axis_ratio=q)[0]
        assert torch.isfinite(alpha[0]).all()
        assert torch.isnan(alpha[1:]).all()


def test_critical_curves_and_caustics():
    grid = sky_grid((60, 60), 0.1)
    curves = critical_curves(SIS(1.2, 0.1, -0.05), grid)
    (ring,), (point,) = curves
    radius = np.hypot(ring[:, 0] - 0.1, ring[:, 1] + 0.05)
    assert abs(radius - 1.2).max() < 1e-8
    assert abs(point - [0.1, -0.05]).max() < 1e-7
    # the critical curve of an isothermal ellipsoid is κ = 1/2 and encloses π θ_E²
    lens = SIE(1.3, 0.6, 0.4, 0.1, -0.05)
    (line,), (caustic,) = critical_curves(lens, grid)
    kappa = lens.convergence(*(torch.from_numpy(line[:, k].copy()) for k in (0, 1)))
    assert float((kappa - 0.5).abs().max()) < 1e-8
    assert effective_einstein_radius(lens, grid) == pytest.approx(1.3, rel=1e-3)
    # the cusps of its caustic are the images of the ends of the critical curve's axes
    e = 0.8
    own = caustic - [0.1, -0.05]
    along = own[:, 1] * math.cos(0.4) + own[:, 0] * math.sin(0.4)
    across = own[:, 0] * math.cos(0.4) - own[:, 1] * math.sin(0.4)
    root = 1.3 * math.sqrt(0.6)
    assert abs(along).max() == pytest.approx(root * abs(1 / 0.6 - math.atan(e / 0.6) / e), rel=1e-2)
    assert abs(across).max() == pytest.approx(root * abs(1 - math.atanh(e) / e), rel=1e-2)
    # a point mass: its Einstein ring, whose caustic is the point itself
    assert effective_einstein_radius(PointMass(0.7), grid) == pytest.approx(0.7, rel=1e-3)
    with pytest.raises(ValueError, match="no closed critical curve"):
        effective_einstein_radius(ExternalShear(0.1), grid)
