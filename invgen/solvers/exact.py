r"""Linear-Gaussian problems, solved exactly.

With u ~ N(μ, C) and d = A u + N(0, R) the posterior is Gaussian. In whitened unknowns u = μ + L w, C = L Lᵀ, and
whitened data G = R^(-1/2) A L, r = R^(-1/2) (d − A μ), it reads

    w | d ~ N(P⁻¹ Gᵀ r, P⁻¹),      P = I + Gᵀ G,
    log p(d) = −½ (|r − G w*|² + |w*|²) − ½ log det P − ½ log det R − ½ n_d log 2π,      w* = P⁻¹ Gᵀ r.

The smallest eigenvalue of P is at least one, and the quadratic form of the evidence is a sum of squares: nothing
cancels. A mixture prior has one such posterior a component, weighted by the component's evidence. All of it needs an
affine transform x = T(u).

Reference: Tarantola, Inverse Problem Theory, 2005, chapter 3; Bishop, Pattern Recognition, 2006, equations 2.113-117.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from invgen.contracts import HasGaussian, HasMixture, Solver
from invgen.covariance import Covariance
from invgen.solvers._perturb import check_linear, in_units, perturbed, update

if TYPE_CHECKING:
    from invgen.driver import Streams
    from invgen.problem import InverseProblem, LinearGaussian

__all__ = ["ExactGaussian", "ExactMixture"]


class _Dense:
    """The factorised posterior of one Gaussian component; every tensor float64.

    Args:
        mean: μ, `(*shape)`. covariance: C. system: the linear-Gaussian problem in u.
    """

    def __init__(self, mean: Tensor, covariance: Covariance, system: LinearGaussian) -> None:
        self.shape = tuple(system.operator.model_shape)
        self.R, self.complex = system.R, system.data.is_complex()
        self.device = system.data.device
        self.mu = mean.to(device=self.device, dtype=torch.float64).reshape(1, *self.shape)
        n = math.prod(self.shape)
        self.L = _factor(covariance.dense().to(device=self.device, dtype=torch.float64))
        # rows of these are items: R^(-1/2) A applied to each column of L
        images = self._whiten(system.operator(self.L.T.reshape(-1, *self.shape)))
        self.G = images.T  # (n_data, n)
        P = torch.eye(n, dtype=torch.float64, device=self.device) + images @ images.T
        # an operator that returns NaN must end as reported bad samples, not inside LAPACK
        self.P = torch.linalg.cholesky(P) if bool(torch.isfinite(P).all()) else torch.full_like(P, math.nan)
        self.predicted = system.operator(self.mu)
        n_data = math.prod(system.operator.data_shape)
        constant = n_data * (2 * math.log(math.pi) if self.complex else math.log(2 * math.pi))
        logdet = float(system.R.logdet()) * (2 if self.complex else 1)
        self.constant = -0.5 * (constant + logdet) - float(self.P.diagonal().log().sum())

    def _whiten(self, d: Tensor) -> Tensor:
        """R^(-1/2) d, flat and real: a complex datum of variance σ² is two real ones of variance σ²/2."""
        v = self.R.whiten(d).flatten(1)
        return math.sqrt(2.0) * torch.cat([v.real, v.imag], dim=1) if self.complex else v

    def centre(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """w* `(batch, n)` and log p(d) `(batch,)` of data `(batch, *data_shape)`."""
        r = self._whiten(data - self.predicted)
        w = torch.cholesky_solve((r @ self.G).T, self.P).T
        misfit = (r - w @ self.G.T).square().sum(1) + w.square().sum(1)
        return w, self.constant - 0.5 * misfit

    def field(self, w: Tensor) -> Tensor:
        """u = μ + L w."""
        return self.mu + (w @ self.L.T).reshape(-1, *self.shape)

    def spread(self, white: Tensor) -> Tensor:
        """P^(-1/2) white, `(batch, n)`: what is added to w* to make a draw."""
        return torch.linalg.solve_triangular(self.P.T, white.T, upper=True).T

    def covariance(self) -> Tensor:
        """L P⁻¹ Lᵀ, `(n, n)`."""
        half = torch.linalg.solve_triangular(self.P, self.L.T, upper=False)
        return half.T @ half


def _factor(C: Tensor) -> Tensor:
    """L with L Lᵀ = C, for semi-definite C too (a spectrum with zeros, more pixels than rank)."""
    L, info = torch.linalg.cholesky_ex(C)
    if int(info) == 0:
        return L
    values, vectors = torch.linalg.eigh((C + C.T) / 2)
    if float(values[0]) < -1e-8 * float(values[-1]):
        raise ValueError(
            f"The prior covariance has the negative eigenvalue {float(values[0]):g}; give a positive semi-definite one."
        )
    return vectors * values.clamp_min(0).sqrt()


def _wide_system(problem: InverseProblem) -> LinearGaussian:
    """All terms in u and in float64."""
    return problem.select(range(problem.n_obs), dtype=torch.float64).linear_gaussian("u")


def _check_size(solver: Solver, problem: InverseProblem, limit: int) -> None:
    n = math.prod(problem.model_shape)
    if n > limit:
        raise ValueError(
            f"{type(solver).__name__} factorises {n} x {n} matrices here and the limit is {limit}; raise limit= or use ExactGaussian(method='cg')."
        )


@dataclass(frozen=True)
class ExactGaussian(Solver):
    """The posterior of a linear-Gaussian problem: moments, evidence and independent exact draws.

    Targets p(x | d) itself. Assumes a Gaussian prior with an affine transform, linear (affine) operators and Gaussian
    noise.

    Args:
        method: "dense" factorises the posterior precision in float64; "cg" never builds a matrix: draws are made by
            perturbing the prior mean and the data and solving with `operator.solve` (exact once converged); "auto"
            takes "dense" up to `limit` unknowns.
        limit: unknowns (product of the model shape) that "dense" accepts.
        rtol: relative tolerance of the "cg" solves; the operator's default when omitted.
        max_iter: iterations of the "cg" solves at the most.

    Cost: dense: n forward items and a Cholesky factorisation of n × n once a run, n² a draw. cg: one `operator.solve` a
    draw. `Posterior.log_evidence` is filled by "dense".
    References: module docstring; Papandreou & Yuille, NIPS 2010 (perturb and solve).
    """

    needs: ClassVar[tuple[type, ...]] = (HasGaussian,)
    kind: ClassVar[str] = "exact"

    method: str = "auto"
    limit: int = 4096
    rtol: float | None = None
    max_iter: int = 2000

    def __post_init__(self) -> None:
        if self.method not in ("auto", "dense", "cg"):
            raise ValueError(f"The method of ExactGaussian is 'auto', 'dense' or 'cg', got {self.method!r}.")

    @classmethod
    def examples(cls) -> list[ExactGaussian]:
        """Both ways."""
        return [cls(method="dense"), cls(method="cg", rtol=1e-13)]

    def check(self, problem: InverseProblem) -> None:
        super().check(problem)
        check_linear(self, problem, "use a solver for non-linear problems, such as MAP")
        if self.method == "dense":
            _check_size(self, problem, self.limit)

    def num_steps(self, problem: InverseProblem) -> int:
        return 1

    def init(self, problem: InverseProblem, rng: Streams) -> dict[str, Tensor]:
        mean = problem.prior.mean_u.to(device=rng.device, dtype=problem.dtype)
        return {"x": problem.prior.transform(mean.expand(len(rng), *problem.model_shape))}

    def step(self, problem: InverseProblem, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        if not self._is_dense(problem):
            return perturbed(problem, rng, rtol=self.rtol, max_iter=self.max_iter)
        system = _wide_system(problem)
        dense = _one(problem, system)
        w, evidence = dense.centre(system.data)
        white = rng.normal(problem.model_shape, dtype=problem.dtype).flatten(1).to(torch.float64)
        return {
            "x": in_units(problem, dense.field(w + dense.spread(white))),
            "log_evidence": evidence.expand(len(rng)),
        }

    def _is_dense(self, problem: InverseProblem) -> bool:
        return self.method == "dense" or (self.method == "auto" and math.prod(problem.model_shape) <= self.limit)

    def mean(self, problem: InverseProblem, *, dtype: torch.dtype = torch.float64) -> Tensor:
        """Posterior mean of x, `(obs, *shape)`; with "cg" one solve an observation and no matrix."""
        self.check(problem)
        if self._is_dense(problem):
            return self.moments(problem, covariance=False)[0].to(dtype)
        here = problem.select(range(problem.n_obs), dtype=dtype)
        system = here.linear_gaussian("u")
        mean = here.prior.mean_u.to(device=system.data.device, dtype=dtype).expand(problem.n_obs, *problem.model_shape)
        return update(here, system, mean, system.data, rtol=self.rtol, max_iter=self.max_iter)["x"]

    def moments(self, problem: InverseProblem, *, covariance: bool = True) -> tuple[Tensor, Tensor]:
        """Posterior mean `(obs, *shape)` and covariance `(n, n)` of x in closed form, float64.

        Args:
            problem: what to solve. covariance: False leaves the second output empty, for the mean alone.

        Raises:
            ValueError: more unknowns than `limit`.
        """
        self.check(problem)
        _check_size(self, problem, self.limit)
        system = _wide_system(problem)
        dense = _one(problem, system)
        mean = problem.prior.transform(dense.field(dense.centre(system.data)[0]))
        if not covariance:
            return mean, mean.new_zeros(0, 0)
        one = torch.ones(1, *problem.model_shape, dtype=torch.float64, device=mean.device)
        slope = (problem.prior.transform(one) - problem.prior.transform(0 * one)).flatten()
        return mean, slope[:, None] * dense.covariance() * slope[None, :]

    def log_evidence(self, problem: InverseProblem) -> Tensor:
        """log N(d; A μ, R + A C Aᴴ) of every observation, `(obs,)`."""
        self.check(problem)
        _check_size(self, problem, self.limit)
        system = _wide_system(problem)
        return _one(problem, system).centre(system.data)[1]


@dataclass(frozen=True)
class ExactMixture(Solver):
    """The posterior of a linear-Gaussian problem under a Gaussian-mixture prior: independent exact draws, evidence.

    p(u | d) = Σ_k v_k N(u; m_k, S_k),  v_k ∝ weights_k N(d; A μ_k, R + A C_k Aᴴ).

    Targets p(x | d) itself. Assumes an affine transform, linear operators and Gaussian noise.

    Args:
        limit: unknowns that it accepts (dense matrices).

    Cost: K times that of `ExactGaussian(method="dense")`. `stats["component"]` is the component of each draw.
    """

    needs: ClassVar[tuple[type, ...]] = (HasMixture,)
    kind: ClassVar[str] = "exact"

    limit: int = 2048

    @classmethod
    def examples(cls) -> list[ExactMixture]:
        """The one way."""
        return [cls()]

    def check(self, problem: InverseProblem) -> None:
        super().check(problem)
        check_linear(self, problem, "use a solver for non-linear problems, such as MAP")
        _check_size(self, problem, self.limit)

    def num_steps(self, problem: InverseProblem) -> int:
        return 1

    def init(self, problem: InverseProblem, rng: Streams) -> dict[str, Tensor]:
        mean = problem.prior.means[0].to(device=rng.device, dtype=problem.dtype)
        return {"x": problem.prior.transform(mean.expand(len(rng), *problem.model_shape))}

    def step(self, problem: InverseProblem, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        system = _wide_system(problem)
        parts = _components(problem, system)
        log_weights, centres, evidence = _weigh(problem, parts, system.data)
        uniform = rng.uniform((), dtype=torch.float64, tag="component")
        chosen = (uniform[:, None] > log_weights.exp().cumsum(1)[:, :-1]).sum(1)
        white = rng.normal(problem.model_shape, dtype=problem.dtype).flatten(1).to(torch.float64)
        u = white.new_full((len(rng), *problem.model_shape), math.nan)  # stays NaN where the evidence is
        for k, part in enumerate(parts):
            here = (chosen == k) & torch.isfinite(evidence)
            u[here] = part.field(centres[k].expand(len(rng), -1)[here] + part.spread(white[here]))
        return {"x": in_units(problem, u), "log_evidence": evidence.expand(len(rng)), "stat_component": chosen}

    def components(self, problem: InverseProblem) -> tuple[Tensor, Tensor, Tensor]:
        """Posterior weights `(obs, K)`, means `(obs, K, *shape)` and covariances `(K, n, n)` of x, float64."""
        self.check(problem)
        system = _wide_system(problem)
        parts = _components(problem, system)
        log_weights, centres, _ = _weigh(problem, parts, system.data)
        transform = problem.prior.transform
        means = torch.stack([transform(p.field(w)) for p, w in zip(parts, centres, strict=True)], dim=1)
        one = torch.ones(1, *problem.model_shape, dtype=torch.float64, device=means.device)
        slope = (transform(one) - transform(0 * one)).flatten()
        return log_weights.exp(), means, torch.stack([slope[:, None] * p.covariance() * slope for p in parts])

    def log_evidence(self, problem: InverseProblem) -> Tensor:
        """log Σ_k weights_k N(d; A μ_k, R + A C_k Aᴴ) of every observation, `(obs,)`."""
        self.check(problem)
        system = _wide_system(problem)
        return _weigh(problem, _components(problem, system), system.data)[2]


def _one(problem: InverseProblem, system: LinearGaussian) -> _Dense:
    """The factorised Gaussian posterior, made once for all chunks and data sets of the problem."""
    key = ("exact", str(system.data.device))
    return problem.remember(key, lambda: _Dense(problem.prior.mean_u, problem.prior.covariance_u, system))


def _components(problem: InverseProblem, system: LinearGaussian) -> list[_Dense]:
    """The same for each component of a mixture."""
    key = ("exact components", str(system.data.device))
    both = zip(problem.prior.means, problem.prior.covariances, strict=True)
    return problem.remember(key, lambda: [_Dense(m, c, system) for m, c in both])


def _weigh(problem: InverseProblem, parts: list[_Dense], data: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """Posterior log-weights `(batch, K)`, whitened centres of each component, log-evidence `(batch,)`."""
    solved = [part.centre(data) for part in parts]
    prior = torch.as_tensor(problem.prior.weights).to(data.real).log()
    joint = torch.stack([evidence for _, evidence in solved], dim=1) + prior
    evidence = joint.logsumexp(1)
    return joint - evidence[:, None], [w for w, _ in solved], evidence
