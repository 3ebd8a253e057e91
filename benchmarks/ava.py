r"""Elastic inversion of angle gathers: learned prior against the best separable Gaussian fitted to the same generator.

The model is the Otway section (vp, vs, ρ; 128 × 256 samples of 15.5 × 4.8 m), m = (ln vp, ln vs, ln ρ). Every method sees
the same two kinds of data:

    gathers      d_a = W Σ_k G_ak(θ_a, γ(z)) D m_k + n_a,      Cov n_a = σ² T ⊗ X
    background   b_k = F m_k + e_k,                            Cov e_k = s_k² I ⊗ X

G Aki and Richards' coefficients with γ the laterally averaged Vs/Vp of the background, D forward differences, W a Ricker
that is stationary in depth (peak wavelength 5 samples), F a running mean forth and back over 20 samples (310 m), trace by
trace. The noise is coloured: in depth 95 % of its variance has the spectrum of the wavelet and 5 % is white (T), along the
traces it decays as exp(−h/2) (X). After whitening both kinds act trace by trace, d = M m L with L = X^(−1/2), so that every
solve of every method is a closed form.

**First case**: gathers modelled from the section at 5, 17.5 and 30 degrees by that equation, 15 dB above the noise.
**Second case**: the file's own gathers (`Otway_angleseis_nl.npy`). Their angles and wavelet are not stated. Against the
true section they are exact reflection coefficients of depth samples behind a wavelet of three samples, with a constant
added to every gather; 3, 8 and 16 degrees fit best (R² 0.9999, 0.997, 0.976), which is what this case takes. Wavelets, one a
gather, are least squares at the two traces 64 and 192, the residual there is the noise; the constant is taken off. So this
case peeks at the truth for the angles, and at two traces for the wavelets, and has linearisation and model errors.

The Gaussian: mean of every channel, Σ (channel and depth) ⊗ X (traces) by maximum likelihood on generated sections
(Dutilleul 1999, flip-flop); its posterior is sampled exactly. The generator (`invgen.data.ElasticSections`) was not fitted
to this section, whose iron-rich bed (ρ 3.0 to 3.5 at row 37) is outside nearly all that it draws.

Figures: correlation of the posterior mean (of 19) with the truth, both minus F of the truth, because a background
correlates by itself; coverage of the band from the least to the greatest of 19 draws (nominal 0.90).

**The sampler** was chosen on sections of the generator (64 × 64, two truths): PnP-DM of 80 sweeps covers 0.86 of 0.90 with
correlations of 0.70 / 0.70 / 0.61 (the Gaussian: 0.90 / 0.90 / 0.75, and 0.97). With 200 sweeps it drifts away (0.15 / 0.24 / 0.44),
and guided diffusion with MMPS is far too narrow (χ² of the draws 4 to 9), in single precision as in bfloat16. With the exact
denoiser of the Gaussian in the network's place the same MMPS is right (χ² 1.08, sd ratio 1.07): what fails is the network.
After 3500 steps of 32 sections its denoiser is worse than the linear one of that Gaussian at σ = 0.5 and 1 (rms 0.150 against
0.148, 0.215 against 0.213), the levels at which gathers decide, and better only above 2 and below 0.2. It does not ship.

`--fast`: a window of 64 × 64 samples, first case only.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Benchmark
from torch import Tensor

from invgen.contracts import LinearOperator
from invgen.covariance import Covariance, Scalar, as_covariance
from invgen.data import ElasticSections
from invgen.grid import Grid
from invgen.linalg import Solved
from invgen.noise import GaussianNoise
from invgen.operators import PreStack, Smooth, ricker
from invgen.priors import DiffusionPrior, GaussianPrior, pretrained
from invgen.problem import InverseProblem, Term
from invgen.solvers import ExactGaussian, PnPDM

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data" / "seismic"
SECTION, GATHERS = FOLDER / "otway_128_256.npz", FOLDER / "Otway_angleseis_nl.npy"
NAMES = ("vp", "vs", "rho")
ANGLES, WAVELENGTH, SNR_DB, WHITE, TRACES = (5.0, 17.5, 30.0), 5.0, 15.0, 0.05, 2.0
BACKGROUND_SD, LENGTH = (0.05, 0.08, 0.03), 20
FILE_ANGLES, FILE_WELLS, FILE_ROWS, FILE_HALF = (3.0, 8.0, 16.0), (64, 192), slice(4, -6), 6
GENERATED, SEED = 240, 5_000_001
NEGLIGIBLE = (
    0.1  # singular values against unit noise: with a prior sd below 0.4, a signal below 0.0016 of the noise variance
)
SOLVER = PnPDM(iterations=80, inner=3, rho_max=20.0, rho_min=0.01)  # chosen on generated sections, see above


def root(matrix: Tensor, power: float) -> Tensor:
    """The power of a symmetric positive definite matrix."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    kept = torch.maximum(values, 1e-12 * values[..., -1:]).pow(power)
    return (vectors * kept[..., None, :]) @ vectors.mT


def decay(n: int, length: float) -> Tensor:
    """exp(−|i − j|/length)."""
    i = torch.arange(n, dtype=torch.float64)
    return torch.exp(-(i[:, None] - i[None]).abs() / length)


class TraceCovariance(Covariance):
    """Σ ⊗ X on `(channels, n_z, n_x)`: Σ over channels and depth together, X over traces."""

    per_item = False
    has_solve = True

    def __init__(self, sigma: Tensor, X: Tensor, shape: tuple[int, ...]) -> None:
        self.sigma, self.X, self.shape = sigma, X, tuple(shape)
        self._roots = {p: (root(sigma, p), root(X, p)) for p in (0.5, -0.5, -1.0)}

    def _through(self, v: Tensor, left: Tensor, right: Tensor) -> Tensor:
        flat = v.reshape(v.shape[0], -1, self.shape[-1])
        return (left.to(v) @ flat @ right.to(v)).reshape(v.shape)

    def apply(self, v: Tensor) -> Tensor:
        return self._through(v, self.sigma, self.X)

    def solve(self, v: Tensor) -> Tensor:
        return self._through(v, *self._roots[-1.0])

    def sqrt(self, white: Tensor) -> Tensor:
        return self._through(white, *self._roots[0.5])

    def whiten(self, v: Tensor) -> Tensor:
        return self._through(v, *self._roots[-0.5])

    def diagonal(self) -> Tensor:
        return (self.sigma.diagonal()[:, None] * self.X.diagonal()).reshape(self.shape)

    def scaled(self, factor: float | Tensor) -> TraceCovariance:
        return TraceCovariance(float(factor) * self.sigma, self.X, self.shape)


class Traces(LinearOperator):
    """d = A m B, `(3 n_z, n_x)` to `(rows, n_x)`, with Bᵀ B diagonal.

    `solve` is direct for scalar R: (r + c A Aᵀ ⊗ Bᵀ B)⁻¹ for scalar C, (r + A Σ Aᵀ ⊗ Bᵀ X B)⁻¹ for `TraceCovariance`.
    """

    def __init__(self, A: Tensor, B: Tensor, shape: tuple[int, ...]) -> None:
        super().__init__(shape, (1, len(A), shape[2]))
        self.A, self.B = A.double(), B.double()
        self._kept: dict[Any, Any] = {}

    @classmethod
    def reduced(cls, M: Tensor, L: Tensor, data: Tensor, shape: tuple[int, int, int]) -> tuple[Traces, Tensor]:
        """M m L with unit white noise and its data, in singular coordinates, less the directions that hold noise alone."""
        U, s, Vh = torch.linalg.svd(M, full_matrices=False)
        kept = s > NEGLIGIBLE
        values, P = torch.linalg.eigh(L)
        return cls(s[kept, None] * Vh[kept], P * values, shape), (U[:, kept].mT @ data @ P)[None, None]

    def _as(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if like.dtype not in self._kept:
            self._kept[like.dtype] = (self.A.to(like), self.B.to(like))
        return self._kept[like.dtype]

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        A, B = self._as(x)
        return (A @ x.flatten(1, 2) @ B)[:, None]

    def adjoint(self, d: Tensor) -> Tensor:
        A, B = self._as(d)
        return (A.mT @ (d[:, 0] @ B.mT)).reshape(-1, *self.model_shape)

    def scaled_by_channel(self, scale: Tensor) -> Traces:
        return Traces(self.A * scale.double().repeat_interleave(self.model_shape[1]), self.B, self.model_shape)

    def solve(self, rhs: Tensor, R: Any, C: Any, **options: Any) -> Solved:
        R, C = as_covariance(R, self.data_shape, batched=True), as_covariance(C, self.model_shape, batched=True)
        if not isinstance(R, Scalar) or not isinstance(C, (Scalar, TraceCovariance)):
            return super().solve(rhs, R, C, **options)
        white = isinstance(C, Scalar)
        key = (white or id(C), rhs.dtype)
        if key not in self._kept:
            left = self.A if white else self.A @ root(C.sigma, 0.5)
            a, U = torch.linalg.eigh(left @ left.mT)
            right = self.B.mT @ self.B if white else self.B.mT @ C.X.double() @ self.B
            b, P = (right.diagonal(), None) if white else torch.linalg.eigh(right)
            product = a.clamp_min(0)[:, None] * b.clamp_min(0)
            self._kept[key] = (U.to(rhs), None if P is None else P.to(rhs), product.to(rhs), C)
        U, P, product, _ = self._kept[key]
        c = C.variance.to(rhs).reshape(-1, 1, 1) if white else 1.0
        w = U.mT @ rhs[:, 0]
        w = (w if P is None else w @ P) / (R.variance.to(rhs).reshape(-1, 1, 1) + c * product)
        return Solved.direct((U @ (w if P is None else w @ P.mT))[:, None])


@dataclass
class Case:
    """One set of gathers: what the problem is made of, `truth (3, nz, nx)` and the smoothed truth."""

    name: str
    truth: Tensor
    low: Tensor
    gathers: Tensor
    operator: Traces
    data: Tensor

    def problem(self, prior: Any) -> InverseProblem:
        return InverseProblem(terms=[Term(self.data, self.operator, GaussianNoise(1.0))], prior=prior)


def seismic_matrix(wavelets: Tensor, angles: tuple[float, ...], vsvp: Tensor) -> Tensor:
    """The (n_angles nz × 3 nz) matrix of `PreStack` for one trace."""
    nz = len(vsvp)
    one = PreStack(wavelets, list(angles), (3, nz, 1), vsvp=vsvp, kind="forward")
    return one(torch.eye(3 * nz, dtype=torch.float64).reshape(3 * nz, 3, nz, 1)).flatten(1).mT


def ground(truth: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """F, the smoothed truth, the background (the same with noise) and its Vs/Vp profile."""
    _, nz, nx = truth.shape
    F = Smooth((1, nz, nz), (LENGTH, LENGTH)).Z
    low = F @ truth
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sd = torch.tensor(BACKGROUND_SD, dtype=torch.float64)[:, None, None]
    background = low + sd * (noise @ root(decay(nx, TRACES), 0.5))
    return F, low, background, (background[1] - background[0]).mean(1).exp()


def assemble(
    name: str,
    truth: Tensor,
    low: Tensor,
    F: Tensor,
    background: Tensor,
    gathers: Tensor,
    M: Tensor,
    T: Tensor,
    rows: Tensor,
) -> Case:
    """The whitened system; `T (n, n)` is the covariance in depth of what `rows` keeps of each gather."""
    _, nz, nx = truth.shape
    whitener, L = root(T, -0.5), root(decay(nx, TRACES), -0.5)
    parts = [
        (whitener[a] @ M[a * nz : (a + 1) * nz][rows], whitener[a] @ gathers[a][rows]) for a in range(len(gathers))
    ]
    eye = torch.eye(3, dtype=torch.float64)
    parts += [(torch.kron(eye[k : k + 1], F) / sd, background[k] / sd) for k, sd in enumerate(BACKGROUND_SD)]
    M, data = (torch.cat([p[i] for p in parts]) for i in (0, 1))
    operator, data = Traces.reduced(M, L, data @ L, (3, nz, nx))
    return Case(name, truth, low, gathers, operator, data)


def modelled(truth: Tensor, seed: int = 1) -> Case:
    """The first case: gathers of the stated equation with coloured noise."""
    _, nz, nx = truth.shape
    F, low, background, vsvp = ground(truth, seed)
    wavelet = ricker(torch.arange(-12, 13, dtype=torch.float64), 1 / WAVELENGTH)
    M = seismic_matrix(wavelet, ANGLES, vsvp)
    clean = (M @ truth.flatten(0, 1)).reshape(len(ANGLES), nz, nx)
    sigma = float(clean.square().mean().sqrt()) * 10 ** (-SNR_DB / 20)
    W = torch.stack([torch.roll(torch.nn.functional.pad(wavelet, (0, nz)), i - 12) for i in range(nz)])
    band = (W @ W.mT) / float(wavelet.square().sum())
    T = sigma**2 * ((1 - WHITE) * band + WHITE * torch.eye(nz, dtype=torch.float64))
    white = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed + 1000), dtype=torch.float64)
    gathers = clean + root(T, 0.5) @ white @ root(decay(nx, TRACES), 0.5)
    rows = torch.arange(nz)
    return assemble("modelled", truth, low, F, background, gathers, M, T.expand(len(ANGLES), nz, nz), rows)


def recorded(truth: Tensor, seed: int = 1) -> Case:
    """The second case: the file's gathers, with angles, wavelets and noise as the module states."""
    nz = truth.shape[1]
    F, low, background, vsvp = ground(truth, seed)
    gathers = torch.from_numpy(np.load(GATHERS).astype(np.float64))
    rows = torch.arange(nz)[FILE_ROWS]
    gathers = gathers - gathers[:, rows].mean((1, 2), keepdim=True)
    spikes = seismic_matrix(torch.ones(1, dtype=torch.float64), FILE_ANGLES, vsvp)
    wells = list(FILE_WELLS)
    reflectivity = (spikes @ truth.flatten(0, 1)[:, wells]).reshape(3, nz, len(wells))
    wavelets, variances = [], []
    for a in range(3):
        shifted = torch.stack([torch.roll(reflectivity[a], k, 0) for k in range(-FILE_HALF, FILE_HALF + 1)], -1)
        columns, wanted = shifted[rows].flatten(0, 1), gathers[a][rows][:, wells].flatten()
        wavelet = torch.linalg.lstsq(columns, wanted[:, None]).solution[:, 0]
        left = wanted - columns @ wavelet
        variances.append(float(left.square().sum()) / (len(left) - len(wavelet)))
        wavelets.append(wavelet)
        share = 1 - float(left.square().sum() / wanted.square().sum())
        print(f"gather {a}: the tie explains {share:.4f}, noise {variances[-1] ** 0.5:.4f}", flush=True)
    M = seismic_matrix(torch.stack(wavelets), FILE_ANGLES, vsvp)
    T = torch.tensor(variances, dtype=torch.float64)[:, None, None] * torch.eye(len(rows), dtype=torch.float64)
    return assemble("file", truth, low, F, background, gathers, M, T, rows)


def fitted_gaussian(shape: tuple[int, int], count: int) -> GaussianPrior:
    """N(mean, Σ ⊗ X) by maximum likelihood on generated sections, X made stationary (averaged along its diagonals)."""
    nz, nx = shape
    x = torch.from_numpy(ElasticSections(shape, (15.0, 5.0)).sample(count, seed=SEED)).double()
    mean = x.mean((0, 2, 3))[:, None, None].expand(3, nz, nx)
    residual = (x - mean).flatten(1, 2)
    X = torch.eye(nx, dtype=torch.float64)
    index = (torch.arange(nx)[:, None] - torch.arange(nx)[None]).abs()
    for _ in range(4):
        half = residual @ root(X, -0.5)
        sigma = torch.einsum("bix,bjx->ij", half, half) / (count * nx)
        sigma = sigma + 1e-4 * sigma.diagonal().mean() * torch.eye(len(sigma), dtype=torch.float64)
        half = root(sigma, -0.5) @ residual
        X = torch.einsum("bix,biy->xy", half, half) / (count * 3 * nz)
        lags = torch.stack([X.diagonal(k).mean() for k in range(nx)])
        X = (lags / lags[0])[index]
        X = 0.999 * root(X, 1.0) + 0.001 * torch.eye(nx, dtype=torch.float64)
    return GaussianPrior(mean, TraceCovariance(sigma, X, (3, nz, nx)))


def diffusion_prior(shape: tuple[int, int], grid: Grid, checkpoint: str | None) -> Any:
    """The learned prior on this grid (15.5 × 4.8 m, learned at 15 × 5 m), its network in bfloat16."""
    prior = DiffusionPrior.load(checkpoint) if checkpoint else pretrained.load("elastic-diffusion")
    return prior.at(shape, grid=grid).with_precision(torch.bfloat16)


def scores(case: Case, samples: Tensor) -> dict[str, list[float]]:
    """Correlation of the deviation from F m, and coverage of the min–max band, a property each."""
    mean, low, high = samples.mean(0), samples.min(0).values, samples.max(0).values
    inside = ((case.truth >= low) & (case.truth <= high)).double().mean((1, 2)).tolist()
    pairs = zip((mean - case.low).flatten(1), (case.truth - case.low).flatten(1), strict=True)
    return {"correlation": [float(torch.corrcoef(torch.stack(p))[0, 1]) for p in pairs], "coverage": inside}


def figure_of(path: str, case: Case, drawn: dict[str, Tensor], grid: Grid) -> None:
    """Gathers, truth, background, mean and spread of every prior, and the middle trace, a row a property."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    (z0, x0), (dz, dx), (nz, nx) = grid.origin, grid.spacing, grid.shape
    extent, depth, j = (x0, x0 + nx * dx, z0 + nz * dz, z0), z0 + dz * np.arange(nz), nx // 2
    priors = [
        (drawn[k], n, c)
        for k, n, c in (("gaussian_", "Gaussian", "tab:blue"), ("", "learned", "tab:red"))
        if k in drawn
    ]
    units, clip = ("vp (km/s)", "vs (km/s)", "density (g/cm³)"), float(case.gathers.abs().quantile(0.99))
    fig, axes = plt.subplots(3, 4 + 2 * len(priors), figsize=(15 + 7 * len(priors), 12), constrained_layout=True)
    for k, unit in enumerate(units):
        truth = case.truth[k].exp()
        bottom, top = (float(v) for v in truth.quantile(torch.tensor([0.01, 0.99], dtype=torch.float64)))
        panels = [(f"gather at {ANGLES[k]:g}°", case.gathers[k], "gray", -clip, clip, "amplitude")]
        panels += [
            (t, m, "viridis", bottom, top, unit) for t, m in (("truth", truth), ("smoothed truth", case.low[k].exp()))
        ]
        for samples, name, _ in priors:
            r = scores(case, samples)["correlation"][k]
            panels.append((f"{name} prior: mean, r = {r:.2f}", samples.mean(0)[k].exp(), "viridis", bottom, top, unit))
        largest = max(float(samples[:, k].std(0).max()) for samples, _, _ in priors)
        for samples, name, _ in priors:
            spread = 100 * samples[:, k].std(0)
            panels.append((f"{name} prior: spread", spread, "magma", 0.0, 100 * largest, f"sd of {NAMES[k]} (%)"))
        for axis, (title, image, colours, least, most, label) in zip(axes[k], panels, strict=False):
            shown = axis.imshow(image, extent=extent, aspect="auto", cmap=colours, vmin=least, vmax=most)
            axis.set(title=title, xlabel="distance (m)", ylabel="depth (m)")
            fig.colorbar(shown, ax=axis, label=label)
        axis = axes[k, -1]
        for samples, name, colour in priors:
            trace = samples[:, k, :, j].exp()
            axis.fill_betweenx(depth, trace.min(0).values, trace.max(0).values, color=colour, alpha=0.25, lw=0)
            axis.plot(trace.mean(0), depth, color=colour, lw=1, label=f"{name}: mean, min–max of 19")
        axis.plot(truth[:, j], depth, "k", lw=1, label="truth")
        axis.set(title=f"trace at {x0 + j * dx:.0f} m", xlabel=unit, ylabel="depth (m)", ylim=(depth[-1], depth[0]))
        axis.legend(fontsize=7, loc="lower left")
    fig.savefig(path, dpi=70)


def main() -> None:
    bench = Benchmark(
        "ava",
        "Elastic inversion of angle gathers with a learned prior, beside a Gaussian fitted to the same generator.",
        {
            "--checkpoint": {"default": None, "help": "another prior than the shipped one"},
            "--figure": {"default": None, "help": "write a picture of the first case here"},
            "--gaussian-only": {"action": "store_true", "help": "leave the learned prior out"},
        },
    )
    if not SECTION.exists():
        sys.exit(f"{SECTION.name} is missing: put the shared data folder beside the project to run this benchmark.")
    with np.load(SECTION) as file:
        section, x, z = (np.asarray(file[k], dtype=np.float64) for k in ("m", "x", "z"))
    truth = torch.from_numpy(np.log(section / 1000.0))  # km/s, g/cm³
    left = 0
    if bench.fast:
        truth, left = truth[:, 32:96, 96:160].contiguous(), 96
    shape = (truth.shape[1], truth.shape[2])
    origin = (float(z[32 if bench.fast else 0]), float(x[left]))
    form = ElasticSections(shape, (float(z[1] - z[0]), float(x[1] - x[0]))).grid
    grid = form.with_shape(shape, origin)
    began = time.process_time()
    gaussian = fitted_gaussian(shape, GENERATED // 4 if bench.fast else GENERATED)
    print(f"Gaussian fitted in {time.process_time() - began:.1f} CPU s", flush=True)
    there = bench.args.checkpoint or "elastic-diffusion" in pretrained.available()
    if not there:
        print("The elastic prior does not ship yet: train it (configs/elastic-diffusion.yaml) and give --checkpoint.")
    learned = diffusion_prior(shape, grid, bench.args.checkpoint) if there and not bench.args.gaussian_only else None
    for case in [modelled(truth)] if bench.fast else [modelled(truth), recorded(truth)]:
        prefix = "" if case.name == "modelled" else "file_"
        methods = [("gaussian_", gaussian, ExactGaussian(method="cg"))]
        methods += [("", learned, SOLVER)] if learned is not None else []
        drawn = {}
        for method, prior, solver in methods:
            began = time.process_time()
            posterior = solver.solve(case.problem(prior), 19, seed=0)
            spent = time.process_time() - began
            samples = posterior.samples[0, 0].double()
            chi2 = float((case.data - posterior.predict()[0][0, 0]).square().mean())
            stats = {k: f"{float(v.max()):.2g}" for k, v in posterior.stats.items()}
            print(
                f"{case.name} {method or 'learned'}: chi² {chi2:.3f}, {posterior.counts}, at most {stats}", flush=True
            )
            for figure, values in scores(case, samples).items():
                for name, value in zip(NAMES, values, strict=True):
                    bench.add(f"{prefix}{method}{figure}_{name}", value)
            bench.add(f"{prefix}{method}cpu_seconds", spent, "s", note=f"19 samples, {bench.args.threads} threads")
            drawn[method] = samples
        if bench.args.figure and prefix == "":
            figure_of(bench.args.figure, case, drawn, grid)
    bench.finish()


if __name__ == "__main__":
    main()
