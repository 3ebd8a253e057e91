r"""Diffusion priors in sigma space, after Karras et al. 2022 (EDM, arXiv:2206.00364).

A clean field u0 and its noisy version u = u0 + sigma n, n ~ N(0, I): the *denoiser* D(u, sigma) = E[u0 | u] is the
whole model, because the score is (D(u, sigma) − u) / sigma² (Tweedie). The network F enters through the
preconditioning of EDM, table 1 and equation 7,

    D(u, sigma) = c_skip u + c_out F(c_in u, ln(sigma)/4),
    c_skip = s²/(sigma² + s²),  c_out = sigma s/√(sigma² + s²),  c_in = 1/√(sigma² + s²),

with s the standard deviation of the training data in the coordinates u, and is trained by denoising with the weight
(sigma² + s²)/(sigma s)², which makes the loss of an untrained network 1 at every noise level.

Networks of the variance-preserving kind (DDPM with ε-, x- or v-prediction) and of flow matching differ by this table
alone (`_preconditioning.py`); their training levels are in `levels.py`, their samplers in `_samplers.py`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from invgen.contracts import check_batch
from invgen.grid import Grid
from invgen.priors import _densities, _samplers, _stored, networks
from invgen.priors._denoising import DenoisingLoss
from invgen.priors._placement import DepthChannel, Placed, depth_of
from invgen.priors._preconditioning import WEIGHTINGS, angular_velocity, coefficients, known
from invgen.priors.conditions import Condition
from invgen.priors.levels import AdaptiveLevels, Levels, LinearBetas
from invgen.schedules import sigma_schedule
from invgen.transforms import Affine, Identity, Transform

__all__ = ["DepthChannel", "DiffusionPrior", "sigma_schedule"]


class DiffusionPrior(DenoisingLoss, Placed, nn.Module):
    """A learned prior p(u) known through its denoiser E[u0 | u0 + sigma n = u]; x = T(u).

    Has: `sample`, `HasDenoiser`, `decode` by a stated number of Heun steps from the largest noise level (`HasLatent`: the
    latent is the noise), `log_prob_estimate` by the probability-flow ODE (`HasDensityEstimate`).

    Args:
        network: maps `(batch, channels + extra, *spatial)` and `(batch,)` to `(batch, channels, *spatial)`.
        shape: `(channels, *spatial)` or `(dim,)` of one field.
        transform: x = T(u); the identity when omitted.
        grid: where the field lives.
        sigma_data: s, standard deviation of u over the training data.
        sigma_min, sigma_max: range of noise levels the network was trained for; `levels` with ends of its own decides.
        mean_variance_of_field: variance over training examples of a field's mean, in u: it decides how much noise
            swamps the largest mode of a grid (see `start_sigma`).
        depth: how the depth channels are made, or None for a network without them.
        latent_steps: Heun steps of `decode`.
        parametrisation: what the network estimates: "edm", or, of a variance-preserving process, the noise ("epsilon"),
            the field ("x") or v = α n − σ_t u0/s ("v"): u_sigma = s x_t/α, sigma = s σ_t/α at the boundary.
        levels: law of the training levels; log-normal for "edm", `LinearBetas()` (DDPM) for the others when omitted.
        weighting: of the squared error: "edm", "epsilon" (DDPM's simple loss), "x", "velocity", "elbo" (VDM: the loss is
            the variational bound in nats an entry, up to a constant), "sigmoid" (Kingma & Gao 2023). The published
            pairing when omitted.
        sigmoid_bias: b of the weight sigmoid(b − log-SNR).
        time: the network is told ln(sigma)/4 ("log_sigma") or the number of the step of `LinearBetas` ("index").
        conditions: name -> `Condition` of a network that learns p(x | conditions); see `given`.
        condition_dropout: share of the training examples that learn p(x) instead.

    Raises:
        ValueError: options that do not exist or fit, or a process that does not reach noise: with sigma_max below 7 s
            the law it starts from in sampling is not the law it ends with in training.
    """

    context: Tensor | None
    blank: Tensor | None
    parametrisations: tuple[str, ...] = ("edm", "epsilon", "x", "v")
    own_settings: tuple[str, ...] = ()  # arguments of a subclass that its files hold

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
        parametrisation: str = "edm",
        levels: Levels | None = None,
        weighting: str | None = None,
        sigmoid_bias: float = 2.0,
        time: str = "log_sigma",
        conditions: dict[str, Condition] | None = None,
        condition_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.network, self.shape, self.grid = network, tuple(shape), grid
        self.transform = transform or Identity()
        self.sigma_data = float(sigma_data)
        self.parametrisation = known(parametrisation, self.parametrisations, "parametrisation")
        if levels is None and parametrisation in ("epsilon", "x", "v"):
            levels = LinearBetas()
        self.levels = levels
        if levels is not None and levels.bounds is not None:
            sigma_min, sigma_max = (self.sigma_data * tau for tau in levels.bounds)
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"A diffusion prior needs 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}.")
        if sigma_max < 7 * self.sigma_data:
            tau = sigma_max / self.sigma_data
            raise ValueError(
                f"The process ends at the noise level {tau:.2g} sigma_data (alpha_bar = {1 / (1 + tau**2):.2g}), which is not noise: samples would start from another law than training ended with; give a sigma_max of at least 7 sigma_data, or a schedule with more steps or a larger last beta."
            )
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)
        natural = {"epsilon": "epsilon", "flow": "velocity"}.get(parametrisation, "edm")
        self.weighting = known(weighting or natural, WEIGHTINGS, "weighting")
        if isinstance(levels, AdaptiveLevels) and self.weighting not in ("elbo", "sigmoid"):
            raise ValueError(
                f"AdaptiveLevels need a loss that is an integral over noise levels, weighting 'elbo' or 'sigmoid', got {self.weighting!r}."
            )
        self.sigmoid_bias, self.time = float(sigmoid_bias), known(time, ("log_sigma", "index"), "time")
        if time == "index":
            (levels or Levels()).index(torch.ones(1, dtype=torch.float64))
        if not 0 <= condition_dropout < 1:
            raise ValueError(f"condition_dropout must lie in [0, 1), got {condition_dropout}.")
        self.conditions, self.condition_dropout = dict(conditions or {}), float(condition_dropout)
        self.condition: Tensor | None = None
        self.weight = 1.0
        self.mean_variance_of_field = float(mean_variance_of_field)
        self.depth, self.latent_steps, self.latent_shape = depth, latent_steps, self.shape
        self.noise_levels = (-0.7, 1.6)  # mean and sd of ln(sigma / s) in training
        self.precision: torch.dtype | None = None
        self.evaluations = 0
        if grid is not None and grid.field_shape != self.shape:
            raise ValueError(f"The prior's shape {self.shape} does not fit its grid {grid.field_shape}.")
        if depth is not None and grid is None:
            raise ValueError("A prior with depth channels needs a grid to know how deep its rows are.")
        self.register_buffer("context", None, persistent=False)
        self.register_buffer("blank", None, persistent=False)
        self._place(depth_of(grid) if grid is not None else None)
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
        return self._denoise(u, sigma, self.context, self.weight)

    def _denoise(self, u: Tensor, sigma: Tensor | float, context: Tensor | None, weight: float = 1.0) -> Tensor:
        dtype = next(self.network.parameters()).dtype
        s = torch.as_tensor(sigma, dtype=torch.float64, device=u.device).expand(u.shape[0])
        wide = (-1, *(1,) * (u.ndim - 1))
        c_skip, c_out, c_in = (
            c.to(dtype).reshape(wide) for c in coefficients(self.parametrisation, s, self.sigma_data)
        )
        v = u.to(dtype)
        return (c_skip * v + c_out * self._output(c_in * v, s, context, weight)).to(u.dtype)

    def _output(self, inputs: Tensor, sigma: Tensor, context: Tensor | None, weight: float = 1.0) -> Tensor:
        """The network F on its own inputs, guided: F(blank) + weight (F(context) − F(blank))."""
        if weight != 1.0:
            free = self._output(inputs, sigma, self.blank)
            return free + weight * (self._output(inputs, sigma, context) - free)
        self.evaluations += inputs.shape[0]
        dtype = inputs.dtype
        # the network has seen nothing outside its training range: hold the embedding at the ends of it
        held = sigma.clamp(self.sigma_min, self.sigma_max)
        noise = (self._law.index(held / self.sigma_data) if self.time == "index" else held.log() / 4).to(dtype)
        if context is not None:
            wide = context.to(inputs).expand(inputs.shape[0], *context.shape[-inputs.ndim + 1 :])
            inputs = torch.cat([inputs, wide], dim=1)
        if self.precision is not None and dtype == torch.float32:
            with torch.autocast(inputs.device.type, dtype=self.precision):
                return self.network(inputs, noise).to(dtype)
        return self.network(inputs, noise).to(dtype)

    def _velocity(self, y: Tensor, t: Tensor, items: Tensor | None = None) -> Tensor:
        """dy/dφ of y = u/√(sigma² + s²) at the angles φ `(batch,)`, tan φ = sigma/s; in y's dtype."""
        network = next(self.network.parameters()).dtype
        out = self._output(y.to(network), self.sigma_data * t.tan(), self.context, self.weight)
        return angular_velocity(self.parametrisation, y, out.to(y), t.to(y).reshape(-1, *(1,) * (y.ndim - 1)))

    @property
    def start_sigma(self) -> float:
        """Noise that swamps the largest mode of this grid: 7 √(n · Var[field mean]), at least 7 s.

        The mean of n entries is the largest mode of a field with long-range structure; its eigenvalue is n times the
        variance of that mean. A noise level that is enough at 64² loses part of the lowest mode at 800².

        The samplers start from N(D(0, start_sigma), start_sigma²), around the prior's mean: a mode of variance λ loses
        the part λ/(2 start_sigma²) of its standard deviation in `decode`. A `LinearBetas` schedule ends where it ends.
        """
        level = 7.0 * math.sqrt(max(math.prod(self.shape) * self.mean_variance_of_field, self.sigma_data**2))
        return min(level, self.sigma_max) if isinstance(self.levels, LinearBetas) else level

    @classmethod
    def of(cls, teacher: Any, **options: Any) -> Self:
        """A model that starts from a copy of another one's network and shares its coordinates; train it on.

        Other noise levels or a weighting for a `DiffusionPrior`; a `FlowMatching` out of a trained diffusion.

        Args:
            teacher: a `DiffusionPrior` whose parametrisation this class knows. options: of the constructor.
        """
        kind = getattr(teacher, "parametrisation", None)
        if kind not in cls.parametrisations:
            raise TypeError(
                f"{cls.__name__}.of takes over a network with a parametrisation of {', '.join(cls.parametrisations)}, got {type(teacher).__name__}{f' with {kind!r}' if kind else ''}; give the constructor a network."
            )
        names = (
            *("transform", "grid", "sigma_data", "sigma_min", "sigma_max", "mean_variance_of_field", "depth"),
            *("conditions", "parametrisation", "time"),
        )
        taken = {name: getattr(teacher, name) for name in names}
        network = copy.deepcopy(teacher.network).requires_grad_(True)
        prior = cls(network, teacher.shape, **{**taken, **options})
        prior.seen = {"started_from": dict(teacher.seen)}
        return prior

    # --- draws -----------------------------------------------------------------------------------------------------

    @classmethod
    def examples(cls) -> list[Any]:
        """A small UNet with random weights on a 16 × 16 grid with a depth axis, and a v-prediction on vectors."""
        grid = Grid((16, 16), (10.0, 10.0), origin=(100.0, 0.0), axes=("z", "x"), units=("m", "m"))
        network = _random(lambda: networks.UNet(1, extra=2, widths=(8, 12), blocks=1, patch=2, embedding=16))
        prior = cls(
            network, grid.field_shape, grid=grid, transform=Affine(8.5, 0.3), depth=DepthChannel(), latent_steps=4
        )
        small = _random(lambda: networks.MLPDenoiser(3, width=8, depth=1))
        vector = cls(small, (3,), parametrisation=cls.parametrisations[-1], latent_steps=4)
        return [p.eval().requires_grad_(False) for p in (prior, vector)]

    def sample(
        self,
        n: int,
        *,
        seed: int = 0,
        steps: int = 32,
        chunk: int = 16,
        dtype: torch.dtype = torch.float32,
        sampler: str = "heun",
        eta: float = 0.0,
        rtol: float = 1e-4,
    ) -> Tensor:
        """`(n, *shape)` draws of x; cost `steps` evaluations a draw, twice that for "heun", as many as it takes for "ode".

        Heun's rule is of second order. On 64 × 64 channels (0.192 sand) 500 draws by 64 ancestral steps held 0.176 ± 0.003,
        256 by 40 of Heun's 0.186 ± 0.003.

        Args:
            steps: levels: EDM's (ρ = 7) from `start_sigma`; evenly spaced steps of a `LinearBetas` schedule for "ancestral"
                and "ddim". chunk: draws at a time.
            sampler: "ancestral" (DDPM), "ddim" with its `eta` ("euler": eta = 0), "heun", "sde" (reverse SDE by
                Euler–Maruyama: biased in proportion to the step), "ode" (probability flow, adaptive to `rtol`).

        Raises:
            ValueError: no draws asked for, or a sampler that does not exist.
        """
        from invgen.driver import Streams

        if n < 1:
            raise ValueError(f"The number of draws must be at least 1, got {n}.")
        self._check_sampler(sampler)
        out = []
        for first in range(0, n, chunk):
            rng = Streams(seed, range(first, min(first + chunk, n)), device=self._device)
            with torch.no_grad():
                out.append(self.transform(self._draw(rng, steps, dtype, sampler, eta, rtol)))
        return torch.cat(out)

    def _check_sampler(self, sampler: str) -> None:
        known(sampler, _samplers.SAMPLERS, "sampler")

    def _draw(self, rng: Any, steps: int, dtype: torch.dtype, sampler: str, eta: float, rtol: float) -> Tensor:
        levels = sigma_schedule(self.sigma_min, self.start_sigma, steps)
        if isinstance(self.levels, LinearBetas) and sampler in ("ancestral", "ddim"):
            table = self.sigma_data * self.levels.table.flip(0)
            pick = torch.linspace(0, len(table) - 1, min(steps, len(table))).round().long()
            levels = [*table[pick].tolist(), 0.0]
        xi = rng.normal(self.shape, dtype=dtype)
        u = self._centre(xi, levels[0]) + levels[0] * xi
        if sampler == "ancestral":
            return _samplers.ancestral(self.denoise, u, levels, rng)
        if sampler == "sde":
            return _samplers.sde(self.denoise, u, levels, rng)
        if sampler == "heun":
            return _samplers.heun(self.denoise, u, levels)
        if sampler == "ode":
            u = _densities.flow_to(self, u, levels[0], self.sigma_min, rtol)
            return self.denoise(u, self.sigma_min)
        return _samplers.ddim(self.denoise, u, levels, rng, eta if sampler == "ddim" else 0.0)

    def decode(self, z: Tensor) -> Tensor:
        """f(z), z ~ N(0, I): `latent_steps` Heun steps of the probability-flow ODE (EDM algorithm 1, no churn).

        The start is D(0, σ) + σ z with σ = `start_sigma`. The law of f(z) approaches the prior as `latent_steps` grows;
        latent solvers target the law of this f.
        """
        check_batch(z, self.latent_shape, f"The z given to {type(self).__name__}.decode")
        levels = sigma_schedule(self.sigma_min, self.start_sigma, self.latent_steps)
        u = self._centre(z, levels[0]) + levels[0] * z
        return self.transform(_samplers.heun(self.denoise, u, levels))

    def _centre(self, like: Tensor, sigma: float) -> Tensor:
        """D(0, sigma) `(1, *shape)`, the prior's mean where the noise swamps everything: u_sigma is centred there."""
        with torch.no_grad():
            return self.denoise(torch.zeros_like(like[:1]), sigma)

    @property
    def _device(self) -> torch.device:
        return next(self.network.parameters()).device

    # --- densities -------------------------------------------------------------------------------------------------

    def log_prob_estimate(
        self, x: Tensor, *, seed: int = 0, trace: str = "hutchinson", rtol: float = 1e-5, atol: float = 1e-5
    ) -> Tensor:
        """log p(x) `(batch,)` by the probability-flow ODE (Song et al. 2021, equation 39); see `_densities.py`.

        Args:
            x: `(batch, *shape)`. seed: of the probes. rtol, atol: of the adaptive steps.
            trace: "exact" (n + 1 evaluations a slope for n entries) or "hutchinson" (one, with one probe an item:
                unbiased for the exponent, with a standard deviation that grows like √n).
        """
        check_batch(x, self.shape, f"The x given to {type(self).__name__}.log_prob_estimate")
        known(trace, ("exact", "hutchinson"), "trace")
        with torch.no_grad():
            u = self.transform.inverse(x)
            value = self._log_prob_u(u, seed if trace == "hutchinson" else None, rtol, atol)
            return value.to(x) - self.transform.log_det(u)

    def _log_prob_u(self, u: Tensor, seed: int | None, rtol: float, atol: float) -> Tensor:
        return _densities.probability_flow(self, u, seed, rtol, atol)

    def elbo(self, x: Tensor, *, levels: int = 64, seed: int = 0) -> Tensor:
        """Variational lower bound of log p(x), `(batch,)`, of VDM (Kingma et al. 2021); `levels` evaluations an item."""
        check_batch(x, self.shape, f"The x given to {type(self).__name__}.elbo")
        with torch.no_grad():
            u = self.transform.inverse(x)
            return _densities.variational_bound(self, u, levels, seed).to(x) - self.transform.log_det(u)

    def bits_per_dim(self, x: Tensor, *, bin_width: float = 1.0, levels: int = 64, seed: int = 0) -> Tensor:
        """−(ELBO + n ln bin_width)/(n ln 2), `(batch,)`: of data in bins of that width to which uniform noise was added."""
        n = math.prod(self.shape)
        return -(self.elbo(x, levels=levels, seed=seed) / n + math.log(bin_width)) / math.log(2)

    # --- disk ------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, *, half: bool = False, card: dict[str, Any] | None = None) -> Path:
        """Write weights and settings as safetensors; `half` stores float16 weights (half the size, 1e-3 relative)."""
        return _stored.write(self, path, half, card)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a checkpoint; nothing in it is executed, and the network class must be one of invgen's."""
        return _stored.read(cls, path)

    def with_precision(self, precision: torch.dtype | None) -> Self:
        """The same prior, its network evaluated under autocast to `precision` (None: its own dtype)."""
        other = self._twin()
        other.precision = precision
        return other


def _random(build: Callable[[], nn.Module]) -> nn.Module:
    """A network with random weights everywhere: the layers that start at zero would make it the trivial denoiser."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build()
        for p in network.parameters():
            p.data.add_(0.05 * torch.randn_like(p))
    return network
