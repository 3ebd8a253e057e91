r"""Wavelets from data: the statistical one, and the one that ties a well log to a trace.

The model of a trace is d = w * r + n with the reflectivity r = ½ D ln(ρv) of `PostStack` (centred differences, zero in
the first and last sample): a wavelet w found here enters as `PostStack(w / 2, …)`.

**Statistical.** For white reflectivity of variance σ_r² the power spectrum of the trace is σ_r² |W|² plus that of the
noise: |W(f)| is known, its phase is not and is taken to be zero, and neither is its scale without σ_r.

**Well tie.** With the log's reflectivity in the columns of G, shifted by s samples,

    ŵ(s) = argmin |d − G_s w|² + λ g₀ Σ_k (k/L)² w_k² + μ g₀ |D² w|²,      g₀ = tr G₀ᵀG₀ / n_w,

the first penalty holding the wavelet near time zero (without it a shift of the log and one of the wavelet cannot be told
apart), the second keeping it smooth. The shift is the one with the smallest penalised misfit.

**Scale.** For the synthetic s = G ŵ of a wavelet, a = ⟨d, s⟩/⟨s, s⟩ with Var a = sᵀ R s/⟨s, s⟩², R the covariance of the
residual, which is coloured: its standard error is √(1 + 2 Σ ρ_e ρ_s) times that of white residuals. An erroneous log
lowers a (errors in variables: by 1/(1 + σ_e²/σ_r²) for independent errors), which no standard error shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from invgen._series import inflation

__all__ = ["WellTie", "reflectivity", "statistical_wavelet", "well_tie"]

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class WellTie:
    """A log tied to a trace.

    Attributes:
        wavelet: `(n_w,)`, estimated (or the given one, unscaled), its middle at time zero.
        shift: samples by which the log moves to later times.
        correlation: of trace and synthetic over the rows used. scale: a of the trace over the synthetic.
        scale_error: its standard error, residuals coloured. residual_sd: sd of d − a s.
        samples: rows used. shifts, misfit: the shifts tried and the misfit (or 1 − ρ) of each, for the figure.
    """

    wavelet: Array
    shift: int
    correlation: float
    scale: float
    scale_error: float
    residual_sd: float
    samples: int
    shifts: Array
    misfit: Array

    def scale_prior(self, *, relative_error: float | None = None) -> Any:
        """A log-normal prior of `wavelet_scale` for `InverseProblem(nuisance={"wavelet_scale": …})`.

        log a ~ N(log â, (se(â)/â)²), the law of a positive number known to a relative error.

        Args:
            relative_error: instead of se/â, where the log itself is in doubt.

        Raises:
            ValueError: a scale that is not positive: the log or the wavelet has the other polarity.
        """
        from invgen.priors import GaussianPrior
        from invgen.transforms import Exp

        if not self.scale > 0:
            raise ValueError(
                f"The tie has the scale {self.scale:.3g} (correlation {self.correlation:.2f}): no prior on positive scales fits it; check polarity and shift."
            )
        spread = self.scale_error / self.scale if relative_error is None else float(relative_error)
        return GaussianPrior(math.log(self.scale), spread**2, shape=(1,), transform=Exp())


def reflectivity(log_impedance: Any) -> Array:
    """½ D ln(ρv), `(n,)`: centred differences with zero first and last sample, as `PostStack(w / 2, …)` has them."""
    m = np.asarray(log_impedance, dtype=np.float64)
    r = np.zeros_like(m)
    r[1:-1] = (m[2:] - m[:-2]) / 4
    return r


def statistical_wavelet(
    section: Any,
    length: int,
    *,
    correlation_length: int | None = None,
    reflectivity_sd: float = 1.0,
    noise: Any = None,
    taper: float = 0.2,
) -> Array:
    r"""Zero-phase wavelet from the mean autocorrelation of traces: |W(f)|² = FT[v(k) (ĉ(k) − ĉ_n(k))] / σ_r².

    v is a Hann window of `correlation_length` lags, which smooths the spectrum (a spectrum of white reflectivity is
    as rough as the reflectivity). Negative values of the spectrum are set to zero.

    Bias: the reflectivity of logs is blue, so that low frequencies come out weak; noise that is not taken off comes out
    as wavelet; the window widens narrow spectra, which shortens the wavelet; the taper of its ends does as well.

    Args:
        section: `(n_t, n_x)` or `(n_t,)`. length: samples of the wavelet, odd.
        correlation_length: lags on each side that are kept, (length − 1) when omitted: a wavelet of n_w samples has an
            autocorrelation of n_w − 1 lags.
        reflectivity_sd: σ_r of ½ D ln(ρv), from a log; with 1 the scale is arbitrary.
        noise: autocovariance of the noise `(lags,)`, as `autocovariance` of a noise window gives it.
        taper: share of each half of the wavelet that a cosine brings to zero.

    Returns:
        `(length,)`, symmetric, the middle at time zero, in the units of the data over those of r.

    Raises:
        ValueError: an even length or one longer than the traces, values that are not finite, no power left.
    """
    d = np.asarray(section, dtype=np.float64)
    d = d[:, None] if d.ndim == 1 else d
    lags = correlation_length or length - 1
    if length < 3 or length % 2 == 0 or max(length, lags + 1) > d.shape[0]:
        raise ValueError(
            f"A wavelet needs an odd length of at least 3 and at most the {d.shape[0]} samples of a trace, got {length} (and {lags} lags)."
        )
    if not np.isfinite(d).all():
        raise ValueError("The section holds values that are not finite; leave dead traces out first.")
    n = d.shape[0]
    c = np.array([(d[k:] * d[: n - k]).sum(0).mean() / (n - k) for k in range(lags + 1)])
    if noise is not None:
        removed = np.asarray(noise, dtype=np.float64)[: lags + 1]
        c[: len(removed)] -= removed
    c *= 0.5 * (1 + np.cos(np.pi * np.arange(lags + 1) / (lags + 1)))
    size = 4 * (lags + length)
    circular = np.zeros(size)
    circular[: lags + 1] = c
    circular[-lags:] = c[:0:-1]
    power = np.fft.rfft(circular).real.clip(0)
    if not power.max() > 0:
        raise ValueError("No power is left once the noise is taken off; check the noise window and its units.")
    half = length // 2
    w = np.roll(np.fft.irfft(np.sqrt(power), size), half)[:length] / reflectivity_sd
    return w * _taper(length, taper)


def _taper(length: int, share: float) -> Array:
    """1 in the middle, a cosine to (nearly) 0 over the outer share of each half."""
    k = np.abs(np.arange(length) - length // 2) / (length // 2 + 1)
    return np.where(k <= 1 - share, 1.0, 0.5 * (1 + np.cos(np.pi * (k - 1 + share) / max(share, 1e-12))))


def well_tie(
    trace: Any,
    log_impedance: Any,
    *,
    length: int = 41,
    max_shift: int = 20,
    first_sample: int = 0,
    wavelet: Any = None,
    centring: float = 0.1,
    smoothness: float = 0.1,
) -> WellTie:
    """Tie a log to the trace at the well: shift, wavelet and scale by penalised least squares (see the module).

    Args:
        trace: `(n_t,)`, the traces around the well averaged. log_impedance: ln(ρv) `(n_log,)` at the same sampling.
        length: samples of the wavelet, odd. max_shift: the log is tried at −max_shift … max_shift.
        first_sample: sample of the trace where the unshifted log begins.
        wavelet: tie with this wavelet (odd length) by the largest correlation, instead of estimating one.
        centring, smoothness: λ and μ, relative to the mean diagonal of G₀ᵀG₀.

    Returns:
        `WellTie`. Only rows whose whole wavelet lies inside the log at every shift are used.

    Raises:
        ValueError: a log outside the section, too short for the wavelet, values that are not finite, even lengths.

    Bias: the penalties shrink the wavelet (by about λ + μ over the signal-to-noise of the tie); the correlation of an
    estimated wavelet is too high by the n_w numbers that were fitted (about n_w/n for pure noise).
    """
    d, m = np.asarray(trace, dtype=np.float64), np.asarray(log_impedance, dtype=np.float64)
    if d.ndim != 1 or m.ndim != 1 or not (np.isfinite(d).all() and np.isfinite(m).all()):
        raise ValueError("Trace and log must be vectors of finite numbers; cut the log where it was not run.")
    given = None if wavelet is None else np.asarray(wavelet, dtype=np.float64)
    n_w = length if given is None else len(given)
    if n_w < 3 or n_w % 2 == 0:
        raise ValueError(f"The wavelet needs an odd number of samples, at least 3, got {n_w}.")
    half = n_w // 2
    r = reflectivity(m)
    # rows of the trace that stay inside the log at every shift: misfits of one and the same data can be compared
    rows = np.arange(1 + half + max_shift, len(m) - 1 - half - max_shift)
    if len(rows) < 2 * n_w:
        raise ValueError(
            f"The log has {len(m)} samples, too few for a wavelet of {n_w} and {max_shift} shifts either way; at least {3 * n_w + 2 * max_shift + 1} are needed."
        )
    if first_sample < 0 or first_sample + len(m) > len(d):
        raise ValueError(
            f"The log, samples {first_sample} to {first_sample + len(m) - 1}, lies outside the trace of {len(d)} samples; cut it to the section."
        )
    if not r.any():
        raise ValueError("The log is constant: it has no reflectivity to tie.")
    shifts = np.arange(-max_shift, max_shift + 1)
    y = d[first_sample + rows]
    designs = [np.stack([r[rows - s - k] for k in range(-half, half + 1)], axis=1) for s in shifts]
    if given is None:
        k, bend = np.arange(-half, half + 1) / half, np.diff(np.eye(n_w), 2, axis=0)
        size = np.square(designs[max_shift]).sum() / n_w
        penalty = size * (centring * np.diag(k**2) + smoothness * bend.T @ bend)
        fits = [np.linalg.solve(G.T @ G + penalty, G.T @ y) for G in designs]
        misfit = np.array([np.square(y - G @ w).sum() + w @ penalty @ w for G, w in zip(designs, fits, strict=True)])
        misfit = misfit / np.square(y).sum()
    else:
        fits = [given] * len(shifts)
        misfit = 1 - np.array([_correlation(G @ given, y) for G in designs])
    best = int(np.argmin(misfit))
    w, G = fits[best], designs[best]
    s = G @ w
    energy = float(s @ s)
    scale = float(s @ y) / energy
    e = y - scale * s
    fitted = 1 if given is not None else n_w
    sd = math.sqrt(float(e @ e) / max(len(e) - fitted, 1))
    error = sd / math.sqrt(energy) * math.sqrt(max(0.1, inflation(e, s)))
    return WellTie(w, int(shifts[best]), _correlation(s, y), scale, error, sd, len(rows), shifts, misfit)


def _correlation(a: Array, b: Array) -> float:
    return float(a @ b / max(math.sqrt(float(a @ a) * float(b @ b)), 1e-300))
