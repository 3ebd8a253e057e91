r"""Consistency distillation: a generator of one to four steps from the ODE of a diffusion (Song et al. 2023).

The consistency function f(u, sigma) maps every point of a path of the probability-flow ODE to its end at sigma_min
(arXiv:2303.01469, section 3); the boundary f(u, sigma_min) = u is built in,

    f(u, sigma) = c_skip u + c_out F(c_in u, ln(sigma)/4),
    c_skip = s²/((sigma − sigma_min)² + s²),  c_out = s (sigma − sigma_min)/√(sigma² + s²),  c_in = 1/√(sigma² + s²)

(equation 5, appendix C). It is distilled from a denoiser: with levels σ_1 < … < σ_N, u = u0 + σ_{k+1} n and û the teacher's
Heun step from σ_{k+1} to σ_k, the student's f(u, σ_{k+1}) is pulled towards the averaged student's f(û, σ_k)
(algorithm 2), k uniform and every level with weight 1. The distance is the pseudo-Huber √(|·|² + c²) − c with
c = 0.00054 √n of Song & Dhariwal 2024 (arXiv:2310.14189, equation 8). Their weight 1/(σ_{k+1} − σ_k) and log-normal levels, made
for training without a teacher, leave the high levels of a few-step generator unlearned: on a correlated Gaussian the
covariance was off by 0.59 after 600 steps, by 0.04 with the uniform choice.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from invgen.checkpoints import write_checkpoint
from invgen.contracts import HasDenoiser, check_batch
from invgen.grid import Grid
from invgen.priors import _stored
from invgen.priors._saving import damaged
from invgen.priors.flow import draw_latent
from invgen.schedules import sigma_schedule
from invgen.transforms import Identity, Transform

__all__ = ["Consistency"]


class Consistency(nn.Module):
    """A generator of a few steps, x = T(f(z)), distilled from the probability flow of a prior with a denoiser.

    Has: `sample`, `decode` (`HasLatent`): the latent holds the noises of all steps, stacked along the first axis, so that
    f is deterministic. With one step u = f(m + σ_T z_1, σ_T), m the teacher's mean; each further step adds noise again:
    u ← f(u + √(σ_k² − σ_min²) z_k, σ_k) (algorithm 1). The law of decode is the teacher's up to the error of the
    distillation; a generator has no density.

    Args:
        network: student F, with the interface of `DiffusionPrior`'s network.
        shape: of one field. transform, grid: as in `DiffusionPrior`.
        sigma_data, sigma_min, sigma_max: s, and the ends of the path; sigma_max swamps the largest mode.
        steps: network evaluations of `decode`. levels: noise levels of the steps after the first, `steps` − 1 of them,
            falling; geometric between s and sigma_min when omitted: s for two steps.
        centre: m `(*shape)`, the law's mean in u; zeros when omitted.
        teacher: a prior with `denoise`, for training only; it is not saved.
        discretisation: N, levels of the teacher's path. ema: decay of the averaged student μ a step.

    Cost: `steps` network evaluations a draw; training: two of the teacher's and two of the student's (one differentiated).
    """

    centre: Tensor
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
        sigma_max: float = 80.0,
        steps: int = 2,
        levels: tuple[float, ...] | None = None,
        centre: Tensor | None = None,
        context: Tensor | None = None,
        teacher: Any = None,
        discretisation: int = 40,
        ema: float = 0.95,
    ) -> None:
        super().__init__()
        if not 0 < sigma_min < sigma_data < sigma_max:
            raise ValueError(
                f"A consistency model needs 0 < sigma_min < sigma_data < sigma_max, got {sigma_min}, {sigma_data} and {sigma_max}."
            )
        if steps < 1 or discretisation < 2 or not 0 <= ema < 1:
            raise ValueError(
                f"A consistency model needs steps >= 1, discretisation >= 2 and 0 <= ema < 1, got {steps}, {discretisation} and {ema}."
            )
        if teacher is not None and not isinstance(teacher, HasDenoiser):
            raise TypeError(f"The teacher needs `denoise`, which {type(teacher).__name__} does not have.")
        self.network, self.shape, self.grid = network, tuple(shape), grid
        self.transform = transform or Identity()
        self.sigma_data, self.sigma_min, self.sigma_max = float(sigma_data), float(sigma_min), float(sigma_max)
        self.levels = tuple(levels) if levels is not None else _between(self.sigma_data, self.sigma_min, steps - 1)
        if len(self.levels) != steps - 1 or not all(sigma_min < v < sigma_max for v in self.levels):
            raise ValueError(
                f"{steps} steps need {steps - 1} levels between sigma_min and sigma_max, got {self.levels}."
            )
        self.steps = steps
        self.latent_shape = (steps * self.shape[0], *self.shape[1:])
        self.register_buffer("centre", torch.zeros(self.shape) if centre is None else centre.detach().clone())
        self.register_buffer("context", context, persistent=False)
        self.discretisation, self.ema = discretisation, float(ema)
        self._teacher: tuple[Any, ...] = (teacher,)  # in a tuple: no part of this module's weights
        self._names = [name for name, _ in network.named_parameters()]
        if teacher is not None:
            for i, p in enumerate(network.parameters()):
                self.register_buffer(f"average_{i}", p.detach().clone())
        self.seen: dict[str, Any] = {}

    @classmethod
    def of(cls, teacher: Any, *, steps: int = 2, **options: Any) -> Consistency:
        """A student that starts from a copy of the teacher's network and shares its coordinates.

        Args:
            teacher: a `DiffusionPrior` with the parametrisation "edm". options: of the constructor.
        """
        if getattr(teacher, "parametrisation", None) != "edm":
            raise TypeError(
                f"Only a DiffusionPrior with parametrisation 'edm' lends its network to a student, got {type(teacher).__name__}; give the constructor a network and the teacher."
            )
        network = copy.deepcopy(teacher.network)
        known = {
            "transform": teacher.transform,
            "grid": teacher.grid,
            "sigma_data": teacher.sigma_data,
            "sigma_min": teacher.sigma_min,
            "sigma_max": teacher.start_sigma,
            "context": teacher.context,
        }
        model = cls(network, teacher.shape, teacher=teacher, steps=steps, **(known | options))
        model.seen = {"started_from": dict(teacher.seen)}
        return model.centred()

    @classmethod
    def examples(cls) -> list[Consistency]:
        """Two steps on vectors, random weights."""
        from invgen.priors.networks import MLPDenoiser

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = MLPDenoiser(3, width=8, depth=1)
            for p in network.parameters():
                p.data.add_(0.1 * torch.randn_like(p))
        return [cls(network, (3,)).eval().requires_grad_(False)]

    @torch.no_grad()
    def centred(self) -> Consistency:
        """This model, with the mean of its teacher as the centre: the fixed point of D(·, sigma_max)."""
        mean = torch.zeros_like(self.centre)[None]
        for _ in range(4):  # a contraction by λ/σ²
            mean = self._teacher[0].denoise(mean, self.sigma_max)
        self.centre.copy_(mean[0])
        return self

    # --- the function ----------------------------------------------------------------------------------------------

    def consistency(self, u: Tensor, sigma: Tensor | float) -> Tensor:
        """f(u, sigma) `(batch, *shape)` of u `(batch, *shape)` and sigma `(batch,)` or a number, in u's dtype."""
        check_batch(u, self.shape, f"The field given to {type(self).__name__}.consistency")
        return self._f(u, sigma, None)

    def _f(self, u: Tensor, sigma: Tensor | float, weights: dict[str, Tensor] | None) -> Tensor:
        dtype = next(self.network.parameters()).dtype
        s = torch.as_tensor(sigma, dtype=torch.float64, device=u.device).expand(u.shape[0])
        wide = (-1, *(1,) * (u.ndim - 1))
        away, total = s - self.sigma_min, (s.square() + self.sigma_data**2).sqrt()
        c_skip = (self.sigma_data**2 / (away.square() + self.sigma_data**2)).to(dtype).reshape(wide)
        c_out = (self.sigma_data * away / total).to(dtype).reshape(wide)
        inputs = (1 / total).to(dtype).reshape(wide) * u.to(dtype)
        if self.context is not None:
            inputs = torch.cat([inputs, self.context.to(inputs).expand(len(u), *self.context.shape)], dim=1)
        noise = (s.log() / 4).to(dtype)
        if weights is None:
            out = self.network(inputs, noise)
        else:
            out = torch.func.functional_call(self.network, weights, (inputs, noise))
        return (c_skip * u.to(dtype) + c_out * out.to(dtype)).to(u.dtype)

    def decode(self, z: Tensor) -> Tensor:
        """x `(batch, *shape)` of the stacked noises z `(batch, steps · shape[0], …)`, z ~ N(0, I)."""
        check_batch(z, self.latent_shape, f"The z given to {type(self).__name__}.decode")
        noises = z.chunk(self.steps, dim=1)
        u = self._f(self.centre.to(z) + self.sigma_max * noises[0], self.sigma_max, None)
        for sigma, noise in zip(self.levels, noises[1:], strict=True):
            u = self._f(u + math.sqrt(sigma**2 - self.sigma_min**2) * noise, sigma, None)
        return self.transform(u)

    @torch.no_grad()
    def sample(self, n: int, *, seed: int = 0, chunk: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
        """`(n, *shape)` draws of x, row i a function of (seed, i); `chunk` at a time."""
        z = draw_latent(n, seed, self.latent_shape, dtype, self.centre.device)
        return torch.cat([self.decode(part) for part in z.split(chunk)])

    # --- distillation ----------------------------------------------------------------------------------------------

    def training_loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """Pseudo-Huber distance of each example in units of s, `(batch,)`, over √n; updates the averaged student.

        Raises:
            TypeError: there is no teacher.
        """
        teacher = self._teacher[0]
        if teacher is None:
            raise TypeError("Distillation needs a teacher; make the model with Consistency.of(teacher).")
        average, x = self._averaged(), batch["x"]
        if isinstance(teacher, nn.Module):
            teacher.to(x.device)
        u0 = self.transform.inverse(x)
        lower, upper = self._pair(x.shape[0], generator, x)
        noise = torch.randn(x.shape, generator=generator).to(x)
        wide = (-1, *(1,) * (x.ndim - 1))
        a, b = upper.to(x).reshape(wide), lower.to(x).reshape(wide)
        u = u0 + a * noise
        with torch.no_grad():
            slope = (u - teacher.denoise(u, upper)) / a
            ahead = u + (b - a) * slope
            ahead = u + (b - a) * 0.5 * (slope + (ahead - teacher.denoise(ahead, lower)) / b)
            target = self._f(ahead, lower, average)
        n = x[0].numel()
        c = 0.00054 * math.sqrt(n)
        off = (self._f(u, upper, None) - target).square().flatten(1).sum(1)
        return ((off + c**2).sqrt() - c) / (math.sqrt(n) * self.sigma_data)

    def _pair(self, n: int, generator: torch.Generator, like: Tensor) -> tuple[Tensor, Tensor]:
        """Neighbouring levels (σ_k, σ_{k+1}) `(n,)`, k uniform over the path of ρ = 7."""
        grid = torch.tensor(
            sigma_schedule(self.sigma_min, self.sigma_max, self.discretisation)[-2::-1], dtype=torch.float64
        )
        k = torch.randint(0, self.discretisation - 1, (n,), generator=generator)
        return grid[k].to(like.device), grid[k + 1].to(like.device)

    @torch.no_grad()
    def _averaged(self) -> dict[str, Tensor]:
        average = {name: getattr(self, f"average_{i}") for i, name in enumerate(self._names)}
        if self.training:
            torch._foreach_lerp_(list(average.values()), [p.detach() for p in self.network.parameters()], 1 - self.ema)
        return average

    # --- disk ------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, *, half: bool = False, card: dict[str, Any] | None = None) -> Path:
        """Write the student's weights and settings as safetensors; `half` stores float16 weights. No teacher."""
        tensors, meta = _stored.common(self, half, card)
        tensors["centre"] = self.centre
        if self.context is not None:
            tensors["context"] = self.context
        meta |= {"steps": self.steps, "levels": list(self.levels)}
        return write_checkpoint(path, "Consistency", tensors, meta)

    @classmethod
    def load(cls, path: str | Path) -> Consistency:
        """Read a checkpoint; nothing in it is executed, and the network class must be one of invgen's."""
        tensors, meta = _stored.open_checkpoint(path, "Consistency")
        try:
            centre, context = tensors.pop("centre"), tensors.pop("context", None)
            network, transform = _stored.network_of(path, tensors, meta)
            model = cls(
                network,
                tuple(meta["shape"]),
                transform=transform,
                grid=Grid.from_dict(meta["grid"]) if meta["grid"] else None,
                sigma_data=meta["sigma_data"],
                sigma_min=meta["sigma_min"],
                sigma_max=meta["sigma_max"],
                steps=meta["steps"],
                levels=tuple(meta["levels"]),
                centre=centre,
                context=context,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise damaged(path, error) from error
        model.seen = meta.get("card", {})
        return model.eval().requires_grad_(False)


def _between(high: float, low: float, count: int) -> tuple[float, ...]:
    """`count` falling levels: s, then geometric steps towards (not to) sigma_min."""
    return tuple(high * (low / high) ** (i / max(count, 1)) for i in range(count))
