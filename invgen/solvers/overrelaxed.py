r"""Over-relaxed split Gibbs sampling: one network evaluation a move, and no random walk.

PnPDM alternates draws of two conditionals, and crosses a direction of posterior standard deviation s in (s/ρ)² sweeps.
Adler's over-relaxation replaces a draw from a Gaussian conditional by the reflection about its mean, which leaves the
conditional as invariant as a draw does, and turns the walk into a flight of s/ρ moves. Of

    p_ρ(u, z | d) ∝ p(u) · exp(−|u − z|²/2ρ²) · p(d | z)

both conditional means are at hand, E[u | z] = D(z; ρ), the denoiser itself, and E[z | u], the solve of the data step:

    z ← 2 E[z | u] − z,        u ← 2 D(z; ρ) − u.

Two reflections are one leapfrog step of Hamiltonian dynamics with momentum (z − u)/ρ: smoothing the prior by exactly the
step's own ρ cancels the integrator's error for every Gaussian prior, at any ρ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from invgen.contracts import Solver
from invgen.driver import Streams
from invgen.problem import InverseProblem
from invgen.solvers._inner import conditional_mean
from invgen.solvers._nuisance import nuisance_values
from invgen.solvers.guidance import prior_variance
from invgen.solvers.split import PnPDM

__all__ = ["OverrelaxedSplit"]


@dataclass(frozen=True)
class OverrelaxedSplit(PnPDM):
    r"""Annealed split Gibbs sampling whose sweeps end in over-relaxed moves; PnPDM with `moves` = 0.

    Targets p_ρ(u | d) at the last coupling, like `PnPDM`, and reaches it in far fewer network evaluations. A level ρ
    is one sweep of `PnPDM` (z, theta and u are drawn) and then min(moves, s/ρ) pairs of reflections

        z ← 2 E[z | u] − z,        u ← 2 D(z; ρ) − u,

    each leaving its conditional invariant where that is symmetric about its mean (Adler 1981, equation 9 with α = −1).
    Given z that holds for Gaussian priors at any ρ; for others p(u | z) is skewed by ρ³ ∂³ log p in units of its own
    spread, which vanishes with ρ, and the draws of every sweep work against it. Given u it holds for linear-Gaussian
    terms; elsewhere z moves by Hamiltonian trajectories that turn past π/2, with Metropolis acceptance.

    With `moves` = m a direction follows the annealing as with m² times the sweeps: 25 levels of 8 moves track a
    Gaussian posterior like 2000 sweeps of `PnPDM`. Which mode of a mixture a chain is in is decided by the draws
    alone, at couplings as wide as the modes are apart: weights of distant modes need many `iterations`.

    Measured with the settings of `exam()`: on the 16-d Gaussian, the worst of noise 0.05 / 0.3 / 1, mean error 0.00, sd
    ratio 1.01, coverage 0.90; on 64 × 64 Gaussian fields behind a mask, a blur, a post-stack
    and a sparse operator 0.00, 1.00, 0.90. Averages: at noise 0.05 the stiffest direction has 1.5 times its variance.

    Args:
        iterations, rho_max, rho_min, inner, floor, hold, leaps: as in `PnPDM`.
        moves: pairs of reflections after a sweep, at the most; a flight of m moves crosses about 2 m ρ.

    Cost a sample: (iterations + hold) · (2 inner + moves) network passes without gradients, at the most, and
    (iterations + hold) · (1 + moves) solves. Needs `HasDenoiser`; for reflections of z an affine transform.

    References: Adler, Phys. Rev. D 23, 1981; Neal 1998 (over-relaxation against random walks); Vono, Dobigeon &
    Chainais 2019 (the split).
    """

    iterations: int = 60
    inner: int = 3
    moves: int = 8

    turn: ClassVar[float] = math.pi

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.moves < 0:
            raise ValueError(f"OverrelaxedSplit needs moves >= 0, got {self.moves}.")

    @classmethod
    def examples(cls) -> list[PnPDM]:
        """Cheap instances for the conformance tests."""
        return [cls(iterations=8, inner=2, moves=3), cls(iterations=5, inner=1, moves=2, hold=2)]

    @classmethod
    def exam(cls) -> dict[str, Solver]:
        """Settings meant to be accurate."""
        return {"": cls(iterations=100, rho_min=0.005)}

    def step(self, problem: InverseProblem, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        k = int(state["k"])
        rho = self.coupling(problem, k)
        state, z = self._sweep(problem, state, rho, rng)
        theta = nuisance_values(problem, state.get("nuisance"))
        denoise = problem.prior.denoise
        # a flight longer than the prior is wide arrives nowhere new
        for _ in range(min(self.moves, int(math.sqrt(prior_variance(problem)) / rho))):
            if "z" in state:
                z = self._likelihood_step(problem, state, rho, rng, adapt=k < self.iterations)
            else:
                centre, residual, missed = conditional_mean(problem, state["u"], rho, **theta)
                z = 2 * centre - z
                state["stat_residual"] = torch.maximum(state["stat_residual"], residual)
                state["stat_unconverged"] = state["stat_unconverged"] + missed
            with torch.no_grad():
                state["u"] = 2 * denoise(z, rho) - state["u"]
        return state
