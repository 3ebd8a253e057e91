r"""The Gaussian prior: p(u) = N(m, C), x = T(u), everything in closed form.

    log p(x) = log N(T⁻¹(x); m, C) − log |det T'|             f(z) = T(m + L z),  L Lᵀ = C
    E[u0 | u0 + σ n = u] = m + C (C + σ²)⁻¹ (u − m)           Cov[u0 | u] = σ² C (C + σ²)⁻¹
    prox(x) = argmin_y ½|y − x|² − step log p(y) = m + C (C + step)⁻¹ (x − m)      (T the identity)

C is diagonal, a matrix, or stationary on a periodic or padded grid; each of these is diagonal in its own basis (the
unit vectors, the eigenvectors, the Fourier modes), where a noise level for each item costs nothing extra. Only a
padded stationary covariance has no such basis: up to 4096 entries it is turned into a matrix, beyond that `denoise`
and `prox` run conjugate gradients and `log_prob` is refused.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invgen.contracts import check_batch
from invgen.covariance import Covariance, Dense, Diagonal, Stationary, as_covariance
from invgen.driver import Streams
from invgen.grid import Grid
from invgen.linalg import cg
from invgen.priors._closed_form import DENSE_LIMIT, ClosedForm, Eigen, closest_dense, congruence, draws_together
from invgen.priors.correlations import stationary_covariance
from invgen.transforms import Affine, Exp, Transform

__all__ = ["GaussianPrior"]


class GaussianPrior(ClosedForm):
    """u ~ N(mean, covariance), x = T(u).

    Has `sample`, `HasDensity`, `HasLatent`, `HasDenoiser` and `HasProx` (affine T), all exact.

    Args:
        mean: `(dim,)` or `(channels, *spatial)` in the coordinates u, or a number together with `shape` or `grid`.
        covariance: in u: a variance, a tensor of variances of the item's shape, an `(n, n)` matrix over the flattened
            item, or a `Covariance`.
        shape: of one item, where the mean is a number.
        grid: where the field lives.
        transform: x = T(u); the identity when omitted.

    Raises:
        ValueError: shapes that do not fit, non-finite means, variances that are not positive.

    Example:
        >>> prior = GaussianPrior.stationary(grid, variance=0.04, length=(30.0, 200.0), padding="auto", mean=8.6)
        >>> x = prior.sample(4, seed=0)
    """

    def __init__(
        self,
        mean: Tensor | float,
        covariance: Covariance | Tensor | float,
        *,
        shape: tuple[int, ...] | None = None,
        grid: Grid | None = None,
        transform: Transform | None = None,
    ) -> None:
        given = torch.as_tensor(mean, dtype=torch.float64)
        if shape is None:
            known = (
                given.shape
                if given.ndim
                else grid.field_shape
                if grid is not None
                else getattr(covariance, "shape", ())
            )
            shape = tuple(known)
        if not shape:
            raise ValueError(
                "A Gaussian prior with a number as mean does not know its shape; give shape=, grid= or a mean tensor."
            )
        super().__init__(shape, grid, transform)
        if given.ndim and tuple(given.shape) != self.shape:
            raise ValueError(
                f"The mean has the shape {tuple(given.shape)} but the prior {self.shape}; give a number or one value an entry."
            )
        if not bool(torch.isfinite(given).all()):
            raise ValueError("The mean of a Gaussian prior must be finite; mask or fill the missing entries first.")
        self.mean_u = given.expand(self.shape).contiguous()
        if isinstance(covariance, Tensor) and covariance.ndim == 2 and tuple(covariance.shape) != self.shape:
            covariance = Dense(covariance.double(), self.shape)
        if isinstance(covariance, Tensor) and covariance.ndim and tuple(covariance.shape) != self.shape:
            raise ValueError(
                f"The variances have the shape {tuple(covariance.shape)} but the prior {self.shape}; give one value an entry or an (n, n) matrix."
            )
        self.covariance_u = as_covariance(
            covariance.double() if isinstance(covariance, Tensor) else covariance, self.shape
        )
        self.latent_shape: tuple[int, ...] = tuple(getattr(self.covariance_u, "noise_shape", self.shape))
        self._eigen: Eigen | None = None
        self._exact: Covariance | None = None
        self._x: GaussianPrior | None = None

    # --- other ways to make one ------------------------------------------------------------------------------------

    @classmethod
    def dense(cls, mean: Tensor, matrix: Tensor, **options: Any) -> GaussianPrior:
        """N(mean, matrix): `(n, n)` over the flattened item; options are those of the constructor."""
        return cls(mean, Dense(torch.as_tensor(matrix).double(), tuple(mean.shape)), **options)

    @classmethod
    def diagonal(cls, mean: Tensor | float, variance: Tensor | float, **options: Any) -> GaussianPrior:
        """Independent entries; the mean or the variance may be a number."""
        variance = torch.as_tensor(variance, dtype=torch.float64)
        if variance.ndim and "shape" not in options and not torch.as_tensor(mean).ndim:
            options["shape"] = tuple(variance.shape)
        return cls(mean, Diagonal(variance) if variance.ndim else float(variance), **options)

    @classmethod
    def stationary(
        cls,
        where: Grid | tuple[int, ...],
        *,
        length: float | tuple[float, ...],
        variance: float | tuple[float, ...] | None = None,
        sd: float | None = None,
        kind: str = "matern",
        nu: float = 1.0,
        angle: float = 0.0,
        nugget: float = 0.0,
        padding: int | tuple[int, ...] | str = 0,
        mean: Tensor | float = 0.0,
        spacing: tuple[float, ...] | None = None,
        transform: Transform | None = None,
    ) -> GaussianPrior:
        """A stationary random field; see `stationary_covariance` for the rule about negative eigenvalues.

        Args:
            where: a `Grid`, or the shape `(channels, *spatial)` with `spacing` (1 when omitted).
            length: correlation length, one number or one an axis (anisotropy), in the unit of the spacing.
            variance, sd: marginal variance (one, or one a channel) or standard deviation in u; exactly one of them.
            kind, nu: "matern" (smoothness nu), "gaussian" or "exponential".
            angle: degrees by which the length axes are turned (2-D).
            nugget: white part of the variance.
            padding: samples added to each axis, or "auto"; 0 makes the field periodic.
            mean: number or field in u.
            transform: x = T(u).

        Raises:
            ValueError: both or none of variance and sd, or an embedding that is not positive semi-definite.
        """
        if (variance is None) == (sd is None):
            raise ValueError("A stationary prior takes either variance or sd; give exactly one of them.")
        grid = where if isinstance(where, Grid) else None
        shape = where.field_shape if isinstance(where, Grid) else tuple(where)
        steps = grid.spacing if grid is not None else spacing or (1.0,) * (len(shape) - 1)
        covariance = stationary_covariance(
            shape,
            spacing=steps,
            variance=variance if variance is not None else float(sd or 0.0) ** 2,
            length=length,
            kind=kind,
            nu=nu,
            angle=angle,
            nugget=nugget,
            padding=padding,
        )
        return cls(mean, covariance, shape=shape, grid=grid, transform=transform)

    @classmethod
    def fit(
        cls,
        data: Tensor | np.ndarray,
        *,
        structure: str = "dense",
        shrinkage: str | float | None = "ledoit-wolf",
        mean: str = "field",
        **options: Any,
    ) -> GaussianPrior:
        """Sample mean and (shrunk) sample covariance of `(n, *shape)` examples; see `invgen.priors.fit_gaussian`."""
        from invgen.priors.fitting import fit_gaussian

        return fit_gaussian(data, structure=structure, shrinkage=shrinkage, mean=mean, **options)

    @classmethod
    def examples(cls) -> list[GaussianPrior]:
        """Dense, diagonal under an exponential, periodic and padded stationary ones, with means that are not zero."""
        root = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [-0.3, 0.5, 0.4]], dtype=torch.float64)
        return [
            cls.dense(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), root @ root.T, transform=Affine(0.5, -2.0)),
            cls.diagonal(
                torch.tensor([0.3, -0.2], dtype=torch.float64),
                torch.tensor([0.25, 0.04], dtype=torch.float64),
                transform=Exp(),
            ),
            cls.stationary((1, 4, 3), variance=0.5, length=(1.5, 0.8), mean=2.0, kind="exponential", padding=3),
            cls.stationary((2, 8), variance=(0.5, 2.0), length=1.2, mean=-1.0, nu=1.5),
        ]

    # --- capabilities ----------------------------------------------------------------------------------------------

    def sample(self, n: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """`(n, *shape)` draws of x = f(z); draw i does not depend on n."""
        if n < 1:
            raise ValueError(f"The number of draws must be at least 1, got {n}.")
        chunk = draws_together(self.latent_shape)
        parts = (
            Streams(seed, range(i, min(i + chunk, n)), salt="prior").normal(self.latent_shape, dtype=dtype)
            for i in range(0, n, chunk)
        )
        return torch.cat([self.decode(z) for z in parts])

    def decode(self, z: Tensor) -> Tensor:
        """f(z) = T(m + L z): `(batch, *latent_shape)` to x; with padding the latent lives on the padded grid."""
        check_batch(z, self.latent_shape, f"The z given to {type(self).__name__}.decode")
        return self.transform(self._as("mean", self.mean_u, z) + self.covariance_u.sqrt(z))

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), `(batch,)`, normalised, the Jacobian of T included.

        Raises:
            TypeError: a padded stationary covariance on more than 4096 entries, whose determinant is not known.
        """
        u = self._to_u(x, "log_prob")
        if self._exact is None:
            padded = isinstance(self.covariance_u, Stationary) and not self.covariance_u.periodic
            self._exact = closest_dense(self.covariance_u, "The density") if padded else self.covariance_u
        quadratic = self._exact.whiten(u - self._as("mean", self.mean_u, u)).square().flatten(1).sum(1)
        constant = float(self._exact.logdet()) + self.dim * math.log(2 * math.pi)
        return -0.5 * (quadratic + constant) - self.transform.log_det(u)

    def denoise(self, u: Tensor, sigma: Tensor | float) -> Tensor:
        """E[u0 | u0 + sigma n = u] = m + C (C + sigma²)⁻¹ (u − m).

        Args:
            u: `(batch, *shape)` in the coordinates u. sigma: `(batch,)` or a number.

        Returns:
            `(batch, *shape)`. Cost: elementwise (diagonal), two FFTs (periodic), two matrix products (dense), CG to
            1e-10 (1e-5 in float32) for a padded stationary covariance on more than 4096 entries, where derivatives
            with respect to u (both modes, any order) are solves as well and those to sigma are not available.
        """
        check_batch(u, self.shape, f"The field given to {type(self).__name__}.denoise")
        m, noise = self._as("mean", self.mean_u, u), self._level(sigma, u).square()
        return m + self._shrink(u - m, noise)

    def posterior_covariance_apply(self, v: Tensor, sigma: Tensor | float) -> Tensor:
        """Cov[u0 | u] v = sigma² C (C + sigma²)⁻¹ v, shaped like v; sigma `(batch,)` or a number."""
        check_batch(v, self.shape, f"The field given to {type(self).__name__}.posterior_covariance_apply")
        noise = self._level(sigma, v).square()
        return noise * self._shrink(v, noise)

    def prox(self, x: Tensor, step: float | Tensor) -> Tensor:
        """argmin_y ½|y − x|² − step log p(y), in x; step a number or `(batch,)`.

        Raises:
            TypeError: a transform that is not affine (the problem is not quadratic, and may not be convex).
        """
        check_batch(x, self.shape, f"The x given to {type(self).__name__}.prox")
        law = self.in_x()
        m = law._as("mean", law.mean_u, x)
        return m + law._shrink(x - m, self._level(step, x, "step"))

    def _shrink(self, v: Tensor, noise: Tensor) -> Tensor:
        """C (C + noise)⁻¹ v; noise `(batch or 1, 1, …)`."""
        own = getattr(self.covariance_u, "shrink", None)
        if own is not None:  # a covariance with a basis, or a polynomial, of its own
            return own(v, noise)  # type: ignore[no-any-return]
        padded = isinstance(self.covariance_u, Stationary) and not self.covariance_u.periodic
        if padded and self.dim > DENSE_LIMIT:
            return _Smoother.apply(v, noise, self.covariance_u)
        if self._eigen is None:
            self._eigen = Eigen(self.covariance_u)
        return self._eigen.function(v, lambda values: values / (values + noise))

    # --- the law in x ----------------------------------------------------------------------------------------------

    def in_x(self) -> GaussianPrior:
        """The same law with x as coordinates (T the identity); T must be affine."""
        if self._x is None:
            shift, scale = self._affine_parts("The Gaussian law of x")
            trivial = not bool(shift.any()) and bool((scale == 1).all())
            mean = self.mean_u if trivial else shift + scale * self.mean_u
            covariance = self.covariance_u if trivial else congruence(self.covariance_u, scale)
            self._x = GaussianPrior(mean, covariance, grid=self.grid)
        return self._x

    def mean(self) -> Tensor:
        """E[x], `shape`, float64; affine transforms only."""
        return self.in_x().mean_u

    def covariance(self) -> Covariance:
        """Cov[x]; affine transforms only."""
        return self.in_x().covariance_u

    def given(self, indices: Tensor, values: Tensor) -> GaussianPrior:
        """The law of the other entries of x once some are known: m₁ + C₁₂ C₂₂⁻¹ (v − m₂), C₁₁ − C₁₂ C₂₂⁻¹ C₂₁.

        Args:
            indices: `(k,)` positions in the flattened item. values: `(k,)` values of x there.

        Returns:
            A dense Gaussian on the `n − k` remaining entries, in their order. Cost: O(n³).
        """
        law = self.in_x()
        full = closest_dense(law.covariance_u, "Conditioning")
        matrix = (full.matrix * full.factor).double()
        known = torch.zeros(self.dim, dtype=torch.bool)
        indices, values = torch.as_tensor(indices).long(), torch.as_tensor(values, dtype=torch.float64)
        if (
            indices.ndim != 1
            or indices.shape != values.shape
            or len(set(indices.tolist())) != len(indices)
            or not 0 < len(indices) < self.dim
        ):
            raise ValueError(
                f"given() takes as many distinct indices as values, fewer than {self.dim}; got {tuple(indices.shape)} and {tuple(values.shape)}."
            )
        known[indices] = True
        ordered = torch.full((self.dim,), float("nan"), dtype=torch.float64)
        ordered[indices] = values
        gain = torch.linalg.solve(matrix[known][:, known], matrix[known][:, ~known]).mT
        flat = law.mean_u.flatten()
        left = matrix[~known][:, ~known] - gain @ matrix[known][:, ~known]
        return GaussianPrior.dense(flat[~known] + gain @ (ordered - flat)[known], (left + left.mT) / 2)

    def __repr__(self) -> str:
        return f"GaussianPrior(shape={self.shape}, covariance={type(self.covariance_u).__name__}, transform={type(self.transform).__name__})"


class _Smoother(torch.autograd.Function):
    """C (C + noise)⁻¹ v by conjugate gradients: linear and self-adjoint in v, hence its own derivative."""

    @staticmethod
    def forward(v: Tensor, noise: Tensor, covariance: Covariance) -> Tensor:
        rtol = 1e-10 if v.dtype == torch.float64 else 1e-5
        solved = cg(lambda w: covariance.apply(w) + noise * w, covariance.apply(v), rtol=rtol, max_iter=2000)
        if not bool(solved.converged.all()):
            worst = float(solved.residual.max())
            raise RuntimeError(
                f"The denoiser of the padded field did not converge in {solved.iterations} iterations (relative residual {worst:.1e}); add a nugget, or use a periodic grid."
            )
        return solved.x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Covariance], output: Tensor) -> None:
        _, ctx.noise, ctx.covariance = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _Smoother.apply(grad, ctx.noise, ctx.covariance), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:  # type: ignore[override]
        return _Smoother.apply(tangent, ctx.noise, ctx.covariance)
