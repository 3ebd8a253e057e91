r"""Gaussian random fields on grids: one class, nine ways to simulate, and what each of them knows about its own law.

Linear methods are x = T(μ + P z), z ~ N(0, I), with P Pᵀ = Σ:

    method        Σ                                       density, encode           denoise          draw, n nodes
    cholesky      C                                       yes                       exact            n² after n³/3
    circulant     C                                       up to 4096 nodes (1)      exact (CG)       2 FFTs of the embedding
    periodic      C on a torus                            yes                       exact            2 FFTs
    dct           C between reflecting boundaries         yes                       exact            1 DCT
    kl            its r leading eigenvectors              with all of them          exact            n r
    spde          P(M) D² P(M), Matérn, may vary          without a margin          exact            a polynomial of M
    sequential    B⁻¹ S² B⁻ᵀ, near C                      yes                       exact (CG)       a sparse solve

    (1) A block of a circulant matrix has no cheap determinant or inverse: larger fields have no `log_prob`, and no `encode` at all.

Two methods are Gaussian only in the limit of many terms, and only draw (waves also at points off the grid, `at`):

    spectral         waves of random frequency             (Shinozuka; one matrix product on a grid)
    turning_bands    lines of random direction             (Matheron; two and three dimensions)

Default: "cholesky" up to 1024 nodes, where everything is closed form and cheapest, "circulant" beyond, the cheapest exact
method for any stationary C. Take "dct" or "periodic" for a density on large grids, "spde" for ranges that vary in space.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invgen.covariance import Covariance, Dense
from invgen.grid import Grid
from invgen.priors._circulant import Embedding, embed
from invgen.priors._closed_form import DENSE_LIMIT
from invgen.priors._cosine import cosine_covariance
from invgen.priors._covariance_model import smooth_and_nugget
from invgen.priors._karhunen_loeve import expand
from invgen.priors._sequential import sequential_covariance
from invgen.priors._spde import spde_covariance
from invgen.priors._waves import Lines, generator, waves_at, waves_on_grid
from invgen.priors.covariance_models import (
    CovarianceModel,
    Cubic,
    Exponential,
    Matern,
    Nugget,
    Spherical,
)
from invgen.priors.gaussian import GaussianPrior
from invgen.transforms import Affine, Exp, Identity, Transform

__all__ = ["RandomField"]

LINEAR = ("cholesky", "circulant", "periodic", "dct", "kl", "spde", "sequential")
LIMIT = ("spectral", "turning_bands")
_SMALL = 1024  # nodes up to which "auto" takes a matrix


class RandomField:
    """A Gaussian random field of a given covariance on a grid; what it knows of its law depends on the method.

    u ~ N(mean, Σ), x = T(u). Linear methods are `GaussianPrior`s: `sample`, `decode`, `denoise`, `prox`, `posterior_covariance_apply`, and, where the
    table of the module says so, `log_prob` and `encode`. The others have `sample` and `at`.

    Args:
        covariance: of `invgen.priors.covariance_models`, in the unit of the grid; channels are independent and alike.
        where: a `Grid`, or the shape `(channels, *spatial)` with `spacing` (1 when omitted).
        method: "auto" or one of the table.
        mean: number or field in u.
        spacing: distance between samples, where `where` is a shape.
        transform: x = T(u); `Exp()` for a lognormal field, `invgen.anamorphosis` for other marginals.
        **options: circulant: padding ("minimal", or samples an axis). kl: rank, energy (share of the variance, 0.999). spde:
            length, angle (fields), margin (cells), tolerance (1e-6). sequential: neighbours (32), path_seed. spectral:
            modes (1000). turning_bands: bands (500), step (of the lines, in the smallest spacing; 0.25).

    Attributes:
        model: the covariance. method: what was chosen. embedding: sizes and negative eigenvalues ("circulant", "periodic").

    Raises:
        ValueError: a covariance that is not positive definite on the grid, an unknown method or option, shapes that do not fit.
        TypeError: a covariance that the method cannot simulate.

    Example:
        >>> field = RandomField(Matern(nu=1.0, length=20.0) + Nugget(variance=0.1), (1, 512, 512))
        >>> x = field.sample(4, seed=0)
    """

    # what every one of them has; set by the subclasses that `__new__` chooses between
    shape: tuple[int, ...]
    grid: Grid | None
    transform: Transform
    model: CovarianceModel
    method: str
    embedding: Embedding | None

    def __new__(
        cls,
        covariance: CovarianceModel | None = None,
        where: Grid | tuple[int, ...] = (),
        *,
        method: str = "auto",
        **options: Any,
    ) -> RandomField:
        if cls is not RandomField:
            return super().__new__(cls)
        if covariance is None:  # copies and pickles of a subclass never come here
            raise TypeError("A RandomField needs a covariance, e.g. Matern(nu=1.5, length=30.0).")
        shape = where.field_shape if isinstance(where, Grid) else tuple(where)
        method = choose(method, shape)
        if method in LIMIT:
            return super().__new__(_WaveField)
        density, inverse = _knows(method, shape, options)
        if density:
            return super().__new__(_GaussianField if inverse else _EmbeddedField)
        return super().__new__(_TruncatedField if inverse else _CutField)

    def __init__(
        self,
        covariance: CovarianceModel,
        where: Grid | tuple[int, ...],
        *,
        method: str = "auto",
        mean: Tensor | float = 0.0,
        spacing: Sequence[float] | None = None,
        transform: Transform | None = None,
        **options: Any,
    ) -> None:
        raise NotImplementedError  # the subclasses have their own

    def _describe(
        self, covariance: CovarianceModel, where: Grid | tuple[int, ...], method: str, spacing: Sequence[float] | None
    ) -> None:
        grid = where if isinstance(where, Grid) else None
        shape = grid.field_shape if grid is not None else tuple(int(s) for s in where)  # type: ignore[union-attr]
        d = len(shape) - 1
        if not 1 <= d <= 3 or min(shape) < 1:
            raise ValueError(f"A random field has the shape (channels, *spatial) with one to three axes, got {shape}.")
        if not isinstance(covariance, CovarianceModel):
            raise TypeError(
                f"The covariance must be one of invgen.priors.covariance_models, got {type(covariance).__name__}; a matrix or a Covariance goes to GaussianPrior."
            )
        steps = grid.spacing if grid is not None else tuple(float(s) for s in spacing or (1.0,) * d)
        if len(steps) != d or not all(math.isfinite(s) and s > 0 for s in steps):
            raise ValueError(f"The spacing needs one positive number for each of the {d} axes, got {steps}.")
        self.model, self.method, self.spacing, self.embedding = covariance, choose(method, shape), steps, None
        self.shape, self.grid = shape, grid
        reach = covariance.range(d)
        width = [n * s for n, s in zip(shape[1:], steps, strict=True)]
        if any(r > w and n > 1 for r, w, n in zip(reach, width, shape[1:], strict=True)):
            warnings.warn(
                f"The practical range of the covariance ({', '.join(f'{r:.4g}' for r in reach)}) is larger than the domain "
                f"({', '.join(f'{w:.4g}' for w in width)}): each draw shows less of its variance than the model has.",
                stacklevel=4,
            )

    def sample(self, n: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """`(n, *shape)` draws of x; draw i does not depend on n."""
        raise NotImplementedError

    @classmethod
    def examples(cls) -> list[RandomField]:
        """Every method on a small grid."""
        rough = Exponential(length=0.8, variance=0.5) + Nugget(variance=0.1)
        smooth = Matern(nu=1.0, length=(1.1, 0.8), variance=2.0)
        grid = Grid((4, 3), (1.0, 1.0))
        shapes: dict[str, Any] = {"where": (1, 4, 3), "mean": 1.5}
        varying = torch.linspace(0.8, 1.6, 12, dtype=torch.float64).reshape(4, 3)
        return [
            RandomField(Spherical(length=3.0), grid, method="cholesky", mean=-1.0, transform=Affine(0.5, -2.0)),
            RandomField(rough, (1, 4, 3), method="circulant", mean=2.0),
            RandomField(Exponential(length=1.0), (2, 8), method="periodic", mean=-1.0),
            RandomField(Exponential(length=0.8, variance=0.3), method="dct", transform=Exp(), **shapes),
            RandomField(smooth, method="kl", energy=1.0, **shapes),
            RandomField(smooth, method="kl", rank=5, **shapes),
            RandomField(smooth, method="spde", tolerance=1e-12, **shapes),
            RandomField(smooth, method="spde", length=varying, margin=1, tolerance=1e-12, **shapes),
            RandomField(rough, method="sequential", neighbours=4, **shapes),
            RandomField(Cubic(length=3.0), method="spectral", modes=50, **shapes),
            RandomField(smooth, method="turning_bands", bands=30, **shapes),
        ]

    def __repr__(self) -> str:
        return f"RandomField({self.model}, shape={self.shape}, method={self.method!r})"


def choose(method: str, shape: tuple[int, ...]) -> str:
    """The method that "auto" stands for; the cost table of `benchmarks/random_field.py` is behind it."""
    if method == "auto":
        return "cholesky" if math.prod(shape) <= _SMALL else "circulant"
    if method not in (*LINEAR, *LIMIT):
        raise ValueError(f"The method {method!r} is unknown; use 'auto' or one of {', '.join((*LINEAR, *LIMIT))}.")
    return method


def _knows(method: str, shape: tuple[int, ...], options: dict[str, Any]) -> tuple[bool, bool]:
    """Whether a linear method has a density, and a white noise for every field."""
    n = math.prod(shape)
    if method == "circulant":
        return n <= DENSE_LIMIT, False
    if method == "kl":
        return options.get("rank") == n or (options.get("rank") is None and options.get("energy") == 1), True
    whole = not (method == "spde" and np.any(options.get("margin", 0)))
    return whole, whole


def _covariance(
    model: CovarianceModel, shape: tuple[int, ...], spacing: Sequence[float], method: str, options: dict[str, Any]
) -> tuple[Covariance, Embedding | None]:
    """Σ of a linear method, and how it was embedded."""
    rank, energy = options.pop("rank", None), options.pop("energy", 0.999)
    try:
        if method == "circulant":
            return embed(model, shape, spacing, **options)
        if method == "periodic":
            return embed(model, shape, spacing, padding=0, **options)
        if method == "dct":
            return cosine_covariance(model, shape, spacing, **options), None
        if method == "spde":
            return spde_covariance(model, shape, spacing, **options), None
        if method == "sequential":
            seed = options.pop("path_seed", 0)
            return sequential_covariance(model, shape, spacing, seed=seed, **options), None
        if options:
            raise TypeError(f"unexpected options {sorted(options)}")
    except TypeError as error:
        if "unexpected" in str(error):
            raise ValueError(f"method={method!r} does not take these options: {error}.") from None
        raise
    if method == "kl" and math.prod(shape) > DENSE_LIMIT:
        full, how = embed(model, shape, spacing)
        return expand(full, rank=rank, energy=energy), how
    matrix = covariance_matrix(model, shape, spacing)
    if method == "kl":
        return expand(_Matrix(matrix, shape), rank=rank, energy=energy), None
    try:
        return Dense(matrix, shape), None
    except ValueError:
        smallest, largest = (float(v) for v in torch.linalg.eigvalsh(matrix)[[0, -1]])
        raise ValueError(
            f"The covariance is not positive definite on this grid in float64 (eigenvalues from {smallest:.2g} to {largest:.2g}): add a "
            "Nugget, shorten the range, or use method='kl'."
        ) from None


class _Matrix(Covariance):
    """A matrix that need not be positive definite, for its eigenvectors."""

    def __init__(self, matrix: Tensor, shape: tuple[int, ...]) -> None:
        self.matrix, self.shape = matrix, shape

    def dense(self) -> Tensor:
        return self.matrix

    def diagonal(self) -> Tensor:
        return self.matrix.diagonal().reshape(self.shape)


def covariance_matrix(model: CovarianceModel, shape: tuple[int, ...], spacing: Sequence[float]) -> Tensor:
    """C between all nodes of `(channels, *spatial)`, `(n, n)` float64."""
    spatial = tuple(shape[1:])
    table = model.on_axes([np.arange(1 - n, n) * s for n, s in zip(spatial, spacing, strict=True)])
    numbers = np.stack(np.meshgrid(*[np.arange(n) for n in spatial], indexing="ij"), -1).reshape(-1, len(spatial))
    lags = numbers[:, None] - numbers[None] + np.asarray(spatial) - 1
    one = table[tuple(lags[..., i] for i in range(len(spatial)))]
    return torch.from_numpy(np.kron(np.eye(shape[0]), one))


class _GaussianField(GaussianPrior, RandomField):
    """A field that is linear in white noise, with its density."""

    def __init__(
        self,
        covariance: CovarianceModel,
        where: Grid | tuple[int, ...],
        *,
        method: str = "auto",
        mean: Tensor | float = 0.0,
        spacing: Sequence[float] | None = None,
        transform: Transform | None = None,
        **options: Any,
    ) -> None:
        self._describe(covariance, where, method, spacing)
        law, self.embedding = _covariance(covariance, self.shape, self.spacing, self.method, dict(options))
        GaussianPrior.__init__(self, mean, law, shape=self.shape, grid=self.grid, transform=transform)

    sample = GaussianPrior.sample
    __repr__ = RandomField.__repr__

    @classmethod
    def examples(cls) -> list[RandomField]:  # type: ignore[override]
        """Those of `RandomField`."""
        return RandomField.examples()

    def encode(self, x: Tensor) -> Tensor:
        """z with decode(z) = x, `(batch, *latent_shape)`; of a truncated expansion, that of the projection of x."""
        u = self._to_u(x, "encode")
        law = self.covariance_u
        return law.whiten(u - self._as("mean", self.mean_u, u))


# a prior *has* what it truly has: a method set to None is absent to `isinstance(prior, HasDensity)`
class _EmbeddedField(_GaussianField):
    """Cut out of an embedding, small enough for a density by a matrix; many white noises give one field."""

    encode = None  # type: ignore[assignment]


class _TruncatedField(_GaussianField):
    """In a subspace: no density."""

    log_prob = None  # type: ignore[assignment]


class _CutField(_EmbeddedField):
    """Cut out of a larger grid, without a cheap determinant or inverse."""

    log_prob = None  # type: ignore[assignment]


class _WaveField(RandomField):
    """A field that is Gaussian only in the limit of many waves or bands. Cost: one draw after the other."""

    def __init__(
        self,
        covariance: CovarianceModel,
        where: Grid | tuple[int, ...],
        *,
        method: str = "auto",
        mean: Tensor | float = 0.0,
        spacing: Sequence[float] | None = None,
        transform: Transform | None = None,
        **options: Any,
    ) -> None:
        self._describe(covariance, where, method, spacing)
        self.transform = transform or Identity()
        given = torch.as_tensor(mean, dtype=torch.float64)
        if (given.ndim and tuple(given.shape) != self.shape) or not bool(torch.isfinite(given).all()):
            raise ValueError(
                f"The mean is a finite number or field of the shape {self.shape}, got {tuple(given.shape)}."
            )
        self.mean_u = given.expand(self.shape)
        default = {"modes": 1000} if self.method == "spectral" else {"bands": 500, "step": 0.25}
        if set(options) - set(default):
            raise ValueError(f"method={self.method!r} takes the options {sorted(default)}, got {sorted(options)}.")
        self.options = {**default, **options}
        if not all(v > 0 for v in self.options.values()):
            raise ValueError(f"Modes, bands and steps must be positive, got {self.options}.")
        if self.method == "turning_bands" and len(self.shape) == 2:
            raise ValueError("Turning bands need two or three axes; a line is simulated by 'circulant'.")

    def _one(self, seed: int, item: int, channel: int, dtype: torch.dtype) -> Tensor:
        spatial, rng = self.shape[1:], generator(seed, item, channel, 0)
        if self.method == "spectral":
            return waves_on_grid(self.model, spatial, self.spacing, int(self.options["modes"]), rng, dtype)
        d = len(spatial)
        places = [
            (np.arange(n) * s).astype(np.float32).reshape(-1, *(1,) * (d - 1 - i))
            for i, (n, s) in enumerate(zip(spatial, self.spacing, strict=True))
        ]
        out = np.zeros(spatial, dtype=np.float64 if dtype == torch.float64 else np.float32)
        for lines in self._lines(rng, np.zeros(d), np.array([p.max() for p in places])):
            lines.add(out, places)
        return torch.from_numpy(out)

    def _lines(self, rng: np.random.Generator, low: np.ndarray, high: np.ndarray) -> list[Lines]:
        step = float(self.options["step"]) * min(self.spacing)
        parts = smooth_and_nugget(self.model)[0]
        return [Lines(p, int(self.options["bands"]), low, high, step, rng) for p in parts]

    @torch.no_grad()
    def sample(self, n: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """`(n, *shape)` draws of x; draw i does not depend on n."""
        if n < 1:
            raise ValueError(f"The number of draws must be at least 1, got {n}.")
        nugget = smooth_and_nugget(self.model)[1]
        out = torch.empty(n, *self.shape, dtype=dtype)
        for i in range(n):
            for c in range(self.shape[0]):
                out[i, c] = self._one(seed, i, c, dtype)
                if nugget:
                    white = generator(seed, i, c, 1).standard_normal(self.shape[1:], dtype=np.float32)
                    out[i, c] += math.sqrt(nugget) * torch.from_numpy(white)
        out += self.mean_u.to(out)
        return self.transform(out)

    def at(self, points: Tensor | np.ndarray, n: int = 1, *, seed: int = 0) -> Tensor:
        """The same draws at any points ("spectral" alone, without the nugget), `(n, channels, m)` float64 in u less the mean.

        Args:
            points: `(m, d)` in the unit of the grid; of a `Grid`, in its coordinates.
        """
        if self.method != "spectral":
            raise TypeError("Turning bands are drawn on the grid; use method='spectral' for points off it.")
        p = np.asarray(points, dtype=np.float64)
        if p.ndim != 2 or p.shape[1] != len(self.shape) - 1:
            raise ValueError(f"Points are (m, {len(self.shape) - 1}) coordinates, got the shape {p.shape}.")
        if self.grid is not None:
            p = p - np.asarray(self.grid.origin)
        modes = int(self.options["modes"])
        draws = [
            [waves_at(self.model, p, modes, generator(seed, i, c, 0)) for c in range(self.shape[0])] for i in range(n)
        ]
        return torch.from_numpy(np.array(draws))
