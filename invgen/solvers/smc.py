r"""Sequential Monte Carlo with a diffusion prior: weighted particles that follow the data from noise to model.

The prior is the law of u0 of a Markov chain with Gaussian transitions, p(u_T) Π p(u' | u) (`_transitions`): the reverse
diffusion in steps. Its posterior needs p(d | u) at every level, which is not known; particles are moved with an
approximation of it, the twist, and weighted so that the twist leaves no trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from invgen.contracts import HasDenoiser, Solver
from invgen.driver import Streams
from invgen.linalg import inner
from invgen.problem import InverseProblem
from invgen.solvers import _twisted as twisted
from invgen.solvers._linearised import solve_in_data
from invgen.solvers._measured import log_constant, log_determinant
from invgen.solvers._particles import bookkeeping, in_blocks, last_draw, owners, pick, resample, share
from invgen.solvers._transitions import KERNELS, Kernel, network_levels, spread, transition_mean, widened_start
from invgen.solvers.diffusion import check_diffusion_problem, check_start, name_bad_level, prior_mean
from invgen.solvers.guidance import noise_levels

__all__ = ["TDS"]


@dataclass(frozen=True)
class TDS(Solver):
    r"""Twisted diffusion sampler (Wu, Trippe, Naesseth, Blei & Cunningham 2023, arXiv:2306.17775, algorithm 1).

    Particles at level σ carry the twist ĥ(u) ≈ p(d | u_σ = u). From σ to σ', with p(u' | u) = N(F, c I),

        proposal   u' ~ N(F(u) + (1 − σ'²/σ²) σ² ∇ log ĥ(u), c I)
        weight     w ← w · p(u' | u) ĥ'(u') / (proposal density · ĥ(u))

    and particles are resampled where their effective number falls below `threshold` of them. From the last level
    p(u0 | u) = N(D, σ_min² I) is conjugate to the data: the last weight N(d; A D, R + σ_min² A Aᵀ)/ĥ(u) needs no u0, and
    u0 is then drawn from p(u0 | u, d) itself, after the last resampling.

    Targets p(x | d) exactly as particles → ∞ *for the prior that the chain of levels implies*, whatever the twist: all
    that is left is the difference of that chain from the prior, which goes to 0 as steps → ∞, σ_max → ∞, σ_min → 0
    (for learned priors: the law that the network samples with this chain). The mean weights give log p(d).

    The particles of an observation interact by design: the `num_samples` draws come from one set of at least
    `particles` (rounded up to a multiple of num_samples), without replacement only as far as weights allow
    (`stats["particle"]` says which one a draw came from). The cost is that of the set, not of the draws.

    Twists, both with a Gaussian p(u0 | u_σ) ≈ N(D, V):

    - "mmps": V = σ² J, the covariance of p(u0 | u_σ) itself: no weight but the chain's is left for a Gaussian prior, and
      modes are weighed rightly early on. One vector–Jacobian product for each measured component, at most 256 of them.
    - "pigdm": V = r² I, r² = σ² s²/(σ² + s²), s² the prior's mean variance. One product whatever the data; with precise
      data and separate modes it commits to modes too early and the weights may collapse.

    Args:
        twist: see above.
        particles: of an observation.
        steps: noise levels.
        threshold: effective number over particles that triggers resampling; 0 never, 1 always.
        kernel: the chain's mean F, "heun" (second order, twice the network passes) or "ancestral" (the paper's).
        sigma_max: first level; 7 √λ_max of the prior when omitted. sigma_min: last level before 0.
        rho: warping of the schedule (EDM equation 5); the default is nearly even in log σ.

    Returns with the samples: `log_evidence`; `ess`, the effective number of particles at the end, and `ess_min`, the
    smallest before a resampling; `ancestors`, of how many first particles the last ones descend, effectively (1/ancestors
    is about the relative variance of the evidence); `resamplings`; `particle`; `unconverged`, how many of the last solves of
    an item and its particles missed their tolerance. A warning tells of weights that collapsed,
    and of fewer than four ancestors.

    Cost: particles · steps network passes (twice that with "heun") with 1 vector–Jacobian product each for "pigdm",
    and one for each measured component for "mmps"; one device synchronisation a step. Needs `HasDenoiser`, an affine
    transform, linear-Gaussian terms.

    Measured on the 16-d Gaussian of the exam, the worst of noise 0.05 / 0.3 / 1: mean error 0.02, sd ratio 1.004, coverage
    0.90 with the MMPS twist; 0.05, 1.010, 0.90 with the ΠGDM twist, all of that at noise 0.05.

    Raises:
        TypeError: a problem that is not linear-Gaussian, or has too many data for "mmps".
        DivergenceError: a denoiser that is not finite at a noise level, which is named.
    """

    twist: twisted.Rule = "mmps"
    particles: int = 4096
    steps: int = 100
    threshold: float = 0.5
    kernel: Kernel = "heun"
    sigma_max: float | None = None
    sigma_min: float = 0.01
    rho: float = 20.0

    needs: ClassVar[tuple[type, ...]] = (HasDenoiser,)
    kind: ClassVar[str] = "approximate"
    pooled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.twist not in twisted.RULES or self.kernel not in KERNELS:
            raise ValueError(
                f"TDS needs a twist of {twisted.RULES} and a kernel of {KERNELS}, got {self.twist!r} and {self.kernel!r}."
            )
        if self.particles < 1 or self.steps < 2 or not 0 <= self.threshold <= 1:
            raise ValueError(
                f"TDS needs particles >= 1, steps >= 2 and 0 <= threshold <= 1, got {self.particles}, {self.steps}, {self.threshold}."
            )

    @classmethod
    def examples(cls) -> list[TDS]:
        """Cheap instances for the conformance tests."""
        return [
            cls("pigdm", particles=64, steps=12),
            cls("mmps", particles=32, steps=12),
            cls("pigdm", particles=32, steps=12, kernel="ancestral", threshold=1.0),
        ]

    @classmethod
    def exam(cls) -> dict[str, TDS]:
        """Both twists: label -> solver."""
        return {
            "mmps": cls("mmps", particles=16384, steps=100),
            "pigdm": cls("pigdm", particles=16384, steps=100),
        }

    def check(self, problem: InverseProblem) -> None:
        super().check(problem)
        check_diffusion_problem(self, problem, linear_only=True)
        check_start(self, problem, self.sigma_max)
        twisted.check_rule(self.twist, self, problem)

    def num_steps(self, problem: InverseProblem) -> int:
        return self.steps

    def levels(self, problem: InverseProblem) -> list[float]:
        """The schedule: `steps` levels and 0."""
        return noise_levels(self, problem, self.steps)

    def init(self, problem: InverseProblem, rng: Streams) -> dict[str, Tensor]:
        top = self.levels(problem)[0]
        each = share(self.particles, rng)
        xi = rng.normal((each, *problem.model_shape), dtype=problem.dtype, tag="step")
        flat = xi.flatten(0, 1)
        u = widened_start(problem, prior_mean(problem, flat[:1], top), flat, top)
        twist = self._twist(problem, u.reshape(xi.shape), top)
        return {**bookkeeping(rng, twist["log_twist"]), **twist}

    def step(self, problem: InverseProblem, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        now, after = self.levels(problem)[int(state["k"]) :][:2]
        if after == 0:
            return self._last(problem, state, rng, now)
        state = resample(state, rng, self.threshold, ("particles", "clean", "pull", "log_twist"))
        old, sd = state["log_twist"], spread(now, after)
        items, each = old.shape

        def move(u: Tensor, clean: Tensor, pull: Tensor, xi: Tensor, owner: Tensor) -> tuple[Tensor, ...]:
            shift = (1 - (after / now) ** 2) * pull
            # log p(u' | u) − log proposal = −(ξ + s/2)·s with s = shift/sd
            s = shift / sd
            ratio = -inner(xi + 0.5 * s, s).double()
            moved = transition_mean(problem, self.kernel, u, clean, now, after).add_(shift).add_(xi, alpha=sd)
            return moved, *twisted.evaluate(self.twist, self, problem, moved, owner, after), ratio

        xi = rng.normal(state["particles"].shape[1:], dtype=state["particles"].dtype, tag="step")
        flat = (v.flatten(0, 1) for v in (state["particles"], state["clean"], state["pull"], xi))
        *twist, ratio = in_blocks(problem, move, *flat, owners(problem, items, each))
        state = {**state, **_by_item(old.shape, *twist), "k": state["k"] + 1}
        weights = state["log_weights"] + ratio.reshape(items, each) + state["log_twist"] - old
        return {**state, "log_weights": weights}

    def _twist(self, problem: InverseProblem, particles: Tensor, sigma: float) -> dict[str, Tensor]:
        items, each = particles.shape[:2]
        found = in_blocks(
            problem,
            lambda u, o: twisted.evaluate(self.twist, self, problem, u, o, sigma),
            particles.flatten(0, 1),
            owners(problem, items, each),
        )
        return _by_item(particles.shape[:2], particles.flatten(0, 1), *found)

    @torch.no_grad()
    def _last(self, problem: InverseProblem, state: dict[str, Tensor], rng: Streams, sigma: float) -> dict[str, Tensor]:
        system = problem.linear_gaussian("u")
        A, data, R = system.operator, system.data, system.R
        items, each = state["log_twist"].shape
        owner = owners(problem, items, each)

        def explained(clean: Tensor, o: Tensor) -> tuple[Tensor, Tensor]:
            residual = data[o] - A(clean)
            solved = solve_in_data(problem, residual, sigma**2)
            return -0.5 * inner(residual, solved.x).double(), (~solved.converged).double()

        fit, missed = in_blocks(problem, explained, state["clean"].flatten(0, 1), owner)
        state = {
            **state,
            "log_weights": state["log_weights"] + fit.reshape(items, each) - state["log_twist"],
        }
        chosen, out = last_draw(self, state, rng)
        # u0 given D and d, exactly: perturb both, solve
        near = pick(state["clean"], chosen)
        near = near + sigma * rng.normal(problem.model_shape, dtype=near.dtype, tag="near")
        target = data + R.sqrt(rng.normal(getattr(R, "noise_shape", A.data_shape), dtype=data.dtype, tag="data"))
        solved = solve_in_data(problem, target - A(near), sigma**2)
        u = near + sigma**2 * A.adjoint(solved.x)
        out["stat_unconverged"] = missed.reshape(items, each).sum(1) + (~solved.converged).double()
        valid = out.pop("valid").reshape(-1, *(1,) * (u.ndim - 1))
        u = torch.where(valid, u, torch.full_like(u, torch.nan))
        name_bad_level(self, problem, u, network_levels(self.kernel, self.levels(problem)))
        out["x"] = problem.prior.transform(u)
        evidence = out.pop("log_evidence")
        determinant = log_determinant(self, problem, sigma**2)
        if determinant is not None:
            out["log_evidence"] = evidence + log_constant(problem) - 0.5 * determinant
        return out


def _by_item(
    shape: Sequence[int], particles: Tensor, clean: Tensor, pull: Tensor, log_twist: Tensor
) -> dict[str, Tensor]:
    """What belongs to particles, `(items, share, …)` each."""
    found = {"particles": particles, "clean": clean, "pull": pull, "log_twist": log_twist}
    return {k: v.reshape(*shape, *v.shape[1:]) for k, v in found.items()}
