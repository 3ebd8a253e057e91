"""Do the diagnostics catch wrong posteriors, and leave right ones alone?

A correlated Gaussian inference problem with its posterior in closed form: x ~ N(μ, C), 6 unknowns with unequal variances
and a non-zero mean; d = A x + noise, 4 data. 500 simulations of 100 draws are one test, 100 tests a rate:

    exact       draws of the posterior
    sd × 0.7    the posterior's covariance times 0.49
    bias        every coordinate moved by +0.3 of its posterior sd
    prior only  draws of the prior: the data are ignored

The combined diagnostic is `check_calibration`: SBC of the 6 coordinates and of log p(d | x), and TARP with references that
follow the data: 8 exact p-values, Holm's adjustment over all. Its level is 0.001, because 100 repeats are asked to show at
least 99 passes: each fails with a probability of at most α, so two or more of 100 do with at most C(100, 2) α² = 0.005.

planted_power is the smallest rate of detection of the three errors, planted_size the rate at which the exact posterior
passes. Everything that decides the result stands in this file.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
from harness import Benchmark

from invgen.diagnostics import RankTest, check_calibration, expected_coverage, hpd_coverage, tarp

LEVEL, N_SIM, DRAWS, SEED = 0.001, 500, 100, 20
DIM, DATA, NOISE = 6, 4, 0.5
ERRORS = ("exact", "sd × 0.7", "bias +0.3 sd", "prior only")


class Gaussian:
    """x ~ N(mean, C), d = A x + NOISE n, and the posterior of x."""

    def __init__(self) -> None:
        rng = np.random.default_rng(SEED)
        i = np.arange(DIM)
        scale = np.sqrt(0.5 + i / 4)
        self.mean = 1 + 1.5 * np.sin(i / 2)
        self.C = np.exp(-np.abs(i[:, None] - i) / 3) * scale[:, None] * scale
        self.A = rng.standard_normal((DATA, DIM)) / math.sqrt(DIM)
        S = self.A @ self.C @ self.A.T + NOISE**2 * np.eye(DATA)
        self.gain = np.linalg.solve(S, self.A @ self.C).T
        self.posterior = self.C - self.gain @ self.A @ self.C
        self.sd = np.sqrt(np.diag(self.posterior))
        self.root, self.prior_root = np.linalg.cholesky(self.posterior), np.linalg.cholesky(self.C)

    def simulate(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Truths `(N_SIM, DIM)` and data `(N_SIM, DATA)`."""
        x = self.mean + rng.standard_normal((N_SIM, DIM)) @ self.prior_root.T
        return x, x @ self.A.T + NOISE * rng.standard_normal((N_SIM, DATA))

    def draws(self, d: np.ndarray, error: str, rng: np.random.Generator) -> np.ndarray:
        """`(N_SIM, DRAWS, DIM)`."""
        white = rng.standard_normal((N_SIM, DRAWS, DIM))
        if error == "prior only":
            return self.mean + white @ self.prior_root.T
        centre = self.mean + (d - self.mean @ self.A.T) @ self.gain.T
        if error == "bias +0.3 sd":
            centre = centre + 0.3 * self.sd
        return centre[:, None] + (0.7 if error == "sd × 0.7" else 1.0) * white @ self.root.T

    def log_likelihood(self, x: np.ndarray, d: np.ndarray) -> np.ndarray:
        """log p(d | x) up to a constant; x `(N_SIM, …, DIM)`."""
        r = d.reshape(len(d), *(1,) * (x.ndim - 2), DATA) - x @ self.A.T
        return -0.5 * (r**2).sum(-1) / NOISE**2

    def log_density(self, x: np.ndarray, d: np.ndarray, error: str) -> np.ndarray:
        """log q(x | d) of the planted posterior up to a constant, for the highest-density sets."""
        root = self.prior_root if error == "prior only" else self.root
        centre = np.broadcast_to(self.mean, (len(d), DIM))
        if error != "prior only":
            centre = centre + (d - self.mean @ self.A.T) @ self.gain.T
        if error == "bias +0.3 sd":
            centre = centre + 0.3 * self.sd
        r = x - centre.reshape(len(d), *(1,) * (x.ndim - 2), DIM)
        return -0.5 * (np.linalg.solve(root, r.reshape(-1, DIM).T) ** 2).sum(0).reshape(r.shape[:-1])


def alone(test: RankTest, columns: slice) -> bool:
    """Whether some of a test's quantities fail when they are all there is, at the same level (Holm over them)."""
    p = test.p_values[columns]
    return bool(p.min() <= LEVEL / len(p))


def verdicts(case: Gaussian, error: str, repeat: int) -> dict[str, bool]:
    """What each diagnostic, on its own and combined, says about one set of simulations: True where it fails."""
    x, d = case.simulate(np.random.default_rng([SEED, repeat]))
    draws = case.draws(d, error, np.random.default_rng([SEED, repeat, 1]))
    fit = case.log_likelihood(x, d), case.log_likelihood(draws, d)
    both = check_calibration(x, draws, log_likelihood=fit, data=d, level=LEVEL, seed=repeat)
    ranked, balls = both.tests
    density = case.log_density(x, d, error), case.log_density(draws, d, error)
    single: dict[str, Callable[[], bool]] = {
        "combined": lambda: not both.passed,
        "SBC coordinates": lambda: alone(ranked, slice(0, DIM)),
        "SBC log p(d|x)": lambda: alone(ranked, slice(DIM, None)),
        "TARP": lambda: alone(balls, slice(None)),
        "TARP, blind refs": lambda: not tarp(x, draws, level=LEVEL, seed=repeat).passed,
        "central intervals": lambda: not expected_coverage(x, draws, level=LEVEL, seed=repeat).passed,
        "density sets": lambda: not hpd_coverage(*density, level=LEVEL, seed=repeat).passed,
    }
    return {name: check() for name, check in single.items()}


def main() -> None:
    bench = Benchmark("diagnostics", "Power and size of the calibration tests on planted errors.")
    repeats = 20 if bench.fast else 100
    case = Gaussian()
    print(
        f"{N_SIM} simulations, {DRAWS} draws, {repeats} repeats, family-wise level {LEVEL}; posterior / prior sd:",
        end=" ",
    )
    print(np.round(case.sd / np.sqrt(np.diag(case.C)), 2))
    rates: dict[str, dict[str, float]] = {}
    for error in ERRORS:
        began = time.perf_counter()
        found = [verdicts(case, error, r) for r in range(repeats)]
        rates[error] = {name: float(np.mean([f[name] for f in found])) for name in found[0]}
        if error == ERRORS[0]:
            print("\nrate of failing     " + "  ".join(rates[error]))
        cells = "  ".join(f"{v:{len(k)}.2f}" for k, v in rates[error].items())
        print(f"{error:18s}  {cells}   {time.perf_counter() - began:.0f} s", flush=True)
    print()

    def mc_error(rate: float) -> float:
        # Laplace's rule keeps the error of a rate of 0 or 1 positive
        kept = (rate * repeats + 1) / (repeats + 2)
        return math.sqrt(kept * (1 - kept) / repeats)

    power = min(rates[e]["combined"] for e in ERRORS[1:])
    bench.add("planted_power", power, "", mc_error(power), f"smallest of three errors, {repeats} repeats")
    size = 1 - rates["exact"]["combined"]
    bench.add("planted_size", size, "", mc_error(size), f"exact posterior passes, {repeats} repeats")
    bench.add(
        "blind_prior_only", rates["prior only"]["SBC coordinates"], "", None, "SBC without log p(d|x): should miss"
    )
    bench.finish()


if __name__ == "__main__":
    main()
