"""A filter of real fields and its derivatives against the plain graph through the FFTs."""

import pytest
import torch

from invgen.fourier import _filter, filter_real, half_of

F64 = torch.float64


@pytest.mark.parametrize(("spatial", "padded"), [((6, 5), (6, 5)), ((4, 6), (7, 8)), ((5,), (9,))])
@pytest.mark.parametrize("phase", [False, True])
def test_values_and_derivatives(spatial, padded, phase):
    g = torch.Generator().manual_seed(0)
    kernel = torch.randn(padded, generator=g, dtype=F64)
    gain = half_of(torch.fft.fftn(kernel))
    gain = gain if phase else gain.abs()
    v, w = torch.randn(2, 3, 2, *spatial, generator=g, dtype=F64)

    def fast(x):
        return filter_real(x, gain, padded)

    def plain(x):
        return _filter(x, gain, padded, spatial)

    torch.testing.assert_close(fast(v), plain(v))
    for mode in (torch.func.vjp, torch.func.jvp):
        expected = mode(plain, v)[1](w)[0] if mode is torch.func.vjp else mode(plain, (v,), (w,))[1]
        found = mode(fast, v)[1](w)[0] if mode is torch.func.vjp else mode(fast, (v,), (w,))[1]
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.func.vmap(fast)(v[:, None])[:, 0], plain(v))
    assert torch.autograd.gradcheck(fast, v.clone().requires_grad_(), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(fast, v.clone().requires_grad_())


@pytest.mark.parametrize("forward_mode", [False, True])
def test_gains_have_derivatives_too(forward_mode):
    v = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1), dtype=F64)
    sigma = torch.tensor(0.7, dtype=F64)

    def energy(function, s):
        return function(v, torch.ones(6, 3, dtype=F64) / (1 + s**2), (6, 4), (6, 4)).square().sum()

    one = torch.ones_like(sigma)
    take = (lambda f: torch.func.jvp(f, (sigma,), (one,))[1]) if forward_mode else (lambda f: torch.func.grad(f)(sigma))
    torch.testing.assert_close(take(lambda s: energy(filter_real, s)), take(lambda s: energy(_filter, s)))


def test_one_field_may_meet_a_gain_an_item():
    v = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(2), dtype=F64).requires_grad_()
    gains = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(3), dtype=F64)
    found = torch.autograd.grad(filter_real(v, gains, (4, 6), (3, 5)).square().sum(), v)
    expected = torch.autograd.grad(_filter(v, gains, (4, 6), (3, 5)).square().sum(), v)
    torch.testing.assert_close(found, expected)
