r"""The impedance problem of a section as one call: post-stack data, a background, and wells.

seismic      d = W D m / 2 + n                    m = ln(ρv), the ½ of the reflectivity applied here
background   S m_b = S m + ν                      S a running mean forth and back: the trend the data do not hold
wells        log = m along the path + error
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invgen.covariance import Covariance
from invgen.noise import GaussianNoise
from invgen.operators.seismic import PostStack, Smooth
from invgen.problem import InverseProblem, Term

__all__ = ["impedance_problem"]


def impedance_problem(
    data: Tensor | np.ndarray,
    wavelet: Tensor | np.ndarray,
    prior: Any,
    noise: float | Covariance | GaussianNoise,
    *,
    background: Tensor | np.ndarray | None = None,
    background_sd: float = 0.05,
    lengths: tuple[int, int] = (60, 50),
    wells: Sequence[Term] = (),
    mask: Tensor | None = None,
    nuisance: Mapping[str, Any] | None = None,
    kind: str = "centered",
) -> InverseProblem:
    """Post-stack data, a background and wells as one problem for m = ln(ρv).

    Args:
        data: `(n_t, n_x)` or `(1, n_t, n_x)`; several observations `(n_obs, 1, n_t, n_x)`.
        wavelet: `(n_w,)` w of d = w * r, sampled like the data, its middle at time zero; halved here.
        prior: of m, `(1, n_t, n_x)`; its grid is that of the operators.
        noise: of the seismic data: a standard deviation, a covariance (`invgen.data.noise_covariance`), a noise model.
        background: a model `(n_t, n_x)` whose low frequencies are trusted (velocities, an interpolated log); what enters is
            S m_b, so that it need not be smooth. None leaves the term out.
        background_sd: standard deviation of a *sample* of S m_b. Errors are taken as independent, so that the mean over
            a smoothing cell of n samples is held √n times closer: raise it by √n where the trend as such has this error.
        lengths: of the running means, samples in time and traces.
        wells: terms of `WellLog` operators on the same grid.
        mask: `(1, n_t, n_x)`, True where the section was measured.
        nuisance: further unknowns, e.g. `{"wavelet_scale": tie.scale_prior()}`.
        kind: of the difference, see `PostStack`.

    Returns:
        `InverseProblem` with the terms "seismic", "background" and the wells'.

    Raises:
        ValueError: shapes that do not fit the prior, a wavelet longer than the traces.

    Cost of the solves that samplers need: direct by columns for seismic and background alone under white noise, a few
    conjugate gradients under coloured noise; with wells conjugate gradients without that help.
    """
    shape, grid = tuple(prior.shape), getattr(prior, "grid", None)
    if len(shape) != 3 or shape[0] != 1:
        raise ValueError(f"An impedance problem needs a prior of one channel (1, n_t, n_x), got {shape}.")

    def field(value: Tensor | np.ndarray, what: str) -> Tensor:
        v = torch.as_tensor(value)
        if what == "section" and v.ndim == 4 and tuple(v.shape[1:]) == shape:
            return v  # several observations
        if tuple(v.shape) not in (shape, shape[1:]):
            raise ValueError(f"The {what} has the shape {tuple(v.shape)} but the prior {shape}; cut or resample one.")
        return v.reshape(shape)

    w = torch.as_tensor(wavelet).double()
    if w.ndim == 1 and len(w) > shape[1]:
        raise ValueError(f"The wavelet has {len(w)} samples, more than the {shape[1]} of a trace; cut it.")
    if not isinstance(noise, GaussianNoise):
        noise = GaussianNoise(covariance=noise) if isinstance(noise, Covariance) else GaussianNoise(noise)
    seismic = PostStack(w / 2, shape, kind=kind, model_grid=grid)
    terms = [Term(field(data, "section"), seismic, noise, mask, name="seismic")]
    if background is not None:
        smooth = Smooth(shape, lengths, model_grid=grid)
        low = smooth(field(background, "background").double()[None])
        terms.append(Term(low, smooth, GaussianNoise(background_sd), name="background"))
    return InverseProblem(terms=[*terms, *wells], prior=prior, nuisance=nuisance)
