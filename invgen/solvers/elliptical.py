r"""Elliptical slice sampling: a Metropolis walk on N(0, I) that is never rejected and has no step to choose.

With ξ ~ N(0, I) all points of the ellipse q cos θ + ξ sin θ are as probable beforehand as q. A level under the likelihood
at q is drawn, −Φ(q) − E with E ~ Exp(1), and θ uniformly on the part of the ellipse above it: from the whole turn, a
bracket that shrinks towards θ = 0 (where q itself is) at every point below the level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from invgen.contracts import HasLatent
from invgen.solvers._chain import Chain
from invgen.solvers._target import Target

if TYPE_CHECKING:
    from invgen.driver import Streams

__all__ = ["EllipticalSlice"]


@dataclass(frozen=True)
class EllipticalSlice(Chain):
    """Elliptical slice sampler on p(z | d) ∝ p(d | g(f(z))) N(z; 0, I). Targets the exact posterior.

    Needs no derivative and no continuity of the likelihood, adapts nothing, and moves at every step. All chains shrink
    their brackets together; only those still searching are evaluated
    (all of them where a batch holds several observations).

    Args:
        draws, warmup, thin, starts, superchains: as for every chain; the warm-up only forgets the starts.
        shrinks: points tried at a step, at the most; a chain that finds none stays for that step, which leaves the
            posterior invariant too (the way back tries the same points). A bracket falls to about 0.7^shrinks of a turn.

    Cost: 2 to 10 decodes and forwards a step, the more the narrower the posterior is beside the prior. `stats`:
    evaluations (points tried), invalid.
    Reference: Murray, Adams & MacKay, Elliptical slice sampling, AISTATS 2010, figure 2, arXiv:1001.0175.
    """

    needs: ClassVar[tuple[Any, ...]] = (HasLatent,)
    derivative_free: ClassVar[bool] = True
    pooled: ClassVar[bool] = True  # nothing is shared, but chains of an observation stay in one batch
    watched: ClassVar[tuple[str, ...]] = ("evaluations",)

    shrinks: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.shrinks, bool) or not hasattr(self.shrinks, "__index__") or self.shrinks < 1:
            raise ValueError(
                f"EllipticalSlice needs shrinks as a whole number of at least 1, got {self.shrinks!r}; the default is 64."
            )
        if self.space == "u":
            raise ValueError("EllipticalSlice walks in latent coordinates alone; leave space out.")

    @classmethod
    def examples(cls) -> list[EllipticalSlice]:
        """A short run."""
        return [cls(draws=6, warmup=2)]

    @classmethod
    def exam(cls) -> dict[str, EllipticalSlice]:
        """One draw of each of many chains."""
        return {"": cls(draws=1, warmup=1000)}

    def move(
        self, target: Target, state: dict[str, Tensor], rng: Streams, clock: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        z, phi = state["z"], state["phi"]
        xi = rng.normal((target.dim,), dtype=z.dtype, tag="ellipse")
        # all angles of a step at once: how many a chain uses must not move the stream of another
        draws = rng.uniform((self.shrinks + 1,), dtype=z.dtype, tag="angles")
        level = phi - torch.log1p(-draws[:, 0])  # Φ + E, E ~ Exp(1)
        angle = 2 * math.pi * draws[:, 1]
        low, high = angle - 2 * math.pi, angle.clone()
        tried, invalid = torch.zeros_like(phi), torch.zeros_like(phi)
        new_z, new_phi = z.clone(), phi.clone()
        open_ = torch.isfinite(phi).nonzero()[:, 0]  # chains without a finite likelihood stay as they are
        for k in range(self.shrinks):
            if len(open_) == 0:
                break
            if k:
                angle[open_] = low[open_] + (high[open_] - low[open_]) * draws[open_, k + 1]
            at = angle[open_, None]
            point = z[open_] * at.cos() + xi[open_] * at.sin()
            there = _values(target, point, open_, len(z))
            tried[open_] += 1
            invalid[open_] += torch.isnan(there).to(phi)
            found = (there < level[open_]) & (there > -math.inf)
            rows = open_[found]
            new_z[rows], new_phi[rows] = point[found], there[found]
            open_ = open_[~found]
            left = angle[open_]
            low[open_] = torch.where(left < 0, left, low[open_])
            high[open_] = torch.where(left < 0, high[open_], left)
        return {"z": new_z, "phi": new_phi}, {"evaluations": tried, "invalid": invalid / tried.clamp_min(1)}


def _values(target: Target, q: Tensor, rows: Tensor, batch: int) -> Tensor:
    """Φ of positions `q` `(len(rows), dim)` of the chains `rows` of `batch`."""
    if len(rows) == batch or all(t.n_obs == 1 for t in target.problem.terms):  # data that serve any position
        return target.value(q)
    return target.value(q.new_zeros(batch, q.shape[1]).index_copy_(0, rows, q))[rows]
