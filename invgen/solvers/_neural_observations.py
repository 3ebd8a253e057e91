"""New data for a trained estimator: checked, and as the problem that the driver runs on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from invgen.contracts import Operator
from invgen.driver import Streams
from invgen.problem import InverseProblem, Term
from invgen.solvers._neural_coordinates import Coordinates
from invgen.solvers._neural_features import Features


class _Shape(Operator):
    """The shapes of a simulator that is not at hand."""

    derivative_order = 0

    def forward(self, x: Tensor, **theta: Tensor) -> Tensor:
        raise TypeError("The estimator was loaded without its problem, which has the simulator; load with problem=.")


def _no_noise(prediction: Tensor, **theta: Tensor) -> Any:
    raise TypeError("The estimator was loaded without its problem, which has the noise; load with problem=.")


class _Law:
    """The shape and coordinates of a prior that is not at hand."""

    def __init__(self, shape: tuple[int, ...], transform: Any) -> None:
        self.shape, self.grid, self.transform = shape, None, transform


def as_problem(
    d: Tensor | Sequence[Tensor], problem: InverseProblem | None, coordinates: Coordinates, features: Features
) -> InverseProblem:
    """The problem with the data d, checked against those of the simulations.

    Raises:
        ValueError: NaN, or another shape. TypeError: no numbers, or a generator that is not at hand.
    """
    several = len(features.shapes) > 1
    given = list(d) if several and isinstance(d, (list, tuple)) else [d]
    if len(given) != len(features.shapes):
        raise ValueError(
            f"The estimator was trained for {len(features.shapes)} terms of data, got {len(given)}; give a list with one tensor a term."
        )
    data = []
    for i, (value, shape) in enumerate(zip(given, features.shapes, strict=True)):
        try:
            tensor = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"The observation is a {type(value).__name__}; give a tensor or a NumPy array.") from error
        if tuple(tensor.shape) != shape and tuple(tensor.shape[1:]) != shape:
            raise ValueError(
                f"The observation has the shape {tuple(tensor.shape)}, the estimator was trained for {shape}; give that shape or (n_obs, *that shape)."
            )
        tensor = tensor if tuple(tensor.shape) != shape else tensor[None]
        if not (tensor.is_floating_point() or tensor.is_complex()):
            tensor = tensor.to(torch.get_default_dtype())
        mask = features.masks[i]
        seen = tensor if mask is None else tensor[:, mask.to(tensor.device)]
        if not bool(torch.isfinite(seen).all()):
            raise ValueError(
                f"The observation holds {int((~torch.isfinite(seen)).sum())} NaN or infinite values, which no simulation had; train with the mask of what is measured, or fill them as the simulator would."
            )
        data.append(tensor)
    if problem is not None:
        return problem.with_data(*data)
    if coordinates.space == "z":
        raise TypeError(
            "The estimator draws the latent of a generator, which a file does not hold; load with problem=."
        )
    law: Any = _Law(coordinates.model_shape, coordinates.transforms[""])
    terms = [
        Term(t, _Shape(coordinates.model_shape, s), _no_noise, m, f"data{i}")
        for i, (t, s, m) in enumerate(zip(data, features.shapes, features.masks, strict=True))
    ]
    nuisance = {n: _Law((1,), coordinates.transforms[n]) for n in coordinates.names}
    return InverseProblem(terms=terms, prior=law, nuisance=nuisance)


def first_items(rng: Streams) -> tuple[Tensor, Tensor]:
    """Of each observation in a chunk the first item, and of each item the number of its observation in the chunk."""
    seen: dict[int, int] = {}
    first: list[int] = []
    owner: list[int] = []
    for i, (o, _) in enumerate(rng.items):
        if o not in seen:
            seen[o] = len(first)
            first.append(i)
        owner.append(seen[o])
    return torch.tensor(first, device=rng.device), torch.tensor(owner, device=rng.device)
