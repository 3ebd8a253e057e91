"""What everything else is made of: operators, noise, priors and their capabilities, solvers.

    p(x | d)  ∝  p(d | g(x)) · p(x)                    x: model, d: data
    p(z | d)  ∝  p(d | g(f(z))) · N(z; 0, I)           x = f(z): a trained generator

An operator is g, a noise is p(d | ·), a prior is p(x) or f. Priors form no class tree: a prior *has* the capabilities
it truly has (`HasDensity`, `HasLatent`, `HasDenoiser`, `HasProx`), and a solver names the ones it needs.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from invgen.covariance import Covariance, as_covariance
from invgen.grid import Grid
from invgen.linalg import Solved, cg, inner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from invgen.driver import Streams
    from invgen.posterior import Posterior
    from invgen.problem import InverseProblem

__all__ = [
    "HasDenoiser",
    "HasDensity",
    "HasDensityEstimate",
    "HasGaussian",
    "HasLatent",
    "HasMixture",
    "HasProx",
    "LinearOperator",
    "Noise",
    "Operator",
    "Prior",
    "Solver",
    "check_batch",
    "require",
]


def check_batch(value: Tensor, shape: tuple[int, ...], what: str) -> None:
    """Raise a ValueError unless `value` is `(batch, *shape)`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} must be a torch tensor, got {type(value).__name__}; use torch.as_tensor.")
    k = len(shape)
    if value.ndim != k + 1 or tuple(value.shape[1:]) != tuple(shape):
        hint = " (the batch axis is missing: add one with x[None])" if tuple(value.shape) == tuple(shape) else ""
        raise ValueError(
            f"{what} must have the shape (batch, {', '.join(map(str, shape))}), got {tuple(value.shape)}{hint}."
        )


class Operator(nn.Module):
    """The physics g: a map from models `(batch, *model_shape)` to data `(batch, *data_shape)`.

    Args:
        model_shape: shape of one model.
        data_shape: shape of one data set.
        model_grid: grid of the model, compared with the prior's when both are known.

    Class attributes:
        derivative_order: 0 for a black box, 1 with a gradient, 2 with right second derivatives.
        theta_names: nuisance parameters `forward` takes by name.
        vmappable: works under `torch.func.vmap`.
    """

    derivative_order: ClassVar[int] = 2
    theta_names: ClassVar[tuple[str, ...]] = ()
    vmappable: ClassVar[bool] = True

    def __init__(
        self, model_shape: tuple[int, ...], data_shape: tuple[int, ...], *, model_grid: Grid | None = None
    ) -> None:
        super().__init__()
        self.model_shape, self.data_shape, self.model_grid = tuple(model_shape), tuple(data_shape), model_grid
        self.forward_count = 0  # items pushed through, for cost tables
        if model_grid is not None and model_grid.field_shape != self.model_shape:
            raise ValueError(
                f"{type(self).__name__} has the model shape {self.model_shape} but its grid {model_grid.field_shape}."
            )

    def __call__(self, x: Tensor, **theta: Tensor) -> Tensor:
        self.forward_count += self._items(x, self.model_shape, f"The model given to {type(self).__name__}")
        return super().__call__(x, **theta)

    def _items(self, value: Tensor, shape: tuple[int, ...], what: str) -> int:
        """Check the shape and return the number of items; bridges that take any leading axes override it."""
        check_batch(value, shape, what)
        return value.shape[0]

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        """g(x; theta): `(batch, *model_shape)` to `(batch, *data_shape)`; theta have the batch axis first."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward.")

    def __matmul__(self, other: Operator) -> Operator:
        from invgen.operators.algebra import compose

        return compose(self, other)

    def extra_repr(self) -> str:
        return f"{self.model_shape} -> {self.data_shape}"


class LinearOperator(Operator):
    """A linear g, with its adjoint.

    The inner product is Re⟨u, v⟩; for complex data `adjoint` is the conjugate transpose. Every `adjoint` a subclass
    defines is wrapped once, to check the shape it is given and to count the items.
    """

    adjoint_count = 0

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "adjoint" in cls.__dict__:
            plain = cls.__dict__["adjoint"]

            @functools.wraps(plain)
            def adjoint(self: LinearOperator, d: Tensor) -> Tensor:
                what = f"The data given to {type(self).__name__}.adjoint"
                self.adjoint_count = self.adjoint_count + self._items(d, self.data_shape, what)
                return plain(self, d)

            cls.adjoint = adjoint  # type: ignore[method-assign]

    def adjoint(self, d: Tensor) -> Tensor:
        """Aᴴ d: `(batch, *data_shape)` to `(batch, *model_shape)`."""
        raise NotImplementedError(f"{type(self).__name__} does not define adjoint.")

    @property
    def H(self) -> LinearOperator:
        """The adjoint as an operator."""
        from invgen.operators.algebra import Adjoint

        return Adjoint(self)

    def __add__(self, other: LinearOperator) -> LinearOperator:
        from invgen.operators.algebra import Sum

        return Sum(self, other)

    def __mul__(self, factor: float) -> LinearOperator:
        from invgen.operators.algebra import Scaled

        return Scaled(self, factor)

    __rmul__ = __mul__

    def __neg__(self) -> LinearOperator:
        return self * -1.0

    def scaled_by_channel(self, scale: Tensor) -> LinearOperator:
        """A diag(s) with one number a channel, `(channels,)`; operators that keep their structure under it override it.

        A prior whose coordinates are u = (m − shift)/s a channel sees this operator: with the structure it keeps the
        direct solves.
        """
        from invgen.operators.algebra import LinearComposition, Multiply

        wide = scale.reshape(-1, *[1] * (len(self.model_shape) - 1)).expand(self.model_shape)
        return LinearComposition(self, Multiply(wide.contiguous()))

    def normal(self, x: Tensor, R: Covariance | float | Tensor = 1.0) -> Tensor:
        """Aᴴ R⁻¹ A x."""
        return self.adjoint(as_covariance(R, self.data_shape).solve(self(x)))

    def pull_residual(self, x: Tensor, d: Tensor, R: Covariance) -> tuple[Tensor, Tensor]:
        """Aᴴ R⁻¹ r and rᴴ R⁻¹ r of the residual r = d − A x: the misfit's descent direction, and twice the misfit.

        Args:
            x: `(batch, *model_shape)`. d: `(batch or 1, *data_shape)`.

        Returns:
            `(batch, *model_shape)` and `(batch,)`. Cost: one operator and one adjoint.
        """
        residual = d - self(x)
        weighted = R.solve(residual)
        return self.adjoint(weighted), inner(residual, weighted)

    def solve(
        self,
        rhs: Tensor,
        R: Covariance | float | Tensor,
        C: Covariance | float | Tensor,
        *,
        rtol: float | None = None,
        max_iter: int = 1000,
        start: Tensor | None = None,
    ) -> Solved:
        """(R + A C Aᴴ)⁻¹ rhs, the solve of every linear-Gaussian update.

        Args:
            rhs: `(batch, *data_shape)`.
            R: covariance in data space: number, `(batch,)`, diagonal or `Covariance`.
            C: covariance in model space, likewise.
            rtol: relative tolerance of the iteration; 1e-5 in float32 and 1e-10 in float64 when omitted.
            max_iter: iterations at the most.
            start: first guess.

        Returns:
            `Solved`; the structured overrides are direct. This one is conjugate gradients preconditioned by R⁻¹ where
            that has a closed form, which gives the iterates of the whitened system I + R^(−1/2) A C Aᴴ R^(−1/2):
            a spread of noise levels costs no iterations. The tolerance is on the true residual of the system as
            written; items that miss it (float32 at a condition number of 1e6 does) have `converged` False.
        """
        R, C = as_covariance(R, self.data_shape, batched=True), as_covariance(C, self.model_shape, batched=True)
        return cg(
            lambda v: R.apply(v) + self(C.apply(self.adjoint(v))),
            rhs,
            preconditioner=R.solve if R.has_solve else None,
            rtol=rtol if rtol is not None else _default_rtol(rhs),
            max_iter=max_iter,
            start=start,
        )

    def solve_model(
        self,
        rhs: Tensor,
        R: Covariance | float | Tensor,
        C: Covariance | float | Tensor,
        *,
        rtol: float | None = None,
        max_iter: int = 1000,
        start: Tensor | None = None,
    ) -> Solved:
        """(Aᴴ R⁻¹ A + C⁻¹)⁻¹ rhs: the same update in model space, better where data outnumber the model.

        Args:
            rhs: `(batch, *model_shape)`; the others as in `solve`.

        Returns:
            `Solved`, by conjugate gradients preconditioned by C. Where R or C has no closed inverse (a padded stationary
            field) it is C rhs − C Aᴴ (R + A C Aᴴ)⁻¹ A C rhs instead, and `converged` is that of the solve in data space.
        """
        R, C = as_covariance(R, self.data_shape, batched=True), as_covariance(C, self.model_shape, batched=True)
        if not (R.has_solve and C.has_solve):
            if start is not None:
                raise TypeError(
                    "A first guess needs C⁻¹, which this covariance has not in closed form; leave start out."
                )
            spread = C.apply(rhs)
            inner = self.solve(self(spread), R, C, rtol=rtol, max_iter=max_iter)
            return inner._replace(x=spread - C.apply(self.adjoint(inner.x)))
        return cg(
            lambda v: self.adjoint(R.solve(self(v))) + C.solve(v),
            rhs,
            preconditioner=C.apply,
            rtol=rtol if rtol is not None else _default_rtol(rhs),
            max_iter=max_iter,
            start=start,
        )

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U `(n_data, r)`, s `(r,)`, Vᴴ `(r, n_model)` over flattened items, where the operator has them in closed form."""
        raise TypeError(
            f"{type(self).__name__} has no closed-form SVD; build its matrix with to_dense() and use MatrixOperator if it is small."
        )

    def to_dense(self, *, dtype: torch.dtype = torch.float64) -> Tensor:
        """The `(n_data, n_model)` matrix over flattened items; costs n_model forward items."""
        n = math.prod(self.model_shape)
        columns = self(torch.eye(n, dtype=dtype).reshape(n, *self.model_shape))
        return columns.reshape(n, -1).T.contiguous()


def _default_rtol(rhs: Tensor) -> float:
    return 1e-10 if rhs.real.dtype == torch.float64 else 1e-5


@runtime_checkable
class Noise(Protocol):
    """p(d | prediction): called with a prediction `(batch, *data_shape)`, returns a distribution over data.

    The distribution's event is one data set: `log_prob(d)` and `sample()` have and return the batch axis first.
    """

    def __call__(self, prediction: Tensor, **theta: Tensor) -> torch.distributions.Distribution: ...


@runtime_checkable
class Prior(Protocol):
    """What every prior has: the shape of x, its grid (or None), coordinates x = T(u), and draws."""

    shape: tuple[int, ...]
    grid: Grid | None
    transform: Any

    def sample(self, n: int, *, seed: int = 0) -> Tensor:
        """`(n, *shape)` draws of x."""
        ...


@runtime_checkable
class HasDensity(Protocol):
    """An exact log-density up to a constant: the only one an acceptance step may use."""

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), `(batch,)`, the Jacobian of the transform included."""
        ...


@runtime_checkable
class HasDensityEstimate(Protocol):
    """A bound or a stochastic estimate of the log-density; never in an acceptance step."""

    def log_prob_estimate(self, x: Tensor, *, seed: int = 0) -> Tensor:
        """Estimate of log p(x), `(batch,)`."""
        ...


@runtime_checkable
class HasLatent(Protocol):
    """A generator f: x = f(z) with z ~ N(0, I)."""

    latent_shape: tuple[int, ...]

    def decode(self, z: Tensor) -> Tensor:
        """f(z): `(batch, *latent_shape)` to `(batch, *shape)`."""
        ...


@runtime_checkable
class HasDenoiser(Protocol):
    """The posterior mean of a clean field under Gaussian noise, in the coordinates u."""

    def denoise(self, u: Tensor, sigma: Tensor) -> Tensor:
        """E[u0 | u0 + sigma n = u]; u `(batch, *shape)`, sigma `(batch,)`."""
        ...


@runtime_checkable
class HasProx(Protocol):
    """A true proximal operator, argmin_y ½|y − x|² + step · R(y)."""

    def prox(self, x: Tensor, step: float | Tensor) -> Tensor:
        """Shaped like x."""
        ...


@runtime_checkable
class HasGaussian(Protocol):
    """Gaussian in the coordinates u: u ~ N(mean_u, covariance_u)."""

    mean_u: Tensor  # (*shape)
    covariance_u: Covariance

    # moments alone make no Gaussian (a mixture has them too): what tells them apart is the law under noise
    def posterior_covariance_apply(self, v: Tensor, sigma: Tensor | float) -> Tensor:
        """Cov[u0 | u0 + sigma n = u] v = sigma² C (C + sigma²)⁻¹ v, the same for every u."""
        ...


@runtime_checkable
class HasMixture(Protocol):
    """A Gaussian mixture in the coordinates u: u ~ Σ_k weights_k N(means_k, covariances_k)."""

    weights: Tensor  # (K,), sums to one
    means: Tensor  # (K, *shape), in u
    covariances: Any  # K covariances, in u


def require(prior: object, capability: type, solver: object) -> None:
    """Raise a TypeError that names the missing capability and the solvers that would fit this prior."""
    if isinstance(prior, capability):
        return
    from invgen.solvers import solvers_for

    fitting = ", ".join(sorted(solvers_for(prior))) or "none"
    name = solver if isinstance(solver, str) else type(solver).__name__
    raise TypeError(
        f"{name} needs a prior with {capability.__name__}, which {type(prior).__name__} does not have; solvers that fit this prior: {fitting}."
    )


class Solver:
    """How the posterior is computed: a frozen dataclass of hyper-parameters with `init` and `step`.

    Subclasses state what they target in their docstring and set:

    Class attributes:
        needs: capabilities the prior must have.
        kind: "exact", "approximate" or "point".
        pooled: the items of an observation interact, so that the driver never parts them.

    The driver calls `init` once and `step` until `num_steps` are done; a state is a dict of tensors (batch axis
    first), so that a run can be checkpointed and resumed. `problem` holds only the items of the current chunk, its
    data expanded to the batch; `rng` gives every item its own noise stream.
    """

    needs: ClassVar[tuple[type, ...]] = ()
    kind: ClassVar[str] = "approximate"
    pooled: ClassVar[bool] = False

    def num_steps(self, problem: InverseProblem) -> int:
        """Steps after `init`."""
        return 0

    def init(self, problem: InverseProblem, rng: Streams) -> dict[str, Tensor]:
        """First state of every item of the chunk; must hold `x`, the model in physical units, when it is final."""
        raise NotImplementedError

    def step(self, problem: InverseProblem, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        """One step of every item."""
        raise NotImplementedError

    def finish(self, problem: InverseProblem, state: dict[str, Tensor]) -> Mapping[str, Tensor]:
        """Turn the last state into results: `x` `(batch, *shape)` and optionally `latent`, statistics `(batch,)`."""
        return state

    def check(self, problem: InverseProblem) -> None:
        """Raise a TypeError or ValueError when this solver cannot treat the problem."""
        for capability in self.needs:
            require(problem.prior, capability, self)

    def solve(self, problem: InverseProblem, num_samples: int = 1, *, seed: int = 0, **options: Any) -> Posterior:
        """Draw `num_samples` for every observation; options go to `invgen.driver.run`."""
        from invgen.driver import run

        return run(self, problem, num_samples, seed=seed, **options)
