"""Log-likelihoods of learned priors against exact densities: two moons, and the ODE of an exact denoiser.

Each function returns one figure; run alone, the file prints them.

    flow_nll_gap, cnf_nll_gap, fm_nll_gap    E[−log q(x)] − H(p), nats, of two moons with noise 0.1, unscaled
    ode_loglik_error                         |error| of log p(x), nats a dimension, mean over draws

The exact density of the moons is that of two half circles convolved with N(0, 0.01 I), by Gauss–Legendre quadrature
(`invgen.data.TwoMoons.log_prob`), and the entropy is the trapezoidal rule's. The gap is KL(p | q): it is estimated as the mean
of log p(x) − log q(x) over fresh draws, which has far less variance than the difference of −log q and the entropy.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from invgen.covariance import Dense
from invgen.data.toys import TwoMoons
from invgen.priors import ContinuousFlow, DiffusionPrior, Flow, FlowMatching, GaussianPrior, Training
from invgen.priors.networks import MLPDenoiser
from invgen.transforms import Affine

__all__ = ["cnf_nll_gap", "flow_nll_gap", "fm_nll_gap", "nll_gap", "ode_loglik_error"]

_MOONS = TwoMoons(noise=0.1)


def _standard() -> Affine:
    x = torch.from_numpy(_MOONS.sample(20_000, seed=9))
    return Affine(x.mean(0), x.std(0))


def _train(prior: Any, seed: int, **options: Any) -> Any:
    Training(seed=seed, weight_decay=0.0, log_every=500, **options).fit(prior, _MOONS, progress=False)
    return prior


def nll_gap(log_prob: Callable[[Tensor], Tensor], n: int = 20_000) -> tuple[float, float]:
    """Mean of log p − log q over n fresh draws of the moons, and its standard error, in nats.

    Args:
        log_prob: log q of x `(m, 2)`, float32.
    """
    x = torch.from_numpy(_MOONS.sample(n, seed=12345))
    exact = torch.from_numpy(_MOONS.log_prob(x.numpy()))
    with torch.no_grad():
        found = torch.cat([log_prob(part).double() for part in x.split(5000)])
    off = exact - found
    return float(off.mean()), float(off.std()) / math.sqrt(n)


def flow_nll_gap(*, kind: str = "nsf", steps: int = 3000, batch_size: int = 512, seed: int = 0) -> float:
    """A coupling flow (`kind`: "nsf", 6 layers of splines, or "realnvp", 12 affine layers) trained on fresh draws."""
    torch.manual_seed(seed)
    flow = Flow(2, kind=kind, transforms=6 if kind == "nsf" else 12, hidden=(64, 64), transform=_standard())
    return nll_gap(_train(flow, seed, steps=steps, batch_size=batch_size, learning_rate=2e-3).log_prob)[0]


def cnf_nll_gap(*, steps: int = 1600, batch_size: int = 256, seed: int = 0) -> float:
    """A continuous flow with exact traces, evaluated with 64 Runge–Kutta steps."""
    torch.manual_seed(seed)
    flow = ContinuousFlow(2, width=64, depth=3, training_steps=4, steps=64, kinetic=0.005, transform=_standard())
    _train(flow, seed, steps=steps, batch_size=batch_size, learning_rate=6e-3, ema=0.98)
    return nll_gap(flow.log_prob, 5000)[0]


def fm_nll_gap(*, steps: int = 15_000, batch_size: int = 1024, seed: int = 0) -> float:
    """Flow matching, its density by the adaptive ODE with exact traces."""
    torch.manual_seed(seed)
    prior = FlowMatching(MLPDenoiser(2, width=128, depth=3), (2,), transform=_standard())
    _train(prior, seed, steps=steps, batch_size=batch_size, learning_rate=2e-3, ema=0.9995)
    return nll_gap(lambda x: prior.log_prob_estimate(x, trace="exact", rtol=1e-4, atol=1e-4), 10_000)[0]


class _Exact(torch.nn.Module):
    """The network that makes EDM's D the exact denoiser of a law."""

    def __init__(self, law: GaussianPrior, s: float) -> None:
        super().__init__()
        self.law, self.s = law, s
        self.anchor = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        sigma = (4 * noise).exp()
        total = (sigma.square() + self.s**2).sqrt()[:, None]
        u = x * total
        return (self.law.denoise(u, sigma) - (self.s / total) ** 2 * u) * total / (sigma[:, None] * self.s)


def ode_loglik_error(*, dim: int = 16, draws: int = 64, seed: int = 0) -> float:
    """Exact denoiser and exact trace on a correlated Gaussian with a mean, through an affine transform; float64."""
    place = torch.arange(dim, dtype=torch.float64)
    covariance = torch.exp(-(place[:, None] - place).abs() / 4) * (0.3 + place / dim).sqrt().outer(
        (0.3 + place / dim).sqrt()
    )
    law = GaussianPrior(torch.sin(place), Dense(covariance), transform=Affine(2.0, 3.0))
    s = float(covariance.diagonal().mean().sqrt())
    spread = float(covariance.mean())
    prior = DiffusionPrior(
        _Exact(law, s), (dim,), transform=law.transform, sigma_data=s, sigma_min=0.002, mean_variance_of_field=spread
    )
    x = law.sample(draws, seed=seed, dtype=torch.float64)
    error = prior.log_prob_estimate(x, trace="exact") - law.log_prob(x)
    return float(error.abs().mean()) / dim


def main() -> None:
    """Print the figures as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", default=["ode_loglik_error", "flow_nll_gap", "cnf_nll_gap", "fm_nll_gap"])
    torch.set_num_threads(1)
    out = {}
    for name in parser.parse_args().figures:
        began = time.process_time()
        out[name] = globals()[name]()
        out[f"{name}_seconds"] = round(time.process_time() - began, 1)
    print(json.dumps(out))


if __name__ == "__main__":
    main()
