r"""Could the simulator have made this observation? A test of the data against the prior predictive law p(d).

The null hypothesis is d_obs ~ p(d) = ∫ p(d | x) p(x) dx, of which simulations are draws. Six statistics look for what
usually goes wrong; each is turned into a p-value by its rank among reference simulations, and the smallest of them into
one p-value by its rank among further simulations (min-p of Westfall & Young 1993), which pays for looking six times with what
it costs given their dependence, where Bonferroni pays the most:

    p = (1 + #{simulations at least as extreme}) / (n + 1),    exact for any n: an observation like the simulations has
                                                               p ≤ α with a probability of at most α.

The data are split by principal components of the simulations into a signal of k scores s, and a residual r; k is the number
that describes other simulations best (likelihood of probabilistic principal components, Tipping & Bishop 1999, eq. 3, 8).
With z = r / sd(r), datum by datum:

    signal    Σ_j s_j²/λ_j                             far from the simulations in what they vary in (a bias, a prior too narrow)
    energy    |ln (Σ z²/N)|                            noise stronger or weaker, a gain, physics that is missing
    groups    largest standardised Σ z² of a channel (leading data axes) or of ten windows of the last axis
    offset    largest standardised |Σ z| of all, of a channel, of a window
    outliers  max |z|
    tails     Σ z⁴ / (Σ z²)²

Where that leaves signal in r (a strongly non-linear simulator), tests of r lose power. `predict`, a function from data to
fitted data (the mean of the posterior predictive, a trained network), does better: r = d − predict(d).

What no test of the data can see: a simulator that is wrong in a way that another x explains. And what none can see well: an
error of one noise sd in a fifth of N data of independent noise adds 0.2 N to a χ² of sd √(2N), three of them at N = 450.

References: Westfall & Young, Resampling-based multiple testing, Wiley 1993; Tipping & Bishop, Probabilistic principal component
analysis, JRSS B 1999; Schmitt, Bürkner, Köthe & Radev, Detecting model misspecification in amortized Bayesian inference with
neural networks, GCPR 2023, arXiv:2112.08866 (the distance in summary space: pass the summaries as data).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invgen.diagnostics._arrays import chunks, tensor
from invgen.simulations import Simulations

__all__ = ["Misspecification", "MisspecificationTest"]

STATISTICS = ("signal", "energy", "groups", "offset", "outliers", "tails")
_WINDOWS = 10
Predict = Callable[[tuple[Tensor, ...]], Any]


@dataclass(frozen=True, eq=False)
class Misspecification:
    """The verdict on observations.

    Attributes:
        p_value: `(n_obs,)`, all statistics together. p_values: name -> `(n_obs,)`, each alone and not adjusted: where to look.
        level: α.
    """

    p_value: np.ndarray
    p_values: dict[str, np.ndarray]
    level: float

    @property
    def flagged(self) -> np.ndarray:
        """`(n_obs,)`: the simulator does not make data like these."""
        return self.p_value <= self.level

    @property
    def suspect(self) -> list[str]:
        """The statistic with the smallest p-value of each observation."""
        names = list(self.p_values)
        return [names[int(i)] for i in np.argmin(np.stack([self.p_values[n] for n in names]), 0)]

    def __str__(self) -> str:
        verdict = ["MISSPECIFIED" if f else "like the simulations" for f in self.flagged]
        lines = [
            f"observation {i}: {v} (p = {p:.3g}; most extreme: {s}, p = {self.p_values[s][i]:.3g} alone)"
            for i, (v, p, s) in enumerate(zip(verdict, self.p_value, self.suspect, strict=True))
        ]
        return "\n".join(lines)


class MisspecificationTest:
    """A test of observations against simulations; see the module's docstring.

    Args:
        simulations: of the problem, or their data: `(n, *data_shape)`, or a sequence of one a term. A third each learns the
            components, is the reference of every statistic, and calibrates the smallest p-value.
        predict: fitted data from data, `predict(data) -> one (b, *data_shape) a term` (a tensor for one term), in the
            place of principal components; it must not have been trained on these simulations.
        level: α. seed: of the split. limit: simulations that are read at most.

    Raises:
        ValueError: fewer than 60 simulations, or too few to reach the level: (1 + n/3) α ≥ 1 is needed; NaN, shapes.

    Cost: one singular value decomposition of (simulations / 3 × data) numbers, once; a test is two matrix products.

    Example:
        >>> test = MisspecificationTest(Simulations.of(problem, 3000))
        >>> print(test(d_obs))
    """

    def __init__(
        self,
        simulations: Simulations | Tensor | np.ndarray | Sequence[Any],
        *,
        predict: Predict | None = None,
        level: float = 0.05,
        seed: int = 0,
        limit: int = 6000,
    ) -> None:
        data = _read(simulations, limit, seed)
        n = len(data[0])
        if n < 60 or (1 + n // 3) * level < 1:
            raise ValueError(
                f"{n} simulations are too few for a test at the level {level:g}; give at least {max(60, int(np.ceil(3 / level)))}."
            )
        self.shapes, self.predict, self.level = [tuple(d.shape[1:]) for d in data], predict, level
        order = np.random.default_rng([seed, 41]).permutation(n)
        fit, reference, held = (torch.from_numpy(np.sort(part)) for part in np.array_split(order, 3))
        self.scale = [_sd(d[fit].flatten()) for d in data]
        self.mean = [d[fit].double().mean(0) for d in data]
        self.k, self.basis, self.values = self._components([d[fit] for d in data], [d[reference] for d in data])
        self.residual_sd = torch.ones(sum(int(np.prod(s)) for s in self.shapes), dtype=torch.float64)
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        one = [d[reference] for d in data]
        residual, _ = self._parts(one)
        self.residual_sd = residual.square().mean(0).sqrt().clamp_min(1e-12)
        groups = self._groups(residual / self.residual_sd)
        self.moments = {k: (v.mean(0), v.std(0).clamp_min(1e-12)) for k, v in groups.items()}
        self.reference = self._statistics(one).sort(0).values
        self.minima = self._single(self._statistics([d[held] for d in data])).amin(1).sort().values

    def __call__(self, data: Tensor | np.ndarray | Sequence[Any]) -> Misspecification:
        """Test observations.

        Args:
            data: `data_shape` or `(n_obs, *data_shape)`, one a term.
        """
        given = list(data) if isinstance(data, (list, tuple)) else [data]
        if len(given) != len(self.shapes):
            raise ValueError(f"The simulations have {len(self.shapes)} terms, {len(given)} data were given.")
        ready = []
        for d, shape in zip(given, self.shapes, strict=True):
            values = tensor(_real(d), "The data")
            values = values[None] if tuple(values.shape) == shape else values
            if tuple(values.shape[1:]) != shape:
                raise ValueError(f"The data have the shape {tuple(values.shape)}, the simulations {shape}.")
            ready.append(values)
        single = self._single(self._statistics(ready))
        count = torch.searchsorted(self.minima, single.amin(1), right=True)
        p = (1 + count.double()) / (1 + len(self.minima))
        each = {name: single[:, i].numpy() for i, name in enumerate(STATISTICS)}
        return Misspecification(p.numpy(), each, self.level)

    # --- the parts -----------------------------------------------------------------------------------------------------

    def _flat(self, data: Sequence[Tensor]) -> Tensor:
        """`(n, N)`: terms side by side, centred and of one scale each."""
        parts = [((d.double() - m) / s).flatten(1) for d, m, s in zip(data, self.mean, self.scale, strict=True)]
        return torch.cat(parts, 1)

    def _components(self, fit: Sequence[Tensor], other: Sequence[Tensor]) -> tuple[int, Tensor, Tensor]:
        """How many principal components describe `other` best, their axes `(N, k)` and variances `(k,)`."""
        x, y = self._flat(fit), self._flat(other)
        n, dim = x.shape
        _, S, Vh = torch.linalg.svd(x, full_matrices=False)
        values, scores = S.square() / n, y @ Vh.mT
        total, energy = values.sum(), y.square().sum(1).mean()
        most = min(len(values) - 1, dim - 1, n // 4)
        best, k = -np.inf, 0
        for count in sorted({0, *np.unique(np.geomspace(1, max(most, 1), 40).astype(int)).tolist()}):
            if count > most:
                continue
            rest = (total - values[:count].sum()) / (dim - count)
            kept = scores[:, :count].square().mean(0)
            fitted = values[:count].clamp_min(1e-12)
            log = -0.5 * float(
                fitted.log().sum()
                + (dim - count) * rest.clamp_min(1e-12).log()
                + (kept / fitted).sum()
                + (energy - kept.sum()) / rest.clamp_min(1e-12)
            )
            if log > best:
                best, k = log, count
        return k, Vh[:k].mT.contiguous(), scores[:, :k].square().mean(0).clamp_min(1e-12)

    def _parts(self, data: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Residuals `(n, N)` and scores `(n, k)`."""
        flat = self._flat(data)
        scores = flat @ self.basis
        if self.predict is None:
            return flat - scores @ self.basis.mT, scores
        fitted = self.predict(tuple(data))
        fitted = [fitted] if isinstance(fitted, Tensor) else list(fitted)
        return flat - self._flat([f.detach().cpu() for f in fitted]), scores

    def _groups(self, z: Tensor) -> dict[str, Tensor]:
        """Energy and sum over channels and windows `(n, groups)`, the whole first."""
        energy, total = [z.square().mean(1, keepdim=True)], [z.mean(1, keepdim=True)]
        start = 0
        for shape in self.shapes:
            size = int(np.prod(shape))
            part = z[:, start : start + size].reshape(len(z), *(shape or (1,)))
            start += size
            views = [part.flatten(1, -2)] if part.ndim > 2 and part.shape[-1] > 1 else []
            views += [part.movedim(axis, 1).flatten(2) for axis in range(1, part.ndim - 1) if part.ndim > 3]
            rows = part.movedim(-1, 1).reshape(len(z), part.shape[-1], -1)
            last = torch.chunk(rows, _WINDOWS, dim=1) if part.shape[-1] >= 2 * _WINDOWS else ()
            blocks = [(v.square().mean(-1), v.mean(-1)) for v in views]
            blocks += [(v.square().mean((1, 2))[:, None], v.mean((1, 2))[:, None]) for v in last]
            energy += [b[0] for b in blocks]
            total += [b[1] for b in blocks]
        return {"energy": torch.cat(energy, 1), "sum": torch.cat(total, 1)}

    def _statistics(self, data: Sequence[Tensor]) -> Tensor:
        """`(n, 6)`, larger is worse."""
        out = []
        for rows in chunks(len(data[0]), 8 * len(self.residual_sd)):
            residual, scores = self._parts([d[rows] for d in data])
            z = residual / self.residual_sd
            groups = self._groups(z)
            moved = {k: (v - self.moments[k][0]) / self.moments[k][1] for k, v in groups.items()}
            square = z.square()
            out.append(
                torch.stack(
                    [
                        (scores.square() / self.values).sum(1),
                        (groups["energy"][:, 0].clamp_min(1e-300).log()).abs(),
                        moved["energy"].amax(1),
                        moved["sum"].abs().amax(1),
                        square.amax(1),
                        square.square().mean(1) / square.mean(1).square().clamp_min(1e-300),
                    ],
                    1,
                )
            )
        return torch.cat(out).cpu()

    def _single(self, statistics: Tensor) -> Tensor:
        """p-value of each statistic alone, `(n, 6)`: its rank among the reference simulations.

        Beyond the largest of them the p-values would tie at 1/(n + 1); a tail that goes on like an exponential law keeps
        their order, which is all that the calibration uses.
        """
        n = len(self.reference)
        columns = []
        for k in range(statistics.shape[1]):
            ordered, value = self.reference[:, k].contiguous(), statistics[:, k].contiguous()
            above = n - torch.searchsorted(ordered, value, right=False)
            p = (1 + above.double()) / (n + 1)
            tail = max(n // 20, 1)
            spread = (ordered[-tail:] - ordered[-tail - 1]).mean().clamp_min(1e-12)
            beyond = (value - ordered[-1]).clamp_min(0)
            columns.append(p * torch.exp(-beyond / spread))
        return torch.stack(columns, 1)


def _read(simulations: Any, limit: int, seed: int) -> list[Tensor]:
    """Data `(n, *shape)` in memory, complex ones as pairs."""
    if isinstance(simulations, Simulations):
        n = len(simulations)
        rows = np.arange(n) if n <= limit else np.sort(np.random.default_rng([seed, 43]).permutation(n)[:limit])
        parts: Sequence[Any] = simulations.batch(rows)[2]
    else:
        parts = list(simulations) if isinstance(simulations, (list, tuple)) else [simulations]
        parts = [p[:limit] for p in parts]
    found = [tensor(_real(p), "The simulated data").cpu() for p in parts]
    if not found or len({len(f) for f in found}) != 1:
        raise ValueError("The simulated data hold one row a simulation for every term; give the same number for each.")
    return [f[:, None] if f.ndim == 1 else f for f in found]


def _real(d: Any) -> Any:
    """Complex data as pairs of real ones."""
    if isinstance(d, Tensor) and d.is_complex():
        return torch.view_as_real(d.resolve_conj())
    return np.stack([d.real, d.imag], -1) if isinstance(d, np.ndarray) and np.iscomplexobj(d) else d


def _sd(values: Tensor) -> Tensor:
    sd = values.double().std()
    return sd if sd > 0 else torch.ones((), dtype=torch.float64)
