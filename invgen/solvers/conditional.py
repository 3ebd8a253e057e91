r"""Image-sized amortised posteriors: p(x | d) by a conditional network trained on the problem's own simulations.

x_i ~ p(x), d_i ~ p(d | x_i): a network that learns to carry a base law to the unknowns, given their data, draws from
p(x | d) for *any* d without a likelihood, a gradient of the physics or another simulation (Wildberger et al. 2023). What
is added here: the best linear answer m(d) to the simulator, with its error's sd s and covariance S, is found first
(`_conditional_linear`), and the network learns the law of ζ = (u − m(d))/s instead of that of u (`_conditional_field`).

    base "linear"     ζ₀ an error of the linear answer: the flow starts from N(m(d), ≈ S)
    base "diagonal"   ζ₀ white: the flow starts from N(m(d), s²), and learns all correlations
    base "white"      the flow starts from N(μ, σ²), the prior's marginal moments: flow matching posterior estimation as
                      published, with the linear answer as network input and preconditioner

All three have p(x | d) as their fixed point. For a linear-Gaussian problem "linear" starts at the answer, so that what
training achieves is visible in the other two only.

References: Lipman, Chen, Ben-Hamu, Nickel & Le, Flow matching for generative modeling, ICLR 2023, arXiv:2210.02747;
Wildberger et al., Flow matching for scalable simulation-based inference, NeurIPS 2023, arXiv:2305.17161; Karras et al.,
Elucidating the design space of diffusion-based generative models, NeurIPS 2022, arXiv:2206.00364; Batzolis et al.,
Conditional image generation with score-based diffusion models, 2021, arXiv:2111.13606.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from invgen._learning import default_network, train
from invgen.contracts import Solver
from invgen.simulations import Simulations
from invgen.solvers._conditional_field import ConditionalField
from invgen.solvers._conditional_linear import linear_answer, spread_of
from invgen.solvers._conditional_posterior import ConditionalPosterior, network_data, on_the_grid
from invgen.solvers._conditional_refine import refined
from invgen.streams import Streams

if TYPE_CHECKING:
    from invgen.problem import InverseProblem

__all__ = ["ConditionalDiffusion", "ConditionalFlowMatching", "refined"]

_Self = TypeVar("_Self", bound="_Conditional")
_BLOCK = 256  # base draws made at a time
_FEW = 64  # simulations below which nothing can be learned


@dataclass(frozen=True)
class _Pairs:
    """Training examples: rows of the simulations in random order, each with a base draw of another row.

    Args:
        x: ζ₁ `(n, *shape)`. features: `(n, k, *spatial)`. base: draws of ζ₀ or None. data: flat data or None.
    """

    x: Tensor
    features: Tensor
    base: Tensor | None
    data: Tensor | None

    def __len__(self) -> int:
        return len(self.x)

    def rows(self, index: Tensor, partners: Tensor) -> dict[str, Tensor]:
        out = {"x": self.x[index], "features": self.features[index]}
        if self.base is not None:
            out["base"] = self.base[partners % len(self.base)]
        if self.data is not None:
            out["data"] = self.data[index]
        return out

    def batch(self, step: int, size: int, seed: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([seed, step, 17])
        n = len(self.x)
        index = rng.choice(n, size, replace=size > n)
        return self.rows(torch.from_numpy(index), torch.from_numpy(rng.integers(n, size=size)))


@dataclass(frozen=True)
class _Conditional(Solver):
    """What both estimators share: simulate, find the linear answer, train, and draw."""

    law: ClassVar[str] = "uniform"
    sampler: ClassVar[str] = "midpoint"
    bases: ClassVar[tuple[str, ...]] = ("linear", "diagonal", "white")

    network: nn.Module | None = None
    embedding: nn.Module | None = None
    base: str = "linear"
    simulations: int = 4096
    steps: int = 16
    updates: int = 2000
    batch_size: int = 32
    learning_rate: float = 1e-3
    ema: float = 0.999
    precision: str = "32-true"
    limit: int = 4096
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.base not in self.bases:
            raise ValueError(f"{name} takes base from {', '.join(self.bases)}, got {self.base!r}.")
        for key in ("simulations", "steps", "updates", "batch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"{name} needs {key} >= 1, got {getattr(self, key)}.")

    def fit(
        self,
        problem: InverseProblem,
        simulations: Simulations | int | None = None,
        *,
        seed: int = 0,
        device: str | None = None,
        progress: bool = False,
    ) -> ConditionalPosterior:
        """Learn p(x | d) from simulations of the problem.

        Args:
            problem: simulator; its data only give shapes. simulations: pairs, or how many to draw; as in the settings
                when omitted. A tenth is held out.
            seed: of simulations, weights and training. device: to train on.

        Returns:
            `ConditionalPosterior`; `report` has the held-out loss of the network and of the linear answer alone.

        Raises:
            ValueError: too few simulations, ones that are not of this problem, a network that cannot take the fields.
        """
        if not isinstance(simulations, Simulations):
            simulations = Simulations.of(problem, simulations or self.simulations, seed=seed)
        simulations.check(problem)
        if len(simulations) < _FEW:
            raise ValueError(
                f"{type(self).__name__} was given {len(simulations)} simulations and needs at least {_FEW}; simulate more."
            )
        with torch.no_grad():
            x, _, data = simulations.batch(slice(0, len(simulations)), dtype=torch.float32)
            u = problem.prior.transform.inverse(x.double()).float()
            posterior, pairs, held = self._prepared(problem, u, data, seed)
        field = posterior.field
        module = copy.deepcopy(field)
        with torch.enable_grad():
            done = train(
                module,
                pairs,
                None,
                progress=progress,
                steps=self.updates,
                batch_size=self.batch_size,
                learning_rate=self.learning_rate,
                ema=self.ema,
                precision=self.precision,
                warmup=min(200, self.updates // 5),
                device=device or "cpu",
                seed=seed,
                checkpoint=self.checkpoint,
            )
        module.to("cpu").eval().requires_grad_(False)
        loss, alone = module.held_out(held, self.batch_size)
        chart = dict(posterior.chart)
        if self.sampler == "ancestral":
            chart["misfit"] = module.misfit({k: v[:64] for k, v in held.items()})
        if loss > 1.02 * alone:
            warnings.warn(
                f"On held-out simulations the trained network has the loss {loss:.3f}, the linear answer alone {alone:.3f}: {len(simulations)} simulations are too few for this network; simulate more, or train less.",
                stacklevel=2,
            )
        report = {"steps": done.steps, "seconds": done.seconds, "loss": loss, "loss_linear": alone}
        return ConditionalPosterior(
            module,
            posterior.answer,
            problem,
            chart,
            self.base,
            self.sampler,
            self.steps,
            {**report, "simulations": len(simulations), "failed": simulations.failed},
        )

    def _prepared(
        self, problem: InverseProblem, u: Tensor, data: tuple[Tensor, ...], seed: int
    ) -> tuple[ConditionalPosterior, _Pairs, dict[str, Tensor]]:
        """The posterior with an untrained network, training pairs, and the held-out ones."""
        answer = linear_answer(problem, u, data, self.limit)
        simulated = problem.with_data(*data)
        centre, q = answer.estimate(simulated)
        spread = spread_of(u - answer.mean.to(u)).float()
        scale = spread_of(u - centre.to(u)).float()
        chart = {"spread": spread, "scale": scale, "distances": q.double().sort().values}
        errors = None
        if self.base == "linear":
            blocks = [range(i, min(i + _BLOCK, len(u))) for i in range(0, len(u), _BLOCK)]
            errors = torch.cat([answer.errors(Streams(seed, b, salt="fit"), torch.float32, "base") for b in blocks])
            chart["base"] = spread_of(errors).float()
            errors = errors / chart["base"]
        flat, embedding = None, self.embedding
        if embedding is None and not answer.sufficient:
            if len(problem.model_shape) > 1 and not on_the_grid(problem):
                raise ValueError(
                    f"The data {[tuple(t.operator.data_shape) for t in problem.terms]} do not lie on the model's grid {problem.model_shape[1:]} and the physics is not linear-Gaussian; give embedding=, a module from flat data to channels on that grid."
                )
            embedding = nn.Identity()  # the data themselves
        if embedding is not None:
            flat = network_data(simulated, embedding).float()
            chart["data_mean"], chart["data_sd"] = flat.mean(0), spread_of(flat - flat.mean(0)).float()
            flat = (flat - chart["data_mean"]) / chart["data_sd"]
        field = self._field(problem, embedding, flat, scale / spread, seed)
        posterior = ConditionalPosterior(field, answer, problem, chart, self.base, self.sampler, self.steps)
        zeta = ((u - centre.to(u)) / scale).float()
        every = _Pairs(zeta, posterior.features(centre.float()), errors, flat)
        order = torch.from_numpy(np.random.default_rng([seed, 5]).permutation(len(u)))
        held, kept = order[: len(u) // 10], order[len(u) // 10 :]
        part = _Pairs(every.x[kept], every.features[kept], errors, None if flat is None else flat[kept])
        return posterior, part, every.rows(held, held.roll(1))

    def _field(
        self, problem: InverseProblem, embedding: nn.Module | None, flat: Tensor | None, ratio: Tensor, seed: int
    ) -> ConditionalField:
        shape = problem.model_shape
        extra = 2 * shape[0]
        if embedding is not None:
            assert flat is not None
            embedding = copy.deepcopy(embedding)
            extra += int(embedding(flat[:1]).shape[1])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = copy.deepcopy(self.network) if self.network is not None else default_network(shape, extra)
        field = ConditionalField(network, embedding, shape, self.law, ratio if self.base == "white" else None)
        try:
            with torch.no_grad():
                few = torch.zeros(1, *shape)
                out = field(
                    few, torch.ones(1), torch.zeros(1, 2 * shape[0], *shape[1:]), flat if flat is None else flat[:1]
                )
        except (RuntimeError, IndexError, TypeError) as error:
            raise ValueError(
                f"The network {type(network).__name__} cannot take {shape[0] + extra} input channels on the grid {tuple(shape[1:])} ({' '.join(str(error).split())[:120]}); build it with channels={shape[0]} and extra={extra}."
            ) from error
        if tuple(out.shape[1:]) != shape:
            raise ValueError(f"The network returns {tuple(out.shape[1:])} for models of the shape {shape}.")
        return field

    @classmethod
    def load(cls, path: str | Path, problem: InverseProblem, *, limit: int = 4096) -> ConditionalPosterior:
        """Read a fitted posterior; see `ConditionalPosterior.load`."""
        return ConditionalPosterior.load(path, problem, limit=limit)

    # --- as a solver: fit, then draw -----------------------------------------------------------------------------------

    def _fitted(self, problem: InverseProblem, seed: int) -> ConditionalPosterior:
        found: ConditionalPosterior = problem.remember(
            ("conditional", self, seed), lambda: self.fit(problem, seed=seed)
        )
        return found

    def num_steps(self, problem: InverseProblem) -> int:
        return self.steps

    def init(self, problem: InverseProblem, rng: Streams) -> dict[str, Tensor]:
        return self._fitted(problem, rng.seed).init(problem, rng)

    def step(self, problem: InverseProblem, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        fitted = self._fitted(problem, rng.seed)
        state = fitted.step(problem, state, rng)
        return {**state, **fitted.finish(problem, state)} if int(state["clock"]) == self.steps else state

    def finish(self, problem: InverseProblem, state: dict[str, Tensor]) -> Mapping[str, Tensor]:
        return {k: v for k, v in state.items() if k == "x" or k.startswith("stat_")}


@dataclass(frozen=True)
class ConditionalFlowMatching(_Conditional):
    r"""Conditional flow matching: a learned flow from a base law to p(x | d), for any data. Targets an approximation.

    dζ/dφ = F(ζ, φ, d) from ζ₀ to ζ₁ = (u − m(d))/s, F learned by regression on cos φ ζ₁ − sin φ ζ₀ over simulations: the
    straight path and the loss of Lipman et al. 2023, equations 22 and 23, in other coordinates (`_conditional_field`).
    With enough simulations, network and training, and small steps, the law of the draws tends to p(x | d), for any prior
    and simulator; what is drawn in a given time is an approximation that `invgen.diagnostics.calibrate` judges.

    Args:
        network: F, a module of `(batch, channels + extra, *spatial)` and `(batch,)` with extra = 2 channels (+ those of the
            embedding); a UNet or a multilayer perceptron of its own when omitted. It is copied, not changed.
        embedding: learned with the network: flat data `(batch, m)` to further channels `(batch, k, *spatial)`. Without
            one the network sees m(d) and, where that is not sufficient (see the module's text), the data themselves
            if they are vectors or lie on the model's grid.
        base: "linear", "diagonal" or "white" (module's text).
        simulations: drawn where none are given. steps: of the midpoint rule in φ, two network calls each. A mode of ζ with
            the variance λ turns within an angle of 1/√λ: on a post-stack section (silent low frequencies) and base
            "diagonal" 4, 8 and 16 steps gave 0.79, 0.95 and 1.01 times the posterior's sd; base "linear" needs few.
        updates: optimiser steps. batch_size, learning_rate, ema, precision: of the training ("bf16-mixed" where the
            processor computes with bfloat16).
        limit: data up to which the linear answer's matrix is factorised (m³/3 once).
        checkpoint: file that training is resumed from, to the bit.

    Raises:
        ValueError: settings out of range. In `fit`: too few simulations, ones of another problem, a network that does
            not fit, data that need an embedding. TypeError: complex data with linear-Gaussian physics.

    Nuisance parameters are simulated and marginalised over: draws are of x alone. Channels are taken as independent by
    the linear answer, not by the network.

    Cost: `fit`: the simulations, one linear solve each (two with base "linear"), 3 · updates · batch_size network
    passes. A draw: 2 steps network items; base "linear" one linear solve; an observation one linear solve.
    References: module docstring.
    """

    @classmethod
    def examples(cls) -> list[ConditionalFlowMatching]:
        """Hardly trained."""
        return [
            cls(simulations=128, updates=10, steps=3),
            cls(simulations=128, updates=10, steps=2, base="white"),
            cls(simulations=128, updates=10, steps=2, base="diagonal"),
        ]

    @classmethod
    def exam(cls) -> dict[str, ConditionalFlowMatching]:
        """Both ends: the linear answer as base, and what is published."""
        return {
            "": cls(simulations=16384, updates=3000),
            "white": cls(simulations=16384, updates=6000, steps=16, base="white"),
        }


@dataclass(frozen=True)
class ConditionalDiffusion(_Conditional):
    r"""Conditional diffusion: ancestral sampling with a denoiser that has seen the data. Targets an approximation.

    D(x_σ, σ, d) = E[ζ₁ | ζ₁ + σ n = x_σ, d], learned over simulations with ln σ ~ N(0.5, 1.7²) and the preconditioning of
    Karras et al. 2022 (their c_skip, c_out, c_in at σ_data = 1) around the linear answer, ζ₁ = (u − m(d))/s; then

        x_σ' = D + a (x_σ − D) + √(σ'² (1 − a) + (1 − a)² r) n,   a = (σ'/σ)²,        from σ = 300 down to 0.01, then D:

    the reverse of the noising as a Markov chain (Ho et al. 2020, equation 7, in σ), with the variance that is best for finite
    steps, r(σ) the mean variance of ζ₁ given x_σ and d, measured on held-out simulations (Bao et al. 2022, equation 7;
    on a correlated Gaussian 64 steps keep 0.98 of the posterior's sd, without r 0.91). The denoiser is that of `ConditionalFlowMatching`
    trained with other weights on the noise levels. Tends to p(x | d) as that does.

    Args:
        base: "diagonal", white noise in units of s; noise of another colour would cost a linear solve a step.
        steps: noise levels, one network call each.
        The others as in `ConditionalFlowMatching`.

    Cost: as `ConditionalFlowMatching`, a draw `steps` network items.
    References: module docstring; Ho, Jain & Abbeel, Denoising diffusion probabilistic models, 2020, arXiv:2006.11239;
    Bao, Li, Zhu & Zhang, Analytic-DPM, ICLR 2022, arXiv:2201.06503.
    """

    law: ClassVar[str] = "lognormal"
    sampler: ClassVar[str] = "ancestral"
    bases: ClassVar[tuple[str, ...]] = ("diagonal",)

    base: str = "diagonal"
    steps: int = 64

    @classmethod
    def examples(cls) -> list[ConditionalDiffusion]:
        """Hardly trained."""
        return [cls(simulations=128, updates=10, steps=4)]

    @classmethod
    def exam(cls) -> dict[str, ConditionalDiffusion]:
        """Fine levels."""
        return {"": cls(simulations=16384, updates=6000, steps=128)}
