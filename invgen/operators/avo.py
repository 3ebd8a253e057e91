r"""Pre-stack amplitudes with angle: elastic logarithms to angle gathers, by linearised reflection coefficients.

With the channels m_1, m_2, m_3 of a section of logarithms and the angle of incidence θ_a of gather a,

    d_a = W_a Σ_k G_ak ⊙ (D m_k),    G_ak = G_k(θ_a, γ),    γ = Vs/Vp of a smooth background,

D the first difference along the vertical axis (Δ ln v ≈ Δv/v̄), G_k the coefficients of `reflectivity.py` and W the
convolution with the wavelet. The ½ of the reflectivity is in the coefficients, so the wavelet is **not** halved here (in
`PostStack` it is): at θ = 0 the gather is W D (ln vp + ln ρ) / 2.

References: Aki & Richards 1980, Quantitative Seismology, eq. 5.44; Buland & Omre 2003, Geophysics 68, 185 (the linear map
and its Bayesian inversion).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from invgen.contracts import LinearOperator
from invgen.covariance import Covariance, Diagonal, Scalar, as_covariance
from invgen.grid import Grid
from invgen.linalg import Solved, cg
from invgen.operators._casts import Casts
from invgen.operators.matrix import MatrixOperator
from invgen.operators.reflectivity import ava_coefficients, check_angles, check_channels, check_vsvp
from invgen.operators.seismic import _difference, scaled_by_wavelet
from invgen.operators.wavelets import check_wavelet, convolution_matrix, ricker

__all__ = ["PreStack"]

# up to this many model samples a trace the SVD of a trace's matrix is made: a minute of LAPACK, once
TRACE_LIMIT = 3072


class PreStack(LinearOperator):
    r"""Angle gathers of a section of elastic logarithms: d_a = W_a Σ_k G_ak D m_k, trace by trace.

    The model `(3, nz, nx)` holds (ln vp, ln vs, ln ρ), or (ln Ip, ln Is, ln ρ) for "fatti"; units are free, since D removes
    the constants they add to a logarithm. Data are `(n_angles, nz, nx)`. The numbers are those of
    `pylops.avo.prestack.PrestackLinearModelling(wavelet, angles, vsvp, nt0=nz, spatdims=nx)`, whose order of axes is
    (nz, 3, nx) and (nz, n_angles, nx); for converted waves see `reflectivity.py`.

    Args:
        wavelet: `(n_w,)`, or `(n_angles, n_w)` one an angle, or `(n_angles, nz, n_w)` also one a reflector. Entry
            ⌊n_w/2⌋ is time zero; not halved.
        angles: `(n_angles,)` angles of incidence, in degrees.
        shape: `(3, nz, nx)` of the model.
        vsvp: Vs/Vp of the background: a number, a profile `(nz,)` or a field `(nz, nx)`.
        linearization: "aki_richards", "fatti", "ps" (converted waves) or "ps_pylops".
        kind: of the difference, as in `PostStack`.
        angle_unit: "degrees" or "radians"; None takes degrees but asks about several angles below 1.6.
        coefficients: `(n_angles, 3)`, `(n_angles, 3, nz)` or `(n_angles, 3, nz, nx)` instead of a linearization.
        dt: sampling interval of the wavelet, to be compared with the grid's. model_grid: grid of the model.

    Nuisance: `forward(x, wavelet_scale=s)` multiplies the data of item i with s[i], `(batch,)`, a number, or
    `(batch, n_angles)`, one an angle.

    Raises:
        ValueError: what `check_angles` and `PostStack` refuse; Vs/Vp of one and more; a number of wavelets other than
            that of the angles; a grid whose channels are named other than what the linearization takes.

    Cost: nz² nx min(3, n_angles) multiply-adds an item where vsvp is a number and the wavelet one, nz² nx n_angles
    elsewhere. `solve` and `solve_model` are direct for scalar R and C, also where R has one variance an angle and C one a
    channel: with vsvp a number and one wavelet the operator is the Kronecker product G ⊗ W D, two eigendecompositions of
    n_angles and nz; where they vary with depth or angle only, through the SVD of the (n_angles nz × 3 nz) matrix that all
    traces share (up to 3072 model samples a trace); where vsvp varies along x, conjugate gradients behind the direct
    solve of the laterally averaged operator (6 to 12 iterations for a smooth background, instead of hundreds).
    """

    theta_names = ("wavelet_scale",)

    wavelet: Tensor
    angles: Tensor
    coefficients: Tensor

    def __init__(
        self,
        wavelet: Tensor | np.ndarray,
        angles: Tensor | np.ndarray | list[float],
        shape: tuple[int, ...],
        *,
        vsvp: float | Tensor | np.ndarray = 0.5,
        linearization: str = "aki_richards",
        kind: str = "centered",
        angle_unit: str | None = None,
        coefficients: Tensor | None = None,
        dt: float | None = None,
        model_grid: Grid | None = None,
    ) -> None:
        if len(shape) != 3 or shape[0] != 3:
            raise ValueError(
                f"PreStack needs the shape (3, nz, nx) of the model, got {tuple(shape)}; stack three properties."
            )
        _, nz, nx = shape
        theta = check_angles(angles, unit=angle_unit)
        if model_grid is not None:
            check_channels(model_grid, linearization, "PreStack")
        wavelet = check_wavelet(wavelet, nz, where="PreStack", dt=dt, grid=model_grid)
        if (
            wavelet.ndim > 3
            or (wavelet.ndim > 1 and len(wavelet) != len(theta))
            or (wavelet.ndim == 3 and wavelet.shape[1] != nz)
        ):
            raise ValueError(
                f"PreStack needs one wavelet (n_w,), one an angle ({len(theta)}, n_w) or also one a reflector ({len(theta)}, {nz}, n_w), got {tuple(wavelet.shape)}."
            )
        super().__init__((3, nz, nx), (len(theta), nz, nx), model_grid=model_grid)
        if coefficients is None:
            G = ava_coefficients(theta, check_vsvp(vsvp, nz, nx), linearization)
        else:
            G = torch.as_tensor(coefficients).detach().cpu().to(torch.float64)
            full = (len(theta), 3, nz, nx)
            G = G.reshape(*G.shape, *[1] * (4 - G.ndim)) if G.ndim < 4 else G
            if (
                G.ndim != 4
                or any(n not in (1, m) for n, m in zip(G.shape, full, strict=True))
                or tuple(G.shape[:2]) != full[:2]
            ):
                raise ValueError(
                    f"coefficients are {full[:2]}, {full[:3]} or {full}, got {tuple(coefficients.shape)}; one number an angle and channel."
                )
        self._D = _difference(nz, kind)
        self.register_buffer("angles", theta)
        self.register_buffer("wavelet", wavelet)
        self.register_buffer("coefficients", G)
        self.linearization, self.kind = linearization, kind
        self._casts = Casts()

    @classmethod
    def examples(cls) -> list[Any]:
        times = torch.arange(-2, 3, dtype=torch.float64) * 0.004
        wavelet, profile = ricker(times, 50.0), torch.linspace(0.4, 0.6, 5, dtype=torch.float64)
        each = torch.stack([ricker(times, f) for f in (50.0, 35.0)])
        return [
            cls(wavelet, [0.0, 12.0, 24.0, 36.0], (3, 5, 2)),
            cls(each, [5.0, 30.0], (3, 5, 2), vsvp=profile, linearization="fatti", kind="forward"),
            cls(wavelet, [10.0, 30.0], (3, 5, 2), vsvp=torch.stack([profile, profile.flip(0)], 1), linearization="ps"),
        ]

    @property
    def shared_by_depths(self) -> bool:
        """One set of coefficients and one wavelet for all samples: G ⊗ W D."""
        return self.wavelet.ndim == 1 and tuple(self.coefficients.shape[2:]) == (1, 1)

    @property
    def shared_by_traces(self) -> bool:
        """Coefficients that are constant along x: one matrix for all traces."""
        return self.coefficients.shape[3] == 1

    def scaled_by_channel(self, scale: Tensor) -> PreStack:
        """A diag(s) with one number s_k a channel, `(3,)`: again a `PreStack`, with the coefficients G_k s_k.

        The prior's coordinates u = (m − shift)/s so keep the direct solves.
        """
        scale = torch.as_tensor(scale).detach().to(self.coefficients)
        if tuple(scale.shape) != (3,):
            raise ValueError(f"A scale a channel has the shape (3,), got {tuple(scale.shape)}.")
        return self._with(self.coefficients * scale.reshape(1, 3, 1, 1))

    def _with(self, coefficients: Tensor) -> PreStack:
        shape = (3, *self.model_shape[1:])
        other = PreStack(
            self.wavelet,
            self.angles,
            shape,
            kind=self.kind,
            angle_unit="degrees",
            coefficients=coefficients,
        )
        other.linearization = self.linearization
        return other

    def _make(self, name: str) -> Tensor:
        nz = self.model_shape[1]
        wavelet = self.wavelet.cpu().to(torch.float64)
        if name == "W":
            if wavelet.ndim == 1:
                return convolution_matrix(wavelet, nz)
            return torch.stack([convolution_matrix(w, nz) for w in wavelet])
        if name == "Z":
            return self._make("W") @ self._D
        if name == "G":
            return self.coefficients.cpu()
        return self._make(name[:-1]).mT

    def _as(self, name: str, like: Tensor) -> Tensor:
        return self._casts(name, like, lambda: self._make(name))

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        if self.shared_by_depths:
            d = _mix(self._as("G", x), torch.matmul(self._as("Z", x), x))
        else:
            G, steps = self._as("G", x), _step(x, self.kind)
            # three products of maps that broadcast: an einsum over depth and trace would run as tiny matrix products
            r = G[:, 0] * steps[:, :1] + G[:, 1] * steps[:, 1:2] + G[:, 2] * steps[:, 2:]
            d = torch.matmul(self._as("W", x), r)
        return scaled_by_wavelet(d, theta, "PreStack", per_channel=True)

    def adjoint(self, d: Tensor) -> Tensor:
        if self.shared_by_depths:
            return torch.matmul(self._as("ZT", d), _mix(self._as("G", d).transpose(0, 1), d))
        G, r = self._as("G", d), torch.matmul(self._as("WT", d), d)
        steps = torch.stack([(G[:, k] * r).sum(1) for k in range(3)], dim=1)
        return _step_adjoint(steps, self.kind)

    def solve(self, rhs: Tensor, R: Any, C: Any, **options: Any) -> Solved:
        """(R + A C Aᴴ)⁻¹ rhs: direct for scalar or channel-wise R and C unless vsvp varies along x, else CG."""
        return self._direct(rhs, R, C, "solve", options)

    def solve_model(self, rhs: Tensor, R: Any, C: Any, **options: Any) -> Solved:
        """(Aᴴ R⁻¹ A + C⁻¹)⁻¹ rhs: direct like `solve`."""
        return self._direct(rhs, R, C, "solve_model", options)

    def _direct(self, rhs: Tensor, R: Any, C: Any, name: str, options: dict[str, Any]) -> Solved:
        R, C = as_covariance(R, self.data_shape, batched=True), as_covariance(C, self.model_shape, batched=True)
        if not rhs.is_complex():
            rows, columns = _by_channel(R), _by_channel(C)
            if rows is not None and columns is not None and not (isinstance(R, Scalar) and isinstance(C, Scalar)):
                return self._weighted(rhs, rows, columns, R, C, name, options)
        if isinstance(R, Scalar) and isinstance(C, Scalar):
            if self.shared_by_depths:
                return Solved.direct(self._through_factors(rhs, R.variance, C.variance, name == "solve"))
            if self.shared_by_traces and 3 * self.model_shape[1] <= TRACE_LIMIT:
                return self._through_trace(rhs, R.variance, C.variance, name)
            if not self.shared_by_traces:
                return self._preconditioned(rhs, R, C, name, options)
        return getattr(super(), name)(rhs, R, C, **options)

    def _weighted(
        self,
        rhs: Tensor,
        rows: Tensor,
        columns: Tensor,
        R: Covariance,
        C: Covariance,
        name: str,
        options: dict[str, Any],
    ) -> Solved:
        """R = diag(r_a), C = diag(c_k): R^(−1/2) A C^(1/2) is the operator with the coefficients G_ak √(c_k / r_a)."""
        kept: dict[Any, PreStack] = self._casts.once("weighted", dict)
        key = (*rows.flatten().tolist(), *columns.flatten().tolist())
        if key not in kept:
            kept.clear()  # noise that is sampled brings another key every time
            weights = (columns.reshape(1, -1) / rows.reshape(-1, 1)).sqrt().to(self.coefficients)
            kept[key] = self._with(self.coefficients * weights[..., None, None])
        r: Any = R if isinstance(R, Scalar) else 1.0
        c: Any = C if isinstance(C, Scalar) else 1.0
        side = (rows.rsqrt() if name == "solve" else columns.sqrt()).to(rhs).reshape(1, -1, 1, 1)
        if options.get("start") is not None:
            options = {**options, "start": options["start"] / side}
        inner = getattr(kept[key], name)(side * rhs, r, c, **options)
        return inner._replace(x=side * inner.x)  # type: ignore[no-any-return]

    def _preconditioned(self, rhs: Tensor, R: Scalar, C: Scalar, name: str, options: dict[str, Any]) -> Solved:
        """Conjugate gradients with the direct solve of the laterally averaged coefficients before them."""

        def make() -> PreStack:
            return self._with(self.coefficients.mean(3, keepdim=True))

        average: PreStack = self._casts.once("average", make)
        if 3 * self.model_shape[1] > TRACE_LIMIT and not average.shared_by_depths:
            return getattr(super(), name)(rhs, R, C, **options)  # type: ignore[no-any-return]
        options = {"rtol": 1e-10 if rhs.real.dtype == torch.float64 else 1e-5, "max_iter": 1000, **options}
        if options["rtol"] is None:
            options["rtol"] = 1e-10 if rhs.real.dtype == torch.float64 else 1e-5

        def system(v: Tensor) -> Tensor:
            if name == "solve":
                return R.apply(v) + self(C.apply(self.adjoint(v)))
            return self.adjoint(R.solve(self(v))) + C.solve(v)

        return cg(system, rhs, preconditioner=lambda v: getattr(average, name)(v, R, C).x, **options)

    def _through_factors(self, rhs: Tensor, r: Tensor, c: Tensor, data: bool) -> Tensor:
        """(U ⊗ V) 1/(r + c s a) (U ⊗ V)ᵀ in data space, 1/(s a / r + 1/c) in model space; s, a the eigenvalues of the Grams."""
        space = "data" if data else "model"

        def gram(name: str) -> tuple[Tensor, Tensor]:
            M = self._make("G")[:, :, 0, 0] if name == "angles" else self._make("Z")
            values, vectors = torch.linalg.eigh(M @ M.mT if data else M.mT @ M)
            return values.clamp_min(0), vectors

        def part(name: str, i: int) -> Tensor:
            key = f"{name} {space}"
            return self._casts(f"{key} {i}", rhs, lambda: self._casts.once(key, lambda: gram(name))[i])

        U, V = part("angles", 1), part("depths", 1)
        product = part("angles", 0)[:, None, None] * part("depths", 0)[:, None]
        r, c = _per_item(r, rhs), _per_item(c, rhs)
        w = torch.matmul(V.mT, _mix(U.mT, rhs)) / (r + c * product if data else product / r + 1 / c)
        return _mix(U, torch.matmul(V, w))

    def _trace(self) -> MatrixOperator:
        """The (n_angles nz × 3 nz) matrix of one trace."""

        def make() -> MatrixOperator:
            nz, (n_angles, *_) = self.model_shape[1], self.data_shape
            G, W = self._make("G")[..., 0].expand(-1, -1, nz), self._make("W").expand(n_angles, -1, -1)
            blocks = (W[:, None] * G[:, :, None, :]) @ self._D  # (angle, channel, nz, nz)
            return MatrixOperator(blocks.permute(0, 2, 1, 3).reshape(n_angles * nz, 3 * nz))

        return self._casts.once("trace", make)  # type: ignore[no-any-return]

    def _through_trace(self, rhs: Tensor, r: Tensor, c: Tensor, name: str) -> Solved:
        """Every trace an item of one matrix; a variance an item becomes one a trace."""
        batch, channels, nz, nx = rhs.shape
        rows = rhs.permute(0, 3, 1, 2).reshape(batch * nx, channels * nz)
        r, c = (v.expand(batch).repeat_interleave(nx) if v.ndim else v for v in (r, c))
        out = getattr(self._trace(), name)(rows, r, c).x
        return Solved.direct(out.reshape(batch, nx, channels, nz).permute(0, 2, 3, 1).contiguous())


def _mix(G: Tensor, x: Tensor) -> Tensor:
    """Σ_k G_ak x_k over the channel axis of `(batch, channels, nz, nx)`."""
    G = G[:, :, 0, 0] if G.ndim == 4 else G
    return torch.matmul(G, x.flatten(2)).reshape(x.shape[0], G.shape[0], *x.shape[2:])


def _step(x: Tensor, kind: str) -> Tensor:
    """D x along the vertical axis, by slices."""
    if kind == "forward":
        return pad(x[..., 1:, :] - x[..., :-1, :], (0, 0, 0, 1))
    return pad(0.5 * (x[..., 2:, :] - x[..., :-2, :]), (0, 0, 1, 1))


def _step_adjoint(r: Tensor, kind: str) -> Tensor:
    if kind == "forward":
        inner = r[..., :-1, :]
        return pad(inner, (0, 0, 1, 0)) - pad(inner, (0, 0, 0, 1))
    inner = 0.5 * r[..., 1:-1, :]
    return pad(inner, (0, 0, 2, 0)) - pad(inner, (0, 0, 0, 2))


def _by_channel(covariance: Covariance) -> Tensor | None:
    """The variances of the channels, `(channels,)` float64, where they are one number each; ones for a scalar."""
    if isinstance(covariance, Scalar):
        return torch.ones(covariance.shape[0], dtype=torch.float64)
    if not isinstance(covariance, Diagonal) or covariance.per_item:
        return None
    first = covariance.variance[:, :1, :1]
    return first.flatten().to(torch.float64) if bool((covariance.variance == first).all()) else None


def _per_item(variance: Tensor, like: Tensor) -> Tensor:
    return variance.to(like.real).reshape(-1, 1, 1, 1) if variance.ndim else variance.to(like.real)
