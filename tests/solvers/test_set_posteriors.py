"""Estimators of data that are sets: the order of the members has no say in the posterior, nor in what is typical."""

from __future__ import annotations

import pytest
import torch

from invgen import SimulatedNoise, Simulator
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem
from invgen.solvers import NPE


def members(x: torch.Tensor) -> torch.Tensor:
    """Twelve places, the last ones mostly empty: x_1 + noise, x_2 · noise, and 1 where there is a member."""
    there = torch.rand(len(x), 12) < torch.linspace(1.0, 0.05, 12)
    values = torch.stack([x[:, :1] + torch.randn(len(x), 12), x[:, 1:] * torch.randn(len(x), 12)], -1)
    return torch.cat([values * there[..., None], there[..., None].to(values)], -1)


@pytest.mark.parametrize("kind", ["deepsets", "transformer"])
def test_the_order_of_the_members_does_not_matter(kind: str, tmp_path) -> None:
    simulator = Simulator(members, (2,), (12, 3), batched=True, tensors=True)
    prior = GaussianPrior(torch.tensor([1.0, -1.0]), torch.tensor([[1.0, 0.3], [0.3, 0.5]]))
    problem = InverseProblem(torch.zeros(12, 3), simulator, SimulatedNoise(), prior)
    # enough rows for a regression on the 36 numbers, which a set must not have
    made = NPE(embedding=kind, members=1, width=8, hidden=8, layers=1, epochs=1, space="u").fit(problem, 1000, seed=0)
    x, _, (d,) = problem.simulate(3, seed=1)
    shuffled = d[:, torch.randperm(12, generator=torch.Generator().manual_seed(2))]
    torch.testing.assert_close(made.log_prob(x, d), made.log_prob(x, shuffled), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.typicality(d)[0], made.typicality(shuffled)[0], rtol=1e-3, atol=1e-3)
    again = type(made).load(made.save(tmp_path / "set.safetensors"), problem)
    torch.testing.assert_close(again.typicality(d)[0], made.typicality(d)[0])
