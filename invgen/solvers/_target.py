r"""The density a chain walks on, in one flat position q for each item.

In a latent space every unknown is standard normal beforehand: q = (z, z_θ), x = f(z), θ = f_θ(z_θ), and

    log p(q | d) = −Φ(q) − ½ |q|² + const,        Φ(q) = −log p(d | g(f(z)), θ).

A prior that has a density but no generator is walked on in its own coordinates, x = T(u), θ = T_θ(v): q = (u, v), and

    log p(q | d) = −Φ(q) + const,                 Φ(q) = −log p(d | g(T(u)), θ) − log p(T(u)) |T'(u)| − log p(T_θ(v)) |T_θ'(v)|.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invgen.contracts import HasDensity, HasLatent, Solver, require
from invgen.driver import default_chunk
from invgen.noise import GaussianNoise
from invgen.solvers._inner import accepted, term_misfit

if TYPE_CHECKING:
    from invgen.driver import Streams
    from invgen.problem import InverseProblem

_SPACES = ("auto", "z", "u")
_TRIES = 20  # draws of the prior until a start has a finite likelihood


class Target:
    """Φ, its gradient, and what a position stands for.

    Args:
        problem: the chunk's: item i of a batch belongs to item i of its data.
        space: "z", "u" or "auto" (z where the prior decodes).

    Attributes:
        space: "z" or "u". gaussian: q has the reference N(0, I) beside Φ (space "z").
        dim: numbers in a position; the first `model_dim` are the model's, the others one for each nuisance parameter.
    """

    def __init__(self, problem: InverseProblem, space: str = "auto") -> None:
        self.problem = problem
        self.space = resolve(problem, space)
        self.gaussian = self.space == "z"
        prior = problem.prior
        self.model_shape = tuple(prior.latent_shape) if self.gaussian else problem.model_shape
        self.model_dim = math.prod(self.model_shape)
        self.names = list(problem.nuisance)
        self.dim = self.model_dim + len(self.names)

    def parts(self, q: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Model coordinates `(batch, *model_shape)` and θ, `(batch,)` each, of q `(batch, dim)`."""
        model = q[:, : self.model_dim].reshape(-1, *self.model_shape)
        theta = {}
        for i, name in enumerate(self.names):
            v = q[:, self.model_dim + i, None]
            prior = self.problem.nuisance[name]
            theta[name] = (prior.decode(v) if self.gaussian else prior.transform(v)).reshape(-1)
        return model, theta

    def physical(self, q: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """x `(batch, *shape)` and θ, without a graph, decoded a few at a time."""
        with torch.no_grad():
            blocks = [self._physical(part) for part in q.split(self._block(q))]
        return torch.cat([x for x, _ in blocks]), {n: torch.cat([t[n] for _, t in blocks]) for n in self.names}

    def _physical(self, q: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        model, theta = self.parts(q)
        prior = self.problem.prior
        return (prior.decode(model) if self.gaussian else prior.transform(model)), theta

    def misfit(self, q: Tensor) -> Tensor:
        """Φ `(batch,)` of q `(batch, dim)`, differentiable; the batch is that of the chunk."""
        model, theta = self.parts(q)
        prior = self.problem.prior
        x = prior.decode(model) if self.gaussian else prior.transform(model)
        total, good = q.new_zeros(len(q)), None
        if theta:
            good, theta = sound(self.problem, theta)
        if not self.gaussian:
            total = total - prior.log_prob(x) - prior.transform.log_det(model)
            for i, name in enumerate(self.names):
                v, law = q[:, self.model_dim + i, None], self.problem.nuisance[name]
                total = total - law.log_prob(law.transform(v)) - law.transform.log_det(v)
        for i, term in enumerate(self.problem.observed_terms()):
            prediction = term.operator(x, **accepted(term, theta))
            total = total + term_misfit(self.problem, i, term, prediction, theta)
        return total if good is None else torch.where(good, total, torch.full_like(total, math.inf))

    def value(self, q: Tensor) -> Tensor:
        """Φ without a graph, `(batch,)`, in blocks of a cache's size."""
        with torch.no_grad():
            return torch.cat([t.misfit(part) for t, part in self._blocks(q)])

    def value_and_grad(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Φ `(batch,)` and ∇Φ `(batch, dim)`, in blocks of a cache's size."""
        values, gradients = [], []
        with torch.enable_grad():
            for target, part in self._blocks(q):
                at = part.detach().requires_grad_()
                phi = target.misfit(at)
                (gradient,) = torch.autograd.grad(phi.sum(), at)
                values.append(phi.detach())
                gradients.append(gradient)
        if len(values) == 1:
            return values[0], gradients[0]
        return torch.cat(values), torch.cat(gradients)

    def log_density(self, q: Tensor, phi: Tensor) -> Tensor:
        """log p(q | d) up to a constant, given Φ(q)."""
        return -phi - 0.5 * q.square().sum(1) if self.gaussian else -phi

    def start(self, rng: Streams, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """q of the prior for each item and its Φ; drawn again where the likelihood is zero or NaN, a few times.

        Positions that never had a finite Φ are NaN.
        """
        q = self._draw(rng, dtype)
        phi = self.value(q)
        for _ in range(_TRIES):
            bad = ~torch.isfinite(phi)
            if not bool(bad.any()):
                break
            q = torch.where(bad[:, None], self._draw(rng, dtype), q)
            phi = self.value(q)
        good = torch.isfinite(phi)
        return torch.where(good[:, None], q, torch.full_like(q, math.nan)), phi

    def _draw(self, rng: Streams, dtype: torch.dtype) -> Tensor:
        if self.gaussian:
            return rng.normal((self.dim,), dtype=dtype, tag="start")
        seeds = rng.integers(2**31 - 1, tag="start").tolist()
        prior, nuisance = self.problem.prior, self.problem.nuisance.values()
        rows = []
        for seed in seeds:
            parts = [prior.transform.inverse(prior.sample(1, seed=seed)).reshape(-1)]
            parts += [p.transform.inverse(p.sample(1, seed=seed + i + 1)).reshape(-1) for i, p in enumerate(nuisance)]
            rows.append(torch.cat([p.to(dtype) for p in parts]))
        return torch.stack(rows).to(rng.device)

    def of_some(self, items: Tensor) -> Target:
        """The target of the items of an index: data of one row serve any."""
        if all(t.n_obs == 1 for t in self.problem.terms):
            return self
        return Target(self.problem.select(items.tolist()), self.space)

    def _block(self, q: Tensor) -> int:
        return default_chunk(self.problem.model_shape, q.device)

    def _blocks(self, q: Tensor) -> list[tuple[Target, Tensor]]:
        """Pieces of the batch, each with the target of its own data."""
        size = self._block(q)
        if len(q) <= size:
            return [(self, q)]
        return [
            (self._part(first, min(first + size, len(q))), q[first : first + size]) for first in range(0, len(q), size)
        ]

    def _part(self, first: int, last: int) -> Target:
        def build() -> Target:
            counts = [t.n_obs for t in self.problem.terms]
            rows = range(first, last) if max(counts) > 1 else [0]
            return Target(self.problem.select(list(rows)), self.space)

        return self.problem.remember(("target", self.space, first, last), build, shared=False)


def sound(problem: InverseProblem, theta: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Which items `(batch,)` have parameters that can be computed with, and theta with those of the others replaced.

    A long step in a latent may overflow exp; noise refuses such levels, while a line search only needs to hear "no".
    """
    levels = {
        t.noise.sigma for t in problem.terms if isinstance(t.noise, GaussianNoise) and isinstance(t.noise.sigma, str)
    }
    good = torch.stack([torch.isfinite(v) for v in theta.values()]).all(0)
    for name in levels & set(theta):
        square = theta[name].square()
        good = good & (square > torch.finfo(square.dtype).tiny) & torch.isfinite(square)
    return good, {k: torch.where(good, v, torch.ones_like(v)) for k, v in theta.items()}


def target_of(problem: InverseProblem, space: str) -> Target:
    """The target of a chunk, built once."""
    return problem.remember(("target", space), lambda: Target(problem, space), shared=False)


def resolve(problem: InverseProblem, space: str) -> str:
    """The space "auto" stands for."""
    return space if space != "auto" else ("z" if isinstance(problem.prior, HasLatent) else "u")


def check_target(solver: Solver, problem: InverseProblem, space: str, *, gradient: bool) -> None:
    """Raise a TypeError where the solver cannot walk: capabilities, nuisance parameters, black boxes."""
    if space not in _SPACES:
        raise ValueError(f"{type(solver).__name__} takes space from {_SPACES}, got {space!r}.")
    found = resolve(problem, space)
    require(problem.prior, HasLatent if found == "z" else HasDensity, solver)
    wanted, ability = (HasLatent, "decode") if found == "z" else (HasDensity, "log_prob")
    for name, prior in problem.nuisance.items():
        if not isinstance(prior, wanted):
            raise TypeError(
                f"{type(solver).__name__} draws nuisance parameters in the space {found!r} and needs {ability} of their priors, which {type(prior).__name__} of {name!r} does not have; give it a GaussianPrior with a transform (Exp for positive parameters)."
            )
    if gradient and min(t.operator.derivative_order for t in problem.terms) < 1:
        from invgen import solvers

        free = ", ".join(_derivative_free(solvers))
        raise TypeError(
            f"{type(solver).__name__} needs the gradient of every operator, and one of them is a black box (derivative_order 0); solvers without derivatives: {free}."
        )


def _derivative_free(room: Any) -> list[str]:
    """Exported solvers that say they need no derivative of the physics."""
    names = []
    for name in sorted(room._exports):
        item = getattr(room, name)
        if isinstance(item, type) and issubclass(item, Solver) and getattr(item, "derivative_free", False):
            names.append(name)
    return names
