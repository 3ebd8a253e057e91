r"""Velocities of nine layers from one plane-wave gather: an amortised posterior, and what an exact one says of it.

    python examples/nine_layers.py --figure nine_layers.png          (80 CPU seconds)

The problem of Röth and Tarantola (1994): eight layers of 200 m above a half-space, constant density, the velocities
v_1 … v_9 unknown. Theirs is a shot gather of 20 offsets; here it is slant-stacked, because in ray parameter p the
layered medium has an exact answer with all internal multiples. With the vertical slowness q_j = √(1/v_j² (1 − i/Q) − p²)
and time running as e^{iωt},

    r_j = (q_j − q_{j+1})/(q_j + q_{j+1}),        E_j = exp(−2 i ω q_j h),
    R_j = (r_j + R_{j+1} E_{j+1})/(1 + r_j R_{j+1} E_{j+1}),  R_8 = r_8,        d(t, p) = F⁻¹[W(ω) E_1 R_1](t) + n

(Kennett 1983, chapter 6, without the free surface). W is a Ricker wavelet of 6 Hz, ω runs along ω − iα, which damps what
would wrap around, and n is white. Prior: a random walk of ln v downwards, 9 ± 7 % a layer from 1500 m/s ± 5 %. Theirs is
190 m/s a layer, ± 380 m/s uniform: a third wider, and negative velocities not excluded.

    NPE             a normalizing flow q(v | d) learnt from simulations, for every gather at once
    SMC             annealed sequential Monte Carlo from the prior, with the likelihood, for this gather: the reference.
                    It is independent of the network, and finds cycle-skipped modes that a chain may miss
    NPE, weighted   importance weights p(d | v) p(v)/q(v | d); k̂ above 0.7 says that the weights cannot be trusted
    conformal       the intervals of NPE, widened by a factor found on other simulations until they cover

For data of your own: `LayeredResponse` takes thickness, sampling, ray parameters and wavelet frequency; give the
measured gather to `amortized(d)`, and look at its p-value before its posterior. Real data need their wavelet, and a
noise model that is not white (`GaussianNoise(covariance=...)`).

Measured, for the gather of the figure: the standard deviation of a velocity is 2.7 % by SMC and 5.4 % by NPE, whose means
are off by 0.8 of the exact ones: the upper three layers agree, the deep ones are blunt. Weights (k̂ = 0.77, 2 % of the draws
effective) mend it to within their Monte-Carlo error, though k̂ says not to rely on that:
`amortized.refine(..., method="chains")` is next. Over 200 gathers the ranks of all nine velocities and TARP are as
they should be, and 90 % intervals cover 0.88: marginally honest, and yet not the posterior. What tells is the rank of log p(d | v):
the truth fits the data better than nearly all draws. Where a likelihood is at hand, look at it.

Weak: depths are known, density is constant, there are no shear waves and no free surface. 150,000 gathers and a small network
are few for arrivals that wander over a period and more; conformal intervals cover, around the same blunt answer. SMC with 384
particles (66 ancestors) has Monte-Carlo errors of 0.1 sd itself.

References: Röth & Tarantola, Neural networks and inversion of seismic data, JGR 99(B4), 6753-6768, 1994; Kennett,
Seismic wave propagation in stratified media, Cambridge 1983.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from typing import Any

import script
import torch
from agreement import agreement, beside, covered
from torch import Tensor, nn

from invgen.contracts import Operator
from invgen.diagnostics import calibrate, conformal_intervals
from invgen.noise import GaussianNoise
from invgen.posterior import Posterior
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem
from invgen.solvers import NPE, AnnealedSMC
from invgen.transforms import Exp

LAYERS, THICKNESS = 9, 200.0  # the last one is the half-space; m
SAMPLES, DT = 128, 0.016  # of a trace, s
SLOWNESS = (0.0, 0.08e-3, 0.16e-3)  # ray parameters in s/m: vertical, and 14 and 29 degrees at 3 km/s
PEAK, QUALITY = 6.0, 100.0  # Hz; attenuation keeps the critical angle smooth
NOISE = 0.05  # where the peak of the wavelet is one: about as strong as the reflections, in 384 data
SEED = 4  # of the truth
SIMULATIONS, EPOCHS = 5120, 30  # simulations of an epoch
NAMES = tuple(f"v{j + 1}" for j in range(LAYERS))


class LayeredResponse(Operator):
    """Plane-wave response of a stack of acoustic layers: velocities `(n, layers)` in m/s to traces `(n, p, samples)`.

    Args:
        layers: the half-space included. thickness: of each, m. samples, dt: of a trace, s. slowness: ray parameters in s/m.
        peak: of the Ricker wavelet, Hz; its largest value is one. quality: Q of all layers.

    What arrives after 1.5 trace lengths wraps around, damped by e^(−5). Cost: 0.1 ms an item, gradients three times that.
    """

    def __init__(
        self,
        layers: int = LAYERS,
        thickness: float = THICKNESS,
        samples: int = SAMPLES,
        dt: float = DT,
        slowness: Sequence[float] = SLOWNESS,
        peak: float = PEAK,
        quality: float = QUALITY,
    ) -> None:
        super().__init__((layers,), (len(slowness), samples))
        self.thickness, self.quality, self.samples, self.period = thickness, quality, samples, samples + samples // 2
        frequency = torch.fft.rfftfreq(self.period, dt, dtype=torch.float64)
        frequency = frequency[frequency < 3.2 * peak]  # the wavelet's spectrum has fallen to 4e-4 of its peak
        alpha = 5 / (self.period * dt)
        omega = torch.complex(2 * math.pi * frequency, torch.full_like(frequency, -alpha))
        square = (omega / (2 * math.pi * peak)) ** 2
        # ∫ (f/f_p)² exp(−(f/f_p)²) df = f_p √π/2, both signs of f: over it, the wavelet's largest value is one
        ricker = square * torch.exp(-square) * 2 / (math.sqrt(math.pi) * peak * dt)
        for name, value in (
            ("omega", omega),
            ("wavelet", ricker),
            ("gain", torch.exp(alpha * dt * torch.arange(samples, dtype=torch.float64))),
            ("square", torch.tensor(slowness, dtype=torch.float64).square()),
        ):
            self.register_buffer(name, value, persistent=False)

    def vertical(self, v: Tensor) -> Tensor:
        """q_j of each ray parameter, `(n, p, layers)`, complex."""
        slow = v[:, None, :].reciprocal().square()
        square: Any = self.square
        return torch.sqrt(
            torch.complex(slow - square.to(v)[:, None], (-slow / self.quality).expand(-1, len(square), -1))
        )

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        q = self.vertical(x)
        omega, wavelet, gain = (b.to(q) for b in (self.omega, self.wavelet, self.gain))  # type: ignore[operator]
        r = (q[..., :-1] - q[..., 1:]) / (q[..., :-1] + q[..., 1:])
        E = torch.exp(-2j * self.thickness * q[..., :-1, None] * omega)
        R = r[..., -1, None].expand(*r.shape[:-1], len(omega))
        for j in range(r.shape[-1] - 2, -1, -1):
            below = R * E[..., j + 1, :]
            R = (r[..., j, None] + below) / (1 + r[..., j, None] * below)
        traces = torch.fft.irfft(wavelet * R * E[..., 0, :], self.period)[..., : self.samples]
        return traces * gain.real


class Traces(nn.Module):
    """Data `(n, p, samples)` to 32 numbers: a small convolutional network, a module of one's own as embedding."""

    def __init__(self, channels: int, width: int = 32) -> None:
        super().__init__()
        sizes = ((channels, 24, 9, 4), (24, 32, 5, 2), (32, 32, 5, 2))
        convolutions = [m for a, b, k, s in sizes for m in (nn.Conv1d(a, b, k, s, padding=k // 2), nn.SiLU())]
        flat = 32 * math.ceil(SAMPLES / 16)
        self.layers = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(flat, 128), nn.SiLU(), nn.Linear(128, width))

    def forward(self, d: Tensor) -> Tensor:
        return self.layers(d)


def velocity_prior(layers: int = LAYERS) -> GaussianPrior:
    """v = exp(u) in m/s, u a random walk downwards."""
    j = torch.arange(layers, dtype=torch.float64)
    covariance = 0.05**2 + 0.07**2 * torch.minimum(j[:, None], j[None, :])
    return GaussianPrior.dense(math.log(1500.0) + 0.09 * j, covariance, transform=Exp())


def intervals(samples: Tensor) -> tuple[Tensor, Tensor]:
    """5 and 95 % quantiles of draws `(n_obs, draws, dim)`."""
    return samples.quantile(0.05, dim=1), samples.quantile(0.95, dim=1)


def resampled(posterior: Posterior, seed: int = 0) -> Tensor:
    """As many draws as there are, `(n, dim)`, drawn by weight."""
    assert posterior.weights is not None
    w = posterior.weights[0, 0].double()
    rows = torch.multinomial(w, len(w), replacement=True, generator=torch.Generator().manual_seed(seed))
    return posterior.samples[0, 0][rows]


def draw(
    path: str,
    truth: Tensor,
    d: Tensor,
    found: dict[str, Tensor],
    band: tuple[Tensor, Tensor],
    predicted: Tensor,
    calibration: Any,
    shares: dict[str, Tensor],
    tested: int,
) -> None:
    """Profile, gather, ranks and coverage on one page, the corner of four layers on another."""
    import plots

    from invgen.report import corner_plot

    depth = torch.arange(LAYERS + 1) * THICKNESS
    figure, axes = plots.page(2, 3, height=4.6, title="nine layers from one plane-wave gather")

    def stairs(axis: Any, values: Tensor, **style: Any) -> None:
        axis.plot(values.repeat_interleave(2), depth.repeat_interleave(2)[1:-1], **style)

    profile = axes[0, 0]
    shown = zip(found.items(), (plots.MEAN, plots.OTHER), strict=False)
    for (name, draws), colour in shown:
        low, high = (draws.quantile(p, dim=0).repeat_interleave(2) for p in (0.05, 0.95))
        profile.fill_betweenx(depth.repeat_interleave(2)[1:-1], low, high, color=colour, alpha=0.3, lw=0)
        stairs(profile, draws.mean(0), color=colour, lw=1.4, label=f"{name}: mean, 5-95 %")
    for end, label in ((band[0], "conformal 90 %"), (band[1], None)):
        stairs(profile, end, color=plots.MEAN, lw=0.9, ls="--", label=label)
    stairs(profile, truth, color="black", lw=1.6, label="truth")
    profile.set(xlabel="velocity (m/s)", ylabel="depth (m)", ylim=(depth[-1], 0), title="velocities")
    profile.legend(fontsize=8)

    gather, t = axes[0, 1], torch.arange(SAMPLES) * DT
    for k, p in enumerate(SLOWNESS):
        shift = 0.45 * k
        low, high = predicted[:, k].quantile(0.05, dim=0), predicted[:, k].quantile(0.95, dim=0)
        gather.plot(d[k] + shift, t, color="0.6", lw=0.8)
        gather.fill_betweenx(t, low + shift, high + shift, color=plots.MEAN, alpha=0.6, lw=0)
        gather.annotate(f"p = {1e3 * p:.2f} s/km", (shift, -0.04), ha="center", fontsize=8)
    gather.set(xlabel="amplitude (peak of the wavelet = 1)", ylabel="time (s)", ylim=(float(t[-1]), -0.12))
    gather.set_title("data (grey), NPE's predictions 5-95 % (blue)")
    calibration.plot([axes[1, 0], axes[1, 1]])

    cover = axes[1, 2]
    for (name, share), colour in zip(shares.items(), (plots.OTHER, plots.MEAN), strict=True):
        cover.plot(range(1, LAYERS + 1), share, "o-", color=colour, label=name)
    error = 2 * math.sqrt(0.09 / tested)
    cover.axhspan(0.9 - error, 0.9 + error, color="0.85", lw=0, label="0.90 ± 2 standard errors")
    cover.set(xlabel="layer", ylabel="share of true velocities", ylim=(0.7, 1.0), title="coverage of 90 % intervals")
    cover.legend(fontsize=8)
    residual = (d - predicted) / NOISE
    plots.histogram(axes[0, 2], {"data − prediction of a draw": residual.numpy()}, title="residuals in noise sd")
    plots.save(figure, path)
    some = [0, 2, 5, 8]
    figure = corner_plot(
        {name: draws[:, some].numpy() for name, draws in found.items()},
        names=[f"{NAMES[j]} (m/s)" for j in some],
        truth=truth[some].numpy(),
    )
    plots.save(figure, beside(path, "corner"))


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = script.parser(__doc__, samples=2000, fast="few simulations in seconds, to see that it runs")
    args = parser.parse_args(argv)
    count, epochs, particles, moves, tested = (400, 2, 40, 1, 30) if args.fast else (SIMULATIONS, EPOCHS, 384, 5, 200)
    samples = 200 if args.fast else args.samples
    times: dict[str, float] = {}
    began = time.process_time()

    def lap(name: str) -> None:
        nonlocal began
        times[name], began = time.process_time() - began, time.process_time()

    operator = LayeredResponse()
    problem = InverseProblem(torch.zeros(operator.data_shape), operator, GaussianNoise(NOISE), velocity_prior())
    # new simulations every epoch: no noise is seen twice, and none is learnt by heart
    estimator = NPE(
        fresh=True, members=1, layers=3, batch_size=128, epochs=epochs, embedding=Traces(operator.data_shape[0])
    )
    amortized = estimator.fit(problem, count, seed=0)
    lap("train")

    x, _, (data,) = problem.simulate(1, seed=SEED)
    truth, observed = x[0].double(), problem.with_data(data[0])
    _, p_value = amortized.typicality(data[0])
    posterior = amortized.solve(observed, samples, seed=2)
    lap("draw")
    exact = AnnealedSMC(particles=particles, explorer="hmc", moves=moves).solve(observed, particles, seed=3)
    lap("SMC")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # k̂ is printed
        weighted = amortized.refine(observed, posterior, method="importance")
    assert weighted.weights is not None
    lap("weights")

    npe, reference = posterior.samples[0, 0].double(), exact.samples[0, 0].double()
    ess = float(exact.stats["ancestors"].flatten()[0])
    effective = float(1 / weighted.weights.double().square().sum())
    figures = {
        "NPE": agreement(npe, reference, ess=ess),
        "NPE, weighted": agreement(resampled(weighted), reference, ess=ess, own=effective),
    }
    figures["NPE, weighted"] |= {
        "khat": float(weighted.stats["khat"].flatten()[0]),
        "ess_share": effective / samples,
    }
    residuals = {"NPE": npe, "SMC": reference}
    for name, draws in residuals.items():
        r = (data[0].double() - operator(draws)) / NOISE
        figures.setdefault(name, {})["chi2"] = float(r.square().mean())
        figures[name]["sd_percent"] = 100 * float(draws.log().std(0).mean())

    calibration = calibrate(problem, amortized, tested, 99, seed=5)
    lap("calibrate")
    # one half of these gathers sets the factor, the other counts
    v, _, (d,) = problem.simulate(2 * tested, seed=6)
    draws = amortized.solve(problem.with_data(d), 99, seed=7).samples[:, 0]
    conformal = conformal_intervals(v[:tested], draws[:tested], 0.9)
    raw, wider = intervals(draws[tested:]), conformal(draws[tested:])
    per_layer = {
        name: ((v[tested:] >= low) & (v[tested:] <= high)).double().mean(0)
        for name, (low, high) in (("NPE", raw), ("conformal", wider))
    }
    figures["NPE"]["coverage"] = covered(v[tested:], *raw)
    figures["conformal"] = {"coverage": covered(v[tested:], *wider), "factor": float(conformal.factor.mean())}
    lap("conformal")

    print(
        f"{count * epochs} simulations, held-out loss {amortized.history['held_out_loss'][0]:.2f}; this gather has p = {float(p_value):.2f}"
    )
    print(f"{'against SMC':16}{'mean error':>11}{'worst mean':>11}{'sd ratio':>9}   in posterior sd")
    for name in ("NPE", "NPE, weighted"):
        f = figures[name]
        print(f"{name:16}{f['mean_error']:11.2f}{f['worst_mean']:11.2f}{f['sd_ratio']:9.2f}")
    f = figures["NPE, weighted"]
    print(
        f"weights: k̂ = {f['khat']:.2f}, {100 * f['ess_share']:.1f} % of the draws effective; SMC: {ess:.0f} ancestors"
    )
    print(f"chi2 per datum: NPE {figures['NPE']['chi2']:.3f}, SMC {figures['SMC']['chi2']:.3f}")
    print(str(calibration).splitlines()[0])
    f = figures["conformal"]
    print(
        f"90 % intervals cover {figures['NPE']['coverage']:.3f}, conformal ones {f['coverage']:.3f} (factor {f['factor']:.2f})"
    )
    print("CPU seconds: " + ", ".join(f"{k} {v:.1f}" for k, v in times.items()))
    if args.figure:
        low, high = conformal(npe[None].to(draws))
        found = {"NPE": npe, "SMC": reference}
        predicted = operator(npe[:200])
        draw(args.figure, truth, data[0].double(), found, (low[0], high[0]), predicted, calibration, per_layer, tested)
    line = {
        "example": "nine_layers",
        "figures": figures,
        "sbc_p": calibration.p_value,
        "p_value": float(p_value),
        "held_out_loss": amortized.history["held_out_loss"][0],
        "simulations": count * epochs,
        "cpu_seconds": times,
    }
    return script.finish(line)


if __name__ == "__main__":
    main()
