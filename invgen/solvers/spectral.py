r"""Restoration in the singular basis of the physics: DDRM and DDNM, without derivatives of the network.

The data are whitened, d' = R^(−½) d, and R^(−½) A = U S Vᴴ. In the components ū = Vᴴ u the physics is diagonal: every
component with s_i > 0 was measured, ȳ_i = (Uᴴ d')_i / s_i = ū0_i + N(0, 1/s_i²), the others were not. Both methods take
the clean estimate D(u, σ) and the datum ȳ_i by turns, according to which of the two noises, σ and 1/s_i, is smaller, and
keep the total noise of every component at its level. They use neither the prior's covariance nor that of D: no step
weighs prior against datum as Bayes' rule does, and a posterior mean between the two is met by alternation at best.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from invgen.contracts import HasDenoiser, Solver
from invgen.covariance import Scalar
from invgen.driver import Streams
from invgen.problem import InverseProblem, LinearGaussian
from invgen.solvers._linearised import DENSE_LIMIT, over_reals
from invgen.solvers.diffusion import check_diffusion_problem, check_start, name_bad_level, prior_mean
from invgen.solvers.guidance import noise_levels

__all__ = ["DDNM", "DDRM"]


class Spectrum(NamedTuple):
    """The measured components of a problem.

    Attributes:
        basis: Vᴴ, `(r, n_model)`, orthonormal rows.
        noise: 1/s_i `(r,)`, standard deviation of ȳ_i.
        data: ȳ `(batch, r)`.
    """

    basis: Tensor
    noise: Tensor
    data: Tensor

    def components(self, u: Tensor) -> Tensor:
        """Vᴴ u, `(batch, r)`."""
        return u.flatten(1) @ self.basis.mT

    def place(self, u: Tensor, wanted: Tensor) -> Tensor:
        """u with its measured components set to `wanted` `(batch, r)`."""
        return u + ((wanted - self.components(u)) @ self.basis).reshape(u.shape)


class _Spectral(Solver):
    """What DDRM and DDNM share: basis, schedule, start, checks."""

    steps: int
    sigma_max: float | None
    sigma_min: float
    rho: float

    needs: ClassVar[tuple[type, ...]] = (HasDenoiser,)
    kind: ClassVar[str] = "approximate"

    def check(self, problem: InverseProblem) -> None:
        super().check(problem)
        check_diffusion_problem(self, problem, linear_only=True)
        check_start(self, problem, self.sigma_max)
        _factors(self, problem)

    def num_steps(self, problem: InverseProblem) -> int:
        return self.steps

    def levels(self, problem: InverseProblem) -> list[float]:
        """The schedule: `steps` levels and 0."""
        return noise_levels(self, problem, self.steps)

    def finish(self, problem: InverseProblem, state: dict[str, Tensor]) -> dict[str, Tensor]:
        name_bad_level(self, problem, state["u"], self.levels(problem))
        return {"x": problem.prior.transform(state["u"])}

    def spectrum(self, problem: InverseProblem, like: Tensor) -> Spectrum:
        """Basis, noise and data of the chunk, in the dtype and on the device of `like`."""

        def build() -> Spectrum:
            left, noise, basis = (f.to(like.device) for f in _factors(self, problem))
            system = problem.linear_gaussian("u")
            data = (_whitened(system, system.data).double() @ left) * noise
            return Spectrum(basis.to(like), noise.to(like), data.to(like))

        return problem.remember(("spectrum", like.dtype, like.device), build, shared=False)


@dataclass(frozen=True)
class DDRM(_Spectral):
    r"""Denoising diffusion restoration models (Kawar et al. 2022, arXiv:2201.11793, equations 4–8).

    Targets, for data of any noise, the variational family of the paper: every component keeps the marginal
    u_σ,i ~ N(ū0_i, σ²) of the diffusion, given the clean model and averaged over the noise of the data (proposition
    3.1, which fixes every variance below). It is not the posterior p(x | d), Gaussian problems included. From σ to σ'
    with D̄ = Vᴴ D(u, σ) and ξ ~ N(0, I):

    - not measured:       ū' = D̄ + √(1−η²) σ' (ū − D̄)/σ + η σ' ξ
    - σ' < 1/s_i:         ū' = D̄ + √(1−η²) σ' (ȳ − D̄) s_i + η σ' ξ
    - σ' ≥ 1/s_i:         ū' = (1−η_b) D̄ + η_b ȳ + √(σ'² − η_b²/s_i²) ξ

    and at σ' = 0 the clean estimate. The start is the third line with ȳ alone (equation 4), around the prior's mean
    instead of around zero where nothing was measured. Components with 1/s_i > σ_max start as if not measured.

    Args:
        steps: noise levels; the paper takes 20.
        eta: η in [0, 1]. eta_b: η_b in [0, 1].
        sigma_max, sigma_min, rho: the schedule, as in `GuidedDiffusion`.

    Needs `HasDenoiser`, an affine transform, linear-Gaussian terms. Uses `operator.svd()` where it exists and R is a
    number; otherwise R^(−½) A is built as a matrix, up to 2²⁴ entries, and factored once. Cost a sample: steps + 2
    network passes without gradients and 3 products with V a step; no operator calls.

    Measured on the problem of the module `guidance` (500 levels): mean error 0.11 / 0.10 / 0.31, sd ratio 0.88 / 0.86 /
    0.77, coverage 0.85 / 0.84 / 0.77; 20 levels give 0.60 / 0.57 / 0.33, 0.94 / 0.92 / 0.83, 0.81 / 0.81 / 0.80.

    Raises:
        TypeError: an operator without SVD that is too large to be built.
    """

    steps: int = 20
    eta: float = 0.85
    eta_b: float = 1.0
    sigma_max: float | None = None
    sigma_min: float = 0.005
    rho: float = 7.0

    def __post_init__(self) -> None:
        if self.steps < 2 or not (0 <= self.eta <= 1 and 0 <= self.eta_b <= 1):
            raise ValueError(
                f"DDRM needs steps >= 2 and 0 <= eta, eta_b <= 1, got {self.steps}, {self.eta}, {self.eta_b}."
            )

    @classmethod
    def examples(cls) -> list[DDRM]:
        """Cheap instances for the conformance tests."""
        return [cls(steps=12), cls(steps=8, eta=1.0, eta_b=0.5)]

    @classmethod
    def exam(cls) -> dict[str, DDRM]:
        """The paper's settings on a finer schedule: label -> solver."""
        return {"ddrm": cls(steps=500, sigma_min=0.002)}

    @torch.no_grad()
    def init(self, problem: InverseProblem, rng: Streams) -> dict[str, Tensor]:
        top = self.levels(problem)[0]
        xi = rng.normal(problem.model_shape, dtype=problem.dtype, tag="step")
        s = self.spectrum(problem, xi)
        free = prior_mean(problem, xi, top) + top * xi
        known = s.data + (top**2 - s.noise.square()).clamp_min(0).sqrt() * s.components(xi)
        return {
            "u": s.place(free, torch.where(s.noise < top, known, s.components(free))),
            "k": torch.zeros((), dtype=torch.long),
        }

    @torch.no_grad()
    def step(self, problem: InverseProblem, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        k = int(state["k"])
        now, after = self.levels(problem)[k : k + 2]
        u = state["u"]
        clean = problem.prior.denoise(u, now)
        if after == 0:
            return {"u": clean, "k": state["k"] + 1}
        s = self.spectrum(problem, u)
        xi = rng.normal(problem.model_shape, dtype=u.dtype, tag="step")
        keep, fresh = math.sqrt(1 - self.eta**2), self.eta * after
        free = clean + (keep * after / now) * (u - clean) + fresh * xi
        estimate, white = s.components(clean), s.components(xi)
        behind = estimate + keep * after * (s.data - estimate) / s.noise + fresh * white
        spread = (after**2 - (self.eta_b * s.noise).square()).clamp_min(0).sqrt()
        ahead = torch.lerp(estimate, s.data, self.eta_b) + spread * white
        return {"u": s.place(free, torch.where(s.noise > after, behind, ahead)), "k": state["k"] + 1}


@dataclass(frozen=True)
class DDNM(_Spectral):
    r"""Denoising diffusion null-space model with noise, DDNM+ (Wang et al. 2022, arXiv:2212.00490, equations 14, 17–19).

    Targets samples whose measured part is the data's and whose rest the prior fills in; it is not the posterior
    p(x | d), Gaussian problems included. From σ to σ', with a = 1 − σ'²/σ² and s² = σ'² a the weight and the variance of
    the ancestral step (equation 14),

        û0 = D − V Λ (Vᴴ D − ȳ)                                  (17; Λ = 1 is the projection of DDNM, equation 13)
        u' = a û0 + (1 − a) u + V √Φ Vᴴ ξ + s (1 − V Vᴴ) ξ        (18)

    with Λ_i = 1 and Φ_i = s² − a²/s_i² where s ≥ a/s_i, and Λ_i = s s_i/a, Φ_i = 0 elsewhere (19, for each singular
    value): data consistency as strong as it can be with the noise it brings in, a Λ_i/s_i, counted in the variance s² of
    the step. At σ' = 0 the clean estimate. The variant of the paper's appendix with DDIM's η is `DDRM` with eta_b = 1,
    line by line; time travel is left out.

    Args:
        steps: noise levels.
        sigma_max, sigma_min, rho: the schedule, as in `GuidedDiffusion`.

    Needs and cost as `DDRM`.

    Measured on the problem of the module `guidance` (100 levels): mean error 0.57 / 0.55 / 0.47, sd ratio 1.15 / 1.12 /
    0.96, coverage 0.90 / 0.90 / 0.84.

    Raises:
        TypeError: an operator without SVD that is too large to be built.
    """

    steps: int = 100
    sigma_max: float | None = None
    sigma_min: float = 0.005
    rho: float = 7.0

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"DDNM needs steps >= 2, got {self.steps}.")

    @classmethod
    def examples(cls) -> list[DDNM]:
        """Cheap instances for the conformance tests."""
        return [cls(steps=12)]

    @classmethod
    def exam(cls) -> dict[str, DDNM]:
        """A fine schedule: label -> solver."""
        return {"ddnm": cls(steps=100, sigma_min=0.002)}

    @torch.no_grad()
    def init(self, problem: InverseProblem, rng: Streams) -> dict[str, Tensor]:
        top = self.levels(problem)[0]
        xi = rng.normal(problem.model_shape, dtype=problem.dtype, tag="step")
        return {"u": prior_mean(problem, xi, top) + top * xi, "k": torch.zeros((), dtype=torch.long)}

    @torch.no_grad()
    def step(self, problem: InverseProblem, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        k = int(state["k"])
        now, after = self.levels(problem)[k : k + 2]
        u = state["u"]
        clean = problem.prior.denoise(u, now)
        if after == 0:
            return {"u": clean, "k": state["k"] + 1}
        s = self.spectrum(problem, u)
        xi = rng.normal(problem.model_shape, dtype=u.dtype, tag="step")
        a = 1 - (after / now) ** 2
        sd = after * math.sqrt(a)
        free = torch.lerp(u, clean, a) + sd * xi
        share = (sd / (a * s.noise)).clamp_max(1)
        spread = (sd**2 - (a * s.noise).square()).clamp_min(0).sqrt()
        estimate = torch.lerp(s.components(clean), s.data, share)
        wanted = torch.lerp(s.components(u), estimate, a) + spread * s.components(xi)
        return {"u": s.place(free, wanted), "k": state["k"] + 1}


def _whitened(system: LinearGaussian, d: Tensor) -> Tensor:
    """R^(−½) d as real unit-variance vectors `(batch, n)`; the parts of a complex datum have half its variance each."""
    white = system.R.whiten(d)
    return (over_reals(white) * math.sqrt(2.0) if white.is_complex() else white).flatten(1)


def _factors(solver: Solver, problem: InverseProblem) -> tuple[Tensor, Tensor, Tensor]:
    """U `(n, r)`, 1/s `(r,)`, Vᴴ `(r, n_model)` of the whitened operator, rank-deficient directions left out."""
    return problem.remember("whitened SVD", lambda: _decompose(solver, problem.linear_gaussian("u")))


def _decompose(solver: Solver, system: LinearGaussian) -> tuple[Tensor, Tensor, Tensor]:
    A, R = system.operator, system.R
    if isinstance(R, Scalar) and not R.per_item and not system.data.is_complex():
        try:
            left, values, basis = A.svd()
        except TypeError:
            left, values, basis = _dense_svd(solver, system)
        else:
            values = values / R.variance.to(values).sqrt()
    else:
        left, values, basis = _dense_svd(solver, system)
    kept = values > 1e-12 * values.max()
    return left[:, kept], 1 / values[kept], basis[kept]


def _dense_svd(solver: Solver, system: LinearGaussian) -> tuple[Tensor, Tensor, Tensor]:
    A, R = system.operator, system.R
    rows, columns = math.prod(A.data_shape), math.prod(A.model_shape)
    what = f"{type(A).__name__} with {type(R).__name__} noise"
    if not R.has_solve:
        raise TypeError(
            f"{type(solver).__name__} whitens the noise, and this {type(R).__name__} covariance has no closed inverse; give a dense or periodic one."
        )
    if rows * columns > DENSE_LIMIT:
        raise TypeError(
            f"{type(solver).__name__} needs the singular value decomposition of the whitened operator; {what} has none in closed form, and its matrix of {rows} × {columns} is more than 2^24 entries; use an operator with svd() and noise of one variance, or a rule of GuidedDiffusion."
        )
    matrix = A.to_dense().mT  # one row a model unit vector, whitened like data
    return torch.linalg.svd(_whitened(system, matrix.reshape(columns, *A.data_shape)).mT, full_matrices=False)
