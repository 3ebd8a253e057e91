r"""Post-stack seismic modelling: log-impedance to seismic traces.

With a wavelet w and the log-impedance m = ln(ρv) of every trace,

    d = W D m,        (W D m)[i] = Σ_j w[i − j + ⌊n_w / 2⌋] (D m)[j],

D the first difference along the vertical axis with unit spacing. The reflectivity is r = ½ ∂m, so the physical
operator is W D / 2: **the factor ½ belongs into the wavelet**, as in PyLops. `PostStack(w / 2, …)` gives the same
numbers as `pylops.avo.poststack.PoststackLinearModelling(w / 2, …)`, and `PostStack(w, …)` those of the same call with w.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.signal import filtfilt
from torch import Tensor

from invgen.grid import Grid
from invgen.operators.separable import SeparableOperator

__all__ = ["PostStack", "Smooth", "ricker"]


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


class PostStack(SeparableOperator):
    """Normal-incidence traces of a log-impedance section: d = W D m, trace by trace.

    No factor ½ is applied: pass `wavelet / 2` to model reflectivities ½ Δln(ρv), exactly as in PyLops. The numbers
    are those of `pylops.avo.poststack.PoststackLinearModelling(wavelet, nz, spatdims=nx, kind=kind)` for one and the
    same `wavelet`, explicit or not.

    Args:
        wavelet: `(n_w,)`, sampled like the vertical axis; its entry ⌊n_w/2⌋ is time zero.
        shape: `(channels, nz, nx)` of the log-impedance, channels usually 1; data have the same shape.
        kind: "centered", (m[i+1] − m[i−1])/2 and 0 in the first and last sample, or "forward", m[i+1] − m[i] and 0
            in the last.
        model_grid: grid of the model.

    Nuisance: `forward(x, wavelet_scale=s)` multiplies the data of item i with s[i] (`(batch,)` or a number, default 1);
    `adjoint` and `solve` are those of scale 1.

    Raises:
        ValueError: a wavelet that is not one-dimensional, real and finite, a shape without two spatial axes, an
            unknown kind.

    Cost: nz² nx multiply-adds an item and direction, one batched matrix product; the matrix W D is kept in float64
    and cast once. `solve` is direct for scalar R and C.
    """

    theta_names = ("wavelet_scale",)

    wavelet: Tensor

    def __init__(
        self,
        wavelet: Tensor | np.ndarray,
        shape: tuple[int, int, int],
        *,
        kind: str = "centered",
        model_grid: Grid | None = None,
    ) -> None:
        wavelet = torch.as_tensor(wavelet)
        if wavelet.ndim != 1 or wavelet.numel() == 0 or wavelet.is_complex() or not bool(torch.isfinite(wavelet).all()):
            raise ValueError(
                f"PostStack needs one real, finite wavelet (n_w,), got a tensor of shape {tuple(wavelet.shape)}; average several, or check it for NaN."
            )
        if len(shape) != 3:
            raise ValueError(
                f"PostStack needs the shape (channels, nz, nx) of the model, got {tuple(shape)}; write (1, nz, nx)."
            )
        channels, nz, nx = shape
        Z = _toeplitz(wavelet.detach().to(torch.float64), nz) @ _difference(nz, kind)
        super().__init__(Z, None, width=nx, channels=channels, model_grid=model_grid)
        self.register_buffer("wavelet", wavelet.detach().clone())
        self.kind = kind

    @classmethod
    def examples(cls) -> list[Any]:
        wavelet = ricker(torch.arange(-4, 5, dtype=torch.float64) * 0.004, 25.0) / 2
        return [cls(wavelet, (1, 7, 3)), cls(wavelet, (1, 5, 2), kind="forward")]

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        d = super().forward(x)
        scale = theta.pop("wavelet_scale", None)
        if theta:
            raise TypeError(f"PostStack takes the nuisance parameter wavelet_scale only, got {sorted(theta)}.")
        if scale is None:
            return d
        scale = torch.as_tensor(scale, dtype=d.dtype, device=d.device)
        return d * (scale.reshape(-1, 1, 1, 1) if scale.ndim else scale)


def _toeplitz(wavelet: Tensor, n: int) -> Tensor:
    """W with (W r)[i] = Σ_j wavelet[i − j + ⌊n_w/2⌋] r[j], `(n, n)`."""
    lag = torch.arange(n)[:, None] - torch.arange(n)[None, :] + len(wavelet) // 2
    inside = (lag >= 0) & (lag < len(wavelet))
    return torch.where(inside, wavelet[lag.clamp(0, len(wavelet) - 1)], torch.zeros((), dtype=wavelet.dtype))


def _difference(n: int, kind: str) -> Tensor:
    """First difference with unit spacing, zero rows at the edges as in PyLops."""
    if kind not in ("centered", "forward"):
        raise ValueError(f'kind must be "centered" or "forward", got {kind!r}.')
    if n < (3 if kind == "centered" else 2):
        raise ValueError(
            f"A {kind} difference needs at least {3 if kind == 'centered' else 2} vertical samples, got {n}."
        )
    ones = torch.ones(n - 1, dtype=torch.float64)
    if kind == "forward":
        D = torch.diag(ones, 1) - torch.eye(n, dtype=torch.float64)
        D[-1] = 0
        return D
    D = (torch.diag(ones, 1) - torch.diag(ones, -1)) / 2
    D[0] = D[-1] = 0
    return D


class Smooth(SeparableOperator):
    """The low-pass of background models: a running mean forth and back along z, then along x.

        S m = F_z m F_xᵀ,  F = `scipy.signal.filtfilt(ones(n)/n, 1, ·)`, the filter of the identity matrix

    Args:
        shape: `(channels, nz, nx)`.
        lengths: samples of the running mean along z and x; 1 leaves an axis alone.
        model_grid: grid of the model.

    filtfilt extends the field oddly at both ends, by `padlen = min(3 n, size − 1)` samples: SciPy's default 3n
    wherever the axis is that long.

    Raises:
        ValueError: lengths below 1 or a shape without two spatial axes.

    Cost: nz² nx + nz nx² multiply-adds a channel. `solve` is direct for scalar R and C, also stacked with `PostStack`.
    """

    def __init__(
        self, shape: tuple[int, int, int], lengths: tuple[int, int] = (60, 50), *, model_grid: Grid | None = None
    ) -> None:
        if len(shape) != 3 or len(lengths) != 2 or min(lengths) < 1:
            raise ValueError(
                f"Smooth needs a shape (channels, nz, nx) and two lengths of at least 1, got {tuple(shape)} and {tuple(lengths)}."
            )
        channels, nz, nx = shape
        super().__init__(
            _running_mean(nz, lengths[0]), _running_mean(nx, lengths[1]), channels=channels, model_grid=model_grid
        )
        self.lengths = (int(lengths[0]), int(lengths[1]))

    @classmethod
    def examples(cls) -> list[Any]:
        return [cls((1, 8, 6), (3, 2)), cls((2, 4, 5))]


def _running_mean(size: int, length: int) -> Tensor:
    window = np.ones(length) / length
    filtered = filtfilt(window, 1, np.eye(size), axis=0, padlen=min(3 * length, size - 1))
    return torch.from_numpy(np.ascontiguousarray(filtered))
