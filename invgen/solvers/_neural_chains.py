r"""Chains on a learned likelihood (or ratio): the problem whose noise model is the network.

    log p(v | d) = log q(d | v) + log p(v) + const,

walked by the chains of the house: all draws of all observations are one batch, each the end of a chain of its own. A
chain starts from one of `_CANDIDATES` draws of the prior, chosen with probabilities ∝ q(d | v), so that modes have the
weights of the posterior before any chain moves (Rubin 1988, sampling importance resampling).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invgen.contracts import Operator
from invgen.driver import Streams
from invgen.problem import InverseProblem
from invgen.solvers._neural_coordinates import Coordinates
from invgen.solvers._neural_network import Condition, Network
from invgen.solvers._target import Target, resolve

if TYPE_CHECKING:
    from invgen.solvers.hmc import HMC

_CANDIDATES = 1024  # draws of the prior, an observation
_TOGETHER = 4096  # chains
_BLOCK = 8192  # rows a network sees at once


class Passed(Operator):
    """x as it is: what the learned likelihood takes in place of a prediction."""

    derivative_order = 1

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        return x


class Learned:
    """q(d | x, θ) as a noise model whose prediction is x itself; the data are a standardised condition, flat."""

    def __init__(self, network: Network, coordinates: Coordinates, widths: list[int]) -> None:
        self.network, self.coordinates, self.widths = network, coordinates, widths

    def __call__(self, x: Tensor, **theta: Tensor) -> _LearnedLaw:
        return _LearnedLaw(self, x, theta)

    def condition(self, flat: Tensor) -> Condition:
        """The condition of a flat vector `(n, Σ widths)`."""
        data, *embedded = flat.split(self.widths, dim=1)
        return Condition(data, tuple(embedded))


class _LearnedLaw:
    def __init__(self, learned: Learned, x: Tensor, theta: Mapping[str, Tensor]) -> None:
        self.learned, self.x, self.theta = learned, x, theta

    def log_prob(self, flat: Tensor) -> Tensor:
        """`(n,)`, −∞ for unknowns that have no coordinates."""
        learned, x = self.learned, self.x
        good, inside, theta = learned.coordinates.within(x, self.theta)
        v = learned.coordinates.flatten(inside, theta)
        given = learned.condition(flat.expand(len(x), -1).to(v))
        value = learned.network.log_likelihood(v, given)
        return torch.where(good, value, torch.full_like(value, -torch.inf))


class _Resampled(Target):
    """A target whose starts are resampled from draws of the prior."""

    def start(self, rng: Streams, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        observations = list(dict.fromkeys(o for o, _ in rng.items))
        first = [next(i for i, (p, _) in enumerate(rng.items) if p == o) for o in observations]
        q = self._candidates(rng, dtype)
        chosen = torch.empty(len(rng), self.dim, dtype=dtype, device=rng.device)
        uniform = rng.uniform((), dtype=torch.float64, tag="choose")
        owner = torch.tensor([observations.index(o) for o, _ in rng.items], device=rng.device)
        shared = all(t.n_obs == 1 for t in self.problem.terms)
        for k, item in enumerate(first):  # each observation weighs the same candidates
            part = self if shared else Target(self.problem.select([item]), self.space)
            log_weights = torch.nan_to_num(-part.value(q).double(), nan=-torch.inf, posinf=-torch.inf)
            mine = (owner == k).nonzero()[:, 0]
            if not self.gaussian:  # the misfit holds the prior, of which the candidates are draws already
                log_weights = log_weights - self._log_prior(q)
            weights = torch.softmax(log_weights, 0)
            if bool(torch.isnan(weights).any()):
                chosen[mine] = torch.nan
                continue
            cumulative = weights.cumsum(0)
            rows = torch.searchsorted(cumulative, uniform[mine] * cumulative[-1]).clamp_max(len(q) - 1)
            chosen[mine] = q[rows]
        return chosen, self.value(chosen)

    def _candidates(self, rng: Streams, dtype: torch.dtype) -> Tensor:
        if self.gaussian:
            made = Streams(rng.seed, [(0, i) for i in range(_CANDIDATES)], device=rng.device, salt="candidates")
            return made.normal((self.dim,), dtype=dtype)
        prior, nuisance = self.problem.prior, self.problem.nuisance.values()
        parts = [prior.transform.inverse(prior.sample(_CANDIDATES, seed=rng.seed)).reshape(_CANDIDATES, -1)]
        parts += [
            p.transform.inverse(p.sample(_CANDIDATES, seed=rng.seed + 1 + i)).reshape(_CANDIDATES, 1)
            for i, p in enumerate(nuisance)
        ]
        return torch.cat([p.to(dtype) for p in parts], dim=1).to(rng.device)

    def _log_prior(self, q: Tensor) -> Tensor:
        model, _ = self.parts(q)
        prior = self.problem.prior
        total = prior.log_prob(prior.transform(model)) + prior.transform.log_det(model)
        for i, name in enumerate(self.names):
            v, law = q[:, self.model_dim + i, None], self.problem.nuisance[name]
            total = total + law.log_prob(law.transform(v)) + law.transform.log_det(v)
        return total.double()

    def _block(self, q: Tensor) -> int:
        return _BLOCK


def surrogate(problem: InverseProblem, network: Network, coordinates: Coordinates, given: Condition) -> InverseProblem:
    """The problem with the learned likelihood, one row of `given` an item, its target planted for the chains."""
    flat = torch.cat([given.data, *given.embedded], dim=1)
    widths = [given.data.shape[1], *(e.shape[1] for e in given.embedded)]
    # an observation beyond the range of numbers has no likelihood, which a chain reports as lost
    flat = torch.nan_to_num(flat, nan=torch.finfo(flat.dtype).max)
    flat = flat.clamp(-torch.finfo(flat.dtype).max, torch.finfo(flat.dtype).max)
    operator = Passed(problem.model_shape, (flat.shape[1],))
    made = InverseProblem(
        flat, operator, Learned(network, coordinates, widths), problem.prior, nuisance=problem.nuisance
    )
    space = resolve(made, "auto")
    made.remember(("target", space), lambda: _Resampled(made, space), shared=False)
    return made


def walker(warmup: int) -> HMC:
    """One draw a chain, after a warm-up."""
    from invgen.solvers.hmc import HMC

    return HMC(draws=1, warmup=warmup, thin=5, max_leaps=16)


def together(num_samples: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a run with as many observations a chunk as 4096 chains hold: the network's cost is that of the call."""
    counted = isinstance(num_samples, int) and num_samples > 0
    if not counted or options.get("chunk") is not None:
        return dict(options)
    return {**options, "chunk": num_samples * max(1, _TOGETHER // num_samples)}


def last_draws(results: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a chain of one draw found, as independent items."""
    out: dict[str, Any] = {"x": results["chain"][:, 0]}
    if "latent_chain" in results:
        out["latent"] = results["latent_chain"][:, 0]
    for name, value in results.items():
        if name.startswith("theta_"):
            out[name] = value[:, 0]
    out["stat_accept"] = results["stat_accept"][:, 0]
    return out
