r"""Continuous normalizing flows: a neural ordinary differential equation as the invertible map.

du/dt = g(u, t) from z ~ N(0, I) at t = 0 to u at t = 1, with

    log p(u(1)) = log N(u(0); 0, I) − ∫_0^1 tr ∂g/∂u dt

(Chen et al. 2018, arXiv:1806.07366, theorem 1). The trace is exact, or Hutchinson's unbiased estimate vᵀ(∂g/∂u)v
(FFJORD, Grathwohl et al. 2019, arXiv:1810.01367). The ODE is integrated by `steps` Runge–Kutta steps of fourth order,
the training gradient goes through them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from invgen.checkpoints import read_checkpoint, write_checkpoint
from invgen.contracts import check_batch
from invgen.grid import Grid
from invgen.priors import networks
from invgen.priors._ode import exact_trace, log_normal, probed_trace, rademacher
from invgen.priors._preconditioning import known
from invgen.priors._saving import affine_of, affine_tensors, damaged
from invgen.priors.flow import draw_latent
from invgen.transforms import Identity, Transform

__all__ = ["ContinuousFlow"]


class ContinuousFlow(nn.Module):
    """A neural ODE p(u) for vectors, trained by maximum likelihood; x = T(u).

    Has: `sample`, `log_prob` with exact traces (`HasDensity`; its error is that of the ODE solver, of fourth order in
    1/steps: check it by doubling `steps`), `log_prob_estimate` with Hutchinson's (`HasDensityEstimate`), `decode` (`HasLatent`).

    Args:
        dim: entries of a vector.
        width, depth: of the network g.
        steps: Runge–Kutta steps of `decode` and `log_prob`. training_steps: of the training loss.
        trace: of the training loss: "exact" (dim Jacobian products a slope) or "hutchinson" (one).
        kinetic: weight of ∫ |g|² dt in the training loss, which keeps the paths straight and the solver's error small
            (Finlay et al. 2020, arXiv:2002.02798).
        stiffness: weight of the squared differences between the solver's rule and lower ones, summed over the steps (in the
            manner of Pal et al. 2021, arXiv:2105.03918). Without it maximum likelihood rewards a field that the solver gets
            wrong: on two moons the loss fell 34 nats below the entropy at 3 training steps, and was 30 nats above it at 64.
        transform: x = T(u), standardising the data; the identity when omitted.

    Cost: 4 · steps evaluations of g for `decode`; as many with dim (exact) or one Jacobian product each for a density.
    """

    def __init__(
        self,
        dim: int,
        *,
        width: int = 64,
        depth: int = 3,
        steps: int = 32,
        training_steps: int = 8,
        trace: str = "exact",
        kinetic: float = 0.01,
        stiffness: float = 10.0,
        transform: Transform | None = None,
    ) -> None:
        super().__init__()
        self.trace = known(trace, ("exact", "hutchinson"), "trace")
        if min(dim, width, depth, steps, training_steps) < 1 or min(kinetic, stiffness) < 0:
            raise ValueError(
                f"A continuous flow needs dim, width, depth, steps and training_steps of at least 1 and kinetic and stiffness >= 0, got {dim}, {width}, {depth}, {steps}, {training_steps}, {kinetic} and {stiffness}."
            )
        self.settings = {
            "dim": dim,
            "width": width,
            "depth": depth,
            "steps": steps,
            "training_steps": training_steps,
            "trace": trace,
            "kinetic": kinetic,
            "stiffness": stiffness,
        }
        self.steps, self.training_steps = steps, training_steps
        self.kinetic, self.stiffness = float(kinetic), float(stiffness)
        self.shape = self.latent_shape = (dim,)
        self.grid: Grid | None = None
        self.transform = transform or Identity()
        self.network = networks.MLPDenoiser(dim, width=width, depth=depth)
        self.seen: dict[str, Any] = {}

    @classmethod
    def examples(cls) -> list[ContinuousFlow]:
        """A small one with random weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            flow = cls(3, width=8, depth=1, steps=8)
            for p in flow.parameters():
                p.data.add_(0.1 * torch.randn_like(p))
        return [flow.eval().requires_grad_(False)]

    @property
    def _like(self) -> Tensor:
        return next(self.network.parameters())

    def _slope(self, u: Tensor, t: float) -> Tensor:
        # the network's embedding has frequencies up to 30: t/10 keeps g smooth over a step of the solver
        return self.network(u, torch.full_like(u[:, 0], 0.1 * t))

    def _both(self, u: Tensor, t: float, probe: Tensor | None) -> tuple[Tensor, Tensor]:
        if probe is None:
            if isinstance(self.network, networks.MLPDenoiser):
                return self._pushed(u, t)
            return exact_trace(lambda v: self._slope(v, t), u)
        return probed_trace(lambda v: self._slope(v, t), u, probe)

    def _pushed(self, u: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """g and its exact trace, the dim tangents pushed through the layers beside the value: a third of the cost of jvp."""
        layers, leave, n = list(cast(nn.Sequential, self.network.body)), cast(nn.Linear, self.network.leave), u.shape[1]
        angles = (0.1 * t * cast(Tensor, self.network.frequencies).to(u)).expand(len(u), -1)
        first = cast(nn.Linear, layers[0])
        value: Tensor = first(torch.cat([u, angles.sin(), angles.cos()], dim=1))
        tangent = first.weight[:, :n].T[None]
        for layer in layers[1:]:
            if isinstance(layer, nn.Linear):
                value, tangent = layer(value), tangent @ layer.weight.T
            else:  # SiLU and its derivative
                gate = value.sigmoid()
                tangent = (gate * (1 + value * (1 - gate)))[:, None] * tangent
                value = value * gate
        return leave(value), (tangent * leave.weight).sum((1, 2))

    def _log_prob_u(self, u: Tensor, steps: int, probe: Tensor | None) -> tuple[Tensor, Tensor]:
        """log p(u) and what regularises it, `(batch,)`: from t = 1 to 0 by the classical fourth-order rule."""
        h = -1.0 / steps
        gain = penalty = torch.zeros_like(u[:, 0])
        for i in range(steps):
            t = 1.0 + i * h
            a, ta = self._both(u, t, probe)
            b, tb = self._both(u + 0.5 * h * a, t + 0.5 * h, probe)
            c, tc = self._both(u + 0.5 * h * b, t + 0.5 * h, probe)
            d, td = self._both(u + h * c, t + h, probe)
            u = u + h / 6 * (a + 2 * b + 2 * c + d)
            gain = gain + h / 6 * (ta + 2 * tb + 2 * tc + td)
            # Simpson's rule less the midpoint rule, and what is stiff: a solver that errs must not pay
            error = (a - b - c + d).square().sum(1) + (ta - tb - tc + td).square()
            error = error + (b - c).square().sum(1) + (tb - tc).square()
            penalty = penalty + self.kinetic * a.square().sum(1) / steps + self.stiffness * h**2 / 36 * error
        return log_normal(u) + gain, penalty

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) `(batch,)` of x `(batch, dim)` with exact traces, the Jacobian of the transform included."""
        check_batch(x, self.shape, f"The x given to {type(self).__name__}.log_prob")
        u = self.transform.inverse(x)
        return self._log_prob_u(u.to(self._like), self.steps, None)[0].to(x) - self.transform.log_det(u)

    def log_prob_estimate(self, x: Tensor, *, seed: int = 0) -> Tensor:
        """The same with Hutchinson's estimate of the traces, one probe an item."""
        check_batch(x, self.shape, f"The x given to {type(self).__name__}.log_prob_estimate")
        u = self.transform.inverse(x)
        probe = rademacher(seed, len(u), self.shape, self._like, "trace")
        return self._log_prob_u(u.to(self._like), self.steps, probe)[0].to(x) - self.transform.log_det(u)

    def decode(self, z: Tensor) -> Tensor:
        """f(z) `(batch, dim)`, z ~ N(0, I): `steps` Runge–Kutta steps."""
        check_batch(z, self.latent_shape, f"The z given to {type(self).__name__}.decode")
        u, h = z.to(self._like), 1.0 / self.steps
        for i in range(self.steps):
            t = i * h
            a = self._slope(u, t)
            b = self._slope(u + 0.5 * h * a, t + 0.5 * h)
            c = self._slope(u + 0.5 * h * b, t + 0.5 * h)
            u = u + h / 6 * (a + 2 * b + 2 * c + self._slope(u + h * c, t + h))
        return self.transform(u.to(z))

    @torch.no_grad()
    def sample(self, n: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """`(n, dim)` draws of x, row i a function of (seed, i)."""
        return self.decode(draw_latent(n, seed, self.latent_shape, dtype, self._like.device))

    def training_loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """(−log p(x) + penalties)/dim of each example, `(batch,)`."""
        u = self.transform.inverse(batch["x"])
        probe = None
        if self.trace == "hutchinson":
            probe = torch.randint(0, 2, u.shape, generator=generator).to(self._like) * 2 - 1
        value, penalty = self._log_prob_u(u.to(self._like), self.training_steps, probe)
        return (penalty - value + self.transform.log_det(u).to(value)) / self.shape[0]

    @torch.no_grad()
    def validation(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """Mean −log p(x), in nats a vector, exact traces."""
        return {"nll": float(-self.log_prob(batch["x"]).mean())}

    def save(self, path: str | Path, *, card: dict[str, Any] | None = None) -> Path:
        """Write weights and settings as safetensors."""
        meta = {"settings": self.settings, "card": card or self.seen}
        return write_checkpoint(
            path, "ContinuousFlow", self.network.state_dict() | affine_tensors(self.transform), meta
        )

    @classmethod
    def load(cls, path: str | Path) -> ContinuousFlow:
        """Read a checkpoint; nothing in it is executed."""
        tensors, meta = read_checkpoint(path, "ContinuousFlow")
        try:
            flow = cls(**meta["settings"], transform=affine_of(tensors))
            flow.network.load_state_dict(tensors)
        except (KeyError, TypeError, RuntimeError) as error:
            raise damaged(path, error) from error
        flow.seen = meta.get("card", {})
        return flow.eval().requires_grad_(False)
