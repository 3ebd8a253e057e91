r"""Seismic wavelets: the Ricker, convolution matrices for wavelets fixed or varying with time, and what can be wrong with one.

A wavelet is `(n_w,)` samples at the interval of the vertical axis; entry ⌊n_w/2⌋ is time zero, as in PyLops. The
convolution of a reflectivity r of n samples is

    d = W r,    (W r)[i] = Σ_j w_j[i − j + ⌊n_w / 2⌋] r[j],

w_j = w for a stationary wavelet. A wavelet that varies with time belongs to the *reflector* j, which sends it out:
columns of W, not rows, are wavelets (the convention of `pylops.signalprocessing.NonStationaryConvolve1D` and of
`pylops.avo.poststack` with a 2-D wavelet).
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch
from torch import Tensor

from invgen.grid import Grid

__all__ = [
    "check_zero_phase",
    "convolution_matrix",
    "interpolate_wavelets",
    "phase_of_wavelet",
    "ricker",
    "rotate_phase",
]

# the share of a wavelet's energy that has to fit into the trace
SUPPORT = 0.99


def ricker(t: Tensor | np.ndarray, f0: float) -> Tensor:
    """The Ricker wavelet (1 − 2a) e^(−a), a = (π f0 t)², at the times t.

    Args:
        t: times, `(n,)`, in s, usually symmetric around 0 with 0 in the middle.
        f0: peak frequency in Hz.

    Returns:
        `(n,)`, 1 at t = 0; float64, or the dtype of a tensor t.
    """
    if not f0 > 0:
        raise ValueError(f"The peak frequency of a Ricker wavelet must be positive, got {f0}.")
    times = torch.as_tensor(t)
    times = times if times.is_floating_point() else times.to(torch.float64)
    a = (torch.pi * f0 * times).square()
    return (1 - 2 * a) * torch.exp(-a)


def convolution_matrix(wavelet: Tensor, n: int) -> Tensor:
    """W with (W r)[i] = Σ_j w_j[i − j + ⌊n_w/2⌋] r[j].

    Args:
        wavelet: `(n_w,)`, or `(n, n_w)` with the wavelet of every reflector j. n: samples of the trace.

    Returns:
        `(n, n)` in the dtype of the wavelet.
    """
    n_w = wavelet.shape[-1]
    lag = torch.arange(n)[:, None] - torch.arange(n)[None, :] + n_w // 2
    inside, lag = (lag >= 0) & (lag < n_w), lag.clamp(0, n_w - 1)
    entries = wavelet[lag] if wavelet.ndim == 1 else wavelet[torch.arange(n)[None, :], lag]
    return torch.where(inside, entries, torch.zeros((), dtype=wavelet.dtype))


def interpolate_wavelets(wavelets: Tensor, at: Tensor | np.ndarray | list[float], n: int) -> Tensor:
    """One wavelet for each of n places from a few, linear between them and the nearest one outside.

        w_j = (1 − h) w(at_k) + h w(at_(k+1)),    h = (j − at_k) / (at_(k+1) − at_k)

    Args:
        wavelets: `(m, n_w)`. at: `(m,)` increasing places in samples, whole numbers or not. n: places 0, 1, …, n − 1.

    Returns:
        `(n, n_w)`; for evenly spaced whole numbers the filters of `pylops.signalprocessing.NonStationaryConvolve1D`.
    """
    return _hats(at, n, len(wavelets)).to(wavelets.dtype) @ wavelets


def _hats(at: Tensor | np.ndarray | list[float], n: int, m: int) -> Tensor:
    """Weights of m nodes at n places, `(n, m)`: hat functions, constant outside; rows sum to one."""
    nodes = np.asarray(at, dtype=np.float64)
    if nodes.shape != (m,) or not np.isfinite(nodes).all() or (np.diff(nodes) <= 0).any():
        raise ValueError(
            f"{m} wavelets need {m} increasing places, got at = {nodes.tolist()}; give one place in samples a wavelet."
        )
    if nodes[0] > n - 1 or nodes[-1] < 0:
        raise ValueError(
            f"The wavelets are given at {nodes[0]:g} to {nodes[-1]:g} samples, the axis has 0 to {n - 1}; "
            "give places in samples, not in s or m."
        )
    return torch.from_numpy(np.stack([np.interp(np.arange(n), nodes, row) for row in np.eye(m)], axis=1))


def check_wavelet(
    wavelet: Tensor | np.ndarray, n: int, *, where: str, dt: float | None = None, grid: Grid | None = None
) -> Tensor:
    """The wavelet as a detached float tensor `(…, n_w)`, after everything that can be wrong with it was asked.

    Args:
        wavelet: `(n_w,)` or `(m, n_w)`. n: samples of the trace. where: who asks, for the messages.
        dt: its sampling interval, in the unit of the grid's vertical axis. grid: of the model.

    Raises:
        ValueError: not real and finite, empty or all zero; longer than the trace (the part that holds 99 % of its
            energy: zeros at the ends do not count); a sampling interval that is not the grid's.
    """
    wavelet = torch.as_tensor(wavelet).detach().cpu()  # matrices are built there, and cast to where they are used
    if wavelet.is_complex() or wavelet.numel() == 0 or not bool(torch.isfinite(wavelet).all()):
        raise ValueError(
            f"{where} needs a real, finite wavelet, got a tensor of shape {tuple(wavelet.shape)} and {wavelet.dtype}; check it for NaN."
        )
    wavelet = wavelet if wavelet.is_floating_point() else wavelet.to(torch.float64)
    if not bool(wavelet.any()):
        raise ValueError(
            f"The wavelet given to {where} is zero everywhere, so there would be no data; check how it was read."
        )
    for one in wavelet.reshape(-1, wavelet.shape[-1]):
        length = _support(one)
        if length > n:
            raise ValueError(
                f"The wavelet is longer than the trace: {SUPPORT:.0%} of its energy take {length} samples of {len(one)}, the trace has {n}; "
                "check its sampling interval, or model a longer window and crop it."
            )
    if dt is not None:
        _check_interval(float(dt), grid, where)
    return wavelet.clone()


def _support(wavelet: Tensor) -> int:
    """Samples left when the ends that hold (1 − SUPPORT)/2 of the energy each are cut off."""
    energy = wavelet.to(torch.float64).square()
    energy = energy / energy.sum().clamp_min(1e-300)
    cut = (1 - SUPPORT) / 2
    before, after = (int((e.cumsum(0) <= cut).sum()) for e in (energy, energy.flip(0)))
    return max(len(wavelet) - before - after, 0)


def _check_interval(dt: float, grid: Grid | None, where: str) -> None:
    if not (math.isfinite(dt) and dt > 0):
        raise ValueError(f"The sampling interval of a wavelet must be positive, got dt = {dt}.")
    if grid is None:
        raise ValueError(f"{where} got dt = {dt:g} for the wavelet but no model_grid to compare it with; give both.")
    step, unit = grid.spacing[0], grid.units[0] or "units of the grid"
    if abs(dt / step - 1) <= 1e-4:
        return
    ratio = dt / step
    if any(abs(ratio * f - 1) < 1e-4 for f in (1e3, 1e-3, 1e6, 1e-6)):
        raise ValueError(
            f"The wavelet is sampled at {dt:g} and the grid at {step:g} {unit}: a factor of {max(ratio, 1 / ratio):g}, "
            "so one of them is in s and the other in ms (or µs); give both in the unit of the grid."
        )
    raise ValueError(
        f"The wavelet is sampled at {dt:g} {unit} but the grid at {step:g} {unit}; resample the wavelet to the grid (or check which one is wrong)."
    )


def rotate_phase(wavelet: Tensor | np.ndarray, degrees: float) -> Tensor:
    """The wavelet with a constant phase added to every frequency, cos φ w − sin φ H w (H: the Hilbert transform).

    Args:
        wavelet: `(n_w,)`, real. degrees: φ; 90 turns a symmetric wavelet into an antisymmetric one, 180 flips its sign.

    Returns:
        `(n_w,)` float64; computed with zeros added at both ends, so that nothing wraps around.
    """
    w = torch.as_tensor(wavelet).to(torch.float64)
    phi = math.radians(float(degrees))
    return math.cos(phi) * w - math.sin(phi) * _hilbert(w)


def _hilbert(w: Tensor, pad: int = 8) -> Tensor:
    n = len(w)
    size = (2 * pad + 1) * n
    spectrum = torch.fft.rfft(torch.nn.functional.pad(w, (pad * n, pad * n)))
    spectrum[0] = 0
    if size % 2 == 0:
        spectrum[-1] = 0
    return torch.fft.irfft(-1j * spectrum, n=size)[pad * n : (pad + 1) * n]


def phase_of_wavelet(wavelet: Tensor | np.ndarray) -> tuple[float, float, float]:
    r"""Constant phase of a wavelet that was measured, its delay, and how well these two explain it.

    With the analytic wavelet a = w + i H w, the delay τ is the peak of its envelope |a| (parabola through the three
    samples around it) and φ its phase there: φ = arg a(τ). A wavelet of constant phase φ is w = rotate_phase(s, φ) with
    a symmetric s; what the rotation back by φ leaves antisymmetric about τ is the misfit

        1 − Σ s_even² / Σ s².

    Args:
        wavelet: `(n_w,)`, real; entry ⌊n_w/2⌋ is time zero.

    Returns:
        phase in degrees, −180 < φ ≤ 180 (0: zero phase; 180: zero phase of the other polarity); delay of the envelope
        in samples after time zero; share of the energy that no constant phase explains, 0 to 1 (a minimum-phase
        wavelet has some, noise about a half).

    References: Levy & Oldenburg 1987, Geophysics 52, 51 (constant phase of a wavelet); Taner, Koehler & Sheriff 1979,
    Geophysics 44, 1041 (envelope and its phase).
    """
    w = torch.as_tensor(wavelet).to(torch.float64)
    if w.ndim != 1 or len(w) < 3 or not bool(torch.isfinite(w).all()) or not bool(w.any()):
        raise ValueError(
            f"The phase of a wavelet needs at least 3 finite samples that are not all zero, got a tensor of shape {tuple(w.shape)}."
        )
    n, factor = (
        len(w),
        16,
    )  # sixteen times finer by zeros in the spectrum: the peak of the envelope lies between samples
    pad = 2 * n
    padded = torch.nn.functional.pad(w, (pad, pad))
    size = len(padded)
    spectrum = torch.fft.fft(padded)
    analytic = torch.zeros(size * factor, dtype=spectrum.dtype)
    half = (size - 1) // 2
    analytic[0], analytic[1 : half + 1] = spectrum[0], 2 * spectrum[1 : half + 1]
    a = torch.fft.ifft(analytic) * factor
    k = int(a.abs().argmax())
    phase = math.atan2(float(a[k].imag), float(a[k].real))
    # a symmetric wavelet about k/16: rotate back, reflect about the peak, compare
    s = (a * complex(math.cos(phase), -math.sin(phase))).real
    mirrored = torch.roll(s.flip(0), 2 * k + 1 - len(s))
    odd = 0.5 * (s - mirrored)
    misfit = float(odd.square().sum() / s.square().sum())
    degrees = math.degrees(phase)
    return (180.0 if degrees <= -180.0 else degrees), k / factor - pad - n // 2, misfit


def check_zero_phase(wavelet: Tensor | np.ndarray, *, phase: float = 20.0, delay: float = 0.5) -> bool:
    """Whether a measured wavelet is zero phase; warns with what it is instead.

    Operators convolve with the wavelet they are given, whatever its phase. A *zero-phase* wavelet assumed for data that
    hold another one moves every reflector and bends its impedance: this says so before the inversion does.

    Args:
        wavelet: `(n_w,)`, entry ⌊n_w/2⌋ is time zero.
        phase: the constant phase in degrees that is tolerated. delay: likewise the delay in samples.

    Returns:
        True where it is zero phase, of either polarity. A reversed polarity is warned about too.
    """
    degrees, shift, misfit = phase_of_wavelet(wavelet)
    off = min(abs(degrees), 180 - abs(degrees))
    said = []
    if off > phase:
        said.append(f"it has a constant phase of about {degrees:.0f}°")
    elif abs(degrees) > 90:
        said.append("its polarity is reversed (180°)")
    if abs(shift) > delay:
        said.append(f"its envelope peaks {shift:+.1f} samples from the middle")
    if misfit > 0.1:
        said.append(f"no constant phase explains {misfit:.0%} of its energy (minimum phase, or noise)")
    if said:
        warnings.warn(
            f"The wavelet is not zero phase: {'; '.join(said)}. Use it as measured, or undo it with rotate_phase(wavelet, {-degrees:.0f}) and a shift.",
            stacklevel=2,
        )
    return not (off > phase or abs(shift) > delay or misfit > 0.1)
