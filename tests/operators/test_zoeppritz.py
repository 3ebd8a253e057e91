"""Exact reflection coefficients, against PyLops' solution of the Zoeppritz equations and the linearised operator."""

import numpy as np
import pytest
import torch
from pylops.avo.avo import zoeppritz_element

from invgen.operators import PreStack, Zoeppritz, check_elastic_model, elastic_logarithms, reflection_coefficients

D = torch.float64
ANGLES = torch.tensor([0.0, 10.0, 20.0, 30.0], dtype=D)
UPPER, LOWER = np.array([2500.0, 1100.0, 2200.0]), np.array([2900.0, 1500.0, 2350.0])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def column(values):
    return torch.from_numpy(np.log(values)).reshape(1, 3, 1, 1)


@pytest.mark.parametrize(("wave", "element"), [("pp", "PdPu"), ("ps", "PdSu")])
@pytest.mark.parametrize("pair", [(UPPER, LOWER), (LOWER, UPPER), (UPPER, UPPER * np.array([1.3, 0.8, 0.9]))])
def test_exact_coefficients_are_pylops(wave, element, pair):
    want = zoeppritz_element(*pair[0], *pair[1], ANGLES.numpy(), element)
    got = reflection_coefficients(column(pair[0]), column(pair[1]), ANGLES, wave).flatten()
    np.testing.assert_allclose(got.numpy(), want, atol=1e-12)


def test_units_do_not_matter_as_long_as_they_are_one():
    feet = column(UPPER * np.array([3.28, 3.28, 0.001])), column(LOWER * np.array([3.28, 3.28, 0.001]))
    want = reflection_coefficients(column(UPPER), column(LOWER), ANGLES)
    assert torch.allclose(reflection_coefficients(*feet, ANGLES), want, atol=1e-13)


@pytest.mark.parametrize(("wave", "linear"), [("pp", "aki_richards"), ("ps", "ps")])
def test_its_derivative_at_a_constant_model_is_the_linearised_operator(wave, linear):
    shape, vsvp = (3, 9, 2), 1100 / 2500
    wavelet = randn(5, seed=1)
    exact = Zoeppritz(wavelet, ANGLES, shape, wave=wave)
    linearised = PreStack(wavelet, ANGLES, shape, vsvp=vsvp, linearization=linear, kind="forward")
    m0 = column(UPPER).expand(1, *shape)
    v = randn(1, *shape, seed=2)
    value, slope = torch.func.jvp(exact, (m0.contiguous(),), (v,))
    assert value.abs().max() < 1e-12  # nothing reflects
    torch.testing.assert_close(slope, linearised(v), rtol=0, atol=1e-11)


def test_a_profile_goes_through_the_wavelet_like_poststack():
    m = torch.from_numpy(np.log(np.where(np.arange(12)[:, None] < 6, UPPER, LOWER)).T[None, :, :, None].copy())
    wavelet = randn(5, seed=1)
    d = Zoeppritz(wavelet, ANGLES, (3, 12, 1))(m)[0, :, :, 0]
    r = reflection_coefficients(column(UPPER), column(LOWER), ANGLES)[0, :, 0, 0]
    assert torch.allclose(d[:, 3:8], r[:, None] * wavelet)
    assert torch.count_nonzero(d[:, :3]) == torch.count_nonzero(d[:, 8:]) == 0


def test_beyond_the_critical_angle_it_stays_finite_and_says_so():
    fast = LOWER * np.array([2.0, 1.5, 1.0])  # critical at about 26 degrees
    m = torch.from_numpy(np.log(np.where(np.arange(8)[:, None] < 4, UPPER, fast)).T[None, :, :, None].copy())
    op = Zoeppritz(torch.tensor([1.0]), ANGLES, (3, 8, 1))
    assert op.beyond_critical(m).tolist() == [1]
    x = m.clone().requires_grad_()
    d = op(x)
    assert torch.isfinite(d).all()
    assert d.abs().max() <= 1
    (g,) = torch.autograd.grad(d.square().sum(), x)
    assert torch.isfinite(g).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"wave": "sp"}, "reflected wave"),
        ({"angles": [0.1, 0.5]}, "radians"),
        ({"angles": [10.0, 87.0]}, "84 degrees"),
        ({"shape": (2, 9, 2)}, "three properties"),
        ({"wavelet": torch.ones(3, 5)}, "one an angle"),
        ({"wavelet": torch.ones(30)}, "longer than the trace"),
    ],
)
def test_bad_input(change, words):
    with pytest.raises(ValueError, match=words):
        Zoeppritz(**{"wavelet": torch.ones(5), "angles": ANGLES, "shape": (3, 9, 2), **change})


# --- units ------------------------------------------------------------------------------------------------------------


def rocks(vp=1.0, vs=1.0, rho=1.0):
    """A section in m/s and kg/m3, times factors."""
    g = torch.Generator().manual_seed(3)
    u = torch.rand(20, 6, generator=g, dtype=D)
    return (1600 + 2200 * u) * vp, (400 + 1800 * u) * vs, (1900 + 700 * u) * rho


def stacked(*factors):
    return torch.stack([v.log() for v in rocks(*factors)])


def test_units_are_named():
    assert check_elastic_model(stacked()) == ("m/s", "m/s", "kg/m³")
    assert check_elastic_model(stacked(1e-3, 1e-3, 1e-3)) == ("km/s", "km/s", "g/cm³")
    vp, vs, rho = rocks()
    model = elastic_logarithms(vp, vs, rho, parameters="impedances")
    assert torch.allclose(model[0].exp(), vp * rho)
    assert check_elastic_model(model, "impedances") == ("m/s·kg/m³", "m/s·kg/m³", "kg/m³")


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        ((1e-3, 1e-3, 1.0), "mixes units: vp in km/s, vs in km/s, rho in kg/m³"),
        ((1.0, 1.0, 1e-3), "mixes units: vp in m/s, vs in m/s, rho in g/cm³"),
        ((1.0, 1e-3, 1.0), "mixes units: vp in m/s, vs in km/s"),
        ((1e-3, 3.28, 1e-3), "mixes units: vp in km/s, vs in ft/s"),
    ],
)
def test_mixed_units_are_named(factors, words):
    with pytest.raises(ValueError, match=words):
        check_elastic_model(stacked(*factors))
    with pytest.raises(ValueError, match=r"mixes units|different units"):
        elastic_logarithms(*rocks(*factors))


@pytest.mark.parametrize(("factor", "words"), [(1.0, "vp in m/s, vs in m/s, rho in kg/m³"), (1e-3, "vp in km/s")])
def test_a_model_without_logarithms_is_named(factor, words):
    with pytest.raises(ValueError, match=f"not in logarithms: it looks like {words}"):
        check_elastic_model(torch.stack(rocks(factor, factor, factor)))


def test_other_bad_elastic_models():
    vp, vs, rho = rocks()
    with pytest.raises(ValueError, match="no rock"):
        check_elastic_model(torch.stack([v.log() - v.log().mean() for v in rocks()]))  # the background was taken off
    with pytest.raises(ValueError, match="exchanged"):
        elastic_logarithms(vs, vp, rho)
    with pytest.raises(ValueError, match="must be positive"):
        elastic_logarithms(vp, vs.clone().fill_(0.0), rho)
    with pytest.raises(ValueError, match="one shape"):
        elastic_logarithms(vp, vs[:1], rho)
    with pytest.raises(ValueError, match="NaN"):
        check_elastic_model(stacked() * float("nan"))
