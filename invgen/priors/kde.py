r"""Kernel density of examples: a Gaussian around each of them, all of one shape.

    p(u) = 1/N Σ_i N(u; c_i, h² Σ),    c_i = m + √(1 − h²) (u_i − m),

m and Σ the mean and covariance of the examples u_i. Drawn towards the mean, the centres keep Σ the covariance of the
whole (West 1993, J. R. Statist. Soc. B 55, 409–422); without that a kernel density is too wide by h² Σ. In the
principal axes of Σ everything is diagonal, at any noise level:

    E[u0 | u0 + σ n = u] = Σ_i r_i(u) [c_i + h² Σ (h² Σ + σ²)⁻¹ (u − c_i)],   r_i ∝ N(u; c_i, h² Σ + σ²)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from invgen.contracts import check_batch
from invgen.driver import Streams
from invgen.grid import Grid
from invgen.transforms import Identity, Transform

__all__ = ["KernelDensityPrior"]


class KernelDensityPrior:
    """A Gaussian kernel around every example.

    Has `sample`, `HasDensity` and `HasDenoiser`, all exact for the kernel density (which is an estimate of the law that
    the examples come from). No latent: which kernel a draw belongs to is a discrete choice.

    Args:
        examples: `(n, *shape)` of x, at least two, not all equal.
        bandwidth: h in units of the examples' own spread, 0 < h ≤ 1 (at 1 it is one Gaussian); "likelihood" maximises
            the leave-one-out log-likelihood, "silverman" is (4/((d + 2) n))^(1/(d + 4)).
        grid: where x lives.
        transform: x = T(u); the identity when omitted.

    Raises:
        ValueError: too few, constant or non-finite examples; a bandwidth out of range.

    Cost: n · d multiplications a density or denoising call and item.
    """

    def __init__(
        self,
        examples: Tensor,
        *,
        bandwidth: float | str = "likelihood",
        grid: Grid | None = None,
        transform: Transform | None = None,
    ) -> None:
        self.shape, self.grid = tuple(examples.shape[1:]), grid
        self.transform: Transform = transform or Identity()
        if grid is not None and grid.field_shape != self.shape:
            raise ValueError(
                f"The examples have the shape {self.shape}, which does not fit the grid {grid.field_shape}."
            )
        if examples.ndim < 2 or len(examples) < 2:
            raise ValueError(
                f"A kernel density needs at least two examples (n, *shape), got the shape {tuple(examples.shape)}."
            )
        u = self.transform.inverse(examples.detach().double().cpu()).flatten(1)
        if not bool(torch.isfinite(u).all()):
            raise ValueError("The examples of a kernel density must be finite; drop or fill what is missing.")
        n, self.dim = u.shape
        self._mean = u.mean(0)
        values, self._axes = torch.linalg.eigh(torch.cov(u.mT).reshape(self.dim, self.dim))
        if not float(values[-1]) > 0:
            raise ValueError("All examples are equal: they have no density; give examples that vary.")
        self._values = values.clamp_min(1e-10 * values[-1])  # fewer examples than dimensions: flat directions
        self._centred = (u - self._mean) @ self._axes
        self.bandwidth = self._choose(bandwidth, n)
        self._casts: dict[tuple[torch.dtype, torch.device], tuple[Tensor, ...]] = {}

    def _choose(self, bandwidth: float | str, n: int) -> float:
        if not isinstance(bandwidth, str):
            if not 0 < bandwidth <= 1:
                raise ValueError(f"The bandwidth is a share of the examples' spread in (0, 1], got {bandwidth}.")
            return float(bandwidth)
        if bandwidth == "silverman":
            return min(1.0, (4 / ((self.dim + 2) * n)) ** (1 / (self.dim + 4)))
        if bandwidth != "likelihood":
            raise ValueError(f"The bandwidth is a number, 'likelihood' or 'silverman', got {bandwidth!r}.")
        few = self._centred[:: max(1, n // 2000)] / self._values.sqrt()  # enough to choose one number
        own = torch.eye(len(few), dtype=torch.bool)
        best, chosen = -math.inf, 1.0
        for h in torch.logspace(-2, 0, 41, dtype=torch.float64).tolist():
            squares = torch.cdist(few, math.sqrt(1 - h * h) * few).square().masked_fill_(own, math.inf)
            value = float((-0.5 * squares / h**2).logsumexp(1).mean()) - self.dim * math.log(h)
            if value > best:
                best, chosen = value, h
        return chosen

    def _parts(self, like: Tensor) -> tuple[Tensor, ...]:
        """Mean, axes, centres in the axes, kernel variances, in float64 on the device of `like`."""
        key = (torch.float64, like.device)
        if key not in self._casts:
            h = self.bandwidth
            parts = (self._mean, self._axes, math.sqrt(1 - h * h) * self._centred, h * h * self._values)
            self._casts[key] = tuple(p.to(like.device) for p in parts)
        return self._casts[key]

    def _scores(self, q: Tensor, centres: Tensor, variances: Tensor) -> Tensor:
        """log N(q; c_i, variances) `(batch, n)`; variances `(batch or 1, d)`. Squares are opened up: two products."""
        weight = 1 / variances
        squares = (q.square() * weight).sum(1, keepdim=True) - 2 * (q * weight) @ centres.mT
        squares = squares + weight @ centres.square().mT
        return -0.5 * (squares.clamp_min(0) + (2 * math.pi * variances).log().sum(1, keepdim=True))

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) of the kernel density, `(batch,)`, the Jacobian of the transform included."""
        check_batch(x, self.shape, f"The x given to {type(self).__name__}.log_prob")
        u = self.transform.inverse(x)
        mean, axes, centres, variances = self._parts(u)
        q = (u.flatten(1).double() - mean) @ axes
        value = self._scores(q, centres, variances[None]).logsumexp(1) - math.log(len(centres))
        return value.to(u.dtype) - self.transform.log_det(u)

    def denoise(self, u: Tensor, sigma: Tensor | float) -> Tensor:
        """E[u0 | u0 + sigma n = u]; u `(batch, *shape)`, sigma a number or `(batch,)`."""
        check_batch(u, self.shape, f"The field given to {type(self).__name__}.denoise")
        level = torch.as_tensor(sigma, dtype=torch.float64, device=u.device).reshape(-1, 1)
        if level.shape[0] not in (1, len(u)):
            raise ValueError(f"sigma has {level.shape[0]} values but the batch holds {len(u)} items; give one an item.")
        mean, axes, centres, variances = self._parts(u)
        q = (u.flatten(1).double() - mean) @ axes
        total = variances + level.square()
        centre = self._scores(q, centres, total.expand(len(u), -1)).softmax(1) @ centres
        clean = centre + variances / total * (q - centre)
        return (mean + clean @ axes.mT).reshape(u.shape).to(u.dtype)

    @torch.no_grad()
    def sample(self, n: int, *, seed: int = 0, chunk: int = 1024, dtype: torch.dtype = torch.float32) -> Tensor:
        """`(n, *shape)` draws: an example, drawn towards the mean, plus a draw of the kernel."""
        if n < 1:
            raise ValueError(f"The number of draws must be at least 1, got {n}.")
        out = []
        mean, axes, centres, variances = self._parts(self._mean)
        for first in range(0, n, chunk):
            rng = Streams(seed, range(first, min(first + chunk, n)))
            noise = rng.normal((self.dim,), dtype=dtype).double()
            q = centres[rng.integers(len(centres))] + variances.sqrt() * noise
            out.append((mean + q @ axes.mT).to(dtype).reshape(-1, *self.shape))
        return self.transform(torch.cat(out))

    @classmethod
    def examples(cls) -> list[KernelDensityPrior]:
        """Forty points on a bent line."""
        t = torch.linspace(-2, 2, 40, dtype=torch.float64)
        return [cls(torch.stack([t + 1, t.square() - 2], 1), bandwidth=0.4)]
