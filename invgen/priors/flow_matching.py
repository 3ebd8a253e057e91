r"""Flow matching with the straight path between independent noise and data (Lipman et al. 2023, arXiv:2210.02747).

With y = u0/s, n ~ N(0, I) independent of it and x_t = (1 − t) n + t y, the velocity v(x, t) = E[y − n | x_t = x] carries
N(0, I) at t = 0 to the law of y at t = 1 along dx/dt = v(x, t), and is learned by regression on y − n. The same
regression holds the denoiser: x_t = t u/s is data under noise of level sigma = s (1 − t)/t, and

    E[y | x_t] = x_t + (1 − t) v(x_t, t),        D(u, sigma) = s E[y | x_t],   t = s/(s + sigma),

because y − x_t = (1 − t)(y − n). The network may give v itself, or EDM's F on the same point of a variance-preserving
process (Karras et al. 2022), x_t/N with N² = t² + (1 − t)². D = c_skip u + c_out F with u = x_t s/t is then

    v = ((2t − 1) x_t/N + F)/N,

of unit scale at both ends and without a cancellation, so that a network trained to denoise is one that flows: `of`.

The identity for D is exact for independent pairs only: pairs matched by optimal transport (in
mini-batches) have another joint law of noise and data, and D would be no posterior mean of the Gaussian channel.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from invgen.contracts import check_batch
from invgen.grid import Grid
from invgen.priors import _samplers
from invgen.priors._ode import integrate, log_normal, rademacher, transported
from invgen.priors._placement import DepthChannel
from invgen.priors._preconditioning import known
from invgen.priors.conditions import Condition
from invgen.priors.diffusion import DiffusionPrior
from invgen.priors.levels import Levels, UniformTime
from invgen.transforms import Transform

__all__ = ["FlowMatching"]

_RULES = ("euler", "midpoint", "heun")


class FlowMatching(DiffusionPrior):
    """A prior p(u) known through the velocity of a flow from noise to data; x = T(u).

    Has: `sample` and `decode` by the ODE in t (`HasLatent`), `HasDenoiser` derived exactly from the velocity, and
    `log_prob_estimate` by the same ODE (`HasDensityEstimate`): it starts from N(0, I) at t = 0 without any cut of the noise.

    Args:
        network: velocity v of `(batch, channels + extra, *spatial)` x_t and `(batch,)` ln(sigma)/4, held at the ends of the
            range of noise levels; or F of the parametrisation "edm".
        shape, transform, grid, sigma_data, mean_variance_of_field, depth, conditions, condition_dropout: as in
            `DiffusionPrior`.
        sigma_min, sigma_max: range over which the network is told the level, (1 − t)/t times s.
        latent_steps: steps of `decode`. rule: of `decode`: "midpoint" or "heun" (two evaluations a step), or "euler".
        levels: law of the training times, `UniformTime()`.
        parametrisation: "flow" (the network is v) or "edm". weighting: "velocity": |v̂ − (y − n)|².
    """

    parametrisations = ("flow", "edm")
    own_settings = ("rule",)

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
        latent_steps: int = 16,
        rule: str = "midpoint",
        parametrisation: str = "flow",
        levels: Levels | None = None,
        weighting: str | None = None,
        sigmoid_bias: float = 2.0,
        time: str = "log_sigma",
        conditions: dict[str, Condition] | None = None,
        condition_dropout: float = 0.1,
    ) -> None:
        super().__init__(
            network,
            shape,
            transform=transform,
            grid=grid,
            sigma_data=sigma_data,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            mean_variance_of_field=mean_variance_of_field,
            depth=depth,
            latent_steps=latent_steps,
            parametrisation=parametrisation,
            levels=levels if levels is not None else UniformTime(),
            weighting=weighting if weighting is not None else "velocity",
            sigmoid_bias=sigmoid_bias,
            time=time,
            conditions=conditions,
            condition_dropout=condition_dropout,
        )
        self.rule = known(rule, _RULES, "rule")

    def velocity(self, x: Tensor, t: Tensor | float) -> Tensor:
        """v(x_t, t) `(batch, *shape)` in x's dtype, of x `(batch, *shape)` in units of s and t `(batch,)` in [0, 1]."""
        check_batch(x, self.shape, f"The x given to {type(self).__name__}.velocity")
        return self._velocity(x, torch.as_tensor(t, dtype=torch.float64, device=x.device).expand(x.shape[0]))

    def _velocity(self, y: Tensor, t: Tensor, items: Tensor | None = None) -> Tensor:
        sigma = self.sigma_data * (1 - t) / t  # infinite at t = 0, where the embedding is held
        network = next(self.network.parameters()).dtype
        x = y.to(network)
        if self.parametrisation == "flow":
            return self._output(x, sigma, self.context, self.weight).to(y)
        wide = (-1, *(1,) * (y.ndim - 1))
        scale = (t.square() + (1 - t).square()).sqrt()
        out = self._output(x / scale.to(x).reshape(wide), sigma, self.context, self.weight)
        across, along = ((2 * t - 1) / scale.square()).to(y).reshape(wide), (1 / scale).to(y).reshape(wide)
        return across * y + along * out.to(y)

    def decode(self, z: Tensor) -> Tensor:
        """f(z) = T(s x_1), x_0 = z ~ N(0, I): `latent_steps` equal steps of the ODE in t by `rule`."""
        check_batch(z, self.latent_shape, f"The z given to {type(self).__name__}.decode")
        return self.transform(self.sigma_data * _samplers.straight(self.velocity, z, self.latent_steps, self.rule))

    def sample(
        self,
        n: int,
        *,
        seed: int = 0,
        steps: int = 32,
        chunk: int = 16,
        dtype: torch.dtype = torch.float32,
        sampler: str = "midpoint",
        eta: float = 0.0,
        rtol: float = 1e-4,
    ) -> Tensor:
        """`(n, *shape)` draws of x.

        Args:
            steps: of the ODE in t, equal, or levels in sigma. chunk: draws at a time.
            sampler: "midpoint" or "heun" (two evaluations a step), "euler", "ode" (adaptive to `rtol`), all in t; or
                "ddim" with its `eta`, "ancestral", "sde" of `DiffusionPrior`, in sigma.

        Raises:
            ValueError: no draws asked for, or a sampler that does not exist.
        """
        return super().sample(n, seed=seed, steps=steps, chunk=chunk, dtype=dtype, sampler=sampler, eta=eta, rtol=rtol)

    def _check_sampler(self, sampler: str) -> None:
        known(sampler, ("midpoint", *_samplers.SAMPLERS), "sampler")

    def _draw(self, rng: Any, steps: int, dtype: torch.dtype, sampler: str, eta: float, rtol: float) -> Tensor:
        if sampler not in (*_RULES, "ode"):
            return super()._draw(rng, steps, dtype, sampler, eta, rtol)
        x = rng.normal(self.shape, dtype=dtype)
        if sampler == "ode":

            def ahead(t: Tensor, y: Tensor, items: Tensor) -> Tensor:
                return self._velocity(y.reshape(-1, *self.shape), t).flatten(1)

            y = integrate(ahead, x.double().flatten(1), 0.0, 1.0, rtol=rtol, atol=rtol)
            return self.sigma_data * y.reshape(x.shape).to(dtype)
        return self.sigma_data * _samplers.straight(self.velocity, x, steps, sampler)

    def _log_prob_u(self, u: Tensor, seed: int | None, rtol: float, atol: float) -> Tensor:
        """log p(u) = log N(x_0; 0, I) − ∫_0^1 div v dt − n ln s, the ODE run from t = 1 to 0."""
        y = u.double() / self.sigma_data
        probe = None if seed is None else rademacher(seed, len(u), self.shape, y, "trace")
        start, gain = transported(self._velocity, y, 1.0, 0.0, probe, rtol=rtol, atol=atol)
        return log_normal(start) + gain - y[0].numel() * math.log(self.sigma_data)
