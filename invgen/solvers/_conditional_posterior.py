r"""A fitted conditional posterior: draws for any data of the problem it was fitted to."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from invgen._learning import build_network, describe_network
from invgen.checkpoints import read_checkpoint, write_checkpoint
from invgen.contracts import Solver
from invgen.solvers._conditional_field import ConditionalField
from invgen.solvers._conditional_linear import (
    Answer,
    GaussianAnswer,
    RegressionAnswer,
    flat_data,
)

if TYPE_CHECKING:
    from invgen.driver import Streams
    from invgen.posterior import Posterior
    from invgen.problem import InverseProblem

__all__: list[str] = []

_KIND = "ConditionalPosterior"
_UNUSUAL = 1e-3  # share of the simulations beyond which an observation is called unusual


@dataclass(frozen=True, eq=False)
class ConditionalPosterior(Solver):
    """p(x | d) as it was learned: a solver for every data set of the problem it was fitted to. Targets an approximation.

    Calling it gives draws for new data; `solve(problem, n)` draws for the problem's own, so that
    `invgen.diagnostics.calibrate(problem, fitted)` works as it is.

    Attributes:
        field: the trained velocity. answer: the linear answer. problem: what it was fitted to.
        chart: "scale" s, "spread" σ of the prior, "base" sd of the base draws, "distances" q(d) of the simulations, sorted,
            "misfit" mean squared error of F on held-out simulations at the angles (k + ½) π/2n (ancestral sampler).
        base, sampler, steps: as in the estimator. report: of the training: steps, seconds, loss of the network and of the
            linear answer on held-out simulations.

    Cost of a draw: 2 `steps` network items by the midpoint rule, `steps` by the ancestral one, a linear solve for the base
    draw (base "linear"), and one linear solve an observation.
    """

    kind: ClassVar[str] = "approximate"

    field: ConditionalField
    answer: Answer
    problem: InverseProblem
    chart: Mapping[str, Tensor]
    base: str
    sampler: str
    steps: int
    report: Mapping[str, float] = field(default_factory=dict)
    _fields: dict[torch.dtype, ConditionalField] = field(default_factory=dict, init=False, repr=False)

    def check(self, problem: InverseProblem) -> None:
        mine = [tuple(t.operator.data_shape) for t in self.problem.terms]
        its = [tuple(t.operator.data_shape) for t in problem.terms]
        if problem.model_shape != self.problem.model_shape or mine != its:
            raise ValueError(
                f"This posterior was fitted to models {self.problem.model_shape} and data {mine}, the problem has {problem.model_shape} and {its}; fit again."
            )

    def num_steps(self, problem: InverseProblem) -> int:
        return self.steps

    def __call__(
        self, d: Tensor | tuple[Tensor, ...], num_samples: int = 1000, *, seed: int = 0, **options: Any
    ) -> Posterior:
        """Draws for new data.

        Args:
            d: `data_shape` or `(n_obs, *data_shape)`; one a term where there are several. options: of
                `invgen.driver.run`.

        Raises:
            ValueError: data of another shape, or with NaN that no mask covers.

        Warns where an observation lies outside what was simulated; the number is `stats["unusual"]`, the share of
        simulations farther from the centre than it.
        """
        data = d if isinstance(d, tuple) else (d,)
        posterior = self.solve(self.problem.with_data(*data), num_samples, seed=seed, **options)
        share = posterior.stats["unusual"][:, 0, 0]
        bad = (share < _UNUSUAL).nonzero()[:, 0].tolist()
        if bad:
            q = posterior.stats["distance"][bad, 0, 0].tolist()
            warnings.warn(
                f"Observation {bad[0]} ({len(bad)} in all) lies outside the simulations: its distance from their centre is {q[0]:.3g}, theirs {float(self.chart['distances'][0]):.3g} to {float(self.chart['distances'][-1]):.3g}; what was learned says nothing there.",
                stacklevel=2,
            )
        return posterior

    # --- one run -------------------------------------------------------------------------------------------------------

    def _cast(self, like: Tensor) -> ConditionalField:
        found = self._fields.get(like.dtype)
        if found is None or next(found.parameters()).device != like.device:
            found = self._fields[like.dtype] = copy.deepcopy(self.field).to(like).eval().requires_grad_(False)
        return found

    def features(self, centre: Tensor) -> Tensor:
        """What the network sees beside ζ: (m(d) − μ)/σ and ln s/σ, `(batch, 2 channels, *spatial)`."""
        spread, scale = self.chart["spread"].to(centre), self.chart["scale"].to(centre)
        sensitivity = torch.log(scale / spread).expand_as(centre)
        parts = [(centre - self.answer.mean.to(centre)) / spread, sensitivity]
        return torch.cat(parts, dim=1)

    def data_input(self, problem: InverseProblem) -> Tensor | None:
        """Standardised data for the embedding, `(n_obs, m)`."""
        if self.field.embedding is None:
            return None
        d = network_data(problem, self.field.embedding)
        return (d - self.chart["data_mean"].to(d)) / self.chart["data_sd"].to(d)

    def draw_base(self, rng: Streams, dtype: torch.dtype) -> Tensor:
        """ζ₀: unit white noise, or an error of the linear answer in units of its own sd."""
        if self.base != "linear":
            return rng.normal(self.problem.model_shape, dtype=dtype, tag="base")
        return self.answer.errors(rng, dtype, "base") / self.chart["base"].to(rng.device, dtype)

    def init(self, problem: InverseProblem, rng: Streams) -> dict[str, Tensor]:
        numbers = [o for o, _ in rng.items]
        first = [numbers.index(o) for o in dict.fromkeys(numbers)]
        back = torch.tensor([list(dict.fromkeys(numbers)).index(o) for o in numbers], device=rng.device)
        one = problem if len(first) == len(numbers) else problem.select(first)
        with torch.no_grad():
            centre, q = self.answer.estimate(one)
            state = {
                "zeta": self.draw_base(rng, problem.dtype),
                "centre": centre[back],
                "distance": q[back],
                "clock": torch.zeros((), dtype=torch.long),
            }
            data = self.data_input(one)
        if data is not None:
            state["data"] = data[back]
        return state

    def step(self, problem: InverseProblem, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        clock, zeta = int(state["clock"]), state["zeta"]
        with torch.no_grad():
            if self.sampler == "midpoint":
                zeta = self._midpoint(clock, zeta, state)
            else:
                zeta = self._ancestral(clock, zeta, state, rng)
        return {**state, "zeta": zeta, "clock": state["clock"] + 1}

    def _velocity(self, phi: float, zeta: Tensor, state: dict[str, Tensor]) -> Tensor:
        field = self._cast(zeta)
        theta = field.path_angle(torch.full((len(zeta),), phi, dtype=zeta.dtype, device=zeta.device))
        return field(zeta, theta, self.features(state["centre"]), state.get("data"))

    def _at(self, phi: float, zeta: Tensor) -> Tensor:
        """Angle of each pixel where a typical one has φ."""
        field = self._cast(zeta)
        return field.angle(field.path_angle(torch.tensor([phi], dtype=zeta.dtype, device=zeta.device)))

    def _midpoint(self, clock: int, zeta: Tensor, state: dict[str, Tensor]) -> Tensor:
        h = 0.5 * math.pi / self.steps
        start, middle, end = (self._at(h * (clock + part), zeta) for part in (0.0, 0.5, 1.0))
        half = zeta + (middle - start) * self._velocity(h * clock, zeta, state)
        return zeta + (end - start) * self._velocity(h * (clock + 0.5), half, state)

    def _ancestral(self, clock: int, zeta: Tensor, state: dict[str, Tensor], rng: Streams) -> Tensor:
        """x_σ = ζ/sin φ, σ = cot φ: the step of the Gaussian channel from σ to σ' < σ with fresh noise."""
        sigma, lower = (_level(k, self.steps) for k in (clock, clock + 1))
        phi = math.atan2(1.0, sigma)
        clean = math.sin(phi) * zeta + math.cos(phi) * self._velocity(phi, zeta, state)
        noise = rng.normal(self.problem.model_shape, dtype=zeta.dtype, tag="ancestral")
        share = (lower / sigma) ** 2
        # what is left unknown of the clean field moves with it
        unknown = math.cos(phi) ** 2 * _between(self.chart["misfit"], phi)
        variance = lower**2 * (1 - share) + (1 - share) ** 2 * unknown
        x = clean + share * (zeta / math.sin(phi) - clean) + math.sqrt(variance) * noise
        return x * math.sin(math.atan2(1.0, lower))

    def finish(self, problem: InverseProblem, state: dict[str, Tensor]) -> Mapping[str, Tensor]:
        centre, q = state["centre"], state["distance"]
        u = centre + self.chart["scale"].to(centre) * state["zeta"]
        known = self.chart["distances"].to(q.device, torch.float64)
        below = torch.searchsorted(known, q.double().contiguous()) / len(known)
        share = torch.where(torch.isfinite(q), 2 * torch.minimum(below, 1 - below), torch.zeros_like(below))
        return {"x": problem.prior.transform(u).to(problem.dtype), "stat_distance": q, "stat_unusual": share.to(q)}

    # --- files ---------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file with the weights and the linear answer; the simulations are not needed again.

        Raises:
            TypeError: a network that is not one of invgen's.
        """
        embedding: Any = self.field.embedding
        own = isinstance(embedding, nn.Identity)
        if own:
            embedding = "data"
        meta = {
            "network": describe_network(self.field.network),
            "embedding": embedding if embedding is None or own else describe_network(embedding),
            "answer": self.answer.name,
            "law": self.field.law,
            "base": self.base,
            "sampler": self.sampler,
            "steps": self.steps,
            "report": dict(self.report),
            "model_shape": list(self.problem.model_shape),
            "data_shapes": [list(t.operator.data_shape) for t in self.problem.terms],
        }
        tensors = {f"field.{k}": v for k, v in self.field.state_dict().items()}
        tensors |= {f"chart.{k}": v for k, v in self.chart.items()} | {"mean": self.answer.mean}
        tensors |= {f"answer.{k}": v for k, v in self.answer.tensors().items()}
        return write_checkpoint(path, _KIND, tensors, meta)

    @classmethod
    def load(cls, path: str | Path, problem: InverseProblem, *, limit: int = 4096) -> ConditionalPosterior:
        """Read what `save` wrote.

        Args:
            problem: the one it was fitted to; its data do not matter. Physics is code, which no file of invgen holds.
            limit: data up to which R + A C Aᴴ is factorised.

        Raises:
            FileNotFoundError: no such file. ValueError: another kind of file, another problem.
        """
        tensors, meta = read_checkpoint(path, _KIND)
        mine = [list(t.operator.data_shape) for t in problem.terms]
        if list(problem.model_shape) != meta["model_shape"] or mine != meta["data_shapes"]:
            raise ValueError(
                f"{path} was fitted to models {meta['model_shape']} and data {meta['data_shapes']}, the problem has {list(problem.model_shape)} and {mine}."
            )
        parts = {
            name: {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
            for name in ("field", "chart", "answer")
        }
        stored = meta["embedding"]
        embedding = None if stored is None else nn.Identity() if stored == "data" else build_network(stored)
        ratio = parts["field"].get("ratio")
        field = ConditionalField(build_network(meta["network"]), embedding, problem.model_shape, meta["law"], ratio)
        field.load_state_dict(parts["field"])
        made: type[GaussianAnswer] | type[RegressionAnswer] = (
            GaussianAnswer if meta["answer"] == GaussianAnswer.name else RegressionAnswer
        )
        answer = made.of(problem, tensors["mean"].double(), parts["answer"], limit)
        return cls(
            field.eval().requires_grad_(False),
            answer,
            problem,
            parts["chart"],
            meta["base"],
            meta["sampler"],
            int(meta["steps"]),
            meta["report"],
        )


def on_the_grid(problem: InverseProblem) -> bool:
    """True where all data are real fields on the grid of the model."""
    grid = problem.model_shape[1:]
    return bool(grid) and all(t.operator.data_shape[1:] == grid and not t.data.is_complex() for t in problem.terms)


def network_data(problem: InverseProblem, embedding: nn.Module) -> Tensor:
    """What an embedding is given: flat data, or (the identity, on the model's grid) the data as channels."""
    if isinstance(embedding, nn.Identity) and on_the_grid(problem):
        return torch.cat([t.data for t in problem.terms], dim=1)
    return flat_data(problem)


def _between(values: Tensor, phi: float) -> float:
    """Linear interpolation of values at the angles (k + ½) π/2n."""
    place = min(max(phi / (0.5 * math.pi) * len(values) - 0.5, 0.0), len(values) - 1.0)
    k = min(int(place), len(values) - 2)
    return float(torch.lerp(values[k], values[k + 1], place - k))


def _level(k: int, steps: int) -> float:
    """σ_k, k = 0 … steps: Karras et al. 2022, equation 5 (ρ = 7) from 300 to 0.01, then 0."""
    if k >= steps:
        return 0.0
    high, low, rho = 300.0, 0.01, 7.0
    part = k / max(steps - 1, 1)
    return float((high ** (1 / rho) + part * (low ** (1 / rho) - high ** (1 / rho))) ** rho)
