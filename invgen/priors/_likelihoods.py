"""p(u | z) of a decoder's outputs: Gaussian, Bernoulli, categorical; log-likelihoods are sums over the entries of u."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from invgen.driver import Streams

__all__: list[str] = []

KINDS = ("gaussian", "bernoulli", "categorical")


class Likelihood(nn.Module):
    """p(u | outputs) for u `(batch, *shape)` and the outputs of a decoder `(batch, outputs · shape[0], …)`.

    Attributes:
        discrete: a probability mass, to which the Jacobian of the transform does not apply.
        multiple: outputs the decoder needs for each channel of u.
        entries: number of variables an item has, the divisor of "per dimension".
    """

    discrete = True
    multiple = 1

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.entries = shape, math.prod(shape)

    def settings(self) -> dict[str, Any]:
        """What the constructor of a prior needs to make it again, JSON-able."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Learned or stated numbers, for `restore`."""
        return {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take the numbers back."""

    def check(self, u: Tensor) -> None:
        """Raise a ValueError where u has no likelihood."""

    def log_prob(self, u: Tensor, outputs: Tensor) -> Tensor:
        """log p(u | outputs), `(batch,)` nats: the sum over entries."""
        raise NotImplementedError

    def mean(self, outputs: Tensor) -> Tensor:
        """E[u | outputs], `(batch, *shape)`."""
        raise NotImplementedError

    def draw(self, outputs: Tensor, rng: Streams) -> Tensor:
        """u ~ p(u | outputs)."""
        raise NotImplementedError


class GaussianLikelihood(Likelihood):
    """N(u; outputs, sigma²), sigma one number or one an entry, stated or learned."""

    discrete = False

    def __init__(self, shape: tuple[int, ...], sigma: float | Tensor | None, per_entry: bool) -> None:
        super().__init__(shape)
        self.learned = sigma is None
        value = torch.ones(shape if per_entry else ()) if sigma is None else torch.as_tensor(sigma, dtype=torch.float64)
        if value.ndim and tuple(value.shape) != shape:
            raise ValueError(
                f"sigma has the shape {tuple(value.shape)} but a field {shape}; give a number or one value an entry."
            )
        if not bool((value > 0).all()) or not bool(torch.isfinite(value).all()):
            raise ValueError("sigma must be positive and finite; give None to learn it.")
        self.tenth: Tensor
        if self.learned:
            self.tenth = nn.Parameter(value.log() / 10)
        else:
            self.register_buffer("tenth", value.log() / 10)

    @property
    def log_sigma(self) -> Tensor:
        # Adam moves every parameter by about its learning rate: ten times that lets sigma follow the decoder, which
        # takes it through several e-folds within a training of some thousand steps
        return 10 * self.tenth

    @property
    def sigma(self) -> Tensor:
        return self.log_sigma.detach().exp()

    def settings(self) -> dict[str, Any]:
        return {"learned": self.learned, "per_entry": self.tenth.ndim > 0}

    def tensors(self) -> dict[str, Tensor]:
        return {"tenth": self.tenth.detach()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.tenth.data = tensors["tenth"]

    def log_prob(self, u: Tensor, outputs: Tensor) -> Tensor:
        log_sigma = self.log_sigma.to(u)
        z = (u - outputs.to(u)) * (-log_sigma).exp()
        return (-0.5 * z.square() - log_sigma - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)

    def mean(self, outputs: Tensor) -> Tensor:
        return outputs

    def draw(self, outputs: Tensor, rng: Streams) -> Tensor:
        return outputs + self.sigma.to(outputs) * rng.normal(self.shape, dtype=outputs.dtype, tag="likelihood")


class BernoulliLikelihood(Likelihood):
    """u in {0, 1}, P(u = 1) = sigmoid(outputs)."""

    def check(self, u: Tensor) -> None:
        if not bool(((u == 0) | (u == 1)).all()):
            raise ValueError(
                f"A Bernoulli likelihood is a law of 0 and 1, the field holds values between {float(u.min()):g} and {float(u.max()):g}; round it, or use likelihood='gaussian'."
            )

    def log_prob(self, u: Tensor, outputs: Tensor) -> Tensor:
        return -F.binary_cross_entropy_with_logits(outputs.to(u), u, reduction="none").flatten(1).sum(1)

    def mean(self, outputs: Tensor) -> Tensor:
        return outputs.sigmoid()

    def draw(self, outputs: Tensor, rng: Streams) -> Tensor:
        return (rng.uniform(self.shape, dtype=outputs.dtype, tag="likelihood") < outputs.sigmoid()).to(outputs)


class CategoricalLikelihood(Likelihood):
    """Every entry of u takes one of K values, P(values[k]) = softmax_k(outputs `(batch, K · shape[0], …)`).

    The mean is Σ_k p_k values[k]: for facies that stand for a property, the expected property. Without values u is
    one-hot over its channels, and the mean holds the probabilities of the classes.
    """

    def __init__(self, shape: tuple[int, ...], values: Sequence[float] | Tensor | None) -> None:
        super().__init__(shape)
        self.one_hot = values is None
        given = torch.zeros(0) if values is None else torch.as_tensor(values, dtype=torch.float64)
        if values is None:
            if shape[0] < 2:
                raise ValueError(
                    "A categorical likelihood without values is one-hot over the channels and needs at least two of them; give values=(0, 1, …) for fields of labels."
                )
            self.entries = math.prod(shape[1:])
        elif given.ndim != 1 or len(given) < 2 or len(given.unique()) < len(given):
            raise ValueError(f"A categorical likelihood needs at least two different values, got {given.tolist()}.")
        else:
            self.multiple = len(given)
        self.values: Tensor
        self.register_buffer("values", given, persistent=False)

    def settings(self) -> dict[str, Any]:
        return {"values": None if self.one_hot else self.values.tolist()}

    def _logits(self, outputs: Tensor) -> Tensor:
        return outputs if self.one_hot else outputs.reshape(-1, self.multiple, *self.shape)

    def _labels(self, u: Tensor) -> Tensor:
        distance = (u[:, None] - self.values.to(u).reshape(1, -1, *(1,) * len(self.shape))).abs()
        return distance.argmin(1)

    def check(self, u: Tensor) -> None:
        if self.one_hot:
            good = bool(((u == 0) | (u == 1)).all()) and bool((u.sum(1) == 1).all())
        else:
            nearest = self.values.to(u)[self._labels(u)]
            good = bool(((u - nearest).abs() <= 1e-4 * (self.values.max() - self.values.min()).to(u)).all())
        if not good:
            wanted = "one-hot channels" if self.one_hot else f"the values {self.values.tolist()}"
            raise ValueError(
                f"A categorical likelihood was given a field of other entries than {wanted}; state its values, or use likelihood='gaussian'."
            )

    def log_prob(self, u: Tensor, outputs: Tensor) -> Tensor:
        log_p = self._logits(outputs.to(u)).log_softmax(1)
        chosen = (u * log_p).sum(1) if self.one_hot else log_p.gather(1, self._labels(u)[:, None])
        return chosen.flatten(1).sum(1)

    def mean(self, outputs: Tensor) -> Tensor:
        p = self._logits(outputs).softmax(1)
        if self.one_hot:
            return p
        return (p * self.values.to(p).reshape(1, -1, *(1,) * len(self.shape))).sum(1)

    def draw(self, outputs: Tensor, rng: Streams) -> Tensor:
        cumulative = self._logits(outputs).softmax(1).cumsum(1)
        shape = self.shape[1:] if self.one_hot else self.shape
        level = rng.uniform(shape, dtype=outputs.dtype, tag="likelihood")[:, None]
        label = (cumulative < level).sum(1).clamp_max(cumulative.shape[1] - 1)
        if self.one_hot:
            return torch.zeros_like(cumulative).scatter_(1, label[:, None], 1.0)
        return self.values.to(outputs)[label]


def likelihood_of(
    kind: str,
    shape: tuple[int, ...],
    *,
    sigma: float | Tensor | None = None,
    per_entry: bool = False,
    values: Sequence[float] | Tensor | None = None,
) -> Likelihood:
    """The likelihood called `kind`; raises a ValueError for another name or an option that it does not have."""
    if kind not in KINDS:
        raise ValueError(f"The likelihood is one of {', '.join(KINDS)}, got {kind!r}.")
    if kind != "gaussian" and (sigma is not None or per_entry):
        raise ValueError(f"A {kind} likelihood has no sigma; leave sigma and per_entry out.")
    if kind != "categorical" and values is not None:
        raise ValueError(f"A {kind} likelihood has no values; leave them out or use likelihood='categorical'.")
    if kind == "gaussian":
        return GaussianLikelihood(shape, sigma, per_entry)
    return BernoulliLikelihood(shape) if kind == "bernoulli" else CategoricalLikelihood(shape, values)
