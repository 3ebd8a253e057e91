r"""Gibbs sampling of noise levels and of the strength of a Gaussian prior, with the model drawn exactly.

    d = A u + ε,  ε ~ N(0, σ² I),      u ~ N(μ, C/δ),      σ² and δ unknown

Each unknown is drawn given the others:

    u | σ, δ, d     Gaussian, drawn exactly;
    σ² | u, d       IG(a + n_d/2, b + ½ |d − A u|²)                                  for the prior σ² ~ IG(a, b);
    δ | u           Gamma(a + n/2, b + ½ |C^(-1/2)(u − μ)|²)                         for the prior δ ~ Gamma(a, b).

A noise level with another prior p(σ) is proposed as σ² ~ IG(n_d/2, ½ |d − A u|²), the likelihood alone, and accepted by
the Metropolis rule with the ratio p(σ')σ' / p(σ)σ, which is all that is left of it. A complex datum of variance σ²
counts as two real ones of variance σ²/2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from invgen.contracts import HasDensity, HasGaussian, Solver
from invgen.linalg import inner
from invgen.noise import GaussianNoise
from invgen.solvers._perturb import check_linear, in_units, perturbation, warn_unconverged
from invgen.solvers._whitened import over_reals
from invgen.solvers.exact import _factor

if TYPE_CHECKING:
    from invgen.driver import Streams
    from invgen.problem import InverseProblem

__all__ = ["HierarchicalGibbs"]


@dataclass(frozen=True)
class HierarchicalGibbs(Solver):
    """Hierarchical Gibbs sampler of a linear-Gaussian problem with unknown noise levels and prior strength.

    Targets p(x, σ, δ | d) exactly, asymptotically in the number of sweeps. Assumes linear operators, a Gaussian prior
    with an affine transform, and Gaussian noise whose unknown levels (`GaussianNoise("name")`, the name in
    `problem.nuisance`) multiply white noise. An `InverseGammaPrior` makes the update of its level conjugate.

    Args:
        strength: (a, b) of δ ~ Gamma(a, b) (rate b) where the prior's covariance is C/δ; None for δ = 1, known.
        draws: kept of each chain. warmup: sweeps before them. thin: sweeps for each kept draw.
        limit: unknowns and data up to which one singular value decomposition makes every sweep a few operations a
            number (one noise level for all data, or none unknown); beyond, each sweep solves.
        rtol, max_iter: of these solves.

    Every sweep draws exactly, so that only σ and δ have memory: correlation grows with what the data leave open of them,
    and for δ with the number of unknowns (Agapiou et al. 2014). Chains start at a noise level fitted to the prior mean
    and δ = 1, each times a log-normal number. `theta` holds the levels by name and "strength".

    Cost: an SVD of n_data × n once a run and O(n) a sweep; or one `operator.solve` a sweep.
    References: Bardsley, SIAM J. Sci. Comput. 34(3), A1316-A1332, 2012 (the hierarchical Gibbs sampler); Agapiou,
    Bardsley, Papaspiliopoulos & Stuart, SIAM/ASA J. Uncertain. Quantif. 2(1), 2014 (its mixing).
    """

    needs: ClassVar[tuple[type, ...]] = (HasGaussian,)
    kind: ClassVar[str] = "exact"

    strength: tuple[float, float] | None = None
    draws: int = 1000
    warmup: int = 100
    thin: int = 1
    limit: int = 2048
    rtol: float | None = None
    max_iter: int = 2000

    def __post_init__(self) -> None:
        for name, least in (("draws", 1), ("warmup", 0), ("thin", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"HierarchicalGibbs needs {name} of at least {least}, got {getattr(self, name)}.")
        if self.strength is not None and (len(self.strength) != 2 or not min(self.strength) > 0):
            raise ValueError(
                f"The strength of HierarchicalGibbs is (a, b) of a Gamma law, both positive, got {self.strength}."
            )

    @classmethod
    def examples(cls) -> list[HierarchicalGibbs]:
        """With and without the decomposition."""
        return [
            cls(strength=(3.0, 2.0), draws=4, warmup=2, thin=2),
            cls(strength=(3.0, 2.0), draws=2, warmup=1, limit=0, rtol=1e-13),
        ]

    @classmethod
    def exam(cls) -> dict[str, Solver]:
        """One draw of each of many chains."""
        return {"": cls(draws=1, warmup=300)}

    def check(self, problem: InverseProblem) -> None:
        super().check(problem)
        check_linear(self, _without_nuisance(problem), "use a latent sampler, which draws nuisance parameters along")
        levels = {_level(t.noise) for t in problem.terms} - {None}
        for name, prior in problem.nuisance.items():
            if name not in levels:
                raise TypeError(
                    f"HierarchicalGibbs draws noise levels only, and {name!r} is none of a GaussianNoise; fix it or use a latent sampler."
                )
            if not isinstance(prior, HasDensity):
                raise TypeError(
                    f"HierarchicalGibbs needs the density of the prior of {name!r}, which {type(prior).__name__} does not have; use InverseGammaPrior, or a Gaussian with Exp."
                )
        if any(_level(t.noise) and t.noise.model_error is not None for t in problem.terms):
            raise TypeError(
                "HierarchicalGibbs needs noise that an unknown level multiplies as a whole, and a model_error stands beside it; leave it out or fix the level."
            )
        if not problem.nuisance and self.strength is None:
            raise TypeError(
                "HierarchicalGibbs draws unknown noise levels and the prior's strength, and nothing is unknown here; name a level, GaussianNoise('sigma') with nuisance={'sigma': prior}, give strength=(a, b), or use ExactGaussian."
            )

    def num_steps(self, problem: InverseProblem) -> int:
        return self.warmup + self.draws * self.thin

    def init(self, problem: InverseProblem, rng: Streams) -> dict[str, Tensor]:
        names = list(problem.nuisance)
        free = _Free(problem)
        at_mean = problem.prior.mean_u.to(device=rng.device, dtype=problem.dtype)
        squares, counts = free.squares(at_mean.expand(len(rng), *problem.model_shape))
        fitted = torch.stack([squares[n] / counts[n] for n in names], 1) if names else at_mean.new_zeros(len(rng), 0)
        around = rng.normal((len(names) + 1,), dtype=problem.dtype, tag="start").exp()
        n = _Diagonal.size(problem, self.limit) or math.prod(problem.model_shape)
        return {
            "z": torch.zeros(len(rng), n, dtype=problem.dtype, device=rng.device),
            "levels": fitted.clamp_min(torch.finfo(fitted.dtype).tiny) * around[:, :-1],  # variances
            "strength": around[:, -1] if self.strength is not None else torch.ones_like(around[:, -1]),
            "clock": torch.zeros((), dtype=torch.long),
            "kept": around.new_full((len(rng), self.draws, n), math.nan),
            "kept_levels": around.new_full((len(rng), self.draws, len(names)), math.nan),
            "kept_strength": around.new_full((len(rng), self.draws), math.nan),
            "accept": around.new_zeros(len(rng)),
        }

    def step(self, problem: InverseProblem, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        levels, strength = state["levels"], state["strength"]
        if _Diagonal.size(problem, self.limit):
            z, squares, counts, length = _Diagonal.of(problem).draw(problem, levels, strength, rng)
        else:
            z, squares, counts, length = self._solve(problem, levels, strength, rng)
        levels, taken = draw_levels(problem, levels, squares, counts, rng)
        if self.strength is not None:
            a, b = self.strength
            n = math.prod(problem.model_shape)
            strength = rng.gamma(a + 0.5 * n, (), dtype=z.dtype, tag="strength") / (b + 0.5 * length)
        clock = int(state["clock"])
        out = {**state, "z": z, "levels": levels, "strength": strength, "clock": state["clock"] + 1}
        out["accept"] = state["accept"] + taken
        row, rest = divmod(clock - self.warmup, self.thin)
        if row >= 0 and rest == self.thin - 1:  # written in place: a copy of all kept draws a step would be quadratic
            out["kept"][:, row], out["kept_levels"][:, row], out["kept_strength"][:, row] = z, levels, strength
        return out

    def _solve(
        self, problem: InverseProblem, levels: Tensor, strength: Tensor, rng: Streams
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, int], Tensor]:
        """u by one solve, as `_perturb`; a bad item must not make the covariances of the others refuse."""
        good = torch.isfinite(levels).all(1) & torch.isfinite(strength) & (levels > 0).all(1) & (strength > 0)
        safe = torch.where(good[:, None], levels, torch.ones_like(levels)).sqrt()
        delta = torch.where(good, strength, torch.ones_like(strength))
        system = problem.linear_gaussian("u", **dict(zip(problem.nuisance, safe.unbind(1), strict=True)))
        C = problem.prior.covariance_u
        C = C if self.strength is None else C.scaled(1 / delta)
        start, data = perturbation(problem, system, C, rng)
        A = system.operator
        solved = A.solve(data - A(start), system.R_update, C, rtol=self.rtol, max_iter=self.max_iter)
        warn_unconverged(solved)
        u = start + C.apply(A.adjoint(solved.x))
        u = torch.where(good.reshape(-1, *(1,) * (u.ndim - 1)), u, torch.full_like(u, math.nan))
        squares, counts = _Free(problem).squares(u)
        length = u.new_zeros(len(u))
        if self.strength is not None:
            off = u - problem.prior.mean_u.to(u)
            length = inner(off, problem.prior.covariance_u.solve(off))
        return u.flatten(1), squares, counts, length

    def finish(self, problem: InverseProblem, state: dict[str, Tensor]) -> Mapping[str, Tensor]:
        done = self.finished_draws(state)
        kept = state["kept"][:, :done]
        flat = kept.reshape(-1, kept.shape[2])
        if _Diagonal.size(problem, self.limit):
            u = _Diagonal.of(problem).field(flat)
        else:
            u = flat.reshape(-1, *problem.model_shape)
        x = in_units(problem, u)
        results = {
            "chain": x.reshape(len(kept), done, *x.shape[1:]),
            "stat_accept": state["accept"] / state["clock"].clamp_min(1),
            **{f"theta_{n}": state["kept_levels"][:, :done, i].sqrt() for i, n in enumerate(problem.nuisance)},
        }
        if self.strength is not None:
            results["theta_strength"] = state["kept_strength"][:, :done]
        return results

    def finished_draws(self, state: Mapping[str, Tensor]) -> int:
        """Kept draws so far: what a run that stops early has."""
        return max(0, min(self.draws, (int(state["clock"]) - self.warmup) // self.thin))


# --- noise levels, given residuals: for any chain that holds a model ---------------------------------------------------


def draw_levels(
    problem: InverseProblem, variances: Tensor, squares: Mapping[str, Tensor], counts: Mapping[str, int], rng: Streams
) -> tuple[Tensor, Tensor]:
    """Draw every unknown noise variance given the residuals it scales.

    Args:
        variances: `(batch, k)`, σ² of the nuisance parameters in their order. squares: name -> |d − g(x)|² `(batch,)`
            (twice that for complex data). counts: name -> real data (twice the complex ones). rng: streams.

    Returns:
        New variances, and the share of levels that moved, `(batch,)` (1 for conjugate priors).
    """
    columns, taken = [], variances.new_zeros(len(variances))
    for i, (name, prior) in enumerate(problem.nuisance.items()):
        a, b = getattr(prior, "variance_law", (0.0, 0.0))
        conjugate = a > 0
        gamma = rng.gamma(a + 0.5 * counts[name], (), dtype=variances.dtype, tag=f"level {name}")
        fresh = (b + 0.5 * squares[name]) / gamma
        if not conjugate:
            now = variances[:, i]
            gain = _log_rest(prior, fresh) - _log_rest(prior, now)
            chance = torch.nan_to_num(gain, nan=-math.inf).clamp_max(0).exp()
            yes = rng.uniform((), dtype=variances.dtype, tag=f"level {name}") < chance
            fresh = torch.where(yes, fresh, now)
            taken = taken + yes / len(problem.nuisance)
        else:
            taken = taken + 1 / len(problem.nuisance)
        columns.append(fresh)
    return (torch.stack(columns, 1) if columns else variances), taken


def _log_rest(prior: Any, variance: Tensor) -> Tensor:
    """log p(σ) σ: the target over the proposal IG(n/2, S/2) of σ², whose density in σ is ∝ σ^(−n−1) exp(−S/2σ²)."""
    sigma = variance.sqrt()
    good = torch.isfinite(sigma) & (sigma > 0)
    safe = torch.where(good, sigma, torch.ones_like(sigma))
    value = prior.log_prob(safe[:, None]) + safe.log()
    return torch.where(good, value, torch.full_like(value, -math.inf))


def _level(noise: Any) -> str | None:
    """The name of the unknown level of a Gaussian noise."""
    return noise.sigma if isinstance(noise, GaussianNoise) and isinstance(noise.sigma, str) else None


def _without_nuisance(problem: InverseProblem) -> InverseProblem:
    from invgen.problem import InverseProblem as Problem

    return Problem(terms=problem.terms, prior=problem.prior)


class _Free(NamedTuple):
    """Residuals of the terms with an unknown level."""

    problem: InverseProblem

    def squares(self, u: Tensor) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Sum of squares and number of real data by level, of u `(batch, *shape)`."""
        total: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for term in self.problem.in_u():
            name = _level(term.noise)
            if name is None:
                continue
            residual = over_reals(term.data - term.operator(u))
            total[name] = total.get(name, 0.0) + residual.square().sum(1)
            counts[name] = counts.get(name, 0) + residual.shape[1]
        return total, counts


class _Diagonal(NamedTuple):
    """Where one unknown scale v multiplies all noise: coordinates in which every conditional is diagonal.

    With u = μ + L w, whitened data r = W(d − A μ) and W A L = U S Vᵀ: y = Vᵀ w, c = Uᵀ r, and
    y_i | v, δ ~ N(s_i c_i / v / p_i, 1/p_i), p_i = δ + s_i²/v (s_i = 0 beyond the data).
    """

    s: Tensor  # (n,), zeros beyond the rank
    U: Tensor  # (n_data, rank)
    images: Tensor  # (n, n), rows L v_i
    mean: Tensor  # W A μ, (1, n_data)
    mu: Tensor  # (1, *shape)

    @staticmethod
    def size(problem: InverseProblem, limit: int) -> int:
        """Coordinates y, or 0 where this does not apply."""
        levels = {_level(t.noise) for t in problem.terms}
        n = math.prod(problem.model_shape)
        data = sum(math.prod(t.operator.data_shape) for t in problem.terms)
        return n if len(levels) == 1 and max(n, data) <= limit else 0

    @staticmethod
    def of(problem: InverseProblem) -> _Diagonal:
        """Decomposed once a run, in float64."""
        device = problem.terms[0].data.device

        def build() -> _Diagonal:
            terms, shape = problem.in_u(), problem.model_shape
            mu = problem.prior.mean_u.to(device=device, dtype=torch.float64).reshape(1, *shape)
            L = _factor(problem.prior.covariance_u.dense().to(device=device, dtype=torch.float64))
            zero = _seen(terms, 0 * mu)
            rows = _seen(terms, L.T.reshape(-1, *shape)) - zero
            rows = torch.nan_to_num(rows)  # what is not finite shows in the data's own images
            U, s, Vt = torch.linalg.svd(rows.T, full_matrices=True)
            n = L.shape[0]
            s = torch.cat([s, s.new_zeros(n - len(s))])
            return _Diagonal(s, U[:, : min(n, U.shape[0])], Vt @ L.T, _seen(terms, mu), mu)

        return problem.remember(("hierarchical", str(device)), build)

    def draw(
        self, problem: InverseProblem, levels: Tensor, strength: Tensor, rng: Streams
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, int], Tensor]:
        """y, residual squares and counts by level, and |y|²; numbers in float64 inside."""
        c, rest = problem.remember(("hierarchical data", rng.device), lambda: self._data(problem), shared=False)
        v = (levels[:, 0] if levels.shape[1] else torch.ones_like(strength)).double()[:, None]
        precision = strength.double()[:, None] + self.s.square() / v
        white = rng.normal((len(self.s),), dtype=levels.dtype, tag="sweep").double()
        k = c.shape[1]
        y = white / precision.sqrt()
        y[:, :k] += self.s[:k] * c / v / precision[:, :k]
        square = rest + (c - self.s[:k] * y[:, :k]).square().sum(1)
        names = list(problem.nuisance)
        kind = levels.dtype
        return (
            y.to(kind),
            {names[0]: square.to(kind)} if names else {},
            {names[0]: self.U.shape[0]} if names else {},
            y.square().sum(1).to(kind),
        )

    def _data(self, problem: InverseProblem) -> tuple[Tensor, Tensor]:
        """c `(batch, k)` and the square of what no model explains, `(batch,)`."""
        terms = problem.in_u()
        r = torch.cat([_white(t, t.data) for t in terms], dim=1) - self.mean
        c = r @ self.U
        outside = r - c @ self.U.T
        return c, outside.square().sum(1)

    def field(self, y: Tensor) -> Tensor:
        """u = μ + L V y."""
        return (self.mu + (y.double() @ self.images).reshape(-1, *self.mu.shape[1:])).to(y)


def _white(term: Any, v: Tensor) -> Tensor:
    """Data of a term over its known covariance, flat and real, float64; as they are where the level is unknown."""
    v = v.to(torch.complex128 if v.is_complex() else torch.float64)
    return over_reals(v if _level(term.noise) else term.noise.covariance(term.operator.data_shape).whiten(v))


def _seen(terms: Any, u: Tensor) -> Tensor:
    return torch.cat([_white(t, t.operator(u)) for t in terms], dim=1)
