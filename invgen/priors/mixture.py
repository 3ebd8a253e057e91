r"""The Gaussian mixture prior: p(u) = Σ_k w_k N(u; m_k, C_k), x = T(u).

Under noise of level σ it stays a mixture, with C_k + σ² I, so that its denoiser is closed form:

    r_k(u) ∝ w_k N(u; m_k, C_k + σ² I)            E[u0 | u] = Σ_k r_k(u) [m_k + C_k (C_k + σ² I)⁻¹ (u − m_k)]

Components are diagonal or dense; each is diagonalised once, and batch and components are treated together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invgen.contracts import check_batch
from invgen.covariance import Covariance, Dense, Diagonal, Scalar, as_covariance
from invgen.driver import Streams
from invgen.grid import Grid
from invgen.priors._closed_form import ClosedForm, closest_dense, congruence, draws_together
from invgen.priors.gaussian import GaussianPrior
from invgen.transforms import Exp, Transform

__all__ = ["GaussianMixturePrior"]


class GaussianMixturePrior(ClosedForm):
    """u ~ Σ_k weights_k N(means_k, covariances_k), x = T(u).

    Has `sample`, `HasDensity` and `HasDenoiser`, all exact.

    Args:
        weights: `(K,)` positive; normalised here.
        means: `(K, *shape)` in the coordinates u.
        covariances: K covariances (or variances), or stacked: `(K,)` variances, `(K, *shape)` variances, `(K, n, n)`
            matrices over the flattened item.
        grid: where the field lives.
        transform: x = T(u); the identity when omitted.

    Attributes:
        weights, log_weights: `(K,)` float64. means: `(K, *shape)` float64, in u. covariances: K covariances, in u.

    Raises:
        ValueError: shapes that do not fit, weights that are not positive.
    """

    def __init__(
        self,
        weights: Tensor | Sequence[float],
        means: Tensor,
        covariances: Sequence[Covariance | Tensor | float] | Tensor,
        *,
        grid: Grid | None = None,
        transform: Transform | None = None,
    ) -> None:
        means = torch.as_tensor(means, dtype=torch.float64)
        if means.ndim < 2:
            raise ValueError(f"The means of a mixture have the shape (components, *shape), got {tuple(means.shape)}.")
        super().__init__(tuple(means.shape[1:]), grid, transform)
        given = torch.as_tensor(weights, dtype=torch.float64)
        k = means.shape[0]
        if tuple(given.shape) != (k,) or not bool((given > 0).all()) or not bool(torch.isfinite(given).all()):
            raise ValueError(f"A mixture of {k} means needs {k} positive, finite weights, got {given.tolist()}.")
        if not bool(torch.isfinite(means).all()):
            raise ValueError("The means of a mixture must be finite.")
        if len(covariances) != k:
            raise ValueError(f"A mixture of {k} means needs {k} covariances, got {len(covariances)}.")
        self.weights = given / given.sum()
        self.log_weights = self.weights.log()
        self.means = means
        self.covariances: list[Covariance] = [self._covariance(c) for c in covariances]
        self.history: list[float] = []
        self._vectors: Tensor | None = None
        if all(isinstance(c, (Scalar, Diagonal)) for c in self.covariances):
            self._values = torch.stack([c.diagonal().double().expand(self.shape).flatten() for c in self.covariances])
        else:
            matrices = [closest_dense(c, "A mixture component") for c in self.covariances]
            values, self._vectors = torch.linalg.eigh(torch.stack([(m.matrix * m.factor).double() for m in matrices]))
            self._values = values.clamp_min(1e-14 * values.amax(-1, keepdim=True))
        self._x: GaussianMixturePrior | None = None

    def _covariance(self, value: Covariance | Tensor | float) -> Covariance:
        if isinstance(value, Tensor) and value.ndim == 2 and tuple(value.shape) != self.shape:
            return Dense(value.double(), self.shape)
        if isinstance(value, Tensor) and value.ndim and tuple(value.shape) != self.shape:
            raise ValueError(
                f"The covariance of a component has the shape {tuple(value.shape)}; give a number, variances {self.shape} or a ({self.dim}, {self.dim}) matrix."
            )
        return as_covariance(value.double() if isinstance(value, Tensor) else value, self.shape)

    @classmethod
    def fit(cls, data: Tensor | np.ndarray, components: int, **options: Any) -> GaussianMixturePrior:
        """Expectation-maximisation on `(n, *shape)` examples of x; see `invgen.priors.fit_mixture`."""
        from invgen.priors.em import fit_mixture

        return fit_mixture(data, components, **options)

    @classmethod
    def examples(cls) -> list[GaussianMixturePrior]:
        """Two dense components in two dimensions, and three diagonal ones under an exponential."""
        matrices = torch.tensor([[[1.0, 0.6], [0.6, 0.8]], [[0.3, -0.1], [-0.1, 0.2]]], dtype=torch.float64)
        means = torch.tensor([[1.5, -1.0], [-1.0, 2.0]], dtype=torch.float64)
        fields = torch.tensor([0.2, -0.4, 0.5], dtype=torch.float64)[:, None, None].expand(3, 1, 4)
        return [
            cls([0.3, 0.7], means, matrices),
            cls([0.2, 0.5, 0.3], fields, torch.tensor([0.04, 0.09, 0.02], dtype=torch.float64), transform=Exp()),
        ]

    # --- capabilities ----------------------------------------------------------------------------------------------

    def sample(self, n: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """`(n, *shape)` draws of x; draw i does not depend on n."""
        if n < 1:
            raise ValueError(f"The number of draws must be at least 1, got {n}.")
        parts = []
        chunk = draws_together((self.dim,))
        for first in range(0, n, chunk):
            rng = Streams(seed, range(first, min(first + chunk, n)), salt="prior")
            choice = rng.uniform((), dtype=torch.float64, tag="component")
            k = torch.searchsorted(self.weights.cumsum(0), choice).clamp_max(len(self.weights) - 1)
            white = rng.normal((self.dim,), dtype=dtype) * self._values.sqrt().to(dtype)[k]
            if self._vectors is not None:
                coloured = torch.empty_like(white)
                for j in range(len(self.weights)):  # not a gather of matrices: n of them do not fit
                    coloured[k == j] = white[k == j] @ self._vectors[j].mT.to(dtype)
                white = coloured
            parts.append(self.transform(self.means.to(dtype)[k] + white.reshape(-1, *self.shape)))
        return torch.cat(parts)

    def _components(self, u: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Qᵀ_k (u − m_k) `(batch, K, n)` and log w_k N(u; m_k, C_k + noise) `(batch, K)`; noise `(batch or 1, 1, 1)`."""
        offset = u.flatten(1)[:, None] - self._as("means", self.means.flatten(1), u)
        if self._vectors is not None:
            offset = torch.einsum("bki,kij->bkj", offset, self._as("vectors", self._vectors, u))
        total = self._as("values", self._values, u) + noise
        exponent = (offset.square() / total + total.log()).sum(-1) + self.dim * math.log(2 * math.pi)
        return offset, self._as("log_weights", self.log_weights, u) - 0.5 * exponent

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), `(batch,)`, normalised, the Jacobian of T included."""
        u = self._to_u(x, "log_prob")
        return self._components(u, u.new_zeros(1, 1, 1))[1].logsumexp(1) - self.transform.log_det(u)

    def responsibilities(self, u: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """Probability of each component given u = u0 + sigma n, `(batch, K)`."""
        check_batch(u, self.shape, f"The field given to {type(self).__name__}.responsibilities")
        return self._components(u, self._level(sigma, u).square().reshape(-1, 1, 1))[1].softmax(1)

    def denoise(self, u: Tensor, sigma: Tensor | float) -> Tensor:
        """E[u0 | u0 + sigma n = u], the formula at the top of this file.

        Args:
            u: `(batch, *shape)` in the coordinates u. sigma: `(batch,)` or a number.

        Returns:
            `(batch, *shape)`. Cost: 2 K n² products an item (dense), 2 K n (diagonal); memory batch · K · n.
        """
        check_batch(u, self.shape, f"The field given to {type(self).__name__}.denoise")
        noise = self._level(sigma, u).square().reshape(-1, 1, 1)
        offset, log_joint = self._components(u, noise)
        share = log_joint.softmax(1)
        values = self._as("values", self._values, u)
        inner = share[..., None] * (values / (values + noise)) * offset
        moved = (
            inner.sum(1)
            if self._vectors is None
            else torch.einsum("bkj,kij->bi", inner, self._as("vectors", self._vectors, u))
        )
        return (share @ self._as("means", self.means.flatten(1), u) + moved).reshape(u.shape)

    # --- the law in x, and its moments -----------------------------------------------------------------------------

    @property
    def components(self) -> list[GaussianPrior]:
        """The K Gaussians, in the coordinates u (identity transform)."""
        return [GaussianPrior(m, c, grid=self.grid) for m, c in zip(self.means, self.covariances, strict=True)]

    @property
    def mean_u(self) -> Tensor:
        """E[u], `shape`, float64."""
        return torch.einsum("k,k...->...", self.weights, self.means)

    @property
    def covariance_u(self) -> Covariance:
        """Cov[u] = Σ_k w_k (C_k + (m_k − m)(m_k − m)ᵀ), dense."""
        off = (self.means - self.mean_u).flatten(1)
        total = (off * self.weights[:, None]).mT @ off
        for w, c in zip(self.weights, self.covariances, strict=True):
            dense = closest_dense(c, "The covariance of a mixture")
            total = total + w * (dense.matrix * dense.factor).to(total)
        return Dense((total + total.mT) / 2, self.shape)

    def in_x(self) -> GaussianMixturePrior:
        """The same law with x as coordinates (T the identity); T must be affine."""
        if self._x is None:
            shift, scale = self._affine_parts("The mixture law of x")
            self._x = GaussianMixturePrior(
                self.weights,
                shift + scale * self.means,
                [congruence(c, scale) for c in self.covariances],
                grid=self.grid,
            )
        return self._x

    def mean(self) -> Tensor:
        """E[x], `shape`, float64; affine transforms only."""
        return self.in_x().mean_u

    def covariance(self) -> Covariance:
        """Cov[x]; affine transforms only."""
        return self.in_x().covariance_u

    def __repr__(self) -> str:
        return f"GaussianMixturePrior(components={len(self.weights)}, shape={self.shape}, transform={type(self.transform).__name__})"
