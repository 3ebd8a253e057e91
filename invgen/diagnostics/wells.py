r"""A log that was kept out of the inversion, against the posterior at the well.

- **Coverage**: the share of log samples inside the band between the k-th smallest and the k-th largest of n draws,
  which holds (n + 1 − 2k)/(n + 1) of the truths under a calibrated posterior: 0.9 for the min–max of 19 draws.
- **Correlation** of posterior mean and log, raw and with a trend taken off both: a background alone correlates well.

Samples of a log are not independent: a correlation time of ten samples leaves a tenth of them, and the errors say so
(Bartlett 1946): n/n_eff = 1 + 2 Σ ρ_a(k) ρ_b(k). A log also sees what the field does not hold (finer layers, its own
errors), so that a coverage below the nominal one is no proof by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from invgen._series import inflation
from invgen.diagnostics._arrays import Array, tensor

__all__ = ["BlindWell", "blind_well"]


@dataclass(frozen=True)
class BlindWell:
    """Figures of a blind check.

    Attributes:
        correlation, correlation_error: of posterior mean and log. detrended, detrended_error: the same without the trend
            (NaN where none was given).
        coverage, coverage_error: share of the log inside the band. nominal: what a calibrated posterior has.
        rms: of posterior mean minus log, in units of the field. width: median width of the band.
        samples, draws: points of the log, posterior draws.
    """

    correlation: float
    correlation_error: float
    detrended: float
    detrended_error: float
    coverage: float
    coverage_error: float
    nominal: float
    rms: float
    width: float
    samples: int
    draws: int

    def __str__(self) -> str:
        trend = (
            ""
            if math.isnan(self.detrended)
            else f", without the trend {self.detrended:.2f} ± {self.detrended_error:.2f}"
        )
        return (
            f"blind well, {self.samples} samples: correlation {self.correlation:.2f} ± {self.correlation_error:.2f}{trend}; "
            f"band of {self.draws} draws covers {self.coverage:.2f} ± {self.coverage_error:.2f} (nominal {self.nominal:.2f}), "
            f"median width {self.width:.3g}, rms error {self.rms:.3g}"
        )


def blind_well(samples: Array, log: Array, *, trend: Array | None = None, level: float = 0.9) -> BlindWell:
    """Compare posterior draws at a well with the log.

    Args:
        samples: `(draws, points)`, the field along the well: `WellLog(…)(posterior.samples[0, 0])` flattened, for fields
            `(draws, channels, …)` and one channel.
        log: `(points,)`, upscaled to the field and in its units (ln ρv for ln ρv).
        trend: `(points,)`, what every inversion was given: the background at the well.
        level: of the band, met as nearly as the number of draws allows.

    Returns:
        `BlindWell`.

    Raises:
        ValueError: shapes that do not fit, NaN, fewer than two draws or four points.
    """
    draws = tensor(samples, "The posterior draws").double().cpu().numpy()
    truth = tensor(log, "The log values").double().cpu().numpy().ravel()
    draws = draws.reshape(len(draws), -1)
    if draws.shape[1] != len(truth) or len(draws) < 2 or len(truth) < 4:
        raise ValueError(
            f"A blind check needs draws (draws, points) and a log (points,), at least 2 and 4 of them, got {draws.shape} and {truth.shape}."
        )
    n = len(draws)
    k = min(max(1, round((1 - level) / 2 * (n + 1))), n // 2)
    ordered = np.sort(draws, axis=0)
    low, high = ordered[k - 1], ordered[n - k]
    inside = ((truth >= low) & (truth <= high)).astype(float)
    mean, share = draws.mean(0), float(inside.mean())
    raw, raw_error = _correlation(mean, truth)
    detrended, detrended_error = math.nan, math.nan
    if trend is not None:
        slow = tensor(trend, "The trend values").double().cpu().numpy().ravel()
        if slow.shape != truth.shape:
            raise ValueError(f"The trend has the shape {slow.shape} but the log {truth.shape}.")
        detrended, detrended_error = _correlation(mean - slow, truth - slow)
    nominal = (n + 1 - 2 * k) / (n + 1)
    # at a share of 0 or 1 the indicator has no variance: the nominal one stands in
    spread = share * (1 - share) or nominal * (1 - nominal)
    return BlindWell(
        correlation=raw,
        correlation_error=raw_error,
        detrended=detrended,
        detrended_error=detrended_error,
        coverage=share,
        coverage_error=math.sqrt(
            spread * max(1.0, inflation(inside - inside.mean(), inside - inside.mean())) / len(truth)
        ),
        nominal=nominal,
        rms=float(np.sqrt(np.square(mean - truth).mean())),
        width=float(np.median(high - low)),
        samples=len(truth),
        draws=n,
    )


def _correlation(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """r and its error (1 − r²)/√n_eff; NaN where one is constant."""
    a, b = a - a.mean(), b - b.mean()
    size = math.sqrt(float(a @ a) * float(b @ b))
    if not size > 0:
        return math.nan, math.nan
    r = float(a @ b) / size
    return r, (1 - r**2) * math.sqrt(max(1.0, inflation(a, b)) / len(a))
