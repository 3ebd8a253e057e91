"""Consistency models: the boundary, the law of the exact function, distillation, disk."""

import pytest
import torch

from invgen.covariance import Dense
from invgen.priors import ArrayData, Consistency, DiffusionPrior, FlowMatching, GaussianPrior, Training
from invgen.priors.networks import MLPDenoiser
from invgen.transforms import Affine

torch.set_num_threads(1)
F64 = torch.float64
MEAN = torch.tensor([1.0, -2.0, 0.3], dtype=F64)
C = torch.tensor([[1.0, 0.5, 0.0], [0.5, 0.6, 0.1], [0.0, 0.1, 0.2]], dtype=F64)
LOW, S = 0.01, 0.8


class ExactStudent(torch.nn.Module):
    """F such that f(u, σ) = m + [(C + σ_min²)(C + σ²)⁻¹]^½ (u − m), the end of the ODE's path of a Gaussian, plus `off`."""

    def __init__(self, off=0.0):
        super().__init__()
        self.off = torch.nn.Parameter(torch.tensor(off, dtype=F64))

    def forward(self, x, noise):
        level = (4 * noise).exp()[:, None]
        total = (level**2 + S**2).sqrt()
        values, basis = torch.linalg.eigh(C)
        u, away = x * total, level - LOW
        f = MEAN + (((values + LOW**2) / (values + level**2)).sqrt() * ((u - MEAN) @ basis)) @ basis.T
        skip, scale = S**2 / (away**2 + S**2), S * away / total
        return torch.where(scale > 1e-12, (f - skip * u) / scale.clamp_min(1e-12), torch.zeros_like(u)) + self.off


def law():
    return GaussianPrior(MEAN, Dense(C), transform=Affine(2.0, 3.0))


def exact(steps=1, off=0.0, sigma_max=60.0, **options):
    known = {"transform": law().transform, "sigma_data": S, "sigma_min": LOW, "sigma_max": sigma_max, "centre": MEAN}
    return Consistency(ExactStudent(off), (3,), steps=steps, teacher=law(), **known | options)


def test_the_boundary_is_the_identity_for_any_weights():
    model = Consistency.examples()[0]
    u = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    torch.testing.assert_close(model.consistency(u, model.sigma_min), u)
    assert float((model.consistency(u, 1.0) - u).abs().max()) > 0.01


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_decode_of_the_exact_function_has_the_law_of_the_path_end(steps):
    model = exact(steps)
    assert model.latent_shape == (3 * steps,)
    z = torch.cat([torch.zeros(1, 3 * steps, dtype=F64), torch.eye(3 * steps, dtype=F64)])
    x = model.decode(z).detach()
    M = (x[1:] - x[0]).T
    torch.testing.assert_close(x[0], law().mean(), rtol=1e-9, atol=1e-9)
    # what is left: σ_min² at the end, λ/σ_T² at the start, both times 9 from the transform
    expected = 9 * (C + LOW**2 * torch.eye(3, dtype=F64))
    assert float((M @ M.T - expected).abs().max()) < 9 * 1.5 * 1.4 / 60**2
    if steps > 1:  # later noises matter, the first ones less and less
        assert float(M[:, 3:].abs().max()) > 0.1


def test_stacked_noises_of_fields():
    from invgen.priors.networks import UNet

    torch.manual_seed(0)
    model = Consistency(UNet(2, widths=(4,), blocks=1, embedding=8), (2, 8, 8), steps=2)
    assert model.latent_shape == (4, 8, 8)
    assert model.decode(torch.randn(3, 4, 8, 8)).shape == (3, 2, 8, 8)


def test_the_exact_function_is_where_the_loss_is_least():
    x = law().sample(300, seed=0, dtype=F64)

    def loss(off, n):
        model = exact(off=off, discretisation=n)
        return float(model.training_loss({"x": x}, torch.Generator().manual_seed(0)).mean().detach())

    # a step of Heun's rule errs by h³, and the distance is a norm beyond c
    assert loss(0.0, 20) < 0.2 * loss(0.3, 20)
    assert loss(0.0, 80) < 0.2 * loss(0.0, 20)


def tiny(teacher=None, seed=0, **options):
    torch.manual_seed(seed)
    return Consistency(
        MLPDenoiser(2, width=48, depth=2), (2,), teacher=teacher, sigma_min=0.02, sigma_max=15.0, **options
    )


def test_distillation_gives_the_law_of_the_teacher():
    teacher = GaussianPrior(torch.tensor([2.0, -1.0]), torch.tensor([[1.0, 0.6], [0.6, 0.8]]))
    model = tiny(teacher, discretisation=18, steps=2).centred()
    assert model.centre.tolist() == pytest.approx([2.0, -1.0], abs=1e-3)
    x = teacher.sample(4096, seed=0)
    Training(steps=500, batch_size=256, learning_rate=4e-3, warmup=20, weight_decay=0.0, ema=0.98).fit(
        model, ArrayData(x), progress=False
    )
    draws = model.sample(4000, seed=3)
    assert float((draws.mean(0) - torch.tensor([2.0, -1.0])).abs().max()) < 0.12
    assert float((torch.cov(draws.T) - torch.tensor([[1.0, 0.6], [0.6, 0.8]])).abs().max()) < 0.15


def test_a_student_starts_from_its_teacher():
    torch.manual_seed(0)
    network = MLPDenoiser(2, width=8, depth=1)
    network.leave.weight.data.normal_()
    teacher = DiffusionPrior(network, (2,), transform=Affine(1.0, 2.0), sigma_data=0.7).eval().requires_grad_(False)
    model = Consistency.of(teacher, steps=3)
    assert model.network is not teacher.network
    assert all(torch.equal(a, b) for a, b in zip(model.network.parameters(), network.parameters()))
    assert model.sigma_max == teacher.start_sigma
    assert not any("teacher" in key for key in model.state_dict())
    before = [p.clone() for p in network.parameters()]
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    Training(steps=5, batch_size=16, warmup=1).fit(model, ArrayData(x), progress=False)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), before))
    assert any(not torch.equal(a, b) for a, b in zip(model.network.parameters(), before))
    with pytest.raises(TypeError, match="edm"):
        Consistency.of(FlowMatching(network, (2,)))


def test_the_averaged_student_follows_the_student():
    teacher = GaussianPrior(torch.zeros(2), torch.eye(2))
    model = tiny(teacher, ema=0.75)
    start = model.average_0.clone()
    with torch.no_grad():
        next(model.network.parameters()).add_(1.0)
    x = {"x": torch.randn(8, 2)}
    model.eval().training_loss(x, torch.Generator().manual_seed(0))
    assert torch.equal(model.average_0, start)
    loss = model.train().training_loss(x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.average_0, start + 0.25)
    loss.mean().backward()
    assert not model.average_0.requires_grad


def test_distillation_resumes_where_it_stopped(tmp_path):
    teacher = GaussianPrior(torch.zeros(2), torch.eye(2))
    data = ArrayData(torch.randn(64, 2, generator=torch.Generator().manual_seed(0)))
    options = {"batch_size": 8, "warmup": 2, "save_every": 5}

    class Stop:
        def batch(self, step, size, seed):
            if step == 7:
                raise KeyboardInterrupt
            return data.batch(step, size, seed)

    whole, part = tiny(teacher), tiny(teacher)
    Training(steps=12, **options).fit(whole, data, progress=False)
    path = str(tmp_path / "run")
    Training(steps=12, checkpoint=path, **options).fit(part, Stop(), progress=False)
    resumed = tiny(teacher, seed=5)
    Training(steps=12, checkpoint=path, **options).fit(resumed, data, progress=False)
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_save_and_load(tmp_path):
    teacher = GaussianPrior(torch.tensor([2.0, -1.0]), torch.eye(2))
    model = tiny(teacher, steps=3, transform=Affine(1.0, 2.0)).centred()
    other = Consistency.load(model.save(tmp_path / "c.safetensors", card={"data": "none"}))
    z = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(other.decode(z), model.decode(z))
    assert other.seen == {"data": "none"}
    with pytest.raises(TypeError, match="teacher"):
        other.training_loss({"x": z[:, :2]}, torch.Generator())


def test_bad_options():
    network = MLPDenoiser(2)
    with pytest.raises(ValueError, match="sigma_min"):
        Consistency(network, (2,), sigma_data=100.0)
    with pytest.raises(ValueError, match="steps"):
        Consistency(network, (2,), steps=0)
    with pytest.raises(ValueError, match="levels"):
        Consistency(network, (2,), steps=3, levels=(1.0,))
    with pytest.raises(TypeError, match="denoise"):
        Consistency(network, (2,), teacher=object())
