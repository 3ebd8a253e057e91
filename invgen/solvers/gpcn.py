r"""Dimension-robust walks shaped by a Laplace approximation: generalised Crank–Nicolson and ∞-MALA.

With q ~ N(0, I) beforehand and Φ the misfit, N(m, C) with C = (I + V Λ Vᵀ)⁻¹ is the Laplace approximation at a mode m
(`_lowrank`). Every proposal here is reversible for a Gaussian apart from a drift, which leaves a finite acceptance
in any dimension; a function of C acts as f(λ_i) on the directions v_i and as f(0) on all others. Where the mode itself
does not enter, the curvature is that of the mode for half of the warm-up only, and then its mean over the positions of
16 chains (the expected Fisher information: Cui, Law & Marzouk 2016, section 3.3; best for Langevin steps: Titsias 2023).

    "prior"     q' = A q + B ξ,  B² = min(1, s² C),  A² = I − B²    reversible for N(0, I),   accept on Φ
    "laplace"   q' = m + √(1 − s²)(q − m) + s C^(1/2) ξ           reversible for N(m, C),   accept on Ψ

    Ψ(q) = Φ(q) + ½|q|² − ½(q − m)ᵀ C⁻¹ (q − m) = Φ(q) + m·q − ½ |Vᵀ(q − m)|²_Λ + const.

∞-MALA solves dq = −½ C (q + ∇Φ) dt + C^(1/2) dW by Crank–Nicolson in its linear part, with h_i = min(4, h/(1 + λ_i)) for v_i:

    q' = ρ q + σ (ξ − w),   ρ_i = (1 − h_i/4)/(1 + h_i/4),   σ_i = √h_i/(1 + h_i/4),   w_i = ½ √h_i ∇_iΦ(q),   ρ² + σ² = 1.

Without w the proposal is reversible for N(0, I); N(−w, I) has the density exp(−w·v − ½|w|²) with respect to N(0, I) at
v = (q' − ρ q)/σ, which gives the acceptance min(1, κ(q', q)/κ(q, q')), log κ(q, q') = −Φ(q) − w(q)·v − ½|w(q)|².
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from invgen.contracts import HasLatent
from invgen.noise import GaussianNoise
from invgen.solvers._chain import Chain, groups, pooled_mean
from invgen.solvers._curvature import at_mode, average_curvature
from invgen.solvers._target import Target
from invgen.solvers._whitened import check_curvature

if TYPE_CHECKING:
    from invgen.driver import Streams
    from invgen.problem import InverseProblem

__all__ = ["GPCN", "InfMALA"]

_REFERENCES = ("both", "prior", "laplace")


class _Shape:
    """Functions of C for all chains: `vectors` (obs, rank, n) and `values` (obs, rank) of each observation."""

    def __init__(self, vectors: Tensor, values: Tensor) -> None:
        self.vectors, self.values = vectors, values

    def _grouped(self, v: Tensor) -> Tensor:
        return v.reshape(len(self.vectors), -1, v.shape[-1])

    def inside(self, v: Tensor) -> Tensor:
        """Vᵀ v, `(batch, rank)`."""
        return torch.einsum("orn,omn->omr", self.vectors, self._grouped(v)).flatten(0, 1)

    def apply(self, v: Tensor, outside: Tensor, inside: Tensor) -> Tensor:
        """f(C) v, f being `outside` `(batch, 1)` off the directions and `inside` `(batch, rank)` on them."""
        change = self._grouped((inside - outside) * self.inside(v))
        return outside * v + torch.einsum("orn,omr->omn", self.vectors, change).flatten(0, 1)

    def each(self, batch: int) -> Tensor:
        """Λ of every chain, `(batch, rank)`."""
        return self.values.repeat_interleave(batch // len(self.values), 0)


def _log_step(state: dict[str, Tensor], first: float) -> Tensor:
    return torch.full_like(state["phi"], math.log(first))


def _adapted(
    log_step: Tensor, chance: Tensor, phi: Tensor, goal: float, clock: int, observations: int, most: Tensor
) -> Tensor:
    """Robbins–Monro on the acceptance of all living chains of an observation; `most` bounds the logarithm."""
    living = torch.where(torch.isfinite(phi), chance, torch.full_like(chance, math.nan))
    gain = 1 / math.sqrt(clock + 1.0)
    return torch.minimum(log_step + gain * (pooled_mean(living, observations) - goal), most)


@dataclass(frozen=True)
class GPCN(Chain):
    r"""Generalised preconditioned Crank–Nicolson walk. Targets the exact posterior p(z | d) ∝ p(d | g(f(z))) N(z; 0, I).

    The walk of `PCN`, with small steps where the data are informative and large ones elsewhere (equations in the module).
    Only mode and curvature use derivatives, once, when the chains start.

    Args:
        draws, warmup, thin, starts, superchains: as for every chain.
        reference: what proposals are reversible for. "prior" (Rudolf & Sprungk 2018: the step shrinks along informed
            directions, and nothing is assumed of the posterior far from the mode), "laplace" (Pinski et al. 2015: nearly
            independent draws where the posterior is nearly Gaussian, stuck where its tails are heavier) or "both", one
            after the other.
        beta: first step s in (0, 1]. target: acceptance that the warm-up aims at, pooled over the chains of an
            observation; None keeps beta.
        rank: directions of the curvature; None for all with an eigenvalue above 0.01.

    Assumes Gaussian noise and operators with second derivatives, for the curvature. Where the posterior is far from
    Gaussian the curvature at one mode says little of other places, and the walk is that of PCN with smaller steps.

    Cost: one decode and forward a step for each reference ("both": two); at the start up to 100 gradients for four chains
    and about 4 (rank + 10) products with the Jacobian. `stats`: accept, invalid, beta_prior, beta_laplace, rank.
    References: Rudolf & Sprungk, On a generalization of the preconditioned Crank–Nicolson Metropolis algorithm, Foundations
    of Computational Mathematics 18, 2018, section 3 (arXiv:1504.03461); Pinski, Simpson, Stuart & Weber, Algorithms for
    Kullback–Leibler approximation of probability measures in infinite dimensions, SIAM J. Sci. Comput. 37, 2015, section 4.
    """

    needs: ClassVar[tuple[Any, ...]] = (HasLatent,)

    thin: int = 5
    reference: str = "both"
    beta: float = 0.3
    target: float | None = 0.234
    rank: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference not in _REFERENCES:
            raise ValueError(f"GPCN takes reference from {_REFERENCES}, got {self.reference!r}.")
        if not 0 < self.beta <= 1 or (self.target is not None and not 0 < self.target < 1):
            raise ValueError(f"GPCN needs beta in (0, 1] and target in (0, 1) or None, got {self.beta}, {self.target}.")
        _check_latent(self, self.rank)

    @classmethod
    def examples(cls) -> list[GPCN]:
        """Short runs."""
        return [cls(draws=6, warmup=6, thin=2), cls(draws=4, warmup=4, thin=1, reference="prior", rank=3)]

    @classmethod
    def exam(cls) -> dict[str, GPCN]:
        """One draw of each of many chains."""
        return {"": cls(draws=1, warmup=2000)}

    def check(self, problem: InverseProblem) -> None:
        super().check(problem)
        check_curvature(problem, "GPCN")

    def begin(self, target: Target, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        steps = {f"log_{name}": _log_step(state, self.beta) for name in self._kernels()}
        found = at_mode(target, state, groups(rng), self.rank)
        return steps | found | {"metric_vectors": found["vectors"], "metric_values": found["values"]}

    def _kernels(self) -> tuple[str, ...]:
        return ("prior", "laplace") if self.reference == "both" else (self.reference,)

    def move(
        self, target: Target, state: dict[str, Tensor], rng: Streams, clock: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        z, phi = state["z"], state["phi"]
        new: dict[str, Tensor] = {}
        if clock == self.warmup // 2 and clock < self.warmup and "prior" in self._kernels():
            new |= average_curvature(target, z, phi, groups(rng), self.rank)
        metric = _metric(state | new)
        peak = _Shape(state["vectors"], state["values"])
        total, wrong = torch.zeros_like(phi), torch.zeros_like(phi)
        for name in self._kernels():
            s = state[f"log_{name}"].exp()[:, None]
            xi = rng.normal((target.dim,), dtype=z.dtype, tag=f"walk {name}")
            if name == "prior":
                proposal, tilt = _about_prior(metric, z, xi, s)
                most = 0.5 * torch.log1p(metric.each(len(z)).amax(1))
            else:
                proposal, tilt = _about_laplace(peak, state["mode"], z, xi, s)
                most = torch.zeros_like(phi)
            there = target.value(proposal)
            invalid = torch.isnan(there) | (there == -math.inf)
            chance = torch.where(invalid, torch.zeros_like(phi), (phi - there + tilt).clamp_max(0).exp())
            yes = rng.uniform((), dtype=z.dtype, tag=f"accept {name}") < chance
            if self.target is not None and clock < self.warmup:
                new[f"log_{name}"] = _adapted(state[f"log_{name}"], chance, phi, self.target, clock, groups(rng), most)
            z, phi = torch.where(yes[:, None], proposal, z), torch.where(yes, there, phi)
            total, wrong = total + chance, wrong + invalid.to(phi)
        count = len(self._kernels())
        return new | {"z": z, "phi": phi}, {"accept": total / count, "invalid": wrong / count}

    def report(self, target: Target, state: dict[str, Tensor]) -> dict[str, Tensor]:
        steps = {f"stat_beta_{name}": state[f"log_{name}"].exp() for name in self._kernels()}
        return steps | {"stat_rank": _rank(state)}


def _metric(state: dict[str, Tensor]) -> _Shape:
    return _Shape(state["metric_vectors"], state["metric_values"])


def _rank(state: dict[str, Tensor]) -> Tensor:
    """Directions of the metric, for each chain."""
    rank = (state["metric_values"] > 0).sum(1).to(state["phi"])
    return rank.repeat_interleave(len(state["phi"]) // len(rank))


def _about_prior(shape: _Shape, q: Tensor, xi: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """A proposal reversible for N(0, I), and the logarithm of its correction (none)."""
    outside = s.square().clamp_max(1.0)
    inside = (s.square() / (1 + shape.each(len(q)))).clamp_max(1.0)
    kept = shape.apply(q, (1 - outside).sqrt(), (1 - inside).sqrt())
    return kept + shape.apply(xi, outside.sqrt(), inside.sqrt()), q.new_zeros(len(q))


def _about_laplace(shape: _Shape, mode: Tensor, q: Tensor, xi: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """A proposal reversible for N(m, C), and (Ψ − Φ)(q) − (Ψ − Φ)(q')."""
    m, values = mode.repeat_interleave(len(q) // len(mode), 0), shape.each(len(q))
    away = q - m
    moved = (1 - s.square()).clamp_min(0).sqrt() * away + shape.apply(xi, s, s * (1 + values).rsqrt())
    excess = values * (shape.inside(away).square() - shape.inside(moved).square())
    return m + moved, (m * (away - moved)).sum(1) - 0.5 * excess.sum(1)


@dataclass(frozen=True)
class InfMALA(Chain):
    r"""∞-MALA, preconditioned by a Laplace approximation. Targets the exact posterior p(z | d) ∝ p(d | g(f(z))) N(z; 0, I).

    Langevin proposals discretised by Crank–Nicolson (equations in the module): the acceptance does not fall with the
    dimension of the latent, nor, preconditioned, with the precision of the data.

    Args:
        draws, warmup, thin, starts, superchains: as for every chain.
        step_size: first h in (0, 4]; 4 forgets the position in directions the data say nothing of.
        target: acceptance that the warm-up aims at, pooled over the chains of an observation (0.574: Roberts &
            Rosenthal 1998); None keeps the step.
        precondition: True for the curvature at a mode (Gaussian noise, operators with second derivatives), False for
            none (the method of Beskos et al. 2008), None where the problem allows it.
        rank: directions of the curvature; None for all with an eigenvalue above 0.01.

    Cost: a decode, a forward and a gradient a step; at the start as GPCN. `stats`: accept, invalid, step_size, rank.
    References: Cotter, Roberts, Stuart & White, MCMC methods for functions, Statistical Science 28, 2013, section 4.3
    (pCNL); Beskos, Girolami, Lan, Farrell & Stuart, Geometric MCMC for infinite-dimensional inverse problems, J. Comput.
    Phys. 335, 2017, section 3 (here with a constant metric).
    """

    needs: ClassVar[tuple[Any, ...]] = (HasLatent,)
    gradient: ClassVar[bool] = True

    thin: int = 5
    step_size: float = 0.5
    target: float | None = 0.574
    precondition: bool | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.step_size <= 4 or (self.target is not None and not 0 < self.target < 1):
            raise ValueError(
                f"InfMALA needs step_size in (0, 4] and target in (0, 1) or None, got {self.step_size}, {self.target}."
            )
        _check_latent(self, self.rank)

    @classmethod
    def examples(cls) -> list[InfMALA]:
        """Short runs, with and without the curvature."""
        return [cls(draws=6, warmup=6, thin=2), cls(draws=4, warmup=4, thin=1, precondition=False)]

    @classmethod
    def exam(cls) -> dict[str, InfMALA]:
        """One draw of each of many chains."""
        return {"": cls(draws=1, warmup=2000)}

    def check(self, problem: InverseProblem) -> None:
        super().check(problem)
        if self.precondition:
            check_curvature(problem, "InfMALA with precondition=True")

    def _preconditions(self, problem: InverseProblem) -> bool:
        able = all(isinstance(t.noise, GaussianNoise) and t.operator.derivative_order > 1 for t in problem.terms)
        return self.precondition or (self.precondition is None and able)

    def begin(self, target: Target, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        z, n = state["z"], groups(rng)
        found = {"vectors": z.new_zeros(n, 1, target.dim), "values": z.new_zeros(n, 1)}
        if self._preconditions(target.problem):
            found = at_mode(target, state, n, self.rank)
        metric = {"metric_vectors": found["vectors"], "metric_values": found["values"]}
        return {"log_step": _log_step(state, self.step_size)} | metric

    def move(
        self, target: Target, state: dict[str, Tensor], rng: Streams, clock: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        z, phi, grad = state["z"], state["phi"], state["grad"]
        new: dict[str, Tensor] = {}
        if clock == self.warmup // 2 and clock < self.warmup and self._preconditions(target.problem):
            new = average_curvature(target, z, phi, groups(rng), self.rank)
        shape = _metric(state | new)
        step = state["log_step"].exp()[:, None]
        h, inner = step.clamp_max(4.0), (step / (1 + shape.each(len(z)))).clamp_max(4.0)
        xi = rng.normal((target.dim,), dtype=z.dtype, tag="walk")
        w = shape.apply(grad, 0.5 * h.sqrt(), 0.5 * inner.sqrt())
        v = xi - w
        outer, inside = _turn(h), _turn(inner)  # (ρ, σ) off the directions and on them
        proposal = shape.apply(z, outer[0], inside[0]) + shape.apply(v, outer[1], inside[1])
        there, slope = target.value_and_grad(proposal)
        invalid = torch.isnan(there) | (there == -math.inf) | torch.isnan(slope).any(1)
        back = shape.apply(z - shape.apply(proposal, outer[0], inside[0]), 1 / outer[1], 1 / inside[1])
        w_back = shape.apply(slope, 0.5 * h.sqrt(), 0.5 * inner.sqrt())
        log_ratio = (phi + _half(w, v)) - (there + _half(w_back, back))
        log_ratio = torch.where(invalid, torch.full_like(phi, -math.inf), log_ratio)
        chance = log_ratio.nan_to_num(nan=-math.inf).clamp_max(0).exp()
        yes = rng.uniform((), dtype=z.dtype, tag="accept") < chance
        new |= {
            "z": torch.where(yes[:, None], proposal, z),
            "phi": torch.where(yes, there, phi),
            "grad": torch.where(yes[:, None], slope, grad),
        }
        if self.target is not None and clock < self.warmup:
            most = math.log(4.0) + torch.log1p(shape.each(len(z)).amax(1))
            new["log_step"] = _adapted(state["log_step"], chance, phi, self.target, clock, groups(rng), most)
        return new, {"accept": chance, "invalid": invalid}

    def report(self, target: Target, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"stat_step_size": state["log_step"].exp(), "stat_rank": _rank(state)}


def _turn(h: Tensor) -> tuple[Tensor, Tensor]:
    """ρ and σ of a step h."""
    return (1 - h / 4) / (1 + h / 4), h.sqrt() / (1 + h / 4)


def _half(w: Tensor, v: Tensor) -> Tensor:
    """w·v + ½|w|², `(batch,)`."""
    return (w * v).sum(1) + 0.5 * w.square().sum(1)


def _check_latent(solver: Chain, rank: int | None) -> None:
    name = type(solver).__name__
    if rank is not None and rank < 1:
        raise ValueError(f"{name} needs rank of at least 1 or None, got {rank}.")
    if solver.space == "u":
        raise ValueError(f"{name} walks in latent coordinates alone; leave space out.")
