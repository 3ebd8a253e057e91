"""Calibration of diffusion samplers beside deepinv's and azula's, with an exact denoiser: part 3 of `peers_diffusion.py`.

A Gaussian field of 16 × 16 with its exact denoiser, so that the posterior is known by dense algebra. First the same rule
on the same noise levels (0.002 to 20) with ancestral steps for everybody, then what the defaults of each library give.

Scores of n samples, z_j = (sample mean − mean)_j / sd_j: mean error √max(0, mean_j z_j² − 1/n), sd ratio mean_j
(sample sd / sd)_j, coverage mean_j (exact posterior mass of the sample 5–95 % interval)_j; "±" is the Monte-Carlo
standard error (normal theory for the mean, bootstrap for the sd, ten disjoint parts for the coverage).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from invgen.noise import GaussianNoise
from invgen.operators import Convolution, MatrixOperator
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem
from invgen.solvers import DDRM, DPS, MMPS, GuidedDiffusion, PiGDM, PnPDM
from invgen.solvers import DiffPIR as OurDiffPIR
from invgen.transforms import Identity

__all__ = ["NOISE", "Shown", "calibration", "gaussian_kernel"]

NOISE = 0.05
SD = 0.1  # of the field
CUT = NOISE / SD  # azula's ΠGDM inverts the blur as if there were no noise: only where the signal is above it
F64 = torch.float64


def gaussian_kernel(sd: float) -> Tensor:
    x = torch.arange(-math.ceil(3 * sd), math.ceil(3 * sd) + 1, dtype=F64)
    kernel = torch.exp(-(x[:, None] ** 2 + x**2) / (2 * sd**2))
    return kernel / kernel.sum()


class Shown:
    """A prior reduced to its denoiser and its scale: what a trained diffusion model offers."""

    def __init__(self, denoise: Callable[[Tensor, Any], Tensor], side: int, sigma_data: float, start: float) -> None:
        self.shape, self.grid, self.transform = (1, side, side), None, Identity()
        self.sigma_data, self.start_sigma, self.denoise = sigma_data, start, denoise

    def sample(self, n: int, *, seed: int = 0) -> Tensor:
        raise RuntimeError("The denoiser is all that is shown of this prior.")


class Field:
    """A field of 16 × 16 in [0, 1] (mean 0.5 and a wave, sd 0.1), blurred, noise 0.05, and its exact posterior."""

    def __init__(self, side: int = 16) -> None:
        i = torch.arange(side, dtype=F64)
        wave = 2 * math.pi * i / side
        mean = (0.5 + 0.1 * torch.sin(wave)[:, None] + 0.05 * torch.cos(wave))[None]
        prior = GaussianPrior.stationary((1, side, side), sd=SD, length=2.0, nu=1.0, mean=mean)
        self.side, self.dim, self.kernel, self.denoise = side, side**2, gaussian_kernel(1.0), prior.denoise
        operator = Convolution(self.kernel, (1, side, side))
        truth = prior.sample(1, seed=3, dtype=F64)
        g = torch.Generator().manual_seed(5)
        with torch.no_grad():
            self.y = operator(truth) + NOISE * torch.randn(truth.shape, generator=g, dtype=F64)
            self.A = A = operator.to_dense()
        C = prior.covariance_u.dense()
        S = A @ C @ A.T + NOISE**2 * torch.eye(self.dim, dtype=F64)
        root = torch.linalg.cholesky(S)
        half = torch.linalg.solve_triangular(root, A @ C, upper=False)
        residual = (self.y - operator(mean[None])).reshape(-1, 1)
        self.mean = mean.flatten() + (half.T @ torch.linalg.solve_triangular(root, residual, upper=False))[:, 0]
        self.covariance = C - half.T @ half
        self.sd = self.covariance.diagonal().sqrt()
        largest = float(prior.covariance_u.spectrum.max())
        shown = Shown(prior.denoise, side, SD, 7 * math.sqrt(largest))
        self.problem = InverseProblem(self.y, operator, GaussianNoise(NOISE), shown)

    def solve(self, solver: Any, n: int, problem: InverseProblem | None = None, **options: Any) -> Tensor:
        return solver.solve(problem or self.problem, n, seed=1, **options).samples[0].flatten(0, 1).flatten(1)

    def strong(self) -> InverseProblem:
        """The components Uᵀ y with singular values above the noise alone."""
        U, s, Vh = torch.linalg.svd(self.A)
        kept = s > NOISE
        operator = MatrixOperator(s[kept, None] * Vh[kept], self.y.shape[1:])
        return InverseProblem((U.T @ self.y.flatten())[kept], operator, GaussianNoise(NOISE), self.problem.prior)

    def exact(self, n: int) -> Tensor:
        root = torch.linalg.cholesky(self.covariance)
        return self.mean + torch.randn(n, self.dim, dtype=F64) @ root.T


@dataclass(frozen=True)
class Score:
    """Values and Monte-Carlo standard errors of mean error, sd ratio and coverage."""

    values: tuple[float, float, float]
    errors: tuple[float, float, float]

    NAMES = ("mean_error", "sd_ratio", "coverage")
    IDEAL = (0.0, 1.0, 0.9)


def score(samples: Tensor, field: Field) -> Score:
    n = len(samples)
    z = (samples.double() - field.mean) / field.sd

    def mass(part: Tensor) -> float:
        ends = torch.quantile(part, torch.tensor([0.05, 0.95], dtype=F64), dim=0)
        normal = torch.special.ndtr(ends)
        return float((normal[1] - normal[0]).mean())

    mean, deviation = z.mean(0), z.std(0)
    # m² = |mean|²/d − 1/n is a quadratic form of a normal vector with covariance S/n: Var = (4 mᵀSm/n + 2 tr S²/n²)/d²
    S = torch.cov(z.T)
    square, trace = float(mean.square().mean()) - 1 / n, float(S.square().sum())
    linear = max(0.0, float(mean @ S @ mean) - trace / n)
    spread = math.sqrt(4 * linear / n + 2 * trace / n**2) / field.dim
    error = math.sqrt(max(0.0, square))
    picked = torch.randint(n, (200, n), generator=torch.Generator().manual_seed(0))
    weights = torch.zeros(200, n, dtype=F64).scatter_add_(1, picked, torch.full((200, n), 1 / n, dtype=F64))
    resampled = (weights @ z.square() - (weights @ z).square()).clamp_min(0).sqrt().mean(1)
    parts = [mass(z[k::10]) for k in range(10)]
    return Score(
        (error, float(deviation.mean()), mass(z)),
        # the root of m² turns its error into spread/2m, or √spread where m is lost in it
        (math.sqrt(error**2 + spread) - error, float(resampled.std()), statistics.stdev(parts) / math.sqrt(10)),
    )


Rows = Iterator[tuple[str, str, str, Callable[[], Tensor]]]


def same_algorithm(libraries: Any, field: Field, n: int, steps: int) -> Rows:
    """(library, rule, what differs, draw): one rule, one set of noise levels, ancestral steps, `steps` calls."""
    from azula.guidance.dps import DPSSampler
    from azula.guidance.mmps import MMPSDenoiser
    from azula.guidance.pgdm import PGDMSampler
    from azula.linalg.covariance import IsotropicCovariance
    from azula.sample import DDPMSampler
    from deepinv.sampling import MomentMatchingDataFidelity, PiGDMDataFidelity

    shared = {"integrator": "ancestral", "steps": steps, "sigma_max": 20.0, "sigma_min": 0.002}
    levels = GuidedDiffusion(**shared).levels(field.problem)
    blur, y = libraries.Blur(field.kernel, field.side), field.y.flatten()
    physics = libraries.deepinv_physics(field.kernel, field.side, NOISE)
    side, zeta, inner = field.side, 0.1, 20  # ζ: the lower end of the paper's range

    def flat(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda v: f(v.reshape(-1, 1, side, side)).reshape(v.shape)

    def deepinv(fidelity: Any) -> Callable[[], Tensor]:
        return lambda: libraries.deepinv_run(fidelity, field.denoise, physics, field.y, levels, n).flatten(1)

    def azula(make: Callable[[Any], Any]) -> Callable[[], Tensor]:
        return lambda: libraries.azula_run(make, field.denoise, levels, n, field.dim)

    def ours(guidance: Any) -> Callable[[], Tensor]:
        return lambda: field.solve(GuidedDiffusion(guidance, **shared), n, dtype=F64)

    options = {"steps": steps, "silent": True, "dtype": F64}
    yield "invgen", "dps", f"zeta {zeta}", ours(DPS(zeta))
    yield "deepinv", "dps", "weights of the paper's step", deepinv(libraries.paper_step_dps(zeta, levels))
    # |r| over the batch is about √n times that of a sample, and the gradient of |r| is half that of |r|²/|r|
    strength = 2 * zeta * math.sqrt(n)
    yield "azula", "dps", "zeta × 2 √n", azula(lambda d: DPSSampler(d, y, flat(blur), zeta=strength, **options))
    yield "invgen", "pigdm", "prior variance 1", ours(PiGDM(1.0))
    yield "deepinv", "pigdm", "clip off", deepinv(PiGDMDataFidelity())
    inverse = flat(lambda d: blur.pseudo_inverse(d, CUT))

    def pgdm(d: Any) -> Any:
        return PGDMSampler(d, y, flat(blur), inverse, eta=1.0, **options)

    yield "azula", "pgdm", "a rule of its own: data without noise, no 1 − σ'²/σ²", azula(pgdm)
    yield "invgen", "mmps", f"GMRES {inner}", ours(MMPS(inner))
    yield "deepinv", "mmps", f"CG {inner}", deepinv(MomentMatchingDataFidelity(cg_max_iter=inner))
    cov = IsotropicCovariance(NOISE**2)

    def mmps(d: Any) -> Any:
        return DDPMSampler(MMPSDenoiser(d, y, flat(blur), cov, "cg", inner), **options)

    yield "azula", "mmps", f"CG {inner}", azula(mmps)
    ddrm = replace(DDRM(), **{k: v for k, v in shared.items() if k != "integrator"})
    # deepinv counts a component as measured where its singular value is above the noise, the paper where it is not 0
    what = "singular values below the noise left out, as deepinv does"
    yield "invgen", "ddrm", what, lambda: field.solve(ddrm, n, problem=field.strong(), dtype=F64)
    yield "deepinv", "ddrm", "common levels", deepinv_restoration(libraries, field, "ddrm", n, steps, levels)
    yield "invgen", "ddrm_all", "all singular values", lambda: field.solve(ddrm, n, dtype=F64)
    yield from same_diffpir(libraries, field, n, shared, levels)


def same_diffpir(libraries: Any, field: Field, n: int, shared: dict[str, Any], levels: list[float]) -> Rows:
    """DiffPIR on deepinv's levels, which cannot be chosen there, and with ζ = 0 on the common ones beside azula.

    deepinv, on images in [−1, 1] with noise in units of [0, 1], weighs the data step by ρ = λ σ_y²/σ² and halves it: in
    one unit its λ is half of ours. The last of its levels is where it stops, without a denoising.
    """
    from azula.guidance.diffpir import DiffPIRDenoiser
    from azula.sample import DDIMSampler
    from deepinv.optim.data_fidelity import L2
    from deepinv.sampling import DiffPIR

    steps, side = shared["steps"], field.side
    theirs = DiffPIR(libraries.DeepinvDenoiser(field.denoise), L2(), max_iter=steps + 1)
    given = (theirs.sigmas[theirs.seq.long()] / 2).double().tolist()

    class OnTheirLevels(OurDiffPIR):
        def schedule(self, problem: InverseProblem) -> list[float]:
            return given

    ours = OnTheirLevels(steps=steps, weight=theirs.lambda_ / 2, zeta=theirs.zeta)
    yield "invgen", "diffpir", "levels of deepinv, λ / 2", lambda: field.solve(ours, n, dtype=F64)
    yield (
        "deepinv",
        "diffpir",
        "its defaults otherwise",
        deepinv_restoration(libraries, field, "diffpir", n, steps + 1, None),
    )

    blur, inner, weight = libraries.Blur(field.kernel, side), 20, 10.0
    plain = OurDiffPIR(weight=weight, zeta=0.0, **{k: v for k, v in shared.items() if k != "integrator"})
    yield "invgen", "diffpir_ode", f"ζ 0, λ {weight:g}", lambda: field.solve(plain, n, dtype=F64)

    def sampler(denoiser: Any) -> Any:
        def A(v: Tensor) -> Tensor:
            return blur(v.reshape(-1, 1, side, side)).reshape(v.shape)

        restored = DiffPIRDenoiser(denoiser, field.y.flatten(), A, NOISE**2, weight, "cg", inner)
        return DDIMSampler(restored, steps=steps, silent=True, dtype=F64)

    what = f"η 0, λ {weight:g}, CG {inner}"
    yield "azula", "diffpir_ode", what, lambda: libraries.azula_run(sampler, field.denoise, levels, n, field.dim)


def deepinv_restoration(
    libraries: Any, field: Field, rule: str, n: int, steps: int, levels: list[float] | None
) -> Callable[[], Tensor]:
    """DDRM (on the given levels, its own 100 without) or DiffPIR of deepinv; both take images in [0, 1]."""
    from deepinv.optim.data_fidelity import L2
    from deepinv.sampling import DDRM, DiffPIR

    physics = libraries.deepinv_physics(field.kernel, field.side, NOISE)
    network = libraries.DeepinvDenoiser(field.denoise)
    y = field.y.expand(n, 1, field.side, field.side).float()
    model = DDRM(network, sigmas=levels) if rule == "ddrm" else DiffPIR(network, L2(), max_iter=steps)
    return lambda: model(y.clone(), physics).flatten(1)


def defaults(libraries: Any, field: Field, n: int, fast: bool) -> Rows:
    """(library, rule, settings, draw): constructors with nothing but the problem, and each library's range."""
    from azula.denoise import Denoiser
    from azula.guidance.diffpir import DiffPIRDenoiser
    from azula.guidance.dps import DPSSampler
    from azula.guidance.mmps import MMPSDenoiser
    from azula.guidance.pgdm import PGDMSampler
    from azula.linalg.covariance import IsotropicCovariance
    from azula.noise import VPSchedule
    from azula.sample import DDIMSampler
    from deepinv.sampling import DPS as DeepinvDPS
    from deepinv.sampling import (
        DDPMSolver,
        MomentMatchingDataFidelity,
        PiGDMDataFidelity,
        PosteriorDiffusion,
        VariancePreservingDiffusion,
    )

    for rule, solver in (
        ("dps", GuidedDiffusion(DPS())),
        ("pigdm", GuidedDiffusion(PiGDM())),
        ("mmps", GuidedDiffusion()),
        ("pnpdm", PnPDM()),
        ("ddrm", DDRM()),
        ("diffpir", OurDiffPIR()),
    ):
        what = f"{getattr(solver, 'integrator', type(solver).__name__)}, {solver.num_steps(field.problem)} steps"
        yield "invgen", rule, what, lambda solver=solver: field.solve(solver, n)

    side = field.side
    physics = libraries.deepinv_physics(field.kernel, side, NOISE)
    network = libraries.DeepinvDenoiser(field.denoise)
    tiled = field.y.expand(n, 1, side, side).float()
    long, short = (300, 100) if fast else (1000, 200)
    what = f"vp, ddpm, {long} steps" + (" (its default is 1000)" if fast else "")
    yield "deepinv", "dps", what, lambda: DeepinvDPS(network, num_steps=long)(tiled, physics).flatten(1)
    for rule, term in (("pigdm", PiGDMDataFidelity), ("mmps", MomentMatchingDataFidelity)):
        solver = DDPMSolver(timesteps=torch.linspace(1, 0, short, dtype=F64))
        model = PosteriorDiffusion(term(), network, VariancePreservingDiffusion(), solver)
        what = f"vp; solver of its DPS, {short} steps (none by default)"
        yield "deepinv", rule, what, lambda model=model: model(tiled, physics).flatten(1)
    yield "deepinv", "ddrm", "100 steps", deepinv_restoration(libraries, field, "ddrm", n, 100, None)
    yield "deepinv", "diffpir", "100 steps", deepinv_restoration(libraries, field, "diffpir", n, 100, None)

    # azula has no range of its own and no default schedule: [−1, 1] as its image models, its VPSchedule
    def denoise(v: Tensor, sigma: Tensor) -> Tensor:
        return 2 * field.denoise((v + 1) / 2, sigma / 2) - 1

    blur, y = libraries.Blur(field.kernel, side), 2 * field.y.flatten() - 1

    def A(v: Tensor) -> Tensor:
        return blur(v.reshape(-1, 1, side, side)).reshape(v.shape)

    def inverse(v: Tensor) -> Tensor:
        return blur.pseudo_inverse(v.reshape(-1, 1, side, side), CUT).reshape(v.shape)

    inner: Denoiser = libraries.AzulaDenoiser(denoise, VPSchedule())
    quiet = {"silent": True, "dtype": F64}
    variance = (2 * NOISE) ** 2
    made = {
        "dps": DPSSampler(inner, y, A, **quiet),
        "pgdm": PGDMSampler(inner, y, A, inverse, **quiet),
        "mmps": DDIMSampler(MMPSDenoiser(inner, y, A, IsotropicCovariance(variance)), **quiet),
        "diffpir": DDIMSampler(DiffPIRDenoiser(inner, y, A, variance), **quiet),
    }
    for rule, sampler in made.items():
        what = f"vp, {type(sampler).__mro__[1 if rule in ('dps', 'pgdm') else 0].__name__}, {sampler.steps} steps"
        yield "azula", rule, what, lambda s=sampler: (libraries.azula_sample(s, n, field.dim) + 1) / 2


def calibration(bench: Any, libraries: Any) -> None:
    """Both tables, and how often ours is further from the ideal than a peer's by more than Monte-Carlo error."""
    n, steps = (250, 50) if bench.fast else (1000, 100)
    field = Field()
    header = (
        f"   {'library':9s}{'rule':10s}{'mean error':>17s}{'sd ratio':>17s}{'coverage':>17s}{'CPU s':>8s}  settings"
    )

    def show(prefix: str, rows: Rows) -> dict[tuple[str, str], Score]:
        print(header)
        found = {}
        for k, (library, rule, what, draw) in enumerate(rows):
            torch.manual_seed(k)
            began = time.process_time()
            samples = draw()
            spent = time.process_time() - began
            bad = int((~samples.isfinite().all(1)).sum())
            what += f"; {bad} of {n} not finite" if bad else ""
            s = found[rule, library] = score(torch.nan_to_num(samples, nan=0.0, posinf=1e3, neginf=-1e3), field)
            cells = "".join(f"{v:9.3f} ± {e:.3f}" for v, e in zip(s.values, s.errors, strict=True))
            print(f"   {library:9s}{rule:10s}{cells}{spent:8.1f}  {what}", flush=True)
            for name, value, error in zip(Score.NAMES, s.values, s.errors, strict=True):
                record.append((f"{prefix}_{library}_{rule}_{name}", value, error, what))
        return found

    record: list[tuple[str, float, float, str]] = []
    print(f"\n3  Gaussian field, exact denoiser, {n} samples. The same rule, {steps} common levels, ancestral steps")
    exact = ("exact", "draws", "the posterior itself", lambda: field.exact(n))
    same = show("calibration", iter([exact, *same_algorithm(libraries, field, n, steps)]))
    worse = []
    for (rule, library), theirs in same.items():
        if library in ("exact", "invgen") or (rule, "invgen") not in same:
            continue
        mine = same[rule, "invgen"]
        for j, name in enumerate(Score.NAMES):
            further = abs(mine.values[j] - Score.IDEAL[j]) - abs(theirs.values[j] - Score.IDEAL[j])
            if further > 3 * math.hypot(mine.errors[j], theirs.errors[j]):
                worse.append(f"{name} of {rule} than {library}")
    print(f"\n   What the defaults give, {n} samples")
    show("defaults", defaults(libraries, field, n, bench.fast))
    for id, value, error, what in record:
        bench.add(id, value, mc_error=error, note=what)
    note = "; ".join(worse) or "same rule: nowhere further from the ideal by more than 3 Monte-Carlo errors"
    bench.add("calibration_worse_than_peer", len(worse), "scores", note=note)
