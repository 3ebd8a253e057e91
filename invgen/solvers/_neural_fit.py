"""From simulations to a trained posterior: rows prepared, held-out shares, members trained one after another."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from invgen.driver import Streams
from invgen.simulations import Simulations
from invgen.solvers._neural_batches import Batches, FreshBatches, Pair, StreamedBatches
from invgen.solvers._neural_coordinates import Coordinates, plainer
from invgen.solvers._neural_features import Features, Typical, has_covariance
from invgen.solvers._neural_network import Network
from invgen.solvers._neural_training import History, Plan, Source, own_random_numbers, train, warn_too_few
from invgen.solvers.amortized import AmortizedPosterior

if TYPE_CHECKING:
    from invgen.problem import InverseProblem

_MEMORY = 1 << 30  # bytes of prepared pairs that are kept in memory; more are read while training
_STATISTICS = 50_000  # rows that standardisation and the linear part are computed from
_HELD = 20_000  # held-out rows at the most
_KEPT = 2000  # held-out distances that the fitted object keeps
_JUDGED = 5000  # rows by which coordinates are chosen
_LEAST = 20  # simulations


@dataclass(frozen=True)
class Recipe:
    """What an estimator of `invgen.solvers.simulation` asks for.

    Args:
        settings: of the network, plain values. plan: of the training. batch_size: None for one from the number of
            simulations. held_out: share. fresh: new simulations every epoch. space: "auto", "u", "x" or "z". warmup: of chains.
        embedding: a module of the user's, or None. linear: whether the linear part is regressed.
    """

    settings: Mapping[str, Any]
    plan: Plan
    batch_size: int | None
    held_out: float
    fresh: bool
    space: str
    warmup: int
    embedding: nn.Module | None
    linear: bool


def derived(seed: int, *purpose: int) -> int:
    """A seed of its own for a purpose."""
    return int(np.random.SeedSequence([seed, *purpose]).generate_state(1)[0])


def simulate(problem: InverseProblem, coordinates: Coordinates, n: int, seed: int) -> Simulations:
    """Pairs of the coordinates' model (x, or the latent z of a generator) and data.

    In the latent z ~ N(0, I) is drawn here, as x alone does not tell it.
    """
    if coordinates.space != "z":
        return Simulations.of(problem, n, seed)
    z = Streams(seed, range(n), salt="latent").normal(coordinates.latent_shape)
    theta = {
        name: law.sample(n, seed=derived(seed, 3, i)).reshape(n)
        for i, (name, law) in enumerate(problem.nuisance.items())
    }
    parts: list[list[Tensor]] = [[] for _ in problem.terms]
    with torch.no_grad():
        for first in range(0, n, 256):
            rows = slice(first, min(first + 256, n))
            some = {k: v[rows] for k, v in theta.items()}
            rng = Streams(seed, range(rows.start, rows.stop), salt="simulate")
            predictions = problem.predict(problem.prior.decode(z[rows]), **some)
            for i, (term, prediction) in enumerate(zip(problem.terms, predictions, strict=True)):
                parts[i].append(term.noise.draw(prediction, rng.spawn(f"term{i}"), **some))
    return Simulations(z, theta, tuple(torch.cat(p) for p in parts)).finite()


def given_simulations(problem: InverseProblem, coordinates: Coordinates, simulations: Simulations) -> Simulations:
    """The user's pairs, checked; models in the latent where the generator can be inverted."""
    simulations.check(problem)
    simulations = simulations.finite()
    if coordinates.space != "z":
        return simulations
    encode = getattr(problem.prior, "encode", None)
    pairs = simulations.batch(slice(None))
    with torch.no_grad():
        z = encode(pairs[0]) if encode is not None else None
    if not isinstance(z, Tensor) or tuple(z.shape[1:]) != coordinates.latent_shape:
        raise TypeError(
            f"{type(problem.prior).__name__} does not tell the latent of a given x; give the number of simulations, which are then drawn with their latents, or space='u'."
        )
    return Simulations(z, pairs[1], pairs[2], simulations.failed)


def fit(
    recipe: Recipe,
    problem: InverseProblem,
    simulations: Simulations | int,
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> AmortizedPosterior:
    """Train; see the estimators' `fit`."""
    coordinates, features = Coordinates.of(problem, recipe.space), Features.of(problem)
    place = torch.device(device or "cpu")
    if isinstance(simulations, Simulations):
        if recipe.fresh:
            raise ValueError("fresh=True simulates while training; give the number of simulations an epoch.")
        pairs = given_simulations(problem, coordinates, simulations)
    else:
        if isinstance(simulations, bool) or not hasattr(simulations, "__index__") or simulations < _LEAST:
            raise ValueError(f"An estimator learns from at least {_LEAST} simulations, got {simulations!r}.")
        pairs = simulate(problem, coordinates, int(simulations), derived(seed, 1))
    if len(pairs) < _LEAST:
        raise ValueError(f"An estimator learns from at least {_LEAST} simulations, got {len(pairs)}.")

    if recipe.space == "auto" and coordinates.space == "u":
        some = pairs.batch(slice(0, _JUDGED))
        coordinates = plainer(problem, some[0], some[1], features.flatten(some[2]))

    def prepare(model: Tensor, theta: dict[str, Tensor], data: tuple[Tensor, ...]) -> Pair:
        v = coordinates.flatten(model.double(), {k: t.double() for k, t in theta.items()})
        return v.float(), features.flatten(data).float()

    settings = {**recipe.settings, "members": recipe.settings["members"] or _members(len(pairs))}
    rows = _Rows(pairs, prepare, recipe, seed, place, (coordinates.dim + features.dim) * 4 * len(pairs) <= _MEMORY)
    v, d = rows.sample(_STATISTICS)
    if recipe.settings["method"] == "nle" and bool((d.std(0) <= 1e-7 * d.mean(0).abs()).any()):
        raise ValueError("Some data never vary, and have no density to learn; mask them, or take NPE or NRE.")
    with own_random_numbers(derived(seed, 2), place):
        network = Network(settings, coordinates.dim, features.dim, features.layout, features.kept, recipe.embedding).to(
            place
        )
    network.standardise(v, d, recipe.linear)
    histories = _train(network, recipe, rows, problem, coordinates, prepare, seed, progress)
    warn_too_few(network.method, histories, len(pairs))
    network = network.cpu().eval().requires_grad_(False)
    typical = _typical(network, rows)
    story = {
        "simulations": len(pairs),
        "failed": pairs.failed,
        "held_out_loss": [h.best for h in histories],
        "training_loss": [h.train for h in histories],
        "best_epoch": [h.best_epoch for h in histories],
        "epochs": [len(h.held) for h in histories],
        "steps": [h.steps for h in histories],
    }
    return AmortizedPosterior(network, coordinates, features, typical, recipe.warmup, story, problem)


def _members(simulations: int) -> int:
    """Of an ensemble: few simulations are learnt by heart, by every member in its own way, and train fast."""
    return 4 if simulations <= 2000 else 2 if simulations <= 20_000 else 1


class _Rows:
    """Training and held-out rows: tensors in memory, or a file that is read in pieces."""

    def __init__(
        self,
        pairs: Simulations,
        prepare: Callable[..., Pair],
        recipe: Recipe,
        seed: int,
        place: torch.device,
        in_memory: bool,
    ) -> None:
        self.pairs, self.prepare, self.seed, self.place, self.in_memory = pairs, prepare, seed, place, in_memory
        n = len(pairs)
        self.size = recipe.batch_size or min(256, max(16, n // 10))
        self.count = max(2, min(round(recipe.held_out * n), _HELD))
        self.order = torch.from_numpy(np.random.default_rng([seed, 5]).permutation(n))
        # every member holds out another share, as long as there are others
        self.folds = max(1, n // self.count) if in_memory else 1
        if in_memory:
            self.tensors = tuple(t.to(place) for t in prepare(*pairs.batch(slice(None))))

    def _held(self, member: int) -> Tensor:
        fold = member % self.folds
        return self.order[fold * self.count : (fold + 1) * self.count]

    def _trained(self, member: int) -> Tensor:
        fold = member % self.folds
        return torch.cat([self.order[: fold * self.count], self.order[(fold + 1) * self.count :]])

    def read(self, index: Tensor) -> Pair:
        """Rows v and d."""
        if self.in_memory:
            return tuple(t.index_select(0, index.to(self.place)) for t in self.tensors)
        found = self.prepare(*self.pairs.batch(index.sort().values))
        return tuple(t.to(self.place) for t in found)

    def sample(self, most: int) -> Pair:
        """Training rows of every member."""
        return self.read(self._trained(0)[:most] if self.folds == 1 else self.order[:most])

    def held(self, member: int) -> Pair:
        return self.read(self._held(member))

    def train(self, member: int, most: int) -> Pair:
        return self.read(self._trained(member)[:most])

    def source(self, member: int, network: Network) -> Source:
        """Batches of targets and conditions."""
        seed = derived(self.seed, 6, member)
        if self.in_memory:
            return Batches(*network.pairs(*self.read(self._trained(member))), size=self.size, seed=seed)

        def ready(model: Tensor, theta: dict[str, Tensor], data: tuple[Tensor, ...]) -> Pair:
            return network.pairs(*(t.to(self.place) for t in self.prepare(model, theta, data)))

        return StreamedBatches(self.pairs.take(self._trained(member).sort().values), ready, size=self.size, seed=seed)


def _train(
    network: Network,
    recipe: Recipe,
    rows: _Rows,
    problem: InverseProblem,
    coordinates: Coordinates,
    prepare: Callable[..., Pair],
    seed: int,
    progress: bool,
) -> list[History]:
    histories = []
    for k, member in enumerate(network._each()):
        source: Source = rows.source(k, network)
        if recipe.fresh:

            def fresh(epoch: int, k: int = k) -> Pair:
                made = simulate(problem, coordinates, len(rows.pairs), derived(seed, 8, k, epoch))
                return network.pairs(*(t.to(rows.place) for t in prepare(*made.batch(slice(None)))))

            source = FreshBatches(fresh, rows=len(rows.pairs), size=rows.size, seed=derived(seed, 9, k))
        held = network.pairs(*rows.held(k))
        name = f"{recipe.settings['method']} {k + 1}/{len(network.members)}"
        with _bar(name, recipe.plan.epochs, progress) as tell:
            histories.append(
                train(
                    member,
                    source,
                    held,
                    lambda k=k: network.pairs(*rows.train(k, _HELD)),  # type: ignore[misc]
                    recipe.plan,
                    seed=derived(seed, 4, k),
                    tell=tell,
                )
            )
    return histories


@contextmanager
def _bar(name: str, epochs: int, shown: bool) -> Iterator[Callable[[int, float], None] | None]:
    """A bar over epochs that shows the held-out loss."""
    if not shown:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(name),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs, held-out loss {task.fields[loss]:.4g}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task("train", total=epochs, loss=math.nan)
        yield lambda epoch, loss: bar.update(task, completed=epoch + 1, loss=loss)


@torch.no_grad()
def _typical(network: Network, rows: _Rows) -> Typical:
    """Where the simulated data lie: in data space where their covariance can be held, else (and for sets, whose members
    have no order) in the embedding."""

    def vectors(d: Tensor) -> Tensor:
        g = network.standard_d(d.cpu())
        member = network._each()[0]
        plain = has_covariance(network.data_dim) and not network.sets
        return g if plain or member.embedding is None else member.embed(g)

    held = vectors(rows.held(0)[1])
    return Typical.of(vectors(rows.train(0, _STATISTICS)[1]), held[:_KEPT])


def untrained(dim: int, data_dim: int) -> AmortizedPosterior:
    """An estimator with random weights for vectors, for tests of what surrounds it."""
    from invgen.solvers.simulation import NPE
    from invgen.transforms import Identity

    recipe = NPE(hidden=8, layers=1, depth=1, members=1)._recipe()
    with own_random_numbers(0, torch.device("cpu")):
        network = Network(recipe.settings, dim, data_dim, [(data_dim,)], None).eval().requires_grad_(False)
        draws = torch.randn(400, data_dim)
    coordinates = Coordinates("u", (dim,), (dim,), (), {"": Identity()})
    features = Features([(data_dim,)], [False], [None])
    return AmortizedPosterior(network, coordinates, features, Typical.of(10 * draws[:200], 10 * draws[200:]))
