r"""Independent groups of channels, each with a prior of its own: p(x) = Π_k p_k(x_k), x = (x_1, x_2, …).

    log p(x) = Σ_k log p_k(x_k)          f(z) = (f_1(z_1), f_2(z_2), …)
    E[u0 | u0 + σ n = u] = (D_1(u_1; σ), D_2(u_2; σ), …)          prox(x) = (prox_1(x_1), prox_2(x_2), …)

All of it because independent laws stay independent under independent noise. Each part keeps its own coordinates
x_k = T_k(u_k): one σ serves them all, so that coordinates of about one scale make a good schedule (a Gaussian difference of
sd 0.02 under `Affine(0, 0.02)`, say, beside a learned prior in its own u).

A time-lapse pair is the case in point: (baseline, difference), see `invgen.operators.time_lapse_terms`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from invgen.contracts import HasDenoiser, HasDensity, HasGaussian, HasLatent, HasProx, Prior, check_batch
from invgen.grid import Grid
from invgen.priors._channel_blocks import ChannelBlocks, ChannelTransform, joint_shape, split_joint
from invgen.priors.gaussian import GaussianPrior
from invgen.transforms import Affine, Exp

__all__ = ["ProductPrior"]


class ProductPrior:
    """x = (x_1, x_2, …) along the channel axis, the parts independent.

    Has exactly the capabilities that all parts have: `HasDensity`, `HasLatent`, `HasDenoiser`, `HasProx` and `HasGaussian`.

    Args:
        parts: priors on `(channels_k, *spatial)` with one and the same spatial shape (or on `(dim_k,)`).
        grid: of the whole; made of the parts' grids where all have one and agree on everything but their channels.

    Raises:
        ValueError: no parts, spatial shapes or grids that differ. TypeError: something that is no prior.

    Cost: that of the parts, one after another.

    Example:
        >>> pair = ProductPrior([geology, GaussianPrior.diagonal(zeros, 1.0, transform=Affine(0.0, 0.02))])
    """

    transform: ChannelTransform

    def __new__(cls, parts: Sequence[Any] = (), *, grid: Grid | None = None) -> ProductPrior:
        # a prior *has* the capabilities it truly has: the class is made of those that all parts share
        if cls is not ProductPrior or not parts:
            return super().__new__(cls)
        return super().__new__(_with(tuple(c for c in _SERVED if all(isinstance(p, c) for p in parts))))

    def __init__(self, parts: Sequence[Any] = (), *, grid: Grid | None = None) -> None:
        self.parts = list(parts)
        if not self.parts:
            raise ValueError("A product of priors needs at least one part.")
        for p in self.parts:
            if not isinstance(p, Prior):
                raise TypeError(f"A part of a product is a {type(p).__name__}, which is no prior.")
        shapes = [tuple(p.shape) for p in self.parts]
        if len({s[1:] for s in shapes}) != 1:
            raise ValueError(f"Parts of a product share their spatial shape, got {shapes}; crop or resample them.")
        self.sizes = [s[0] for s in shapes]
        self.shape: tuple[int, ...] = (sum(self.sizes), *shapes[0][1:])
        self.grid = grid if grid is not None else _joined([p.grid for p in self.parts])
        if self.grid is not None and self.grid.field_shape != self.shape:
            raise ValueError(f"The product has the shape {self.shape} but its grid {self.grid.field_shape}.")
        self.transform = ChannelTransform([p.transform for p in self.parts], self.sizes, self.shape)
        self._scales: dict[str, float] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (self.parts, self.grid))  # the class itself is made at run time

    @classmethod
    def examples(cls) -> list[ProductPrior]:
        """Two Gaussians with means that are not zero, one padded; a Gaussian under an exponential; a part without density."""
        from invgen.priors.mixture import GaussianMixturePrior

        field = GaussianPrior.stationary(
            (1, 4, 3),
            variance=0.5,
            length=(1.5, 0.8),
            mean=2.0,
            kind="exponential",
            padding=3,
            transform=Affine(1.0, 0.5),
        )
        small = GaussianPrior.diagonal(torch.linspace(-0.2, 0.3, 12).reshape(1, 4, 3), torch.full((1, 4, 3), 0.3))
        positive = GaussianPrior.stationary((2, 8), variance=(0.5, 2.0), length=1.2, mean=-1.0, nu=1.5, transform=Exp())
        g = torch.Generator().manual_seed(2)
        two = GaussianMixturePrior(
            torch.tensor([0.3, 0.7], dtype=torch.float64),
            torch.randn(2, 1, 8, generator=g, dtype=torch.float64),
            torch.tensor([0.2, 0.5], dtype=torch.float64),
        )
        return [cls([field, small]), cls([positive, two])]

    def split(self, x: Tensor) -> list[Tensor]:
        """`(batch, channels, *spatial)` into the parts."""
        return list(x.split(self.sizes, dim=1))

    def sample(self, n: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """`(n, *shape)` draws; part k draws with a seed of its own, derived from `seed` and k."""
        if seed < 0:
            raise ValueError(f"The seed must be a non-negative integer, got {seed}.")
        drawn = []
        for k, p in enumerate(self.parts):
            typed = {"dtype": dtype} if "dtype" in inspect.signature(p.sample).parameters else {}
            # part k of the seeds 0, 1, … must not repeat part k + 1 of the others
            drawn.append(p.sample(n, seed=_part_seed(seed, k), **typed).to(dtype))
        return torch.cat(drawn, dim=1)

    @property
    def sigma_data(self) -> float:
        """Root of the mean variance of u, over all channels; parts that do not state theirs are asked for 256 draws."""
        if "data" not in self._scales:
            squares = [_scale(p, "sigma_data", lambda u: math.sqrt(float(u.var(0).mean()))) ** 2 for p in self.parts]
            weights = [math.prod(p.shape) for p in self.parts]
            mean = sum(w * s for w, s in zip(weights, squares, strict=True)) / sum(weights)
            self._scales["data"] = math.sqrt(mean)
        return self._scales["data"]

    @property
    def start_sigma(self) -> float:
        """A level that swamps the largest mode of every part, 7 √λ_max; from 512 draws where a part does not state its."""
        if "start" not in self._scales:
            self._scales["start"] = max(_scale(p, "start_sigma", _seven_modes, 512) for p in self.parts)
        return self._scales["start"]


class _Density:
    def log_prob(self: Any, x: Tensor) -> Tensor:
        """Σ_k log p_k(x_k), `(batch,)`."""
        check_batch(x, self.shape, "The x given to ProductPrior.log_prob")
        return torch.stack([p.log_prob(v) for p, v in zip(self.parts, self.split(x), strict=True)]).sum(0)


class _Latent:
    @property
    def latent_shape(self: Any) -> tuple[int, ...]:
        """Channels joined where every part's latent has its shape, flat elsewhere."""
        return joint_shape(*self._latents())

    def _latents(self: Any) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        return [tuple(p.latent_shape) for p in self.parts], [tuple(p.shape) for p in self.parts]

    def decode(self: Any, z: Tensor) -> Tensor:
        """f(z) = (f_1(z_1), …), `(batch, *latent_shape)` to x."""
        check_batch(z, self.latent_shape, "The z given to ProductPrior.decode")
        pieces = split_joint(z, *self._latents())
        return torch.cat([p.decode(v) for p, v in zip(self.parts, pieces, strict=True)], dim=1)


class _Denoiser:
    def denoise(self: Any, u: Tensor, sigma: Tensor | float) -> Tensor:
        """E[u0 | u0 + sigma n = u], part by part; u `(batch, *shape)`, sigma `(batch,)` or a number."""
        check_batch(u, self.shape, "The field given to ProductPrior.denoise")
        return torch.cat([p.denoise(v, sigma) for p, v in zip(self.parts, self.split(u), strict=True)], dim=1)


class _Prox:
    def prox(self: Any, x: Tensor, step: float | Tensor) -> Tensor:
        """argmin_y ½|y − x|² − step log p(y), part by part."""
        check_batch(x, self.shape, "The x given to ProductPrior.prox")
        return torch.cat([p.prox(v, step) for p, v in zip(self.parts, self.split(x), strict=True)], dim=1)


class _Gaussian:
    @property
    def mean_u(self: Any) -> Tensor:
        """`shape`, float64."""
        return torch.cat([p.mean_u for p in self.parts])

    @property
    def covariance_u(self: Any) -> ChannelBlocks:
        """diag(C_1, C_2, …)."""
        return ChannelBlocks([p.covariance_u for p in self.parts])

    def posterior_covariance_apply(self: Any, v: Tensor, sigma: Tensor | float) -> Tensor:
        """Cov[u0 | u] v, part by part."""
        check_batch(v, self.shape, "The field given to ProductPrior.posterior_covariance_apply")
        pieces = zip(self.parts, self.split(v), strict=True)
        return torch.cat([p.posterior_covariance_apply(w, sigma) for p, w in pieces], dim=1)


_SERVED: dict[Any, type] = {
    HasDensity: _Density,
    HasLatent: _Latent,
    HasDenoiser: _Denoiser,
    HasProx: _Prox,
    HasGaussian: _Gaussian,
}
_MADE: dict[tuple[Any, ...], type[ProductPrior]] = {}


def _with(capabilities: tuple[Any, ...]) -> type[ProductPrior]:
    """The class of products with these capabilities."""
    if capabilities not in _MADE:
        bases = (*(_SERVED[c] for c in capabilities), ProductPrior)
        _MADE[capabilities] = type("ProductPrior", bases, {"__module__": __name__, "__doc__": ProductPrior.__doc__})
    return _MADE[capabilities]


def _rebuild(parts: list[Any], grid: Grid | None) -> ProductPrior:
    return ProductPrior(parts, grid=grid)


def _part_seed(seed: int, k: int) -> int:
    """A seed for part k that no other part has under any seed below 2³¹ / parts."""
    from numpy.random import SeedSequence

    return int(SeedSequence([seed, k + 1]).generate_state(1)[0])


def _joined(grids: list[Grid | None]) -> Grid | None:
    """One grid with the channels of all, None where a part has none."""
    known = [g for g in grids if g is not None]
    if len(known) < len(grids):
        return None
    first = known[0]
    for g in known[1:]:
        same = all(getattr(first, n) == getattr(g, n) for n in ("shape", "spacing", "origin", "axes", "units"))
        if not same:
            raise ValueError(f"The parts of a product live on {first} and on {g}; resample one, or restate its grid.")
    from dataclasses import replace

    return replace(
        first,
        channels=tuple(c for g in known for c in g.channels),
        channel_units=tuple(u for g in known for u in g.channel_units),
    )


def _scale(prior: Any, name: str, measure: Callable[[Tensor], float], draws: int = 256) -> float:
    """What a prior states under `name`, else what its draws in u measure."""
    if hasattr(prior, name):
        return float(getattr(prior, name))
    return measure(prior.transform.inverse(prior.sample(draws, seed=0)))


def _seven_modes(u: Tensor) -> float:
    """7 √λ_max of the sample covariance of draws."""
    flat = u.flatten(1).double()
    flat = flat - flat.mean(0)
    gram = flat @ flat.mT if flat.shape[1] > flat.shape[0] else flat.mT @ flat
    return 7.0 * math.sqrt(float(torch.linalg.eigvalsh(gram)[-1]) / flat.shape[0])
