r"""Total variation as a regulariser: R(x) = Σ_pixels |∇x|, its proximal operator by projected gradients on the dual.

    prox:  y* = argmin_y ½|y − x|² + λ R(y),   λ = step · w
    dual:  max_{p ∈ P} ½|x|² − ½|x − λ Kᴴ p|²,   y = x − λ Kᴴ p,   P = {|p_pixel| ≤ 1} (isotropic) or {|p_i| ≤ 1}

FGP (Beck & Teboulle, IEEE Trans. Image Processing 18, 2009, section 4.2) is Nesterov's method on the dual, with steps
1/(λ ‖K‖²) in p; here its momentum starts again, item by item, whenever it points uphill (O'Donoghue & Candès 2015). It
stops by the duality gap, which bounds the distance to the minimiser:

    ½|y − y*|² ≤ gap = λ (R(y) − ⟨K y, p⟩).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from invgen.contracts import LinearOperator
from invgen.grid import Grid
from invgen.priors._differences import Differences
from invgen.priors._regularizer import Density, Regularizer, _positive
from invgen.priors.regularizers import L1, L21

__all__ = ["TV"]

_LOOK = 10  # iterations between two looks at the gap


class TV(Density, Regularizer):
    """Total variation, R(x) = Σ_pixels √Σ_axes (∂_a x)² or, anisotropic, Σ_pixels Σ_axes |∂_a x|.

    ∂ are forward differences per grid sample (not per metre), zero across the far edge; channels are penalised apart. An
    unstructured `(dim,)` is a signal along its one axis. `log_prob` is improper: constants cost nothing.

    Args:
        shape: `(channels, *spatial)` or `(dim,)`. weight: w, in 1/unit of x.
        isotropic: the norm of the gradient; False sums absolute differences.
        tol: `prox` stops where its distance to the minimiser is below `tol` |x − prox(x)|, by the duality gap.
        iterations: of `prox` at the most; the duality gap it reached is in `last_gap` (relative, the worst item).
        grid: where the model lives.

    Cost of `prox`: one K and one Kᴴ an iteration; tens of iterations for λ about the noise in x, hundreds for λ that
    flattens most of it or for `tol` below 1e-5. `warm_prox` starts from a dual field, which solvers keep.
    """

    exact_prox = False

    def __init__(
        self,
        shape: tuple[int, ...] | None = None,
        weight: float = 1.0,
        *,
        isotropic: bool = True,
        tol: float = 1e-4,
        iterations: int = 1000,
        grid: Grid | None = None,
    ) -> None:
        super().__init__(shape, weight, grid=grid)
        if iterations < 1:
            raise ValueError(f"TV needs at least one iteration for its proximal operator, got {iterations}.")
        self.isotropic, self.tol, self.iterations = bool(isotropic), _positive(tol, "The tol of TV"), int(iterations)
        self.gradient = Differences(self.shape)
        self.last_gap = 0.0

    @classmethod
    def examples(cls) -> list[TV]:
        return [
            cls((1, 6, 5), 0.6, tol=1e-6, iterations=5000),
            cls((2, 4, 3), 0.3, isotropic=False, tol=1e-6, iterations=5000),
            cls((9,), 0.5, tol=1e-6, iterations=5000),
        ]

    def value(self, x: Tensor) -> Tensor:
        """Σ_pixels |∇x|, `(batch,)`."""
        self._check(x, "value")
        return self._norms(self.gradient(x)).flatten(1).sum(1)

    def _norms(self, g: Tensor) -> Tensor:
        return torch.linalg.vector_norm(g, dim=1) if self.isotropic else g.abs()

    def _project(self, p: Tensor) -> Tensor:
        size = p.abs().square().sum(1, keepdim=True).sqrt() if self.isotropic else p.abs()
        return p / size.clamp_min(1)

    def parts(self) -> list[tuple[LinearOperator | None, Any]]:
        """(K, L21 or L1 with this weight)."""
        outer = (L21 if self.isotropic else L1)(self.gradient.data_shape, self.weight)
        return [(self.gradient, outer)]

    def _prox(self, x: Tensor, step: Tensor) -> Tensor:
        return self._fgp(x, step, None)[0]

    def warm_prox(self, x: Tensor, step: float | Tensor, dual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`prox` started from a dual field of an earlier call.

        Args:
            x: `(batch, *shape)`. step: a number or `(batch,)`. dual: `(batch, axes, *shape)`, zero when omitted.

        Returns:
            prox(x, step) and its dual field.
        """
        self._check(x, "warm_prox")
        return self._fgp(x, self._step(step, x), dual)

    @torch.no_grad()
    def _fgp(self, x: Tensor, lam: Tensor, dual: Tensor | None) -> tuple[Tensor, Tensor]:
        K = self.gradient
        p = x.new_zeros(x.shape[0], *K.data_shape) if dual is None else dual
        idle = lam <= 0  # a zero step leaves x as it is
        lam = torch.where(idle, torch.ones_like(lam), lam).expand(x.shape[0], *lam.shape[1:])
        wide = lam[:, None]
        q, t = p, torch.ones_like(wide)
        gain = 1 / (wide * max(K.norm_squared, 1e-30))
        active = ~idle.expand_as(lam).reshape(-1, *(1,) * (p.ndim - 1))
        y, relative = x - lam * K.adjoint(p), x.real.new_zeros(x.shape[0])
        for k in range(1, self.iterations + 1):
            new = self._project(q + gain * K(x - lam * K.adjoint(q)))
            uphill = _dot(q - new, new - p) > 0
            t_new = torch.where(uphill, torch.ones_like(t), 0.5 * (1 + (1 + 4 * t.square()).sqrt()))
            momentum = torch.where(uphill, torch.zeros_like(t), (t - 1) / t_new)
            q = torch.where(active, new + momentum * (new - p), q)
            p, t = torch.where(active, new, p), torch.where(active, t_new, t)
            if k % _LOOK == 0 or k == self.iterations:
                y = x - lam * K.adjoint(p)
                slopes = K(y)
                size = self._norms(slopes).flatten(1).sum(1)
                gap = size - _dot(slopes, p).flatten()
                scale = torch.linalg.vector_norm((x - y).flatten(1), dim=1)
                distance = (2 * lam.flatten() * gap.clamp_min(0)).sqrt()
                relative = distance / scale.clamp_min(torch.finfo(scale.dtype).tiny)
                # a gap below the rounding of the two sums it is made of says nothing
                more = (distance > self.tol * scale) & (gap > 4 * torch.finfo(size.dtype).eps * size)
                active = active & more.reshape(active.shape)
                if not bool(active.any()):
                    break
        self.last_gap = float(relative.max())
        return torch.where(idle, x, y), p


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Re⟨a, b⟩ of each item, `(batch, 1, …)`."""
    return (a.conj() * b).real.flatten(1).sum(1).reshape(-1, *(1,) * (a.ndim - 1))
