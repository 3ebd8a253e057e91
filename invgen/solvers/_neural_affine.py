r"""The linear part of a conditional density, by least squares: what is left for a network is the rest.

    w = L⁻¹ (y − B g),        y | g roughly N(B g, L Lᵀ),

y the target and g the condition, both standardised. B is a ridge regression whose penalty minimises the generalised
cross-validation score RSS/(1 − df/n)² (Golub, Heath & Wahba 1979, Technometrics 21, equation 1.4), L the root of the
covariance of the residuals. A density in w is one in y: p(y | g) = p(w | g)/det L. For a linear-Gaussian problem w is
N(0, I) whatever g, and a flow has nothing to learn but the identity.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_LEAST_ROWS = 20  # simulations a column of the condition, below which there is no regression
_MOST_COLUMNS = 512


class Affine(nn.Module):
    """y -> w and back, given g. Buffers: `gain` B `(dim, given)`, `root` L `(dim, dim)`, lower triangular."""

    gain: Tensor
    root: Tensor

    def __init__(self, dim: int, given: int) -> None:
        super().__init__()
        self.register_buffer("gain", torch.zeros(dim, given))
        self.register_buffer("root", torch.eye(dim))

    @torch.no_grad()
    def fit(self, y: Tensor, g: Tensor, *, regress: bool = True) -> None:
        """From rows `(n, dim)` and `(n, given)`, means taken off already."""
        y, g = y.double(), g.double()
        n, dim = y.shape
        lost = 1.0
        if regress and g.shape[1] <= min(n // _LEAST_ROWS, _MOST_COLUMNS):
            B, lost = _ridge(y, g)
            self.gain.copy_(B)
            y = y - g @ B.T
        covariance = y.T @ y / max(n - lost, 1.0)
        if n < 10 * dim:  # too few rows for correlations
            covariance = torch.diag(covariance.diagonal())
        scale = covariance.diagonal().mean().clamp_min(1e-300)
        eye = torch.eye(dim, dtype=y.dtype, device=y.device)
        self.root.copy_(torch.linalg.cholesky(covariance + 1e-8 * scale * eye))

    def forward(self, y: Tensor, g: Tensor) -> Tensor:
        """w `(n, dim)`."""
        rest = y - g @ self.gain.T
        return torch.linalg.solve_triangular(self.root, rest.T, upper=False).T

    def inverse(self, w: Tensor, g: Tensor) -> Tensor:
        """y `(n, dim)`."""
        return w @ self.root.T + g @ self.gain.T

    @property
    def log_det(self) -> Tensor:
        """log det L."""
        return self.root.diagonal().log().sum()


def _ridge(y: Tensor, g: Tensor) -> tuple[Tensor, float]:
    """B `(dim, given)`, and its degrees of freedom."""
    n = len(y)
    values, vectors = torch.linalg.eigh(g.T @ g / n)
    values = values.clamp_min(0)
    moment = vectors.T @ (g.T @ y / n)  # (given, dim)
    total = float(y.square().sum()) / n
    best = (math.inf, 0.0, 0.0)
    for penalty in torch.logspace(-8, 2, 31, dtype=torch.float64).tolist():
        shrunk = 1 / (values + penalty)
        df = float((values * shrunk).sum()) + 1
        fitted = (2 * shrunk - values * shrunk.square())[:, None] * moment.square()
        score = (total - float(fitted.sum())) / max(1 - df / n, 1e-3) ** 2
        best = min(best, (score, penalty, df))
    return (vectors @ (moment / (values + best[1])[:, None])).T, best[2]
