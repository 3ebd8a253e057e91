r"""Neural posterior, likelihood and ratio estimation: the posterior of a simulator whose likelihood nobody can write.

From pairs (x_i, d_i) of the joint law a network learns, for all data at once,

    NPE, FMPE, NPSE    the posterior itself,       min_q −E log q(x | d),  or by flow matching, or by its score;
    NLE                the likelihood,             min_q −E log q(d | x),  then chains;
    NRE                the ratio p(d | x)/p(d),    by telling true pairs from others, then chains.

The networks are sbi's (Tejero-Cantero et al. 2020, JOSS 5(52), 2505; zuko's flows); standardising, training, drawing,
saving are ours. `estimator.fit(problem, simulations)` returns an `AmortizedPosterior`; `estimator.solve(problem, n)` fits
to simulations of the problem and draws for its data.

**Coordinates.** A vector is inferred in the prior's coordinates u (or as it is, where the data are nearer linear in that)
together with the nuisance parameters, a large field with a generator in its latent z, which is then decoded (`space`).

**What makes few simulations go further.** The conditional mean and covariance of the best linear-Gaussian law come from
least squares, and a flow learns what is left, starting from the identity; weights are averaged; training stops at the
best held-out loss; several members hold out different shares and are mixed.

**Settings of all five.**

- simulations: that `solve` makes, and `fit` where it is given none. fresh: simulate anew for every epoch.
- space: "u" the prior's coordinates, "x" physical ones with draws outside the support rejected, "z" the latent, or
  "auto": z for fields of more than 64 numbers whose prior decodes, else u or x, whichever is nearer linear in the data.
- embedding: of the data: "auto" (identity up to 64 numbers a term, else convolutions), "identity", "mlp", "cnn",
  "deepsets", "transformer", or a module `(n, *data_shape) -> (n, features)`. width: numbers it returns a term.
- hidden, layers: width of the network and its layers (transforms of a flow). linear: take the linear part off first.
- members: of the ensemble; None for 4 up to 2000 simulations, 2 up to 20,000, 1 above.
- learning_rate (at first; it falls as a cosine), epochs (at the most), patience (epochs without improvement before the
  end), batch_size (None for a tenth of the simulations, 16 to 256), held_out (share that judges), weight_decay, ema
  (decay of the average of the weights).
- warmup: steps of the chains of NLE and NRE.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, Any, ClassVar, SupportsIndex

import torch
from torch import Tensor, nn

from invgen.contracts import HasDensity, HasLatent, Solver
from invgen.solvers._neural_chains import together, walker
from invgen.solvers._neural_coordinates import Coordinates
from invgen.solvers._neural_embeddings import KINDS
from invgen.solvers._neural_fit import Recipe, fit
from invgen.solvers._neural_rounds import fit_in_rounds
from invgen.solvers._neural_training import Plan
from invgen.solvers._target import check_target

if TYPE_CHECKING:
    from invgen.driver import Streams
    from invgen.posterior import Posterior
    from invgen.problem import InverseProblem
    from invgen.simulations import Simulations
    from invgen.solvers.amortized import AmortizedPosterior

__all__ = ["FMPE", "NLE", "NPE", "NPSE", "NRE"]


@dataclass(frozen=True)
class _Estimator(Solver):
    """What the five share; the settings are in the text of the module."""

    kind: ClassVar[str] = "approximate"
    method: ClassVar[str] = ""

    simulations: int = 10_000
    space: str = "auto"
    embedding: str | nn.Module = "auto"
    width: int = 32
    hidden: int = 64
    layers: int = 5
    members: int | None = 1
    linear: bool = True
    learning_rate: float = 1e-3
    epochs: int = 100
    patience: int = 20
    batch_size: int | None = None
    held_out: float = 0.1
    weight_decay: float = 1e-4
    ema: float = 0.98
    fresh: bool = False

    def __post_init__(self) -> None:
        name = type(self).__name__
        for field in ("simulations", "width", "hidden", "layers", "members", "epochs", "patience"):
            value = getattr(self, field)
            if field == "members" and value is None:
                continue
            if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
                raise ValueError(f"{name} needs {field} as a whole number of at least 1, got {value!r}.")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"{name} needs batch_size >= 1 or None, got {self.batch_size}.")
        if not (0 < self.held_out < 1 and self.learning_rate > 0 and 0 <= self.ema < 1 and self.weight_decay >= 0):
            raise ValueError(
                f"{name} needs held_out in (0, 1), learning_rate > 0, ema in [0, 1) and weight_decay >= 0, got {self.held_out}, {self.learning_rate}, {self.ema} and {self.weight_decay}."
            )
        if not isinstance(self.embedding, nn.Module) and self.embedding not in KINDS:
            raise ValueError(f"{name} takes embedding from {KINDS} or a torch module, got {self.embedding!r}.")

    def _settings(self) -> dict[str, Any]:
        """Of the network, plain values."""
        return {
            "method": self.method,
            "hidden": self.hidden,
            "layers": self.layers,
            "depth": 2,
            "bins": 8,
            "sde": "ve",
            "steps": 32,
            "contrasts": 10,
            "members": self.members,
            "embedding": "module" if isinstance(self.embedding, nn.Module) else self.embedding,
            "width": self.width,
        }

    def _recipe(self) -> Recipe:
        return Recipe(
            settings=self._settings(),
            plan=Plan(self.learning_rate, self.epochs, self.patience, self.weight_decay, 5.0, self.ema),
            batch_size=self.batch_size,
            held_out=self.held_out,
            fresh=self.fresh,
            space=self.space,
            warmup=self._warmup,
            embedding=self.embedding if isinstance(self.embedding, nn.Module) else None,
            linear=self.linear,
        )

    @property
    def _warmup(self) -> int:
        return int(getattr(self, "warmup", 0))

    def fit(
        self,
        problem: InverseProblem,
        simulations: Simulations | int | None = None,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> AmortizedPosterior:
        """Train on simulations of a problem.

        Args:
            problem: prior, operators, noise, masks; its data are not used.
            simulations: pairs (larger than memory where they lie in a file: they are then read in pieces, in a new
                order every epoch), or how many to make. device: of the training. seed: of everything.
            progress: show a bar.

        Returns:
            `AmortizedPosterior`, on the CPU. A warning says so where the held-out loss shows that the simulations are
            too few.

        Raises:
            ValueError: simulations of another problem, or where the prior has no support; too few of them.
            TypeError: a prior without what the space needs.
        """
        self.check(problem)
        given = self.simulations if simulations is None else simulations
        return self._train(problem, given, seed=seed, device=device, progress=progress)

    def _train(self, problem: InverseProblem, simulations: Simulations | int, **options: Any) -> AmortizedPosterior:
        """What `fit` does once the problem is checked."""
        return fit(self._recipe(), problem, simulations, **options)

    # --- as a solver: fit once a problem and seed, then draw -----------------------------------------------------------

    def check(self, problem: InverseProblem) -> None:
        Coordinates.of(problem, self.space, self)

    def num_steps(self, problem: InverseProblem) -> int:
        return 1

    def _fitted(self, problem: InverseProblem, seed: int, device: torch.device) -> AmortizedPosterior:
        made: AmortizedPosterior = problem.remember(
            ("amortized", self, seed, *self._depends(problem)), lambda: self.fit(problem, seed=seed, device=device)
        )
        return made

    def _depends(self, problem: InverseProblem) -> tuple[Any, ...]:
        """What of the data a fit depends on."""
        return ()

    def init(self, problem: InverseProblem, rng: Streams) -> dict[str, Tensor]:
        state = self._fitted(problem, rng.seed, rng.device).init(problem, rng)
        return state | {"seed": torch.tensor(rng.seed)}  # a run that is resumed at its end has no streams to ask

    def step(self, problem: InverseProblem, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        return self._fitted(problem, rng.seed, rng.device).step(problem, state, rng) | {"seed": state["seed"]}

    def finish(self, problem: InverseProblem, state: dict[str, Tensor]) -> dict[str, Tensor]:
        device = state["squared"].device
        return self._fitted(problem, int(state["seed"]), device).finish(problem, state)


@dataclass(frozen=True)
class NPE(_Estimator):
    r"""Neural posterior estimation: a normalizing flow q(x | d), by maximum likelihood on simulations.

    Targets q = argmin −E_{p(x, d)} log q(x | d), an approximation of p(x | d) that is the posterior in the limit of many
    simulations and a flexible flow; with few it tends to be over-confident (Hermans et al. 2022, arXiv:2110.06581).

    The flow is a neural spline flow in coordinates where the best linear-Gaussian law is N(0, I): autoregressive up to
    10 unknowns, couplings above.

    Args:
        the settings of all five (module); depth, bins: hidden layers and spline bins of each transform.
        rounds: above 1, sequential: later simulations are drawn from the prior where the estimate of the round before
            has all but 1e-4 of its mass (truncated sequential NPE, Deistler, Gonçalves & Macke 2022, arXiv:2210.04815,
            algorithm 1), which needs no correction of the loss; the result is for the problem's one observation.

    Cost: `simulations` operator items; one network a draw.
    References: Papamakarios & Murray 2016, arXiv:1605.06376; Greenberg et al. 2019, arXiv:1905.07488; Durkan et al. 2019,
    arXiv:1906.04032 (splines).
    """

    method: ClassVar[str] = "npe"

    members: int | None = None
    depth: int = 2
    bins: int = 8
    rounds: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1 or self.depth < 1 or self.bins < 2:
            raise ValueError(
                f"NPE needs rounds >= 1, depth >= 1 and bins >= 2, got {self.rounds}, {self.depth}, {self.bins}."
            )

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"depth": self.depth, "bins": self.bins}

    def _train(self, problem: InverseProblem, simulations: Simulations | int, **options: Any) -> AmortizedPosterior:
        """With `rounds` above 1 for the problem's one observation, and simulated here."""
        if self.rounds == 1:
            return super()._train(problem, simulations, **options)
        if not isinstance(simulations, SupportsIndex):
            raise TypeError(
                "NPE(rounds > 1) simulates where the round before found mass; give the number of simulations."
            )
        return fit_in_rounds(self._recipe(), self.rounds, problem, index(simulations), **options)

    def _depends(self, problem: InverseProblem) -> tuple[Any, ...]:
        if self.rounds == 1:
            return ()
        return tuple(tuple(t.data.flatten().tolist()) for t in problem.terms)

    @classmethod
    def examples(cls) -> list[NPE]:
        """A tiny one."""
        return [cls(simulations=200, hidden=8, layers=1, depth=1, epochs=1, members=1)]

    @classmethod
    def exam(cls) -> dict[str, NPE]:
        """The defaults."""
        return {"NPE 10k": cls()}


@dataclass(frozen=True)
class FMPE(_Estimator):
    r"""Flow-matching posterior estimation: a velocity v(x_t, t; d) whose flow turns noise into posterior draws.

    Targets the law of the flow that minimises E |v(x_t, t; d) − (ε − x)|², x_t = (1 − t) x + t ε: an approximation of
    p(x | d), exact in the limit of many simulations, a flexible network and small steps (32 of Runge–Kutta).

    Args:
        the settings of all five (module).

    Cost: `simulations` operator items; 128 networks a draw, 128 (1 + dim) a log-density.
    References: Dax et al. 2023, arXiv:2305.17161, equation 6; Lipman et al. 2023, arXiv:2210.02747.
    """

    method: ClassVar[str] = "fmpe"

    epochs: int = 300
    patience: int = 50

    @classmethod
    def examples(cls) -> list[FMPE]:
        """A tiny one."""
        return [cls(simulations=200, hidden=8, layers=1, epochs=1)]

    @classmethod
    def exam(cls) -> dict[str, FMPE]:
        """The defaults."""
        return {"FMPE 10k": cls()}


@dataclass(frozen=True)
class NPSE(_Estimator):
    r"""Neural posterior score estimation: the score of the noised posterior, by denoising score matching.

    Targets the law of the probability-flow equation of the score that minimises E λ(t) |s(x_t, t; d) − ∇ log p(x_t | x)|²:
    an approximation of p(x | d), exact in the limit of many simulations, a flexible network and small steps.

    Args:
        the settings of all five (module); sde: "ve", "vp" or "subvp".

    Cost: as FMPE.
    References: Sharrock et al. 2024, arXiv:2210.04872; Geffner, Papamakarios & Mnih 2023, arXiv:2209.14249; Song et al.
    2021, arXiv:2011.13456, equation 13.
    """

    method: ClassVar[str] = "npse"

    epochs: int = 300
    patience: int = 50
    sde: str = "ve"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sde not in ("ve", "vp", "subvp"):
            raise ValueError(f"NPSE takes sde from 've', 'vp' and 'subvp', got {self.sde!r}.")

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"sde": self.sde}

    @classmethod
    def examples(cls) -> list[NPSE]:
        """A tiny one."""
        return [cls(simulations=200, hidden=8, layers=1, epochs=1)]

    @classmethod
    def exam(cls) -> dict[str, NPSE]:
        """None: as FMPE."""
        return {}


@dataclass(frozen=True)
class _Chained(_Estimator):
    """An estimator whose posterior is drawn by chains on what has been learnt."""

    pooled: ClassVar[bool] = True
    needs: ClassVar[tuple[Any, ...]] = (HasDensity | HasLatent,)

    warmup: int = 60

    def check(self, problem: InverseProblem) -> None:
        check_target(self, problem, "auto", gradient=False)
        super().check(problem)

    def num_steps(self, problem: InverseProblem) -> int:
        return walker(self.warmup).num_steps(problem)

    def solve(self, problem: InverseProblem, num_samples: int = 1, *, seed: int = 0, **options: Any) -> Posterior:
        return super().solve(problem, num_samples, seed=seed, **together(num_samples, options))


@dataclass(frozen=True)
class NLE(_Chained):
    r"""Neural likelihood estimation: a flow q(d | x) by maximum likelihood, then Hamiltonian Monte Carlo with the prior.

    Targets ∝ q(d | x) p(x), an approximation of p(x | d) that is the posterior in the limit of many simulations. Each
    draw is the end of a chain of its own, started from 1024 draws of the prior resampled by q(d | x). Best where data
    are few; a flow over many data needs many simulations.

    Args:
        the settings of all five (module).

    Cost: `simulations` operator items; about ten gradients of the network a step of a chain, all chains in one batch.
    References: Papamakarios, Sterratt & Murray 2019, arXiv:1805.07226 (the amortised first round of it).
    """

    method: ClassVar[str] = "nle"

    @classmethod
    def examples(cls) -> list[NLE]:
        """A tiny one."""
        return [cls(simulations=200, hidden=8, layers=1, epochs=1, warmup=2)]

    @classmethod
    def exam(cls) -> dict[str, NLE]:
        """The defaults."""
        return {"NLE 10k": cls()}


@dataclass(frozen=True)
class NRE(_Chained):
    r"""Neural ratio estimation: a classifier that learns log p(d | x)/p(d), then Hamiltonian Monte Carlo with the prior.

    Targets ∝ exp f(x, d) p(x) with f the classifier that picks the true x among ten: an approximation of p(x | d) that is
    the posterior in the limit of many simulations. Draws as NLE.

    Args:
        the settings of all five (module).

    Cost: as NLE, with a smaller network.
    References: Durkan, Murray & Papamakarios 2020, arXiv:2002.03712, equation 8; Hermans, Begy & Louppe 2020,
    arXiv:1903.04057.
    """

    method: ClassVar[str] = "nre"

    layers: int = 2

    @classmethod
    def examples(cls) -> list[NRE]:
        """A tiny one."""
        return [cls(simulations=200, hidden=8, layers=1, epochs=1, warmup=2)]

    @classmethod
    def exam(cls) -> dict[str, NRE]:
        """None: as NLE."""
        return {}
