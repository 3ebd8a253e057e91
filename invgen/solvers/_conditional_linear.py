r"""The best linear answer to a simulator: what a conditional network is given, and what it need not learn.

Simulations (u_i, d_i) give a mean μ and a covariance C of the unknown, stationary for fields. Where the data are
d = A u + N(0, R), the linear estimate under N(μ, C) and draws of its error are

    m(d) = μ + K (d − A μ),   K = C Aᴴ (R + A C Aᴴ)⁻¹,        e = û − K (A û + n),   û ~ N(0, C), n ~ N(0, R),

e ~ N(0, S), S = (C⁻¹ + Aᴴ R⁻¹ A)⁻¹. As S⁻¹ (m(d) − μ) = Aᴴ R⁻¹ (d − A μ), m(d) is a one-to-one function of the part of
the data that enters the likelihood: for linear-Gaussian data it is a *sufficient* statistic under any prior, with any
positive definite C, and a network that sees m(d) alone loses nothing. For any other simulator the best linear estimate
is a regression on the simulations,

    m(d) = μ + C_ud C_dd⁻¹ (d − d̄),

which is not sufficient: the network is given the data as well.

The law of the data under the linear model also measures how unusual an observation is:
q(d) = (d − d̄)ᵀ C_dd⁻¹ (d − d̄) / n_d, to be compared with the q of the simulations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import scipy.fft
import torch
from torch import Tensor

from invgen.covariance import Covariance, Dense, Stationary
from invgen.solvers._inner import has_exact_step
from invgen.solvers._perturb import warn_unconverged

if TYPE_CHECKING:
    from invgen.problem import InverseProblem
    from invgen.streams import Streams

__all__: list[str] = []

_BLOCK = 256  # items of a linear solve at a time
_EDGE = 0.15  # part of each axis over which the field is tapered before its spectrum is taken


def estimated_covariance(v: Tensor) -> Covariance:
    """Covariance of centred fields `(n, channels, *spatial)`, stationary, or of centred vectors `(n, dim)`, a matrix.

    Fields: lagged products of the tapered field over those of the taper itself (unbiased at every lag), through a
    window that is flat up to half of the grid and zero at its end; the spectrum's negative values, which are noise, are
    raised to a millionth of the largest. An axis whose two ends are correlated like neighbours is periodic, and needs
    neither taper nor window. Channels are taken as independent. Vectors: the sample covariance, with the
    part dim/(n + dim) of its off-diagonal taken away.
    """
    v = v.double()
    if v.ndim == 2:
        n, dim = v.shape
        sample = v.T @ v / n
        diagonal = torch.diag(sample.diagonal())
        shrunk = torch.lerp(sample, diagonal, dim / (n + dim))
        return Dense(shrunk + 1e-8 * diagonal.diagonal().mean() * torch.eye(dim, dtype=v.dtype), (dim,))
    spatial = tuple(v.shape[2:])
    axes = tuple(range(-len(spatial), 0))
    closed = [n == 1 or _is_periodic(v, axis) for n, axis in zip(spatial, axes, strict=True)]
    padded = tuple(
        n if ring else scipy.fft.next_fast_len(2 * n, real=True) for n, ring in zip(spatial, closed, strict=True)
    )
    taper, window = torch.ones(spatial, dtype=v.dtype), torch.ones(padded, dtype=v.dtype)
    for axis, (n, p) in enumerate(zip(spatial, padded, strict=True)):
        if closed[axis]:
            continue
        wide = [1] * len(spatial)
        wide[axis] = -1
        place = (torch.arange(n, dtype=v.dtype) + 0.5) / n
        edge = torch.minimum(place, 1 - place).div(_EDGE).clamp_max(1.0)
        taper = taper * torch.sin(0.5 * math.pi * edge).square().reshape(wide)
        lag = torch.minimum(torch.arange(p), p - torch.arange(p)).to(v) / n
        fall = ((lag - 0.5) / 0.4).clamp(0, 1)
        window = window * torch.cos(0.5 * math.pi * fall).square().reshape(wide)
    power = torch.zeros((v.shape[1], *padded), dtype=v.dtype)
    for part in v.split(_BLOCK):
        power += torch.fft.fftn(part * taper, s=padded, dim=axes).abs().square().sum(0)
    lagged = torch.fft.ifftn(power / len(v), dim=axes).real
    pairs = torch.fft.ifftn(torch.fft.fftn(taper, s=padded, dim=axes).abs().square(), dim=axes).real
    known = torch.where(window > 0, lagged / pairs.clamp_min(1e-6 * float(pairs.max())), 0.0) * window
    spectrum = torch.fft.fftn(known, dim=axes).real
    raised = torch.maximum(spectrum, 1e-6 * spectrum.amax(axes, keepdim=True))
    variance = v.square().mean((0, *axes)).reshape(-1, *(1,) * len(spatial))
    return Stationary(raised * variance / raised.mean(axes, keepdim=True), (v.shape[1], *spatial))


def _is_periodic(v: Tensor, axis: int) -> bool:
    ahead, whole = v.movedim(axis, 0), float(v.square().mean())
    neighbours, ends = float((ahead[1:] * ahead[:-1]).mean()), float((ahead[0] * ahead[-1]).mean())
    return neighbours > 0.1 * whole and ends > 0.7 * neighbours


class GaussianAnswer:
    """m(d) and draws of its error for linear physics with Gaussian noise, under N(μ, C) in u.

    Args:
        problem: physics and noise. mean: μ `(*shape)`. covariance: C. limit: data up to which R + A C Aᴴ is factorised
            once (m² a solve); beyond, conjugate gradients.
    """

    name, sufficient = "gaussian", True

    def __init__(self, problem: InverseProblem, mean: Tensor, covariance: Covariance, *, limit: int) -> None:
        system = problem.select([0], dtype=torch.float64).linear_gaussian("u")
        if system.data.is_complex():
            raise TypeError(
                "Conditional estimators need real data; state a complex term as its real and imaginary parts, with half the variance each."
            )
        self.operator, self.R, self.C, self.mean = system.operator, system.R_update, covariance, mean.double()
        self.n_data = math.prod(system.operator.data_shape)
        self.factor = self._factorised() if self.n_data <= limit else None
        self._cast: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self.predicted = self.operator(self.mean[None])

    def _factorised(self) -> Tensor:
        shape, columns = self.operator.data_shape, []
        for rows in torch.eye(self.n_data, dtype=torch.float64).split(_BLOCK):
            columns.append(self.operator(self.C.apply(self.operator.adjoint(rows.reshape(-1, *shape)))).flatten(1))
        S = torch.cat(columns) + self.R.dense().to(torch.float64)
        return torch.linalg.cholesky((S + S.T) / 2)

    def _solve(self, rhs: Tensor) -> Tensor:
        """(R + A C Aᴴ)⁻¹ rhs."""
        if self.factor is None:
            solved = self.operator.solve(rhs, self.R, self.C)
            warn_unconverged(solved)
            return solved.x
        key = rhs.dtype, rhs.device
        if key not in self._cast:
            self._cast[key] = self.factor.to(rhs)
        return torch.cholesky_solve(rhs.flatten(1).T, self._cast[key]).T.reshape(rhs.shape)

    def _gain(self, rhs: Tensor) -> tuple[Tensor, Tensor]:
        """K rhs, and rhsᵀ (R + A C Aᴴ)⁻¹ rhs / n_d."""
        w = self._solve(rhs)
        return self.C.apply(self.operator.adjoint(w)), (w * rhs).flatten(1).sum(1) / self.n_data

    def estimate(self, problem: InverseProblem) -> tuple[Tensor, Tensor]:
        """m(d) `(n_obs, *shape)` and q(d) `(n_obs,)` of the problem's data."""
        data = problem.linear_gaussian("u").data
        parts = [self._gain(rows - self.predicted.to(rows)) for rows in data.split(_BLOCK)]
        return torch.cat([p[0] for p in parts]) + self.mean.to(data), torch.cat([p[1] for p in parts])

    def errors(self, rng: Streams, dtype: torch.dtype, tag: str) -> Tensor:
        """e ~ N(0, S), one an item, `(batch, *shape)`."""
        shapes = self.C.noise_shape, self.R.noise_shape
        n = math.prod(shapes[0])
        white = rng.normal((n + math.prod(shapes[1]),), dtype=dtype, tag=tag)
        out = []
        for w in white.split(_BLOCK):
            u = self.C.sqrt(w[:, :n].reshape(-1, *shapes[0]))
            out.append(u - self._gain(self.operator(u) + self.R.sqrt(w[:, n:].reshape(-1, *shapes[1])))[0])
        return torch.cat(out)

    def tensors(self) -> dict[str, Tensor]:
        return {"C": _numbers_of(self.C), "probe": self.predicted.flatten()[:64]}

    @classmethod
    def of(cls, problem: InverseProblem, mean: Tensor, tensors: Mapping[str, Tensor], limit: int) -> GaussianAnswer:
        """From `tensors`, with the physics of the problem."""
        answer = cls(problem, mean, _covariance_of(tensors["C"], problem.model_shape), limit=limit)
        if not torch.allclose(answer.predicted.flatten()[:64], tensors["probe"].double(), rtol=1e-4, atol=1e-6):
            raise ValueError(
                "This file was fitted to other physics: the operator predicts other data for the mean model; give the problem it was fitted to."
            )
        return answer


class RegressionAnswer:
    """m(d) by linear regression on simulations, for any simulator; its error is drawn with the residuals' covariance.

    Args:
        mean: μ `(*shape)`. centre: d̄ `(m,)`. gain: C_ud C_dd⁻¹ `(n, m)`. precision: C_dd⁻¹ `(m, m)`. C: covariance of
            the residuals u − m(d).
    """

    name, sufficient = "regression", False

    def __init__(self, mean: Tensor, centre: Tensor, gain: Tensor, precision: Tensor, C: Covariance) -> None:
        self.mean, self.centre, self.gain, self.precision, self.C = mean, centre, gain, precision, C

    @classmethod
    def fitted(cls, u: Tensor, data: Tensor) -> RegressionAnswer:
        """From `(n, *shape)` models and flat `(n, m)` data; with m > n/20 data m(d) = μ.

        In-sample residuals have (1 − m/n) times the variance of new ones: 5 % at the most, 2.5 % in the sd.
        """
        mean, centre = u.double().mean(0), data.double().mean(0)
        du, dd = (u - mean).flatten(1).double(), data.double() - centre
        n, m = dd.shape
        variance = dd.square().mean(0).clamp_min(1e-300)
        if 20 * m > n:
            return cls(
                mean, centre, du.new_zeros(du.shape[1], m), torch.diag(1 / variance), estimated_covariance(u - mean)
            )
        C = dd.T @ dd / n + 1e-9 * torch.diag(variance)
        precision = torch.linalg.inv(C)
        gain = (du.T @ dd / n) @ precision
        left = (du - dd @ gain.T).reshape(u.shape)
        return cls(mean, centre, gain, precision, estimated_covariance(left))

    def estimate(self, problem: InverseProblem) -> tuple[Tensor, Tensor]:
        dd = flat_data(problem)
        dd = dd - self.centre.to(dd)
        q = ((dd @ self.precision.to(dd)) * dd).mean(1)
        return self.mean.to(dd) + (dd @ self.gain.T.to(dd)).reshape(-1, *self.mean.shape), q

    def errors(self, rng: Streams, dtype: torch.dtype, tag: str) -> Tensor:
        return self.C.sqrt(rng.normal(self.C.noise_shape, dtype=dtype, tag=tag))

    def tensors(self) -> dict[str, Tensor]:
        return {"C": _numbers_of(self.C), "centre": self.centre, "gain": self.gain, "precision": self.precision}

    @classmethod
    def of(cls, problem: InverseProblem, mean: Tensor, tensors: Mapping[str, Tensor], limit: int) -> RegressionAnswer:
        centre, gain, precision = (tensors[k].double() for k in ("centre", "gain", "precision"))
        return cls(mean, centre, gain, precision, _covariance_of(tensors["C"], problem.model_shape))


Answer = GaussianAnswer | RegressionAnswer


def linear_answer(problem: InverseProblem, u: Tensor, data: tuple[Tensor, ...], limit: int) -> Answer:
    """The answer that fits the simulator; u `(n, *shape)`, data `(n, *data_shape)` a term."""
    unknown_noise = any(isinstance(getattr(t.noise, "sigma", None), str) for t in problem.terms)
    if has_exact_step(problem) and not unknown_noise:
        mean = u.double().mean(0)
        return GaussianAnswer(problem, mean, estimated_covariance(u - mean), limit=limit)
    return RegressionAnswer.fitted(u, flat_data(problem.with_data(*data)))


def flat_data(problem: InverseProblem) -> Tensor:
    """All measured data of each observation as real numbers, `(n_obs, m)`."""
    rows = []
    for term in problem.observed_terms():
        d = torch.view_as_real(term.data.resolve_conj()) if term.data.is_complex() else term.data
        rows.append(d.flatten(1))
    n = max(len(r) for r in rows)
    return torch.cat([r.expand(n, -1) for r in rows], dim=1)


def _numbers_of(C: Covariance) -> Tensor:
    return C.spectrum if isinstance(C, Stationary) else C.dense()


def _covariance_of(numbers: Tensor, shape: tuple[int, ...]) -> Covariance:
    return Stationary(numbers.double(), shape) if len(shape) > 1 else Dense(numbers.double(), shape)


def spread_of(values: Tensor) -> Tensor:
    """Root mean square over the items, never zero."""
    sd = values.double().square().mean(0).sqrt()
    return sd.clamp_min(1e-6 * float(np.sqrt(float(sd.square().mean()))) + 1e-300)
