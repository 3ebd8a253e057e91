r"""Variational inference with an invertible network: the conditioning of a generator.

A trained generator f turns noise into models of the prior. To condition it on data, a second network I turns noise w
into the noise that f should get, z = I(w), w ~ N(0, I), so that x = f(I(w)) are draws of the posterior: the generator
is left as it is, and I is trained for the data at hand. Where I is any network, the entropy of z that keeps it from
collapsing to a point has to be estimated (by nearest neighbours: Chan & Elsheikh 2019, arXiv:1807.05207; conditional
network beside Gaussian mixture: Bhavsar, Desassis, Ors & Romary 2024, arXiv:2305.13318). Here I is invertible, z has a
density, and the ELBO is exact up to its expectation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from invgen.driver import Streams
from invgen.problem import InverseProblem
from invgen.solvers.variational import (
    State,
    _Variational,
    gaussian_log_det,
    gaussian_push,
    gaussian_start,
    gaussian_update,
    whitened_step,
)

__all__ = ["VariationalFlow"]

_BETA1, _BETA2, _CLIP = 0.9, 0.99, 10.0  # of Adam; norm of a gradient above which it is scaled down
_WIDER = 2.0  # what L grows by before the flow is trained
_SLOWER = 0.25  # steps of μ and L beside those of the flow: both could take over the other's part


@dataclass(frozen=True)
class VariationalFlow(_Variational):
    r"""A normalizing flow fitted to the latent posterior: q = μ + L v, v = T(w), w ~ N(0, I).

    First a Gaussian, μ and L (`VariationalGaussian`, the first half of the steps), then T beside them: coupling layers
    of rational-quadratic splines (Durkan, Bekasov, Murray & Papamakarios 2019, arXiv:1906.04032, zuko's), which start
    as the identity. With log q(q) = log N(T⁻¹(v); 0, I) + log |det ∂T⁻¹/∂v| − log det L, the ELBO is maximised by Adam
    (Kingma & Ba 2015, arXiv:1412.6980) with a rate that falls to zero as a half cosine, along the path through v only
    (see the module `variational`). When T joins, L is doubled: the best Gaussian keeps to one bend of a curved
    posterior, and T has to see the others. In the terms of Bhavsar et al. 2024 T is the conditional network, w → z → x.

    Targets p(x | d) as far as the family reaches: an approximation, whose fit k̂ judges; KL(q ‖ p) tends to keep one of
    several modes, and says so only where draws of the fitted law come near the others. Measured: 0.002 nats below the
    evidence of a linear-Gaussian problem with 6 unknowns; 0.06 on a banana whose best Gaussian is 0.56 below.

    Args:
        layers: couplings; features alternate. hidden: width of the networks. bins: of each spline on [−5, 5].
        steps: of both optimisations together. draws: K a step and observation.
        rate: of Adam at first. gaussian_rate: ρ of the Gaussian. search: as in `VariationalGaussian`.
        check_draws: S draws for the figures of the fit.

    `stats` as in `VariationalGaussian`. Each observation has a flow of its own, all trained in one batch; the samples
    of an observation share it. Needs at least two unknowns.
    Cost: K values and gradients of generator and physics a step, and the flow's, once in each direction; S values.
    """

    layers: int = 4
    hidden: int = 32
    bins: int = 8
    steps: int = 2000
    draws: int = 32
    rate: float = 5e-3
    gaussian_rate: float = 0.2
    search: int = 100
    check_draws: int = 1000

    def __post_init__(self) -> None:
        least = min(self.layers - 1, self.hidden, self.bins - 1, self.steps - 1, self.draws - 1, self.search + 1)
        if least < 1 or self.check_draws < 100 or not (self.rate > 0 and 0 < self.gaussian_rate <= 1):
            raise ValueError(
                f"VariationalFlow needs layers, bins, steps and draws >= 2, hidden >= 1, search >= 0, check_draws >= 100 and positive rates, got {self}."
            )

    @classmethod
    def examples(cls) -> list[VariationalFlow]:
        """A small one."""
        return [cls(layers=2, hidden=8, bins=4, steps=30, draws=8, search=5, check_draws=100)]

    @classmethod
    def exam(cls) -> dict[str, VariationalFlow]:
        """The defaults."""
        return {"flow": cls()}

    def check(self, problem: InverseProblem) -> None:
        super().check(problem)
        n = math.prod(problem.prior.latent_shape) + len(problem.nuisance)
        if n < 2:
            raise TypeError(
                f"VariationalFlow couples unknowns and needs at least two, got {n}; use VariationalGaussian."
            )

    @property
    def _sizes(self) -> tuple[int, int]:
        """Numbers a spline needs, and the steps of the Gaussian."""
        return 3 * self.bins - 1, self.steps // 2

    def first(self, dim: int, like: Tensor) -> State:
        state = gaussian_start("full", dim, like)
        generator = torch.Generator().manual_seed(0)
        n_sets, (numbers, _) = len(like), self._sizes
        for layer in range(self.layers):
            given, moved = self._halves(dim, layer)
            widths = [len(given), self.hidden, self.hidden]
            for i, (a, b) in enumerate(zip(widths, [*widths[1:], len(moved) * numbers], strict=True)):
                # the last layer starts at zero: every spline is the identity
                scale = 0.0 if i == 2 else math.sqrt(1 / max(a, 1))
                weight = scale * torch.randn(a, b, generator=generator, dtype=torch.float64)
                state[f"w{layer}.{i}"] = weight.to(like).repeat(n_sets, 1, 1)
                state[f"b{layer}.{i}"] = like.new_zeros(n_sets, 1, b)
        names = self._weights(state)
        return state | {f"{m}:{n}": torch.zeros_like(state[n]) for n in names for m in ("m1", "m2")}

    @staticmethod
    def _weights(state: Mapping[str, Tensor]) -> list[str]:
        return sorted(n for n in state if n[0] in "wb" and n[1].isdigit())

    @staticmethod
    def _halves(dim: int, layer: int) -> tuple[list[int], list[int]]:
        """Features that a layer reads, and those it moves: halves of an order that differs from pair to pair."""
        order = (
            torch.randperm(dim, generator=torch.Generator().manual_seed(layer // 2)).tolist()
            if layer > 1
            else range(dim)
        )
        half = [[i for i, place in enumerate(order) if place % 2 == side] for side in (0, 1)]
        return half[layer % 2], half[1 - layer % 2]

    def _flow(self, state: Mapping[str, Tensor], v: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        """T(v) or T⁻¹(v), `(sets, n, dim)`, and log |det| of that direction, `(sets, n)`."""
        from zuko.transforms import MonotonicRQSTransform

        total = v.new_zeros(v.shape[:2])
        layers = range(self.layers)
        for layer in reversed(layers) if inverse else layers:
            given, moved = self._halves(v.shape[-1], layer)
            h = v[..., given]
            for i in range(3):
                h = torch.baddbmm(state[f"b{layer}.{i}"], h, state[f"w{layer}.{i}"])
                h = torch.nn.functional.silu(h) if i < 2 else h
            parts = h.unflatten(-1, (len(moved), -1)).split([self.bins, self.bins, self.bins - 1], dim=-1)
            spline = MonotonicRQSTransform(*parts)
            new, log_det = (spline.inv if inverse else spline).call_and_ladj(v[..., moved])
            out = v.clone()
            out[..., moved] = new
            v, total = out, total + log_det.sum(-1)
        return v, total

    def update(self, problem: InverseProblem, state: State, rng: Streams, k: int) -> State:
        white, (_, first) = self.white(problem, rng), self._sizes
        if k < first:
            rho = 0.5 * self.gaussian_rate * (1 + math.cos(math.pi * k / first))
            pull, good, state = self.gradients(problem, state, gaussian_push(state, white), rng)
            return gaussian_update(state, white, pull, good, rho)
        if k == first:  # KL(q ‖ p) keeps a Gaussian inside one bend of a curved posterior: the flow starts from outside
            state = {**state, "factor": _WIDER * state["factor"]}
        names = self._weights(state)
        weights = {n: state[n].detach().requires_grad_() for n in names}
        with torch.enable_grad():
            v, _ = self._flow(weights, white, inverse=False)
            at = v.detach()
            pull, good, state = self.gradients(problem, state, gaussian_push(state, at), rng)
            # sticking the landing: ∇_v log q with the weights held, by the way back
            free = at.clone().requires_grad_()
            back, log_det = self._flow(state, free, inverse=True)
            (slope,) = torch.autograd.grad((log_det - 0.5 * back.square().sum(-1)).sum(), free)
            direction = pull @ state["factor"] - slope
            direction = torch.where(good[..., None] | torch.isnan(direction), direction, torch.zeros_like(direction))
            loss = -(direction * v).sum((1, 2)) / good.sum(1).clamp_min(1)
            found = torch.autograd.grad(loss.sum(), list(weights.values()))
        share = 0.5 * (1 + math.cos(math.pi * (k - first) / (self.steps - first)))
        state = whitened_step(state, at, direction.detach(), good, _SLOWER * self.gaussian_rate * share)
        return self._adam(state, dict(zip(names, found, strict=True)), k - first, self.rate * share)

    @torch.no_grad()
    def _adam(self, state: State, gradients: dict[str, Tensor], k: int, rate: float) -> State:
        size = torch.stack([g.square().flatten(1).sum(1) for g in gradients.values()]).sum(0).sqrt()
        scale = (_CLIP / size.clamp_min(_CLIP))[:, None, None]
        out = dict(state)
        for name, g in gradients.items():
            g = g * scale
            m1 = out[f"m1:{name}"] = _BETA1 * state[f"m1:{name}"] + (1 - _BETA1) * g
            m2 = out[f"m2:{name}"] = _BETA2 * state[f"m2:{name}"] + (1 - _BETA2) * g.square()
            away = (m1 / (1 - _BETA1 ** (k + 1))) / ((m2 / (1 - _BETA2 ** (k + 1))).sqrt() + 1e-8)
            out[name] = state[name] - rate * away
        return out

    def push(self, state: State, white: Tensor) -> tuple[Tensor, Tensor]:
        v, log_det = self._flow(state, white, inverse=False)
        log_normal = -0.5 * white.square().sum(-1) - 0.5 * white.shape[-1] * math.log(2 * math.pi)
        return gaussian_push(state, v), log_normal - log_det - gaussian_log_det(state)[:, None]
