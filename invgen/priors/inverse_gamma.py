r"""The conjugate prior of a standard deviation: its square is inverse-gamma.

    v = σ² ~ IG(a, b):   p(v) = bᵃ / Γ(a) · v^(−a−1) exp(−b/v),        p(σ) = 2σ p(v) = 2 bᵃ / Γ(a) · σ^(−2a−1) exp(−b/σ²)

After n real residuals of the square sum S the variance is IG(a + n/2, b + S/2): what Gibbs samplers of a noise level use.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from invgen.contracts import check_batch
from invgen.driver import Streams
from invgen.grid import Grid
from invgen.transforms import Exp, Transform

__all__ = ["InverseGammaPrior"]


class InverseGammaPrior:
    """σ > 0 with σ² ~ InverseGamma(concentration, rate): a nuisance prior for a noise level, `(1,)`.

    Has `sample` and `HasDensity`; u = log σ. No latent: samplers in z take a `GaussianPrior` with `Exp` instead.

    Args:
        concentration: a > 0; 2a is the number of residuals the prior is worth (vague: 1).
        rate: b > 0 in squared units of σ; the variance has its mode at b/(a + 1).

    Raises:
        ValueError: a concentration or rate that is not positive and finite.

    Reference: Gelman et al., Bayesian Data Analysis, 3rd edition 2013, section 3.2 and appendix A.
    """

    grid: Grid | None = None

    def __init__(self, concentration: float, rate: float) -> None:
        for name, value in (("concentration", concentration), ("rate", rate)):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"An inverse-gamma prior needs a positive {name}, got {value}.")
        self.concentration, self.rate = float(concentration), float(rate)
        self.shape: tuple[int, ...] = (1,)
        self.transform: Transform = Exp()

    @classmethod
    def examples(cls) -> list[InverseGammaPrior]:
        return [cls(5.0, 2.0)]

    @property
    def variance_law(self) -> tuple[float, float]:
        """a and b of σ² ~ IG(a, b): what conjugate updates ask for."""
        return self.concentration, self.rate

    def sample(self, n: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """`(n, 1)` draws of σ; draw i depends on (seed, i) alone."""
        if n < 1:
            raise ValueError(f"The number of draws must be at least 1, got {n}.")
        gamma = Streams(seed, range(n), salt="InverseGammaPrior").gamma(self.concentration, (1,), dtype=torch.float64)
        return (self.rate / gamma).sqrt().to(dtype)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(σ) of `(batch, 1)`, `(batch,)`; −∞ where σ ≤ 0."""
        check_batch(x, self.shape, "The value given to InverseGammaPrior.log_prob")
        a, b = self.concentration, self.rate
        s = torch.where(x > 0, x, torch.ones_like(x))
        value = math.log(2) + a * math.log(b) - math.lgamma(a) - (2 * a + 1) * s.log() - b / s.square()
        return torch.where(x > 0, value, torch.full_like(value, -math.inf)).sum(1)

    def __repr__(self) -> str:
        return f"InverseGammaPrior(concentration={self.concentration:g}, rate={self.rate:g})"
