r"""Mode-jumping Markov chains: jumps between the modes that annealed particles have found, Hamiltonian steps within them.

    π(z) ∝ p(d | g(f(z))) N(z; 0, I),        q(z) = Σ_m s_m t_ν(z; μ_m, Σ_m) fixed,        w = π/q

A step is two transitions, each of which leaves π invariant.

Jump (multiple-try independence sampler; Liu, Liang & Wong 2000, section 4): z_1 … z_K are drawn from q, y is one of them with
probability w(z_k)/W, W = Σ_k w(z_k), and is accepted with min(1, W/(W − w(y) + w(z))). With A the sum of w over the K − 1 others,
the density of going from z to y ≠ z is

    K q(y) E_A[ w(y)/(w(y) + A) · min(1, (w(y) + A)/(w(z) + A)) ]  =  K π(y) E_A[ 1/max(w(y) + A, w(z) + A) ],

so that π(z) times it is symmetric in z and y: detailed balance. K = 1 is the independence sampler min(1, w(y)/w(z)) (Tierney
1994). As Φ is bounded below and the tails of q are heavier than those of N(0, I), w is bounded, and the chain is uniformly ergodic
(Mengersen & Tweedie 1996, theorem 2.1).

Within a mode: m is drawn with the responsibilities ρ_m(z) = s_m t_m(z)/q(z), which leaves π(z) ρ_m(z) invariant, and a leapfrog
trajectory in units of L_m, Σ_m = L_m L_mᵀ, is accepted with

    min(1, π(z') ρ_m(z') e^(−|p'|²/2) / (π(z) ρ_m(z) e^(−|p|²/2))),        z' = z + ε L_m p, …,

the Metropolis rule for π(z) ρ_m(z): leapfrog steps keep volumes and turn back whatever force they follow, here ∇ log π. Each mode
so has its own mass matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from invgen.contracts import HasLatent
from invgen.solvers._chain import Chain, _leaders, groups
from invgen.solvers._hamiltonian import DIVERGENT, full_gradient, potential
from invgen.solvers._mode_mixture import NU, Mixture, chosen
from invgen.solvers._mode_search import ModeSearch
from invgen.solvers._particles import pick, systematic
from invgen.solvers._target import Target, target_of
from invgen.solvers._tempered import log_constant, widened
from invgen.solvers._warmup import average, first_average, radical_inverse

if TYPE_CHECKING:
    from invgen.driver import Streams
    from invgen.problem import InverseProblem

__all__ = ["ModeJumping"]

_DIM = 100  # numbers of a position up to which full covariances of modes are learnt


@dataclass(frozen=True)
class ModeJumping(Chain):
    r"""Chains that jump between separated modes with the right frequencies. Targets the exact posterior.

    Asymptotically exact for any mixture q, as its tails cover everything; fast among the modes that the search found. A mode
    that no population found is reached by the tails of q and by Hamiltonian steps alone, which may take forever: `runs` is
    what finds modes, and the log-evidence misses what they missed.

    1. Search: `runs` populations of `AnnealedSMC`, all observations and runs in one batch, then a short HMC from `settlers`
       particles of each, half of them as they were before t = ½, where small modes hold more; those that are far from each
       other are taken. Step and mass matrix are learnt for each run.
    2. Mixture: a t component (ν = 8, full covariance) for each group of settled chains in one place; four rounds of `pilot`
       draws improve shares, means and covariances by importance weights (population Monte Carlo); a fifth estimates the
       evidence. A fifth of the shares is then spread evenly over the components, so that small modes are proposed often
       enough. From here on q is fixed (adaptation in stages, Andrieu & Thoms 2008).
    3. Chains start from the weighted pilot draws; a step is a jump with `tries` proposals and a trajectory in the mode (the
       equations are in the module). The warm-up adapts one step size, in units of the modes' own covariances.

    The chains of an observation share the search, the mixture and the step size. Populations are few when modes are many: a
    mode of share p is visited about p times the draws of all chains, and its share is known to the square root of that.

    Args:
        draws, warmup, thin, superchains: as for every chain. starts: "prior" (as in 3), or positions.
        tries: K of a jump. runs, particles: populations and particles of each. cess, moves: of `AnnealedSMC`.
        sweeps: the most that a population may take. settlers: chains of each run in the short HMC.
        pilot: draws of q in each round. target: acceptance of trajectories that the warm-up aims at. max_leaps: of one.

    Assumes a latent space of at most 100 numbers (nuisance parameters included) and a gradient almost everywhere.

    Returns with the draws: `log_evidence`; stats `accept` (trajectories), `jump` (probability that a jump is accepted), `mode`
    (of each draw), `divergent`, `mode_changes` (of each chain among all steps after the warm-up), `modes` (in the mixture),
    `mixture_ess` (effective size over pilot draws), `log_evidence_error`, `temperature` (mean over runs of where they ended),
    `step_size`, `invalid`.

    Cost: search runs · particles · sweeps · 3 and runs · settlers · 32 · leaps gradients, 5 · pilot forwards; then `tries`
    forwards and one gradient a leap (3 to 6) a step.
    References: Liu, Liang & Wong, JASA 95, 2000; Tierney, Annals of Statistics 22, 1994; Mengersen & Tweedie, Annals of
    Statistics 24, 1996; Cappé et al., Statistics and Computing 18, 2008, arXiv:0710.4242; Andrieu & Thoms, Statistics and
    Computing 18, 2008; Pompe, Holmes & Łatuszyński, Annals of Statistics 48, 2020, arXiv:1812.02609 (jumps that adapt).
    """

    needs: ClassVar[tuple[Any, ...]] = (HasLatent,)
    gradient: ClassVar[bool] = True
    watched: ClassVar[tuple[str, ...]] = ("accept", "jump", "mode", "divergent")

    draws: int = 250
    warmup: int = 50
    tries: int = 16
    runs: int = 8
    particles: int = 256
    cess: float = 0.6
    moves: int = 2
    sweeps: int = 300
    settlers: int = 32
    pilot: int = 4000
    target: float = 0.8
    max_leaps: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("tries", 1), ("runs", 1), ("sweeps", 1), ("settlers", 2), ("pilot", 10), ("max_leaps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"ModeJumping needs {name} of at least {least}, got {getattr(self, name)}.")
        if not 0 < self.target < 1:
            raise ValueError(f"ModeJumping needs target in (0, 1), got {self.target}.")
        if self.settlers > self.particles:
            raise ValueError(
                f"ModeJumping settles some of the particles of each run: settlers is {self.settlers} but particles {self.particles}; take fewer settlers."
            )
        if self.space == "u":
            raise ValueError("ModeJumping searches from N(0, I) of latent coordinates; leave space out.")
        self.search()  # its own checks

    @classmethod
    def examples(cls) -> list[ModeJumping]:
        """A short run."""
        return [
            cls(
                draws=6,
                warmup=6,
                thin=2,
                tries=4,
                runs=2,
                particles=32,
                moves=1,
                sweeps=12,
                settlers=8,
                pilot=64,
            )
        ]

    @classmethod
    def exam(cls) -> dict[str, ModeJumping]:
        """The defaults with fewer draws."""
        return {"ModeJumping": cls(draws=100)}

    def search(self) -> ModeSearch:
        """Populations, settling and pilot draws, step by step."""
        return ModeSearch(
            self.runs,
            self.particles,
            self.cess,
            self.moves,
            self.sweeps,
            self.settlers,
            self.pilot,
            type(self).__name__,
        )

    def check(self, problem: InverseProblem) -> None:
        super().check(problem)
        self.search().explorer.check(problem)
        dim = target_of(problem, "z").dim
        if dim > _DIM:
            raise TypeError(
                f"ModeJumping learns a full covariance of each mode and takes at most {_DIM} latent numbers, and here are {dim}; take HMC within one mode, or ParallelTempering."
            )

    def num_steps(self, problem: InverseProblem) -> int:
        return self.search().num_steps + super().num_steps(problem)

    def init(self, problem: InverseProblem, rng: Streams) -> dict[str, Tensor]:
        target = target_of(problem, "z")
        none = torch.zeros(len(rng), target.dim, dtype=problem.dtype, device=rng.device)
        state = {
            "z": none,
            "kept": none.new_full((len(none), self.draws, target.dim), math.nan),
            "clock": torch.zeros((), dtype=torch.long),
        }
        return state | self.search().init(problem, rng)

    def step(self, problem: InverseProblem, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        if "stage" not in state:
            return super().step(problem, state, rng)
        search = self.search()
        state = search.step(problem, state, rng)
        return state if int(state["stage"]) < search.num_steps else self._launched(problem, state, rng)

    def _launched(self, problem: InverseProblem, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        """The chains, from the pilot's draws, and nothing of the search but what they need."""
        target, observations = target_of(problem, "z"), groups(rng)
        if isinstance(self.starts, Tensor):
            z = self.starts[[s % len(self.starts) for _, s in rng.items]].to(state["z"])
        else:
            weights = torch.nan_to_num(state["pilot_logs"], nan=-math.inf).softmax(1)
            offset = rng.uniform((), dtype=torch.float64, tag="start").reshape(observations, -1)[:, 0].to(weights)
            order = systematic(torch.nan_to_num(weights), offset, len(rng) // observations)
            z = pick(state["pilot_draws"], order).to(state["z"])
        if self.superchains is not None:
            z = z[torch.tensor(_leaders(rng, self.superchains), device=z.device)]
        phi = target.value(z)
        lost = torch.isnan(state["search_log_evidence"]).repeat_interleave(len(rng) // observations)
        z = torch.where((torch.isfinite(phi) & ~lost)[:, None], z, math.nan)
        kept = {n: v for n, v in state.items() if n.startswith(("mixture_", "search_"))}
        return kept | self.started(target, z, phi, rng)

    def begin(self, target: Target, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        z = state["z"]
        first = z.new_full((groups(rng),), math.log(0.5 * target.dim**-0.25))
        more = {"grad": full_gradient(target, z, state["grad"]), "mode": z.new_zeros(len(z)) - 1}
        return more | {"mode_changes": z.new_zeros(len(z))} | first_average(first)

    # --- a step --------------------------------------------------------------------------------------------------------

    def move(
        self, target: Target, state: dict[str, Tensor], rng: Streams, clock: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        mixture = Mixture.of(state)
        z, phi, jumped, failed = self._jump(target, mixture, state, rng)
        # the gradient at the place jumped to; where a chain stayed it is known, but a batch is one pass
        grad = full_gradient(target, z, target.value_and_grad(z)[1])
        new, figures = self._trajectory(target, mixture, {**state, "z": z, "phi": phi, "grad": grad}, rng, clock)
        parts = mixture.parts(new["z"].unflatten(0, (groups(rng), -1)))
        mode = state["mixture_mode"].gather(1, parts.argmax(2)).flatten().to(z)
        changed = (mode != state["mode"]) & (clock >= self.warmup) & (state["mode"] >= 0)
        new |= {"mode": mode, "mode_changes": state["mode_changes"] + changed}
        return new, figures | {"jump": jumped, "mode": mode, "invalid": 0.5 * (figures["invalid"].to(failed) + failed)}

    def _jump(
        self, target: Target, mixture: Mixture, state: dict[str, Tensor], rng: Streams
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """z and Φ after a jump, the probability that it was accepted, the share of tries without a likelihood."""
        z, phi, K, sets = state["z"], state["phi"], self.tries, groups(rng)
        u = rng.uniform((K,), dtype=torch.float64, tag="component").reshape(sets, -1)
        xi = rng.normal((K, target.dim), dtype=torch.float64, tag="jump").reshape(sets, -1, target.dim)
        gamma = rng.gamma(NU / 2, (K,), dtype=torch.float64, tag="tail").reshape(sets, -1)
        select, uniform = rng.uniform((2,), dtype=torch.float64, tag="jump").unbind(1)
        tried = mixture.draw(u, xi, gamma).to(z)
        value = widened(target, rng, K).value(tried.flatten(0, 1))
        logs = log_weights(mixture, tried, value).reshape(-1, K)
        here = log_weights(mixture, z.unflatten(0, (sets, -1)), phi).flatten()
        index = chosen(logs, select)[:, None]
        others = logs.scatter(1, index, -math.inf).logsumexp(1)
        gain = logs.logsumexp(1) - torch.logaddexp(others, here)
        chance = torch.nan_to_num(gain, nan=-math.inf, posinf=0.0).clamp_max(0).exp()
        yes = uniform < chance
        there = tried.reshape(-1, K, target.dim).take_along_dim(index[..., None], 1)[:, 0]
        value = value.reshape(-1, K)
        phi = torch.where(yes, value.gather(1, index)[:, 0], phi)
        return torch.where(yes[:, None], there, z), phi, chance.to(z), torch.isnan(value).to(z).mean(1)

    def _trajectory(
        self, target: Target, mixture: Mixture, state: dict[str, Tensor], rng: Streams, clock: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A Hamiltonian trajectory of every chain in the units of a component that holds it."""
        z, sets = state["z"], groups(rng)
        parts = mixture.parts(z.unflatten(0, (sets, -1)))
        m = chosen(parts, rng.uniform((), dtype=torch.float64, tag="held").reshape(sets, -1))
        L = mixture.factors[torch.arange(sets, device=z.device)[:, None], m].flatten(0, 1).to(z)
        p = rng.normal((target.dim,), dtype=z.dtype, tag="momentum")
        uniform = rng.uniform((), dtype=z.dtype, tag="accept")
        logs = state["log_step"] if clock < self.warmup else state["log_step_mean"]
        step = logs.exp()
        leaps = torch.nan_to_num((0.5 + radical_inverse(clock + 1)) * 0.5 * math.pi / step, nan=1.0).ceil()
        leaps = leaps.clamp(1, self.max_leaps).repeat_interleave(len(z) // sets)
        size = step.repeat_interleave(len(z) // sets)
        before = potential(target, z, state["phi"]) + 0.5 * p.square().sum(1) - _held(parts, m)
        there, grad, phi = z, state["grad"], state["phi"]
        for leap in range(int(leaps.max())):  # the one wait for the device; who is done waits with a step of zero
            ahead = torch.where(leap < leaps, size, 0.0)[:, None]
            p = p - 0.5 * ahead * _times(L.mT, grad)
            there = there + ahead * _times(L, p)
            phi, grad = target.value_and_grad(there)
            grad = full_gradient(target, there, grad)
            p = p - 0.5 * ahead * _times(L.mT, grad)
        after = potential(target, there, phi) + 0.5 * p.square().sum(1)
        after = after - _held(mixture.parts(there.unflatten(0, (sets, -1))), m)
        alive = torch.isfinite(before)
        fine = torch.isfinite(after) & torch.isfinite(grad.sum(1))
        error = torch.where(fine, after - before, math.inf)
        chance = (-error).clamp_max(0).exp().to(z)
        yes = (uniform < chance) & alive
        new = {
            "z": torch.where(yes[:, None], there, z),
            "phi": torch.where(yes, phi, state["phi"]),
            "grad": torch.where(yes[:, None], grad, state["grad"]),
        }
        if clock < self.warmup:
            seen = torch.where(alive, chance, math.nan).unflatten(0, (sets, -1)).nanmean(1)
            new |= average(state, seen, self.target)
        invalid = alive & (torch.isnan(phi) | (torch.isfinite(phi) & ~fine))
        return new, {"accept": chance, "divergent": alive & ~(error < DIVERGENT), "invalid": invalid}

    def report(self, target: Target, state: dict[str, Tensor]) -> dict[str, Tensor]:
        each = len(state["z"]) // len(state["log_step"])
        used = torch.isfinite(state["mixture_log_shares"])
        modes = torch.stack([v[u].unique().numel() * torch.ones(()) for v, u in zip(state["mixture_mode"], used)])
        found = {
            "log_evidence": state["search_log_evidence"]
            + log_constant(target.problem)
            - 0.5 * target.dim * math.log(2 * math.pi),
            "stat_log_evidence_error": state["search_error"],
            "stat_mixture_ess": state["search_ess"],
            "stat_temperature": state["search_temperature"],
            "stat_modes": modes.to(state["z"]),
            "stat_step_size": state["log_step_mean"].exp(),
        }
        return {n: v.repeat_interleave(each) for n, v in found.items()} | {"stat_mode_changes": state["mode_changes"]}


def log_weights(mixture: Mixture, z: Tensor, phi: Tensor) -> Tensor:
    """log π/q but for constants, float64 `(sets, n)`, of z `(sets, n, dim)` and Φ `(sets · n,)`; −∞ without a likelihood."""
    q = mixture.parts(z).logsumexp(2)
    logs = -phi.double().reshape(q.shape) - 0.5 * z.double().square().sum(2) - q
    return torch.where(torch.isnan(logs), -math.inf, logs)


def _held(parts: Tensor, m: Tensor) -> Tensor:
    """log ρ_m `(batch,)` from log s_m t_m `(sets, n, M)`."""
    return parts.log_softmax(2).gather(2, m[..., None]).flatten()


def _times(L: Tensor, v: Tensor) -> Tensor:
    return (L @ v[..., None])[..., 0]
