r"""Ensemble Kalman methods: inversion and sampling without derivatives, for physics that is a black box.

Unknowns are latent, q = (z, z_θ) ~ N(0, I) beforehand, x = f(z), θ = f_θ(z_θ), and the noise is Gaussian, so that

    log p(q | d) = −Φ(q) − ½ |q|² + const,    Φ(q) = ½ |y − G(q)|²,    y = R^(−1/2) d,  G(q) = R^(−1/2) g(f(z); θ).

J members q_j take the place of derivatives: with deviations e_j = q_j − q̄ and f_j = G(q_j) − Ḡ, the sample covariance
C^qG = ave(e_j f_jᵀ) is C^qq times the slope of the linear function that fits G best over the ensemble. What follows is
exact where G is linear; elsewhere it is a Gaussian-like approximation, good as far as G is close to linear over the
posterior: two separated modes become one broad one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from invgen.contracts import HasLatent, Solver
from invgen.driver import Streams
from invgen.problem import InverseProblem
from invgen.solvers._ensemble import Runs, check_ensemble, deviations, members, refill, run_models
from invgen.solvers._particles import sets
from invgen.solvers._target import target_of

__all__ = ["EnsembleKalmanInversion", "EnsembleKalmanSampler"]


class _Ensemble(Solver):
    """Checks, sizes and results of both methods; private."""

    needs: ClassVar[tuple[type, ...]] = (HasLatent,)
    kind: ClassVar[str] = "approximate"
    pooled: ClassVar[bool] = True
    derivative_free: ClassVar[bool] = True

    ensemble: int
    steps: int

    def check(self, problem: InverseProblem) -> None:
        super().check(problem)
        check_ensemble(self, problem)

    def num_steps(self, problem: InverseProblem) -> int:
        return self.steps

    def init(self, problem: InverseProblem, rng: Streams) -> dict[str, Tensor]:
        q = members(rng, self.ensemble, self, target_of(problem, "z").dim, problem.dtype)
        zero = torch.zeros(len(q), dtype=torch.float64, device=q.device)
        return {"z": q, "time": zero, "made": zero.clone(), "failed": zero.clone(), "chi2": zero * math.nan}

    def finish(self, problem: InverseProblem, state: dict[str, Tensor]) -> Mapping[str, Tensor]:
        """The first member of every item: members are exchangeable."""
        target = target_of(problem, "z")
        q = state["z"][:, 0]
        x, theta = target.physical(q)
        dtype = problem.dtype
        return {
            "x": x,
            "latent": target.parts(q)[0],
            **{f"theta_{name}": v for name, v in theta.items()},
            "stat_time": state["time"].to(dtype),
            "stat_updates": state["made"].to(dtype),
            "stat_failed_runs": state["failed"].to(dtype),
            "stat_chi2": state["chi2"].to(dtype),
        }


@dataclass(frozen=True)
class EnsembleKalmanInversion(_Ensemble):
    r"""Ensemble Kalman inversion (Iglesias, Law & Stuart 2013, arXiv:1209.2736), with adaptive tempering.

    An update with the share h of the likelihood, α = 1/h, is (perturbed observations, ξ_j ~ N(0, I))

        q_j ← q_j + C^qG (C^GG + α I)⁻¹ (y + √α ξ_j − G(q_j)).

    `stop="posterior"`: the shares sum to one, so that the ensemble passes from the prior to the posterior along
    p(d | q)^t N(q; 0, I), t = Σ h. Each share is that of the data misfit controller (Iglesias & Yang 2021,
    arXiv:2006.14980): with M data, h = min(max(M/(2 ave Φ), √(M/(2 var Φ))), 1 − t), here
    at least (1 − t)/(updates left), so that t = 1 is reached.
    Targets p(x | d): exactly for linear G as J → ∞ (8 unknowns, 5 data: sd ratio 0.975 to 0.984 with 100 members, 0.994
    with 400); elsewhere an approximation (see the module).

    `stop="discrepancy"`: the method of 2013, h = 1 in every update until |y − Ḡ|² ≤ τ² M. This is an optimiser: the mean
    of the samples is a regularised least-squares estimate in the span of the first ensemble, and their spread says
    nothing.

    The members of an observation interact by design; the `num_samples` draws are members of one ensemble. A member
    whose model run gives NaN is left out of the update and drawn anew from the Gaussian of the others (counted in
    `stats["failed_runs"]`); an observation with more than half failed is given up, with the reason in a warning.

    Args:
        ensemble: members J of an observation; num_samples if that is more. A few times the number of unknowns.
        stop: see above.
        steps: updates at the most; those that are not needed cost nothing.
        tau: τ of the discrepancy principle, at least 1.

    `stats`: time (t; 1 once the discrepancy is reached, with a warning where it is not), updates, failed_runs, chi2
    (mean |y − G|² before the last update). Needs `HasLatent` (nuisance parameters of operators too), Gaussian noise of
    known covariance; no derivatives.
    Cost: J runs of generator and physics an update (typically 3 to 15 updates), J³ or M³ numbers of algebra; one device
    synchronisation an update.
    """

    ensemble: int = 512
    stop: str = "posterior"
    steps: int = 30
    tau: float = 1.0

    def __post_init__(self) -> None:
        if self.stop not in ("posterior", "discrepancy"):
            raise ValueError(
                f"EnsembleKalmanInversion stops at the 'posterior' or by 'discrepancy', got {self.stop!r}."
            )
        if self.ensemble < 3 or self.steps < 1 or not self.tau >= 1:
            raise ValueError(
                f"EnsembleKalmanInversion needs ensemble >= 3, steps >= 1 and tau >= 1, got {self.ensemble}, {self.steps}, {self.tau}."
            )

    @classmethod
    def examples(cls) -> list[EnsembleKalmanInversion]:
        """Both ways to stop."""
        return [cls(ensemble=64, steps=8), cls(ensemble=64, stop="discrepancy", steps=4)]

    @classmethod
    def exam(cls) -> dict[str, EnsembleKalmanInversion]:
        """An ensemble large enough for the moments of 16 unknowns."""
        return {"EKI": cls(ensemble=8192)}

    @torch.no_grad()
    def step(self, problem: InverseProblem, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        n_sets, each = sets(rng)
        q = state["z"]
        z = q.reshape(n_sets, -1, q.shape[-1]).double()
        time, made = state["time"][::each], state["made"][::each]
        alive = (time < 1) & torch.isfinite(z[:, 0, 0])
        active = alive.cpu()
        if not bool(active.any()):
            return state
        runs, failed, lost = run_models(self, problem, z.to(q.dtype), active, rng)
        M = runs.data.shape[1]
        mean, W = deviations(runs.predicted, runs.good, runs.good.sum(1) - 1)
        if self.stop == "discrepancy":
            reached = (runs.data - mean).square().sum(1) <= self.tau**2 * M
            h = torch.where(alive & ~reached, 1.0, 0.0).to(time)
            time = torch.where(alive & reached, torch.ones_like(time), time)
        else:
            h = torch.where(alive, self._share(runs, time, made, M), torch.zeros_like(time))
            time = torch.where(alive, time + h, time)
            time = torch.where(time > 1 - 1e-12, torch.ones_like(time), time)
        noise = rng.normal((q.shape[1], M), dtype=torch.float64, tag="data").reshape(n_sets, -1, M)
        moved = z + _kalman(z, W, runs, h, noise)
        moved = refill(moved, runs.good | ~alive[:, None], rng, int(made.max()))
        moved = torch.where(lost[:, None, None], torch.full_like(moved, math.nan), moved)
        chi2 = 2 * torch.where(runs.good, runs.misfit, torch.zeros_like(runs.misfit)).sum(1) / runs.good.sum(1)
        new = {
            "time": time,
            "made": made + (h > 0),
            "failed": state["failed"][::each] + failed,
            "chi2": torch.where(alive, chi2, state["chi2"][::each]),
        }
        wide = {k: v.repeat_interleave(each).to(state[k]) for k, v in new.items()}
        return {**state, **wide, "z": moved.reshape(q.shape).to(q.dtype)}

    def finish(self, problem: InverseProblem, state: dict[str, Tensor]) -> Mapping[str, Tensor]:
        far = (state["time"] < 1) & torch.isfinite(state["z"][:, 0, 0])
        if self.stop == "discrepancy" and bool(far.any()):
            warnings.warn(
                f"EnsembleKalmanInversion did not bring the misfit of the mean prediction below {self.tau}² · M in {self.steps} updates; raise steps, ensemble or tau, or check the noise level.",
                stacklevel=3,
            )
        return super().finish(problem, state)

    def _share(self, runs: Runs, time: Tensor, made: Tensor, M: int) -> Tensor:
        """The share of the likelihood the next update takes, `(sets,)`."""
        count = runs.good.sum(1).clamp_min(2).to(time)
        phi = torch.where(runs.good, runs.misfit, torch.zeros_like(runs.misfit))
        mean = phi.sum(1) / count
        spread = torch.where(runs.good, phi - mean[:, None], torch.zeros_like(phi)).square().sum(1) / (count - 1)
        h = torch.maximum(M / (2 * mean), (M / (2 * spread)).sqrt())
        # should the controller be too careful for `steps`, the rest is shared out evenly
        left = (self.steps - made).clamp_min(1)
        return torch.minimum(torch.maximum(torch.nan_to_num(h), (1 - time) / left), 1 - time)


def _kalman(q: Tensor, W: Tensor, runs: Runs, h: Tensor, noise: Tensor) -> Tensor:
    """Qᵀ (I + h W Wᵀ)⁻¹ W (h (y − G_j) + √h ξ_j) of every member j: the update, on the smaller side of W `(J, M)`."""
    J, M = W.shape[1:]
    _, Q = deviations(q, runs.good, runs.good.sum(1) - 1)
    wide = h[:, None, None]
    pull = wide * (runs.data[:, None] - runs.predicted) + wide.sqrt() * noise  # (sets, J, M)
    finite = torch.isfinite(pull).all(-1, keepdim=True)
    pull = torch.where(finite, pull, torch.zeros_like(pull))
    if M <= J:
        S = torch.eye(M, dtype=W.dtype, device=W.device) + wide * (W.mT @ W)
        return torch.cholesky_solve(pull.mT, torch.linalg.cholesky(S)).mT @ (W.mT @ Q)
    S = torch.eye(J, dtype=W.dtype, device=W.device) + wide * (W @ W.mT)
    return torch.cholesky_solve(W @ pull.mT, torch.linalg.cholesky(S)).mT @ Q


@dataclass(frozen=True)
class EnsembleKalmanSampler(_Ensemble):
    r"""Ensemble Kalman sampler in its affine-invariant, corrected form (ALDI).

    N members follow the interacting Langevin equation (Garbuno-Inigo, Nüsken & Reich 2020, arXiv:1912.02859, the
    gradient-free form; without the last drift term it is Garbuno-Inigo, Hoffmann, Li & Stuart 2020, arXiv:1903.08866),

        dq_j = −(C^qG (G(q_j) − y) + C^qq q_j) dt + (n + 1)/N (q_j − q̄) dt + √2 (C^qq)^½ dW_j,

    with n unknowns and (C^qq)^½ = (e_1 … e_N)/√N acting on N independent noises. Linear maps of q leave it as it is, so
    that precise data and correlated unknowns need no smaller steps once the ensemble has found the posterior.

    With E = (e_j)/√N, F = (f_j)/√N the step is taken for the position Eᵀ a, a ∈ R^N, with E and F held: first the
    correction, then the Ornstein–Uhlenbeck process da = −(K a + b_j) dt + √2 dW, K = E Eᵀ + F Fᵀ, exactly. At the
    posterior of a linear problem K is the identity on its range: the step has no error but that of holding E and F.

    Targets p(x | d): exactly for linear G and *any* N > n + 1 in the limit of time → ∞ and step → 0 (there: the
    product of N posteriors is invariant); elsewhere C^qq ∇G is replaced by C^qG, an approximation (see the module).
    Measured with 8 correlated unknowns and 5 data, step 1: sd ratio 0.993 ± 0.004 with 20 members, 1.002 ± 0.004 with
    100; without the correction 0.84 with 20. With hardly more members than unknowns the way from prior to posterior is
    long.

    The members of an observation interact by design; the `num_samples` draws are members of one ensemble. Failed model
    runs as in `EnsembleKalmanInversion`.

    Args:
        ensemble: members N of an observation; num_samples if that is more; more than n + 1.
        steps: steps of the equation.
        step_size: the time step adapts, Δt = step_size / max(1, λ_max(K)): the stiffest direction relaxes by
            e^(−step_size).
        correction: the term (n + 1)/N; False is the sampler of arXiv:1903.08866, biased for small N.

    `stats`: time (ΣΔt; a warning below 2, where the start is not forgotten), updates, failed_runs, chi2 (mean |y − G|²
    before the last step). Needs as `EnsembleKalmanInversion`.
    Cost: N runs of generator and physics a step; a decomposition of a matrix of min(N, n + M); one device
    synchronisation a step.
    """

    ensemble: int = 256
    steps: int = 60
    step_size: float = 1.0
    correction: bool = True

    def __post_init__(self) -> None:
        if self.ensemble < 3 or self.steps < 1 or not self.step_size > 0:
            raise ValueError(
                f"EnsembleKalmanSampler needs ensemble >= 3, steps >= 1 and a positive step_size, got {self.ensemble}, {self.steps}, {self.step_size}."
            )

    @classmethod
    def examples(cls) -> list[EnsembleKalmanSampler]:
        """With and without the correction."""
        return [cls(ensemble=64, steps=12), cls(ensemble=48, steps=6, correction=False)]

    @classmethod
    def exam(cls) -> dict[str, EnsembleKalmanSampler]:
        """The sampler run long enough for precise data."""
        return {"ALDI": cls(ensemble=1024, steps=60)}

    @torch.no_grad()
    def step(self, problem: InverseProblem, state: dict[str, Tensor], rng: Streams) -> dict[str, Tensor]:
        n_sets, each = sets(rng)
        q = state["z"]
        z = q.reshape(n_sets, -1, q.shape[-1]).double()
        alive = torch.isfinite(z[:, 0, 0])
        active = alive.cpu()
        if not bool(active.any()):
            return state
        runs, failed, lost = run_models(self, problem, z.to(q.dtype), active, rng)
        # N independent noises a member; their image under (C^qq)^½ needs no more than n + M of them
        width = min(z.shape[1], z.shape[2] + runs.data.shape[1])
        noise = rng.normal((q.shape[1], width), dtype=torch.float64, tag="step").reshape(n_sets, -1, width)
        moved, dt = self._move(torch.nan_to_num(z), runs, noise)
        made = state["made"][::each]
        moved = refill(moved, runs.good | ~alive[:, None], rng, int(made.max()))
        moved = torch.where((lost | ~alive)[:, None, None], torch.full_like(moved, math.nan), moved)
        chi2 = 2 * torch.where(runs.good, runs.misfit, torch.zeros_like(runs.misfit)).sum(1) / runs.good.sum(1)
        new = {
            "time": state["time"][::each] + torch.where(alive, dt, torch.zeros_like(dt)),
            "made": made + alive,
            "failed": state["failed"][::each] + failed,
            "chi2": torch.where(alive, chi2, state["chi2"][::each]),
        }
        wide = {k: v.repeat_interleave(each).to(state[k]) for k, v in new.items()}
        return {**state, **wide, "z": moved.reshape(q.shape).to(q.dtype)}

    def _move(self, q: Tensor, runs: Runs, noise: Tensor) -> tuple[Tensor, Tensor]:
        """One step of every member, and its length of time `(sets,)`."""
        count = runs.good.sum(1)
        centre, E = deviations(q, runs.good, count)
        mean, F = deviations(runs.predicted, runs.good, count)
        B = torch.cat([E, F], dim=2)
        thin = B.shape[2] < B.shape[1]
        # K = B Bᵀ; functions of it act through BᵀB where that is smaller: φ(BBᵀ) B = B φ(BᵀB)
        values, V = torch.linalg.eigh(B.mT @ B if thin else B @ B.mT)
        dt = self.step_size / values.amax(1).clamp_min(1)
        gain = dt * (q.shape[2] + 1) / count.clamp_min(1) if self.correction else torch.zeros_like(dt)
        wide = gain[:, None, None]
        # the correction moves members along their deviations, and predictions with them: exact where G is linear
        q = q + wide * (q - centre[:, None])
        predicted = runs.predicted + wide * (runs.predicted - mean[:, None])
        pull = torch.cat([q, predicted - runs.data[:, None]], dim=2)
        pull = torch.where(runs.good[..., None], pull, torch.zeros_like(pull))  # b_j = B pull_j
        tau = dt[:, None] * values
        kept = values > 1e-12 * values.amax(1, keepdim=True)  # below is rounding, and B maps it to nothing
        safe = torch.where(kept, values, torch.ones_like(values))
        relax = torch.where(kept, -torch.expm1(-tau) / safe, torch.zeros_like(tau))
        shake = torch.where(kept, (-torch.expm1(-2 * tau) / safe).sqrt(), torch.zeros_like(tau))
        if thin:
            shift = (noise @ V * (shake / safe.sqrt())[:, None] - pull @ V * relax[:, None]) @ V.mT
            return q + shift @ (B.mT @ E), dt
        a = (noise @ V * shake[:, None] - (pull @ B.mT) @ V * relax[:, None]) @ V.mT
        return q + a @ E, dt

    def finish(self, problem: InverseProblem, state: dict[str, Tensor]) -> Mapping[str, Tensor]:
        short = state["time"][torch.isfinite(state["z"][:, 0, 0])]
        if short.numel() and bool((short < 2).any()):
            warnings.warn(
                f"EnsembleKalmanSampler reached the time {float(short.min()):.2g} after {self.steps} steps, and forgets its start like exp(-time); raise steps.",
                stacklevel=3,
            )
        return super().finish(problem, state)
