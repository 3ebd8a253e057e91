"""`torch.compile` for the network of a diffusion prior, for the time of a sampling step.

What is compiled is the network and, through it, its vector–Jacobian product: nearly all the work of a step. The rest
is a few elementwise operations with host floats that differ at every noise level; compiled along, they would be
compiled again at every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from invgen.problem import InverseProblem

__all__: list[str] = []


def check_compiler(problem: InverseProblem, solver: object) -> None:
    """Raise a TypeError where there is no network, a RuntimeError where nothing can be compiled."""
    network = getattr(problem.prior, "network", None)
    name = type(solver).__name__
    if not isinstance(network, nn.Module):
        raise TypeError(
            f"{name}(compile=True) compiles the prior's network, and {type(problem.prior).__name__} has none; leave compile off."
        )
    place = next((p.device for p in network.parameters()), torch.device("cpu"))
    try:
        problem.remember(("compiler", place), lambda: torch.compile(_probe)(torch.zeros(2, device=place)))
    except Exception as error:  # the compilers fail with many types, and not all of them are public
        reason = " ".join(str(error).split())[:160]
        raise RuntimeError(
            f"{name}(compile=True) needs a compiler that torch.compile can use (C++ on a CPU, Triton on a GPU), and a trial failed here with {type(error).__name__} ({reason}); leave compile off."
        ) from error


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x + 1


@contextmanager
def network_compiled(problem: InverseProblem, active: bool) -> Iterator[None]:
    """Inside, `problem.prior.network` is its compiled self; outside nothing has changed."""
    if not active:
        yield
        return
    prior: Any = problem.prior
    plain = prior.network
    compiled = problem.remember(("compiled network", id(plain)), lambda: torch.compile(plain))
    with ExitStack() as stack:
        config: Any = getattr(torch._functorch, "config", None)
        if hasattr(config, "donated_buffer"):  # one forward pass serves several products with its Jacobian
            stack.enter_context(config.patch(donated_buffer=False))
        prior.network = compiled
        try:
            yield
        finally:
            prior.network = plain
