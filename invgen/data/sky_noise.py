r"""Noise that neighbouring pixels share (drizzled and other resampled images), measured on blank sky.

With n the sky over its noise map, 1 where used in the mask m, the correlation at a shift Δ = (Δy, Δx) is the mean over the
pairs there are,

    ρ̂(Δ) = Σ_i m_i m_(i+Δ) n_i n_(i+Δ) / Σ_i m_i m_(i+Δ),      |Δy| ≤ L_y, |Δx| ≤ L_x, and 0 beyond,

unbiased for noise with mean zero whatever the mask. Drizzling mixes a few pixels and has no correlation beyond its
kernel, so that the cut at L is none as soon as L reaches past it (2 or 3 output pixels for most mosaics).

The power spectrum is that of the image's own grid with its ends joined, S = F ρ̂, what is less than a floor
set to it: solves and determinants are then two FFTs. Drizzling removes nearly all noise of the highest frequencies, less
than is estimated there: the floor, like any nugget, is a choice that keeps users from trusting them without limit. Joining the ends is wrong for pixels within L of opposite edges: a
share of 2 L_y/n_y + 2 L_x/n_x of the pixels.

References: Fruchter & Hook (2002), PASP 114, 144 (drizzling and its correlated noise).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from invgen.modulated import Modulated
from invgen.noise import GaussianNoise
from invgen.stationary import Stationary

__all__ = ["drizzled_noise", "sky_correlation"]


def sky_correlation(sky: Any, sd: Any = 1.0, *, mask: Any = None, lags: int | tuple[int, int] = 3) -> Tensor:
    """ρ̂ at the shifts −L … L of blank sky, a mean over pairs of used pixels (see the module).

    Args:
        sky: `(ny, nx)`, or `(n, ny, nx)` cut-outs, of noise alone; a constant level is taken off, nothing else.
        sd: noise map: a number or of the shape of sky. mask: boolean like sky, True where used.
        lags: L, one number or (L_y, L_x), in pixels.

    Returns:
        `(2 L_y + 1, 2 L_x + 1)`, float64, even about its middle entry. That entry is the variance of sky/sd: 1 where the
        noise map is right.

    Raises:
        ValueError: used values that are not finite, no pairs at some shift.

    Its standard error at one shift is about √(Σ ρ²/pairs). Taking off the mean costs 1/(independent pixels). Cost: one
    pass a shift.
    """
    v = torch.as_tensor(sky).double()
    v = v[None] if v.ndim == 2 else v
    if v.ndim != 3:
        raise ValueError(f"Sky is an image (ny, nx) or several (n, ny, nx), got the shape {tuple(v.shape)}.")
    used = torch.isfinite(v) if mask is None else torch.as_tensor(mask).reshape(v.shape)
    if used.dtype != torch.bool or not bool(used.any()):
        raise ValueError("The mask of the sky is boolean, True where used, and leaves some pixels; this one does not.")
    ly, lx = (lags, lags) if isinstance(lags, int) else lags
    if not (0 <= ly < v.shape[1] and 0 <= lx < v.shape[2]):
        raise ValueError(f"Lags of {(ly, lx)} pixels need sky larger than that, it has {tuple(v.shape[1:])}.")
    v = torch.where(used, v - v[used].mean(), 0.0)
    v = torch.where(used, v / torch.as_tensor(sd).double(), 0.0)
    if not bool(torch.isfinite(v).all()):
        raise ValueError(
            "Used pixels of the sky are not finite, or have a noise of 0; pass the mask that leaves them out."
        )
    out = torch.zeros(2 * ly + 1, 2 * lx + 1, dtype=torch.float64)
    ny, nx = v.shape[1:]
    for dy in range(ly + 1):
        for dx in range(-lx, lx + 1):
            if dy == 0 and dx < 0:
                continue
            a = (slice(None), slice(0, ny - dy), slice(max(-dx, 0), nx - max(dx, 0)))
            b = (slice(None), slice(dy, ny), slice(max(dx, 0), nx - max(-dx, 0)))
            pairs = int((used[a] & used[b]).sum())
            if pairs == 0:
                raise ValueError(f"The mask leaves no pair of pixels {dy, dx} apart; take fewer lags or more sky.")
            out[ly + dy, lx + dx] = out[ly - dy, lx - dx] = float((v[a] * v[b]).sum()) / pairs
    return out


def drizzled_noise(
    correlation: Any, shape: tuple[int, int, int], sd: Any = 1.0, *, floor: float = 0.03
) -> GaussianNoise:
    """Gaussian noise with a noise map and the correlation measured on blank sky, R = diag(sd) C diag(sd).

    Args:
        correlation: from `sky_correlation`, or a model of it of odd sides, its middle entry the variance over sd².
        shape: `(channels, ny, nx)` of the data. sd: number or map of the data's shape.
        floor: least power at any frequency, a share of the mean power.

    Returns:
        `GaussianNoise`, for whole images: a mask needs the dense matrix and 4096 pixels at the most. A large sd in the place
        of missing pixels is no way out: it says that their *correlated* part is known to be zero, and neighbours weigh too much.

    Raises:
        ValueError: a correlation that is not even, longer than the image, or negative as a whole.

    Targets: the stationary part is that of an image with its ends joined (see the module). Cost: two FFTs.
    """
    c = torch.as_tensor(correlation).double()
    if c.ndim != 2 or any(n % 2 == 0 for n in c.shape) or not bool(torch.isfinite(c).all()):
        raise ValueError(f"A correlation has odd sides around its middle entry, got the shape {tuple(c.shape)}.")
    if not torch.allclose(c, c.flip(0, 1), atol=1e-9 * float(c.abs().max())):
        raise ValueError("A correlation is even, ρ(−Δ) = ρ(Δ); use (c + c.flip(0, 1)) / 2.")
    if any(k > n for k, n in zip(c.shape, shape[1:], strict=True)):
        raise ValueError(f"The correlation reaches over {tuple(c.shape)} pixels and the image has {tuple(shape[1:])}.")
    placed = torch.zeros(shape[1:], dtype=torch.float64)
    placed[: c.shape[0], : c.shape[1]] = c
    placed = placed.roll((-(c.shape[0] // 2), -(c.shape[1] // 2)), (0, 1))
    S = torch.fft.fft2(placed).real
    if not 0 < floor <= 1:
        raise ValueError(f"The floor is a share of the mean power in (0, 1], got {floor}.")
    if not float(S.mean()) > 0:
        raise ValueError(f"The variance in the middle of the correlation is {float(S.mean()):g}; it must be positive.")
    clipped = S.clamp_min(floor * float(S.mean()))
    clipped = clipped * (S.mean() / clipped.mean())  # what the floor added to the variance goes off again
    C = Stationary(clipped, shape)
    level = torch.as_tensor(sd)
    if level.ndim == 0:
        return GaussianNoise(covariance=C.scaled(float(level) ** 2))
    return GaussianNoise(covariance=Modulated(level.reshape(shape), C))
