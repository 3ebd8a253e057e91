r"""Variational inference: the law of a family that is closest to the posterior, fitted by optimisation.

Unknowns are latent, q = (z, z_θ) ~ N(0, I) beforehand, x = f(z), θ = f_θ(z_θ). A law q_φ is fitted to each observation
by maximising

    ELBO(φ) = E_{q ~ q_φ} [log p(d | q) + log N(q; 0, I) − log q_φ(q)] = log p(d) − KL(q_φ ‖ p(q | d)),

with draws q = T_φ(ε), ε ~ N(0, I). Gradients take the path through the draw only, ∂T_φ/∂φ · ∇_q(log p − log q_φ)
(sticking the landing, Roeder, Wu & Duvenaud 2017, arXiv:1703.09194): unbiased, because the score of q_φ has mean zero,
and without noise where q_φ is the posterior. KL(q ‖ p) punishes mass where the posterior has none: a family too small
for the posterior gives a law too narrow, and one of several modes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from invgen.contracts import HasLatent, Solver
from invgen.driver import Streams
from invgen.problem import InverseProblem
from invgen.solvers import _descent
from invgen.solvers._importance import (
    assess,
    likelihood_constant,
    observation_streams,
    repeated_target,
    warn_of_bad_fits,
)
from invgen.solvers._particles import sets
from invgen.solvers._target import check_target, target_of

__all__ = ["VariationalGaussian"]

State = dict[str, Tensor]
_MEMORY = 0.9  # of the running means of gradients
_PAIRS = 20  # of points and gradients that the search for a mode keeps


class _Variational(Solver):
    """Draws, checks and results of every fitted law; private.

    A subclass keeps its law in the state under names of its own and defines `first`, `update` and `push`.
    """

    needs: ClassVar[tuple[type, ...]] = (HasLatent,)
    kind: ClassVar[str] = "approximate"
    pooled: ClassVar[bool] = True  # one fit an observation, shared by its samples

    steps: int
    draws: int
    search: int
    check_draws: int

    def first(self, dim: int, like: Tensor) -> State:
        """The law before the first step, every tensor `(sets, …)`; like: `(sets,)`."""
        raise NotImplementedError

    def update(self, problem: InverseProblem, state: State, rng: Streams, k: int) -> State:
        """One step of the optimisation."""
        raise NotImplementedError

    def push(self, state: State, white: Tensor) -> tuple[Tensor, Tensor]:
        """q `(sets, n, dim)` and log q_φ(q) `(sets, n)` of white `(sets, n, dim)`."""
        raise NotImplementedError

    def check(self, problem: InverseProblem) -> None:
        super().check(problem)
        check_target(self, problem, "z", gradient=True)

    def num_steps(self, problem: InverseProblem) -> int:
        return self.search + self.steps

    def init(self, problem: InverseProblem, rng: Streams) -> State:
        n_sets, _ = sets(rng)
        like = torch.zeros(n_sets, dtype=problem.dtype, device=rng.device)
        start = {"k": torch.zeros((), dtype=torch.long), "failed": like.clone()}
        state = {**start, **self.first(target_of(problem, "z").dim, like)}
        if self.search:
            found = _descent.start(self._objective(problem, rng), state["mean"], 1e-6, _PAIRS, adam=False)
            state |= {f"search_{k}": v for k, v in found.items()}
        return state

    def step(self, problem: InverseProblem, state: State, rng: Streams) -> State:
        k = int(state["k"])
        if k < self.search:
            found = {n.removeprefix("search_"): v for n, v in state.items() if n.startswith("search_")}
            found = _descent.lbfgs_step(self._objective(problem, rng), found)
            if k + 1 < self.search:
                state = {**state, **{f"search_{n}": v for n, v in found.items()}}
            else:
                state = {n: v for n, v in state.items() if not n.startswith("search_")} | {"mean": found["v"]}
        else:
            state = self.update(problem, state, rng, k - self.search)
        state = {**state, "k": state["k"] + 1}
        return self._drawn(problem, state, rng) if k + 1 == self.search + self.steps else state

    def _objective(self, problem: InverseProblem, rng: Streams) -> _descent.Objective:
        """−log posterior in q, of one position an observation."""
        target = repeated_target(problem, rng, 1)
        return lambda q: target.misfit(q) + 0.5 * q.square().sum(1)

    def white(self, problem: InverseProblem, rng: Streams) -> Tensor:
        """ε of a step, `(sets, draws, dim)`, in pairs ε, −ε: what is linear in ε has no noise."""
        shape = (-(-self.draws // 2), target_of(problem, "z").dim)
        half = observation_streams(problem, rng, "fit").normal(shape, dtype=problem.dtype)
        return torch.cat([half, -half], dim=1)

    def gradients(self, problem: InverseProblem, state: State, q: Tensor, rng: Streams) -> tuple[Tensor, Tensor, State]:
        """∇_q(log p(d | q) − |q|²/2), which draws have one, and the state with the others counted.

        An observation with more than half of its draws without a finite likelihood is given up: its gradients are NaN.

        Args:
            q: `(sets, n, dim)`.
        """
        n_sets, n, dim = q.shape
        phi, slope = repeated_target(problem, rng, n).value_and_grad(q.reshape(-1, dim))
        pull = -(slope.reshape(q.shape) + q)
        good = torch.isfinite(phi.reshape(n_sets, n)) & torch.isfinite(pull).all(-1)
        bad = (~good).sum(1)
        lost = 2 * bad > n
        count = state["failed"] + torch.where(torch.isfinite(state["failed"]), bad, 0)
        new = lost & torch.isfinite(state["failed"])
        if bool(new.any()):
            observations = list(dict.fromkeys(o for o, _ in rng.items))
            which = ", ".join(str(observations[i]) for i in new.nonzero().flatten().tolist())
            warnings.warn(
                f"{type(self).__name__} gave up observation {which}: {int(bad[new][0])} of {n} draws had no finite likelihood and gradient; check the data and the range of the prior against what the physics can compute.",
                stacklevel=5,
            )
        pull = torch.where(good[..., None], pull, torch.zeros_like(pull))
        pull = torch.where(lost[:, None, None], torch.full_like(pull, math.nan), pull)
        return pull, good, {**state, "failed": torch.where(lost, torch.full_like(count, math.nan), count)}

    @torch.no_grad()
    def _drawn(self, problem: InverseProblem, state: State, rng: Streams) -> State:
        """The samples of the run, and figures of the fit."""
        n_sets, each = sets(rng)
        dim = target_of(problem, "z").dim
        white = rng.normal((dim,), dtype=problem.dtype, tag="sample").reshape(n_sets, each, dim)
        q, _ = self.push(state, white)
        test = observation_streams(problem, rng, "check").normal((self.check_draws, dim), dtype=problem.dtype)
        at, log_q = self.push(state, test)
        phi = repeated_target(problem, rng, self.check_draws).value(at.reshape(-1, dim)).reshape(n_sets, -1)
        log_normal = -0.5 * at.square().sum(-1) - 0.5 * dim * math.log(2 * math.pi)
        fit = assess(likelihood_constant(problem) - phi.double() + log_normal.double() - log_q.double())
        warn_of_bad_fits(self, fit, self.check_draws)
        names = {"elbo": fit.elbo, "iw_bound": fit.iw_bound, "khat": fit.khat, "failed_draws": state["failed"]}
        figures = {f"stat_{k}": v.repeat_interleave(each).to(problem.dtype) for k, v in names.items()}
        return {**state, **figures, "z": q.reshape(n_sets * each, dim)}

    def finish(self, problem: InverseProblem, state: State) -> Mapping[str, Tensor]:
        target = target_of(problem, "z")
        x, theta = target.physical(state["z"])
        return {
            "x": x,
            "latent": target.parts(state["z"])[0],
            **{f"theta_{name}": v for name, v in theta.items()},
            **{k: v for k, v in state.items() if k.startswith("stat_")},
        }


@dataclass(frozen=True)
class VariationalGaussian(_Variational):
    r"""The Gaussian N(μ, L Lᵀ) closest to the latent posterior in KL(q ‖ p); L triangular or diagonal.

    With draws q = μ + L ε and a = Lᵀ ∇(log p(d | q) − |q|²/2) + ε, the gradients of the ELBO in the coordinates that
    the present law whitens are ave(a) for the mean and ave(a εᵀ) for the factor: both zero, without noise, where the
    law is the posterior. Steps are taken there, which for a Gaussian is the natural gradient up to the triangle that is
    taken of the second (local parametrisations: Lin, Nielsen, Khan & Schmidt 2021, arXiv:2102.07405):

        μ ← μ + ρ L m,       L ← L T,   T triangular with diagonal exp(ρ S_ii) and ρ S below,

    m and S running means of the gradients divided by 1 + |S|, so that the first steps, with a law far too wide, are
    Newton-like and do not jump; ρ falls to zero as a half cosine. With 16
    unknowns 500 steps are enough at a condition number of 10³, 1000 at 10⁶ (ELBO equal to the evidence to 10⁻⁴).

    Targets the best Gaussian in the latent space: p(x | d) itself for a linear-Gaussian problem ("full"); the law with
    variances 1/P_ii for a Gaussian posterior of precision P ("mean-field"), too narrow where unknowns are correlated,
    by up to the square root of the condition number; for nonlinear physics an approximation, k̂ says how good.

    Args:
        family: "full" (n (n + 1)/2 numbers) or "mean-field" (n).
        steps: of the optimisation. draws: K for each step and observation, in pairs ε, −ε.
        rate: ρ at first.
        search: iterations of L-BFGS before, towards a mode for the mean to start from; 0 starts from the prior's mean.
            A mean-field law needs it where the posterior is ill-conditioned: its own steps to the mean are many then.
        check_draws: S draws for the figures of the fit.

    `stats`, one number an observation: elbo, iw_bound, khat (`_importance`; a warning above 0.7), failed_draws. An
    observation for which more than half of the draws have no finite likelihood is given up, with a warning.
    The samples of an observation share one fit, which does not depend on their number.
    Cost: K values and gradients of generator and physics a step and S values, for each observation; K n² numbers.
    """

    family: str = "full"
    steps: int = 1000
    draws: int = 16
    rate: float = 0.2
    search: int = 100
    check_draws: int = 1000

    def __post_init__(self) -> None:
        if self.family not in ("full", "mean-field"):
            raise ValueError(f"VariationalGaussian has the families 'full' and 'mean-field', got {self.family!r}.")
        if min(self.steps, self.draws - 1, self.search + 1, self.check_draws - 99) < 1 or not 0 < self.rate <= 1:
            raise ValueError(
                f"VariationalGaussian needs steps >= 1, draws >= 2, search >= 0, check_draws >= 100 and a rate in (0, 1], got {self.steps}, {self.draws}, {self.search}, {self.check_draws} and {self.rate}."
            )

    @classmethod
    def examples(cls) -> list[VariationalGaussian]:
        """Both families."""
        return [
            cls(steps=30, draws=8, search=0, check_draws=100),
            cls("mean-field", steps=20, draws=8, search=10, check_draws=100),
        ]

    @classmethod
    def exam(cls) -> dict[str, VariationalGaussian]:
        """The full family."""
        return {"full": cls(steps=1000, draws=32)}

    def first(self, dim: int, like: Tensor) -> State:
        return gaussian_start(self.family, dim, like)

    def update(self, problem: InverseProblem, state: State, rng: Streams, k: int) -> State:
        rho = 0.5 * self.rate * (1 + math.cos(math.pi * k / self.steps))
        white = self.white(problem, rng)
        pull, good, state = self.gradients(problem, state, gaussian_push(state, white), rng)
        return gaussian_update(state, white, pull, good, rho)

    def push(self, state: State, white: Tensor) -> tuple[Tensor, Tensor]:
        return gaussian_push(state, white), gaussian_log_prob(state, white)


def gaussian_start(family: str, dim: int, like: Tensor) -> State:
    """The prior, N(0, I), and empty running means; the factor is `(sets, n)` where it is diagonal."""
    n_sets = len(like)
    factor = like.new_ones(n_sets, dim) if family == "mean-field" else torch.eye(dim).to(like).repeat(n_sets, 1, 1)
    mean = like.new_zeros(n_sets, dim)
    return {"mean": mean, "factor": factor, "push": mean.clone(), "grow": torch.zeros_like(factor)}


def gaussian_push(state: State, white: Tensor) -> Tensor:
    """μ + L ε."""
    L = state["factor"]
    return state["mean"][:, None] + (white * L[:, None] if L.ndim == 2 else white @ L.mT)


def gaussian_log_det(state: State) -> Tensor:
    """log det L, `(sets,)`."""
    L = state["factor"]
    return (L if L.ndim == 2 else L.diagonal(dim1=-2, dim2=-1)).log().sum(-1)


def gaussian_log_prob(state: State, white: Tensor) -> Tensor:
    """log N(μ + L ε; μ, L Lᵀ), `(sets, n)`."""
    return (
        -0.5 * white.square().sum(-1) - 0.5 * white.shape[-1] * math.log(2 * math.pi) - gaussian_log_det(state)[:, None]
    )


def gaussian_update(state: State, white: Tensor, pull: Tensor, good: Tensor, rho: float) -> State:
    """One natural-gradient step of `VariationalGaussian`.

    Args:
        white, pull: ε and ∇(log p(d | q) − |q|²/2), `(sets, n, dim)`. good: `(sets, n)`. rho: length of the step.
    """
    L = state["factor"]
    return whitened_step(state, white, (pull * L[:, None] if L.ndim == 2 else pull @ L) + white, good, rho)


@torch.no_grad()
def whitened_step(state: State, v: Tensor, a: Tensor, good: Tensor, rho: float) -> State:
    """Move μ and L of q = μ + L v, given the gradients a of log p − log q_φ by v, `(sets, n, dim)` both."""
    L = state["factor"]
    diagonal = L.ndim == 2
    a = torch.where(good[..., None] | torch.isnan(a), a, torch.zeros_like(a))
    count = good.sum(1).clamp_min(1).to(a)
    m = a.sum(1) / count[:, None]
    S = (a * v).sum(1) / count[:, None] if diagonal else (a.mT @ v).tril() / count[:, None, None]
    m = _MEMORY * state["push"] + (1 - _MEMORY) * m
    S = _MEMORY * state["grow"] + (1 - _MEMORY) * S
    # 1 + |S| bounds the curvature in whitened coordinates, I − S for a Gaussian posterior
    if diagonal:
        step = L * (rho * m / (1 + S.abs())).clamp(-1, 1)
        factor = L * (rho * S / (1 + S.abs())).exp()
    else:
        size = 1 + S.flatten(1).norm(dim=1)
        turn = rho * S / size[:, None, None]
        T = turn.tril(-1) + torch.diag_embed(turn.diagonal(dim1=-2, dim2=-1).exp())
        step, factor = (L @ (rho * m / size[:, None])[..., None])[..., 0], L @ T
    return {**state, "mean": state["mean"] + step, "factor": factor, "push": m, "grow": S}
