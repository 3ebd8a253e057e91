"""Training by denoising: the weighted squared error of D at random noise levels, one class for all parametrisations."""

from __future__ import annotations

import torch
from torch import Tensor

from invgen.priors import conditions as conditioning
from invgen.priors._preconditioning import error_weight
from invgen.priors.conditions import Condition
from invgen.priors.levels import AdaptiveLevels, Levels, LogNormalLevels
from invgen.transforms import Transform


class DenoisingLoss:
    """What `Training` asks of a diffusion prior: `training_loss` and `validation`."""

    transform: Transform
    sigma_data: float
    sigma_min: float
    sigma_max: float
    levels: Levels | None
    noise_levels: tuple[float, float]
    weighting: str
    sigmoid_bias: float
    conditions: dict[str, Condition]
    condition_dropout: float

    def _denoise(self, u: Tensor, sigma: Tensor | float, context: Tensor | None, weight: float = 1.0) -> Tensor:
        raise NotImplementedError

    @property
    def _law(self) -> Levels:
        return self.levels if self.levels is not None else LogNormalLevels(*self.noise_levels)

    def loss(self, x: Tensor, sigma: Tensor, noise: Tensor, context: Tensor | None = None) -> Tensor:
        """Weighted denoising loss of each example, `(batch,)`, averaged over the entries of a field.

        Args:
            x: `(batch, *shape)` clean fields in physical units (any spatial size). sigma: `(batch,)`.
            noise: like x, standard normal. context: `(batch, extra, *spatial)` or None.
        """
        u = self.transform.inverse(x)
        s = sigma.reshape(-1, *(1,) * (x.ndim - 1))
        error = self._denoise(u + s * noise, sigma, context) - u
        return self._error_weight(sigma) * error.square().flatten(1).mean(1)

    def _error_weight(self, sigma: Tensor) -> Tensor:
        return error_weight(self.weighting, sigma, self.sigma_data, self.sigmoid_bias)

    def training_loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """Loss of each example of `{"x": …, "context": …, condition: …}` at a random noise level of `levels`.

        The noise is drawn on the CPU from `generator`, so that a run does not depend on the device. For "elbo" and
        "sigmoid" the loss is divided by the density of ln sigma, so that its mean does not depend on the law.
        """
        x, law = batch["x"], self._law
        # stratified over the batch: same law for each example, less variance of the mean
        ranks = (
            torch.randperm(x.shape[0], generator=generator) + torch.rand(x.shape[0], generator=generator)
        ) / x.shape[0]
        tau = law.quantile(ranks.double().clamp(1e-6, 1 - 1e-6))
        sigma = (self.sigma_data * tau).clamp(self.sigma_min, self.sigma_max).to(x)
        noise = torch.randn(x.shape, generator=generator).to(x)
        keep = None
        if self.conditions:
            keep = conditioning.dropped(self.conditions, x.shape[0], self.condition_dropout, generator)
        loss = self.loss(x, sigma, noise, self._batch_context(batch, keep))
        if self.weighting in ("elbo", "sigmoid"):
            if isinstance(law, AdaptiveLevels):
                tau = tau.to(x.device)
                density = law.density(tau)  # of the draw, before it is updated
                law.observe(tau, loss.detach())
                return loss / density.to(loss)
            return loss / law.density(tau).to(loss)
        return loss

    @torch.no_grad()
    def validation(
        self, batch: dict[str, Tensor], levels: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0)
    ) -> dict[str, float]:
        """Root-mean-square denoising error in units of u at fixed noise levels (fixed noise, so runs compare)."""
        x, context = batch["x"], self._batch_context(batch, None)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
        figures = {}
        for level in levels:
            sigma = torch.full((x.shape[0],), level * self.sigma_data, dtype=x.dtype, device=x.device)
            weight = self._error_weight(sigma[:1])[0]
            total = [
                self.loss(x[i : i + 32], sigma[i : i + 32], noise[i : i + 32], _part(context, i))
                for i in range(0, x.shape[0], 32)
            ]
            figures[f"rmse_at_{level:g}"] = float((torch.cat(total).mean() / weight).sqrt())
        return figures

    def _batch_context(self, batch: dict[str, Tensor], keep: dict[str, Tensor] | None) -> Tensor | None:
        context = batch.get("context")
        code = conditioning.encode(self.conditions, {k: batch[k] for k in self.conditions if k in batch}, keep)
        if code is None:
            return context
        x = batch["x"]
        code = code.to(x).reshape(*code.shape, *(1,) * (x.ndim - 2)).expand(x.shape[0], -1, *x.shape[2:])
        return code if context is None else torch.cat([context.to(x), code], dim=1)


def _part(context: Tensor | None, first: int) -> Tensor | None:
    return None if context is None else context[first : first + 32]
