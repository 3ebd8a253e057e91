r"""The posterior of every data set at once: a network trained on simulations, that answers new data in milliseconds.

    q(x | d) ≈ p(x | d)   for all d that the simulator gives.

Made by the estimators of `invgen.solvers.simulation`. Outside the data that were simulated a network extrapolates, and
nothing in its answer says so: every observation is therefore compared with the simulated ones.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from invgen.checkpoints import read_checkpoint, write_checkpoint
from invgen.contracts import HasLatent, Solver, require
from invgen.driver import Streams
from invgen.solvers._neural_chains import last_draws, surrogate, together, walker
from invgen.solvers._neural_coordinates import Coordinates
from invgen.solvers._neural_features import Features, Typical
from invgen.solvers._neural_network import POSTERIORS, Condition, Network
from invgen.solvers._neural_observations import as_problem, first_items
from invgen.solvers._target import check_target

if TYPE_CHECKING:
    from invgen.posterior import Posterior
    from invgen.problem import InverseProblem

__all__ = ["AmortizedPosterior"]

_TRIES = 200  # draws of one item until it lies in the support
_STRANGE = 0.01  # p-value of an observation below which a warning is made
_MASS_DRAWS = 2000  # for the mass of the estimate inside the support


@dataclass(frozen=True, eq=False)
class AmortizedPosterior(Solver):
    r"""A trained posterior: `amortized(d, 1000)` draws for new data, in one pass of a network.

    Targets the law that the network has learnt, an approximation of p(x | d): as good as its training, for data like
    those of the simulations. Methods npe, fmpe, npse draw directly; nle and nre learn the likelihood (or its ratio to
    the evidence), and one chain of Hamiltonian Monte Carlo a draw combines it with the prior.

    Draws outside the prior's support are rejected and drawn again, which is the estimate restricted to the support:
    `stats["tries"]` counts draws per sample, and `log_prob` is divided by the mass inside. Every observation has the
    squared Mahalanobis distance from the simulated data and the share of held-out simulations at least as far, in
    `stats["distance"]` and `stats["p_value"]`; below 0.01 a warning is made.

    Attributes:
        network: weights and standardisation. coordinates: what its unknowns are. features: what it sees of the data.
        typical: where the simulated data lie. warmup: of the chains (nle, nre).
        history: held-out and training losses, simulations. problem: what it was trained for, or None.

    Cost: npe one network a draw, fmpe and npse 4 · steps, nle and nre about ten gradients of the network a chain step.
    """

    network: Network
    coordinates: Coordinates
    features: Features
    typical: Typical
    warmup: int = 60
    history: Mapping[str, Any] = field(default_factory=dict)
    problem: InverseProblem | None = None

    @classmethod
    def examples(cls) -> list[AmortizedPosterior]:
        """An untrained one for 16 unknowns and 8 data."""
        from invgen.solvers._neural_fit import untrained

        return [untrained(16, 8)]

    @classmethod
    def exam(cls) -> dict[str, Solver]:
        """None: it is trained for one problem."""
        return {}

    @property
    def method(self) -> str:
        """npe, fmpe, npse, nle or nre."""
        return self.network.method

    @property
    def direct(self) -> bool:
        """Whether the network is a law of the unknowns, which is drawn from without a chain."""
        return self.method in POSTERIORS

    @property
    def pooled(self) -> bool:  # type: ignore[override]
        """Chains of an observation adapt together."""
        return not self.direct

    # --- asking --------------------------------------------------------------------------------------------------------

    def __call__(
        self, d: Tensor | Sequence[Tensor], num_samples: int = 1000, *, seed: int = 0, **options: Any
    ) -> Posterior:
        """Draws for new data.

        Args:
            d: `data_shape` or `(n_obs, *data_shape)`; a list of one such tensor a term where there are several.
            num_samples: draws for each observation. seed: of the draws. options: of `invgen.driver.run` (dtype, device).

        Returns:
            `Posterior` with samples `(n_obs, 1, num_samples, *shape)`, all observations in one batch.

        Raises:
            ValueError: NaN, or data of another shape than the simulations had.
            TypeError: the prior is needed (to decode, or for a chain) and the estimator was loaded without a problem.
        """
        return self.solve(self._problem(d), num_samples, seed=seed, **options)

    def _problem(self, d: Tensor | Sequence[Tensor]) -> InverseProblem:
        return as_problem(d, self.problem, self.coordinates, self.features)

    def typicality(self, d: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """How usual data are: squared Mahalanobis distance and p-value among held-out simulations, `(n_obs,)` each.

        The p-value is uniform for data from the simulator, whatever their law; a small one says that the posterior is
        an extrapolation.
        """
        problem = self._problem(d)
        flat = self.features.flatten([t.data.expand(problem.n_obs, *t.data.shape[1:]) for t in problem.terms])
        squared = self.typical.distance(self._summary(flat, self.network.at(flat.dtype, flat.device)))
        return squared, self.typical.p_value(squared)

    def summary(self, d: Tensor | Sequence[Tensor]) -> Tensor:
        """The vector whose distance `typicality` takes, `(n_obs, features)`: standardised data, or their embedding."""
        problem = self._problem(d)
        flat = self.features.flatten([t.data.expand(problem.n_obs, *t.data.shape[1:]) for t in problem.terms])
        return self._summary(flat, self.network.at(flat.dtype, flat.device))

    def _summary(self, flat: Tensor, network: Network) -> Tensor:
        width = len(self.typical.centre)
        embedded = network.condition(flat).embedded
        if width == self.features.dim and not (network.sets and embedded and embedded[0].shape[1] == width):
            return network.standard_d(flat)
        return embedded[0]

    def log_prob(self, x: Tensor, d: Tensor | Sequence[Tensor], **theta: Tensor) -> Tensor:
        """log q(x | d), `(n,)`, nuisance parameters jointly, −∞ outside the prior's support.

        Args:
            x: `(n, *shape)` in physical units. d: one data set, or n of them. theta: nuisance parameters `(n,)` each.

        Raises:
            TypeError: a learned likelihood or ratio (no normalised posterior), or a latent (no density of x).

        Cost: one network an item (fmpe, npse: 4 · steps · (1 + dim)), and 2000 draws an observation for the mass inside
        the support, which is 1 for priors without bounds.
        """
        if not self.direct:
            raise TypeError(f"The method {self.method!r} learns no normalised posterior; its draws come from chains.")
        if self.coordinates.space == "z":
            raise TypeError("The estimator works in a generator's latent, where x has no density.")
        problem = self._problem(d)
        if problem.n_obs not in (1, len(x)):
            raise ValueError(f"{len(x)} models were given for {problem.n_obs} data sets; give one model a data set.")
        dtype = x.dtype
        network = self.network.at(dtype, x.device)
        flat = self.features.flatten([t.data.expand(problem.n_obs, *t.data.shape[1:]) for t in problem.terms])
        given = network.condition(flat.to(dtype=dtype, device=x.device))
        rows = torch.arange(len(x)) if problem.n_obs > 1 else torch.zeros(len(x), dtype=torch.long)
        good, inside, parameters = self.coordinates.within(x, theta)
        good = good & self.coordinates.supported(problem, x, theta)
        v = self.coordinates.flatten(inside, parameters)
        value = network.log_prob(v, given.rows(rows)) - self.coordinates.log_det(v)
        mass = self._mass(problem, network, given)
        return torch.where(good, value - mass.log()[rows], torch.full_like(value, -math.inf))

    def _mass(self, problem: InverseProblem, network: Network, given: Condition) -> Tensor:
        """Share of the network's draws inside the support, one an observation."""
        found = []
        for row in range(len(given.data)):
            rng = Streams(0, [(row, i) for i in range(_MASS_DRAWS)], device=given.data.device, salt="mass")
            noise = rng.normal((network.dim,), dtype=given.data.dtype)
            pick = rng.integers(len(network.members))
            v = network.draw(noise, pick, given.rows(torch.full((_MASS_DRAWS,), row)))
            x, theta = self.coordinates.physical(v)
            found.append(self.coordinates.supported(problem, x, theta).double().mean())
        return torch.stack(found).clamp_min(1 / _MASS_DRAWS).to(given.data)

    # --- as a solver ---------------------------------------------------------------------------------------------------

    def check(self, problem: InverseProblem) -> None:
        shapes = [tuple(t.operator.data_shape) for t in problem.terms]
        names = tuple(problem.nuisance)
        own = self.coordinates
        if problem.model_shape != own.model_shape or shapes != self.features.shapes or set(names) != set(own.names):
            raise TypeError(
                f"The estimator was trained for x {own.model_shape}, nuisance parameters {list(own.names)} and data {self.features.shapes}, the problem has {problem.model_shape}, {list(names)} and {shapes}; train one for this problem."
            )
        if own.space == "z":
            require(problem.prior, HasLatent, self)
        if not self.direct:
            check_target(self, problem, "auto", gradient=False)

    def solve(self, problem: InverseProblem, num_samples: int = 1, *, seed: int = 0, **options: Any) -> Posterior:
        """Draws for the problem's data, `num_samples` an observation; options go to `invgen.driver.run`."""
        more = dict(options) if self.direct else together(num_samples, options)
        return super().solve(problem, num_samples, seed=seed, **more)

    def num_steps(self, problem: InverseProblem) -> int:
        return 1 if self.direct else walker(self.warmup).num_steps(problem)

    def init(self, problem: InverseProblem, rng: Streams) -> dict[str, Tensor]:
        given, squared = self._given(problem, rng)
        self._tell(squared, rng)
        if not self.direct:
            return walker(self.warmup).init(self._surrogate(problem), rng) | {"squared": squared}
        return {
            "v": given.data.new_zeros(len(rng), self.network.dim),
            "tries": given.data.new_zeros(len(rng)),
            "squared": squared,
        }

    def step(self, problem: InverseProblem, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        if not self.direct:
            squared = state["squared"]
            return walker(self.warmup).step(self._surrogate(problem), state, rng) | {"squared": squared}
        network, (given, squared) = self.network.at(problem.dtype, rng.device), self._given(problem, rng)
        v, tries = torch.full_like(state["v"], math.nan), torch.zeros_like(state["tries"])
        left = torch.isfinite(squared).nonzero()[:, 0]
        owner = first_items(rng)[1]
        for _ in range(_TRIES):
            if not len(left):
                break
            # for all items, so that what an item draws does not depend on how often others have to
            noise = rng.normal((network.dim,), dtype=problem.dtype, tag="noise")[left]
            pick = rng.integers(len(network.members), tag="member")[left]
            drawn = network.draw(noise, pick, given.rows(owner[left]))
            tries[left] += 1
            good = self._inside(problem, drawn)
            v[left[good]] = drawn[good]
            left = left[~good]
        return {"v": v, "tries": tries, "squared": squared}

    def _inside(self, problem: InverseProblem, v: Tensor) -> Tensor:
        if self.coordinates.space == "z":
            return torch.isfinite(v).all(1)
        x, theta = self.coordinates.physical(v)
        return self.coordinates.supported(problem, x, theta)

    @torch.no_grad()
    def finish(self, problem: InverseProblem, state: dict[str, Tensor]) -> dict[str, Tensor]:
        p_value = self.typical.to(state["squared"].device).p_value(state["squared"])
        stats = {"stat_distance": state["squared"], "stat_p_value": p_value}
        if not self.direct:
            found = last_draws(walker(self.warmup).finish(self._surrogate(problem), state))
            lost = ~torch.isfinite(state["squared"]).reshape(-1, *(1,) * (found["x"].ndim - 1))
            return found | stats | {"x": torch.where(lost, torch.full_like(found["x"], math.nan), found["x"])}
        x, theta = self.coordinates.physical(state["v"], problem.prior)
        results = {"x": x.to(problem.dtype), "stat_tries": state["tries"], **stats}
        if self.coordinates.space == "z":
            results["latent"] = self.coordinates.parts(state["v"])[0]
        return results | {f"theta_{n}": value.to(problem.dtype) for n, value in theta.items()}

    def _given(self, problem: InverseProblem, rng: Streams) -> tuple[Condition, Tensor]:
        """The condition of each observation of the chunk, and the squared distance of each item's."""

        def build() -> tuple[Condition, Tensor]:
            items, owner = first_items(rng)
            given, squared = self._conditions(problem, items)
            return given, squared[owner]

        made: tuple[Condition, Tensor] = problem.remember(("condition", id(self)), build, shared=False)
        return made

    def _conditions(self, problem: InverseProblem, items: Tensor) -> tuple[Condition, Tensor]:
        """Of the data of some items."""
        data = [t.data[items] if t.n_obs > 1 else t.data.expand(len(items), *t.data.shape[1:]) for t in problem.terms]
        flat = self.features.flatten(data)
        network = self.network.at(problem.dtype, flat.device)
        return network.condition(flat), self.typical.to(flat.device).distance(self._summary(flat, network))

    def _surrogate(self, problem: InverseProblem) -> InverseProblem:
        """The chunk's problem with the learned likelihood."""

        def build() -> InverseProblem:
            given, _ = self._conditions(problem, torch.arange(problem.n_obs, device=problem.terms[0].data.device))
            network = self.network.at(problem.dtype, given.data.device)
            return surrogate(problem, network, self.coordinates, given)

        made: InverseProblem = problem.remember(("surrogate", id(self)), build, shared=False)
        return made

    def _tell(self, squared: Tensor, rng: Streams) -> None:
        items, _ = first_items(rng)
        values = squared[items]
        p = self.typical.to(values.device).p_value(values)
        strange = [int(i) for i in (p < _STRANGE).nonzero()[:, 0]]
        # among many observations some are rare: one in a hundred is no news
        if len(strange) > max(1, 0.03 * len(items)) or (strange and len(items) < 20):
            worst = min(strange, key=lambda i: float(p[i]))
            warnings.warn(
                f"{len(strange)} of {len(items)} observations lie outside the simulated data (squared Mahalanobis distance {float(values[worst]):.3g}, p = {float(p[worst]):.2g}): their posteriors are extrapolations; compare predictions with the data, or widen prior and noise.",
                stacklevel=4,
            )

    # --- better --------------------------------------------------------------------------------------------------------

    def refine(self, problem: InverseProblem, posterior: Posterior, **options: Any) -> Posterior:
        """Make amortised draws exact where likelihood and prior are known; see `_neural_refine.refine`."""
        from invgen.solvers._neural_refine import refine

        return refine(self, problem, posterior, **options)

    # --- on disk -------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write safetensors with a JSON header: weights, standardisation and settings; no data, no code."""
        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"typical.{k}": v for k, v in self.typical.state_dict().items()}
        tensors |= {f"mask.{i}": m for i, m in enumerate(self.features.masks) if m is not None}
        meta = {
            "settings": self.network.settings,
            "coordinates": self.coordinates.describe(),
            "features": self.features.describe(),
            "typical": list(self.typical.whiten.shape[:1]) + list(self.typical.reached.shape),
            "warmup": self.warmup,
            "history": dict(self.history),
        }
        return write_checkpoint(path, "AmortizedPosterior", tensors, meta)

    @classmethod
    def load(
        cls, path: str | Path, problem: InverseProblem | None = None, *, embedding: nn.Module | None = None
    ) -> AmortizedPosterior:
        """Read what `save` wrote; nothing in the file is executed.

        Args:
            path: of the file. problem: prior, operators and noise it was trained for. Needed to decode a latent, for
                the chains of nle and nre, for transforms that are not of `invgen.transforms`, and to reject draws
                outside the prior's support. embedding: a module with the architecture of a user's own.

        Raises:
            FileNotFoundError: no such file. ValueError: another file, another problem, a missing embedding.
        """
        tensors, meta = read_checkpoint(path, "AmortizedPosterior")
        coordinates = Coordinates.rebuild(meta["coordinates"], problem)
        shapes, stored = [tuple(s) for s in meta["features"]["shapes"]], meta["features"]["complex"]
        features = Features(shapes, stored, [tensors.get(f"mask.{i}") for i in range(len(shapes))])
        with torch.random.fork_rng(devices=[]):  # the weights drawn here are overwritten
            network = Network(
                meta["settings"], coordinates.dim, features.dim, features.layout, features.kept, embedding
            )
        weights = {k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")}
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(
                f"The weights in {path} do not fit the network that its settings describe ({' '.join(str(error).split())[:200]}); give the embedding it was trained with, or train again."
            ) from error
        typical = Typical(*meta["typical"])
        typical.load_state_dict({k.removeprefix("typical."): v for k, v in tensors.items() if k.startswith("typical.")})
        network.eval().requires_grad_(False)
        return cls(network, coordinates, features, typical, int(meta["warmup"]), meta["history"], problem)

    def with_problem(self, problem: InverseProblem) -> AmortizedPosterior:
        """The same estimator with a problem whose prior decodes and bounds."""
        self.check(problem)
        coordinates = Coordinates.rebuild(self.coordinates.describe(), problem)
        return replace(self, coordinates=coordinates, problem=problem)
