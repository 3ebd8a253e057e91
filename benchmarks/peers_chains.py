"""CUQIpy's and Pyro's samplers on the problem of `mcmc.py`; run by it with the interpreter of `make peers`.

python peers_chains.py PROBLEM.npz OUT.npz nuts rto pcn pyro [--fast]

PROBLEM.npz: matrix A, data d, noise sd, prior mean and covariance. OUT.npz: for each part the draws `(draw, dim)` and the
CPU seconds of everything after the problem is stated (warm-up included), one thread, and versions. Settings are the
libraries' own where nothing else is said; NUTS of CUQIpy is also run with a warm-up that tunes at every step, which its default
(ten times in all) does not, and `mcmc.py` compares with the better of the two.
"""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np


def cuqipy_posterior(problem: dict[str, np.ndarray]) -> Any:
    """x ~ N(mean, covariance), y ~ N(A x, noise²), given y."""
    import cuqi

    model = cuqi.model.LinearModel(problem["A"])
    x = cuqi.distribution.Gaussian(problem["mean"], cov=problem["covariance"], name="x")
    y = cuqi.distribution.Gaussian(model(x), cov=float(problem["noise"]) ** 2, name="y")
    return cuqi.distribution.JointDistribution(x, y)(y=problem["d"])


def cuqipy_nuts(problem: dict[str, np.ndarray], fast: bool, every: float) -> tuple[np.ndarray, float]:
    """Draws and seconds of NUTS; `every` is the share of the warm-up between two tunings."""
    import cuqi

    posterior = cuqipy_posterior(problem)
    warmup, draws = (200, 400) if fast else (500, 1000)
    start = time.process_time()
    sampler = cuqi.sampler.NUTS(posterior, initial_point=problem["mean"])
    sampler.warmup(warmup, tune_freq=every)
    sampler.sample(draws)
    seconds = time.process_time() - start
    return sampler.get_samples().samples.T[-draws:], seconds


def cuqipy_rto(problem: dict[str, np.ndarray], fast: bool) -> tuple[np.ndarray, float]:
    """LinearRTO with 100 iterations a draw: with its default of 10 the draws spread too little."""
    import cuqi

    posterior = cuqipy_posterior(problem)
    draws = 200 if fast else 1000
    start = time.process_time()
    sampler = cuqi.sampler.LinearRTO(posterior, maxit=100)
    sampler.sample(draws)
    return sampler.get_samples().samples.T[-draws:], time.process_time() - start


def cuqipy_pcn(problem: dict[str, np.ndarray], fast: bool) -> tuple[np.ndarray, float]:
    """Cost of steps alone; the chain has the wrong stationary law for a mean that is not zero."""
    import cuqi

    posterior = cuqipy_posterior(problem)
    sampler = cuqi.sampler.PCN(posterior, scale=0.02, initial_point=problem["mean"])
    sampler.sample(10)
    draws = 500 if fast else 2000
    start = time.process_time()
    sampler.sample(draws)
    return sampler.get_samples().samples.T[-draws:], time.process_time() - start


def pyro_nuts(problem: dict[str, np.ndarray], fast: bool) -> tuple[np.ndarray, float]:
    """Pyro's NUTS in whitened coordinates, x = mean + L z with z ~ N(0, I), in float64."""
    import pyro
    import torch
    from pyro.distributions import Normal
    from pyro.infer import MCMC, NUTS

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    A, d, mean, covariance = (torch.as_tensor(problem[k]) for k in ("A", "d", "mean", "covariance"))
    noise, root = float(problem["noise"]), torch.linalg.cholesky(covariance)

    def model() -> None:
        z = pyro.sample("z", Normal(torch.zeros_like(mean), 1.0).to_event(1))
        pyro.sample("y", Normal(A @ (mean + root @ z), noise).to_event(1), obs=d)

    warmup, draws = (100, 100) if fast else (300, 300)
    start = time.process_time()
    run = MCMC(NUTS(model), num_samples=draws, warmup_steps=warmup, disable_progbar=True)
    run.run()
    z = run.get_samples()["z"]
    seconds = time.process_time() - start
    return (mean + z @ root.T).numpy(), seconds


PARTS: dict[str, dict[str, Callable[..., tuple[np.ndarray, float]]]] = {
    "nuts": {
        "cuqipy_nuts": lambda p, fast: cuqipy_nuts(p, fast, 0.1),
        "cuqipy_nuts_tuned": lambda p, fast: cuqipy_nuts(p, fast, 0.001),
    },
    "rto": {"cuqipy_rto": cuqipy_rto},
    "pcn": {"cuqipy_pcn": cuqipy_pcn},
    "pyro": {"pyro_nuts": pyro_nuts},
}


def main() -> None:
    """Run the parts named on the command line."""
    source, out, *rest = sys.argv[1:]
    fast, parts = "--fast" in rest, [r for r in rest if r in PARTS]
    problem = dict(np.load(source))
    found: dict[str, Any] = {}
    for part in parts:
        for name, function in PARTS[part].items():
            np.random.seed(0)  # noqa: NPY002 - CUQIpy draws from the global state
            try:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    draws, seconds = function(problem, fast)
            except ImportError as error:
                found[f"{name}_missing"] = np.array(str(error))
                continue
            found[f"{name}_draws"], found[f"{name}_seconds"] = draws, np.array(seconds)
    for package in ("CUQIpy", "pyro-ppl"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[f"version_{package}"] = np.array(metadata.version(package))
    np.savez(out, **found)


if __name__ == "__main__":
    main()
