r"""The vector that a neural estimator learns: all unknowns of a problem in coordinates without bounds, side by side.

    v = (T⁻¹(x), T_θ⁻¹(θ))        "u", in the prior's own coordinates, x = T(u),
    v = (x, T_θ⁻¹(θ))             "x", as it is; what leaves the prior's support is drawn again,
    v = (z, T_θ⁻¹(θ))             "z", in the latent of a generator, x = f(z),

with p(x, θ | d) = p(v | d) |∂v/∂(x, θ)| in the first two; the third has no density of x. Between u and x decides what
the best linear-Gaussian law of v given d leaves unknown, its entropy as a density of x (`plainer`): data that measure x
inside bounds are linear in x and not in u.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invgen.contracts import HasDensity, HasLatent, require
from invgen.solvers._neural_affine import Affine as LinearPart
from invgen.transforms import Affine, Chain, Exp, Identity, Log, Probit, Sigmoid

if TYPE_CHECKING:
    from invgen.problem import InverseProblem

_LARGE = 64  # numbers above which a field with a generator is inferred in its latent


@dataclass(frozen=True, eq=False)
class Coordinates:
    """What v stands for.

    Args:
        space: "u", "x" or "z". model_shape: of x. latent_shape: of z, or of u.
        names: nuisance parameters, one number each at the end of v.
        transforms: name -> transform of the unknowns; "" is the model's (None in the space "z").
    """

    space: str
    model_shape: tuple[int, ...]
    latent_shape: tuple[int, ...]
    names: tuple[str, ...] = ()
    transforms: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, problem: InverseProblem, space: str = "auto", solver: object = "The estimator") -> Coordinates:
        """The coordinates of a problem; "auto" is the latent for fields of more than 64 numbers with a generator."""
        if space not in ("auto", "u", "x", "z"):
            raise ValueError(f"The space is 'auto', 'u', 'x' or 'z', got {space!r}.")
        prior, shape = problem.prior, problem.model_shape
        if space == "auto":
            field_with_generator = len(shape) > 1 and math.prod(shape) > _LARGE and isinstance(prior, HasLatent)
            space = "z" if field_with_generator else "u"
        if space == "z":
            require(prior, HasLatent, solver)
        for name, law in problem.nuisance.items():
            if math.prod(law.shape) != 1:
                raise ValueError(f"The nuisance parameter {name!r} has the shape {tuple(law.shape)}, (1,) is expected.")
        transforms = {name: law.transform for name, law in problem.nuisance.items()}
        if space != "z":
            transforms[""] = prior.transform if space == "u" else Identity()
        latent = tuple(prior.latent_shape) if space == "z" else shape
        return cls(space, shape, latent, tuple(problem.nuisance), transforms)

    @property
    def model_dim(self) -> int:
        """Numbers of v that are the model's."""
        return math.prod(self.latent_shape)

    @property
    def dim(self) -> int:
        """Numbers in v."""
        return self.model_dim + len(self.names)

    # --- to and fro ----------------------------------------------------------------------------------------------------

    def flatten(self, model: Tensor, theta: Mapping[str, Tensor]) -> Tensor:
        """v `(n, dim)` of x `(n, *model_shape)` (of z in the space "z") and θ `(n,)` each."""
        first = model if self.space == "z" else self.transforms[""].inverse(model)
        parts = [first.reshape(len(model), -1)]
        parts += [self.transforms[n].inverse(theta[n].reshape(-1, 1)).to(first) for n in self.names]
        return torch.cat(parts, dim=1)

    def within(self, model: Tensor, theta: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Which items have coordinates, `(n,)`, and the unknowns with those of the others replaced."""
        good = torch.ones(len(model), dtype=torch.bool, device=model.device)
        if self.space != "z":
            good, model = self.transforms[""].within_range(model)
        replaced = {}
        for n in self.names:
            fits, value = self.transforms[n].within_range(theta[n].reshape(-1, 1))
            good, replaced[n] = good & fits, value.reshape(-1)
        return good, model, replaced

    def parts(self, v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Model coordinates `(n, *latent_shape)` and θ `(n,)` each."""
        model = v[:, : self.model_dim].reshape(-1, *self.latent_shape)
        theta = {}
        for i, name in enumerate(self.names):
            theta[name] = self.transforms[name](v[:, self.model_dim + i, None]).reshape(-1)
        return model, theta

    def physical(self, v: Tensor, prior: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
        """x `(n, *model_shape)` and θ of v `(n, dim)`; the space "z" needs the prior, which decodes."""
        model, theta = self.parts(v)
        return (prior.decode(model) if self.space == "z" else self.transforms[""](model)), theta

    def log_det(self, v: Tensor) -> Tensor:
        """log |∂(x, θ)/∂v|, `(n,)`."""
        model = v[:, : self.model_dim].reshape(-1, *self.latent_shape)
        total = self.transforms[""].log_det(model)
        for i, name in enumerate(self.names):
            total = total + self.transforms[name].log_det(v[:, self.model_dim + i, None])
        return total

    def supported(self, problem: InverseProblem, x: Tensor, theta: Mapping[str, Tensor]) -> Tensor:
        """Where the prior has a density above zero, `(n,)`; everywhere for priors without a density."""
        good = torch.isfinite(x.flatten(1)).all(1)
        if self.space != "z" and isinstance(problem.prior, HasDensity):
            good = good & torch.isfinite(problem.prior.log_prob(x))
        for name in self.names:
            law = problem.nuisance.get(name)
            if isinstance(law, HasDensity):
                good = good & torch.isfinite(law.log_prob(theta[name].reshape(-1, 1)))
        return good

    # --- on disk -------------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """JSON-able settings; a transform that invgen does not know stays with the problem."""
        return {
            "space": self.space,
            "model_shape": list(self.model_shape),
            "latent_shape": list(self.latent_shape),
            "names": list(self.names),
            "transforms": {n: describe_transform(t) for n, t in self.transforms.items()},
        }

    @classmethod
    def rebuild(cls, stored: Mapping[str, Any], problem: InverseProblem | None) -> Coordinates:
        """What `describe` wrote, with the problem's transforms where there is one."""
        names, space = tuple(stored["names"]), str(stored["space"])
        if problem is not None:
            found = cls.of(problem, space)
            if found.model_shape != tuple(stored["model_shape"]) or found.names != names:
                raise ValueError(
                    f"The estimator was trained for models {tuple(stored['model_shape'])} and nuisance parameters {list(names)}, the problem has {found.model_shape} and {list(found.names)}; give the problem it was trained for."
                )
            return found
        transforms = {n: rebuild_transform(t, n) for n, t in stored["transforms"].items()}
        return cls(space, tuple(stored["model_shape"]), tuple(stored["latent_shape"]), names, transforms)


def plainer(problem: InverseProblem, x: Tensor, theta: Mapping[str, Tensor], d: Tensor) -> Coordinates:
    """The coordinates, u or x, in which the best linear-Gaussian law of simulated pairs has the smaller entropy.

    Args:
        x: `(n, *model_shape)`. theta: `(n,)` each. d: `(n, data_dim)`.
    """
    own = Coordinates.of(problem, "u")
    transform = problem.prior.transform
    if getattr(transform, "affine", False) or not isinstance(problem.prior, HasDensity) or len(x) < 20 * own.dim:
        return own
    entropies = []
    for coordinates in (own, Coordinates.of(problem, "x")):
        v = coordinates.flatten(x.double(), {k: t.double() for k, t in theta.items()})
        g = d.double()
        sd = g.std(0)
        g = (g - g.mean(0)) / torch.where(sd > 0, sd, torch.ones_like(sd))
        affine = LinearPart(v.shape[1], g.shape[1]).double()
        affine.fit(v - v.mean(0), g)
        entropies.append(float(affine.log_det) + float(coordinates.log_det(v).mean()))
    return own if entropies[0] <= entropies[1] else Coordinates.of(problem, "x")


def describe_transform(transform: Any) -> dict[str, Any] | None:
    """A transform as plain values, or None where it is not one of invgen.transforms."""
    kind, shape = type(transform), None if transform.any_shape else list(transform.model_shape)
    if kind is Affine:
        return {"kind": "Affine", "shape": shape, "shift": transform.shift.tolist(), "scale": transform.scale.tolist()}
    if kind is Probit:
        return {"kind": "Probit", "shape": shape, "low": transform.low.tolist(), "high": transform.high.tolist()}
    if kind is Sigmoid:
        bounds = {"low": transform.low, "high": transform.high, "sharpness": transform.sharpness}
        return {"kind": "Sigmoid", "shape": shape, **bounds}
    if kind is Chain:
        parts = [describe_transform(p) for p in transform.parts]
        return None if None in parts else {"kind": "Chain", "shape": shape, "parts": parts}
    return {"kind": kind.__name__, "shape": shape} if kind in (Identity, Exp, Log) else None


def rebuild_transform(stored: Mapping[str, Any] | None, name: str) -> Any:
    """The transform of `describe_transform`."""
    if stored is None:
        what = "the model" if name == "" else f"{name!r}"
        raise ValueError(
            f"The transform of {what} is a class of its own, which a file does not hold; load with problem=, which has it."
        )
    shape = None if stored["shape"] is None else tuple(stored["shape"])
    kind = stored["kind"]
    if kind == "Affine":
        return Affine(torch.tensor(stored["shift"]).double(), torch.tensor(stored["scale"]).double(), shape)
    if kind == "Probit":
        return Probit(torch.tensor(stored["low"]).double(), torch.tensor(stored["high"]).double(), shape)
    if kind == "Sigmoid":
        return Sigmoid(stored["low"], stored["high"], stored["sharpness"], shape)
    if kind == "Chain":
        return Chain(*(rebuild_transform(p, name) for p in stored["parts"]))
    return {"Identity": Identity, "Exp": Exp, "Log": Log}[kind](shape)
