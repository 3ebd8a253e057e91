r"""The Gaussian approximation of a posterior at its mode in latent coordinates.

    p(q | d) ≈ N(q*, C),        q* = argmax p(q | d),        C = (I + Jᵀ J)⁻¹,        x = f(z),

J the Jacobian of the whitened predictions at q* (Gauss–Newton), C in low-rank form (`_lowrank`). The evidence follows
from the same expansion, the (2π)^(n/2) of prior and posterior cancelling:

    log p(d) ≈ log p(d | q*) − ½ |q*|² + ½ log det C.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from invgen.contracts import HasLatent, Solver
from invgen.solvers._lowrank import LaplaceFactors, laplace_factors
from invgen.solvers._target import Target, check_target
from invgen.solvers._whitened import check_curvature
from invgen.solvers.map import MAP
from invgen.streams import Streams

if TYPE_CHECKING:
    from invgen.problem import InverseProblem

__all__ = ["Laplace"]

_HELD = ("mode", "vectors", "values", "log_evidence", "gradient_norm", "converged")  # of each observation


@dataclass(frozen=True)
class Laplace(Solver):
    """Gaussian approximation at the best of several modes: independent draws z* + C^(1/2) ξ in closed form, decoded.

    Targets N(z*, (I + Jᵀ J)⁻¹) in the latent z (and the latents of nuisance parameters) in place of p(z | d): exact where
    g∘f is affine and the noise Gaussian of known level, an approximation elsewhere that knows one mode and no skewness.
    Weights against the posterior are for the samplers that use it as a proposal.

    Args:
        mode: how the mode is found; a `MAP` in space "z" without `stop_chi2`, whose `keep` does not matter.
        starts: of the search, for each observation.
        rank: directions the data inform; None takes as many as have eigenvalues above `threshold`.
        threshold: eigenvalues of Jᵀ J below are dropped; a variance is then wrong by less than this fraction.

    Cost: once an observation, a MAP search with `starts` starts and about 4 (rank + 10) products with Jᵀ J at the mode;
    a decode and 2 · rank · n operations a draw. `Posterior.log_evidence` is filled. `stats`: gradient_norm and converged
    of the mode, rank, first the largest eigenvalue.

    References: Tierney & Kadane, J. Am. Stat. Assoc. 81(393), 1986; Bui-Thanh, Ghattas, Martin & Stadler, SIAM J. Sci.
    Comput. 35(6), 2013, section 5; Halko, Martinsson & Tropp, SIAM Review 53(2), 2011.
    """

    needs: ClassVar[tuple[type, ...]] = (HasLatent,)
    kind: ClassVar[str] = "approximate"

    mode: MAP = field(default_factory=lambda: MAP(space="z", optimizer="levenberg_marquardt", iterations=100))
    starts: int = 4
    rank: int | None = None
    threshold: float = 1e-2

    def __post_init__(self) -> None:
        if self.mode.space != "z" or self.mode.stop_chi2 is not None:
            raise ValueError(
                f"Laplace expands around a mode in z: give MAP(space='z') without stop_chi2, got {self.mode}."
            )
        if self.starts < 1 or (self.rank is not None and self.rank < 1) or not self.threshold > 0:
            raise ValueError(f"Laplace needs starts and rank of at least 1 and a positive threshold, got {self}.")

    @classmethod
    def examples(cls) -> list[Laplace]:
        """Full and cut rank."""
        newton = MAP(space="z", optimizer="levenberg_marquardt", iterations=10, tol=1e-12)
        return [cls(mode=newton, starts=2), cls(mode=newton, starts=1, rank=3)]

    @classmethod
    def exam(cls) -> dict[str, Solver]:
        """Settings meant to be accurate, as far as a Gaussian can be."""
        return {"": cls(starts=16, threshold=1e-4)}

    def check(self, problem: InverseProblem) -> None:
        super().check(problem)
        check_target(self, problem, "z", gradient=True)
        check_curvature(problem, "Laplace")
        self.mode.check(problem)

    def num_steps(self, problem: InverseProblem) -> int:
        return self.mode.num_steps(problem) + 1

    def init(self, problem: InverseProblem, rng: Streams) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {"x": torch.zeros(len(rng), *problem.model_shape, dtype=problem.dtype)}
        state["x"] = state["x"].to(rng.device)
        state["clock"] = torch.zeros((), dtype=torch.long)
        if all(key in self._found(problem) for key in self._keys(problem, rng)):
            return state
        search = self.mode.init(*self._search(problem, rng))
        return {**state, **{f"mode.{k}": v for k, v in search.items()}}

    def _search(self, problem: InverseProblem, rng: Streams) -> tuple[InverseProblem, Streams]:
        """The problem and the streams of all starts of the chunk's observations."""

        def build() -> tuple[InverseProblem, Streams]:
            rows, numbers = _first_rows(rng)
            items = [(o, s) for o in numbers for s in range(self.starts)]
            return (
                problem.select([r for r in rows for _ in range(self.starts)]),
                Streams(rng.seed, items, device=rng.device, salt=f"{rng.salt}/mode"),
            )

        return problem.remember(("laplace search", self.starts), build, shared=False)

    def _descend(self, problem: InverseProblem, rng: Streams) -> dict[str, Tensor]:
        """All of the search at once."""
        mine, streams = self._search(problem, rng)
        search = self.mode.init(mine, streams)
        for _ in range(self.mode.num_steps(mine)):
            if not bool(search["active"].any()):
                break
            search = self.mode.step(mine, search, streams)
        return search

    def step(self, problem: InverseProblem, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        search = {k.removeprefix("mode."): v for k, v in state.items() if k.startswith("mode.")}
        k = int(state["clock"])
        out = {"x": state["x"], "clock": state["clock"] + 1}
        if k < self.mode.num_steps(problem):
            if not search or not bool(search["active"].any()):
                return {**state, **out}
            search = self.mode.step(self._search(problem, rng)[0], search, rng)
            return {**out, **{f"mode.{k}": v for k, v in search.items()}}
        factors, held = self._factors(problem, search, rng)
        target = Target(problem, "z")
        white = rng.normal((target.dim,), dtype=problem.dtype)
        q = factors.sample(white)
        x, theta = target.physical(q)
        return {
            **out,
            "x": x,
            "latent": q[:, : target.model_dim].reshape(-1, *target.model_shape),
            "log_evidence": held["log_evidence"],
            "stat_gradient_norm": held["gradient_norm"],
            "stat_converged": held["converged"],
            "stat_rank": (factors.values > 0).sum(1),
            "stat_first": factors.values[:, 0],
            **{f"theta_{name}": value for name, value in theta.items()},
        }

    def finish(self, problem: InverseProblem, state: dict[str, Tensor]) -> Mapping[str, Tensor]:
        names = ("x", "latent", "log_evidence")
        return {k: v for k, v in state.items() if k in names or k.startswith(("stat_", "theta_"))}

    # --- what is found once an observation ---------------------------------------------------------------------------

    def _found(self, problem: InverseProblem) -> dict[str, dict[str, Tensor]]:
        """Modes and factors of the last chunk's observations, which the next chunk may continue."""
        return problem.remember(("laplace", repr(self)), dict)

    def _keys(self, problem: InverseProblem, rng: Streams) -> list[str]:
        rows, numbers = _first_rows(rng)
        return [
            f"{rng.seed}|{number}|{rng.device}|{_digest(problem, row)}"
            for row, number in zip(rows, numbers, strict=True)
        ]

    def _factors(
        self, problem: InverseProblem, search: dict[str, Tensor], rng: Streams
    ) -> tuple[LaplaceFactors, dict[str, Tensor]]:
        """Factors, log-evidence and the rest for every item of the chunk."""
        rows, numbers = _first_rows(rng)
        keys, found = self._keys(problem, rng), self._found(problem)
        if not search and not all(key in found for key in keys):  # resumed in another process than it began in
            search = self._descend(problem, rng)
        if search:
            best = self._best(search, len(rows))
            mine = problem.select(rows)
            factors = laplace_factors(mine, best["mode"], self.rank, threshold=self.threshold)
            best |= {"vectors": factors.vectors, "values": factors.values, "mode": factors.mode}
            best["log_evidence"] = log_evidence(mine, factors)
            found.clear()
            found |= {key: {name: best[name][i] for name in _HELD} for i, key in enumerate(keys)}
        parts = [found[key] for key in keys]
        width = max(len(p["values"]) for p in parts)

        def padded(v: Tensor) -> Tensor:
            return torch.cat([v, v.new_zeros(width - len(v), *v.shape[1:])])

        place = {number: i for i, number in enumerate(numbers)}
        index = torch.tensor([place[o] for o, _ in rng.items], device=rng.device)
        factors = LaplaceFactors(
            torch.stack([p["mode"] for p in parts])[index],
            torch.stack([padded(p["vectors"]) for p in parts])[index],
            torch.stack([padded(p["values"]) for p in parts])[index],
        )
        return factors, {
            name: torch.stack([p[name] for p in parts])[index]
            for name in ("log_evidence", "gradient_norm", "converged")
        }

    def _best(self, search: dict[str, Tensor], observations: int) -> dict[str, Tensor]:
        """The lowest start of each observation."""
        adam = self.mode.optimizer == "adam"
        q, f, g = (search[k] for k in (("best", "lowest", "best_g") if adam else ("x", "f", "g")))
        f = torch.where(torch.isfinite(q).all(1) & torch.isfinite(f), f, torch.full_like(f, math.inf))
        pick = f.reshape(observations, -1).argmin(1) + self.starts * torch.arange(observations, device=f.device)
        length = g.norm(dim=1)
        return {"mode": q[pick], "gradient_norm": length[pick], "converged": (length <= search["goal"])[pick]}

    def factors(self, problem: InverseProblem, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> LaplaceFactors:
        """Mode, eigenvectors and eigenvalues of every observation, for samplers and for reading.

        Returns:
            `LaplaceFactors` with the observations as batch: `mode` `(obs, n)`, `vectors` `(obs, rank, n)`, `values`
            `(obs, rank)`, and what they do: `covariance(v)`, `precision(v)`, `sqrt(v)`, `logdet()`, `sample(white)`.
        """
        self.check(problem)
        here = problem.select(range(problem.n_obs), dtype=dtype)
        rng = Streams(seed, [(o, 0) for o in range(problem.n_obs)])
        search = self._descend(here, rng)
        return laplace_factors(here, self._best(search, problem.n_obs)["mode"], self.rank, threshold=self.threshold)


def log_evidence(problem: InverseProblem, factors: LaplaceFactors) -> Tensor:
    """log p(d | q*) − ½|q*|² + ½ log det C, `(batch,)`; NaN where there is no mode."""
    x, theta = Target(problem, "z").physical(torch.nan_to_num(factors.mode))
    with torch.no_grad():
        likelihood = problem.log_likelihood(x, **theta)
    return likelihood - 0.5 * factors.mode.square().sum(1) + 0.5 * factors.logdet()


def _first_rows(rng: Streams) -> tuple[list[int], list[int]]:
    """For each observation of a chunk: the row of its first item, and its number."""
    first: dict[int, int] = {}
    for row, (o, _) in enumerate(rng.items):
        first.setdefault(o, row)
    return list(first.values()), list(first)


def _digest(problem: InverseProblem, row: int) -> str:
    """Tells the data of one item from others."""
    digest = hashlib.blake2b(digest_size=16)
    for term in problem.terms:
        d: Any = term.data[row if term.n_obs > 1 else 0].detach().cpu()
        digest.update(str(d.dtype).encode() + d.resolve_conj().contiguous().numpy().tobytes())
    return digest.hexdigest()
