r"""Diffusion priors in sigma space, after Karras et al. 2022 (EDM, arXiv:2206.00364).

A clean field u0 and its noisy version u = u0 + sigma n, n ~ N(0, I): the *denoiser* D(u, sigma) = E[u0 | u] is the
whole model, because the score is (D(u, sigma) − u) / sigma² (Tweedie). The network F enters through the
preconditioning of EDM, table 1 and equation 7,

    D(u, sigma) = c_skip u + c_out F(c_in u, ln(sigma)/4),
    c_skip = s²/(sigma² + s²),  c_out = sigma s/√(sigma² + s²),  c_in = 1/√(sigma² + s²),

with s the standard deviation of the training data in the coordinates u, and is trained by denoising with the weight
(sigma² + s²)/(sigma s)², which makes the loss of an untrained network 1 at every noise level.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from invgen.checkpoints import read_checkpoint, write_checkpoint
from invgen.contracts import check_batch
from invgen.grid import Grid
from invgen.priors import networks
from invgen.schedules import sigma_schedule
from invgen.transforms import Affine, Identity, Transform

__all__ = ["DepthChannel", "DiffusionPrior", "sigma_schedule"]


@dataclass(frozen=True)
class DepthChannel:
    """Two input channels that tell the network how deep a row is: depth / scale, and 1 where depth is known.

    Args:
        scale: metres that map to 1.
    """

    scale: float = 2000.0

    def build(self, grid: Grid, depth: Tensor | None) -> Tensor:
        """`(2, *grid.shape)`; depth `(grid.shape[0],)` in metres, zeros and "unknown" when None."""
        out = torch.zeros(2, *grid.shape)
        if depth is not None:
            if tuple(depth.shape) != grid.shape[:1]:
                raise ValueError(
                    f"depth has the shape {tuple(depth.shape)} but the grid has {grid.shape[0]} rows; give one depth in metres a row."
                )
            out[0] = (depth.to(torch.float32) / self.scale).reshape(-1, *(1,) * (len(grid.shape) - 1))
            out[1] = 1.0
        return out


class DiffusionPrior(nn.Module):
    """A learned prior p(u) known through its denoiser E[u0 | u0 + sigma n = u]; x = T(u).

    Has: `sample` (probability-flow or stochastic sampler), `HasDenoiser`; `decode` by a stated number of Heun steps
    from the largest noise level (`HasLatent`: the latent is the noise).

    Args:
        network: maps `(batch, channels + extra, *spatial)` and `(batch,)` to `(batch, channels, *spatial)`.
        shape: `(channels, *spatial)` or `(dim,)` of one field.
        transform: x = T(u); the identity when omitted.
        grid: where the field lives.
        sigma_data: s, standard deviation of u over the training data.
        sigma_min, sigma_max: range of noise levels the network was trained for.
        mean_variance_of_field: variance over training examples of a field's mean, in u: it decides how much noise
            swamps the largest mode of a grid (see `start_sigma`).
        depth: how the depth channels are made, or None for a network without them.
        latent_steps: Heun steps of `decode`.
    """

    context: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        shape: tuple[int, ...],
        *,
        transform: Transform | None = None,
        grid: Grid | None = None,
        sigma_data: float = 1.0,
        sigma_min: float = 0.002,
        sigma_max: float = 300.0,
        mean_variance_of_field: float = 0.25,
        depth: DepthChannel | None = None,
        latent_steps: int = 18,
    ) -> None:
        super().__init__()
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"A diffusion prior needs 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}.")
        self.network, self.shape, self.grid = network, tuple(shape), grid
        self.transform = transform or Identity()
        self.sigma_data, self.sigma_min, self.sigma_max = float(sigma_data), float(sigma_min), float(sigma_max)
        self.mean_variance_of_field = float(mean_variance_of_field)
        self.depth, self.latent_steps, self.latent_shape = depth, latent_steps, self.shape
        self.noise_levels = (-0.7, 1.6)  # mean and sd of ln(sigma / s) in training
        self.precision: torch.dtype | None = None
        self.evaluations = 0
        if grid is not None and grid.field_shape != self.shape:
            raise ValueError(f"The prior's shape {self.shape} does not fit its grid {grid.field_shape}.")
        if depth is not None:
            if grid is None:
                raise ValueError("A prior with depth channels needs a grid to know how deep its rows are.")
            self.register_buffer("context", depth.build(grid, _depth_of(grid)), persistent=False)
        else:
            self.context = None
        self.seen: dict[str, Any] = {}

    # --- the model -------------------------------------------------------------------------------------------------

    def denoise(self, u: Tensor, sigma: Tensor | float) -> Tensor:
        """D(u, sigma) = E[u0 | u0 + sigma n = u].

        Args:
            u: `(batch, *shape)`, in the coordinates u. sigma: `(batch,)` or a number.

        Returns:
            `(batch, *shape)` in u's dtype; the network itself runs in its own dtype (and under `precision`).
        """
        check_batch(u, self.shape, f"The field given to {type(self).__name__}.denoise")
        return self._denoise(u, sigma, self.context)

    def _denoise(self, u: Tensor, sigma: Tensor | float, context: Tensor | None) -> Tensor:
        self.evaluations += u.shape[0]
        dtype = next(self.network.parameters()).dtype
        s = torch.as_tensor(sigma, dtype=torch.float64, device=u.device).expand(u.shape[0])
        total = (s.square() + self.sigma_data**2).sqrt()
        wide = (-1, *(1,) * (u.ndim - 1))
        c_skip = (self.sigma_data / total).square().to(dtype).reshape(wide)
        c_out = (s * self.sigma_data / total).to(dtype).reshape(wide)
        c_in = (1 / total).to(dtype).reshape(wide)
        # the network has seen nothing outside its training range: hold the embedding at the ends of it
        noise = (s.clamp(self.sigma_min, self.sigma_max).log() / 4).to(dtype)
        v = u.to(dtype)
        inputs = c_in * v
        if context is not None:
            inputs = torch.cat([inputs, context.to(inputs).expand(u.shape[0], *context.shape[-u.ndim + 1 :])], dim=1)
        if self.precision is not None and dtype == torch.float32:
            with torch.autocast(u.device.type, dtype=self.precision):
                out = self.network(inputs, noise)
        else:
            out = self.network(inputs, noise)
        return (c_skip * v + c_out * out.to(dtype)).to(u.dtype)

    def loss(self, x: Tensor, sigma: Tensor, noise: Tensor, context: Tensor | None = None) -> Tensor:
        """Weighted denoising loss of each example, `(batch,)`: EDM equation 8, averaged over the entries of a field.

        Args:
            x: `(batch, *shape)` clean fields in physical units (any spatial size). sigma: `(batch,)`.
            noise: like x, standard normal. context: `(batch, extra, *spatial)` or None.
        """
        u = self.transform.inverse(x)
        s = sigma.reshape(-1, *(1,) * (x.ndim - 1))
        error = self._denoise(u + s * noise, sigma, context) - u
        weight = (sigma.square() + self.sigma_data**2) / (sigma * self.sigma_data).square()
        return weight * error.square().flatten(1).mean(1)

    def training_loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """Loss of each example of `{"x": …, "context": …}` at a random noise level, ln(sigma/s) ~ N(noise_levels).

        The noise is drawn on the CPU from `generator`, so that a run does not depend on the device.
        """
        x = batch["x"]
        mean, sd = self.noise_levels
        # stratified over the batch: same law for each example, less variance of the mean
        ranks = (
            torch.randperm(x.shape[0], generator=generator) + torch.rand(x.shape[0], generator=generator)
        ) / x.shape[0]
        sigma = self.sigma_data * torch.exp(mean + sd * torch.special.ndtri(ranks.double().clamp(1e-6, 1 - 1e-6)))
        sigma = sigma.clamp(self.sigma_min, self.sigma_max).to(x)
        noise = torch.randn(x.shape, generator=generator).to(x)
        return self.loss(x, sigma, noise, batch.get("context"))

    @torch.no_grad()
    def validation(
        self, batch: dict[str, Tensor], levels: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0)
    ) -> dict[str, float]:
        """Root-mean-square denoising error in units of u at fixed noise levels (fixed noise, so runs compare)."""
        x = batch["x"]
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
        figures = {}
        for level in levels:
            sigma = torch.full((x.shape[0],), level * self.sigma_data, dtype=x.dtype, device=x.device)
            weight = (level**2 + 1) / (level * self.sigma_data) ** 2
            total = [
                self.loss(x[i : i + 32], sigma[i : i + 32], noise[i : i + 32], _part(batch.get("context"), i))
                for i in range(0, x.shape[0], 32)
            ]
            figures[f"rmse_at_{level:g}"] = float((torch.cat(total).mean() / weight).sqrt())
        return figures

    # --- where it lives --------------------------------------------------------------------------------------------

    def at(
        self,
        shape: tuple[int, ...],
        *,
        origin: tuple[float, ...] | None = None,
        grid: Grid | None = None,
        depth: Tensor | None = None,
    ) -> DiffusionPrior:
        """The same prior on another grid, the weights shared.

        Args:
            shape: spatial shape of the new grid, e.g. `(550, 800)`.
            origin: coordinate of its first sample; the present one when omitted.
            grid: state the whole grid instead: its spacing and units may differ from the training grid (a time axis,
                say), and then the learned geology is read per sample. That is an assumption; it is never made silently.
            depth: `(rows,)` depth of each row in metres; computed from a grid in metres when omitted, unknown
                otherwise.
        """
        spatial = tuple(shape)
        if grid is None and self.grid is not None:
            grid = self.grid.with_shape(spatial, origin)
        if grid is not None and grid.shape != spatial:
            raise ValueError(f"at() was asked for the shape {spatial} but the grid given has {grid.shape}.")
        if depth is None and grid is not None:
            depth = _depth_of(grid)
        other = DiffusionPrior(
            self.network,
            (self.shape[0], *spatial),
            transform=self.transform,
            grid=grid,
            sigma_data=self.sigma_data,
            sigma_min=self.sigma_min,
            sigma_max=self.sigma_max,
            mean_variance_of_field=self.mean_variance_of_field,
            depth=self.depth,
            latent_steps=self.latent_steps,
        )
        if self.depth is not None and grid is not None:
            other.context = self.depth.build(grid, depth).to(next(self.network.parameters()).device)
        other.precision, other.seen, other.noise_levels = self.precision, self.seen, self.noise_levels
        return other.train(self.training)

    @property
    def start_sigma(self) -> float:
        """Noise that swamps the largest mode of this grid: 7 √(n · Var[field mean]), at least 7 s.

        The mean of n entries is the largest mode of a field with long-range structure; its eigenvalue is n times the
        variance of that mean. A noise level that is enough at 64² loses part of the lowest mode at 800².

        The samplers start from N(D(0, start_sigma), start_sigma²), around the prior's mean: a mode of variance λ loses
        the part λ/(2 start_sigma²) of its standard deviation in `decode`.
        """
        return 7.0 * math.sqrt(max(math.prod(self.shape) * self.mean_variance_of_field, self.sigma_data**2))

    # --- draws -----------------------------------------------------------------------------------------------------

    @classmethod
    def examples(cls) -> list[DiffusionPrior]:
        """A small UNet with random weights on a 16 × 16 grid with a depth axis."""
        grid = Grid((16, 16), (10.0, 10.0), origin=(100.0, 0.0), axes=("z", "x"), units=("m", "m"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = networks.UNet(1, extra=2, widths=(8, 12), blocks=1, patch=2, embedding=16)
            for p in network.parameters():  # the layers that start at zero would make it the trivial denoiser
                p.data.add_(0.05 * torch.randn_like(p))
        prior = cls(
            network, grid.field_shape, grid=grid, transform=Affine(8.5, 0.3), depth=DepthChannel(), latent_steps=4
        )
        return [prior.eval().requires_grad_(False)]

    def sample(
        self, n: int, *, seed: int = 0, steps: int = 64, chunk: int = 16, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """`(n, *shape)` draws of x by ancestral sampling (EDM coordinates); cost `steps` evaluations a draw."""
        from invgen.driver import Streams

        if n < 1:
            raise ValueError(f"The number of draws must be at least 1, got {n}.")
        out = []
        for first in range(0, n, chunk):
            rng = Streams(seed, range(first, min(first + chunk, n)), device=self._device)
            out.append(self._ancestral(rng, steps, dtype))
        return torch.cat(out)

    @torch.no_grad()
    def _ancestral(self, rng: Any, steps: int, dtype: torch.dtype) -> Tensor:
        levels = sigma_schedule(self.sigma_min, self.start_sigma, steps)
        xi = rng.normal(self.shape, dtype=dtype)
        u = self._centre(xi, levels[0]) + levels[0] * xi
        for now, after in itertools.pairwise(levels):
            clean = self.denoise(u, now)
            keep = (after / now) ** 2
            u = clean + keep * (u - clean)
            if after > 0:
                u = u + math.sqrt(keep * (now**2 - after**2)) * rng.normal(self.shape, dtype=dtype)
        return self.transform(u)

    def decode(self, z: Tensor) -> Tensor:
        """f(z), z ~ N(0, I): `latent_steps` Heun steps of the probability-flow ODE (EDM algorithm 1, no churn).

        The start is D(0, σ) + σ z with σ = `start_sigma`. The law of f(z) approaches the prior as `latent_steps` grows; latent solvers target the law of this f.
        """
        check_batch(z, self.latent_shape, f"The z given to {type(self).__name__}.decode")
        levels = sigma_schedule(self.sigma_min, self.start_sigma, self.latent_steps)
        u = self._centre(z, levels[0]) + levels[0] * z
        for now, after in itertools.pairwise(levels):
            slope = (u - self.denoise(u, now)) / now
            ahead = u + (after - now) * slope
            if after > 0:
                slope = 0.5 * (slope + (ahead - self.denoise(ahead, after)) / after)
                ahead = u + (after - now) * slope
            u = ahead
        return self.transform(u)

    def _centre(self, like: Tensor, sigma: float) -> Tensor:
        """D(0, sigma) `(1, *shape)`, the prior's mean where the noise swamps everything: u_sigma is centred there."""
        with torch.no_grad():
            return self.denoise(torch.zeros_like(like[:1]), sigma)

    @property
    def _device(self) -> torch.device:
        return next(self.network.parameters()).device

    # --- disk ------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, *, half: bool = False, card: dict[str, Any] | None = None) -> Path:
        """Write weights and settings as safetensors; `half` stores float16 weights (half the size, 1e-3 relative)."""
        if type(self.network).__name__ not in networks.__all__ or not isinstance(self.transform, (Affine, Identity)):
            raise TypeError(
                f"Only priors with a network of invgen.priors.networks and an affine transform can be saved, this one has {type(self.network).__name__} and {type(self.transform).__name__}."
            )
        meta = {
            "network": type(self.network).__name__,
            "settings": self.network.settings,
            "shape": list(self.shape),
            "grid": self.grid.to_dict() if self.grid else None,
            "sigma_data": self.sigma_data,
            "sigma_min": self.sigma_min,
            "sigma_max": self.sigma_max,
            "mean_variance_of_field": self.mean_variance_of_field,
            "depth": self.depth.scale if self.depth else None,
            "latent_steps": self.latent_steps,
            "card": card or self.seen,
        }
        tensors = {k: v.half() if half and v.is_floating_point() else v for k, v in self.network.state_dict().items()}
        if isinstance(self.transform, Affine):
            tensors |= {"transform.shift": self.transform.shift, "transform.scale": self.transform.scale}
        return write_checkpoint(path, "DiffusionPrior", tensors, meta)

    @classmethod
    def load(cls, path: str | Path) -> DiffusionPrior:
        """Read a checkpoint; nothing in it is executed, and the network class must be one of invgen's."""
        tensors, meta = read_checkpoint(path, "DiffusionPrior")
        if meta.get("network") not in networks.__all__:
            raise ValueError(
                f"{path} names the network {meta.get('network')!r}, which invgen does not have; known are {', '.join(networks.__all__)}."
            )
        try:
            return cls._restore(path, tensors, meta)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"The settings in {path} are incomplete or of another version ({error}); the file is damaged or was edited."
            ) from error

    @classmethod
    def _restore(cls, path: str | Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> DiffusionPrior:
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in meta["settings"].items()}
        network = getattr(networks, meta["network"])(**settings)
        transform = None
        if "transform.shift" in tensors:
            transform = Affine(tensors.pop("transform.shift"), tensors.pop("transform.scale"))
        try:
            network.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in tensors.items()})
        except RuntimeError as error:
            raise ValueError(
                f"The weights in {path} do not fit its network {meta['network']}; the file is damaged or was edited."
            ) from error
        prior = cls(
            network,
            tuple(meta["shape"]),
            transform=transform,
            grid=Grid.from_dict(meta["grid"]) if meta["grid"] else None,
            sigma_data=meta["sigma_data"],
            sigma_min=meta["sigma_min"],
            sigma_max=meta["sigma_max"],
            mean_variance_of_field=meta["mean_variance_of_field"],
            depth=DepthChannel(meta["depth"]) if meta["depth"] else None,
            latent_steps=meta["latent_steps"],
        )
        prior.seen = meta.get("card", {})
        return prior.eval().requires_grad_(False)

    def with_precision(self, precision: torch.dtype | None) -> DiffusionPrior:
        """The same prior, its network evaluated under autocast to `precision` (None: its own dtype)."""
        other = self.at(self.shape[1:], grid=self.grid) if len(self.shape) > 1 else replace_vector(self)
        other.context = self.context
        other.precision = precision
        return other


def _part(context: Tensor | None, first: int) -> Tensor | None:
    return None if context is None else context[first : first + 32]


def replace_vector(prior: DiffusionPrior) -> DiffusionPrior:
    """A shallow copy of a prior on vectors, which have no grid to move to."""
    import copy

    return copy.copy(prior)


def _depth_of(grid: Grid) -> Tensor | None:
    """Depth in metres of each row, when the first axis is one of depth."""
    if grid.axes[0] != "z" or grid.units[0] not in ("m", "km"):
        return None
    return torch.as_tensor(grid.coordinates(0) * (1000.0 if grid.units[0] == "km" else 1.0))
