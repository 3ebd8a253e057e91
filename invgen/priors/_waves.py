r"""Fields that are Gaussian only in the limit of many terms: random waves, and turning bands.

    spectral        x(u) = √(2 σ²/K) Σ_k cos(ω_k·u + φ_k),     ω_k from the spectral measure, φ_k uniform on [0, 2π)
    turning bands   x(u) = σ/√L Σ_l y_l(θ_l·A u),              y_l independent lines of covariance ρ₁, θ_l on the sphere

Both have the covariance C exactly in the mean over ω (θ); a draw with K terms is a sum of K independent terms, so that its law
differs from the Gaussian one by O(1/K) in the fourth cumulant: kurtosis 3 − 3/(2K) for waves.

On a grid a wave is a product of one factor an axis, cos(a + b) = Re e^{ia} e^{ib}, and the sum over waves a matrix product.

References: Shinozuka & Jan 1972, J. Sound Vib. 25, 111; Matheron 1973, Adv. Appl. Prob. 5, 439; Emery & Lantuéjoul 2006,
Computers & Geosciences 32, 1615 (turning bands).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import scipy.fft
import torch
from torch import Tensor

from invgen.priors._covariance_model import CovarianceModel, smooth_and_nugget

Array = np.ndarray


def generator(seed: int, item: int, channel: int, what: int) -> np.random.Generator:
    """Numbers of one item, whatever the others are."""
    if seed < 0:
        raise ValueError(f"A seed must be a non-negative integer, got {seed}.")
    return np.random.default_rng(np.random.SeedSequence([seed, item, channel, what]))


def waves(model: CovarianceModel, modes: int, dimension: int, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """ω `(K, d)`, φ `(K,)` and amplitudes `(K,)`; every structure has waves in proportion to its variance."""
    parts, _ = smooth_and_nugget(model)
    total = sum(p.variance for p in parts)
    omega, amplitude = [], []
    for part in parts:
        k = max(1, round(modes * part.variance / total))
        omega.append(part.frequencies(rng, k, dimension))
        amplitude.append(np.full(k, math.sqrt(2 * part.variance / k)))
    if not parts:
        return np.zeros((1, dimension)), np.zeros(1), np.zeros(1)
    w = np.concatenate(omega)
    return w, rng.uniform(0, 2 * math.pi, len(w)), np.concatenate(amplitude)


def _powers(step: Array, n: int, first: Array, dtype: torch.dtype) -> Tensor:
    """first · e^{i step j}, j = 0 … n − 1, `(n, K)` complex: doubled, so that rounding grows with log n alone."""
    out = torch.empty(n, len(step), dtype=torch.complex128 if dtype == torch.float64 else torch.complex64)
    out[0] = torch.from_numpy(first)
    m = 1
    while m < n:
        more = min(m, n - m)
        torch.mul(out[:more], torch.from_numpy(np.exp(1j * m * step)).to(out.dtype), out=out[m : m + more])
        m *= 2
    return out


def waves_on_grid(
    model: CovarianceModel,
    spatial: tuple[int, ...],
    spacing: Sequence[float],
    modes: int,
    rng: np.random.Generator,
    dtype: torch.dtype,
) -> Tensor:
    """One field on a grid whose first node is the origin, by matrix products."""
    d = len(spatial)
    omega, phase, amplitude = waves(model, modes, d, rng)
    ones = np.ones(len(phase), dtype=np.complex128)
    first = amplitude * np.exp(1j * phase)
    factors = [_powers(omega[:, i] * spacing[i], n, first if i == 0 else ones, dtype) for i, n in enumerate(spatial)]
    if d == 1:
        return factors[0].real.sum(1)
    last = torch.view_as_real(factors[-1]).flatten(1)
    rows = factors[0]
    if d == 2:
        return torch.view_as_real(rows.conj_physical_()).flatten(1) @ last.mT
    out = torch.empty(spatial, dtype=dtype)
    for z in range(spatial[0]):  # a plane at a time: the product of all rows would be as large as the field times K
        plane = (rows[z] * factors[1]).conj_physical_()
        torch.matmul(torch.view_as_real(plane).flatten(1), last.mT, out=out[z])
    return out


def waves_at(model: CovarianceModel, points: Array, modes: int, rng: np.random.Generator) -> Array:
    """The same field at any points `(m, d)`, relative to the first node."""
    omega, phase, amplitude = waves(model, modes, points.shape[1], rng)
    block = max(1, (1 << 22) // len(phase))
    parts = [np.cos(points[i : i + block] @ omega.T + phase) @ amplitude for i in range(0, len(points), block)]
    return np.concatenate(parts) if parts else np.zeros(0)


class Lines:
    """The bands of one field: directions on the sphere, and a line of values along each.

    Args:
        model: one structure. bands: L. low, high: of the points, `(d,)`, in the unit of the grid. step: of the lines, likewise.
        rng: of the rotation and of the lines.
    """

    def __init__(
        self, model: CovarianceModel, bands: int, low: Array, high: Array, step: float, rng: np.random.Generator
    ) -> None:
        d = len(low)
        if d == 1:
            raise ValueError("Turning bands need two or three axes; a line is simulated by 'circulant'.")
        directions = van_der_corput(bands) @ _random_rotation(rng)
        # a plane is a slice of space: the third coordinate is zero
        self.directions = directions[:, :d] @ model.metric(
            d
        )  # (L, d): from points to places along the line, in lengths
        self.amplitude = math.sqrt(model.variance / bands)
        self.step = step * float(np.linalg.norm(self.directions, axis=1).max()) if bands else step
        ends = np.minimum(self.directions * low, self.directions * high).sum(1)
        tops = np.maximum(self.directions * low, self.directions * high).sum(1)
        self.start = ends
        n = int(np.ceil((tops - ends).max() / self.step)) + 2
        self.values = _line_draws(model, n, self.step, bands, rng)

    def add(self, out: Array, places: Sequence[Array]) -> None:
        """out += the field; `places` broadcast to the shape of out, one array an axis."""
        for theta, start, line in zip(self.directions, self.start, self.values, strict=True):
            t = sum(c / self.step * p for c, p in zip(theta, places, strict=True)) - start / self.step
            out += self.amplitude * line[(t + 0.5).astype(np.int32)]


def _line_draws(model: CovarianceModel, n: int, step: float, bands: int, rng: np.random.Generator) -> Array:
    """`(bands, n)` lines of covariance ρ₁, by circulant embedding (with the line's positive spectrum to start with)."""
    m = 2 * scipy.fft.next_fast_len(n, real=True)
    while True:
        r = np.minimum(np.arange(m), m - np.arange(m)) * step
        power = scipy.fft.rfft(model.line_correlation(r)).real
        weight = np.where((np.arange(len(power)) == 0) | (2 * np.arange(len(power)) == m), 1.0, 2.0)
        if (weight * np.maximum(-power, 0)).sum() / m < 1e-6 or m > 64 * n:
            break
        m = 2 * scipy.fft.next_fast_len(m, real=True)
    root = np.sqrt(np.maximum(power, 0)).astype(np.float32)
    white = rng.standard_normal((bands, m), dtype=np.float32)
    return scipy.fft.irfft(scipy.fft.rfft(white, axis=1) * root, n=m, axis=1)[:, :n]


def van_der_corput(n: int) -> Array:
    """`(n, 3)` directions spread evenly over the half sphere (bases 2 and 3; Freulon & de Fouquet 1991)."""

    def radical(base: int) -> Array:
        out, scale, k = np.zeros(n), 1.0, np.arange(1, n + 1)
        while k.any():
            scale /= base
            out += scale * (k % base)
            k = k // base
        return out

    v, angle = radical(3), 2 * math.pi * radical(2)
    side = np.sqrt(1 - v**2)
    return np.stack([side * np.cos(angle), side * np.sin(angle), v], 1)


def _random_rotation(rng: np.random.Generator) -> Array:
    q, r = np.linalg.qr(rng.standard_normal((3, 3)))
    return q * np.sign(np.diag(r))
