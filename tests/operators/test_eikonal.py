"""First-arrival times against closed forms and fine grids; their gradient against finite differences."""

import numpy as np
import pytest
import torch

from invgen.grid import Grid
from invgen.operators import StraightRays, TravelTime

F64 = torch.float64


def gradient_medium(grid, v0, k):
    """v0 + k z on the grid, `(1, 1, nz, nx)`."""
    z = torch.from_numpy(grid.coordinates(0))
    return (v0 + k * z)[None, None, :, None].expand(1, 1, *grid.shape).clone()


def gradient_times(a, b, v0, k):
    """arccosh(1 + k² |b − a|² / (2 v_a v_b)) / k: the exact time where v = v0 + k z."""
    va, vb = v0 + k * a[:, 0], v0 + k * b[:, 0]
    return np.arccosh(1 + k**2 * ((b - a) ** 2).sum(1) / (2 * va * vb)) / k


def smooth_medium(shape, seed, contrast=0.35, length=3.0):
    """Velocities around 2 with a relative spread, smooth over some cells."""
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, 1, *shape, generator=g, dtype=F64)
    k = [torch.fft.fftfreq(n, dtype=F64) for n in shape]
    low = torch.exp(-2 * (torch.pi * length) ** 2 * (k[0][:, None] ** 2 + k[1][None] ** 2))
    field = torch.fft.ifft2(torch.fft.fft2(noise) * low).real
    return 2.0 * torch.exp(contrast * field / field.std())


def ends(grid, n, seed):
    rng = np.random.default_rng(seed)
    low = np.asarray(grid.origin) - 0.5 * np.asarray(grid.spacing)
    size = np.asarray(grid.shape) * np.asarray(grid.spacing)
    return low + rng.random((n, 2)) * size, low + rng.random((n, 2)) * size


@pytest.mark.parametrize("oversample", [1, 3])
@pytest.mark.parametrize("model", ["velocity", "slowness"])
def test_a_homogeneous_medium_is_exact(model, oversample):
    grid = Grid((13, 9), (2.0, 3.0), (-4.0, 7.0))
    a, b = ends(grid, 40, 0)
    a[0], b[0] = (0.0, 13.0), (0.5, 13.2)  # a source on a node, and a receiver beside it
    a[1], b[1] = (0.1, 13.1), (0.2, 13.3)  # both in one cell
    op = TravelTime(grid, a, b, model=model, oversample=oversample)
    times = op(torch.full((1, 1, 13, 9), 2.5, dtype=F64))[0].numpy()
    distance = np.linalg.norm(b - a, axis=1)
    np.testing.assert_allclose(times, distance / 2.5 if model == "velocity" else distance * 2.5, rtol=1e-12)


def test_a_linear_gradient_converges_at_first_order():
    errors = []
    for n in (16, 32, 64):
        grid = Grid((n, n), (64.0 / n, 64.0 / n), (32.0 / n, 32.0 / n))
        a, b = ends(grid, 60, 1)
        got = TravelTime(grid, a, b)(gradient_medium(grid, 1.5, 0.04))[0].numpy()
        want = gradient_times(a, b, 1.5, 0.04)
        errors.append(np.abs(got - want).max() / want.max())
    assert errors[2] < 2.5e-3
    assert errors[1] / errors[2] > 1.6
    assert errors[0] / errors[1] > 1.6


def test_oversampling_lowers_the_error():
    grid = Grid((24, 24), (64.0 / 24, 64.0 / 24), (32.0 / 24, 32.0 / 24))
    rng = np.random.default_rng(1)
    a, b = 6 + 52 * rng.random((40, 2)), 6 + 52 * rng.random((40, 2))
    want = gradient_times(a, b, 1.5, 0.04)
    slowness = 1 / gradient_medium(grid, 1.5, 0.04)
    errors = [
        np.abs(TravelTime(grid, a, b, model="slowness", oversample=k)(slowness)[0].numpy() - want).max()
        for k in (1, 2, 4)
    ]
    assert errors[0] / errors[1] > 1.6
    assert errors[1] / errors[2] > 1.6


def test_diving_waves_return_to_the_surface():
    grid = Grid((40, 120), (0.5, 0.5), (0.25, 0.25))
    op = TravelTime.surface(grid, 2, 12)
    assert op.data_shape == (24,)
    got = op(gradient_medium(grid, 1.0, 0.15))[0].numpy()
    b = np.tile([[0.0, (j + 0.5) * 5.0] for j in range(12)], (2, 1))
    a = op.source_points[op.source_of]
    want = gradient_times(a, b, 1.0, 0.15)
    # the cells at the surface have the velocity of their centres, 4 % above that of the surface: near offsets feel it
    assert np.abs(got - want).max() / want.max() < 4e-3
    straight = np.linalg.norm(b - a, axis=1)  # along the surface, at its velocity
    far = straight > 20
    assert (got[far] < 0.9 * straight[far]).all()


def test_an_unknown_medium_converges_to_a_fine_grid():
    coarse = Grid((12, 12), (4.0, 4.0), (2.0, 2.0))
    v = smooth_medium((12, 12), 3, length=1.5)[:1]

    def times(factor):
        fine = torch.nn.functional.interpolate(v, scale_factor=factor, mode="bilinear", align_corners=False)
        step = 4.0 / factor
        grid = Grid((12 * factor, 12 * factor), (step, step), (step / 2, step / 2))
        return TravelTime.crosshole(grid, 4, 4)(fine)[0]

    assert TravelTime.crosshole(coarse, 4, 4).data_shape == (16,)
    truth = times(8)
    errors = [float((times(f) - truth).abs().max() / truth.max()) for f in (1, 2, 4)]
    assert errors[0] < 0.05
    assert errors[2] < 0.5 * errors[0]
    assert errors[2] < 0.01


def test_nearly_homogeneous_times_are_those_of_straight_rays():
    """Fermat: bending changes a time at second order in the contrast; at first order only the grid differs."""
    grid = Grid((24, 24), (1.0, 1.0))
    rays, bent = StraightRays.crosshole(grid, 6, 6), TravelTime.crosshole(grid, 6, 6, model="slowness")
    s = (smooth_medium((24, 24), 4, 1.0, 6.0).log() - np.log(2.0))[:1]

    def change(op, eps):
        return (op(1 + eps * s) / op(torch.ones_like(s)) - 1).flatten()

    straight, curved = change(rays, 0.01), change(bent, 0.01)
    assert float(straight.abs().max()) > 5e-3
    assert float((straight - curved).abs().max()) < 0.15 * float(straight.abs().max())


@pytest.mark.parametrize("oversample", [1, 2])
def test_the_gradient_equals_finite_differences(oversample):
    grid = Grid((10, 8), (1.0, 1.5), (3.0, -1.0))
    a, b = ends(grid, 25, 5)
    a[:2], b[:2] = [(3.0, -1.0), (12.5, 10.2)], [(3.4, -0.6), (2.6, -1.2)]
    op = TravelTime(grid, a, b, oversample=oversample)
    v = smooth_medium((10, 8), 6)
    weights = torch.randn(2, 25, generator=torch.Generator().manual_seed(0), dtype=F64)
    x = v.clone().requires_grad_()
    (g,) = torch.autograd.grad((op(x) * weights).sum(), x)
    numeric = torch.zeros_like(v)
    step = 1e-6
    for i in range(10):
        for j in range(8):
            e = torch.zeros_like(v)
            e[..., i, j] = step
            numeric[:, 0, i, j] = ((op(v + e) - op(v - e)) * weights).sum(1) / (2 * step)
    assert float((g - numeric).abs().max() / numeric.abs().max()) < 1e-7
    # degree −1 in velocity: Σ v ∂t/∂v = −t
    torch.testing.assert_close((g * v).sum((1, 2, 3)), -(op(v) * weights).sum(1), rtol=1e-11, atol=1e-11)


def test_high_contrast_keeps_times_causal_and_gradients_exact():
    """Cells drawn independently with a contrast of 100, where rays turn back and forth."""
    grid = Grid((12, 12), (1.0, 1.0))
    op = TravelTime.crosshole(grid, 4, 4, model="slowness")
    s = torch.exp(np.log(100.0) * torch.rand(3, 1, 12, 12, generator=torch.Generator().manual_seed(2), dtype=F64))
    x = s.clone().requires_grad_()
    t = op(x)
    (g,) = torch.autograd.grad(t.sum(), x)
    assert (g >= 0).all()  # later with every slowness
    torch.testing.assert_close((g * s).sum((1, 2, 3)), t.sum(1), rtol=1e-11, atol=0)
    lower = op(s * 0.9)
    torch.testing.assert_close(lower, 0.9 * t, rtol=1e-11, atol=0)
    assert (op(s.minimum(torch.tensor(50.0))) <= t + 1e-12).all()


def test_reciprocity_holds_to_the_order_of_the_scheme():
    grid = Grid((48, 48), (1.0, 1.0))
    a, b = ends(grid, 20, 8)
    v = smooth_medium((48, 48), 7, 0.2, 6.0)[:1]
    there, back = TravelTime(grid, a, b)(v), TravelTime(grid, b, a)(v)
    assert float((there - back).abs().max() / there.max()) < 5e-3


def test_blocks_of_items_and_sources_change_nothing(monkeypatch):
    grid = Grid((7, 6), (1.0, 1.0))
    op = TravelTime.crosshole(grid, 5, 3)
    v = torch.cat([smooth_medium((7, 6), k) for k in range(3)])
    whole = torch.autograd.functional.vjp(op, v, torch.ones(6, 15, dtype=F64))
    monkeypatch.setattr("invgen.operators.eikonal.BLOCK", 2 * 9 * 8)
    parts = torch.autograd.functional.vjp(op, v, torch.ones(6, 15, dtype=F64))
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_delays_shift_the_times_of_their_source():
    op = TravelTime.crosshole(Grid((5, 5), (1.0, 1.0)), 3, 2)
    v = torch.full((2, 1, 5, 5), 2.0, dtype=F64)
    plain = op(v)
    torch.testing.assert_close(op(v, delay=torch.tensor([0.1, 0.2], dtype=F64))[1], plain[1] + 0.2)
    each = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], dtype=F64)
    torch.testing.assert_close(op(v, delay=each) - plain, each.repeat_interleave(2, 1))
    with pytest.raises(ValueError, match=r"\(batch, 3\)"):
        op(v, delay=torch.zeros(2, 5))
    with pytest.raises(TypeError, match="delay only"):
        op(v, wavelet=torch.zeros(2))


def test_a_model_that_is_not_finite_spoils_itself_alone():
    op = TravelTime.crosshole(Grid((5, 5), (1.0, 1.0)), 2, 2)
    v = torch.full((3, 1, 5, 5), 2.0, dtype=F64)
    v[1, 0, 2, 2] = float("nan")
    x = v.requires_grad_()
    t = op(x)
    assert torch.isnan(t[1]).all()
    assert torch.isfinite(t[::2]).all()
    (g,) = torch.autograd.grad(t.nansum(), x)
    assert torch.isfinite(g[::2]).all()


def test_second_derivatives_are_refused():
    op = TravelTime.crosshole(Grid((4, 4), (1.0, 1.0)), 2, 2)
    x = torch.full((1, 1, 4, 4), 2.0, dtype=F64, requires_grad=True)
    (g,) = torch.autograd.grad(op(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        torch.autograd.grad((g * torch.ones_like(g, requires_grad=True)).sum(), x)


@pytest.mark.parametrize(
    ("source", "receiver", "words"),
    [
        ([[9.0, 0.0]], [[0.0, 0.0]], "1 of 1 rays end outside"),
        ([[0.0, 0.0]], [[0.0, 0.0]], "takes no time"),
        ([[0.0, np.nan]], [[0.0, 0.0]], "finite"),
        ([[0.0, 0.0], [1.0, 1.0]], [[0.0, 1.0]], "one pair a ray"),
    ],
)
def test_rays_that_cannot_be(source, receiver, words):
    with pytest.raises(ValueError, match=words):
        TravelTime(Grid((4, 4), (1.0, 1.0)), source, receiver)


def test_models_and_grids_that_cannot_be():
    grid = Grid((4, 4), (1.0, 1.0))
    op = TravelTime.crosshole(grid, 2, 2)
    v = torch.ones(3, 1, 4, 4)
    v[1, 0, 0, 0] = 0.0
    with pytest.raises(ValueError, match="positive velocity everywhere, 1 of 3"):
        op(v)
    with pytest.raises(ValueError, match="velocity"):
        TravelTime.crosshole(grid, 2, 2, model="impedance")
    with pytest.raises(ValueError, match="whole number of at least 1"):
        TravelTime.crosshole(grid, 2, 2, oversample=0)
    with pytest.raises(ValueError, match="2-D grid"):
        TravelTime.crosshole(Grid((4, 4, 4), (1.0, 1.0, 1.0)))
    with pytest.raises(ValueError, match="2-D grid"):
        TravelTime(Grid((4, 4), (1.0, 1.0), channels=("vp", "vs")), [[0.0, 0.0]], [[1.0, 1.0]])
