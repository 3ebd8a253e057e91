r"""From a simulator to an inverse problem without a likelihood.

    problem = InverseProblem(d_obs, Simulator(function, model_shape, data_shape), SimulatedNoise(), prior)

`function(x) -> data` already contains its noise; `SimulatedNoise` says so: it adds nothing, and has no density. The problem
then simulates, and everything that learns from simulations (`NPE`, `NLE`, …) solves it; solvers that need p(d | x) refuse
it by name. `Simulations.of(problem, n, path="simulations.h5")` keeps what was simulated, goes on where a killed run
stopped, and refuses a file that another simulator made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributions import Distribution

    from invgen.driver import Streams

__all__ = ["SimulatedNoise"]


class SimulatedNoise:
    """The noise is inside the simulator: p(d | x) can be drawn from and not evaluated.

    The operator of such a term gives data, not noise-free predictions, as `Simulator` and `ProgramSimulator` do; what
    `problem.predict` and a posterior's `predict()` return are then draws of the (posterior) predictive law.
    """

    has_density = False

    def __call__(self, prediction: Tensor, **theta: Tensor) -> Distribution:
        raise TypeError(
            "A simulator with its noise inside has no likelihood p(d | x) to evaluate; use a solver that learns from simulations, such as NPE or NLE, or give the noise-free operator and its noise model."
        )

    def draw(self, prediction: Tensor, rng: Streams, **theta: Tensor) -> Tensor:
        """The data as they were simulated."""
        return prediction

    def restricted(self, mask: Tensor) -> SimulatedNoise:
        """The same on the data where `mask` is True."""
        return self

    def __repr__(self) -> str:
        return "SimulatedNoise()"
