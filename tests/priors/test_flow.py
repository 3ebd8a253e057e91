"""Normalizing flows and continuous ones: densities that belong to the map, closed forms, disk, training."""

import math

import pytest
import torch

from invgen.priors import ArrayData, ContinuousFlow, Flow, Training
from invgen.transforms import Affine, Exp

torch.set_num_threads(1)
F64 = torch.float64
KINDS = ("nice", "realnvp", "nsf", "maf", "nsf-ar")


def randomised(flow, scale=0.3):
    g = torch.Generator().manual_seed(1)
    for p in flow.network.parameters():
        p.data = p.data + scale * torch.randn(p.shape, generator=g, dtype=p.dtype)
    return flow.to(F64).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [2, 5])
def test_density_is_that_of_the_map(kind, dim):
    # log p(f(z)) = log N(z) − log|det ∂f/∂z|, through a transform with a mean, a scale and a curvature
    for transform in (Affine(2.0, 3.0), Exp()):
        flow = randomised(Flow(dim, kind=kind, transforms=3, hidden=(16,), transform=transform))
        z = 0.5 * torch.randn(6, dim, generator=torch.Generator().manual_seed(0), dtype=F64)
        x = flow.decode(z)
        torch.testing.assert_close(flow.encode(x), z, rtol=1e-6, atol=1e-6)
        normal = -0.5 * z.square().sum(1) - 0.5 * dim * math.log(2 * math.pi)
        jacobian = torch.stack(
            [torch.autograd.functional.jacobian(lambda v, flow=flow: flow.decode(v[None])[0], row) for row in z]
        )
        expected = normal - torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(flow.log_prob(x), expected, rtol=1e-6, atol=1e-6)
        assert float((x - flow.transform(z)).abs().max()) > 0.1  # not the identity


def test_additive_couplings_preserve_volume():
    flow = randomised(Flow(4, kind="nice", transforms=4, hidden=(8,)))
    z = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    normal = -0.5 * z.square().sum(1) - 2 * math.log(2 * math.pi)
    torch.testing.assert_close(flow.log_prob(flow.decode(z)), normal)


@pytest.mark.parametrize("kind", KINDS)
def test_every_feature_is_reached(kind):
    """Each output depends on each latent somewhere in the stack: no pair of halves stays apart."""
    flow = randomised(Flow(6, kind=kind, transforms=6, hidden=(16,)))
    z = 0.3 * torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=F64)
    reach = torch.zeros(6, 6, dtype=torch.bool)
    for row in z:
        reach |= torch.autograd.functional.jacobian(lambda v: flow.decode(v[None])[0], row).abs() > 1e-12
    assert bool(reach.all())


@pytest.mark.parametrize(
    "make",
    [
        lambda t: Flow(2, kind="realnvp", hidden=(32,), transform=t),
        lambda t: ContinuousFlow(2, width=16, depth=1, training_steps=2, steps=8, transform=t),
    ],
)
def test_training_finds_a_correlated_gaussian(make):
    A = torch.tensor([[1.0, 0.0], [0.8, 0.5]])
    x = torch.tensor([1.0, -2.0]) + torch.randn(8192, 2, generator=torch.Generator().manual_seed(0)) @ A.T
    torch.manual_seed(0)
    flow = make(Affine(x.mean(0), x.std(0)))
    held = torch.tensor([1.0, -2.0]) + torch.randn(8192, 2, generator=torch.Generator().manual_seed(1)) @ A.T
    report = Training(steps=150, batch_size=128, learning_rate=1e-2, warmup=20, weight_decay=0.0, ema=0.95).fit(
        flow, ArrayData(x), validation={"x": held}, progress=False
    )
    law = torch.distributions.MultivariateNormal(torch.tensor([1.0, -2.0]), A @ A.T)
    gap = law.log_prob(held) - flow.log_prob(held)  # its mean is KL(law | flow) >= 0
    assert float(gap.mean()) < 0.02 + 4 * float(gap.std()) / math.sqrt(len(gap))
    assert report.validation["nll"] == pytest.approx(float(-flow.log_prob(held).mean()), abs=1e-5)


class Linear(torch.nn.Module):
    """g(u, t) = A u + b: the map is affine, u(1) = e^A z + …"""

    def __init__(self, A, b):
        super().__init__()
        self.A, self.b = torch.nn.Parameter(A), torch.nn.Parameter(b)

    def forward(self, u, t):
        return u @ self.A.T + self.b


def linear_flow():
    A = torch.tensor([[0.4, 0.8, 0.0], [-0.3, -0.5, 0.2], [0.1, 0.0, 0.3]], dtype=F64)
    b = torch.tensor([0.7, -1.0, 0.2], dtype=F64)
    flow = ContinuousFlow(3, transform=Affine(2.0, 3.0), steps=32)
    flow.network = Linear(A, b)
    flow.requires_grad_(False)
    expA = torch.linalg.matrix_exp(A)
    mean = torch.linalg.solve(A, (expA - torch.eye(3, dtype=F64)) @ b)
    law = torch.distributions.MultivariateNormal(2 + 3 * mean, 9 * expA @ expA.T)
    return flow, law, A


def test_a_linear_ode_is_a_gaussian():
    flow, law, A = linear_flow()
    z = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    torch.testing.assert_close(flow.decode(z), law.mean + 3 * z @ torch.linalg.matrix_exp(A).T, rtol=1e-6, atol=1e-6)
    x = law.mean + 3 * z
    torch.testing.assert_close(flow.log_prob(x), law.log_prob(x), rtol=1e-6, atol=1e-6)


def test_hutchinson_is_unbiased():
    flow, law, A = linear_flow()
    x = (law.mean + torch.zeros(1, 3, dtype=F64)).repeat(4000, 1)
    off = flow.log_prob_estimate(x, seed=3) - law.log_prob(x)
    # the variance of vᵀAv for signs v is the sum of squares of the symmetric off-diagonal part
    spread = math.sqrt(float(((A + A.T).triu(1)).square().sum()))
    assert abs(float(off.mean())) < 4 * spread / math.sqrt(len(off))
    assert float(off.std()) == pytest.approx(spread, rel=0.1)
    first = flow.log_prob_estimate(x[:3], seed=3)
    torch.testing.assert_close(flow.log_prob_estimate(x[:1], seed=3), first[:1])


def test_density_of_a_continuous_flow_is_that_of_its_map():
    flow = randomised(ContinuousFlow(2, width=8, depth=2, steps=40, transform=Affine(1.0, 2.0)), 0.6)
    z = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    x = flow.decode(z)
    jacobian = torch.stack(
        [torch.autograd.functional.jacobian(lambda v, flow=flow: flow.decode(v[None])[0], row) for row in z]
    )
    normal = -0.5 * z.square().sum(1) - math.log(2 * math.pi)
    torch.testing.assert_close(
        flow.log_prob(x), normal - torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-5, atol=1e-5
    )


def test_both_traces_train_the_same_model():
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    losses = {}
    for trace in ("exact", "hutchinson"):
        torch.manual_seed(0)
        flow = ContinuousFlow(3, width=8, depth=1, trace=trace, training_steps=2)
        for p in flow.parameters():
            p.data.add_(0.2)
        values = [
            flow.training_loss({"x": x}, torch.Generator().manual_seed(i)).mean()
            for i in range(60 if trace != "exact" else 1)
        ]
        losses[trace] = torch.stack(values).detach()
        values[0].backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in flow.network.parameters())
    off = losses["hutchinson"] - losses["exact"]
    assert abs(float(off.mean())) < 4 * float(off.std()) / math.sqrt(len(off)) + 1e-6


@pytest.mark.parametrize(
    "flow", [*Flow.examples(), *ContinuousFlow.examples()], ids=lambda f: getattr(f, "kind", "ode")
)
def test_save_and_load(tmp_path, flow):
    flow.transform = Affine(torch.tensor([1.0, 2.0, 3.0]), 2.0)
    other = type(flow).load(flow.save(tmp_path / "f.safetensors", card={"data": "none"}))
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(flow.log_prob(x), other.log_prob(x))
    assert other.seen == {"data": "none"}
    flow.transform = Exp()
    with pytest.raises(TypeError, match="affine"):
        flow.save(tmp_path / "g.safetensors")


def test_bad_options():
    with pytest.raises(ValueError, match="kind of flow"):
        Flow(3, kind="glow")
    with pytest.raises(ValueError, match="dim"):
        Flow(1)
    with pytest.raises(ValueError, match="trace"):
        ContinuousFlow(3, trace="none")
    with pytest.raises(ValueError, match="at least 1"):
        ContinuousFlow(3, steps=0)


def test_tangents_through_the_layers_are_the_exact_trace():
    from invgen.priors._ode import exact_trace

    flow = randomised(ContinuousFlow(3, width=8, depth=3), 0.4)
    u = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    for found, expected in zip(flow._both(u, 0.3, None), exact_trace(lambda v: flow._slope(v, 0.3), u)):
        torch.testing.assert_close(found, expected)


def test_a_field_that_the_solver_gets_wrong_is_penalised():
    x = {"x": torch.randn(16, 2, generator=torch.Generator().manual_seed(0), dtype=F64)}
    rough, g = randomised(ContinuousFlow(2, width=8, depth=2, kinetic=0.0, stiffness=10.0), 1.5), torch.Generator()
    plain, smooth = (ContinuousFlow(2, width=8, depth=2, kinetic=0.0, stiffness=v) for v in (0.0, 10.0))
    plain.network = rough.network
    assert float((rough.training_loss(x, g) - plain.training_loss(x, g)).mean()) > 0.1
    smooth.to(F64)  # g = 0: nothing to get wrong
    smooth.requires_grad_(False)
    torch.testing.assert_close(-2 * smooth.training_loss(x, g), smooth.log_prob(x["x"]), rtol=1e-9, atol=1e-9)
