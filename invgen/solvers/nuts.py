r"""The no-U-turn sampler for a batch of chains, without recursion.

A trajectory is doubled, forward or backward at random, until its ends begin to approach each other. All chains double
together: leaf n of a doubling is the same n for all of them, so that the subtrees to be checked after it are the trailing
zeros of n + 1 in binary, and a stack of at most `max_depth` subtrees stands for the recursion. In units of the mass matrix,
u = Sᵀ p ~ N(0, I), a (sub)trajectory with momenta u₁ … u_n and sum ρ turns when

    ⟨u₁, ρ⟩ ≤ 0  or  ⟨u_n, ρ⟩ ≤ 0                                                    (Betancourt 2017, appendix A.4.2)

and, between its halves a and b, when ⟨u₁, ρ_a + b₁⟩, ⟨b₁, ρ_a + b₁⟩, ⟨a_n, ρ_b + a_n⟩ or ⟨u_n, ρ_b + a_n⟩ is not positive:
without these checks a period near the length of half a tree goes unseen (Stan since 2.21). States are drawn with weights
exp(−H): uniformly progressive within a doubling, biased towards the new half between doublings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from invgen.solvers._chain import groups, pooled_mean
from invgen.solvers._hamiltonian import DIVERGENT, Hamiltonian, full_gradient, potential
from invgen.solvers._metric import Metric
from invgen.solvers._target import Target

if TYPE_CHECKING:
    from invgen.driver import Streams

__all__ = ["NUTS"]

_LOOK = 8  # leaps between looks whether any chain is still building: each look waits for the device


@dataclass(frozen=True)
class NUTS(Hamiltonian):
    """No-U-turn sampler with multinomial draws from the trajectory. Targets the exact posterior.

    Chains choose their own number of leaps and wait for the longest of the batch; with one observation those that are
    done leave the batch at each doubling. HMC, whose chains all take the same number, is faster for many chains; NUTS
    adapts the length to the place, draw by draw. Assumes a gradient almost everywhere; a point whose likelihood or
    gradient is not finite ends the trajectory.

    Args:
        draws, warmup, thin, space, starts, superchains: as for every chain.
        step_size, mass, rank: as for every Hamiltonian chain: found and learnt in the warm-up.
        target: acceptance, averaged over the trajectory and the chains (0.8: Stan).
        max_depth: doublings at the most: 2^max_depth − 1 leaps.

    Cost: one gradient a leap (decode, forward and their vector-Jacobian products), 3 to 7 leaps for a Gaussian.
    `stats`: accept, energy (for `ebfmi`), divergent, steps (leaps), invalid, step_size.
    References: Hoffman & Gelman, The no-U-turn sampler, JMLR 15, 2014; Betancourt, A conceptual introduction to
    Hamiltonian Monte Carlo, 2017, arXiv:1701.02434, appendix A; Seyboldt, Carlson & Carpenter 2026, arXiv:2603.18845 (mass).
    """

    max_depth: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.max_depth <= 20:
            raise ValueError(f"NUTS needs max_depth from 1 to 20, got {self.max_depth}.")

    @classmethod
    def examples(cls) -> list[NUTS]:
        """A short run."""
        return [cls(draws=5, warmup=24, thin=2, max_depth=4)]

    @classmethod
    def exam(cls) -> dict[str, NUTS]:
        """The defaults."""
        return {"NUTS": cls(draws=40, thin=2)}

    def move(
        self, target: Target, state: dict[str, Tensor], rng: Streams, clock: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        observations = groups(rng)
        u = rng.normal((target.dim,), dtype=state["z"].dtype, tag="momentum")
        # one number a doubling for the direction, the draw within and the draw between: a fixed count, so that the
        # streams of a chain do not depend on the others
        chance = rng.uniform((self.max_depth, 3), dtype=torch.float64, tag="tree")
        step = self.step_of(state, clock).repeat_interleave(len(u) // observations)
        found = _transition(target, Metric.of(state), state, u, chance, step, self.max_depth, observations)
        new = {n: found[n] for n in ("z", "phi", "grad")}
        figures = {n: found[n] for n in (*self.watched, "invalid")}
        if clock < self.warmup:
            alive = torch.isfinite(found["energy"])
            seen = torch.where(alive, found["accept"], torch.full_like(found["accept"], torch.nan))
            pooled = pooled_mean(seen, observations).unflatten(0, (observations, -1))[:, 0]
            new |= self.learn(target, state | new, pooled, rng, clock)
        return new, figures


class _Point(NamedTuple):
    """An end of a trajectory: position, momentum u, and the force Sᵀ ∇U there, `(rows, dim)` each."""

    q: Tensor
    u: Tensor
    force: Tensor


class _Span(NamedTuple):
    """Momenta at the first and the last state of a stretch of trajectory, and the sum over it."""

    first: Tensor
    last: Tensor
    total: Tensor

    def join(self, other: _Span) -> tuple[_Span, Tensor]:
        """Both in a row, and whether they do not turn, `(rows,)`."""
        total = self.total + other.total
        front, back = self.total + other.first, other.total + self.last
        least = torch.stack(
            [
                (self.first * total).sum(1),
                (other.last * total).sum(1),
                (self.first * front).sum(1),
                (other.first * front).sum(1),
                (self.last * back).sum(1),
                (other.last * back).sum(1),
            ]
        ).amin(0)
        return _Span(self.first, other.last, total), least > 0


def _choose(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(mask[:, None] if yes.ndim == 2 else mask, yes, no)


def _rows(record: dict[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
    return {n: v[keep] for n, v in record.items()}


def _transition(
    target: Target,
    metric: Metric,
    state: dict[str, Tensor],
    u: Tensor,
    chance: Tensor,
    step: Tensor,
    max_depth: int,
    observations: int,
) -> dict[str, Tensor]:
    """The next state of every chain, and its figures."""
    kinetic = 0.5 * u.square().sum(1)
    energy = potential(target, state["z"], state["phi"]) + kinetic
    force = metric.root_transpose(state["grad"].unflatten(0, (observations, -1))).flatten(0, 1)
    zero = torch.zeros_like(kinetic)
    no = torch.zeros_like(kinetic, dtype=torch.bool)
    out = {n: state[n] for n in ("z", "phi", "grad")} | {"energy": energy, "accept": zero, "steps": zero}
    out |= {"divergent": no, "invalid": no}
    # of the chains that still double: the drawn state, both ends, the sum of momenta, log Σ exp(H₀ − H)
    tree = dict(out) | {"weight": zero, "start": energy, "size": step, "alive": torch.isfinite(energy)}
    tree |= {"chance": chance, "row": torch.arange(len(u), device=u.device)}
    for side in ("left", "right"):
        tree |= {f"{side}_q": state["z"], f"{side}_u": u, f"{side}_force": force}
    tree["total"] = u
    # rows may leave the batch only where one set of data serves them all
    compact = observations == 1 and max(t.n_obs for t in target.problem.terms) == 1
    for depth in range(max_depth):
        keep = tree["alive"]
        if compact:
            keep = keep.nonzero()[:, 0]
            if len(keep) < len(tree["row"]):
                _store(out, tree)
                if not len(keep):
                    break
                tree = _rows(tree, keep)
        elif not bool(keep.any()):
            break
        tree = _double(target, metric, tree, depth, observations)
    _store(out, tree)
    out["accept"] = out["accept"] / out["steps"].clamp_min(1)
    out["invalid"] = out["invalid"] / out["steps"].clamp_min(1)  # the share of evaluations: one ends a trajectory
    return out


def _store(out: dict[str, Tensor], tree: dict[str, Tensor]) -> None:
    """What the chains of the tree have reached."""
    for name in out:
        out[name] = out[name].index_copy(0, tree["row"], tree[name])


def _double(
    target: Target, metric: Metric, tree: dict[str, Tensor], depth: int, observations: int
) -> dict[str, Tensor]:
    """The tree with 2^depth more leaps to one side, where they do not turn."""
    forward = tree["chance"][:, depth, 0] < 0.5
    signed = torch.where(forward, tree["size"], -tree["size"])
    outer = _Point(*(_choose(forward, tree[f"right_{n}"], tree[f"left_{n}"]) for n in _Point._fields))
    far = _choose(forward, tree["left_u"], tree["right_u"])
    sub, part, end = _subtree(target, metric, tree, outer, signed, depth, observations)
    span, straight = _Span(far, outer.u, tree["total"]).join(part)
    whole = sub["whole"]
    take = whole & (tree["chance"][:, depth, 2] < (sub["weight"] - tree["weight"]).clamp_max(0).exp())
    new = dict(tree)
    for name in ("z", "phi", "grad", "energy"):
        new[name] = _choose(take, sub[name], tree[name])
    new["weight"] = torch.where(whole, torch.logaddexp(tree["weight"], sub["weight"]), tree["weight"])
    new["accept"], new["steps"] = tree["accept"] + sub["accept"], tree["steps"] + sub["steps"]
    new["divergent"], new["invalid"] = tree["divergent"] | sub["divergent"], tree["invalid"] | sub["invalid"]
    new["total"] = span.total
    for name, value in zip(_Point._fields, end, strict=True):
        new[f"right_{name}"] = _choose(forward, value, tree[f"right_{name}"])
        new[f"left_{name}"] = _choose(forward, tree[f"left_{name}"], value)
    new["alive"] = whole & straight
    return new


def _subtree(
    target: Target,
    metric: Metric,
    tree: dict[str, Tensor],
    point: _Point,
    step: Tensor,
    depth: int,
    observations: int,
) -> tuple[dict[str, Tensor], _Span, _Point]:
    """2^depth leaps from an end, unless they turn or diverge: a state drawn among them and its weight, momenta, the last point."""
    going = tree["alive"]
    uniform = tree["chance"][:, depth, 1]
    zero = torch.zeros_like(step)
    weight = torch.full_like(step, -torch.inf)
    drawn = {n: tree[n] for n in ("z", "phi", "grad", "energy")}
    accept, steps = zero, zero
    divergent, invalid = torch.zeros_like(going), torch.zeros_like(going)
    stack: list[_Span] = []
    wide = step[:, None]
    for leaf in range(1 << depth):
        u = torch.addcmul(point.u, wide, point.force, value=-0.5)
        move = metric.root(u.unflatten(0, (observations, -1))).flatten(0, 1)
        q = torch.addcmul(point.q, wide, move)
        phi, gradient = target.value_and_grad(q)
        gradient = full_gradient(target, q, gradient)
        force = metric.root_transpose(gradient.unflatten(0, (observations, -1))).flatten(0, 1)
        u = torch.addcmul(u, wide, force, value=-0.5)
        point = _Point(q, u, force)
        energy = potential(target, q, phi) + 0.5 * u.square().sum(1)
        fine = torch.isfinite(energy)
        error = torch.where(fine, energy - tree["start"], torch.full_like(energy, torch.inf))
        accept = accept + torch.where(going, (-error).clamp_max(0).exp(), zero)
        steps = steps + going.to(steps)
        bad = ~(error < DIVERGENT)
        divergent = divergent | (going & bad)
        invalid = invalid | (going & (torch.isnan(phi) | (torch.isfinite(phi) & ~fine)))
        going = going & ~bad
        # one uniform number serves the whole subtree: what is left of it after a decision is uniform again
        total = torch.logaddexp(weight, -error)
        ratio = torch.where(going, (-error - total).exp(), zero).double()
        take = uniform < ratio
        uniform = torch.where(
            take, uniform / ratio.clamp_min(1e-300), (uniform - ratio) / (1 - ratio).clamp_min(1e-300)
        )
        weight = torch.where(going, total, weight)
        here = {"z": q, "phi": phi, "grad": gradient, "energy": energy}
        drawn = {n: _choose(take, here[n], v) for n, v in drawn.items()}
        stack.append(_Span(u, u, u))
        count = leaf + 1
        while count % 2 == 0:
            last = stack.pop()
            joined, straight = stack.pop().join(last)
            going = going & straight
            stack.append(joined)
            count //= 2
        if leaf % _LOOK == _LOOK - 1 and not bool(going.any()):
            break
    found = drawn | {"weight": weight, "whole": going, "accept": accept, "steps": steps}
    return found | {"divergent": divergent, "invalid": invalid}, stack[0], point
