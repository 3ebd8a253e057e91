"""An operator whose adjoint is wrong is refused by name before it spoils a posterior."""

import pytest
import torch

from invgen.contracts import LinearOperator
from invgen.noise import GaussianNoise
from invgen.operators import MatrixOperator
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem
from invgen.solvers import ExactGaussian, RandomizeThenOptimize
from invgen.transforms import Exp

F64 = torch.float64


class Doubled(LinearOperator):
    """A = 2 with the adjoint of 1."""

    def __init__(self, factor=1.0):
        super().__init__((3,), (3,))
        self.factor, self.calls = factor, 0

    def forward(self, x, **theta):
        self.calls += 1
        return 2 * x

    def adjoint(self, d):
        return self.factor * d


def _problem(operator, transform=None):
    prior = GaussianPrior.diagonal(torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64), transform=transform)
    return InverseProblem(torch.ones(3, dtype=F64), operator, GaussianNoise(0.1), prior)


def test_wrong_adjoint_is_named():
    with pytest.raises(ValueError, match=r"adjoint of Doubled .* dot test"):
        ExactGaussian().solve(_problem(Doubled()), 2)


def test_a_thousandth_is_too_much_in_double_precision():
    with pytest.raises(ValueError, match="adjoint of Doubled"):
        ExactGaussian().solve(_problem(Doubled(2.002)), 2, dtype=F64)


def test_the_innermost_wrong_operator_is_named():
    chain = MatrixOperator(torch.eye(3, dtype=F64)) @ Doubled(1.5)
    with pytest.raises(ValueError, match="adjoint of Doubled"):
        ExactGaussian().solve(_problem(chain), 2)


def test_linear_part_of_a_non_linear_operator_is_tested():
    from invgen.solvers import MAP

    with pytest.raises(ValueError, match="adjoint of Doubled"):
        MAP().solve(_problem(Doubled() @ Exp((3,))), 1)


def test_right_adjoint_is_tested_once_and_not_counted():
    operator = Doubled(2.0)
    problem = _problem(operator)
    RandomizeThenOptimize(method="cg").solve(problem, 2, dtype=F64)
    calls = operator.calls
    second = RandomizeThenOptimize(method="cg").solve(problem, 2, dtype=F64)
    assert operator.calls - calls == calls - 1
    assert second.counts["forward"] > 0
