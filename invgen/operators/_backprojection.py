"""Filtered back-projection's two ingredients: the ramp filter on a sampled detector, and the share of each view."""

from __future__ import annotations

import math

import torch
from scipy.fft import next_fast_len
from torch import Tensor

__all__: list[str] = []

WINDOWS = ("ramp", "shepp-logan", "cosine", "hann")


def ramp_filtered(d: Tensor, width: float, window: str) -> Tensor:
    """h ∗ d along the last axis, with the band-limited ramp of samples `width` apart.

    h is transformed from its samples, h(0) = 1/(4 w²), h(n w) = −1/(π n w)² at odd n: the ramp sampled in frequency would
    lose the mean (Kak & Slaney 1988, equation 3.61).
    """
    if window not in WINDOWS:
        raise ValueError(f"window must be one of {', '.join(WINDOWS)}, got {window!r}.")
    n = d.shape[-1]
    padded = next_fast_len(2 * n, real=True)
    k = torch.arange(padded, dtype=torch.float64)
    distance = torch.minimum(k, padded - k)
    odd = distance.long() % 2 == 1
    h = torch.where(odd, -1 / (math.pi * distance.clamp_min(1) * width).square(), torch.zeros_like(k))
    h[0] = 1 / (4 * width**2)
    gain = torch.fft.rfft(h).real * width
    frequency = torch.arange(len(gain), dtype=torch.float64) / padded  # in cycles a sample, at most one half
    if window == "shepp-logan":
        gain = gain * torch.special.sinc(frequency)
    elif window == "cosine":
        gain = gain * torch.cos(math.pi * frequency)
    elif window == "hann":
        gain = gain * torch.cos(math.pi * frequency).square()
    gain = gain.to(d.real)

    def real(v: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(v, n=padded) * gain, n=padded)[..., :n]

    return torch.complex(real(d.real), real(d.imag)) if d.is_complex() else real(d)


def view_weights(angles: Tensor, turn: float) -> Tensor:
    """Δθ of each view: half the gaps to its neighbours on a circle of this circumference, `(views,)`.

    Gaps wider than four times the median are taken for not measured and count as the median.
    """
    order = torch.argsort(torch.remainder(angles, turn))
    placed = torch.remainder(angles, turn)[order]
    gaps = torch.cat([placed[1:], placed[:1] + turn]) - placed  # from each view to the next
    usual = gaps.median()
    gaps = torch.where(gaps > 4 * usual.clamp_min(1e-12), usual, gaps) if len(gaps) > 2 else gaps
    weights = torch.empty_like(gaps)
    weights[order] = (gaps + gaps.roll(1)) / 2
    return weights
