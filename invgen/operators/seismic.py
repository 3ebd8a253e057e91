r"""Post-stack seismic modelling: log-impedance to seismic traces.

With a wavelet w and the log-impedance m = ln(ρv) of every trace,

    d = W D m,        (W D m)[i] = Σ_j w_j[i − j + ⌊n_w / 2⌋] (D m)[j],

D the first difference along the vertical axis with unit spacing and w_j the wavelet of reflector j, one and the same w
where it does not vary with time. The reflectivity is r = ½ ∂m, so the physical operator is W D / 2: **the factor ½
belongs into the wavelet**, as in PyLops. `PostStack(w / 2, …)` gives the same numbers as
`pylops.avo.poststack.PoststackLinearModelling(w / 2, …)`, and `PostStack(w, …)` those of the same call with w.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.signal import filtfilt
from torch import Tensor, nn

from invgen.contracts import LinearOperator
from invgen.grid import Grid
from invgen.operators._casts import Casts
from invgen.operators.separable import SeparableOperator
from invgen.operators.wavelets import _hats, check_wavelet, convolution_matrix, interpolate_wavelets, ricker

__all__ = ["LateralPostStack", "PostStack", "Smooth"]


class PostStack(SeparableOperator):
    """Normal-incidence traces of a log-impedance section: d = W D m, trace by trace.

    No factor ½ is applied: pass `wavelet / 2` to model reflectivities ½ Δln(ρv), exactly as in PyLops. The numbers
    are those of `pylops.avo.poststack.PoststackLinearModelling(wavelet, nz, spatdims=nx, kind=kind)` for one and the
    same `wavelet`, explicit or not.

    Args:
        wavelet: `(n_w,)`, sampled like the vertical axis; its entry ⌊n_w/2⌋ is time zero. One that varies with time is
            `(nz, n_w)`, row j the wavelet that reflector j sends out (PyLops with a 2-D wavelet), or `(m, n_w)` at the
            places `at`.
        shape: `(channels, nz, nx)` of the log-impedance, channels usually 1; data have the same shape.
        kind: "centered", (m[i+1] − m[i−1])/2 and 0 in the first and last sample, or "forward", m[i+1] − m[i] and 0
            in the last.
        at: `(m,)` increasing vertical places, in samples, of the m wavelets: linear between them and the nearest one
            outside, as in `pylops.signalprocessing.NonStationaryConvolve1D`.
        dt: sampling interval of the wavelet in the unit of the grid's vertical axis, to be compared with it.
        model_grid: grid of the model.

    Nuisance: `forward(x, wavelet_scale=s)` multiplies the data of item i with s[i] (`(batch,)` or a number, default 1);
    `adjoint` and `solve` are those of scale 1.

    Raises:
        ValueError: a wavelet that is not real and finite, is longer than the trace or sampled at another interval, or
            whose number of rows fits neither nz nor `at`; a shape without two spatial axes, an unknown kind.

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
        at: Tensor | np.ndarray | list[float] | None = None,
        dt: float | None = None,
        model_grid: Grid | None = None,
    ) -> None:
        wavelet = torch.as_tensor(wavelet)
        if len(shape) != 3:
            raise ValueError(
                f"PostStack needs the shape (channels, nz, nx) of the model, got {tuple(shape)}; write (1, nz, nx)."
            )
        channels, nz, nx = shape
        if wavelet.ndim not in (1, 2):
            raise ValueError(
                f"PostStack needs a wavelet (n_w,), or (nz, n_w) one for every reflector, got a tensor of shape {tuple(wavelet.shape)}."
            )
        if at is None and wavelet.ndim == 2 and len(wavelet) != nz:
            raise ValueError(
                f"A wavelet that varies with time has one row for each of the {nz} vertical samples, got {tuple(wavelet.shape)}; "
                "give their places with at=, or average them."
            )
        if at is not None and wavelet.ndim == 1:
            raise ValueError(
                "The places at= belong to several wavelets (m, n_w), but one (n_w,) was given; leave at out."
            )
        D = _difference(nz, kind)
        wavelet = check_wavelet(wavelet, nz, where="PostStack", dt=dt, grid=model_grid)
        each = wavelet.to(torch.float64)
        if at is not None:
            each = interpolate_wavelets(each, at, nz)
        super().__init__(convolution_matrix(each, nz) @ D, None, width=nx, channels=channels, model_grid=model_grid)
        self.register_buffer("wavelet", wavelet)
        self.kind = kind

    @classmethod
    def examples(cls) -> list[Any]:
        times = torch.arange(-4, 5, dtype=torch.float64) * 0.004
        wavelet = ricker(times, 60.0) / 2
        several = torch.stack([ricker(times, f) for f in (60.0, 40.0)]) / 2
        return [
            cls(wavelet, (1, 7, 3)),
            cls(wavelet, (1, 5, 2), kind="forward"),
            cls(several, (1, 9, 2), at=[1, 6]),
        ]

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        return scaled_by_wavelet(super().forward(x), theta, "PostStack")


def scaled_by_wavelet(d: Tensor, theta: dict[str, Tensor], where: str, *, per_channel: bool = False) -> Tensor:
    """Data times the nuisance parameter wavelet_scale: a number, `(batch,)`, or `(batch, channels)` where allowed."""
    scale = theta.pop("wavelet_scale", None)
    if theta:
        raise TypeError(f"{where} takes the nuisance parameter wavelet_scale only, got {sorted(theta)}.")
    if scale is None:
        return d
    scale = torch.as_tensor(scale, dtype=d.dtype, device=d.device)
    if per_channel and scale.ndim == 2:
        return d * scale[..., None, None]
    return d * (scale.reshape(-1, 1, 1, 1) if scale.ndim else scale)


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


class LateralPostStack(LinearOperator):
    r"""Post-stack traces whose wavelet varies along x: the wavelets of a few traces, interpolated between them.

        d = Σ_k W_k D (h_k ⊙ m),    h_k the hat function of place x_k: Σ_k h_k(x) = 1

    Trace x is convolved with Σ_k h_k(x) w_k: linear between the places, the nearest wavelet outside.

    Args:
        wavelets: `(m, n_w)`, wavelet k belongs to trace `at[k]`; with a third axis `(m, nz, n_w)` each also varies with
            time, row j being that of reflector j.
        at: `(m,)` increasing lateral places in traces, whole numbers or not.
        shape: `(channels, nz, nx)` of the log-impedance. kind, dt, model_grid: as in `PostStack`.

    Nuisance: wavelet_scale, as in `PostStack`.

    Raises:
        ValueError: places that do not fit the wavelets or the width, and whatever `PostStack` refuses.

    Cost: every trace sees two wavelets at most, but all m are applied: m times `PostStack`. `solve` is conjugate
    gradients.
    """

    theta_names = ("wavelet_scale",)

    hats: Tensor

    def __init__(
        self,
        wavelets: Tensor | np.ndarray,
        at: Tensor | np.ndarray | list[float],
        shape: tuple[int, int, int],
        *,
        kind: str = "centered",
        dt: float | None = None,
        model_grid: Grid | None = None,
    ) -> None:
        wavelets = torch.as_tensor(wavelets)
        if wavelets.ndim not in (2, 3):
            raise ValueError(
                f"LateralPostStack needs wavelets (m, n_w) or (m, nz, n_w), got a tensor of shape {tuple(wavelets.shape)}; one wavelet goes into PostStack."
            )
        parts = [PostStack(w, shape, kind=kind, dt=dt, model_grid=model_grid) for w in wavelets]
        super().__init__(parts[0].model_shape, parts[0].data_shape, model_grid=model_grid)
        self.parts = nn.ModuleList(parts)
        self.register_buffer("hats", _hats(at, shape[2], len(parts)).mT.contiguous())
        self._casts = Casts()

    @classmethod
    def examples(cls) -> list[Any]:
        times = torch.arange(-3, 4, dtype=torch.float64) * 0.004
        return [cls(torch.stack([ricker(times, 60.0), ricker(times, 45.0)]), [0.5, 2.0], (1, 7, 4))]

    def _hat(self, k: int, like: Tensor) -> Tensor:
        return self._casts("hats", like, lambda: self.hats)[k]

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        pieces = [part(x * self._hat(k, x)) for k, part in enumerate(self.parts)]
        return scaled_by_wavelet(torch.stack(pieces).sum(0), theta, "LateralPostStack")

    def adjoint(self, d: Tensor) -> Tensor:
        pieces = [part.adjoint(d) * self._hat(k, d) for k, part in enumerate(self.parts)]  # type: ignore[operator]
        return torch.stack(pieces).sum(0)


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
        self, shape: tuple[int, ...], lengths: tuple[int, int] = (60, 50), *, model_grid: Grid | None = None
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
