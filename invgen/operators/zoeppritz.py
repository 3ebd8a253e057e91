r"""Pre-stack amplitudes without linearisation: the exact reflection coefficients of plane waves at every sample.

For an interface between (α_1, β_1, ρ_1) above and (α_2, β_2, ρ_2) below, an incident P wave of angle θ, ray parameter
p = sin θ / α_1 and vertical slownesses q = √(1/α² − p²) (P), s = √(1/β² − p²) (S),

    a = ρ_2 (1 − 2β_2² p²) − ρ_1 (1 − 2β_1² p²)          E = b q_1 + c q_2      F = b s_1 + c s_2
    b = ρ_2 (1 − 2β_2² p²) + 2 ρ_1 β_1² p²               G = a − d q_1 s_2      H = a − d q_2 s_1
    c = ρ_1 (1 − 2β_1² p²) + 2 ρ_2 β_2² p²               Δ = E F + G H p²
    d = 2 (ρ_2 β_2² − ρ_1 β_1²)
    PP = [(b q_1 − c q_2) F − (a + d q_1 s_2) H p²] / Δ,      PS = −2 q_1 (a b + c d q_2 s_2) p α_1 / (β_1 Δ)

Beyond the critical angle q_2 is imaginary and the coefficient complex, which a convolution with one real wavelet cannot
model. There (α_2² p² > 1 − `FLOOR`) q_2² is held at FLOOR/α_2²: the operator stays real, finite and continuous, and its
derivative in that direction is zero. `beyond_critical` counts the samples for which this happens.

References: Aki & Richards 1980, Quantitative Seismology, eq. 5.38–5.40; Zoeppritz 1919, Göttinger Nachrichten 66.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from invgen.contracts import Operator
from invgen.grid import Grid
from invgen.operators._casts import Casts
from invgen.operators.reflectivity import check_angles, check_channels
from invgen.operators.seismic import scaled_by_wavelet
from invgen.operators.wavelets import check_wavelet, convolution_matrix, ricker

__all__ = ["Zoeppritz", "reflection_coefficients"]

FLOOR = 1e-2  # cos² of the steepest ray: 84 degrees from the vertical


def reflection_coefficients(upper: Tensor, lower: Tensor, angles: Tensor, wave: str = "pp") -> Tensor:
    """Exact plane-wave reflection coefficients by the equations above.

    Args:
        upper, lower: `(batch, 3, *shape)` of (ln vp, ln vs, ln ρ); vp and vs in one unit, which one does not matter.
        angles: `(n_angles,)` of the incident P wave in the upper medium, degrees. wave: reflected, "pp" or "ps".

    Returns:
        `(batch, n_angles, *shape)`, real.
    """
    if wave not in ("pp", "ps"):
        raise ValueError(f'The reflected wave is "pp" or "ps", got {wave!r}.')
    spatial = upper.ndim - 2
    sine = torch.deg2rad(angles).sin().to(upper).reshape(-1, *[1] * spatial)
    # in units of the upper P velocity and density: p = sin θ, and no number is larger than a contrast
    first, p2 = upper[:, :1], sine.square()
    b1 = (upper[:, 1:2] - first).exp()
    a2, b2 = (lower[:, :1] - first).exp(), (lower[:, 1:2] - first).exp()
    r2 = (lower[:, 2:] - upper[:, 2:]).exp()

    def vertical(v: Tensor) -> Tensor:
        return (1 - v.square() * p2).clamp_min(FLOOR).sqrt() / v

    q1, q2, s1, s2 = (1 - p2).sqrt(), vertical(a2), vertical(b1), vertical(b2)
    shear1, shear2 = b1.square() * p2, b2.square() * p2
    a = r2 * (1 - 2 * shear2) - (1 - 2 * shear1)
    b = r2 * (1 - 2 * shear2) + 2 * shear1
    c = (1 - 2 * shear1) + 2 * r2 * shear2
    d = 2 * (r2 * b2.square() - b1.square())
    E, F, G, H = b * q1 + c * q2, b * s1 + c * s2, a - d * q1 * s2, a - d * q2 * s1
    determinant = E * F + G * H * p2
    if wave == "pp":
        return ((b * q1 - c * q2) * F - (a + d * q1 * s2) * H * p2) / determinant
    return -2 * q1 * (a * b + c * d * q2 * s2) * sine / (b1 * determinant)


class Zoeppritz(Operator):
    """Angle gathers with exact reflection coefficients: d_a = W_a R(θ_a; m), trace by trace; not linear.

    R[i] is the coefficient of the interface between samples i and i + 1, and 0 in the last sample. About a laterally and
    vertically constant model its derivative is `PreStack(…, kind="forward")` with that model's Vs/Vp: Aki–Richards for
    "pp", the converted waves for "ps".

    Args:
        wavelet: `(n_w,)` or `(n_angles, n_w)`; not halved. angles: `(n_angles,)` in degrees.
        shape: `(3, nz, nx)` of the model (ln vp, ln vs, ln ρ); vp and vs in the same unit.
        wave: "pp" or "ps". angle_unit, dt, model_grid: as in `PreStack`.

    Nuisance: wavelet_scale, as in `PreStack`.

    Raises:
        ValueError: as `PreStack`.

    Twice differentiable except at the critical angle. Cost: about 60 operations a datum and nz² nx n_angles multiply-adds
    for the wavelet; about six times `PreStack`, gradient included.
    """

    theta_names = ("wavelet_scale",)

    wavelet: Tensor
    angles: Tensor

    def __init__(
        self,
        wavelet: Tensor | np.ndarray,
        angles: Tensor | np.ndarray | list[float],
        shape: tuple[int, int, int],
        *,
        wave: str = "pp",
        angle_unit: str | None = None,
        dt: float | None = None,
        model_grid: Grid | None = None,
    ) -> None:
        if len(shape) != 3 or shape[0] != 3:
            raise ValueError(
                f"Zoeppritz needs the shape (3, nz, nx) of the model, got {tuple(shape)}; stack three properties."
            )
        if wave not in ("pp", "ps"):
            raise ValueError(f'The reflected wave is "pp" or "ps", got {wave!r}.')
        theta = check_angles(angles, unit=angle_unit)
        if float(torch.deg2rad(theta).sin().square().max()) > 1 - FLOOR:
            raise ValueError(
                f"Angles of incidence go up to 84 degrees here, got {float(theta.abs().max()):g}; leave out the grazing ones."
            )
        if model_grid is not None:
            check_channels(model_grid, "aki_richards", "Zoeppritz")
        wavelet = check_wavelet(wavelet, shape[1], where="Zoeppritz", dt=dt, grid=model_grid)
        if wavelet.ndim > 2 or (wavelet.ndim == 2 and len(wavelet) != len(theta)):
            raise ValueError(
                f"Zoeppritz needs one wavelet (n_w,) or one an angle ({len(theta)}, n_w), got {tuple(wavelet.shape)}."
            )
        super().__init__(tuple(shape), (len(theta), *shape[1:]), model_grid=model_grid)
        self.register_buffer("angles", theta)
        self.register_buffer("wavelet", wavelet)
        self.wave = wave
        self._casts = Casts()

    @classmethod
    def examples(cls) -> list[Any]:
        wavelet = ricker(torch.arange(-2, 3, dtype=torch.float64) * 0.004, 50.0)
        return [cls(wavelet, [0.0, 9.0, 18.0], (3, 5, 2)), cls(wavelet, [11.0], (3, 5, 1), wave="ps")]

    def _matrix(self) -> Tensor:
        nz, wavelet = self.model_shape[1], self.wavelet.cpu().to(torch.float64)
        if wavelet.ndim == 1:
            return convolution_matrix(wavelet, nz)
        return torch.stack([convolution_matrix(w, nz) for w in wavelet])

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        r = reflection_coefficients(x[..., :-1, :], x[..., 1:, :], self.angles, self.wave)
        d = torch.matmul(self._casts("W", x, self._matrix), pad(r, (0, 0, 0, 1)))
        return scaled_by_wavelet(d, theta, "Zoeppritz", per_channel=True)

    def beyond_critical(self, x: Tensor) -> Tensor:
        """How many reflection coefficients of each item lie beyond the critical angle and were held, `(batch,)`."""
        sine = torch.deg2rad(self.angles).sin().to(x).reshape(-1, 1, 1)
        ratio = (x[:, :1, 1:] - x[:, :1, :-1]).exp() * sine
        return (ratio.square() > 1 - FLOOR).flatten(1).sum(1)
