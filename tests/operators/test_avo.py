"""Pre-stack modelling: equal to PyLops, right where PyLops is not (converted waves), and the direct solves."""

import numpy as np
import pylops
import pytest
import torch
from pylops.avo.avo import zoeppritz_element, zoeppritz_pp
from pylops.avo.prestack import PrestackLinearModelling

from invgen.covariance import Diagonal, Scalar
from invgen.grid import Grid
from invgen.linalg import dot_test
from invgen.operators import PreStack, ava_coefficients, check_angles, ricker
from invgen.operators.algebra import compose
from invgen.transforms import Affine

pytestmark = pytest.mark.filterwarnings("ignore")
D = torch.float64
NZ, NX = 24, 3
ANGLES = np.array([0.0, 8.0, 16.0, 24.0, 32.0])


def randn(*shape, seed=0, dtype=D):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def theirs(wavelet, angles, vsvp, linearization, kind, explicit=False):
    return PrestackLinearModelling(
        wavelet, angles, vsvp=vsvp, nt0=NZ, spatdims=NX, linearization=linearization, kind=kind, explicit=explicit
    )


def profile():
    return torch.linspace(0.38, 0.61, NZ, dtype=D)


@pytest.mark.parametrize("kind", ["centered", "forward"])
@pytest.mark.parametrize("ours", ["aki_richards", "fatti", "ps_pylops"])
@pytest.mark.parametrize("varying", [False, True])
def test_equal_to_pylops(kind, ours, varying):
    name = {"aki_richards": "akirich", "fatti": "fatti", "ps_pylops": "ps"}[ours]
    wavelet, vsvp = randn(9, seed=1).numpy(), profile().numpy() if varying else 0.47
    op = PreStack(wavelet, ANGLES, (3, NZ, NX), vsvp=vsvp, linearization=ours, kind=kind)
    reference = theirs(wavelet, ANGLES, vsvp, name, kind)
    m, d = randn(2, 3, NZ, NX, seed=2), randn(2, len(ANGLES), NZ, NX, seed=3)
    for got, apply, given in ((op(m), reference.matvec, m), (op.adjoint(d), reference.rmatvec, d)):
        # PyLops keeps the channel (or angle) axis second: (nz, 3, nx)
        want = np.stack([apply(v.permute(1, 0, 2).numpy().ravel()).reshape(NZ, -1, NX) for v in given])
        assert relative(got, torch.from_numpy(want).permute(0, 2, 1, 3)) < 1e-12
    single = op(m.float())
    assert relative(single.double(), op(m)) < 1e-5


def test_equal_to_the_explicit_form_of_pylops_whose_axes_are_channels_first():
    wavelet = randn(9, seed=1).numpy()
    op = PreStack(wavelet, ANGLES, (3, NZ, NX), vsvp=profile(), linearization="akirich")
    reference = theirs(wavelet, ANGLES, profile().numpy(), "akirich", "centered", explicit=True)
    m = randn(1, 3, NZ, NX, seed=2)
    want = (reference @ m.numpy().ravel()).reshape(1, len(ANGLES), NZ, NX)
    assert relative(op(m), torch.from_numpy(want)) < 1e-12


def test_a_field_of_vsvp_is_a_profile_for_each_trace():
    field = torch.stack([profile(), profile().flip(0), profile() * 0.8], dim=1)
    m = randn(2, 3, NZ, NX, seed=2)
    op = PreStack(randn(7, seed=1), ANGLES, (3, NZ, NX), vsvp=field)
    for i in range(NX):
        one = PreStack(randn(7, seed=1), ANGLES, (3, NZ, 1), vsvp=field[:, i])
        assert relative(op(m)[..., i : i + 1], one(m[..., i : i + 1])) < 1e-12
    assert dot_test(op, op.adjoint, m, randn(2, 5, NZ, NX, seed=4)) < 1e-12


def test_wavelets_for_each_angle_and_reflector():
    wavelets, m = randn(5, NZ, 7, seed=5), randn(2, 3, NZ, NX, seed=2)
    unit = PreStack(torch.tensor([1.0]), ANGLES, (3, NZ, NX), vsvp=profile())(m)
    each = PreStack(wavelets, ANGLES, (3, NZ, NX), vsvp=profile())(m)
    for a in range(5):
        W = pylops.utils.signalprocessing.nonstationary_convmtx(wavelets[a].numpy(), NZ, hc=3, pad=(NZ, NZ))
        assert relative(each[:, a], torch.from_numpy(W) @ unit[:, a]) < 1e-12
    fixed = PreStack(wavelets[:, 0], ANGLES, (3, NZ, NX), vsvp=0.5)(m)
    one = PreStack(wavelets[2, 0], ANGLES, (3, NZ, NX), vsvp=0.5)(m)
    assert relative(fixed[:, 2], one[:, 2]) < 1e-12


@pytest.mark.parametrize(("name", "element"), [("aki_richards", "PdPu"), ("ps", "PdSu"), ("fatti", "PdPu")])
def test_coefficients_are_the_first_order_of_the_exact_equations(name, element):
    """Central differences of the Zoeppritz equations by each logarithm, about vp, vs, rho that are not round."""
    base, angles = np.log([3000.0, 1400.0, 2300.0]), np.array([4.0, 17.0, 33.0])
    # ln Ip = ln vp + ln rho: a step of ln Ip alone is one of ln vp; a step of ln rho alone takes both velocities along
    channels = np.eye(3) if name != "fatti" else np.array([[1, 0, 0], [0, 1, 0], [-1, -1, 1]], dtype=float)
    G = ava_coefficients(torch.from_numpy(angles), torch.tensor(1400.0 / 3000.0, dtype=D), name)
    eps = 1e-4
    for k, step in enumerate(channels):
        up, down = np.exp(base - eps * step / 2), np.exp(base + eps * step / 2)
        slope = zoeppritz_element(*up, *down, angles, element) / eps
        np.testing.assert_allclose(G[:, k].numpy(), slope, atol=3e-4)


def test_pylops_converted_waves_are_not_that_limit():
    """Why "ps" and "ps_pylops" differ; when PyLops changes, this says so."""
    angles = torch.tensor([10.0, 30.0], dtype=D)
    right, as_pylops = (ava_coefficients(angles, torch.tensor(0.5, dtype=D), k) for k in ("ps", "ps_pylops"))
    assert 1.9 < float(right[0, 1] / as_pylops[0, 1]) < 2.2


def test_at_normal_incidence_it_is_poststack_of_the_impedance():
    from invgen.operators import PostStack

    wavelet, m = ricker(np.arange(-8, 9) * 0.004, 30.0), randn(2, 3, NZ, NX)
    near = PreStack(wavelet, [0.0], (3, NZ, NX))(m)
    assert relative(near, PostStack(wavelet / 2, (1, NZ, NX))(m[:, :1] + m[:, 2:])) < 1e-12


CASES = {
    "constant": {"vsvp": 0.5},
    "profile": {"vsvp": profile()},
    "per angle": {"vsvp": 0.5, "wavelet": randn(5, 7, seed=1)},
    "few angles": {"vsvp": 0.5, "angles": [5.0, 25.0]},
}


@pytest.mark.parametrize("case", CASES)
def test_solves_are_direct_and_right(case):
    arguments = {"wavelet": randn(7, seed=1), "angles": ANGLES, **CASES[case]}
    op = PreStack(arguments["wavelet"], arguments["angles"], (3, 10, 2), vsvp=_cut(arguments["vsvp"], 10))
    A, c = op.to_dense(), torch.tensor([0.5, 2.0, 40.0], dtype=D)
    b, m = randn(3, *op.data_shape, seed=2), randn(3, *op.model_shape, seed=3)
    before = op.forward_count
    data, model = op.solve(b, 0.02, c), op.solve_model(m, 0.02, c)
    assert op.forward_count == before  # no iteration
    for i in range(3):
        S = 0.02 * torch.eye(len(A), dtype=D) + c[i] * A @ A.T
        assert relative(data.x[i].flatten(), torch.linalg.solve(S, b[i].flatten())) < 1e-9
        H = A.T @ A / 0.02 + torch.eye(A.shape[1], dtype=D) / c[i]
        assert relative(model.x[i].flatten(), torch.linalg.solve(H, m[i].flatten())) < 1e-9


def _cut(vsvp, n):
    return vsvp[:n] if isinstance(vsvp, torch.Tensor) else vsvp


@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("which", ["noise", "model", "both"])
def test_noise_by_angle_and_variance_by_channel_keep_the_direct_solve(varying, which):
    op = PreStack(randn(7, seed=1), ANGLES, (3, 10, 2), vsvp=profile()[:10] if varying else 0.5)
    r = torch.tensor([0.01, 0.02, 0.05, 0.1, 0.3], dtype=D)[:, None, None].expand(op.data_shape).contiguous()
    c = torch.tensor([0.5, 1.0, 0.2], dtype=D)[:, None, None].expand(op.model_shape).contiguous()
    each = torch.tensor([0.3, 2.0], dtype=D)
    R = Scalar(0.02, op.data_shape) if which == "model" else Diagonal(r)
    C = Scalar(each, op.model_shape) if which == "noise" else Diagonal(c)
    b, m, A = randn(2, *op.data_shape), randn(2, *op.model_shape, seed=1), op.to_dense()
    before = op.forward_count
    data, model = op.solve(b, R, C), op.solve_model(m, R, C)
    assert op.forward_count == before
    for i in range(2):
        Rd = 0.02 * torch.eye(len(A), dtype=D) if which == "model" else torch.diag(r.flatten())
        Cd = each[i] * torch.eye(A.shape[1], dtype=D) if which == "noise" else torch.diag(c.flatten())
        want = torch.linalg.solve(Rd + A @ Cd @ A.T, b[i].flatten())
        assert relative(data.x[i].flatten(), want) < 1e-9
        want = torch.linalg.solve(A.T @ torch.linalg.solve(Rd, A) + torch.linalg.inv(Cd), m[i].flatten())
        assert relative(model.x[i].flatten(), want) < 1e-9


def test_a_field_of_vsvp_takes_few_iterations_behind_its_lateral_average():
    field = profile()[:, None] + 0.03 * torch.sin(torch.arange(6, dtype=D))
    op = PreStack(ricker(np.arange(-8, 9) * 0.004, 30.0), ANGLES, (3, NZ, 6), vsvp=field)
    b, m, c = randn(2, *op.data_shape), randn(2, *op.model_shape, seed=1), torch.tensor([0.1, 1.0], dtype=D)
    A = op.to_dense()
    before = op.forward_count
    data, model = op.solve(b, 1e-3, c, rtol=1e-10), op.solve_model(m, 1e-3, c, rtol=1e-10)
    assert (op.forward_count - before) / 4 < 40  # several hundred without
    assert data.converged.all()
    assert model.converged.all()
    for i in range(2):
        want = torch.linalg.solve(1e-3 * torch.eye(len(A), dtype=D) + c[i] * A @ A.T, b[i].flatten())
        assert relative(data.x[i].flatten(), want) < 1e-6
        want = torch.linalg.solve(A.T @ A / 1e-3 + torch.eye(A.shape[1], dtype=D) / c[i], m[i].flatten())
        assert relative(model.x[i].flatten(), want) < 1e-6


def test_channel_scales_of_a_prior_keep_the_structure():
    scale = torch.tensor([0.1, 0.2, 0.05], dtype=D)
    op = PreStack(randn(7, seed=1), ANGLES, (3, 10, 2), vsvp=profile()[:10])
    u = randn(2, 3, 10, 2, seed=6)
    scaled = op.scaled_by_channel(scale)
    assert relative(scaled(u), op(u * scale[:, None, None])) < 1e-12
    shift = torch.tensor([8.0, 7.2, 7.7], dtype=D)
    moved = compose(op, Affine(shift, scale))
    assert relative(moved(u), op(shift[:, None, None] + u * scale[:, None, None])) < 1e-10
    assert isinstance(moved.linear, PreStack)  # so that solves in the prior's coordinates stay direct
    gain = torch.tensor([2.0, 0.5], dtype=D)
    assert relative(moved(u, wavelet_scale=gain), moved(u) * gain[:, None, None, None]) < 1e-12


def test_wavelet_scale_for_items_and_angles():
    op = PreStack.examples()[0]
    m, s = randn(2, *op.model_shape), torch.tensor([2.0, -1.0], dtype=D)
    assert torch.equal(op(m, wavelet_scale=s), op(m) * s[:, None, None, None])
    each = randn(2, 4, seed=9)
    assert torch.equal(op(m, wavelet_scale=each), op(m) * each[..., None, None])
    with pytest.raises(TypeError, match="wavelet_scale"):
        op(m, gain=s)


def grid(*channels, unit="s", spacing=0.004):
    return Grid((24, 3), (spacing, 12.5), axes=("t", "x"), units=(unit, "m"), channels=channels)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"angles": np.deg2rad(ANGLES)}, "radians"),
        ({"angles": [10.0, 95.0]}, "below 90"),
        ({"angles": np.ones((2, 2))}, "vector"),
        ({"vsvp": 2.0}, "Vp/Vs; give its inverse 0.5"),
        ({"vsvp": torch.ones(7)}, "profile"),
        ({"vsvp": -0.5}, "positive"),
        ({"linearization": "shuey"}, "linearization"),
        ({"shape": (1, 24, 3)}, r"\(3, nz, nx\)"),
        ({"wavelet": np.ones((2, 5))}, "one an angle"),
        ({"wavelet": np.ones(60)}, "longer than the trace"),
        ({"model_grid": grid("ln_ip", "ln_is", "ln_rho")}, 'choose "fatti"'),
        ({"model_grid": grid("ln_vp", "ln_vs", "ln_rho"), "linearization": "fatti"}, 'choose "aki_richards"'),
        ({"model_grid": grid("ln_vp", "ln_vs", "ln_rho"), "dt": 4.0}, "ms"),
        ({"model_grid": grid("ln_vp", "ln_vs", "ln_rho"), "dt": 0.002}, "resample"),
        ({"coefficients": torch.ones(4, 3)}, "coefficients"),
    ],
)
def test_bad_input(change, words):
    arguments = {"wavelet": np.ones(5), "angles": ANGLES, "shape": (3, 24, 3), **change}
    with pytest.raises(ValueError, match=words):
        PreStack(**arguments)


def test_a_grid_of_plain_values_is_said():
    """Right under a Log, which has the grid of its model; wrong alone."""
    with pytest.warns(UserWarning, match="takes logarithms"):
        PreStack(np.ones(5), ANGLES, (3, 24, 3), model_grid=grid("vp", "vs", "rho"))


def test_angles():
    assert torch.allclose(check_angles([0.1, 0.5], unit="radians"), torch.rad2deg(torch.tensor([0.1, 0.5], dtype=D)))
    assert torch.equal(check_angles([0.1, 0.5], unit="degrees"), torch.tensor([0.1, 0.5], dtype=D))
    assert torch.equal(check_angles([1.0]), torch.tensor([1.0], dtype=D))  # a single small angle is not suspicious
    with pytest.raises(ValueError, match="5 angles were given for data with 4"):
        check_angles(ANGLES, gathers=4)


def test_zoeppritz_pp_at_small_contrasts_is_the_gather():
    """A single interface through the whole operator, against PyLops' exact reflection coefficient."""
    upper, lower = np.array([3000.0, 1400.0, 2300.0]), np.array([3030.0, 1421.0, 2311.5])
    m = torch.from_numpy(np.log(np.where(np.arange(24)[:, None] < 12, upper, lower)).T[None, :, :, None].copy())
    op = PreStack(torch.tensor([1.0], dtype=D), ANGLES, (3, 24, 1), vsvp=0.467, kind="forward")
    np.testing.assert_allclose(op(m)[0, :, 11, 0].numpy(), zoeppritz_pp(*upper, *lower, ANGLES), atol=3e-5)
