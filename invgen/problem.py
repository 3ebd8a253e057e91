"""The equation: p(x | d) ∝ ∏ p(d_i | g_i(x)) · p(x)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from invgen.contracts import HasDensity, HasLatent, LinearOperator, Operator, require
from invgen.covariance import Covariance
from invgen.driver import Streams
from invgen.grid import check_same_grid
from invgen.noise import GaussianNoise, stack_covariances

__all__ = ["InverseProblem", "LinearGaussian", "Term"]


class LinearGaussian(NamedTuple):
    """d = A x + N(0, R), all terms together.

    Attributes:
        operator: A, between real models and the data: its adjoint is Re(Aᴴ d) for complex data.
        data: `(batch, *data_shape)`, offsets of affine operators moved into it.
        R: covariance of the data, per complex datum.
    """

    operator: LinearOperator
    data: Tensor
    R: Covariance

    @property
    def R_update(self) -> Covariance:
        """The R of updates like (R + A C Aᴴ)⁻¹: R/2 for complex data, whose two parts have half the variance each."""
        return self.R.scaled(0.5) if self.data.is_complex() else self.R


class _RealModel(LinearOperator):
    """A complex operator on real models: the adjoint under Re⟨u, v⟩ is Re(Aᴴ d), and solves are conjugate gradients."""

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(operator.model_shape, operator.data_shape, model_grid=operator.model_grid)
        self.operator = operator
        self.derivative_order, self.vmappable = operator.derivative_order, operator.vmappable  # type: ignore[misc]

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        return self.operator(x, **theta)

    def adjoint(self, d: Tensor) -> Tensor:
        return self.operator.adjoint(d).real


def _native(value: Any, what: str) -> Any:
    """NumPy arrays in the byte order and layout torch reads: SEG-Y and FITS are big-endian, flipped views run backwards."""
    if isinstance(value, np.ma.MaskedArray):  # its mask would be dropped without a word
        raise TypeError(
            f"{what} are a NumPy masked array, whose mask is True where nothing was measured; give data.filled(0) and the inverted mask."
        )
    return (
        value.astype(value.dtype.newbyteorder("="), order="C", copy=False) if isinstance(value, np.ndarray) else value
    )


@dataclass(frozen=True, eq=False)
class Term:
    """One data set: d = g(x) + noise.

    Args:
        data: `data_shape` or `(n_obs, *data_shape)`.
        operator: g.
        noise: p(d | g(x)).
        mask: boolean `data_shape`, True where a datum was measured; required when the data hold NaN.
        name: how reports call this term.
    """

    data: Tensor
    operator: Operator
    noise: Any
    mask: Tensor | None = None
    name: str = "data"

    def __post_init__(self) -> None:
        if not isinstance(self.operator, Operator):
            raise TypeError(
                f"The operator of term {self.name!r} is a {type(self.operator).__name__}; give an invgen Operator (from_pylops wraps a PyLops one)."
            )
        if not callable(self.noise):
            raise TypeError(
                f"The noise of term {self.name!r} is {self.noise!r}; give a noise model such as GaussianNoise(sigma)."
            )
        shape = self.operator.data_shape
        given = _native(self.data, f"The data of term {self.name!r}")
        try:
            data = torch.as_tensor(given)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"The data of term {self.name!r} are a {type(self.data).__name__} that does not convert to numbers; give a tensor or a NumPy array."
            ) from error
        if not (data.is_floating_point() or data.is_complex()):
            data = data.to(torch.get_default_dtype())  # counts and other whole numbers
        if tuple(data.shape) == shape:
            data = data[None]
        if data.ndim != len(shape) + 1 or tuple(data.shape[1:]) != shape or data.shape[0] == 0:
            raise ValueError(
                f"The data of term {self.name!r} have the shape {tuple(data.shape)} but {type(self.operator).__name__} predicts {shape}; give that shape or (n_obs, *that shape)."
            )
        if self.mask is not None:
            mask = torch.as_tensor(_native(self.mask, f"The mask of term {self.name!r}"))
            if mask.dtype != torch.bool or tuple(mask.shape) != shape:
                raise ValueError(
                    f"The mask of term {self.name!r} must be boolean with the shape {shape}, got {mask.dtype} {tuple(mask.shape)}."
                )
            if not bool(mask.any()):
                raise ValueError(f"The mask of term {self.name!r} hides every datum; drop the term instead.")
            object.__setattr__(self, "mask", mask)
            data = torch.where(mask.to(data.device), data, torch.zeros((), dtype=data.dtype, device=data.device))
        if not bool(torch.isfinite(data).all()):
            bad = int((~torch.isfinite(data)).sum())
            raise ValueError(
                f"The data of term {self.name!r} hold {bad} NaN or infinite values; pass mask= (True where measured) to leave them out."
            )
        object.__setattr__(self, "data", data)

    def __repr__(self) -> str:
        measured = "" if self.mask is None else f", {int(self.mask.sum())} of {self.mask.numel()} measured"
        return f"Term({self.name!r}: data {tuple(self.data.shape)}{measured}, {type(self.operator).__name__}, {type(self.noise).__name__})"

    @property
    def n_obs(self) -> int:
        """Observations held."""
        return self.data.shape[0]

    def observed(self) -> Term:
        """The same term without a mask: data, operator and noise restricted to what was measured, flattened."""
        return self._observed

    @functools.cached_property
    def _observed(self) -> Term:
        if self.mask is None:
            return self
        from invgen.operators.algebra import compose
        from invgen.operators.imaging import Mask

        picked = compose(Mask(self.mask), self.operator)
        return Term(self.data[:, self.mask], picked, self.noise.restricted(self.mask), None, self.name)


@dataclass(frozen=True, eq=False, init=False)
class InverseProblem:
    """Data, physics, noise and prior, held together and left alone.

    Args:
        data, operator, noise, prior: the short form with one term.
        terms: several data sets instead; their log-likelihoods add.
        nuisance: name -> prior of further unknowns of operators or noise (vectors `(1,)` each).
        mask: mask of the one term.

    Raises:
        ValueError: shapes, grids or numbers of observations that do not fit.
    """

    terms: tuple[Term, ...]
    prior: Any
    nuisance: Mapping[str, Any] = field(default_factory=dict)
    _shared: dict[Any, Any] = field(init=False, repr=False)
    _own: dict[Any, Any] = field(init=False, repr=False)

    def __init__(
        self,
        data: Tensor | None = None,
        operator: Operator | None = None,
        noise: Any = None,
        prior: Any = None,
        *,
        terms: Sequence[Term] | None = None,
        nuisance: Mapping[str, Any] | None = None,
        mask: Tensor | None = None,
    ) -> None:
        if (terms is None) == (data is None):
            raise ValueError(
                "InverseProblem takes either (data, operator, noise, prior) or terms=[…] and prior; give exactly one of the two forms."
            )
        if terms is None:
            if data is None or operator is None or noise is None:
                raise ValueError("InverseProblem(data, operator, noise, prior) needs all four; one of them is missing.")
            terms = [Term(data, operator, noise, mask)]
        if prior is None:
            raise ValueError("An inverse problem needs a prior.")
        object.__setattr__(self, "terms", tuple(terms))
        object.__setattr__(self, "prior", prior)
        object.__setattr__(self, "nuisance", dict(nuisance or {}))
        object.__setattr__(self, "_shared", {})
        object.__setattr__(self, "_own", {})
        if not self.terms:
            raise ValueError("An inverse problem needs at least one data term.")
        if not isinstance(getattr(prior, "shape", None), (tuple, list)):
            raise TypeError(
                f"The prior is a {type(prior).__name__} without a shape; give a prior of invgen.priors, or a class with the Prior protocol."
            )
        for term in self.terms:
            check_same_grid(
                getattr(prior, "grid", None),
                term.operator.model_grid,
                "The prior",
                f"the operator of term {term.name!r}",
            )
            if tuple(term.operator.model_shape) != tuple(prior.shape):
                advice = "use prior.at(shape) or another operator"
                if tuple(prior.shape) == (1, *term.operator.model_shape):  # the usual stumble with PyLops
                    advice = f"fields carry a channel axis: give the operator the model shape {tuple(prior.shape)}, e.g. from_pylops(op, {tuple(prior.shape)})"
                raise ValueError(
                    f"The operator of term {term.name!r} acts on models {term.operator.model_shape} but the prior has {tuple(prior.shape)}; {advice}."
                )
        counts = {t.n_obs for t in self.terms}
        if len(counts - {1}) > 1:
            raise ValueError(
                f"The terms hold different numbers of observations ({sorted(counts)}); give each term the same number, or one."
            )

    def __repr__(self) -> str:
        return (
            f"InverseProblem({', '.join(map(repr, self.terms))}, prior {type(self.prior).__name__} {self.model_shape})"
        )

    @property
    def n_obs(self) -> int:
        """Observations held: each is its own posterior."""
        return max(t.n_obs for t in self.terms)

    @property
    def model_shape(self) -> tuple[int, ...]:
        """Shape of one model."""
        return tuple(self.prior.shape)

    def _theta(self, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        missing = set(self.nuisance) - set(theta)
        if missing:
            raise ValueError(
                f"The nuisance parameters {sorted(missing)} were not given; pass them by name, (batch,) each."
            )
        return dict(theta)

    def predict(self, x: Tensor, **theta: Tensor) -> list[Tensor]:
        """g_i(x), one `(batch, *data_shape)` a term."""
        return [t.operator(x, **_accepted(t.operator, theta)) for t in self.terms]

    def log_likelihood(self, x: Tensor, **theta: Tensor) -> Tensor:
        """Σ_i log p(d_i | g_i(x)), `(batch,)`; the batch must be the number of observations, or that must be 1."""
        total = x.new_zeros(x.shape[0], dtype=x.real.dtype)
        for term in self.terms:
            seen = term.observed()
            prediction = seen.operator(x, **_accepted(seen.operator, theta))
            total = total + seen.noise(prediction, **theta).log_prob(_aligned(seen.data, prediction))
        return total

    def log_posterior(self, x: Tensor, **theta: Tensor) -> Tensor:
        """log p(d | x, theta) + log p(x) + log p(theta), up to a constant, `(batch,)`."""
        require(self.prior, HasDensity, "log_posterior")
        total = self.log_likelihood(x, **self._theta(theta)) + self.prior.log_prob(x)
        for name, prior in self.nuisance.items():
            total = total + prior.log_prob(theta[name].reshape(x.shape[0], -1))
        return total

    def latent_log_posterior(self, z: Tensor, **theta: Tensor) -> Tensor:
        """log p(d | g(f(z)), theta) − |z|²/2 + log p(theta), up to a constant, `(batch,)`."""
        require(self.prior, HasLatent, "latent_log_posterior")
        total = self.log_likelihood(self.prior.decode(z), **self._theta(theta)) - 0.5 * z.square().flatten(1).sum(1)
        for name, prior in self.nuisance.items():
            total = total + prior.log_prob(theta[name].reshape(z.shape[0], -1))
        return total

    def simulate(self, n: int, *, seed: int = 0) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        """Draws of the joint law: x `(n, *shape)`, theta (name -> `(n,)`), d (one `(n, *data_shape)` a term)."""
        x = self.prior.sample(n, seed=seed)
        theta = {
            name: prior.sample(n, seed=_derived(seed, i)).reshape(n)
            for i, (name, prior) in enumerate(self.nuisance.items())
        }
        rng = Streams(seed, range(n), salt="simulate")
        data = [
            t.noise.draw(p, rng.spawn(f"term{i}"), **theta)
            for i, (t, p) in enumerate(zip(self.terms, self.predict(x, **theta), strict=True))
        ]
        return x, theta, data

    def select(
        self, observations: Sequence[int], *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> InverseProblem:
        """The problem whose item i holds observation `observations[i]`: what solvers see of a chunk."""
        index = torch.as_tensor(list(observations))
        terms = []
        for t in self.terms:
            data = t.data[index if t.n_obs > 1 else torch.zeros(1, dtype=torch.long)]
            wanted = (dtype.to_complex() if t.data.is_complex() else dtype) if dtype is not None else t.data.dtype
            terms.append(replace(t, data=data.to(dtype=wanted, device=device)))
        return self._derive(terms)

    def _derive(self, terms: Sequence[Term]) -> InverseProblem:
        other = InverseProblem(terms=terms, prior=self.prior, nuisance=self.nuisance)
        object.__setattr__(other, "_shared", self._shared)
        return other

    def with_data(self, *data: Tensor) -> InverseProblem:
        """The same problem with other measurements, one tensor a term."""
        return self._derive([replace(t, data=d) for t, d in zip(self.terms, data, strict=True)])

    @property
    def is_linear_gaussian(self) -> bool:
        """True when every term is affine with Gaussian noise."""
        return all(_affine_parts(t.operator)[0] is not None and isinstance(t.noise, GaussianNoise) for t in self.terms)

    def linear_gaussian(self, coordinates: str = "x", **theta: Tensor) -> LinearGaussian:
        """All terms as one linear-Gaussian system, in x or in the prior's coordinates u (affine transforms only).

        Args:
            coordinates: "x" or "u". theta: nuisance parameters of the noise, `(batch,)` each.

        Raises:
            TypeError: a non-linear operator, a non-affine transform or non-Gaussian noise, nuisance parameters of an
                operator, real terms beside complex ones.
        """
        if theta:
            return self._assemble(coordinates, theta)
        return self.remember(("linear_gaussian", coordinates), lambda: self._assemble(coordinates, {}), shared=False)

    def _assemble(self, coordinates: str, theta: dict[str, Tensor]) -> LinearGaussian:
        from invgen.operators.algebra import stack

        seen = self.in_u() if coordinates == "u" else self.observed_terms()
        parts: list[LinearOperator] = []
        data: list[Tensor] = []
        covariances: list[Covariance] = []
        for term in seen:
            linear, offset = _affine_parts(term.operator)
            depends = [n for n in {**self.nuisance, **theta} if n in getattr(term.operator, "theta_names", ())]
            if depends:
                raise TypeError(
                    f"The operator of term {term.name!r} depends on the nuisance parameters {depends}, so there is no one linear system; fix them inside the operator, or use a solver that takes non-linear problems."
                )
            if linear is None or not isinstance(term.noise, GaussianNoise):
                raise TypeError(
                    f"Term {term.name!r} is not linear with Gaussian noise ({type(term.operator).__name__}, "
                    f"{type(term.noise).__name__}); use a solver that takes non-linear problems."
                )
            parts.append(_RealModel(linear) if term.data.is_complex() and not _has_real_adjoint(linear) else linear)
            data.append(term.data - offset.to(term.data) if isinstance(offset, Tensor) else term.data)
            covariances.append(term.noise.covariance(linear.data_shape, **theta))
        if len(parts) == 1:
            return LinearGaussian(parts[0], data[0], covariances[0])
        if len({d.is_complex() for d in data}) > 1:
            raise TypeError(
                "Real and complex terms have no common Gaussian convention; state each complex term as its real and imaginary parts, with half the variance each."
            )
        n = max(d.shape[0] for d in data)
        flat = torch.cat([d.flatten(1).expand(n, -1) for d in data], dim=1)
        # the stack holds decompositions that every chunk of a run shares
        stacked = self.remember(("stack", coordinates), lambda: stack(*parts))
        return LinearGaussian(stacked, flat, stack_covariances(covariances))

    def observed_terms(self) -> tuple[Term, ...]:
        """The terms without masks: what was not measured is left out."""
        return self.remember("observed", lambda: tuple(t.observed() for t in self.terms), shared=False)

    def in_u(self) -> tuple[Term, ...]:
        """The observed terms with their operators acting on the prior's coordinates, g∘T."""
        from invgen.operators.algebra import compose

        def build() -> tuple[Term, ...]:
            terms = self.observed_terms()
            # operators do not depend on the chunk: composed once a run
            operators = self.remember(
                "operators_in_u", lambda: [compose(t.operator, self.prior.transform) for t in terms]
            )
            return tuple(replace(t, operator=g, mask=None) for t, g in zip(terms, operators, strict=True))

        return self.remember("in_u", build, shared=False)

    @property
    def dtype(self) -> torch.dtype:
        """Real dtype of the data, which the state follows."""
        return self.terms[0].data.real.dtype

    def remember(self, key: Any, build: Callable[[], Any], *, shared: bool = True) -> Any:
        """A value computed once: for this problem, or (shared) for all chunks and data sets derived from it."""
        store = self._shared if shared else self._own
        if key not in store:
            store[key] = build()
        return store[key]


def _affine_parts(operator: Operator) -> tuple[LinearOperator | None, Tensor | None]:
    """(A, b) of an operator A x + b, or (None, None)."""
    from invgen.operators.algebra import AffineOperator

    if isinstance(operator, AffineOperator):
        return operator.linear, operator.offset
    return (operator, None) if isinstance(operator, LinearOperator) else (None, None)


def _has_real_adjoint(operator: LinearOperator) -> bool:
    """Whether an operator with complex data already takes real models, and keeps its own solves for them."""
    while isinstance(inside := getattr(operator, "operator", None), LinearOperator):  # a multiple of one
        operator = inside
    return bool(getattr(operator, "real_model", False))


def _derived(seed: int, i: int) -> int:
    """A seed of its own for the i-th nuisance prior: seed + i would share draws with the model prior of another run."""
    return int(np.random.SeedSequence([seed, i + 1]).generate_state(1)[0])


def _accepted(operator: Operator, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The nuisance parameters this operator declares in `theta_names`."""
    names = getattr(operator, "theta_names", ())
    return {k: v for k, v in theta.items() if k in names}


def _aligned(data: Tensor, prediction: Tensor) -> Tensor:
    if data.shape[0] not in (1, prediction.shape[0]):
        raise ValueError(
            f"{prediction.shape[0]} models were given for {data.shape[0]} observations; give one model an observation, or select observations first."
        )
    real = prediction.real.dtype
    return data.to(dtype=real.to_complex() if data.is_complex() else real, device=prediction.device)
