"""Every exported prior: shapes, seeds, dtype, batch independence, honest capabilities, and laws that agree."""

import inspect
import math

import pytest
import torch

import invgen.priors
from invgen.contracts import HasDenoiser, HasDensity, HasLatent, HasProx, Prior
from invgen.grid import Grid

torch.set_num_threads(1)
F64 = torch.float64


def _classes():
    found = [getattr(invgen.priors, name) for name in invgen.priors.__all__]
    return [c for c in found if inspect.isclass(c) and callable(getattr(c, "sample", None))]


def _cases():
    cases = []
    for cls in _classes():
        if not hasattr(cls, "examples"):
            continue
        for i, prior in enumerate(cls.examples()):
            cases.append(
                pytest.param(prior.to(F64) if isinstance(prior, torch.nn.Module) else prior, id=f"{cls.__name__}-{i}")
            )
    return cases


CASES = _cases()
every = pytest.mark.parametrize("prior", CASES)


def draws(prior, n, seed=0, dtype=F64):
    """A few draws; a learned prior with a sampler of many steps is asked for few of them."""
    options = {"steps": 4} if "steps" in inspect.signature(prior.sample).parameters else {}
    if "dtype" in inspect.signature(prior.sample).parameters:
        options["dtype"] = dtype
    return prior.sample(n, seed=seed, **options)


def learned(prior):
    return isinstance(prior, torch.nn.Module)


def score(f, x):
    x = x.detach().requires_grad_(True)
    return torch.autograd.grad(f(x).sum(), x)[0]


def zmax(values):
    """Largest |z| of the hypothesis that each column of `(n, …)` has mean zero."""
    flat = values.flatten(1)
    se = flat.std(0) / math.sqrt(flat.shape[0])
    return float((flat.mean(0).abs() / se.clamp_min(1e-300)).max())


def test_priors_are_discovered_and_have_examples():
    names = {c.__name__ for c in _classes()}
    assert {"GaussianPrior", "GaussianMixturePrior", "DiffusionPrior"} <= names
    for cls in _classes():
        assert hasattr(cls, "examples"), (
            f"{cls.__name__} has no examples(); add a classmethod that returns small instances."
        )
        assert cls.examples()


@every
def test_attributes_and_shapes(prior):
    assert isinstance(prior, Prior)
    assert isinstance(prior.shape, tuple)
    assert all(isinstance(s, int) for s in prior.shape)
    assert prior.grid is None or (isinstance(prior.grid, Grid) and prior.grid.field_shape == prior.shape)
    x = draws(prior, 3)
    assert x.shape == (3, *prior.shape)
    assert torch.isfinite(x).all()
    torch.testing.assert_close(prior.transform(prior.transform.inverse(x)), x)


@every
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_draw_i_depends_on_seed_and_i_alone(prior, dtype):
    few, many, other = draws(prior, 2, 0, dtype), draws(prior, 5, 0, dtype), draws(prior, 2, 1, dtype)
    tolerance = 1e-10 if few.dtype == F64 else 1e-4
    torch.testing.assert_close(few, many[:2], rtol=tolerance, atol=tolerance)
    assert (few - other).abs().max() > 1e-3
    assert (many[0] - many[1]).abs().max() > 1e-3


@every
def test_capabilities_are_true_and_dtype_is_kept(prior):
    for dtype, tolerance in ((torch.float32, 1e-4), (F64, 1e-10)):
        x = draws(prior, 3).to(dtype)
        u = prior.transform.inverse(x)
        sigma = torch.tensor([0.1, 1.0, 3.0], dtype=dtype)
        calls = {}
        if isinstance(prior, HasDensity):
            calls["log_prob"] = lambda k, x=x: prior.log_prob(x[k])
        if isinstance(prior, HasDenoiser):
            calls["denoise"] = lambda k, u=u, sigma=sigma: prior.denoise(u[k], sigma[k])
        if isinstance(prior, HasLatent):
            z = torch.randn(3, *prior.latent_shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
            calls["decode"] = lambda k, z=z: prior.decode(z[k])
        if isinstance(prior, HasProx) and prior.transform.affine:
            calls["prox"] = lambda k, x=x, sigma=sigma: prior.prox(x[k], sigma[k])
        assert calls or not learned(prior)
        for name, call in calls.items():
            together = call(slice(None))
            assert together.dtype == dtype, name
            assert together.shape == ((3,) if name == "log_prob" else (3, *prior.shape)), name
            assert torch.isfinite(together).all(), name
            for i in range(3):  # no item depends on another
                scale = float(together.abs().max())
                torch.testing.assert_close(
                    call(slice(i, i + 1))[0], together[i], rtol=tolerance, atol=tolerance * scale
                )


@every
def test_wrong_shapes_are_refused(prior):
    wrong = torch.zeros(2, *prior.shape, 1, dtype=F64)
    bare = torch.zeros(prior.shape, dtype=F64)
    methods = []
    if isinstance(prior, HasDensity):
        methods.append(prior.log_prob)
    if isinstance(prior, HasDenoiser):
        methods.append(lambda u: prior.denoise(u, 1.0))
        with pytest.raises((ValueError, RuntimeError)):
            prior.denoise(torch.zeros(2, *prior.shape, dtype=F64), torch.ones(5, dtype=F64))
    if isinstance(prior, HasLatent):
        methods.append(prior.decode)
    if isinstance(prior, HasProx):
        methods.append(lambda x: prior.prox(x, 1.0))
    for method in methods:
        for value in (wrong, bare):
            with pytest.raises(ValueError, match="shape"):
                method(value)
    with pytest.raises(ValueError, match="draws"):
        prior.sample(0)
    with pytest.raises(ValueError, match="seed"):
        prior.sample(1, seed=-1)


@every
def test_denoiser_error_is_orthogonal_to_every_function_of_the_noisy_field(prior):
    """E[(u0 − D(u)) h(u)] = 0 for all h characterises the posterior mean; needs no density."""
    if learned(prior) or not isinstance(prior, HasDenoiser):
        pytest.skip("no exact denoiser")
    u0 = prior.transform.inverse(draws(prior, 8000, seed=3))
    noise = torch.randn(u0.shape, generator=torch.Generator().manual_seed(5), dtype=F64)
    scale, centre = u0.std(), u0.mean(0)
    for level in (0.3, 1.0, 4.0):
        sigma = level * scale * torch.ones(len(u0), dtype=F64)
        u = u0 + sigma.reshape(-1, *(1,) * (u0.ndim - 1)) * noise
        error = u0 - prior.denoise(u, sigma)
        features = torch.stack(
            [u - centre, torch.tanh((u - centre) / scale), torch.roll(u - centre, 1, -1), torch.ones_like(u)], 1
        )
        assert zmax(error[:, None] * features) < 5, level


@every
def test_tweedie(prior):
    """D(u, sigma) = u + sigma² ∇ log p_sigma(u), where the noisy law is a sum of priors."""
    if learned(prior) or not isinstance(prior, HasDenoiser) or not hasattr(prior, "affine"):
        pytest.skip("the noisy density is not known")
    u = prior.transform.inverse(draws(prior, 4, seed=1))
    from invgen.priors import GaussianPrior

    bare = prior if prior.transform.affine else None
    for sigma in (0.3, 2.0):
        plain = _in_u(prior) if bare is None else _in_u(bare)
        noisy = plain + GaussianPrior(0.0, sigma**2, shape=prior.shape)
        expected = u + sigma**2 * score(noisy.log_prob, u)
        torch.testing.assert_close(prior.denoise(u, sigma), expected, rtol=1e-8, atol=1e-8)


def _in_u(prior):
    from invgen.priors import GaussianMixturePrior, GaussianPrior

    if isinstance(prior, GaussianPrior):
        return GaussianPrior(prior.mean_u, prior.covariance_u)
    return GaussianMixturePrior(prior.weights, prior.means, prior.covariances)


@every
def test_density_belongs_to_the_draws(prior):
    """Stein's identity, E[x_i ∂_j log p(x)] = −δ_ij, ties log_prob (with its Jacobian) to sample."""
    if learned(prior) or not isinstance(prior, HasDensity):
        pytest.skip("no density")
    if getattr(prior, "has_edges", False):
        pytest.skip("a density that does not vanish at its edges adds boundary terms to the identity")
    x = draws(prior, 8000, seed=11)
    s = score(prior.log_prob, x).flatten(1)
    flat = x.flatten(1)
    pairs = flat[:, :, None] * s[:, None, :] + torch.eye(flat.shape[1], dtype=F64)
    assert zmax(pairs) < 5


@every
def test_decode_has_the_law_of_sample(prior):
    if learned(prior) or not isinstance(prior, HasLatent):
        pytest.skip("a learned generator targets its own law")
    n = 8000
    a = draws(prior, n, seed=2)
    b = prior.decode(torch.randn(n, *prior.latent_shape, generator=torch.Generator().manual_seed(9), dtype=F64))
    centre = a.mean(0)
    for f in (lambda x: x, lambda x: (x - centre) ** 2, lambda x: (x - centre) * torch.roll(x - centre, 1, -1)):
        fa, fb = f(a).flatten(1), f(b).flatten(1)
        se = ((fa.var(0) + fb.var(0)) / n).sqrt()
        assert float(((fa.mean(0) - fb.mean(0)).abs() / se).max()) < 5


@every
def test_prox_is_the_minimiser(prior):
    """y = prox(x) is the one stationary point of ½|y − x|² − step log p(y)."""
    if learned(prior) or not isinstance(prior, HasProx):
        pytest.skip("no prox")
    x = draws(prior, 3, seed=4)
    if not prior.transform.affine:
        with pytest.raises(TypeError, match="affine"):
            prior.prox(x, 1.0)
        return
    step = torch.tensor([0.2, 1.0, 5.0], dtype=F64)
    y = prior.prox(x, step)
    if isinstance(prior, HasDensity):
        gradient = y - x - step.reshape(-1, *(1,) * (x.ndim - 1)) * score(prior.log_prob, y)
        torch.testing.assert_close(gradient, torch.zeros_like(x), rtol=0, atol=1e-9)
