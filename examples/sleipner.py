"""Acoustic impedance of a real post-stack section (Sleipner, inline 57), blind-checked at well 15/9-13.

    python examples/sleipner.py --figure sleipner.png          (needs the private test data; see README.md here)

Unknown m = ln AI on (time, trace), AI in m/s·g/cc. Two data terms, the same for both priors:

    seismic      d = a W D m + noise          a, noise: estimated from the data, see `tie` and `noise_models`
    background   S(log) = S m + noise         S a running mean forth and back, log held constant along the traces

and two priors: the learned geology prior with PnP-DM, and a stationary Gaussian fitted to the same generator, sampled
exactly. What of the log enters: the trend below about 5 Hz (background), one time shift, and its variance and its
correlation with the section (wavelet scale, model error). Everything else at the well is a blind check.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import script
import torch
from scipy.signal import butter, sosfiltfilt
from torch import Tensor

from invgen.data import GeologySections
from invgen.grid import Grid
from invgen.noise import GaussianNoise
from invgen.operators import PostStack, Smooth
from invgen.priors import DiffusionPrior, GaussianPrior, pretrained
from invgen.problem import InverseProblem, Term
from invgen.solvers import ExactGaussian, PnPDM
from invgen.transforms import Affine

Array = np.ndarray

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "seismic"
DT, DX, WELL, WELL_TRACES = 0.002, 12.5, 143, slice(141, 146)  # s, m, trace of the tie, traces averaged for the tie
TIMES = (0.36, 1.08)  # s: 180 to 539 of the 2 ms axis
HALF_VELOCITY = 1000.0  # m/s: v = 2 km/s two-way turns time into depth; used for the prior's depth trend only
SMOOTH_SECONDS, SMOOTH_METRES = 0.15, 1250.0  # running means of the background
BACKGROUND_SD = 0.08  # of smoothed ln AI
LOW_CUT = 8.0  # Hz: a wavelet of 122 ms says nothing below about 1/0.122 s, and neither do the data
LOG_HIGH_CUT = 80.0  # Hz, end of the seismic band
GENERATED, SEED = 64, 5_000_001  # windows and stream of the Gaussian fit


@dataclass(frozen=True)
class Survey:
    """The window that is inverted: `data (nt, nx)`, `log (nt,)` = ln AI shifted to tie, column of the well."""

    data: Array
    log: Array
    smooth_log: Array
    wavelet: Array
    grid: Grid
    column: int
    first_trace: int


def read(folder: Path) -> tuple[Array, Array, Array]:
    """Section `(t, x)`, ln AI of the log `(t,)`, wavelet `(61,)`, all at 2 ms."""
    section = np.load(folder / "Sleipner_01_il_57.npy").astype(float)
    log = np.log(np.load(folder / "Sleipner_impedance_log.npy"))[: len(section)]
    return section, log, np.load(folder / "Sleipner_wavelet_01.npy").astype(float)


def low_cut(section: Array, wavelet: Array) -> tuple[Array, Array]:
    """Section and wavelet without the lowest frequencies, by one and the same zero-phase filter.

    Under white noise W D weighs 2 Hz as much as any mode it passes, and a wavelet that is wrong there by a few percent
    bends the whole section away from the background. Taken off both, these frequencies are the background's alone.
    """
    sos = butter(3, LOW_CUT, btype="high", fs=1 / DT, output="sos")
    longer = np.pad(wavelet, 120)  # room for the filter's tails
    return sosfiltfilt(sos, section, axis=0), sosfiltfilt(sos, longer)


def synthetic(log: Array, wavelet: Array) -> Array:
    """Trace of a log: W D ln AI / 2, `(t,)`."""
    operator = PostStack(wavelet / 2, (1, len(log), 1))
    return operator(torch.from_numpy(log)[None, None, :, None])[0, 0, :, 0].numpy()


def tie(trace: Array, log: Array, wavelet: Array, rows: slice, reach: int = 10) -> dict[str, float]:
    """Bulk shift of maximum correlation, the correlations of both polarities, and three wavelet scales.

    energy: a² = (var d − var n)/var s assumes that the log has the reflectivity of the trace, if not in the same
    places; the noise is taken off by the caller. least squares: a = ⟨d, s⟩/⟨s, s⟩, too low by the correlation where
    log and seismic disagree for reasons of the log (position, drift, logging errors).
    """
    s = synthetic(log, wavelet)
    d = trace[rows]
    found = {k: float(np.corrcoef(np.roll(s, k)[rows], d)[0, 1]) for k in range(-reach, reach + 1)}
    shift = max(found, key=found.__getitem__)
    x = np.roll(s, shift)[rows]
    x, d = x - x.mean(), d - d.mean()
    return {
        "shift": shift,
        "correlation": found[shift],
        "worst": min(found.values()),
        "worst_shift": min(found, key=found.__getitem__),
        "least_squares": float(x @ d / (x @ x)),
        "var_data": float(d.var()),
        "var_synthetic": float(x.var()),
    }


def random_noise(section: Array) -> float:
    """sd of incoherent noise: median |d_j − d_(j+1)| / (0.6745 √2). Dips raise it, coherent noise does not enter."""
    return float(np.median(np.abs(np.diff(section, axis=1))) / (0.6745 * np.sqrt(2)))


def noise_models(found: dict[str, float], sigma: float) -> dict[str, dict[str, float]]:
    """Wavelet scale and model-error variance of the two runs.

    The convolutional model explains a share e of the coherent energy V = var d − σ²: a² = e V / var s, and the rest,
    (1 − e) V, is model error (multiples, imaging, a stationary wavelet, 1-D normal incidence).

    random noise: e = 1, the energy scale and no model error. model error: the log correlates with the trace by ρ; the
    blame is shared equally, e = ρ, between the log (off the line, drift, errors) and the model. The scale is then the
    geometric mean of the energy and the least-squares scale. That half and half is a judgement.
    """
    signal = max(found["var_data"] - sigma**2, 1e-12)
    share = min(max(found["correlation"], 0.05), 1.0)

    def model(e: float) -> dict[str, float]:
        return {"scale": float(np.sqrt(e * signal / found["var_synthetic"])), "model_error": (1 - e) * signal}

    return {"random noise": model(1.0), "model error": model(share)}


def survey(folder: Path, args: argparse.Namespace) -> tuple[Survey, dict[str, float], float]:
    """Read, tie, cut and (with --step 4) resample."""
    section, log, wavelet = read(folder)
    section, wavelet = low_cut(section, wavelet)
    rows = slice(round(args.times[0] / DT), round(args.times[1] / DT))
    first = 0 if args.full else max(0, WELL - args.traces // 2)
    traces = slice(first, section.shape[1] if args.full else first + args.traces)
    found = tie(section[:, WELL_TRACES].mean(1), log, wavelet, slice(round(TIMES[0] / DT), round(TIMES[1] / DT)))
    sigma = random_noise(section[rows, traces])
    # filtered over the whole log, then cut: no edges of the window in it
    smooth = sosfiltfilt(butter(4, LOG_HIGH_CUT, fs=1 / DT, output="sos"), log)
    step = args.step // 2
    log, smooth = (np.roll(v, int(found["shift"]))[rows] for v in (log, smooth))
    data = section[rows, traces]
    if step == 2:
        # the section holds nothing above 100 Hz (1e-3 of its amplitude): every second sample is enough
        data, wavelet = data[::2], wavelet[::2]
        log, smooth = log[::2], smooth[::2]
    grid = Grid(
        data.shape,
        (DT * step, DX),
        origin=(rows.start * DT, first * DX),
        axes=("t", "x"),
        units=("s", "m"),
        channels=("ln_impedance",),
    )
    return Survey(data.copy(), log.copy(), smooth.copy(), wavelet, grid, WELL - first, first), found, sigma


def problem(s: Survey, prior: Any, model: dict[str, float], sigma: float, weak: bool = False) -> InverseProblem:
    """The two terms.

    The background's noise is white, 0.08 a sample: a firm constraint (the mean of a smoothing cell is pinned far
    closer than 0.08), so every band is conditional on the trend. `weak` gives the mean of a cell the sd 0.08 instead.
    """
    shape = s.grid.field_shape
    seismic = PostStack(model["scale"] * s.wavelet / 2, shape, model_grid=s.grid)
    lengths = (round(SMOOTH_SECONDS / s.grid.spacing[0]), round(SMOOTH_METRES / DX))
    lengths = (min(lengths[0], shape[1]), min(lengths[1], shape[2]))
    background = Smooth(shape, lengths, model_grid=s.grid)
    low = background(torch.from_numpy(s.log)[None, None, :, None].expand(1, *shape))
    noise = GaussianNoise(float(np.sqrt(sigma**2 + model["model_error"])))
    if model["model_error"] > 0:
        noise = GaussianNoise(sigma, model_error=model["model_error"])
    spread = GaussianNoise(BACKGROUND_SD * (float(np.sqrt(lengths[0] * lengths[1])) if weak else 1.0))
    data = torch.from_numpy(s.data)[None, None]
    return InverseProblem(
        terms=[Term(data, seismic, noise, name="seismic"), Term(low, background, spread, name="background")],
        prior=prior,
    )


def generated(s: Survey) -> Tensor:
    """Windows `(64, 1, nt, nx)` of the generator at the window's depth, one row or column a sample."""
    full = GeologySections()
    nt, nx = s.grid.shape
    top = min(int(s.grid.origin[0] * HALF_VELOCITY / full.spacing[0]), full.shape[0] - nt)
    left = (full.shape[1] - nx) // 2
    windows = [full.sample(1, seed=SEED, start=i)[0, :, top : top + nt, left : left + nx] for i in range(GENERATED)]
    return torch.from_numpy(np.stack(windows)).double()


def learned_prior(s: Survey, checkpoint: str | None, shift: float) -> DiffusionPrior:
    """The geology prior on this grid, read sample for sample, with its level moved by −shift."""
    prior = DiffusionPrior.load(checkpoint) if checkpoint else pretrained.load("geology")
    depth = torch.from_numpy(s.grid.coordinates("t") * HALF_VELOCITY)
    moved = prior.at(s.grid.shape, grid=s.grid, depth=depth)
    moved.transform = Affine(float(prior.transform.shift) - shift, float(prior.transform.scale))
    moved.precision = torch.bfloat16
    return moved


def score(s: Survey, p: InverseProblem, samples: Tensor) -> dict[str, float]:
    """Figures at the well and chi² per datum, from samples `(n, nt, nx)` of ln AI."""
    column = samples[:, :, s.column].double().numpy()
    mean = column.mean(0)
    smooth = p.terms[1].operator

    def detrended(v: Array) -> Array:
        field = torch.from_numpy(v)[None, None, :, None].expand(1, *s.grid.field_shape)
        return v - smooth(field)[0, 0, :, s.column].numpy()

    def inside(v: Array) -> float:
        return float(((v >= column.min(0)) & (v <= column.max(0))).mean())

    seismic = p.terms[0]
    predicted = seismic.operator(samples[:, None].double())
    variance = float(seismic.noise.covariance(seismic.operator.data_shape).diagonal().double().mean())
    chi2 = float((seismic.data - predicted).square().mean() / variance)
    return {
        "correlation": float(np.corrcoef(mean, s.log)[0, 1]),
        "correlation_detrended": float(np.corrcoef(detrended(mean), detrended(s.log))[0, 1]),
        "correlation_80hz": float(np.corrcoef(detrended(mean), detrended(s.smooth_log))[0, 1]),
        "coverage": inside(s.log),
        "coverage_80hz": inside(s.smooth_log),
        "band": float(np.median(np.exp(column.max(0)) - np.exp(column.min(0)))),
        "rms_ai": float(np.sqrt(np.mean((np.exp(column).mean(0) - np.exp(s.log)) ** 2))),
        "rms_ai_80hz": float(np.sqrt(np.mean((np.exp(column).mean(0) - np.exp(s.smooth_log)) ** 2))),
        "chi2": chi2,
    }


def run(s: Survey, args: argparse.Namespace, sigma: float, models: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Both priors under both noise models: name -> samples `(n, nt, nx)`, figures, problem, seconds."""
    windows = generated(s)
    gaussian = GaussianPrior.fit(windows, structure="stationary", mean="rows")
    shift = float(windows.mean()) - float(problem(s, gaussian, models["random noise"], sigma).terms[1].data.mean())
    print(
        f"level: generated sections at these depths average ln AI {float(windows.mean()):.3f} (density 2 g/cc), the "
        f"background {float(windows.mean()) - shift:.3f}; both priors are moved by c = −{shift:.3f}"
    )
    gaussian = GaussianPrior(gaussian.mean_u - shift, gaussian.covariance_u, grid=s.grid)
    learned = learned_prior(s, args.checkpoint, shift)
    solver = PnPDM(iterations=args.iterations, inner=args.inner, rho_min=0.01)
    out: dict[str, Any] = {}
    for kind, model in models.items():
        for name, prior, how, dtype in (
            ("learned", learned, solver, torch.float32),
            ("Gaussian", gaussian, ExactGaussian(method="cg", rtol=1e-5), torch.float64),
        ):
            p = problem(s, prior, model, sigma, args.weak_background)
            began = time.perf_counter()
            posterior = how.solve(p, args.samples, seed=args.seed, dtype=dtype)
            samples = posterior.samples[0, 0, :, 0]
            out[f"{name}, {kind}"] = {
                "samples": samples,
                "problem": p,
                "figures": score(s, p, samples) | {"seconds": time.perf_counter() - began},
            }
            print(f"done: {name}, {kind}, {time.perf_counter() - began:.0f} s", flush=True)
    return out


def background_alone(s: Survey, results: dict[str, Any]) -> dict[str, float]:
    """Correlation and RMS error of the smoothed log itself, which every run is given."""
    low = next(iter(results.values()))["problem"].terms[1].data[0, 0, :, s.column].numpy()
    error = float(np.sqrt(np.mean((np.exp(low) - np.exp(s.log)) ** 2)))
    return {"correlation": float(np.corrcoef(low, s.log)[0, 1]), "rms_ai": error}


def table(results: dict[str, Any], s: Survey) -> None:
    """The figures, one line a run."""
    alone = background_alone(s, results)
    print(
        f"\nat trace {WELL} the background alone correlates {alone['correlation']:.2f} with the log, RMS error "
        f"{alone['rms_ai']:.0f}: what an inversion must beat"
    )
    print(
        "correlation with the log: raw, trend removed, trend removed and log below 80 Hz; coverage of the log, raw and"
    )
    print("below 80 Hz, by the min-max band (19 samples: nominal 0.90); median width of it and RMS error in m/s·g/cc")
    head = ("corr", "detr.", "80 Hz", "cover", "80 Hz", "width", "RMS", "RMS80", "chi2", "s")
    print(f"{'':26}" + "".join(f"{h:>8}" for h in head))
    for name, r in results.items():
        f = list(r["figures"].values())
        digits = (2, 2, 2, 2, 2, 0, 0, 0, 2, 0)
        print(f"{name:26}" + "".join(f"{v:8.{n}f}" for v, n in zip(f, digits, strict=True)))


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = script.parser(__doc__)
    script.add_section(parser, DATA, TIMES)
    parser.add_argument("--full", action="store_true", help="all 468 traces")
    parser.add_argument("--traces", type=int, default=128, help="traces around the well")
    parser.add_argument("--step", type=int, choices=(2, 4), default=2, help="sampling of the unknown in ms")
    parser.add_argument("--weak-background", action="store_true", help="sd 0.08 for a smoothing cell, not a sample")
    parser.add_argument("--inner", type=int, default=4, help="noise levels of a prior step")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if not (args.data / "Sleipner_01_il_57.npy").exists():
        parser.error(f"{args.data} does not hold Sleipner_01_il_57.npy; give the folder of the section with --data.")
    s, found, sigma = survey(args.data, args)
    models = noise_models(found, sigma)
    sd, rho = np.sqrt(found["var_data"]), found["correlation"]
    print(f"window {s.grid.shape} samples x traces, {args.step} ms x {DX} m, well in trace {WELL}")
    print(
        f"tie (mean of traces 141-145): shift {found['shift'] * 2:+d} ms, correlation {rho:.3f}; the other polarity "
        f"reaches {found['worst']:.3f} at {found['worst_shift'] * 2:+d} ms"
    )
    print(f"random noise (neighbouring traces): sd {sigma:.4f}, {sigma / sd:.0%} of the data's sd {sd:.3f}")
    print(
        f"wavelet scale: energy {models['random noise']['scale']:.2f}, least squares {found['least_squares']:.2f}, "
        f"with shared blame {models['model error']['scale']:.2f}"
    )
    print(
        f"misfit of the tied synthetic: sd {sd * np.sqrt(max(2 - 2 * rho, 0)):.3f} with the energy scale, "
        f"{sd * np.sqrt(1 - rho**2):.3f} with least squares; model error of the second run: sd "
        f"{np.sqrt(models['model error']['model_error']):.3f}"
    )
    results = run(s, args, sigma, models)
    table(results, s)
    if args.figure:
        import sleipner_figure

        sleipner_figure.draw(args.figure, s, results)
    line = {
        "example": "sleipner",
        "tie": found,
        "noise_sd": sigma,
        "models": models,
        "figures": {name: r["figures"] for name, r in results.items()},
        "background_alone": background_alone(s, results),
        "samples": args.samples,
        "threads": args.threads,
    }
    return script.finish(line)


if __name__ == "__main__":
    main()
