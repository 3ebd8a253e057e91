r"""One network of sbi's behind one interface: loss, density, draws, given an embedded condition.

    "npe"    q(w | e), a normalizing flow (zuko's neural spline flow, Durkan et al. 2019, arXiv:1906.04032)
    "nle"    q(w | e) likewise, with the data as w and the unknowns as e
    "fmpe"   a velocity v(w, t; e) of flow matching, t = 1 noise, t = 0 data
    "npse"   a score s(w, t; e) of a diffusion, drawn from by its probability-flow equation
    "nre"    a classifier's log ratio f(v, e)

Everything around it (standardising, embedding, training, random numbers) is ours, so that only the callables
`posterior_nn`, `posterior_flow_nn`, `posterior_score_nn`, `likelihood_nn`, `classifier_nn` of sbi are used.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from invgen.solvers._neural_embeddings import Embedding, Given
from invgen.solvers._neural_ode import integrate, integrate_density

_NARROW = 10  # numbers up to which every one has a spline of its own given those before it


def build_estimator(settings: Mapping[str, Any], dim: int, given: int) -> Any:
    """sbi's estimator of w `(dim,)` given e `(given,)`, from plain settings."""
    from sbi.neural_nets import classifier_nn, likelihood_nn, posterior_flow_nn, posterior_nn, posterior_score_nn

    method, hidden, layers = settings["method"], int(settings["hidden"]), int(settings["layers"])
    w, e = torch.randn(4, dim), torch.randn(4, given)  # only their shapes are looked at
    plain: dict[str, Any] = {"z_score_theta": "none", "z_score_x": "none"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it does not know goes on to zuko, and it says so
        if method in ("npe", "nle"):
            options: dict[str, Any] = {
                "hidden_features": [hidden] * int(settings["depth"]),
                "num_transforms": layers,
                "num_bins": int(settings["bins"]),
                "activation": nn.SiLU,
                **plain,
            }
            if dim > 1:
                options["passes"] = dim if dim <= _NARROW else 2
            if method == "npe":
                return posterior_nn(model="zuko_nsf", **options)(w, e)
            return likelihood_nn(model="zuko_nsf", **options)(e, w)
        if method == "fmpe":
            return posterior_flow_nn("mlp", hidden_features=hidden, num_layers=layers, **plain)(w, e)
        if method == "npse":
            sde = str(settings["sde"])
            made = posterior_score_nn("mlp", sde_type=sde, hidden_features=hidden, num_layers=layers, **plain)
            return made(w, e)
        if method == "nre":
            return classifier_nn("resnet", hidden_features=hidden, num_blocks=layers, **plain)(w, e)
    raise ValueError(f"There is no estimator {method!r}.")


def _begin_at_identity(flow: nn.Module) -> None:
    """Zero in the last layer of every network that gives splines their shape: they start as straight lines of slope one.

    Around the linear part of `_neural_affine` the first density is then the best linear-Gaussian one.
    """
    for module in flow.modules():
        hyper = getattr(module, "hyper", None)
        if isinstance(hyper, nn.Module):
            last = [m for m in hyper.modules() if isinstance(m, nn.Linear)][-1]
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)


def _as_weights(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return tuple(v.to(weight.dtype) for v in inputs)


class Member(nn.Module):
    """One of an ensemble.

    Args:
        settings: plain values. dim: of w. given: numbers in the condition. embedding: of the condition, or None.
    """

    def __init__(self, settings: Mapping[str, Any], dim: int, given: int, embedding: Embedding | Given | None) -> None:
        super().__init__()
        self.method, self.dim = settings["method"], dim
        self.steps, self.contrasts = int(settings["steps"]), int(settings["contrasts"])
        self.embedding = embedding
        features = given if embedding is None else embedding.features
        self.estimator: Any = build_estimator(settings, dim, features)
        if self.method in ("npe", "nle"):
            _begin_at_identity(self.estimator)
        for part in self.estimator.modules():  # sbi encodes times in float32 whatever the weights are
            if isinstance(part, nn.Linear):
                part.register_forward_pre_hook(_as_weights)

    def embed(self, g: Tensor) -> Tensor:
        """e of the condition `(n, given)`."""
        return g if self.embedding is None else self.embedding(g)

    def loss(self, w: Tensor, g: Tensor, generator: torch.Generator) -> Tensor:
        """What training minimises, `(n,)`; flow matching and scores draw from torch's own generator."""
        e = self.embed(g)
        if self.method != "nre":
            return self.estimator.loss(w, condition=e)
        return self._contrastive(w, e, generator)

    def _contrastive(self, w: Tensor, e: Tensor, generator: torch.Generator) -> Tensor:
        """−log softmax of the true pair among K (Durkan, Murray & Papamakarios 2020, arXiv:2002.03712, equation 8)."""
        n = len(w)
        k = min(self.contrasts, n)
        shifts = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(n - 1, generator=generator)[: k - 1]])
        other = (torch.arange(n)[:, None] + shifts).remainder(n).to(w.device)
        logits = self.estimator(w[other].flatten(0, 1), e.repeat_interleave(k, 0)).reshape(n, k)
        return logits.logsumexp(1) - logits[:, 0]

    def log_ratio(self, w: Tensor, e: Tensor) -> Tensor:
        """f(w, e), up to a number that depends on e, `(n,)`."""
        return self.estimator(w, e)

    def log_prob(self, w: Tensor, e: Tensor) -> Tensor:
        """log q(w | e) `(n,)`."""
        if self.method in ("npe", "nle"):
            return self.estimator.net(e).log_prob(w)
        if self.method == "nre":
            raise TypeError("A ratio estimator has no normalised density.")
        start, end = self._times
        base, gained = integrate_density(lambda x, t: self._velocity(x, e, t), w, end, start, self.steps)
        mean, sd = self._base(w)
        z = (base - mean) / sd
        normal = -0.5 * z.square().sum(1) - sd.log().expand_as(z).sum(1) - 0.5 * self.dim * math.log(2 * math.pi)
        return normal + gained

    @torch.no_grad()
    def draw(self, noise: Tensor, e: Tensor) -> Tensor:
        """w of N(0, I) noise `(n, dim)`."""
        if self.method in ("npe", "nle"):
            return self.estimator.net(e).transform.inv(noise)
        start, end = self._times
        mean, sd = self._base(noise)
        return integrate(lambda x, t: self._velocity(x, e, t), mean + sd * noise, start, end, self.steps)

    def _velocity(self, w: Tensor, e: Tensor, t: Tensor) -> Tensor:
        return self.estimator.ode_fn(w, e, t)

    @property
    def _times(self) -> tuple[float, float]:
        """Of noise, and of data."""
        if self.method == "fmpe":
            return 1.0, 0.0
        return float(self.estimator.t_max), float(self.estimator.t_min)

    def _base(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if self.method == "fmpe":
            return like.new_zeros(1, 1), like.new_ones(1, 1)
        return self.estimator._mean_base.to(like), self.estimator._std_base.to(like)
